"""What is wrong with a host, by what its daemon says of itself, and what to do about it.

Pure: no I/O, no clock. docs/troubleshooting.md has the same for people.
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
    "silent": (
        Level.WARNING,
        "the guest's daemon was heard, and does not answer any more",
        "look at the VM's console: it hangs, reboots, or has no CPU; or its vchan-guest has ended",
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

_REFUSED_REMEDY: Final = "docs/broker.md, What the broker refuses"
_LOG: Final = "vchan-host's log names each"
_RETURNS: Final = (
    "RabbitMQ 4 drops at the 21st return, where neither the queue nor a policy has a delivery "
    "limit: see docs/broker.md, RabbitMQ 4"
)
_LOST: Final = {
    "casts_refused": ("casts were dropped: the guest refused them", _LOG),
    "casts_agent_gone": ("casts were dropped: their agent went away with them", _LOG),
    "casts_expired": ("casts were dropped: their time was over", _LOG),
    "casts_too_large": ("casts were dropped: they were larger than a message may be", _LOG),
    "undecodable": ("messages could not be read, and were dropped", _LOG),
    "parked": (
        "messages broke this daemon, and were put aside",
        "see queue vchan_parked",
    ),
    "dropped_by_broker": ("messages were taken back by the broker and dropped", _RETURNS),
    "many_returns": ("messages came back to their queue ten times or more", _RETURNS),
}
"""Counters of a VM's that somebody should look at, with what they count since the VM came here."""
_FAULT_REMEDY: Final = (
    "report it, with the traceback in vchan-host's log; vchan release {vm} tries again at once"
)
_UNREADABLE_REMEDY: Final = (
    "see vchan-host's log and virsh dumpxml; it is read again every few seconds"
)

_DENIED_REMEDY: Final = (
    "if it may: listen_topics in vchan.conf, or listen any {topic} allow in policy_dir before that "
    "rule; then systemctl reload vchan-host"
)
_REPLY_REMEDY: Final = (
    "if they may: reply any {topic} allow in policy_dir before that rule; then systemctl reload "
    "vchan-host"
)
NAMES_MAX: Final = 10
"""VMs that one finding names. At it: it says how many more there are."""
_LOSING_REMEDY: Final = (
    "before that: stop each, nova-manage image_property set UUID --property "
    "hw_qemu_guest_agent=yes, start it; for new servers set hw_qemu_guest_agent=yes on images. "
    "vchan --json list has them (loses_channel)"
)
_ALIKE: Final = {
    "loses_channel": ("1 VM loses its channel", "VMs lose their channels", _LOSING_REMEDY),
    "unlabelled": (
        "1 VM is in no rule by extra-spec or property:",
        "VMs are in no rule by extra-spec or property:",
        "select and allow them by project, flavor or image; or stop and start them under nova 32",
    ),
}
"""By a field of the list's rows that says what is so: of one VM, of several, and what helps."""
_NO_RULE: Final = "default"
"""The rule of a verdict that no rule gave."""
_PAUSED: Final = "the VM is paused: what is sent to it waits until it goes on"

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
        *_examine_alarm(status.get("broker_blocked")),
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


def _examine_alarm(reason: str | None) -> list[Finding]:
    """A broker that takes no messages: an alarm of its own."""
    if not reason:
        return []
    text = f"it takes no messages: {reason}"
    remedy = "the broker lacks memory or disk: see rabbitmqctl status"
    return [Finding(Level.PROBLEM, "broker", text, remedy)]


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
    refusals = detail.get("broker_problems", [])
    # The broker's words are said below, each by itself.
    problem = (problem or "").removeprefix("; ".join(refusals)).removeprefix("; ")
    fault = detail.get("fault")
    if fault:
        times = detail["channel"]["faults"]
        text = f"vchan-host itself failed on it, {times} times, last: {fault}"
        if state == "quarantined":
            text = f"{state}: {text}"
        findings.append(Finding(Level.PROBLEM, name, text, _FAULT_REMEDY.format(vm=name)))
    if state == "quarantined" and fault:
        pass
    elif row["domain"] == "unknown":
        findings.append(Finding(Level.PROBLEM, name, problem, _UNREADABLE_REMEDY))
    elif row["domain"] == "paused" and state in ("ready", "waiting"):
        findings.append(Finding(Level.WARNING, name, _PAUSED, f"virsh resume {name}"))
    elif state in _CHANNELS:
        level, text, remedy = _CHANNELS[state]
        findings.append(Finding(level, name, f"{state}: {problem or text}", remedy))
    elif problem:
        findings.append(Finding(Level.WARNING, name, problem))
    findings += [
        Finding(Level.WARNING, name, f"broker: {text}", _REFUSED_REMEDY) for text in refusals
    ]
    requests = detail.get("requests", {})
    findings += [
        Finding(Level.WARNING, name, f"{requests[counter]} {text}", remedy)
        for counter, (text, remedy) in _LOST.items()
        if requests.get(counter)
    ]
    rules = detail.get("denied_by", {})
    for topic in detail.get("requests", {}).get("denied_topics", []):
        rule = rules.get(topic, _NO_RULE)
        why = "no rule allows it" if rule == _NO_RULE else f"{rule} denies it"
        text = f"its agents serve {topic}, and {why}"
        findings.append(Finding(Level.WARNING, name, text, _DENIED_REMEDY.format(topic=topic)))
    for topic, rule in detail.get("replies_denied_by", {}).items():
        why = "no rule allows it" if rule == _NO_RULE else f"{rule} denies it"
        text = f"its agents would answer callers of {topic}, and {why}"
        findings.append(Finding(Level.WARNING, name, text, _REPLY_REMEDY.format(topic=topic)))
    if detail.get("requests", {}).get("topics_over_limit"):
        text = "its agents ask for more topics than the limit allows"
        findings.append(Finding(Level.WARNING, name, text, "see limit topics in the policy"))
    return findings


def examine_rows(rows: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """What is true of many VMs of a host alike, said once.

    Args:
        rows: What the daemon's method `list` returns, or some of it.
    """
    rows = list(rows)
    findings = []
    for key, (one, many, remedy) in _ALIKE.items():
        found = [row for row in rows if row.get(key)]
        if found:
            names = ", ".join(row["name"] for row in found[:NAMES_MAX])
            more = f" and {len(found) - NAMES_MAX} more" if len(found) > NAMES_MAX else ""
            what = one if len(found) == 1 else f"{len(found)} {many}"
            text = f"{what} {found[0][key]}: {names}{more}"
            findings.append(Finding(Level.WARNING, "nova", text, remedy))
    return findings


def works(row: Mapping[str, Any], detail: Mapping[str, Any]) -> Finding:
    """What is said of a VM of which `examine_vm` says nothing.

    Args:
        row: One of what the daemon's method `list` returns.
        detail: What its method `status` says of the VM.
    """
    if row["channel"] == "none":
        text = f"{row['domain']}, and has no channel"
        remedy = f"vchan attach {row['name']} gives it one, from its next start on at the latest"
        return Finding(Level.WARNING, row["name"], text, remedy)
    served = f"serves {', '.join(row['topics'])}" if row["topics"] else "serves no topic"
    if rule := detail.get("mute_by"):
        why = "no rule lets it say anything" if rule == _NO_RULE else rule
        served += f"; not listened to: {why}"
    return Finding(Level.OK, row["name"], f"{row['domain']}, {row['channel']}, {served}")


def summarize(findings: Iterable[Finding]) -> str:
    """How many of each level."""
    levels = [finding.level for finding in findings]
    problems, warnings = (levels.count(level) for level in (Level.PROBLEM, Level.WARNING))
    return f"problems: {problems}, warnings: {warnings}"
