"""A VM at the broker: its queues, and the channel that consumes from them.

Rules of this file
1. Nothing waits: every request to the broker is a `_Step`, whose answer comes back later.
2. A consumer is never cancelled: its channel is closed. Queues have a single active consumer:
   another host may consume before we close the channel, and gets nothing until we have. A topic's
   own queue, which services declare without that, is consumed by whoever holds its lock: an
   exclusive consumer of a queue of ours, on the same channel.
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

from vchan.host.broker import completions
from vchan.host.broker.amqp import (
    BODY_BYTES_MAX,
    AmqpChannel,
    BrokerLink,
    Content,
    Inbound,
    ResourceError,
    spec,
)
from vchan.host.broker.completions import Completions
from vchan.host.broker.config import BrokerConfig
from vchan.host.broker.events import (
    BEGINNING_BYTES,
    Consuming,
    Delivered,
    Mail,
    Parked,
    Released,
    Token,
    Troubled,
    Undecodable,
)
from vchan.host.broker.parked import Parking
from vchan.host.broker.topology import (
    ANSWER_TIMEOUT_S,
    NOT_FOUND,
    PRECONDITION_FAILED,
    Declared,
)
from vchan.host.faults import attempt, log_fault
from vchan.host.oslo_wire.compression import COMPRESSION_HEADER, expand
from vchan.host.oslo_wire.downward_envelope import decode
from vchan.host.oslo_wire.envelope import EnvelopeError
from vchan.host.oslo_wire.mail import own_queue
from vchan.io.loop import Loop, Timer
from vchan.rpc.messages import NAME_BYTES_MAX, Topic

LOG = logging.getLogger(__name__)

_new_tuple = tuple.__new__

RETRY_MIN_S = 1.0
"""Before a VM's channel that was closed is opened again; doubled up to RETRY_MAX_S."""
RETRY_MAX_S = 30.0
"""A channel that the broker keeps closing costs it little, and is back within half a minute."""
OWN_PREFETCH: Final = 64
"""Of a VM's own queue: answers that the guest has not settled stay there, and a note behind them
must come all the same. More than `vchan.host.vm.upward.HELD_MAX`."""
LOCK_SUFFIX: Final = "_vchan_owner"
"""Of the queue that is a topic's lock. Nobody publishes to it."""
LOCK_EXPIRES_S: Final = 3600
"""A lock that nobody holds has no state: it is made again."""
EXPIRES_MS_MAX: Final = 2**32 - 1
"""RabbitMQ's: 49 days."""
REPAIRS_MAX: Final = 8
"""Openings in a row that failed over what is declared how, each tried again at once."""
DELIVERY_LIMIT: Final = 2**31 - 1
"""Returns after which a quorum queue drops a message: never, in words that RabbitMQ 3 and 4 take
alike. Closing a VM's channel, which every migration, restart and lost connection does, is a return,
and says nothing against the message. RabbitMQ 4 drops at the 21st unless told otherwise."""


class BrokerForQueues(completions.BrokerThread, Protocol):
    """What VMs ask of the `Broker` they belong to."""

    config: BrokerConfig
    loop: Loop
    declared: Declared

    @property
    def link(self) -> BrokerLink | None:
        """While there is a connection."""

    def park(self, parking: Parking) -> None:
        """Put a message aside that breaks this daemon."""

    def next_generation(self) -> int:
        """1, 2, ...: a channel's run."""

    def line_up(self, vm: VmQueues) -> None:
        """It wants to open a channel."""

    def opened(self, vm: VmQueues) -> None:
        """It is open, or has failed to: the next may try."""

    def forget(self, vm: VmQueues) -> None:
        """It wants nothing and has nothing."""

    def vm_failed(self, vm: str, fault: str) -> None:
        """Something unexpected in one VM's code, which is in the log."""


class BrokerQueue(NamedTuple):
    """A queue of a VM's for a topic, and what it is bound to."""

    name: str
    exchange: str
    routing_key: str
    topic: Topic
    fanout: bool
    is_topics_own: bool = False

    @property
    def lock(self) -> str:
        """Whose exclusive consumer may consume a topic's own queue."""
        return f"{self.name}{LOCK_SUFFIX}"


def queues_of(
    vm: str, topics: frozenset[Topic], owned: frozenset[Topic] = frozenset()
) -> Iterator[BrokerQueue]:
    """Two for each topic: what is for this VM, and what is for all. Of a topic that is this VM's
    alone, a third: what names no server. Services declare that one, too."""
    for topic in sorted(topics):
        if topic in owned:
            name = topic.name
            yield BrokerQueue(name, topic.exchange, name, topic, fanout=False, is_topics_own=True)
        direct = f"{topic.name}.{vm}"
        yield BrokerQueue(direct, topic.exchange, direct, topic, fanout=False)
        fanout = f"{topic.name}_fanout"
        yield BrokerQueue(f"{fanout}_{vm}", fanout, topic.name, topic, fanout=True)


def is_usable(vm: str, topic: Topic) -> bool:
    """AMQP must be able to say the names; and a topic is a name, not a pattern for a binding."""
    if not topic.name or not topic.exchange or {"*", "#"} & set(topic.name.split(".")):
        return False
    try:
        queues = queues_of(vm, frozenset({topic}), frozenset({topic}))
        lengths = [
            len((queue.lock if queue.is_topics_own else queue.name).encode()) for queue in queues
        ]
        return max(*lengths, len(topic.exchange.encode())) <= NAME_BYTES_MAX
    except UnicodeEncodeError:
        return False


def topic_arguments(config: BrokerConfig, *, fanout: bool) -> dict[str, Any]:
    """Of a VM's queue for a topic."""
    if fanout:
        return _arguments(config, quorum=config.fanout_quorum, expires_s=config.fanout_expires_s)
    return _arguments(config, quorum=config.quorum, expires_s=config.topic_expires_s)


def topics_own_arguments(config: BrokerConfig) -> dict[str, Any]:
    """Of the queue of a topic that one VM owns: as oslo.messaging's servers declare it."""
    if not config.quorum:
        return {}
    return {"x-queue-type": "quorum", **config.quorum_arguments}


def lock_arguments() -> dict[str, Any]:
    """Only classic queues know exclusive consumers."""
    return {"x-queue-type": "classic", "x-expires": LOCK_EXPIRES_S * 1000}


def own_arguments(config: BrokerConfig) -> dict[str, Any]:
    """Of a VM's own queue: it expires as oslo.messaging's queues for replies do."""
    quorum = config.quorum or config.fanout_quorum
    return _arguments(config, quorum=quorum, expires_s=config.fanout_expires_s)


def _arguments(config: BrokerConfig, *, quorum: bool, expires_s: int) -> dict[str, Any]:
    """All hosts must agree, so they follow from the configuration alone."""
    arguments: dict[str, Any] = {"x-single-active-consumer": True}
    if quorum:
        arguments["x-queue-type"] = "quorum"
        arguments["x-delivery-limit"] = DELIVERY_LIMIT
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


class VmQueues:
    """One VM: what it wants, its channel, and what is completed on it."""

    def __init__(self, broker: BrokerForQueues, vm: str) -> None:
        self.vm = vm
        self._broker = broker
        self.completions = Completions(broker, self, vm)
        self._phase = _Phase.IDLE
        self._topics: frozenset[Topic] = frozenset()
        self._owned: frozenset[Topic] = frozenset()  # of the topics: no other VM's
        self._listens = False  # its own queue is wanted, too
        self._channel: AmqpChannel | None = None
        self._generation = 0
        self._steps: list[_Step] = []  # a list: an empty deque takes 0.6 KiB
        self._answer: tuple[Any, ...] = ()  # to the step that is answered
        self._asked: frozenset[Topic] = frozenset()  # of the topics: declared on this channel
        self._asked_own = False  # likewise its own queue
        self._said: tuple[frozenset[Topic], bool] = _NOTHING_SAID  # told about by Consuming
        self._consumers: dict[str, BrokerQueue] = {}  # by consumer tag, which is the queue's name
        self._unconfirmed: set[str] = set()  # consumer tags
        self._unacked: set[int] = set()
        self._refusal = ""  # why the VM's channel is not as it should be
        self._told: tuple[str, ...] | None = None  # of what is wrong, by Troubled
        self._announce = False  # somebody waits for Released
        self._reason = ""
        self._in_haste = False  # open again at once
        self._leaves = False  # is to be closed, as soon as what is under way is proved
        self._failures = 0
        self._repairs = 0
        self._waiting_since_s: float | None = None  # for the broker to answer, whatever it is
        self._timer: Timer | None = None  # for trying again
        self._set_up_timer: Timer | None = None  # for topics that could not be set up

    def __str__(self) -> str:
        return self.vm

    # ---------------------------------------------------------------- wishes

    def want(self, topics: frozenset[Topic], owned: frozenset[Topic] = frozenset()) -> None:
        """Consume these and no others; none: close the channel.

        Args:
            owned: Those of them that are this VM's alone.
        """
        assert owned <= topics, "what it owns and does not serve is nothing to consume"
        had, self._topics = self._topics, topics
        had_owned, self._owned = self._owned, owned
        if self._phase in (_Phase.OPENING, _Phase.OPEN):
            if had - topics or (had_owned ^ owned) & had:
                self._leaves = True
                self.completed()
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

    def release(self, *, for_good: bool) -> None:
        """Close the channel; Released follows in any case."""
        self._topics, self._owned, self._listens = frozenset(), frozenset(), False
        if for_good:
            self.completions.abandon()
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

    def dispose(self, token: Token, method: tuple[int, int]) -> None:
        """Ack or reject. A token that is dead, or was disposed of before, is no error."""
        if not self.holds(token):
            return
        assert self._channel is not None
        self._unacked.discard(token.tag)
        if method == spec.Basic.Ack:
            self._channel.acknowledge(token.tag)
        else:
            self._channel.ask(method, "Lb", token.tag, False)

    def holds(self, token: Token) -> bool:
        """See `completions.Tokens`."""
        return token.generation == self._generation and token.tag in self._unacked

    def acknowledge(self, token: Token) -> None:
        """See `completions.Tokens`."""
        self.dispose(token, spec.Basic.Ack)

    def prove(self, proved: Callable[[], None]) -> None:
        """See `completions.Tokens`. What a channel is asked it answers in order."""
        self._ask([self._qos(proved, self._broker.config.prefetch)])

    def completed(self) -> None:
        """See `completions.Tokens`."""
        if self._phase in (_Phase.OPENING, _Phase.OPEN):
            if self._leaves and not self.completions.waits_for_proof:
                self._close("other topics are wanted", in_haste=True)
        elif self._phase is _Phase.IDLE:
            self._forget_if_unused()

    def park(self, token: Token, queue: str, body: bytes, reason: str) -> None:
        """Put a message aside that breaks this daemon. A dead token's comes again."""
        if not self.holds(token):
            return

        def done(problem: str) -> None:
            self.dispose(token, spec.Basic.Reject if problem else spec.Basic.Ack)
            self._broker.post(Parked(self.vm, queue, problem))

        self._broker.park(Parking(self.vm, queue, body, reason, done))

    @property
    def _is_wanted(self) -> bool:
        """Whether there is something to consume."""
        return bool(self._topics) or self._listens

    @property
    def _is_closing(self) -> bool:
        return self._phase is _Phase.CLOSING

    def discard(self) -> None:
        """Close the channel, and have nothing to do with anybody any more: something has failed."""
        self._topics, self._owned, self._listens = frozenset(), frozenset(), False
        self._phase = _Phase.IDLE
        self.completions.abandon()
        channel, self._channel = self._channel, None
        for timer in (self._timer, self._set_up_timer):
            if timer is not None:
                timer.cancel()
        if channel is not None:
            channel.owner = _Discarded()
            channel.close_softly()

    # ---------------------------------------------------------------- opening

    def open(self, link: BrokerLink) -> bool:
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
            self._refuse(f"no AMQP channel left: {problem}")
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
        queues = list(queues_of(self.vm, ready, self._owned))
        if queues:
            self._ask([self._qos(_nothing, self._broker.config.prefetch)])
        for queue in queues:
            if queue.is_topics_own:
                self._set_up_topics_own(queue)
                continue
            arguments = topic_arguments(self._broker.config, fanout=queue.fanout)
            self._ask([self._declare(queue.name, arguments), self._bind(queue)])
        for queue in queues:
            if queue.name not in self._consumers:
                self._consumers[queue.name] = queue
                self._consume(queue.name)

    def _set_up_topics_own(self, queue: BrokerQueue) -> None:
        """A queue that has no single active consumer: first its lock, which one host has. Who had
        it before may not be off the queue yet, and a service may look in: then later."""
        if queue.name in self._consumers or queue.name in self._broker.declared.refused:
            return  # of another exchange's topic of the same name
        self._consumers[queue.name] = queue
        self._ask([self._declare(queue.lock, lock_arguments())])
        self._consume(queue.lock, is_exclusive=True)
        config = self._broker.config

        def on_facts() -> None:
            consumers = self._answer[2]
            if consumers:
                self._close(f"queue {queue.name} has {consumers} consumers, of somebody else")
            else:
                self._consume(queue.name)

        arguments = topics_own_arguments(config)
        declare = self._declare(queue.name, arguments, durable=config.durable or config.quorum)
        self._ask([declare._replace(on_answer=on_facts), self._bind(queue)])

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
            return
        self._refuse(problem)
        if self._set_up_timer is None:
            delay_s = back_off(self._failures, RETRY_MIN_S, RETRY_MAX_S)
            self._set_up_timer = self._broker.later(self.vm, delay_s, self._set_up)
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

    def _declare(self, name: str, arguments: dict[str, Any], *, durable: bool = True) -> _Step:
        flags = (name in self._broker.declared.otherwise, durable, False, False, False)
        args = (0, name, *flags, arguments)
        return _Step(spec.Queue.Declare, "BsbbbbbF", args, spec.Queue.DeclareOk, _nothing, name)

    def _bind(self, queue: BrokerQueue) -> _Step:
        args: tuple[Any, ...] = (0, queue.name, queue.exchange, queue.routing_key, False, {})
        answer = spec.Queue.BindOk
        return _Step(spec.Queue.Bind, "BsssbF", args, answer, _nothing, queue.exchange)

    def _consume(self, queue: str, *, is_exclusive: bool = False) -> None:
        """Not a _Step: it is the queue that answers, and so perhaps after later steps."""
        assert self._channel is not None
        self._unconfirmed.add(queue)
        args: tuple[Any, ...] = (0, queue, queue, False, False, is_exclusive, False, {})
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
            self._broker.post(Consuming(self.vm, self._asked))
            self._refuse("")

    def watch(self, link: BrokerLink, now_s: float) -> None:
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
            assert inbound.content is not None
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
            self._answer = tuple(args)
            self._steps.pop(0).on_answer()
            self._on_answer()

    def on_failure(self, fault: str) -> None:
        """What the broker said was too much for us: see `Broker.within`."""
        self._broker.vm_failed(self.vm, fault)

    def _on_deliver(
        self,
        content: Content,
        consumer: str,
        tag: int,
        redelivered: bool,
        exchange: str,
        _key: str,
    ) -> None:
        if self._is_closing or self._leaves:
            return  # it goes back when the channel is closed
        token: Token = _new_tuple(Token, (self.vm, self._generation, tag))
        self._unacked.add(tag)
        read = partial(self._read, token, content, consumer, redelivered, exchange)
        event, error = attempt(read, None)
        if error is not None:  # a fault of ours: the message shall not repeat it
            what = f"{self.vm}: a message of queue {consumer}: unexpected in reading it"
            self.park(token, consumer, content.body, log_fault(LOG, what, error))
        elif event is not None:
            self._broker.post(event)

    def _read(
        self, token: Token, content: Content, queue: str, redelivered: bool, exchange: str
    ) -> Delivered | Mail | Undecodable:
        try:
            return self._decode(token, content, queue, redelivered, exchange)
        except EnvelopeError as error:
            beginning = content.body[:BEGINNING_BYTES]
            return Undecodable(self.vm, token, error.reason, queue, beginning)

    def _decode(
        self, token: Token, content: Content, queue: str, redelivered: bool, exchange: str
    ) -> Delivered | Mail:
        body, properties = _body(content), content.properties
        meant = self._consumers.get(queue)
        if meant is None:
            assert queue == own_queue(self.vm)
            return Mail(self.vm, token, body)
        request = decode(body, expiration=properties.expiration)
        topic = meant.topic
        if exchange != topic.exchange:  # topics of one name on two exchanges share their queue
            published = Topic(exchange, topic.name)
            topic = published if published in self._topics else topic
        returns = properties.delivery_count
        fields = self.vm, token, request, topic, meant.fanout, redelivered, returns, queue, body
        delivered: Delivered = _new_tuple(Delivered, fields)
        return delivered

    def _on_close(self, code: int, text: str, class_id: int, method_id: int) -> None:
        """The broker found an error on the channel, and closed it."""
        assert self._channel is not None
        if self._is_closing:  # ours crossed theirs: it answers ours as well
            self._channel.send_method(spec.Channel.CloseOk)
            return
        self._channel.closed_by_broker()
        failed = self._steps[0] if self._steps else None
        refusal = f"the broker closed the channel: {code} {text}"
        if failed is not None and failed.method == (class_id, method_id):
            refusal = self._repair(failed, code, text)
        elif (class_id, method_id) == spec.Basic.Consume and LOCK_SUFFIX in text:
            refusal = f"another host consumes a topic that is this VM's alone: {text}"
        self._in_haste = not refusal
        if refusal:
            LOG.warning("%s: %s", self.vm, refusal)
            self._refuse(refusal)
        self._ended(f"{code} {text}")

    def _repair(self, failed: _Step, code: int, text: str) -> str:
        """What the broker refuses; "" if the next opening knows better, because it was a matter of
        who declared what how.

        A queue that the broker does not declare our way may be there all the same: the next opening
        asks for it as it is. If there is none, the broker's first answer is the trouble.
        """
        subject, otherwise = failed.subject, self._broker.declared.otherwise
        refusal = f"the broker closed the channel: {code} {text}"
        missing, differs = code == NOT_FOUND, code == PRECONDITION_FAILED
        if failed.method == spec.Queue.Bind and missing:
            self._broker.declared.forget_exchange(subject)  # it deleted itself with its last queue
        elif failed.method == spec.Queue.Declare and self._would_lose(subject, text):
            self._broker.declared.refuse(subject, text)
            LOG.warning("%s: %s", self.vm, _describe_refused(subject, text))
        elif failed.method == spec.Queue.Declare and differs and subject not in otherwise:
            self._broker.declared.note_otherwise(subject, text)
            LOG.warning("%s: %s", self.vm, _describe(subject, text))
        elif failed.method == spec.Queue.Declare and missing and subject in otherwise:
            words = otherwise.pop(subject)
            if not is_otherwise(words):
                return f"queue {subject} cannot be declared: {words}"
        else:
            return refusal
        self._repairs += 1
        return "" if self._repairs <= REPAIRS_MAX else refusal

    def _would_lose(self, queue: str, words: str) -> bool:
        """Whether a topic's own queue goes with its consumer, and with it what waits while the VM
        moves. The others' names are known to nobody who would declare them so."""
        topics_own = {each.name for each in self._consumers.values() if each.is_topics_own}
        return queue in topics_own and is_otherwise(words) and "'auto_delete'" in words

    # ---------------------------------------------------------------- what is wrong

    def _refuse(self, reason: str) -> None:
        """The channel is not as it should be, or ("") it is: tell, if that is news."""
        self._refusal = reason
        problems = [reason] if reason else []
        if not reason:
            declared, queues = (
                self._broker.declared,
                list(queues_of(self.vm, self._topics, self._owned)),
            )
            names = (own_queue(self.vm), *(queue.name for queue in queues))
            otherwise = declared.otherwise
            problems += [_describe(name, otherwise[name]) for name in names if name in otherwise]
            refused = declared.refused
            problems += [
                _describe_refused(name, refused[name]) for name in names if name in refused
            ]
            problems += declared.mismatches({queue.exchange for queue in queues})
        if tuple(problems) != self._told:
            self._told = tuple(problems)
            self._broker.post(Troubled(self.vm, self._told))

    def on_mismatch(self) -> None:
        """An exchange that somebody uses turned out to be declared otherwise."""
        if not self._refusal and self._phase is _Phase.OPEN:
            self._refuse("")

    # ---------------------------------------------------------------- ending

    def _close(self, reason: str, *, in_haste: bool = False) -> None:
        """Close the channel; the broker puts back, in order, what was not acknowledged."""
        assert self._channel is not None
        if not in_haste:
            self._refuse(reason)
        self._broker.opened(self)
        self._cancel_timer()
        self._phase, self._reason, self._in_haste = _Phase.CLOSING, reason, in_haste
        self._announce = self._announce or in_haste
        self._cancel_set_up()
        self._tokens_are_dead()
        self._channel.close_softly()
        self._waiting_since_s = self._broker.loop.time()

    def on_disconnected(self, reason: str) -> None:
        """The connection is gone, and the channel with it."""
        if self._phase is _Phase.WAITING:
            self._phase = _Phase.IDLE
        self._cancel_timer()
        self._failures = self._repairs = 0
        self._refusal, self._told = "", None  # the daemon forgets it as well
        self.completions.disconnected()
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
        self._tokens_are_dead()
        self._consumers.clear()
        announce, self._announce = self._announce, False
        if announce:
            self._broker.post(Released(self.vm, reason))
        self._rest()

    def _tokens_are_dead(self) -> None:
        self._leaves = False
        self._unacked.clear()
        self._steps.clear()
        self._unconfirmed.clear()
        self.completions.channel_ended()

    def _forget_if_unused(self) -> None:
        if not (self._is_wanted or self.completions):
            self._broker.forget(self)

    def _rest(self) -> None:
        """Without a channel: what next?"""
        in_haste, self._in_haste = self._in_haste, False
        if not self._is_wanted:
            self._cancel_timer()
            self._forget_if_unused()
        elif self._broker.link is None:
            pass  # the next connection opens it
        elif in_haste:
            self.open_in_turn()
        else:
            self._retry_later()

    def _retry_later(self) -> None:
        delay_s = back_off(self._failures, RETRY_MIN_S, RETRY_MAX_S)
        self._timer = self._broker.later(self.vm, delay_s, self._retry)
        self._failures += 1

    def _retry(self) -> None:
        self._timer = None
        self.open_in_turn()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Discarded:
    """Of a channel that its VM has failed on: waits for the end, to give its number back."""

    def on_method(self, inbound: Inbound) -> None:
        if inbound.method == spec.Channel.CloseOk:
            inbound.channel.collect()
        elif inbound.method == spec.Channel.Close:
            inbound.channel.closed_by_broker()

    def on_failure(self, fault: str) -> None:
        """Its number cannot be given back."""
        raise RuntimeError(fault)


def _body(content: Content) -> bytes:
    if content.size > BODY_BYTES_MAX:
        raise EnvelopeError(f"it has {content.size} bytes, {BODY_BYTES_MAX} are allowed")
    if content.properties.problem:
        raise EnvelopeError(content.properties.problem)
    kind = content.properties.headers.get(COMPRESSION_HEADER)
    return content.body if kind is None else expand(kind, content.body, BODY_BYTES_MAX)


def is_otherwise(words: str) -> bool:
    """Whether the broker's words of a 406 say that something was declared otherwise. AMQP has one
    code for that and for arguments which the broker does not know, or not together."""
    return "inequivalent arg" in words


def _describe_refused(queue: str, words: str) -> str:
    return (
        f"queue {queue} is not used: it deletes itself when its consumer goes, as in a migration, "
        f"and what waits in it is lost: {words}; unset amqp_auto_delete where the service declares "
        "it, and delete the queue"
    )


def _describe(queue: str, words: str) -> str:
    if not is_otherwise(words):
        return (
            f"queue {queue} is used as it is, for the broker does not declare it as asked: {words}"
        )
    text = f"queue {queue} was declared otherwise, and is used as it is: {words}"
    if "x-delivery-limit" in words:
        text += (
            "; RabbitMQ 4 drops what comes back to it for the 21st time: delete it once while the "
            "VM is idle, or set a policy with a delivery-limit"
        )
    return text


class Sweep:
    """Deletes one VM's queues, one after the other: those that are empty and that nobody uses.
    Notes and answers in its own queue are no use to anybody when the VM is gone.

    Not with the broker's own if-unused and if-empty: for a quorum queue that is an error, one that
    ends the connection.
    """

    def __init__(
        self,
        broker: BrokerForQueues,
        vm: str,
        topics: frozenset[Topic],
        owned: frozenset[Topic],
        on_done: _Done,
    ) -> None:
        self._broker = broker
        self.vm = vm
        self.topics = topics
        self._on_done = on_done
        queues = list(queues_of(vm, topics, owned))
        self._left = deque([own_queue(vm), *(queue.name for queue in queues)])
        self._left += [queue.lock for queue in queues if queue.is_topics_own]
        self._channel: AmqpChannel | None = None
        self._asked_at_s = 0.0

    def __str__(self) -> str:
        return f"{self.vm}: deleting queues"

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

    def on_failure(self, fault: str) -> None:
        """What is left expires."""
        self._end(fault)

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

    def _open(self) -> AmqpChannel:
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
