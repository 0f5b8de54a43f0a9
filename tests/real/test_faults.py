"""Everything dies, stops or restarts once while RPC flows: counted at both ends."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.rig import rig_directory, wait_until
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from vchan.client import Client
from vchan.errors import AgentGone, NoSuchAgent, RequestError

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

FILLING_CALLS = 200
CASTS_TO_SHELVED = 30
DELETE_AFTER = "delete_queues_after = 1"
DELETED_S = 8.0
"""Over DELETE_AFTER and LEFTOVERS_S."""
CALLERS = 2
CALL_TIMEOUT_S = 30
WRITTEN_S = 5.0
"""RabbitMQ 3.10, killed within a second of making a quorum queue, comes back with one that neither
delivers nor confirms for good."""
PAUSE_S = 15.0  # over the host's and the guest's silence limits and idle pings


# --- daemons and agents


def test_the_host_daemon_is_killed(vm: Vm) -> None:
    with vm.traffic() as traffic:
        for _ in range(3):
            vm.here.daemon.restart()
            vm.wait_ready()
            traffic.flows()
        report = traffic.finish()
    report.check()


def test_the_guest_daemon_is_killed(vm: Vm) -> None:
    """The agent lives: it remembers what it ran, and tells the new daemon."""
    with vm.traffic() as traffic, vm.shell() as shell:
        for _ in range(2):
            shell.check("kill -9 $(cat /run/vchan-guest.pid)")
            traffic.flows()
        report = traffic.finish()
    report.check()


def test_the_agent_is_killed(vm: Vm) -> None:
    """What it had not taken goes to the next agent; calls it had are over, and said to be."""
    with vm.traffic(callers=3) as traffic, vm.shell() as shell:
        shell.check("kill -STOP $(cat /run/agent.pid)")
        traffic.wait_for("casts_sent", traffic.progress["casts_sent"] + 50)
        shell.check("kill -9 $(cat /run/agent.pid)")
        traffic.flows()
        report = traffic.finish()
    assert 1 <= len(report.calls_failed) <= 3, report.calls_failed
    assert all("AgentGone" in failure for failure in report.calls_failed), report.calls_failed
    assert (report.duplicated, report.reordered, report.wrong_answers) == (0, 0, 0), report.brief()
    # One cast may have been taken and not been run: that dies with the agent.
    missing = report.lost - len(report.calls_failed)
    assert missing <= 1, report.brief()


# --- the VM


def test_a_long_pause(vm: Vm) -> None:
    before = vm.status()  # it may have been slow to boot, and been cured of that
    with vm.traffic() as traffic:
        vm.domain.suspend()
        time.sleep(PAUSE_S)  # that nothing happens is what is tested
        vm.domain.resume()
        traffic.flows()
        report = traffic.finish()
    report.check()
    after = vm.status()
    assert after["session"]["sessions"] == before["session"]["sessions"]
    assert after["channel"]["cures"] == before["channel"]["cures"]


def test_the_daemon_starts_while_the_vm_is_paused(vm: Vm) -> None:
    with vm.traffic() as traffic:
        vm.domain.suspend()
        vm.here.daemon.restart()
        vm.wait_status(lambda seen: seen["state"] == "paused", "is not paused")
        vm.domain.resume()
        traffic.flows()
        report = traffic.finish()
    report.check()


def test_a_reset_that_the_channel_does_not_show(vm: Vm) -> None:
    with vm.traffic() as traffic:
        before = vm.status()["session"]["sessions"]
        vm.domain.reset(0)
        vm.wait_status(lambda seen: seen["session"]["sessions"] > before, "no new session")
        traffic.flows(50)
        ran = vm.ran(f"{traffic.name}caster")
        report = traffic.finish()
    # What agents had taken died with the guest. The rest ran in the new one: once, in order.
    # A call that was under way then may have run in the guest that is gone: it is not run again.
    assert len(report.calls_failed) <= CALLERS, report.calls_failed
    assert all("AgentGone" in failure for failure in report.calls_failed), report.calls_failed
    assert (report.duplicated, report.reordered, report.wrong_answers) == (0, 0, 0), report.brief()
    assert ran == list(range(ran[0], ran[-1] + 1))
    missing = report.casts_sent - report.casts_executed
    missing += report.fanouts_sent - report.fanouts_executed
    assert missing <= report.lost <= missing + len(report.calls_failed), report.brief()


def test_save_and_restore(vm: Vm) -> None:
    with vm.traffic() as traffic:
        vm.domain.managedSave(0)
        vm.wait_status(lambda seen: seen["domain"] == "shutoff", "not off")
        vm.domain.create()
        vm.wait_ready()
        traffic.flows()
        report = traffic.finish()
    report.check()


# --- QEMU's own faults


def test_a_wedge_after_a_pause_is_cured(vm: Vm) -> None:
    """The daemon dies while the VM is paused, and the guest writes before anybody connects: QEMU
    then never delivers what the guest writes, until somebody closes and connects again."""
    with vm.traffic() as traffic:
        with vm.shell() as shell:
            shell.check("kill -STOP $(cat /run/agent.pid)")
            vm.domain.suspend()
            vm.here.daemon.kill()
            vm.domain.resume()
            shell.check("kill -CONT $(cat /run/agent.pid)")
        vm.here.daemon.start()
        vm.wait_ready()
        traffic.flows()
        report = traffic.finish()
    report.check()
    assert vm.status()["channel"]["cures"] >= 1


def test_a_wedge_of_a_late_connection_is_cured(vm: Vm) -> None:
    """The guest's port is full as it leaves, and nobody is connected where it arrives."""
    with vm.traffic() as traffic:
        with full_port(vm) as answers:
            source, destination = vm.here, vm.there
            destination.daemon.kill()
            vm.migrate()
            source.daemon.signal(signal.SIGCONT)
            destination.daemon.start()
            vm.wait_ready()
        traffic.flows()
        report = traffic.finish()
    report.check()
    assert vm.status()["channel"]["cures"] >= 1
    assert set(answers) <= {"answered", "AgentGone"}


def test_answers_that_qemu_delivers_at_both_hosts(vm: Vm) -> None:
    """The guest's port is full as it leaves. Once it runs elsewhere the source's daemon reads on,
    and the dying source QEMU delivers what the other QEMU delivers, too."""
    with vm.traffic() as traffic:
        for _ in range(3):
            with full_port(vm) as answers:
                migrate_and_drain(vm)
            assert set(answers) <= {"answered", "AgentGone"}
            if answers == ["answered"] * FILLING_CALLS:  # what was in the ring, too
                break
        traffic.flows()
        report = traffic.finish()
    report.check()
    if answers != ["answered"] * FILLING_CALLS:
        pytest.skip("three times the source's QEMU died before it had delivered anything")


def migrate_and_drain(vm: Vm) -> None:
    """Migrate; the source's daemon goes on as soon as the guest has arrived."""
    source, destination = vm.here, vm.there

    def has_arrived() -> bool:
        return vm.status(destination)["state"] in ("waiting", "ready")

    with ThreadPoolExecutor(1) as pool:
        moved = pool.submit(vm.migrate)
        wait_until(has_arrived, timeout_s=60, interval_s=0.001, failure=lambda: "no arrival")
        source.daemon.signal(signal.SIGCONT)
        moved.result()
    vm.wait_ready()


@contextlib.contextmanager
def full_port(vm: Vm) -> Iterator[list[str]]:
    """The host's daemon is stopped, and the guest has more to say than fits.

    A second agent answers calls of local programs one by one, so that the answers are many small
    writes: 93 fill the socket, the others stay in QEMU's ring. Gives what became of the calls, at
    the end.
    """
    became: list[str] = []

    def call(client: Client) -> str:
        try:
            client.call("slow", "blob", {"size": 700}, server=vm.uuid, timeout_s=60)
        except RequestError as error:
            return type(error).__name__
        return "answered"

    with contextlib.ExitStack() as stack:
        client = stack.enter_context(vm.client())
        with vm.shell() as shell:
            shell.check(
                "rm -f /run/slow; touch /run/slow; python3 /app/agent.py"
                " slow /run/slow /run/vchan/agent.sock 1 >/dev/console 2>&1 &"
                " echo $! >/run/slow.pid"
            )
            pid = int(shell.check("cat /run/slow.pid"))
            wait_until(
                lambda: slow_pid(client, vm) == pid,
                timeout_s=60,
                interval_s=0.1,
                failure=lambda: f"the second agent does not serve: {vm.status()}",
            )
            shell.check("kill -STOP $(cat /run/slow.pid)")
            pool = stack.enter_context(ThreadPoolExecutor(FILLING_CALLS))
            calls = [pool.submit(call, client) for _ in range(FILLING_CALLS)]
            vm.wait_status(
                lambda seen: (
                    seen["requests"]["open"] >= FILLING_CALLS and not seen["unacknowledged_frames"]
                ),
                "the calls are not in the guest",
            )
            vm.here.daemon.signal(signal.SIGSTOP)
            stack.callback(vm.here.daemon.signal, signal.SIGCONT)
            shell.check("kill -CONT $(cat /run/slow.pid)")
            shell.check(
                f"until [ $(wc -l </run/slow) -ge {FILLING_CALLS} ]; do usleep 10000; done",
                timeout_s=60,
            )
        assert "throttle on" in vm.here.monitor(vm.name, "info qtree")
        yield became
        became += [done.result() for done in calls]
        with vm.shell() as shell:
            shell.check("kill $(cat /run/slow.pid)")


def slow_pid(client: Client, vm: Vm) -> int:
    """Of the second agent that serves now: it may still be an earlier one's turn, or nobody's."""
    try:
        return int(client.call("slow", "pid", server=vm.uuid, timeout_s=60))
    except (AgentGone, NoSuchAgent):
        return 0


# --- libvirtd


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_libvirtd_restarts(vm: Vm, number: signal.Signals) -> None:
    before = vm.status()["session"]["sessions"]
    with vm.traffic() as traffic:
        vm.here.libvirt.stop(number)
        vm.wait_libvirt("cannot be reached", "closed the connection")
        traffic.flows()
        vm.here.libvirt.start()
        vm.wait_libvirt("connected")
        traffic.flows()
        vm.domain.suspend()  # it follows again
        vm.wait_status(lambda seen: seen["domain"] == "paused", "the pause was not noticed")
        vm.domain.resume()
        report = traffic.finish()
    report.check()
    assert vm.status()["session"]["sessions"] == before


# --- the broker


def test_the_broker_closes_connections(vm: Vm) -> None:
    with vm.traffic() as traffic:
        for _ in range(2):
            vm.cloud.rabbit.kill_connections()
            traffic.flows()
        report = traffic.finish()
    report.check()


@pytest.mark.parametrize("crash", [False, True])
def test_a_broker_that_keeps_everything_restarts(vm: Vm, crash: bool) -> None:
    """Everything outlives the broker, callers' queues for replies too: then nothing is lost."""
    query = "amqp_durable_queues=true&rabbit_transient_quorum_queue=true"
    with another_broker(vm, query) as rabbit, vm.traffic() as traffic:
        time.sleep(WRITTEN_S)
        rabbit.restart(crash=crash)
        traffic.flows()
        report = traffic.finish()
    report.check()


@pytest.mark.parametrize("crash", [False, True])
def test_a_broker_with_oslos_defaults_restarts(vm: Vm, crash: bool) -> None:
    """Exchanges, and callers' queues for replies, are gone with the broker. What was sent before it
    went and after everything was there again is complete; and what did run, ran once, in order."""
    with (
        another_broker(vm, "") as rabbit,
        vm.traffic(callers=CALLERS, call_timeout=CALL_TIMEOUT_S, fanouts_per_s=0) as traffic,
    ):
        traffic.flows()
        before = traffic.progress["casts_sent"]
        traffic.flows()
        rabbit.restart(crash=crash)
        traffic.flows(timeout_s=4 * CALL_TIMEOUT_S)
        after = traffic.progress
        traffic.flows()
        report = traffic.finish()
    assert (report.duplicated, report.reordered, report.wrong_answers) == (0, 0, 0), report.brief()
    sent = after["casts_sent"]
    assert all(before < number <= sent for number in report.casts_lost), (before, sent, report)
    # Each caller had one call under way.
    assert len(report.calls_failed) <= after["calls_failed"] + CALLERS, (after, report.calls_failed)
    assert all("MessagingTimeout" in failure for failure in report.calls_failed)
    assert report.lost == len(report.casts_lost) + len(report.calls_failed)


@contextlib.contextmanager
def another_broker(vm: Vm, query: str) -> Iterator[RabbitServer]:
    """Of the test's own, so that nothing is there that was declared otherwise."""
    with (
        rig_directory() as directory,
        RabbitServer(directory / "rabbit") as rabbit,
        vm.cloud.using(f"{rabbit.url}?{query}"),
    ):
        vm.wait_ready()
        yield rabbit


# --- other VMs


def test_a_stuck_vm_holds_up_no_other(vm: Vm) -> None:
    other = vm.cloud.boot("other")
    try:
        with vm.traffic(payload=1 << 20) as stuck, vm.shell() as shell:
            shell.check("kill -STOP $(cat /run/vchan-guest.pid)")
            stuck.wait_for("casts_sent", stuck.progress["casts_sent"] + 150)
            with other.traffic() as traffic:
                traffic.flows(100)
                report = traffic.finish()
            report.check()
            slowest_s = max(report.round_trips_s)
            shell.check("kill -CONT $(cat /run/vchan-guest.pid)")
            stuck.flows(3)
            stuck.finish().check()
    finally:
        other.discard()
    assert slowest_s < 10


# --- VMs that are no more


def test_the_queues_of_a_deleted_vm_go(cloud: Cloud) -> None:
    """If the operator says so. Those of one that is shut off stay, and those of one that moved."""
    with cloud.a.daemon.having(DELETE_AFTER), cloud.b.daemon.having(DELETE_AFTER):
        _check_that_queues_go(cloud)


def _check_that_queues_go(cloud: Cloud) -> None:
    vm = cloud.boot("short")
    try:
        vm.migrate()
        vm.wait_ready()
        vm.domain.destroy()
        vm.wait_status(lambda seen: seen["domain"] == "shutoff", "not off")
        time.sleep(DELETED_S)
        assert queues_of(vm)
        vm.domain.undefine()
        wait_until(
            lambda: not queues_of(vm),
            timeout_s=60,
            interval_s=0.5,
            failure=lambda: f"{queues_of(vm)}: {cloud.logs()}",
        )
    finally:
        vm.discard()


def test_what_is_cast_to_a_shelved_server_waits_for_it(cloud: Cloud) -> None:
    """nova undefines its domain, as it does a deleted one's, and defines it on another host."""
    import libvirt

    vm = cloud.boot("shelf")
    try:
        definition = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        queues = queues_of(vm)
        vm.domain.destroy()
        vm.domain.undefine()
        vm.wait_status(lambda seen: seen["state"] == "unknown", "is still there")
        time.sleep(DELETED_S)  # that nothing happens is what is tested
        assert queues_of(vm) == queues
        with vm.traffic(wait=False, callers=0) as traffic:
            traffic.wait_for("casts_sent", CASTS_TO_SHELVED)
            cloud.b.connection.defineXML(definition).create()
            vm.moved()
            vm.wait_ready()
            report = traffic.finish()
    finally:
        vm.discard()
    assert (report.lost, report.duplicated, report.reordered) == (0, 0, 0), report.brief()
    assert report.casts_executed == report.casts_sent >= CASTS_TO_SHELVED
    assert report.fanouts_executed == report.fanouts_sent > 0


def queues_of(vm: Vm) -> list[str]:
    """Its queues at the broker."""
    return [name for name in vm.cloud.rabbit.queues() if vm.uuid in name]


# --- plugging channels in and out


def test_a_channel_is_plugged_in_and_out(cloud: Cloud) -> None:
    host = cloud.a
    vm = cloud.boot("hot", channel=False)  # has a controller: the host plugs the channel in
    try:
        assert host.cli("detach", "hot").returncode == 0
        vm.wait_status(lambda seen: seen["state"] == "none", "still there")
        refused = host.cli("call", "hot", "demo", "pid")
        assert refused.returncode == 1
        assert "vchan attach hot" in refused.stderr
        assert host.cli("detach", "hot").returncode == 1  # it has none

        assert host.cli("attach", "hot").returncode == 0
        vm.wait_ready()
        with vm.traffic(fanouts_per_s=0) as traffic:
            traffic.flows()
            traffic.finish().check()
        assert json.loads(host.cli("--json", "call", "hot", "demo", "pid").stdout) > 1
    finally:
        vm.discard()


def test_without_a_controller_the_channel_comes_with_the_next_boot(cloud: Cloud) -> None:
    host = cloud.a
    vm = cloud.boot("bare", channel=False, controller=False, shell=False, wait=False)
    try:
        # The host has put it into the next boot's configuration, and says what to do.
        vm.wait_status(lambda seen: "boot the VM once more" in (seen.get("problem") or ""), "")
        asked = host.cli("attach", "bare")
        assert asked.returncode == 1
        assert "no virtio-serial controller" in asked.stderr
        assert "boot the VM once more" in asked.stderr
        assert asked.stderr.count("\n") == 1
        assert "no virtio-serial controller" in host.cli("list").stdout
        vm.domain.destroy()
        vm.domain.create()
        vm.wait_ready()
        assert vm.status()["problem"] is None
    finally:
        vm.discard()
