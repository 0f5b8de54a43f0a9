"""The super-agent's decisions: by example, and against a model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vchan.agents.supervisor import (
    CRASHES,
    HEALTHY_S,
    KILL_AGAIN_S,
    Action,
    RestartPolicy,
    Supervised,
    UnitState,
)

START, TERMINATE, KILL = [Action.START], [Action.TERMINATE], [Action.KILL]


def running(policy: RestartPolicy | None = None) -> Supervised:
    supervised = Supervised(policy or RestartPolicy())
    assert supervised.start(0.0) == START
    return supervised


def is_crashing(supervised: Supervised) -> bool:
    """As below."""
    return supervised.is_crashing


def is_in(supervised: Supervised, state: UnitState) -> bool:
    """Asked so, mypy does not believe that it stays."""
    return supervised.state is state


# --- starting and stopping


def test_it_starts_once() -> None:
    supervised = running()
    assert is_in(supervised, UnitState.RUNNING)
    assert supervised.start(1.0) == []
    assert supervised.starts == 1
    assert supervised.next_timeout() is None


def test_it_is_asked_to_end_and_then_killed_again_and_again() -> None:
    supervised = running(RestartPolicy(stop_timeout_s=3.0))
    assert supervised.stop(10.0) == TERMINATE
    assert supervised.stop(11.0) == []
    assert supervised.next_timeout() == 13.0
    assert supervised.handle_timeout(12.9) == []
    assert supervised.handle_timeout(13.0) == KILL
    assert supervised.handle_timeout(13.0 + KILL_AGAIN_S) == KILL
    assert supervised.exited(-9, 20.0) == []
    assert is_in(supervised, UnitState.STOPPED)
    assert supervised.next_timeout() is None


def test_what_was_stopped_is_not_started_again() -> None:
    for policy in (RestartPolicy("always"), RestartPolicy("on-failure")):
        supervised = running(policy)
        supervised.stop(1.0)
        assert supervised.exited(1, 2.0) == []
        assert is_in(supervised, UnitState.STOPPED)


def test_stopping_what_does_not_run() -> None:
    supervised = Supervised(RestartPolicy())
    assert supervised.stop(1.0) == []
    assert is_in(supervised, UnitState.STOPPED)
    supervised = running()
    supervised.exited(1, 1.0)
    assert is_in(supervised, UnitState.WAITING)
    assert supervised.stop(1.1) == []
    assert is_in(supervised, UnitState.STOPPED)
    assert supervised.handle_timeout(1000.0) == []


def test_restarting() -> None:
    supervised = running()
    assert supervised.restart(1.0) == TERMINATE
    assert supervised.restart(1.1) == []
    assert supervised.exited(0, 2.0) == START
    assert supervised.starts == 2
    for state in (UnitState.STOPPED, UnitState.WAITING, UnitState.FAILED):
        supervised = Supervised(RestartPolicy("no" if state is UnitState.FAILED else "always"))
        if state is not UnitState.STOPPED:
            supervised.start(0.0)
            supervised.exited(1, 0.1)
        assert is_in(supervised, state)
        assert supervised.restart(1.0) == START


def test_the_last_word_counts_while_it_stops() -> None:
    supervised = running()
    supervised.stop(1.0)
    assert supervised.start(1.1) == []
    assert supervised.exited(0, 2.0) == START
    supervised.restart(3.0)
    supervised.stop(3.1)
    assert supervised.exited(0, 4.0) == []
    assert is_in(supervised, UnitState.STOPPED)


def test_an_adopted_process_is_like_one_of_our_own() -> None:
    supervised = Supervised(RestartPolicy("always"))
    supervised.adopted(5.0)
    assert is_in(supervised, UnitState.RUNNING)
    assert supervised.starts == 0
    supervised.exited(None, 100.0)
    assert is_in(supervised, UnitState.WAITING)


# --- ending by itself


@pytest.mark.parametrize(
    ("restart", "status", "state"),
    [
        ("always", 0, UnitState.WAITING),
        ("always", 1, UnitState.WAITING),
        ("on-failure", 0, UnitState.STOPPED),
        ("on-failure", 1, UnitState.WAITING),
        ("on-failure", -15, UnitState.WAITING),
        ("on-failure", None, UnitState.WAITING),
        ("no", 0, UnitState.STOPPED),
        ("no", 1, UnitState.FAILED),
        ("no", None, UnitState.FAILED),
    ],
)
def test_whether_it_is_started_again(restart: str, status: int | None, state: UnitState) -> None:
    supervised = running(RestartPolicy(restart))
    assert supervised.exited(status, 1.0) == []
    assert is_in(supervised, state)
    assert supervised.last_status == status
    if state is UnitState.WAITING:
        assert supervised.handle_timeout(1.0 + RestartPolicy().delay_s) == START


def delays(supervised: Supervised, count: int, ran_s: float = 0.0) -> list[float]:
    found, now_s = [], supervised.since_s
    for _ in range(count):
        now_s += ran_s
        supervised.exited(1, now_s)
        at_s = supervised.next_timeout()
        assert at_s is not None
        assert supervised.handle_timeout(at_s - 0.001) == []
        found.append(round(at_s - now_s, 6))
        now_s = at_s
        assert supervised.handle_timeout(now_s) == START
    return found


def test_a_crash_loop_backs_off() -> None:
    supervised = running(RestartPolicy(delay_s=1.0, delay_max_s=10.0))
    assert delays(supervised, 2) == [1.0, 2.0]
    assert not is_crashing(supervised)
    assert delays(supervised, 1) == [4.0]
    assert supervised.quick_ends == CRASHES
    assert is_crashing(supervised)
    assert delays(supervised, 3) == [8.0, 10.0, 10.0]
    assert delays(supervised, 2000)[-1] == 10.0  # no overflow


def test_who_was_healthy_starts_again_soon() -> None:
    supervised = running(RestartPolicy(delay_s=1.0))
    assert delays(supervised, 4)[-1] == 8.0
    assert delays(supervised, 3, ran_s=HEALTHY_S) == [1.0, 1.0, 1.0]
    assert not supervised.is_crashing


def test_somebody_who_starts_it_does_not_wait() -> None:
    supervised = running(RestartPolicy(delay_s=1.0))
    delays(supervised, 5)
    supervised.exited(1, 1000.0)
    assert supervised.start(1000.1) == START
    assert not supervised.is_crashing
    supervised.exited(1, 1000.2)
    assert supervised.next_timeout() == 1001.2


def test_a_new_policy_holds_from_the_next_decision_on() -> None:
    supervised = running(RestartPolicy("no"))
    supervised.policy = RestartPolicy("always")
    supervised.exited(1, 1.0)
    assert is_in(supervised, UnitState.WAITING)


# --- against a model


class Machine(RuleBasedStateMachine):
    """Whatever is wanted and whatever happens: one process at a time, ended by TERM before KILL,
    running when it should be, and never left waiting for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.is_there = False
        self.was_asked = False
        self.wanted = False  # by the last who said something
        self.supervised = Supervised(
            RestartPolicy(delay_s=1.0, delay_max_s=8.0, stop_timeout_s=5.0)
        )

    def follow(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Action.START:
                    assert not self.is_there
                    assert self.wanted
                    self.is_there = True
                    self.was_asked = False
                case Action.TERMINATE:
                    assert self.is_there
                    assert not self.was_asked
                    self.was_asked = True
                case Action.KILL:
                    assert self.is_there
                    assert self.was_asked

    @rule()
    def start(self) -> None:
        self.wanted = True
        self.follow(self.supervised.start(self.now_s))

    @rule()
    def stop(self) -> None:
        self.wanted = False
        self.follow(self.supervised.stop(self.now_s))

    @rule()
    def restart(self) -> None:
        self.wanted = True
        self.follow(self.supervised.restart(self.now_s))

    @rule(restart=st.sampled_from(["always", "on-failure", "no"]))
    def change(self, restart: str) -> None:
        self.supervised.policy = self.supervised.policy._replace(restart=restart)

    @precondition(lambda self: self.is_there)
    @rule(status=st.sampled_from([0, 1, -9, -15, None]))
    def end(self, status: int | None) -> None:
        restart = self.supervised.policy.restart
        if not self.was_asked and (restart == "no" or (restart == "on-failure" and status == 0)):
            self.wanted = False  # it may rest
        self.is_there = False
        self.follow(self.supervised.exited(status, self.now_s))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.follow(self.supervised.handle_timeout(self.now_s))

    @invariant()
    def it_is_what_it_says(self) -> None:
        assert self.supervised.is_there == self.is_there
        at_s = self.supervised.next_timeout()
        if self.wanted and not self.is_there:
            assert self.supervised.state is UnitState.WAITING
            assert at_s is not None
            assert at_s <= self.now_s + 8.0
        if self.is_there and self.was_asked:
            assert at_s is not None
        if not self.wanted and not self.is_there:
            assert at_s is None

    def teardown(self) -> None:
        self.stop()
        while self.is_there:  # even who ignores TERM is killed in the end
            at_s = self.supervised.next_timeout()
            assert at_s is not None
            self.now_s = at_s
            actions = self.supervised.handle_timeout(at_s)
            self.follow(actions)
            if Action.KILL in actions:
                self.end(-9)
        assert self.supervised.state in (UnitState.STOPPED, UnitState.FAILED)


Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestSupervised = Machine.TestCase
