"""Agents that ask the control side, the services that they ask, and what was promised them.

A service is a stock oslo.messaging server: it runs what is in its queue, in its order, and
publishes the answer to a call in the queue that the call names, for a minute even while there is no
such queue.

Promises
1. What was receipted has run. What was refused has not.
2. It has run once; a second time only marked `vchan_redelivered`. It is marked only where nobody
   can know: see `doubt`.
3. Who calls gets the answer to what it asked, or is told that there is none.
4. What an agent asks of one target runs in its order, unless the broker has refused it, or its
   time was up by a host's clock while the guest's stood still.
5. In the end nothing is open, and nobody holds anything.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from tests.simulate.broker import Broker
from tests.simulate.check import LONG_S
from tests.simulate.doubt import may_be_marked
from tests.simulate.exempt import ASKED_AGAIN, OVERTAKEN, exempt
from tests.simulate.guest import EXCHANGE, GuestAgent
from tests.simulate.world import Fifo, World
from vchan.guest.upward import UPWARD_MAX
from vchan.host.oslo_wire.downward_envelope import encode_reply
from vchan.host.oslo_wire.envelope import open_envelope
from vchan.host.oslo_wire.upward_envelope import Publication
from vchan.host.vm.handover import PAST_MAX
from vchan.host.vm.upward import HELD_MAX, HELD_S
from vchan.rpc.bodies import REDELIVERED_KEY, encode_failure, encode_invocation, encode_json
from vchan.rpc.in_flight import Answered, HandedBack, Heartbeat, Outcome, Overdue, Taken
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FANOUT,
    NO_AGENT,
    NOTIFICATION,
    Request,
)

CAST: Final = 0
KINDS: Final = {CALL: "call", CAST: "cast", FANOUT: "fanout", NOTIFICATION: "notification"}
REASONS: Final = {NO_AGENT: "nobody", AGENT_GONE: "lost", BUSY: "busy", EXPIRED: "timeout"}
UNRUN: Final = frozenset({"nobody", "busy", "refused"})
"""Whoever hears this has been promised that it has not run."""

SERVERS: Final = ("one", "two")
TARGETS: Final = (("conductor", ""), ("conductor", "one"), ("manager", ""))
NOBODY: Final = ("nobody", "")
NOTIFICATIONS: Final = ("notifications", "")
ANSWER_AGAIN_S: Final = 0.5
ANSWER_KEPT_S: Final = 60.0
ANSWER_S_MAX: Final = 20.0
SETTLE_S: Final = ANSWER_S_MAX + HELD_S + 10.0
"""What an agent that died has left is given up by then."""


class Series(NamedTuple):
    """What has an order: an agent's requests to one target."""

    agent: GuestAgent
    form: int
    target: tuple[str, str]


class Ask:
    """One request of an agent's."""

    def __init__(self, key: int, series: Series, kind: int, request_id: bytes) -> None:
        self.key = key
        self.series = series
        self.kind = kind
        self.id = request_id
        self.number = 0
        self.timeout_s = LONG_S
        self.fails = False
        self.made_s: float | None = None
        self.outcome = ""
        self.outcome_s = math.inf
        self.runs: Counter[str] = Counter()  # by server

    @property
    def agent(self) -> GuestAgent:
        """Who asks."""
        return self.series.agent

    def __str__(self) -> str:
        who = f"{self.agent.vm.uuid}/agent{self.agent.slot}"
        return f"{KINDS[self.kind]} {self.key} of {who} to {'.'.join(self.series.target)}"


class Asking:
    """Everything that agents ask, and what becomes of it."""

    def __init__(self, world: World, broker: Broker) -> None:
        self._world = world
        self._broker = broker
        self.asks: list[Ask] = []
        self.probes: list[bytes] = []
        """Ids of what was asked when everything was well."""
        self._by_id: dict[bytes, Ask] = {}
        self._open: dict[bytes, Ask] = {}
        self._numbers: Counter[Series] = Counter()
        self._ran: dict[tuple[str, Series], list[Ask]] = {}
        self._chains: dict[GuestAgent, deque[Ask]] = {}
        self.hours_passed = False
        for topic, server in TARGETS:
            self._serve(EXCHANGE, f"{topic}.{server}" if server else topic, "one")
        for server in SERVERS:
            self._serve("conductor_fanout", "", server)
        self._serve(EXCHANGE, "notifications.info", "listener")

    # ------------------------------------------------------------ agents

    def ask(self, agent: GuestAgent, kind: int, count: int, *, at_once: bool) -> None:
        """Ask one target so often: all at once, or one after the outcome of the other."""
        if not self._broker.guests_may_ask:
            return
        rng = self._world.rng
        target = NOBODY if rng.random() < 0.05 else rng.choice(TARGETS)
        if kind == FANOUT:
            target = TARGETS[0]
        elif kind == NOTIFICATION:
            target = NOTIFICATIONS
        series = Series(agent, kind & ~CALL, target)
        for _ in range(count):
            ask = Ask(len(self.asks), series, kind, rng.randbytes(16))
            ask.timeout_s = rng.choice((2.0, 10.0, 60.0, LONG_S))
            ask.fails = kind == CALL and rng.random() < 0.1
            self._plan(ask, at_once=at_once)

    def probe(self, agent: GuestAgent) -> None:
        """After healing: one cast, one call, that must succeed."""
        if not self._broker.guests_may_ask:
            return
        for kind in (CAST, CALL):
            series = Series(agent, CAST, TARGETS[0])
            ask = Ask(len(self.asks), series, kind, self._world.rng.randbytes(16))
            self.probes.append(ask.id)
            self._plan(ask, True)

    def _plan(self, ask: Ask, at_once: bool) -> None:
        self.asks.append(ask)
        self._by_id[ask.id] = ask
        chain = self._chains.setdefault(ask.agent, deque())
        if not at_once:
            chain.append(ask)
        if at_once or len(chain) == 1:
            ask.agent.process.enter(self._submit, ask)

    def _submit(self, ask: Ask) -> None:
        """In the agent's process."""
        world, (topic, server) = self._world, ask.series.target
        ask.made_s = world.now_s
        self._numbers[ask.series] += 1
        ask.number = self._numbers[ask.series]
        self._open[ask.id] = ask
        world.stats[f"asked: {KINDS[ask.kind]}"] += 1
        world.note("%s: asks, %s", ask, ask.id[:4].hex())
        if ask.kind == NOTIFICATION:
            body = encode_invocation("info", {"event_type": "asked", "payload": ask.key})
        else:
            body = encode_invocation("fail" if ask.fails else "work", {"key": ask.key})
        timeout_ms = int(ask.timeout_s * 1000)
        request = Request(ask.id, ask.kind, timeout_ms, 0, EXCHANGE, topic, server, body)
        assert ask.agent.agent is not None
        ask.agent.agent._connection.submit(request, lambda outcome: self._told(ask, outcome))

    def _told(self, ask: Ask, outcome: Outcome) -> None:
        world = self._world
        if isinstance(outcome, Heartbeat):
            world.stats["asked: heartbeats"] += 1
            return
        if ask.outcome:
            world.fail(f"{ask}: told {outcome}, and {ask.outcome} before")
        ask.outcome, ask.outcome_s = self._read(ask, outcome), world.now_s
        world.note("%s: %s", ask, ask.outcome)
        world.stats[f"asked: {KINDS[ask.kind]}: {ask.outcome}"] += 1
        self._open.pop(ask.id, None)
        self._check_outcome(ask)
        chain = self._chains[ask.agent]
        if chain and chain[0] is ask:
            chain.popleft()
            if chain:
                self._submit(chain[0])

    def _read(self, ask: Ask, outcome: Outcome) -> str:
        match outcome:
            case Taken():
                return "taken"
            case Answered(_, failed, body):
                value = json.loads(body)
                right = value["message"] == str(ask.key) if failed else value == {"key": ask.key}
                if not right or failed is not ask.fails:
                    self._world.fail(f"{ask}: got the answer {body[:80]!r}")
                return "failed" if failed else "result"
            case HandedBack(_, reason, _):
                return REASONS.get(reason, "refused")
            case _:
                assert isinstance(outcome, Overdue)
                return "timeout"

    def _check_outcome(self, ask: Ask) -> None:
        outcome, is_call = ask.outcome, ask.kind == CALL
        expected = {"result", "failed", "lost"} if is_call else {"taken"}
        if ask.series.target == NOBODY:
            expected = {"nobody", "lost"} if self._is_excused(ask) else {"nobody"}
        if outcome == "timeout":
            if ask.timeout_s == LONG_S and not self.hours_passed:
                self._world.fail(f"{ask} timed out, and everything was healed long before")
        elif outcome not in expected:
            self._world.fail(f"{ask}: {outcome}")
        elif outcome in ("result", "failed") and not ask.runs:
            self._world.fail(f"{ask} was answered and never ran")

    # ------------------------------------------------------------ services

    def _serve(self, exchange: str, routing_key: str, server: str) -> None:
        queue = Fifo(self._world, lambda publication: self._run(server, publication))
        self._broker.bind(exchange, routing_key, queue)

    def _run(self, server: str, publication: Publication) -> None:
        message = open_envelope(publication.body)
        ask = self._by_id[bytes.fromhex(message["_unique_id"])]
        is_marked = f"_context_{REDELIVERED_KEY}" in message
        world = self._world
        world.note("%s: runs%s in %s", ask, " (marked)" if is_marked else "", server)
        if is_marked:
            world.stats["asked: ran marked"] += 1
            if not self._is_excused(ask):
                world.fail(f"{ask} is marked, and nobody had died")
        if ask.runs[server]:
            exempt(world.stats, ASKED_AGAIN)
            if not is_marked:
                world.fail(f"{ask} ran twice, and was not marked")
        else:
            self._check_order(ask, server)
        ask.runs[server] += 1
        if ask.kind == CALL:
            self._answer_later(ask, message["_reply_q"], message["_msg_id"])

    def _is_excused(self, ask: Ask) -> bool:
        assert ask.made_s is not None
        return may_be_marked(self._broker, ask.id, ask.made_s, ask.agent.vm.uuid)

    def _check_order(self, ask: Ask, server: str) -> None:
        broker, ran = self._broker, self._ran.setdefault((server, ask.series), [])
        for later in ran:
            if later.number < ask.number:
                continue
            if ask.id in broker.given_up or broker.may_overtake(later.id, ask.id):
                exempt(self._world.stats, OVERTAKEN)
            else:
                self._world.fail(f"{ask} (number {ask.number}) ran after number {later.number}")
        ran.append(ask)

    def _answer_later(self, ask: Ask, reply_q: str, msg_id: str) -> None:
        world, rng = self._world, self._world.rng
        delay_s = rng.random() * rng.choice((0.001, 0.1, 3.0, ANSWER_S_MAX))
        if delay_s > 2.0:
            beat = encode_reply(msg_id, ending=False)
            world.after(delay_s / 2, self._broker.answer, reply_q, beat)
        if ask.fails:
            body = encode_reply(msg_id, failure_json=encode_failure("ValueError", str(ask.key)))
        else:
            body = encode_reply(msg_id, result_json=encode_json({"key": ask.key}))
        world.after(delay_s, self._answer, reply_q, body, world.now_s + delay_s + ANSWER_KEPT_S)

    def _answer(self, reply_q: str, body: bytes, until_s: float) -> None:
        if not self._broker.answer(reply_q, body) and self._world.now_s < until_s:
            self._world.stats["asked: answers that had no queue yet"] += 1
            self._world.after(ANSWER_AGAIN_S, self._answer, reply_q, body, until_s)

    # ------------------------------------------------------------ tables

    def check_bounds(self, host_upwards: Iterable[Any], upwards: Iterable[Any]) -> None:
        """Every table stays below its limit."""
        for host_upward in host_upwards:
            known = len(host_upward._items)
            for name in ("_queue", "_unsent"):
                self._at_most(f"host upward {name}", len(getattr(host_upward, name)), known)
            self._at_most("host upward items", known, host_upward._gate.limits.requests_up)
            self._at_most("host upward held", len(host_upward._held), HELD_MAX)
            self._at_most("host upward past", len(host_upward._history), PAST_MAX)
        for upward in upwards:
            self._at_most("upward items", len(upward._items), UPWARD_MAX)
            self._at_most("upward requester", len(upward._host), len(upward._items))

    def _at_most(self, what: str, size: int, limit: int) -> None:
        if size > limit:
            self._world.fail(f"{what}: {size}, the limit is {limit}")
        peak = f"peak {what}"
        self._world.stats[peak] = max(size, self._world.stats[peak])

    # ------------------------------------------------------------ the end

    def is_quiet(self) -> bool:
        """Everybody who lives has heard what came of it."""
        return not any(ask.agent.alive for ask in self._open.values())

    def open_asks(self) -> list[Ask]:
        """Who has not."""
        return [ask for ask in self._open.values() if ask.agent.alive]

    def check_end(self) -> None:
        """What can only be said at the end."""
        for ask in self.asks:
            if ask.outcome == "taken":
                servers = SERVERS if ask.kind == FANOUT else ("one",)
                if ask.kind == NOTIFICATION:
                    servers = ("listener",)
                if any(not ask.runs[server] for server in servers):
                    self._world.fail(f"{ask} was receipted, and ran in {dict(ask.runs)} only")
            elif ask.outcome in UNRUN and ask.runs:
                self._world.fail(f"{ask}: {ask.outcome}, and it ran")

    def check_tables(self, host_upwards: Iterable[Any], upwards: Iterable[Any]) -> None:
        """Nobody holds anything any more."""
        for host_upward in host_upwards:
            tables = (
                host_upward._items,
                host_upward._queue,
                host_upward._sending,
                host_upward._unsent,
            )
            if any(tables) or host_upward._held or len(host_upward._responder):
                held = (*map(len, tables), len(host_upward._held), len(host_upward._responder))
                self._world.fail(f"{host_upward.vm}: a host still holds {held}")
        for upward in upwards:
            if upward._items or len(upward._host) or upward._bytes:
                held = (len(upward._items), len(upward._host), upward._bytes)
                self._world.fail(f"a guest daemon still holds {held}")
