"""How long a VM that migrates cannot be called, and what takes the time, step by step.

Both hosts' daemons and the guest's tell the steps in their debug logs (`vchan.io.steps`). Hosts'
clocks are this machine's; of the guest's steps only what lies between two of them counts.

A guest that has moved runs on a processor that knows nothing of it: what is emulated is translated
anew, and caches are empty. So the same is measured without that: the daemon of the host is killed
and started, and all of the arrival happens again, in a guest that stayed where it was. That much
is vchan's own; what a migration takes more is the guest's and QEMU's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from tests.rig import RigError
from tests.rig.cloud import AGENT, Cloud, Vm
from tests.rig.compute import GUEST_DAEMON
from vchan.guest import arrivals as guest
from vchan.host.vm import channel as host

CALLS_BETWEEN: Final = 40
"""Answered after an arrival before the next one: then everything is as it was."""
HUSHED: Final = "the source is hushed"
RESUMED: Final = "libvirt says that it runs here"
CALLER: Final = "a caller has an answer"
AIM_MS: Final = 40

_LINE: Final = re.compile(r"(arrival|departure) at (\d+\.\d+) s, (.*)in ms: (.*)")
_STEP: Final = re.compile(r"([a-z' ]+) (\d+\.\d)\b")
_CAME: Final = re.compile(r"libvirt says at (\d+\.\d+) s: resumed after a migration")

_SHOWN: Final = (
    host.TOLD,
    host.GREETED,
    host.OPENED,
    host.TOPICS,
    host.DELIVERED,
    host.SENT,
    host.ANSWERED,
)
_WAITS: Final = {
    host.OPENED: (guest.GREETED, guest.WROTE),
    host.TOPICS: (guest.OPENED, guest.TOPICS),
    host.ANSWERED: (guest.REQUEST, guest.ANSWERED),
}
"""Steps of the host that wait for the guest, with those between which the guest's daemon and its
agent work at that."""


class Told(NamedTuple):
    """A line of a log.

    Attributes:
        at_s: Of the first step.
        steps: Seconds since that one, in order.
    """

    at_s: float
    steps: dict[str, float]


class Row(NamedTuple):
    """A step of the table.

    Attributes:
        at_ms: After the beginning: libvirt's word, or when the daemon may speak.
        took_ms: Since the step before.
        in_guest_ms: Of that, between two steps in the guest: of its daemon, and of the agent. None:
            nobody waited for it.
    """

    step: str
    at_ms: float
    took_ms: float
    in_guest_ms: float | None = None


class Arrival(NamedTuple):
    """One, from the host's log and the guest's, and when the caller had an answer."""

    host: Told
    guest: Told
    answered_s: float


def told(text: str, what: str) -> list[Told]:
    """The arrivals, or departures, of a log that came to their ends."""
    found = []
    for kind, at_s, trouble, steps in _LINE.findall(text):
        if kind == what and not trouble:
            taken = {name.strip(): float(ms) / 1e3 for name, ms in _STEP.findall(steps)}
            found.append(Told(float(at_s), taken))
    return found


def rows(before: Mapping[str, float], begin_s: float, arrival: Arrival) -> list[Row]:
    """One arrival.

    Args:
        before: Steps before it, and when.
        begin_s: What all times count from.
    """
    at_host = arrival.host
    times = {**before, **{step: at_host.at_s + at_host.steps[step] for step in _SHOWN}}
    times[CALLER] = arrival.answered_s
    found: list[Row] = []
    for step, at_s in times.items():
        in_guest_ms = None
        if step in _WAITS:
            first, last = (arrival.guest.steps[name] for name in _WAITS[step])
            in_guest_ms = (last - first) * 1e3
        at_ms = (at_s - begin_s) * 1e3
        took_ms = at_ms - found[-1].at_ms if found else 0.0
        found.append(Row(step, at_ms, took_ms, in_guest_ms))
    return found


def run(directory: Path, *, migrations: int) -> dict[str, Any]:
    """Migrate a VM that one caller calls all the time; then kill and start its host's daemon as
    often."""
    with Cloud(directory) as cloud:
        for each in (cloud.a, cloud.b):
            each.daemon.debug = True
        daemon = replace(GUEST_DAEMON, command=f"{GUEST_DAEMON.command} --debug")
        with cloud.using(cloud.url):
            vm = cloud.boot("measured", (daemon, AGENT))
            console = cloud.a.libvirt.console_path(vm.name)
            resumed_s = []
            with vm.traffic(callers=1, casts_per_s=0, fanouts_per_s=0) as traffic:
                for _ in range(migrations):
                    traffic.flows(CALLS_BETWEEN)
                    vm.migrate()
                    vm.wait_ready()
                    resumed_s.append(_resumed_s(vm))
                for _ in range(migrations):
                    traffic.flows(CALLS_BETWEEN)
                    vm.here.daemon.restart()
                    vm.wait_ready()
                traffic.flows(CALLS_BETWEEN)
                report = traffic.finish()
            report.check()
            logs = [each.daemon.log.read_text() for each in (cloud.a, cloud.b)]
            vm.discard()
        said = console.read_text(errors="replace")
    departures = sorted(each for log in logs for each in told(log, "departure"))
    arrivals = _arrivals(logs, said, report.answers_s, 2 * migrations)
    if len(departures) != migrations:
        raise RigError(f"{len(departures)} departures are told, of {migrations}")
    return {
        "migrations": [
            rows({HUSHED: left.at_s, RESUMED: at_s}, at_s, arrival)
            for left, at_s, arrival in zip(departures, resumed_s, arrivals, strict=False)
        ],
        "restarts": [rows({}, each.host.at_s, each) for each in arrivals[migrations:]],
        "call_ms": median(report.round_trips_s) * 1e3,
    }


def _resumed_s(vm: Vm) -> float:
    """When libvirt said of the last migration that the VM runs where it is now."""
    lines = [line for line in vm.here.daemon.log.read_text().splitlines() if vm.uuid in line]
    resumed = [float(match[1]) for line in lines if (match := _CAME.search(line))]
    if not resumed:
        raise RigError(f"{vm.here.name} has not heard that {vm.name} has come")
    return resumed[-1]


def _arrivals(
    logs: Sequence[str], console: str, answers_s: Sequence[float], count: int
) -> list[Arrival]:
    """The last `count`, joined. Those before are of the VM's start."""
    at_hosts = sorted(each for log in logs for each in told(log, "arrival"))
    in_guest = told(console, "arrival")
    if min(len(at_hosts), len(in_guest)) < count:
        raise RigError(f"arrivals: {len(at_hosts)} at hosts, {len(in_guest)} in the guest")
    found = []
    for at_host, inside in zip(at_hosts[-count:], in_guest[-count:], strict=True):
        at_s = at_host.at_s + at_host.steps[host.ANSWERED]
        found.append(Arrival(at_host, inside, min(each for each in answers_s if each >= at_s)))
    return found


def table(result: Mapping[str, Any]) -> str:
    """The result, for people."""
    moved, stayed = _summed(result["migrations"]), _summed(result["restarts"])
    lines = [
        f"medians of {len(result['migrations'])} each, ms; one caller, one call after the other",
        f"{'':<34}{'a guest that has moved':>30}{'that has not':>30}",
        f"{'':<34}" + f"{'at':>10}{'took':>10}{'daemons':>10}" * 2,
    ]
    for step, row in moved.items():
        lines.append(f"{step:<34}{_cells(row)}{_cells(stayed.get(step))}")
    begins = moved[host.TOLD].at_ms
    gap_ms, ours_ms = moved[CALLER].at_ms, begins + stayed[CALLER].at_ms
    before, after = result["load"]
    return "\n".join(
        [
            *lines,
            "daemons: of what the host waits for the guest, the work of its daemon and agent",
            "",
            f"the gap, from libvirt's word to the answer   {gap_ms:>8.1f}",
            f"of it vchan's own: as in a guest that stayed {ours_ms:>8.1f}   aim <= {AIM_MS}",
            f"of it the guest's: a processor that is new   {gap_ms - ours_ms:>8.1f}",
            f"a call otherwise                             {result['call_ms']:>8.1f}",
            f"machine's load: {before:.1f} before, {after:.1f} after",
        ]
    )


def _summed(arrivals: Sequence[Sequence[Sequence[Any]]]) -> dict[str, Row]:
    """Medians, by step."""
    each = [Row(*row) for rows_of_one in arrivals for row in rows_of_one]
    steps = dict.fromkeys(row.step for row in each)
    return {step: _medians([row for row in each if row.step == step]) for step in steps}


def _medians(of: Sequence[Row]) -> Row:
    in_guest = [row.in_guest_ms for row in of if row.in_guest_ms is not None]
    return Row(
        of[0].step,
        median(row.at_ms for row in of),
        median(row.took_ms for row in of),
        median(in_guest) if in_guest else None,
    )


def _cells(row: Row | None) -> str:
    if row is None:
        return " " * 30
    in_guest = "" if row.in_guest_ms is None else f"{row.in_guest_ms:.1f}"
    return f"{row.at_ms:>10.1f}{row.took_ms:>10.1f}{in_guest:>10}"
