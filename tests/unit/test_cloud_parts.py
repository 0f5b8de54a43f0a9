"""Parts of scripts/cloud that need no cloud: what it reads of consoles, its pins, its options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cloud import agent_image
from tests.cloud.__main__ import parse
from tests.cloud.install import REQUIREMENTS
from tests.cloud.journal import Journal
from tests.cloud.neutron import answer
from tests.cloud.operations import ALL, SHORT, WITHOUT
from tests.cloud.verdict import Ran

ROOT = Path(__file__).parents[2]


def cast(number: int) -> bytes:
    return b"\r\nRAN cast %d once .\r\n" % number


def test_a_console_that_is_emptied_renamed_and_deleted(tmp_path: Path) -> None:
    """By QEMU at a start, by nova at a resize, by nova after a migration."""
    console, other = tmp_path / "console.log", tmp_path / "other" / "console.log"
    other.parent.mkdir()
    journal = Journal(lambda: [console, other])
    journal.read()  # it is not there yet
    console.write_bytes(cast(1) + b"RAN cast")
    assert journal.ran() == [Ran("cast", 1, False)]
    with console.open("ab") as file:
        file.write(b" 2 once .\r\n")
        file.flush()
        journal.read()
        console.rename(other)  # it is still the same
        file.write(cast(3))
        file.flush()
        journal.read()
        other.unlink()
        file.write(cast(4))
        file.flush()
        assert [run.number for run in journal.ran()] == [1, 2, 3, 4]
    console.write_bytes(cast(5))
    journal.read()
    os.truncate(console, 0)
    journal.read()
    with console.open("ab") as file:
        file.write(cast(6))
    assert [run.number for run in journal.ran()] == [1, 2, 3, 4, 5, 6]
    with journal:
        pass  # closes what it holds


def test_what_a_guest_says_while_it_moves_keeps_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    journal = Journal(lambda: [path for path in (source, destination) if path.exists()])
    source.touch()
    journal.read()
    destination.touch()
    look = os.fstat

    def look_just_before_it_moves(fd: int) -> os.stat_result:
        seen = look(fd)
        if not source.stat().st_size:
            source.write_bytes(cast(1))
            destination.write_bytes(cast(2))
        return seen

    monkeypatch.setattr(os, "fstat", look_just_before_it_moves)
    assert len(journal.ran()) == 1
    assert [run.number for run in journal.ran()] == [1, 2]


def test_everything_is_pinned() -> None:
    lines = REQUIREMENTS.read_text().splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert len(names) > 100
    assert all("==" in name for name in names)
    assert {"nova", "keystone", "glance", "openstack-placement"} <= {
        name.partition("==")[0] for name in names
    }


def test_the_command_line_of_guests_fits_into_a_property() -> None:
    assert len(agent_image.command_line()) <= agent_image.PROPERTY_CHARACTERS_MAX


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v2.0/ports", {"ports": []}),
        ("/v2.0/security-groups.json", {"security_groups": []}),
        ("/v2.0/quotas/x", None),
    ],
)
def test_neutrons_stub_has_nothing(path: str, found: dict[str, object] | None) -> None:
    assert answer(path) == found


def test_each_operation_has_a_name_of_its_own() -> None:
    names = [operation.name for operation in (*ALL, *WITHOUT)]
    assert len(set(names)) == len(names)
    assert set(SHORT) <= set(ALL)


def test_the_command() -> None:
    assert parse(["--short", "--json"]).short
    with pytest.raises(SystemExit):
        parse(["--nonsense"])
    done = subprocess.run(
        [sys.executable, "-m", "tests.cloud", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: scripts/cloud")
    assert "--inside" not in done.stdout
