"""A program's own log: lines to standard error, which may be systemd's journal."""

import os
from typing import Final

from vchan.session import printable

STREAM: Final = "JOURNAL_STREAM"
"""systemd's word for what it has connected a service's outputs to, as DEVICE:INODE."""


def log(priority: int, text: str) -> None:
    """One line, with systemd's priority in front of it if the journal reads it: nobody else takes
    it off again."""
    prefix = f"<{priority}>" if _is_journal() else ""
    try:
        os.write(2, f"{prefix}{printable(text)}\n".encode("utf-8", "replace"))
    except OSError:
        pass  # nobody reads the log: that is no reason to stop serving


def _is_journal() -> bool:
    """Whether standard error is the stream that systemd speaks of: it may have been redirected."""
    stream = os.environ.get(STREAM)
    if not stream:
        return False
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"
