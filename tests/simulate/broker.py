"""The broker, and each host's connection to it: what RabbitMQ and `vchan.host.broker` promise.

Queues have a single active consumer. What a channel held goes back to its place when the channel
or the connection ends. A lost connection loses what was on its way, both ways; each end learns
of it in its own time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from tests.simulate.raw import RawCalls
from tests.simulate.reporting import Reporting
from tests.simulate.world import Fifo, World
from vchan.host.broker.completions import Completions
from vchan.host.broker.config import BrokerConfig
from vchan.host.broker.events import Completed, GivenUp, RepliesRefused, Token
from vchan.host.broker.vm_queues import OWN_PREFETCH, topic_arguments
from vchan.host.oslo_wire.downward_envelope import BrokerRequest, ReplyPublication
from vchan.host.oslo_wire.mail import Answer, own_queue, read_mail
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.host.policy.vm_limits import Limits
from vchan.io.loop import Timer
from vchan.rpc.messages import Topic

RETRY_S: Final = 0.7
AWAY_S: Final = (0.0, 0.0, 3.0, 12.0)
"""A broker whose connection was cut takes no new one for so long."""
TROUBLE: Final = 0.7
"""What a broker in trouble refuses."""
CONFIRM_S_MAX: Final = 0.5
"""Confirms of what is for several queues come in any order."""
RETURNS_MAX: Final = 3
"""A message of a quorum queue that was declared without a limit is dropped when it comes back once
more: RabbitMQ 4's own limit is 20, which few runs would reach."""
HEARTBEAT_S: Final = 12.0
"""At the latest after this, the broker knows that a peer is gone."""
BUSY_S: Final = 0.5
"""A host whose VM's topic's own queue another host still has tries again after about so long."""


class Message(NamedTuple):
    """As it was published. `place` is its place in its queue."""

    place: int
    request: BrokerRequest
    exchange: str
    fanout: bool
    expires_s: float | None
    tried: bool
    returns: int = 0
    """How often it has come back."""
    readable: bool = True
    """Else it is what no host can make a request of."""


class Letter(NamedTuple):
    """Likewise, in a VM's own queue."""

    place: int
    body: bytes
    tried: bool
    expires_s: float | None = None


class Delivered(NamedTuple):
    """As in vchan.host.broker.events."""

    vm: str
    token: Token
    request: BrokerRequest
    topic: Topic
    fanout: bool
    redelivered: bool


class Undecodable(NamedTuple):
    """As in vchan.host.broker.events."""

    vm: str
    token: Token


class Released(NamedTuple):
    """As in vchan.host.broker.events."""

    vm: str


class PublishResult(NamedTuple):
    """As in vchan.host.broker.events."""

    vm: str
    request_id: bytes
    ok: bool
    unroutable: bool
    reason: str
    in_doubt: bool = False


class Mail(NamedTuple):
    """As in vchan.host.broker.events."""

    vm: str
    token: Token
    body: bytes


Event = (
    Delivered | Undecodable | Mail | Released | PublishResult | Completed | RepliesRefused | GivenUp
)


class _Consumer:
    __slots__ = ("channel", "topic", "unacked")

    def __init__(self, channel: _ServerChannel, topic: Topic | None) -> None:
        self.channel = channel
        self.topic = topic
        self.unacked = 0


class Queue:
    """Messages in order, handed to one consumer at a time."""

    def __init__(
        self, broker: Broker, name: str, vm: str, *, fanout: bool, is_topics_own: bool = False
    ) -> None:
        self.name = name
        self.vm = vm
        self.fanout = fanout
        self.is_topics_own = is_topics_own
        self._broker = broker
        self.ready: deque[Message | Letter] = deque()
        self.consumers: deque[_Consumer] = deque()
        self.unacked: dict[int, int] = {}  # channel number: messages out on it

    def publish(self, message: Message | Letter) -> None:
        """Put it last."""
        self.ready.append(message)
        self.hand_out()

    def put_back(self, messages: list[Message | Letter]) -> None:
        """Into their places."""
        if messages:
            merged = sorted([*self.ready, *messages], key=lambda message: message.place)
            self.ready = deque(merged)
        self.hand_out()

    def hand_out(self) -> None:
        """As much as the active consumer may have."""
        broker = self._broker
        while self.ready and self.consumers:
            consumer = self.consumers[0]
            if consumer.unacked >= (broker.prefetch if consumer.topic else OWN_PREFETCH):
                return
            message = self.ready.popleft()
            if message.expires_s is not None and message.expires_s <= broker.world.now_s:
                broker.world.stats["expired in the broker"] += 1
                broker.forget(message, consumer.channel.vm)
                continue
            others = [number for number in self.unacked if number != consumer.channel.number]
            if others:
                broker.world.fail(
                    f"{self.name}: handed to channel {consumer.channel.number} while channel "
                    f"{others[0]} holds messages unacknowledged"
                )
            broker.check(message, consumer.channel.vm)
            consumer.unacked += 1
            number = consumer.channel.number
            self.unacked[number] = self.unacked.get(number, 0) + 1
            consumer.channel.deliver(self, consumer, message)

    @property
    def holds_something(self) -> bool:
        """More than what hosts tell each other in a VM's own queue."""
        held = list(self.ready)
        for consumer in self.consumers:
            held += consumer.channel.out(self)
        return any(
            isinstance(message, Message) or isinstance(read_mail(message.body), Answer)
            for message in held
        )

    def returned(self, channel: _ServerChannel, count: int) -> None:
        """So many are out no longer."""
        left = self.unacked.get(channel.number, 0) - count
        if left > 0:
            self.unacked[channel.number] = left
        else:
            self.unacked.pop(channel.number, None)


class _ServerChannel:
    """A channel as the broker sees it."""

    def __init__(self, connection: _ServerConnection, vm: str, generation: int) -> None:
        broker = connection.broker
        broker.channels += 1
        self.number = broker.channels
        self.vm = vm
        self.generation = generation
        self._connection = connection
        self._tag = 0
        self._out: dict[int, tuple[Queue, _Consumer, Message | Letter]] = {}
        self._consuming: list[tuple[Queue, _Consumer]] = []

    def consume(self, topics: tuple[Topic, ...], owned: frozenset[Topic]) -> bool:
        """False: another channel still has a topic's own queue, whose lock one channel has at a
        time, and the broker closes this one."""
        broker = self._connection.broker
        for topic in topics:
            for queue in broker.declare(self.vm, topic, is_owned=topic in owned):
                if queue.is_topics_own and queue.consumers:
                    broker.world.stats["topics' own queues that were busy"] += 1
                    return False
                self._start(queue, topic)
        return True

    def listen(self) -> None:
        self._start(self._connection.broker.declare_own(self.vm), None)

    def _start(self, queue: Queue, topic: Topic | None) -> None:
        consumer = _Consumer(self, topic)
        self._consuming.append((queue, consumer))
        queue.consumers.append(consumer)
        queue.hand_out()

    def deliver(self, queue: Queue, consumer: _Consumer, message: Message | Letter) -> None:
        self._tag += 1
        self._out[self._tag] = (queue, consumer, message)
        if message.tried:
            self._connection.broker.world.stats["redeliveries"] += 1
        token = Token(self.vm, self.generation, self._tag)
        event: Delivered | Undecodable | Mail
        if isinstance(message, Message) and not message.readable:
            self._connection.broker.world.stats["messages nobody can read"] += 1
            event = Undecodable(self.vm, token)
        elif isinstance(message, Letter):
            event = Mail(self.vm, token, message.body)
        else:
            assert consumer.topic is not None
            topic = Topic(message.exchange, consumer.topic.name)
            event = Delivered(self.vm, token, message.request, topic, queue.fanout, message.tried)
        self._connection.down.push(("event", self.generation, event))

    def out(self, queue: Queue) -> list[Message | Letter]:
        """What it has of this queue."""
        return [message for origin, _, message in self._out.values() if origin is queue]

    def ack(self, tag: int) -> None:
        held = self._out.pop(tag, None)
        if held is None:
            self._connection.broker.world.fail(f"channel {self.number}: tag {tag} acked twice")
            return
        queue, consumer, message = held
        self._connection.broker.forget(message, self.vm)
        consumer.unacked -= 1
        queue.returned(self, 1)
        queue.hand_out()

    def cancel(self) -> None:
        """What must not be used: the consumers go, the messages stay out."""
        for queue, consumer in self._consuming:
            queue.consumers.remove(consumer)
            queue.hand_out()
        self._consuming.clear()

    def close(self) -> None:
        back: dict[Queue, list[Message | Letter]] = {}
        broker = self._connection.broker
        for queue, _, message in self._out.values():
            queue.returned(self, 1)
            if isinstance(message, Message) and message.returns >= broker.returns_max:
                broker.drop(message, queue)
                continue
            if isinstance(message, Message):
                message = message._replace(returns=message.returns + 1)
            back.setdefault(queue, []).append(message._replace(tried=True))
        self._out.clear()
        queues = [queue for queue, _ in self._consuming]
        for queue, consumer in self._consuming:
            queue.consumers.remove(consumer)
        self._consuming.clear()
        for queue in [*back, *queues]:
            queue.put_back(back.pop(queue, []))


class _ServerConnection:
    """A connection as the broker sees it."""

    def __init__(self, broker: Broker, receive: Callable[[Any], None]) -> None:
        self.broker = broker
        self.up = Fifo(broker.world, self._on_command)
        self.down = Fifo(broker.world, receive)
        self.closed = False
        self._channels: dict[int, _ServerChannel] = {}

    def _on_command(self, command: tuple[Any, ...]) -> None:
        if self.closed:
            return
        what, generation, *rest = command
        if what == "open":
            vm, topics, owned, listens = rest
            channel = self._channels[generation] = _ServerChannel(self, vm, generation)
            if listens:
                channel.listen()
            self._consume(channel, topics, owned)
        elif what == "close":
            if generation in self._channels:
                self._channels.pop(generation).close()
            self.down.push(("closed", generation, rest[0]))
        elif what in ("consume", "listen", "ack", "cancel"):
            if generation in self._channels:  # else the broker has closed it, and says so
                self._on_channel(self._channels[generation], what, *rest)
        elif what == "bye":
            self.close()
        elif what == "barrier":
            self.down.push(("proved", generation, rest[0]))
        elif what == "request":
            self._on_request(*rest)
        else:
            reply, number = rest
            ok = not self.broker.refuses_now()
            if ok:
                self.broker.check_refusal(reply)
                self.broker.answer(reply.reply_q, reply.body)
            else:
                self.broker.world.stats["replies refused by the broker"] += 1
            self.down.push(("confirmed", None, (number, "" if ok else "refused")))

    def _on_channel(self, channel: _ServerChannel, what: str, *rest: Any) -> None:
        if what == "consume":
            self._consume(channel, *rest)
        elif what == "listen":
            channel.listen()
        elif what == "ack":
            channel.ack(rest[0])
        else:
            channel.cancel()

    def _consume(
        self, channel: _ServerChannel, topics: tuple[Topic, ...], owned: frozenset[Topic]
    ) -> None:
        if not channel.consume(topics, owned):
            self._channels.pop(channel.generation).close()
            self.down.push(("busy", channel.generation, channel.vm))

    def _on_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        broker, rng = self.broker, self.broker.world.rng
        if broker.refuses_now():
            broker.world.stats["guests' requests refused by the broker"] += 1
            broker.refused.add(request_id)
            if publication.form is Form.MAIL:
                broker.losses.append(broker.world.now_s)
            broker.doubted.add(request_id)
            sent = PublishResult(
                vm, request_id, ok=False, unroutable=False, reason="refused", in_doubt=True
            )
        else:
            is_there = broker.take(publication)
            is_told = publication.mandatory or publication.form is Form.NOTIFY
            returned = is_told and not is_there
            sent = PublishResult(
                vm, request_id, not returned, returned, "returned" if returned else ""
            )
            if rng.random() < broker.doubts:
                # As when the channel ends before the confirm has come.
                broker.doubted.add(request_id)
                broker.world.stats["guests' requests in doubt"] += 1
                sent = PublishResult(
                    vm, request_id, ok=False, unroutable=False, reason="channel lost", in_doubt=True
                )
        if rng.random() < (TROUBLE if broker.in_trouble else broker.late_confirms):
            broker.world.stats["confirms that came late"] += 1
            delay_s = rng.random() * CONFIRM_S_MAX
            broker.world.after(delay_s, self.down.push, ("event", None, sent))
        else:
            self.down.push(("event", None, sent))

    def close(self) -> None:
        """The broker knows that the connection is gone."""
        if not self.closed:
            self.closed = True
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()


class Broker:
    """The server."""

    def __init__(self, world: World, prefetch: int) -> None:
        self.world = world
        self.raw = RawCalls(world)
        """What never comes here: hosts and VMs share it as they share this."""
        self.prefetch = prefetch
        self.channels = 0
        self.queues: dict[str, Queue] = {}
        self.reply_queues: dict[str, Fifo] = {}
        self.refuses = 0.0
        """How often it refuses to take something: out of disk, or the queue's leader is away."""
        self.away_s: tuple[float, ...] = AWAY_S
        self.trouble_until_s = 0.0
        """Until then it refuses most of it."""
        self.doubts = 0.0
        """How often it takes a guest's request, and its host does not hear of that."""
        self.late_confirms = 0.0
        """How often the confirm of a guest's request comes after those of later ones."""
        self.guests_may_ask = True
        """The hosts' policy."""
        self.refused_calls: set[bytes] = set()
        """Calls whose callers were to hear that they have not run."""
        self.refusals: dict[bytes, tuple[bytes, str]] = {}
        """Their requests and VMs, by what the callers are told."""
        self.limits = Limits()
        """Likewise."""
        self.refused: set[bytes] = set()
        """Guests' requests that it refused."""
        self.lost: set[bytes] = set()
        """Guests' requests that were under way on a connection that is no more."""
        self.doubted: set[bytes] = set()
        """Guests' requests of which a host does not know whether the broker has them."""
        self.flights: dict[bytes, list[tuple[list[bytes], int]]] = {}
        """Guests' requests by where they stand in what their host published at a stretch, each time
        that it did."""
        self.given_up: set[bytes] = set()
        """Guests' requests whose time was up by a host's clock; theirs may have stood still."""
        self.losses: list[float] = []
        """When a host's daemon, its connection or its note was lost."""
        self.moves: list[tuple[float, str, str]] = []
        """When a VM's guest "comes" to a host, "goes", is "silent", is "heard" again."""
        self.owned: dict[Topic, str] = {}
        """Topics that belong to a VM: what is sent there names no server."""
        self._services: dict[tuple[str, str], list[Fifo]] = {}  # by exchange and routing key
        self.reporting = Reporting(world, self)
        """What guests report: hosts and VMs share it likewise."""
        self._copies: dict[tuple[bytes, str], int] = {}  # in the broker now
        self._published: Counter[tuple[bytes, str]] = Counter()
        self.settled: set[tuple[bytes, str]] = set()
        """What was proved to be forgotten: it may never be handed out again."""
        self._place = 0
        self._nonsense = 0
        arguments = topic_arguments(BrokerConfig(hosts=(), quorum=True), fanout=False)
        self.returns_max: int = arguments.get("x-delivery-limit", RETURNS_MAX)
        """What hosts declare their queues with: they are quorum queues."""

    def refuses_now(self) -> bool:
        """Whether it takes nothing just now."""
        return self.world.rng.random() < (TROUBLE if self.in_trouble else self.refuses)

    @property
    def in_trouble(self) -> bool:
        """Out of disk, or a queue's leader is away: it refuses, and is slow about it."""
        return self.world.now_s < self.trouble_until_s

    def declare(self, vm: str, topic: Topic, *, is_owned: bool) -> list[Queue]:
        """The VM's queues for a topic."""
        queues = [
            self._queue(f"{topic.name}.{vm}", vm, fanout=False),
            self._queue(f"{topic.name}_fanout_{vm}", vm, fanout=True),
        ]
        if is_owned:
            queues.insert(0, self._queue(topic.name, vm, fanout=False, is_topics_own=True))
        return queues

    def declare_own(self, vm: str) -> Queue:
        """The VM's own queue."""
        return self._queue(own_queue(vm), vm, fanout=False)

    def bind(self, exchange: str, routing_key: str, service: Fifo) -> None:
        """A service on the control side gets what guests publish there, as a Publication."""
        self._services.setdefault((exchange, routing_key), []).append(service)

    def take(self, publication: Publication) -> bool:
        """To the services, or a VM's own queue. False: there is no such queue."""
        self.world.stats[f"guests' requests published: {publication.form}"] += 1
        address = publication.address
        if publication.form is Form.MAIL:
            return self.answer(publication.routing_key, publication.body)
        for service in self._services.get(address, []):
            service.push(publication)
        return address in self._services

    def _queue(self, name: str, vm: str, *, fanout: bool, is_topics_own: bool = False) -> Queue:
        queue = self.queues.get(name)
        if queue is None:
            queue = Queue(self, name, vm, fanout=fanout, is_topics_own=is_topics_own)
            self.queues[name] = queue
        return queue

    def publish(self, request: BrokerRequest, topic: Topic, vm: str, *, fanout: bool) -> bool:
        """To a VM's queue, or all VMs'. False: there is no such queue."""
        if fanout:
            targets = [
                queue
                for name, queue in self.queues.items()
                if queue.fanout and name.startswith(f"{topic.name}_fanout_")
            ]
        else:
            name = topic.name if topic in self.owned else f"{topic.name}.{vm}"
            targets = [self.queues[name]] if name in self.queues else []
        for queue in targets:
            self._place += 1
            expires_s = None
            if request.timeout_s is not None:
                expires_s = self.world.now_s + request.timeout_s
            key = (request.id, queue.vm)
            self._published[key] += 1
            self._copies[key] = self._copies.get(key, 0) + 1
            self.settled.discard(key)
            queue.publish(
                Message(self._place, request, topic.exchange, fanout, expires_s, tried=False)
            )
        return bool(targets)

    def publish_nonsense(self, vm: str, topic: Topic) -> None:
        """What no host can make a request of, into a VM's queue. It must cost nobody anything."""
        queue = self.queues.get(f"{topic.name}.{vm}")
        if queue is not None:
            self._place += 1
            self._nonsense += 1
            request = _nonsense(self._nonsense)
            self._copies[request.id, vm] = 1
            queue.publish(
                Message(
                    self._place, request, topic.exchange, False, None, tried=False, readable=False
                )
            )

    def check(self, message: Message | Letter, vm: str) -> None:
        """It is about to be handed out."""
        if isinstance(message, Message) and (message.request.id, vm) in self.settled:
            self.world.fail(f"{vm}: {_short(message)} handed out after Settled")

    def drop(self, message: Message, queue: Queue) -> None:
        """It came back too often: RabbitMQ says nothing, and a cast may be lost by that."""
        self.world.fail(
            f"{queue.name}: {_short(message)} dropped at its return {message.returns + 1}"
        )
        self.forget(message, queue.vm)

    def forget(self, message: Message | Letter, vm: str) -> None:
        """It was acknowledged, or has expired."""
        if isinstance(message, Message):
            self._copies[message.request.id, vm] -= 1

    def may_overtake(self, later: bytes, earlier: bytes) -> bool:
        """Whether a request that was refused or lost with its connection went out at a stretch with
        this later one, so that its host could not have heard of that in time."""
        return (earlier in self.refused or earlier in self.lost) and any(
            later in flight[place + 1 :] for flight, place in self.flights.get(earlier, ())
        )

    def leftovers(self) -> list[str]:
        """Queues that still hold something."""
        return [name for name, queue in self.queues.items() if queue.holds_something]

    def settle(self, request_id: bytes, vm: str) -> None:
        """A host was told that the broker has forgotten this."""
        key = (request_id, vm)
        if self._published[key] == 1:  # else its caller published it again
            self.settled.add(key)
            if self._copies[key]:
                self.world.fail(f"{request_id.hex()[:8]}: settled, and the broker still has it")

    def check_refusal(self, reply: ReplyPublication) -> None:
        """A caller hears that its call has not run: it must not come again."""
        key = self.refusals.get(reply.body) if reply.has_not_run else None
        if key is not None and self._published[key] == 1 and self._copies[key]:
            self.world.fail(f"{key[0].hex()[:8]}: refused, and the broker still has it")

    def answer(self, reply_q: str, body: bytes) -> bool:
        """To a caller's queue, or a VM's own. False: there is no such queue."""
        caller, own = self.reply_queues.get(reply_q), self.queues.get(reply_q)
        if caller is not None:
            caller.push(body)
        elif own is not None:
            self._place += 1
            own.publish(Letter(self._place, body, tried=False))
        return caller is not None or own is not None


class _VmState:
    """One VM on one host: as `vchan.host.broker.vm_queues.VmQueues`."""

    def __init__(self, host: HostBroker, vm: str) -> None:
        self.topics: frozenset[Topic] = frozenset()
        self.owned: frozenset[Topic] = frozenset()
        self.listens = False
        self.generation = 0  # 0: no channel
        self.closing = 0
        self.leaves = False
        self.unacked: set[int] = set()
        self.proofs: deque[Callable[[], None]] = deque()
        self.completions = Completions(host, self, vm)
        self._host = host
        self._vm = vm

    def holds(self, token: Token) -> bool:
        """See vchan.host.broker.completions.Tokens."""
        is_open = token.generation == self.generation and not self.closing
        return is_open and token.tag in self.unacked

    def acknowledge(self, token: Token) -> None:
        """See vchan.host.broker.completions.Tokens."""
        self._host.ack(token)

    def prove(self, proved: Callable[[], None]) -> None:
        """See vchan.host.broker.completions.Tokens."""
        self.proofs.append(proved)
        self._host.say("barrier", self.generation, self._vm)

    def completed(self) -> None:
        """See vchan.host.broker.completions.Tokens."""
        is_open = self.generation and not self.closing
        if is_open and self.leaves and not self.completions.waits_for_proof:
            self._host.close(self._vm, self)

    def ended(self) -> None:
        """No token means anything any more."""
        self.leaves = False
        self.unacked.clear()
        self.proofs.clear()
        self.completions.channel_ended()


class HostBroker:
    """A host daemon's side: `vchan.host.broker.broker.Broker`, as far as a VM sees it.

    Args:
        post: Told the events, on the broker's thread.
    """

    def __init__(self, world: World, broker: Broker, post: Callable[[Event], None]) -> None:
        self._world = world
        self._broker = broker
        self.post: Callable[[Any], None] = post
        self._vms: dict[str, _VmState] = {}
        self._generations = 0
        self._connection: _ServerConnection | None = None
        self._replies: dict[int, Callable[[str, bool], None]] = {}  # not confirmed
        self._number = 0
        self._sending: deque[tuple[str, bytes]] = deque()  # of each VM, in order
        self._dead = False
        self.cancels_consumers = False
        """A planted bug: see tests/planted."""
        world.after(world.rng.random() * 0.1, self._connect)

    # ------------------------------------------------------------ a VM's commands

    def _state(self, vm: str) -> _VmState:
        if vm not in self._vms:
            self._vms[vm] = _VmState(self, vm)
        return self._vms[vm]

    def consume(self, vm: str, topics: frozenset[Topic], owned: frozenset[Topic]) -> None:
        """See vchan.host.vm.downward.BrokerPort."""
        state = self._state(vm)
        had, state.topics = state.topics, topics
        state.owned = owned
        if state.generation and not state.closing:
            if had - topics:
                state.leaves = True
                state.completed()
            elif topics - had:
                self.say("consume", state.generation, tuple(sorted(topics - had)), owned)
        else:
            self._open(vm, state)

    def release(self, vm: str, *, for_good: bool = False) -> None:
        """See vchan.host.vm.downward.BrokerPort."""
        state = self._state(vm)
        state.topics, state.listens = frozenset(), False
        if for_good:
            state.completions.abandon()
        if state.generation and not state.closing:
            self.close(vm, state)
        elif not state.closing:
            self.post(Released(vm))

    def complete(
        self,
        vm: str,
        request_id: bytes,
        tokens: tuple[Token, ...],
        reply: ReplyPublication | None = None,
    ) -> None:
        """See vchan.host.vm.downward.BrokerPort."""
        self._state(vm).completions.complete(request_id, tokens, reply)

    def ack(self, token: Token) -> None:
        """See vchan.host.vm.downward.BrokerPort."""
        state = self._state(token.vm)
        if token.generation != state.generation or state.closing:
            self._world.stats["acks of dead tokens"] += 1
            return
        if token.tag in state.unacked:
            state.unacked.discard(token.tag)
            self.say("ack", state.generation, token.tag)

    def publish_heartbeat(self, reply_q: str, body: bytes) -> None:
        """See vchan.host.vm.downward.BrokerPort."""
        self._publish(ReplyPublication(reply_q, body), lambda *_: None)

    # ------------------------------------------------------------ for what is completed

    def time(self) -> float:
        """See vchan.host.broker.completions.BrokerThread."""
        return self._world.now_s

    def later(self, vm: str, delay_s: float, work: Callable[[], None]) -> Timer:
        """See vchan.host.broker.completions.BrokerThread."""
        timer = Timer(self._world.now_s + delay_s, work, self)
        self._world.at(timer.at_s, self._fire, timer)
        return timer

    def timer_cancelled(self) -> None:
        """See vchan.io.loop: it stays in the world's plan until its time comes."""

    def _fire(self, timer: Timer) -> None:
        if not self._dead:
            timer._run()

    def publish_reply(
        self, vm: str, reply: ReplyPublication, told: Callable[[str, bool], None]
    ) -> None:
        """See vchan.host.broker.completions.BrokerThread."""
        self._publish(reply, told)

    def _publish(self, reply: ReplyPublication, told: Callable[[str, bool], None]) -> None:
        if self._connection is None:
            told("not connected", False)
            return
        self._number += 1
        self._replies[self._number] = told
        self.say("publish", None, reply, self._number)

    # ------------------------------------------------------------ guests' requests

    def listen_for_answers(self, vm: str) -> None:
        """See vchan.host.broker.broker.Broker."""
        state = self._state(vm)
        had, state.listens = state.listens, True
        if not state.generation:
            self._open(vm, state)
        elif not state.closing and not had:
            self.say("listen", state.generation)

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        """See vchan.host.broker.broker.Broker."""
        if self._connection is None:
            self.post(
                PublishResult(vm, request_id, ok=False, unroutable=False, reason="not connected")
            )
            return
        self._sending.append((vm, request_id))
        self.say("request", None, vm, request_id, publication)

    # ------------------------------------------------------------ channels

    def say(self, *command: Any) -> None:
        """To the broker, if there is a connection."""
        if self._connection is not None:
            self._connection.up.push(command)

    def _open(self, vm: str, state: _VmState) -> None:
        wanted = bool(state.topics) or state.listens
        if wanted and self._connection is not None and not (state.generation or self._dead):
            self._generations += 1
            state.generation = self._generations
            wants = (tuple(sorted(state.topics)), state.owned, state.listens)
            self.say("open", state.generation, vm, *wants)

    def close(self, vm: str, state: _VmState) -> None:
        """Close the VM's channel."""
        if self.cancels_consumers:
            self.say("cancel", state.generation)
            state.generation = 0
            state.ended()
            self.post(Released(vm))
            return
        state.closing = state.generation
        state.ended()
        self.say("close", state.generation, vm)

    def _busy(self, vm: str, generation: int) -> None:
        """As VmQueues when the broker closes its channel."""
        state = self._vms[vm]
        if state.generation != generation or state.closing:
            return
        state.generation = 0
        state.ended()
        self.post(Released(vm))
        delay_s = BUSY_S * (0.5 + self._world.rng.random())
        self._world.after(delay_s, self._open, vm, state)

    def _closed(self, vm: str) -> None:
        state = self._vms[vm]
        state.generation = state.closing = 0
        state.ended()
        self.post(Released(vm))
        self._open(vm, state)

    # ------------------------------------------------------------ the connection

    def _connect(self) -> None:
        if self._dead or self._connection is not None:
            return
        connection: list[_ServerConnection] = []
        made = _ServerConnection(self._broker, lambda item: self._receive(connection[0], item))
        connection.append(made)
        self._connection = made
        for vm, state in self._vms.items():
            self._open(vm, state)

    def _receive(self, connection: _ServerConnection, item: tuple[Any, ...]) -> None:
        if connection is not self._connection:
            return
        what, generation, event = item
        if what == "closed":
            self._closed(event)
        elif what == "busy":
            self._busy(event, generation)
        elif what == "confirmed":
            number, problem = event
            self._replies.pop(number)(problem, False)
        elif what == "proved":
            state = self._vms[event]
            if state.generation == generation and not state.closing:
                state.proofs.popleft()()
        elif isinstance(event, PublishResult):
            self._sending.remove((event.vm, event.request_id))
            self.post(event)
        else:
            state = self._vms[event.vm]
            if state.generation == generation and not state.closing:
                if isinstance(event, Delivered | Undecodable | Mail):
                    if state.leaves:
                        return  # it goes back when the channel is closed
                    state.unacked.add(event.token.tag)
                self.post(event)

    def cut(self) -> None:
        """The network breaks: what is on its way is lost, and each end learns of it later."""
        connection, rng = self._connection, self._world.rng
        if connection is None or connection.up.cut_s is not None:
            return
        self._world.note("a broker connection is cut")
        self._broker.losses.append(self._world.now_s)
        now_s = self._world.now_s
        connection.up.cut_s = now_s + rng.random() * 0.002
        connection.down.cut_s = now_s + rng.random() * 0.002
        self._world.after(rng.random() * rng.choice((0.01, 1.0, HEARTBEAT_S)), connection.close)
        self._world.after(
            rng.random() * rng.choice((0.01, 1.0, HEARTBEAT_S)), self._lost, connection
        )

    def _lost(self, connection: _ServerConnection) -> None:
        if self._connection is not connection or self._dead:
            return
        self._connection = None
        self._broker.losses.append(self._world.now_s)
        for vm, state in self._vms.items():
            if state.generation:
                state.generation = state.closing = 0
                state.ended()
                self.post(Released(vm))
        replies, self._replies = self._replies, {}
        for told in replies.values():
            told("connection lost", False)
        sending, self._sending = self._sending, deque()
        self._broker.lost.update(request_id for _, request_id in sending)
        for vm, request_id in sending:
            self.post(
                PublishResult(
                    vm,
                    request_id,
                    ok=False,
                    unroutable=False,
                    reason="connection lost",
                    in_doubt=True,
                )
            )
        rng = self._world.rng
        self._world.after(
            RETRY_S * (0.5 + rng.random()) + rng.choice(self._broker.away_s), self._connect
        )

    def die(self, *, host_too: bool) -> None:
        """The daemon is gone. Its kernel says so, unless that is gone, too."""
        self._dead = True
        self._broker.losses.append(self._world.now_s)
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if host_too:
            connection.up.cut_s = self._world.now_s
            self._world.after(HEARTBEAT_S * self._world.rng.random(), connection.close)
        else:
            connection.up.push(("bye", None))


def _short(message: Message) -> str:
    return message.request.id.hex()[:8]


def _nonsense(number: int) -> BrokerRequest:
    """Stands for it in the broker's books."""
    return BrokerRequest(
        id=b"nonsense" + number.to_bytes(8),
        method="",
        args={},
        namespace=None,
        version=None,
        context={},
        msg_id=None,
        reply_q=None,
        monitor_timeout_s=None,
        timeout_s=None,
    )
