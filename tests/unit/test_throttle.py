"""The throttle: how fast a guest is read, and when it is not read any more."""

from __future__ import annotations

import itertools

import pytest

from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.throttle import (
    PAUSE_S_MAX,
    PAUSE_S_MIN,
    RESERVED_S_MAX,
    THROTTLED_BUSY,
    Throttle,
    make_crowd,
)

LIMITS = Limits(
    bytes_per_s=1_000_000,
    frames_per_s=1000,
    messages_per_s=600,
    handshakes_per_min=6,
    violations_per_min=2,
    quarantine_s=10,
)


def test_within_its_limits_a_guest_never_waits() -> None:
    throttle = Throttle(LIMITS)
    assert [throttle.received(10_000, 10, 5, 0.001, second / 100) for second in range(1000)] == [
        0
    ] * 1000
    assert throttle.counters["throttled"] == 0


@pytest.mark.parametrize(
    ("size", "frames", "messages"), [(10_000, 1, 1), (100, 10, 1), (100, 1, 6)]
)
def test_a_guest_that_waits_as_told_is_read_at_its_rate(
    size: int, frames: int, messages: int
) -> None:
    throttle, now_s, took_s = Throttle(LIMITS), 0.0, 0.0
    for _ in range(1000):
        now_s += throttle.received(size, frames, messages, took_s, now_s)
    assert now_s == pytest.approx(9, rel=0.01)  # ten seconds' worth, one of them a burst
    assert throttle.counters["throttled"] > 0


def test_a_guest_gets_its_share_of_the_daemons_time_whatever_it_is_spent_on() -> None:
    throttle, now_s = Throttle(Limits(busy_ms_per_s=50)), 0.0
    for _ in range(1000):
        now_s += 0.002 + throttle.received(100, 1, 1, 0.002, now_s)
    assert now_s == pytest.approx(1000 * 0.002 / 0.05, rel=0.01)
    assert throttle.counters["throttled"] > 0


def test_those_that_are_over_their_rates_share_a_part_of_the_daemons_time() -> None:
    """And those that are not do not wait for them."""
    crowd = make_crowd()
    hostile = [Throttle(Limits(busy_ms_per_s=100), crowd) for _ in range(10)]
    well = Throttle(Limits(busy_ms_per_s=100), crowd)
    due_s, spent_s, now_s = [0.0] * len(hostile), 0.0, 0.0
    while now_s < 20.0:
        number = min(range(len(hostile)), key=due_s.__getitem__)
        now_s = max(now_s, due_s[number])
        spent_s += 0.0005
        due_s[number] = now_s + 0.0005 + hostile[number].received(1, 1, 1, 0.0005, now_s)
        assert well.received(1, 0, 0, 0.0, now_s) == 0
    assert spent_s / now_s == pytest.approx(THROTTLED_BUSY, rel=0.2)


def test_a_guest_that_was_quiet_may_keep_the_daemon_busy_for_a_moment() -> None:
    throttle = Throttle(Limits(busy_ms_per_s=100))
    assert throttle.received(100, 1, 1, 0.025, 0.0) == 0
    assert throttle.received(100, 1, 1, 0.001, 0.0) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("size", "messages", "took_s"),
    [(32_000, 2, 0.0001), (1000, 12, 0.0001), (1000, 1, 0.004)],
    ids=["bytes", "messages", "time"],
)
def test_streams_that_wait_as_told_have_the_rate_and_never_make_requests_wait(
    size: int, messages: int, took_s: float
) -> None:
    throttle, now_s, times = Throttle(LIMITS), 0.0, 0
    while now_s < 20.0:
        assert throttle.received(size, messages, messages, took_s, now_s) == 0
        assert throttle.received(100, 1, 1, 0.0, now_s) == 0, "an answer among them"
        times += 1
        while wait_s := throttle.reserved(now_s):
            now_s += wait_s
    shares = (
        times * (size + 100) / LIMITS.bytes_per_s,
        times * (messages + 1) / LIMITS.messages_per_s,
        times * took_s * 1000 / LIMITS.busy_ms_per_s,
    )
    assert 20.0 < max(shares) < 21.0
    assert throttle.counters["throttled"] == 0


def test_streams_have_turns_beside_requests_that_use_up_the_rate() -> None:
    throttle, now_s, turns = Throttle(LIMITS), 0.0, []
    while now_s < 10.0:
        now_s += 0.01 + throttle.received(20_000, 20, 10, 0.0, now_s)
        if not throttle.reserved(now_s):
            turns.append(now_s)
    late = [at_s for at_s in turns if at_s > 5.0]
    assert len(late) > 20
    assert max(b - a for a, b in itertools.pairwise(late)) < RESERVED_S_MAX + 0.1


def test_no_pause_is_so_long_that_the_guest_looks_silent() -> None:
    assert Throttle(LIMITS).received(100_000_000, 1, 1, 0.0, 0.0) == PAUSE_S_MAX


def test_no_pause_is_so_short_that_it_costs_more_than_it_saves() -> None:
    throttle = Throttle(LIMITS)
    assert throttle.received(1_000_000, 1, 1, 0.0, 0.0) == 0
    assert throttle.received(1, 1, 1, 0.0, 0.0) == PAUSE_S_MIN


def test_handshakes() -> None:
    throttle = Throttle(LIMITS)
    assert not any(throttle.handshake(0.0) for _ in range(6))
    assert throttle.handshake(0.0)
    assert throttle.breaker.reason == "over 6 handshakes a minute"
    assert throttle.breaker.quarantined_until(0.0) == 10.0
    assert not throttle.handshake(1.0)  # it is there already
    assert throttle.counters["quarantines"] == 1
    patient = Throttle(LIMITS)
    assert not any(patient.handshake(number * 10.1) for number in range(100))


def test_a_release_forgives_handshakes_too() -> None:
    throttle = Throttle(LIMITS)
    for _ in range(7):
        throttle.handshake(0.0)
    throttle.release()
    assert throttle.breaker.quarantined_until(0.0) is None
    assert not any(throttle.handshake(0.0) for _ in range(6))
    assert throttle.handshake(0.0)


def test_violations() -> None:
    throttle = Throttle(LIMITS)
    assert [throttle.violation("bad ack", 0.0) for _ in range(4)] == [False, False, True, False]
    assert throttle.counters["quarantines"] == 1


def test_other_limits_hold_at_once_and_forgive_nothing() -> None:
    throttle = Throttle(LIMITS)
    throttle.violation("x", 0.0)
    throttle.update(LIMITS)
    assert throttle.limits is LIMITS
    throttle.update(Limits(violations_per_min=1, bytes_per_s=64 * 1024))
    assert throttle.violation("x", 1.0)
    assert throttle.received(128 * 1024, 1, 1, 0.0, 1.0) == pytest.approx(1.0)
