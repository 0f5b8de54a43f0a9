"""Every planted bug is caught. See bugs.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.planted.__main__ import copy_tree, find
from tests.planted.bugs import BUGS, Bug


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("planted")
    copy_tree(path)
    yield path


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_planted_bug_is_caught(bug: Bug, tree: Path) -> None:
    finding = find(bug, tree)
    assert finding.caught, finding.how
