"""The simulated world: one clock, one queue of events, one source of chance; and processes in it.

Rules of this package
1. A run is a function of its seed: no real clock, no set or hash order, no other randomness.
2. Everything that happens is an event; between any two events a fault may strike.
3. Who breaks a promise is reported by `World.fail`, never by an exception that code under test
   could swallow.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from vchan.io.loop import Timer

TRACE_MAX = 60
STEPS_MAX = 200_000
"""A run of so many events spins: something answers itself."""


class World:
    """The clock and the queue.

    Args:
        seed: What makes this run this run.
        trace: Print every note as it is made.
    """

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        self.step = 0
        self.failure: str | None = None
        self.stats: Counter[str] = Counter()
        self.after_step: Callable[[], None] = lambda: None
        self.listeners: dict[str, Any] = {}
        self.endpoints: dict[int, Any] = {}
        self.starting: SimLoop | None = None
        """The loop that the code under test gets when it makes one."""
        self._next_fd = 100
        self._order = 0
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._trace = trace
        self._notes: deque[tuple[float, int, str, tuple[Any, ...]]] = deque(maxlen=TRACE_MAX)

    def at(self, when_s: float, call: Callable[..., object], *args: Any) -> None:
        """Call it then."""
        self._order += 1
        heappush(self._heap, (when_s, self._order, call, args))

    def after(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        """Call it after a while."""
        self.at(self.now_s + delay_s, call, *args)

    def latency_s(self) -> float:
        """How long something small takes: mostly a moment, sometimes a third of a second."""
        chance = self.rng.random()
        return chance * 0.001 if chance < 0.98 else (chance - 0.98) * 15.0

    def run(self, until_s: float, done: Callable[[], bool] | None = None) -> bool:
        """Run until then, or until `done`. True: done (or the time has come); False: failed."""
        heap = self._heap
        while self.failure is None:
            if done is not None and done():
                return True
            if not heap or heap[0][0] > until_s:
                self.now_s = max(self.now_s, until_s)
                return True
            when_s, _, call, args = heappop(heap)
            self.now_s = max(self.now_s, when_s)
            self.step += 1
            call(*args)
            self.after_step()
            if self.step > STEPS_MAX:
                self.fail(f"{STEPS_MAX} events, and no end: something answers itself")
        return False

    def note(self, text: str, *args: Any) -> None:
        """Remember what happened, for the trace."""
        note = (self.now_s, self.step, text, args)
        self._notes.append(note)
        if self._trace:
            print(_line(note))

    def fail(self, text: str) -> None:
        """A promise is broken. The first one counts."""
        if self.failure is None:
            self.failure = text
            self.note("BROKEN: %s", text)

    def trace_lines(self) -> list[str]:
        """The last things that happened."""
        return [_line(note) for note in self._notes]

    def register(self, endpoint: Any) -> int:
        """A file descriptor for it."""
        self._next_fd += 1
        self.endpoints[self._next_fd] = endpoint
        return self._next_fd


def _line(note: tuple[float, int, str, tuple[Any, ...]]) -> str:
    now_s, step, text, args = note
    return f"{now_s - 1000:10.4f} #{step:<6} {text % args if args else text}"


class Machine:
    """Where processes run. Frozen, none of them moves; in a VM its clock then stands still."""

    def __init__(self, world: World, *, clock_stops: bool) -> None:
        self.world = world
        self.frozen = False
        self.behind_s = 0.0
        self._clock_stops = clock_stops
        self._frozen_s = 0.0
        self._deferred: deque[tuple[Process, Callable[..., object], tuple[Any, ...]]] = deque()
        self._starts: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def time(self) -> float:
        """The processes' monotonic clock."""
        now_s = self._frozen_s if self.frozen and self._clock_stops else self.world.now_s
        return now_s - self.behind_s

    def freeze(self) -> None:
        """Stop everything here."""
        assert not self.frozen
        self.frozen = True
        self._frozen_s = self.world.now_s

    def thaw(self) -> None:
        """Go on."""
        assert self.frozen
        self.frozen = False
        if self._clock_stops:
            self.behind_s += self.world.now_s - self._frozen_s
        self.world.after(0.0, self._catch_up)
        starts, self._starts = self._starts, []
        for call, args in starts:
            self.world.after(self.world.rng.random() * 0.3, call, *args)

    def defer(self, process: Process, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        """Do it when the machine runs again."""
        self._deferred.append((process, call, args))

    def when_thawed(self, call: Callable[..., object], *args: Any) -> None:
        """Do it when the machine runs again, whatever process runs then."""
        self._starts.append((call, args))

    def forget(self) -> None:
        """The machine's memory is gone."""
        self._deferred.clear()
        self._starts.clear()

    def _catch_up(self) -> None:
        while self._deferred and not self.frozen:
            process, call, args = self._deferred.popleft()
            process.enter(call, *args)


class Process:
    """What can be killed: a loop, open files, and nothing that outlives them."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.world = machine.world
        self.name = name
        self.alive = True
        self.loop = SimLoop(self)
        self.files: dict[int, Any] = {}  # by descriptor, in the order they were opened

    def enter(self, call: Callable[..., object], *args: Any) -> None:
        """Run one turn of the process's loop."""
        if not self.alive:
            return
        if self.machine.frozen:
            self.machine.defer(self, call, args)
            return
        world = self.world
        outer, world.starting = world.starting, self.loop
        call(*args)
        soon = self.loop.soon
        while soon and self.alive:
            soon.popleft()()
        world.starting = outer

    def kill(self) -> None:
        """End it at once; the kernel closes what it had open."""
        self.alive = False
        for file in list(self.files.values()):
            file.close()
        self.files.clear()


LOOK_S = 0.00006
"""Spent from one look to the next."""


class SimLoop:
    """`vchan.io.loop.Loop` as far as the code under test uses it."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.soon: deque[Callable[[], object]] = deque()
        self._spent_s = 0.0
        self._world = process.world

    def time(self) -> float:
        """See Loop."""
        return self.process.machine.time()

    def spent(self) -> float:
        """See Loop. Something is spent from one look to the next, so that turns end early."""
        self._spent_s += LOOK_S
        return self._spent_s

    def call_soon(self, callback: Callable[[], object]) -> None:
        """See Loop."""
        self.soon.append(callback)

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
        """See Loop."""
        self._world.after(0.0, self.process.enter, callback)

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """See Loop."""
        return self.call_at(self.time() + delay_s, callback)

    def call_at(self, at_s: float, callback: Callable[[], object]) -> Timer:
        """See Loop."""
        timer = Timer(at_s, callback, self)
        self._plan(timer)
        return timer

    def timer_cancelled(self) -> None:
        """See Loop: it stays in the world's plan until its time comes."""

    def _plan(self, timer: Timer) -> None:
        # A nanosecond later, so that rounding never makes it early.
        when_s = max(timer.at_s + self.process.machine.behind_s + 1e-9, self._world.now_s)
        self._world.at(when_s, self._due, timer)

    def _due(self, timer: Timer) -> None:
        if timer._callback is not None:
            self.process.enter(self._fire, timer)

    def _fire(self, timer: Timer) -> None:
        if self.time() < timer.at_s:  # the clock stood still in between
            self._plan(timer)
        else:
            timer._run()

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """See Loop."""
        self._world.endpoints[fd].watch_read(self.process, callback)

    def remove_reader(self, fd: int) -> None:
        """See Loop."""
        endpoint = self._world.endpoints.get(fd)
        if endpoint is not None:
            endpoint.on_readable = None

    def add_writer(self, fd: int, callback: Callable[[], object]) -> None:
        """See Loop."""
        self._world.endpoints[fd].watch_write(self.process, callback)

    def remove_writer(self, fd: int) -> None:
        """See Loop."""
        endpoint = self._world.endpoints.get(fd)
        if endpoint is not None:
            endpoint.on_writable = None


class Fifo:
    """Hands things over, late but in order: a connection, or a queue between two threads."""

    def __init__(self, world: World, deliver: Callable[[Any], object]) -> None:
        self._world = world
        self._deliver = deliver
        self._last_s = 0.0
        self.cut_s: float | None = None
        """What arrives after this is lost."""

    def push(self, item: Any) -> None:
        """Hand it over."""
        world = self._world
        self._last_s = max(self._last_s, world.now_s + world.latency_s())
        world.at(self._last_s, self._arrive, item)

    def _arrive(self, item: Any) -> None:
        if self.cut_s is None or self._world.now_s <= self.cut_s:
            self._deliver(item)
