"""A channel against guests that do too much: slowed down, or put into quarantine, alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig.gates import OpenGate, offer_nothing
from tests.rig.phases import go_through, hush, release, speak
from vchan.host.hypervisor.domains import Connect, Domain, Hush, Speak
from vchan.host.oslo_wire.upward_envelope import Publication
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.channel import Channel, Home
from vchan.host.vm.consumption import SUBSCRIBE_S
from vchan.host.vm.downward import BrokerPort
from vchan.host.vm.throttle import Throttle
from vchan.io.link import Link
from vchan.io.loop import Loop
from vchan.io.streams import SocketStream, listen_unix
from vchan.rpc.messages import Subscribe, Topic, encode
from vchan.session import CONTROL, Config, Event, Heard, Role, Session, Silent, State

WAIT_S = 30.0
AGENT = Topic("openstack", "agent")
LIMITS = Limits(
    handshakes_per_min=5, violations_per_min=3, quarantine_s=3600, quarantine_max_s=86_400
)


class SilentBroker:
    """Takes what it is told to consume, and does nothing else."""

    def __init__(self) -> None:
        self.consumed: frozenset[Topic] = frozenset()

    def consume(self, vm: str, topics: frozenset[Topic], owned: frozenset[Topic]) -> None:
        self.consumed = topics

    def release(self, vm: str, *, for_good: bool = False) -> None:
        self.consumed = frozenset()

    def ack(self, token: object) -> None:
        pass

    def complete(self, vm: str, request_id: bytes, *_: object) -> None:
        pass

    def publish_heartbeat(self, reply_q: str, body: bytes) -> None:
        pass

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        pass

    def listen_for_answers(self, vm: str) -> None:
        pass


class Host:
    """A channel, and the other end of its socket."""

    def __init__(
        self,
        directory: Path,
        limits: Limits,
        broker: BrokerPort | None = None,
        *,
        is_leaving: bool = False,
    ) -> None:
        self.loop = Loop()
        self.now_s = 0.0
        self.log: list[str] = []
        self.told: list[str] = []
        self._server = listen_unix(str(directory / "port"), 0o600)
        self._server.setblocking(False)
        self.channel = Channel(
            self.loop,
            Domain("uuid"),
            Home("host", bytes(16), log=self.log.append),
            broker,
            OpenGate(),
            offer_nothing,
            Throttle(limits),
            lambda reason, for_s: self.told.append(f"{for_s:.0f} s: {reason}"),
        )
        path = str(directory / "port")
        then = Hush("uuid") if is_leaving else Speak("uuid")
        go_through(self.channel, Connect("uuid", path), then)

    def accept(self) -> socket.socket:
        accepted: list[socket.socket] = []

        def try_it() -> bool:
            try:
                accepted.append(self._server.accept()[0])
            except BlockingIOError:
                return False
            return True

        self.until(try_it)
        accepted[0].setblocking(False)
        return accepted[0]

    def is_called(self) -> bool:
        """Whether the channel has connected again."""
        try:
            self._server.accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def until(self, reached: Callable[[], bool]) -> None:
        deadline_s = self.loop.time() + WAIT_S
        while not reached():
            assert self.loop.time() < deadline_s, (self.log, self.channel.summary())
            self.loop.run_once(0.02)

    def turns(self, count: int = 20) -> None:
        for _ in range(count):
            self.loop.run_once(0.005)

    def close(self) -> None:
        if self.channel._domain.path is not None:
            release(self.channel)
        self._server.close()
        self.loop.close()


class Guest:
    """A guest's session on that socket."""

    def __init__(self, host: Host, connected: socket.socket) -> None:
        self.host = host
        self.events: list[Event] = []
        self.downs: list[str] = []
        session = Session(Config(Role.GUEST, os.urandom(16), "guest"), os.urandom)
        stream = SocketStream(connected, "port")
        self.link = Link(host.loop, session, stream, self.events.append, self.downs.append)
        host.until(lambda: session.state is State.OPEN and host.channel.state == "ready")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, LIMITS)
    yield host
    host.close()


def greeting() -> bytes:
    session = Session(Config(Role.GUEST, os.urandom(16), "guest"), os.urandom)
    session.open(0.0)
    return session.data_to_send()


def test_a_storm_of_greetings_ends_in_quarantine(host: Host) -> None:
    guest = host.accept()
    for _ in range(5):
        guest.send(greeting())
        host.turns()
    assert host.channel.state != "quarantined"
    guest.send(greeting())
    host.until(lambda: host.channel.state == "quarantined")
    assert host.told == ["3600 s: over 5 handshakes a minute"]
    assert host.channel.summary()["quarantine"].endswith("s more: over 5 handshakes a minute")
    assert host.channel.problem.startswith("in quarantine for 3")
    host.turns()
    assert not host.is_called()
    guest.close()


def test_greetings_that_are_repeated_are_one(host: Host) -> None:
    guest, same = host.accept(), greeting()
    for _ in range(50):
        guest.send(same)
        host.turns(2)
    assert host.channel.state == "waiting"
    guest.close()


def test_messages_that_are_none_end_in_quarantine_and_the_operator_ends_it(host: Host) -> None:
    guest = Guest(host, host.accept())
    for _ in range(3):
        guest.link.send(b"\x02", 1)
    host.until(lambda: host.channel.downward.counters["bad_messages"] == 3)
    assert host.channel.state == "ready"
    guest.link.send(b"\x02", 1)
    host.until(lambda: host.channel.state == "quarantined")
    host.until(lambda: bool(guest.downs))
    assert host.told == ["3600 s: 4 violations in a minute, the last: a message that is none"]
    hush(host.channel)
    speak(host.channel)  # nothing that libvirt tells of ends it
    host.turns()
    assert not host.is_called()

    assert host.channel.end_quarantine()
    again = Guest(host, host.accept())
    assert host.channel.problem == ""
    assert not host.channel.end_quarantine()
    again.link.close()


def test_messages_of_kinds_not_known_are_passed_over_and_told_of(host: Host) -> None:
    """A newer guest's: it shall be able to talk to an older host."""
    guest = Guest(host, host.accept())
    for number in range(40):
        guest.link.send(b"\x63later" + bytes([number]), 1)
    host.until(lambda: host.channel.downward.counters["unknown_messages"] == 40)
    host.turns()
    assert host.channel.state == "ready"
    assert host.channel.throttle.breaker.trips == 0
    assert sum("a message of kind 99" in line for line in host.log) == 1
    guest.link.close()


def test_a_quarantine_ends_by_itself(tmp_path: Path) -> None:
    host = Host(tmp_path, Limits(violations_per_min=1, quarantine_s=1))
    try:
        guest = Guest(host, host.accept())
        for _ in range(2):
            guest.link.send(b"\x02", 1)
        host.until(lambda: host.channel.state == "quarantined")
        again = Guest(host, host.accept())
        assert host.channel.state == "ready"
        assert host.channel.throttle.counters["quarantines"] == 1
        again.link.close()
    finally:
        host.close()


def test_a_channel_that_is_released_in_quarantine_stays_closed(host: Host) -> None:
    guest = Guest(host, host.accept())
    for _ in range(4):
        guest.link.send(b"\x02", 1)
    host.until(lambda: host.channel.state == "quarantined")
    release(host.channel)
    host.channel.end_quarantine()
    host.turns()
    assert not host.is_called()


def test_late_words_of_a_guest_that_has_moved_do_not_take_it_up_again(tmp_path: Path) -> None:
    broker = SilentBroker()
    host = Host(tmp_path, Limits(), broker)
    try:
        guest = Guest(host, host.accept())
        guest.link.send(encode(Subscribe((AGENT,))), CONTROL)
        host.until(lambda: AGENT in broker.consumed)
        host.channel._handle(Silent(5.0))
        hush(host.channel)
        assert broker.consumed == frozenset()
        host.channel._handle(Heard())
        over_s = host.loop.time() + 1.5 * SUBSCRIBE_S
        host.until(lambda: host.loop.time() > over_s)
        assert broker.consumed == frozenset()
        speak(host.channel)  # the migration failed
        host.channel.downward.released()
        host.until(lambda: AGENT in broker.consumed)
    finally:
        host.close()


def test_a_guest_that_sends_too_fast_is_read_slowly_and_loses_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, Limits(bytes_per_s=1024 * 1024))
    try:
        guest = Guest(host, host.accept())
        start_s = host.loop.time()
        for _ in range(8):
            guest.link.send(b"\x02" + bytes(256 * 1024), 1)
        host.until(lambda: host.channel.downward.counters["bad_messages"] == 8)
        # Two MiB, one of them a burst.
        assert host.loop.time() - start_s > 0.8
        assert host.channel.throttle.counters["throttled"] > 0
        assert host.channel.state == "ready"
        guest.link.close()
    finally:
        host.close()


def test_a_flood_of_small_messages_is_read_slowly(tmp_path: Path) -> None:
    host = Host(tmp_path, Limits(messages_per_s=1000, violations_per_min=6000))
    try:
        guest = Guest(host, host.accept())
        start_s = host.loop.time()
        for _ in range(4000):
            guest.link.send(b"\x02", 1)
        host.until(lambda: host.channel.downward.counters["bad_messages"] == 4000)
        assert host.loop.time() - start_s > 0.8
        assert host.channel.throttle.counters["throttled"] > 0
        guest.link.close()
    finally:
        host.close()


def test_a_message_over_the_vms_own_limit_is_refused_by_the_session(tmp_path: Path) -> None:
    host = Host(tmp_path, Limits(message_bytes=64 * 1024))
    try:
        guest = Guest(host, host.accept())
        with pytest.raises(Exception, match="65536"):
            guest.link.send(bytes(65 * 1024), 1)
        guest.link.close()
    finally:
        host.close()
