"""Requests in flight: each cast taken once, each call delivered once and given its own answer."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from vchan.errors import LimitExceeded, Rejected
from vchan.rpc import in_flight
from vchan.rpc.in_flight import (
    RETENTION_S,
    SETTLED_KEEP_S,
    SETTLED_MAX,
    Answered,
    Cancelled,
    Deliver,
    Delivery,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Requester,
    Responder,
    Taken,
)
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FINAL,
    IN_PLACE,
    NO_AGENT,
    OUT_OF_TURN,
    RAW,
    REDELIVERED,
    REFUSED,
    BadMessage,
    Cancel,
    Holding,
    Message,
    Receipt,
    Reply,
    Request,
    Unknown,
    decode,
)
from vchan.wire.frames import RAW_BODIES


class Line:
    """A requester and a responder, and what is under way between them, in one order each way."""

    def __init__(self, **limits: int) -> None:
        self.now_s = 1000.0
        self.size_max = 10**9
        self.to_responder: deque[bytes] = deque()
        self.to_requester: deque[bytes] = deque()
        self.requester = Requester(self.send_request)
        self.responder = Responder(self.send_answer, **limits)  # type: ignore[arg-type]
        self.outcomes: list[Outcome] = []
        self.deliveries: list[Delivery] = []
        self.no_raw = ""
        self.requester.opened(self.now_s, takes_raw=RAW_BODIES)

    def send_request(self, message: bytes, stream: int) -> None:
        self.check_size(message)
        self.to_responder.append(message)

    def send_answer(self, message: bytes, stream: int) -> None:
        self.check_size(message)
        self.to_requester.append(message)

    def check_size(self, message: bytes) -> None:
        """Only what carries a body can be too large: MESSAGE_BYTES_MIN covers everything else."""
        if len(message) > self.size_max and isinstance(message_in(message), Request | Reply):
            raise LimitExceeded("message", len(message), self.size_max, "MESSAGE_BYTES_MAX")

    def forth(self) -> list[Delivery]:
        """Everything to the responder."""
        before = len(self.deliveries)
        while self.to_responder:
            message = message_in(self.to_responder.popleft())
            self.deliveries += self.responder.receive(message, self.now_s)
        return self.deliveries[before:]

    def back(self) -> list[Outcome]:
        """Everything to the requester."""
        before = len(self.outcomes)
        while self.to_requester:
            self.outcomes += self.requester.receive(message_in(self.to_requester.popleft()))
        return self.outcomes[before:]

    def new_session(self) -> None:
        """All that was under way is lost."""
        self.to_responder.clear()
        self.to_requester.clear()
        takes_raw = 0 if self.no_raw else RAW_BODIES
        self.requester.opened(self.now_s, takes_raw=takes_raw, no_raw=self.no_raw)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.outcomes += self.requester.handle_timeout(self.now_s)
        self.deliveries += self.responder.handle_timeout(self.now_s)


def message_in(data: bytes) -> Message:
    message = decode(data)
    assert not isinstance(message, BadMessage | Unknown)
    return message


def number(n: int) -> bytes:
    return n.to_bytes(16, "big")


def call(n: int, *, timeout_s: float = 0.0, body: bytes = b"?", topic: str = "topic") -> Request:
    return Request(number(n), CALL, int(timeout_s * 1000), 0, "", topic, "", body)


def cast(n: int, *, timeout_s: float = 0.0, body: bytes = b"!", topic: str = "topic") -> Request:
    return call(n, timeout_s=timeout_s, body=body, topic=topic).changed(flags=0)


# ---------------------------------------------------------------- the plain way


def test_a_cast_is_delivered_and_taken() -> None:
    line = Line()
    line.requester.submit(cast(1), line.now_s)
    assert line.forth() == [Deliver(cast(1))]
    assert number(1) in line.responder and len(line.responder) == 1
    assert line.responder.take(number(1), line.now_s)
    assert line.back() == [Taken(number(1))]
    assert len(line.requester) == len(line.responder) == 0
    assert not line.responder.take(number(1), line.now_s)


def test_a_call_is_delivered_and_answered() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.requester.submit(call(2), line.now_s)
    assert line.requester.open_requests() == [call(1), call(2)]
    line.forth()
    line.responder.heartbeat(number(2), line.now_s)
    line.responder.heartbeat(number(2), line.now_s)  # too soon: not said again
    assert line.responder.answer(number(2), b"two", failed=False, now_s=line.now_s)
    assert line.responder.answer(number(1), b"one", failed=True, now_s=line.now_s)
    assert not line.responder.answer(number(1), b"again", failed=False, now_s=line.now_s)
    assert line.back() == [
        Heartbeat(number(2)),
        Answered(number(2), False, b"two"),
        Answered(number(1), True, b"one"),
    ]
    line.responder.heartbeat(number(1), line.now_s)
    assert not line.to_requester


def test_a_request_is_given_back() -> None:
    line = Line()
    line.requester.submit(cast(1), line.now_s)
    line.forth()
    assert line.responder.give_back(number(1), NO_AGENT, "nobody")
    assert not line.responder.give_back(number(1), NO_AGENT, "nobody")
    assert line.back() == [HandedBack(number(1), NO_AGENT, "nobody")]
    line.requester.submit(cast(1), line.now_s)  # later: perhaps somebody is there now
    assert line.forth() == [Deliver(cast(1))]


def test_what_was_submitted_before_the_session_waits_for_it() -> None:
    line = Line()
    line.requester.connected = False
    line.requester.submit(cast(1), line.now_s)
    line.requester.submit(cast(2), line.now_s)
    line.requester.cancel(number(2))
    line.requester.settle([number(9)])
    assert not line.to_responder
    line.new_session()
    assert line.forth() == [Deliver(cast(1))]  # not marked: it was never sent before


def test_who_forgets_a_request_gets_it_back() -> None:
    line = Line()
    line.requester.submit(cast(1), line.now_s)
    assert number(1) in line.requester
    assert line.requester.forget(number(1)) == cast(1)
    assert line.requester.forget(number(1)) is None
    assert number(1) not in line.requester


# ---------------------------------------------------------------- again and again


def test_a_request_that_comes_again_while_it_runs_is_not_delivered_again() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.forth()
    line.new_session()
    assert line.forth() == []
    assert line.responder.repeats == 1
    line.responder.answer(number(1), b"one", failed=False, now_s=line.now_s)
    assert line.back() == [Answered(number(1), False, b"one")]


def test_a_repeated_request_says_so() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.new_session()
    assert line.forth() == [Deliver(call(1).changed(flags=CALL | REDELIVERED))]


def test_what_is_late_says_if_it_kept_its_place() -> None:
    """It was never sent, or only to the peer that we still talk to; until there is another one."""
    line = Line()
    sent: list[int] = []
    requester = Requester(
        lambda message, _: sent.append(getattr(message_in(message), "flags", 0)), marks_turns=True
    )
    again = call(1).changed(flags=CALL | REDELIVERED)
    requester.submit(again, line.now_s)
    requester.submit(call(2), line.now_s)
    assert sent == []
    in_place = [CALL | REDELIVERED | OUT_OF_TURN | IN_PLACE, CALL]
    requester.opened(line.now_s, takes_raw=RAW_BODIES)
    assert sent == in_place
    requester.opened(line.now_s, takes_raw=RAW_BODIES, is_known=True)
    assert sent[2:] == in_place
    requester.opened(line.now_s, takes_raw=RAW_BODIES)
    assert sent[4:] == [CALL | REDELIVERED | OUT_OF_TURN] * 2
    requester.opened(line.now_s, takes_raw=RAW_BODIES, is_known=True)
    assert sent[6:] == [CALL | REDELIVERED | OUT_OF_TURN] * 2


@pytest.mark.parametrize("held", [False, True])
def test_who_is_not_told_of_turns_gets_what_is_late_as_it_is(held: bool) -> None:
    line = Line()
    if held:
        line.requester.hold()
    else:
        line.requester.connected = False
    again = call(1).changed(flags=CALL | REDELIVERED)
    line.requester.submit(again, line.now_s)
    assert line.forth() == []
    if held:
        line.requester.resume(line.now_s)
    else:
        line.requester.opened(line.now_s, takes_raw=RAW_BODIES)
    assert line.forth() == [Deliver(again)]


@pytest.mark.parametrize("failed", [False, True])
def test_a_lost_answer_is_given_again(failed: bool) -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.forth()
    line.responder.answer(number(1), b"one", failed=failed, now_s=line.now_s)
    line.new_session()
    assert line.forth() == []
    assert line.back() == [Answered(number(1), failed, b"one")]


def test_a_lost_receipt_is_given_again() -> None:
    line = Line()
    line.requester.submit(cast(1), line.now_s)
    line.forth()
    line.responder.take(number(1), line.now_s)
    line.new_session()
    assert line.forth() == []
    assert line.back() == [Taken(number(1))]


def test_a_second_answer_is_to_nothing() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.forth()
    line.responder.answer(number(1), b"one", failed=False, now_s=line.now_s)
    line.to_requester.append(line.to_requester[0])
    assert line.back() == [Answered(number(1), False, b"one")]
    assert line.requester.unmatched == 1


def test_a_copy_that_was_overtaken_by_settled_does_not_run() -> None:
    """The copy waits behind a large message; what settles it goes ahead on the control stream."""
    line = Line()
    line.requester.submit(cast(1), line.now_s)
    line.forth()
    line.new_session()
    copy = line.to_responder.popleft()
    line.responder.take(number(1), line.now_s)
    assert line.back() == [Taken(number(1))]
    line.requester.settle([number(1)])
    line.to_responder.append(copy)
    assert line.forth() == []


@pytest.mark.parametrize("make", [call, cast])
def test_a_copy_of_what_may_have_run_does_not_run(make: Callable[..., Request]) -> None:
    """The agent went away with it; a copy of a new session's beginning is still under way."""
    line = Line()
    line.requester.submit(make(1), line.now_s)
    line.forth()
    line.new_session()
    line.responder.give_back(number(1), AGENT_GONE, "died")
    assert line.back() == [HandedBack(number(1), AGENT_GONE, "died")]
    assert line.forth() == []
    assert line.back() == [] and line.requester.unmatched == 1


def test_settled_ids_are_known_a_while_and_then_forgotten() -> None:
    line = Line()
    for n in range(3):
        line.requester.submit(cast(n), line.now_s)
        line.forth()
        line.responder.take(number(n), line.now_s)
    assert set(line.responder.remembered()) == {number(n) for n in range(3)}
    line.requester.settle([number(0), number(1), number(77)])
    line.forth()
    line.wait(SETTLED_KEEP_S - 1)
    assert len(line.responder.remembered()) == 3
    assert line.responder.next_timeout() == 1000.0 + SETTLED_KEEP_S
    line.wait(1)
    assert line.responder.remembered() == (number(2),)


def test_messages_of_other_kinds_mean_nothing_here() -> None:
    line = Line()
    assert line.requester.receive(Cancel(number(1))) == []
    assert line.responder.receive(Holding((number(1),)), 0.0) == []
    assert line.responder.receive(Cancel(number(1)), 0.0) == []
    assert line.requester.unmatched == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (call(1), Receipt(number(1))),
        (cast(1), Reply(number(1), FINAL, b"")),
        (cast(1), Reply(number(1), 0, b"")),
    ],
)
def test_an_answer_of_the_wrong_kind_is_no_answer(request_: Request, message: Message) -> None:
    """A guest that acknowledges a call would make its caller's request disappear."""
    line = Line()
    line.requester.submit(request_, line.now_s)
    assert line.requester.receive(message) == []
    assert line.requester.unmatched == 1 and number(1) in line.requester


def test_a_call_cannot_be_taken_nor_a_cast_answered() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.requester.submit(cast(2), line.now_s)
    line.forth()
    assert not line.responder.take(number(1), line.now_s)
    assert not line.responder.answer(number(2), b"", failed=False, now_s=line.now_s)
    assert len(line.responder) == 2 and not line.to_requester


# ---------------------------------------------------------------- time


def test_a_deadline_is_kept_on_both_sides() -> None:
    line = Line()
    line.requester.submit(call(1, timeout_s=10), line.now_s)
    line.forth()
    assert line.requester.next_timeout() == line.responder.next_timeout() == line.now_s + 10
    line.wait(9.9)
    assert not line.outcomes
    line.wait(0.1)
    assert line.outcomes == [Overdue(number(1))]
    assert line.deliveries[1:] == [Cancelled(number(1))]
    assert line.forth() == []  # the Cancel comes too late to do anything
    assert not line.responder.answer(number(1), b"late", failed=False, now_s=line.now_s)


def test_a_cancelled_call_is_dropped_and_a_copy_of_it_does_not_run() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.forth()
    line.requester.cancel(number(1))
    line.requester.cancel(number(1))
    assert line.forth() == [Cancelled(number(1))]
    line.requester.submit(call(1), line.now_s)
    assert line.forth() == []
    (back,) = line.back()
    assert isinstance(back, HandedBack) and back.reason == EXPIRED


def test_the_time_that_is_left_travels() -> None:
    line = Line()
    line.requester.connected = False
    line.requester.submit(call(1, timeout_s=10), line.now_s)
    line.requester.submit(call(2), line.now_s)
    line.now_s += 4
    line.requester.opened(line.now_s)
    line.now_s += 100
    line.requester.opened(line.now_s)
    left = [item.request.timeout_ms for item in line.forth() if isinstance(item, Deliver)]
    sent = [request.timeout_ms for request in line.requester.open_requests()]
    assert left == [6000, 0] and sent == [10_000, 0]


def test_overdue_by_the_time_it_is_sent_is_one_millisecond() -> None:
    line = Line()
    line.requester.connected = False
    line.requester.submit(call(1, timeout_s=1), line.now_s)
    line.now_s += 100
    line.requester.opened(line.now_s)
    (delivery,) = line.forth()
    assert isinstance(delivery, Deliver) and delivery.request.timeout_ms == 1


def test_what_is_held_is_not_sent_until_the_session_goes_on() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.requester.hold()
    line.requester.submit(call(2, timeout_s=10), line.now_s)
    line.requester.submit(call(3), line.now_s)
    line.requester.cancel(number(3))  # the peer never hears of it
    line.now_s += 4
    line.requester.resume(line.now_s)
    line.requester.resume(line.now_s)
    line.requester.submit(call(4), line.now_s)
    arrived = [item.request for item in line.forth() if isinstance(item, Deliver)]
    assert [(each.id, each.timeout_ms) for each in arrived] == [
        (number(1), 0),
        (number(2), 6000),
        (number(4), 0),
    ]
    assert not any(each.flags & REDELIVERED for each in arrived)
    assert len(line.deliveries) == 3


def test_what_is_held_goes_to_a_new_session_as_it_is() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.requester.hold()
    line.requester.submit(call(2), line.now_s)
    line.to_responder.clear()
    line.requester.opened(line.now_s)
    flags = [item.request.flags & REDELIVERED for item in line.forth() if isinstance(item, Deliver)]
    assert flags == [REDELIVERED, 0]


def test_who_waited_is_told_whether_it_was_sent() -> None:
    """What was not can never run: the peer hears nothing of it."""
    line = Line()
    line.requester.submit(call(1, timeout_s=5), line.now_s)
    line.requester.hold()
    line.requester.submit(call(2, timeout_s=5), line.now_s)
    line.wait(5)
    assert line.outcomes == [Overdue(number(1)), Overdue(number(2), was_sent=False)]
    line.requester.resume(line.now_s)
    line.forth()
    assert [item.request.id for item in line.deliveries if isinstance(item, Deliver)] == [number(1)]


def test_what_somebody_sent_before_us_may_have_run_though_we_did_not_send_it() -> None:
    """Who asks us repeats what it asked a daemon that is no more."""
    line = Line()
    line.requester.hold()
    again = call(1, timeout_s=5)
    line.requester.submit(again.changed(flags=again.flags | REDELIVERED), line.now_s)
    line.wait(5)
    assert line.outcomes == [Overdue(number(1), was_sent=True)]


def test_the_peers_word_is_waited_for_when_the_time_is_up() -> None:
    line = Line()
    line.requester._grace_s, line.responder._grace_s = 0.5, 0.25
    line.requester.submit(call(1, timeout_s=10), line.now_s)
    (delivery,) = line.forth()
    assert isinstance(delivery, Deliver) and delivery.request.timeout_ms == 10_000
    line.wait(10.2)
    assert not line.outcomes
    line.responder.give_back(number(1), NO_AGENT, "not delivered")
    assert line.back() == [HandedBack(number(1), NO_AGENT, "not delivered")]
    line.requester.submit(call(2, timeout_s=10), line.now_s)
    line.forth()
    line.wait(10.5)
    assert line.outcomes[-1] == Overdue(number(2))


def test_an_id_used_again_has_its_own_deadline() -> None:
    """Given back, and submitted again with more time: the first deadline must not end it."""
    line = Line()
    line.requester.submit(call(1, timeout_s=5), line.now_s)
    line.forth()
    line.responder.give_back(number(1), NO_AGENT, "")
    line.back()
    line.requester.submit(call(1, timeout_s=60), line.now_s)
    line.forth()
    line.wait(30)
    assert Overdue(number(1)) not in line.outcomes
    assert Cancelled(number(1)) not in line.deliveries
    line.wait(30)
    assert Overdue(number(1)) in line.outcomes
    assert Cancelled(number(1)) in line.deliveries


def test_what_is_over_in_time_leaves_no_timer() -> None:
    line = Line()
    for n in range(3):
        line.requester.submit(call(n, timeout_s=5 + n), line.now_s)
    line.forth()
    line.responder.answer(number(0), b"", failed=False, now_s=line.now_s)
    line.back()
    assert line.requester.next_timeout() == line.now_s + 6
    line.responder.give_back(number(1), NO_AGENT, "")
    line.back()
    assert line.requester.next_timeout() == line.now_s + 7
    line.requester.forget(number(2))
    assert line.requester.next_timeout() is None
    assert Requester(line.send_request).next_timeout() is None
    assert Responder(line.send_answer).next_timeout() is None


def test_an_answer_is_kept_until_its_deadline() -> None:
    line = Line()
    line.requester.submit(call(1, timeout_s=5), line.now_s)
    line.forth()
    line.responder.answer(number(1), b"x" * 1000, failed=False, now_s=line.now_s)
    assert line.responder.next_timeout() == line.now_s + 5
    line.wait(5)
    assert line.responder._reply_bytes == 0
    line.back()
    line.requester.submit(call(1, timeout_s=5), line.now_s)
    line.forth()
    (back,) = line.back()
    assert isinstance(back, HandedBack) and back.reason == EXPIRED
    assert line.responder.next_timeout() == 1000.0 + RETENTION_S


def test_an_id_evicted_while_others_time_out() -> None:
    line = Line(records_max=1)
    line.requester.submit(call(1, timeout_s=5), line.now_s)
    line.requester.submit(call(2, timeout_s=5), line.now_s)
    line.forth()
    line.responder.answer(number(2), b"", failed=False, now_s=line.now_s)
    line.wait(5)
    assert line.responder.remembered() == (number(1),)
    assert line.responder._reply_bytes == 0


def test_what_nobody_settles_is_forgotten_in_the_end() -> None:
    line = Line()
    line.requester.submit(cast(1), line.now_s)
    line.forth()
    line.responder.take(number(1), line.now_s)
    line.wait(RETENTION_S)
    assert line.responder.remembered() == ()


def test_deadlines_of_what_is_over_do_not_pile_up() -> None:
    """A guest may ask for seven weeks, get its answer at once, and ask again."""
    line = Line()
    for n in range(5000):
        request = call(n % 7, timeout_s=4e6)
        line.requester.submit(request, line.now_s)
        line.forth()
        if n % 2:
            line.responder.give_back(request.id, NO_AGENT, "")
        else:
            line.responder.answer(request.id, b"", failed=False, now_s=line.now_s)
            line.requester.settle([request.id])
            line.responder._settled.clear()
            line.forth()
            line.responder._settled.clear()
        line.back()
    assert len(line.requester._deadlines._heap) < 200
    assert len(line.responder._deadlines._heap) < 200
    assert len(line.requester._deadlines._at_s) == len(line.responder._deadlines._at_s) == 0


# ---------------------------------------------------------------- limits


def test_more_requests_than_the_limit_are_returned() -> None:
    line = Line(requests_max=2)
    for n in range(3):
        line.requester.submit(cast(n), line.now_s)
    line.forth()
    (back,) = line.back()
    assert isinstance(back, HandedBack) and (back.id, back.reason) == (number(2), BUSY)
    assert "REQUESTS_MAX" in back.text
    assert len(line.responder) == 2


def test_the_oldest_ids_are_forgotten_first_and_that_is_counted() -> None:
    line = Line(records_max=3)
    for n in range(5):
        line.requester.submit(cast(n), line.now_s)
        line.forth()
        line.responder.take(number(n), line.now_s)
    assert line.responder.remembered() == tuple(number(n) for n in (2, 3, 4))
    assert line.responder.evicted == 2


def test_so_many_settled_ids_are_known_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SETTLED_MAX >= 1000
    monkeypatch.setattr(in_flight, "SETTLED_MAX", 2)
    line = Line()
    for n in range(4):
        line.requester.submit(cast(n), line.now_s)
        line.forth()
        line.responder.take(number(n), line.now_s)
        line.requester.settle([number(n)])
        line.forth()
    assert line.responder.remembered() == (number(2), number(3))


def test_kept_answers_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "REPLY_BYTES_MAX", 1000)
    line = Line()
    for n in range(4):
        line.requester.submit(call(n), line.now_s)
        line.forth()
        line.responder.answer(number(n), b"x" * 400, failed=False, now_s=line.now_s)
    kept = [record.reply is not None for record in line.responder._over.values()]
    assert kept == [False, False, True, True]
    assert line.responder._reply_bytes == 2 * (400 + 18)
    line.new_session()
    line.forth()
    outcomes = line.back()
    assert [type(outcome) for outcome in outcomes] == [HandedBack] * 2 + [Answered] * 2


def test_an_answer_larger_than_all_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "REPLY_BYTES_MAX", 100)
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.forth()
    line.responder.answer(number(1), b"x" * 400, failed=False, now_s=line.now_s)
    assert line.responder._reply_bytes == 0
    assert line.back() == [Answered(number(1), False, b"x" * 400)]


def test_a_request_too_large_is_not_held() -> None:
    line = Line()
    line.size_max = 100
    with pytest.raises(LimitExceeded):
        line.requester.submit(call(1, timeout_s=5, body=b"x" * 100), line.now_s)
    assert len(line.requester) == 0 and line.requester.next_timeout() is None
    line.size_max = 1000
    line.new_session()
    assert not line.to_responder


def test_a_new_peer_that_takes_less_is_not_sent_more() -> None:
    """It must not stop what comes behind; and a still newer one may take it."""
    line = Line()
    for n, size in enumerate((10, 500, 10, 600, 700)):
        line.requester.submit(cast(n, body=b"x" * size), line.now_s)
    line.size_max = 200
    line.new_session()
    assert [item.request.id for item in line.forth() if isinstance(item, Deliver)] == [
        number(0),
        number(2),
    ]
    line.size_max = 650
    line.new_session()
    line.requester.forget(number(3))
    assert line.requester.next_timeout() == line.now_s
    (handed_back,) = line.requester.handle_timeout(line.now_s)
    assert isinstance(handed_back, HandedBack)
    assert (handed_back.id, handed_back.reason) == (number(4), AGENT_GONE)
    assert "MESSAGE_BYTES_MAX" in handed_back.text
    assert "may have run before" in handed_back.text  # in a peer that took more
    assert sorted(request.id for request in line.requester.open_requests()) == [
        number(n) for n in range(3)
    ]
    assert line.requester.next_timeout() is None


def test_an_answer_too_large_can_be_answered_otherwise() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.forth()
    line.size_max = 100
    with pytest.raises(LimitExceeded):
        line.responder.answer(number(1), b"x" * 100, failed=False, now_s=line.now_s)
    assert line.responder.answer(number(1), b"too large", failed=True, now_s=line.now_s)
    assert line.back() == [Answered(number(1), True, b"too large")]


def test_a_kept_answer_too_large_for_the_new_peer() -> None:
    line = Line()
    line.requester.submit(call(1), line.now_s)
    line.forth()
    line.responder.answer(number(1), b"x" * 500, failed=False, now_s=line.now_s)
    line.size_max = 200
    line.new_session()
    assert line.forth() == []
    (back,) = line.back()
    assert isinstance(back, HandedBack) and back.reason == REFUSED


# ---------------------------------------------------------------- every order


ways = st.sampled_from(["done", "done", "done", "beat", "no agent", "gone"])
"""What an agent does with a request."""


class Exchange(RuleBasedStateMachine):
    """A requester above a broker that repeats itself, and a responder with agents.

    The broker submits an id again when it was handed back or forgotten; it settles what is over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.line = Line(requests_max=8)
        self.made = 0
        self.requests: dict[bytes, Request] = {}
        self.running: dict[bytes, Request] = {}  # what agents work on
        self.delivered: Counter[bytes] = Counter()
        self.not_run: Counter[bytes] = Counter()  # deliveries that did not run
        self.taken: Counter[bytes] = Counter()
        self.answers: dict[bytes, bytes] = {}
        self.ended: set[bytes] = set()

    @initialize()
    def start(self) -> None:
        self.line.requester.opened(self.line.now_s, takes_raw=RAW_BODIES)

    @rule(
        kind=st.sampled_from([0, CALL, CALL | RAW]),
        timeout_s=st.sampled_from([0, 0, 3, 100]),
        body=st.sampled_from([b"{}", b"\x00\xff\x80\r\n", bytes(300)]) | st.binary(max_size=8),
    )
    def submit(self, kind: int, timeout_s: float, body: bytes) -> None:
        self.made += 1
        request = call(self.made, timeout_s=timeout_s, body=body).changed(flags=kind)
        self.requests[request.id] = request
        self.give(request)

    def give(self, request: Request) -> None:
        try:
            self.line.requester.submit(request, self.line.now_s)
        except LimitExceeded:
            self.ended.add(request.id)
        except Rejected:
            assert request.flags & RAW and self.line.no_raw
            self.ended.add(request.id)

    @rule(count=st.integers(1, 5))
    def some_forth(self, count: int) -> None:
        for _ in range(min(count, len(self.line.to_responder))):
            message = message_in(self.line.to_responder.popleft())
            self.deliver(self.line.responder.receive(message, self.line.now_s))

    def deliver(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            match delivery:
                case Deliver(request):
                    assert request.id not in self.running
                    sent = self.requests[request.id]
                    assert request.body == sent.body, "altered"
                    assert (request.flags ^ sent.flags) & (CALL | RAW) == 0
                    assert not (request.flags & RAW and self.line.no_raw)
                    self.running[request.id] = request
                    self.delivered[request.id] += 1
                case Cancelled(request_id):
                    self.running.pop(request_id, None)

    @rule(count=st.integers(1, 5))
    def some_back(self, count: int) -> None:
        for _ in range(min(count, len(self.line.to_requester))):
            message = message_in(self.line.to_requester.popleft())
            self.settle_outcomes(self.line.requester.receive(message))

    def settle_outcomes(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            assert outcome.id not in self.ended, "an outcome of what was over"
            event(type(outcome).__name__)
            match outcome:
                case Taken(request_id):
                    assert not self.requests[request_id].is_call
                    self.taken[request_id] += 1
                    self.ended.add(request_id)
                case Answered(request_id, _, body):
                    assert body == self.answers[request_id]
                    self.ended.add(request_id)
                case HandedBack(request_id, reason, _) if reason in (BUSY, NO_AGENT):
                    self.give(self.requests[request_id])
                case HandedBack(request_id) | Overdue(request_id):
                    self.ended.add(request_id)
                case Heartbeat():
                    pass

    @rule(
        how=st.sampled_from(["done", "done", "done", "beat", "no agent", "gone"]),
        which=st.integers(0, 9),
    )
    def agent(self, how: str, which: int) -> None:
        if not self.running:
            return
        request_id, request = list(self.running.items())[which % len(self.running)]
        responder, now_s = self.line.responder, self.line.now_s
        if how == "beat":
            responder.heartbeat(request_id, now_s)
            return
        del self.running[request_id]
        if how == "no agent":
            self.not_run[request_id] += 1
            responder.give_back(request_id, NO_AGENT, "")
        elif how == "gone":
            responder.give_back(request_id, AGENT_GONE, "")
        elif request.is_call:
            self.answers[request_id] = b"\xff" + request.body[:8] + request_id
            try:
                responder.answer(request_id, self.answers[request_id], failed=False, now_s=now_s)
            except LimitExceeded:
                raise AssertionError("it is small") from None
        else:
            responder.take(request_id, now_s)

    @rule(size_max=st.sampled_from([200, 10**6, 10**6]), no_raw=st.sampled_from(["", "", "old"]))
    def new_session(self, size_max: int, no_raw: str) -> None:
        self.line.size_max, self.line.no_raw = size_max, no_raw
        self.line.new_session()

    @rule(which=st.integers(0, 9))
    def cancel(self, which: int) -> None:
        open_ids = [request.id for request in self.line.requester.open_requests()]
        if open_ids:
            request_id = open_ids[which % len(open_ids)]
            self.line.requester.cancel(request_id)
            self.ended.add(request_id)

    @rule()
    def settle(self) -> None:
        self.line.requester.settle(sorted(self.ended))

    @rule(seconds=st.sampled_from([0.5, 4.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.line.now_s += seconds
        self.settle_outcomes(self.line.requester.handle_timeout(self.line.now_s))
        self.deliver(self.line.responder.handle_timeout(self.line.now_s))

    @invariant()
    def each_runs_at_most_once(self) -> None:
        for request_id, times in self.delivered.items():
            assert times - self.not_run[request_id] <= 1
        assert set(self.taken.values()) <= {1}

    @invariant()
    def the_books_are_right(self) -> None:
        responder = self.line.responder
        assert set(self.running) == set(responder._running)
        kept = [record.reply for record in responder._over.values() if record.reply is not None]
        assert responder._reply_bytes == sum(map(len, kept))
        known = {*responder._running, *responder._over}
        assert set(responder._deadlines._at_s) <= known
        assert set(self.line.requester._deadlines._at_s) <= {
            request.id for request in self.line.requester.open_requests()
        }

    def teardown(self) -> None:
        """Agents finish, the line holds: everything is over, and nothing is lost."""
        self.line.size_max, self.line.no_raw = 10**6, ""
        self.line.new_session()
        for _ in range(20 + 4 * self.made):
            self.some_forth(1000)
            for _ in range(len(self.running)):
                self.agent("done", 0)
            self.some_back(1000)
        assert len(self.line.requester) == len(self.running) == 0
        assert self.ended == set(self.requests)
        self.each_runs_at_most_once()


@pytest.mark.long
def test_the_exchange() -> None:
    tries = settings(settings(), max_examples=2 * settings().max_examples, stateful_step_count=60)
    run_state_machine_as_test(Exchange, settings=tries)
