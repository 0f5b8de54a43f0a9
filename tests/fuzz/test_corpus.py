"""Every input that is kept, and every seed, passes its target. Fuzzing itself is scripts/fuzz."""

from __future__ import annotations

import random

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


@pytest.mark.parametrize(("target", "name", "data"), _NAMED, ids=[name for _, name, _ in _NAMED])
def test_what_once_broke_does_not(target: str, name: str, data: bytes) -> None:
    TARGETS[target](data)
