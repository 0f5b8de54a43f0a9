"""`Client` and `Agent` for programs that run on asyncio.

    async with Client("/run/vchan/host.sock") as client:
        await client.call("agent", "echo", {"x": 1}, server=VM_UUID, timeout_s=10)

    agent = Agent()
    agent.serve("agent", Endpoint())        # its methods may be `async def`
    await agent.run()

The same connection as `vchan.client` has, driven by asyncio's event loop: no thread. What is
promised and what is raised is the same; `vchan.client` says it at each method. What is different:

- A task that is cancelled while it waits for an answer withdraws its request.
- An agent's methods run as tasks, begun in the order in which their requests came, many at a time.
  One whose caller has given up is cancelled.

A program in a small guest does without: to import asyncio takes longer than all of `vchan.client`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from functools import partial
from time import monotonic, thread_time
from typing import Any, Final, Self

from vchan.client import log_to_stderr
from vchan.errors import CallTimeout, LinkDown, VchanError
from vchan.io.loop import Callback, Timer
from vchan.programs.connection import AGENT_SOCKET, HOST_SOCKET, SOCKET_VARIABLE, Connection
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
from vchan.programs.serving import Serving, ran_into, returned
from vchan.programs.working import end_child
from vchan.rpc.arguments import check_callable, check_count, check_product, quick, raw
from vchan.rpc.in_flight import Heartbeat, Outcome
from vchan.rpc.messages import CALL, FANOUT, NOTIFICATION, RAW, Request, milliseconds

__all__ = ["Agent", "Client", "quick", "raw"]

TASKS: Final = 64
"""An agent's methods that run at a time, unless it says otherwise. At it: the others wait."""
TASKS_MAX: Final = 1024
"""The most that an agent may say: as many as its daemon hands it. At it: LimitExceeded."""
STOP_S: Final = 5.0
"""An agent that stops lets its methods go on for so long: their callers get their answers. At it:
they are cancelled, and their callers told that they may have run."""

_context: ContextVar[Mapping[str, Any]] = ContextVar("vchan_context")


class _Handle:
    """One of asyncio's timers, which is cancelled with ours."""

    __slots__ = ("timer",)
    timer: asyncio.TimerHandle

    def timer_cancelled(self) -> None:
        """See Timer."""
        self.timer.cancel()


class _Scheduler:
    """asyncio's event loop as a connection sees it (`vchan.io.loop.Scheduler`).

    Args:
        on_fault: Told what our own code has let out. asyncio would log it and go on, and whoever
            waits for an answer would wait for ever.
    """

    def __init__(self, on_fault: Callable[[BaseException], None]) -> None:
        self.time = monotonic
        self.spent = thread_time
        self._on_fault = on_fault
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self) -> asyncio.AbstractEventLoop:
        """Work on the loop that runs."""
        self._loop = asyncio.get_running_loop()
        return self._loop

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop."""
        assert self._loop is not None, "nothing is scheduled before `bind`"
        return self._loop

    def runs_here(self) -> bool:
        """Whether who asks runs on this loop."""
        return self._loop is not None and self._loop is asyncio.get_running_loop()

    def _guarded(self, callback: Callback) -> Callable[[], None]:
        def run() -> None:
            try:
                callback()
            except Exception as error:
                self._on_fault(error)
                raise

        return run

    def call_soon(self, callback: Callback) -> None:
        """See Scheduler."""
        self.loop.call_soon(self._guarded(callback))

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """See Scheduler."""
        return self.call_at(monotonic() + delay_s, callback)

    def call_at(self, at_s: float, callback: Callback) -> Timer:
        """See Scheduler."""
        handle = _Handle()
        timer = Timer(at_s, self._guarded(callback), handle)
        handle.timer = self.loop.call_later(max(0.0, at_s - monotonic()), timer._run)
        return timer

    def add_reader(self, fd: int, callback: Callback) -> None:
        """See Scheduler."""
        self.loop.add_reader(fd, self._guarded(callback))

    def remove_reader(self, fd: int) -> None:
        """See Scheduler."""
        self.loop.remove_reader(fd)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """See Scheduler."""
        self.loop.add_writer(fd, self._guarded(callback))

    def remove_writer(self, fd: int) -> None:
        """See Scheduler."""
        self.loop.remove_writer(fd)


class _Waiting:
    """The tasks that wait for outcomes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._futures: set[asyncio.Future[Outcome]] = set()

    async def ask(self, connection: Connection, request: Request) -> Outcome:
        """Send a request and wait for its outcome. Who is cancelled meanwhile withdraws it."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def told(outcome: Outcome) -> None:
            if not isinstance(outcome, Heartbeat) and not future.done():
                future.set_result(outcome)

        connection.submit(request, told)
        self._futures.add(future)
        try:
            return await future
        except asyncio.CancelledError:
            connection.withdraw(request.id)
            raise
        finally:
            self._futures.discard(future)

    def end(self, why: str) -> None:
        """Nothing is heard any more."""
        for future in self._futures:
            if not future.done():
                future.set_exception(CallTimeout(f"{self._path}: {why}; the method may have run"))


class _Caller:
    """What Client and Agent share: requests to others."""

    async def call(
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
        """Call a method and wait for its result: see `vchan.client.Client.call`."""
        body = invocation_body(method, args, namespace, version, context)
        request = make_request(CALL, exchange, topic, server, body, timeout_s)
        return result_of(await self._outcome_of(request, timeout_s), timeout_s)

    async def call_raw(
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
        """Call a method that is declared `raw`: see `vchan.client.Client.call_raw`."""
        body = raw_body(invocation_body(method, args, namespace, version, context), data)
        request = make_request(CALL | RAW, exchange, topic, server, body, timeout_s)
        return raw_result_of(await self._outcome_of(request, timeout_s), timeout_s)

    async def cast(
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
        """Send a request and wait until somebody has taken responsibility for it: see
        `vchan.client.Client.cast`."""
        body = invocation_body(method, args, namespace, version, context)
        flags = FANOUT if fanout else 0
        request = make_request(flags, exchange, topic, server, body, timeout_s)
        require_taken(await self._outcome_of(request, timeout_s), timeout_s)

    async def cast_raw(
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
        """Send bytes to a method that is declared `raw`, and wait until somebody has taken
        responsibility for them: see `vchan.client.Client.cast_raw`."""
        body = raw_body(invocation_body(method, args, namespace, version, context), data)
        request = make_request(RAW, exchange, topic, server, body, timeout_s)
        require_taken(await self._outcome_of(request, timeout_s), timeout_s)

    async def notify(
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
        """Send a notification and wait until somebody has taken responsibility for it: see
        `vchan.client.Client.notify`."""
        body = notification_body(event_type, payload, priority, publisher_id, context)
        request = make_request(NOTIFICATION, exchange, topic, "", body, timeout_s)
        require_taken(await self._outcome_of(request, timeout_s), timeout_s)

    async def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        """Send a request and wait for its outcome, which is no Heartbeat."""
        raise NotImplementedError


class Client(_Caller):
    """Calls and casts, from any number of tasks of one event loop.

    At most OPEN_CALLS_MAX of them wait at a time; one more raises LimitExceeded, as in a thread's
    client. `async with` connects and closes it.

    Args:
        path: The daemon's socket.

    Raises:
        ConfigError: `path` is no path.
    """

    def __init__(self, path: str | os.PathLike[str] = HOST_SOCKET) -> None:
        self._path = path_of(path)
        self._scheduler = _Scheduler(self._failed)
        self._connection = Connection(
            self._scheduler, self._path, "client", lambda _: None, self._changed
        )
        self._waiting = _Waiting(self._path)
        self._ready = asyncio.Event()
        self._problem = ""
        self._over = ""

    async def connect(self) -> None:
        """Connect, now and whenever the connection is lost. `async with` does it.

        Raises:
            LinkError: The daemon cannot be reached: the subclass and the text say why.
        """
        if self._over or self._scheduler._loop is not None:
            raise LinkDown(self._path, self._over or "this client is connected already")
        self._scheduler.bind()
        try:
            self._connection.connect()
        except VchanError:
            await self.close()
            raise

    def _changed(self, up: bool, problem: str) -> None:
        self._problem = problem
        if up:
            self._ready.set()
        elif not self._over:
            self._ready.clear()

    def _failed(self, error: BaseException) -> None:
        self._end(f"a bug has ended it: {error!r}")

    async def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        until_s = monotonic() + timeout_s
        if not self._over and not self._scheduler.runs_here():
            raise LinkDown(self._path, "not connected in this event loop: see connect()")
        try:
            async with asyncio.timeout(min(timeout_s, READY_S)):
                await self._ready.wait()
        except TimeoutError:
            problem = self._problem or "the daemon does not answer"
            raise LinkDown(self._path, problem) from None
        if self._over:
            raise LinkDown(self._path, self._over)
        left_s = max(0.001, until_s - monotonic())
        request = request.changed(timeout_ms=milliseconds(left_s))
        return await self._waiting.ask(self._connection, request)

    async def close(self) -> None:
        """Close the connection. Calls that wait raise CallTimeout, later ones LinkDown. Harmless
        twice."""
        self._end("the client was closed")

    def _end(self, why: str) -> None:
        if not self._over:
            self._over = why
            self._connection.close()
            self._waiting.end(why)
            self._ready.set()  # whoever waits for the daemon hears why there is none

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Agent(_Caller):
    """Serves topics, as `vchan.client.Agent` does: runs the methods that the control side calls;
    and calls out itself.

    A method may be `async def`, or an ordinary one: that holds up the event loop while it runs.
    Methods are begun in the order in which their requests came, and run at the same time; with
    `tasks=1` one after the other.

    Args:
        path: The guest daemon's socket; by default $VCHAN_SOCKET, or else AGENT_SOCKET.
        tasks: Methods that run at a time, at most TASKS_MAX.
        log: Told what an operator may want to know, by default on standard error.
        product: What it is: see `vchan.client.Agent`.

    Raises:
        ConfigError, LimitExceeded: An argument is wrong: which, and what was expected.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        tasks: int = TASKS,
        log: Callable[[str], object] | None = None,
        product: str | None = None,
    ) -> None:
        if path is None:
            path = os.environ.get(SOCKET_VARIABLE) or AGENT_SOCKET
        path = path_of(path)
        check_count("tasks", tasks, 1, TASKS_MAX, "TASKS_MAX")
        check_callable("log", log)
        check_product(product)
        self._loop = _Scheduler(self._failed)
        self._serving = Serving(
            self._loop,
            path,
            log or log_to_stderr,
            self._work,
            cancelled=self._cancelled,
            product=product,
        )
        self._connection = self._serving.connection
        self._waiting = _Waiting(path)
        self._tasks_max = tasks
        self._tasks: dict[bytes, asyncio.Task[None]] = {}
        self._ended: asyncio.Future[None] | None = None  # once it runs
        self._stopping = False
        self._over = ""

    def serve(
        self,
        topic: str,
        endpoint: object,
        *,
        exchange: str = EXCHANGE,
        namespace: str | None = None,
        version: str = "1.0",
    ) -> None:
        """Serve a topic with an object's public methods: see `vchan.client.Agent.serve`. Before
        `run`, or on its event loop."""
        self._serving.add(
            *endpoint_of(topic, endpoint, exchange, namespace, version, is_async=True)
        )
        self._serving.subscribe()

    async def run(self) -> None:
        """Serve until `stop`. Waits for the daemon when it is not there. To cancel it ends it at
        once, with the methods that run.

        Raises:
            NotAPort: `path` is no socket.
            LinkDown: It runs already, or has ended: an agent runs once.
        """
        if self._ended is not None:
            problem = "this agent has run already, or runs: make another"
            raise LinkDown(self._connection.path, problem)
        self._ended = self._loop.bind().create_future()
        try:
            self._serving.connect()
            if not self._stopping:
                await self._ended
            await self._finish_tasks(STOP_S)
        finally:
            self._over = "the agent has ended"
            self._connection.flush()
            self._connection.close()
            self._waiting.end(self._over)
            for task in self._tasks.values():
                task.cancel()
            await self._finish_tasks(None)

    async def _finish_tasks(self, within_s: float | None) -> None:
        if self._tasks:
            await asyncio.wait([*self._tasks.values()], timeout=within_s)

    def stop(self) -> None:
        """End `run`: nothing more is begun, and what runs may go on for STOP_S. From any thread, or
        from a signal handler of the event loop's."""
        self._stopping = True
        if self._ended is not None and not self._loop.loop.is_closed():
            self._loop.loop.call_soon_threadsafe(self._end, None)

    def _failed(self, error: BaseException) -> None:
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self._stopping = True
        if self._ended is not None and not self._ended.done():
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)

    @property
    def context(self) -> Mapping[str, Any]:
        """The context of the request whose method runs in this task, or began it. See
        `vchan.client.Agent.context`."""
        return _context.get({})

    async def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:  # noqa: ARG002
        if self._over or not self._loop.runs_here():
            problem = self._over or "the agent is not running in this event loop"
            raise LinkDown(self._connection.path, problem)
        return await self._waiting.ask(self._connection, request)

    # ---------------------------------------------------------------- serving

    def _work(self) -> None:
        serving = self._serving
        while serving.inbox and len(self._tasks) < self._tasks_max and not self._stopping:
            request = serving.inbox.popleft()
            if serving.may_begin(request):
                task = self._loop.loop.create_task(self._run_method(request))
                self._tasks[request.id] = task
                task.add_done_callback(partial(self._done, request.id))
                if request.monitor_ms:
                    serving.beat(request)

    def _done(self, request_id: bytes, task: asyncio.Task[None]) -> None:
        del self._tasks[request_id]
        self._serving.end_beat(request_id)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # our own: what a method raises is told to its caller
            self._failed(error)
        elif not self._over:
            self._work()

    def _cancelled(self, request_id: bytes) -> None:
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    async def _run_method(self, request: Request) -> None:
        pid = os.getpid()
        try:
            method, invocation, _ = self._serving.method_for(request)
            _context.set(invocation.context)
            result = method(**invocation.args)
            if isinstance(result, Awaitable):
                result = await result
            ran = returned(request, result)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # by us
                raise
            ran = ran_into(request, error)
        except Exception as error:  # noqa: BLE001 - relayed to the caller
            ran = ran_into(request, error)
        finally:
            if os.getpid() != pid:
                end_child(request)
        self._serving.finish(request, ran)
