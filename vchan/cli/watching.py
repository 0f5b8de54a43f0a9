"""top, watch: how a host's VMs fare, as it changes."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from vchan.cli.arguments import count, seconds
from vchan.cli.changes import RATES, Change, changes, counters_of, daemon_changes, grown, rates
from vchan.cli.failures import EXIT_OK
from vchan.cli.host import Host, connected, is_gone, pattern
from vchan.cli.output import (
    Rows,
    cell,
    flush,
    is_shaped,
    printable,
    say,
    shortened,
    show_rows,
    stdout_is_terminal,
    table,
)
from vchan.errors import LinkError, RemoteError

TOP_COLUMNS: Final = ("name", "channel", *RATES, "open", "backlog", "problem")
WATCH_COLUMNS: Final = ("time", "name", "uuid", "event", "before", "after", "text")
TOP_S: Final = 2.0
"""Between two looks of `vchan top`: each asks the daemon once for every VM."""
WATCH_S: Final = 1.0
"""Between two looks of `vchan watch`: each asks the daemon twice."""
TRY_AGAIN_S: Final = 1.0
"""Between attempts to reach a daemon that was there and is not."""
PASSED_S_MIN: Final = 0.001
"""Between two looks: a rate is something a time that is not 0."""
TOP_COLUMN_MIN: Final = 10
"""What a column of `vchan top` takes, with the gap: a state's name, or a number below a million."""
SORTS: Final = ("name", *RATES, "open", "backlog")
"""What `vchan top` can be sorted by with < and >."""


def add_commands(commands: Any) -> None:
    """The commands of this group."""
    top = commands.add_parser(
        "top",
        help="what each VM's channel does, live",
        description="Show what each VM's channel does a second. In a terminal it stays up to date: "
        "q ends it, < and > choose the column it is sorted by. Elsewhere it prints each look.",
    )
    watch = commands.add_parser(
        "watch",
        help="events: what changes on this host",
        description="Print what changes from now on: VMs that come and go, states, topics, "
        "problems, "
        "losses that were repaired, messages that were dropped. What begins and ends between "
        "two looks shows only if a counter has it.",
    )
    for command, interval_s in ((top, TOP_S), (watch, WATCH_S)):
        command.add_argument(
            "--name", metavar="NAME", help="only VMs of this name; * and ? stand for any letters"
        )
        command.add_argument(
            "--interval",
            type=seconds,
            default=interval_s,
            metavar="SECONDS",
            help="between two looks [%(default)s]",
        )
        command.add_argument(
            "--count", type=count, metavar="N", help="end after so many looks [never]"
        )
    top.set_defaults(run=_top)
    watch.set_defaults(run=_watch)


# ---------------------------------------------------------------- looking


class _Look:
    """What the daemon says at one time."""

    def __init__(self, host: Host, options: argparse.Namespace) -> None:
        host.renew(options.timeout)
        self.status: dict[str, Any] = host.ask("status")
        rows = host.ask("list")
        if options.name is not None:
            glob = pattern(options.name)
            rows = [row for row in rows if glob.match(row["name"])]
        self.rows = {row["uuid"]: row for row in rows}


def _details(host: Host, rows: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Each VM's status; of one that is gone by now, none."""
    found = {}
    for uuid in rows:
        host.renew(timeout_s)
        try:
            found[uuid] = host.ask("status", vm=uuid)
        except RemoteError as error:
            if not is_gone(error):
                say(f"{rows[uuid]['name']}: {printable(str(error))}")
    return found


# ---------------------------------------------------------------- watch


def _watch(options: argparse.Namespace) -> int:
    rows = Rows(options, WATCH_COLUMNS)
    for change in itertools.chain.from_iterable(_watched(options)):
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        row = {"time": now, **change._asdict()}
        rows.show(row, f"{now}  {change.name}  {change.text}")
    return EXIT_OK


def _watched(options: argparse.Namespace) -> Iterator[list[Change]]:
    """What has changed, look by look; also that the daemon is not there, and that it is again."""
    before: _Look | None = None
    details: dict[str, Any] = {}
    looks = 0
    lost = ""
    while True:
        try:
            with connected(options) as host:
                if lost:
                    yield [Change("daemon", "", "vchan-host", "away", "here", "answers again")]
                    lost = ""
                while options.count is None or looks < options.count:
                    look = _Look(host, options)
                    looks += 1
                    if before is None:
                        say(f"{len(look.rows)} VMs; what changes from now on:")
                        details = _details(host, look.rows, options.timeout)
                    else:
                        yield [
                            *daemon_changes(before.status, look.status),
                            *changes(before.rows, look.rows),
                        ]
                        if _totals_grew(before, look):
                            news = _details(host, look.rows, options.timeout)
                            yield list(_all_grown(look, details, news))
                            details = news
                    before = look
                    if looks != options.count:
                        time.sleep(options.interval)
            return
        except LinkError as error:
            if before is None:
                raise
            if not lost:
                lost = str(error)
                yield [Change("daemon", "", "vchan-host", "here", "away", f"is away: {lost}")]
            looks += 1
            if options.count is not None and looks >= options.count:
                return
            time.sleep(TRY_AGAIN_S)


def _totals_grew(before: _Look, after: _Look) -> bool:
    """Whether it is worth asking each VM: the sum over all of them says so at little cost."""
    old, new = (look.status.get("totals") or {} for look in (before, after))
    return any(grown("", "", old, new)) or any(new.get(name, 0) < old.get(name, 0) for name in new)


def _all_grown(
    look: _Look, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[Change]:
    for uuid, status in after.items():
        old = counters_of(before[uuid]) if uuid in before else {}
        yield from grown(uuid, look.rows[uuid]["name"], old, counters_of(status))


# ---------------------------------------------------------------- top


class _Looker:
    """The lines of `vchan top`: what has happened since the look before."""

    def __init__(self, host: Host, options: argparse.Namespace) -> None:
        self._host = host
        self._options = options
        self._at_s, self._details, _ = self._look()
        self.title = ""

    def _look(self) -> tuple[float, dict[str, Any], _Look]:
        look = _Look(self._host, self._options)
        return time.monotonic(), _details(self._host, look.rows, self._options.timeout), look

    def rows(self) -> list[dict[str, Any]]:
        """The lines, by name."""
        at_s, details, look = self._look()
        passed_s = max(at_s - self._at_s, PASSED_S_MIN)
        lines = rates(look.rows.values(), self._details, details, passed_s)
        self._at_s, self._details = at_s, details
        status = look.status
        self.title = (
            f"vchan-host {status.get('version')} on {status.get('host')}; "
            f"libvirt {status.get('libvirt')}; broker {status.get('broker')}; VMs {len(lines)}"
        )
        return sorted(lines, key=lambda line: line["name"].casefold())


def _top(options: argparse.Namespace) -> int:
    with connected(options) as host:
        looker = _Looker(host, options)
        if not is_shaped(options) and _has_screen():
            import curses

            curses.wrapper(lambda screen: _Screen(screen, options).run(looker))
            return EXIT_OK
        for number in itertools.count(1):
            time.sleep(options.interval)
            show_rows(options, looker.rows(), TOP_COLUMNS)
            flush()
            if number == options.count:
                break
    return EXIT_OK


def _has_screen() -> bool:
    """Whether there is a terminal on which things can be put in their places."""
    if not (stdout_is_terminal() and sys.stdin is not None and sys.stdin.isatty()):
        return False
    import curses

    try:
        curses.setupterm()
    except curses.error:
        return False
    return curses.tigetstr("cup") is not None


def columns_for(width: int, sort: str) -> list[str]:
    """The columns of `vchan top` that have room in so many of a terminal's, the one it is sorted by
    among them: numbers that are cut are wrong."""
    names = list(TOP_COLUMNS)
    while len(names) > 2 and len(names) * TOP_COLUMN_MIN > width:
        names.remove(next(name for name in reversed(names) if name != sort))
    return names


class _Screen:
    """The whole terminal, until q.

    Args:
        screen: curses' window.
    """

    def __init__(self, screen: Any, options: argparse.Namespace) -> None:
        self._screen = screen
        self._interval_s = options.interval
        self._count = options.count
        self._wide = options.wide
        self._sort = options.sort if options.sort in SORTS else "name"
        self._first = 0  # the line that stands at the top

    def run(self, looker: _Looker) -> None:
        """Show it, and follow keys."""
        import curses

        with contextlib.suppress(curses.error):  # some terminals cannot hide their cursor
            curses.curs_set(0)
        rows = looker.rows()
        looks, next_s = 1, time.monotonic() + self._interval_s
        while True:
            self._draw(looker.title, rows)
            left_s = next_s - time.monotonic()
            self._screen.timeout(max(0, int(left_s * 1000)))
            if self._ends(self._screen.getch()):
                return
            if time.monotonic() >= next_s:
                if looks == self._count:
                    return
                rows = looker.rows()
                looks, next_s = looks + 1, time.monotonic() + self._interval_s

    def _ends(self, key: int) -> bool:
        import curses

        at = SORTS.index(self._sort)
        match key:
            case 113:  # q
                return True
            case 60:  # <
                self._sort = SORTS[(at - 1) % len(SORTS)]
            case 62:  # >
                self._sort = SORTS[(at + 1) % len(SORTS)]
            case curses.KEY_DOWN:
                self._first += 1
            case curses.KEY_UP:
                self._first = max(0, self._first - 1)
            case _:
                pass
        return False

    def _draw(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import curses

        height, width = self._screen.getmaxyx()
        if self._sort == "name":
            ordered = sorted(rows, key=lambda row: row["name"].casefold())
        else:
            ordered = sorted(rows, key=lambda row: -row[self._sort])
        self._first = min(self._first, max(0, len(rows) - 1))
        names = TOP_COLUMNS if self._wide else columns_for(width, self._sort)
        cells = [[cell(row[name]) for name in names] for row in ordered]
        heading, *lines = table(names, cells, width=None if self._wide else width - 1)
        keys = f"by {self._sort}: < and > choose; q ends"
        self._screen.erase()
        shown = [printable(title), keys, heading, *lines[self._first :]]
        for number, line in enumerate(shown[:height]):
            style = curses.A_BOLD if number == 2 else curses.A_NORMAL
            with contextlib.suppress(curses.error):  # smaller by now than it was a moment ago
                self._screen.addstr(number, 0, shortened(line, width - 1), style)
        self._screen.refresh()
