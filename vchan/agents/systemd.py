"""systemd's own programs, for units that are left to it: run beside the loop, bounded."""

import os
import signal
from collections.abc import Callable
from typing import Any, Final

from vchan.agents.processes import Child, default_environment
from vchan.agents.units import Unit
from vchan.io.loop import Loop

COMMAND_OUTPUT_MAX: Final = 256 * 1024
"""What is taken of the output of systemctl and journalctl; they are ended at more."""
COMMAND_S: Final = 20.0
"""They are ended after so long."""
SYSTEMD_IS_THERE: Final = "/run/systemd/system"
_PROPERTIES: Final = ("Id", "ActiveState", "SubState", "MainPID", "NRestarts", "LoadState")
Finished = Callable[[int | None, str], object]


class Systemd:
    """systemd's own programs, run beside the loop."""

    def __init__(
        self, systemctl: str = "/usr/bin/systemctl", journalctl: str = "/usr/bin/journalctl"
    ) -> None:
        self._systemctl = systemctl
        self._journalctl = journalctl

    @staticmethod
    def if_there() -> "Systemd | None":
        """It, if systemd runs this machine."""
        return Systemd() if os.path.isdir(SYSTEMD_IS_THERE) else None

    def show(self, loop: Loop, units: list[str], told: Finished) -> None:
        """How units are: see systemd_row."""
        properties = f"--property={','.join(_PROPERTIES)}"
        SystemdCommand(loop, (self._systemctl, "show", properties, "--", *units), told)

    def order(self, loop: Loop, verb: str, unit: str, told: Finished) -> None:
        """Have a unit started, stopped or restarted."""
        SystemdCommand(loop, (self._systemctl, verb, "--", unit), told)

    def log(self, loop: Loop, unit: str, lines: int, told: Finished) -> None:
        """What a unit said last."""
        how = (f"--lines={lines}", "--output=cat", "--no-pager", "--quiet")
        SystemdCommand(loop, (self._journalctl, f"--unit={unit}", *how), told)


def systemd_row(unit: str, output: str) -> dict[str, Any]:
    """What `systemctl show` says of a unit, in our words."""
    for block in output.split("\n\n"):
        said = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if said.get("Id") == unit:
            is_known = said.get("LoadState") == "loaded"
            states = {"active": "running", "inactive": "stopped", "activating": "waiting"}
            active = said.get("ActiveState", "")
            return {
                "state": states.get(active, active) if is_known else "broken",
                "pid": int(said.get("MainPID", "0")) or None,
                "starts": int(said.get("NRestarts", "0")) + 1,
                "problem": "" if is_known else f"systemd: {said.get('LoadState', 'unknown')}",
            }
    return {"state": "broken", "problem": "systemd says nothing of it"}


class SystemdCommand:
    """A program that is run to its end, its output and time bounded.

    Args:
        told: Told its status (None: there could be no process) and its output.
    """

    def __init__(self, loop: Loop, words: tuple[str, ...], told: Finished) -> None:
        self._output = bytearray()
        self._told = told
        unit = Unit("command", words)
        environment = default_environment(unit, "") | {"LC_ALL": "C.UTF-8"}
        self._child: Child | None = None
        try:
            self._child = Child(loop, unit, environment, self._ended, on_output=self._said)
        except OSError as error:
            text = f"{words[0]}: {error.strerror}"
            loop.call_soon(lambda: told(None, text))
            return
        self._timer = loop.call_later(COMMAND_S, self._end)

    def _said(self, data: bytes) -> None:
        self._output += data
        if len(self._output) > COMMAND_OUTPUT_MAX:
            self._end()

    def _end(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

    def _ended(self, status: int | None) -> None:
        self._timer.cancel()
        self._child = None
        self._told(status, self._output[:COMMAND_OUTPUT_MAX].decode("utf-8", "replace"))
