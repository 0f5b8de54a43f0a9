"""Compute hosts: private libvirt daemons that migrate guests to each other on one machine.

Each is a libvirtd in session mode with its own directories and its own host uuid: no root, no
namespaces, no network. libvirt tells hosts apart by the uuid alone, so migration is the real one.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.sax.saxutils import escape, quoteattr

import libvirt

from tests.rig import NOBODY, Account, RigError, end_process, panics, tail, wait_until
from tests.rig.guest_image import SHELL_PORT, VCHAN_PORT, GuestImage, Service, command_line
from tests.rig.newer_debian import inside

LIBVIRTD = "/usr/sbin/libvirtd"
QEMU = "/usr/bin/qemu-system-x86_64"
START_TIMEOUT_S = 90.0  # the first start of all probes QEMU: 4 to 8 s on an idle machine
STOP_GRACE_S = 20.0
NOVA_XMLNS = "http://openstack.org/xmlns/libvirt/nova/1.1"

MAXIMUM_CPU = (
    "<cpu mode='maximum'><feature policy='disable' name='erms'/>"
    "<feature policy='disable' name='fsrm'/></cpu>"
)
COMMON_CPU = (  # rdrand: without it a guest waits for its first random numbers
    "<cpu mode='custom' match='exact' check='none'><model>Nehalem</model>"
    "<feature policy='require' name='rdrand'/></cpu>"
)

# A socket's path holds 107 bytes; below the host's directory libvirt makes of a channel's:
# /config/libvirt/qemu/channel/target/domain-NNN-<at most 20 of its name>/org.openstack.vchan.0
DIRECTORY_BYTES_MAX = 107 - 36 - 11 - 20 - 22


class LibvirtHost:
    """One compute host. Its directory and those above it must be reachable for other users.

    Args:
        number: Tells hosts apart; 1 to 999.
        warm_cache: Where what libvirt found out about QEMU is kept between runs. Filled by the
            first host that finds it missing; saves every later one 4 to 8 s. Of one QEMU.
        tree: Another Debian's files, to run its libvirt and QEMU (see newer_debian); needs root.
            What is beside `directory`, and nothing else, is there too.
    """

    def __init__(
        self, directory: Path, number: int, warm_cache: Path, *, tree: Path | None = None
    ) -> None:
        if len(os.fsencode(directory)) > DIRECTORY_BYTES_MAX:
            raise ValueError(f"over {DIRECTORY_BYTES_MAX} bytes, too long for sockets: {directory}")
        self.directory = directory
        self.number = number
        self.log = directory / "libvirtd.log"
        self._warm_cache = warm_cache
        self._account = Account.first_of(NOBODY)
        self._tree = tree
        self._daemon: subprocess.Popen[bytes] | None = None
        self._migrations = 0

    @property
    def uri(self) -> str:
        """For libvirt.open and for virsh."""
        return f"qemu+unix:///session?socket={self.directory}/run/libvirt/libvirt-sock"

    def __enter__(self) -> Self:
        self._write_configuration()
        try:
            self.start()
        except BaseException:
            self._end_all()
            raise
        self._keep_warm_cache()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_all()

    def open(self) -> Any:
        """A new libvirt.virConnect; the caller closes it."""
        libvirt.registerErrorHandler(lambda context, error: None, None)  # it prints all errors
        return libvirt.open(self.uri)

    def start(self) -> None:
        """Start the daemon and wait until it answers. Guests that ran on are found again."""
        if self._daemon is not None:
            raise RigError("this libvirtd runs already")
        spawner, command = self._command()
        self._daemon = spawner.spawn(
            command,
            environment=self._environment(),
            log=self.directory / "output.log",  # ours, so not the one that the daemon must write
            cwd=self.directory,
        )
        wait_until(
            self._ready,
            timeout_s=START_TIMEOUT_S,
            interval_s=0.02,
            failure=lambda: f"libvirtd did not start in {START_TIMEOUT_S} s:\n{self._logged()}",
        )

    def _command(self) -> tuple[Account, list[str | Path]]:
        """The daemon's command line, and who starts it."""
        command: list[str | Path] = [
            *(LIBVIRTD, "--config", self.directory / "config/libvirt/libvirtd.conf"),
            *("--pid-file", self.directory / "libvirtd.pid"),
        ]
        if self._tree is None:
            return self._account, command
        # Hosts find each other's sockets, and the guests' images, beside their own directories.
        here = self.directory
        return Account(None), inside(
            self._tree, command, self._account, shared=here.parent, cwd=here
        )

    @property
    def is_running(self) -> bool:
        """Started, and not ended since."""
        return self._daemon is not None and self._daemon.poll() is None

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """Stop the daemon; its guests run on, as they do on a compute node."""
        if self._daemon is not None:
            self._daemon.send_signal(signal_number)
            end_process(self._daemon, grace_s=STOP_GRACE_S)
            self._daemon = None

    def restart(self, signal_number: int = signal.SIGTERM) -> None:
        """Stop the daemon by this signal and start it again."""
        self.stop(signal_number)
        self.start()

    def migrate_uri(self) -> str:
        """A new address for the memory of a guest that migrates to this host."""
        self._migrations += 1
        return f"unix://{self.directory}/run/m{self._migrations}"

    def console_path(self, name: str) -> Path:
        """A file for a guest's console that this host's QEMU may write."""
        path = self.directory / "data" / f"{name}.console"
        panics.watch(path)
        return path

    def qemu_pid(self, name: str) -> int:
        """The process id of a guest's QEMU."""
        return int(self._pid_file(name).read_text())

    def _write_configuration(self) -> None:
        configuration = self.directory / "config" / "libvirt"
        for name in (configuration, *(self.directory / name for name in ("run", "cache", "data"))):
            name.mkdir(parents=True, exist_ok=True)
        (configuration / "libvirtd.conf").write_text(
            f'host_uuid = "76636861-6e00-4000-8000-{self.number:012d}"\n'
            'auth_unix_rw = "none"\n'
            f'log_outputs = "3:file:{self.log}"\n'
        )
        # Without virtlogd, and unconfined: a session's guests run as the daemon's user anyway.
        (configuration / "qemu.conf").write_text(
            'security_driver = "none"\nstdio_handler = "file"\n'
        )
        if self._warm_cache.is_dir():
            shutil.copytree(self._warm_cache, self.directory / "cache" / "libvirt" / "qemu")
        self._account.own(self.directory)

    def _environment(self) -> dict[str, str]:
        here = str(self.directory)
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": here,
            "XDG_CONFIG_HOME": f"{here}/config",
            "XDG_RUNTIME_DIR": f"{here}/run",
            "XDG_CACHE_HOME": f"{here}/cache",
            "XDG_DATA_HOME": f"{here}/data",
        }

    def _ready(self) -> bool:
        if self._daemon is None or self._daemon.poll() is not None:
            raise RigError(f"libvirtd ended while starting:\n{self._logged()}")
        try:
            with contextlib.closing(self.open()) as connection:
                connection.getCapabilities()  # waits until QEMU is probed
        except libvirt.libvirtError:
            return False
        return True

    def _logged(self) -> str:
        return f"{tail(self.log)}\n{tail(self.directory / 'output.log')}"

    def _keep_warm_cache(self) -> None:
        found = self.directory / "cache" / "libvirt" / "qemu"
        if self._warm_cache.exists() or not found.is_dir():
            return
        self._warm_cache.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: other test runs may look for it at the same time, or win.
        with tempfile.TemporaryDirectory(dir=self._warm_cache.parent) as holder:
            shutil.copytree(found, Path(holder) / "qemu")
            with contextlib.suppress(OSError):
                (Path(holder) / "qemu").rename(self._warm_cache)

    def _pid_file(self, name: str) -> Path:
        return self.directory / "run" / "libvirt" / "qemu" / "run" / f"{name}.pid"

    def _end_all(self) -> None:
        # QEMU by signal and not by libvirt, which takes 2 s for each and may itself be broken.
        self.stop()
        for pid_file in self._pid_file("*").parent.glob("*.pid"):
            with contextlib.suppress(ValueError, ProcessLookupError):
                pid = int(pid_file.read_text())
                if self._is_ours(pid):
                    os.kill(pid, signal.SIGKILL)
                    _wait_for_end(pid)

    def _is_ours(self, pid: int) -> bool:
        """Whether this is a QEMU of this host, and not who got its number since."""
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
        return os.fsencode(self.directory) in command and b"qemu-system" in command


def domain_xml(
    name: str,
    uuid: str,
    image: GuestImage,
    *,
    console: Path,
    services: Sequence[Service] = (),
    channel: bool = True,
    controller: bool = True,
    shell: bool = True,
    memory_mib: int = 256,
    cpu: str = MAXIMUM_CPU,
    metadata: str = "",
    devices: str = "",
    files: Mapping[str, Path] | None = None,
) -> str:
    """A domain that boots an image which QEMU can read (`GuestImage.staged`).

    Args:
        console: A file QEMU may write (`LibvirtHost.console_path`).
        channel: With vchan's channel from the start.
        controller: With a virtio-serial controller: without one no channel can be hot-plugged.
        cpu: XML. QEMUs of several releases have other maximums: between them a guest moves with one
            that both have.
        shell: With the channel for `GuestShell`. Neither it nor `channel` goes without controller.
        metadata: XML, such as `nova_metadata` makes.
        devices: XML of further devices, after the channels.
        files: Ports whose bytes QEMU appends to a file, which it must be able to write on every
            host: what was written there outlives the guest.
    """
    if (channel or shell) and not controller:
        raise ValueError("a channel needs a controller: libvirt would add one by itself")
    ports = [SHELL_PORT] * shell + [VCHAN_PORT] * channel
    return f"""<domain type='qemu'>
  <name>{escape(name)}</name>
  <uuid>{escape(uuid)}</uuid>
  <metadata>{metadata}</metadata>
  <memory unit='MiB'>{memory_mib}</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{escape(str(image.kernel))}</kernel>
    <initrd>{escape(str(image.initrd))}</initrd>
    <cmdline>{escape(command_line(services))}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  {cpu}
  <devices>
    <emulator>{QEMU}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'>
      <source path={quoteattr(str(console))} append='on'/>
      <target port='0'/>
    </serial>
    {"<controller type='virtio-serial' index='0'/>" if controller else ""}
    {"".join(channel_xml(port) for port in ports)}
    {"".join(file_channel_xml(port, path) for port, path in (files or {}).items())}
    {devices}
  </devices>
</domain>
"""


def channel_xml(target_name: str) -> str:
    """A channel with a path of libvirt's choice, which is another on every host."""
    return (
        "<channel type='unix'><source mode='bind'/>"
        f"<target type='virtio' name={quoteattr(target_name)}/></channel>"
    )


def file_channel_xml(target_name: str, path: Path) -> str:
    """A channel that goes one way: into a file."""
    return (
        f"<channel type='file'><source path={quoteattr(str(path))} append='on'/>"
        f"<target type='virtio' name={quoteattr(target_name)}/></channel>"
    )


def nova_metadata(
    *, name: str, project: str, user: str, flavor: str, image: str, addresses: Sequence[str] = ()
) -> str:
    """What nova writes into its domains' metadata, as far as vchan reads it."""
    ips = "".join(
        f'<nova:ip type="fixed" address={quoteattr(each)} ipVersion="{6 if ":" in each else 4}"/>'
        for each in addresses
    )
    return f"""
    <nova:instance xmlns:nova="{NOVA_XMLNS}">
      <nova:package version="27.0.0"/>
      <nova:name>{escape(name)}</nova:name>
      <nova:flavor name={quoteattr(flavor)}/>
      <nova:owner>
        <nova:user uuid={quoteattr(user)}>{escape(user)}</nova:user>
        <nova:project uuid={quoteattr(project)}>{escape(project)}</nova:project>
      </nova:owner>
      <nova:root type="image" uuid={quoteattr(image)}/>
      <nova:ports><nova:port uuid={quoteattr(image)}>{ips}</nova:port></nova:ports>
    </nova:instance>
  """


def channel_path(domain: Any, target_name: str = VCHAN_PORT) -> Path:
    """The unix socket of a running domain's channel, on the host the domain was looked up on."""
    for channel in ET.fromstring(domain.XMLDesc()).iterfind("devices/channel"):
        target, source = channel.find("target"), channel.find("source")
        if target is not None and target.get("name") == target_name and source is not None:
            return Path(source.get("path", ""))
    raise RigError(f"{domain.name()} has no channel {target_name}")


def migrate(
    domain: Any, destination: LibvirtHost, *, live: bool = True, timeout_s: float = 60.0
) -> None:
    """Migrate a domain as nova does: peer to peer, persistent if it was so.

    Afterwards `domain` no longer runs; look it up on the destination.

    Raises:
        libvirt.libvirtError: It failed, or took over `timeout_s`; the domain stays where it was.
    """
    flags = libvirt.VIR_MIGRATE_PEER2PEER
    if live:
        flags |= libvirt.VIR_MIGRATE_LIVE
    if domain.isPersistent():
        flags |= libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    limit = threading.Timer(timeout_s, _abort, (domain,))
    limit.start()
    try:
        parameters = {libvirt.VIR_MIGRATE_PARAM_URI: destination.migrate_uri()}
        domain.migrateToURI3(destination.uri, parameters, flags)
    finally:
        limit.cancel()


def _abort(domain: Any) -> None:
    with contextlib.suppress(libvirt.libvirtError):  # it may just have ended
        domain.abortJob()


def _wait_for_end(pid: int) -> None:
    """QEMU is no child of ours: see it go, so that its sockets and files are free."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        select.select([process], [], [], STOP_GRACE_S)
        os.close(process)
