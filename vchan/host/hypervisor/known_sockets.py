"""Where the channels of running VMs are, for when libvirt does not say: a file, from one run of the
daemon to the next.

A path is good for one start of a QEMU, which libvirt numbers: the domain's id. The file lies beside
the daemon's socket, in a directory that the next boot of the host finds empty.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Final

from vchan.host.faults import attempt

LOG = logging.getLogger(__name__)

FILE_BYTES_MAX: Final = 16 * 1024 * 1024
"""What is read of it: some 100,000 VMs."""


class KnownSockets:
    """Paths by the UUID of a domain and the id of its start. What cannot be read or written is not
    known: that is all.

    Args:
        path: Of the file; "": none is kept.
    """

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._known = self._read()
        self._problem = ""

    def note(self, uuid: str, start: int, socket: str | None) -> None:
        """Of a domain as libvirt describes it now; None: it has no live channel."""
        before = self._known.get(uuid)
        if socket is not None:
            self._known[uuid] = (start, socket)
        else:
            self._known.pop(uuid, None)
        if self._known.get(uuid) != before:
            self._write()

    def keep_only(self, uuids: frozenset[str]) -> None:
        """The others are no more."""
        gone = [uuid for uuid in self._known if uuid not in uuids]
        for uuid in gone:
            del self._known[uuid]
        if gone:
            self._write()

    def find(self, uuid: str, start: int) -> str | None:
        """Where the channel of this start of a domain is."""
        known_start, socket = self._known.get(uuid, (-1, ""))
        return socket if socket and known_start == start >= 0 else None

    def _read(self) -> dict[str, tuple[int, str]]:
        if not self._path:
            return {}
        none: dict[str, tuple[int, str]] = {}
        rows, error = attempt(self._load, none)
        if error is not None:
            LOG.warning("%s: not read: %s", self._path, type(error).__name__)
        return rows

    def _load(self) -> dict[str, tuple[int, str]]:
        if not Path(self._path).exists():
            return {}
        with Path(self._path).open(encoding="utf-8") as file:
            rows = json.loads(file.read(FILE_BYTES_MAX))
        return {str(uuid): (int(start), str(path)) for uuid, (start, path) in rows.items()}

    def _write(self) -> None:
        if not self._path:
            return
        problem = ""
        try:
            new = Path(f"{self._path}.new")
            new.write_text(json.dumps(self._known), encoding="utf-8")
            new.replace(self._path)
        except OSError as error:
            problem = f"{self._path}: not written: {error.strerror}"
        if problem and problem != self._problem:
            LOG.warning("%s", problem)
        self._problem = problem
