"""The paths of channels, from one run of the daemon to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from vchan.host.hypervisor import known_sockets
from vchan.host.hypervisor.known_sockets import KnownSockets

VM, OTHER = "8b6a6b6e-0f0c-4d2b-9a53-3f7e1f6f5f10", "5e0d8d1a-6f5d-4c63-9a0e-3d7f6c1b2a41"


def test_a_path_is_good_for_one_start_and_another_run_of_the_daemon(tmp_path: Path) -> None:
    path = str(tmp_path / "known")
    sockets = KnownSockets(path)
    assert sockets.find(VM, 3) is None
    sockets.note(VM, 3, "/a")
    sockets.note(OTHER, 4, "/b")
    again = KnownSockets(path)
    assert again.find(VM, 3) == "/a"
    assert again.find(VM, 5) is None  # another QEMU
    assert again.find(VM, -1) is None  # none
    again.note(VM, -1, None)
    again.keep_only(frozenset({OTHER}))
    assert KnownSockets(path).find(VM, 3) is None
    assert KnownSockets(path).find(OTHER, 4) == "/b"
    again.keep_only(frozenset())
    assert KnownSockets(path).find(OTHER, 4) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": ["x", "y"]}', "\0\xff"])
def test_a_file_that_is_none_is_no_trouble(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "known").write_text(text, "latin-1")
    sockets = KnownSockets(str(tmp_path / "known"))
    assert sockets.find(VM, 1) is None
    assert "known: not read" in caplog.text
    sockets.note(VM, 1, "/a")
    assert KnownSockets(str(tmp_path / "known")).find(VM, 1) == "/a"


def test_a_place_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sockets = KnownSockets(str(tmp_path / "nowhere" / "known"))
    sockets.note(VM, 1, "/a")
    sockets.note(VM, 2, "/b")
    assert sockets.find(VM, 2) == "/b"  # in this run
    assert caplog.text.count("not written") == 1


def test_without_a_path_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sockets = KnownSockets()
    sockets.note(VM, 1, "/a")
    assert sockets.find(VM, 1) == "/a"
    assert list(tmp_path.iterdir()) == []
    assert known_sockets.FILE_BYTES_MAX
