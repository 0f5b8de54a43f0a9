"""What is served runs: on the loop's own thread, one method at a time, or in a pool's threads."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, NoReturn

from vchan.io.loop import Callback, Scheduler
from vchan.io.streams import Stream
from vchan.programs.serving import Finish, Serving, ran_into, returned
from vchan.rpc.messages import Request

WORK_S: Final = 0.002
"""An agent's methods run in a row for so long, if none takes longer. At it: what has arrived
meanwhile, a withdrawal perhaps, is taken before the next begins."""


def end_child(request: Request) -> NoReturn:
    """The method has forked, and this is its child, which has come back from it. It must not go on
    here: it would read its parent's connection, run what its parent runs, and answer, too. Nor may
    it unwind: what is closed on the way takes it from its parent's poll."""
    error = sys.exc_info()[1]
    status = 1
    if not isinstance(error, SystemExit):
        advice = "a child must end itself, by os._exit() or sys.exit()"
        story = f"a method of topic {request.topic} has forked, and its child came back: {advice}"
        _to_stderr(f"vchan agent: {story}")
    elif error.code is None or isinstance(error.code, int):
        status = (error.code or 0) & 0xFF
    else:
        _to_stderr(str(error.code))  # as Python does
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed, or nobody reads it
    os._exit(status)


def _to_stderr(text: str) -> None:
    try:
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
    except OSError:
        pass  # closed, or nobody reads it


class Worker:
    """Runs an agent's methods.

    Args:
        call_soon_threadsafe: The loop's.
        pool: A ThreadPoolExecutor, where methods run; None: on the loop's thread.
        Others: as `Serving`.

    Attributes:
        serving: What it works for.
        pool: As above.
        running: `context` in it is that of the request whose method runs on this thread.
        is_stopped: Begin nothing more.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        call_soon_threadsafe: Callable[[Callback], object],
        path: str,
        log: Callable[[str], object],
        *,
        open_stream: Callable[[str], Stream],
        random_bytes: Callable[[int], bytes],
        pool: Any = None,
        product: str | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._call_soon_threadsafe = call_soon_threadsafe
        self.pool = pool
        self._is_working = False
        self._holds = False  # an answer, until `uncork`
        self.is_stopped = False
        self.running = threading.local()
        self.serving = Serving(
            scheduler,
            path,
            log,
            self._work,
            open_stream=open_stream,
            random_bytes=random_bytes,
            product=product,
        )

    def _work(self) -> None:
        """No answer waits for a method that may take long."""
        if self._is_working:
            return
        self._is_working = True
        inbox, connection = self.serving.inbox, self.serving.connection
        until_s = self._scheduler.time() + WORK_S
        connection.cork()
        while inbox:
            self._begin(inbox.popleft())
            if self.is_stopped or self._scheduler.time() >= until_s:
                break
        connection.uncork()
        self._holds = False
        self._is_working = False
        if inbox:
            self._scheduler.call_soon(self._work)

    def _begin(self, request: Request) -> None:
        if not self.serving.may_begin(request):
            return
        if self.pool is None:
            self.serving.finish(request, self._run_method(request))
            self._holds = True
        else:
            self.pool.submit(self._run_in_pool, request)
            if request.monitor_ms:
                self.serving.beat(request)

    def _run_in_pool(self, request: Request) -> None:
        try:
            ran = self._run_method(request)
        except BaseException as error:  # noqa: BLE001 - sys.exit(), say: it ends no thread of a pool
            ran = ran_into(request, error)
        self._call_soon_threadsafe(lambda: self.serving.finish(request, ran))

    def _run_method(self, request: Request) -> Finish:
        """What a method raises is the caller's to see, whatever it is."""
        pid = os.getpid()
        try:
            method, invocation, is_quick = self.serving.method_for(request)
            if self._holds and not is_quick:
                self._release()
            self.running.context = invocation.context
            return returned(request, method(**invocation.args))
        except Exception as error:  # noqa: BLE001 - relayed to the caller
            return ran_into(request, error)
        finally:
            if os.getpid() != pid:
                end_child(request)

    def _release(self) -> None:
        """Have what is held written."""
        connection = self.serving.connection
        connection.uncork()
        connection.cork()
        self._holds = False
