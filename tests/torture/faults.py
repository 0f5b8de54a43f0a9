"""The faults: each is done to real parts, and healed before its method returns."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import libvirt

from tests.rig import RigError
from tests.rig.compute import GUEST_DAEMON, ComputeHost
from tests.torture.in_guest import ASKER, RUNNER
from tests.torture.oracle import CUT_WHILE_PAUSED
from tests.torture.schedule import Step
from tests.torture.stage import Stage, Vm
from vchan.errors import VchanError

ABORT_S: Final = 60.0
DETACH_S: Final = 60.0
SEEN_S: Final = 1.0
"""Within so long the host's daemon knows that a VM is paused."""
SIGNAL: Final = """\
signal() {
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        kill -$2 $(cat /run/$1.pid) && return
        sleep 0.3
    done
    return 1
}
"""
"""Shell: `signal NAME SIGNAL` to a program that init keeps; it may be starting just now. A step
whose signal found nobody has failed: a fault that did nothing would look like a promise kept."""


class Doors:
    """Many may use libvirt at a time, or one may restart it: libvirt's own recovery of migrations
    that it dies in is not what is tested."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._is_closed = False

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Together with others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True  # nobody new
            self._changed.wait_for(lambda: self._users == 0)
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()


class Faults:
    """Carries out steps.

    Args:
        broken: Told of a promise that was seen to be broken: kind and text.
    """

    def __init__(self, stage: Stage, broken: Callable[[str, str], None]) -> None:
        self._stage = stage
        self._broken = broken
        self._doors = Doors()
        self.killing: set[str] = set()
        """Names of hosts whose daemon we have ended, and not started yet."""

    def carry_out(self, step: Step) -> None:
        """Do it and heal it.

        Raises:
            RigError, libvirt.libvirtError, VchanError: It could not be done.
        """
        if step.lane.startswith("vm"):
            vm = self._stage.vms[int(step.lane.removeprefix("vm"))]
            with self._doors.using():
                getattr(self, f"_{step.kind}")(vm, step)
        else:
            getattr(self, f"_{step.kind}")(step)

    # ---------------------------------------------------------------- VMs

    def _migrate(self, vm: Vm, step: Step) -> None:
        vm.migrate()

    def _abort(self, vm: Vm, step: Step) -> None:
        """Begun so slowly that it does not end by itself, and given up."""
        failed: list[Exception] = []

        def run(domain: Any) -> None:
            parameters = {
                libvirt.VIR_MIGRATE_PARAM_URI: vm.there.libvirt.migrate_uri(),
                libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 1,  # MiB/s
            }
            flags = libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_LIVE
            flags |= libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
            try:
                domain.migrateToURI3(vm.there.libvirt.uri, parameters, flags)
            except libvirt.libvirtError as error:
                failed.append(error)

        with vm.domain() as domain, vm.domain() as same:
            thread = threading.Thread(target=run, args=(domain,))
            thread.start()
            thread.join(step.seconds)
            until_s = time.monotonic() + ABORT_S
            while thread.is_alive() and time.monotonic() < until_s:
                with contextlib.suppress(libvirt.libvirtError):  # not begun, or just over
                    same.abortJob()
                thread.join(0.3)
            thread.join()
        if not failed:
            raise RigError(f"the migration of {vm.name} was over before it was given up")

    def _suspend(self, vm: Vm, step: Step) -> None:
        with vm.domain() as domain:
            domain.suspend()
            try:
                self._wait_paused(vm, step.seconds)
            finally:
                domain.resume()

    def _wait_paused(self, vm: Vm, seconds: float) -> None:
        """A paused VM is silent, and nothing is wrong with it: its connection is left alone."""
        time.sleep(min(SEEN_S, seconds))
        pid, before = self._cures(vm)
        time.sleep(max(0.0, seconds - SEEN_S))
        pid_after, after = self._cures(vm)
        if pid and pid == pid_after and after > before:
            self._broken(
                CUT_WHILE_PAUSED,
                f"{vm.name}: {after - before} connections in {seconds:.0f} s of a pause",
            )

    @staticmethod
    def _cures(vm: Vm) -> tuple[int, int]:
        """Which daemon says so (0: none), and how often it connected anew."""
        daemon = vm.here.daemon
        try:
            return daemon.pid, int(vm.status()["channel"]["cures"])
        except VchanError:
            return 0, 0

    def _save(self, vm: Vm, step: Step) -> None:
        with vm.domain() as domain:
            domain.managedSave(0)
            time.sleep(step.seconds)
            domain.create()

    def _reset(self, vm: Vm, step: Step) -> None:
        with vm.domain() as domain:
            domain.reset(0)
        vm.run("true")  # it has booted

    def _agent_kill(self, vm: Vm, step: Step) -> None:
        vm.run(f"{SIGNAL} signal {RUNNER} KILL")

    def _asker_kill(self, vm: Vm, step: Step) -> None:
        vm.run(f"{SIGNAL} signal {ASKER} KILL")

    def _agent_away(self, vm: Vm, step: Step) -> None:
        hold = f"/run/{RUNNER}.hold"
        vm.run(
            f"{SIGNAL} touch {hold}; signal {RUNNER} KILL; was=$?; sleep {step.seconds};"
            f" rm {hold}; exit $was"
        )

    def _agent_stop(self, vm: Vm, step: Step) -> None:
        self._stop_in_guest(vm, RUNNER, step.seconds, "CONT")

    def _agent_hang(self, vm: Vm, step: Step) -> None:
        self._stop_in_guest(vm, RUNNER, step.seconds, "KILL")

    def _guest_daemon_kill(self, vm: Vm, step: Step) -> None:
        vm.run(f"{SIGNAL} signal {GUEST_DAEMON.name} KILL")

    def _guest_daemon_hang(self, vm: Vm, step: Step) -> None:
        self._stop_in_guest(vm, GUEST_DAEMON.name, step.seconds, "KILL")

    def _guest_daemon_stop(self, vm: Vm, step: Step) -> None:
        self._stop_in_guest(vm, GUEST_DAEMON.name, step.seconds, "CONT")

    @staticmethod
    def _stop_in_guest(vm: Vm, name: str, seconds: float, then: str) -> None:
        vm.run(f"{SIGNAL} signal {name} STOP && sleep {seconds} && signal {name} {then}")

    def _disk_full(self, vm: Vm, step: Step) -> None:
        """Nothing can be written to /run and /tmp; the daemon dies there, and has to start."""
        vm.run(
            f"{SIGNAL} for d in /run /tmp; do mount -o remount,size=256k $d; done;"
            " dd if=/dev/zero of=/run/fill bs=4k; dd if=/dev/zero of=/tmp/fill bs=4k;"
            f" signal {GUEST_DAEMON.name} KILL; was=$?; sleep {step.seconds};"
            " rm -f /run/fill /tmp/fill;"
            " for d in /run /tmp; do mount -o remount,size=50% $d; done; exit $was"
        )

    def _clock_step(self, vm: Vm, step: Step) -> None:
        vm.run(f"date -s @$(($(date +%s) + {step.seconds:.0f}))")

    def _detach(self, vm: Vm, step: Step) -> None:
        """The channel is unplugged, and plugged in again."""
        self._insist(vm, "detach", lambda state: state == "none")
        time.sleep(step.seconds)
        self._insist(vm, "attach", lambda state: state != "none")

    def _insist(self, vm: Vm, command: str, is_done: Callable[[str], bool]) -> None:
        """Until it is done: the daemon may be down, or be told by libvirt a moment later."""
        until_s = time.monotonic() + DETACH_S
        said = ""
        while time.monotonic() < until_s:
            said = vm.here.cli(command, vm.name).stderr
            with contextlib.suppress(VchanError):
                if is_done(vm.status()["state"]):
                    return
            time.sleep(0.3)
        raise RigError(f"vchan {command} {vm.name}: {said}")

    # ---------------------------------------------------------------- hosts

    def _host(self, step: Step) -> ComputeHost:
        return self._stage.hosts[step.host]

    @contextlib.contextmanager
    def _killed(self, *hosts: ComputeHost) -> Iterator[None]:
        for host in hosts:
            self.killing.add(host.name)
            host.daemon.kill()
        try:
            yield
        finally:
            for host in hosts:
                host.daemon.start()
                self.killing.discard(host.name)

    def _host_kill(self, step: Step) -> None:
        with self._killed(self._host(step)):
            pass

    def _host_away(self, step: Step) -> None:
        with self._killed(self._host(step)):
            time.sleep(step.seconds)

    def _host_hang(self, step: Step) -> None:
        host = self._host(step)
        host.daemon.signal(signal.SIGSTOP)
        time.sleep(step.seconds)
        with self._killed(host):
            pass

    def _both_kill(self, step: Step) -> None:
        with self._killed(*self._stage.hosts):
            pass

    def _host_stop(self, step: Step) -> None:
        daemon = self._host(step).daemon
        daemon.signal(signal.SIGSTOP)
        try:
            time.sleep(step.seconds)
        finally:
            daemon.signal(signal.SIGCONT)

    def _libvirtd_restart(self, step: Step, number: signal.Signals = signal.SIGTERM) -> None:
        with self._doors.alone():
            self._host(step).libvirt.restart(number)

    def _libvirtd_kill(self, step: Step) -> None:
        self._libvirtd_restart(step, signal.SIGKILL)

    def _audit_full(self, step: Step) -> None:
        """The daemon's disk is full: it can write to no file, neither the audit log nor its own."""
        pid = self._host(step).daemon.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            time.sleep(step.seconds)
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    # ---------------------------------------------------------------- the broker

    def _cut(self, step: Step) -> None:
        self._stage.rabbit.kill_connections()

    def _broker_restart(self, step: Step) -> None:
        self._stage.rabbit.restart()

    def _broker_kill(self, step: Step) -> None:
        self._stage.rabbit.restart(crash=True)
