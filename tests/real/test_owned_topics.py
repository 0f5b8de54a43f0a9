"""Topics that belong to one VM: what names no server, at a real RabbitMQ, with stock peers."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
import time
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from oslo_config import cfg

from tests.rig import rig_directory, wait_until
from tests.rig.broker_peers import TIMEOUT_S, Clients, Host, raw_channel
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_rabbit
from tests.rig.service_guest import ROOT, VM, ServiceGuest, block_of_page
from vchan.host.broker import vm_queues
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import Consuming, Delivered, Released, Troubled
from vchan.host.oslo_wire.downward_envelope import ReplyPublication, encode_reply
from vchan.rpc.arguments import PRIORITIES
from vchan.rpc.messages import Topic

MISSING = missing_for_rabbit()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

CASTS = 40
PREFETCH = 8
"""What the first host holds while the second wants the queue."""


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    with rig_directory() as directory, RabbitServer(directory / "rabbit") as server:
        yield server


@pytest.fixture
def clients(rabbit: RabbitServer) -> Iterator[Clients]:
    clients = Clients(rabbit.url)
    yield clients
    cfg.CONF.clear_override("rabbit_quorum_queue", "oslo_messaging_rabbit")
    cfg.CONF.clear_override("amqp_auto_delete", "oslo_messaging_rabbit")
    clients.close()


@pytest.fixture(params=["classic", "quorum"])
def config(request: pytest.FixtureRequest, rabbit: RabbitServer, clients: Clients) -> BrokerConfig:
    is_quorum = request.param == "quorum"
    clients.client(Topic("x", "y"))  # registers the options
    cfg.CONF.set_override("rabbit_quorum_queue", is_quorum, "oslo_messaging_rabbit")
    hosts = (BrokerHost("127.0.0.1", rabbit.port),)
    return BrokerConfig(hosts=hosts, quorum=is_quorum, durable=is_quorum, prefetch=PREFETCH)


@pytest.fixture
def topic() -> Topic:
    return Topic(f"exchange-{uuid.uuid4().hex[:8]}", f"guestagent.{uuid.uuid4()}")


@pytest.fixture
def vm() -> str:
    return str(uuid.uuid4())


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_queues, "RETRY_MIN_S", 0.1)


def make_as_trove_does(rabbit: RabbitServer, topic: Topic) -> None:
    """A stock server is started and stopped, so that the queue is there before the guest is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import oslo_messaging

        transport = oslo_messaging.get_rpc_transport(cfg.CONF, rabbit.url)
        target = oslo_messaging.Target(
            exchange=topic.exchange, topic=topic.name, server=topic.name.partition(".")[2]
        )
        server = oslo_messaging.get_rpc_server(transport, target, [], executor="threading")
        server.start()
        server.stop()
        server.wait()
        transport.cleanup()


def cast(clients: Clients, topic: Topic, numbers: range) -> None:
    client = clients.client(topic)
    for number in numbers:
        client.cast({}, "note", x=number)


def problems(host: Host) -> Iterator[str]:
    """What the host says of its VM until it is content, or said once."""
    while True:
        told = host.events.take(Troubled).problems
        yield " ".join(told)
        if not told:
            return


def take(host: Host, count: int) -> list[Any]:
    """So many casts, each acknowledged."""
    numbers = []
    for _ in range(count):
        delivered = host.events.take(Delivered)
        numbers.append(delivered.request.args["x"])
        host.broker.complete(delivered.vm, delivered.request.id, (delivered.token,), None)
    return numbers


def test_what_a_service_left_before_the_guest_was_there_comes_first(
    config: BrokerConfig, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    make_as_trove_does(rabbit, topic)
    cast(clients, topic, range(3))
    with Host(config) as host:
        host.consume(vm, topic, own=True)
        cast(clients, topic, range(3, 6))
        assert take(host, 6) == list(range(6))
        call = clients._threads.submit(
            clients.client(topic, timeout=TIMEOUT_S).call, {}, "echo", x="called"
        )
        delivered = host.events.take(Delivered)
        assert (delivered.topic, delivered.fanout) == (topic, False)
        request = delivered.request
        assert request.msg_id is not None and request.reply_q is not None
        reply = ReplyPublication(request.reply_q, encode_reply(request.msg_id, result_json=b"7"))
        host.broker.complete(vm, request.id, (delivered.token,), reply)
        assert call.result(TIMEOUT_S) == 7
        assert not any(problems(host))


def test_a_service_declares_the_queue_after_the_host(
    config: BrokerConfig, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    with Host(config) as host:
        host.consume(vm, topic, own=True)
        make_as_trove_does(rabbit, topic)
        cast(clients, topic, range(3))
        assert take(host, 3) == [0, 1, 2]


def test_two_hosts_of_a_migration_keep_the_order_and_run_nothing_twice(
    config: BrokerConfig, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    make_as_trove_does(rabbit, topic)
    with Host(config) as first, Host(config) as second:
        first.consume(vm, topic, own=True)
        cast(clients, topic, range(CASTS))
        assert take(first, 5) == list(range(5))
        second.broker.listen_for_answers(vm)  # on the same channel, and before: as a guest arrives
        second.broker.consume(vm, frozenset({topic}), frozenset({topic}))
        # It is told whose it is, and tries again.
        assert "another host" in next(filter(None, problems(second)))
        held = first.events.take_all(Delivered, PREFETCH)
        assert [each.request.args["x"] for each in held] == list(range(5, 5 + PREFETCH))
        second.events.assert_quiet(Delivered, 1.0)
        first.broker.release(vm)
        first.events.take(Released)
        assert take(second, CASTS - 5) == list(range(5, CASTS))
        second.events.take(Consuming)


def test_the_queue_is_back_and_forth_often(
    config: BrokerConfig, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    make_as_trove_does(rabbit, topic)
    rounds, each = 12, 3
    cast(clients, topic, range(rounds * each + 2 * PREFETCH))
    with Host(config) as first, Host(config) as second:
        came: list[Any] = []
        for number in range(rounds):
            host, other = (first, second) if number % 2 else (second, first)
            host.broker.consume(vm, frozenset({topic}), frozenset({topic}))
            came += take(host, each)
            other.broker.consume(vm, frozenset({topic}), frozenset({topic}))
            time.sleep(0.05)
            host.broker.release(vm)
            host.events.take(Released)
            while host.events.has(Delivered):  # of what it has given back
                host.events.take(Delivered)
        assert came == list(range(rounds * each))


def test_the_queues_of_a_vm_that_is_no_more_go(
    config: BrokerConfig, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    with Host(config) as host:
        host.consume(vm, topic, own=True)
        assert topic.name in rabbit.queues()
        host.broker.release(vm, for_good=True)
        host.events.take(Released)
        host.broker.delete_queues(vm, frozenset({topic}))

        def are_gone() -> bool:
            return not [name for name in rabbit.queues() if name.startswith(topic.name)]

        wait_until(
            are_gone, timeout_s=TIMEOUT_S, interval_s=0.5, failure=lambda: str(rabbit.queues())
        )


def test_a_queue_that_would_delete_itself_is_refused_and_said_so(
    clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    with raw_channel(rabbit) as channel:
        channel.queue_declare(topic.name, auto_delete=True, durable=False)
    config = BrokerConfig(hosts=(BrokerHost("127.0.0.1", rabbit.port),))
    with Host(config) as host:
        host.broker.consume(vm, frozenset({topic}), frozenset({topic}))
        problem = next(filter(None, problems(host)))
        assert "auto_delete" in problem and "is not used" in problem and topic.name in problem
        host.events.take(Consuming)
        clients.cast(topic, vm, x=1)  # what names the VM comes all the same
        assert take(host, 1) == [1]


def test_a_queue_of_another_type_is_used_and_said_so(
    clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    with raw_channel(rabbit) as channel:
        arguments = {"x-queue-type": "quorum"}
        channel.queue_declare(topic.name, auto_delete=False, durable=True, arguments=arguments)
    config = BrokerConfig(hosts=(BrokerHost("127.0.0.1", rabbit.port),))
    with Host(config) as host:
        host.consume(vm, topic, own=True)
        problem = next(filter(None, problems(host)))
        assert "declared otherwise" in problem and topic.name in problem
        cast(clients, topic, range(3))
        assert take(host, 3) == [0, 1, 2]


def test_a_stock_notifier_reaches_a_stock_listener_in_the_vm(rabbit: RabbitServer) -> None:
    """docs/oslo.md's example: the notifier is first, and then not. What `listen_topics` lets the
    listener have besides is denied at no priority."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import oslo_messaging
    vm_uuid, heard = VM, Heard()
    policy = block_of_page("oslo.md", "/etc/vchan/policy.d/50-alerts.policy")
    with rig_directory() as directory, contextlib.ExitStack() as stack:
        guest = ServiceGuest(directory, rabbit)

        def transport_of(url: str) -> Any:
            transport = oslo_messaging.get_notification_transport(cfg.CONF, url)
            stack.callback(transport.cleanup)
            return transport

        names = {"oslo_messaging": oslo_messaging, "vm_uuid": vm_uuid, "endpoint": heard}
        here = names | {"transport": transport_of(rabbit.url)}
        cfg.CONF.set_override(
            "control_exchange", "nova"
        )  # which the first transport has registered
        stack.callback(cfg.CONF.clear_override, "control_exchange")
        exec(example("notifier = "), here)
        notifier = here["notifier"]
        stack.enter_context(guest.guest_daemon())
        stack.enter_context(guest.host("one", {"50-alerts": policy}, "listen_topics = nova/news"))
        there = names | {"transport": transport_of(f"vchan://{guest.agent_socket}")}
        exec(example("target = "), there)
        news = oslo_messaging.Target(exchange="nova", topic="news")
        every = oslo_messaging.get_notification_listener(
            there["transport"], [news], [Everything()], executor="threading"
        )
        for listener in (there["listener"], every):
            listener.start()
            stack.callback(listener.wait)
            stack.callback(listener.stop)
        guest.wait_for(lambda: len(heard.events) == 1)
        notifier.info({}, "disk.empty", {"free": 7})
        guest.wait_for(lambda: len(heard.events) == 2)
        assert heard.events == [("disk.full", {"free": 0}), ("disk.empty", {"free": 7})]
        status = json.loads(guest.cli("one", "--json", "status", VM))
        assert status["requests"]["denied_topics"] == []
        every_priority = {f"nova/news.{name}" for name in PRIORITIES}
        assert set(status["requests"]["topics"]) == {f"nova/alerts.{VM}.info"} | every_priority


class Heard:
    """The example's endpoint."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def info(self, ctxt: Any, publisher: str, event: str, payload: Any, metadata: Any) -> None:
        self.events.append((event, payload))


Everything = type("Everything", (), dict.fromkeys(PRIORITIES, Heard.info))
"""An endpoint that wants all priorities."""


def example(begin: str) -> str:
    """The lines of the page from this one on."""
    page = (ROOT / "docs" / "oslo.md").read_text()
    found = re.search(rf"^    {begin}.*\n(?:    .*\n)*", page, re.MULTILINE)
    assert found is not None, begin
    return textwrap.dedent(found[0])
