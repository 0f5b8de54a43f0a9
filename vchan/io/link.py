"""A link: one session bound to one byte stream. The only loop that moves bytes.

The recipe, for every cause: call the session, hand out its events, then write what it has to
send. What is sent while events are handled goes out in the same write. Nothing blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vchan.io.loop import Alarm, Scheduler, Timer
from vchan.io.streams import Stream, hangup_watch
from vchan.session import WRITE_FRAMES_MAX, AnySession, Event, Received, State
from vchan.wire.frames import OVERHEAD_BYTES

TURN_BYTES: Final = 64 * 1024
"""Read in a row before others get their turn: one read of a socket, sixteen of a port."""
TURN_S: Final = 0.0002
"""Spent in a row on a peer that is metered, and then as long as the message takes that is being
handled: what a hostile guest writes would cost up to 30 ms for a read. At it: the others have their
turn."""
SLICE_BYTES: Final = 512
"""Handled before a metered peer's time is looked at, unless one frame has more: what costs most has
the smallest frames."""
TURN_FRAMES: Final = 32
"""Written to a metered peer in a row: it may have let thousands of answers wait for it. At it: the
others have their turn."""
LAST_READS_MAX: Final = 64
"""Turns of reading what the other end wrote before it went."""
STALL_S = 15.0
"""A stream that takes no bytes for so long, while its other end is there, is opened anew: wake-ups
on virtio-serial get lost."""
STALL_RETRY_S = 1.0
"""Until then, writing is tried again this often, whatever readiness says."""
HOLD_S: Final = 0.02
"""How often who holds up reading is asked again."""
FREED_BYTES_KEPT: Final = 1 << 20
"""A program that has freed so large a block keeps what it frees at its heap's end, up to twice as
much, instead of giving it back to the kernel and asking for it again with each large message: that
costs more than all else that is done with one. (glibc's rule; others have no such trouble.)"""
bytes(FREED_BYTES_KEPT)

HANGUP_POLL_S = 1.0
"""While the other end is away it is looked for this often, should its coming wake nobody."""


class Link:
    """Binds a session to a stream.

    Args:
        session: Survives the link; the owner binds it to the next one.
        stream: Owned by the link from now on.
        on_event: Called with each of the session's events.
        on_down: Called once, when the stream is of no use any more, with the reason.
        on_message: Called with each message that was Received, in its place; None: `on_event` is.
        silent: Say nothing yet: drop what arrives, write nothing, until `speak`.
        meter: Makes the peer one that is metered. Told how many bytes were handled and how many
            seconds were spent on that; returns for how many seconds not to read more. The other
            end then waits with its writes.
        hold: Asked after each read whether to read no more until it says otherwise.
    """

    def __init__(
        self,
        loop: Scheduler,
        session: AnySession,
        stream: Stream,
        on_event: Callable[[Event], object],
        on_down: Callable[[str], object],
        *,
        on_message: Callable[[bytes], object] | None = None,
        silent: bool = False,
        meter: Callable[[int, float], float] | None = None,
        hold: Callable[[], bool] | None = None,
    ) -> None:
        self.session = session
        self.stream = stream
        self.refill: Callable[[], object] | None = None
        """Called whenever there may be room for more: it may queue messages on the session, and
        says whether it has. For what waits with its owner until it can go out."""
        self._loop = loop
        self._on_event = on_event
        self._on_message = on_message
        self._on_down = on_down
        self._out = b""  # taken from the session, not yet by the stream
        self._meter = meter
        self._frames_max = WRITE_FRAMES_MAX if meter is None else TURN_FRAMES
        self._short_bytes = min(  # what is no longer had room for another frame
            session.config.frame_bytes_max, self._frames_max * OVERHEAD_BYTES
        )
        self._unread = b""  # taken from the stream of a metered peer, and handled up to ...
        self._unread_at = 0
        self._turn_planned = False
        self._was_long = False  # the last turn of a metered peer
        self._hold = hold
        self._pause_timer: Timer | None = None
        self._may_write = not silent
        self._write_problem = ""
        self._last_reads = LAST_READS_MAX  # left, when it has one
        self._flush_planned = False
        self._waits_to_write = False
        self._stalled_s: float | None = None
        self._stall_timer: Timer | None = None
        self._hangup_fd = -1
        self._down = False
        self._alarm = Alarm(loop, self._timed_out)
        self._hangup_timer: Timer | None = None
        self.bytes_dropped = 0
        loop.add_reader(stream.fileno(), self._readable)
        if not silent:
            session.open(loop.time())
            self.flush()

    # ---------------------------------------------------------------- for the owner

    def _is_over(self) -> bool:
        """Closed, perhaps by who was just told an event."""
        return self._down

    def speak(self) -> None:
        """Begin the conversation on a stream that was opened silently, or go on after `hush`."""
        if not self._may_write and not self._down:
            self._may_write = True
            if self.session.state is State.CLOSED:
                self.session.open(self._loop.time())
            self.flush()

    def hush(self) -> None:
        """Write nothing more; go on reading."""
        self._may_write = False
        self._stop_waiting_to_write()

    def send(self, message: bytes, stream: int) -> None:
        """Queue a message on the session and write it soon.

        Raises:
            LimitExceeded: It is too large. Nothing was queued.
        """
        self.session.send(message, stream)
        if not self._flush_planned:
            self._plan_flush()

    def cork(self) -> None:
        """What is sent from here on waits for `uncork`, or for the end of the next turn of reading,
        and goes out in one write."""
        self._flush_planned = True

    def uncork(self) -> None:
        """Write what is queued, as far as the stream takes it, and what is sent later soon."""
        self._flush_planned = False
        if not self._down:
            self.flush()

    def wake(self) -> None:
        """Write soon: `refill` has something, or the session."""
        if not self._flush_planned and not self._down:
            self._plan_flush()

    def close(self) -> None:
        """Close the stream. The session goes on; `on_down` is not called."""
        if self._down:
            return
        self._down = True
        self._loop.remove_reader(self.stream.fileno())
        self._stop_waiting_to_write()
        self._end_hangup()
        self._alarm.cancel()
        for timer in (self._pause_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self.session.close()
        self.stream.close()

    # ---------------------------------------------------------------- reading

    def _readable(self) -> None:
        if self._turn_planned:
            return
        if self._was_long:
            self._plan_turn()  # behind whoever else is ready
        else:
            self._take_turn()

    def _take_turn(self) -> None:
        self._turn_planned = False
        if self._down or self._pause_timer is not None:
            return
        assert self.session.state is not State.CLOSED or not self._may_write
        self.cork()
        self._read()
        self.uncork()

    def _read(self) -> None:
        if self._meter is not None:
            self._read_metered(self._meter)
            return
        now_s = self._loop.time()
        left = TURN_BYTES
        while left > 0:
            data = self._read_stream()
            if not data:
                return
            self._receive(data, now_s)
            left -= len(data)
            if self._hold is not None and self._hold():
                self._pause(HOLD_S)
                return
            if self._is_over() or len(data) < 4096:
                return  # most likely all there was: asking again costs a system call

    def _read_metered(self, meter: Callable[[int, float], float]) -> None:
        """One read, or what is left of it, as far as one turn gets."""
        spent = self._loop.spent
        now_s, began_s = self._loop.time(), spent()
        if not self._unread:
            self._unread = self._read_stream()
        begin = at = self._unread_at
        took_s = 0.0
        while at < len(self._unread) and took_s < TURN_S and not self._is_over():
            until = at + max(SLICE_BYTES, self.session.wanted_bytes)
            self._receive(self._unread[at:until], now_s)
            at = min(until, len(self._unread))
            took_s = spent() - began_s
        if self._is_over():
            return
        assert begin < at <= len(self._unread) or not self._unread
        self._unread_at = at
        if at == len(self._unread):
            self._unread, self._unread_at = b"", 0
        self._was_long = took_s >= TURN_S
        if not self._pause(meter(at - begin, took_s)) and self._unread:
            self._plan_turn()

    def _plan_turn(self) -> None:
        """There is more to handle, when others have had their turn."""
        self._turn_planned = True
        self._loop.call_soon(self._take_turn)

    def _read_stream(self) -> bytes:
        """What has arrived. b"": nothing, or no more; then that is seen to."""
        try:
            data = self.stream.read()
        except BlockingIOError:
            return b""
        except OSError as error:
            self._fail(f"cannot read: {error.strerror}")
            return b""
        if not data:
            self._hung_up()
        elif self._hangup_fd >= 0:
            self._end_hangup()
        return data

    def _pause(self, for_s: float) -> bool:
        """Read nothing for so long; says whether that is any time."""
        if for_s <= 0 or self._is_over():
            return False
        if self._pause_timer is None:
            self._loop.remove_reader(self.stream.fileno())
            self._pause_timer = self._loop.call_later(for_s, self._resume)
        return True

    def _resume(self) -> None:
        self._pause_timer = None
        if self._hold is not None and self._hold():
            self._pause(HOLD_S)
        elif not self._down and not self.is_hung_up:
            self._loop.add_reader(self.stream.fileno(), self._readable)
            if self._meter is not None:
                self._plan_turn()  # behind whoever else is ready by then

    def _receive(self, data: bytes, now_s: float) -> None:
        if self.session.state is State.CLOSED:
            self.bytes_dropped += len(data)
            return
        on_message = self._on_message
        for event in self.session.receive_data(data, now_s):
            if on_message is not None and isinstance(event, Received):
                on_message(event.message)
            else:
                self._on_event(event)
            if self._is_over():
                return

    def _hung_up(self) -> None:
        if self.stream.ends_at_hangup:
            self._fail("closed by the other end")
        elif self._hangup_fd < 0:
            # Always readable from now on: be woken by its change instead.
            self._loop.remove_reader(self.stream.fileno())
            self._stop_waiting_to_write()
            self._watch = hangup_watch(self.stream)
            self._hangup_fd = self._watch.fileno()
            self._loop.add_reader(self._hangup_fd, self._hangup_changed)
            self._poll_hangup()

    def _poll_hangup(self) -> None:
        self._hangup_timer = self._loop.call_later(HANGUP_POLL_S, self._hangup_changed)

    def _hangup_changed(self) -> None:
        if self._down or self._hangup_fd < 0:
            return
        self._watch.poll(0)
        if self._hangup_timer is not None:
            self._hangup_timer.cancel()
        try:
            data = self.stream.read()
        except BlockingIOError:
            data = b""
            self._end_hangup()
        except OSError as error:
            self._fail(f"cannot read: {error.strerror}")
            return
        if data:
            self._end_hangup()
            self._receive(data, self._loop.time())
        if self._is_over():
            return
        if self.is_hung_up:
            self._poll_hangup()
        else:
            self._loop.add_reader(self.stream.fileno(), self._readable)
            self.flush()

    def _end_hangup(self) -> None:
        if self._hangup_fd >= 0:
            self._loop.remove_reader(self._hangup_fd)
            self._hangup_fd = -1
            self._watch.close()
            self._stalled_s = None
        if self._hangup_timer is not None:
            self._hangup_timer.cancel()
            self._hangup_timer = None

    @property
    def is_hung_up(self) -> bool:
        """The other end of a port is not there; it may come back."""
        return self._hangup_fd >= 0

    # ---------------------------------------------------------------- writing

    def _plan_flush(self) -> None:
        self._flush_planned = True
        self._loop.call_soon(self.uncork)

    def flush(self) -> None:
        """Write what the session has to send, as far as the stream takes it."""
        is_free = not self._waits_to_write and self._hangup_fd < 0 and not self._write_problem
        if self._may_write and is_free:
            data = self._out or self._next_data()
            if data:
                self._write(data)
        if not self._down:
            self._alarm.move(self.session.next_timeout())

    def _next_data(self) -> bytes:
        if self.refill is not None:
            self.refill()
        return self.session.data_to_send(frames_max=self._frames_max)

    def _write(self, data: bytes) -> None:
        """This first, then what else there is."""
        is_last = not self._out and len(data) <= self._short_bytes
        while data:
            try:
                taken = self.stream.write(data)
            except BlockingIOError:
                self._out = data
                self._wait_to_write()
                return
            except OSError as error:
                self._write_problem = f"cannot write: {error.strerror}"
                self._loop.call_soon(self._end_after_reading)
                return
            assert 0 < taken <= len(data), "a stream that takes nothing says so"
            self._stalled_s = None
            data = data[taken:]
            if data:
                continue
            if is_last and (self.refill is None or not self.refill()):
                break
            if self._meter is not None:
                self._plan_flush()
                break
            data = self._next_data()
            is_last = len(data) <= self._short_bytes
        self._out = b""

    def _end_after_reading(self) -> None:
        """What the other end wrote before it went may still be read: a receipt, perhaps."""
        if self._is_over():
            return
        self._last_reads -= not self._unread
        self._read()
        if self._is_over():
            return
        if self._last_reads:
            self._loop.call_soon(self._end_after_reading)
        else:
            self._fail(self._write_problem)

    def _wait_to_write(self) -> None:
        now_s = self._loop.time()
        if self._stalled_s is None:
            self._stalled_s = now_s
        if not self._waits_to_write:
            self._waits_to_write = True
            self._loop.add_writer(self.stream.fileno(), self._writable)
            # One at a time, however often the stream is full within it. It is not begun anew: a
            # port that says it takes bytes, and takes none, would put it off for ever.
            if self._stall_timer is None:
                self._stall_timer = self._loop.call_later(STALL_RETRY_S, self._retry_write)

    def _stop_waiting_to_write(self) -> None:
        if self._waits_to_write:
            self._waits_to_write = False
            self._loop.remove_writer(self.stream.fileno())

    def _writable(self) -> None:
        self._stop_waiting_to_write()
        self.flush()

    def _retry_write(self) -> None:
        self._stall_timer = None
        if self._down or not self._waits_to_write or self._stalled_s is None:
            return
        if self._loop.time() - self._stalled_s >= STALL_S and not self.stream.ends_at_hangup:
            self._fail(f"takes no bytes for {STALL_S:g} s")
            return
        self._writable()

    # ---------------------------------------------------------------- time

    def _timed_out(self) -> None:
        if self._down:
            return
        at_s, now_s = self.session.next_timeout(), self._loop.time()
        if at_s is not None and at_s <= now_s:
            for event in self.session.handle_timeout(now_s):
                self._on_event(event)
                if self._is_over():
                    return
        self.flush()

    def _fail(self, reason: str) -> None:
        assert not self._down, "its owner was told already, or has closed it"
        self.close()
        self._on_down(f"{self.stream.path}: {reason}")
