"""A program on the host that has byte streams into a VM, always has bytes for each, and opens
another when one has ended.

    python -m tests.attack.stream_user SOCKET VM

Until SIGTERM. Its streams go to TARGET, through `vchan forward`.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator

from tests.rig.compute import ROOT
from tests.rig.ending import end_on_signals

TARGET = "tcp:22"
CONNECTIONS = 16
BLOCK = bytes(16384)
LOOK_S = 0.05
"""Between two looks at who has room: a program that is never idle would be the load itself."""


@contextlib.contextmanager
def using_streams(daemon_socket: str, vm: str) -> Iterator[None]:
    """Such a program, from when it listens to the end."""
    words = [sys.executable, "-m", "tests.attack.stream_user", daemon_socket, vm]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "vchan forward did not begin"
            yield
        finally:
            process.terminate()


def use(address: tuple[str, int]) -> None:
    """For ever."""
    with selectors.DefaultSelector() as selector:
        while True:
            while len(selector.get_map()) < CONNECTIONS:
                connected = socket.create_connection(address)
                connected.setblocking(False)
                selector.register(connected, selectors.EVENT_READ | selectors.EVENT_WRITE)
            for key, _ in selector.select(LOOK_S):
                connected = key.fileobj  # type: ignore[assignment]
                if not _is_alive(connected):
                    selector.unregister(connected)
                    connected.close()


def _is_alive(connected: socket.socket) -> bool:
    try:
        with contextlib.suppress(BlockingIOError):
            connected.send(BLOCK)
        return bool(connected.recv(len(BLOCK)))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def main() -> None:
    """The command."""
    daemon_socket, vm = sys.argv[1:]
    words = ["-m", "vchan.cli", "--socket", daemon_socket, "forward", vm, f"0:{TARGET[4:]}"]
    end_on_signals()
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE) as forward:
        try:
            assert forward.stdout is not None
            where = forward.stdout.readline().decode().partition(" -> ")[0]
            print(where, flush=True)
            host, _, port = where.rpartition(":")
            use((host, int(port)))
        finally:
            forward.terminate()


if __name__ == "__main__":
    main()
