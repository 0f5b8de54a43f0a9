"""Who has connected to the proxy: from the first byte to the tunnel, or to the reason why not.

Rules of this file
1. Nothing waits. What a client may take its time for, and how much it may say before it has shown
   who it is, is bounded.
2. Who has not shown who it is learns nothing but that.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Final, Protocol

from vchan.cli.proxy.passages import NotConnected, Passage, Passages
from vchan.cli.proxy.tls import RECORD_BYTES_MAX, TlsSocket
from vchan.cli.proxy.users import Names, ProxyUser, Users, names_of
from vchan.cli.proxy.wire import (
    ESTABLISHED,
    BadConnect,
    ConnectParser,
    ConnectRequest,
    encode_refusal,
)
from vchan.errors import LimitExceeded
from vchan.io.loop import Loop

HEAD_S: Final = 10.0
"""From a connection's begin to the end of its request, TLS's handshake included. At it: it is
closed."""
ANSWER_S: Final = 30.0
"""For what a client has asked for to be connected. At it: 504."""
LINGER_S: Final = 2.0
"""Who is refused may say the rest meanwhile, so that it reads why. At it: the connection is
closed."""
KEEPALIVE_S: Final = 60
"""A client that says nothing is asked by TCP after this whether it is still there."""


class Door(Protocol):
    """What clients take of the proxy."""

    loop: Loop
    users: Users | None
    names: Names
    passages: Passages

    def proven(self, client: Client) -> None:
        """It has shown who it is."""

    def forget(self, client: Client) -> None:
        """It is gone."""

    def say_refusal(self, text: str) -> None:
        """For the log: somebody was refused, or has lost a tunnel."""


class Client:
    """One connection.

    Args:
        connected: Its socket, which does not wait.
        came_from: Its address, or the user at the other end of a unix socket.
    """

    def __init__(self, server: Door, connected: socket.socket, came_from: str) -> None:
        self.came_from = came_from
        self._server = server
        self._loop = server.loop
        self._socket = connected
        self._parser = ConnectParser()
        self._who = came_from
        self._asked: ConnectRequest | None = None
        self._passage: Passage | None = None
        self._stream = b""
        self._is_closed = False
        self._writes = False
        self._timer = self._loop.call_later(HEAD_S, self._late)
        if isinstance(connected, TlsSocket):
            self._read_by(self._shake_hands)
        else:
            self._read_by(self._read_head)

    # ---------------------------------------------------------------- before the request

    def _read_by(self, callback: Callable[[], object]) -> None:
        self._loop.add_reader(self._socket.fileno(), callback)

    def _shake_hands(self) -> None:
        assert isinstance(self._socket, TlsSocket)
        self._stop_writing()
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLWantWriteError:
            self._writes = True
            self._loop.add_writer(self._socket.fileno(), self._shake_hands)
            return
        except (OSError, ValueError) as error:
            self._drop(f"TLS: {getattr(error, 'reason', None) or error}")
            return
        self._read_by(self._read_head)

    def _stop_writing(self) -> None:
        if self._writes:
            self._writes = False
            self._loop.remove_writer(self._socket.fileno())

    def _read_head(self) -> None:
        try:
            data = self._socket.recv(RECORD_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(str(error))
            return
        if not data:
            self._drop("it closed the connection before its request was complete")
            return
        try:
            self._asked = self._parser.feed(data)
        except BadConnect as error:
            self.refused(NotConnected(error.status, error.detail))
            return
        if self._asked is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._ask(self._asked)

    def _late(self) -> None:
        self._drop(f"no request in {HEAD_S:g} s (HEAD_S)")

    # ---------------------------------------------------------------- what it may

    def _ask(self, asked: ConnectRequest) -> None:
        users = self._server.users
        user = None if users is None else self._user(users, asked)
        if users is not None and user is None:
            self.refused(NotConnected(407, "show a certificate or a token that the proxy knows"))
            return
        self._server.proven(self)
        meant = self._server.names.meant(asked.name, asked.port)
        if user is not None:
            self._who = f"{user.name} at {self.came_from}"
            if not user.allowed.allows(meant.target):
                text = f"{meant.target}: not among the targets of user {user.name}"
                self.refused(NotConnected(403, text))
                return
        try:
            self._passage = self._server.passages.to(meant)
            self._stream = self._passage.open(self._who, self)
        except LimitExceeded as error:
            self.refused(NotConnected(503, str(error)))
            return
        self._set_timer(ANSWER_S, self._no_answer)

    def _user(self, users: Users, asked: ConnectRequest) -> ProxyUser | None:
        if asked.presented is not None:
            return users.by_token(asked.presented)
        if isinstance(self._socket, TlsSocket):
            certificate = self._socket.getpeercert()
            if certificate:
                return users.by_certificate(names_of(certificate))
        return None

    def _no_answer(self) -> None:
        assert self._passage is not None
        self._passage.withdraw(self._stream)
        self.refused(NotConnected(504, f"no answer out of the VM in {ANSWER_S:g} s (ANSWER_S)"))

    # ---------------------------------------------------------------- what its passage says

    def connected(self) -> tuple[socket.socket, bytes]:
        """See `Applicant`."""
        assert self._asked is not None
        self._timer.cancel()
        self._send(ESTABLISHED)
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        return self._socket, self._asked.rest

    def refused(self, refusal: NotConnected) -> None:
        """See `Applicant`."""
        self._server.say_refusal(f"{self._who}{self._wanted()}: {refusal.status} {refusal.detail}")
        self._send(encode_refusal(*refusal))
        # To close with something unread would be to reset: who is refused might not read why.
        self._set_timer(LINGER_S, self._close)
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._close()
        else:
            self._read_by(self._read_rest)

    def ended(self, problem: str) -> None:
        """See `Applicant`."""
        if problem:
            text = f"{self._who}{self._wanted()}: its tunnel was reset: {problem}"
            self._server.say_refusal(text)
        self._is_closed = True
        self._server.forget(self)

    def _send(self, data: bytes) -> None:
        """It is the first that is said, and small: the kernel has room for it."""
        try:
            self._socket.send(data)
        except OSError:
            pass  # the client is gone: whoever reads next finds that

    def _wanted(self) -> str:
        return f" to {self._asked.name}:{self._asked.port}" if self._asked is not None else ""

    # ---------------------------------------------------------------- the end

    def _read_rest(self) -> None:
        try:
            if self._socket.recv(RECORD_BYTES_MAX):
                return
        except BlockingIOError:
            return
        except OSError:
            pass  # over, too
        self._close()

    def _drop(self, problem: str) -> None:
        """There is nobody to be told anything."""
        self._server.say_refusal(f"{self._who}: {problem}")
        self._close()

    def give_up(self, problem: str) -> None:
        """It has not shown who it is, and is in others' way; or the proxy ends."""
        if not self._is_closed:
            self._drop(problem)

    def _close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._timer.cancel()
        self._stop_writing()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._server.forget(self)

    def _set_timer(self, delay_s: float, callback: Callable[[], object]) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, callback)
