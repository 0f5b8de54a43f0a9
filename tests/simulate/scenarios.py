"""Faults by hand: what chance needs thousands of seeds for.

Each is given a run that serves; afterwards everything is healed, must converge and answer probes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulate.asking import CAST as CAST_UP
from tests.simulate.check import CAST, FANOUT, LONG_S
from tests.simulate.guest import Migration
from vchan.messages import CALL
from vchan.messages import FANOUT as FANOUT_UP

if TYPE_CHECKING:
    from tests.simulate.guest import Vm
    from tests.simulate.hosts import Host
    from tests.simulate.run import Run

TOPICS = ("alpha", "beta")


def _other(run: Run, vm: Vm) -> Host:
    assert vm.qemu is not None
    here = vm.qemu.host
    return next(host for host in run.hosts if host is not here)


def _load(run: Run, vm: Vm) -> None:
    for topic in TOPICS:
        for _ in range(3):
            run.callers.cast(vm.uuid, topic, CAST, filling="")
        run.callers.cast(vm.uuid, topic, FANOUT, filling="")
        run.callers.call(vm.uuid, topic, LONG_S, fails=False, filling="x" * 20_000)
    for agent in list(vm.agents.values()):
        for kind in (CAST_UP, CALL, FANOUT_UP):
            run.asking.ask(agent, kind, 2, at_once=run.world.rng.random() < 0.5)


def migration_fails_at_the_end(run: Run) -> None:
    """The source goes on, and is not given up later."""
    for vm in run.vms:
        _load(run, vm)
        for _ in range(8):  # the later ones without a word from the guest in between
            Migration(vm, _other(run, vm), fails="late", twice=False)
            while vm.migrating:
                run.world.run(run.world.now_s + 0.05)
    run.world.run(run.world.now_s + 90.0)


def there_and_back_again(run: Run) -> None:
    """Migrations in a row, under load, rings delivered twice."""
    for _ in range(6):
        for vm in run.vms:
            _load(run, vm)
            Migration(vm, _other(run, vm), fails="", twice=True)
        run.world.run(run.world.now_s + 2.0 + run.world.rng.random())


def source_dies_as_the_guest_arrives(run: Run) -> None:
    """Nobody tells the broker that the source is gone."""
    vm = run.vms[0]
    assert vm.qemu is not None
    source = vm.qemu.host
    _load(run, vm)
    Migration(vm, _other(run, vm), fails="", twice=False)
    while vm.migrating:
        run.world.run(run.world.now_s + 0.05)
    source.up = False
    source.kill_daemon(host_too=True)
    for qemu in list(source.qemus.values()):
        qemu.die()
    for one in run.vms:
        if one.qemu is not None and one.qemu.dead:
            one.die()
    run.world.run(run.world.now_s + 5.0)


def agents_die_with_casts_in_their_hands(run: Run) -> None:
    """What an agent acknowledged in its last moment counts."""
    world, rng = run.world, run.world.rng
    for _ in range(12):
        for vm in run.vms:
            casts = [run.callers.cast(vm.uuid, topic, CAST, filling="") for topic in TOPICS]
            for _ in range(12):
                run.callers.call(vm.uuid, rng.choice(TOPICS), 10.0, fails=False, filling="")
            world.run(world.now_s + 3.0, lambda: any(cast.runs for cast in casts))  # noqa: B023
            world.run(world.now_s + rng.random() * 0.0003)
            for slot in sorted(vm.agents):
                vm.kill_agent(slot)
            world.run(world.now_s + 0.02)
            for slot in range(len(vm.slots)):
                vm.start_agent(slot)
            world.run(world.now_s + 0.5)


def broker_is_cut_again_and_again(run: Run) -> None:
    """With a host daemon that is slow to hear of it."""
    rng = run.world.rng
    for _ in range(8):
        for vm in run.vms:
            _load(run, vm)
        sent = len(run.ledger.ops)
        run.world.run(run.world.now_s + 3.0, lambda: bool(run.ledger.ops[sent].runs))  # noqa: B023
        run.world.run(run.world.now_s + rng.choice((0.001, 0.003, 1.0)) * rng.random())
        for host in run.hosts:
            if host.daemon is not None:
                host.daemon.broker.cut()
            if not host.machine.frozen:
                host.machine.freeze()
                run.world.after(rng.random() * 3.0, run.faults.unstall, host)
        run.world.run(run.world.now_s + 4.0)


def host_daemon_dies_with_requests_under_way(run: Run) -> None:
    """It leaves no note: what it had published nobody knows."""
    rng = run.world.rng
    for _ in range(6):
        for vm in run.vms:
            _load(run, vm)
        run.world.run(run.world.now_s + rng.choice((0.002, 0.01, 0.3)) * rng.random())
        for host in run.hosts:
            host.kill_daemon()
            run.world.after(0.1 + rng.random(), host.start_daemon)
        run.world.run(run.world.now_s + rng.choice((2.0, 12.0)))


def guest_daemon_restarts_under_load(run: Run) -> None:
    """Agents come back with what they hold."""
    for _ in range(6):
        for vm in run.vms:
            _load(run, vm)
            run.world.run(run.world.now_s + run.world.rng.random() * 0.01)
            vm.kill_daemon()
            run.world.run(run.world.now_s + 0.3)
            vm.start_daemon()
        run.world.run(run.world.now_s + 1.0)


def paused_for_hours(run: Run) -> None:
    """A paused guest is not dead; the broker keeps its requests."""
    run.ledger.hours_passed = run.asking.hours_passed = True
    for vm in run.vms:
        _load(run, vm)
        vm.pause()
    run.world.run(run.world.now_s + 7200.0)


def wedged_in_company(run: Run) -> None:
    """A wedge, while the broker is away."""
    for vm in run.vms:
        _load(run, vm)
        if vm.qemu is not None:
            vm.qemu.wedge()
    for host in run.hosts:
        if host.daemon is not None:
            host.daemon.broker.cut()
    run.world.run(run.world.now_s + 1.0)


SCENARIOS = (
    migration_fails_at_the_end,
    there_and_back_again,
    source_dies_as_the_guest_arrives,
    agents_die_with_casts_in_their_hands,
    broker_is_cut_again_and_again,
    host_daemon_dies_with_requests_under_way,
    guest_daemon_restarts_under_load,
    paused_for_hours,
    wedged_in_company,
)
