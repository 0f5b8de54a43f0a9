"""All byte streams of one end, over a path that may lose what is under way.

Rules of this file
1. No I/O, no clock, no logging; randomness is handed in. Time comes in as `now_s`; facts go out by
   `take_events`, messages by `next_message`, one at a time: who carries them asks for the next one
   when there is room for it, so that streams queue here and not among the requests.
2. Every number on the wire is an absolute offset. So a message that is lost, late or repeated can
   do no harm: an end that waits asks, the answer says what the other end has, the rest is resent.
3. A stream ends once: both halves are done, or a reason says why not. Nothing is left out silently.
4. Nothing that a peer sends raises, grows without a limit, or makes an end resend at a rate above
   once in REWIND_S for a stream.

    ends.connected(now_s)                    # a new session: what was under way is lost
    ends.receive(message, now_s)             # of this family
    for event in ends.take_events(): ...
    while there_is_room() and (message := ends.next_message(now_s)):
        session.send(message, stream)
    ends.handle_timeout(now_s)               # when next_timeout() has come
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from vchan.errors import LimitExceeded
from vchan.streams.halves import WINDOW_BYTES, Fit, InHalf, OutHalf
from vchan.streams.messages import (
    ANSWER,
    ASK,
    BUSY,
    CHUNK_BYTES_MAX,
    CLOSED,
    DONE,
    END,
    FACTS_BYTES_MAX,
    FORGOTTEN,
    ID_BYTES,
    NO_TAG,
    REWIND,
    SILENT,
    TAG_BYTES,
    TARGET_BYTES_MAX,
    UNSUPPORTED,
    VERSION,
    VIOLATED,
    Malformed,
    Open,
    Part,
    Progress,
    Reset,
    StreamOffer,
    decode,
    encode,
)

STREAMS_MAX: Final = 32
"""Streams that one end has opened, and as many that it was asked for: with WINDOW_BYTES and
SEND_BYTES_MAX each, 8 MiB for a VM. At it: LimitExceeded here, Reset (BUSY) for the peer."""
IN_FLIGHT_BYTES_MAX: Final = 2 * CHUNK_BYTES_MAX
"""Bytes of all streams that are sent and not acknowledged: two messages, one on its way and one
being handled. A request waits behind them in a slow guest; fewer would cost more messages for as
many bytes. At it: streams wait, requests do not."""
HELD_UP_S: Final = 0.25
"""What a stream has under way and nobody acknowledged for so long counts for it alone: its program
may be stopped, and is no reason for others to wait. At it: the others go on."""
UNDER_WAY_BYTES_MAX: Final = 3 * IN_FLIGHT_BYTES_MAX
"""Bytes that are sent and not acknowledged, with those of streams that stand still: less than a
daemon between the ends keeps for one program. At it: streams wait, until UNHEARD_ASKS."""
GIVE_WAY_S: Final = 0.1
"""Since the last word of a request: so long streams leave most of the processor to those who answer
it. At it: they go on as fast as they can."""
REST_TIMES: Final = 4
"""While they give way, streams rest so many times as long as an end was busy with them: they keep a
fifth of its time, or what little a slow one has in REST_S_MAX."""
REST_S_MAX: Final = 0.1
"""The longest rest: far below PROBE_S, so that nobody asks where bytes are. At it: they go on."""
ENDED_MAX: Final = 256
"""Streams that are over, and what a late message of theirs is answered. At it: the oldest is
forgotten; its peer, if it did not hear the end, gets a Reset (FORGOTTEN)."""
DOUBTS_MAX: Final = 64
"""Streams that were opened here and are over, of which the other end may not know yet: as many as
a daemon keeps in mind. At it: nothing is said of the oldest until the other end asks, and that one
gives it up (SILENT) if a daemon between them was restarted."""
REPLIES_MAX: Final = 64
"""Answers about streams that this end does not have, not yet carried. At it: dropped and counted;
who waits for one asks again."""
PROBE_S: Final = 1.0
"""An end that waits for something asks after this, and then after twice as long each time."""
ASK_S_MAX: Final = 30.0
"""The longest time between two questions of an end that waits."""
IDLE_S: Final = 60.0
"""An end that waits for nothing asks after this whether the other end still has the stream."""
UNHEARD_ASKS: Final = 2
"""Questions without an answer, in some three seconds, after which what a stream has under way is
taken for lost: its program may be killed without a word, and others are to go on. At it: no more of
its bytes are sent until its peer is heard."""
REWIND_S: Final = 0.25
"""A stream's bytes are sent again at most this often."""
OFFER_S: Final = 5.0
"""A peer that takes byte streams says so first in a session. At it: streams that were never
accepted are reset (UNSUPPORTED). Others wait: their peer may be paused."""
ASKS_MAX: Final = 24
"""Questions without an answer, in some ten minutes, after which a guest gives a stream up. Counted
and not timed: a guest's clock may jump. At it: the stream is reset (SILENT)."""


class StreamWanted(NamedTuple):
    """The peer wants a stream: `accept` it, or `reset` it with the reason."""

    id: bytes
    target: str
    facts: str


class Accepted(NamedTuple):
    """The peer has connected a stream that was opened here."""

    id: bytes


class Readable(NamedTuple):
    """Bytes have arrived, or the peer's half has ended."""

    id: bytes


class Writable(NamedTuple):
    """A `write` took less than it was given; there is room again."""

    id: bytes


class Ended(NamedTuple):
    """The stream is over. Reason 0: both halves are done, and everything has been read."""

    id: bytes
    reason: int
    text: str


class Fault(NamedTuple):
    """The peer has sent what no peer of good will sends."""

    reason: str


StreamEvent = StreamWanted | Accepted | Readable | Writable | Ended | Fault


class StreamPhase(enum.Enum):
    """Of a stream at one end."""

    OPENING = "opened here, not accepted yet"
    ASKED = "the peer wants it, nobody has accepted it yet"
    OPEN = "both ends have it"


class StreamCounters:
    """What happened, since the start."""

    __slots__ = (
        "accepted",
        "asks",
        "bad_messages",
        "opened",
        "replies_dropped",
        "resets",
        "rests",
        "rewinds",
    )

    def __init__(self) -> None:
        self.opened = 0
        self.accepted = 0
        self.resets = 0  # streams that ended with a reason
        self.rests = 0  # times that requests went before them
        self.rewinds = 0
        self.asks = 0
        self.bad_messages = 0
        self.replies_dropped = 0

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}


class _StreamEnd:
    """One stream at one end."""

    __slots__ = (
        "asked_s", "asked_sent", "asks", "credit_told", "due", "facts", "heard_s", "id",
        "incoming", "is_opener", "is_stuck", "is_told", "outgoing", "phase", "rewind_s", "tag",
        "target", "wants_room",
    )  # fmt: skip

    def __init__(self, stream_id: bytes, target: str, facts: str, phase: StreamPhase, now_s: float):
        self.id = stream_id
        self.target = target
        self.facts = facts
        self.phase = phase
        self.tag = NO_TAG
        self.is_opener = phase is StreamPhase.OPENING
        self.outgoing = OutHalf()
        self.incoming = InHalf()
        self.due: int | None = None  # the flags of a Progress or Open that is to go out
        self.credit_told = 0
        self.wants_room = False
        self.heard_s = now_s
        self.asked_s = now_s  # the last question, or the last bytes that ask for an answer
        self.asked_sent = 0  # what had been sent when the last question went out
        self.asks = 0  # since the peer was heard
        self.rewind_s = float("-inf")
        self.is_stuck = False  # of what is under way nothing was heard for HELD_UP_S
        self.is_told = False  # the peer has answered since its END arrived: it knows that it did

    def owe(self, flags: int = 0) -> None:
        self.due = (self.due or 0) | flags

    @property
    def waits(self) -> bool:
        """Something is to come from the peer."""
        return self.phase is StreamPhase.OPENING or not self.outgoing.is_idle

    @property
    def is_unheard(self) -> bool:
        """The peer may be gone."""
        return self.asks >= UNHEARD_ASKS

    @property
    def stuck_at_s(self) -> float:
        """When it holds up others no more, if the peer is not heard before."""
        is_under_way = self.outgoing.in_flight and not self.is_stuck
        return max(self.heard_s, self.asked_s) + HELD_UP_S if is_under_way else float("inf")

    @property
    def ask_at_s(self) -> float:
        """When to ask, if the peer is not heard before."""
        if self.phase is StreamPhase.ASKED:
            return float("inf")  # the peer asks
        wait_s = min(PROBE_S * 2.0 ** min(self.asks, 16), ASK_S_MAX)
        if not self.waits and not self.asks:
            wait_s = IDLE_S
        return max(self.heard_s, self.asked_s) + wait_s


class _Doubt:
    """A stream that was opened here and is over, of which the other end may not know yet."""

    __slots__ = ("is_done", "is_due", "question", "was_asked")

    def __init__(self, stream: _StreamEnd, *, is_done: bool) -> None:
        incoming = stream.incoming
        numbers = (stream.id, stream.tag, incoming.received, incoming.credit)
        self.question = encode(Open(*numbers, stream.target, stream.facts))
        self.is_done = is_done  # both halves were; otherwise it was reset
        self.is_due = not is_done  # a Reset is not answered, the last Progress is
        self.was_asked = False  # in a later session: its daemon takes it for open


class StreamEnds:
    """One end of a path, and its streams. See the top of this file.

    Args:
        entropy: Gives that many fresh random bytes: 16 for a stream that is opened, 8 for one
            that is accepted.
        asks_max: Questions without an answer before a stream is given up; None: never. A host's
            program waits as long as it lives: its VM may be paused for hours.
        offer_s: See OFFER_S; None: a peer that is silent may be paused, for it is known to take
            byte streams.
    """

    def __init__(
        self,
        entropy: Callable[[int], bytes],
        *,
        asks_max: int | None = ASKS_MAX,
        offer_s: float | None = OFFER_S,
    ) -> None:
        self._offer_s = float("inf") if offer_s is None else offer_s
        self.counters = StreamCounters()
        self._entropy = entropy
        self._asks_max = asks_max
        self._streams: dict[bytes, _StreamEnd] = {}  # whose turn it is stands first
        self._ended: dict[bytes, bytes] = {}  # what a late message is answered
        self._doubts: dict[bytes, _Doubt] = {}  # of those that were opened here
        self._replies: dict[bytes, bytes] = {}
        self._events: list[StreamEvent] = []
        self._offer_due = False
        self._is_offered = False
        self._offer_until_s: float | None = None
        self._gives_way_until_s = float("-inf")
        self._rests_until_s: float | None = None

    # ---------------------------------------------------------------- the path

    def connected(self, now_s: float) -> None:
        """A new session has begun: what was under way may be lost. Not for one that goes on."""
        self._offer_due = True
        self._is_offered = False
        self._offer_until_s = now_s + self._offer_s

    def take_events(self) -> list[StreamEvent]:
        """What has happened since this was called last."""
        events, self._events = self._events, []
        return events

    def give_way(self, now_s: float) -> None:
        """A request has come here, or its answer goes: it is to wait for little of what streams
        do. They rest after all that they do, for GIVE_WAY_S."""
        self._gives_way_until_s = now_s + GIVE_WAY_S

    def worked(self, took_s: float, now_s: float) -> float | None:
        """The processor has worked so long for streams here. Until when they rest, if they do:
        then there is a timeout."""
        if now_s >= self._gives_way_until_s:
            return None
        since_s = now_s if self._rests_until_s is None else max(now_s, self._rests_until_s)
        self.counters.rests += 1
        self._rests_until_s = min(since_s + REST_TIMES * took_s, now_s + REST_S_MAX)
        return self._rests_until_s

    def next_message(self, now_s: float) -> bytes | None:
        """The next message to carry, if there is one: what streams owe goes before their bytes."""
        if self._offer_due:
            self._offer_due = False
            return encode(StreamOffer(VERSION, VERSION))
        if not self._is_offered:
            return None
        for stream_id in self._replies:
            return self._replies.pop(stream_id)
        for doubt in self._doubts.values():
            if doubt.is_due:
                doubt.is_due = False
                return doubt.question
        if self._rests_until_s is not None and now_s < self._rests_until_s:
            return None  # what is not acknowledged holds up the other end, too
        for stream in self._streams.values():
            if stream.due is not None:
                return encode(self._progress(stream, now_s))
        return self._next_bytes(now_s)

    def _progress(self, stream: _StreamEnd, now_s: float) -> Open | Progress:
        """What a stream owes: how far it is, and what it wants to know."""
        flags, stream.due = stream.due or 0, None
        incoming = stream.incoming
        stream.credit_told = incoming.credit
        if flags & ASK:
            stream.asked_s = now_s
            stream.asked_sent = stream.outgoing.sent
        numbers = (stream.id, stream.tag, incoming.received, incoming.credit)
        if flags & ASK and stream.is_opener:
            # With the target, so that a relay that did not know the stream may let it pass.
            stream.due = flags & ~ASK or None
            return Open(*numbers, stream.target, stream.facts)
        assert stream.phase is StreamPhase.OPEN, "before that there is nothing to tell"
        return Progress(flags, *numbers)

    def _next_bytes(self, now_s: float) -> bytes | None:
        under_way = sum(each.outgoing.in_flight for each in self._streams.values())
        left = min(IN_FLIGHT_BYTES_MAX - self.in_flight, UNDER_WAY_BYTES_MAX - under_way)
        if left <= 0:
            return None
        for stream in self._streams.values():
            if stream.phase is not StreamPhase.OPEN or stream.is_unheard:
                continue
            own = stream.outgoing.in_flight if stream.is_stuck else 0
            room = min(left, IN_FLIGHT_BYTES_MAX - own)
            taken = stream.outgoing.take(min(room, CHUNK_BYTES_MAX)) if room > 0 else None
            if taken is not None:
                stream.asked_s = now_s
                self._streams[stream.id] = self._streams.pop(stream.id)  # the others' turn
                offset, data, is_end = taken
                assert len(data) <= room, "requests find room beside streams"
                return encode(Part(END if is_end else 0, stream.id, stream.tag, offset, data))
        return None

    @property
    def in_flight(self) -> int:
        """Bytes that are sent and not acknowledged, of all streams that others wait for."""
        halves = (each.outgoing for each in self._streams.values() if not each.is_stuck)
        return sum(half.in_flight for half in halves)

    # ---------------------------------------------------------------- programs

    def open(self, target: str, facts: str, now_s: float) -> bytes:
        """Open a stream; `Accepted` or `Ended` tells of it. Bytes may be written before.

        Args:
            target: What the other end is to connect: 1 to TARGET_BYTES_MAX bytes of UTF-8.
            facts: JSON that says who asks, at most FACTS_BYTES_MAX bytes of UTF-8.

        Returns:
            The stream's id, 16 bytes.

        Raises:
            ValueError: A text is empty or too long. Nothing was opened.
            LimitExceeded: STREAMS_MAX are open. Nothing was opened.
        """
        if not 0 < len(target.encode()) <= TARGET_BYTES_MAX:
            raise ValueError(f"target: give 1 to {TARGET_BYTES_MAX} bytes of UTF-8")
        if len(facts.encode()) > FACTS_BYTES_MAX:
            raise ValueError(f"facts: give at most {FACTS_BYTES_MAX} bytes of UTF-8")
        count = self._count(opened_here=True) + 1
        if count > STREAMS_MAX:
            raise LimitExceeded("open streams", count, STREAMS_MAX, "STREAMS_MAX")
        stream = _StreamEnd(self._entropy(ID_BYTES), target, facts, StreamPhase.OPENING, now_s)
        assert stream.id not in self._streams, "ids are random"
        stream.owe(ASK)
        self._streams[stream.id] = stream
        self.counters.opened += 1
        return stream.id

    def accept(self, stream_id: bytes) -> None:
        """The target of a stream that is `StreamWanted` is connected. If it has ended: nothing."""
        stream = self._streams.get(stream_id)
        if stream is not None and stream.phase is StreamPhase.ASKED:
            stream.phase = StreamPhase.OPEN
            stream.tag = self._entropy(TAG_BYTES)
            assert stream.tag != NO_TAG, "2**-64"
            stream.owe(ANSWER)
            self.counters.accepted += 1

    def write(self, stream_id: bytes, data: bytes) -> int:
        """Hand over bytes; say how many were taken. After fewer than all, `Writable` comes."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return 0  # `Ended` says why
        taken = stream.outgoing.write(data)
        stream.wants_room = taken < len(data)
        return taken

    def finish(self, stream_id: bytes) -> None:
        """Nothing more will be written; what the peer writes is still read."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.outgoing.finish()

    def read(self, stream_id: bytes, size_max: int) -> tuple[bytes, bool]:
        """The next bytes, at most `size_max`, and whether the peer's half ends behind them."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return b"", False
        incoming = stream.incoming
        data = incoming.read(size_max)
        untold = incoming.credit - stream.credit_told
        if stream.phase is StreamPhase.OPEN and untold >= WINDOW_BYTES // 4:
            stream.owe()
        is_end = incoming.is_done
        self._finish_if_done(stream)
        return data, is_end

    def reset(self, stream_id: bytes, reason: int = CLOSED, text: str = "") -> None:
        """End a stream now. The peer is told; what was under way is dropped."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._end(stream, reason, text)

    def reset_all(self, reason: int, text: str) -> None:
        """End all streams: the path has no other end any more."""
        for stream in list(self._streams.values()):
            self._end(stream, reason, text)

    def _count(self, *, opened_here: bool) -> int:
        return sum(stream.is_opener is opened_here for stream in self._streams.values())

    # ---------------------------------------------------------------- ends

    def _end(
        self, stream: _StreamEnd, reason: int, text: str, *, told_by_peer: bool = False
    ) -> None:
        """A stream ends before its end."""
        assert reason
        self.counters.resets += 1
        self._forget(stream, encode(Reset(reason, stream.id, text)), is_due=not told_by_peer)
        if not told_by_peer:
            self._doubt(stream, is_done=False)
        self._events.append(Ended(stream.id, reason, text))

    def _finish_if_done(self, stream: _StreamEnd) -> None:
        if stream.outgoing.is_done and stream.incoming.is_done:
            incoming = stream.incoming
            numbers = (stream.id, stream.tag, incoming.received, incoming.credit)
            last = Progress(ANSWER | DONE, *numbers)
            self._forget(stream, encode(last), is_due=True)
            if not stream.is_told:
                self._doubt(stream, is_done=True)
            self._events.append(Ended(stream.id, 0, ""))

    def _forget(self, stream: _StreamEnd, last: bytes, *, is_due: bool) -> None:
        del self._streams[stream.id]
        self._ended[stream.id] = last
        if len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        if is_due:
            self._reply(stream.id, last)

    def _doubt(self, stream: _StreamEnd, *, is_done: bool) -> None:
        """What was said last of a stream may be lost with the daemon that had it. A new daemon
        passes on nothing of a stream that nobody opens there, the other end's questions neither."""
        assert stream.id not in self._streams, "one that is open asks itself"
        if stream.is_opener and stream.tag != NO_TAG:
            self._doubts[stream.id] = _Doubt(stream, is_done=is_done)
            if len(self._doubts) > DOUBTS_MAX:
                del self._doubts[next(iter(self._doubts))]

    def _answered(self, stream_id: bytes) -> bool:
        """The other end has answered for a stream that is over here. Whether our last word of it is
        to be said again: the other end, or a daemon, did not hear it."""
        doubt = self._doubts.get(stream_id)
        if doubt is None:
            return False
        if doubt.is_done:
            del self._doubts[stream_id]
            return doubt.was_asked
        doubt.is_due, doubt.was_asked = doubt.was_asked, False  # did it hear of the reset now?
        return True

    def _reply(self, stream_id: bytes, message: bytes) -> None:
        if len(self._replies) >= REPLIES_MAX and stream_id not in self._replies:
            self.counters.replies_dropped += 1
            return
        self._replies[stream_id] = message

    def _fault(self, reason: str) -> None:
        self._events.append(Fault(reason))

    def _violated(self, stream: _StreamEnd, what: str) -> None:
        self._fault(what)
        self._end(stream, VIOLATED, what)

    # ---------------------------------------------------------------- the peer

    def receive(self, data: bytes, now_s: float) -> None:
        """Take a message of this family from the peer."""
        message = decode(data)
        match message:
            case StreamOffer():
                self._on_offer(message)
            case Open():
                self._on_open(message, now_s)
            case Progress():
                self._on_progress(message, now_s)
            case Part():
                self._on_part(message, now_s)
            case Reset(reason, stream_id, text):
                stream = self._streams.get(stream_id)
                self._doubts.pop(stream_id, None)
                if stream is not None:
                    self._end(stream, reason or CLOSED, text, told_by_peer=True)
            case Malformed(why):
                self.counters.bad_messages += 1
                self._fault(why)

    def _on_offer(self, offer: StreamOffer) -> None:
        """Only the first of a session counts: each makes every stream ask."""
        if self._is_offered or self._offer_until_s is None:
            return
        if not offer.version_min <= VERSION <= offer.version_max:
            here = f"byte streams: here is version {VERSION}"
            there = f"the peer has {offer.version_min} to {offer.version_max}"
            self.reset_all(UNSUPPORTED, f"{here}, {there}: upgrade the older")
            return
        self._is_offered = True
        self._offer_until_s = None
        for stream in self._streams.values():
            if stream.phase is not StreamPhase.ASKED:
                stream.owe(ASK)
        for doubt in self._doubts.values():
            doubt.is_due = doubt.was_asked = True

    def _on_open(self, message: Open, now_s: float) -> None:
        stream = self._streams.get(message.id)
        if stream is not None and stream.is_opener:
            self._fault("Open: a stream of our own")
        elif stream is not None and stream.phase is StreamPhase.OPEN:
            tag = stream.tag if message.tag == NO_TAG else message.tag  # it did not hear of ours
            self._on_progress(
                Progress(ASK, message.id, tag, message.received, message.credit), now_s
            )
        elif stream is not None:
            self._known(stream, message.tag, now_s)  # it waits for `accept`
        elif message.id in self._ended:
            self._reply(message.id, self._ended[message.id])
        elif message.tag != NO_TAG:
            self._reply_forgotten(message.id)
        elif self._count(opened_here=False) >= STREAMS_MAX:
            text = f"{STREAMS_MAX} streams are open (STREAMS_MAX): close some"
            self._reply(message.id, encode(Reset(BUSY, message.id, text)))
        else:
            self._begin(message, now_s)

    def _begin(self, message: Open, now_s: float) -> None:
        stream = _StreamEnd(message.id, message.target, message.facts, StreamPhase.ASKED, now_s)
        self._streams[stream.id] = stream
        if not stream.outgoing.acknowledge(message.received, message.credit):
            self._violated(stream, "Open: has received what was never sent")
            return
        self._events.append(StreamWanted(stream.id, stream.target, stream.facts))

    def _known(self, stream: _StreamEnd, tag: bytes, now_s: float) -> bool:
        """The peer speaks of a stream. Whether it means the one that this end has."""
        stream.heard_s = now_s
        stream.asks = 0
        stream.is_stuck = False
        if stream.phase is StreamPhase.OPENING and tag != NO_TAG:
            stream.phase = StreamPhase.OPEN
            stream.tag = tag
            self._events.append(Accepted(stream.id))
        if stream.tag == tag:
            return True
        # An earlier run of an end had it, or two runs have: their bytes must not be mixed.
        self._end(stream, FORGOTTEN, "one end was restarted while the stream was open")
        return False

    def _on_progress(self, message: Progress, now_s: float) -> None:
        stream = self._streams.get(message.id)
        if stream is None:
            self._on_unknown(message.id, message.flags)
            return
        if not self._known(stream, message.tag, now_s):
            return
        outgoing = stream.outgoing
        if not outgoing.acknowledge(message.received, message.credit):
            self._violated(stream, "Progress: has received what was never sent")
            return
        if message.flags & REWIND or (
            message.flags & ANSWER and message.received < stream.asked_sent
        ):
            self._rewind(stream, now_s)
        if message.flags & ASK:
            stream.owe(ANSWER)
        stream.is_told |= bool(message.flags & ANSWER) and stream.incoming.end is not None
        if stream.wants_room and outgoing.room:
            stream.wants_room = False
            self._events.append(Writable(stream.id))
        self._finish_if_done(stream)

    def _rewind(self, stream: _StreamEnd, now_s: float) -> None:
        if now_s - stream.rewind_s < REWIND_S:
            return  # whoever waits still asks again
        stream.rewind_s = now_s
        stream.asked_sent = 0  # what was sent before is not missed a second time
        stream.outgoing.rewind()
        self.counters.rewinds += 1

    def _on_part(self, message: Part, now_s: float) -> None:
        stream = self._streams.get(message.id)
        if stream is None:
            self._on_unknown(message.id, ASK)
            return
        if not self._known(stream, message.tag, now_s):
            return
        is_end = bool(message.flags & END)
        match stream.incoming.receive(message.offset, message.data, is_end):
            case Fit.TAKEN:
                stream.owe()
                self._events.append(Readable(stream.id))
            case Fit.REPEATED:
                stream.owe()
            case Fit.AHEAD:
                stream.owe(REWIND)
            case Fit.VIOLATION:
                self._violated(stream, "Part: beyond the credit, or beyond the end")

    def _on_unknown(self, stream_id: bytes, flags: int) -> None:
        """A stream that is over, or that this end has never had. What only tells is not answered:
        two ends that are done would answer each other for ever."""
        is_again = bool(flags & ANSWER) and self._answered(stream_id)
        last = self._ended.get(stream_id)
        if last is None:
            self._reply_forgotten(stream_id)
        elif is_again or flags & ASK:
            self._reply(stream_id, last)

    def _reply_forgotten(self, stream_id: bytes) -> None:
        text = "this end does not know the stream: it was restarted, or the stream ended long ago"
        self._reply(stream_id, encode(Reset(FORGOTTEN, stream_id, text)))

    # ---------------------------------------------------------------- time

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`; None: not needed."""
        at_s = min(self._times(), default=float("inf"))
        return None if at_s == float("inf") else at_s

    def _times(self) -> Iterator[float]:
        for stream in self._streams.values():
            if self._offer_until_s is not None and stream.phase is StreamPhase.OPENING:
                yield self._offer_until_s
            yield stream.ask_at_s
            yield stream.stuck_at_s
        if self._rests_until_s is not None:
            yield self._rests_until_s

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        if self._offer_until_s is not None and now_s >= self._offer_until_s:
            self._refuse_unaccepted()
        if self._rests_until_s is not None and now_s >= self._rests_until_s:
            self._rests_until_s = None
        for stream in list(self._streams.values()):
            stream.is_stuck |= now_s >= stream.stuck_at_s
            if now_s >= stream.ask_at_s:
                self._ask(stream, now_s)

    def _refuse_unaccepted(self) -> None:
        for stream in list(self._streams.values()):
            if stream.phase is StreamPhase.OPENING:
                text = "the peer takes no byte streams: upgrade it, or allow them there"
                self._end(stream, UNSUPPORTED, text)

    def _ask(self, stream: _StreamEnd, now_s: float) -> None:
        if self._asks_max is not None and stream.asks >= self._asks_max:
            self._end(stream, SILENT, f"{stream.asks} questions were not answered: is it paused?")
            return
        stream.asks += 1
        if stream.is_unheard:
            stream.outgoing.rewind()
        stream.asked_s = now_s
        stream.owe(ASK)
        self.counters.asks += 1
