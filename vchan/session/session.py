"""The session: two daemons' numbered, acknowledged conversation over a stream that loses bytes.

A virtio-serial channel looks like a reliable pipe. Live migration drops what is still in the
socket, mid-frame; a guest reboot drops both ways and tells nobody; QEMU sometimes delivers the
same bytes at both hosts. A session detects all of it and repairs it.

Rules of this file
1. No I/O, no clock, no logging; randomness is handed in. Time comes in as `now_s`, any monotonic
   clock's seconds. Facts go out as events.
2. Every change of state is a row of `_NEXT_STATE`. Every reaction to a frame is a row of
   `_ON_FRAME`; what is ignored on purpose stands in `_IGNORED`. Each table is complete.
3. Nothing a peer sends raises, grows without a limit, or makes more work than it cost to send.
4. Silence never ends a session. Only a new session does.

A session is put together of four parts, which do not know each other except that the handshake
reads what the sender and the receiver have come to. What goes between them goes through here:

    stream --bytes--> Decoder --frames--> Session --> Receiver --> messages
                                             |  ack, credit --> Sender
                                             |  greetings ----> Handshake
                                             |  being heard --> Liveness
    stream <--bytes-- Session <--segments-- Sender <-- messages
"""

import enum
from collections.abc import Callable
from typing import Final

from vchan.session.contract import (
    CONTROL,
    MESSAGE_BYTES_MIN,
    WRITE_FRAMES_MAX,
    Config,
    Counters,
    Event,
    Heard,
    Opened,
    Peer,
    Refused,
    State,
    Violation,
)
from vchan.session.handshake import HELLO_RETRY_S, Handshake
from vchan.session.liveness import Liveness
from vchan.session.receiver import Receiver
from vchan.session.sender import Sender
from vchan.wire import layout
from vchan.wire.frames import (
    FLUSH,
    FRAME_BYTES_MAX,
    NO_KEY,
    Decoder,
    Frame,
    Greeting,
    Key,
    encode_frame,
)

REFUSED_RETRY_S: Final = 30.0
"""A peer that cannot be talked to is greeted again after this: it may have been upgraded."""
REGREET_S: Final = 1.0
"""A peer whose frames make no sense is greeted anew, at most this often."""

# What must go out before DATA, each at most once.
_FLUSH: Final = 1
_HELLO: Final = 2
_WELCOME: Final = 4
_REFUSE: Final = 8
_REWIND: Final = 16
_PONG: Final = 32
_PING: Final = 64

_SEALED_DUES: Final = (
    (_REWIND, layout.KIND_REWIND),
    (_PONG, layout.KIND_PONG),
    (_PING, layout.KIND_PING),
)

_OPEN: Final = State.OPEN
"""Looking up a member of an Enum costs more than a call."""


class Cause(enum.Enum):
    """What changes a session's state."""

    STREAM_OPENED = "a stream was opened"
    STREAM_LOST = "the stream is gone"
    PROVED = "the peer has proved that it knows both nonces"
    MISMATCHED = "the ends cannot talk to each other"
    VIOLATED = "the peer broke the protocol"
    RETRIED = "it is tried again with a peer that could not be talked to"


_NEXT_STATE: Final = {
    (State.CLOSED, Cause.STREAM_OPENED): State.GREETING,
    (State.CLOSED, Cause.STREAM_LOST): State.CLOSED,
    (State.GREETING, Cause.STREAM_OPENED): State.GREETING,
    (State.GREETING, Cause.STREAM_LOST): State.CLOSED,
    (State.GREETING, Cause.PROVED): State.OPEN,
    (State.GREETING, Cause.MISMATCHED): State.REFUSED,
    (State.OPEN, Cause.STREAM_OPENED): State.GREETING,
    (State.OPEN, Cause.STREAM_LOST): State.CLOSED,
    (State.OPEN, Cause.PROVED): State.OPEN,
    (State.OPEN, Cause.MISMATCHED): State.REFUSED,
    (State.OPEN, Cause.VIOLATED): State.GREETING,
    (State.REFUSED, Cause.STREAM_OPENED): State.GREETING,
    (State.REFUSED, Cause.STREAM_LOST): State.CLOSED,
    (State.REFUSED, Cause.PROVED): State.OPEN,
    (State.REFUSED, Cause.MISMATCHED): State.REFUSED,
    (State.REFUSED, Cause.RETRIED): State.GREETING,
}

_CANNOT_BE: Final = frozenset(
    {
        # Without a stream nothing arrives, and no timer runs.
        (State.CLOSED, Cause.PROVED),
        (State.CLOSED, Cause.MISMATCHED),
        (State.CLOSED, Cause.VIOLATED),
        (State.CLOSED, Cause.RETRIED),
        # No sealed frame can be read, so none can break the protocol.
        (State.GREETING, Cause.VIOLATED),
        (State.REFUSED, Cause.VIOLATED),
        # Only what was refused is tried again.
        (State.GREETING, Cause.RETRIED),
        (State.OPEN, Cause.RETRIED),
    }
)


class Session:
    """One end of a two-way conversation: an `AnySession`. See the top of this file.

    Args:
        config: Who we are, and limits.
        entropy: Gives that many fresh random bytes; one draw of 16 a handshake.
    """

    def __init__(self, config: Config, entropy: Callable[[int], bytes]) -> None:
        assert MESSAGE_BYTES_MIN <= config.message_bytes_max <= config.reassembly_bytes_max
        assert min(config.window_bytes, config.in_flight_bytes_max) >= config.frame_bytes_max
        assert config.frame_bytes_max >= FRAME_BYTES_MAX, "a FLUSH is as long, and must pass"
        self.config = config
        self.counters = Counters()
        self.state = State.CLOSED
        self.peer: Peer | None = None
        self._write_bytes_max = 2 * config.frame_bytes_max
        self._ack_delay_s = config.ack_delay_s
        self._decoder = Decoder(config.frame_bytes_max)
        self._sender = Sender(config, self.counters)
        self._receiver = Receiver(config, self.counters)
        self._handshake = Handshake(config, entropy, self._sender, self._receiver)
        self._liveness = Liveness(config)
        self._events: list[Event] = []
        self._tx_key: Key = NO_KEY
        self._dues = 0  # what must go out before DATA: _FLUSH, _HELLO and so on
        self._now_s = 0.0
        self._hello_at_s: float | None = None  # when to say HELLO again
        self._greet_not_before_s = float("-inf")
        self._ack_at_s: float | None = None
        self._ack_now = False

    def _change(self, change: Cause) -> None:
        self.state = _NEXT_STATE[self.state, change]

    # ---------------------------------------------------------------- the stream

    def open(self, now_s: float) -> None:
        """Bind to a stream that was just opened: greet, and go on with the session if both can."""
        self._change(Cause.STREAM_OPENED)
        self._decoder.reset()
        self._clear_dues()
        self._dues |= _FLUSH
        self._greet(now_s)

    def close(self) -> None:
        """The stream is gone. Messages go on being accepted, for the next one."""
        self._change(Cause.STREAM_LOST)
        self._decoder.reset()
        self._handshake.candidate = None
        self._liveness.closed()
        self._hello_at_s = self._ack_at_s = None
        self._dues = 0
        self._ack_now = False

    def abandon(self) -> None:
        """Forget the session, and what waits in it: a new one begins on the next stream. Both ends
        are told so, and repeat what is not over."""
        assert self.state is State.CLOSED
        self._handshake.forget_session()
        self._forget_messages()

    def _clear_dues(self) -> None:
        """All but a FLUSH: the stream still needs it."""
        self._dues &= _FLUSH
        self._ack_now = False

    def _greet(self, now_s: float) -> None:
        assert self.state is State.GREETING
        self._now_s = now_s
        self._decoder.key = self._decoder.candidate = None
        self._ack_at_s = None
        self._handshake.begin()
        self._liveness.greeted(now_s)
        self._dues |= _HELLO
        self._hello_at_s = now_s + HELLO_RETRY_S[0]

    # ---------------------------------------------------------------- sending

    @property
    def backlog_bytes(self) -> int:
        """Bytes of messages that have not gone out for the first time."""
        return self._sender.backlog

    @property
    def unacknowledged(self) -> int:
        """DATA frames that went out and have not been acknowledged."""
        return self._sender.tail - self._sender.base

    def send(self, message: bytes, stream: int = CONTROL) -> None:
        """Queue a message. It arrives once, in its stream's order, unless a new session begins.

        The caller bounds how many it queues; `backlog_bytes` tells.

        Args:
            message: 1 to MESSAGE_BYTES_MAX bytes (or the peer's limit, if lower).
            stream: 0 to STREAMS - 1; CONTROL goes ahead of all others.

        Raises:
            LimitExceeded: It is too large for us or for the peer. Nothing was queued.
        """
        self._sender.send(message, stream)

    def data_to_send(self, limit: int | None = None, frames_max: int = WRITE_FRAMES_MAX) -> bytes:
        """The next bytes for the stream: whole frames, at most `limit` bytes.

        Call it when the stream takes bytes, until it returns none.

        Args:
            limit: At least two frames' worth, so that a flush, a HELLO and a frame all pass; None:
                so many.
            frames_max: So many frames at most.
        """
        parts = self._control_frames() if self._dues else []
        if self.state is not _OPEN:
            return b"".join(parts)
        sender = self._sender
        acknowledged = False
        if sender.backlog or sender.cursor < sender.tail:
            room = limit or self._write_bytes_max
            if parts:
                room -= sum(map(len, parts))
            acknowledged = self._add_data_frames(parts, room, frames_max)
        if not acknowledged and self._ack_due():
            parts.append(self._seal(layout.KIND_ACK))
        if len(parts) > 1:
            return b"".join(parts)
        return parts[0] if parts else b""

    def _add_data_frames(self, parts: list[bytes], room: int, frames_max: int) -> bool:
        """Add the DATA frames that may go out now. False if there is none."""
        sender, receiver = self._sender, self._receiver
        key, ack, credit = self._tx_key, receiver.next, receiver.grant(sender.backlog)
        was_idle = sender.base == sender.tail
        before = len(parts)
        while (sender.backlog or sender.cursor < sender.tail) and len(parts) < frames_max:
            segment = sender.next_segment(room)
            if segment is None:
                break
            flags, stream, total, payload = segment
            frame = encode_frame(
                key,
                layout.KIND_DATA,
                flags,
                stream,
                total,
                sender.cursor - 1,
                ack,
                credit,
                payload,
            )
            parts.append(frame)
            room -= len(frame)
        if len(parts) == before:
            return False
        assert room >= 0, "more than the stream takes in one write"
        self.counters.frames_sent += len(parts) - before
        self._acknowledged(credit)
        if was_idle:
            self._liveness.began_to_wait(self._now_s)
        return True

    def _acknowledged(self, credit: int) -> None:
        """A frame goes out, and every frame acknowledges and grants."""
        self._ack_at_s = None
        self._ack_now = False
        self._receiver.credit_told = credit

    def _control_frames(self) -> list[bytes]:
        parts = []
        dues, handshake = self._dues, self._handshake
        if dues & _HELLO and handshake.hello is not None:
            parts.append(_seal_greeting(layout.KIND_HELLO, handshake.hello.encode()))
        if dues & _FLUSH:  # behind it: who is in no half frame hears the HELLO four reads earlier
            parts.append(FLUSH)
        if dues & _WELCOME and handshake.welcome is not None:
            parts.append(_seal_greeting(layout.KIND_WELCOME, handshake.welcome.encode()))
        if dues & _REFUSE:
            parts.append(_seal_greeting(layout.KIND_REFUSE, handshake.refusal))
        self._dues = dues & (_REWIND | _PONG | _PING)
        self.counters.frames_sent += len(parts)
        if self.state is _OPEN:
            self._dues = 0
            parts += [self._seal(kind) for due, kind in _SEALED_DUES if dues & due]
        return parts

    def _seal(self, kind: int) -> bytes:
        """A frame without payload; it acknowledges and grants like every other."""
        sender, receiver = self._sender, self._receiver
        credit = receiver.grant(sender.backlog)
        self._acknowledged(credit)
        self.counters.frames_sent += 1
        return encode_frame(self._tx_key, kind, 0, 0, 0, sender.cursor, receiver.next, credit, b"")

    def _ack_due(self) -> bool:
        if self._ack_now or (self._ack_at_s is not None and self._now_s >= self._ack_at_s):
            return True
        return self._receiver.owes_credit(self._sender.backlog)

    # ---------------------------------------------------------------- receiving

    @property
    def wanted_bytes(self) -> int:
        """So many complete what has begun to arrive: one frame at most."""
        return self._decoder.wanted_bytes

    def receive_data(self, data: bytes, now_s: float) -> list[Event]:
        """Take bytes from the stream, in any chunks; return what they amount to."""
        self._now_s = now_s
        decoder = self._decoder
        frames = decoder.receive_data(data)
        while frames:
            self.counters.frames_received += len(frames)
            for frame in frames:
                if frame.candidate and self._handshake.candidate is not None:
                    self._establish(*self._handshake.candidate)
                if frame.kind == layout.KIND_DATA and self.state is _OPEN:
                    self._on_data(frame)  # as `_ON_FRAME` says: nearly all are such frames
                    continue
                handler = _ON_FRAME.get((self.state, frame.kind))
                if handler is not None:
                    handler(self, frame)
            # What came last may have changed the keys.
            frames = decoder.receive_data(b"") if decoder.stopped else []
        self.counters.bytes_skipped = decoder.bytes_skipped
        self.counters.bad_payloads = decoder.bad_payloads
        events = self._events
        if events:
            self._events = []
        return events

    def _on_data(self, frame: Frame) -> None:
        if not self._on_any(frame):
            return
        if self._ack_at_s is None:
            self._ack_at_s = self._now_s + self._ack_delay_s
        receiver = self._receiver
        if frame.seq == receiver.next:
            problem = receiver.take(frame, self._events)
            if problem:
                self._violate(problem)
        elif frame.seq < receiver.next:
            self.counters.duplicates += 1
            self._ack_now = True

    def _on_any(self, frame: Frame) -> bool:
        """What every sealed frame says: acknowledgement, credit, and by its number what is lost."""
        sender, liveness = self._sender, self._liveness
        liveness.heard_s = self._now_s
        if liveness.asked_s is not None:
            self._was_answered()
        if frame.ack > sender.base:  # else it is an old frame, come twice, or says nothing new
            liveness.progress_s = self._now_s
            if not sender.acknowledge(frame.ack):
                self._violate(f"it acknowledged frame {frame.ack}; {sender.tail} were sent")
                return False
        if frame.credit > sender.credit:
            sender.credit = frame.credit
        if frame.seq > self._receiver.next and self._receiver.is_hole(frame):
            self._receiver.note_hole(frame.seq, self._events)
            self._dues |= _REWIND
        return True

    def _was_answered(self) -> None:
        self._handshake.hello = None  # it has our key after all
        self._dues &= ~_HELLO
        if self._liveness.answered(waiting=self._is_waiting):
            self._events.append(Heard())

    def _on_ack(self, frame: Frame) -> None:
        self._on_any(frame)

    def _on_ping(self, frame: Frame) -> None:
        if self._on_any(frame):
            self._dues |= _PONG

    def _on_rewind(self, frame: Frame) -> None:
        if self._on_any(frame):
            self._sender.rewind(self._now_s)

    def _violate(self, reason: str) -> None:
        """The peer makes no sense: forget the session and greet anew, not too often."""
        self.counters.violations += 1
        self._events.append(Violation(reason))
        self._change(Cause.VIOLATED)
        self._handshake.forget_session()
        self._forget_messages()
        self._clear_dues()
        at_s = max(self._now_s, self._greet_not_before_s)
        self._greet_not_before_s = self._now_s + REGREET_S
        self._greet(self._now_s)
        if at_s > self._now_s:
            self._dues &= ~_HELLO
            self._hello_at_s = at_s

    def _forget_messages(self) -> None:
        self._sender.reset()
        self._receiver.reset()

    # ---------------------------------------------------------------- handshake

    def _on_hello(self, frame: Frame) -> None:
        handshake = self._handshake
        peer = handshake.read(frame.payload)
        if peer is None:
            return
        self._liveness.heard_s = self._now_s
        problem = handshake.incompatible(peer)
        if problem:
            handshake.refuse(peer, problem)
            self._dues |= _REFUSE
            return
        if self.state is _OPEN and handshake.is_in_force(peer):
            handshake.welcome_again()
        else:
            self._take_up(peer)
        self._dues |= _WELCOME

    def _take_up(self, peer: Greeting) -> None:
        """A HELLO that is not of the handshake in force."""
        handshake = self._handshake
        if handshake.is_new(peer):
            self.counters.greetings += 1
            if self.state is State.REFUSED:
                self._change(Cause.RETRIED)
                self._greet(self._now_s)
            self._decoder.candidate = handshake.propose(peer)
        handshake.welcome_candidate()

    def _on_welcome(self, frame: Frame) -> None:
        handshake = self._handshake
        peer, mine = handshake.read(frame.payload), handshake.hello
        if peer is None or mine is None or not handshake.is_for_us(peer):
            return
        problem = handshake.incompatible(peer)
        if problem:
            self._refused(problem, by_peer=False)
        else:
            self._establish(mine, peer)

    def _on_refuse(self, frame: Frame) -> None:
        reason = self._handshake.refusal_for_us(frame.payload)
        if reason is not None:
            self._refused(reason, by_peer=True)

    def _refused(self, reason: str, *, by_peer: bool) -> None:
        if self.state is State.REFUSED:
            return
        self._change(Cause.MISMATCHED)
        self._dues &= ~_HELLO
        self._hello_at_s = self._now_s + REFUSED_RETRY_S
        self._events.append(Refused(reason, by_peer))

    def _establish(self, mine: Greeting, peer: Greeting) -> None:
        """Both ends know both nonces: the new key is in force."""
        handshake, sender = self._handshake, self._sender
        resumed = handshake.can_resume(mine, peer)
        if resumed:
            sender.acknowledge(peer.recv_next)
            sender.rewind(self._now_s)
            sender.credit = max(sender.credit, peer.credit)
            self.counters.resumptions += 1
        else:
            self._forget_messages()
            handshake.begin_session(mine, peer)
            self.counters.sessions += 1
        sender.heed(peer)
        self._receiver.forget_hole()
        self._tx_key, self._decoder.key = handshake.agree(mine, peer)
        self._decoder.candidate = None
        self._hello_at_s = None
        self._dues &= _FLUSH | _WELCOME
        self._change(Cause.PROVED)
        self.peer = handshake.described(peer)
        self._liveness.opened(self._now_s)
        self._ack_now = True  # tell the peer at once that the key is in force
        self._events.append(Opened(self.peer, resumed))

    # ---------------------------------------------------------------- time

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`, on `now_s`'s clock; None: not needed."""
        if self.state is _OPEN:
            check, ack = self._liveness.check_at_s, self._ack_at_s
            return check if ack is None or check is None or check < ack else ack
        return self._hello_at_s

    def handle_timeout(self, now_s: float) -> list[Event]:
        """Do what is due. Calling it early or late is harmless."""
        self._now_s = now_s
        if self.state is _OPEN:
            if self._ack_at_s is not None and now_s >= self._ack_at_s:
                # The timer has fired; the frame may have to wait until the stream takes bytes.
                self._ack_at_s = None
                self._ack_now = True
            check_at_s = self._liveness.check_at_s
            if check_at_s is not None and now_s >= check_at_s:
                self._check_peer(now_s)
        elif self._hello_at_s is not None and now_s >= self._hello_at_s:
            self._retry_hello(now_s)
        events, self._events = self._events, []
        return events

    def _retry_hello(self, now_s: float) -> None:
        if self.state is State.REFUSED:
            self._change(Cause.RETRIED)
            self._greet(now_s)
            return
        self._dues |= _HELLO
        retry_s = self._handshake.retry_s()
        silent = self._liveness.silence(now_s)
        if silent is not None:
            self._events.append(silent)
        # Not later than silence is to be told: a wedged channel is cured only then.
        self._hello_at_s = min(now_s + retry_s, self._liveness.silent_at())

    @property
    def _is_waiting(self) -> bool:
        """For an acknowledgement, or for credit."""
        sender = self._sender
        return sender.base < sender.tail or sender.backlog > 0

    def _check_peer(self, now_s: float) -> None:
        asking = self._liveness.check(now_s, waiting=self._is_waiting)
        if asking.ping:
            self._dues |= _PING
            self.counters.pings_sent += 1
        if asking.greet:
            self._handshake.ask_again()
            self._dues |= _HELLO
        if asking.silent is not None:
            self._events.append(asking.silent)


def _seal_greeting(kind: int, payload: bytes) -> bytes:
    return encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, payload)


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
