"""Work in instructions, not seconds: the same to a few percent on a machine that does other things.

QEMU counts: its clock goes on by a nanosecond with every instruction, so the CPU time that the
guest's kernel accounts to a process is the number of instructions it took, in user and kernel mode.
Wake-ups, cache misses and QEMU's own work are not in it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench.machine import (
    GUEST_AGENT,
    RELAY_ECHO,
    SELECT_ECHO,
    Machine,
    machine,
)
from tests.bench.peers import AGENT_TOPIC, DAEMON_TOPIC, GuestAgent, RawChannel, Vchan
from tests.bench.suite import LARGE_BYTES, SMALL_BYTES, small_body
from tests.rig import RigError
from tests.rig.guest import QemuGuest
from tests.rig.guest_image import VCHAN_PORT
from vchan.io.streams import connect_unix
from vchan.rpc.bodies import encode_json, encode_raw
from vchan.rpc.messages import CALL, RAW

CALLS = 200
LARGE_CALLS = 24


class CountingGuest(QemuGuest):
    """A guest whose clock counts instructions."""

    def _command(self) -> list[str]:
        return [*super()._command(), "-icount", "shift=0,sleep=on,align=off"]


class Counter:
    """Counts what services do."""

    def __init__(self, counted: Machine) -> None:
        self._machine = counted
        self.rows: list[tuple[str, dict[str, float]]] = []

    def row(
        self, what: str, services: tuple[str, ...], times: int, action: Callable[[], object]
    ) -> None:
        """Do it and note the instructions, in thousands, of each service for one time of many."""
        before = self._spent(services)
        action()
        after = self._spent(services)
        spent = {name: (after[name] - before[name]) / times for name in services}
        self.rows.append((what, spent))

    def _spent(self, services: tuple[str, ...]) -> dict[str, float]:
        script = "for name in {}; do read spent rest </proc/$(cat /run/$name.pid)/schedstat; "
        finished = self._machine.guest.shell(
            script.format(" ".join(services)) + "echo $spent; done"
        )
        if finished.status:
            raise RigError(finished.output)
        counts = map(float, finished.output.split())
        return {name: count / 1000 for name, count in zip(services, counts, strict=True)}


def measure(directory: Path) -> list[tuple[str, dict[str, float]]]:
    """Rows: what was done, and thousands of instructions for it by service."""
    with machine(directory, CountingGuest) as counted:
        counter = Counter(counted)
        _count_round_trips(counter, counted)
        vchan = Vchan(connect_unix(str(counted.guest.port(VCHAN_PORT))))
        try:
            vchan.settle(AGENT_TOPIC)
            _count_calls(counter, vchan)
        finally:
            vchan.close()
        return counter.rows


def _count_round_trips(counter: Counter, counted: Machine) -> None:
    payload = bytes(SMALL_BYTES)
    for what, service, port in (
        ("echo, raw Python", "select-echo", SELECT_ECHO),
        ("echo, raw Python, 2 processes (the first)", "relay-echo", RELAY_ECHO),
    ):
        channel = RawChannel(counted.connect(port))
        channel.settle(payload)
        counter.row(what, (service,), CALLS, partial(_repeat, partial(channel.echo, payload)))
    agent = GuestAgent(counted.connect(GUEST_AGENT))
    agent.ping()
    counter.row("qemu-ga, guest-ping", ("qemu-ga",), CALLS, partial(_repeat, agent.ping))


def _repeat(action: Callable[[], object]) -> None:
    for _ in range(CALLS):
        action()


def _count_calls(counter: Counter, vchan: Vchan) -> None:
    body = small_body()
    both = ("vchan-guest", "agent")
    for topic in (DAEMON_TOPIC, AGENT_TOPIC):
        services = both if topic == AGENT_TOPIC else both[:1]
        vchan.flood(topic, body, CALLS, 16)  # what is done for the first time costs more
        call = partial(_repeat, partial(vchan.call, topic, body))
        counter.row(f"call to {topic}, one at a time", services, CALLS, call)
        flood = partial(vchan.flood, topic, body, 4 * CALLS, 64)
        counter.row(f"call to {topic}, 64 at a time", services, 4 * CALLS, flood)
    for what, method, args in (
        ("64 KiB to an agent", "take", {"data": "x" * LARGE_BYTES}),
        ("64 KiB from an agent", "give", {"size": LARGE_BYTES}),
    ):
        large = encode_json({"method": method, "args": args})
        flood = partial(vchan.flood, AGENT_TOPIC, large, LARGE_CALLS, 8)
        counter.row(what, both, LARGE_CALLS, flood)
    for what, method, data, args in (
        ("64 KiB raw to an agent", "take_raw", bytes(LARGE_BYTES), {}),
        ("64 KiB raw from an agent", "give_raw", b"", {"size": LARGE_BYTES}),
    ):
        large = encode_raw(encode_json({"method": method, "args": args}), data)
        flood = partial(vchan.flood, AGENT_TOPIC, large, LARGE_CALLS, 8, CALL | RAW)
        counter.row(what, both, LARGE_CALLS, flood)


def table(rows: list[tuple[str, dict[str, float]]]) -> str:
    """The rows, for people."""
    lines = [f"{'thousands of instructions in the guest':<48}{'sum':>8}"]
    for what, spent in rows:
        parts = ", ".join(f"{name} {count:.0f}" for name, count in spent.items())
        lines.append(f"{what:<48}{sum(spent.values()):>8.0f}   {parts}")
    return "\n".join(lines)
