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
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, Self

from vchan.errors import (
    BadBody,
    CallTimeout,
    LimitExceeded,
    LinkDown,
    LinkError,
    NoSuchMethod,
    NotAPort,
    Rejected,
    RemoteError,
    RequestError,
    VchanError,
)
from vchan.io.link import Link
from vchan.io.loop import Alarm, Loop, Scheduler, Timer
from vchan.io.streams import Stream, connect_local
from vchan.rpc.arguments import (
    PRIORITIES,
    check_bytes,
    check_callable,
    check_count,
    check_endpoint,
    check_mapping,
    check_name,
    check_optional_name,
    check_path,
    check_seconds,
    check_topic,
    check_version,
    raw,
    raw_methods,
    wrong,
)
from vchan.rpc.bodies import (
    FAILURE_TEXT_MAX,
    Invocation,
    decode_failure,
    decode_invocation,
    decode_raw,
    encode_failure,
    encode_invocation,
    encode_json,
    encode_raw,
)
from vchan.rpc.in_flight import (
    Answered,
    Cancelled,
    Deliver,
    Delivery,
    Heartbeat,
    Outcome,
    Requester,
    Responder,
    Taken,
)
from vchan.rpc.messages import (
    CALL,
    DEFAULT_EXCHANGE,
    FANOUT,
    NOTIFICATION,
    RAW,
    REFUSED,
    RELEASED,
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
    Unknown,
    decode,
    encode,
    id_chunks,
    milliseconds,
)
from vchan.rpc.outcomes import error_of
from vchan.session import CONTROL, Config, Event, Opened, Peer, Received, Refused, Role, Session
from vchan.wire.frames import LOCAL_FRAME_BYTES_MAX, PLAIN_PAYLOADS, RAW_BODIES

__all__ = ["Agent", "Client", "Connection", "raw"]

AGENT_SOCKET: Final = "/run/vchan/agent.sock"
SOCKET_VARIABLE: Final = "VCHAN_SOCKET"
"""Where an agent attaches, in the environment of one that vchan-guest or `vchan dev` runs."""
HOST_SOCKET: Final = "/run/vchan/host.sock"
HOST_TOPIC: Final = "vchan.host"
"""The topic that a host's daemon serves itself."""
EXCHANGE: Final = DEFAULT_EXCHANGE
TIMEOUT_S: Final = 60.0
"""oslo.messaging's default rpc_response_timeout."""
OPEN_CALLS_MAX: Final = 1024
"""Requests of one client that wait for an answer. At it: LimitExceeded."""
RECONNECT_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Between attempts to connect: a daemon that restarts is back within a second."""
GRACE_S: Final = 1.0
"""When a request's time is over the daemon's word is waited for so long: it knows whether the
request was delivered, and so may have run."""
LATE_S: Final = GRACE_S + 1.0
"""A thread that waits for the loop, whose own deadline comes first, gives up so late."""
READY_S: Final = 5.0
"""How much of a call's time is spent waiting for the daemon to be there."""
ACK_LOOK_S: Final = 0.005
"""How often `when_acknowledged` looks: an acknowledgement comes after 20 ms at the latest."""
WORKERS_MAX: Final = 256
"""Threads of one agent: a guest that needs more has another trouble. At it: LimitExceeded."""
FAILURES_LOGGED_MAX: Final = 20
"""Failures of an agent's methods that it logs in FAILURES_PERIOD_S: who calls a method that fails
decides how often it does. At it: the others are counted, and their number is logged."""
FAILURES_PERIOD_S: Final = 10.0
"""Long enough that a log with FAILURES_LOGGED_MAX in each can be read as it grows."""
TICK_S: Final = 0.1
"""When something has come, its time is looked at after so long: to ask at each message when would
cost more than the message."""
WORK_S: Final = 0.002
"""An agent's methods run in a row for so long, if none takes longer. At it: what has arrived
meanwhile, a withdrawal perhaps, is taken before the next begins."""


class Connection:
    """A connection to a daemon that comes back by itself. Belongs to its loop's thread.

    Args:
        path: The daemon's socket.
        name: Ours, for the daemon's log.
        deliver: Told each request and cancellation that arrives.
        changed: Told when the daemon is there (True) or not (False), with the reason. It is told
            False before each new session: a daemon that lost us gives our requests to others.
        open_stream: What connects to the socket, if not `connect_local`.
        takes_raw: Requests may be RAW: `deliver` knows what to do with those.
        other: Told each message that is none of a request's.
        refill: See `Link`; given the session.
    """

    def __init__(
        self,
        loop: Scheduler,
        path: str,
        name: str,
        deliver: Callable[[Delivery], object],
        changed: Callable[[bool, str], object],
        open_stream: Callable[[str], Stream] | None = None,
        *,
        takes_raw: bool = False,
        other: Callable[[bytes], object] = lambda _: None,
        refill: Callable[[Session], object] | None = None,
    ) -> None:
        self.loop = loop
        self.path = path
        self._other = other
        self._refill = refill
        self._open_stream = open_stream or connect_local
        self._deliver = deliver
        self._changed = changed
        config = Config(
            Role.GUEST,
            os.urandom(16),
            name,
            frame_bytes_max=LOCAL_FRAME_BYTES_MAX,
            features=PLAIN_PAYLOADS | (RAW_BODIES if takes_raw else 0),
        )
        self._session = Session(config, os.urandom)
        self._link: Link | None = None
        self._attempts = 0
        self._closed = False
        self._retry: Timer | None = None
        self._alarm = Alarm(loop, self._timed_out)
        self._waiting: dict[bytes, Callable[[Outcome], object]] = {}
        self.is_up = False
        self.topics: tuple[Topic, ...] = ()
        self.servers: tuple[Topic, ...] = ()
        self.daemon_topics: tuple[Topic, ...] = ()
        """What the daemon says that it serves itself: a host's names "vchan.host"."""
        self._charges: tuple[bytes, ...] = ()  # for the next daemon
        self._daemon = b""  # the run of the one that knows of them
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
            stream = self._open_stream(self.path)
        except LinkError as error:
            is_first = self._attempts == 0
            self._plan_retry()
            self._changed(False, str(error))
            if is_first:
                raise
            return
        self._link = Link(self.loop, self._session, stream, self._handle, self._lost)
        if self._refill is not None:
            self._link.refill = partial(self._refill, self._session)

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
        if self._retry is not None:
            self._retry.cancel()
        self._alarm.cancel()
        if self._link is not None:
            self._link.close()
            self._link = None

    def wake(self) -> None:
        """Write soon what there is to write."""
        if self._link is not None:
            self._link.wake()

    def flush(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        if self._link is not None:
            self._link.flush()

    def cork(self) -> None:
        """What is sent from here on goes out with `uncork`. Who waits for something meanwhile
        uncorks first."""
        if self._link is not None:
            self._link.cork()

    def uncork(self) -> None:
        """Write what is queued; see `cork`."""
        if self._link is not None:
            self._link.uncork()

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
            Rejected: It is RAW, and the daemon takes none. Nothing was queued.
        """
        if len(self._waiting) >= OPEN_CALLS_MAX:
            limit = OPEN_CALLS_MAX
            raise LimitExceeded("open requests", limit + 1, limit, "OPEN_CALLS_MAX")
        self.requester.submit(request, self.loop.time())
        self._waiting[request.id] = told
        self._alarm.set(self.requester.next_timeout())

    def withdraw(self, request_id: bytes) -> None:
        """Nobody waits for this request any more: `told` hears nothing further."""
        if self._waiting.pop(request_id, None) is not None:
            self.requester.cancel(request_id)

    def _handle(self, event: Event) -> None:
        match event:
            case Received():
                self._receive(event.message)
            case Opened(peer, resumed):
                self._attempts = 0
                if not resumed:
                    self._begin(peer)
                self.is_up = True
                self._changed(True, "")
            case Refused(reason):
                self._down(reason)
            case _:
                pass

    def _begin(self, daemon: Peer) -> None:
        if self.is_up:
            self._down("the session began anew")
        if daemon.instance == self._daemon:
            self._charges = ()  # it has given to others what was ours while we were away
        self._daemon = daemon.instance
        for chunk in id_chunks(self.responder.remembered() + self._charges):
            self._send(encode(Holding(chunk)), CONTROL)
        if self.topics:
            self._say_topics()
        upgrade = "" if daemon.takes_raw else f"{self.path}: this daemon takes no raw bodies"
        self.requester.opened(self.loop.time(), no_raw=upgrade and f"{upgrade}: upgrade vchan")
        self._alarm.set(self.requester.next_timeout())

    def _receive(self, data: bytes) -> None:
        message = decode(data)
        match message:
            case Request() | Cancel() | Settled():
                now_s = self.loop.time()
                for delivery in self.responder.receive(message, now_s):
                    self._deliver(delivery)
                self._alarm.set(now_s + TICK_S)  # it may have a new timeout
            case Reply() | Receipt() | Returned():
                for outcome in self.requester.receive(message):
                    self._tell(outcome)
            case Subscribe(topics):
                self.daemon_topics = topics
                if self.servers:
                    self._say_topics()
            case Holding(ids):
                self._charges = ids
            case BadMessage() | Unknown():
                self._other(data)  # or a newer daemon's: nothing here depends on it

    def _tell(self, outcome: Outcome) -> None:
        if isinstance(outcome, Heartbeat):
            told = self._waiting.get(outcome.id)
        else:
            told = self._waiting.pop(outcome.id, None)
            self.requester.settle((outcome.id,))
        if told is not None:
            told(outcome)

    # ---------------------------------------------------------------- time

    def _timed_out(self) -> None:
        now_s = self.loop.time()
        for outcome in self.requester.handle_timeout(now_s):
            self._tell(outcome)
        for delivery in self.responder.handle_timeout(now_s):
            self._deliver(delivery)
        self._alarm.set(self.requester.next_timeout())
        self._alarm.set(self.responder.next_timeout())


class _Pending:
    """Somebody who waits for a request's outcome."""

    __slots__ = ("done", "has_begun", "outcome", "problem")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.has_begun = False  # it may have been sent
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
        except (LimitExceeded, Rejected) as error:
            self.problem = error
            self.done.set()

    def result(self) -> Outcome:
        """Once it is done."""
        if self.problem is not None:
            raise self.problem
        assert self.outcome is not None
        return self.outcome


class _Pendings:
    """The threads that wait for what a loop's thread hears. What a thread has given up before it
    was begun is never begun; whoever waits when the loop ends is told so.

    Args:
        path: The daemon's socket, for what is said.
    """

    def __init__(self, loop: Loop, path: str) -> None:
        self._loop = loop
        self._path = path
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards what follows, and `has_begun`
        self._open: set[_Pending] = set()
        self._over = ""

    def ask(self, connection: Connection, request: Request, wait_s: float) -> Outcome:
        """Have a request sent by the loop's thread, and wait for its outcome.

        Raises:
            LinkDown: The loop has ended, or did not get to it: it was not sent, and will not be.
            CallTimeout: It may have been.
        """
        pending = _Pending()
        with self._lock:
            self._require_loop()
            self._open.add(pending)
        self._loop.call_soon_threadsafe(lambda: self._begin(pending, connection, request))
        pending.done.wait(wait_s)
        with self._lock:
            self._open.discard(pending)
            if not pending.done.is_set():
                pending.problem = self._unheard(pending, "does not get to it")
        return pending.result()

    def _require_loop(self) -> None:
        if self._over:
            raise LinkDown(self._path, self._over)
        if self._pid != os.getpid():  # no thread is here, and the descriptors are that process's
            raise LinkDown(self._path, "it was made before this process was forked: make another")

    def _begin(self, pending: _Pending, connection: Connection, request: Request) -> None:
        with self._lock:
            if pending not in self._open:
                return  # nobody waits any more
            pending.has_begun = True
        pending.submit(connection, request)

    def _unheard(self, pending: _Pending, why: str) -> VchanError:
        if pending.has_begun:
            return CallTimeout(f"{self._path}: {why}; the method may have run")
        return LinkDown(self._path, why)

    def end(self, why: str) -> None:
        """The loop has ended, or is about to: nothing is heard or sent any more."""
        with self._lock:
            self._over = self._over or why
            for pending in self._open:
                if not pending.done.is_set():
                    pending.problem = self._unheard(pending, why)
                    pending.done.set()


def invocation_body(
    method: str,
    args: Mapping[str, Any] | None,
    namespace: str | None,
    version: str | None,
    context: Mapping[str, Any] | None,
) -> bytes:
    """The body of a call or cast, of a program's arguments."""
    check_name("method", method)
    check_mapping("args", args)
    check_optional_name("namespace", namespace)
    if version is not None:
        check_version(version)
    check_mapping("context", context)
    return encode_invocation(
        method, args or {}, namespace=namespace, version=version, context=context
    )


def raw_body(invocation: bytes, data: bytes | bytearray | memoryview) -> bytes:
    """The body of a raw call, of a program's arguments."""
    check_bytes("data", data)
    return encode_raw(invocation, data)


def notification_body(
    event_type: str,
    payload: Any,
    priority: str,
    publisher_id: str,
    context: Mapping[str, Any] | None,
) -> bytes:
    """The body of a notification, of a program's arguments."""
    check_name("event_type", event_type)
    check_name("publisher_id", publisher_id, may_be_empty=True)
    check_mapping("context", context)
    if priority not in PRIORITIES:
        raise wrong("priority", priority, f"one of {', '.join(PRIORITIES)}")
    args = {
        "publisher_id": publisher_id or os.uname().nodename,
        "event_type": event_type,
        "payload": payload,
        "metadata": new_metadata(),
    }
    return encode_invocation(priority, args, context=context)


def make_request(
    flags: int, exchange: str, topic: str, server: str, body: bytes, timeout_s: float
) -> Request:
    """A request with an id of its own, of a program's arguments."""
    check_seconds("timeout_s", timeout_s)
    check_name("topic", topic)
    check_name("server", server, may_be_empty=True)
    check_name("exchange", exchange)
    timeout_ms = milliseconds(timeout_s)
    return Request(os.urandom(16), flags, timeout_ms, 0, exchange, topic, server, body)


def result_of(outcome: Outcome, timeout_s: float) -> Any:
    """What a call returns; or raises what it raises."""
    match outcome:
        case Answered(_, False, result):
            return _parse(result)
        case Answered(_, True, failure):
            class_name, text = decode_failure(failure)
            raise RemoteError(class_name, text, failure.decode("utf-8", "replace"))
        case _:
            raise error_of(outcome, timeout_s)


def raw_result_of(outcome: Outcome, timeout_s: float) -> bytes:
    """What a raw call returns; or raises what it raises."""
    if isinstance(outcome, Answered) and not outcome.failed:
        return outcome.body
    result_of(outcome, timeout_s)
    raise AssertionError("what is no result raises")


def require_taken(outcome: Outcome, timeout_s: float) -> None:
    """Raise what a cast or notification raises, if it was not taken."""
    if not isinstance(outcome, Taken):
        raise error_of(outcome, timeout_s)


def path_of(path: str | os.PathLike[str]) -> str:
    """A socket's path, of a program's argument."""
    if not isinstance(path, str) and hasattr(path, "__fspath__"):
        path = os.fspath(path)
    check_path(path)
    assert isinstance(path, str)
    return path


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
            ConfigError: An argument is wrong: which, and what was expected. Nothing was sent.
            TypeError, ValueError: JSON cannot say what `args` holds. Nothing was sent.
            CallTimeout: No answer in time. The method may have run.
            NoSuchDomain, NoSuchAgent, Rejected: It has not run, and never will.
            AgentGone: The agent went away, or its guest, or both lost their memory. The method may
                have run.
            RemoteError: The method ran and raised.
            LimitExceeded: The request is too large, or too many are open.
            LinkDown: No session with the daemon within the time. Nothing was sent.
        """
        body = invocation_body(method, args, namespace, version, context)
        request = make_request(CALL, exchange, topic, server, body, timeout_s)
        return result_of(self._outcome_of(request, timeout_s), timeout_s)

    def call_raw(
        self,
        topic: str,
        method: str,
        data: bytes | bytearray | memoryview = b"",
        args: Mapping[str, Any] | None = None,
        *,
        server: str = "",
        timeout_s: float = TIMEOUT_S,
        exchange: str = EXCHANGE,
        namespace: str | None = None,
        version: str | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Call a method that is declared `raw`: it takes bytes and returns bytes, and neither goes
        through JSON. They reach programs and agents of vchan.client and vchan.aio, and not what is
        behind a broker.

        Args:
            data: The method's first argument.
            args: Its others, by name.
            Others: as `call`.

        Raises:
            Rejected: It has not run, and never will: the method takes JSON, or somebody on the way
                is too old for raw bodies. The text says who, and what to do.
            Others: as `call`.
        """
        body = raw_body(invocation_body(method, args, namespace, version, context), data)
        request = make_request(CALL | RAW, exchange, topic, server, body, timeout_s)
        return raw_result_of(self._outcome_of(request, timeout_s), timeout_s)

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
        body = invocation_body(method, args, namespace, version, context)
        flags = FANOUT if fanout else 0
        request = make_request(flags, exchange, topic, server, body, timeout_s)
        require_taken(self._outcome_of(request, timeout_s), timeout_s)

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
            priority: One of PRIORITIES, as oslo.messaging has them.
            publisher_id: Who says so; empty: this machine's name.

        Raises:
            As `cast`.
        """
        body = notification_body(event_type, payload, priority, publisher_id, context)
        request = make_request(NOTIFICATION, exchange, topic, "", body, timeout_s)
        require_taken(self._outcome_of(request, timeout_s), timeout_s)

    def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        """Send a request and wait for its outcome, which is no Heartbeat."""
        raise NotImplementedError


class Client(_Caller):
    """Calls and casts. Safe from several threads; calls do not block each other.

    Args:
        path: The daemon's socket.

    Raises:
        ConfigError: `path` is no path.
        LinkError: The daemon cannot be reached: the subclass and the text say why.
    """

    def __init__(self, path: str | os.PathLike[str] = HOST_SOCKET) -> None:
        self._path = path = path_of(path)
        self._loop = Loop()
        self._ready = threading.Event()
        self._closed = False
        self._problem = ""
        self._pendings = _Pendings(self._loop, path)
        self._connection = Connection(self._loop, path, "client", _refuse, self._connected)
        self._thread = threading.Thread(target=self._work, name="vchan-client", daemon=True)
        try:
            self._connection.connect()
        except LinkError:
            self._connection.close()
            self._loop.close()
            raise
        self._thread.start()

    def _work(self) -> None:
        try:
            self._loop.run()
        finally:  # whoever waits must not wait for a thread that a bug has ended
            self._connection.close()
            self._pendings.end("the client was closed" if self._closed else "its thread has ended")
            self._ready.set()
            self._loop.close()

    def _connected(self, up: bool, problem: str) -> None:
        self._problem = problem
        if up:
            self._ready.set()
        else:
            self._ready.clear()

    def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        until_s = self._loop.time() + timeout_s
        if not self._ready.wait(min(timeout_s, READY_S)):
            raise LinkDown(self._path, self._problem or "the daemon does not answer")
        left_s = max(0.001, until_s - self._loop.time())
        request = request._replace(timeout_ms=milliseconds(left_s))
        # The loop's own deadline comes first.
        return self._pendings.ask(self._connection, request, left_s + LATE_S)

    def close(self) -> None:
        """Close the connection and end the thread. Calls that wait raise CallTimeout, later ones
        LinkDown. Harmless twice."""
        if self._closed:
            return
        self._stop()
        self._thread.join(5.0)

    def _stop(self) -> None:
        self._closed = True
        self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            # Raised between any two instructions, also while this thread held a lock of an Event's:
            # the other one may wait for that, and need not be waited for.
            self._stop()
        else:
            self.close()


def _refuse(_: Delivery) -> None:
    """A client serves nothing; the daemon sends it nothing."""


def log_to_stderr(text: str) -> None:
    """What an agent does with its log if it is not told otherwise."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    try:
        sys.stderr.write(f"vchan agent: {shown}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass  # nobody reads it, or there is none: that is no reason to stop serving


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


class _Endpoint(NamedTuple):
    methods: object
    namespace: str | None
    version: str
    raw: frozenset[str]
    """The names of those that take bytes."""


class _WrongKind(BadBody):
    """A method that takes bytes was called with JSON, or the other way round. It has not run."""


class _Ran(NamedTuple):
    """What became of a method: the answer to its caller, and what the log is told of it."""

    failed: bool
    body: bytes
    story: str = ""
    refusal: str = ""
    """In place of an answer: why it has not run."""


class _Failures:
    """How much of what fails is logged: see FAILURES_LOGGED_MAX."""

    def __init__(self) -> None:
        self._until_s = 0.0
        self._left = 0

    def lines(self, story: str, now_s: float) -> list[str]:
        """What to log when a method has failed."""
        lines = []
        if now_s >= self._until_s:
            if self._left < 0:
                lines.append(f"{-self._left} more methods failed (FAILURES_LOGGED_MAX)")
            self._until_s, self._left = now_s + FAILURES_PERIOD_S, FAILURES_LOGGED_MAX
        self._left -= 1
        return [*lines, story] if self._left >= 0 else lines


class TopicServer:
    """What serves topics, for `Agent` here and in `vchan.aio`: each says how a method is run.

    Args:
        path: The daemon's socket.
        is_async: Methods may be coroutines.
        log: Told what an operator may want to know.
        open_stream: See Connection.
    """

    def __init__(
        self,
        loop: Scheduler,
        path: str,
        log: Callable[[str], object],
        *,
        is_async: bool = False,
        open_stream: Callable[[str], Stream] | None = None,
    ) -> None:
        self._scheduler = loop
        self._log = log
        self._is_async = is_async
        self._connection = Connection(
            loop, path, "agent", self._deliver, self._changed, open_stream, takes_raw=True
        )
        self._endpoints: dict[Topic, list[_Endpoint]] = {}
        self._inbox: deque[Request] = deque()
        self._beats: dict[bytes, Timer] = {}  # by call that is being worked on elsewhere
        self._failures = _Failures()
        self._told = ""

    def _add(
        self, topic: str, endpoint: object, exchange: str, namespace: str | None, version: str
    ) -> None:
        """Have one more endpoint. The connection is to be told of it: `_subscribe`."""
        check_topic(topic)
        check_name("exchange", exchange)
        check_optional_name("namespace", namespace)
        check_version(version)
        check_endpoint(endpoint, is_async=self._is_async)
        key = Topic(exchange, topic)
        if key not in self._endpoints and len(self._endpoints) >= TOPICS_MAX:
            raise LimitExceeded("topics", TOPICS_MAX + 1, TOPICS_MAX, "TOPICS_MAX")
        made = _Endpoint(endpoint, namespace, version, raw_methods(endpoint))
        self._endpoints.setdefault(key, []).append(made)

    def _subscribe(self) -> None:
        self._connection.subscribe(tuple(self._endpoints))

    def _connect(self) -> None:
        """Now, and whenever the connection is lost.

        Raises:
            NotAPort: The path is no socket: to wait does not help.
        """
        try:
            self._connection.connect()
        except NotAPort:
            self._connection.close()
            raise
        except LinkError:
            pass  # it may come; `_changed` was told
        if not self._endpoints:
            self._log("serves no topic: see serve()")

    # ---------------------------------------------------------------- requests come

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
                    self._scheduler.call_soon(self._work)
            case Cancelled(request_id):
                self._end_beat(request_id)
                self._cancelled(request_id)

    def _work(self) -> None:
        """Begin what is in the inbox."""
        raise NotImplementedError

    def _cancelled(self, request_id: bytes) -> None:
        """Nobody waits for it any more."""

    def _may_begin(self, request: Request) -> bool:
        """Take responsibility for it. False: it was withdrawn, or its time is over."""
        responder = self._connection.responder
        if request.is_call:
            return request.id in responder
        if not responder.take(request.id, self._scheduler.time()):
            return False
        self._connection.flush()
        return True

    # ---------------------------------------------------------------- and are answered

    def _beat(self, request: Request) -> None:
        """Say now and then that it is being worked on: its caller wants to hear it so often."""
        if request.id in self._connection.responder:
            self._connection.responder.heartbeat(request.id, self._scheduler.time())
            self._beats[request.id] = self._scheduler.call_later(
                request.monitor_ms / 2000, lambda: self._beat(request)
            )

    def _end_beat(self, request_id: bytes) -> None:
        """Nobody waits for it any more: a timer would hold the request until its time came."""
        timer = self._beats.pop(request_id, None)
        if timer is not None:
            timer.cancel()

    def _finish(self, request: Request, ran: _Ran) -> None:
        self._end_beat(request.id)
        responder, now_s = self._connection.responder, self._scheduler.time()
        story = ran.story
        if request.is_call and ran.refusal:
            responder.refuse(request.id, REFUSED, ran.refusal)
        elif request.is_call:
            try:
                responder.answer(request.id, ran.body, failed=ran.failed, now_s=now_s)
            except LimitExceeded as error:
                failure = encode_failure("LimitExceeded", str(error))
                responder.answer(request.id, failure, failed=True, now_s=now_s)
                story = f"an answer on topic {request.topic} cannot be sent: {error}"
        if story:
            for line in self._failures.lines(story, now_s):
                self._log(line)

    def _method_for(self, request: Request) -> tuple[Callable[..., Any], Invocation]:
        """What a request asks for.

        Raises:
            BadBody, NoSuchMethod: The request is wrong.
        """
        if request.flags & RAW:
            return self._raw_method_for(request)
        invocation = decode_invocation(request.body)
        return self._find(_topic_of(request, invocation), invocation), invocation

    def _raw_method_for(self, request: Request) -> tuple[Callable[..., Any], Invocation]:
        asked, data = decode_raw(request.body)
        invocation = decode_invocation(asked)
        method = self._find(_topic_of(request, invocation), invocation, is_raw=True)
        return lambda **args: method(data, **args), invocation

    def _find(
        self, topic: Topic, wanted: Invocation, *, is_raw: bool = False
    ) -> Callable[..., Any]:
        for endpoint in self._endpoints.get(topic, ()):
            if endpoint.namespace == wanted.namespace and _compatible(
                endpoint.version, wanted.version or "1.0"
            ):
                method = getattr(endpoint.methods, wanted.method, None)
                if callable(method) and not wanted.method.startswith("_"):
                    if (wanted.method in endpoint.raw) is not is_raw:
                        use = "JSON: use call, not call_raw" if is_raw else "bytes: use call_raw"
                        raise _WrongKind(f"{wanted.method} of topic {topic.name} takes {use}")
                    return method  # type: ignore[no-any-return]
        namespace = f" in namespace {wanted.namespace}" if wanted.namespace else ""
        version = f", version {wanted.version or '1.0'}"
        raise NoSuchMethod(f"{topic.name} has no method {wanted.method}{namespace}{version}")


class Agent(_Caller, TopicServer):
    """Serves topics: runs the methods that the control side calls; and calls out itself.

    Methods run on the thread that calls `run`, one at a time, unless `workers` is over 0. A cast is
    acknowledged before its method runs, as oslo.messaging's own server does, so a method never
    runs twice. A method may call, cast and notify: meanwhile no other begins on its thread. What a
    method raises goes to its caller, and with its traceback to the log.

    Args:
        path: The guest daemon's socket; by default $VCHAN_SOCKET, or else AGENT_SOCKET.
        workers: Threads for methods, at most WORKERS_MAX; 0: the loop's own. With threads, callers
            that ask for heartbeats (oslo.messaging's call_monitor_timeout) get them while a method
            runs.
        log: Told what an operator may want to know, by default on standard error: the connection,
            and methods that failed. A failure's text has several lines.

    Raises:
        ConfigError, LimitExceeded: An argument is wrong: which, and what was expected.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        workers: int = 0,
        log: Callable[[str], object] | None = None,
    ) -> None:
        if path is None:
            path = os.environ.get(SOCKET_VARIABLE) or AGENT_SOCKET
        path = path_of(path)
        check_count("workers", workers, 0, WORKERS_MAX, "WORKERS_MAX")
        check_callable("log", log)
        self.loop = Loop()
        TopicServer.__init__(self, self.loop, path, log or log_to_stderr)
        self._running = threading.local()  # the context of what runs on a thread
        self._is_working = False
        self._thread = 0  # who runs the loop
        self._pendings = _Pendings(self.loop, path)
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
        """Serve a topic with an object's public methods. From any thread.

        Several endpoints may serve one topic: the first that has the method answers. Methods with
        the decorator `raw`, which this module has, too, take bytes and return bytes: see
        `call_raw`.

        Args:
            version: Calls for the same major and at most this minor version are accepted.

        Raises:
            ConfigError: An argument is wrong; or the endpoint has no public method, or one that is
                `async def` (`vchan.aio.Agent` serves those) or a generator.
            LimitExceeded: It would be more than TOPICS_MAX topics.
        """
        self._add(topic, endpoint, exchange, namespace, version)
        if self._thread and threading.get_ident() != self._thread:
            self.loop.call_soon_threadsafe(self._subscribe)
        else:
            self._subscribe()

    def run(self) -> None:
        """Serve until `stop`. Waits for the daemon when it is not there.

        Raises:
            NotAPort: `path` is no socket.
            LinkDown: It runs already, or has ended: an agent runs once.
        """
        if self._thread:
            problem = "this agent has run already, or runs: make another"
            raise LinkDown(self._connection.path, problem)
        self._thread = threading.get_ident()
        try:
            self._connect()
            self.loop.run()
        finally:
            self._stopped = True
            self._pendings.end("the agent has ended")  # before its workers, who may wait, are
            self._connection.flush()  # a method may have said stop(): its caller waits
            self._connection.close()
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)
            self.loop.close()

    def stop(self) -> None:
        """End `run`. From any thread or signal handler."""
        self._stopped = True
        self.loop.stop()

    @property
    def context(self) -> Mapping[str, Any]:
        """The context of the request whose method runs on this thread.

        `vchan_redelivered` in it says that this cast may have run before, in an agent whose memory
        is gone.
        """
        return getattr(self._running, "context", {})

    # ---------------------------------------------------------------- calling

    def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        if threading.get_ident() != self._thread:  # a worker, or a thread of the program's own
            try:  # the loop's own deadline comes first
                return self._pendings.ask(self._connection, request, timeout_s + LATE_S)
            except LinkDown as error:
                if self._thread:
                    raise
                raise LinkDown(error.path, "the agent is not running") from error
        pending = _Pending()
        pending.submit(self._connection, request)
        self._connection.uncork()
        while not (pending.done.is_set() or self._stopped):
            self.loop.run_once()
        if not pending.done.is_set():
            self._connection.withdraw(request.id)
            raise CallTimeout("the agent is stopping; the method may have run")
        return pending.result()

    # ---------------------------------------------------------------- serving

    def _work(self) -> None:
        """Each answer goes out before the next request begins."""
        if self._is_working:
            return
        self._is_working = True
        until_s = self.loop.time() + WORK_S
        while self._inbox:
            self._connection.cork()
            self._begin(self._inbox.popleft())
            self._connection.uncork()
            if self._stopped or self.loop.time() >= until_s:
                break
        self._is_working = False
        if self._inbox:
            self.loop.call_soon(self._work)

    def _begin(self, request: Request) -> None:
        if not self._may_begin(request):
            return
        if self._pool is None:
            self._finish(request, self._run_method(request))
        else:
            self._pool.submit(self._run_in_pool, request)
            if request.monitor_ms:
                self._beat(request)

    def _run_in_pool(self, request: Request) -> None:
        try:
            ran = self._run_method(request)
        except BaseException as error:  # noqa: BLE001 - sys.exit(), say: it ends no thread of a pool
            ran = ran_into(request, error)
        self.loop.call_soon_threadsafe(lambda: self._finish(request, ran))

    def _run_method(self, request: Request) -> _Ran:
        """What a method raises is the caller's to see, whatever it is."""
        try:
            method, invocation = self._method_for(request)
            self._running.context = invocation.context
            return returned(request, method(**invocation.args))
        except Exception as error:  # noqa: BLE001 - relayed to the caller
            return ran_into(request, error)


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


def returned(request: Request, result: Any) -> _Ran:
    """What becomes of a method that has returned this. A cast's result is nobody's.

    Raises:
        TypeError, ValueError: JSON cannot say it, or a raw method returned no bytes.
    """
    if hasattr(result, "__await__"):
        if hasattr(result, "close"):
            result.close()  # or Python warns that nobody awaited it
        raise TypeError("the method returned something to await: serve it with vchan.aio.Agent")
    if request.flags & RAW:
        if not isinstance(result, bytes | bytearray | memoryview):
            raise TypeError(f"a raw method returned {type(result).__name__}: expected bytes")
        return _Ran(False, bytes(result))
    return _Ran(False, encode_json(result) if request.is_call else b"")


def ran_into(request: Request, error: BaseException) -> _Ran:
    """What becomes of a method that has raised this. A refusal on purpose, and what is wrong with
    the request itself, has no traceback in the log."""
    import traceback  # here: it costs start-up time

    kind = type(error)
    refusal = str(error) if kind is _WrongKind else ""
    lines = traceback.format_exception(error)
    try:
        encode_json(list(error.args))
        args = list(error.args)
    except (TypeError, ValueError):
        args = [str(error)]
    body = encode_failure(
        kind.__name__, str(error), module=kind.__module__, args=args, traceback=_last_of(lines)
    )
    what = f"a {'call' if request.is_call else 'cast'} to topic {request.topic} failed"
    text = f"{kind.__name__}: {error}" if isinstance(error, RequestError) else "".join(lines)
    return _Ran(True, body, f"{what}: {text[-FAILURE_TEXT_MAX:].rstrip()}", refusal)


def _last_of(lines: list[str]) -> list[str]:
    """As much of a traceback as FAILURE_TEXT_MAX lets through: where it failed stands last."""
    left = FAILURE_TEXT_MAX
    kept: list[str] = []
    for line in reversed(lines):
        left -= len(line)
        if left < 0:
            kept.append("...\n")
            break
        kept.append(line)
    return kept[::-1]
