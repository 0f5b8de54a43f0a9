"""A cast that no agent will run is counted by its reason, and said; so is what the broker drops."""

from __future__ import annotations

import json

import pytest

from tests.unit.test_vm_downward import TOO_LARGE, A, B, Rig, call, cast, identity
from vchan.errors import LimitExceeded
from vchan.host.oslo_wire.downward_envelope import decode
from vchan.host.vm.dropped_casts import RETURNS_WARN, TOLD_CHARS_MAX
from vchan.host.vm.served_topics import EXCHANGES_SEEN_MAX
from vchan.rpc.in_flight import COMES_AGAIN
from vchan.rpc.messages import (
    AGENT_GONE,
    EXPIRED,
    REFUSED,
    Receipt,
    Returned,
    Topic,
)

DROPPED = ("casts_refused", "casts_agent_gone", "casts_expired", "casts_too_large")


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def rig(told: list[str]) -> Rig:
    rig = Rig()
    rig.downward._dropped._tell = told.append
    rig.serve(A, B)
    return rig


def dropped(rig: Rig) -> dict[str, int]:
    return {name: rig.downward.counters[name] for name in DROPPED if rig.downward.counters[name]}


@pytest.mark.parametrize(
    ("reason", "counter"),
    [
        (REFUSED, "casts_refused"),
        (AGENT_GONE, "casts_agent_gone"),
        (EXPIRED, "casts_expired"),
        (77, None),
    ],
)
@pytest.mark.parametrize("fanout", [False, True])
def test_a_cast_that_comes_back_for_good(
    rig: Rig, told: list[str], reason: int, counter: str | None, fanout: bool
) -> None:
    rig.deliver("t1", cast(method="resize"), fanout=fanout)
    rig.guest(Returned(identity(1), reason, "because of this"))
    assert rig.broker.take() == [("done", "t1")]
    assert dropped(rig) == {counter or "casts_refused": 1}
    (line,) = told
    assert "because of this" in line
    assert identity(1).hex() in line
    assert "'resize'" in line
    assert "nova/a" in line
    assert ("fanout" in line) is fanout


@pytest.mark.parametrize("reason", sorted(COMES_AGAIN))
def test_a_cast_that_waits_is_not_dropped(rig: Rig, told: list[str], reason: int) -> None:
    rig.deliver("t1", cast())
    rig.guest(Returned(identity(1), reason, "not now"))
    assert dropped(rig) == {}
    assert told == []


@pytest.mark.parametrize("reason", [REFUSED, AGENT_GONE, EXPIRED])
def test_a_call_s_caller_is_told_or_has_given_up(rig: Rig, told: list[str], reason: int) -> None:
    rig.deliver("t1", call())
    rig.guest(Returned(identity(1), reason, "because"))
    assert dropped(rig) == {}
    assert told == []


def test_a_cast_whose_time_is_over(rig: Rig, told: list[str]) -> None:
    rig.deliver("t1", cast(timeout_s=3.0))
    rig.wait(3.0)
    assert dropped(rig) == {"casts_expired": 1}
    assert len(told) == 1


def test_a_cast_that_is_too_large(rig: Rig, told: list[str]) -> None:
    with pytest.raises(LimitExceeded):
        rig.deliver("t1", cast(args={"x": "x" * TOO_LARGE}))
    assert dropped(rig) == {"casts_too_large": 1}
    assert "MESSAGE_BYTES_MAX" in told[0]


def test_a_guest_s_words_are_cut(rig: Rig, told: list[str]) -> None:
    rig.deliver("t1", cast(method="m" * 250))
    rig.guest(Returned(identity(1), REFUSED, "x" * 500))
    assert len(told[0]) <= TOLD_CHARS_MAX


# -------------------------------------------------------------------- what the broker drops


def give_back(rig: Rig) -> None:
    """The VM's channel is lost, and another is opened."""
    rig.downward.released()
    rig.broker.take()


def test_what_does_not_come_again_before_what_is_new_was_dropped(rig: Rig, told: list[str]) -> None:
    for number in (1, 2, 3):
        rig.deliver(f"t{number}", cast(number))
    rig.deliver("t4", call(4, timeout_s=60.0))
    give_back(rig)
    rig.deliver("u2", cast(2), redelivered=True)
    assert rig.downward.counters["dropped_by_broker"] == 0
    rig.deliver("u5", cast(5))
    assert rig.downward.counters["dropped_by_broker"] == 2  # the call may have expired there
    assert [identity(number).hex() in "".join(told) for number in (1, 2, 3, 4, 5)] == [
        *(True, False, True, False, False)
    ]
    rig.deliver("u6", cast(6))
    assert rig.downward.counters["dropped_by_broker"] == 2
    rig.guest(Receipt(identity(1)))  # the guest had its copy, and has run it
    assert rig.downward.counters["taken"] == 1


def test_what_another_queue_hands_out_says_nothing(rig: Rig) -> None:
    rig.deliver("t1", cast(1))
    rig.deliver("t2", cast(2), fanout=True)
    give_back(rig)
    rig.deliver("u3", cast(3), B)
    assert rig.downward.counters["dropped_by_broker"] == 0
    rig.deliver("u4", cast(4), fanout=True)
    assert rig.downward.counters["dropped_by_broker"] == 1
    rig.deliver("u1", cast(1), redelivered=True)
    rig.deliver("u5", cast(5))
    assert rig.downward.counters["dropped_by_broker"] == 1


def test_what_is_over_need_not_come_again(rig: Rig) -> None:
    rig.deliver("t1", cast(1))
    give_back(rig)
    rig.guest(Receipt(identity(1)))
    rig.deliver("u2", cast(2))
    assert rig.downward.counters["dropped_by_broker"] == 0


def test_many_returns_are_warned_of(rig: Rig, told: list[str]) -> None:
    for returns in range(RETURNS_WARN + 1):
        rig.downward.delivered(
            f"t{returns}",
            cast(1),
            A,
            fanout=False,
            redelivered=bool(returns),
            returns=returns,
            now_s=rig.now_s,
        )
    assert rig.downward.counters["many_returns"] == 1
    assert f"{RETURNS_WARN} times" in told[0]


# -------------------------------------------------------------------- what breaks us


def test_what_was_put_aside_leaves_nothing(rig: Rig) -> None:
    rig.deliver("t1", cast(1))
    rig.downward.abandon(identity(1), "t1")
    rig.downward.abandon(identity(1), "t1")
    assert rig.downward.open_requests == 0
    assert rig.broker.take() == []
    rig.guest(Receipt(identity(1)))
    rig.downward.count_parked()
    rig.downward.count_undecodable()
    assert (rig.downward.counters["parked"], rig.downward.counters["undecodable"]) == (1, 1)


@pytest.mark.parametrize("timeout", [1e308, 1e-300, 10**300])
def test_any_time_that_a_caller_may_name_can_be_sent(rig: Rig, timeout: float) -> None:
    message = {"method": "m", "_timeout": timeout, "_msg_id": "m", "_reply_q": "q"}
    rig.deliver("t1", decode(json.dumps(message).encode(), expiration=None))
    (request,) = rig.said()
    assert 1 <= request.monitor_ms <= 0xFFFFFFFF


def test_exchanges_that_a_guest_s_topics_name_are_few(rig: Rig) -> None:
    topics = [Topic(f"exchange{number:02}", "t") for number in range(EXCHANGES_SEEN_MAX + 3)]
    rig.subscribe(*topics)
    # One is that of the topics it served before.
    assert len(rig.downward.topics) == EXCHANGES_SEEN_MAX - 1
    assert rig.downward.counters["topics_over_limit"] == 4
    rig.subscribe(topics[0])
    rig.subscribe(topics[-1])
    assert not rig.downward.topics
