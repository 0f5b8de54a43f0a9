"""Environments of Python's with what only some tests need, made once and kept; and what of one a
guest's image must carry."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.rig import RigError
from tests.rig.guest_image import _unpack
from tests.rig.kept import locked, made_once

ROOT: Final = Path(__file__).parents[2]
INSTALLER: Final = "uv==0.9.2"
"""pip takes many times as long."""
INSTALL_S: Final = 900.0
TRACE_S: Final = 180.0


def pinned(name: str) -> list[str]:
    """The requirements in a file of this directory."""
    lines = Path(__file__).with_name(name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def environment(
    name: str, wanted: Sequence[str], *, without: Sequence[str] = (), vchan: bool = False
) -> Path:
    """The interpreter of an environment with these packages; made now, or cached.

    Args:
        without: Packages to add without what they need.
        vchan: With this tree's vchan, so that the driver is found by its entry point: as the
            documents have it installed beside an agent.
    """
    key = hashlib.sha256(" ".join([sys.version, *wanted, *without]).encode()).hexdigest()[:12]
    with locked(f"{name}-{key}") as made:
        python = made / "bin" / "python"
        if not (made / "complete").exists():
            make_environment(made)
            add_packages(python, *wanted)
            if without:
                add_packages(python, "--no-deps", *without)
            (made / "complete").touch()
        if vchan:
            _install_vchan(python, made / "vchan-installed")
    return python


def make_environment(directory: Path) -> None:
    """Without packages, in place of what is there."""
    run(sys.executable, "-m", "venv", "--clear", str(directory))


def add_packages(python: Path, *words: str) -> None:
    """Packages into an interpreter's environment."""
    with made_once(INSTALLER) as (made, part):
        if part is not None:
            pip = (sys.executable, "-m", "pip", "install", "--quiet")
            run(*pip, "--no-deps", "--target", str(part), INSTALLER)
    program = str(made / "bin" / "uv")
    run(program, "pip", "install", "--quiet", "--python", str(python), *words)


def _install_vchan(python: Path, stamp: Path) -> None:
    """This tree's, whose modules are those of the tree: only what names them is installed."""
    declared = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    wanted = f"{ROOT} {declared}\n"
    if not stamp.exists() or stamp.read_text() != wanted:
        add_packages(python, "--editable", f"{ROOT}[oslo]")
        stamp.write_text(wanted)


def carried(python: Path, *program: str | Path, cwd: Path) -> dict[str, bytes]:
    """What of an environment a program has loaded, for `guest_image.build`; and SQLite's library,
    which the guests' Python lacks.

    Args:
        program: It ends by printing, in a line, what `loaded.files` says.
    """
    command = [str(python), "-W", "ignore", *map(str, program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TRACE_S, cwd=cwd)
    if done.returncode:
        raise RigError(f"{' '.join(command)}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    _unpack(("libsqlite3-0",), cwd / "sqlite")
    (library,) = (cwd / "sqlite").rglob("libsqlite3.so.0")
    found["usr/lib/x86_64-linux-gnu/libsqlite3.so.0"] = library
    return {name: Path(path).read_bytes() for name, path in found.items()}


def run(*command: str) -> None:
    """A program that must succeed.

    Raises:
        RigError: It did not; with what it said.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RigError(f"{command[0]} took over {INSTALL_S:.0f} s") from error
    if done.returncode != 0:
        raise RigError(f"{' '.join(command[:4])} failed:\n{done.stdout}{done.stderr}")
