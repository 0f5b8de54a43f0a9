"""vchan.host.broker against a real RabbitMQ, with oslo.messaging's own clients beyond it."""

import contextlib
import gc
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import amqp
import pytest
from amqp import spec

from tests.rig import rig_directory, wait_until
from tests.rig.broker_load import (
    Gathered,
    Guests,
    Load,
    Publishing,
    assert_nothing_lost,
    consume_all,
)
from tests.rig.broker_peers import (
    TIMEOUT_S,
    Clients,
    Host,
    Proxy,
    raw_channel,
    through,
    wait_for_queue,
)
from tests.rig.rabbit import RabbitServer
from vchan.host.broker import amqp as amqp_link
from vchan.host.broker import broker as broker_module
from vchan.host.broker import (
    completions,
    reply_publisher,
    request_publisher,
    topology,
    vm_queues,
)
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import (
    Completed,
    Connected,
    Consuming,
    Delivered,
    Disconnected,
    GivenUp,
    Released,
    RepliesRefused,
    Token,
    Undecodable,
)
from vchan.host.oslo_wire.downward_envelope import ReplyPublication, encode_reply
from vchan.rpc.messages import Topic

pytestmark = [
    pytest.mark.real,
    # A stock client leaves its socket to the garbage collector when its connection is lost. Our own
    # are counted, in test_stop_leaves_nothing.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
    ),
]

# -------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    with rig_directory() as directory, RabbitServer(directory / "rabbit") as server:
        yield server


@pytest.fixture(scope="module")
def clients(rabbit: RabbitServer) -> Iterator[Clients]:
    clients = Clients(rabbit.url)
    yield clients
    clients.close()
    gc.collect()  # what they left, see above


@pytest.fixture
def config(rabbit: RabbitServer) -> BrokerConfig:
    return BrokerConfig(hosts=(BrokerHost("127.0.0.1", rabbit.port),))


@pytest.fixture
def host(config: BrokerConfig) -> Iterator[Host]:
    with Host(config) as host:
        yield host


@pytest.fixture
def topic() -> Topic:
    """New for every test, like the VM."""
    return Topic("openstack", f"topic-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def vm() -> str:
    return str(uuid.uuid4())


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_queues, "RETRY_MIN_S", 0.1)
    monkeypatch.setattr(reply_publisher, "REOPEN_S", 0.1)


# -------------------------------------------------------------------- requests


def test_a_call_is_answered(
    host: Host, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    answer = clients.call(topic, vm, x={"deep": [1, "é"]})
    delivered = host.events.take(Delivered)
    assert (delivered.vm, delivered.topic) == (vm, topic)
    assert (delivered.fanout, delivered.redelivered) == (False, False)
    request = delivered.request
    assert request.is_call
    assert (request.method, request.args) == ("echo", {"x": {"deep": [1, "é"]}})
    assert request.timeout_s == TIMEOUT_S
    assert request.context["request_id"] == "req-1"
    wait_for_queue(rabbit, f"{topic.name}.{vm}", ready=0, unacknowledged=1)
    host.answer(delivered, request.args["x"])
    assert answer.result(TIMEOUT_S) == {"deep": [1, "é"]}
    wait_for_queue(rabbit, f"{topic.name}.{vm}", ready=0, unacknowledged=0)


def test_a_large_call(host: Host, clients: Clients, topic: Topic, vm: str) -> None:
    text = "x" * 3_000_000
    host.consume(vm, topic)
    answer = clients.call(topic, vm, x=text)
    host.answer(host.events.take(Delivered), text)
    assert answer.result(TIMEOUT_S) == text


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "lzma"])
def test_a_request_that_its_service_compresses(
    host: Host, clients: Clients, topic: Topic, vm: str, compression: str
) -> None:
    host.consume(vm, topic)
    client = clients.client(topic, f"?kombu_compression={compression}", server=vm)
    client.cast({}, "note", x="x" * 100_000)
    delivered = host.events.take(Delivered)
    assert delivered.request.args == {"x": "x" * 100_000}
    assert b"xxxx" in delivered.body


def test_a_heartbeat_keeps_a_monitored_call(
    host: Host, clients: Clients, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    client = clients.client(topic, server=vm, timeout=TIMEOUT_S, call_monitor_timeout=3)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(client.call, {}, "echo", x=1)
        delivered = host.events.take(Delivered)
        request = delivered.request
        assert request.monitor_timeout_s == 3.0
        assert request.msg_id is not None and request.reply_q is not None
        for _ in range(9):
            body = encode_reply(request.msg_id, ending=False, unique_id=uuid.uuid4().hex)
            host.broker.publish_heartbeat(request.reply_q, body)
            time.sleep(0.4)
        host.answer(delivered, 7)
        assert answer.result(TIMEOUT_S) == 7


def test_casts_and_fanouts(host: Host, clients: Clients, topic: Topic, vm: str) -> None:
    other = str(uuid.uuid4())
    host.consume(vm, topic)
    host.consume(other, topic)
    clients.cast(topic, vm, x=1)
    cast = host.events.take(Delivered)
    assert (cast.vm, cast.fanout, cast.request.is_call) == (vm, False, False)
    clients.client(topic, fanout=True).cast({}, "note", x=2)
    copies = host.events.take_all(Delivered, 2)
    assert {copy.vm for copy in copies} == {vm, other}
    assert all(copy.fanout and copy.topic == topic for copy in copies)
    assert len({copy.request.id for copy in copies}) == 1


def test_a_topic_of_two_exchanges(host: Host, clients: Clients, topic: Topic, vm: str) -> None:
    twin = Topic("other-exchange", topic.name)
    host.consume(vm, topic, twin)
    for each in (topic, twin):
        clients.cast(each, vm, x=1)
        delivered = host.events.take(Delivered)
        assert delivered.topic == each
        host.broker.ack(delivered.token)
    host.events.assert_quiet(Delivered)


def test_what_is_no_request_is_rejected(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    queue = f"{topic.name}.{vm}"
    compressed = amqp.Message(b"{}", application_headers={"compression": "application/x-gzip"})
    with raw_channel(rabbit) as channel:
        for message in (amqp.Message(b"\xff"), amqp.Message(b""), compressed):
            channel.basic_publish(message, routing_key=queue)
    bad = host.events.take_all(Undecodable, 3)
    assert "not JSON" in bad[0].reason
    assert "not what compression application/x-gzip makes" in bad[2].reason
    wait_for_queue(rabbit, queue, ready=0, unacknowledged=3)
    for event in bad:
        host.broker.reject(event.token)
    wait_for_queue(rabbit, queue, ready=0, unacknowledged=0)
    host.events.assert_quiet(Undecodable)


def test_prefetch_bounds_what_a_vm_holds(
    config: BrokerConfig, clients: Clients, topic: Topic, vm: str
) -> None:
    with Host(replace(config, prefetch=3)) as host:
        host.consume(vm, topic)
        for x in range(6):
            clients.cast(topic, vm, x=x)
        held = host.events.take_all(Delivered, 3)
        host.events.assert_quiet(Delivered)
        host.broker.ack(held[0].token)
        assert host.numbers(1) == [3]
        host.events.assert_quiet(Delivered)


# -------------------------------------------------------------------- handing over


@pytest.mark.parametrize("quorum", [False, True], ids=["classic", "quorum"])
def test_another_host_takes_over_in_order(
    config: BrokerConfig, clients: Clients, topic: Topic, vm: str, quorum: bool
) -> None:
    config = replace(config, quorum=quorum, fanout_quorum=quorum, prefetch=8)
    query = "?rabbit_transient_quorum_queue=true" if quorum else ""
    with Host(config) as source, Host(config) as destination:
        source.consume(vm, topic)
        destination.consume(vm, topic)
        for x in range(20):
            clients.cast(topic, vm, x=x)
        fanout = clients.client(topic, query, fanout=True)
        for x in range(100, 103):
            fanout.cast({}, "note", x=x)
        held = source.events.take_all(Delivered, 11)
        assert sorted(event.request.args["x"] for event in held) == [*range(8), *range(100, 103)]
        source.events.assert_quiet(Delivered)
        destination.events.assert_quiet(Delivered)  # though it has been consuming all along

        done = [event for event in held if event.request.args["x"] in (0, 1, 2, 100)]
        for event in done:
            source.broker.ack(event.token)
        source.broker.release(vm)
        assert source.events.take(Released).reason == "released"

        got: list[Any] = []
        while len(got) < 19:
            event = destination.events.take(Delivered)
            got.append(event.request.args["x"])
            destination.broker.ack(event.token)
        taken = {x for x in got if x not in {e.request.args["x"] for e in done}}
        assert taken == {*range(3, 20), 101, 102}
        assert [x for x in got if x < 100][-17:] == list(range(3, 20))
        assert [x for x in got if x >= 100] == [101, 102]
        source.events.assert_quiet(Released)


def test_the_second_host_answers_the_first_ones_call(
    config: BrokerConfig, clients: Clients, topic: Topic, vm: str
) -> None:
    with Host(config) as source, Host(config) as destination:
        source.consume(vm, topic)
        answer = clients.call(topic, vm, x=1)
        first = source.events.take(Delivered)
        destination.consume(vm, topic)
        source.broker.release(vm)
        second = destination.events.take(Delivered)
        assert second.redelivered
        assert second.request.id == first.request.id
        destination.answer(second, "from the destination")
        assert answer.result(TIMEOUT_S) == "from the destination"


def test_release_and_consume_again(host: Host, clients: Clients, topic: Topic, vm: str) -> None:
    host.consume(vm, topic)
    clients.cast(topic, vm, x=1)
    first = host.events.take(Delivered)
    host.broker.release(vm)
    host.broker.consume(vm, frozenset({topic}))
    host.broker.ack(first.token)  # too late: it is dead
    host.events.take(Released, vm=vm)
    second = host.events.take(Delivered)
    assert second.redelivered
    assert second.token.generation > first.token.generation
    host.broker.ack(second.token)
    host.events.assert_quiet(Released)


def test_release_of_a_vm_that_does_not_consume(host: Host, vm: str) -> None:
    host.events.take(Connected)
    host.broker.release(vm)
    assert host.events.take(Released) == Released(vm, "was not consuming")


def test_topics_come_and_go(host: Host, clients: Clients, topic: Topic, vm: str) -> None:
    more = Topic(topic.exchange, f"{topic.name}-more")
    host.consume(vm, topic)
    clients.cast(topic, vm, x=1)
    held = host.events.take(Delivered)
    host.consume(vm, topic, more)  # an addition leaves the channel alone
    assert not host.events.has(Released)
    clients.cast(more, vm, x=2)
    host.broker.ack(host.events.take(Delivered, topic=more).token)
    host.broker.consume(vm, frozenset({topic, more}))
    host.events.assert_quiet(Consuming)  # nothing new
    host.consume(vm, topic)
    host.events.take(Released, vm=vm)
    assert host.events.take(Delivered).request.id == held.request.id
    clients.cast(more, vm, x=3)
    host.events.assert_quiet(Delivered)
    host.broker.consume(vm, frozenset())
    host.events.take(Released, vm=vm)


def test_names_that_cannot_be(host: Host, clients: Clients, topic: Topic, vm: str) -> None:
    names = ["", "#", "a.*", "a.#.b", "n" * 250, "\ud800"]
    bad = {Topic(topic.exchange, name) for name in names} | {Topic("", "t"), Topic("e" * 256, "t")}
    host.consume(vm, topic, *bad)
    clients.cast(topic, vm, x=1)
    assert host.numbers(1) == [1]
    host.broker.delete_queues(vm, frozenset(bad))


# -------------------------------------------------------------------- losses


def test_a_lost_connection_hands_out_again(
    host: Host, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    host.events.take(Connected)
    answer = clients.call(topic, vm, x=1)
    first = host.events.take(Delivered)
    rabbit.kill_connections()
    host.events.take(Released, vm=vm)
    assert "closed by the test rig" in host.events.take(Disconnected).reason
    host.events.take(Connected)
    second = host.events.take(Delivered)
    assert second.redelivered
    assert second.request.id == first.request.id
    host.broker.ack(first.token)  # of a dead generation: nothing
    host.answer(second, 2)
    assert answer.result(TIMEOUT_S) == 2
    assert not host.events.has(Released)


def test_a_broker_restart(clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str) -> None:
    config = BrokerConfig(hosts=(BrokerHost("127.0.0.1", rabbit.port),), durable=True)
    durable = Topic("durable-exchange", topic.name)
    query = "?amqp_durable_queues=true"
    with Host(config) as host:
        host.consume(vm, durable)
        for x in range(3):
            clients.cast(durable, vm, query, x=x)
        assert host.numbers(3) == [0, 1, 2]
        rabbit.restart()
        host.events.take(Released, vm=vm)
        assert host.numbers(3) == [0, 1, 2]
        answer = clients.call(durable, vm, query, x=1)
        host.answer(host.events.take(Delivered), 3)
        assert answer.result(TIMEOUT_S) == 3


def test_a_channel_error_touches_one_vm(
    host: Host, clients: Clients, topic: Topic, vm: str
) -> None:
    other = str(uuid.uuid4())
    host.consume(vm, topic)
    host.consume(other, topic)
    clients.cast(topic, vm, x=1)
    clients.cast(topic, other, x=2)
    held = {event.vm: event for event in host.events.take_all(Delivered, 2)}

    def provoke() -> None:
        channel = host.broker._vms[vm]._channel
        assert channel is not None
        channel.ask(spec.Basic.Ack, "Lb", 4711, False)

    host.broker.loop.call_soon_threadsafe(provoke)
    assert host.events.take(Released, vm=vm).reason.startswith("406 PRECONDITION_FAILED")
    again = host.events.take(Delivered, vm=vm)
    assert again.redelivered
    assert not host.events.has(Released)
    assert not host.events.has(Disconnected)
    host.broker.complete(other, b"still alive", (held[other].token,))
    assert host.events.take(Completed, vm=other).proven


def test_a_deleted_queue_is_made_again(
    host: Host, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    rabbit.ctl("delete_queue", f"{topic.name}.{vm}")
    assert "cancelled" in host.events.take(Released, vm=vm).reason
    host.events.take(Consuming, vm=vm)
    clients.cast(topic, vm, x=1)
    assert host.numbers(1) == [1]


def test_connections_killed_again_and_again(
    rabbit: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load, both ways: nothing is lost or reordered."""
    # Nobody consumes what is gathered, and a slow machine publishes a lot between two kills.
    monkeypatch.setattr(request_publisher, "UNHEARD_MAX", 1_000_000)
    vms = [str(uuid.uuid4()) for _ in range(3)]
    config = BrokerConfig(hosts=(BrokerHost("127.0.0.1", rabbit.port),), durable=True)
    gathered = Gathered(rabbit)
    with Guests(config) as guests:
        consume_all(guests, vms)  # before that a cast goes nowhere, and nobody is told
        url = f"{rabbit.url}?amqp_durable_queues=true"
        with Load(url, vms) as load, Publishing(guests, vms) as publishing:
            for _ in range(5):
                load.wait_for_more(10)
                publishing.wait_for_more(10)
                rabbit.kill_connections()
            load.wait_for_more(10)
            load.stop()
        assert_nothing_lost(load, guests)
        publishing.wait_confirmed()
        assert guests.count(Disconnected) >= 5
    taken = gathered.take()
    for vm, count in publishing.published.items():
        assert set(taken[vm]) == set(range(count))


def test_a_queue_made_otherwise_under_us_touches_one_vm(
    host: Host, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    """Deleted, and declared by somebody else with other arguments, again and again."""
    other = str(uuid.uuid4())
    host.consume(vm, topic)
    host.consume(other, topic)
    clients.cast(topic, other, x=0)
    held = host.events.take(Delivered, vm=other)
    name = f"{topic.name}.{vm}"
    for number in range(1, 6):
        with raw_channel(rabbit) as channel:
            channel.queue_delete(name)
            with contextlib.suppress(amqp.PreconditionFailed):  # we may have been quicker
                arguments = {"x-max-length": 1000 + number}
                channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
        host.events.take(Released, vm=vm)
        host.events.take(Consuming, vm=vm)
        clients.cast(topic, vm, x=number)
        event = host.events.take(Delivered, vm=vm)
        assert event.request.args["x"] == number
        host.broker.ack(event.token)
    assert not host.events.has(Disconnected)
    assert not host.events.has(Released)
    host.broker.complete(other, b"alive", (held.token,))
    assert host.events.take(Completed, vm=other).proven


def test_a_queue_that_somebody_locks_touches_one_vm(
    host: Host, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    other = str(uuid.uuid4())
    name = f"{topic.name}.{vm}"
    with raw_channel(rabbit) as channel:
        channel.queue_declare(name, exclusive=True)
        host.broker.consume(vm, frozenset({topic}))
        host.consume(other, topic)
        clients.cast(topic, other, x=1)
        assert host.numbers(1) == [1]
        assert not host.events.has(Consuming)
        channel.queue_delete(name)
    host.events.take(Consuming, vm=vm)
    assert not host.events.has(Disconnected)


def test_what_is_completed_is_proved_in_a_lot(
    host: Host, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    for x in range(50):
        clients.cast(topic, vm, x=x)
    held = host.events.take_all(Delivered, 50)
    ids = tuple(event.request.id for event in held[:40])
    for event in held[:40]:
        host.broker.complete(vm, event.request.id, (event.token,))
    assert host.events.take(Completed) == Completed(vm, ids, proven=True)
    rabbit.kill_connections()
    host.events.take(Released)
    assert host.numbers(10) == list(range(40, 50))
    host.broker.complete(vm, ids[39], (held[39].token,))  # its channel is gone
    assert host.events.take(Completed) == Completed(vm, ids[39:], proven=False)


def test_a_caller_hears_that_its_call_has_not_run_when_the_broker_has_forgotten_it(
    host: Host, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    answer = clients.call(topic, vm, x=1)
    delivered = host.events.take(Delivered)
    request = delivered.request
    assert request.msg_id is not None and request.reply_q is not None
    body = encode_reply(request.msg_id, result_json=b'"refused"')
    refusal = ReplyPublication(request.reply_q, body, has_not_run=True)
    host.broker.complete(vm, request.id, (delivered.token,), refusal)
    host.consume(vm, Topic(topic.exchange, f"{topic.name}-other"))  # closes the channel, in time
    assert answer.result(TIMEOUT_S) == "refused"
    assert host.events.take(Completed) == Completed(vm, (request.id,), proven=True)
    wait_for_queue(rabbit, f"{topic.name}.{vm}", ready=0, unacknowledged=0)


def test_a_silent_broker_is_given_up(config: BrokerConfig, topic: Topic, vm: str) -> None:
    (node,) = config.hosts
    with Proxy(node.port) as proxy, Host(through(proxy, config, heartbeat_s=1)) as host:
        host.consume(vm, topic)
        host.events.assert_quiet(Disconnected)
        proxy.pull_the_cable()
        host.events.take(Released, vm=vm)
        assert "silent" in host.events.take(Disconnected).reason


def test_a_broker_that_does_not_answer(
    config: BrokerConfig, topic: Topic, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (vm_queues, topology):
        monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(broker_module, "WATCH_S", 0.1)
    (node,) = config.hosts
    other = str(uuid.uuid4())
    with Proxy(node.port) as proxy, Host(through(proxy, config)) as host:
        host.consume(vm, topic)
        host.events.take(Connected)
        host.events.assert_quiet(Disconnected)
        proxy.pull_the_cable()
        host.broker.consume(other, frozenset({topic}))
        host.events.take(Released, vm=vm)
        assert "did not answer" in host.events.take(Disconnected).reason
        proxy.plug_it_in()
        host.events.take(Consuming, vm=vm)
        host.events.take(Consuming, vm=other)
        proxy.pull_the_cable()
        host.broker.consume(vm, frozenset({topic, Topic("new", "new")}))
        assert "did not answer" in host.events.take(Disconnected).reason
        proxy.plug_it_in()


def test_an_idle_connection_is_kept(config: BrokerConfig, topic: Topic, vm: str) -> None:
    with Host(replace(config, heartbeat_s=1)) as host:
        host.consume(vm, topic)
        time.sleep(4)
        host.events.assert_quiet(Disconnected)


# -------------------------------------------------------------------- replies


def complete(host: Host, reply_q: str, request_id: bytes, body: bytes = b"{}") -> None:
    """Of a request that the broker does not ask for any more."""
    host.broker.complete("vm", request_id, (), ReplyPublication(reply_q, body))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "RETRY_S", 0.1)
    monkeypatch.setattr(completions, "REPLY_KEPT_S", 0.5)


@pytest.mark.usefixtures("impatient")
def test_a_reply_to_nobody_is_given_up(host: Host) -> None:
    host.events.take(Connected)
    complete(host, "reply_of_nobody", b"id")
    assert host.events.take(GivenUp) == GivenUp("vm", b"id", "returned")
    assert host.events.take(Completed) == Completed("vm", (b"id",), proven=False)


@pytest.mark.usefixtures("impatient")
def test_replies_are_confirmed_one_by_one(host: Host, rabbit: RabbitServer) -> None:
    host.events.take(Connected)
    with raw_channel(rabbit) as channel:
        queue = channel.queue_declare(exclusive=True).queue
        for number in range(1000):
            complete(host, queue if number % 3 else "nowhere", b"%d" % number, b"%d" % number)
        host.events.take_all(Completed, 1000)
        given_up = {event.request_id for event in host.events.take_all(GivenUp, 334)}
        assert given_up == {b"%d" % number for number in range(0, 1000, 3)}
        assert channel.queue_declare(queue, passive=True).message_count == 666


def test_a_caller_that_makes_its_queue_anew_has_its_reply(host: Host, rabbit: RabbitServer) -> None:
    name = f"reply_{uuid.uuid4().hex}"
    complete(host, name, b"id", b"late")
    host.events.assert_quiet(Completed)
    with raw_channel(rabbit) as channel:
        channel.queue_declare(name, exclusive=True)
        host.events.take(Completed)
        assert channel.basic_get(name, no_ack=True).body == "late"


def test_without_a_broker_a_reply_waits(config: BrokerConfig) -> None:
    with Host(replace(config, hosts=(BrokerHost("127.0.0.1", 1),))) as host:
        host.events.take(Disconnected)
        complete(host, "q", b"id")
        assert host.events.take(RepliesRefused) == RepliesRefused("vm", "not connected")


def test_replies_over_a_limit_wait(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.events.take(Connected)
    monkeypatch.setattr(reply_publisher, "REPLIES_BYTES_MAX", 100)
    complete(host, "q", b"id", b"x" * 101)
    assert "REPLIES_MAX" in host.events.take(RepliesRefused).reason
    monkeypatch.setattr(reply_publisher, "REPLIES_BYTES_MAX", 1000)
    assert host.events.take(RepliesRefused).reason == ""
    monkeypatch.setattr(reply_publisher, "REPLIES_MAX", 0)
    complete(host, "q", b"other", b"x")
    assert "REPLIES_MAX" in host.events.take(RepliesRefused).reason


def test_a_reply_lost_with_the_connection_is_published_again(
    config: BrokerConfig, rabbit: RabbitServer
) -> None:
    (node,) = config.hosts
    with (
        raw_channel(rabbit) as channel,
        Proxy(node.port) as proxy,
        Host(through(proxy, config, heartbeat_s=1)) as host,
    ):
        queue = channel.queue_declare(exclusive=True).queue
        host.events.take(Connected)
        proxy.pull_the_cable()
        complete(host, queue, b"id")
        assert "silent" in host.events.take(RepliesRefused).reason
        proxy.plug_it_in()
        host.events.take(Completed)
        assert channel.basic_get(queue, no_ack=True).body == "{}"


def test_a_broker_that_does_not_read(config: BrokerConfig) -> None:
    (node,) = config.hosts
    with Proxy(node.port) as proxy, Host(through(proxy, config)) as host:
        host.events.take(Connected)
        proxy.pull_the_cable()
        for number in range(30):
            complete(host, "nowhere", b"%d" % number, b"x" * 2_000_000)
        host.events.assert_quiet(RepliesRefused)
        complete(host, "nowhere", b"over REPLIES_BYTES_MAX", b"x" * 10_000_000)
        assert "limit" in host.events.take(RepliesRefused).reason
        proxy.plug_it_in()
        assert host.events.take(RepliesRefused).reason == ""
        assert not host.events.has(Disconnected)


def test_an_error_on_the_channel_for_replies(
    host: Host, clients: Clients, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    answer = clients.call(topic, vm, x=1)
    delivered = host.events.take(Delivered)
    lost: list[str] = []

    def provoke() -> None:
        confirms = host.broker._replies._confirms
        assert confirms is not None
        confirms.channel.ask(spec.Basic.Ack, "Lb", 4711, False)
        host.broker._replies.publish("nowhere", b"", lambda problem, _: lost.append(problem))

    host.broker.loop.call_soon_threadsafe(provoke)
    host.answer(delivered, 2)
    assert answer.result(TIMEOUT_S) == 2
    assert [problem.partition(" ")[0] for problem in lost] == ["406"]
    assert not host.events.has(Released)


def test_an_alarm_blocks_replies_alone(host: Host, rabbit: RabbitServer) -> None:
    host.events.take(Connected)
    with raw_channel(rabbit) as channel:
        queue = channel.queue_declare(exclusive=True).queue
        rabbit.ctl("set_vm_memory_high_watermark", "0")
        try:
            # The broker says so to those that publish.
            complete(host, queue, b"first")
            wait_until(
                lambda: "memory" in host.broker._replies._blocked,
                timeout_s=TIMEOUT_S,
                interval_s=0.05,
                failure=lambda: "never blocked",
            )
            complete(host, queue, b"second")
            assert "memory" in host.events.take(RepliesRefused).reason
        finally:
            rabbit.ctl("set_vm_memory_high_watermark", "0.4")
        host.events.take_all(Completed, 2)
    assert not host.events.has(Disconnected)


# -------------------------------------------------------------------- declarations


@pytest.mark.parametrize("durable", [False, True])
def test_an_exchange_is_taken_as_others_declared_it(
    config: BrokerConfig, clients: Clients, vm: str, durable: bool
) -> None:
    topic = Topic(f"exchange-{uuid.uuid4().hex[:8]}", "topic")
    query = "?amqp_durable_queues=true" if durable else ""
    clients.cast(topic, vm, query, x=0)  # declares the exchange, and is lost
    with Host(replace(config, durable=not durable)) as host:
        host.consume(vm, topic)
        clients.cast(topic, vm, query, x=1)
        assert host.numbers(1) == [1]


def test_an_exchange_is_declared_as_configured(
    config: BrokerConfig, rabbit: RabbitServer, vm: str
) -> None:
    names = {durable: f"exchange-{uuid.uuid4().hex[:8]}" for durable in (False, True)}
    for durable, name in names.items():
        with Host(replace(config, durable=durable)) as host:
            host.consume(vm, Topic(name, "topic"))
    listed = rabbit.ctl("list_exchanges", "name", "durable")
    for durable, name in names.items():
        assert f"{name}\t{str(durable).lower()}" in listed


def test_many_vms_on_an_exchange_that_is_not_there(
    host: Host, clients: Clients, rabbit: RabbitServer
) -> None:
    topic = Topic(f"exchange-{uuid.uuid4().hex[:8]}", f"topic-{uuid.uuid4().hex[:8]}")
    vms = [str(uuid.uuid4()) for _ in range(100)]
    for vm in vms:
        host.broker.consume(vm, frozenset({topic}))
    for vm in vms:
        host.events.take(Consuming, vm=vm)
    clients.client(topic, fanout=True).cast({}, "note", x=1)
    delivered = host.events.take_all(Delivered, 100)
    assert {event.vm for event in delivered} == set(vms)
    for event in delivered:
        host.broker.ack(event.token)
    for vm in vms:
        host.broker.release(vm)
    for vm in vms:
        host.events.take(Released, vm=vm)
    for vm in vms:
        host.broker.delete_queues(vm, frozenset({topic}))
    wait_until(
        lambda: not any(vm in name for name in rabbit.queues() for vm in vms),
        timeout_s=TIMEOUT_S,
        interval_s=0.1,
        failure=lambda: "queues are left",
    )


def test_an_exchange_that_went_away(
    host: Host, clients: Clients, rabbit: RabbitServer, vm: str
) -> None:
    topic = Topic(f"exchange-{uuid.uuid4().hex[:8]}", f"topic-{uuid.uuid4().hex[:8]}")
    host.consume(str(uuid.uuid4()), topic)
    with raw_channel(rabbit) as channel:
        channel.exchange_delete(topic.exchange)
        channel.exchange_delete(f"{topic.name}_fanout")
    host.consume(vm, topic)
    clients.cast(topic, vm, x=1)
    clients.client(topic, fanout=True).cast({}, "note", x=2)
    assert sorted(host.numbers(2)) == [1, 2]


def test_more_vms_than_channels(host: Host, topic: Topic) -> None:
    host.consume(str(uuid.uuid4()), topic)  # so that the exchanges are known
    link = host.broker.link
    assert link is not None
    link.amqp.channel_max = 5  # one is for replies
    vms = [str(uuid.uuid4()) for _ in range(6)]
    for vm in vms:
        host.broker.consume(vm, frozenset({topic}))
    served = [event.vm for event in host.events.take_all(Consuming, 3)]
    host.events.assert_quiet(Consuming)
    for vm in served:
        host.broker.release(vm)
    others = [event.vm for event in host.events.take_all(Consuming, 3)]
    assert sorted(served + others) == sorted(vms)
    assert not host.events.has(Disconnected)


def test_a_queue_is_taken_as_others_declared_it(
    host: Host, clients: Clients, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    with raw_channel(rabbit) as channel:
        channel.queue_declare(f"{topic.name}.{vm}", durable=True, auto_delete=False)
    host.consume(vm, topic)
    clients.cast(topic, vm, x=1)
    assert host.numbers(1) == [1]


def test_a_forbidden_exchange_harms_that_topic_alone(
    host: Host, clients: Clients, topic: Topic, vm: str
) -> None:
    other = str(uuid.uuid4())
    host.broker.consume(vm, frozenset({topic, Topic("amq.forbidden", "t")}))
    host.consume(other, topic)
    clients.cast(topic, other, x=1)
    assert host.numbers(1) == [1]
    clients.cast(topic, vm, x=2)  # its other topic works
    assert host.numbers(1) == [2]
    assert not host.events.has(Disconnected)
    host.broker.release(vm)
    host.events.take(Released, vm=vm)


@pytest.mark.parametrize("quorum", [False, True], ids=["classic", "quorum"])
def test_queues_that_are_used_or_hold_something_stay(
    config: BrokerConfig, clients: Clients, rabbit: RabbitServer, vm: str, quorum: bool
) -> None:
    config = replace(config, quorum=quorum, fanout_quorum=quorum)
    used, full, empty = (Topic("openstack", f"{name}-{vm[:8]}") for name in ("u", "f", "e"))
    last = str(uuid.uuid4())  # deleted after all others
    with Host(config) as host, Host(config) as other:
        host.consume(vm, used, full, empty)
        host.consume(last, used)
        host.broker.release(vm)
        host.broker.release(last)
        for each in (vm, last):
            host.events.take(Released, vm=each)
        clients.cast(full, vm, x=1)
        other.consume(vm, used)
        host.broker.delete_queues(vm, frozenset({used, full, empty}))
        host.broker.delete_queues(last, frozenset({used}))
        wait_until(
            lambda: not any(last in name for name in rabbit.queues()),
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: "queues are left",
        )
        names = {f"{used.name}.{vm}", f"{used.name}_fanout_{vm}", f"{full.name}.{vm}"}
        assert {name for name in rabbit.queues() if vm in name} == names
        other.events.assert_quiet(Released)
        assert not host.events.has(Disconnected)


def test_more_to_delete_while_deleting(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    more = Topic(topic.exchange, f"{topic.name}-more")
    host.consume(vm, topic, more)
    host.broker.release(vm)
    host.events.take(Released, vm=vm)
    host.broker.delete_queues(vm, frozenset({topic}))
    host.broker.delete_queues(vm, frozenset({more}))
    wait_until(
        lambda: not any(vm in name for name in rabbit.queues()),
        timeout_s=TIMEOUT_S,
        interval_s=0.1,
        failure=lambda: "queues are left",
    )
    wait_until(
        lambda: not host.broker._deletions and host.broker._sweep is None,
        timeout_s=TIMEOUT_S,
        interval_s=0.05,
        failure=lambda: "deleting goes on",
    )


def test_deletion_of_a_vm_that_is_consumed_again(
    host: Host, rabbit: RabbitServer, clients: Clients, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    host.broker.release(vm)
    host.broker.delete_queues(vm, frozenset({topic}))
    host.broker.consume(vm, frozenset({topic}))
    host.events.take(Consuming, vm=vm)
    clients.cast(topic, vm, x=1)
    assert host.numbers(1) == [1]


def test_deletion_waits_for_the_broker(
    config: BrokerConfig, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    with Host(config) as host:
        host.consume(vm, topic)
    assert f"{topic.name}.{vm}" in rabbit.queues()
    host = Host(config)
    host.broker.delete_queues(vm, frozenset({topic}))  # before it is connected
    with host:
        wait_until(
            lambda: not any(vm in name for name in rabbit.queues()),
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: "queues are left",
        )


# -------------------------------------------------------------------- connecting and stopping


def test_the_next_host_is_tried(config: BrokerConfig, topic: Topic, vm: str) -> None:
    dead = BrokerHost("127.0.0.1", 1)
    with Host(replace(config, hosts=(dead, dead, *config.hosts))) as host:
        for disconnected in host.events.take_all(Disconnected, 2):
            assert "127.0.0.1:1" in disconnected.reason
        host.events.take(Connected)
        host.consume(vm, topic)


def test_a_wrong_password(config: BrokerConfig) -> None:
    (node,) = config.hosts
    with Host(replace(config, hosts=(replace(node, password="wrong"),))) as host:
        for disconnected in host.events.take_all(Disconnected, 2):
            assert "ACCESS_REFUSED" in disconnected.reason
            assert "wrong" not in disconnected.reason


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_stop_leaves_nothing(
    config: BrokerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqp_link, "CLOSE_TIMEOUT_S", 60.0)
    gc.collect()
    threads, files = threading.active_count(), open_files()
    for _ in range(3):
        with Host(config) as host:
            for _ in range(5):
                host.consume(str(uuid.uuid4()), topic)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 30.0  # the broker's answer ends it, and no timer
        assert len(host.events.take_all(Released, 5)) == 5
        assert host.events.take(Disconnected).reason == "closed"
    assert threading.active_count() == threads
    assert open_files() == files


def test_stop_at_any_time(config: BrokerConfig, topic: Topic, vm: str) -> None:
    Host(config).broker.stop()  # never started
    with Host(config) as host:
        pass  # perhaps connecting
    with Host(replace(config, hosts=(BrokerHost("127.0.0.1", 1),))) as host:
        host.events.take(Disconnected)
    host.broker.consume(vm, frozenset({topic}))  # after the end: nothing
    complete(host, "q", b"id")
    host.broker.stop()
    assert not host.events.has(Completed)


def test_commands_are_bounded(
    config: BrokerConfig, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "COMMANDS_MAX", 10)
    host = Host(config)
    for number in range(20):
        host.broker.publish_heartbeat("q", b"%d" % number)
    assert len(host.broker._commands) == 10
    host.broker.complete(vm, b"id", (Token(vm, 1, 1),))
    with host:
        assert host.events.take(Completed) == Completed(vm, (b"id",), proven=False)
