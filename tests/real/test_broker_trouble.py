"""What goes wrong at a broker: messages nobody can read, returns without end, and refusals. Each is
one VM's, and each is said. Against RabbitMQ 3 and 4."""

from __future__ import annotations

import json
import re
import shlex
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import amqp
import pytest

from tests.rig import newer_debian, rig_directory, wait_until
from tests.rig.broker_peers import TIMEOUT_S, Host, raw_channel, wait_for_queue
from tests.rig.rabbit import RabbitServer
from tests.rig.release import TRIXIE, of_this_machine
from vchan.host.broker import parked as broker_parked
from vchan.host.broker import vm_queues
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import (
    Blocked,
    Connected,
    Consuming,
    Delivered,
    Disconnected,
    Mail,
    Parked,
    PublishResult,
    Released,
    RepliesRefused,
    Troubled,
    Undecodable,
)
from vchan.host.broker.parked import PARKED
from vchan.host.oslo_wire.downward_envelope import ReplyPublication
from vchan.host.oslo_wire.mail import own_queue
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.rpc.messages import Topic

pytestmark = pytest.mark.real

RETURNS = 24
"""RabbitMQ 4 drops a message at its 21st, unless it was told otherwise."""


@pytest.fixture(scope="module", params=["3", "4"])
def rabbit(request: pytest.FixtureRequest) -> Iterator[RabbitServer]:
    tree: Path | None = None
    own = "4" if of_this_machine() is TRIXIE else "3"
    if request.param < own:
        pytest.skip(f"this machine's own RabbitMQ is {own}")
    if request.param > own:
        missing = newer_debian.missing_for_newer_debian()
        if missing is not None:
            pytest.skip(missing)
        tree = newer_debian.build(newer_debian.RABBIT)
    with rig_directory() as directory, RabbitServer(directory / "rabbit", tree=tree) as server:
        assert server.ctl("version").strip().startswith(f"{request.param}.")
        yield server


@pytest.fixture
def config(rabbit: RabbitServer) -> BrokerConfig:
    return BrokerConfig(hosts=(BrokerHost("127.0.0.1", rabbit.port),))


@pytest.fixture
def host(config: BrokerConfig) -> Iterator[Host]:
    with Host(config) as host:
        host.events.take(Connected)
        yield host


@pytest.fixture
def topic() -> Topic:
    unique = uuid.uuid4().hex[:8]
    return Topic(f"exchange-{unique}", f"topic-{unique}")


@pytest.fixture
def vm() -> str:
    return str(uuid.uuid4())


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_queues, "RETRY_MIN_S", 0.1)
    monkeypatch.setattr(vm_queues, "RETRY_MAX_S", 0.5)


def request_body(number: int = 0) -> bytes:
    message = {"method": "note", "args": {"x": number}, "_unique_id": uuid.uuid4().hex}
    return json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(message)}).encode()


def is_4(rabbit: RabbitServer) -> bool:
    return rabbit.ctl("version").startswith("4.")


def raw_message(headers: bytes, body: bytes | None = None) -> Any:
    """A message whose header table is these bytes."""
    message = amqp.Message(request_body() if body is None else body)
    flags = struct.pack(">H", 0x2000)
    message._serialize_properties = lambda: flags + struct.pack(">I", len(headers)) + headers
    return message


def entry(kind: bytes, value: bytes) -> bytes:
    return b"\x03odd" + kind + value


# -------------------------------------------------------------------- messages that cannot be read

HEADERS = {
    "a timestamp in milliseconds": entry(b"T", struct.pack(">Q", 1772000000000)),
    "a timestamp beyond all": entry(b"T", b"\x7f" + b"\xff" * 7),
    "a decimal": entry(b"D", b"\xff" + struct.pack(">i", 1)),
    "text that is no UTF-8": entry(b"S", struct.pack(">I", 2) + b"\xff\xfe"),
    "a name that is no UTF-8": b"\x02\xff\xfe" + b"t\x01",
    "tables inside each other": entry(b"F", struct.pack(">I", 13) + b"\x01aF\0\0\0\6\x01bF\0\0\0"),
    "a type that there is not": entry(b"Z", b"\x01"),
    "a table that ends early": entry(b"S", struct.pack(">I", 1000)),
}


@pytest.mark.parametrize("what", HEADERS)
def test_odd_headers_cost_their_message_at_most(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str, what: str
) -> None:
    other = str(uuid.uuid4())
    host.consume(vm, topic)
    host.consume(other, topic)
    with raw_channel(rabbit) as channel:
        try:
            channel.basic_publish(raw_message(HEADERS[what]), routing_key=f"{topic.name}.{vm}")
            channel.basic_publish(
                raw_message(HEADERS[what]), topic.name + "_fanout", routing_key=topic.name
            )
            channel.queue_declare(f"{topic.name}.{vm}", passive=True)  # it has taken them
        except amqp.AMQPError:
            pass  # this RabbitMQ looks at them itself
    with raw_channel(rabbit) as channel:
        for each in (vm, other):
            key = f"{topic.name}.{each}"
            channel.basic_publish(amqp.Message(request_body(7)), topic.exchange, routing_key=key)
    for each in (vm, other):
        numbers = []
        while 7 not in numbers:
            event = host.events.take(Delivered, vm=each)
            numbers.append(event.request.args["x"])
            host.broker.ack(event.token)
    assert not host.events.has(Disconnected)
    assert not host.events.has(Released)


def test_a_routing_key_that_is_no_utf8(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    host.consume(vm, topic)
    with raw_channel(rabbit) as channel:
        fanout = topic.name + "_fanout"
        key = b"\xff\xfe".decode("utf-8", "surrogateescape")
        arguments = (0, fanout, key.encode("utf-8", "surrogateescape"), False, False)
        message = amqp.Message(request_body(3))
        channel.send_method(amqp.spec.Basic.Publish, "Bssbb", arguments, message)
        event = host.events.take(Delivered, vm=vm)
    assert (event.request.args["x"], event.fanout, event.topic) == (3, True, topic)
    assert not host.events.has(Disconnected)


@pytest.mark.parametrize("size", [0, 200_000, 17 * 1024 * 1024])
def test_a_body_of_any_size_that_is_none(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str, size: int
) -> None:
    host.consume(vm, topic)
    queue = f"{topic.name}.{vm}"
    with raw_channel(rabbit) as channel:
        try:
            channel.basic_publish(amqp.Message(b"\xff" * size), routing_key=queue)
            channel.queue_declare(queue, passive=True)
        except amqp.AMQPError:
            assert size > 16 * 1024 * 1024 and is_4(rabbit)  # it is over its own limit
            return
    bad = host.events.take(Undecodable, vm=vm)
    assert (bad.queue, bad.beginning) == (queue, b"\xff" * min(size, 48))
    host.broker.reject(bad.token)
    wait_for_queue(rabbit, queue, ready=0, unacknowledged=0)
    assert not host.events.has(Disconnected)


def test_odd_mail(host: Host, rabbit: RabbitServer, vm: str) -> None:
    host.broker.listen_for_answers(vm)
    host.events.take(Consuming, vm=vm)
    with raw_channel(rabbit) as channel:
        odd = raw_message(HEADERS["a timestamp in milliseconds"], b"x")
        channel.basic_publish(odd, routing_key=own_queue(vm))
        assert host.events.take(Mail, vm=vm).body == b"x"
    assert not host.events.has(Disconnected)


def compressed(body: bytes) -> Any:
    """A message that says so: what expands such bodies is never compiled, and can be made to
    fail."""
    return amqp.Message(body, application_headers={"compression": "application/x-gzip"})


def test_a_message_that_breaks_us_is_parked(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: first there is no queue for it."""
    host.consume(vm, topic)
    queue, body = f"{topic.name}.{vm}", request_body()
    with raw_channel(rabbit) as channel:
        channel.queue_delete(PARKED)

        def broken(*_: object, **__: object) -> None:
            raise RecursionError("ours")

        monkeypatch.setattr(vm_queues, "expand", broken)
        for _ in range(2):
            channel.basic_publish(compressed(body), routing_key=queue)
            assert host.events.take(Parked) == Parked(vm, queue, "")
        wait_for_queue(rabbit, queue, ready=0, unacknowledged=0)
        wait_for_queue(rabbit, PARKED, ready=2, unacknowledged=0)
        parked = channel.basic_get(PARKED, no_ack=True)
        assert bytes(parked.body, "utf-8") if isinstance(parked.body, str) else parked.body
        assert parked.headers["vchan-vm"] == vm
        assert parked.headers["vchan-queue"] == queue
        assert "RecursionError" in parked.headers["vchan-reason"]
    monkeypatch.undo()
    assert not host.events.has(Released)


def test_a_message_that_cannot_be_parked_is_dropped_and_that_is_said(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.consume(vm, topic)
    queue = f"{topic.name}.{vm}"
    monkeypatch.setattr(broker_parked, "PARKED", f"locked-{uuid.uuid4().hex}")

    def broken(*_: object, **__: object) -> None:
        raise RecursionError("ours")

    monkeypatch.setattr(vm_queues, "expand", broken)
    monkeypatch.setattr(broker_parked, "_ARGUMENTS", {"x-max-length": "not a number"})
    with raw_channel(rabbit) as channel:
        channel.basic_publish(compressed(request_body()), routing_key=queue)
    parked = host.events.take(Parked)
    assert "PRECONDITION_FAILED" in parked.problem
    wait_for_queue(rabbit, queue, ready=0, unacknowledged=0)
    assert not host.events.has(Disconnected)


# -------------------------------------------------------------------- returns without end


def give_back(host: Host, vm: str, topic: Topic, count: int) -> list[int]:
    """What a migration, a restart or a lost connection does, so often; then what is handed out."""
    for _ in range(count):
        host.broker.release(vm)
        host.events.take(Released, vm=vm)
        host.consume(vm, topic)
        time.sleep(0.05)  # so that it hands out what it has
    time.sleep(0.5)
    numbers = []
    while host.events.has(Delivered):
        numbers.append(host.events.take(Delivered).request.args["x"])
    return numbers


def publish(rabbit: RabbitServer, topic: Topic, vm: str, count: int) -> None:
    with raw_channel(rabbit) as channel:
        for number in range(count):
            channel.basic_publish(
                amqp.Message(request_body(number), delivery_mode=2),
                topic.exchange,
                routing_key=f"{topic.name}.{vm}",
            )


@pytest.mark.parametrize("quorum", [False, True])
def test_what_is_given_back_often_is_not_dropped_and_stays_in_order(
    config: BrokerConfig, rabbit: RabbitServer, topic: Topic, vm: str, quorum: bool
) -> None:
    with Host(replace(config, quorum=quorum, fanout_quorum=quorum)) as host:
        host.consume(vm, topic)
        publish(rabbit, topic, vm, 5)
        for number in range(RETURNS):
            events = host.events.take_all(Delivered, 5)
            assert [event.request.args["x"] for event in events] == list(range(5))
            assert {event.returns for event in events} == {number if quorum else 0}
            host.broker.release(vm)
            host.events.take(Released, vm=vm)
            host.consume(vm, topic)
        assert host.numbers(5) == list(range(5))
        assert host.events.take(Troubled, vm=vm).problems == ()


def test_a_quorum_queue_without_our_limit_is_named_and_4_drops_from_it(
    config: BrokerConfig, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    """As earlier versions of vchan-host declared it."""
    name = f"{topic.name}.{vm}"
    arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True}
    with raw_channel(rabbit) as channel:
        channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
    with Host(replace(config, quorum=True)) as host:
        host.consume(vm, topic)
        (problem,) = host.events.take(Troubled, vm=vm).problems
        assert f"queue {name} was declared otherwise" in problem
        assert "inequivalent arg 'x-delivery-limit'" in problem
        assert "21st time" in problem
        publish(rabbit, topic, vm, 5)
        host.numbers(5)
        give_back(host, vm, topic, RETURNS)
        assert give_back(host, vm, topic, 1) == ([] if is_4(rabbit) else [0, 1, 2, 3, 4])


def test_the_policy_of_the_documents_lifts_the_limit_of_what_is_there(
    config: BrokerConfig, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    document = (Path(__file__).parents[2] / "docs" / "broker.md").read_text()
    found = re.search(r"rabbitmqctl (set_policy vchan-limit .*) --apply-to queues", document)
    assert found is not None
    arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True}
    with raw_channel(rabbit) as channel:
        name = f"{topic.name}.{vm}"
        channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
    rabbit.ctl(*shlex.split(found[1]))
    try:
        with Host(replace(config, quorum=True)) as host:
            host.consume(vm, topic)
            publish(rabbit, topic, vm, 5)
            host.numbers(5)
            give_back(host, vm, topic, RETURNS)
            assert give_back(host, vm, topic, 1) == [0, 1, 2, 3, 4]
    finally:
        rabbit.ctl("clear_policy", "vchan-limit")


def test_a_policy_with_a_lower_limit_shows_in_the_returns(
    config: BrokerConfig, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    """AMQP does not tell of policies: what a message says of itself is what there is to see."""
    pattern = json.dumps({"delivery-limit": 3})
    rabbit.ctl("set_policy", "low", f"^{topic.name}", pattern)
    try:
        with Host(replace(config, quorum=True)) as host:
            host.consume(vm, topic)
            publish(rabbit, topic, vm, 1)
            returns = []
            for _ in range(4):
                returns.append(host.events.take(Delivered).returns)
                host.broker.release(vm)
                host.events.take(Released, vm=vm)
                host.consume(vm, topic)
            assert returns == [0, 1, 2, 3]
            host.events.assert_quiet(Delivered)
    finally:
        rabbit.ctl("clear_policy", "low")


# -------------------------------------------------------------------- what the broker refuses


@contextmanager
def user(rabbit: RabbitServer, configure: str, write: str, read: str) -> Iterator[str]:
    name = f"u{uuid.uuid4().hex[:8]}"
    rabbit.ctl("add_user", name, "secret")
    rabbit.ctl("set_permissions", name, configure, write, read)
    try:
        yield name
    finally:
        rabbit.ctl("delete_user", name)


def as_user(config: BrokerConfig, name: str) -> BrokerConfig:
    (host,) = config.hosts
    return replace(config, hosts=(replace(host, user=name, password="secret"),))


def trouble(host: Host, vm: str) -> tuple[str, ...]:
    """The first that is any."""
    while True:
        problems = host.events.take(Troubled, vm=vm).problems
        if problems:
            return problems


@pytest.mark.parametrize(
    ("permissions", "word"),
    [
        ((".*", ".*", "^$"), "ACCESS_REFUSED"),  # may not consume
        (("^exchange-|_fanout$", ".*", ".*"), "ACCESS_REFUSED"),  # may not declare queues
        (("^$", ".*", ".*"), "ACCESS_REFUSED"),  # may not declare exchanges
    ],
)
def test_what_a_user_may_not_is_said_for_the_vm_in_the_brokers_words(
    config: BrokerConfig,
    rabbit: RabbitServer,
    topic: Topic,
    vm: str,
    permissions: tuple[str, str, str],
    word: str,
) -> None:
    with user(rabbit, *permissions) as name, Host(as_user(config, name)) as host:
        host.broker.consume(vm, frozenset({topic}))
        (problem,) = trouble(host, vm)
        assert word in problem
        assert "declared otherwise" not in problem
        rabbit.ctl("set_permissions", name, ".*", ".*", ".*")
        host.events.take(Consuming, vm=vm)
        host.events.take(Troubled, vm=vm, problems=())


def test_a_queue_that_somebody_holds_is_said(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    with raw_channel(rabbit) as channel:
        channel.queue_declare(f"{topic.name}.{vm}", exclusive=True)
        host.broker.consume(vm, frozenset({topic}))
        (problem,) = trouble(host, vm)
        assert "RESOURCE_LOCKED" in problem
        channel.queue_delete(f"{topic.name}.{vm}")
    host.events.take(Consuming, vm=vm)


def test_arguments_that_the_broker_does_not_take_are_not_said_to_be_declared_otherwise(
    config: BrokerConfig, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    wrong = {"x-max-in-memory-length": -5}
    with Host(replace(config, quorum=True, quorum_arguments=wrong)) as host:
        host.broker.consume(vm, frozenset({topic}))
        (problem,) = trouble(host, vm)
        assert f"queue {topic.name}.{vm} cannot be declared" in problem
        assert "PRECONDITION_FAILED" in problem
        assert "declared otherwise" not in problem
        with raw_channel(rabbit) as channel:  # if it is there all the same, it is used
            arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True}
            # The last is the one that it waits for: it then makes those that are not there.
            for name in (f"{topic.name}_fanout_{vm}", f"{topic.name}.{vm}"):
                channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
        host.events.take(Consuming, vm=vm)


@pytest.mark.parametrize("ours", [{"durable": True}, {"auto_delete": True}])
def test_an_exchange_of_other_options_is_used_and_both_sides_are_named(
    config: BrokerConfig, rabbit: RabbitServer, topic: Topic, vm: str, ours: dict[str, Any]
) -> None:
    (option,) = ours
    with raw_channel(rabbit) as channel:
        channel.exchange_declare(topic.exchange, "topic", durable=False, auto_delete=False)
    with Host(replace(config, **ours)) as host:
        host.consume(vm, topic)
        (problem,) = trouble(host, vm)
        assert f"exchange {topic.exchange} was declared otherwise" in problem
        assert f"inequivalent arg '{option}'" in problem
        assert "received 'true' but current is 'false'" in problem
        assert f"{option}=True" in problem
        publish(rabbit, topic, vm, 1)
        assert host.numbers(1) == [0]


def to(topic: Topic, **more: Any) -> Publication:
    publication = Publication(Form.TOPIC, topic.exchange, topic.name, b"{}", None, mandatory=True)
    return publication._replace(**more)


def send(host: Host, vm: str, publication: Publication) -> PublishResult:
    request_id = uuid.uuid4().bytes
    host.broker.publish_request(vm, request_id, publication)
    return host.events.take(PublishResult, vm=vm, request_id=request_id)


def test_a_full_queue_refuses_requests_and_replies(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with raw_channel(rabbit) as channel:
        channel.exchange_declare(topic.exchange, "topic", durable=False, auto_delete=False)
        channel.queue_declare(topic.name, durable=True, auto_delete=False, arguments=arguments)
        channel.queue_bind(topic.name, topic.exchange, topic.name)
        refused = [send(host, vm, to(topic)) for _ in range(3)][-1]
        assert (refused.ok, refused.reason) == (False, "refused by the broker")
        host.broker.complete(vm, b"id", (), ReplyPublication(topic.name, b"{}"))
        assert host.events.take(RepliesRefused, vm=vm).reason == "refused by the broker"
        channel.queue_delete(topic.name)


def test_an_alarm_is_told_and_so_is_its_end(host: Host, rabbit: RabbitServer, vm: str) -> None:
    rabbit.ctl("set_vm_memory_high_watermark", "absolute", "1")
    try:
        mail = Publication(Form.MAIL, "", "nowhere", b"{}", None, mandatory=True)
        host.broker.publish_request(vm, b"1", mail)
        assert "memory" in host.events.take(Blocked).reason
    finally:
        rabbit.ctl("set_vm_memory_high_watermark", "0.4")
    assert host.events.take(Blocked).reason == ""


# -------------------------------------------------------------------- what a guest's word makes


def objects(rabbit: RabbitServer) -> tuple[set[str], set[str]]:
    """The names of all exchanges and queues."""
    exchanges = rabbit.ctl("list_exchanges", "name", "--no-table-headers").split("\n")
    return set(exchanges), set(rabbit.queues())


def test_a_guest_s_word_makes_nothing(host: Host, rabbit: RabbitServer, vm: str) -> None:
    before = objects(rabbit)
    outcomes = set()
    for number in range(20):
        topic = Topic(f"made-up-{number}", f"made-up-{number}")
        for form in (Form.TOPIC, Form.FANOUT, Form.NOTIFY):
            key = f"{topic.name}.info" if form is Form.NOTIFY else topic.name
            mandatory = form is Form.TOPIC
            sent = send(host, vm, to(topic, form=form, routing_key=key, mandatory=mandatory))
            outcomes.add((form, sent.ok, sent.unroutable))
    assert outcomes == {
        (Form.TOPIC, False, True),
        (Form.FANOUT, True, False),
        (Form.NOTIFY, False, True),
    }
    assert objects(rabbit) == before
    assert not host.events.has(Disconnected)


def test_what_nobody_consumes_is_bounded(
    host: Host, rabbit: RabbitServer, topic: Topic, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vchan.host.broker import request_publisher, topology

    monkeypatch.setattr(request_publisher, "UNHEARD_MAX", 10)
    monkeypatch.setattr(topology, "LOOK_S", 0.1)
    with raw_channel(rabbit) as channel:
        channel.exchange_declare(topic.exchange, "topic", durable=False, auto_delete=False)
        channel.queue_declare(topic.name, durable=True, auto_delete=False)
        channel.queue_bind(topic.name, topic.exchange, topic.name)
        sent = [send(host, vm, to(topic)) for _ in range(15)]
        assert {each.ok for each in sent[:10]} == {True}
        assert 10 <= sum(each.ok for each in sent) <= 11  # the first look saw an empty queue
        assert "nobody consumes" in sent[-1].reason
        tag = channel.basic_consume(topic.name, no_ack=True, callback=lambda _: None)
        wait_until(
            lambda: send(host, vm, to(topic)).ok,
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: "still refused",
        )
        channel.basic_cancel(tag)
        channel.queue_delete(topic.name)
