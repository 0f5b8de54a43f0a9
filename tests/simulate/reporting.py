"""Guests that report of themselves, services that hear of it, and what was promised these.

What a guest reports is a state: of its facts and its agents, the last change; of its phase, the
boot and whether that has come to its end. States are numbered as they come, and each report says
its number.

Promises
1. Services hear of what was so, of each state once, in order; a second time only marked
   `vchan_redelivered` where nobody can know better (see `doubt`), or if both the guest's daemon and
   the host's have forgotten that they told it.
2. In the end the host that has the VM knows what is so, and services have heard it.
3. A guest's daemon has one report of each kind under way at most.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import vchan.guest.observer
from tests.simulate.doubt import may_be_marked
from tests.simulate.exempt import ASKED_AGAIN, OVERTAKEN, TOLD_AGAIN, exempt
from tests.simulate.network import Endpoint
from tests.simulate.world import Fifo, Machine, Process, World
from vchan.guest.router import OWN_KEY
from vchan.host.oslo_wire.envelope import open_envelope
from vchan.host.oslo_wire.upward_envelope import Publication
from vchan.rpc.bodies import REDELIVERED_KEY
from vchan.rpc.messages import Topic
from vchan.rpc.reports import AGENTS, BOOTING, FACTS, METRICS, PHASE, READY, WHAT

if TYPE_CHECKING:
    from tests.simulate.broker import Broker
    from tests.simulate.guest import Vm
    from tests.simulate.hosts import Host

EVERY: Final = 4
"""In one of so many seeds guests report: the second, as `run.RAW_EVERY` has the last."""
TOPIC: Final = Topic("openstack", "guests")
BOOT_S_MAX: Final = 5.0
KINDS: Final = tuple(what for what in WHAT if what != METRICS)
"""Those that services hear of. Metrics are told to who asks, and nobody does here."""


class Kernel(Endpoint):
    """The guest's kernel, which tells of addresses: a netlink socket."""

    def __init__(self, world: World, owner: Process) -> None:
        super().__init__(world, "netlink", owner)
        self._waiting = 0

    def bind(self, _: object) -> None:
        """See socket."""

    def setblocking(self, _: bool) -> None:
        """See socket."""

    def readable(self) -> bool:
        """It has something to tell."""
        return self._waiting > 0

    def recv(self, _: int) -> bytes:
        """See socket."""
        if not self._waiting:
            raise BlockingIOError
        self._waiting -= 1
        return b"news"

    def say(self) -> None:
        """An address has changed."""
        self._waiting += 1
        self.kick()


class _Guest:
    """What is so in a VM, whatever runs there."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.changes = {FACTS: 0, AGENTS: 0}
        self.boots_s: dict[int, float] = {}
        """When each boot comes to its end, by the VM's clock."""
        self.kernel: Kernel | None = None

    @property
    def is_ready(self) -> bool:
        """This boot has come to its end."""
        ready_s = self.boots_s.get(self.vm.boots)
        return ready_s is not None and self.vm.machine.time() >= ready_s

    def number(self, what: str) -> int:
        """Of the state that it is in."""
        return 2 * self.vm.boots + self.is_ready if what == PHASE else self.changes[what]

    def report(self, what: str) -> dict[str, Any]:
        """That state."""
        return {"vm": self.vm.uuid, "number": self.number(what)}


class Report:
    """One report of a guest's daemon."""

    def __init__(self, place: int, guest: _Guest, daemon: Process, made_s: float) -> None:
        self.place = place
        self.guest = guest
        self.daemon = daemon
        self.made_s = made_s
        self.heard = 0
        self.is_first_here = True
        """The host that published it was not told the same before."""


class Reporting:
    """Everything that guests report, and what becomes of it. Hosts and VMs share it, as they share
    the broker."""

    def __init__(self, world: World, broker: Broker) -> None:
        self.is_on = world.seed % EVERY == 1
        mode = world.seed // EVERY % 4
        self.topic = TOPIC if self.is_on and mode != 3 else None
        """Where services are told; None: they are not, and hosts alone know."""
        self._listens = mode < 2
        self._world = world
        self._broker = broker
        self._guests: dict[Machine, _Guest] = {}
        self._made: dict[bytes, Report] = {}
        self._told: dict[tuple[int, str, str, int], bytes] = {}
        """The request that first told a state, by the host's stay, VM and state."""
        self._heard: dict[tuple[str, str, int], list[Report]] = {}  # by VM, state
        self._last: dict[tuple[str, str], int] = {}
        self._in_order: dict[str, list[tuple[int, bytes]]] = {}
        if self.is_on and self._listens:
            services = Fifo(world, self._hear)
            broker.bind(TOPIC.exchange, f"{TOPIC.name}.info", services)

    # ------------------------------------------------------------ guests

    def watch(self, vms: Iterable[Vm]) -> None:
        """These report."""
        self._guests = {vm.machine: _Guest(vm) for vm in vms}

    def change(self, vm: Vm, what: str) -> None:
        """Something changes in a VM, if it runs: its facts, or its agents."""
        if vm.machine.frozen or vm.qemu is None:
            return
        guest = self._guests[vm.machine]
        guest.changes[what] += 1
        self._world.stats["reports: changes"] += 1
        self._world.note("%s: %s change: %d", vm.uuid, what, guest.changes[what])
        if what == FACTS and guest.kernel is not None and not guest.kernel.closed:
            guest.kernel.say()
        elif what == AGENTS and vm.daemon is not None and vm.daemon.daemon is not None:
            vm.daemon.process.enter(vm.daemon.daemon._units_changed)

    def replaced(self) -> list[tuple[Any, str, Any]]:
        """Where the observer touches the real guest: see `patches`."""
        observer = vchan.guest.observer
        kernel: Any = types.SimpleNamespace(
            AF_NETLINK=0, SOCK_RAW=0, SOCK_CLOEXEC=0, socket=lambda *_: self._open_kernel()
        )
        return [
            (observer, "os", types.SimpleNamespace(urandom=self._new_id)),
            (observer, "socket", kernel),
            (observer, "told_facts", lambda _: self._here().report(FACTS)),
            (observer, "told_agents", lambda _: self._here().report(AGENTS)),
            (observer, "told_phase", lambda *_: self._phase()),
        ]

    def _process(self) -> Process:
        assert self._world.starting is not None
        return self._world.starting.process

    def _here(self) -> _Guest:
        return self._guests[self._process().machine]

    def _open_kernel(self) -> Kernel:
        guest = self._here()
        guest.kernel = Kernel(self._world, self._process())
        return guest.kernel

    def _phase(self) -> dict[str, Any]:
        guest = self._here()
        boot_s = self._world.rng.random() * BOOT_S_MAX
        guest.boots_s.setdefault(guest.vm.boots, guest.vm.machine.time() + boot_s)
        return guest.report(PHASE) | {"phase": READY if guest.is_ready else BOOTING}

    def _new_id(self, size: int) -> bytes:
        request_id = self._world.rng.randbytes(size)
        made = Report(len(self._made), self._here(), self._process(), self._world.now_s)
        self._made[request_id] = made
        self._world.stats["reports: sent"] += 1
        return request_id

    # ------------------------------------------------------------ hosts

    def noted(self, stay: int, request_id: bytes, what: str, args: Mapping[str, Any]) -> None:
        """A host keeps a report, in one stay of a VM's."""
        report = args["report"]
        state = (stay, report["vm"], what, report["number"])
        self._told.setdefault(state, request_id)
        how = "known" if args["known"] else "new"
        self._world.stats[f"reports: noted, {how}"] += 1

    def published(self, stay: int, request_id: bytes, publication: Publication) -> None:
        """A host hands something to the broker, perhaps a report."""
        report = self._made.get(request_id)
        if report is not None:
            vm, what, number = _state(publication)
            report.is_first_here = self._told[stay, vm, what, number] == request_id

    # ------------------------------------------------------------ services

    def _hear(self, publication: Publication) -> None:
        message = open_envelope(publication.body)
        vm, what, number = _state(publication)
        request_id = bytes.fromhex(message["_unique_id"])
        report, world = self._made[request_id], self._world
        is_marked = f"_context_{REDELIVERED_KEY}" in message
        name = f"{what} {number} of {vm}"
        world.note("%s: services hear of it%s", name, ", marked" if is_marked else "")
        world.stats[f"reports: heard, {what}"] += 1
        if vm != report.guest.vm.uuid or number > report.guest.number(what):
            world.fail(f"{name}: services hear what never was so")
        if is_marked and not may_be_marked(self._broker, request_id, report.made_s, vm):
            world.fail(f"{name} is marked, and nobody had died")
        if report.heard:
            exempt(world.stats, ASKED_AGAIN)
            if not is_marked:
                world.fail(f"{name}: services hear of it twice, and it is not marked")
        else:
            self._check_order(name, vm, report, request_id)
            self._check_once(name, (vm, what, number), report)
        report.heard += 1
        self._last[vm, what] = max(number, self._last.get((vm, what), -1))

    def _check_order(self, name: str, vm: str, report: Report, request_id: bytes) -> None:
        broker, heard = self._broker, self._in_order.setdefault(vm, [])
        for place, later in heard:
            if place < report.place:
                continue
            if request_id in broker.given_up or broker.may_overtake(later, request_id):
                exempt(self._world.stats, OVERTAKEN)
            else:
                self._world.fail(f"{name} is heard after what was told later")
        heard.append((report.place, request_id))

    def _check_once(self, name: str, state: tuple[str, str, int], report: Report) -> None:
        before = self._heard.setdefault(state, [])
        if any(other.daemon is report.daemon for other in before):
            self._world.fail(f"{name} is told by one daemon twice")
        elif before and not report.is_first_here:
            self._world.fail(f"{name} is told again by a host that knew of it")
        elif before:
            exempt(self._world.stats, TOLD_AGAIN)
        before.append(report)

    # ------------------------------------------------------------ the end

    def is_quiet(self, hosts: Iterable[Host]) -> bool:
        """Everybody knows what is so."""
        return not self.untold(hosts)

    def untold(self, hosts: Iterable[Host]) -> list[str]:
        """Who does not know what."""
        if not self.is_on:
            return []
        found = []
        for guest in self._guests.values():
            uuid = guest.vm.uuid
            kept = _kept(uuid, hosts)
            for what in KINDS:
                number = guest.number(what)
                if kept.get(what) != number:
                    found.append(f"{what} {number} of {uuid}: its host")
                if self.topic and self._listens and self._last.get((uuid, what)) != number:
                    found.append(f"{what} {number} of {uuid}: services")
        return found

    def check_bounds(self, upwards: Iterable[Any]) -> None:
        """One of each kind is under way at most."""
        for upward in upwards:
            own = [item for item in upward._items.values() if item.key == OWN_KEY]
            if len(own) > len(WHAT):
                self._world.fail(f"a guest's daemon has {len(own)} reports under way")


def _state(publication: Publication) -> tuple[str, str, int]:
    """(VM, what is reported, its number)"""
    message = open_envelope(publication.body)
    report = message["payload"]
    return report["vm"], message["event_type"], report["number"]


def _kept(vm: str, hosts: Iterable[Host]) -> dict[str, int]:
    """What the host that has the VM knows: numbers, by kind."""
    for host in hosts:
        channel = host.daemon.channels.get(vm) if host.daemon is not None else None
        if channel is not None and vm in host.qemus:
            kept = channel.downward.upward.reports._kept
            return {what: kept[what][0]["number"] for what in KINDS if what in kept}
    return {}
