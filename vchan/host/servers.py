"""Programs on this host that serve topics: which of them gets which request, and what comes of it.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; messages leave by the `Send`s handed in.
2. A request runs at most once, as `guest.router` has it: a server that goes away takes its calls
   with it (AGENT_GONE); casts that it had not acknowledged go to the next server.
3. Truth lives in the servers: one that reattaches says which ids it holds, and copies of those
   requests go to it and to no other.

Addresses are oslo.messaging's own queue names, each a Topic that a server subscribes to:

    "topic"             whoever serves it, in turn; with FANOUT all of them
    "topic.server"      the requests that name this server
    "topic.priority"    notifications of this priority
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from vchan.bodies import decode_invocation
from vchan.errors import LimitExceeded
from vchan.exchange import (
    Answered,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Requester,
    Send,
    Taken,
)
from vchan.messages import (
    AGENT_GONE,
    BUSY,
    FANOUT,
    NO_AGENT,
    NOTIFICATION,
    REDELIVERED,
    REFUSED,
    RELEASED,
    Receipt,
    Reply,
    Request,
    Returned,
    Topic,
)

SERVED_MAX: Final = 1024
"""Requests that all servers together have, or that wait for one."""
LINGER_S: Final = 5.0
"""What a server that went away had not begun waits so long for the next, and so does what comes
later: programs restart. Who unsubscribes is not waited for."""
RESTART_GRACE_S: Final = 2.0
"""After this daemon's start, requests wait so long for servers to come back."""
RETRY_S: Final = 0.5
"""A request that its only server did not want is offered again after this."""
HOLDING_MAX: Final = 8192
"""Ids a server may say it holds."""

Told = Callable[[Outcome], object]

_TRY_ANOTHER: Final = frozenset({BUSY, NO_AGENT, RELEASED})
"""The server has not run it, and another may."""


class _Server:
    __slots__ = ("held", "requester", "topics")

    def __init__(self, send: Send) -> None:
        self.requester = Requester(send)
        self.topics: tuple[Topic, ...] = ()
        self.held: set[bytes] = set()


class _Served:
    """A request that is not over."""

    __slots__ = (
        "address",
        "deadline_s",
        "give_up_s",
        "given",
        "in_line",
        "not_before_s",
        "owners",
        "request",
        "taken",
        "told",
    )

    def __init__(self, request: Request, address: Topic, told: Told, now_s: float) -> None:
        self.request = request
        self.address = address
        self.told = told
        self.deadline_s = now_s + request.timeout_ms / 1000 if request.timeout_ms else math.inf
        self.owners: set[int] = set()
        self.given = False  # to any of them, ever
        self.taken = False  # by one of them; a fanout has several
        # While it waits:
        self.not_before_s = now_s
        self.give_up_s = now_s
        self.in_line = True  # what comes later for its address waits behind it

    @property
    def is_fanout(self) -> bool:
        return self.request.flags & FANOUT != 0

    def remaining(self, now_s: float) -> Request:
        """The request with the time that is left of it."""
        if self.deadline_s == math.inf:
            return self.request
        left_ms = max(1, int((self.deadline_s - now_s) * 1000))
        return self.request._replace(timeout_ms=left_ms)


def address_of(request: Request) -> Topic:
    """What a server must have subscribed to for this request.

    Raises:
        BadBody: It is a notification that does not say its priority.
    """
    if request.flags & NOTIFICATION:
        priority = decode_invocation(request.body).method
        return Topic(request.exchange, f"{request.topic}.{priority}")
    if request.server and not request.flags & FANOUT:
        return Topic(request.exchange, f"{request.topic}.{request.server}")
    return request.target


class Servers:
    """See the top of this file.

    Args:
        started_s: Now.
    """

    def __init__(self, started_s: float) -> None:
        self._servers: dict[int, _Server] = {}
        self._by_address: dict[Topic, deque[int]] = {}
        self._open: dict[bytes, _Served] = {}
        self._waiting: dict[bytes, _Served] = {}  # those of `_open` that no server has
        self._looked_s = started_s  # when all that wait were last looked at
        self._holders: dict[bytes, int] = {}
        self._linger_until_s: dict[Topic, float] = {}
        self._grace_until_s = started_s + RESTART_GRACE_S

    def __len__(self) -> int:
        return len(self._open)

    # ---------------------------------------------------------------- requests

    def offer(self, request: Request, told: Told, now_s: float, *, patient: bool) -> bool:
        """Give a request to who serves its address.

        Args:
            told: Told each outcome, perhaps before this returns; exactly one of them is not a
                Heartbeat, unless the request is cancelled.
            patient: It may wait for a server that has just gone, or after a start is not there yet.

        Returns:
            Whether it was taken on. If not, nobody serves it, and `told` hears nothing.

        Raises:
            LimitExceeded: Too many are open.
            BadBody: It is a notification without a priority.
        """
        if request.id in self._open:  # who asks repeats itself, perhaps on a new connection
            self._open[request.id].told = told
            return True
        address = address_of(request)
        keys = self._by_address.get(address)
        is_fanout = request.flags & FANOUT
        holder = None if is_fanout else self._holders.get(request.id)
        in_grace = now_s < self._grace_until_s
        # Who held it before our start may come back. If nobody does, it has not run.
        is_repeat = in_grace and request.flags & REDELIVERED
        until_s = self._patience_until(address) if patient else 0.0
        if not (keys or holder is not None or is_repeat or now_s < until_s):
            return False
        if len(self._open) >= SERVED_MAX:
            raise LimitExceeded("requests being served", SERVED_MAX + 1, SERVED_MAX, "SERVED_MAX")
        served = self._open[request.id] = _Served(request, address, told, now_s)
        if holder is not None:
            self._submit(served, (holder,), now_s)
        elif is_repeat:
            self._wait(served, self._grace_until_s, self._grace_until_s)
        elif not keys:
            self._wait(served, now_s, until_s)
        elif self._has_line(address):
            self._wait(served, now_s, now_s + LINGER_S)
        else:
            self._submit(served, self._choose(served), now_s)
        return True

    def _patience_until(self, address: Topic) -> float:
        """When to give up on an address that nobody serves now."""
        return max(self._grace_until_s, self._linger_until_s.get(address, 0.0))

    def _has_line(self, address: Topic) -> bool:
        return any(each.in_line and each.address == address for each in self._waiting.values())

    def _choose(self, served: _Served) -> tuple[int, ...]:
        keys = self._by_address[served.address]
        if served.is_fanout:
            return tuple(keys)
        keys.rotate(-1)
        return (keys[-1],)

    def _submit(self, served: _Served, keys: tuple[int, ...], now_s: float) -> None:
        request = served.remaining(now_s)
        served.owners.update(keys)
        served.given = True
        for key in keys:
            try:
                self._servers[key].requester.submit(request, now_s)
            except LimitExceeded as error:  # the server takes less than we do
                self._owner_done(key, served, HandedBack(request.id, REFUSED, str(error)))

    def _wait(self, served: _Served, not_before_s: float, give_up_s: float) -> None:
        served.not_before_s, served.give_up_s = not_before_s, give_up_s
        self._waiting[served.request.id] = served

    def cancel(self, request_id: bytes) -> None:
        """Nobody waits for it any more: `told` hears nothing further."""
        served = self._open.pop(request_id, None)
        if served is not None:
            self._waiting.pop(request_id, None)
            for key in served.owners:
                self._servers[key].requester.cancel(request_id)

    def _finish(self, served: _Served, outcome: Outcome) -> None:
        del self._open[served.request.id]
        self._waiting.pop(served.request.id, None)
        self._holders.pop(served.request.id, None)
        served.told(outcome)

    # ---------------------------------------------------------------- servers

    def attach(self, key: int, send: Send, now_s: float) -> None:
        """A program that serves is there, or may be; `send` queues messages to it."""
        server = self._servers[key] = _Server(send)
        server.requester.opened(now_s)

    def __contains__(self, key: int) -> bool:
        return key in self._servers

    def subscribe(self, key: int, topics: Iterable[Topic], now_s: float) -> None:
        """These are all the addresses it serves."""
        server = self._servers[key]
        wanted = tuple(dict.fromkeys(topics))  # it may have named one twice
        for topic in server.topics:
            if topic not in wanted:
                self._withdraw(key, topic)
        for topic in wanted:
            if topic not in server.topics:
                self._by_address.setdefault(topic, deque()).append(key)
                self._linger_until_s.pop(topic, None)
        server.topics = wanted
        self._look(now_s)

    def _withdraw(self, key: int, topic: Topic) -> None:
        keys = self._by_address[topic]
        keys.remove(key)
        if not keys:
            del self._by_address[topic]

    def hold(self, key: int, ids: tuple[bytes, ...], now_s: float) -> str:
        """It says that it has taken these before. Returns why to refuse it, or nothing."""
        held = self._servers[key].held
        if len(held) + len(ids) > HOLDING_MAX:
            return f"holds more than {HOLDING_MAX} ids (HOLDING_MAX)"
        held.update(ids)
        self._holders.update(dict.fromkeys(ids, key))
        for request_id in ids:
            served = self._waiting.get(request_id)
            if served is not None and not served.is_fanout:
                del self._waiting[request_id]
                self._submit(served, (key,), now_s)
        return ""

    def receive(self, key: int, message: Reply | Receipt | Returned, now_s: float) -> None:
        """Take what a server says of a request."""
        requester = self._servers[key].requester
        for outcome in requester.receive(message):
            self._outcome(key, self._open[outcome.id], outcome, now_s)

    def _outcome(self, key: int, served: _Served, outcome: Outcome, now_s: float) -> None:
        match outcome:
            case Heartbeat():
                served.told(outcome)
            case HandedBack(_, reason, _) if reason in _TRY_ANOTHER and not served.is_fanout:
                served.owners.discard(key)
                served.in_line = False
                self._wait(served, now_s + RETRY_S, now_s + LINGER_S)
            case Taken() | Answered():
                # Copies that come all the same are recognised for some minutes more.
                self._servers[key].requester.settle((outcome.id,))
                self._owner_done(key, served, outcome)
            case HandedBack() | Overdue():
                self._owner_done(key, served, outcome)

    def _owner_done(self, key: int, served: _Served, outcome: Outcome) -> None:
        served.owners.discard(key)
        served.taken = served.taken or isinstance(outcome, Taken)
        if not served.owners:
            self._finish(served, Taken(outcome.id) if served.taken else outcome)

    def detach(self, key: int, now_s: float) -> None:
        """It is gone, and with it the calls that it was running."""
        server = self._servers.pop(key)
        for request_id in server.held:
            if self._holders.get(request_id) == key:
                del self._holders[request_id]
        for topic in server.topics:
            self._withdraw(key, topic)
            if topic not in self._by_address:
                self._linger_until_s[topic] = now_s + LINGER_S
        behind, self._waiting = self._waiting, {}
        for request in server.requester.open_requests():
            self._give_up_owner(key, self._open[request.id], now_s)
        self._waiting.update(behind)
        self._look(now_s)

    def _give_up_owner(self, key: int, served: _Served, now_s: float) -> None:
        request = served.request
        if request.is_call:
            text = f"the program that ran a method of topic {request.topic} went away"
            self._owner_done(key, served, HandedBack(request.id, AGENT_GONE, text))
        elif served.is_fanout:
            text = f"the program that served topic {request.topic} went away"
            self._owner_done(key, served, HandedBack(request.id, NO_AGENT, text))
        else:
            served.owners.discard(key)
            self._wait(served, now_s, now_s + LINGER_S)

    # ---------------------------------------------------------------- waiting and time

    def _look(self, now_s: float) -> None:
        """Give what waits to who can have it now; give up what has waited long enough."""
        self._looked_s = now_s
        lines: set[Topic] = set()  # addresses whose line does not move
        for served in list(self._waiting.values()):
            self._look_at(served, lines, now_s)

    def _look_at(self, served: _Served, lines: set[Topic], now_s: float) -> None:
        request_id, address = served.request.id, served.address
        if now_s >= served.deadline_s:
            self._finish(served, Overdue(request_id, served.given))
        elif now_s < served.not_before_s or (served.in_line and address in lines):
            if served.in_line:
                lines.add(address)
        elif address in self._by_address:
            del self._waiting[request_id]
            self._submit(served, self._choose(served), now_s)
        elif now_s >= served.give_up_s:
            text = f"no program on this host serves topic {address.name}"
            self._finish(served, HandedBack(request_id, NO_AGENT, text))
        else:
            lines.add(address)

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        times = [
            min(
                each.deadline_s,
                each.not_before_s if each.not_before_s > self._looked_s else each.give_up_s,
            )
            for each in self._waiting.values()
        ]
        asked = [server.requester.next_timeout() for server in self._servers.values()]
        times += [at_s for at_s in asked if at_s is not None]
        times += self._linger_until_s.values()
        return min(times, default=None)

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        for key, server in list(self._servers.items()):
            for outcome in server.requester.handle_timeout(now_s):
                self._outcome(key, self._open[outcome.id], outcome, now_s)
        for topic, until_s in list(self._linger_until_s.items()):
            if now_s >= until_s:
                del self._linger_until_s[topic]
        if self._waiting:
            self._look(now_s)
