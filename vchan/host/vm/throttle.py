"""What one VM's stream may cost: how fast it is read, and when it is put into quarantine.

Pure: no I/O, no clock. What a guest asks for is `gate.py`'s; this is about how much, before anybody
looks at what it says.
"""

from __future__ import annotations

import math
from typing import Final

from vchan.host.policy.token_bucket import TokenBucket
from vchan.host.policy.vm_limits import Limits

BURST_S: Final = 1.0
"""A guest that was quiet may send so many seconds' worth at once ..."""
BUSY_BURST_S: Final = 0.25
"""... as long as that keeps the daemon busy no longer than for so many seconds' worth."""
PAUSE_S_MIN: Final = 0.005
"""A guest that has to wait does so for this long at least, and so do its streams: to look at it
after each of its messages would cost more than they do."""
PAUSE_S_MAX: Final = 2.0
"""A guest is read from this often at least: one that is slowed down must not look silent."""

RESERVE: Final = 0.5
"""Of each burst, what byte streams leave to requests: a guest that is over a rate is not read from,
and the answers in its channel would wait with the bytes. At it: streams wait."""
RESERVED_S_MAX: Final = 0.1
"""Byte streams wait for that so long in a row at most: requests alone may need all of a rate. At
it: they have a turn."""

THROTTLED_BUSY: Final = 0.3
"""Of the daemon's time, for all VMs together that are over a rate of their own: ten of them, with a
tenth each, would leave nothing for the others. At it: they are read from more slowly."""

CROWDED_S: Final = 1.0
"""A VM that was over a rate pays from the common bucket, too, until it was not for so long."""

VIOLATION_WINDOW_S: Final = 60.0
"""Violations are counted over so long."""
GOOD_CONDUCT_S: Final = 3600.0
"""A VM without a violation for so long after its quarantine begins again at the shortest one."""


def make_crowd() -> TokenBucket:
    """The bucket that a host's throttled VMs share."""
    return TokenBucket(THROTTLED_BUSY, THROTTLED_BUSY * BUSY_BURST_S)


class Breaker:
    """Puts a VM that keeps breaking the protocol into quarantine, ever longer.

    Over `violations_per_min` in a minute it trips, for `quarantine_s`; each time after that for
    twice as long, up to `quarantine_max_s`, until the VM has behaved for GOOD_CONDUCT_S. It ends by
    itself, or by the operator's `release`.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.reason = ""
        """Why it tripped last; "" when it has not, or was released by the operator."""
        self.trips = 0
        """How often, since the VM last behaved."""
        # A list: an empty deque takes 0.6 KiB.
        self._recent: list[float] = []  # when the violations within the window were
        self._until_s: float | None = None

    def quarantined_until(self, now_s: float) -> float | None:
        """When the quarantine ends; None if there is none."""
        if self._until_s is None or now_s >= self._until_s:
            return None
        return self._until_s

    def problem(self, now_s: float) -> str:
        """The quarantine and why it is so, for the operator; "": there is none."""
        until_s = self.quarantined_until(now_s)
        if until_s is None:
            return ""
        return f"in quarantine for {until_s - now_s:.0f} s more: {self.reason}"

    def violation(self, reason: str, now_s: float) -> bool:
        """Count one. True if the VM is to be put into quarantine now.

        Args:
            reason: What it did, for the operator.
        """
        if self.quarantined_until(now_s) is not None:
            return False  # what was still on its way
        if self._until_s is not None and now_s >= self._until_s + GOOD_CONDUCT_S:
            self._until_s = None
            self.trips = 0
        while self._recent and now_s - self._recent[0] > VIOLATION_WINDOW_S:
            self._recent.pop(0)
        self._recent.append(now_s)
        if len(self._recent) <= self.limits.violations_per_min:
            return False
        self._trip(f"{len(self._recent)} violations in a minute, the last: {reason}", now_s)
        return True

    def trip(self, reason: str, now_s: float) -> bool:
        """Put it into quarantine for this alone. True if it was not there yet."""
        if self.quarantined_until(now_s) is not None:
            return False
        if self._until_s is not None and now_s >= self._until_s + GOOD_CONDUCT_S:
            self.trips = 0
        self._trip(reason, now_s)
        return True

    def _trip(self, reason: str, now_s: float) -> None:
        self._recent.clear()
        self.reason = reason
        longest_s = max(self.limits.quarantine_s, self.limits.quarantine_max_s)
        doublings = min(self.trips, 32)  # beyond, it is the longest anyway
        assert self.quarantined_until(now_s) is None, "it is put there once, and then released"
        self._until_s = now_s + min(self.limits.quarantine_s * 2**doublings, longest_s)
        self.trips += 1

    def release(self) -> None:
        """The operator says that it is over, and forgiven."""
        self.reason = ""
        self.trips = 0
        self._recent.clear()
        self._until_s = None


class Throttle:
    """One VM's buckets and breaker.

    Args:
        crowd: Shared by the host's VMs; by default one of its own.
    """

    def __init__(self, limits: Limits, crowd: TokenBucket | None = None) -> None:
        self.limits = limits
        self._crowd = crowd or make_crowd()
        self._crowded_until_s = float("-inf")  # when it has kept to its rates for a while
        self.breaker = Breaker(limits)
        self.counters = {
            "throttled": 0,  # how often reading had to wait
            "quarantines": 0,
            "faults": 0,  # of our own code, when it worked for this VM
        }
        self._reserved_s: float | None = None  # since when byte streams wait
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
        self._rates = (self._busy, self._bytes, self._frames, self._messages)
        self._make_handshakes()

    def _make_handshakes(self) -> None:
        per_min = self.limits.handshakes_per_min
        self._handshakes = TokenBucket(per_min / 60, per_min)

    def received(self, size: int, frames: int, messages: int, took_s: float, now_s: float) -> float:
        """The guest has sent so much: how many seconds not to read from it. What it asked for is
        paid from the same buckets.

        Args:
            took_s: What the daemon spent on it.
        """
        wait_s = max(
            self._busy.take(took_s, now_s),
            self._bytes.take(size, now_s),
            self._frames.take(frames, now_s),
            self._messages.take(messages, now_s),
        )
        if wait_s > 0:
            self._crowded_until_s = now_s + CROWDED_S
        if now_s < self._crowded_until_s:
            wait_s = max(wait_s, self._crowd.take(took_s, now_s))
            self._crowded_until_s += wait_s  # pauses do not count
        assert wait_s < math.inf, "a guest is read from again"
        if wait_s <= 0:
            return 0.0
        self.counters["throttled"] += 1
        return min(max(wait_s, PAUSE_S_MIN), PAUSE_S_MAX)

    def answered(self, size: int, took_s: float, now_s: float) -> float:
        """So much of what the guest asked for was handled: how many seconds to leave the rest.

        Args:
            size: Bytes of it.
            took_s: What the daemon spent on it.
        """
        return self.received(size, 0, 0, took_s, now_s)

    def reserved(self, now_s: float) -> float:
        """For how many seconds byte streams are to wait; 0: they have a turn now."""
        wait_s = max(bucket.reaches(RESERVE * bucket.burst, now_s) for bucket in self._rates)
        since_s = now_s if self._reserved_s is None else self._reserved_s
        left_s = since_s + RESERVED_S_MAX - now_s
        is_turn = wait_s <= 0 or left_s <= 0
        self._reserved_s = None if is_turn else since_s
        return 0.0 if is_turn else max(min(wait_s, left_s), PAUSE_S_MIN)

    def handshake(self, now_s: float) -> bool:
        """The guest began a session. True if it is to be put into quarantine now."""
        if self._handshakes.try_take(1, now_s):
            return False
        reason = f"over {self.limits.handshakes_per_min} handshakes a minute"
        return self._count(self.breaker.trip(reason, now_s))

    def violation(self, reason: str, now_s: float) -> bool:
        """The guest broke the protocol. True if it is to be put into quarantine now."""
        return self._count(self.breaker.violation(reason, now_s))

    def fault(self, reason: str, now_s: float) -> bool:
        """Our own code failed on this VM. True if it is to be put into quarantine now."""
        self.counters["faults"] += 1
        return self._count(self.breaker.trip(reason, now_s))

    def release(self) -> None:
        """The operator says that it is over, and forgiven: with what led to it."""
        self.breaker.release()
        self._make_handshakes()

    def _count(self, tripped: bool) -> bool:
        self.counters["quarantines"] += tripped
        return tripped
