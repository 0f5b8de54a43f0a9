"""The guest's router: which agent gets a request, and what the host is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from vchan.errors import LimitExceeded, Rejected
from vchan.guest.router import (
    AGENTS_MAX,
    DOUBT_MARGIN_S,
    OWN_TOPIC,
    Method,
    Router,
)
from vchan.rpc.bodies import REDELIVERED_KEY, encode_invocation
from vchan.rpc.deferred import Later
from vchan.rpc.dispatcher import HOLDING_MAX, LINGER_S, RESTART_GRACE_S
from vchan.rpc.in_flight import REQUESTS_MAX
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    FAILURE,
    FANOUT,
    FINAL,
    GUEST_TOPIC,
    IDS_MAX,
    IN_PLACE,
    LOCAL,
    NO_AGENT,
    OUT_OF_TURN,
    REDELIVERED,
    REFUSED,
    TOPICS_MAX,
    Cancel,
    Holding,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    charge,
    decode,
    encode,
)

A, B = Topic("nova", "a"), Topic("nova", "b")
TOO_LARGE = 2000
"""For the host. An agent takes half."""


def forbid(_: Mapping[str, Any]) -> Any:
    raise ValueError("not that")


def refuse(_: Mapping[str, Any]) -> Any:
    raise Rejected("the owner does not allow it")


class Rig:
    """A router between a host and agents that are lists of messages."""

    def __init__(self, *, grace: bool = False) -> None:
        self.now_s = 1000.0
        self._host: list[Any] = []
        self._agents: dict[int, list[Any]] = {}
        self.later = Later()
        methods: dict[str, Method] = {
            "ping": dict,
            "set": lambda args: {1},
            "forbid": forbid,
            "refuse": refuse,
            "later": lambda _: self.later,
        }
        self.router = Router(
            lambda data, _: self._to_host(data),
            methods,
            self.now_s,
            flush=lambda: self._host.append("flushed"),
        )
        if not grace:
            self.wait(RESTART_GRACE_S)
        self.router.host_opened(resumed=False, now_s=0.0)
        self._host.clear()

    def _to_host(self, data: bytes) -> None:
        if len(data) > TOO_LARGE:
            raise LimitExceeded("message", len(data), TOO_LARGE, "MESSAGE_BYTES_MAX")
        self._host.append(decode(data))

    def _to_agent(self, key: int, data: bytes) -> None:
        if len(data) > TOO_LARGE // 2:
            raise LimitExceeded("message", len(data), TOO_LARGE // 2, "MESSAGE_BYTES_MAX")
        self._agents[key].append(decode(data))

    def host(self) -> list[Any]:
        """What the host was told since the last time."""
        told = self._host[:]
        self._host.clear()
        return told

    def given(self, key: int) -> list[Any]:
        """What an agent was told since the last time."""
        told = self._agents[key][:]
        self._agents[key].clear()
        return told

    def ids(self, key: int) -> list[int]:
        """The requests an agent was given since the last time, by number."""
        return [
            int.from_bytes(message.id)
            for message in self.given(key)
            if isinstance(message, Request)
        ]

    def attach(self, key: int, *topics: Topic, holding: tuple[int, ...] = ()) -> None:
        self._agents[key] = []
        self.router.attach(key, lambda data, _: self._to_agent(key, data), self.now_s)
        if holding:
            self.say(key, Holding(tuple(map(identity, holding))))
        if topics:
            self.say(key, Subscribe(topics))

    def say(self, key: int, message: Any) -> None:
        """An agent says something that is no reason to drop it."""
        assert self.hear(key, message) == ""

    def hear(self, key: int, message: Any) -> str:
        return self.router.agent_receive(key, encode(message), self.now_s)

    def detach(self, key: int) -> None:
        self.router.detach(key, self.now_s)

    def ask(self, *requests: Request) -> None:
        for request in requests:
            self.tell(request)

    def tell(self, message: Any) -> None:
        self.router.host_receive(encode(message), self.now_s)

    def wait(self, for_s: float) -> None:
        self.now_s += for_s
        self.router.handle_timeout(self.now_s)


def identity(number: int) -> bytes:
    return number.to_bytes(16)


def cast(number: int, topic: Topic = A, **fields: Any) -> Request:
    request = Request(identity(number), 0, 0, 0, topic.exchange, topic.name, "vm", b"{}")
    return request.changed(**fields)


def call(number: int, topic: Topic = A, **fields: Any) -> Request:
    return cast(number, topic, **{"flags": CALL, "timeout_ms": 60_000, **fields})


def answer(number: int, body: bytes = b"42", flags: int = FINAL) -> Reply:
    return Reply(identity(number), flags, body)


@pytest.fixture
def rig() -> Rig:
    """Two agents on one topic."""
    rig = Rig()
    rig.attach(1, A)
    rig.attach(2, A)
    rig.host()
    return rig


# -------------------------------------------------------------------- there and back


def test_casts_and_calls_go_there_and_back(rig: Rig) -> None:
    rig.ask(cast(1), call(2))
    assert (rig.ids(1), rig.ids(2)) == ([1], [2])
    rig.say(2, answer(2, flags=0))
    rig.say(2, answer(2))
    rig.say(1, Receipt(identity(1)))
    assert rig.host() == [answer(2, b"", 0), answer(2), Receipt(identity(1))]
    assert rig.router.summary() == {
        "agents": 2,
        "topics": ["nova/a"],
        "running": 0,
        "repeats": 0,
        "waiting": 0,
        "sent_up": 0,
        "refused_up": 0,
        "open_up": 0,
    }


def test_agents_take_turns(rig: Rig) -> None:
    rig.ask(*map(cast, range(1, 6)))
    assert (rig.ids(1), rig.ids(2)) == ([1, 3, 5], [2, 4])


def test_a_copy_is_not_given_again(rig: Rig) -> None:
    rig.ask(cast(1), cast(1, flags=REDELIVERED))
    assert (rig.ids(1), rig.ids(2)) == ([1], [])
    rig.say(1, Receipt(identity(1)))
    rig.ask(cast(1, flags=REDELIVERED))
    assert rig.host() == [Receipt(identity(1))] * 2


def test_what_an_agent_hands_back_is_handed_back(rig: Rig) -> None:
    rig.ask(call(1))
    rig.say(1, Returned(identity(1), BUSY, "busy"))
    assert rig.host() == [Returned(identity(1), BUSY, "busy")]


def test_an_answer_that_is_too_large_is_a_failure(rig: Rig) -> None:
    rig.ask(call(1))
    rig.say(1, answer(1, b"x" * TOO_LARGE))
    (reply,) = rig.host()
    assert reply.flags == FINAL | FAILURE
    assert json.loads(reply.body)["class"] == "LimitExceeded"


def test_a_request_that_is_too_large_for_its_agent_is_refused(rig: Rig) -> None:
    rig.ask(call(1, body=b"x" * (TOO_LARGE // 2)))
    (returned,) = rig.host()
    assert (returned.id, returned.reason) == (identity(1), REFUSED)
    assert "MESSAGE_BYTES_MAX" in returned.text
    rig.ask(cast(2, flags=FANOUT, body=b"x" * (TOO_LARGE // 2)))
    assert [message.reason for message in rig.host()] == [REFUSED]  # by both, told once


def test_settled_ids_are_settled_everywhere(rig: Rig) -> None:
    rig.tell(Settled((identity(1),)))
    assert rig.given(1) == rig.given(2) == [Settled((identity(1),))]


def test_what_nobody_waits_for_is_cancelled_where_it_is(rig: Rig) -> None:
    rig.ask(call(1), call(2, timeout_ms=500))
    rig.given(1), rig.given(2)
    rig.tell(Cancel(identity(1)))
    rig.tell(Cancel(identity(1)))
    assert rig.given(1) == [Cancel(identity(1))]
    assert rig.router.next_timeout() == rig.now_s + 0.5
    rig.wait(0.5)
    assert rig.given(2) == [Cancel(identity(2))]
    rig.say(2, answer(2))
    assert rig.host() == []


def test_old_ids_are_forgotten_in_time(rig: Rig) -> None:
    rig.ask(cast(1))
    rig.say(1, Receipt(identity(1)))
    rig.wait(3601.0)
    assert rig.router.next_timeout() is None


# -------------------------------------------------------------------- fanout


def test_a_fanout_goes_to_all_and_is_taken_when_all_have_it(rig: Rig) -> None:
    rig.ask(cast(1, flags=FANOUT))
    assert (rig.ids(1), rig.ids(2)) == ([1], [1])
    rig.say(1, Receipt(identity(1)))
    assert rig.host() == []
    rig.say(2, Receipt(identity(1)))
    assert rig.host() == [Receipt(identity(1))]


@pytest.mark.parametrize("first", [1, 2])
def test_a_fanout_that_one_agent_took_and_another_left_is_taken(rig: Rig, first: int) -> None:
    rig.ask(cast(1, flags=FANOUT))
    rig.say(first, Receipt(identity(1)))
    rig.detach(3 - first)
    assert rig.host() == [Receipt(identity(1))]


def test_a_fanout_that_one_agent_left_is_still_with_the_other(rig: Rig) -> None:
    rig.ask(cast(1, flags=FANOUT))
    rig.detach(1)
    assert rig.host() == []
    rig.say(2, Receipt(identity(1)))
    assert rig.host() == [Receipt(identity(1))]


def test_a_fanout_that_one_agent_hands_back_comes_again(rig: Rig) -> None:
    rig.ask(cast(1, flags=FANOUT))
    rig.say(1, Receipt(identity(1)))
    rig.say(2, Returned(identity(1), BUSY, "busy"))
    assert rig.host() == [Returned(identity(1), BUSY, "busy")]
    rig.ask(cast(1, flags=FANOUT | REDELIVERED))
    rig.detach(1)
    rig.detach(2)
    assert rig.host() == []  # neither has it: it waits
    assert rig.router.summary()["waiting"] == 1


def test_a_cancelled_fanout_is_cancelled_with_all(rig: Rig) -> None:
    rig.ask(cast(1, flags=FANOUT))
    rig.say(1, Receipt(identity(1)))
    rig.given(1), rig.given(2)
    rig.tell(Cancel(identity(1)))
    assert rig.given(1) == []
    assert rig.given(2) == [Cancel(identity(1))]
    rig.say(2, Receipt(identity(1)))
    assert rig.host() == []


# -------------------------------------------------------------------- nobody serves it


def test_a_call_nobody_serves_is_handed_back(rig: Rig) -> None:
    rig.ask(call(2, B, flags=CALL | REDELIVERED), call(1, B))
    second, first = rig.host()
    assert (first.id, first.reason) == (identity(1), NO_AGENT)
    assert (second.id, second.reason) == (identity(2), AGENT_GONE)
    rig.attach(3, B)
    rig.host()
    rig.ask(call(1, B), call(2, B))  # the same again: they are over, whoever serves it now
    assert (rig.host(), rig.ids(3)) == ([first, second], [])


def test_a_cast_nobody_serves_waits_if_it_has_time(rig: Rig) -> None:
    rig.ask(cast(1, B), cast(2, B, timeout_ms=1000))
    assert [message.id for message in rig.host()] == [identity(2)]
    rig.attach(3, B)
    assert rig.ids(3) == [1]


def test_what_waits_can_be_cancelled(rig: Rig) -> None:
    rig.ask(cast(1, B), cast(2, B))
    rig.tell(Cancel(identity(2)))
    assert rig.router.summary()["waiting"] == 1
    rig.ask(cast(3))
    rig.tell(Cancel(identity(3)))  # with an agent: it waits nowhere
    assert rig.router.summary()["waiting"] == 1
    rig.tell(Cancel(identity(1)))
    assert rig.router.summary()["waiting"] == 0
    rig.attach(3, B)
    assert rig.ids(3) == []


# -------------------------------------------------------------------- agents come and go


def test_the_host_is_told_what_is_served_when_it_changes() -> None:
    rig = Rig()
    rig.attach(1, B, A)
    rig.attach(2, A)
    assert rig.host() == [Subscribe((A, B))]
    rig.say(1, Subscribe((A,)))
    rig.wait(LINGER_S / 2)
    assert rig.host() == []
    rig.wait(LINGER_S / 2)
    assert rig.host() == [Subscribe((A,))]
    rig.router.host_opened(resumed=True, now_s=0.0)
    assert rig.host() == []
    rig.router.host_opened(resumed=False, now_s=0.0)
    assert rig.host() == [Subscribe((A,))]


def test_casts_of_an_agent_that_left_go_to_the_next_in_their_order() -> None:
    rig = Rig()
    rig.attach(1, A)
    rig.ask(cast(1), cast(2), cast(3))
    rig.say(1, Receipt(identity(1)))
    rig.host()
    rig.detach(1)
    rig.ask(cast(4), cast(5, timeout_ms=4000))
    assert rig.router.next_timeout() is not None
    rig.now_s += 1.0
    rig.attach(2, A)
    given = rig.given(2)
    assert [int.from_bytes(request.id) for request in given] == [2, 3, 4, 5]
    assert given[-1].timeout_ms == 3000
    assert rig.host() == []


def test_a_cast_of_an_agent_that_left_is_given_on_with_the_time_that_is_left(rig: Rig) -> None:
    rig.ask(cast(1, timeout_ms=4000))
    rig.now_s += 1.0
    rig.detach(1)
    given = [said for said in rig.given(2) if isinstance(said, Request)]
    assert [request.timeout_ms for request in given] == [3000]


def test_casts_of_an_agent_that_left_go_to_the_others_at_once(rig: Rig) -> None:
    rig.ask(cast(1), cast(2), cast(3))
    rig.ids(2)
    rig.detach(1)
    assert rig.ids(2) == [1, 3]


def test_calls_of_an_agent_that_left_fail(rig: Rig) -> None:
    rig.ask(call(1))
    rig.detach(1)
    (returned,) = rig.host()
    assert (returned.id, returned.reason) == (identity(1), AGENT_GONE)


def test_what_waits_when_a_topic_is_given_up() -> None:
    rig = Rig()
    rig.attach(1, A)
    rig.detach(1)
    rig.host()
    rig.ask(call(3, flags=CALL | REDELIVERED), cast(1), call(2))
    rig.wait(LINGER_S)
    *returned, told = rig.host()
    assert told == Subscribe(())
    assert [(message.id, message.reason) for message in returned] == [
        (identity(3), AGENT_GONE),
        (identity(2), NO_AGENT),
    ]
    assert rig.router.summary()["waiting"] == 1  # the cast


def test_a_topic_that_is_given_up_with_calls_alone_waiting() -> None:
    rig = Rig()
    rig.attach(1, A)
    rig.detach(1)
    rig.ask(call(1))
    rig.wait(LINGER_S)
    assert rig.router.summary()["waiting"] == 0


def test_an_agent_may_name_a_topic_twice() -> None:
    rig = Rig()
    rig.attach(1, A, A)
    rig.ask(cast(1, flags=FANOUT))
    assert rig.ids(1) == [1]
    rig.say(1, Subscribe((A,)))
    rig.detach(1)
    rig.ask(cast(2))  # nobody is left
    assert rig.router.summary()["waiting"] == 2
    rig.attach(2, A)
    assert rig.ids(2) == [1, 2]


# -------------------------------------------------------------------- after this daemon's restart


def test_after_a_restart_what_came_before_waits_for_who_holds_it() -> None:
    rig = Rig(grace=True)
    rig.ask(cast(1, flags=REDELIVERED), call(2, flags=CALL | REDELIVERED), cast(3))
    assert rig.host() == []
    rig.attach(1, A)
    assert rig.ids(1) == []  # it holds nothing: perhaps the next one does
    rig.attach(2, A, holding=(1, 2))
    assert rig.ids(2) == [1, 2]
    assert rig.ids(1) == [3]  # nobody can have had it, and what it waited behind is gone
    assert rig.router.summary()["waiting"] == 0


def test_after_a_restart_what_is_fresh_goes_to_the_first_agent_that_comes() -> None:
    rig = Rig(grace=True)
    rig.ask(call(1), cast(2))
    rig.attach(1, A)
    assert rig.ids(1) == [1, 2]


def test_after_a_restart_what_is_fresh_waits_behind_what_an_agent_may_hold() -> None:
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.ask(cast(1, flags=REDELIVERED), cast(2))
    assert rig.ids(1) == []
    rig.wait(RESTART_GRACE_S)
    assert rig.ids(1) == [1, 2]


def test_after_a_restart_the_casts_of_an_agent_that_leaves_go_to_the_next() -> None:
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.ask(cast(1))
    assert rig.ids(1) == [1]
    rig.attach(2, A)
    rig.detach(1)
    assert rig.ids(2) == [1]


def test_after_a_restart_nothing_is_given_up_before_the_agents_are_back() -> None:
    rig = Rig(grace=True)
    rig.router.host_opened(resumed=False, now_s=0.0)
    rig.ask(call(1))
    assert rig.host() == []
    assert rig.router.next_timeout() == rig.now_s + RESTART_GRACE_S
    rig.wait(RESTART_GRACE_S)
    told, returned = rig.host()
    assert told == Subscribe(())
    assert returned.reason == NO_AGENT


def test_during_the_grace_what_is_held_goes_straight_to_its_holder() -> None:
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.attach(2, A, holding=(1,))
    rig.ask(cast(1, flags=REDELIVERED), cast(3, flags=REDELIVERED))
    assert (rig.ids(1), rig.ids(2)) == ([], [1])
    rig.attach(3, A, holding=(3,))
    assert rig.ids(3) == [3]
    rig.ask(cast(4))  # nothing is waiting any more
    assert rig.ids(1) == [4]


def test_a_fanout_during_the_grace_waits_for_all_agents() -> None:
    rig = Rig(grace=True)
    rig.attach(1, A, holding=(1,))
    rig.ask(cast(1, flags=FANOUT | REDELIVERED), cast(2))
    rig.attach(2, A)
    assert rig.ids(1) == rig.ids(2) == []
    rig.wait(RESTART_GRACE_S)
    assert rig.ids(2) == [1]
    assert rig.ids(1) == [1, 2]


def test_who_holds_an_id_is_forgotten_when_it_is_settled_or_the_agent_leaves(rig: Rig) -> None:
    rig.attach(3, A, holding=(1, 2, 3))
    rig.attach(4, A, holding=(2,))  # says so later: believed
    rig.tell(Settled((identity(1),)))
    rig.detach(3)
    rig.ask(cast(2, flags=REDELIVERED))
    assert rig.ids(4) == [2]
    rig.ask(cast(3, flags=REDELIVERED))
    assert rig.ids(1) == [3]


# -------------------------------------------------------------------- the daemon's own topic


@pytest.mark.parametrize(
    ("body", "failed", "expected"),
    [
        (encode_invocation("ping", {}), False, {}),
        (encode_invocation("nonsense", {}), True, "NoSuchMethod"),
        (encode_invocation("set", {}), True, "TypeError"),
        (encode_invocation("forbid", {}), True, "ValueError"),
        (encode_invocation("refuse", {}), True, "Rejected"),
        (b"nonsense", True, "BadBody"),
        (b'{"method":"ping","version":2}', True, "BadBody"),
        (b'{"method":"ping","namespace":[]}', True, "BadBody"),
    ],
)
def test_the_daemon_answers_itself(rig: Rig, body: bytes, failed: bool, expected: Any) -> None:
    rig.ask(call(1, Topic("any", OWN_TOPIC), body=body))
    (reply,) = rig.host()
    assert bool(reply.flags & FAILURE) == failed
    value = json.loads(reply.body)
    assert (value["class"] if failed else value) == expected


def test_the_daemon_takes_casts_itself(rig: Rig) -> None:
    rig.ask(cast(1, Topic("any", OWN_TOPIC), body=encode_invocation("ping", {})))
    assert rig.host() == [Receipt(identity(1)), "flushed"]


@pytest.mark.parametrize(
    ("result", "failed", "expected"),
    [({"a": 1}, False, {"a": 1}), (Rejected("no"), True, "Rejected"), ({1}, True, "TypeError")],
)
@pytest.mark.parametrize("early", [True, False])
def test_the_daemon_answers_later(
    rig: Rig, early: bool, result: Any, failed: bool, expected: Any
) -> None:
    if early:
        rig.later.answer(result, rig.now_s)
    rig.ask(call(1, Topic("any", OWN_TOPIC), body=encode_invocation("later", {})))
    if not early:
        assert rig.host() == []
        rig.later.answer(result, rig.now_s)
    (reply,) = rig.host()
    assert bool(reply.flags & FAILURE) == failed
    value = json.loads(reply.body)
    assert (value["class"] if failed else value) == expected


def test_an_answer_that_nobody_waits_for_any_more(rig: Rig) -> None:
    rig.ask(call(1, Topic("any", OWN_TOPIC), body=encode_invocation("later", {})))
    rig.tell(Cancel(identity(1)))
    rig.later.answer({}, rig.now_s)
    assert rig.host() == []


def test_a_cast_of_what_is_answered_later_is_taken_at_once(rig: Rig) -> None:
    rig.ask(cast(1, Topic("any", OWN_TOPIC), body=encode_invocation("later", {})))
    assert rig.host() == [Receipt(identity(1)), "flushed"]
    rig.later.answer({}, rig.now_s)
    assert rig.host() == []


def announced(rig: Rig) -> list[tuple[Topic, ...]]:
    return [message.topics for message in rig.host() if isinstance(message, Subscribe)]


def test_our_own_topic_is_announced_with_those_of_agents() -> None:
    rig = Rig(grace=True)
    ours = GUEST_TOPIC
    rig.router.announce_own_topic()
    assert announced(rig) == []  # an agent may be about to come back: a list without it would lie
    rig.attach(1)
    rig.hear(1, Subscribe((A,)))
    assert announced(rig) == [tuple(sorted((A, ours)))]
    rig.wait(RESTART_GRACE_S)
    assert announced(rig) == []
    rig.router.host_opened(resumed=False, now_s=rig.now_s)
    assert announced(rig) == [tuple(sorted((A, ours)))]


def test_our_own_topic_gives_way_to_those_of_agents() -> None:
    rig = Rig()
    rig.router.announce_own_topic()
    assert announced(rig) == [(GUEST_TOPIC,)]
    rig.attach(1)
    topics = tuple(Topic("x", f"t{number:02}") for number in range(TOPICS_MAX))
    assert rig.hear(1, Subscribe(topics)) == ""
    assert announced(rig) == [topics]


# -------------------------------------------------------------------- limits and nonsense


def test_agents_are_bounded() -> None:
    rig = Rig()
    for key in range(AGENTS_MAX):
        assert rig.router.has_room
        rig.attach(key)
    assert not rig.router.has_room


def test_topics_are_bounded(rig: Rig) -> None:
    many = tuple(Topic("x", f"t{number}") for number in range(TOPICS_MAX))
    assert "TOPICS_MAX" in rig.hear(1, Subscribe(many))
    assert rig.host() == []
    assert rig.hear(1, Subscribe(many[1:])) == ""


def test_held_ids_are_bounded(rig: Rig) -> None:
    ids = [identity(number) for number in range(HOLDING_MAX + 1)]
    for at in range(0, HOLDING_MAX - IDS_MAX, IDS_MAX):
        rig.say(1, Holding(tuple(ids[at : at + IDS_MAX])))
    assert "HOLDING_MAX" in rig.hear(1, Holding(tuple(ids[-IDS_MAX:])))


def test_nonsense(rig: Rig) -> None:
    rig.router.host_receive(b"\x01nonsense", rig.now_s)
    assert rig.router.agent_receive(1, b"\x01nonsense", rig.now_s) != ""
    assert rig.router.bad_messages == 2
    rig.say(1, Receipt(identity(1)))  # of what it was never given
    rig.tell(Receipt(identity(1)))
    assert rig.host() == []


def test_kinds_of_a_later_version_are_passed_over(rig: Rig) -> None:
    rig.router.host_receive(b"later", rig.now_s)
    assert rig.router.agent_receive(1, b"later", rig.now_s) == ""
    assert rig.router.bad_messages == 2


def test_topics_that_linger_make_room_for_those_that_are_served(rig: Rig) -> None:
    """An agent that changed its topics in a loop made a Subscribe that no message could hold."""
    for lot in range(3):
        served = tuple(Topic("x", f"t{lot}-{number}") for number in range(TOPICS_MAX - 8))
        assert rig.hear(1, Subscribe(served)) == ""
    told = [message for message in rig.host() if isinstance(message, Subscribe)]
    assert told and all(len(message.topics) <= TOPICS_MAX for message in told)
    assert set(served) <= set(told[-1].topics)


def test_an_answer_of_our_own_that_is_too_large_is_a_failure(rig: Rig) -> None:
    question = encode_invocation("ping", {"x": "y" * TOO_LARGE})
    rig.ask(call(1, Topic("x", OWN_TOPIC), body=question))
    (reply,) = rig.host()
    assert reply.flags & FAILURE
    assert b"MESSAGE_BYTES_MAX" in reply.body


# -------------------------------------------------------------------- in doubt

AGAIN = REDELIVERED
BODY, INFO = encode_invocation("m", {}), encode_invocation("ping", {})
"""What the broker hands out again, and the host passes on as it came."""
MINUTE_MS = 60_000


def is_marked(request: Any) -> bool:
    return json.loads(request.body)["context"].get(REDELIVERED_KEY) is True


def test_a_call_that_an_earlier_run_may_have_passed_on_does_not_run() -> None:
    """Neither this daemon nor an agent knows it: they may have lost their memory together."""
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.host()
    rig.ask(call(1, flags=CALL | AGAIN, timeout_ms=MINUTE_MS))
    rig.wait(RESTART_GRACE_S)
    (returned,) = [said for said in rig.host() if isinstance(said, Returned)]
    assert (returned.id, returned.reason) == (identity(1), AGENT_GONE)
    assert "may have run" in returned.text
    assert rig.ids(1) == []
    rig.ask(call(1, flags=CALL | AGAIN, timeout_ms=MINUTE_MS))
    assert rig.host() == [returned]
    rig.ask(call(2, flags=CALL | AGAIN, timeout_ms=MINUTE_MS))  # the grace is over
    assert [said.id for said in rig.host()] == [identity(2)]
    assert rig.ids(1) == []


def test_a_call_of_the_daemons_own_that_an_earlier_run_may_have_answered_does_not_run() -> None:
    rig = Rig(grace=True)
    own = GUEST_TOPIC
    rig.ask(call(1, own, flags=CALL | AGAIN, timeout_ms=MINUTE_MS, body=INFO))
    (returned,) = rig.host()
    assert (returned.id, returned.reason) == (identity(1), AGENT_GONE)


@pytest.mark.parametrize("flags", [0, FANOUT])
def test_a_cast_that_may_run_a_second_time_is_told_so(flags: int) -> None:
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.ask(cast(1, flags=flags | AGAIN, body=BODY))
    rig.wait(RESTART_GRACE_S)
    (request,) = rig.given(1)
    assert is_marked(request)
    rig.ask(cast(2, flags=flags, body=BODY))
    (request,) = [said for said in rig.given(1) if isinstance(said, Request)]
    assert not is_marked(request)
    rig.ask(cast(3, flags=flags | AGAIN, body=BODY))  # handed out after the one before, and so here
    (request,) = rig.given(1)
    assert not is_marked(request)


def test_a_body_that_is_none_is_given_as_it_is() -> None:
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.ask(cast(1, flags=AGAIN, body=b"nonsense"))
    rig.wait(RESTART_GRACE_S)
    assert rig.given(1)[0].body == b"nonsense"


@pytest.mark.parametrize(
    ("first", "is_known"),
    [
        (call(1), True),
        (cast(1), True),
        (cast(1, flags=FANOUT), False),  # another queue
        (call(1, B), False),
        (call(1, flags=CALL | LOCAL), False),  # a local program's
        (call(1, flags=CALL | OUT_OF_TURN), False),
        (call(1, flags=CALL | AGAIN), False),
    ],
)
def test_after_the_first_fresh_request_of_a_queue_nothing_is_older_than_the_daemon(
    first: Request, is_known: bool
) -> None:
    rig = Rig(grace=True)
    rig.attach(1, A, B)
    rig.wait(RESTART_GRACE_S)
    rig.ask(first)
    rig.ask(call(2, flags=CALL | AGAIN, timeout_ms=MINUTE_MS))
    assert (2 in rig.ids(1)) is is_known


def test_what_waits_when_the_first_fresh_request_comes_stays_in_doubt() -> None:
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.ask(call(1, flags=CALL | AGAIN, timeout_ms=MINUTE_MS), call(2))
    rig.wait(RESTART_GRACE_S)
    assert rig.ids(1) == [2]


def test_a_daemon_older_than_a_calls_whole_time_was_there_when_it_was_made() -> None:
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.wait(RESTART_GRACE_S)
    rig.wait(5.0 + DOUBT_MARGIN_S)
    rig.ask(call(1, flags=CALL | AGAIN, timeout_ms=5000))
    rig.ask(call(2, flags=CALL | AGAIN, timeout_ms=20_000))
    rig.ask(call(3, flags=CALL | AGAIN | OUT_OF_TURN, timeout_ms=1))  # it had more
    assert rig.ids(1) == [1]


def test_what_is_late_and_in_its_place_is_behind_the_first_fresh_request() -> None:
    """Its place says that the daemon has been there; the time it has left says nothing."""
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.wait(RESTART_GRACE_S + 1.0 + DOUBT_MARGIN_S)
    late = CALL | AGAIN | OUT_OF_TURN | IN_PLACE
    rig.ask(call(1, flags=late, timeout_ms=1))
    rig.ask(call(2))
    rig.ask(call(3, flags=late, timeout_ms=MINUTE_MS))
    rig.ask(call(4, flags=late & ~IN_PLACE))
    assert rig.ids(1) == [2, 3]


def test_what_an_agent_holds_is_not_in_doubt() -> None:
    rig = Rig(grace=True)
    rig.ask(call(1, flags=CALL | AGAIN, timeout_ms=MINUTE_MS), cast(2, flags=AGAIN, body=BODY))
    rig.attach(1)
    rig.say(1, Holding((identity(1), identity(2))))
    rig.say(1, Subscribe((A,)))
    call_, cast_ = [said for said in rig.given(1) if isinstance(said, Request)]
    assert (call_.id, is_marked(cast_)) == (identity(1), False)


@pytest.mark.parametrize("is_held", [False, True])
def test_a_cast_stays_in_doubt_until_somebody_has_taken_it(is_held: bool) -> None:
    """Who was given it may die before: its next agent is told so, too, and one that held it has
    perhaps run it."""
    rig = Rig(grace=True)
    rig.attach(1, A, holding=(1,) if is_held else ())
    rig.ask(cast(1, flags=AGAIN, body=BODY))
    rig.wait(RESTART_GRACE_S)
    (request,) = [said for said in rig.given(1) if isinstance(said, Request)]
    assert is_marked(request) is not is_held
    rig.detach(1)
    rig.attach(2, A)
    (request,) = rig.given(2)
    assert is_marked(request)
    rig.say(2, Receipt(identity(1)))
    assert rig.router._doubtful == {}


def charges(rig: Rig, key: int) -> Any:
    """What this agent was told last that it alone has."""
    told = [said.ids for said in rig.given(key) if isinstance(said, Holding)]
    return told[-1] if told else None


def test_an_agent_that_alone_had_everything_says_so_to_the_next_daemon() -> None:
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.ask(call(1))
    told = charges(rig, 1)
    assert told == (charge(("a", 0)),)
    rig = Rig(grace=True)  # the next run
    rig.ask(call(2, flags=CALL | AGAIN | OUT_OF_TURN), cast(3, flags=AGAIN | FANOUT, body=BODY))
    rig.attach(1)
    rig.say(1, Holding(told))
    rig.say(1, Subscribe((A,)))
    assert charges(rig, 1) is None  # it says so to the one after it, too
    rig.wait(RESTART_GRACE_S)
    given = [said for said in rig.given(1) if isinstance(said, Request)]
    assert [(said.id, bool(said.flags & FANOUT)) for said in given] == [
        (identity(2), False),
        (identity(3), True),
    ]
    assert is_marked(given[1])  # of fanouts it said nothing
    rig.detach(1)
    rig.attach(2, A)
    rig.host()
    rig.ask(call(4, flags=CALL | AGAIN | OUT_OF_TURN))  # who said so is gone
    assert [said.reason for said in rig.host()] == [AGENT_GONE]


def test_a_charge_that_is_not_true_any_more_is_taken_back() -> None:
    """Before this daemon has said any itself."""
    rig = Rig(grace=True)
    rig.attach(1)
    rig.say(1, Holding((charge(("a", 0)), identity(7))))
    rig.attach(2, A)
    rig.say(1, Subscribe((A,)))
    assert charges(rig, 1) == ()


def test_an_agent_is_not_charged_alone_with_what_another_serves_or_had() -> None:
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.ask(call(1))
    assert charges(rig, 1) == (charge(("a", 0)),)
    rig.attach(2, Topic("other exchange", "a"))  # the same queue
    assert charges(rig, 1) == ()
    rig.detach(2)
    assert charges(rig, 1) == (charge(("a", 0)),)
    rig.say(1, Reply(identity(1), FINAL, b"1"))
    rig.attach(3, B)
    rig.detach(3)
    assert charges(rig, 1) == ()  # who had it may be gone
    rig.tell(Settled((identity(1),)))
    assert charges(rig, 1) == (charge(("a", 0)),)


def test_a_call_that_is_refused_for_want_of_room_stays_refused() -> None:
    """The word is binding: its caller may have been told."""
    rig = Rig(grace=True)
    rig.attach(1, A)
    for n in range(REQUESTS_MAX):
        rig.ask(cast(n))
    rig.host()
    rig.ask(call(5000), call(5001, flags=CALL | AGAIN), cast(5002))
    said = rig.host()
    assert [each.reason for each in said] == [BUSY, AGENT_GONE, BUSY]
    for n in range(REQUESTS_MAX):
        rig.say(1, Receipt(identity(n)))
    rig.host()
    rig.given(1)
    rig.ask(call(5000), call(5001, flags=CALL | AGAIN), cast(5002))
    assert rig.host() == said[:2]
    assert rig.ids(1) == [5002]  # a cast may come again


def test_a_host_s_program_may_ask_again_for_what_was_refused() -> None:
    """With the same id, as the oslo.messaging driver does while it hears BUSY."""
    rig = Rig(grace=True)
    rig.attach(1, A)
    rig.ask(call(1, flags=CALL | LOCAL))
    rig.say(1, Returned(identity(1), BUSY, "requeued"))
    rig.given(1)
    rig.ask(call(1, flags=CALL | LOCAL))
    assert rig.ids(1) == [1]


def test_a_cast_to_the_daemon_is_receipted_before_it_runs() -> None:
    rig = Rig(grace=True)
    at_its_run: list[Any] = []
    rig.router._methods = {"ping": lambda _: at_its_run.extend(rig.host())}
    rig.ask(cast(1, GUEST_TOPIC, body=INFO))
    assert at_its_run == [Receipt(identity(1)), "flushed"]


# --- what the host serves, and this daemon's own requests


def test_what_the_host_serves_is_forgotten_with_its_session() -> None:
    told: list[tuple[Topic, ...]] = []
    router = Router(lambda _, __: None, {}, 0.0, host_serves=told.append)
    router.host_opened(resumed=False, now_s=1.0)
    router.host_receive(encode(Subscribe((A,))), 1.0)
    router.host_opened(resumed=True, now_s=2.0)
    assert told == [(), (A,)]
    router.host_opened(resumed=False, now_s=3.0)
    assert told == [(), (A,), ()]
    assert router.bad_messages == 0


def test_who_does_not_care_what_the_host_serves() -> None:
    rig = Rig()
    rig.router.host_receive(encode(Subscribe((A,))), rig.now_s)
    assert rig.router.bad_messages == 0 and rig.host() == []


def test_our_own_requests_go_up_as_an_agents_do_and_are_repeated() -> None:
    rig = Rig()
    heard: list[Any] = []
    ask = rig.router.attach_ourselves(lambda data, _: heard.append(decode(data)))
    ask(Request(identity(1), 0, 0, 0, "", "vchan.host", "", b"{}"), rig.now_s)
    assert [message.id for message in rig.host()] == [identity(1)]
    rig.router.host_opened(resumed=False, now_s=rig.now_s)
    (again,) = (message for message in rig.host() if isinstance(message, Request))
    assert again.id == identity(1) and again.flags & REDELIVERED
    rig.router.host_receive(encode(Receipt(identity(1))), rig.now_s)
    assert heard == [Receipt(identity(1))]
    ask(Settled((identity(1),)), rig.now_s)
    assert rig.host() == [Settled((identity(1),))]
    assert rig.router.summary()["agents"] == 0 and rig.router.summary()["open_up"] == 0
