"""What an arrival took, in one line of the log."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from vchan.guest import arrivals
from vchan.guest.arrivals import Arrivals
from vchan.io.loop import Loop
from vchan.io.steps import LATE_S, Steps, WatchedStream
from vchan.rpc.messages import Receipt, Request, Subscribe, encode
from vchan.session import CONTROL, Config, Opened, Peer, Role, Session
from vchan.wire.frames import FLUSH


class Clock:
    """A loop whose time is set."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._loop = Loop()
        self.timers: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Any) -> Any:
        self.timers.append((delay_s, callback))
        return self._loop.call_later(delay_s, callback)

    def close(self) -> None:
        self._loop.close()


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    yield clock
    clock.close()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def steps(clock: Clock, lines: list[str]) -> Steps:
    return Steps(clock, "arrival", "last", lines.append)  # type: ignore[arg-type]


def test_the_last_step_tells_all_with_the_time_of_the_first(
    clock: Clock, steps: Steps, lines: list[str]
) -> None:
    for name in ("early", "last"):
        steps.reach(name)  # nothing has begun
    steps.begin("first")
    clock.now_s += 0.0015
    steps.reach("second")
    clock.now_s += 0.1
    steps.reach("second")
    steps.begin("first")  # it goes on
    steps.reach("last")
    steps.reach("later")
    assert lines == ["arrival at 100.000000 s, in ms: first 0.0, second 1.5, last 101.5"]
    steps.begin("first")
    steps.reach("last")
    assert lines[1:] == ["arrival at 100.101500 s, in ms: first 0.0, last 0.0"]


def test_a_step_behind_another_does_not_count_before_it(steps: Steps, lines: list[str]) -> None:
    steps.begin("first")
    steps.reach("last", after="asked")
    under_way = [steps.is_under_way]
    steps.reach("asked")
    steps.reach("last", after="asked")
    assert [*under_way, steps.is_under_way] == [True, False]
    assert [line.partition("ms: ")[2] for line in lines] == ["first 0.0, asked 0.0, last 0.0"]


def test_what_is_late_or_broken_off_is_told_as_far_as_it_came(
    clock: Clock, steps: Steps, lines: list[str]
) -> None:
    steps.end()
    steps.begin("first")
    [(delay_s, late)] = clock.timers
    assert delay_s == LATE_S
    late()
    steps.reach("last")
    steps.begin("first")
    steps.end()
    assert lines == [
        "arrival at 100.000000 s, not over after 10 s, in ms: first 0.0",
        "arrival at 100.000000 s, broken off, in ms: first 0.0",
    ]


class Bytes:
    """A stream."""

    path = "/a/port"
    ends_at_hangup = False

    def __init__(self) -> None:
        self.incoming: list[bytes] = []
        self.written = b""

    def fileno(self) -> int:
        return 7

    def read(self) -> bytes:
        if not self.incoming:
            raise BlockingIOError
        return self.incoming.pop(0)

    def write(self, data: bytes) -> int:
        self.written += data
        return len(data)

    def close(self) -> None:
        self.incoming.clear()


def test_a_watched_stream_is_what_it_was() -> None:
    stream, heard, said = Bytes(), [], []  # type: ignore[var-annotated]
    watched = WatchedStream(stream, heard.append, lambda: said.append(1))
    stream.incoming = [b"abc"]
    assert (watched.path, watched.ends_at_hangup, watched.fileno()) == ("/a/port", False, 7)
    assert watched.read() == b"abc"
    with pytest.raises(BlockingIOError):
        watched.read()
    assert watched.write(b"de") == 2
    assert (heard, said, stream.written) == ([b"abc"], [1], b"de")
    stream.incoming = [b"more"]
    watched.close()
    assert stream.incoming == []


def test_the_steps_of_an_arrival_in_a_guest(clock: Clock, lines: list[str]) -> None:
    taken = Arrivals(clock, lines.append)  # type: ignore[arg-type]
    stream = Bytes()
    port = taken.stream(stream)
    sent: list[bytes] = []
    handled: list[object] = []

    def send(message: bytes, stream: int) -> None:
        assert stream == CONTROL
        sent.append(message)

    to_host, to_agent = taken.to_host(send), taken.to_agent(send)
    handle = taken.handler(handled.append)
    request = encode(Request(bytes(16), 1, 0, 0, "openstack", "demo", "", b"{}"))
    receipt, topics = encode(Receipt(bytes(16))), encode(Subscribe(()))
    host = Session(Config(Role.HOST, bytes(16), "host"), os.urandom)
    host.open(0.0)
    greeting = host.data_to_send()
    assert FLUSH in greeting
    to_host(receipt, CONTROL)  # before all: of nobody's
    for at in range(0, len(greeting), 4096):
        clock.now_s += 0.001
        stream.incoming.append(greeting[at : at + 4096])
        port.read()
    taken.agent_said(receipt)  # of what the host before had sent
    to_host(receipt, CONTROL)
    port.write(b"welcome")
    opened = Opened(Peer(bytes(16), "host", "", 1), resumed=False)
    handle(opened)
    to_host(topics, CONTROL)
    taken.host_said(topics)
    taken.host_said(request)
    to_agent(topics, CONTROL)
    to_agent(request, CONTROL)
    taken.agent_said(topics)
    taken.agent_said(receipt)
    clock.now_s += 0.002
    to_host(receipt, CONTROL)
    assert handled == [opened]
    assert sent == [receipt, receipt, topics, topics, request, receipt]
    [line] = lines
    began, _, told = line.partition(" s, in ms: ")
    assert began == "arrival at 100.001000"
    names = [step.rpartition(" ")[0] for step in told.split(", ")]
    assert names == [
        arrivals.GREETED,
        arrivals.WROTE,
        arrivals.OPENED,
        arrivals.TOPICS,
        arrivals.REQUEST,
        arrivals.HANDED_OUT,
        arrivals.AGENT_ANSWERED,
        arrivals.ANSWERED,
    ]
    assert told.endswith(f"{arrivals.ANSWERED} 6.0")
