"""What one VM's channel may have logged: a guest may repeat a fault at will, and vary it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

LOG_LINES: Final = 20
LOG_PERIOD_S: Final = 10.0
"""What one VM may have logged, with no word of it lost while it behaves."""


class LogLines:
    """One VM's.

    Args:
        who: Begins each line.
        log: Takes it.
        clock: The loop's.
    """

    def __init__(self, who: str, log: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._who = who
        self._log = log
        self._clock = clock
        self._last = ""
        self._left = LOG_LINES
        self._period_s = 0.0  # when the next one begins

    def tell(self, text: str) -> None:
        """Log a line; not the same twice, and not more than LOG_LINES a LOG_PERIOD_S."""
        if text == self._last:
            return
        self._last = text
        now_s = self._clock()
        if now_s >= self._period_s:
            if self._left < 0:
                self._log(f"{self._who}: {-self._left} lines left out")
            self._period_s = now_s + LOG_PERIOD_S
            self._left = LOG_LINES
        self._left -= 1
        if self._left >= 0:
            self._log(f"{self._who}: {text}")
