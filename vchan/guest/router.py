"""Between the host and the agents of this guest: who gets which request, and what comes of it.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; messages leave by the `Send`s handed in.
2. A request has run at most once, and a cast is given to an agent until one has acknowledged it.
   A cast that has no deadline waits for an agent however long; what has one is refused.
   An agent that goes away takes its running calls with it (AGENT_GONE); casts that it had not
   acknowledged have not run, and go to the next.
3. Truth lives in the agents, not here: one that reattaches says which ids it holds, and copies of
   those requests go to it and to no other.

    host --Request--> Router --Request--> agent
    host <--Receipt/Reply/Returned-- Router <--Receipt/Reply/Returned-- agent
    host <--Subscribe-- Router <--Subscribe, Holding-- agent

The other direction, requests of agents to the control side, is `upward`'s.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from vchan.bodies import decode_invocation, encode_failure, encode_json
from vchan.errors import LimitExceeded, NoSuchMethod, RequestError
from vchan.exchange import (
    Answered,
    Cancelled,
    Deliver,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Requester,
    Responder,
    Send,
    Taken,
)
from vchan.guest.later import Later
from vchan.guest.upward import Upward
from vchan.messages import (
    AGENT_GONE,
    FANOUT,
    NO_AGENT,
    REDELIVERED,
    REFUSED,
    TOPICS_MAX,
    BadMessage,
    Cancel,
    Holding,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    decode,
    encode,
)
from vchan.session import CONTROL

LINGER_S: Final = 5.0
"""A topic whose last agent went away is still served so long: agents restart."""
RESTART_GRACE_S: Final = 2.0
"""After this daemon's start, requests that were handed out before wait so long for an agent that
holds them to come back."""
HOLDING_MAX: Final = 8192
"""Ids an agent may say it holds."""
AGENTS_MAX: Final = 64
"""Agents attached at a time."""
OWN_TOPIC: Final = "vchan.guest"
"""The topic this daemon serves itself, in any exchange."""
OWN_EXCHANGE: Final = "openstack"
"""The exchange in which it is announced: oslo.messaging's default."""

Method = Callable[[Mapping[str, Any]], Any]


class _Agent:
    __slots__ = ("held", "requester", "topics")

    def __init__(self, send: Send) -> None:
        self.requester = Requester(send)
        self.topics: tuple[Topic, ...] = ()
        self.held: set[bytes] = set()


class _Waiting(NamedTuple):
    request: Request
    deadline_s: float | None


class Router:
    """The guest daemon's core.

    Args:
        to_host: Queues a message on the host's session.
        methods: What this daemon answers itself on OWN_TOPIC.
        started_s: Now.
    """

    def __init__(self, to_host: Send, methods: Mapping[str, Method], started_s: float) -> None:
        self._to_host = to_host
        self._methods = methods
        self._host = Responder(to_host)
        self._upward = Upward(to_host)
        self._agents: dict[int, _Agent] = {}
        self._servers: dict[Topic, deque[int]] = {}
        self._waiting: dict[Topic, deque[_Waiting]] = {}
        self._linger_until_s: dict[Topic, float] = {}
        self._owners: dict[bytes, set[int]] = {}
        self._partly_taken: set[bytes] = set()  # fanouts that one agent has, and another not yet
        self._holders: dict[bytes, int] = {}
        self._grace_until_s: float | None = started_s + RESTART_GRACE_S
        self._told: frozenset[Topic] | None = None
        self._own: frozenset[Topic] = frozenset()
        self.bad_messages = 0

    @property
    def running(self) -> int:
        """The host's requests that are not over."""
        return len(self._host)

    # ---------------------------------------------------------------- the host

    def host_opened(self, *, resumed: bool, now_s: float) -> None:
        """The host's session is open."""
        if not resumed:
            self._told = None
            self._tell_host()
            self._upward.opened(now_s)

    def host_receive(self, data: bytes, now_s: float) -> None:
        """Take a message of the host's."""
        message = decode(data)
        if isinstance(message, BadMessage):
            self.bad_messages += 1
            return
        if isinstance(message, Receipt | Reply | Returned):
            self._upward.host_receive(message)
            return
        for delivery in self._host.receive(message, now_s):
            if isinstance(delivery, Deliver):
                self._dispatch(delivery.request, now_s)
            else:
                self._cancel(delivery.id)
        if isinstance(message, Settled):
            self._settle(message.ids)

    def _settle(self, ids: tuple[bytes, ...]) -> None:
        for request_id in ids:
            self._holders.pop(request_id, None)
        for agent in self._agents.values():
            agent.requester.settle(ids)

    def _cancel(self, request_id: bytes) -> None:
        self._partly_taken.discard(request_id)
        for key in self._owners.pop(request_id, ()):
            self._agents[key].requester.cancel(request_id)
        for topic, queue in self._waiting.items():
            for item in queue:
                if item.request.id == request_id:
                    queue.remove(item)
                    if not queue:
                        del self._waiting[topic]
                    return

    def _dispatch(self, request: Request, now_s: float) -> None:
        if request.topic == OWN_TOPIC:
            self._answer_ourselves(request, now_s)
            return
        is_fanout = request.flags & FANOUT
        holder = self._holders.get(request.id)
        if holder is not None and not is_fanout:
            self._submit(request, (holder,), now_s)
            return
        topic = request.target
        servers = self._servers.get(topic)
        in_grace = self._grace_until_s is not None
        if request.timeout_ms and not (servers or in_grace or topic in self._linger_until_s):
            self._refuse(request)
        elif topic in self._waiting or (in_grace and (is_fanout or request.flags & REDELIVERED)):
            # A fanout goes to all: who holds it already drops it, and who does not has missed it.
            self._wait(topic, request, now_s)
        elif servers:
            self._submit(request, self._choose(request, servers), now_s)
        else:
            self._wait(topic, request, now_s)

    @staticmethod
    def _choose(request: Request, servers: deque[int]) -> tuple[int, ...]:
        if request.flags & FANOUT:
            return tuple(servers)
        chosen = servers[0]
        servers.rotate(-1)
        return (chosen,)

    def _submit(self, request: Request, keys: tuple[int, ...], now_s: float) -> None:
        self._owners[request.id] = set(keys)
        for key in keys:
            try:
                self._agents[key].requester.submit(request, now_s)
            except LimitExceeded as error:  # the agent's own limit is lower than the host's
                self._handed_back(key, HandedBack(request.id, REFUSED, str(error)))

    def _wait(self, topic: Topic, request: Request, now_s: float) -> None:
        deadline_s = now_s + request.timeout_ms / 1000 if request.timeout_ms else None
        self._waiting.setdefault(topic, deque()).append(_Waiting(request, deadline_s))

    def _refuse(self, request: Request) -> None:
        text = f"no agent serves topic {request.topic}"
        if request.is_call and request.flags & REDELIVERED:
            # Nobody here remembers it, but who did may be gone: NO_AGENT would say too much.
            self._host.give_back(request.id, AGENT_GONE, f"{text} now; it may have run before")
        else:
            self._host.give_back(request.id, NO_AGENT, text)

    def _answer_ourselves(self, request: Request, now_s: float) -> None:
        result: Any
        try:
            call = decode_invocation(request.body)
            method = self._methods.get(call.method)
            if method is None:
                known = ", ".join(sorted(self._methods))
                raise NoSuchMethod(f"{OWN_TOPIC} has no method '{call.method}'; it has {known}")
            result = method(call.args)
        except (RequestError, TypeError, ValueError) as error:
            result = error
        if not request.is_call:
            self._host.take(request.id, now_s)
        elif isinstance(result, Later):
            result.then(lambda value, at_s: self._answer_own(request.id, value, at_s))
        else:
            self._answer_own(request.id, result, now_s)

    def _answer_own(self, request_id: bytes, result: Any, now_s: float) -> None:
        """A method of our own has returned, or raised, this."""
        failed = isinstance(result, Exception)
        try:
            body = b"" if failed else encode_json(result)
        except (TypeError, ValueError) as error:
            failed, result = True, error
        if failed:
            kind = type(result)
            body = encode_failure(kind.__name__, str(result), module=kind.__module__)
        self._answer(request_id, failed, body, now_s)

    def announce_own_topic(self) -> None:
        """Have OWN_TOPIC come from the broker, too, if the host lets it. Programs on the host can
        ask there in any case."""
        self._own = frozenset((Topic(OWN_EXCHANGE, OWN_TOPIC),))
        self._tell_host()

    def _tell_host(self) -> None:
        """Say which topics are served, if that is news."""
        of_agents = frozenset(self._servers) | frozenset(self._linger_until_s)
        topics = of_agents | self._own if len(of_agents) < TOPICS_MAX else of_agents
        if topics == self._told or (self._grace_until_s is not None and not of_agents):
            return
        self._told = topics
        self._to_host(encode(Subscribe(tuple(sorted(topics)))), CONTROL)

    # ---------------------------------------------------------------- agents

    def attach(self, key: int, send: Send, now_s: float) -> None:
        """An agent's connection is established; `send` queues messages to it."""
        agent = self._agents[key] = _Agent(send)
        agent.requester.opened(now_s)
        self._upward.attach(key, send)

    @property
    def has_room(self) -> bool:
        """Another agent may attach."""
        return len(self._agents) < AGENTS_MAX

    def agent_receive(self, key: int, data: bytes, now_s: float) -> str:
        """Take a message of an agent's. Returns why to drop its connection, or nothing."""
        message = decode(data)
        agent = self._agents[key]
        match message:
            case Reply() | Receipt() | Returned():
                for outcome in agent.requester.receive(message):
                    self._settle_outcome(key, outcome, now_s)
            case Subscribe(topics):
                return self._subscribe(key, topics, now_s)
            case Holding(ids):
                return self._hold(key, ids)
            case Request() | Cancel() | Settled():
                self._upward.receive(key, message, now_s)
            case BadMessage(reason):
                self.bad_messages += 1
                return reason
        return ""

    def _settle_outcome(self, key: int, outcome: Outcome, now_s: float) -> None:
        match outcome:
            case Answered():
                if self._last_owner(outcome.id, key):
                    self._answer(outcome.id, outcome.failed, outcome.body, now_s)
            case Taken(request_id):
                if self._last_owner(request_id, key):
                    self._partly_taken.discard(request_id)
                    self._host.take(request_id, now_s)
                elif request_id in self._owners:
                    self._partly_taken.add(request_id)
            case Heartbeat(request_id):
                self._host.heartbeat(request_id, now_s)
            case HandedBack():
                self._handed_back(key, outcome)
            case Overdue():
                pass  # the host's deadline rules

    def _handed_back(self, key: int, outcome: HandedBack) -> None:
        if self._last_owner(outcome.id, key):
            self._partly_taken.discard(outcome.id)
            self._host.give_back(outcome.id, outcome.reason, outcome.text)

    def _last_owner(self, request_id: bytes, key: int) -> bool:
        owners = self._owners.get(request_id)
        if owners is None:
            return False
        owners.discard(key)
        if owners:
            return False
        del self._owners[request_id]
        return True

    def _answer(self, request_id: bytes, failed: bool, body: bytes, now_s: float) -> None:
        try:
            self._host.answer(request_id, body, failed=failed, now_s=now_s)
        except LimitExceeded as error:
            failure = encode_failure("LimitExceeded", str(error))
            self._host.answer(request_id, failure, failed=True, now_s=now_s)

    def _subscribe(self, key: int, topics: tuple[Topic, ...], now_s: float) -> str:
        topics = tuple(dict.fromkeys(topics))  # it may have named one twice
        agent = self._agents[key]
        others = {topic for topic, keys in self._servers.items() if set(keys) != {key}}
        wanted = others | set(topics)
        if len(wanted) > TOPICS_MAX:
            return f"{len(wanted)} topics served in this guest: TOPICS_MAX is {TOPICS_MAX}"
        for topic in agent.topics:
            if topic not in topics:
                self._withdraw(key, topic, now_s)
        for topic in topics:
            if topic not in agent.topics:
                self._servers.setdefault(topic, deque()).append(key)
                self._linger_until_s.pop(topic, None)
        agent.topics = topics
        crowded_out = self._crowd_out()
        self._tell_host()  # before anything is returned, so that it does not come again
        for topic in crowded_out:
            self._refuse_waiting(topic)
        if self._grace_until_s is None:
            for topic in topics:
                self._release_waiting(topic, now_s)
        else:
            self._release_held(now_s)
        return ""

    def _crowd_out(self) -> list[Topic]:
        """Topics that linger make room for those that are served; the oldest goes first."""
        crowded_out = []
        while len(self._servers) + len(self._linger_until_s) > TOPICS_MAX:
            topic = next(iter(self._linger_until_s))
            del self._linger_until_s[topic]
            crowded_out.append(topic)
        return crowded_out

    def _withdraw(self, key: int, topic: Topic, now_s: float) -> None:
        servers = self._servers[topic]
        servers.remove(key)
        if not servers:
            del self._servers[topic]
            self._linger_until_s[topic] = now_s + LINGER_S

    def _hold(self, key: int, ids: tuple[bytes, ...]) -> str:
        agent = self._agents[key]
        agent.held.update(ids)
        if len(agent.held) > HOLDING_MAX:
            return f"holds more than {HOLDING_MAX} ids (HOLDING_MAX)"
        self._holders.update(dict.fromkeys(ids, key))
        return ""

    def detach(self, key: int, now_s: float) -> None:
        """An agent's connection is gone, and with it the agent's running calls."""
        agent = self._agents.pop(key)
        self._upward.detach(key, now_s)
        for request_id in agent.held:
            if self._holders.get(request_id) == key:
                del self._holders[request_id]
        for topic in agent.topics:
            self._withdraw(key, topic, now_s)
        returned: dict[Topic, list[Request]] = {}
        for request in agent.requester.open_requests():
            self._give_up_owner(key, request, returned, now_s)
        for topic, requests in returned.items():
            self._put_back(topic, requests, now_s)
        self._tell_host()

    def _give_up_owner(
        self, key: int, request: Request, returned: dict[Topic, list[Request]], now_s: float
    ) -> None:
        if not self._last_owner(request.id, key):
            return
        if request.id in self._partly_taken:  # a fanout that other agents have
            self._partly_taken.discard(request.id)
            self._host.take(request.id, now_s)
        elif request.is_call:
            text = f"the agent that ran a method of topic {request.topic} went away"
            self._host.give_back(request.id, AGENT_GONE, text)
        else:
            returned.setdefault(request.target, []).append(request)

    def _put_back(self, topic: Topic, requests: list[Request], now_s: float) -> None:
        """Casts nobody acknowledged go to the head of the queue, in their order."""
        queue = self._waiting.setdefault(topic, deque())
        queue.extendleft(_Waiting(request, None) for request in reversed(requests))
        if topic in self._servers and self._grace_until_s is None:
            self._release_waiting(topic, now_s)

    # ---------------------------------------------------------------- waiting

    def _release_waiting(self, topic: Topic, now_s: float) -> None:
        for item in self._waiting.pop(topic, ()):
            self._dispatch(self._remaining(item, now_s), now_s)

    def _release_held(self, now_s: float) -> None:
        """During the grace: what waits and is held by an agent that has come back goes there.

        What is not held waits on; so does everything behind it in its topic, to stay in order.
        """
        for topic, queue in list(self._waiting.items()):
            while queue and not queue[0].request.flags & FANOUT:
                holder = self._holders.get(queue[0].request.id)
                if holder is None:
                    break
                item = queue.popleft()
                self._submit(self._remaining(item, now_s), (holder,), now_s)
            if not queue:
                del self._waiting[topic]

    def _refuse_waiting(self, topic: Topic) -> None:
        """Nobody serves it any more: who waits for an answer hears of it. A cast waits on: handed
        back, it could be overtaken by a later one that is under way to us already."""
        waiting = self._waiting.pop(topic, deque())
        casts = deque(item for item in waiting if not item.request.timeout_ms)
        if casts:
            self._waiting[topic] = casts
        for item in waiting:
            if item.request.timeout_ms:
                self._refuse(item.request)

    @staticmethod
    def _remaining(item: _Waiting, now_s: float) -> Request:
        if item.deadline_s is None:
            return item.request
        left_ms = max(1, int((item.deadline_s - now_s) * 1000))
        return item.request._replace(timeout_ms=left_ms)

    # ---------------------------------------------------------------- time

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        times = [*self._linger_until_s.values()]
        if (upward_s := self._upward.next_timeout()) is not None:
            times.append(upward_s)
        if self._grace_until_s is not None:
            times.append(self._grace_until_s)
        if (host_s := self._host.next_timeout()) is not None:
            times.append(host_s)
        return min(times) if times else None

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        for delivery in self._host.handle_timeout(now_s):
            if isinstance(delivery, Cancelled):
                self._cancel(delivery.id)
        self._upward.handle_timeout(now_s)
        if self._grace_until_s is not None and now_s >= self._grace_until_s:
            self._grace_until_s = None
            self._tell_host()
            for topic in list(self._waiting):
                self._release_waiting(topic, now_s)
        expired = [topic for topic, at_s in self._linger_until_s.items() if at_s <= now_s]
        for topic in expired:
            del self._linger_until_s[topic]
        if expired:
            self._tell_host()  # before anything is returned, so that it does not come again
            for topic in expired:
                self._refuse_waiting(topic)

    # ---------------------------------------------------------------- state

    def served_topics(self) -> set[str]:
        """The topics that agents serve now, in any exchange."""
        return {topic.name for topic in self._servers}

    def summary(self) -> dict[str, Any]:
        """What `vchan status` shows of this guest."""
        return {
            "agents": len(self._agents),
            "topics": sorted(f"{t.exchange}/{t.name}" for t in self._servers),
            "running": len(self._host),
            "repeats": self._host.repeats,
            "waiting": sum(map(len, self._waiting.values())),
            **self._upward.summary(),
        }
