"""What one VM may do: the policy applied to its facts, every decision put on record.

Pure: no I/O, no clock. `Upward` and `Downward` ask a `Gate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple, Protocol

from vchan.host.oslo_wire.upward_envelope import Asked
from vchan.host.policy.audit_record import Record
from vchan.host.policy.rules import (
    DEFAULT,
    INTO,
    OUT_OF,
    Ask,
    Effect,
    Facts,
    Kind,
    Policy,
    Verdict,
)
from vchan.host.policy.vm_limits import Limits
from vchan.rpc.bodies import REDELIVERED_KEY
from vchan.rpc.messages import DEFAULT_EXCHANGE, Request, Topic

NO_WAY_BACK: Final = "the channel has no way back"
ANY_TOPIC: Final = Topic(DEFAULT_EXCHANGE, "")
"""That no rule for one topic matches: asked about in everybody's place."""
LISTENS_MAX: Final = 512
"""Topics whose last decision is known: twice as many as a VM may ever serve."""
CONDUCTOR_VERSION: Final = "1.0"
EVENT_PREFIX: Final = "vchan.guest."
"""Of the event types of reports' notifications; the rest is what is reported."""
PRIORITY: Final = "info"
"""Of these notifications."""

RecordDecision = Callable[[Facts, Ask, Verdict, bytes, str], None]
"""(who, what, verdict, request id, reason): puts a decision on record."""
Stamp = Callable[[Mapping[str, Any], Facts, Mapping[str, int]], dict[str, Any]]
"""A guest's context made anew, with who it is, and with what the target's keys let through."""
NoteRemoved = Callable[[str, Topic, Iterable[str]], None]
"""(direction, topic, keys): keys of a context did not pass."""


class StreamNote(NamedTuple):
    """What became of a program's stream: see `Record`."""

    ask: Ask
    verdict: str
    rule: str
    id: bytes
    by: str
    reason: str = ""
    into: int | None = None
    out_of: int | None = None


class Gate(Protocol):
    """What a VM may do, and as whom."""

    @property
    def limits(self) -> Limits:
        """What it may cost, now."""

    @property
    def may_send(self) -> bool:
        """Whether the policy lets this VM send any request at all."""

    @property
    def may_report(self) -> bool:
        """Whether the policy lets this VM tell the host anything of itself."""

    @property
    def is_mute(self) -> bool:
        """Whether nothing that this VM says is listened to, not even what it serves."""

    @property
    def mute_by(self) -> str:
        """By which rule it is mute, or as its channel has no way back; "" if it is not."""

    @property
    def given_topics(self) -> frozenset[Topic]:
        """What a mute VM serves: the policy's word, as its own does not count."""

    def may_listen(self, topic: Topic) -> bool:
        """Whether its agents may serve a topic."""

    def owns(self, topic: Topic) -> bool:
        """Whether a topic is this VM's alone: what is sent to no server of it is the VM's, too."""

    def may_reply(self, topic: Topic) -> bool:
        """Whether what its agents answer is listened to."""

    def why_no_reply(self, topic: Topic) -> str:
        """Why what its agents answer is not listened to, for whose callers this is: by which rule
        of which file."""

    def may_raise(self, module: str) -> bool:
        """Whether callers may rebuild exceptions of this module from what its agents answer."""

    def judge(self, ask: Ask, request_id: bytes) -> Verdict:
        """Decide about a request, and put it on record."""

    def refused(self, ask: Ask, request_id: bytes, reason: str) -> None:
        """Put on record what a limit refused."""

    def forward(self, ask: Ask) -> Verdict:
        """Decide about a stream of a program's into the guest. Not on record: it is asked again
        whenever the stream goes on in a new session."""

    def streamed(self, note: StreamNote) -> None:
        """Put on record what became of a stream."""

    def unheard(self, ask: Ask, request_id: bytes) -> None:
        """Put on record a request that nobody looked into, as the VM is mute."""

    def context(self, given: Mapping[str, Any], ask: Ask, *, redelivered: bool) -> dict[str, Any]:
        """The context for the control side, of a request that asks this."""

    def context_into(self, topic: Topic) -> frozenset[str]:
        """Keys of callers' contexts that enter this VM with requests for a topic, besides those
        that enter with all."""

    def removed(self, direction: str, topic: Topic, keys: Iterable[str]) -> None:
        """Keys of a context did not pass."""

    def conduct(self, asked: Asked, request: Request) -> Asked:
        """The same request, put to the conductor."""

    def notification(self, what: str, report: Mapping[str, Any], request_id: bytes) -> Asked | None:
        """What services are told of a report; None: nobody is."""


class VmGate:
    """The policy, as it is for one VM.

    Args:
        policy: The one that holds now.
        stamp: See `vchan.host.policy.guest_context`.
        conductor: (exchange, topic) of the conductor.
        may_raise: See `vchan.host.policy.guest_context`.
        note_removed: Told of keys that did not pass.
        write: Puts on record what is no decision about a request.
        reports_to: The notifications' topic that guests' reports go to; None: they go to none.
    """

    def __init__(
        self,
        facts: Facts,
        policy: Callable[[], Policy],
        record: RecordDecision,
        stamp: Stamp,
        conductor: Topic,
        may_raise: Callable[[str], bool] = lambda _: True,
        reports_to: Topic | None = None,
        note_removed: NoteRemoved = lambda *_: None,
        write: Callable[[Record], None] = lambda _: None,
    ) -> None:
        self._note_removed = note_removed
        self._write = write
        self.facts = facts
        self._reports_to = reports_to
        self._policy = policy
        self._record = record
        self._stamp = stamp
        self._conductor = conductor
        self.may_raise = may_raise
        self._listens: dict[Topic, Verdict] = {}  # the last decision about each, the oldest first
        self._replies: dict[Topic, Verdict] = {}  # that were denied, the last about each
        self.is_one_way = False
        """Its channel has no way back, whatever the policy says."""

    @property
    def limits(self) -> Limits:
        """See `Gate`."""
        return self._policy().limits(self.facts)

    @property
    def may_send(self) -> bool:
        """See `Gate`."""
        return self._policy().may_send(self.facts)

    @property
    def may_report(self) -> bool:
        """See `Gate`."""
        return not self.is_one_way and self._policy().may_report(self.facts)

    @property
    def is_mute(self) -> bool:
        """See `Gate`."""
        return self.is_one_way or not self._policy().may_speak(self.facts)

    @property
    def mute_by(self) -> str:
        """See `Gate`."""
        if self.is_one_way:
            return NO_WAY_BACK
        return self._reply_verdict(ANY_TOPIC).rule if self.is_mute else ""

    @property
    def given_topics(self) -> frozenset[Topic]:
        """See `Gate`."""
        named = self._policy().named_topics(self.facts)
        topics = (Topic(exchange or DEFAULT_EXCHANGE, name) for exchange, name in named)
        return frozenset(filter(self.may_listen, topics))

    def may_listen(self, topic: Topic) -> bool:
        """See `Gate`. On record when it is another decision than the last one about that topic: a
        guest may say at will what it serves."""
        ask = Ask(Kind.LISTEN, topic.exchange, topic.name)
        verdict = self._decide(ask)
        if self._listens.get(topic) != verdict:
            _remember(self._listens, topic, verdict)
            self._record(self.facts, ask, verdict, b"", "")
        return verdict.effect is Effect.ALLOW

    def owns(self, topic: Topic) -> bool:
        """See `Gate`."""
        return self._policy().owns(self.facts, topic.exchange, topic.name)

    def denials(self) -> dict[str, Any]:
        """Which rule has denied what, for operators: topics that its agents would serve
        (`denied_by`), topics on which they would answer (`replies_denied_by`), and everything
        (`mute_by`; "": it may say something)."""
        tables = {"denied_by": self._listens, "replies_denied_by": self._replies}
        found = {
            name: {
                f"{topic.exchange}/{topic.name}": verdict.rule
                for topic, verdict in table.items()
                if verdict.effect is not Effect.ALLOW
            }
            for name, table in tables.items()
        }
        return {**found, "mute_by": self.mute_by}

    def why_no_reply(self, topic: Topic) -> str:
        """See `Gate`. Not on record: nothing was said."""
        if self.is_one_way:
            return NO_WAY_BACK
        rule = self._reply_verdict(topic).rule
        who = "no rule allows" if rule == DEFAULT else f"{rule} denies"
        return f"{who} reply {topic.exchange}/{topic.name}"

    def _reply_verdict(self, topic: Topic) -> Verdict:
        ask = Ask(Kind.REPLY, topic.exchange, topic.name, self.facts.uuid)
        return self._policy().decide(self.facts, ask)

    def may_reply(self, topic: Topic) -> bool:
        """See `Gate`. On record only if not: those that may are as many as the calls."""
        verdict = self._reply_verdict(topic)
        if verdict.effect is not Effect.ALLOW:
            _remember(self._replies, topic, verdict)
            ask = Ask(Kind.REPLY, topic.exchange, topic.name, self.facts.uuid)
            self._record(self.facts, ask, verdict, b"", "")
        elif self._replies:
            self._replies.pop(topic, None)
        return verdict.effect is Effect.ALLOW

    def judge(self, ask: Ask, request_id: bytes) -> Verdict:
        """See `Gate`. Reports that are allowed are not on record: they go no further, and are as
        many as changes."""
        verdict = self._decide(ask)
        if ask.kind is not Kind.REPORT or verdict.effect is not Effect.ALLOW:
            self._record(self.facts, ask, verdict, request_id, "")
        return verdict

    def _decide(self, ask: Ask) -> Verdict:
        if (ask.exchange, ask.topic) == self._conductor:
            # What it is told about a guest, it believes.
            return Verdict(Effect.DENY, "the conductor is asked by hosts alone")
        return self._policy().decide(self.facts, ask)

    def refused(self, ask: Ask, request_id: bytes, reason: str) -> None:
        """See `Gate`."""
        self._record(self.facts, ask, Verdict(Effect.DENY, "limit"), request_id, reason)

    def forward(self, ask: Ask) -> Verdict:
        """See `Gate`."""
        return self._policy().decide(self.facts, ask)

    def streamed(self, note: StreamNote) -> None:
        """See `Gate`."""
        ask, verdict, rule, stream, by, reason, into, out_of = note
        record = Record(self.facts, ask, verdict, rule, stream, reason, "", by, into, out_of)
        self._write(record)

    def unheard(self, ask: Ask, request_id: bytes) -> None:
        """See `Gate`."""
        verdict = self._policy().decide(self.facts, ask)
        if verdict.effect is not Effect.DENY:
            verdict = Verdict(Effect.DENY, NO_WAY_BACK)
        self._record(self.facts, ask, verdict, request_id, "nothing that this VM says is heard")

    def context(self, given: Mapping[str, Any], ask: Ask, *, redelivered: bool) -> dict[str, Any]:
        """See `Gate`."""
        more = self._policy().context_keys(self.facts, OUT_OF, ask.exchange, ask.topic)
        context = self._stamp(given, self.facts, more)
        if redelivered:
            context[REDELIVERED_KEY] = True
        return context

    def context_into(self, topic: Topic) -> frozenset[str]:
        """See `Gate`."""
        return frozenset(self._policy().context_keys(self.facts, INTO, topic.exchange, topic.name))

    def removed(self, direction: str, topic: Topic, keys: Iterable[str]) -> None:
        """See `Gate`."""
        self._note_removed(direction, topic, keys)

    def conduct(self, asked: Asked, request: Request) -> Asked:
        """The conductor's method is named for the kind; its arguments say who asks for what."""
        ask = asked.ask
        args = {
            "vm": {**self.facts.named(), "labels": dict(self.facts.labels)},
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
        assert (ask.exchange, ask.topic) != self._conductor, "it would be asked about itself"
        kind = Kind.CALL if ask.kind is Kind.CALL else Kind.CAST
        to = Ask(kind, self._conductor.exchange, self._conductor.name, method=ask.kind.value)
        return Asked(to, args, CONDUCTOR_VERSION, {})

    def notification(self, what: str, report: Mapping[str, Any], request_id: bytes) -> Asked | None:
        """See `Gate`. Which VM it is stands beside the guest's own word, which is in `report`."""
        if self._reports_to is None:
            return None
        to = Ask(Kind.NOTIFY, self._reports_to.exchange, self._reports_to.name, method=PRIORITY)
        payload = {"vm": self.facts.named(), "report": report}
        args: dict[str, Any] = {"event_type": f"{EVENT_PREFIX}{what}", "payload": payload}
        args["metadata"] = {"message_id": request_id.hex()}
        return Asked(to, args, None, {})


def _remember(table: dict[Topic, Verdict], topic: Topic, verdict: Verdict) -> None:
    table[topic] = verdict
    if len(table) > LISTENS_MAX:
        del table[next(iter(table))]
