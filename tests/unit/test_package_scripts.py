"""What the packages' scripts remove when they are purged, and what they leave."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

PACKAGING = Path(__file__).parents[2] / "packaging"
WANTS = "etc/systemd/system/multi-user.target.wants"

UNITS = {
    "host": ("vchan-host", "vchan-conductor", "vchan-relay@control"),
    "guest": ("vchan-guest", "vchan-http", "vchan-zmq"),
}


def purge(side: str, root: Path) -> None:
    """Run the script on a system below `root`."""
    text = (PACKAGING / side / "postrm").read_text()
    for directory in ("/etc/", "/var/", "/run/"):
        text = text.replace(directory, f"{root}{directory}")
    subprocess.run(["sh", "-c", text, "postrm", "purge"], check=True, cwd=root)


@pytest.mark.parametrize("side", UNITS)
def test_a_purge_leaves_what_an_administrator_wrote(side: str, tmp_path: Path) -> None:
    (tmp_path / WANTS).mkdir(parents=True)
    own = []
    for unit in UNITS[side]:
        drop_in = tmp_path / f"etc/systemd/system/{unit}.service.d/own.conf"
        drop_in.parent.mkdir()
        drop_in.write_text("[Service]\nNice=-5\n")
        own.append(drop_in)
    purge(side, tmp_path)
    assert [path for path in own if not path.exists()] == []


@pytest.mark.parametrize("side", UNITS)
def test_a_purge_leaves_no_unit_enabled_and_no_directory_empty(side: str, tmp_path: Path) -> None:
    wants = tmp_path / WANTS
    wants.mkdir(parents=True)
    for unit in UNITS[side]:
        (tmp_path / f"etc/systemd/system/{unit}.service.d").mkdir()
        if unit not in ("vchan-host",):  # deb-systemd-helper's to remove
            (wants / f"{unit}.service").symlink_to("/nonexistent")
    purge(side, tmp_path)
    left = list((tmp_path / "etc/systemd/system").rglob("*vchan*"))
    assert left == []


def test_a_purge_removes_logs(tmp_path: Path) -> None:
    log = tmp_path / "var/log/vchan/audit.log"
    log.parent.mkdir(parents=True)
    log.touch()
    purge("host", tmp_path)
    assert not log.parent.exists()
