"""What the simulation excuses is what the document says is known not to hold, and is counted."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.simulate.exempt import COUNTED, EXEMPTIONS, NOT_SIMULATED, describe, exempt, is_exemption

ROOT = Path(__file__).parents[2]


def bullets() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("\n## What is known not to hold\n")[2].partition("\n## ")[0]
    found = section.split("\n- ")[1:]
    assert all(bullet.startswith("**") for bullet in found), "each begins with its name"
    return found


def test_the_document_names_the_exemptions_and_no_others() -> None:
    names = [re.match(r"\*\*(.+?)\*\*", bullet) for bullet in bullets()]
    assert [name[1] for name in names if name] == list(EXEMPTIONS)


def test_the_document_says_which_are_not_simulated() -> None:
    marked = [bullet for bullet in bullets() if "(not simulated)" in bullet]
    assert len(marked) == len(NOT_SIMULATED)
    assert all(any(name in bullet for name in NOT_SIMULATED) for bullet in marked)


def test_each_is_counted_and_printed_the_unused_too() -> None:
    stats: Counter[str] = Counter()
    exempt(stats, COUNTED[0], 3)
    lines = describe(stats)
    assert [line.split(maxsplit=2)[2].partition(":")[0] for line in lines] == list(EXEMPTIONS)
    assert [line.split()[0] for line in lines[:2]] == ["3", "0"]
    assert all(map(is_exemption, stats))


def test_nothing_else_is_called_an_exemption() -> None:
    for file in (ROOT / "tests" / "simulate").glob("*.py"):
        if file.name != "exempt.py":
            assert '"EXEMPT' not in file.read_text(), file
