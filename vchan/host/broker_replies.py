"""Replies to callers: published on one channel, confirmed later and in lots."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from vchan.host.amqp_link import Channel, Inbound, Link, Message, Owner, ResourceError, spec
from vchan.host.broker_events import BrokerEvent, Published
from vchan.loop import Loop

LOG = logging.getLogger(__name__)

REOPEN_S: Final = 1.0
"""After the broker closed the channel."""


class Hub(Protocol):
    """What replies ask of the `Broker` they belong to."""

    loop: Loop
    link: Link | None
    post: Callable[[BrokerEvent], None]

    def reply_done(self, reply: Reply) -> None:
        """It is confirmed, or will never be."""


class Reply(NamedTuple):
    reply_q: str
    body: bytes
    key: bytes


class Publisher(Owner):
    """The channel for replies: published mandatory, confirmed later and in lots."""

    def __init__(self, broker: Hub) -> None:
        self._broker = broker
        self._channel: Channel | None = None
        self._unconfirmed: dict[int, Reply] = {}  # by the number the broker confirms, ascending
        self._returned: set[int] = set()
        self._next_number = 1
        self._blocked = ""

    def open(self) -> None:
        """Start a channel, if there is a connection."""
        link = self._broker.link
        if link is None or self._channel is not None:
            return
        problem = ""
        try:
            self._channel = link.channel(self)
        except ResourceError as error:
            problem = str(error)
        if self._channel is None:
            LOG.warning("no AMQP channel left for replies: %s", problem)
            self._broker.loop.call_later(REOPEN_S, self.open)
            return
        self._next_number = 1
        self._channel.ask(spec.Confirm.Select, "b", False)

    def on_blocked(self, reason: str) -> None:
        """The broker takes no messages for now (no memory, no disk), or "": takes them again."""
        LOG.warning("the broker: %s", reason or "takes messages again")
        self._blocked = reason

    def publish(self, reply: Reply) -> None:
        """Publish; Published follows."""
        if self._channel is None or self._blocked:
            self._done(reply, ok=False, reason=self._blocked or "not connected")
            return
        number, self._next_number = self._next_number, self._next_number + 1
        self._unconfirmed[number] = reply
        message = Message(
            reply.body,
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=2,
            priority=0,
            application_headers={},
            message_id=str(number),  # comes back with a return
        )
        args = (0, "", reply.reply_q, True, False)
        self._channel.ask(spec.Basic.Publish, "Bssbb", *args, content=message)

    def on_method(self, inbound: Inbound) -> None:
        """Confirms, returns, errors."""
        if inbound.channel is not self._channel:
            return
        method, args = inbound.method, inbound.args
        if method in (spec.Basic.Ack, spec.Basic.Nack):
            self._confirmed(args[0], multiple=args[1], ok=method == spec.Basic.Ack)
        elif method == spec.Basic.Return:
            self._returned.add(int(inbound.content.properties["message_id"]))
        elif method == spec.Channel.Close:
            inbound.channel.closed_by_broker()
            LOG.error("the broker closed the channel for replies: %s %s", args[0], args[1])
            self.on_disconnected(f"{args[0]} {args[1]}")
            self._broker.loop.call_later(REOPEN_S, self.open)

    def on_disconnected(self, reason: str) -> None:
        """The channel is gone: nobody knows what became of the rest."""
        self._channel, self._blocked = None, ""
        self._returned.clear()
        lost, self._unconfirmed = self._unconfirmed, {}
        for reply in lost.values():
            self._done(reply, ok=False, reason=reason)

    def _confirmed(self, number: int, *, multiple: bool, ok: bool) -> None:
        numbers = [number]
        if multiple:
            numbers = []
            for candidate in self._unconfirmed:
                if number and candidate > number:  # 0: all of them
                    break
                numbers.append(candidate)
        for confirmed in numbers:
            reply = self._unconfirmed.pop(confirmed, None)
            if reply is None:
                continue
            returned = confirmed in self._returned
            self._returned.discard(confirmed)
            reason = "returned" if returned else "confirmed" if ok else "refused by the broker"
            self._done(reply, ok=ok and not returned, reason=reason, gone=returned)

    def _done(self, reply: Reply, *, ok: bool, reason: str, gone: bool = False) -> None:
        self._broker.reply_done(reply)
        self._broker.post(Published(reply.key, ok, reason, gone))
