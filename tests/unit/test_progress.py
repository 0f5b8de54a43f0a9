"""The line that a terminal shows of a copy."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vchan.cli.output import columns_of
from vchan.cli.progress import STALLED_S, CopyProgress, size_text, time_text

MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (999 * 1024, "999.0 KiB"),
        (1000 * 1024, "1.0 MiB"),
        (64 * MIB, "64.0 MiB"),
        (5 * 1024**4, "5.0 TiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("time_s", "text"), [(0.9, "00:00"), (61, "01:01"), (3600, "1:00:00"), (359_999, "99:59:59")]
)
def test_times(time_s: float, text: str) -> None:
    assert time_text(time_s) == text


def test_rate_and_what_is_left() -> None:
    progress = CopyProgress(0.0)
    progress.begins("disk.img", 0, 64 * MIB)
    for second in range(1, 9):
        progress.moved(4 * MIB)
        line = progress.line(float(second), 80)
    assert line.startswith("disk.img ")
    assert line.endswith(" 50%    32.0 MiB     4.0 MiB/s  00:08 ETA")
    assert progress.summary(8.0) == "1 file, 32.0 MiB in 00:08, 4.0 MiB/s"


def test_what_was_there_counts_for_the_share_and_not_for_the_rate() -> None:
    progress = CopyProgress(0.0)
    progress.begins("f", 50 * MIB, 100 * MIB)
    progress.moved(10 * MIB)
    line = progress.line(1.0, 80)
    assert " 60% " in line and "10.0 MiB/s" in line and "00:04 ETA" in line
    assert progress.bytes == 10 * MIB


def test_a_copy_that_stands_still_says_so() -> None:
    progress = CopyProgress(0.0)
    progress.begins("f", 0, 10 * MIB)
    progress.moved(MIB)
    progress.line(1.0, 80)
    assert "stalled" not in progress.line(1.0 + STALLED_S - 0.1, 80)
    assert "stalled  00:05" in progress.line(1.0 + STALLED_S, 80)
    progress.moved(MIB)
    assert "stalled" not in progress.line(7.0, 80)


def test_an_empty_file_is_all_there() -> None:
    progress = CopyProgress(0.0)
    progress.begins("f", 0, 0)
    assert "100%" in progress.line(0.0, 80)
    assert "0 B/s" in progress.line(1.0, 80)


@example("", 2, [(7, 3.6e-308), (0, 1.0)])
@given(
    st.text(max_size=100).map(lambda name: "".join(c for c in name if c.isprintable())),
    st.integers(2, 200),
    st.lists(st.tuples(st.integers(0, 2**40), st.floats(0, 1000)), max_size=10),
)
def test_it_fits_the_terminal(name: str, columns: int, moves: list[tuple[int, float]]) -> None:
    progress = CopyProgress(0.0)
    now_s = 0.0
    progress.begins(name, 0, sum(count for count, _ in moves))
    for count, passed_s in moves:
        progress.moved(count)
        now_s += passed_s
        assert columns_of(progress.line(now_s, columns)) < columns
