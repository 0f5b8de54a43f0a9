"""A VM at the broker: its queues, and the channel that consumes from them.

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
from typing import Any, Final, NamedTuple, Protocol

from vchan.host.amqp_link import Channel, Inbound, Link, Owner, ResourceError, spec
from vchan.host.broker_config import BrokerConfig
from vchan.host.broker_declared import (
    ANSWER_TIMEOUT_S,
    NOT_FOUND,
    PRECONDITION_FAILED,
    Declared,
)
from vchan.host.broker_events import (
    BrokerEvent,
    Consuming,
    Delivered,
    Mail,
    Released,
    Settled,
    Token,
    Undecodable,
)
from vchan.host.envelope import EnvelopeError, decode
from vchan.loop import Loop, Timer
from vchan.messages import NAME_BYTES_MAX, Topic

LOG = logging.getLogger(__name__)

RETRY_MIN_S: Final = 1.0
RETRY_MAX_S: Final = 30.0
OWN_PREFETCH: Final = 64
"""Of a VM's own queue: answers that the guest has not settled stay there, and a note behind them
must come all the same. More than `vchan.host.outbound.HELD_MAX`."""
EXPIRES_MS_MAX: Final = 2**32 - 1
"""RabbitMQ's: 49 days."""
REPAIRS_MAX: Final = 8
"""Openings in a row that failed over what is declared how, each tried again at once."""


class Hub(Protocol):
    """What VMs ask of the `Broker` they belong to."""

    config: BrokerConfig
    loop: Loop
    link: Link | None
    post: Callable[[BrokerEvent], None]
    declared: Declared

    def next_generation(self) -> int:
        """1, 2, ...: a channel's run."""

    def line_up(self, vm: Vm) -> None:
        """It wants to open a channel."""

    def opened(self, vm: Vm) -> None:
        """It is open, or has failed to: the next may try."""

    def forget(self, vm: Vm) -> None:
        """It wants nothing and has nothing."""


class Queue(NamedTuple):
    """A queue of a VM's for a topic, and what it is bound to."""

    name: str
    exchange: str
    routing_key: str
    topic: Topic
    fanout: bool


def queues_of(vm: str, topics: frozenset[Topic]) -> Iterator[Queue]:
    """Two for each topic: what is for this VM, and what is for all."""
    for topic in sorted(topics):
        direct = f"{topic.name}.{vm}"
        yield Queue(direct, topic.exchange, direct, topic, fanout=False)
        fanout = f"{topic.name}_fanout"
        yield Queue(f"{fanout}_{vm}", fanout, topic.name, topic, fanout=True)


def own_queue(vm: str) -> str:
    """The VM's own, for answers to its requests and for notes between hosts that serve it."""
    return f"vchan_vm_{vm}"


def is_usable(vm: str, topic: Topic) -> bool:
    """AMQP must be able to say the names; and a topic is a name, not a pattern for a binding."""
    if not topic.name or not topic.exchange or {"*", "#"} & set(topic.name.split(".")):
        return False
    try:
        lengths = [len(queue.name.encode()) for queue in queues_of(vm, frozenset({topic}))]
        return max(*lengths, len(topic.exchange.encode())) <= NAME_BYTES_MAX
    except UnicodeEncodeError:
        return False


def topic_arguments(config: BrokerConfig, *, fanout: bool) -> dict[str, Any]:
    """Of a VM's queue for a topic."""
    if fanout:
        return _arguments(config, quorum=config.fanout_quorum, expires_s=config.fanout_expires_s)
    return _arguments(config, quorum=config.quorum, expires_s=config.topic_expires_s)


def own_arguments(config: BrokerConfig) -> dict[str, Any]:
    """Of a VM's own queue: it expires as oslo.messaging's queues for replies do."""
    quorum = config.quorum or config.fanout_quorum
    return _arguments(config, quorum=quorum, expires_s=config.fanout_expires_s)


def _arguments(config: BrokerConfig, *, quorum: bool, expires_s: int) -> dict[str, Any]:
    """All hosts must agree, so they follow from the configuration alone."""
    arguments: dict[str, Any] = {"x-single-active-consumer": True}
    if quorum:
        arguments["x-queue-type"] = "quorum"
        arguments.update(config.quorum_arguments)
    if expires_s:
        arguments["x-expires"] = min(expires_s * 1000, EXPIRES_MS_MAX)
    return arguments


class _Step(NamedTuple):
    """A method sent to the broker, which answers on a channel in the order of asking."""

    method: tuple[int, int]
    layout: str
    args: tuple[Any, ...]
    answer: tuple[int, int]
    on_answer: Callable[[], None]
    subject: str = ""


_NOTHING_SAID: Final[tuple[frozenset[Topic], bool]] = (frozenset(), False)


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
        self._listens = False  # its own queue is wanted, too
        self._channel: Channel | None = None
        self._generation = 0
        self._steps: deque[_Step] = deque()
        self._asked: frozenset[Topic] = frozenset()  # of the topics: declared on this channel
        self._asked_own = False  # likewise its own queue
        self._said: tuple[frozenset[Topic], bool] = _NOTHING_SAID  # told about by Consuming
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
        elif self._phase is not _Phase.CLOSING and not self._is_wanted:
            self._phase = _Phase.IDLE
            self._rest()
        elif self._phase is _Phase.IDLE and self._timer is None:
            self.open_in_turn()

    def listen(self) -> None:
        """Consume its own queue, too, until it is released."""
        had, self._listens = self._listens, True
        if had:
            return
        if self._phase in (_Phase.OPENING, _Phase.OPEN):
            self._set_up()
        elif self._phase is _Phase.IDLE and self._timer is None:
            self.open_in_turn()

    def release(self) -> None:
        """Close the channel; Released follows in any case."""
        self._topics, self._listens = frozenset(), False
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
        if self._phase is _Phase.IDLE and self._is_wanted and self._broker.link is not None:
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
        prefetch = self._broker.config.prefetch
        self._ask([self._qos(lambda: self._broker.post(Settled(self.vm, ids)), prefetch)])

    @property
    def _is_wanted(self) -> bool:
        """Whether there is something to consume."""
        return bool(self._topics) or self._listens

    @property
    def _is_closing(self) -> bool:
        return self._phase is _Phase.CLOSING

    # ---------------------------------------------------------------- opening

    def open(self, link: Link) -> bool:
        """Its turn has come. False: it is no longer wanted, or there is no channel left."""
        if self._phase is not _Phase.WAITING:
            return False
        self._phase = _Phase.IDLE
        if not self._is_wanted:
            return False
        problem = None
        try:
            self._channel = link.channel(self)
        except ResourceError as error:
            problem = str(error)
        if problem is not None:
            LOG.warning("%s: no AMQP channel left: %s", self.vm, problem)
            self._retry_later()
            return False
        self._phase = _Phase.OPENING
        self._generation = self._broker.next_generation()
        self._steps.append(_Step((0, 0), "", (), spec.Channel.OpenOk, _nothing))
        self._set_up()
        return True

    def _set_up(self) -> None:
        """Declare, bind and consume, all in one go: the broker does one after the other.

        What is asked for already is left alone; what lacks its exchange is set up when that is
        there. Consuming comes last, so that a failed declaration leaves nothing delivered.
        """
        self._cancel_set_up()
        if self._listens and not self._asked_own:
            self._asked_own = True
            own = own_queue(self.vm)
            self._ask([self._declare(own, own_arguments(self._broker.config))])
            self._ask([self._qos(_nothing, OWN_PREFETCH)])  # for what is consumed from now on
            self._consume(own)
        missing = self._topics - self._asked
        ready = frozenset(topic for topic in missing if self._has_exchanges(topic))
        self._asked |= ready
        queues = list(queues_of(self.vm, ready))
        if queues:
            self._ask([self._qos(_nothing, self._broker.config.prefetch)])
        for queue in queues:
            arguments = topic_arguments(self._broker.config, fanout=queue.fanout)
            self._ask([self._declare(queue.name, arguments), self._bind(queue)])
        for queue in queues:
            if queue.name not in self._consumers:
                self._consumers[queue.name] = queue
                self._consume(queue.name)

    def _has_exchanges(self, topic: Topic) -> bool:
        queues = queues_of(self.vm, frozenset({topic}))
        declared = self._broker.declared
        # All are asked for, whatever the first one's answer.
        lacking = [
            queue
            for queue in queues
            if not declared.has_exchange(queue.exchange, self, fanout=queue.fanout)
        ]
        return not lacking

    def on_declared(self, problem: str) -> None:
        """An exchange that was waited for is there, or cannot be."""
        if self._phase not in (_Phase.OPENING, _Phase.OPEN):
            return
        if not problem:
            self._set_up()
        elif self._set_up_timer is None:
            delay_s = back_off(self._failures, RETRY_MIN_S, RETRY_MAX_S)
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

    def _qos(self, on_answer: Callable[[], None], prefetch: int) -> _Step:
        args = (0, prefetch, False)
        return _Step(spec.Basic.Qos, "lBb", args, spec.Basic.QosOk, on_answer)

    def _declare(self, name: str, arguments: dict[str, Any]) -> _Step:
        flags = (name in self._as_it_is, True, False, False, False)
        args = (0, name, *flags, arguments)
        return _Step(spec.Queue.Declare, "BsbbbbbF", args, spec.Queue.DeclareOk, _nothing, name)

    def _bind(self, queue: Queue) -> _Step:
        args: tuple[Any, ...] = (0, queue.name, queue.exchange, queue.routing_key, False, {})
        answer = spec.Queue.BindOk
        return _Step(spec.Queue.Bind, "BsssbF", args, answer, _nothing, queue.exchange)

    def _consume(self, queue: str) -> None:
        """Not a _Step: it is the queue that answers, and so perhaps after later steps."""
        assert self._channel is not None
        self._unconfirmed.add(queue)
        args: tuple[Any, ...] = (0, queue, queue, False, False, False, False, {})
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
        wanted = (self._topics, self._listens)
        if (self._asked, self._asked_own) == wanted != self._said:
            self._said = wanted
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
            body = _body(content)
            if consumer == own_queue(self.vm):
                self._broker.post(Mail(self.vm, token, body))
                return
            request = decode(body, expiration=content.properties.get("expiration"))
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
        missing, differs = code == NOT_FOUND, code == PRECONDITION_FAILED
        if failed.method == spec.Queue.Bind and missing:
            self._broker.declared.forget_exchange(subject)  # it deleted itself with its last queue
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
        self._asked, self._asked_own, self._said = frozenset(), False, _NOTHING_SAID
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
        if not self._is_wanted:
            self._cancel_timer()
            self._broker.forget(self)
        elif self._broker.link is None:
            pass  # the next connection opens it
        elif in_haste:
            self.open_in_turn()
        else:
            self._retry_later()

    def _retry_later(self) -> None:
        delay_s = back_off(self._failures, RETRY_MIN_S, RETRY_MAX_S)
        self._timer = self._broker.loop.call_later(delay_s, self._retry)
        self._failures += 1

    def _retry(self) -> None:
        self._timer = None
        self.open_in_turn()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _body(content: Any) -> bytes:
    if "compression" in (content.properties.get("application_headers") or {}):
        raise EnvelopeError("it is compressed (kombu_compression): that is not supported")
    return bytes(content.body or b"")  # py-amqp's own default for an empty one is a str


class Sweep(Owner):
    """Deletes one VM's queues, one after the other: those that are empty and that nobody uses.
    Notes and answers in its own queue are no use to anybody when the VM is gone.

    Not with the broker's own if-unused and if-empty: for a quorum queue that is an error, one that
    ends the connection.
    """

    def __init__(self, broker: Hub, vm: str, topics: frozenset[Topic], on_done: _Done) -> None:
        self._broker = broker
        self.vm = vm
        self.topics = topics
        self._on_done = on_done
        self._left = deque([own_queue(vm), *(queue.name for queue in queues_of(vm, topics))])
        self._channel: Channel | None = None
        self._asked_at_s = 0.0

    def start(self) -> None:
        """Look at the first."""
        self._next()

    def call_off(self) -> None:
        """Leave what is not deleted yet."""
        self._end("")

    def watch(self, now_s: float) -> None:
        """Give up if the broker does not answer. What is left expires."""
        if now_s - self._asked_at_s >= ANSWER_TIMEOUT_S:
            self._end(f"the broker did not answer for {ANSWER_TIMEOUT_S} s")

    def on_method(self, inbound: Inbound) -> None:
        """What a queue is, that it is deleted, or that there is none."""
        method, args = inbound.method, inbound.args
        if method == spec.Channel.CloseOk:
            inbound.channel.collect()
        elif method == spec.Channel.Close:
            inbound.channel.closed_by_broker()
            if inbound.channel is self._channel:
                if args[0] != NOT_FOUND:
                    LOG.warning("%s: deleting queues: %s %s", self.vm, *args[:2])
                self._channel = None
                self._next()
        elif inbound.channel is not self._channel:
            pass  # given up
        elif method == spec.Queue.DeclareOk:
            name, messages, consumers = args
            if consumers or (messages and name != own_queue(self.vm)):
                text = "%s: queue %s stays: it has %s messages, %s consumers"
                LOG.info(text, self.vm, name, messages, consumers)
                self._next()
            else:
                self._channel.ask(spec.Queue.Delete, "Bsbbb", 0, name, False, False, False)
        elif method == spec.Queue.DeleteOk:
            self._next()

    def _next(self) -> None:
        self._asked_at_s = self._broker.loop.time()
        if not self._left:
            self._end("")
            return
        try:
            channel = self._channel or self._open()
        except ResourceError as error:
            self._end(str(error))
            return
        flags = (True, False, False, False, False)
        channel.ask(spec.Queue.Declare, "BsbbbbbF", 0, self._left.popleft(), *flags, {})

    def _open(self) -> Channel:
        assert self._broker.link is not None
        self._channel = self._broker.link.channel(self)
        return self._channel

    def _end(self, problem: str) -> None:
        if problem:
            LOG.warning("%s: its queues stay: %s", self.vm, problem)
        if self._channel is not None:
            self._channel.close_softly()
            self._channel = None
        self._on_done(self)


def back_off(failures: int, min_s: float, max_s: float) -> float:
    """Seconds; at random between half and all, so that hosts do not come back in step."""
    longest_s = min(max_s, min_s * 2.0 ** min(failures, 10))
    return longest_s * random.uniform(0.5, 1.0)


def _nothing() -> None:
    pass


_Done = Callable[[Sweep], None]
