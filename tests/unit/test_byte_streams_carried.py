"""Byte streams on real sessions: a program, two hosts' daemons that pass messages on, a guest.

The program is attached at one host after the other while the VM moves between them; channels are
torn in the middle of a frame, daemons are killed, the guest's is not. Both ends live, so every byte
must arrive, in order and once. A seed is a run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from tests.unit.pair import End, Entropy, Pair
from vchan.session import Config, Event, Opened, Received, Role, Session
from vchan.streams import Ended, Fault, StreamEnds, StreamWanted
from vchan.streams.messages import is_of_family, session_stream
from vchan.streams.switchboard import Switchboard
from vchan.wire.frames import PAYLOAD_BYTES_MAX

QUEUED_BYTES_MAX = 32 * 1024
"""What a carrier lets wait in a session, beside requests."""
BYTES = 700_000
SEEDS = 12
REACH: Counter[str] = Counter()


class World:
    """One program at a host, one guest; between them the daemon of the host where the VM is."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 1000.0
        self.made = 0
        self.program = StreamEnds(random.Random(seed + 1).randbytes, asks_max=None)
        self.guest = StreamEnds(random.Random(seed + 2).randbytes)
        self.guest_session = self.session(Role.GUEST)
        self.arrive()

    def session(self, role: Role) -> Session:
        self.made += 1
        return Session(Config(role, b"instance-%07d" % self.made, "x"), Entropy(f"{self.made}"))

    def arrive(self) -> None:
        """The VM is at another host, or its daemon has been restarted: the guest's end of the
        channel lives on, all else is new. What was under way is lost."""
        self.channel = Pair(self.session(Role.HOST), self.guest_session, now_s=self.now_s)
        self.local = Pair(self.session(Role.HOST), self.session(Role.GUEST), now_s=self.now_s)
        self.channel.host.session.open(self.now_s)
        if self.guest_session.state.value == "closed":
            self.guest_session.open(self.now_s)
        self.attached = False
        self.local.open()
        self.switchboard = Switchboard(lambda number, opened: opened._replace(facts='{"uid":0}'))

    def tear(self) -> None:
        """The channel loses what is under way from some byte on; the session goes on."""
        for end in (self.channel.host, self.channel.guest):
            self.channel.write(end)
        for end in (self.channel.host, self.channel.guest):
            REACH["bytes torn"] += len(end.inbox)
            del end.inbox[self.chance.randrange(len(end.inbox) + 1) :]
        self.channel.host.session.close()
        self.channel.host.session.open(self.now_s)

    def step(self) -> None:
        """Everybody writes what he has, and some of what is under way arrives."""
        self.fill(self.program.next_message, self.local.guest)
        self.fill(self.guest.next_message, self.channel.guest)
        self.fill(lambda _: self.switchboard.next_for_guest(), self.channel.host)
        if self.attached:
            self.fill(lambda _: self.switchboard.next_for_program(0), self.local.host)
        for pair in (self.local, self.channel):
            for end in (pair.host, pair.guest):
                pair.write(end)
        for pair in (self.local, self.channel):
            for end in (pair.host, pair.guest):
                size = self.chance.randrange(len(end.inbox) + 1)
                data = bytes(end.inbox[:size])
                del end.inbox[:size]
                self.take(end, end.session.receive_data(data, self.now_s))

    def fill(self, next_message: Callable[[float], bytes | None], end: End) -> None:
        while end.session.backlog_bytes < QUEUED_BYTES_MAX:
            message = next_message(self.now_s)
            if message is None:
                return
            assert len(message) <= PAYLOAD_BYTES_MAX
            end.session.send(message, session_stream(message))

    def take(self, end: End, events: list[Event]) -> None:
        for event in events:
            match event:
                case Opened(_, False):
                    self.opened(end)
                case Received(_, message) if is_of_family(message):
                    self.received(end, message)
                case _:
                    pass

    def opened(self, end: End) -> None:
        REACH["sessions"] += 1
        if end is self.local.guest:
            self.program.connected(self.now_s)
        elif end is self.channel.guest:
            self.guest.connected(self.now_s)
        elif end is self.channel.host:
            self.switchboard.guest_connected()
        else:
            self.switchboard.attach(0)
            self.attached = True

    def received(self, end: End, message: bytes) -> None:
        if end is self.local.guest:
            self.program.receive(message, self.now_s)
        elif end is self.channel.guest:
            self.guest.receive(message, self.now_s)
        elif end is self.local.host:
            self.switchboard.from_program(0, message)
        else:
            assert self.switchboard.from_guest(message) is None

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for ends in (self.program, self.guest):
            ends.handle_timeout(self.now_s)
        for pair in (self.local, self.channel):
            for end in (pair.host, pair.guest):
                self.take(end, end.session.handle_timeout(self.now_s))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_byte_arrives_through_migrations_and_tears(seed: int) -> None:
    run(seed)


def run(seed: int) -> None:
    world = World(seed)
    data = {"down": world.chance.randbytes(BYTES), "up": world.chance.randbytes(BYTES)}
    written = {"down": 0, "up": 0}
    arrived = {"down": bytearray(), "up": bytearray()}
    ended: list[Ended] = []
    at_end: set[str] = set()
    stream = world.program.open("tcp:80", "{}", world.now_s)
    for _ in range(20_000):
        for ends, out, into in ((world.program, "down", "up"), (world.guest, "up", "down")):
            size = world.chance.choice((world.chance.randrange(20_000), 50_000))
            rest = data[out][written[out] : written[out] + size]
            written[out] += ends.write(stream, rest)
            if written[out] == BYTES:
                ends.finish(stream)
            got, is_end = ends.read(stream, world.chance.randrange(60_000))
            arrived[into] += got
            at_end |= {into} if is_end else set()
            for told in ends.take_events():
                assert not isinstance(told, Fault)
                if isinstance(told, StreamWanted):
                    assert told.facts == '{"uid":0}', "the host's word"
                    ends.accept(stream)
                elif isinstance(told, Ended):
                    ended.append(told)
        if len(ended) == 2:
            break
        world.step()
        happens = world.chance.random()
        if happens < 0.01:
            world.arrive()
            REACH["moved"] += 1
        elif happens < 0.02:
            world.tear()
            REACH["torn"] += 1
        world.wait(world.chance.choice((0.0, 0.01, 0.1)))
    assert [(told.reason, told.text) for told in ended] == [(0, "")] * 2
    assert arrived == data
    assert at_end == {"down", "up"}
    REACH["rewinds"] += world.program.counters.rewinds + world.guest.counters.rewinds


def test_the_runs_got_somewhere() -> None:
    """What is never reached proves nothing."""
    REACH.clear()  # another process may have had some of them
    for seed in range(SEEDS):
        run(seed)
    for what in ("sessions", "moved", "torn", "bytes torn", "rewinds"):
        assert REACH[what], what


def test_a_request_waits_for_little_beside_a_saturated_stream() -> None:
    """In bytes, which no machine's load changes: what goes out between handing a request to the
    session and its frame."""
    world = World(1)
    stream = world.program.open("tcp:80", "{}", world.now_s)
    worst = 0
    for _ in range(400):
        for told in world.guest.take_events():
            if isinstance(told, StreamWanted):
                world.guest.accept(stream)
        world.program.write(stream, bytes(60_000))
        world.guest.read(stream, 60_000)
        world.fill(world.program.next_message, world.local.guest)
        ahead = world.local.guest.session.backlog_bytes
        if world.local.guest.session.unacknowledged:
            worst = max(worst, ahead)
        world.step()
        world.wait(0.001)
    assert 0 < worst <= QUEUED_BYTES_MAX + PAYLOAD_BYTES_MAX
