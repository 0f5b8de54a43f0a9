"""Services on the control side: stock oslo.messaging clients.

A call is published until the broker has confirmed it, and then looks for the reply with its msg_id
until its timeout; every other reply is dropped. A cast
returns when the broker has confirmed it; when the connection is lost before that, the same message
is published again.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Final

from tests.simulate.broker import Broker
from tests.simulate.check import CALL, FANOUT, Ledger, Op, parse_reply
from tests.simulate.world import Fifo, Machine, World
from vchan.host.oslo_wire.downward_envelope import BrokerRequest
from vchan.rpc.messages import Topic

EXCHANGE: Final = "openstack"
REPLY_QUEUE: Final = "reply_service"
AGAIN_S: Final = (0.05, 0.5, 2.0, 8.0)


class Callers:
    """One service with a reply queue; casts to one topic follow each other."""

    def __init__(
        self, world: World, broker: Broker, ledger: Ledger, machines: dict[str, Machine]
    ) -> None:
        self._world = world
        self.broker = broker
        self._ledger = ledger
        self._machines = machines
        self._keys = 0
        self._numbers: dict[tuple[str, str], int] = {}
        self._queues: dict[tuple[str, str], deque[tuple[Op, BrokerRequest]]] = {}
        self._waiting: dict[str, Op] = {}
        self._publishing: set[int] = set()  # calls, by their keys
        self._early: dict[int, list[bytes]] = {}  # what came for them meanwhile
        self.unconfirmed = 0.0
        """How often a publisher does not hear whether the broker has a message."""
        broker.reply_queues[REPLY_QUEUE] = Fifo(world, self._on_reply)

    # ------------------------------------------------------------ asking

    def call(self, vm: str, topic: str, timeout_s: float, *, fails: bool, filling: str) -> Op:
        """Call a method."""
        op, request = self._make(CALL, vm, topic, timeout_s, fails=fails, filling=filling)
        assert request.msg_id is not None
        self._waiting[request.msg_id] = op
        self._publishing.add(op.key)
        self._world.after(timeout_s, self._timed_out, request.msg_id)
        self._publish(op, request, 0)
        return op

    def cast(self, vm: str, topic: str, kind: str, *, filling: str) -> Op:
        """Cast, or fan out, after what was cast before to the same topic."""
        op, request = self._make(kind, vm, topic, None, fails=False, filling=filling)
        queue = self._queues.setdefault((vm if kind != FANOUT else "", topic), deque())
        queue.append((op, request))
        if len(queue) == 1:
            self._publish(op, request, 0)
        return op

    def _make(
        self, kind: str, vm: str, topic: str, timeout_s: float | None, *, fails: bool, filling: str
    ) -> tuple[Op, BrokerRequest]:
        world = self._world
        self._keys += 1
        number = self._numbers[vm, topic] = self._numbers.get((vm, topic), 0) + 1
        op = Op(self._keys, kind, vm, topic, number, world.now_s)
        op.id = world.rng.randbytes(16)
        op.fails = fails
        is_call = kind == CALL
        if timeout_s is not None:
            op.timeout_s, op.deadline_s = timeout_s, world.now_s + timeout_s
        args = {"key": op.key, "filling": filling} if filling else {"key": op.key}
        request = BrokerRequest(
            id=op.id,
            method="fail" if fails else "work",
            args=args,
            namespace=None,
            version="1.0",
            context={},
            msg_id=op.id.hex() if is_call else None,
            reply_q=REPLY_QUEUE if is_call else None,
            monitor_timeout_s=None,
            timeout_s=timeout_s,
        )
        self._ledger.made(op)
        world.stats[f"requests: {kind}"] += 1
        return op, request

    # ------------------------------------------------------------ publishing

    def _publish(self, op: Op, request: BrokerRequest, attempt: int) -> None:
        world = self._world
        lost = world.rng.random() < self.unconfirmed
        if not lost or world.rng.random() < 0.7:
            world.after(world.latency_s(), self._arrived, op, request)
        if lost:
            world.stats["publishes without a confirm"] += 1
            delay_s = world.rng.choice(AGAIN_S) * world.rng.random()
            world.after(delay_s + 0.4, self._publish, op, request, attempt + 1)
        else:
            world.after(0.4, self._confirmed, op)

    def _arrived(self, op: Op, request: BrokerRequest) -> None:
        fanout = op.kind == FANOUT
        if op.accepted_s is not None:
            self._world.stats["published twice"] += 1
        if not self.broker.publish(request, Topic(EXCHANGE, op.topic), op.vm, fanout=fanout):
            self._world.fail(f"{op}: there is no queue for it")
            return
        self._world.note("%s: published", op)
        vms = list(self._machines) if fanout else [op.vm]
        self._ledger.accepted(op, [(vm, self._machines[vm].time()) for vm in vms])

    def _confirmed(self, op: Op) -> None:
        if op.kind == CALL:
            self._publishing.discard(op.key)
            for body in self._early.pop(op.key, ()):
                self._on_reply(body)
            return
        queue = self._queues[op.vm if op.kind != FANOUT else "", op.topic]
        queue.popleft()
        if queue:
            self._publish(*queue[0], 0)

    @property
    def is_idle(self) -> bool:
        """Every cast has returned."""
        return not any(self._queues.values())

    # ------------------------------------------------------------ answers

    def _timed_out(self, msg_id: str) -> None:
        op = self._waiting.pop(msg_id, None)
        if op is not None:
            self._ledger.outcome(op, "timeout")

    def _on_reply(self, body: bytes) -> None:
        world = self._world
        msg_id, result, failure, ending = parse_reply(body)
        if not ending:
            return
        op = self._waiting.get(msg_id)
        if op is not None and op.key in self._publishing:
            self._early.setdefault(op.key, []).append(body)
            return
        op = self._waiting.pop(msg_id, None)
        if op is None:
            world.stats["replies nobody waits for"] += 1
            return
        if failure is None:
            if op.fails or result["key"] != op.key:
                world.fail(f"{op}: got the answer {str(result)[:80]}")
            self._ledger.outcome(op, "result")
            return
        details = json.loads(failure)
        if details["class"] == "ValueError":
            if not op.fails or details["message"] != f"key {op.key}":
                world.fail(f"{op}: got the failure {details['message'][:80]}")
            self._ledger.outcome(op, "failed")
        else:
            self._ledger.outcome(op, details["class"])
