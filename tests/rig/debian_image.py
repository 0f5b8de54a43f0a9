"""A Debian guest as users have it: systemd, udev and cloud-init, all of them Debian's own.

The image is made by mmdebstrap (a minute) and cached; nothing of vchan is in it. What is to be
there, cloud-init puts there at the first boot, from a NoCloud seed:

    image = debian_image.build()
    with DebianGuest(directory, image, seed={"user-data": ...}) as guest:
        guest.agent().check("systemctl is-system-running --wait")

It boots in 30 to 60 seconds under TCG, from the kernel itself: the disk is NVMe, which the kernel
has built in. A newer kernel probes its disks side by side, so that the seed may be the first of
them: the root is named by its partition. A guest's writes go to a file that QEMU has deleted
already.
"""

import base64
import itertools
import json
import os
import shutil
import struct
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from tests.rig import RigError, tail, wait_until
from tests.rig.guest import CPU, Finished, GuestSpec, QemuGuest, _port_device, connect
from tests.rig.guest_image import (
    KERNEL_OPTIONS,
    VCHAN_PORT,
    GuestImage,
    _digest,
    _kernel_release,
    _run,
    _unpack,
)
from tests.rig.kept import drop_unused, made_once
from tests.rig.release import of_this_machine

SUITE = of_this_machine().codename
AGENT_PORT = "org.qemu.guest_agent.0"
PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "iproute2", "curl"),
    *("cloud-init", "python3", "qemu-guest-agent"),
)
ENABLED = ("systemd-networkd.service",)  # as in Debian's cloud images
# Of the kernel's package: the rest is built in, or is for hardware that no guest has.
MODULES = (
    *("kernel/drivers/virtio", "kernel/drivers/char", "kernel/drivers/net/virtio_net.ko"),
    *("kernel/drivers/net/net_failover.ko", "kernel/net/core/failover.ko"),
    *("kernel/drivers/cdrom", "kernel/fs/isofs", "kernel/fs/nls"),
)
# What a test's guest has no use for, and what would take time while it boots.
MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "getty@.service", "serial-getty@.service"),
    "systemd-networkd-wait-online.service",
)
DISK_SIGNATURE = 0x76636861
ROOT = f"{DISK_SIGNATURE:08x}-01"
"""Its partition, as the kernel knows it without an initramfs."""
FILES = {
    "etc/machine-id": "",
    "etc/hostname": "guest\n",
    "etc/fstab": f"PARTUUID={ROOT} / ext4 rw,noatime 0 0\n",
    # Its disk has the size it needs and nobody logs in: cloud-init finds neither resize2fs nor
    # ssh-keygen here, and a newer one calls a boot without them failed.
    "etc/cloud/cloud.cfg.d/90-test.cfg": (
        "datasource_list: [NoCloud]\nlocale: C.UTF-8\nresize_rootfs: false\nssh_genkeytypes: []\n"
    ),
    "etc/systemd/journald.conf.d/test.conf": "[Journal]\nStorage=volatile\n",
}
MIB = 1 << 20
SECTOR = 512
LINUX_PARTITION = 0x83
DISK_MIB = 900
MEMORY_MIB = 512
BOOT_TIMEOUT_S = 1800.0
SCRIPT_TIMEOUT_S = 900.0
COMMAND_LINE = f"{KERNEL_OPTIONS} root=PARTUUID={ROOT} rootwait rw"


@dataclass(frozen=True, slots=True)
class DebianImage:
    """What is booted, and the same as a tree, to work in by chroot (after a copy)."""

    kernel: Path
    disk: Path
    tree: Path


def missing_for_debian() -> str | None:
    """None if `build` can work here."""
    if os.geteuid() != 0:
        return "mmdebstrap and chroot: needs root"
    programs = ("mmdebstrap", "genisoimage", "mke2fs", "unshare")
    missing = [name for name in programs if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}: run scripts/install-deps" if missing else None


def build() -> DebianImage:
    """The image, made now or cached."""
    settings = [f"{name}={text}" for name, text in FILES.items()]
    key = _digest(SUITE, *PACKAGES, *MODULES, *MASKED, *ENABLED, *settings)
    with made_once(f"image-{key}") as (made, part):
        if part is not None:
            _make(part)
    drop_unused("image-*")
    return DebianImage(made / "vmlinuz", made / "disk", made / "tree")


def _make(part: Path) -> None:
    bootstrap(part / "tree", PACKAGES)
    _add_kernel(part, part / "tree")
    _adapt(part / "tree")
    make_disk(part / "tree", part / "disk")


def bootstrap(tree: Path, packages: Sequence[str]) -> None:
    """A tree of the suite's most needed packages, and of these."""
    options = ["--mode=root", "--variant=minbase", "--format=directory", "--quiet"]
    # Documents and the archive's lists are half of its size, and nobody reads them.
    options += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
    _run(["mmdebstrap", *options, f"--include={','.join(packages)}", SUITE, str(tree), mirror()])


def mirror() -> str:
    """Where this machine's own apt gets its release from: an archive that has the others, too."""
    command = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Identifier: Packages"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    own = of_this_machine().codename
    for line in done.stdout.splitlines():
        site, _, release = line.partition(" ")
        if release == own:
            return site
    raise RigError(f"this machine's apt has no source for {own}: add one to sources.list.d")


def _add_kernel(part: Path, tree: Path) -> None:
    with tempfile.TemporaryDirectory(dir=part) as holder:
        unpacked = Path(holder)
        _unpack([_kernel_release()], unpacked)
        shutil.copy(next((unpacked / "boot").glob("vmlinuz-*")), part / "vmlinuz")
        source = next(unpacked.glob("**/lib/modules/*"))
        target = tree / "lib/modules" / source.name
        target.mkdir(parents=True)
        # In a later kernel a module may be packed, or built in.
        wanted = (name for module in MODULES for name in (module, f"{module}.xz"))
        for name in (*wanted, *(path.name for path in source.glob("modules.*"))):
            if (source / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                _run(["cp", "-a", str(source / name), str(target / name)])
        in_chroot(tree, "depmod", source.name)


def _adapt(tree: Path) -> None:
    for name, text in FILES.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for unit in MASKED:
        (tree / "etc/systemd/system" / unit).symlink_to("/dev/null")
    in_chroot(tree, "systemctl", "enable", *ENABLED)
    # What is installed in it later may have its documents.
    (tree / "etc/dpkg/dpkg.cfg.d/99mmdebstrap").unlink()


def make_disk(tree: Path, disk: Path) -> None:
    """A disk with a tree's files, to boot from: one partition after the first MiB."""
    start, sectors = MIB // SECTOR, (DISK_MIB - 1) * MIB // SECTOR
    entry = struct.pack("<B3sB3sII", 0, b"\xff" * 3, LINUX_PARTITION, b"\xff" * 3, start, sectors)
    disk.write_bytes(struct.pack("<440xI2x16s48x2s", DISK_SIGNATURE, entry, b"\x55\xaa"))
    os.truncate(disk, DISK_MIB * MIB)
    options = ("-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(tree))
    _run(["mke2fs", *options, "-E", f"offset={MIB}", str(disk), f"{DISK_MIB - 1}M"])


def copy_of_tree(image: DebianImage, target: Path) -> None:
    """The image's files, to be changed; with what a chroot needs to reach the network."""
    _run(["cp", "-a", str(image.tree), str(target)])
    shutil.copy("/etc/resolv.conf", target / "etc/resolv.conf")


def chroot_command(tree: Path, *, shared: Path | None = None) -> list[str]:
    """What to put before a command for it to run in a tree, as root.

    Args:
        shared: A directory that is there under the same path.
    """
    script = 'mount -t proc proc "$0/proc"'
    if shared is not None:
        (tree / shared.relative_to("/")).mkdir(parents=True, exist_ok=True)
        script += f' && mount --rbind "{shared}" "$0{shared}"'
    clean = "env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8"
    script += f' && exec chroot "$0" {clean} DEBIAN_FRONTEND=noninteractive "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(tree)]


def in_chroot(tree: Path, *command: str, check: bool = True) -> Finished:
    """Run a command in a tree, and wait for its end."""
    done = subprocess.run(
        [*chroot_command(tree), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    finished = Finished(done.returncode, done.stdout)
    if check and finished.status != 0:
        raise RigError(f"{' '.join(command)} gave {finished.status}:\n{finished.output}")
    return finished


class DebianGuest(QemuGuest):
    """One boot of the image, with a seed of its own.

    Args:
        seed: Files of the NoCloud seed, beside meta-data: user-data, vendor-data, and others.
        forward: A host's TCP port that the guest reaches as http://10.0.2.100/; with it the guest
            has a network, which leads nowhere else.
    """

    def __init__(
        self,
        directory: Path,
        image: DebianImage,
        seed: Mapping[str, bytes | str],
        *,
        forward: int | None = None,
        ports: tuple[str, ...] = (VCHAN_PORT,),
    ) -> None:
        kernel = GuestImage(image.kernel, image.disk)
        super().__init__(directory, GuestSpec(kernel, ports=ports, memory_mib=MEMORY_MIB))
        self._image = image
        self._seed = dict(seed)
        self._forward = forward
        self._guest_agent: GuestAgent | None = None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._make_seed()
        return super().__enter__()

    def kill(self) -> None:
        """End QEMU at once."""
        if self._guest_agent is not None:
            self._guest_agent.close()
            self._guest_agent = None
        super().kill()

    def agent(self) -> "GuestAgent":
        """A shell in the guest, once qemu-ga runs there."""
        if self._guest_agent is None:
            self._guest_agent = GuestAgent(self.port(AGENT_PORT), self.console)
        return self._guest_agent

    def _make_seed(self) -> None:
        files = {"meta-data": f"instance-id: {os.urandom(8).hex()}\n", **self._seed}
        seed = self.directory / "seed"
        seed.mkdir()
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            (seed / name).write_bytes(data)
        iso = str(self.directory / "seed.iso")
        _run(["genisoimage", "-quiet", "-o", iso, "-V", "cidata", "-J", "-r", str(seed)])

    def _command(self) -> list[str]:
        command = [
            *("/usr/bin/qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35", "-accel", "tcg,tb-size=256", "-cpu", CPU),
            *("-m", str(self.spec.memory_mib)),
            *("-kernel", str(self._image.kernel), "-append", COMMAND_LINE),
            *("-serial", f"file:{self.console}"),
            *("-qmp", f"unix:{self.directory / 'qmp'},server=on,wait=off"),
            *("-device", "virtio-serial-pci,id=serial0,max_ports=16"),
            *("-device", "virtio-rng-pci"),
        ]
        drives = ((self._image.disk, "snapshot=on"), (self.directory / "seed.iso", "readonly=on"))
        for number, (path, mode) in enumerate(drives):
            drive = f"file={path},if=none,id=d{number},format=raw,{mode}"
            command += ["-drive", drive, "-device", f"nvme,drive=d{number},serial=d{number}"]
        for name in (AGENT_PORT, *self.spec.ports):
            device = ",".join(f"{key}={value}" for key, value in _port_device(name).items())
            chardev = f"socket,id=c-{name},path={self.port(name)},server=on,wait=off"
            command += ["-chardev", chardev, "-device", device]
        if self._forward is not None:
            guestfwd = f"guestfwd=tcp:10.0.2.100:80-tcp:127.0.0.1:{self._forward}"
            command += ["-netdev", f"user,id=n0,restrict=on,{guestfwd}"]
            command += ["-device", "virtio-net-pci,netdev=n0"]
        return command


class Scripts(ABC):
    """Runs shell scripts in a system that has booted."""

    rest: ClassVar[float]
    """See `wait_until`: asking takes time of the system that is asked."""

    @abstractmethod
    def run(self, script: str, *, timeout_s: float = SCRIPT_TIMEOUT_S) -> Finished:
        """Run a shell script and wait for its end."""

    def check(self, script: str, *, timeout_s: float = SCRIPT_TIMEOUT_S) -> str:
        """Run a script that must succeed, and return its output."""
        finished = self.run(script, timeout_s=timeout_s)
        if finished.status != 0:
            raise RigError(f"{script!r} gave {finished.status} there:\n{finished.output}")
        return finished.output

    def wait(self, script: str, *, timeout_s: float = SCRIPT_TIMEOUT_S, why: str = "true") -> None:
        """Run a script until it succeeds; `why` is run when it does not in time."""
        wait_until(
            lambda: self.run(script).status == 0,
            timeout_s=timeout_s,
            interval_s=0.3,
            failure=lambda: f"{script!r} never succeeded:\n{self.run(why).output}",
            rest=self.rest,
        )


class GuestAgent(Scripts):
    """qemu-ga in a guest: runs shell scripts there, over a port that is not vchan's."""

    rest = 1.0

    def __init__(self, path: Path, console: Path) -> None:
        self._console = console
        self._socket = connect(path)
        self._socket.settimeout(BOOT_TIMEOUT_S)
        self._stream = self._socket.makefile("rwb")
        self._ids = itertools.count(int.from_bytes(os.urandom(3), "big"))
        self._synchronize()

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
        self._socket.close()

    def run(self, script: str, *, timeout_s: float = SCRIPT_TIMEOUT_S) -> Finished:
        """Run a shell script and wait for its end."""
        words = {"path": "/bin/sh", "arg": ["-c", f"exec 2>&1; {script}"], "capture-output": True}
        pid = self.command("guest-exec", **words)["pid"]
        state: dict[str, Any] = {}

        def ended() -> bool:
            state.update(self.command("guest-exec-status", pid=pid))
            return bool(state["exited"])

        wait_until(
            ended,
            timeout_s=timeout_s,
            interval_s=0.05,
            failure=lambda: f"{script!r} does not end:\n{tail(self._console)}",
            rest=9.0,
        )
        output = base64.b64decode(state.get("out-data", "")).decode(errors="replace")
        return Finished(state.get("exitcode", -state.get("signal", 0)), output)

    def write(self, path: str, content: bytes, *, mode: str = "644") -> None:
        """Make a file in the guest."""
        handle = self.command("guest-file-open", path=path, mode="wb")
        for start in range(0, len(content), 65536):
            data = base64.b64encode(content[start : start + 65536]).decode()
            self.command("guest-file-write", handle=handle, **{"buf-b64": data})
        self.command("guest-file-close", handle=handle)
        self.check(f"chmod {mode} {path}")

    def command(self, name: str, **arguments: Any) -> Any:
        """One command of qemu-ga's."""
        self._stream.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self._stream.flush()
        line = self._stream.readline()
        answer = json.loads(line) if line else {"error": "the port is closed"}
        if "error" in answer:
            raise RigError(f"qemu-ga: {name}: {answer['error']}\n{tail(self._console)}")
        return answer["return"]

    def _synchronize(self) -> None:
        """Wait for qemu-ga, which may have commands of another client's in its ears still."""
        number = next(self._ids)
        request = {"execute": "guest-sync", "arguments": {"id": number}}
        self._stream.write(json.dumps(request).encode() + b"\n")
        self._stream.flush()
        while line := self._stream.readline():
            if json.loads(line).get("return") == number:
                return
        raise RigError(f"qemu-ga hung up:\n{tail(self._console)}")
