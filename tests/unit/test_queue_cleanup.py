"""When the queues of VMs that are no more may go."""

from __future__ import annotations

import pytest

from vchan.host.broker import queue_cleanup as leftovers
from vchan.host.broker.queue_cleanup import Leftovers
from vchan.rpc.messages import Topic

DELAY_S = 600.0
ONE, TWO = Topic("openstack", "one"), Topic("openstack", "two")


def served(topics: frozenset[Topic] = frozenset({ONE})) -> Leftovers:
    """A VM that was served here and is shut off."""
    known = Leftovers(DELAY_S)
    known.here("vm")
    known.served("vm", topics)
    return known


def test_a_deleted_vm_after_a_while() -> None:
    known = served()
    assert known.due(1e9) == []  # it is defined
    known.gone("vm", 1000.0)
    assert known.due(1599.9) == []
    assert known.due(1600.0) == [("vm", frozenset({ONE}))]
    assert known.due(1e9) == []


def test_every_topic_it_ever_had() -> None:
    known = served()
    known.here("vm")
    known.served("vm", frozenset({TWO}))
    known.gone("vm", 0.0)
    assert known.due(DELAY_S) == [("vm", frozenset({ONE, TWO}))]


def test_one_that_is_defined_again_stays() -> None:
    known = served()
    known.gone("vm", 0.0)
    known.here("vm")
    assert known.due(1e9) == []
    known.gone("vm", 5000.0)
    assert known.due(5000.0 + DELAY_S) == [("vm", frozenset({ONE}))]


def test_one_that_moved_stays() -> None:
    known = served()
    known.here("vm")
    known.moved("vm")
    known.gone("vm", 0.0)
    assert known.due(1e9) == []
    # It comes back, and ends here.
    known.here("vm")
    known.served("vm", frozenset({TWO}))
    known.gone("vm", 0.0)
    assert known.due(1e9) == [("vm", frozenset({TWO}))]


def test_one_that_was_never_served_has_its_own_queue_at_most() -> None:
    known = Leftovers(DELAY_S)
    known.gone("vm", 0.0)
    assert known.due(DELAY_S) == [("vm", frozenset())]


def test_it_can_be_switched_off() -> None:
    known = Leftovers(0.0)
    known.served("vm", frozenset({ONE}))
    known.gone("vm", 0.0)
    assert known.due(1e9) == []


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "LEFTOVERS_MAX", 2)
    known = Leftovers(DELAY_S)
    for number in range(5):
        known.served(f"off{number}", frozenset({ONE}))
        known.moved(f"moved{number}")
        known.gone(f"gone{number}", 0.0)
    assert known.due(1e9) == [("gone3", frozenset()), ("gone4", frozenset())]
    for number in range(5):
        known.gone(f"moved{number}", 0.0)
    assert [vm for vm, _ in known.due(1e9)] == ["moved1", "moved2"]  # known no more
    known.gone("off0", 0.0)
    known.gone("off4", 0.0)
    assert known.due(1e9) == [("off0", frozenset()), ("off4", frozenset({ONE}))]
    assert len(known._moved) + len(known._topics) <= 2 * 2


def test_one_that_is_gone_here_because_it_moved() -> None:
    """libvirt's two words of that come in either order."""
    known = served()
    known.gone("vm", 0.0)
    known.moved("vm")
    assert known.due(1e9) == []


def test_one_that_is_there_again_stays_though_it_is_off_or_cannot_be_read() -> None:
    leftovers = served()
    leftovers.gone("vm", 0.0)
    leftovers.present("vm")
    assert leftovers.due(1e6) == []
    leftovers.gone("vm", 1e6)
    assert leftovers.due(2e6) == [("vm", frozenset({ONE}))]
