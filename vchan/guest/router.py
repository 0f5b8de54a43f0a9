"""Between the host and the agents of this guest: who gets which request, and what comes of it.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; messages leave by the `Send`s handed in.
2. `rpc.dispatcher` gives the host's requests to agents: each runs at most once, and a cast is given
   to an agent until one has acknowledged it. A cast that has no deadline waits for an agent however
   long; what has one is refused.
3. Agents are told (`charge`) of which topics they alone have what is not settled, and say so to the
   next run of this daemon: they alone outlive it.
4. What an earlier run of this daemon may have given to an agent whose memory is gone as well is in
   doubt. Such a call is not run again: it may have run. Such a cast runs, and is told so
   (`vchan_redelivered` in its context).
5. A call that was returned is over: a copy of it gets the same word, and never runs.

    host --Request--> Router --Request--> agent
    host <--Receipt/Reply/Returned-- Router <--Receipt/Reply/Returned-- agent
    host <--Subscribe-- Router <--Subscribe, Holding-- agent

The other direction, requests of agents to the control side, is `upward`'s.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from vchan.errors import NoSuchMethod, RequestError
from vchan.guest.upward import GuestUpward
from vchan.rpc.bodies import decode_invocation, encode_failure, encode_json, mark_redelivered
from vchan.rpc.deferred import Later
from vchan.rpc.dispatcher import Dispatcher, Manner
from vchan.rpc.in_flight import Deliver, HandedBack, Outcome, Responder, Send, earliest
from vchan.rpc.messages import (
    AGENT_GONE,
    GUEST_TOPIC,
    IN_PLACE,
    NO_AGENT,
    OUT_OF_TURN,
    QUEUE_KINDS,
    RAW,
    REDELIVERED,
    REFUSED,
    TOPICS_MAX,
    BadMessage,
    Cancel,
    Holding,
    Queue,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    Unknown,
    charge,
    decode,
    encode,
    is_charge,
    queue_of,
)
from vchan.session import CONTROL

DOUBT_MARGIN_S: Final = 10.0
"""A request that was handed out before, and whose whole time is this much shorter than our life,
was made in our life: what is on its way to us is no older. A round trip takes a millisecond; a
wedged channel is cured after four seconds. At it: a redelivered request whose whole time, and this,
is shorter than the guest daemon's life is not in doubt."""
AGENTS_MAX: Final = 64
"""Agents attached at a time. At it: the agent is disconnected, with the reason in the log."""
OWN_TOPIC: Final = GUEST_TOPIC.name
"""The topic this daemon serves itself, in any exchange."""
OWN_KEY: Final = 0
"""This daemon among those who send requests up: agents are counted from 1."""
HOST_TAKES_NO_RAW: Final = "the host takes no raw bodies: upgrade vchan-host, or call with JSON"
_OWN_TAKES_NO_RAW: Final = f"the methods of {OWN_TOPIC} take JSON: use call, not call_raw"

_NOT_FRESH: Final = REDELIVERED | OUT_OF_TURN
_AGENTS: Final = Manner(
    server="agent",
    place="",
    topics_max=TOPICS_MAX,
    asker_remembers=True,
    waits_for_all=True,
    lingers_unsubscribed=True,
)

Method = Callable[[Mapping[str, Any]], Any]


class _Agent:
    __slots__ = ("charges", "send")

    def __init__(self, send: Send) -> None:
        self.send = send
        self.charges: tuple[bytes, ...] = ()  # as it was told


class Router:
    """The guest daemon's core.

    Args:
        to_host: Queues a message on the host's session.
        methods: What this daemon answers itself on OWN_TOPIC.
        started_s: Now.
        flush: Writes what is queued for the host, as far as it goes.
        host_serves: Told what the host serves itself when it says so, and () when a session begins.
    """

    def __init__(
        self,
        to_host: Send,
        methods: Mapping[str, Method],
        started_s: float,
        flush: Callable[[], None] = lambda: None,
        host_serves: Callable[[tuple[Topic, ...]], None] = lambda _: None,
    ) -> None:
        self._flush = flush
        self._host_serves = host_serves
        self._to_host = to_host
        self._methods = methods
        self._host = Responder(to_host, is_final=True)
        self._upward = GuestUpward(to_host)
        self._dispatcher = Dispatcher(_AGENTS, started_s, self._vet)
        self._agents: dict[int, _Agent] = {}
        self._started_s = started_s
        self._begun: set[Queue] = set()  # see `_in_doubt`
        self._doubtful: dict[bytes, Queue] = {}  # of what an agent may yet be given
        self._orphaned: set[bytes] = set()  # that may come again, and agents had that are gone
        self._told: frozenset[Topic] | None = None
        self._own: frozenset[Topic] = frozenset()
        self.bad_messages = 0

    @property
    def running(self) -> int:
        """The host's requests that are not over."""
        return len(self._host)

    # ---------------------------------------------------------------- the host

    def host_opened(self, *, resumed: bool, now_s: float, takes_raw: int = 0) -> None:
        """The host's session is open.

        Args:
            takes_raw: See `Peer.takes_raw`.
        """
        if not resumed:
            self._told = None
            self._tell_host()
            self._upward.opened(now_s, takes_raw, HOST_TAKES_NO_RAW)
            self._host_serves(())

    def host_receive(self, data: bytes, now_s: float) -> None:
        """Take a message of the host's."""
        message = decode(data)
        match message:
            case Request() | Cancel() | Settled():
                for delivery in self._host.receive(message, now_s):
                    if isinstance(delivery, Deliver):
                        self._admit(delivery.request, now_s)
                    else:
                        self._cancel(delivery.id)
                if isinstance(message, Settled):
                    self._dispatcher.settle(message.ids)
                    if self._orphaned:
                        self._tell_charges()
            case Receipt() | Reply() | Returned():
                self._upward.host_receive(message)
            case BadMessage() | Unknown():
                self.bad_messages += 1
            case Subscribe(topics):
                self._host_serves(topics)
            case Holding():
                pass  # it is said to agents

    def _cancel(self, request_id: bytes) -> None:
        self._dispatcher.cancel(request_id)
        self._clear_doubts()

    def _admit(self, request: Request, now_s: float) -> None:
        """It is new to us. Whether it is in doubt is decided here: what comes later says nothing of
        what came before."""
        if not request.flags & _NOT_FRESH:
            if (queue := queue_of(request)) not in self._begun:
                self._begun.add(queue)
                self._tell_charges()
        elif request.flags & REDELIVERED and self._in_doubt(request, now_s):
            self._doubtful[request.id] = queue_of(request)
            self._tell_charges()
        if request.topic == OWN_TOPIC:
            self._answer_ourselves(request, now_s)
        else:
            topic, forever = request.target, not request.timeout_ms
            told = self._tell if request.id in self._doubtful else self._host.tell
            if not self._dispatcher.offer(request, topic, told, now_s, forever=forever):
                told(self._dispatcher.unserved(request.id, topic), now_s)
        if self._doubtful:
            self._clear_doubts()

    def _tell(self, outcome: Outcome, now_s: float) -> None:
        """What became of a request that was in doubt when it came."""
        is_unserved = isinstance(outcome, HandedBack) and outcome.reason == NO_AGENT
        if not (is_unserved and self._is_doubtful(outcome.id)):
            self._host.tell(outcome, now_s)
            return
        topic, _ = self._doubtful[outcome.id]
        text = (
            f"it was handed to this guest before, whose daemon and agents of topic {topic} "
            "have no memory of it: it may have run"
        )
        self._host.tell(HandedBack(outcome.id, AGENT_GONE, text), now_s)
        self._orphaned.add(outcome.id)  # nobody knows of it but we
        self._tell_charges()

    # ---------------------------------------------------------------- what is in doubt

    def _in_doubt(self, request: Request, now_s: float) -> bool:
        """Whether it may have been handed to an earlier run of this daemon.

        What was handed out before comes first, out of the broker's queue as from a host with a new
        session: after the first fresh request of a queue, all that is older than we has been here.
        """
        is_late = request.flags & OUT_OF_TURN != 0
        if is_late and not request.flags & IN_PLACE:
            return True
        if queue_of(request) in self._begun:
            return False
        age_s = now_s - self._started_s
        return (
            is_late or not request.timeout_ms or age_s < request.timeout_ms / 1000 + DOUBT_MARGIN_S
        )

    def _is_doubtful(self, request_id: bytes) -> bool:
        """It is in doubt, and no agent says that nobody but it can have had it."""
        queue = self._doubtful.get(request_id)
        return queue is not None and not self._dispatcher.is_held(charge(queue))

    def _vet(self, request: Request) -> Request | None:
        """As an agent may have it that does not hold it."""
        if not self._is_doubtful(request.id):
            return request
        if request.is_call:
            return None
        is_raw = request.flags & RAW != 0
        return request.changed(body=mark_redelivered(request.body, is_raw=is_raw))

    def _clear_doubts(self) -> None:
        """What no agent will be given any more is in doubt no more."""
        if not self._doubtful:
            return
        over = [each for each in self._doubtful if not self._dispatcher.may_be_given(each)]
        for request_id in over:
            del self._doubtful[request_id]
        if over:
            self._tell_charges()

    # ---------------------------------------------------------------- our own topic

    def _answer_ourselves(self, request: Request, now_s: float) -> None:
        if request.flags & RAW:
            self._host.refuse(request.id, REFUSED, _OWN_TAKES_NO_RAW)
            return
        if not request.is_call:
            self._host.take(request.id, now_s)  # first: what we run may be our end
            self._flush()
        elif self._is_doubtful(request.id):
            self._tell(self._dispatcher.unserved(request.id, request.target), now_s)
            return
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
            return
        if isinstance(result, Later):
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
        self._host.answer(request_id, body, failed=failed, now_s=now_s, or_failure=True)

    def announce_own_topic(self) -> None:
        """Have OWN_TOPIC come from the broker, too, if the host lets it. Programs on the host can
        ask there in any case."""
        self._own = frozenset((GUEST_TOPIC,))
        self._tell_host()

    def attach_ourselves(self, send: Send) -> Callable[[Request | Settled, float], None]:
        """The way up for what this daemon asks itself: `send` gets what becomes of it."""
        self._upward.attach(OWN_KEY, send)
        return lambda message, now_s: self._upward.receive(OWN_KEY, message, now_s)

    def _tell_host(self) -> None:
        """Say which topics are served, if that is news."""
        of_agents = self._dispatcher.topics() | self._dispatcher.lingering()
        assert len(of_agents) <= TOPICS_MAX, "one message says them all"
        topics = of_agents | self._own if len(of_agents) < TOPICS_MAX else of_agents
        if topics == self._told or (self._dispatcher.in_grace and not of_agents):
            return
        self._told = topics
        self._to_host(encode(Subscribe(tuple(sorted(topics)))), CONTROL)

    # ---------------------------------------------------------------- agents

    def attach(self, key: int, send: Send, now_s: float, *, takes_raw: int = 0) -> None:
        """An agent's connection is established; `send` queues messages to it.

        Args:
            takes_raw: See `Peer.takes_raw`.
        """
        self._agents[key] = _Agent(send)
        self._dispatcher.attach(key, send, now_s, takes_raw=takes_raw)
        self._upward.attach(key, send)

    @property
    def has_room(self) -> bool:
        """Another agent may attach."""
        return len(self._agents) < AGENTS_MAX

    def agent_receive(self, key: int, data: bytes, now_s: float) -> str:
        """Take a message of an agent's. Returns why to drop its connection, or nothing."""
        message = decode(data)
        match message:
            case Reply() | Receipt() | Returned():
                self._dispatcher.receive(key, message, now_s)
                if self._doubtful:
                    self._clear_doubts()
            case Subscribe(topics):
                return self._subscribe(key, topics, now_s)
            case Holding(ids):
                problem = self._dispatcher.hold(key, ids)
                # It will say its charges to the next daemon, too.
                self._agents[key].charges += tuple(filter(is_charge, ids))
                return problem
            case Request() | Cancel() | Settled():
                self._upward.receive(key, message, now_s)
            case BadMessage(reason):
                self.bad_messages += 1
                return reason
            case Unknown():
                self.bad_messages += 1  # a newer agent's: nothing here depends on it
        return ""

    def _subscribe(self, key: int, topics: tuple[Topic, ...], now_s: float) -> str:
        wanted = self._dispatcher.topics_of_others(key) | set(topics)
        if len(wanted) > TOPICS_MAX:
            return f"{len(wanted)} topics served in this guest: TOPICS_MAX is {TOPICS_MAX}"
        self._dispatcher.subscribe(key, topics, now_s)
        self._tell_host()  # after what was returned: the host consumes no more of it
        self._tell_charges()  # before anything is given to this one that another was charged with
        self._dispatcher.hand_out(now_s)
        self._clear_doubts()
        return ""

    def detach(self, key: int, now_s: float) -> None:
        """An agent's connection is gone, and with it the agent's running calls."""
        del self._agents[key]
        self._upward.detach(key, now_s)
        had_topics = bool(self._dispatcher.topics_of(key))
        self._dispatcher.detach(key, now_s)
        if had_topics:
            self._orphaned.update(self._host.unsettled())
            self._tell_charges()
        self._dispatcher.hand_out(now_s)
        self._clear_doubts()
        self._tell_host()

    def _tell_charges(self) -> None:
        """Tell agents, if it is news, of which topics they alone have what is not settled."""
        self._orphaned.intersection_update(self._host.unsettled())
        for key, agent in self._agents.items():
            charges = self._charges_of(key)
            if charges != agent.charges:
                agent.charges = charges
                agent.send(encode(Holding(charges)), CONTROL)

    def _charges_of(self, key: int) -> tuple[bytes, ...]:
        if self._orphaned:
            return ()
        is_held = self._dispatcher.is_held
        doubtful = set(self._doubtful.values())
        others = {topic.name for topic in self._dispatcher.topics_of_others(key)}
        return tuple(
            charge((name, kind))
            for name in sorted({topic.name for topic in self._dispatcher.topics_of(key)} - others)
            for kind in QUEUE_KINDS
            if ((name, kind) in self._begun and (name, kind) not in doubtful)
            or is_held(charge((name, kind)))
        )

    # ---------------------------------------------------------------- time

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        parts = (self._dispatcher, self._upward, self._host)
        return earliest(*(part.next_timeout() for part in parts))

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        for delivery in self._host.handle_timeout(now_s):
            assert not isinstance(delivery, Deliver)
            self._cancel(delivery.id)
        self._upward.handle_timeout(now_s)
        if self._dispatcher.end_grace(now_s):
            self._tell_host()
        if self._dispatcher.handle_timeout(now_s):
            self._tell_host()  # after what was returned: the host consumes no more of it
        self._clear_doubts()

    # ---------------------------------------------------------------- state

    def served_topics(self) -> set[str]:
        """The topics that agents serve now, in any exchange."""
        return {topic.name for topic in self._dispatcher.topics()}

    def summary(self) -> dict[str, Any]:
        """What `vchan status` shows of this guest."""
        return {
            "agents": len(self._agents),
            "topics": sorted(f"{t.exchange}/{t.name}" for t in self._dispatcher.topics()),
            "running": len(self._host),
            "repeats": self._host.repeats,
            "waiting": self._dispatcher.waiting,
            **self._upward.summary(),
        }
