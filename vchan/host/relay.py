"""One VM's requests on the host: between the broker and local programs above, the guest below.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; the ports handed in do what is decided.
2. The broker keeps a request until the guest has taken responsibility: a cast is acknowledged to
   the broker at the guest's receipt, a call when its reply has been published and confirmed. A
   reply in hand is published even if the broker has lost the request: not all queues are durable.
   A VM that the policy makes mute gives no receipts: there it is the session's acknowledgement.
3. Nothing here must be remembered for correctness. What is lost with this object, or with the
   broker's channel, the broker hands out again, and the guest knows the id.
4. The guest is told to forget an id only when the broker has proved that it has.

    broker --delivered--> Relay --Request--> guest
    broker <--ack-------- Relay <--Receipt-- guest                        (casts)
    broker <--publish_reply, then ack-- Relay <--Reply-- guest            (calls)
    broker --settled----> Relay --Settled--> guest
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final, Protocol

from vchan.bodies import encode_failure
from vchan.errors import LimitExceeded, Rejected
from vchan.exchange import (
    HEARTBEAT_S,
    Answered,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Requester,
    Send,
    Taken,
)
from vchan.host.envelope import BrokerRequest, cut_context, encode_reply, request_body
from vchan.host.gate import Gate
from vchan.host.limits import TokenBucket
from vchan.host.outbound import Offer, Outbound, Port
from vchan.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FANOUT,
    NO_AGENT,
    REDELIVERED,
    REFUSED,
    RELEASED,
    BadMessage,
    Cancel,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    decode,
    is_subscribe,
)

SETTLE_S: Final = 1.0
"""Acknowledged ids are settled in lots, this often at most."""
RETRY_S: Final = 1.0
"""A reply the broker did not confirm is published again after this."""
REPLY_KEPT_S: Final = 60.0
"""A reply whose caller's queue is gone, or that the broker no longer asks for, is kept so long: a
caller that lost its broker too makes its queue anew. oslo.messaging's own servers try as long
(kombu_missing_consumer_retry_timeout)."""
LOCAL_REQUESTS_MAX: Final = 256
"""Requests of local programs open at a time, for one VM."""
OPEN_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bodies of a VM's requests that are not over, and of its answers that are not published: a guest
need not read. What would be more, programs of this host are refused, and the broker keeps."""
TOPICS_SEEN_MAX: Final = 256
"""Topics a VM's agents may ever serve: each leaves a queue with the broker."""
SUBSCRIBE_S: Final = 1.0
"""A VM's consumers change this often at most: each change is work for the broker."""
TOPICS_JUDGED_PER_S: Final = 256
"""Topics judged at once, and then in a second: a guest may name others at will. Of what it says it
serves meanwhile, the last counts, as soon as it can be judged."""

GUEST_TOPIC: Final = Topic("openstack", "vchan.guest")
"""What every guest's daemon serves itself."""
DENIED_REPLY: Final = "the host's policy does not let this VM answer"
MUTE: Final = "this VM is not listened to, by the host's policy or as its channel has no way back"

_REASONS: Final = {
    NO_AGENT: "NoSuchAgent",
    AGENT_GONE: "AgentGone",
    BUSY: "Rejected",
    REFUSED: "Rejected",
}


class BrokerPort(Port, Protocol):
    """What a relay asks of the broker. Every method returns at once."""

    def consume(self, vm: str, topics: frozenset[Topic]) -> None:
        """From now on consume these topics for the VM."""

    def release(self, vm: str) -> None:
        """Stop consuming and hand everything unacknowledged back, in order."""

    def publish_reply(self, reply_q: str, body: bytes, key: bytes) -> None:
        """Publish; `Relay.published` comes with the key."""

    def barrier(self, vm: str, token: Any, ids: tuple[bytes, ...]) -> None:
        """`Relay.settled` comes when the broker has processed all acks up to the token's."""


class _Entry:
    """A request that is not over."""

    __slots__ = (
        "answer",
        "beat_s",
        "bytes",
        "kept_until_s",
        "local",
        "origin",
        "reply",
        "tokens",
        "topic",
    )

    def __init__(
        self,
        topic: Topic,
        origin: BrokerRequest | None,
        local: Callable[[Outcome], None] | None,
        size: int,
    ) -> None:
        self.topic = topic
        self.bytes = size
        self.origin = origin
        self.local = local
        self.tokens: list[Hashable] = []
        self.reply: bytes | None = None  # what is to be published
        self.answer = False  # ... and is under way
        self.kept_until_s = 0.0
        self.beat_s = float("-inf")  # when the next heartbeat may be published


class Relay:
    """One VM's requests.

    Args:
        vm: The domain's UUID.
        send: Queues a message on the guest's session.
        broker: None where no broker is configured.
        gate: What this VM may do.
        context_allow: The context keys that may enter a guest.
        offer: The programs on this host that guests' requests may be for.
        host: A name of this daemon's run, which no other has.
        unread: Bytes that were sent to the guest and still wait here, for it reads none: they stay
            when their request is over.
    """

    def __init__(
        self,
        vm: str,
        send: Send,
        broker: BrokerPort | None,
        gate: Gate,
        context_allow: frozenset[str],
        offer: Offer,
        host: str = "",
        unread: Callable[[], int] = lambda: 0,
    ) -> None:
        self.vm = vm
        self._send = send
        self._unread = unread
        self._broker = broker
        self._gate = gate
        self._context_allow = context_allow
        self.outbound = Outbound(vm, send, broker, gate, offer, host)
        self._requester = Requester(send)
        self._entries: dict[bytes, _Entry] = {}
        self._bytes = 0  # of all entries
        self._is_full = False  # the broker keeps what there is, until half of it is over
        self._local_open = 0
        self._named: tuple[Topic, ...] | None = None  # by the guest, last
        self._unheard = b""  # what a mute guest named last, for when it may be heard
        self._verdicts: dict[Topic, bool] = {}  # of what it named when that was judged
        self._judging = TokenBucket(TOPICS_JUDGED_PER_S, TOPICS_JUDGED_PER_S)
        self._judge_not_before_s = 0.0
        self._judge_at_s: float | None = None
        self._asked: frozenset[Topic] = frozenset()
        self._topics: frozenset[Topic] = frozenset()
        self._topics_seen: set[Topic] = set()
        self._consumed: frozenset[Topic] = frozenset()  # what the broker was last told
        self._consume_not_before_s = 0.0
        self._suspended = False
        self._is_first_topics = True
        self._mute = False
        self._handing_back = False  # released, and the broker has not said so yet
        self._settle_ids: list[bytes] = []
        self._settle_token: Hashable = None
        self._settle_at_s: float | None = None
        self._republish_at_s: float | None = None
        self._consume_at_s: float | None = None
        self._look_at_s: float | None = None  # whether there is room again
        self.counters = {
            "requests": 0,
            "redelivered": 0,
            "taken": 0,
            "answered": 0,
            "handed_back": 0,
            "expired": 0,
            "replies_given_up": 0,
            "bad_messages": 0,
            "discarded": 0,
            "replies_denied": 0,
            "topics_over_limit": 0,
            "held_up": 0,  # by OPEN_BYTES_MAX
        }

    @property
    def open_requests(self) -> int:
        """Requests that are not over."""
        return len(self._entries)

    # ---------------------------------------------------------------- the guest

    @property
    def topics(self) -> frozenset[Topic]:
        """The topics this VM's agents serve, and may."""
        return self._topics

    @property
    def denied(self) -> frozenset[Topic]:
        """The topics this VM's agents asked for and may not serve. That its daemon's own does not
        come from the broker is nobody's fault: programs here reach it all the same."""
        return self._asked - self._topics - {GUEST_TOPIC}

    @property
    def unconsumed(self) -> frozenset[Topic]:
        """Of `topics`, those whose requests the broker keeps, or has no queue for yet: the next
        change is not due, the guest is away, or it has more than it takes."""
        return self._topics - self._consumed if self._broker is not None else frozenset()

    def opened(self, *, resumed: bool, now_s: float, before: str = "") -> None:
        """The guest's session is open, or the guest speaks again after `suspend`.

        Args:
            before: The host that the guest had its last session with.
        """
        was_suspended, self._suspended = self._suspended, False
        self.outbound.opened(resumed=resumed, now_s=now_s, before=before)
        self._mute = self._gate.is_mute
        if not resumed:
            self._named, self._unheard = None, b""
            self._verdicts.clear()
            self._requester.opened(now_s)
        else:
            self._requester.resume(now_s)
            if was_suspended:
                self._consume_in_time(now_s)
        if self._mute:
            self._subscribe(sorted(self._gate.given_topics), now_s)

    def disconnected(self) -> None:
        """The guest cannot be reached until `opened`. What comes for it meanwhile is not sent, and
        so known not to have run if its time runs out."""
        self._requester.hold()

    def policy_changed(self, now_s: float) -> None:
        """Other topics may be allowed now."""
        self._mute = self._gate.is_mute
        self._verdicts.clear()
        self._judge_at_s = None
        if self._mute:
            self._subscribe(sorted(self._gate.given_topics), now_s)
            return
        if self._unheard:
            self._named, self._unheard = self._read_topics(self._unheard), b""
        if self._named or self._topics:
            self._subscribe(self._named or (), now_s)

    def _read_topics(self, data: bytes) -> tuple[Topic, ...]:
        message = decode(data)
        if isinstance(message, Subscribe):
            return message.topics
        self.counters["bad_messages"] += 1
        return ()

    def receive(self, data: bytes, now_s: float) -> None:
        """Take a message of the guest's: any bytes at all."""
        if self._mute:
            self.counters["discarded"] += 1
            if is_subscribe(data):
                self._unheard = data
            return
        message = decode(data)
        match message:
            case Reply() | Receipt() | Returned():
                for outcome in self._requester.receive(message):
                    self._settle_outcome(outcome, now_s)
            case Subscribe(topics):
                if topics != self._named:
                    self._named = topics
                    self._judge_in_time(now_s)
                elif self._judge_at_s is None:
                    self._consume_in_time(now_s)
            case Request() | Cancel() | Settled():
                self.outbound.receive(message, now_s)
            case BadMessage():
                self.counters["bad_messages"] += 1
            case _:
                self.counters["bad_messages"] += 1

    def _judge_in_time(self, now_s: float) -> None:
        """Judge what the guest named last, or as soon as it may have something judged again."""
        if now_s < self._judge_not_before_s:
            self._judge_at_s = self._judge_not_before_s
            return
        self._judge_at_s = None
        named = self._named or ()
        news = sum(topic not in self._verdicts for topic in named)
        self._judge_not_before_s = now_s + self._judging.take(news, now_s)
        self._subscribe(named, now_s)

    def _subscribe(self, topics: Sequence[Topic], now_s: float) -> None:
        verdicts = self._verdicts
        self._verdicts = {
            topic: verdicts[topic] if topic in verdicts else self._gate.may_listen(topic)
            for topic in topics
        }
        self._asked = frozenset(topics)
        allowed = list(filter(self._admit, topics))
        most = self._gate.topics_max
        self.counters["topics_over_limit"] += max(0, len(allowed) - most)
        self._topics = frozenset(allowed[:most])
        if self._is_first_topics:
            # What an earlier relay of this VM released may still be on its way to us.
            self._is_first_topics = False
            self._release()
        self._consume_in_time(now_s)

    def _admit(self, topic: Topic) -> bool:
        if not self._verdicts[topic]:
            return False
        if topic not in self._topics_seen:
            if len(self._topics_seen) >= TOPICS_SEEN_MAX:
                self.counters["topics_over_limit"] += 1
                return False
            self._topics_seen.add(topic)
        return True

    def _consume_in_time(self, now_s: float) -> None:
        """Consume the topics served now, or as soon as the consumers may change again."""
        self._consume_at_s = None
        if self._suspended or self._is_full or self._topics == self._consumed:
            return
        if now_s >= self._consume_not_before_s:
            self._consume(now_s)
        else:
            self._consume_at_s = self._consume_not_before_s

    def _consume(self, now_s: float) -> None:
        if self._broker is not None:
            self._consume_not_before_s = now_s + SUBSCRIBE_S
            self._consumed = self._topics
            self._broker.consume(self.vm, self._topics)

    def _settle_outcome(self, outcome: Outcome, now_s: float) -> None:
        entry = self._entries[outcome.id]
        if entry.local is not None:
            self._finish_local(outcome, entry)
            return
        match outcome:
            case Taken(request_id):
                self.counters["taken"] += 1
                self._finish(request_id, now_s)
            case Answered(request_id, failed, body):
                self.counters["answered"] += 1
                if not self._gate.may_reply(entry.topic):
                    self.counters["replies_denied"] += 1
                    failed, body = True, encode_failure("Rejected", DENIED_REPLY)
                self._publish(request_id, entry, failed, body, now_s)
            case Heartbeat():
                self._publish_heartbeat(entry, now_s)
            case HandedBack(request_id, reason, text):
                self.counters["handed_back"] += 1
                self._handed_back(request_id, entry, reason, text, now_s)
            case Overdue(request_id):
                self.counters["expired"] += 1
                self._finish(request_id, now_s)

    def _finish_local(self, outcome: Outcome, entry: _Entry) -> None:
        assert entry.local is not None
        if not isinstance(outcome, Heartbeat):
            self._drop(outcome.id)
            self._requester.settle((outcome.id,))
        entry.local(outcome)

    def _handed_back(
        self, request_id: bytes, entry: _Entry, reason: int, text: str, now_s: float
    ) -> None:
        if reason == EXPIRED:
            self._finish(request_id, now_s)
        elif entry.origin is not None and entry.origin.is_call:
            failure = encode_failure(_REASONS.get(reason, "Rejected"), text)
            self._publish(request_id, entry, True, failure, now_s)
        elif reason in (NO_AGENT, BUSY):
            self._hand_to_broker(request_id, now_s)
        else:
            self._finish(request_id, now_s)

    def _hand_to_broker(self, request_id: bytes, now_s: float) -> None:
        """A cast nobody can take now. Closing the channel keeps it in its place in the queue."""
        self._drop(request_id)
        if self._consumed:
            self._release()
            self._consume_at_s = now_s + RETRY_S

    def _add(self, request_id: bytes, entry: _Entry) -> None:
        self._entries[request_id] = entry
        self._bytes += entry.bytes

    def _drop(self, request_id: bytes) -> _Entry:
        entry = self._entries.pop(request_id)
        self._bytes -= entry.bytes
        if entry.local is not None:
            self._local_open -= 1
        self._look_for_room()
        return entry

    @property
    def _held_bytes(self) -> int:
        return max(self._bytes, self._unread())

    def _has_room(self, size: int) -> bool:
        held = self._held_bytes
        return not held or held + size <= OPEN_BYTES_MAX

    def _look_for_room(self) -> None:
        if self._is_full and self._held_bytes <= OPEN_BYTES_MAX // 2:
            self._is_full = False
            self._look_at_s = None
            self._consume_at_s = self._consume_not_before_s

    # ---------------------------------------------------------------- the broker

    def delivered(
        self,
        token: Hashable,
        origin: BrokerRequest,
        topic: Topic,
        *,
        fanout: bool,
        redelivered: bool,
        now_s: float,
    ) -> None:
        """The broker handed out a request, perhaps not for the first time.

        Raises:
            LimitExceeded: It is larger than the guest takes. It is answered with a failure (a
                call) or dropped (a cast) and acknowledged.
        """
        if self._handing_back or topic not in self._consumed:
            return  # of a channel that is gone: taken now, it would overtake what comes before it
        entry = self._entries.get(origin.id)
        if entry is not None:
            self.counters["redelivered"] += 1
            entry.tokens.append(token)
            return
        request = self._make_request(origin, topic, fanout=fanout, redelivered=redelivered)
        if not self._has_room(len(request.body)):
            self.counters["held_up"] += 1
            self._is_full = True
            self._look_at_s = now_s + RETRY_S
            self._release()  # keeps it in its place in the queue
            return
        self.counters["requests"] += 1
        entry = _Entry(topic, origin, None, len(request.body))
        self._add(origin.id, entry)
        entry.tokens.append(token)
        if self._mute and origin.is_call:
            self._publish(origin.id, entry, True, encode_failure("Rejected", MUTE), now_s)
            return
        try:
            self._requester.submit(request, now_s)
        except LimitExceeded as error:
            self._requester.forget(origin.id)
            if origin.is_call:
                failure = encode_failure("LimitExceeded", str(error))
                self._publish(origin.id, entry, True, failure, now_s)
            else:
                self._finish(origin.id, now_s)
            raise

    def _make_request(
        self, origin: BrokerRequest, topic: Topic, *, fanout: bool, redelivered: bool
    ) -> Request:
        flags = (
            (CALL if origin.is_call else 0)
            | (FANOUT if fanout else 0)
            | (REDELIVERED if redelivered else 0)
        )
        return Request(
            origin.id,
            flags,
            _milliseconds(origin.timeout_s),
            _milliseconds(origin.monitor_timeout_s),
            topic.exchange,
            topic.name,
            self.vm,
            request_body(origin, self._context_allow),
        )

    def _publish(
        self, request_id: bytes, entry: _Entry, failed: bool, body: bytes, now_s: float
    ) -> None:
        origin = entry.origin
        assert origin is not None and origin.msg_id is not None  # the Requester looks to that
        if failed:
            entry.reply = encode_reply(
                origin.msg_id, failure_json=body, may_raise=self._gate.may_raise
            )
        else:
            entry.reply = encode_reply(
                origin.msg_id, result_json=body, values_max=self._gate.values_max
            )
        self._bytes += len(entry.reply) - entry.bytes
        entry.bytes = len(entry.reply)
        entry.kept_until_s = now_s + REPLY_KEPT_S
        self._publish_again(request_id, entry)

    def _publish_again(self, request_id: bytes, entry: _Entry) -> None:
        assert entry.origin is not None and entry.reply is not None
        assert entry.origin.reply_q is not None and self._broker is not None
        entry.answer = True
        self._broker.publish_reply(entry.origin.reply_q, entry.reply, request_id)

    def _publish_heartbeat(self, entry: _Entry, now_s: float) -> None:
        if now_s < entry.beat_s:
            return  # a guest may send them at will
        entry.beat_s = now_s + HEARTBEAT_S
        origin = entry.origin
        assert origin is not None and origin.msg_id is not None
        assert origin.reply_q is not None and self._broker is not None
        body = encode_reply(origin.msg_id, ending=False)
        self._broker.publish_reply(origin.reply_q, body, b"")

    def published(self, key: bytes, *, ok: bool, now_s: float, gone: bool = False) -> None:
        """A reply is safe with the broker, or is not.

        Args:
            gone: The caller's queue is not there; the caller may be away, or gone for good.
        """
        entry = self._entries.get(key)
        if entry is None or not entry.answer:
            return
        entry.answer = False
        if ok:
            self._finish(key, now_s)
        elif now_s >= entry.kept_until_s and (gone or not entry.tokens):
            self.counters["replies_given_up"] += 1
            self._finish(key, now_s)
        elif self._republish_at_s is None:
            self._republish_at_s = now_s + RETRY_S

    def _finish(self, request_id: bytes, now_s: float) -> None:
        """It is over: let the broker forget it, and by and by the guest."""
        assert self._broker is not None
        entry = self._drop(request_id)
        for token in entry.tokens:
            self._broker.ack(token)
        if entry.tokens:
            self._settle_ids.append(request_id)
            self._settle_token = entry.tokens[-1]
            if self._settle_at_s is None:
                self._settle_at_s = now_s + SETTLE_S

    def settled(self, ids: Iterable[bytes]) -> None:
        """The broker has proved that it has forgotten these."""
        self._requester.settle(ids)

    def released(self) -> None:
        """The VM's channel is gone, and all its tokens: what was not over comes again."""
        self._handing_back = False
        self._drop_tokens()

    def _release(self) -> None:
        if self._broker is not None:
            self._handing_back = True
            self._consumed = frozenset()
            self._broker.release(self.vm)
            self._drop_tokens()
            self.outbound.relisten()

    def _drop_tokens(self) -> None:
        self._settle_ids.clear()
        self._settle_at_s = None
        for entry in self._entries.values():
            entry.tokens.clear()

    # ---------------------------------------------------------------- local programs

    def submit_local(
        self, request: Request, answer: Callable[[Outcome], None], now_s: float
    ) -> None:
        """A request of a program on this host.

        Args:
            answer: Told each outcome; exactly one of them is not a Heartbeat.

        Raises:
            LimitExceeded: Too many are open, or it is too large. Nothing was sent.
            Rejected: It is a call, and the VM may not answer.
        """
        if self._mute and request.is_call:
            raise Rejected(MUTE)
        if self._local_open >= LOCAL_REQUESTS_MAX:
            limit = LOCAL_REQUESTS_MAX
            raise LimitExceeded("open local requests", limit + 1, limit, "LOCAL_REQUESTS_MAX")
        if request.id in self._entries:
            return  # the client repeats itself; it is told when there is news
        request = request._replace(body=cut_context(request.body, self._context_allow))
        size = len(request.body)
        if not self._has_room(size):
            total = self._held_bytes + size
            raise LimitExceeded("bytes of open requests", total, OPEN_BYTES_MAX, "OPEN_BYTES_MAX")
        self._add(request.id, _Entry(request.target, None, answer, size))
        self._local_open += 1
        try:
            self._requester.submit(request, now_s)
        except LimitExceeded:
            self._requester.forget(request.id)
            self._drop(request.id)
            raise

    def cancel_local(self, request_id: bytes) -> None:
        """The program no longer waits."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.local is not None:
            self._drop(request_id)
            self._requester.cancel(request_id)

    # ---------------------------------------------------------------- a VM that is mute

    @property
    def waits_for_reception(self) -> bool:
        """Whether `received_all` would be news: a mute VM has been sent something."""
        return self._mute and bool(self._entries)

    def received_all(self, now_s: float) -> None:
        """The guest has acknowledged every frame: that is all a mute VM says of its casts."""
        if self._mute:
            for request_id, entry in list(self._entries.items()):
                if entry.reply is None and self._requester.has_sent(request_id):
                    self._requester.forget(request_id)
                    self._settle_outcome(Taken(request_id), now_s)

    # ---------------------------------------------------------------- the end

    def suspend(self) -> None:
        """The guest is away, or going: hand back to the broker what is not over, until `opened`.

        What the guest still says of it counts; the copies that the broker hands out are harmless.
        """
        if self._suspended or self._broker is None:
            return
        self._suspended = True
        self._consume_at_s = None
        self.outbound.suspend()
        self._release()

    def release(self, reason: str) -> None:
        """The VM is no longer here: everything that is not over goes back where it came from."""
        self.outbound.suspend()
        self.outbound.release()
        self._release()
        self._consume_at_s = None
        self._judge_at_s = None
        self._topics = self._asked = frozenset()
        entries, self._entries = self._entries, {}
        self._local_open = self._bytes = 0
        self._is_full = False
        self._look_at_s = None
        for request_id, entry in entries.items():
            self._requester.forget(request_id)
            if entry.local is not None:
                entry.local(HandedBack(request_id, RELEASED, reason))

    # ---------------------------------------------------------------- time

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        times = [
            at_s
            for at_s in (
                self._settle_at_s,
                self._republish_at_s,
                self._consume_at_s,
                self._look_at_s,
                self._judge_at_s,
                self._requester.next_timeout(),
                self.outbound.next_timeout(),
            )
            if at_s is not None
        ]
        return min(times) if times else None

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        for outcome in self._requester.handle_timeout(now_s):
            self._settle_outcome(outcome, now_s)
        self.outbound.handle_timeout(now_s)
        if self._settle_at_s is not None and now_s >= self._settle_at_s:
            self._settle_at_s = None
            ids, self._settle_ids = tuple(self._settle_ids), []
            assert self._broker is not None and ids
            self._broker.barrier(self.vm, self._settle_token, ids)
        if self._republish_at_s is not None and now_s >= self._republish_at_s:
            self._republish_at_s = None
            for request_id, entry in list(self._entries.items()):
                if entry.reply is not None and not entry.answer:
                    self._publish_again(request_id, entry)
        if self._judge_at_s is not None and now_s >= self._judge_at_s:
            self._judge_in_time(now_s)
        if self._look_at_s is not None and now_s >= self._look_at_s:
            self._look_at_s = now_s + RETRY_S
            self._look_for_room()
        if self._consume_at_s is not None and now_s >= self._consume_at_s:
            self._consume_in_time(now_s)

    def summary(self) -> dict[str, Any]:
        """What `vchan status` shows of this VM's requests."""
        return {
            **self.counters,
            "open": len(self._entries),
            "open_bytes": self._bytes,
            "topics": sorted(f"{t.exchange}/{t.name}" for t in self._topics),
            "unconsumed_topics": sorted(f"{t.exchange}/{t.name}" for t in self.unconsumed),
            "denied_topics": sorted(f"{t.exchange}/{t.name}" for t in self.denied),
            "from_guest": self.outbound.summary(),
        }


def _milliseconds(seconds: float | None) -> int:
    """For the wire: 0 means none, so what is nearly over is 1."""
    if seconds is None:
        return 0
    return min(max(1, int(seconds * 1000)), 0xFFFFFFFF)
