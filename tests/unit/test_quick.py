"""Answers of quick methods go out together; no answer waits for a method that may take long."""

from __future__ import annotations

import os
from typing import Any

import pytest

from vchan.client import quick, raw
from vchan.io.link import Link
from vchan.programs.endpoints import endpoint_of
from vchan.programs.working import WORK_S, Worker
from vchan.rpc.arguments import quick_methods
from vchan.rpc.bodies import encode_invocation, encode_raw
from vchan.rpc.messages import CALL, RAW, Reply, Request, Subscribe, decode, encode
from vchan.session import CONTROL, Config, Event, Received, Role, Session
from vchan.testing import VirtualLoop


class Endpoint:
    """Notes how many answers were out when each of its methods began."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.took_s = 0.0

    def _began(self) -> None:
        self._place.out_at_begin.append(self._place.written())
        self._place.loop.now_s += self.took_s

    @quick
    def look(self) -> None:
        self._began()

    @raw
    @quick
    def look_raw(self, data: bytes) -> bytes:
        self._began()
        return data

    @quick
    def broken(self) -> None:
        self._began()
        raise ValueError("no")

    def slow(self) -> None:
        self._began()


class Place:
    """An agent, and its daemon.

    Attributes:
        out_at_begin: Of each method that has run.
    """

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.out_at_begin: list[int] = []
        self._writes = 0
        self._heard: list[Any] = []
        self._ids = 0
        here, self._there = self.loop.pipe("agent.sock")
        loop: Any = self.loop
        worker = Worker(
            loop,
            loop.call_soon,
            "agent.sock",
            lambda _: None,
            open_stream=lambda _: here,
            random_bytes=os.urandom,
        )
        self.endpoint = Endpoint(self)
        worker.serving.add(*endpoint_of("t", self.endpoint, "openstack", None, "1.0"))
        worker.serving.subscribe()
        session = Session(Config(Role.HOST, b"d" * 16, "daemon"), os.urandom)
        self._daemon = Link(self.loop, session, self._there, self._handle, lambda _: None)
        worker.serving.connect()
        self.loop.settle()
        assert any(isinstance(each, Subscribe) for each in self._heard)
        here.on_write = self._count

    def _count(self, size: int) -> int:
        self._writes += 1
        return size

    def _handle(self, event: Event) -> None:
        if isinstance(event, Received):
            self._heard.append(decode(event.message))

    def written(self) -> int:
        """How often the agent has written since it was asked."""
        return self._writes

    def ask(self, *methods: str) -> int:
        """Ask these, all at once; returns how often the agent wrote until all had their answers."""
        self._heard.clear()
        self.out_at_begin.clear()
        self._writes = 0
        self._daemon.cork()
        for method in methods:
            self._ids += 1
            is_raw = method.endswith("_raw")
            body = encode_invocation(method, {})
            self._daemon.send(
                encode(
                    Request(
                        self._ids.to_bytes(16),
                        CALL | RAW if is_raw else CALL,
                        60_000,
                        0,
                        "openstack",
                        "t",
                        "",
                        encode_raw(body, b"x") if is_raw else body,
                    )
                ),
                CONTROL + 1,
            )
        self._daemon.uncork()
        self.loop.run_until(lambda: self._answers() == len(methods))
        return self._writes

    def _answers(self) -> int:
        return sum(isinstance(each, Reply) for each in self._heard)


@pytest.fixture
def place() -> Place:
    return Place()


def test_those_of_quick_methods_go_out_together(place: Place) -> None:
    assert place.ask("look", "look_raw", "broken", "look") == 1
    assert place.out_at_begin == [0] * 4


def test_those_of_others_one_by_one(place: Place) -> None:
    assert place.ask("slow", "slow", "slow") == 3
    assert place.out_at_begin == [0, 1, 2]


def test_no_answer_waits_for_a_method_that_is_not_quick(place: Place) -> None:
    assert place.ask("look", "look", "slow", "look", "slow") == 3
    assert place.out_at_begin == [0, 0, 1, 1, 2]


def test_quick_ones_that_add_up_do_not_hold_their_answers(place: Place) -> None:
    place.endpoint.took_s = 0.3 * WORK_S
    place.ask(*["look"] * 12)
    assert place.out_at_begin == [number // 4 for number in range(12)]


def test_which_methods_are_quick(place: Place) -> None:
    assert quick_methods(place.endpoint) == {"look", "look_raw", "broken"}
