"""Real guests report of themselves: each change once to services, through live migrations."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm
    from tests.rig.compute import ComputeHost

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

WAIT_S = 120.0
QUIET_S = 3.0
"""Longer than a change takes to be told."""
TOPIC = "guests"
_addresses = itertools.count(1)


class Heard:
    """What a stock oslo.messaging listener hears of guests."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def info(
        self, context: Any, publisher: str, event_type: str, payload: Any, metadata: Any
    ) -> None:
        self.events.append((event_type, payload, dict(context)))

    def of(self, vm: Vm, what: str) -> list[dict[str, Any]]:
        """The reports of one kind, in order."""
        return [
            payload["report"]
            for event_type, payload, context in self.events
            if event_type == f"vchan.guest.{what}"
            and payload["vm"]["uuid"] == context["vchan_instance_uuid"] == vm.uuid
        ]


@pytest.fixture(scope="module")
def heard(cloud: Cloud) -> Iterator[Heard]:
    """Services listen, and both hosts tell them."""
    with warnings.catch_warnings():  # a stock one brings eventlet, which warns of itself
        warnings.simplefilter("ignore")
        import oslo_messaging
        from oslo_config import cfg

    heard = Heard()
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[], default_config_dirs=[])
    transport = oslo_messaging.get_notification_transport(conf, cloud.url)
    listener = oslo_messaging.get_notification_listener(
        transport, [oslo_messaging.Target(topic=TOPIC)], [heard], executor="threading"
    )
    listener.start()
    for host in (cloud.a, cloud.b):
        host.daemon.set_options(f"reports_topic = {TOPIC}")
        policy = host.daemon.policy
        policy.write_text(f"{policy.read_text()}\nreport any any allow\n")
    with cloud.using(cloud.url):
        try:
            yield heard
        finally:
            listener.stop()
            listener.wait()
            transport.cleanup()


@pytest.fixture(scope="module")
def reporting_vm(cloud: Cloud, heard: Heard) -> Iterator[Vm]:
    vm = cloud.boot("reporting")
    try:
        yield vm
    finally:
        vm.discard()


def facts(vm: Vm, host: ComputeHost | None = None) -> dict[str, Any]:
    shown: dict[str, Any] = (host or vm.here).daemon.call("facts", vm=vm.name)
    return shown


def hostname(vm: Vm) -> str | None:
    shown = facts(vm).get("facts") or {}
    return shown.get("hostname")


def wait_hostname(vm: Vm, name: str) -> None:
    wait_until(
        lambda: hostname(vm) == name,
        timeout_s=WAIT_S,
        interval_s=0.2,
        failure=lambda: f"{facts(vm)} {vm.cloud.logs()}",
    )


def rename(vm: Vm, name: str) -> None:
    """A change that the kernel does not tell of; an address with it makes the daemon look."""
    with vm.shell() as shell:
        shell.check(f"hostname {name}; ip addr add 192.0.2.{next(_addresses)}/32 dev lo")


def wait_heard(heard: Heard, vm: Vm, names: list[str]) -> None:
    def seen() -> list[str]:
        return [report["hostname"] for report in heard.of(vm, "facts")]

    wait_until(
        lambda: len(seen()) >= len(names),
        timeout_s=WAIT_S,
        interval_s=0.2,
        failure=lambda: f"{seen()} {vm.cloud.logs()}",
    )
    time.sleep(QUIET_S)
    assert seen() == names


def test_through_migrations_each_change_is_heard_once(reporting_vm: Vm, heard: Heard) -> None:
    vm = reporting_vm
    with vm.shell() as shell:
        first = shell.check("hostname").strip()
    wait_hostname(vm, first)
    row = next(row for row in vm.here.daemon.call("list") if row["uuid"] == vm.uuid)
    assert row["guest"]["phase"] == "ready"
    names = [first]
    for number in range(3):
        names.append(f"moved-{'x' * number}")
        rename(vm, names[-1])
        time.sleep(0.3 * number)  # the change is told before, while, or after the VM moves
        vm.migrate()
        wait_hostname(vm, names[-1])  # the new host knows it
        assert facts(vm)["phase"]["phase"] == "ready"
    wait_heard(heard, vm, names)
    assert [report["phase"] for report in heard.of(vm, "phase")] == ["ready"]


def test_the_host_daemon_is_restarted(reporting_vm: Vm, heard: Heard) -> None:
    vm = reporting_vm
    name = hostname(vm)
    assert name is not None
    count = len(heard.events)
    vm.here.daemon.stop()
    vm.here.daemon.start()
    wait_hostname(vm, name)
    time.sleep(QUIET_S)
    assert heard.events[count:] == []


def test_the_guest_daemon_is_killed(reporting_vm: Vm, heard: Heard) -> None:
    """The next one knows nothing of what was told: the host does."""
    vm = reporting_vm
    wait_until(
        lambda: hostname(vm) is not None,
        timeout_s=WAIT_S,
        interval_s=0.2,
        failure=lambda: str(facts(vm)),
    )
    time.sleep(QUIET_S)
    count = len(heard.events)
    with vm.shell() as shell:
        before = shell.check("cat /run/vchan-guest.pid")
        shell.check("kill -9 $(cat /run/vchan-guest.pid)")
    wait_until(
        lambda: facts(vm)["facts"]["age_s"] < QUIET_S,
        timeout_s=WAIT_S,
        interval_s=0.2,
        failure=lambda: f"{before} {facts(vm)}",
    )
    time.sleep(QUIET_S)
    assert heard.events[count:] == []


def test_a_topic_that_no_service_has_ever_listened_to(reporting_vm: Vm) -> None:
    """The host is told all the same, and of what changes afterwards, too."""
    vm = reporting_vm
    with vm.here.daemon.having("reports_topic = nobody-listens"):
        for name in ("unheard", "unheard-again"):
            rename(vm, name)
            wait_hostname(vm, name)
    wait_hostname(vm, "unheard-again")


def test_metrics_when_asked(reporting_vm: Vm) -> None:
    vm = reporting_vm
    with vm.client() as client:
        told = client.call("vchan.guest", "metrics", {}, server=vm.uuid, timeout_s=30)
    assert told["memory"]["available_bytes"] > 0
    wait_until(
        lambda: bool(vm.status()["measured"]["memory"]),
        timeout_s=WAIT_S,
        interval_s=0.1,
        failure=lambda: json.dumps(vm.status()),
    )
    assert vm.status()["measured"]["memory"]["total_bytes"] == told["memory"]["total_bytes"]


def test_the_policy_changes_its_mind(reporting_vm: Vm) -> None:
    """A guest that may not report says nothing; one that may again tells all."""
    import signal

    vm = reporting_vm
    policy = vm.here.daemon.policy
    before = policy.read_text()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: vm.here.daemon.signal(signal.SIGHUP))
        stack.callback(lambda: policy.write_text(before))
        policy.write_text(before.replace("report any any allow", "report any any deny"))
        vm.here.daemon.signal(signal.SIGHUP)
        time.sleep(1.0)
        counted = vm.status()["requests"]["from_guest"]["guest_requests"]
        name = hostname(vm)
        rename(vm, "unheard")
        time.sleep(QUIET_S)
        assert hostname(vm) == name
        assert vm.status()["requests"]["from_guest"]["guest_requests"] == counted
    wait_hostname(vm, "unheard")
