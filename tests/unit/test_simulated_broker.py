"""The simulated broker keeps the promises that vchan.host.broker makes of guests' requests."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulate.broker import Broker, Event, HostBroker, Mail, PublishResult, Released
from tests.simulate.world import Fifo, World
from vchan.host.oslo_wire.mail import own_queue
from vchan.host.oslo_wire.upward_envelope import Form, Publication

VM = "vm0"


class Rig:
    """A broker, two hosts, and a service that listens on the control side."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.broker = Broker(self.world, prefetch=8)
        self.got: list[bytes] = []
        self.events: list[list[Event]] = [[], []]
        self.hosts = [
            HostBroker(self.world, self.broker, self.events[number].append) for number in range(2)
        ]
        service = Fifo(self.world, lambda publication: self.got.append(publication.body))
        for exchange, key in (("nova", "topic"), ("topic_fanout", ""), ("nova", "topic.info")):
            self.broker.bind(exchange, key, service)
        self.run(1.0)

    def run(self, for_s: float) -> None:
        assert self.world.run(until_s=self.world.now_s + for_s)

    def sent(self) -> list[PublishResult]:
        return [event for event in self.events[0] if isinstance(event, PublishResult)]

    def mail(self, host: int) -> list[bytes]:
        return [event.body for event in self.events[host] if isinstance(event, Mail)]


def cast(body: bytes, form: Form = Form.TOPIC, key: str = "topic") -> Publication:
    exchange = "" if form is Form.MAIL else "nova"
    return Publication(form, exchange, key, body, None, mandatory=True)


def test_each_form_arrives() -> None:
    rig = Rig(0)
    for form, key in (
        (Form.TOPIC, "topic"),
        (Form.FANOUT, "topic"),
        (Form.NOTIFY, "topic.info"),
        (Form.NOTIFY, "nobody.info"),
        (Form.TOPIC, "nobody"),
        (Form.MAIL, "nobody"),
    ):
        rig.hosts[0].publish_request(VM, key.encode(), cast(form.encode(), form, key))
    rig.run(1.0)
    assert rig.got == [b"topic", b"fanout", b"notify"]
    assert [sent.ok for sent in rig.sent()] == [True, True, True, False, False, False]
    assert [sent.unroutable for sent in rig.sent()] == [False, False, False, True, True, True]


@pytest.mark.parametrize("seed", range(50))
def test_what_is_published_is_told_once(seed: int) -> None:
    """Through lost connections: in order, and never lost when it is said to be there."""
    rig = Rig(seed)
    rig.broker.doubts = rig.broker.refuses = 0.1
    for number in range(100):
        rig.hosts[0].publish_request(VM, b"%d" % number, cast(b"%d" % number))
        if number in (20, 60):
            rig.hosts[0].cut()
        rig.run(rig.world.rng.random() * 0.3)
    rig.run(60.0)
    sent = rig.sent()
    assert Counter(event.request_id for event in sent) == {b"%d" % n: 1 for n in range(100)}
    arrived = [int(body) for body in rig.got]
    assert arrived == sorted(set(arrived))
    assert {int(event.request_id) for event in sent if event.ok} <= set(arrived)
    sure = {int(event.request_id) for event in sent if not event.ok and not event.in_doubt}
    assert not sure & set(arrived)


def test_mail_follows_the_vm() -> None:
    rig = Rig(0)
    source, destination = rig.hosts
    source.listen_for_answers(VM)
    source.listen_for_answers(VM)
    rig.run(1.0)
    destination.listen_for_answers(VM)
    for body in (b"one", b"two"):
        destination.publish_request(VM, body, cast(body, Form.MAIL, own_queue(VM)))
    rig.run(1.0)
    assert rig.mail(0) == [b"one", b"two"]
    assert rig.mail(1) == []
    (first, _) = [event for event in rig.events[0] if isinstance(event, Mail)]
    source.ack(first.token)
    rig.run(1.0)
    source.release(VM)
    rig.run(1.0)
    assert any(isinstance(event, Released) for event in rig.events[0])
    assert rig.mail(1) == [b"two"]


def test_mail_comes_again_after_a_lost_connection() -> None:
    rig = Rig(0)
    rig.hosts[0].listen_for_answers(VM)
    rig.run(1.0)
    rig.broker.answer(own_queue(VM), b"answer")
    rig.run(1.0)
    rig.hosts[0].cut()
    rig.run(60.0)
    assert rig.mail(0) == [b"answer", b"answer"]
    assert rig.world.failure is None
