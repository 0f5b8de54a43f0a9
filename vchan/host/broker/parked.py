"""Messages that break this daemon: put aside in a queue for people, not handed out for ever.

A message that is no request is dropped, with a line in the log. This file is for messages at which
our own code raises what it should not: the broker would hand them out again, and the code would
raise again. Such a message goes into `PARKED` as it came; its headers say where it was and what it
did. The original is acknowledged only when the broker has confirmed the copy.

    park --publish, mandatory--> broker --Ack----> done("")
                                   |  --Return--> declare the queue, publish again
                                   |  --Close---> done(the broker's words)
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from vchan.host.broker.amqp import (
    AmqpChannel,
    BrokerLink,
    Inbound,
    Message,
    ResourceError,
    spec,
)
from vchan.io.loop import Loop

LOG = logging.getLogger(__name__)

PARKED: Final = "vchan_parked"
"""The queue's name; one for all hosts."""
PARKED_MAX: Final = 1000
"""Messages kept in it. At it: the oldest goes; it is in the log as well."""
PARKED_BYTES_MAX: Final = 64 * 1024 * 1024
"""Bytes kept in it. At it: the oldest message goes."""
PARKED_S: Final = 7 * 24 * 3600
"""How long one is kept: somebody has looked at the log by then, or never will."""
WAITING_BYTES_MAX: Final = 64 * 1024 * 1024
"""Bodies on their way there. What would be more is dropped, and logged."""
CONFIRM_TIMEOUT_S: Final = 60.0
"""For the broker to confirm one."""
_ARGUMENTS: Final[dict[str, Any]] = {
    "x-max-length": PARKED_MAX,
    "x-max-length-bytes": PARKED_BYTES_MAX,
    "x-message-ttl": PARKED_S * 1000,
}


class BrokerForParked(Protocol):
    """What this file asks of the `Broker` it belongs to."""

    loop: Loop

    @property
    def link(self) -> BrokerLink | None:
        """While there is a connection."""


class Parking(NamedTuple):
    """A message to be put aside.

    Args:
        queue: Where it was.
        reason: What it did.
        done: Told once, unless the connection is lost before: "" or why it could not be done.
    """

    vm: str
    queue: str
    body: bytes
    reason: str
    done: Callable[[str], None]


class ParkingLot:
    """Puts messages aside, one after the other. Its channel is open while there are some."""

    def __init__(self, broker: BrokerForParked) -> None:
        self._broker = broker
        self._waiting: deque[Parking] = deque()  # the first one is under way
        self._bytes = 0
        self._channel: AmqpChannel | None = None
        self._is_declared = False  # asked for, because the first one came back
        self._is_returned = False
        self._since_s = 0.0

    def __str__(self) -> str:
        return f"queue {PARKED}"

    def park(self, parking: Parking) -> None:
        """Put it aside; `done` follows."""
        if self._broker.link is None:
            return  # the message is the broker's again already
        if self._bytes + len(parking.body) > WAITING_BYTES_MAX:
            parking.done(f"too much waits for it (WAITING_BYTES_MAX: {WAITING_BYTES_MAX})")
            return
        self._waiting.append(parking)
        self._bytes += len(parking.body)
        if len(self._waiting) == 1:
            self._next()

    def on_method(self, inbound: Inbound) -> None:
        """Confirms, returns, errors."""
        method, args = inbound.method, inbound.args
        if method == spec.Channel.CloseOk:
            inbound.channel.collect()
        elif method == spec.Channel.Close:
            inbound.channel.closed_by_broker()
            if inbound.channel is self._channel:
                self._channel = None
                self._end(f"{args[0]} {args[1]}")
        elif inbound.channel is not self._channel:
            pass  # given up
        elif method == spec.Basic.Return:
            self._is_returned = True  # its confirm comes behind it
        elif method == spec.Basic.Nack:
            self._end("the broker refused it")
        elif method == spec.Basic.Ack:
            self._on_confirmed()

    def on_failure(self, fault: str) -> None:
        """What is under way cannot be done."""
        self._close()
        self._end(fault)

    def watch(self, now_s: float) -> None:
        """Give up what is not confirmed."""
        if self._waiting and now_s - self._since_s >= CONFIRM_TIMEOUT_S:
            self._close()
            self._end(f"the broker did not confirm for {CONFIRM_TIMEOUT_S} s")

    def on_disconnected(self) -> None:
        """The connection is gone; what was to be put aside is handed out again."""
        self._channel = None
        self._waiting.clear()
        self._bytes = 0

    def _on_confirmed(self) -> None:
        was_returned, self._is_returned = self._is_returned, False
        if not was_returned:
            self._end("")
        elif self._is_declared:
            self._end("the queue cannot be made")
        else:
            self._is_declared = True
            assert self._channel is not None
            flags = (False, True, False, False, False)
            self._channel.ask(spec.Queue.Declare, "BsbbbbbF", 0, PARKED, *flags, _ARGUMENTS)
            self._publish()

    def _next(self) -> None:
        self._is_declared = self._is_returned = False
        if not self._waiting:
            self._close()
            return
        if self._channel is None and not self._open():
            return
        self._publish()

    def _open(self) -> bool:
        assert self._broker.link is not None
        try:
            self._channel = self._broker.link.channel(self)
        except ResourceError as error:
            problem = str(error)
        else:
            self._channel.ask(spec.Confirm.Select, "b", False)
            return True
        # Not now: whoever parks something has not done with it.
        self._broker.loop.call_soon(lambda: self._end(problem))
        return False

    def _publish(self) -> None:
        assert self._channel is not None
        parking = self._waiting[0]
        self._since_s = self._broker.loop.time()
        message = Message(
            parking.body,
            delivery_mode=2,
            application_headers={
                "vchan-vm": parking.vm,
                "vchan-queue": parking.queue,
                "vchan-reason": parking.reason,
            },
        )
        self._channel.ask(spec.Basic.Publish, "Bssbb", 0, "", PARKED, True, False, content=message)

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.close_softly()
            self._channel = None

    def _end(self, problem: str) -> None:
        if not self._waiting:
            return  # the connection was lost meanwhile
        parking = self._waiting.popleft()
        self._bytes -= len(parking.body)
        parking.done(problem)
        if self._broker.link is not None:
            self._next()
