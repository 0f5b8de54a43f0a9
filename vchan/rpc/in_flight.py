"""Requests in flight: ids, deadlines, what was taken, what was answered. Used at every hop.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; messages leave by the `send` handed in.
2. A requester holds a request until it is over; a responder remembers an id until the requester
   says that it is settled. Everything may be said twice: ids make the second time harmless.
3. Both are told when a *new* session begins. The requester then repeats what is not over; the
   responder repeats nothing unasked. That is enough: what nobody asks for again is over.

    requester.submit(request, now_s)
    outcomes = requester.receive(message)            # Taken, Answered, Heartbeat, HandedBack

    deliveries = responder.receive(message, now_s)   # Deliver, Cancelled
    responder.take(id) / answer(id, ...) / refuse(id, ...) / give_back(id, ...)
"""

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple

from vchan.errors import LimitExceeded, Rejected
from vchan.rpc.bodies import encode_failure
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FAILURE,
    FINAL,
    IN_PLACE,
    LOCAL,
    NO_AGENT,
    OUT_OF_TURN,
    RAW,
    RAW_REPLY,
    REDELIVERED,
    REFUSED,
    RELEASED,
    Cancel,
    Message,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    encode,
    encode_receipt,
    encode_reply,
    encode_request,
    id_chunks,
    reply_stream,
    with_time_left,
)
from vchan.session import CONTROL
from vchan.wire.frames import RAW_CASTS
from vchan.wire.value import Value

Send = Callable[[bytes, int], None]
"""Queues a message on a stream of the session."""

REQUESTS_MAX: Final = 1024
"""Requests a responder has open at a time. A broker's prefetch stays far below. At it: Returned:
BUSY."""
RECORDS_MAX: Final = 4096
"""Ids a responder remembers after they were taken or answered. At it: the oldest is forgotten, and
counted."""
RETENTION_S: Final = 3600.0
"""An id that nobody says is settled is remembered for so long. At it: it is forgotten, and
counted."""
SETTLED_MAX = 2048
"""Settled ids a responder still recognises. At it: the oldest is forgotten."""
SETTLED_KEEP_S: Final = 600.0
"""A settled id is recognised for so long. A caller that lost its connection before the broker
confirmed publishes the same request again: the broker has then forgotten the first copy and hands
out the second. At it: the id is forgotten."""
HEARTBEAT_S: Final = 0.5
"""Heartbeats of one call are passed on this often at most: callers ask for one in some seconds."""
REPLY_BYTES_MAX = 16 * 1024 * 1024
"""Bodies of answers a responder keeps to give them again. At it: the oldest is dropped."""
NO_RAW: Final = "the peer takes no raw bodies: upgrade its vchan, or call with JSON"
"""What is said of a RAW request if nobody knows it better."""
NO_RAW_CASTS: Final = (
    "the next on its way takes raw calls, but no raw casts: upgrade its vchan, or cast with JSON"
)
COMES_AGAIN: Final = frozenset({NO_AGENT, BUSY, RELEASED})
"""A cast that is handed back so has not run, and comes again, at another time or elsewhere."""


class Taken(Value):
    """The responder has taken responsibility for this cast."""

    __slots__ = ("id",)
    __match_args__: Final = ("id",)

    def __init__(self, id: bytes) -> None:
        self.id = id

    def fields(self) -> tuple[bytes]:
        return (self.id,)


class Answered(Value):
    """A call's answer. `body` is JSON: the result, or if `failed` the failure. The result of a RAW
    call is bytes."""

    __slots__ = ("body", "failed", "id")
    __match_args__: Final = ("id", "failed", "body")

    def __init__(self, id: bytes, failed: bool, body: bytes) -> None:
        self.id = id
        self.failed = failed
        self.body = body

    def fields(self) -> tuple[bytes, bool, bytes]:
        return self.id, self.failed, self.body


class Heartbeat(NamedTuple):
    """The call is still being worked on."""

    id: bytes


def doubted(text: str) -> str:
    """Why it was refused, where nobody can say any more that it has not run."""
    return f"{text}; it may have run before"


class HandedBack(NamedTuple):
    """The request has ended without an answer; `outcomes` says by the reason if it may have run."""

    id: bytes
    reason: int
    text: str

    def doubted(self) -> "HandedBack":
        """The same where nobody can say any more that it has not run."""
        return HandedBack(self.id, AGENT_GONE, doubted(self.text))


class Overdue(NamedTuple):
    """Its time is up. The responder has been told to drop it; or, if it was not sent, never gets
    it."""

    id: bytes
    was_sent: bool = True

    @property
    def returned(self) -> HandedBack:
        """As it is said to who asked."""
        if self.was_sent:
            return HandedBack(self.id, EXPIRED, "no answer in time")
        return HandedBack(self.id, NO_AGENT, "not delivered in time")


Outcome = Taken | Answered | Heartbeat | HandedBack | Overdue


_push: Final = heappush  # Final, so that compiled code does not look for it by name
_FAILURE_OR_RAW: Final = FAILURE | RAW_REPLY
_WRONG_KIND: Final = encode_failure(
    "BadReply", "the answer is bytes where JSON was asked for, or the other way round"
)


class _Outstanding:
    __slots__ = ("deadline_s", "problem", "request", "result_flags", "sent", "stream")

    def __init__(self, request: Request, deadline_s: float | None) -> None:
        self.request = request
        self.result_flags = RAW_REPLY if request.flags & RAW else 0
        self.stream = request.stream
        self.deadline_s = deadline_s
        self.sent = False
        self.problem = ""  # why the peer we have now cannot take it


def earliest(*times_s: float | None) -> float | None:
    """The first of these times; None is no time."""
    first: float | None = None
    for at_s in times_s:
        if at_s is not None and (first is None or at_s < first):
            first = at_s
    return first


class _Deadlines:
    """Ids by time, each at most once. What is no longer waited for stays in the heap until its time
    comes, or until it is most of the heap."""

    __slots__ = ("_at_s", "_heap")

    def __init__(self) -> None:
        self._at_s: dict[bytes, float] = {}
        self._heap: list[tuple[float, bytes]] = []

    def add(self, at_s: float, request_id: bytes) -> None:
        assert request_id not in self._at_s, "who forgot the id forgot its time as well"
        self._at_s[request_id] = at_s
        _push(self._heap, (at_s, request_id))
        if len(self._heap) > 2 * len(self._at_s) + 64:
            self._heap = [(at_s, request_id) for request_id, at_s in self._at_s.items()]
            heapify(self._heap)

    def discard(self, request_id: bytes) -> None:
        self._at_s.pop(request_id, None)

    def next(self) -> float | None:
        heap = self._heap
        while heap and self._at_s.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now_s: float) -> list[bytes]:
        due = []
        while (at_s := self.next()) is not None and at_s <= now_s:
            _, request_id = heappop(self._heap)
            del self._at_s[request_id]
            due.append(request_id)
        return due


class Requester:
    """The requests we sent a peer and that are not over.

    Args:
        send: Queues a message to the peer.
        grace_s: Our deadlines come so much later than those that the peer is told: it knows better
            what became of a request.
        marks_turns: The peer is told of what it gets out of its turn, too.
        is_timed: Give up what is past its time. False: who submits it sees to that, and cancels it.
    """

    def __init__(
        self,
        send: Send,
        *,
        grace_s: float = 0.0,
        marks_turns: bool = False,
        is_timed: bool = True,
    ) -> None:
        self._send = send
        self._is_timed = is_timed
        self._again_flags = REDELIVERED | OUT_OF_TURN if marks_turns else REDELIVERED
        self._late_flags = OUT_OF_TURN | IN_PLACE if marks_turns else 0
        self._grace_s = grace_s
        self._open: dict[bytes, _Outstanding] = {}
        self._deadlines = _Deadlines()
        self._untaken: list[bytes] = []  # too large for the peer we have now
        self._untaken_s = 0.0
        self._no_raw = ""  # why the peer takes no RAW call
        self._no_raw_cast = ""  # likewise, no RAW cast
        self.connected = False
        self._holds = False  # the peer cannot be reached for now
        self.unmatched = 0  # answers to nothing we asked

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: bytes) -> bool:
        return request_id in self._open

    def open_requests(self) -> list[Request]:
        """What is not over, in the order it was submitted."""
        return [item.request for item in self._open.values()]

    def opened(
        self, now_s: float, *, is_known: bool = False, takes_raw: int = 0, no_raw: str = NO_RAW
    ) -> None:
        """A new session began: repeat, in order, what is not over.

        A resumed session needs no word: it loses nothing. What this peer cannot take is handed
        back by the next `handle_timeout`, which is due at once.

        Args:
            is_known: The peer is the run that everything was sent to so far: it knows what it has
                had, and what it does not know never came. Nothing is marked for that.
            takes_raw: See `Peer.takes_raw`.
            no_raw: Why it takes no RAW request, if it takes none, and what to do.
        """
        self._no_raw = "" if takes_raw else no_raw
        self._no_raw_cast = self._no_raw or ("" if takes_raw & RAW_CASTS else NO_RAW_CASTS)
        self.connected = True
        self._holds = False
        for item in self._open.values():
            self._transmit_late(item, now_s, is_known=is_known)

    def hold(self) -> None:
        """The peer cannot be reached for now: what is submitted from here on is not sent, and so
        known not to have run, until `resume` or `opened`."""
        self._holds = True

    def resume(self, now_s: float) -> None:
        """The session goes on: send what was held."""
        if self._holds and self.connected:
            self._holds = False
            for item in self._open.values():
                if not item.sent:
                    self._transmit_late(item, now_s)

    def has_sent(self, request_id: bytes) -> bool:
        """Whether the peer may have had a request that is open."""
        return self._open[request_id].sent

    def submit(self, request: Request, now_s: float) -> None:
        """Send a request and hold it until it is over.

        The id must not be open already. The caller bounds how many it submits.

        Raises:
            LimitExceeded: The peer does not take so large a one. It is not held.
            Rejected: It is RAW, and the peer takes none. It is not held.
        """
        assert request.id not in self._open
        deadline_s = now_s + request.timeout_ms / 1000 if request.timeout_ms else None
        item = _Outstanding(request, deadline_s)
        if self.connected and not self._holds:
            self._transmit(item, request)
        self._open[request.id] = item
        if deadline_s is not None and self._is_timed:
            self._deadlines.add(deadline_s + self._grace_s, request.id)

    def _transmit_late(self, item: _Outstanding, now_s: float, *, is_known: bool = False) -> None:
        request = item.request
        flags = request.flags
        if item.sent and not is_known:
            flags = (flags | self._again_flags) & ~IN_PLACE
        elif flags & REDELIVERED and not flags & OUT_OF_TURN:
            flags |= self._late_flags
        if flags != request.flags:
            request = item.request = request.changed(flags=flags)
        try:
            self._transmit(item, with_time_left(request, item.deadline_s, now_s))
        except (LimitExceeded, Rejected) as error:
            item.problem = str(error)
            self._untaken.append(request.id)
            self._untaken_s = now_s

    def _transmit(self, item: _Outstanding, request: Request) -> None:
        if request.flags & RAW:
            no_raw = self._no_raw if request.flags & CALL else self._no_raw_cast
            if no_raw:
                raise Rejected(no_raw)
        self._send(encode_request(request), item.stream)
        item.sent = True
        item.problem = ""

    def _close(self, request_id: bytes) -> _Outstanding | None:
        item = self._open.pop(request_id, None)
        if item is None:
            return None
        self._deadlines.discard(request_id)
        return item

    def receive(self, message: Message) -> list[Outcome]:
        """Take a Receipt, Reply or Returned; return what it means."""
        match message:
            case Reply(request_id, flags, body):
                item = self._open.get(request_id)
                if item is not None and item.request.flags & CALL:
                    if not flags & FINAL:
                        return [Heartbeat(request_id)]
                    self._close(request_id)
                    if flags & _FAILURE_OR_RAW != item.result_flags and not flags & FAILURE:
                        flags, body = FAILURE, _WRONG_KIND
                    return [Answered(request_id, flags & FAILURE != 0, body)]
            case Receipt(request_id):
                item = self._open.get(request_id)
                if item is not None and not item.request.flags & CALL:
                    self._close(request_id)
                    return [Taken(request_id)]
            case Returned(request_id, reason, text):
                if self._close(request_id) is not None:
                    return [HandedBack(request_id, reason, text)]
            case _:
                return []
        self.unmatched += 1
        return []

    def cancel(self, request_id: bytes) -> None:
        """Nobody waits for it any more: forget it, and tell the peer to drop it."""
        item = self._close(request_id)
        if item is not None and item.sent and self.connected:
            self._send(encode(Cancel(request_id)), item.stream)

    def forget(self, request_id: bytes) -> Request | None:
        """Forget a request without a word to the peer. Returns it, if it was open."""
        item = self._close(request_id)
        return item.request if item is not None else None

    def settle(self, ids: Iterable[bytes]) -> None:
        """These ids can never be sent again: the peer may forget them."""
        if self.connected:
            for chunk in id_chunks(ids):
                self._send(encode(Settled(chunk)), CONTROL)

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        return self._untaken_s if self._untaken else self._deadlines.next()

    def handle_timeout(self, now_s: float) -> list[Outcome]:
        """Give up what is past its time, and what the peer cannot take."""
        outcomes: list[Outcome] = []
        untaken, self._untaken = self._untaken, []
        for request_id in untaken:
            item = self._open.get(request_id)
            if item is not None and item.problem:
                self._close(request_id)
                outcomes.append(self._untakable(item))
        for request_id in self._deadlines.due(now_s):
            item = self._open[request_id]
            # Before us, perhaps, by who asks us: to a daemon that is no more.
            was_sent = item.sent or item.request.flags & REDELIVERED != 0
            self.cancel(request_id)
            outcomes.append(Overdue(request_id, was_sent))
        return outcomes

    @staticmethod
    def _untakable(item: _Outstanding) -> HandedBack:
        refused = HandedBack(item.request.id, REFUSED, item.problem)
        # To a peer before this one, which took more.
        was_sent = item.sent or item.request.flags & REDELIVERED
        return refused.doubted() if was_sent else refused


class Deliver(Value):
    """A request that was never seen before. Its time, if any, is in `timeout_ms`, from now."""

    __slots__ = ("request",)
    __match_args__: Final = ("request",)

    def __init__(self, request: Request) -> None:
        self.request = request

    def fields(self) -> tuple[Request]:
        return (self.request,)


class Cancelled(NamedTuple):
    """Nobody waits for this request any more: drop it, tell who works on it."""

    id: bytes


Delivery = Deliver | Cancelled

_CALL_OR_LOCAL: Final = CALL | LOCAL
_RUNNING: Final = 0
_TAKEN: Final = 1
_ANSWERED: Final = 2
_GIVEN_UP: Final = 3


class _Record:
    __slots__ = ("at_s", "beat_s", "call", "is_told", "reply", "result_flags", "state")

    def __init__(self, flags: int, now_s: float) -> None:
        self.state = _RUNNING
        self.result_flags = FINAL | RAW_REPLY if flags & RAW else FINAL
        self.call = flags & CALL != 0
        # A call whose caller is told what is returned, and does not ask again. (A program on the
        # host may, with the same id: no copy comes from anybody else.)
        self.is_told = flags & _CALL_OR_LOCAL == CALL
        self.at_s = now_s
        self.beat_s = now_s  # when the next heartbeat may be said
        self.reply: bytes | None = None


class Responder:
    """The requests a peer sent us: each is delivered once, whatever comes again.

    Args:
        send: Queues a message to the peer.
        requests_max: Open requests; more are returned as BUSY.
        records_max: Ids remembered after they are over.
        grace_s: Deadlines come so much later here than with who works on a request: it says what
            became of it.
        is_final: Who waits for a call is told what is returned here; it is offered to nobody else.
            Of a cast too, only what COMES_AGAIN may come again.
    """

    def __init__(
        self,
        send: Send,
        *,
        requests_max: int = REQUESTS_MAX,
        records_max: int = RECORDS_MAX,
        grace_s: float = 0.0,
        is_final: bool = False,
    ) -> None:
        self._send = send
        self._grace_s = grace_s
        self._is_final = is_final
        self._requests_max = requests_max
        self._records_max = records_max
        self._running: dict[bytes, _Record] = {}
        # In the order of their times. (An OrderedDict takes three times as long for each change.)
        self._over: dict[bytes, _Record] = {}
        self._settled: dict[bytes, _Record] = {}
        # The ids of that: a dict looks for its first key past all that were deleted before it.
        self._settled_ids: deque[bytes] = deque()
        self._deadlines = _Deadlines()
        self._reply_bytes = 0
        self.repeats = 0  # requests that came again and were not delivered again
        self.evicted = 0  # ids forgotten before they were settled

    def __contains__(self, request_id: bytes) -> bool:
        return request_id in self._running

    def __len__(self) -> int:
        return len(self._running)

    def remembered(self) -> tuple[bytes, ...]:
        """Every id we would recognise: settled, then running, then over, oldest first."""
        return (*self._settled, *self._running, *self._over)

    def over(self) -> tuple[tuple[bytes, bool], ...]:
        """(id, is a call) of what is taken or answered, and not settled."""
        return tuple(
            (request_id, record.call)
            for request_id, record in self._over.items()
            if record.state != _GIVEN_UP
        )

    def unsettled(self) -> Iterable[bytes]:
        """The ids of what is taken, answered or given up, and may come again."""
        return self._over.keys()

    def is_over(self, request_id: bytes) -> bool:
        """It is taken, answered or given up; perhaps it is settled."""
        return request_id in self._over or request_id in self._settled

    def receive(self, message: Message, now_s: float) -> list[Delivery]:
        """Take a Request, Cancel or Settled; return what is to be done."""
        match message:
            case Request():
                return self._receive_request(message, now_s)
            case Cancel(request_id):
                if self._give_up(request_id, now_s):
                    return [Cancelled(request_id)]
            case Settled(ids):
                for request_id in ids:
                    self._settle(request_id, now_s)
            case _:
                pass
        return []

    def _receive_request(self, request: Request, now_s: float) -> list[Delivery]:
        request_id = request.id
        if request_id in self._running:
            self.repeats += 1
            return []
        record = self._over.get(request_id) or self._settled.get(request_id)
        if record is not None:
            self.repeats += 1
            self._repeat(request_id, record)
            return []
        if len(self._running) >= self._requests_max:
            assert len(self._running) == self._requests_max
            self._refuse_unheld(request, now_s)
            return []
        if request.timeout_ms:
            self._deadlines.add(now_s + request.timeout_ms / 1000 + self._grace_s, request_id)
        self._running[request_id] = _Record(request.flags, now_s)
        return [Deliver(request)]

    def _refuse_unheld(self, request: Request, now_s: float) -> None:
        text = f"{self._requests_max} requests are open (REQUESTS_MAX)"
        refused = HandedBack(request.id, BUSY, text)
        if request.is_call and request.flags & REDELIVERED:
            # We do not know it, but who did may be gone: BUSY would say that it has not run.
            refused = refused.doubted()
        record = _Record(request.flags, now_s)
        if refused.reason == AGENT_GONE or (self._is_final and record.is_told):
            self._running[request.id] = record
            self.refuse(*refused)
        else:
            self._send(encode(Returned(*refused)), CONTROL)

    def _repeat(self, request_id: bytes, record: _Record) -> None:
        if record.state == _TAKEN:
            self._send(encode_receipt(request_id), CONTROL)
        elif record.reply is not None:
            try:
                self._send(record.reply, reply_stream(request_id))
            except LimitExceeded as error:  # it was not for the peer we had then
                self._send(encode(Returned(request_id, REFUSED, str(error))), CONTROL)
        else:
            text = "answered before; the answer is no longer kept"
            self._send(encode(Returned(request_id, EXPIRED, text)), CONTROL)

    def take(self, request_id: bytes, now_s: float) -> bool:
        """Responsibility for a cast is taken. False if no such cast is open."""
        record = self._running.get(request_id)
        if record is None or record.call:
            return False
        del self._running[request_id]
        record.state = _TAKEN
        self._remember(request_id, record, now_s)
        self._send(encode_receipt(request_id), CONTROL)
        return True

    def answer(
        self,
        request_id: bytes,
        body: bytes,
        *,
        failed: bool,
        now_s: float,
        or_failure: bool = False,
    ) -> bool:
        """A call is answered; a RAW one, unless it failed, by bytes. False if no such call is open.

        Args:
            or_failure: If the answer is too large, answer with a failure that says so.

        Raises:
            LimitExceeded: The answer is too large; it can be answered again, by less.
        """
        record = self._running.get(request_id)
        if record is None or not record.call:
            return False
        flags = FINAL | FAILURE if failed else record.result_flags
        reply = encode_reply(request_id, flags, body)
        try:
            self._send(reply, reply_stream(request_id))
        except LimitExceeded as error:
            if not or_failure:
                raise
            failure = encode_failure("LimitExceeded", str(error))
            reply = encode_reply(request_id, FINAL | FAILURE, failure)
            self._send(reply, reply_stream(request_id))
        del self._running[request_id]
        self._keep_reply(request_id, record, reply, now_s)
        return True

    def tell(self, outcome: Outcome, now_s: float) -> None:
        """What became of a request where it was passed on to becomes of it here."""
        match outcome:
            case Answered(request_id, failed, body):
                self.answer(request_id, body, failed=failed, now_s=now_s, or_failure=True)
            case Taken(request_id):
                self.take(request_id, now_s)
            case Heartbeat(request_id):
                self.heartbeat(request_id, now_s)
            case HandedBack():
                self.give_back(*outcome)
            case Overdue():
                self.give_back(*outcome.returned)

    def heartbeat(self, request_id: bytes, now_s: float) -> None:
        """The call is being worked on. Said at most every HEARTBEAT_S: who works may say it at
        will."""
        record = self._running.get(request_id)
        if record is not None and now_s >= record.beat_s:
            record.beat_s = now_s + HEARTBEAT_S
            self._send(encode_reply(request_id, 0, b""), reply_stream(request_id))

    def give_back(self, request_id: bytes, reason: int, text: str) -> bool:
        """It does not run here, and is forgotten: it may come again, and then run. So nobody who
        waits for it may be told that it has not run. False if it is not open.

        One that may have run (AGENT_GONE) stays known: a copy must not run, but gets this again. So
        does, where this is final, what is over with it.
        """
        record = self._running.get(request_id)
        if record is None:
            return False
        is_over = self._is_final and (record.is_told or reason not in COMES_AGAIN)
        if is_over or reason == AGENT_GONE:
            return self.refuse(request_id, reason, text)
        del self._running[request_id]
        self._deadlines.discard(request_id)
        self._send(encode(Returned(request_id, reason, text)), CONTROL)
        return True

    def refuse(self, request_id: bytes, reason: int, text: str) -> bool:
        """It will never run: a copy gets this again. False if it is not open."""
        record = self._running.pop(request_id, None)
        if record is None:
            return False
        returned = encode(Returned(request_id, reason, text))
        self._send(returned, CONTROL)
        self._keep_reply(request_id, record, returned, record.at_s)
        return True

    def _give_up(self, request_id: bytes, now_s: float) -> bool:
        """Nobody waits any more. The id stays known: a late copy must not run a second time."""
        record = self._running.pop(request_id, None)
        if record is None:
            return False
        record.state = _GIVEN_UP
        self._remember(request_id, record, now_s)
        return True

    def _keep_reply(self, request_id: bytes, record: _Record, reply: bytes, now_s: float) -> None:
        record.state = _ANSWERED
        record.reply = reply
        self._reply_bytes += len(reply)
        self._remember(request_id, record, now_s)

    def _remember(self, request_id: bytes, record: _Record, now_s: float) -> None:
        record.at_s = now_s
        if record.reply is None:
            self._deadlines.discard(request_id)
        over = self._over
        assert request_id not in self._running and request_id not in self._settled
        over[request_id] = record
        while len(over) > self._records_max:
            self._forget(next(iter(over)))
            self.evicted += 1
        if self._reply_bytes > REPLY_BYTES_MAX:
            self._drop_replies()

    def _drop_replies(self) -> None:
        for request_id, record in self._over.items():
            if self._reply_bytes <= REPLY_BYTES_MAX:
                return
            self._drop_reply(request_id, record)

    def _drop_reply(self, request_id: bytes, record: _Record) -> None:
        if record.reply is not None:
            self._reply_bytes -= len(record.reply)
            record.reply = None
            self._deadlines.discard(request_id)

    def _settle(self, request_id: bytes, now_s: float) -> None:
        record = self._forget(request_id)
        if record is not None:
            record.at_s = now_s
            self._settled[request_id] = record
            self._settled_ids.append(request_id)
            if len(self._settled_ids) > SETTLED_MAX:
                self._settled.pop(self._settled_ids.popleft(), None)

    def _forget(self, request_id: bytes) -> _Record | None:
        record = self._over.pop(request_id, None)
        if record is not None:
            self._drop_reply(request_id, record)
            assert self._over or not self._reply_bytes, "answers are kept of what is over"
        return record

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        forgotten_s = (
            next(iter(kept.values())).at_s + keep_s
            for kept, keep_s in ((self._over, RETENTION_S), (self._settled, SETTLED_KEEP_S))
            if kept
        )
        return earliest(self._deadlines.next(), *forgotten_s)

    def handle_timeout(self, now_s: float) -> list[Delivery]:
        """Drop what is past its time: running requests, kept answers, old ids."""
        cancelled: list[Delivery] = []
        for request_id in self._deadlines.due(now_s):
            if self._give_up(request_id, now_s):
                cancelled.append(Cancelled(request_id))
            elif (record := self._over.get(request_id)) is not None:
                self._drop_reply(request_id, record)
        for request_id in _past(self._over, RETENTION_S, now_s):
            self._forget(request_id)
        for request_id in _past(self._settled, SETTLED_KEEP_S, now_s):
            del self._settled[request_id]
            self._settled_ids.popleft()
        return cancelled


def _past(kept: dict[bytes, _Record], keep_s: float, now_s: float) -> list[bytes]:
    """The ids of what has been kept for long enough: they stand first."""
    past = []
    for request_id, record in kept.items():
        if record.at_s + keep_s > now_s:
            break
        past.append(request_id)
    return past
