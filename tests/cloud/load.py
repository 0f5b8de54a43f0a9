"""A service's load on one server: stock oslo.messaging, a call and a cast every half second."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import threading
import time
import warnings
from typing import Any, Final, Self

from tests.cloud.verdict import Call, Cast, Sent
from tests.rig import wait_until

TOPIC: Final = "agent"
PERIOD_S: Final = 0.5
CALL_TIMEOUT_S: Final = 300
"""Longer than nova takes for anything that the load goes through."""
PENDING_MAX: Final = 400
FIRST_TIMEOUT_S: Final = 2
READY_TIMEOUT_S: Final = 240.0
"""Of a guest's boot on a busy machine without KVM."""


class Caller:
    """A service's connection to the broker."""

    def __init__(self, url: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oslo's own deprecations
            import oslo_messaging
            from oslo_config import cfg
        cfg.CONF([])
        # What it warns of (a broker that has ended, many calls that wait) is what is done here.
        logging.getLogger().addHandler(logging.NullHandler())
        self._oslo = oslo_messaging
        transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=url)
        target = oslo_messaging.Target(topic=TOPIC)
        self._client = oslo_messaging.get_rpc_client(transport, target)
        self._numbers = itertools.count(1)
        self._number_lock = threading.Lock()

    def number(self) -> int:
        """One that no other request of this run has."""
        with self._number_lock:
            return next(self._numbers)

    def call(self, server: str, timeout_s: int = CALL_TIMEOUT_S) -> Call:
        """One call, and what became of it."""
        number = self.number()
        sent_s = time.monotonic()
        client = self._client.prepare(server=server, timeout=timeout_s)
        try:
            answer: Any = client.call({}, "echo", number=number)
        except self._oslo.MessagingException as error:
            name = type(error).__name__
            kind = getattr(error, "exc_type", "")
            return Call(number, sent_s, None, kind or name)
        except Exception as error:  # noqa: BLE001 - what a caller is told may be any exception
            return Call(number, sent_s, None, type(error).__name__)
        wrong = "" if answer == number else f"wrong answer {answer!r}"
        return Call(number, sent_s, time.monotonic(), wrong)

    def cast(self, server: str) -> Cast:
        """One cast."""
        number = self.number()
        self._client.prepare(server=server).cast({}, "note", number=number)
        return Cast(number, time.monotonic())

    def wait_answered(self, server: str) -> float:
        """Call until the server's agent answers, for the first time; when that was.

        Until an agent serves its topic there is no queue, and what is sent goes nowhere.

        Raises:
            RigError: It took over READY_TIMEOUT_S.
        """
        told = ""

        def is_answered() -> bool:
            nonlocal told
            call = self.call(server, FIRST_TIMEOUT_S)
            told = call.failure
            return not told

        wait_until(
            is_answered,
            timeout_s=READY_TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"{server} does not answer in {READY_TIMEOUT_S:.0f} s: {told}",
        )
        return time.monotonic()


class Load:
    """Calls and casts to a server, from `with` to `finish`."""

    def __init__(self, caller: Caller, server: str) -> None:
        self._caller = caller
        self._server = server
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._sent = Sent([], [])
        self._pool = concurrent.futures.ThreadPoolExecutor(PENDING_MAX)
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._pool.submit(self._call)
            cast = self._caller.cast(self._server)
            with self._lock:
                self._sent.casts.append(cast)

    def _call(self) -> None:
        call = self._caller.call(self._server)
        with self._lock:
            self._sent.calls.append(call)

    def wait_answer(self, after_s: float, timeout_s: float) -> float | None:
        """When the first call was answered that was sent after a time; None: none was."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            with self._lock:
                ends = [
                    call.answered_s
                    for call in self._sent.calls
                    if call.sent_s > after_s and call.answered_s is not None
                ]
            if ends:
                return min(ends)
            time.sleep(0.05)
        return None

    def finish(self) -> Sent:
        """Send no more, and wait for all answers."""
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()
        return self._sent
