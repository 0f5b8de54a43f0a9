"""`vchan exec` and `vchan shell` as an operator has them: at a terminal of his own, or at pipes."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.rig.forwarding import ROOT, WAIT_S, Forwarding, Part

POLICY: Final = "reply any any allow\nlisten any any allow\nforward name:vm service:* allow\n"
ALLOW: Final = "service:*"
SH: Final = os.path.realpath("/bin/sh")
STANDARD: Final = f"""\
[exec]
allow = ["{SH}", "/usr/bin/*"]
time_s_max = 300
detached_s = 60
[shell]
command = ["{SH}"]
detached_s = 60
"""


class Programs(Forwarding):
    """The world of `vchan forward`, with a standard agent in its guest.

    Args:
        directory: A short path.
        standard: The agent's configuration; "": there is no agent.
    """

    def __init__(
        self,
        directory: Path,
        policy: str = POLICY,
        allow: str = ALLOW,
        standard: str = STANDARD,
    ) -> None:
        super().__init__(directory, policy, allow)
        self.agent: Part | None = None
        self._standard = standard

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            if self._standard:
                config = self.directory / "standard.toml"
                config.write_text(self._standard)
                words = ["-m", "vchan.agents.standard.agent", "--config", str(config)]
                words += ["--socket", str(self.directory / "agent.sock")]
                self.agent = self._part("agent", *words).start()
                self.wait_served("exec", "shell")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def wait_served(self, *names: str) -> None:
        from tests.rig import wait_until

        wait_until(
            lambda: all((self.directory / "services" / name).exists() for name in names),
            timeout_s=WAIT_S,
            interval_s=0.02,
            failure=lambda: "nobody serves",
        )

    def operator(self, *words: str) -> Operator:
        """A command at a terminal."""
        return Operator([sys.executable, *self.cli_words(*words)])


class Operator:
    """A command at a terminal of its own, and who sits there.

    Args:
        words: The command.
    """

    def __init__(self, words: list[str], rows: int = 24, columns: int = 80) -> None:
        self._ours, self._theirs = os.openpty()
        self.resize(rows, columns)
        # As a person's terminal is, with something of his own about it.
        settings = termios.tcgetattr(self._theirs)
        settings[6][termios.VERASE] = b"\x08"
        termios.tcsetattr(self._theirs, termios.TCSANOW, settings)
        self.before = termios.tcgetattr(self._theirs)
        self.seen = bytearray()
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env={**os.environ, "TERM": "xterm-test"},
            start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, rows: int, columns: int) -> None:
        """The window has another size; the kernel tells the command."""
        ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def press(self, text: bytes) -> None:
        """Keys."""
        while text:
            text = text[os.write(self._ours, text) :]

    def _look(self, wait_s: float) -> bool:
        if not select.select([self._ours], [], [], wait_s)[0]:
            return False
        with contextlib.suppress(OSError):  # the other end is closed: only if we close it, too
            self.seen += os.read(self._ours, 65536)
        return True

    def wait_seen(self, text: bytes | re.Pattern[bytes], *, start: int = 0) -> int:
        """Until this is on the screen, behind `start`; returns where it ends."""
        until_s = time.monotonic() + WAIT_S
        wanted = text if isinstance(text, re.Pattern) else re.compile(re.escape(text))
        while True:
            found = wanted.search(self.seen, start)
            if found:
                return found.end()
            if not self._look(0.05):
                assert self.process.poll() is None, f"{self.process.returncode}: {self.shown}"
                assert time.monotonic() < until_s, f"{wanted.pattern!r} is not in {self.shown}"

    @property
    def shown(self) -> str:
        """For messages."""
        return repr(bytes(self.seen[-2000:]))

    def wait(self) -> int:
        """Its exit status, and all that it has shown."""
        until_s = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            self._look(0.05)
            assert time.monotonic() < until_s, f"it does not end: {self.shown}"
        while self._look(0):
            pass
        return self.process.wait()

    @property
    def is_restored(self) -> bool:
        """Whether the terminal is as it was found."""
        return bool(termios.tcgetattr(self._theirs) == self.before)

    @property
    def is_raw(self) -> bool:
        """Whether keys go on as they are pressed."""
        flags: Any = termios.tcgetattr(self._theirs)[3]
        return not flags & (termios.ICANON | termios.ECHO)

    def hang_up(self) -> None:
        """The operator's own connection breaks: his terminal is gone."""
        os.close(self._ours)
        self._ours = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for fd in (self._ours, self._theirs):
            if fd >= 0:
                os.close(fd)
