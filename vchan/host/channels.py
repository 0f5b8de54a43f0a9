"""The host's end of each VM's channel: connected early, spoken on late, reconnected when wedged."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from vchan.errors import LinkError
from vchan.host.gate import Gate
from vchan.host.guard import Guard
from vchan.host.limits import Limits
from vchan.host.outbound import Offer
from vchan.host.relay import BrokerPort, Relay
from vchan.link import Link
from vchan.loop import Loop, Timer
from vchan.messages import Subscribe, Topic, encode
from vchan.session import (
    CONTROL,
    Config,
    Event,
    Heard,
    Lost,
    Opened,
    Received,
    Refused,
    Role,
    Session,
    Silent,
    State,
    Violation,
)
from vchan.streams import Stream, connect_unix

RECONNECT_S: Final = (0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
"""Between attempts while libvirt says that the domain is there."""
CURE_S: Final = (0.0, 10.0, 30.0, 60.0, 300.0)
"""A silent channel is closed and connected anew: the one cure for QEMU's wedge. A guest without a
daemon is silent too, so it is done ever more rarely."""
SILENCE_S: Final = 4.0
"""A guest that was asked and says nothing for so long is reconnected to. A round trip takes under a
millisecond; a guest that is starved of CPU for so long loses nothing by it."""
LOG_LINES: Final = 20
LOG_PERIOD_S: Final = 10.0
"""What one VM may have logged, with no word of it lost while it behaves."""
RECEPTION_S: Final = 0.05
"""How often it is looked whether a mute guest has received everything."""
NOBODY_ANSWERS: Final = "nobody answers: is vchan-guest installed and running in the VM?"
"""Of a channel that is connected: or the VM is still booting, or QEMU lets another program in."""
ABSENT_S: Final = 60.0
"""A guest that has been away so long leaves its requests to the broker."""


class _Metered(NamedTuple):
    """What has come of the guest, as far as the guard was told."""

    frames: int
    messages: int
    greetings: int
    bad_messages: int


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
    session: Callable[[Config, Callable[[int], bytes]], Session] = Session
    is_one_way: bool = False


class Channel:
    """One VM's channel, from Connect to Release.

    Args:
        vm: The domain's UUID.
        name: The domain's name, for the log.
        host: This host's name and the daemon's instance, told to the guest.
        gate, context_allow, offer: See `Relay`.
        log: Told what an operator may want to know.
        guard: This VM's; by default one with the default limits.
        quarantined: Told why, when it is put into quarantine.
        end: What our end is like.
    """

    def __init__(
        self,
        loop: Loop,
        vm: str,
        name: str,
        host: tuple[str, bytes],
        broker: BrokerPort | None,
        gate: Gate,
        context_allow: frozenset[str],
        offer: Offer,
        log: Callable[[str], None],
        guard: Guard | None = None,
        quarantined: Callable[[str], None] = lambda _: None,
        end: End = End(),  # noqa: B008 - immutable
    ) -> None:
        self.vm = vm
        self.name = name
        self._loop = loop
        self._log_line = log
        self._end = end
        self.guard = guard or Guard(Limits())
        self._tell_quarantine = quarantined
        self._session = end.session(
            Config(
                end.role,
                host[1],
                host[0],
                message_bytes_max=self.guard.limits.message_bytes,
                reassembly_bytes_max=self.guard.limits.reassembly_bytes,
                silence_s=SILENCE_S,
            ),
            os.urandom,
        )
        self._metered = _Metered(0, 0, 0, 0)
        self.relay = Relay(
            vm,
            self._send,
            broker,
            gate,
            context_allow,
            offer,
            host[1].hex(),
            lambda: self._session.backlog_bytes,
        )
        self._path = ""
        self._link: Link | None = None
        self._speaks = False
        self._hushed = False
        self._released = False
        self.paused = False
        self._attempts = 0
        self._cures = 0
        self._cure_not_before_s = 0.0
        self._told = ""
        self._trouble = ""  # why there is no link, or no session on it
        self._log_left = LOG_LINES
        self._log_period_s = 0.0  # when the next one begins
        self._reconnect_timer: Timer | None = None
        self._absent_timer: Timer | None = None
        self._relay_timer: Timer | None = None
        self._spoke_s: float | None = None
        self.counters = {
            "reconnects": 0,
            "cures": 0,
            "frames_in_doubt": 0,  # sent, and not acknowledged when the session ended
            "requests_in_doubt": 0,  # handed to the guest, and not over then
        }
        self.first_answer_s: float | None = None
        """From Speak to the first message of the guest's: how long a migration was felt."""

    # ---------------------------------------------------------------- what domains.py decides

    def connect(self, path: str) -> None:
        """Connect to this socket, and stay connected. Say nothing before `speak`."""
        self._path = path
        self._open()

    def speak(self) -> None:
        """Begin the session, or go on after `hush`."""
        if self._hushed:
            self.relay.opened(resumed=True, now_s=self._loop.time())
            self.set_timer()
        self._speaks = True
        self._hushed = False
        self._spoke_s = self._loop.time()
        if self._session.state is not State.OPEN:  # after `hush` it may be, and nothing would tell
            self._plan_absence()
        if self._link is not None:
            self._link.speak()
        elif self._reconnect_timer is None:
            self._open()

    def hush(self) -> None:
        """The guest goes on elsewhere: write nothing more, read what it wrote here.

        What it has not taken is handed back now, not at the end of the stream: by then it has been
        running elsewhere for up to a quarter of a second.
        """
        self._hushed = True
        self.relay.suspend()
        if self._link is not None:
            self._link.hush()

    def release(self, reason: str) -> None:
        """It is over."""
        if not self._released:
            self._count_doubt()
        self._released = True
        for timer in (self._reconnect_timer, self._absent_timer, self._relay_timer):
            if timer is not None:
                timer.cancel()
        if self._link is not None:
            self._link.close()
            self._link = None
        self.relay.release(reason)

    def _count_doubt(self) -> None:
        """What the session leaves open: found out here, repaired by the broker and the next one."""
        self.counters["frames_in_doubt"] += self._session.unacknowledged
        self.counters["requests_in_doubt"] += self.relay.open_requests

    # ---------------------------------------------------------------- the stream

    def _open(self) -> None:
        self._reconnect_timer = None
        try:
            stream = self._end.open_stream(self._path)
        except LinkError as error:
            self._trouble = str(error)
            self._tell(str(error))
            self._plan_reconnect()
            return
        self._trouble = ""
        self._link = Link(
            self._loop,
            self._session,
            stream,
            self._handle,
            self._lost,
            silent=not self._speaks or self._hushed,
            meter=self._meter,
        )

    def _plan_reconnect(self) -> None:
        delays_s = self._end.reconnect_s
        delay_s = delays_s[min(self._attempts, len(delays_s) - 1)]
        self._attempts += 1
        self._reconnect_timer = self._loop.call_later(delay_s, self._open)

    def _lost(self, reason: str) -> None:
        self._link = None
        self._trouble = reason
        self.relay.disconnected()
        self._tell(reason)
        if self._hushed:
            # The guest lives elsewhere by now: what it has not taken goes back at once.
            self._count_doubt()
            self._released = True
            self.relay.release("migrated to another host")
        elif not self._released:
            self.counters["reconnects"] += 1
            self._plan_reconnect()

    def _cure(self, silent_s: float) -> None:
        """Close and connect: what QEMU's wedge needs. The session goes on where it was."""
        now_s = self._loop.time()
        if self._link is None or self._hushed or self.paused or now_s < self._cure_not_before_s:
            return
        self._cures = min(self._cures + 1, len(CURE_S) - 1)
        self._cure_not_before_s = now_s + CURE_S[self._cures]
        self.counters["cures"] += 1
        self._tell(f"silent for {silent_s:.0f} s: connecting anew")
        self._link.close()
        self._link = None
        self.relay.disconnected()
        self._open()

    # ---------------------------------------------------------------- the session

    def _send(self, message: bytes, stream: int) -> None:
        if self._link is not None:
            self._link.send(message, stream)
        else:
            self._session.send(message, stream)

    def _handle(self, event: Event) -> None:
        now_s = self._loop.time()
        match event:
            case Received(_, message):
                if self._spoke_s is not None:
                    self.first_answer_s, self._spoke_s = now_s - self._spoke_s, None
                self.relay.receive(message, now_s)
                self.set_timer()
            case Opened(peer, resumed):
                self._attempts = self._cures = 0
                self._trouble = ""
                self._cancel_absence()
                before = f", last with {peer.attached}" if peer.attached else ""
                kind = "session resumed" if resumed else "new session"
                self._tell(f"{kind} with guest {peer.name!r}{before}")
                if self._end.topics and not resumed:
                    self._send(encode(Subscribe(self._end.topics)), CONTROL)
                self.relay.opened(resumed=resumed, now_s=now_s, before=peer.attached)
                self.set_timer()
            case Silent(for_s):
                self._plan_absence()
                self._cure(for_s)
            case Heard():
                self._cures = 0
                self._cancel_absence()
                if not self._hushed:  # what it said before it went: `speak` tells, if it stays
                    self.relay.opened(resumed=True, now_s=now_s)
                self.set_timer()
            case Lost(first, until):
                self._tell(f"frames {first} to {until - 1} were lost: asked for again")
            case Violation(reason):
                self._tell(f"the guest broke the protocol: {reason}")
                self._note_violation(reason, now_s)
            case Refused(reason, by_peer):
                self._trouble = f"refused{' by the guest' if by_peer else ''}: {reason}"
                self._tell(self._trouble)

    def _plan_absence(self) -> None:
        if self._absent_timer is None:
            self._absent_timer = self._loop.call_later(ABSENT_S, self._absent)

    def _cancel_absence(self) -> None:
        if self._absent_timer is not None:
            self._absent_timer.cancel()
            self._absent_timer = None

    def _absent(self) -> None:
        self._absent_timer = None
        self._tell(f"away for {ABSENT_S:.0f} s: the broker, if there is one, keeps its requests")
        self.relay.suspend()

    # ---------------------------------------------------------------- limits

    def _meter(self, size: int, took_s: float) -> float:
        """So much was handled of the guest's: how many seconds not to read more."""
        now_s = self._loop.time()
        before, after = self._metered, self._count()
        self._metered = after
        for _ in range(after.bad_messages - before.bad_messages):
            self._note_violation("a message that is none", now_s)
        for _ in range(after.greetings - before.greetings):
            if self.guard.handshake(now_s):
                self._quarantine(now_s)
        frames = after.frames - before.frames
        messages = after.messages - before.messages
        return self.guard.received(size, frames, messages, took_s, now_s)

    def _count(self) -> _Metered:
        counters = self._session.counters
        bad_messages = self.relay.counters["bad_messages"]
        return _Metered(
            counters.frames_received, counters.messages_received, counters.greetings, bad_messages
        )

    def _note_violation(self, reason: str, now_s: float) -> None:
        if self.guard.violation(reason, now_s):
            self._quarantine(now_s)

    def _quarantine(self, now_s: float) -> None:
        """Close the channel, until the guard says otherwise or the operator does."""
        reason = self.guard.breaker.reason
        until_s = self.guard.breaker.quarantined_until(now_s)
        assert until_s is not None
        # Whatever it has done to get here, it has not used up this line.
        self._log_line(
            f"{self.name} ({self.vm}): in quarantine for {until_s - now_s:.0f} s: {reason}"
        )
        self._tell_quarantine(reason)
        self._count_doubt()
        self.relay.suspend()
        self.relay.disconnected()
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._reconnect_timer is not None:
            self._reconnect_timer.cancel()
        self._reconnect_timer = self._loop.call_at(until_s, self._open)

    def end_quarantine(self) -> bool:
        """The operator's word. False if there is none."""
        if self.guard.breaker.quarantined_until(self._loop.time()) is None:
            return False
        self.guard.release()
        if not self._released and self._reconnect_timer is not None:
            self._reconnect_timer.cancel()
            self._open()
        return True

    @property
    def problem(self) -> str:
        """Why it does not work, or ""."""
        if self._quarantine_problem:
            return self._quarantine_problem
        if self._link is None:
            return self._trouble or "no attempt to connect has ended yet"
        if not self._speaks or self._hushed or self._session.state is State.OPEN:
            return ""
        return self._trouble or NOBODY_ANSWERS

    @property
    def _quarantine_problem(self) -> str:
        now_s = self._loop.time()
        until_s = self.guard.breaker.quarantined_until(now_s)
        if until_s is None:
            return ""
        return f"in quarantine for {until_s - now_s:.0f} s more: {self.guard.breaker.reason}"

    # ---------------------------------------------------------------- time and state

    def set_timer(self) -> None:
        """Keep one timer at or before the relay's next timeout. Call it after using `relay`."""
        at_s = self.relay.next_timeout()
        if self.relay.waits_for_reception:
            at_s = min(at_s or math.inf, self._loop.time() + RECEPTION_S)
        if at_s is not None and (self._relay_timer is None or at_s < self._relay_timer.at_s):
            if self._relay_timer is not None:
                self._relay_timer.cancel()
            self._relay_timer = self._loop.call_at(at_s, self._relay_timed_out)

    def _relay_timed_out(self) -> None:
        self._relay_timer = None
        now_s = self._loop.time()
        session = self._session
        if session.state is State.OPEN and not (session.unacknowledged or session.backlog_bytes):
            self.relay.received_all(now_s)
        self.relay.handle_timeout(now_s)
        self.set_timer()

    def _tell(self, text: str) -> None:
        """Log a line; not the same twice, and not more than LOG_LINES a LOG_PERIOD_S: a guest may
        repeat a fault at will, and vary it."""
        if text == self._told:
            return
        self._told = text
        now_s = self._loop.time()
        if now_s >= self._log_period_s:
            if self._log_left < 0:
                self._log_line(f"{self.name} ({self.vm}): {-self._log_left} lines left out")
            self._log_period_s = now_s + LOG_PERIOD_S
            self._log_left = LOG_LINES
        self._log_left -= 1
        if self._log_left >= 0:
            self._log_line(f"{self.name} ({self.vm}): {text}")

    @property
    def state(self) -> str:
        """One word for `vchan list`."""
        if self._quarantine_problem:
            return "quarantined"
        if self._link is None:
            return "connecting"
        if self._hushed:
            return "leaving"
        if not self._speaks:
            return "arriving"
        if self._session.state is State.OPEN:
            return "ready"
        return "waiting" if self._session.state is State.GREETING else self._session.state.value

    def totals(self) -> dict[str, int]:
        """Every counter of this channel, in one table."""
        return {
            **self._session.counters.as_dict(),
            **self.counters,
            **self.guard.counters,
            **self.relay.counters,
            **self.relay.outbound.counters,
        }

    def summary(self) -> dict[str, Any]:
        """What `vchan status` shows."""
        peer = self._session.peer
        return {
            "state": self.state,
            "problem": self.problem or None,
            "quarantine": self._quarantine_problem or None,
            "guest": peer.name if peer else None,
            "path": self._path,
            "unacknowledged_frames": self._session.unacknowledged,
            "backlog_bytes": self._session.backlog_bytes,
            "first_answer_s": self.first_answer_s,
            "channel": {**self.counters, **self.guard.counters},
            "limits": asdict(self.guard.limits),
            "session": self._session.counters.as_dict(),
            "requests": self.relay.summary(),
        }
