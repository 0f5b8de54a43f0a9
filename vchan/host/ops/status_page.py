"""The status page: what this host's daemons say of themselves and of their VMs, as HTML.

Pure: no I/O, no clock. VMs' names, topics and reasons are guests' and tenants' words. A page is a
tree of elements that is written out at the end, so that no word can become an element. It has no
script at all.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from xml.etree.ElementTree import Element, tostring

from vchan import __version__
from vchan.host.ops.asking import HostAnswers
from vchan.host.ops.doctor import Finding, Level, examine_daemon, examine_rows, examine_vm
from vchan.session import printable

REFRESH_S: Final = 10
"""From one look of a browser at the page to its next."""
VM_ROWS_MAX: Final = 1000
"""VMs of a host that the page shows: a browser's table of more is slow to look at. At it: those
without a finding are left out first, and the page says how many."""
TEXT_CHARS_MAX: Final = 300
"""Of any one word of others on the page: a reason may hold a message. At it: the rest is cut."""
TOPICS_MAX: Final = 8
"""Topics that a VM's row names. At it: the row says how many more there are."""
ADDRESSES_MAX: Final = 4
"""Addresses of a guest that its row has. At it: the row says how many more there are."""

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8886; --soft: #888; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5em auto; max-width: 99em; padding: 0 1em; }
h1 { font-size: 1.5em; margin: 1em 0 .2em; } h2 { font-size: 1.1em; margin: 1.4em 0 .3em; }
p { margin: .2em 0; } .soft { color: var(--soft); }
ul.parts, ul.numbers { display: flex; flex-wrap: wrap; gap: .5em; list-style: none; margin: .6em 0;
  padding: 0; }
ul.numbers li { border: 1px solid var(--line); border-radius: .4em; min-width: 9em;
  padding: .4em .8em; }
ul.numbers b { display: block; font-size: 1.5em; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .3em .6em; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.mark { border-radius: .3em; padding: .05em .5em; white-space: nowrap; color: #fff; }
.ok { background: #28713a; } .warning { background: #8f5a00; } .problem { background: #b3261e; }
.none { background: #666; }
td.guest { min-width: 16em; }
code { font-size: .8em; white-space: nowrap; }
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""The page's Content-Security-Policy: its own style, and nothing else at all."""

_NUMBERS: Final = (
    ("Requests into guests", ("requests",), "/s"),
    ("Requests out of guests", ("guest_requests",), "/s"),
    ("Frames", ("frames_sent", "frames_received"), "/s"),
    ("Losses detected and repaired", ("losses",), ""),
    ("Frames lost in them", ("frames_lost",), ""),
    ("Frames sent again", ("frames_resent",), ""),
    ("Sessions resumed", ("resumptions",), ""),
    (
        "Messages dropped",
        (
            "casts_refused",
            "casts_agent_gone",
            "casts_expired",
            "casts_too_large",
            "undecodable",
            "dropped_by_broker",
            "parked",
        ),
        "",
    ),
)
"""What a host's counters are shown as: title, counters, and "/s" if as a rate."""

_MARKS: Final = {
    "ready": "ok",
    "booting": "warning",
    "refused": "problem",
    "quarantined": "warning",
    "connecting": "warning",
    "waiting": "warning",
}


class Look(NamedTuple):
    """One look at a daemon.

    Attributes:
        socket: Of the daemon.
        at_s: When, on a clock of the asker's that only goes forward.
        told: What it told; None if it did not answer.
        problem: Why it did not.
    """

    socket: str
    at_s: float
    told: HostAnswers | None
    problem: str = ""


def page(looks: Iterable[tuple[Look | None, Look]]) -> bytes:
    """The page, as UTF-8.

    Args:
        looks: Of each daemon the one before, for the rates, and the last.
    """
    sections = [part for before, now in looks for part in _host(before, now)]
    head = _element(
        "head",
        _element("meta", charset="utf-8"),
        _element("meta", name="viewport", content="width=device-width"),
        _element("meta", {"http-equiv": "refresh"}, content=str(REFRESH_S)),
        _element("title", "vchan"),
        _element("style", _STYLE),
    )
    html = _element("html", head, _element("body", *sections), lang="en")
    written: bytes = tostring(html, "utf-8", method="html")
    return b"<!DOCTYPE html>\n" + written


# ---------------------------------------------------------------- a host


def _host(before: Look | None, now: Look) -> list[Element]:
    told = now.told
    if told is None:
        return [
            _element("h1", _bdi(now.socket)),
            _element("p", _mark("problem", "no answer"), " ", _bdi(now.problem)),
        ]
    status = told.status
    since_s = now.at_s - before.at_s if before and before.told else 0.0
    earlier = before.told if before and since_s > 0 else None
    about = f"vchan {status['version']} · {now.socket}"
    findings = {row["uuid"]: _vm_findings(row, told) for row in told.rows}
    daemon = examine_daemon(status, __version__)
    of_vms = [finding for each in findings.values() for finding in each]
    every = [*daemon, *examine_rows(told.rows), *of_vms]
    return [
        _element("h1", _bdi(status["host"])),
        _element("p", _bdi(about), {"class": "soft"}),
        _element("ul", *map(_part, daemon), {"class": "parts"}),
        _element("ul", *_channels(told.rows), {"class": "parts"}),
        _element("ul", *_numbers(status, earlier, since_s), {"class": "numbers"}),
        *_problems([finding for finding in every if finding.level is not Level.OK]),
        *_vms(told, earlier, since_s, findings),
    ]


def _vm_findings(row: Mapping[str, Any], told: HostAnswers) -> list[Finding]:
    untold = told.untold.get(row["uuid"])
    if untold is not None:
        return [Finding(Level.PROBLEM, row["name"], untold)]
    return examine_vm(row, told.vms.get(row["uuid"], {}))


def _part(finding: Finding) -> Element:
    return _element("li", _mark(finding.level.value, finding.where), " ", _bdi(finding.text))


def _channels(rows: Sequence[Mapping[str, Any]]) -> list[Element]:
    count = Counter(row["channel"] for row in rows)
    total = _element("li", f"{len(rows)} domains:")
    return [
        total,
        *(_element("li", _state(state), f" {number}") for state, number in sorted(count.items())),
    ]


def _numbers(
    status: Mapping[str, Any], earlier: HostAnswers | None, since_s: float
) -> Iterable[Element]:
    totals = status["totals"]
    for title, counters, unit in _NUMBERS:
        value = sum(totals.get(name, 0) for name in counters)
        if unit:
            before = earlier.status["totals"] if earlier else {}
            text = _rate(value, sum(before.get(name, 0) for name in counters), earlier, since_s)
        else:
            text = f"{value:,}"
        yield _element("li", _element("b", text), title)


def _rate(now: int, before: int, earlier: HostAnswers | None, since_s: float) -> str:
    """Per second; a dash if it is not known: at the first look, or as the counter began anew."""
    if earlier is None or now < before:
        return "-"
    return f"{(now - before) / since_s:,.1f} /s"


def _problems(findings: Sequence[Finding]) -> list[Element]:
    if not findings:
        return [_element("h2", "Problems"), _element("p", "none", {"class": "soft"})]
    rows = [
        _element(
            "tr",
            _element("td", _mark(level.value, level.value)),
            _element("td", _bdi(where)),
            _element("td", _bdi(text)),
            _element("td", _bdi(remedy)),
        )
        for level, where, text, remedy in _worst_first(findings)
    ]
    title = _element("h2", "Problems")
    shown = [title, _table(("", "where", "what", "what to do"), rows[:VM_ROWS_MAX])]
    return shown + _left_out(len(rows) - VM_ROWS_MAX, "problems")


def _worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: finding.level is not Level.PROBLEM)


# ---------------------------------------------------------------- its VMs


def _vms(
    told: HostAnswers,
    earlier: HostAnswers | None,
    since_s: float,
    findings: Mapping[str, Sequence[Finding]],
) -> list[Element]:
    rows = sorted(told.rows, key=lambda row: (not findings[row["uuid"]], row["name"]))
    shown = [
        _vm(row, told.vms.get(row["uuid"], {}), earlier, since_s) for row in rows[:VM_ROWS_MAX]
    ]
    head = (
        "name",
        "domain",
        "channel",
        "guest, as it says",
        "topics",
        "in",
        "out",
        "open",
        "waiting",
        "losses",
        "problem",
    )
    if not rows:
        return [_element("h2", "VMs"), _element("p", "none", {"class": "soft"})]
    left_out = _left_out(len(rows) - VM_ROWS_MAX, "VMs")
    return [_element("h2", "VMs"), _table(head, shown, _VM_NUMBERS), *left_out]


_VM_NUMBERS: Final = ("in", "out", "open", "waiting", "losses")


def _vm(
    row: Mapping[str, Any], vm: Mapping[str, Any], earlier: HostAnswers | None, since_s: float
) -> Element:
    before = earlier.vms.get(row["uuid"], {}) if earlier else {}
    requests = vm.get("requests", {})
    numbers: list[str]
    if requests:
        known = earlier if "requests" in before else None
        was = before.get("requests", {})
        into = _rate(requests["requests"], was.get("requests", 0), known, since_s)
        out = requests["from_guest"]["guest_requests"]
        out_was = was.get("from_guest", {}).get("guest_requests", 0)
        numbers = [
            into,
            _rate(out, out_was, known, since_s),
            f"{requests['open'] + requests['from_guest']['open']:,}",
            f"{vm['backlog_bytes']:,} B",
            f"{vm['session']['losses']:,}",
        ]
    else:
        numbers = [""] * len(_VM_NUMBERS)
    return _element(
        "tr",
        _element("td", _bdi(row["name"]), _element("br"), _element("code", _bdi(row["uuid"]))),
        _element("td", _bdi(row["domain"])),
        _element("td", _state(row["channel"])),
        _element("td", *_guest(row.get("guest") or {}), {"class": "guest"}),
        _element("td", *_listed(row["topics"], TOPICS_MAX)),
        *(_element("td", number, {"class": "number"}) for number in numbers),
        _element("td", _bdi(row["problem"] or "")),
    )


def _guest(guest: Mapping[str, Any]) -> Iterable[Element | str]:
    """What it has reported of itself: its claim."""
    if guest.get("phase"):
        yield from (_state(guest["phase"]), " ")
    if guest.get("os"):
        yield _bdi(guest["os"])
    if guest.get("addresses"):
        yield _element("br")
        yield from _listed(guest["addresses"], ADDRESSES_MAX)


def _listed(words: Sequence[str], most: int) -> Iterable[Element | str]:
    for number, word in enumerate(words[:most]):
        yield from ([", "] if number else [])
        yield _bdi(word)
    if len(words) > most:
        yield f" and {len(words) - most} more"


def _left_out(count: int, what: str) -> list[Element]:
    return [_element("p", f"{count} more {what} are not shown here")] if count > 0 else []


# ---------------------------------------------------------------- elements


def _element(tag: str, *parts: Element | str | Mapping[str, str], **attributes: str) -> Element:
    """Of elements and texts; mappings are attributes whose names are none of Python's."""
    made = Element(tag, attributes)
    last: Element | None = None
    for part in parts:
        if isinstance(part, str):
            if last is None:
                made.text = (made.text or "") + part
            else:
                last.tail = (last.tail or "") + part
        elif isinstance(part, Element):
            made.append(part)
            last = part
        else:
            made.attrib.update(part)
    return made


def _bdi(text: object) -> Element:
    """A word of others: bounded, of printable characters, its writing direction its own affair."""
    said = str(text)
    cut = said if len(said) <= TEXT_CHARS_MAX else said[: TEXT_CHARS_MAX - 1] + "…"
    return _element("bdi", printable(cut))


def _mark(kind: str, text: str) -> Element:
    return _element("span", _bdi(text), {"class": f"mark {kind}"})


def _state(state: str) -> Element:
    return _mark(_MARKS.get(state, "none"), state)


def _table(head: Sequence[str], rows: Iterable[Element], numbers: Sequence[str] = ()) -> Element:
    titles = (
        _element("th", title, {"class": "number"} if title in numbers else {}) for title in head
    )
    return _element("table", _element("thead", _element("tr", *titles)), _element("tbody", *rows))
