"""One VM's requests to the control side: what the broker and the guest are told, and when."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.attack.simulated import stock_reply
from tests.rig.gates import OpenGate
from tests.rig.mail import take_mail
from vchan.errors import LimitExceeded
from vchan.host.oslo_wire.downward_envelope import encode_reply
from vchan.host.oslo_wire.mail import (
    Arrival,
    Note,
    encode_arrival,
    encode_note,
    own_queue,
    read_mail,
)
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.host.policy.rules import Ask, Effect, Verdict
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.handover import NOTE_WAIT_S, SETTLED_S
from vchan.host.vm.upward import (
    ANSWERS_BYTES_MAX,
    ARRIVAL_ID,
    ARRIVE_AGAIN_S,
    CALL_S_MAX,
    EXPECTED_HALVES_S,
    HELD_MAX,
    HELD_S,
    NOTE_ID,
    OPEN_BYTES_MAX,
    RETRY_S,
    Upward,
)
from vchan.rpc.bodies import REDELIVERED_KEY, encode_failure, encode_invocation, encode_json
from vchan.rpc.in_flight import (
    RETENTION_S,
    Answered,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Taken,
)
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FANOUT,
    NO_AGENT,
    NOTIFICATION,
    REDELIVERED,
    REFUSED,
    Cancel,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    decode,
)

VM = "b1b1f4b2-0000-4000-8000-000000000001"
TOO_LARGE = 5000
Told = Callable[[Outcome, float], None]


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Gate(OpenGate):
    """Open, until told otherwise."""

    def __init__(self, *, may_send: bool = True) -> None:
        super().__init__(may_send=may_send)
        self.effect = Effect.ALLOW
        self.record: list[str] = []

    def judge(self, ask: Ask, request_id: bytes) -> Verdict:
        return Verdict(self.effect, "test")

    def refused(self, ask: Ask, request_id: bytes, reason: str) -> None:
        self.record.append(reason)

    def conduct(self, asked: Any, request: Request) -> Any:
        return asked._replace(ask=asked.ask._replace(topic="the-conductor"))


@dataclass
class Sending:
    """A publication whose confirm is owed."""

    id: bytes
    publication: Publication

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(json.loads(self.publication.body)["oslo.message"])
        return message

    @property
    def is_marked(self) -> bool:
        return f"_context_{REDELIVERED_KEY}" in self.message


@dataclass
class Offered:
    """A request that a local program has."""

    request: Request
    told: Told
    cancelled: bool = False


@dataclass
class Rig:
    """An Upward between a guest and a broker that are lists."""

    with_broker: bool = True
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        self.now_s = 1000.0
        self.said: list[Any] = []
        self.published: list[Sending] = []
        self.log: list[Sending] = []
        self.acked: list[Hashable] = []
        self.listens = 0
        self.serves = False
        self.offered: list[Offered] = []
        self.tokens = 0
        broker = self if self.with_broker else None
        self.unread = 0
        self.out = Upward(
            VM, self._send, broker, self.gate, self._offer, "here", lambda: self.unread
        )

    # what is asked of the broker, the guest and the host's programs

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        assert vm == VM
        to = self.log if request_id in (ARRIVAL_ID, NOTE_ID) else self.published
        to.append(Sending(request_id, publication))

    def listen_for_answers(self, vm: str) -> None:
        assert vm == VM
        self.listens += 1

    def ack(self, token: Hashable) -> None:
        self.acked.append(token)

    def _send(self, data: bytes, stream: int) -> None:
        if len(data) > TOO_LARGE:
            raise LimitExceeded("message", len(data), TOO_LARGE, "MESSAGE_BYTES_MAX")
        self.said.append(decode(data))

    def _offer(self, request: Request, told: Told) -> Callable[[], None] | None:
        if not self.serves:
            return None
        offered = Offered(request, told)
        self.offered.append(offered)

        def cancel() -> None:
            offered.cancelled = True

        return cancel

    # what happens

    def opened(self, *, resumed: bool = False, before: str = "") -> None:
        self.out.opened(resumed=resumed, now_s=self.now_s, before=before)

    def arrive(self, *, before: str = "", resumed: bool = False) -> Hashable:
        """The guest is there, and our arrival has gone through the queue."""
        self.opened(before=before, resumed=resumed)
        return self.arrival_comes_back()

    def arrival_comes_back(self) -> Hashable:
        arrivals = [sent for sent in self.log if sent.id == ARRIVAL_ID]
        return self.mail(arrivals[-1].publication.body)

    def mail(self, body: bytes, problem: str = "") -> Hashable:
        self.tokens += 1
        token = f"token {self.tokens}"
        assert problem in take_mail(self.out, token, body, self.now_s)
        return token

    def note(self, note: Note) -> Hashable:
        return self.mail(encode_note(note))

    def answer(self, number: int, result: bytes = b"1", **how: Any) -> Hashable:
        return self.mail(encode_reply(id_of(number).hex(), result_json=result, **how))

    def ask(self, number: int, flags: int = 0, **changes: Any) -> None:
        body = encode_invocation("info" if flags & NOTIFICATION else "work", {"n": number})
        request = Request(id_of(number), flags, 0, 0, "nova", "conductor", "", body)
        self.out.receive(request.changed(**changes), self.now_s)

    def again(self, number: int, flags: int = 0, **changes: Any) -> None:
        self.ask(number, flags | REDELIVERED, **changes)

    def confirm(self, *numbers: int) -> None:
        for number in numbers:
            self.sent(number, ok=True)

    def sent(
        self, number: int, *, ok: bool, unroutable: bool = False, doubtful: bool = False
    ) -> None:
        how = {"ok": ok, "unroutable": unroutable, "doubtful": doubtful}
        self.out.sent(id_of(number), **how, now_s=self.now_s)

    def log_sent(self, log_id: bytes, *, ok: bool, unroutable: bool = False) -> None:
        self.out.sent(log_id, ok=ok, unroutable=unroutable, doubtful=False, now_s=self.now_s)

    def settle(self, *numbers: int) -> None:
        self.out.receive(Settled(tuple(map(id_of, numbers))), self.now_s)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.out.handle_timeout(self.now_s)

    # what came of it

    def take_published(self) -> list[Sending]:
        published, self.published = self.published, []
        return published

    def numbers(self) -> list[int]:
        """The ids published since the last time."""
        return [int.from_bytes(sent.id, "big") for sent in self.take_published()]

    def take_said(self) -> list[Any]:
        said, self.said = self.said, []
        return said

    def take_log(self) -> list[Arrival | Note]:
        log, self.log = self.log, []
        read = [read_mail(sent.publication.body) for sent in log]
        assert all(isinstance(one, Arrival | Note) for one in read)
        return read  # type: ignore[return-value]

    def take_note(self) -> Note:
        (note,) = [one for one in self.take_log() if isinstance(one, Note)]
        return note


@pytest.fixture
def rig() -> Rig:
    """The guest is there, and everything that was written before is read."""
    rig = Rig()
    rig.arrive()
    rig.log.clear()
    return rig


def fresh(**how: Any) -> Rig:
    return Rig(**how)


# -------------------------------------------------------------------- publishing


def test_a_cast_is_receipted_when_the_broker_has_it(rig: Rig) -> None:
    rig.ask(1)
    (sent,) = rig.take_published()
    assert sent.id == id_of(1)
    assert sent.publication.form is Form.TOPIC
    assert sent.message["args"] == {"n": 1}
    assert not sent.is_marked
    assert rig.take_said() == []
    rig.confirm(1)
    assert rig.take_said() == [Receipt(id_of(1))]
    assert rig.out.open_requests == 0


@pytest.mark.parametrize("flags", [FANOUT, NOTIFICATION])
def test_fanouts_and_notifications_are_receipted_likewise(rig: Rig, flags: int) -> None:
    rig.ask(1, flags)
    rig.confirm(1)
    assert rig.take_said() == [Receipt(id_of(1))]


def test_a_repeated_cast_is_published_once(rig: Rig) -> None:
    rig.ask(1)
    rig.again(1)
    rig.confirm(1)
    rig.again(1)
    assert rig.numbers() == [1]
    assert rig.take_said() == [Receipt(id_of(1)), Receipt(id_of(1))]
    rig.settle(1)
    rig.again(1)  # a copy that was under way
    assert rig.numbers() == []


def test_requests_do_not_wait_for_each_other_s_confirms(rig: Rig) -> None:
    for number in (1, 2, 3):
        rig.ask(number)
    assert rig.numbers() == [1, 2, 3]
    rig.confirm(2, 1, 3)
    assert rig.take_said() == [Receipt(id_of(2)), Receipt(id_of(1)), Receipt(id_of(3))]


def test_nobody_serves_it(rig: Rig) -> None:
    rig.ask(1, server="one")
    rig.sent(1, ok=False, unroutable=True)
    (returned,) = rig.take_said()
    assert returned == Returned(id_of(1), NO_AGENT, returned.text)
    assert "nobody serves cast nova/conductor on one" in returned.text
    assert rig.out.open_requests == 0
    rig.ask(1)  # it is forgotten, and may be tried again
    assert len(rig.take_published()) == 2


def test_what_was_refused_goes_again_before_what_is_new(rig: Rig) -> None:
    for number in (1, 2, 3):
        rig.ask(number)
    rig.sent(3, ok=False)
    rig.ask(4)  # 1 and 2 may be refused yet
    rig.sent(1, ok=False)
    rig.confirm(2)
    rig.ask(5)
    assert rig.numbers() == [1, 2, 3]
    rig.wait(RETRY_S - 0.01)
    assert rig.numbers() == []
    rig.wait(0.01)
    assert rig.numbers() == [1, 3, 4, 5]


@pytest.mark.parametrize("doubtful", [True, False])
def test_it_is_marked_if_the_broker_may_have_it(rig: Rig, doubtful: bool) -> None:
    rig.ask(1)
    rig.sent(1, ok=False, doubtful=doubtful)
    rig.wait(RETRY_S)
    first, second = rig.take_published()
    assert (first.is_marked, second.is_marked) == (False, doubtful)
    rig.sent(1, ok=False)  # not even tried this time; but the first may be there
    rig.wait(RETRY_S)
    assert rig.take_published()[0].is_marked is doubtful
    assert rig.out.counters["guest_redelivered"] == 2 * doubtful


def test_what_may_have_run_is_not_said_to_be_unserved(rig: Rig) -> None:
    rig.ask(1)
    rig.sent(1, ok=False, doubtful=True)
    rig.wait(RETRY_S)
    rig.sent(1, ok=False, unroutable=True)
    (returned,) = rig.take_said()
    assert returned.reason == AGENT_GONE
    assert "may have run" in returned.text
    rig.out.suspend(rig.now_s)
    note = rig.take_note()
    assert (note.taken, note.gone) == ((), (id_of(1),))


@given(st.data())
def test_the_order_is_kept_whatever_the_broker_says(data: st.DataObject) -> None:
    """First publications in the order of asking; each try in that order; nothing twice unmarked."""
    rig = fresh()
    rig.arrive()
    asked, refused, over = 0, set[int](), set[int]()
    first: list[int] = []
    for _ in range(data.draw(st.integers(1, 30))):
        under_way = [n for n in first if n not in refused | over]
        match data.draw(st.sampled_from(["ask", "sent", "wait"])):
            case "ask":
                asked += 1
                rig.ask(asked)
            case "sent" if under_way:
                number = data.draw(st.sampled_from(under_way))
                ok, doubtful = data.draw(st.booleans()), data.draw(st.booleans())
                rig.sent(number, ok=ok, doubtful=doubtful and not ok)
                (over if ok else refused).add(number)
            case _:
                rig.wait(RETRY_S)
        tried = rig.numbers()
        assert tried == sorted(tried)
        refused.difference_update(tried)
        first += [number for number in tried if number not in first]
        assert first == sorted(first)
    for number in [n for n in first if n not in refused | over]:
        rig.confirm(number)
    rig.wait(RETRY_S)
    rig.confirm(*rig.numbers())
    assert rig.out.open_requests == 0
    assert len([one for one in rig.take_said() if isinstance(one, Receipt)]) == asked


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize("flags", [0, REDELIVERED])
def test_a_request_that_is_denied(rig: Rig, flags: int) -> None:
    rig.gate.effect = Effect.DENY
    rig.ask(1, flags)
    (returned,) = rig.take_said()
    assert "nova/conductor is denied to this VM by the host's policy" in returned.text
    assert ("may have run" in returned.text) is bool(flags)
    assert returned.reason == (AGENT_GONE if flags else REFUSED)
    assert rig.numbers() == []
    assert rig.out.counters["guest_denied"] == 1


def test_a_request_that_is_malformed(rig: Rig) -> None:
    rig.ask(1, body=b"{}")
    rig.ask(2, NOTIFICATION, body=encode_invocation("info", {"metadata": 1}))
    malformed, bad_notification = rig.take_said()
    assert malformed == Returned(id_of(1), REFUSED, malformed.text)
    assert bad_notification == Returned(id_of(2), REFUSED, bad_notification.text)
    assert rig.numbers() == []
    assert rig.out.open_requests == 0
    assert rig.out.counters["guest_refused"] == 2


def test_values_have_a_limit(rig: Rig) -> None:
    rig.gate.limits = Limits(json_values=100)
    body = json.dumps({"method": "m", "args": {"x": [0] * 200}}).encode()
    rig.ask(1, body=body)
    (returned,) = rig.take_said()
    assert returned.reason == REFUSED
    assert "the request has over 100 values (json_values)" in returned.text


def test_calls_have_a_limit(rig: Rig) -> None:
    rig.gate.limits = Limits(calls_up=2)
    for number in (1, 2, 3):
        rig.ask(number, CALL)
    rig.ask(4)  # a cast is none
    (returned,) = rig.take_said()
    assert returned == Returned(id_of(3), BUSY, returned.text)
    assert rig.gate.record == [returned.text]
    assert rig.numbers() == [1, 2, 4]
    rig.confirm(1)
    rig.answer(1)
    rig.ask(3, CALL)
    assert rig.numbers() == [3]


def test_bytes_have_a_limit_until_they_are_published(rig: Rig) -> None:
    args = {"filling": "x" * (OPEN_BYTES_MAX - 200)}
    rig.ask(1, CALL, body=encode_invocation("work", args))
    rig.ask(2, body=encode_invocation("work", {"filling": "x" * 200}))
    assert rig.take_said()[0].reason == BUSY
    rig.confirm(1)
    rig.ask(2, body=encode_invocation("work", {"filling": "x" * 200}))
    assert rig.take_said() == []


def test_requests_have_a_limit_that_a_reload_may_change(rig: Rig) -> None:
    rig.gate.limits = Limits(requests_up=2)
    for number in (1, 2, 3):
        rig.ask(number)
    (returned,) = rig.take_said()
    assert returned == Returned(id_of(3), BUSY, "2 requests of this VM are not over")
    assert rig.gate.record == [returned.text]
    rig.gate.limits = Limits(requests_up=3)
    rig.ask(3)
    assert rig.numbers() == [1, 2, 3]


def test_answers_that_are_not_read_have_a_limit(rig: Rig) -> None:
    """What is over it stays with the broker, further calls are refused, casts are not."""
    rig.unread = ANSWERS_BYTES_MAX - 100
    assert rig.out.has_room(100)
    assert not rig.out.has_room(101)
    assert rig.out.leave_answers(rig.now_s)
    assert not rig.out.has_room(0)
    assert not rig.out.leave_answers(rig.now_s)  # the channel is closed already
    rig.out.relisten()
    assert rig.listens == 1
    rig.ask(1, CALL)
    rig.ask(2)
    (returned,) = rig.take_said()
    assert (returned.id, returned.reason) == (id_of(1), BUSY)
    assert "wait to be read (ANSWERS_BYTES_MAX)" in returned.text
    assert rig.gate.record == [returned.text]
    assert rig.numbers() == [2]
    rig.unread = ANSWERS_BYTES_MAX // 2 + 1
    rig.wait(1.0)
    assert rig.listens == 1
    rig.unread -= 1
    rig.wait(1.0)
    assert rig.listens == 2
    rig.ask(1, CALL)
    assert rig.numbers() == [1]
    assert rig.out.counters["guest_unread"] == 1


def test_a_large_answer_that_comes_again_is_not_read_again(rig: Rig) -> None:
    """It is acknowledged when the guest settles it, as the first one would have been."""
    rig.ask(1, CALL)
    rig.confirm(1)
    body = stock_reply(id_of(1), "x" * 200_000)
    assert not rig.out.take_again("first", body)
    rig.mail(body)
    assert rig.out.take_again("again", body)
    assert rig.acked == ["token 2"]
    rig.settle(1)
    assert rig.acked == ["token 2", "again"]
    assert not rig.out.take_again("late", body)
    assert not rig.out.take_again("small", encode_reply(id_of(2).hex(), result_json=b"1"))


def test_an_answer_that_alone_is_over_the_limit_passes(rig: Rig) -> None:
    assert rig.out.has_room(ANSWERS_BYTES_MAX + 1)
    rig.unread = 1
    assert not rig.out.has_room(ANSWERS_BYTES_MAX + 1)


def test_who_is_away_is_given_no_answers_until_it_is_back(rig: Rig) -> None:
    rig.unread = ANSWERS_BYTES_MAX
    rig.out.leave_answers(rig.now_s)
    rig.out.relisten()
    rig.out.disconnected()
    rig.unread = 0  # it hung up, and what waited for it is given up
    rig.wait(1.0)
    assert rig.listens == 1
    rig.opened()
    assert rig.listens == 2


def test_calls_with_large_answers_go_as_there_is_room_for_these(rig: Rig) -> None:
    rig.ask(1, CALL)
    rig.confirm(1)
    large = encode_json("x" * (2 * ANSWERS_BYTES_MAX // 5))
    rig.answer(1, large)
    assert rig.numbers() == [1]
    for number in (2, 3, 4, 5):
        rig.ask(number, CALL)
        rig.confirm(number)
    assert rig.numbers() == [2, 3]  # a third answer would not fit
    due_s = rig.out.next_timeout()
    assert due_s is not None and due_s > rig.now_s  # nothing is due for ever
    rig.unread = len(large)
    rig.answer(2, large)
    rig.wait(1.0)
    assert rig.numbers() == []
    rig.unread = 0
    rig.wait(1.0)
    assert rig.numbers() == [4]
    rig.wait(10 * EXPECTED_HALVES_S)  # such answers are forgotten
    assert rig.numbers() == [5]


def test_an_answer_of_a_program_here_that_nobody_reads_is_a_failure(rig: Rig) -> None:
    rig.serves = True
    rig.ask(1, CALL)
    rig.unread = OPEN_BYTES_MAX
    rig.offered[0].told(Answered(id_of(1), False, b"1"), rig.now_s)
    (reply,) = rig.take_said()
    assert json.loads(reply.body)["class"] == "LimitExceeded"


def test_what_is_over_the_limit_here_may_have_run_by_another_host(rig: Rig) -> None:
    rig.gate.limits = Limits(requests_up=1)
    rig.ask(1)
    rig.ask(2, REDELIVERED)
    (returned,) = rig.take_said()
    assert (returned.id, returned.reason) == (id_of(2), AGENT_GONE)
    assert returned.text.endswith("are not over; it may have run before")


def test_the_conductor_gets_what_is_for_it(rig: Rig) -> None:
    rig.gate.effect = Effect.CONDUCTOR
    rig.serves = True
    rig.ask(1)
    assert rig.offered == []
    assert rig.take_published()[0].publication.routing_key == "the-conductor"


# -------------------------------------------------------------------- calls and answers


def test_a_call_s_answer_is_the_broker_s_until_the_guest_has_it(rig: Rig) -> None:
    rig.ask(1, CALL)
    rig.confirm(1)
    assert rig.take_said() == []
    token = rig.answer(1, b'{"a": 1}')
    (reply,) = rig.take_said()
    assert (reply.id, reply.body) == (id_of(1), b'{"a":1}')
    assert token not in rig.acked
    rig.settle(1)
    assert rig.acked.count(token) == 1


def test_an_answer_before_its_confirm(rig: Rig) -> None:
    rig.ask(1, CALL)
    rig.answer(1)
    assert len(rig.take_said()) == 1
    rig.confirm(1)
    assert rig.take_said() == []
    assert rig.out.open_requests == 0


def test_an_answer_to_a_call_that_is_to_be_published_again(rig: Rig) -> None:
    rig.ask(1, CALL)
    rig.sent(1, ok=False, doubtful=True)
    rig.numbers()
    token = rig.answer(1)
    rig.wait(RETRY_S)
    assert rig.numbers() == []
    assert len(rig.take_said()) == 1
    rig.settle(1)
    assert token in rig.acked


def test_heartbeats(rig: Rig) -> None:
    rig.ask(1, CALL)
    rig.confirm(1)
    token = rig.answer(1, ending=False)
    (beat,) = rig.take_said()
    assert isinstance(beat, Reply)
    assert not beat.flags
    assert token in rig.acked
    assert rig.out.open_requests == 1
    assert rig.answer(2, ending=False) in rig.acked  # of nothing that is known
    assert rig.take_said() == []


def test_a_failure(rig: Rig) -> None:
    rig.ask(1, CALL)
    rig.confirm(1)
    rig.answer(1, failure_json=encode_failure("ValueError", "no", traceback=["secret"]))
    (reply,) = rig.take_said()
    assert json.loads(reply.body)["message"] == "no"
    assert b"secret" not in reply.body


def test_an_answer_that_the_guest_does_not_take(rig: Rig) -> None:
    rig.ask(1, CALL)
    rig.confirm(1)
    rig.answer(1, b'"' + b"x" * TOO_LARGE + b'"')
    (reply,) = rig.take_said()
    assert json.loads(reply.body)["class"] == "LimitExceeded"


def test_an_answer_that_comes_twice(rig: Rig) -> None:
    """The channel was lost; or the call was published twice, and so answered twice."""
    rig.ask(1, CALL)
    rig.confirm(1)
    first = rig.answer(1)
    second = rig.answer(1)
    assert len(rig.take_said()) == 1
    assert first in rig.acked
    assert second not in rig.acked
    rig.settle(1)
    assert second in rig.acked
    assert rig.answer(1) in rig.acked  # and once more: it is over


def test_an_answer_that_nobody_waits_for(rig: Rig) -> None:
    rig.ask(1, CALL)
    rig.confirm(1)
    rig.out.receive(Cancel(id_of(1)), rig.now_s)
    assert rig.answer(1) in rig.acked
    assert rig.take_said() == []


def test_an_answer_that_the_guest_asks_for_later(rig: Rig) -> None:
    token = rig.answer(1)
    assert token not in rig.acked
    rig.again(1, CALL)
    assert len(rig.take_said()) == 1
    assert rig.numbers() == []
    assert token not in rig.acked
    rig.settle(1)
    assert token in rig.acked


@pytest.mark.parametrize("claimed", [True, False])
def test_an_answer_is_held_for_a_while_only(rig: Rig, claimed: bool) -> None:
    if claimed:
        rig.ask(1, CALL)
        rig.confirm(1)
    token = rig.answer(1)
    assert rig.out.next_timeout() is not None
    rig.wait(HELD_S - 0.01)
    assert token not in rig.acked
    rig.wait(0.01)
    assert token in rig.acked
    rig.take_said()
    rig.again(1, CALL)
    (said,) = rig.take_said()
    if claimed:
        assert isinstance(said, Reply)  # still known here, if not to the broker
    else:
        assert said == Returned(id_of(1), AGENT_GONE, said.text)
    rig.log.clear()
    rig.out.suspend(rig.now_s)
    assert rig.take_note().gone == (id_of(1),)


def test_only_so_many_answers_are_held(rig: Rig) -> None:
    tokens = [rig.answer(number) for number in range(HELD_MAX + 3)]
    assert [token for token in tokens if token in rig.acked] == tokens[:3]


def test_a_call_has_a_time(rig: Rig) -> None:
    rig.ask(1, CALL)
    rig.ask(2, CALL, timeout_ms=2000)
    rig.ask(3, CALL, timeout_ms=int(CALL_S_MAX * 1000) + 1)
    expirations = [sent.publication.expiration_ms for sent in rig.take_published()]
    assert expirations == [CALL_S_MAX * 1000, 2000, CALL_S_MAX * 1000]
    rig.wait(2.0)
    assert rig.out.open_requests == 2
    assert rig.out.counters["guest_expired"] == 1
    rig.wait(CALL_S_MAX)
    assert rig.out.open_requests == 0


def test_the_time_in_the_queue_counts(rig: Rig) -> None:
    rig.ask(1, CALL, timeout_ms=10_000)
    rig.sent(1, ok=False)
    rig.numbers()
    rig.wait(RETRY_S)
    assert rig.take_published()[0].publication.expiration_ms == 9000


def test_mail_that_is_nothing_is_dropped_and_told(rig: Rig) -> None:
    token = rig.mail(b"{}", "_msg_id is not 32 hex digits")
    assert rig.acked[-1] == token


# -------------------------------------------------------------------- withdrawn


def test_what_is_withdrawn_before_it_is_published(rig: Rig) -> None:
    for number in (1, 2, 3):
        rig.ask(number)
    rig.numbers()
    rig.sent(1, ok=False)
    rig.ask(4)
    rig.out.receive(Cancel(id_of(1)), rig.now_s)
    rig.out.receive(Cancel(id_of(4)), rig.now_s)
    rig.sent(2, ok=False)
    rig.confirm(3)
    rig.wait(RETRY_S)
    assert rig.numbers() == [2]


def test_what_is_withdrawn_while_it_is_published(rig: Rig) -> None:
    rig.ask(1)
    rig.out.receive(Cancel(id_of(1)), rig.now_s)
    rig.confirm(1)
    assert rig.take_said() == []
    rig.ask(2)
    rig.out.receive(Cancel(id_of(2)), rig.now_s)
    rig.sent(2, ok=False)
    rig.wait(RETRY_S)
    assert rig.numbers() == [1, 2]


# -------------------------------------------------------------------- programs of this host


def test_a_local_program_takes_a_cast(rig: Rig) -> None:
    rig.serves = True
    rig.ask(1)
    assert rig.numbers() == []
    rig.offered[0].told(Taken(id_of(1)), rig.now_s)
    assert rig.take_said() == [Receipt(id_of(1))]
    rig.offered[0].told(Taken(id_of(1)), rig.now_s)
    assert rig.take_said() == []
    assert rig.out.counters["guest_local"] == 1


def test_a_local_program_answers_a_call(rig: Rig) -> None:
    rig.serves = True
    rig.ask(1, CALL)
    rig.offered[0].told(Heartbeat(id_of(1)), rig.now_s)
    rig.offered[0].told(Answered(id_of(1), False, b"1"), rig.now_s)
    beat, reply = rig.take_said()
    assert (beat.flags, reply.body) == (0, b"1")


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [(HandedBack(id_of(1), NO_AGENT, "it left"), NO_AGENT), (Overdue(id_of(1)), EXPIRED)],
)
def test_a_local_program_that_does_not(rig: Rig, outcome: Outcome, reason: int) -> None:
    rig.serves = True
    rig.ask(1, CALL)
    rig.offered[0].told(outcome, rig.now_s)
    assert rig.take_said()[0].reason == reason
    assert rig.out.open_requests == 0


def test_a_cast_that_a_local_program_took_with_it(rig: Rig) -> None:
    rig.serves = True
    rig.ask(1)
    rig.offered[0].told(HandedBack(id_of(1), AGENT_GONE, "it died"), rig.now_s)
    assert rig.take_said() == [Returned(id_of(1), AGENT_GONE, "it died")]
    rig.out.suspend(rig.now_s)
    note = rig.take_note()
    assert (note.taken, note.gone) == ((), (id_of(1),))


def test_a_local_program_hears_that_nobody_waits(rig: Rig) -> None:
    rig.serves = True
    rig.ask(1, CALL)
    rig.ask(2, CALL)
    rig.out.receive(Cancel(id_of(1)), rig.now_s)
    assert [each.cancelled for each in rig.offered] == [True, False]
    rig.out.suspend(rig.now_s)
    rig.out.release()
    assert rig.offered[1].cancelled


def test_without_a_broker() -> None:
    rig = fresh(with_broker=False)
    rig.opened(before="there")
    rig.again(1)
    assert rig.take_said()[0].reason == NO_AGENT
    rig.serves = True
    rig.ask(2)
    rig.offered[0].told(Taken(id_of(2)), rig.now_s)
    rig.settle(2)
    rig.out.suspend(rig.now_s)
    rig.out.relisten()
    rig.out.release()
    assert rig.take_said() == [Receipt(id_of(2))]


def test_local_answers_are_in_no_queue(rig: Rig) -> None:
    """So the next host must not wait for them; and casts that a program has may have run."""
    rig.serves = True
    rig.ask(1, CALL)
    rig.ask(2, CALL)
    rig.ask(3)
    rig.offered[0].told(Answered(id_of(1), False, b"1"), rig.now_s)
    rig.out.suspend(rig.now_s)
    note = rig.take_note()
    assert set(note.gone) == {id_of(1), id_of(2)}
    assert (note.calls, note.doubt) == ((), (id_of(3),))


def test_a_program_is_told_that_a_host_without_a_broker_may_have_had_the_request() -> None:
    """Such a host leaves nothing in the queue, and a new guest's daemon does not know of it."""
    for before, is_repeated in (("", True), ("", False), ("there", False)):
        rig = fresh()
        rig.serves = True
        rig.arrive(before=before)
        rig.ask(1, REDELIVERED if is_repeated else 0)
        context = json.loads(rig.offered[0].request.body)["context"]
        assert (REDELIVERED_KEY in context) == is_repeated


# -------------------------------------------------------------------- arriving


def test_it_publishes_when_its_arrival_has_come_back() -> None:
    rig = fresh()
    rig.opened()
    assert rig.listens == 1
    (arrival,) = rig.log
    assert arrival.publication[:3] == (Form.MAIL, "", own_queue(VM))
    assert arrival.publication.mandatory  # the queue may not be there yet
    rig.ask(1)
    rig.log_sent(ARRIVAL_ID, ok=True)
    assert rig.numbers() == []
    token = rig.arrival_comes_back()
    assert rig.numbers() == [1]
    assert token not in rig.acked  # it stays there, for who comes if we die
    rig.out.relisten()
    assert rig.arrival_comes_back() not in rig.acked


def test_it_does_not_wait_for_ever() -> None:
    rig = fresh()
    rig.opened()
    rig.ask(1)
    assert rig.out.next_timeout() == rig.now_s + NOTE_WAIT_S
    rig.wait(NOTE_WAIT_S - 0.01)
    assert rig.numbers() == []
    rig.wait(0.01)
    assert rig.numbers() == [1]


@pytest.mark.parametrize(("unroutable", "after_s"), [(True, ARRIVE_AGAIN_S), (False, RETRY_S)])
def test_an_arrival_that_did_not_get_there_goes_again(unroutable: bool, after_s: float) -> None:
    rig = fresh()
    rig.opened()
    rig.log_sent(ARRIVAL_ID, ok=False, unroutable=unroutable)
    assert rig.out.next_timeout() == rig.now_s + after_s
    rig.wait(after_s)
    assert len(rig.log) == 2
    rig.arrival_comes_back()
    rig.log_sent(ARRIVAL_ID, ok=False)  # the second; the first has come back
    rig.wait(RETRY_S)
    assert len(rig.log) == 2


def test_a_vm_that_may_send_nothing_needs_no_queue() -> None:
    rig = fresh(gate=Gate(may_send=False))
    rig.opened()
    assert (rig.listens, rig.log, rig.out.next_timeout()) == (0, [], None)
    rig.out.suspend(rig.now_s)
    rig.out.release()
    assert rig.log == []
    rig.opened(resumed=True)
    rig.ask(1)  # by now it may
    assert rig.listens == 1
    rig.arrival_comes_back()
    assert rig.numbers() == [1]


def test_what_was_written_before_is_taken_out_of_the_queue() -> None:
    rig = fresh()
    rig.opened()
    before = [rig.mail(encode_arrival(Arrival("there.1"))), rig.note(Note(("there.1",)))]
    assert rig.acked == []  # not before our own arrival is there
    rig.arrival_comes_back()
    assert rig.acked == before
    after = [rig.mail(encode_arrival(Arrival("next.1"))), rig.note(Note(("next.1",)))]
    assert not set(after) & set(rig.acked)  # for who comes after us


def test_what_an_earlier_host_took_is_receipted_and_not_published() -> None:
    rig = fresh()
    rig.opened(before="there")
    rig.again(1)
    rig.mail(encode_arrival(Arrival("there.1")))
    rig.note(Note(("there.1",), taken=(id_of(1),)))
    rig.arrival_comes_back()
    assert rig.numbers() == []
    assert rig.take_said() == [Receipt(id_of(1))]


def test_what_an_earlier_host_called_is_waited_for() -> None:
    rig = fresh()
    rig.opened(before="there")
    rig.note(Note(("there.1",), calls=(id_of(1), id_of(2)), gone=(id_of(3),)))
    token = rig.answer(1)
    rig.arrival_comes_back()
    for number in (1, 2, 3):
        rig.again(number, CALL)
    reply, gone = rig.take_said()
    assert (reply.id, gone.id, gone.reason) == (id_of(1), id_of(3), AGENT_GONE)
    rig.answer(2)
    assert rig.take_said()[0].id == id_of(2)
    assert rig.numbers() == []
    assert rig.out.open_requests == 0
    rig.settle(1)
    assert token in rig.acked


def test_what_no_earlier_host_published_is_published_unmarked() -> None:
    rig = fresh()
    rig.opened(before="there")
    rig.again(1)
    rig.mail(encode_arrival(Arrival("there.1")))
    rig.note(Note(("there.1",)))
    rig.arrival_comes_back()
    (sent,) = rig.take_published()
    assert not sent.is_marked


def test_what_an_earlier_host_does_not_know_is_marked() -> None:
    rig = fresh()
    rig.arrive()
    rig.note(Note(("there.1",), doubt=(id_of(1),), is_last=False))
    rig.again(1)
    rig.again(2)
    assert rig.numbers() == []  # a better note may follow
    rig.wait(NOTE_WAIT_S)
    first, second = rig.take_published()
    assert (first.is_marked, second.is_marked) == (True, False)


def test_a_better_note() -> None:
    rig = fresh()
    rig.arrive()
    rig.note(Note(("there.1",), doubt=(id_of(1),), is_last=False))
    rig.again(1)
    rig.note(Note(("there.1",), taken=(id_of(1),)))
    assert rig.numbers() == []
    assert rig.take_said() == [Receipt(id_of(1))]


@pytest.mark.parametrize("arrived", [True, False])
def test_a_host_that_left_no_note_is_waited_for_and_then_in_doubt(arrived: bool) -> None:
    """It died; it may even be that the queue was lost with all that was in it."""
    rig = fresh()
    rig.opened(before="there")
    if arrived:
        rig.mail(encode_arrival(Arrival("there.1")))
    rig.arrival_comes_back()
    rig.ask(1)
    assert rig.numbers() == [1]  # it is new: nobody has published it
    rig.again(2)
    rig.ask(3)
    assert rig.numbers() == []
    rig.wait(NOTE_WAIT_S)
    sent = rig.take_published()
    assert [(one.id, one.is_marked) for one in sent] == [(id_of(2), True), (id_of(3), False)]


def test_a_note_that_comes_in_time() -> None:
    rig = fresh()
    rig.opened(before="there")
    rig.mail(encode_arrival(Arrival("there.1")))
    rig.arrival_comes_back()
    rig.again(1)
    rig.again(2)
    rig.note(Note(("there.1",), taken=(id_of(1),)))
    (sent,) = rig.take_published()
    assert (sent.id, sent.is_marked) == (id_of(2), False)
    assert rig.take_said() == [Receipt(id_of(1))]


def test_who_is_new_with_a_new_guest_has_no_doubt() -> None:
    rig = fresh()
    rig.arrive()  # an empty queue; and the guest knows of no host
    rig.again(1)
    assert not rig.take_published()[0].is_marked


def test_hosts_that_had_the_vm_for_a_moment() -> None:
    """None of them is missed, whatever they knew themselves."""
    rig = fresh()
    rig.opened(before="b")
    rig.again(1)
    rig.mail(encode_arrival(Arrival("a.1")))
    rig.note(Note(("a.1",), taken=(id_of(1),)))
    rig.mail(encode_arrival(Arrival("b.1")))
    rig.note(Note(("b.1",), unclear=("a.1", "z.1"), waited_ms=(0, 0)))
    rig.arrival_comes_back()
    assert rig.take_said() == [Receipt(id_of(1))]
    rig.again(2)
    assert rig.numbers() == []  # "z.1" has left no note, and its arrival is gone
    rig.note(Note(("z.1",)))
    assert not rig.take_published()[0].is_marked


def test_a_note_that_is_lacking_is_waited_for_once_by_all_hosts_together() -> None:
    rig = fresh()
    rig.opened(before="there")
    rig.mail(encode_arrival(Arrival("there.1")))
    rig.note(Note(("there.1",), unclear=("dead.1",), waited_ms=(3000,)))
    rig.arrival_comes_back()
    rig.again(1)
    rig.wait(0.5)
    rig.ask(2)
    assert rig.numbers() == []
    rig.out.suspend(rig.now_s)
    note = rig.take_note()
    assert (note.unclear, note.waited_ms) == (("dead.1",), (3500,))
    rig.opened(resumed=True)  # it stays
    rig.arrival_comes_back()
    rig.wait(1.49)
    assert rig.numbers() == []
    rig.wait(0.01)
    rig.ask(3)
    assert [sent.is_marked for sent in rig.take_published()] == [True, True, False]


def test_a_note_that_has_doubts_and_is_the_last_is_not_waited_for() -> None:
    rig = fresh()
    rig.opened(before="there")
    rig.mail(encode_arrival(Arrival("there.1")))
    rig.note(Note(("there.1",), doubt=(id_of(1),)))
    rig.arrival_comes_back()
    rig.again(1)
    assert [sent.is_marked for sent in rig.take_published()] == [True]


def test_the_guest_has_settled_down() -> None:
    """Whatever it sends again by then, it has sent to us for the first time."""
    rig = fresh()
    rig.opened(before="there")
    rig.arrival_comes_back()
    rig.wait(SETTLED_S - 0.01)
    rig.again(1)
    rig.wait(0.01)
    rig.again(2)
    assert [sent.is_marked for sent in rig.take_published()] == [True, False]


# -------------------------------------------------------------------- leaving


def test_the_note(rig: Rig) -> None:
    rig.ask(1)
    rig.ask(2, CALL)
    rig.ask(3, CALL)
    rig.ask(4)
    rig.ask(5)
    rig.confirm(1, 2, 3, 4)
    rig.answer(3)
    rig.settle(4)
    rig.sent(5, ok=False, doubtful=True)
    rig.ask(6)  # held up behind 5
    rig.out.suspend(rig.now_s)
    note = rig.take_note()
    assert note.taken == (id_of(1),)
    assert set(note.calls) == {id_of(2), id_of(3)}
    assert (note.gone, note.doubt, note.unclear) == ((), (id_of(5),), ())
    assert note.stays[0].startswith("here.")
    rig.out.suspend(rig.now_s)
    assert rig.log == []  # once
    rig.wait(RETRY_S)
    rig.ask(7)
    assert rig.numbers() == [1, 2, 3, 4, 5]  # and nothing more


def test_the_note_has_what_earlier_notes_had() -> None:
    rig = fresh()
    rig.opened(before="there")
    rig.mail(encode_arrival(Arrival("dead.1")))
    rig.note(Note(("there.1",), (id_of(1),), (id_of(2),), (id_of(3),), (id_of(4),)))
    rig.arrival_comes_back()
    rig.settle(1)
    rig.log.clear()
    rig.out.suspend(rig.now_s)
    note = rig.take_note()
    assert note[1:] == ((), (id_of(2),), (id_of(3),), (id_of(4),), ("dead.1",), (0,), True)


def test_the_note_waits_for_the_broker_s_word(rig: Rig) -> None:
    for number in (1, 2, 3):
        rig.ask(number)
    rig.out.suspend(rig.now_s)
    rig.confirm(1)
    rig.sent(2, ok=False, doubtful=True)
    assert rig.log == []
    rig.sent(3, ok=False)
    note = rig.take_note()
    assert (note.taken, note.doubt) == ((id_of(1),), (id_of(2),))


def test_a_vm_that_is_let_go_before_the_broker_has_spoken(rig: Rig) -> None:
    """The note says so at once; a better one follows, if there is still time."""
    rig.ask(1)
    rig.ask(2, CALL)
    rig.confirm(2)
    rig.out.suspend(rig.now_s)
    rig.out.release()
    note = rig.take_note()
    assert (note.calls, note.doubt) == ((id_of(2),), (id_of(1),))
    rig.confirm(1)
    note = rig.take_note()
    assert (note.calls, note.taken, note.doubt) == ((id_of(2),), (id_of(1),), ())


def test_a_note_that_did_not_get_there_goes_again(rig: Rig) -> None:
    rig.out.suspend(rig.now_s)
    rig.take_note()
    rig.log_sent(NOTE_ID, ok=False)
    assert rig.out.next_timeout() == rig.now_s + RETRY_S
    rig.wait(RETRY_S)
    rig.take_note()
    rig.log_sent(NOTE_ID, ok=True)
    rig.wait(RETRY_S)
    assert rig.log == []


def test_a_host_that_never_saw_the_guest_leaves_no_note() -> None:
    rig = fresh()
    rig.out.suspend(rig.now_s)
    rig.out.release()
    assert rig.log == []


def test_the_guest_comes_back(rig: Rig) -> None:
    rig.ask(1)
    rig.out.suspend(rig.now_s)
    rig.confirm(1)
    note = rig.take_note()
    rig.ask(2)  # the last that it said before
    rig.opened(resumed=True)
    assert isinstance(rig.take_log()[0], Arrival)
    rig.ask(3)
    assert rig.numbers() == [1]  # its note lies in the queue: it would not be true
    ours = rig.note(note)
    rig.mail(encode_arrival(Arrival(rig.out._history.stay)))
    assert ours in rig.acked
    assert [(sent.id, sent.is_marked) for sent in rig.take_published()] == [
        (id_of(2), False),
        (id_of(3), False),
    ]


def test_a_guest_that_comes_back_may_have_been_elsewhere(rig: Rig) -> None:
    rig.out.suspend(rig.now_s)
    rig.ask(1)
    rig.ask(2)
    rig.ask(3)
    rig.log.clear()
    rig.opened(resumed=True)
    rig.note(Note(("there.1",), taken=(id_of(1),), unclear=("dead.1",), waited_ms=(0,)))
    rig.arrival_comes_back()
    assert rig.take_said() == [Receipt(id_of(1))]
    rig.wait(NOTE_WAIT_S)
    assert [sent.is_marked for sent in rig.take_published()] == [True, True]


def test_a_guest_that_comes_back_after_hours(rig: Rig) -> None:
    """The note says what is forgotten by then."""
    rig.ask(1)
    rig.confirm(1)
    rig.out.suspend(rig.now_s)
    note = rig.take_note()
    rig.wait(RETENTION_S)
    rig.opened(resumed=False)
    rig.note(note)
    rig.arrival_comes_back()
    rig.take_said()
    rig.again(1)
    assert rig.take_said() == [Receipt(id_of(1))]
    assert rig.numbers() == [1]


def test_a_note_that_is_due_is_not_left_when_the_guest_is_back(rig: Rig) -> None:
    rig.ask(1)
    rig.out.suspend(rig.now_s)
    rig.opened(resumed=True)
    rig.confirm(1)
    assert [type(one) for one in rig.take_log()] == [Arrival]


def test_a_new_session_begins_a_new_stay(rig: Rig) -> None:
    """The guest may have been elsewhere without our knowing."""
    rig.wait(1.0)
    rig.arrive()
    first, second = rig.out._history.stays()
    assert rig.acked == ["token 1"]  # the first arrival: the second stands for us now
    rig.log.clear()
    rig.out.suspend(rig.now_s)
    assert rig.take_note().stays == (first, second)


def test_a_session_that_goes_on_is_nothing_new(rig: Rig) -> None:
    rig.opened(resumed=True)
    assert rig.log == []


@pytest.mark.parametrize(
    ("what", "noted"),
    [("queued", ""), ("sending", "doubt"), ("sent", "calls"), ("refused", ""), ("doubt", "doubt")],
)
def test_a_host_s_clock_ends_nothing_for_the_guest(rig: Rig, what: str, noted: str) -> None:
    """The guest's may have stood still: it may ask the next host, which must know what was."""
    if what == "queued":
        rig.ask(9)
        rig.sent(9, ok=False)
    rig.ask(1, CALL if what == "sent" else 0, timeout_ms=100)
    if what == "sent":
        rig.confirm(1)
    elif what in ("refused", "doubt"):
        rig.sent(1, ok=False, doubtful=what == "doubt")
    rig.wait(0.2)
    assert rig.out.counters["guest_expired"] == 1
    rig.out.suspend(rig.now_s)
    if what == "sending":
        rig.out.release()
    note = rig.take_note()
    for name in ("taken", "calls", "gone", "doubt"):
        assert (id_of(1) in getattr(note, name)) is (name == noted)


def test_relisten_after_the_host_closed_the_channel(rig: Rig) -> None:
    rig.out.relisten()
    assert rig.listens == 2
    rig.out.suspend(rig.now_s)
    rig.out.relisten()
    assert rig.listens == 2
    rig.opened(resumed=True)
    assert rig.listens == 3


def test_the_summary(rig: Rig) -> None:
    rig.ask(1, CALL)
    summary: Mapping[str, Any] = rig.out.summary()
    assert (summary["open"], summary["calls"], summary["guest_requests"]) == (1, 1, 1)


# -------------------------------------------------------------------- everything at once


@given(st.data())
def test_hosts_in_a_row_publish_everything_and_nothing_twice_unmarked(data: st.DataObject) -> None:
    """A guest, its queue, and one host after the other: each may die without a note."""
    queue: list[bytes] = []
    run: dict[int, list[bool]] = {}
    open_numbers: set[int] = set()
    asked = 0
    before = ""

    def play(rig: Rig) -> None:
        for sent in rig.take_published():
            number = int.from_bytes(sent.id, "big")
            run.setdefault(number, []).append(sent.is_marked)
            if data.draw(st.integers(0, 3)):
                rig.confirm(number)
        queue.extend(sent.publication.body for sent in rig.log)
        rig.log.clear()
        for said in rig.take_said():
            assert isinstance(said, Receipt)
            open_numbers.discard(int.from_bytes(said.id, "big"))

    for host in range(data.draw(st.integers(1, 4))):
        rig = Rig()
        rig.out.host = f"host{host}"
        rig.opened(before=before)
        before = "some"
        held = []
        for number in sorted(open_numbers):
            rig.again(number)
        play(rig)
        while queue:
            held.append((rig.mail(queue[0]), queue.pop(0)))
            play(rig)
        for _ in range(data.draw(st.integers(0, 4))):
            asked += 1
            open_numbers.add(asked)
            rig.ask(asked)
            play(rig)
        rig.wait(NOTE_WAIT_S)
        play(rig)
        if data.draw(st.booleans()):
            rig.out.suspend(rig.now_s)
            rig.out.release()
            play(rig)
        back = [body for token, body in held if token not in rig.acked]
        queue[:0] = back
    for number, marks in run.items():
        assert all(marks[1:]), (number, marks)


def test_a_local_program_is_told_who_asks_by_the_host_and_not_by_the_guest(rig: Rig) -> None:
    """It once got the guest's own word for it."""
    rig.serves = True
    forged = {"vchan_instance_uuid": "forged", "is_admin": True, "auth_token": "t"}
    body = json.dumps({"method": "m", "args": {"x": 1}, "version": "1.1", "context": forged})
    request = Request(id_of(1), CALL, 60_000, 0, "openstack", "control", "", body.encode())
    rig.out.receive(request, rig.now_s)
    told = json.loads(rig.offered[0].request.body)
    assert told == {
        "method": "m",
        "args": {"x": 1},
        "namespace": None,
        "version": "1.1",
        "context": {},
    }
