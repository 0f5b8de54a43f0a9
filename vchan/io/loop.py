"""A small event loop: readiness, timers, calls from other threads. Nothing else.

Why not asyncio: in a small guest it costs 0.6 s of start-up and 10 MiB before the first byte is
read, and vchan needs a tenth of it (`docs/decisions/0002-own-loop.md`). The method names are
asyncio's, so whoever knows one knows the other.

Every method but `call_soon_threadsafe` and `stop` belongs to the thread that runs the loop.
An exception that a callback lets out ends `run`: a daemon that goes on after a bug lies.
"""

from __future__ import annotations

import os
from _thread import RLock  # threading's own, without what it costs to import
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count
from posix import read, write  # os's own wait, where eventlet has replaced them
from select import EPOLLIN, EPOLLOUT, epoll
from time import monotonic, thread_time
from typing import Any, Protocol

Callback = Callable[[], object]

Poll = Callable[[epoll, float | None], list[tuple[int, int]]]
"""Gives (descriptor, events) of those that are ready, at the latest after so many seconds."""

EVENTS_MAX = 64
"""Descriptors served in one turn; the others have theirs in the next."""
_CANCELLED_MAX = 64
"""Cancelled timers that are kept however few others there are: to look for them at each would cost
more than they do."""


class _Owner(Protocol):
    """What keeps timers."""

    def timer_cancelled(self) -> None:
        """One of its timers will not come."""


class Timer:
    """A call that is to come. `cancel` it to have it not come."""

    __slots__ = ("_callback", "_owner", "at_s")

    def __init__(self, at_s: float, callback: Callback, owner: _Owner) -> None:
        self.at_s = at_s
        self._callback: Callback | None = callback
        self._owner = owner

    def cancel(self) -> None:
        """Harmless when it has come already."""
        if self._callback is not None:
            self._callback = None
            self._owner.timer_cancelled()

    def _run(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Scheduler(Protocol):
    """What of a loop its users take: `Loop`'s, or a part of one (`vchan.host.vm.vm.LoopPart`)."""

    def time(self) -> float:
        """Seconds."""

    def spent(self) -> float:
        """Seconds that the processor worked for this thread."""

    def call_soon(self, callback: Callback) -> None:
        """Call it before waiting again."""

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """Call it after `delay_s` seconds."""

    def call_at(self, at_s: float, callback: Callback) -> Timer:
        """Call it when `time()` has reached `at_s`."""

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call it whenever `fd` is readable or hung up."""

    def remove_reader(self, fd: int) -> None:
        """Harmless when there is none."""

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call it whenever `fd` takes bytes."""

    def remove_writer(self, fd: int) -> None:
        """Harmless when there is none."""


class Alarm:
    """Calls `ring` once, at the time that it is set to; then it can be set again.

    To put it off costs nothing: its timer comes, and goes on to the later time.
    """

    __slots__ = ("_at_s", "_loop", "_ring", "_timer")

    def __init__(self, loop: Scheduler, ring: Callback) -> None:
        self._loop = loop
        self._ring = ring
        self._timer: Timer | None = None
        self._at_s: float | None = None  # when to ring: not before the timer comes

    def set(self, at_s: float | None) -> None:
        """Ring at `at_s` on the loop's clock, or when it was to ring, if that is earlier. None asks
        for nothing."""
        if at_s is not None and (self._at_s is None or at_s < self._at_s):
            self.move(at_s)

    def move(self, at_s: float | None) -> None:
        """Ring at `at_s`, whatever it was set to; None: do not."""
        self._at_s = at_s
        if at_s is None or (self._timer is not None and self._timer.at_s <= at_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at_s, self._rings)

    def cancel(self) -> None:
        """Do not ring. Harmless when it is not set."""
        self._at_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rings(self) -> None:
        at_s, self._timer = self._at_s, None
        if at_s is None:
            return
        if at_s > self._loop.time():
            self._timer = self._loop.call_at(at_s, self._rings)
        else:
            self._at_s = None
            self._ring()


class _Watch:
    """Who is to be called for a descriptor."""

    __slots__ = ("reader", "writer")

    def __init__(self) -> None:
        self.reader: Callback | None = None
        self.writer: Callback | None = None

    def events(self) -> int:
        """What epoll is to look for."""
        return (EPOLLIN if self.reader else 0) | (EPOLLOUT if self.writer else 0)


def _wait(descriptors: epoll, for_s: float | None) -> list[tuple[int, int]]:
    return descriptors.poll(for_s, EVENTS_MAX)


class Loop:
    """See the top of this file.

    Args:
        wait: How this thread waits, if not in the kernel.
    """

    def __init__(self, wait: Poll | None = None) -> None:
        self.time: Callable[[], float] = monotonic
        """Seconds; they stand still while the machine sleeps."""
        self.spent: Callable[[], float] = thread_time
        """Seconds that the processor worked for this thread: what else the machine does not
        count."""
        self._wait = wait or _wait
        self._epoll = epoll()
        self._watches: dict[int, _Watch] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._cancelled = 0  # of `_timers`
        self._order = count()
        self._soon: deque[Callback] = deque()
        self._from_threads: deque[Callback] = deque()
        self._stopping = False
        # Held around each use of the pipe: a number that was closed is somebody else's a moment
        # later. A signal handler may find it held by its own thread, and may take it all the same.
        self._wake_lock = RLock()
        self._is_woken = (
            False  # there is a byte in the pipe, or `_from_threads` is about to be read
        )
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.add_reader(self._wake_read, self._drain_wakeups)

    # ---------------------------------------------------------------- calls

    def call_soon(self, callback: Callback) -> None:
        """Call it before waiting again."""
        self._soon.append(callback)

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """Call it after `delay_s` seconds."""
        return self.call_at(monotonic() + delay_s, callback)

    def call_at(self, at_s: float, callback: Callback) -> Timer:
        """Call it when `time()` has reached `at_s`."""
        timer = Timer(at_s, callback, self)
        heappush(self._timers, (at_s, next(self._order), timer))
        return timer

    def timer_cancelled(self) -> None:
        """For `Timer` alone. Cancelled ones are freed when they are most of all: in the heap they
        would stay until they came to its head, which any that is alive and due earlier holds."""
        self._cancelled += 1
        timers = self._timers
        if self._cancelled > _CANCELLED_MAX and 2 * self._cancelled > len(timers):
            timers[:] = [entry for entry in timers if entry[2]._callback is not None]
            heapify(timers)
            self._cancelled = 0

    def _pop_timer(self) -> Timer:
        timer = heappop(self._timers)[2]
        self._cancelled -= timer._callback is None
        assert self._cancelled >= 0
        return timer

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Call it soon, from any thread or signal handler. Once the loop is closed nobody is there
        to call it, and it is dropped."""
        with self._wake_lock:
            if self._wake_write < 0:
                return
            self._from_threads.append(callback)
            if not self._is_woken:  # one byte for all that come meanwhile
                self._is_woken = True
                write(self._wake_write, b"\0")

    # ---------------------------------------------------------------- readiness

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call it whenever `fd` is readable or hung up."""
        self._watch(fd).reader = callback
        self._changed(fd)

    def remove_reader(self, fd: int) -> None:
        """Harmless when there is none."""
        watch = self._watches.get(fd)
        if watch is not None and watch.reader is not None:
            watch.reader = None
            self._changed(fd)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call it whenever `fd` takes bytes."""
        self._watch(fd).writer = callback
        self._changed(fd)

    def remove_writer(self, fd: int) -> None:
        """Harmless when there is none."""
        watch = self._watches.get(fd)
        if watch is not None and watch.writer is not None:
            watch.writer = None
            self._changed(fd)

    def _watch(self, fd: int) -> _Watch:
        watch = self._watches.get(fd)
        if watch is None:
            self._epoll.register(fd, 0)
            watch = self._watches[fd] = _Watch()
        return watch

    def _changed(self, fd: int) -> None:
        events = self._watches[fd].events()
        if events:
            self._epoll.modify(fd, events)
        else:
            del self._watches[fd]
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # closed already: epoll has forgotten it

    # ---------------------------------------------------------------- running

    def run(self) -> None:
        """Run until `stop`, which may have been called already."""
        while not self._stopping:
            self.run_once()
        self._stopping = False

    def run_once(self, wait_s: float | None = None) -> None:
        """One turn: wait for something, or `wait_s` seconds at most, and do it.

        A callback of `call_soon` may run turns itself, to wait for something.
        """
        watches = self._watches
        # All looked up first: who is called may close another's descriptor, and open one that gets
        # the same number. The events are not the newcomer's.
        ready = [
            (watches[fd], events)
            for fd, events in self._wait(self._epoll, self._patience(wait_s))
            if fd in watches
        ]
        for watch, events in ready:
            # A hang-up or an error is for both; None: removed by who was called before it.
            if events & ~EPOLLOUT and watch.reader is not None:
                watch.reader()
            if events & ~EPOLLIN and watch.writer is not None:
                watch.writer()
        timers = self._timers
        if timers:
            now_s = monotonic()
            while timers and timers[0][0] <= now_s:
                self._pop_timer()._run()
        soon = self._soon
        for _ in range(len(soon)):
            if not soon:  # one of them has run a turn itself
                return
            soon.popleft()()

    def _patience(self, wait_s: float | None) -> float | None:
        if self._soon or self._from_threads or self._stopping:
            return 0
        timers = self._timers
        while timers and timers[0][2]._callback is None:
            self._pop_timer()
        if not timers:
            return wait_s
        left_s = timers[0][0] - monotonic()
        if left_s <= 0:
            return 0
        return left_s if wait_s is None or left_s < wait_s else wait_s

    def _drain_wakeups(self) -> None:
        try:
            read(self._wake_read, 4096)
        except BlockingIOError:
            pass
        self._is_woken = False  # before what is there is taken: what comes from here on wakes anew
        while self._from_threads:
            self._soon.append(self._from_threads.popleft())

    def stop(self) -> None:
        """End `run` after this turn. From any thread."""
        self._stopping = True
        self.call_soon_threadsafe(_nothing)

    def close(self) -> None:
        """Free the loop's own descriptors. It must not be running. Harmless twice."""
        self._stopping = True
        self._watches.clear()  # what is closed after it stops to watch, which is harmless then
        self._epoll.close()
        with self._wake_lock:
            if self._wake_write >= 0:
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._wake_read = self._wake_write = -1

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _nothing() -> None:
    pass
