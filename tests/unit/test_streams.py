"""Streams: what can be opened, and how each failure reads."""

from __future__ import annotations

import os
import pty
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vchan.errors import LinkError, NotAPort, PortAbsent, PortBusy, PortDenied
from vchan.io import streams
from vchan.io.streams import connect_unix, listen_unix, open_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short one: a socket's path holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


def one_line(error: LinkError, path: Path) -> str:
    text = str(error)
    assert "\n" not in text
    assert str(path) in text
    return text


# --- connecting


def test_bytes_pass_and_the_end_is_seen(directory: Path) -> None:
    path = directory / "s"
    with listen_unix(str(path), 0o660) as server:
        ours = connect_unix(str(path))
        theirs, _ = server.accept()
        with pytest.raises(BlockingIOError):
            ours.read()
        assert ours.write(b"there") == 5
        assert theirs.recv(10) == b"there"
        theirs.send(b"back")
        assert ours.read() == b"back"
        theirs.close()
        assert ours.read() == b""
        ours.close()
        ours.close()


def test_a_full_socket_takes_parts_and_then_nothing(directory: Path) -> None:
    path = directory / "s"
    with listen_unix(str(path), 0o660) as server:
        ours = connect_unix(str(path))
        theirs, _ = server.accept()
        taken = 0
        with pytest.raises(BlockingIOError):
            while True:
                taken += ours.write(bytes(1 << 20))
        assert 0 < taken < 1 << 20
        ours.close()
        theirs.close()


def test_connecting_to_a_missing_socket_says_so(directory: Path) -> None:
    with pytest.raises(PortAbsent) as caught:
        connect_unix(str(directory / "nothing"))
    one_line(caught.value, directory / "nothing")
    path = directory / "dead"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with pytest.raises(PortAbsent, match="nobody listens"):
        connect_unix(str(path))


def test_connecting_to_a_socket_whose_queue_is_full_says_so(directory: Path) -> None:
    path = directory / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)  # as libvirt does for QEMU's channels
        clients = []
        with pytest.raises(PortBusy, match="other clients"):
            for _ in range(4):
                clients.append(connect_unix(str(path)))  # noqa: PERF401 - until it raises
        for client in clients:
            client.close()
    assert len(clients) == 2


def test_a_path_that_is_too_long(directory: Path) -> None:
    path = directory / ("x" * 120)
    for opener in (connect_unix, lambda path: listen_unix(path, 0o660)):
        with pytest.raises(LinkError, match="too long") as caught:
            opener(str(path))
        one_line(caught.value, path)


# --- listening


def test_the_socket_has_its_permissions_and_a_directory_anybody_enters(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "made" / "s"
    monkeypatch.setattr(streams, "RUNTIME_DIRECTORY", str(path.parent))
    with listen_unix(str(path), 0o620):
        assert stat.S_IMODE(path.stat().st_mode) == 0o620
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


def test_a_dead_socket_is_replaced(directory: Path) -> None:
    path = str(directory / "s")
    listen_unix(path, 0o660).close()
    with listen_unix(path, 0o660) as server:
        connect_unix(path).close()
        server.accept()[0].close()


def test_a_live_socket_is_not_replaced(directory: Path) -> None:
    path = directory / "s"
    with listen_unix(str(path), 0o660):
        with pytest.raises(PortBusy, match="another daemon") as caught:
            listen_unix(str(path), 0o660)
        one_line(caught.value, path)
        connect_unix(str(path)).close()


def test_a_file_in_the_sockets_place_is_not_removed(directory: Path) -> None:
    path = directory / "precious"
    path.write_text("data")
    with pytest.raises(NotAPort, match="configure another path") as caught:
        listen_unix(str(path), 0o660)
    one_line(caught.value, path)
    assert path.read_text() == "data"


@pytest.mark.parametrize("name", ["no/s", "no/where/s", "file/s"])
def test_a_directory_that_does_not_exist_is_not_made(directory: Path, name: str) -> None:
    """The path may be mistyped."""
    (directory / "file").touch()
    path = directory / name
    problem = f"{path.parent} is no directory: make it, or configure another path"
    with pytest.raises(PortAbsent, match=problem) as caught:
        listen_unix(str(path), 0o660)
    one_line(caught.value, path)
    assert [each.name for each in directory.iterdir()] == ["file"]


# --- ports


def test_a_port_that_is_not_there(directory: Path) -> None:
    with pytest.raises(PortAbsent, match="no such port") as caught:
        open_port(str(directory / "p"))
    one_line(caught.value, directory / "p")


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "socket"])
def test_a_port_that_is_no_port(directory: Path, kind: str) -> None:
    path = directory / "p"
    match kind:
        case "file":
            path.write_text("")
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case _:
            listen_unix(str(path), 0o660).close()
    with pytest.raises(NotAPort, match="is no character device") as caught:
        open_port(str(path))
    one_line(caught.value, path)


def test_a_terminal_is_no_port() -> None:
    ours, theirs = pty.openpty()
    try:
        with pytest.raises(NotAPort, match="is a terminal"):
            open_port(os.ttyname(theirs))
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_device_that_cannot_be_waited_for_is_no_port() -> None:
    with pytest.raises(NotAPort, match="cannot be waited for"):
        open_port("/dev/null")


def test_a_character_device_is_opened_and_closed_twice() -> None:
    port = open_port("/dev/random")
    assert port.read()
    assert port.write(b"gone") == 4
    port.close()
    port.close()


# --- permissions

DENIED = """
import os, sys
sys.path.insert(0, {root!r})
from vchan.errors import PortDenied
from vchan.io.streams import connect_unix, listen_unix, open_port
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for open_it in (lambda: connect_unix({s!r}), lambda: open_port({p!r}),
                lambda: listen_unix({l!r}, 0o660)):
    try:
        open_it()
    except PortDenied as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what this user may not open")
def test_permissions(directory: Path) -> None:
    directory.chmod(0o755)
    device = directory / "p"
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with listen_unix(str(directory / "s"), 0o600):
        program = DENIED.format(
            root=str(ROOT), s=str(directory / "s"), p=str(device), l=str(directory / "l")
        )
        done = subprocess.run(
            [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
        )
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        str(directory / "s"),
        str(device),
        str(directory / "l"),
    ]
    assert all(": uid 65534 may not open it: " in line for line in lines)
    assert "it has uid 0, gid 0, mode 0600; run as that user or in that group" in lines[0]
    assert lines[1].endswith("or give access with a udev rule")
    assert f"{directory} has uid 0, gid 0, mode 0755; run as that user" in lines[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what this user may not open")
def test_a_directory_that_may_not_be_entered(directory: Path) -> None:
    program = DENIED.format(
        root=str(ROOT), s=str(directory / "s"), p=str(directory / "p"), l=str(directory / "l")
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(
        line.endswith("may not open it: a directory above it may not be entered") for line in lines
    )
    assert PortDenied.__doc__
