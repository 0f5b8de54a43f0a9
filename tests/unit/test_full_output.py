"""Programs whose standard output takes nothing: they say so, on one line, and fail."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("oslo_log", reason='oslo.log is not installed: pip install "vchan[host]"')

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    name: module.removesuffix(":main")
    for name, module in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "scripts"
    ].items()
}


def run(output: str, *words: str, unbuffered: str = "") -> tuple[int, str]:
    """(exit status, standard error) of a Python module with that standard output."""
    command = '"$0" -m "$@" >&-' if output == "closed" else '"$0" -m "$@" >/dev/full'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_that_cannot_be_written_is_a_failure(program: str) -> None:
    for output, word, unbuffered in (("full", "--help", ""), ("closed", "--version", "1")):
        status, said = run(output, PROGRAMS[program], word, unbuffered=unbuffered)
        assert status == 1, said
        assert said.count("\n") == 1
        assert "standard output cannot be written: " in said


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_reader_that_has_seen_enough_is_no_failure(program: str) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        done = subprocess.run(
            [sys.executable, "-m", PROGRAMS[program], "--help"],
            cwd=ROOT,
            stdout=write_fd,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write_fd)
    assert (done.returncode, done.stderr) == (0, "")
