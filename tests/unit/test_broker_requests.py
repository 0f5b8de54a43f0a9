"""Guests' requests at a broker that answers as it likes: each is told once, in its place."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vchan.host import broker_requests
from vchan.host.amqp_link import Inbound, Link, ResourceError, spec
from vchan.host.broker_declared import User
from vchan.host.broker_events import BrokerEvent, Form, Publication, Sent
from vchan.host.broker_requests import Lane, Outgoing, Requests
from vchan.loop import Loop

VMS = ("vm0", "vm1", "vm2", "vm3")
EXCHANGES = ("e0", "e1")
LANES = 2


class Published(NamedTuple):
    number: int
    vm: str
    body: bytes
    mandatory: bool


class Channel:
    """What a lane is given: remembers what is published and not confirmed."""

    def __init__(self, broker: FakeBroker, owner: Lane) -> None:
        self.broker = broker
        self.owner = owner
        self.count = 0
        self.open: list[Published] = []
        self.is_closed = False

    def ask(self, method: tuple[int, int], _: str, *args: Any, content: Any = None) -> None:
        if method != spec.Basic.Publish:
            return
        assert not self.is_closed
        self.count += 1
        vm, _, _ = content.body.partition(b" ")
        self.open.append(Published(self.count, vm.decode(), content.body, args[3]))
        assert len({each.vm for each in self.open}) == 1, "lent to two VMs at a time"
        assert args[1] in self.broker.declared.there, "its exchange was not made sure of"
        self.broker.arrived.append(content.body)

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

    def has_exchange(self, name: str, user: User, *, fanout: bool) -> bool:
        if name not in self.there:
            self.waiting.setdefault(name, {})[user] = None
        return name in self.there

    def forget_exchange(self, name: str) -> None:
        self.there.discard(name)


class Content(NamedTuple):
    body: bytes


class FakeBroker:
    """The hub, its clock, and its connection."""

    def __init__(self) -> None:
        self.declared = FakeDeclared()
        self.now_s = 0.0
        self.channels: list[Channel] = []
        self.sent: list[Sent] = []
        self.done: Counter[bytes] = Counter()
        self.arrived: list[bytes] = []
        self.channels_left = LANES
        self.link: Link | None = cast("Link", self)
        self.loop = cast("Loop", self)

    def time(self) -> float:
        return self.now_s

    def channel(self, owner: Lane) -> Channel:
        if not self.channels_left:
            raise ResourceError("no channel ids left")
        self.channels_left -= 1
        self.channels.append(Channel(self, owner))
        return self.channels[-1]

    def post(self, event: BrokerEvent) -> None:
        assert isinstance(event, Sent)
        self.sent.append(event)

    def request_done(self, outgoing: Outgoing) -> None:
        self.done[outgoing.request_id] += 1


class Machine(RuleBasedStateMachine):
    """Commands, and whatever a broker may say."""

    def __init__(self) -> None:
        super().__init__()
        self.hub = FakeBroker()
        self.requests = Requests(cast("Any", self.hub))
        self.count = 0
        self.given: list[bytes] = []
        self.stale: list[User] = []  # who waited when the connection was lost

    def _busy(self) -> list[Channel]:
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
    def exchange_of(channel: Channel, one: Published) -> str:
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
    @rule(data=st.data(), problem=st.sampled_from(["", "", "403 no"]))
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
        hub.link = cast("Link", hub)

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
    monkeypatch.setattr(broker_requests, "LANES_MAX", LANES)
    monkeypatch.setattr(broker_requests, "LOT_MAX", 3)


TestRequests = pytest.mark.usefixtures("few")(Machine.TestCase)
TestRequests.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
