"""Guests' requests at a broker that answers as it likes: each is told once, in its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vchan.host.broker import request_publisher
from vchan.host.broker.amqp import AmqpLink, Inbound, ResourceError, spec
from vchan.host.broker.events import BrokerEvent, PublishResult
from vchan.host.broker.request_publisher import Lane, Outgoing, Requests
from vchan.host.broker.topology import MISSING, QueueFacts, User
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.io.loop import Loop

T = TypeVar("T")

VMS = ("vm0", "vm1", "vm2", "vm3")
EXCHANGES = ("e0", "e1")
LANES = 2


class Published(NamedTuple):
    number: int
    vm: str
    body: bytes
    mandatory: bool


class AmqpChannel:
    """What a lane is given: remembers what is published and not confirmed."""

    def __init__(self, broker: FakeBroker, owner: Lane) -> None:
        self.broker = broker
        self.owner = owner
        self.count = 0
        self.open: list[Published] = []
        self.is_closed = False

    def ask(self, method: tuple[int, int], _: str, *args: Any) -> None:
        assert method != spec.Basic.Publish

    def publish(
        self, address: tuple[str, str], properties: bytes, body: bytes, *, mandatory: bool
    ) -> None:
        assert not self.is_closed
        self.count += 1
        vm, _, _ = body.partition(b" ")
        self.open.append(Published(self.count, vm.decode(), body, mandatory))
        assert len({each.vm for each in self.open}) == 1, "lent to two VMs at a time"
        assert address[0] in self.broker.declared.there, "its exchange was not made sure of"
        self.broker.arrived.append(body)

    def close_softly(self) -> None:
        self.is_closed = True

    def closed_by_broker(self) -> None:
        self.is_closed = True

    def send_method(self, *_: object) -> None:
        pass

    def collect(self) -> None:
        self.is_closed = True

    def say(self, method: tuple[int, int], *args: Any, content: Any = None) -> None:
        """From the broker."""
        self.owner.on_method(Inbound(cast("Any", self), method, list(args), content))


class FakeDeclared:
    """Exchanges that are there when the test says so."""

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.waiting: dict[str, dict[User, None]] = {}

        self.facts = QueueFacts(0, 1)

    def has_exchange(self, name: str, user: User, *, fanout: bool, make: bool) -> bool:
        assert not make, "a guest's word makes nothing"
        if name not in self.there:
            self.waiting.setdefault(name, {})[user] = None
        return name in self.there

    def look_at(self, name: str, user: User) -> QueueFacts:
        return self.facts

    def forget_queue(self, name: str) -> None:
        pass

    def forget_exchange(self, name: str) -> None:
        self.there.discard(name)


class Content(NamedTuple):
    body: bytes


class FakeBroker:
    """The hub, its clock, and its connection."""

    def __init__(self) -> None:
        self.declared = FakeDeclared()
        self.now_s = 0.0
        self.channels: list[AmqpChannel] = []
        self.sent: list[PublishResult] = []
        self.done: Counter[bytes] = Counter()
        self.arrived: list[bytes] = []
        self.channels_left = LANES
        self.link: AmqpLink | None = cast("AmqpLink", self)
        self.loop = cast("Loop", self)

    def time(self) -> float:
        return self.now_s

    def channel(self, owner: Lane) -> AmqpChannel:
        if not self.channels_left:
            raise ResourceError("no channel ids left")
        self.channels_left -= 1
        self.channels.append(AmqpChannel(self, owner))
        return self.channels[-1]

    def post(self, event: BrokerEvent) -> None:
        assert isinstance(event, PublishResult)
        self.sent.append(event)

    def request_done(self, outgoing: Outgoing) -> None:
        self.done[outgoing.request_id] += 1

    def within(self, vm: str, work: Callable[[], T], otherwise: T) -> T:
        return work()


class Machine(RuleBasedStateMachine):
    """Commands, and whatever a broker may say."""

    def __init__(self) -> None:
        super().__init__()
        self.hub = FakeBroker()
        self.requests = Requests(cast("Any", self.hub))
        self.count = 0
        self.given: list[bytes] = []
        self.stale: list[User] = []  # who waited when the connection was lost

    def _busy(self) -> list[AmqpChannel]:
        return [each for each in self.hub.channels if each.open and not each.is_closed]

    @rule(vm=st.sampled_from(VMS), exchange=st.sampled_from(EXCHANGES), mandatory=st.booleans())
    def publish(self, vm: str, exchange: str, mandatory: bool) -> None:
        self.count += 1
        body = b"%s %d" % (vm.encode(), self.count)
        self.given.append(body)
        publication = Publication(Form.TOPIC, exchange, "key", body, None, mandatory)
        self.requests.publish(Outgoing(vm, body, publication))

    @precondition(lambda self: self._busy())
    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        channel = data.draw(st.sampled_from(self._busy()))
        upto = data.draw(st.integers(1, len(channel.open)))
        confirmed, channel.open = channel.open[:upto], channel.open[upto:]
        method = data.draw(st.sampled_from([spec.Basic.Ack, spec.Basic.Nack]))
        channel.say(method, confirmed[-1].number, True)

    @precondition(lambda self: self._busy())
    @rule(data=st.data())
    def confirm_one(self, data: st.DataObject) -> None:
        channel = data.draw(st.sampled_from(self._busy()))
        one = channel.open.pop(data.draw(st.integers(0, len(channel.open) - 1)))
        returned = one.mandatory and data.draw(st.booleans())
        if returned:
            exchange = self.exchange_of(channel, one)
            channel.say(spec.Basic.Return, 312, "", exchange, "key", content=Content(one.body))
        channel.say(spec.Basic.Ack, one.number, False)
        (sent,) = [event for event in self.hub.sent if event.request_id == one.body]
        assert (sent.ok, sent.unroutable) == (not returned, returned)

    @staticmethod
    def exchange_of(channel: AmqpChannel, one: Published) -> str:
        return channel.owner.unconfirmed[one.number].publication.exchange

    @precondition(lambda self: self._busy())
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        """An exchange has gone: the VM whose channel it is hears of it, and no other."""
        channel = data.draw(st.sampled_from(self._busy()))
        before = len(self.hub.sent)
        (vm,) = {each.vm for each in channel.open}
        lost = [each.body for each in channel.open]
        self.hub.channels_left += 1
        channel.say(spec.Channel.Close, 404, "NOT_FOUND", 60, 40)
        told = self.hub.sent[before:]
        assert [event.request_id for event in told] == lost
        assert all(event.vm == vm and event.in_doubt and not event.ok for event in told)

    @precondition(lambda self: self.hub.declared.waiting)
    @rule(data=st.data(), problem=st.sampled_from(["", "", "403 no", MISSING]))
    def declared(self, data: st.DataObject, problem: str) -> None:
        waiting = self.hub.declared.waiting
        name = data.draw(st.sampled_from(sorted(waiting)))
        if not problem:
            self.hub.declared.there.add(name)
        for user in waiting.pop(name):
            user.on_declared(problem)

    @precondition(lambda self: self.stale)
    @rule(problem=st.sampled_from(["", "no channel ids left"]))
    def late_news(self, problem: str) -> None:
        """Of an exchange that was asked for on a connection that is lost."""
        self.stale.pop().on_declared(problem)

    @rule(pause_s=st.sampled_from([1.0, 61.0]))
    def watch(self, pause_s: float) -> None:
        """Channels that got no confirm for long are given up, and those nobody uses closed."""
        self.hub.now_s += pause_s
        before = {id(each) for each in self.hub.channels if not each.is_closed}
        self.requests.watch(self.hub.now_s)
        closed = [each for each in self.hub.channels if id(each) in before and each.is_closed]
        self.hub.channels_left += len(closed)

    @rule()
    def disconnect(self) -> None:
        hub = self.hub
        hub.link = None
        self.stale = [user for users in hub.declared.waiting.values() for user in users]
        hub.declared.waiting.clear()
        hub.declared.there.clear()
        for channel in hub.channels:
            channel.is_closed = True
        hub.channels_left = LANES
        self.requests.on_disconnected("lost")
        assert set(self.given) - {event.request_id for event in hub.sent} == set()
        hub.link = cast("AmqpLink", hub)

    @invariant()
    def told_once(self) -> None:
        told = Counter(event.request_id for event in self.hub.sent)
        assert max(told.values(), default=1) == 1
        assert told == self.hub.done

    @invariant()
    def in_order(self) -> None:
        for vm in VMS:
            bodies = [body.split() for body in self.hub.arrived]
            mine = [int(number) for of, number in bodies if of == vm.encode()]
            assert mine == sorted(mine)

    @invariant()
    def nothing_waits_for_nothing(self) -> None:
        """One that is not told is with the broker, or waits for an exchange or for a channel."""
        waiting = {id(user) for users in self.hub.declared.waiting.values() for user in users}
        in_use = [each for each in self.hub.channels if each.open and not each.is_closed]
        for outbox in self.requests._outboxes.values():
            assert outbox.waiting or outbox.lane
            if outbox.waiting and outbox.lane is None:
                assert id(outbox) in waiting or (outbox.in_line and len(in_use) >= LANES)

    def teardown(self) -> None:
        self.disconnect()


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_publisher, "LANES_MAX", LANES)
    monkeypatch.setattr(request_publisher, "LOT_MAX", 3)


TestRequests = pytest.mark.usefixtures("few")(Machine.TestCase)
TestRequests.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


# -------------------------------------------------------------------- what nobody listens to


class Site:
    """A broker with one exchange, and a queue of which a test says who consumes from it."""

    def __init__(self) -> None:
        self.hub = FakeBroker()
        self.hub.declared.there |= {"e0", "", "key_fanout"}
        self.requests = Requests(cast("Any", self.hub))
        self.count = 0

    def publish(
        self, form: Form, *, vm: str = "vm0", size: int = 0, mandatory: bool = True
    ) -> PublishResult:
        """And have the broker confirm it, if it gets there."""
        self.count += 1
        body = b"%s %d" % (vm.encode(), self.count)
        exchange = "" if form is Form.MAIL else "e0"
        publication = Publication(form, exchange, "key", body + b" " * size, None, mandatory)
        self.requests.publish(Outgoing(vm, body, publication))
        for channel in self.hub.channels:
            for each in channel.open:
                channel.say(spec.Basic.Ack, each.number, False)
            channel.open.clear()
        return self.hub.sent[-1]


@pytest.mark.parametrize("form", [Form.TOPIC, Form.NOTIFY])
def test_what_nobody_consumes_is_bounded_for_each_vm(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_publisher, "UNHEARD_MAX", 3)
    site = Site()
    site.hub.declared.facts = QueueFacts(messages=9, consumers=0)
    assert [site.publish(form).ok for _ in range(5)] == [True] * 3 + [False] * 2
    refused = site.hub.sent[-1]
    assert refused.unroutable
    assert "UNHEARD_MAX" in refused.reason
    assert site.publish(form, vm="vm1").ok  # another VM has its own
    site.hub.declared.facts = QueueFacts(messages=9, consumers=1)
    assert site.publish(form).ok
    site.hub.declared.facts = QueueFacts(messages=9, consumers=0)
    assert [site.publish(form).ok for _ in range(4)] == [True] * 3 + [False]
    site.hub.declared.facts = QueueFacts(messages=0, consumers=0)
    assert not site.publish(form).ok  # it was empty then: nobody has looked since
    site.hub.declared.facts = QueueFacts(messages=0, consumers=0, at_s=1.0)
    assert site.publish(form).ok  # somebody has emptied it


def test_the_bytes_that_nobody_consumes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_publisher, "UNHEARD_BYTES_MAX", 1000)
    site = Site()
    site.hub.declared.facts = QueueFacts(messages=9, consumers=0)
    assert [site.publish(Form.NOTIFY, size=400).ok for _ in range(3)] == [True, True, False]
    assert site.publish(Form.NOTIFY).ok  # a small one fits still


def test_what_is_not_known_of_a_queue_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_publisher, "UNHEARD_MAX", 1)
    site = Site()
    site.hub.declared.facts = QueueFacts(0, None)
    assert all(site.publish(Form.TOPIC).ok for _ in range(5))
    site.hub.declared.facts = QueueFacts(9, 0)
    assert all(site.publish(form).ok for form in (Form.MAIL, Form.FANOUT) for _ in range(5))


def test_a_notification_without_a_queue_is_told_so() -> None:
    site = Site()
    site.hub.declared.facts = QueueFacts(0, 0, is_there=False)
    sent = site.publish(Form.NOTIFY, mandatory=False)
    assert (sent.ok, sent.unroutable) == (False, True)
    assert site.publish(Form.TOPIC).ok  # some other queue may be bound: the broker knows


def test_how_many_vms_and_queues_are_counted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_publisher, "UNHEARD_KNOWN_MAX", 5)
    unheard = request_publisher.Unheard()
    for number in range(20):
        assert not unheard.admit(f"vm{number}", "q", 1, QueueFacts(9, 0))
    assert len(unheard._left) == 5


def test_a_fault_of_ours_leaves_what_was_on_its_way_in_doubt(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site()
    failed: list[str] = []

    def vm_failed(vm: str, fault: str) -> None:
        failed.append(vm)
        site.requests.discard(vm, fault)

    monkeypatch.setattr(site.hub, "vm_failed", vm_failed, raising=False)
    publication = Publication(Form.TOPIC, "e0", "key", b"vm0 1", None, mandatory=True)
    site.requests.publish(Outgoing("vm0", b"vm0 1", publication))
    (channel,) = site.hub.channels
    channel.owner.on_failure("KeyError in x.py:1")
    assert failed == ["vm0"]
    assert caplog.messages == ["vm0: publishing: 0 KeyError in x.py:1"]
    assert channel.is_closed
    (sent,) = site.hub.sent
    assert (sent.ok, sent.in_doubt, sent.reason) == (False, True, "0 KeyError in x.py:1")


def test_a_fault_of_ours_on_a_channel_that_nobody_uses_costs_nobody_anything() -> None:
    site = Site()
    assert site.publish(Form.TOPIC).ok
    (channel,) = site.hub.channels
    channel.owner.on_failure("KeyError in x.py:1")
    assert channel.is_closed
    assert not site.requests._lanes and not site.requests._idle
