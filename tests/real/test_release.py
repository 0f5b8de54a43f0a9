"""scripts/release: what it refuses, and what it makes of a copy of this tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from vchan import __version__

ROOT = Path(__file__).parents[2]
_MISSING = [name for name in ("dpkg-deb", "git", "gpg", "gpg-agent") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {_MISSING}"),
]
WHO = ("-c", "user.name=somebody", "-c", "user.email=somebody@vchan.invalid")


def git(tree: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *WHO, *words], cwd=tree, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """This project as its first commit, with what is not committed here."""
    target = tmp_path / "tree"
    for name in git(ROOT, "ls-files", "-co", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    changes = target / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("## Unreleased", f"## {__version__}"))
    git(target, "init", "-q")
    git(target, "add", "-A")
    git(target, "commit", "-qm", "all of it")
    return target


def release(tree: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In the virtual environment that runs the tests: nothing has to be installed."""
    return subprocess.run(
        ["scripts/release", *options],
        cwd=tree,
        env=os.environ | {"VCHAN_VENV": sys.prefix} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_refuses_what_is_not_committed_or_not_told(tree: Path, tmp_path: Path) -> None:
    """Before it sets up anything, which takes minutes."""
    nowhere = {"VCHAN_VENV": str(tmp_path / "venv"), "GNUPGHOME": str(tmp_path)}
    (tree / "vchan" / "new.py").write_text("")
    done = release(tree, **nowhere)
    assert done.returncode == 1 and "not committed" in done.stderr
    (tree / "vchan" / "new.py").unlink()
    done = release(tree, "--sign", "nobody", **nowhere)
    assert done.returncode == 1 and "gpg has no such secret key" in done.stderr

    git(tree, "mv", "CHANGELOG.md", "old")
    (tree / "CHANGELOG.md").write_text("# Changes\n\n## Unreleased\n")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "no section")
    done = release(tree, **nowhere)
    assert done.returncode == 1 and f"no section '## {__version__}'" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_what_it_makes_is_checked_and_signed(tree: Path, tmp_path: Path) -> None:
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    keyring = {"GNUPGHOME": str(home)}
    try:
        subprocess.run(
            ["gpg", "--batch", "--passphrase", "", "--quick-generate-key", "somebody"],
            env=os.environ | keyring,
            check=True,
            capture_output=True,
        )
        out = tmp_path / "out"
        done = release(tree, "--output", str(out), "--sign", "somebody", **keyring)
    finally:
        subprocess.run(["gpgconf", "--kill", "all"], env=os.environ | keyring, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Good signature" in done.stderr
    made = {file.name for file in out.iterdir()}
    assert made >= {
        "SHA256SUMS",
        "SHA256SUMS.asc",
        f"vchan-{__version__}-py3-none-any.whl",
        f"vchan-{__version__}.tar.gz",
        f"vchan-guest_{__version__}_all.deb",
        f"vchan-host_{__version__}_all.deb",
        "vchan-guest.pyz",
    }
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    with tarfile.open(out / f"vchan-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(git(tree, "ls-files").splitlines())
    left_out = {name for name in tracked - names if not name.startswith(".")}
    assert left_out == set(), "MANIFEST.in"
    assert git(tree, "status", "--porcelain") == "", "it leaves no traces"
    # A second one does not write over the first.
    done = release(tree, "--output", str(out))
    assert done.returncode == 1 and "is not empty" in done.stderr
