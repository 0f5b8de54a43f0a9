"""What the cloud is made of: an environment with OpenStack, made once and kept for its pins."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Final

from tests.rig.environment import add_packages, make_environment
from tests.rig.kept import cache_directory, locked
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

REQUIREMENTS: Final = Path(__file__).with_name("requirements.txt")
PYTHONS: Final = ((3, 11), (3, 13))
"""What the pins are for: Debian 12's, and Debian 13's."""
PROGRAMS: Final = ("mariadbd", "mariadb-install-db", "qemu-img", "unshare", "nsenter")
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str | None:
    """None if a cloud can be made here; else what this machine lacks."""
    if sys.version_info[:2] not in PYTHONS:
        names = " and ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        return f"the cloud's pins are for Python {names}, and this is 3.{sys.version_info[1]}"
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
    with locked(kept_directory().name) as kept:
        venv = kept / "venv"
        if not (venv / "complete").exists():
            kept.mkdir(parents=True, exist_ok=True)
            make_environment(venv)
            pins = ("--no-deps", "--requirement", str(REQUIREMENTS))
            add_packages(venv / "bin" / "python", *pins)
            (venv / "complete").touch()
    return kept
