"""The event loop: order, cancellation, readiness, other threads."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from vchan.io.loop import Alarm, Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


def test_timers_come_in_the_order_of_their_times(loop: Loop) -> None:
    came: list[str] = []
    loop.call_later(0.02, lambda: came.append("second"))
    loop.call_later(0.01, lambda: came.append("first"))
    loop.call_later(0.03, loop.stop)
    loop.call_later(0.015, lambda: came.append("cancelled")).cancel()
    loop.run()
    assert came == ["first", "second"]


def test_equal_times_keep_their_order(loop: Loop) -> None:
    came: list[int] = []
    at_s = loop.time()
    for number in range(10):
        loop.call_at(at_s, lambda number=number: came.append(number))  # type: ignore[misc]
    loop.run_once()
    assert came == list(range(10))


def test_a_timer_can_cancel_another_and_itself(loop: Loop) -> None:
    came: list[str] = []
    at_s = loop.time()

    def cancel_both() -> None:
        came.append("first")
        first.cancel()
        second.cancel()

    first = loop.call_at(at_s, cancel_both)
    second = loop.call_at(at_s, lambda: came.append("second"))
    loop.run_once()
    first.cancel()  # harmless when it has come
    assert came == ["first"]


def test_a_cancelled_timer_does_not_wake_the_loop(loop: Loop) -> None:
    for _ in range(10):
        loop.call_later(0.0, lambda: None).cancel()
    loop.call_soon(lambda: None)
    loop.run_once()
    assert loop._patience(5.0) == 5.0


def test_an_alarm_rings_once_at_the_earliest_time_it_is_set_to(loop: Loop) -> None:
    began_s, rang_s = loop.time(), list[float]()
    alarm = Alarm(loop, lambda: rang_s.append(loop.time()))
    for delay_s in (30.0, 0.02, 10.0):
        alarm.set(began_s + delay_s)
    alarm.set(None)
    loop.call_later(0.06, loop.stop)
    loop.run()
    assert len(rang_s) == 1
    assert 0.02 <= rang_s[0] - began_s < 0.06


def test_an_alarm_that_is_put_off_does_not_ring_before(loop: Loop) -> None:
    began_s, rang_s = loop.time(), list[float]()
    alarm = Alarm(loop, lambda: rang_s.append(loop.time()))
    alarm.set(began_s + 0.01)
    alarm.move(began_s + 0.04)
    alarm.set(began_s + 0.05)  # later than it is set to: nothing
    loop.call_later(0.08, loop.stop)
    loop.run()
    assert len(rang_s) == 1
    assert 0.04 <= rang_s[0] - began_s < 0.08


def test_an_alarm_that_is_called_off_can_be_set_to_any_time(loop: Loop) -> None:
    began_s, rang_s = loop.time(), list[float]()
    alarm = Alarm(loop, lambda: rang_s.append(loop.time()))
    alarm.set(began_s + 0.01)
    alarm.move(None)
    loop.call_later(0.02, loop.stop)
    loop.run()
    assert rang_s == []
    alarm.set(began_s + 0.03)
    alarm.move(began_s + 0.025)
    loop.call_later(0.03, loop.stop)
    loop.run()
    assert len(rang_s) == 1 and rang_s[0] - began_s >= 0.025


def test_an_alarm_can_be_set_again_while_it_rings_and_be_cancelled(loop: Loop) -> None:
    rang: list[str] = []

    def ring() -> None:
        rang.append("")
        alarm.set(loop.time() if len(rang) < 3 else None)

    alarm, other = Alarm(loop, ring), Alarm(loop, lambda: rang.append("cancelled"))
    alarm.set(loop.time())
    other.set(loop.time())
    other.cancel()
    other.cancel()
    loop.call_later(0.02, loop.stop)
    loop.run()
    assert rang == ["", "", ""]


def test_call_soon_runs_before_waiting_and_cannot_starve_the_loop(loop: Loop) -> None:
    came: list[str] = []

    def again() -> None:
        came.append("again")
        loop.call_soon(again)

    loop.call_soon(again)
    loop.run_once()
    loop.run_once()
    assert came == ["again", "again"]  # once a turn: readiness and timers get theirs


def test_readers_and_writers_of_one_descriptor(loop: Loop) -> None:
    came: list[str] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop.add_reader(ours.fileno(), lambda: came.append("read"))
        loop.add_writer(ours.fileno(), lambda: came.append("write"))
        loop.run_once()
        assert came == ["write"]
        theirs.send(b"x")
        loop.run_once()
        assert came == ["write", "read", "write"]
        loop.remove_writer(ours.fileno())
        loop.remove_writer(ours.fileno())  # harmless
        loop.run_once()
        assert came[3:] == ["read"]
        loop.remove_reader(ours.fileno())
        loop.remove_reader(ours.fileno())
        loop.run_once(0.0)
        assert came[4:] == []


def test_a_hang_up_counts_as_readable(loop: Loop) -> None:
    came: list[str] = []
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        loop.add_reader(ours.fileno(), lambda: came.append("read"))
        loop.run_once()
    assert came == ["read"]


def test_a_callback_may_remove_what_is_ready(loop: Loop) -> None:
    came: list[str] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")

        def gone() -> None:
            came.append("read")
            loop.remove_reader(ours.fileno())
            loop.remove_writer(ours.fileno())

        loop.add_reader(ours.fileno(), gone)
        loop.add_writer(ours.fileno(), lambda: came.append("write"))
        loop.run_once()
        assert "read" in came
        came.clear()
        loop.run_once(0.0)
        assert came == []


def test_calls_from_other_threads_all_run_in_order(loop: Loop) -> None:
    came: list[int] = []

    def call() -> None:
        for number in range(70_000):  # more than fits into the pipe that wakes the loop
            loop.call_soon_threadsafe(lambda number=number: came.append(number))  # type: ignore[misc]
        loop.stop()

    thread = threading.Thread(target=call)
    loop.call_later(0.05, lambda: None)
    thread.start()
    loop.run()
    thread.join()
    while len(came) < 70_000:
        loop.run_once(1.0)
    assert came == list(range(70_000))


def test_many_calls_from_another_thread_wake_the_loop_once(loop: Loop) -> None:
    came: list[int] = []
    for turn in range(2):
        for _ in range(100):
            loop.call_soon_threadsafe(lambda: came.append(1))
        woken = os.read(loop._wake_read, 4096)
        assert len(woken) == 1
        os.write(loop._wake_write, woken)
        loop.run_once(0.0)
        assert len(came) == 100 * (turn + 1)


def test_stop_from_another_thread_ends_an_idle_loop(loop: Loop) -> None:
    thread = threading.Thread(target=loop.stop)
    loop.call_soon(thread.start)
    loop.run()
    thread.join()


def test_stop_before_run_ends_it_at_once(loop: Loop) -> None:
    """A signal may come while a daemon is still getting ready."""
    loop.stop()
    loop.run()
    loop.call_later(0.01, loop.stop)  # only that once
    start_s = loop.time()
    loop.run()
    assert loop.time() - start_s >= 0.01


def test_an_exception_ends_run(loop: Loop) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    loop.call_soon(bug)
    with pytest.raises(ZeroDivisionError):
        loop.run()


def test_a_closed_loop_ignores_late_calls() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    loop = Loop()
    loop.close()
    loop.call_soon_threadsafe(lambda: None)
    loop.stop()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def _take_number(wanted: int) -> list[int]:
    """Open descriptors until one of them has this number; all of them, that one last."""
    taken: list[int] = []
    while not taken or taken[-1] != wanted:
        taken.append(os.open("/dev/null", os.O_RDONLY))
        assert len(taken) < 100
    return taken


def test_a_late_call_does_not_write_into_a_reused_descriptor() -> None:
    loop = Loop()
    numbers = {loop._wake_read, loop._wake_write}
    loop.close()
    ends = [end for _ in range(8) for end in socket.socketpair()]
    try:
        assert numbers <= {end.fileno() for end in ends}, "nobody got the numbers again"
        loop.call_soon_threadsafe(lambda: None)
        loop.stop()
        for end in ends:
            with pytest.raises(BlockingIOError):
                end.recv(1, socket.MSG_DONTWAIT)
    finally:
        for end in ends:
            end.close()


def test_a_closed_loop_watches_nothing() -> None:
    """Who is closed after it stops to watch, and fails at nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop = Loop()
        loop.add_reader(ours.fileno(), lambda: None)
        loop.add_writer(ours.fileno(), lambda: None)
        loop.close()
        loop.remove_reader(ours.fileno())
        loop.remove_writer(ours.fileno())
        assert not loop._watches


def test_calls_from_threads_race_with_close() -> None:
    """However the two meet: nothing is written after the close, and nobody fails."""
    for _ in range(50):
        loop = Loop()
        is_over = threading.Event()
        failures: list[BaseException] = []

        def call(
            loop: Loop = loop,
            is_over: threading.Event = is_over,
            failures: list[BaseException] = failures,
        ) -> None:
            try:
                while not is_over.is_set():
                    loop.call_soon_threadsafe(lambda: None)
            except OSError as error:
                failures.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        loop.close()
        is_over.set()
        thread.join()
        assert failures == []


def test_a_signal_handler_may_call_into_the_loop_that_it_interrupts(loop: Loop) -> None:
    """A lock that is not its holder's to take again would stand still here."""
    came: list[str] = []

    def handler(*_: object) -> None:
        loop.call_soon_threadsafe(lambda: came.append("signal"))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with loop._wake_lock:
            signal.raise_signal(signal.SIGUSR1)
        loop.run_once(0.0)
        loop.run_once(0.0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == ["signal"]


def test_closing_twice_does_not_close_a_reused_descriptor() -> None:
    loop = Loop()
    wanted = loop._wake_write
    loop.close()
    taken = _take_number(wanted)
    try:
        loop.close()
        os.fstat(taken[-1])
    finally:
        for fd in taken:
            os.close(fd)


def test_events_of_a_closed_descriptor_are_not_its_successors(loop: Loop) -> None:
    """Both are ready in one turn; the first closes the second, whose number goes to another."""
    came: list[str] = []
    pairs = [socket.socketpair() for _ in range(2)]
    taken: list[socket.socket] = []

    def closes_the_other(mine: int) -> None:
        came.append("first")
        other = pairs[1 - mine][0]
        number = other.fileno()
        loop.remove_reader(number)
        other.close()
        while not taken or number not in (end.fileno() for end in taken):
            taken.extend(socket.socketpair())
            assert len(taken) < 100
        loop.add_reader(number, lambda: came.append("successor"))

    try:
        for mine, (ours, theirs) in enumerate(pairs):
            theirs.send(b"x")
            loop.add_reader(ours.fileno(), partial(closes_the_other, mine))
        loop.run_once(0.0)
        assert came == ["first"]
    finally:
        for end in [end for pair in pairs for end in pair] + taken:
            end.close()


def test_cancelled_timers_are_freed_wherever_they_stand(loop: Loop) -> None:
    """One that is alive, and due before them, must not keep the others."""
    came: list[int] = []
    loop.call_later(15.0, lambda: None)
    for _ in range(10_000):
        loop.call_later(60.0, lambda: None).cancel()
    assert len(loop._timers) < 200
    at_s = loop.time()
    kept = [loop.call_at(at_s, partial(came.append, number)) for number in range(1000)]
    for timer in kept[1::2]:
        timer.cancel()
        timer.cancel()  # counted once
    loop.run_once(0.0)
    assert came == list(range(0, 1000, 2))
    assert len(loop._timers) < 200


def test_timers_may_be_cancelled_by_thousands_while_others_run(loop: Loop) -> None:
    came: list[int] = []
    at_s = loop.time()
    later = [loop.call_at(at_s + 60.0, lambda: None) for _ in range(1000)]

    def cancel_all() -> None:
        for timer in later:
            timer.cancel()

    loop.call_at(at_s, cancel_all)
    for number in range(10):
        loop.call_at(at_s, partial(came.append, number))
    loop.run_once(0.0)
    assert came == list(range(10))
    assert len(loop._timers) < 200
    assert loop._patience(5.0) == 5.0
