"""A guest run by QEMU itself, without libvirt: quick to start, and quicker to restore.

    with QemuGuest(directory, GuestSpec(image, services=(echo,))) as guest:
        guest.shell("pgrep -f echo")
        channel = guest.connect(VCHAN_PORT)

`GuestShell`, a shell in the guest, works with libvirt's guests as well.
"""

import base64
import itertools
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.rig import Account, RigError, end_process, panics, tail, wait_until
from tests.rig.guest_image import SHELL_PORT, VCHAN_PORT, GuestImage, Service, command_line

BOOT_TIMEOUT_S = 600.0  # an emulated machine, on a busy one
QMP_TIMEOUT_S = 120.0
SHELL_LINE_BYTES_MAX = 16 << 20
# TCG runs `rep movsb` byte by byte: without these two features copies in the guest are 3 times
# as fast, and so is unpacking its initramfs.
CPU = "max,-erms,-fsrm"


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command in the guest ended; `output` has its standard error too."""

    status: int
    output: str


class GuestShell:
    """A shell in the guest, over the unix socket of its SHELL_PORT.

    One at a time per guest. Commands wait in the socket while the guest boots. After a migration
    close it and open another, on the new host's socket.
    """

    def __init__(self, path: Path) -> None:
        self._socket = connect(path)
        self._unread = bytearray()
        self._ids = itertools.count(1)
        # What an earlier shell on this guest left unanswered must not answer us.
        self._name = f"{time.monotonic_ns():x}"

    def run(self, script: str, *, timeout_s: float = 20.0) -> Finished:
        """Run a shell script in the guest and wait for its end.

        Raises:
            RigError: The guest did not answer in time, or its port is gone. The script may have
                run, and may still run.
        """
        request = f"{self._name}-{next(self._ids)}"
        deadline_s = time.monotonic() + timeout_s
        encoded = base64.b64encode(script.encode())
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(request.encode() + b" " + encoded + b"\n")
            while True:
                answered, _, rest = self._line(deadline_s).partition(b" ")
                if answered == request.encode():
                    status, _, output = rest.partition(b" ")
                    return Finished(int(status), base64.b64decode(output).decode(errors="replace"))
        except OSError as error:
            raise RigError(f"no answer from the guest to {script!r}: {error}") from error

    def check(self, script: str, *, timeout_s: float = 20.0) -> str:
        """Run a script that must succeed, and return its output."""
        finished = self.run(script, timeout_s=timeout_s)
        if finished.status != 0:
            raise RigError(f"{script!r} gave {finished.status} in the guest:\n{finished.output}")
        return finished.output

    def close(self) -> None:
        """Hang up; the guest's end waits for the next."""
        self._socket.close()

    def _line(self, deadline_s: float) -> bytes:
        while b"\n" not in self._unread:
            self._socket.settimeout(max(0.001, deadline_s - time.monotonic()))
            received = self._socket.recv(65536)
            if not received or len(self._unread) > SHELL_LINE_BYTES_MAX:
                raise RigError("the guest's shell hung up, or says too much")
            self._unread += received
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread[:] = rest
        return line


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """What a guest is made of; a snapshot can be restored into an equal guest only."""

    image: GuestImage
    services: tuple[Service, ...] = ()
    ports: tuple[str, ...] = (VCHAN_PORT,)
    serials: tuple[str, ...] = ()
    """Names of isa-serial ports' sockets: ttyS1 and on (ttyS0 is the kernel's console)."""
    consoles: tuple[str, ...] = ()
    """Names of virtio consoles' sockets: hvc0 and on."""
    memory_mib: int = 256
    processors: int = 1
    network: bool = False
    """Has a network card on QEMU's user network; the image needs what `network=True` adds."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A guest's whole state at one moment, in a file. Restored guests repeat its random numbers
    and its clock, as a user's restored or cloned guests do."""

    path: Path
    spec: GuestSpec


class QemuGuest:
    """One QEMU process under TCG, with its sockets and logs in `directory`.

    Its ports' sockets take a client before the guest has booted.
    """

    def __init__(self, directory: Path, spec: GuestSpec, *, snapshot: Snapshot | None = None):
        self.directory = directory
        self.spec = spec
        self.console = directory / "console.log"
        panics.watch(self.console)
        self._log = directory / "qemu.log"
        self._snapshot = snapshot
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Qmp | None = None
        self._shell: GuestShell | None = None

    @classmethod
    def restored(cls, directory: Path, snapshot: Snapshot) -> Self:
        """A guest that goes on where the snapshot was taken (0.3 s instead of a boot)."""
        return cls(directory, snapshot.spec, snapshot=snapshot)

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._process = Account(None).spawn(
                self._command(), environment={}, log=self._log, cwd=self.directory
            )
            self._qmp = Qmp(self.directory / "qmp", alive=self._check_alive)
            if self._snapshot is not None:
                self._resume()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """QEMU's process id: its CPU time is the measure that other load does not disturb."""
        return self._running().pid

    def kill(self) -> None:
        """End QEMU at once, as a crash of it would."""
        if self._shell is not None:
            self._shell.close()
            self._shell = None
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._process is not None:
            end_process(self._process, grace_s=0.0)
            self._process = None

    def port(self, name: str = VCHAN_PORT) -> Path:
        """The unix socket of a port. One client at a time; a second one hangs without an error."""
        return self.directory / name

    def connect(self, name: str = VCHAN_PORT, *, timeout_s: float = 20.0) -> socket.socket:
        """Connect to a port; the socket has this time limit."""
        connection = connect(self.port(name))
        connection.settimeout(timeout_s)
        return connection

    def shell(self, script: str, *, timeout_s: float = BOOT_TIMEOUT_S) -> Finished:
        """Run a script in the guest, once it has booted."""
        self._running()
        if self._shell is None:
            self._shell = GuestShell(self.port(SHELL_PORT))
        try:
            return self._shell.run(script, timeout_s=timeout_s)
        except RigError as error:
            raise RigError(f"{error}\nThe guest's console:\n{tail(self.console)}") from error

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command of QEMU's monitor protocol and return its answer."""
        if self._qmp is None:
            raise RigError("this guest does not run")
        return self._qmp.execute(command, **arguments)

    def plug(self, name: str, *, driver: str = "virtserialport") -> None:
        """Hot-plug a port with this name, or a virtio console."""
        backend = {
            "type": "socket",
            "data": {
                "addr": {"type": "unix", "data": {"path": str(self.port(name))}},
                "server": True,
                "wait": False,
            },
        }
        self.qmp("chardev-add", id=f"c-{name}", backend=backend)
        is_port = driver == "virtserialport"
        self.qmp("device_add", **(_port_device(name) if is_port else _tty_device(name, driver)))

    def unplug(self, name: str) -> None:
        """Take a port away; whoever is connected to it gets end of file."""
        self.qmp("device_del", id=f"p-{name}")
        wait_until(  # QEMU lets go of the device's chardev a little after it says it is gone
            lambda: self._removed(f"c-{name}"),
            timeout_s=QMP_TIMEOUT_S,
            interval_s=0.005,
            failure=lambda: f"the port {name} stays in use",
        )

    def snapshot(self, path: Path) -> Snapshot:
        """Save the guest into a file (0.3 s, 150 MiB). This guest is ended by it.

        Nobody may be connected to a port on whom the saved guest's program relies: a restored
        guest finds its ports' clients gone.
        """
        self.qmp("stop")
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.qmp("migrate", uri=f"exec:cat > {path}")
        wait_until(
            self._saved,
            timeout_s=BOOT_TIMEOUT_S,
            interval_s=0.005,
            failure=lambda: f"the snapshot did not end:\n{tail(self._log)}",
        )
        self.kill()
        return Snapshot(path, self.spec)

    def _saved(self) -> bool:
        status = self.qmp("query-migrate").get("status")
        if status == "failed":
            raise RigError(f"the snapshot failed:\n{tail(self._log)}")
        return bool(status == "completed")

    def _removed(self, chardev: str) -> bool:
        try:
            self.qmp("chardev-remove", id=chardev)
        except RigError:
            return chardev not in [row["label"] for row in self.qmp("query-chardev")]
        return True

    def _resume(self) -> None:
        wait_until(
            lambda: bool(self.qmp("query-status")["status"] != "inmigrate"),
            timeout_s=BOOT_TIMEOUT_S,
            interval_s=0.002,
            failure=lambda: f"the snapshot was not read:\n{tail(self._log)}",
        )
        self.qmp("cont")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RigError("this guest does not run")
        self._check_alive()
        return self._process

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            raise RigError(f"QEMU ended:\n{tail(self._log)}")

    def _command(self) -> list[str]:
        spec = self.spec
        command = [
            *("/usr/bin/qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35", "-accel", "tcg", "-cpu", CPU, "-m", str(spec.memory_mib)),
            *("-smp", str(spec.processors)),
            *("-kernel", str(spec.image.kernel), "-initrd", str(spec.image.initrd)),
            *("-append", command_line(spec.services)),
            *("-serial", f"file:{self.console}"),
            *("-qmp", f"unix:{self.directory / 'qmp'},server=on,wait=off"),
            *("-device", "virtio-serial-pci,id=serial0,max_ports=16"),
        ]
        devices = [
            *((name, _port_device(name)) for name in (SHELL_PORT, *spec.ports)),
            *((name, _tty_device(name, "isa-serial")) for name in spec.serials),
            *((name, _tty_device(name, "virtconsole")) for name in spec.consoles),
        ]
        for name, properties in devices:
            device = ",".join(f"{key}={value}" for key, value in properties.items())
            chardev = f"socket,id=c-{name},path={self.port(name)},server=on,wait=off"
            command += ["-chardev", chardev, "-device", device]
        if spec.network:
            command += ["-netdev", "user,id=net0"]
            command += ["-device", "virtio-net-pci,netdev=net0,romfile="]
        if self._snapshot is not None:
            command += ["-incoming", f"exec:cat {self._snapshot.path}"]
        return command


class Qmp:
    """The least of a QMP client: one command at a time, events are passed over."""

    def __init__(self, path: Path, *, alive: Callable[[], None]) -> None:
        self._socket = connect(path, alive=alive)
        self._socket.settimeout(QMP_TIMEOUT_S)
        self._stream = self._socket.makefile("rwb")
        self._stream.readline()  # QEMU greets first
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command; RigError if QEMU refuses it or is gone."""
        line = json.dumps({"execute": command, "arguments": arguments})
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()
        while answer := self._stream.readline():
            decoded = json.loads(answer)
            if "error" in decoded:
                raise RigError(f"QEMU refused {command}: {decoded['error']['desc']}")
            if "return" in decoded:
                return decoded["return"]
        raise RigError(f"QEMU ended before it answered {command}")

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        self._socket.close()


def connect(
    path: Path, *, timeout_s: float = 10.0, alive: Callable[[], None] = lambda: None
) -> socket.socket:
    """Connect to a unix socket that a program makes as it starts; `alive` raises if it died."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)

    def connected() -> bool:
        alive()
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    try:
        wait_until(
            connected,
            timeout_s=timeout_s,
            interval_s=0.002,
            failure=lambda: f"nobody listens on {path}",
        )
    except BaseException:
        connection.close()
        raise
    return connection


def _port_device(name: str) -> dict[str, str]:
    return _tty_device(name, "virtserialport") | {"name": name}


def _tty_device(name: str, driver: str) -> dict[str, str]:
    # A comma would end the option, and QEMU wants ids to be words.
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
        raise ValueError(f"not a port's name: {name!r}")
    device = {"driver": driver, "id": f"p-{name}", "chardev": f"c-{name}"}
    return device if driver == "isa-serial" else {**device, "bus": "serial0.0"}
