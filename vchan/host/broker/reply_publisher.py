"""Replies to callers: published on one channel, confirmed later and in lots."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

from vchan.host.broker.amqp import BrokerLink, Inbound, ResourceError, spec
from vchan.host.broker.confirms import Confirms
from vchan.io.loop import Loop

LOG = logging.getLogger(__name__)

REOPEN_S = 1.0
"""After the broker closed the channel."""
REPLIES_MAX = 4096
"""Replies published and not yet confirmed. At it: a further reply is published after a second."""
REPLIES_BYTES_MAX = 64 * 1024 * 1024
"""Bodies of replies published and not yet confirmed. At it: a further reply is published after a
second."""

OnPublished = Callable[[str, bool], None]
"""(why the broker may not have it, or ""; whether that is because the caller's queue is gone)"""


class BrokerForReplies(Protocol):
    """What replies ask of the `Broker` they belong to."""

    loop: Loop

    @property
    def link(self) -> BrokerLink | None:
        """While there is a connection."""


class _Reply(NamedTuple):
    size: int
    told: OnPublished


class ReplyPublisher:
    """The channel for replies: published mandatory, confirmed later and in lots."""

    def __init__(self, broker: BrokerForReplies) -> None:
        self._broker = broker
        self._confirms: Confirms[_Reply] | None = None  # None: no channel
        self._bytes = 0
        self._blocked = ""

    def __str__(self) -> str:
        return "replies"

    def open(self) -> None:
        """Start a channel, if there is a connection."""
        link = self._broker.link
        if link is None or self._confirms is not None:
            return
        problem = ""
        try:
            self._confirms = Confirms(link.channel(self))
        except ResourceError as error:
            problem = str(error)
        if problem:
            LOG.warning("no AMQP channel left for replies: %s", problem)
            self._broker.loop.call_later(REOPEN_S, self.open)

    def on_blocked(self, reason: str) -> None:
        """The broker takes no messages for now (no memory, no disk), or "": takes them again."""
        LOG.warning("the broker: %s", reason or "takes messages again")
        self._blocked = reason

    def publish(self, reply_q: str, body: bytes, told: OnPublished) -> None:
        """Publish to a caller's queue; `told` is called once, perhaps at once."""
        confirms = self._confirms
        if confirms is None or self._blocked:
            told(self._blocked or "not connected", False)
        elif len(confirms.waiting) >= REPLIES_MAX or self._bytes + len(body) > REPLIES_BYTES_MAX:
            told("limit: so many replies wait to be confirmed (REPLIES_MAX)", False)
        else:
            self._bytes += len(body)
            reply = _Reply(len(body), told)
            confirms.publish(reply, ("", reply_q), body, mandatory=True, numbered=True)

    def on_method(self, inbound: Inbound) -> None:
        """Confirms, returns, errors."""
        confirms = self._confirms
        if confirms is None or inbound.channel is not confirms.channel:
            return
        method, args = inbound.method, inbound.args
        if method in (spec.Basic.Ack, spec.Basic.Nack):
            problem = "" if method == spec.Basic.Ack else "refused by the broker"
            for reply, is_returned in confirms.confirm(args[0], multiple=args[1]):
                self._done(reply, "returned" if is_returned else problem, gone=is_returned)
        elif method == spec.Basic.Return:
            assert inbound.content is not None
            confirms.on_return(int(inbound.content.properties.message_id or 0))
        elif method == spec.Channel.Close:
            inbound.channel.closed_by_broker()
            LOG.error("the broker closed the channel for replies: %s %s", args[0], args[1])
            self.on_disconnected(f"{args[0]} {args[1]}")
            self._broker.loop.call_later(REOPEN_S, self.open)

    def on_failure(self, fault: str) -> None:
        """It serves all VMs."""
        raise RuntimeError(fault)

    def on_disconnected(self, reason: str) -> None:
        """The channel is gone: nobody knows what became of the rest."""
        confirms, self._confirms = self._confirms, None
        self._blocked = ""
        for reply in confirms.lose() if confirms is not None else ():
            self._done(reply, reason)

    def _done(self, reply: _Reply, problem: str, *, gone: bool = False) -> None:
        self._bytes -= reply.size
        assert self._bytes >= 0
        reply.told(problem, gone)
