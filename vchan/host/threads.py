"""Threads that cannot die unseen, and what becomes of a daemon whose thread did."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import Final

LOG = logging.getLogger(__name__)

EXIT_SOFTWARE: Final = 70
"""Something that cannot be has happened, outside of any one VM's code: the log has a traceback.
sysexits.h calls it EX_SOFTWARE. Starting again may help."""

OnDeath = Callable[[str], None]
"""Told from any thread that one has ended that should not have, and of what."""


def watched_thread(
    name: str, run: Callable[[], None], is_ending: Callable[[], bool], died: OnDeath
) -> threading.Thread:
    """A thread that is yet to be started. Whatever ends it before its time is logged and told.

    Args:
        run: What it does; returns when it was asked to end, and not before.
        is_ending: Whether it was.
    """

    def watched() -> None:
        problem = "it ended by itself"
        try:
            run()
        except BaseException as error:  # also SystemExit: it would end nothing else
            LOG.critical("thread %s failed", name, exc_info=True)
            problem = type(error).__name__
        else:
            if is_ending():
                return
            LOG.critical("thread %s: %s", name, problem)
        died(f"thread {name}: {problem}")

    return threading.Thread(target=watched, name=name, daemon=True)


def watch_all_threads(died: OnDeath) -> None:
    """Have the same done for threads of anybody's in this process: libraries have their own."""

    def ended(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread is not None else "of no name"
        LOG.critical(
            "thread %s failed",
            name,
            exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback),
        )
        died(f"thread {name}: {args.exc_type.__name__}")

    threading.excepthook = ended


def run_and_exit(program: str, run: Callable[[], int]) -> None:
    """Run a daemon to its end, and end the process with its exit status."""
    try:
        status = run()
    except Exception as error:  # the last one that can tell
        LOG.critical("%s ends: unexpected", program, exc_info=True)
        sys.stderr.write(f"{program}: unexpected: {type(error).__name__}: see the log\n")
        status = EXIT_SOFTWARE
    logging.shutdown()
    sys.exit(status)
