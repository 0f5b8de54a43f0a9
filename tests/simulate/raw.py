"""Calls whose bodies are bytes: hosts' programs call agents, and agents a program on their host.

Promises
1. Who calls gets what the method made of its own bytes, to the last one; or is told that there is
   no answer.
2. What an agent is called for runs at most once, and not at all if the caller was told so. What an
   agent asks of a program runs a second time only marked `vchan_redelivered`.
3. In the end every call of a caller who lives has come to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from tests.simulate.world import Process, World
from vchan.errors import LimitExceeded, Rejected
from vchan.rpc.bodies import (
    REDELIVERED_KEY,
    decode_invocation,
    decode_raw,
    encode_invocation,
    encode_raw,
)
from vchan.rpc.in_flight import Answered, HandedBack, Heartbeat, Outcome, Overdue
from vchan.rpc.messages import CALL, RAW, Request
from vchan.rpc.outcomes import may_have_run

if TYPE_CHECKING:
    from tests.simulate.guest import GuestAgent, Vm

EXCHANGE: Final = "openstack"
STORE: Final = "store"
"""The topic of the program on each host."""
SIZES: Final = (0, 1, 100, 20_000, 66_000, 120_000)
TIMES_S: Final = (2.0, 10.0, 60.0)


class RawCall:
    """One of them."""

    def __init__(self, key: int, who: Process, where: str, data: bytes, request_id: bytes) -> None:
        self.key = key
        self.who = who
        self.where = where
        self.data = data
        self.id = request_id
        self.outcome = ""
        self.runs = 0

    def __str__(self) -> str:
        return f"raw call {self.key} ({len(self.data)} bytes) from {self.where}"


class RawCalls:
    """All of them, and what became of each."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.calls: list[RawCall] = []
        self.ids: set[bytes] = set()
        """Of those that no broker knows of."""

    # ------------------------------------------------------------ calling

    def call_agent(self, vm: Vm, topic: str) -> None:
        """A program on the VM's host calls an agent in it."""
        daemon = vm.qemu.host.daemon if vm.qemu is not None else None
        channel = daemon.channels.get(vm.uuid) if daemon is not None else None
        if daemon is not None and channel is not None:
            call = self._make(daemon.process, f"{daemon.process.name} into {vm.uuid}")
            daemon.process.enter(self._submit_local, call, channel, topic)

    def _make(self, who: Process, where: str) -> RawCall:
        rng = self._world.rng
        data = rng.randbytes(rng.choice(SIZES))
        call = RawCall(len(self.calls), who, where, data, rng.randbytes(16))
        self.calls.append(call)
        self.ids.add(call.id)
        return call

    def _request(self, call: RawCall, topic: str) -> Request:
        body = encode_raw(encode_invocation("turn", {"key": call.key}), call.data)
        timeout_ms = int(self._world.rng.choice(TIMES_S) * 1000)
        self._world.note("%s: asks, %s", call, call.id[:4].hex())
        return Request(call.id, CALL | RAW, timeout_ms, 0, EXCHANGE, topic, "", body)

    def _submit_local(self, call: RawCall, channel: Any, topic: str) -> None:
        request = self._request(call, topic)
        try:
            channel.downward.submit_local(
                request, lambda outcome: self._told(call, outcome), call.who.loop.time()
            )
        except (LimitExceeded, Rejected):
            self._end(call, "refused")
        channel.set_timer()

    def call_store(self, agent: GuestAgent) -> None:
        """An agent calls the program on its host."""
        call = self._make(agent.process, f"{agent.vm.uuid}/agent{agent.slot}")
        agent.process.enter(self._submit, call, agent)

    def _submit(self, call: RawCall, agent: GuestAgent) -> None:
        request = self._request(call, STORE)
        try:
            agent.connection.submit(request, lambda outcome: self._told(call, outcome))
        except (LimitExceeded, Rejected):
            self._end(call, "refused")

    def _told(self, call: RawCall, outcome: Outcome) -> None:
        match outcome:
            case Heartbeat():
                return
            case Answered(_, False, body):
                if body != call.data[::-1]:
                    self._world.fail(f"{call}: the answer is {len(body)} other bytes")
                if not call.runs:
                    self._world.fail(f"{call} was answered and never ran")
                self._end(call, "result")
            case Answered(_, True, body):
                self._world.fail(f"{call}: got the failure {body[:200]!r}")
            case HandedBack() | Overdue():
                self._end(call, "lost" if may_have_run(outcome) else "refused")
            case _:
                self._world.fail(f"{call}: told {outcome}")

    def _end(self, call: RawCall, outcome: str) -> None:
        if call.outcome:
            self._world.fail(f"{call}: told {outcome}, and {call.outcome} before")
        call.outcome = outcome
        self._world.stats[f"raw calls: {outcome}"] += 1
        self._world.note("%s: %s", call, outcome)
        self._check_refused(call)

    def _check_refused(self, call: RawCall) -> None:
        if call.outcome == "refused" and call.runs:
            self._world.fail(f"{call} ran, and its caller was told that it has not")

    # ------------------------------------------------------------ running

    def ran(self, key: int, data: bytes, *, marked: bool = False) -> bytes:
        """Its method runs. Returns its answer."""
        call = self.calls[key]
        if data != call.data:
            self._world.fail(f"{call}: came as {len(data)} other bytes")
        if call.runs and not marked:
            self._world.fail(f"{call} ran again, and was not marked")
        call.runs += 1
        self._world.note("%s: runs", call)
        self._check_refused(call)
        return data[::-1]

    def offer(
        self, process: Process, request: Request, told: Callable[[Outcome, float], None]
    ) -> Callable[[], None] | None:
        """What a guest asks of the program on a host; see `upward.Offer`."""
        if request.topic != STORE:
            return None
        asked, data = decode_raw(request.body)
        invocation = decode_invocation(asked)
        marked = REDELIVERED_KEY in invocation.context
        answer = self.ran(invocation.args["key"], data, marked=marked)
        rng = self._world.rng

        def give() -> None:
            told(Answered(request.id, False, answer), process.loop.time())

        self._world.after(rng.random() * rng.choice((0.001, 0.1, 3.0)), process.enter, give)
        return lambda: None

    # ------------------------------------------------------------ the end

    def is_quiet(self) -> bool:
        """Everybody who lives has heard what came of it."""
        return all(call.outcome or not call.who.alive for call in self.calls)
