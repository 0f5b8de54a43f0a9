"""The operator's own terminal while a program in a VM has it: raw, and given back as it was.

`Escapes` and `Modes` are pure: what of the operator's keys is for the command itself, and what a
program has switched on that nobody else would switch off.
"""

from __future__ import annotations

import os
import re
import select
import termios
import tty
from typing import Any, Final

from vchan.services.programs import TERMINAL_CELLS_MAX, Size, TerminalWanted

PLAIN_SIZE: Final = Size(24, 80)
"""Of a terminal whose own size nobody knows."""
PLAIN_TYPE: Final = "dumb"
"""Of one whose type nobody knows."""
SEQUENCE_BYTES_MAX: Final = 64
"""Of a control sequence that is looked for. At it: it is passed on unseen."""

HELP: Final = (
    "~.  leave; the session goes on, and --attach comes back to it",
    "~?  this",
    "~~  a tilde",
    "each behind Enter",
)


class OwnTerminal:
    """The terminal that is this command's input, if it is one.

    Args:
        fd: The input.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] | None = None

    def begin(self) -> None:
        """Have every key come as it is pressed, and echo nothing. Harmless twice."""
        if self._before is None and os.isatty(self._fd):
            self._before = termios.tcgetattr(self._fd)
            self.again()

    def again(self) -> None:
        """Somebody else has had the terminal meanwhile: a shell that had stopped this command."""
        if self._before is not None:
            try:
                tty.setraw(self._fd, termios.TCSADRAIN)
            except termios.error:
                pass  # it is gone: who reads from it hears of it

    def end(self) -> None:
        """Give it back. Harmless twice, and if it was never begun."""
        before, self._before = self._before, None
        if before is not None:
            try:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, before)
            except termios.error:
                pass  # it is gone


def size_of(fds: tuple[int, ...]) -> Size:
    """The size of the first of these that is a terminal."""
    for fd in fds:
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        if 0 < columns <= TERMINAL_CELLS_MAX and 0 < rows <= TERMINAL_CELLS_MAX:
            return Size(rows, columns)
    return PLAIN_SIZE


def wanted(fds: tuple[int, ...]) -> TerminalWanted:
    """A terminal like the operator's own."""
    return TerminalWanted(os.environ.get("TERM") or PLAIN_TYPE, size_of(fds))


# ---------------------------------------------------------------- descriptors


def read_some(fd: int, size: int) -> bytes:
    """Read once, or wait for it: the descriptor is shared with other programs, and one of these may
    have made it one that does not wait."""
    while True:
        try:
            return os.read(fd, size)
        except BlockingIOError:
            _wait(fd, select.POLLIN)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it; see `read_some`."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            _wait(fd, select.POLLOUT)


def _wait(fd: int, event: int) -> None:
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()


# ---------------------------------------------------------------- pure


class Escapes:
    """What of the keys is for the command: a tilde at the beginning of a line, and one more."""

    def __init__(self) -> None:
        self._is_at_start = True
        self._has_tilde = False

    def take(self, keys: bytes) -> tuple[bytes, bytes]:
        """What goes on to the program, and what the command is to do: b"." (what follows is
        dropped), b"?" or b"" (nothing)."""
        passed = bytearray()
        act = b""
        for key in keys:
            if self._has_tilde:
                self._has_tilde = False
                if key == ord("."):
                    return bytes(passed), b"."
                if key == ord("?"):
                    act = b"?"
                    continue
                if key != ord("~"):
                    passed += b"~"
            elif self._is_at_start and key == ord("~"):
                self._has_tilde = True
                continue
            passed.append(key)
            self._is_at_start = key in b"\r\n"
        return bytes(passed), act


class Modes:
    """What a program has switched on at a terminal, by what it has written."""

    _SET: Final = re.compile(rb"\x1b\[\?([0-9;]{1,40})([hl])")
    _UNDONE: Final = (1, 9, 47, 1000, 1002, 1003, 1004, 1005, 1006, 1015, 1047, 1049, 2004)
    """Keys of the cursor, reports of the mouse and of the focus, another screen, marked pastes."""
    _SHOWN: Final = 25  # the cursor: on, unless it is switched off

    def __init__(self) -> None:
        self._on: set[int] = set()
        self._last = b""
        self._is_used = False

    @property
    def is_changed(self) -> bool:
        """Something is on."""
        return bool(self._on)

    def see(self, data: bytes) -> None:
        """The program has written this."""
        self._is_used = True
        data = self._last + data
        end = 0
        for found in self._SET.finditer(data):
            end = found.end()
            for word in found[1].split(b";"):
                number = int(word or b"0")
                if (found[2] == b"h") == (number != self._SHOWN):
                    self._on.add(number)
                else:
                    self._on.discard(number)
        self._last = data[max(end, len(data) - SEQUENCE_BYTES_MAX) :]

    def undo(self) -> bytes:
        """What to write so that the next one finds the terminal as it was."""
        if not self._is_used:
            return b""
        off = b"".join(b"\x1b[?%dl" % mode for mode in self._UNDONE if mode in self._on)
        cursor = b"\x1b[?25h" if self._SHOWN in self._on else b""
        return off + cursor + b"\x1b[0m"
