"""scripts/fuzz [MINUTES] [TARGET...]: look for inputs that break a promise."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.corpus import INPUT_BYTES_MAX, fewest, load, save
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS
from tests.rig.ending import end_on_signals

ROOT = Path(__file__).resolve().parents[2]
KEPT_MAX = 100
KEPT_BYTES_MAX = 512
"""Of what a run found, so much is kept in the repository."""
INPUT_S_MAX = 10
"""An input that takes longer is a finding."""
RSS_MB_MAX = 1024


class Outcome(NamedTuple):
    """Of fuzzing one target."""

    executions: int
    per_s: int
    coverage: int
    inputs: int
    crashes: list[Path]
    output: str


def fuzz(target: str, seconds: int, directory: Path) -> Outcome:
    """Fuzz one target, beginning with what is known."""
    found, crashes = directory / target, directory / f"{target}-crashes"
    found.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(exist_ok=True)
    for data in [*seeds(target), *load(target)]:
        (found / sha256(data).hexdigest()).write_bytes(data)
    output = _worker(
        target,
        f"-max_total_time={seconds}",
        f"-artifact_prefix={crashes}/",
        f"-timeout={INPUT_S_MAX}",
        str(found),
    )
    (directory / f"{target}.log").write_text(output)
    return Outcome(
        _last(r"stat::number_of_executed_units: *(\d+)", output),
        _last(r"stat::average_exec_per_sec: *(\d+)", output),
        _last(r"cov: (\d+)", output),
        len(list(found.iterdir())),
        sorted(crashes.iterdir()),
        output,
    )


def _worker(target: str, *arguments: str) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.fuzz.worker",
            target,
            f"-max_len={INPUT_BYTES_MAX}",
            f"-rss_limit_mb={RSS_MB_MAX}",
            "-print_final_stats=1",
            *arguments,
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return done.stdout.decode("utf-8", "replace")


def _last(pattern: str, text: str) -> int:
    numbers = re.findall(pattern, text)
    return int(numbers[-1]) if numbers else 0


def keep(target: str, directory: Path) -> int:
    """Into the repository: the fewest small inputs that reach what was reached."""
    found = [path.read_bytes() for path in (directory / target).iterdir()]
    small = [data for data in found if len(data) <= KEPT_BYTES_MAX]
    inputs = fewest(TARGETS[target], [*seeds(target), *load(target), *small])
    known = {*seeds(target)}
    kept = [data for data in inputs if data not in known][:KEPT_MAX]
    save(target, kept)
    return len(kept)


def main() -> int:
    """1 if anything was found."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz")
    parser.add_argument("minutes", nargs="?", type=float, default=10.0, help="in all [10]")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)} [all]")
    parser.add_argument("--keep", action="store_true", help="what was reached, in the repository")
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    if unknown := sorted(set(targets) - TARGETS.keys()):
        parser.error(f"no such target: {', '.join(unknown)}; expected {', '.join(TARGETS)}")
    seconds = max(1, int(options.minutes * 60 / len(targets)))
    directory = Path(tempfile.mkdtemp(prefix="vchan-fuzz-"))
    crashes: list[Path] = []
    total = 0
    print(f"{'target':10}{'executions':>12}{'a second':>10}{'coverage':>10}{'inputs':>8}  findings")
    for target in targets:
        outcome = fuzz(target, seconds, directory)
        total += outcome.executions
        crashes += outcome.crashes
        print(
            f"{target:10}{outcome.executions:12}{outcome.per_s:10}{outcome.coverage:10}"
            f"{outcome.inputs:8}  {len(outcome.crashes) or 'none'}",
            flush=True,
        )
        if not outcome.executions and not outcome.crashes:
            print(outcome.output[-2000:])
            return 1
        if options.keep:
            print(f"{'':10}kept {keep(target, directory)} inputs", flush=True)
    print(f"{total} executions; inputs, logs and findings are in {directory}")
    for path in crashes:
        print(
            f"\n{path.parent.name.removesuffix('-crashes')}: {path}\n    {path.read_bytes().hex()}"
        )
    return 1 if crashes else 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
