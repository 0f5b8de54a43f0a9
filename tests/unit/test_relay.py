"""A VM's relay: what it tells the broker and the guest, and when."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest

from tests.rig.gates import OpenGate, offer_nothing
from vchan import errors
from vchan.errors import LimitExceeded, Rejected
from vchan.exchange import Answered, HandedBack, Heartbeat, Outcome, Overdue, Taken
from vchan.guest.router import OWN_EXCHANGE, OWN_TOPIC
from vchan.host.broker_events import Publication
from vchan.host.envelope import BrokerRequest
from vchan.host.relay import (
    _REASONS,
    GUEST_TOPIC,
    LOCAL_REQUESTS_MAX,
    OPEN_BYTES_MAX,
    REPLY_KEPT_S,
    RETRY_S,
    SETTLE_S,
    SUBSCRIBE_S,
    TOPICS_JUDGED_PER_S,
    TOPICS_SEEN_MAX,
    Relay,
)
from vchan.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FAILURE,
    FANOUT,
    FINAL,
    NO_AGENT,
    REDELIVERED,
    REFUSED,
    RELEASED,
    SUBSCRIBE_BYTES_MAX,
    TOPICS_MAX,
    Cancel,
    Holding,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    decode,
    encode,
)

VM = "b1b1f4b2-0000-4000-8000-000000000001"
A, B, FORBIDDEN = Topic("nova", "a"), Topic("nova", "b"), Topic("nova", "forbidden")
TOO_LARGE = 1000


class FakeBroker:
    """Notes what it is asked, as tuples; `take` hands them over."""

    def __init__(self) -> None:
        self._asked: list[tuple[Any, ...]] = []
        self.replies: list[dict[str, Any]] = []
        self.publications: list[Publication] = []
        self.listens = 0

    def consume(self, vm: str, topics: frozenset[Topic]) -> None:
        assert vm == VM
        self._asked.append(("consume", *sorted(topics)))

    def release(self, vm: str) -> None:
        assert vm == VM
        self._asked.append(("release",))

    def ack(self, token: Hashable) -> None:
        self._asked.append(("ack", token))

    def publish_reply(self, reply_q: str, body: bytes, key: bytes) -> None:
        self._asked.append(("publish", reply_q, key))
        self.replies.append(json.loads(json.loads(body)["oslo.message"]))

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        assert vm == VM
        self._asked.append(("publish_request", request_id, publication.form))
        self.publications.append(publication)

    def listen_for_answers(self, vm: str) -> None:
        assert vm == VM
        self.listens += 1

    def barrier(self, vm: str, token: Hashable, ids: tuple[bytes, ...]) -> None:
        assert vm == VM
        self._asked.append(("barrier", token, *ids))

    def take(self) -> list[tuple[Any, ...]]:
        asked, self._asked = self._asked, []
        return asked


class Rig:
    """A relay between a fake broker and a guest that is a list of messages."""

    def __init__(self, *, with_broker: bool = True) -> None:
        self.now_s = 1000.0
        self.too_large = TOO_LARGE
        self.unread = 0
        self._said: list[Any] = []
        self.broker = FakeBroker()
        self.gate = OpenGate(lambda topic: topic != FORBIDDEN, may_send=False)
        self.relay = Relay(
            VM,
            self._send,
            self.broker if with_broker else None,
            self.gate,
            frozenset({"request_id"}),
            offer_nothing,
            unread=lambda: self.unread,
        )
        self.relay.opened(resumed=False, now_s=self.now_s)

    def _send(self, data: bytes, stream: int) -> None:
        assert stream >= 0
        if len(data) > self.too_large:
            raise LimitExceeded("message", len(data), self.too_large, "MESSAGE_BYTES_MAX")
        self._said.append(decode(data))

    def said(self) -> list[Any]:
        """What the guest was told since the last time."""
        said, self._said = self._said, []
        return said

    def guest(self, message: Any) -> None:
        self.relay.receive(encode(message), self.now_s)

    def subscribe(self, *topics: Topic) -> None:
        self.guest(Subscribe(topics))

    def serve(self, *topics: Topic) -> None:
        """The guest serves these, and the broker has said that what was before is gone."""
        self.subscribe(*topics)
        self.relay.released()
        self.broker.take()
        self.wait(SUBSCRIBE_S)

    def deliver(
        self,
        token: Hashable,
        origin: BrokerRequest,
        topic: Topic = A,
        *,
        fanout: bool = False,
        redelivered: bool = False,
    ) -> None:
        self.relay.delivered(
            token, origin, topic, fanout=fanout, redelivered=redelivered, now_s=self.now_s
        )

    def published(self, key: bytes, *, ok: bool = True, gone: bool = False) -> None:
        self.relay.published(key, ok=ok, gone=gone, now_s=self.now_s)

    def wait(self, for_s: float) -> None:
        self.now_s += for_s
        self.relay.handle_timeout(self.now_s)

    def local(self, number: int = 1, **fields: Any) -> list[Outcome]:
        """A local program's call. What it is told is added to the list."""
        told: list[Outcome] = []
        request = Request(identity(number), CALL, 0, 0, "nova", "a", VM, b"{}")
        self.relay.submit_local(request._replace(**fields), told.append, self.now_s)
        return told


def identity(number: int) -> bytes:
    return number.to_bytes(16)


def cast(number: int = 1, **fields: Any) -> BrokerRequest:
    origin = BrokerRequest(
        id=identity(number),
        method="m",
        args={},
        namespace=None,
        version=None,
        context={"request_id": "req-1", "auth_token": "secret"},
        msg_id=None,
        reply_q=None,
        monitor_timeout_s=None,
        timeout_s=None,
    )
    return replace(origin, **fields)


def call(number: int = 1, **fields: Any) -> BrokerRequest:
    return cast(number, **{"msg_id": f"msg-{number}", "reply_q": "reply_x", **fields})


def reply(number: int = 1, body: bytes = b"42", flags: int = FINAL) -> Reply:
    return Reply(identity(number), flags, body)


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.serve(A, B)
    return rig


# -------------------------------------------------------------------- casts and calls


def test_a_cast_is_acknowledged_when_the_guest_has_taken_it(rig: Rig) -> None:
    rig.deliver("t1", cast())
    (request,) = rig.said()
    assert (request.id, request.flags, request.topic, request.server) == (identity(1), 0, "a", VM)
    assert json.loads(request.body)["context"] == {"request_id": "req-1"}
    assert rig.broker.take() == []
    assert rig.relay.open_requests == 1

    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == [("ack", "t1")]
    assert rig.relay.open_requests == 0
    assert rig.relay.counters["taken"] == 1


def test_a_call_is_acknowledged_when_its_reply_is_published(rig: Rig) -> None:
    rig.deliver("t1", call())
    assert rig.said()[0].is_call
    rig.guest(reply())
    assert rig.broker.take() == [("publish", "reply_x", identity(1))]
    assert rig.broker.replies == [
        {"result": 42, "failure": None, "ending": True, "_msg_id": "msg-1"}
    ]
    rig.published(identity(1))
    assert rig.broker.take() == [("ack", "t1")]
    rig.published(identity(1))  # once more: nothing
    assert rig.broker.take() == []


def test_a_failure_reaches_the_caller(rig: Rig) -> None:
    rig.deliver("t1", call())
    failure = {"class": "ValueError", "module": "builtins", "message": "no"}
    rig.guest(reply(body=json.dumps(failure).encode(), flags=FINAL | FAILURE))
    assert json.loads(rig.broker.replies[0]["failure"]) == failure


def test_an_answer_that_is_none_is_a_bad_reply(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.guest(reply(body=b"no JSON"))
    failure = json.loads(rig.broker.replies[0]["failure"])
    assert failure["module"] == "vchan.errors"
    assert issubclass(getattr(errors, failure["class"]), errors.RequestError)


def test_every_reason_has_its_exception() -> None:
    assert all(issubclass(getattr(errors, name), errors.RequestError) for name in _REASONS.values())


def test_a_heartbeat_reaches_the_caller(rig: Rig) -> None:
    rig.deliver("t1", call(monitor_timeout_s=5.0))
    assert rig.said()[0].monitor_ms == 5000
    rig.guest(reply(flags=0, body=b""))
    assert rig.broker.take() == [("publish", "reply_x", b"")]
    assert rig.broker.replies[0]["ending"] is False
    for _ in range(10):  # a guest may send them at will
        rig.guest(reply(flags=0, body=b""))
    assert rig.broker.take() == []
    rig.published(b"")  # of a heartbeat nobody wants to know
    assert rig.broker.take() == []
    assert rig.relay.open_requests == 1


def test_answers_to_nothing_are_ignored(rig: Rig) -> None:
    rig.deliver("t1", cast(1))
    rig.guest(reply(1))  # an answer to a cast
    rig.guest(reply(2))
    rig.guest(Receipt(identity(3)))
    assert rig.broker.take() == []
    assert rig.relay.open_requests == 1


def test_flags_and_times_travel_with_the_request(rig: Rig) -> None:
    rig.deliver("t1", cast(1, timeout_s=2.5), B, fanout=True, redelivered=True)
    rig.deliver("t2", cast(2, timeout_s=0.0001, monitor_timeout_s=1e9))
    first, second = rig.said()
    assert (first.flags, first.timeout_ms, first.topic) == (FANOUT | REDELIVERED, 2500, "b")
    assert (second.timeout_ms, second.monitor_ms) == (1, 0xFFFFFFFF)


# -------------------------------------------------------------------- replies not confirmed


def test_a_reply_that_was_not_published_is_published_again(rig: Rig) -> None:
    for number in (1, 2, 3):
        rig.deliver(f"t{number}", call(number))
    rig.guest(reply(1))
    rig.guest(reply(2))
    rig.broker.take()
    rig.published(identity(1), ok=False)
    rig.published(identity(2), ok=False)
    assert rig.relay.next_timeout() == rig.now_s + RETRY_S
    rig.wait(RETRY_S / 2)
    assert rig.broker.take() == []
    rig.wait(RETRY_S / 2)
    assert rig.broker.take() == [
        ("publish", "reply_x", identity(1)),
        ("publish", "reply_x", identity(2)),
    ]
    assert rig.broker.replies[0] == rig.broker.replies[2]
    rig.published(identity(1))
    assert rig.broker.take() == [("ack", "t1")]


def test_what_is_being_published_is_not_published_twice(rig: Rig) -> None:
    rig.deliver("t1", call(1))
    rig.deliver("t2", call(2))
    rig.guest(reply(1))
    rig.published(identity(1), ok=False)
    rig.guest(reply(2))
    rig.broker.take()
    rig.wait(RETRY_S)
    assert rig.broker.take() == [("publish", "reply_x", identity(1))]


def test_a_reply_in_hand_answers_the_request_that_comes_again(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.guest(reply())
    rig.relay.released()
    rig.broker.take()
    rig.deliver("t2", call(), redelivered=True)
    assert rig.broker.take() == []  # it is under way already
    rig.published(identity(1))
    assert rig.broker.take() == [("ack", "t2")]
    assert rig.relay.open_requests == 0


def test_a_reply_in_hand_is_published_though_the_broker_lost_the_request(rig: Rig) -> None:
    """A broker that restarts forgets queues that are not durable; the caller waits all the same."""
    rig.deliver("t1", call(1))
    rig.deliver("t2", call(2))
    rig.guest(reply(1))
    rig.relay.released()
    rig.guest(reply(2))
    rig.broker.take()
    rig.published(identity(1), ok=False)
    rig.published(identity(2))
    rig.wait(RETRY_S)
    assert rig.broker.take() == [("publish", "reply_x", identity(1))]
    rig.published(identity(1))
    assert rig.relay.open_requests == 0
    assert rig.broker.take() == []  # nothing to ack


@pytest.mark.parametrize("gone", [True, False])
def test_a_reply_that_cannot_be_published_is_given_up_in_the_end(rig: Rig, gone: bool) -> None:
    rig.deliver("t1", call())
    rig.guest(reply())
    if not gone:
        rig.relay.released()
    tries = 0
    while rig.relay.open_requests:
        tries += 1
        rig.published(identity(1), ok=False, gone=gone)
        rig.wait(RETRY_S)
    assert tries == REPLY_KEPT_S / RETRY_S + 1
    assert rig.relay.counters["replies_given_up"] == 1
    assert (("ack", "t1") in rig.broker.take()) == gone


def test_while_the_broker_is_away_a_reply_to_a_request_it_keeps_is_never_given_up(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.guest(reply())
    for _ in range(int(2 * REPLY_KEPT_S / RETRY_S)):
        rig.published(identity(1), ok=False)
        rig.wait(RETRY_S)
    assert rig.relay.open_requests == 1


# -------------------------------------------------------------------- redelivery and release


def test_every_copy_is_acknowledged(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.deliver("t2", cast(), redelivered=True)
    assert len(rig.said()) == 1
    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == [("ack", "t1"), ("ack", "t2")]
    assert (rig.relay.counters["requests"], rig.relay.counters["redelivered"]) == (1, 1)


def test_a_redelivery_after_release_goes_on_where_it_was(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.relay.released()
    rig.deliver("t2", cast(), redelivered=True)
    assert len(rig.said()) == 1  # the guest has it
    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == [("ack", "t2")]


def test_deliveries_of_another_topic_or_a_channel_that_is_gone_are_ignored(rig: Rig) -> None:
    rig.deliver("t1", cast(1), Topic("nova", "c"))
    rig.relay.suspend()
    rig.deliver("t2", cast(2))
    rig.wait(SUBSCRIBE_S)
    rig.relay.opened(resumed=True, now_s=rig.now_s)
    rig.deliver("t3", cast(3))  # Released has not come: this is older
    assert rig.said() == []
    rig.relay.released()
    rig.deliver("t4", cast(4))
    assert [request.id for request in rig.said()] == [identity(4)]


# -------------------------------------------------------------------- settling


def test_ids_are_settled_when_the_broker_has_proved_it(rig: Rig) -> None:
    for number in (1, 2):
        rig.deliver(f"t{number}", cast(number))
        rig.guest(Receipt(identity(number)))
        rig.now_s += 0.1
    rig.said()
    rig.broker.take()
    rig.wait(SETTLE_S - 0.2)
    assert rig.broker.take() == [("barrier", "t2", identity(1), identity(2))]
    assert rig.said() == []
    rig.relay.settled((identity(1), identity(2)))
    assert rig.said() == [Settled((identity(1), identity(2)))]
    rig.wait(SETTLE_S)
    assert rig.broker.take() == []


def test_nothing_is_settled_that_was_acknowledged_on_a_lost_channel(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.guest(Receipt(identity(1)))
    rig.broker.take()
    rig.relay.released()
    assert rig.relay.next_timeout() is None
    rig.wait(SETTLE_S)
    assert rig.broker.take() == []


# -------------------------------------------------------------------- handed back


@pytest.mark.parametrize("reason", [NO_AGENT, AGENT_GONE, BUSY, REFUSED, RELEASED])
def test_a_call_that_is_handed_back_fails(rig: Rig, reason: int) -> None:
    rig.deliver("t1", call())
    rig.guest(Returned(identity(1), reason, "why"))
    failure = json.loads(rig.broker.replies[0]["failure"])
    assert (failure["class"], failure["message"]) == (_REASONS.get(reason, "Rejected"), "why")
    rig.published(identity(1))
    assert ("ack", "t1") in rig.broker.take()
    assert rig.relay.counters["handed_back"] == 1


@pytest.mark.parametrize("reason", [NO_AGENT, BUSY])
def test_a_cast_nobody_can_take_now_keeps_its_place_in_the_queue(rig: Rig, reason: int) -> None:
    for number in (1, 2, 3):
        rig.deliver(f"t{number}", cast(number))
    rig.guest(Returned(identity(1), reason, "why"))
    rig.guest(Returned(identity(2), reason, "why"))
    assert rig.broker.take() == [("release",)]
    assert rig.relay.open_requests == 1  # the third: the guest has it
    rig.relay.released()
    rig.wait(RETRY_S / 2)
    assert rig.broker.take() == []
    rig.wait(RETRY_S / 2)
    assert rig.broker.take() == [("consume", A, B)]
    rig.deliver("t4", cast(1), redelivered=True)
    assert rig.said()[-1].id == identity(1)


@pytest.mark.parametrize("reason", [EXPIRED, AGENT_GONE, REFUSED])
def test_a_cast_that_can_never_run_is_dropped(rig: Rig, reason: int) -> None:
    rig.deliver("t1", cast())
    rig.guest(Returned(identity(1), reason, "why"))
    assert rig.broker.take() == [("ack", "t1")]


def test_an_expired_call_is_dropped(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.guest(Returned(identity(1), EXPIRED, "too late"))
    assert rig.broker.take() == [("ack", "t1")]
    assert rig.broker.replies == []


def test_what_is_overdue_is_dropped(rig: Rig) -> None:
    rig.deliver("t1", call(timeout_s=3.0))
    rig.said()
    assert rig.relay.next_timeout() == rig.now_s + 3.0
    rig.wait(3.0)
    assert rig.said() == [Cancel(identity(1))]
    assert rig.broker.take() == [("ack", "t1")]
    assert rig.relay.counters["expired"] == 1


def test_what_the_guest_cannot_take_fails_and_is_acknowledged(rig: Rig) -> None:
    big = {"x": "x" * TOO_LARGE}
    with pytest.raises(LimitExceeded):
        rig.deliver("t1", cast(1, args=big))
    assert rig.broker.take() == [("ack", "t1")]
    with pytest.raises(LimitExceeded):
        rig.deliver("t2", call(2, args=big))
    assert rig.broker.take() == [("publish", "reply_x", identity(2))]
    assert json.loads(rig.broker.replies[0]["failure"])["class"] == "LimitExceeded"
    rig.published(identity(2))
    assert rig.broker.take() == [("ack", "t2")]
    assert rig.relay.open_requests == 0


# -------------------------------------------------------------------- topics


def test_what_the_guests_daemon_serves_itself_is_not_denied_to_its_agents(rig: Rig) -> None:
    assert (GUEST_TOPIC.exchange, GUEST_TOPIC.name) == (OWN_EXCHANGE, OWN_TOPIC)
    rig.gate.may_listen = lambda topic: topic == A
    rig.subscribe(A, GUEST_TOPIC, FORBIDDEN)
    rig.wait(SUBSCRIBE_S)
    assert rig.relay.topics == {A}
    assert rig.relay.denied == {FORBIDDEN}
    assert rig.relay.summary()["denied_topics"] == ["nova/forbidden"]


def test_the_first_topics_are_consumed_at_once() -> None:
    """After a release: what an earlier relay of this VM was given may still be on its way."""
    rig = Rig()
    rig.subscribe(A, FORBIDDEN)
    assert rig.broker.take() == [("release",), ("consume", A)]
    assert rig.relay.topics == {A}
    assert rig.relay.denied == {FORBIDDEN}
    rig.deliver("old", cast(1))
    rig.relay.released()
    rig.deliver("t1", cast(2))
    assert [request.id for request in rig.said()] == [identity(2)]


def test_a_guest_that_serves_nothing_has_no_consumer() -> None:
    rig = Rig()
    rig.subscribe()
    assert rig.broker.take() == [("release",)]


def test_the_consumers_change_once_a_second_and_the_last_word_counts() -> None:
    rig = Rig()
    rig.subscribe(A)
    began_s = rig.now_s
    rig.broker.take()
    for _ in range(10):
        rig.now_s += 0.05
        rig.subscribe()
        rig.subscribe(A, B)
    assert rig.broker.take() == []
    assert rig.relay.topics == {A, B}
    assert rig.relay.next_timeout() == began_s + SUBSCRIBE_S
    rig.now_s = began_s
    rig.wait(SUBSCRIBE_S)
    assert rig.broker.take() == [("consume", A, B)]
    rig.now_s += SUBSCRIBE_S
    rig.subscribe(B)
    assert rig.broker.take() == [("consume", B)]


def test_a_change_that_is_taken_back_in_time_is_none() -> None:
    rig = Rig()
    rig.subscribe(A)
    rig.broker.take()
    rig.relay.released()
    rig.subscribe()
    rig.deliver("t1", cast())  # the broker knows nothing of it: neither does this delivery
    rig.subscribe(A)
    assert rig.relay.next_timeout() is None
    rig.wait(SUBSCRIBE_S)
    assert rig.broker.take() == []
    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == [("ack", "t1")]


def test_a_cast_handed_back_while_a_change_waits_is_handed_back(rig: Rig) -> None:
    rig.subscribe(A)
    rig.subscribe(A, B)
    rig.deliver("t1", cast(1), A)
    rig.broker.take()
    rig.guest(Returned(identity(1), NO_AGENT, "why"))
    assert rig.broker.take() == [("release",)]
    rig.wait(RETRY_S)
    assert rig.broker.take() == [("consume", A, B)]


def test_new_topics_end_the_pause_after_a_cast_was_handed_back(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.guest(Returned(identity(1), NO_AGENT, "why"))
    rig.broker.take()
    rig.subscribe(A)
    assert rig.broker.take() == [("consume", A)]
    assert rig.relay.next_timeout() is None


def test_a_guest_serves_so_many_topics_in_its_life() -> None:
    rig = Rig()
    every = [Topic("x", f"t{number:04}") for number in range(TOPICS_SEEN_MAX + 2)]
    for at in range(0, TOPICS_SEEN_MAX, TOPICS_MAX):
        rig.serve(*every[at : at + TOPICS_MAX])
    assert rig.relay.counters["topics_over_limit"] == 0
    rig.subscribe(every[0], *every[-2:])
    assert rig.broker.take() == [("consume", every[0])]  # seen before
    assert rig.relay.denied == set(every[-2:])
    summary = rig.relay.summary()
    assert summary["topics_over_limit"] == 2
    assert summary["denied_topics"] == ["x/t0256", "x/t0257"]
    rig.subscribe(FORBIDDEN)
    assert rig.relay.counters["topics_over_limit"] == 2


def test_a_vm_serves_as_many_topics_as_its_limit_says(rig: Rig) -> None:
    rig.gate.topics_max = 2
    rig.now_s += SUBSCRIBE_S
    rig.subscribe(FORBIDDEN, A, B, Topic("x", "over"))
    assert rig.relay.topics == {A, B}
    assert Topic("x", "over") in rig.relay.denied
    assert rig.relay.counters["topics_over_limit"] == 1


LARGE = OPEN_BYTES_MAX // 4


def large(number: int) -> BrokerRequest:
    return cast(number, args={"x": "y" * (LARGE - 200)})


@pytest.fixture
def roomy(rig: Rig) -> Rig:
    rig.too_large = OPEN_BYTES_MAX
    return rig


def test_what_a_guest_does_not_read_the_broker_keeps(roomy: Rig) -> None:
    rig = roomy
    for number in range(1, 5):
        rig.deliver(f"t{number}", large(number))
    assert rig.broker.take() == []
    rig.deliver("t5", large(5))
    assert rig.broker.take() == [("release",)]
    rig.deliver("t6", cast(6))  # on its way already: it must not overtake
    rig.relay.released()
    rig.subscribe(A)
    rig.relay.opened(resumed=True, now_s=rig.now_s)
    rig.wait(60.0)
    rig.guest(Receipt(identity(1)))
    rig.wait(10.0)
    assert rig.broker.take() == []
    rig.guest(Receipt(identity(2)))
    rig.wait(SUBSCRIBE_S)
    assert rig.broker.take() == [("consume", A)]  # it has said so since
    assert [each.id for each in rig.said() if isinstance(each, Request)] == [
        identity(number) for number in range(1, 5)
    ]
    rig.deliver("t3b", large(3))  # again, as all that was not acknowledged
    rig.deliver("t5b", large(5))
    (again,) = [each for each in rig.said() if isinstance(each, Request)]
    assert again.id == identity(5)
    assert rig.relay.counters["held_up"] == 1


def test_programs_are_refused_what_has_no_room(roomy: Rig) -> None:
    rig = roomy
    for number in range(1, 5):
        rig.local(number, body=b"x" * LARGE)
    with pytest.raises(LimitExceeded, match="OPEN_BYTES_MAX"):
        rig.local(5)
    assert rig.relay.summary()["open_bytes"] == OPEN_BYTES_MAX
    rig.relay.cancel_local(identity(1))
    rig.local(5)
    rig.relay.release("gone")
    assert rig.relay.summary()["open_bytes"] == 0


def test_requests_whose_time_is_up_count_until_the_guest_has_read_them(rig: Rig) -> None:
    rig.unread = OPEN_BYTES_MAX - 1
    rig.deliver("t1", call(1, timeout_s=1.0))
    assert rig.broker.take() == [("release",)]
    with pytest.raises(LimitExceeded, match="OPEN_BYTES_MAX"):
        rig.local(2)
    rig.relay.released()
    rig.wait(60.0)
    assert rig.broker.take() == []
    rig.unread = OPEN_BYTES_MAX // 2
    rig.wait(RETRY_S)
    assert rig.broker.take() == [("consume", A, B)]
    rig.local(3)


def test_answers_that_are_not_published_count(roomy: Rig) -> None:
    rig = roomy
    for number in range(1, 6):
        rig.deliver(f"t{number}", call(number))
    for number in range(1, 6):
        rig.guest(Reply(identity(number), FINAL, b'"' + b"x" * (LARGE - 1000) + b'"'))
    assert rig.relay.summary()["open_bytes"] > OPEN_BYTES_MAX
    rig.broker.take()
    rig.deliver("t6", call(6))
    assert rig.broker.take() == [("release",)]
    for number in range(1, 6):
        rig.relay.published(identity(number), ok=True, now_s=rig.now_s)
    assert rig.relay.summary()["open_bytes"] == 0
    rig.wait(SUBSCRIBE_S)
    assert ("consume", A, B) in rig.broker.take()


def many(name: str) -> list[Topic]:
    return [Topic("x", f"{name}{number:02}") for number in range(TOPICS_MAX)]


class Judging:
    """A gate that notes what it was asked."""

    def __init__(self, rig: Rig) -> None:
        self.topics: list[Topic] = []
        self._may_listen = rig.gate.may_listen
        rig.gate.may_listen = self._note

    def _note(self, topic: Topic) -> bool:
        self.topics.append(topic)
        return self._may_listen(topic)

    def take(self) -> list[Topic]:
        topics, self.topics = self.topics, []
        return topics


def test_topics_are_judged_at_their_rate_and_the_last_word_counts() -> None:
    rig = Rig()
    judging = Judging(rig)
    for number in range(100):
        rig.subscribe(*many(f"a{number}-"))
    judged = judging.take()
    assert TOPICS_JUDGED_PER_S <= len(judged) <= TOPICS_JUDGED_PER_S + TOPICS_MAX
    rig.wait(1.0)
    rig.subscribe(*many("last"))
    rig.wait(1.0)
    assert judging.take()[-TOPICS_MAX:] == many("last")
    assert rig.relay.denied | rig.relay.topics == set(many("last"))
    rig.wait(60.0)
    assert judging.take() == []
    began_s = rig.now_s
    for number in range(1000):
        rig.subscribe(*many(f"b{number}-"))
        rig.wait(0.01)
    most = TOPICS_JUDGED_PER_S * (1 + rig.now_s - began_s) + TOPICS_MAX
    assert len(judging.take()) <= most


def test_a_topic_that_stays_is_not_judged_again_until_something_changes(rig: Rig) -> None:
    judging = Judging(rig)
    rig.subscribe(A, B)
    rig.subscribe(A, B, FORBIDDEN)
    assert judging.take() == [FORBIDDEN]
    rig.subscribe(A, FORBIDDEN)
    assert judging.take() == []
    rig.subscribe(A, B, FORBIDDEN)
    assert judging.take() == [B]  # it was gone
    rig.relay.policy_changed(rig.now_s)
    assert sorted(judging.take()) == sorted([A, B, FORBIDDEN])
    rig.relay.opened(resumed=False, now_s=rig.now_s)
    rig.subscribe(A, B, FORBIDDEN)
    assert judging.take() == [A, B, FORBIDDEN]


def test_the_same_topics_again_cost_nothing_and_end_a_pause(rig: Rig) -> None:
    rig.subscribe(A)
    rig.now_s += SUBSCRIBE_S
    judging = Judging(rig)
    rig.deliver("t1", cast())
    rig.guest(Returned(identity(1), NO_AGENT, "why"))
    rig.broker.take()
    rig.subscribe(A)
    assert judging.take() == []
    assert rig.broker.take() == [("consume", A)]


def test_exceptions_of_modules_that_may_not_pass_are_text(rig: Rig) -> None:
    rig.gate.may_raise = lambda module: module != "os"  # type: ignore[method-assign]
    for number, module in enumerate(("os", "fine"), 1):
        rig.deliver(f"t{number}", call(number))
        failure = {"class": "E", "module": module, "message": "no"}
        rig.guest(Reply(identity(number), FINAL | FAILURE, json.dumps(failure).encode()))
    failures = [json.loads(reply["failure"]) for reply in rig.broker.replies]
    assert [failure["module"] for failure in failures] == ["vchan.guest.raised", "fine"]


def test_an_answer_of_too_many_values_is_a_failure(rig: Rig) -> None:
    rig.gate.values_max = 100
    rig.deliver("t1", call())
    rig.guest(reply(body=json.dumps([0] * 200).encode()))
    (answer,) = rig.broker.replies
    assert "the agent's reply has over 100 values (json_values)" in answer["failure"]


# -------------------------------------------------------------------- suspend, opened, release


def test_suspend_hands_back_and_opened_goes_on(rig: Rig) -> None:
    rig.deliver("t1", cast(1))
    rig.deliver("t2", cast(2))
    rig.relay.suspend()
    rig.relay.suspend()
    assert rig.broker.take() == [("release",)]
    rig.guest(Receipt(identity(1)))  # it counts; there is no token to acknowledge
    rig.guest(Returned(identity(2), NO_AGENT, "why"))  # the broker has it already
    rig.subscribe(B)
    rig.wait(2 * RETRY_S)
    assert rig.broker.take() == []
    assert rig.relay.open_requests == 0

    rig.relay.opened(resumed=True, now_s=rig.now_s)
    assert rig.broker.take() == [("consume", B)]
    rig.relay.opened(resumed=True, now_s=rig.now_s)
    assert rig.broker.take() == []


def test_suspend_calls_off_what_was_to_be_consumed(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.guest(Returned(identity(1), BUSY, "why"))
    rig.relay.suspend()
    rig.broker.take()
    rig.wait(RETRY_S)
    assert rig.broker.take() == []


def test_a_new_session_is_told_again_and_says_its_topics(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.said()
    rig.relay.suspend()
    rig.relay.opened(resumed=False, now_s=rig.now_s)
    (request,) = rig.said()
    assert (request.id, request.flags) == (identity(1), REDELIVERED)
    assert rig.broker.take() == [("release",)]
    rig.subscribe(A)
    assert rig.broker.take() == [("consume", A)]


def test_release_gives_everything_back(rig: Rig) -> None:
    rig.deliver("t1", call(1))
    told = rig.local(2)
    rig.relay.release("the VM has gone")
    assert rig.broker.take() == [("release",)]
    assert told == [HandedBack(identity(2), RELEASED, "the VM has gone")]
    assert rig.relay.open_requests == 0
    assert rig.relay.topics == rig.relay.denied == frozenset()
    assert rig.relay.next_timeout() is None
    rig.local(2)  # and there is room again


# -------------------------------------------------------------------- local programs


def test_a_local_call(rig: Rig) -> None:
    told = rig.local(1)
    assert rig.said()[0].id == identity(1)
    rig.guest(reply(flags=0))
    rig.guest(reply())
    rig.guest(reply())
    assert told == [Heartbeat(identity(1)), Answered(identity(1), False, b"42")]
    assert rig.said() == [Settled((identity(1),))]
    assert rig.broker.take() == []


@pytest.mark.parametrize("reason", [NO_AGENT, EXPIRED])
def test_a_local_request_is_told_how_it_ended(rig: Rig, reason: int) -> None:
    taken = rig.local(1, flags=0)
    returned = rig.local(2)
    overdue = rig.local(3, timeout_ms=500)
    rig.guest(Receipt(identity(1)))
    rig.guest(Returned(identity(2), reason, "why"))
    rig.wait(0.5)
    assert taken == [Taken(identity(1))]
    assert returned == [HandedBack(identity(2), reason, "why")]
    assert overdue == [Overdue(identity(3))]
    assert rig.relay.open_requests == 0
    assert rig.broker.take() == []


def test_a_local_program_that_repeats_itself_or_leaves(rig: Rig) -> None:
    told = rig.local(1)
    assert rig.local(1) == []
    assert len(rig.said()) == 1
    rig.relay.cancel_local(identity(1))
    assert rig.said() == [Cancel(identity(1))]
    rig.relay.cancel_local(identity(1))
    rig.guest(reply())
    assert told == []


def test_a_local_program_cannot_cancel_the_brokers_requests(rig: Rig) -> None:
    rig.deliver("t1", call(1))
    rig.relay.cancel_local(identity(1))
    assert rig.relay.open_requests == 1


def test_local_requests_are_bounded(rig: Rig) -> None:
    for number in range(LOCAL_REQUESTS_MAX):
        rig.local(number)
    with pytest.raises(LimitExceeded, match="LOCAL_REQUESTS_MAX"):
        rig.local(LOCAL_REQUESTS_MAX)
    rig.relay.cancel_local(identity(0))
    with pytest.raises(LimitExceeded, match="MESSAGE_BYTES_MAX"):
        rig.local(LOCAL_REQUESTS_MAX, body=b"x" * TOO_LARGE)
    rig.local(LOCAL_REQUESTS_MAX)  # nothing was left of the one that was too large
    assert rig.relay.open_requests == LOCAL_REQUESTS_MAX


def test_the_channels_end_leaves_local_requests_alone(rig: Rig) -> None:
    told = rig.local(1)
    rig.relay.suspend()
    rig.relay.released()
    rig.guest(reply())
    assert told == [Answered(identity(1), False, b"42")]


# -------------------------------------------------------------------- without a broker; nonsense


def test_without_a_broker() -> None:
    rig = Rig(with_broker=False)
    rig.subscribe(A)
    told = rig.local(1)
    rig.relay.suspend()
    rig.relay.opened(resumed=True, now_s=rig.now_s)
    rig.wait(10.0)
    assert rig.relay.next_timeout() is None
    assert rig.relay.topics == {A}
    rig.relay.release("stopping")
    assert len(told) == 1


def test_a_guest_may_not_ask(rig: Rig) -> None:
    rig.guest(Request(identity(1), CALL, 0, 0, "nova", "a", VM, b"{}"))
    (returned,) = rig.said()
    assert (returned.id, returned.reason) == (identity(1), REFUSED)


def test_nonsense_is_counted(rig: Rig) -> None:
    rig.relay.receive(b"nonsense", rig.now_s)
    rig.guest(Holding((identity(1),)))
    assert rig.relay.counters["bad_messages"] == 2


def test_summary(rig: Rig) -> None:
    rig.deliver("t1", cast())
    summary = rig.relay.summary()
    assert (summary["open"], summary["requests"]) == (1, 1)
    assert (summary["topics"], summary["denied_topics"]) == (["nova/a", "nova/b"], [])


def test_summary_names_the_topics_that_the_broker_does_not_hand_out_yet() -> None:
    rig = Rig()
    rig.guest(Subscribe((A, FORBIDDEN)))
    assert rig.relay.summary()["unconsumed_topics"] == []
    rig.guest(Subscribe((A, B)))
    assert rig.relay.summary()["unconsumed_topics"] == ["nova/b"]
    rig.wait(SUBSCRIBE_S)
    assert rig.relay.summary()["unconsumed_topics"] == []
    rig.relay.suspend()
    assert rig.relay.summary()["unconsumed_topics"] == ["nova/a", "nova/b"]
    local = Rig(with_broker=False)
    local.subscribe(A)
    assert local.relay.summary()["unconsumed_topics"] == []


# -------------------------------------------------------------------- a guest that is away


def test_what_comes_while_the_guest_cannot_be_reached_is_sent_when_it_can(rig: Rig) -> None:
    rig.relay.disconnected()
    late = rig.local(1, timeout_ms=2000)
    rig.wait(1)
    told = rig.local(2, timeout_ms=2000)
    rig.deliver("t1", cast(3))
    rig.wait(1)
    assert late == [Overdue(identity(1), was_sent=False)]
    assert not any(isinstance(message, Request) for message in rig.said())
    rig.relay.opened(resumed=True, now_s=rig.now_s)
    assert [message.id for message in rig.said()] == [identity(2), identity(3)]
    rig.guest(Reply(identity(2), FINAL, b"1"))
    assert told == [Answered(identity(2), False, b"1")]


# -------------------------------------------------------------------- a VM that is mute


def mute(rig: Rig) -> None:
    rig.gate.is_mute = True
    rig.gate.given_topics = frozenset({A})
    rig.relay.opened(resumed=False, now_s=rig.now_s)
    rig.relay.released()
    rig.broker.take()
    rig.said()


def test_a_mute_vm_is_given_its_topics_and_not_listened_to() -> None:
    rig = Rig()
    mute(rig)
    assert rig.relay.topics == frozenset({A})
    rig.subscribe(B)
    rig.guest(Request(identity(9), 0, 0, 0, "nova", "conductor", "", b"{}"))
    rig.relay.receive(b"nonsense", rig.now_s)
    assert rig.relay.topics == frozenset({A})
    assert rig.said() == []
    assert rig.relay.counters["discarded"] == 3


def speak(rig: Rig) -> None:
    """The policy lets it, now."""
    rig.gate.is_mute = False
    rig.relay.policy_changed(rig.now_s)
    rig.relay.released()


def test_what_a_mute_vm_serves_is_heard_when_the_policy_lets_it_speak() -> None:
    rig = Rig()
    mute(rig)
    rig.subscribe(A)
    rig.subscribe(A, B)
    assert rig.relay.topics == frozenset({A})
    speak(rig)
    assert rig.relay.topics == frozenset({A, B})
    rig.wait(2)
    assert ("consume", A, B) in rig.broker.take()
    assert rig.relay.counters["bad_messages"] == 0


def test_a_vm_that_was_mute_for_a_while_serves_what_its_agents_do(rig: Rig) -> None:
    rig.gate.is_mute = True
    rig.gate.given_topics = frozenset({FORBIDDEN})
    rig.relay.policy_changed(rig.now_s)
    assert rig.relay.topics <= {FORBIDDEN}
    speak(rig)
    assert rig.relay.topics == frozenset({A, B})


def test_a_mute_vm_that_says_nothing_serves_nothing_later() -> None:
    rig = Rig()
    mute(rig)
    speak(rig)
    assert rig.relay.topics == frozenset()


def test_nonsense_of_a_mute_vm_is_found_when_it_is_heard() -> None:
    rig = Rig()
    mute(rig)
    rig.relay.receive(encode(Subscribe((A,))) + b"x", rig.now_s)
    rig.relay.receive(encode(Subscribe((A,))) + bytes(SUBSCRIBE_BYTES_MAX), rig.now_s)
    speak(rig)
    assert rig.relay.topics == frozenset()
    assert rig.relay.counters["bad_messages"] == 1


def test_what_a_mute_vm_served_in_an_earlier_session_counts_no_more() -> None:
    rig = Rig()
    mute(rig)
    rig.subscribe(B)
    rig.relay.opened(resumed=False, now_s=rig.now_s)
    speak(rig)
    assert rig.relay.topics == frozenset()


def test_casts_to_a_mute_vm_are_over_when_its_session_has_them() -> None:
    rig = Rig()
    mute(rig)
    rig.deliver("t1", cast(1))
    assert rig.relay.waits_for_reception
    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == []
    rig.relay.received_all(rig.now_s)
    assert rig.broker.take() == [("ack", "t1")]
    assert not rig.relay.waits_for_reception


def test_what_a_mute_vm_was_not_sent_is_not_over() -> None:
    """Its session may have received all that it was given, and not have been given this."""
    rig = Rig()
    mute(rig)
    rig.relay.disconnected()
    told = rig.local(flags=0)
    rig.relay.received_all(rig.now_s)
    assert told == []
    rig.relay.opened(resumed=True, now_s=rig.now_s)
    rig.relay.received_all(rig.now_s)
    assert told == [Taken(identity(1))]


def test_calls_to_a_mute_vm_are_refused_unasked() -> None:
    rig = Rig()
    mute(rig)
    rig.deliver("t1", call(1))
    assert rig.said() == []
    assert "policy" in rig.broker.replies[0]["failure"]
    rig.relay.received_all(rig.now_s)
    rig.published(identity(1))
    assert ("ack", "t1") in rig.broker.take()
    request = Request(identity(2), CALL, 0, 0, "nova", "a", "", b"{}")
    with pytest.raises(Rejected, match="policy"):
        rig.relay.submit_local(request, lambda _: None, rig.now_s)


def test_a_vm_that_is_not_mute_gives_its_receipts_itself(rig: Rig) -> None:
    rig.deliver("t1", cast(1))
    rig.relay.received_all(rig.now_s)
    assert rig.broker.take() == []


def test_an_answer_that_the_policy_denies_is_not_relayed(rig: Rig) -> None:
    rig.gate.deny_reply = {A}
    rig.deliver("t1", call(1))
    rig.guest(reply(1))
    failure = json.loads(rig.broker.replies[0]["failure"])
    assert failure["class"] == "Rejected"
    assert rig.relay.counters["replies_denied"] == 1


def test_another_policy_changes_what_is_consumed(rig: Rig) -> None:
    rig.serve(A, B)
    rig.gate.may_listen = lambda topic: topic == A
    rig.relay.policy_changed(rig.now_s)
    assert rig.broker.take() == [("consume", A)]
    rig.gate.may_listen = lambda _: True
    rig.wait(SUBSCRIBE_S)
    rig.relay.policy_changed(rig.now_s)
    assert rig.broker.take() == [("consume", A, B)]


def test_a_local_programs_context_is_cut_as_a_brokers_is(rig: Rig) -> None:
    context = {"request_id": "req-1", "auth_token": "secret"}
    body = json.dumps({"method": "m", "args": {}, "context": context}).encode()
    request = Request(identity(5), CALL, 1000, 0, "nova", "a", "", body)
    rig.relay.submit_local(request, lambda _: None, rig.now_s)
    (said,) = rig.said()
    assert json.loads(said.body) == {
        "method": "m",
        "args": {},
        "context": {"request_id": "req-1"},
    }
    for number, plain in enumerate((b"nonsense", b"[]", b'{"context": 1}', b'{"context": {}}'), 6):
        request = Request(identity(number), CALL, 1000, 0, "nova", "a", "", plain)
        rig.relay.submit_local(request, lambda _: None, rig.now_s)
        assert rig.said()[0].body == plain
