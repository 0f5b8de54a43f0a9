"""What a VM's arrival or departure took, step by step, for the debug log.

Who takes the steps names them. One line tells all of them when the last is taken, or when it is
late: lines that were written meanwhile would be in its way. It says when the first was taken, on
the monotonic clock.

    arrival at 8123.456789 s, in ms: told to speak 0.0, greeting said 0.3, ..., answered 80.1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vchan.io.loop import Scheduler, Timer
from vchan.io.streams import Stream

LATE_S: Final = 10.0
"""What has not come to its last step by then is told as far as it has come."""


class Steps:
    """One time after the other.

    Args:
        what: Is told.
        last: The step that ends it.
        log: Takes the line.
    """

    def __init__(self, loop: Scheduler, what: str, last: str, log: Callable[[str], object]) -> None:
        self._loop = loop
        self._what = what
        self._last = last
        self._log = log
        self._began_s = 0.0
        self._taken: dict[str, float] = {}  # in order; none: nothing is under way
        self._timer: Timer | None = None

    @property
    def is_under_way(self) -> bool:
        """The first step was taken, and the last was not."""
        return bool(self._taken)

    def begin(self, step: str) -> None:
        """The first step, unless one was taken."""
        if not self._taken:
            self._began_s = self._loop.time()
            self._taken[step] = 0.0
            self._timer = self._loop.call_later(LATE_S, self._is_late)

    def reach(self, step: str, after: str = "") -> None:
        """Another one, if it is the first of its kind.

        Args:
            after: It counts only behind this one: before that it was of something older.
        """
        taken = self._taken
        if not taken or step in taken or (after and after not in taken):
            return
        self._taken[step] = self._loop.time() - self._began_s
        if step == self._last:
            self._tell("")

    def end(self) -> None:
        """It does not come to the last step."""
        if self._taken:
            self._tell("broken off, ")

    def _is_late(self) -> None:
        self._tell(f"not over after {LATE_S:g} s, ")

    def _tell(self, how: str) -> None:
        assert self._timer is not None
        self._timer.cancel()
        taken, self._taken = self._taken, {}
        steps = ", ".join(f"{step} {took_s * 1e3:.1f}" for step, took_s in taken.items())
        self._log(f"{self._what} at {self._began_s:.6f} s, {how}in ms: {steps}")


class WatchedStream:
    """A stream of which each read and write is told.

    Args:
        heard: Told what was read.
        said: Told that something was written.
    """

    def __init__(
        self, stream: Stream, heard: Callable[[bytes], None], said: Callable[[], None]
    ) -> None:
        self.path = stream.path
        self.ends_at_hangup = stream.ends_at_hangup
        self.fileno = stream.fileno
        self.close = stream.close
        self._stream = stream
        self._heard = heard
        self._said = said

    def read(self) -> bytes:
        """See `Stream`."""
        data = self._stream.read()
        self._heard(data)
        return data

    def write(self, data: bytes) -> int:
        """See `Stream`."""
        taken = self._stream.write(data)
        self._said()
        return taken
