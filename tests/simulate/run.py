"""One run: a world made from a seed, faults, healing, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from tests.simulate import asking
from tests.simulate.asking import Asking
from tests.simulate.broker import Broker
from tests.simulate.callers import EXCHANGE, Callers
from tests.simulate.check import CAST, FANOUT, LONG_S, Bounds, Ledger, Op
from tests.simulate.faults import Faults
from tests.simulate.guest import Vm
from tests.simulate.hosts import Host
from tests.simulate.pairs import Pairs
from tests.simulate.patches import installed
from tests.simulate.tables import Tables
from tests.simulate.world import World
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.handover import SETTLED_S
from vchan.rpc.messages import CALL as CALL_UP
from vchan.rpc.messages import FANOUT as FANOUT_UP
from vchan.rpc.messages import NOTIFICATION, Topic
from vchan.rpc.reports import AGENTS, FACTS
from vchan.session import AnySession, Session

TIGHT_BYTES: Final = 160_000
"""One large answer fits, and no second one beside it."""
START_S: Final = 30.0
CONVERGE_S: Final = 400.0
"""Cures of a wedge back off up to five minutes."""
PROBE_S: Final = 100.0
BOUNDS_EVERY: Final = 64
RAW_EVERY: Final = 4
"""In one of so many seeds bytes are called with, too."""
OWNED_EVERY: Final = 5
"""In one of so many seeds each VM has a topic of its own, which is addressed without a server."""


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
    channels = {vm.uuid: vm.channel for vm in run.vms}
    with installed(run.world, channels, run.broker.reporting):
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
        self.broker.guests_may_ask = rng.random() < 0.85
        self.ledger = Ledger(world, self.broker.refused_calls)
        if rng.random() < 0.3:  # answers wait for each other's memory
            self.broker.limits = Limits(message_bytes=TIGHT_BYTES, reassembly_bytes=TIGHT_BYTES)
        self.hosts = [Host(world, f"host{at}", self.broker) for at in range(rng.choice((2, 2, 3)))]
        self.vms = [self._make_vm(at) for at in range(rng.choice((1, 1, 2)))]
        machines = {vm.uuid: vm.machine for vm in self.vms}
        self.ledger.vm_now_s = lambda vm: machines[vm].time()
        self.ledger.witness = self._witness
        self.callers = Callers(world, self.broker, self.ledger, machines)
        self.asking = Asking(world, self.broker)
        self.reporting = self.broker.reporting
        self.reporting.watch(self.vms)
        self.faults = Faults(world, self.hosts, self.vms, self.callers)
        self._bursts = 0
        self.bounds = Bounds(world, prefetch, topics=4 if self.broker.owned else 3)
        self.pairs = Pairs(world)
        self.tables = Tables(world)
        self._probes: list[Op] = []
        world.after_step = self._after_step

    def _make_vm(self, at: int) -> Vm:
        rng = self.world.rng
        # Every VM has every topic, so that a fanout finds its queues everywhere.
        slots: tuple[tuple[str, ...], ...] = rng.choice(
            ((("alpha", "beta"),), (("alpha",), ("beta",)), (("alpha", "beta"), ("beta",)))
        )
        uuid = f"vm{at}"
        if self.world.seed % OWNED_EVERY == 1:
            owned = Topic(EXCHANGE, f"agent-of-{at}")  # its id is not the VM's
            self.broker.owned[owned] = uuid
            slots = ((*slots[0], owned.name), *slots[1:])
        if sum("beta" in topics for topics in slots) > 1:
            self.ledger.shared.add((uuid, "beta"))
        return Vm(self.world, uuid, self.ledger, self.broker.raw, slots, slow=rng.randrange(4))

    def _after_step(self) -> None:
        self.faults.maybe()
        if self.world.step % BOUNDS_EVERY == 0:
            self._check_bounds()

    def _check_bounds(self) -> None:
        self.bounds.check(self.hosts, self.vms)
        self.asking.check_bounds(self._host_upwards(), self._upwards())
        self.reporting.check_bounds(self._upwards())
        self.pairs.check(self._sessions())
        self._check_tables()
        self._check_violations()

    def _check_tables(self) -> None:
        tables = self.tables
        for downward in self._downwards():
            tables.check_downward(downward)
        for router in self._routers():
            tables.check_router(router)
        for vm in self.vms:
            for agent in vm.agents.values():
                connection = agent.connection
                tables.check_responder("an agent", connection.responder)
                tables.check_requester("an agent", connection.requester)

    def _check_violations(self) -> None:
        """Who does not lie is not called a liar, whatever the channel does to what it says."""
        lies = {vm.uuid: vm.lies for vm in self.vms}
        channels = {id(channel._session): channel.vm for channel in self._channels()}
        for session in self._sessions():
            found = session.counters.violations
            if found > lies.get(channels.get(id(session), ""), 0):
                who = f"{session.config.role.name} {session.config.name!r}"
                self.world.fail(f"{who} says that its peer broke the protocol, and it did not")

    def _check_rest(self) -> None:
        """Everything is over."""
        self.pairs.check(self._sessions(), at_rest=True)
        self._check_tables()
        tables, asked = self.tables, self.asking.probes
        down = [op.id for op in self._probes]
        for downward in self._downwards():
            tables.check_downward_is_empty(downward)
            tables.check_forgotten("a host", downward.upward._responder, asked)
        for host in self.hosts:
            if host.daemon is not None:
                tables.check_nothing_is_completing(host.name, host.daemon.broker)
        for router in self._routers():
            tables.check_router_is_empty(router)
            tables.check_forgotten("a guest daemon", router._host, down)
        for vm in self.vms:
            for agent in vm.agents.values():
                tables.check_forgotten("an agent", agent.connection.responder, down)

    def _repairs(self) -> list[tuple[int, ...]]:
        """What every session and connection has had to do over again."""
        of_sessions = [
            (one.sessions, one.resumptions, one.frames_resent, one.duplicates, one.losses)
            for one in (session.counters for session in self._sessions())
        ]
        of_channels = [
            (channel.counters["reconnects"], channel.counters["cures"])
            for channel in self._channels()
        ]
        return [*of_sessions, *of_channels]

    def _channels(self) -> Iterator[Any]:
        for host in self.hosts:
            if host.daemon is not None:
                yield from host.daemon.channels.values()

    def _downwards(self) -> Iterator[Any]:
        for channel in self._channels():
            yield channel.downward

    def _witness(self, vm: str, topic: str) -> object:
        run = next(each.daemon for each in self.vms if each.uuid == vm)
        if run is None or run.daemon is None or (topic, 0) not in run.daemon._router._begun:
            return None
        return run

    def _routers(self) -> Iterator[Any]:
        for vm in self.vms:
            if vm.daemon is not None and vm.daemon.daemon is not None:
                yield vm.daemon.daemon._router

    def _sessions(self) -> Iterator[Session]:
        for session in self._all_sessions():
            assert isinstance(session, Session)  # nothing here is one-way
            yield session

    def _all_sessions(self) -> Iterator[AnySession]:
        for channel in self._channels():
            yield channel._session
        for vm in self.vms:
            if vm.daemon is not None and vm.daemon.daemon is not None:
                yield vm.daemon.daemon._session
                for link in vm.daemon.daemon._server._links.values():
                    yield link.session
            for agent in vm.agents.values():
                yield agent.connection._session

    def _host_upwards(self) -> Iterator[Any]:
        for downward in self._downwards():
            yield downward.upward

    def _upwards(self) -> Iterator[Any]:
        for router in self._routers():
            yield router._upward

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
        if rng.random() < 0.8:  # else their arrival is part of it
            world.run(world.now_s + SETTLED_S + 2.0)
        if rng.random() < 0.6:  # else nobody has been asked anything yet
            self._warm_up()
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
        self._check_bounds()
        self.ledger.check_end()
        self.asking.check_end()
        before = self._repairs()
        world.run(world.now_s + asking.SETTLE_S)
        if self._repairs() != before:
            world.fail(f"nothing is wrong, and is repaired: {before}, then {self._repairs()}")
        self.asking.check_tables(self._host_upwards(), self._upwards())
        self._check_rest()
        left = self.broker.leftovers()
        if left:
            world.fail(f"everything is over, and the broker still holds messages in {left}")

    def _warm_up(self) -> None:
        """Each queue hands out something: what comes again later is known not to be older."""
        for topic in ("alpha", "beta"):
            for vm in self.vms:
                self.callers.cast(vm.uuid, topic, CAST, filling="")
            self.callers.cast(self.vms[0].uuid, topic, FANOUT, filling="")
        for topic, owner in self._owned():
            self.callers.cast(owner, topic, CAST, filling="")
        self._run_until(PROBE_S, self._is_quiet, "answer the first requests")

    def _owned(self) -> list[tuple[str, str]]:
        """Topics that belong to a VM, and whose."""
        return [(topic.name, owner) for topic, owner in self.broker.owned.items()]

    def _leave_to_chance(self) -> None:
        world, rng = self.world, self.world.rng
        self._plan_work()
        self.faults.active = True
        world.run(world.now_s + rng.choice((8.0, 16.0, 24.0)))
        if any(vm.paused for vm in self.vms) and rng.random() < 0.2:
            world.stats["pauses for hours"] += 1
            self.ledger.hours_passed = self.asking.hours_passed = True
            world.run(world.now_s + 7200.0)

    def _run_until(self, limit_s: float, done: object, what: str) -> bool:
        world = self.world
        assert callable(done)
        if not world.run(world.now_s + limit_s, done):
            return False
        if not done():
            open_ones = [*self.ledger.open_ops(), *self.asking.open_asks()]
            open_ones += self.reporting.untold(self.hosts)
            open_ones += self.broker.raw.open_calls()
            stuck = ", ".join(map(str, open_ones[:5]))
            world.fail(f"did not {what} within {limit_s:g} s: {stuck}")
            return False
        return True

    def _is_serving(self) -> bool:
        queues = self.broker.queues
        has_own = self.broker.guests_may_ask or self.reporting.topic is not None
        wanted = len(self.vms) * (5 if has_own else 4)
        wanted += len(self.broker.owned) * 3
        return len(queues) == wanted and all(queue.consumers for queue in queues.values())

    def _is_quiet(self) -> bool:
        return (
            self.ledger.is_quiet()
            and self.callers.is_idle
            and self.asking.is_quiet()
            and self.reporting.is_quiet(self.hosts)
            and not self.broker.raw.open_calls()
            and not self._bursts
            and all(agent.is_idle for vm in self.vms for agent in vm.agents.values())
        )

    def _plan_work(self) -> None:
        world, rng = self.world, self.world.rng
        span_s = rng.choice((2.0, 6.0, 15.0))
        self._bursts = rng.randrange(4, 20)
        for _ in range(self._bursts):
            burst = rng.choice((self._burst, self._burst, self._burst_of_asks))
            world.after(rng.random() * span_s, burst)
        if self.reporting.is_on:
            for _ in range(rng.randrange(2, 16)):
                self._bursts += 1
                world.after(rng.random() * span_s, self._change)
        if world.seed % RAW_EVERY == RAW_EVERY - 1:
            for _ in range(rng.randrange(2, 12)):
                self._bursts += 1
                world.after(rng.random() * span_s, self._burst_of_raw_calls)

    def _burst(self) -> None:
        rng = self.world.rng
        self._bursts -= 1
        vm, topic = rng.choice(self.vms).uuid, rng.choice(("alpha", "beta"))
        kind = rng.random()
        if self.broker.owned and kind < 0.85 and rng.random() < 0.4:
            topic, vm = rng.choice(self._owned())
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

    def _burst_of_asks(self) -> None:
        rng = self.world.rng
        self._bursts -= 1
        agents = list(rng.choice(self.vms).agents.values())
        if rng.random() < 0.3:  # and more, while that is under way
            self._bursts += 1
            self.world.after(rng.random() * 0.3, self._burst_of_asks)
        if agents:
            kinds = (asking.CAST, asking.CAST, CALL_UP, CALL_UP, FANOUT_UP, NOTIFICATION)
            kind, count = rng.choice(kinds), rng.choice((1, 3, 12))
            self.asking.ask(rng.choice(agents), kind, count, at_once=rng.random() < 0.5)
            self.faults.meet_requests()

    def _change(self) -> None:
        rng = self.world.rng
        self._bursts -= 1
        self.reporting.change(rng.choice(self.vms), rng.choice((FACTS, AGENTS)))
        self.faults.meet_requests()

    def _burst_of_raw_calls(self) -> None:
        rng, raw = self.world.rng, self.broker.raw
        self._bursts -= 1
        vm = rng.choice(self.vms)
        agents = list(vm.agents.values())
        for _ in range(rng.choice((1, 1, 4))):
            if rng.random() < 0.6:
                raw.call_agent(vm, rng.choice(("alpha", "beta")))
            elif agents and self.broker.guests_may_ask:
                raw.call_store(rng.choice(agents))

    def _probe(self) -> None:
        """After healing, everything works at once."""
        self.world.note("probing")
        for vm in self.vms:
            for topic in ("alpha", "beta"):
                self._probes += (
                    self.callers.cast(vm.uuid, topic, CAST, filling=""),
                    self.callers.call(vm.uuid, topic, 60.0, fails=False, filling=""),
                )
            for topic, owner in self._owned():
                if owner == vm.uuid:
                    self._probes += (
                        self.callers.cast(owner, topic, CAST, filling=""),
                        self.callers.call(owner, topic, 60.0, fails=False, filling=""),
                    )
            for agent in vm.agents.values():
                self.asking.probe(agent)
            if self.reporting.is_on:
                self.reporting.change(vm, FACTS)
        self._probes.append(self.callers.cast(self.vms[0].uuid, "alpha", FANOUT, filling=""))

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
