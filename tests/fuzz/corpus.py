"""The inputs that are kept: corpus/TARGET.txt, one a line: the input in hex, and perhaps a name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent / "corpus"
INPUT_BYTES_MAX = 4096
"""Larger ones reach nothing that smaller ones do not."""


def load(target: str) -> dict[bytes, str]:
    """The inputs, and their names or ""."""
    path = HERE / f"{target}.txt"
    if not path.exists():
        return {}
    lines = (line.partition(" ") for line in path.read_text().splitlines())
    return {bytes.fromhex(data): name for data, _, name in lines}


def save(target: str, inputs: Iterable[bytes]) -> None:
    """Keep these, and those with a name."""
    kept = {data: name for data, name in load(target).items() if name}
    kept = {**dict.fromkeys(inputs, ""), **kept}
    lines = [f"{data.hex()} {name}".rstrip() for data, name in kept.items()]
    HERE.mkdir(exist_ok=True)
    (HERE / f"{target}.txt").write_text("".join(f"{line}\n" for line in sorted(lines)))
