"""`vchan forward` and `vchan proxy` with a socket that systemd has opened: by systemd's own program
where it is installed, and by hand; and the units for it, as systemd reads them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("amqp", reason="py-amqp is not installed")

from tests.rig import end_process
from tests.rig.forwarding import ROOT, WAIT_S, Forwarding, Server, Transfer, connect
from tests.rig.ports import claim_ports
from vchan.cli.failures import EXIT_INTERRUPTED, EXIT_USAGE

MIB = 1 << 20
UNITS = ROOT / "packaging" / "host"
HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.fixture(scope="module")
def world() -> Iterator[Forwarding]:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        Forwarding(Path(name), "forward name:vm tcp:* allow\n", "tcp:*") as world,
    ):
        yield world


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@contextmanager
def handed(
    world: Forwarding, listener: socket.socket, *words: str, notify: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, to which a listener is handed over as systemd does it."""
    fd = listener.fileno()
    process = subprocess.Popen(
        [sys.executable, "-c", HAND_OVER, str(fd), *world.cli_words(*words)],
        cwd=ROOT,
        env={**os.environ, "NOTIFY_SOCKET": notify},
        pass_fds=[fd],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        end_process(process, grace_s=10.0)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def test_a_forward_takes_the_listener_and_says_when_it_is_ready(
    world: Forwarding, server: Server
) -> None:
    """Who has connected before it began is served, and it ends without closing the door."""
    path = str(world.directory / "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(WAIT_S)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            where = f"127.0.0.1:{listener.getsockname()[1]}"
            early = connect(where)
            early.sendall(b"before")
            with handed(world, listener, "forward", "vm", server.target, notify=path) as process:
                assert manager.recv(1000).decode().startswith("READY=1\nSTATUS=" + where)
                assert early.recv(100) == b"before"
                assert Transfer(where, MIB).finish() == []
                early.close()
                process.send_signal(signal.SIGINT)
                assert process.wait(WAIT_S) == EXIT_INTERRUPTED
            connect(where).close()  # it waits for the next one


def test_a_unix_socket_that_systemd_has_opened_stays(world: Forwarding, server: Server) -> None:
    path = world.directory / "handed.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with handed(world, listener, "proxy") as process:
            assert process.stdout is not None
            assert process.stdout.readline().decode() == f"{path}\n"
            with connect(str(path)) as client:
                client.sendall(f"CONNECT vm:{server.target} HTTP/1.1\r\n\r\n".encode())
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            process.send_signal(signal.SIGTERM)
            process.wait(WAIT_S)
    assert path.exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("forward", "vm", "9000:80"), "expected no LOCAL"),
        (("forward", "--stdio", "vm", "80"), "expected no LOCAL and no --stdio"),
        (("proxy", "--listen", "127.0.0.1:0"), "expected no --listen"),
        (("proxy",), "anybody can connect to it: expected --users"),
    ],
)
def test_what_goes_with_no_such_listener(
    world: Forwarding, words: tuple[str, ...], text: str
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        handed(world, listener, *words) as process,
    ):
        assert process.stderr is not None
        assert text in process.stderr.read().decode()
        assert process.wait(WAIT_S) == EXIT_USAGE


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None,
    reason="systemd-socket-activate is not installed",
)
def test_by_systemds_own_program(world: Forwarding, server: Server) -> None:
    (port,) = claim_ports(1)
    where = f"127.0.0.1:{port}"
    command = [sys.executable, *world.cli_words("forward", "vm", server.target)]
    process = subprocess.Popen(
        ["systemd-socket-activate", f"--listen={where}", f"--setenv=PYTHONPATH={ROOT}", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        assert b"Listening on" in process.stderr.readline()
        assert Transfer(where, MIB).finish() == []
    finally:
        end_process(process, grace_s=10.0)
        process.stderr.close()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_units_are_as_systemd_reads_them(tmp_path: Path) -> None:
    """Instances of the templates, with a program that is there."""
    for unit in ("vchan-forward@.service", "vchan-forward@.socket", "vchan-proxy.service"):
        text = (UNITS / unit).read_text().replace("/usr/bin/vchan ", "/bin/true ")
        (tmp_path / unit.replace("@.", "@web.")).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
