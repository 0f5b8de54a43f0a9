"""The event loop: order, cancellation, readiness, other threads."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vchan.loop import Loop


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


def test_what_is_cancelled_wakes_nobody(loop: Loop) -> None:
    for _ in range(10):
        loop.call_later(0.0, lambda: None).cancel()
    loop.call_soon(lambda: None)
    loop.run_once()
    assert loop._patience(5.0) == 5.0


def test_soon_is_before_waiting_and_not_for_ever(loop: Loop) -> None:
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


def test_hang_up_is_readable(loop: Loop) -> None:
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


def test_other_threads_calls_come_all_and_in_order(loop: Loop) -> None:
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
