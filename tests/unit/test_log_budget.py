"""The share of the log that one VM gets, whoever writes the lines."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from vchan.host.faults import ALWAYS
from vchan.host.policy import log_budget
from vchan.host.policy.log_budget import BURST_BYTES, BYTES_PER_S, LINE_BYTES_MAX, LogBudget

VM, OTHER = "0bad0000-0000-4000-8000-000000000002", "600d0000-0000-4000-8000-000000000001"


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @property
    def bytes(self) -> int:
        return sum(len(line.encode()) for line in self.lines)


class Rig:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.budget = LogBudget(lambda: self.now_s)
        self.handlers = [Log(), Log()]
        self.log = logging.getLogger("test_log_budget")
        self.log.propagate = False
        self.log.setLevel(logging.DEBUG)
        for handler in self.handlers:
            handler.addFilter(self.budget)
            self.log.addHandler(handler)

    @property
    def lines(self) -> list[str]:
        assert self.handlers[0].lines == self.handlers[1].lines
        return self.handlers[0].lines

    def close(self) -> None:
        for handler in self.handlers:
            self.log.removeHandler(handler)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_a_flood_is_bounded_and_says_what_was_left_out(rig: Rig) -> None:
    seconds = 100
    for number in range(100 * seconds):
        rig.log.info("vm (%s): consuming %s", VM, number)
        rig.log.warning("%s: the broker closed the channel: %s", VM, number)
        rig.now_s += 0.01
    assert rig.handlers[0].bytes < BURST_BYTES + BYTES_PER_S * seconds + 100
    told = [int(line.rpartition("(")[2].split()[0]) for line in rig.lines if "left out" in line]
    assert 0 <= rig.budget.left_out - sum(told) < 100
    assert len(rig.lines) + rig.budget.left_out == 200 * seconds


def test_others_and_lines_about_nobody_are_not_left_out(rig: Rig) -> None:
    for _ in range(10_000):
        rig.log.info("%s: x", VM)
    before = len(rig.lines)
    rig.log.info("vm (%s): hello", OTHER)
    rig.log.warning("lost the broker")
    assert len(rig.lines) == before + 2


def test_lines_that_must_not_be_lost_are_always_written(rig: Rig) -> None:
    for _ in range(10_000):
        rig.log.info("%s: x", VM)
    rig.log.warning("%s: in quarantine", VM, extra=ALWAYS)
    assert "in quarantine (" in rig.lines[-1]
    assert "lines of this VM were left out before" in rig.lines[-1]


def test_a_long_line_is_cut(rig: Rig) -> None:
    rig.log.info("vm (%s): consuming %s", VM, "t" * 16_000)
    (line,) = rig.lines
    assert len(line) == LINE_BYTES_MAX + 3
    rig.log.info("x" * 10_000)  # no VM's
    assert len(rig.lines[1]) == 10_000


def test_a_channel_without_a_uuid_is_known_by_its_name(rig: Rig) -> None:
    rig.budget.know("relay-1")
    for _ in range(1000):
        rig.log.info("relay-1 (relay-1): consuming")
        rig.log.info("relay-1: closed")
    assert rig.handlers[0].bytes <= BURST_BYTES
    rig.log.info("relay-10: another")
    assert rig.lines[-1] == "relay-10: another"


def test_the_budget_counts_correctly_from_many_threads(rig: Rig) -> None:
    def write() -> None:
        for number in range(500):
            rig.log.info("%s: %d", VM, number)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rig.handlers[0].lines) + rig.budget.left_out == 2000
    note_bytes = log_budget._NOTE_BYTES  # a short line may come where a longer one was left out
    assert rig.handlers[0].bytes <= BURST_BYTES + note_bytes


def test_the_budgets_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_budget, "VMS_MAX", 10)
    for number in range(100):
        rig.log.info("0bad0000-0000-4000-8000-%012d: x", number)
    assert len(rig.budget._budgets) == 10
    assert len(rig.lines) == 100


def test_it_is_installed_with_every_handler(rig: Rig) -> None:
    handler = Log()
    logging.getLogger().addHandler(handler)
    try:
        log_budget.install(rig.budget)
        for _ in range(10_000):
            logging.getLogger("vchan.host.broker.vm_queues").warning("%s: closed", VM)
        assert 0 < handler.bytes <= BURST_BYTES
    finally:
        for each in logging.getLogger().handlers:
            each.removeFilter(rig.budget)
        logging.getLogger().removeHandler(handler)
