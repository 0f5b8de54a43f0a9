"""forward: what connects to a socket on this host is connected to one in a VM.

Its streams outlast daemons and migrations: see `vchan.cli.way`.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Final, NamedTuple

from vchan.cli.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from vchan.cli.output import flush, printable, say, text_line
from vchan.cli.terminal import read_some, write_all
from vchan.cli.way import ENDING_SIGNALS, Carried, add_way, find
from vchan.errors import ConfigError, LimitExceeded, LinkError, VchanError
from vchan.io.activation import take_listener
from vchan.io.loop import Loop
from vchan.io.service_manager import ServiceManager
from vchan.io.streams import Acceptor, listen_unix
from vchan.io.targets import LOOPBACK, TCP, Target, parse_target
from vchan.splices import reset
from vchan.streams import Ended, Fault, StreamEvent
from vchan.streams.ends import STREAMS_MAX

SOCKET_MODE: Final = 0o600
"""Of a unix socket that is listened at: this user's."""

_EPILOG: Final = """\
TARGET is a port of the guest's loopback interface, or the path of a unix socket in it. LOCAL is a
port of this host's 127.0.0.1, ADDRESS:PORT, or a path; 0 is a free port. Without LOCAL it is the
guest's port, or a free one; systemd may have opened the socket (vchan-forward@.socket).

The policy of this host (kind forward) and the guest's own configuration (option forward) both
have to allow the target. Connections go on while daemons are restarted, and while the VM moves to a
host whose daemon answers at a socket that --also names.

  vchan forward VM 8080                  127.0.0.1:8080 here is 127.0.0.1:8080 in the VM
  vchan forward VM 9000:8080             127.0.0.1:9000 here
  vchan forward VM ./db:/run/db.sock     a unix socket for a unix socket
  ssh -o ProxyCommand='vchan forward --stdio VM 22' VM
"""


def add_commands(commands: Any) -> None:
    """The command of this group."""
    forward = commands.add_parser(
        "forward",
        help="connect to what listens in a VM, through its channel",
        description="Listen here; connect whoever comes to what listens in a VM.",
        epilog=_EPILOG,
    )
    add_way(forward)
    forward.add_argument(
        "what", metavar="[LOCAL:]TARGET", help="where to listen, and what is reached there"
    )
    forward.add_argument(
        "--stdio",
        action="store_true",
        help="no listener: one connection, of standard input and output",
    )
    forward.set_defaults(run=_forward, is_text=True)


# ---------------------------------------------------------------- what is meant


class Local(NamedTuple):
    """Where to listen: at a path, or at an address and port."""

    path: str = ""
    address: str = LOOPBACK
    port: int = 0


_LOCAL: Final = re.compile(r"(?:(?P<address>\[[^]]+\]|[^:/\[\]]+):)?(?P<port>[0-9]{1,5})")


def parse_what(text: str) -> tuple[Local | None, Target]:
    """Where to listen, as far as it is said; and what in the guest.

    Raises:
        ConfigError: It is neither.
    """
    before, colon, last = text.rpartition(":")
    try:
        target = parse_target(f"unix:{last}" if last.startswith("/") else f"tcp:{last}")
    except ValueError:
        problem = "expected [LOCAL:]PORT or [LOCAL:]/PATH, as in 8080, 9000:8080, 9000:/run/a.sock"
        raise ConfigError(repr(text), problem) from None
    return (_parse_local(before, text) if colon else None), target


def _parse_local(text: str, whole: str) -> Local:
    if "/" in text:
        return Local(path=text)
    found = _LOCAL.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        problem = f"{text!r} is no LOCAL; expected PORT, ADDRESS:PORT or a path with a / in it"
        raise ConfigError(repr(whole), problem)
    return Local(address=(found["address"] or LOOPBACK).strip("[]"), port=int(found["port"]))


def listen(local: Local, mode: int = SOCKET_MODE) -> socket.socket:
    """A socket that is listened at.

    Args:
        mode: Permissions of a unix socket.

    Raises:
        ConfigError: It cannot be.
    """
    if local.path:
        try:
            return listen_unix(local.path, mode)
        except LinkError as error:
            raise ConfigError(local.path, error.problem) from error
    family = socket.AF_INET6 if ":" in local.address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setblocking(False)
        made.bind((local.address, local.port))
        made.listen(128)
    except OSError as error:
        made.close()
        where = f"{local.address}:{local.port}"
        raise ConfigError(where, f"cannot listen there: {error.strerror or error}") from error
    return made


@contextmanager
def listening(local: Local, mode: int = SOCKET_MODE) -> Iterator[socket.socket]:
    """`listen`; in the end the path goes, too, if it is still this socket's."""
    made = listen(local, mode)
    bound = os.lstat(local.path) if local.path else None
    try:
        yield made
    finally:
        with suppress(OSError):  # somebody has removed it
            if bound is not None and os.path.samestat(bound, os.lstat(local.path)):
                os.unlink(local.path)  # noqa: PTH108 - as it was given
        made.close()


def name_of(listener: socket.socket) -> str:
    """Where it listens, for people."""
    name = listener.getsockname()
    if isinstance(name, str):
        return name
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


# ---------------------------------------------------------------- the command


class Forward:
    """Connections, and their streams.

    Args:
        name: The VM's, as the operator calls it.
        listener: None: there is one connection, `only`.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        uuid: str,
        target: Target,
        sockets: list[str],
        look_s: float,
        listener: socket.socket | None,
        only: socket.socket | None = None,
    ) -> None:
        self.problem: VchanError | None = None
        self.status = EXIT_OK
        self._loop = loop
        self._manager = ServiceManager(loop)
        self._what = f"{name} {target}"
        self._listener = listener
        self._only = only
        self._acceptor: Acceptor[socket.socket] | None = None
        if listener is not None:
            self._acceptor = Acceptor(
                loop, listener, self._accepted, has_room=lambda: len(self._carried) < STREAMS_MAX
            )
        self._is_ending = False
        self._has_begun = False
        self._is_over = False  # the stream of `only`, at both ends
        self._is_written = False  # all that came of it
        self._carried = Carried(
            loop, uuid, target, sockets, look_s, self._attached, self._fail, self._on_event
        )

    def run(self) -> None:
        """Until there is a signal, or no way to the VM any more."""
        self._carried.run(ENDING_SIGNALS, self._on_signal)

    def _attached(self) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        if self._listener is not None:
            where = f"{name_of(self._listener)} -> {printable(self._what)}"
            text_line(where)
            flush()
            self._manager.ready(where)
        elif self._only is not None:
            self._carried.open(self._only)
        self._listen_on()

    def _fail(self, problem: VchanError, count: int) -> None:
        self.problem = problem
        if self._has_begun and count:
            text = f"the VM was not found again: {problem}"
            say(printable(f"{self._what}: {count} connections are reset: {text}"))
        self._is_ending = True
        self._loop.stop()

    # ---------------------------------------------------------------- connections

    def _listen_on(self) -> None:
        if self._acceptor is not None:
            self._acceptor.resume()

    def _accepted(self, connected: socket.socket, _: object) -> None:
        try:
            self._carried.open(connected)
        except LimitExceeded as error:  # streams whose sockets are gone may not be over yet
            say(f"{self._what}: refused a connection: {error}")
            reset(connected)

    def _on_event(self, event: StreamEvent) -> None:
        match event:
            case Ended(_, reason, text):
                if reason and not self._is_ending:
                    say(printable(f"{self._what}: a connection is reset: {text or 'closed'}"))
                if self._is_ending:
                    return
                if self._only is None:
                    self._listen_on()
                elif reason:
                    self.status = EXIT_FAILED
                    self._loop.stop()
                else:
                    self._is_over = True
                    self._end_if_done()
            case Fault(reason):
                say(printable(f"{self._what}: the guest broke the protocol: {reason}"))
            case _:
                pass

    # ---------------------------------------------------------------- the end

    def written(self, problem: str) -> None:
        """All that comes of `only` is written where it is to be, or cannot be."""
        if problem:
            say(f"standard output: {problem}")
            self._end(EXIT_FAILED)
        else:
            self._is_written = True
            self._end_if_done()

    def _end_if_done(self) -> None:
        if self._is_over and self._is_written:
            self._loop.stop()

    def _on_signal(self, number: int) -> None:
        self._end(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_OK)

    def _end(self, status: int) -> None:
        """Reset what there is, and have the guest hear of it."""
        self.status = status
        if self._is_ending:
            self._loop.stop()
            return
        self._is_ending = True
        if self._acceptor is not None:
            self._acceptor.close()
        self._carried.reset_all("the forward was ended", self._loop.stop)


def _forward(options: argparse.Namespace) -> int:
    local, target = parse_what(options.what)
    handed = take_listener()
    if handed is not None and (options.stdio or local is not None):
        problem = "systemd has opened a socket already: expected no LOCAL and no --stdio"
        raise ConfigError(repr(options.what), problem)
    if options.stdio and local is not None:
        raise ConfigError(repr(options.what), "with --stdio nobody listens: expected no LOCAL")
    if local is None and not options.stdio and handed is None:
        local = Local(port=int(target.name) if target.kind == TCP else 0)
    uuid, sockets = find(options.vm, [options.socket, *options.also], options.timeout)
    with (
        (handed or nullcontext()) if local is None else listening(local) as listener,
        Loop() as loop,
    ):
        ours, theirs = socket.socketpair() if options.stdio else (None, None)
        forward = Forward(loop, options.vm, uuid, target, sockets, options.look, listener, ours)
        if theirs is not None:
            Stdio(
                theirs,
                lambda problem: loop.call_soon_threadsafe(partial(forward.written, problem)),
            ).start()
        forward.run()
    if forward.problem is not None:
        raise forward.problem
    return forward.status


class Stdio:
    """Standard input and output, which may be files or terminals: no loop can wait for these.

    Args:
        joined: Gets what is read, and gives what is written.
        written: Called when everything is written, or cannot be (why), from another thread.
    """

    def __init__(self, joined: socket.socket, written: Callable[[str], object]) -> None:
        self._socket = joined
        self._written = written

    def start(self) -> None:
        """Begin; the threads end with the process."""
        for work in (self._read, self._write):
            threading.Thread(target=work, name="stdio", daemon=True).start()

    def _read(self) -> None:
        try:
            while data := read_some(0, 65536):
                self._socket.sendall(data)
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the stream is over, and says why

    def _write(self) -> None:
        try:
            while data := self._socket.recv(65536):
                write_all(1, data)
            _close_stdout()  # who reads it may be waiting for that, and we for his end
        except OSError as error:
            self._written(os.strerror(error.errno or 0))
        else:
            self._written("")


def _close_stdout() -> None:
    """Close what is behind it; the number stays taken, so that nothing else is written there."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
