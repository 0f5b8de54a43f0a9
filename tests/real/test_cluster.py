"""A RabbitMQ cluster of three nodes: one is lost under load, and what then holds."""

from __future__ import annotations

import gc
import json
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import rig_directory, wait_until
from tests.rig.broker_peers import Clients, Host, raw_channel
from tests.rig.rabbit import RabbitCluster, RabbitServer
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from vchan.host import broker_vm
from vchan.host.broker import Broker
from vchan.host.broker_config import BrokerConfig, BrokerHost
from vchan.host.broker_events import (
    BrokerEvent,
    Connected,
    Consuming,
    Delivered,
    Disconnected,
    Form,
    Publication,
    Published,
    Released,
    Sent,
    Token,
)
from vchan.host.envelope import BrokerRequest, encode_reply
from vchan.messages import Topic

if TYPE_CHECKING:
    from tests.rig.cloud import Vm

MISSING = missing_for_rabbit()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(MISSING), reason=str(MISSING)),
    # A stock client leaves its socket to the garbage collector when its connection is lost.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
    ),
]

QUORUM = "rabbit_quorum_queue=true&rabbit_transient_quorum_queue=true"
TIMEOUT_S = 120.0
"""For the cluster, and clients that back off, to come round."""
CALL_TIMEOUT_S = 120
TOPIC = Topic("openstack", "cluster-topic")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RabbitCluster]:
    with rig_directory() as directory, RabbitCluster(directory) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def whole_again(cluster: RabbitCluster) -> Iterator[None]:
    """Nodes that a test has ended are back for the next."""
    yield
    for node in cluster.nodes:
        if not node.is_running:
            node.start()
    cluster.wait_whole()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_vm, "RETRY_MIN_S", 0.1)


@pytest.fixture
def vms() -> list[str]:
    return [str(uuid.uuid4()) for _ in range(4)]


def config_of(*nodes: RabbitServer, quorum: bool) -> BrokerConfig:
    hosts = tuple(BrokerHost("127.0.0.1", node.port) for node in nodes)
    return BrokerConfig(
        hosts, durable=True, quorum=quorum, fanout_quorum=quorum, heartbeat_s=4, prefetch=16
    )


class Guests:
    """Hosts' side: takes what comes for VMs, as guests do. What was taken before is only
    acknowledged; calls are answered until the broker has confirmed it."""

    def __init__(self, config: BrokerConfig) -> None:
        self.broker = Broker(config, self._post)
        self.ran: defaultdict[str, list[int]] = defaultdict(list)
        self.copies = 0
        self.events: list[BrokerEvent] = []
        self.sent: list[Sent] = []
        self._seen: set[tuple[str, bytes]] = set()
        self._answers: dict[bytes, tuple[str, bytes, Token]] = {}
        self._outgoing: dict[bytes, tuple[str, Publication]] = {}
        self._retries = ThreadPoolExecutor(8)
        self._over = threading.Event()

    def _post(self, event: BrokerEvent) -> None:
        match event:
            case Delivered():
                self._take(event.vm, event.request, event.token)
            case Published(key, ok, _):
                reply_q, body, token = self._answers[key]
                if ok:
                    self.broker.ack(token)
                else:
                    self._later(lambda: self.broker.publish_reply(reply_q, body, key))
            case Sent():
                self.sent.append(event)
                if not event.ok:
                    self._later(self._publish, event.request_id)
            case _:
                self.events.append(event)

    def _take(self, vm: str, request: BrokerRequest, token: Token) -> None:
        if (vm, request.id) in self._seen:
            self.copies += 1
        else:
            self._seen.add((vm, request.id))
            self.ran[vm].append(request.args["x"])
        if not request.is_call:
            self.broker.ack(token)
            return
        assert request.msg_id is not None and request.reply_q is not None
        result = json.dumps(request.args["x"]).encode()
        body = encode_reply(request.msg_id, result_json=result, unique_id=uuid.uuid4().hex)
        self._answers[request.id] = (request.reply_q, body, token)
        self.broker.publish_reply(request.reply_q, body, request.id)

    def publish(self, vm: str, request_id: bytes, publication: Publication) -> None:
        """Until the broker has confirmed it."""
        self._outgoing[request_id] = (vm, publication)
        self._publish(request_id)

    def _publish(self, request_id: bytes) -> None:
        vm, publication = self._outgoing[request_id]
        self.broker.publish_request(vm, request_id, publication)

    def _later(self, call: Any, *args: Any) -> None:
        """Not at once, and not on the broker's thread."""

        def wait_and_call() -> None:
            if not self._over.wait(0.2):
                call(*args)

        self._retries.submit(wait_and_call)

    def count(self, kind: type[BrokerEvent]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def __enter__(self) -> Guests:
        self.broker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._retries.shutdown()
        self.broker.stop()


class Load:
    """Stock clients that cast to every VM, and call, until told to stop."""

    def __init__(self, url: str, vms: list[str]) -> None:
        self._clients = Clients(url)
        self._stop = threading.Event()
        self.casts: dict[str, int] = dict.fromkeys(vms, 0)
        self.calls = 0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._cast, args=(vm,)) for vm in vms]
        self._threads.append(threading.Thread(target=self._call, args=(vms,)))

    def _cast(self, vm: str) -> None:
        client = self._clients.client(TOPIC, server=vm)
        while not self._stop.wait(0.01):
            client.cast({}, "note", x=self.casts[vm] + 1)
            self.casts[vm] += 1

    def _call(self, vms: list[str]) -> None:
        while not self._stop.wait(0.02):
            vm = vms[self.calls % len(vms)]
            client = self._clients.client(TOPIC, server=vm, timeout=CALL_TIMEOUT_S)
            number = -self.calls - 1
            if client.call({}, "echo", x=number) != number:
                self.wrong.append(f"{vm} {number}")
            self.calls += 1

    def wait_for_more(self, count: int) -> None:
        """Until so many more calls are answered, and casts to every VM confirmed."""
        calls, casts = self.calls, dict(self.casts)
        wait_until(
            lambda: self.calls - calls >= count and self._fewest_since(casts) >= count,
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"{self.calls - calls} calls, {self._fewest_since(casts)} casts",
        )

    def _fewest_since(self, casts: dict[str, int]) -> int:
        return min(self.casts[vm] - count for vm, count in casts.items())

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "a client does not come back"

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._clients.close()
        gc.collect()


def assert_nothing_lost(load: Load, guests: Guests) -> None:
    """Every cast ran once, in order, and every call was answered by its own answer."""

    def all_ran() -> bool:
        return all(len(casts_of(guests, vm)) >= count for vm, count in load.casts.items())

    wait_until(
        all_ran,
        timeout_s=TIMEOUT_S,
        interval_s=0.2,
        failure=lambda: str(
            {
                vm: sorted(set(range(1, count + 1)) - set(casts_of(guests, vm)))[:20]
                for vm, count in load.casts.items()
            }
        ),
    )
    for vm, count in load.casts.items():
        assert casts_of(guests, vm) == list(range(1, count + 1))
    assert load.wrong == []


def casts_of(guests: Guests, vm: str) -> list[int]:
    return [number for number in guests.ran[vm] if number > 0]


def consume_all(guests: Guests, vms: list[str]) -> None:
    for vm in vms:
        guests.broker.consume(vm, frozenset({TOPIC}))
    wait_until(
        lambda: guests.count(Consuming) >= len(vms),
        timeout_s=TIMEOUT_S,
        interval_s=0.1,
        failure=lambda: str(guests.events),
    )


# -------------------------------------------------------------------- quorum queues


def test_a_lost_node_loses_nothing(cluster: RabbitCluster, vms: list[str]) -> None:
    """Each node is killed in turn under load, both ways: so the leaders of all queues are, once."""
    guests = Guests(config_of(*cluster.nodes, quorum=True))
    url = f"{cluster.url}?{QUORUM}&heartbeat_timeout_threshold=4"
    with guests, gathering(cluster) as gathered, Load(url, vms) as load:
        consume_all(guests, vms)
        publishing = Publishing(guests, vms)
        with publishing:
            load.wait_for_more(30)
            for node in cluster.nodes:
                node.stop(crash=True)
                load.wait_for_more(30)
                publishing.wait_for_more(30)
                node.start()
                cluster.wait_whole()
                load.wait_for_more(10)
        load.stop()
        assert_nothing_lost(load, guests)
        publishing.wait_confirmed()
        taken = gathered.take(publishing.total)
    for vm, count in publishing.published.items():
        numbers = [number for of, number in taken if of == vm]
        assert set(numbers) == set(range(count))
    print(
        f"casts {sum(load.casts.values())}, calls {load.calls}, copies at hosts {guests.copies}; "
        f"published {publishing.total}, arrived {len(taken)}, lost connections "
        f"{guests.count(Disconnected)}"
    )


class Publishing:
    """VMs that publish to one topic of the control side, each one after the other."""

    def __init__(self, guests: Guests, vms: list[str]) -> None:
        self._guests = guests
        self.published = dict.fromkeys(vms, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @property
    def total(self) -> int:
        return sum(self.published.values())

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            if self.total - self._confirmed() > 100:
                continue
            for vm, number in self.published.items():
                body = f"{vm} {number}".encode()
                cast = Publication(Form.TOPIC, "openstack", "gathered", body, None, mandatory=True)
                self._guests.publish(vm, body, cast)
                self.published[vm] += 1

    def _confirmed(self) -> int:
        return sum(event.ok for event in list(self._guests.sent))

    def wait_for_more(self, count: int) -> None:
        before = self._confirmed()
        wait_until(
            lambda: self._confirmed() - before >= count,
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"confirmed {self._confirmed()}: {self._guests.sent[-5:]}",
        )

    def wait_confirmed(self) -> None:
        wait_until(
            lambda: self._confirmed() >= self.total,
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"{self._confirmed()} of {self.total}: {self._guests.sent[-5:]}",
        )

    def __enter__(self) -> Publishing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Gathered:
    def __init__(self, cluster: RabbitCluster) -> None:
        self._cluster = cluster

    def take(self, at_least: int) -> list[tuple[str, int]]:
        """What is in the queue."""
        taken: list[tuple[str, int]] = []
        with raw_channel(self._cluster.nodes[0]) as channel:
            while (message := channel.basic_get("gathered", no_ack=True)) is not None:
                vm, number = message.body.split()
                taken.append((vm, int(number)))
        assert len(taken) >= at_least
        return taken


@contextmanager
def gathering(cluster: RabbitCluster) -> Iterator[Gathered]:
    """A quorum queue on the control side."""
    with raw_channel(cluster.nodes[0]) as channel:
        channel.exchange_declare("openstack", "topic", durable=True, auto_delete=False)
        channel.queue_declare(
            "gathered", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"}
        )
        channel.queue_bind("gathered", "openstack", "gathered")
    yield Gathered(cluster)


# -------------------------------------------------------------------- classic queues


def test_classic_queues_are_where_they_were_made(cluster: RabbitCluster) -> None:
    """Those of a lost node are away until it is back, with all that they held; no others are."""
    near, far = cluster.nodes[1:]
    one, two = (str(uuid.uuid4()) for _ in range(2))
    clients = Clients(f"{cluster.nodes[0].url}?amqp_durable_queues=true")
    try:
        with (
            Host(config_of(near, cluster.nodes[0], quorum=False)) as here,
            Host(config_of(far, quorum=False)) as there,
        ):
            here.consume(one, TOPIC)
            there.consume(two, TOPIC)
            for number in range(3):
                clients.cast(TOPIC, one, x=number)
                clients.cast(TOPIC, two, x=number)
            assert here.numbers(3) == there.numbers(3) == [0, 1, 2]
            near.stop(crash=True)
            here.events.take(Released, vm=one)
            here.events.take(Disconnected)
            here.events.take(Connected)
            clients.cast(TOPIC, two, x=3)
            assert there.numbers(1) == [3]
            here.events.assert_quiet(Consuming, for_s=3.0)
            near.start()
            here.events.take(Consuming, vm=one)
            assert here.numbers(3) == [0, 1, 2]
            clients.cast(TOPIC, one, x=4)
            assert here.numbers(1) == [4]
            assert not there.events.has(Released)
    finally:
        clients.close()
        gc.collect()


# -------------------------------------------------------------------- end to end


@pytest.mark.skipif(bool(missing_for_libvirt()), reason=str(missing_for_libvirt()))
def test_a_vm_s_agent_does_not_notice(cluster: RabbitCluster, vm: Vm) -> None:
    """A stock service, the daemons, an agent in a real VM; and each node is killed in turn."""
    with vm.cloud.using(f"{cluster.url}?{QUORUM}"):
        vm.wait_ready()
        with vm.traffic() as traffic:
            for node in cluster.nodes:
                time.sleep(2.0)  # load, and time for the cluster to have all leaders
                node.stop(crash=True)
                traffic.flows()
                node.start()
                cluster.wait_whole()
            traffic.flows()
            report = traffic.finish()
    report.check()
    print(report.brief())
