"""How a rate is kept to. Pure: time comes in as `now_s`."""

from __future__ import annotations


class TokenBucket:
    """So many a second, with a burst of `burst`. What is over makes a debt that time pays off.

    Args:
        rate: Tokens a second, over 0.
        burst: Tokens that gather while nothing is taken; it begins with them.
    """

    __slots__ = ("_at_s", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        assert rate > 0 and burst > 0
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at_s = float("-inf")

    def take(self, amount: float, now_s: float) -> float:
        """Take them in any case; returns how many seconds to wait before more."""
        self._refill(now_s)
        self._level -= amount
        return max(0.0, -self._level / self.rate)

    def try_take(self, amount: float, now_s: float) -> bool:
        """Take them if they are there."""
        self._refill(now_s)
        if self._level < amount:
            return False
        self._level -= amount
        return True

    def _refill(self, now_s: float) -> None:
        if now_s > self._at_s:
            self._level = min(self.burst, self._level + (now_s - self._at_s) * self.rate)
            self._at_s = now_s
