"""What an agent says to its daemons of the queues that it alone has everything of."""

from __future__ import annotations

from typing import Any

import pytest

from vchan.client import Connection
from vchan.io.loop import Loop
from vchan.rpc.messages import Holding, charge, decode, encode, is_charge
from vchan.session import Peer

CHARGE = charge(("agent", 0))
FIRST, SECOND = b"first", b"second"


class Said(Connection):
    """A connection whose messages are a list."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        super().__init__(Loop(), "none", "agent", lambda _: None, lambda *_: None)

    def _send(self, message: bytes, stream: int) -> None:
        self.said.append(decode(message))


@pytest.fixture
def agent() -> Said:
    agent = Said()
    agent._begin(Peer(FIRST, "daemon", "", 1))
    agent._receive(encode(Holding((CHARGE,))))
    assert agent.said == []
    return agent


def test_the_next_daemon_hears_of_it(agent: Said) -> None:
    agent._begin(Peer(SECOND, "daemon", "", 1))
    assert agent.said == [Holding((CHARGE,))]
    agent._begin(Peer(b"third", "daemon", "", 1))  # the second died before it said anything
    assert agent.said == [Holding((CHARGE,))] * 2


def test_the_same_daemon_has_given_it_to_others(agent: Said) -> None:
    agent._begin(Peer(FIRST, "daemon", "", 1))
    agent._begin(Peer(SECOND, "daemon", "", 1))
    assert agent.said == []


def test_the_last_word_counts(agent: Said) -> None:
    agent._receive(encode(Holding(())))
    agent._begin(Peer(SECOND, "daemon", "", 1))
    assert agent.said == []


def test_an_id_is_no_charge() -> None:
    assert is_charge(CHARGE)
    assert is_charge(charge(("t" * 255, 33)))
    assert not is_charge(b"all" + b"\xff" * 13)
