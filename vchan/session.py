"""The session: the numbered, acknowledged conversation of two daemons over a stream that lies.

A virtio-serial channel looks like a reliable pipe. Live migration drops what is still in the
socket, mid-frame; a guest reboot drops both ways and tells nobody; QEMU sometimes delivers the
same bytes at both hosts. A session detects all of it and repairs it.

Rules of this file
1. No I/O, no clock, no logging; randomness is handed in. Time comes in as `now_s`, any monotonic
   clock's seconds. Facts go out as events.
2. Every reaction to a frame is a row of `_ON_FRAME`; what is ignored on purpose stands in
   `_IGNORED`. The two together are complete.
3. Nothing a peer sends raises, grows without a limit, or makes more work than it cost to send.
4. Silence never ends a session. Only a new session does.

How a shell drives it

    session.open(now_s)                        # bound to a new stream
    events = session.receive_data(data, now_s)
    stream.write(session.data_to_send())       # whenever the stream takes bytes
    events = session.handle_timeout(now_s)     # when next_timeout() has come
    session.close()                            # the stream is gone; the session is not

Handshake: both ends send HELLO on a stream they open and answer HELLO with WELCOME. A HELLO is
never trusted, only answered; a new key comes into force at the first proof that the peer knows both
nonces: a WELCOME that echoes ours, or a frame sealed with the new key. The same two instances with
a common session go on from the exact point; everybody else starts a new session at zero.
"""

import enum
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from vchan import _layout as layout
from vchan.errors import LimitExceeded
from vchan.frames import (
    FLUSH,
    FRAME_BYTES_MAX,
    FRAME_BYTES_MIN,
    NO_KEY,
    OVERHEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    ZERO_ID,
    Decoder,
    Frame,
    Greeting,
    Key,
    decode_greeting,
    encode_frame,
    session_keys,
)

VERSION: Final = 1
"""The session protocol's newest version this code speaks, and (so far) its oldest."""

STREAMS: Final = 16
"""Messages of one stream arrive in order; streams interleave. Stream 0 goes first."""
CONTROL: Final = 0

MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
"""One message. oslo.messaging sets no limit; RabbitMQ operators rarely allow more."""
MESSAGE_BYTES_MIN: Final = 64 * 1024
"""A peer must take at least this, so that what a daemon says of itself always passes."""
REASSEMBLY_BYTES_MAX: Final = 2 * MESSAGE_BYTES_MAX
"""All messages of a peer that have begun to arrive and are not complete."""
WINDOW_BYTES: Final = 256 * 1024
"""Credit granted ahead of what has arrived."""
IN_FLIGHT_BYTES_MAX: Final = 192 * 1024
"""Sent and not acknowledged: what a migration can cost us a resend of. Stays under the 512 KiB that
a virtio-serial ring can hold and near the 208 KiB of a unix socket's buffer."""
BACKLOG_BYTES_MAX: Final = 1024 * 1024
"""Over this much unsent, a host grants no more credit: who does not read, may not write."""
WRITE_BYTES_MAX: Final = 32 * 1024
"""What one virtio-console write takes."""
WRITE_FRAMES_MAX: Final = WRITE_BYTES_MAX // OVERHEAD_BYTES
"""More do not fit."""

ACK_DELAY_S: Final = 0.02
"""A frame is acknowledged by the next frame that goes its sender's way, or after this."""
PROBE_S: Final = 1.0
"""Ask what arrived when something is unacknowledged and the peer has been silent so long."""
PING_IDLE_S: Final = 5.0
"""Wake-ups on virtio-serial get lost: say something at least this often."""
SILENCE_S: Final = 10.0
"""Tell the shell when a peer that was asked stays silent so long. The shell knows about pauses."""
HELLO_RETRY_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
REFUSED_RETRY_S: Final = 30.0
REGREET_S: Final = 1.0
"""A peer whose frames make no sense is greeted anew, at most this often."""
REGREET_PINGS: Final = 2
"""After so many unanswered PINGs a HELLO goes with each: the peer may have lost our key."""
REWIND_S: Final = 0.25
"""What is in flight is sent again at most this often, whatever the peer says it missed. A REWIND
that comes earlier is not answered; the next probe brings another."""
REASON_BYTES_MAX: Final = 800
"""The text of a REFUSE. With two names of 255 bytes in it, it still says what to do."""

# What must go out before DATA, each at most once.
_FLUSH: Final = 1
_HELLO: Final = 2
_WELCOME: Final = 4
_REFUSE: Final = 8
_REWIND: Final = 16
_PONG: Final = 32
_PING: Final = 64

_SMALL_RUN: Final = 16
"""So many small frames may overtake a large message before its next fragment goes."""


class Role(enum.IntEnum):
    """Which end this is. On a local socket the daemon is the HOST."""

    HOST = layout.ROLE_HOST
    GUEST = layout.ROLE_GUEST


class State(enum.Enum):
    """Of the conversation on the current stream."""

    CLOSED = "closed"  # no stream
    GREETING = "greeting"  # HELLO sent, nobody proved to be there
    OPEN = "open"
    REFUSED = "refused"  # the ends cannot talk; tried again now and then

    __hash__ = object.__hash__  # Enum's own is Python: it would cost something with every frame


_OPEN: Final = State.OPEN
"""Looking up a member of an Enum costs more than a call."""

_new_tuple = tuple.__new__
"""Makes a NamedTuple in half the time that its own constructor takes."""


class Peer(NamedTuple):
    """Who is at the other end."""

    instance: bytes
    name: str
    attached: str
    """The name of the peer it had its last session with; empty if none."""
    version: int


class Opened(NamedTuple):
    """The peer is there. When not `resumed`, nothing sent before will arrive any more."""

    peer: Peer
    resumed: bool


class Received(NamedTuple):
    """A whole message, exactly once and in its stream's order."""

    stream: int
    message: bytes


class Lost(NamedTuple):
    """Frames from `first` up to `until` did not arrive. They have been asked for again."""

    first: int
    until: int


class Violation(NamedTuple):
    """The peer broke the protocol. It is greeted anew."""

    reason: str


class Refused(NamedTuple):
    """The ends cannot talk to each other, and why."""

    reason: str
    by_peer: bool


class Silent(NamedTuple):
    """A peer that was asked has said nothing for `for_s` seconds. It may be paused."""

    for_s: float


class Heard(NamedTuple):
    """A peer that was Silent has spoken."""


Event = Opened | Received | Lost | Violation | Refused | Silent | Heard


class Config(NamedTuple):
    """What a session is told about itself. Sizes in bytes."""

    role: Role
    instance: bytes
    name: str = ""
    version_min: int = VERSION
    version_max: int = VERSION
    message_bytes_max: int = MESSAGE_BYTES_MAX
    reassembly_bytes_max: int = REASSEMBLY_BYTES_MAX
    window_bytes: int = WINDOW_BYTES
    in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX
    ping_idle_s: float = PING_IDLE_S
    silence_s: float = SILENCE_S


class Counters:
    """What happened, since the session object was made."""

    __slots__ = (
        "bad_payloads",
        "bytes_skipped",
        "duplicates",
        "frames_lost",
        "frames_received",
        "frames_resent",
        "frames_sent",
        "greetings",
        "losses",
        "messages_received",
        "messages_sent",
        "pings_sent",
        "resumptions",
        "sessions",
        "violations",
    )

    def __init__(self) -> None:
        self.sessions = 0  # begun at zero
        self.resumptions = 0  # went on from the exact point
        self.greetings = 0  # handshakes the peer began
        self.frames_sent = 0
        self.frames_received = 0
        self.frames_resent = 0
        self.duplicates = 0  # frames that came twice and were dropped
        self.losses = 0  # holes found
        self.frames_lost = 0  # frames in them
        self.violations = 0
        self.messages_sent = 0
        self.messages_received = 0
        self.pings_sent = 0
        self.bytes_skipped = 0  # that belonged to no valid frame
        self.bad_payloads = 0  # frames whose header was whole and whose payload was not

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}


class _Segment(NamedTuple):
    """A DATA frame that was sent and may have to be sent again."""

    flags: int
    stream: int
    total: int
    payload: bytes


_WHOLE: Final = layout.FLAG_FIRST | layout.FLAG_LAST

_SMALL: Final = 1
_LARGE: Final = 2


class _Outgoing:
    """A stream's messages that are not all sent."""

    __slots__ = ("messages", "offset", "ring")

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.offset = 0  # into the first of them
        self.ring = 0  # 0: in none, else _SMALL or _LARGE


class _Partial:
    """A message that has begun to arrive."""

    __slots__ = ("data", "total")

    def __init__(self, total: int, payload: bytes) -> None:
        self.total = total
        self.data = bytearray(payload)  # not a list: tiny fragments would cost 50 bytes each


class _Candidate(NamedTuple):
    """A handshake that we answered and that the peer has not proved yet."""

    mine: Greeting
    peer: Greeting


class Session:
    """One end of a conversation. See the top of this file.

    Args:
        config: Who we are, and limits.
        entropy: Gives that many fresh random bytes; one draw of 16 a handshake.
    """

    def __init__(self, config: Config, entropy: Callable[[int], bytes]) -> None:
        assert MESSAGE_BYTES_MIN <= config.message_bytes_max <= config.reassembly_bytes_max
        assert min(config.window_bytes, config.in_flight_bytes_max) >= FRAME_BYTES_MAX
        self.config = config
        self.counters = Counters()
        self.state = State.CLOSED
        self.peer: Peer | None = None
        self._entropy = entropy
        self._window = config.window_bytes
        self._in_flight_max = config.in_flight_bytes_max
        self._decoder = Decoder()
        self._events: list[Event] = []
        # Of the session: survives streams.
        self._session_id = ZERO_ID
        self._peer_instance = ZERO_ID
        self._peer_limits = (0, 0, 0)
        self._attached = ""
        self._streams = [_Outgoing() for _ in range(STREAMS)]
        self._partials: dict[int, _Partial] = {}
        self._reset_session()
        # Of the handshake: per stream.
        self._tx_key: Key = NO_KEY
        self._hello: Greeting | None = None  # None: no answer is awaited
        self._candidate: _Candidate | None = None
        self._agreed = ZERO_ID  # the peer's nonce of the handshake in force
        self._agreed_mine: Greeting | None = None
        self._hellos_sent = 0
        self._greet_not_before_s = float("-inf")
        self._dues = 0  # what must go out before DATA: _FLUSH, _HELLO and so on
        self._welcome: Greeting | None = None  # the next WELCOME's
        self._refusal = b""  # the next REFUSE's
        # Time.
        self._now_s = 0.0
        self._hello_at_s: float | None = None
        self._ack_at_s: float | None = None
        self._ack_now = False
        self._check_at_s: float | None = None
        self._heard_s = 0.0
        self._progress_s: float | None = None  # of what we sent; None: since the next check
        self._rewind_not_before_s = float("-inf")
        self._asked_s: float | None = None
        self._pings_unanswered = 0
        self._silent_told_s = 0.0
        self._was_silent = False

    def _reset_session(self) -> None:
        self._sent: deque[_Segment] = deque()
        self._base = 0  # seq of the first of _sent
        self._cursor = 0  # seq of the next DATA to go out; below _tail: a resend
        self._tail = 0  # seq of the next new DATA
        self._in_flight = 0  # cost of _sent
        self._tx_cost = 0  # cost of all DATA ever sent
        self._peer_credit = 0
        self._recv_next = 0
        self._rx_cost = 0
        self._credit_told = 0
        self._credit_greeted = 0
        self._gap_told = -1
        self._partials.clear()
        self._reassembly = 0
        for outgoing in self._streams:
            outgoing.messages.clear()
            outgoing.offset = 0
            outgoing.ring = 0
        self._small: deque[int] = deque()  # streams whose next message fits one frame
        self._waiting: deque[int] = deque()  # ... does not, and has not begun
        self._large: deque[int] = deque()  # ... has a place in the peer's reassembly memory
        self._small_run = 0
        self._backlog = 0
        self._peer_message_max = self.config.message_bytes_max
        self._peer_reassembly_max = self.config.reassembly_bytes_max
        self._peer_payload_max = PAYLOAD_BYTES_MAX
        self._large_open = 0  # bytes of the messages of _large

    # ---------------------------------------------------------------- the stream

    def open(self, now_s: float) -> None:
        """Bind to a stream that was just opened: greet, and go on with the session if both can."""
        self._decoder.reset()
        self._clear_dues()
        self._dues |= _FLUSH
        self._greet(now_s)

    def close(self) -> None:
        """The stream is gone. Messages go on being accepted, for the next one."""
        self.state = State.CLOSED
        self._decoder.reset()
        self._candidate = None
        self._hello_at_s = self._ack_at_s = self._check_at_s = None
        self._dues = 0
        self._ack_now = False

    def _clear_dues(self) -> None:
        """All but a FLUSH: the stream still needs it."""
        self._dues &= _FLUSH
        self._ack_now = False

    def _greet(self, now_s: float) -> None:
        self.state = State.GREETING
        self._now_s = now_s
        self._decoder.key = self._decoder.candidate = None
        self._candidate = None
        self._ack_at_s = self._check_at_s = None
        self._hello = self._greeting(self._entropy(16), ZERO_ID)
        self._hellos_sent = 0
        self._dues |= _HELLO
        self._hello_at_s = now_s + HELLO_RETRY_S[0]
        self._heard_s = self._silent_told_s = now_s

    def _greeting(self, nonce: bytes, echo: bytes) -> Greeting:
        config = self.config
        self._credit_greeted = self._grant()
        return Greeting(
            config.version_min,
            config.version_max,
            config.role,
            config.instance,
            nonce,
            echo,
            self._session_id,
            self._recv_next,
            self._base,
            self._tail,
            self._credit_greeted,
            FRAME_BYTES_MAX,
            config.message_bytes_max,
            config.reassembly_bytes_max,
            config.name,
            self._attached,
        )

    # ---------------------------------------------------------------- sending

    @property
    def backlog_bytes(self) -> int:
        """Bytes of messages that have not gone out for the first time."""
        return self._backlog

    @property
    def unacknowledged(self) -> int:
        """DATA frames that went out and have not been acknowledged."""
        return len(self._sent)

    def send(self, message: bytes, stream: int = CONTROL) -> None:
        """Queue a message. It arrives once, in its stream's order, unless a new session begins.

        The caller bounds how many it queues; `backlog_bytes` tells.

        Args:
            message: 1 to MESSAGE_BYTES_MAX bytes (or the peer's limit, if lower).
            stream: 0 to STREAMS - 1; CONTROL goes ahead of all others.

        Raises:
            LimitExceeded: It is too large for us or for the peer. Nothing was queued.
        """
        size = len(message)
        if size > self._peer_message_max:
            raise LimitExceeded("message", size, self._peer_message_max, "MESSAGE_BYTES_MAX")
        assert size > 0
        outgoing = self._streams[stream]
        outgoing.messages.append(message)
        self._backlog += size
        self.counters.messages_sent += 1
        if not outgoing.ring:
            self._join_ring(stream, outgoing)

    def data_to_send(
        self, limit: int = WRITE_BYTES_MAX, frames_max: int = WRITE_FRAMES_MAX
    ) -> bytes:
        """The next bytes for the stream: whole frames, at most `limit` bytes.

        Call it when the stream takes bytes, until it returns none.

        Args:
            limit: At least two frames' worth, so that a flush, a HELLO and a frame all pass.
            frames_max: So many frames at most.
        """
        parts = self._control_frames() if self._dues else []
        if self.state is not _OPEN:
            return b"".join(parts)
        room = limit - sum(map(len, parts)) if parts else limit
        carried = False  # an acknowledgement, as every DATA frame does
        while (self._backlog or self._cursor < self._tail) and len(parts) < frames_max:
            frame = self._next_data_frame(room)
            if not frame:
                break
            parts.append(frame)
            room -= len(frame)
            carried = True
        if not carried and self._ack_due():
            parts.append(self._seal(layout.KIND_ACK))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _control_frames(self) -> list[bytes]:
        parts = []
        dues = self._dues
        if dues & _FLUSH:
            parts.append(FLUSH)
        if dues & _HELLO and self._hello is not None:
            parts.append(_seal_greeting(layout.KIND_HELLO, self._hello.encode()))
        if dues & _WELCOME and self._welcome is not None:
            parts.append(_seal_greeting(layout.KIND_WELCOME, self._welcome.encode()))
        if dues & _REFUSE:
            parts.append(_seal_greeting(layout.KIND_REFUSE, self._refusal))
        self._dues = dues & (_REWIND | _PONG | _PING)
        if self.state is State.OPEN:
            self._dues = 0
            if dues & _REWIND:
                parts.append(self._seal(layout.KIND_REWIND))
            if dues & _PONG:
                parts.append(self._seal(layout.KIND_PONG))
            if dues & _PING:
                parts.append(self._seal(layout.KIND_PING))
        self.counters.frames_sent += len(parts)
        return parts

    def _seal(self, kind: int) -> bytes:
        """A frame without payload; it acknowledges and grants like every other."""
        self._ack_at_s = None
        self._ack_now = False
        self._credit_told = self._grant()
        return encode_frame(
            self._tx_key,
            kind,
            0,
            0,
            0,
            self._cursor,
            self._recv_next,
            self._credit_told,
            b"",
        )

    def _next_data_frame(self, room: int) -> bytes:
        """The next DATA frame of at most `room` bytes, or nothing."""
        cursor = self._cursor
        if cursor < self._tail:
            segment = self._sent[cursor - self._base]
            if len(segment.payload) + OVERHEAD_BYTES > room:
                return b""
            self.counters.frames_resent += 1
        else:
            made = self._cut_segment(self._pick_stream(), room)
            if made is None:
                return b""
            segment = made
            self._tail = cursor + 1
        self._cursor = cursor + 1
        self._ack_at_s = None
        self._ack_now = False
        self._credit_told = credit = self._grant()
        self.counters.frames_sent += 1
        return encode_frame(
            self._tx_key,
            layout.KIND_DATA,
            segment.flags,
            segment.stream,
            segment.total,
            cursor,
            self._recv_next,
            credit,
            segment.payload,
        )

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
        return self._large[0]

    def _admit(self) -> None:
        """Begin large messages, first come first served, as the peer has memory for them."""
        while self._waiting:
            stream = self._waiting[0]
            size = len(self._streams[stream].messages[0])
            if self._large_open + size > self._peer_reassembly_max:
                return
            self._large_open += size
            self._large.append(self._waiting.popleft())

    def _cut_segment(self, stream: int, room: int) -> _Segment | None:
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
            or self._tx_cost + cost > self._peer_credit
            or self._in_flight + cost > self._in_flight_max
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
        segment: _Segment = _new_tuple(_Segment, (flags, stream, len(message), payload))
        if not self._sent:
            # Nobody told us the time: _now_s may be long ago, so the check itself starts the clock.
            self._progress_s = None
            if self._check_at_s is not None and self._check_at_s > self._now_s + PROBE_S:
                self._check_at_s = self._now_s + PROBE_S
        self._sent.append(segment)
        self._tx_cost += cost
        self._in_flight += cost
        self._backlog -= size
        return segment

    def _take_fragment(self, outgoing: _Outgoing, size: int) -> int:
        """The next fragment of the message that is at the head of its ring goes. Returns its
        flags."""
        self._large.popleft()
        self._small_run = 0
        flags = 0 if outgoing.offset else layout.FLAG_FIRST
        outgoing.offset += size
        total = len(outgoing.messages[0])
        if outgoing.offset == total:
            flags |= layout.FLAG_LAST
            outgoing.messages.popleft()
            outgoing.offset = 0
            self._large_open -= total
        return flags

    def _join_ring(self, stream: int, outgoing: _Outgoing) -> None:
        if len(outgoing.messages[0]) <= self._peer_payload_max:
            outgoing.ring = _SMALL
            if stream != CONTROL:
                self._small.append(stream)
        else:
            outgoing.ring = _LARGE
            (self._large if outgoing.offset else self._waiting).append(stream)

    # ---------------------------------------------------------------- credit and acknowledgement

    def _grant(self) -> int:
        """The credit to tell the peer: what arrived plus a window, unless it does not read us."""
        if self._backlog > BACKLOG_BYTES_MAX and self.config.role is Role.HOST:
            return max(self._credit_told, self._rx_cost)
        return self._rx_cost + self._window

    def _ack_due(self) -> bool:
        if self._ack_now or (self._ack_at_s is not None and self._now_s >= self._ack_at_s):
            return True
        # A peer that waits for credit hears of it when the window has moved by a quarter.
        return self._grant() - self._credit_told >= self.config.window_bytes // 4

    def _acknowledge(self, ack: int) -> bool:
        """Drop what the peer has. False if it claims what cannot be."""
        if ack > self._tail:
            return False
        if ack <= self._base:
            return True  # an old frame, come twice
        sent = self._sent
        self._progress_s = self._now_s
        freed = (ack - self._base) * OVERHEAD_BYTES
        while self._base < ack:
            freed += len(sent.popleft().payload)
            self._base += 1
        self._in_flight -= freed
        if self._cursor < ack:
            self._cursor = ack
        return True

    # ---------------------------------------------------------------- receiving

    @property
    def wanted_bytes(self) -> int:
        """So many complete what has begun to arrive: one frame at most."""
        return self._decoder.wanted_bytes

    def receive_data(self, data: bytes, now_s: float) -> list[Event]:
        """Take bytes from the stream, in any chunks; return what they amount to."""
        self._now_s = now_s
        decoder = self._decoder
        for frame in decoder.receive_data(data):
            self._receive_frame(frame)
        while decoder.stopped:  # what came last may have changed the keys
            for frame in decoder.receive_data(b""):
                self._receive_frame(frame)
        self.counters.bytes_skipped = decoder.bytes_skipped
        self.counters.bad_payloads = decoder.bad_payloads
        events = self._events
        if events:
            self._events = []
        return events

    def _receive_frame(self, frame: Frame) -> None:
        self.counters.frames_received += 1
        if frame.candidate and self._candidate is not None:
            self._establish(*self._candidate)
        handler = _ON_FRAME.get((self.state, frame.kind))
        if handler is not None:
            handler(self, frame)

    def _on_data(self, frame: Frame) -> None:
        if not self._on_any(frame):
            return
        if self._ack_at_s is None:
            self._ack_at_s = self._now_s + ACK_DELAY_S
        seq = frame.seq
        if seq != self._recv_next:
            if seq < self._recv_next:
                self.counters.duplicates += 1
                self._ack_now = True
            return
        self._recv_next = seq + 1
        self._rx_cost += len(frame.payload) + OVERHEAD_BYTES
        if self._rx_cost > self._credit_told and self._rx_cost > self._credit_greeted:
            self._violate("it sent more than its credit")
            return
        if frame.flags == _WHOLE:
            if frame.stream >= STREAMS or frame.stream in self._partials or not frame.payload:
                self._violate("a message began inside another of its stream, or was empty")
                return
            self.counters.messages_received += 1
            self._events.append(_new_tuple(Received, (frame.stream, frame.payload)))
        else:
            problem = self._reassemble(frame)
            if problem:
                self._violate(problem)

    def _reassemble(self, frame: Frame) -> str:
        """Add a fragment to its message. Returns what is wrong with it, if anything is."""
        if frame.flags & layout.FLAG_FIRST:
            return self._begin_message(frame)
        partial = self._partials.get(frame.stream)
        if partial is None:
            return "a fragment of no message"
        partial.data += frame.payload
        received = len(partial.data)
        if not frame.payload or received > partial.total:
            return "fragments longer than their message, or empty"
        if frame.flags & layout.FLAG_LAST:
            if received != partial.total:
                return "a message shorter than it said"
            del self._partials[frame.stream]
            self._reassembly -= partial.total
            self.counters.messages_received += 1
            self._events.append(Received(frame.stream, bytes(partial.data)))
        return ""

    def _begin_message(self, frame: Frame) -> str:
        if frame.stream in self._partials or frame.stream >= STREAMS:
            return "a message began inside another of its stream"
        if frame.total > self.config.message_bytes_max:
            return f"a message of {frame.total} bytes: over MESSAGE_BYTES_MAX"
        if not 0 < len(frame.payload) < frame.total:
            return "a first fragment that is empty, or all of its message"
        if self._reassembly + frame.total > self.config.reassembly_bytes_max:
            return "more begun messages than REASSEMBLY_BYTES_MAX"
        self._reassembly += frame.total
        self._partials[frame.stream] = _Partial(frame.total, frame.payload)
        return ""

    def _on_any(self, frame: Frame) -> bool:
        """What every sealed frame says: acknowledgement, credit, and by its number what is lost."""
        self._heard_s = self._now_s
        if self._asked_s is not None:
            self._was_answered()
        if frame.ack != self._base and not self._acknowledge(frame.ack):
            self._violate(f"it acknowledged frame {frame.ack}; {self._tail} were sent")
            return False
        if frame.credit > self._peer_credit:
            self._peer_credit = frame.credit
        if frame.seq > self._recv_next and (
            self._gap_told != self._recv_next or frame.kind == layout.KIND_PING
        ):
            self._report_gap(frame.seq)
        return True

    def _was_answered(self) -> None:
        self._asked_s = None
        self._hello = None  # it has our key after all
        self._dues &= ~_HELLO
        if self._was_silent:
            self._was_silent = False
            self._events.append(Heard())

    def _report_gap(self, seq: int) -> None:
        """Ask for everything from the hole on; say it once, and again whenever asked."""
        if self._gap_told != self._recv_next:
            self._gap_told = self._recv_next
            self.counters.losses += 1
            self.counters.frames_lost += seq - self._recv_next
            self._events.append(Lost(self._recv_next, seq))
        self._dues |= _REWIND

    def _on_ack(self, frame: Frame) -> None:
        self._on_any(frame)

    def _on_ping(self, frame: Frame) -> None:
        if self._on_any(frame):
            self._dues |= _PONG

    def _on_rewind(self, frame: Frame) -> None:
        if self._on_any(frame):
            self._rewind()

    def _rewind(self) -> None:
        """Send again what is not acknowledged; not too often, for it is cheap to ask."""
        if self._now_s >= self._rewind_not_before_s:
            self._rewind_not_before_s = self._now_s + REWIND_S
            self._cursor = self._base

    def _violate(self, reason: str) -> None:
        """The peer makes no sense: forget the session and greet anew, not too often."""
        self.counters.violations += 1
        self._events.append(Violation(reason))
        self._session_id = ZERO_ID
        self._reset_session()
        self._clear_dues()
        at_s = max(self._now_s, self._greet_not_before_s)
        self._greet_not_before_s = self._now_s + REGREET_S
        self._greet(self._now_s)
        if at_s > self._now_s:
            self._dues &= ~_HELLO
            self._hello_at_s = at_s

    # ---------------------------------------------------------------- handshake

    def _on_hello(self, frame: Frame) -> None:
        peer = decode_greeting(frame.payload)
        if peer is None or peer.role == self.config.role:
            return  # nonsense, or a terminal that echoes us
        self._heard_s = self._now_s
        problem = self._incompatible(peer)
        if problem:
            self._refusal = peer.nonce + problem.encode()[:REASON_BYTES_MAX]
            self._dues |= _REFUSE
            return
        candidate = self._candidate
        if self.state is State.OPEN and peer.nonce == self._agreed and self._agreed_mine:
            # A HELLO of the handshake in force that was sent again before our answer came.
            self._welcome = self._agreed_mine._replace(echo=peer.nonce)
            self._dues |= _WELCOME
            return
        if candidate is None or candidate.peer.nonce != peer.nonce:
            self.counters.greetings += 1
            if self.state is State.REFUSED:
                self._greet(self._now_s)
            if self._hello is None:
                mine = self._greeting(self._entropy(16), peer.nonce)
            else:
                mine = self._hello._replace(echo=peer.nonce)
            candidate = self._candidate = _Candidate(mine, peer)
            self._decoder.candidate = self._keys(mine, peer)[1]
        self._welcome = candidate.mine
        self._dues |= _WELCOME

    def _on_welcome(self, frame: Frame) -> None:
        peer = decode_greeting(frame.payload)
        mine = self._hello
        if peer is None or mine is None or peer.role == self.config.role or peer.echo != mine.nonce:
            return  # not an answer to us
        problem = self._incompatible(peer)
        if problem:
            self._refused(problem, by_peer=False)
        else:
            self._establish(mine, peer)

    def _on_refuse(self, frame: Frame) -> None:
        hello = self._hello
        if hello is None or frame.payload[:16] != hello.nonce:
            return  # not an answer to us
        text = frame.payload[16 : 16 + REASON_BYTES_MAX].decode("utf-8", "ignore")
        self._refused(_printable(text), by_peer=True)

    def _refused(self, reason: str, *, by_peer: bool) -> None:
        if self.state is State.REFUSED:
            return
        self.state = State.REFUSED
        self._dues &= ~_HELLO
        self._hello_at_s = self._now_s + REFUSED_RETRY_S
        self._events.append(Refused(reason, by_peer))

    def _incompatible(self, peer: Greeting) -> str:
        mine = self.config
        if min(mine.version_max, peer.version_max) < max(mine.version_min, peer.version_min):
            return (
                f"{mine.name or 'vchan'} speaks protocol versions {mine.version_min} to "
                f"{mine.version_max}, {_printable(peer.name) or 'the peer'} {peer.version_min} to "
                f"{peer.version_max}: upgrade the older one"
            )
        if (
            peer.frame_bytes_max < FRAME_BYTES_MIN
            or peer.message_bytes_max < MESSAGE_BYTES_MIN
            or peer.reassembly_bytes_max < peer.message_bytes_max
        ):
            return (
                f"limits too small: frames of {FRAME_BYTES_MIN} bytes, messages of "
                f"{MESSAGE_BYTES_MIN} bytes, and one whole message in reassembly, must fit"
            )
        return ""

    def _keys(self, mine: Greeting, peer: Greeting) -> tuple[Key, Key]:
        """(key to send with, key to receive with)"""
        if self.config.role is Role.HOST:
            return session_keys(mine.nonce, peer.nonce)
        to_guest, to_host = session_keys(peer.nonce, mine.nonce)
        return to_host, to_guest

    def _establish(self, mine: Greeting, peer: Greeting) -> None:
        """Both ends know both nonces: the new key is in force."""
        resumed = self._can_resume(mine, peer)
        if resumed:
            self._acknowledge(peer.recv_next)
            self._rewind()
            self._peer_credit = max(self._peer_credit, peer.credit)
            self.counters.resumptions += 1
        else:
            self._reset_session()
            self._session_id = mine.nonce if self.config.role is Role.HOST else peer.nonce
            self.counters.sessions += 1
        self._peer_instance = peer.instance
        self._peer_limits = _limits(peer)
        self._peer_message_max = min(self.config.message_bytes_max, peer.message_bytes_max)
        self._peer_reassembly_max = peer.reassembly_bytes_max
        self._peer_payload_max = min(PAYLOAD_BYTES_MAX, peer.frame_bytes_max - OVERHEAD_BYTES)
        self._gap_told = -1
        self._tx_key, self._decoder.key = self._keys(mine, peer)
        self._decoder.candidate = None
        self._candidate = None
        self._agreed, self._agreed_mine = peer.nonce, mine
        self._hello = None
        self._hello_at_s = None
        self._dues &= _FLUSH | _WELCOME
        self.state = State.OPEN
        version = min(self.config.version_max, peer.version_max)
        self.peer = Peer(peer.instance, _printable(peer.name), _printable(peer.attached), version)
        self._attached = peer.name
        self._heard_s = self._silent_told_s = self._now_s
        self._asked_s = None
        self._was_silent = False
        self._ack_now = True  # tell the peer at once that the key is in force
        self._progress_s = self._now_s
        self._check_at_s = self._now_s + PROBE_S
        self._events.append(Opened(self.peer, resumed))

    def _can_resume(self, mine: Greeting, peer: Greeting) -> bool:
        """The same session of the same two instances, and neither has lost what the other needs."""
        return (
            mine.session == peer.session == self._session_id != ZERO_ID
            and peer.instance == self._peer_instance
            and _limits(peer) == self._peer_limits
            and self._base <= peer.recv_next <= self._tail
            and peer.send_base <= mine.recv_next <= peer.send_next
        )

    # ---------------------------------------------------------------- time

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`, on `now_s`'s clock; None: not needed."""
        if self.state is _OPEN:
            check, ack = self._check_at_s, self._ack_at_s
            return check if ack is None or check is None or check < ack else ack
        return self._hello_at_s

    def handle_timeout(self, now_s: float) -> list[Event]:
        """Do what is due. Calling it early or late is harmless."""
        self._now_s = now_s
        if self.state is State.OPEN:
            if self._ack_at_s is not None and now_s >= self._ack_at_s:
                # The timer has fired; the frame may have to wait until the stream takes bytes.
                self._ack_at_s = None
                self._ack_now = True
            if self._check_at_s is not None and now_s >= self._check_at_s:
                self._check_peer(now_s)
        elif self._hello_at_s is not None and now_s >= self._hello_at_s:
            self._retry_hello(now_s)
        events, self._events = self._events, []
        return events

    def _retry_hello(self, now_s: float) -> None:
        if self.state is State.REFUSED:
            self._greet(now_s)
            return
        self._dues |= _HELLO
        self._hellos_sent += 1
        step = min(self._hellos_sent, len(HELLO_RETRY_S) - 1)
        self._tell_silence(now_s)
        # Not later than silence is to be told: a wedged channel is cured only then.
        silent_at_s = self._silent_told_s + self.config.silence_s
        self._hello_at_s = min(now_s + HELLO_RETRY_S[step], silent_at_s)

    def _check_peer(self, now_s: float) -> None:
        if self._progress_s is None:
            self._progress_s = now_s
        waiting = bool(self._sent) or self._backlog > 0
        idle_s = PROBE_S if waiting else self.config.ping_idle_s
        due_s = (self._progress_s if waiting else self._heard_s) + idle_s
        if self._asked_s is not None:
            # Asked already: ask again ever more rarely, but never stop.
            due_s = self._asked_s + min(
                idle_s * 2 ** min(self._pings_unanswered, 5), 6 * PING_IDLE_S
            )
        else:
            self._pings_unanswered = 0
        if now_s >= due_s:
            self._dues |= _PING
            self.counters.pings_sent += 1
            if self._asked_s is None:
                self._silent_told_s = now_s  # silence counts from the first question
            else:
                self._pings_unanswered += 1
                if self._pings_unanswered >= REGREET_PINGS:
                    self._regreet()
            self._asked_s = now_s
            due_s = now_s + idle_s
        self._check_at_s = due_s
        if self._asked_s is not None:
            self._tell_silence(now_s)
            self._check_at_s = min(due_s, now_s + self.config.silence_s)

    def _regreet(self) -> None:
        """Ask in the clear as well: a peer that was rolled back, or took another HELLO for ours,
        cannot open our frames. If it was merely paused, the session goes on."""
        if self._hello is None:
            self._hello = self._greeting(self._entropy(16), ZERO_ID)
        self._dues |= _HELLO

    def _tell_silence(self, now_s: float) -> None:
        # The same sum as the timer's: a difference may fall short of it by a rounding error.
        if now_s >= self._silent_told_s + self.config.silence_s:
            self._silent_told_s = now_s
            self._was_silent = True
            self._events.append(Silent(now_s - self._heard_s))


def _seal_greeting(kind: int, payload: bytes) -> bytes:
    return encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, payload)


def _limits(peer: Greeting) -> tuple[int, int, int]:
    return peer.frame_bytes_max, peer.message_bytes_max, peer.reassembly_bytes_max


def _printable(text: str) -> str:
    """A peer's text, fit for a log line."""
    return "".join(c if c.isprintable() else "?" for c in text)


_ON_FRAME: Final[dict[tuple[State, int], Callable[[Session, Frame], None]]] = {
    (State.GREETING, layout.KIND_HELLO): Session._on_hello,
    (State.GREETING, layout.KIND_WELCOME): Session._on_welcome,
    (State.GREETING, layout.KIND_REFUSE): Session._on_refuse,
    (State.OPEN, layout.KIND_HELLO): Session._on_hello,
    (State.OPEN, layout.KIND_WELCOME): Session._on_welcome,
    (State.OPEN, layout.KIND_DATA): Session._on_data,
    (State.OPEN, layout.KIND_ACK): Session._on_ack,
    (State.OPEN, layout.KIND_PING): Session._on_ping,
    (State.OPEN, layout.KIND_PONG): Session._on_ack,
    (State.OPEN, layout.KIND_REWIND): Session._on_rewind,
    (State.REFUSED, layout.KIND_HELLO): Session._on_hello,
    (State.REFUSED, layout.KIND_WELCOME): Session._on_welcome,
}

_SEALED: Final = (
    layout.KIND_DATA,
    layout.KIND_ACK,
    layout.KIND_PING,
    layout.KIND_PONG,
    layout.KIND_REWIND,
)

_IGNORED: Final[frozenset[tuple[State, int]]] = frozenset(
    {
        # Nothing can be answered without a stream.
        *((State.CLOSED, kind) for kind in range(1, 9)),
        # No key is in force: the decoder cannot even open these.
        *((State.GREETING, kind) for kind in _SEALED),
        *((State.REFUSED, kind) for kind in _SEALED),
        # Unsealed, so anybody's: an open session is not given up for it.
        (State.OPEN, layout.KIND_REFUSE),
        # Refused already.
        (State.REFUSED, layout.KIND_REFUSE),
    }
)
