"""A daemon's local unix socket: every connection is a peer with a session of its own."""

import os
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Final, Protocol

from vchan.io.access import Access, Credentials, credentials_of
from vchan.io.link import Link
from vchan.io.loop import Loop
from vchan.io.streams import LOCAL_READ_BYTES, Acceptor, SocketStream, bind_unix
from vchan.io.unix_socket import UnixSocket
from vchan.session import Config, Event, Opened, Refused, Role, Session
from vchan.wire.frames import LOCAL_FRAME_BYTES_MAX, PLAIN_PAYLOADS, RAW_REQUESTS

PEERS_MAX: Final = 128
"""Connections to one local socket at a time. At it: the next one is closed at once, and logged."""


def takes_raw(link: Link) -> int:
    """See `Peer.takes_raw`: that of a peer whose session is open."""
    return link.session.peer.takes_raw if link.session.peer is not None else 0


class Peers(Protocol):
    """What a server tells its daemon."""

    def peer_opened(self, key: int, link: Link, who: Credentials) -> None:
        """A peer's session began: it has no memory of an earlier one."""

    def peer_message(self, key: int, data: bytes) -> None:
        """A message of a peer whose session is open."""

    def peer_closed(self, key: int, *, is_gone: bool) -> None:
        """Only for peers that were opened.

        Args:
            is_gone: It has closed its connection, or has ended; otherwise this end has closed it,
                or the peer begins anew.
        """


class LocalServer:
    """Accepts local peers and keeps their links.

    Args:
        path: The socket's.
        mode: Its permissions.
        instance: The daemon's.
        name: The daemon's, told to peers.
        log: Told what an operator may want to know.
        access: Who may connect; None: whoever may open the socket.

    Raises:
        LinkError: The socket cannot be made; see `streams.bind_unix`.
    """

    def __init__(
        self,
        loop: Loop,
        path: str,
        mode: int,
        instance: bytes,
        name: str,
        peers: Peers,
        log: Callable[[str], None],
        access: Access | None = None,
    ) -> None:
        self.path = path
        self._loop = loop
        self._config = Config(
            Role.HOST,
            instance,
            name,
            frame_bytes_max=LOCAL_FRAME_BYTES_MAX,
            # The kernel keeps what it takes, whole and in order.
            features=PLAIN_PAYLOADS | RAW_REQUESTS,
        )
        self._peers = peers
        self._log = log
        self._access = access
        self._links: dict[int, Link] = {}
        self._opened: set[int] = set()
        self._keys = count(1)
        self._acceptor = Acceptor(
            loop, bind_unix(path, mode), self._accepted, lambda why: log(f"{path}: {why}")
        )
        self._acceptor.resume()

    def _accepted(self, connected: UnixSocket, _: object) -> None:
        if len(self._links) >= PEERS_MAX:
            self._log(f"{self.path}: refused a connection: {PEERS_MAX} are open (PEERS_MAX)")
            connected.close()
            return
        who = credentials_of(connected)
        if self._access is not None and not self._access.allows(who):
            self._log(f"{self.path}: refused pid {who.pid}: uid {who.uid} may not connect here")
            connected.close()
            return
        key = next(self._keys)
        self._links[key] = Link(
            self._loop,
            Session(self._config, os.urandom),
            SocketStream(connected, self.path, LOCAL_READ_BYTES),
            lambda event: self._handle(key, event, who),
            lambda _: self._forget(key, is_gone=True),
            on_message=partial(self._peers.peer_message, key),
        )

    def _handle(self, key: int, event: Event, who: Credentials) -> None:
        match event:
            case Opened(_, resumed):
                if key in self._opened:
                    if resumed:  # it greeted again because we were slow to answer: no news
                        return
                    self._peers.peer_closed(
                        key, is_gone=False
                    )  # it began anew on the same connection
                self._opened.add(key)
                self._peers.peer_opened(key, self._links[key], who)
            case Refused(reason):
                self._log(f"{self.path}: pid {who.pid} (uid {who.uid}): {reason}")
            case _:
                pass

    def drop(self, key: int, reason: str) -> None:
        """Close a peer's connection, and say why in the log."""
        link = self._links.get(key)
        if link is not None:
            self._log(f"{self.path}: dropped a connection: {reason}")
            link.close()
            self._forget(key)

    def _forget(self, key: int, *, is_gone: bool = False) -> None:
        self._links.pop(key, None)
        if key in self._opened:
            self._opened.discard(key)
            self._peers.peer_closed(key, is_gone=is_gone)

    def close(self) -> None:
        """Close every connection and remove the socket."""
        self._acceptor.close()
        for key in list(self._links):
            self._links[key].close()
            self._forget(key)
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
