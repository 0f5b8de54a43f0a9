"""Requests of guests to the control side: published with confirms, as oslo.messaging's clients do.

Rules of this file
1. A channel is lent to one VM at a time, until everything published on it is confirmed. So what
   goes wrong on it, as with an exchange that has just gone, touches that VM alone.
2. A VM's publications go out in the order of its commands. One that waits for its exchange, its
   queue or a channel holds up those behind it, and no other VM's.
3. `PublishResult` comes once for each. What is in doubt is not `ok`.

    publish -> Outbox (one per VM) -its turn-> Lane (a channel) -confirmed, returned-> PublishResult
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from vchan.host.broker.amqp import BrokerLink, Inbound, ResourceError, spec
from vchan.host.broker.confirms import Confirms
from vchan.host.broker.events import BrokerEvent, PublishResult
from vchan.host.broker.topology import MISSING, NOT_FOUND, Declared, QueueFacts
from vchan.host.oslo_wire.envelope import REQUEST_BYTES_MAX
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.io.loop import Loop
from vchan.rpc.messages import NAME_BYTES_MAX

LOG = logging.getLogger(__name__)

REQUESTS_MAX = 4096
"""Requests of all VMs given to be published and not yet confirmed. At it: a request stays with its
VM, and is published again after a second."""
REQUESTS_BYTES_MAX = 64 * 1024 * 1024
"""Bodies of requests of all VMs given to be published and not yet confirmed. At it: a request stays
with its VM, and is published again after a second."""
VM_REQUESTS_MAX = 256
"""Requests of one VM that wait for the broker: it does not take what is there for all. At it: a
request stays with its VM, and is published again after a second."""
VM_REQUESTS_BYTES_MAX = REQUEST_BYTES_MAX
"""Bodies of one VM's requests that wait for the broker: one of the largest. At it: a request stays
with its VM, and is published again after a second."""
LANES_MAX = 256
"""Channels for VMs that publish at the moment. A connection has 2047 for everything."""
LOT_MAX = 64
"""Published in a row by a VM while others wait for a channel."""
LANE_IDLE_S = 60.0
"""A channel that nobody has needed for this long is closed."""
CONFIRM_TIMEOUT_S = 60.0
"""For the broker to confirm. A quorum queue without its majority does not."""
UNHEARD_MAX = 1000
"""Casts, and likewise notifications, that one VM may leave in a queue that nobody consumes, since
that was last found consumed or empty. At it: Returned: NO_AGENT."""
UNHEARD_BYTES_MAX = 16 * 1024 * 1024
"""Bytes that one VM may leave in a queue that nobody consumes. At it: Returned: NO_AGENT."""
UNHEARD_KNOWN_MAX = 4096
"""VMs and queues of which that is counted. Over this the longest known is forgotten."""


T = TypeVar("T")


class BrokerForRequests(Protocol):
    """What requests ask of the `Broker` they belong to."""

    loop: Loop
    post: Callable[[BrokerEvent], None]
    declared: Declared

    @property
    def link(self) -> BrokerLink | None:
        """While there is a connection."""

    def within(self, vm: str, work: Callable[[], T], otherwise: T) -> T:
        """Do something for one VM alone."""

    def vm_failed(self, vm: str, fault: str) -> None:
        """Something unexpected in one VM's code, which is in the log."""

    def request_done(self, outgoing: Outgoing) -> None:
        """It is confirmed, or will never be."""


class Outgoing(NamedTuple):
    """A request to be published."""

    vm: str
    request_id: bytes
    publication: Publication


def _comes_back(publication: Publication) -> bool:
    """Whether it comes back if there is no queue for it. A notification's queue was seen to be
    there: if that is gone by now, it shall not be lost without a word."""
    return publication.mandatory or publication.form is Form.NOTIFY


def problem_of(publication: Publication) -> str:
    """Why the broker would never take this, or "": it would close the channel, or do something else
    than what is meant."""
    form, exchange, key, body, expiration_ms, _ = publication
    if (form is Form.MAIL) is bool(exchange) or not key:
        return f"{form} to exchange {exchange[:40]!r} and key {key[:40]!r}: mail alone goes to none"
    for name in publication.address:
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            return f"{name[:40]!r}: AMQP cannot say that name"
        if size > NAME_BYTES_MAX:
            return f"a name of {size} bytes: {NAME_BYTES_MAX} are allowed (NAME_BYTES_MAX)"
    if len(body) > REQUEST_BYTES_MAX:
        return f"{len(body)} bytes: {REQUEST_BYTES_MAX} are allowed (REQUEST_BYTES_MAX)"
    if expiration_ms is not None and expiration_ms < 0:
        return f"an expiration of {expiration_ms} ms"
    return ""


class Quota:
    """How much is to be published: counted by any thread, under the broker's lock."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._total_bytes = 0

    def admit(self, outgoing: Outgoing) -> str:
        """Count it, or say which limit forbids it."""
        vm, size = outgoing.vm, len(outgoing.publication.body)
        if self._count.total() >= REQUESTS_MAX:
            return f"limit: {REQUESTS_MAX} requests (REQUESTS_MAX) wait for the broker"
        if self._total_bytes + size > REQUESTS_BYTES_MAX:
            return f"limit: {REQUESTS_BYTES_MAX} bytes (REQUESTS_BYTES_MAX) wait for the broker"
        if self._count[vm] >= VM_REQUESTS_MAX:
            return f"limit: {VM_REQUESTS_MAX} of the VM's requests (VM_REQUESTS_MAX) wait"
        if self._bytes[vm] + size > VM_REQUESTS_BYTES_MAX:
            return f"limit: {VM_REQUESTS_BYTES_MAX} of its bytes (VM_REQUESTS_BYTES_MAX) wait"
        self._count[vm] += 1
        self._bytes[vm] += size
        self._total_bytes += size
        return ""

    def done(self, outgoing: Outgoing) -> None:
        """It is over."""
        vm, size = outgoing.vm, len(outgoing.publication.body)
        self._total_bytes -= size
        self._count[vm] -= 1
        self._bytes[vm] -= size
        if not self._count[vm]:
            del self._count[vm], self._bytes[vm]


class Unheard:
    """What VMs have left in queues that nobody consumes."""

    def __init__(self) -> None:
        # Messages, bytes, and when the queue was last looked at by then.
        self._left: dict[tuple[str, str], tuple[int, int, float]] = {}

    def heard(self, vm: str, queue: str) -> None:
        """Somebody consumes from it."""
        self._left.pop((vm, queue), None)

    def admit(self, vm: str, queue: str, size: int, facts: QueueFacts) -> str:
        """Count one that nobody will consume for now, or say which limit forbids it."""
        count, total, at_s = self._left.pop((vm, queue), (0, 0, facts.at_s))
        if not facts.messages and facts.at_s > at_s:
            count = total = 0  # somebody has been there since
        is_over = count >= UNHEARD_MAX or total + size > UNHEARD_BYTES_MAX
        if not is_over:
            count, total = count + 1, total + size
        self._left[vm, queue] = (count, total, facts.at_s)
        if len(self._left) > UNHEARD_KNOWN_MAX:
            del self._left[next(iter(self._left))]
        if not is_over:
            return ""
        return (
            f"nobody consumes from queue {queue}, and {count} messages with {total} bytes of this "
            f"VM wait there: {UNHEARD_MAX} and {UNHEARD_BYTES_MAX} may (UNHEARD_MAX, "
            "UNHEARD_BYTES_MAX)"
        )


class Lane:
    """A channel with confirms, lent to one VM's outbox at a time."""

    def __init__(self, requests: Requests, link: BrokerLink) -> None:
        self._requests = requests
        self._confirms = Confirms[Outgoing](link.channel(self))
        self._is_closed = False
        self.outbox: Outbox | None = None
        self.lot = 0  # published since it was lent
        self.since_s = 0.0  # when the oldest unconfirmed was published, or the last confirmed

    def publish(self, outgoing: Outgoing, now_s: float) -> None:
        """Send it."""
        assert not self._is_closed
        if not self.unconfirmed:
            self.since_s = now_s
        self.lot += 1
        publication = outgoing.publication
        self._confirms.publish(
            outgoing,
            publication.address,
            publication.body,
            mandatory=_comes_back(publication),
            expiration_ms=publication.expiration_ms,
        )

    @property
    def unconfirmed(self) -> Mapping[int, Outgoing]:
        """By the number that the broker confirms, ascending."""
        return self._confirms.waiting

    def lose(self) -> list[Outgoing]:
        """The channel is gone: what is in doubt."""
        return self._confirms.lose()

    def __str__(self) -> str:
        return f"{self.outbox.vm if self.outbox is not None else 'no VM'}: publishing"

    def on_failure(self, fault: str) -> None:
        """It is that VM's trouble to whom it is lent."""
        if self.outbox is not None:
            self._requests.vm_failed(self.outbox.vm, fault)
        self.give_up(fault)

    def on_method(self, inbound: Inbound) -> None:
        """Confirms, returns, errors."""
        if inbound.method == spec.Channel.CloseOk:
            inbound.channel.collect()
            return
        if self._is_closed:
            if inbound.method == spec.Channel.Close:  # ours crossed theirs: it answers ours as well
                inbound.channel.send_method(spec.Channel.CloseOk)
            return
        method, args = inbound.method, inbound.args
        if method in (spec.Basic.Ack, spec.Basic.Nack):
            self._confirmed(args[0], multiple=args[1], ok=method == spec.Basic.Ack)
        elif method == spec.Basic.Return:
            assert inbound.content is not None
            self._on_return(args[2], args[3], inbound.content.body)
        elif method == spec.Channel.Close:
            inbound.channel.closed_by_broker()
            self._is_closed = True
            self._requests.lane_lost(self, args[0], args[1])

    def _on_return(self, exchange: str, key: str, body: bytes) -> None:
        """Nothing in a message that looks like oslo.messaging's own says which one it is. They
        come in the order of publishing, each before its confirm."""
        for number, (_, _, publication) in self.unconfirmed.items():
            if (
                not self._confirms.is_returned(number)
                and _comes_back(publication)
                and (*publication.address, publication.body) == (exchange, key, body)
            ):
                self._confirms.on_return(number)
                return

    def _confirmed(self, number: int, *, multiple: bool, ok: bool) -> None:
        for outgoing, returned in self._confirms.confirm(number, multiple=multiple):
            self._requests.confirmed(outgoing, ok=ok, returned=returned)
        self._requests.lane_progressed(self)

    def close(self) -> None:
        """Ask the broker to close it: nothing that it still says counts."""
        if not self._is_closed:
            self._is_closed = True
            self._confirms.channel.close_softly()

    def give_up(self, reason: str) -> None:
        """Close it: what is unconfirmed is in doubt. Harmless when that is done."""
        self.close()
        self._requests.lane_lost(self, 0, reason)


class Outbox:
    """What one VM has to publish."""

    def __init__(self, requests: Requests, vm: str) -> None:
        self._requests = requests
        self.vm = vm
        self.waiting: deque[Outgoing] = deque()
        self.lane: Lane | None = None
        self.in_line = False  # for a lane

    def on_declared(self, problem: str) -> None:
        """What the first of those that wait needs is there, or cannot be."""
        self._requests.declared(self, problem)

    def on_mismatch(self) -> None:
        """Nothing that a publisher minds."""


class Requests:
    """Every VM's outbox, and the channels."""

    def __init__(self, broker: BrokerForRequests) -> None:
        self._broker = broker
        self._outboxes: dict[str, Outbox] = {}
        self._lanes: set[Lane] = set()
        self._idle: list[Lane] = []  # the last one used is the next one taken
        self._line: deque[Outbox] = deque()  # for a lane
        self._unheard = Unheard()
        self._blocked = ""

    # ---------------------------------------------------------------- commands

    def publish(self, outgoing: Outgoing) -> None:
        """Publish; PublishResult follows."""
        problem = problem_of(outgoing.publication)
        if problem:
            self._done(outgoing, ok=False, unroutable=True, reason=problem)
        elif self._broker.link is None or self._blocked:
            self._done(outgoing, ok=False, reason=self._blocked or "not connected")
        else:
            outbox = self._outboxes.get(outgoing.vm)
            if outbox is None:
                outbox = self._outboxes[outgoing.vm] = Outbox(self, outgoing.vm)
            outbox.waiting.append(outgoing)
            self._advance(outbox)

    def discard(self, vm: str, reason: str) -> None:
        """Something has failed on this VM: what it has to publish is given up."""
        outbox = self._outboxes.pop(vm, None)
        if outbox is None:
            return
        if outbox in self._line:
            self._line.remove(outbox)
        self._fail_waiting(outbox, reason)
        if outbox.lane is not None:
            outbox.lane.give_up(reason)

    def vm_failed(self, vm: str, fault: str) -> None:
        """See `BrokerForRequests`."""
        self._broker.vm_failed(vm, fault)

    def on_blocked(self, reason: str) -> None:
        """The broker takes no messages for now (no memory, no disk), or "": takes them again."""
        self._blocked = reason

    # ---------------------------------------------------------------- outboxes

    def _advance(self, outbox: Outbox) -> None:
        """Publish what can be. Another VM's lane may have been given back, and have led here."""
        self._broker.within(outbox.vm, partial(self._publish_waiting, outbox), None)

    def _publish_waiting(self, outbox: Outbox) -> None:
        while outbox.waiting and not outbox.in_line and self._is_ready(outbox):
            if outbox.lane is None:
                self._lend(outbox)
                return
            if self._line and outbox.lane.lot >= LOT_MAX:
                return  # others wait: when all is confirmed it gets in line again
            outgoing = outbox.waiting.popleft()
            problem = self._unheard_problem(outgoing, outbox)
            if problem:
                self._done(outgoing, ok=False, unroutable=True, reason=problem)
            else:
                outbox.lane.publish(outgoing, self._broker.loop.time())

    def _is_ready(self, outbox: Outbox) -> bool:
        """Whether all is known that is to be of the first one's target; if not, it is told."""
        publication = outbox.waiting[0].publication
        (exchange, key), form = publication.address, publication.form
        declared = self._broker.declared
        if form is Form.MAIL:
            return True
        is_fanout = form is Form.FANOUT
        if not declared.has_exchange(exchange, outbox, fanout=is_fanout, make=False):
            return False
        return is_fanout or declared.look_at(key, outbox) is not None

    def _unheard_problem(self, outgoing: Outgoing, outbox: Outbox) -> str:
        """Why this is not to be published, for nobody listens; or "".

        oslo.messaging's servers have queues called like their routing keys. Somebody may have bound
        another: what is no notification is published in any case, and comes back if nobody has.
        """
        vm, publication = outgoing.vm, outgoing.publication
        if publication.form in (Form.MAIL, Form.FANOUT):
            return ""
        queue = publication.routing_key
        facts = self._broker.declared.look_at(queue, outbox)
        assert facts is not None  # _is_ready has seen to it
        if not facts.is_there:
            if publication.form is not Form.NOTIFY:
                return ""
            self._broker.declared.forget_queue(queue)  # a listener may come any moment
            return f"nobody has ever listened: there is no queue {queue}"
        if facts.consumers is None:
            return ""
        if facts.consumers:
            self._unheard.heard(vm, queue)
            return ""
        return self._unheard.admit(vm, queue, len(publication.body), facts)

    def declared(self, outbox: Outbox, problem: str) -> None:
        """What an outbox waited for is there, or cannot be."""
        if problem and outbox.waiting:
            outgoing = outbox.waiting.popleft()
            if problem != MISSING:
                self._done(outgoing, ok=False, reason=problem)
            elif _comes_back(outgoing.publication):
                self._done(outgoing, ok=False, unroutable=True, reason=MISSING)
            else:
                self._done(outgoing, ok=True, reason="nobody listens")
        self._advance(outbox)
        self._tidy(outbox)

    def _tidy(self, outbox: Outbox) -> None:
        """Forget it if it has nothing left."""
        is_known = self._outboxes.get(outbox.vm) is outbox
        if is_known and outbox.lane is None and not outbox.waiting:
            del self._outboxes[outbox.vm]

    # ---------------------------------------------------------------- lanes

    def _lend(self, outbox: Outbox) -> None:
        outbox.in_line = True
        self._line.append(outbox)
        self._serve_line()

    def _serve_line(self) -> None:
        while self._line:
            lane = self._free_lane()
            if lane is None:
                return
            outbox = self._line.popleft()
            outbox.in_line = False
            if not outbox.waiting:
                self._idle.append(lane)
                continue
            lane.outbox, lane.lot = outbox, 0
            outbox.lane = lane
            self._advance(outbox)
            self.lane_progressed(lane)

    def _free_lane(self) -> Lane | None:
        link = self._broker.link
        if self._idle:
            return self._idle.pop()
        if link is None or len(self._lanes) >= LANES_MAX:
            return None
        try:
            lane = Lane(self, link)
        except ResourceError as error:
            if not self._lanes:  # nobody will ever give one back
                self._fail_line(f"no AMQP channel left: {error}")
            return None
        self._lanes.add(lane)
        return lane

    def _fail_line(self, reason: str) -> None:
        line, self._line = self._line, deque()
        for outbox in line:
            outbox.in_line = False
            self._fail_waiting(outbox, reason)
            self._tidy(outbox)

    def _fail_waiting(self, outbox: Outbox, reason: str) -> None:
        waiting, outbox.waiting = outbox.waiting, deque()
        for outgoing in waiting:
            self._done(outgoing, ok=False, reason=reason)

    def lane_progressed(self, lane: Lane) -> None:
        """Something was confirmed: if that was all, the lane is free."""
        now_s = self._broker.loop.time()
        lane.since_s = now_s
        outbox = lane.outbox
        if outbox is None or lane.unconfirmed:
            return
        lane.outbox = outbox.lane = None
        self._idle.append(lane)
        self._advance(outbox)
        self._tidy(outbox)
        self._serve_line()

    def lane_lost(self, lane: Lane, code: int, text: str) -> None:
        """The broker closed it, or it was given up: what is unconfirmed is in doubt."""
        if lane not in self._lanes:
            return
        LOG.warning("%s: %s %s", str(lane), code, text)  # as it is now
        self._lanes.discard(lane)
        if lane in self._idle:
            self._idle.remove(lane)
        for outgoing in lane.lose():
            if code == NOT_FOUND:  # an exchange, which one is said in words only
                self._broker.declared.forget_exchange(outgoing.publication.address[0])
            self._done(outgoing, ok=False, reason=f"{code} {text}", in_doubt=True)
        outbox, lane.outbox = lane.outbox, None
        if outbox is not None:
            outbox.lane = None
            self._advance(outbox)
            self._tidy(outbox)
        self._serve_line()

    def watch(self, now_s: float) -> None:
        """Give up lanes whose confirms do not come, close those that nobody needs."""
        for lane in list(self._lanes):
            if lane.unconfirmed and now_s - lane.since_s >= CONFIRM_TIMEOUT_S:
                lane.give_up(f"the broker did not confirm for {CONFIRM_TIMEOUT_S} s")
        for lane in [lane for lane in self._idle if now_s - lane.since_s >= LANE_IDLE_S]:
            self._idle.remove(lane)
            self._lanes.discard(lane)
            lane.close()

    # ---------------------------------------------------------------- endings

    def confirmed(self, outgoing: Outgoing, *, ok: bool, returned: bool) -> None:
        """What the broker says of one."""
        publication = outgoing.publication
        if not returned:
            reason = "confirmed" if ok else "refused by the broker"
            self._done(outgoing, ok=ok, reason=reason, in_doubt=not ok)
        elif publication.form is Form.NOTIFY:
            self._broker.declared.forget_queue(publication.routing_key)
            self._done(outgoing, ok=False, unroutable=True, reason="its queue has just gone")
        else:
            self._done(outgoing, ok=False, unroutable=True, reason="there is no such queue")

    def on_disconnected(self, reason: str) -> None:
        """The connection is gone: nobody knows what became of the rest."""
        self._blocked = ""
        lanes, self._lanes = self._lanes, set()
        outboxes, self._outboxes = self._outboxes, {}
        self._idle.clear()
        self._line.clear()
        for lane in lanes:
            for outgoing in lane.lose():
                self._done(outgoing, ok=False, reason=reason, in_doubt=True)
        for outbox in outboxes.values():
            self._fail_waiting(outbox, reason)

    def _done(
        self,
        outgoing: Outgoing,
        *,
        ok: bool,
        reason: str,
        unroutable: bool = False,
        in_doubt: bool = False,
    ) -> None:
        self._broker.request_done(outgoing)
        self._broker.post(
            PublishResult(outgoing.vm, outgoing.request_id, ok, unroutable, reason, in_doubt)
        )
