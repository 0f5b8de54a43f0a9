"""The examples, used wrongly: they say so in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", [(), ("vm",), ("--help",), ("-x", "/bin/true")])
def test_run_in_guest_says_what_it_wants(words: tuple[str, ...]) -> None:
    done = run("run_in_guest.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: run_in_guest.py VM /PROGRAM [ARGUMENT ...]\n"


@pytest.mark.skipif(Path("/run/vchan/host.sock").exists(), reason="a vchan-host runs here")
def test_run_in_guest_without_a_daemon() -> None:
    done = run("run_in_guest.py", "vm", "/bin/true")
    assert done.returncode == 1
    assert done.stderr.startswith("run_in_guest.py: /run/vchan/host.sock: ")
    assert done.stderr.count("\n") == 1
