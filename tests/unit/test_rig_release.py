"""The rig boots guests of any release it knows: only `tests.rig.release` names one."""

from __future__ import annotations

import re
from pathlib import Path

from tests.rig import release

TESTS = Path(__file__).parents[1]
ROOMS = ("rig", "torture", "attack", "bench")
NEWER = TESTS / "rig/newer_debian.py"
"""Debian 13's programs, beside another Debian's."""
OF_A_RELEASE = re.compile(r"python ?3\.\d|" + "|".join(release.RELEASES), re.IGNORECASE)


def test_no_other_file_names_a_release_or_its_python() -> None:
    files = [file for room in ROOMS for file in sorted((TESTS / room).rglob("*.py"))]
    assert len(files) > 60, "it looks at nothing"
    found = [
        f"{file.relative_to(TESTS)}:{number}: {line.strip()}"
        for file in files
        if file not in (Path(release.__file__), NEWER)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if OF_A_RELEASE.search(line)
    ]
    assert found == []
