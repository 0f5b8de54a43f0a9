"""oslo.messaging's own functional tests on vchan:// with a vchan-host: newest, oldest release."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.rig.environment import environment
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
Results = list[dict[str, str]]
"""How each test ended."""


@pytest.fixture(scope="module")
def oldest() -> Path:
    """The Python of an environment with the oldest release, made once."""
    wanted = [f"oslo.messaging=={OLDEST}", "pytest", "hypothesis", "oslotest", "testscenarios"]
    wanted += ["requests"]  # oslo.messaging's tests import it
    return environment(f"oslo-{OLDEST}", wanted, vchan=True)


def run_functional(python: Path, kind: str, directory: Path) -> Results:
    """How each of oslo.messaging's functional tests ended, with a vchan-host of its own.

    Args:
        kind: "threading", or "eventlet", which the suite patches into its process itself.
    """
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
            [str(python), "-W", "ignore", "-m", "tests.rig.oslo_functional", kind, url, *LEFT_OUT],
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


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """For what runs at the same time: all of it sleeps a lot."""
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(scope="module")
def own_tests(pool: ThreadPoolExecutor, oldest: Path) -> Future[subprocess.CompletedProcess[str]]:
    """Of the driver, with the oldest release: begun."""
    files = ["tests/unit/test_oslo_driver.py", "tests/unit/test_oslo_driver_contract.py"]
    return pool.submit(
        subprocess.run,
        [str(oldest), "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def functional(
    pool: ThreadPoolExecutor, short_directory: Path, oldest: Path
) -> dict[tuple[str, str], Future[Results]]:
    """By the threads' kind and the release: begun."""
    kinds = ["threading"]
    if importlib.util.find_spec("eventlet") is not None:
        kinds.append("eventlet")
    return {
        (kind, name): pool.submit(run_functional, python, kind, short_directory / f"{kind}-{name}")
        for kind in kinds
        for name, python in (("newest", Path(sys.executable)), ("oldest", oldest))
    }


@needs_libvirt
@pytest.mark.parametrize("kind", ["threading", "eventlet"])
@pytest.mark.usefixtures("own_tests")
def test_functional_tests_of_both_releases(
    functional: dict[tuple[str, str], Future[Results]], kind: str
) -> None:
    if (kind, "newest") not in functional:
        pytest.skip("eventlet is not installed")
    for name in ("newest", "oldest"):
        results = functional[kind, name].result()
        others = [result for result in results if result["how"] != "passed"]
        report = "\n".join(f"{name}: {each['test']} {each['text']}" for each in others)
        assert not others, report  # none is skipped either
        assert len(results) >= TESTS_MIN


def test_our_own_tests_with_the_oldest_release(
    own_tests: Future[subprocess.CompletedProcess[str]],
) -> None:
    done = own_tests.result()
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
