"""scripts/...: who asks what there is gets an answer, and nothing installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
ALL = sorted(path.name for path in SCRIPTS.iterdir())


@pytest.mark.parametrize("name", ALL)
def test_help_installs_nothing(name: str, tmp_path: Path) -> None:
    for program in ("apt-get", "pip", "mmdebstrap", "sudo"):
        (tmp_path / program).write_text('#!/bin/sh\ntouch "$0.ran"\nexit 1\n')
        (tmp_path / program).chmod(0o755)
    nowhere = str(tmp_path / "venv")
    done = subprocess.run(
        [str(SCRIPTS / name), "--help"],
        env=os.environ
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        | {"VCHAN_VENV": nowhere, "VCHAN_OLDEST_VENV": nowhere},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert f"scripts/{name}" in said, said
    assert done.returncode in (0, 2)  # 2: of those whose usage is a refusal
    assert not Path(nowhere).exists() and list(tmp_path.glob("*.ran")) == []
