"""The deterministic simulation: see README.md beside this file."""

from tests.simulate.run import Result, simulate
from tests.simulate.scenarios import SCENARIOS

__all__ = ["SCENARIOS", "Result", "simulate"]
