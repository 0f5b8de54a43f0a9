"""Sockets joined to byte streams: the same at both ends, for `vchan forward` and in the guest.

What is read from a socket is written to its stream, and the other way round; nothing is read that
there is no room for. A socket whose other side has stopped writing half-closes the stream, and the
other way round. A stream that is reset resets the socket, as far as its kind has that: to TCP's
other side a reset is no end.

Rules of this file
1. Nothing waits: sockets are non-blocking, and one that is slow holds up its own stream alone.
2. What one stream may hold here is bounded: UNTAKEN_BYTES_MAX each way, beside the halves' windows.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from vchan.io.loop import Alarm, Scheduler
from vchan.session import AnySession
from vchan.streams import Ended, Readable, StreamEnds, StreamEvent, Writable
from vchan.streams.carrier import fill
from vchan.streams.messages import CLOSED

UNTAKEN_BYTES_MAX: Final = 32 * 1024
"""Read from a socket and not taken by its stream, or the other way round. At it: no more is read
until it is."""
TICK_S: Final = 0.1
"""How late a question may come. To ask the ends for their next timeout after every message would
cost a fourteenth of all work."""
_LINGER_NOT: Final = struct.pack("ii", 1, 0)


class _Joint:
    """A socket and its stream."""

    __slots__ = (
        "ends_after", "for_socket", "for_stream", "id", "is_over", "reads", "socket", "waits",
    )  # fmt: skip

    def __init__(self, stream: bytes, joined: socket.socket) -> None:
        self.id = stream
        self.socket = joined
        self.for_stream = b""  # read from the socket, not yet taken by the stream
        self.for_socket = b""  # read from the stream, not yet taken by the socket
        self.reads = False  # the loop tells when there is something to read
        self.waits = False  # the loop tells when there is room to write
        self.ends_after = False  # the peer's half ends behind `for_socket`
        self.is_over = False  # the stream is; what is left is to be written


class Splices:
    """Sockets and their streams, on one session.

    Args:
        wake: Has the session's link call `refill` soon.
        told: Told every event of the ends; those of a stream that is joined when they were heeded.
    """

    def __init__(
        self,
        loop: Scheduler,
        ends: StreamEnds,
        wake: Callable[[], object],
        told: Callable[[StreamEvent], object],
    ) -> None:
        self.ends = ends
        self._loop = loop
        self._wake = wake
        self._told = told
        self._joints: dict[bytes, _Joint] = {}
        self._alarm = Alarm(loop, self._timed_out)
        self._is_settling = False

    def __len__(self) -> int:
        """How many sockets are joined."""
        return len(self._joints)

    # ---------------------------------------------------------------- the session

    def connected(self) -> None:
        """A new session has begun."""
        self.ends.connected(self._loop.time())
        self.settle()

    def receive(self, message: bytes) -> None:
        """Take a message of the family."""
        spent_s = self._loop.spent()
        self.ends.receive(message, self._loop.time())
        self.settle()
        self._worked(spent_s)

    def give_way(self) -> None:
        """A request has come, or its answer goes: see `StreamEnds.give_way`."""
        self.ends.give_way(self._loop.time())

    def _worked(self, spent_s: float) -> None:
        """The processor has worked for streams since it had worked for so long."""
        took_s = self._loop.spent() - spent_s
        self._alarm.set(self.ends.worked(took_s, self._loop.time()))

    def refill(self, session: AnySession) -> bool:
        """Queue what there is to say on the session, as far as there is room."""
        now_s, spent_s = self._loop.time(), self._loop.spent()
        has_queued = fill(session, lambda: self.ends.next_message(now_s))
        if has_queued:
            self._set_alarm()  # what was sent asks for an answer
            self._worked(spent_s)
        return has_queued

    def settle(self) -> None:
        """Heed what has happened at the ends. To be called after they were told anything."""
        if not self._is_settling:
            self._heed_all()
            self._set_alarm()
            self._wake()

    def _heed_all(self) -> None:
        self._is_settling = True
        try:
            while events := self.ends.take_events():
                for event in events:
                    self._heed(event)
        finally:
            self._is_settling = False

    def _set_alarm(self) -> None:
        """The ends may have a new timeout: look at it within TICK_S."""
        self._alarm.set(self._loop.time() + TICK_S)

    def _timed_out(self) -> None:
        self.ends.handle_timeout(self._loop.time())
        self._heed_all()
        self._alarm.set(self.ends.next_timeout())
        self._wake()

    def close(self) -> None:
        """Reset every socket, and watch nothing any more. The streams are not told."""
        self._alarm.cancel()
        for joint in list(self._joints.values()):
            self._forget(joint, is_reset=True)

    # ---------------------------------------------------------------- sockets

    def open(self, joined: socket.socket, target: str, facts: str) -> bytes:
        """Open a stream for a socket that is connected; returns its id.

        Args:
            facts: See `StreamEnds.open`.

        Raises:
            LimitExceeded: Too many are open. The socket is still the caller's.
        """
        stream = self.ends.open(target, facts, self._loop.time())
        self.join(stream, joined)
        self.settle()
        return stream

    def join(self, stream: bytes, joined: socket.socket, first: bytes = b"") -> None:
        """Join a connected socket, which is ours from now on, to a stream.

        Args:
            first: What was read from the socket before.
        """
        joined.setblocking(False)
        if joined.family != socket.AF_UNIX:
            joined.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        joint = self._joints[stream] = _Joint(stream, joined)
        joint.for_stream = first
        self._offer(joint)

    def _heed(self, event: StreamEvent) -> None:
        joint = self._joints.get(event.id) if isinstance(event, _OF_STREAMS) else None
        match event:
            case Readable() if joint is not None:
                self._write_on(joint)
            case Writable() if joint is not None:
                self._offer(joint)
            case Ended(_, reason) if joint is not None:
                joint.is_over = True
                if reason:
                    self._forget(joint, is_reset=True)
                elif not joint.for_socket and not joint.ends_after:
                    self._forget(joint, is_reset=False)
            case _:
                pass
        self._told(event)

    # from the socket to the stream

    def _read_on(self, joint: _Joint) -> None:
        if not joint.reads:
            joint.reads = True
            self._loop.add_reader(joint.socket.fileno(), lambda: self._readable(joint))

    def _stop_reading(self, joint: _Joint) -> None:
        if joint.reads:
            joint.reads = False
            self._loop.remove_reader(joint.socket.fileno())

    def _readable(self, joint: _Joint) -> None:
        spent_s = self._loop.spent()
        try:
            data = joint.socket.recv(UNTAKEN_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(joint, error)
            return
        if data:
            joint.for_stream = data
            self._offer(joint)
        else:
            self._stop_reading(joint)
            self.ends.finish(joint.id)
        self.settle()
        self._worked(spent_s)

    def _offer(self, joint: _Joint) -> None:
        """Hand to the stream what was read; read on when it has taken it."""
        data = joint.for_stream
        taken = self.ends.write(joint.id, data)
        joint.for_stream = data[taken:]
        if joint.for_stream:
            self._stop_reading(joint)
        else:
            self._read_on(joint)

    # from the stream to the socket

    def _write_on(self, joint: _Joint) -> None:
        """Write as much as the socket takes; what it does not, is not read from the stream: so its
        peer is given no credit for more."""
        if joint.waits:
            return
        try:
            while self._next_for_socket(joint):
                sent = joint.socket.send(joint.for_socket)
                joint.for_socket = joint.for_socket[sent:]
        except BlockingIOError:
            joint.waits = True
            self._loop.add_writer(joint.socket.fileno(), lambda: self._writable(joint))
            return
        except OSError as error:
            self._fail(joint, error)
            return
        if joint.ends_after:
            joint.ends_after = False
            self._end_writing(joint)
        if joint.is_over:
            self._forget(joint, is_reset=False)

    def _next_for_socket(self, joint: _Joint) -> bool:
        if not joint.for_socket and not joint.ends_after and not joint.is_over:
            joint.for_socket, joint.ends_after = self.ends.read(joint.id, UNTAKEN_BYTES_MAX)
        return bool(joint.for_socket)

    def _writable(self, joint: _Joint) -> None:
        joint.waits = False
        self._loop.remove_writer(joint.socket.fileno())
        self._write_on(joint)
        self.settle()

    def _end_writing(self, joint: _Joint) -> None:
        try:
            joint.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # its other side is gone already, and has ended what it said

    # the end

    def _fail(self, joint: _Joint, error: OSError) -> None:
        """The socket is broken: its stream ends with that, if it has not ended before."""
        if joint.is_over:
            self._forget(joint, is_reset=True)
        else:
            self.ends.reset(joint.id, CLOSED, os.strerror(error.errno or 0))
        self.settle()

    def _forget(self, joint: _Joint, *, is_reset: bool) -> None:
        if self._joints.pop(joint.id, None) is None:
            return
        self._stop_reading(joint)
        if joint.waits:
            self._loop.remove_writer(joint.socket.fileno())
        reset(joint.socket) if is_reset else joint.socket.close()


_OF_STREAMS: Final = (Readable, Writable, Ended)


def reset(connected: socket.socket) -> None:
    """Close a socket so that its other side does not take it for the end of what was said; a unix
    socket's other side sees no more than a close."""
    try:
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    except OSError:
        pass  # reset already
    connected.close()
