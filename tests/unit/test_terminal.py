"""The operator's own terminal: raw and given back, his keys, what programs leave switched on."""

from __future__ import annotations

import os
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.cli.terminal import PLAIN_SIZE, Escapes, Modes, OwnTerminal, size_of, wanted


@pytest.mark.parametrize(
    ("keys", "passed", "act"),
    [
        (b"ls\r", b"ls\r", b""),
        (b"~.", b"", b"."),
        (b"ls\r~.rm\r", b"ls\r", b"."),
        (b"ls ~.\r", b"ls ~.\r", b""),
        (b"~~x\r", b"~x\r", b""),
        (b"~?~?~.", b"", b"."),
        (b"~?ls\r", b"ls\r", b"?"),
        (b"~a", b"~a", b""),
        (b"~\r~.", b"~\r", b"."),
        (b"\n~~.", b"\n~.", b""),
    ],
)
@pytest.mark.parametrize("is_cut", [False, True])
def test_what_of_the_keys_is_for_the_command(
    keys: bytes, passed: bytes, act: bytes, is_cut: bool
) -> None:
    escapes = Escapes()
    parts = [keys[at : at + 1] for at in range(len(keys))] if is_cut else [keys]
    got, acts = b"", b""
    for part in parts:
        more, then = escapes.take(part)
        got += more
        acts += then
        if then == b".":
            break
    assert got == passed
    assert acts.replace(b"?", b"") == act.replace(b"?", b"") and (b"?" in acts or act != b"?")


@given(st.binary(max_size=200).map(lambda keys: keys.replace(b"~", b"")))
def test_other_keys_pass_as_they_are(keys: bytes) -> None:
    assert Escapes().take(keys) == (keys, b"")


@pytest.mark.parametrize(
    ("written", "undone"),
    [
        (b"", b""),
        (b"text", b"\x1b[0m"),
        (b"\x1b[?1049h vim", b"\x1b[?1049l\x1b[0m"),
        (b"\x1b[?1049h vim \x1b[?1049l", b"\x1b[0m"),
        (b"\x1b[?25l top", b"\x1b[?25h\x1b[0m"),
        (b"\x1b[?25l top \x1b[?25h", b"\x1b[0m"),
        (b"\x1b[?1000;1006h\x1b[?2004h", b"\x1b[?1000l\x1b[?1006l\x1b[?2004l\x1b[0m"),
        (b"\x1b[?7777h\x1b[?;h", b"\x1b[0m"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_was_switched_on_is_switched_off(written: bytes, undone: bytes, size: int) -> None:
    modes = Modes()
    for at in range(0, len(written), size):
        modes.see(written[at : at + size])
    assert modes.undo() == undone


@given(st.lists(st.binary(max_size=100)))
def test_whatever_is_written_what_is_kept_of_it_is_bounded(parts: list[bytes]) -> None:
    modes = Modes()
    for part in parts:
        modes.see(part)
        assert len(modes._last) <= 64
    assert len(modes.undo()) < 200


def test_a_terminal_is_given_back_as_it_was() -> None:
    ours, theirs = os.openpty()
    try:
        before = termios.tcgetattr(theirs)
        terminal = OwnTerminal(theirs)
        terminal.end()
        terminal.begin()
        terminal.begin()
        assert not termios.tcgetattr(theirs)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        termios.tcsetattr(theirs, termios.TCSANOW, before)  # as a shell does
        terminal.again()
        assert not termios.tcgetattr(theirs)[3] & termios.ECHO
        terminal.end()
        terminal.end()
        terminal.again()
        assert termios.tcgetattr(theirs) == before
        termios.tcsetwinsize(theirs, (50, 132))
        assert size_of((99999, theirs)) == (50, 132)
        termios.tcsetwinsize(theirs, (0, 0))
        assert size_of((theirs,)) == PLAIN_SIZE
    finally:
        os.close(ours)
        os.close(theirs)


def test_what_is_no_terminal_is_left_alone() -> None:
    with Path(os.devnull).open() as nothing:
        terminal = OwnTerminal(nothing.fileno())
        terminal.begin()
        terminal.end()


def test_a_terminal_that_is_gone_is_no_fault() -> None:
    ours, theirs = os.openpty()
    terminal = OwnTerminal(theirs)
    terminal.begin()
    os.close(ours)
    terminal.again()
    terminal.end()
    os.close(theirs)


def test_the_type_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "screen")
    assert wanted(()) == ("screen", PLAIN_SIZE)
    monkeypatch.delenv("TERM")
    assert wanted(()).type == "dumb"
