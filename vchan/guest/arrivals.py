"""What each arrival took in the guest, for the log of a daemon that runs with --debug.

Loaded for that alone, and wrapped around what the daemon hands on: one that does not tell its steps
has no work with them.
"""

from collections.abc import Callable
from typing import Final

from vchan.io.loop import Scheduler
from vchan.io.steps import Steps, WatchedStream
from vchan.io.streams import Stream
from vchan.rpc.in_flight import Send
from vchan.rpc.messages import is_outcome, is_request, is_subscribe
from vchan.session import Event, Opened
from vchan.wire.frames import FLUSH

GREETED: Final = "greeting heard"
WROTE: Final = "greeting answered"
OPENED: Final = "session open"
TOPICS: Final = "topics said"
REQUEST: Final = "first request"
HANDED_OUT: Final = "with an agent"
AGENT_ANSWERED: Final = "agent's answer"
ANSWERED: Final = "answered"
"""The steps, in order."""

_FLUSH: Final = FLUSH[:1024]
"""In what is read first when a host has opened its stream: its greeting is there, too, or near."""


class Arrivals:
    """Takes the steps.

    Args:
        log: Takes a line for each arrival.
    """

    def __init__(self, loop: Scheduler, log: Callable[[str], None]) -> None:
        self._steps = Steps(loop, "arrival", ANSWERED, log)

    def stream(self, stream: Stream) -> Stream:
        """The port."""

        def heard(data: bytes) -> None:
            if _FLUSH in data:
                self._steps.begin(GREETED)

        return WatchedStream(stream, heard, lambda: self._steps.reach(WROTE))

    def handler(self, handle: Callable[[Event], object]) -> Callable[[Event], None]:
        """What takes the session's events."""

        def handle_step(event: Event) -> None:
            match event:
                case Opened():
                    self._steps.begin(OPENED)  # a greeting of ours was answered
                    self._steps.reach(OPENED)
                case _:
                    pass
            handle(event)

        return handle_step

    def host_said(self, message: bytes) -> None:
        """A message of the host's."""
        if is_request(message):
            self._steps.reach(REQUEST)

    def to_host(self, send: Send) -> Send:
        """What sends the host messages."""

        def send_step(message: bytes, stream: int) -> None:
            send(message, stream)
            if is_subscribe(message):
                self._steps.reach(TOPICS)
            elif is_outcome(message):
                self._steps.reach(ANSWERED, after=REQUEST)

        return send_step

    def to_agent(self, send: Send) -> Send:
        """What sends an agent messages."""

        def send_step(message: bytes, stream: int) -> None:
            send(message, stream)
            if is_request(message):
                self._steps.reach(HANDED_OUT)

        return send_step

    def agent_said(self, message: bytes) -> None:
        """An agent's message."""
        if is_outcome(message):
            self._steps.reach(AGENT_ANSWERED, after=REQUEST)
