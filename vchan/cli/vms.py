"""list, status, attach, detach, release: this host's VMs and their channels."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

from vchan.cli.arguments import VM, add_vm
from vchan.cli.failures import EXIT_OK
from vchan.cli.host import as_known, connected, pattern, say_if_old
from vchan.cli.output import cell, is_shaped, printable, show_record, show_rows, text_line

COLUMNS: Final = (
    *("name", "server", "project_name", "uuid", "domain", "channel"),
    *("address", "os", "topics", "problem"),
)
"""Of `vchan list`."""
_IF_ANY: Final = frozenset({"server", "project_name", "address", "os", "problem"})
"""Columns that are there if one VM at least has something for them."""

_FILTERS: Final = {
    "name": ("NAME", "only VMs of this name; * and ? stand for any letters"),
    "server": ("NAME", "only servers of this name of nova's, which need not be one alone"),
    "project": ("PROJECT", "only servers of this project: its id, or its name"),
    "domain": ("STATE", "only domains in this state of libvirt's: running, paused, shutoff ..."),
    "channel": ("STATE", "only channels in this state: ready, waiting, quarantined, none ..."),
    "topic": ("TOPIC", "only VMs whose agents serve this topic, or EXCHANGE/TOPIC"),
}


def add_commands(commands: Any) -> None:
    """The commands of this group."""
    rows = commands.add_parser(
        "list",
        help="the host's domains and their channels",
        description="List the host's domains, by name, with the state of each one's channel.",
    )
    for name, (metavar, text) in _FILTERS.items():
        rows.add_argument(f"--{name}", metavar=metavar, help=text)
    rows.add_argument(
        "--problems", action="store_true", help="only VMs that somebody should look at"
    )
    rows.set_defaults(run=_list)
    status = commands.add_parser(
        "status",
        help="the daemon, or one VM, in detail",
        description="Say how vchan-host is, or one VM. --json has every counter.",
    )
    add_vm(status, nargs="?", what=f"{VM} [the daemon itself]")
    status.set_defaults(run=_status)
    for name, done, text in (
        ("attach", "attached", "give a VM a channel, now and for its next boots"),
        ("detach", "detached", "take a VM's channel away, now and for its next boots"),
        ("release", "released", "end a VM's quarantine"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_vm(command)
        command.set_defaults(run=partial(_change, done))


# ---------------------------------------------------------------- list


def _list(options: argparse.Namespace) -> int:
    wanted = _wanted(options)
    with connected(options) as host:
        rows = [row for row in host.ask("list") if all(test(row) for test in wanted)]
        rows = [{**row, **_claimed(row.pop("guest", None) or {})} for row in rows]
        say_if_old(host.ask("status"))
    rows.sort(key=lambda row: (row["name"].casefold(), row["uuid"]))
    names = [name for name in COLUMNS if name not in _IF_ANY or any(row.get(name) for row in rows)]
    show_rows(options, rows, names)
    return EXIT_OK


def _claimed(guest: Mapping[str, Any]) -> dict[str, str]:
    """What a guest says of itself, as far as a list has room for it."""
    addresses = guest.get("addresses") or [""]
    return {"address": addresses[0], "os": guest.get("os") or ""}


def _wanted(options: argparse.Namespace) -> list[Callable[[Mapping[str, Any]], bool]]:
    """What a row must pass to be listed."""
    tests: list[Callable[[Mapping[str, Any]], bool]] = []
    for name in ("name", "domain", "channel"):
        glob = getattr(options, name)
        if glob is not None:
            tests.append(partial(_is, name, pattern(glob)))
    if options.server is not None:
        tests.append(partial(_is, "server", pattern(options.server)))
    if options.project is not None:
        tests.append(partial(_belongs, pattern(options.project)))
    if options.topic is not None:
        tests.append(partial(_serves, pattern(options.topic)))
    if options.problems:
        tests.append(lambda row: bool(row["problem"]))
    return tests


def _is(name: str, glob: Any, row: Mapping[str, Any]) -> bool:
    return bool(glob.match(row.get(name) or ""))


def _belongs(glob: Any, row: Mapping[str, Any]) -> bool:
    names = (row.get("project"), row.get("project_name"))
    return any(glob.match(name) for name in names if name)


def _serves(glob: Any, row: Mapping[str, Any]) -> bool:
    return any(glob.match(each) or glob.match(each.partition("/")[2]) for each in row["topics"])


# ---------------------------------------------------------------- status


def _status(options: argparse.Namespace) -> int:
    with connected(options) as host:
        status = host.status_of(options.vm) if options.vm is not None else host.ask("status")
    if is_shaped(options):
        show_record(options, status)
        return EXIT_OK
    for line in _vm_lines(status) if options.vm is not None else _daemon_lines(status):
        text_line(printable(line))
    return EXIT_OK


def _daemon_lines(status: Mapping[str, Any]) -> Iterator[str]:
    """How the daemon is, for people."""
    yield f"vchan-host {status.get('version')} on {status.get('host')}"
    broker = status.get("broker")
    if status.get("broker_blocked"):
        broker = f"{broker}, and takes no messages: {status['broker_blocked']}"
    audit = status.get("audit") or {}
    files = status.get("files") or {}
    yield from _fields(
        ("libvirt", status.get("libvirt")),
        ("broker", broker),
        ("policy", _joined(status.get("policy"), files.get("policy_dir"))),
        ("audit log", _joined(_audit(audit), files.get("audit_log"))),
        ("files", files.get("config")),
        ("domains", status.get("domains")),
        ("channels", status.get("channels")),
        ("log lines left out", status.get("log_lines_left_out") or None),
    )
    yield from _counters("since it started, of all VMs", status.get("totals") or {})


def _audit(audit: Mapping[str, Any]) -> str:
    parts = [f"{audit[name]} lines {name.replace('_', ' ')}" for name in _AUDIT if audit.get(name)]
    return "; ".join(filter(None, (audit.get("problem"), ", ".join(parts)))) or "nothing written"


_AUDIT: Final = ("written", "lost", "left_out")


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _vm_lines(status: Mapping[str, Any]) -> Iterator[str]:
    """How a VM is, for people."""
    requests = status.get("requests") or {}
    upward = requests.get("from_guest") or {}
    yield f"{status.get('name')}  {status.get('uuid')}"
    yield from _fields(
        ("server", status.get("server")),
        ("project", _named(status, "project")),
        ("user", _named(status, "user")),
        ("flavor", status.get("flavor")),
        ("image", status.get("image")),
        ("host", status.get("host")),
        ("domain", status.get("domain")),
        ("channel", status.get("state")),
        ("problem", status.get("problem")),
        ("loses its channel", status.get("loses_channel")),
        ("labels", _labels(status)),
        ("fault", status.get("fault")),
        ("guest daemon", status.get("guest")),
        ("serves", requests.get("topics")),
        ("not consumed", requests.get("unconsumed_topics")),
        ("denied", _denied(status, requests)),
        ("not listened to", _rule(status.get("mute_by"))),
        ("answers denied", [f"{t} ({r})" for t, r in status.get("replies_denied_by", {}).items()]),
        ("broker", status.get("broker_problems")),
        ("under way", f"{requests['open']} into it, {upward.get('open', 0)} out of it")
        if "open" in requests
        else ("under way", None),
        ("backlog", f"{status['backlog_bytes']} bytes" if status.get("backlog_bytes") else None),
        ("socket", status.get("path")),
    )
    counters = {**(status.get("session") or {}), **(status.get("channel") or {})}
    yield from _counters("its session", counters)
    yield from _counters("requests into it", requests)
    yield from _counters("requests out of it", upward)


def _rule(rule: str | None) -> str | None:
    return "no rule lets it say anything" if rule == "default" else rule


def _labels(status: Mapping[str, Any]) -> str | list[str] | None:
    """What rules by extra-spec and property go by; or that they have nothing to go by."""
    labels = status.get("labels") or {}
    return status.get("unlabelled") or [f"{name}={value}" for name, value in labels.items()]


def _named(status: Mapping[str, Any], key: str) -> str | None:
    """An id, with the name that people know it by."""
    name, value = status.get(f"{key}_name"), status.get(key)
    return f"{name} ({value})" if name and value else value


def _denied(status: Mapping[str, Any], requests: Mapping[str, Any]) -> list[str]:
    rules = status.get("denied_by") or {}
    topics = requests.get("denied_topics") or []
    return [f"{topic} ({rules[topic]})" if topic in rules else topic for topic in topics]


def _fields(*fields: tuple[str, Any]) -> Iterator[str]:
    """Those that have something to say."""
    for name, value in fields:
        if value not in (None, "", [], {}):
            yield f"  {name + ':':20} {cell(value)}"


def _counters(title: str, counters: Mapping[str, Any]) -> Iterator[str]:
    """Those that are not 0, as many to a line as a narrow terminal takes: one."""
    shown = {
        name: value
        for name, value in counters.items()
        if isinstance(value, int | float) and value and name not in ("open", "open_bytes")
    }
    if shown:
        yield f"  {title}:"
        width = max(len(str(value)) for value in shown.values())
        for name, value in shown.items():
            yield f"    {value!s:>{width}} {name.replace('_', ' ')}"


# ---------------------------------------------------------------- attach, detach, release


def _change(done: str, options: argparse.Namespace) -> int:
    with connected(options) as host:
        status = host.status_of(options.vm)
        host.ask(options.command, vm=as_known(options.vm, status))
    if is_shaped(options):
        show_record(options, {"vm": options.vm, "uuid": status["uuid"], "done": done})
    return EXIT_OK
