"""The log of a VM's hosts: what it remembers is bounded, and errs to the safe side."""

from __future__ import annotations

from vchan.host.oslo_wire.mail import STAYS_MAX, Arrival, Note
from vchan.host.vm.channel import SILENCE_S
from vchan.host.vm.handover import CLOSED_MAX, OPEN_MAX, SETTLED_S, Handover, Past
from vchan.session.contract import PING_IDLE_S
from vchan.session.liveness import PROBE_S


def test_a_guest_that_stands_still_is_found_silent_before_all_is_settled() -> None:
    """It was heard, is asked when it has been idle or, if something just went out to it, a little
    later, and has that long to answer. Only what is known to stand still keeps its time."""
    assert PING_IDLE_S + PROBE_S + SILENCE_S < SETTLED_S


def begun(before: str = "host-0") -> Handover:
    history = Handover()
    history.begin("here.1", before, 0.0)
    return history


def test_notes_of_ever_more_stays_are_not_all_remembered() -> None:
    history = begun()
    for number in range(20 * CLOSED_MAX):
        history.read_note(Note((f"there.{number}",)))
    assert len(history._closed) <= CLOSED_MAX


def test_a_note_of_many_stays_is_remembered_whole() -> None:
    """One that speaks of itself must not have a part of it count as unknown."""
    history = begun()
    stays = tuple(f"there.{number}" for number in range(STAYS_MAX))
    history.read_note(Note(stays))
    history.read_note(Note(("elsewhere.1",), unclear=stays, waited_ms=(0,) * len(stays)))
    history.read_arrival(Arrival("here.1"))
    assert history.knows_all


def test_what_is_forgotten_is_in_doubt_not_known() -> None:
    """The stay that is forgotten first: a later host that knows nothing of it makes it unclear."""
    history = begun()
    history.read_note(Note(("there.0",)))
    for number in range(1, 2 * CLOSED_MAX):
        history.read_note(Note((f"there.{number}",)))
    history.read_note(Note(("elsewhere.1",), unclear=("there.0",), waited_ms=(0,)))
    history.read_arrival(Arrival("here.1"))
    known = [history.knows_all]
    history.handle_timeout(SETTLED_S)
    assert [*known, history.knows_all] == [False, True]


def test_arrivals_of_ever_more_stays_are_one_doubt() -> None:
    history = begun()
    for number in range(20 * OPEN_MAX):
        history.read_arrival(Arrival(f"there.{number}"))
    assert len(history._open) <= OPEN_MAX + 1
    for number in range(20 * OPEN_MAX):
        history.read_note(Note((f"there.{number}",)))
    history.read_arrival(Arrival("here.1"))
    # Of some nobody can say any more whether they have left a note.
    known = [history.knows_all]
    history.handle_timeout(SETTLED_S)
    assert [*known, history.knows_all] == [False, True]
    assert history._open == {}


def test_what_is_known_is_bounded_too() -> None:
    history = begun()
    history.remember(b"x" * 16, Past.TAKEN)
    history.forget(b"x" * 16)
    assert len(history) == 0
