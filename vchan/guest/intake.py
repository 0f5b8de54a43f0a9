"""What comes for the router: its messages, with the time beside each, and what is due after them.

It runs for every message, so it is compiled, which what starts as a program cannot be.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from vchan.guest.router import Router
from vchan.io.loop import Alarm, Scheduler
from vchan.wire import layout

if TYPE_CHECKING:
    from vchan.guest.arrivals import Arrivals
    from vchan.guest.forwards import Forwards

TICK_S: Final = 0.1
"""How late a request's time may run out here. To ask the router for its next timeout after every
message would cost a tenth of all its work."""
_STREAMS_FIRST: Final = layout.BYTE_STREAM_OFFER
_STREAMS_LAST: Final = layout.BYTE_STREAM_RESET
"""See `streams.messages.is_of_family`, which is not loaded for it."""


class Intake:
    """Where the port and the agents' socket leave messages.

    Args:
        alarm: Rings when the router may have something to do.
        drop: Closes an agent's connection, for the reason it is given.
        arrivals: Told what comes, if steps are logged.
        make_forwards: Makes `forwards`, at the first message that is of byte streams.

    Attributes:
        forwards: The byte streams, if there have been any.
        host_takes_streams: So it has said in its greeting.
    """

    def __init__(
        self,
        loop: Scheduler,
        router: Router,
        alarm: Alarm,
        drop: Callable[[int, str], object],
        arrivals: "Arrivals | None",
        make_forwards: Callable[[], "Forwards"],
    ) -> None:
        self._loop = loop
        self._router = router
        self._alarm = alarm
        self._drop = drop
        self._arrivals = arrivals
        self._make_forwards = make_forwards
        self.forwards: Forwards | None = None
        self.host_takes_streams = False

    def from_host(self, data: bytes) -> None:
        """A message of the host's."""
        if self._arrivals is not None:
            self._arrivals.host_said(data)
        if self.host_takes_streams and _STREAMS_FIRST <= data[0] <= _STREAMS_LAST:
            if self.forwards is None:
                self.forwards = self._make_forwards()
            self.forwards.receive(data)
            return
        if self.forwards is not None:
            self.forwards.give_way()
        now_s = self._loop.time()
        self._router.host_receive(data, now_s)
        self._look_by(now_s)

    def from_agent(self, key: int, data: bytes) -> None:
        """A message of an agent's."""
        if self._arrivals is not None:
            self._arrivals.agent_said(data)
        if self.forwards is not None:
            self.forwards.give_way()
        now_s = self._loop.time()
        problem = self._router.agent_receive(key, data, now_s)
        if problem:
            self._drop(key, problem)
        self._look_by(now_s)

    def look_soon(self) -> None:
        """The router may have a new timeout."""
        self._look_by(self._loop.time())

    def _look_by(self, now_s: float) -> None:
        self._alarm.set(now_s + TICK_S)
