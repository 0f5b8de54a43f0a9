"""A gate that lets everything through, for tests of what is behind it."""

from collections.abc import Callable, Mapping
from typing import Any

from vchan.exchange import Outcome
from vchan.host.gate import REDELIVERED_KEY
from vchan.host.policy import Ask, Effect, Verdict
from vchan.host.upward_envelope import Invocation
from vchan.messages import Request, Topic


class OpenGate:
    """Everything is allowed, and nothing recorded.

    Args:
        may_listen: The topics that may be served.
    """

    calls_max = 64
    requests_max = 256
    topics_max = 64
    values_max = 20_000

    def __init__(
        self, may_listen: Callable[[Topic], bool] = lambda _: True, *, may_send: bool = True
    ) -> None:
        self.may_listen = may_listen
        self.may_send = may_send
        self.is_mute = False
        self.given_topics: frozenset[Topic] = frozenset()
        self.deny_reply: set[Topic] = set()

    def may_reply(self, topic: Topic) -> bool:
        return topic not in self.deny_reply

    def may_raise(self, module: str) -> bool:
        return True

    def judge(self, ask: Ask, request_id: bytes) -> Verdict:
        return Verdict(Effect.ALLOW, "open")

    def refused(self, ask: Ask, request_id: bytes, reason: str) -> None:
        pass

    def context(self, given: Mapping[str, Any], *, redelivered: bool) -> dict[str, Any]:
        return {REDELIVERED_KEY: True} if redelivered else {}

    def conduct(self, asked: Invocation, request: Request) -> Invocation:
        return asked


def offer_nothing(
    request: Request, told: Callable[[Outcome, float], None]
) -> Callable[[], None] | None:
    """No program on the host serves anything."""
    return None
