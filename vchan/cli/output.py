"""What the command prints: the one module that writes to standard output and standard error.

What a guest or a broker chose may stand in all of it. As JSON it is the same value, with what a
terminal obeys written as escapes; everywhere else what cannot be printed becomes `?`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from vchan.errors import ConfigError, VchanError
from vchan.session import printable as printable

FORMATS: Final = ("table", "json", "value", "csv")
GAP: Final = "  "
CUT: Final = "…"
CELL_COLUMNS_MIN: Final = 4
"""No column of a table is cut to less: what is left then says something. A terminal that has no
room for that wraps its lines."""
KEPT: Final = frozenset({"uuid", "name", "vm"})
"""Columns that are cut last: people copy them."""

Row = Mapping[str, Any]


class OutputFailed(VchanError):
    """Standard output takes no more."""


# ---------------------------------------------------------------- text


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that a terminal shows and does not obey."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    odd = {c for c in text if not c.isprintable() and c != "\n"}  # they are within strings
    return text.translate({ord(c): json.dumps(c)[1:-1] for c in odd})


def cell(value: Any) -> str:
    """A value of a row, on one line."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case str():
            return printable(value)
        case list() if all(isinstance(each, str) for each in value):
            return printable(", ".join(value))
        case list() | dict():
            return as_json(value)
        case _:
            return str(value)


def columns_of(text: str) -> int:
    """How many of a terminal's columns a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def shortened(text: str, columns: int) -> str:
    """A text that takes so many columns at most, its end cut off."""
    if columns_of(text) <= columns:
        return text
    mark = CUT if _can_say(CUT) else "~"
    room = columns - columns_of(mark)
    kept = ""
    for letter in text:
        room -= columns_of(letter)
        if room < 0:
            break
        kept += letter
    return kept + mark


def _can_say(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def padded(text: str, columns: int) -> str:
    """A text with blanks after it, to fill so many columns."""
    return text + " " * (columns - columns_of(text))


# ---------------------------------------------------------------- tables


def table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None
) -> Iterator[str]:
    """The lines of a table.

    Args:
        width: Columns of the terminal; None: nothing is cut.
    """
    titles = [name.upper().replace("_", " ") for name in names]
    wants = [max(map(columns_of, column)) for column in zip(titles, *rows, strict=True)]
    room = wants if width is None else fit(names, wants, width - len(GAP) * (len(names) - 1))
    for row in (titles, *rows):
        cells = (padded(shortened(text, has), has) for text, has in zip(row, room, strict=True))
        yield GAP.join(cells).rstrip()


def fit(names: Sequence[str], wants: Sequence[int], width: int) -> list[int]:
    """Each column's share of the width: the widest are cut, those of KEPT after all others."""
    has = list(wants)
    for may_cut in ({n for n in names if n not in KEPT}, set(names)):
        floor = 2 * CELL_COLUMNS_MIN if len(may_cut) < len(names) else CELL_COLUMNS_MIN
        while sum(has) > width:
            able = [i for i, name in enumerate(names) if name in may_cut and has[i] > floor]
            if not able:
                break
            widest = max(able, key=lambda i: has[i])
            has[widest] -= 1
    return has


def stdout_is_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def terminal_width() -> int | None:
    """Columns of the terminal that is written to; None if it is none."""
    if not stdout_is_terminal():
        return None
    return shutil.get_terminal_size().columns


# ---------------------------------------------------------------- what commands show


def is_shaped(options: argparse.Namespace) -> bool:
    """Whether a shape was asked for; otherwise it is shown for people."""
    return options.format is not None or bool(options.columns)


def show_rows(
    options: argparse.Namespace,
    rows: Sequence[Row],
    names: Sequence[str],
    *,
    table_format: str = "",
) -> None:
    """A list.

    Args:
        options: `format`, `columns`, `wide` and `sort`, as `arguments` parses them.
        names: The columns that a table has unless `columns` names others; all that the rows have
            may be named there.
    """
    shown_as = options.format or table_format or "table"
    known = list(dict.fromkeys([*names, *(name for row in rows for name in row)]))
    chosen = [_known_name(name, known) for name in options.columns or ()]
    if options.sort:
        key = _known_name(options.sort, known)
        rows = sorted(rows, key=lambda row: _sort_key(row.get(key)))
    if shown_as == "json":
        text_line(as_json([_picked(row, chosen) for row in rows]))
        return
    names = chosen or names
    cells = [[cell(row.get(name)) for name in names] for row in rows]
    match shown_as:
        case "csv":
            text(_as_csv([names, *cells]))
        case "value":
            for each in cells:
                text_line(" ".join(each))
        case _:
            width = None if options.wide else terminal_width()
            for line in table(names, cells, width=width):
                text_line(line)


def show_record(options: argparse.Namespace, record: Row) -> None:
    """One thing's fields, those of fields in it with a dot between."""
    if options.format in (None, "json") and not options.columns:
        text_line(as_json(record))
        return
    fields = dict(flat(record))
    if options.format in (None, "table"):
        wanted = [_known_name(name, list(fields)) for name in options.columns or fields]
        rows = [{"field": name, "value": fields[name]} for name in wanted]
        plain = argparse.Namespace(**{**vars(options), "columns": None, "sort": None})
        show_rows(plain, rows, ("field", "value"))
    elif options.format == "json":
        wanted = [_known_name(name, [*record, *fields]) for name in options.columns]
        text_line(as_json({name: record.get(name, fields.get(name)) for name in wanted}))
    else:
        show_rows(options, [fields], list(fields))


def flat(record: Row, before: str = "") -> Iterator[tuple[str, Any]]:
    """A record's fields, and those of the records in it."""
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


class Rows:
    """Rows that come one by one: JSON has a line for each, CSV its names first.

    Args:
        names: The columns unless `options.columns` names others.
        known: Those that may be named there; () for `names`.
    """

    def __init__(
        self, options: argparse.Namespace, names: Sequence[str], known: Sequence[str] = ()
    ) -> None:
        if options.sort:
            raise ConfigError("--sort-column", "these rows come one by one: they are not sorted")
        self._format = options.format or "table"
        wanted = [_known_name(name, known or names) for name in options.columns or ()]
        self._names = wanted or list(names)
        self._is_chosen = bool(options.columns)
        if self._format == "csv":
            text(_as_csv([self._names]))
            flush()

    def show(self, row: Row, line: str) -> None:
        """One of them.

        Args:
            line: The row for people.
        """
        match self._format:
            case "json":
                text_line(as_json(_picked(row, self._names if self._is_chosen else [])))
            case "csv":
                text(_as_csv([[cell(row.get(name)) for name in self._names]]))
            case "value":
                text_line(" ".join(cell(row.get(name)) for name in self._names))
            case _ if self._is_chosen:
                text_line(GAP.join(cell(row.get(name)) for name in self._names))
            case _:
                text_line(printable(line))
        flush()


def _known_name(wanted: str, known: Iterable[str]) -> str:
    """The column that is meant: as it is written in a heading, or in JSON.

    Raises:
        ConfigError: There is none.
    """
    names = list(known)
    name = wanted.lower().replace(" ", "_")
    for each in names:
        if each.lower() == name:
            return each
    raise ConfigError(f"column {wanted!r}", f"expected one of {', '.join(names)}")


def _picked(row: Row, names: Sequence[str]) -> dict[str, Any]:
    return {name: row.get(name) for name in names} if names else dict(row)


def _sort_key(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then all else by its letters."""
    if isinstance(value, int | float):
        return False, value, ""
    return True, 0.0, cell(value).casefold()


def _as_csv(rows: Iterable[Sequence[str]]) -> str:
    made = io.StringIO()
    csv.writer(made, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerows(rows)
    return made.getvalue()


# ---------------------------------------------------------------- writing


def text_line(line: str) -> None:
    """A line of standard output."""
    text(line + "\n")


def text(whole: str) -> None:
    """What stands on standard output.

    Raises:
        OutputFailed: It takes no more.
        BrokenPipeError: Its reader has seen enough.
    """
    try:
        sys.stdout.write(whole)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise _failed(error) from error


def flush() -> None:
    """Nothing that was written waits any more; raises as `text`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise _failed(error) from error


def _failed(error: OSError | ValueError) -> OutputFailed:
    why = getattr(error, "strerror", None) or str(error)
    return OutputFailed(f"standard output cannot be written: {why}")


def say(line: str) -> None:
    """A line for the operator, on standard error. If that cannot be written, nobody can be told."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"vchan: {line}\n")
            sys.stderr.flush()
    except (OSError, ValueError):
        pass


def stderr_columns() -> int:
    """Columns of the terminal that standard error is; 0 if it is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80  # a serial line says 0
    except (OSError, ValueError, AttributeError):
        return 0


def show_status(line: str) -> None:
    """A line on the terminal that standard error is, in place of the last one; "" clears it."""
    try:
        sys.stderr.write(f"\r{line}\x1b[K")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


class _Closed(io.TextIOBase):
    """In place of a standard output that was closed before this program began."""

    encoding = "utf-8"

    def write(self, _: str, /) -> int:
        raise OSError(9, "it is closed")


def prepare() -> None:
    """Make standard output take whatever a guest answers, and fail audibly where there is none."""
    if sys.stdout is None:
        sys.stdout = _Closed()
    else:
        # What a guest answers may be no text that this terminal can show.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if sys.stderr is not None:
        sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for fd in range(3):  # what is opened from here on must not be taken for one of these
        try:
            os.fstat(fd)
        except OSError:
            # A closed output refuses what is written to it; nobody could be told of an error's.
            os.open(os.devnull, os.O_RDONLY if fd == 1 else os.O_RDWR)


def abandon() -> None:
    """Whatever still waits to be written goes nowhere: so that the interpreter's end is quiet."""
    if isinstance(sys.stdout, _Closed):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
