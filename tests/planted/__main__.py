"""python -m tests.planted [--only TEXT] [--seeds N]: plant each bug in a copy; who finds it?"""

from __future__ import annotations

import argparse
import compileall
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import NamedTuple, Self

from tests.planted.bugs import BUGS, Bug, Simulation
from tests.rig.ending import end_on_signals

ROOT = Path(__file__).resolve().parents[2]
NURSERY = Path(__file__).with_name("nursery.py")
TIMEOUT_S = 300.0
PYTEST = (
    # Nothing is explained, and nothing is made anew that is the same for every bug: modules are
    # compiled (`compile_tree`), asserts left as they are, plugins that no check uses left out.
    *("-q", "-x", "-p", "no:cacheprovider", "--assert=plain"),
)
ENVIRONMENT = {
    "CI": "true",  # as where it counts: a failure must be said quickly there
    "HYPOTHESIS_PROFILE": "caught",  # the first example that fails is enough
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    # Sources change within the second, which bytecode would not tell.
    "PYTHONDONTWRITEBYTECODE": "1",
}


class Finding(NamedTuple):
    """What became of a planted bug."""

    bug: Bug
    caught: bool
    how: str
    took_s: float


def copy_tree(target: Path) -> None:
    """What the checks need, without caches. Bugs are planted in sources: so those run."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "real", "bench", "fuzz")
    for name in ("vchan", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)


def compile_tree(tree: Path) -> None:
    """Once, and not for every bug. By the sources' hashes: times are too coarse to tell a source
    from the same with a bug."""
    compileall.compile_dir(tree, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)


class Ended(NamedTuple):
    """A command's end. `status` None: it did not end in time."""

    status: int | None
    output: str
    errors: str


class Garden:
    """A copy of the tree, at a path that is new, and what runs commands there (nursery.py)."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree

    def __enter__(self) -> Self:
        copy_tree(self.tree)
        compile_tree(self.tree)
        self._nursery = subprocess.Popen(
            [sys.executable, "-B", str(NURSERY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._nursery.communicate()

    def run(self, module: str, *arguments: str) -> Ended:
        """`python -m module arguments` in the tree."""
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        command = {
            "tree": str(self.tree),
            "module": module,
            "arguments": arguments,
            "environment": ENVIRONMENT,
            "timeout_s": TIMEOUT_S,
        }
        print(json.dumps(command), file=self._nursery.stdin, flush=True)
        answer = self._nursery.stdout.readline()
        if not answer:
            raise RuntimeError(f"nursery.py has ended: {self._nursery.wait()}")
        return Ended(**json.loads(answer))


def find(bug: Bug, garden: Garden, seeds: int = 0) -> Finding:
    """Plant it in the garden's tree, run its check, and take it out again.

    Args:
        seeds: Search so many seeds from 0 instead of the ones that are known to show it.
    """
    file = garden.tree / bug.patch.file
    before = file.read_text(encoding="utf-8")
    if before.count(bug.patch.old) != 1:
        return Finding(bug, False, f"its text is not in {bug.patch.file}: update the patch", 0.0)
    file.write_text(before.replace(bug.patch.old, bug.patch.new), encoding="utf-8")
    began_s = time.perf_counter()
    try:
        caught, how = _check(bug, garden, seeds)
    finally:
        file.write_text(before, encoding="utf-8")
    return Finding(bug, caught, how, time.perf_counter() - began_s)


def _check(bug: Bug, garden: Garden, seeds: int) -> tuple[bool, str]:
    if isinstance(bug.caught_by, Simulation):
        start, count, scenario = bug.caught_by
        if seeds:
            start, count = 0, seeds
        arguments = ["--start", str(start), "--seeds", str(count)]
        if scenario:
            arguments += ["--scenario", scenario]
        done = garden.run("tests.simulate", *arguments)
        found = re.search(r"^seed (\d+) .*?: (.*)", done.output, re.MULTILINE)
        if " a minute; " not in done.output:
            return False, f"the simulation could not be run: {done.errors[-200:]}"
        if found is None:
            return False, f"seeds {start} to {start + count - 1} saw nothing"
        return True, f"seed {found[1]}: {found[2]}"
    done = garden.run("pytest", *PYTEST, bug.caught_by.name)
    if done.status not in (0, 1):
        return False, f"{bug.caught_by.name} could not be run: {done.output[-200:]}{done.errors}"
    return done.status == 1, bug.caught_by.name.removeprefix("tests/unit/")


def main() -> int:
    """Print a table; 1 if a bug survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted")
    parser.add_argument("--only", default="", help="only bugs with this in their name")
    parser.add_argument("--seeds", type=int, default=0, help="search so many seeds from 0")
    options = parser.parse_args()
    survived = 0
    with (
        tempfile.TemporaryDirectory(prefix="vchan-planted-") as name,
        Garden(Path(name) / "tree") as garden,
    ):
        for bug in BUGS:
            if options.only not in bug.name:
                continue
            finding = find(bug, garden, options.seeds)
            survived += not finding.caught
            verdict = "caught  " if finding.caught else "SURVIVED"
            area = bug.patch.file.rpartition("/")[2]
            print(f"{verdict} {finding.took_s:5.1f} s  {area:12} {bug.name}: {finding.how[:140]}")
            sys.stdout.flush()
    print(f"{survived} survived" if survived else "none survived")
    return 1 if survived else 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
