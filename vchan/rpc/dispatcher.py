"""Requests for servers of topics: which server gets which, what waits, and what comes of each.

Agents in a guest (`guest.router`) and programs on a host (`host.local.programs`) are such servers.
What differs between the two is a `Manner`.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; messages leave by the `Send`s handed in.
2. A request is given to one server, a fanout to all; it runs at most once in each. A server that
   goes away takes its calls with it (AGENT_GONE); a cast that it has not acknowledged has not run,
   and goes to the next.
3. Truth lives in the servers, not here: one that reattaches says which ids it holds, and copies of
   those requests go to it and to no other.
4. What waits for a topic is a line: what comes later waits behind it.
5. `subscribe`, `hold` and `detach` change what is known of the servers; `hand_out` then gives
   to them what waits. Between the two, a caller can say what must be said first.

    dispatcher.attach(key, send, now_s)
    dispatcher.hold(key, ids); dispatcher.subscribe(key, topics, now_s); dispatcher.hand_out(now_s)
    dispatcher.offer(request, topic, told, now_s)      # told(outcome, now_s), at once or later
    dispatcher.receive(key, message, now_s)            # Receipt, Reply, Returned
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from vchan.errors import LimitExceeded, Rejected
from vchan.rpc.in_flight import (
    COMES_AGAIN,
    Answered,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Requester,
    Send,
    Taken,
    earliest,
)
from vchan.rpc.messages import (
    AGENT_GONE,
    FANOUT,
    NO_AGENT,
    REDELIVERED,
    REFUSED,
    Receipt,
    Reply,
    Request,
    Returned,
    Topic,
    deadline_of,
    with_time_left,
)

LINGER_S = 5.0
"""A topic whose last server went away is waited for so long: agents and programs restart."""
RESTART_GRACE_S: Final = 5.0
"""After this daemon's start, what was handed out before waits so long for a server that holds it to
come back: it looks for the daemon each second, and on a busy machine is not quick to be let in."""
RETRY_S: Final = 0.5
"""A request that its server has handed back is offered again after this, where nobody else does
so."""
HOLDING_MAX: Final = 8192
"""Ids a server may say it holds. At it: an agent is disconnected, with the reason in the log; what
else a program holds may run again, and that is logged."""

SERVED_MAX: Final = 1024
"""Requests that all servers together have, or that wait for one. At it: Returned: BUSY."""

_FOREVER: Final = float("inf")

Told = Callable[[Outcome, float], None]
"""Told what became of a request, and the time."""


class Manner:
    """What differs between the servers of a guest and those of a host.

    Args:
        server: What a server is called, in texts.
        place: Where it would be, in the text that says that there is none.
        topics_max: Topics that are served or waited for. At it: those whose servers went first are
            not waited for.
        asker_remembers: Who offers a request keeps its time, offers it again if it is handed back,
            and says when its id is settled (`settle`). Otherwise all of that is done here.
        waits_for_all: A fanout waits for the end of the grace after this daemon's start, when all
            servers are to be back, and also if all that had it went away. Otherwise it is for those
            that are there.
        lingers_unsubscribed: A topic is waited for also when its server is there and serves it no
            more.
    """

    def __init__(
        self,
        *,
        server: str,
        place: str,
        topics_max: int,
        asker_remembers: bool,
        waits_for_all: bool,
        lingers_unsubscribed: bool,
    ) -> None:
        self.server = server
        self.place = place
        self.topics_max = topics_max
        self.asker_remembers = asker_remembers
        self.waits_for_all = waits_for_all
        self.lingers_unsubscribed = lingers_unsubscribed


class _Server:
    __slots__ = ("held", "requester", "topics")

    def __init__(self, send: Send, *, is_timed: bool) -> None:
        self.requester = Requester(send, is_timed=is_timed)
        self.topics: tuple[Topic, ...] = ()
        self.held: set[bytes] = set()


class _Served:
    """A request that is not over: servers have it (`owners`), or it waits."""

    __slots__ = (
        "after_grace",
        "came_s",
        "give_up_s",
        "is_taken",
        "owners",
        "request",
        "told",
        "topic",
        "was_given",
    )
    # Set when it begins to wait (`_wait`):
    after_grace: bool
    """It waits for the end of the grace, whoever serves its topic."""
    was_given: bool
    """A server had it before."""

    def __init__(
        self, request: Request, topic: Topic, told: Told, now_s: float, give_up_s: float
    ) -> None:
        self.request = request
        self.topic = topic
        self.told = told
        self.came_s = now_s
        self.give_up_s = give_up_s  # while its topic lingers it is not given up either
        self.owners: set[int] = set()
        self.is_taken = False  # by one of its servers; a fanout has several

    @property
    def deadline_s(self) -> float | None:
        """When its time is over."""
        return deadline_of(self.request, self.came_s)

    def left(self, now_s: float) -> Request:
        """The request, with the time that is left of it."""
        return with_time_left(self.request, self.deadline_s, now_s)


class Dispatcher:
    """See the top of this file.

    Args:
        manner: How these servers differ from others.
        started_s: Now.
        vet: What is given, in place of a request that was handed out before (REDELIVERED), to a
            server that does not hold it; None: it may not run, and nobody serves it.
    """

    def __init__(
        self,
        manner: Manner,
        started_s: float,
        vet: Callable[[Request], Request | None] | None = None,
    ) -> None:
        self._manner = manner
        self._no_raw = (
            f"the {manner.server} that serves this topic takes no raw bodies: upgrade its vchan "
            "(vchan.client and vchan.aio take them), or call it with JSON"
        )
        self._asker_remembers = manner.asker_remembers
        # What servers that were there before our start may come back for.
        self._maybe_held = REDELIVERED | FANOUT if manner.waits_for_all else REDELIVERED
        self._vet = vet
        self._servers: dict[int, _Server] = {}
        self._by_topic: dict[Topic, deque[int]] = {}  # whose turn it is stands first
        self._linger_until_s: dict[Topic, float] = {}  # topics without a server; the oldest first
        self._holders: dict[bytes, int] = {}
        self._open: dict[bytes, _Served] = {}
        self._lines: dict[Topic, deque[_Served]] = {}  # what waits, in order
        self._later: dict[bytes, float] = {}  # what is offered again, and when: in no line
        self._grace_until_s: float | None = started_s + RESTART_GRACE_S

    # ---------------------------------------------------------------- requests

    def __len__(self) -> int:
        return len(self._open)

    @property
    def waiting(self) -> int:
        """Requests that no server has."""
        return len(self._later) + sum(map(len, self._lines.values()))

    def may_be_given(self, request_id: bytes) -> bool:
        """It is open, and no server has it; or it is a cast that none has taken yet, for who has
        that may go away."""
        served = self._open.get(request_id)
        if served is None or served.is_taken:
            return False
        return not served.owners or not served.request.is_call

    def offer(
        self,
        request: Request,
        topic: Topic,
        told: Told,
        now_s: float,
        *,
        patient: bool = True,
        forever: bool = False,
    ) -> bool:
        """Give a request to who serves a topic.

        Args:
            told: Told each outcome, perhaps before this returns; exactly one of them is not a
                Heartbeat, unless the request is cancelled.
            patient: It may wait for a server that has just gone, or after a start is not there yet.
            forever: It waits for a server however long.

        Returns:
            Whether it was taken on. If not, nobody serves it, and `told` hears nothing.

        Raises:
            LimitExceeded: Too many are open.
        """
        served = self._open.get(request.id)
        if served is not None:  # who asks repeats itself, perhaps on a new connection
            served.told = told
            return True
        in_grace = self.in_grace
        after_grace = in_grace and self._may_be_held(request)
        holder = self._holder_of(request) if self._holders else None
        is_served = topic in self._by_topic
        if not (
            is_served
            or after_grace
            or holder is not None
            or forever
            or (patient and (in_grace or topic in self._linger_until_s))
        ):
            return False
        if len(self._open) >= SERVED_MAX:
            raise LimitExceeded("requests being served", SERVED_MAX + 1, SERVED_MAX, "SERVED_MAX")
        give_up_s = _FOREVER if forever else now_s
        served = self._open[request.id] = _Served(request, topic, told, now_s, give_up_s)
        if holder is not None:
            self._give(served, request, now_s, holder)
        elif after_grace or not is_served or (self._lines and topic in self._lines):
            self._wait(served, now_s)
            self._lines.setdefault(topic, deque()).append(served)
        else:
            self._give(served, request, now_s)
        return True

    def _may_be_held(self, request: Request) -> bool:
        """By a server that was there before our start. If none comes back with it, it has not
        run."""
        return request.flags & self._maybe_held != 0

    def _holder_of(self, request: Request) -> int | None:
        """A fanout is for all: who holds it drops it, and who does not has missed it."""
        return None if request.flags & FANOUT else self._holders.get(request.id)

    def _wait(self, served: _Served, now_s: float, *, was_given: bool = False) -> None:
        """No server has it, for now."""
        assert not served.owners
        served.was_given = was_given
        served.after_grace = self.in_grace and self._may_be_held(served.request)
        if was_given or served.topic in self._by_topic:
            served.give_up_s = max(served.give_up_s, now_s + LINGER_S)

    def _give(
        self, served: _Served, request: Request, now_s: float, holder: int | None = None
    ) -> None:
        """To who holds it; or to the server whose turn it is, and a fanout to all."""
        if holder is not None:
            keys: tuple[int, ...] = (holder,)
        else:
            if self._vet is not None and request.flags & REDELIVERED:
                vetted = self._vet(request)
                if vetted is None:
                    self._finish(served, self.unserved(request.id, served.topic), now_s)
                    return
                request = vetted
            turn = self._by_topic[served.topic]
            if request.flags & FANOUT:
                keys = tuple(turn)
            else:
                keys = (turn[0],)
                turn.rotate(-1)
        assert keys and not served.owners, "it is with servers already"
        for key in keys:  # all first: the last to be done with it ends it
            served.owners.add(key)
        for key in keys:
            try:
                self._servers[key].requester.submit(request, now_s)
            except (LimitExceeded, Rejected) as error:  # the server takes less than we do
                refused = HandedBack(request.id, REFUSED, str(error))
                self._outcome(key, served, refused, now_s)

    def unserved(self, request_id: bytes, topic: Topic) -> HandedBack:
        """What is said of a request that nobody serves."""
        who, what = f"{self._manner.server}{self._manner.place}", f"{topic.exchange}/{topic.name}"
        text = f"no {who} serves topic {what}"
        return HandedBack(request_id, NO_AGENT, text)

    def cancel(self, request_id: bytes) -> None:
        """Nobody waits for it any more: `told` hears nothing further."""
        served = self._open.pop(request_id, None)
        if served is None:
            return
        for key in served.owners:
            self._servers[key].requester.cancel(request_id)
        if not served.owners and self._later.pop(request_id, None) is None:
            self._leave_line(served)

    def _leave_line(self, served: _Served) -> None:
        line = self._lines[served.topic]
        line.remove(served)
        if not line:
            del self._lines[served.topic]

    def _finish(self, served: _Served, outcome: Outcome, now_s: float) -> None:
        request_id = served.request.id
        assert not served.owners and outcome.id == request_id, "a server has it still"
        del self._open[request_id]
        if not self._asker_remembers:
            self._holders.pop(request_id, None)
        served.told(outcome, now_s)

    def settle(self, ids: tuple[bytes, ...]) -> None:
        """These ids never come again: every server may forget them."""
        for request_id in ids:
            self._holders.pop(request_id, None)
        for server in self._servers.values():
            server.requester.settle(ids)

    # ---------------------------------------------------------------- servers

    def attach(self, key: int, send: Send, now_s: float, *, takes_raw: int = 0) -> None:
        """A server is there, or somebody who may be one; `send` queues messages to it.

        Args:
            takes_raw: See `Peer.takes_raw`.
        """
        assert key not in self._servers
        server = self._servers[key] = _Server(send, is_timed=not self._asker_remembers)
        server.requester.opened(now_s, takes_raw=takes_raw, no_raw=self._no_raw)

    def __contains__(self, key: int) -> bool:
        return key in self._servers

    def subscribe(self, key: int, topics: Iterable[Topic], now_s: float) -> None:
        """These are all the topics it serves. See `hand_out`."""
        server = self._servers[key]
        wanted = tuple(dict.fromkeys(topics))  # it may have named one twice
        for topic in server.topics:
            if topic not in wanted:
                self._withdraw(key, topic, now_s, lingers=self._manner.lingers_unsubscribed)
        for topic in wanted:
            if topic not in server.topics:
                self._by_topic.setdefault(topic, deque()).append(key)
                self._linger_until_s.pop(topic, None)
        server.topics = wanted
        self._crowd_out(now_s)

    def _withdraw(self, key: int, topic: Topic, now_s: float, *, lingers: bool) -> None:
        keys = self._by_topic[topic]
        keys.remove(key)
        if keys:
            return
        del self._by_topic[topic]
        if lingers:
            assert topic not in self._linger_until_s, "what is served does not linger"
            self._linger_until_s[topic] = now_s + LINGER_S

    def _crowd_out(self, now_s: float) -> None:
        """Topics that linger make room for those that are served; the oldest goes first."""
        while len(self._by_topic) + len(self._linger_until_s) > self._manner.topics_max:
            topic = next(iter(self._linger_until_s))
            del self._linger_until_s[topic]
            self._hand_out_line(topic, now_s)

    def hold(self, key: int, ids: tuple[bytes, ...]) -> str:
        """It says that it has taken these before. Returns why to refuse it, or nothing. See
        `hand_out`."""
        held = self._servers[key].held
        if len(held.union(ids)) > HOLDING_MAX:
            return f"holds more than {HOLDING_MAX} ids (HOLDING_MAX)"
        held.update(ids)
        self._holders.update(dict.fromkeys(ids, key))
        return ""

    def is_held(self, request_id: bytes) -> bool:
        """A server that is there has said that it holds it."""
        return request_id in self._holders

    def receive(self, key: int, message: Reply | Receipt | Returned, now_s: float) -> None:
        """Take what a server says of a request."""
        for outcome in self._servers[key].requester.receive(message):
            self._outcome(key, self._open[outcome.id], outcome, now_s)

    def _outcome(self, key: int, served: _Served, outcome: Outcome, now_s: float) -> None:
        if isinstance(outcome, Heartbeat):
            served.told(outcome, now_s)
            return
        served.owners.discard(key)
        if not self._asker_remembers and self._is_offered_again(key, served, outcome, now_s):
            return
        if isinstance(outcome, Taken):
            served.is_taken = True
        if not served.owners:
            # A fanout that its asker offers again finds those that have it and those that had no
            # room.
            if served.is_taken and not (self._asker_remembers and isinstance(outcome, HandedBack)):
                outcome = Taken(outcome.id)
            self._finish(served, outcome, now_s)

    def _is_offered_again(self, key: int, served: _Served, outcome: Outcome, now_s: float) -> bool:
        """What its asker would see to, if it remembered the request."""
        if isinstance(outcome, Taken | Answered):
            # Copies that come all the same are recognised for some minutes more.
            self._servers[key].requester.settle((outcome.id,))
            return False
        is_offered = isinstance(outcome, HandedBack) and outcome.reason in COMES_AGAIN
        if not is_offered or served.request.flags & FANOUT:
            return False
        self._wait(served, now_s, was_given=True)
        self._later[outcome.id] = now_s + RETRY_S
        return True

    def detach(self, key: int, now_s: float) -> None:
        """It is gone, and with it the calls that it was running. See `hand_out`."""
        server = self._servers.pop(key)
        for request_id in server.held:
            if self._holders.get(request_id) == key:
                del self._holders[request_id]
        for topic in server.topics:
            self._withdraw(key, topic, now_s, lingers=True)
        self._crowd_out(now_s)
        left: dict[Topic, list[_Served]] = {}
        for request in server.requester.open_requests():
            served = self._open[request.id]
            served.owners.discard(key)
            if not served.owners and not self._ends_with_server(served, now_s):
                left.setdefault(served.topic, []).append(served)
        for topic, requests in left.items():
            self._put_back(topic, requests, now_s)

    def _ends_with_server(self, served: _Served, now_s: float) -> bool:
        """The last server that had it is gone. Whether it is over with that."""
        request, reason = served.request, NO_AGENT
        text = f"the {self._manner.server} that served topic {request.topic} went away"
        if request.is_call:
            reason = AGENT_GONE
            text = f"the {self._manner.server} that ran a method of topic {request.topic} went away"
        elif not served.is_taken and (self._manner.waits_for_all or not request.flags & FANOUT):
            return False
        outcome = Taken(request.id) if served.is_taken else HandedBack(request.id, reason, text)
        self._finish(served, outcome, now_s)
        return True

    def _put_back(self, topic: Topic, requests: list[_Served], now_s: float) -> None:
        """Casts nobody acknowledged go to the head of the line, in their order."""
        assert not any(served.request.is_call for served in requests), "a call may have run"
        for served in requests:
            self._wait(served, now_s, was_given=True)
        self._lines.setdefault(topic, deque()).extendleft(reversed(requests))

    # ---------------------------------------------------------------- topics

    def topics(self) -> frozenset[Topic]:
        """The topics that are served."""
        return frozenset(self._by_topic)

    def lingering(self) -> frozenset[Topic]:
        """The topics that have no server, and are waited for."""
        return frozenset(self._linger_until_s)

    def topics_of(self, key: int) -> tuple[Topic, ...]:
        """What a server serves."""
        return self._servers[key].topics

    def topics_of_others(self, key: int) -> set[Topic]:
        """What others than this server serve."""
        return {topic for topic, keys in self._by_topic.items() if set(keys) != {key}}

    # ---------------------------------------------------------------- waiting and time

    def hand_out(self, now_s: float) -> None:
        """Give what waits to who can have it now; give up what nobody serves any more."""
        for request_id in [each for each, at_s in self._later.items() if at_s <= now_s]:
            del self._later[request_id]
            served = self._open[request_id]
            self._lines.setdefault(served.topic, deque()).append(served)
        for topic in list(self._lines):
            self._hand_out_line(topic, now_s)

    def _hand_out_line(self, topic: Topic, now_s: float) -> None:
        if self._holders:
            self._hand_out_held(topic, now_s)
        while (
            topic in self._by_topic and (line := self._lines.get(topic)) and not line[0].after_grace
        ):
            self._leave_line(served := line[0])
            self._give(served, served.left(now_s), now_s)
        if topic not in self._by_topic and self._grace_until_s is None:
            self._give_up(topic, now_s)

    def _hand_out_held(self, topic: Topic, now_s: float) -> None:
        for served in list(self._lines.get(topic, ())):
            holder = self._holder_of(served.request)
            if holder is not None:
                self._leave_line(served)
                self._give(served, served.left(now_s), now_s, holder)

    def _give_up(self, topic: Topic, now_s: float) -> None:
        for served in list(self._lines.get(topic, ())):
            if self._until_s(served) <= now_s:
                self._leave_line(served)
                self._finish(served, self.unserved(served.request.id, topic), now_s)

    def _until_s(self, served: _Served) -> float:
        """When it is given up, if nobody serves its topic."""
        return max(served.give_up_s, self._linger_until_s.get(served.topic, 0.0))

    def _in_no_hands(self) -> Iterator[_Served]:
        for line in self._lines.values():
            yield from line
        for request_id in self._later:
            yield self._open[request_id]

    @property
    def in_grace(self) -> bool:
        """Servers that were there before this daemon's start may be about to come back."""
        return self._grace_until_s is not None

    def end_grace(self, now_s: float) -> bool:
        """Whether the grace ends now. What waited for that is given out by the next `hand_out`."""
        if self._grace_until_s is None or now_s < self._grace_until_s:
            return False
        self._grace_until_s = None
        for line in self._lines.values():
            for served in line:
                served.after_grace = False
        return True

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        times: list[float | None] = [*self._linger_until_s.values(), *self._later.values()]
        if self._grace_until_s is not None:
            times.append(self._grace_until_s)
        else:
            times += [
                self._until_s(served)
                for topic, line in self._lines.items()
                if topic not in self._by_topic
                for served in line
            ]
        if not self._asker_remembers:
            times += [served.deadline_s for served in self._in_no_hands()]
            times += [server.requester.next_timeout() for server in self._servers.values()]
        at_s = earliest(*times)
        return at_s if at_s != _FOREVER else None

    def handle_timeout(self, now_s: float) -> bool:
        """Do what is due. Calling it early or late is harmless. Returns whether `lingering` is less
        than before."""
        if not self._asker_remembers:
            self._expire(now_s)
        self.end_grace(now_s)
        expired = [topic for topic, at_s in self._linger_until_s.items() if at_s <= now_s]
        for topic in expired:
            del self._linger_until_s[topic]
        if self._lines or self._later:
            self.hand_out(now_s)
        return bool(expired)

    def _expire(self, now_s: float) -> None:
        """Give up what is past its time."""
        for key, server in list(self._servers.items()):
            for outcome in server.requester.handle_timeout(now_s):
                self._outcome(key, self._open[outcome.id], outcome, now_s)
        for served in list(self._in_no_hands()):
            if served.deadline_s is not None and served.deadline_s <= now_s:
                request_id = served.request.id
                if self._later.pop(request_id, None) is None:
                    self._leave_line(served)
                self._finish(served, Overdue(request_id, served.was_given), now_s)
