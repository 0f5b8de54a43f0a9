"""The process: the files that it reads, where it listens, and its clients."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import ssl
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from vchan.cli.failures import EXIT_INTERRUPTED, EXIT_OK
from vchan.cli.forward import Local, listening, name_of
from vchan.cli.output import flush, printable, say, text_line
from vchan.cli.proxy.clients import Client
from vchan.cli.proxy.command import DEFAULT_LISTEN
from vchan.cli.proxy.passages import Passages
from vchan.cli.proxy.tls import server_context
from vchan.cli.proxy.users import Names, Users
from vchan.cli.way import END_S
from vchan.errors import ConfigError
from vchan.host.policy.token_bucket import TokenBucket
from vchan.io.access import credentials_of
from vchan.io.activation import take_listener
from vchan.io.loop import Loop
from vchan.io.service_manager import ServiceManager
from vchan.io.streams import Acceptor

SOCKET_MODE: Final = 0o660
"""Of a unix socket that is listened at: its owner's and group's."""
CONNECTIONS_MAX: Final = 512
"""Clients at a time, with their tunnels. At it: who comes next waits in the kernel's queue."""
UNPROVEN_MAX: Final = 64
"""Clients that have not shown who they are. At it: the oldest of them is closed."""
REFUSALS_LOGGED_PER_S: Final = 5.0
"""Lines of clients that were refused: who asks decides how many there are. At it: the others are
counted, and the next line says how many."""
REFUSALS_LOGGED_MAX: Final = 50.0
"""Such lines at once, after a quiet time. At it: see REFUSALS_LOGGED_PER_S."""

# ---------------------------------------------------------------- what is configured


class Files(NamedTuple):
    """What the files say, which SIGHUP has read again."""

    users: Users | None
    names: Names
    context: ssl.SSLContext | None


def read_files(options: argparse.Namespace) -> Files:
    """Read them all.

    Raises:
        ConfigError: One is wrong, or they do not go together.
    """
    users = None if options.users is None else Users(_secret(options.users), options.users)
    text = "" if options.names is None else _text(options.names)
    names = Names(text, options.names or "")
    if options.certificate is None:
        for name in ("key", "client_ca"):
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(option, "expected --certificate with it")
    if users is not None and users.have_certificates and options.client_ca is None:
        raise ConfigError(options.users, "has users with certificates: expected --client-ca")
    context = None
    if options.certificate is not None:
        needs = users is not None and not users.have_tokens
        paths = (options.certificate, options.key, options.client_ca)
        context = server_context(*paths, needs_certificate=needs)
    return Files(users, names, context)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(path, f"cannot be read: {error}") from error


def _secret(path: str) -> str:
    """A file that others cannot read or change.

    Raises:
        ConfigError: They can, or it cannot be read.
    """
    text = _text(path)
    found = Path(path).stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o027:
        who = f"uid {found.st_uid}, mode {found.st_mode & 0o7777:04o}"
        raise ConfigError(path, f"others can read or change it ({who}): chmod 0640 it, or 0600")
    return text


def where_to_listen(text: str) -> Local:
    """What --listen says.

    Raises:
        ConfigError: It says nothing of the kind.
    """
    kind, _, path = text.partition(":")
    if kind == "unix":
        if not path.startswith("/"):
            raise ConfigError(f"--listen {text}", "expected unix:/PATH")
        return Local(path=path)
    address, _, port = text.rpartition(":")
    try:
        number = ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        number = None
    if number is None or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--listen {text}", "expected ADDRESS:PORT, or unix:/PATH")
    return Local(address=str(number), port=int(port))


def require_safe(listener: socket.socket, options: argparse.Namespace) -> None:
    """That nobody uses it whom nobody knows, and that nobody on a network hears a token.

    Raises:
        ConfigError: Something is missing for that.
    """
    if listener.family == socket.AF_UNIX:
        return
    where = f"--listen {name_of(listener)}"
    if options.users is None:
        problem = "anybody can connect to it: expected --users, or --listen unix:/PATH"
        raise ConfigError(where, problem)
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    if options.certificate is None and not address.is_loopback:
        raise ConfigError(where, "is on a network: expected --certificate")


# ---------------------------------------------------------------- the process


class Proxy:
    """Listens, and keeps the clients: see `clients.Door`."""

    def __init__(
        self, loop: Loop, options: argparse.Namespace, listener: socket.socket, files: Files
    ) -> None:
        self.loop = loop
        self.status = EXIT_OK
        self._options = options
        self._listener = listener
        self._clients: dict[Client, None] = {}
        self._unproven: dict[Client, None] = {}  # the oldest stands first
        self._acceptor = Acceptor(
            loop, listener, self._accepted, has_room=lambda: len(self._clients) < CONNECTIONS_MAX
        )
        self._is_ending = False
        self._lines = TokenBucket(REFUSALS_LOGGED_PER_S, REFUSALS_LOGGED_MAX)
        self._left_out = 0
        self._use(files)
        sockets = [options.socket, *options.also]
        self.passages = Passages(loop, sockets, options.look, self._say)

    def _use(self, files: Files) -> None:
        self.users, self.names, self._context = files

    def run(self) -> None:
        """Until a signal ends it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, lambda *_: self.loop.call_soon_threadsafe(self._read_again))
        manager = ServiceManager(self.loop)
        self._acceptor.resume()
        where = name_of(self._listener)
        text_line(where)
        flush()
        manager.ready(where)
        try:
            self.loop.run()
        finally:
            manager.stopping()
            for client in list(self._unproven):
                client.give_up("the proxy ends")
            self.passages.close()

    def _read_again(self) -> None:
        try:
            self._use(read_files(self._options))
        except ConfigError as error:
            self._say(f"{error}: what was read before it holds")
        else:
            self._say("the files were read again")

    # ---------------------------------------------------------------- connections

    def _accepted(self, connected: socket.socket, address: Any) -> None:
        try:
            self._begin(connected, address)
        except OSError as error:  # it is gone already
            self.say_refusal(f"a connection was lost: {error.strerror or error}")
            connected.close()

    def _begin(self, connected: socket.socket, address: Any) -> None:
        connected.setblocking(False)
        if connected.family == socket.AF_UNIX:
            came_from = f"uid {credentials_of(connected).uid}"
        else:
            came_from = address[0]
        if self._context is not None:
            connected = self._context.wrap_socket(
                connected, server_side=True, do_handshake_on_connect=False
            )
        if len(self._unproven) >= UNPROVEN_MAX:
            oldest = next(iter(self._unproven))
            oldest.give_up(f"{UNPROVEN_MAX} others have shown nothing either (UNPROVEN_MAX)")
        client = Client(self, connected, came_from)
        self._clients[client] = self._unproven[client] = None

    def proven(self, client: Client) -> None:
        """See `clients.Door`."""
        self._unproven.pop(client, None)

    def forget(self, client: Client) -> None:
        """See `clients.Door`."""
        self._clients.pop(client, None)
        self._unproven.pop(client, None)
        self._acceptor.resume()

    # ---------------------------------------------------------------- the log, and the end

    def _say(self, text: str) -> None:
        say(printable(text))

    def say_refusal(self, text: str) -> None:
        """See `clients.Door`."""
        if not self._lines.try_take(1, self.loop.time()):
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        self._say(f"{text} ({left_out} lines before it were left out)" if left_out else text)

    def _on_signal(self, number: int, _: object) -> None:
        status = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_OK
        self.loop.call_soon_threadsafe(partial(self._end, status))

    def _end(self, status: int) -> None:
        """Reset what there is, and have the guests hear of it."""
        self.status = status
        if self._is_ending:
            self.loop.stop()
            return
        self._is_ending = True
        self._acceptor.close()
        self.loop.call_later(END_S, self.loop.stop)
        self.passages.end("the proxy was ended", self.loop.stop)


def serve(options: argparse.Namespace) -> int:
    """Until a signal ends it; returns the exit status."""
    files = read_files(options)
    handed = take_listener()
    if handed is not None and options.listen is not None:
        handed.close()
        problem = "systemd has opened a socket already: expected no --listen"
        raise ConfigError(f"--listen {options.listen}", problem)
    local = where_to_listen(options.listen or DEFAULT_LISTEN)
    with handed or listening(local, SOCKET_MODE) as listener:
        require_safe(listener, options)
        with Loop() as loop:
            proxy = Proxy(loop, options, listener, files)
            proxy.run()
    return proxy.status
