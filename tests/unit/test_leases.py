"""Requests that wait for local programs: leases, turns, and what comes of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from vchan.gateways.leases import IDLE_S, Leased, LeaseOver, Leases, Subscriber
from vchan.rpc.in_flight import Deliver, Responder
from vchan.rpc.messages import (
    AGENT_GONE,
    CALL,
    FINAL,
    NO_AGENT,
    RELEASED,
    Receipt,
    Reply,
    Request,
    Returned,
    Topic,
    decode,
)

TOPIC = Topic("openstack", "demo")
OTHER = Topic("openstack", "other")


class Rig:
    """A leases, the responder behind it, and what was said to the daemon."""

    def __init__(self) -> None:
        self.said: list[object] = []
        self.topics: list[tuple[Topic, ...]] = []
        self.responder = Responder(lambda data, _: self.said.append(decode(data)))
        leases = count(1)
        self.leases = Leases(self.responder, lambda: f"L{next(leases)}", self.topics.append)
        self._ids = count(1)

    def ask(
        self, *, call: bool = False, topic: Topic = TOPIC, timeout_ms: int = 0, now_s: float = 0
    ) -> bytes:
        request_id = next(self._ids).to_bytes(16, "big")
        flags = CALL if call else 0
        request = Request(request_id, flags, timeout_ms, 0, *topic, "", b"{}")
        for delivery in self.responder.receive(request, now_s):
            assert isinstance(delivery, Deliver)
            self.leases.deliver(delivery, now_s)
        return request_id

    def subscriber(
        self, *topics: Topic, room: int = 16, lease_s: float = 60, now_s: float = 0
    ) -> tuple[Subscriber, list[Leased]]:
        given: list[Leased] = []
        subscriber = Subscriber(topics or (TOPIC,), lease_s, room, given.append)
        self.leases.attach(subscriber, now_s)
        return subscriber, given

    def pass_time(self, now_s: float) -> None:
        for delivery in self.responder.handle_timeout(now_s):
            self.leases.deliver(delivery, now_s)
        self.leases.handle_timeout(now_s)


@pytest.fixture
def rig() -> Iterator[Rig]:
    yield Rig()


def ids(given: list[Leased]) -> list[bytes]:
    return [leased.request.id for leased in given]


# --- giving


def test_what_waits_is_given_in_order_as_far_as_there_is_room(rig: Rig) -> None:
    asked = [rig.ask() for _ in range(3)]
    _, given = rig.subscriber(room=2)
    assert ids(given) == asked[:2]
    rig.leases.acknowledge(given[0].lease, 1)
    assert ids(given) == asked
    assert rig.said == [Receipt(asked[0])]


def test_receivers_take_turns(rig: Rig) -> None:
    _, first = rig.subscriber()
    _, second = rig.subscriber()
    asked = [rig.ask() for _ in range(4)]
    assert sorted(ids(first) + ids(second)) == asked
    assert len(first) == len(second) == 2


def test_a_slow_receiver_gets_nothing_more_until_it_reads(rig: Rig) -> None:
    subscriber, given = rig.subscriber()
    subscriber.is_slow = True
    asked = rig.ask()
    assert given == []
    subscriber.is_slow = False
    rig.leases.has_room(subscriber, 1)
    assert ids(given) == [asked]


def test_who_receives_no_such_topic_gets_nothing(rig: Rig) -> None:
    _, given = rig.subscriber(OTHER)
    rig.ask()
    assert given == []


def test_room_is_shared_among_topics(rig: Rig) -> None:
    _, given = rig.subscriber(TOPIC, OTHER, room=1)
    first, second = rig.ask(), rig.ask(topic=OTHER)
    assert ids(given) == [first]
    rig.leases.acknowledge(given[0].lease, 1)
    assert ids(given) == [first, second]


# --- casts


def test_a_cast_whose_lease_ends_goes_to_the_next_before_what_came_after(rig: Rig) -> None:
    asked = [rig.ask() for _ in range(3)]
    subscriber, given = rig.subscriber(lease_s=5)
    rig.leases.detach(subscriber, 1)
    _, later = rig.subscriber(now_s=2)
    rig.pass_time(4.9)
    assert later == []
    rig.pass_time(5.0)
    assert ids(later) == asked
    assert {leased.deliveries for leased in later} == {2}
    assert rig.said == []  # nobody has run anything
    with pytest.raises(LeaseOver):
        rig.leases.acknowledge(given[0].lease, 6)
    for leased in later:
        rig.leases.acknowledge(leased.lease, 6)
    assert rig.said == [Receipt(request_id) for request_id in asked]


def test_a_cast_is_acknowledged_once(rig: Rig) -> None:
    rig.ask()
    _, given = rig.subscriber()
    rig.leases.acknowledge(given[0].lease, 1)
    with pytest.raises(LeaseOver):
        rig.leases.acknowledge(given[0].lease, 2)
    assert len(rig.said) == 1


def test_a_released_cast_is_given_again_at_once(rig: Rig) -> None:
    first, second = rig.ask(), rig.ask()
    _, given = rig.subscriber(room=1)
    rig.leases.release(given[0].lease, 1)
    assert ids(given) == [first, first]
    rig.leases.acknowledge(given[1].lease, 2)
    assert ids(given) == [first, first, second]


def test_a_heartbeat_prolongs_a_lease(rig: Rig) -> None:
    rig.ask()
    _, given = rig.subscriber(lease_s=5)
    assert rig.leases.heartbeat(given[0].lease, 4) == 5
    rig.pass_time(8.9)
    assert len(given) == 1
    rig.pass_time(9.0)
    assert len(given) == 2


# --- calls


def test_a_call_is_answered(rig: Rig) -> None:
    asked = rig.ask(call=True)
    _, given = rig.subscriber()
    rig.leases.acknowledge(given[0].lease, 1)
    rig.leases.heartbeat(given[0].lease, 2)
    rig.leases.reply(given[0].lease, b"7", failed=False, now_s=3)
    assert rig.said == [Reply(asked, 0, b""), Reply(asked, FINAL, b"7")]
    with pytest.raises(LeaseOver):
        rig.leases.reply(given[0].lease, b"8", failed=False, now_s=4)


def test_a_call_whose_lease_ends_fails_and_is_given_to_nobody_else(rig: Rig) -> None:
    asked = rig.ask(call=True)
    _, given = rig.subscriber(lease_s=5)
    rig.pass_time(5)
    assert len(given) == 1
    (returned,) = rig.said
    assert isinstance(returned, Returned)
    assert (returned.id, returned.reason) == (asked, AGENT_GONE)
    with pytest.raises(LeaseOver):
        rig.leases.reply(given[0].lease, b"7", failed=False, now_s=6)


def test_a_call_that_has_not_begun_can_be_released(rig: Rig) -> None:
    asked = rig.ask(call=True)
    _, given = rig.subscriber()
    rig.leases.release(given[0].lease, 1)
    assert ids(given) == [asked, asked]


def test_a_call_that_nobody_waits_for_any_more_must_not_begin(rig: Rig) -> None:
    rig.ask(call=True, timeout_ms=2000)
    rig.ask(call=True, timeout_ms=2000)
    _, given = rig.subscriber(room=1)
    assert given[0].left_ms == 2000
    rig.pass_time(2.5)
    with pytest.raises(LeaseOver):
        rig.leases.acknowledge(given[0].lease, 3)
    assert len(given) == 1  # the other was withdrawn before it was given


# --- subscribers and the daemon come and go


def test_topics_are_served_while_somebody_receives_and_a_little_longer(rig: Rig) -> None:
    subscriber, _ = rig.subscriber(TOPIC, OTHER)
    assert rig.topics == [(TOPIC, OTHER)]
    again, _ = rig.subscriber(OTHER)
    rig.leases.detach(subscriber, 1)
    rig.leases.detach(subscriber, 1)
    asked = rig.ask(call=True)
    rig.pass_time(1 + IDLE_S - 0.1)
    assert rig.leases.topics == (TOPIC, OTHER)
    rig.pass_time(1 + IDLE_S)
    assert rig.topics[-1] == (OTHER,)
    (returned,) = rig.said
    assert isinstance(returned, Returned)
    assert (returned.id, returned.reason) == (asked, NO_AGENT)
    rig.leases.detach(again, 20)
    rig.subscriber(OTHER, now_s=21)
    rig.pass_time(20 + 2 * IDLE_S)
    assert rig.topics[-1] == (OTHER,)


def test_a_lost_daemon_hands_out_again_what_nobody_acknowledged(rig: Rig) -> None:
    """Casts go back; of calls the daemon asks for the answer."""
    _, given = rig.subscriber(room=2)
    cast, call = rig.ask(), rig.ask(call=True)
    waiting_cast, waiting_call = rig.ask(), rig.ask(call=True)
    rig.leases.lost()
    assert {said.id for said in rig.said if isinstance(said, Returned)} == {cast, waiting_cast}
    assert {said.reason for said in rig.said if isinstance(said, Returned)} == {RELEASED}
    with pytest.raises(LeaseOver):
        rig.leases.acknowledge(given[0].lease, 1)
    rig.leases.reply(given[1].lease, b"7", failed=False, now_s=1)
    assert rig.said[-1] == Reply(call, FINAL, b"7")
    assert ids(given)[-1] == waiting_call


def test_when_to_look(rig: Rig) -> None:
    assert rig.leases.next_timeout() is None
    rig.ask()
    subscriber, _ = rig.subscriber(lease_s=30, now_s=1)
    assert rig.leases.next_timeout() == 31
    rig.leases.detach(subscriber, 2)
    assert rig.leases.next_timeout() == 2 + IDLE_S
    assert rig.leases.summary()["leases"] == 1
