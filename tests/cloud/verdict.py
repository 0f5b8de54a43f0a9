"""What became of what was sent, by what callers saw and what the guest said that it ran. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

DYING_S: Final = 1.5
"""A guest that is killed takes with it what it had received and not run: a message or two that were
sent so shortly before or after its last answer."""
DIED_MAX: Final = 2
"""Casts that a death may take. A third was not under way: it was lost."""
DEATH_S: Final = 2.0
"""A silence so long may be a death."""
LINE: Final = re.compile(rb"^RAN (call|cast) (\d+) (once|again) \.\r?$", re.MULTILINE)
TOLD: Final = frozenset({"AgentGone"})
"""What a caller is told of a call that was in a guest when that died: it may have run."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of one request."""

    kind: str
    number: int
    is_marked: bool


def parse(data: bytes) -> list[Ran]:
    """What whole lines of a console say."""
    return [
        Ran(kind.decode(), int(number), mark == b"again")
        for kind, number, mark in LINE.findall(data)
    ]


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `failure`: what its caller was told in place of its own answer; empty: nothing."""

    number: int
    sent_s: float
    answered_s: float | None
    failure: str


@dataclass(frozen=True, slots=True)
class Cast:
    """One cast."""

    number: int
    sent_s: float


@dataclass(frozen=True, slots=True)
class Sent:
    """A load's requests."""

    calls: list[Call]
    casts: list[Cast]


@dataclass(frozen=True, slots=True)
class Times:
    """When an operation began, when nova said that it was done, when a later call was answered."""

    began_s: float
    done_s: float
    back_s: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One operation's figures."""

    operation: str
    nova_s: float
    first_answer_s: float | None
    """From nova's word that it is done to the answer of a call sent after that; None: none came."""
    longest_silence_s: float
    calls_sent: int
    calls_answered: int
    calls_twice: int
    calls_told: int
    """Not answered, and told so truly: the guest that had them died."""
    casts_sent: int
    casts_lost: int
    casts_died: int
    """Not run, and sent in the moment when the guest died that had received them."""
    casts_twice: int
    casts_marked: int
    """Run again after such a death, and marked so."""
    casts_overtaken: int
    """Run for the first time after one that was sent later, by the same sender."""
    problem: str = ""
    """What went wrong, or needed a hand."""
    note: str = ""

    @property
    def is_well(self) -> bool:
        """All ran, once and in order, every call was answered, and nobody had to help."""
        unanswered = self.calls_sent - self.calls_answered - self.calls_told
        twice, order = self.calls_twice + self.casts_twice, self.casts_overtaken
        wrong = (unanswered, twice, order, self.casts_lost, self.problem)
        return self.first_answer_s is not None and not any(wrong)


def judge(
    operation: str,
    times: Times,
    sent: Sent,
    ran: Iterable[Ran],
    *,
    kills: bool,
    problem: str = "",
    note: str = "",
) -> Row:
    """The row of an operation.

    Args:
        ran: In the order in which it ran.
        kills: It ends the guest, and starts it again.
    """
    mine = {cast.number for cast in sent.casts} | {call.number for call in sent.calls}
    runs = [run for run in ran if run.number in mine]
    # Where no guest died there is no reason to run anything again, marked or not.
    counted = [run for run in runs if not (kills and run.is_marked)]
    known = {run.number for run in runs}
    missing = [cast for cast in sent.casts if cast.number not in known]
    died = _died(missing, sent) if kills else []
    failed = [call for call in sent.calls if call.failure]
    told = [call for call in failed if kills and call.failure in TOLD]
    return Row(
        operation=operation,
        nova_s=round(times.done_s - times.began_s, 1),
        first_answer_s=None if times.back_s is None else round(times.back_s - times.done_s, 1),
        longest_silence_s=round(longest_silence_s(sent, times), 1),
        calls_sent=len(sent.calls),
        calls_answered=len(sent.calls) - len(failed),
        calls_twice=_repeats(counted, "call"),
        calls_told=len(told),
        casts_sent=len(sent.casts),
        casts_lost=len(missing) - len(died),
        casts_died=len(died),
        casts_twice=_repeats(counted, "cast"),
        casts_marked=sum(run.is_marked for run in runs),
        casts_overtaken=_overtaken(counted),
        problem=problem or _unanswered(failed, told),
        note=note,
    )


def _repeats(runs: list[Ran], kind: str) -> int:
    counts = Counter(run.number for run in runs if run.kind == kind)
    return sum(count - 1 for count in counts.values())


def _overtaken(runs: list[Ran]) -> int:
    """A load has one sender, which numbers its casts as it sends them."""
    first_runs = dict.fromkeys(run.number for run in runs if run.kind == "cast")
    latest = accumulate(first_runs, max)
    return sum(number < so_far for number, so_far in zip(first_runs, latest, strict=True))


def _died(missing: list[Cast], sent: Sent) -> list[Cast]:
    """Those that a guest can have taken with it."""
    last_answers_s = [a for a, b in pairwise(_answers_s(sent)) if b - a >= DEATH_S]
    found: list[Cast] = []
    for last_s in last_answers_s:
        near = [cast for cast in missing if abs(cast.sent_s - last_s) <= DYING_S]
        found += [cast for cast in near if cast not in found][:DIED_MAX]
    return found


def _answers_s(sent: Sent) -> list[float]:
    return sorted(call.answered_s for call in sent.calls if call.answered_s is not None)


def _unanswered(failed: list[Call], told: list[Call]) -> str:
    kinds = Counter(call.failure for call in failed if call not in told)
    return ", ".join(f"{count} calls: {kind}" for kind, count in kinds.items())


def longest_silence_s(sent: Sent, times: Times) -> float:
    """The longest time without an answer, from before the operation until it was over."""
    points = _answers_s(sent)
    if times.back_s is None:
        points = sorted([*points, times.done_s])
    return max((b - a for a, b in pairwise(points)), default=0.0)


HEAD: Final = (
    "operation",
    "nova",
    "first",
    "silence",
    "calls",
    "casts",
    "lost",
    "twice",
    "marked",
    "overtaken",
)


def table(rows: Sequence[Row]) -> str:
    """Of all operations; below it what went wrong."""
    lines = [HEAD, *map(_cells, rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEAD))]
    said = ["", *(row.note if row.is_well else f"NOT WELL {row.note}" for row in rows)]
    texts = []
    for line, text in zip(lines, said, strict=True):
        first, *others = line
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        texts.append(f"  {'  '.join(cells)}  {text}".rstrip())
    texts += [f"  {row.operation}: {row.problem}" for row in rows if row.problem]
    return "\n".join(texts)


def _cells(row: Row) -> tuple[str, ...]:
    calls, lost = f"{row.calls_answered}/{row.calls_sent}", f"{row.casts_lost}"
    if row.calls_told:
        calls += f" +{row.calls_told} told"
    if row.casts_died:
        lost += f" +{row.casts_died} died"
    first = "-" if row.first_answer_s is None else f"{row.first_answer_s:.1f}"
    return (
        *(row.operation, f"{row.nova_s:.1f}", first, f"{row.longest_silence_s:.1f}"),
        *(
            calls,
            str(row.casts_sent),
            lost,
            str(row.casts_twice + row.calls_twice),
            str(row.casts_marked),
            str(row.casts_overtaken),
        ),
    )
