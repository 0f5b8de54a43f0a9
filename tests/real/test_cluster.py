"""A RabbitMQ cluster of three nodes: one is lost under load, and what then holds."""

from __future__ import annotations

import gc
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.rig import rig_directory
from tests.rig.broker_load import (
    TOPIC,
    Gathered,
    Guests,
    Load,
    Publishing,
    assert_nothing_lost,
    consume_all,
)
from tests.rig.broker_peers import Clients, Host
from tests.rig.rabbit import RabbitCluster, RabbitServer
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from vchan.host.broker import request_publisher, vm_queues
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import (
    Connected,
    Consuming,
    Disconnected,
    Released,
)

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
    monkeypatch.setattr(vm_queues, "RETRY_MIN_S", 0.1)


@pytest.fixture
def vms() -> list[str]:
    return [str(uuid.uuid4()) for _ in range(4)]


def config_of(*nodes: RabbitServer, quorum: bool) -> BrokerConfig:
    hosts = tuple(BrokerHost("127.0.0.1", node.port) for node in nodes)
    return BrokerConfig(
        hosts, durable=True, quorum=quorum, fanout_quorum=quorum, heartbeat_s=4, prefetch=16
    )


# -------------------------------------------------------------------- quorum queues


def test_a_lost_node_loses_nothing(
    cluster: RabbitCluster, vms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node is killed in turn under load, both ways: so the leaders of all queues are, once."""
    monkeypatch.setattr(request_publisher, "UNHEARD_MAX", 10**6)  # it is read at the end
    guests = Guests(config_of(*cluster.nodes, quorum=True))
    url = f"{cluster.url}?{QUORUM}&heartbeat_timeout_threshold=4"
    gathered = Gathered(cluster.nodes[0])
    with guests:
        consume_all(guests, vms)  # before that a cast goes nowhere, and nobody is told
        with Load(url, vms) as load, Publishing(guests, vms) as publishing:
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
        taken = gathered.take()
    for vm, count in publishing.published.items():
        assert set(taken[vm]) == set(range(count))
    print(
        f"casts {sum(load.casts.values())}, calls {load.calls}, copies at hosts {guests.copies}; "
        f"published {publishing.total}, arrived {sum(map(len, taken.values()))}, lost connections "
        f"{guests.count(Disconnected)}"
    )


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
