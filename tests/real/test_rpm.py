"""The rpms: built here, checked by rpmlint, unpacked by rpm into a root of their own.

What they need is not to be had here: no EL and no Fedora runs them in this test.
"""

from __future__ import annotations

import filecmp
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.packages import ROOT, Artefacts, package
from tests.rig.requirements import missing_for_rpm

MISSING = missing_for_rpm()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
]

DISTRIBUTIONS = {"el9": "3.11", "fc42": "3.13"}
"""Each with its Python."""
WAIT_S = 120
DATABASE = "rpm-database/"


def library(dist: str) -> str:
    """Where a distribution's Python looks for packages."""
    return f"usr/lib/python{DISTRIBUTIONS[dist]}/site-packages"


def run(*words: str | Path, status: int = 0) -> str:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    directory = tmp_path_factory.mktemp("rpm")
    words = (f"{dist}={python}" for dist, python in DISTRIBUTIONS.items())
    return package(directory, *(word for pair in words for word in ("--rpm", pair)))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root with its own database of rpm's."""
    root = tmp_path / "root"
    root.mkdir()
    yield root
    shutil.rmtree(root)


def rpm(root: Path, *words: str | Path) -> str:
    where = ("--root", root, "--define", f"_dbpath /{DATABASE}")
    return run("rpm", *where, "--nodeps", "--noscripts", *words)


def files(root: Path) -> set[str]:
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {name for name in names if not name.startswith(DATABASE)}


def test_rpmlint_has_nothing_to_say(built: Artefacts) -> None:
    config = ROOT / "packaging" / "rpm" / "rpmlint.toml"
    said = run("rpmlint", "--config", config, *sorted(built.directory.glob("*.rpm")))
    assert re.search(r"4 packages .* 0 errors, 0 warnings", said), said


def test_the_same_files_as_in_the_debian_packages(built: Artefacts, root: Path) -> None:
    """But for where Python and systemd have theirs, and for what only dpkg wants."""
    rpm(root, "-i", built.one("vchan-guest-*.el9.*"), built.one("vchan-host-*.el9.*"))
    debian = root / "debian"
    for deb in (built.guest, built.host):
        run("dpkg-deb", "-x", deb, debian)
    ours, theirs = files(root), files(debian)
    moved = {
        re.sub(
            "^usr/lib/python3/dist-packages", library("el9"), re.sub("^lib/", "usr/lib/", name)
        ): name
        for name in theirs
    }
    only_debian = {name for name in moved if re.search(r"/(copyright|changelog\.gz)$", name)}
    licences = {f"usr/share/licenses/vchan-{side}/LICENSE" for side in ("guest", "host")}
    ours = {name for name in ours if not name.startswith("debian/")}
    assert ours == (set(moved) - only_debian) | licences
    for name in ours - licences:
        if not name.startswith("usr/bin/"):  # they name their Python
            assert filecmp.cmp(root / name, debian / moved[name], shallow=False), name


def test_what_it_installs_runs_and_all_of_it_goes(built: Artefacts, root: Path) -> None:
    dist, python = of_a_python_that_is_here()
    guest, host = built.one(f"vchan-guest-*.{dist}.*"), built.one(f"vchan-host-*.{dist}.*")
    rpm(root, "-i", guest, host)
    launcher = (root / "usr/bin/vchan-guest").read_text()
    assert launcher.startswith(f"#!/usr/bin/python{DISTRIBUTIONS[dist]} -I\n")
    path = f"import sys; sys.path.insert(0, '{root / library(dist)}'); "
    said = run(python, "-I", "-c", f"{path}sys.argv[1:] = ['--version']; " + body(launcher))
    assert said.startswith("vchan-guest ")
    # What the package's script does, and rpm's list of it.
    run(python, "-I", "-m", "compileall", "-q", root / library(dist) / "vchan")
    compiled = {f"/{name}" for name in files(root) if name.endswith(".pyc")}
    listed = run("rpm", "-qlp", guest).split() + run("rpm", "-qlp", host).split()
    assert {name for name in listed if name.endswith(".pyc")} == compiled
    rpm(root, "-e", "vchan-guest", "vchan-host")
    assert files(root) == set()
    assert not list(root.rglob("*vchan*"))


def of_a_python_that_is_here() -> tuple[str, Path]:
    """A distribution, and the Python of its version on this machine."""
    for dist, version in DISTRIBUTIONS.items():
        python = shutil.which(f"python{version}")
        if python is not None:
            return dist, Path(python)
    pytest.skip(f"none of these Pythons is here: {', '.join(DISTRIBUTIONS.values())}")


def body(launcher: str) -> str:
    return "; ".join(line for line in launcher.splitlines()[1:] if line)


def test_what_they_need(built: Artefacts) -> None:
    for dist, python in DISTRIBUTIONS.items():
        guest = run("rpm", "-qp", "--requires", built.one(f"vchan-guest-*.{dist}.*"))
        assert f"python(abi) = {python}\n" in guest
        assert "oslo" not in guest and "dist(" not in guest
        host = run("rpm", "-qp", "--requires", built.one(f"vchan-host-*.{dist}.*"))
        for name in ("amqp", "libvirt", "oslo-config", "oslo-log", "oslo-messaging"):
            assert f"python{python}dist({name}) >= " in host
        assert re.search(rf"vchan-guest = [0-9.]+-1\.{dist}", host)


def test_what_an_operator_changes_is_kept(built: Artefacts) -> None:
    host = built.one("vchan-host-*.el9.*")
    configuration = set(run("rpm", "-qcp", host).split())
    every = run("rpm", "-qlp", "--dump", host).splitlines()
    files = {line.split()[0] for line in every if line.split()[4].startswith("0100")}
    assert configuration == {name for name in files if name.startswith("/etc/")}
    (conf,) = (line.split() for line in every if line.startswith("/etc/vchan/vchan.conf "))
    assert conf[4:7] == ["0100640", "root", "vchan"]


def test_the_scripts_are_sh(built: Artefacts, tmp_path: Path) -> None:
    for name in ("vchan-guest", "vchan-host"):
        text = run("rpm", "-qp", "--scripts", built.one(f"{name}-*.el9.*"))
        scripts = re.split(r"(?m)^\w+ scriptlet \(using /bin/sh\):$", text)[1:]
        assert len(scripts) >= 3
        for number, script in enumerate(scripts):
            file = tmp_path / f"{name}{number}.sh"
            file.write_text("#!/bin/sh\n" + script)
            run("shellcheck", file)


def test_the_same_bytes_again(built: Artefacts, tmp_path: Path) -> None:
    again = package(tmp_path, "--rpm", f"el9={DISTRIBUTIONS['el9']}")
    for name in ("vchan-guest-*.el9.*", "vchan-host-*.el9.*"):
        assert again.one(name).read_bytes() == built.one(name).read_bytes()
