"""The torture's schedules, payloads, records and figures."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tests.torture import payload, planted, report, schedule
from tests.torture.oracle import EXEMPTIONS, Evidence, Verdict, Violation
from tests.torture.records import (
    BadRecord,
    Book,
    Born,
    Health,
    Ran,
    Record,
    Sent,
    Told,
    decode,
    encode,
)
from tests.torture.schedule import BROKER, HOSTS, Step, deal

LANES = [*schedule.vm_lanes(4), HOSTS, BROKER]


def steps(seed: int, lane: str, count: int = 200, *, often: bool = False) -> list[Step]:
    return list(islice(deal(seed, lane, 4, often=often), count))


@pytest.mark.parametrize("lane", LANES)
def test_a_seed_deals_the_same_steps(lane: str) -> None:
    assert steps(7, lane) == steps(7, lane)
    assert steps(7, lane) != steps(8, lane)


@pytest.mark.parametrize("vms", [1, 2, 3, 4])
def test_the_first_steps_are_every_kind_once(vms: int) -> None:
    dealt = Counter[str]()
    for lane in schedule.vm_lanes(vms):
        count = len(range(int(lane[2:]), len(schedule.VM_KINDS), vms))
        dealt.update(step.kind for step in islice(deal(3, lane, vms), count))
    assert dealt == Counter(schedule.VM_KINDS)
    for lane, deck in ((HOSTS, schedule.HOSTS_DECK), (BROKER, schedule.BROKER_DECK)):
        assert {step.kind for step in islice(deal(3, lane, vms), len(deck))} == set(deck)


@pytest.mark.parametrize("vms", [1, 3])
def test_once_is_every_kind_once_and_migrations(vms: int) -> None:
    dealt = Counter[str]()
    for lane in [*schedule.vm_lanes(vms), HOSTS, BROKER]:
        dealt.update(step.kind for step in schedule.deal_once(3, lane, vms))
    assert dealt.pop(schedule.MIGRATE) == len(schedule.VM_KINDS)
    assert dealt == Counter(set(schedule.ALL_KINDS) - {schedule.MIGRATE})


@pytest.mark.parametrize("bug", planted.BUGS, ids=[bug.name for bug in planted.BUGS])
def test_a_planted_bug_can_be_planted(bug: planted.Planted, tmp_path: Path) -> None:
    """Whether it is caught takes real parts: `python -m tests.torture --planted`."""
    assert (planted.ROOT / bug.patch.file).read_text().count(bug.patch.old) == 1
    path = tmp_path / "schedule.json"
    schedule.write(path, 1, 1, bug.steps)
    assert schedule.read(path) == (1, list(bug.steps))


def test_steps_last_as_long_as_is_said() -> None:
    for lane in LANES:
        for step in steps(5, lane):
            low, high = schedule.SECONDS.get(step.kind, (0.0, 0.0))
            assert low <= step.seconds <= high
            assert step.host in (0, 1)


def test_a_run_for_migrations_migrates_most_of_the_time() -> None:
    dealt = Counter(step.kind for step in steps(5, "vm0", 500, often=True))
    assert dealt[schedule.MIGRATE] > 0.7 * 500
    assert set(dealt) == set(schedule.VM_KINDS)


def test_every_kind_can_be_carried_out() -> None:
    pytest.importorskip("libvirt_qemu", reason="libvirt-python is not installed")
    from tests.torture import faults

    for kind in schedule.ALL_KINDS:
        assert callable(getattr(faults.Faults, f"_{kind}")), kind


def test_a_schedule_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    carried = [step._replace(at_s=3.5) for lane in LANES for step in steps(1, lane, 20)]
    schedule.write(path, 1, 4, carried)
    assert schedule.read(path) == (4, carried)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"vms": 1}',
        '{"vms": 1, "steps": [{"lane": "vm1", "kind": "reset", "after_s": 0}]}',
        '{"vms": 1, "steps": [{"lane": "vm0", "kind": "melt", "after_s": 0}]}',
        '{"vms": 1, "steps": [{"lane": "vm0", "colour": "red", "after_s": 0}]}',
    ],
)
def test_what_is_no_schedule_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"schedule\.json"):
        schedule.read(path)


# --- payloads


def test_sizes_go_from_one_byte_to_one_mebibyte() -> None:
    sizes = [payload.size_of("caster", number) for number in range(2000)]
    assert min(sizes) == 1
    assert max(sizes) == payload.BYTES_MAX == 1 << 20
    assert sum(size > 1 << 16 for size in sizes) > 20
    assert sum(size <= 64 for size in sizes) > 800


def test_each_message_has_a_payload_of_its_own() -> None:
    for number in range(50):
        size = payload.size_of("caster", number)
        assert len(payload.payload_of("caster", number).encode()) == size
    long = [n for n in range(300) if payload.size_of("a", n) > 64]
    assert len({payload.checksum(payload.payload_of("a", n)) for n in long}) == len(long)


def test_an_answer_is_right_if_it_is_the_calls_own() -> None:
    text = payload.answer_to("caller", 5)
    answer = ["caller", 5, text]
    assert payload.answer_is_right(answer, "caller", 5)
    assert not payload.answer_is_right(answer, "caller", 6)
    assert not payload.answer_is_right(answer, "other", 5)
    assert not payload.answer_is_right(None, "caller", 5)
    assert not payload.answer_is_right(["caller", 5, text[:-1]], "caller", 5)


# --- records


RECORDS: list[Record] = [
    Sent(1.5, "cast", "vm", "caster", 1),
    Told(1.5, "caster", 1, "confirmed"),
    Ran(1.5, "cast", "caster", 1, 7, True, "vm"),
    Born(1.5, "runner", "boot", 3),
    Health(1.5, 1000, 7),
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_is_a_line(record: Record) -> None:
    line = encode(record)
    assert line.count(b"\n") == 1
    assert decode(line) == record


@pytest.mark.parametrize("line", [b"", b"[]", b"7", b'["ran"]', b'["melted", 1]', b'["ran", 1.5, '])
def test_a_torn_line_is_no_record(line: bytes) -> None:
    with pytest.raises(BadRecord):
        decode(line)


def test_a_book_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "book"
    book = Book(path)
    assert book.read() == []
    first, second = encode(RECORDS[0]), encode(RECORDS[1])
    path.write_bytes(first + second[:10])
    assert book.read() == RECORDS[:1]
    path.write_bytes(first + second + b"torn\n")
    assert book.read() == RECORDS[:2]
    assert len(book.torn) == 1


def test_a_guests_times_are_ours(tmp_path: Path) -> None:
    path = tmp_path / "book"
    path.write_bytes(encode(RECORDS[3]))
    assert [record.at_s for record in Book(path, lambda: 77.0).read()] == [77.0]


# --- figures


def found(*violations: Violation) -> dict[str, object]:
    evidence = Evidence(
        RECORDS[:2], RECORDS[2:3], {"vm": {"runner": [*RECORDS[3:], RECORDS[3]]}}, (), "runner"
    )
    verdict = Verdict(list(violations), Counter(), Counter())
    moved = [Step("vm0", "migrate", 0.0), Step("vm0", "migrate", 0.0), Step("vm1", "abort", 0.0)]
    carried = report.Carried(1, 2, 3.0, moved, ["migrate of vm0: libvirtError: no"])
    return report.figures(carried, evidence, verdict, report.Taken(80.0, 20, 16.0, 9))


def test_figures_say_what_was_done() -> None:
    figures = found()
    assert (figures["migrations"], figures["aborted"], figures["failed_steps"]) == (1, 1, 1)
    assert (figures["casts"], figures["ran"]) == (1, 1)
    assert figures["reborn"] == 1
    exemptions = figures["exemptions"]
    assert isinstance(exemptions, dict)
    assert set(exemptions) == set(EXEMPTIONS)
    json.dumps(figures)


@pytest.mark.parametrize("kind", [kind for kinds in report.COUNTED.values() for kind in kinds])
def test_each_broken_promise_is_counted_once(kind: str) -> None:
    figures = found(Violation(kind, "text"))
    counted = [key for key in (*report.COUNTED, "other_violations") if figures[key]]
    assert len(counted) == 1
    assert "text" in report.table(figures)


def test_what_has_no_row_of_its_own_is_counted_too() -> None:
    assert found(Violation("died", "text"))["other_violations"] == 1
