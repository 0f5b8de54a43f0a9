"""Exchanges, and the queues of notifications: made sure of before anything is sent to them.

Each is asked for on a channel of its own, because a "no" closes the channel. What exists is taken
as others declared it; what does not is declared as oslo.messaging would with our configuration.
What is known to be there is remembered until the connection is lost.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from vchan.host.amqp_link import Channel, Inbound, Link, Owner, ResourceError, spec
from vchan.host.broker_config import BrokerConfig
from vchan.loop import Loop

LOG = logging.getLogger(__name__)

ANSWER_TIMEOUT_S: Final = 60.0
"""For the broker to answer on a channel. A quorum queue may have to elect a leader first."""
KNOWN_MAX: Final = 1024
"""Exchanges known to exist, and likewise queues. It only saves asking: over this it starts anew."""
ATTEMPTS_MAX: Final = 4
"""At asking for one thing, which others may make and delete meanwhile."""

NOT_FOUND: Final = 404
PRECONDITION_FAILED: Final = 406


class Hub(Protocol):
    """What this file asks of the `Broker` it belongs to."""

    config: BrokerConfig
    loop: Loop
    link: Link | None


class User(Protocol):
    """Who waits for an exchange or a queue."""

    def on_declared(self, problem: str) -> None:
        """It is there, or cannot be."""


class Declared:
    """What is known to be there, and what is being asked for. Needs a connection."""

    def __init__(self, broker: Hub) -> None:
        self._broker = broker
        self._exchanges: dict[str, _Exchange] = {}
        self._queues: dict[tuple[str, str], _Queue] = {}

    def has_exchange(self, name: str, user: User, *, fanout: bool) -> bool:
        """Whether the exchange is there; if not yet, the user is told when it is."""
        known = self._exchanges.get(name)
        if known is None:
            _make_room(self._exchanges)
            known = self._exchanges[name] = _Exchange(self, self._broker, name, fanout=fanout)
        return known.is_there_for(user)

    def has_queue(self, exchange: str, name: str, user: User) -> bool:
        """Likewise for a queue of notifications, bound to an exchange that is there."""
        key = (exchange, name)
        known = self._queues.get(key)
        if known is None:
            _make_room(self._queues)
            known = self._queues[key] = _Queue(self, self._broker, name, exchange)
        return known.is_there_for(user)

    def forget_exchange(self, name: str) -> None:
        """Ask for it again when it is needed."""
        self._exchanges.pop(name, None)
        for key in [key for key in self._queues if key[0] == name]:
            del self._queues[key]

    def forget_queue(self, exchange: str, name: str) -> None:
        """Ask for it again when it is needed."""
        self._queues.pop((exchange, name), None)

    def clear(self) -> None:
        """The connection is lost: those who wait learn of that elsewhere."""
        self._exchanges.clear()
        self._queues.clear()

    def watch(self, link: Link, now_s: float) -> None:
        """Give up a connection that does not even say no."""
        things: list[_Thing] = [*self._exchanges.values(), *self._queues.values()]
        if any(thing.is_late(now_s) for thing in things):
            link.fail(f"the broker did not answer for {ANSWER_TIMEOUT_S} s")


class _Thing(Owner):
    """An exchange or a queue, being asked for or known to be there."""

    def __init__(self, known: Declared, broker: Hub, name: str) -> None:
        self._known = known
        self._broker = broker
        self._name = name
        self._passive = True
        self._attempts = 0
        self._code = 0
        self._text = ""
        self._failed = (0, 0)
        self._asked_at_s = 0.0
        self._waiting: set[User] = set()
        self._is_there = False
        self._ask()

    def is_there_for(self, user: User) -> bool:
        """If not yet, the user is told when it is."""
        if not self._is_there:
            self._waiting.add(user)
        return self._is_there

    def is_late(self, now_s: float) -> bool:
        """Whether the broker takes too long to answer."""
        return not self._is_there and now_s - self._asked_at_s >= ANSWER_TIMEOUT_S

    def _ask(self) -> None:
        """Open, declare, close, all in one go."""
        link = self._broker.link
        assert link is not None
        self._attempts += 1
        self._code, self._failed = 0, (0, 0)
        self._asked_at_s = self._broker.loop.time()
        try:
            channel = link.channel(self)
        except ResourceError as error:
            # Not now: the asker has not joined those who wait.
            self._broker.loop.call_soon(partial(self._done, str(error)))
            return
        self._declare(channel)
        channel.close_softly()

    def on_method(self, inbound: Inbound) -> None:
        """The answer is complete when our close is answered; an error comes before that."""
        if inbound.method == spec.Channel.Close:
            self._code, self._text = inbound.args[:2]
            self._failed = (inbound.args[2], inbound.args[3])
            inbound.channel.send_method(spec.Channel.CloseOk)
        elif inbound.method == spec.Channel.CloseOk:
            inbound.channel.collect()
            self._conclude()

    def _again(self, *, passive: bool) -> None:
        self._passive = passive
        if self._attempts < ATTEMPTS_MAX:
            self._ask()
        else:
            self._done(f"{self._code} {self._text}")

    def _done(self, problem: str) -> None:
        waiting, self._waiting = self._waiting, set()
        self._is_there = not problem
        if problem:
            LOG.warning("%s: %s", self, problem)
            self._forget()
        for user in waiting:
            user.on_declared(problem)

    def _declare(self, channel: Channel) -> None:
        raise NotImplementedError

    def _conclude(self) -> None:
        raise NotImplementedError

    def _forget(self) -> None:
        raise NotImplementedError


class _Exchange(_Thing):
    """As oslo.messaging's clients and servers declare it."""

    def __init__(self, known: Declared, broker: Hub, name: str, *, fanout: bool) -> None:
        config = broker.config
        self._type = "fanout" if fanout else "topic"
        self._durable = config.fanout_quorum if fanout else config.durable
        self._auto_delete = fanout or config.auto_delete
        super().__init__(known, broker, name)

    def __str__(self) -> str:
        return f"exchange {self._name}"

    def _declare(self, channel: Channel) -> None:
        flags = (self._passive, self._durable, self._auto_delete, False, False)
        args: tuple[Any, ...] = (0, self._name, self._type, *flags, {})
        channel.ask(spec.Exchange.Declare, "BssbbbbbF", *args)

    def _conclude(self) -> None:
        if self._passive and self._code == NOT_FOUND:
            self._again(passive=False)
        elif self._code in (0, PRECONDITION_FAILED):  # it is there, perhaps since a moment ago
            self._done("")
        else:
            self._done(f"{self._code} {self._text}")

    def _forget(self) -> None:
        self._known.forget_exchange(self._name)


class _Queue(_Thing):
    """A queue of notifications: oslo.messaging's senders make it, so that nothing is missed before
    there is a listener."""

    def __init__(self, known: Declared, broker: Hub, name: str, exchange: str) -> None:
        self._exchange = exchange
        super().__init__(known, broker, name)

    def __str__(self) -> str:
        return f"queue {self._name}"

    def _declare(self, channel: Channel) -> None:
        config = self._broker.config
        arguments: dict[str, Any] = {}
        if config.quorum:
            arguments = {"x-queue-type": "quorum", **config.quorum_arguments}
        flags = (self._passive, config.durable, False, config.auto_delete, False)
        channel.ask(spec.Queue.Declare, "BsbbbbbF", 0, self._name, *flags, arguments)
        names = (self._name, self._exchange, self._name)
        channel.ask(spec.Queue.Bind, "BsssbF", 0, *names, False, {})

    def _conclude(self) -> None:
        missing, differs = self._code == NOT_FOUND, self._code == PRECONDITION_FAILED
        is_declaration = self._failed == spec.Queue.Declare
        if not self._code:
            self._done("")
        elif is_declaration and ((missing and self._passive) or (differs and not self._passive)):
            self._again(passive=not self._passive)
        else:
            if missing and self._failed == spec.Queue.Bind:
                self._known.forget_exchange(self._exchange)
            self._done(f"{self._code} {self._text}")

    def _forget(self) -> None:
        self._known.forget_queue(self._exchange, self._name)


_Key = TypeVar("_Key", str, tuple[str, str])


def _make_room(known: dict[_Key, Any]) -> None:
    if len(known) >= KNOWN_MAX:
        for key in [key for key, thing in known.items() if thing._is_there]:
            del known[key]
