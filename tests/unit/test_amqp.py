"""Frames as a broker may send them: one channel's message costs no other channel a thing."""

from __future__ import annotations

import json
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest
from amqp import ConnectionForced, spec
from hypothesis import given
from hypothesis import strategies as st

from vchan.host.broker import amqp, vm_queues
from vchan.host.broker.amqp import AmqpChannel, AmqpLink, Content, Inbound, Owner
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import (
    BEGINNING_BYTES,
    BrokerEvent,
    Delivered,
    Mail,
    Parked,
    Undecodable,
)
from vchan.host.broker.parked import Parking
from vchan.host.broker.vm_queues import BrokerQueue, VmQueues
from vchan.host.oslo_wire.mail import own_queue
from vchan.io.loop import Loop
from vchan.rpc.messages import Topic

GOOD, ODD = "vm-good", "vm-odd"
TOPIC = Topic("openstack", "agent")
BODY = json.dumps({"method": "note", "args": {}, "_unique_id": "0" * 32}).encode()


class FakeAmqp:
    """py-amqp's connection, as far as an AmqpLink that is connected needs it."""

    def __init__(self) -> None:
        self.frame_max = 131072
        self.bytes_recv = 0
        self.connected = True
        self.channels: dict[int, Any] = {}
        self.others: list[tuple[int, int, bytes]] = []

    def on_inbound_frame(self, frame: tuple[int, int, bytes]) -> None:
        self.bytes_recv += 1
        self.others.append(frame)
        kind, channel, payload = frame
        assert kind == 1
        if channel == 0:
            self.collect()
            raise ConnectionForced("closed by the operator")
        self.channels[channel].dispatch_method(struct.unpack_from(">HH", payload), payload, None)

    def collect(self) -> None:
        """As py-amqp does it: no channel can be spoken on any more."""
        self.connected = False
        for channel in self.channels.values():
            channel.is_gone = True
        self.channels = {}


class FakeChannel(AmqpChannel):
    """One that sends nowhere."""

    def __init__(self, link: AmqpLink, number: int, owner: Owner) -> None:
        self.owner = owner
        self._link = link
        self.said: list[Any] = []
        self.is_gone = False
        cast("Any", link.amqp).channels[number] = self

    def send_method(self, *args: Any) -> None:
        assert not self.is_gone
        self.said.append(args)

    def acknowledge(self, tag: int) -> None:
        assert not self.is_gone
        self.said.append((spec.Basic.Ack, tag))

    def collect(self) -> None:
        pass


class Hub:
    """What a VmQueues needs of a broker."""

    def __init__(self) -> None:
        self.config = BrokerConfig(hosts=(BrokerHost("localhost"),))
        self.loop = Loop()
        self.link = None
        self.events: list[BrokerEvent] = []
        self.post = self.events.append
        self.parked: list[Parking] = []
        self.park = self.parked.append
        self.declared = SimpleNamespace(otherwise={}, mismatches=lambda _: [])

        self.failed: list[tuple[str, str]] = []

    def vm_failed(self, vm: str, fault: str) -> None:
        self.failed.append((vm, fault))

    def opened(self, vm: VmQueues) -> None:
        pass

    def forget(self, vm: VmQueues) -> None:
        pass


class Site:
    """A link with two VMs' channels on it."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        config = BrokerConfig(hosts=(BrokerHost("localhost"),))
        self.hub = Hub()
        self.link = AmqpLink(
            config, config.hosts[0], self.hub.loop, self.lost.append, lambda _: None
        )
        self.link.amqp = cast("Any", FakeAmqp())
        self.channels = {}
        for number, name in enumerate((ODD, GOOD), 1):
            vm = VmQueues(cast("Any", self.hub), name)
            vm._topics = frozenset({TOPIC})
            vm._phase = vm_queues._Phase.OPEN
            vm._generation = number
            queue = f"agent.{name}"
            vm._consumers = {queue: BrokerQueue(queue, "openstack", queue, TOPIC, fanout=False)}
            self.channels[number] = vm._channel = FakeChannel(self.link, number, vm)

    def feed(self, *frames: bytes) -> None:
        self.link._feed(b"".join(frames))

    def close(self) -> None:
        self.hub.loop.close()


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def deliver(
    channel: int, queue: str, *, exchange: bytes = b"openstack", key: bytes = b"agent"
) -> bytes:
    payload = struct.pack(">HH", 60, 60) + short(queue.encode()) + struct.pack(">QB", 1, 0)
    return frame(1, channel, payload + short(exchange) + short(key))


def content(channel: int, body: bytes, properties: bytes = b"\0\0") -> bytes:
    header = struct.pack(">HHQ", 60, 0, len(body)) + properties
    return frame(2, channel, header) + (frame(3, channel, body) if body else b"")


COMPRESSED = struct.pack(">HI", 0x2000, 20) + b"\x0bcompression" + b"S\0\0\0\3bz2"
"""Properties."""


@pytest.fixture
def site() -> Any:
    site = Site()
    yield site
    site.close()


def assert_the_other_is_served(site: Site) -> None:
    site.hub.events.clear()
    site.feed(deliver(2, f"agent.{GOOD}"), content(2, BODY))
    (event,) = site.hub.events
    assert isinstance(event, Delivered)
    assert (event.vm, event.request.method) == (GOOD, "note")
    assert site.lost == []


@given(properties=st.binary(max_size=80), body=st.binary(max_size=80), key=st.binary(max_size=20))
def test_whatever_a_message_is_it_costs_itself_at_most(
    properties: bytes, body: bytes, key: bytes
) -> None:
    site = Site()
    site.feed(deliver(1, f"agent.{ODD}", key=key, exchange=key), content(1, body, properties))
    (event,) = site.hub.events
    assert isinstance(event, Undecodable | Delivered)
    assert event.queue == f"agent.{ODD}"
    assert_the_other_is_served(site)
    assert not site.hub.parked
    site.close()


@given(
    properties=st.binary(max_size=80),
    values=st.dictionaries(
        st.sampled_from(
            [
                "oslo.version",
                "oslo.message",
                "method",
                "args",
                "namespace",
                "version",
                "_msg_id",
                "_reply_q",
                "_unique_id",
                "_timeout",
                "event_type",
                "priority",
                "payload",
                "_context_x",
            ]
        ),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(10**400), 10**400),
            st.floats(),
            st.text(),
            st.characters(categories=["Cs"]),
            st.sampled_from(["2.0", "1.0", "3", "", "{}", "[]", "NaN", "0" * 32, "\0", "2." * 200]),
            st.lists(st.none()),
            st.dictionaries(st.text(), st.none()),
        ),
    ),
)
def test_whatever_an_envelope_is_it_costs_itself_at_most(
    properties: bytes, values: dict[str, Any]
) -> None:
    site = Site()
    inner = json.dumps(values).encode()
    wrapped = json.dumps({"oslo.version": "2.0", "oslo.message": inner.decode()}).encode()
    for body in (inner, wrapped):
        for queue in (f"agent.{ODD}", own_queue(ODD)):
            site.feed(deliver(1, queue), content(1, body, b"\0\0"))
    kinds = [type(event) for event in site.hub.events]
    assert kinds[0] in (Undecodable, Delivered)
    assert kinds[1] is Mail
    assert not site.hub.parked
    assert_the_other_is_served(site)
    site.close()


def test_an_unknown_header_type_costs_nothing(site: Site) -> None:
    table = b"\x03oddZ\x01"
    properties = struct.pack(">HI", 0x2000, len(table)) + table
    site.feed(deliver(1, f"agent.{ODD}"), content(1, BODY, properties))
    (event,) = site.hub.events
    assert isinstance(event, Delivered)
    assert_the_other_is_served(site)


def test_frames_of_two_messages_may_come_between_each_other(site: Site) -> None:
    half = len(BODY) // 2
    header = frame(2, 1, struct.pack(">HHQ", 60, 0, len(BODY)) + b"\0\0")
    site.feed(deliver(1, f"agent.{ODD}"), header, frame(3, 1, BODY[:half]))
    assert_the_other_is_served(site)
    site.hub.events.clear()
    site.feed(frame(3, 1, BODY[half:]))
    (event,) = site.hub.events
    assert isinstance(event, Delivered)
    assert event.body == BODY


def test_of_a_message_too_large_only_the_beginning_is_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqp, "BODY_BYTES_MAX", 1000)
    monkeypatch.setattr(vm_queues, "BODY_BYTES_MAX", 1000)
    chunks = [bytes([65 + number]) * 400 for number in range(4)]
    header = frame(2, 1, struct.pack(">HHQ", 60, 0, 1600) + b"\0\0")
    site.feed(deliver(1, f"agent.{ODD}"), header, *(frame(3, 1, chunk) for chunk in chunks[:3]))
    assert sum(map(len, site.link._arriving[1]._chunks)) == 400
    site.feed(frame(3, 1, chunks[3]))
    (event,) = site.hub.events
    assert isinstance(event, Undecodable)
    assert event.reason == "it has 1600 bytes, 1000 are allowed"
    assert event.beginning == b"A" * BEGINNING_BYTES
    assert_the_other_is_served(site)


def test_a_message_that_breaks_our_own_code_is_put_aside(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("ours")

    with monkeypatch.context() as patch:
        patch.setattr(vm_queues, "expand", broken)
        site.feed(deliver(1, f"agent.{ODD}"), content(1, BODY, COMPRESSED))
    (parking,) = site.hub.parked
    assert (parking.vm, parking.queue, parking.body) == (ODD, f"agent.{ODD}", BODY)
    assert "KeyError" in parking.reason
    assert "in broken" in caplog.text
    assert_the_other_is_served(site)
    parking.done("")
    assert site.channels[1].said[-1][0] == spec.Basic.Ack
    assert site.hub.events[-1] == Parked(ODD, f"agent.{ODD}", "")


def test_a_fault_of_ours_costs_its_vm_the_channel_and_no_other(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("ours")

    cancelled = struct.pack(">HH", 60, 30) + short(b"agent") + b"\0"
    with monkeypatch.context() as patch:
        patch.setattr(site.hub, "opened", broken)
        site.feed(frame(1, 1, cancelled))
    assert f"{ODD}: unexpected, at what the broker said" in caplog.text
    assert "AssertionError: 'ours'" in caplog.text
    ((vm, fault),) = site.hub.failed
    assert vm == ODD and fault.startswith("AssertionError in test_amqp.py:")
    assert_the_other_is_served(site)


def test_a_fault_of_ours_in_what_serves_all_gives_up_the_connection(site: Site) -> None:
    class Shared:
        def on_method(self, inbound: Inbound) -> None:
            raise KeyError("ours")

        def on_failure(self, fault: str) -> None:
            raise RuntimeError(fault)

    FakeChannel(site.link, 3, Shared())
    site.feed(deliver(3, "q"), content(3, BODY))
    (lost,) = site.lost
    assert lost.startswith("KeyError in test_amqp.py:")


@pytest.mark.parametrize(
    "frames",
    [
        frame(1, 1, struct.pack(">HH", 60, 60) + b"\x09abc") + content(1, b"x"),  # too short
        deliver(1, "q") + frame(2, 1, b"\0" * 5),
        deliver(1, "q") + frame(3, 1, b"x"),  # a body without a header
        deliver(1, "q") + deliver(1, "q"),
        deliver(9, "q") + content(9, b"x"),  # no such channel
    ],
)
def test_what_the_broker_itself_does_wrong_ends_the_connection(site: Site, frames: bytes) -> None:
    site.feed(frames)
    assert len(site.lost) == 1


def test_what_came_before_the_brokers_close_is_told_while_the_channel_is_there(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """All in one read: else the owner would speak on a channel that is gone."""

    class Acknowledging:
        def on_method(self, inbound: Inbound) -> None:
            inbound.channel.acknowledge(inbound.args[1])

        def on_failure(self, fault: str) -> None:
            raise RuntimeError(fault)

    channel = FakeChannel(site.link, 3, Acknowledging())
    close = frame(1, 0, struct.pack(">HHH", 10, 50, 320) + short(b"bye") + struct.pack(">HH", 0, 0))
    site.feed(deliver(3, "q"), content(3, BODY), close)
    assert channel.said == [(spec.Basic.Ack, 1)]
    assert "unexpected" not in caplog.text
    (lost,) = site.lost
    assert "closed by the operator" in lost


def test_a_text_of_the_brokers_that_was_cut_within_a_character_is_read(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    text = "queue 'é".encode()[:-1]
    payload = struct.pack(">HHH", 20, 40, 406) + short(text) + struct.pack(">HH", 50, 10)
    site.feed(frame(1, 1, payload))
    assert "406 queue '\ufffd" in caplog.text
    assert caplog.text.encode(), "a file takes it"
    assert_the_other_is_served(site)


def test_a_return_brings_back_what_was_sent(site: Site) -> None:
    got: list[Inbound] = []

    class Sink:
        def on_method(self, inbound: Inbound) -> None:
            got.append(inbound)

        def on_failure(self, fault: str) -> None:
            raise RuntimeError(fault)

    FakeChannel(site.link, 3, Sink())
    payload = struct.pack(">HHH", 60, 50, 312) + short(b"NO_ROUTE") + short(b"") + short(b"q")
    site.feed(frame(1, 3, payload), content(3, b"body", struct.pack(">H", 0x0080) + short(b"12")))
    (inbound,) = got
    assert inbound.args == [312, "NO_ROUTE", "", "q"]
    assert isinstance(inbound.content, Content)
    assert (inbound.content.body, inbound.content.properties.message_id) == (b"body", "12")
