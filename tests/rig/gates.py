"""A gate that lets everything through, for tests of what is behind it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vchan.host.oslo_wire.upward_envelope import Asked
from vchan.host.policy.rules import Ask, Effect, Kind, Verdict
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.gate import StreamNote
from vchan.rpc.bodies import REDELIVERED_KEY
from vchan.rpc.in_flight import Outcome
from vchan.rpc.messages import Request, Topic


class OpenGate:
    """Everything is allowed, and nothing recorded.

    Args:
        may_listen: The topics that may be served.
    """

    def __init__(
        self,
        may_listen: Callable[[Topic], bool] = lambda _: True,
        *,
        may_send: bool = True,
        may_report: bool = False,
    ) -> None:
        self.limits = Limits(requests_up=256, calls_up=64)
        self.may_listen = may_listen
        self.owned: set[Topic] = set()
        self.into: dict[Topic, frozenset[str]] = {}
        self.removals: list[tuple[str, Topic, frozenset[str]]] = []
        self.may_send = may_send
        self.may_report = may_report
        self.reports_to: Topic | None = None
        self.is_mute = False
        self.mute_by = ""
        self.given_topics: frozenset[Topic] = frozenset()
        self.deny_reply: set[Topic] = set()
        self.turned_away: list[tuple[Ask, bytes]] = []
        self.deny_forward = ""
        self.streams: list[StreamNote] = []

    def owns(self, topic: Topic) -> bool:
        return topic in self.owned

    def may_reply(self, topic: Topic) -> bool:
        return topic not in self.deny_reply

    def why_no_reply(self, topic: Topic) -> str:
        return f"a rule denies reply {topic.exchange}/{topic.name}"

    def may_raise(self, module: str) -> bool:
        return True

    def judge(self, ask: Ask, request_id: bytes) -> Verdict:
        return Verdict(Effect.ALLOW, "open")

    def refused(self, ask: Ask, request_id: bytes, reason: str) -> None:
        pass

    def forward(self, ask: Ask) -> Verdict:
        if self.deny_forward:
            return Verdict(Effect.DENY, self.deny_forward)
        return Verdict(Effect.ALLOW, "open")

    def streamed(self, note: StreamNote) -> None:
        self.streams.append(note)

    def unheard(self, ask: Ask, request_id: bytes) -> None:
        self.turned_away.append((ask, request_id))

    def context_into(self, topic: Topic) -> frozenset[str]:
        return self.into.get(topic, frozenset())

    def removed(self, direction: str, topic: Topic, keys: Iterable[str]) -> None:
        self.removals.append((direction, topic, frozenset(keys)))

    def context(self, given: Mapping[str, Any], ask: Ask, *, redelivered: bool) -> dict[str, Any]:
        return {REDELIVERED_KEY: True} if redelivered else {}

    def conduct(self, asked: Asked, request: Request) -> Asked:
        return asked

    def notification(self, what: str, report: Mapping[str, Any], request_id: bytes) -> Asked | None:
        if self.reports_to is None:
            return None
        to = Ask(Kind.NOTIFY, *self.reports_to, method="info")
        return Asked(to, {"event_type": what, "payload": report}, None, {})


def offer_nothing(
    request: Request, told: Callable[[Outcome, float], None]
) -> Callable[[], None] | None:
    """No program on the host serves anything."""
    return None
