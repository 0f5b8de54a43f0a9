"""What happens when: dealt from a seed, written to a file, read from one. Pure but for that.

A lane deals from a shuffled deck, in which each kind of fault is as often as `DECKS` says: chance
decides the order, and no kind is left out for long.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

HOSTS: Final = "hosts"
BROKER: Final = "broker"
MIGRATE: Final = "migrate"
ABORT: Final = "abort"

VM_DECK: Final[dict[str, int]] = {
    MIGRATE: 8,
    ABORT: 2,  # a live migration is begun, and given up
    "suspend": 1,
    "save": 1,  # and restored
    "reset": 1,
    "agent_kill": 1,
    "agent_stop": 1,
    "agent_hang": 1,  # stopped, and killed after a while with what it has not read
    "agent_away": 1,  # killed, and not started again for a while
    "asker_kill": 1,
    "guest_daemon_kill": 2,
    "guest_daemon_stop": 1,
    "guest_daemon_hang": 1,  # stopped, and killed after a while with what it has not read
    "disk_full": 1,
    "clock_step": 1,
    "detach": 1,  # and attached
}
HOSTS_DECK: Final[dict[str, int]] = {
    "host_kill": 4,
    "host_stop": 2,
    "host_hang": 1,  # stopped, and killed after a while with what it has not read
    "host_away": 1,  # killed, and not started again for a while
    "both_kill": 1,
    "libvirtd_restart": 1,
    "libvirtd_kill": 1,
    "audit_full": 1,
}
BROKER_DECK: Final[dict[str, int]] = {
    "cut": 4,
    "broker_restart": 1,
    "broker_kill": 1,
}
VM_KINDS: Final = tuple(VM_DECK)
ALL_KINDS: Final = (*VM_DECK, *HOSTS_DECK, *BROKER_DECK)
SECONDS: Final[dict[str, tuple[float, float]]] = {
    ABORT: (0.2, 2.0),
    "suspend": (1.0, 12.0),
    "save": (0.0, 2.0),
    "agent_stop": (0.5, 6.0),
    "agent_hang": (0.5, 4.0),
    "agent_away": (1.0, 12.0),
    "guest_daemon_stop": (0.5, 8.0),
    "guest_daemon_hang": (0.5, 4.0),
    "disk_full": (2.0, 5.0),
    "clock_step": (-7200.0, 7200.0),
    "detach": (0.2, 3.0),
    "host_stop": (0.5, 8.0),
    "host_hang": (0.5, 5.0),
    "host_away": (1.0, 12.0),
    "audit_full": (2.0, 6.0),
}
"""How long a fault lasts; for clock_step: by how much. Others last as long as they take."""
PAUSE_S: Final[dict[str, tuple[float, float]]] = {HOSTS: (2.0, 8.0), BROKER: (6.0, 16.0)}
"""Between the steps of a lane."""
VM_PAUSE_S: Final = (0.2, 2.5)
OFTEN_PAUSE_S: Final[dict[str, tuple[float, float]]] = {HOSTS: (4.0, 16.0), BROKER: (15.0, 40.0)}
"""In a run that is to migrate often: while the broker is away nothing flows, and a migration
without traffic shows nothing."""
OFTEN_VM_PAUSE_S: Final = (0.0, 0.5)
MIGRATIONS_SHARE: Final = 6
"""In a run that is to migrate often a deck has so many times the migrations."""


class Step(NamedTuple):
    """One fault.

    Attributes:
        lane: Whose: "vm0" and on, HOSTS, BROKER.
        kind: A key of the decks.
        after_s: Of doing nothing before it.
        seconds: See SECONDS.
        host: Whom of the two hosts it is about (HOSTS): 0 or 1.
        at_s: When it began, in a schedule that was carried out.
    """

    lane: str
    kind: str
    after_s: float
    seconds: float = 0.0
    host: int = 0
    at_s: float = 0.0


def vm_lanes(count: int) -> list[str]:
    """Their names."""
    return [f"vm{number}" for number in range(count)]


def deal(seed: int, lane: str, vms: int, *, often: bool = False) -> Iterator[Step]:
    """A lane's steps, without end; equal arguments deal equal steps.

    Args:
        vms: How many VMs there are: their first cards together are every kind once.
        often: Migrate as often as possible.
    """
    rng = random.Random(f"{seed}/{lane}")
    pause_s = OFTEN_PAUSE_S.get(lane, OFTEN_VM_PAUSE_S) if often else _pause_s(lane)
    for kind in chain(_first_kinds(seed, lane, vms), _kinds(_deck(lane), often, rng)):
        yield _step(lane, kind, pause_s, rng)


def deal_once(seed: int, lane: str, vms: int) -> Iterator[Step]:
    """Every kind once, over all lanes of a sort; a VM migrates after each."""
    rng = random.Random(f"{seed}/{lane}")
    for kind in _first_kinds(seed, lane, vms):
        yield _step(lane, kind, _pause_s(lane), rng)
        if lane not in (HOSTS, BROKER) and kind != MIGRATE:
            yield _step(lane, MIGRATE, _pause_s(lane), rng)


def _deck(lane: str) -> dict[str, int]:
    return {HOSTS: HOSTS_DECK, BROKER: BROKER_DECK}.get(lane, VM_DECK)


def _pause_s(lane: str) -> tuple[float, float]:
    return PAUSE_S.get(lane, VM_PAUSE_S)


def _step(lane: str, kind: str, pause_s: tuple[float, float], rng: random.Random) -> Step:
    low, high = SECONDS.get(kind, (0.0, 0.0))
    after_s, seconds = round(rng.uniform(*pause_s), 2), round(rng.uniform(low, high), 2)
    return Step(lane, kind, after_s, seconds, rng.randrange(2))


def _kinds(deck: dict[str, int], often: bool, rng: random.Random) -> Iterator[str]:
    while True:
        cards = [kind for kind, share in deck.items() for _ in range(share)]
        if often:
            cards += [MIGRATE] * (deck.get(MIGRATE, 0) * (MIGRATIONS_SHARE - 1))
        rng.shuffle(cards)
        yield from cards


def _first_kinds(seed: int, lane: str, vms: int) -> Sequence[str]:
    """Every kind once, over all lanes of this sort."""
    kinds = list(_deck(lane))
    random.Random(f"{seed}/first").shuffle(kinds)
    if lane in (HOSTS, BROKER):
        return kinds
    return kinds[vm_lanes(vms).index(lane) :: vms]


def write(path: Path, seed: int, vms: int, steps: Sequence[Step]) -> None:
    """Write a schedule that was carried out."""
    lines = [json.dumps(step._asdict()) for step in steps]
    body = ",\n  ".join(lines)
    path.write_text(f'{{"seed": {seed}, "vms": {vms}, "steps": [\n  {body}\n]}}\n')


def read(path: Path) -> tuple[int, list[Step]]:
    """How many VMs a schedule is for, and its steps.

    Raises:
        ValueError: The file is no schedule; the text says what is wrong with it.
    """
    try:
        content = json.loads(path.read_text())
        vms, steps = int(content["vms"]), [Step(**step) for step in content["steps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no schedule: {error}") from error
    lanes = {*vm_lanes(vms), HOSTS, BROKER}
    for step in steps:
        if step.lane not in lanes or step.kind not in ALL_KINDS:
            raise ValueError(f"{path}: no such lane or kind: {step}")
    return vms, steps
