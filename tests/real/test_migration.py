"""Live migration between two libvirt hosts, counted at both ends while RPC flows."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from vchan.rpc.messages import Topic

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm
    from tests.rig.compute import ComputeHost

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]


def test_there_and_back_under_load(vm: Vm) -> None:
    with vm.traffic(callers=4, casts_per_s=100, fanouts_per_s=20) as traffic:
        for _ in range(3):
            vm.migrate()
            vm.wait_ready()
            traffic.flows()
        report = traffic.finish()
    report.check()
    status = vm.status()
    assert status["session"]["violations"] == 0
    assert status["channel"]["cures"] == 0  # connected in time: QEMU did not wedge
    assert status["first_answer_s"] is not None


def test_large_payloads(vm: Vm) -> None:
    with vm.traffic(callers=3, payload=1 << 20, call_pause=0.0, casts_per_s=20) as traffic:
        for _ in range(2):
            vm.migrate()
            vm.wait_ready()
            traffic.flows(5)
        report = traffic.finish()
    report.check()


def test_connected_and_silent_until_the_guest_resumes(vm: Vm) -> None:
    from tests.rig.cloud import HeldMigration

    with vm.traffic() as traffic, HeldMigration(vm) as migration:
        before = vm.status()["session"]["sessions"]
        assert_silent(vm, vm.there)
        traffic.flows()
        # Daemons that come up in the middle find their places.
        vm.there.daemon.restart()
        assert_silent(vm, vm.there)
        vm.here.daemon.restart()
        vm.wait_ready()
        traffic.flows()
        assert_silent(vm, vm.there)
        migration.go()
        vm.wait_ready()
        traffic.flows()
        report = traffic.finish()
    report.check()
    assert before == 1


def assert_silent(vm: Vm, host: ComputeHost) -> None:
    """Connected to a guest that is still arriving, and not a byte written."""
    status = vm.wait_status(lambda seen: seen["state"] == "arriving", "not connected", host)
    assert status["session"]["frames_sent"] == 0
    assert status["path"]


def test_a_migration_that_fails(vm: Vm) -> None:
    """Cancelled; destination lost; cancelled with the guest stopped already: nothing ever ended."""
    from tests.rig.cloud import HeldMigration

    source, destination = vm.here, vm.there
    with vm.traffic() as traffic:
        before = vm.status()["session"]
        with HeldMigration(vm) as migration:
            assert_silent(vm, destination)
            migration.abort()
        traffic.flows()
        with HeldMigration(vm) as migration:
            assert_silent(vm, destination)
            os.kill(destination.libvirt.qemu_pid(vm.name), signal.SIGKILL)
            migration.failed()
        traffic.flows()
        with HeldMigration(vm, live=False) as migration:
            vm.wait_status(lambda seen: seen["state"] == "leaving", "not hushed")
            assert_silent(vm, destination)
            migration.abort()
        vm.wait_ready()
        traffic.flows()
        report = traffic.finish()
    report.check()
    after = vm.status()
    assert vm.here is source
    assert after["session"]["sessions"] == before["sessions"]
    assert after["channel"]["requests_in_doubt"] == 0
    assert destination.daemon.call("status")["channels"] == 0


def test_daemons_die_as_the_guest_leaves(vm: Vm) -> None:
    """No host cooperates: what the broker keeps and the guest remembers is enough."""
    from tests.rig.cloud import HeldMigration

    with vm.traffic() as traffic:
        with HeldMigration(vm) as migration:
            source = vm.here
            assert_silent(vm, vm.there)
            source.daemon.kill()
            migration.go()
            vm.wait_ready()
            traffic.flows()
            source.daemon.start()
        with HeldMigration(vm) as migration:
            assert_silent(vm, vm.there)
            vm.here.daemon.kill()
            vm.there.daemon.kill()
            migration.go()
            vm.here.daemon.start()
            vm.wait_ready()
            traffic.flows()
            vm.there.daemon.start()
        report = traffic.finish()
    report.check()


def test_a_long_monitored_call_goes_on_through_a_migration(cloud: Cloud) -> None:
    """The caller is told all the while that it is being worked on."""
    from tests.rig.broker_peers import Clients
    from tests.rig.compute import GUEST_DAEMON, agent_service

    topic = Topic("openstack", "slow")
    agent = agent_service(
        "slow", "/app/agent.py", topic.name, "/run/slow", "/run/vchan/agent.sock", "2"
    )
    vm = cloud.boot("monitored", (GUEST_DAEMON, agent), wait=False)
    clients = Clients(cloud.url)
    try:
        vm.here.daemon.wait_ready(vm.name, topics=[topic.name])
        client = clients.client(topic, server=vm.uuid, timeout=90, call_monitor_timeout=8)
        with ThreadPoolExecutor(1) as pool:
            args = {"sender": "long", "number": 1, "seconds": 20}
            answer = pool.submit(client.call, {}, "slow", **args)
            vm.migrate()
            assert not answer.done()
            assert answer.result(90) == ["long", 1]
    finally:
        clients.close()
        vm.discard()
