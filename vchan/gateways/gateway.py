"""What programs in any language may ask of vchan in this guest, as JSON objects.

Behind vchan-http and vchan-zmq; `docs/shapes.md` lists every verb and member. One connection to the
guest's daemon stands for all of them: to it they are one agent, so that several programs that
receive one topic share its requests, its fanouts too.

    gateway.ask("call", {"topic": "conductor", "method": "ping"}, told)
    told(Done(b'{"result":"pong"}'))  or  told(Problem(404, "NoSuchAgent", "..."))
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from vchan.errors import BadBody, LimitExceeded
from vchan.gateways.leases import Leased, LeaseOver, Leases, Subscriber
from vchan.io.loop import Alarm, Loop
from vchan.programs.connection import Connection
from vchan.programs.requests import EXCHANGE, TIMEOUT_S, new_metadata
from vchan.rpc import httpcall
from vchan.rpc.arguments import PRIORITIES
from vchan.rpc.bodies import (
    decode_invocation,
    decode_json,
    encode_failure,
    encode_invocation,
    encode_json,
)
from vchan.rpc.in_flight import Answered, Delivery, Heartbeat, Outcome, Taken
from vchan.rpc.messages import (
    CALL,
    FANOUT,
    NAME_BYTES_MAX,
    NOTIFICATION,
    REDELIVERED,
    TOPICS_MAX,
    Request,
    Topic,
    milliseconds,
)
from vchan.rpc.outcomes import error_of, http_status_of

TIMEOUT_S_MAX: Final = 3600.0
"""The longest a program's call may wait: as long as the host lets a guest's (CALL_S_MAX)."""
LEASE_S: Final = 60.0
"""A request is given to a program for so long, unless it asks for another time."""
LEASE_S_MAX: Final = 3600.0
"""The longest lease: a program that died holds its requests no longer."""
WAIT_S: Final = 30.0
"""A program that polls waits so long for a request, unless it says otherwise."""
WAIT_S_MAX: Final = 300.0
"""The longest wait: HTTP clients and what is between give up after some minutes."""
HTTP_S: Final = 60.0
"""For a service under the cloud to answer; the host waits for less."""
RECEIVE_MAX: Final = 64
"""Requests one program may have been given and not settled."""


class Done(NamedTuple):
    """It is done.

    Attributes:
        body: A JSON object, or nothing.
        undo: To be called if whom it is for cannot be told.
    """

    body: bytes = b""
    undo: Callable[[], None] | None = None


class Problem(Exception):
    """It is not done.

    Args:
        status: HTTP's.
        code: The name of one of vchan.errors, or of what is wrong with the request.
        extra: More members of the problem.
    """

    def __init__(self, status: int, code: str, detail: str, **extra: Any) -> None:
        self.status = status
        self.code = code
        self.detail = detail
        self.extra = extra
        super().__init__(detail)


Respond = Callable[[Done | Problem], object]


class Members:
    """The members of a request, each looked at once; a wrong one is a Problem that names it."""

    def __init__(self, values: object) -> None:
        if not isinstance(values, dict):
            raise Problem(400, "BadMember", "expected a JSON object")
        self._left: dict[str, Any] = dict(values)

    def _take(self, name: str, default: Any, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self._left.pop(name, None)
        if value is None:
            if default is None:
                raise Problem(400, "BadMember", f"{name} is missing: expected {expected}")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise Problem(400, "BadMember", f"{name}: expected {expected}")
        return value

    def name(self, name: str, default: str | None = None) -> str:
        """A text that a target's names may be."""
        value: str = self._take(name, default, str, "a text")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise Problem(400, "BadMember", f"{name}: half of a surrogate pair") from None
        if size > NAME_BYTES_MAX:
            raise Problem(400, "BadMember", f"{name} is over {NAME_BYTES_MAX} bytes")
        return value

    def text(self, name: str) -> str:
        """Any text; empty if there is none."""
        value: str = self._take(name, "", str, "a text")
        return value

    def optional_name(self, name: str) -> str | None:
        """A name, or None."""
        return self.name(name, "") or None

    def number(self, name: str, default: float, highest: float, lowest: float = 0.001) -> float:
        """A number."""
        expected = f"a number from {lowest:g} to {highest:g}"
        value: float = self._take(name, default, (int, float), expected)
        if not lowest <= value <= highest:
            raise Problem(400, "BadMember", f"{name}: expected {expected}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        return bool(self._take(name, False, bool, "true or false"))

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty if there is none."""
        value: dict[str, Any] = self._take(name, {}, dict, "an object")
        return value

    def has(self, name: str) -> bool:
        """Whether it is there, null or not."""
        return name in self._left

    def anything(self, name: str) -> Any:
        """Any JSON."""
        return self._left.pop(name, None)

    def topics(self, name: str) -> tuple[Topic, ...]:
        """A list of TOPIC and EXCHANGE/TOPIC."""
        expected = 'a list of "TOPIC" or "EXCHANGE/TOPIC"'
        values = self._take(name, None, list, expected)
        if not 1 <= len(values) <= TOPICS_MAX:
            raise Problem(400, "BadMember", f"{name}: expected 1 to {TOPICS_MAX}")
        return tuple(read_topic(value, f"{name}: expected {expected}") for value in values)

    def rest(self) -> dict[str, Any]:
        """All that have not been looked at."""
        return self._left

    def end(self) -> None:
        """Nothing else may be there."""
        if self._left:
            names = ", ".join(sorted(map(str, self._left)))
            raise Problem(400, "BadMember", f"unknown: {names[:200]}")


def read_topic(value: object, problem: str) -> Topic:
    """TOPIC or EXCHANGE/TOPIC."""
    exchange, slash, name = value.partition("/") if isinstance(value, str) else ("", "", "")
    topic = Topic(exchange, name) if slash else Topic(EXCHANGE, exchange)
    try:
        longest = max(len(part.encode()) for part in topic)
    except UnicodeEncodeError:
        longest = 0
    if not topic.exchange or not topic.name or not 0 < longest <= NAME_BYTES_MAX:
        raise Problem(400, "BadMember", problem)
    return topic


class Gateway:
    """See the top of this file. Belongs to its loop's thread.

    Args:
        path: The guest's daemon's socket.
        name: Ours, for the daemon's log.
        log: Told what an operator may want to know.
    """

    def __init__(self, loop: Loop, path: str, name: str, log: Callable[[str], object]) -> None:
        self.loop = loop
        self._log = log
        self._problem = "not connected yet"
        self._connection = Connection(loop, path, name, self._deliver, self._changed)
        self._alarm = Alarm(loop, self._timed_out)
        self.leases = Leases(
            self._connection.responder, lambda: os.urandom(12).hex(), self._connection.subscribe
        )
        self._verbs: dict[str, Callable[[Members, Respond], Callable[[], None] | None]] = {
            "call": self._call,
            "cast": self._cast,
            "notify": self._notify,
            "receive": self._receive,
            "ack": self._ack,
            "reply": self._reply,
            "heartbeat": self._heartbeat,
            "release": self._release,
            "http": self._http,
            "status": self._status,
        }

    @property
    def verbs(self) -> tuple[str, ...]:
        """Every one there is."""
        return tuple(self._verbs)

    def connect(self) -> None:
        """Connect, now or as soon as the daemon is there, and again whenever that is lost."""
        self._connection.start()

    def close(self) -> None:
        """Close it for good."""
        self._alarm.cancel()
        self._connection.close()

    def ask(self, verb: str, values: object, told: Respond) -> Callable[[], None] | None:
        """Do what is asked. `told` hears of it once, perhaps before this returns.

        Returns:
            What to call if nobody waits for it any more; None: nothing has to be.
        """
        try:
            return self._find(verb)(Members(values), told)
        except Problem as problem:
            told(problem)
        except LeaseOver as error:
            told(Problem(409, "LeaseOver", str(error)))
        except LimitExceeded as error:
            told(_too_much(error))
        finally:
            self._set_timer()
        return None

    def _find(self, verb: str) -> Callable[[Members, Respond], Callable[[], None] | None]:
        do = self._verbs.get(verb)
        if do is None:
            known = ", ".join(self._verbs)
            raise Problem(404, "NoSuchVerb", f"there is no {verb[:40]!r}; there are {known}")
        return do

    # ---------------------------------------------------------------- asking the control side

    def _call(self, members: Members, told: Respond) -> Callable[[], None]:
        request = self._read_invocation(members, CALL)
        return self.submit(request, told)

    def _cast(self, members: Members, told: Respond) -> None:
        flags = FANOUT if members.flag("fanout") else 0
        self.submit(self._read_invocation(members, flags), told)

    def _read_invocation(self, members: Members, flags: int) -> Request:
        method = members.name("method")
        body = _encoded(
            method,
            members.mapping("args"),
            namespace=members.optional_name("namespace"),
            version=members.optional_name("version"),
            context=members.mapping("context"),
        )
        return self._read_target(members, flags, body)

    def _notify(self, members: Members, told: Respond) -> None:
        priority = members.name("priority", "info")
        if priority not in PRIORITIES:
            raise Problem(400, "BadMember", f"priority: expected one of {', '.join(PRIORITIES)}")
        args = {
            "publisher_id": members.name("publisher_id", os.uname().nodename),
            "event_type": members.name("event_type"),
            "payload": members.anything("payload"),
            "metadata": new_metadata(),
        }
        body = _encoded(priority, args, context=members.mapping("context"))
        self.submit(self._read_target(members, NOTIFICATION, body), told)

    def _http(self, members: Members, told: Respond) -> Callable[[], None]:
        """A request to a service under the cloud. `Done` has what `httpcall.read_answer` takes."""
        args = members.rest()
        try:
            httpcall.read_ask(args)  # the host need not be asked for what it would refuse
        except BadBody as error:
            raise Problem(400, "BadMember", str(error)) from error
        body = encode_invocation(httpcall.METHOD, args)
        timeout_ms = int(HTTP_S * 1000)
        request = Request(os.urandom(16), CALL, timeout_ms, 0, *httpcall.TOPIC, "", body)
        return self.submit(request, lambda answer: told(_unwrapped(answer)))

    @staticmethod
    def _read_target(members: Members, flags: int, body: bytes) -> Request:
        topic = members.name("topic")
        exchange = members.name("exchange", EXCHANGE)
        server = "" if flags & NOTIFICATION else members.name("server", "")
        timeout_s = members.number("timeout_s", TIMEOUT_S, TIMEOUT_S_MAX)
        members.end()
        if not topic or not exchange:
            raise Problem(400, "BadMember", "topic and exchange may not be empty")
        timeout_ms = milliseconds(timeout_s)
        return Request(os.urandom(16), flags, timeout_ms, 0, exchange, topic, server, body)

    def submit(self, request: Request, told: Respond) -> Callable[[], None]:
        """Send a request to the control side. Returns what withdraws it."""
        if not self._connection.is_up:
            raise Problem(503, "LinkDown", f"nothing was sent: {self._problem}")
        timeout_s = request.timeout_ms / 1000
        self._connection.submit(request, lambda outcome: _tell(outcome, timeout_s, told))
        return lambda: self._connection.withdraw(request.id)

    # ---------------------------------------------------------------- being asked

    def _receive(self, members: Members, told: Respond) -> Callable[[], None]:
        """Wait for requests; answered with those that are there, at the latest after wait_s."""
        wait_s = members.number("wait_s", WAIT_S, WAIT_S_MAX, 0)
        subscriber, given = self.read_subscriber(members, 1, lambda _: first())
        members.end()
        is_over = False

        def first() -> None:
            if len(given) == 1:
                self.loop.call_soon(answer)  # with all that come in the same turn

        def answer() -> None:
            if end():
                body = b'{"requests":[' + b",".join(map(describe, given)) + b"]}"
                told(Done(body, lambda: self.take_back(given)))

        def end() -> bool:
            nonlocal is_over
            was_over, is_over = is_over, True
            timer.cancel()
            self.leases.detach(subscriber, self.loop.time())
            self._set_timer()
            return not was_over

        def cancel() -> None:
            if end():
                self.take_back(given)

        timer = self.loop.call_later(wait_s, answer)
        self.leases.attach(subscriber, self.loop.time())
        return cancel

    def read_subscriber(
        self, members: Members, room: int, given: Callable[[Leased], object]
    ) -> tuple[Subscriber, list[Leased]]:
        """A subscriber with the topics, max and lease_s that are asked for, and what it is given.

        Args:
            room: How many it takes, if that is not asked for.
            given: Told each request, when it is in the list.
        """
        topics = members.topics("topics")
        lease_s = members.number("lease_s", LEASE_S, LEASE_S_MAX, 1)
        most = int(members.number("max", room, RECEIVE_MAX, 1))
        requests: list[Leased] = []

        def give(leased: Leased) -> None:
            requests.append(leased)
            given(leased)

        return Subscriber(topics, lease_s, most, give), requests

    def take_back(self, given: list[Leased]) -> None:
        """Whom they were given to is gone, and has not seen them."""
        for leased in reversed(given):
            try:
                self.leases.release(leased.lease, self.loop.time())
            except LeaseOver:
                pass  # nor does anybody wait for it any more
        self._set_timer()

    def _ack(self, members: Members, told: Respond) -> None:
        lease = members.name("lease")
        members.end()
        self.leases.acknowledge(lease, self.loop.time())
        told(Done())

    def _reply(self, members: Members, told: Respond) -> None:
        lease = members.name("lease")
        failed = members.has("failure")
        if not failed and not members.has("result"):
            raise Problem(400, "BadMember", "result is missing, or failure: expected one of them")
        body = _read_failure(members) if failed else encode_json(members.anything("result"))
        members.end()
        if not self.leases.request_of(lease).is_call:
            raise Problem(409, "NotACall", "a cast has no answer: acknowledge it")
        self.leases.reply(lease, body, failed=failed, now_s=self.loop.time())
        told(Done())

    def _heartbeat(self, members: Members, told: Respond) -> None:
        lease = members.name("lease")
        members.end()
        lease_s = self.leases.heartbeat(lease, self.loop.time())
        told(Done(encode_json({"lease_s": lease_s})))

    def _release(self, members: Members, told: Respond) -> None:
        lease = members.name("lease")
        members.end()
        self.leases.release(lease, self.loop.time())
        told(Done())

    def _status(self, members: Members, told: Respond) -> None:
        members.end()
        status = {
            "connected": self._connection.is_up,
            "problem": self._problem or None,
            "topics": [f"{topic.exchange}/{topic.name}" for topic in self.leases.topics],
            **self.leases.summary(),
        }
        told(Done(encode_json(status)))

    # ---------------------------------------------------------------- the daemon

    def _deliver(self, delivery: Delivery) -> None:
        self.leases.deliver(delivery, self.loop.time())
        self._set_timer()

    def _changed(self, up: bool, problem: str) -> None:
        if up or problem != self._problem:  # not at every attempt
            self._log("connected to the daemon" if up else problem)
        self._problem = problem
        if not up:
            self.leases.lost()

    def _set_timer(self) -> None:
        self._alarm.set(self.leases.next_timeout())

    def _timed_out(self) -> None:
        self.leases.handle_timeout(self.loop.time())
        self._set_timer()


def _encoded(method: str, args: Mapping[str, Any], **others: Any) -> bytes:
    try:
        return encode_invocation(method, args, **others)
    except ValueError as error:
        raise Problem(400, "BadMember", f"args: {error}") from error


def _read_failure(members: Members) -> bytes:
    failure = Members(members.anything("failure"))
    class_name = failure.name("class", "Exception")
    message = failure.text("message")
    module = failure.name("module", "builtins")
    failure.end()
    return encode_failure(class_name, message, module=module)


def _tell(outcome: Outcome, timeout_s: float, told: Respond) -> None:
    match outcome:
        case Heartbeat():
            pass
        case Taken():
            told(Done())
        case Answered(_, False, body):
            told(Done(b'{"result":' + (body or b"null") + b"}"))
        case Answered(_, True, body):
            told(_failure(body))
        case _:
            error = error_of(outcome, timeout_s)
            told(Problem(http_status_of(outcome), type(error).__name__, str(error)))


def _failure(body: bytes) -> Problem:
    """The method ran and raised."""
    try:
        failure = decode_json(body)
    except (ValueError, RecursionError):
        failure = {}
    if not isinstance(failure, dict):
        failure = {}
    known = {name: failure.get(name) for name in ("class", "module", "message", "args")}
    text = f"{known['class']}: {known['message']}"
    return Problem(500, "RemoteError", text, failure=known)


_HTTP_STATUS: Final = {"ServiceTimeout": 504, "LimitExceeded": 413, "BadBody": 400}


def _unwrapped(answer: Done | Problem) -> Done | Problem:
    """The answer to `http`: the service's, or why there is none."""
    if isinstance(answer, Done):
        return Done(answer.body.removeprefix(b'{"result":').removesuffix(b"}"))
    failure = answer.extra.get("failure")
    if failure is None:
        return answer
    code = str(failure["class"])
    return Problem(_HTTP_STATUS.get(code, 502), code, str(failure["message"]))


def _too_much(error: LimitExceeded) -> Problem:
    is_count = error.what.startswith("open")
    return Problem(429 if is_count else 413, "LimitExceeded", str(error))


def describe(leased: Leased) -> bytes:
    """A request, as it is given to a program: a JSON object."""
    request = leased.request
    try:
        asked = decode_invocation(request.body).as_dict()
    except BadBody as error:
        asked = {"problem": str(error)}
    return encode_json(
        {
            "lease": leased.lease,
            "id": request.id.hex(),
            "kind": _kind(request),
            "exchange": request.exchange,
            "topic": request.topic,
            **asked,
            "timeout_s": leased.left_ms / 1000 if leased.left_ms else None,
            "lease_s": leased.lease_s,
            "deliveries": leased.deliveries,
            "redelivered": request.flags & REDELIVERED != 0 or leased.deliveries > 1,
        }
    )


def _kind(request: Request) -> str:
    if request.is_call:
        return "call"
    if request.flags & NOTIFICATION:
        return "notification"
    return "fanout" if request.flags & FANOUT else "cast"
