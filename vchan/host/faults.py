"""How exceptions that our own code lets out are caught and logged. Their texts may be a guest's
words."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Final, TypeVar

FAULT_CHARS_MAX: Final = 300
"""Of an exception's own text in the log: it may hold a message of 4 MiB. At it: the rest is cut."""
ALWAYS: Final = {"always": True}
"""`extra` of log lines that no budget leaves out or cuts: something else bounds them."""

T = TypeVar("T")


def attempt(
    work: Callable[[], T], otherwise: T, *expected: type[Exception]
) -> tuple[T, Exception | None]:
    """Do something that may fail in any way.

    The failure is handed back, not handled here: oslo.log puts the exception that is being handled
    behind whatever is logged meanwhile, with all that it says.

    Raises:
        One of `expected`.

    Returns:
        What `work` does and None, or `otherwise` and the failure.
    """
    try:
        return work(), None
    except expected:
        raise
    except Exception as error:  # noqa: BLE001  # anything may come: that is what this is for
        return otherwise, error


def log_fault(log: logging.Logger, what: str, error: BaseException) -> str:
    """Log a traceback. Whatever the exception holds, it is on one line and does not go on for ever.

    Args:
        what: What went on when it came, and what it costs.

    Returns:
        What `describe_fault` does.
    """
    said = ascii(str(error))[:FAULT_CHARS_MAX]
    lines = [*traceback.format_tb(error.__traceback__), f"{type(error).__name__}: {said}"]
    # A fault costs its VM a quarantine: that bounds how often this comes.
    log.error("%s:\n%s", what, "".join(lines), extra=ALWAYS)
    return describe_fault(error)


def describe_fault(error: BaseException) -> str:
    """What failed and where, on one line. Not what the exception says: that may be a guest's."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"
