"""Which program on a host gets which request: the pure part."""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from vchan.errors import BadBody, LimitExceeded
from vchan.guest.router import _AGENTS
from vchan.host.local.programs import _PROGRAMS, address_of
from vchan.rpc.bodies import encode_invocation
from vchan.rpc.dispatcher import (
    HOLDING_MAX,
    LINGER_S,
    RESTART_GRACE_S,
    RETRY_S,
    SERVED_MAX,
    Dispatcher,
    Manner,
)
from vchan.rpc.in_flight import (
    Answered,
    Deliver,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Responder,
    Taken,
)
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FANOUT,
    NO_AGENT,
    NOTIFICATION,
    REDELIVERED,
    REFUSED,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Topic,
    decode,
)

NUMBERS = count(1)
T = Topic("e", "t")
START_S = 1000.0
LATER_S = START_S + RESTART_GRACE_S + 1.0  # the grace is over


def request(
    flags: int = 0, topic: str = "t", server: str = "", timeout_ms: int = 0, number: int = 0
) -> Request:
    identity = (number or next(NUMBERS)).to_bytes(16)
    body = encode_invocation("info" if flags & NOTIFICATION else "work", {})
    return Request(identity, flags, timeout_ms, 0, "e", topic, server, body)


class Program:
    """A program that serves: what it was given, and its say."""

    def __init__(self, hub: Hub, *topics: str) -> None:
        self.hub = hub
        self.key = next(NUMBERS)
        self.responder = Responder(self._say)
        self.given: list[Request] = []
        self.cancelled: list[bytes] = []
        self.settled: list[bytes] = []
        self._said: list[Any] = []
        hub.servers.attach(self.key, self._receive, hub.now_s)
        if topics:
            self.serve(*topics)

    def serve(self, *topics: str) -> None:
        self.hub.servers.subscribe(self.key, [Topic("e", name) for name in topics], self.hub.now_s)
        self.hub.servers.hand_out(self.hub.now_s)

    def hold(self, *ids: bytes) -> str:
        problem = self.hub.servers.hold(self.key, ids)
        self.hub.servers.hand_out(self.hub.now_s)
        return problem

    def _receive(self, data: bytes, stream: int) -> None:
        message: Any = decode(data)
        if isinstance(message, Settled):
            self.settled += message.ids
        for delivery in self.responder.receive(message, self.hub.now_s):
            if isinstance(delivery, Deliver):
                self.given.append(delivery.request)
            else:
                self.cancelled.append(delivery.id)

    def _say(self, data: bytes, stream: int) -> None:
        message: Any = decode(data)
        self._said.append(message)
        assert isinstance(message, Reply | Receipt | Returned)
        self.hub.servers.receive(self.key, message, self.hub.now_s)

    def take(self, index: int = -1) -> None:
        self.responder.take(self.given[index].id, self.hub.now_s)

    def answer(self, index: int = -1) -> None:
        self.responder.answer(self.given[index].id, b"1", failed=False, now_s=self.hub.now_s)

    def give_back(self, reason: int, index: int = -1) -> None:
        self.responder.give_back(self.given[index].id, reason, "as told")

    def leave(self) -> None:
        self.hub.servers.detach(self.key, self.hub.now_s)
        self.hub.servers.hand_out(self.hub.now_s)


class Hub:
    """The dispatcher of a host's programs, a clock, and what who asked was told."""

    def __init__(self, now_s: float = LATER_S, manner: Manner = _PROGRAMS) -> None:
        self.servers = Dispatcher(manner, START_S)
        self.servers.handle_timeout(now_s)
        self.now_s = now_s
        self.told: list[Outcome] = []

    def offer(self, wanted: Request, *, patient: bool = True) -> bool:
        return self.offer_for(self.told, wanted, patient=patient)

    def offer_for(self, told: list[Outcome], wanted: Request, *, patient: bool = True) -> bool:
        return self.servers.offer(
            wanted,
            address_of(wanted),
            lambda outcome, _: told.append(outcome),
            self.now_s,
            patient=patient,
        )

    def after(self, seconds: float) -> None:
        """Time passes, with the timer called whenever it is due."""
        until_s = self.now_s + seconds
        while (at_s := self.servers.next_timeout()) is not None and at_s <= until_s:
            self.now_s = max(self.now_s, at_s)
            self.servers.handle_timeout(self.now_s)
            self.now_s += 1e-3  # an early or a repeated call must not be needed
        self.now_s = until_s


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (request(), "t"),
        (request(server="s"), "t.s"),
        (request(FANOUT), "t"),
        (request(FANOUT, server="s"), "t"),
        (request(NOTIFICATION), "t.info"),
        (request(NOTIFICATION, server="ignored"), "t.info"),
    ],
)
def test_addresses(wanted: Request, name: str) -> None:
    assert address_of(wanted) == Topic("e", name)


def test_a_notification_without_a_priority(hub: Hub) -> None:
    with pytest.raises(BadBody):
        hub.offer(request(NOTIFICATION).changed(body=b"{}"))


def test_nobody_serves_it(hub: Hub) -> None:
    Program(hub, "other")
    assert not hub.offer(request())
    assert not hub.offer(request(server="s"))
    assert not hub.offer(request(FANOUT))
    assert (hub.told, len(hub.servers)) == ([], 0)


def test_they_have_their_turns(hub: Hub) -> None:
    programs = [Program(hub, "t", f"t.s{n}") for n in range(3)]
    for _ in range(9):
        assert hub.offer(request())
    assert [len(program.given) for program in programs] == [3, 3, 3]
    hub.offer(request(server="s1"))
    assert [len(program.given) for program in programs] == [3, 4, 3]


def test_who_repeats_itself_is_the_one_that_is_told(hub: Hub) -> None:
    """It may have a new connection."""
    program = Program(hub, "t")
    wanted, told = request(), list[Outcome]()
    hub.offer(wanted)
    assert hub.offer_for(told, wanted, patient=False)
    program.take()
    assert (len(program.given), hub.told, told) == (1, [], [Taken(wanted.id)])


def test_a_call(hub: Hub) -> None:
    program = Program(hub, "t")
    wanted = request(CALL)
    hub.offer(wanted)
    hub.offer(wanted)  # who asks repeats itself
    program.responder.heartbeat(wanted.id, hub.now_s + 10)
    program.answer()
    assert hub.told == [Heartbeat(wanted.id), Answered(wanted.id, False, b"1")]
    assert (len(program.given), program.settled, len(hub.servers)) == (1, [wanted.id], 0)


def test_a_fanout_is_taken_when_all_have_it(hub: Hub) -> None:
    programs = [Program(hub, "t") for _ in range(3)]
    wanted = request(FANOUT)
    hub.offer(wanted)
    programs[0].take()
    programs[1].leave()
    assert hub.told == []
    programs[2].give_back(NO_AGENT)
    assert hub.told == [Taken(wanted.id)]


def test_a_fanout_that_nobody_takes(hub: Hub) -> None:
    programs = [Program(hub, "t") for _ in range(2)]
    wanted = request(FANOUT)
    hub.offer(wanted)
    programs[0].leave()
    programs[1].leave()
    assert hub.told == [
        HandedBack(wanted.id, NO_AGENT, "the program that served topic t went away")
    ]


def test_a_program_that_goes_takes_its_calls_along_and_leaves_its_casts(hub: Hub) -> None:
    first = Program(hub, "t")
    call, casts = request(CALL), [request() for _ in range(3)]
    for wanted in (call, *casts):
        hub.offer(wanted)
    second = Program(hub, "t")
    first.take(1)
    first.leave()
    assert [type(outcome) for outcome in hub.told] == [Taken, HandedBack]
    assert hub.told[1] == HandedBack(
        call.id, AGENT_GONE, "the program that ran a method of topic t went away"
    )
    assert second.given == casts[1:]


def test_casts_wait_a_while_for_the_next_program_in_their_order(hub: Hub) -> None:
    first = Program(hub, "t")
    casts = [request(number=n) for n in range(1001, 1004)]
    for wanted in casts[:2]:
        hub.offer(wanted)
    first.leave()
    hub.after(LINGER_S - 0.1)
    assert hub.offer(casts[2])
    second = Program(hub, "u")
    second.serve("t", "u")
    assert second.given == casts
    second.leave()
    hub.after(LINGER_S - 0.1)
    assert hub.told == []
    hub.after(0.2)
    text = "no program on this host serves topic e/t"
    assert hub.told == [HandedBack(wanted.id, NO_AGENT, text) for wanted in casts]
    assert not hub.offer(request())
    assert len(hub.servers) == 0


def test_topics_of_programs_that_come_and_go_do_not_add_up() -> None:
    kept_to = ("server", "place", "asker_remembers", "waits_for_all", "lingers_unsubscribed")
    manner = {name: getattr(_PROGRAMS, name) for name in kept_to}
    hub = Hub(manner=Manner(**manner, topics_max=8))
    for number in range(40):
        Program(hub, f"t{number}").leave()
    assert len(hub.servers._linger_until_s) == 8
    assert hub.offer(request(topic="t39"))  # the last are waited for
    assert not hub.offer(request(topic="t0"))


def test_who_unsubscribes_is_not_waited_for(hub: Hub) -> None:
    program = Program(hub, "t", "u")
    program.serve("u")
    assert not hub.offer(request())
    program.leave()
    assert not hub.offer(request(topic="u"), patient=False)
    assert hub.offer(request(topic="u"))


def test_what_comes_later_waits_behind_what_waits() -> None:
    hub = Hub(START_S)
    repeat, later, other = request(REDELIVERED), request(), request(topic="u")
    hub.offer(repeat)
    program = Program(hub, "t", "u")
    hub.offer(later)
    hub.offer(other)
    assert program.given == [other]
    hub.after(RESTART_GRACE_S + 0.1)
    assert program.given == [other, repeat, later]


def test_a_holder_that_comes_back_is_given_what_it_holds() -> None:
    hub = Hub(START_S)
    wanted, late = request(CALL | REDELIVERED), request(CALL | REDELIVERED)
    hub.offer(wanted)
    other, holder = Program(hub, "t"), Program(hub)
    assert holder.hold(wanted.id, late.id) == ""
    holder.serve("t")
    hub.offer(late)
    assert (other.given, holder.given) == ([], [wanted, late])
    holder.leave()
    hub.offer(late)  # and after it has gone nobody holds it
    hub.after(RESTART_GRACE_S)
    assert other.given == [late]


def test_a_fanout_is_for_all_whoever_holds_it() -> None:
    hub = Hub(START_S)
    wanted = request(FANOUT | REDELIVERED)
    programs = [Program(hub, "t") for _ in range(2)]
    programs[0].hold(wanted.id)
    hub.offer(wanted)
    hub.after(RESTART_GRACE_S)
    assert [program.given for program in programs] == [[wanted], [wanted]]


@pytest.mark.parametrize("patient", [True, False])
def test_the_grace_after_a_start(patient: bool) -> None:
    hub = Hub(START_S)
    wanted = request()
    assert hub.offer(wanted, patient=patient) is patient
    if patient:
        assert Program(hub, "t").given == [wanted]  # as soon as there is one
        lost = request(server="nobody")
        hub.offer(lost)
        hub.after(RESTART_GRACE_S)
        text = "no program on this host serves topic e/t.nobody"
        assert hub.told == [HandedBack(lost.id, NO_AGENT, text)]


def test_what_a_program_does_not_want_is_offered_again(hub: Hub) -> None:
    first, second = Program(hub, "t"), Program(hub, "t")
    wanted = request()
    hub.offer(wanted)
    first.give_back(BUSY)
    later = request()
    hub.offer(later)  # does not wait behind it
    assert second.given == [later]
    hub.after(RETRY_S - 0.1)
    assert first.given == [wanted]
    hub.after(0.2)
    first.give_back(BUSY)
    hub.after(RETRY_S + 0.1)
    assert [len(first.given), len(second.given)] == [2, 2]
    second.take()
    assert hub.told == [Taken(wanted.id)]


@pytest.mark.parametrize("reason", [AGENT_GONE, EXPIRED, REFUSED])
def test_what_may_have_run_or_must_not_is_not_offered_again(hub: Hub, reason: int) -> None:
    program = Program(hub, "t")
    wanted = request(CALL)
    hub.offer(wanted)
    program.give_back(reason)
    assert hub.told == [HandedBack(wanted.id, reason, "as told")]


def test_a_time_that_runs_out(hub: Hub) -> None:
    program = Program(hub, "t")
    served, waiting = request(CALL, timeout_ms=1000), request(timeout_ms=1000)
    hub.offer(served)
    hub.offer(waiting)
    program.give_back(BUSY)
    program.serve()
    hub.after(1.1)
    assert Counter(hub.told) == Counter([Overdue(served.id), Overdue(waiting.id)])
    assert program.cancelled == [served.id]
    assert len(hub.servers) == 0


def test_a_request_takes_its_remaining_time_along(hub: Hub) -> None:
    first, second = Program(hub, "t"), Program(hub)
    hub.offer(request(timeout_ms=3000))
    hub.after(1.0)
    first.leave()
    hub.after(1.0)
    second.serve("t")
    assert [each.timeout_ms for each in second.given] == [1000]


def test_cancel(hub: Hub) -> None:
    program = Program(hub, "t")
    served, waiting = request(CALL), request()
    hub.offer(served)
    hub.offer(waiting)
    program.give_back(BUSY)
    for wanted in (served, waiting, waiting):
        hub.servers.cancel(wanted.id)
    hub.after(10)
    assert (hub.told, program.cancelled, len(hub.servers)) == ([], [served.id], 0)
    assert len(program.given) == 2


def test_limits(hub: Hub) -> None:
    program = Program(hub, "t")
    for _ in range(SERVED_MAX):
        hub.offer(request())
    with pytest.raises(LimitExceeded, match="SERVED_MAX"):
        hub.offer(request())
    program.take()
    assert hub.offer(request())
    ids = tuple(n.to_bytes(16) for n in range(HOLDING_MAX + 1))
    assert "HOLDING_MAX" in program.hold(*ids)
    assert program.hold(*ids[1:]) == ""


def test_a_program_that_takes_less(hub: Hub) -> None:
    def small(data: bytes, stream: int) -> None:
        raise LimitExceeded("message", len(data), 1, "MESSAGE_BYTES_MAX")

    hub.servers.attach(7, small, hub.now_s)
    hub.servers.subscribe(7, [T], hub.now_s)
    wanted = request(CALL)
    assert hub.offer(wanted)
    (outcome,) = hub.told
    assert isinstance(outcome, HandedBack) and outcome.reason == REFUSED
    assert len(hub.servers) == 0


class Machine(RuleBasedStateMachine):
    """Programs that come, go and hand back; requests of all kinds. Each request has at most one
    end, runs at most once (a fanout: once in each program), and in the end all have one."""

    requests = Bundle("requests")
    manner = _PROGRAMS

    @initialize(early=st.booleans())
    def start(self, early: bool) -> None:
        self.hub = Hub(START_S if early else LATER_S, self.manner)
        self.programs: list[Program] = []
        self.ran: Counter[tuple[int, bytes]] = Counter()
        self.wanted: dict[bytes, Request] = {}
        self.dropped: set[bytes] = set()

    @rule(topics=st.sets(st.sampled_from(["t", "u", "t.s", "t.info"])))
    def attach(self, topics: set[str]) -> None:
        if len(self.programs) < 4:
            self.programs.append(Program(self.hub, *sorted(topics)))

    @rule(index=st.integers(0, 3), topics=st.sets(st.sampled_from(["t", "u", "t.s"])))
    def subscribe(self, index: int, topics: set[str]) -> None:
        if index < len(self.programs):
            self.programs[index].serve(*sorted(topics))

    @rule(index=st.integers(0, 3))
    def leave(self, index: int) -> None:
        if index < len(self.programs):
            self.programs.pop(index).leave()

    @rule(
        target=requests,
        flags=st.sampled_from([0, CALL, FANOUT, NOTIFICATION, REDELIVERED, CALL | REDELIVERED]),
        topic=st.sampled_from(["t", "u"]),
        server=st.sampled_from(["", "s"]),
        timeout_ms=st.sampled_from([0, 500, 20_000]),
        patient=st.booleans(),
    )
    def offer(self, flags: int, topic: str, server: str, timeout_ms: int, patient: bool) -> Request:
        wanted = request(flags, topic, server, timeout_ms)
        if self.hub.offer(wanted, patient=patient):
            self.wanted[wanted.id] = wanted
        return wanted

    @rule(
        index=st.integers(0, 3),
        which=st.integers(0, 20),
        what=st.sampled_from(["run", "run", "busy", "gone", "beat"]),
    )
    def work(self, index: int, which: int, what: str) -> None:
        if index >= len(self.programs) or not self.programs[index].given:
            return
        program = self.programs[index]
        which %= len(program.given)
        given = program.given[which]
        if given.id not in program.responder:
            return
        match what:
            case "run":
                self.ran[program.key, given.id] += 1
                (program.answer if given.is_call else program.take)(which)
            case "busy":
                program.give_back(BUSY, which)
            case "gone":
                program.give_back(AGENT_GONE, which)
            case _:
                program.responder.heartbeat(given.id, self.hub.now_s)

    @rule(wanted=requests)
    def cancel(self, wanted: Request) -> None:
        if wanted.id in self.wanted:
            self.hub.servers.cancel(wanted.id)
            self.dropped.add(wanted.id)

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.hub.after(seconds)

    @invariant()
    def each_has_one_end_and_runs_once(self) -> None:
        if not hasattr(self, "hub"):
            return
        ends = Counter(o.id for o in self.hub.told if not isinstance(o, Heartbeat))
        assert all(number == 1 for number in ends.values())
        assert set(ends) <= set(self.wanted)
        runs: Counter[bytes] = Counter()
        for (_, request_id), number in self.ran.items():
            assert number == 1
            runs[request_id] += 1
        for request_id, number in runs.items():
            assert number == 1 or self.wanted[request_id].flags & FANOUT
        assert self.hub.servers.waiting <= len(self.hub.servers)

    def teardown(self) -> None:
        if not hasattr(self, "hub"):
            return
        for program in self.programs:
            program.leave()
        self.hub.after(60.0)
        ends = {o.id for o in self.hub.told if not isinstance(o, Heartbeat)}
        assert ends | self.dropped == set(self.wanted)
        assert len(self.hub.servers) == 0
        left = (self.hub.servers._by_topic, self.hub.servers._holders)
        assert not any((*left, self.hub.servers._linger_until_s))


class OfAgents(Machine):
    """The same is true of agents in a guest."""

    manner = _AGENTS


TestMachine = Machine.TestCase
TestOfAgents = OfAgents.TestCase
for case in (TestMachine, TestOfAgents):
    case.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
