"""One VM as the daemon holds it: its channel, and what becomes of that when our own code fails.

Rules of this file
1. All code of a VM's channel (the channel, its link, session, Downward and Upward) is entered
   through `LoopPart.call`, and nowhere else: by the daemon through the methods of `HostedVm`, by
   the loop through the part of it that the channel was given, by those who answer a guest's
   request through the offer that it was given. What such code lets out is caught there, and is
   that VM's trouble.
2. After a fault nothing of the channel is trusted: it is taken apart as far as it lets itself be,
   its messages go back to the broker, and a new channel is made when the quarantine is over. The
   guest and the broker repeat what was open, as after a restart of the daemon.
3. What is unexpected anywhere else ends the daemon: a daemon that goes on after a bug lies.
4. The daemon speaks to a VM by the methods of `HostedVm`, and reaches through none of its parts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from vchan.errors import LimitExceeded, Rejected, VchanError
from vchan.host.broker import events
from vchan.host.faults import ALWAYS, attempt, describe_fault, log_fault
from vchan.host.hypervisor.domains import (
    Connect,
    Domain,
    Hush,
    Phase,
    PhaseChange,
    Release,
    Speak,
    Why,
)
from vchan.host.oslo_wire.mail import own_queue
from vchan.host.policy.rules import Facts
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.channel import CONSUMING, DELIVERED, HANDED_BACK, Channel, End, Home
from vchan.host.vm.downward import BrokerPort
from vchan.host.vm.gate import VmGate
from vchan.host.vm.reports import Reports
from vchan.host.vm.streams import Program
from vchan.host.vm.throttle import Throttle
from vchan.host.vm.upward import Offer
from vchan.io.loop import Callback, Loop, Timer
from vchan.rpc.dispatcher import Told
from vchan.rpc.in_flight import HandedBack, Outcome, Overdue
from vchan.rpc.messages import NO_AGENT, Request, Topic

LOG = logging.getLogger("vchan.host")

_new_tuple = tuple.__new__

T = TypeVar("T")

BREAKS_MAX: Final = 3
"""So often a message may raise what it should not: once may be chance. At it: it is put aside."""
BREAKS_KNOWN_MAX: Final = 1024
"""Messages of one VM of which that is remembered."""

ChannelEvent = (
    events.Consuming
    | events.Delivered
    | events.Undecodable
    | events.Parked
    | events.Troubled
    | events.Released
    | events.Completed
    | events.RepliesRefused
    | events.GivenUp
    | events.PublishResult
    | events.Mail
)
VM_ENDS: Final = frozenset({Why.STOPPED, Why.FAILED})
"""Of a VM, and of its byte streams with it. Otherwise it may go on elsewhere, or later."""
VmEvent = ChannelEvent | events.Failed
"""What the broker says of one VM."""


class VmBroker(BrokerPort, Protocol):
    """What is asked of the broker for one VM."""

    def reject(self, token: Any) -> None:
        """The broker may forget a message that is none."""

    def park_message(self, token: Any, queue: str, body: bytes, fault: str) -> None:
        """Put a message aside that breaks us."""


class _Message(NamedTuple):
    """One of a VM's, of the broker's.

    Attributes:
        key: Tells it apart from the VM's others.
    """

    key: bytes
    token: events.Token
    queue: str
    body: bytes


class StreamsHandle(NamedTuple):
    """A program's way to its byte streams into one VM.

    Attributes:
        receive: Takes a message of the program's.
        next_message: The next one for it, if there is one.
        close: It is gone; whether it has closed its connection itself.
    """

    receive: Callable[[bytes], None]
    next_message: Callable[[], bytes | None]
    close: Callable[[bool], None]


class Refusals:
    """What the broker refuses one VM, in its own words.

    Attributes:
        problems: Of its queues and exchanges, as `Troubled` tells them.
    """

    def __init__(self) -> None:
        self.problems: tuple[str, ...] = ()
        self._last: dict[str, str] = {}

    def said(self, what: str, refusal: str) -> None:
        """Of the last message published for the VM; "": it was taken."""
        self._last[what] = refusal

    def clear(self) -> None:
        """The connection is lost: the next one begins anew."""
        self.problems = ()
        self._last.clear()

    def all(self) -> list[str]:
        """All of it."""
        last = [f"its {what} are not taken: {text}" for what, text in self._last.items() if text]
        return [*self.problems, *last]


class LoopPart:
    """The loop as the code of one VM's channel sees it, and the way into that code.

    Args:
        on_fault: Told, once, what the code let out. After that nothing of it is called any more.
    """

    def __init__(self, loop: Loop, on_fault: Callable[[Exception], None]) -> None:
        self._loop = loop
        self._on_fault = on_fault
        # What is watched now: a number that was given back is somebody else's by then.
        self._readers: set[int] = set()
        self._writers: set[int] = set()
        self._is_over = False
        self.time = loop.time
        self.spent = loop.spent

    def call(self, work: Callable[[], T], otherwise: T, *expected: type[Exception]) -> T:
        """Enter the VM's code.

        Args:
            otherwise: Returned if it fails, or has failed.

        Raises:
            One of `expected`: refusals that are the caller's to handle.
        """
        if self._is_over:
            return otherwise
        result, error = attempt(work, otherwise, *expected)
        if error is not None:
            self._failed(error)
        return result

    def _failed(self, error: Exception) -> None:
        if self._is_over:  # the code that called what has failed fails in turn
            LOG.debug("after a fault: %s", describe_fault(error))
            return
        self.end()
        self._on_fault(error)

    def end(self) -> None:
        """Call nothing any more."""
        self._is_over = True
        for fd in list(self._readers):
            self.remove_reader(fd)
        for fd in list(self._writers):
            self.remove_writer(fd)

    def _run(self, callback: Callback) -> None:
        self.call(callback, None)

    # ---------------------------------------------------------------- see `Loop`

    def call_soon(self, callback: Callback) -> None:
        """Call it before waiting again."""
        self._loop.call_soon(partial(self._run, callback))

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """Call it after `delay_s` seconds."""
        return self._loop.call_later(delay_s, partial(self._run, callback))

    def call_at(self, at_s: float, callback: Callback) -> Timer:
        """Call it when `time()` has reached `at_s`."""
        return self._loop.call_at(at_s, partial(self._run, callback))

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call it whenever `fd` is readable or hung up."""
        self._readers.add(fd)
        self._loop.add_reader(fd, partial(self._run, callback))

    def remove_reader(self, fd: int) -> None:
        """Harmless when there is none."""
        self._readers.discard(fd)
        self._loop.remove_reader(fd)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call it whenever `fd` takes bytes."""
        self._writers.add(fd)
        self._loop.add_writer(fd, partial(self._run, callback))

    def remove_writer(self, fd: int) -> None:
        """Harmless when there is none."""
        self._writers.discard(fd)
        self._loop.remove_writer(fd)


class HostedVm:
    """One VM, from Connect to Release.

    Args:
        domain: Where its phase stands.
        home: See `Channel`.
        broker: None where no broker is configured.
        end: What our end of its channel is like.
        offer: The programs on this host that its requests may be for.
        quarantined: Told who was put into quarantine, and why.
    """

    def __init__(
        self,
        loop: Loop,
        domain: Domain,
        home: Home,
        broker: VmBroker | None,
        gate: VmGate,
        throttle: Throttle,
        end: End,
        offer: Offer,
        quarantined: Callable[[Facts, str], None],
    ) -> None:
        self.uuid = domain.uuid
        self.name = domain.known.name
        self._domain = domain
        self._loop = loop
        self._home = home
        self._broker = broker
        self._gate = gate
        gate.is_one_way = end.is_one_way
        self._throttle = throttle
        self._end = end
        self._offer = offer
        self._tell_quarantine = quarantined
        self._refusals = Refusals()
        self._part = LoopPart(loop, self._on_fault)
        self._channel: Channel | None = None
        self._renew_timer: Timer | None = None
        self._past: Counter[str] = Counter()  # counters of channels that have failed
        self._programs: dict[int, Program] = {}  # that have byte streams here
        self._reports = Reports()
        """What the guest has told of itself; it outlives its channel's faults."""
        self._breaks: dict[int, int] = {}  # how often a message has broken us, by its key's hash
        self._fault = ""  # what failed last

    # ---------------------------------------------------------------- the way in

    def _enter(self, work: Callable[[Channel], T], otherwise: T, *expected: type[Exception]) -> T:
        """Do something with the channel, if there is one: see `LoopPart.call`."""
        channel = self._channel
        if channel is None:
            return otherwise
        return self._part.call(lambda: work(channel), otherwise, *expected)

    def _use(self, work: Callable[[Channel], None], *expected: type[Exception]) -> bool:
        """Do something with the channel's requests. False if there is no channel, or it failed."""

        def use(channel: Channel) -> bool:
            work(channel)
            channel.set_timer()
            return True

        return self._enter(use, False, *expected)

    def _contain(self, offer: Offer) -> Offer:
        """The same offer, for a channel: what is told of it enters the VM's code like all else."""
        part = self._part

        def offered(request: Request, told: Told) -> Callable[[], None] | None:
            def told_inside(outcome: Outcome, now_s: float) -> None:
                part.call(lambda: told(outcome, now_s), None)

            return offer(request, told_inside)

        return offered

    # ---------------------------------------------------------------- what the daemon says

    def carry_out(self, change: PhaseChange) -> None:
        """The phase of the VM has changed."""
        match change:
            case Connect():
                self._begin()
            case Speak():
                self._enter(Channel.speak, None)
            case Hush():
                self._enter(Channel.hush, None)
            case Release(_, why):
                if why in VM_ENDS:
                    self._enter(lambda channel: channel.streams.end(why.value), None)
                self.release(why.value)

    def release(self, reason: str) -> None:
        """It is over: the VM is gone, or the daemon ends."""
        self._send_away(reason)
        self._enter(lambda channel: channel.release(reason), None)
        self._enter(self._count, None)  # nobody gets at the channel any more
        self._part.end()
        self._cancel_renewal()

    def update(self, facts: Facts, limits: Limits) -> None:
        """What the policy goes by, or says, may be other now."""
        self._gate.facts = facts
        self._throttle.update(limits)
        self._use(Channel.policy_changed)
        self._enter(Channel.say_topics, None)

    def went_on(self) -> None:
        """The guest stood still, and does so no more."""
        self._enter(Channel.went_on, None)

    def receive(self, event: VmEvent | events.Connected | events.Disconnected) -> None:
        """The broker says something of this VM, or of its connection."""
        match event:
            case events.Failed(_, fault):
                self._fail(fault)
            case events.Connected() | events.Disconnected():
                self._refusals.clear()
            case _:
                self._use(partial(self._receive, event))

    def submit(self, request: Request, told: Callable[[Outcome], None]) -> Callable[[], None]:
        """A request of a program on this host; returns how it is cancelled.

        Args:
            told: Told each outcome; exactly one of them is not a Heartbeat.

        Raises:
            LimitExceeded, Rejected: Nothing was sent.
        """

        def tell(outcome: Outcome) -> None:
            told(self._explain(outcome))

        def submit(channel: Channel) -> None:
            channel.downward.submit_local(request, tell, self._loop.time())

        if not self._use(submit, VchanError):
            raise Rejected(f"{self.name}: {self.problem or 'it has no channel'}")
        return lambda: self._enter(lambda channel: channel.downward.cancel_local(request.id), None)

    def _explain(self, outcome: Outcome) -> Outcome:
        """What was never sent has not run: with why it was not."""
        if not isinstance(outcome, Overdue) or outcome.was_sent:
            return outcome
        why = ": ".join(filter(None, (self.state, self.problem)))
        return HandedBack(outcome.id, NO_AGENT, f"not delivered: VM {self.name} is {why}")

    def open_streams(self, number: int, program: Program, target: str) -> StreamsHandle:
        """A program on this host wants byte streams into the guest; returns its way to them.

        Args:
            number: Tells it apart from others.
            target: What it is going to open.

        Raises:
            Rejected, LimitExceeded: It cannot have them now, or may not.
        """

        def attach(channel: Channel) -> None:
            channel.require_streams()
            channel.streams.require(target, program)
            channel.streams.attach(number, program)

        if not self._use(attach, VchanError):
            raise Rejected(f"{self.name}: {self.problem or 'it has no channel'}")
        self._programs[number] = program
        return StreamsHandle(
            lambda data: self._enter(lambda each: each.streams.from_program(number, data), None),
            lambda: self._next_for_program(number),
            lambda is_gone: self._close_streams(number, is_gone=is_gone),
        )

    def _next_for_program(self, number: int) -> bytes | None:
        none: bytes | None = None
        return self._enter(lambda channel: channel.streams.next_for_program(number), none)

    def _close_streams(self, number: int, *, is_gone: bool = False) -> None:
        if self._programs.pop(number, None) is not None:
            self._enter(lambda each: each.streams.detach(number, is_gone=is_gone), None)

    def _send_away(self, reason: str) -> None:
        """Programs with byte streams find nothing here any more: they hear what there still is for
        them."""
        for number, program in list(self._programs.items()):
            program.gone(reason)
            self._close_streams(number)

    def end_quarantine(self) -> bool:
        """The operator's word. False if there is none."""
        if self._renew_timer is None:
            return self._enter(Channel.end_quarantine, otherwise=False)
        self._cancel_renewal()
        self._throttle.release()
        self._fault = ""
        self._renew()
        return True

    # ---------------------------------------------------------------- what the broker says

    def _receive(self, event: ChannelEvent, channel: Channel) -> None:
        now_s, downward = self._loop.time(), channel.downward
        match event:
            case events.Delivered():
                channel.arrival.reach(DELIVERED)
                self._deliver(channel, event)
            case events.Undecodable(_, token, reason, queue, beginning):
                self._drop_undecodable(channel, queue, reason, beginning)
                assert self._broker is not None
                self._broker.reject(token)
            case events.Parked(_, queue, problem):
                text = "%s (%s): a message of queue %s that breaks this daemon was %s"
                became = f"dropped, for it could not be parked: {problem}" if problem else "parked"
                LOG.error(text, self.name, self.uuid, queue, became)
                downward.count_parked()
            case events.Troubled(_, problems):
                self._refusals.problems = problems
            case events.Released(_, reason):
                LOG.info("%s (%s): consumers closed: %s", self.name, self.uuid, reason)
                downward.released()
                channel.departure.reach(HANDED_BACK)
            case events.Consuming(_, consumed):
                downward.consuming(consumed)
                if consumed:
                    channel.arrival.reach(CONSUMING)
                    topics = ", ".join(sorted(topic.name for topic in consumed))
                    LOG.info("%s (%s): consuming %s", self.name, self.uuid, topics)
            case events.Completed(_, ids, proven):
                downward.completed(ids, proven=proven)
            case events.RepliesRefused(_, reason):
                if reason:
                    text = "%s (%s): replies are not published yet: %s"
                    LOG.warning(text, self.name, self.uuid, reason)
                self._refusals.said("replies", reason)
            case events.GivenUp(_, request_id, reason):
                text = "%s (%s): the reply to %s is given up: %s"
                LOG.warning(text, self.name, self.uuid, request_id.hex(), reason)
                downward.count_given_up()
            case events.PublishResult(_, request_id, ok, unroutable):
                self._refusals.said("requests", "" if ok or unroutable else event.reason)
                downward.upward.sent(
                    request_id, ok=ok, unroutable=unroutable, doubtful=event.in_doubt, now_s=now_s
                )
            case events.Mail(_, token, body):
                channel.mail(token, body)

    def _deliver(self, channel: Channel, event: events.Delivered) -> None:
        def deliver() -> None:
            channel.downward.delivered(
                event.token,
                event.request,
                event.topic,
                fanout=event.fanout,
                redelivered=event.redelivered,
                returns=event.returns,
                now_s=self._loop.time(),
            )

        message: _Message = _new_tuple(
            _Message, (event.request.id, event.token, event.queue, event.body)
        )
        try:
            self._handle(channel, message, deliver, None)
        except LimitExceeded as error:
            LOG.warning("%s (%s): refused: %s", self.name, self.uuid, error)

    def _handle_mail(
        self, channel: Channel, token: Any, body: bytes, work: Callable[[], str | None]
    ) -> str | None:
        """See `channel.HandleMail`."""
        queue = own_queue(self.uuid)
        handed_on: str | None = ""
        problem = self._handle(channel, _Message(body, token, queue, body), work, handed_on)
        if problem:
            self._drop_undecodable(channel, queue, problem, body[: events.BEGINNING_BYTES])
        return problem

    def _drop_undecodable(
        self, channel: Channel, queue: str, reason: str, beginning: bytes
    ) -> None:
        text = "%s (%s): dropped a message of queue %s: %s; it begins with %r"
        LOG.warning(text, self.name, self.uuid, queue, reason, beginning)
        channel.downward.count_undecodable()

    def _handle(
        self, channel: Channel, message: _Message, work: Callable[[], T], otherwise: T
    ) -> T:
        """Do what a message is for.

        One that raises what it should not is the VM's trouble, and does so again when the broker
        hands it out again: the BREAKS_MAXth time it is put aside, and the VM goes on.
        """
        done, error = attempt(work, otherwise, VchanError)
        if error is None:
            return done
        if not self._breaks_too_often(message.key):
            raise error
        what = f"{self.name} ({self.uuid}): a message of queue {message.queue} is put aside"
        fault = log_fault(LOG, what, error)
        assert self._broker is not None
        self._broker.park_message(message.token, message.queue, message.body, fault)
        channel.downward.abandon(message.key, message.token)
        return otherwise

    def _breaks_too_often(self, key: bytes) -> bool:
        """A message has broken us once more. Whether that is too often; then it begins anew."""
        short = hash(key)
        count = self._breaks.pop(short, 0) + 1
        if count >= BREAKS_MAX:
            return True
        self._breaks[short] = count
        if len(self._breaks) > BREAKS_KNOWN_MAX:
            del self._breaks[next(iter(self._breaks))]
        return False

    # ---------------------------------------------------------------- faults

    def _begin(self) -> None:
        """Make a channel, and connect it."""
        self._part = LoopPart(self._loop, self._on_fault)
        self._part.call(self._set_up, None)

    def _set_up(self) -> None:
        self._channel = Channel(
            self._part,
            self._domain,
            self._home,
            self._broker,
            self._gate,
            self._contain(self._offer),
            self._throttle,
            self._quarantined,
            self._end,
            self._handle_mail,
            self._reports,
        )
        self._channel.connect()

    def _renew(self) -> None:
        """Make the next channel, as after a restart of the daemon."""
        self._renew_timer = None
        self._begin()
        if self._domain.phase is Phase.SERVING:
            self._enter(Channel.speak, None)

    def _on_fault(self, error: Exception) -> None:
        what = f"{self.name} ({self.uuid}): unexpected, its channel is closed"
        self._fail(log_fault(LOG, what, error))

    def _fail(self, fault: str) -> None:
        """Something in the VM's code failed, and is in the log: close the channel, for longer each
        time."""
        self._fault = fault
        reason = f"vchan-host failed on it: {fault}"
        self._part.end()
        self._send_away(reason)
        self._give_up(reason)
        now_s = self._loop.time()
        is_news = self._throttle.fault(reason, now_s)
        until_s = self._throttle.breaker.quarantined_until(now_s) or now_s
        if is_news:
            self._quarantined(reason, until_s - now_s)
        self._cancel_renewal()
        self._renew_timer = self._loop.call_at(until_s, self._renew)

    def _quarantined(self, reason: str, for_s: float) -> None:
        text = "%s (%s): in quarantine for %.0f s: %s"
        # Whatever it has done to get here, it has not used up this line.
        LOG.warning(text, self.name, self.uuid, for_s, reason, extra=ALWAYS)
        self._tell_quarantine(self.facts, reason)

    def _give_up(self, reason: str) -> None:
        """Take the channel apart as far as it works."""
        channel, self._channel = self._channel, None
        if channel is not None:
            steps: list[Callable[[], None]] = [partial(self._count, channel), channel.close_stream]
            self._attempt(lambda: steps.extend(channel.steps_of_release(reason)))
            for step in steps:
                self._attempt(step)
        self._refusals.clear()
        if self._broker is not None:
            self._broker.release(self.uuid, for_good=True)  # whatever the channel did of that

    def _attempt(self, step: Callable[[], None]) -> None:
        _, error = attempt(step, None)
        if error is not None:  # one part is broken; the others may be
            LOG.debug("%s: giving its channel up: %s", self.uuid, describe_fault(error))

    def _count(self, channel: Channel) -> None:
        self._past.update(channel.own_totals())

    def _cancel_renewal(self) -> None:
        if self._renew_timer is not None:
            self._renew_timer.cancel()
            self._renew_timer = None

    # ---------------------------------------------------------------- state

    def claims(self) -> dict[str, Any]:
        """What the guest says of itself, in a row of `vchan list`."""
        return self._reports.row()

    def all_claims(self) -> dict[str, Any]:
        """All that the guest says of itself, and how old it is."""
        return self._reports.shown(self._loop.time())

    @property
    def facts(self) -> Facts:
        """What the policy goes by."""
        return self._gate.facts

    @property
    def state(self) -> str:
        """One word for `vchan list`."""
        return self._enter(lambda channel: channel.state, "quarantined")

    @property
    def heard_s(self) -> float | None:
        """See `Channel.heard_s`."""
        none: float | None = None
        return self._enter(lambda channel: channel.heard_s, none)

    @property
    def problem(self) -> str:
        """Why it does not work, or ""."""
        return self._enter(lambda channel: channel.problem, "") or self._fault_problem

    @property
    def refusals(self) -> list[str]:
        """What the broker refuses it, as far as it is connected."""
        return self._refusals.all()

    @property
    def _fault_problem(self) -> str:
        if self._channel is not None:
            return ""
        return self._throttle.breaker.problem(self._loop.time())

    @property
    def topics(self) -> frozenset[Topic]:
        """The topics that its agents serve, and may."""
        return self._enter(lambda channel: channel.downward.topics, frozenset())

    def totals(self) -> Counter[str]:
        """Every counter of this VM, in one table."""
        totals = Counter(self._past)
        none: dict[str, int] = {}
        totals.update(self._enter(Channel.own_totals, none))
        totals.update(self._throttle.counters)
        return totals

    def summary(self) -> dict[str, Any]:
        """What `vchan status` shows. While there is no channel: the totals stand for its parts."""
        shown = self._enter(Channel.summary, None)
        if shown is None:
            totals = dict(self.totals())
            shown = {
                "state": self.state,
                "problem": self.problem or None,
                "quarantine": self._fault_problem or None,
                "guest": None,
                "heard_s": None,
                "path": self._domain.path or "",
                "unacknowledged_frames": 0,
                "backlog_bytes": 0,
                "first_answer_s": None,
                "channel": self._throttle.counters,
                "limits": asdict(self._throttle.limits),
                "session": totals,
                "requests": {**totals, "open": 0, "from_guest": {**totals, "open": 0}},
                "streams": {"programs": 0, "open": 0},
            }
        own = {"fault": self._fault or None, "measured": self._reports.measured()}
        return {**shown, **own, **self._gate.denials()}
