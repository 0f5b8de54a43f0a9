"""What a message costs the daemon that passes it on, and RabbitMQ beside it: processor time.

A caller that costs little writes messages as stock clients do, as fast as the broker takes them
(casts), or so many at a time (calls). The machine need not be quiet: nothing here is told from a
clock on the wall.
"""

from __future__ import annotations

import contextlib
import json
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import amqp

from tests.rig import wait_until
from tests.rig.rabbit import RabbitServer

READY_S = 120.0
CASTS, CALLS = 20_000, 10_000
IN_FLIGHT = 256
"""Calls that wait for their answer, of all VMs together."""
LOT = 128
"""Messages written at once."""
EXCHANGE = "openstack"
PROPERTIES = struct.pack(">H", 0xB800) + b"\x10application/json\0\0\0\0\x02\0"
"""Content type, no headers, persistent, priority 0."""


class ThreadTimes:
    """The processor time of a process's threads, by the kernel's word to the nanosecond."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def by_thread(self) -> dict[int, float]:
        """Seconds of each that lives."""
        times = {}
        for task in Path(f"/proc/{self._pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                times[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        return times

    def split(self, before: dict[int, float]) -> tuple[float, float]:
        """Seconds since then: of its first thread, and of all others."""
        spent = {task: at - before.get(task, 0.0) for task, at in self.by_thread().items()}
        first = spent.pop(self._pid)
        return first, sum(spent.values())


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    """As it stands on the wire."""
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def short(text: str) -> bytes:
    """As AMQP has a short text."""
    return bytes([len(text)]) + text.encode()


def publication(channel: int, exchange: str, key: str, body: bytes) -> bytes:
    """A message on the wire: py-amqp would take the caller longer than the daemon under test."""
    method = struct.pack(">HHH", 60, 40, 0) + short(exchange) + short(key) + b"\0"
    header = struct.pack(">HHQ", 60, 0, len(body)) + PROPERTIES
    return frame(1, channel, method) + frame(2, channel, header) + frame(3, channel, body)


def request(method: str, reply_q: str = "") -> bytes:
    """What oslo.messaging's client sends."""
    unique_id = uuid.uuid4().hex
    message: dict[str, Any] = {
        "method": method,
        "args": {"x": "y" * 64},
        "namespace": None,
        "version": "1.0",
        "_unique_id": unique_id,
        "_context_request_id": f"req-{unique_id}",
        "_context_project_id": "a" * 32,
        "_context_user_id": "b" * 32,
        "_context_roles": ["admin", "member"],
    }
    if reply_q:
        message |= {"_msg_id": uuid.uuid4().hex, "_reply_q": reply_q, "_timeout": None}
    text = json.dumps(message)
    return json.dumps({"oslo.version": "2.0", "oslo.message": text}).encode()


class Caller:
    """Calls and casts to queues, and counts the answers."""

    def __init__(self, rabbit: RabbitServer, exchange: str = EXCHANGE) -> None:
        self._exchange = exchange
        self._connection = amqp.Connection(f"127.0.0.1:{rabbit.port}", heartbeat=0)
        self._connection.connect()
        self._channel = self._connection.channel()
        self.reply_q: str = self._channel.queue_declare(exclusive=True).queue
        self.answers = 0
        self._channel.basic_consume(self.reply_q, no_ack=True, callback=self._answered)

    def close(self) -> None:
        """Leave."""
        self._connection.collect()

    def _answered(self, _message: Any) -> None:
        self.answers += 1

    def _write(self, messages: Sequence[bytes]) -> None:
        self._connection.transport.write(b"".join(messages))

    def _made(self, keys: Sequence[str], count: int, reply_q: str) -> list[bytes]:
        channel, method = self._channel.channel_id, "ping" if reply_q else "note"
        return [
            publication(channel, self._exchange, keys[number % len(keys)], request(method, reply_q))
            for number in range(count)
        ]

    def prepare(self, keys: Sequence[str], count: int, *, calls: bool) -> Callable[[], None]:
        """What is to be written, made before anything is measured; returns what writes it."""
        messages = self._made(keys, count, self.reply_q if calls else "")
        return lambda: self._call(messages) if calls else self._cast(messages)

    def _cast(self, messages: list[bytes]) -> None:
        for at in range(0, len(messages), LOT):
            self._write(messages[at : at + LOT])

    def _call(self, messages: list[bytes]) -> None:
        sent, first = 0, self.answers
        while self.answers - first < len(messages):
            room = IN_FLIGHT - (sent - (self.answers - first))
            if room >= LOT // 2 or sent == 0:
                self._write(messages[sent : sent + room])
                sent = min(sent + room, len(messages))
            if self.answers - first < len(messages):
                self._connection.drain_events(timeout=READY_S)


@contextlib.contextmanager
def caller(rabbit: RabbitServer, exchange: str = EXCHANGE) -> Iterator[Caller]:
    """One that leaves in the end."""
    made = Caller(rabbit, exchange)
    try:
        yield made
    finally:
        made.close()


class Measured:
    """Who passes messages on, and how it is told that it has done with them."""

    def __init__(self, rabbit: RabbitServer, pid: int, keys: Sequence[str]) -> None:
        assert rabbit._server is not None
        self._rabbit = rabbit
        self._times, self._broker = ThreadTimes(pid), ThreadTimes(rabbit._server.pid)
        self._keys = keys

    def _wait_still(self) -> None:
        """Until it does nothing any more: also what is done a second later counts."""
        seen = -1.0

        def is_still() -> bool:
            nonlocal seen
            before, seen = seen, sum(self._times.by_thread().values())
            return seen - before < 0.02

        wait_until(is_still, timeout_s=READY_S, interval_s=1.5, failure=lambda: "busy")

    def measure(self, with_caller: Caller, count: int, *, calls: bool) -> dict[str, float]:
        """Microseconds of processor time a message."""
        write = with_caller.prepare(self._keys, count, calls=calls)
        before, broker_before = self._times.by_thread(), self._broker.by_thread()
        write()
        self._wait_still()
        first, others = self._times.split(before)
        broker = sum(self._broker.split(broker_before))
        return {
            "cpu_us": (first + others) / count * 1e6,
            "loop_us": first / count * 1e6,
            "amqp_us": others / count * 1e6,
            "broker_us": broker / count * 1e6,
        }


COSTS = (
    ("cpu_us", "CPU us"),
    ("loop_us", "loop"),
    ("amqp_us", "amqp"),
    ("broker_us", "broker"),
)
KINDS = ("cast", "call")
Cost = dict[str, dict[str, float]]
"""By kind and measure."""


def measure(rabbit: RabbitServer, pid: int, keys: Sequence[str]) -> Cost:
    """What a cast and a call cost a daemon that serves these routing keys."""
    with caller(rabbit) as one:
        return with_caller(one, rabbit, pid, keys)


def with_caller(one: Caller, rabbit: RabbitServer, pid: int, keys: Sequence[str]) -> Cost:
    """See `measure`."""
    measured = Measured(rabbit, pid, keys)
    measured.measure(one, max(IN_FLIGHT, len(keys)), calls=True)  # all is warm, and made
    return {
        "cast": measured.measure(one, CASTS, calls=False),
        "call": measured.measure(one, CALLS, calls=True),
    }


def table(costs: Mapping[str, Cost]) -> list[str]:
    """For people."""
    lines = ["processor time a message, microseconds: the process, its two threads; RabbitMQ"]
    titles = "".join(f"{f'{kind}: {title}':>14}" for kind in KINDS for _, title in COSTS)
    lines.append(" " * 24 + titles)
    for name, kinds in costs.items():
        cells = "".join(f"{kinds[kind][key]:>14.1f}" for kind in KINDS for key, _ in COSTS)
        lines.append(f"{name:<24}{cells}")
    return lines
