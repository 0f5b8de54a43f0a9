"""Where the standard agent listens for byte streams."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from vchan.agents.standard import agent
from vchan.agents.standard.permissions import Exec, Rules, Shell
from vchan.agents.standard.services import Services
from vchan.errors import LinkError
from vchan.io import streams
from vchan.io.access import Access
from vchan.io.loop import Loop


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name) / "services"


def connect(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(path))
    made.settimeout(10)
    return made


def test_each_service_gets_its_connections(directory: Path) -> None:
    taken: list[tuple[str, socket.socket]] = []
    lines: list[str] = []

    def take(name: str, made: socket.socket) -> None:
        taken.append((name, made))

    with Loop() as loop:
        listening = Services(
            loop,
            str(directory),
            {name: partial(take, name) for name in ("a", "b")},
            lines.append,
        )
        assert directory.stat().st_mode & 0o077 & ~0o055 == 0
        assert (directory / "a").stat().st_mode & 0o777 == 0o600
        with connect(directory / "a") as first, connect(directory / "b"):
            while len(taken) < 2:
                loop.run_once(10)
            served = dict(taken)
            assert not served["a"].getblocking()
            served["a"].send(b"to a")
            assert first.recv(100) == b"to a"
            for made in served.values():
                made.close()
        listening.close()
        assert list(directory.iterdir()) == [] and lines == []


def test_others_are_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Access, "allows", lambda *_: False)
    lines: list[str] = []
    with Loop() as loop:
        listening = Services(
            loop, str(directory), {"a": lambda _: pytest.fail("served")}, lines.append
        )
        with connect(directory / "a") as client:
            loop.run_once(10)
            assert client.recv(1) == b""
        listening.close()
    assert lines and "may not connect here" in lines[0]


def test_without_descriptors_those_who_wait_wait_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "ACCEPT_RETRY_S", 0.01)
    taken: list[socket.socket] = []
    lines: list[str] = []

    class Full:
        def __init__(self, listener: socket.socket) -> None:
            self.listener = listener
            self.fileno = listener.fileno
            self.close = listener.close
            self.failures = 1

        def accept(self) -> tuple[socket.socket, object]:
            if self.failures:
                self.failures -= 1
                raise OSError(24, "Too many open files")
            return self.listener.accept()

    with Loop() as loop:
        listening = Services(loop, str(directory), {"a": taken.append}, lines.append)
        acceptor = listening._acceptors["a"]
        acceptor._listener = Full(acceptor._listener)  # type: ignore[arg-type]
        with connect(directory / "a"):
            while not taken:
                loop.run_once(10)
            taken[0].close()
        listening.close()
    assert lines == ["service a: cannot accept a connection: Too many open files"]


def test_a_directory_that_others_may_write_to_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with Loop() as loop, pytest.raises(LinkError, match="chmod go-w it"):
        Services(loop, str(directory), {"a": lambda _: None}, lambda _: None)
    with Loop() as loop, pytest.raises(LinkError, match="cannot be made"):
        Services(loop, f"{directory}/x/y", {"a": lambda _: None}, lambda _: None)


def test_a_service_that_somebody_serves_is_left_alone(directory: Path) -> None:
    with Loop() as loop:
        first = Services(loop, str(directory), {"b": lambda _: None}, lambda _: None)
        with pytest.raises(LinkError, match="another daemon listens there"):
            Services(
                loop, str(directory), {"a": lambda _: None, "b": lambda _: None}, lambda _: None
            )
        assert [each.name for each in directory.iterdir()] == ["b"]
        first.close()


def test_the_agent_listens_when_its_daemon_has_made_the_directory_above(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "LISTEN_AGAIN_S", 0.01)
    later = directory.parent / "later"
    lines: list[str] = []
    rules = Rules("rules", exec=Exec(("/bin/true",)), shell=Shell(("/bin/sh",)))
    with Loop() as loop:
        standard = agent.Standard(rules, SimpleNamespace(loop=loop), lines.append)  # type: ignore[arg-type]
        standard._listen(str(later / "agent.sock"))
        for _ in range(5):
            loop.run_once(10)
        assert [line for line in lines if "no services yet" in line] == lines and len(lines) == 1
        later.mkdir()
        while not (later / "services" / "shell").exists():
            loop.run_once(10)
        connect(later / "services" / "exec").close()
        standard._close()
    assert list((later / "services").iterdir()) == []


def test_an_agent_that_serves_nothing_makes_no_directory(directory: Path) -> None:
    with Loop() as loop:
        standard = agent.Standard(Rules("rules"), SimpleNamespace(loop=loop), print)  # type: ignore[arg-type]
        standard._listen(str(directory.parent / "agent.sock"))
        standard._close()
    assert not directory.exists()
