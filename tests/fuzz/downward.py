"""A VM's Downward between a hostile guest and a broker: the fuzzer's bytes are what both do.

The broker keeps to its rules; the guest keeps to none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sized
from math import inf
from typing import Any

from tests.fuzz.script import Script
from tests.rig.attributes import attributes
from tests.rig.mail import take_mail
from vchan.errors import LimitExceeded, Rejected
from vchan.host.oslo_wire.downward_envelope import BrokerRequest, ReplyPublication
from vchan.host.oslo_wire.mail import ARRIVAL_KEY, NOTE_KEY, own_queue
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.host.policy.rule_parser import parse
from vchan.host.policy.rules import Ask, Facts, Verdict
from vchan.host.vm.downward import LOCAL_REQUESTS_MAX, Downward
from vchan.host.vm.gate import VmGate
from vchan.host.vm.served_topics import TOPICS_SEEN_MAX
from vchan.host.vm.upward import ARRIVAL_ID, NOTE_ID
from vchan.rpc.bodies import REDELIVERED_KEY, encode_failure, encode_json, encode_raw
from vchan.rpc.in_flight import SETTLED_KEEP_S, Outcome, Taken
from vchan.rpc.messages import (
    CALL,
    RAW,
    REDELIVERED,
    Cancel,
    Holding,
    Message,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    encode,
)

STEPS_MAX = 150
TABLE_MAX = 500
"""More than so few steps and ids can fill."""
VM = "b1b1f4b2-0000-4000-8000-000000000001"
OTHER_VM = "b1b1f4b2-0000-4000-8000-000000000002"
EXCHANGE = "openstack"
_RULES = """
listen        any  agent          allow
listen        any  other          allow
listen        any  mute           allow
reply         any  mute           deny
reply         any  any            allow
cast,call     any  control        allow
call          any  local          allow
notify        any  notifications  allow
cast,call     any  watched        conductor
limit         any  calls_up=4 requests_up=8
"""
POLICY = parse([("fuzz", _RULES)])
_TOPICS = ("agent", "other", "mute", "control", "notifications", "local", "watched", "secret", "")
_ALLOWED = frozenset({"control", "notifications", "local"})
_CONDUCTOR = Topic(EXCHANGE, "vchan")
_BODIES = (
    encode_json({"method": "m", "args": {"x": 1}}),
    encode_json({"method": "info", "args": {"payload": {}, "event_type": "e"}}),
    encode_json({"method": "m", "context": {"is_admin": True, "_reply_q": "r", "request_id": "1"}}),
    encode_failure("ValueError", "no"),
    b"null",
    b"",
    b"[" * 2000,
    b'{"method":1}',
)


class _Broker:
    """Does what it is told, and holds it to what it may be told."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.live: dict[int, Any] = {}  # deliveries not acknowledged, by token
        self.dead: set[int] = set()
        self.unconfirmed: list[tuple[bytes, Publication]] = []
        self.mailbox: list[bytes] = []  # what is in the VM's own queue, but answers
        self.published: dict[bytes, float] = {}  # when
        self.completing: list[bytes] = []
        self.reply_queues: set[str] = set()
        self.consumed: frozenset[Topic] = frozenset()
        self.released = False
        self.listening = False
        self._token = 0

    def deliver(self, what: Any) -> int:
        self._token += 1
        self.live[self._token] = what
        return self._token

    def consume(self, vm: str, topics: frozenset[Topic], owned: frozenset[Topic]) -> None:
        assert vm == VM
        for topic in topics:
            assert topic.name in ("agent", "other", "mute"), f"consumes {topic}"
        self.consumed = topics

    def release(self, vm: str, *, for_good: bool = False) -> None:
        assert vm == VM
        self.released = True
        self.listening = False
        self.lose_tokens()

    def ack(self, token: Hashable) -> None:
        assert isinstance(token, int)
        if token in self.dead:  # of a channel that is gone: harmless
            self.dead.discard(token)
            return
        assert token in self.live, "acknowledged twice"
        del self.live[token]

    def lose_tokens(self) -> None:
        """They mean nothing to the broker any more."""
        self.dead |= self.live.keys()
        self.live.clear()

    def complete(
        self,
        vm: str,
        request_id: bytes,
        tokens: tuple[Hashable, ...],
        reply: ReplyPublication | None = None,
    ) -> None:
        assert vm == VM
        assert tokens or (reply is not None and not reply.has_not_run)
        for token in tokens:
            self.ack(token)
        if reply is not None:
            self.publish_heartbeat(reply.reply_q, reply.body)
        self.completing.append(request_id)

    def publish_heartbeat(self, reply_q: str, body: bytes) -> None:
        assert reply_q in self.reply_queues
        message = json.loads(json.loads(body)["oslo.message"])
        assert message["_msg_id"] == f"to-{reply_q}"

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        assert vm == VM
        self.unconfirmed.append((request_id, publication))
        if publication.form is Form.MAIL:
            assert request_id in (ARRIVAL_ID, NOTE_ID)
            assert publication.routing_key == own_queue(VM)
            return
        topic = publication.routing_key.partition(".")[0]
        assert topic in _ALLOWED or (publication.exchange, topic) == _CONDUCTOR, topic
        message = json.loads(json.loads(publication.body)["oslo.message"])
        assert message["_context_vchan_instance_uuid"] == VM
        assert "_context_is_admin" not in message
        now_s = self._clock()
        if now_s - self.published.get(request_id, -inf) < SETTLED_KEEP_S:  # it is remembered
            assert message.get(f"_context_{REDELIVERED_KEY}")
        self.published[request_id] = now_s

    def listen_for_answers(self, vm: str) -> None:
        assert vm == VM
        self.listening = True


class _World:
    """Downward and all who talk to it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.broker = _Broker(lambda: self.now_s)
        self.said_bytes = 0
        self.local_told: list[Outcome] = []
        self.local_asked: dict[bytes, Callable[[Outcome, float], None]] = {}
        gate = VmGate(Facts(VM), lambda: POLICY, self._record, _stamp, _CONDUCTOR)
        self.downward = Downward(
            VM, self._send, self.broker, gate, frozenset({"request_id"}), self._offer
        )
        self.downward.opened(resumed=False, now_s=self.now_s)

    def _send(self, data: bytes, stream: int) -> None:
        assert 0 <= stream < 16
        self.said_bytes += len(data)

    def _record(self, facts: Facts, ask: Ask, verdict: Verdict, of: bytes, reason: str) -> None:
        assert facts.uuid == VM

    def _offer(
        self, request: Request, told: Callable[[Outcome, float], None]
    ) -> Callable[[], None] | None:
        if request.topic != "local":
            return None
        assert request.id not in self.local_asked
        self.local_asked[request.id] = told
        return lambda: self._forget(request.id)

    def _forget(self, request_id: bytes) -> None:
        self.local_asked.pop(request_id, None)

    def check(self) -> None:
        """Every table is within its limit."""
        downward, upward = self.downward, self.downward.upward
        assert downward._served.seen <= TOPICS_SEEN_MAX
        still_open = downward._open
        assert still_open.local <= LOCAL_REQUESTS_MAX
        assert still_open.local == sum(each.local is not None for each in still_open.by_id.values())
        assert upward.open_requests <= 8
        assert 0 <= upward.summary()["calls"] <= 4
        for owner in (
            downward,
            still_open,
            downward._finished,
            downward._consumption,
            upward,
            downward._requester,
            upward._responder,
        ):
            for name, table in attributes(owner).items():
                assert not isinstance(table, Sized) or len(table) <= TABLE_MAX, name


def _stamp(given: Mapping[str, Any], facts: Facts, more: Mapping[str, int]) -> dict[str, Any]:
    return {"vchan_instance_uuid": facts.uuid}


def run(data: bytes) -> None:
    """Nothing that the guest says raises, passes the policy, or fills a table."""
    script, world = Script(data), _World()
    for _ in range(STEPS_MAX):
        if script.at_end:
            break
        _step(script, world)
        world.check()
    world.downward.suspend(world.now_s)
    world.downward.release("the end", world.now_s)
    assert world.downward.open_requests == 0


def _step(script: Script, world: _World) -> None:
    what = script.number() % 20
    if what < 9:
        world.downward.receive(encode(_message(script)), world.now_s)
    elif what == 9:
        world.downward.receive(script.block(), world.now_s)
    elif what == 10:
        _wait(world, script.pick((0.01, 0.6, 1.0, 6.0, 61.0, 4000.0)))
    else:
        _BROKER_STEPS[what - 11](script, world)


def _id(script: Script) -> bytes:
    """One of a few, so that they meet."""
    return (script.number() % 12).to_bytes(16, "big")


def _message(script: Script) -> Message:
    request_id = _id(script)
    body = script.pick(_BODIES)
    flags = script.number() % 16
    match script.number() % 8:
        case 0 | 1:
            timeout_ms = script.pick((0, 1, 5000, 2**32 - 1))
            topic, server = script.pick(_TOPICS), script.pick(("", VM, OTHER_VM))
            if script.number() % 4 == 0:
                asked = Request(request_id, flags, timeout_ms, flags, EXCHANGE, topic, server, body)
                raw = encode_raw(body, body) if flags & 2 else body
                return asked.changed(flags=RAW | CALL | flags & REDELIVERED, body=raw)
            return Request(request_id, flags, timeout_ms, flags, EXCHANGE, topic, server, body)
        case 2:
            return Reply(request_id, flags, body)
        case 3:
            return Receipt(request_id)
        case 4:
            return Returned(request_id, flags, "text")
        case 5:
            return Cancel(request_id)
        case 6:
            ids = tuple(_id(script) for _ in range(flags % 4))
            return Settled(ids) if flags < 8 else Holding(ids)
        case _:
            names = [script.pick(_TOPICS[:-1]) for _ in range(flags % 5)]
            number = script.number(2) if flags > 7 else 0  # a topic of its own
            return Subscribe(tuple(Topic(EXCHANGE, f"{n}{number or ''}") for n in names))


def _wait(world: _World, for_s: float) -> None:
    until_s = world.now_s + for_s
    for _ in range(500):
        at_s = world.downward.next_timeout()
        if at_s is None or at_s > until_s:
            break
        assert math.isfinite(at_s)
        world.now_s = max(world.now_s, at_s)
        world.downward.handle_timeout(world.now_s)
        next_s = world.downward.next_timeout()
        assert next_s is None or next_s > world.now_s, "a timer that fires for ever"
    world.now_s = until_s


# --- what the broker and local programs do ------------------------------------------------------


def _deliver(script: Script, world: _World) -> None:
    topic = Topic(EXCHANGE, script.pick(("agent", "other", "mute")))
    if topic not in world.broker.consumed or world.broker.released:
        return
    request_id = _id(script)[:-1] + b"\xff"
    is_call = bool(script.number() % 2)
    reply_q = f"reply{script.number() % 3}" if is_call else None
    if reply_q is not None:
        world.broker.reply_queues.add(reply_q)
    origin = BrokerRequest(
        request_id[:-2] + bytes((is_call, *(reply_q or "0")[-1:].encode())),
        "method",
        {},
        None,
        None,
        {},
        f"to-{reply_q}" if reply_q else None,
        reply_q,
        script.pick((None, 1.0)),
        script.pick((None, 5.0)),
    )
    token = world.broker.deliver(origin)
    world.downward.delivered(
        token, origin, topic, fanout=False, redelivered=False, now_s=world.now_s
    )


def _confirm(script: Script, world: _World) -> None:
    if world.broker.unconfirmed:
        ok, unroutable, doubtful = script.pick(
            ((True, False, False), (False, True, False), (False, False, True))
        )
        request_id, publication = world.broker.unconfirmed.pop(0)
        if not ok and not doubtful:
            world.broker.published.pop(request_id, None)
        elif publication.form is Form.MAIL:
            world.broker.mailbox.append(publication.body)
        world.downward.upward.sent(
            request_id, ok=ok, unroutable=unroutable, doubtful=doubtful, now_s=world.now_s
        )


def _prove(script: Script, world: _World) -> None:
    if world.broker.completing:
        world.downward.completed((world.broker.completing.pop(0),), proven=True)


def _complete_unproven(script: Script, world: _World) -> None:
    if world.broker.completing:
        world.downward.completed((world.broker.completing.pop(0),), proven=False)


def _mail(script: Script, world: _World) -> None:
    """An answer to some call of the guest's, or to none, or a note."""
    if not world.broker.listening:
        return
    if world.broker.mailbox:
        token = world.broker.deliver(None)
        take_mail(world.downward.upward, token, world.broker.mailbox.pop(0), world.now_s)
        return
    request_id = _id(script)
    match script.number() % 5:
        case 0:
            body = encode_json({"_msg_id": request_id.hex(), "result": 1})
        case 1:
            body = encode_json({"_msg_id": request_id.hex(), "result": None, "ending": False})
        case 2:
            failure = encode_failure("ValueError", "no").decode()
            body = encode_json({"_msg_id": request_id.hex(), "failure": failure})
        case 3:
            lists = {name: [_id(script).hex()] for name in ("taken", "calls", "gone", "doubt")}
            stays = script.pick(([], ["a"], ["b", "a"]))
            unclear = script.pick(([], ["c"]))
            body = encode_json({NOTE_KEY: stays, **lists, "unclear": unclear})
        case _:
            body = script.block() or encode_json({ARRIVAL_KEY: script.pick(("a", "b", "c"))})
    take_mail(world.downward.upward, world.broker.deliver(None), body, world.now_s)


def _lose_channel(script: Script, world: _World) -> None:
    world.broker.lose_tokens()
    world.broker.released = False
    world.downward.released()


def _leave_and_come(script: Script, world: _World) -> None:
    if script.number() % 2:
        world.downward.suspend(world.now_s)
    else:
        world.downward.opened(resumed=bool(script.number() % 2), now_s=world.now_s)


def _local_request(script: Script, world: _World) -> None:
    request_id = b"L" + _id(script)[1:]
    request = Request(request_id, script.number() & CALL, 5000, 0, EXCHANGE, "agent", VM, b"{}")
    if script.number() % 4 == 0:
        world.downward.cancel_local(request_id)
        return
    try:
        world.downward.submit_local(request, world.local_told.append, world.now_s)
    except (LimitExceeded, Rejected):
        pass


def _local_answer(script: Script, world: _World) -> None:
    for request_id, told in list(world.local_asked.items())[:1]:
        del world.local_asked[request_id]
        told(Taken(request_id), world.now_s)


_BROKER_STEPS: tuple[Callable[[Script, _World], None], ...] = (
    _deliver,
    _confirm,
    _prove,
    _complete_unproven,
    _mail,
    _lose_channel,
    _leave_and_come,
    _local_request,
    _local_answer,
)
