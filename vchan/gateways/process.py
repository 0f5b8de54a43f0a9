"""A gateway's process, from when everything is wired to SIGTERM: vchan-http's and vchan-zmq's."""

import gc
import signal
from collections.abc import Callable
from typing import Final, Protocol

from vchan import __version__
from vchan.gateways.gateway import Gateway
from vchan.io.loop import Loop
from vchan.io.service_manager import ServiceManager

GARBAGE_OBJECTS: Final = 20_000


class Server(Protocol):
    """Where programs reach the gateway."""

    @property
    def address(self) -> str:
        """Where it listens."""

    def close(self) -> None:
        """Listen no more, and close what is connected."""


def serve(
    name: str, loop: Loop, gateway: Gateway, server: Server, say: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT, then close everything.

    Args:
        name: The program's.
        loop: The gateway's and the server's.
        say: Told the one line that says what runs where.
    """
    manager = ServiceManager(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.stop())
    say(f"{name} {__version__}: {server.address}")
    gateway.connect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)
    manager.ready(server.address)
    try:
        loop.run()
    finally:
        manager.stopping()
        server.close()
        gateway.close()
        loop.close()
