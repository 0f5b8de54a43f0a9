"""Local programs to a daemon's unix socket: agents in a guest, tools and services on a host.

    with Client("/run/vchan/host.sock") as client:
        client.call("agent", "echo", {"x": 1}, server=VM_UUID, timeout_s=10)

    agent = Agent("/run/vchan/agent.sock")
    agent.serve("agent", Endpoint())
    agent.run()

On the guest's socket requests go out to the control side: those of a Client, and an agent's own.

    agent.cast("conductor", "agent_started", {"version": 2})
    agent.notify("notifications", "agent.started", {"version": 2})

Light on purpose: the standard library only, no asyncio, so that an agent in a small guest starts in
a fraction of a second. Code that already speaks oslo.messaging uses the vchan:// driver instead.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Self

from vchan.bodies import (
    Invocation,
    decode_failure,
    decode_invocation,
    encode_failure,
    encode_invocation,
    encode_json,
)
from vchan.errors import (
    AgentGone,
    BadBody,
    CallTimeout,
    ConfigError,
    LimitExceeded,
    LinkDown,
    LinkError,
    NoSuchAgent,
    NoSuchDomain,
    NoSuchMethod,
    Rejected,
    RemoteError,
    RequestError,
)
from vchan.exchange import (
    Answered,
    Cancelled,
    Deliver,
    Delivery,
    HandedBack,
    Heartbeat,
    Outcome,
    Requester,
    Responder,
    Taken,
)
from vchan.link import Link
from vchan.loop import Loop, Timer
from vchan.messages import (
    AGENT_GONE,
    CALL,
    EXPIRED,
    FANOUT,
    NAME_BYTES_MAX,
    NO_AGENT,
    NO_DOMAIN,
    NOTIFICATION,
    RELEASED,
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
    id_chunks,
)
from vchan.session import CONTROL, Config, Event, Opened, Received, Refused, Role, Session
from vchan.streams import connect_unix

AGENT_SOCKET: Final = "/run/vchan/agent.sock"
HOST_SOCKET: Final = "/run/vchan/host.sock"
HOST_TOPIC: Final = "vchan.host"
"""The topic that a host's daemon serves itself."""
EXCHANGE: Final = "openstack"
"""oslo.messaging's default control_exchange."""
TIMEOUT_S: Final = 60.0
"""oslo.messaging's default rpc_response_timeout."""
OPEN_CALLS_MAX: Final = 1024
"""Requests of one client that wait for an answer."""
RECONNECT_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
GRACE_S: Final = 1.0
"""When a request's time is over the daemon's word is waited for so long: it knows whether the
request was delivered, and so may have run."""
LATE_S: Final = GRACE_S + 1.0
"""A thread that waits for the loop, whose own deadline comes first, gives up so late."""
ACK_LOOK_S: Final = 0.005
"""How often `when_acknowledged` looks: an acknowledgement comes after 20 ms at the latest."""

# Whatever is not listed has not run.
_REASONS: Final[dict[int, type[RequestError]]] = {
    NO_AGENT: NoSuchAgent,
    AGENT_GONE: AgentGone,
    RELEASED: AgentGone,  # with its VM
    EXPIRED: CallTimeout,  # the daemon's clock was quicker than ours
    NO_DOMAIN: NoSuchDomain,
}


class Connection:
    """A connection to a daemon that comes back by itself. Belongs to its loop's thread.

    Args:
        path: The daemon's socket.
        name: Ours, for the daemon's log.
        deliver: Told each request and cancellation that arrives.
        changed: Told when the daemon is there (True) or not (False), with the reason. It is told
            False before each new session: a daemon that lost us gives our requests to others.
    """

    def __init__(
        self,
        loop: Loop,
        path: str,
        name: str,
        deliver: Callable[[Delivery], object],
        changed: Callable[[bool, str], object],
    ) -> None:
        self.loop = loop
        self.path = path
        self._deliver = deliver
        self._changed = changed
        self._session = Session(Config(Role.GUEST, os.urandom(16), name), os.urandom)
        self._link: Link | None = None
        self._attempts = 0
        self._closed = False
        self._retry: Timer | None = None
        self._timer: Timer | None = None
        self._waiting: dict[bytes, Callable[[Outcome], object]] = {}
        self.is_up = False
        self.topics: tuple[Topic, ...] = ()
        self.servers: tuple[Topic, ...] = ()
        self.daemon_topics: tuple[Topic, ...] = ()
        """What the daemon says that it serves itself: a host's names "vchan.host"."""
        self.requester = Requester(self._send, grace_s=GRACE_S)
        self.responder = Responder(self._send)

    # ---------------------------------------------------------------- connecting

    def connect(self) -> None:
        """Connect, now and whenever the connection is lost.

        Raises:
            LinkError: The first attempt failed. It is tried again all the same.
        """
        self._retry = None
        try:
            stream = connect_unix(self.path)
        except LinkError as error:
            is_first = self._attempts == 0
            self._plan_retry()
            self._changed(False, str(error))
            if is_first:
                raise
            return
        self._link = Link(self.loop, self._session, stream, self._handle, self._lost)

    def _plan_retry(self) -> None:
        delay_s = RECONNECT_S[min(self._attempts, len(RECONNECT_S) - 1)]
        self._attempts += 1
        self._retry = self.loop.call_later(delay_s, self._reconnect)

    def _reconnect(self) -> None:
        try:
            self.connect()
        except LinkError:
            pass  # planned again, and `changed` told

    def _lost(self, reason: str) -> None:
        self._link = None
        if not self._closed:
            self._down(reason)
            self._plan_retry()

    def _down(self, reason: str) -> None:
        self.is_up = False
        self.daemon_topics = ()
        self._changed(False, reason)

    def close(self) -> None:
        """Close it for good."""
        self._closed = True
        self.is_up = False
        for timer in (self._retry, self._timer):
            if timer is not None:
                timer.cancel()
        if self._link is not None:
            self._link.close()
            self._link = None

    def flush(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        if self._link is not None:
            self._link.flush()

    def _send(self, message: bytes, stream: int) -> None:
        if self._link is not None:
            self._link.send(message, stream)
        else:
            self._session.send(message, stream)

    # ---------------------------------------------------------------- talking

    def subscribe(self, topics: tuple[Topic, ...], servers: tuple[Topic, ...] = ()) -> None:
        """Serve these topics, now and after every reconnection.

        Args:
            servers: Names of this very server ("topic.server"). Only a host's daemon is told of
                them: in a guest the one server name is the VM's, and the host knows it.
        """
        self.topics, self.servers = topics, servers
        if self.requester.connected:
            self._say_topics()

    def _say_topics(self) -> None:
        is_host = any(topic.name == HOST_TOPIC for topic in self.daemon_topics)
        topics = self.topics + self.servers if is_host else self.topics
        self._send(encode(Subscribe(topics)), CONTROL)

    def when_acknowledged(self, callback: Callable[[], object]) -> None:
        """Call back as soon as the daemon has handled all that was said to it so far."""
        session = self._session
        if self.is_up and not session.backlog_bytes and not session.unacknowledged:
            callback()
        elif not self._closed:
            self.loop.call_later(ACK_LOOK_S, lambda: self.when_acknowledged(callback))

    def submit(self, request: Request, told: Callable[[Outcome], object]) -> None:
        """Send a request; `told` hears every outcome.

        Raises:
            LimitExceeded: Too many wait, or it is too large. Nothing was queued.
        """
        if len(self._waiting) >= OPEN_CALLS_MAX:
            limit = OPEN_CALLS_MAX
            raise LimitExceeded("open requests", limit + 1, limit, "OPEN_CALLS_MAX")
        self.requester.submit(request, self.loop.time())
        self._waiting[request.id] = told
        self._wake_at(self.requester.next_timeout())

    def withdraw(self, request_id: bytes) -> None:
        """Nobody waits for this request any more: `told` hears nothing further."""
        if self._waiting.pop(request_id, None) is not None:
            self.requester.cancel(request_id)

    def _handle(self, event: Event) -> None:
        match event:
            case Received():
                self._receive(event.message)
            case Opened(_, resumed):
                self._attempts = 0
                if not resumed:
                    self._begin()
                self.is_up = True
                self._changed(True, "")
            case Refused(reason):
                self._down(reason)
            case _:
                pass

    def _begin(self) -> None:
        if self.is_up:
            self._down("the session began anew")
        for chunk in id_chunks(self.responder.remembered()):
            self._send(encode(Holding(chunk)), CONTROL)
        if self.topics:
            self._say_topics()
        self.requester.opened(self.loop.time())
        self._wake_at(self.requester.next_timeout())

    def _receive(self, data: bytes) -> None:
        message = decode(data)
        match message:
            case Request() | Cancel() | Settled():
                for delivery in self.responder.receive(message, self.loop.time()):
                    self._deliver(delivery)
                self._wake_at(self.responder.next_timeout())
            case Reply() | Receipt() | Returned():
                for outcome in self.requester.receive(message):
                    self._tell(outcome)
            case Subscribe(topics):
                self.daemon_topics = topics
                if self.servers:
                    self._say_topics()
            case BadMessage() | Holding():
                pass  # a newer daemon's; nothing here depends on it

    def _tell(self, outcome: Outcome) -> None:
        if isinstance(outcome, Heartbeat):
            told = self._waiting.get(outcome.id)
        else:
            told = self._waiting.pop(outcome.id, None)
            self.requester.settle((outcome.id,))
        if told is not None:
            told(outcome)

    # ---------------------------------------------------------------- time

    def _wake_at(self, at_s: float | None) -> None:
        if at_s is not None and (self._timer is None or at_s < self._timer.at_s):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(at_s, self._timed_out)

    def _timed_out(self) -> None:
        self._timer = None
        now_s = self.loop.time()
        for outcome in self.requester.handle_timeout(now_s):
            self._tell(outcome)
        for delivery in self.responder.handle_timeout(now_s):
            self._deliver(delivery)
        self._wake_at(self.requester.next_timeout())
        self._wake_at(self.responder.next_timeout())


class _Pending:
    """Somebody who waits for a request's outcome."""

    __slots__ = ("done", "outcome", "problem")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.outcome: Outcome | None = None
        self.problem: Exception | None = None

    def tell(self, outcome: Outcome) -> None:
        if not isinstance(outcome, Heartbeat):
            self.outcome = outcome
            self.done.set()

    def submit(self, connection: Connection, request: Request) -> None:
        """In the loop's thread."""
        try:
            connection.submit(request, self.tell)
        except LimitExceeded as error:
            self.problem = error
            self.done.set()

    def result(self) -> Outcome:
        """Once it is done."""
        if self.problem is not None:
            raise self.problem
        assert self.outcome is not None
        return self.outcome


class _Caller:
    """What Client and Agent share: requests to others."""

    def call(
        self,
        topic: str,
        method: str,
        args: Mapping[str, Any] | None = None,
        *,
        server: str = "",
        timeout_s: float = TIMEOUT_S,
        exchange: str = EXCHANGE,
        namespace: str | None = None,
        version: str | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a method and wait for its result.

        Args:
            server: On a host: the VM, by UUID or name, or a server of a local program. In a guest:
                the control side's server.
            timeout_s: Over 0 and at most 86400.

        Raises:
            CallTimeout: No answer in time. The method may have run.
            NoSuchDomain, NoSuchAgent, Rejected: It has not run.
            AgentGone: The agent went away. The method may have run.
            RemoteError: The method ran and raised.
            LimitExceeded: The request is too large, or too many are open.
            LinkDown: No session with the daemon within the time. Nothing was sent.
        """
        body = encode_invocation(
            method, args or {}, namespace=namespace, version=version, context=context
        )
        outcome = self._ask(CALL, exchange, topic, server, body, timeout_s)
        match outcome:
            case Answered(_, False, result):
                return _parse(result)
            case Answered(_, True, failure):
                class_name, text = decode_failure(failure)
                raise RemoteError(class_name, text, failure.decode("utf-8", "replace"))
            case _:
                raise error_of(outcome, timeout_s)

    def cast(
        self,
        topic: str,
        method: str,
        args: Mapping[str, Any] | None = None,
        *,
        server: str = "",
        fanout: bool = False,
        timeout_s: float = TIMEOUT_S,
        exchange: str = EXCHANGE,
        namespace: str | None = None,
        version: str | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        """Send a request and wait until somebody has taken responsibility for it: on a host who
        serves the topic, in a guest the control side's broker.

        Args:
            fanout: To all who serve the topic; on a host without `server`: its programs, and the
                agents of all its VMs. It returns when the first of them has taken it.

        Raises:
            CallTimeout: Nobody took it in time; it has been withdrawn, but may have been taken.
            Others: as `call`.
        """
        body = encode_invocation(
            method, args or {}, namespace=namespace, version=version, context=context
        )
        self._hand_over(FANOUT if fanout else 0, exchange, topic, server, body, timeout_s)

    def notify(
        self,
        topic: str,
        event_type: str,
        payload: Any = None,
        *,
        priority: str = "info",
        publisher_id: str = "",
        timeout_s: float = TIMEOUT_S,
        exchange: str = EXCHANGE,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        """Send a notification and wait until somebody has taken responsibility for it.

        Args:
            topic: Without the priority, e.g. "notifications".
            priority: A name in lower case that oslo.messaging has a method for.
            publisher_id: Who says so; empty: this machine's name.

        Raises:
            As `cast`.
        """
        args = {
            "publisher_id": publisher_id or os.uname().nodename,
            "event_type": event_type,
            "payload": payload,
            "metadata": new_metadata(),
        }
        body = encode_invocation(priority, args, context=context)
        self._hand_over(NOTIFICATION, exchange, topic, "", body, timeout_s)

    def _hand_over(
        self, flags: int, exchange: str, topic: str, server: str, body: bytes, timeout_s: float
    ) -> None:
        outcome = self._ask(flags, exchange, topic, server, body, timeout_s)
        if not isinstance(outcome, Taken):
            raise error_of(outcome, timeout_s)

    def _ask(
        self, flags: int, exchange: str, topic: str, server: str, body: bytes, timeout_s: float
    ) -> Outcome:
        if not 0 < timeout_s <= 86400:
            raise ConfigError("timeout_s", f"{timeout_s} is not over 0 and at most 86400 seconds")
        for what, name in (("topic", topic), ("server", server), ("exchange", exchange)):
            if len(name.encode()) > NAME_BYTES_MAX:
                raise LimitExceeded(what, len(name.encode()), NAME_BYTES_MAX, "NAME_BYTES_MAX")
        timeout_ms = max(1, int(timeout_s * 1000))
        request = Request(os.urandom(16), flags, timeout_ms, 0, exchange, topic, server, body)
        return self._outcome_of(request, timeout_s)

    def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        """Send a request and wait for its outcome, which is no Heartbeat."""
        raise NotImplementedError


class Client(_Caller):
    """Calls and casts. Safe from several threads; calls do not block each other.

    Args:
        path: The daemon's socket.

    Raises:
        LinkError: The daemon cannot be reached: the subclass and the text say why.
    """

    def __init__(self, path: str = HOST_SOCKET) -> None:
        self._loop = Loop()
        self._ready = threading.Event()
        self._closed = False
        self._problem = ""
        self._connection = Connection(self._loop, path, "client", _refuse, self._connected)
        self._thread = threading.Thread(target=self._loop.run, name="vchan-client", daemon=True)
        try:
            self._connection.connect()
        except LinkError:
            self._connection.close()
            self._loop.close()
            raise
        self._thread.start()

    def _connected(self, up: bool, problem: str) -> None:
        self._problem = problem
        if up:
            self._ready.set()
        else:
            self._ready.clear()

    def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        if not self._ready.wait(min(timeout_s, 5.0)):
            raise LinkDown(self._connection.path, self._problem or "the daemon does not answer")
        pending = _Pending()
        self._loop.call_soon_threadsafe(lambda: pending.submit(self._connection, request))
        if not pending.done.wait(timeout_s + LATE_S):  # the loop's own deadline comes first
            raise CallTimeout(f"no answer within {timeout_s:g} s")
        return pending.result()

    def close(self) -> None:
        """Close the connection and end the thread. Calls that wait time out. Harmless twice."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()

    def _end(self) -> None:
        self._connection.close()
        self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse(_: Delivery) -> None:
    """A client serves nothing; the daemon sends it nothing."""


def _no_log(_: str) -> None:
    pass


def new_metadata() -> dict[str, str]:
    """A notification's, as oslo.messaging's own notifier makes it."""
    import datetime  # here: they cost start-up time
    import uuid

    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    return {"message_id": str(uuid.uuid4()), "timestamp": str(now)}


def _parse(result: bytes) -> Any:
    try:
        return json.loads(result)
    except (ValueError, RecursionError) as error:
        raise RemoteError("BadBody", f"the result is not JSON: {error}", "") from error


def error_of(outcome: Outcome, timeout_s: float) -> RequestError:
    """What an outcome that is none of success is called."""
    if isinstance(outcome, HandedBack):
        return _REASONS.get(outcome.reason, Rejected)(outcome.text)
    if isinstance(outcome, Answered):
        return Rejected("a cast was answered: the other end is broken")
    return CallTimeout(f"no answer within {timeout_s:g} s")


class _Endpoint(NamedTuple):
    methods: object
    namespace: str | None
    version: str


class Agent(_Caller):
    """Serves topics: runs the methods that the control side calls; and calls out itself.

    Methods run on the thread that calls `run`, one at a time, unless `workers` is over 0. A cast is
    acknowledged before its method runs, as oslo.messaging's own server does, so a method never
    runs twice. A method may call, cast and notify: meanwhile no other begins on its thread.

    Args:
        path: The guest daemon's socket.
        workers: Threads for methods; 0: the loop's own. With threads, callers that ask for
            heartbeats (oslo.messaging's call_monitor_timeout) get them while a method runs.
        log: Told what an operator may want to know.
    """

    def __init__(
        self,
        path: str = AGENT_SOCKET,
        *,
        workers: int = 0,
        log: Callable[[str], object] | None = None,
    ) -> None:
        self.loop = Loop()
        self._log = log or _no_log
        self._connection = Connection(self.loop, path, "agent", self._deliver, self._changed)
        self._endpoints: dict[Topic, list[_Endpoint]] = {}
        self._inbox: deque[Request] = deque()
        self._is_working = False
        self._thread = 0  # who runs the loop
        self._told = ""
        self._stopped = False
        self._pool: Any = None
        if workers:
            from concurrent.futures import ThreadPoolExecutor  # here: it costs start-up time

            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vchan-agent")

    def serve(
        self,
        topic: str,
        endpoint: object,
        *,
        exchange: str = EXCHANGE,
        namespace: str | None = None,
        version: str = "1.0",
    ) -> None:
        """Serve a topic with an object's public methods.

        Args:
            version: Calls for the same major and at most this minor version are accepted.
        """
        key = Topic(exchange, topic)
        self._endpoints.setdefault(key, []).append(_Endpoint(endpoint, namespace, version))
        self._connection.subscribe(tuple(self._endpoints))

    def run(self) -> None:
        """Serve until `stop`. Waits for the daemon when it is not there."""
        self._thread = threading.get_ident()
        self._connection._reconnect()
        try:
            self.loop.run()
        finally:
            self._stopped = True
            self._connection.close()
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)
            self.loop.close()

    def stop(self) -> None:
        """End `run`. From any thread or signal handler."""
        self._stopped = True
        self.loop.stop()

    # ---------------------------------------------------------------- calling

    def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        pending = _Pending()
        if threading.get_ident() == self._thread:
            pending.submit(self._connection, request)
            while not (pending.done.is_set() or self._stopped):
                self.loop.run_once()
        else:  # of a worker, or of a thread of the program's own
            self.loop.call_soon_threadsafe(lambda: pending.submit(self._connection, request))
            pending.done.wait(timeout_s + LATE_S)  # the loop's own deadline comes first
        if not pending.done.is_set():
            problem = "the agent is stopping" if self._stopped else "the agent is not running"
            raise LinkDown(self._connection.path, problem)
        return pending.result()

    # ---------------------------------------------------------------- serving

    def _changed(self, up: bool, reason: str) -> None:
        news = "connected" if up else reason
        if news != self._told:  # not at every attempt
            self._told = news
            self._log(news)
        if not up:
            self._drop_untaken()

    def _drop_untaken(self) -> None:
        """The daemon gives the casts we have not acknowledged to another agent, or to us again."""
        for request in [request for request in self._inbox if not request.is_call]:
            self._inbox.remove(request)
            self._connection.responder.give_back(request.id, RELEASED, "")

    def _deliver(self, delivery: Delivery) -> None:
        match delivery:
            case Deliver(request):
                self._inbox.append(request)
                if len(self._inbox) == 1:
                    # Not at once: a method that calls out lets the connection receive again.
                    self.loop.call_soon(self._work)
            case Cancelled():
                pass  # a thread cannot be stopped; its answer will find nobody

    def _work(self) -> None:
        """One request a turn: its answer goes out before the next begins."""
        if self._is_working or not self._inbox:
            return
        self._is_working = True
        self._begin(self._inbox.popleft())
        self._is_working = False
        if self._inbox:
            self.loop.call_soon(self._work)

    def _begin(self, request: Request) -> None:
        responder = self._connection.responder
        if not request.is_call:
            if not responder.take(request.id, self.loop.time()):
                return  # withdrawn, or its time is over
            self._connection.flush()
        elif request.id not in responder:
            return  # likewise
        if self._pool is None:
            self._finish(request, *self._run_method(request))
        else:
            self._pool.submit(self._run_in_pool, request)
            if request.monitor_ms:
                self._beat(request)

    def _beat(self, request: Request) -> None:
        """Say now and then that it is being worked on: its caller wants to hear it so often."""
        if request.id in self._connection.responder:
            self._connection.responder.heartbeat(request.id, self.loop.time())
            self.loop.call_later(request.monitor_ms / 2000, lambda: self._beat(request))

    def _run_in_pool(self, request: Request) -> None:
        failed, body = self._run_method(request)
        self.loop.call_soon_threadsafe(lambda: self._finish(request, failed, body))

    def _finish(self, request: Request, failed: bool, body: bytes) -> None:
        if not request.is_call:
            if failed:
                class_name, text = decode_failure(body)
                self._log(f"cast to {request.topic} raised {class_name}: {text}")
            return
        responder, now_s = self._connection.responder, self.loop.time()
        try:
            responder.answer(request.id, body, failed=failed, now_s=now_s)
        except LimitExceeded as error:
            failure = encode_failure("LimitExceeded", str(error))
            responder.answer(request.id, failure, failed=True, now_s=now_s)

    def _run_method(self, request: Request) -> tuple[bool, bytes]:
        """(failed, body). What a method raises is the caller's to see, whatever it is."""
        try:
            invocation = decode_invocation(request.body)
            method = self._find(_topic_of(request, invocation), invocation)
            return False, encode_json(method(**invocation.args))
        except Exception as error:  # noqa: BLE001 - relayed to the caller
            return True, _failure_of(error)

    def _find(self, topic: Topic, wanted: Invocation) -> Callable[..., Any]:
        for endpoint in self._endpoints.get(topic, ()):
            if endpoint.namespace == wanted.namespace and _compatible(
                endpoint.version, wanted.version or "1.0"
            ):
                method = getattr(endpoint.methods, wanted.method, None)
                if callable(method) and not wanted.method.startswith("_"):
                    return method  # type: ignore[no-any-return]
        namespace = f" in namespace {wanted.namespace}" if wanted.namespace else ""
        version = f", version {wanted.version or '1.0'}"
        raise NoSuchMethod(f"{topic.name} has no method {wanted.method}{namespace}{version}")


def _topic_of(request: Request, invocation: Invocation) -> Topic:
    """What the agent served it as: notifications of a priority are a topic of their own."""
    priority = f".{invocation.method}"
    if request.flags & NOTIFICATION and not request.topic.endswith(priority):
        return Topic(request.exchange, request.topic + priority)
    return request.target


def _compatible(offered: str, wanted: str) -> bool:
    if offered == wanted:
        return True
    try:
        have_major, have_minor = (int(part) for part in offered.split(".")[:2])
        want_major, want_minor = (int(part) for part in wanted.split(".")[:2])
    except ValueError as error:
        raise BadBody(f"version {wanted!r} is not MAJOR.MINOR") from error
    return have_major == want_major and want_minor <= have_minor


def _failure_of(error: Exception) -> bytes:
    import traceback  # here: it costs start-up time

    kind = type(error)
    lines = traceback.format_exception(error)
    try:
        encode_json(list(error.args))
        args = list(error.args)
    except (TypeError, ValueError):
        args = [str(error)]
    return encode_failure(
        kind.__name__, str(error), module=kind.__module__, args=args, traceback=lines
    )
