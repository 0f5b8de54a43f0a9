"""Streams: what can be opened, and how each failure reads."""

from __future__ import annotations

import io
import os
import pty
import random
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from vchan.errors import LinkError, NotAPort, PortAbsent, PortBusy, PortDenied
from vchan.io import streams
from vchan.io.loop import Loop
from vchan.io.streams import Acceptor, connect_unix, listen_unix, open_port

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


# --- accepting


def test_who_comes_waits_until_there_is_room(directory: Path) -> None:
    path = str(directory / "s")
    taken: list[socket.socket] = []
    rooms = [0]
    with Loop() as loop:
        acceptor = Acceptor(
            loop,
            listen_unix(path, 0o660),
            lambda connected, _: taken.append(connected),
            has_room=lambda: len(taken) < rooms[0],
        )
        clients = [connect_unix(path), connect_unix(path)]
        for rooms[0] in (1, 2):
            acceptor.resume()
            acceptor.resume()
            while len(taken) < rooms[0]:
                loop.run_once(10)
            loop.run_once(0)  # one more waits, or none
            assert len(taken) == rooms[0]
        acceptor.close()
        acceptor.resume()
        loop.run_once(0)
        for client in clients:
            client.close()
        for each in taken:
            each.close()


def test_a_connection_that_is_gone_again_costs_no_wait(directory: Path) -> None:
    class Listener:
        def __init__(self) -> None:
            self.bound = listen_unix(str(directory / "s"), 0o660)
            self.fileno, self.close = self.bound.fileno, self.bound.close
            self.errors = [ConnectionAbortedError(), BlockingIOError()]

        def accept(self) -> tuple[socket.socket, object]:
            if self.errors:
                raise self.errors.pop()
            return self.bound.accept()

    taken: list[socket.socket] = []
    failures: list[str] = []
    with Loop() as loop:
        acceptor = Acceptor(loop, Listener(), lambda each, _: taken.append(each), failures.append)
        acceptor.resume()
        client = connect_unix(str(directory / "s"))
        for _ in range(3):
            loop.run_once(10)
        assert taken and not failures
        acceptor.close()
        client.close()
        taken[0].close()


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


class Device(io.RawIOBase):
    """A port's device: it gives what is left of one piece at a time."""

    def __init__(self, sizes: list[int]) -> None:
        self._pieces = [random.Random(size).randbytes(size) for size in sizes]
        self.everything = b"".join(self._pieces)
        self.given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self._pieces:
            return None
        given = self._pieces[0][: len(buffer)]
        self._pieces[0] = self._pieces[0][len(given) :]
        if not self._pieces[0]:
            del self._pieces[0]
        buffer[: len(given)] = given
        self.given += len(given)
        return len(given)


PIECE = streams.PORT_READ_BYTES


@pytest.mark.parametrize(
    "sizes",
    [
        [100],
        [PIECE],
        [PIECE, 100],
        [PIECE] * 16,
        [PIECE] * 17 + [100],
        [PIECE, 100, PIECE * 1, 1] * 20,
        [1] + [PIECE] * 40,
        [PIECE] + [PIECE - 1] * 60,
    ],
)
def test_a_port_is_read_whole_and_nothing_is_kept_from_who_waits_for_it(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readiness tells of what lies in the device, and of nothing that was taken out of it."""
    device = Device(sizes)

    def read(_: int, count: int) -> bytes:
        buffer = bytearray(count)
        given = device.readinto(buffer)
        if given is None:
            raise BlockingIOError
        return bytes(buffer[:given])

    monkeypatch.setattr(os, "read", read)
    port = streams.PortStream(0, "port")
    port._reader = io.BufferedReader(cast(Any, device), 1)
    received = b""
    while device.given < len(device.everything):
        part = port.read()
        assert 0 < len(part) <= streams.READ_BYTES
        received += part
        assert len(received) == device.given
    assert received == device.everything
    for _ in range(2):
        with pytest.raises(BlockingIOError):
            port.read()


def test_a_port_that_much_has_come_to_is_read_in_few_reads_and_its_absence_is_seen() -> None:
    ours, theirs = os.pipe2(os.O_NONBLOCK)
    port = streams.PortStream(ours, "port")
    sent = random.Random(1).randbytes(50_000)
    os.write(theirs, sent)
    assert port.read() + port.read() == sent
    with pytest.raises(BlockingIOError):
        port.read()
    os.write(theirs, sent[:PIECE])
    assert port.read() == sent[:PIECE]
    os.close(theirs)
    assert port.read() == b""  # asked of many, and of few
    assert port.read() == b""
    port.close()


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
