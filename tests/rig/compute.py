"""A small cloud on one machine: compute hosts with vchan-host, and guests with vchan-guest.

Everything is real: the daemons are processes, the hosts are libvirtds, the guests are QEMU's.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import libvirt
import libvirt_qemu

from tests.rig import RigError, end_process, tail, wait_until
from tests.rig.guest import GuestShell
from tests.rig.guest_image import SHELL_PORT, GuestImage, Service
from tests.rig.libvirtd import LibvirtHost, channel_path, domain_xml, migrate
from vchan.client import Client
from vchan.errors import LinkError

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 90.0
GUEST_TIMEOUT_S = 180.0

POLICY = """
call,cast,fanout,notify any control* allow
call any nobody allow
"""
"""What guests may send; what they may serve is in `listen_topics`."""

GUEST_DAEMON = Service("vchan-guest", "python3 -m vchan.guest.daemon")


def agent_service(name: str, path: str, *arguments: str) -> Service:
    """A program of the guest image, kept running by its init."""
    return Service(name, " ".join(["python3", path, *arguments]))


class HostDaemon:
    """A vchan-host process.

    Args:
        directory: For its configuration, socket and log.
        transport_url: None: no broker.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        libvirt_uri: str,
        transport_url: str | None,
        *,
        options: Sequence[str] = (),
        broker_options: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.debug = False
        """Whether it logs all, from its next start on; `use_broker` writes it."""
        self.socket = directory / "host.sock"
        self.log = directory / "vchan-host.log"
        self._config = directory / "vchan.conf"
        self.program: Sequence[str] = (sys.executable, "-m", "vchan.host.daemon")
        lines = ["[vchan]", f"host = {name}", f"libvirt_uri = {libvirt_uri}", "listen_topics = *"]
        lines += [f"audit_log = {directory / 'audit.log'}"]
        self.policy = directory / "policy.d" / "50-rig.policy"
        self.policy.parent.mkdir()
        self.policy.write_text(POLICY)
        lines += [f"socket = {self.socket}", f"policy_dir = {self.policy.parent}", "select = *"]
        lines += options
        lines += ["[oslo_messaging_rabbit]", "heartbeat_timeout_threshold = 10", *broker_options]
        self._lines = lines
        self.use_broker(transport_url)
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None

    def use_broker(self, transport_url: str | None) -> None:
        """From its next start on it talks to this broker; None: to none."""
        self._transport_url = transport_url
        debug = "true" if self.debug else "false"
        lines = ["[DEFAULT]", f"debug = {debug}", f"log_file = {self.log}"]
        if transport_url is not None:
            lines.append(f"transport_url = {transport_url}")
        self._config.write_text("\n".join([*lines, *self._lines]) + "\n")

    def set_options(self, *lines: str) -> None:
        """From its next start on it has these, of its own section; `use_broker` writes them."""
        self._lines[1:1] = lines

    @contextlib.contextmanager
    def having(self, *lines: str) -> Iterator[None]:
        """It has these options of its own section meanwhile: it is started anew, twice."""
        before = list(self._lines)
        try:
            self.stop()
            end = self._lines.index("[oslo_messaging_rabbit]")  # of two of a kind the last counts
            self._lines[end:end] = lines
            self.use_broker(self._transport_url)
            self.start()
            yield
        finally:
            self.stop()
            self._lines = before
            self.use_broker(self._transport_url)
            self.start()

    @property
    def pid(self) -> int:
        """Of the running daemon."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Start it and wait until it answers."""
        with (self._config.parent / "vchan-host.out").open("ab") as output:
            self._process = subprocess.Popen(
                [*self.program, "--config-file", str(self._config)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_until(
            self._answers,
            timeout_s=START_TIMEOUT_S,
            interval_s=0.05,
            failure=lambda: f"{self.name} does not answer: {tail(self.log)}",
        )
        return self

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RigError(f"vchan-host ended: {tail(self._config.parent / 'vchan-host.out')}")
        try:
            return self.call("status")["libvirt"] in ("connected", "none configured")
        except LinkError:
            return False

    def call(self, method: str, **args: Any) -> Any:
        """One of the daemon's own methods."""
        if self._client is None:
            self._client = Client(str(self.socket))
        return self._client.call("vchan.host", method, args, timeout_s=60)

    def status(self, vm: str) -> Any:
        """What `vchan status VM` prints."""
        return self.call("status", vm=vm)

    def wait_ready(self, vm: str, *, topics: Sequence[str] = ()) -> None:
        """Wait for the VM's session, and for agents serving these topics, also by the broker."""

        def is_ready() -> bool:
            for row in self.call("list"):
                if row["name"] == vm and row["channel"] == "ready":
                    if not topics:
                        return True
                    late = self.status(vm)["requests"]["unconsumed_topics"]
                    served = {name.partition("/")[2] for name in row["topics"] if name not in late}
                    return set(topics) <= served
            return False

        wait_until(
            is_ready,
            timeout_s=GUEST_TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"{vm} is not ready on {self.name}: {tail(self.log)}",
        )

    @property
    def is_running(self) -> bool:
        """Started, and not ended since."""
        return self._process is not None and self._process.poll() is None

    def restart(self) -> None:
        """Kill it without a word, and start it again."""
        self.kill()
        self.start()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it without a word."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it in order, if it runs."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is not None:
            end_process(self._process, grace_s=10.0)


class ComputeHost:
    """A libvirtd and a vchan-host.

    Args:
        directory: A short path: see `LibvirtHost`.
        tree: As for `LibvirtHost`; vchan-host is this machine's.
    """

    def __init__(
        self,
        directory: Path,
        number: int,
        warm_cache: Path,
        transport_url: str | None,
        *,
        options: Sequence[str] = (),
        tree: Path | None = None,
    ) -> None:
        self.name = f"host{number}"
        self.libvirt = LibvirtHost(directory, number, warm_cache, tree=tree)
        daemon = directory.with_name(f"{directory.name}-daemon")
        daemon.mkdir(exist_ok=True)
        self.daemon = HostDaemon(
            daemon, self.name, self.libvirt.uri, transport_url, options=options
        )
        self._connection: Any = None

    def __enter__(self) -> Self:
        self.libvirt.__enter__()
        try:
            self.daemon.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.daemon.stop()
        if self._connection is not None:
            self._connection.close()
        self.libvirt.__exit__(kind, error, trace)

    def heal(self) -> None:
        """Start again what a test has ended."""
        if not self.libvirt.is_running:
            self.libvirt.start()
        if not self.daemon.is_running:
            self.daemon.start()

    @property
    def connection(self) -> Any:
        """To its libvirtd."""
        if self._connection is not None:
            try:
                self._connection.getLibVersion()
            except libvirt.libvirtError:  # the daemon was restarted
                self._connection.close()
                self._connection = None
        if self._connection is None:
            self._connection = self.libvirt.open()
        return self._connection

    def domain(self, vm: str) -> Any:
        """The domain of that name."""
        return self.connection.lookupByName(vm)

    def monitor(self, vm: str, command: str) -> str:
        """A command of QEMU's own monitor, for people."""
        text: str = libvirt_qemu.qemuMonitorCommand(
            self.domain(vm), command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        )
        return text

    def start_vm(
        self,
        name: str,
        image: GuestImage,
        services: Sequence[Service],
        **options: Any,
    ) -> str:
        """Define and start a VM; returns its UUID."""
        identity = str(uuid.uuid4())
        xml = domain_xml(
            name,
            identity,
            image,
            console=self.libvirt.console_path(name),
            services=services,
            **options,
        )
        self.connection.defineXML(xml).create()
        return identity

    def shell(self, vm: str) -> GuestShell:
        """A shell in the VM, until it migrates."""
        return GuestShell(channel_path(self.domain(vm), SHELL_PORT))

    def migrate(self, vm: str, to: "ComputeHost", *, live: bool = True) -> None:
        """Migrate a VM, as nova does."""
        migrate(self.domain(vm), to.libvirt, live=live)

    def cli_words(self, *arguments: str) -> list[str]:
        """The command `vchan` against this host's daemon."""
        return [sys.executable, "-m", "vchan.cli", "--socket", str(self.daemon.socket), *arguments]

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `vchan` against this host's daemon."""
        return subprocess.run(
            self.cli_words(*arguments),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    def cli_json(self, *arguments: str) -> Any:
        """Run `vchan --json` and return what it prints."""
        done = self.cli("--json", *arguments)
        if done.returncode:
            raise RigError(f"vchan {' '.join(arguments)}: {done.stderr}")
        return json.loads(done.stdout)
