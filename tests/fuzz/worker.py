"""python -m tests.fuzz.worker TARGET [libFuzzer's options and directories]: one target."""

from __future__ import annotations

import sys

import atheris


def main() -> None:
    """Does not return: libFuzzer ends the process."""
    target = sys.argv.pop(1)
    with atheris.instrument_imports(include=["vchan"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup(sys.argv, TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
