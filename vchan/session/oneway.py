"""A session that goes one way: down a pipe, with no word back.

Rules of this file
1. No I/O, no clock, no randomness, no logging. Both ends are an `AnySession`, as `Session` is.
2. The same frames, in order, sealed with a key that is known to all: no handshake can agree on one.
   A message's bytes cannot pass for a frame: its body is JSON, in which no control character is.
3. The writer says who it is when it opens the pipe, and again what it may have written in part.
   The reader drops what it has, and notices what is missing: it cannot ask for it.

What is promised: in order, at most once, whole. What is not: that it arrives. A message is given up
by the writer as soon as the pipe has taken it.

    Writer --FLUSH, HELLO, DATA, DATA ...--> Reader
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from vchan.errors import LimitExceeded
from vchan.session.contract import (
    CONTROL,
    WRITE_BYTES_MAX,
    WRITE_FRAMES_MAX,
    Config,
    Counters,
    Event,
    Lost,
    Opened,
    Peer,
    Received,
    State,
    Violation,
)
from vchan.wire import layout
from vchan.wire.frames import (
    FLUSH,
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    NO_KEY,
    PAYLOAD_BYTES_MAX,
    Decoder,
    Frame,
    Greeting,
    Key,
    decode_greeting,
    encode_frame,
)

PIPE_KEY: Final = Key(0x76636831, 0x77617931)
CONFIRM_S: Final = 0.02
"""What was handed out is taken to be written when more is asked for; asked this soon at least."""


class Writer:
    """The end that writes. It opens at once, and reads nothing."""

    def __init__(
        self,
        config: Config,
        entropy: Callable[[int], bytes],  # noqa: ARG002 - AnySession's makers hand it in
    ) -> None:
        self.config = config
        self.counters = Counters()
        self.state = State.CLOSED
        self.peer: Peer | None = None
        self.wanted_bytes = HEADER_BYTES
        self._is_new_pipe = False
        self._queue: deque[tuple[int, bytes]] = deque()
        self._offset = 0  # into the first
        self._seq = 0
        self._queued_bytes = 0
        self._handed = b""  # the last frames, which may not be written yet
        self._handed_frames = 0
        self._tells_open = False
        self._look_s = 0.0

    def open(self, now_s: float) -> None:
        """Bind to a pipe that was just opened."""
        self.state = State.OPEN
        self._is_new_pipe = True
        self._tells_open = True
        self._look_s = now_s

    def close(self) -> None:
        """The pipe is gone. Messages go on being accepted, for the next one."""
        self.state = State.CLOSED

    def abandon(self) -> None:
        """Nothing could tell the other end: what waits is written to the next pipe."""

    @property
    def backlog_bytes(self) -> int:
        """Bytes of messages that have not been handed out."""
        return self._queued_bytes

    @property
    def unacknowledged(self) -> int:
        """Frames that were handed out, and may not be written yet."""
        return self._handed_frames

    def send(self, message: bytes, stream: int = CONTROL) -> None:
        """Queue a message.

        Raises:
            LimitExceeded: It is too large.
        """
        limit = self.config.message_bytes_max
        if len(message) > limit:
            raise LimitExceeded("message", len(message), limit, "MESSAGE_BYTES_MAX")
        self._queue.append((stream, message))
        self._queued_bytes += len(message)
        self.counters.messages_sent += 1

    def data_to_send(self, limit: int | None = None, frames_max: int = WRITE_FRAMES_MAX) -> bytes:
        """The next bytes for the pipe; those before have been written."""
        parts = []
        if self._is_new_pipe:
            # What may have been written in part goes again: the reader knows the numbers.
            parts = [FLUSH, self._introduction(), self._handed]
            self._is_new_pipe = False
            return b"".join(parts)
        self._handed, self._handed_frames = b"", 0
        limit, size = limit or WRITE_BYTES_MAX, 0
        while self._queue and size <= limit - FRAME_BYTES_MAX and len(parts) < frames_max:
            parts.append(self._next_frame())
            size += len(parts[-1])
        self._handed, self._handed_frames = b"".join(parts), len(parts)
        assert len(self._handed) <= limit, "more than the pipe takes in one write"
        assert bool(self._queue) == (self._queued_bytes > 0), "what is queued is counted"
        return self._handed

    def _introduction(self) -> bytes:
        config = self.config
        greeting = Greeting(
            config.version_min,
            config.version_max,
            config.role,
            config.instance,
            bytes(16),
            bytes(16),
            bytes(16),
            0,
            0,
            self._seq - self._handed_frames,
            0,
            FRAME_BYTES_MAX,
            config.message_bytes_max,
            config.reassembly_bytes_max,
            config.name,
            "",
        )
        return encode_frame(NO_KEY, layout.KIND_HELLO, 0, 0, 0, 0, 0, 0, greeting.encode())

    def _next_frame(self) -> bytes:
        stream, message = self._queue[0]
        payload = message[self._offset : self._offset + PAYLOAD_BYTES_MAX]
        flags = layout.FLAG_FIRST if self._offset == 0 else 0
        self._offset += len(payload)
        self._queued_bytes -= len(payload)
        if self._offset == len(message):
            flags |= layout.FLAG_LAST
            self._queue.popleft()
            self._offset = 0
        frame = encode_frame(
            PIPE_KEY, layout.KIND_DATA, flags, stream, len(message), self._seq, 0, 0, payload
        )
        self._seq += 1
        self.counters.frames_sent += 1
        return frame

    def receive_data(self, data: bytes, now_s: float) -> list[Event]:  # noqa: ARG002 - AnySession's
        """Nothing comes this way."""
        return []

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        return self._look_s if self._tells_open or self._handed_frames else None

    def handle_timeout(self, now_s: float) -> list[Event]:
        """It is open as soon as there is a pipe."""
        self._look_s = now_s + CONFIRM_S
        if not self._tells_open:
            return []
        self._tells_open = False
        resumed = self.counters.sessions > 0
        self.counters.sessions += not resumed
        self.counters.resumptions += resumed
        return [Opened(Peer(bytes(16), "a pipe's reader", "", self.config.version_max), resumed)]


class Reader:
    """The end that reads. What it is given to send is dropped, or refused if somebody waits."""

    backlog_bytes = 0
    unacknowledged = 0

    def __init__(
        self,
        config: Config,
        entropy: Callable[[int], bytes],  # noqa: ARG002 - AnySession's makers hand it in
    ) -> None:
        self.config = config
        self.counters = Counters()
        self.state = State.CLOSED
        self.peer: Peer | None = None
        self._decoder = Decoder()
        self._writer = b""
        self._next: int | None = None  # the number of the next frame; None: whatever it is
        self._begun: bytearray | None = None  # the message that comes in; the writer mixes none

    def open(self, now_s: float) -> None:  # noqa: ARG002 - AnySession's
        """Bind to a pipe that was just opened."""
        self.state = State.OPEN
        self._decoder.reset()
        self._decoder.key = PIPE_KEY

    def close(self) -> None:
        """The pipe is gone."""
        self.state = State.CLOSED

    def abandon(self) -> None:
        """It keeps nothing."""

    def send(self, message: bytes, stream: int = CONTROL) -> None:  # noqa: ARG002 - AnySession's
        """There is no way back: what nobody waits for is dropped.

        Raises:
            LimitExceeded: Somebody would wait for an answer.
        """
        if message[:1] == bytes((layout.MESSAGE_REQUEST,)):
            raise LimitExceeded("requests out of a guest whose channel goes one way", 1, 0, "pipe")

    def data_to_send(
        self,
        limit: int | None = None,  # noqa: ARG002 - AnySession's
        frames_max: int = WRITE_FRAMES_MAX,  # noqa: ARG002 - AnySession's
    ) -> bytes:
        """Nothing goes this way."""
        return b""

    @property
    def wanted_bytes(self) -> int:
        """So many complete what has begun to arrive."""
        return self._decoder.wanted_bytes

    def next_timeout(self) -> float | None:
        """Nothing is due here."""
        return None

    def handle_timeout(self, now_s: float) -> list[Event]:  # noqa: ARG002 - AnySession's
        """Nothing is due here."""
        return []

    def receive_data(self, data: bytes, now_s: float) -> list[Event]:  # noqa: ARG002 - AnySession's
        """Take what was read."""
        events: list[Event] = []
        frames = self._decoder.receive_data(data)
        while frames or self._decoder.stopped:
            for frame in frames:
                if frame.kind == layout.KIND_HELLO:
                    self._on_hello_of(frame, events)
                elif frame.kind == layout.KIND_DATA:
                    self._on_data_of(frame, events)
            frames = self._decoder.receive_data(b"") if self._decoder.stopped else []
        self.counters.bytes_skipped = self._decoder.bytes_skipped
        self.counters.bad_payloads = self._decoder.bad_payloads
        return events

    def _on_hello_of(self, frame: Frame, events: list[Event]) -> None:
        greeting = decode_greeting(frame.payload)
        if greeting is None or greeting.role == self.config.role:
            return
        resumed = greeting.instance == self._writer
        if not resumed:
            self._writer = greeting.instance
            self._begun = None
            self._next = 0
            self.counters.sessions += 1
        peer = Peer(greeting.instance, greeting.name, "", greeting.version_max)
        events.append(Opened(peer, resumed))

    def _on_data_of(self, frame: Frame, events: list[Event]) -> None:
        self.counters.frames_received += 1
        if self._next is None:  # we came when it had begun
            self._next = frame.seq
            events.append(Opened(Peer(bytes(16), "a pipe's writer", "", 0), resumed=False))
        if frame.seq < self._next:
            self.counters.duplicates += 1
            return
        if frame.seq > self._next:
            self.counters.losses += 1
            self.counters.frames_lost += frame.seq - self._next
            events.append(Lost(self._next, frame.seq))
            self._begun = None
        self._next = frame.seq + 1
        self._assemble(frame, events)

    def _assemble(self, frame: Frame, events: list[Event]) -> None:
        if frame.flags & layout.FLAG_FIRST:
            self._begun = bytearray()
        begun, payload = self._begun, frame.payload
        if begun is None:
            return  # its beginning was lost
        begun += payload
        if len(begun) > min(frame.total, self.config.message_bytes_max):
            events.append(Violation(f"a message of over {frame.total} bytes"))
            self._begun = None
        elif frame.flags & layout.FLAG_LAST:
            self._begun = None
            self.counters.messages_received += 1
            events.append(Received(frame.stream, bytes(begun)))
