"""The host's ends of what is measured: of raw channels, of qemu-ga, and of vchan-guest."""

import base64
import itertools
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.rig import RigError
from vchan.io.link import Link
from vchan.io.loop import Loop
from vchan.io.streams import Stream
from vchan.rpc.in_flight import Answered, HandedBack, Outcome, Requester, Taken
from vchan.rpc.messages import CALL, Request, Subscribe, decode
from vchan.session import Config, Event, Opened, Received, Refused, Role, Session
from vchan.wire.frames import RAW_BODIES

EXCHANGE = "openstack"
DAEMON_TOPIC = "vchan.guest"
AGENT_TOPIC = "bench"
READY_TIMEOUT_S = 180.0
CALL_TIMEOUT_S = 120.0
READ_BYTES = 1 << 18
SETTLE_IDS = 256
"""So many ids are settled at a time; a host daemon settles once a second."""


class RawChannel:
    """A port with an echo or a bulk program behind it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def settle(self, payload: bytes) -> None:
        """Wait until the program is there and has echoed."""
        self._channel.settimeout(READY_TIMEOUT_S)
        self.echo(payload)

    def echo(self, payload: bytes) -> None:
        """Send it and wait for it to come back."""
        self._channel.sendall(payload)
        self._read(len(payload))

    def take(self, size: int) -> None:
        """Have the guest read `size` bytes."""
        self._channel.sendall(b"take %d\n" % size)
        time.sleep(0.01)  # the line must arrive alone
        self._channel.sendall(bytes(size))
        self._read(1)

    def give(self, size: int) -> None:
        """Have the guest write `size` bytes."""
        self._channel.sendall(b"give %d\n" % size)
        self._read(size)

    def _read(self, count: int) -> None:
        while count:
            received = self._channel.recv(READ_BYTES)
            if not received:
                raise RigError("a raw channel was closed")
            count -= len(received)


class GuestAgent:
    """qemu-ga."""

    def __init__(self, channel: socket.socket) -> None:
        channel.settimeout(READY_TIMEOUT_S)
        self._channel = channel
        self._lines = channel.makefile("rb")

    def ping(self) -> None:
        """guest-ping."""
        self.execute("guest-ping")

    def flood(self, count: int, in_flight: int) -> None:
        """So many pings, so many of them at a time."""
        line = b'{"execute": "guest-ping"}\n'
        self._channel.sendall(line * min(in_flight, count))
        left = count - min(in_flight, count)
        for _ in range(count):
            if b'"return"' not in self._lines.readline():
                raise RigError("qemu-ga refused a ping")
            if left:
                left -= 1
                self._channel.sendall(line)

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one of its commands."""
        line: dict[str, Any] = {"execute": command}
        if arguments:
            line["arguments"] = arguments
        self._channel.sendall(json.dumps(line).encode() + b"\n")
        answer = json.loads(self._lines.readline())
        if "return" not in answer:
            raise RigError(f"qemu-ga refused {command}: {answer}")
        return answer["return"]

    def read_file(self, path: str, chunk: int) -> int:
        """Read a whole file, as guest-file-read lets one. Returns its size."""
        handle = self.execute("guest-file-open", path=path)
        size = 0
        while True:
            part = self.execute("guest-file-read", handle=handle, count=chunk)
            size += len(base64.b64decode(part["buf-b64"]))
            if part["eof"]:
                break
        self.execute("guest-file-close", handle=handle)
        return size


class Vchan:
    """vchan-guest, driven by the code a host daemon drives it with: link, session, requester.

    What a host daemon does besides (broker, libvirt) is not in it.
    """

    def __init__(self, channel: Stream) -> None:
        self.loop = Loop()
        self._topics: set[str] = set()
        self._problem = ""
        self._ids = itertools.count(int.from_bytes(os.urandom(12), "big") << 32)
        self._told: dict[bytes, Callable[[], object]] = {}
        self._over: list[bytes] = []
        config = Config(Role.HOST, os.urandom(16), "bench", features=RAW_BODIES)
        session = Session(config, os.urandom)
        self._requester = Requester(lambda message, stream: self._link.send(message, stream))
        self._link = Link(self.loop, session, channel, self._handle, self._lost)
        self.session = session
        self.failures: Counter[str] = Counter()

    def close(self) -> None:
        """Close the channel."""
        self._link.close()
        self.loop.close()

    def settle(self, topic: str) -> None:
        """Wait until an agent serves this topic."""
        self._run_until(lambda: topic in self._topics, READY_TIMEOUT_S)

    def _run_until(self, done: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not done():
            self.loop.run_once(1.0)
            if self._problem or time.monotonic() > deadline_s:
                raise RigError(self._problem or f"vchan-guest: not ready in {timeout_s} s")

    def call(self, topic: str, body: bytes) -> None:
        """Call and wait for the answer."""
        answered: list[None] = []
        self._submit(topic, CALL, body, lambda: answered.append(None))
        run_once = self.loop.run_once
        while not answered:
            run_once(CALL_TIMEOUT_S)
        self._check()

    def flood(self, topic: str, body: bytes, count: int, in_flight: int, flags: int = CALL) -> None:
        """Make `count` requests, so many at a time, and wait for the last."""
        left = count
        over = 0

        def one_over() -> None:
            nonlocal left, over
            over += 1
            if left:
                left -= 1
                self._submit(topic, flags, body, one_over)

        for _ in range(min(in_flight, count)):
            left -= 1
            self._submit(topic, flags, body, one_over)
        while over < count:
            self.loop.run_once(CALL_TIMEOUT_S)
        self._check()

    def _submit(self, topic: str, flags: int, body: bytes, told: Callable[[], object]) -> None:
        request_id = (next(self._ids) % (1 << 128)).to_bytes(16, "big")
        # Ids end in a counter, but choose their answer's stream by their first byte.
        request_id = request_id[::-1]
        self._told[request_id] = told
        timeout_ms = int(CALL_TIMEOUT_S * 1000)
        request = Request(request_id, flags, timeout_ms, 0, EXCHANGE, topic, "vm", body)
        self._requester.submit(request, self.loop.time())

    def _handle(self, event: Event) -> None:
        match event:
            case Received(_, data):
                message = decode(data)
                if isinstance(message, Subscribe):
                    self._topics = {topic.name for topic in message.topics}
                for outcome in self._requester.receive(message):  # type: ignore[arg-type]
                    self._tell(outcome)
            case Opened(peer, resumed):
                if not resumed:
                    self._requester.opened(self.loop.time(), takes_raw=peer.takes_raw)
            case Refused(reason):
                self._problem = reason
            case _:
                pass

    def _tell(self, outcome: Outcome) -> None:
        match outcome:
            case Taken() | Answered(_, False):
                pass
            case Answered(_, True, body):
                self.failures[body.decode()] += 1
            case HandedBack(_, _, text):
                self.failures[text] += 1
            case _:
                return
        self._over.append(outcome.id)
        if len(self._over) >= SETTLE_IDS:
            self._requester.settle(self._over)
            self._over.clear()
        self._told.pop(outcome.id)()

    def _lost(self, reason: str) -> None:
        self._problem = reason

    def _check(self) -> None:
        if self._problem or self.failures:
            raise RigError(f"{self._problem} {self.failures.most_common(3)}")
