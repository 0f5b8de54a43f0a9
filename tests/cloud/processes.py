"""The cloud's processes, by name: each with a log of its own, ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.cloud.install import SYSTEM_PATH
from tests.rig import Account, RigError, end_process, tail, wait_until

START_TIMEOUT_S = 400.0
"""Of any one part. nova's API imports for 20 s on a busy machine."""
STOP_GRACE_S = 20.0
POLL_S = 0.2

US = Account(None)


class Processes:
    """Programs that run until they are stopped.

    Args:
        logs: A directory for what they say.
        programs: Directories that come first in their PATH.
    """

    def __init__(self, directory: Path, logs: Path, programs: Sequence[Path]) -> None:
        self.logs = logs
        self._directory = directory
        self._environment = {
            "PATH": ":".join([*map(str, programs), SYSTEM_PATH]),
            "HOME": str(directory),
            "LANG": "C.UTF-8",
            "VCHAN_CLOUD": str(directory),
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Start a program under a name that no other has; returns its process id."""
        assert name not in self._running, name
        self._running[name] = US.spawn(
            command,
            environment={**self._environment, **(environment or {})},
            log=self.logs / f"{name}.log",
            cwd=self._directory,
        )
        return self._running[name].pid

    def is_started(self, name: str) -> bool:
        """Started, and not stopped or killed since."""
        return name in self._running

    def stop(self, name: str) -> None:
        """End it in order."""
        end_process(self._running.pop(name), grace_s=STOP_GRACE_S)

    def kill(self, name: str) -> None:
        """End it, and what it started, without a word."""
        process = self._running.pop(name)
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_all(self) -> None:
        """End all, the last first."""
        for name in reversed(list(self._running)):
            self.kill(name)

    def wait_for(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait until a part does its work.

        Raises:
            RigError: It ended, or was not ready in time; with the end of its log.
        """

        def is_ready() -> bool:
            process = self._running.get(name)
            if process is not None and process.poll() is not None:
                raise RigError(f"{name} ended while starting:\n{tail(self.logs / f'{name}.log')}")
            return ready()

        wait_until(
            is_ready,
            timeout_s=START_TIMEOUT_S,
            interval_s=POLL_S,
            failure=lambda: f"{name} is not up:\n{tail(self.logs / f'{name}.log')}",
        )

    def run(self, command: Sequence[str | Path]) -> str:
        """Run a program to its end, and return what it said.

        Raises:
            RigError: It failed; with what it said.
        """
        done = subprocess.run(
            [str(part) for part in command],
            env=self._environment,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            words = " ".join(str(part) for part in command)
            raise RigError(
                f"{words}: {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-5000:]}"
            )
        return done.stdout
