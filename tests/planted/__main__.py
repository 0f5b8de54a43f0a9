"""python -m tests.planted [--only TEXT] [--seeds N]: plant each bug in a copy; who finds it?"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.planted.bugs import BUGS, Bug, Simulation

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0


class Finding(NamedTuple):
    """What became of a planted bug."""

    bug: Bug
    caught: bool
    how: str
    took_s: float


def copy_tree(target: Path) -> None:
    """What the checks need, without caches."""
    ignored = shutil.ignore_patterns("__pycache__", "real", "bench", "fuzz")
    for name in ("vchan", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)


def find(bug: Bug, tree: Path, seeds: int = 0) -> Finding:
    """Plant it in `tree`, run its check, and take it out again.

    Args:
        seeds: Search so many seeds from 0 instead of the ones that are known to show it.
    """
    file = tree / bug.patch.file
    before = file.read_text(encoding="utf-8")
    if before.count(bug.patch.old) != 1:
        return Finding(bug, False, f"its text is not in {bug.patch.file}: update the patch", 0.0)
    file.write_text(before.replace(bug.patch.old, bug.patch.new), encoding="utf-8")
    began_s = time.perf_counter()
    try:
        caught, how = _check(bug, tree, seeds)
    finally:
        file.write_text(before, encoding="utf-8")
    return Finding(bug, caught, how, time.perf_counter() - began_s)


def _check(bug: Bug, tree: Path, seeds: int) -> tuple[bool, str]:
    if isinstance(bug.caught_by, Simulation):
        start, count, scenario = bug.caught_by
        if seeds:
            start, count = 0, seeds
        arguments = ["--start", str(start), "--seeds", str(count)]
        if scenario:
            arguments += ["--scenario", scenario]
        done = _run(tree, "-m", "tests.simulate", *arguments)
        found = re.search(r"^seed (\d+) .*?: (.*)", done.stdout, re.MULTILINE)
        if " a minute; " not in done.stdout:
            return False, f"the simulation could not be run: {done.stderr[-200:]}"
        if found is None:
            return False, f"seeds {start} to {start + count - 1} saw nothing"
        return True, f"seed {found[1]}: {found[2]}"
    done = _run(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", bug.caught_by.name)
    if done.returncode not in (0, 1):
        return False, f"{bug.caught_by.name} could not be run"
    return done.returncode == 1, bug.caught_by.name.removeprefix("tests/unit/")


def _run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", *arguments],
        cwd=tree,
        env=os.environ | {"CI": "true"},  # as where it counts: a failure must be said quickly there
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def main() -> int:
    """Print a table; 1 if a bug survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted")
    parser.add_argument("--only", default="", help="only bugs with this in their name")
    parser.add_argument("--seeds", type=int, default=0, help="search so many seeds from 0")
    options = parser.parse_args()
    survived = 0
    with tempfile.TemporaryDirectory(prefix="vchan-planted-") as name:
        tree = Path(name)
        copy_tree(tree)
        for bug in BUGS:
            if options.only not in bug.name:
                continue
            finding = find(bug, tree, options.seeds)
            survived += not finding.caught
            verdict = "caught  " if finding.caught else "SURVIVED"
            area = bug.patch.file.rpartition("/")[2]
            print(f"{verdict} {finding.took_s:5.1f} s  {area:12} {bug.name}: {finding.how[:140]}")
            sys.stdout.flush()
    print(f"{survived} survived" if survived else "none survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
