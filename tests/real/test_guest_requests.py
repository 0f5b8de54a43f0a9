"""Agents in real guests ask stock oslo.messaging services: counted at both ends, through faults."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm
    from tests.rig.control_service import ControlService

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

WAIT_S = 120.0
_runs = itertools.count(1)


class Asker:
    """The asking agent in a VM, and the service it asks."""

    def __init__(self, vm: Vm, service: ControlService, topic: str, name: str) -> None:
        self.vm = vm
        self._service = service
        self._name = name
        self.tell("start", target=topic, name=name)

    def tell(self, method: str, **args: Any) -> Any:
        with self.vm.client() as client:
            return client.call("asker", method, args, server=self.vm.uuid, timeout_s=60)

    def flows(self, count: int = 20) -> None:
        """So many more calls answered and casts sent."""
        before = self.tell("progress")
        seen = before

        def moved() -> bool:
            nonlocal seen
            seen = self.tell("progress")
            return all(
                seen[name] >= before[name] + count for name in ("calls_answered", "casts_sent")
            )

        wait_until(moved, timeout_s=WAIT_S, interval_s=0.2, failure=lambda: f"stands at {seen}")

    def finish(self, *, redelivered: bool = False) -> None:
        """Stop, and compare both ends. What was marked as perhaps a copy may be one, if allowed."""
        told: dict[str, Any] = {}

        def over() -> bool:
            told.update(self.tell("stop"))
            return bool(told["running"] == 0)

        wait_until(over, timeout_s=WAIT_S, interval_s=0.2, failure=lambda: f"goes on: {told}")
        assert told["errors"] == []
        assert told["wrong_answers"] == 0
        assert told["calls_answered"] == told["calls_sent"] > 0
        ran = self._service.finish()
        for sender, sent in (
            (f"{self._name}caster", told["casts_sent"]),
            (f"{self._name}caller", told["calls_sent"]),
        ):
            copies = [entry.number for entry in ran[sender] if entry.redelivered]
            assert redelivered or copies == []
            first = list(dict.fromkeys(entry.number for entry in ran[sender]))
            assert first == list(range(1, sent + 1)), "lost or reordered"
            again = len(ran[sender]) - len(first)
            assert again <= len(copies), f"{again} ran twice, {copies} said so"
            assert {entry.instance_uuid for entry in ran[sender]} == {self.vm.uuid}


@pytest.fixture(scope="module")
def asking_vm(cloud: Cloud) -> Iterator[Vm]:
    from tests.rig.cloud import AGENT
    from tests.rig.compute import GUEST_DAEMON, agent_service

    asker = agent_service("asker", "/app/asker.py", "asker")
    vm = cloud.boot("asking", (GUEST_DAEMON, AGENT, asker))
    try:
        vm.here.daemon.wait_ready(vm.name, topics=["asker"])
        yield vm
    finally:
        vm.discard()


@contextlib.contextmanager
def asking(vm: Vm) -> Iterator[Asker]:
    from tests.rig.control_service import ControlService

    topic = f"control{next(_runs)}"
    log = vm.cloud.directory / "control.log"
    with ControlService(vm.cloud.url, topic, log) as service:
        asker = Asker(vm, service, topic, f"{topic}-")
        asker.flows(5)
        yield asker


Fault = Callable[["Vm"], None]


def kill_guest_daemon(vm: Vm) -> None:
    with vm.shell() as shell:
        shell.check("kill -9 $(cat /run/vchan-guest.pid)")


def test_casts_and_calls_arrive_once_in_order(asking_vm: Vm) -> None:
    with asking(asking_vm) as asker:
        asker.flows(50)
        asker.finish()


def test_live_migrations_with_traffic_in_both_directions(asking_vm: Vm) -> None:
    vm = asking_vm
    with vm.traffic() as traffic, asking(vm) as asker:
        for _ in range(3):
            vm.migrate()
            traffic.flows()
            asker.flows()
        asker.finish()
        report = traffic.finish()
    report.check()


def test_the_guest_daemon_is_killed(asking_vm: Vm) -> None:
    with asking(asking_vm) as asker:
        for _ in range(2):
            kill_guest_daemon(asking_vm)
            asker.flows()
        asker.finish()


def test_the_host_daemon_is_killed(asking_vm: Vm) -> None:
    """Nobody is left who knows what it had published: what is sent again is marked."""
    with asking(asking_vm) as asker:
        for _ in range(2):
            asking_vm.here.daemon.restart()
            asker.flows()
        asker.finish(redelivered=True)


def test_the_host_daemon_is_restarted_in_order(asking_vm: Vm) -> None:
    """It leaves a note: nothing is in doubt."""
    with asking(asking_vm) as asker:
        for _ in range(2):
            asking_vm.here.daemon.stop()
            asking_vm.here.daemon.start()
            asker.flows()
        asker.finish()


def test_the_broker_closes_connections(asking_vm: Vm) -> None:
    with asking(asking_vm) as asker:
        for _ in range(2):
            asking_vm.cloud.rabbit.kill_connections()
            asker.flows()
        asker.finish(redelivered=True)


def test_pause_save_and_restore(asking_vm: Vm) -> None:
    vm = asking_vm
    with asking(vm) as asker:
        vm.domain.suspend()
        vm.domain.resume()
        asker.flows()
        vm.domain.managedSave()
        vm.domain.create()
        vm.wait_ready()
        asker.flows()
        asker.finish()
