"""What goes wrong: every kind of fault, and who chooses.

Each seed enables a random subset of the kinds, at a random rate (swarm testing: a fault that is
always there hides what happens without it). Every fault plans its own end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tests.simulate.callers import Callers
from tests.simulate.guest import Migration, Vm
from tests.simulate.hosts import Host
from tests.simulate.lies import be_honest, lie
from tests.simulate.world import World

PROFILES: Final[dict[str, dict[str, float]]] = {
    # How likely each kind is to be enabled, where not 0.4; "storm" multiplies the rate.
    "swarm": {"migrate": 0.7},
    "migrations": {"migrate": 1.0, "storm": 3.0},
    "crashes": {
        "host daemon": 0.9,
        "guest daemon": 0.9,
        "agent": 0.7,
        "cut broker": 0.7,
        "storm": 2.0,
    },
    "broker": {
        "cut broker": 1.0,
        "broker in trouble": 0.8,
        "unconfirmed": 0.9,
        "refused": 0.6,
        "late confirms": 0.8,
        "storm": 2.0,
        "migrate": 0.7,
    },
    "channel": {
        "bits": 0.8,
        "wedge": 0.8,
        "wake-ups": 0.8,
        "pause": 0.8,
        "migrate": 0.8,
        "lies": 0.6,
    },
    "calm": {"storm": 0.3},
}

LIES_MAX: Final = 4
"""In a run: a guest that breaks the protocol more often is put into quarantine, and rightly."""


class Faults:
    """Strikes between two events, now and then."""

    def __init__(self, world: World, hosts: list[Host], vms: list[Vm], callers: Callers) -> None:
        self._world = world
        self._hosts = hosts
        self._vms = vms
        self._callers = callers
        rng = world.rng
        self.profile = rng.choice(sorted(PROFILES))
        weights = PROFILES[self.profile]
        self._kinds: list[Callable[[], None]] = []
        for name, strike in self._all().items():
            if rng.random() < weights.get(name, 0.4):
                self._kinds += [strike] * (3 if name == "migrate" else 1)
        self._rate = rng.choice((0.005, 0.015, 0.05)) * weights.get("storm", 1.0)
        self._left = rng.choice((2, 8, 20, 40))
        self._lies_left = LIES_MAX
        self._twice = rng.random() < 0.5
        self._migration_fails = rng.choice((0.0, 0.3))
        lost_wakeups = 0.02 if self._enabled(weights, "wake-ups") else 0.0
        for vm in vms:
            vm.channel.lost_wakeups = lost_wakeups
        callers.broker.refuses = 0.1 if self._enabled(weights, "refused") else 0.0
        callers.broker.doubts = 0.1 if self._enabled(weights, "doubts") else 0.0
        callers.broker.late_confirms = 0.3 if self._enabled(weights, "late confirms") else 0.0
        callers.unconfirmed = 0.15 if self._enabled(weights, "unconfirmed") else 0.0
        self._meets = rng.choice((0.0, 0.0, 0.4))
        self.active = False
        self.struck = 0
        self._hot = 0

    def _enabled(self, weights: dict[str, float], name: str) -> bool:
        return self._world.rng.random() < weights.get(name, 0.3)

    def _all(self) -> dict[str, Callable[[], None]]:
        return {
            "migrate": self._migrate,
            "pause": self._pause,
            "save": self._save,
            "reboot": self._reboot,
            "vm": self._vm_dies,
            "host daemon": self._host_daemon,
            "host daemon stalls": self._host_daemon_stalls,
            "host": self._host_dies,
            "libvirtd": self._libvirtd,
            "guest daemon": self._guest_daemon,
            "agent": self._agent,
            "cut broker": self._cut_broker,
            "broker in trouble": self._broker_in_trouble,
            "wedge": self._wedge,
            "bits": self._bits,
            "lies": self._lie,
        }

    def maybe(self) -> None:
        """Called after every event."""
        if not self.active or self._left <= 0 or not self._kinds:
            return
        rng = self._world.rng
        rate = self._rate
        if self._hot > 0:
            self._hot -= 1
            rate *= 8.0
        if rng.random() < rate:
            self._left -= 1
            self.struck += 1
            # Faults come in company: the next is often close behind.
            self._hot = rng.choice((0, 0, 20, 100))
            rng.choice(self._kinds)()

    def meet_requests(self) -> None:
        """Guests have just asked something: the broker is lost, or in trouble, right then, so that
        it may have some of it and not the rest."""
        rng = self._world.rng
        if self.active and rng.random() < self._meets:
            strike = rng.choice((self._cut_broker, self._broker_in_trouble))
            self._world.after(rng.random() * rng.choice((0.001, 0.02)), strike)

    def strike(self, name: str) -> None:
        """One fault of this kind, now: for tests."""
        self._all()[name]()

    def _later(
        self, shortest_s: float, longest_s: float, call: Callable[..., Any], *a: Any
    ) -> None:
        rng = self._world.rng
        self._world.after(shortest_s + rng.random() * (longest_s - shortest_s), call, *a)

    def _vm(self) -> Vm:
        return self._world.rng.choice(self._vms)

    def _other_host(self, host: Host | None) -> Host | None:
        others = [one for one in self._hosts if one is not host and one.up and one.libvirt_up]
        return self._world.rng.choice(others) if others else None

    # ------------------------------------------------------------ VMs

    def _migrate(self) -> None:
        vm = self._vm()
        if vm.qemu is None or vm.migrating or vm.saved or not vm.qemu.host.libvirt_up:
            return
        target = self._other_host(vm.qemu.host)
        if target is not None and vm.uuid not in target.qemus:
            rng = self._world.rng
            fails = ""
            if rng.random() < self._migration_fails:
                fails = rng.choice(("early", "late"))
            Migration(vm, target, fails=fails, twice=self._twice)

    def _pause(self) -> None:
        vm = self._vm()
        if vm.is_free:
            self._world.stats["pauses"] += 1
            self._world.note("%s: paused", vm.uuid)
            vm.pause()
            longest_s = self._world.rng.choice((0.1, 3.0, 30.0, 10_000.0))
            self._later(0.0, longest_s, vm.unpause)

    def _save(self) -> None:
        vm = self._vm()
        if vm.is_free and vm.qemu is not None:
            self._world.stats["saves"] += 1
            self._world.note("%s: saved", vm.uuid)
            host = vm.qemu.host
            vm.save()
            self._later(2.0, 10.0, vm.restore, host)

    def _reboot(self) -> None:
        self._world.stats["reboots"] += 1
        self._vm().reboot()

    def _vm_dies(self) -> None:
        vm = self._vm()
        if vm.qemu is not None:
            self._world.stats["VM deaths"] += 1
            host = vm.qemu.host
            vm.die()
            self._later(2.0, 4.0, self.boot, vm, host)

    def boot(self, vm: Vm, host: Host) -> None:
        """Start it on its host or, if that is down, on another."""
        if vm.qemu is None and not vm.saved:
            chosen = host if host.up and vm.uuid not in host.qemus else self._other_host(host)
            if chosen is not None and vm.uuid not in chosen.qemus:
                vm.boot(chosen)
            else:
                self._world.after(1.0, self.boot, vm, host)

    # ------------------------------------------------------------ hosts

    def _host_daemon(self) -> None:
        host = self._world.rng.choice(self._hosts)
        self._world.stats["host daemon deaths"] += 1
        host.kill_daemon()
        self._later(0.1, 4.0, host.start_daemon)

    def _host_daemon_stalls(self) -> None:
        host = self._world.rng.choice(self._hosts)
        if not host.machine.frozen:
            self._world.stats["host daemon stalls"] += 1
            host.machine.freeze()
            self._later(0.1, 3.0, self.unstall, host)

    @staticmethod
    def unstall(host: Host) -> None:
        """It goes on."""
        if host.machine.frozen:
            host.machine.thaw()

    def _host_dies(self) -> None:
        host = self._world.rng.choice(self._hosts)
        if not host.up or sum(one.up for one in self._hosts) < 2:
            return
        self._world.stats["host deaths"] += 1
        self._world.note("%s dies", host.name)
        if any(vm.migrating and vm.qemu and vm.qemu.host is host for vm in self._vms):
            self._world.stats["host deaths in a migration"] += 1
        host.up = False
        host.kill_daemon(host_too=True)
        for qemu in list(host.qemus.values()):
            vm = next(one for one in self._vms if one.uuid == qemu.channel.uuid)
            if vm.qemu is qemu:
                vm.die()
                self._later(2.0, 4.0, self.boot, vm, host)
            else:
                qemu.die()
        self._later(3.0, 10.0, self.revive, host)

    def revive(self, host: Host) -> None:
        """The host is back, without VMs."""
        host.up = True
        self.unstall(host)
        host.start_daemon()

    def _libvirtd(self) -> None:
        host = self._world.rng.choice(self._hosts)
        if host.libvirt_up and not any(vm.migrating for vm in self._vms):
            self._world.stats["libvirtd restarts"] += 1
            host.libvirt_stop()
            self._later(0.2, 3.0, host.libvirt_start)

    # ------------------------------------------------------------ guests

    def _guest_daemon(self) -> None:
        vm = self._vm()
        self._world.stats["guest daemon deaths"] += 1
        vm.kill_daemon()
        self._later(0.05, 1.5, vm.start_daemon)

    def _agent(self) -> None:
        vm = self._vm()
        if vm.agents:
            self._world.stats["agent deaths"] += 1
            slot = self._world.rng.choice(sorted(vm.agents))
            vm.kill_agent(slot)
            self._later(0.05, self._world.rng.choice((0.5, 9.0)), vm.start_agent, slot)

    # ------------------------------------------------------------ the ways between them

    def _cut_broker(self) -> None:
        host = self._world.rng.choice(self._hosts)
        if host.daemon is not None:
            self._world.stats["broker connections cut"] += 1
            host.daemon.broker.cut()

    def _broker_in_trouble(self) -> None:
        """For a while it refuses most of what it gets: out of disk, or its leader is away."""
        broker = self._callers.broker
        self._world.stats["broker in trouble"] += 1
        broker.trouble_until_s = self._world.now_s + self._world.rng.choice((0.1, 1.0, 4.0))

    def _wedge(self) -> None:
        vm = self._vm()
        if vm.qemu is not None and vm.qemu.running:
            vm.qemu.wedge()

    def _bits(self) -> None:
        self._vm().channel.damage += self._world.rng.choice((1, 3, 10))

    def _lie(self) -> None:
        """The guest says what no honest one says: not often, or it is put into quarantine."""
        vm = self._vm()
        if vm.daemon is not None and vm.daemon.daemon is not None and self._lies_left:
            self._lies_left -= 1
            lie(vm.daemon.daemon._port, self._world.rng, lambda: self._lied(vm))

    def _lied(self, vm: Vm) -> None:
        vm.lies += 1
        self._world.stats["lies"] += 1
        self._world.note("%s: the guest lies", vm.uuid)

    # ------------------------------------------------------------ healing

    def heal(self) -> None:
        """No more faults, and an end to those that go on."""
        self.active = False
        self._callers.unconfirmed = 0.0
        self._callers.broker.refuses = self._callers.broker.doubts = 0.0
        self._callers.broker.late_confirms = self._callers.broker.trouble_until_s = 0.0
        for vm in self._vms:
            vm.channel.lost_wakeups = 0.0
            vm.channel.damage = 0
            if vm.daemon is not None and vm.daemon.daemon is not None:
                be_honest(vm.daemon.daemon._port)
        for host in self._hosts:
            self._world.after(0.5, self._heal_host, host)
        for vm in self._vms:
            self._world.after(1.0, self._heal_vm, vm)

    def _heal_host(self, host: Host) -> None:
        if not host.up:
            self.revive(host)
        self.unstall(host)
        if not host.libvirt_up:
            host.libvirt_start()
        host.start_daemon()

    def _heal_vm(self, vm: Vm) -> None:
        if vm.migrating:
            self._world.after(1.0, self._heal_vm, vm)
            return
        vm.unpause()
        if vm.saved:
            vm.restore(self._hosts[0])
        elif vm.qemu is None:
            self.boot(vm, self._hosts[0])
        vm.start_daemon()
        for slot in range(len(vm.slots)):
            vm.start_agent(slot)
