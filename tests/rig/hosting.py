"""The host's end of one guest's channel, in this process: no libvirt, no broker, no daemon."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.rig import wait_until
from tests.rig.gates import OpenGate, offer_nothing
from tests.rig.phases import release, serve
from vchan.host.hypervisor.domains import Domain
from vchan.host.vm.channel import Channel, End, Home
from vchan.host.vm.gate import Gate
from vchan.host.vm.upward import Offer
from vchan.io.loop import Loop
from vchan.rpc.bodies import encode_invocation
from vchan.rpc.in_flight import Answered, HandedBack, Heartbeat, Outcome
from vchan.rpc.messages import AGENT_GONE, CALL, Request

T = TypeVar("T")
WAIT_S = 300.0


class HostEnd:
    """A channel on a thread of its own; connected and spoken on until `close`.

    Args:
        path: The socket of the guest's port.
        instance: Of the daemon that this stands for; None: a new one.
        gate: What the guest may do; None: everything.
        offer: Given the loop, makes what the guest's requests are offered to; None: nothing.
        end: What our end of the channel is like.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str = "host",
        instance: bytes | None = None,
        gate: Gate | None = None,
        offer: Callable[[Loop], Offer] | None = None,
        end: End = End(),  # noqa: B008 - immutable
    ) -> None:
        self.log: list[str] = []
        self.debug: list[str] = []
        self._loop = Loop()
        home = Home(name, instance or os.urandom(16), log=self.log.append, debug=self.debug.append)
        self.channel = Channel(
            self._loop,
            Domain("vm"),
            home,
            None,
            gate or OpenGate(),
            offer(self._loop) if offer is not None else offer_nothing,
            end=end,
        )
        self._thread = threading.Thread(target=self._loop.run, name="host-end")
        self._thread.start()
        self.run(lambda: serve(self.channel, path))

    def run(self, function: Callable[[], T]) -> T:
        """Run something on the loop's thread."""
        done: Future[T] = Future()
        self._loop.call_soon_threadsafe(lambda: done.set_result(function()))
        return done.result(WAIT_S)

    def submit(self, topic: str, method: str, **args: Any) -> Future[Outcome]:
        """Call a method; the future has what became of it."""
        return self.run(lambda: self._submit(topic, method, args))

    def cast(self, topic: str, method: str, **args: Any) -> Future[Outcome]:
        """Cast without a deadline: it waits for an agent however long."""
        return self.run(lambda: self._submit(topic, method, args, flags=0, timeout_ms=0))

    def _submit(
        self,
        topic: str,
        method: str,
        args: dict[str, Any],
        *,
        flags: int = CALL,
        timeout_ms: int = int(WAIT_S * 1000),
    ) -> Future[Outcome]:
        done: Future[Outcome] = Future()
        body = encode_invocation(method, args)
        request = Request(os.urandom(16), flags, timeout_ms, 0, "openstack", topic, "", body)

        def told(outcome: Outcome) -> None:
            if not isinstance(outcome, Heartbeat):
                done.set_result(outcome)

        self.channel.downward.submit_local(request, told, self._loop.time())
        self.channel.set_timer()
        return done

    def call(self, topic: str, method: str, **args: Any) -> bytes:
        """Call a method that must succeed; returns its result's JSON."""
        outcome = self.submit(topic, method, **args).result(WAIT_S)
        assert isinstance(outcome, Answered), outcome
        assert not outcome.failed, outcome
        return outcome.body

    def topics(self) -> list[str]:
        """What the guest's agents serve; nothing from a daemon that went away with the question."""
        outcome = self.submit("vchan.guest", "info").result(WAIT_S)
        if isinstance(outcome, HandedBack) and outcome.reason == AGENT_GONE:
            return []
        assert isinstance(outcome, Answered) and not outcome.failed, outcome
        topics: list[str] = json.loads(outcome.body)["topics"]
        return topics

    def summary(self) -> Any:
        """What `vchan status` would show."""
        return self.run(self.channel.summary)

    def wait_ready(self) -> None:
        """Wait for the session."""
        wait_until(
            lambda: bool(self.summary()["state"] == "ready"),
            timeout_s=WAIT_S,
            interval_s=0.02,
            failure=lambda: f"no session: {self.log}",
        )

    def wait_served(self, topic: str) -> None:
        """Wait until an agent in the guest serves a topic."""
        wait_until(
            lambda: f"openstack/{topic}" in self.topics(),
            timeout_s=WAIT_S,
            interval_s=0.1,
            failure=lambda: f"nobody serves {topic}: {self.log}",
        )

    def cut(self) -> None:
        """Lose the connection, as when QEMU closes it; the channel connects anew by itself."""

        def cut() -> None:
            if self.channel._link is not None:
                fd = os.dup(self.channel._link.stream.fileno())
                with socket.socket(fileno=fd) as connected:
                    connected.shutdown(socket.SHUT_RDWR)

        self.run(cut)

    def submit_and_stand(
        self, count: int, topic: str, method: str, **args: Any
    ) -> tuple[list[Future[Outcome]], Callable[[], None]]:
        """Call a method so many times, and then stand still, connected and not reading a single
        answer, until the returned function is called."""
        calls: list[Future[Outcome]] = []
        go_on, standing = threading.Event(), threading.Event()

        def stand() -> None:
            calls.extend(self._submit(topic, method, args) for _ in range(count))
            link = self.channel._link
            assert link is not None
            sent = -1
            while sent != link.session.counters.frames_sent:  # some are written at a time
                sent = link.session.counters.frames_sent
                link.flush()
            standing.set()
            go_on.wait(WAIT_S)

        self._loop.call_soon_threadsafe(stand)
        standing.wait(WAIT_S)
        return calls, go_on.set

    def close(self) -> None:
        """Close the connection and end the thread."""
        self.run(lambda: release(self.channel))
        self._loop.stop()
        self._thread.join(WAIT_S)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
