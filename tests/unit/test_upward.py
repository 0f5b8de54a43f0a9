"""Requests of a guest's agents: what the host and the agents are told, and when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.errors import LimitExceeded
from vchan.guest.upward import ORPHAN_S, UPWARD_BYTES_MAX, UPWARD_MAX, GuestUpward
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FAILURE,
    FINAL,
    NO_AGENT,
    REDELIVERED,
    REFUSED,
    Cancel,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    decode,
)

TOO_LARGE = 2 * 1024 * 1024


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def request(number: int, flags: int = 0, body: bytes = b"{}", **changes: Any) -> Request:
    made = Request(id_of(number), flags, 0, 0, "nova", "conductor", "", body)
    return made.changed(**changes)


class Rig:
    """The way up, between a host and agents that are lists."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.host: list[Any] = []
        self.heard: dict[int, list[Any]] = {}
        self.host_takes = self.agents_take = 2**62
        self.up = GuestUpward(self._to_host)
        self.up.opened(self.now_s)
        self.attach(1)

    def _to_host(self, data: bytes, stream: int) -> None:
        if len(data) > self.host_takes:
            raise LimitExceeded("message", len(data), self.host_takes, "MESSAGE_BYTES_MAX")
        self.host.append(decode(data))

    def attach(self, key: int) -> None:
        heard = self.heard[key] = []

        def send(data: bytes, stream: int) -> None:
            if len(data) > self.agents_take:
                raise LimitExceeded("message", len(data), self.agents_take, "MESSAGE_BYTES_MAX")
            heard.append(decode(data))

        self.up.attach(key, send)

    def detach(self, key: int) -> None:
        self.up.detach(key, self.now_s)

    def agent(self, message: Any, key: int = 1) -> None:
        self.up.receive(key, message, self.now_s)

    def settle(self, *numbers: int, key: int = 1) -> None:
        self.agent(Settled(tuple(map(id_of, numbers))), key)

    def host_says(self, message: Receipt | Reply | Returned) -> None:
        self.up.host_receive(message)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.up.handle_timeout(self.now_s)

    def to_host(self) -> list[Any]:
        host, self.host[:] = list(self.host), []
        return host

    def to_agent(self, key: int = 1) -> list[Any]:
        heard, self.heard[key][:] = list(self.heard[key]), []
        return heard

    @property
    def is_empty(self) -> bool:
        up = self.up
        return not (up._items or len(up._host) or up._bytes)


@pytest.fixture
def rig() -> Rig:
    return Rig()


RECEIPT = Receipt(id_of(1))
REPLY = Reply(id_of(1), FINAL, b'"x"')
FAILED = Reply(id_of(1), FINAL | FAILURE, b"{}")
RETURNED = Returned(id_of(1), NO_AGENT, "nobody serves it")


@pytest.mark.parametrize(
    ("flags", "outcome"), [(0, RECEIPT), (CALL, REPLY), (CALL, FAILED), (0, RETURNED)]
)
def test_there_and_back(rig: Rig, flags: int, outcome: Any) -> None:
    rig.agent(request(1, flags))
    assert rig.to_host() == [request(1, flags)]
    rig.host_says(outcome)
    assert rig.to_agent() == [outcome]
    assert rig.to_host() == []  # the host must remember it: the agent may not have heard
    rig.settle(1)
    assert rig.to_host() == [Settled((id_of(1),))]
    assert rig.is_empty


def test_heartbeats(rig: Rig) -> None:
    rig.agent(request(1, CALL))
    beat = Reply(id_of(1), 0, b"")
    rig.host_says(beat)
    assert rig.to_agent() == [beat]
    rig.host_says(REPLY)
    assert rig.to_agent() == [REPLY]


def test_an_answer_to_nothing_that_is_known(rig: Rig) -> None:
    rig.host_says(REPLY)
    assert (rig.to_agent(), rig.to_host()) == ([], [])


def test_requests_made_without_a_host_go_when_it_is_there() -> None:
    rig = Rig()
    rig.up = GuestUpward(rig._to_host)
    rig.attach(1)
    rig.agent(request(1))
    rig.agent(request(2))
    assert rig.to_host() == []
    rig.up.opened(rig.now_s)
    assert rig.to_host() == [request(1), request(2)]  # and not as if they had been sent before


def test_a_new_session_with_a_host_repeats_what_is_not_over(rig: Rig) -> None:
    for number in (1, 2, 3):
        rig.agent(request(number))
    rig.host_says(RECEIPT)
    rig.to_host()
    rig.up.opened(rig.now_s)
    assert rig.to_host() == [request(2, REDELIVERED), request(3, REDELIVERED)]


def test_what_is_settled_before_it_is_over_is_not(rig: Rig) -> None:
    """An agent could make the daemon hold ever more, and forget that it does."""
    rig.agent(request(1))
    rig.to_host()
    rig.settle(1, 2)
    assert rig.to_host() == []
    rig.host_says(RECEIPT)
    assert rig.to_agent() == [RECEIPT]


def test_withdrawn(rig: Rig) -> None:
    rig.agent(request(1, CALL))
    rig.to_host()
    rig.agent(Cancel(id_of(1)))
    # Not settled: that could overtake the request, and the host would take it for new.
    assert rig.to_host() == [Cancel(id_of(1))]
    assert rig.is_empty
    rig.host_says(REPLY)
    assert rig.to_agent() == []
    rig.agent(Cancel(id_of(1)))
    assert rig.to_host() == []


def test_its_time_is_up(rig: Rig) -> None:
    rig.agent(request(1, CALL, timeout_ms=1000))
    rig.to_host()
    assert rig.up.next_timeout() == rig.now_s + 1.0
    rig.wait(1.0)
    assert rig.to_agent() == [Returned(id_of(1), EXPIRED, "no answer in time")]
    assert rig.to_host() == [Cancel(id_of(1))]
    rig.settle(1)
    assert rig.to_host() == []  # likewise
    assert rig.is_empty


# -------------------------------------------------------------------- agents that come back


@pytest.mark.parametrize("heard", [True, False])
def test_an_agent_that_asks_again_is_told_what_it_missed(rig: Rig, heard: bool) -> None:
    rig.agent(request(1, CALL))
    rig.to_host()
    if heard:
        rig.host_says(REPLY)
    rig.detach(1)
    if not heard:
        rig.host_says(REPLY)
    rig.attach(2)
    rig.agent(request(1, CALL | REDELIVERED), key=2)
    assert rig.to_agent(2) == [REPLY]
    assert rig.to_host() == []
    rig.settle(1, key=2)
    assert rig.to_host() == [Settled((id_of(1),))]


def test_an_agent_that_asks_again_too_early_is_told_later(rig: Rig) -> None:
    rig.agent(request(1))
    rig.detach(1)
    rig.attach(2)
    rig.agent(request(1, REDELIVERED), key=2)
    assert rig.to_agent(2) == []
    rig.host_says(RECEIPT)
    assert rig.to_agent(2) == [RECEIPT]
    assert rig.to_host() == [request(1)]  # once


def test_an_agent_that_comes_back_before_its_old_connection_is_gone(rig: Rig) -> None:
    rig.agent(request(1))
    rig.attach(2)
    rig.agent(request(1, REDELIVERED), key=2)
    rig.detach(1)
    rig.host_says(RECEIPT)
    assert rig.to_agent(2) == [RECEIPT]


def test_agents_hear_of_their_own_alone(rig: Rig) -> None:
    rig.attach(2)
    rig.agent(request(1))
    rig.agent(request(2), key=2)
    rig.host_says(Receipt(id_of(2)))
    rig.host_says(RECEIPT)
    assert rig.to_agent(1) == [RECEIPT]
    assert rig.to_agent(2) == [Receipt(id_of(2))]


# -------------------------------------------------------------------- agents that do not


def test_calls_of_an_agent_that_is_gone_are_cancelled(rig: Rig) -> None:
    rig.agent(request(1, CALL))
    rig.to_host()
    rig.detach(1)
    assert rig.up.next_timeout() == rig.now_s + ORPHAN_S
    rig.wait(ORPHAN_S - 0.01)
    assert rig.to_host() == []
    rig.wait(0.01)
    assert rig.to_host() == [Cancel(id_of(1))]
    assert rig.is_empty
    assert rig.up.next_timeout() is None


def test_casts_of_an_agent_that_is_gone_go_all_the_same(rig: Rig) -> None:
    rig.agent(request(1))
    rig.to_host()
    rig.detach(1)
    rig.wait(ORPHAN_S)
    assert rig.to_host() == []
    rig.up.opened(rig.now_s)
    assert rig.to_host() == [request(1, REDELIVERED)]
    rig.host_says(RECEIPT)
    rig.wait(1.0)
    assert rig.to_host() == [Settled((id_of(1),))]
    assert rig.is_empty


def test_outcomes_nobody_asks_for_are_settled(rig: Rig) -> None:
    rig.agent(request(1, CALL))
    rig.host_says(REPLY)
    rig.to_host()
    rig.detach(1)
    rig.wait(ORPHAN_S)
    assert rig.to_host() == [Settled((id_of(1),))]
    assert rig.is_empty


def test_orphans_that_are_adopted_in_time_stay(rig: Rig) -> None:
    rig.agent(request(1, CALL))
    rig.to_host()
    rig.detach(1)
    rig.wait(ORPHAN_S / 2)
    rig.attach(2)
    rig.agent(request(1, CALL | REDELIVERED), key=2)
    rig.wait(ORPHAN_S)
    assert rig.to_host() == []
    rig.detach(2)
    rig.wait(ORPHAN_S)
    assert rig.to_host() == [Cancel(id_of(1))]


def test_each_orphan_has_its_own_time(rig: Rig) -> None:
    rig.attach(2)
    rig.agent(request(1, CALL), key=1)
    rig.agent(request(2, CALL), key=2)
    rig.to_host()
    rig.detach(1)
    rig.wait(10.0)
    rig.detach(2)
    rig.wait(ORPHAN_S - 10.0)
    assert rig.to_host() == [Cancel(id_of(1))]
    rig.wait(10.0)
    assert rig.to_host() == [Cancel(id_of(2))]


# -------------------------------------------------------------------- limits


@pytest.mark.parametrize(("flags", "reason"), [(0, BUSY), (REDELIVERED, AGENT_GONE)])
def test_so_many_requests_may_be_open(rig: Rig, flags: int, reason: int) -> None:
    for number in range(UPWARD_MAX):
        rig.agent(request(number))
    rig.to_host()
    rig.agent(request(UPWARD_MAX, flags))
    (returned,) = rig.to_agent()
    assert returned == Returned(id_of(UPWARD_MAX), reason, returned.text)
    assert "UPWARD_MAX" in returned.text
    assert rig.to_host() == []
    assert rig.up.summary() == {
        "sent_up": UPWARD_MAX,
        "refused_up": 1,
        "open_up": UPWARD_MAX,
    }
    rig.host_says(RECEIPT)
    rig.settle(1)
    rig.agent(request(UPWARD_MAX))
    assert request(UPWARD_MAX) in rig.to_host()


def test_their_bodies_have_a_limit(rig: Rig) -> None:
    rig.agent(request(1, body=b"x" * UPWARD_BYTES_MAX))
    rig.agent(request(2, body=b"x"))
    assert rig.to_agent()[0].reason == BUSY
    rig.host_says(RECEIPT)
    rig.agent(request(2, body=b"x"))
    assert rig.to_agent() == [RECEIPT]


def test_a_request_that_the_host_does_not_take(rig: Rig) -> None:
    rig.host_takes = 1000
    rig.agent(request(1, body=b"x" * 1000))
    assert rig.to_agent()[0].reason == REFUSED
    assert rig.is_empty


def test_a_request_that_the_next_host_does_not_take(rig: Rig) -> None:
    rig.agent(request(1, body=b"x" * 1000))
    rig.host_takes = 1000
    rig.up.opened(rig.now_s)
    rig.wait(0.0)
    returned = rig.to_agent()[0]
    assert returned.reason == AGENT_GONE  # the host before took it
    assert returned.text.endswith("(MESSAGE_BYTES_MAX); it may have run before")
    rig.settle(1)
    assert rig.is_empty


def test_an_answer_that_the_agent_does_not_take(rig: Rig) -> None:
    rig.agents_take = 1000
    rig.agent(request(1, CALL))
    rig.host_says(Reply(id_of(1), FINAL, b"x" * 1000))
    assert rig.to_agent()[0].reason == EXPIRED


def test_answers_that_are_kept_have_a_limit(rig: Rig) -> None:
    """The agent has been told; it may have missed it, and then hears that it is too late."""
    size = UPWARD_BYTES_MAX // 4
    for number in range(6):
        rig.agent(request(number, CALL))
    for number in range(6):
        rig.host_says(Reply(id_of(number), FINAL, b"x" * size))
        assert rig.up._bytes <= UPWARD_BYTES_MAX
    assert len(rig.to_agent()) == 6
    for number in range(6):
        rig.agent(request(number, CALL | REDELIVERED))
    again = rig.to_agent()
    assert [isinstance(message, Reply) for message in again] == [False] * 2 + [True] * 4
    assert again[0] == Returned(id_of(0), EXPIRED, again[0].text)
    rig.agent(request(6, body=b"x"))  # and they make room for what is new
    assert rig.to_agent() == []
    rig.host_says(Receipt(id_of(6)))
    rig.settle(*range(7))
    assert rig.is_empty


# -------------------------------------------------------------------- everything at once


@given(st.data())
def test_nothing_is_lost_and_nothing_is_left(data: st.DataObject) -> None:
    """An agent that comes and goes, hosts that come and go: it hears everything, once settled it
    is over, and the tables are empty in the end."""
    rig = Rig()
    key, is_there, asked = 1, True, 0
    unheard: dict[int, int] = {}
    at_host: dict[bytes, Request] = {}

    def pass_on() -> None:
        for message in rig.to_host():
            match message:
                case Request():
                    assert message.id not in at_host or message.flags & REDELIVERED
                    at_host[message.id] = message
                case Settled(ids):
                    for one in ids:
                        assert int.from_bytes(one, "big") not in unheard
                case _:
                    assert isinstance(message, Cancel)
        if is_there:
            for message in rig.to_agent(key):
                number = int.from_bytes(message.id, "big")
                unheard.pop(number, None)
                rig.settle(number, key=key)

    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["ask", "answer", "agent", "session", "wait"])):
            case "ask" if is_there:
                asked += 1
                unheard[asked] = data.draw(st.sampled_from([0, CALL]))
                rig.agent(request(asked, unheard[asked]), key)
            case "answer" if at_host:
                one = at_host.pop(data.draw(st.sampled_from(sorted(at_host))))
                rig.host_says(Reply(one.id, FINAL, b"1") if one.is_call else Receipt(one.id))
            case "agent":
                is_there = not is_there
                if not is_there:
                    rig.to_agent(key)  # never read
                    rig.detach(key)
                else:
                    key += 1
                    rig.attach(key)
                    for number, flags in unheard.items():
                        rig.agent(request(number, flags | REDELIVERED), key)
            case "session":
                at_host.clear()
                rig.to_host()
                rig.up.opened(rig.now_s)
            case _:
                rig.wait(0.5)
        pass_on()
    if not is_there:
        is_there = True
        key += 1
        rig.attach(key)
        for number, flags in unheard.items():
            rig.agent(request(number, flags | REDELIVERED), key)
        pass_on()
    while at_host:
        one = at_host.pop(sorted(at_host)[0])
        rig.host_says(Reply(one.id, FINAL, b"1") if one.is_call else Receipt(one.id))
        pass_on()
    rig.wait(ORPHAN_S)
    pass_on()
    assert not unheard
    assert rig.is_empty
