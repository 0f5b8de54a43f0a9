"""Limits: buckets and the breaker, against the plainest models of them."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.host.policy.token_bucket import TokenBucket
from vchan.host.policy.vm_limits import LIMITS, Limits
from vchan.host.vm.throttle import GOOD_CONDUCT_S, VIOLATION_WINDOW_S, Breaker

# --- the table


def test_every_limit_has_a_reason_and_a_default_within_its_bounds() -> None:
    for item in fields(Limits):
        info = LIMITS[item.name]
        assert info.minimum <= getattr(Limits(), item.name) <= info.maximum
        assert info.reason.endswith(".")
        assert info.is_bytes == ("bytes" in item.name)


# --- buckets


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    bucket = TokenBucket(rate=10, burst=5)
    assert bucket.take(5, now_s=100.0) == 0
    assert bucket.take(1, now_s=100.0) == pytest.approx(0.1)
    assert bucket.take(1, now_s=100.1) == pytest.approx(0.1)
    assert bucket.take(0, now_s=100.2) == pytest.approx(0)
    assert bucket.take(5, now_s=200.0) == 0  # no more than the burst has gathered
    assert bucket.take(1, now_s=200.0) > 0


def test_a_bucket_that_is_asked_first() -> None:
    bucket = TokenBucket(rate=1, burst=2)
    assert [bucket.try_take(1, 0.0) for _ in range(3)] == [True, True, False]
    assert bucket.try_take(1, 0.5) is False
    assert bucket.try_take(1, 1.0) is True


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(rate=1, burst=1)
    assert bucket.try_take(1, 10.0)
    assert not bucket.try_take(1, 10.0)
    assert not bucket.try_take(1, 5.0)
    assert not bucket.try_take(1, 10.5)
    assert bucket.try_take(1, 11.0)
    full = TokenBucket(rate=1, burst=1)
    assert full.take(0, 10.0) == 0
    assert full.try_take(1, 5.0)


@given(
    st.floats(0.1, 1000),
    st.floats(1, 1000),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100)), min_size=1, max_size=50),
)
def test_who_waits_as_told_never_has_more_than_burst_and_rate(
    rate: float, burst: float, takes: list[tuple[float, float]]
) -> None:
    bucket = TokenBucket(rate, burst)
    now_s = taken = 0.0
    for idle_s, amount in takes:
        now_s += idle_s
        wait_s = bucket.take(amount, now_s)
        taken += amount
        assert wait_s >= 0
        now_s += wait_s
        assert taken <= (burst + rate * now_s) * (1 + 1e-9)
        assert bucket.take(0, now_s) == pytest.approx(0, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 4)), max_size=60))
def test_what_is_let_through_is_bounded_over_every_stretch(steps: list[tuple[float, int]]) -> None:
    bucket = TokenBucket(rate=2, burst=5)
    now_s = 0.0
    passed: list[tuple[float, int]] = []
    for idle_s, amount in steps:
        now_s += idle_s
        if bucket.try_take(amount, now_s):
            passed.append((now_s, amount))
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            stretch_s = passed[last][0] - passed[first][0]
            assert sum(a for _, a in passed[first : last + 1]) <= 5 + 2 * stretch_s + 1e-6


# --- the breaker

LIMITS_3 = Limits(violations_per_min=3, quarantine_s=10, quarantine_max_s=60)


def tripped(breaker: Breaker, now_s: float) -> bool:
    return any(breaker.violation("bad frame", now_s) for _ in range(4))


def test_it_trips_when_there_are_more_than_allowed_within_the_window() -> None:
    breaker = Breaker(LIMITS_3)
    assert [breaker.violation("bad frame", 0.0) for _ in range(3)] == [False] * 3
    assert breaker.quarantined_until(0.0) is None
    assert breaker.violation("bad key", 1.0)
    assert breaker.quarantined_until(1.0) == 11.0
    assert breaker.quarantined_until(10.9) == 11.0
    assert breaker.quarantined_until(11.0) is None
    assert breaker.reason == "4 violations in a minute, the last: bad key"


def test_old_violations_do_not_count() -> None:
    breaker = Breaker(LIMITS_3)
    step_s = VIOLATION_WINDOW_S / 3 + 0.1
    assert not any(breaker.violation("x", number * step_s) for number in range(100))


def test_it_doubles_up_to_the_longest_and_forgives_good_conduct() -> None:
    breaker = Breaker(LIMITS_3)
    now_s, lengths = 0.0, []
    for _ in range(5):
        assert tripped(breaker, now_s)
        until_s = breaker.quarantined_until(now_s)
        assert until_s is not None
        lengths.append(until_s - now_s)
        now_s = until_s
    assert lengths == [10, 20, 40, 60, 60]
    now_s += GOOD_CONDUCT_S
    assert tripped(breaker, now_s)
    assert breaker.quarantined_until(now_s) == now_s + 10


def test_a_single_deed_may_suffice() -> None:
    breaker = Breaker(LIMITS_3)
    assert breaker.trip("31 handshakes in a minute", 5.0)
    assert breaker.reason == "31 handshakes in a minute"
    assert breaker.quarantined_until(5.0) == 15.0
    assert not breaker.trip("again", 6.0)
    assert breaker.trip("again", 15.0)
    assert breaker.quarantined_until(15.0) == 35.0
    assert breaker.trip("later", 35.0 + GOOD_CONDUCT_S)
    assert breaker.trips == 1


def test_what_comes_during_a_quarantine_does_not_count() -> None:
    breaker = Breaker(LIMITS_3)
    assert tripped(breaker, 0.0)
    assert not any(breaker.violation("late", 5.0) for _ in range(100))
    assert breaker.quarantined_until(5.0) == 10.0
    assert not breaker.violation("first after it", 10.0)


def test_the_operator_releases_and_forgives() -> None:
    breaker = Breaker(LIMITS_3)
    assert tripped(breaker, 0.0)
    assert tripped(breaker, 10.0)
    breaker.release()
    assert breaker.quarantined_until(10.0) is None
    assert breaker.reason == ""
    assert tripped(breaker, 11.0)
    assert breaker.quarantined_until(11.0) == 21.0


def test_a_longest_below_the_first_is_the_first() -> None:
    breaker = Breaker(Limits(quarantine_s=100, quarantine_max_s=10))
    assert breaker.trip("x", 0.0)
    assert breaker.quarantined_until(0.0) == 100.0


@given(st.lists(st.floats(0, 100), max_size=200))
def test_a_breaker_is_bounded_and_never_longer_than_its_longest(gaps: list[float]) -> None:
    breaker, now_s = Breaker(LIMITS_3), 0.0
    for gap_s in gaps:
        now_s += gap_s
        breaker.violation("x", now_s)
        assert len(breaker._recent) <= LIMITS_3.violations_per_min
        until_s = breaker.quarantined_until(now_s)
        assert until_s is None or now_s < until_s <= now_s + LIMITS_3.quarantine_max_s
