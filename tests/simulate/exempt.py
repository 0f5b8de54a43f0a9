"""What is known not to hold: the promises' exemptions, by their names in docs/architecture.md.

Whatever excuses a broken promise in a run does so by one of these names, and is counted. A test
compares the names with the document's; a run prints them all, the unused too.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

LOST_WITH_AGENT: Final = "Lost with its agent"
RAN_AGAIN: Final = "Run again, marked"
PUBLISHED_TWICE: Final = "Published twice"
ASKED_AGAIN: Final = "Asked again, marked"
OVERTAKEN: Final = "Refused, and overtaken"
TOLD_AGAIN: Final = "Reported again"

COUNTED: Final = (LOST_WITH_AGENT, RAN_AGAIN, PUBLISHED_TWICE, ASKED_AGAIN, OVERTAKEN, TOLD_AGAIN)
"""A run can see these happen."""
NOT_SIMULATED: Final = (
    "Unknown after twelve seconds",
    "Answer no longer kept",
    "Rolled back under a live connection",
    "Dropped by the broker",
    "Away for too long",
    "Missed while away",
)
"""No run gets there: nothing excuses these, and nothing shows them."""
EXEMPTIONS: Final = COUNTED + NOT_SIMULATED

_PREFIX: Final = "EXEMPT "


def exempt(stats: Counter[str], name: str, count: int = 1) -> None:
    """A promise did not hold, and that is known."""
    assert name in COUNTED
    stats[_PREFIX + name] += count


def describe(stats: Counter[str]) -> list[str]:
    """A line for each exemption: how often it was used."""
    counted = [f"{stats[_PREFIX + name]:>12}  {_PREFIX}{name}" for name in COUNTED]
    return counted + [f"{'-':>12}  {_PREFIX}{name}: not simulated" for name in NOT_SIMULATED]


def is_exemption(statistic: str) -> bool:
    """Whether a statistic counts one."""
    return statistic.startswith(_PREFIX)
