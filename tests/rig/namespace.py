"""A network of its own, as a tenant's is: a namespace with nothing but a loopback in it.

with Namespace() as tenant:
    with tenant.inside():
        ...  # programs started here, and sockets made here, are in it
"""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Self

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP_AND_RUNNING = 0x1 | 0x40
OURS = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> str | None:
    """None if namespaces can be made here."""
    if os.geteuid() != 0:
        return "only root may make a network namespace"
    try:
        with Namespace():
            return None
    except OSError as error:
        return f"no network namespace: {error}"


class Namespace:
    """It is gone when nothing runs in it any more."""

    def __init__(self) -> None:
        self._fd = -1

    def __enter__(self) -> Self:
        with _back_home():
            _check(_libc.unshare(CLONE_NEWNET))
            self._fd = os.open(OURS, os.O_RDONLY | os.O_CLOEXEC)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                request = struct.pack("16sh22x", b"lo", IFF_UP_AND_RUNNING)
                fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and what it starts, is in it."""
        with _back_home():
            _check(_libc.setns(self._fd, CLONE_NEWNET))
            yield


@contextlib.contextmanager
def _back_home() -> Iterator[None]:
    home = os.open(OURS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _check(_libc.setns(home, CLONE_NEWNET))
        os.close(home)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
