"""python -m tests.simulate --seeds N [--start S] [--seed X --trace] [--scenario NAME]"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulate.exempt import describe, is_exemption
from tests.simulate.run import Result, simulate
from tests.simulate.scenarios import SCENARIOS


def main() -> int:
    """Run seeds; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulate")
    parser.add_argument("--seeds", type=int, default=1000, help="how many [1000]")
    parser.add_argument("--start", type=int, default=0, help="the first [0]")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first")
    parser.add_argument("--scenario", help="by name, instead of chance")
    options = parser.parse_args()
    scenario = next((one for one in SCENARIOS if one.__name__ == options.scenario), None)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    else:
        seeds = range(options.start, options.start + options.seeds)
    began_s = time.perf_counter()
    totals: Counter[str] = Counter()
    failed: list[Result] = []
    for seed in seeds:
        result = simulate(seed, trace=options.trace, scenario=scenario)
        _add(totals, result)
        if result.failure is not None:
            failed.append(result)
            _report(result)
            if not options.keep_going:
                break
    _summary(totals, time.perf_counter() - began_s, failed)
    return 1 if failed else 0


def _add(totals: Counter[str], result: Result) -> None:
    for name, value in result.stats.items():
        if name.startswith("peak "):
            totals[name] = max(totals[name], value)
        else:
            totals[name] += value
    totals["seeds"] += 1
    totals["simulated seconds"] += int(result.simulated_s)


def _report(result: Result) -> None:
    print(f"\nseed {result.seed} ({result.profile}), event {result.step}: {result.failure}")
    for line in result.trace:
        print("   ", line)
    print(f"    replay: python -m tests.simulate --seed {result.seed} --trace\n")


def _summary(totals: Counter[str], took_s: float, failed: list[Result]) -> None:
    seeds = max(totals["seeds"], 1)
    for name in sorted(totals):
        if is_exemption(name):
            continue
        if name.startswith("peak "):
            print(f"{totals[name]:>12}  {name}")
        else:
            print(f"{totals[name]:>12}  {name}  ({totals[name] / seeds:.1f} a seed)")
    for line in describe(totals):
        print(line)
    rate = seeds / max(took_s, 1e-9) * 60
    print(f"{seeds} seeds in {took_s:.1f} s: {rate:.0f} a minute; {len(failed)} failed")
    if failed:
        print("failed:", *(result.seed for result in failed))


if __name__ == "__main__":
    sys.exit(main())
