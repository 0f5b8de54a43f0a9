"""Every input that is kept, and every seed, passes its target. Fuzzing itself is scripts/fuzz."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.fuzz.corpus import load
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

_NAMED = [(target, name, data) for target in TARGETS for data, name in load(target).items() if name]


@pytest.mark.parametrize("target", TARGETS)
def test_every_known_input_passes(target: str) -> None:
    known = [*seeds(target), *load(target)]
    assert known
    for data in known:
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_mutations_of_known_inputs_pass(target: str) -> None:
    """The same ones every time."""
    chance = random.Random(target)
    known = sorted({*seeds(target), *load(target)})
    for _ in range(100):
        data = bytearray(chance.choice(known) + chance.choice(known))
        for _ in range(chance.randrange(8)):
            data[chance.randrange(len(data) or 1) : chance.randrange(len(data) + 1)] = (
                chance.randbytes(chance.randrange(4))
            )
        TARGETS[target](bytes(data))


_OTHERS: Final[tuple[Any, ...]] = (None, True, 5, 1.5, "x", [], [1], {}, {"a": 1})


def of_other_types(value: Any) -> Iterator[Any]:
    """A value of each type in its place, or in that of something in it: of JSON in a text, too."""
    yield from _OTHERS
    if isinstance(value, dict):
        for name, member in value.items():
            yield from ({**value, name: other} for other in of_other_types(member))
    elif isinstance(value, list):
        for at, member in enumerate(value[:2]):
            yield from ([*value[:at], other, *value[at + 1 :]] for other in of_other_types(member))
    elif isinstance(value, str) and value.startswith("{"):
        yield from (json.dumps(other) for other in of_other_types(json.loads(value)))


@pytest.mark.parametrize("target", TARGETS)
def test_json_of_other_types_passes(target: str) -> None:
    """Compiled code raises TypeError for what a function says that it does not take."""
    for data in seeds(target):
        for start in (0, 1):  # some have a byte in front
            try:
                value = json.loads(data[start:])
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                for other in of_other_types(value):
                    TARGETS[target](data[:start] + json.dumps(other).encode())


@pytest.mark.parametrize(("target", "name", "data"), _NAMED, ids=[name for _, name, _ in _NAMED])
def test_what_once_broke_does_not(target: str, name: str, data: bytes) -> None:
    TARGETS[target](data)
