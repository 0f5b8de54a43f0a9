"""Byte streams of programs on the host, connected to what runs in this guest. Loaded when a host
offers them.

The guest's owner says what they may be connected to (option `forward`); the host's policy has
allowed each before it came here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from vchan.io.loop import Loop, Timer
from vchan.io.targets import (
    SERVICE,
    AllowedTargets,
    Target,
    begin_to_connect,
    connect_problem,
    parse_target,
)
from vchan.session import AnySession, printable
from vchan.splices import Splices
from vchan.streams import Ended, Fault, StreamEnds, StreamEvent, StreamWanted
from vchan.streams.messages import REFUSED, UNREACHABLE

CONNECT_S: Final = 10.0
"""For what a stream is to be connected to, to take the connection. At it: the stream is reset
(UNREACHABLE)."""
NO_SERVICE: Final = (
    "; the standard agent does not run there, or its standard.toml allows none of this"
)
"""What it mostly is where a service's socket is not."""


class _Connecting:
    """A socket that is not connected yet."""

    __slots__ = ("made", "timer")

    def __init__(self, made: socket.socket, timer: Timer) -> None:
        self.made = made
        self.timer = timer


class Forwards:
    """The streams that the host asks for.

    Args:
        session: With the host.
        services: The directory of the services' sockets.
        wake: Has its link call `refill` soon.
        log: Told what the owner may want to know: who was connected to what, and who was not.
    """

    def __init__(
        self,
        loop: Loop,
        session: AnySession,
        allowed: AllowedTargets,
        services: str,
        wake: Callable[[], object],
        log: Callable[[str], object],
    ) -> None:
        self._loop = loop
        self._session = session
        self._allowed = allowed
        self._services = services
        self._log = log
        self._ends = StreamEnds(os.urandom)
        self._splices = Splices(loop, self._ends, wake, self._on_event)
        self._connecting: dict[bytes, _Connecting] = {}
        self._host_takes = False
        self._received: list[bytes] = []  # in this turn

    # ---------------------------------------------------------------- the host

    def host_opened(self, *, takes_streams: bool) -> None:
        """A new session with a host's daemon.

        Args:
            takes_streams: It says so in its greeting; otherwise it is sent no message of the
                family. Streams wait: the VM may move on to a host that does.
        """
        self._host_takes = takes_streams
        self._received.clear()  # of the session before: lost, as what was under way
        if takes_streams:
            self._splices.connected()

    def receive(self, message: bytes) -> None:
        """Take a message of the family: behind the requests that have come in the same turn."""
        self._received.append(message)
        if len(self._received) == 1:
            self._loop.call_soon(self._take_received)

    def _take_received(self) -> None:
        received, self._received = self._received, []
        for message in received:
            self._splices.receive(message)

    def give_way(self) -> None:
        """A request has come, or an agent says something: streams leave it the processor."""
        self._splices.give_way()

    def refill(self) -> bool:
        """Queue what there is to say on the session."""
        return self._host_takes and self._splices.refill(self._session)

    def close(self) -> None:
        """This daemon ends, and with it the memory of its streams: what they are connected to is
        reset, the other ends hear of it when they ask."""
        for stream in list(self._connecting):
            self._give_up(stream)
        self._splices.close()

    # ---------------------------------------------------------------- streams

    def _on_event(self, event: StreamEvent) -> None:
        match event:
            case StreamWanted(stream, target, facts):
                self._connect(stream, target, facts)
            case Ended(stream, reason, text):
                self._give_up(stream)
                if reason:
                    self._log(f"stream {stream.hex()[:8]} ended before its end: {_shown(text)}")
            case Fault(reason):
                self._log(f"the host broke the protocol of byte streams: {reason}")
            case _:
                pass

    def _connect(self, stream: bytes, text: str, facts: str) -> None:
        try:
            target = parse_target(text)
        except ValueError as error:
            self._ends.reset(stream, REFUSED, str(error))
            return
        if not self._allowed.allows(target):
            self._log(f"refused a stream to {target} (option forward); asked by {_shown(facts)}")
            problem = f"{target}: the owner of this guest does not allow it (option forward)"
            self._ends.reset(stream, REFUSED, problem)
            return
        self._log(f"stream {stream.hex()[:8]} to {target}; asked by {_shown(facts)}")
        try:
            made = begin_to_connect(target, self._services)
        except OSError as error:
            self._unreachable(stream, target, error.strerror or str(error))
            return
        late = partial(self._unreachable, stream, target, f"no answer in {CONNECT_S:g} s")
        timer = self._loop.call_later(CONNECT_S, late)
        self._connecting[stream] = _Connecting(made, timer)
        self._loop.add_writer(made.fileno(), partial(self._connected, stream, target))

    def _connected(self, stream: bytes, target: Target) -> None:
        problem = connect_problem(self._connecting[stream].made)
        if problem:
            self._unreachable(stream, target, problem)
            return
        made = self._end_connecting(stream)
        self._ends.accept(stream)
        self._splices.join(stream, made)
        self._splices.settle()

    def _unreachable(self, stream: bytes, target: Target, problem: str) -> None:
        self._give_up(stream)
        advice = NO_SERVICE if target.kind == SERVICE else ""
        self._ends.reset(stream, UNREACHABLE, f"{target} in the guest: {problem}{advice}")
        self._splices.settle()

    def _give_up(self, stream: bytes) -> None:
        """If it is not connected yet."""
        if stream in self._connecting:
            self._end_connecting(stream).close()

    def _end_connecting(self, stream: bytes) -> socket.socket:
        connecting = self._connecting.pop(stream)
        connecting.timer.cancel()
        self._loop.remove_writer(connecting.made.fileno())
        return connecting.made

    def summary(self) -> dict[str, Any]:
        """What the control side sees of it."""
        return {"connected": len(self._splices), **self._ends.counters.as_dict()}


def _shown(text: str) -> str:
    """The host's word, fit for a log line."""
    return printable(text[:200]) or "nobody"
