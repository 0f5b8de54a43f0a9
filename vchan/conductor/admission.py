"""What a host hands in, whether it may pass, and how much of it a project may send.

Rules of this file
1. Pure: no I/O, no clock, no threads. Time comes in as `now_s`.
2. A host is believed what it says of its guest, and nothing else: what is handed in is checked as
   if the guest had sent it here itself.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vchan.host.oslo_wire.envelope import ID_PATTERN, EnvelopeError, name_of
from vchan.host.policy.audit_record import REFUSED, Record
from vchan.host.policy.guest_context import HOST_KEY, INSTANCE_KEY, PROJECT_KEY
from vchan.host.policy.rules import WHO_KEYS, Ask, Effect, Facts, Kind, Policy
from vchan.host.policy.token_bucket import TokenBucket
from vchan.rpc.arguments import PRIORITIES
from vchan.rpc.bodies import REDELIVERED_KEY

BURST_S: Final = 2.0
"""A project that was quiet may send so many seconds' worth at once."""
PROJECTS_MAX: Final = 10_000
"""Projects whose rates are known. At it: the one that was quiet the longest is forgotten; it has
its whole burst again, as it would have anyway after BURST_S."""
LABELS_MAX: Final = 128
"""Extra specs and properties of one VM's, as a host has them. At it: the request is refused."""
UNUSABLE_ARGS: Final = frozenset({"self", "ctxt", "method"})
"""Arguments of these names no oslo.messaging client can send."""


class Handed(NamedTuple):
    """A guest's request, as a host hands it in."""

    facts: Facts
    host: str
    context: Mapping[str, Any]
    ask: Ask
    args: Mapping[str, Any]
    version: str | None
    request_id: bytes
    timeout_s: float | None
    monitor_s: float | None
    is_redelivered: bool


def read(kind: Kind, context: Mapping[str, Any], handed: Mapping[str, Any]) -> Handed:
    """What a host hands in, by `vchan.host.vm.gate.VmGate.conduct`.

    Args:
        context: As the host has made it (`vchan.host.policy.guest_context`).

    Raises:
        EnvelopeError: It is not that.
    """
    facts = _facts(_object(handed, "vm"))
    if (facts.uuid, facts.project) != (context.get(INSTANCE_KEY), context.get(PROJECT_KEY)):
        raise EnvelopeError("the context is of another VM")
    target, args = _object(handed, "target"), _object(handed, "args")
    request_id = handed.get("request_id")
    if not isinstance(request_id, str) or not ID_PATTERN.fullmatch(request_id):
        raise EnvelopeError("request_id is not 32 hex digits")
    ask = Ask(
        kind,
        _name(target, "exchange"),
        _name(target, "topic"),
        name_of(target, "server") or "",
        name_of(target, "namespace") or "",
        _name(handed, "method"),
        fanout=kind is Kind.CAST and target.get("fanout") is True,
    )
    if kind is Kind.NOTIFY and ask.method not in PRIORITIES:
        raise EnvelopeError(f"{ask.method!r} is no priority of a notification")
    if kind is not Kind.NOTIFY and not UNUSABLE_ARGS.isdisjoint(args):
        names = ", ".join(sorted(UNUSABLE_ARGS.intersection(args)))
        raise EnvelopeError(f"arguments named {names}: oslo.messaging cannot pass them on")
    return Handed(
        facts,
        name_of(context, HOST_KEY) or "",
        context,
        ask,
        args,
        name_of(target, "version"),
        bytes.fromhex(request_id),
        _seconds(handed, "timeout_s"),
        _seconds(handed, "monitor_s"),
        context.get(REDELIVERED_KEY) is True,
    )


def _object(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    if not isinstance(value, dict):
        raise EnvelopeError(f"{key} is not an object")
    return value


def _name(values: Mapping[str, Any], key: str) -> str:
    name = name_of(values, key)
    if not name:
        raise EnvelopeError(f"there is no {key}")
    return name


def _facts(vm: Mapping[str, Any]) -> Facts:
    labels = vm.get("labels") or {}  # none from hosts of an earlier release
    if not isinstance(labels, dict):
        raise EnvelopeError("the VM's labels are not an object")
    if len(labels) > LABELS_MAX:
        raise EnvelopeError(f"over {LABELS_MAX} labels of a VM (LABELS_MAX)")
    names = {key: name_of(vm, key) or "" for key in WHO_KEYS}
    pairs = ((label, name_of(labels, label) or "") for label in labels)
    facts = Facts(**names, labels=tuple(sorted(pairs)))
    if not facts.uuid:
        raise EnvelopeError("the VM has no uuid")
    return facts


def _seconds(values: Mapping[str, Any], key: str) -> float | None:
    """0 and nothing: none."""
    value = values.get(key)
    if not value:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EnvelopeError(f"{key} is not a number of seconds")
    if not 0 < value < math.inf:
        raise EnvelopeError(f"{key} is not a time")
    return float(value)


class _Project:
    __slots__ = ("bucket", "calls")

    def __init__(self, rate: float) -> None:
        self.bucket = TokenBucket(rate, max(1.0, rate * BURST_S))
        self.calls = 0


class Admission:
    """Judges what is handed in, and counts it by project, whichever host it comes from.

    VMs of which nova says no project count as one.

    Args:
        requests_per_s: Of a project.
        calls_max: Of a project, that wait for their answer at a time.
    """

    def __init__(self, policy: Policy, *, requests_per_s: float, calls_max: int) -> None:
        self.policy = policy
        self._requests_per_s = requests_per_s
        self._calls_max = calls_max
        self._projects: OrderedDict[str, _Project] = OrderedDict()

    def judge(self, handed: Handed, now_s: float) -> Record:
        """Whether it may pass: `verdict` is "allow", "deny", or REFUSED by a limit.

        A call that may is counted until `call_over`.
        """
        ask, facts = handed.ask, handed.facts
        verdict = self.policy.decide(facts, ask)
        if verdict.effect is Effect.CONDUCTOR:
            problem = "the rule says conductor: this is the conductor"
            return self._record(handed, Effect.DENY, verdict.rule, problem)
        if verdict.effect is Effect.DENY:
            return self._record(handed, Effect.DENY, verdict.rule)
        limit, problem = self._over_limit(handed, now_s)
        if problem:
            return self._record(handed, REFUSED, limit, problem)
        return self._record(handed, Effect.ALLOW, verdict.rule)

    def _record(self, handed: Handed, verdict: str, rule: str, reason: str = "") -> Record:
        return Record(
            handed.facts, handed.ask, str(verdict), rule, handed.request_id, reason, handed.host
        )

    def _over_limit(self, handed: Handed, now_s: float) -> tuple[str, str]:
        project = self._project(handed.facts.project)
        is_call = handed.ask.kind is Kind.CALL
        whose = f"project {handed.facts.project or '(none)'}"
        if is_call and project.calls >= self._calls_max:
            return "project_calls", f"{project.calls} calls of {whose} wait for their answers"
        if not project.bucket.try_take(1, now_s):
            return "project_requests_per_s", f"over {self._requests_per_s:g} a second of {whose}"
        project.calls += is_call
        return "", ""

    def _project(self, name: str) -> _Project:
        project = self._projects.get(name)
        if project is None:
            project = self._projects[name] = _Project(self._requests_per_s)
            self._make_room()
        self._projects.move_to_end(name)
        return project

    def _make_room(self) -> None:
        for name, project in self._projects.items():
            if len(self._projects) <= PROJECTS_MAX:
                return
            if not project.calls:
                del self._projects[name]
                return

    def call_over(self, handed: Handed) -> None:
        """A call that passed has its answer, or will have none."""
        self._projects[handed.facts.project].calls -= 1
