"""The rig: real RabbitMQ, libvirt and QEMU for tests, private to each test run.

Rules of this package
1. Everything is a context manager; leaving it leaves nothing behind: no process, no file.
2. Servers listen on loopback or on unix sockets alone.
3. It works as root (servers then drop to an unprivileged account) and as anybody else.
4. A failure to start says what the part itself logged.

    with rig_directory() as directory, RabbitServer(directory / "rabbit") as rabbit: ...
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NOBODY = "nobody"
LOG_LINES_IN_ERRORS = 60


class RigError(RuntimeError):
    """A part of the rig did not do what it must. The message carries that part's own log."""


@contextlib.contextmanager
def rig_directory() -> Iterator[Path]:
    """A new directory for one test run, removed at the end.

    Its name is short, because a unix socket's path holds at most 107 bytes and libvirt's own part
    of a channel's path takes 80. Anybody may enter it, because servers drop privileges.
    """
    directory = Path(tempfile.mkdtemp(prefix="vc", dir="/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@dataclass(frozen=True, slots=True)
class Account:
    """Who a server runs as: `user` is None when we are not root and so stay who we are."""

    user: str | None

    @classmethod
    def first_of(cls, *names: str) -> "Account":
        """The first of these users that exists, if we are root and so may become another."""
        if os.geteuid() != 0:
            return cls(None)
        for name in names:
            with contextlib.suppress(KeyError):
                pwd.getpwnam(name)
                return cls(name)
        raise RigError(f"none of these users exists: {', '.join(names)}")

    def own(self, directory: Path) -> None:
        """Hand a directory and all that is in it to this account."""
        if self.user is None:
            return
        entry = pwd.getpwnam(self.user)
        for path in (directory, *directory.rglob("*")):
            os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)

    def spawn(
        self, command: Sequence[str | Path], *, environment: Mapping[str, str], log: Path, cwd: Path
    ) -> subprocess.Popen[bytes]:
        """Start a server in its own process group, its output appended to `log`."""
        group = None if self.user is None else pwd.getpwnam(self.user).pw_gid
        with log.open("ab") as output:
            return subprocess.Popen(
                list(command),
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                user=self.user,
                group=group,
                extra_groups=None if self.user is None else [],
            )


def tail(log: Path) -> str:
    """The end of a log, for error messages."""
    if not log.exists():
        return f"({log.name} was never written)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_IN_ERRORS:])


def end_process(process: subprocess.Popen[bytes], *, grace_s: float) -> None:
    """End a process started by `Account.spawn`: ask, wait `grace_s`, then kill its group."""
    if process.poll() is None and grace_s > 0:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(
    ready: Callable[[], bool],
    *,
    timeout_s: float,
    interval_s: float,
    failure: Callable[[], str],
    rest: float = 0.0,
) -> None:
    """Ask again and again, for conditions of other programs that come without an event.

    Args:
        rest: The pause is also at least so many times as long as asking took. An emulated guest
            that is asked all the time does nothing else.

    Raises:
        RigError: Not ready in time; the message is what `failure` says then.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        asked_s = time.monotonic()
        if ready():
            return
        now_s = time.monotonic()
        if now_s > deadline_s:
            raise RigError(failure())
        time.sleep(max(interval_s, rest * (now_s - asked_s)))
