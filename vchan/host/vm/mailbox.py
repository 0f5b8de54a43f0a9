"""What came in one VM's own queue and is not handled yet. It is read in slices, so that not even a
large answer takes the daemon long at a time.

Pure: no I/O, no clock. Whoever owns it counts the time that `work` takes.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable
from typing import NamedTuple

from vchan.host.oslo_wire.envelope import EnvelopeError
from vchan.host.oslo_wire.mail import SLICE_BYTES, Answer, Arrival, Note, reading

Letter = Answer | Arrival | Note


class Read(NamedTuple):
    """A message that has been read, or what is wrong with it."""

    token: Hashable
    size: int
    message: Letter | None
    problem: str


class Mailbox:
    """Messages in the order they came."""

    def __init__(self) -> None:
        self.bytes = 0
        self.worked = 0
        """Bytes read, ever: each slice counts when it is read, so that it is paid for then."""
        self._paid = 0  # of the first message
        self._waiting: list[tuple[Hashable, bytes]] = []  # a list: an empty deque takes 0.6 KiB
        self._reading: Generator[None, None, Letter] | None = None  # of the first of them

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, token: Hashable, body: bytes) -> None:
        """One more."""
        self._waiting.append((token, body))
        self.bytes += len(body)

    @property
    def first(self) -> tuple[Hashable, bytes]:
        """The token and the body of what is worked on; there is something."""
        return self._waiting[0]

    def drop(self, token: Hashable) -> None:
        """The first one is handled elsewhere. Harmless if it is another."""
        if self._waiting and self._waiting[0][0] == token:
            _, body = self._waiting.pop(0)
            self.bytes -= len(body)
            self._reading = None
            self._paid = 0

    def clear(self) -> None:
        """The broker has them back."""
        self._waiting.clear()
        self._reading = None
        self.bytes = self._paid = 0

    def work(self) -> Read | None:
        """Read a slice of the first message; it is returned when that was the last one."""
        token, body = self._waiting[0]
        if self._reading is None:
            self._reading = reading(body)
        message, problem = None, ""
        try:
            next(self._reading)
        except StopIteration as end:
            message = end.value
        except EnvelopeError as error:
            problem = error.reason
        else:
            self._paid += SLICE_BYTES
            self.worked += SLICE_BYTES
            return None
        self.worked += max(0, len(body) - self._paid)
        self._paid = 0
        self._reading = None
        self._waiting.pop(0)
        self.bytes -= len(body)
        assert self.bytes >= 0 and (self._waiting or not self.bytes)
        return Read(token, len(body), message, problem)
