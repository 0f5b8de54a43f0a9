"""What was promised, and whether it was kept.

The ledger knows every request ever made and everything that came of it: what a caller was told
binds to the end of the run. Exemptions (`exempt`) are as narrow as they can be:

    LOST_WITH_AGENT   a cast that an agent had acknowledged and had not run when it died
    RAN_AGAIN         a cast that ran a second time, and whose method saw that it was marked, after
                      both the agent that ran it and the guest daemon that gave it to it were gone
    PUBLISHED_TWICE   a request that its caller published twice ran twice, or ran though it was
                      refused: the guest daemon that had the first copy was gone, and so was the
                      host that had passed it on
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Set
from typing import Any, Final, Protocol

from tests.simulate.exempt import LOST_WITH_AGENT, PUBLISHED_TWICE, RAN_AGAIN, exempt
from tests.simulate.world import World
from vchan.guest.router import DOUBT_MARGIN_S
from vchan.host.broker.completions import LOT_MAX
from vchan.rpc.dispatcher import HOLDING_MAX
from vchan.rpc.in_flight import RECORDS_MAX, REQUESTS_MAX
from vchan.session import IN_FLIGHT_BYTES_MAX, REASSEMBLY_BYTES_MAX, Session

CALL: Final = "call"
CAST: Final = "cast"
FANOUT: Final = "fanout"

UNRUN: Final = frozenset({"NoSuchAgent", "Rejected", "LimitExceeded"})
"""Whoever hears this has been promised that it has not run, and never will."""

LONG_S: Final = 300.0
"""Who waits so long hears something: all faults and their cures take less."""
SLACK_S: Final = 5.0
"""A caller's own clock, and the way."""


class Runs(Protocol):
    """An agent's run, as far as the ledger cares."""

    slot: int
    vm: Any
    worker: Any
    told: Any

    @property
    def alive(self) -> bool:
        """It still has its memory."""


class Op:
    """One request."""

    __slots__ = (
        "accepted_in",
        "accepted_s",
        "copies",
        "deadline_s",
        "fails",
        "id",
        "key",
        "kind",
        "lost_in",
        "made_s",
        "number",
        "outcome",
        "outcome_s",
        "runs",
        "timeout_s",
        "topic",
        "vm",
        "wants",
        "witness",
    )

    def __init__(self, key: int, kind: str, vm: str, topic: str, number: int, now_s: float) -> None:
        self.key = key
        self.kind = kind
        self.vm = vm
        self.topic = topic
        self.number = number
        self.id = b""
        self.made_s = now_s
        self.accepted_s: float | None = None
        self.accepted_in: dict[str, float] = {}
        self.copies = 0  # published so often
        self.timeout_s: float | None = None
        self.deadline_s: float | None = None
        self.fails = False
        self.outcome = ""
        self.outcome_s = 0.0
        self.runs: list[tuple[Runs, Any]] = []
        self.lost_in: set[str] = set()
        self.wants: set[str] = set()  # VMs where it has not run
        self.witness: object = None  # the guest daemon that cannot doubt it

    def __str__(self) -> str:
        return f"{self.kind} {self.key} to {self.topic}.{self.vm}"


class Ledger:
    """Everything that was asked, and what became of it.

    Args:
        refused: The ids of calls whose callers were to hear that they have not run. Where that was
            lost on its way, they hear nothing: the broker has forgotten the call.
    """

    def __init__(self, world: World, refused: Set[bytes] = frozenset()) -> None:
        self._world = world
        self._refused = refused
        self.ops: dict[int, Op] = {}
        self.shared: set[tuple[str, str]] = set()
        """(vm, topic) served by several agents: no order between them."""
        self.vm_now_s: Callable[[str], float] = lambda _: 0.0
        """The time on a VM's clock."""
        self.witness: Callable[[str, str], object] = lambda _vm, _topic: None
        """The run of the VM's guest daemon that has had something fresh out of this topic's queue
        already, so that it has been there whatever is published from now on; or None."""
        self.hours_passed = False
        """Time enough for every call to time out."""
        self._last: dict[tuple[str, str], int] = {}
        self._open_casts: dict[int, Op] = {}
        self._open_calls: dict[int, Op] = {}
        self._agent_deaths: list[tuple[float, str]] = []
        self._agent_starts: dict[tuple[str, int], float] = {}  # on the VM's clock
        self._daemon_starts: dict[str, float] = {}  # likewise

    # ------------------------------------------------------------ what happens

    def made(self, op: Op) -> None:
        """A caller makes a request."""
        self.ops[op.key] = op
        if op.kind == CALL:
            self._open_calls[op.key] = op
            op.witness = self.witness(op.vm, op.topic)

    def accepted(self, op: Op, vms: Iterable[tuple[str, float]]) -> None:
        """The broker has it: from now on it must not be lost.

        Args:
            vms: For which VMs, and the time on each one's clock.
        """
        op.copies += 1
        if op.accepted_s is None:
            op.accepted_s = self._world.now_s
            op.accepted_in = dict(vms)
            if op.kind != CALL:
                op.wants.update(op.accepted_in)
                op.wants -= {run.vm.uuid for run, _ in op.runs}
                if op.wants:
                    self._open_casts[op.key] = op

    def executed(self, key: int, agent: Runs, *, marked: bool) -> None:
        """An agent runs its method.

        Args:
            marked: The method can see that this may be the second time.
        """
        world = self._world
        op = self.ops.get(key)
        if op is None:
            world.fail(f"a method ran for key {key}, which nobody asked for")
            return
        vm = agent.vm.uuid
        if op.kind != FANOUT and vm != op.vm:
            world.fail(f"{op} ran in {vm}")
        world.note("%s: runs in %s, slot %d", op, vm, agent.slot)
        if op.outcome in UNRUN and op.copies > 1:
            exempt(world.stats, PUBLISHED_TWICE)  # before its caller was told
        elif op.outcome in UNRUN:
            world.fail(f"{op} runs, and its caller was told {op.outcome}: that it has not")
        before = [
            (run, daemon)
            for run, daemon in op.runs
            if run.vm is agent.vm and (op.kind != FANOUT or run.slot == agent.slot)
        ]
        world.stats["ran marked"] += marked
        for run, daemon in before:
            # What this agent has of an earlier daemon, it may not have told the one that lives yet.
            if daemon is not None and daemon.alive and daemon is agent.told:
                world.fail(f"{op} ran again, and the guest daemon still knew of it")
            elif marked and op.kind != CALL and not run.alive:
                exempt(world.stats, RAN_AGAIN)
            elif op.copies > 1:
                exempt(world.stats, PUBLISHED_TWICE)
            else:
                world.fail(f"{op} ran again{' (marked)' if marked else ''}")
        is_alone = (vm, op.topic) not in self.shared
        if op.kind == CAST and is_alone and not before and vm not in op.lost_in:
            self._check_order(op)
        op.runs.append((agent, agent.told))
        self._done_in(op, vm)

    def _check_order(self, op: Op) -> None:
        last = self._last.get((op.vm, op.topic), -1)
        if op.number <= last:
            self._world.fail(f"{op} (number {op.number}) ran after number {last}")
        self._last[op.vm, op.topic] = max(last, op.number)

    def _done_in(self, op: Op, vm: str) -> None:
        op.wants.discard(vm)
        if not op.wants:
            self._open_casts.pop(op.key, None)

    def agent_started(self, vm: str, slot: int, now_s: float) -> None:
        """By the VM's clock."""
        self._agent_starts[vm, slot] = now_s

    def daemon_started(self, vm: str, now_s: float) -> None:
        """By the VM's clock."""
        self._daemon_starts[vm] = now_s

    def agent_died(self, vm: str, agent: Runs) -> None:
        """What it had acknowledged and not run is lost; that is allowed, and nothing else."""
        self._agent_deaths.append((self._world.now_s, vm))
        lost = agent.worker.lost() if agent.worker is not None else []
        for key in lost:
            op = self.ops[key]
            exempt(self._world.stats, LOST_WITH_AGENT)
            op.lost_in.add(vm)
            self._done_in(op, vm)

    def outcome(self, op: Op, outcome: str) -> None:
        """What a call's caller got: result, failed, timeout, or the class of a failure."""
        world = self._world
        op.outcome, op.outcome_s = outcome, world.now_s
        self._open_calls.pop(op.key, None)
        world.note("%s: %s", op, outcome)
        world.stats[f"calls: {outcome}"] += 1
        died = any(vm == op.vm and at_s >= op.made_s - 30 for at_s, vm in self._agent_deaths)
        if outcome in ("result", "failed"):
            if not op.runs:
                world.fail(f"{op} was answered and never ran")
        elif outcome == "NoSuchAgent":
            if op.runs and op.copies > 1:
                exempt(world.stats, PUBLISHED_TWICE)
            elif op.runs:
                world.fail(f"{op} ran, and its caller was told that it had not")
            if not died:
                world.fail(f"{op}: no agent, and none had died")
        elif outcome == "AgentGone":
            if not died:
                self._check_doubt(op)
        elif outcome != "timeout":
            world.fail(f"{op}: unexpected outcome {outcome}")
        elif op.id in self._refused:
            world.stats["calls: timeout, a refusal was lost"] += 1
        elif op.timeout_s == LONG_S and op.accepted_s is not None and not self.hours_passed:
            world.fail(f"{op} timed out after {LONG_S:g} s, and everything was healed long before")

    def _check_doubt(self, op: Op) -> None:
        """Its guest's daemon was too young to know that no agent had had it."""
        assert op.timeout_s is not None
        young_s = op.timeout_s + DOUBT_MARGIN_S + SLACK_S
        if self.vm_now_s(op.vm) > self._daemon_starts[op.vm] + young_s:
            self._world.fail(f"{op}: agent gone, and none had died")
        if op.witness is not None and op.witness is self.witness(op.vm, op.topic):
            self._world.fail(f"{op}: agent gone, and the guest daemon had always been there")
        self._world.stats["calls: AgentGone, and all agents lived"] += 1

    # ------------------------------------------------------------ at the end

    def is_quiet(self) -> bool:
        """Everything has come to its end."""
        return not self._open_casts and not self._open_calls

    def open_ops(self) -> list[Op]:
        """What has not."""
        return [*self._open_casts.values(), *self._open_calls.values()]

    def check_end(self) -> None:
        """What can only be said at the end."""
        for op in self.ops.values():
            if op.kind == FANOUT and op.accepted_s is not None:
                self._check_fanout(op)

    def _check_fanout(self, op: Op) -> None:
        """Where no agent died or started since it was published, every agent of the topic has run
        it. (One that was away missed it, if others were there to take it.)"""
        assert op.accepted_s is not None
        dead = {vm for at_s, vm in self._agent_deaths if at_s >= op.accepted_s - SLACK_S}
        slots: dict[str, set[int]] = {}
        for run, _ in op.runs:
            slots.setdefault(run.vm.uuid, set()).add(run.slot)
        for vm, ran in slots.items():
            vm_object = next(run.vm for run, _ in op.runs if run.vm.uuid == vm)
            since_s = op.accepted_in[vm] - SLACK_S
            serving = {
                slot
                for slot, topics in enumerate(vm_object.slots)
                if op.topic in topics and self._agent_starts[vm, slot] < since_s
            }
            if vm not in dead and serving - ran:
                missing = sorted(serving - ran)
                self._world.fail(f"{op} did not run in slots {missing} of {vm}")


# -------------------------------------------------------------------- bounds


class Bounds:
    """Every table and queue stays below its limit.

    Args:
        prefetch: What the broker may have out per queue.
    """

    def __init__(self, world: World, prefetch: int, topics: int) -> None:
        self._world = world
        # A queue's prefetch is out at most once per session; what a released channel left behind
        # can be there beside it until it is over.
        self._entries_max = prefetch * topics * 2 * 3 + 16

    def check(self, hosts: Iterable[Any], vms: Iterable[Any]) -> None:
        """Look at everything."""
        for host in hosts:
            if host.daemon is not None:
                for channel in host.daemon.channels.values():
                    self._check_relay(channel)
                    if not host.machine.frozen:
                        self._check_deadlines(channel.downward._requester, host.machine.time())
        for vm in vms:
            if vm.daemon is not None and vm.daemon.daemon is not None:
                self._check_router(vm.daemon.daemon._router)
                self._check_session(vm.daemon.daemon._session)
            for agent in vm.agents.values():
                connection = agent.agent._connection
                self._check_responder(connection.responder)
                self._check_session(connection._session)

    def _at_most(self, what: str, size: int, limit: int) -> None:
        if size > limit:
            self._world.fail(f"{what}: {size}, the limit is {limit}")
        peak = f"peak {what}"
        if size > self._world.stats[peak]:
            self._world.stats[peak] = size

    def _check_relay(self, channel: Any) -> None:
        downward = channel.downward
        self._at_most("downward entries", len(downward._open), self._entries_max)
        self._at_most("downward requester", len(downward._requester), self._entries_max)
        heap = len(downward._requester._deadlines._heap)
        self._at_most("downward deadlines", heap, 2 * self._entries_max + 64)
        # What is acknowledged stays until a lot of it is proved.
        answers = len(downward._finished._answers)
        self._at_most("downward answers", answers, self._entries_max + LOT_MAX)
        self._check_session(channel._session)

    def _check_deadlines(self, requester: Any, now_s: float) -> None:
        for item in requester._open.values():
            if item.deadline_s is not None and item.deadline_s < now_s - SLACK_S:
                self._world.fail(f"a host holds {item.request.id.hex()[:8]} past its time")

    def _check_router(self, router: Any) -> None:
        dispatcher = router._dispatcher
        self._at_most("router open", len(dispatcher), REQUESTS_MAX)
        self._at_most("router holders", len(dispatcher._holders), HOLDING_MAX)
        self._check_responder(router._host)

    def _check_responder(self, responder: Any) -> None:
        self._at_most("responder running", len(responder._running), REQUESTS_MAX)
        self._at_most("responder over", len(responder._over), RECORDS_MAX)
        known = len(responder._running) + len(responder._over)
        self._at_most("responder deadlines", len(responder._deadlines._heap), 2 * known + 600)

    def _check_session(self, session: Session) -> None:
        in_flight = session._sender.in_flight
        self._at_most("session bytes in flight", in_flight, IN_FLIGHT_BYTES_MAX)
        self._at_most("session reassembly", session._receiver.reassembly, REASSEMBLY_BYTES_MAX)
        held, frame = session._decoder._held, session.config.frame_bytes_max
        self._at_most("decoder bytes held", held, 2 * frame)


def parse_reply(body: bytes) -> tuple[str, Any, Any, bool]:
    """(msg_id, result, failure, ending) of a reply, as a caller reads it."""
    message = json.loads(json.loads(body)["oslo.message"])
    return message["_msg_id"], message["result"], message["failure"], message["ending"]


Check = Callable[[], None]
