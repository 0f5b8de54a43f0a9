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
        level = self._level = self._level - amount
        return -level / self.rate if level < 0 else 0.0

    def try_take(self, amount: float, now_s: float) -> bool:
        """Take them if they are there."""
        self._refill(now_s)
        if self._level < amount:
            return False
        self._level -= amount
        return True

    def reaches(self, level: float, now_s: float) -> float:
        """In how many seconds it has so many, if nothing is taken: 0 if it has."""
        self._refill(now_s)
        return max(0.0, (level - self._level) / self.rate)

    def _refill(self, now_s: float) -> None:
        if now_s > self._at_s:
            level = self._level + (now_s - self._at_s) * self.rate
            self._level = level if level < self.burst else self.burst
            self._at_s = now_s
