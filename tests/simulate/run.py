"""One run: a world made from a seed, faults, healing, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple

from tests.simulate.broker import Broker
from tests.simulate.callers import Callers
from tests.simulate.check import CAST, FANOUT, LONG_S, Bounds, Ledger
from tests.simulate.faults import Faults
from tests.simulate.guest import Vm
from tests.simulate.hosts import Host
from tests.simulate.patches import installed
from tests.simulate.world import World

START_S: Final = 30.0
CONVERGE_S: Final = 400.0
"""Cures of a wedge back off up to five minutes."""
PROBE_S: Final = 100.0
BOUNDS_EVERY: Final = 64


class Result(NamedTuple):
    """What came of a seed."""

    seed: int
    failure: str | None
    step: int
    simulated_s: float
    profile: str
    stats: Counter[str]
    trace: list[str]


def simulate(
    seed: int, *, trace: bool = False, scenario: Callable[[Run], None] | None = None
) -> Result:
    """Run one seed. Never raises for a broken promise: `failure` says it.

    Args:
        scenario: What happens, instead of chance.
    """
    run = Run(seed, trace=trace)
    with installed(run.world, {vm.uuid: vm.channel for vm in run.vms}):
        try:
            run.play(scenario)
        except Exception as error:  # noqa: BLE001 - what the code under test raised is the verdict
            import traceback

            lines = traceback.format_exception(error)[-6:]
            run.world.fail(f"raised {error!r}\n{''.join(lines)}")
        return run.result()


class Run:
    """One seed's world."""

    def __init__(self, seed: int, *, trace: bool) -> None:
        world = self.world = World(seed, trace=trace)
        rng = world.rng
        prefetch = rng.choice((2, 8, 64))
        self.broker = Broker(world, prefetch)
        self.ledger = Ledger(world)
        self.hosts = [Host(world, f"host{at}", self.broker) for at in range(rng.choice((2, 2, 3)))]
        self.vms = [self._make_vm(at) for at in range(rng.choice((1, 1, 2)))]
        machines = {vm.uuid: vm.machine for vm in self.vms}
        self.callers = Callers(world, self.broker, self.ledger, machines)
        self.faults = Faults(world, self.hosts, self.vms, self.callers)
        self._bursts = 0
        self.bounds = Bounds(world, prefetch, topics=3)
        world.after_step = self._after_step

    def _make_vm(self, at: int) -> Vm:
        rng = self.world.rng
        # Every VM has every topic, so that a fanout finds its queues everywhere.
        slots: tuple[tuple[str, ...], ...] = rng.choice(
            ((("alpha", "beta"),), (("alpha",), ("beta",)), (("alpha", "beta"), ("beta",)))
        )
        uuid = f"vm{at}"
        if sum("beta" in topics for topics in slots) > 1:
            self.ledger.shared.add((uuid, "beta"))
        return Vm(self.world, uuid, self.ledger, slots, slow=rng.randrange(4))

    def _after_step(self) -> None:
        self.faults.maybe()
        if self.world.step % BOUNDS_EVERY == 0:
            self.bounds.check(self.hosts, self.vms)

    # ------------------------------------------------------------ the play

    def play(self, scenario: Callable[[Run], None] | None) -> None:
        """Start, break, heal, converge, probe."""
        world, rng = self.world, self.world.rng
        for host in self.hosts:
            host.start_daemon()
        for vm in self.vms:
            vm.boot(rng.choice(self.hosts))
        if not self._run_until(START_S, self._is_serving, "start serving"):
            return
        if scenario is not None:
            scenario(self)
        else:
            self._leave_to_chance()
        if world.failure is not None:
            return
        self.faults.heal()
        if not world.run(world.now_s + 3.0):
            return
        if not self._run_until(CONVERGE_S, self._is_quiet, "converge"):
            return
        self._probe()
        if not self._run_until(PROBE_S, self._is_quiet, "answer the probes"):
            return
        world.run(world.now_s + 5.0)
        self.bounds.check(self.hosts, self.vms)
        self.ledger.check_end()
        left = self.broker.leftovers()
        if left:
            world.fail(f"everything is over, and the broker still holds messages in {left}")

    def _leave_to_chance(self) -> None:
        world, rng = self.world, self.world.rng
        self._plan_work()
        self.faults.active = True
        world.run(world.now_s + rng.choice((8.0, 16.0, 24.0)))
        if any(vm.paused for vm in self.vms) and rng.random() < 0.2:
            world.stats["pauses for hours"] += 1
            self.ledger.hours_passed = True
            world.run(world.now_s + 7200.0)

    def _run_until(self, limit_s: float, done: object, what: str) -> bool:
        world = self.world
        assert callable(done)
        if not world.run(world.now_s + limit_s, done):
            return False
        if not done():
            stuck = ", ".join(map(str, self.ledger.open_ops()[:5]))
            world.fail(f"did not {what} within {limit_s:g} s: {stuck}")
            return False
        return True

    def _is_serving(self) -> bool:
        queues = self.broker.queues
        wanted = len(self.vms) * 5
        return len(queues) == wanted and all(queue.consumers for queue in queues.values())

    def _is_quiet(self) -> bool:
        return (
            self.ledger.is_quiet()
            and self.callers.is_idle
            and not self._bursts
            and all(agent.is_idle for vm in self.vms for agent in vm.agents.values())
        )

    def _plan_work(self) -> None:
        world, rng = self.world, self.world.rng
        span_s = rng.choice((2.0, 6.0, 15.0))
        self._bursts = rng.randrange(4, 20)
        for _ in range(self._bursts):
            world.after(rng.random() * span_s, self._burst)

    def _burst(self) -> None:
        rng = self.world.rng
        self._bursts -= 1
        vm, topic = rng.choice(self.vms).uuid, rng.choice(("alpha", "beta"))
        kind = rng.random()
        size = rng.choice((0, 0, 0, 0, 100, 20_000, 120_000)) if rng.random() < 0.5 else 0
        filling = "x" * size
        if kind < 0.45:
            for _ in range(rng.choice((1, 3, 12))):
                self.callers.cast(vm, topic, CAST, filling=filling)
        elif kind < 0.85:
            for _ in range(rng.choice((1, 2, 5))):
                timeout_s = rng.choice((2.0, 10.0, 60.0, LONG_S))
                fails = rng.random() < 0.1
                self.callers.call(vm, topic, timeout_s, fails=fails, filling=filling)
        else:
            for _ in range(rng.choice((1, 3))):
                self.callers.cast(vm, topic, FANOUT, filling=filling)

    def _probe(self) -> None:
        """After healing, everything works at once."""
        self.world.note("probing")
        for vm in self.vms:
            for topic in ("alpha", "beta"):
                self.callers.cast(vm.uuid, topic, CAST, filling="")
                self.callers.call(vm.uuid, topic, 60.0, fails=False, filling="")
        self.callers.cast(self.vms[0].uuid, "alpha", FANOUT, filling="")

    def result(self) -> Result:
        """The verdict and the counters."""
        world = self.world
        for host in self.hosts:
            if host.daemon is not None:
                for channel in host.daemon.channels.values():
                    host.daemon.account(channel)
        for vm in self.vms:
            vm.account()
        world.stats["faults"] += self.faults.struck
        world.stats["steps"] += world.step
        failure = world.failure
        simulated_s = world.now_s - 1000.0
        return Result(
            world.seed,
            failure,
            world.step,
            simulated_s,
            self.faults.profile,
            world.stats,
            world.trace_lines(),
        )
