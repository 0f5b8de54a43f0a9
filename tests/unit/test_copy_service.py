"""The service `files` of the standard agent: who gets what, and how many there may be."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.test_copies import Seen, fill
from vchan.agents.standard import copies
from vchan.agents.standard.copies import COPIES_MAX, CopyService
from vchan.agents.standard.permissions import FilePermissions, Rules
from vchan.copies.pipe import CopyBroken, CopyPipe
from vchan.copies.trees import Everything, TreePlace, TreeReceiver, TreeSender, open_entry
from vchan.services.copies import (
    INTO,
    RECURSIVE,
    VERSION,
    CopyMessage,
    CopyReady,
    CopyRefusal,
    CopyRequest,
    DirectoryEnd,
    EntryFacts,
    FileData,
    FileEntry,
    TreeDone,
    encode_copy,
)

WAIT_S = 30.0
FACTS = EntryFacts(0o644, 0, 0, 0)
LARGE = 3_000_000


class Client:
    """Who asks."""

    def __init__(self, service: CopyService) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.socket = ours
        self.pipe = CopyPipe(ours)
        service.serve(theirs)

    def ask(self, path: Path | str, *, name: str = "", flags: int = 0) -> CopyMessage:
        """The answer to a request: to put, if there is a name."""
        request = CopyRequest(bool(name), VERSION, flags, name.encode(), os.fsencode(path))
        self.pipe.write(encode_copy(request))
        return self.pipe.read()

    def refusal(self, path: Path | str, *, name: str = "", flags: int = 0) -> str:
        answer = self.ask(path, name=name, flags=flags)
        assert isinstance(answer, CopyRefusal), answer
        return answer.text


class Site:
    """A service and its clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines: list[str] = []
        allowed = FilePermissions((f"{directory}/in/**", f"{directory}/only/*.log"), 10_000_000)
        self.service = CopyService(Rules("rules", read=allowed, write=allowed), self.lines.append)
        self.clients: list[Client] = []
        for name in ("in", "out", "only"):
            (directory / name).mkdir()

    def client(self) -> Client:
        self.clients.append(Client(self.service))
        return self.clients[-1]

    def close(self) -> None:
        self.service.close()
        for client in self.clients:
            client.socket.close()
        wait(lambda: not self.service._open)


def wait(reached: Callable[[], object]) -> None:
    until_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < until_s
        time.sleep(0.005)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path.resolve())
    yield made
    made.close()


def put(client: Client, content: Path) -> TreeDone:
    fd = open_entry(None, os.fsencode(content))
    try:
        return TreeSender(client.pipe, Everything(), Seen()).send(fd, os.fsencode(content))
    finally:
        os.close(fd)


def get(client: Client, into: Path, name: str) -> TreeDone:
    directory = os.open(into, os.O_RDONLY)
    try:
        return TreeReceiver(
            client.pipe,
            TreePlace(directory, name.encode(), os.fsencode(into / name)),
            Everything(),
            Seen(),
            takes_directories=True,
            resumes=True,
            keeps=False,
            umask=0o022,
        ).receive()
    finally:
        os.close(directory)


def test_one_request_after_the_other(site: Site) -> None:
    content = fill(site.directory / "out" / "f", 1000)
    client = site.client()
    for name in ("a", "b"):
        assert client.ask(site.directory / "in", name=name) == CopyReady()
        assert put(client, site.directory / "out" / "f") == TreeDone(1, 1000)
    assert client.ask(site.directory / "in", flags=RECURSIVE) == CopyReady()
    assert get(client, site.directory / "out", "back") == TreeDone(2, 2000)
    assert (site.directory / "out" / "back" / "b").read_bytes() == content
    assert any("wrote 1 files, 1000 bytes" in line for line in site.lines)


@pytest.mark.parametrize(
    ("path", "name", "flags", "text"),
    [
        ("out/f", "", 0, "is not allowed (rules: [read] allow)"),
        ("out", "", RECURSIVE, "is not allowed (rules: [read] allow)"),
        ("only", "", RECURSIVE, "is not allowed (rules: [read] allow)"),
        ("in/../out/f", "", 0, "an empty part, or . or .. in it"),
        ("in/link/f", "", 0, "symbolic link"),
        ("in/link", "", 0, "is a symbolic link"),
        ("in/device", "", 0, "is a pipe"),
        ("in/none", "", 0, "No such file or directory"),
        ("in/d", "", 0, "is a directory; -r copies it"),
        ("out/f", "x", 0, "is not allowed (rules: [write] allow)"),
        ("in/link/f", "x", 0, "symbolic link"),
        ("in/none/f", "x", 0, "No such file or directory"),
        ("in/f", "x", INTO, "Not a directory"),
        ("in/none", "x", INTO, "No such file or directory"),
        ("in/large", "", 0, "has 10000001 bytes, 10000000 are allowed (bytes_max)"),
    ],
)
def test_what_is_refused(site: Site, path: str, name: str, flags: int, text: str) -> None:
    fill(site.directory / "out" / "f", 10)
    fill(site.directory / "in" / "f", 10)
    (site.directory / "in" / "d").mkdir()
    (site.directory / "in" / "link").symlink_to(site.directory / "out")
    os.mkfifo(site.directory / "in" / "device")
    with (site.directory / "in" / "large").open("wb") as file:
        file.truncate(10_000_001)
    client = site.client()
    assert text in client.refusal(f"{site.directory}/{path}", name=name, flags=flags)
    assert client.ask(site.directory / "in" / "f") == CopyReady(), "the next may be granted"


def test_another_version_is_refused(site: Site) -> None:
    client = site.client()
    client.pipe.write(encode_copy(CopyRequest(False, VERSION + 1, 0, b"", b"/x")))
    answer = client.pipe.read()
    assert isinstance(answer, CopyRefusal) and "upgrade the older" in answer.text


def test_what_is_no_request_ends_it(site: Site) -> None:
    client = site.client()
    client.pipe.write(encode_copy(DirectoryEnd()))
    with pytest.raises(EOFError):
        client.pipe.read()
    assert any("broke the protocol" in line for line in site.lines)


def test_a_later_copy_takes_the_place_of_one_that_stands_still(site: Site) -> None:
    """Its command was killed, and nobody has told the guest."""
    content = fill(site.directory / "out" / "f", LARGE)
    dead = site.client()
    assert dead.ask(site.directory / "in", name="f") == CopyReady()
    dead.pipe.write(encode_copy(FileEntry(0, FACTS, LARGE, b"")))
    dead.pipe.write(encode_copy(FileData(content[:50_000])))
    part = site.directory / "in" / ".f.vchan-part"
    wait(lambda: part.exists() and part.stat().st_size == 50_000)
    client = site.client()
    assert client.ask(site.directory / "in" / "f", name="f") == CopyReady()
    assert put(client, site.directory / "out" / "f") == TreeDone(1, LARGE)
    assert (site.directory / "in" / "f").read_bytes() == content
    with pytest.raises((EOFError, CopyBroken)):
        dead.pipe.read()


def test_at_the_most_connections_the_next_is_refused(site: Site) -> None:
    busy = [site.client() for _ in range(COPIES_MAX)]
    answer = site.client().pipe.read()
    assert isinstance(answer, CopyRefusal) and "COPIES_MAX" in answer.text
    busy[0].socket.close()
    wait(lambda: len(site.service._open) < COPIES_MAX)
    fill(site.directory / "in" / "f", 10)
    assert site.client().ask(site.directory / "in" / "f") == CopyReady()


def test_one_that_is_idle_makes_room(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(site.directory / "in" / "f", 10)
    idle = [site.client() for _ in range(COPIES_MAX)]
    monkeypatch.setattr(copies, "COPY_IDLE_S", 0.0)
    assert site.client().ask(site.directory / "in" / "f") == CopyReady()
    with pytest.raises(EOFError):
        idle[0].pipe.read()


def test_its_end_ends_every_copy(site: Site) -> None:
    content = fill(site.directory / "out" / "f", LARGE)
    client = site.client()
    assert client.ask(site.directory / "in", name="f") == CopyReady()
    client.pipe.write(encode_copy(FileEntry(0, FACTS, LARGE, b"")))
    for at in range(0, 600_000, 60_000):
        client.pipe.write(encode_copy(FileData(content[at : at + 60_000])))
    part = site.directory / "in" / ".f.vchan-part"
    wait(lambda: part.exists() and part.stat().st_size == 600_000)
    site.service.close()
    with pytest.raises((EOFError, CopyBroken)):
        client.pipe.read()
    wait(lambda: not site.service._open)
    assert part.stat().st_size == 600_000 and not (site.directory / "in" / "f").exists()


def test_its_end_waits_until_small_parts_are_gone(site: Site) -> None:
    client = site.client()
    assert client.ask(site.directory / "in", name="f") == CopyReady()
    client.pipe.write(encode_copy(FileEntry(0, FACTS, LARGE, b"")))
    client.pipe.write(encode_copy(FileData(b"x" * 60_000)))
    part = site.directory / "in" / ".f.vchan-part"
    wait(part.exists)
    site.service.close()
    assert not part.exists() and not site.service._open


def test_threads_do_not_outlive_their_connections(site: Site) -> None:
    before = threading.active_count()
    for _ in range(20):
        client = site.client()
        client.socket.close()
        wait(lambda: not site.service._open)
    wait(lambda: threading.active_count() <= before)
