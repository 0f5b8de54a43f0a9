"""What changes on a host, by what its daemon says of it twice: states, topics, problems, rates.

Pure: no I/O, no clock. What begins and ends between two looks is not seen, unless a counter has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

VmRows = Mapping[str, Mapping[str, Any]]
"""The rows of the daemon's method `list`, by UUID."""

COUNTED: Final = {
    "sessions": "sessions begun anew",
    "losses": "losses detected and repaired",
    "violations": "breaches of the protocol",
    "reconnects": "connections to the channel's socket lost",
    "cures": "silent channels connected anew",
    "throttled": "times read more slowly, to keep its limits",
    "quarantines": "quarantines",
    "faults": "faults of vchan-host's own",
    "redelivered": "requests handed out again by the broker",
    "casts_refused": "casts dropped: the guest refused them",
    "casts_agent_gone": "casts dropped: their agent went away with them",
    "casts_expired": "casts dropped: their time was over",
    "casts_too_large": "casts dropped: larger than a message may be",
    "undecodable": "messages dropped: they could not be read",
    "parked": "messages put aside, because they broke the daemon",
    "dropped_by_broker": "messages taken back and dropped by the broker",
    "replies_denied": "replies denied by the policy",
    "replies_given_up": "replies whose caller did not come back",
    "guest_denied": "requests of the guest's denied by the policy",
    "guest_refused": "requests of the guest's refused by a limit",
    "guest_redelivered": "requests of the guest's published again, and marked so",
    "guest_unroutable": "requests of the guest's that nobody serves",
}
"""The counters that an operator wants to see grow, with what they count."""

RATES: Final = {
    "calls": ("answered",),
    "casts": ("taken",),
    "from_guest": ("guest_requests",),
    "sent": ("frames_sent",),
    "received": ("frames_received",),
    "resent": ("frames_resent",),
    "losses": ("losses",),
}
"""What `vchan top` shows a second, with the counters that it is the sum of."""


class Change(NamedTuple):
    """One thing that is otherwise than it was.

    Attributes:
        event: came, went, domain, channel, problem, topics, daemon, or a counter's name.
        uuid: The VM's; "" for the daemon.
    """

    event: str
    uuid: str
    name: str
    before: str
    after: str
    text: str


# ---------------------------------------------------------------- watch


def changes(before: VmRows, after: VmRows) -> Iterator[Change]:
    """What is otherwise with the VMs, in the order of their names."""
    for uuid in sorted({*before, *after}, key=lambda uuid: _name(before, after, uuid)):
        old, new = before.get(uuid), after.get(uuid)
        name = _name(before, after, uuid)
        if old is None and new is not None:
            yield Change("came", uuid, name, "", new["channel"], _came(new))
        elif new is None and old is not None:
            yield Change("went", uuid, name, old["channel"], "", "is no more on this host")
        elif old is not None and new is not None:
            yield from _differences(uuid, old, new)


def _name(before: VmRows, after: VmRows, uuid: str) -> str:
    row = after.get(uuid) or before[uuid]
    return str(row["name"])


def _came(row: Mapping[str, Any]) -> str:
    serves = f", serves {', '.join(row['topics'])}" if row["topics"] else ""
    return f"is here: {row['domain']}, channel {row['channel']}{serves}"


def _differences(uuid: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    name = new["name"]
    for what in ("domain", "channel"):
        if old[what] != new[what]:
            text = f"{what} {old[what]} -> {new[what]}"
            yield Change(what, uuid, name, old[what], new[what], text)
    if _lasting(old["problem"]) != _lasting(new["problem"]):
        text = f"problem: {new['problem']}" if new["problem"] else "problem is over"
        yield Change("problem", uuid, name, old["problem"] or "", new["problem"] or "", text)
    if old["topics"] != new["topics"]:
        more = [f"serves {topic}" for topic in new["topics"] if topic not in old["topics"]]
        less = [f"serves {topic} no more" for topic in old["topics"] if topic not in new["topics"]]
        was, now = (", ".join(row["topics"]) for row in (old, new))
        yield Change("topics", uuid, name, was, now, "; ".join([*more, *less]))


def _lasting(problem: str | None) -> str:
    """A problem without its numbers: seconds that are left are no news."""
    return "".join(letter for letter in problem or "" if not letter.isdigit())


def daemon_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """What is otherwise with the daemon, by its status."""
    for what in ("libvirt", "broker", "broker_blocked", "policy", "version"):
        was, now = (str(status.get(what) or "") for status in (old, new))
        if was != now:
            yield Change("daemon", "", "vchan-host", was, now, f"{what}: {now or 'no more'}")


def grown(uuid: str, name: str, old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[Change]:
    """The counters that have grown, of those in COUNTED."""
    for counter, text in COUNTED.items():
        was, now = old.get(counter, 0), new.get(counter, 0)
        if now > was:
            yield Change(counter, uuid, name, str(was), str(now), f"{now - was} {text}")


def counters_of(status: Mapping[str, Any]) -> dict[str, int]:
    """A VM's counters in one table, from its status."""
    requests = status.get("requests") or {}
    tables = (
        status.get("session") or {},
        status.get("channel") or {},
        requests.get("from_guest") or {},
        requests,
    )
    return {
        name: value for table in tables for name, value in table.items() if isinstance(value, int)
    }


# ---------------------------------------------------------------- top


def rates(
    rows: Iterable[Mapping[str, Any]],
    before: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
    passed_s: float,
) -> list[dict[str, Any]]:
    """A line of `vchan top` for each VM that has a channel.

    Args:
        rows: What the daemon's method `list` returns.
        before, after: VMs' status by UUID, `passed_s` seconds apart.
    """
    shown = []
    for row in rows:
        status = after.get(row["uuid"])
        if status is None or row["channel"] == "none":
            continue
        new = counters_of(status)
        old = counters_of(before.get(row["uuid"], status))
        requests = status.get("requests") or {}
        line: dict[str, Any] = {"name": row["name"], "uuid": row["uuid"], "channel": row["channel"]}
        for name, counters in RATES.items():
            more = sum(max(0, new.get(each, 0) - old.get(each, 0)) for each in counters)
            line[name] = round(more / passed_s, 1)
        line["open"] = requests.get("open", 0)
        line["backlog"] = status.get("backlog_bytes", 0)
        line["problem"] = row["problem"]
        shown.append(line)
    return shown
