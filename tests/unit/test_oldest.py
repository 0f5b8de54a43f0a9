"""The oldest releases that are allowed: scripts/test-oldest has them, and they behave."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("oslo_log", reason='oslo.log is not installed: pip install "vchan[host]"')

ROOT = Path(__file__).parents[2]

FOR_DEVELOPERS = ("docs", "fuzz", "test")
"""Extras of what a checkout alone needs."""
LOG = """
import sys
from oslo_config import cfg
from oslo_log import log
from vchan.host import config_files
conf = cfg.ConfigOpts()
log.register_options(conf)
conf(sys.argv[1:], project="vchan", default_config_files=[], default_config_dirs=[])
config_files.set_up_log(conf, "vchan")
log.getLogger("vchan.host").warning("one line")
"""


def test_the_constraints_are_what_the_project_allows() -> None:
    """Of every extra that somebody installs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    used = [extra for name, extra in extras.items() if name not in FOR_DEVELOPERS]
    minima = dict(each.split(">=") for extra in used for each in extra if ">=" in each)
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() == minima.keys()
    for name, version in pinned.items():
        assert version.split(".")[:2] == minima[name].split(".")[:2], name


def logged(directory: Path, *options: str) -> str:
    """What a program writes that logs one line."""
    file = directory / "vchan.conf"
    file.write_text("\n".join(("[DEFAULT]", *options)))
    command = [sys.executable, "-c", LOG, f"--config-file={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("option", ["", "use_stderr = true"])
def test_a_log_line_ends_with_its_text(tmp_path: Path, option: str) -> None:
    """Whatever the release of oslo.log: 5.0 ends each with an escape code."""
    assert logged(tmp_path, option).endswith("one line\n")


def test_a_colour_that_was_asked_for_stays(tmp_path: Path) -> None:
    form = "logging_default_format_string = %(color)s%(message)s"
    assert "\x1b" in logged(tmp_path, "log_color = true", form)
