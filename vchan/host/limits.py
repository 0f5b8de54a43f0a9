"""What one VM may cost the host: every limit with its default and its reason, and how it is kept.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`.
2. Every limit of a VM is a field of `Limits`; the policy's `limit` lines set them by these names.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple

from vchan.messages import TOPICS_MAX
from vchan.session import MESSAGE_BYTES_MAX, MESSAGE_BYTES_MIN, REASSEMBLY_BYTES_MAX


class LimitInfo(NamedTuple):
    """What a limit may be set to, and why it is what it is."""

    minimum: int
    maximum: int
    reason: str

    @property
    def is_bytes(self) -> bool:
        """Its value may be written with K, M or G."""
        return self.reason.startswith("Bytes")


# The least rates are those of a guest that works: slower, its own daemon could not keep up its end.


def _limit(default: int, minimum: int, maximum: int, reason: str) -> Any:
    return field(default=default, metadata={"info": LimitInfo(minimum, maximum, reason)})


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one VM."""

    messages_per_s: int = _limit(
        2000,
        600,
        1_000_000,
        "Messages from the guest: an answer costs the daemon some 30 us, a request 100.",
    )
    frames_per_s: int = _limit(
        4000,
        1000,
        1_000_000,
        "Frames from the guest, acknowledgements among them: two for each message.",
    )
    bytes_per_s: int = _limit(
        8 * 1024 * 1024,
        64 * 1024,
        1024**3,
        "Bytes from the guest: the daemon handles some 80 MB/s, so one VM gets a tenth of it.",
    )
    busy_ms_per_s: int = _limit(
        100,
        20,
        1000,
        "Milliseconds of the daemon's time in a second: a tenth, whatever the guest spends it on.",
    )
    message_bytes: int = _limit(
        MESSAGE_BYTES_MAX,
        MESSAGE_BYTES_MIN,
        MESSAGE_BYTES_MAX,
        "Bytes of one message from the guest: what a session can carry.",
    )
    reassembly_bytes: int = _limit(
        REASSEMBLY_BYTES_MAX,
        MESSAGE_BYTES_MIN,
        REASSEMBLY_BYTES_MAX,
        "Bytes of messages that have begun to arrive: two of the largest, one behind the other.",
    )
    json_values: int = _limit(
        20_000,
        1000,
        10_000_000,
        "Values in one request or answer: 20,000 take the daemon some 15 ms, in one piece.",
    )
    topics: int = _limit(
        TOPICS_MAX,
        0,
        TOPICS_MAX,
        "Topics that agents serve at a time: each is two queues with the broker.",
    )
    requests_up: int = _limit(
        128,
        0,
        1024,
        "The guest's requests that are not over: enough to keep the broker busy with one VM.",
    )
    calls_up: int = _limit(
        32,
        0,
        1024,
        "The guest's calls among them that wait for an answer: they may wait for minutes.",
    )
    handshakes_per_min: int = _limit(
        30,
        2,
        6000,
        "New sessions: a guest that boots in a loop needs some 10 a minute.",
    )
    violations_per_min: int = _limit(
        10,
        1,
        6000,
        "Breaches of the protocol before the VM is put into quarantine: a guest's daemon that "
        "works commits none.",
    )
    quarantine_s: int = _limit(
        30,
        1,
        86_400,
        "Seconds of the first quarantine: each next one takes twice as long.",
    )
    quarantine_max_s: int = _limit(
        600,
        1,
        86_400,
        "Seconds of the longest quarantine: a guest that is repaired is back within ten minutes.",
    )
    audit_lines_per_s: int = _limit(
        20,
        1,
        10_000,
        "Lines of the audit log: 20 are some 500 MB a day at worst. What is left out is counted.",
    )


LIMITS: Final[dict[str, LimitInfo]] = {item.name: item.metadata["info"] for item in fields(Limits)}
"""Every limit by name."""


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


VIOLATION_WINDOW_S: Final = 60.0
"""Violations are counted over so long."""
GOOD_CONDUCT_S: Final = 3600.0
"""A VM without a violation for so long after its quarantine begins again at the shortest one."""


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
        self._recent: deque[float] = deque()  # when the violations within the window were
        self._until_s: float | None = None

    def quarantined_until(self, now_s: float) -> float | None:
        """When the quarantine ends; None if there is none."""
        if self._until_s is None or now_s >= self._until_s:
            return None
        return self._until_s

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
            self._recent.popleft()
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
        self._until_s = now_s + min(self.limits.quarantine_s * 2**doublings, longest_s)
        self.trips += 1

    def release(self) -> None:
        """The operator says that it is over, and forgiven."""
        self.reason = ""
        self.trips = 0
        self._recent.clear()
        self._until_s = None
