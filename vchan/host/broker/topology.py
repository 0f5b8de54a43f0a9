"""Exchanges and queues of others: asked for before anything is bound or sent to them.

Each is asked for on a channel of its own, because the broker answers "no" by closing the channel.
What exists is used as others declared it. An exchange that a VM's queues need and that does not
exist is declared as oslo.messaging would with our configuration. For what a guest wants to send,
nothing is made: where there is no exchange or no queue, nobody listens. What is known is remembered
until the connection is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from vchan.host.broker.amqp import AmqpChannel, BrokerLink, Inbound, ResourceError, spec
from vchan.host.broker.config import BrokerConfig
from vchan.io.loop import Loop

LOG = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_TIMEOUT_S = 60.0
"""For the broker to answer on a channel. A quorum queue may have to elect a leader first."""
KNOWN_MAX: Final = 1024
"""Exchanges known to exist, and likewise queues. It only saves asking: over this it starts anew."""
ATTEMPTS_MAX: Final = 4
"""At asking for one thing, which others may make and delete meanwhile."""
LOOK_S: Final = 2.0
"""A queue that guests send to is looked at this often, while they do."""
MISSING: Final = "there is no such exchange"

NOT_FOUND: Final = 404
PRECONDITION_FAILED: Final = 406


class BrokerForTopology(Protocol):
    """What this file asks of the `Broker` it belongs to."""

    config: BrokerConfig
    loop: Loop

    @property
    def link(self) -> BrokerLink | None:
        """While there is a connection."""

    def within(self, vm: str, work: Callable[[], T], otherwise: T) -> T:
        """Do something for one VM alone."""


class User(Protocol):
    """Who waits for an exchange or a queue."""

    vm: str

    def on_declared(self, problem: str) -> None:
        """It is there, or cannot be. MISSING: it is not, and was not to be made."""

    def on_mismatch(self) -> None:
        """An exchange is there, and declared otherwise than we would."""


class QueueFacts(NamedTuple):
    """A queue, as it was at `at_s`. None: nobody tells us."""

    messages: int
    consumers: int | None
    is_there: bool = True
    at_s: float = 0.0


_ABSENT: Final = QueueFacts(0, 0, is_there=False)
_UNKNOWN: Final = QueueFacts(0, None)


class Declared:
    """What is known to be there, and what is being asked for. Needs a connection."""

    def __init__(self, broker: BrokerForTopology) -> None:
        self._broker = broker
        self._exchanges: dict[str, _Exchange] = {}
        self._queues: dict[str, _Queue] = {}
        self._mismatches: dict[str, str] = {}
        self.otherwise: dict[str, str] = {}
        """VMs' queues that the broker would not declare our way, with its words."""
        self.refused: dict[str, str] = {}
        """Likewise those that are not used for that."""

    def has_exchange(self, name: str, user: User, *, fanout: bool, make: bool = True) -> bool:
        """Whether the exchange is there; if not yet, the user is told when it is.

        Args:
            make: Declare it if there is none.
        """
        known = self._exchanges.get(name)
        if known is None:
            _make_room(self._exchanges)
            known = _Exchange(self, self._broker, name, fanout=fanout, make=make)
            self._exchanges[name] = known
        return known.is_there_for(user, make=make)

    def look_at(self, name: str, user: User) -> QueueFacts | None:
        """How a queue is; None: not known yet, the user is told when it is."""
        known = self._queues.get(name)
        if known is None:
            _make_room(self._queues)
            known = self._queues[name] = _Queue(self, self._broker, name)
        return known.facts_for(user)

    def mismatches(self, exchanges: Iterable[str]) -> list[str]:
        """What is said of those of these exchanges that are declared otherwise than we would."""
        return [self._mismatches[name] for name in sorted(exchanges) if name in self._mismatches]

    def note_otherwise(self, queue: str, words: str) -> None:
        """A VM's queue that the broker would not declare our way."""
        _make_room(self.otherwise)
        self.otherwise[queue] = words

    def refuse(self, queue: str, words: str) -> None:
        """A queue that somebody declared so that it is of no use to a VM."""
        _make_room(self.refused)
        self.refused[queue] = words

    def note_mismatch(self, exchange: str, text: str) -> None:
        """An exchange that is declared otherwise than we would."""
        _make_room(self._mismatches)
        self._mismatches[exchange] = text

    def forget_exchange(self, name: str) -> None:
        """Ask for it again when it is needed."""
        self._exchanges.pop(name, None)
        self._mismatches.pop(name, None)

    def forget_queue(self, name: str) -> None:
        """Look at it again when it is needed."""
        self._queues.pop(name, None)

    def clear(self) -> None:
        """The connection is lost: those who wait learn of that elsewhere."""
        self._exchanges.clear()
        self._queues.clear()
        self._mismatches.clear()
        self.otherwise.clear()
        self.refused.clear()

    def watch(self, link: BrokerLink, now_s: float) -> None:
        """Give up a connection that does not even say no."""
        things: list[_Thing] = [*self._exchanges.values(), *self._queues.values()]
        if any(thing.is_late(now_s) for thing in things):
            link.fail(f"the broker did not answer for {ANSWER_TIMEOUT_S} s")


class _Thing:
    """An exchange or a queue, being asked for or known to be there."""

    def __init__(self, known: Declared, broker: BrokerForTopology, name: str) -> None:
        self._known = known
        self._broker = broker
        self._name = name
        self._passive = True
        self._attempts = 0
        self._code = 0
        self._text = ""
        self._asked_at_s = 0.0
        self._is_asking = False
        self._waiting: dict[User, None] = {}  # in order
        self.is_there = False
        self._ask()

    def is_late(self, now_s: float) -> bool:
        """Whether the broker takes too long to answer."""
        return self._is_asking and now_s - self._asked_at_s >= ANSWER_TIMEOUT_S

    def on_failure(self, fault: str) -> None:
        """Who waits is told."""
        self._done(fault)

    def _ask(self) -> None:
        """Open, declare, close, all in one go."""
        link = self._broker.link
        assert link is not None
        self._attempts += 1
        self._is_asking = True
        self._code = 0
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
            inbound.channel.send_method(spec.Channel.CloseOk)
        elif inbound.method == spec.Channel.CloseOk:
            inbound.channel.collect()
            self._conclude()
        elif inbound.method == spec.Queue.DeclareOk:
            now_s = self._broker.loop.time()
            self._on_facts(QueueFacts(inbound.args[1], inbound.args[2], at_s=now_s))

    def _on_facts(self, facts: QueueFacts) -> None:
        """Of a queue that is there."""

    def _again(self, *, passive: bool) -> None:
        self._passive = passive
        if self._attempts < ATTEMPTS_MAX:
            self._ask()
        else:
            self._done(f"{self._code} {self._text}")

    def _done(self, problem: str) -> None:
        waiting, self._waiting = self._waiting, {}
        self._is_asking = False
        self.is_there = not problem
        if problem:
            if problem != MISSING:  # a guest may name them at will
                whose = next((user.vm for user in waiting), "nobody waits any more")
                LOG.warning("%s: %s: %s", whose, self, problem)  # in that VM's share of the log
            self._forget()
        for user in waiting:
            self._broker.within(user.vm, partial(user.on_declared, problem), None)

    def _declare(self, channel: AmqpChannel) -> None:
        raise NotImplementedError

    def _conclude(self) -> None:
        raise NotImplementedError

    def _forget(self) -> None:
        raise NotImplementedError


class _Exchange(_Thing):
    """As oslo.messaging's clients and servers declare it.

    One that others made is declared once more when a VM's queues need it: only so does the broker
    say what differs. Whether it does or not, the exchange is used.
    """

    def __init__(
        self, known: Declared, broker: BrokerForTopology, name: str, *, fanout: bool, make: bool
    ) -> None:
        config = broker.config
        self._type = "fanout" if fanout else "topic"
        self._durable = config.fanout_quorum if fanout else config.durable
        self._auto_delete = fanout or config.auto_delete
        self._make = make
        self._users: dict[User, None] = {}  # who is told of a mismatch
        self._is_compared = False
        super().__init__(known, broker, name)

    def __str__(self) -> str:
        return f"exchange {self._name}"

    def is_there_for(self, user: User, *, make: bool) -> bool:
        """If not yet, the user is told when it is."""
        if make:
            self._make = True
            self._users[user] = None
        if not self.is_there:
            self._waiting[user] = None
        elif make:
            self._compare()
        return self.is_there

    def _compare(self) -> None:
        if not self._is_compared:
            self._is_compared, self._passive = True, False
            self._ask()

    def _declare(self, channel: AmqpChannel) -> None:
        flags = (self._passive, self._durable, self._auto_delete, False, False)
        args: tuple[Any, ...] = (0, self._name, self._type, *flags, {})
        channel.ask(spec.Exchange.Declare, "BssbbbbbF", *args)

    def _conclude(self) -> None:
        if self._passive and self._code == NOT_FOUND:
            if self._make:
                self._again(passive=False)
            else:
                self._done(MISSING)
        elif self._passive and not self._code:
            self._done("")
            if self._make:
                self._compare()
        elif self.is_there or self._code in (0, PRECONDITION_FAILED):
            self._on_compared()
        else:
            self._done(f"{self._code} {self._text}")

    def _on_compared(self) -> None:
        """It is there, and we tried to make it."""
        self._is_compared = True
        if self._code == PRECONDITION_FAILED:
            ours = f"durable={self._durable}, auto_delete={self._auto_delete}"
            text = (
                f"exchange {self._name} was declared otherwise, and is used as it is: {self._text} "
                f"(vchan.conf: {ours}; give all services the same amqp_durable_queues, "
                "amqp_auto_delete and rabbit quorum options)"
            )
            LOG.warning("%s", text)
            self._known.note_mismatch(self._name, text)
        self._done("")
        users, self._users = self._users, {}
        if self._code == PRECONDITION_FAILED:
            for user in users:
                self._broker.within(user.vm, user.on_mismatch, None)

    def _forget(self) -> None:
        self._known.forget_exchange(self._name)


class _Queue(_Thing):
    """A queue that guests send to: whether it is there, and whether anybody listens."""

    def __init__(self, known: Declared, broker: BrokerForTopology, name: str) -> None:
        self._facts: QueueFacts | None = None
        super().__init__(known, broker, name)

    def __str__(self) -> str:
        return f"queue {self._name}"

    def facts_for(self, user: User) -> QueueFacts | None:
        """If there are none yet, the user is told when there are."""
        if self._facts is None:
            self._waiting[user] = None
        elif not self._is_asking and self._broker.loop.time() - self._asked_at_s >= LOOK_S:
            self._attempts = 0
            self._ask()
        return self._facts

    def _on_facts(self, facts: QueueFacts) -> None:
        self._facts = facts

    def _declare(self, channel: AmqpChannel) -> None:
        flags = (True, False, False, False, False)
        channel.ask(spec.Queue.Declare, "BsbbbbbF", 0, self._name, *flags, {})

    def _conclude(self) -> None:
        if self._code == NOT_FOUND:
            self._facts = _ABSENT
        elif self._code:
            self._facts = _UNKNOWN
        self._done("")

    def _forget(self) -> None:
        self._known.forget_queue(self._name)


_Value = TypeVar("_Value", "_Exchange", "_Queue", str)


def _make_room(known: dict[str, _Value]) -> None:
    """What is being asked for stays: somebody waits for it."""
    if len(known) >= KNOWN_MAX:
        for key in [key for key, each in known.items() if isinstance(each, str) or each.is_there]:
            del known[key]
