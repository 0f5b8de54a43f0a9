"""Requests of guests to the control side: published with confirms, as oslo.messaging's clients do.

Rules of this file
1. A channel is lent to one VM at a time, until everything published on it is confirmed. So what
   goes wrong on it, as with an exchange that has just gone, touches that VM alone.
2. A VM's publications go out in the order of its commands. One that waits for its exchange, its
   queue or a channel holds up those behind it, and no other VM's.
3. `Sent` comes once for each. What is in doubt is not `ok`.

    publish --> Outbox (one per VM) --its turn--> Lane (a channel) --confirmed, returned--> Sent
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from vchan.host.amqp_link import Channel, Inbound, Link, Message, Owner, ResourceError, spec
from vchan.host.broker_declared import NOT_FOUND, Declared
from vchan.host.broker_events import BrokerEvent, Form, Publication, Sent
from vchan.host.envelope import REQUEST_BYTES_MAX
from vchan.loop import Loop
from vchan.messages import NAME_BYTES_MAX

LOG = logging.getLogger(__name__)

REQUESTS_MAX: Final = 4096
"""Requests of all VMs given to be published and not yet confirmed."""
REQUESTS_BYTES_MAX: Final = 64 * 1024 * 1024
VM_REQUESTS_MAX: Final = 256
"""Likewise of one VM's, so that it does not take what is there for all."""
VM_REQUESTS_BYTES_MAX: Final = REQUEST_BYTES_MAX
LANES_MAX: Final = 256
"""Channels for VMs that publish at the moment. A connection has 2047 for everything."""
LOT_MAX: Final = 64
"""Published in a row by a VM while others wait for a channel."""
LANE_IDLE_S: Final = 60.0
"""A channel that nobody has needed for this long is closed."""
CONFIRM_TIMEOUT_S: Final = 60.0
"""For the broker to confirm. A quorum queue without its majority does not."""
EXPIRATION_MS_MAX: Final = 2**32 - 1
"""RabbitMQ's."""


class Hub(Protocol):
    """What requests ask of the `Broker` they belong to."""

    loop: Loop
    link: Link | None
    post: Callable[[BrokerEvent], None]
    declared: Declared

    def request_done(self, outgoing: Outgoing) -> None:
        """It is confirmed, or will never be."""


class Outgoing(NamedTuple):
    """A request to be published."""

    vm: str
    request_id: bytes
    publication: Publication


def _comes_back(publication: Publication) -> bool:
    """Whether it comes back if there is no queue for it. A notification's queue was made sure of:
    if that is gone by now, it shall not be lost without a word."""
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


class Lane(Owner):
    """A channel with confirms, lent to one VM's outbox at a time."""

    def __init__(self, requests: Requests, link: Link) -> None:
        self._requests = requests
        self._channel: Channel | None = link.channel(self)
        self._channel.ask(spec.Confirm.Select, "b", False)
        self._next_number = 1
        self._returned: set[int] = set()
        self.unconfirmed: dict[int, Outgoing] = {}  # by the number the broker confirms, ascending
        self.outbox: Outbox | None = None
        self.lot = 0  # published since it was lent
        self.since_s = 0.0  # when the oldest unconfirmed was published, or the last confirmed

    def publish(self, outgoing: Outgoing, now_s: float) -> None:
        """Send it."""
        assert self._channel is not None
        if not self.unconfirmed:
            self.since_s = now_s
        number, self._next_number = self._next_number, self._next_number + 1
        self.unconfirmed[number] = outgoing
        self.lot += 1
        _, _, _, body, expiration_ms, _ = outgoing.publication
        properties: dict[str, Any] = {}
        if expiration_ms is not None:
            properties["expiration"] = str(min(expiration_ms, EXPIRATION_MS_MAX))
        message = Message(
            body,
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=2,
            priority=0,
            application_headers={},
            **properties,
        )
        args = (0, *outgoing.publication.address, _comes_back(outgoing.publication), False)
        self._channel.ask(spec.Basic.Publish, "Bssbb", *args, content=message)

    def on_method(self, inbound: Inbound) -> None:
        """Confirms, returns, errors."""
        if inbound.method == spec.Channel.CloseOk:
            inbound.channel.collect()
            return
        if inbound.channel is not self._channel:
            if inbound.method == spec.Channel.Close:  # ours crossed theirs: it answers ours as well
                inbound.channel.send_method(spec.Channel.CloseOk)
            return
        method, args = inbound.method, inbound.args
        if method in (spec.Basic.Ack, spec.Basic.Nack):
            self._confirmed(args[0], multiple=args[1], ok=method == spec.Basic.Ack)
        elif method == spec.Basic.Return:
            self._on_return(args[2], args[3], bytes(inbound.content.body or b""))
        elif method == spec.Channel.Close:
            inbound.channel.closed_by_broker()
            self._channel = None
            self._requests.lane_lost(self, args[0], args[1])

    def _on_return(self, exchange: str, key: str, body: bytes) -> None:
        """Nothing in a message that looks like oslo.messaging's own says which one it is. They
        come in the order of publishing, each before its confirm."""
        for number, (_, _, publication) in self.unconfirmed.items():
            if (
                number not in self._returned
                and _comes_back(publication)
                and (*publication.address, publication.body) == (exchange, key, body)
            ):
                self._returned.add(number)
                return

    def _confirmed(self, number: int, *, multiple: bool, ok: bool) -> None:
        numbers = [number]
        if multiple:
            numbers = []
            for candidate in self.unconfirmed:
                if number and candidate > number:  # 0: all of them
                    break
                numbers.append(candidate)
        for confirmed in numbers:
            outgoing = self.unconfirmed.pop(confirmed, None)
            if outgoing is not None:
                returned = confirmed in self._returned
                self._returned.discard(confirmed)
                self._requests.confirmed(outgoing, ok=ok, returned=returned)
        self._requests.lane_progressed(self)

    def close(self) -> None:
        """Ask the broker to close it: nothing that it still says counts."""
        assert self._channel is not None
        self._channel.close_softly()
        self._channel = None


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


class Requests:
    """Every VM's outbox, and the channels."""

    def __init__(self, broker: Hub) -> None:
        self._broker = broker
        self._outboxes: dict[str, Outbox] = {}
        self._lanes: set[Lane] = set()
        self._idle: list[Lane] = []  # the last one used is the next one taken
        self._line: deque[Outbox] = deque()  # for a lane
        self._blocked = ""

    # ---------------------------------------------------------------- commands

    def publish(self, outgoing: Outgoing) -> None:
        """Publish; Sent follows."""
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

    def on_blocked(self, reason: str) -> None:
        """The broker takes no messages for now (no memory, no disk), or "": takes them again."""
        self._blocked = reason

    # ---------------------------------------------------------------- outboxes

    def _advance(self, outbox: Outbox) -> None:
        """Publish what can be."""
        while outbox.waiting and not outbox.in_line and self._is_ready(outbox):
            if outbox.lane is None:
                self._lend(outbox)
                return
            if self._line and outbox.lane.lot >= LOT_MAX:
                return  # others wait: when all is confirmed it gets in line again
            outbox.lane.publish(outbox.waiting.popleft(), self._broker.loop.time())

    def _is_ready(self, outbox: Outbox) -> bool:
        """Whether all that the first one needs is there; if not, it is told."""
        publication = outbox.waiting[0].publication
        (exchange, key), form = publication.address, publication.form
        declared = self._broker.declared
        if form is Form.MAIL:
            return True
        if not declared.has_exchange(exchange, outbox, fanout=form is Form.FANOUT):
            return False
        return form is not Form.NOTIFY or declared.has_queue(exchange, key, outbox)

    def declared(self, outbox: Outbox, problem: str) -> None:
        """What an outbox waited for is there, or cannot be."""
        if problem and outbox.waiting:
            self._done(outbox.waiting.popleft(), ok=False, reason=problem)
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
        LOG.warning("a channel for guests' requests: %s %s", code, text)
        self._lanes.discard(lane)
        if lane in self._idle:
            self._idle.remove(lane)
        lost, lane.unconfirmed = lane.unconfirmed, {}
        for outgoing in lost.values():
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
                lane.close()
                self.lane_lost(lane, 0, f"the broker did not confirm for {CONFIRM_TIMEOUT_S} s")
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
            self._broker.declared.forget_queue(*publication.address)
            self._done(outgoing, ok=False, reason="its queue has just gone: it can be made again")
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
            lost, lane.unconfirmed = lane.unconfirmed, {}
            for outgoing in lost.values():
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
        self._broker.post(Sent(outgoing.vm, outgoing.request_id, ok, unroutable, reason, in_doubt))
