"""Real parts, started once for all tests that can share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import rig_directory

if TYPE_CHECKING:  # it needs libvirt-python, which may be what is missing
    from tests.rig.cloud import Cloud, Vm


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
