"""Lanes: each a thread that carries out its steps one after another, until told to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import libvirt

from tests.rig import RigError
from tests.torture.faults import Faults
from tests.torture.oracle import Fault
from tests.torture.schedule import Step
from tests.torture.stage import Stage
from vchan.errors import VchanError

END_S: Final = 240.0
"""The longest step there is: a broker that restarts on a slow machine."""


class Lane:
    """One lane.

    Args:
        name: "vm0" and on, or HOSTS, or BROKER.
        steps: What is still to be done; a later run of the lane goes on with it.
        done: Told each step that was carried out, and "" or why it could not be.
        replays: Steps begin when their `at_s` says, instead of after a pause.
    """

    def __init__(
        self,
        name: str,
        steps: Iterator[Step],
        stage: Stage,
        faults: Faults,
        done: Callable[[Step, str], None],
        *,
        replays: bool = False,
    ) -> None:
        self.name = name
        self.is_over = False
        self._steps = steps
        self._stage = stage
        self._faults = faults
        self._done = done
        self._replays = replays
        self._put_off: Step | None = None
        self._thread: threading.Thread | None = None

    def start(self, stop: threading.Event, zero_s: float) -> None:
        """Go on, until `stop` is set; times of steps count from `zero_s`."""
        self._thread = threading.Thread(
            target=self._run, args=(stop, zero_s), name=self.name, daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait for the step that is under way.

        Raises:
            RigError: It does not end.
        """
        if self._thread is not None:
            self._thread.join(END_S)
            if self._thread.is_alive():
                raise RigError(f"lane {self.name}: its step does not end in {END_S:.0f} s")

    def _run(self, stop: threading.Event, zero_s: float) -> None:
        while not stop.is_set():
            step = self._put_off or next(self._steps, None)
            self._put_off = None
            if step is None:
                self.is_over = True
                return
            due_s = zero_s + step.at_s if self._replays else time.monotonic() + step.after_s
            if stop.wait(max(0.0, due_s - time.monotonic())):
                self._put_off = step
                return
            self._carry_out(step._replace(at_s=round(time.monotonic() - zero_s, 2)))

    def _carry_out(self, step: Step) -> None:
        began_s = time.monotonic()
        failed = ""
        try:
            self._faults.carry_out(step)
        except (RigError, libvirt.libvirtError, VchanError, OSError) as error:
            failed = f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - a lane that ended unseen would look like calm
            failed = f"a fault of the torture's own: {error!r}"
        is_vm = self.name.startswith("vm")
        vm = self._stage.vms[int(self.name.removeprefix("vm"))].uuid if is_vm else ""
        self._stage.faults.append(Fault(step.kind, vm, began_s, time.monotonic()))
        self._done(step, failed)
