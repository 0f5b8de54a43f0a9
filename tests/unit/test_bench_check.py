"""What is kept of the benchmarks' numbers, and what fails beside it."""

from __future__ import annotations

from itertools import chain, repeat
from pathlib import Path

import pytest

from tests.bench import check

KEPT = {"a": 100.0, "b": 10.0}


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ({"a": 100.0, "b": 10.0}, []),
        ({"a": 110.0, "b": 1.0}, []),
        ({"a": 110.1, "b": 10.0}, ["a: 110.1, +10% beside 100.0"]),
        ({"a": 100.0}, ["b: no longer measured"]),
        ({"a": 100.0, "b": 10.0, "c": 1.0}, ["c: not kept yet"]),
    ],
)
def test_a_tenth_more_than_is_kept_fails(now: dict[str, float], found: list[str]) -> None:
    rows = check.compare(now, KEPT)
    assert check.problems(rows) == found
    assert len(check.table(rows).splitlines()) == 1 + len(rows)


def test_rounds_are_added_while_other_load_may_be_the_reason() -> None:
    rounds = iter([{"a": 200.0}, {"a": 150.0}, {"a": 120.0}, {"a": 105.0}, {"a": 90.0}])
    assert check.least_cpu(lambda: next(rounds), KEPT) == {"a": 105.0}


def test_rounds_end_when_nothing_is_too_much() -> None:
    rounds = iter([{"a": 100.0}, {"a": 101.0}, {"a": 102.0}, {"a": 1.0}])
    assert check.least_cpu(lambda: next(rounds), KEPT) == {"a": 100.0}


def test_what_is_slower_stays_slower_however_often_it_is_measured() -> None:
    taken = chain(repeat({"a": 120.0}, check.ROUNDS_MAX), [{"a": 1.0}])
    least = check.least_cpu(lambda: next(taken), KEPT)
    assert [row.is_slower for row in check.compare(least, {"a": 100.0})] == [True]


def test_what_is_kept_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "KEPT", tmp_path / "kept.json")
    assert check.load() == {}
    check.keep({"a": 1.2345})
    assert check.load() == {"a": 1.2}
    check.keep({f"{check.COUNTED}a": 1, f"{check.TIMED}b": 2})
    assert check.load(counts_only=True) == {f"{check.COUNTED}a": 1}


def test_each_number_that_is_kept_can_fail() -> None:
    kept = check.load()
    assert [what for what in kept if what.startswith(check.COUNTED)]
    assert [what for what in kept if what.startswith(check.TIMED)]
    for what in kept:
        rows = check.compare(kept | {what: 1.11 * kept[what]}, kept)
        assert [row.what for row in rows if row.is_slower] == [what]
