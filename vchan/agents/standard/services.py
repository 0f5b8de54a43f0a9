"""The services of the standard agent: unix sockets to which the guest's daemon joins byte streams.

Rules of this file
1. Only what the guest's owner allows is listened at; without a service this is not loaded.
2. Who connects is root or this agent's user: the daemon. The daemon and the host's policy have
   judged who is behind it.
3. A service has its connection, non-blocking, for itself, on the agent's loop; one that waits for
   disks takes it to a thread of its own.
"""

import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from vchan.errors import LinkError
from vchan.io.access import Access, credentials_of
from vchan.io.loop import Loop
from vchan.io.streams import Acceptor, listen_unix
from vchan.io.targets import services_problem

SERVICES_MODE: Final = 0o600
"""Of services' sockets: for who runs the agent, and root."""

Serve = Callable[[socket.socket], object]
"""Takes a connection, which is non-blocking and from now on its own."""


class Services:
    """Listens for each service in one directory.

    Args:
        directory: See `io.targets.services_directory`; made if it is missing.
        serve: By name of the service: who gets its connections.
        log: Told what the owner may want to know.

    Raises:
        LinkError: A socket cannot be made.
    """

    def __init__(
        self, loop: Loop, directory: str, serve: Mapping[str, Serve], log: Callable[[str], object]
    ) -> None:
        self._loop = loop
        self._log = log
        self._acceptors: dict[str, Acceptor[socket.socket]] = {}
        self._directory = directory
        try:
            os.mkdir(directory, 0o755)
        except FileExistsError:
            pass
        except OSError as error:
            problem = f"cannot be made: {error.strerror}: make it, this agent's own"
            raise LinkError(directory, problem) from error
        problem = services_problem(directory)
        if problem:
            raise LinkError(directory, problem)
        try:
            for name, taker in serve.items():
                self._listen(name, taker)
        except LinkError:
            self.close()
            raise

    def _listen(self, name: str, serve: Serve) -> None:
        self._acceptors[name] = Acceptor(
            self._loop,
            listen_unix(f"{self._directory}/{name}", SERVICES_MODE),
            partial(self._accepted, name, serve),
            lambda why: self._log(f"service {name}: {why}"),
        )
        self._acceptors[name].resume()

    def _accepted(self, name: str, serve: Serve, connected: socket.socket, _: object) -> None:
        who = credentials_of(connected)
        if not Access().allows(who):
            self._log(f"service {name}: refused pid {who.pid}: uid {who.uid} may not connect here")
            connected.close()
            return
        connected.setblocking(False)
        serve(connected)

    def close(self) -> None:
        """Listen no more. Connections are their services' own."""
        for name, acceptor in self._acceptors.items():
            acceptor.close()
            try:
                os.unlink(f"{self._directory}/{name}")
            except OSError:
                pass  # somebody else's already
        self._acceptors.clear()
