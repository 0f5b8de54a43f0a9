"""What scripts/package builds, for tests."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.rig import RigError

DATE = "1700000000"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Artefacts:
    """The files that one run of scripts/package left."""

    directory: Path

    def one(self, pattern: str) -> Path:
        """The only one of this name."""
        (found,) = self.directory.glob(pattern)
        return found

    @property
    def guest(self) -> Path:
        """The guest's Debian package."""
        return self.one("vchan-guest_*_all.deb")

    @property
    def host(self) -> Path:
        """The host's Debian package."""
        return self.one("vchan-host_*_all.deb")

    @property
    def zipapp(self) -> Path:
        """The guest's daemon in one file."""
        return self.one("vchan-guest.pyz")


def package(directory: Path, *options: str) -> Artefacts:
    """Do what scripts/package does, dated as ever, so that a commit meanwhile changes nothing.

    Raises:
        RigError: It failed; with its output.
    """
    builder = ROOT / "packaging" / "build.py"
    command = [sys.executable, str(builder), "--output", str(directory), *options]
    environment = os.environ | {"SOURCE_DATE_EPOCH": DATE, "DEBFULLNAME": "", "DEBEMAIL": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RigError(f"{builder} gave {done.returncode}:\n{done.stdout}{done.stderr}")
    return Artefacts(directory)


def debian_version(package: Path) -> str:
    """The version in a package's name."""
    return package.name.split("_")[1]
