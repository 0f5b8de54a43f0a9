"""File systems of real guests, frozen: thawed when the lease, the session or the host is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from vchan.errors import AgentGone, RemoteError

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

WAIT_S = 60.0
LEASE_S = 100.0
"""Longer than any of these tests needs to see that something else has thawed."""


@pytest.fixture(scope="module")
def frozen_vm(cloud: Cloud) -> Iterator[Vm]:
    """With a disk, and with hooks that write down what they are called with."""
    from tests.rig.cloud import AGENT
    from tests.rig.guest_image import DISK_UP, Service, build

    hook = b'#!/bin/sh\necho "$1" >>/tmp/hooks\n'
    agent = Path(__file__).parents[1] / "rig" / "counting_agent.py"
    extra: dict[str, bytes | Path] = {"etc/vchan/freeze-hooks.d/10-note": hook}
    image = build(extra | {"app/agent.py": agent}, disk=True).staged(cloud.directory)
    allow = "--allow ping,info,freeze,set-time"
    daemon = Service("vchan-guest", f"python3 -m vchan.guest.daemon {allow}")
    for host in (cloud.a, cloud.b):
        host.daemon.set_options("set_guest_time = true")
        host.daemon.stop()
        host.daemon.use_broker(cloud.url)
        host.daemon.start()
    vm = cloud.boot("frozen", (daemon, AGENT), image=image)
    try:
        with vm.shell() as shell:
            shell.check(DISK_UP)
        yield vm
    finally:
        vm.discard()


def ask(vm: Vm, method: str, **args: Any) -> Any:
    with vm.client() as client:
        return client.call("vchan.guest", method, args, server=vm.uuid, timeout_s=60)


def freeze(vm: Vm, lease_s: float = LEASE_S) -> None:
    for attempt in range(3):
        try:
            told = ask(vm, "freeze", lease_s=lease_s)
            break
        except AgentGone:  # the daemon before this one may have done it
            if attempt == 2:
                raise
    assert told["frozen"] == ["/disk"]
    assert not can_write(vm)


def can_write(vm: Vm) -> bool:
    """Whether the disk takes a write. One that waits is given up, and waits on until it does."""
    with vm.shell() as shell:
        script = "rm -f /tmp/wrote; (echo x >/disk/file; touch /tmp/wrote) >/dev/null 2>&1 & "
        shell.check(f"{script} sleep 1.5")
        return shell.run("[ -e /tmp/wrote ]").status == 0


def wait_thawed(vm: Vm) -> None:
    wait_until(
        lambda: can_write(vm),
        timeout_s=WAIT_S,
        interval_s=0.2,
        failure=lambda: f"still frozen: {vm.cloud.logs()}",
    )


def hooks(vm: Vm) -> list[str]:
    with vm.shell() as shell:
        return shell.check("cat /tmp/hooks 2>/dev/null; rm -f /tmp/hooks").split()


def test_frozen_and_thawed(frozen_vm: Vm) -> None:
    vm = frozen_vm
    freeze(vm)
    assert hooks(vm) == ["freeze"]
    told = ask(vm, "thaw")
    assert told == {"thawed": ["/disk"], "why": "somebody asked for it"}
    assert can_write(vm)
    assert hooks(vm) == ["thaw"]


def test_a_lease_that_is_over(frozen_vm: Vm) -> None:
    freeze(frozen_vm, lease_s=5.0)
    wait_thawed(frozen_vm)


def test_the_host_daemon_is_killed(frozen_vm: Vm) -> None:
    vm = frozen_vm
    freeze(vm)
    began_s = time.monotonic()
    vm.here.daemon.kill()
    try:
        wait_thawed(vm)
        assert time.monotonic() - began_s < LEASE_S / 2
    finally:
        vm.here.daemon.start()
        vm.wait_ready()


def test_the_vm_migrates(frozen_vm: Vm) -> None:
    vm = frozen_vm
    freeze(vm)
    vm.migrate()
    wait_thawed(vm)
    vm.wait_ready()
    freeze(vm)
    assert ask(vm, "thaw")["thawed"] == ["/disk"]


@pytest.mark.parametrize("then", ["start", "stay away"])
def test_the_guest_daemon_is_killed(frozen_vm: Vm, then: str) -> None:
    vm = frozen_vm
    freeze(vm)
    with vm.shell() as shell:
        if then == "stay away":
            shell.check("touch /run/vchan-guest.hold")
        shell.check("kill -9 $(cat /run/vchan-guest.pid)")
    wait_thawed(vm)
    with vm.shell() as shell:
        shell.check("rm -f /run/vchan-guest.hold")
    vm.wait_ready()


# --- the clock


def set_back(vm: Vm) -> None:
    with vm.shell() as shell:
        shell.check("date -s @$(($(date +%s) - 3600))")


def wait_clock(vm: Vm) -> None:
    def is_right() -> bool:
        with vm.shell() as shell:
            return abs(int(shell.check("date +%s")) - time.time()) < 3.0

    wait_until(
        is_right, timeout_s=WAIT_S, interval_s=0.5, failure=lambda: f"late: {vm.cloud.logs()}"
    )


def test_the_clock_is_set_after_a_pause_a_restore_and_a_migration(frozen_vm: Vm) -> None:
    vm = frozen_vm
    set_back(vm)
    vm.domain.suspend()
    vm.domain.resume()
    wait_clock(vm)
    set_back(vm)
    vm.domain.managedSave()
    vm.domain.create()
    vm.wait_ready()
    wait_clock(vm)
    set_back(vm)
    vm.migrate()
    wait_clock(vm)
    vm.wait_ready()


def test_who_may_not_freeze(cloud: Cloud) -> None:
    vm = cloud.shared_vm()
    with pytest.raises(RemoteError, match="option allow"):
        ask(vm, "freeze")
