"""The same programs on this machine, without a guest: what they cost where nothing is emulated.

Every subject is a process, or two, at the other end of a unix socket; all run at once and are
measured in turns. CPU is what the kernel accounts to those processes, in nanoseconds: of all
figures the one that other load disturbs least. Where compiled modules run, the same daemon and
agent run beside them on sources.
"""

import base64
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from tests.bench.peers import AGENT_TOPIC, DAEMON_TOPIC, GuestAgent, Vchan
from tests.rig import RigError
from tests.rig.guest_image import peers_root, port_echo
from vchan import builds
from vchan.io.streams import SocketStream, listen_unix
from vchan.rpc.bodies import decode_invocation, encode_invocation, encode_json, encode_raw
from vchan.rpc.messages import CALL, RAW

ROOT = Path(__file__).parents[2]
IN_GUEST = Path(__file__).with_name("in_guest")
START_TIMEOUT_S = 10.0
WARM_CALLS = 50
EXECS = 20
"""guest-exec starts a process each time: a twentieth of the calls say enough."""
SMALL_BYTES = 64
LARGE_BYTES = 64 * 1024
LARGE_IN_FLIGHT = 8
FILE_CHUNK_BYTES = 1 << 20  # the fastest that guest-file-read has; its own default is 4 KiB
IN_FLIGHT: Final = (1, 16, 64)

RAW_C, RAW_PYTHON, RELAY = "raw_c", "raw_python", "raw_python_relay"
JSON_RELAY = "raw_python_json_relay"
GA, EXEC, DAEMON, AGENT = "qemu_ga", "qemu_ga_exec", "vchan_daemon", "vchan_agent"
QUICK = "vchan_agent_quick"
PURE_DAEMON, PURE_AGENT = "vchan_daemon_pure", "vchan_agent_pure"
PURE_QUICK = "vchan_agent_quick_pure"
SUBJECTS: Final = {
    RAW_C: "raw C",
    RAW_PYTHON: "raw Python",
    RELAY: "raw Python, 2 processes",
    JSON_RELAY: "raw Python, 2 processes, lines of JSON",
    GA: "qemu-ga, guest-ping",
    EXEC: "qemu-ga, guest-exec until its output is there",
    DAEMON: "vchan, in the daemon",
    AGENT: "vchan, in an agent",
    QUICK: "vchan, in an agent, @quick",
    PURE_DAEMON: "vchan, in the daemon, sources",
    PURE_AGENT: "vchan, in an agent, sources",
    PURE_QUICK: "vchan, in an agent, @quick, sources",
}
COLUMNS: Final = (
    ("p10_us", "p10 us", "{:.0f}"),
    ("p50_us", "p50 us", "{:.0f}"),
    ("p99_us", "p99 us", "{:.0f}"),
    *((f"cpu_us_{count}", f"CPU us {count}", "{:.1f}") for count in IN_FLIGHT),
    *((f"rate_{count}", f"{count} /s", "{:.0f}") for count in IN_FLIGHT[1:]),
    ("to_mbs", "to MB/s", "{:.0f}"),
    ("from_mbs", "from MB/s", "{:.0f}"),
    ("raw_to_mbs", "raw to", "{:.0f}"),
    ("raw_from_mbs", "raw from", "{:.0f}"),
)
"""Measures, their titles and forms. The measures' names are the JSON's."""
RATIOS: Final = (
    (DAEMON, "p50_us", GA, "p50_us", "<= 2.0"),
    (AGENT, "p50_us", RELAY, "p50_us", "<= 2.0"),
    (AGENT, "p50_us", EXEC, "p50_us", "<= 0.2"),
    (DAEMON, "cpu_us_1", GA, "cpu_us_1", ""),
    (DAEMON, "cpu_us_64", GA, "cpu_us_64", ""),
    (AGENT, "cpu_us_1", RELAY, "cpu_us_1", ""),
    (AGENT, "cpu_us_64", RELAY, "cpu_us_1", ""),
    (AGENT, "cpu_us_64", JSON_RELAY, "cpu_us_64", ""),
    (AGENT, "cpu_us_64", QUICK, "cpu_us_64", ""),
    (AGENT, "from_mbs", GA, "from_mbs", ""),
    (AGENT, "to_mbs", GA, "to_mbs", ""),
    (AGENT, "raw_from_mbs", AGENT, "from_mbs", ""),
    (AGENT, "raw_to_mbs", AGENT, "to_mbs", ""),
    (PURE_DAEMON, "cpu_us_1", DAEMON, "cpu_us_1", ">= 1.5"),
    (PURE_DAEMON, "cpu_us_64", DAEMON, "cpu_us_64", ">= 1.5"),
    (PURE_AGENT, "cpu_us_1", AGENT, "cpu_us_1", ">= 1.5"),
    (PURE_AGENT, "cpu_us_64", AGENT, "cpu_us_64", ">= 1.5"),
)
"""Subject and measure over subject and measure, and what is aimed at."""


NO_VARIABLES: Final[Mapping[str, str]] = MappingProxyType({})


class Subject(NamedTuple):
    """One that is measured.

    Attributes:
        pids: Whose CPU it is.
        call: One round trip.
        flood: So many round trips, so many of them at a time; None: it takes one at a time.
        calls: Of how many there are in a turn, its share: 1.0 but for what is slow.
    """

    pids: tuple[int, ...]
    call: Callable[[], object]
    flood: Callable[[int, int], object] | None
    share: float = 1.0


def measure(
    directory: Path, body: bytes, *, rounds: int = 5, calls: int = 1000
) -> dict[str, dict[str, float]]:
    """Medians over the rounds: by subject, then by measure; see SUBJECTS and COLUMNS.

    Args:
        directory: For sockets; a short path.
        body: The body of a request that is answered by what it holds.
        calls: Round trips of each subject, in each round.
    """
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        subjects, bulk = _start(stack, directory, body)
        for subject in subjects.values():  # what is done for the first time is slower
            for _ in range(int(WARM_CALLS * subject.share) + 1):
                subject.call()
        for _ in range(rounds):
            for name, subject in subjects.items():
                for measured, value in _turn(subject, int(calls * subject.share)):
                    samples[name][measured].append(value)
            for name, measured, transfer in bulk:
                taken_s = _taken_s(partial(transfer, calls // 4))
                mbs = calls // 4 * LARGE_BYTES / taken_s / 1e6
                samples[name][measured].append(mbs)
    return {
        name: {measured: statistics.median(values) for measured, values in of.items()}
        for name, of in samples.items()
    }


def ratios(result: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, str]]:
    """What is compared, the ratio, and the aim, "" where there is none."""
    return [
        (f"{one}.{what} / {other}.{that}", result[one][what] / result[other][that], aim)
        for one, what, other, that, aim in RATIOS
        if one in result
    ]


def table(result: Mapping[str, Mapping[str, float]]) -> str:
    """The result, for people."""
    width = max(map(len, SUBJECTS.values())) + 1
    lines = ["natively, over unix sockets: 64 bytes there and back; 64 KiB, JSON and raw"]
    lines.append(" " * width + "".join(f"{title:>10}" for _, title, _ in COLUMNS))
    for name, subject in SUBJECTS.items():
        if name not in result:
            continue
        cells = (
            form.format(result[name][measured]) if measured in result[name] else ""
            for measured, _, form in COLUMNS
        )
        lines.append(f"{subject:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append("CPU us N: of its processes, a call, with N calls in flight")
    for what, ratio, aim in ratios(result):
        lines.append(f"{what:<60}{ratio:>8.2f}" + (f"   aim {aim}" if aim else ""))
    return "\n".join(lines)


# ---------------------------------------------------------------- what is measured


Transfer = tuple[str, str, Callable[[int], object]]


def _start(
    stack: ExitStack, directory: Path, body: bytes
) -> tuple[dict[str, Subject], list[Transfer]]:
    subjects = {
        RAW_C: _echo(stack, str(port_echo())),
        RAW_PYTHON: _echo(stack, sys.executable, str(IN_GUEST / "echo_select.py")),
        RELAY: _echo(stack, sys.executable, str(IN_GUEST / "echo_relay.py")),
        JSON_RELAY: _json_relay(stack),
    }
    bulk: list[Transfer] = []
    parts = [_guest_agent(stack, directory), _vchan(stack, directory, body, DAEMON, AGENT, QUICK)]
    if builds.running() == "compiled":
        aside = directory / "pure"
        aside.mkdir()
        names, pure = (PURE_DAEMON, PURE_AGENT, PURE_QUICK), {builds.VARIABLE: "pure"}
        parts.append(_vchan(stack, aside, body, *names, pure))
    for more_subjects, more_bulk in parts:
        subjects |= more_subjects
        bulk += more_bulk
    return subjects, bulk


def _json_relay(stack: ExitStack) -> Subject:
    ours, pid = _inheriting(stack, sys.executable, str(IN_GUEST / "json_relay.py"))
    peer = GuestAgent(ours)  # it talks as that does
    peer.ping()
    return Subject(_with_children(pid), peer.ping, peer.flood)


def _inheriting(stack: ExitStack, *command: str) -> tuple[socket.socket, int]:
    """A program that inherits the other end of a socket, and its process."""
    ours, theirs = socket.socketpair()
    stack.enter_context(closing(ours))
    inherited = theirs.fileno()
    program = _program(*command, f"fd:{inherited}", inherited=inherited)
    pid = stack.enter_context(program)
    theirs.close()
    return ours, pid


def _echo(stack: ExitStack, *command: str) -> Subject:
    """A program that sends back what comes."""
    ours, pid = _inheriting(stack, *command)
    payload = bytes(SMALL_BYTES)

    def call() -> None:
        ours.sendall(payload)
        if ours.recv(1 << 16) != payload:
            raise RigError(f"{command[-1]} does not echo")

    call()
    return Subject(_with_children(pid), call, None)


def _guest_agent(stack: ExitStack, directory: Path) -> tuple[dict[str, Subject], list[Transfer]]:
    root = peers_root()
    path = directory / "ga"
    libraries = root / "usr" / "lib" / "x86_64-linux-gnu"
    command = (str(root / "usr/sbin/qemu-ga"), "-m", "unix-listen", "-p", str(path))
    where = ("-f", str(directory / "ga.pid"), "-t", str(directory))
    pid = stack.enter_context(
        _program(*command, *where, variables={"LD_LIBRARY_PATH": str(libraries)})
    )
    agent = GuestAgent(_connected(path))

    def run() -> None:
        started = agent.execute(
            "guest-exec", path="/bin/echo", arg=["x"], **{"capture-output": True}
        )
        while not agent.execute("guest-exec-status", pid=started["pid"])["exited"]:
            pass

    file = directory / "ga.file"

    def read(count: int) -> None:
        file.write_bytes(os.urandom(LARGE_BYTES) * count)
        agent.read_file(str(file), FILE_CHUNK_BYTES)

    def write(count: int) -> None:
        handle = agent.execute("guest-file-open", path=str(file), mode="w")
        part = base64.b64encode(bytes(LARGE_BYTES)).decode()
        for _ in range(count):
            agent.execute("guest-file-write", handle=handle, **{"buf-b64": part})
        agent.execute("guest-file-close", handle=handle)

    subjects = {
        GA: Subject((pid,), agent.ping, agent.flood),
        EXEC: Subject((pid,), run, None, EXECS / 1000),
    }
    return subjects, [(GA, "from_mbs", read), (GA, "to_mbs", write)]


def _vchan(
    stack: ExitStack,
    directory: Path,
    body: bytes,
    in_daemon: str,
    in_agent: str,
    in_quick: str,
    variables: Mapping[str, str] = NO_VARIABLES,
) -> tuple[dict[str, Subject], list[Transfer]]:
    channel, agents = str(directory / "channel"), str(directory / "agents")
    listener = stack.enter_context(listen_unix(channel, 0o600))
    command = ("-m", "vchan.guest.daemon", "--quiet", "--port", f"unix:{channel}")
    daemon = stack.enter_context(
        _program(sys.executable, *command, "--socket", agents, variables=variables)
    )
    listener.settimeout(START_TIMEOUT_S)
    connected, _ = listener.accept()
    agent = stack.enter_context(
        _program(sys.executable, str(IN_GUEST / "agent.py"), agents, variables=variables)
    )
    vchan = Vchan(SocketStream(connected, channel))
    stack.callback(vchan.close)
    vchan.settle(AGENT_TOPIC)

    def subject(topic: str, asked: bytes, *pids: int) -> Subject:
        return Subject(pids, partial(vchan.call, topic, asked), partial(vchan.flood, topic, asked))

    def large(topic: str, method: str, **args: Any) -> Callable[[int], object]:
        content = encode_json({"method": method, "args": args})
        return lambda count: vchan.flood(topic, content, count, LARGE_IN_FLIGHT)

    def large_raw(method: str, data: bytes, **args: Any) -> Callable[[int], object]:
        content = encode_raw(encode_json({"method": method, "args": args}), data)
        flags = CALL | RAW
        return lambda count: vchan.flood(AGENT_TOPIC, content, count, LARGE_IN_FLIGHT, flags)

    quick_body = encode_invocation("ping_quickly", decode_invocation(body).args)
    subjects = {
        in_daemon: subject(DAEMON_TOPIC, body, daemon),
        in_agent: subject(AGENT_TOPIC, body, daemon, agent),
        in_quick: subject(AGENT_TOPIC, quick_body, daemon, agent),
    }
    return subjects, [
        (in_agent, "to_mbs", large(AGENT_TOPIC, "take", data="x" * LARGE_BYTES)),
        (in_agent, "from_mbs", large(AGENT_TOPIC, "give", size=LARGE_BYTES)),
        (in_agent, "raw_to_mbs", large_raw("take_raw", bytes(LARGE_BYTES))),
        (in_agent, "raw_from_mbs", large_raw("give_raw", b"", size=LARGE_BYTES)),
    ]


# ---------------------------------------------------------------- how


def _turn(subject: Subject, calls: int) -> Iterator[tuple[str, float]]:
    """Measures and values of one turn."""
    before_us = cpu_us(subject.pids)
    times_us = sorted(_taken_s(subject.call) * 1e6 for _ in range(calls))
    yield "cpu_us_1", (cpu_us(subject.pids) - before_us) / calls
    for percent in (10, 50, 99):
        yield f"p{percent}_us", times_us[calls * percent // 100]
    if subject.flood is None:
        return
    for in_flight in IN_FLIGHT[1:]:
        before_us = cpu_us(subject.pids)
        taken_s = _taken_s(partial(subject.flood, 2 * calls, in_flight))
        yield f"cpu_us_{in_flight}", (cpu_us(subject.pids) - before_us) / (2 * calls)
        yield f"rate_{in_flight}", 2 * calls / taken_s


def _taken_s(action: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


def cpu_us(pids: tuple[int, ...]) -> float:
    """CPU time of all threads of these processes, in microseconds."""
    spent_ns = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            spent_ns += int(thread.read_text().split()[0])
    return spent_ns / 1000


def _with_children(pid: int) -> tuple[int, ...]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (pid, *map(int, children))


def _connected(path: Path) -> socket.socket:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    client = socket.socket(socket.AF_UNIX)
    while True:
        try:
            client.connect(str(path))
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise RigError(f"{path}: {error}") from error
            time.sleep(0.02)
        else:
            return client


@contextmanager
def _program(
    *command: str,
    inherited: int | None = None,
    variables: Mapping[str, str] = NO_VARIABLES,
) -> Iterator[int]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    descriptors = () if inherited is None else (inherited,)
    process = subprocess.Popen(command, env=environment, pass_fds=descriptors)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()
