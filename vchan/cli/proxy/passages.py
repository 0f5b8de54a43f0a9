"""The ways to what clients ask for: one for each target in a VM, which they share.

Rules of this file
1. A tunnel is a byte stream: its memory is here, and it goes on as those of `vchan forward` do.
2. A client hears that it is connected when what it asked for is, in the guest; or why it is not.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, Protocol

from vchan.cli.proxy.users import Meant
from vchan.cli.way import Way, facts
from vchan.errors import CallTimeout, LimitExceeded, LinkError, RemoteError, VchanError
from vchan.io.loop import Loop, Timer
from vchan.splices import Splices
from vchan.streams import Accepted, Ended, Fault, StreamEnds, StreamEvent
from vchan.streams.messages import BUSY, CLOSED, FORGOTTEN, REFUSED

PASSAGES_MAX: Final = 256
"""Targets that are in use, or were within IDLE_S. At it: who asks for another is answered 503."""
IDLE_S: Final = 30.0
"""A way that nobody uses is kept so long: who connects for each request finds it there."""

_STATUSES: Final = {"NoSuchDomain": 404, "Rejected": 403, "LimitExceeded": 503}
"""By what the daemon has raised."""
_RESETS: Final = {REFUSED: 403, BUSY: 503}
"""By why the guest has reset the stream."""


class NotConnected(NamedTuple):
    """Why a client is not connected, as it is told."""

    status: int
    detail: str


class Applicant(Protocol):
    """A client that waits to be connected."""

    def connected(self) -> tuple[socket.socket, bytes]:
        """It is: returns its socket, which is its passage's from now on, and what it has said
        behind its request."""

    def refused(self, refusal: NotConnected) -> None:
        """It is not, and will not be."""

    def ended(self, problem: str) -> None:
        """Its tunnel is over: it was reset for this reason, or "": both sides were done."""


class Passage:
    """The way to one target.

    Args:
        sockets: Of daemons, asked in turn.
        over: Called when nobody has used it for IDLE_S, or there is no way any more.
        say: Told what an operator may want to know.
    """

    def __init__(
        self,
        loop: Loop,
        meant: Meant,
        sockets: list[str],
        look_s: float,
        over: Callable[[], object],
        say: Callable[[str], object],
    ) -> None:
        self._loop = loop
        self._meant = meant
        self._over = over
        self._say = say
        self._problem: VchanError | None = None
        self._waiting: dict[bytes, Applicant] = {}
        self._joined: dict[bytes, Applicant] = {}
        self._idle: Timer | None = None
        ends = StreamEnds(os.urandom, asks_max=None, offer_s=None)
        self._splices = Splices(loop, ends, self._wake, self._on_event)
        self._way = Way(
            *(loop, self._splices, meant.vm, meant.target, sockets, look_s),
            lambda: None,
            self._fail,
        )
        self._way.connect()

    def open(self, who: str, client: Applicant) -> bytes:
        """Ask for a connection; returns the stream's id.

        Args:
            who: Asks, as the host and the guest are told.

        Raises:
            LimitExceeded: Too many are open. Nothing has changed.
        """
        stream = self._splices.ends.open(str(self._meant.target), facts(who), self._loop.time())
        self._waiting[stream] = client
        self._cancel_idle()
        self._splices.settle()
        return stream

    def withdraw(self, stream: bytes) -> None:
        """A client that waits is gone, and hears nothing more."""
        if self._waiting.pop(stream, None) is not None:
            self._splices.ends.reset(stream, CLOSED, "the client went away")
            self._splices.settle()

    def end(self, text: str) -> None:
        """Reset everything."""
        self._splices.ends.reset_all(CLOSED, text)
        self._splices.settle()

    def when_told(self, callback: Callable[[], object]) -> None:
        """Call back when the daemon has heard all that was said: see `Way`."""
        self._loop.call_soon(lambda: self._way.when_told(callback))  # it is on its way by then

    def close(self) -> None:
        """Close it for good."""
        self._cancel_idle()
        self._splices.close()
        self._way.close()

    def _wake(self) -> None:
        self._way.wake()

    def _cancel_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _on_event(self, event: StreamEvent) -> None:
        match event:
            case Accepted(stream):
                self._accepted(stream)
            case Ended(stream, reason, text):
                self._ended(stream, reason, text)
            case Fault(reason):
                self._say(f"{self._meant.vm}: the guest broke the protocol: {reason}")
            case _:
                pass

    def _accepted(self, stream: bytes) -> None:
        client = self._waiting.pop(stream, None)
        if client is not None:
            self._joined[stream] = client
            self._splices.join(stream, *client.connected())

    def _ended(self, stream: bytes, reason: int, text: str) -> None:
        waiting, joined = self._waiting.pop(stream, None), self._joined.pop(stream, None)
        if not self._waiting and not self._joined and self._problem is None:
            self._cancel_idle()
            self._idle = self._loop.call_later(IDLE_S, self._over)
        if waiting is not None:
            waiting.refused(self._refusal(reason, text))
        if joined is not None:
            joined.ended((text or "closed") if reason else "")

    def _refusal(self, reason: int, text: str) -> NotConnected:
        match self._problem:
            case None:
                return NotConnected(_RESETS.get(reason, 502), text or "the guest has closed it")
            case RemoteError(class_name=name, text=said):
                return NotConnected(_STATUSES.get(name, 502), said)
            case CallTimeout() as problem:
                return NotConnected(504, str(problem))
            case LinkError() as problem:
                return NotConnected(503, f"vchan-host: {problem}")
            case problem:
                return NotConnected(502, str(problem))

    def _fail(self, problem: VchanError) -> None:
        self._problem = problem
        if self._joined:
            count = len(self._joined)
            text = f"{count} tunnels are reset: the VM was not found again: {problem}"
            self._say(f"{self._meant.vm} {self._meant.target}: {text}")
        self._splices.ends.reset_all(FORGOTTEN, str(problem))
        self._splices.settle()
        self._over()


class Passages:
    """All of them, by what is meant.

    Args:
        sockets, look_s: See `Way`.
        say: Told what an operator may want to know.
    """

    def __init__(
        self, loop: Loop, sockets: list[str], look_s: float, say: Callable[[str], object]
    ) -> None:
        self._loop = loop
        self._sockets = sockets
        self._look_s = look_s
        self._say = say
        self._passages: dict[Meant, Passage] = {}

    def to(self, meant: Meant) -> Passage:
        """The one to this target.

        Raises:
            LimitExceeded: There are too many.
        """
        found = self._passages.get(meant)
        if found is None:
            count = len(self._passages) + 1
            if count > PASSAGES_MAX:
                raise LimitExceeded("targets in use", count, PASSAGES_MAX, "PASSAGES_MAX")
            over = partial(self._over, meant)
            common = (self._loop, meant, self._sockets, self._look_s)
            found = self._passages[meant] = Passage(*common, over, self._say)
        return found

    def _over(self, meant: Meant) -> None:
        passage = self._passages.pop(meant, None)
        if passage is not None:
            self._loop.call_soon(passage.close)  # it is who calls

    def end(self, text: str, then: Callable[[], object]) -> None:
        """Reset everything; `then` is called when every daemon has heard of it."""
        open_now = list(self._passages.values())
        left = [len(open_now)]

        def told() -> None:
            left[0] -= 1
            if not left[0]:
                then()

        for passage in open_now:
            passage.end(text)
            passage.when_told(told)
        if not open_now:
            then()

    def close(self) -> None:
        """Close all for good."""
        for passage in self._passages.values():
            passage.close()
        self._passages.clear()
