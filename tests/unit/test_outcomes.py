"""One table says how requests end: every reason of the wire is in it, and nothing else decides."""

from __future__ import annotations

import pytest

from vchan import errors
from vchan.rpc.in_flight import Answered, HandedBack, Overdue, Taken
from vchan.rpc.messages import AGENT_GONE, NO_AGENT
from vchan.rpc.outcomes import (
    ENDINGS,
    UNSENT,
    Ending,
    Ran,
    ending_of,
    error_of,
    http_status_of,
    may_have_run,
    reason_of,
)
from vchan.wire import layout

ID = bytes(16)


def test_every_reason_of_the_wire_has_its_row() -> None:
    wire = {
        name.removeprefix("REASON_"): value
        for name, value in vars(layout).items()
        if name.startswith("REASON_")
    }
    assert {each.name: each.reason for each in ENDINGS} == wire


def test_a_reason_of_a_newer_peer_says_that_it_may_have_run() -> None:
    assert ending_of(200).ran is Ran.PERHAPS
    assert ending_of(200).error is errors.AgentGone
    assert may_have_run(HandedBack(ID, 200, ""))


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda each: each.name)
def test_the_exception_says_what_the_reason_says(ending: Ending) -> None:
    """The words of the tree at the top of vchan.errors, which people read."""
    text = next(
        line for line in (errors.__doc__ or "").splitlines() if ending.error.__name__ in line
    )
    assert ("may have run" in text) == (ending.ran is Ran.PERHAPS)


def test_what_could_not_be_sent_has_not_run() -> None:
    for kind in UNSENT:
        error = kind("", 0, 0, "") if kind is errors.LimitExceeded else kind("")
        assert not may_have_run(HandedBack(ID, reason_of(error), ""))


def test_outcomes() -> None:
    assert may_have_run(Taken(ID)) and may_have_run(Answered(ID, True, b""))
    assert may_have_run(HandedBack(ID, AGENT_GONE, ""))
    assert not may_have_run(HandedBack(ID, NO_AGENT, ""))
    assert [may_have_run(Overdue(ID, sent)) for sent in (True, False)] == [True, False]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda each: each.name)
def test_callers_are_told_what_the_table_says(ending: Ending) -> None:
    outcome = HandedBack(ID, ending.reason, "why")
    error = error_of(outcome, 1.0)
    assert (type(error), str(error)) == (ending.error, "why")
    assert http_status_of(outcome) == ending.http_status


def test_callers_are_told_that_their_time_is_over() -> None:
    error = error_of(Overdue(ID), 1.5)
    assert (type(error), str(error)) == (errors.CallTimeout, "no answer within 1.5 s")
    assert http_status_of(Overdue(ID)) == 504
    assert type(error_of(Answered(ID, False, b""), 1.0)) is errors.Rejected
