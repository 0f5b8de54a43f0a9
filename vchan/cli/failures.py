"""What is said of an error, and with which exit status: one line that names what, where, and what
to do in the state at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from vchan.cli.output import OutputFailed, printable
from vchan.errors import (
    CallTimeout,
    ConfigError,
    LimitExceeded,
    LinkDown,
    LinkError,
    NotAPort,
    PortAbsent,
    PortBusy,
    PortDenied,
    RemoteError,
    VchanError,
)
from vchan.programs.connection import HOST_SOCKET

EXIT_OK: Final = 0
"""Done."""
EXIT_FAILED: Final = 1
"""The request was refused or not delivered, or the method raised; or the output was not written."""
EXIT_USAGE: Final = 2
"""A wrong argument or configuration."""
EXIT_UNREACHABLE: Final = 3
"""The daemon cannot be reached."""
EXIT_TIMEOUT: Final = 4
"""No answer in time: the method may have run."""
EXIT_OURS: Final = 255
"""Of exec and shell, as of ssh: there was no program, or nobody knows how it ended."""
EXIT_INTERRUPTED: Final = 130
"""Ctrl-C, as shells count a process that signal 2 has ended."""

STATUSES: Final = f"""\
exit status: {EXIT_OK} done; {EXIT_FAILED} refused, not delivered, or the method raised;
{EXIT_USAGE} wrong arguments; {EXIT_UNREACHABLE} vchan-host cannot be reached;
{EXIT_TIMEOUT} no answer in time: the method may have run; {EXIT_INTERRUPTED} interrupted
doctor: {EXIT_FAILED} if there is a problem; policy check: {EXIT_FAILED} if the request is denied
exec, shell: the program's own; 128 and the signal that ended it; {EXIT_OURS} if there was none
"""


class NoDev(LinkDown):
    """No `vchan dev run` is there.

    Args:
        where: The options that name another place than the usual one.
    """

    def __init__(self, path: str, where: str) -> None:
        super().__init__(path, "no vchan dev runs there")
        self.where = where


def status_of(error: VchanError) -> int:
    """The exit status."""
    match error:
        case OutputFailed():
            return EXIT_FAILED
        case ConfigError() | LimitExceeded():
            return EXIT_USAGE
        case LinkError():
            return EXIT_UNREACHABLE
        case CallTimeout():
            return EXIT_TIMEOUT
        case _:
            return EXIT_FAILED


def explain(error: VchanError) -> str:
    """One line."""
    if isinstance(error, PortAbsent):  # what it says is of any socket
        return f"{printable(error.path)}: {_where_it_is(error.path)}"
    text = printable(" ".join(str(error).split()))
    advice = advice_of(error)
    return f"{text}; {advice}" if advice else text


def advice_of(error: VchanError) -> str:
    """What to do about it, in the state at hand; "" if the error says it itself."""
    match error:
        case PortAbsent():
            return "systemctl status vchan-host"
        case PortDenied(path=path):
            return _who_may(path)
        case NotAPort():
            return "see --socket, and option socket in vchan.conf"
        case NoDev(where=where):
            return f"start one in another terminal: vchan dev run{where} AGENT"
        case PortBusy() | LinkDown():
            return "systemctl status vchan-host"
        case CallTimeout():
            return "the method may have run; --timeout waits longer"
        case _:
            return ""


def _where_it_is(path: str) -> str:
    """What to look at, where nobody listens."""
    found = "nobody listens there" if Path(path).exists() else "no such socket"
    asked = f"{found}: is vchan-host running? systemctl status vchan-host"
    if path != HOST_SOCKET and Path(HOST_SOCKET).exists():
        return f"{asked}; there is a socket at {HOST_SOCKET}"
    return asked


def _who_may(path: str) -> str:
    """The group whose members may, if the socket's own permissions are what stands in the way."""
    try:
        group = Path(path).group()
    except (OSError, KeyError):
        return "root may"
    return f"members of group {group} may, and root"


def remote_traceback(error: RemoteError) -> list[str]:
    """Where the method raised, as the agent says; nothing if it does not say."""
    try:
        failure = json.loads(error.failure)
        lines = "".join(str(part) for part in failure["tb"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return []
    return [printable(line) for line in lines.rstrip("\n").split("\n")] if lines else []
