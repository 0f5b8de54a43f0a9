"""A VM's Downward: what it tells the broker and the guest, and when."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import pytest

from tests.rig.gates import OpenGate, offer_nothing
from vchan import errors
from vchan.errors import LimitExceeded, Rejected
from vchan.host.oslo_wire.downward_envelope import BrokerRequest, ReplyPublication
from vchan.host.oslo_wire.upward_envelope import Publication
from vchan.host.policy.rules import Ask, Kind
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.consumption import RETRY_S, SUBSCRIBE_S, WITHDRAW_S
from vchan.host.vm.downward import LOCAL_REQUESTS_MAX, OPEN_BYTES_MAX, Downward
from vchan.host.vm.finished_requests import FINISHED_MAX
from vchan.host.vm.served_topics import TOPICS_JUDGED_PER_S, TOPICS_SEEN_MAX
from vchan.host.vm.upward import ANSWERS_BYTES_MAX
from vchan.rpc.in_flight import Answered, HandedBack, Heartbeat, Outcome, Overdue, Taken
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FAILURE,
    FANOUT,
    FINAL,
    GUEST_TOPIC,
    LOCAL,
    NO_AGENT,
    NOTIFICATION,
    OUT_OF_TURN,
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
from vchan.rpc.outcomes import ending_of

VM = "b1b1f4b2-0000-4000-8000-000000000001"
A, B, FORBIDDEN = Topic("nova", "a"), Topic("nova", "b"), Topic("nova", "forbidden")
TOO_LARGE = 1000


class FakeBroker:
    """Notes what it is asked, as tuples; `take` hands them over."""

    def __init__(self) -> None:
        self._asked: list[tuple[Any, ...]] = []
        self.replies: list[dict[str, Any]] = []
        self.completed: list[bytes] = []
        self.publications: list[Publication] = []
        self.listens = 0
        self.owned: frozenset[Topic] = frozenset()  # by the last `consume`

    def consume(self, vm: str, topics: frozenset[Topic], owned: frozenset[Topic]) -> None:
        assert vm == VM
        self.owned = owned
        self._asked.append(("consume", *sorted(topics)))

    def release(self, vm: str, *, for_good: bool = False) -> None:
        assert vm == VM
        self._asked.append(("release for good",) if for_good else ("release",))

    def ack(self, token: Hashable) -> None:
        self._asked.append(("ack", token))

    def complete(
        self,
        vm: str,
        request_id: bytes,
        tokens: tuple[Hashable, ...],
        reply: ReplyPublication | None = None,
    ) -> None:
        assert vm == VM
        self.completed.append(request_id)
        if reply is None:
            self._asked.append(("done", *tokens))
            return
        self._asked.append(("refuse" if reply.has_not_run else "reply", reply.reply_q, *tokens))
        self._publish(reply.body)

    def publish_heartbeat(self, reply_q: str, body: bytes) -> None:
        self._asked.append(("heartbeat", reply_q))
        self._publish(body)

    def _publish(self, body: bytes) -> None:
        self.replies.append(json.loads(json.loads(body)["oslo.message"]))

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        assert vm == VM
        self._asked.append(("publish_request", request_id, publication.form))
        self.publications.append(publication)

    def listen_for_answers(self, vm: str) -> None:
        assert vm == VM
        self.listens += 1

    def take(self) -> list[tuple[Any, ...]]:
        asked, self._asked = self._asked, []
        return asked


class Rig:
    """A Downward between a fake broker and a guest that is a list of messages."""

    def __init__(self, *, with_broker: bool = True) -> None:
        self.now_s = 1000.0
        self.too_large = TOO_LARGE
        self.unread = 0
        self._said: list[Any] = []
        self.broker = FakeBroker()
        self.gate = OpenGate(lambda topic: topic != FORBIDDEN, may_send=False)
        self.downward = Downward(
            VM,
            self._send,
            self.broker if with_broker else None,
            self.gate,
            frozenset({"request_id"}),
            offer_nothing,
            unread=lambda: self.unread,
        )
        self.downward.opened(resumed=False, now_s=self.now_s)

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
        self.downward.receive(encode(message), self.now_s)

    def subscribe(self, *topics: Topic) -> None:
        self.guest(Subscribe(topics))

    def serve(self, *topics: Topic) -> None:
        """The guest serves these, and the broker has said that what was before is gone."""
        self.subscribe(*topics)
        self.downward.released()
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
        self.downward.delivered(
            token, origin, topic, fanout=fanout, redelivered=redelivered, now_s=self.now_s
        )

    def completed(self, *numbers: int, proven: bool = True) -> None:
        self.downward.completed(tuple(map(identity, numbers)), proven=proven)

    def wait(self, for_s: float) -> None:
        self.now_s += for_s
        self.downward.handle_timeout(self.now_s)

    def local(self, number: int = 1, **fields: Any) -> list[Outcome]:
        """A local program's call. What it is told is added to the list."""
        told: list[Outcome] = []
        request = Request(identity(number), CALL, 0, 0, "nova", "a", VM, b"{}")
        self.downward.submit_local(request.changed(**fields), told.append, self.now_s)
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
    return origin._replace(**fields)


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


def test_what_was_released_before_is_known_before_anything_is_asked_for() -> None:
    """Else the first topics would close the channel on which the VM's answers are listened for."""
    rig = Rig()
    assert rig.broker.take() == [("release",)]
    rig.subscribe(A)
    assert rig.broker.take() == [("consume", A)]
    rig.downward.opened(resumed=False, now_s=rig.now_s)
    assert rig.broker.take() == []


def test_a_cast_is_acknowledged_when_the_guest_has_taken_it(rig: Rig) -> None:
    rig.deliver("t1", cast())
    (request,) = rig.said()
    assert (request.id, request.flags, request.topic, request.server) == (identity(1), 0, "a", VM)
    assert json.loads(request.body)["context"] == {"request_id": "req-1"}
    assert rig.broker.take() == []
    assert rig.downward.open_requests == 1

    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == [("done", "t1")]
    assert rig.downward.open_requests == 0
    assert rig.downward.counters["taken"] == 1


def test_a_call_is_completed_by_its_reply(rig: Rig) -> None:
    rig.deliver("t1", call())
    assert rig.said()[0].is_call
    rig.guest(reply())
    assert rig.broker.take() == [("reply", "reply_x", "t1")]
    assert rig.broker.replies == [
        {"result": 42, "failure": None, "ending": True, "_msg_id": "msg-1"}
    ]
    assert rig.broker.completed == [identity(1)]
    assert rig.downward.summary()["open_bytes"] > 0
    rig.completed(1)
    assert rig.said() == [Settled((identity(1),))]
    assert rig.downward.summary()["open_bytes"] == 0
    rig.completed(1)  # once more: a copy was completed, too
    assert rig.broker.take() == []


def test_a_failure_reaches_the_caller(rig: Rig) -> None:
    rig.deliver("t1", call())
    failure = {"class": "ValueError", "module": "builtins", "message": "no"}
    rig.guest(reply(body=json.dumps(failure).encode(), flags=FINAL | FAILURE))
    rest: dict[str, Any] = {"tb": [], "args": [], "kwargs": {}}
    assert json.loads(rig.broker.replies[0]["failure"]) == failure | rest


def test_an_answer_that_is_none_is_a_bad_reply(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.guest(reply(body=b"no JSON"))
    failure = json.loads(rig.broker.replies[0]["failure"])
    assert failure["module"] == "vchan.errors"
    assert issubclass(getattr(errors, failure["class"]), errors.RequestError)


def test_a_heartbeat_does_not_reach_a_caller_that_waits_for_none(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.guest(reply(flags=0, body=b""))
    assert rig.broker.take() == []
    assert rig.downward.open_requests == 1


def test_a_heartbeat_reaches_the_caller(rig: Rig) -> None:
    rig.deliver("t1", call(monitor_timeout_s=5.0))
    assert rig.said()[0].monitor_ms == 5000
    rig.guest(reply(flags=0, body=b""))
    assert rig.broker.take() == [("heartbeat", "reply_x")]
    assert rig.broker.replies[0]["ending"] is False
    for _ in range(10):  # a guest may send them at will
        rig.guest(reply(flags=0, body=b""))
    assert rig.broker.take() == []
    assert rig.downward.open_requests == 1


def test_answers_to_nothing_are_ignored(rig: Rig) -> None:
    rig.deliver("t1", cast(1))
    rig.guest(reply(1))  # an answer to a cast
    rig.guest(reply(2))
    rig.guest(Receipt(identity(3)))
    assert rig.broker.take() == []
    assert rig.downward.open_requests == 1


def test_flags_and_times_travel_with_the_request(rig: Rig) -> None:
    rig.deliver("t1", cast(1, timeout_s=2.5), B, fanout=True, redelivered=True)
    rig.deliver("t2", cast(2, timeout_s=0.0001, monitor_timeout_s=1e9))
    first, second = rig.said()
    assert (first.flags, first.timeout_ms, first.topic) == (FANOUT | REDELIVERED, 2500, "b")
    assert (second.timeout_ms, second.monitor_ms) == (1, 0xFFFFFFFF)


# -------------------------------------------------------------------- replies that are under way


def test_a_reply_in_hand_answers_the_request_that_comes_again(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.guest(reply())
    rig.downward.released()
    rig.said()
    rig.broker.take()
    rig.deliver("t2", call(), redelivered=True)
    assert rig.broker.take() == [("done", "t2")]  # with the first: its reply is under way
    assert rig.said() == []
    rig.completed(1)
    assert rig.downward.open_requests == 0


def test_a_reply_in_hand_is_published_though_the_broker_lost_the_request(rig: Rig) -> None:
    """A broker that restarts forgets queues that are not durable; the caller waits all the same."""
    rig.deliver("t1", call())
    rig.downward.released()
    rig.guest(reply())
    assert rig.broker.take() == [("reply", "reply_x")]
    rig.completed(1, proven=False)
    assert rig.downward.summary()["open_bytes"] == 0
    assert rig.said()[1:] == []  # nothing is proved: the guest keeps its id


def test_a_reply_that_was_given_up_is_counted(rig: Rig) -> None:
    rig.downward.count_given_up()
    assert rig.downward.counters["replies_given_up"] == 1


# -------------------------------------------------------------------- redelivery and release


def test_every_copy_is_acknowledged(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.deliver("t2", cast(), redelivered=True)
    assert len(rig.said()) == 1
    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == [("done", "t1", "t2")]
    assert (rig.downward.counters["requests"], rig.downward.counters["redelivered"]) == (1, 1)


def test_a_redelivery_after_release_goes_on_where_it_was(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.downward.released()
    rig.deliver("t2", cast(), redelivered=True)
    assert len(rig.said()) == 1  # the guest has it
    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == [("done", "t2")]


def test_deliveries_of_another_topic_or_a_channel_that_is_gone_are_ignored(rig: Rig) -> None:
    rig.deliver("t1", cast(1), Topic("nova", "c"))
    rig.downward.suspend(rig.now_s)
    rig.deliver("t2", cast(2))
    rig.wait(SUBSCRIBE_S)
    rig.downward.opened(resumed=True, now_s=rig.now_s)
    rig.deliver("t3", cast(3))  # Released has not come: this is older
    assert rig.said() == []
    rig.downward.released()
    rig.deliver("t4", cast(4))
    assert [request.id for request in rig.said()] == [identity(4)]


# -------------------------------------------------------------------- settling


def test_ids_are_settled_when_the_broker_has_proved_it(rig: Rig) -> None:
    for number in (1, 2):
        rig.deliver(f"t{number}", cast(number))
        rig.guest(Receipt(identity(number)))
    rig.said()
    assert rig.broker.take() == [("done", "t1"), ("done", "t2")]
    rig.completed(1, 2)
    assert rig.said() == [Settled((identity(1), identity(2)))]


def test_nothing_is_settled_that_was_acknowledged_on_a_lost_channel(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.guest(Receipt(identity(1)))
    rig.said()
    rig.completed(1, proven=False)
    rig.downward.released()
    assert rig.downward.next_timeout() is None
    assert rig.said() == []


# -------------------------------------------------------------------- handed back


@pytest.mark.parametrize("reason", [AGENT_GONE, RELEASED, 99])
def test_a_call_that_is_handed_back_and_may_have_run_fails(rig: Rig, reason: int) -> None:
    rig.deliver("t1", call())
    rig.guest(Returned(identity(1), reason, "why"))
    failure = json.loads(rig.broker.replies[0]["failure"])
    assert (failure["class"], failure["message"]) == ("AgentGone", "why")
    assert rig.broker.take() == [("reply", "reply_x", "t1")]
    assert rig.downward.counters["handed_back"] == 1


@pytest.mark.parametrize("reason", [NO_AGENT, BUSY, REFUSED])
def test_a_caller_hears_that_its_call_has_not_run_when_the_broker_has_forgotten_it(
    rig: Rig, reason: int
) -> None:
    rig.deliver("t1", call())
    rig.guest(Returned(identity(1), reason, "why"))
    assert rig.broker.take() == [("refuse", "reply_x", "t1")]
    rig.said()
    failure = json.loads(rig.broker.replies[0]["failure"])
    assert (failure["class"], failure["message"]) == (ending_of(reason).error.__name__, "why")
    rig.completed(1)
    assert rig.said() == [Settled((identity(1),))]
    assert rig.downward.open_requests == 0


def refused(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.guest(Returned(identity(1), NO_AGENT, "why"))
    rig.said()
    rig.broker.take()


def test_without_proof_a_refused_call_is_decided_anew(rig: Rig) -> None:
    refused(rig)
    rig.completed(1, proven=False)
    rig.downward.released()
    assert rig.said() == []
    rig.deliver("t2", call(), redelivered=True)  # decided anew
    assert [message.id for message in rig.said()] == [identity(1)]


def test_a_call_that_is_handed_back_when_its_channel_is_gone_is_decided_anew(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.downward.released()
    rig.guest(Returned(identity(1), NO_AGENT, "why"))
    assert (rig.broker.take(), rig.downward.open_requests) == ([], 0)


def test_a_copy_of_a_refused_call_shares_its_end(rig: Rig) -> None:
    refused(rig)
    rig.deliver("t2", call())  # published twice
    assert rig.broker.take() == [("done", "t2")]
    assert rig.broker.completed == [identity(1), identity(1)]
    assert rig.said() == []


@pytest.mark.parametrize("kind", ["too large", "mute"])
def test_what_came_before_may_have_run_though_it_cannot_be_given_to_the_guest_now(
    kind: str,
) -> None:
    rig = Rig()
    rig.serve(A, B)
    if kind == "mute":
        mute(rig)
        rig.deliver("t1", call(), redelivered=True)
    else:
        with pytest.raises(LimitExceeded):
            rig.deliver("t1", call(args={"x": "x" * TOO_LARGE}), redelivered=True)
    failure = json.loads(rig.broker.replies[0]["failure"])
    assert failure["class"] == "AgentGone"
    assert "may have run" in failure["message"]


@pytest.mark.parametrize("origin", [call(1), cast(1)], ids=["call", "cast"])
def test_while_what_an_earlier_run_had_may_come_again_nothing_says_that_it_has_come(
    rig: Rig, origin: BrokerRequest
) -> None:
    """The VM may move before the broker has forgotten it: the next host is given it after what is
    given to the new run of the guest's daemon now, which must not take that for the whole."""
    rig.downward.opened(resumed=False, now_s=rig.now_s, guest=b"first")
    rig.serve(A, B)
    rig.deliver("t1", origin)
    rig.guest(reply() if origin.is_call else Receipt(identity(1)))
    rig.downward.opened(resumed=False, now_s=rig.now_s, guest=b"second")
    rig.serve(A, B)
    rig.said()
    rig.deliver("t2", cast(2))
    rig.completed(1, proven=False)
    rig.deliver("t3", origin, redelivered=True)  # is not given to the guest
    rig.deliver("t4", cast(3))
    rig.completed(1)
    rig.deliver("t5", cast(4))
    given = [
        (each.id, each.flags & OUT_OF_TURN) for each in rig.said() if isinstance(each, Request)
    ]
    out_of_turn = [(identity(2), OUT_OF_TURN), (identity(3), OUT_OF_TURN)]
    assert given == [*out_of_turn, (identity(4), 0)]


def test_an_answer_of_an_earlier_run_is_not_known_to_the_run_it_was_published_in(
    rig: Rig,
) -> None:
    """The broker was away meanwhile, and loses the acknowledgement, too."""
    rig.downward.opened(resumed=False, now_s=rig.now_s, guest=b"first")
    rig.serve(A, B)
    rig.deliver("t1", call())
    rig.guest(reply())
    rig.downward.released()
    rig.downward.opened(resumed=False, now_s=rig.now_s, guest=b"second")
    rig.serve(A, B)
    rig.completed(1, proven=False)
    rig.said()
    rig.broker.take()
    rig.deliver("t2", call(), redelivered=True)
    assert rig.said() == []
    assert rig.broker.take() == [("done", "t2")]


def test_a_second_copy_of_what_an_earlier_run_of_the_guest_had_is_over(rig: Rig) -> None:
    """Its caller lost its connection before the broker confirmed, and the guest its memory."""
    rig.deliver("t1", call())
    rig.guest(reply())
    rig.completed(1)
    rig.deliver("t2", call())  # the same run of the guest: it knows
    said = [message.id for message in rig.said() if isinstance(message, Request)]
    assert said == [identity(1), identity(1)]
    rig.guest(reply())
    rig.completed(1)
    rig.said()
    rig.downward.opened(resumed=False, now_s=rig.now_s, guest=b"another run")
    rig.broker.take()
    rig.deliver("t3", call())
    assert rig.said() == []
    assert rig.broker.take() == [("done", "t3")]
    for n in range(2, FINISHED_MAX + 2):  # it is forgotten
        rig.deliver("t", cast(n))
        rig.guest(Receipt(identity(n)))
    rig.said()
    rig.deliver("t4", call())
    assert [message.id for message in rig.said()] == [identity(1)]


@pytest.mark.parametrize("reason", [NO_AGENT, BUSY, RELEASED])
def test_a_cast_nobody_can_take_now_keeps_its_place_in_the_queue(rig: Rig, reason: int) -> None:
    for number in (1, 2, 3):
        rig.deliver(f"t{number}", cast(number))
    rig.guest(Returned(identity(1), reason, "why"))
    rig.guest(Returned(identity(2), reason, "why"))
    assert rig.broker.take() == [("release",)]
    assert rig.downward.open_requests == 1  # the third: the guest has it
    rig.downward.released()
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
    assert rig.broker.take() == [("done", "t1")]


def test_an_expired_call_is_dropped(rig: Rig) -> None:
    rig.deliver("t1", call())
    rig.guest(Returned(identity(1), EXPIRED, "too late"))
    assert rig.broker.take() == [("done", "t1")]
    assert rig.broker.replies == []


def test_what_is_overdue_is_dropped(rig: Rig) -> None:
    rig.deliver("t1", call(timeout_s=3.0))
    rig.said()
    assert rig.downward.next_timeout() == rig.now_s + 3.0
    rig.wait(3.0)
    assert rig.said() == [Cancel(identity(1))]
    assert rig.broker.take() == [("done", "t1")]
    assert rig.downward.counters["expired"] == 1


def test_what_the_guest_cannot_take_fails_and_is_acknowledged(rig: Rig) -> None:
    big = {"x": "x" * TOO_LARGE}
    with pytest.raises(LimitExceeded):
        rig.deliver("t1", cast(1, args=big))
    assert rig.broker.take() == [("done", "t1")]
    with pytest.raises(LimitExceeded):
        rig.deliver("t2", call(2, args=big))
    assert rig.broker.take() == [("refuse", "reply_x", "t2")]
    assert json.loads(rig.broker.replies[0]["failure"])["class"] == "LimitExceeded"
    assert rig.downward.open_requests == 0


# -------------------------------------------------------------------- topics


def test_what_the_guests_daemon_serves_itself_is_not_denied_to_its_agents(rig: Rig) -> None:
    rig.gate.may_listen = lambda topic: topic == A
    rig.subscribe(A, GUEST_TOPIC, FORBIDDEN)
    rig.wait(SUBSCRIBE_S)
    assert rig.downward.topics == {A}
    assert rig.downward.denied == {FORBIDDEN}
    assert rig.downward.summary()["denied_topics"] == ["nova/forbidden"]


def test_the_first_topics_are_consumed_at_once() -> None:
    """After a release: what an earlier Downward of this VM was given may still be on its way."""
    rig = Rig()
    rig.subscribe(A, FORBIDDEN)
    assert rig.broker.take() == [("release",), ("consume", A)]
    assert rig.downward.topics == {A}
    assert rig.downward.denied == {FORBIDDEN}
    rig.deliver("old", cast(1))
    rig.downward.released()
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
    assert rig.downward.topics == {A, B}
    assert rig.downward.next_timeout() == began_s + SUBSCRIBE_S
    rig.now_s = began_s
    rig.wait(SUBSCRIBE_S)
    assert rig.broker.take() == [("consume", A, B)]
    rig.now_s += SUBSCRIBE_S
    rig.subscribe(B)
    rig.wait(WITHDRAW_S)
    assert rig.broker.take() == [("consume", B)]


def test_a_change_that_is_taken_back_in_time_is_none() -> None:
    rig = Rig()
    rig.subscribe(A)
    rig.broker.take()
    rig.downward.released()
    rig.subscribe()
    rig.deliver("t1", cast())  # the broker knows nothing of it: neither does this delivery
    rig.subscribe(A)
    assert rig.downward.next_timeout() is None
    rig.wait(SUBSCRIBE_S)
    assert rig.broker.take() == []
    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == [("done", "t1")]


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
    assert rig.downward.next_timeout() is None


def test_a_guest_serves_so_many_topics_in_its_life() -> None:
    rig = Rig()
    every = [Topic("x", f"t{number:04}") for number in range(TOPICS_SEEN_MAX + 2)]
    for at in range(0, TOPICS_SEEN_MAX, TOPICS_MAX):
        rig.serve(*every[at : at + TOPICS_MAX])
    assert rig.downward.counters["topics_over_limit"] == 0
    rig.subscribe(every[0], *every[-2:])
    rig.broker.take()
    rig.wait(SUBSCRIBE_S)
    assert rig.broker.take() == [("consume", every[0])]  # seen before
    assert rig.downward.denied == set(every[-2:])
    summary = rig.downward.summary()
    assert summary["topics_over_limit"] == 2
    assert summary["denied_topics"] == ["x/t0256", "x/t0257"]
    rig.subscribe(FORBIDDEN)
    assert rig.downward.counters["topics_over_limit"] == 2


def test_a_vm_serves_as_many_topics_as_its_limit_says(rig: Rig) -> None:
    rig.gate.limits = Limits(topics=2)
    rig.now_s += SUBSCRIBE_S
    rig.subscribe(FORBIDDEN, A, B, Topic("x", "over"))
    assert rig.downward.topics == {A, B}
    assert Topic("x", "over") in rig.downward.denied
    assert rig.downward.counters["topics_over_limit"] == 1


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
    rig.downward.released()
    rig.subscribe(A)
    rig.downward.opened(resumed=True, now_s=rig.now_s)
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
    assert rig.downward.counters["held_up"] == 1


def test_programs_are_refused_what_has_no_room(roomy: Rig) -> None:
    rig = roomy
    for number in range(1, 5):
        rig.local(number, body=b"x" * LARGE)
    with pytest.raises(LimitExceeded, match="OPEN_BYTES_MAX"):
        rig.local(5)
    assert rig.downward.summary()["open_bytes"] == OPEN_BYTES_MAX
    rig.downward.cancel_local(identity(1))
    rig.local(5)
    rig.downward.release("gone", rig.now_s)
    assert rig.downward.summary()["open_bytes"] == 0


def test_requests_whose_time_is_up_count_until_the_guest_has_read_them(rig: Rig) -> None:
    rig.unread = OPEN_BYTES_MAX - 1
    rig.deliver("t1", call(1, timeout_s=1.0))
    assert rig.broker.take() == [("release",)]
    with pytest.raises(LimitExceeded, match="OPEN_BYTES_MAX"):
        rig.local(2)
    rig.downward.released()
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
    assert rig.downward.summary()["open_bytes"] > OPEN_BYTES_MAX
    rig.broker.take()
    rig.deliver("t6", call(6))
    assert rig.broker.take() == [("release",)]
    rig.completed(*range(1, 6))
    assert rig.downward.summary()["open_bytes"] == 0
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
    assert rig.downward.denied | rig.downward.topics == set(many("last"))
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
    rig.downward.policy_changed(rig.now_s)
    assert sorted(judging.take()) == sorted([A, B, FORBIDDEN])
    rig.downward.opened(resumed=False, now_s=rig.now_s)
    rig.subscribe(A, B, FORBIDDEN)
    assert judging.take() == [A, B, FORBIDDEN]


def test_a_topic_that_a_reload_gives_to_the_vm(rig: Rig) -> None:
    rig.subscribe(A, B)
    rig.wait(SUBSCRIBE_S)
    assert rig.broker.owned == frozenset()
    rig.gate.owned = {A, FORBIDDEN}
    rig.downward.policy_changed(rig.now_s)
    rig.wait(SUBSCRIBE_S)
    assert rig.broker.owned == {A}
    rig.gate.owned = set()
    rig.downward.policy_changed(rig.now_s)
    rig.wait(SUBSCRIBE_S)
    assert rig.broker.owned == frozenset()


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
    rig.gate.limits = Limits(json_values=100)
    rig.deliver("t1", call())
    rig.guest(reply(body=json.dumps([0] * 200).encode()))
    (answer,) = rig.broker.replies
    assert "the agent's reply has over 100 values (json_values)" in answer["failure"]


# -------------------------------------------------------------------- suspend, opened, release


def test_suspend_hands_back_and_opened_goes_on(rig: Rig) -> None:
    rig.deliver("t1", cast(1))
    rig.deliver("t2", cast(2))
    rig.downward.suspend(rig.now_s)
    rig.downward.suspend(rig.now_s)
    assert rig.broker.take() == [("release",)]
    rig.guest(Receipt(identity(1)))  # it counts; there is no token to acknowledge
    rig.guest(Returned(identity(2), NO_AGENT, "why"))  # the broker has it already
    rig.subscribe(B)
    rig.wait(2 * RETRY_S)
    assert rig.broker.take() == []
    assert rig.downward.open_requests == 0

    rig.downward.opened(resumed=True, now_s=rig.now_s)
    assert rig.broker.take() == [("consume", B)]
    rig.downward.opened(resumed=True, now_s=rig.now_s)
    assert rig.broker.take() == []


def test_suspend_calls_off_what_was_to_be_consumed(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.guest(Returned(identity(1), BUSY, "why"))
    rig.downward.suspend(rig.now_s)
    rig.broker.take()
    rig.wait(RETRY_S)
    assert rig.broker.take() == []


def test_a_new_session_is_told_again_and_says_its_topics(rig: Rig) -> None:
    rig.deliver("t1", cast())
    rig.said()
    rig.downward.suspend(rig.now_s)
    rig.downward.opened(resumed=False, now_s=rig.now_s)
    (request,) = rig.said()
    assert (request.id, request.flags) == (identity(1), REDELIVERED | OUT_OF_TURN)
    assert rig.broker.take() == [("release",)]
    rig.subscribe(A)
    assert rig.broker.take() == [("consume", A)]


def test_release_gives_everything_back(rig: Rig) -> None:
    rig.deliver("t1", call(1))
    told = rig.local(2)
    rig.downward.release("the VM has gone", rig.now_s)
    assert rig.broker.take() == [("release for good",)]
    assert told == [HandedBack(identity(2), RELEASED, "the VM has gone")]
    assert rig.downward.open_requests == 0
    assert rig.downward.topics == rig.downward.denied == frozenset()
    assert rig.downward.next_timeout() is None
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
    assert rig.downward.open_requests == 0
    assert rig.broker.take() == []


def test_a_local_program_that_repeats_itself_or_leaves(rig: Rig) -> None:
    told = rig.local(1)
    assert rig.local(1) == []
    assert len(rig.said()) == 1
    rig.downward.cancel_local(identity(1))
    assert rig.said() == [Cancel(identity(1))]
    rig.downward.cancel_local(identity(1))
    rig.guest(reply())
    assert told == []


def test_a_local_program_cannot_cancel_the_brokers_requests(rig: Rig) -> None:
    rig.deliver("t1", call(1))
    rig.downward.cancel_local(identity(1))
    assert rig.downward.open_requests == 1


def test_local_requests_are_bounded(rig: Rig) -> None:
    for number in range(LOCAL_REQUESTS_MAX):
        rig.local(number)
    with pytest.raises(LimitExceeded, match="LOCAL_REQUESTS_MAX"):
        rig.local(LOCAL_REQUESTS_MAX)
    rig.downward.cancel_local(identity(0))
    with pytest.raises(LimitExceeded, match="MESSAGE_BYTES_MAX"):
        rig.local(LOCAL_REQUESTS_MAX, body=b"x" * TOO_LARGE)
    rig.local(LOCAL_REQUESTS_MAX)  # nothing was left of the one that was too large
    assert rig.downward.open_requests == LOCAL_REQUESTS_MAX


def test_the_channels_end_leaves_local_requests_alone(rig: Rig) -> None:
    told = rig.local(1)
    rig.downward.suspend(rig.now_s)
    rig.downward.released()
    rig.guest(reply())
    assert told == [Answered(identity(1), False, b"42")]


# -------------------------------------------------------------------- without a broker; nonsense


def test_without_a_broker() -> None:
    rig = Rig(with_broker=False)
    rig.subscribe(A)
    told = rig.local(1)
    rig.downward.suspend(rig.now_s)
    rig.downward.opened(resumed=True, now_s=rig.now_s)
    rig.wait(10.0)
    assert rig.downward.next_timeout() is None
    assert rig.downward.topics == {A}
    rig.downward.release("stopping", rig.now_s)
    assert len(told) == 1


def test_answers_that_do_not_fit_stay_with_the_broker(rig: Rig) -> None:
    """The channel is closed; topics are consumed again, the VM's own queue when there is room."""
    rig.downward.mail("m1", b"{}", rig.now_s)
    assert len(rig.downward.upward.mailbox) == 1
    rig.unread = ANSWERS_BYTES_MAX
    rig.downward.mail("m2", b"{}", rig.now_s)
    rig.downward.mail("m3", b"{}", rig.now_s)  # was on its way already
    assert rig.broker.take() == [("release",)]
    assert len(rig.downward.upward.mailbox) == 1  # what was taken is worked off
    rig.downward.released()
    rig.wait(RETRY_S)
    assert rig.broker.take() == [("consume", A, B)]
    listens = rig.broker.listens
    rig.unread = 0
    rig.wait(RETRY_S)
    assert rig.broker.listens == listens
    rig.downward.upward.work(rig.now_s)
    rig.wait(RETRY_S)
    assert rig.broker.listens == listens + 1


def test_a_guest_may_not_ask(rig: Rig) -> None:
    rig.guest(Request(identity(1), CALL, 0, 0, "nova", "a", VM, b"{}"))
    (returned,) = rig.said()
    assert (returned.id, returned.reason) == (identity(1), REFUSED)


def test_nonsense_is_counted(rig: Rig) -> None:
    rig.downward.receive(b"\x01nonsense", rig.now_s)
    rig.guest(Holding((identity(1),)))
    assert rig.downward.counters["bad_messages"] == 2


def test_a_kind_of_a_later_version_is_no_nonsense(rig: Rig) -> None:
    rig.downward.receive(b"nonsense", rig.now_s)
    rig.downward.receive(b"\x00", rig.now_s)
    assert rig.downward.counters["unknown_messages"] == 2
    assert rig.downward.counters["bad_messages"] == 0
    assert rig.downward.unknown_kind == 0


def test_summary(rig: Rig) -> None:
    rig.deliver("t1", cast())
    summary = rig.downward.summary()
    assert (summary["open"], summary["requests"]) == (1, 1)
    assert (summary["topics"], summary["denied_topics"]) == (["nova/a", "nova/b"], [])


def test_summary_names_the_topics_that_the_broker_does_not_hand_out_yet() -> None:
    rig = Rig()
    rig.guest(Subscribe((A, FORBIDDEN)))
    assert rig.downward.summary()["unconsumed_topics"] == ["nova/a"]
    rig.downward.consuming(frozenset({A}))
    assert rig.downward.summary()["unconsumed_topics"] == []
    rig.guest(Subscribe((A, B)))
    assert rig.downward.summary()["unconsumed_topics"] == ["nova/b"]
    rig.wait(SUBSCRIBE_S)
    assert rig.downward.summary()["unconsumed_topics"] == ["nova/b"]
    rig.downward.consuming(frozenset({A}))  # the broker cannot say the other's name
    assert rig.downward.summary()["unconsumed_topics"] == ["nova/b"]
    rig.downward.consuming(frozenset({A, B}))
    assert rig.downward.summary()["unconsumed_topics"] == []
    rig.downward.suspend(rig.now_s)
    assert rig.downward.summary()["unconsumed_topics"] == ["nova/a", "nova/b"]
    local = Rig(with_broker=False)
    local.subscribe(A)
    assert local.downward.summary()["unconsumed_topics"] == []


# -------------------------------------------------------------------- a guest that is away


def test_what_comes_while_the_guest_cannot_be_reached_is_sent_when_it_can(rig: Rig) -> None:
    rig.downward.disconnected()
    late = rig.local(1, timeout_ms=2000)
    rig.wait(1)
    told = rig.local(2, timeout_ms=2000)
    rig.deliver("t1", cast(3))
    rig.wait(1)
    assert late == [Overdue(identity(1), was_sent=False)]
    assert not any(isinstance(message, Request) for message in rig.said())
    rig.downward.opened(resumed=True, now_s=rig.now_s)
    assert [message.id for message in rig.said()] == [identity(2), identity(3)]
    rig.guest(Reply(identity(2), FINAL, b"1"))
    assert told == [Answered(identity(2), False, b"1")]


# -------------------------------------------------------------------- a VM that is mute


def mute(rig: Rig) -> None:
    rig.gate.is_mute = True
    rig.gate.given_topics = frozenset({A})
    rig.downward.opened(resumed=False, now_s=rig.now_s)
    rig.downward.released()
    rig.broker.take()
    rig.said()


def test_a_mute_vm_is_given_its_topics_and_not_listened_to() -> None:
    rig = Rig()
    mute(rig)
    assert rig.downward.topics == frozenset({A})
    rig.subscribe(B)
    rig.guest(Receipt(identity(9)))
    rig.downward.receive(b"nonsense", rig.now_s)
    rig.downward.receive(b"\x01nonsense", rig.now_s)
    assert rig.downward.topics == frozenset({A})
    assert rig.said() == []
    assert rig.downward.counters["discarded"] == 4


def test_a_mute_vm_is_told_at_once_that_its_requests_are_not_heard() -> None:
    """On record by their heads: what else is in them nobody looks at."""
    rig = Rig()
    mute(rig)
    nonsense = b"\xff" * 20
    rig.guest(Request(identity(1), 0, 0, 0, "nova", "conductor", "s", nonsense))
    rig.guest(Request(identity(2), CALL | REDELIVERED, 0, 0, "nova", "conductor", "", nonsense))
    rig.guest(Request(identity(3), FANOUT, 0, 0, "nova", "conductor", "", nonsense))
    rig.guest(Request(identity(4), NOTIFICATION, 0, 0, "nova", "billing", "", nonsense))
    said = rig.said()
    assert [(each.id, each.reason) for each in said] == [
        (identity(1), REFUSED),
        (identity(2), AGENT_GONE),  # it was sent before, when the VM was heard perhaps
        (identity(3), REFUSED),
        (identity(4), REFUSED),
    ]
    assert all("not listened to" in each.text for each in said)
    assert [ask for ask, _ in rig.gate.turned_away] == [
        Ask(Kind.CAST, "nova", "conductor", "s"),
        Ask(Kind.CALL, "nova", "conductor"),
        Ask(Kind.CAST, "nova", "conductor", fanout=True),
        Ask(Kind.NOTIFY, "nova", "billing"),
    ]
    assert rig.downward.upward.open_requests == 0
    assert rig.downward.upward.counters["guest_denied"] == 4


def test_a_vm_that_became_mute_is_told_what_came_of_earlier_requests(rig: Rig) -> None:
    rig.gate.may_send = True
    request = Request(identity(1), 0, 0, 0, "nova", "conductor", "", b'{"method": "m"}')
    rig.guest(request)
    rig.gate.is_mute = True
    rig.downward.policy_changed(rig.now_s)
    rig.guest(request.changed(flags=REDELIVERED))
    assert rig.said() == []
    assert rig.gate.turned_away == []
    assert rig.downward.upward.open_requests == 1


def speak(rig: Rig) -> None:
    """The policy lets it, now."""
    rig.gate.is_mute = False
    rig.downward.policy_changed(rig.now_s)
    rig.downward.released()


def test_what_a_mute_vm_serves_is_heard_when_the_policy_lets_it_speak() -> None:
    rig = Rig()
    mute(rig)
    rig.subscribe(A)
    rig.subscribe(A, B)
    assert rig.downward.topics == frozenset({A})
    speak(rig)
    assert rig.downward.topics == frozenset({A, B})
    rig.wait(2)
    assert ("consume", A, B) in rig.broker.take()
    assert rig.downward.counters["bad_messages"] == 0


def test_a_vm_that_was_mute_for_a_while_serves_what_its_agents_do(rig: Rig) -> None:
    rig.gate.is_mute = True
    rig.gate.given_topics = frozenset({FORBIDDEN})
    rig.downward.policy_changed(rig.now_s)
    assert rig.downward.topics <= {FORBIDDEN}
    speak(rig)
    assert rig.downward.topics == frozenset({A, B})


def test_a_mute_vm_that_says_nothing_serves_nothing_later() -> None:
    rig = Rig()
    mute(rig)
    speak(rig)
    assert rig.downward.topics == frozenset()


def test_nonsense_of_a_mute_vm_is_found_when_it_is_heard() -> None:
    rig = Rig()
    mute(rig)
    rig.downward.receive(encode(Subscribe((A,))) + b"x", rig.now_s)
    rig.downward.receive(encode(Subscribe((A,))) + bytes(SUBSCRIBE_BYTES_MAX), rig.now_s)
    speak(rig)
    assert rig.downward.topics == frozenset()
    assert rig.downward.counters["bad_messages"] == 1


def test_what_a_mute_vm_served_in_an_earlier_session_counts_no_more() -> None:
    rig = Rig()
    mute(rig)
    rig.subscribe(B)
    rig.downward.opened(resumed=False, now_s=rig.now_s)
    speak(rig)
    assert rig.downward.topics == frozenset()


def test_casts_to_a_mute_vm_are_over_when_its_session_has_them() -> None:
    rig = Rig()
    mute(rig)
    rig.deliver("t1", cast(1))
    assert rig.downward.waits_for_reception
    rig.guest(Receipt(identity(1)))
    assert rig.broker.take() == []
    rig.downward.received_all(rig.now_s)
    assert rig.broker.take() == [("done", "t1")]
    assert not rig.downward.waits_for_reception


def test_what_a_mute_vm_was_not_sent_is_not_over() -> None:
    """Its session may have received all that it was given, and not have been given this."""
    rig = Rig()
    mute(rig)
    rig.downward.disconnected()
    told = rig.local(flags=0)
    rig.downward.received_all(rig.now_s)
    assert told == []
    rig.downward.opened(resumed=True, now_s=rig.now_s)
    rig.downward.received_all(rig.now_s)
    assert told == [Taken(identity(1))]


def test_calls_to_a_mute_vm_are_refused_unasked() -> None:
    rig = Rig()
    mute(rig)
    rig.deliver("t1", call(1))
    assert rig.said() == []
    rig.downward.received_all(rig.now_s)
    assert rig.broker.take() == [("refuse", "reply_x", "t1")]
    why = "this VM is not listened to: a rule denies reply nova/a"
    assert why in rig.broker.replies[0]["failure"]
    assert rig.downward.open_requests == 0
    request = Request(identity(2), CALL, 0, 0, "nova", "a", "", b"{}")
    with pytest.raises(Rejected, match=why):
        rig.downward.submit_local(request, lambda _: None, rig.now_s)


def test_a_vm_that_is_not_mute_gives_its_receipts_itself(rig: Rig) -> None:
    rig.deliver("t1", cast(1))
    rig.downward.received_all(rig.now_s)
    assert rig.broker.take() == []


def test_an_answer_that_the_policy_denies_is_not_relayed(rig: Rig) -> None:
    rig.gate.deny_reply = {A}
    rig.deliver("t1", call(1))
    rig.guest(reply(1))
    failure = json.loads(rig.broker.replies[0]["failure"])
    assert failure["class"] == "BadReply"  # the method has run
    assert failure["message"].endswith("does not let this VM answer: a rule denies reply nova/a")
    assert rig.downward.counters["replies_denied"] == 1


def test_another_policy_changes_what_is_consumed(rig: Rig) -> None:
    rig.serve(A, B)
    rig.gate.may_listen = lambda topic: topic == A
    rig.downward.policy_changed(rig.now_s)
    rig.wait(WITHDRAW_S)
    assert rig.broker.take() == [("consume", A)]
    rig.gate.may_listen = lambda _: True
    rig.wait(SUBSCRIBE_S)
    rig.downward.policy_changed(rig.now_s)
    assert rig.broker.take() == [("consume", A, B)]


def test_keys_that_do_not_enter_are_counted_and_what_the_targets_lines_let_enter_does(
    rig: Rig,
) -> None:
    rig.gate.into = {A: frozenset({"auth_token"})}
    context = {"request_id": "req-1", "auth_token": "secret", "roles": []}
    origin = BrokerRequest(b"i" * 16, "m", {}, None, None, context, None, None, None, None)
    for topic, allow in ((A, {"request_id", "auth_token"}), (B, {"request_id"})):
        before = rig.downward.counters["context_keys_removed"]
        request = rig.downward._make_request(origin, topic, 0)
        assert json.loads(request.body)["context"].keys() == allow
        removed = context.keys() - allow
        assert rig.downward.counters["context_keys_removed"] == before + len(removed)
        assert rig.gate.removals[-1] == ("in", topic, frozenset(removed))


def test_a_local_programs_context_is_cut_as_a_brokers_is(rig: Rig) -> None:
    context = {"request_id": "req-1", "auth_token": "secret"}
    body = json.dumps({"method": "m", "args": {}, "context": context}).encode()
    request = Request(identity(5), CALL, 1000, 0, "nova", "a", "", body)
    rig.downward.submit_local(request, lambda _: None, rig.now_s)
    (said,) = rig.said()
    assert json.loads(said.body) == {
        "method": "m",
        "args": {},
        "context": {"request_id": "req-1"},
    }
    for number, plain in enumerate((b"nonsense", b"[]", b'{"context": 1}', b'{"context": {}}'), 6):
        request = Request(identity(number), CALL, 1000, 0, "nova", "a", "", plain)
        rig.downward.submit_local(request, lambda _: None, rig.now_s)
        assert rig.said()[0].body == plain


# -------------------------------------------------------------------- a program that repeats itself


def test_a_program_that_repeats_itself_on_a_new_connection_hears_the_answer(rig: Rig) -> None:
    before = rig.local()
    after = rig.local()
    assert len(rig.said()) == 1
    rig.guest(reply())
    assert (before, after) == ([], [Answered(identity(1), False, b"42")])


def test_a_program_may_not_have_the_id_of_what_came_from_the_broker(rig: Rig) -> None:
    rig.deliver("t1", call())
    with pytest.raises(Rejected, match="random"):
        rig.local()


@pytest.mark.parametrize(("flags", "passed_on"), [(0, LOCAL), (REDELIVERED, OUT_OF_TURN)])
def test_what_a_program_asks_is_not_in_the_order_of_the_brokers_queue(
    rig: Rig, flags: int, passed_on: int
) -> None:
    rig.local(flags=flags)
    assert rig.said()[0].flags == flags | passed_on
