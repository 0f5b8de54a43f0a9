"""The inputs that are kept: corpus/TARGET.txt, one a line: the input in hex, and perhaps a name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import vchan

_OURS = str(Path(vchan.__file__).parent)
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


def fewest(target: Callable[[bytes], None], inputs: Iterable[bytes]) -> list[bytes]:
    """Of these, the small ones first, each that takes a way through vchan no earlier one took."""
    seen: set[tuple[str, int, int]] = set()
    kept = []
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        taken = _ways(target, data)
        if not taken <= seen:
            seen |= taken
            kept.append(data)
    return kept


def _ways(target: Callable[[bytes], None], data: bytes) -> set[tuple[str, int, int]]:
    """From which line to which, in vchan's files."""
    taken: set[tuple[str, int, int]] = set()

    def enter(frame: FrameType, _event: str, _: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if not name.startswith(_OURS):
            return None
        last = 0

        def step(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
            nonlocal last
            if event == "line":
                taken.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return taken
