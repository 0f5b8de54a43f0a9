"""The broker with the oldest py-amqp that pyproject.toml allows, in processes of their own: what
cannot be read is not left to py-amqp's reader, whichever it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig.kept import made_once
from tests.rig.requirements import missing_for_rabbit

MISSING = missing_for_rabbit()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).resolve().parents[2]
CHECKS = (
    *("tests/unit/test_amqp.py", "tests/unit/test_amqp_content.py"),
    "tests/real/test_broker_trouble.py::test_odd_headers_cost_their_message_at_most",
    "tests/real/test_broker_trouble.py::test_a_message_that_breaks_us_is_parked",
    "tests/real/test_broker_trouble.py::test_an_alarm_is_told_and_so_is_its_end",
)


def oldest() -> str:
    found = re.search(r'"amqp>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1]


def installed(version: str) -> Path:
    """A directory with that release alone; made now, or cached."""
    with made_once(f"amqp-{version}") as (made, part):
        if part is not None:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*command, "--target", str(part), f"amqp=={version}"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                pytest.skip(f"pip: {done.stderr[-300:]}")
    return made


def test_with_the_oldest_py_amqp() -> None:
    directory = installed(f"{oldest()}.0")
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    which = "import amqp; print(amqp.__version__)"
    assert run(environment, "-c", which).strip() == f"{oldest()}.0"
    output = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKS)
    assert " passed" in output


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout
