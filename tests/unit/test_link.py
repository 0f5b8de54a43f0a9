"""Links: sessions on real sockets, a turn of the loop at a time."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.rig.stand_in import StandIn
from vchan.io import link as link_module
from vchan.io.link import Link
from vchan.io.loop import Loop
from vchan.io.streams import SocketStream
from vchan.session import Config, Event, Opened, Received, Role, Session, State
from vchan.wire.frames import OVERHEAD_BYTES

WAIT_S = 30.0


class End:
    """A session, its link and what they told."""

    def __init__(self, loop: Loop, role: Role, **limits: float) -> None:
        config = Config(role, os.urandom(16), role.name.lower())._replace(**limits)  # type: ignore[arg-type]
        self.loop = loop
        self.session = Session(config, os.urandom)
        self.events: list[Event] = []
        self.downs: list[str] = []
        self.react: Callable[[Event], object] = lambda _: None
        self.meter: Callable[[int, float], float] | None = None
        self.link: Link

    def bind(self, connected: socket.socket, *, silent: bool = False) -> None:
        stream = SocketStream(connected, "/a/socket")
        self.link = Link(
            self.loop,
            self.session,
            stream,
            self._handle,
            self.downs.append,
            silent=silent,
            meter=self.meter,
        )

    def _handle(self, event: Event) -> None:
        self.events.append(event)
        self.react(event)

    def received(self) -> list[bytes]:
        return [event.message for event in self.events if isinstance(event, Received)]

    def opened(self) -> list[bool]:
        """One for each time, whether it was resumed."""
        return [event.resumed for event in self.events if isinstance(event, Opened)]


class Both:
    """A host's and a guest's end, connected."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.host, self.guest = End(loop, Role.HOST), End(loop, Role.GUEST)

    def open(self) -> None:
        """Connect, and wait for the session: what is sent before it goes nowhere."""
        self.connect()
        self.until(lambda: self.host.session.state is State.OPEN is self.guest.session.state)

    def connect(self, *, silent: bool = False) -> None:
        ours, theirs = socket.socketpair()
        self.host.bind(ours, silent=silent)
        self.guest.bind(theirs)

    def until(self, reached: Callable[[], bool]) -> None:
        deadline_s = self.loop.time() + WAIT_S
        while not reached():
            assert self.loop.time() < deadline_s, (self.host.events, self.guest.events)
            self.loop.run_once(0.05)

    def for_s(self, duration_s: float) -> None:
        end_s = self.loop.time() + duration_s
        while self.loop.time() < end_s:
            self.loop.run_once(0.01)

    def cut(self) -> None:
        self.host.link.close()
        self.guest.link.close()


@pytest.fixture
def both() -> Iterator[Both]:
    with Loop() as loop:
        both = Both(loop)
        yield both
        both.cut()


def test_messages_pass_both_ways_in_order(both: Both) -> None:
    both.open()
    sent = [b"%d" % number for number in range(2000)]
    for message in sent:
        both.host.link.send(message, 1)
        both.guest.link.send(message, 2)
    both.until(lambda: len(both.host.received()) == len(both.guest.received()) == 2000)
    assert both.host.received() == both.guest.received() == sent


def test_a_message_larger_than_the_socket_passes(both: Both) -> None:
    both.open()
    message = os.urandom(4 << 20)
    both.host.link.send(message, 1)
    both.until(lambda: bool(both.guest.received()))
    assert both.guest.received() == [message]


def test_a_link_writes_nothing_until_it_is_told_to(both: Both) -> None:
    both.connect(silent=True)
    assert not both.host.link._may_write
    both.host.link.send(b"kept", 1)
    both.for_s(0.5)  # the guest greets, twice
    assert both.host.session.counters.frames_sent == 0
    assert both.host.link.bytes_dropped > 0
    assert both.host.session.state is State.CLOSED
    both.host.link.speak()
    both.until(lambda: both.host.session.state is State.OPEN)
    both.host.link.send(b"said", 1)
    both.until(lambda: b"said" in both.guest.received())


def test_a_hushed_link_reads_and_writes_nothing_until_it_is_resumed(both: Both) -> None:
    both.open()
    both.host.link.hush()
    both.host.link.send(b"later", 1)
    both.guest.link.send(b"read", 1)
    both.until(lambda: both.host.received() == [b"read"])
    both.for_s(0.1)
    assert both.guest.received() == []
    both.host.link.speak()
    both.until(lambda: both.guest.received() == [b"later"])
    assert both.host.opened() == [False]


def test_a_metered_link_pauses_reading_and_goes_on_writing(both: Both) -> None:
    both.host.meter = lambda size, took_s: 3600.0 if both.host.received() else 0.0
    both.open()
    both.guest.link.send(b"first", 1)
    both.until(lambda: both.host.received() == [b"first"])
    both.guest.link.send(b"second", 1)
    both.host.link.send(b"down", 1)
    both.until(lambda: both.guest.received() == [b"down"])
    both.for_s(0.1)
    assert both.host.received() == [b"first"]
    both.host.link._resume()
    both.until(lambda: both.host.received() == [b"first", b"second"])


def test_a_slow_reader_gets_everything_and_holds_the_sender_back(both: Both) -> None:
    told: list[int] = []

    def meter(size: int, took_s: float) -> float:
        told.append(size)
        return 0.002

    both.host.meter = meter
    both.open()
    message = os.urandom(2 << 20)
    both.guest.link.send(message, 1)
    both.until(lambda: bool(both.host.received()))
    assert both.host.received() == [message]
    assert sum(told) >= len(message)
    assert max(told) <= link_module.TURN_BYTES
    assert both.host.session.counters.losses == 0


class Spending:
    """What the loop's time is spent on, for a link that is metered: a millisecond a message."""

    def __init__(self, both: Both) -> None:
        self.spent_s = 0.0
        self.told: list[tuple[int, float]] = []
        self.pause_s = 0.0
        both.loop.spent = lambda: self.spent_s
        both.host.meter = self._meter
        both.host.react = self._react

    def _meter(self, size: int, took_s: float) -> float:
        self.told.append((size, took_s))
        return self.pause_s

    def _react(self, event: Event) -> None:
        if isinstance(event, Received):
            self.spent_s += 0.001


def test_a_metered_peer_is_read_no_longer_than_its_share_of_a_turn(both: Both) -> None:
    spending = Spending(both)
    both.open()
    messages = [bytes([number]) * link_module.SLICE_BYTES for number in range(1, 100)]
    for message in messages:
        both.guest.link.send(message, 1)
    turns = [0]

    def count() -> None:
        turns.append(len(both.host.received()))
        both.loop.call_soon(count)

    count()
    both.until(lambda: both.host.received() == messages)
    assert max(after - before for before, after in pairwise(turns)) == 1
    assert sum(took_s for _, took_s in spending.told) == pytest.approx(0.099)
    assert max(took_s for _, took_s in spending.told) == pytest.approx(0.001)


def test_a_metered_peer_whose_turn_was_long_goes_behind_the_others(both: Both) -> None:
    spending = Spending(both)
    both.open()
    order: list[str] = []

    def react(event: Event) -> None:
        order.append("peer")
        spending._react(event)

    both.host.react = react
    both.guest.link.send(b"first", 1)
    both.until(lambda: order == ["peer"])
    both.for_s(0.1)
    ours, theirs = socket.socketpair()
    both.loop.add_reader(ours.fileno(), lambda: order.append("other" + str(ours.recv(1))))
    both.guest.session.send(b"second", 1)
    both.guest.link.flush()
    theirs.send(b"x")  # ready after it
    both.until(lambda: len(order) == 3)
    assert order == ["peer", "otherb'x'", "peer"]
    both.loop.remove_reader(ours.fileno())
    ours.close()
    theirs.close()


def test_messages_that_cost_nothing_are_handled_in_the_same_turn(both: Both) -> None:
    spending = Spending(both)
    both.host.react = lambda _: None
    both.open()
    spending.told.clear()
    message = os.urandom(48 * 1024)
    both.guest.link.send(message, 1)
    both.until(lambda: both.host.received() == [message])
    assert max(size for size, _ in spending.told) > 16 * 1024


def test_bytes_read_before_a_pause_are_handled_after_it(both: Both) -> None:
    spending = Spending(both)
    both.open()
    spending.pause_s = 3600.0
    messages = [bytes([number]) * link_module.SLICE_BYTES for number in range(1, 4)]
    for message in messages:
        both.guest.session.send(message, 1)
    both.guest.link.flush()  # at once
    both.until(lambda: both.host.received() == messages[:1])
    both.for_s(0.1)
    assert both.host.received() == messages[:1]
    spending.pause_s = 0.0
    both.host.link._resume()
    both.until(lambda: both.host.received() == messages)


def test_the_peer_resends_what_a_closed_metered_link_had_not_handled(both: Both) -> None:
    spending = Spending(both)
    both.open()
    spending.pause_s = 3600.0
    messages = [bytes([number]) * link_module.SLICE_BYTES for number in range(1, 4)]
    for message in messages:
        both.guest.session.send(message, 1)
    both.guest.link.flush()
    both.until(lambda: both.host.received() == messages[:1])
    both.cut()
    both.for_s(0.05)
    assert both.host.received() == messages[:1]
    spending.pause_s = 0.0
    both.connect()
    both.until(lambda: both.host.received() == messages)
    assert both.host.opened() == [False, True]


def test_a_metered_peer_is_written_no_more_than_its_share_of_a_turn(both: Both) -> None:
    Spending(both)
    both.open()
    both.for_s(0.1)  # what belongs to the handshake
    wrote: list[int] = []
    stream = both.host.link.stream
    write = stream.write

    def noted(data: bytes) -> int:
        wrote.append(len(data))
        return write(data)

    stream.write = noted  # type: ignore[method-assign]
    messages = [bytes([number % 256]) for number in range(1, 1000)]
    for message in messages:
        both.host.link.send(message, 1)
    both.loop.run_once(0)
    assert len(wrote) == 1
    both.until(lambda: both.guest.received() == messages)
    assert max(wrote) <= link_module.TURN_FRAMES * (OVERHEAD_BYTES + 1)


def test_a_metered_link_that_is_closed_stays_closed(both: Both) -> None:
    both.host.meter = lambda size, took_s: 0.05
    both.open()
    both.cut()
    both.for_s(0.2)
    assert both.host.downs == []


def test_a_metered_link_notices_that_its_peer_is_gone(both: Both) -> None:
    both.host.meter = lambda size, took_s: 0.05
    both.open()
    both.guest.link.close()
    both.until(lambda: bool(both.host.downs))
    (reason,) = both.host.downs  # "reset": it had not read all that it was sent
    assert re.fullmatch(r"/a/socket: (closed by the other end|.*reset by peer)", reason)


def test_a_lost_stream_is_reported_once_and_the_session_goes_on(both: Both) -> None:
    both.open()
    both.guest.link.send(b"before", 1)
    both.guest.link.flush()
    both.host.link.close()  # unread
    both.until(lambda: bool(both.guest.downs))
    assert both.guest.downs[0].startswith("/a/socket: ")
    assert both.host.downs == []  # who closes knows
    both.guest.session.send(b"between", 1)
    both.connect()
    both.until(lambda: both.host.received() == [b"before", b"between"])
    assert both.guest.opened() == [False, True]
    assert len(both.guest.downs) == 1


def test_the_owner_may_close_a_link_inside_a_callback(both: Both) -> None:
    both.open()
    both.guest.react = lambda event: both.guest.link.close()
    for _ in range(3):
        both.host.link.send(b"x", 1)
    both.until(lambda: bool(both.host.downs))
    assert both.guest.received() == [b"x"]
    assert both.guest.downs == []


def test_garbage_is_skipped(both: Both) -> None:
    ours, theirs = socket.socketpair()
    both.host.bind(ours)
    theirs.send(os.urandom(30_000))
    both.for_s(0.1)
    assert both.host.downs == []
    both.guest.bind(theirs)
    both.until(lambda: both.host.session.state is State.OPEN)


def test_both_sides_refuse_versions_that_do_not_overlap(both: Both) -> None:
    both.guest = End(both.loop, Role.GUEST, version_min=2, version_max=3)
    both.connect()
    both.until(lambda: State.REFUSED is both.host.session.state is both.guest.session.state)
    for end in (both.host, both.guest):
        (refused,) = end.events
        text = str(refused)
        for words in ("host", "guest", "1 to 1", "2 to 3", "upgrade the older one"):
            assert words in text


class Port:
    """A stand-in for a virtio port: a socket whose end is only an absence, and that can jam."""

    path = "/dev/port"
    ends_at_hangup = False

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self.jammed = False
        self.hung_up = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> bytes:
        return b"" if self.hung_up else self._socket.recv(4096)

    def write(self, data: bytes) -> int:
        if self.jammed:
            raise BlockingIOError
        return self._socket.send(data)

    def close(self) -> None:
        self._socket.close()


def test_a_link_gives_up_a_port_that_takes_no_bytes(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "STALL_S", 0.2)
    monkeypatch.setattr(link_module, "STALL_RETRY_S", 0.05)
    ours, theirs = socket.socketpair()
    both.host.bind(ours)
    port = Port(theirs)
    guest = both.guest
    guest.link = Link(both.loop, guest.session, port, guest.events.append, guest.downs.append)
    both.until(lambda: guest.session.state is State.OPEN)
    port.jammed = True
    guest.link.send(b"x", 1)
    both.until(lambda: bool(guest.downs))
    assert guest.downs == ["/dev/port: takes no bytes for 0.2 s"]


def test_a_stream_that_is_often_full_leaks_no_timers(both: Both) -> None:
    ours, theirs = socket.socketpair()
    both.host.bind(ours)
    port = Port(theirs)
    guest = both.guest
    guest.link = Link(both.loop, guest.session, port, guest.events.append, guest.downs.append)
    both.until(lambda: guest.session.state is State.OPEN)
    before = len(both.loop._timers)
    for _ in range(500):
        port.jammed = True
        guest.link.send(b"x", 1)
        guest.link.flush()
        port.jammed = False
        guest.link._writable()
    assert len(both.loop._timers) - before <= 1


def test_a_link_recovers_from_a_lost_wake_up(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "STALL_RETRY_S", 0.05)
    silent: Any = StandIn(both.loop, add_writer=lambda *_: None)  # nobody will wake us
    ours, theirs = socket.socketpair()
    both.host.bind(ours)
    port = Port(theirs)
    guest = both.guest
    guest.link = Link(silent, guest.session, port, guest.events.append, guest.downs.append)
    both.until(lambda: guest.session.state is State.OPEN)
    port.jammed = True
    guest.link.send(b"x", 1)
    both.for_s(0.02)
    port.jammed = False
    both.until(lambda: both.host.received() == [b"x"])


def test_a_link_does_not_poll_a_port_without_a_host(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "HANGUP_POLL_S", 0.05)
    ours, theirs = socket.socketpair()
    port = Port(theirs)
    port.hung_up = True
    ours.send(b"\0")  # readable for ever
    guest = both.guest
    guest.link = Link(both.loop, guest.session, port, guest.events.append, guest.downs.append)
    both.until(lambda: guest.link.is_hung_up)
    turns = 0
    end_s = both.loop.time() + 0.3
    while both.loop.time() < end_s:
        both.loop.run_once(0.3)
        turns += 1
    assert turns < 30
    guest.link.send(b"kept", 1)
    port.hung_up = False
    both.host.bind(ours)
    both.until(lambda: both.host.session.state is State.OPEN)
    assert not guest.link.is_hung_up
    assert guest.downs == []
