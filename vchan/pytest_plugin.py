"""A fixture for the tests of agents, for who asks for it: in conftest.py or in the test's module

    pytest_plugins = ["vchan.pytest_plugin"]

No entry point: that would be imported by every run of pytest wherever vchan is installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vchan.testing import FakeGuest


@pytest.fixture
def vchan_guest() -> Iterator[FakeGuest]:
    """A guest in memory: see `vchan.testing`."""
    with FakeGuest() as guest:
        yield guest
