"""Which topics a guest says that its agents serve, and which of them they may: how many it may name
in its life, and how often it may change them.

Pure: no I/O, no clock. Time comes in as `now_s`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from vchan.host.policy.token_bucket import TokenBucket
from vchan.host.vm.gate import Gate
from vchan.rpc.messages import Topic

TOPICS_SEEN_MAX: Final = 256
"""Topics a VM's agents may ever serve: each leaves a queue with the broker. At it: further topics
are denied (`denied_topics`) and counted (`topics_over_limit`)."""
EXCHANGES_SEEN_MAX: Final = 16
"""Exchanges that the topics of a VM's agents may ever be of: each is made if need be, and stays. At
it: topics of further exchanges are denied, and counted (`topics_over_limit`)."""
TOPICS_JUDGED_PER_S: Final = 256
"""Topics judged at once, and then in a second: a guest may name others at will. At it: of what it
says it serves meanwhile, the last counts, as soon as it can be judged."""


class ServedTopics:
    """One VM's.

    Args:
        gate: What this VM may do.
        count_over_limit: Told how many topics were denied because there are too many.
    """

    def __init__(self, gate: Gate, count_over_limit: Callable[[int], None]) -> None:
        self._gate = gate
        self._count_over_limit = count_over_limit
        self.named: tuple[Topic, ...] | None = None
        """By the guest, last. None: it has not said."""
        self.asked: frozenset[Topic] = frozenset()
        """What was named when it was judged."""
        self.allowed: frozenset[Topic] = frozenset()
        """What of that the VM's agents may serve."""
        self.judge_at_s: float | None = None
        """When what was named last may be judged: call `judge` then."""
        self._verdicts: dict[Topic, bool] = {}  # of what is asked
        self._bucket = TokenBucket(TOPICS_JUDGED_PER_S, TOPICS_JUDGED_PER_S)
        self._judge_not_before_s = 0.0
        self._seen: set[Topic] = set()
        self._exchanges_seen: set[str] = set()

    @property
    def seen(self) -> int:
        """Topics that were ever allowed."""
        return len(self._seen)

    def begin(self) -> None:
        """A new session: nothing is named yet."""
        self.named = None
        self._verdicts.clear()

    def forget_verdicts(self) -> None:
        """Other topics may be allowed now."""
        self._verdicts.clear()
        self.judge_at_s = None

    def clear(self) -> None:
        """The VM is no longer here."""
        self.judge_at_s = None
        self.asked = self.allowed = frozenset()

    def name(self, topics: tuple[Topic, ...], now_s: float) -> bool:
        """The guest names these. Whether that was news, and is judged: else it may be at
        `judge_at_s`."""
        if topics == self.named:
            return False
        self.named = topics
        return self.judge(now_s)

    def judge(self, now_s: float) -> bool:
        """Judge what was named last, if it may be now."""
        if now_s < self._judge_not_before_s:
            self.judge_at_s = self._judge_not_before_s
            return False
        self.judge_at_s = None
        named = self.named or ()
        news = sum(topic not in self._verdicts for topic in named)
        self._judge_not_before_s = now_s + self._bucket.take(news, now_s)
        self.ask(named)
        return True

    def ask(self, topics: Sequence[Topic]) -> None:
        """Judge these, at once."""
        verdicts = self._verdicts
        self._verdicts = {
            topic: verdicts[topic] if topic in verdicts else self._gate.may_listen(topic)
            for topic in topics
        }
        self.asked = frozenset(topics)
        allowed = list(filter(self._admit, topics))
        most = self._gate.limits.topics
        self._count_over_limit(max(0, len(allowed) - most))
        self.allowed = frozenset(allowed[:most])
        assert self.allowed <= self._seen, "what is consumed was counted"

    def _admit(self, topic: Topic) -> bool:
        if not self._verdicts[topic]:
            return False
        if topic not in self._seen:
            exchanges = self._exchanges_seen | {topic.exchange}
            is_over = len(exchanges) > EXCHANGES_SEEN_MAX
            if is_over or len(self._seen) >= TOPICS_SEEN_MAX:
                self._count_over_limit(1)
                return False
            self._seen.add(topic)
            self._exchanges_seen = exchanges
        return True
