"""A message that breaks the daemon again and again is put aside; what a broker refuses is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.rig.gates import OpenGate
from vchan.errors import LimitExceeded
from vchan.host.broker import parked
from vchan.host.broker.amqp import Inbound, ResourceError, spec
from vchan.host.broker.events import Token
from vchan.host.broker.parked import PARKED, Parking, ParkingLot
from vchan.host.hypervisor.domains import Domain
from vchan.host.policy.rules import Facts, Policy
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.channel import Channel, End, Home
from vchan.host.vm.gate import VmGate
from vchan.host.vm.mailbox import Mailbox
from vchan.host.vm.throttle import Throttle
from vchan.host.vm.upward import Offer
from vchan.host.vm.vm import BREAKS_KNOWN_MAX, BREAKS_MAX, HostedVm, Refusals, _Message
from vchan.io.loop import Loop
from vchan.rpc.messages import Topic

TOKEN = Token("vm", 1, 1)

# -------------------------------------------------------------------- the VM


def nothing(*_: Any) -> None:
    """In place of what is told something."""


class Site:
    """What of a VM handles a message."""

    def __init__(self) -> None:
        self.parked: list[tuple[Any, ...]] = []
        broker: Any = SimpleNamespace(park_message=lambda *what: self.parked.append(what))
        loop, domain, home = Loop(), Domain("vm"), Home("here", bytes(16))
        offer: Offer = lambda _request, _told: None  # noqa: E731
        self.channel = Channel(loop, domain, home, broker, OpenGate(), offer)
        policy = Policy.denying("there is none")
        gate = VmGate(Facts("vm"), lambda: policy, nothing, lambda *_: {}, Topic("", ""))
        self.vm = HostedVm(
            loop, domain, home, broker, gate, Throttle(Limits()), End(), offer, nothing
        )

    @property
    def mail(self) -> Mailbox:
        """Where what is left of a message would be."""
        return self.channel.downward.upward.mailbox

    def handle(self, request_id: bytes, error: Exception | None) -> None:
        def work() -> None:
            if error is not None:
                raise error

        message = _Message(request_id, TOKEN, "queue", b"body")
        self.vm._handle(self.channel, message, work, None)


def test_a_message_that_breaks_us_again_and_again_is_put_aside(
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = Site()
    for _ in range(BREAKS_MAX - 1):
        with pytest.raises(KeyError):
            site.handle(b"odd", KeyError("ours"))
        site.handle(b"good", None)
    assert site.parked == []
    site.mail.put(TOKEN, b"body")
    site.handle(b"good", None)
    assert len(site.mail) == 1
    site.handle(b"odd", KeyError("ours"))
    ((*message, reason),) = site.parked
    assert message == [TOKEN, "queue", b"body"]
    assert reason.startswith("KeyError in test_parked_messages.py:")
    assert "Traceback" not in caplog.text and "in work" in caplog.text and "'ours'" in caplog.text
    assert len(site.mail) == 0  # nothing is left of it
    with pytest.raises(KeyError):  # published again by somebody: it begins anew
        site.handle(b"odd", KeyError("ours"))


def test_a_refusal_of_our_own_is_no_fault() -> None:
    site = Site()
    for _ in range(BREAKS_MAX + 1):
        with pytest.raises(LimitExceeded):
            site.handle(b"large", LimitExceeded("message", 2, 1, "MESSAGE_BYTES_MAX"))
    assert site.parked == []


def test_what_is_remembered_of_breaks_is_bounded() -> None:
    vm = Site().vm
    for number in range(BREAKS_KNOWN_MAX + 10):
        assert not vm._breaks_too_often(b"%d" % number)
    assert len(vm._breaks) == BREAKS_KNOWN_MAX
    assert BREAKS_MAX == 3


def test_what_the_broker_says_of_a_vm() -> None:
    says = Refusals()
    assert says.all() == []
    says.problems = ("queue q was declared otherwise",)
    says.said("requests", "refused by the broker")
    says.said("replies", "")
    assert says.all() == [
        "queue q was declared otherwise",
        "its requests are not taken: refused by the broker",
    ]
    says.said("requests", "")
    assert says.all() == ["queue q was declared otherwise"]
    says.clear()
    assert says.all() == []


# -------------------------------------------------------------------- the queue


class FakeChannel:
    """What the parking lot is given."""

    def __init__(self, hub: Hub, owner: ParkingLot) -> None:
        self.hub = hub
        self.owner = owner
        self.is_closed = False

    def ask(self, method: tuple[int, int], _: str, *args: Any, content: Any = None) -> None:
        assert not self.is_closed
        self.hub.asked.append((method, args, content))

    def close_softly(self) -> None:
        self.is_closed = True

    def closed_by_broker(self) -> None:
        self.is_closed = True

    def collect(self) -> None:
        pass

    def say(self, method: tuple[int, int], *args: Any) -> None:
        self.owner.on_method(Inbound(cast("Any", self), method, list(args), None))


class Hub:
    """A broker whose answers a test gives."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.channels: list[FakeChannel] = []
        self.is_full = False
        self.now_s = 0.0
        self.later: list[Any] = []
        self.link: Any = self
        self.loop: Any = SimpleNamespace(time=lambda: self.now_s, call_soon=self.later.append)

    def channel(self, owner: ParkingLot) -> FakeChannel:
        if self.is_full:
            raise ResourceError("no channel ids left")
        self.channels.append(FakeChannel(self, owner))
        return self.channels[-1]

    def published(self) -> list[bytes]:
        return [content.body for method, _, content in self.asked if method == spec.Basic.Publish]


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def lot(hub: Hub) -> ParkingLot:
    return ParkingLot(hub)


def parking(body: bytes, done: list[str]) -> Parking:
    return Parking("vm", "queue", body, "KeyError", done.append)


def test_one_after_the_other_with_where_it_was(hub: Hub, lot: ParkingLot) -> None:
    done: list[str] = []
    lot.park(parking(b"one", done))
    lot.park(parking(b"two", done))
    assert hub.published() == [b"one"]
    (_, args, content) = hub.asked[-1]
    assert args == (0, "", PARKED, True, False)
    assert content.properties["application_headers"] == {
        "vchan-vm": "vm",
        "vchan-queue": "queue",
        "vchan-reason": "KeyError",
    }
    (channel,) = hub.channels
    channel.say(spec.Basic.Ack, 1, False)
    assert (done, hub.published()) == ([""], [b"one", b"two"])
    channel.say(spec.Basic.Ack, 2, False)
    assert done == ["", ""]
    assert channel.is_closed
    assert lot._bytes == 0


def test_the_queue_is_made_when_it_is_not_there(hub: Hub, lot: ParkingLot) -> None:
    done: list[str] = []
    lot.park(parking(b"one", done))
    (channel,) = hub.channels
    channel.say(spec.Basic.Return, 312, "NO_ROUTE", "", PARKED)
    channel.say(spec.Basic.Ack, 1, False)
    assert done == []
    methods = [method for method, _, _ in hub.asked[-2:]]
    assert methods == [spec.Queue.Declare, spec.Basic.Publish]
    channel.say(spec.Queue.DeclareOk, PARKED, 0, 0)
    channel.say(spec.Basic.Return, 312, "NO_ROUTE", "", PARKED)
    channel.say(spec.Basic.Ack, 2, False)
    assert done == ["the queue cannot be made"]


@pytest.mark.parametrize("how", ["closed", "refused", "late", "failed"])
def test_what_cannot_be_put_aside_is_told_and_the_next_is_tried(
    hub: Hub, lot: ParkingLot, how: str
) -> None:
    done: list[str] = []
    lot.park(parking(b"one", done))
    lot.park(parking(b"two", done))
    channel = hub.channels[-1]
    if how == "closed":
        channel.say(spec.Channel.Close, 403, "ACCESS_REFUSED", 60, 40)
    elif how == "refused":
        channel.say(spec.Basic.Nack, 1, False)
    elif how == "late":
        hub.now_s += parked.CONFIRM_TIMEOUT_S
        lot.watch(hub.now_s)
    else:
        lot.on_failure("unexpected: KeyError")
    assert len(done) == 1
    assert done[0]
    assert hub.published() == [b"one", b"two"]
    hub.channels[-1].say(spec.Basic.Ack, 1, False)
    assert done[1] == ""


def test_without_a_channel_it_is_told_later(hub: Hub, lot: ParkingLot) -> None:
    done: list[str] = []
    hub.is_full = True
    lot.park(parking(b"one", done))
    assert done == []
    for call in hub.later:
        call()
    assert done == ["no channel ids left"]


def test_a_lost_connection_hands_it_out_again(hub: Hub, lot: ParkingLot) -> None:
    done: list[str] = []
    lot.park(parking(b"one", done))
    hub.link = None
    lot.on_disconnected()
    lot.park(parking(b"two", done))
    assert (done, lot._bytes) == ([], 0)
    hub.link = hub
    lot.park(parking(b"three", done))
    hub.channels[-1].say(spec.Basic.Ack, 1, False)
    assert done == [""]


def test_what_waits_is_bounded(hub: Hub, lot: ParkingLot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parked, "WAITING_BYTES_MAX", 10)
    done: list[str] = []
    lot.park(parking(b"x" * 8, done))
    lot.park(parking(b"x" * 8, done))
    (problem,) = done
    assert "WAITING_BYTES_MAX" in problem
    assert len(lot._waiting) == 1
