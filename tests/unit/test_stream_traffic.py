"""What `scripts/demo` has byte streams carry, on this machine alone: trouble is noticed."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("amqp", reason="py-amqp is not installed")
pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests import demo
from tests.rig.forwarding import CHUNK_BYTES, Server
from tests.rig.programs import SH, Programs
from tests.rig.stream_traffic import RATE_BYTES_S, PacedTransfer, ShellTraffic

# A shell to which each line is told, and which says other things, as `say` has it.
FALSE_SHELL = """
import os, re, sys, termios
settings = termios.tcgetattr(0)
print("$ ", end="", flush=True)
word = re.search("word=([0-9a-f]+)", input())[1]
settings[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, settings)
print("begun-1-", flush=True)
for number, line in enumerate(sys.stdin, 1):
    right = f"{number * 3} 1 {word}"
    if line.startswith("exit"):
        break
    print(eval(sys.argv[1]) if number == 3 else right, flush=True)
print(sys.argv[2], end="", flush=True)
settings[3] |= termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, settings)
raise SystemExit(int(sys.argv[3]))
"""
RIGHT = "right"


@pytest.fixture(scope="module")
def world() -> Iterator[Programs]:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        Programs(Path(name)) as world,
    ):
        yield world


def test_a_shell_answers_until_it_is_told_to_end(world: Programs) -> None:
    with ShellTraffic([sys.executable, *world.cli_words("shell", "vm")]) as shell:
        shell.wait_answers(3)
        world.cut()
        shell.wait_answers(6)
        shell.finish()
    assert shell.problems == []
    assert shell.answers >= 6


def test_a_shell_that_is_killed_is_broken(world: Programs) -> None:
    with ShellTraffic([sys.executable, *world.cli_words("shell", "vm")]) as shell:
        shell.wait_answers(1)
        os.kill(shell.pid, signal.SIGKILL)
        shell.wait_answers(1 << 30)
        shell.finish()
    assert len(shell.problems) == 1


@pytest.mark.parametrize(
    ("third", "at_end", "ended", "said"),
    [
        (RIGHT, "", 7, ""),
        (f"{RIGHT} + '\\n' + {RIGHT}", "", 7, "in place of"),  # twice
        (f"{RIGHT}[:-1]", "", 7, "in place of"),
        (f"{RIGHT}.replace(' 1 ', ' 2 ')", "", 7, "in place of"),  # another process
        (f"{RIGHT}.replace(word, '')", "", 7, "in place of"),
        (f"'x' + {RIGHT}", "", 7, "in place of"),
        (RIGHT, "more", 7, "at its end"),
        (RIGHT, "", 1, "ended with 1"),
    ],
)
def test_each_byte_of_a_shell_counts(third: str, at_end: str, ended: int, said: str) -> None:
    command = [sys.executable, "-c", FALSE_SHELL, third, at_end, str(ended)]
    with ShellTraffic(command) as shell:
        shell.wait_answers(5)
        shell.finish()
    assert [said in problem for problem in shell.problems] == ([True] if said else [])


def test_a_connection_goes_on_at_its_pace() -> None:
    with Server() as server:
        began_s = time.monotonic()
        transfer = PacedTransfer(f"127.0.0.1:{server.target}", 10 * CHUNK_BYTES)
        assert transfer.finish() == []
    assert transfer.received == 10 * CHUNK_BYTES
    assert time.monotonic() - began_s > 9 * CHUNK_BYTES / RATE_BYTES_S


def test_a_terminal_that_is_not_given_back_is_trouble() -> None:
    with ShellTraffic([SH]) as shell:
        shell.wait_answers(1)
        shell.finish()
    assert ["the terminal" in problem for problem in shell.problems] == [True]


@pytest.fixture
def figures() -> dict[str, Any]:
    return {name: 0 for name, _ in demo.ROWS} | {"first_answer_ms": []}


@pytest.mark.parametrize("wrong", ["", "lost", "duplicated", "reordered", "streams_broken"])
def test_the_demos_status_table_and_json(
    wrong: str,
    figures: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures |= {"stream_bytes": 3 << 30} | ({wrong: 1} if wrong else {})
    for name in ("missing_for_rabbit", "missing_for_libvirt", "missing_for_qemu"):
        monkeypatch.setattr(demo, name, lambda: None)
    monkeypatch.setattr(demo.Demo, "run", lambda self: figures)
    monkeypatch.setattr(sys, "argv", ["demo", "--json"])
    assert demo.main() == (1 if wrong else 0)
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == figures
    shown = {line[2:28].rstrip(): int(line[28:]) for line in table if line.strip()}
    assert shown == {title: figures[name] for name, title in demo.ROWS}
