"""forward: what connects to a socket on this host is connected to one in a VM.

Rules of this file
1. The streams' memory is here: they go on when a daemon is restarted, a channel is cut, or the VM
   moves to a host whose daemon's socket was named (--also). What cannot go on is reset, with the
   reason; nothing is left out silently.
2. One daemon at a time: when there is nothing for the VM at one socket any more, the next is asked.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from vchan.cli.arguments import add_vm, seconds
from vchan.cli.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from vchan.cli.host import Host, match
from vchan.cli.output import flush, printable, say, text_line
from vchan.client import (
    EXCHANGE,
    HOST_TOPIC,
    Client,
    Connection,
    invocation_body,
    make_request,
    result_of,
)
from vchan.errors import ConfigError, LimitExceeded, LinkDown, LinkError, VchanError
from vchan.io.loop import Loop, Timer
from vchan.io.streams import listen_unix
from vchan.io.targets import LOOPBACK, TCP, Target, parse_target
from vchan.rpc.in_flight import Heartbeat, Outcome
from vchan.rpc.messages import CALL
from vchan.session import Session
from vchan.splices import Splices, reset
from vchan.streams import Ended, Fault, StreamEnds, StreamEvent
from vchan.streams.ends import STREAMS_MAX
from vchan.streams.messages import CLOSED, FORGOTTEN

LOOK_S: Final = 60.0
"""A VM that was lost is looked for at the sockets so long, unless --look says otherwise: a
migration takes less, once its daemon has let go. At it: all streams are reset, and the command
ends."""
RETRY_S: Final = 0.2
"""Between two sockets that are asked for the VM."""
END_S: Final = 1.0
"""For the daemon to hear that the streams are over. At it: the guest finds out by asking."""
ATTACH_S: Final = 10.0
"""For the daemon to answer."""
SOCKET_MODE: Final = 0o600
"""Of a unix socket that is listened at: this user's."""
OPEN_STREAMS: Final = "open_streams"
"""The daemon's own method after which a connection carries byte streams into one VM."""

_EPILOG: Final = """\
TARGET is a port of the guest's loopback interface, or the path of a unix socket in it. LOCAL is a
port of this host's 127.0.0.1, ADDRESS:PORT, or a path; 0 is a free port. Without LOCAL it is the
guest's port, or a free one.

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
    add_vm(forward)
    forward.add_argument(
        "what", metavar="[LOCAL:]TARGET", help="where to listen, and what is reached there"
    )
    forward.add_argument(
        "--stdio",
        action="store_true",
        help="no listener: one connection, of standard input and output",
    )
    forward.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="PATH",
        help="the socket of another host's daemon, where the VM may be too; may be given again",
    )
    forward.add_argument(
        "--look",
        type=seconds,
        default=LOOK_S,
        metavar="SECONDS",
        help="how long to look for a VM that has left [%(default)g]",
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


def listen(local: Local) -> socket.socket:
    """A socket that is listened at.

    Raises:
        ConfigError: It cannot be.
    """
    if local.path:
        try:
            return listen_unix(local.path, SOCKET_MODE)
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


def _name_of(listener: socket.socket) -> str:
    name = listener.getsockname()
    if isinstance(name, str):
        return name
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def find(word: str, sockets: list[str], timeout_s: float) -> tuple[str, list[str]]:
    """The UUID of the VM that a word means, and the sockets, where it is known first.

    Raises:
        VchanError: What the first daemon said, if none knows it.
    """
    first: VchanError | None = None
    for number, path in enumerate(sockets):
        try:
            with Client(path) as client:
                rows = Host(client, path, timeout_s).ask("list")
                problem = f"{word!r}: this host has no such domain"
                return match(word, rows, problem), sockets[number:] + sockets[:number]
        except VchanError as error:
            first = first or error
    assert first is not None
    raise first


# ---------------------------------------------------------------- one daemon after the other


class Way:
    """The way to the VM: through the daemon at one of several sockets.

    Args:
        sockets: Asked in turn.
        attached: Called when there is one.
        failed: Told why there is none: at first, when each was asked once; later, after `look_s`.
    """

    def __init__(
        self,
        loop: Loop,
        splices: Splices,
        uuid: str,
        target: Target,
        sockets: list[str],
        look_s: float,
        attached: Callable[[], object],
        failed: Callable[[VchanError], object],
    ) -> None:
        self._loop = loop
        self._splices = splices
        self._args = {"vm": uuid, "target": str(target)}
        self._sockets = sockets
        self._look_s = look_s
        self._on_attached = attached
        self._on_failed = failed
        self._at = 0
        self._errors: list[VchanError] = []  # since there was one the last time
        self._lost_s: float | None = None
        self._connection: Connection | None = None
        self._is_attached = False
        self._is_leaving = False
        self._timer: Timer | None = None

    def connect(self) -> None:
        """Ask at the socket whose turn it is."""
        self._timer = None
        self._is_leaving = False
        self._connection = Connection(
            self._loop,
            self._sockets[self._at],
            "vchan forward",
            lambda _: None,
            self._changed,
            other=self._splices.receive,
            refill=self._refill,
        )
        try:
            self._connection.connect()
        except LinkError as error:
            self._leave(error)

    def wake(self) -> None:
        """Have what there is to say written soon."""
        if self._connection is not None:
            self._connection.wake()

    def when_told(self, callback: Callable[[], object]) -> None:
        """Call back when the daemon has heard all that was said; or at once, if there is none."""
        if self._connection is not None and self._is_attached:
            self._connection.when_acknowledged(callback)
        else:
            callback()

    def close(self) -> None:
        """Close it for good."""
        if self._timer is not None:
            self._timer.cancel()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _refill(self, session: Session) -> bool:
        return self._is_attached and self._splices.refill(session)

    def _changed(self, is_up: bool, reason: str) -> None:
        if not is_up:
            path = self._sockets[self._at]
            self._leave(LinkDown(path, reason.removeprefix(f"{path}: ")))
        elif not self._is_attached and self._connection is not None:
            self._splices.connected()
            body = invocation_body(OPEN_STREAMS, self._args, None, None, None)
            request = make_request(CALL, EXCHANGE, HOST_TOPIC, "", body, ATTACH_S)
            self._connection.submit(request, self._answered)

    def _answered(self, outcome: Outcome) -> None:
        if isinstance(outcome, Heartbeat) or self._is_leaving:
            return
        try:
            result_of(outcome, ATTACH_S)
        except VchanError as error:
            self._leave(error)
            return
        self._is_attached = True
        self._errors.clear()
        self._lost_s = None
        self._on_attached()
        self.wake()

    def _leave(self, error: VchanError) -> None:
        """There is nothing here: the next one is asked, in a moment."""
        if self._is_leaving:
            return
        self._is_leaving = True
        if self._is_attached:
            self._is_attached = False
            self._lost_s = self._loop.time()
        else:
            self._errors.append(error)
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        is_first = self._lost_s is None
        is_over = self._lost_s is not None and self._loop.time() - self._lost_s >= self._look_s
        if self._errors and (is_over or (is_first and len(self._errors) >= len(self._sockets))):
            self._on_failed(self._errors[0] if is_first else self._errors[-1])
            return
        if self._errors:  # the one that had it is asked again at once: it was restarted, perhaps
            self._at = (self._at + 1) % len(self._sockets)
        self._timer = self._loop.call_later(RETRY_S, self.connect)


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
        self._what = f"{name} {target}"
        self._target = str(target)
        self._listener = listener
        self._only = only
        self._is_listening = False
        self._is_ending = False
        self._has_begun = False
        self._is_over = False  # the stream of `only`, at both ends
        self._is_written = False  # all that came of it
        ends = StreamEnds(os.urandom, asks_max=None, offer_s=None)
        self._splices = Splices(loop, ends, self._wake, self._on_event)
        self._way = Way(
            loop, self._splices, uuid, target, sockets, look_s, self._attached, self._fail
        )

    def run(self) -> None:
        """Until there is a signal, or no way to the VM any more."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._way.connect()
        try:
            self._loop.run()
        finally:
            self._splices.close()
            self._way.close()

    def _wake(self) -> None:
        self._way.wake()

    def _attached(self) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        if self._listener is not None:
            text_line(f"{_name_of(self._listener)} -> {printable(self._what)}")
            flush()
        elif self._only is not None:
            self._splices.open(self._only, self._target)
        self._listen_on()

    def _fail(self, problem: VchanError) -> None:
        self.problem = problem
        if self._has_begun and len(self._splices):
            text = f"the VM was not found again: {problem}"
            say(printable(f"{self._what}: {len(self._splices)} connections are reset: {text}"))
        self._splices.ends.reset_all(FORGOTTEN, str(problem))
        self._is_ending = True
        self._splices.settle()
        self._loop.stop()

    # ---------------------------------------------------------------- connections

    def _listen_on(self) -> None:
        if self._listener is not None and not self._is_listening:
            self._is_listening = True
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _stop_listening(self) -> None:
        if self._listener is not None and self._is_listening:
            self._is_listening = False
            self._loop.remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        """Who comes when STREAMS_MAX are connected waits in the kernel's queue."""
        assert self._listener is not None
        if len(self._splices) >= STREAMS_MAX:
            self._stop_listening()
            return
        try:
            connected, _ = self._listener.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError | ConnectionError):
                self._stop_listening()  # no descriptors: until a connection ends, or for a while
                self._loop.call_later(1.0, self._listen_on)
            return
        try:
            self._splices.open(connected, self._target)
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

    def _on_signal(self, number: int, _: object) -> None:
        status = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_OK
        self._loop.call_soon_threadsafe(partial(self._end, status))

    def _end(self, status: int) -> None:
        """Reset what there is, and have the guest hear of it."""
        self.status = status
        if self._is_ending:
            self._loop.stop()
            return
        self._is_ending = True
        self._stop_listening()
        self._splices.ends.reset_all(CLOSED, "the forward was ended")
        self._splices.settle()
        self._loop.call_later(END_S, self._loop.stop)
        self._loop.call_soon(lambda: self._way.when_told(self._loop.stop))


def _forward(options: argparse.Namespace) -> int:
    local, target = parse_what(options.what)
    if options.stdio and local is not None:
        raise ConfigError(repr(options.what), "with --stdio nobody listens: expected no LOCAL")
    if options.stdio and sys.stdout is None:
        raise ConfigError("--stdio", "standard output is closed")
    if local is None and not options.stdio:
        local = Local(port=int(target.name) if target.kind == TCP else 0)
    uuid, sockets = find(options.vm, [options.socket, *options.also], options.timeout)
    listener = None if local is None else listen(local)
    try:
        with Loop() as loop:
            ours, theirs = socket.socketpair() if options.stdio else (None, None)
            forward = Forward(loop, options.vm, uuid, target, sockets, options.look, listener, ours)
            if theirs is not None:
                Stdio(
                    theirs,
                    lambda problem: loop.call_soon_threadsafe(partial(forward.written, problem)),
                ).start()
            forward.run()
    finally:
        if listener is not None:
            listener.close()
            if local is not None and local.path:
                os.unlink(local.path)  # noqa: PTH108 - as it was given
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
            while data := os.read(0, 65536):
                self._socket.sendall(data)
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the stream is over, and says why

    def _write(self) -> None:
        try:
            while data := self._socket.recv(65536):
                while data:
                    data = data[os.write(1, data) :]
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
