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
    responder.take(id) / answer(id, ...) / give_back(id, ...)
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple

from vchan.errors import LimitExceeded
from vchan.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FAILURE,
    FINAL,
    REDELIVERED,
    REFUSED,
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
    request_stream,
)
from vchan.session import CONTROL

Send = Callable[[bytes, int], None]
"""Queues a message on a stream of the session."""

REQUESTS_MAX: Final = 1024
"""Requests a responder has open at a time. A broker's prefetch stays far below."""
RECORDS_MAX: Final = 4096
"""Ids a responder remembers after they were taken or answered."""
RETENTION_S: Final = 3600.0
"""How long, if nobody says that they are settled."""
SETTLED_MAX: Final = 2048
"""Settled ids a responder still recognises."""
SETTLED_KEEP_S: Final = 600.0
"""How long. A caller that lost its connection before the broker confirmed publishes the same
request again: the broker has then forgotten the first copy and hands out the second."""
HEARTBEAT_S: Final = 0.5
"""Heartbeats of one call are passed on this often at most: callers ask for one in some seconds."""
REPLY_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bodies of answers a responder keeps to give them again; the oldest go first."""


_new_tuple = tuple.__new__
"""Makes a NamedTuple in half the time that its own constructor takes."""


class Taken(NamedTuple):
    """The responder has taken responsibility for this cast."""

    id: bytes


class Answered(NamedTuple):
    """A call's answer. `body` is JSON: the result, or if `failed` the failure."""

    id: bytes
    failed: bool
    body: bytes


class Heartbeat(NamedTuple):
    """The call is still being worked on."""

    id: bytes


class HandedBack(NamedTuple):
    """The request has not run (AGENT_GONE: may have)."""

    id: bytes
    reason: int
    text: str


class Overdue(NamedTuple):
    """Its time is up. The responder has been told to drop it; or, if it was not sent, never gets
    it."""

    id: bytes
    was_sent: bool = True


Outcome = Taken | Answered | Heartbeat | HandedBack | Overdue


class _Outstanding:
    __slots__ = ("deadline_s", "problem", "request", "sent", "stream")

    def __init__(self, request: Request, deadline_s: float | None) -> None:
        self.request = request
        self.stream = request_stream(request.topic)
        self.deadline_s = deadline_s
        self.sent = False
        self.problem = ""  # why the peer we have now cannot take it


class _Deadlines:
    """Ids by time, each at most once. What is no longer waited for stays in the heap until its time
    comes, or until it is most of the heap."""

    __slots__ = ("_at_s", "_heap")

    def __init__(self) -> None:
        self._at_s: dict[bytes, float] = {}
        self._heap: list[tuple[float, bytes]] = []

    def add(self, at_s: float, request_id: bytes) -> None:
        self._at_s[request_id] = at_s
        heappush(self._heap, (at_s, request_id))
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
    """

    def __init__(self, send: Send, *, grace_s: float = 0.0) -> None:
        self._send = send
        self._grace_s = grace_s
        self._open: dict[bytes, _Outstanding] = {}
        self._deadlines = _Deadlines()
        self._untaken: list[bytes] = []  # too large for the peer we have now
        self._untaken_s = 0.0
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

    def opened(self, now_s: float) -> None:
        """A new session began: repeat, in order, what is not over.

        A resumed session needs no word: it loses nothing. What this peer cannot take is handed
        back by the next `handle_timeout`, which is due at once.
        """
        self.connected = True
        self._holds = False
        for item in self._open.values():
            if item.sent:
                item.request = item.request._replace(flags=item.request.flags | REDELIVERED)
            self._transmit_late(item, now_s)

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
        """
        assert request.id not in self._open
        deadline_s = now_s + request.timeout_ms / 1000 if request.timeout_ms else None
        item = _Outstanding(request, deadline_s)
        if self.connected and not self._holds:
            self._transmit(item, request)
        self._open[request.id] = item
        if deadline_s is not None:
            self._deadlines.add(deadline_s + self._grace_s, request.id)

    def _transmit_late(self, item: _Outstanding, now_s: float) -> None:
        request = item.request
        if item.deadline_s is not None:
            left_ms = max(1, int((item.deadline_s - now_s) * 1000))
            request = request._replace(timeout_ms=left_ms)
        try:
            self._transmit(item, request)
        except LimitExceeded as error:
            item.problem = str(error)
            self._untaken.append(request.id)
            self._untaken_s = now_s

    def _transmit(self, item: _Outstanding, request: Request) -> None:
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
            case Reply():
                request_id, flags, body = message
                if self._waits(request_id, for_reply=True):
                    if not flags & FINAL:
                        return [Heartbeat(request_id)]
                    self._close(request_id)
                    return [_new_tuple(Answered, (request_id, flags & FAILURE != 0, body))]
            case Receipt(request_id):
                if self._waits(request_id, for_reply=False):
                    self._close(request_id)
                    return [Taken(request_id)]
            case Returned(request_id, reason, text):
                if self._close(request_id) is not None:
                    return [HandedBack(request_id, reason, text)]
            case _:
                return []
        self.unmatched += 1
        return []

    def _waits(self, request_id: bytes, *, for_reply: bool) -> bool:
        item = self._open.get(request_id)
        return item is not None and (item.request.flags & CALL != 0) is for_reply

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
                outcomes.append(HandedBack(request_id, REFUSED, item.problem))
        for request_id in self._deadlines.due(now_s):
            item = self._open[request_id]
            # Before us, perhaps, by who asks us: to a daemon that is no more.
            was_sent = item.sent or item.request.flags & REDELIVERED != 0
            self.cancel(request_id)
            outcomes.append(Overdue(request_id, was_sent))
        return outcomes


class Deliver(NamedTuple):
    """A request that was never seen before. Its time, if any, is in `timeout_ms`, from now."""

    request: Request


class Cancelled(NamedTuple):
    """Nobody waits for this request any more: drop it, tell who works on it."""

    id: bytes


Delivery = Deliver | Cancelled

_RUNNING: Final = 0
_TAKEN: Final = 1
_ANSWERED: Final = 2
_GIVEN_UP: Final = 3


class _Record:
    __slots__ = ("at_s", "beat_s", "call", "reply", "state")

    def __init__(self, call: bool, now_s: float) -> None:
        self.state = _RUNNING
        self.call = call
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
    """

    def __init__(
        self,
        send: Send,
        *,
        requests_max: int = REQUESTS_MAX,
        records_max: int = RECORDS_MAX,
        grace_s: float = 0.0,
    ) -> None:
        self._send = send
        self._grace_s = grace_s
        self._requests_max = requests_max
        self._records_max = records_max
        self._running: dict[bytes, _Record] = {}
        self._over: OrderedDict[bytes, _Record] = OrderedDict()
        self._settled: OrderedDict[bytes, _Record] = OrderedDict()
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
            text = f"{self._requests_max} requests are open (REQUESTS_MAX)"
            self._send(encode(Returned(request_id, BUSY, text)), CONTROL)
            return []
        if request.timeout_ms:
            self._deadlines.add(now_s + request.timeout_ms / 1000 + self._grace_s, request_id)
        self._running[request_id] = _Record(request.flags & CALL != 0, now_s)
        return [_new_tuple(Deliver, (request,))]

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

    def answer(self, request_id: bytes, body: bytes, *, failed: bool, now_s: float) -> bool:
        """A call is answered. False if no such call is open.

        Raises:
            LimitExceeded: The answer is too large. Answer again with a failure that says so.
        """
        record = self._running.get(request_id)
        if record is None or not record.call:
            return False
        flags = FINAL | FAILURE if failed else FINAL
        reply = encode_reply(request_id, flags, body)
        self._send(reply, reply_stream(request_id))
        del self._running[request_id]
        self._keep_reply(request_id, record, reply, now_s)
        return True

    def heartbeat(self, request_id: bytes, now_s: float) -> None:
        """The call is being worked on. Said at most every HEARTBEAT_S: who works may say it at
        will."""
        record = self._running.get(request_id)
        if record is not None and now_s >= record.beat_s:
            record.beat_s = now_s + HEARTBEAT_S
            self._send(encode_reply(request_id, 0, b""), reply_stream(request_id))

    def give_back(self, request_id: bytes, reason: int, text: str) -> bool:
        """It will not run here: forget it. False if it is not open.

        One that may have run (AGENT_GONE) stays known: a copy must not run, but gets this again.
        """
        record = self._running.pop(request_id, None)
        if record is None:
            return False
        returned = encode(Returned(request_id, reason, text))
        self._send(returned, CONTROL)
        if reason == AGENT_GONE:
            self._keep_reply(request_id, record, returned, record.at_s)
        else:
            self._deadlines.discard(request_id)
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
            if len(self._settled) > SETTLED_MAX:
                self._settled.popitem(last=False)

    def _forget(self, request_id: bytes) -> _Record | None:
        record = self._over.pop(request_id, None)
        if record is not None:
            self._drop_reply(request_id, record)
        return record

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        times = [
            next(iter(kept.values())).at_s + keep_s
            for kept, keep_s in ((self._over, RETENTION_S), (self._settled, SETTLED_KEEP_S))
            if kept
        ]
        deadline_s = self._deadlines.next()
        if deadline_s is not None:
            times.append(deadline_s)
        return min(times) if times else None

    def handle_timeout(self, now_s: float) -> list[Delivery]:
        """Drop what is past its time: running requests, kept answers, old ids."""
        cancelled: list[Delivery] = []
        for request_id in self._deadlines.due(now_s):
            if self._give_up(request_id, now_s):
                cancelled.append(Cancelled(request_id))
            elif (record := self._over.get(request_id)) is not None:
                self._drop_reply(request_id, record)
        while self._over:
            request_id, record = next(iter(self._over.items()))
            if record.at_s + RETENTION_S > now_s:
                break
            self._forget(request_id)
        while self._settled:
            request_id, record = next(iter(self._settled.items()))
            if record.at_s + SETTLED_KEEP_S > now_s:
                break
            del self._settled[request_id]
        return cancelled
