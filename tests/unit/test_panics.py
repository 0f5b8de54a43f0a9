"""A test that failed as a guest's kernel panicked has tested nothing; others have failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig import panics

ROOT = Path(__file__).parents[2]
CONFTEST = "from tests.real.conftest import *\nfrom tests.real.conftest import _PANICS\n"
TESTS = """
import pathlib
from tests.rig import panics

console = pathlib.Path("console")
panics.watch(console)

def test_plain():
    assert False, "of our own"

def test_damaged():
    console.write_text("Kernel panic - not syncing: Fatal\\n---[ end Kernel panic - not\\n")
    assert False, "of the guest's"

def test_after_it():
    assert False, "of our own again"

def test_damaged_and_passes():
    console.write_text(console.read_text() + "Kernel panic - not syncing\\n")
"""


def test_only_where_one_panicked_it_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"),
            *("-c", os.devnull, "--rootdir", str(tmp_path), "test_it.py"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 failed, 1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "of our own" in done.stdout and "of our own again" in done.stdout
    assert "kernel panicked: its emulator damages memory" in done.stdout
    assert "(test_damaged)" in done.stdout


def test_what_a_console_had_stays_when_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panics, "_seen", {})
    console = tmp_path / "console"
    panics.watch(console)
    assert panics.count() == 0
    console.write_text("Kernel panic - not syncing: Attempted to kill init!\n")
    assert panics.count() == 1
    console.unlink()
    assert panics.count() == 1
