"""Real parts, started once for all tests that can share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import panics, rig_directory

if TYPE_CHECKING:  # it needs libvirt-python, which may be what is missing
    from tests.rig.cloud import Cloud, Vm


LONGEST = (
    *("package", "cloud_init", "oslo_functional", "ansible", "faults", "openstack", "torture"),
    *("broker", "deploy", "cluster", "guest_requests", "oldest_amqp", "programs", "rpm", "release"),
    *("old_and_new", "masakari", "openrc", "octavia", "trove", "neutron", "attacks", "conductor"),
)
"""Files of tests of over a minute, about by their time. A worker takes a whole file: the short ones
come last, so that all end together."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Needs xdist's --no-loadscope-reorder: it takes the number of a file's tests for its time."""
    here = Path(__file__).parent
    places = {here / f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


_PANICS = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """For what follows."""
    item.stash[_PANICS] = panics.count()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed while a guest's kernel panicked has tested nothing: said at the end."""
    report = yield
    if report.failed and panics.count() > item.stash.get(_PANICS, 0):
        print(report.longreprtext)
        reason = "a guest's kernel panicked: its emulator damages memory in a migration of hundreds"
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {reason} ({item.name})")
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was not tested, and why, where nobody can miss it."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons = Counter(str(report.longrepr[-1]) for report in skipped)
    terminalreporter.section("NOT TESTED", red=True)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session")
def short_directory() -> Iterator[Path]:
    with rig_directory() as directory:
        yield directory


@pytest.fixture(scope="session")
def cloud(short_directory: Path) -> Iterator[Cloud]:
    from tests.rig.cloud import Cloud

    with Cloud(short_directory) as cloud:
        yield cloud


@pytest.fixture
def vm(cloud: Cloud, request: pytest.FixtureRequest) -> Iterator[Vm]:
    """A VM that is ready: the one of the test before, if that left it well."""
    failed_before = request.session.testsfailed
    vm = cloud.shared_vm()
    yield vm
    if request.session.testsfailed > failed_before:
        print(cloud.logs())
        cloud.drop_shared_vm()
