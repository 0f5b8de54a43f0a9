"""What guests say on their consoles that they ran, collected while QEMU writes it.

QEMU empties a console's file at each start of the guest, nova renames its directory for a resize
and deletes it after a migration: each file is held open, known by its number and not by its name,
and read twenty times a second. From a guest's end to the next start nova takes longer than that.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from tests.cloud.verdict import Ran, parse

POLL_S: Final = 0.05


@dataclass(slots=True)
class _File:
    fd: int
    place: int = 0
    rest: bytes = b""


@dataclass(slots=True)
class Journal:
    """Reads on a thread of its own.

    Args:
        paths: Where a console may be just now.
    """

    paths: Callable[[], list[Path]]
    _ran: list[Ran] = field(default_factory=list)
    _files: dict[int, _File] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="journal")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()
        for file in self._files.values():
            os.close(file.fd)

    def ran(self) -> list[Ran]:
        """All that was said up to now, in order."""
        self.read()
        with self._lock:
            return list(self._ran)

    def _run(self) -> None:
        while not self._ended.wait(POLL_S):
            self.read()

    def read(self) -> None:
        """Take what is new."""
        with self._lock:
            for path in self.paths():
                with contextlib.suppress(OSError):
                    self._notice(path)
            # In the order in which it was said. A guest that moves goes on in a newer file: newer
            # files' sizes are looked at first, and what they hold is read last.
            sizes = {
                each: os.fstat(file.fd).st_size for each, file in reversed(self._files.items())
            }
            for number, file in self._files.items():
                self._take(file, sizes[number])

    def _notice(self, path: Path) -> None:
        number = path.stat().st_ino
        if number not in self._files:
            self._files[number] = _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def _take(self, file: _File, size: int) -> None:
        if size < file.place:  # emptied
            file.place, file.rest = 0, b""
        while data := os.pread(file.fd, min(1 << 16, size - file.place), file.place):
            file.place += len(data)
            whole, newline, rest = (file.rest + data).rpartition(b"\n")
            self._ran += parse(whole + newline)
            file.rest = rest
