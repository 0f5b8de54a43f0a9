"""A host's daemon, a guest's daemon and `vchan forward`, all real processes, with a cable where
QEMU would be; and programs that talk through them.

    with Forwarding(directory, policy, allow) as world:
        world.forward("8080")
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.rig import end_process, tail, wait_until
from tests.unit.cable import Cable

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
CHUNK_BYTES = 16 * 1024


class Part:
    """A process of ours, its output in files."""

    def __init__(self, directory: Path, name: str, *words: str) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self.out = directory / f"{name}.out"
        self._words = [sys.executable, *words]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self.log.open("ab") as log, self.out.open("wb") as out:
            self.process = subprocess.Popen(
                self._words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=log
            )
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Without a word."""
        self.kill()
        self.start()

    def interrupt(self) -> int:
        """Ctrl-C; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(WAIT_S)

    def stop(self) -> None:
        if self.process is not None:
            end_process(self.process, grace_s=10.0)

    def wait_out(self) -> str:
        """The first line of its output; fails if it ends before."""
        wait_until(
            self._has_line,
            timeout_s=WAIT_S,
            interval_s=0.02,
            failure=lambda: f"{self.name} says nothing: {tail(self.log)}",
        )
        return self.out.read_text().splitlines()[0]

    def _has_line(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended: {tail(self.log)}")
        return "\n" in self.out.read_text()


class Forwarding:
    """The world. Its VM is "vm".

    Args:
        directory: A short path.
        policy: Of the host.
        allow: The guest's option `forward`.
        guest: The words that start its daemon.
    """

    def __init__(
        self,
        directory: Path,
        policy: str,
        allow: str,
        guest: tuple[str, ...] = ("-m", "vchan.guest.daemon"),
    ) -> None:
        self.directory = directory
        self.policy = directory / "policy.d" / "50-test.policy"
        self.policy.parent.mkdir()
        self.policy.write_text(policy)
        self.socket = directory / "host.sock"
        self.audit = directory / "audit.log"
        self._parts: list[Part] = []
        self._cable = Cable(directory)
        config = directory / "vchan.conf"
        lines = ["[vchan]", "host = here", "libvirt_uri =", f"socket = {self.socket}"]
        lines += [f"policy_dir = {self.policy.parent}", f"audit_log = {self.audit}"]
        lines += [f"channels = vm=connect:{self._cable.host}"]
        config.write_text("\n".join(lines) + "\n")
        self.host = self._part("host", "-m", "vchan.host.daemon", "--config-file", str(config))
        guest_words = [*guest, "--port", f"unix:{self._cable.guest}"]
        guest_words += ["--socket", str(directory / "agent.sock"), "--forward", allow]
        self.guest = self._part("guest", *guest_words)
        self._count = 0

    def _part(self, name: str, *words: str) -> Part:
        part = Part(self.directory, name, *words)
        self._parts.append(part)
        return part

    def __enter__(self) -> Self:
        self._cable.__enter__()
        try:
            self.host.start()
            self.guest.start()
            self.wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for part in reversed(self._parts):
            part.stop()
        self._cable.__exit__()
        if kind is not None:
            for part in self._parts:
                sys.stderr.write(f"--- {part.name}\n{tail(part.log)}\n")

    def cli_words(self, *words: str) -> list[str]:
        return ["-m", "vchan.cli", "--socket", str(self.socket), *words]

    def cli(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """A command, to its end."""
        return subprocess.run(
            [sys.executable, *self.cli_words(*words)],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            timeout=WAIT_S,
            check=False,
        )

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            done = self.cli("--json", "list")
            return done.returncode == 0 and json.loads(done.stdout)[0]["channel"] == "ready"

        failure = lambda: f"no session: {tail(self.host.log)}"  # noqa: E731
        wait_until(is_ready, timeout_s=WAIT_S, interval_s=0.05, failure=failure)

    def forward(self, what: str, *words: str) -> tuple[Part, str]:
        """`vchan forward vm WHAT`; returns it, and where it listens."""
        self._count += 1
        name = f"forward{self._count}"
        part = self._part(name, *self.cli_words("forward", "vm", what, *words)).start()
        return part, part.wait_out().partition(" -> ")[0]

    def proxy(
        self, *words: str, listen: str = "127.0.0.1:0", program: tuple[str, ...] = ()
    ) -> tuple[Part, str]:
        """`vchan proxy`; returns it, and where it listens.

        Args:
            program: The words of Python's that stand for the command, if they are others.
        """
        self._count += 1
        more = ("proxy", "--listen", listen, *words)
        command = self.cli_words(*more)
        if program:
            command = [*program, *command[2:]]
        part = self._part(f"proxy{self._count}", *command).start()
        return part, part.wait_out()

    def end_forwards(self) -> None:
        """Every command that still runs."""
        for part in [each for each in self._parts if each not in (self.host, self.guest)]:
            part.stop()
            self._parts.remove(part)

    def cut(self) -> None:
        """Lose the connection at the host's end, with what is under way."""
        self._cable.cut()

    def audited(self, kind: str = "forward") -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.audit.read_text().splitlines()]
        return [row for row in rows if row.get("kind") == kind]


# ---------------------------------------------------------------- programs


def connect(where: str) -> socket.socket:
    """To a listener of `vchan forward`."""
    if where.startswith("/"):
        made = socket.socket(socket.AF_UNIX)
        made.connect(where)
    else:
        address, _, port = where.rpartition(":")
        made = socket.create_connection((address, int(port)))
    made.settimeout(WAIT_S)
    return made


class Server:
    """Listens like a service in the guest; each connection has a thread.

    Args:
        path: Of a unix socket; None: a port of 127.0.0.1.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self._server = socket.create_server(("127.0.0.1", 0))
            self.target = str(self._server.getsockname()[1])
        else:
            self._server = socket.socket(socket.AF_UNIX)
            self._server.bind(str(path))
            self._server.listen()
            self.target = str(path)
        self.connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="server")

    def serve(self, connected: socket.socket) -> None:
        """Echo until the other side ends what it says; then end, too."""
        with contextlib.suppress(OSError):
            while data := connected.recv(CHUNK_BYTES):
                connected.sendall(data)
            connected.shutdown(socket.SHUT_WR)

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._server.accept()
            except OSError:
                return
            self.connections.append(connected)
            thread = threading.Thread(target=self.serve, args=(connected,), name="served")
            self._threads.append(thread)
            thread.start()

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._accepting.join(WAIT_S)
        for connected in self.connections:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_S)
        for connected in self.connections:
            connected.close()


class Transfer:
    """Sends bytes through an echo and takes them back, in the background; compares checksums.

    Args:
        where: Of a listener; or a socket that is connected, and the transfer's from then on.
        size: Of all bytes; `end_early` makes it less.
    """

    def __init__(self, where: str | socket.socket, size: int, seed: int = 1) -> None:
        self.size = size
        self._seed = seed
        self._socket = connect(where) if isinstance(where, str) else where
        self._is_enough = False
        self._sent = hashlib.sha256()
        self._received = hashlib.sha256()
        self.received = 0
        self.problems: list[str] = []
        self._threads = [
            threading.Thread(target=work, name="transfer") for work in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def _blocks(self) -> Iterator[bytes]:
        chance = random.Random(self._seed)
        sent = 0
        while sent < self.size and not self._is_enough:
            yield chance.randbytes(CHUNK_BYTES)
            sent += CHUNK_BYTES
        self.size = sent

    def _send(self) -> None:
        try:
            for block in self._blocks():
                self._socket.sendall(block)
                self._sent.update(block)
            self._end_sending()
        except OSError as error:
            self.problems.append(f"sending: {error}")

    def _end_sending(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        try:
            while data := self._socket.recv(65536):
                self._received.update(data)
                self.received += len(data)
        except OSError as error:
            self.problems.append(f"receiving: {error}")

    def wait_for(self, received: int) -> None:
        """Until so many bytes have come back."""
        wait_until(
            lambda: self.received >= received or bool(self.problems),
            timeout_s=2 * WAIT_S,
            interval_s=0.01,
            failure=lambda: f"stands at {self.received} of {self.size}",
        )

    def end_early(self) -> None:
        """Send no more."""
        self._is_enough = True

    def finish(self) -> list[str]:
        """What went wrong: nothing, if every byte came back once and in order."""
        for thread in self._threads:
            thread.join(3 * WAIT_S)
        if any(thread.is_alive() for thread in self._threads):
            self.problems.append(f"stands at {self.received} of {self.size}")
        self._socket.close()
        if not self.problems and self.received != self.size:
            self.problems.append(f"{self.received} of {self.size} came back, without a word")
        if not self.problems and self._received.digest() != self._sent.digest():
            self.problems.append("other bytes came back")
        return self.problems
