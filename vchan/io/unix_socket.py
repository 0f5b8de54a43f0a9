"""A unix socket as `socket.socket` is one, without what that costs to import.

`socket` makes its constants anew as enumerations, and imports `selectors`: a tenth of the guest
daemon's start. `_socket` is what it stands on.
"""

from __future__ import annotations

from _socket import AF_UNIX, SOCK_DGRAM, SOCK_STREAM, socket
from typing import Any, Self

__all__ = ["SOCK_DGRAM", "SOCK_STREAM", "UnixSocket"]


class UnixSocket(socket):
    """Not inherited by programs that are started.

    Args:
        kind: SOCK_STREAM or SOCK_DGRAM.
        fileno: Of one that is there already.
    """

    __slots__ = ()

    def __init__(self, kind: int = SOCK_STREAM, fileno: int | None = None) -> None:
        super().__init__(AF_UNIX, kind, 0, fileno)

    def accept(self) -> tuple[UnixSocket, Any]:
        """The next connection, and its address."""
        fd, address = self._accept()  # type: ignore[attr-defined] # what socket.accept() calls
        return UnixSocket(fileno=fd), address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
