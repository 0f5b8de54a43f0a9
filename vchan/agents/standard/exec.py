"""Programs that the standard agent runs for the control side: bounded in time, output and number.

The processes belong to the agent's loop; callers, on other threads, start them, wait for news of
them and read what they said from any point on, as often as they like.
"""

import base64
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

from vchan.agents.processes import Child, Keeper, default_environment
from vchan.agents.standard.files import decode
from vchan.agents.standard.permissions import Rules, matches, path_problem
from vchan.agents.units import Unit
from vchan.errors import Rejected
from vchan.io.loop import Loop, Timer

RUNS_MAX: Final = 16
"""Programs that run, or ran and whose output is kept. At it: the oldest that has ended is
forgotten; if all run: Rejected."""
KEPT_S: Final = 600.0
"""What a program said is kept for so long after its end. At it: it is forgotten."""
READ_BYTES_MAX: Final = 512 * 1024
"""Of each of its outputs, by one call. At it: the next call gets the rest."""
STDIN_BYTES_MAX: Final = 1 << 20
"""What a program is given to read: it comes in one message. At it: ValueError."""
WORDS_MAX: Final = 1024
"""Words of a command."""
WORDS_BYTES_MAX: Final = 128 * 1024
"""All words of a command together: Linux takes as much in one (MAX_ARG_STRLEN)."""
WAIT_S_MAX: Final = 20.0
"""How long a call may wait for news of a program."""
WAITING_MAX: Final = 2
"""Calls that wait at a time, so that other threads stay free. At it: more are answered at once."""
GRACE_S: Final = 2.0
"""From the request to end to the end by force, when the time is over."""

Wait = Callable[[Callable[[], Any]], Any]
"""Runs something on the loop's thread and waits for its result."""


class Output:
    """The beginning of what a program writes to one of its outputs."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.data = bytearray()
        self.dropped = 0

    def add(self, data: bytes) -> None:
        """Keep what there is room for, and count the rest."""
        room = self._bytes_max - len(self.data)
        self.data += data[:room]
        self.dropped += max(0, len(data) - room)

    def part(self, start: int) -> bytes:
        """At most READ_BYTES_MAX bytes from there on."""
        return bytes(self.data[start : start + READ_BYTES_MAX])


class _Run:
    def __init__(self, output_bytes_max: int) -> None:
        self.outputs = (Output(output_bytes_max), Output(output_bytes_max))
        self.child: Child | None = None
        self.has_ended = False
        self.status: int | None = None
        self.timed_out = False
        self.timer: Timer | None = None


# ---------------------------------------------------------------- what may be run


def require_run(
    rules: Rules,
    argv: Sequence[str],
    directory: str,
    environment: Mapping[str, str],
    user: str = "",
) -> Unit:
    """What is to be run.

    Args:
        user: "": the agent's own.

    Raises:
        Rejected: The rules do not allow it.
        TypeError, ValueError: It is no command.
    """
    if (
        not isinstance(argv, list)
        or not 0 < len(argv) <= WORDS_MAX
        or not all(isinstance(word, str) and "\0" not in word for word in argv)
        or sum(map(len, argv)) > WORDS_BYTES_MAX
    ):
        text = f"a list of texts, at most {WORDS_MAX}, {WORDS_BYTES_MAX} bytes in all"
        raise ValueError(f"argv: expected {text}")
    program = argv[0]
    for path in dict.fromkeys((program, os.path.realpath(program))):
        problem = path_problem(path)
        if problem:
            raise Rejected(f"{path}: {problem}")
        if not matches(path, rules.exec.allow):
            which = "" if path == program else f", to which {program} is a link"
            raise rules.refuse(f"{path}{which}", "is not allowed", "[exec] allow")
    _require_directory(rules, directory)
    _require_environment(rules, environment)
    if user and user not in rules.exec.users:
        raise rules.refuse(f"user {user}", "is not allowed", "[exec] users")
    return Unit("exec", tuple(argv), user=user, directory=directory, environment=environment)


def _require_directory(rules: Rules, directory: str) -> None:
    if not isinstance(directory, str):
        raise TypeError("argument directory: expected a text")
    for path in dict.fromkeys((directory, os.path.realpath(directory))):
        if path_problem(path) or not matches(path, rules.exec.directories):
            raise rules.refuse(path, "is not allowed", "[exec] directories")


def _require_environment(rules: Rules, environment: Mapping[str, str]) -> None:
    if not isinstance(environment, dict):
        raise TypeError("argument environment: expected a table of texts")
    for name, value in environment.items():
        if not isinstance(value, str) or "\0" in name + value or "=" in name or not name:
            raise ValueError(f"environment: {name}: expected a text")
        if not any(fnmatchcase(name, each) for each in rules.exec.environment):
            raise rules.refuse(name, "is not allowed", "[exec] environment")


class Runs:
    """Every program. Its methods may be called from several threads.

    Args:
        in_loop: Runs something on the loop's thread.
        log: Told what is run.
    """

    def __init__(self, loop: Loop, rules: Rules, in_loop: Wait, log: Callable[[str], object]):
        self._loop = loop
        self._rules = rules
        self._in_loop = in_loop
        self._log = log
        self._changed = threading.Condition()
        self._waiting = threading.Semaphore(WAITING_MAX)
        self._runs: dict[str, _Run] = {}
        self._keeper = Keeper(loop, log)

    # ---------------------------------------------------------------- for callers

    def start(
        self,
        argv: Sequence[str],
        directory: str,
        environment: Mapping[str, str],
        stdin: str,
        timeout_s: float | None,
    ) -> dict[str, Any]:
        """Start a program.

        Raises:
            Rejected: The rules do not allow it, too many run, or it cannot be started.
        """
        unit = require_run(self._rules, argv, directory, environment)
        limit_s = self._rules.exec.time_s_max
        if timeout_s is None:
            timeout_s = limit_s
        if not isinstance(timeout_s, int | float) or not 0 < timeout_s <= limit_s:
            raise self._rules.refuse(
                "timeout_s",
                f"{timeout_s!r} is not over 0 and at most {limit_s:g}",
                "[exec] time_s_max",
            )
        given = decode(stdin)
        if len(given) > STDIN_BYTES_MAX:
            raise ValueError(f"stdin: over {STDIN_BYTES_MAX} bytes (STDIN_BYTES_MAX)")
        key = os.urandom(8).hex()
        self._in_loop(partial(self._start, key, unit, given, float(timeout_s)))
        return {"id": key, "timeout_s": timeout_s}

    def read(self, key: str, stdout_from: int, stderr_from: int, wait_s: float) -> dict[str, Any]:
        """What a program said from there on, and how it is; waits for news if there are none."""
        for name, value in (("stdout_from", stdout_from), ("stderr_from", stderr_from)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: {value!r} is no number of bytes")
        if not isinstance(wait_s, int | float) or not 0 <= wait_s <= WAIT_S_MAX:
            raise ValueError(f"wait_s: {wait_s!r} is not from 0 to {WAIT_S_MAX:g}")
        starts = (stdout_from, stderr_from)
        with self._changed:
            run = self._find(key)
            if wait_s and not _has_news(run, starts) and self._waiting.acquire(blocking=False):
                try:
                    self._changed.wait_for(lambda: _has_news(run, starts), wait_s)
                finally:
                    self._waiting.release()
            parts = [output.part(start) for output, start in zip(run.outputs, starts, strict=True)]
            rest = [
                len(output.data) - start - len(part)
                for output, start, part in zip(run.outputs, starts, parts, strict=True)
            ]
            return {
                "stdout": base64.b64encode(parts[0]).decode(),
                "stderr": base64.b64encode(parts[1]).decode(),
                "stdout_next": stdout_from + len(parts[0]),
                "stderr_next": stderr_from + len(parts[1]),
                "dropped": sum(output.dropped for output in run.outputs),
                "ended": run.has_ended and max(rest) <= 0,
                "status": run.status if run.status is None or run.status >= 0 else None,
                "signal": -run.status if run.status is not None and run.status < 0 else None,
                "timed_out": run.timed_out,
            }

    def _find(self, key: str) -> _Run:
        run = self._runs.get(key) if isinstance(key, str) else None
        if run is None:
            raise Rejected(f"no program runs, or is remembered, as {key!r}")
        return run

    def end(self, key: str) -> dict[str, Any]:
        """End a program that still runs, and forget what it said."""
        self._find(key)
        self._in_loop(partial(self._forget, key))
        return {}

    # ---------------------------------------------------------------- on the loop's thread

    def _start(self, key: str, unit: Unit, stdin: bytes, timeout_s: float) -> None:
        self._make_room()
        rules = self._rules.exec
        run = _Run(rules.output_bytes_max)
        given = os.memfd_create("stdin")
        try:
            os.write(given, stdin)
            os.lseek(given, 0, os.SEEK_SET)
            run.child = Child(
                self._loop,
                unit,
                default_environment(unit, ""),
                partial(self._ended, key, run),
                on_output=partial(self._said, run, 0),
                on_error=partial(self._said, run, 1),
                keeper=self._keeper,
                stdin=given,
            )
        except OSError as error:
            raise Rejected(f"there can be no process: {error.strerror}") from error
        finally:
            os.close(given)
        self._log(f"exec {key}: pid {run.child.pid}: {' '.join(unit.command)[:500]}")
        run.timer = self._loop.call_later(timeout_s, partial(self._time_is_over, run))
        with self._changed:
            self._runs[key] = run

    def _make_room(self) -> None:
        if len(self._runs) < RUNS_MAX:
            return
        over = [key for key, run in self._runs.items() if run.has_ended]
        if not over:
            raise Rejected(f"{RUNS_MAX} programs run already (RUNS_MAX)")
        self._forget(over[0])

    def _said(self, run: _Run, which: int, data: bytes) -> None:
        with self._changed:
            run.outputs[which].add(data)
            self._changed.notify_all()

    def _time_is_over(self, run: _Run) -> None:
        run.timed_out = True
        if run.child is not None:
            run.child.signal(signal.SIGTERM)
            run.timer = self._loop.call_later(GRACE_S, partial(self._kill, run))

    @staticmethod
    def _kill(run: _Run) -> None:
        if run.child is not None:
            run.child.signal(signal.SIGKILL)

    def _ended(self, key: str, run: _Run, status: int | None) -> None:
        if run.timer is not None:
            run.timer.cancel()
        run.timer = self._loop.call_later(KEPT_S, partial(self._forget, key))
        self._log(f"exec {key}: ended with {status}")
        with self._changed:
            run.child = None
            run.status = status
            run.has_ended = True
            self._changed.notify_all()

    def _forget(self, key: str) -> None:
        with self._changed:
            run = self._runs.pop(key, None)
        if run is not None:
            self._kill(run)
            if run.has_ended and run.timer is not None:
                run.timer.cancel()

    def close(self) -> None:
        """End everything."""
        for key in list(self._runs):
            self._forget(key)
        self._keeper.close()


def _has_news(run: _Run, starts: tuple[int, int]) -> bool:
    more = any(len(out.data) > start for out, start in zip(run.outputs, starts, strict=True))
    return run.has_ended or more
