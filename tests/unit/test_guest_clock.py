"""A guest's clock is set by the difference, if that is known well enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vchan.errors import LimitExceeded
from vchan.host.vm.clock import ATTEMPTS, ROUND_TRIP_S, STEP_S, GuestClock
from vchan.rpc.bodies import decode_invocation, encode_failure, encode_json
from vchan.rpc.in_flight import Answered, HandedBack, Heartbeat, Outcome, Overdue
from vchan.rpc.messages import AGENT_GONE, NO_AGENT, Request


class Rig:
    """A guest whose clock is late by `late_s`, and whose answers take `takes_s`."""

    def __init__(self, *, late_s: float = 0.0, takes_s: float = 0.01) -> None:
        self.wall_s = 1_700_000_000.0
        self.late_s = late_s
        self.takes_s = takes_s
        self.log: list[str] = []
        self.asked: list[tuple[str, Any]] = []
        self.answer: Callable[[Request], Outcome] | None = None
        self.lost: list[str] = []  # methods, whose next answer is that it may have run
        self.refuses = False
        self.clock = GuestClock(self._submit, self.log.append, lambda: self.wall_s)

    def _submit(self, request: Request, told: Callable[[Outcome], None]) -> None:
        if self.refuses:
            raise LimitExceeded("requests", 257, 256, "LOCAL_MAX")
        assert request.is_call and request.topic == "vchan.guest"
        asked = decode_invocation(request.body)
        self.asked.append((asked.method, asked.args))
        told(Heartbeat(request.id))
        if asked.method in self.lost:
            self.lost.remove(asked.method)
            told(HandedBack(request.id, AGENT_GONE, "it may have run"))
            return
        if self.answer is not None:
            told(self.answer(request))
            return
        self.wall_s += self.takes_s / 2
        if asked.method == "step_clock":
            self.late_s -= asked.args["by_s"]
        body = encode_json({"unix_s": self.wall_s - self.late_s})
        self.wall_s += self.takes_s / 2
        told(Answered(request.id, False, body))


@pytest.mark.parametrize("late_s", [3600.0, STEP_S + 0.1, -5.0])
def test_it_is_set(late_s: float) -> None:
    rig = Rig(late_s=late_s)
    rig.clock.check()
    assert abs(rig.late_s) < 0.01
    assert rig.log == [f"its clock was set by {late_s:+.3f} s"]


def test_a_small_difference_is_left() -> None:
    rig = Rig(late_s=STEP_S / 2)
    rig.clock.check()
    assert [method for method, _ in rig.asked] == ["clock"] and rig.log == []


def test_answers_that_take_too_long_say_nothing() -> None:
    rig = Rig(late_s=60.0, takes_s=ROUND_TRIP_S * 2)
    rig.clock.check()
    assert [method for method, _ in rig.asked] == ["clock"] * ATTEMPTS
    assert "each answer took over" in rig.log[0]
    rig.takes_s = 0.1
    rig.clock.check()
    assert abs(rig.late_s) < 0.2


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            lambda r: Answered(r.id, True, encode_failure("Rejected", "option allow")),
            "option allow",
        ),
        (lambda r: HandedBack(r.id, NO_AGENT, "an older daemon"), "an older daemon"),
        (lambda r: Overdue(r.id), "no answer in"),
        (lambda r: Answered(r.id, False, b"{}"), "did not say"),
        (lambda r: Answered(r.id, False, b'{"unix_s": "now"}'), "did not say"),
        (lambda r: Answered(r.id, False, b"["), "did not say"),
        (lambda r: Answered(r.id, False, b"[" * 100_000), "did not say"),
    ],
)
def test_a_guest_that_does_not_say(answer: Callable[[Request], Outcome], why: str) -> None:
    rig = Rig()
    rig.answer = answer
    rig.clock.check()
    assert len(rig.log) == 1 and why in rig.log[0]


@pytest.mark.parametrize("lost", ["clock", "step_clock"])
def test_a_daemon_that_is_another_one_now_is_asked_again(lost: str) -> None:
    rig = Rig(late_s=60.0)
    rig.lost = [lost]
    rig.clock.check()
    assert rig.late_s == pytest.approx(0.0, abs=STEP_S)
    assert "was set" in rig.log[-1]


def test_a_daemon_that_is_another_one_each_time_is_not_asked_for_ever() -> None:
    rig = Rig()
    rig.answer = lambda request: HandedBack(request.id, AGENT_GONE, "it may have run")
    rig.clock.check()
    assert len(rig.asked) == ATTEMPTS
    assert "it may have run" in rig.log[-1]


def test_a_guest_that_takes_no_more_requests() -> None:
    rig = Rig()
    rig.refuses = True
    rig.clock.check()
    assert "LOCAL_MAX" in rig.log[0]
