"""Guests' requests at a real RabbitMQ; beyond it, oslo.messaging's own servers and listeners."""

from __future__ import annotations

import gc
import json
import queue
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import amqp
import pytest
from oslo_config import cfg

from tests.rig import rig_directory, wait_until
from tests.rig.broker_peers import TIMEOUT_S, Clients, Host, Proxy, raw_channel, through
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_rabbit
from vchan.host.broker import broker as broker_module
from vchan.host.broker import request_publisher, vm_queues
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import (
    Connected,
    Consuming,
    Delivered,
    Disconnected,
    Mail,
    PublishResult,
    Released,
    Undecodable,
)
from vchan.host.oslo_wire.mail import own_queue
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.rpc.messages import Topic

MISSING = missing_for_rabbit()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(MISSING), reason=str(MISSING)),
    # A stock client leaves its socket to the garbage collector when its connection is lost.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    with rig_directory() as directory, RabbitServer(directory / "rabbit") as server:
        yield server


@pytest.fixture(scope="module")
def clients(rabbit: RabbitServer) -> Iterator[Clients]:
    clients = Clients(rabbit.url)
    yield clients
    clients.close()
    gc.collect()


@pytest.fixture
def config(rabbit: RabbitServer) -> BrokerConfig:
    return BrokerConfig(hosts=(BrokerHost("127.0.0.1", rabbit.port),))


@pytest.fixture
def host(config: BrokerConfig) -> Iterator[Host]:
    with Host(config) as host:
        host.events.take(Connected)
        yield host


@pytest.fixture
def bare() -> Topic:
    """New for every test, like the VM; its exchange is not there."""
    unique = uuid.uuid4().hex[:8]
    return Topic(f"exchange-{unique}", f"topic-{unique}")


@pytest.fixture
def topic(rabbit: RabbitServer, bare: Topic) -> Topic:
    """Likewise; its exchange has been made by a service."""
    declare(rabbit, bare)
    return bare


@pytest.fixture
def vm() -> str:
    return str(uuid.uuid4())


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_queues, "RETRY_MIN_S", 0.1)


def to(
    topic: Topic, body: bytes = b"{}", *, server: str = "", mandatory: bool = False, **more: Any
) -> Publication:
    key = f"{topic.name}.{server}" if server else topic.name
    publication = Publication(Form.TOPIC, topic.exchange, key, body, None, mandatory)
    return publication._replace(**more)


def mail(name: str, body: bytes = b"{}") -> Publication:
    return Publication(Form.MAIL, "", name, body, None, mandatory=True)


def send(host: Host, vm: str, publication: Publication) -> PublishResult:
    """Publish, and wait for what becomes of it."""
    request_id = uuid.uuid4().bytes
    host.broker.publish_request(vm, request_id, publication)
    return host.events.take(PublishResult, vm=vm, request_id=request_id)


def envelope(**message: Any) -> bytes:
    return json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(message)}).encode()


def oslo_message(body: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(json.loads(body)["oslo.message"])
    return message


@contextmanager
def a_queue(rabbit: RabbitServer, exchange: str, key: str) -> Iterator[tuple[Any, str]]:
    """A queue of the test's own, bound to an exchange that exists."""
    with raw_channel(rabbit) as channel:
        name = channel.queue_declare(exclusive=True).queue
        channel.queue_bind(name, exchange, key)
        yield channel, name


def get(channel: Any, name: str) -> Any:
    """One message, when it comes."""
    got: list[Any] = []

    def come() -> bool:
        message = channel.basic_get(name, no_ack=True)
        if message is not None:
            got.append(message)
        return bool(got)

    wait_until(come, timeout_s=TIMEOUT_S, interval_s=0.02, failure=lambda: f"nothing in {name}")
    return got[0]


def declare(rabbit: RabbitServer, topic: Topic, **options: Any) -> None:
    options = {"durable": False, "auto_delete": False, **options}
    with raw_channel(rabbit) as channel:
        channel.exchange_declare(topic.exchange, "topic", **options)


# -------------------------------------------------------------------- as oslo.messaging does


class Endpoint:
    """Of a stock server and a stock listener: what they are told."""

    def __init__(self) -> None:
        self.told: queue.Queue[Any] = queue.Queue()

    def echo(self, context: dict[str, Any], x: Any) -> Any:
        self.told.put((context, x))
        return x

    def info(
        self, context: Any, publisher_id: str, event_type: str, payload: Any, metadata: Any
    ) -> None:
        self.told.put((publisher_id, event_type, payload, metadata))


@contextmanager
def stock_server(rabbit: RabbitServer, topic: Topic, server: str) -> Iterator[Endpoint]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import oslo_messaging

        cfg.CONF([], project="vchan-test", default_config_files=[], default_config_dirs=[])
        transport = oslo_messaging.get_rpc_transport(cfg.CONF, rabbit.url)
        target = oslo_messaging.Target(exchange=topic.exchange, topic=topic.name, server=server)
        endpoint = Endpoint()
        serving = oslo_messaging.get_rpc_server(transport, target, [endpoint], executor="threading")
        serving.start()
        try:
            yield endpoint
        finally:
            serving.stop()
            serving.wait()
            transport.cleanup()


@contextmanager
def stock_listener(rabbit: RabbitServer, topic: Topic) -> Iterator[Endpoint]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import oslo_messaging

        cfg.CONF([], project="vchan-test", default_config_files=[], default_config_dirs=[])
        transport = oslo_messaging.get_notification_transport(cfg.CONF, rabbit.url)
        target = oslo_messaging.Target(exchange=topic.exchange, topic=topic.name)
        endpoint = Endpoint()
        serving = oslo_messaging.get_notification_listener(
            transport, [target], [endpoint], executor="threading"
        )
        serving.start()
        try:
            yield endpoint
        finally:
            serving.stop()
            serving.wait()
            transport.cleanup()


def test_a_stock_server_answers_a_call(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    host.broker.listen_for_answers(vm)
    host.events.take(Consuming, vm=vm)
    msg_id = uuid.uuid4().hex
    message = {"method": "echo", "args": {"x": [1, "é"]}, "_msg_id": msg_id}
    message |= {"_reply_q": own_queue(vm), "_unique_id": msg_id, "_context_user_id": "u"}
    with stock_server(rabbit, topic, "s1") as endpoint:
        call = to(topic, envelope(**message), server="s1", mandatory=True, expiration_ms=30_000)
        assert send(host, vm, call).reason == "confirmed"
        context, x = endpoint.told.get(timeout=TIMEOUT_S)
        assert (context["user_id"], x) == ("u", [1, "é"])
        answer = host.events.take(Mail, vm=vm)
    reply = oslo_message(answer.body)
    assert (reply["_msg_id"], reply["result"], reply["ending"]) == (msg_id, [1, "é"], True)
    host.broker.ack(answer.token)
    wait_until(
        lambda: rabbit.queues()[own_queue(vm)].unacknowledged == 0,
        timeout_s=TIMEOUT_S,
        interval_s=0.1,
        failure=lambda: "not acknowledged",
    )


def test_a_fanout_reaches_stock_servers(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    body = envelope(method="echo", args={"x": 1}, _unique_id=uuid.uuid4().hex)
    fanout = to(topic, body, form=Form.FANOUT)
    # Before anybody listens there is no exchange.
    assert send(host, vm, fanout).ok
    with ExitStack() as stack:
        servers = [stack.enter_context(stock_server(rabbit, topic, f"s{n}")) for n in range(2)]
        assert send(host, vm, fanout).ok
        for endpoint in servers:
            assert endpoint.told.get(timeout=TIMEOUT_S)[1] == 1
    # The exchange went with its last queue, or will when those expire.
    with raw_channel(rabbit) as channel:
        channel.exchange_delete(f"{topic.name}_fanout")
    in_doubt = send(host, vm, fanout)
    assert not in_doubt.ok
    assert not in_doubt.unroutable
    assert "no exchange" in in_doubt.reason
    assert send(host, vm, fanout).reason == "nobody listens"


def test_a_stock_listener_gets_notifications(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    def notify(number: int) -> Publication:
        message = {"message_id": uuid.uuid4().hex, "publisher_id": "vm", "event_type": "e"}
        message |= {"priority": "INFO", "timestamp": "2024-01-01 00:00:00"}
        body = envelope(**message, payload={"n": number}, _unique_id=message["message_id"])
        key = f"{topic.name}.info"
        return Publication(Form.NOTIFY, topic.exchange, key, body, None, mandatory=False)

    unheard = send(host, vm, notify(0))
    assert (unheard.ok, unheard.unroutable) == (False, True)  # nobody has ever listened
    with stock_listener(rabbit, topic) as endpoint:
        assert send(host, vm, notify(1)).ok
        assert endpoint.told.get(timeout=TIMEOUT_S)[:3] == ("vm", "e", {"n": 1})
    assert send(host, vm, notify(2)).ok  # it waits for the listener to come back
    with stock_listener(rabbit, topic) as endpoint:
        assert endpoint.told.get(timeout=TIMEOUT_S)[2] == {"n": 2}


@pytest.mark.parametrize("what", ["cast", "call", "fanout"])
def test_messages_look_like_oslos(
    host: Host, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str, what: str
) -> None:
    server = "s1"
    publication = {
        "cast": to(topic, server=server),
        "call": to(topic, server=server, expiration_ms=round(TIMEOUT_S * 1000)),
        "fanout": to(topic, form=Form.FANOUT),
    }[what]
    exchange = f"{topic.name}_fanout" if what == "fanout" else topic.exchange
    if what == "fanout":
        with raw_channel(rabbit) as channel:
            channel.exchange_declare(exchange, "fanout", durable=False, auto_delete=True)
    with a_queue(rabbit, exchange, f"{topic.name}.{server}") as (channel, name):
        if what == "call":
            clients.call(topic, server, x=1)
        elif what == "cast":
            clients.cast(topic, server, x=1)
        else:
            clients.client(topic, fanout=True).cast({}, "note", x=1)
        stock = get(channel, name)
        assert send(host, vm, publication).ok
        ours = get(channel, name)
        if what == "call":  # or its caller would wait
            reply_q = oslo_message(stock.body.encode())["_reply_q"]
            msg_id = oslo_message(stock.body.encode())["_msg_id"]
            body = envelope(result=1, failure=None, ending=True, _msg_id=msg_id)
            assert send(host, vm, mail(reply_q, body)).ok
    assert ours.properties == stock.properties
    for field in ("exchange", "routing_key"):
        assert ours.delivery_info[field] == stock.delivery_info[field]


def test_notifications_look_like_oslos(
    host: Host, rabbit: RabbitServer, bare: Topic, vm: str
) -> None:
    """In the queue that a stock notifier has made, as a listener would."""
    notify_by_stock_means(rabbit.url, bare)
    key = f"{bare.name}.info"
    notify = Publication(Form.NOTIFY, bare.exchange, key, b"{}", None, mandatory=False)
    assert send(host, vm, notify).ok
    with raw_channel(rabbit) as channel:
        stock, ours = get(channel, key), get(channel, key)
    assert ours.properties == stock.properties
    assert ours.delivery_info["exchange"] == bare.exchange


def notify_by_stock_means(url: str, topic: Topic) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import oslo_messaging

        conf = cfg.CONF
        conf([], project="vchan-test", default_config_files=[], default_config_dirs=[])
        conf.set_override("control_exchange", topic.exchange)
        try:
            transport = oslo_messaging.get_notification_transport(conf, url)
            notifier = oslo_messaging.Notifier(
                transport, "publisher", driver="messagingv2", topics=[topic.name]
            )
            notifier.info({}, "event", {"n": 1})
            transport.cleanup()
        finally:
            conf.clear_override("control_exchange")


# -------------------------------------------------------------------- order and confirms


def test_every_vm_s_requests_stay_in_order(
    host: Host, rabbit: RabbitServer, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though more VMs publish than there are channels, and wait for what is not known yet."""
    monkeypatch.setattr(request_publisher, "LANES_MAX", 3)
    monkeypatch.setattr(request_publisher, "LOT_MAX", 5)
    vms = [str(uuid.uuid4()) for _ in range(10)]
    others = [Topic(f"{topic.exchange}-{number}", topic.name) for number in range(4)]
    names = {each: f"collect-{each.exchange}" for each in (topic, *others)}
    with raw_channel(rabbit) as channel:
        channel.queue_declare(names[topic], exclusive=True)
        channel.queue_bind(names[topic], topic.exchange, topic.name)
        for number in range(100):
            for vm in vms:
                body = f"{vm} {number}".encode()
                host.broker.publish_request(vm, b"%d" % number, to(topic, body))
                if number % 25 == 0:
                    elsewhere = to(others[number // 25], body)
                    host.broker.publish_request(vm, b"other %d" % number, elsewhere)
        sent = host.events.take_all(PublishResult, 104 * len(vms))
        assert all(event.ok for event in sent)
        assert len({(event.vm, event.request_id) for event in sent}) == len(sent)
        bodies = [get(channel, names[topic]).body.split() for _ in range(100 * len(vms))]
    for vm in vms:
        assert [int(number) for of, number in bodies if of == vm] == list(range(100))
        assert [
            int(event.request_id)
            for event in sent
            if event.vm == vm and not event.request_id.startswith(b"other")
        ] == list(range(100))
    assert len(host.broker._requests._lanes) == 3
    assert not host.broker._requests._outboxes


def test_one_without_a_queue_is_returned(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    """Others, of the same body too, are not taken for it."""
    assert send(host, vm, to(topic)).ok  # it goes nowhere, as a cast to nobody does
    with a_queue(rabbit, topic.exchange, f"{topic.name}.here") as (channel, name):
        for number in range(240):
            server = "here" if number % 3 else "nowhere"
            publication = to(topic, b"same", server=server, mandatory=number % 2 == 0)
            host.broker.publish_request(vm, b"%d" % number, publication)
        sent = {int(event.request_id): event for event in host.events.take_all(PublishResult, 240)}
        returned = {number for number, event in sent.items() if event.unroutable}
        assert returned == set(range(0, 240, 6))
        assert all(event.ok is not event.unroutable for event in sent.values())
        assert channel.queue_declare(name, passive=True).message_count == 160


def test_mail(host: Host, rabbit: RabbitServer, vm: str) -> None:
    assert send(host, vm, mail("nobody-s")).unroutable
    with raw_channel(rabbit) as channel:
        name = channel.queue_declare(exclusive=True).queue
        assert send(host, vm, mail(name, b"note")).ok
        assert get(channel, name).body == "note"


@pytest.mark.parametrize(
    "changes",
    [
        {"exchange": ""},
        {"exchange": "e" * 256},
        {"exchange": "\ud800"},
        {"routing_key": ""},
        {"routing_key": "k" * 256},
        {"form": Form.MAIL},
        {"form": Form.FANOUT, "routing_key": "t" * 250},
        {"expiration_ms": -1},
    ],
)
def test_what_the_broker_would_never_take(
    host: Host, topic: Topic, vm: str, changes: dict[str, Any]
) -> None:
    sent = send(host, vm, to(topic)._replace(**changes))
    assert not sent.ok
    assert sent.unroutable
    assert sent.reason
    assert send(host, vm, to(topic, expiration_ms=2**40)).ok
    assert not host.events.has(Disconnected)


# -------------------------------------------------------------------- one VM's troubles


def test_an_exchange_that_went_away_touches_one_vm(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    others = [str(uuid.uuid4()) for _ in range(3)]
    other_topic = Topic(f"{topic.exchange}-other", topic.name)
    declare(rabbit, other_topic)
    for each in (vm, *others):
        assert send(host, each, to(topic)).ok
        assert send(host, each, to(other_topic)).ok
    with raw_channel(rabbit) as channel:
        channel.exchange_delete(topic.exchange)
    for number in range(50):
        for each in others:
            host.broker.publish_request(each, b"%d" % number, to(other_topic))
    gone = send(host, vm, to(topic))
    assert not gone.ok
    assert not gone.unroutable
    assert "no exchange" in gone.reason
    assert all(event.ok for event in host.events.take_all(PublishResult, 150))
    assert send(host, vm, to(topic, mandatory=True)).unroutable  # it is not made again
    declare(rabbit, topic)
    assert send(host, vm, to(topic)).reason == "confirmed"
    assert not host.events.has(Disconnected)


@pytest.mark.parametrize("durable", [False, True])
def test_an_exchange_is_taken_as_others_declared_it(
    host: Host, rabbit: RabbitServer, bare: Topic, vm: str, durable: bool
) -> None:
    topic = bare
    declare(rabbit, topic, durable=durable, auto_delete=not durable)
    with a_queue(rabbit, topic.exchange, topic.name) as (channel, name):
        assert send(host, vm, to(topic, b"one")).ok
        assert get(channel, name).body == "one"


def test_an_exchange_that_is_not_there(
    host: Host, rabbit: RabbitServer, bare: Topic, vm: str
) -> None:
    """Nobody listens, and nothing is made for a guest to talk to; a service that comes is found."""
    for exchange in (bare.exchange, "amq.forbidden"):
        gone = send(host, vm, to(Topic(exchange, "t"), mandatory=True))
        assert (gone.ok, gone.unroutable, gone.in_doubt) == (False, True, False)
    declare(rabbit, bare)
    with a_queue(rabbit, bare.exchange, bare.name) as (channel, name):
        assert send(host, vm, to(bare, b"one", mandatory=True)).ok
        assert get(channel, name).body == "one"
    assert not host.events.has(Disconnected)


def test_a_queue_of_notifications_is_taken_as_others_declared_it(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    name = f"{topic.name}.info"
    notify = Publication(Form.NOTIFY, topic.exchange, name, b"one", None, mandatory=False)
    with raw_channel(rabbit) as channel:
        channel.queue_declare(name, durable=True, arguments={"x-max-length": 7})
        channel.queue_bind(name, topic.exchange, name)
        assert send(host, vm, notify).ok
        assert get(channel, name).body == "one"
        # Somebody deletes it: that is noticed, though it was known to be there.
        channel.queue_delete(name)
        for _ in range(2):
            lost = send(host, vm, notify)
            assert (lost.ok, lost.unroutable) == (False, True)
        channel.queue_declare(name, durable=True, auto_delete=False)
        channel.queue_bind(name, topic.exchange, name)
        assert send(host, vm, notify).ok
        assert get(channel, name).body == "one"


def test_a_queue_that_somebody_holds_does_not_hold_up_its_publisher(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    """Nobody tells us how it is: what is published comes back if it goes nowhere."""
    name = f"{topic.name}.info"
    notify = Publication(Form.NOTIFY, topic.exchange, name, b"one", None, mandatory=False)
    with raw_channel(rabbit) as channel:
        channel.queue_declare(name, exclusive=True)
        assert send(host, vm, notify).unroutable
        channel.queue_bind(name, topic.exchange, name)
        assert send(host, vm, notify).ok
        assert get(channel, name).body == "one"


def test_without_a_channel(host: Host, topic: Topic, vm: str) -> None:
    link = host.broker.link
    assert link is not None
    other = str(uuid.uuid4())
    assert send(host, vm, to(topic)).ok
    channels_max, link.amqp.channel_max = link.amqp.channel_max, 2  # replies', and one
    assert send(host, other, to(topic)).ok  # it is lent to another VM
    host.broker.loop.call_soon_threadsafe(host.broker._requests._lanes.pop().close)
    host.broker.loop.call_soon_threadsafe(host.broker._requests._idle.clear)
    link.amqp.channel_max = 1
    for each in (vm, other):
        refused = send(host, each, to(topic))
        assert not refused.ok
        assert "no AMQP channel left" in refused.reason
    link.amqp.channel_max = channels_max
    assert send(host, vm, to(topic)).ok


def test_idle_channels_are_closed(
    config: BrokerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_publisher, "LANE_IDLE_S", 0.2)
    monkeypatch.setattr(broker_module, "WATCH_S", 0.1)
    with Host(config) as host:
        host.events.take(Connected)
        for _ in range(3):
            host.broker.publish_request(str(uuid.uuid4()), b"", to(topic))
        assert all(event.ok for event in host.events.take_all(PublishResult, 3))
        link = host.broker.link
        assert link is not None
        wait_until(
            lambda: len(link.amqp.channels) == 2,  # 0, and the one for replies
            timeout_s=TIMEOUT_S,
            interval_s=0.05,
            failure=lambda: str(link.amqp.channels),
        )
        assert send(host, "vm", to(topic)).ok


# -------------------------------------------------------------------- losses and limits


def test_without_a_broker(config: BrokerConfig, topic: Topic, vm: str) -> None:
    with Host(replace(config, hosts=(BrokerHost("127.0.0.1", 1),))) as host:
        host.events.take(Disconnected)
        sent = send(host, vm, to(topic))
        assert (sent.ok, sent.unroutable, sent.reason) == (False, False, "not connected")


def test_what_was_on_its_way_is_in_doubt(config: BrokerConfig, topic: Topic, vm: str) -> None:
    (node,) = config.hosts
    other = str(uuid.uuid4())
    with Proxy(node.port) as proxy, Host(through(proxy, config, heartbeat_s=1)) as host:
        host.events.take(Connected)
        assert send(host, vm, to(topic)).ok
        proxy.pull_the_cable()
        # One on its way, one that waits for its exchange, and one behind that.
        for each in (to(topic), to(Topic("new", "t")), to(topic)):
            host.broker.publish_request(vm, b"id", each)
        host.broker.publish_request(other, b"id", to(topic))
        host.events.take(Disconnected)
        lost = host.events.take_all(PublishResult, 4)
        assert not any(event.ok or event.unroutable for event in lost)
        assert all("silent" in event.reason for event in lost)
        proxy.plug_it_in()
        wait_until(
            lambda: send(host, vm, to(topic)).ok,
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: "not connected again",
        )
        host.events.assert_quiet(PublishResult)


def test_a_broker_that_does_not_confirm(
    config: BrokerConfig, topic: Topic, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_publisher, "CONFIRM_TIMEOUT_S", 0.5)
    monkeypatch.setattr(broker_module, "WATCH_S", 0.1)
    (node,) = config.hosts
    with Proxy(node.port) as proxy, Host(through(proxy, config)) as host:
        host.events.take(Connected)
        assert send(host, vm, to(topic)).ok
        proxy.pull_the_cable()
        sent = send(host, vm, to(topic))
        assert not sent.ok
        assert "did not confirm" in sent.reason
        proxy.plug_it_in()
        assert send(host, vm, to(topic)).ok
        host.events.assert_quiet(PublishResult)
        assert not host.events.has(Disconnected)


def test_an_alarm_blocks(host: Host, rabbit: RabbitServer, topic: Topic, vm: str) -> None:
    assert send(host, vm, to(topic)).ok
    rabbit.ctl("set_vm_memory_high_watermark", "0")
    try:
        host.broker.publish_request(vm, b"first", to(topic))
        wait_until(
            lambda: "memory" in host.broker._requests._blocked,
            timeout_s=TIMEOUT_S,
            interval_s=0.05,
            failure=lambda: "never blocked",
        )
        sent = send(host, vm, to(topic))
        assert not sent.ok
        assert "memory" in sent.reason
    finally:
        rabbit.ctl("set_vm_memory_high_watermark", "0.4")
    assert host.events.take(PublishResult, request_id=b"first").ok


def test_limits(host: Host, topic: Topic, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(body: bytes = b"x") -> str:
        sent = send(host, vm, to(topic, body))
        assert not sent.ok
        assert not sent.unroutable
        return sent.reason

    assert send(host, vm, to(topic)).ok
    monkeypatch.setattr(request_publisher, "VM_REQUESTS_BYTES_MAX", 100)
    assert "(VM_REQUESTS_BYTES_MAX)" in refused(b"x" * 101)
    monkeypatch.setattr(request_publisher, "REQUESTS_BYTES_MAX", 50)
    assert "(REQUESTS_BYTES_MAX)" in refused(b"x" * 51)
    monkeypatch.setattr(request_publisher, "VM_REQUESTS_MAX", 0)
    assert "(VM_REQUESTS_MAX)" in refused()
    monkeypatch.setattr(request_publisher, "REQUESTS_MAX", 0)
    assert "(REQUESTS_MAX)" in refused()


def test_what_is_counted_is_given_back(
    config: BrokerConfig, topic: Topic, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "COMMANDS_MAX", 10)
    host = Host(config)
    for number in range(10):
        host.broker.publish_request(vm, b"%d" % number, to(topic, b"x" * 10))
    host.broker.publish_request(vm, b"10", to(topic, b"x" * 10))
    assert "COMMANDS_MAX" in host.events.take(PublishResult, request_id=b"10").reason
    with host:
        host.events.take_all(PublishResult, 10)
        host.events.take(Connected)
        assert send(host, vm, to(topic)).ok
    quota = host.broker._quota
    assert (quota._count.total(), quota._bytes.total(), quota._total_bytes) == (0, 0, 0)
    assert not quota._count


def test_publishing_from_many_threads(host: Host, topic: Topic) -> None:
    def publish(vm: str) -> None:
        for number in range(100):
            host.broker.publish_request(vm, b"%d" % number, to(topic))

    threads = [threading.Thread(target=publish, args=(f"vm-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    assert all(event.ok for event in host.events.take_all(PublishResult, 800))
    for thread in threads:
        thread.join()


# -------------------------------------------------------------------- the VM's own queue


def test_mail_follows_the_vm(config: BrokerConfig, vm: str) -> None:
    """In order, to one host at a time; what was not acknowledged goes to the next."""
    with Host(config) as source, Host(config) as destination:
        source.broker.listen_for_answers(vm)
        source.broker.listen_for_answers(vm)
        source.events.take(Consuming, vm=vm)
        source.events.assert_quiet(Consuming)
        for number in range(3):
            assert send(source, "other", mail(own_queue(vm), b"%d" % number)).ok
        held = source.events.take_all(Mail, 3)
        assert [(event.vm, event.body) for event in held] == [(vm, b"0"), (vm, b"1"), (vm, b"2")]
        destination.broker.listen_for_answers(vm)
        destination.events.take(Consuming, vm=vm)
        assert send(source, vm, mail(own_queue(vm), b"3")).ok
        assert source.events.take(Mail).body == b"3"
        destination.events.assert_quiet(Mail)
        source.broker.ack(held[0].token)
        source.broker.release(vm)
        source.events.take(Released, vm=vm)
        assert [event.body for event in destination.events.take_all(Mail, 3)] == [b"1", b"2", b"3"]
        source.broker.ack(held[1].token)  # its channel is gone: nothing
        source.events.assert_quiet(Released)


def test_topics_and_the_own_queue_share_a_channel(
    host: Host, clients: Clients, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    clients.cast(topic, vm, x=1)
    held = host.events.take(Delivered)
    host.broker.listen_for_answers(vm)  # the channel stays open
    host.events.take(Consuming, vm=vm)
    assert send(host, vm, mail(own_queue(vm), b"one")).ok
    one = host.events.take(Mail)
    assert one.token.generation == held.token.generation
    assert not host.events.has(Released)
    host.broker.ack(held.token)
    host.broker.ack(one.token)
    host.broker.consume(vm, frozenset())  # no topics: its own queue is left
    host.events.take(Released, vm=vm)
    host.events.take(Consuming, vm=vm)
    assert send(host, vm, mail(own_queue(vm), b"two")).ok
    assert host.events.take(Mail).body == b"two"
    host.consume(vm, topic)
    clients.cast(topic, vm, x=2)
    assert host.numbers(1) == [2]
    host.broker.release(vm)
    host.events.take(Released, vm=vm)
    assert not host.broker._vms


def test_the_own_queue_outlives_a_lost_connection(
    host: Host, rabbit: RabbitServer, vm: str
) -> None:
    host.broker.listen_for_answers(vm)
    host.events.take(Consuming, vm=vm)
    assert send(host, vm, mail(own_queue(vm), b"one")).ok
    first = host.events.take(Mail)
    rabbit.kill_connections()
    host.events.take(Released, vm=vm)
    host.events.take(Consuming, vm=vm)
    again = host.events.take(Mail)
    assert (again.body, again.token) != (first.body, first.token)
    assert again.body == b"one"


def test_listening_before_there_is_a_broker(
    config: BrokerConfig, rabbit: RabbitServer, vm: str
) -> None:
    host = Host(config)
    host.broker.listen_for_answers(vm)
    with host:
        host.events.take(Consuming, vm=vm)
        assert send(host, vm, mail(own_queue(vm))).ok
        host.events.take(Mail)


def test_mail_that_is_damaged(host: Host, rabbit: RabbitServer, vm: str) -> None:
    host.broker.listen_for_answers(vm)
    host.events.take(Consuming, vm=vm)
    message = amqp.Message(b"{}", application_headers={"compression": "application/x-gzip"})
    with raw_channel(rabbit) as channel:
        channel.basic_publish(message, routing_key=own_queue(vm))
    assert "compression" in host.events.take(Undecodable, vm=vm).reason


@pytest.mark.parametrize(
    ("quorum", "fanout_quorum"), [(False, False), (True, False), (False, True)]
)
def test_the_own_queue_s_arguments(
    config: BrokerConfig, rabbit: RabbitServer, vm: str, quorum: bool, fanout_quorum: bool
) -> None:
    with Host(replace(config, quorum=quorum, fanout_quorum=fanout_quorum)) as host:
        host.broker.listen_for_answers(vm)
        host.events.take(Consuming, vm=vm)
    rows = json.loads(
        rabbit.ctl("list_queues", "--formatter", "json", "name", "durable", "type", "arguments")
    )
    (row,) = [row for row in rows if row["name"] == own_queue(vm)]
    assert row["durable"]
    assert (row["type"] == "quorum") is (quorum or fanout_quorum)
    arguments = {name: value for name, _, value in row["arguments"]}
    assert arguments["x-expires"] == 1800 * 1000
    assert arguments["x-single-active-consumer"]


def test_deletion_takes_the_own_queue(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    host.broker.listen_for_answers(vm)
    host.consume(vm, topic)
    host.broker.release(vm)
    host.events.take(Released, vm=vm)
    assert send(host, vm, mail(own_queue(vm))).ok  # a note that nobody will read
    host.broker.delete_queues(vm, frozenset({topic}))
    wait_until(
        lambda: not any(vm in name for name in rabbit.queues()),
        timeout_s=TIMEOUT_S,
        interval_s=0.1,
        failure=lambda: "queues are left",
    )
