"""One VM's requests to the control side: judged, published once, answered.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; the ports handed in do what is decided.
2. A guest holds its request until it is told the outcome, and asks again at every new session. Here
   each id is published once: known ids are only told their outcome again.
3. When the VM goes, this host leaves a note of what it has published in the VM's own queue, for the
   next host (`handover`). While notes may be missing, requests that the guest sent before wait. A
   request that no note names, because a host or its daemon died, is published again, with
   `vchan_redelivered` in its context.
4. Requests are published in the order they came. One whose publication failed goes before those
   that have not been published yet.
5. An answer stays at the broker until the guest has heard it, for HELD_S at most.
6. What waits for a guest to read it is bounded by ANSWERS_BYTES_MAX. When that is full, the VM's
   own queue is not consumed, and the broker keeps what is in it.

    guest --Request--> Upward --publish_request--> broker
    guest <--Receipt-- Upward <--sent------------- broker     (casts)
    guest <--Reply---- Upward <--mail------------- broker     (calls: the VM's own queue)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from itertools import pairwise
from typing import Any, Final, NamedTuple, Protocol

from vchan.host.oslo_wire.envelope import EnvelopeError
from vchan.host.oslo_wire.mail import (
    NOTE_IDS_MAX,
    Answer,
    Arrival,
    Note,
    encode_arrival,
    encode_note,
    large_answer_id,
    own_queue,
)
from vchan.host.oslo_wire.upward_envelope import (
    Asked,
    Form,
    Publication,
    head,
    publication,
    read,
    rebuilt_body,
)
from vchan.host.policy.rules import OUT_OF, Ask, Effect, Kind
from vchan.host.vm.gate import Gate
from vchan.host.vm.handover import Handover, Past
from vchan.host.vm.mailbox import Mailbox
from vchan.host.vm.reports import BadReport, Reports, TooManyReports
from vchan.rpc.bodies import encode_failure
from vchan.rpc.dispatcher import Told
from vchan.rpc.in_flight import (
    Answered,
    Cancelled,
    Deliver,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Responder,
    Send,
    Taken,
    doubted,
    earliest,
)
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    EXPIRED,
    NO_AGENT,
    RAW,
    REDELIVERED,
    REFUSED,
    Cancel,
    Request,
    Returned,
    Settled,
    Topic,
    deadline_of,
    encode,
    with_time_left,
)
from vchan.session import CONTROL

RETRY_S: Final = 1.0
"""What the broker did not confirm is published again after this."""
CALL_S_MAX: Final = 3600.0
"""The longest a guest's call may take, and what one without a timeout is given. At it: a longer
time is cut to this."""
OPEN_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bodies of a VM's requests that are not published yet. At it: Returned: BUSY, on record."""
HELD_MAX: Final = 32
"""Answers left with the broker because the guest has not settled them, or not asked for them again
yet. Fewer than the broker hands out at a time, or no further one would come. At it: the oldest
answer is given up."""
HELD_S: Final = 60.0
"""An answer that the guest neither settles nor asks for again is left with the broker for so long.
At it: it is given up."""

ANSWERS_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of answers that wait for the guest to read them: two of the largest. Calls whose answers would be
more, as far as that is known from the last ones, wait to be published. At it: what is more stays
with the broker (`answers_wait`), and until half of it has been read further calls are returned:
BUSY, on record."""
EXPECTED_BYTES_MIN: Final = 8 * 1024
"""An answer, as long as none was larger: then all the calls that the policy may allow can go."""
EXPECTED_HALVES_S: Final = 60.0
"""A large answer is remembered so long, and half of it for as long again."""
ROOM_S: Final = 0.05
"""How often it is looked whether the guest has read."""

ARRIVE_AGAIN_S: Final = 0.1
"""When the VM's queue was not there yet, the arrival is written again after this."""

NO_RAW_TO_BROKER: Final = (
    "raw bodies go to programs on the host, and not over the broker: call with JSON"
)
ARRIVAL_ID: Final = b"arrival"
NOTE_ID: Final = b"note"
"""Stand for an arrival and a note where the broker is told of requests by their ids."""


class UpwardBrokerPort(Protocol):
    """What is asked of the broker. Every method returns at once and raises nothing."""

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        """Publish; `Upward.sent` comes with the id."""

    def listen_for_answers(self, vm: str) -> None:
        """From now on `Downward.mail` brings what is in the VM's own queue."""

    def ack(self, token: Any) -> None:
        """The broker may forget this message."""


Offer = Callable[[Request, Told], Callable[[], None] | None]
"""Gives a request to a local program that serves its target: returns what cancels it, or None."""


class _State(Enum):
    QUEUED = "to be published"
    SENDING = "published, not confirmed"
    SENT = "a call that waits for its answer"
    LOCAL = "with a local program"


class _Item:
    __slots__ = (
        "asked",
        "bytes",
        "cancel",
        "conducted",
        "deadline_s",
        "doubtful",
        "news",
        "number",
        "request",
        "state",
    )

    def __init__(
        self, number: int, request: Request, asked: Asked, conducted: bool, now_s: float
    ) -> None:
        self.number = number
        self.request = request
        self.asked = asked
        self.conducted = conducted
        self.deadline_s = deadline_of(request, now_s)
        self.state = _State.QUEUED
        self.doubtful = False  # it may have been published before
        self.news: tuple[str, Mapping[str, Any]] | None = None  # of a report: its kind, and what
        self.bytes = len(request.body)
        self.cancel: Callable[[], None] | None = None

    @property
    def past(self) -> Past | None:
        """What the next host must know of it, if this one does not end it."""
        if self.state is _State.SENT:
            return Past.CALLED
        if self.state is _State.LOCAL and self.request.is_call:
            return Past.GONE
        return Past.DOUBT if self.doubtful or self.state is not _State.QUEUED else None

    def was_sent_before(self, number: int) -> bool:
        """The guest may have sent it to another host, too: it says so, or came after this one."""
        return self.is_repeated or self.number <= number

    @property
    def is_repeated(self) -> bool:
        """The guest says so."""
        return self.request.flags & REDELIVERED != 0

    def remaining(self, now_s: float) -> Request:
        """The request, with the time it has left."""
        return with_time_left(self.request, self.deadline_s, now_s)


class _Held(NamedTuple):
    """An answer that is the broker's still."""

    token: Hashable
    answer: Answer | None  # None: the guest has been told, and has not settled it
    until_s: float


class Upward:
    """One VM's requests to the control side.

    Args:
        vm: The domain's UUID.
        send: Queues a message on the guest's session.
        broker: None where no broker is configured.
        gate: The policy, as it is for this VM.
        offer: The programs on this host.
        host: A name of this daemon's run, which no other has.
        unread: Bytes that were sent to the guest and still wait here.
        reports: Where what it tells of itself is kept.
    """

    def __init__(
        self,
        vm: str,
        send: Send,
        broker: UpwardBrokerPort | None,
        gate: Gate,
        offer: Offer,
        host: str = "",
        unread: Callable[[], int] = lambda: 0,
        reports: Reports | None = None,
    ) -> None:
        self.vm = vm
        self.host = host
        self.reports = reports or Reports()
        self._broker = broker
        self._gate = gate
        self._offer = offer
        self._unread = unread
        self._send = send
        self.mailbox = Mailbox()
        """What came in the VM's own queue; whoever owns this has it worked off in time."""
        self._expected = float(EXPECTED_BYTES_MIN)  # bytes of the next answer, at `_expected_s`
        self._expected_s = 0.0
        self._is_full = False  # answers are left with the broker
        self._is_away = False  # the guest
        self._room_at_s: float | None = None  # when to look whether there is room
        self._responder = Responder(send)
        self._items: dict[bytes, _Item] = {}
        self._queue: list[_Item] = []  # a list: an empty deque takes 0.6 KiB
        self._sending: OrderedDict[bytes, _Item] = OrderedDict()
        self._unsent: list[_Item] = []  # not confirmed: to go before the queue
        self._bytes = 0
        self._calls = 0
        self._held: OrderedDict[bytes, _Held] = OrderedDict()
        self._history = Handover()
        self._arrival_tokens: list[Hashable] = []  # of our own
        self._log_tokens: list[Hashable] = []  # of what was before it, until it has come back
        self._arrive_at_s: float | None = None  # when to write it again
        self._has_arrived = False  # written
        self._note_is_due = False
        self._queued_before = 0  # the last request before this stay
        self._listening = False
        self._retry_at_s: float | None = None
        self._suspended = False
        self.counters = {
            "guest_requests": 0,
            "guest_published": 0,
            "guest_local": 0,
            "guest_answered": 0,
            "guest_denied": 0,
            "guest_refused": 0,
            "guest_redelivered": 0,
            "guest_unroutable": 0,
            "guest_expired": 0,
            "guest_reports": 0,
            "guest_context_keys_removed": 0,
            "guest_unread": 0,  # how often answers were left with the broker
        }

    @property
    def open_requests(self) -> int:
        """Requests that are not over."""
        return len(self._items)

    # ---------------------------------------------------------------- the guest

    def opened(self, *, resumed: bool, now_s: float, before: str = "") -> None:
        """The guest's session is open, or the guest speaks again after `suspend`.

        Args:
            before: The host that the guest had its last session with. "": its daemon is new.
        """
        history = self._history
        self._is_away = False
        self._is_full = self._is_full and not self._has_read()
        if self._suspended or not resumed or not history.stay:
            history.begin(f"{self.host}.{round(now_s * 1e6)}", before, now_s)
            history.is_read = self._broker is None
            self._has_arrived = False
            self._log_tokens += self._arrival_tokens
            self._arrival_tokens.clear()
            self._queued_before = self.counters["guest_requests"]
        history.go_on(now_s)
        self._suspended = self._note_is_due = False
        if self._gate.may_send or self._items:
            self._arrive()
        self._publish_next(now_s)

    def silent(self) -> None:
        """The guest has said nothing for a while; `opened` comes when it does."""
        self._history.stand_still()

    def _arrive(self) -> None:
        """Read the VM's own queue, and say there that the VM is here."""
        if self._broker is None or self._suspended or self._is_full:
            return
        if not self._listening:
            self._listening = True
            self._broker.listen_for_answers(self.vm)
        if not self._has_arrived:
            self._has_arrived = True
            self._mail(ARRIVAL_ID, encode_arrival(Arrival(self._history.stay)), mandatory=True)

    def _mail(self, message_id: bytes, body: bytes, *, mandatory: bool) -> None:
        assert self._broker is not None
        publication = Publication(Form.MAIL, "", own_queue(self.vm), body, None, mandatory)
        self._broker.publish_request(self.vm, message_id, publication)

    def receive(self, message: Request | Cancel | Settled, now_s: float) -> None:
        """Take a message of the guest's."""
        if isinstance(message, Request):
            message = _bounded(message)
        for delivery in self._responder.receive(message, now_s):
            match delivery:
                case Deliver(request):
                    self._admit(request, now_s)
                case Cancelled(request_id):
                    self._drop(request_id)
        if isinstance(message, Settled):
            for request_id in message.ids:
                self._settled(request_id)

    def _admit(self, request: Request, now_s: float) -> None:
        self.counters["guest_requests"] += 1
        try:
            asked = read(request, self._gate.limits.json_values)
        except EnvelopeError as error:
            self.counters["guest_refused"] += 1
            self._responder.give_back(request.id, REFUSED, str(error))
            return
        was_sent = request.flags & REDELIVERED != 0  # perhaps to a host that let it through
        verdict = self._gate.judge(asked.ask, request.id)
        if verdict.effect is Effect.DENY:
            self.counters["guest_denied"] += 1
            text = f"{describe(asked.ask)} is denied to this VM by the host's policy"
            self._give_back(request.id, REFUSED, text, maybe_ran=was_sent)
            return
        if problem := self._over_limit(request):
            self.counters["guest_refused"] += 1
            self._gate.refused(asked.ask, request.id, problem)
            self._give_back(request.id, BUSY, problem, maybe_ran=was_sent)
            return
        news = None
        if asked.ask.kind is Kind.REPORT:
            told = self._note_report(request, asked, now_s)
            if told is None:
                return
            news, asked = (asked.ask.topic, told[0]), told[1]
        number = self.counters["guest_requests"]
        item = _Item(number, request, asked, verdict.effect is Effect.CONDUCTOR, now_s)
        item.news = news
        self._items[request.id] = item
        self._bytes += item.bytes
        self._calls += request.is_call
        self._queue.append(item)
        self._arrive()
        self._publish_next(now_s)

    def _note_report(
        self, request: Request, asked: Asked, now_s: float
    ) -> tuple[Mapping[str, Any], Asked] | None:
        """Keep what the guest tells of itself. Returns what is news of it and what is published of
        that, if anything is: it is taken when the broker has it. What is not published may be told
        twice: the last word counts."""
        what = asked.ask.topic
        try:
            news = self.reports.note(what, asked.args, now_s)
        except BadReport as error:
            self.counters["guest_refused"] += 1
            reason = BUSY if isinstance(error, TooManyReports) else REFUSED
            self._gate.refused(asked.ask, request.id, str(error))
            self._responder.give_back(request.id, reason, str(error))
            return None
        self.counters["guest_reports"] += 1
        notification = None
        if news is not None and self._broker is not None:
            notification = self._gate.notification(what, news, request.id)
        if news is None or notification is None:
            self._responder.take(request.id, now_s)
            return None
        if any(item.news == (what, news) for item in self._items.values()):
            # Of a run of the guest's daemon before this one, which must not take it for told yet.
            self._responder.give_back(request.id, BUSY, "the same was told, and waits to go on")
            return None
        return news, notification

    def turn_away(self, request: Request, text: str, now_s: float) -> None:
        """Refuse a request without a look at its body, and put that on record. One that was let
        through before is told what came of it."""
        request_id = request.id
        if request_id in self._responder or self._responder.is_over(request_id):
            self._responder.receive(request, now_s)
            return
        self.counters["guest_denied"] += 1
        self._gate.unheard(head(request), request_id)
        reason = REFUSED
        if request.flags & REDELIVERED:
            reason, text = AGENT_GONE, doubted(text)
        self._send(encode(Returned(request_id, reason, text)), CONTROL)

    def _give_back(self, request_id: bytes, reason: int, text: str, *, maybe_ran: bool) -> None:
        if maybe_ran:
            reason, text = AGENT_GONE, doubted(text)
        if reason == AGENT_GONE:
            self._history.remember(request_id, Past.GONE)
        self._responder.give_back(request_id, reason, text)

    def _over_limit(self, request: Request) -> str:
        if len(self._responder) > self._gate.limits.requests_up:
            return f"{len(self._responder) - 1} requests of this VM are not over"
        if request.is_call and self._calls >= self._gate.limits.calls_up:
            return f"{self._calls} calls of this VM wait for their answers already"
        if request.is_call and self._is_full:
            return f"{self._unread()} bytes of answers wait to be read (ANSWERS_BYTES_MAX)"
        if self._bytes + len(request.body) > OPEN_BYTES_MAX:
            return f"{self._bytes} bytes of this VM's requests are not published yet"
        return ""

    def _forget(self, request_id: bytes) -> _Item | None:
        item = self._items.pop(request_id, None)
        if item is not None:
            self._bytes -= item.bytes
            self._calls -= item.request.is_call
            assert self._bytes >= 0 and (self._items or not (self._bytes or self._calls))
        return item

    def _drop(self, request_id: bytes) -> None:
        """Nobody waits for it any more, or its time is up by this host's clock."""
        item = self._forget(request_id)
        if item is None:
            return
        if item.past is not None:
            self._history.remember(request_id, item.past)
        if item.state is _State.QUEUED:
            self._queue = [other for other in self._queue if other is not item]
            self._unsent = [other for other in self._unsent if other is not item]
        elif item.cancel is not None:
            item.cancel()

    def _settled(self, request_id: bytes) -> None:
        """The guest never asks again."""
        self._history.forget(request_id)
        held = self._held.pop(request_id, None)
        if held is not None and self._broker is not None:
            self._broker.ack(held.token)

    # ---------------------------------------------------------------- publishing

    def _publish_next(self, now_s: float) -> None:
        while self._queue and not self._is_held_up:
            item = self._queue[0]
            request_id = item.request.id
            history = self._history
            past = Past.CALLED if request_id in self._held else history.past(request_id)
            is_again = past is None and item.was_sent_before(self._queued_before)
            if history.may_learn(now_s) and (not history.is_read or is_again or past is Past.DOUBT):
                return
            is_new = past is None or past is Past.DOUBT
            if is_new and item.request.is_call and not self._has_room_for_call(now_s):
                self._room_at_s = self._room_at_s or now_s + ROOM_S
                return
            self._queue.pop(0)
            if is_new:
                is_unclear = past is Past.DOUBT or (is_again and not history.knows_all)
                item.doubtful = item.doubtful or is_unclear
                self._publish(item, now_s)
            else:
                assert past is not None
                self._repeat(item, past, now_s)

    @property
    def _is_held_up(self) -> bool:
        return self._suspended or self._retry_at_s is not None or bool(self._unsent)

    def _repeat(self, item: _Item, past: Past, now_s: float) -> None:
        """It was published before."""
        request_id = item.request.id
        if past is Past.TAKEN:
            self._take(item, now_s)
        elif past is Past.GONE:
            self._forget(request_id)
            text = "it was sent before, and what came of it is not known any more"
            self._give_back(request_id, AGENT_GONE, text, maybe_ran=True)
        else:
            self._wait_for_answer(item)
            held = self._held.get(request_id)
            if held is not None and held.answer is not None:
                del self._held[request_id]
                self._answer(held.token, held.answer, now_s)

    def _wait_for_answer(self, item: _Item) -> None:
        item.state = _State.SENT
        self._bytes -= item.bytes
        item.bytes = 0

    def _publish(self, item: _Item, now_s: float) -> None:
        assert item.state is _State.QUEUED and not self._unsent, "it would overtake what goes first"
        request = item.remaining(now_s)
        ask = item.asked.ask
        context = self._gate.context(item.asked.context, ask, redelivered=item.doubtful)
        removed = item.asked.context.keys() - context.keys()
        if removed:
            self.counters["guest_context_keys_removed"] += len(removed)
            self._gate.removed(OUT_OF, Topic(ask.exchange, ask.topic), removed)
        if not (item.conducted or item.news) and self._give_to_local(item, request):
            return
        if item.asked.ask.kind is Kind.HTTP or self._broker is None:
            text = f"this host does not serve {describe(item.asked.ask)}"
            self._forget(request.id)
            self._give_back(request.id, NO_AGENT, text, maybe_ran=item.doubtful)
            return
        if request.flags & RAW:
            self.counters["guest_refused"] += 1
            self._gate.refused(ask, request.id, NO_RAW_TO_BROKER)
            self._forget(request.id)
            self._give_back(request.id, REFUSED, NO_RAW_TO_BROKER, maybe_ran=item.doubtful)
            return
        self.counters["guest_redelivered"] += item.doubtful
        asked = self._gate.conduct(item.asked, request) if item.conducted else item.asked
        try:
            made = publication(self.vm, request, asked, context)
        except EnvelopeError as error:
            self.counters["guest_refused"] += 1
            self._forget(request.id)
            self._responder.give_back(request.id, REFUSED, str(error))
            return
        item.state = _State.SENDING
        self._sending[request.id] = item
        self._broker.publish_request(self.vm, request.id, made)

    def _give_to_local(self, item: _Item, request: Request) -> bool:
        request_id = request.id
        # Another host's program may have run it though its broker, which was away, tells nothing.
        is_again = item.doubtful or (item.is_repeated and self._history.may_lack_stays)
        context = self._gate.context(item.asked.context, item.asked.ask, redelivered=is_again)
        item.state = _State.LOCAL  # before the offer: the answer may come in it
        item.cancel = self._offer(
            request.changed(body=rebuilt_body(request, item.asked, context)),
            lambda outcome, now_s: self._told(request_id, outcome, now_s),
        )
        if item.cancel is None:
            item.state = _State.QUEUED
            return False
        self.counters["guest_local"] += 1
        if request.is_call:  # its answer will be in no queue
            self._history.remember(request_id, Past.GONE)
        return True

    def sent(
        self, request_id: bytes, *, ok: bool, unroutable: bool, doubtful: bool, now_s: float
    ) -> None:
        """The broker has confirmed a request, or not.

        Args:
            unroutable: No queue is bound for it: nobody serves its target.
            doubtful: Not `ok`, but the broker may have it all the same.
        """
        if request_id == NOTE_ID:
            if not ok and self._suspended:
                self._note_is_due = True
                self._retry_at_s = now_s + RETRY_S
            return
        if request_id == ARRIVAL_ID:
            if not ok:
                self._arrive_at_s = now_s + (ARRIVE_AGAIN_S if unroutable else RETRY_S)
            return
        item = self._sending.pop(request_id, None)
        if item is not None and self._items.get(request_id) is item:
            self._conclude(item, ok, unroutable, doubtful, now_s)
        if self._sending:
            return
        if self._unsent:
            self._unsent.sort(key=lambda item: item.number)
            self._queue[:0] = self._unsent
            self._unsent = []
            assert all(one.number < next_.number for one, next_ in pairwise(self._queue))
            self._retry_at_s = now_s + RETRY_S
        if self._note_is_due:
            self._leave_note()

    def _conclude(
        self, item: _Item, ok: bool, unroutable: bool, doubtful: bool, now_s: float
    ) -> None:
        request_id = item.request.id
        if unroutable:
            self.counters["guest_unroutable"] += 1
            if item.news is not None:  # kept here; no service has ever listened for it
                self._take(item, now_s)
                return
            self._forget(request_id)
            text = f"nobody serves {describe(item.asked.ask)}"
            self._give_back(request_id, NO_AGENT, text, maybe_ran=item.doubtful)
        elif not ok:
            item.state = _State.QUEUED
            item.doubtful = item.doubtful or doubtful
            self._unsent.append(item)
        else:
            self.counters["guest_published"] += 1
            if item.request.is_call:
                self._wait_for_answer(item)
            else:
                self._take(item, now_s)

    def _take(self, item: _Item, now_s: float) -> None:
        """A cast is over: whom it is for has it."""
        if item.news is not None:
            self.reports.heard(*item.news)
        self._forget(item.request.id)
        self._responder.take(item.request.id, now_s)

    # ---------------------------------------------------------------- answers

    def work(self, now_s: float) -> str | None:
        """Read a slice of what is first in the mailbox. None: there is more of it; else what is
        wrong with it, or "" when it has been taken."""
        assert self._broker is not None
        read = self.mailbox.work()
        if read is None:
            return None
        match read.message:
            case None:
                self._broker.ack(read.token)
            case Answer():
                self._answer(read.token, read.message, now_s)
            case _:
                self._read_log(read.token, read.message, now_s)
        return read.problem

    # ---------------------------------------------------------------- what is not read

    def has_room(self, size: int) -> bool:
        """Whether an answer of so many bytes may wait for the guest, too."""
        held = self._unread() + self.mailbox.bytes
        return not self._is_full and (not held or held + size <= ANSWERS_BYTES_MAX)

    def leave_answers(self, now_s: float) -> bool:
        """Answers are to stay with the broker, until there is room. The VM's channel must be closed
        now, unless this returns False: it has been."""
        if self._is_full:
            return False
        self._is_full = True
        self._room_at_s = now_s + ROOM_S
        self.counters["guest_unread"] += 1
        return True

    def take_again(self, token: Hashable, body: bytes) -> bool:
        """Whether this is a large answer that the guest has been told already: then it is not read
        once more. The broker hands out again what it was to keep."""
        request_id = large_answer_id(body)
        held = self._held.get(request_id) if request_id is not None else None
        if held is None or held.answer is not None or self._broker is None:
            return False
        assert request_id is not None
        self._broker.ack(held.token)
        self._held[request_id] = held._replace(token=token)
        return True

    def _look_for_room(self, now_s: float) -> None:
        self._room_at_s = None
        if not self._is_full:
            return
        if self._has_read():
            self._is_full = False
            self._arrive()
        else:
            self._room_at_s = now_s + ROOM_S

    def _has_read(self) -> bool:
        has_read = not self._is_away and self._unread() <= ANSWERS_BYTES_MAX // 2
        return has_read and not self.mailbox

    def _has_room_for_call(self, now_s: float) -> bool:
        waiting = self._calls - sum(item.request.is_call for item in self._queue)
        expected = (waiting + 1) * self._expect(0, now_s) + self._unread() + self.mailbox.bytes
        return not waiting or expected <= ANSWERS_BYTES_MAX

    def _expect(self, size: int, now_s: float) -> float:
        """Bytes of the next answer, now that one had so many."""
        faded = self._expected * 0.5 ** ((now_s - self._expected_s) / EXPECTED_HALVES_S)
        self._expected = max(faded, size, EXPECTED_BYTES_MIN)
        self._expected_s = now_s
        return self._expected

    def disconnected(self) -> None:
        """The guest cannot be reached until `opened`."""
        self._is_away = True

    # ---------------------------------------------------------------- taking answers

    def _read_log(self, token: Hashable, message: Arrival | Note, now_s: float) -> None:
        assert self._broker is not None
        history = self._history
        if not history.is_read or history.is_ours(message):
            self._log_tokens.append(token)
        if isinstance(message, Note):
            history.read_note(message)
        else:
            history.read_arrival(message)
            if message.stay == history.stay:
                self._arrival_tokens.append(self._log_tokens.pop())
        if history.is_read:
            for each in self._log_tokens:
                self._broker.ack(each)
            self._log_tokens.clear()
        self._publish_next(now_s)

    def _answer(self, token: Hashable, answer: Answer, now_s: float) -> None:
        assert self._broker is not None
        self._expect(len(answer.body), now_s)
        item = self._items.get(answer.id)
        held = self._held.pop(answer.id, None)
        if held is not None:
            self._broker.ack(held.token)  # the same again: it was called, or handed out, twice
        if not answer.ending:
            self._broker.ack(token)
            self._responder.heartbeat(answer.id, now_s)
        elif item is not None and item.state in (_State.SENT, _State.SENDING):
            self.counters["guest_answered"] += 1
            self._forget(answer.id)
            self._hold(token, answer.id, None, now_s)
            self._responder.answer(
                answer.id, answer.body, failed=answer.failed, now_s=now_s, or_failure=True
            )
            self._publish_next(now_s)
        elif held is not None and held.answer is None:
            self._hold(token, answer.id, None, now_s)
        elif item is None and self._responder.is_over(answer.id):
            self._broker.ack(token)  # nobody waits any more
        elif item is None or item.state is _State.QUEUED:
            self._hold(token, answer.id, answer, now_s)
            self._publish_next(now_s)
        else:
            self._broker.ack(token)

    def _hold(
        self, token: Hashable, request_id: bytes, answer: Answer | None, now_s: float
    ) -> None:
        self._held[request_id] = _Held(token, answer, now_s + HELD_S)
        if len(self._held) > HELD_MAX:
            self._drop_held()
        assert len(self._held) <= HELD_MAX, "the broker gives no more until some are acknowledged"

    def _drop_held(self) -> None:
        """The oldest answer is the broker's no more."""
        assert self._broker is not None
        request_id, held = self._held.popitem(last=False)
        self._history.remember(request_id, Past.GONE)
        self._broker.ack(held.token)

    def _told(self, request_id: bytes, outcome: Outcome, now_s: float) -> None:
        """What a local program says."""
        item = self._items.get(request_id)
        if item is None or item.state is not _State.LOCAL:
            return
        match outcome:
            case Heartbeat():
                self._responder.heartbeat(request_id, now_s)
                return
            case Taken():
                self._responder.take(request_id, now_s)
            case Answered(_, failed, body):
                self._expect(len(body), now_s)
                unread = self._unread()
                if unread and unread + len(body) > OPEN_BYTES_MAX:
                    text = f"{unread} bytes of answers wait to be read already (OPEN_BYTES_MAX)"
                    failed, body = True, encode_failure("LimitExceeded", text)
                self._responder.answer(
                    request_id, body, failed=failed, now_s=now_s, or_failure=True
                )
            case HandedBack(_, reason, text):
                self._give_back(request_id, reason, text, maybe_ran=False)
            case Overdue():
                self._responder.give_back(request_id, EXPIRED, "no answer in time")
        self._forget(request_id)

    # ---------------------------------------------------------------- the VM goes

    def relisten(self) -> None:
        """The host has closed the VM's channel itself. What is in the queue comes again."""
        self._log_tokens.clear()
        self._arrival_tokens.clear()
        if not self._is_full:  # else it is worked off: there would be no end to the same few
            self.mailbox.clear()
        was_listening, self._listening = self._listening, False
        if was_listening and not self._suspended:
            self._arrive()

    def suspend(self, now_s: float) -> None:
        """The guest is going, or away: publish nothing more, and leave a note of what was."""
        self.mailbox.clear()
        if self._suspended:
            return
        self._suspended = True
        self._history.end(now_s)
        if self._listening:
            self._note_is_due = True
            if not self._sending:  # else when the broker has said what became of them
                self._leave_note()

    def _leave_note(self) -> None:
        assert self._broker is not None
        past = dict(self._history.all_past())
        for request_id, is_call in self._responder.over():
            if past.get(request_id) is not Past.GONE:
                past[request_id] = Past.CALLED if is_call else Past.TAKEN
        for request_id, item in self._items.items():
            if item.past is not None:
                past[request_id] = item.past
        newest = list(past.items())[-NOTE_IDS_MAX:]

        def ids(what: Past) -> tuple[bytes, ...]:
            return tuple(request_id for request_id, each in newest if each is what)

        history = self._history
        note = Note(
            history.stays(),
            taken=ids(Past.TAKEN),
            calls=ids(Past.CALLED),
            gone=ids(Past.GONE),
            doubt=ids(Past.DOUBT),
            unclear=history.unclear(),
            waited_ms=history.waited_ms(),
            is_last=not self._sending,
        )
        self._note_is_due = not note.is_last
        self._mail(NOTE_ID, encode_note(note), mandatory=False)

    def release(self) -> None:
        """The VM is no longer here. Its guest still holds what is not over."""
        for item in self._items.values():
            cancel, item.cancel = item.cancel, None
            if cancel is not None:
                cancel()
        if self._note_is_due:
            self._leave_note()  # now, or perhaps never

    # ---------------------------------------------------------------- time and state

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        history = self._history
        times = [
            self._responder.next_timeout(),
            self._retry_at_s,
            self._arrive_at_s,
            self._room_at_s,
        ]
        if self._listening and not history.is_settled and history.settled_s < math.inf:
            times.append(history.settled_s)
        if self._queue and not self._is_held_up and self._room_at_s is None:
            times.append(history.wait_until_s)
        if self._held:
            times.append(next(iter(self._held.values())).until_s)
        return earliest(*times)

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        for delivery in self._responder.handle_timeout(now_s):
            if isinstance(delivery, Cancelled):
                self.counters["guest_expired"] += 1
                self._drop(delivery.id)
        if self._retry_at_s is not None and now_s >= self._retry_at_s:
            self._retry_at_s = None
            if self._note_is_due and not self._sending:
                self._leave_note()
        self._history.handle_timeout(now_s)
        if self._arrive_at_s is not None and now_s >= self._arrive_at_s:
            self._arrive_at_s = None
            self._has_arrived = self._has_arrived and self._history.is_read
            if self._listening:
                self._arrive()
        if self._room_at_s is not None and now_s >= self._room_at_s:
            self._look_for_room(now_s)
        while self._held and next(iter(self._held.values())).until_s <= now_s:
            self._drop_held()
        self._publish_next(now_s)

    def summary(self) -> dict[str, Any]:
        """What `vchan status` shows."""
        return {
            **self.counters,
            "open": len(self._items),
            "calls": self._calls,
            "mail_bytes": self.mailbox.bytes,
            "answers_wait": self._is_full,
        }


def _bounded(request: Request) -> Request:
    """A call's time is bounded here: its answer is waited for."""
    longest_ms = int(CALL_S_MAX * 1000)
    if request.is_call and not 0 < request.timeout_ms <= longest_ms:
        return request.changed(timeout_ms=longest_ms)
    return request


def describe(ask: Ask) -> str:
    """A target, for a text."""
    server = f" on {ask.server}" if ask.server else ""
    return f"{ask.kind} {ask.exchange}/{ask.topic}{server}"
