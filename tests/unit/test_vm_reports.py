"""What a host keeps of a guest's word: bounded, plain, and never more than shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_vm_upward import Gate, Rig, id_of
from vchan.host.policy.rule_parser import parse
from vchan.host.policy.rules import Facts, Policy
from vchan.host.vm.gate import VmGate
from vchan.host.vm.reports import (
    ADDRESSES_SHOWN_MAX,
    DEPTH_MAX,
    FILE_SYSTEMS_SHOWN_MAX,
    NUMBER_MAX,
    REPORTS_BURST,
    TEXT_CHARS_MAX,
    VALUES_MAX,
    BadReport,
    Reports,
    TooManyReports,
)
from vchan.rpc.bodies import encode_invocation
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    FANOUT,
    NOTIFICATION,
    REDELIVERED,
    REFUSED,
    Receipt,
    Request,
    Returned,
    Topic,
)
from vchan.rpc.reports import AGENTS, FACTS, METRICS, PHASE, REPORT_BYTES_MAX, TOPIC, WHAT

FACTS_OF_ONE = {
    "hostname": "web-1",
    "os": {"pretty_name": "Debian GNU/Linux 12"},
    "addresses": [
        {"interface": "eth0", "address": "fe80::1", "prefix": 64},
        {"interface": "eth0", "address": "192.0.2.7", "prefix": 24},
        {"interface": "eth0", "address": "'; drop table"},
        {"interface": "eth0", "address": 7},
        "nonsense",
    ],
}


def note(reports: Reports, what: str, report: Any, **more: Any) -> dict[str, Any] | None:
    return reports.note(what, {"report": report, **more}, 0.0)


# --- what is kept


def test_what_a_list_shows() -> None:
    reports = Reports()
    assert reports.row()["addresses"] == [] and reports.row()["phase"] is None
    note(reports, FACTS, FACTS_OF_ONE)
    note(reports, PHASE, {"phase": "ready"})
    units = {"a": {"state": "running"}, "b": {"state": "waiting"}, "c": {"state": "broken"}, "d": 1}
    note(reports, AGENTS, {"units": units})
    assert reports.row() == {
        "phase": "ready",
        "hostname": "web-1",
        "os": "Debian GNU/Linux 12",
        "addresses": ["192.0.2.7", "fe80::1"],
        "agents_failed": ["b", "c"],
    }


def test_how_old_a_report_is() -> None:
    reports = Reports()
    reports.note(FACTS, {"report": {"hostname": "a"}}, 100.0)
    assert reports.shown(107.5) == {FACTS: {"age_s": 7.5, "hostname": "a"}}


def test_a_guest_cannot_say_how_old_it_is_or_what_else_was_told() -> None:
    reports = Reports()
    note(reports, FACTS, {"age_s": -1, "hostname": "a"})
    assert reports.shown(0.0)[FACTS]["hostname"] == "a"


def test_metrics_are_numbers_that_we_know_of_as_many_file_systems_as_we_show() -> None:
    reports = Reports()
    rows: list[Any] = [{"path": f"/{n}", "bytes": n, "evil": 1, "files": "x"} for n in range(40)]
    memory = {"total_bytes": 10, "available_bytes": True, "evil": 3}
    note(reports, METRICS, {"memory": memory, "load": [0.5, "x"], "file_systems": [1, *rows]})
    measured = reports.measured()
    assert measured["memory"] == {"total_bytes": 10}
    assert measured["load"] == 0.5
    assert len(measured["file_systems"]) <= FILE_SYSTEMS_SHOWN_MAX
    assert measured["file_systems"]["/3"] == {"bytes": 3}


@pytest.mark.parametrize("metrics", [{}, {"memory": 1, "load": 2, "file_systems": 3}])
def test_metrics_that_are_none(metrics: Any) -> None:
    reports = Reports()
    note(reports, METRICS, metrics)
    assert reports.measured() == {"memory": {}, "load": None, "file_systems": {}}


# --- news


def test_what_services_hear_of() -> None:
    reports = Reports()
    assert note(reports, FACTS, {"hostname": "a"}) == {"hostname": "a"}
    assert note(reports, FACTS, {"hostname": "a"}) == {"hostname": "a"}  # what came of the first?
    reports.heard(FACTS, {"hostname": "a"})
    assert note(reports, FACTS, {"hostname": "a"}) is None  # a new run of the guest's daemon
    assert note(reports, FACTS, {"hostname": "b"}, known=True) is None  # another host told it
    assert note(reports, FACTS, {"hostname": "b"}) is None
    assert note(reports, FACTS, {"hostname": "c"}, known="yes") == {"hostname": "c"}
    assert note(reports, METRICS, {"load": []}) is None  # changes all the time


def test_that_services_have_heard_of_one_state_says_nothing_of_the_next() -> None:
    reports = Reports()
    note(reports, FACTS, {"hostname": "a"})
    note(reports, FACTS, {"hostname": "b"})
    reports.heard(FACTS, {"hostname": "a"})
    reports.heard(PHASE, {"phase": "ready"})  # that it was told is not known any more
    assert note(reports, FACTS, {"hostname": "b"}) == {"hostname": "b"}
    reports.heard(FACTS, {"hostname": "b"})
    assert note(reports, FACTS, {"hostname": "a"}) == {"hostname": "a"}


# --- hostile guests


def nested(depth: int) -> dict[str, Any]:
    return {"x": nested(depth - 1)} if depth else {"x": 1}


@pytest.mark.parametrize(
    ("report", "limit"),
    [
        ({"x": "y" * (TEXT_CHARS_MAX + 1)}, "TEXT_CHARS_MAX"),
        ({"y" * (TEXT_CHARS_MAX + 1): "x"}, "TEXT_CHARS_MAX"),
        ({"x": list(range(VALUES_MAX))}, "VALUES_MAX"),
        ({"x": [[[[[[1]]]]]]}, "DEPTH_MAX"),
        (nested(DEPTH_MAX), "DEPTH_MAX"),
        ({"x": NUMBER_MAX}, "NUMBER_MAX"),
        ({"x": -(10**400)}, "NUMBER_MAX"),
        ({"x": float("nan")}, "NUMBER_MAX"),
        ({"x": float("inf")}, "NUMBER_MAX"),
        ([], '"report"'),
        (None, '"report"'),
    ],
)
def test_what_is_refused_leaves_what_was_kept(report: Any, limit: str) -> None:
    reports = Reports()
    note(reports, FACTS, {"hostname": "a"})
    with pytest.raises(BadReport, match=limit):
        note(reports, FACTS, report)
    assert reports.shown(0.0)[FACTS]["hostname"] == "a"


def test_a_phase_that_is_none() -> None:
    with pytest.raises(BadReport, match="booting, ready, ending"):
        note(Reports(), PHASE, {"phase": "dead"})


def test_what_a_terminal_would_obey_is_not_kept() -> None:
    reports = Reports()
    note(reports, FACTS, {"hostname": "a\x1b[2J\n\u202e", "\x1b]0;": 1, "lone": "\ud800"})
    assert reports.row()["hostname"] == "a?[2J??"
    json.dumps(reports.shown(0.0)).encode("utf-8")


def test_reports_come_at_a_rate() -> None:
    reports = Reports()
    for number in range(int(REPORTS_BURST)):
        note(reports, FACTS, {"number": number})
    with pytest.raises(TooManyReports, match="REPORTS_PER_S"):
        note(reports, FACTS, {"number": -1})
    assert reports.note(FACTS, {"report": {"number": -1}}, 2.0) == {"number": -1}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4)
    ),
    max_leaves=6,
)
KNOWN = st.sampled_from(
    [
        *("os", "pretty_name", "addresses", "address", "units", "state", "memory", "load"),
        *("phase", "file_systems", "path", "bytes", "hostname", "total_bytes"),
    ]
)
ROWS = st.dictionaries(KNOWN, JSON, max_size=4)
REPORTS = st.dictionaries(KNOWN, ROWS | st.lists(ROWS, max_size=4) | JSON, max_size=5)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    yield value


@given(st.lists(st.tuples(st.sampled_from(WHAT), REPORTS), max_size=3))
def test_whatever_a_guest_sends_is_kept_bounded_and_shown(told: list[tuple[str, Any]]) -> None:
    reports = Reports()
    for what, report in told:
        try:
            note(reports, what, report)
        except BadReport:
            pass
    shown = reports.shown(1.0)
    for what in shown:
        kept = list(leaves(shown[what]))
        assert len(kept) <= 2 * VALUES_MAX + 10
        texts = [each for each in kept if isinstance(each, str)]
        assert all(len(text) <= TEXT_CHARS_MAX and text.isprintable() for text in texts)
    row = reports.row()
    assert len(row["addresses"]) <= ADDRESSES_SHOWN_MAX
    json.dumps([row, reports.measured(), shown], allow_nan=False).encode("utf-8")


# --- on its way through Upward


def report_request(number: int, what: str = FACTS, flags: int = 0, **args: Any) -> Request:
    args = args or {"report": {"hostname": "a"}, "known": False}
    return Request(id_of(number), flags, 0, 0, *TOPIC, "", encode_invocation(what, args))


def test_without_a_topic_for_services_a_report_is_taken_at_once() -> None:
    rig = Rig(gate=Gate(may_send=False))
    rig.opened()
    rig.out.receive(report_request(1), rig.now_s)
    assert rig.said == [Receipt(id_of(1))]
    assert rig.published == [] and rig.offered == [] and rig.listens == 0
    assert rig.out.reports.row()["hostname"] == "a"
    assert rig.out.counters["guest_reports"] == 1


def rig_with_topic() -> Rig:
    rig = Rig(gate=Gate(may_send=False))
    rig.gate.reports_to = Topic("nova", "guests")
    return rig


def test_a_report_is_taken_when_the_broker_has_it() -> None:
    rig = rig_with_topic()
    rig.opened()
    rig.serves = True  # programs of the host do not get it
    rig.out.receive(report_request(1), rig.now_s)
    rig.arrival_comes_back()
    (sent,) = rig.published
    assert sent.publication.exchange == "nova" and sent.publication.routing_key == "guests.info"
    assert sent.message["payload"] == {"hostname": "a"} and not sent.is_marked
    assert rig.said == [] and rig.offered == []
    rig.out.sent(sent.id, ok=True, unroutable=False, doubtful=False, now_s=rig.now_s)
    assert rig.said == [Receipt(id_of(1))]


def test_a_report_that_no_service_listens_for_is_taken_all_the_same() -> None:
    """It is kept here; and what is told next must be, too."""
    rig = rig_with_topic()
    rig.opened()
    rig.out.receive(report_request(1), rig.now_s)
    rig.arrival_comes_back()
    (sent,) = rig.published
    rig.out.sent(sent.id, ok=False, unroutable=True, doubtful=False, now_s=rig.now_s)
    assert rig.said == [Receipt(id_of(1))]
    assert rig.out.open_requests == 0
    assert rig.out.counters["guest_unroutable"] == 1


def test_what_another_host_has_published_is_kept_and_not_published_again() -> None:
    from vchan.host.oslo_wire.mail import Note

    rig = rig_with_topic()
    rig.opened(before="there")
    rig.out.receive(report_request(1, flags=REDELIVERED), rig.now_s)
    assert rig.out.reports.row()["hostname"] == "a"
    rig.note(Note(("there.1",), taken=(id_of(1),)))
    rig.arrival_comes_back()
    assert rig.published == []
    assert rig.said == [Receipt(id_of(1))]


def test_what_waits_to_be_published_is_not_said_to_have_been() -> None:
    """The guest's daemon died, and the next one tells the same: if this host dies, too, before the
    broker has it, the next host must hear that it is news."""
    rig = rig_with_topic()
    rig.opened()
    rig.out.receive(report_request(1), rig.now_s)
    rig.out.receive(report_request(2), rig.now_s)
    (returned,) = rig.said
    assert (returned.id, returned.reason) == (id_of(2), BUSY)
    rig.out.receive(report_request(3, PHASE, report={"phase": "ready"}), rig.now_s)
    rig.arrival_comes_back()
    assert [sent.id for sent in rig.published] == [id_of(1), id_of(3)]
    rig.said.clear()
    for sent in rig.published:
        rig.out.sent(sent.id, ok=True, unroutable=False, doubtful=False, now_s=rig.now_s)
    rig.out.receive(report_request(4), rig.now_s)
    assert rig.said == [Receipt(id_of(1)), Receipt(id_of(3)), Receipt(id_of(4))]


def test_what_was_lost_on_its_way_here_is_not_news_when_it_comes_again() -> None:
    """A new run of the guest's daemon told what services know; its session began anew before it
    came here."""
    rig = rig_with_topic()
    rig.opened()
    rig.out.receive(report_request(1), rig.now_s)
    rig.arrival_comes_back()
    (sent,) = rig.published
    rig.out.sent(sent.id, ok=True, unroutable=False, doubtful=False, now_s=rig.now_s)
    rig.out.receive(report_request(2, flags=REDELIVERED), rig.now_s)
    assert rig.said == [Receipt(id_of(1)), Receipt(id_of(2))]
    assert len(rig.published) == 1


def test_what_is_known_is_not_published() -> None:
    rig = rig_with_topic()
    rig.opened()
    args: dict[str, Any] = {"report": {"hostname": "a"}, "known": True}
    rig.out.receive(report_request(1, **args), rig.now_s)
    assert rig.said == [Receipt(id_of(1))] and rig.published == [] and rig.listens == 0


@pytest.mark.parametrize("flags", [CALL, FANOUT, NOTIFICATION])
def test_a_report_is_a_cast(flags: int) -> None:
    rig = Rig()
    rig.opened()
    rig.out.receive(report_request(1, flags=flags), rig.now_s)
    (returned,) = rig.said
    assert isinstance(returned, Returned) and returned.reason == REFUSED
    assert "casts of phase, facts, agents, metrics alone" in returned.text


def test_a_report_of_something_else_or_too_long() -> None:
    rig = Rig()
    rig.opened()
    rig.out.receive(report_request(1, "passwords"), rig.now_s)
    rig.out.receive(report_request(2, FACTS, report={"x": "y" * REPORT_BYTES_MAX}), rig.now_s)
    rig.out.receive(report_request(3, FACTS, report=1), rig.now_s)
    assert [returned.reason for returned in rig.said] == [REFUSED] * 3
    assert str(REPORT_BYTES_MAX) in rig.said[1].text
    assert rig.published == [] and rig.out.open_requests == 0


def test_too_many_reports_are_asked_for_again_later() -> None:
    rig = Rig()
    rig.opened()
    for number in range(int(REPORTS_BURST) + 1):
        rig.out.receive(report_request(number), rig.now_s)
    assert isinstance(rig.said[-1], Returned) and rig.said[-1].reason == BUSY
    assert rig.gate.record == [rig.said[-1].text]


# --- the policy


def gate(
    *lines: str, reports_to: Topic | None = None, record: Callable[..., None] = lambda *_: None
) -> VmGate:
    policy: Policy = parse([("p", "\n".join(lines))])
    return VmGate(
        Facts("u", "web-1", "p"),
        lambda: policy,
        record,
        lambda given, facts, more: {},
        Topic("openstack", "vchan"),
        reports_to=reports_to,
    )


@pytest.mark.parametrize(
    ("lines", "may", "mute"),
    [
        ([], False, True),
        (["report any any allow"], True, False),
        (["reply any any allow"], False, False),
        (["mode any one-way-cast", "report any any allow"], False, True),
        (["mode any one-way-call", "report any any allow"], False, False),
        (["report any any allow", "mode any one-way-cast"], True, False),
        (["report any any allow", "mode any one-way-call"], True, False),
        (["mode any any cast", "report any any allow"], True, False),
        (["mode any any call"], False, False),
        (["report name:db-* any allow"], False, True),
        (["report any facts allow"], True, False),
    ],
)
def test_the_policy_says_whether_a_vm_may_report(lines: list[str], may: bool, mute: bool) -> None:
    assert gate(*lines).may_report is may
    assert gate(*lines).is_mute is mute


def test_the_policy_says_what_may_be_reported() -> None:
    rig = Rig()
    recorded: list[tuple[Any, ...]] = []
    lines = ("report any phase allow", "report any any deny")
    rig.out._gate = gate(*lines, record=lambda *decision: recorded.append(decision))
    rig.opened()
    rig.out.receive(report_request(1, FACTS), rig.now_s)
    rig.out.receive(report_request(2, PHASE, report={"phase": "ready"}), rig.now_s)
    rig.out.receive(report_request(3, FACTS, flags=REDELIVERED), rig.now_s)
    denied, taken, again = rig.said
    assert denied.reason == REFUSED and "report vchan/facts is denied" in denied.text
    assert taken == Receipt(id_of(2)) and again.reason == AGENT_GONE
    assert [decision[1].topic for decision in recorded] == ["facts", "facts"]


def test_what_services_are_told_of_a_report() -> None:
    assert gate().notification(FACTS, {"a": 1}, id_of(1)) is None
    told = gate(reports_to=Topic("nova", "guests")).notification(FACTS, {"a": 1}, id_of(1))
    assert told is not None
    assert (told.ask.exchange, told.ask.topic, told.ask.method) == ("nova", "guests", "info")
    assert told.args["event_type"] == "vchan.guest.facts"
    assert told.args["metadata"] == {"message_id": id_of(1).hex()}
    vm = told.args["payload"]["vm"]
    assert (vm["uuid"], vm["name"], vm["project"]) == ("u", "web-1", "p")
    assert told.args["payload"]["report"] == {"a": 1}
