"""A listener that the service manager has opened for us: systemd's socket activation, by hand."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import Final

from vchan.errors import ConfigError

FIRST_FD: Final = 3
"""Where the manager puts what it hands over."""
_PID: Final = "LISTEN_PID"
_COUNT: Final = "LISTEN_FDS"
_NAMES: Final = "LISTEN_FDNAMES"


def take_listener(
    environment: MutableMapping[str, str] = os.environ, pid: int = 0
) -> socket.socket | None:
    """The listener, non-blocking, and ours to close; None if nothing was handed to this process.
    The environment is cleared of it, so that nobody we start takes it for its own.

    Raises:
        ConfigError: It is several, or no stream socket that is listened at.
    """
    meant, count = environment.pop(_PID, ""), environment.pop(_COUNT, "")
    environment.pop(_NAMES, None)
    if meant != str(pid or os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise ConfigError(f"{_COUNT}={count}", "expected one socket: give each a unit of its own")
    try:
        listener = socket.socket(fileno=FIRST_FD)
        is_listener = listener.type == socket.SOCK_STREAM and listener.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        )
    except OSError as error:
        problem = f"descriptor {FIRST_FD} is no socket: {error.strerror or error}"
        raise ConfigError(f"{_COUNT}={count}", problem) from error
    if not is_listener:
        problem = "is no listening stream socket: expected ListenStream=, and Accept=no"
        raise ConfigError(f"{_COUNT}={count}", problem)
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener
