"""A guest's clock, set after the guest stood still: paused, saved, or migrated."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import CLOCK_REALTIME, clock_gettime
from typing import Any, Final

from vchan.errors import VchanError
from vchan.rpc.bodies import decode_failure, decode_json, encode_invocation
from vchan.rpc.in_flight import Answered, HandedBack, Heartbeat, Outcome
from vchan.rpc.messages import AGENT_GONE, CALL, GUEST_TOPIC, Request

STEP_S: Final = 1.0
"""A smaller difference is left to the guest: to its NTP, if it has one."""
ROUND_TRIP_S: Final = 0.5
"""An answer that took longer says too little of when it was given: asked again."""
ATTEMPTS: Final = 3
"""How often it is asked after each time that the guest stood still."""
ANSWER_S: Final = 30.0
"""For an answer: a guest that goes on has other things to do first."""

Submit = Callable[[Request, Callable[[Outcome], None]], None]


class GuestClock:
    """Asks for the guest's time, and has it set by the difference.

    Args:
        submit: Hands a request to the guest's daemon; raises VchanError if it takes none.
        tell: Told, for the log, what was done, or why not.
        wall_s: Seconds since 1970 by this host's clock, which is taken to be right.
    """

    def __init__(
        self,
        submit: Submit,
        tell: Callable[[str], None],
        wall_s: Callable[[], float] = lambda: clock_gettime(CLOCK_REALTIME),
    ) -> None:
        self._submit = submit
        self._tell = tell
        self._wall_s = wall_s
        self._attempts = 0

    def check(self) -> None:
        """The guest goes on after it stood still."""
        self._attempts = ATTEMPTS
        self._ask()

    def _ask(self) -> None:
        self._attempts -= 1
        asked_s = self._wall_s()
        self._call("clock", {}, lambda told: self._compare(asked_s, told))

    def _call(self, method: str, args: dict[str, Any], told: Callable[[Any], None]) -> None:
        def heard(outcome: Outcome) -> None:
            match outcome:
                case Answered(_, False, body):
                    told(_result(body))
                case Answered(_, True, body):
                    self._tell(f"its clock is not set: {decode_failure(body)[1]}")
                case HandedBack(_, reason, _) if reason == AGENT_GONE and self._attempts > 0:
                    self._ask()  # it may have been set, or not: how late is it now?
                case HandedBack(_, _, text):
                    self._tell(f"its clock is not set: {text}")
                case Heartbeat():
                    pass
                case _:
                    self._tell(f"its clock is not set: no answer in {ANSWER_S:.0f} s")

        body = encode_invocation(method, args)
        timeout_ms = int(ANSWER_S * 1000)
        request = Request(os.urandom(16), CALL, timeout_ms, 0, *GUEST_TOPIC, "", body)
        try:
            self._submit(request, heard)
        except VchanError as error:
            self._tell(f"its clock is not set: {error}")

    def _compare(self, asked_s: float, told: Any) -> None:
        now_s = self._wall_s()
        guest_s = told.get("unix_s") if isinstance(told, dict) else None
        if not isinstance(guest_s, int | float) or isinstance(guest_s, bool):
            self._tell("its clock is not set: it did not say what time it has")
            return
        if now_s - asked_s > ROUND_TRIP_S:
            if self._attempts > 0:
                self._ask()
            else:
                self._tell(f"its clock is not set: each answer took over {ROUND_TRIP_S:g} s")
            return
        by_s = (asked_s + now_s) / 2 - guest_s
        if abs(by_s) >= STEP_S:
            text = f"its clock was set by {by_s:+.3f} s"
            self._call("step_clock", {"by_s": round(by_s, 3)}, lambda _: self._tell(text))


def _result(body: bytes) -> Any:
    """What a guest answered: anything."""
    try:
        return decode_json(body)
    except (ValueError, RecursionError):
        return None
