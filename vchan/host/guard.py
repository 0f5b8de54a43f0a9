"""What one VM's stream may cost: how fast it is read, and when it is put into quarantine.

Pure: no I/O, no clock. What a guest asks for is `gate.py`'s; this is about how much, before anybody
looks at what it says.
"""

from __future__ import annotations

from typing import Final

from vchan.host.limits import Breaker, Limits, TokenBucket

BURST_S: Final = 1.0
"""A guest that was quiet may send so many seconds' worth at once ..."""
BUSY_BURST_S: Final = 0.25
"""... as long as that keeps the daemon busy no longer than for so many seconds' worth."""
PAUSE_S_MIN: Final = 0.005
"""A guest that has to wait does so for this long at least: to look at it after each of its messages
would cost more than they do."""
PAUSE_S_MAX: Final = 2.0
"""A guest is read from this often at least: one that is slowed down must not look silent."""


class Guard:
    """One VM's buckets and breaker."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.breaker = Breaker(limits)
        self.counters = {
            "throttled": 0,  # how often reading had to wait
            "quarantines": 0,
        }
        self._make_buckets()

    def update(self, limits: Limits) -> None:
        """Other limits hold from now on. What the guest has done stays known."""
        if limits != self.limits:
            self.limits = self.breaker.limits = limits
            self._make_buckets()

    def _make_buckets(self) -> None:
        limits = self.limits
        self._bytes, self._frames, self._messages = (
            TokenBucket(rate, rate * BURST_S)
            for rate in (limits.bytes_per_s, limits.frames_per_s, limits.messages_per_s)
        )
        busy = limits.busy_ms_per_s / 1000
        self._busy = TokenBucket(busy, busy * BUSY_BURST_S)
        self._make_handshakes()

    def _make_handshakes(self) -> None:
        per_min = self.limits.handshakes_per_min
        self._handshakes = TokenBucket(per_min / 60, per_min)

    def received(self, size: int, frames: int, messages: int, took_s: float, now_s: float) -> float:
        """The guest has sent so much: how many seconds not to read from it.

        Args:
            took_s: What the daemon spent on it.
        """
        wait_s = max(
            self._busy.take(took_s, now_s),
            self._bytes.take(size, now_s),
            self._frames.take(frames, now_s),
            self._messages.take(messages, now_s),
        )
        if wait_s <= 0:
            return 0.0
        self.counters["throttled"] += 1
        return min(max(wait_s, PAUSE_S_MIN), PAUSE_S_MAX)

    def handshake(self, now_s: float) -> bool:
        """The guest began a session. True if it is to be put into quarantine now."""
        if self._handshakes.try_take(1, now_s):
            return False
        reason = f"over {self.limits.handshakes_per_min} handshakes a minute"
        return self._count(self.breaker.trip(reason, now_s))

    def violation(self, reason: str, now_s: float) -> bool:
        """The guest broke the protocol. True if it is to be put into quarantine now."""
        return self._count(self.breaker.violation(reason, now_s))

    def release(self) -> None:
        """The operator says that it is over, and forgiven: with what led to it."""
        self.breaker.release()
        self._make_handshakes()

    def _count(self, tripped: bool) -> bool:
        self.counters["quarantines"] += tripped
        return tripped
