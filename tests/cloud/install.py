"""What the cloud is made of: an environment with OpenStack, made once and kept for its pins."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.rig import RigError
from tests.rig.guest_image import cache_directory
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

REQUIREMENTS: Final = Path(__file__).with_name("requirements.txt")
INSTALLER: Final = "uv==0.9.2"
"""pip takes three times as long."""
PYTHON: Final = (3, 11)
"""What the pins are for."""
PROGRAMS: Final = ("mariadbd", "mariadb-install-db", "qemu-img", "unshare", "nsenter")
INSTALL_TIMEOUT_S: Final = 900.0
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str | None:
    """None if a cloud can be made here; else what this machine lacks."""
    if sys.version_info[:2] != PYTHON:
        return f"the cloud's pins are for Python 3.11, and this is 3.{sys.version_info[1]}"
    if os.geteuid() != 0:
        return "only root may make the cloud's namespaces"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}: run scripts/install-deps cloud"
    return missing_for_rabbit() or missing_for_libvirt()


def kept_directory() -> Path:
    """Where this cloud's environment and what can be made once are kept; another for other pins."""
    key = hashlib.sha256(f"{sys.version_info[:2]} {REQUIREMENTS.read_text()}".encode()).hexdigest()
    return cache_directory() / f"cloud-{key[:12]}"


def install() -> Path:
    """The directory of `kept_directory`, with the environment in its `venv`.

    Raises:
        RigError: The packages cannot be installed; with what the installer said.
    """
    kept = kept_directory()
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (kept / "venv" / "complete").exists():
            _make(kept / "venv", kept / "installer")
    return kept


def _make(venv: Path, installer: Path) -> None:
    for directory in (installer, venv):
        _run([sys.executable, "-m", "venv", "--clear", str(directory)])
    _run([str(installer / "bin" / "pip"), "install", "--quiet", INSTALLER])
    command = [str(installer / "bin" / "uv"), "pip", "install", "--quiet", "--no-deps"]
    python = str(venv / "bin" / "python")
    _run([*command, "--python", python, "--requirement", str(REQUIREMENTS)])
    shutil.rmtree(installer)
    (venv / "complete").touch()


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RigError(f"{command[0]} took over {INSTALL_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise RigError(f"{' '.join(command[:4])} failed:\n{done.stdout}{done.stderr}")
