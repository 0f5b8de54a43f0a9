"""The audit log: what a line holds, what a guest cannot do to it, and a file that fails."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.host.policy import audit_log
from vchan.host.policy.audit_log import AuditLog
from vchan.host.policy.audit_record import (
    BURST_S,
    ENDED,
    FIELD_CHARS_MAX,
    LINE_BYTES_MAX,
    NO_END,
    REASON_CHARS_MAX,
    Record,
    Sampler,
    format_left_out,
    format_record,
    unended,
)
from vchan.host.policy.rules import Ask, Effect, Facts, Kind
from vchan.io.loop import Loop

UUID = "11111111-2222-3333-4444-555555555555"
FACTS = Facts(UUID, "instance-1", "project-1")
CALL = Ask(Kind.CALL, "nova", "conductor", "c1", "ns", "report")
RECORD = Record(FACTS, CALL, Effect.DENY.value, "/etc/x.policy:3", b"\x01" * 16)
TIME = "2026-01-02T03:04:05.678+00:00"


def parsed(record: Record, **more: Any) -> dict[str, Any]:
    line = format_record(record, time=TIME, host="compute-1", **more)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    value = json.loads(line)
    assert isinstance(value, dict)
    return value


# --- a line


def test_a_line() -> None:
    assert parsed(RECORD) == {
        "time": TIME,
        "host": "compute-1",
        "vm": UUID,
        "name": "instance-1",
        "project": "project-1",
        "kind": "call",
        "exchange": "nova",
        "topic": "conductor",
        "server": "c1",
        "namespace": "ns",
        "method": "report",
        "verdict": "deny",
        "rule": "/etc/x.policy:3",
        "request": "01" * 16,
    }


def test_what_is_empty_is_left_out_but_who_it_was() -> None:
    record = Record(Facts(UUID), None, "quarantine", "limit", reason="over")
    assert parsed(record) == {
        "time": TIME,
        "host": "compute-1",
        "vm": UUID,
        "name": "",
        "project": "",
        "verdict": "quarantine",
        "rule": "limit",
        "reason": "over",
    }
    assert parsed(RECORD, left_out=3)["left_out"] == 3
    assert parsed(RECORD._replace(ask=CALL._replace(fanout=True)))["fanout"] is True


@pytest.mark.parametrize(
    "text",
    ["a\nb", '"}\n{"verdict": "allow"}\n', "\x1b[2J", "\x00", "\x7f", "\u2028", "\u202e", "\ud800"],
)
def test_what_a_guest_chose_can_neither_end_the_line_nor_steer_a_terminal(text: str) -> None:
    ask = Ask(Kind.CALL, text, text, text, text, text)
    line = format_record(Record(FACTS, ask, "deny", "x", reason=text), time=TIME, host="h")
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])
    value = json.loads(line)
    assert value["verdict"] == "deny"
    assert value["method"] == value["reason"] == text


def test_long_fields_are_cut() -> None:
    ask = CALL._replace(method="m" * 1000)
    value = parsed(Record(FACTS, ask, "deny", "x", reason="r" * 10_000))
    assert value["method"] == "m" * (FIELD_CHARS_MAX - 3) + "..."
    assert len(value["reason"]) == REASON_CHARS_MAX


@given(st.lists(st.text(), min_size=8, max_size=8), st.integers(0), st.binary(max_size=16))
def test_no_line_is_over_its_bound(texts: list[str], left_out: int, request_id: bytes) -> None:
    texts = [text * 300 for text in texts]
    ask = Ask(Kind.CALL, texts[0], texts[1], texts[2], texts[3], texts[4], fanout=True)
    facts = Facts(UUID, texts[5], texts[6])
    record = Record(facts, ask, "deny", texts[7], request_id, texts[7])
    line = format_record(record, time=TIME, host="h", left_out=left_out)
    assert len(line) <= LINE_BYTES_MAX
    assert line.isascii() and line.count(b"\n") == 1
    json.loads(line)


def test_the_longest_line() -> None:
    worst = "\U0001f600" * 1000
    ask = Ask(Kind.NOTIFY, worst, worst, worst, worst, worst, fanout=True)
    record = Record(Facts(worst, worst, worst), ask, worst, worst, bytes(16), worst)
    assert len(format_record(record, time=worst, host=worst)) > LINE_BYTES_MAX  # all at once
    record = record._replace(facts=Facts(UUID, worst, "p" * 64), verdict="deny", rule="f" * 500)
    assert len(format_record(record, time=TIME, host="h" * 255)) <= LINE_BYTES_MAX


# --- sampling


def test_a_vm_has_a_burst_and_then_its_rate_and_what_is_left_out_is_counted() -> None:
    sampler = Sampler()
    burst = int(10 * BURST_S)
    assert [sampler.admit(FACTS, 10, 0.0) for _ in range(burst)] == [0] * burst
    assert [sampler.admit(FACTS, 10, 0.0) for _ in range(7)] == [None] * 7
    owing = [sampler.is_owing]
    assert sampler.admit(FACTS, 10, 0.15) == 7
    assert [*owing, sampler.is_owing] == [True, False]
    assert sampler.admit(FACTS, 10, 0.15) is None
    other = FACTS._replace(uuid="other")
    assert sampler.admit(other, 10, 0.15) == 0


def test_what_is_left_out_is_told_when_the_flood_is_over_and_at_the_end() -> None:
    sampler = Sampler()
    for _ in range(int(BURST_S) + 3):
        sampler.admit(FACTS, 1, 0.0)
    assert list(sampler.overdue(0.5)) == []
    assert list(sampler.overdue(1.5)) == [(FACTS, 3)]
    assert list(sampler.overdue(9.0)) == []
    for _ in range(20):
        sampler.admit(FACTS, 1, 2.0)
    owing = sampler.forget(UUID)
    assert owing is not None and owing[0] == FACTS
    assert sampler.forget(UUID) is None
    assert sampler.admit(FACTS, 1, 2.0) == 0  # a new VM of that name


def test_another_rate_keeps_what_is_owed() -> None:
    sampler = Sampler()
    for _ in range(int(BURST_S) + 2):
        sampler.admit(FACTS, 1, 0.0)
    assert sampler.admit(FACTS, 5, 0.0) == 2


@given(st.lists(st.floats(0, 2), max_size=200))
def test_every_line_is_written_or_counted(gaps: list[float]) -> None:
    sampler, now_s, written, told = Sampler(), 0.0, 0, 0
    for gap_s in gaps:
        now_s += gap_s
        left_out = sampler.admit(FACTS, 2, now_s)
        if left_out is not None:
            written += 1
            told += left_out
    told += sum(left_out for _, left_out in sampler.overdue(now_s + 1000))
    assert written + told == len(gaps)
    assert written <= 2 * BURST_S + 2 * now_s + 1e-6


# --- the file


class Log:
    """An audit log on a loop whose time a test sets."""

    def __init__(self, path: str) -> None:
        self.loop = Loop()
        self.now_s = 1000.0
        self.loop.time = lambda: self.now_s
        self.warnings: list[str] = []
        self.path = Path(path)
        self.audit = AuditLog(self.loop, path, "compute-1", self.warnings.append)

    def write(self, count: int = 1, rate: float = 1000) -> None:
        for _ in range(count):
            self.audit.write(RECORD, rate)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def close(self) -> None:
        self.audit.close()
        self.loop.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(str(tmp_path / "audit.log"))
    yield log
    log.close()


def test_lines_are_appended_with_the_time_of_day(log: Log) -> None:
    log.write(2)
    log.audit.reopen()
    log.write()
    assert len(log.lines()) == 3
    assert datetime.fromisoformat(log.lines()[0]["time"]).utcoffset() is not None
    assert log.path.stat().st_mode & 0o777 == 0o640
    assert log.audit.counters == {"written": 3, "lost": 0, "left_out": 0}


def test_a_file_that_was_moved_is_left_at_reopen(log: Log) -> None:
    log.write()
    log.path.rename(log.path.with_suffix(".1"))
    log.write()
    log.audit.reopen()
    log.write()
    assert len(log.lines()) == 1
    assert log.path.with_suffix(".1").read_bytes().count(b"\n") == 2


def test_a_flood_is_sampled_and_the_rest_told_of(log: Log) -> None:
    log.write(100, rate=2)
    assert len(log.lines()) == 2 * BURST_S
    assert log.audit.counters["left_out"] == 100 - 2 * BURST_S
    log.now_s += 60
    log.audit._tell_left_out()
    last = log.lines()[-1]
    assert (last["verdict"], last["left_out"]) == ("left out", 100 - 2 * BURST_S)
    log.write(100, rate=2)
    log.audit.forget(UUID)
    assert sum(line.get("left_out", 0) for line in log.lines()) + len(log.lines()) - 2 == 200


def test_a_full_disk_loses_lines_counts_them_and_says_so_once(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    room = [10]

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(fd, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr("vchan.host.policy.audit_log.os.write", write)
    log.write(5)
    assert log.audit.counters["lost"] == 5
    assert log.audit.problem == "cannot be written: No space left on device"
    assert len(log.warnings) == 1
    room[0] = 1 << 20
    log.write(2)
    assert log.audit.problem == ""
    assert log.warnings[1:] == [f"audit log {log.path} works again: 5 decisions unrecorded"]
    torn, *whole = log.path.read_bytes().splitlines()
    assert len(torn) == 10  # half a line, and the next begins on its own
    assert [json.loads(line)["vm"] for line in whole] == [UUID, UUID]


def test_a_real_full_disk() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full")
    log = Log("/dev/full")
    log.write(3)
    log.close()
    assert log.audit.counters["lost"] == 3
    assert "is no regular file" in log.warnings[0]


def test_half_a_line_that_an_earlier_daemon_left_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_bytes(b'{"half')
    log = Log(str(path))
    log.write()
    log.close()
    assert path.read_bytes().startswith(b'{"half\n{')


@pytest.mark.parametrize("made", ["nothing", "directory", "fifo", "link"])
def test_what_cannot_be_opened_is_tried_again_and_does_not_block(tmp_path: Path, made: str) -> None:
    path = tmp_path / "sub" / "audit.log"
    if made != "nothing":
        path.parent.mkdir()
    if made == "directory":
        path.mkdir()
    elif made == "fifo":
        os.mkfifo(path)
    elif made == "link":
        path.symlink_to(tmp_path / "elsewhere")
    log = Log(str(path))
    log.write(2)
    assert log.audit.counters["lost"] == 2
    assert len(log.warnings) == 1
    assert not (tmp_path / "elsewhere").exists()
    if made == "nothing":
        path.parent.mkdir()
    elif made == "directory":
        path.rmdir()
    else:
        path.unlink()
    log.write()  # not tried again yet
    assert log.audit.counters["lost"] == 3
    log.now_s += audit_log.REOPEN_S
    log.write()
    assert len(log.lines()) == 1
    assert log.audit.problem == ""
    log.close()


def test_standard_error(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", open(2, "w", closefd=False))  # noqa: SIM115
    log = Log("-")
    log.write()
    log.audit.reopen()
    log.write()
    log.close()
    assert [json.loads(line)["vm"] for line in capfd.readouterr().err.splitlines()] == [UUID, UUID]


def test_left_out_lines_have_their_own_form() -> None:
    line = json.loads(format_left_out(FACTS, 12, time=TIME, host="h"))
    assert (line["vm"], line["verdict"], line["left_out"]) == (UUID, "left out", 12)


# --- streams that a killed daemon has begun

FORWARD = Ask(Kind.FORWARD, "service", "standard")


def stream_record(verdict: str, number: int) -> Record:
    stream, by = bytes([number]) * 16, "uid 0, pid 7, for octavia"
    record = Record(FACTS, FORWARD, verdict, "x.policy:1", stream, "", "", by)
    return record if verdict != ENDED else record._replace(rule="", into=3, out_of=4)


def test_what_a_killed_daemon_had_open_is_ended_by_the_next_and_once(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    with Loop() as loop:
        log = AuditLog(loop, str(path), "compute-1", print)
        for verdict, number in (("allow", 1), ("allow", 2), (ENDED, 1), ("allow", 3), ("deny", 4)):
            log.write(stream_record(verdict, number), 100)
        log.write(RECORD, 100)
        log.close()  # as a kill does: without a word
        path.write_bytes(path.read_bytes() + b'{"kind": "forward", "requ')
        for _ in range(2):  # the second finds nothing more to end
            AuditLog(loop, str(path), "compute-1", print).close()
    *_, half, first, second = path.read_bytes().splitlines()
    assert half == b'{"kind": "forward", "requ'
    begun = parsed(stream_record("allow", 2))
    del begun["rule"]
    for line, stream in ((first, "02" * 16), (second, "03" * 16)):
        row = json.loads(line)
        assert row["time"] > TIME
        assert row == {**begun, "time": row["time"], "verdict": ENDED, "request": stream} | {
            "reason": NO_END
        }


def test_what_another_host_has_begun_in_the_same_file_is_not_ended(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    with Loop() as loop:
        log = AuditLog(loop, str(path), "compute-1", print)
        log.write(stream_record("allow", 1), 100)
        log.close()
        before = path.read_bytes()
        AuditLog(loop, str(path), "compute-2", print).close()
    assert path.read_bytes() == before


def test_only_the_logs_end_is_read_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.log"
    with Loop() as loop:
        log = AuditLog(loop, str(path), "compute-1", print)
        for number in (1, 2):
            log.write(stream_record("allow", number), 100)
        log.close()
        last = path.read_bytes().splitlines(keepends=True)[-1]
        monkeypatch.setattr(audit_log, "LAST_BYTES_MAX", len(last) + 10)
        AuditLog(loop, str(path), "compute-1", print).close()
    assert len(path.read_bytes().splitlines()) == 3
    assert json.loads(path.read_bytes().splitlines()[-1])["request"] == "02" * 16


@pytest.mark.parametrize("line", [b"[]", b'{"kind": "forward"}', b'"\xff"', b"[" * 10**6])
def test_what_is_no_line_of_ours_is_passed_over(line: bytes) -> None:
    assert unended([line + b' "kind": "forward"', line], "compute-1") == []
