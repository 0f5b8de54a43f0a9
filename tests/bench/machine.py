"""The guest that everything is measured in."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.bench.peers import READY_TIMEOUT_S
from tests.rig import RigError
from tests.rig.guest import GuestSpec, QemuGuest
from tests.rig.guest_image import PORT_ECHO, PYTHON, VCHAN_PORT, Service, build
from vchan.wire import layout

IN_GUEST = Path(__file__).with_name("in_guest")
PORTS = Path("/dev/virtio-ports")
DAEMON = "vchan-guest --quiet"
# What an installer makes of the entry point; `python -m` would start a tenth slower.
DAEMON_SCRIPT = f"""#!{PYTHON}
import sys
from vchan.guest.daemon import main
sys.exit(main())
"""

C_ECHO = "bench.echo.c"
SELECT_ECHO = "bench.echo.select"
ASYNCIO_ECHO = "bench.echo.asyncio"
RELAY_ECHO = "bench.echo.relay"
C_BULK = "bench.bulk.c"
PYTHON_BULK = "bench.bulk.python"
GUEST_AGENT = "org.qemu.guest_agent.0"
START = "bench.start"
STARTED = "bench.started"

CLOCK_TICK_S = 0.01  # /proc/PID/stat's unit


def services() -> tuple[Service, ...]:
    """What runs in the guest all the time; who is not measured waits for its port."""
    return (
        Service("c-echo", f"{PORT_ECHO} {PORTS / C_ECHO}"),
        Service("select-echo", f"{PYTHON} /bench/echo_select.py {PORTS / SELECT_ECHO}"),
        Service("asyncio-echo", f"{PYTHON} /bench/echo_asyncio.py {PORTS / ASYNCIO_ECHO}"),
        Service("relay-echo", f"{PYTHON} /bench/echo_relay.py {PORTS / RELAY_ECHO}"),
        Service("c-bulk", f"/bench/bulk {PORTS / C_BULK}"),
        Service("python-bulk", f"{PYTHON} /bench/bulk.py {PORTS / PYTHON_BULK}"),
        Service("qemu-ga", f"qemu-ga -m virtio-serial -p {PORTS / GUEST_AGENT}"),
        Service("vchan-guest", DAEMON),
        Service("agent", f"{PYTHON} /bench/agent.py"),
    )


def wait_for_port(name: str) -> str:
    """A shell script: init makes ports' links as they appear, and who is early makes a file."""
    return f"until [ -e {PORTS / name} ]; do sleep 0.02; done"


class Taken(NamedTuple):
    """Time that passed, and CPU time that QEMU used, which other load disturbs less."""

    ms: float
    cpu_ms: float


class Machine:
    """The running guest, and what can be learnt of it without disturbing what is measured."""

    def __init__(self, guest: QemuGuest) -> None:
        self.guest = guest

    def cpu_s(self) -> float:
        """CPU time that QEMU has used: the guest's work and the channel's."""
        fields = Path(f"/proc/{self.guest.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * CLOCK_TICK_S

    def connect(self, port: str) -> socket.socket:
        """A client of a port."""
        return self.guest.connect(port, timeout_s=READY_TIMEOUT_S)

    def memory_mib(self, service: str) -> float:
        """A service's resident memory."""
        finished = self.guest.shell(f"grep VmRSS /proc/$(cat /run/{service}.pid)/status")
        return int(finished.output.split()[1]) / 1024

    def make_file(self, path: str, size: int) -> None:
        """A file of random bytes."""
        finished = self.guest.shell(f"head -c {size} /dev/urandom >{path}")
        if finished.status:
            raise RigError(finished.output)

    def start_ms(self, command: str, first: bytes, ask: bytes = b"") -> float:
        """Milliseconds from a program's exec until it has said something on its port.

        Args:
            command: The program; `{port}` in it stands for the port's path.
            first: What it says, or the beginning of that.
            ask: What it is asked; it lies ready on the port when the program opens it.
        """
        with self.connect(START) as channel:
            if ask:
                channel.sendall(ask)
            with self.started(command) as since:
                read_until(channel, first)
                return since().ms

    @contextlib.contextmanager
    def started(self, command: str) -> Iterator[Callable[[], Taken]]:
        """A program on the port START, as for `start_ms`: tells what was taken since its exec."""
        with self.connect(STARTED) as started:
            run = command.format(port=PORTS / START)
            self.guest.shell(
                f"{wait_for_port(START)}; {wait_for_port(STARTED)}\n"
                f"(echo >{PORTS / STARTED}; exec {run}) >/run/start.log 2>&1 & echo $! >/run/start"
            )
            read_until(started, b"\n")
            started_s, cpu_s = time.perf_counter(), self.cpu_s()
            yield lambda: Taken(
                (time.perf_counter() - started_s) * 1000, (self.cpu_s() - cpu_s) * 1000
            )
            self.guest.shell(
                "pid=$(cat /run/start); kill $pid; while [ -e /proc/$pid ]; do sleep 0.02; done"
            )


DAEMON_SAYS = layout.MAGIC


def read_until(channel: socket.socket, wanted: bytes) -> None:
    """Read on, and away, until this has come."""
    received = b""
    while wanted not in received:
        part = channel.recv(65536)
        if not part:
            raise RigError("the guest closed a port")
        received += part


@contextlib.contextmanager
def machine(
    directory: Path,
    kind: type[QemuGuest] = QemuGuest,
    *,
    running: tuple[Service, ...] | None = None,
    processors: int = 1,
) -> Iterator[Machine]:
    """Boot the guest with all that is to be measured in it.

    Args:
        running: What runs in it; None: all. An echo to which nobody is connected keeps it busy.
    """
    extra: dict[str, bytes | Path] = {f"bench/{path.name}": path for path in IN_GUEST.glob("*.py")}
    extra["bin/vchan-guest"] = DAEMON_SCRIPT.encode()
    extra["bench/bulk"] = _compiled(IN_GUEST / "bulk.c", directory)
    echoes = (C_ECHO, SELECT_ECHO, ASYNCIO_ECHO, RELAY_ECHO)
    ports = (VCHAN_PORT, *echoes, C_BULK, PYTHON_BULK, GUEST_AGENT, START, STARTED)
    wanted = services() if running is None else running
    image = build(extra, peers=True)
    spec = GuestSpec(image, wanted, ports=ports, processors=processors)
    with kind(directory / "guest", spec) as guest:
        yield Machine(guest)


def _compiled(source: Path, directory: Path) -> Path:
    program = directory / source.stem
    command = ["gcc", "-static", "-O2", "-Wall", "-Werror", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RigError(f"{source.name} does not compile:\n{done.stderr}")
    return program
