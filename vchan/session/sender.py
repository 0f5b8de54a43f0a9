"""The sending half of a session: messages cut into numbered frames, kept until the peer has them.

Rules of this file
1. No I/O, no clock, no logging.
2. A byte of a message is either in the backlog (never sent) or in flight (sent, and kept until it
   is acknowledged). `backlog` and `in_flight` are their sums, at every moment.
3. Nothing is sent that the peer has no memory for: the credit counts frames, the peer's reassembly
   limit counts messages that have begun.
"""

from collections import deque
from typing import Final

from vchan.errors import LimitExceeded
from vchan.session.contract import CONTROL, STREAMS, Config, Counters
from vchan.wire import layout
from vchan.wire.frames import OVERHEAD_BYTES, Greeting

REWIND_S: Final = 0.25
"""What is in flight is sent again at most this often, whatever the peer says it missed. A REWIND
that comes earlier is not answered; the next probe brings another."""

_WHOLE: Final = layout.FLAG_FIRST | layout.FLAG_LAST

_SMALL: Final = 1
_LARGE: Final = 2
_SMALL_RUN: Final = 16
"""So many small frames may overtake a large message before its next fragment goes."""

Segment = tuple[int, int, int, bytes]
"""A DATA frame's flags, stream, total and payload: it may have to be sent again. (A tuple without
names is made in a tenth of the time.)"""


class _Outgoing:
    """A stream's messages that are not all sent."""

    __slots__ = ("messages", "offset", "ring")

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.offset = 0  # into the first of them
        self.ring = 0  # 0: in none, else _SMALL or _LARGE


class _Streams(dict[int, _Outgoing]):
    """By stream; made at its first message: an empty deque takes 0.6 KiB, and most VMs are idle."""

    def __missing__(self, stream: int) -> _Outgoing:
        assert 0 <= stream < STREAMS
        outgoing = self[stream] = _Outgoing()
        return outgoing


class Sender:
    """What we send. `base`, `cursor` and `tail` are frame numbers: base <= cursor <= tail.

    Args:
        config: Our own limits.
        counters: The session's.
    """

    __slots__ = (
        "_config",
        "_counters",
        "_in_flight_max",
        "_large",
        "_large_open",
        "_peer_message_max",
        "_peer_payload_max",
        "_peer_reassembly_max",
        "_rewind_not_before_s",
        "_sent",
        "_small",
        "_small_run",
        "_streams",
        "_tx_cost",
        "_waiting",
        "backlog",
        "base",
        "credit",
        "cursor",
        "in_flight",
        "tail",
    )

    def __init__(self, config: Config, counters: Counters) -> None:
        self._config = config
        self._counters = counters
        self._in_flight_max = config.in_flight_bytes_max
        self._streams = _Streams()
        self._rewind_not_before_s = float("-inf")
        self.reset()

    def reset(self) -> None:
        """A new session: nothing is waiting, nothing has been sent, the peer is not known."""
        self._sent: deque[Segment] = deque()
        self.base = 0  # of the first of _sent
        self.cursor = 0  # the next frame to go out; below `tail`: a resend
        self.tail = 0  # the next new frame
        self.in_flight = 0  # bytes of _sent, with their frames' overhead
        self._tx_cost = 0  # the same, of all that was ever sent
        self.credit = 0  # what _tx_cost may grow to, by the peer's word
        self._streams.clear()
        self._small: deque[int] = deque()  # streams whose next message fits one frame
        # Lists, as they are short and mostly empty: an empty deque takes 0.6 KiB.
        self._waiting: list[int] = []  # ... does not, and has not begun
        self._large: list[int] = []  # ... has a place in the peer's reassembly memory
        self._small_run = 0
        self._large_open = 0  # bytes of the messages of _large
        self.backlog = 0
        self._peer_message_max = self._config.message_bytes_max
        self._peer_reassembly_max = self._config.reassembly_bytes_max
        self._peer_payload_max = self._config.frame_bytes_max - OVERHEAD_BYTES

    def heed(self, peer: Greeting) -> None:
        """Keep to the peer's limits from now on."""
        self._peer_message_max = min(self._config.message_bytes_max, peer.message_bytes_max)
        self._peer_reassembly_max = peer.reassembly_bytes_max
        frame_bytes_max = min(self._config.frame_bytes_max, peer.frame_bytes_max)
        self._peer_payload_max = frame_bytes_max - OVERHEAD_BYTES

    # ---------------------------------------------------------------- messages in

    def send(self, message: bytes, stream: int) -> None:
        """Queue a message of 1 byte or more.

        Raises:
            LimitExceeded: It is too large for us or for the peer. Nothing was queued.
        """
        size = len(message)
        if size > self._peer_message_max:
            raise LimitExceeded("message", size, self._peer_message_max, "MESSAGE_BYTES_MAX")
        assert size > 0
        outgoing = self._streams[stream]
        outgoing.messages.append(message)
        self.backlog += size
        self._counters.messages_sent += 1
        if not outgoing.ring:
            self._join_ring(stream, outgoing)

    def _join_ring(self, stream: int, outgoing: _Outgoing) -> None:
        if len(outgoing.messages[0]) <= self._peer_payload_max:
            outgoing.ring = _SMALL
            if stream != CONTROL:
                self._small.append(stream)
        else:
            outgoing.ring = _LARGE
            (self._large if outgoing.offset else self._waiting).append(stream)

    # ---------------------------------------------------------------- frames out

    def next_segment(self, room: int) -> Segment | None:
        """The segment at `cursor`, which goes on by one; None if credit or `room` do not allow.

        There must be one: `backlog`, or `cursor < tail`.

        Args:
            room: Bytes that its whole frame may take.
        """
        cursor = self.cursor
        if cursor < self.tail:
            segment = self._sent[cursor - self.base]
            if len(segment[3]) + OVERHEAD_BYTES > room:
                return None
            self._counters.frames_resent += 1
            self.cursor = cursor + 1
            return segment
        return self._cut_segment(self._pick_stream(), room)

    def _pick_stream(self) -> int:
        """Control first, then small messages, then fragments of large ones; each kind in turn.

        There is one: the backlog is not empty, and what waits has room when nothing is begun.
        """
        if self._streams[CONTROL].ring == _SMALL:
            return CONTROL
        if self._waiting:
            self._admit()
        if self._small and (self._small_run < _SMALL_RUN or not self._large):
            return self._small[0]
        assert self._large, "what is in the backlog stands in a ring"
        return self._large[0]

    def _admit(self) -> None:
        """Begin large messages, first come first served, as the peer has memory for them."""
        while self._waiting:
            stream = self._waiting[0]
            size = len(self._streams[stream].messages[0])
            if self._large_open + size > self._peer_reassembly_max:
                return
            self._large_open += size
            self._large.append(self._waiting.pop(0))

    def _cut_segment(self, stream: int, room: int) -> Segment | None:
        """Take the next fragment of a stream's first message, if credit and `room` allow."""
        outgoing = self._streams[stream]
        messages = outgoing.messages
        payload = message = messages[0]
        is_whole = outgoing.ring == _SMALL
        if not is_whole:
            payload = message[outgoing.offset : outgoing.offset + self._peer_payload_max]
        size = len(payload)
        cost = size + OVERHEAD_BYTES
        if (
            cost > room
            or self._tx_cost + cost > self.credit
            or self.in_flight + cost > self._in_flight_max
        ):
            return None
        outgoing.ring = 0
        if is_whole:
            flags = _WHOLE
            messages.popleft()
            if stream != CONTROL:
                self._small.popleft()
                self._small_run += 1
        else:
            flags = self._take_fragment(outgoing, size)
        if messages:
            self._join_ring(stream, outgoing)
        segment = (flags, stream, len(message), payload)
        self._sent.append(segment)
        self._tx_cost += cost
        self.in_flight += cost
        self.backlog -= size
        self.tail = self.cursor = self.tail + 1
        return segment

    def _take_fragment(self, outgoing: _Outgoing, size: int) -> int:
        """The next fragment of the message that is at the head of its ring goes. Returns its
        flags."""
        self._large.pop(0)
        self._small_run = 0
        flags = 0 if outgoing.offset else layout.FLAG_FIRST
        assert size > 0, "it would never end"
        outgoing.offset += size
        total = len(outgoing.messages[0])
        if outgoing.offset == total:
            flags |= layout.FLAG_LAST
            outgoing.messages.popleft()
            outgoing.offset = 0
            self._large_open -= total
            assert bool(self._large) == (self._large_open > 0), "memory of the peer's that leaks"
        return flags

    # ---------------------------------------------------------------- what the peer says

    def acknowledge(self, ack: int) -> bool:
        """The peer has every frame below `ack`: drop them. False if that cannot be."""
        if ack > self.tail:
            return False
        sent = self._sent
        freed = 0
        while self.base < ack:
            _, _, _, payload = sent.popleft()
            freed += len(payload) + OVERHEAD_BYTES
            self.base += 1
        self.in_flight -= freed
        if self.cursor < self.base:
            self.cursor = self.base
        if not sent:
            assert self.in_flight == 0, "what is in flight is the cost of `_sent`"
            assert self.base == self.cursor == self.tail, "what was sent can be sent again"
        return True

    def rewind(self, now_s: float) -> None:
        """Send again what is not acknowledged; not too often, for it is cheap to ask."""
        if now_s >= self._rewind_not_before_s:
            assert self.tail - self.base == len(self._sent), "what was sent can be sent again"
            self._rewind_not_before_s = now_s + REWIND_S
            self.cursor = self.base
