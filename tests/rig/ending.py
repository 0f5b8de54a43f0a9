"""A program that is ended by a signal ends what it has started, as on Ctrl-C.

By itself SIGTERM or SIGHUP ends Python at once: no context manager is left, and what the program
has started, in sessions of their own, runs on: brokers, daemons, QEMU.

    if __name__ == "__main__":
        end_on_signals()
        sys.exit(main())
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


def _as_a_shell_says_it(number: int) -> SystemExit:
    return SystemExit(128 + number)


def end_on_signals(made: Callable[[int], BaseException] = _as_a_shell_says_it) -> None:
    """From now on the first of these signals raises an exception in the main thread.

    Any more are ignored, or they would break off the way out: a terminal that is closed sends
    SIGHUP twice, by the kernel and by its shell. SIGKILL, and Ctrl-C, remain.

    Args:
        made: The exception, of the signal's number; by default the exit status that a shell has for
            a program that the signal has ended.
    """
    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]

    def end(number: int, _: object) -> NoReturn:
        for each in heeded:
            # Not SIG_IGN, which what is started on the way out would inherit.
            signal.signal(each, _is_ending_already)
        atexit.register(_end_nameless)
        raise made(number)

    for number in heeded:  # nohup has a program ignore one
        signal.signal(number, end)


def _is_ending_already(*_: object) -> None:
    pass


def _end_nameless() -> None:
    """End the child that was just being started: nobody had a name for it, to end it by."""
    for thread in Path("/proc/self/task").iterdir():
        for pid in map(int, (thread / "children").read_text().split()):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                # With what it has started itself, if it leads a group.
                end = os.killpg if os.getpgid(pid) == pid else os.kill
                end(pid, signal.SIGTERM)
