"""Calls and casts whose bodies are bytes: hosts' programs ask agents, and agents a program on
their host.

Promises
1. Who calls gets what the method made of its own bytes, to the last one; or is told that there is
   no answer.
2. What an agent is called for runs at most once, and not at all if the caller was told so. A cast,
   and what an agent asks of a program, runs a second time only marked `vchan_redelivered`.
3. A cast that was taken runs, while those live who may have taken it.
4. In the end everything that was asked by somebody who lives has come to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests.simulate.world import Process, World
from vchan.errors import LimitExceeded, Rejected
from vchan.rpc.bodies import (
    REDELIVERED_KEY,
    decode_invocation,
    decode_raw,
    encode_invocation,
    encode_raw,
)
from vchan.rpc.in_flight import Answered, HandedBack, Heartbeat, Outcome, Overdue, Taken
from vchan.rpc.messages import CALL, RAW, Request
from vchan.rpc.outcomes import may_have_run

if TYPE_CHECKING:
    from tests.simulate.guest import GuestAgent, Vm

EXCHANGE: Final = "openstack"
STORE: Final = "store"
"""The topic of the program on each host."""
SIZES: Final = (0, 1, 100, 20_000, 66_000, 120_000)
TIMES_S: Final = (2.0, 10.0, 60.0)
CASTS: Final = 0.4
"""Such a part of them."""


class Ask(NamedTuple):
    """What is random of a request."""

    id: bytes
    is_cast: bool


class RawCall:
    """One of them.

    Args:
        vm: Of the agent that is asked; None: it is the program that is.
    """

    def __init__(self, key: int, who: Process, vm: Vm | None, data: bytes, ask: Ask) -> None:
        self.key = key
        self.who = who
        self.data = data
        self.id, self.is_cast = ask
        self.outcome = ""
        self.runs = 0
        self._vm = vm
        self._before = _lives(vm)

    def __str__(self) -> str:
        kind = "cast" if self.is_cast else "call"
        return f"raw {kind} {self.key} ({len(self.data)} bytes) from {self.who.name}"

    @property
    def may_repeat(self) -> bool:
        """If it is marked."""
        return self.is_cast or self._vm is None

    @property
    def must_run(self) -> bool:
        """It was taken, and nobody has died who may have it."""
        return self.outcome == "taken" and _lives(self._vm) == self._before


def _lives(vm: Vm | None) -> tuple[object, ...]:
    """Equal as long as nobody in the VM dies."""
    if vm is None:
        return ()
    daemons = (vm.daemon,) if vm.daemon is not None and vm.daemon.process.alive else ()
    return vm.boots, *daemons, *(agent for agent in vm.agents.values() if agent.alive)


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
        if daemon is not None and vm.uuid in daemon.channels:
            call = self._make(daemon.process, vm)
            daemon.process.enter(self._submit_local, call, daemon, vm.uuid, topic)

    def _make(self, who: Process, vm: Vm | None) -> RawCall:
        rng = self._world.rng
        data = rng.randbytes(rng.choice(SIZES))
        ask = Ask(rng.randbytes(16), rng.random() < CASTS)
        call = RawCall(len(self.calls), who, vm, data, ask)
        self.calls.append(call)
        self.ids.add(call.id)
        return call

    def _request(self, call: RawCall, topic: str) -> Request:
        body = encode_raw(encode_invocation("turn", {"key": call.key}), call.data)
        timeout_ms = int(self._world.rng.choice(TIMES_S) * 1000)
        self._world.note("%s: asks, %s", call, call.id[:4].hex())
        flags = RAW if call.is_cast else CALL | RAW
        return Request(call.id, flags, timeout_ms, 0, EXCHANGE, topic, "", body)

    def _submit_local(self, call: RawCall, daemon: Any, vm: str, topic: str) -> None:
        request = self._request(call, topic)
        channel = daemon.channels.get(vm)
        if channel is None:  # it was there before this daemon stood still
            self._end(call, "refused")
            return
        try:
            channel.downward.submit_local(
                request, lambda outcome: self._told(call, outcome), call.who.loop.time()
            )
        except (LimitExceeded, Rejected):
            self._end(call, "refused")
        channel.set_timer()

    def call_store(self, agent: GuestAgent) -> None:
        """An agent calls the program on its host."""
        call = self._make(agent.process, None)
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
            case Taken():
                if not call.is_cast:
                    self._world.fail(f"{call}: taken, like a cast")
                self._end(call, "taken")
            case Answered(_, False, body):
                if call.is_cast:
                    self._world.fail(f"{call}: answered, like a call")
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
        self._world.stats[f"raw requests: {outcome}"] += 1
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
        if call.runs and not (marked and call.may_repeat):
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
        is_call, rng = request.is_call, self._world.rng

        def give() -> None:
            outcome = Answered(request.id, False, answer) if is_call else Taken(request.id)
            told(outcome, process.loop.time())

        self._world.after(rng.random() * rng.choice((0.001, 0.1, 3.0)), process.enter, give)
        return lambda: None

    # ------------------------------------------------------------ the end

    def open_calls(self) -> list[RawCall]:
        """Those of which somebody who lives has heard nothing, or that were taken and must run."""
        return [
            call
            for call in self.calls
            if (not call.outcome and call.who.alive) or (not call.runs and call.must_run)
        ]
