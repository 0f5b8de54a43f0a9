"""The host's policy at work: read, read again, applied to each VM, its decisions recorded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from vchan.errors import ConfigError
from vchan.host import config
from vchan.host.hypervisor.domain_xml import DomainFacts
from vchan.host.policy import guest_context, rule_files
from vchan.host.policy.audit_log import AuditLog
from vchan.host.policy.audit_record import REFUSED, Record
from vchan.host.policy.rules import (
    INTO,
    OUT_OF,
    Ask,
    Effect,
    Facts,
    Policy,
    Verdict,
    forward_ask,
)
from vchan.host.vm.gate import VmGate
from vchan.host.vm.throttle import Throttle, make_crowd
from vchan.io.loop import Loop
from vchan.rpc.messages import DEFAULT_EXCHANGE, Topic

LOG = logging.getLogger("vchan.host")

CONDUCTOR: Final = Topic(DEFAULT_EXCHANGE, "vchan")
LIMIT: Final = "limit"
"""The rule's name in a verdict that is no rule's."""
REMOVED_TOLD_MAX: Final = 2048
"""Keys of targets that are known to have been told: some twenty for each of a hundred topics. At
it: no more are told; they are counted all the same."""
REMOVED_CHARS_MAX: Final = 64
"""Of a key that is told: as long as those that may pass."""


def facts_of(domain: DomainFacts) -> Facts:
    """What the policy goes by: libvirt's name, and nova's metadata."""
    known = domain.metadata
    return Facts(
        domain.uuid,
        domain.name,
        known["project"],
        known["user"],
        known["flavor"],
        known["image"],
        tuple(sorted((domain.labels or {}).items())),
    )


class Enforcer:
    """Makes gates and throttles, and keeps them at the policy that holds.

    A policy that cannot be read at the start denies everything; one that cannot be read later
    leaves the one before in force. Either is in the log and in `vchan status`.
    """

    def __init__(self, loop: Loop, conf: Any) -> None:
        self._conf = conf
        self._crowd = make_crowd()
        self._host = conf[config.GROUP].host
        self._allow = config.guest_context_allow(conf)
        self._may_raise = config.failure_rule(conf)
        self._reports_to = config.reports_topic(conf)
        self.audit = AuditLog(loop, conf[config.GROUP].audit_log, self._host, LOG.warning)
        self._removed = RemovedKeys()
        self.problem = ""
        """Why the policy files are not what holds, and what does; "" if they are."""
        self.policy = Policy.denying("it has not been read")
        self.reload()

    def reload(self) -> None:
        """Read the files again, and go on in a new audit log if the old one was moved."""
        self.problem = ""
        try:
            policy = config.policy(self._conf)
        except ConfigError as error:
            problem = str(error)
            kept = "the policy before it holds"
            if self.policy.problem:
                self.policy = Policy.denying(problem)
                kept = "everything is denied"
            self.problem = f"{problem}: {kept}"
        if self.problem:
            LOG.warning("policy: %s", self.problem)
        else:
            self.policy = policy
            directory = self._conf[config.GROUP].policy_dir
            LOG.info("policy: %d rules of %s", len(policy.rules), directory)
            if not rule_files.is_there(directory):
                LOG.warning("policy: %s is not there: listen_topics alone counts", directory)
        self.audit.reopen()

    def gate(self, facts: Facts) -> VmGate:
        """What a VM may do."""
        return VmGate(
            facts,
            lambda: self.policy,
            self._record,
            self._stamp,
            CONDUCTOR,
            self._may_raise,
            self._reports_to,
            self._removed.note,
            self._write,
        )

    def lets_forward(self, facts: Facts, target: str) -> bool:
        """Whether programs may be connected to this in a VM."""
        try:
            ask = forward_ask(target)
        except ConfigError:
            return False
        return self.policy.decide(facts, ask).effect is Effect.ALLOW

    def throttle(self, facts: Facts) -> Throttle:
        """What a VM's stream may cost."""
        return Throttle(self.policy.limits(facts), self._crowd)

    def quarantined(self, facts: Facts, reason: str) -> None:
        """A VM is put into quarantine: on record."""
        self._write(Record(facts, None, "quarantine", LIMIT, reason=reason))

    def forget(self, vm: str) -> None:
        """A VM has left this host."""
        self.audit.forget(vm)

    def summary(self) -> dict[str, Any]:
        """What `vchan status` shows."""
        return {
            "policy": self.problem or f"{len(self.policy.rules)} rules",
            "policy_problem": self.problem or None,
            "audit": {"problem": self.audit.problem or None, **self.audit.counters},
            "files": {
                "config": [str(Path(path).absolute()) for path in self._conf.config_file or ()],
                "config_dirs": [str(Path(path).absolute()) for path in self._conf.config_dir or ()],
                "policy_dir": self._conf[config.GROUP].policy_dir,
                "audit_log": self.audit.path,
            },
        }

    def close(self) -> None:
        """Nothing more is recorded."""
        self.audit.close()

    def _record(
        self, facts: Facts, ask: Ask, verdict: Verdict, request_id: bytes, reason: str
    ) -> None:
        text = REFUSED if verdict.rule == LIMIT else verdict.effect.value
        self._write(Record(facts, ask, text, verdict.rule, request_id, reason))

    def _write(self, record: Record) -> None:
        self.audit.write(record, self.policy.limits(record.facts).audit_lines_per_s)

    def _stamp(
        self, given: Mapping[str, Any], facts: Facts, more: Mapping[str, int]
    ) -> dict[str, Any]:
        return guest_context.build_context(given, facts, self._allow, host=self._host, more=more)


class RemovedKeys:
    """Says once for each target which keys of contexts do not pass: what an operator needs who
    wonders why a service cannot read its requests."""

    def __init__(self) -> None:
        self._told: set[tuple[str, Topic, str]] = set()

    def note(self, direction: str, topic: Topic, keys: Iterable[str]) -> None:
        """Guests choose keys that come out of them: they are cut, escaped, and bounded."""
        news = []
        for key in sorted(key[:REMOVED_CHARS_MAX] for key in keys):
            told = (direction, topic, key)
            if told not in self._told and len(self._told) < REMOVED_TOLD_MAX:
                self._told.add(told)
                news.append(key)
        if news:
            text = "context of requests %s guests, %s/%s: keys that do not pass: %s"
            way = {INTO: "into", OUT_OF: "out of"}[direction]
            LOG.info(text, way, topic.exchange, topic.name, ", ".join(map(ascii, news)))
