"""The host's policy at work: read, read again, applied to each VM, its decisions recorded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from vchan.errors import ConfigError
from vchan.host import config, identity, policy_files
from vchan.host.audit import AuditLog
from vchan.host.audit_record import REFUSED, Record
from vchan.host.domain_xml import DomainFacts
from vchan.host.gate import VmGate
from vchan.host.guard import Guard
from vchan.host.policy import Ask, Facts, Policy, Verdict
from vchan.loop import Loop
from vchan.messages import Topic

LOG = logging.getLogger("vchan.host")

CONDUCTOR: Final = Topic("openstack", "vchan")
LIMIT: Final = "limit"
"""The rule's name in a verdict that is no rule's."""


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
    )


class Authority:
    """Makes gates and guards, and keeps them at the policy that holds.

    A policy that cannot be read at the start denies everything; one that cannot be read later
    leaves the one before in force. Either is in the log and in `vchan status`.
    """

    def __init__(self, loop: Loop, conf: Any) -> None:
        self._conf = conf
        self._host = conf[config.GROUP].host
        self._allow = config.guest_context_allow(conf)
        self._may_raise = config.failure_rule(conf)
        self.audit = AuditLog(loop, conf[config.GROUP].audit_log, self._host, LOG.warning)
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
            if not policy_files.is_there(directory):
                LOG.warning("policy: %s is not there: listen_topics alone counts", directory)
        self.audit.reopen()

    def gate(self, facts: Facts) -> VmGate:
        """What a VM may do."""
        return VmGate(
            facts, lambda: self.policy, self._record, self._stamp, CONDUCTOR, self._may_raise
        )

    def guard(self, facts: Facts) -> Guard:
        """What a VM's stream may cost."""
        return Guard(self.policy.limits(facts))

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

    def _stamp(self, given: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
        return identity.build_context(given, facts, self._allow, host=self._host)
