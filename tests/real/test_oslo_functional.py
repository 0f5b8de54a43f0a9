"""oslo.messaging's own functional tests on vchan:// with a vchan-host: newest, oldest release."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.rig.guest_image import cache_directory
from tests.rig.requirements import missing_for_libvirt
from vchan.errors import LinkError

MISSING = missing_for_libvirt()
pytestmark = pytest.mark.real
needs_libvirt = pytest.mark.skipif(bool(MISSING), reason=str(MISSING))

ROOT: Final = Path(__file__).parents[2]
OLDEST: Final = "14.0.0"
"""The oldest release of oslo.messaging that is supported: OpenStack Zed's, and Debian 12's."""
LEFT_OUT: Final = {"test_simple_batch": "a notifier waits for the listener: docs/oslo.md"}
TESTS_MIN: Final = 28
"""What must at least have run: the releases have 30 and more."""
TIMEOUT_S: Final = 500.0


@pytest.fixture(scope="module")
def oldest() -> Path:
    """The Python of an environment with the oldest release, made once."""
    wanted = [f"oslo.messaging=={OLDEST}", "pytest", "hypothesis", "oslotest", "testscenarios"]
    wanted += ["requests"]  # oslo.messaging's tests import it
    key = hashlib.sha256(" ".join([sys.version, *wanted]).encode()).hexdigest()[:12]
    environment = cache_directory() / f"oslo-{OLDEST}-{key}"
    python = environment / "bin" / "python"
    if not (environment / "complete").exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(environment)],
            [str(python), "-m", "pip", "install", "--quiet", *wanted],
        ):
            subprocess.run(command, check=True, timeout=600)
        (environment / "complete").touch()
    # This tree's vchan, so that the driver is found by its entry point.
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(ROOT)]
    subprocess.run(install, check=True, timeout=600)
    return python


def run_functional(python: Path, directory: Path) -> list[dict[str, str]]:
    """How each of oslo.messaging's functional tests ended, with a vchan-host of its own."""
    from tests.rig.compute import HostDaemon

    class Alone(HostDaemon):
        """Without VMs: there is no libvirt at the socket that it is told."""

        def _answers(self) -> bool:
            with suppress(LinkError):
                return "version" in self.call("status")
            return False

    directory.mkdir()
    daemon = Alone(directory, "host", f"qemu+unix:///system?socket={directory}/none", None)
    daemon.start()
    url = f"vchan://{daemon.socket}"
    try:
        done = subprocess.run(
            [str(python), "-W", "ignore", "-m", "tests.rig.oslo_functional", url, *LEFT_OUT],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    finally:
        daemon.stop()
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert results, done.stderr[-4000:]
    return results


@needs_libvirt
def test_functional_tests_of_both_releases(short_directory: Path, oldest: Path) -> None:
    """At the same time: they sleep a lot."""
    runs = {"newest": Path(sys.executable), "oldest": oldest}
    with ThreadPoolExecutor() as pool:
        ended = {
            name: pool.submit(run_functional, python, short_directory / f"oslo-{name}")
            for name, python in runs.items()
        }
    for name, results in ended.items():
        others = [result for result in results.result() if result["how"] != "passed"]
        report = "\n".join(f"{name}: {each['test']} {each['text']}" for each in others)
        assert not others, report  # none is skipped either
        assert len(results.result()) >= TESTS_MIN


def test_our_own_tests_with_the_oldest_release(oldest: Path) -> None:
    files = ["tests/unit/test_oslo_driver.py", "tests/unit/test_oslo_driver_contract.py"]
    done = subprocess.run(
        [str(oldest), "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_oldest_release_in_processes_that_eventlet_has_patched(oldest: Path) -> None:
    """The newest is in tests/unit."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/unit/test_oslo_eventlet.py"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "GREEN_PYTHON": str(oldest)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
