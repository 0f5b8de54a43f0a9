"""The host's end of each VM's channel: connected early, spoken on late, reconnected when wedged.

`Domains` decides, and has changed the domain's phase when `speak`, `hush` and `release` carry that
out. What else depends on the phase, or on whether the domain stands still, asks the domain.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import asdict
from functools import partial
from typing import Any, Final, NamedTuple

from vchan.errors import LinkError, Rejected
from vchan.host.hypervisor.domains import Domain, Phase
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.clock import GuestClock
from vchan.host.vm.downward import MUTE, BrokerPort, Downward
from vchan.host.vm.gate import Gate
from vchan.host.vm.log_lines import LogLines
from vchan.host.vm.mail_turns import MailTurns
from vchan.host.vm.presence import ABSENT_S, Presence
from vchan.host.vm.reports import Reports
from vchan.host.vm.streams import VmStreams
from vchan.host.vm.throttle import Throttle
from vchan.host.vm.upward import Offer
from vchan.io.link import Link
from vchan.io.loop import Alarm, Scheduler, Timer
from vchan.io.steps import Steps
from vchan.io.streams import Stream, connect_unix
from vchan.rpc.in_flight import Outcome, earliest
from vchan.rpc.messages import (
    Request,
    Subscribe,
    Topic,
    encode,
    is_outcome,
    is_request,
    is_subscribe,
)
from vchan.rpc.reports import TOPIC as REPORTS
from vchan.session import (
    ASK_TICK_S,
    BACKLOG_BYTES_MAX,
    CHANNEL_ACK_DELAY_S,
    CONTROL,
    AnySession,
    Config,
    Event,
    Heard,
    Lost,
    Opened,
    Peer,
    Received,
    Refused,
    Role,
    Session,
    Silent,
    State,
    Violation,
)
from vchan.streams.carrier import fill
from vchan.streams.messages import is_of_family
from vchan.wire.frames import BYTE_STREAMS, RAW_REQUESTS

RECONNECT_S: Final[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
"""Between attempts while libvirt says that the domain is there."""
CURE_S: Final[tuple[float, ...]] = (0.0, 10.0, 30.0, 60.0, 300.0)
"""A silent channel is closed and connected anew: the one cure for QEMU's wedge. A guest without a
daemon is silent too, so it is done ever more rarely."""
SILENCE_S: Final = 4.0
"""A guest that was asked and says nothing for so long is reconnected to. A round trip takes under a
millisecond; a guest that is starved of CPU for so long loses nothing by it."""
RECEPTION_S: Final = 0.05
"""How often it is looked whether a mute guest has received everything."""
NOBODY_ANSWERS: Final = "nobody answers: is vchan-guest installed and running in the VM?"
"""Of a channel that is connected: or the VM is still booting, or QEMU lets another program in."""

TOLD: Final = "told to speak"
GREETED: Final = "greeting said"
OPENED: Final = "session open"
TOPICS: Final = "topics heard"
CONSUMING: Final = "consuming"
DELIVERED: Final = "first request"
SENT: Final = "sent to the guest"
ANSWERED: Final = "answered"
"""The steps of an arrival, in order: see `io.steps`."""
HUSHED: Final = "hushed"
HANDED_BACK: Final = "consumers closed"
RELEASED: Final = "released"
"""The steps of a departure."""


class _Metered(NamedTuple):
    """What has come of the guest, as far as the throttle was told."""

    frames: int
    messages: int
    greetings: int
    bad_messages: int
    unknown_messages: int


class End(NamedTuple):
    """What our end of a channel is like; the default is a VM's.

    Attributes:
        open_stream: Given the path, makes or finds the connection.
        reconnect_s: Between attempts at that.
        topics: Served on our side, and told to the other end.
        session: Makes what speaks on it.
        is_one_way: Nothing comes from the other end, ever.
    """

    open_stream: Callable[[str], Stream] = connect_unix
    role: Role = Role.HOST
    reconnect_s: tuple[float, ...] = RECONNECT_S
    topics: tuple[Topic, ...] = ()
    session: Callable[[Config, Callable[[int], bytes]], AnySession] = Session
    is_one_way: bool = False


class Home(NamedTuple):
    """The daemon, as the channels of all its VMs know it.

    Attributes:
        name: This host's, told to guests.
        instance: Names this run of the daemon, and no other.
        context_allow: The context keys that may enter a guest.
        log: Told what an operator may want to know.
        debug: Told what a programmer may.
        sets_time: Guests' clocks are set when they go on after they stood still.
    """

    name: str
    instance: bytes
    context_allow: frozenset[str] = frozenset()
    log: Callable[[str], None] = lambda _: None
    sets_time: bool = False
    debug: Callable[[str], None] = lambda _: None


HandleMail = Callable[["Channel", Any, bytes, Callable[[], str | None]], str | None]
"""(channel, token, body, work): do some work for a message of the VM's own queue, and return what
it does: what is wrong with the message, or "", or None if there is more to be done."""


class Channel:
    """One VM's channel, from Connect to Release.

    Args:
        domain: Its phase says what may be done with the channel now.
        broker, gate, offer: See `Downward`.
        throttle: This VM's; by default one with the default limits.
        quarantined: Told why and for how many seconds, when it is put into quarantine.
        end: What our end is like.
        handle_mail: See `HandleMail`; by default the work is done, and no more.
        reports: Where what the guest tells of itself is kept.
    """

    def __init__(
        self,
        loop: Scheduler,
        domain: Domain,
        home: Home,
        broker: BrokerPort | None,
        gate: Gate,
        offer: Offer,
        throttle: Throttle | None = None,
        quarantined: Callable[[str, float], None] = lambda _, __: None,
        end: End = End(),  # noqa: B008 - immutable
        handle_mail: HandleMail = lambda _, __, ___, work: work(),
        reports: Reports | None = None,
    ) -> None:
        self.vm = domain.uuid
        self.name = domain.known.name
        self._domain = domain
        self._loop = loop
        named = f"{self.name} ({self.vm})"
        self._tell = LogLines(named, home.log, loop.time).tell
        self.arrival = Steps(loop, "arrival", ANSWERED, lambda line: home.debug(f"{named}: {line}"))
        self.departure = Steps(
            loop, "departure", RELEASED, lambda line: home.debug(f"{named}: {line}")
        )
        self._end = end
        self.throttle = throttle or Throttle(Limits())
        self._tell_quarantine = quarantined
        self._session = end.session(
            Config(
                end.role,
                home.instance,
                home.name,
                message_bytes_max=self.throttle.limits.message_bytes,
                reassembly_bytes_max=self.throttle.limits.reassembly_bytes,
                silence_s=SILENCE_S,
                features=self._own_features,
                ack_delay_s=CHANNEL_ACK_DELAY_S,
                ask_tick_s=ASK_TICK_S,
            ),
            os.urandom,
        )
        self._metered = _Metered(0, 0, 0, 0, 0)
        self.streams = VmStreams(home.name, gate, self._wake_link)
        self.downward = Downward(
            self.vm,
            self._send,
            broker,
            gate,
            home.context_allow,
            offer,
            home.instance.hex(),
            lambda: self._session.backlog_bytes,
            self._tell,
            reports,
        )
        self._handle_mail = partial(handle_mail, self)
        self._mail_turns = MailTurns(
            loop, self.throttle, self.downward.upward, self._handle_mail, self.set_timer
        )
        self._clock = GuestClock(self._submit, self._tell) if home.sets_time else None
        self._gate = gate
        self._told_topics: tuple[Topic, ...] = ()  # that are served on our side
        self._link: Link | None = None
        self._stream: Stream | None = None  # the last one opened
        self._attempts = 0
        self._cures = 0
        self._cure_not_before_s = 0.0
        self._trouble = ""  # why there is no link, or no session on it
        self._reconnect_timer: Timer | None = None
        self._alarm = Alarm(loop, self._timed_out)
        self._timer_planned = False
        self._is_over = False
        self._stream_timer: Timer | None = None  # until when byte streams wait
        self._presence = Presence(loop, self._absent)
        self.counters = {
            "reconnects": 0,
            "cures": 0,
            "frames_in_doubt": 0,  # sent, and not acknowledged when the session ended
            "requests_in_doubt": 0,  # handed to the guest, and not over then
        }

    # ---------------------------------------------------------------- what domains.py decides

    def connect(self) -> None:
        """Connect to the domain's socket, and stay connected. Say nothing before `speak`."""
        self._open()

    def speak(self) -> None:
        """Begin the session, or go on after `hush`."""
        assert self._domain.phase is Phase.SERVING
        self.departure.end()
        self.arrival.begin(TOLD)
        if self._session.peer is not None:  # it was spoken with before
            self.downward.opened(resumed=True, now_s=self._loop.time())
            self.set_timer()
        self._presence.spoken_to()
        if self._session.state is not State.OPEN:  # after `hush` it may be, and nothing would tell
            self._presence.miss()
        if self._link is not None:
            self._link.speak()
            self.arrival.reach(GREETED)
        elif self._reconnect_timer is None:
            self._open()

    def hush(self) -> None:
        """The guest goes on elsewhere: write nothing more, read what it wrote here.

        What it has not taken is handed back now, not at the end of the stream: by then it has been
        running elsewhere for up to a quarter of a second.
        """
        assert self._domain.phase is Phase.LEAVING
        self.arrival.end()
        self.departure.begin(HUSHED)
        self.downward.suspend(self._loop.time())
        if self._link is not None:
            self._link.hush()

    def release(self, reason: str) -> None:
        """It is over."""
        for step in self.steps_of_release(reason):
            step()

    def steps_of_release(self, reason: str) -> tuple[Callable[[], None], ...]:
        """What `release` does, for who takes a channel apart of which something is broken: each can
        be done whatever became of the others."""
        return (
            self._count_doubt,
            self.arrival.end,
            partial(self.departure.reach, RELEASED),
            self._cancel_timers,
            self._close_link,
            self.close_stream,
            lambda: self.downward.release(reason, self._loop.time()),
        )

    @property
    def _own_features(self) -> int:
        """Streams towards a guest alone: two hosts' daemons would both wait for the other to
        accept."""
        return RAW_REQUESTS | (BYTE_STREAMS if self._end.role is Role.HOST else 0)

    def _cancel_timers(self) -> None:
        self._is_over = True
        self._alarm.cancel()
        self._presence.cancel()
        self._mail_turns.cancel()
        for timer in (self._reconnect_timer, self._stream_timer):
            if timer is not None:
                timer.cancel()

    def _close_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def close_stream(self) -> None:
        """Also one whose link could not be made, or not be closed: QEMU lets in one client."""
        if self._stream is not None:
            self._stream.close()

    def _count_doubt(self) -> None:
        """What the session leaves open: found out here, repaired by the broker and the next one."""
        self.counters["frames_in_doubt"] += self._session.unacknowledged
        self.counters["requests_in_doubt"] += self.downward.open_requests

    # ---------------------------------------------------------------- the stream

    def _open(self) -> None:
        self._reconnect_timer = None
        assert self._domain.path is not None, "a channel that is released opens nothing"
        try:
            stream = self._end.open_stream(self._domain.path)
        except LinkError as error:
            self._trouble = str(error)
            self._tell(str(error))
            self._plan_reconnect()
            return
        self._trouble = ""
        self._stream = stream
        self._link = Link(
            self._loop,
            self._session,
            stream,
            self._handle,
            self._lost,
            silent=self._domain.phase is not Phase.SERVING,
            meter=self._meter,
        )
        self._link.refill = self._refill if self.streams.is_used else None

    def _plan_reconnect(self) -> None:
        delays_s = self._end.reconnect_s
        delay_s = delays_s[min(self._attempts, len(delays_s) - 1)]
        self._attempts += 1
        self._reconnect_timer = self._loop.call_later(delay_s, self._open)

    def _lost(self, reason: str) -> None:
        self._link = None
        self._trouble = reason
        if self._session.backlog_bytes > BACKLOG_BYTES_MAX and not self._end.is_one_way:
            # Who left without reading gets it again, from where it is kept.
            self.downward.leave_answers(self._loop.time())
            self._session.abandon()
        self.downward.disconnected()
        self._tell(reason)
        # A guest that was leaving lives elsewhere by now, and `release` follows; or its migration
        # has failed, and `speak` does, which connects.
        if self._domain.phase is not Phase.LEAVING:
            self.counters["reconnects"] += 1
            self._plan_reconnect()

    def _cure(self, silent_s: float) -> None:
        """Close and connect: what QEMU's wedge needs. The session goes on where it was."""
        now_s = self._loop.time()
        is_to_answer = self._domain.phase is Phase.SERVING and not self._domain.is_paused
        if self._link is None or not is_to_answer or now_s < self._cure_not_before_s:
            return
        self._cures = min(self._cures + 1, len(CURE_S) - 1)
        self._cure_not_before_s = now_s + CURE_S[self._cures]
        self.counters["cures"] += 1
        self._tell(f"silent for {silent_s:.0f} s: connecting anew")
        self._link.close()
        self._link = None
        self.downward.disconnected()
        self._open()

    # ---------------------------------------------------------------- the session

    def _send(self, message: bytes, stream: int) -> None:
        if self.arrival.is_under_way and is_request(message):
            self.arrival.reach(SENT)
        if self._link is not None:
            self._link.send(message, stream)
        else:
            self._session.send(message, stream)

    def _refill(self) -> bool:
        """What there is of byte streams for the guest, beside the requests: their bytes and their
        acknowledgements wait while the guest is near a rate, so that it is never over one for
        them, and its answers are read."""
        if self._stream_timer is not None:
            return False
        wait_s = self.throttle.reserved(self._loop.time())
        if wait_s > 0:
            self._stream_timer = self._loop.call_later(wait_s, self._end_stream_wait)
            return False
        return fill(self._session, self.streams.next_for_guest)

    def _end_stream_wait(self) -> None:
        self._stream_timer = None
        self._wake_link()

    def _wake_link(self) -> None:
        if self._link is not None and self.streams.is_used:
            self._link.refill = self._refill
            self._link.wake()

    def _on_stream_message(self, message: bytes, now_s: float) -> None:
        problem = self.streams.from_guest(message)
        if problem:
            self._tell(f"the guest broke the protocol of byte streams: {problem}")
            self._note_violation(problem, now_s)

    def _handle(self, event: Event) -> None:
        now_s = self._loop.time()
        match event:
            case Received(_, message) if self._is_of_streams(message):
                self._on_stream_message(message, now_s)
            case Received(_, message):
                self._presence.answered(now_s)
                self.downward.receive(message, now_s)
                self.set_timer()
                if self.arrival.is_under_way:
                    self._note_heard(message)
            case Opened(peer, resumed):
                self._opened(peer, resumed, now_s)
            case Silent(for_s):
                self.downward.upward.silent()
                self._presence.silent()
                self._cure(for_s)
            case Heard():
                self._cures = 0
                self._presence.heard()
                if self._domain.phase is Phase.SERVING:  # else `speak` tells, if it stays
                    self.downward.opened(resumed=True, now_s=now_s)
                self.set_timer()
            case Lost(first, until):
                self._tell(f"frames {first} to {until - 1} were lost: asked for again")
            case Violation(reason):
                self._tell(f"the guest broke the protocol: {reason}")
                self._note_violation(reason, now_s)
            case Refused(reason, by_peer):
                self._trouble = f"refused{' by the guest' if by_peer else ''}: {reason}"
                self._tell(self._trouble)

    def _opened(self, peer: Peer, resumed: bool, now_s: float) -> None:
        self.arrival.reach(OPENED)
        self._presence.opened(now_s)
        self._attempts = self._cures = 0
        self._trouble = ""
        before = f", last with {peer.attached}" if peer.attached else ""
        kind = "session resumed" if resumed else "new session"
        self._tell(f"{kind} with guest {peer.name!r}{before}")
        if not resumed:
            self._told_topics = ()
            takes = peer.features & self._own_features & BYTE_STREAMS
            self.streams.guest_connected(takes_streams=bool(takes))
        self.say_topics()
        self.downward.opened(
            resumed=resumed,
            now_s=now_s,
            before=peer.attached,
            guest=peer.instance,
            takes_raw=peer.takes_raw,
        )
        if not resumed and peer.attached:  # it was restored, or has migrated
            self.went_on()
        self.set_timer()

    def _note_heard(self, message: bytes) -> None:
        if is_subscribe(message):
            self.arrival.reach(TOPICS)
        elif is_outcome(message):
            self.arrival.reach(ANSWERED, after=SENT)

    def _is_of_streams(self, message: bytes) -> bool:
        """Of a guest that may say nothing, not even these are heard."""
        return is_of_family(message) and self.streams.guest_takes and not self.downward.is_mute

    def require_streams(self) -> None:
        """Refuse a program that wants byte streams into a guest that does not take them now.

        Raises:
            Rejected: Why not.
        """
        if self._session.state is not State.OPEN:
            why = ": ".join(filter(None, (self.state, self.problem)))
            raise Rejected(f"{self.name}: no streams now: its channel is {why}")
        if self.downward.is_mute:
            raise Rejected(f"{self.name}: {MUTE}: {self._gate.mute_by}")
        if not self.streams.guest_takes:
            raise Rejected(f"{self.name}: its vchan-guest takes no byte streams: upgrade it")

    def policy_changed(self) -> None:
        """Other rules hold, or other facts are known."""
        self.downward.policy_changed(self._loop.time())
        self.streams.policy_changed()

    def went_on(self) -> None:
        """The guest stood still, and does so no more."""
        if self._clock is not None:
            self._clock.check()

    def _submit(self, request: Request, told: Callable[[Outcome], None]) -> None:
        self.downward.submit_local(request, told, self._loop.time())
        self.set_timer()

    def say_topics(self) -> None:
        """Tell the other end, if it is news, what is served on our side: what it may ask there, and
        whether this daemon takes its reports. A guest's daemon sends none before."""
        takes_reports = self._end.role is Role.HOST and self._gate.may_report
        topics = (*self._end.topics, *((REPORTS,) if takes_reports else ()))
        if self._session.state is State.OPEN and topics != self._told_topics:
            self._told_topics = topics
            self._send(encode(Subscribe(topics)), CONTROL)

    def _absent(self) -> None:
        self._tell(f"away for {ABSENT_S:.0f} s: the broker, if there is one, keeps its requests")
        self.downward.suspend(self._loop.time())

    # ---------------------------------------------------------------- the VM's own queue

    def mail(self, token: Hashable, body: bytes) -> None:
        """A message came in it: an answer to the guest, or a note. It is read in turns."""

        def take() -> None:
            self.downward.mail(token, body, self._loop.time())

        self._handle_mail(token, body, take)
        self._mail_turns.begin()
        self.set_timer()

    # ---------------------------------------------------------------- limits

    def _meter(self, size: int, took_s: float) -> float:
        """So much was handled of the guest's: how many seconds not to read more."""
        now_s = self._loop.time()
        self._presence.read(now_s)
        before, after = self._metered, self._count()
        self._metered = after
        for _ in range(after.bad_messages - before.bad_messages):
            self._note_violation("a message that is none", now_s)
        if after.unknown_messages > before.unknown_messages:
            kind = self.downward.unknown_kind
            self._tell(f"passed over a message of kind {kind}: is its vchan-guest a newer one?")
        for _ in range(after.greetings - before.greetings):
            if self.throttle.handshake(now_s):
                self._quarantine(now_s)
        frames = after.frames - before.frames
        messages = after.messages - before.messages
        return self.throttle.received(size, frames, messages, took_s, now_s)

    def _count(self) -> _Metered:
        counters = self._session.counters
        return _Metered(
            counters.frames_received,
            counters.messages_received,
            counters.greetings,
            self.downward.counters["bad_messages"],
            self.downward.counters["unknown_messages"],
        )

    def _note_violation(self, reason: str, now_s: float) -> None:
        if self.throttle.violation(reason, now_s):
            self._quarantine(now_s)

    def _quarantine(self, now_s: float) -> None:
        """Close the channel, until the throttle says otherwise or the operator does."""
        reason = self.throttle.breaker.reason
        until_s = self.throttle.breaker.quarantined_until(now_s)
        assert until_s is not None
        self._tell_quarantine(reason, until_s - now_s)
        self._count_doubt()
        self.downward.suspend(self._loop.time())
        self.downward.disconnected()
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._reconnect_timer is not None:
            self._reconnect_timer.cancel()
        self._reconnect_timer = self._loop.call_at(until_s, self._open)

    def end_quarantine(self) -> bool:
        """The operator's word. False if there is none."""
        if self.throttle.breaker.quarantined_until(self._loop.time()) is None:
            return False
        self.throttle.release()
        if self._domain.phase is not Phase.IDLE and self._reconnect_timer is not None:
            self._reconnect_timer.cancel()
            self._open()
        return True

    @property
    def _is_missed(self) -> bool:
        """Whether a connection is needed and not there: QEMU closes the socket of who has left."""
        return self._link is None and self._domain.phase is not Phase.LEAVING

    @property
    def problem(self) -> str:
        """Why it does not work, or ""."""
        if self._quarantine_problem:
            return self._quarantine_problem
        if self._is_missed:
            return self._trouble or "no attempt to connect has ended yet"
        if self._domain.phase is not Phase.SERVING or self._session.state is State.OPEN:
            return ""
        return self._trouble or NOBODY_ANSWERS

    @property
    def _quarantine_problem(self) -> str:
        return self.throttle.breaker.problem(self._loop.time())

    # ---------------------------------------------------------------- time and state

    def set_timer(self) -> None:
        """Keep one timer at or before the next timeout. Call it after using `downward`: the time is
        looked for once, after all that is done in a turn."""
        if not self._timer_planned:
            self._timer_planned = True
            self._loop.call_soon(self._set_timer)

    def _set_timer(self) -> None:
        self._timer_planned = False
        if self._is_over:
            return
        at_s = self.downward.next_timeout()
        if self.downward.waits_for_reception:
            at_s = earliest(at_s, self._loop.time() + RECEPTION_S)
        self._alarm.set(at_s)

    def _timed_out(self) -> None:
        now_s = self._loop.time()
        session = self._session
        if session.state is State.OPEN and not (session.unacknowledged or session.backlog_bytes):
            self.downward.received_all(now_s)
        self.downward.handle_timeout(now_s)
        self.set_timer()

    @property
    def state(self) -> str:
        """One word for `vchan list`."""
        if self._quarantine_problem:
            return "quarantined"
        if self._is_missed:
            return "connecting"
        if self._domain.phase is not Phase.SERVING:
            return str(self._domain.phase.value)
        if self._session.state not in (State.OPEN, State.GREETING):
            return str(self._session.state.value)
        if self._domain.is_paused:
            return "paused"
        if self._session.state is State.OPEN and not self._presence.is_silent:
            return "ready"
        return "waiting" if self._presence.heard_at_s is None else "silent"

    @property
    def heard_s(self) -> float | None:
        """How many seconds ago the guest's daemon was heard; None: not since the VM came here. One
        that has nothing to say is asked every five seconds."""
        at_s = self._presence.heard_at_s
        return None if at_s is None else self._loop.time() - at_s

    def own_totals(self) -> dict[str, int]:
        """Every counter of this channel, in one table, but for its throttle's: that outlives it."""
        return {
            **self._session.counters.as_dict(),
            **self.counters,
            **self.downward.counters,
            **self.downward.upward.counters,
            **self.streams.counters,
        }

    def totals(self) -> dict[str, int]:
        """Every counter of this channel, in one table."""
        return {**self.own_totals(), **self.throttle.counters}

    def summary(self) -> dict[str, Any]:
        """What `vchan status` shows."""
        peer = self._session.peer
        return {
            "state": self.state,
            "problem": self.problem or None,
            "quarantine": self._quarantine_problem or None,
            "guest": peer.name if peer else None,
            "heard_s": None if self.heard_s is None else round(self.heard_s, 1),
            "path": self._domain.path or "",
            "unacknowledged_frames": self._session.unacknowledged,
            "backlog_bytes": self._session.backlog_bytes,
            "first_answer_s": self._presence.first_answer_s,
            "channel": {**self.counters, **self.throttle.counters},
            "limits": asdict(self.throttle.limits),
            "session": self._session.counters.as_dict(),
            "requests": self.downward.summary(),
            "streams": self.streams.summary(),
        }
