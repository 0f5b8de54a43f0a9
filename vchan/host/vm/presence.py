"""Whether one VM's guest is there: when it was heard, whether it is silent, and since when it is
away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vchan.io.loop import Scheduler, Timer

ABSENT_S: Final = 60.0
"""A guest that has been away so long leaves its requests to the broker."""


class Presence:
    """One guest's.

    Args:
        absent: Called when it has been away for ABSENT_S.
    """

    def __init__(self, loop: Scheduler, absent: Callable[[], None]) -> None:
        self._loop = loop
        self._absent = absent
        self._timer: Timer | None = None
        self._spoke_s: float | None = None  # when we began to, and no message has come since
        self.heard_at_s: float | None = None
        """When it was heard last; None: not since the VM came here."""
        self.is_silent = False
        """It was asked, and has not answered."""
        self.first_answer_s: float | None = None
        """From Speak to the first message of the guest's: how long a migration was felt."""

    def spoken_to(self) -> None:
        """We begin to speak: its next message is the first answer."""
        self._spoke_s = self._loop.time()

    def answered(self, now_s: float) -> None:
        """A message of the guest's has come."""
        if self._spoke_s is not None:
            self.first_answer_s, self._spoke_s = now_s - self._spoke_s, None

    def read(self, now_s: float) -> None:
        """Bytes of the guest's have come. They say that it is there only if it has a session."""
        if self.heard_at_s is not None:
            self.heard_at_s = now_s

    def opened(self, now_s: float) -> None:
        """It has a session."""
        self.heard_at_s = now_s
        self.heard()

    def heard(self) -> None:
        """It has answered, after it was silent."""
        self.is_silent = False
        self.cancel()

    def silent(self) -> None:
        """It was asked, and does not answer."""
        self.is_silent = True
        self.miss()

    def miss(self) -> None:
        """It is away from now on, if it is not heard."""
        if self._timer is None:
            self._timer = self._loop.call_later(ABSENT_S, self._is_absent)

    def cancel(self) -> None:
        """Do not say that it is away for long."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_absent(self) -> None:
        self._timer = None
        self._absent()
