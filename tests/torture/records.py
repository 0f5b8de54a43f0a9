"""Records: one fact a line, JSON. See `tests.torture`.

    ["ran", 12.5, "cast", "vm0-caster", 17, 2774018, false, ""]

Times are CLOCK_MONOTONIC's of the machine that wrote the record: of this one for the control side's
records; a guest's mean something to the guest alone.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

CALL: Final = "call"
CAST: Final = "cast"
FANOUT: Final = "fanout"
REPORT: Final = "report"
"""What a guest's daemon reports: its program has changed the guest's name, which says sender and
number. What changes again before it is told is not told."""
EVERYBODY: Final = "*"
ANSWERED: Final = "answered"
CONFIRMED: Final = "confirmed"
WRONG: Final = "wrong"


class Sent(NamedTuple):
    """Somebody is about to send. `target`: a VM's UUID, EVERYBODY, or the service's topic."""

    at_s: float
    kind: str
    target: str
    sender: str
    number: int


class Told(NamedTuple):
    """What the sender was told: ANSWERED, CONFIRMED (a cast), WRONG, or an exception's name."""

    at_s: float
    sender: str
    number: int
    outcome: str


class Ran(NamedTuple):
    """A method begins. `marked`: it was told that this may be a copy. `vm`: who asks, by the word
    of the host (for requests of guests)."""

    at_s: float
    kind: str
    sender: str
    number: int
    crc: int
    marked: bool
    vm: str


class Born(NamedTuple):
    """A program of the guest begins with an empty memory.

    Attributes:
        boot: Tells the guest's boots apart.
        daemon: The process id of the guest's vchan daemon; 0: none ran.
    """

    at_s: float
    program: str
    boot: str
    daemon: int


class Health(NamedTuple):
    """Of a guest's vchan daemon."""

    at_s: float
    rss_kib: int
    descriptors: int


Record = Sent | Told | Ran | Born | Health
_TYPES: Final[dict[str, type[Record]]] = {
    kind.__name__.lower(): kind for kind in (Sent, Told, Ran, Born, Health)
}


class BadRecord(ValueError):
    """A line that is no record."""


def encode(record: Record) -> bytes:
    """A record's line."""
    return json.dumps([type(record).__name__.lower(), *record]).encode() + b"\n"


def decode(line: bytes) -> Record:
    """The record of a line.

    Raises:
        BadRecord: It is none, or torn.
    """
    try:
        name, *fields = json.loads(line)
        return _TYPES[name](*fields)
    except (ValueError, KeyError, TypeError) as error:
        raise BadRecord(f"{line[:80]!r}: {error}") from error


class Writer:
    """Writes each record at once, whole."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, record: Record) -> None:
        """One write: several threads' lines do not mix."""
        line = encode(record)
        written = os.write(self._fd, line)
        assert written == len(line), "a record is far smaller than what is written whole"


class Book:
    """A file of records that others write to. Any thread may read it.

    Args:
        clock: Of this machine; given for a guest's file, whose times mean nothing here: its records
            have the time at which they were read.
    """

    def __init__(self, path: Path, clock: Callable[[], float] | None = None) -> None:
        self.path = path
        self._clock = clock
        self.records: list[Record] = []
        self.torn: list[str] = []
        self._offset = 0
        self._lock = threading.Lock()

    def read(self) -> list[Record]:
        """All of them, with what was written since: a copy."""
        with self._lock:
            self._read_on()
            return list(self.records)

    def _read_on(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = decode(line)
        except BadRecord as error:
            self.torn.append(str(error))
        else:
            if self._clock is not None:
                record = record._replace(at_s=self._clock())
            self.records.append(record)
