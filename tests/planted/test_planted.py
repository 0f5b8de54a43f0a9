"""Every planted bug is caught. See bugs.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.planted import __main__ as planted
from tests.planted.__main__ import Garden, find
from tests.planted.bugs import BUGS, Bug
from tests.rig import wait_until


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Garden]:
    with Garden(tmp_path_factory.mktemp("planted") / "tree") as garden:
        yield garden


@pytest.mark.planted
@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(bug, id=bug.name, marks=[pytest.mark.long] if bug.is_long else [])
        for bug in BUGS
    ],
)
def test_planted_bug_is_caught(bug: Bug, garden: Garden) -> None:
    finding = find(bug, garden)
    assert finding.caught, finding.how


def _is_gone(process: Path) -> bool:
    return not process.exists()


def test_what_cannot_be_run_or_does_not_end_has_caught_nothing(
    garden: Garden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted, "TIMEOUT_S", 3.0)
    assert garden.run("no_such_module").status not in (0, 1)
    left = "import subprocess; print(subprocess.Popen(['sleep', '1000']).pid, flush=True)\n"
    for name, then in (("ends", "raise SystemExit(7)"), ("hangs", "import time; time.sleep(1000)")):
        (garden.tree / f"{name}.py").write_text(f"{left}{then}\n")
        ended = garden.run(name)
        assert ended.status == (7 if name == "ends" else None)
        sleeper = Path(f"/proc/{int(ended.output)}")
        wait_until(
            partial(_is_gone, sleeper),
            timeout_s=30.0,
            interval_s=0.05,
            failure=lambda: "what it had started lives on",
        )


def test_what_runs_in_a_garden_ends_with_who_is_there(garden: Garden) -> None:
    (garden.tree / "stays.py").write_text("import time; time.sleep(1000)\n")
    command = {
        "tree": str(garden.tree),
        "module": "stays",
        "arguments": [],
        "environment": {},
        "timeout_s": 1000.0,
    }
    nursery = subprocess.Popen(
        [sys.executable, "-B", str(planted.NURSERY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with nursery:
        try:
            assert nursery.stdin is not None and nursery.stdout is not None
            print(json.dumps(command), file=nursery.stdin, flush=True)
            wait_until(
                lambda: bool(_children(nursery.pid)),
                timeout_s=30.0,
                interval_s=0.05,
                failure=lambda: "nothing runs",
            )
            nursery.stdin.close()  # as when its other end is no more
            ended = json.loads(nursery.stdout.readline())
            assert ended["status"] is None
            assert nursery.wait(30.0) == 0
        finally:
            nursery.kill()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
