"""Agents in real guests ask stock oslo.messaging services: counted at both ends, through faults."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.asking import Asker
    from tests.rig.cloud import Cloud, Vm
    from tests.rig.control_service import ControlService

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

WAIT_S = 120.0
_runs = itertools.count(1)


@pytest.fixture(scope="module")
def asking_vm(cloud: Cloud) -> Iterator[Vm]:
    from tests.rig.asking import ASKER
    from tests.rig.cloud import AGENT
    from tests.rig.compute import GUEST_DAEMON

    vm = cloud.boot("asking", (GUEST_DAEMON, AGENT, ASKER))
    try:
        vm.here.daemon.wait_ready(vm.name, topics=["asker"])
        yield vm
    finally:
        vm.discard()


@contextlib.contextmanager
def asking(vm: Vm) -> Iterator[Asker]:
    from tests.rig.asking import Asker

    topic = f"control{next(_runs)}"
    with service(vm, topic) as running:
        asker = Asker(functools.partial(tell, vm), running, topic, f"{topic}-")
        asker.flows(5)
        yield asker


def tell(vm: Vm, method: str, /, **args: Any) -> Any:
    with vm.client() as client:
        return client.call("asker", method, args, server=vm.uuid, timeout_s=60)


def wait_answer(vm: Vm) -> list[Any]:
    answer: list[list[Any] | None] = [None]

    def is_there() -> bool:
        answer[0] = tell(vm, "answer")
        return answer[0] is not None

    wait_until(is_there, timeout_s=WAIT_S, interval_s=0.2, failure=lambda: "no answer")
    assert answer[0] is not None
    return answer[0]


def kill_guest_daemon(vm: Vm) -> None:
    with vm.shell() as shell:
        shell.check("kill -9 $(cat /run/vchan-guest.pid)")


def test_casts_and_calls_arrive_once_in_order(asking_vm: Vm) -> None:
    with asking(asking_vm) as asker:
        asker.flows(50)
        asked = asker.finish()
    asked.check()
    assert asked.instances == {asking_vm.uuid}


def test_live_migrations_with_traffic_in_both_directions(asking_vm: Vm) -> None:
    vm = asking_vm
    with vm.traffic() as traffic, asking(vm) as asker:
        for _ in range(3):
            vm.migrate()
            traffic.flows()
            asker.flows()
        asker.finish().check()
        report = traffic.finish()
    report.check()


def test_the_guest_daemon_is_killed(asking_vm: Vm) -> None:
    with asking(asking_vm) as asker:
        for _ in range(2):
            kill_guest_daemon(asking_vm)
            asker.flows()
        asker.finish().check()


def test_the_host_daemon_is_killed(asking_vm: Vm) -> None:
    """Nobody is left who knows what it had published: what is sent again is marked."""
    with asking(asking_vm) as asker:
        for _ in range(2):
            asking_vm.here.daemon.restart()
            asker.flows()
        asker.finish().check(marked=True)


def test_the_host_daemon_is_restarted_in_order(asking_vm: Vm) -> None:
    """It leaves a note: only what the broker had not confirmed by then is in doubt."""
    with asking(asking_vm) as asker:
        for _ in range(2):
            asking_vm.here.daemon.stop()
            asking_vm.here.daemon.start()
            asker.flows()
        asker.finish().check(marked=True)


def test_the_broker_closes_connections(asking_vm: Vm) -> None:
    with asking(asking_vm) as asker:
        for _ in range(2):
            asking_vm.cloud.rabbit.kill_connections()
            asker.flows()
        asker.finish().check(marked=True)


def test_pause_save_and_restore(asking_vm: Vm) -> None:
    """As when the daemon stops: what was not confirmed when the VM went is in doubt."""
    vm = asking_vm
    with asking(vm) as asker:
        vm.domain.suspend()
        vm.domain.resume()
        asker.flows()
        vm.domain.managedSave()
        vm.domain.create()
        vm.wait_ready()
        asker.flows()
        asker.finish().check(marked=True)


# --- one call


@contextlib.contextmanager
def service(vm: Vm, topic: str) -> Iterator[ControlService]:
    from tests.rig.control_service import ControlService

    with ControlService(vm.cloud.url, topic, vm.cloud.directory / "control.log") as running:
        yield running


def test_an_answer_follows_the_vm_to_its_new_host(asking_vm: Vm) -> None:
    vm = asking_vm
    with service(vm, "control-slow") as running:
        args = {"sender": "slow", "number": 1, "seconds": 10}
        tell(vm, "ask", target="control-slow", method="slow", args=args)
        vm.migrate()
        assert tell(vm, "answer") is None  # it is under way all the while
        assert wait_answer(vm) == ["returned", ["slow", 1]]
        ran = running.finish()["slow"]
    assert [(entry.number, entry.redelivered) for entry in ran] == [(1, False)]


def test_a_service_raises(asking_vm: Vm) -> None:
    vm = asking_vm
    with service(vm, "control-failing"):
        tell(vm, "ask", target="control-failing", method="fail", args={"text": "no such flavor"})
        what, error, text = wait_answer(vm)
    assert (what, error) == ("raised", "RemoteError")
    assert "no such flavor" in text


def test_nobody_serves_it(asking_vm: Vm) -> None:
    """The caller hears it at once, and not when its time is up."""
    tell(asking_vm, "ask", target="nobody", method="echo", args={}, timeout_s=600)
    what, error, text = wait_answer(asking_vm)
    assert (what, error) == ("raised", "NoSuchAgent")
    assert "nobody serves" in text


def test_the_policy_denies_it(asking_vm: Vm) -> None:
    tell(asking_vm, "ask", target="forbidden", method="echo", args={}, timeout_s=600)
    what, error, text = wait_answer(asking_vm)
    assert (what, error) == ("raised", "Rejected")
    assert "policy" in text


def test_the_context_is_the_hosts_word(asking_vm: Vm) -> None:
    vm = asking_vm
    with service(vm, "control-identity") as running:
        args = {"sender": "me", "number": 1}
        tell(vm, "ask", target="control-identity", method="echo", args=args)
        assert wait_answer(vm)[0] == "returned"
        (ran,) = running.finish()["me"]
    assert ran.instance_uuid == vm.uuid
    assert not {"is_admin", "roles", "auth_token"} & set(ran.keys)
