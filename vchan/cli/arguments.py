"""Kinds of arguments, and those that every command has."""

from __future__ import annotations

import argparse
from typing import Any, Final

from vchan.cli.output import FORMATS
from vchan.programs.connection import HOST_SOCKET
from vchan.rpc.arguments import TIMEOUT_S_MAX

TIMEOUT_S: Final = 10.0
"""For an answer, unless --timeout says otherwise: a person waits."""

VM: Final = "a VM: its name, its UUID, or at least four characters of its UUID's beginning"
DEFAULTS: Final = {
    "socket": HOST_SOCKET,
    "timeout": TIMEOUT_S,
    "verbose": False,
    "format": None,
    "columns": None,
    "wide": False,
    "sort": None,
}
"""Of the options that may stand before the command and after it."""


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """A time to wait."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= TIMEOUT_S_MAX:
        limit = f"over 0 and at most {TIMEOUT_S_MAX:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds {limit}")
    return value


def version(text: str) -> str:
    """A version of a topic's methods."""
    major, dot, minor = text.partition(".")
    if not (major.isdecimal() and (minor.isdecimal() or not dot)):
        raise argparse.ArgumentTypeError(f"{text!r} is no MAJOR.MINOR")
    return text


def address(text: str) -> tuple[str, int]:
    """Where to listen."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no ADDRESS:PORT")
    return host.strip("[]"), int(port)


def add_vm(parser: argparse.ArgumentParser, *, nargs: Any = None, what: str = VM) -> None:
    """The argument that names a VM."""
    parser.add_argument("vm", nargs=nargs, metavar="VM", help=what)


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """The option that names the daemon's configuration."""
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="this in place of the files that the daemon has read, or would read",
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """What may stand before the command and after it."""
    none = argparse.SUPPRESS  # so that a default after the command undoes nothing before it
    parser.add_argument(
        "--socket", default=none, metavar="PATH", help=f"vchan-host's socket [{HOST_SOCKET}]"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=none,
        metavar="SECONDS",
        help=f"for the command; of ping, top, watch and doctor, for each question [{TIMEOUT_S:g}]",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=none,
        help="of a method that raised, say where it did",
    )
    shown = parser.add_argument_group("output")
    shown.add_argument(
        "-f", "--format", choices=FORMATS, default=none, help="how it is shown [for people]"
    )
    shown.add_argument(
        "--json", action="store_const", const="json", dest="format", default=none, help="-f json"
    )
    shown.add_argument(
        "-c",
        "--column",
        action="append",
        dest="columns",
        default=none,
        metavar="COLUMN",
        help="show this column; may be given again for others",
    )
    shown.add_argument(
        "--sort-column",
        dest="sort",
        default=none,
        metavar="COLUMN",
        help="sort by this column",
    )
    shown.add_argument(
        "-w",
        "--wide",
        action="store_true",
        default=none,
        help="cut nothing off where it does not fit the terminal",
    )
