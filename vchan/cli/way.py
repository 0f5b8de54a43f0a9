"""The way of a command's byte streams into a VM: one daemon after the other.

Rules of this file
1. The streams' memory is in the command: they go on when a daemon is restarted, a channel is cut,
   or the VM moves to a host whose daemon's socket was named (--also). What cannot go on is reset,
   with the reason; nothing is left out silently.
2. One daemon at a time: when there is nothing for the VM at one socket any more, the next is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from vchan.cli.arguments import add_vm, seconds
from vchan.cli.host import Host, is_gone, match
from vchan.client import Client
from vchan.errors import LinkDown, LinkError, RemoteError, VchanError
from vchan.io.loop import Loop, Timer
from vchan.io.targets import Target
from vchan.programs.connection import HOST_TOPIC, OPEN_STREAMS, Connection
from vchan.programs.requests import EXCHANGE, invocation_body, make_request, result_of
from vchan.rpc.in_flight import Heartbeat, Outcome
from vchan.rpc.messages import CALL
from vchan.session import Session
from vchan.splices import Splices
from vchan.streams import StreamEnds, StreamEvent
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
ENDING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a command that has nothing else to do with them."""


def add_way(parser: argparse.ArgumentParser) -> None:
    """The VM, and where it may be."""
    add_vm(parser)
    add_sockets(parser)


def add_sockets(parser: argparse.ArgumentParser) -> None:
    """Where VMs may be."""
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="PATH",
        help="the socket of another host's daemon, where the VM may be too; may be given again",
    )
    parser.add_argument(
        "--look",
        type=seconds,
        default=LOOK_S,
        metavar="SECONDS",
        help="how long to look for a VM that has left [%(default)g]",
    )


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


def facts(for_whom: str = "") -> str:
    """What a command says of itself when it opens a stream. By its pid the daemon knows that nobody
    else brings its connection there: when that is closed, the command has ended."""
    said = {"for": for_whom} if for_whom else {}
    return json.dumps({**said, "pid": os.getpid()}, separators=(",", ":"))


class Way:
    """The way to the VM: through the daemon at one of several sockets.

    Args:
        uuid: The VM's.
        target: What is to be reached in it.
        sockets: Asked in turn.
        look_s: How long a VM that was lost is looked for.
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
            "vchan streams",
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
            self._on_failed(max(self._errors[-len(self._sockets) :], key=_weight))
            return
        if self._errors:  # the one that had it is asked again at once: it was restarted, perhaps
            self._at = (self._at + 1) % len(self._sockets)
        self._timer = self._loop.call_later(RETRY_S, self.connect)


def _weight(error: VchanError) -> int:
    """Of what the daemons said, which says most: that a VM is not there, all say but one."""
    if isinstance(error, RemoteError):
        return 0 if is_gone(error) else 2
    return 1


class Carried:
    """A command's sockets, each joined to a stream to one target in a VM.

    What a command does: `run`, `open` when it was told `attached`, and in the end `reset_all` or
    nothing, then `Loop.stop`.

    Args:
        uuid, target, sockets, look_s: See `Way`.
        attached: Called whenever a daemon has the VM: the first time, and after each change.
        failed: Told why there is no way to the VM any more, and how many streams were reset for it.
        told: Told every event of the streams: see `Splices`.
    """

    def __init__(
        self,
        loop: Loop,
        uuid: str,
        target: Target,
        sockets: list[str],
        look_s: float,
        attached: Callable[[], object],
        failed: Callable[[VchanError, int], object],
        told: Callable[[StreamEvent], object],
    ) -> None:
        self._loop = loop
        self._target = str(target)
        self._failed = failed
        ends = StreamEnds(os.urandom, asks_max=None, offer_s=None)
        self._splices = Splices(loop, ends, self._wake, told)
        self._way = Way(loop, self._splices, uuid, target, sockets, look_s, attached, self._fail)

    def __len__(self) -> int:
        """How many sockets are joined."""
        return len(self._splices)

    def open(self, joined: socket.socket) -> bytes:
        """Open a stream for a socket that is connected, and ours from now on; returns its id.

        Raises:
            LimitExceeded: Too many are open. The socket is still the caller's.
        """
        return self._splices.open(joined, self._target, facts())

    def reset_all(self, text: str, then: Callable[[], object]) -> None:
        """Reset what there is, and have the guest hear of it; `then` is called when it has, or
        after END_S. What is reset is told as `Ended`."""
        self._splices.ends.reset_all(CLOSED, text)
        self._splices.settle()
        self.when_told(then)

    def when_told(self, then: Callable[[], object]) -> None:
        """Call back when the daemon has heard all that was said; at the latest after END_S."""
        self._loop.call_later(END_S, then)
        self._loop.call_soon(lambda: self._way.when_told(then))

    def run(self, numbers: Iterable[int], heard: Callable[[int], object]) -> None:
        """Look for the VM, run the loop until somebody stops it, and `close`.

        Args:
            numbers: Of signals.
            heard: Told each of these that comes, in the loop.
        """

        def told(number: int, _: object) -> None:
            self._loop.call_soon_threadsafe(partial(heard, number))

        for number in numbers:
            signal.signal(number, told)
        self._way.connect()
        try:
            self._loop.run()
        finally:
            self.close()

    def close(self) -> None:
        """Close it for good: every socket, and the connection."""
        self._splices.close()
        self._way.close()

    def _wake(self) -> None:
        self._way.wake()

    def _fail(self, problem: VchanError) -> None:
        count = len(self._splices)
        self._failed(problem, count)
        self._splices.ends.reset_all(FORGOTTEN, str(problem))
        self._splices.settle()
