"""An agent in a VM that asks a service, and both ends' counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tests.rig import wait_until
from tests.rig.compute import agent_service
from tests.rig.control_service import ControlService, Ran

TOPIC = "asker"
ASKER = agent_service("asker", "/app/asker.py", TOPIC)
WAIT_S = 120.0

Call = Callable[..., Any]
"""(method, **args): calls the asking agent, wherever its VM is."""


@dataclass
class Asked:
    """What the agent sent and heard, and what the service ran."""

    calls_sent: int = 0
    calls_answered: int = 0
    casts_sent: int = 0
    casts_executed: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    marked: int = 0
    """Executions that said that they might be copies."""
    errors: list[str] = field(default_factory=list)
    instances: set[str] = field(default_factory=set)
    """The VMs' UUIDs, as the service was told them."""

    def check(self, *, marked: bool = False) -> None:
        """Everything ran once and in order. What was marked may have been a copy, if allowed."""
        assert self.errors == [], self.errors
        assert marked or self.marked == 0, self
        assert (self.lost, self.reordered) == (0, 0), self
        assert self.duplicated <= self.marked, self
        assert self.calls_answered == self.calls_sent > 0, self
        assert self.casts_executed == self.casts_sent > 0, self


class Asker:
    """The asking agent, told to ask a service."""

    def __init__(self, call: Call, service: ControlService, topic: str, name: str) -> None:
        self._call = call
        self._service = service
        self._name = name
        call("start", target=topic, name=name)

    def flows(self, count: int = 20) -> None:
        """Wait for so many more calls answered and casts taken."""
        before = seen = self._call("progress")

        def moved() -> bool:
            nonlocal seen
            seen = self._call("progress")
            return all(
                seen[name] >= before[name] + count for name in ("calls_answered", "casts_sent")
            )

        wait_until(moved, timeout_s=WAIT_S, interval_s=0.2, failure=lambda: f"stands at {seen}")

    def finish(self) -> Asked:
        """Stop asking, end the service, and compare."""
        told: dict[str, Any] = {}

        def over() -> bool:
            told.update(self._call("stop"))
            return bool(told["running"] == 0)

        wait_until(over, timeout_s=WAIT_S, interval_s=0.2, failure=lambda: f"goes on: {told}")
        ran = self._service.finish(
            **{
                f"{self._name}caster": told["casts_sent"],
                f"{self._name}caller": told["calls_answered"],
            }
        )
        asked = Asked(told["calls_sent"], told["calls_answered"], told["casts_sent"])
        asked.errors = told["errors"]
        asked.lost = told["wrong_answers"]
        casts = ran.get(f"{self._name}caster", [])
        asked.casts_executed = len({entry.number for entry in casts})
        _count(asked, casts, asked.casts_sent)
        _count(asked, ran.get(f"{self._name}caller", []), asked.calls_sent)
        return asked


def _count(asked: Asked, ran: list[Ran], sent: int) -> None:
    first = list(dict.fromkeys(entry.number for entry in ran))
    asked.lost += len(set(range(1, sent + 1)) - set(first))
    asked.duplicated += len(ran) - len(first)
    asked.reordered += sum(a > b for a, b in pairwise(first))
    asked.marked += sum(entry.redelivered for entry in ran)
    asked.instances |= {entry.instance_uuid for entry in ran}
