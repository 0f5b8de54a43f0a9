"""Commands to the broker's thread: none of them raises, however far behind it is."""

from __future__ import annotations

import pytest

from vchan.host.broker import broker as broker_module
from vchan.host.broker.broker import Broker
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import BrokerEvent, Completed, PublishResult, Released, Token
from vchan.host.oslo_wire.downward_envelope import ReplyPublication
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.rpc.messages import Topic

A, B = Topic("openstack", "a"), Topic("openstack", "b")
REQUEST = Publication(Form.TOPIC, "openstack", "control", b"{}", None, mandatory=True)


@pytest.fixture
def events() -> list[BrokerEvent]:
    return []


@pytest.fixture
def broker(events: list[BrokerEvent], monkeypatch: pytest.MonkeyPatch) -> Broker:
    """Whose thread is behind: it has not begun."""
    monkeypatch.setattr(broker_module, "COMMANDS_MAX", 4)
    broker = Broker(BrokerConfig(hosts=(BrokerHost("localhost"),)), events.append)
    for number in range(4):
        broker.ack(Token("other", 1, number))
    return broker


def test_what_cannot_be_published_is_told_at_once(
    broker: Broker, events: list[BrokerEvent]
) -> None:
    broker.publish_heartbeat("reply_q", b"{}")  # is not missed
    broker.publish_request("vm", b"id", REQUEST)
    (sent,) = events
    assert isinstance(sent, PublishResult)
    assert not (sent.ok or sent.in_doubt)
    assert "COMMANDS_MAX" in sent.reason
    assert broker._quota._count.total() == 0
    assert len(broker._commands) == 4
    broker.stop()


def test_wishes_are_summed_up(broker: Broker, events: list[BrokerEvent]) -> None:
    broker.consume("vm", frozenset({A}))
    broker.listen_for_answers("vm")
    broker.release("vm")
    broker.consume("vm", frozenset({B}))
    broker.delete_queues("gone", frozenset({A}))
    broker.delete_queues("gone", frozenset({B}))
    broker.delete_queues("back", frozenset({A}))
    broker.listen_for_answers("back")
    for number in range(1000):
        broker.consume(f"vm{number % 3}", frozenset({A}))
    assert len(broker._commands) == 4
    assert len(broker._wishes) == 6
    broker._carry_out()
    assert broker._vms["vm"]._topics == {B}
    assert not broker._vms["vm"]._listens
    assert broker._vms["back"]._listens
    assert broker._deletions == {"gone": {A, B}}
    assert [event for event in events if isinstance(event, Released)] == [
        Released("vm", "was not consuming")
    ]
    broker.stop()


def test_a_wish_does_not_overtake_those_that_are_summed_up(broker: Broker) -> None:
    broker.consume("vm", frozenset({A}))
    broker._commands.clear()  # there is room again, and what waited has not been looked at
    broker.consume("vm", frozenset({B}))
    assert not broker._commands
    broker._carry_out()
    assert broker._vms["vm"]._topics == {B}
    broker.stop()


def test_what_ends_a_message_always_has_room(broker: Broker, events: list[BrokerEvent]) -> None:
    """There are as many of these as the broker has handed out, and no more."""
    token = Token("vm", 1, 1)
    broker.ack(token)
    broker.reject(token)
    broker.park_message(token, "queue", b"body", "broken")
    broker.complete("vm", b"id", (token,))
    assert len(broker._commands) == 8
    broker._carry_out()
    assert events == [Completed("vm", (b"id",), proven=False)]
    broker.stop()


def test_a_vm_that_is_gone_for_good_stays_so_when_wishes_are_summed_up(broker: Broker) -> None:
    broker.complete("vm", b"id", (), ReplyPublication("reply_q", b"{}"))
    broker.release("vm", for_good=True)
    broker.release("vm")
    assert broker._wishes["vm"].is_for_good
    broker._carry_out()
    assert not broker._vms
    broker.stop()
