"""What the host is told of a guest, and when: each change once, whichever host there is."""

from __future__ import annotations

from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vchan.guest.reports import BUSY_S, Reporter
from vchan.rpc.bodies import decode_invocation
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    NO_AGENT,
    REFUSED,
    Receipt,
    Request,
    Returned,
    Settled,
)
from vchan.rpc.reports import FACTS, METRICS, PHASE, REPORT_BYTES_MAX, TOPIC


class Rig:
    """A reporter whose requests are kept in a list."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.open: list[Request] = []
        self.settled: list[bytes] = []
        ids = count(1)
        self.reporter = Reporter(self._send, lambda: next(ids).to_bytes(16, "big"))

    def _send(self, message: Request | Settled, _: float) -> None:
        if isinstance(message, Request):
            assert message.target == TOPIC
            assert message.flags == message.timeout_ms == 0
            self.open.append(message)
        else:
            self.settled += message.ids

    def session(self, *, takes: bool = True) -> None:
        self.reporter.host_takes(False, self.now_s)
        if takes:
            self.reporter.host_takes(True, self.now_s)

    def tell(self, what: str, **report: Any) -> None:
        self.reporter.tell(what, report, self.now_s)

    def sent(self) -> list[tuple[str, Any, bool]]:
        told = []
        for request in self.open:
            asked = decode_invocation(request.body)
            told.append((asked.method, asked.args["report"], asked.args["known"]))
        return told

    def take(self) -> None:
        while self.open:
            self.reporter.heard(Receipt(self.open.pop(0).id), self.now_s)

    def refuse(self, reason: int) -> None:
        self.reporter.heard(Returned(self.open.pop(0).id, reason, "no"), self.now_s)


def test_a_host_that_takes_no_reports_gets_none() -> None:
    rig = Rig()
    rig.session(takes=False)
    rig.tell(FACTS, hostname="a")
    assert rig.sent() == []


def test_a_change_is_told_once() -> None:
    rig = Rig()
    rig.session()
    rig.tell(FACTS, hostname="a")
    assert rig.sent() == [(FACTS, {"hostname": "a"}, False)]
    ids = [rig.open[0].id]
    rig.take()
    assert rig.settled == ids
    rig.tell(FACTS, hostname="a")
    assert rig.sent() == []
    rig.tell(FACTS, hostname="b")
    assert rig.sent() == [(FACTS, {"hostname": "b"}, False)]


def test_what_changes_while_a_report_is_under_way_is_told_after_it() -> None:
    rig = Rig()
    rig.session()
    for name in "abc":
        rig.tell(FACTS, hostname=name)
    assert [report for _, report, _ in rig.sent()] == [{"hostname": "a"}]
    rig.reporter.heard(Receipt(rig.open.pop().id), rig.now_s)
    assert [report for _, report, _ in rig.sent()] == [{"hostname": "c"}]


def test_a_new_host_is_told_again_what_another_knows() -> None:
    rig = Rig()
    rig.session()
    rig.tell(FACTS, hostname="a")
    rig.tell(PHASE, phase="ready")
    rig.take()
    rig.session()
    assert rig.sent() == [(PHASE, {"phase": "ready"}, True), (FACTS, {"hostname": "a"}, True)]
    rig.take()
    assert rig.sent() == []


def test_metrics_are_not_told_again() -> None:
    rig = Rig()
    rig.session()
    rig.tell(METRICS, load=1)
    rig.take()
    rig.session()
    assert rig.sent() == []
    rig.tell(METRICS, load=1)
    assert len(rig.sent()) == 1


def test_what_is_under_way_goes_to_the_new_host_by_itself() -> None:
    rig = Rig()
    rig.session()
    rig.tell(FACTS, hostname="a")
    (request,) = rig.open
    rig.session()
    assert rig.open == [request]
    rig.take()
    assert rig.open == []


def test_what_a_host_refuses_is_told_to_the_next() -> None:
    rig = Rig()
    rig.session()
    rig.tell(FACTS, hostname="a")
    rig.refuse(REFUSED)
    rig.tell(FACTS, hostname="b")
    assert rig.sent() == [] and rig.reporter.refusal == "facts: no"
    rig.tell(PHASE, phase="ready")
    assert rig.sent() == [(PHASE, {"phase": "ready"}, False)]
    rig.take()
    rig.session()
    assert (FACTS, {"hostname": "b"}, False) in rig.sent()


@pytest.mark.parametrize("reason", [REFUSED, NO_AGENT])
def test_a_policy_that_changes_is_asked_again(reason: int) -> None:
    rig = Rig()
    rig.session()
    rig.tell(FACTS, hostname="a")
    rig.refuse(reason)
    rig.reporter.host_takes(True, rig.now_s)
    assert rig.sent() == [(FACTS, {"hostname": "a"}, False)]


@pytest.mark.parametrize("reason", [BUSY, NO_AGENT, AGENT_GONE])
def test_a_host_that_has_not_refused_is_told_again_later(reason: int) -> None:
    rig = Rig()
    rig.session()
    rig.tell(METRICS, load=1)
    rig.refuse(reason)
    rig.tell(METRICS, load=2)
    assert rig.sent() == []
    assert rig.reporter.next_timeout() == BUSY_S
    rig.now_s = BUSY_S
    rig.reporter.handle_timeout(rig.now_s)
    assert rig.sent() == [(METRICS, {"load": 2}, False)]
    assert rig.reporter.next_timeout() is None


def test_a_report_that_is_too_large_is_not_sent() -> None:
    rig = Rig()
    rig.session()
    rig.tell(FACTS, hostname="x" * REPORT_BYTES_MAX)
    assert rig.sent() == [] and "REPORT_BYTES_MAX" in rig.reporter.refusal
    assert rig.reporter.counters["reports_too_large"] == 1


def test_all_told() -> None:
    rig = Rig()
    assert rig.reporter.all_told(FACTS)
    rig.session()
    rig.tell(FACTS, hostname="a")
    assert not rig.reporter.all_told(FACTS)
    rig.take()
    assert rig.reporter.all_told(FACTS)
    rig.session(takes=False)
    rig.tell(FACTS, hostname="b")
    assert rig.reporter.all_told(FACTS)  # nobody is there to hear it


class Hosts(RuleBasedStateMachine):
    """Hosts come, take, refuse and go; every one that takes reports knows in the end what is so,
    and services hear of each change once.

    A host that comes gets what was under way, as `rpc.in_flight` repeats it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.kept: dict[str, Any] = {}
        self.heard: dict[str, list[Any]] = {FACTS: [], PHASE: []}
        self.taken: set[bytes] = set()
        self.now: dict[str, Any] = {}

    @rule(takes=st.booleans())
    def new_host(self, takes: bool) -> None:
        self.kept = {}
        self.rig.session(takes=takes)

    @rule()
    def policy_changes(self) -> None:
        self.rig.reporter.host_takes(True, self.rig.now_s)

    @rule(what=st.sampled_from([FACTS, PHASE]), value=st.integers(0, 3))
    def changes(self, what: str, value: int) -> None:
        self.now[what] = {"value": value}
        self.rig.tell(what, value=value)

    @precondition(lambda self: self.rig.open)
    @rule(lost=st.booleans())
    def host_takes_one(self, lost: bool) -> None:
        """lost: its word is, and it is asked again."""
        request = self.rig.open[0]
        asked = decode_invocation(request.body)
        self.kept[asked.method] = asked.args["report"]
        if request.id not in self.taken and not asked.args["known"]:
            self.heard[asked.method].append(asked.args["report"])
        self.taken.add(request.id)
        if not lost:
            self.rig.open.pop(0)
            self.rig.reporter.heard(Receipt(request.id), self.rig.now_s)

    @precondition(lambda self: self.rig.open)
    @rule(reason=st.sampled_from([BUSY, REFUSED]))
    def host_refuses_one(self, reason: int) -> None:
        if self.rig.open[0].id not in self.taken:
            self.rig.refuse(reason)

    @rule(passes_s=st.sampled_from([1.0, BUSY_S]))
    def time_passes(self, passes_s: float) -> None:
        self.rig.now_s += passes_s
        self.rig.reporter.handle_timeout(self.rig.now_s)

    @invariant()
    def one_of_each_is_under_way(self) -> None:
        kinds = [what for what, _, _ in self.rig.sent()]
        assert len(kinds) == len(set(kinds))

    @invariant()
    def a_change_is_heard_once(self) -> None:
        for told in self.heard.values():
            assert all(one != other for one, other in pairwise(told)), told

    def teardown(self) -> None:
        self.rig.reporter.host_takes(True, self.rig.now_s)
        while self.rig.open:
            self.host_takes_one(lost=False)
        assert self.kept == {} or self.kept.items() <= self.now.items()
        for what, told in self.heard.items():
            assert told[-1:] == ([self.now[what]] if what in self.now else [])
        self.new_host(takes=True)
        while self.rig.open:
            self.host_takes_one(lost=False)
        assert self.kept == self.now


TestHosts = Hosts.TestCase
TestHosts.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
