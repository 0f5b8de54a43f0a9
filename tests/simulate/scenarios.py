"""Faults by hand: what chance needs thousands of seeds for.

Each is given a run that serves; afterwards everything is healed, must converge and answer probes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulate.asking import CAST as CAST_UP
from tests.simulate.broker import RETURNS_MAX
from tests.simulate.callers import EXCHANGE
from tests.simulate.check import CAST, FANOUT, LONG_S
from tests.simulate.guest import Migration
from vchan.host.vm.handover import NOTE_WAIT_S
from vchan.rpc.dispatcher import LINGER_S
from vchan.rpc.messages import CALL, Topic
from vchan.rpc.messages import FANOUT as FANOUT_UP

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
    """With a host daemon that is slow to hear of it, and a broker that is there again at once."""
    rng = run.world.rng
    run.broker.away_s = (0.0,)
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


def broker_is_in_trouble(run: Run) -> None:
    """It refuses some of what guests ask, says so late and in any order, and is then lost: while
    agents go on asking."""
    world, rng = run.world, run.world.rng
    for _ in range(5):
        run.broker.trouble_until_s = world.now_s + 1.5
        for _ in range(6):
            for vm in run.vms:
                for agent in list(vm.agents.values()):
                    run.asking.ask(agent, CAST_UP, 3, at_once=True)
            world.run(world.now_s + rng.random() * 0.4)
        for host in run.hosts:
            if host.daemon is not None and rng.random() < 0.7:
                host.daemon.broker.cut()
        if rng.random() < 0.5:  # what is in doubt, the next host has to know
            for vm in run.vms:
                Migration(vm, _other(run, vm), fails="", twice=False)
        world.run(world.now_s + rng.choice((2.0, 15.0)))


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


def agents_are_away_for_long(run: Run) -> None:
    """Calls are refused. They never run, whatever happens afterwards."""
    world, rng = run.world, run.world.rng
    for _ in range(4):
        for vm in run.vms:
            for slot in sorted(vm.agents):
                vm.kill_agent(slot)
        world.run(world.now_s + rng.random() * LINGER_S)
        for vm in run.vms:
            for topic in TOPICS:
                for _ in range(2):
                    run.callers.call(vm.uuid, topic, 60.0, fails=False, filling="")
        last = list(run.ledger.ops.values())[-1]
        world.run(world.now_s + LINGER_S, lambda: bool(last.outcome))  # noqa: B023
        for vm in run.vms:
            if rng.random() < 0.5:
                vm.kill_daemon()
                world.after(0.3, vm.start_daemon)
            elif rng.random() < 0.3 and vm.is_free:
                Migration(vm, _other(run, vm), fails="", twice=False)
        for host in run.hosts:
            if rng.random() < 0.4:
                host.kill_daemon()
                world.after(0.3, host.start_daemon)
            elif rng.random() < 0.4 and host.daemon is not None:
                host.daemon.broker.cut()
        world.run(world.now_s + rng.random())
        for vm in run.vms:
            for slot in range(len(vm.slots)):
                vm.start_agent(slot)
        world.run(world.now_s + 3.0)


def guests_lose_their_memory(run: Run) -> None:
    """The daemon and an agent, or all of them, die together, with requests under way."""
    world, rng = run.world, run.world.rng
    for _ in range(8):
        for vm in run.vms:
            _load(run, vm)
        sent = len(run.ledger.ops)
        if rng.random() < 0.7:
            world.run(world.now_s + 2.0, lambda: bool(run.ledger.ops[sent].runs))  # noqa: B023
        world.run(world.now_s + rng.choice((0.0005, 0.003, 0.3)) * rng.random())
        for vm in run.vms:
            vm.kill_daemon()
            dead = [slot for slot in sorted(vm.agents) if rng.random() < 0.8]
            for slot in dead:
                vm.kill_agent(slot)
            world.after(0.05 + rng.random(), vm.start_daemon)
            for slot in dead:
                world.after(0.05 + rng.random() * rng.choice((0.5, 3.0)), vm.start_agent, slot)
        for host in run.hosts:
            if rng.random() < 0.3:
                host.kill_daemon()
                world.after(0.2, host.start_daemon)
            elif rng.random() < 0.3 and host.daemon is not None:
                host.daemon.broker.cut()
        world.run(world.now_s + rng.choice((1.5, 4.0)))


def host_daemons_die_as_the_guest_leaves(run: Run) -> None:
    """Under calls. The next daemon is handed out what was under way, and loses the guest at once:
    it passes that on later, to the guest's daemon that has been there all the while."""
    world, rng = run.world, run.world.rng

    def ask() -> None:
        for vm in run.vms:
            run.callers.call(vm.uuid, rng.choice(TOPICS), 60.0, fails=False, filling="")

    for vm in run.vms:
        _load(run, vm)
    world.run(world.now_s + 2.0)
    for _ in range(4):
        for at in range(50):
            world.after(at * 0.03, ask)
        world.run(world.now_s + 0.2)
        for vm in run.vms:
            if vm.is_free:
                Migration(vm, _other(run, vm), fails="", twice=False)
        for _ in range(12):
            for host in run.hosts:
                host.kill_daemon()
                host.start_daemon()
            world.run(world.now_s + 0.05 + rng.random() * 0.1)
        world.run(world.now_s + 2.0)


def moves_on_and_on_after_a_host_daemon_died(run: Run) -> None:
    """Each host that it comes to lacks the same note. It is waited for once, not at each."""
    world, vm = run.world, run.vms[0]
    assert vm.qemu is not None
    run.asking.ask(vm.agents[0], CAST_UP, 3, at_once=True)
    world.run(world.now_s + 0.3)
    host = vm.qemu.host
    host.kill_daemon()
    world.after(0.2, host.start_daemon)
    first = len(run.asking.asks)
    for _ in range(12):
        world.run(world.now_s + 1.0)
        run.asking.ask(vm.agents[0], CAST_UP, 2, at_once=True)
        world.run(world.now_s + 1.0 + world.rng.random())
        if vm.is_free:
            Migration(vm, _other(run, vm), fails="", twice=False)
    world.run(world.now_s + NOTE_WAIT_S)
    for ask in run.asking.asks[first:]:
        assert ask.made_s is not None
        took_s = ask.outcome_s - ask.made_s
        if took_s > NOTE_WAIT_S + 2.0:  # a wait, and a migration
            world.fail(f"{ask} stood still for {took_s:.1f} s")


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


def paused_after_its_host_died(run: Run) -> None:
    """The daemon that had published for the guest is gone; the next one hears of it, and before
    anybody in the guest has asked again, everything stands still."""
    world, rng = run.world, run.world.rng
    for _ in range(3):
        for vm in run.vms:
            for agent in list(vm.agents.values()):
                run.asking.ask(agent, CAST_UP, 3, at_once=True)
        world.run(world.now_s + rng.choice((0.001, 0.005)) * rng.random())
        for vm in run.vms:
            vm.kill_daemon()
        for host in run.hosts:
            host.kill_daemon()
            host.start_daemon()
        world.run(world.now_s + 0.3)
        for vm in run.vms:
            vm.start_daemon()
            world.after(rng.random() * 0.3, vm.pause)
        world.run(world.now_s + 20.0)
        for vm in run.vms:
            vm.unpause()
        world.run(world.now_s + 3.0)


def paused_with_a_full_channel(run: Run) -> None:
    """A paused guest takes nothing: its channel is full, and stays as it is, for minutes."""
    for vm in run.vms:
        for _ in range(6):
            for topic in TOPICS:
                run.callers.cast(vm.uuid, topic, FANOUT, filling="x" * 120_000)
        run.world.run(run.world.now_s + run.world.rng.random() * 0.02)
        vm.pause()
    run.world.run(run.world.now_s + 120.0)


def given_back_again_and_again_with_nonsense_between(run: Run) -> None:
    """More returns than a broker allows that was told no limit, of messages that a guest which
    stands still does not take; and among them what no host can make a request of."""
    world, broker = run.world, run.broker
    for vm in run.vms:
        vm.pause()
        for number in range(6):
            for topic in TOPICS:
                run.callers.cast(vm.uuid, topic, CAST, filling="")
                if number % 2:
                    broker.publish_nonsense(vm.uuid, Topic(EXCHANGE, topic))
    for _ in range(RETURNS_MAX + 3):
        world.run(world.now_s + 1.0)
        for host in run.hosts:
            if host.daemon is not None:
                for channel in host.daemon.channels.values():  # as another change of topics would
                    channel.downward._consumption.release()
                    channel.downward._consumption.update(host.daemon.process.loop.time())
                    channel.set_timer()
    world.run(world.now_s + 2.0)


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
    broker_is_in_trouble,
    host_daemon_dies_with_requests_under_way,
    host_daemons_die_as_the_guest_leaves,
    moves_on_and_on_after_a_host_daemon_died,
    agents_are_away_for_long,
    guests_lose_their_memory,
    guest_daemon_restarts_under_load,
    paused_for_hours,
    paused_after_its_host_died,
    paused_with_a_full_channel,
    given_back_again_and_again_with_nonsense_between,
    wedged_in_company,
)
