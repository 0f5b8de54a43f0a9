"""log: the audit log, filtered."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from vchan.cli.arguments import count
from vchan.cli.configuration import audit_log_path
from vchan.cli.failures import EXIT_OK
from vchan.cli.host import pattern
from vchan.cli.output import Rows, cell, say
from vchan.errors import ConfigError

COLUMNS: Final = ("time", "verdict", "vm", "name", "kind", "target", "method", "rule", "reason")
"""Unless -c names others; those of FIELDS may be named."""
FIELDS: Final = (
    *COLUMNS,
    *("host", "project", "exchange", "topic", "server", "namespace", "fanout", "request", "via"),
    *("by", "bytes_in", "bytes_out", "left_out"),
)
LINES_MAX: Final = 100_000
"""The most that --lines keeps in memory."""
LOOK_S: Final = 0.25
"""How often a log that is followed is looked at."""
STDERR: Final = "-"

_FILTERS: Final = {
    "vm": ("VM", "only decisions about this VM: its name, or the beginning of its UUID"),
    "verdict": ("VERDICT", "only these: allow, deny, conductor, refused, quarantine ..."),
    "kind": ("KIND", "only these: listen, reply, cast, fanout, call, notify, http or forward"),
    "topic": ("TOPIC", "only about this topic, or EXCHANGE/TOPIC; * and ? stand for any letters"),
    "method": ("METHOD", "only about this method"),
    "rule": ("RULE", "only by this rule: FILE:LINE, or the end of it; or default"),
}
_AGO: Final = re.compile(r"(\d+)\s*([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def add_commands(commands: Any) -> None:
    """The command of this group."""
    log = commands.add_parser(
        "log",
        help="the audit log: what the policy decided about whom",
        description="Print lines of the audit log, oldest first; each is one decision.",
    )
    for name, (metavar, text) in _FILTERS.items():
        log.add_argument(f"--{name}", metavar=metavar, help=text)
    log.add_argument("--denied", action="store_true", help="only what was denied or refused")
    for name in ("since", "until"):
        log.add_argument(
            f"--{name}",
            type=moment,
            metavar="TIME",
            help=f"only {name} then: 10m, 2h, 3d, or a date",
        )
    log.add_argument(
        "-n", "--lines", type=count, metavar="N", help=f"the last N of these, at most {LINES_MAX}"
    )
    log.add_argument(
        "-F", "--follow", action="store_true", help="go on with what is written from now on"
    )
    log.add_argument(
        "--file", metavar="FILE", help="read this; - for standard input [the daemon's audit_log]"
    )
    log.add_argument(
        "--config-file", metavar="FILE", help="whose audit_log is read [what the daemon has read]"
    )
    log.set_defaults(run=_log)


def moment(text: str) -> datetime:
    """A time of day: so long ago, or a date; without a zone it is this machine's."""
    ago = _AGO.fullmatch(text)
    if ago is not None:
        try:
            return datetime.now(tz=UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        except OverflowError:
            pass
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        forms = "as 10m, 2h, 3d, 2026-01-31 or 2026-01-31T12:00"
        raise argparse.ArgumentTypeError(f"{text!r} is no time {forms}") from None


# ---------------------------------------------------------------- the command


def _log(options: argparse.Namespace) -> int:
    wanted = _wanted(options)
    if options.lines is not None and options.lines > LINES_MAX:
        raise ConfigError(f"--lines {options.lines}", f"expected at most {LINES_MAX}")
    path = options.file or audit_log_path(options)
    if path == STDERR and not options.file:
        raise ConfigError(
            "audit_log",
            "goes to standard error, and so to the journal: "
            "journalctl -o cat -u vchan-host | vchan log --file -",
        )
    rows = Rows(options, COLUMNS, FIELDS)
    file = _opened(path)
    try:
        bad = Unread()
        found = (row for row in records(file, bad) if wanted(row))
        for row in found if options.lines is None else deque(found, options.lines):
            rows.show(row, line_of(row))
        bad.tell(path)
        if options.follow and path != STDERR:
            for row in follow(path, file):
                if wanted(row):
                    rows.show(row, line_of(row))
    finally:
        if path != STDERR:
            file.close()
    return EXIT_OK


def _opened(path: str) -> IO[bytes]:
    if path == STDERR:
        if sys.stdin is None:
            raise ConfigError("--file -", "standard input is closed")
        return sys.stdin.buffer
    try:
        return Path(path).open("rb")
    except OSError as error:
        advice = "; root may, and group vchan" if isinstance(error, PermissionError) else ""
        raise ConfigError(path, f"{error.strerror}{advice}: see --file and audit_log") from None


class Unread:
    """Lines that are none of the audit log's."""

    def __init__(self) -> None:
        self.count = 0

    def tell(self, path: str) -> None:
        """The operator, if there are some."""
        if self.count:
            say(f"{path}: {self.count} lines are no lines of an audit log: left out")


def records(lines: Iterable[bytes], bad: Unread) -> Iterator[dict[str, Any]]:
    """The log's lines as rows."""
    for line in lines:
        row = record(line)
        if row is not None:
            yield row
        elif line.strip():
            bad.count += 1


def record(line: bytes) -> dict[str, Any] | None:
    """One line, with the target in one word; None if it is no line of an audit log."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or "verdict" not in row or "vm" not in row:
        return None
    if "topic" in row:
        between = ":" if row.get("kind") == "forward" else "/"
        row["target"] = f"{row.get('exchange', '')}{between}{row['topic']}"
    return row


def line_of(row: Mapping[str, Any]) -> str:
    """A row for people: who asked for what, and what came of it, by which rule."""
    asked = " ".join(cell(row[name]) for name in ("kind", "target", "method") if row.get(name))
    words = [
        cell(row.get("time")),
        cell(row.get("verdict")),
        cell(row.get("name") or row["vm"]),
        asked,
        f"({cell(row['rule'])})" if row.get("rule") else "",
        cell(row.get("reason")),
        f"by {cell(row['by'])}" if row.get("by") else "",
        f"{row['bytes_in']} bytes in, {row['bytes_out']} out" if "bytes_in" in row else "",
        f"and {row['left_out']} lines left out before" if row.get("left_out") else "",
    ]
    return "  ".join(filter(None, words))


# ---------------------------------------------------------------- filters


def _wanted(options: argparse.Namespace) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a row is to be shown."""
    tests: list[Callable[[Mapping[str, Any]], bool]] = []
    for name in ("verdict", "kind", "method"):
        glob = getattr(options, name)
        if glob is not None:
            tests.append(partial(_matches, (name,), pattern(glob)))
    if options.topic is not None:
        tests.append(partial(_matches, ("topic", "target"), pattern(options.topic)))
    if options.vm is not None:
        tests.append(partial(_is_vm, options.vm.lower()))
    if options.rule is not None:
        tests.append(partial(_is_rule, options.rule))
    if options.denied:
        tests.append(lambda row: row["verdict"] in ("deny", "refused"))
    if options.since is not None:
        tests.append(lambda row: _time_of(row) >= options.since)
    if options.until is not None:
        tests.append(lambda row: _time_of(row) <= options.until)
    return lambda row: all(test(row) for test in tests)


def _matches(names: tuple[str, ...], glob: Any, row: Mapping[str, Any]) -> bool:
    return any(glob.match(str(row.get(name, ""))) for name in names)


def _is_vm(wanted: str, row: Mapping[str, Any]) -> bool:
    return str(row.get("name", "")).lower() == wanted or str(row["vm"]).lower().startswith(wanted)


def _is_rule(wanted: str, row: Mapping[str, Any]) -> bool:
    rule = str(row.get("rule", ""))
    return rule == wanted or rule.endswith(f"/{wanted}")


def _time_of(row: Mapping[str, Any]) -> datetime:
    try:
        return datetime.fromisoformat(str(row.get("time"))).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)


# ---------------------------------------------------------------- following


def follow(path: str, file: IO[bytes]) -> Generator[dict[str, Any], None, None]:
    """What is written from now on, also into a new file of that name. Never ends.

    Args:
        file: The log, read to its end; it is closed.
    """
    rest = b""
    try:
        while True:
            for piece in file:
                rest += piece
                if rest.endswith(b"\n"):
                    row = record(rest)
                    rest = b""
                    if row is not None:
                        yield row
            successor = _successor(path, file)
            if successor is None:
                time.sleep(LOOK_S)
            else:
                file.close()
                file, rest = successor, b""
    finally:
        file.close()


def _successor(path: str, file: IO[bytes]) -> IO[bytes] | None:
    """The file that has the name now, if it is another, or has become shorter."""
    try:
        status, own = Path(path).stat(), os.fstat(file.fileno())
        is_other = (status.st_dev, status.st_ino) != (own.st_dev, own.st_ino)
        has_more = own.st_size > file.tell()  # written since, before it was moved away
        if (is_other and not has_more) or own.st_size < file.tell():
            return Path(path).open("rb")
    except OSError:
        pass  # between two files; it is looked at again
    return None
