"""One VM's guard: the policy, the limits and the breaker, with this VM's facts.

Whatever a guest asks goes through here, and what was decided is audited. Pure: time comes in as
`now_s`, records go out through a function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vchan.host.audit_record import REFUSED, Record, decision
from vchan.host.limits import Breaker, Limits, TokenBucket
from vchan.host.policy import Ask, Effect, Facts, Kind, Policy, Verdict
from vchan.messages import Topic

BURST_S: Final = 1.0
"""A guest that was quiet may send so many seconds' worth at once."""
PAUSE_S_MAX: Final = 1.0
"""A guest is read from this often at least: one that is slowed down must not look dead."""

Audit = Callable[[Record, float], None]
"""Takes a record and how many lines a second its VM may have."""


class Guard:
    """Decides for one VM.

    Args:
        audit: Told of every decision but the replies that are allowed: those answer requests of the
            control plane, and are as many.
    """

    def __init__(self, facts: Facts, policy: Policy, audit: Audit) -> None:
        self._facts = facts
        self._policy = policy
        self._audit = audit
        self.limits = policy.limits(facts)
        self.breaker = Breaker(self.limits)
        self._make_buckets()
        self.counters = {"denied": 0, "refused": 0, "throttled": 0, "quarantines": 0}

    @property
    def facts(self) -> Facts:
        """Which VM."""
        return self._facts

    def update(self, facts: Facts, policy: Policy) -> bool:
        """Take over new facts or rules; says whether anything is new.

        A running session keeps the sizes it was begun with.
        """
        if facts == self._facts and policy is self._policy:
            return False
        self._facts = facts
        self._policy = policy
        limits = policy.limits(facts)
        if limits != self.limits:
            self.limits = self.breaker.limits = limits
            self._make_buckets()
        return True

    # ---------------------------------------------------------------- the policy

    def decide(self, ask: Ask, request_id: bytes = b"") -> Verdict:
        """The policy's verdict on what the guest asks, audited."""
        verdict = self._policy.decide(self._facts, ask)
        if verdict.effect is Effect.DENY:
            self.counters["denied"] += 1
        if verdict.effect is not Effect.ALLOW or ask.kind is not Kind.REPLY:
            record = decision(self._facts, ask, verdict, request_id)
            self._audit(record, self.limits.audit_lines_per_s)
        return verdict

    def may_listen(self, topic: Topic) -> bool:
        """Whether this VM's agents may serve a topic."""
        ask = Ask(Kind.LISTEN, topic.exchange, topic.name, self._facts.uuid)
        return self.decide(ask).effect is Effect.ALLOW

    def refused(self, limit: str, reason: str, ask: Ask | None = None, id_: bytes = b"") -> None:
        """Not the policy but a limit refused something: have it audited.

        Args:
            limit: Its name.
        """
        self.counters["refused"] += 1
        record = Record(self._facts, ask, REFUSED, limit, id_, reason)
        self._audit(record, self.limits.audit_lines_per_s)

    # ---------------------------------------------------------------- limits

    def _make_buckets(self) -> None:
        limits: Limits = self.limits
        self._buckets = tuple(
            TokenBucket(rate, rate * BURST_S)
            for rate in (limits.bytes_per_s, limits.frames_per_s, limits.messages_per_s)
        )
        per_min = limits.handshakes_per_min
        self._handshakes = TokenBucket(per_min / 60, per_min)

    def received(self, size: int, frames: int, messages: int, now_s: float) -> float:
        """The guest has sent so much: how many seconds not to read from it."""
        amounts = (size, frames, messages)
        waits = [bucket.take(n, now_s) for bucket, n in zip(self._buckets, amounts, strict=True)]
        wait_s = max(waits)
        if wait_s > 0:
            self.counters["throttled"] += 1
        return min(wait_s, PAUSE_S_MAX)

    def handshake(self, now_s: float) -> bool:
        """The guest began a session. True if it is to be put into quarantine for it."""
        if self._handshakes.try_take(1, now_s):
            return False
        allowed = self.limits.handshakes_per_min
        reason = f"over {allowed} handshakes a minute"
        return self._trips(self.breaker.trip(reason, now_s), "handshakes_per_min")

    def violation(self, reason: str, now_s: float) -> bool:
        """The guest broke the protocol. True if it is to be put into quarantine now."""
        return self._trips(self.breaker.violation(reason, now_s), "violations_per_min")

    def _trips(self, is_new: bool, limit: str) -> bool:
        if is_new:
            self.counters["quarantines"] += 1
            self.refused(limit, f"quarantine: {self.breaker.reason}")
        return is_new
