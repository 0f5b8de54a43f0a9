"""VMs: the real guest daemon and the real agents in them, and what can happen to a VM."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from tests.simulate.check import Ledger
from tests.simulate.hosts import Host
from tests.simulate.raw import RawCalls
from tests.simulate.virtio import Channel, Qemu
from tests.simulate.world import Machine, Process, World
from vchan.client import Agent, raw
from vchan.guest.daemon import Daemon, Options
from vchan.host.hypervisor.domains import DomainEvent
from vchan.rpc.bodies import REDELIVERED_KEY, decode_invocation
from vchan.rpc.messages import CALL, RAW, Request

EXCHANGE: Final = "openstack"


class GuestDaemon:
    """One run of the guest daemon."""

    def __init__(self, vm: Vm) -> None:
        self.process = Process(vm.machine, f"{vm.uuid}/daemon")
        self.daemon: Daemon | None = None
        self._options = Options(port=f"sim:{vm.uuid}", socket=vm.agent_socket, quiet=True)
        self.process.enter(self._start)

    def _start(self) -> None:
        self.daemon = Daemon(self._options)
        self.daemon._port.open()
        self.daemon._intake.look_soon()

    @property
    def alive(self) -> bool:
        """Whether it still has its memory."""
        return self.process.alive


class _Worker:
    """The agent's pool: one thread that takes its time."""

    def __init__(self, agent: GuestAgent) -> None:
        self._agent = agent
        self._queue: deque[tuple[Callable[[Request], None], Request, Process | None]] = deque()

    def submit(self, call: Callable[[Request], None], request: Request) -> None:
        """See Executor."""
        self._queue.append((call, request, self._agent.who_gives()))
        if len(self._queue) == 1:
            self._plan()

    def _plan(self) -> None:
        world = self._agent.process.world
        delay_s = world.rng.random() * world.rng.choice((0.001, 0.1, 3.0))
        world.after(delay_s, self._agent.process.enter, self._run)

    def _run(self) -> None:
        call, request, self._agent.told = self._queue[0]
        call(request)
        self._queue.popleft()
        if self._queue:
            self._plan()

    @property
    def is_idle(self) -> bool:
        """Nothing is queued."""
        return not self._queue

    def lost(self) -> list[int]:
        """The keys of the casts that were taken and will never run."""
        of_ledger = (each for _, each, _ in self._queue if not each.flags & (CALL | RAW))
        return [_key(request) for request in of_ledger]


def _key(request: Request) -> int:
    key: int = decode_invocation(request.body).args["key"]
    return key


class GuestAgent:
    """One run of an agent: a slot's."""

    def __init__(self, vm: Vm, slot: int, topics: tuple[str, ...], *, slow: bool) -> None:
        self.vm = vm
        self.slot = slot
        self.topics = topics
        self.process = Process(vm.machine, f"{vm.uuid}/agent{slot}")
        self._slow = slow
        self.agent: Agent | None = None
        self.told: Process | None = None
        """The guest daemon that gave it what it runs now, and so knows of it."""
        self.worker: _Worker | None = None
        self.process.enter(self._start)

    def _start(self) -> None:
        agent = self.agent = Agent(self.vm.agent_socket, log=lambda _: None)
        if self._slow:
            self.worker = agent._worker.pool = _Worker(self)
        for topic in self.topics:
            agent.serve(topic, self, exchange=EXCHANGE)
        agent._connection.start()

    @property
    def alive(self) -> bool:
        """Whether it still has its memory."""
        return self.process.alive

    @property
    def is_idle(self) -> bool:
        """It has run everything that it has."""
        return self.worker is None or self.worker.is_idle

    @property
    def connection(self) -> Any:
        """Its end of the conversation with the guest daemon."""
        assert self.agent is not None
        return self.agent._connection

    def who_gives(self) -> Process | None:
        """The guest daemon at the other end of its connection, be it dead or alive."""
        assert self.agent is not None
        link = self.agent._connection._link
        stream: Any = link.stream if link is not None else None
        return stream.peer._owner if stream is not None and stream.peer is not None else None

    def _executed(self, key: int) -> None:
        if self.worker is None:
            self.told = self.who_gives()
        assert self.agent is not None
        marked = REDELIVERED_KEY in self.agent.context
        self.vm.ledger.executed(key, self, marked=marked)

    def work(self, key: int, filling: str = "") -> Mapping[str, Any]:
        """The method that everybody calls."""
        self._executed(key)
        return {"key": key, "filling": filling}

    @raw
    def turn(self, data: bytes, key: int) -> bytes:
        """What is called with bytes."""
        assert self.agent is not None
        return self.vm.raw.ran(key, data, marked=REDELIVERED_KEY in self.agent.context)

    def fail(self, key: int, filling: str = "") -> None:
        """Likewise, and raises."""
        self._executed(key)
        raise ValueError(f"key {key}")


class Vm:
    """A VM: where it runs, and what runs in it.

    Args:
        slots: The topics of each agent.
    """

    def __init__(
        self,
        world: World,
        uuid: str,
        ledger: Ledger,
        raw_calls: RawCalls,
        slots: tuple[tuple[str, ...], ...],
        slow: int,
    ) -> None:
        self.world = world
        self.raw = raw_calls
        self.uuid = uuid
        self.ledger = ledger
        self.slots = slots
        self._slow = slow
        self.machine = Machine(world, clock_stops=True)
        self.channel = Channel(world, uuid, self.machine)
        self.agent_socket = f"/{uuid}/agent.sock"
        self.daemon: GuestDaemon | None = None
        self.agents: dict[int, GuestAgent] = {}
        self.paused = False
        self.saved = False
        self.migrating = False
        self.boots = 0
        self.booted_s = 0.0
        self.lies = 0
        """Told to a host by its guest daemon's session."""
        self._numbers = 0

    @property
    def qemu(self) -> Qemu | None:
        """Where it runs now."""
        return self.channel.qemu

    @property
    def is_free(self) -> bool:
        """Nothing big is going on with it."""
        busy = self.migrating or self.paused or self.saved or self.machine.frozen
        return self.qemu is not None and not busy

    def new_qemu(self, host: Host, *, incoming: bool) -> Qemu:
        """A QEMU process for it."""
        self._numbers += 1
        return Qemu(self.channel, host, self._numbers * 10 + int(self.uuid[-1]), incoming=incoming)

    # ------------------------------------------------------------ starting and dying

    def boot(self, host: Host) -> None:
        """Cold start on a host."""
        self.world.note("%s: boots on %s", self.uuid, host.name)
        if self.machine.frozen:
            self.machine.thaw()
        self.paused = self.saved = self.migrating = False
        self.boots += 1
        self.booted_s = self.world.now_s
        self.channel.qemu = self.new_qemu(host, incoming=False)
        self.channel.qemu.resume()
        host.emit(self.uuid, DomainEvent.RESUMED)
        host.emit(self.uuid, DomainEvent.STARTED)
        self._start_guest()

    def _start_guest(self) -> None:
        boot = self.boots
        rng = self.world.rng
        self.world.after(rng.random() * 0.3, self.start_daemon, boot)
        for slot in range(len(self.slots)):
            self.world.after(rng.random() * 0.5, self.start_agent, slot, boot)

    def start_daemon(self, boot: int | None = None) -> None:
        """The guest daemon starts, unless it runs."""
        if self.daemon is None and boot in (None, self.boots):
            if self.machine.frozen:
                self.machine.when_thawed(self.start_daemon, boot)
            elif self.qemu is not None:
                self.ledger.daemon_started(self.uuid, self.machine.time())
                self.daemon = GuestDaemon(self)

    def start_agent(self, slot: int, boot: int | None = None) -> None:
        """An agent starts, unless it runs."""
        if slot not in self.agents and boot in (None, self.boots):
            if self.machine.frozen:
                self.machine.when_thawed(self.start_agent, slot, boot)
            elif self.qemu is not None:
                slow = bool(self._slow & (1 << slot))
                self.ledger.agent_started(self.uuid, slot, self.machine.time())
                self.agents[slot] = GuestAgent(self, slot, self.slots[slot], slow=slow)

    def kill_daemon(self) -> None:
        """The guest daemon dies."""
        if self.daemon is not None:
            self.world.note("%s: guest daemon dies", self.uuid)
            self._account(self.daemon)
            self.daemon.process.kill()
            self.daemon = None

    def kill_agent(self, slot: int) -> None:
        """An agent dies."""
        agent = self.agents.pop(slot, None)
        if agent is not None:
            self.world.note("%s: agent %d dies", self.uuid, slot)
            self.ledger.agent_died(self.uuid, agent)
            agent.process.kill()

    def _account(self, daemon: GuestDaemon) -> None:
        if daemon.daemon is not None:
            stats = self.world.stats
            session = daemon.daemon._session.counters
            stats["repeats dropped by the guest daemon"] += daemon.daemon._router._host.repeats
            stats["bytes skipped"] += session.bytes_skipped
            stats["frames twice"] += session.duplicates
            stats["losses"] += session.losses
            stats["frames resent"] += session.frames_resent

    def account(self) -> None:
        """Add what still runs to the run's counters."""
        if self.daemon is not None:
            self._account(self.daemon)

    def _end_guest(self) -> None:
        self.kill_daemon()
        for slot in list(self.agents):
            self.kill_agent(slot)
        self.channel.rings.reset()

    def die(self, event: DomainEvent = DomainEvent.STOPPED_FAILED) -> None:
        """QEMU is killed, and with it everything in the VM."""
        qemu = self.qemu
        if qemu is not None:
            self.world.note("%s: QEMU dies on %s", self.uuid, qemu.host.name)
            qemu.die()
            self.world.after(1.5, qemu.host.emit, self.uuid, event)
        self._end_guest()
        self.machine.forget()
        self.channel.qemu = None
        self.channel.rings.sees_host = False
        self.boots += 1
        self.saved = False

    def reboot(self) -> None:
        """The guest is reset. The host sees nothing of it."""
        if not self.is_free:
            return
        self.world.note("%s: guest reboots", self.uuid)
        self._end_guest()
        self.boots += 1
        self._start_guest()

    # ------------------------------------------------------------ standing still

    def pause(self) -> None:
        """virsh suspend."""
        if self.is_free and self.qemu is not None:
            self.paused = True
            self.qemu.stop()
            self.machine.freeze()
            self.qemu.host.emit(self.uuid, DomainEvent.SUSPENDED)

    def unpause(self) -> None:
        """virsh resume."""
        if self.paused and not self.migrating and self.qemu is not None:
            self.paused = False
            self.machine.thaw()
            self.qemu.resume()
            self.qemu.host.emit(self.uuid, DomainEvent.RESUMED)

    def save(self) -> None:
        """virsh managedsave."""
        qemu = self.qemu
        if self.is_free and qemu is not None:
            self.saved = True
            qemu.stop()
            self.machine.freeze()
            qemu.die()
            qemu.host.emit(self.uuid, DomainEvent.STOPPED_SAVED)
            self.channel.qemu = None

    def restore(self, host: Host) -> None:
        """virsh start."""
        if self.saved and host.up:
            self.saved = False
            self.channel.qemu = self.new_qemu(host, incoming=False)
            host.emit(self.uuid, DomainEvent.STARTED)
            self.world.after(self.world.rng.random() * 0.1, self._restored, self.channel.qemu)

    def _restored(self, qemu: Qemu) -> None:
        if not qemu.dead and self.channel.qemu is qemu:
            self.machine.thaw()
            qemu.resume()
            qemu.host.emit(self.uuid, DomainEvent.RESUMED)


class Migration:
    """One live migration, from Prepare to the source's end."""

    def __init__(self, vm: Vm, target: Host, *, fails: str, twice: bool) -> None:
        assert vm.qemu is not None
        self._vm = vm
        self._world = vm.world
        self._source = vm.qemu
        self._target = target
        self._fails = fails
        self._twice = twice
        self._was_paused = vm.paused
        vm.migrating = True
        self._world.stats["migrations begun"] += 1
        self._world.note("%s: migrates %s to %s", vm.uuid, self._source.host.name, target.name)
        self._arrival = vm.new_qemu(target, incoming=True)
        target.emit(vm.uuid, DomainEvent.STARTED_INCOMING)
        self._world.after(0.2 + self._world.rng.random(), self._stop)

    def _is_off(self) -> bool:
        """Whether something else has ended it."""
        return self._source.dead or self._arrival.dead or self._vm.qemu is not self._source

    def _stop(self) -> None:
        vm = self._vm
        if self._is_off() or self._fails == "early":
            self._abort()
            return
        self._source.stop()
        self._source.outgoing = True
        if not self._was_paused:
            vm.machine.freeze()
        self._ring = list(vm.channel.rings.to_host)
        self._source.host.emit(vm.uuid, DomainEvent.SUSPENDED_MIGRATED)
        self._world.after(0.02 + self._world.rng.random() * 0.4, self._switch)

    def _switch(self) -> None:
        vm = self._vm
        if self._is_off() or self._fails == "late":
            self._abort()
            return
        self._world.stats["migrations"] += 1
        vm.channel.qemu = self._arrival
        self._arrival.incoming = False
        if self._was_paused:
            self._target.emit(vm.uuid, DomainEvent.SUSPENDED)
        else:
            vm.machine.thaw()
            self._arrival.resume()
            self._target.emit(vm.uuid, DomainEvent.RESUMED_MIGRATED)
        vm.migrating = False
        if self._twice and self._ring:
            self._world.stats["rings delivered twice"] += 1
            self._source.flush_copy(self._ring)
        self._world.after(0.02 + self._world.rng.random() * 0.25, self._source.die)
        delay_s = 1.2 + self._world.rng.random()
        host = self._source.host
        self._world.after(delay_s, host.emit, vm.uuid, DomainEvent.STOPPED_MIGRATED)

    def _abort(self) -> None:
        vm = self._vm
        self._world.stats["migrations failed"] += 1
        self._world.note("%s: migration to %s fails", vm.uuid, self._target.name)
        self._arrival.die()
        self._world.after(2.0, self._target.emit, vm.uuid, DomainEvent.STOPPED_FAILED)
        if vm.qemu is not self._source:
            return
        vm.migrating = False
        if self._source.dead:
            return
        if self._source.outgoing:
            self._source.outgoing = False
            if not self._was_paused:
                vm.machine.thaw()
                self._source.resume()
                self._source.host.emit(vm.uuid, DomainEvent.RESUMED)
