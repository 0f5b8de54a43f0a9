"""vchan:// for oslo.messaging: unmodified RPC servers, clients, notifiers and listeners.

    transport_url = vchan:///run/vchan/agent.sock       in a guest: to and from the control side
    transport_url = vchan:///run/vchan/host.sock        on a host: into its VMs, and to each other

Rules of this file
1. The driver has one thread, which runs the loop and owns every connection. Callers' threads reach
   it by `_Engine.run` and wait for what it says; they read nothing of a connection's themselves.
   Where eventlet has replaced threads it is a green one, as the callers' are.
2. A listener is one connection to the daemon: so the daemon knows each server, gives them their
   turns, and takes back what a listener that ends has not acknowledged.
3. Whatever a program does, it gets oslo.messaging's own exceptions, and at once where the fact is
   known. docs/oslo.md has the table.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import select
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty
from time import monotonic
from typing import Any, Final, TypeVar

from oslo_messaging import (
    MessageDeliveryFailure,
    MessageUndeliverable,
    MessagingException,
    MessagingTimeout,
    RemoteError,
)
from oslo_messaging._drivers import base
from oslo_messaging._drivers import common as rpc_common
from oslo_messaging.exceptions import InvalidTarget
from oslo_messaging.transport import InvalidTransportURL
from oslo_serialization import jsonutils
from oslo_utils import eventletutils

if not hasattr(select, "epoll"):  # eventlet takes it away; our loop waits in a way of eventlet's
    from eventlet import patcher

    select.epoll = patcher.original("select").epoll  # type: ignore[misc]
    try:
        from vchan.client import LATE_S
        from vchan.programs.connection import AGENT_SOCKET, HOST_SOCKET, Connection
        from vchan.programs.requests import EXCHANGE
    finally:
        del select.epoll
else:
    from vchan.client import LATE_S
    from vchan.programs.connection import AGENT_SOCKET, HOST_SOCKET, Connection
    from vchan.programs.requests import EXCHANGE
from vchan.errors import (
    AgentGone,
    BadBody,
    CallTimeout,
    LimitExceeded,
    NoSuchAgent,
    NoSuchDomain,
)
from vchan.io.loop import Loop
from vchan.rpc.bodies import (
    Invocation,
    decode_failure,
    decode_invocation,
    encode_failure,
    exception_text,
)
from vchan.rpc.in_flight import (
    Answered,
    Cancelled,
    Deliver,
    Delivery,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Taken,
)
from vchan.rpc.messages import (
    BUSY,
    CALL,
    FANOUT,
    NAME_BYTES_MAX,
    NO_AGENT,
    NOTIFICATION,
    REFUSED,
    TOPICS_MAX,
    Request,
    Topic,
    milliseconds,
)
from vchan.rpc.outcomes import ending_of

LOG = logging.getLogger(__name__)

PREFETCH: Final = 64
"""Messages that a server has been handed and has not acknowledged; those that wait behind them can
still expire, or go to another server. A listener's batch may be larger."""
SUBSCRIBE_S: Final = 5.0
"""`listen` waits so long for the daemon to know what is served; then it goes on without."""
BUSY_RETRY_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
"""What was returned as BUSY is sent again after this."""
FAILURE_BYTES_MAX: Final = 256 * 1024
"""A serialised exception: what a host passes on. Longer ones lose their traceback."""
CLOSE_S: Final = 10.0
"""For the driver's thread to end."""

T = TypeVar("T")


class NotDelivered(MessageUndeliverable, MessagingTimeout, MessageDeliveryFailure):  # type: ignore[misc]
    """Nobody serves the target: the method has not run.

    All of oslo.messaging's words for it in one: a program sees what it is prepared for, and need
    not wait for the timeout to see it.
    """

    def __init__(self, reason: str, request: Request) -> None:
        routing_key = f"{request.topic}.{request.server}" if request.server else request.topic
        super().__init__(reason, request.exchange, routing_key, None)
        self.args = (reason,)

    def __str__(self) -> str:
        return str(self.args[0])


class Unanswered(MessagingTimeout, MessageDeliveryFailure):  # type: ignore[misc]
    """No answer is to be expected any more: the method may have run."""


class NotHeld(base.TransportDriverError):  # type: ignore[misc]
    """A message is not this server's any more: its caller has given up, or another has it."""


class VchanDriver(base.BaseDriver):  # type: ignore[misc]
    """See the top of this file; the methods' contract is oslo.messaging's.

    Raises:
        InvalidTransportURL: It names no socket, or something that vchan:// does not have.
        TransportDriverError: eventlet has patched half of this process.
    """

    prefetch_size = PREFETCH

    def __init__(
        self,
        conf: Any,
        url: Any,
        default_exchange: str | None = None,
        allowed_remote_exmods: list[str] | None = None,
    ) -> None:
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        _check_patched()
        self._path = _socket_path(url)
        self._lock = threading.Lock()
        self._engine: _Engine | None = None
        self._closed = False

    def require_features(self, requeue: bool = False) -> None:
        """All of them are there."""

    def _running(self) -> _Engine:
        """This process's engine: a service forks after it has made its transport."""
        with self._lock:
            if self._closed:
                raise base.TransportDriverError(f"{self._path}: the transport was cleaned up")
            if self._engine is None or self._engine.pid != os.getpid():
                self._engine = _Engine(self._path)
            return self._engine

    # ---------------------------------------------------------------- sending

    def send(
        self,
        target: Any,
        ctxt: Any,
        message: Mapping[str, Any],
        wait_for_reply: bool | None = None,
        timeout: float | None = None,
        call_monitor_timeout: float | None = None,
        retry: int | None = None,
        transport_options: Any = None,  # noqa: ARG002 - delivery is confirmed whatever they say
    ) -> Any:
        """See BaseDriver."""
        flags = (CALL if wait_for_reply else 0) | (FANOUT if target.fanout else 0)
        body = {name: message.get(name) for name in ("method", "args", "namespace", "version")}
        request = self._make_request(flags, target, target.topic, target.server, ctxt, body)
        request = request.changed(
            timeout_ms=milliseconds(timeout), monitor_ms=milliseconds(call_monitor_timeout)
        )
        outcome = self._deliver(request, retry, timeout, call_monitor_timeout)
        if isinstance(outcome, Answered):
            return self._open_answer(outcome)
        return None

    def send_notification(
        self,
        target: Any,
        ctxt: Any,
        message: Mapping[str, Any],
        version: float,  # noqa: ARG002 - of an envelope, which there is none
        retry: int | None = None,
    ) -> None:
        """See BaseDriver."""
        topic, _, priority = target.topic.rpartition(".")
        if not topic:
            raise InvalidTarget("A notification's topic is TOPIC.PRIORITY", target)
        args = {
            "publisher_id": message.get("publisher_id"),
            "event_type": message.get("event_type"),
            "payload": message.get("payload"),
            "metadata": {
                "message_id": message.get("message_id"),
                "timestamp": message.get("timestamp"),
            },
        }
        body = {"method": priority, "args": args, "namespace": None, "version": None}
        request = self._make_request(NOTIFICATION, target, topic, None, ctxt, body)
        self._deliver(request, retry, None, None)

    def _deliver(
        self, request: Request, retry: int | None, timeout: float | None, monitor: float | None
    ) -> Outcome:
        try:
            return _Sending(self._running(), request, retry).wait(timeout, monitor)
        except base.TransportDriverError as error:  # some releases' clients stumble over it
            raise MessageDeliveryFailure(str(error)) from error

    def _make_request(
        self,
        flags: int,
        target: Any,
        topic: str,
        server: str | None,
        ctxt: Any,
        body: dict[str, Any],
    ) -> Request:
        exchange = self._exchange_of(target)
        for what, name in (("exchange", exchange), ("topic", topic), ("server", server or "")):
            if len(name.encode()) > NAME_BYTES_MAX:
                problem = f"The {what} is over {NAME_BYTES_MAX} bytes (NAME_BYTES_MAX)"
                raise InvalidTarget(problem, target)
        if not isinstance(body["method"], str):
            raise MessagingException(f"a message needs a method, and has {body['method']!r}")
        body["context"] = dict(ctxt) if isinstance(ctxt, Mapping) else ctxt.to_dict()
        data = jsonutils.dump_as_bytes(body)
        return Request(os.urandom(16), flags, 0, 0, exchange, topic, server or "", data)

    def _exchange_of(self, target: Any) -> str:
        return target.exchange or self._default_exchange or EXCHANGE

    def _open_answer(self, answer: Answered) -> Any:
        if answer.failed:
            raise self._open_failure(answer.body)
        try:
            return jsonutils.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise RemoteError("BadReply", f"the result is not JSON: {error}", []) from error

    def _open_failure(self, body: bytes) -> Exception:
        text = body.decode("utf-8", "replace")
        try:
            failure: Exception = rpc_common.deserialize_remote_exception(
                text, self._allowed_remote_exmods
            )
        except Exception as error:  # noqa: BLE001 - what an exception's own constructor may raise
            LOG.warning("a remote exception could not be rebuilt: %s", error)
            class_name, message = decode_failure(body)
            failure = RemoteError(class_name, message, [])
        return failure

    # ---------------------------------------------------------------- listening

    def listen(self, target: Any, batch_size: int, batch_timeout: float | None) -> base.Listener:
        """See BaseDriver."""
        exchange = self._exchange_of(target)
        topics = [Topic(exchange, target.topic)]
        servers = [Topic(exchange, f"{target.topic}.{target.server}")] if target.server else []
        listener = _Listener(self._running(), topics, servers, batch_size, is_rpc=True)
        return base.PollStyleListenerAdapter(listener, batch_size, batch_timeout)

    def listen_for_notifications(
        self,
        targets_and_priorities: Iterable[tuple[Any, str]],
        pool: str | None,
        batch_size: int,
        batch_timeout: float | None,
    ) -> base.Listener:
        """See BaseDriver."""
        if pool:
            raise NotImplementedError("vchan:// has no pools: a notification goes to one listener")
        topics = sorted(
            {
                Topic(self._exchange_of(target), f"{target.topic}.{priority}")
                for target, priority in targets_and_priorities
            }
        )
        listener = _Listener(self._running(), topics, [], batch_size, is_rpc=False)
        return base.PollStyleListenerAdapter(listener, batch_size, batch_timeout)

    def cleanup(self) -> None:
        """See BaseDriver."""
        with self._lock:
            self._closed = True
            engine, self._engine = self._engine, None
        if engine is not None and engine.pid == os.getpid():
            engine.close()


def _socket_path(url: Any) -> str:
    if url.hosts:
        raise InvalidTransportURL(str(url), "vchan:// has no hosts: write vchan:///path/of/socket")
    if url.query:
        options = ", ".join(sorted(url.query))
        raise InvalidTransportURL(str(url), f"vchan:// has no options: {options}")
    if not url.virtual_host:
        text = f"which socket? vchan://{AGENT_SOCKET} in a guest, vchan://{HOST_SOCKET} on a host"
        raise InvalidTransportURL(str(url), text)
    return "/" + str(url.virtual_host)


def _check_patched() -> None:
    """Raise if what this process's threads wait with is not of their kind."""
    parts = ("thread", "os", "select", "socket")
    patched = [name for name in parts if eventletutils.is_monkey_patched(name)]
    if patched and "thread" not in patched:
        raise base.TransportDriverError(
            f"eventlet has replaced {', '.join(patched)} in this process, and not thread: "
            "vchan:// needs all of them patched, or none"
        )


def _make_loop() -> Loop:
    """One that waits as this process's threads do."""
    if eventletutils.is_monkey_patched("thread"):
        from vchan.io.green_loop import green_loop

        return green_loop()
    return Loop()


class _Engine:
    """The driver's thread, with its loop and its connections."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()
        self.loop = _make_loop()
        self.sendings: set[_Sending] = set()  # that wait for an outcome
        self._connections: set[Connection] = set()
        self._sender: Connection | None = None
        self._lock = threading.Lock()
        self._tasks: set[Future[Any]] = set()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="vchan-oslo", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self.loop.run()
        finally:
            with self._lock:
                self._ended = True
                tasks, self._tasks = self._tasks, set()
            for connection in self._connections:
                connection.close()
            for task in tasks:
                task.set_exception(self._closed())
            for sending in self.sendings:
                sending.news.put(self._closed())

    def _closed(self) -> base.TransportDriverError:
        return base.TransportDriverError(f"{self.path}: the transport is closed")

    def run(self, function: Callable[[], T]) -> T:
        """Run it in the engine's thread; return what it returns, or raise what it raises.

        Raises:
            TransportDriverError: The engine has ended, or is another process's.
        """
        if self.pid != os.getpid():  # no thread is here, and the descriptors are that process's
            text = f"{self.path}: it was made before this process was forked: make another"
            raise base.TransportDriverError(text)
        task: Future[T] = Future()

        def work() -> None:
            with self._lock:
                self._tasks.discard(task)
            try:
                task.set_result(function())
            except Exception as error:  # noqa: BLE001 - it is raised in the caller's thread
                task.set_exception(error)

        with self._lock:
            if self._ended:
                raise self._closed()
            self._tasks.add(task)
        self.loop.call_soon_threadsafe(work)
        return task.result()

    def close(self) -> None:
        """End the thread and free everything. Whoever waits hears that it is closed."""
        try:
            self.run(self.loop.stop)
        except base.TransportDriverError:
            return  # it has ended already
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self.loop.close()

    # What follows belongs to the engine's thread.

    def connect(
        self,
        name: str,
        deliver: Callable[[Delivery], object],
        changed: Callable[[bool, str], object],
    ) -> Connection:
        """A new connection, which is yet to `start`."""
        connection = Connection(self.loop, self.path, name, deliver, changed)
        self._connections.add(connection)
        return connection

    def disconnect(self, connection: Connection) -> None:
        """Close one."""
        self._connections.discard(connection)
        connection.close()

    def sender(self) -> Connection:
        """The connection that requests leave by."""
        if self._sender is None:
            log = _ConnectionLog(self.path, "sender")
            self._sender = self.connect(
                "oslo sender", lambda _: None, partial(self._sender_changed, log)
            )
            self._sender.start()
        return self._sender

    def _sender_changed(self, log: _ConnectionLog, up: bool, reason: str) -> None:
        log.changed(up, reason)
        if not up:
            for sending in list(self.sendings):
                sending.failed(reason)


class _ConnectionLog:
    """Says when a connection comes and goes, and not at every attempt in between."""

    def __init__(self, path: str, who: str) -> None:
        self._path = path
        self._who = who
        self._was_up: bool | None = None

    def changed(self, up: bool, reason: str) -> None:
        """Tell it every news of the connection."""
        if up is not self._was_up:
            self._was_up = up
            if up:
                LOG.info("%s: connected to %s", self._who, self._path)
            else:
                LOG.warning("%s: %s; it is tried again", self._who, reason)


class _Sending:
    """A request on its way, and the caller's thread that waits for it.

    Args:
        retry: How often it may be sent again; None or -1: always.
    """

    def __init__(self, engine: _Engine, request: Request, retry: int | None) -> None:
        self._engine = engine
        self._request = request
        self._retries_left = retry if retry is not None and retry >= 0 else math.inf
        self._busy = 0
        self._deadline_s = math.inf
        # Looked up now: eventlet may have replaced it since this file was imported.
        self.news: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()

    def wait(self, timeout: float | None, monitor: float | None) -> Outcome:
        """Send it and wait until it is over: Taken, Answered, or one of oslo's exceptions."""
        self._deadline_s = math.inf if timeout is None else monotonic() + timeout
        heard_s = monotonic()
        try:
            self._engine.run(self._begin)
            while True:
                # The loop's own deadline comes first; this is for when it cannot.
                until_s = self._deadline_s + LATE_S
                if monitor:
                    until_s = min(until_s, heard_s + monitor)
                outcome = self._next(until_s)
                if not isinstance(outcome, Heartbeat):
                    return self._checked(outcome)
                heard_s = monotonic()
        finally:
            with suppress(base.TransportDriverError):  # it has ended already
                self._engine.run(self._end)

    def _next(self, until_s: float) -> Outcome | Exception:
        wait_s = None if until_s == math.inf else max(0.0, until_s - monotonic())
        try:
            return self.news.get(timeout=wait_s)
        except Empty:
            return Overdue(self._request.id)

    def _checked(self, outcome: Outcome | Exception) -> Outcome:
        match outcome:
            case Taken() | Answered():
                return outcome
            case HandedBack(_, reason, text):
                raise self._exception_of(reason, text)
            case Exception():
                raise outcome
            case _:
                raise Unanswered(self._timed_out())

    def _exception_of(self, reason: int, text: str) -> MessagingException:
        kind = ending_of(reason).error
        if kind in (NoSuchAgent, NoSuchDomain):
            return NotDelivered(text, self._request)
        if kind is AgentGone:
            return Unanswered(text)
        if kind is CallTimeout:
            return Unanswered(f"{self._timed_out()}: {text}")
        return MessageDeliveryFailure(text)

    def _timed_out(self) -> str:
        what = "a reply to" if self._request.is_call else "anybody to take"
        return f"Timed out waiting for {what} message ID {self._request.id.hex()}"

    # What follows belongs to the engine's thread.

    def _begin(self) -> None:
        self._engine.sendings.add(self)
        self._submit()

    def _submit(self) -> None:
        if self not in self._engine.sendings:
            return  # it was to be sent again, and is over
        request = self._request
        if self._deadline_s != math.inf:
            request = request.changed(timeout_ms=milliseconds(self._deadline_s - monotonic()))
        try:
            self._engine.sender().submit(request, self._told)
        except LimitExceeded as error:
            self.news.put(MessageDeliveryFailure(str(error)))

    def _told(self, outcome: Outcome) -> None:
        is_busy = isinstance(outcome, HandedBack) and outcome.reason == BUSY
        if is_busy and self._retries_left > 0:
            delay_s = BUSY_RETRY_S[min(self._busy, len(BUSY_RETRY_S) - 1)]
            self._busy += 1
            self._retries_left -= 1
            self._engine.loop.call_later(delay_s, self._submit)
        else:
            self.news.put(outcome)

    def failed(self, reason: str) -> None:
        """The daemon is not there, or went away. What was sent is sent again, and runs once."""
        if self._retries_left <= 0:
            self.news.put(MessageDeliveryFailure(reason))
        self._retries_left -= 1

    def _end(self) -> None:
        self._engine.sendings.discard(self)
        self._engine.sender().withdraw(self._request.id)


class _Listener(base.PollStyleListener):  # type: ignore[misc]
    """A connection that serves topics, and what has come on it.

    Args:
        servers: The topics that name this server; see `Connection.subscribe`.
        is_rpc: What is acknowledged runs. A notification is acknowledged when it has.
    """

    def __init__(
        self,
        engine: _Engine,
        topics: list[Topic],
        servers: list[Topic],
        batch_size: int,
        *,
        is_rpc: bool,
    ) -> None:
        super().__init__(max(PREFETCH, batch_size))
        if len(topics) + len(servers) > TOPICS_MAX:
            raise MessagingException(f"a listener has {TOPICS_MAX} topics at most (TOPICS_MAX)")
        self._engine = engine
        self.is_rpc = is_rpc
        self._name = topics[0].name if topics else "nothing"
        self._log = _ConnectionLog(engine.path, f"listener of {self._name}")
        self._news = threading.Condition()  # guards what follows
        self._queue: deque[_Incoming] = deque()
        self._handed: dict[bytes, _Incoming] = {}  # to the server, and not acknowledged
        self._stopped = False
        self._drained = False
        self._is_up = False
        self._heard = threading.Event()  # the daemon knows what we serve, or is not there
        self._connection: Connection = engine.run(lambda: self._open(tuple(topics), tuple(servers)))
        self._heard.wait(SUBSCRIBE_S)
        with self._news:
            is_up = self._is_up
        if not is_up:
            LOG.warning("listener of %s: serves as soon as the daemon is there", self._name)

    # ---------------------------------------------------------------- what the server asks for

    def poll(
        self, timeout: float | None = None, batch_size: int = 1, batch_timeout: float | None = None
    ) -> list[_Incoming]:
        """See PollStyleListener."""
        batch_size = min(batch_size, self.prefetch_size)
        deadline_s = math.inf if timeout is None else monotonic() + timeout
        with self._news:
            self._wait_for(1, deadline_s)
            if batch_size > 1 and self._available():
                full_s = math.inf if batch_timeout is None else monotonic() + batch_timeout
                self._wait_for(batch_size, min(deadline_s, full_s))
            batch = [self._queue.popleft() for _ in range(min(batch_size, self._available()))]
            self._handed.update((each.request.id, each) for each in batch)
            if not batch and self._stopped:
                self._drained = True
            return batch

    def _available(self) -> int:
        room = len(self._queue) if self._stopped else self.prefetch_size - len(self._handed)
        return min(len(self._queue), room)

    def _wait_for(self, count: int, deadline_s: float) -> None:
        while self._available() < count and not self._stopped:
            left_s = deadline_s - monotonic()
            if left_s <= 0:
                return
            self._news.wait(None if left_s == math.inf else left_s)

    def stop(self) -> None:
        """See PollStyleListener. What has come already is still handed out."""
        self._heard.clear()
        try:
            self._engine.run(self._unsubscribe)
        except base.TransportDriverError:
            pass  # nothing comes any more
        else:
            self._heard.wait(SUBSCRIBE_S)
        with self._news:
            self._stopped = True
            self._news.notify_all()

    def cleanup(self) -> None:
        """See PollStyleListener."""
        try:
            self._engine.run(self._close)
        except base.TransportDriverError:
            pass  # the whole driver is closed

    def acknowledge(self, incoming: _Incoming) -> None:
        """The server begins to work (RPC), or has worked (notifications).

        Raises:
            NotHeld: It must not: its caller has given up, or another server has it.
        """
        if incoming.request.is_call:
            held = self._release(incoming)  # what was withdrawn has been taken out by then
        else:
            held = self._engine.run(lambda: self._take(incoming))
        if not held:
            raise NotHeld(f"message {incoming.msg_id} is no longer ours: it was withdrawn")

    def requeue(self, incoming: _Incoming) -> None:
        """Give it back."""
        self._engine.run(lambda: self._requeue(incoming))

    def answer(self, incoming: _Incoming, failed: bool, body: bytes) -> bool:
        """Answer a call. False if nobody waits for it any more."""
        return self._engine.run(lambda: self._answer(incoming.request.id, failed, body))

    def heartbeat(self, incoming: _Incoming) -> None:
        """A call is being worked on.

        Raises:
            NotHeld: Nobody waits for it any more.
        """
        if not self._engine.run(lambda: self._beat(incoming.request.id)):
            raise NotHeld(f"message {incoming.msg_id}: nobody waits for it")

    def _release(self, incoming: _Incoming) -> bool:
        """The server has dealt with it. False if it was not the server's any more."""
        with self._news:
            if self._handed.get(incoming.request.id) is not incoming:
                return False
            del self._handed[incoming.request.id]
            self._news.notify_all()
            return True

    # ---------------------------------------------------------------- the engine's thread

    def _open(self, topics: tuple[Topic, ...], servers: tuple[Topic, ...]) -> Connection:
        connection = self._engine.connect("oslo server", self._deliver, self._changed)
        self._connection = connection
        connection.subscribe(topics, servers)
        connection.start()
        return connection

    def _unsubscribe(self) -> None:
        self._connection.subscribe(())
        self._note_heard()

    def _note_heard(self) -> None:
        if self._connection.is_up:
            self._connection.when_acknowledged(self._heard.set)
        else:
            self._heard.set()

    def _changed(self, up: bool, reason: str) -> None:
        self._log.changed(up, reason)
        with self._news:
            self._is_up = up
        if not up:
            self._lose(everything=False)
        self._note_heard()

    def _lose(self, *, everything: bool) -> None:
        """The daemon gives what we had not acknowledged to another, or to us again.

        Unless we are closed, the calls that are running go on, and notifications that are being
        dealt with: we tell the daemon that we have them.
        """
        with self._news:
            queued = [each for each in self._queue if everything or not each.request.is_call]
            for each in queued:
                self._queue.remove(each)
            handed = [
                each
                for each in self._handed.values()
                if everything or (self.is_rpc and not each.request.is_call)
            ]
            for each in handed:
                del self._handed[each.request.id]
        for each in (*queued, *handed):
            self._connection.responder.give_back(each.request.id, NO_AGENT, "the server has gone")

    def _deliver(self, delivery: Delivery) -> None:
        match delivery:
            case Deliver(request):
                self._receive(request)
            case Cancelled(request_id):
                with self._news:
                    self._handed.pop(request_id, None)
                    for each in self._queue:
                        if each.request.id == request_id:
                            self._queue.remove(each)
                            break
                    self._news.notify_all()  # there is room for another

    def _receive(self, request: Request) -> None:
        try:
            incoming = _Incoming(self, request, is_rpc=self.is_rpc)
        except BadBody as error:
            self._refuse(request, error)
            return
        with self._news:
            if not self._drained:
                self._queue.append(incoming)
                self._news.notify_all()
                return
        self._connection.responder.give_back(request.id, NO_AGENT, "the server has stopped")

    def _refuse(self, request: Request, error: BadBody) -> None:
        LOG.warning("a message for %s cannot be understood: %s", request.topic, error)
        if request.is_call:
            self._answer(request.id, True, encode_failure("BadBody", str(error)))
        else:  # so that the host has it in its log and its counters, too
            self._connection.responder.give_back(request.id, REFUSED, str(error))
            self._connection.flush()

    def _take(self, incoming: _Incoming) -> bool:
        if not self._release(incoming):
            return False
        now_s = self._engine.loop.time()
        taken = self._connection.responder.take(incoming.request.id, now_s)
        self._connection.flush()
        return taken

    def _requeue(self, incoming: _Incoming) -> None:
        if self._release(incoming):
            self._connection.responder.give_back(incoming.request.id, BUSY, "requeued")
            self._connection.flush()

    def _answer(self, request_id: bytes, failed: bool, body: bytes) -> bool:
        responder, now_s = self._connection.responder, self._engine.loop.time()
        try:
            answered = responder.answer(request_id, body, failed=failed, now_s=now_s)
        except LimitExceeded as error:
            LOG.warning("the answer to message %s is refused: %s", request_id.hex(), error)
            failure = encode_failure("LimitExceeded", str(error))
            answered = responder.answer(request_id, failure, failed=True, now_s=now_s)
        self._connection.flush()
        return answered

    def _beat(self, request_id: bytes) -> bool:
        self._connection.responder.heartbeat(request_id, self._engine.loop.time())
        return request_id in self._connection.responder

    def _close(self) -> None:
        with self._news:
            self._stopped = self._drained = True
        self._lose(everything=True)
        self._connection.flush()
        self._engine.disconnect(self._connection)


class _Incoming(base.RpcIncomingMessage):  # type: ignore[misc]
    """A request, as oslo.messaging's servers know it.

    Raises:
        BadBody: It is none.
    """

    def __init__(self, listener: _Listener, request: Request, *, is_rpc: bool) -> None:
        call = decode_invocation(request.body)
        if is_rpc:
            message = {"method": call.method, "args": call.args}
            message |= {"namespace": call.namespace} if call.namespace is not None else {}
            message |= {"version": call.version} if call.version is not None else {}
        else:
            message = _notification(call)
        super().__init__(dict(call.context), message)
        self.msg_id = request.id.hex()
        self.request = request
        self.unique_id = request.id.hex()
        self.client_timeout = request.monitor_ms / 1000 or None
        self._listener = listener

    def acknowledge(self) -> None:
        """See IncomingMessage.

        Raises:
            NotHeld: The RPC server must not run it. It expects that, and says so in the log.
        """
        try:
            self._listener.acknowledge(self)
        except base.TransportDriverError as error:
            LOG.warning("cannot acknowledge: %s", error)
            if self._listener.is_rpc:
                raise

    def requeue(self) -> None:
        """See IncomingMessage."""
        try:
            self._listener.requeue(self)
        except base.TransportDriverError as error:
            LOG.warning("cannot requeue: %s", error)

    def reply(self, reply: Any = None, failure: Any = None) -> None:
        """See RpcIncomingMessage. Nobody waits for a cast's."""
        if not self.request.is_call:
            return
        failed, body = _answer_body(reply, failure)
        try:
            if not self._listener.answer(self, failed, body):
                LOG.info("nobody waits for the reply to message %s any more", self.msg_id)
        except base.TransportDriverError as error:
            LOG.warning("cannot reply to message %s: %s", self.msg_id, error)

    def heartbeat(self) -> None:
        """See RpcIncomingMessage.

        Raises:
            NotHeld: Nobody waits any more: this ends the server's thread that sends heartbeats.
        """
        self._listener.heartbeat(self)


def _notification(call: Invocation) -> dict[str, Any]:
    """As oslo.messaging's notifier made it."""
    metadata = call.args.get("metadata")
    if not isinstance(metadata, Mapping):
        metadata = {}
    return {
        "message_id": metadata.get("message_id"),
        "publisher_id": call.args.get("publisher_id"),
        "event_type": call.args.get("event_type"),
        "priority": call.method.upper(),
        "payload": call.args.get("payload"),
        "timestamp": metadata.get("timestamp"),
    }


def _answer_body(reply: Any, failure: Any) -> tuple[bool, bytes]:
    """(failed, body). A result that JSON cannot say is a failure."""
    if failure:
        return True, _failure_body(failure)
    try:
        return False, jsonutils.dump_as_bytes(reply)
    except Exception:
        LOG.exception("the result cannot be serialised")
        return True, _failure_body(sys.exc_info())


def _failure_body(exc_info: Any) -> bytes:
    """What oslo.messaging would send of an exception, as far as it can be sent."""
    try:
        text: str = rpc_common.serialize_remote_exception(exc_info)
    except Exception as error:  # noqa: BLE001 - args and kwargs may be anything
        LOG.warning("the arguments of an exception cannot be serialised: %s", error)
        lines = traceback.format_exception(*exc_info)
        return _plain_failure(exc_info[1], lines)
    if len(text) <= FAILURE_BYTES_MAX:
        return text.encode()
    return _plain_failure(exc_info[1], [f"(left out: over {FAILURE_BYTES_MAX} bytes)"])


def _plain_failure(error: BaseException, lines: list[str]) -> bytes:
    kind = type(error)
    said = exception_text(error)
    return encode_failure(kind.__name__, said, module=kind.__module__, traceback=lines)
