"""Liveness: when to ask whether the peer is there, and when to report that it does not answer.

Rules of this file
1. No I/O, no clock, no logging.
2. Silence is reported, and nothing else: a paused VM is silent for hours and is not dead.
3. Asking never ends; it becomes more and more rare.
"""

from typing import Final, NamedTuple

from vchan.session.contract import PING_IDLE_S, Config, Silent

PROBE_S: Final = 1.0
"""Ask what arrived when something is unacknowledged and the peer has been silent so long."""
REGREET_PINGS: Final = 2
"""After so many unanswered PINGs a HELLO goes with each: the peer may have lost our key."""


class Asking(NamedTuple):
    """What a look at the peer says is to be done."""

    ping: bool
    greet: bool
    silent: Silent | None


class Liveness:
    """What we know of the peer's being there. All times are on the session's clock."""

    __slots__ = (
        "_config",
        "_pings_unanswered",
        "_silent_told_s",
        "asked_s",
        "check_at_s",
        "heard_s",
        "progress_s",
        "was_silent",
    )

    def __init__(self, config: Config) -> None:
        self._config = config
        self.check_at_s: float | None = None  # when to call `check`
        self.heard_s = 0.0
        self.progress_s: float | None = None  # acknowledged last; None: since the next check
        self.asked_s: float | None = None  # when, if no answer has come
        self._pings_unanswered = 0
        self._silent_told_s = 0.0
        self.was_silent = False

    def greeted(self, now_s: float) -> None:
        """A HELLO is about to go out: silence counts from here."""
        self.check_at_s = None
        self.heard_s = self._silent_told_s = now_s

    def opened(self, now_s: float) -> None:
        """The peer is there."""
        self.heard_s = self._silent_told_s = self.progress_s = now_s
        self.check_at_s = now_s + PROBE_S
        self.asked_s = None
        self.was_silent = False

    def closed(self) -> None:
        """There is no stream to ask on."""
        self.check_at_s = None

    def began_to_wait(self, now_s: float) -> None:
        """Something is unacknowledged, and nothing was.

        Args:
            now_s: May be long ago: bytes are asked of a session without the time. So the clock of
                what is unacknowledged starts with the check itself.
        """
        self.progress_s = None
        if self.check_at_s is not None and self.check_at_s > now_s + PROBE_S:
            self.check_at_s = now_s + PROBE_S

    def answered(self, *, waiting: bool) -> bool:
        """The peer that was asked has spoken. Whether it had been told to be silent.

        Args:
            waiting: See `check`.
        """
        self.asked_s = None
        if not waiting:
            self.check_at_s = self._ahead_of(self.heard_s + self._config.ping_idle_s)
        was_silent, self.was_silent = self.was_silent, False
        return was_silent

    def _ahead_of(self, at_s: float) -> float:
        """When to ask an idle peer that would be asked at `at_s`, and would ask us then: at a tick
        that is past by then, with room for the peer to hear it."""
        tick_s = self._config.ask_tick_s
        return (at_s // tick_s - 1.0) * tick_s if tick_s else at_s

    def _silent_look_s(self, at_s: float) -> float:
        """When to look whether a peer is still silent at `at_s`: at the tick that comes then."""
        tick_s = self._config.ask_tick_s
        return -(-at_s // tick_s) * tick_s if tick_s else at_s

    def silent_at(self) -> float:
        """When silence is to be told next."""
        return self._silent_told_s + self._config.silence_s

    def silence(self, now_s: float) -> Silent | None:
        """Silence, if it is time to tell it."""
        # The same sum as the timer's: a difference may fall short of it by a rounding error.
        if now_s < self.silent_at():
            return None
        self._silent_told_s = now_s
        self.was_silent = True
        return Silent(now_s - self.heard_s)

    def check(self, now_s: float, *, waiting: bool) -> Asking:
        """Look whether the peer has to be asked; plan the next look.

        Args:
            waiting: Something is unacknowledged, or waits to be sent.
        """
        if self.progress_s is None:
            self.progress_s = now_s
        idle_s = PROBE_S if waiting else self._config.ping_idle_s
        ping = greet = False
        due_s = self._due_s(idle_s, waiting=waiting)
        if now_s >= due_s:
            ping = True
            if self.asked_s is None:
                self._silent_told_s = now_s  # silence counts from the first question
            else:
                self._pings_unanswered += 1
                greet = self._pings_unanswered >= REGREET_PINGS
            self.asked_s = now_s
            due_s = now_s + idle_s
        self.check_at_s = due_s
        if self.asked_s is None:
            return Asking(ping, greet, None)
        self.check_at_s = min(due_s, self._silent_look_s(now_s + self._config.silence_s))
        return Asking(ping, greet, self.silence(now_s))

    def _due_s(self, idle_s: float, *, waiting: bool) -> float:
        if self.asked_s is not None:  # asked already: again ever more rarely, but never stop
            factor = 2.0 ** min(self._pings_unanswered, 5)
            return self.asked_s + min(idle_s * factor, 6 * PING_IDLE_S)
        self._pings_unanswered = 0
        assert self.progress_s is not None
        if waiting:
            return self.progress_s + idle_s
        return self._ahead_of(self.heard_s + idle_s)
