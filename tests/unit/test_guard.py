"""The guard: how fast a guest is read, and when it is not read any more."""

from __future__ import annotations

import pytest

from vchan.host.guard import PAUSE_S_MAX, PAUSE_S_MIN, Guard
from vchan.host.limits import Limits

LIMITS = Limits(
    bytes_per_s=1_000_000,
    frames_per_s=1000,
    messages_per_s=600,
    handshakes_per_min=6,
    violations_per_min=2,
    quarantine_s=10,
)


def test_within_its_limits_a_guest_never_waits() -> None:
    guard = Guard(LIMITS)
    assert [guard.received(10_000, 10, 5, 0.001, second / 100) for second in range(1000)] == [
        0
    ] * 1000
    assert guard.counters["throttled"] == 0


@pytest.mark.parametrize(
    ("size", "frames", "messages"), [(10_000, 1, 1), (100, 10, 1), (100, 1, 6)]
)
def test_a_guest_that_waits_as_told_is_read_at_its_rate(
    size: int, frames: int, messages: int
) -> None:
    guard, now_s, took_s = Guard(LIMITS), 0.0, 0.0
    for _ in range(1000):
        now_s += guard.received(size, frames, messages, took_s, now_s)
    assert now_s == pytest.approx(9, rel=0.01)  # ten seconds' worth, one of them a burst
    assert guard.counters["throttled"] > 0


def test_a_guest_gets_its_share_of_the_daemons_time_whatever_it_is_spent_on() -> None:
    guard, now_s = Guard(Limits(busy_ms_per_s=50)), 0.0
    for _ in range(1000):
        now_s += 0.002 + guard.received(100, 1, 1, 0.002, now_s)
    assert now_s == pytest.approx(1000 * 0.002 / 0.05, rel=0.01)
    assert guard.counters["throttled"] > 0


def test_a_guest_that_was_quiet_may_keep_the_daemon_busy_for_a_moment() -> None:
    guard = Guard(Limits(busy_ms_per_s=100))
    assert guard.received(100, 1, 1, 0.025, 0.0) == 0
    assert guard.received(100, 1, 1, 0.001, 0.0) == pytest.approx(0.01)


def test_no_pause_is_so_long_that_the_guest_looks_silent() -> None:
    assert Guard(LIMITS).received(100_000_000, 1, 1, 0.0, 0.0) == PAUSE_S_MAX


def test_no_pause_is_so_short_that_it_costs_more_than_it_saves() -> None:
    guard = Guard(LIMITS)
    assert guard.received(1_000_000, 1, 1, 0.0, 0.0) == 0
    assert guard.received(1, 1, 1, 0.0, 0.0) == PAUSE_S_MIN


def test_handshakes() -> None:
    guard = Guard(LIMITS)
    assert not any(guard.handshake(0.0) for _ in range(6))
    assert guard.handshake(0.0)
    assert guard.breaker.reason == "over 6 handshakes a minute"
    assert guard.breaker.quarantined_until(0.0) == 10.0
    assert not guard.handshake(1.0)  # it is there already
    assert guard.counters["quarantines"] == 1
    patient = Guard(LIMITS)
    assert not any(patient.handshake(number * 10.1) for number in range(100))


def test_a_release_forgives_handshakes_too() -> None:
    guard = Guard(LIMITS)
    for _ in range(7):
        guard.handshake(0.0)
    guard.release()
    assert guard.breaker.quarantined_until(0.0) is None
    assert not any(guard.handshake(0.0) for _ in range(6))
    assert guard.handshake(0.0)


def test_violations() -> None:
    guard = Guard(LIMITS)
    assert [guard.violation("bad ack", 0.0) for _ in range(4)] == [False, False, True, False]
    assert guard.counters["quarantines"] == 1


def test_other_limits_hold_at_once_and_forgive_nothing() -> None:
    guard = Guard(LIMITS)
    guard.violation("x", 0.0)
    guard.update(LIMITS)
    assert guard.limits is LIMITS
    guard.update(Limits(violations_per_min=1, bytes_per_s=64 * 1024))
    assert guard.violation("x", 1.0)
    assert guard.received(128 * 1024, 1, 1, 0.0, 1.0) == pytest.approx(1.0)
