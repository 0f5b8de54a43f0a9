"""One run: rounds of faults, each healed and judged."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.rig import RigError, wait_until
from tests.rig.compute import GUEST_DAEMON
from tests.rig.panics import PANICKED
from tests.torture import report, schedule
from tests.torture.control import CALL_TIMEOUT_S
from tests.torture.faults import Faults
from tests.torture.lanes import Lane
from tests.torture.oracle import (
    CRASH,
    DIED,
    PANIC,
    STUCK,
    TORN,
    Fault,
    Verdict,
    Violation,
    judge,
    missing,
)
from tests.torture.schedule import BROKER, HOSTS, MIGRATE, Step
from tests.torture.stage import Stage
from tests.torture.watch import Watch

ROUND_S: Final = 120.0
DRAIN_S: Final = 20.0
"""When nothing has arrived for so long after everything was healed, what is missing is lost."""
PROGRESS_S: Final = 10.0
LOOK_S: Final = 0.5
LOAD_S: Final = 600.0
"""Until the load has carried as much as it must, after the faults of a run with each once."""
BOOT_S: Final = 10.0
"""A guest whose kernel panicked is back after so long: a second until it starts, and two to five of
booting, on a machine that is busy."""
STUCK_S: Final = 30.0
"""A guest's daemon that has opened nothing for so long never will: a busy machine takes 15 s."""
ENDED = re.compile(r"init: (vchan-guest|runner|asker) ended with status (\d+)")
KILLED: Final = "137"
CRASHED: Final = frozenset({"132", "134", "135", "136", "139"})
"""Ended by a signal of its own (an illegal instruction, a broken heap, a bad address), though it is
Python alone: the emulated machine has lost memory. The oracle is told, and the report counts it, as
when it is the kernel that finds its memory damaged."""


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        minutes: Of faults, at most; 0: until the migrations are done, or the steps.
        migrations: To be done; 0: as many as come.
        steps: To be done again, instead of what the seed deals.
        once: Every kind of fault once, and no more.
    """

    seed: int
    vms: int
    minutes: float = 0.0
    migrations: int = 0
    round_s: float = ROUND_S
    steps: tuple[Step, ...] | None = None
    once: bool = False
    call_timeout_s: int = CALL_TIMEOUT_S


@dataclass
class Found:
    """What came of it."""

    steps: list[Step] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seen: list[Violation] = field(default_factory=list)
    """Promises that were seen to be broken; the oracle's come at the end of each round."""


class Torture:
    """A run.

    Args:
        directory: Where everything is kept while it lasts; a short path.
        say: Takes a line of progress.
    """

    def __init__(self, plan: Plan, directory: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._directory = directory
        self._say = say
        self._lock = threading.Lock()
        self._worked_s = 0.0
        self._crashes: Counter[tuple[Path, str]] = Counter()  # seen so far, by console and kind
        self._verdict = Verdict([], Counter(), Counter())
        self.found = Found()

    def run(self) -> dict[str, Any]:
        """All rounds, or until a promise is broken; returns the figures of `report`."""
        plan = self._plan
        self._say(f"seed {plan.seed}: starting a broker, two hosts and {plan.vms} VMs")
        with Stage(self._directory, plan.vms, plan.call_timeout_s) as stage:
            faults = Faults(stage, self._broken)
            with Watch(stage, faults, self._broken) as watch:
                lanes = [self._lane(name, stage, faults) for name in self._lane_names()]
                self._say("everything serves; faults begin")
                while not self._is_over(lanes):
                    self._work(lanes, stage)
                    self.settle(stage)
                    if not self._is_over(lanes):
                        stage.go()
                taken = report.Taken(watch.host_rss_mib, watch.host_descriptors, *watch.guests())
                return self.figures(stage, taken)

    def figures(self, stage: Stage, taken: report.Taken) -> dict[str, Any]:
        """Everything that was done and found so far."""
        found, plan = self.found, self._plan
        carried = report.Carried(
            plan.seed, plan.vms, self._worked_s / 60, found.steps, found.failed
        )
        everything = self._verdict._replace(violations=[*found.seen, *self._verdict.violations])
        return report.figures(carried, stage.read(), everything, taken)

    # ---------------------------------------------------------------- faults

    def _lane_names(self) -> list[str]:
        names = [*schedule.vm_lanes(self._plan.vms), HOSTS, BROKER]
        if self._plan.steps is None:
            return names
        used = {step.lane for step in self._plan.steps}
        return [name for name in names if name in used]

    def _lane(self, name: str, stage: Stage, faults: Faults) -> Lane:
        plan = self._plan
        steps: Iterator[Step]
        if plan.steps is not None:
            steps = (step for step in plan.steps if step.lane == name)
        elif plan.once:
            steps = schedule.deal_once(plan.seed, name, plan.vms)
        else:
            steps = schedule.deal(plan.seed, name, plan.vms, often=plan.migrations > 0)
        return Lane(name, steps, stage, faults, self._done, replays=plan.steps is not None)

    def _done(self, step: Step, failed: str) -> None:
        with self._lock:
            self.found.steps.append(step)
            if failed:
                self.found.failed.append(f"{step.kind} of {step.lane}: {failed}")

    def _broken(self, kind: str, text: str) -> None:
        with self._lock:
            self.found.seen.append(Violation(kind, text))
        self._say(f"BROKEN: {kind}: {text}")

    def _work(self, lanes: list[Lane], stage: Stage) -> None:
        """A round of faults."""
        stop = threading.Event()
        began_s = time.monotonic()
        zero_s = began_s - self._worked_s
        for lane in lanes:
            lane.start(stop, zero_s)
        try:
            self._wait(lanes, stage, began_s, zero_s)
            if self._plan.once and self._is_over(lanes):
                self._wait_for_load(stage)
        finally:  # also when we are told to end: no lane may start what nobody would stop
            stop.set()
            for lane in lanes:
                lane.join()
            self._worked_s = time.monotonic() - zero_s

    def _wait(self, lanes: list[Lane], stage: Stage, began_s: float, zero_s: float) -> None:
        told_s = began_s
        while time.monotonic() - began_s < self._plan.round_s:
            time.sleep(LOOK_S)
            self._note_crashes(stage)
            if self._is_over(lanes, time.monotonic() - zero_s):
                return
            if time.monotonic() - told_s >= PROGRESS_S:
                told_s = time.monotonic()
                self._say(report.progress(stage.read(), self.found.steps))

    def _wait_for_load(self, stage: Stage) -> None:
        """On a slow machine the faults are over before there was much that they could harm."""
        if not self.found.seen:
            wait_until(
                lambda: report.carried_enough(stage.read()),
                timeout_s=LOAD_S,
                interval_s=LOOK_S,
                failure=lambda: f"too little load: {report.progress(stage.read(), [])}",
            )

    def _is_over(self, lanes: list[Lane], worked_s: float | None = None) -> bool:
        plan = self._plan
        if self.found.seen or self._verdict.violations:
            return True
        if plan.migrations:
            done = sum(step.kind == MIGRATE for step in self.found.steps)
            failed = sum(text.startswith(MIGRATE) for text in self.found.failed)
            if done - failed >= plan.migrations:
                return True
        if plan.minutes and (worked_s or self._worked_s) >= plan.minutes * 60:
            return True
        return all(lane.is_over for lane in lanes)

    # ---------------------------------------------------------------- healed

    def settle(self, stage: Stage) -> None:
        """Heal everything, wait until everything has ended, and judge it."""
        self._say("healed; waiting for everything to end")
        if not stage.rabbit.is_running:
            stage.rabbit.start()
        for host in stage.hosts:
            host.heal()
        self._end_stuck(stage)
        try:
            for sender in stage.stand():
                self._broken(STUCK, f"{sender} still waits for its call's end")
        except RigError as error:
            self._broken(STUCK, str(error))
        self._drain(stage)
        self._note_crashes(stage)
        self._verdict = judge(stage.read())
        self._look_at_consoles(stage)
        for violation in self._verdict.violations[:10]:
            self._say(f"BROKEN: {violation.kind}: {violation.text}")
        self._say(report.progress(stage.read(), self.found.steps) + "; judged")

    def _drain(self, stage: Stage) -> None:
        least, since_s = 1 << 60, time.monotonic()
        while time.monotonic() - since_s < DRAIN_S:
            left = missing(stage.read())
            if not left:
                return
            if left < least:
                least, since_s = left, time.monotonic()
            time.sleep(LOOK_S)

    def _note_crashes(self, stage: Stage) -> None:
        """Programs and kernels of guests that have crashed since the last look died just now."""
        for path in stage.consoles():
            text = path.read_text(errors="replace")
            crashes = sum(status in CRASHED for _, status in ENDED.findall(text))
            self._note(stage, path, "program crashed", crashes, CRASH, 0.0)
            panics = len(PANICKED.findall(text))
            self._note(stage, path, "kernel panicked", panics, PANIC, BOOT_S)

    def _note(
        self, stage: Stage, console: Path, what: str, count: int, kind: str, lasts_s: float
    ) -> None:
        now_s, name = time.monotonic(), console.stem
        for _ in range(count - self._crashes[console, kind]):
            fault = Fault(kind, stage.uuid_of(name), now_s - 2 * LOOK_S, now_s + lasts_s)
            stage.faults.append(fault)
            self._say(f"{name}: a {what}: its emulated machine has lost memory")
        self._crashes[console, kind] = count

    def _end_stuck(self, stage: Stage) -> None:
        """A guest's daemon that was migrated while its interpreter started may be stuck in it."""
        for vm, since_s in stage.stuck(STUCK_S):
            self._say(f"{vm.name}: its daemon's interpreter does not come to its end: killed")
            stage.faults.append(Fault(CRASH, vm.uuid, since_s, time.monotonic() + BOOT_S))
            vm.run(f"kill -9 $(cat /run/{GUEST_DAEMON.name}.pid)")

    def _look_at_consoles(self, stage: Stage) -> None:
        """A guest's program that ended and was not killed has died of a fault of its own."""
        for path in stage.consoles():
            for name, status in ENDED.findall(path.read_text(errors="replace")):
                if status not in CRASHED | {KILLED}:
                    self._broken(DIED, f"{path.stem}: {name} ended with status {status}")
        for line in stage.torn():
            self._broken(TORN, line)
