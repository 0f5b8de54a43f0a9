"""What an agent says to its daemons of the queues that it alone has everything of."""

from __future__ import annotations

import os
from typing import Any

import pytest

from vchan.io.link import Link
from vchan.io.streams import Stream
from vchan.programs.connection import RECONNECT_S, Connection
from vchan.rpc.messages import Holding, charge, decode, encode, is_charge
from vchan.session import CONTROL, Config, Event, Received, Role, Session
from vchan.testing import VirtualLoop

CHARGE = charge(("agent", 0))
FIRST, SECOND, THIRD = b"first", b"second", b"third"


class Place:
    """A connection, and the daemons that follow one another where it connects.

    Attributes:
        heard: What the present one was told.
    """

    def __init__(self) -> None:
        self._loop = VirtualLoop()
        self._run = FIRST
        self._daemon: Link | None = None
        self.heard: list[Any] = []
        Connection(
            self._loop,
            "agent.sock",
            "agent",
            lambda _: None,
            lambda *_: None,
            open_stream=self._accept,
        ).connect()
        self._loop.settle()

    def _accept(self, path: str) -> Stream:
        here, there = self._loop.pipe(path)
        session = Session(Config(Role.HOST, self._run.ljust(16), "daemon"), os.urandom)
        self._daemon = Link(self._loop, session, there, self._handle, lambda _: None)
        return here

    def _handle(self, event: Event) -> None:
        if isinstance(event, Received):
            self.heard.append(decode(event.message))

    def says(self, *charges: bytes) -> None:
        """The present daemon says who has what."""
        assert self._daemon is not None
        self._daemon.send(encode(Holding(charges)), CONTROL)
        self._loop.settle()

    def next(self, run: bytes) -> None:
        """The present one goes; this one comes. The session is a new one in any case."""
        assert self._daemon is not None
        self.heard.clear()
        self._run = run
        self._daemon.close()
        self._loop.advance(2 * RECONNECT_S[0])


@pytest.fixture
def place() -> Place:
    place = Place()
    place.says(CHARGE)
    assert place.heard == []
    return place


def test_the_next_daemon_hears_of_it(place: Place) -> None:
    place.next(SECOND)
    assert place.heard == [Holding((CHARGE,))]
    place.next(THIRD)  # the second died before it said anything
    assert place.heard == [Holding((CHARGE,))]


def test_the_same_daemon_has_given_it_to_others(place: Place) -> None:
    place.next(FIRST)
    assert place.heard == []
    place.next(SECOND)
    assert place.heard == []


def test_the_last_word_counts(place: Place) -> None:
    place.says()
    place.next(SECOND)
    assert place.heard == []


def test_an_id_is_no_charge() -> None:
    assert is_charge(CHARGE)
    assert is_charge(charge(("t" * 255, 33)))
    assert not is_charge(b"all" + b"\xff" * 13)
