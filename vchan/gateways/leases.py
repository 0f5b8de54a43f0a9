"""Requests that wait for local programs in any language: who has which, and until when.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; requests leave by a subscriber's `give`.
2. A request is given out with a lease. A cast is acknowledged before it is run: one whose lease
   ends first has not run, and goes to the next subscriber, before what came after it.
3. A call may have begun as soon as it was given out: one whose lease ends fails (AGENT_GONE), and
   is given to nobody else.
4. What is said about a lease that is over is refused: who hears that must not run the request.

    daemon --deliver--> Leases --give--> subscriber
    daemon <--take, answer, give_back-- Leases <--acknowledge, reply, release-- program
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from vchan.rpc.in_flight import Cancelled, Deliver, Delivery, Responder
from vchan.rpc.messages import (
    AGENT_GONE,
    NO_AGENT,
    RELEASED,
    Request,
    Topic,
    deadline_of,
    with_time_left,
)

IDLE_S: Final = 10.0
"""A topic whose last subscriber went away is still served so long: a program that polls comes
again."""


class Leased(NamedTuple):
    """A request given out.

    Attributes:
        lease: Stands for it, for this subscriber alone.
        left_ms: Until nobody waits for it any more; 0: no limit.
        deliveries: How often it was given out, this time included.
    """

    lease: str
    request: Request
    left_ms: int
    lease_s: float
    deliveries: int


class LeaseOver(Exception):
    """There is no such lease, or not any more. The request must not be run."""


class _WaitingRequest:
    __slots__ = ("deadline_s", "deliveries", "request")

    def __init__(self, request: Request, now_s: float) -> None:
        self.request = request
        self.deadline_s = deadline_of(request, now_s)
        self.deliveries = 0

    def left_ms(self, now_s: float) -> int:
        return with_time_left(self.request, self.deadline_s, now_s).timeout_ms


class _Lease:
    __slots__ = ("item", "lease_s", "subscriber", "until_s")

    def __init__(self, item: _WaitingRequest, subscriber: "Subscriber", now_s: float) -> None:
        self.item = item
        self.subscriber = subscriber
        self.lease_s = subscriber.lease_s
        self.until_s = now_s + subscriber.lease_s


class Subscriber:
    """Somebody who takes requests of some topics.

    Args:
        room: How many it takes at a time; `Leases.settled` of each makes room for the next.
        give: Told each request.
    """

    def __init__(
        self,
        topics: Iterable[Topic],
        lease_s: float,
        room: int,
        give: Callable[[Leased], object],
    ) -> None:
        self.topics = tuple(dict.fromkeys(topics))
        self.lease_s = lease_s
        self.room = room
        self.is_slow = False
        """It has not read what it was given: it gets no more for now."""
        self.give = give


class Leases:
    """See the top of this file.

    Args:
        responder: The daemon's connection's.
        new_lease: Makes names for leases, which nobody can guess.
        serve: Told the topics served, whenever they change.
    """

    def __init__(
        self,
        responder: Responder,
        new_lease: Callable[[], str],
        serve: Callable[[tuple[Topic, ...]], object],
    ) -> None:
        self._responder = responder
        self._new_lease = new_lease
        self._serve = serve
        self._queues: dict[Topic, deque[_WaitingRequest]] = {}
        self._subscribers: dict[Topic, deque[Subscriber]] = {}
        self._idle_until_s: dict[Topic, float] = {}
        self._leases: dict[str, _Lease] = {}
        self._served: frozenset[Topic] = frozenset()
        self.counters = {"given": 0, "given_again": 0, "lost_calls": 0, "too_late": 0}

    # ---------------------------------------------------------------- the daemon

    def deliver(self, delivery: Delivery, now_s: float) -> None:
        """Take a request of the daemon's, or its withdrawal."""
        match delivery:
            case Deliver(request):
                self._queues.setdefault(request.target, deque()).append(
                    _WaitingRequest(request, now_s)
                )
                self._give(request.target, now_s)
            case Cancelled(request_id):
                self._withdraw(request_id)

    def _withdraw(self, request_id: bytes) -> None:
        """Nobody waits for it. Who has it is told when it says the next word about it."""
        for queue in self._queues.values():
            for item in queue:
                if item.request.id == request_id:
                    queue.remove(item)
                    return

    def lost(self) -> None:
        """The daemon is away, and gives the casts nobody has acknowledged to another agent, or to
        us again. Calls stay: the daemon asks for them again, and must not run them twice."""
        for topic, queue in self._queues.items():
            casts = [item for item in queue if not item.request.is_call]
            for item in casts:
                self._responder.give_back(item.request.id, RELEASED, "")
            self._queues[topic] = deque(item for item in queue if item.request.is_call)
        for lease, held in list(self._leases.items()):
            if not held.item.request.is_call:
                self._end(lease)
                self._responder.give_back(held.item.request.id, RELEASED, "")

    # ---------------------------------------------------------------- subscribers

    def attach(self, subscriber: Subscriber, now_s: float) -> None:
        """It takes requests from now on, beginning with those that wait."""
        for topic in subscriber.topics:
            self._subscribers.setdefault(topic, deque()).append(subscriber)
            self._idle_until_s.pop(topic, None)
        self._say_topics()
        for topic in subscriber.topics:
            self._give(topic, now_s)

    def detach(self, subscriber: Subscriber, now_s: float) -> None:
        """It takes no more. Its leases go on. Harmless twice."""
        for topic in subscriber.topics:
            subscribers = self._subscribers.get(topic, deque())
            if subscriber in subscribers:
                subscribers.remove(subscriber)
                if not subscribers:
                    del self._subscribers[topic]
                    self._idle_until_s[topic] = now_s + IDLE_S

    def has_room(self, subscriber: Subscriber, now_s: float) -> None:
        """It has more room than it had, or is slow no more."""
        for topic in subscriber.topics:
            self._give(topic, now_s)

    def _give(self, topic: Topic, now_s: float) -> None:
        queue = self._queues.get(topic)
        while queue:
            subscriber = self._next_subscriber(topic)
            if subscriber is None:
                return
            item = queue.popleft()
            if item.request.id not in self._responder:
                continue  # its time is over
            self._lease(item, subscriber, now_s)

    def _next_subscriber(self, topic: Topic) -> Subscriber | None:
        """In turns, among those who have room."""
        subscribers = self._subscribers.get(topic, deque())
        for _ in range(len(subscribers)):
            subscriber = subscribers[0]
            subscribers.rotate(-1)
            if subscriber.room > 0 and not subscriber.is_slow:
                return subscriber
        return None

    def _lease(self, item: _WaitingRequest, subscriber: Subscriber, now_s: float) -> None:
        lease = self._new_lease()
        self._leases[lease] = _Lease(item, subscriber, now_s)
        subscriber.room -= 1
        self.counters["given"] += 1
        self.counters["given_again"] += item.deliveries > 0
        item.deliveries += 1
        left_ms = item.left_ms(now_s)
        subscriber.give(Leased(lease, item.request, left_ms, subscriber.lease_s, item.deliveries))

    def _say_topics(self) -> None:
        topics = frozenset(self._subscribers) | frozenset(self._idle_until_s)
        if topics != self._served:
            self._served = topics
            self._serve(tuple(sorted(topics)))

    @property
    def topics(self) -> tuple[Topic, ...]:
        """What is served now."""
        return tuple(sorted(self._served))

    # ---------------------------------------------------------------- leases

    def request_of(self, lease: str) -> Request:
        """What a lease stands for.

        Raises:
            LeaseOver: Nothing.
        """
        return self._held(lease).item.request

    def _held(self, lease: str) -> _Lease:
        held = self._leases.get(lease)
        if held is None:
            self.counters["too_late"] += 1
            raise LeaseOver(
                "there is no such lease, or it is over: the request has been answered, withdrawn, "
                "or given to another. Do not run it"
            )
        if held.item.request.id not in self._responder:
            self._end(lease)
            self.counters["too_late"] += 1
            raise LeaseOver("nobody waits for this request any more. Do not run it")
        return held

    def _end(self, lease: str) -> _Lease:
        held = self._leases.pop(lease)
        held.subscriber.room += 1
        return held

    def acknowledge(self, lease: str, now_s: float) -> None:
        """It is about to be run, and by nobody else. For a call it only makes sure that somebody
        still waits.

        Raises:
            LeaseOver: It must not be run.
        """
        held = self._held(lease)
        if held.item.request.is_call:
            return
        self._end(lease)
        self._responder.take(held.item.request.id, now_s)
        self.has_room(held.subscriber, now_s)

    def reply(self, lease: str, body: bytes, *, failed: bool, now_s: float) -> None:
        """A call's answer.

        Raises:
            LeaseOver: Nobody waits for it.
            LimitExceeded: It is too large. The lease goes on.
        """
        held = self._held(lease)
        assert held.item.request.is_call
        self._responder.answer(held.item.request.id, body, failed=failed, now_s=now_s)
        self._end(lease)
        self.has_room(held.subscriber, now_s)

    def heartbeat(self, lease: str, now_s: float) -> float:
        """It is still worked on. Returns for how many seconds the lease goes on.

        Raises:
            LeaseOver: Nobody waits for it any more.
        """
        held = self._held(lease)
        held.until_s = now_s + held.lease_s
        if held.item.request.is_call:
            self._responder.heartbeat(held.item.request.id, now_s)
        return held.lease_s

    def release(self, lease: str, now_s: float) -> None:
        """It has not been run, and will not be here: the next subscriber gets it.

        Raises:
            LeaseOver: It is no longer this subscriber's to release.
        """
        self._held(lease)
        held = self._end(lease)
        self._put_back(held)
        self.has_room(held.subscriber, now_s)

    def _put_back(self, held: _Lease) -> None:
        self._queues.setdefault(held.item.request.target, deque()).appendleft(held.item)

    # ---------------------------------------------------------------- time and state

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        leases = (held.until_s for held in self._leases.values())
        return min((*leases, *self._idle_until_s.values()), default=None)

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        ended = [lease for lease, held in self._leases.items() if held.until_s <= now_s]
        if ended:
            # All are back in their places, the last first, before any is given to somebody.
            subscribers = [self._ran_out(self._end(lease)) for lease in reversed(ended)]
            for subscriber in dict.fromkeys(subscribers):
                self.has_room(subscriber, now_s)
        idle = [topic for topic, at_s in self._idle_until_s.items() if at_s <= now_s]
        for topic in idle:
            del self._idle_until_s[topic]
        if idle:
            self._say_topics()  # before anything is given back, so that it does not come again
            for topic in idle:
                self._give_back_waiting(topic)

    def _ran_out(self, held: _Lease) -> Subscriber:
        request = held.item.request
        if request.id in self._responder:
            if request.is_call:
                self.counters["lost_calls"] += 1
                text = f"the program that was given it said nothing for {held.lease_s:g} s"
                self._responder.give_back(request.id, AGENT_GONE, text)
            else:
                self._put_back(held)
        return held.subscriber

    def _give_back_waiting(self, topic: Topic) -> None:
        for item in self._queues.pop(topic, ()):
            text = f"no program receives topic {topic.name} any more"
            self._responder.give_back(item.request.id, NO_AGENT, text)

    def summary(self) -> dict[str, int]:
        """For who looks."""
        waiting = sum(map(len, self._queues.values()))
        return {**self.counters, "waiting": waiting, "leases": len(self._leases)}
