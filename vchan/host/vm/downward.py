"""One VM's requests on the host: between the broker and local programs above, the guest below.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; the ports handed in do what is decided.
2. The broker keeps a request until the guest has taken responsibility: a cast is completed at the
   guest's receipt, a call at its reply. A reply in hand is published even if the broker has lost
   the request: not all queues are durable. A VM that the policy makes mute gives no receipts: there
   it is the session's acknowledgement.
3. What is over is one command to the broker's thread, `complete`, which publishes the reply,
   acknowledges, has the broker prove that it has forgotten the request, and says once that all is
   done. A call whose caller is to hear that it has not run may come again instead of that: it is
   decided anew, here or at another host.
4. Nothing here must be remembered for correctness. What is lost with this object, or with the
   broker's channel, the broker hands out again, and the guest knows the id.
5. The guest is told to forget an id only when the broker has proved that it has.

    broker --delivered--> Downward --Request--> guest
    broker <--complete--- Downward <--Receipt-- guest          (casts)
    broker <--complete--- Downward <--Reply---- guest          (calls; Returned: it does not run)
    broker --completed--> Downward --Settled--> guest
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

from vchan.errors import LimitExceeded, Rejected
from vchan.host.oslo_wire.downward_envelope import (
    BrokerRequest,
    ReplyPublication,
    cut_context,
    encode_reply,
    request_body,
)
from vchan.host.policy.rules import INTO
from vchan.host.vm.consumption import Consumption, ConsumptionBrokerPort
from vchan.host.vm.dropped_casts import RETURNS_WARN, DroppedCasts
from vchan.host.vm.finished_requests import FinishedRequests
from vchan.host.vm.gate import Gate
from vchan.host.vm.open_requests import OpenRequest, OpenRequests
from vchan.host.vm.reports import Reports
from vchan.host.vm.served_topics import ServedTopics
from vchan.host.vm.upward import Offer, Upward, UpwardBrokerPort
from vchan.rpc.bodies import encode_failure
from vchan.rpc.in_flight import (
    COMES_AGAIN,
    HEARTBEAT_S,
    Answered,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Requester,
    Send,
    Taken,
    doubted,
    earliest,
)
from vchan.rpc.messages import (
    CALL,
    EXPIRED,
    FANOUT,
    GUEST_TOPIC,
    IN_PLACE,
    LOCAL,
    OUT_OF_TURN,
    REDELIVERED,
    RELEASED,
    Cancel,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    Unknown,
    decode,
    is_request,
    is_subscribe,
    milliseconds,
)
from vchan.rpc.outcomes import Ran, ending_of

LOCAL_REQUESTS_MAX: Final = 256
"""Requests of local programs open at a time, for one VM. At it: Returned: BUSY."""
OPEN_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bodies of a VM's requests that are not over, and of its answers that are not published: a guest
need not read. At it: the broker keeps its messages (`held_up`), programs of this host are
refused."""
GUEST_TAKES_NO_RAW: Final = (
    "this VM's vchan-guest takes no raw bodies: upgrade it, or call with JSON"
)
DENIED_REPLY: Final = "the host's policy does not let this VM answer"
MUTE: Final = "this VM is not listened to"
"""Callers are told why, too. A guest is not: a host's policy is not its business."""


class BrokerPort(ConsumptionBrokerPort, UpwardBrokerPort, Protocol):
    """What a VM asks of the broker. Every method returns at once and raises nothing."""

    def complete(
        self,
        vm: str,
        request_id: bytes,
        tokens: tuple[Any, ...],
        reply: ReplyPublication | None = None,
    ) -> None:
        """It is over: publish the reply, acknowledge, prove. `Downward.completed` comes."""

    def publish_heartbeat(self, reply_q: str, body: bytes) -> None:
        """Tell a caller that its call is under way, if that can be done now."""


class Downward:
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
        tell: Told, for the log, of each cast that is dropped.
        reports: See `Upward`.
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
        tell: Callable[[str], None] = lambda _: None,
        reports: Reports | None = None,
    ) -> None:
        self.vm = vm
        self._unread = unread
        self._broker = broker
        self._gate = gate
        self._context_allow = context_allow
        # The session carries both directions: `receive` hands on what belongs to the other.
        self.upward = Upward(vm, send, broker, gate, offer, host, unread, reports)
        self._requester = Requester(send, marks_turns=True)
        self._guest = b""  # the run of its daemon that we talk to
        self._open = OpenRequests()
        self._finished = FinishedRequests()
        self._served = ServedTopics(gate, self._count_over_limit)
        self._unheard = b""  # what a mute guest named last, for when it may be heard
        self._consumption = Consumption(vm, broker, gate, self._served, self._let_go)
        self._mute = False
        self.unknown_kind = 0  # of the last message whose kind was not known
        self.counters = {
            "requests": 0,
            "redelivered": 0,
            "taken": 0,
            "answered": 0,
            "handed_back": 0,
            "expired": 0,
            "replies_given_up": 0,
            "bad_messages": 0,
            "unknown_messages": 0,  # of kinds that a later version may have
            "discarded": 0,
            "replies_denied": 0,
            "topics_over_limit": 0,
            "held_up": 0,  # by OPEN_BYTES_MAX
            # Casts that no agent has taken, and will not:
            "casts_refused": 0,  # by the guest
            "casts_agent_gone": 0,
            "casts_expired": 0,
            "casts_too_large": 0,
            "undecodable": 0,  # whatever they were
            "parked": 0,
            "dropped_by_broker": 0,  # given back to it, and not handed out again
            "many_returns": 0,  # RETURNS_WARN
            "context_keys_removed": 0,
        }
        self._dropped = DroppedCasts(self.counters, tell)

    @property
    def open_requests(self) -> int:
        """Requests that are not over."""
        return len(self._open)

    # ---------------------------------------------------------------- the guest

    @property
    def topics(self) -> frozenset[Topic]:
        """The topics this VM's agents serve, and may."""
        return self._served.allowed

    @property
    def denied(self) -> frozenset[Topic]:
        """The topics this VM's agents asked for and may not serve. That its daemon's own does not
        come from the broker is nobody's fault: programs here reach it all the same."""
        return self._served.asked - self.topics - {GUEST_TOPIC}

    @property
    def unconsumed(self) -> frozenset[Topic]:
        """Of `topics`, those whose requests the broker keeps, or has no queue for: the next change
        is not due, the broker has not confirmed the last one, or cannot say the name; the guest is
        away, or has more than it takes."""
        return self._consumption.lacking

    def opened(
        self,
        *,
        resumed: bool,
        now_s: float,
        before: str = "",
        guest: bytes = b"",
        takes_raw: int = 0,
    ) -> None:
        """The guest's session is open, or the guest speaks again after `suspend`.

        Args:
            before: The host that the guest had its last session with.
            guest: Names the run of the guest's daemon, unless `resumed`.
            takes_raw: See `Peer.takes_raw`.
        """
        was_suspended = self._consumption.opened()
        self.upward.opened(resumed=resumed, now_s=now_s, before=before)
        self._mute = self._gate.is_mute
        if not resumed:
            is_known, self._guest = bool(guest) and guest == self._guest, guest
            if not is_known:
                self._finished.guest_restarted()
            self._unheard = b""
            self._served.begin()
            self._requester.opened(
                now_s, is_known=is_known, takes_raw=takes_raw, no_raw=GUEST_TAKES_NO_RAW
            )
        else:
            self._requester.resume(now_s)
            if was_suspended:
                self._consumption.update(now_s)
        if self._mute:
            self._subscribe(sorted(self._gate.given_topics), now_s)

    def disconnected(self) -> None:
        """The guest cannot be reached until `opened`. What comes for it meanwhile is not sent, and
        so known not to have run if its time runs out."""
        self._requester.hold()
        self.upward.disconnected()

    @property
    def is_mute(self) -> bool:
        """Nothing that the guest says is heard."""
        return self._mute

    def policy_changed(self, now_s: float) -> None:
        """Other topics may be allowed now."""
        self._mute = self._gate.is_mute
        self._served.forget_verdicts()
        if self._mute:
            self._subscribe(sorted(self._gate.given_topics), now_s)
            return
        if self._unheard:
            self._served.named, self._unheard = self._read_topics(self._unheard), b""
        if self._served.named or self.topics:
            self._subscribe(self._served.named or (), now_s)

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
            elif is_request(data):
                self._turn_away(data, now_s)
            return
        message = decode(data)
        match message:
            case Reply() | Receipt() | Returned():
                for outcome in self._requester.receive(message):
                    self._note_outcome(outcome, now_s)
            case Subscribe(topics):
                if self._served.name(topics, now_s):
                    self._consumption.judged(now_s)
                elif self._served.judge_at_s is None:
                    self._consumption.update(now_s)
            case Request() | Cancel() | Settled():
                self.upward.receive(message, now_s)
            case Unknown(kind):
                self.counters["unknown_messages"] += 1
                self.unknown_kind = kind
            case _:
                self.counters["bad_messages"] += 1

    def _turn_away(self, data: bytes, now_s: float) -> None:
        """A mute VM's request, of which the head alone is looked at."""
        request = decode(data)
        if isinstance(request, Request):
            self.upward.turn_away(request, MUTE, now_s)

    def _subscribe(self, topics: Sequence[Topic], now_s: float) -> None:
        self._served.ask(topics)
        self._consumption.judged(now_s)

    def _count_over_limit(self, topics: int) -> None:
        self.counters["topics_over_limit"] += topics

    def _note_outcome(self, outcome: Outcome, now_s: float) -> None:
        entry = self._open.by_id[outcome.id]
        entry.guest = self._guest
        if entry.local is not None:
            self._finish_local(outcome, entry)
            return
        match outcome:
            case Taken(request_id):
                self.counters["taken"] += 1
                self._finish(request_id)
            case Answered(request_id, failed, body):
                self.counters["answered"] += 1
                if not self._gate.may_reply(entry.topic):
                    self.counters["replies_denied"] += 1
                    text = f"{DENIED_REPLY}: {self._gate.why_no_reply(entry.topic)}"
                    failed, body = True, encode_failure("BadReply", text)
                self._reply(request_id, entry, failed, body)
            case Heartbeat():
                self._publish_heartbeat(entry, now_s)
            case HandedBack(request_id, reason, text):
                self.counters["handed_back"] += 1
                self._handed_back(request_id, entry, reason, text, now_s)
            case Overdue(request_id):
                self.counters["expired"] += 1
                if not entry.is_call:
                    self._dropped.count(request_id, entry, "casts_expired", "its time is over")
                self._finish(request_id)

    def _finish_local(self, outcome: Outcome, entry: OpenRequest) -> None:
        assert entry.local is not None
        if not isinstance(outcome, Heartbeat):
            self._drop(outcome.id)
            self._requester.settle((outcome.id,))
        entry.local(outcome)

    def _handed_back(
        self, request_id: bytes, entry: OpenRequest, reason: int, text: str, now_s: float
    ) -> None:
        is_call = entry.is_call
        if not is_call and reason not in COMES_AGAIN:
            self._dropped.count_returned(request_id, entry, reason, text)
        if reason == EXPIRED:
            self._finish(request_id)
        elif is_call:
            ending = ending_of(reason)
            kind = ending.error.__name__
            if ending.ran is Ran.NO:
                self._refuse(request_id, entry, kind, text)
            else:
                self._reply(request_id, entry, True, encode_failure(kind, text))
        elif reason in COMES_AGAIN:
            # A cast that nobody can take now.
            self._drop(request_id)
            self._consumption.hand_back(now_s)
        else:
            self._finish(request_id)

    def _refuse(self, request_id: bytes, entry: OpenRequest, kind: str, text: str) -> None:
        """Tell its caller that it has not run, as soon as it cannot run any more."""
        if entry.tokens:
            self._reply(request_id, entry, True, encode_failure(kind, text), has_not_run=True)
        else:
            self._drop(request_id)  # handed back meanwhile: it comes again, and is decided anew

    def _refuse_unsent(
        self, request_id: bytes, entry: OpenRequest, kind: str, text: str, redelivered: bool
    ) -> None:
        """As `_refuse`, of what cannot be given to the guest; unless it was, before."""
        if redelivered:
            failure = encode_failure("AgentGone", doubted(text))
            self._reply(request_id, entry, True, failure)
        else:
            self._refuse(request_id, entry, kind, text)

    def _drop(self, request_id: bytes) -> OpenRequest:
        entry = self._open.drop(request_id)
        is_void = self._consumption.is_handing_back
        assert not (entry.tokens and is_void), "tokens of a channel that is gone"
        self._look_for_room()
        return entry

    @property
    def _held_bytes(self) -> int:
        return max(self._open.bytes + self._finished.bytes, self._unread())

    def _has_room(self, size: int) -> bool:
        held = self._held_bytes
        return not held or held + size <= OPEN_BYTES_MAX

    def _look_for_room(self) -> None:
        if self._consumption.is_held_up and self._held_bytes <= OPEN_BYTES_MAX // 2:
            self._consumption.go_on()

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
        returns: int = 0,
    ) -> None:
        """The broker handed out a request, perhaps not for the first time.

        Args:
            returns: How often a quorum queue has taken it back.

        Raises:
            LimitExceeded: It is larger than the guest takes. It is answered with a failure (a
                call) or dropped (a cast) and acknowledged.
        """
        assert self._broker is not None
        if not self._consumption.takes(topic):
            return  # of a channel that is gone: taken now, it would overtake what comes before it
        if returns >= RETURNS_WARN:
            self._dropped.warn_of_returns(origin, returns)
        if self._is_copy(token, origin.id):
            self.counters["redelivered"] += 1
            return
        if self._open.awaited and not redelivered:
            not_again = self._open.come_no_more(topic, fanout=fanout)
            self._dropped.count_of_broker(topic, not_again)
        flags = (FANOUT if fanout else 0) | (REDELIVERED if redelivered else 0)
        if not redelivered and self._finished.are_left_over:
            flags |= OUT_OF_TURN  # what is left over may come behind this, at another host
        request = self._make_request(origin, topic, flags)
        if not self._has_room(len(request.body)):
            self.counters["held_up"] += 1  # it keeps its place in the queue
            self._consumption.hold_up(now_s)
            return
        self.counters["requests"] += 1
        entry = OpenRequest(topic, origin, None, len(request.body))
        entry.fanout = fanout
        entry.tokens = (token,)
        self._open.add(origin.id, entry)
        self._pass_on(request, entry, now_s)

    def _is_copy(self, token: Hashable, request_id: bytes) -> bool:
        """Of a request that is not over, or is being completed, or was over for an earlier run of
        the guest's daemon. Then it ends with that."""
        assert self._broker is not None
        if self._open.add_copy(request_id, token):
            return True
        if not self._finished.is_over(request_id, self._guest):
            return False
        self._finished.begin_copy(request_id)
        self._broker.complete(self.vm, request_id, (token,))
        return True

    def _pass_on(self, request: Request, entry: OpenRequest, now_s: float) -> None:
        """Send it to the guest, or refuse it. Raises as `delivered`."""
        request_id, was_sent = request.id, request.flags & REDELIVERED != 0
        if self._mute and request.is_call:
            text = f"{MUTE}: {self._gate.why_no_reply(entry.topic)}"
            self._refuse_unsent(request_id, entry, "Rejected", text, was_sent)
            return
        try:
            self._requester.submit(request, now_s)
        except LimitExceeded as error:
            self._requester.forget(request_id)
            if request.is_call:
                self._refuse_unsent(request_id, entry, "LimitExceeded", str(error), was_sent)
            else:
                self._dropped.count(request_id, entry, "casts_too_large", str(error))
                self._finish(request_id)
            raise

    def abandon(self, request_id: bytes, token: Hashable) -> None:
        """A message that breaks us was put aside: whatever is left of it goes."""
        self.upward.mailbox.drop(token)
        if request_id in self._open.by_id:
            self._requester.forget(request_id)
            self._drop(request_id)

    def count_undecodable(self) -> None:
        """A message that could not be read was dropped."""
        self.counters["undecodable"] += 1

    def count_parked(self) -> None:
        """A message that broke us was put aside, or dropped because it could not be."""
        self.counters["parked"] += 1

    def _make_request(self, origin: BrokerRequest, topic: Topic, flags: int) -> Request:
        times_ms = milliseconds(origin.timeout_s), milliseconds(origin.monitor_timeout_s)
        flags |= CALL if origin.is_call else 0
        body = request_body(origin, self._passing(topic, origin.context))
        return Request(origin.id, flags, *times_ms, topic.exchange, topic.name, self.vm, body)

    def _passing(self, topic: Topic, context: Mapping[str, Any]) -> frozenset[str]:
        """Keys that may enter with a request for a topic; those of this context that may not are
        counted, and told."""
        allow = self._context_allow | self._gate.context_into(topic)
        removed = frozenset() if "*" in allow else context.keys() - allow
        if removed:
            self.counters["context_keys_removed"] += len(removed)
            self._gate.removed(INTO, topic, removed)
        return allow

    def _reply(
        self,
        request_id: bytes,
        entry: OpenRequest,
        failed: bool,
        body: bytes,
        *,
        has_not_run: bool = False,
    ) -> None:
        """A call is over."""
        origin, gate = entry.origin, self._gate
        assert origin is not None and origin.msg_id is not None  # the Requester looks to that
        assert origin.reply_q is not None and self._broker is not None
        if failed:
            data = encode_reply(origin.msg_id, failure_json=body, may_raise=gate.may_raise)
        else:
            data = encode_reply(origin.msg_id, result_json=body, values_max=gate.limits.json_values)
        self._finished.begin_answer(request_id, len(data), entry.guest, has_not_run)
        reply = ReplyPublication(origin.reply_q, data, has_not_run)
        self._broker.complete(self.vm, request_id, self._drop(request_id).tokens, reply)

    def _publish_heartbeat(self, entry: OpenRequest, now_s: float) -> None:
        origin = entry.origin
        assert origin is not None and origin.msg_id is not None
        if origin.monitor_timeout_s is None:
            return  # oslo.messaging's client, unasked, ends in an AttributeError and has no answer
        if now_s < entry.beat_s:
            return  # a guest may send them at will
        entry.beat_s = now_s + HEARTBEAT_S
        assert origin.reply_q is not None and self._broker is not None
        body = encode_reply(origin.msg_id, ending=False)
        self._broker.publish_heartbeat(origin.reply_q, body)

    def _finish(self, request_id: bytes) -> None:
        """It is over, without a reply."""
        assert self._broker is not None
        entry = self._drop(request_id)
        self._finished.remember(request_id, entry.guest)
        if entry.tokens:
            self._finished.begin(request_id)
            self._broker.complete(self.vm, request_id, entry.tokens)

    def completed(self, ids: Sequence[bytes], *, proven: bool) -> None:
        """The broker's thread has done what it could for these.

        Args:
            proven: It has proved that it has forgotten them.
        """
        self._finished.completed(ids, proven=proven)
        self._look_for_room()
        if proven:
            self._requester.settle(ids)

    def count_given_up(self) -> None:
        """A reply was published in vain for as long as it is kept."""
        self.counters["replies_given_up"] += 1

    def mail(self, token: Hashable, body: bytes, now_s: float) -> None:
        """A message came in the VM's own queue: take it, or leave it where it is."""
        if self.upward.take_again(token, body):
            return
        if self.upward.has_room(len(body)):
            self.upward.mailbox.put(token, body)
        else:
            self.leave_answers(now_s)

    def leave_answers(self, now_s: float) -> None:
        """The broker keeps the VM's answers until the guest has read what is here. That closes the
        channel; topics are consumed on a new one."""
        if self._broker is not None and self.upward.leave_answers(now_s):
            self._consumption.reopen(now_s)

    def consuming(self, topics: frozenset[Topic]) -> None:
        """The broker has queues for these, and hands out what is in them."""
        self._consumption.confirmed(topics)

    def released(self) -> None:
        """The VM's channel is gone, and all its tokens: what was not over comes again."""
        self._consumption.released()
        self._open.forget_tokens()

    def _let_go(self) -> None:
        """We have closed the channel ourselves."""
        self._open.forget_tokens()
        self.upward.relisten()

    # ---------------------------------------------------------------- local programs

    def submit_local(
        self, request: Request, answer: Callable[[Outcome], None], now_s: float
    ) -> None:
        """A request of a program on this host.

        Args:
            answer: Told each outcome; exactly one of them is not a Heartbeat.

        Raises:
            LimitExceeded: Too many are open, or it is too large. Nothing was sent.
            Rejected: It is a call, and the VM may not answer; or RAW, and its daemon takes none.
        """
        if self._mute and request.is_call:
            raise Rejected(f"{MUTE}: {self._gate.why_no_reply(request.target)}")
        if self._open.local >= LOCAL_REQUESTS_MAX:
            limit = LOCAL_REQUESTS_MAX
            raise LimitExceeded("open local requests", limit + 1, limit, "LOCAL_REQUESTS_MAX")
        entry = self._open.by_id.get(request.id)
        if entry is not None:
            if entry.local is None:
                raise Rejected("a request with this id came from the broker: ids are random")
            entry.local = answer  # it repeats itself, perhaps on a new connection
            return
        is_repeat = request.flags & REDELIVERED  # of what a daemon before this one had
        request = request.changed(
            flags=request.flags & ~IN_PLACE | (OUT_OF_TURN if is_repeat else LOCAL),
            body=cut_context(request, partial(self._passing, request.target)),
        )
        size = len(request.body)
        if not self._has_room(size):
            total = self._held_bytes + size
            raise LimitExceeded("bytes of open requests", total, OPEN_BYTES_MAX, "OPEN_BYTES_MAX")
        self._open.add(request.id, OpenRequest(request.target, None, answer, size))
        try:
            self._requester.submit(request, now_s)
        except (LimitExceeded, Rejected):
            self._requester.forget(request.id)
            self._drop(request.id)
            raise

    def cancel_local(self, request_id: bytes) -> None:
        """The program no longer waits."""
        entry = self._open.by_id.get(request_id)
        if entry is not None and entry.local is not None:
            self._drop(request_id)
            self._requester.cancel(request_id)

    # ---------------------------------------------------------------- a VM that is mute

    @property
    def waits_for_reception(self) -> bool:
        """Whether `received_all` would be news: a mute VM has been sent something."""
        return self._mute and bool(self._open.by_id)

    def received_all(self, now_s: float) -> None:
        """The guest has acknowledged every frame: that is all a mute VM says of its casts."""
        if self._mute:
            for request_id in list(self._open.by_id):
                if self._requester.has_sent(request_id):
                    self._requester.forget(request_id)
                    self._note_outcome(Taken(request_id), now_s)

    # ---------------------------------------------------------------- the end

    def suspend(self, now_s: float) -> None:
        """The guest is away, or going: hand back to the broker what is not over, until `opened`.

        What the guest still says of it counts; the copies that the broker hands out are harmless.
        """
        if self._consumption.is_suspended or self._broker is None:
            return
        self.upward.suspend(now_s)
        self._consumption.suspend()

    def release(self, reason: str, now_s: float) -> None:
        """The VM is no longer here: everything that is not over goes back where it came from."""
        self.upward.suspend(now_s)
        self.upward.release()
        self._consumption.end()
        self._served.clear()
        self._finished.clear()
        for request_id, entry in self._open.clear().items():
            self._requester.forget(request_id)
            if entry.local is not None:
                entry.local(HandedBack(request_id, RELEASED, reason))

    # ---------------------------------------------------------------- time

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        return earliest(
            self._consumption.update_at_s,
            self._consumption.look_at_s,
            self._served.judge_at_s,
            self._requester.next_timeout(),
            self.upward.next_timeout(),
        )

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        for outcome in self._requester.handle_timeout(now_s):
            self._note_outcome(outcome, now_s)
        self.upward.handle_timeout(now_s)
        judge_at_s = self._served.judge_at_s
        if judge_at_s is not None and now_s >= judge_at_s and self._served.judge(now_s):
            self._consumption.judged(now_s)
        if self._consumption.is_time_to_look(now_s):
            self._look_for_room()
        self._consumption.handle_timeout(now_s)

    def summary(self) -> dict[str, Any]:
        """What `vchan status` shows of this VM's requests."""
        return {
            **self.counters,
            "open": len(self._open),
            "open_bytes": self._open.bytes + self._finished.bytes,
            "topics": sorted(f"{t.exchange}/{t.name}" for t in self.topics),
            "unconsumed_topics": sorted(f"{t.exchange}/{t.name}" for t in self.unconsumed),
            "denied_topics": sorted(f"{t.exchange}/{t.name}" for t in self.denied),
            "from_guest": self.upward.summary(),
        }
