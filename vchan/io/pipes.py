"""Unix pipes as byte streams that go one way: a fifo, or what QEMU makes of one."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from vchan.errors import LinkError, NotAPort, PortAbsent
from vchan.io.streams import FileStream, explain

PIPE_MODE: Final = 0o660
PIPE_READ_BYTES: Final = 16 * 1024
"""One read: who is slowed down must not have taken too much already."""


class PipeReader(FileStream):
    """The end that reads."""

    ends_at_hangup = True

    def read(self) -> bytes:
        """What has arrived."""
        return os.read(self._fd, PIPE_READ_BYTES)

    def write(self, data: bytes) -> int:  # noqa: ARG002 - every stream's
        """Nothing can be written.

        Raises:
            OSError: Always.
        """
        raise OSError(errno.EBADF, "this end of the pipe is for reading")


class PipeWriter(FileStream):
    """The end that writes.

    It holds the other end open as well, without reading: so what is in the pipe stays there while
    its reader is away, and a full pipe makes the writer wait.
    """

    ends_at_hangup = True

    def __init__(self, fd: int, anchor_fd: int, path: str) -> None:
        super().__init__(fd, path)
        self._anchor_fd = anchor_fd

    def read(self) -> bytes:
        """Nothing comes this way.

        Raises:
            BlockingIOError: Always.
        """
        raise BlockingIOError

    def close(self) -> None:
        """Close it; harmless twice."""
        if self._fd >= 0:
            os.close(self._anchor_fd)
        super().close()


def open_pipe_reader(path: str) -> PipeReader:
    """Open a pipe to read from it.

    Raises:
        LinkError: There is none, or this user may not, or it is something else.
    """
    _check(path)
    # Not for reading alone: so it never ends, whoever comes and goes at the other end.
    return PipeReader(_open(path, os.O_RDWR), path)


def open_pipe_writer(path: str) -> PipeWriter:
    """Open a pipe to write to it; it is made if it is not there.

    Raises:
        LinkError: It cannot be made, or this user may not, or it is something else.
    """
    try:
        os.mkfifo(path, PIPE_MODE)
    except FileExistsError:
        pass
    except OSError as error:
        raise explain(path, error, "directory") from error
    _check(path)
    anchor_fd = _open(path, os.O_RDWR)
    try:
        return PipeWriter(_open(path, os.O_WRONLY), anchor_fd, path)
    except LinkError:
        os.close(anchor_fd)
        raise


def _check(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise PortAbsent(path, "no such pipe: it may appear later") from error
        raise explain(path, error, "pipe") from error
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise NotAPort(path, "is no pipe: make one with mkfifo")


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise explain(path, error, "pipe") from error
