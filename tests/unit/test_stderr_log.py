"""What stands in front of a line of the log, and when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from vchan.guest.stderr_log import log
log(4, "a line\\x1b[2J\\nand no other")
"""


def said(stream: str | None) -> str:
    """What reaches standard error, a pipe, if JOURNAL_STREAM says this: `{}` is the pipe itself."""
    read, write = os.pipe()
    found = os.fstat(write)
    environment = dict(os.environ)
    environment.pop("JOURNAL_STREAM", None)
    if stream is not None:
        environment["JOURNAL_STREAM"] = stream.format(f"{found.st_dev}:{found.st_ino}")
    command = [sys.executable, "-I", "-c", PROGRAM.format(root=str(ROOT))]
    subprocess.run(command, stderr=write, env=environment, check=True)
    os.close(write)
    with os.fdopen(read) as file:
        return file.read()


def test_the_journal_is_told_the_priority() -> None:
    assert said("{}") == "<4>a line?[2J?and no other\n"


@pytest.mark.parametrize("stream", [None, "", "1:2", "nonsense", "{}9"])
def test_who_is_not_the_journal_is_not(stream: str | None) -> None:
    """A terminal, a file, a pipe that the service's output was sent through."""
    assert said(stream) == "a line?[2J?and no other\n"


def test_nobody_reads_it() -> None:
    command = [sys.executable, "-I", "-c", PROGRAM.format(root=str(ROOT))]
    subprocess.run(["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", *command], check=True)
