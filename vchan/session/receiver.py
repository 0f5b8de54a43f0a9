"""The receiving half of a session: frames put together to messages, credit granted, holes found.

Rules of this file
1. No I/O, no clock, no logging.
2. Frames count in order only. What comes early is dropped and asked for again; what comes twice is
   dropped.
3. Nothing that a peer sends raises, or grows without a limit: a message that has begun is charged
   whole against the reassembly limit.
"""

from typing import Final

from vchan.session.contract import (
    BACKLOG_BYTES_MAX,
    STREAMS,
    Config,
    Counters,
    Event,
    Lost,
    Received,
    Role,
)
from vchan.wire import layout
from vchan.wire.frames import OVERHEAD_BYTES, Frame

_WHOLE: Final = layout.FLAG_FIRST | layout.FLAG_LAST

PART_BYTES_MIN: Final = 1024
"""A fragment of half the least frame that a peer must take, which is kept as an object of its own:
that costs 50 bytes besides what is in it. At it: smaller ones are put together."""


class _Partial:
    """A message that has begun to arrive."""

    __slots__ = ("_parts", "_small", "received", "total")

    def __init__(self, total: int, payload: bytes) -> None:
        self.total = total
        self.received = 0  # bytes
        self._parts: list[bytes] = []
        self._small = bytearray()  # behind them
        self.add(payload)

    def add(self, payload: bytes) -> None:
        """The next fragment. Only what is large stays an object of its own."""
        size = len(payload)
        self.received += size
        if size < PART_BYTES_MIN:
            self._small += payload
        else:
            self._end_small()
            self._parts.append(payload)

    def _end_small(self) -> None:
        if self._small:
            self._parts.append(bytes(self._small))
            self._small = bytearray()

    def whole(self) -> bytes:
        """All of it: one copy, where each that makes a bytearray longer may be another."""
        self._end_small()
        return b"".join(self._parts)


class Receiver:
    """What the peer sends us. `next` is the number of the frame that is due.

    Args:
        config: Our own limits.
        counters: The session's.
    """

    __slots__ = (
        "_config",
        "_counters",
        "_gap_told",
        "_is_host",
        "_partials",
        "_window",
        "cost",
        "credit_greeted",
        "credit_told",
        "next",
        "reassembly",
    )

    def __init__(self, config: Config, counters: Counters) -> None:
        self._config = config
        self._counters = counters
        self._window = config.window_bytes
        self._is_host = config.role is Role.HOST
        self._partials: dict[int, _Partial] = {}
        self.reset()

    def reset(self) -> None:
        """A new session: nothing has arrived."""
        self.next = 0
        self.cost = 0  # bytes of all that arrived in order, with their frames' overhead
        self.credit_told = 0  # what the peer may let `cost` grow to
        self.credit_greeted = 0  # the same, as our last greeting said
        self._gap_told = -1
        self._partials.clear()
        self.reassembly = 0  # bytes of the whole messages of _partials

    def grant(self, backlog: int) -> int:
        """The credit to tell the peer: what arrived plus a window, unless it does not read us.

        Args:
            backlog: Bytes that wait to be sent to it.
        """
        if backlog > BACKLOG_BYTES_MAX and self._is_host:
            return max(self.credit_told, self.credit_greeted, self.cost)
        return self.cost + self._window

    def owes_credit(self, backlog: int) -> bool:
        """The window has moved by a quarter: a peer that waits for credit hears of it."""
        owed = self.cost + self._window - self.credit_told
        return owed >= self._window // 4 and self.grant(backlog) - self.credit_told == owed

    def greet(self, credit: int) -> None:
        """The credit that the greeting that is made now gives the peer."""
        told = max(self.credit_told, self.credit_greeted)
        assert credit >= told, "the peer may have used what is taken back here"
        self.credit_greeted = credit

    def take(self, frame: Frame, events: list[Event]) -> str:
        """Take the DATA frame that is due. Returns how it breaks the protocol, or nothing.

        Args:
            events: A message that is complete is appended to these.
        """
        self.next += 1
        self.cost += len(frame.payload) + OVERHEAD_BYTES
        if self.cost > self.credit_told and self.cost > self.credit_greeted:
            return "it sent more than its credit"
        if frame.flags != _WHOLE:
            return self._reassemble(frame, events)
        if frame.stream >= STREAMS or frame.stream in self._partials or not frame.payload:
            return "a message began inside another of its stream, or was empty"
        self._counters.messages_received += 1
        events.append(Received(frame.stream, frame.payload))
        return ""

    def _reassemble(self, frame: Frame, events: list[Event]) -> str:
        """Add a fragment to its message."""
        if frame.flags & layout.FLAG_FIRST:
            return self._begin_message(frame)
        partial = self._partials.get(frame.stream)
        if partial is None:
            return "a fragment of no message"
        partial.add(frame.payload)
        received = partial.received
        if not frame.payload or received > partial.total:
            return "fragments longer than their message, or empty"
        if frame.flags & layout.FLAG_LAST:
            if received != partial.total:
                return "a message shorter than it said"
            del self._partials[frame.stream]
            self.reassembly -= partial.total
            assert self.reassembly == sum(each.total for each in self._partials.values())
            self._counters.messages_received += 1
            events.append(Received(frame.stream, partial.whole()))
        return ""

    def _begin_message(self, frame: Frame) -> str:
        if frame.stream in self._partials or frame.stream >= STREAMS:
            return "a message began inside another of its stream"
        if frame.total > self._config.message_bytes_max:
            return f"a message of {frame.total} bytes: over MESSAGE_BYTES_MAX"
        if not 0 < len(frame.payload) < frame.total:
            return "a first fragment that is empty, or all of its message"
        if self.reassembly + frame.total > self._config.reassembly_bytes_max:
            return "more begun messages than REASSEMBLY_BYTES_MAX"
        self.reassembly += frame.total
        self._partials[frame.stream] = _Partial(frame.total, frame.payload)
        return ""

    # ---------------------------------------------------------------- holes

    def is_hole(self, frame: Frame) -> bool:
        """Whether the frame's number shows a hole that is to be asked for: once, and again
        whenever the peer asks what arrived."""
        return frame.seq > self.next and (
            self._gap_told != self.next or frame.kind == layout.KIND_PING
        )

    def note_hole(self, seq: int, events: list[Event]) -> None:
        """Everything from `next` up to `seq` is missing. Told once."""
        if self._gap_told != self.next:
            self._gap_told = self.next
            self._counters.losses += 1
            self._counters.frames_lost += seq - self.next
            events.append(Lost(self.next, seq))

    def forget_hole(self) -> None:
        """A handshake has ended: what is missing is asked for anew."""
        self._gap_told = -1
