"""What the service manager is told."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import wait_until
from tests.rig.hosting import HostEnd
from tests.rig.stand_in import StandIn
from tests.unit.cable import Cable
from vchan.errors import LinkError, PortAbsent, PortBusy
from vchan.guest.daemon import Daemon, Options
from vchan.io.loop import Loop
from vchan.io.service_manager import FEEDS_PER_TIMEOUT, ServiceManager

PID = 4711
TURN_S = 0.05
WAIT_S = 30.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture
def manager_socket(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        server.setblocking(False)
        yield server


def heard(server: socket.socket) -> list[str]:
    """All that has arrived."""
    out = []
    while True:
        try:
            out.append(server.recv(4096).decode())
        except BlockingIOError:
            return out


def environment(server: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": server.getsockname(), **more}


def test_ready_status_and_stopping_are_told(loop: Loop, manager_socket: socket.socket) -> None:
    manager = ServiceManager(loop, environment(manager_socket), PID)
    assert heard(manager_socket) == []
    manager.ready("serving")
    manager.status("host: compute1")
    manager.stopping()
    assert heard(manager_socket) == [
        "READY=1\nSTATUS=serving",
        "STATUS=host: compute1",
        "STOPPING=1",
    ]


def test_a_name_in_the_abstract_namespace(loop: Loop, tmp_path: Path) -> None:
    name = f"vchan-test-{tmp_path}"[:100]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind("\0" + name)
        server.setblocking(False)
        ServiceManager(loop, {"NOTIFY_SOCKET": "@" + name}, PID).stopping()
        assert heard(server) == ["STOPPING=1"]


def test_the_loop_feeds_the_watchdog_from_ready_on(
    loop: Loop, manager_socket: socket.socket
) -> None:
    timeout_us = int(TURN_S * 1_000_000)
    given = environment(manager_socket, WATCHDOG_USEC=str(timeout_us), WATCHDOG_PID=str(PID))
    manager = ServiceManager(loop, given, PID)
    loop.run_once(TURN_S)
    assert heard(manager_socket) == []
    started_s = loop.time()
    manager.ready("serving")
    manager.ready("reloaded")  # feeds no faster
    fed: list[str] = []
    while fed.count("WATCHDOG=1") < 4:
        loop.run_once(TURN_S)
        fed += heard(manager_socket)
    assert loop.time() - started_s >= 3 * TURN_S / FEEDS_PER_TIMEOUT


def test_a_loop_that_stands_still_feeds_nothing(loop: Loop, manager_socket: socket.socket) -> None:
    given = environment(manager_socket, WATCHDOG_USEC="1000", WATCHDOG_PID=str(PID))
    ServiceManager(loop, given, PID).ready("serving")
    assert heard(manager_socket) == ["READY=1\nSTATUS=serving", "WATCHDOG=1"]


@pytest.mark.parametrize("more", [{}, {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}])
def test_a_watchdog_that_is_not_ours_is_not_fed(
    loop: Loop, manager_socket: socket.socket, more: dict[str, str]
) -> None:
    ServiceManager(loop, environment(manager_socket, **more), PID).ready("serving")
    assert heard(manager_socket) == ["READY=1\nSTATUS=serving"]


def test_children_are_told_nothing_of_it(loop: Loop, manager_socket: socket.socket) -> None:
    given = environment(manager_socket, WATCHDOG_USEC="3000000", WATCHDOG_PID=str(PID), HOME="/")
    ServiceManager(loop, given, PID)
    assert given == {"HOME": "/"}


def test_no_manager_and_a_dead_one_are_no_trouble(loop: Loop, tmp_path: Path) -> None:
    for given in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}):
        manager = ServiceManager(loop, dict(given), PID)
        manager.ready("serving")
        manager.stopping()


def test_a_manager_that_does_not_read_blocks_nobody(
    loop: Loop, manager_socket: socket.socket
) -> None:
    manager = ServiceManager(loop, environment(manager_socket), PID)
    for _ in range(1000):
        manager.status("x" * 200)
    assert len(heard(manager_socket)) < 1000


# ---------------------------------------------------------------- the guest's daemon


class GuestDaemon:
    """A guest daemon as its service manager sees it."""

    def __init__(self, port: Path, server: socket.socket, log: Path) -> None:
        self._log = log
        self._server = server
        self.states: list[str] = []
        words = ["--port", f"unix:{port}", "--socket", str(log.parent / "agent.sock")]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vchan.guest.daemon", *words, "--exit-without-port", "1"],
                env=os.environ | {"NOTIFY_SOCKET": server.getsockname()},
                stderr=output,
            )

    def wait(self, reached: Callable[[], bool]) -> None:
        def look() -> bool:
            self.states += heard(self._server)
            return reached()

        wait_until(
            look,
            timeout_s=WAIT_S,
            interval_s=0.01,
            failure=lambda: f"{self.states}\n{self._log.read_text()}",
        )


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


def test_the_guest_daemon_tells_its_life(directory: Path, manager_socket: socket.socket) -> None:
    with Cable(directory) as cable:
        daemon = GuestDaemon(cable.guest, manager_socket, directory / "log")
        try:
            with HostEnd(cable.host, name="compute1") as host:
                host.wait_ready()
                daemon.wait(lambda: "STATUS=host compute1" in daemon.states)
            daemon.process.terminate()
            assert daemon.process.wait(WAIT_S) == 0
            daemon.wait(lambda: daemon.states[-1] == "STOPPING=1")
            assert daemon.states[0] == f"READY=1\nSTATUS=agents at {directory / 'agent.sock'}"
        finally:
            daemon.process.kill()
            daemon.process.wait()


def test_it_ends_without_its_port(directory: Path, manager_socket: socket.socket) -> None:
    later = directory / "later"
    daemon = GuestDaemon(later / "guest", manager_socket, directory / "log")
    try:
        assert daemon.process.wait(WAIT_S) == 0
        assert "no port for 1 s" in (directory / "log").read_text()
        daemon.wait(lambda: daemon.states[-1] == "STOPPING=1")
    finally:
        daemon.process.kill()
        daemon.process.wait()


def test_only_an_absence_that_lasts_ends_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options("unix:/nowhere", str(directory / "agent.sock"), quiet=True)
    daemon = Daemon(options._replace(exit_without_port_s=10))
    stopped = []
    now_s = 0.0
    problem: LinkError | None = None

    def opener() -> Any:
        if problem is not None:
            raise problem

    monkeypatch.setattr(daemon, "_opener", opener)
    loop = daemon.loop
    told = StandIn(loop, time=lambda: now_s, stop=lambda: stopped.append(now_s))
    monkeypatch.setattr(daemon, "loop", told)

    absent, busy = PortAbsent("port", "absent"), PortBusy("port", "busy")
    story = [(0, absent), (9, absent), (9.5, None), (11, absent), (20, absent), (20.5, busy)]
    story += [(22, absent), (31, absent), (32, absent)]
    for now_s, problem in story:  # noqa: B007
        with contextlib.suppress(LinkError):
            daemon._open_port()
    assert stopped == [32]
    daemon._server.close()
    loop.close()
