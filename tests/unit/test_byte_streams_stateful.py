"""Two ends with byte streams over a path that lies, in every order hypothesis can think of.

What a program reads is at every step the beginning of what one program wrote, and its end is that
program's end. No well-behaved peer is accused; limits are kept. In the end the path is healed: then
every stream has arrived whole, or was reset with a reason that is true.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Final

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from vchan.streams import Accepted, Ended, Fault, Readable, StreamEnds, StreamWanted, Writable
from vchan.streams.ends import (
    DOUBTS_MAX,
    ENDED_MAX,
    IN_FLIGHT_BYTES_MAX,
    REPLIES_MAX,
    STREAMS_MAX,
    UNDER_WAY_BYTES_MAX,
)
from vchan.streams.halves import SEND_BYTES_MAX, WINDOW_BYTES
from vchan.streams.messages import CLOSED, FORGOTTEN, UNSUPPORTED

REACH: Counter[str] = Counter()
EXAMPLES_MIN: Final = 200
"""Fewer do not get everywhere."""
sides = st.sampled_from(["host", "guest"])
fractions = st.integers(0, 100)
sizes = st.one_of(st.integers(0, 50), st.integers(0, 40_000), st.just(SEND_BYTES_MAX))
HOLDS_S: Final = 4000.0
"""Longer than any wait of an end that lives."""


class Program:
    """What uses a stream at one end."""

    def __init__(self, label: str) -> None:
        self.chance = random.Random(label)
        self.written = bytearray()
        self.finished = False
        self.was_read = bytearray()
        self.saw_end = False
        self.is_accepted = False  # an opener's
        self.ended: int | None = None


class Side:
    """An end, its programs, and what is on its way to it."""

    def __init__(self, name: str, run: int) -> None:
        self.name = name
        self.run = run
        self.ends = StreamEnds(random.Random(f"{name} {run}").randbytes, asks_max=None)
        self.programs: dict[bytes, Program] = {}
        self.inbox: deque[bytes] = deque()

    def program(self, stream: bytes) -> Program:
        if stream not in self.programs:
            self.programs[stream] = Program(f"{self.name} {self.run} {stream!r}")
        return self.programs[stream]


class Streams(RuleBasedStateMachine):
    """The rules."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.runs = 0
        self.reached: Counter[str] = Counter()
        self.everybody: dict[bytes, list[Program]] = {}
        self.old: list[tuple[str, bytes]] = []  # messages that were delivered
        self.host = self.make("host")
        self.guest = self.make("guest")
        self.ids: list[bytes] = []
        self.may_be_forgotten = False

    def make(self, name: str) -> Side:
        self.runs += 1
        return Side(name, self.runs)

    def side(self, name: str) -> Side:
        return self.host if name == "host" else self.guest

    def peer(self, side: Side) -> Side:
        return self.guest if side.name == "host" else self.host

    def program(self, side: Side, stream: bytes) -> Program:
        program = side.program(stream)
        known = self.everybody.setdefault(stream, [])
        if program not in known:
            known.append(program)
        return program

    # ------------------------------------------------------------ the path

    def carry(self, side: Side) -> None:
        most = IN_FLIGHT_BYTES_MAX + 2 * STREAMS_MAX  # an END counts as one
        # What stood still and was heard again counts again.
        most = max(most, side.ends.in_flight)
        while (message := side.ends.next_message(self.now_s)) is not None:
            assert side.ends.in_flight <= most
            halves = [stream.outgoing for stream in side.ends._streams.values()]
            assert all(half.in_flight <= IN_FLIGHT_BYTES_MAX + 1 for half in halves)
            under_way = sum(half.in_flight for half in halves)
            assert under_way <= UNDER_WAY_BYTES_MAX + 2 * STREAMS_MAX
            self.peer(side).inbox.append(message)

    def hand_over(self, side: Side, count: int) -> None:
        for _ in range(min(count, len(side.inbox))):
            message = side.inbox.popleft()
            self.old.append((side.name, message))
            side.ends.receive(message, self.now_s)
            self.take(side)

    def take(self, side: Side) -> None:
        for told in side.ends.take_events():
            self.reached[type(told).__name__.lower()] += 1
            match told:
                case StreamWanted(stream, target, facts):
                    assert (target, facts) == ("tcp:80", "{}")
                    self.program(side, stream)
                    side.ends.accept(stream)
                case Ended(stream, reason, text):
                    program = self.program(side, stream)
                    assert program.ended is None
                    program.ended = reason
                    if reason == 0:
                        self.reached["finished"] += 1
                        assert program.finished and program.saw_end
                    elif reason == UNSUPPORTED:  # the offer took too long
                        assert not program.is_accepted
                    elif reason != CLOSED:
                        assert reason == FORGOTTEN and self.may_be_forgotten, text
                        self.reached["forgotten"] += 1
                case Fault(reason):
                    raise AssertionError(f"a well-behaved peer was accused: {reason}")
                case Accepted(stream):
                    self.program(side, stream).is_accepted = True
                case Readable() | Writable():
                    pass

    def until_quiet(self) -> None:
        for _ in range(2000):
            self.carry(self.host)
            self.carry(self.guest)
            if not self.host.inbox and not self.guest.inbox:
                return
            self.hand_over(self.guest, len(self.guest.inbox))
            self.hand_over(self.host, len(self.host.inbox))
        raise AssertionError("the two never stop talking")

    def run_timers(self, seconds: float, *, deliver: bool = True) -> None:
        until_s = self.now_s + seconds
        if deliver:
            self.until_quiet()
        for _ in range(10_000):
            times = [side.ends.next_timeout() for side in (self.host, self.guest)]
            due_s = min((at for at in times if at is not None), default=until_s)
            if due_s >= until_s:
                break
            self.now_s = max(self.now_s, due_s)
            for side in (self.host, self.guest):
                side.ends.handle_timeout(self.now_s)
                self.take(side)
                self.carry(side)
            if deliver:
                self.until_quiet()
        else:
            raise AssertionError("timers that never stop")
        self.now_s = until_s

    def connect(self) -> None:
        self.host.ends.connected(self.now_s)
        self.guest.ends.connected(self.now_s)

    # ------------------------------------------------------------ rules

    @initialize()
    def start(self) -> None:
        self.connect()
        self.until_quiet()
        self.open("host")
        self.open("guest")

    @rule(name=sides)
    def open(self, name: str) -> None:
        side = self.side(name)
        if len(self.ids) < STREAMS_MAX // 2:
            stream = side.ends.open("tcp:80", "{}", self.now_s)
            self.program(side, stream)
            self.ids.append(stream)

    @rule(name=sides, at=fractions, size=sizes)
    def write(self, name: str, at: int, size: int) -> None:
        side = self.side(name)
        for stream in self.some(side, at):
            program = self.program(side, stream)
            if program.ended is None and not program.finished:
                data = program.chance.randbytes(size)
                taken = side.ends.write(stream, data)
                program.written += data[:taken]

    def some(self, side: Side, at: int) -> list[bytes]:
        known = list(side.programs)
        return known[at % len(known) :][:1] if known else []

    @rule(name=sides, at=fractions, size=sizes)
    def read(self, name: str, at: int, size: int) -> None:
        side = self.side(name)
        for stream in self.some(side, at):
            self.read_from(side, stream, size)

    def read_from(self, side: Side, stream: bytes, size: int) -> None:
        program = self.program(side, stream)
        data, is_end = side.ends.read(stream, size)
        program.was_read += data
        program.saw_end |= is_end
        self.reached["bytes read"] += len(data)
        self.take(side)

    @rule(name=sides, hundredths=fractions)
    def rest(self, name: str, hundredths: int) -> None:
        """A request comes, and streams have kept this end busy."""
        side = self.side(name)
        side.ends.give_way(self.now_s)
        side.ends.worked(hundredths / 100, self.now_s)
        self.reached["rests"] += 1

    @rule(name=sides, at=fractions)
    def finish(self, name: str, at: int) -> None:
        side = self.side(name)
        for stream in self.some(side, at):
            program = self.program(side, stream)
            if program.ended is None:
                program.finished = True
                side.ends.finish(stream)

    @rule(name=sides, at=fractions)
    def reset(self, name: str, at: int) -> None:
        side = self.side(name)
        if at % 4 == 0:
            for stream in self.some(side, at):
                side.ends.reset(stream, CLOSED, "enough")
                self.take(side)

    @rule(size=sizes, keep=fractions)
    def talk(self, size: int, keep: int) -> None:
        """All write and read, and some of it arrives."""
        for side in (self.host, self.guest):
            for at in range(len(side.programs)):
                self.write(side.name, at, size)
                self.read(side.name, at, size)
            self.carry(side)
            self.hand_over(self.peer(side), len(self.peer(side).inbox) * keep // 100)

    @rule()
    def deliver_all(self) -> None:
        self.until_quiet()

    @rule(name=sides, count=st.integers(1, 3))
    def deliver_some(self, name: str, count: int) -> None:
        self.carry(self.peer(self.side(name)))
        self.hand_over(self.side(name), count)

    @rule(keep_up=fractions, keep_down=fractions)
    def tear(self, keep_up: int, keep_down: int) -> None:
        """A new session: what was under way is lost from some message on."""
        for side, keep in ((self.host, keep_up), (self.guest, keep_down)):
            self.carry(self.peer(side))
            for _ in range(len(side.inbox) * (100 - keep) // 100):
                side.inbox.pop()
                self.reached["torn"] += 1
        self.connect()

    @rule(name=sides, first=fractions)
    def lose(self, name: str, first: int) -> None:
        """One message is lost; nobody is told."""
        side = self.side(name)
        self.carry(self.peer(side))
        if side.inbox:
            del side.inbox[first % len(side.inbox)]
            self.reached["lost"] += 1

    @rule(at=fractions)
    def migrate(self, at: int) -> None:
        """Another host carries: it tears, and an earlier message comes a second time."""
        self.tear(0, 0)
        if self.old:
            name, message = self.old[-1 - at % len(self.old)]
            self.side(name).inbox.append(message)
            self.reached["repeated"] += 1

    @rule(name=sides, keep=fractions)
    def restart(self, name: str, keep: int) -> None:
        """An end's daemon is killed: its memory is gone. Messages for it may still be under way."""
        self.may_be_forgotten = True
        old = self.side(name)
        new = self.make(name)
        new.inbox = deque(list(old.inbox)[: len(old.inbox) * keep // 100])
        if name == "host":
            self.host = new
        else:
            self.guest = new
        self.connect()
        self.reached["restarted"] += 1

    @rule(seconds=st.sampled_from([0.1, 1.1, 6.0, 70.0]), deliver=st.booleans())
    def wait(self, seconds: float, deliver: bool) -> None:
        self.run_timers(seconds, deliver=deliver)

    # ------------------------------------------------------------ what always holds

    @invariant()
    def what_is_read_was_written(self) -> None:
        for stream, programs in self.everybody.items():
            for reader in programs:
                writers = [each for each in programs if each is not reader]
                if reader.was_read:
                    assert any(each.written.startswith(reader.was_read) for each in writers), stream
                if reader.saw_end:
                    assert any(
                        each.finished and each.written == reader.was_read for each in writers
                    )

    @invariant()
    def limits_are_kept(self) -> None:
        for side in (self.host, self.guest):
            check_limits(side.ends)

    # ------------------------------------------------------------ and in the end

    def teardown(self) -> None:
        self.connect()
        for _ in range(12):
            self.until_quiet()
            for side in (self.host, self.guest):
                for stream, program in list(side.programs.items()):
                    if program.ended is None:
                        program.finished = True
                        side.ends.finish(stream)
                    self.read_from(side, stream, 10**6)
            self.run_timers(HOLDS_S / 12)
        for side in (self.host, self.guest):
            for program in side.programs.values():
                assert program.ended is not None, "neither whole nor reset"
            assert not side.ends._streams and not side.ends._replies
            self.reached["rewinds"] += side.ends.counters.rewinds
        for name, times in self.reached.items():
            event(name)
            REACH[name] += times


def check_limits(ends: StreamEnds) -> None:
    """Nothing is above its limit."""
    assert len(ends._streams) <= 2 * STREAMS_MAX
    assert len(ends._doubts) <= DOUBTS_MAX
    assert len(ends._ended) <= ENDED_MAX and len(ends._replies) <= REPLIES_MAX
    for stream in ends._streams.values():
        assert len(stream.outgoing._kept) <= SEND_BYTES_MAX
        assert stream.incoming.held <= WINDOW_BYTES
        assert stream.outgoing.acknowledged <= stream.outgoing.sent <= stream.outgoing.sent_max


@pytest.mark.long
def test_streams_keep_what_they_promise() -> None:
    REACH.clear()
    examples = max(EXAMPLES_MIN, settings().max_examples)
    run_state_machine_as_test(Streams, settings=settings(deadline=None, max_examples=examples))
    for what in (
        *("finished", "forgotten", "writable", "rewinds"),
        *("torn", "lost", "repeated", "restarted", "bytes read"),
    ):
        assert REACH[what], f"no example got to: {what}"
