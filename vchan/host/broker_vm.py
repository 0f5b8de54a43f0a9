"""A VM at the broker: its queues, the exchanges they are bound to, the channel that consumes.

Rules of this file
1. Nothing waits: every request to the broker is a `_Step`, whose answer comes back later.
2. A queue of ours is never cancelled, only its channel closed. Queues have a single active
   consumer: another host may consume before we close, and gets nothing until we have.
3. A token is dead when its channel is. `Released` says so, once.

    consume --> IDLE -> WAITING -> OPENING -> OPEN --release, or topics gone--> CLOSING -> IDLE
                 ^                    |         |                                          |
                 +--- back-off -------+---------+---- channel error, connection lost ------+
"""

from __future__ import annotations

import enum
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from vchan.host.amqp_link import Channel, Inbound, Link, Owner, ResourceError, spec
from vchan.host.broker_config import BrokerConfig
from vchan.host.broker_events import (
    BrokerEvent,
    Consuming,
    Delivered,
    Released,
    Settled,
    Token,
    Undecodable,
)
from vchan.host.envelope import BrokerRequest, EnvelopeError, decode
from vchan.loop import Loop, Timer
from vchan.messages import NAME_BYTES_MAX, Topic

LOG = logging.getLogger(__name__)

RETRY_MIN_S: Final = 1.0
RETRY_MAX_S: Final = 30.0
ANSWER_TIMEOUT_S: Final = 60.0
"""For the broker to answer on a channel. A quorum queue may have to elect a leader first."""
REPAIRS_MAX: Final = 8
"""Openings in a row that failed over what is declared how, each tried again at once."""

_NOT_FOUND: Final = 404
_PRECONDITION_FAILED: Final = 406


class Hub(Protocol):
    """What VMs and exchanges ask of the `Broker` they belong to."""

    config: BrokerConfig
    loop: Loop
    link: Link | None
    post: Callable[[BrokerEvent], None]

    def next_generation(self) -> int:
        """1, 2, ...: a channel's run."""

    def has_exchange(self, queue: Queue, vm: Vm) -> bool:
        """Whether the queue's exchange is there; if not yet, the VM is told when it is."""

    def forget_exchange(self, name: str) -> None:
        """Ask for it again when it is needed."""

    def line_up(self, vm: Vm) -> None:
        """It wants to open a channel."""

    def opened(self, vm: Vm) -> None:
        """It is open, or has failed to: the next may try."""

    def forget(self, vm: Vm) -> None:
        """It wants nothing and has nothing."""


class Queue(NamedTuple):
    """A queue of a VM's and what it is bound to."""

    name: str
    exchange: str
    exchange_type: str
    routing_key: str
    topic: Topic
    fanout: bool


def queues_of(vm: str, topics: frozenset[Topic]) -> Iterator[Queue]:
    """Two for each topic: what is for this VM, and what is for all."""
    for topic in sorted(topics):
        direct = f"{topic.name}.{vm}"
        yield Queue(direct, topic.exchange, "topic", direct, topic, fanout=False)
        fanout = f"{topic.name}_fanout"
        yield Queue(f"{fanout}_{vm}", fanout, "fanout", topic.name, topic, fanout=True)


def is_usable(vm: str, topic: Topic) -> bool:
    """AMQP must be able to say the names; and a topic is a name, not a pattern for a binding."""
    if not topic.name or not topic.exchange or {"*", "#"} & set(topic.name.split(".")):
        return False
    try:
        lengths = [len(queue.name.encode()) for queue in queues_of(vm, frozenset({topic}))]
        return max(*lengths, len(topic.exchange.encode())) <= NAME_BYTES_MAX
    except UnicodeEncodeError:
        return False


def queue_arguments(config: BrokerConfig, *, fanout: bool) -> dict[str, Any]:
    """Of a VM's queue. All hosts must agree, so they follow from the configuration alone."""
    arguments: dict[str, Any] = {"x-single-active-consumer": True}
    if config.fanout_quorum if fanout else config.quorum:
        arguments["x-queue-type"] = "quorum"
        arguments.update(config.quorum_arguments)
    if fanout and config.fanout_expires_s:
        arguments["x-expires"] = config.fanout_expires_s * 1000
    return arguments


class Exchange(Owner):
    """An exchange: made sure of before anything is bound to it.

    On a channel of its own, because a "no" closes the channel. If it exists, it is taken as others
    declared it; if not, it is declared as the configuration says.
    """

    def __init__(self, broker: Hub, queue: Queue) -> None:
        config = broker.config
        self._broker = broker
        self._name = queue.exchange
        self._type = queue.exchange_type
        self._durable = config.fanout_quorum if queue.fanout else config.durable
        self._auto_delete = queue.fanout or config.auto_delete
        self._passive = True
        self._code = 0
        self._text = ""
        self._asked_at_s = 0.0
        self.waiting: set[Vm] = set()
        self.is_there = False
        self._ask()

    def _ask(self) -> None:
        """Open, declare, close, all in one go."""
        link = self._broker.link
        assert link is not None
        self._code = 0
        self._asked_at_s = self._broker.loop.time()
        try:
            channel = link.channel(self)
        except ResourceError as error:
            # Not now: the asker has not joined those who wait.
            self._broker.loop.call_soon(partial(self._done, str(error)))
            return
        flags = (self._passive, self._durable, self._auto_delete, False, False)
        args: tuple[Any, ...] = (0, self._name, self._type, *flags, {})
        channel.ask(spec.Exchange.Declare, "BssbbbbbF", *args)
        channel.close_softly()

    def on_method(self, inbound: Inbound) -> None:
        """The answer is complete when our close is answered; an error comes before that."""
        if inbound.method == spec.Channel.Close:
            self._code, self._text = inbound.args[:2]
            inbound.channel.send_method(spec.Channel.CloseOk)
        elif inbound.method == spec.Channel.CloseOk:
            inbound.channel.collect()
            self._conclude()

    def watch(self, link: Link, now_s: float) -> None:
        """Give up a connection that does not even say no."""
        if not self.is_there and now_s - self._asked_at_s >= ANSWER_TIMEOUT_S:
            link.fail(f"the broker did not answer for {ANSWER_TIMEOUT_S} s")

    def _conclude(self) -> None:
        if self._passive and self._code == _NOT_FOUND:
            self._passive = False
            self._ask()
        elif self._code in (0, _PRECONDITION_FAILED):  # it is there, perhaps since a moment ago
            self._done("")
        else:
            self._done(f"{self._code} {self._text}")

    def _done(self, problem: str) -> None:
        waiting, self.waiting = self.waiting, set()
        self.is_there = not problem
        if problem:
            LOG.warning("exchange %s: %s", self._name, problem)
            self._broker.forget_exchange(self._name)
        for vm in waiting:
            vm.on_exchange(problem)


class _Step(NamedTuple):
    """A method sent to the broker, which answers on a channel in the order of asking."""

    method: tuple[int, int]
    layout: str
    args: tuple[Any, ...]
    answer: tuple[int, int]
    on_answer: Callable[[], None]
    subject: str = ""


class _Phase(enum.Enum):
    IDLE = enum.auto()  # no channel: not wanted, no connection, or waiting to try again
    WAITING = enum.auto()  # for its turn to open
    OPENING = enum.auto()
    OPEN = enum.auto()
    CLOSING = enum.auto()  # asked; the broker has not answered


class Vm(Owner):
    """One VM: what it wants, and its channel."""

    def __init__(self, broker: Hub, vm: str) -> None:
        self.vm = vm
        self._broker = broker
        self._phase = _Phase.IDLE
        self._topics: frozenset[Topic] = frozenset()
        self._channel: Channel | None = None
        self._generation = 0
        self._steps: deque[_Step] = deque()
        self._asked: frozenset[Topic] = frozenset()  # of the topics: declared on this channel
        self._said: frozenset[Topic] = frozenset()  # ... and told about by Consuming
        self._consumers: dict[str, Queue] = {}  # by consumer tag, which is the queue's name
        self._unconfirmed: set[str] = set()  # consumer tags
        self._unacked: set[int] = set()
        self._as_it_is: set[str] = set()  # queues somebody declared otherwise than we would
        self._announce = False  # somebody waits for Released
        self._reason = ""
        self._in_haste = False  # open again at once
        self._failures = 0
        self._repairs = 0
        self._waiting_since_s: float | None = None  # for the broker to answer, whatever it is
        self._timer: Timer | None = None  # for trying again
        self._set_up_timer: Timer | None = None  # for topics that could not be set up

    # ---------------------------------------------------------------- wishes

    def want(self, topics: frozenset[Topic]) -> None:
        """Consume these and no others; none: close the channel."""
        had, self._topics = self._topics, topics
        if self._phase in (_Phase.OPENING, _Phase.OPEN):
            if had - topics:
                self._close("other topics are wanted", in_haste=True)
            elif topics - had:
                self._set_up()
        elif self._phase is not _Phase.CLOSING and not topics:
            self._phase = _Phase.IDLE
            self._rest()
        elif self._phase is _Phase.IDLE and self._timer is None:
            self.open_in_turn()

    def release(self) -> None:
        """Close the channel; Released follows in any case."""
        self._topics = frozenset()
        if self._phase in (_Phase.OPENING, _Phase.OPEN):
            self._close("released", in_haste=True)
        elif self._phase is _Phase.CLOSING:
            self._announce = True
        else:
            self._phase = _Phase.IDLE
            self._broker.post(Released(self.vm, "was not consuming"))
            self._rest()

    def open_in_turn(self) -> None:
        """Queue up for opening, if there is something to open for."""
        if self._phase is _Phase.IDLE and self._topics and self._broker.link is not None:
            self._cancel_timer()
            self._phase = _Phase.WAITING
            self._broker.line_up(self)

    def settle(self, token: Token, method: tuple[int, int]) -> None:
        """Ack or reject. A token that is dead, or was settled before, is no error."""
        if token.generation != self._generation or token.tag not in self._unacked:
            return
        assert self._channel is not None
        self._unacked.discard(token.tag)
        self._channel.ask(method, "Lb", token.tag, False)

    def barrier(self, token: Token, ids: tuple[bytes, ...]) -> None:
        """Settled follows, unless the token's channel ends first."""
        if token.generation != self._generation or self._channel is None or self._is_closing:
            return
        self._ask([self._qos(lambda: self._broker.post(Settled(self.vm, ids)))])

    @property
    def _is_closing(self) -> bool:
        return self._phase is _Phase.CLOSING

    # ---------------------------------------------------------------- opening

    def open(self, link: Link) -> bool:
        """Its turn has come. False: it is no longer wanted, or there is no channel left."""
        if self._phase is not _Phase.WAITING:
            return False
        self._phase = _Phase.IDLE
        if not self._topics:
            return False
        try:
            self._channel = link.channel(self)
        except ResourceError as error:
            LOG.warning("%s: no AMQP channel left: %s", self.vm, error)
            self._retry_later()
            return False
        self._phase = _Phase.OPENING
        self._generation = self._broker.next_generation()
        self._steps.append(_Step((0, 0), "", (), spec.Channel.OpenOk, _nothing))
        self._ask([self._qos(_nothing)])
        self._set_up()
        return True

    def _set_up(self) -> None:
        """Declare, bind and consume, all in one go: the broker does one after the other.

        What is asked for already is left alone; what lacks its exchange is set up when that is
        there. Consuming comes last, so that a failed declaration leaves nothing delivered.
        """
        self._cancel_set_up()
        missing = self._topics - self._asked
        ready = frozenset(topic for topic in missing if self._has_exchanges(topic))
        self._asked |= ready
        queues = list(queues_of(self.vm, ready))
        for queue in queues:
            self._ask([self._declare_queue(queue), self._bind(queue)])
        for queue in queues:
            if queue.name not in self._consumers:
                self._consume(queue)

    def _has_exchanges(self, topic: Topic) -> bool:
        queues = queues_of(self.vm, frozenset({topic}))
        # All are asked for, whatever the first one's answer.
        lacking = [queue for queue in queues if not self._broker.has_exchange(queue, self)]
        return not lacking

    def on_exchange(self, problem: str) -> None:
        """An exchange that was waited for is there, or cannot be."""
        if self._phase not in (_Phase.OPENING, _Phase.OPEN):
            return
        if not problem:
            self._set_up()
        elif self._set_up_timer is None:
            delay_s = back_off(self._failures)
            self._set_up_timer = self._broker.loop.call_later(delay_s, self._set_up)
            self._failures += 1

    def _cancel_set_up(self) -> None:
        if self._set_up_timer is not None:
            self._set_up_timer.cancel()
            self._set_up_timer = None

    def _ask(self, steps: list[_Step]) -> None:
        assert self._channel is not None
        if self._waiting_since_s is None:
            self._waiting_since_s = self._broker.loop.time()
        for step in steps:
            self._channel.ask(step.method, step.layout, *step.args)
            self._steps.append(step)

    def _qos(self, on_answer: Callable[[], None]) -> _Step:
        args = (0, self._broker.config.prefetch, False)
        return _Step(spec.Basic.Qos, "lBb", args, spec.Basic.QosOk, on_answer)

    def _declare_queue(self, queue: Queue) -> _Step:
        passive = queue.name in self._as_it_is
        arguments = queue_arguments(self._broker.config, fanout=queue.fanout)
        args = (0, queue.name, passive, True, False, False, False, arguments)
        answer = spec.Queue.DeclareOk
        return _Step(spec.Queue.Declare, "BsbbbbbF", args, answer, _nothing, queue.name)

    def _bind(self, queue: Queue) -> _Step:
        args: tuple[Any, ...] = (0, queue.name, queue.exchange, queue.routing_key, False, {})
        answer = spec.Queue.BindOk
        return _Step(spec.Queue.Bind, "BsssbF", args, answer, _nothing, queue.exchange)

    def _consume(self, queue: Queue) -> None:
        """Not a _Step: it is the queue that answers, and so perhaps after later steps."""
        assert self._channel is not None
        self._consumers[queue.name] = queue
        self._unconfirmed.add(queue.name)
        args: tuple[Any, ...] = (0, queue.name, queue.name, False, False, False, False, {})
        self._channel.ask(spec.Basic.Consume, "BssbbbbF", *args)

    def _on_answer(self) -> None:
        """Something is answered: perhaps it was the last."""
        if self._steps or self._unconfirmed:
            self._waiting_since_s = self._broker.loop.time()
            return
        self._waiting_since_s = None
        if self._phase is _Phase.OPENING:
            self._phase = _Phase.OPEN
            self._broker.opened(self)
        if self._asked == self._topics != self._said:
            self._said = self._topics
            self._failures = self._repairs = 0
            self._broker.post(Consuming(self.vm))

    def watch(self, link: Link, now_s: float) -> None:
        """Give up a channel that gets no answer; and a connection, if it cannot even be closed."""
        since_s = self._waiting_since_s
        if since_s is None or now_s - since_s < ANSWER_TIMEOUT_S:
            return
        problem = f"the broker did not answer for {ANSWER_TIMEOUT_S} s"
        if self._is_closing:
            link.fail(problem)
        else:
            self._close(problem)

    # ---------------------------------------------------------------- what the broker says

    def on_method(self, inbound: Inbound) -> None:
        """Everything that comes on this VM's channel."""
        if inbound.channel is not self._channel:
            return
        method, args = inbound.method, inbound.args
        if method == spec.Basic.Deliver:
            self._on_deliver(inbound.content, *args)
        elif method == spec.Channel.Close:
            self._on_close(*args)
        elif method == spec.Channel.CloseOk:
            inbound.channel.collect()
            self._ended(self._reason)
        elif method == spec.Basic.ConsumeOk:
            self._announce = True
            self._unconfirmed.discard(args[0])
            self._on_answer()
        elif method == spec.Basic.Cancel:
            self._close(f"the broker cancelled the consumer of {args[0]}")
        elif self._steps and method == self._steps[0].answer:  # in the order of asking
            self._steps.popleft().on_answer()
            self._on_answer()

    def _on_deliver(
        self, content: Any, consumer: str, tag: int, redelivered: bool, exchange: str, _key: str
    ) -> None:
        if self._is_closing:
            return
        token = Token(self.vm, self._generation, tag)
        self._unacked.add(tag)
        try:
            request = _decode(content)
        except EnvelopeError as error:
            self._broker.post(Undecodable(self.vm, token, error.reason))
            return
        queue = self._consumers[consumer]
        # Topics of one name on two exchanges share their queue.
        published = Topic(exchange, queue.topic.name)
        topic = published if published in self._topics else queue.topic
        self._broker.post(
            Delivered(self.vm, token, request, topic, queue.fanout, bool(redelivered))
        )

    def _on_close(self, code: int, text: str, class_id: int, method_id: int) -> None:
        """The broker found an error on the channel, and closed it."""
        assert self._channel is not None
        if self._is_closing:  # ours crossed theirs: it answers ours as well
            self._channel.send_method(spec.Channel.CloseOk)
            return
        self._channel.closed_by_broker()
        failed = self._steps[0] if self._steps else None
        if failed is not None and failed.method == (class_id, method_id):
            self._in_haste = self._repair(failed, code)
        if not self._in_haste:
            LOG.warning("%s: the broker closed the channel: %s %s", self.vm, code, text)
        self._ended(f"{code} {text}")

    def _repair(self, failed: _Step, code: int) -> bool:
        """Whether it is a matter of who declared what how; if so, the next opening knows better."""
        subject = failed.subject
        missing, differs = code == _NOT_FOUND, code == _PRECONDITION_FAILED
        if failed.method == spec.Queue.Bind and missing:
            self._broker.forget_exchange(subject)  # it deleted itself with its last queue
        elif failed.method == spec.Queue.Declare and differs:
            LOG.warning("%s: queue %s was declared otherwise: used as it is", self.vm, subject)
            self._as_it_is.add(subject)
        elif failed.method == spec.Queue.Declare and missing:
            self._as_it_is.discard(subject)
        else:
            return False
        self._repairs += 1
        return self._repairs <= REPAIRS_MAX

    # ---------------------------------------------------------------- ending

    def _close(self, reason: str, *, in_haste: bool = False) -> None:
        """Close the channel; the broker puts back, in order, what was not acknowledged."""
        assert self._channel is not None
        self._broker.opened(self)
        self._cancel_timer()
        self._phase, self._reason, self._in_haste = _Phase.CLOSING, reason, in_haste
        self._announce = self._announce or in_haste
        self._cancel_set_up()
        self._unacked.clear()
        self._steps.clear()
        self._unconfirmed.clear()
        self._channel.close_softly()
        self._waiting_since_s = self._broker.loop.time()

    def on_disconnected(self, reason: str) -> None:
        """The connection is gone, and the channel with it."""
        if self._phase is _Phase.WAITING:
            self._phase = _Phase.IDLE
        self._cancel_timer()
        self._failures = self._repairs = 0
        if self._channel is not None:
            self._ended(reason)

    def _ended(self, reason: str) -> None:
        """There is no channel any more."""
        self._broker.opened(self)
        self._cancel_timer()
        self._cancel_set_up()
        self._phase, self._channel = _Phase.IDLE, None
        self._generation = 0
        self._waiting_since_s = None
        self._asked = self._said = frozenset()
        self._unacked.clear()
        self._steps.clear()
        self._unconfirmed.clear()
        self._consumers.clear()
        announce, self._announce = self._announce, False
        if announce:
            self._broker.post(Released(self.vm, reason))
        self._rest()

    def _rest(self) -> None:
        """Without a channel: what next?"""
        in_haste, self._in_haste = self._in_haste, False
        if not self._topics:
            self._cancel_timer()
            self._broker.forget(self)
        elif self._broker.link is None:
            pass  # the next connection opens it
        elif in_haste:
            self.open_in_turn()
        else:
            self._retry_later()

    def _retry_later(self) -> None:
        self._timer = self._broker.loop.call_later(back_off(self._failures), self._retry)
        self._failures += 1

    def _retry(self) -> None:
        self._timer = None
        self.open_in_turn()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _decode(content: Any) -> BrokerRequest:
    headers = content.properties.get("application_headers") or {}
    if "compression" in headers:
        raise EnvelopeError("it is compressed (kombu_compression): that is not supported")
    body = content.body or b""  # py-amqp's own default for an empty one is a str
    return decode(bytes(body), expiration=content.properties.get("expiration"))


class Sweep(Owner):
    """Deletes one VM's queues, on a channel of its own."""

    def __init__(self, vm: str, topics: frozenset[Topic], on_done: Callable[[], None]) -> None:
        self._vm = vm
        self._topics = topics
        self._on_done = on_done

    def start(self, link: Link) -> None:
        """Open, delete, close, all in one go. A queue that is not there is no error."""
        channel = link.channel(self)
        for queue in queues_of(self._vm, self._topics):
            channel.ask(spec.Queue.Delete, "Bsbbb", 0, queue.name, False, False, False)
        channel.close_softly()

    def on_method(self, inbound: Inbound) -> None:
        """The end, good or bad."""
        if inbound.method == spec.Channel.CloseOk:
            inbound.channel.collect()
            self._on_done()
        elif inbound.method == spec.Channel.Close:
            # Our own close is under way: its CloseOk follows.
            inbound.channel.send_method(spec.Channel.CloseOk)
            LOG.warning("%s: deleting queues: %s %s", self._vm, *inbound.args[:2])


def back_off(failures: int) -> float:
    """Seconds; at random between half and all, so that hosts do not come back in step."""
    longest_s = min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(failures, 10))
    return longest_s * random.uniform(0.5, 1.0)


def _nothing() -> None:
    pass
