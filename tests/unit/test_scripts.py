"""scripts/install-deps, scripts/setup and scripts/test, with our programs in place of theirs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
APT = """#!/bin/bash
echo "$@" >> {calls}
[ "${{*: -1}}" != update ] || {{ echo "Hit:1 somewhere"; exit; }}
{body}
"""
INSTALLS = """
echo "Reading package lists..."
for ((i = 0; i <= 100; i += 4)); do echo "dlstatus:1:$i.0000:Retrieving file"; done
for ((i = 0; i <= 100; i += 4)); do
    echo "Unpacking libx:amd64 (1.0) ..."
    echo "pmstatus:libx:amd64:$i.1234:Unpacking libx:amd64"
done
touch {installed}
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """What apt was asked."""
    return tmp_path / "calls"


@pytest.fixture
def run(tmp_path: Path, calls: Path) -> Run:
    """install-deps on a machine without any of its packages, where nothing is really done."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def program(name: str, text: str) -> None:
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    installed = tmp_path / "installed"
    program("dpkg-query", f"#!/bin/sh\n[ ! -e {installed} ] || echo installed\n")
    program("sudo", '#!/bin/sh\nexec "$@"\n')
    program("chmod", "#!/bin/sh\n")
    program("sleep", "#!/bin/sh\n")
    # As root this script would write into /usr/sbin: only its logs may be written and removed.
    for name in ("tee", "rm"):
        real = shutil.which(name)
        text = f'case "$*" in */policy-rc.d) cat >/dev/null ;; *) exec {real} "$@" ;; esac\n'
        program(name, "#!/bin/sh\n" + text)

    def run(*words: str, apt: str = INSTALLS) -> subprocess.CompletedProcess[str]:
        body = apt.format(installed=installed)
        program("apt-get", APT.format(calls=calls, body=body))
        return subprocess.run(
            [ROOT / "scripts" / "install-deps", *words],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)},
        )

    return run


def test_progress_in_place_of_apts_own_words(run: Run, calls: Path) -> None:
    done = run("demo")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("install-deps: ") for line in lines)
    assert lines[1] == "install-deps: downloading, 0 %"
    assert lines[-1] == "install-deps: installing, 100 %"
    assert len(lines) == 1 + 2 * 11
    assert calls.read_text().splitlines()[0].endswith(" update")


def test_the_demo_needs_no_linter(run: Run, calls: Path) -> None:
    assert run("demo").returncode == 0
    asked = calls.read_text().split()
    assert {"qemu-system-x86", "libvirt-daemon", "rabbitmq-server", "libvirt-dev"} <= set(asked)
    assert not {"lintian", "shellcheck", "chromium", "prometheus", "mmdebstrap"} & set(asked)


def test_the_tests_need_all_of_it(run: Run, calls: Path) -> None:
    assert run().returncode == 0
    assert {"qemu-system-x86", "lintian", "chromium"} <= set(calls.read_text().split())


def test_what_apt_says_is_shown_when_it_fails(run: Run) -> None:
    done = run("demo", apt='echo "dlstatus:1:3.0:x"; echo "E: no space left"; exit 100')
    assert done.returncode != 0
    assert "E: no space left" in done.stderr
    assert "dlstatus" not in done.stdout + done.stderr


def test_another_apt_is_waited_for(run: Run, tmp_path: Path) -> None:
    once = tmp_path / "once"
    locked = f"[ -e {once} ] || {{{{ touch {once}; echo 'E: Could not get lock x'; exit 100; }}}}\n"
    done = run("demo", apt=locked + INSTALLS)
    assert done.returncode == 0, done.stderr
    assert "another apt is at work" in done.stderr


def test_packages_that_did_not_come_are_named(run: Run) -> None:
    done = run("demo", apt="")
    assert done.returncode == 1
    assert "still missing: qemu-system-x86" in done.stderr


def test_nothing_is_done_twice(run: Run, calls: Path) -> None:
    assert run("demo").returncode == 0
    calls.unlink()
    done = run("demo")
    assert (done.returncode, done.stdout) == (0, "install-deps: everything is installed\n")
    assert not calls.exists()


@pytest.mark.parametrize("script", ["install-deps", "setup"])
def test_what_is_no_option(run: Run, script: str) -> None:
    done = subprocess.run([ROOT / "scripts" / script, "--dem"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: scripts/")


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").iterdir()), ids=lambda path: path.name)
def test_every_script_says_what_it_does(path: Path, tmp_path: Path) -> None:
    """Wherever it is run, and before there is a virtual environment."""
    done = subprocess.run(
        [f"./{path.name}", "--help"],
        cwd=path.parent,
        env=os.environ | {"VCHAN_VENV": str(tmp_path), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/{path.name}" in done.stdout


# --- scripts/test


@pytest.fixture
def checks(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """scripts/test --quick where every check says its name, and those that are named fail."""
    for directory in ("scripts", "venv/bin"):
        (tmp_path / directory).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "test", tmp_path / "scripts")
    for name in ("cloud", "demo", "install-deps", "package", "release", "test-oldest", "world"):
        (tmp_path / "scripts" / name).touch()
    for name in ("ssh", "scp"):
        (tmp_path / "tests" / "cloud" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / "cloud" / "bin" / name).touch()
    programs = [f"venv/bin/{name}" for name in ("ruff", "mypy", "lint-imports", "pytest")]

    def run(*failing: str) -> subprocess.CompletedProcess[str]:
        for name in [*programs, "scripts/setup", "scripts/docs"]:
            short = name.rpartition("/")[2]
            path = tmp_path / name
            text = f'echo "{short} speaks" >&2\nexit {3 if short in failing else 0}\n'
            path.write_text(f"#!/bin/sh\n{text}")
            path.chmod(0o755)
        return subprocess.run(
            ["bash", tmp_path / "scripts" / "test", "--quick"],
            env=os.environ | {"VCHAN_VENV": str(tmp_path / "venv")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    return run


STEPS = ("setup", "format", "lint", "types", "documents", "imports", "shell scripts")


def test_each_step_says_how_long_it_took(
    checks: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = checks()
    assert done.returncode == 0, done.stdout
    said, _, summary = done.stdout.partition("== took\n")
    for step in STEPS:
        assert f"== {step}\n" in said
        assert f" s  {step}\n" in summary
    for program in ("mypy", "docs", "lint-imports", "pytest"):
        assert f"{program} speaks" in said
    assert "in all" in summary


@pytest.mark.parametrize("failing", ["ruff", "mypy", "docs", "lint-imports", "pytest"])
def test_a_check_that_fails_fails_the_whole(
    checks: Callable[..., subprocess.CompletedProcess[str]], failing: str
) -> None:
    done = checks(failing)
    assert done.returncode == 3
    assert f"{failing} speaks" in done.stdout
    assert ("pytest speaks" in done.stdout) is (failing == "pytest")  # what is quick comes first
    assert "in all" in done.stdout
