"""The simulation, a small part of it; and every seed that once showed a bug.

More: `python -m tests.simulate --seeds 10000`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulate import SCENARIOS, simulate
from tests.simulate.exempt import ASKED_AGAIN, OVERTAKEN, RAN_AGAIN
from tests.simulate.run import Run

SEEDS = 200

# Seeds that broke a promise once, and what was wrong. The simulation has changed since some of
# them were found, so the bugs are planted again in tests/planted as well.
KEPT = {
    "a caller's second copy of a request ran after the first was settled": 24,
    "a call whose agent had died ran again": 188,
    "a redelivered fanout reached only the agent that had it": 944,
    "what was on its way to an earlier Downward overtook what came before it": 1144,
    "a delivery came before Downward had asked for anything": 422,
    "a call that had run was refused as unrun": 1995,
    "casts handed back for want of an agent were overtaken": 4322,
    "a VM was given up a minute after a failed migration": 903,
    "an agent's last receipt was not read before its link ended": 3395,
    "a VM that put off consuming was never woken": 22168,
    "likewise, found by silence": 2362,
    "a guest daemon that restarted twice": 830,
    "edges and levels of two migrations close together": 734,
}


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_promises_are_kept(first: int) -> None:
    for seed in range(first, first + 20):
        result = simulate(seed)
        assert result.failure is None, _story(seed, result.failure, result.trace)


@pytest.mark.parametrize("seed", KEPT.values(), ids=KEPT.keys())
def test_what_once_broke_a_promise(seed: int) -> None:
    result = simulate(seed)
    assert result.failure is None, _story(seed, result.failure, result.trace)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios(scenario: Callable[[Run], None]) -> None:
    for seed in range(8):
        result = simulate(seed, scenario=scenario)
        assert result.failure is None, _story(seed, result.failure, result.trace)


def test_a_seed_is_a_run() -> None:
    first, second = simulate(7), simulate(7)
    assert first == second


def test_the_simulation_gets_somewhere() -> None:
    """What is never reached proves nothing."""
    stats = sum((simulate(seed).stats for seed in range(120)), start=simulate(120).stats)
    for what in (
        "migrations",
        "migrations failed",
        "resumptions",
        "redeliveries",
        "repeats dropped by the guest daemon",
        "wedges",
        "wedges cured",
        "losses",
        "frames resent",
        "published twice",
        "copies at the host",
        "calls: result",
        "calls: failed",
        "calls: timeout",
        "guests' requests in doubt",
        "guests' requests refused by the broker",
        "asked: cast: taken",
        "asked: cast: nobody",
        "asked: fanout: taken",
        "asked: notification: taken",
        "asked: call: result",
        "asked: call: failed",
        "asked: call: timeout",
        "asked: heartbeats",
        "asked: ran marked",
        "ran marked",
        "EXEMPT " + RAN_AGAIN,
        "EXEMPT " + ASKED_AGAIN,
        "EXEMPT " + OVERTAKEN,
        "broker in trouble",
        "confirms that came late",
        "ids that had to be forgotten",
        "lies",
        "pairs of ends compared",
        "pauses",
        "violations",
    ):
        assert stats[what] > 0, what


def _story(seed: int, failure: str | None, trace: list[str]) -> str:
    lines = "\n".join(trace)
    return (
        f"seed {seed}: {failure}\n{lines}\nreplay: python -m tests.simulate --seed {seed} --trace"
    )
