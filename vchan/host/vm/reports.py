"""What one guest has told of itself: the last word of each kind, bounded.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`.
2. It is the guest's claim, and may be anything: it is kept to be shown, and nothing is decided by
   it. Who the VM is, the policy's `Facts` say, which come from libvirt.
3. What is kept has so many values, of such length, and no character that a terminal or a log would
   obey. What is beyond is refused whole: a guest's daemon that works keeps below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any, Final

from vchan.errors import VchanError
from vchan.host.policy.token_bucket import TokenBucket
from vchan.rpc.reports import AGENTS, FACTS, METRICS, PHASE, PHASES, WHAT
from vchan.session import printable

VALUES_MAX: Final = 600
"""Values in one report, keys not counted: 64 units have four each, 32 addresses five. At it: the
report is refused."""
DEPTH_MAX: Final = 5
"""Objects and lists within each other. At it: the report is refused."""
TEXT_CHARS_MAX: Final = 255
"""Of a text or key: as long as a name may be. At it: the report is refused."""
NUMBER_MAX: Final = 2**63
"""Of a number, its sign apart: bytes of the largest disk. At it: the report is refused."""
REPORTS_PER_S: Final = 0.5
"""A guest's daemon reports changes once a second at most, and nothing changes all the time. At it:
Returned: BUSY, on record; it is told again later."""
REPORTS_BURST: Final = 30.0
"""Reports at once, after a quiet time: units that are started, interfaces that come up."""
ADDRESSES_SHOWN_MAX: Final = 8
"""Addresses in the list of VMs; `vchan facts` has all."""
FILE_SYSTEMS_SHOWN_MAX: Final = 16
"""File systems of a VM that have metrics of their own: each is a time series. The first count."""


class BadReport(VchanError):
    """A report is not kept; says why."""


class TooManyReports(BadReport):
    """Not now; another time it is."""


class Reports:
    """The reports of one VM."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[dict[str, Any], float]] = {}
        self._heard: set[str] = set()  # kinds of which services know what is kept
        self._rate = TokenBucket(REPORTS_PER_S, REPORTS_BURST)

    def note(self, what: str, args: Mapping[str, Any], now_s: float) -> dict[str, Any] | None:
        """Keep a report.

        Args:
            what: One of `WHAT`.
            args: As the guest sent them: any JSON.

        Returns:
            The report, if services are to hear of it: it is not what they have `heard`, and no
            other host has told them, as far as the guest says.

        Raises:
            TooManyReports, BadReport: Nothing was kept.
        """
        assert what in WHAT, "the policy has judged it by this name"
        if not self._rate.try_take(1.0, now_s):
            text = f"more than {REPORTS_BURST:.0f} reports at once, or {REPORTS_PER_S:g} a second"
            raise TooManyReports(f"{text} (REPORTS_BURST, REPORTS_PER_S)")
        report = args.get("report")
        if not isinstance(report, dict):
            raise BadReport('expected "report", an object')
        kept = _Cleaning().clean(report, DEPTH_MAX)
        assert isinstance(kept, dict)
        if what == PHASE and kept.get("phase") not in PHASES:
            raise BadReport(f'expected "phase", one of {", ".join(PHASES)}')
        if what not in self._kept or self._of(what) != kept:
            self._heard.discard(what)
        self._kept[what] = (kept, now_s)
        if args.get("known") is True or what == METRICS:
            self._heard.add(what)
        return None if what in self._heard else kept

    def heard(self, what: str, report: Mapping[str, Any]) -> None:
        """Services have heard of a report; it may not be the last any more."""
        if what in self._kept and self._of(what) == report:
            self._heard.add(what)

    def shown(self, now_s: float) -> dict[str, Any]:
        """Everything, by kind, with how old each is: for `vchan facts`."""
        return {
            what: {"age_s": round(now_s - self._kept[what][1], 1), **self._kept[what][0]}
            for what in WHAT
            if what in self._kept
        }

    def row(self) -> dict[str, Any]:
        """What a list of VMs shows. `addresses`: those that are some, by their text."""
        facts, phase = self._of(FACTS), self._of(PHASE)
        system = facts.get("os")
        return {
            "phase": phase.get("phase"),
            "hostname": _text(facts.get("hostname")),
            "os": _text(system.get("pretty_name")) if isinstance(system, dict) else None,
            "addresses": list(_addresses(facts))[:ADDRESSES_SHOWN_MAX],
            "agents_failed": sorted(_failed_agents(self._of(AGENTS))),
        }

    def measured(self) -> dict[str, Any]:
        """Its metrics, as far as they are numbers that we know: for Prometheus."""
        metrics = self._of(METRICS)
        memory, load = metrics.get("memory"), metrics.get("load")
        return {
            "memory": _numbers(memory) if isinstance(memory, dict) else {},
            "load": load[0] if isinstance(load, list) and load and _is_number(load[0]) else None,
            "file_systems": dict(_file_systems(metrics)),
        }

    def _of(self, what: str) -> dict[str, Any]:
        return self._kept[what][0] if what in self._kept else {}


class _Cleaning:
    """A copy of what a guest sent, with as many values as one report may have."""

    def __init__(self) -> None:
        self._left = VALUES_MAX

    def clean(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise BadReport(f"over {VALUES_MAX} values (VALUES_MAX)")
        match value:
            case None | bool():
                return value
            case int() | float():
                return _number(value)
            case str():
                return _plain(value)
            case dict() | list() if depth == 0:
                raise BadReport(f"over {DEPTH_MAX} objects within each other (DEPTH_MAX)")
            case dict():
                return {_plain(key): self.clean(each, depth - 1) for key, each in value.items()}
            case list():
                return [self.clean(each, depth - 1) for each in value]
            case _:
                raise BadReport(f"a value is {type(value).__name__}")


def _number(value: int | float) -> int | float:
    if not -NUMBER_MAX < value < NUMBER_MAX:  # nor what is no number
        raise BadReport("a number is too large (NUMBER_MAX)")
    return value


def _plain(text: str) -> str:
    if len(text) > TEXT_CHARS_MAX:
        raise BadReport(f"a text of {len(text)} characters; TEXT_CHARS_MAX is {TEXT_CHARS_MAX}")
    return printable(text)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    known = ("total_bytes", "available_bytes", "swap_total_bytes", "swap_free_bytes")
    return {name: values[name] for name in known if _is_number(values.get(name))}


def _addresses(facts: Mapping[str, Any]) -> Iterator[str]:
    """Those that are some, those of a link alone last."""
    found = []
    rows = facts.get("addresses")
    for row in rows if isinstance(rows, list) else ():
        text = row.get("address") if isinstance(row, dict) else None
        try:
            found += [ip_address(text)] if isinstance(text, str) else []
        except ValueError:
            continue
    yield from map(str, sorted(found, key=lambda each: each.is_link_local))


def _failed_agents(agents: Mapping[str, Any]) -> Iterator[str]:
    units = agents.get("units")
    for name, unit in units.items() if isinstance(units, dict) else ():
        if isinstance(unit, dict) and unit.get("state") in ("failed", "broken", "waiting"):
            yield name


def _file_systems(metrics: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    rows = metrics.get("file_systems")
    for row in rows[:FILE_SYSTEMS_SHOWN_MAX] if isinstance(rows, list) else ():
        if isinstance(row, dict) and isinstance(row.get("path"), str):
            known = ("bytes", "available_bytes", "files", "free_files")
            yield row["path"], {name: row[name] for name in known if _is_number(row.get(name))}
