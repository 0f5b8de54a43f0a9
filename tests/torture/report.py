"""What a run found, as a table and as JSON. The keys stay: programs read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from tests.torture import oracle
from tests.torture.oracle import EXEMPTIONS, Evidence, Verdict, longest_wait_s
from tests.torture.records import ANSWERED, CALL, REPORT, Born, Ran, Record, Sent
from tests.torture.schedule import ABORT, ALL_KINDS, MIGRATE, Step

KILLS: Final = (
    "host_kill",
    "host_hang",
    "host_away",
    "both_kill",
    "guest_daemon_kill",
    "guest_daemon_hang",
    "disk_full",
    "agent_kill",
    "agent_hang",
    "agent_away",
    "asker_kill",
    "broker_kill",
    "libvirtd_kill",
)
CUTS: Final = ("cut", "broker_restart", "broker_kill")
COUNTED: Final = {
    "lost": (oracle.LOST,),
    "twice": (oracle.TWICE, oracle.CALL_TWICE, oracle.UNMARKED, oracle.CAST_UNMARKED),
    "reordered": (oracle.REORDERED,),
    "wrong_answers": (oracle.WRONG_ANSWER, oracle.INVENTED, oracle.WRONG_IDENTITY),
    "refused_but_ran": (oracle.REFUSED_BUT_RAN,),
}
LEAST: Final = {
    "calls_answered": 51,
    "casts": 51,
    "fanouts": 11,
    "guest_calls_answered": 21,
    "guest_casts": 21,
    "guest_reports": 6,
}
"""What a run with every fault once has to carry: promises about nothing are easily kept."""
ROWS: Final = (
    ("seed", "seed"),
    ("minutes", "minutes at work"),
    ("vms", "VMs"),
    ("migrations", "live migrations"),
    ("aborted", "  given up on the way"),
    ("kills", "kill -9"),
    ("cuts", "broker: cuts and restarts"),
    ("reborn", "  programs of guests that began anew"),
    ("crashed", "  programs of guests that crashed, with their emulator"),
    ("panicked", "  kernels of guests that panicked, with their emulator"),
    ("faults", "faults of all kinds"),
    ("failed_steps", "  that could not be carried out"),
    ("calls", "calls into guests"),
    ("calls_answered", "  answered"),
    ("casts", "casts into guests"),
    ("fanouts", "fanouts to all guests"),
    ("guest_calls", "calls of guests"),
    ("guest_calls_answered", "  answered"),
    ("guest_casts", "casts of guests"),
    ("guest_changes", "changes in guests, which they report"),
    ("guest_reports", "  that services heard of"),
    ("ran", "methods run"),
    ("lost", "LOST"),
    ("twice", "TWICE"),
    ("reordered", "REORDERED"),
    ("wrong_answers", "WRONG ANSWERS"),
    ("refused_but_ran", "REFUSED, BUT RAN"),
    ("other_violations", "OTHER PROMISES BROKEN"),
    ("longest_silence_s", "longest wait for an answer, s"),
    ("host_rss_mib", "host's daemon at most, MiB"),
    ("host_descriptors", "  descriptors"),
    ("guest_rss_mib", "guest's daemon at most, MiB"),
    ("guest_descriptors", "  descriptors"),
)


class Taken(NamedTuple):
    """What the daemons took at most."""

    host_rss_mib: float
    host_descriptors: int
    guest_rss_mib: float
    guest_descriptors: int


class Carried(NamedTuple):
    """What was done to the parts: steps, and those of them that failed with the reasons."""

    seed: int
    vms: int
    minutes: float
    steps: list[Step]
    failed: list[str]


def figures(carried: Carried, evidence: Evidence, verdict: Verdict, taken: Taken) -> dict[str, Any]:
    """Everything, by stable keys."""
    kinds = Counter(step.kind for step in carried.steps)
    violations = Counter(violation.kind for violation in verdict.violations)
    counted = {key: sum(violations[kind] for kind in counted) for key, counted in COUNTED.items()}
    failed = Counter(text.split()[0] for text in carried.failed)
    return {
        "seed": carried.seed,
        "vms": carried.vms,
        "minutes": round(carried.minutes, 1),
        "migrations": kinds[MIGRATE] - failed[MIGRATE],
        "aborted": kinds[ABORT] - failed[ABORT],
        "kills": sum(kinds[kind] for kind in KILLS),
        "cuts": sum(kinds[kind] for kind in CUTS),
        "faults": len(carried.steps),
        "failed_steps": len(carried.failed),
        **_traffic(evidence),
        **counted,
        "other_violations": len(verdict.violations) - sum(counted.values()),
        "longest_silence_s": round(longest_wait_s(evidence.control), 1),
        "host_rss_mib": round(taken.host_rss_mib, 1),
        "host_descriptors": taken.host_descriptors,
        "guest_rss_mib": round(taken.guest_rss_mib, 1),
        "guest_descriptors": taken.guest_descriptors,
        "by_kind": {kind: kinds[kind] for kind in ALL_KINDS},
        "exemptions": {name: verdict.exemptions[name] for name in EXEMPTIONS},
        "outcomes": dict(sorted(verdict.outcomes.items())),
        "violations": [f"{violation.kind}: {violation.text}" for violation in verdict.violations],
        "failed": carried.failed,
    }


def _traffic(evidence: Evidence) -> dict[str, int]:
    asking = _of_guests(evidence)
    down, up = _sent(evidence.control), _sent(asking)
    ran = sum(isinstance(record, Ran) for record in [*asking, *evidence.service])
    return {
        "calls": down[CALL],
        "calls_answered": _answered(evidence.control),
        "casts": down["cast"],
        "fanouts": down["fanout"],
        "guest_calls": up[CALL],
        "guest_calls_answered": _answered(asking),
        "guest_casts": up["cast"],
        "guest_changes": up[REPORT],
        "guest_reports": _heard(evidence.service),
        "ran": ran,
        "crashed": sum(fault.kind == oracle.CRASH for fault in evidence.faults),
        "panicked": sum(fault.kind == oracle.PANIC for fault in evidence.faults),
        "reborn": sum(_births(records) - 1 for records in _books(evidence) if _births(records)),
    }


def carried_enough(evidence: Evidence) -> bool:
    """Whether it was as much as LEAST has."""
    traffic = _traffic(evidence)
    return all(traffic[name] >= least for name, least in LEAST.items())


def _books(evidence: Evidence) -> list[Sequence[Record]]:
    """Of each program of each guest."""
    return [records for programs in evidence.guests.values() for records in programs.values()]


def _of_guests(evidence: Evidence) -> list[Record]:
    return [record for records in _books(evidence) for record in records]


def _heard(records: Iterable[Record]) -> int:
    return sum(isinstance(record, Ran) and record.kind == REPORT for record in records)


def _births(records: Sequence[Record]) -> int:
    return sum(isinstance(record, Born) for record in records)


def _sent(records: Iterable[Record]) -> Counter[str]:
    return Counter(record.kind for record in records if isinstance(record, Sent))


def _answered(records: Iterable[Record]) -> int:
    return sum(getattr(record, "outcome", "") == ANSWERED for record in records)


def progress(evidence: Evidence, steps: list[Step]) -> str:
    """A line on how far it is."""
    traffic = _traffic(evidence)
    migrations = sum(step.kind == MIGRATE for step in steps)
    return (
        f"{len(steps)} faults, {migrations} migrations; {traffic['calls_answered']} of"
        f" {traffic['calls']} calls answered, {traffic['ran']} methods run"
    )


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"  {title:34} {found[name]:10}" for name, title in ROWS]
    lines.append("  let pass, as the documents allow:")
    lines += [f"    {name:52} {count:6}" for name, count in found["exemptions"].items()]
    lines.append("  faults:")
    lines += [f"    {kind:22} {count:6}" for kind, count in found["by_kind"].items()]
    lines += [f"  could not be carried out: {text}" for text in found["failed"][:10]]
    lines += [f"  BROKEN: {text}" for text in found["violations"][:40]]
    return "\n".join(lines)
