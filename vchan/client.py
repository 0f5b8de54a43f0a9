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

import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

from vchan.errors import CallTimeout, LimitExceeded, LinkDown, LinkError, Rejected, VchanError
from vchan.io.loop import Loop
from vchan.io.streams import Stream, connect_local
from vchan.programs.connection import (
    AGENT_SOCKET,
    GRACE_S,
    HOST_SOCKET,
    SOCKET_VARIABLE,
    Connection,
)
from vchan.programs.endpoints import endpoint_of
from vchan.programs.requests import (
    EXCHANGE,
    READY_S,
    TIMEOUT_S,
    invocation_body,
    make_request,
    notification_body,
    path_of,
    raw_body,
    raw_result_of,
    require_taken,
    result_of,
)
from vchan.programs.working import Worker
from vchan.rpc.arguments import check_callable, check_count, check_product, quick, raw
from vchan.rpc.in_flight import Heartbeat, Outcome
from vchan.rpc.messages import CALL, FANOUT, NOTIFICATION, RAW, Request, milliseconds
from vchan.session import printable

__all__ = ["Agent", "Client", "quick", "raw"]

LATE_S: Final = GRACE_S + 1.0
"""A thread that waits for the loop, whose own deadline comes first, gives up so late."""
WORKERS_MAX: Final = 256
"""Threads of one agent: a guest that needs more has another trouble. At it: LimitExceeded."""


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


_FORKED: Final = "it was made before this process was forked: make another"


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
            raise LinkDown(self._path, _FORKED)

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

    def cast_raw(
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
    ) -> None:
        """Send bytes to a method that is declared `raw`, as `call_raw` does, and wait until
        somebody has taken responsibility for them, as `cast` does. What the method returns is
        nobody's.

        Args:
            data: The method's first argument.
            args: Its others, by name.
            Others: as `cast`, to one server.

        Raises:
            CallTimeout: Nobody took it in time; it has been withdrawn, but may have been taken.
            Rejected: It has not run, and never will: somebody on the way is too old for raw casts,
                or a broker is on it. The text says who, and what to do.
            Others: as `call`.
        """
        body = raw_body(invocation_body(method, args, namespace, version, context), data)
        request = make_request(RAW, exchange, topic, server, body, timeout_s)
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
        self._connection = Connection(
            self._loop,
            path,
            "client",
            lambda _: None,
            self._connected,
            open_stream=connect_local,  # looked up now, in case the world is a simulated one
            random_bytes=os.urandom,
        )
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
        request = request.changed(timeout_ms=milliseconds(left_s))
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


def log_to_stderr(text: str) -> None:
    """What an agent does with its log if it is not told otherwise."""
    shown = printable(text, besides="\n")
    try:
        sys.stderr.write(f"vchan agent: {shown}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass  # nobody reads it, or there is none: that is no reason to stop serving


class Agent(_Caller):
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
        product: What it is, as `backup/2.1`: NAME/VERSION of at most PRODUCT_CHARS_MAX characters.
            The host's operator sees it among the guest's facts; nothing is decided by it.

    Raises:
        ConfigError, LimitExceeded: An argument is wrong: which, and what was expected.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        workers: int = 0,
        log: Callable[[str], object] | None = None,
        product: str | None = None,
    ) -> None:
        if path is None:
            path = os.environ.get(SOCKET_VARIABLE) or AGENT_SOCKET
        path = path_of(path)
        check_count("workers", workers, 0, WORKERS_MAX, "WORKERS_MAX")
        check_callable("log", log)
        check_product(product)
        pool: Any = None
        if workers:
            from concurrent.futures import ThreadPoolExecutor  # here: it costs start-up time

            pool = ThreadPoolExecutor(workers, thread_name_prefix="vchan-agent")
        loop = Loop()
        log = log or log_to_stderr
        self._attach(loop, path, log, open_stream=connect_local, pool=pool, product=product)

    def _attach(
        self,
        loop: Loop,
        path: str,
        log: Callable[[str], object],
        *,
        open_stream: Callable[[str], Stream],
        pool: Any = None,
        product: str | None = None,
    ) -> None:
        """What an agent has on any loop."""
        self.loop = loop
        self._worker = Worker(
            loop,
            loop.call_soon_threadsafe,
            path,
            log,
            open_stream=open_stream,
            random_bytes=os.urandom,
            pool=pool,
            product=product,
        )
        self._serving = self._worker.serving
        self._connection = self._serving.connection
        self._pendings = _Pendings(loop, path)
        self._thread = 0  # who runs the loop
        self._pid = os.getpid()

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
        `call_raw`. The decorator `quick` is for methods that never wait, and return in less than a
        millisecond: the answers of those that were asked together go out together.

        Args:
            version: Calls for the same major and at most this minor version are accepted.

        Raises:
            ConfigError: An argument is wrong; or the endpoint has no public method, or one that is
                `async def` (`vchan.aio.Agent` serves those) or a generator.
            LimitExceeded: It would be more than TOPICS_MAX topics.
        """
        self._serving.add(*endpoint_of(topic, endpoint, exchange, namespace, version))
        if self._thread and threading.get_ident() != self._thread:
            self.loop.call_soon_threadsafe(self._serving.subscribe)
        else:
            self._serving.subscribe()

    def run(self) -> None:
        """Serve until `stop`. Waits for the daemon when it is not there.

        Raises:
            NotAPort: `path` is no socket.
            LinkDown: It runs already, or has ended: an agent runs once.
        """
        if self._thread:
            problem = "this agent has run already, or runs: make another"
            raise LinkDown(self._connection.path, problem)
        self._thread, self._pid = threading.get_ident(), os.getpid()
        try:
            self._serving.connect()
            self.loop.run()
        finally:
            self._worker.is_stopped = True
            self._pendings.end("the agent has ended")  # before its workers, who may wait, are
            self._connection.flush()  # a method may have said stop(): its caller waits
            self._connection.close()
            if self._worker.pool is not None:
                self._worker.pool.shutdown(wait=True, cancel_futures=True)
            self.loop.close()

    def stop(self) -> None:
        """End `run`. From any thread or signal handler."""
        self._worker.is_stopped = True
        self.loop.stop()

    @property
    def context(self) -> Mapping[str, Any]:
        """The context of the request whose method runs on this thread.

        `vchan_redelivered` in it says that this cast may have run before, in an agent whose memory
        is gone.
        """
        return getattr(self._worker.running, "context", {})

    # ---------------------------------------------------------------- calling

    def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        if threading.get_ident() != self._thread:  # a worker, or a thread of the program's own
            try:  # the loop's own deadline comes first
                return self._pendings.ask(self._connection, request, timeout_s + LATE_S)
            except LinkDown as error:
                if self._thread:
                    raise
                raise LinkDown(error.path, "the agent is not running") from error
        if self._pid != os.getpid():  # a method has forked: the connection is that process's
            raise LinkDown(self._connection.path, _FORKED)
        pending = _Pending()
        pending.submit(self._connection, request)
        self._connection.uncork()
        while not (pending.done.is_set() or self._worker.is_stopped):
            self.loop.run_once()
        if not pending.done.is_set():
            self._connection.withdraw(request.id)
            raise CallTimeout("the agent is stopping; the method may have run")
        return pending.result()
