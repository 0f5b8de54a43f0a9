"""What one VM may do: the policy applied to its facts, every decision put on record.

Pure: no I/O, no clock. `Gate` is what the relay asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from vchan.host.policy import Ask, Effect, Facts, Kind, Policy, Verdict
from vchan.host.upward_envelope import Invocation
from vchan.messages import Request, Topic

REDELIVERED_KEY: Final = "vchan_redelivered"
"""In the context of what may have been published before."""
DEFAULT_EXCHANGE: Final = "openstack"
"""oslo.messaging's default control_exchange."""
CONDUCTOR_VERSION: Final = "1.0"

Record = Callable[[Facts, Ask, Verdict, bytes, str], None]
"""(who, what, verdict, request id, reason): puts a decision on record."""
Stamp = Callable[[Mapping[str, Any], Facts], dict[str, Any]]
"""A guest's context made anew, with who it is."""


class Gate(Protocol):
    """What a VM may do, and as whom."""

    @property
    def calls_max(self) -> int:
        """The guest's calls that wait for an answer at a time."""

    @property
    def requests_max(self) -> int:
        """The guest's requests that are not over."""

    @property
    def topics_max(self) -> int:
        """Topics that its agents may serve at a time."""

    @property
    def values_max(self) -> int:
        """Values in the JSON of one of the guest's requests or answers."""

    @property
    def may_send(self) -> bool:
        """Whether the policy lets this VM send any request at all."""

    @property
    def is_mute(self) -> bool:
        """Whether nothing that this VM says is listened to, not even what it serves."""

    @property
    def given_topics(self) -> frozenset[Topic]:
        """What a mute VM serves: the policy's word, as its own does not count."""

    def may_listen(self, topic: Topic) -> bool:
        """Whether its agents may serve a topic."""

    def may_reply(self, topic: Topic) -> bool:
        """Whether what its agents answer is listened to."""

    def may_raise(self, module: str) -> bool:
        """Whether callers may rebuild exceptions of this module from what its agents answer."""

    def judge(self, ask: Ask, request_id: bytes) -> Verdict:
        """Decide about a request, and put it on record."""

    def refused(self, ask: Ask, request_id: bytes, reason: str) -> None:
        """Put on record what a limit refused."""

    def context(self, given: Mapping[str, Any], *, redelivered: bool) -> dict[str, Any]:
        """The context for the control side."""

    def conduct(self, asked: Invocation, request: Request) -> Invocation:
        """The same request, put to the conductor."""


class VmGate:
    """The policy, as it is for one VM.

    Args:
        policy: The one that holds now.
        stamp: See `vchan.host.identity`.
        conductor: (exchange, topic) of the conductor.
        may_raise: See `vchan.host.identity`.
    """

    def __init__(
        self,
        facts: Facts,
        policy: Callable[[], Policy],
        record: Record,
        stamp: Stamp,
        conductor: Topic,
        may_raise: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.facts = facts
        self._policy = policy
        self._record = record
        self._stamp = stamp
        self._conductor = conductor
        self.may_raise = may_raise
        self.is_one_way = False
        """Its channel has no way back, whatever the policy says."""

    @property
    def calls_max(self) -> int:
        """See `Gate`."""
        return self._policy().limits(self.facts).calls_up

    @property
    def requests_max(self) -> int:
        """See `Gate`."""
        return self._policy().limits(self.facts).requests_up

    @property
    def topics_max(self) -> int:
        """See `Gate`."""
        return self._policy().limits(self.facts).topics

    @property
    def values_max(self) -> int:
        """See `Gate`."""
        return self._policy().limits(self.facts).json_values

    @property
    def may_send(self) -> bool:
        """See `Gate`."""
        return self._policy().may_send(self.facts)

    @property
    def is_mute(self) -> bool:
        """See `Gate`."""
        return self.is_one_way or not self._policy().may_speak(self.facts)

    @property
    def given_topics(self) -> frozenset[Topic]:
        """See `Gate`."""
        named = self._policy().named_topics(self.facts)
        topics = (Topic(exchange or DEFAULT_EXCHANGE, name) for exchange, name in named)
        return frozenset(filter(self.may_listen, topics))

    def may_listen(self, topic: Topic) -> bool:
        """See `Gate`."""
        ask = Ask(Kind.LISTEN, topic.exchange, topic.name)
        return self.judge(ask, b"").effect is Effect.ALLOW

    def may_reply(self, topic: Topic) -> bool:
        """See `Gate`. On record only if not: those that may are as many as the calls."""
        ask = Ask(Kind.REPLY, topic.exchange, topic.name, self.facts.uuid)
        verdict = self._policy().decide(self.facts, ask)
        if verdict.effect is not Effect.ALLOW:
            self._record(self.facts, ask, verdict, b"", "")
        return verdict.effect is Effect.ALLOW

    def judge(self, ask: Ask, request_id: bytes) -> Verdict:
        """See `Gate`."""
        if (ask.exchange, ask.topic) == self._conductor:
            # What it is told about a guest, it believes.
            verdict = Verdict(Effect.DENY, "the conductor is asked by hosts alone")
        else:
            verdict = self._policy().decide(self.facts, ask)
        self._record(self.facts, ask, verdict, request_id, "")
        return verdict

    def refused(self, ask: Ask, request_id: bytes, reason: str) -> None:
        """See `Gate`."""
        self._record(self.facts, ask, Verdict(Effect.DENY, "limit"), request_id, reason)

    def context(self, given: Mapping[str, Any], *, redelivered: bool) -> dict[str, Any]:
        """See `Gate`."""
        context = self._stamp(given, self.facts)
        if redelivered:
            context[REDELIVERED_KEY] = True
        return context

    def conduct(self, asked: Invocation, request: Request) -> Invocation:
        """The conductor's method is named for the kind; its arguments say who asks for what."""
        ask = asked.ask
        args = {
            "vm": self.facts._asdict(),
            "request_id": request.id.hex(),
            "target": {
                "exchange": ask.exchange,
                "topic": ask.topic,
                "server": ask.server,
                "namespace": ask.namespace,
                "version": asked.version,
                "fanout": ask.fanout,
            },
            "method": ask.method,
            "args": asked.args,
            "timeout_s": request.timeout_ms / 1000,
            "monitor_s": request.monitor_ms / 1000,
        }
        kind = Kind.CALL if ask.kind is Kind.CALL else Kind.CAST
        to = Ask(kind, self._conductor.exchange, self._conductor.name, method=ask.kind.value)
        return Invocation(to, args, CONDUCTOR_VERSION, {})
