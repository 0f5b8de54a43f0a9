"""Byte streams into a VM while it migrates: copies each way, a forward whose connections are never
idle, and a shell that is asked one thing after the other. What they carry is compared."""

from __future__ import annotations

import contextlib
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.rig import RigError, wait_until
from tests.rig.compute import ComputeHost, agent_service
from tests.rig.copy_traffic import CopyTraffic
from tests.rig.forwarding import ROOT, WAIT_S, Part, Transfer, connect
from tests.rig.guest_image import Service
from tests.rig.programs import Operator

PORT: Final = 8080
CONNECTIONS: Final = 2
"""Through the forward, at a time."""
RULES: Final = b"""\
[read]
allow = ["/tmp/**"]
[write]
allow = ["/tmp/**"]
[shell]
command = ["/bin/sh"]
"""
FILES: Final[dict[str, bytes | Path]] = {
    "app/standard.toml": RULES,
    "app/echo.py": Path(__file__).with_name("echo_server.py"),
}
"""What the guest's image needs."""
SERVICES: Final = (
    Service(
        "vchan-guest",
        f"python3 -m vchan.guest.daemon --forward service:files,service:shell,tcp:{PORT}",
    ),
    agent_service("standard", "-m", "vchan.agents.standard.agent", "--config /app/standard.toml"),
    agent_service("echo", "/app/echo.py", str(PORT), "/run/echo"),
)
"""What runs in the guest, its daemon among it."""
POLICY: Final = f"""\
forward any service:files allow
forward any service:shell allow
forward any tcp:{PORT} allow
"""
"""Lines that all hosts' policies need."""
SERVED_S: Final = 120.0
ENDLESS_BYTES: Final = 1 << 50
ASK_AGAIN_S: Final = 0.1
"""Between an answer and the next thing that the shell is asked."""
RATE_BYTES_S: Final = 256 * 1024
"""Of each connection, each way."""
MOVED_BYTES: Final = 128 * 1024
"""That have come back to a connection: more than can have been under way before."""
MOVED_ANSWERS: Final = 2
"""Of the shell: one may have been under way."""
PLAIN_AGAIN: Final = b"\x1b[0m"
"""Written to the terminal by the command itself, when it gives it back."""
SHELL_STATUS: Final = 7
"""What the shell is to end with."""


class PacedTransfer(Transfer):
    """A transfer that is never idle and leaves room to the others: in an emulated guest one that
    takes all that it gets would have the processor to itself."""

    def _blocks(self) -> Iterator[bytes]:
        next_s = time.monotonic()
        for block in super()._blocks():
            yield block
            next_s = max(next_s + len(block) / RATE_BYTES_S, time.monotonic())
            time.sleep(max(0.0, next_s - time.monotonic()))


class ShellTraffic:
    """A terminal at `vchan shell`, and who asks the shell one thing after the other.

    The shell writes nothing but answers, so every byte of it is known beforehand. An answer
    has the shell's process id, and what only that process has been told.

    Args:
        command: Its words.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._word = secrets.token_hex(4)
        self._is_enough = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="shell")
        self._heard = 0
        self.pid = 0
        self.answers = 0
        self.problems: list[str] = []

    def __enter__(self) -> Self:
        self._operator = Operator(self._command)
        try:
            self._begin()
        except AssertionError as error:
            self._operator.__exit__(None, None, None)
            raise RigError(f"no shell: {error}") from error
        self._thread.start()
        return self

    def _begin(self) -> None:
        me = self._operator
        me.wait_seen(re.compile(rb"[#$] "))
        me.press(b"stty -echo; PS1=; word=%s; echo begun-$$-\r" % self._word.encode())
        pattern = re.compile(rb"begun-([0-9]+)-\r\n")
        self._heard = me.wait_seen(pattern)
        found = pattern.search(me.seen)
        assert found
        self.pid = int(found[1])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_enough.set()
        self._thread.join(2 * WAIT_S)
        self._operator.__exit__(kind, error, trace)

    def _repeat(self) -> None:
        with _noting(self.problems, AssertionError, OSError):
            while not self._is_enough.wait(ASK_AGAIN_S):
                self._ask()

    def _ask(self) -> None:
        number = self.answers + 1
        self._operator.press(b"echo $((%d * 3)) $$ $word\r" % number)
        expected = f"{number * 3} {self.pid} {self._word}\r\n".encode()
        end = self._operator.wait_seen(b"\n", start=self._heard)
        answer = bytes(self._operator.seen[self._heard : end])
        assert answer == expected, f"{answer!r} in place of {expected!r}"
        self._heard = end
        self.answers = number

    def wait_answers(self, number: int) -> None:
        """Until so many have come, or it is broken."""
        wait_until(
            lambda: self.answers >= number or bool(self.problems),
            timeout_s=2 * WAIT_S,
            interval_s=0.01,
            failure=lambda: f"stands at {self.answers} answers",
        )

    def finish(self) -> None:
        """Ask no more, and have the shell end: with its status, and without another word."""
        self._is_enough.set()
        self._thread.join(2 * WAIT_S)
        if not self.problems:
            with _noting(self.problems, AssertionError, OSError):
                self._end()

    def _end(self) -> None:
        me = self._operator
        me.press(b"exit %d\r" % SHELL_STATUS)
        status = me.wait()
        assert status == SHELL_STATUS, f"it ended with {status}"
        last = me.seen[self._heard :].removesuffix(PLAIN_AGAIN)
        assert last == b"", f"it said {me.shown} at its end"
        assert me.is_restored, "the terminal is not as it was"


class StreamTraffic:
    """All of it, from when the block is entered to `finish`.

    Args:
        vm: Its name.
        hosts: Where it may be; now, the first.
        directory: For files here.
        copy_bytes: Of each copy.
    """

    def __init__(
        self,
        vm: str,
        uuid: str,
        hosts: Sequence[ComputeHost],
        directory: Path,
        *,
        copy_bytes: int,
    ) -> None:
        first, *others = hosts
        also = [word for host in others for word in ("--also", str(host.daemon.socket))]
        self._copies = CopyTraffic(vm, uuid, hosts, directory, copy_bytes)
        words = first.cli_words("forward", *also, vm, f"0:{PORT}")
        self._forward = Part(directory, "forward", *words[1:])  # it has Python of its own
        self._transfers: list[PacedTransfer] = []
        self._shell = ShellTraffic(first.cli_words("shell", *also, vm))
        self._list = first.cli_words("shell", "--list", vm)
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._finish_transfers)
            stack.callback(self._forward.stop)
            where = self._forward.start().wait_out().partition(" -> ")[0]
            self._wait_served(where)
            stack.enter_context(self._shell)
            stack.enter_context(self._copies)
            self._transfers += [PacedTransfer(where, ENDLESS_BYTES, n) for n in range(CONNECTIONS)]
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def _wait_served(self, where: str) -> None:
        """Until the echo answers, and the agent has its shell: they started when the VM did."""
        wait_until(
            lambda: echoes(where) and self._has_shell(),
            timeout_s=SERVED_S,
            interval_s=0.2,
            failure=lambda: f"nobody serves: {' '.join(self._list)}",
        )

    def _has_shell(self) -> bool:
        done = subprocess.run(self._list, cwd=ROOT, capture_output=True, check=False)
        return done.returncode == 0

    def _finish_transfers(self) -> None:
        for transfer in self._transfers:
            transfer.end_early()
        for transfer in self._transfers:
            transfer.finish()

    def wait_moved(self) -> None:
        """Until each connection and the shell have gone on from here; or are broken."""
        targets = [transfer.received + MOVED_BYTES for transfer in self._transfers]
        answers = self._shell.answers + MOVED_ANSWERS
        for transfer, target in zip(self._transfers, targets, strict=True):
            with _noting(transfer.problems, RigError):
                transfer.wait_for(target)
        with _noting(self._shell.problems, RigError):
            self._shell.wait_answers(answers)

    def finish(self) -> None:
        """Begin no more, and wait for the ends of all."""
        self._copies.end_early()
        self._finish_transfers()
        self._shell.finish()
        self._copies.finish()

    @property
    def copied_bytes(self) -> int:
        """Of copies that arrived as they were sent."""
        return self._copies.bytes

    @property
    def forwarded_bytes(self) -> int:
        """There and back, by connections that are not broken."""
        return sum(2 * each.received for each in self._transfers if not each.problems)

    @property
    def shell_answers(self) -> int:
        """Right ones."""
        return self._shell.answers

    @property
    def problems(self) -> list[str]:
        """One for each stream that is broken: a copy, a connection, the shell."""
        connections = [each.problems for each in self._transfers if each.problems]
        found = [f"a connection: {'; '.join(problems)}" for problems in connections]
        found += [f"a copy: {problem}" for problem in self._copies.problems]
        return found + [f"the shell: {problem}" for problem in self._shell.problems[:1]]


def echoes(where: str) -> bool:
    """Whether what is reached there gives back what it is sent."""
    with connect(where) as connection, contextlib.suppress(OSError):
        connection.sendall(b"?")
        return connection.recv(1) == b"?"
    return False


@contextlib.contextmanager
def _noting(problems: list[str], *kinds: type[Exception]) -> Iterator[None]:
    """An error of these kinds is a problem, and nothing else."""
    try:
        yield
    except kinds as error:
        problems.append(str(error))
