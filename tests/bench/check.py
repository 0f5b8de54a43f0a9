"""What is measured now beside numbers that are kept: slower by more than a tenth fails.

Two kinds of numbers that other load hardly disturbs:

- instructions in the guest (`counting`), the same to a few percent wherever QEMU runs;
- CPU a call natively (`native`), in units of what this processor takes for a fixed piece of Python,
  so that the kept number holds on another processor. Other load only ever adds to it: the least of
  several rounds counts, and rounds are added while it is too much, up to ROUNDS_MAX.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from tests.bench import counting, native
from tests.bench.native import AGENT, DAEMON
from tests.rig.guest_image import RELEASE

KEPT: Final = Path(__file__).with_name(f"kept-{RELEASE.codename}.json")
"""Of a guest with this release's Python: another one takes other numbers of instructions."""
TOLERANCE: Final = 1.10
ROUNDS: Final = 3
ROUNDS_MAX: Final = 12
CALLS: Final = 400
UNIT_TIMES: Final = 200
COUNTED: Final = "thousand instructions: "
TIMED: Final = "CPU, in units: "
CPU: Final = tuple(
    (subject, f"cpu_us_{count}") for subject in (DAEMON, AGENT) for count in native.IN_FLIGHT
)

Numbers = dict[str, float]


class Compared(NamedTuple):
    """One number, and what is kept of it: 0.0 where there is nothing."""

    what: str
    now: float
    kept: float

    @property
    def is_slower(self) -> bool:
        """Whether it fails. What is not kept does not."""
        return self.kept > 0 and self.now > self.kept * TOLERANCE


def compare(now: Mapping[str, float], kept: Mapping[str, float]) -> list[Compared]:
    """In the order of `now`; what is kept and no longer measured comes last, as 0.0 now."""
    gone = (what for what in kept if what not in now)
    return [
        *(Compared(what, number, kept.get(what, 0.0)) for what, number in now.items()),
        *(Compared(what, 0.0, kept[what]) for what in gone),
    ]


def problems(rows: list[Compared]) -> list[str]:
    """What fails, a line each."""
    return [
        f"{row.what}: {row.now:.1f}, {row.now / row.kept - 1:+.0%} beside {row.kept:.1f}"
        for row in rows
        if row.is_slower
    ] + [
        f"{row.what}: " + ("no longer measured" if row.now == 0 else "not kept yet")
        for row in rows
        if row.now == 0 or row.kept == 0
    ]


def table(rows: list[Compared]) -> str:
    """The rows, for people."""
    lines = [f"{'':<52}{'now':>10}{'kept':>10}{'':>8}"]
    for what, now, kept in rows:
        change = f"{now / kept - 1:+.0%}" if kept else "new"
        lines.append(f"{what:<52}{now:>10.1f}{kept:>10.1f}{change:>8}")
    return "\n".join(lines)


def count(directory: Path) -> Numbers:
    """The counts that are kept, by name.

    Args:
        directory: For sockets; a short path.
    """
    return {
        f"{COUNTED}{what}": sum(spent.values())
        for what, spent in counting.measure(directory)
        if "vchan-guest" in spent  # the others are there to be compared with
    }


def time_cpu(directory: Path, body: bytes, kept: Mapping[str, float]) -> Numbers:
    """The times that are kept, by name.

    Args:
        body: See `native.measure`.
        kept: Rounds are added while a number is over its own in here.
    """
    return least_cpu(lambda: _cpu_round(directory, body), kept)


def least_cpu(cpu_round: Callable[[], Numbers], kept: Mapping[str, float]) -> Numbers:
    """The least of each number over the rounds."""
    least: Numbers = {}
    for number in range(ROUNDS_MAX):
        for what, value in cpu_round().items():
            least[what] = min(value, least.get(what, value))
        if number + 1 >= ROUNDS and not any(row.is_slower for row in compare(least, kept)):
            break
    return least


def _cpu_round(directory: Path, body: bytes) -> Numbers:
    before_us = _unit_us()
    measured = native.measure(directory, body, rounds=1, calls=CALLS)
    unit_us = min(before_us, _unit_us())
    return {f"{TIMED}{subject}.{what}": measured[subject][what] / unit_us for subject, what in CPU}


def _unit_us() -> float:
    """CPU time of a fixed piece of Python, in microseconds: the least of many."""
    return min(_pieces())


def _pieces() -> Iterator[float]:
    data = {"method": "ping", "args": {"x": "x" * 20}}
    for _ in range(UNIT_TIMES):
        started_ns = time.thread_time_ns()
        for _ in range(20):
            parts = json.dumps(data).encode().split(b",")
            json.loads(b",".join(parts))
        yield (time.thread_time_ns() - started_ns) / 1000 / 20


def load(*, counts_only: bool = False) -> Numbers:
    """What is kept; nothing yet: empty."""
    kept = dict(json.loads(KEPT.read_text())) if KEPT.exists() else {}
    return {
        what: number for what, number in kept.items() if not counts_only or what.startswith(COUNTED)
    }


def keep(numbers: Mapping[str, float]) -> None:
    """Keep these from now on."""
    rounded = {what: round(number, 1) for what, number in numbers.items()}
    KEPT.write_text(json.dumps(rounded, indent=2) + "\n")
