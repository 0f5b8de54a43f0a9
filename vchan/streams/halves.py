"""The two halves of a byte stream's end: what goes out, and what comes in.

Rules of this file
1. No I/O, no clock. Each half knows its own bytes and offsets, and nothing of the other.
2. Offsets count bytes from the stream's start; the END counts as one byte behind the last.
3. What a peer says can only move a half forward, be a repetition, or be a violation.
"""

from __future__ import annotations

import enum
from typing import Final

WINDOW_BYTES: Final = 64 * 1024
"""What one end takes of a stream before its program has read it. At it: the sender waits; one that
does not has its stream reset (VIOLATED)."""
SEND_BYTES_MAX: Final = 64 * 1024
"""What one end keeps of a stream until the other end has it: all that a loss can cost. At it:
`write` takes no more."""


class OutHalf:
    """What this end's program wrote and the other end does not have yet."""

    __slots__ = ("_kept", "acknowledged", "credit", "end", "sent", "sent_max")

    def __init__(self) -> None:
        self._kept = bytearray()  # from `acknowledged` on
        self.acknowledged = 0
        self.sent = 0  # what goes out next; goes back at a loss
        self.sent_max = 0
        self.credit = 0
        self.end: int | None = None  # the offset of END, when there is one

    @property
    def written(self) -> int:
        """Bytes written so far."""
        return self.end if self.end is not None else self.acknowledged + len(self._kept)

    @property
    def room(self) -> int:
        """Bytes that `write` would take."""
        return 0 if self.end is not None else SEND_BYTES_MAX - len(self._kept)

    @property
    def in_flight(self) -> int:
        """Bytes that are sent and not acknowledged."""
        return self.sent - self.acknowledged

    @property
    def is_done(self) -> bool:
        """The other end has everything, and knows that it is."""
        return self.end is not None and self.acknowledged > self.end

    @property
    def is_idle(self) -> bool:
        """The other end has all that there is so far."""
        return self.is_done or (self.end is None and not self._kept)

    def write(self, data: bytes) -> int:
        """Keep as much of `data` as there is room for; say how much."""
        taken = min(len(data), self.room)
        self._kept += data[:taken]
        return taken

    def finish(self) -> None:
        """Nothing more will be written."""
        if self.end is None:
            self.end = self.written

    def take(self, size_max: int) -> tuple[int, bytes, bool] | None:
        """What goes out next, at most `size_max` bytes: offset, bytes, whether END goes with them.
        None: there is nothing, or no credit for it."""
        at = self.sent
        stop = min(self.written, self.credit, at + size_max)
        is_end = at <= stop == self.end
        if stop <= at and not is_end:
            return None
        first = at - self.acknowledged
        data = bytes(self._kept[first : first + stop - at])
        self.sent = stop + is_end
        self.sent_max = max(self.sent_max, self.sent)
        return at, data, is_end

    def acknowledge(self, received: int, credit: int) -> bool:
        """The other end has what is below `received`, and takes what is below `credit`. Old news
        changes nothing. False: it cannot have so much."""
        if received > self.sent_max:
            return False
        self.credit = max(self.credit, credit)
        if received > self.acknowledged:
            del self._kept[: received - self.acknowledged]
            self.acknowledged = received
            self.sent = max(self.sent, received)
        return True

    def rewind(self) -> None:
        """Something was lost: everything that is not acknowledged goes out again."""
        self.sent = self.acknowledged


class Fit(enum.Enum):
    """What bytes were to an incoming half."""

    TAKEN = "what it waited for"
    REPEATED = "it had them"
    AHEAD = "something before them is missing"
    VIOLATION = "beyond the credit, or beyond the end"


class InHalf:
    """What has arrived in order and this end's program has not read."""

    __slots__ = ("_held", "_read", "end", "is_done")

    def __init__(self) -> None:
        self._held = bytearray()
        self._read = 0
        self.end: int | None = None
        self.is_done = False  # the program has read everything, and that it is

    @property
    def held(self) -> int:
        """Bytes to be read."""
        return len(self._held)

    @property
    def received(self) -> int:
        """All below has arrived; END is one."""
        return self._read + len(self._held) + (self.end is not None)

    @property
    def credit(self) -> int:
        """Bytes below may be sent."""
        return self._read + WINDOW_BYTES

    def receive(self, offset: int, data: bytes, is_end: bool) -> Fit:
        """Take what is new in these bytes."""
        stop = offset + len(data)
        if stop > self.credit or (self.end is not None and stop > self.end):
            return Fit.VIOLATION
        have = self._read + len(self._held)
        if is_end and (stop < have or self.end not in (None, stop)):
            return Fit.VIOLATION
        if offset > have:
            return Fit.AHEAD
        if stop <= have and not (is_end and self.end is None):
            return Fit.REPEATED
        self._held += data[have - offset :]
        if is_end:
            self.end = stop
        return Fit.TAKEN

    def read(self, size_max: int) -> bytes:
        """The next bytes, at most `size_max`."""
        data = bytes(self._held[:size_max])
        del self._held[:size_max]
        self._read += len(data)
        self.is_done = self.end is not None and not self._held
        return data
