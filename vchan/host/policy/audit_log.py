"""The audit log's file: opened, written to, reopened, and never waited for."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

from vchan.host.policy.audit_record import (
    Record,
    Sampler,
    format_end,
    format_left_out,
    format_record,
    unended,
)
from vchan.io.loop import Loop, Timer

AUDIT_LOG: Final = "/var/log/vchan/audit.log"
STDERR: Final = "-"
"""Standard error, and so journald."""
FILE_MODE: Final = 0o640
REOPEN_S: Final = 5.0
"""A file that cannot be opened is tried again this often at most."""
LAST_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of the log's end, read at the start for streams that a killed daemon has begun: the lines of a
day or more, and a twentieth of a second. At it: what began before has no end on record."""
LEFT_OUT_S: Final = 10.0
"""Lines that were left out are told of within so long of the flood's end."""


class AuditLog:
    """Writes one line for each record, or counts it.

    What cannot be written is counted and lost: a full disk must not stop what is audited. It is
    said in the daemon's log, once when it begins and once when it is over.

    Args:
        path: The file; "-" for standard error.
        host: This host's name.
        warn: Takes a line for the operator.
    """

    def __init__(self, loop: Loop, path: str, host: str, warn: Callable[[str], None]) -> None:
        self.path = path
        self.problem = ""
        """Why lines are being lost; "" while they are not."""
        self.counters = {"written": 0, "lost": 0, "left_out": 0}
        self._loop = loop
        self._host = host
        self._warn = warn
        self._sampler = Sampler()
        self._fd = -1
        self._torn = False  # the file ends in half a line
        self._lost = 0  # since the problem began
        self._open_not_before_s = 0.0
        self._timer: Timer | None = None
        self._open()
        self._end_begun()

    def _end_begun(self) -> None:
        """A daemon that was killed could not write how its streams ended."""
        if self._fd >= 0 and self.path != STDERR:
            for begun in unended(_last_lines(self.path), self._host):
                self._append(format_end(begun, time=_time()))

    def write(self, record: Record, lines_per_s: float) -> None:
        """Log a decision, if its VM has not had too many lines lately."""
        left_out = self._sampler.admit(record.facts, lines_per_s, self._loop.time())
        if left_out is None:
            self.counters["left_out"] += 1
            if self._timer is None:
                self._timer = self._loop.call_later(LEFT_OUT_S, self._tell_left_out)
            return
        self._append(
            format_record(record, time=_time(), host=self._host, left_out=left_out),
        )

    def forget(self, vm: str) -> None:
        """The VM is gone."""
        owing = self._sampler.forget(vm)
        if owing is not None:
            self._append(format_left_out(*owing, time=_time(), host=self._host))

    def reopen(self) -> None:
        """The file may have been moved away: go on in a new one."""
        self._close()
        self._open()

    def close(self) -> None:
        """Write nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        self._close()

    def _tell_left_out(self) -> None:
        self._timer = None
        for facts, left_out in self._sampler.overdue(self._loop.time()):
            self._append(format_left_out(facts, left_out, time=_time(), host=self._host))
        if self._sampler.is_owing:
            self._timer = self._loop.call_later(LEFT_OUT_S, self._tell_left_out)

    # ---------------------------------------------------------------- the file

    def _open(self) -> None:
        self._open_not_before_s = self._loop.time() + REOPEN_S
        if self.path == STDERR:
            self._fd = sys.stderr.fileno()
            return
        # Never through a link that somebody put there, and never waiting for a pipe's reader.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(self.path, flags, FILE_MODE)
        except OSError as error:
            self._fails(f"cannot be opened: {error.strerror}")
            return
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            self._fails("is no regular file")
            return
        self._fd = fd
        self._torn = status.st_size > 0 and not _ends_with_newline(self.path, status.st_size)

    def _close(self) -> None:
        if self._fd >= 0 and self.path != STDERR:
            os.close(self._fd)
        self._fd = -1

    def _append(self, line: bytes) -> None:
        if self._fd < 0 and self._loop.time() >= self._open_not_before_s:
            self._open()
        if self._fd < 0:
            self._lose()
            return
        data = b"\n" + line if self._torn else line
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            self._fails(f"cannot be written: {error.strerror}")
            self._lose()
            return
        self._torn = written != len(data) and (written > 0 or self._torn)
        if written == len(data):
            self._works()
        else:
            self._fails("cannot be written: only a part of a line found room")
            self._lose()

    def _fails(self, problem: str) -> None:
        if not self.problem:
            self._warn(f"audit log {self.path} {problem}: decisions go unrecorded")
        self.problem = problem

    def _lose(self) -> None:
        self.counters["lost"] += 1
        self._lost += 1

    def _works(self) -> None:
        self.counters["written"] += 1
        if self.problem:
            self._warn(f"audit log {self.path} works again: {self._lost} decisions unrecorded")
            self.problem = ""
            self._lost = 0


def _time() -> str:
    return datetime.now(tz=UTC).isoformat(timespec="milliseconds")


def _ends_with_newline(path: str, size: int) -> bool:
    """Taken for granted where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return os.pread(fd, 1, size - 1) == b"\n"
    finally:
        os.close(fd)


def _last_lines(path: str) -> Iterator[bytes]:
    """None where it cannot be read. The first may be half a line."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    with os.fdopen(fd, "rb") as file, suppress(OSError):
        file.seek(max(0, os.fstat(fd).st_size - LAST_BYTES_MAX))
        yield from file
