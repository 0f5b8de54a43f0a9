"""What is wrong with a host, by what its daemon says of itself, and what to do about it.

Pure: no I/O, no clock. docs/host.md, "When something is wrong", has the same for people.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple


class Level(enum.Enum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """Something does not work, or will not; it may be meant so."""
    PROBLEM = "problem"
    """vchan cannot do its work."""


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        where: What was looked at: "broker", "policy", a VM's name.
        remedy: What to do; "" if nothing.
    """

    level: Level
    where: str
    text: str
    remedy: str = ""


_CHANNELS: Final = {
    "connecting": (
        Level.WARNING,
        "the channel's socket cannot be opened",
        "if permission is denied: the daemon's user must be in QEMU's groups, on Debian kvm and "
        "libvirt-qemu",
    ),
    "waiting": (
        Level.WARNING,
        "connected, and no guest daemon answers",
        "install vchan-guest in the VM, or start it; or wait until it has booted",
    ),
    "refused": (
        Level.PROBLEM,
        "the two daemons speak different versions of the protocol",
        "upgrade the older one; both are named in vchan-host's log",
    ),
    "quarantined": (
        Level.WARNING,
        "in quarantine",
        "look at what runs in the VM; vchan release VM ends the quarantine",
    ),
}
"""Channels' states that somebody should look at; in the others a channel works, or will soon."""

_NOT_CONFIGURED: Final = "none configured"
_CONNECTED: Final = "connected"

_PARTS: Final = {
    "libvirt": "see libvirt_uri in vchan.conf, whether libvirtd runs, and whether the daemon's "
    "user is in group libvirt",
    "broker": "see transport_url in vchan.conf, and the broker's log",
}


def examine_daemon(status: Mapping[str, Any], version: str) -> list[Finding]:
    """What a daemon's status shows.

    Args:
        status: As the daemon's method `status` returns it.
        version: This command's.
    """
    return [
        _examine_version(status["version"], version),
        *(_examine_part(name, status[name], remedy) for name, remedy in _PARTS.items()),
        _examine_policy(status),
        _examine_audit(status["audit"]),
    ]


def _examine_version(running: str, version: str) -> Finding:
    if running == version:
        return Finding(Level.OK, "vchan-host", f"{running} answers")
    text = f"{running} runs, and {version} is installed"
    return Finding(Level.WARNING, "vchan-host", text, "systemctl restart vchan-host")


def _examine_part(name: str, state: str, remedy: str) -> Finding:
    if state in (_CONNECTED, _NOT_CONFIGURED):
        return Finding(Level.OK, name, state)
    return Finding(Level.PROBLEM, name, state, remedy)


def _examine_policy(status: Mapping[str, Any]) -> Finding:
    if not status["policy_problem"]:
        return Finding(Level.OK, "policy", f"{status['policy']} are in force")
    remedy = "vchan policy check, then systemctl reload vchan-host"
    return Finding(Level.PROBLEM, "policy", status["policy_problem"], remedy)


def _examine_audit(audit: Mapping[str, Any]) -> Finding:
    lost = f"{audit['lost']} lines lost" if audit["lost"] else ""
    if audit["problem"]:
        text = "; ".join(filter(None, (audit["problem"], lost)))
        remedy = "see audit_log in vchan.conf, and df; then systemctl reload vchan-host"
        return Finding(Level.PROBLEM, "audit log", text, remedy)
    if lost:
        return Finding(Level.WARNING, "audit log", f"{lost} since the daemon started")
    return Finding(Level.OK, "audit log", f"{audit['written']} lines written")


def examine_vm(row: Mapping[str, Any], detail: Mapping[str, Any]) -> list[Finding]:
    """What a VM's row in the list, and its status, show.

    Args:
        row: One of what the daemon's method `list` returns.
        detail: What its method `status` returns of this VM.
    """
    name = row["name"]
    findings = []
    state, problem = row["channel"], row["problem"]
    if state in _CHANNELS:
        level, text, remedy = _CHANNELS[state]
        findings.append(Finding(level, name, f"{state}: {problem or text}", remedy))
    elif problem:
        findings.append(Finding(Level.WARNING, name, problem))
    denied = detail.get("requests", {}).get("denied_topics", [])
    if denied:
        findings.append(
            Finding(
                Level.WARNING,
                name,
                f"its agents serve what the policy does not allow: {', '.join(denied)}",
                "vchan policy check says which rule decides",
            )
        )
    if detail.get("requests", {}).get("topics_over_limit"):
        text = "its agents ask for more topics than the limit allows"
        findings.append(Finding(Level.WARNING, name, text, "see limit topics in the policy"))
    return findings


def summarize(findings: Iterable[Finding]) -> str:
    """How many of each level."""
    levels = [finding.level for finding in findings]
    problems, warnings = (levels.count(level) for level in (Level.PROBLEM, Level.WARNING))
    return f"problems: {problems}, warnings: {warnings}"
