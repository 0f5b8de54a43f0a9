"""The broker, and each host's connection to it: what RabbitMQ and `vchan.host.broker` promise.

Queues have a single active consumer. What a channel held goes back to its place when the channel
or the connection ends. A lost connection loses what was on its way, both ways; each end learns
of it in its own time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from tests.simulate.world import Fifo, World
from vchan.host.broker_events import Form, Publication
from vchan.host.broker_vm import OWN_PREFETCH, own_queue
from vchan.host.envelope import BrokerRequest
from vchan.host.upward_envelope import Answer, read_mail
from vchan.messages import Topic

RETRY_S: Final = 0.7
HEARTBEAT_S: Final = 12.0
"""At the latest after this, the broker knows that a peer is gone."""


class Message(NamedTuple):
    """As it was published. `place` is its place in its queue."""

    place: int
    request: BrokerRequest
    exchange: str
    fanout: bool
    expires_s: float | None
    tried: bool


class Letter(NamedTuple):
    """Likewise, in a VM's own queue."""

    place: int
    body: bytes
    tried: bool
    expires_s: float | None = None


class Token(NamedTuple):
    """As in vchan.host.broker_events."""

    vm: str
    generation: int
    tag: int


class Delivered(NamedTuple):
    """As in vchan.host.broker_events."""

    vm: str
    token: Token
    request: BrokerRequest
    topic: Topic
    fanout: bool
    redelivered: bool


class Released(NamedTuple):
    """As in vchan.host.broker_events."""

    vm: str


class Published(NamedTuple):
    """As in vchan.host.broker_events."""

    key: bytes
    ok: bool


class Settled(NamedTuple):
    """As in vchan.host.broker_events."""

    vm: str
    ids: tuple[bytes, ...]


class Sent(NamedTuple):
    """As in vchan.host.broker_events."""

    vm: str
    request_id: bytes
    ok: bool
    unroutable: bool
    reason: str
    in_doubt: bool = False


class Mail(NamedTuple):
    """As in vchan.host.broker_events."""

    vm: str
    token: Token
    body: bytes


Event = Delivered | Mail | Released | Published | Sent | Settled


class _Consumer:
    __slots__ = ("channel", "topic", "unacked")

    def __init__(self, channel: _ServerChannel, topic: Topic | None) -> None:
        self.channel = channel
        self.topic = topic
        self.unacked = 0


class Queue:
    """Messages in order, handed to one consumer at a time."""

    def __init__(self, broker: Broker, name: str, vm: str, *, fanout: bool) -> None:
        self.name = name
        self.vm = vm
        self.fanout = fanout
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

    def consume(self, topics: tuple[Topic, ...]) -> None:
        broker = self._connection.broker
        for topic in topics:
            for queue in broker.declare(self.vm, topic):
                self._start(queue, topic)

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
        event: Delivered | Mail
        if isinstance(message, Letter):
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
        for queue, _, message in self._out.values():
            back.setdefault(queue, []).append(message._replace(tried=True))
            queue.returned(self, 1)
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
            vm, topics, listens = rest
            channel = self._channels[generation] = _ServerChannel(self, vm, generation)
            if listens:
                channel.listen()
            channel.consume(topics)
        elif what == "consume":
            self._channels[generation].consume(rest[0])
        elif what == "listen":
            self._channels[generation].listen()
        elif what == "ack":
            self._channels[generation].ack(rest[0])
        elif what == "cancel":
            self._channels[generation].cancel()
        elif what == "close":
            self._channels.pop(generation).close()
            self.down.push(("closed", generation, rest[0]))
        elif what == "bye":
            self.close()
        elif what == "barrier":
            self.down.push(("event", generation, Settled(*rest)))
        elif what == "request":
            self._on_request(*rest)
        else:
            reply_q, body, key = rest
            ok = self.broker.world.rng.random() >= self.broker.refuses
            if ok:
                self.broker.answer(reply_q, body)
            else:
                self.broker.world.stats["replies refused by the broker"] += 1
            self.down.push(("event", None, Published(key, ok=ok)))

    def _on_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        broker, rng = self.broker, self.broker.world.rng
        if rng.random() < broker.refuses:
            broker.world.stats["guests' requests refused by the broker"] += 1
            broker.refused.add(request_id)
            if publication.form is Form.MAIL:
                broker.losses.append(broker.world.now_s)
            broker.doubted.add(request_id)
            sent = Sent(vm, request_id, ok=False, unroutable=False, reason="refused", in_doubt=True)
        else:
            is_there = broker.take(publication)
            returned = publication.mandatory and not is_there
            sent = Sent(vm, request_id, not returned, returned, "returned" if returned else "")
            if rng.random() < broker.doubts:
                # As when the channel ends before the confirm has come.
                broker.doubted.add(request_id)
                broker.world.stats["guests' requests in doubt"] += 1
                sent = Sent(
                    vm, request_id, ok=False, unroutable=False, reason="channel lost", in_doubt=True
                )
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
        self.prefetch = prefetch
        self.channels = 0
        self.queues: dict[str, Queue] = {}
        self.reply_queues: dict[str, Fifo] = {}
        self.refuses = 0.0
        """How often it refuses to take something: out of disk, or the queue's leader is away."""
        self.doubts = 0.0
        """How often it takes a guest's request, and its host does not hear of that."""
        self.guests_may_ask = True
        """The hosts' policy."""
        self.refused: set[bytes] = set()
        """Guests' requests that it refused."""
        self.doubted: set[bytes] = set()
        """Guests' requests of which a host does not know whether the broker has them."""
        self.given_up: set[bytes] = set()
        """Guests' requests whose time was up by a host's clock; theirs may have stood still."""
        self.losses: list[float] = []
        """When a host's daemon, its connection or its note was lost."""
        self.moves: list[tuple[float, str, bool]] = []
        """When a VM's guest began to talk to a host (True), or ended (False)."""
        self._services: dict[tuple[str, str], list[Fifo]] = {}  # by exchange and routing key
        self._notifications: dict[tuple[str, str], list[Publication]] = {}  # nobody listens yet
        self._copies: dict[tuple[bytes, str], int] = {}  # in the broker now
        self._published: Counter[tuple[bytes, str]] = Counter()
        self.settled: set[tuple[bytes, str]] = set()
        """What was proved to be forgotten: it may never be handed out again."""
        self._place = 0

    def declare(self, vm: str, topic: Topic) -> tuple[Queue, Queue]:
        """The VM's queues for a topic."""
        return (
            self._queue(f"{topic.name}.{vm}", vm, fanout=False),
            self._queue(f"{topic.name}_fanout_{vm}", vm, fanout=True),
        )

    def declare_own(self, vm: str) -> Queue:
        """The VM's own queue."""
        return self._queue(own_queue(vm), vm, fanout=False)

    def bind(self, exchange: str, routing_key: str, service: Fifo) -> None:
        """A service on the control side gets what guests publish there, as a Publication."""
        address = (exchange, routing_key)
        self._services.setdefault(address, []).append(service)
        for publication in self._notifications.pop(address, []):
            service.push(publication)

    def take(self, publication: Publication) -> bool:
        """To the services, or a VM's own queue. False: there is no such queue."""
        self.world.stats[f"guests' requests published: {publication.form}"] += 1
        address = publication.address
        if publication.form is Form.MAIL:
            return self.answer(publication.routing_key, publication.body)
        for service in self._services.get(address, []):
            service.push(publication)
        if publication.form is Form.NOTIFY and address not in self._services:
            self._notifications.setdefault(address, []).append(publication)
            return True
        return address in self._services

    def _queue(self, name: str, vm: str, *, fanout: bool) -> Queue:
        queue = self.queues.get(name)
        if queue is None:
            queue = self.queues[name] = Queue(self, name, vm, fanout=fanout)
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
            one = self.queues.get(f"{topic.name}.{vm}")
            targets = [one] if one is not None else []
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

    def check(self, message: Message | Letter, vm: str) -> None:
        """It is about to be handed out."""
        if isinstance(message, Message) and (message.request.id, vm) in self.settled:
            self.world.fail(f"{vm}: {_short(message)} handed out after Settled")

    def forget(self, message: Message | Letter, vm: str) -> None:
        """It was acknowledged, or has expired."""
        if isinstance(message, Message):
            self._copies[message.request.id, vm] -= 1

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
    """One VM on one host: as `vchan.host.broker_vm.Vm`."""

    __slots__ = ("closing", "generation", "listens", "topics", "unacked")

    def __init__(self) -> None:
        self.topics: frozenset[Topic] = frozenset()
        self.listens = False
        self.generation = 0  # 0: no channel
        self.closing = 0
        self.unacked: set[int] = set()


class HostBroker:
    """A host daemon's side: `vchan.host.broker.Broker`, as far as a relay sees it.

    Args:
        post: Told the events, on the broker's thread.
    """

    def __init__(self, world: World, broker: Broker, post: Callable[[Event], None]) -> None:
        self._world = world
        self._broker = broker
        self._post = post
        self._vms: dict[str, _VmState] = {}
        self._generations = 0
        self._connection: _ServerConnection | None = None
        self._unconfirmed: dict[bytes, int] = {}
        self._sending: deque[tuple[str, bytes]] = deque()  # of each VM, in order
        self._dead = False
        self.cancels_consumers = False
        """A planted bug: see tests/planted."""
        world.after(world.rng.random() * 0.1, self._connect)

    # ------------------------------------------------------------ the relay's commands

    def consume(self, vm: str, topics: frozenset[Topic]) -> None:
        """See vchan.host.relay.BrokerPort."""
        state = self._vms.setdefault(vm, _VmState())
        had, state.topics = state.topics, topics
        if state.generation and not state.closing:
            if had - topics:
                self._close(vm, state)
            elif topics - had:
                self._say("consume", state.generation, tuple(sorted(topics - had)))
        else:
            self._open(vm, state)

    def release(self, vm: str) -> None:
        """See vchan.host.relay.BrokerPort."""
        state = self._vms.setdefault(vm, _VmState())
        state.topics, state.listens = frozenset(), False
        if state.generation and not state.closing:
            self._close(vm, state)
        elif not state.closing:
            self._post(Released(vm))

    def ack(self, token: Token) -> None:
        """See vchan.host.relay.BrokerPort."""
        state = self._vms.get(token.vm)
        if state is None or token.generation != state.generation or state.closing:
            self._world.stats["acks of dead tokens"] += 1
            return
        if token.tag in state.unacked:
            state.unacked.discard(token.tag)
            self._say("ack", state.generation, token.tag)

    def barrier(self, vm: str, token: Token, ids: tuple[bytes, ...]) -> None:
        """See vchan.host.relay.BrokerPort."""
        state = self._vms.get(vm)
        if state is not None and state.generation == token.generation and not state.closing:
            self._say("barrier", state.generation, vm, ids)

    def publish_reply(self, reply_q: str, body: bytes, key: bytes) -> None:
        """See vchan.host.relay.BrokerPort."""
        if self._connection is None:
            self._post(Published(key, ok=False))
            return
        self._unconfirmed[key] = self._unconfirmed.get(key, 0) + 1
        self._say("publish", None, reply_q, body, key)

    def listen_for_answers(self, vm: str) -> None:
        """See vchan.host.broker.Broker."""
        state = self._vms.setdefault(vm, _VmState())
        had, state.listens = state.listens, True
        if not state.generation:
            self._open(vm, state)
        elif not state.closing and not had:
            self._say("listen", state.generation)

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        """See vchan.host.broker.Broker."""
        if self._connection is None:
            self._post(Sent(vm, request_id, ok=False, unroutable=False, reason="not connected"))
            return
        self._sending.append((vm, request_id))
        self._say("request", None, vm, request_id, publication)

    # ------------------------------------------------------------ channels

    def _say(self, *command: Any) -> None:
        if self._connection is not None:
            self._connection.up.push(command)

    def _open(self, vm: str, state: _VmState) -> None:
        wanted = bool(state.topics) or state.listens
        if wanted and self._connection is not None and not state.generation:
            self._generations += 1
            state.generation = self._generations
            state.unacked.clear()
            self._say("open", state.generation, vm, tuple(sorted(state.topics)), state.listens)

    def _close(self, vm: str, state: _VmState) -> None:
        if self.cancels_consumers:
            self._say("cancel", state.generation)
            state.generation = 0
            self._post(Released(vm))
            return
        state.closing = state.generation
        self._say("close", state.generation, vm)

    def _closed(self, vm: str) -> None:
        state = self._vms[vm]
        state.generation = state.closing = 0
        state.unacked.clear()
        self._post(Released(vm))
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
        elif isinstance(event, Published):
            left = self._unconfirmed.get(event.key, 0) - 1
            if left > 0:
                self._unconfirmed[event.key] = left
            else:
                self._unconfirmed.pop(event.key, None)
            self._post(event)
        elif isinstance(event, Sent):
            self._sending.remove((event.vm, event.request_id))
            self._post(event)
        else:
            state = self._vms[event.vm]
            if state.generation == generation and not state.closing:
                if isinstance(event, Delivered | Mail):
                    state.unacked.add(event.token.tag)
                self._post(event)

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
                state.unacked.clear()
                self._post(Released(vm))
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for key, count in unconfirmed.items():
            for _ in range(count):
                self._post(Published(key, ok=False))
        sending, self._sending = self._sending, deque()
        for vm, request_id in sending:
            self._post(
                Sent(
                    vm,
                    request_id,
                    ok=False,
                    unroutable=False,
                    reason="connection lost",
                    in_doubt=True,
                )
            )
        self._world.after(RETRY_S * (0.5 + self._world.rng.random()), self._connect)

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
