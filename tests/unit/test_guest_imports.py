"""What a guest's programs import decides how soon they start in a small guest."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SLOW = {
    "argparse",
    "asyncio",
    "construct",
    "dataclasses",
    "logging",
    "pathlib",
    "selectors",
    "socket",
    "subprocess",
    "resource",
    "serial",
    "tempfile",
    "tomllib",
    "traceback",
    "vchan.agents.super_agent",
    "vchan.guest.serial_port",
    "vchan.agents.standard.agent",
    "vchan.protocol",
}
"""Each costs as much as a tenth of our own code or more."""

# NamedTuple compiles annotations that are strings, and the first use of compile() costs more than
# importing enum: modules with NamedTuples do not postpone theirs.
PROGRAM = """
import sys, typing
sys.path.insert(0, {root!r})
made = []
typing.ForwardRef.__init__ = lambda self, text, *_, **__: made.append(text)
import {module}
print(*sys.modules)
print(*made)
"""


@pytest.mark.parametrize("module", ["vchan.guest.daemon", "vchan.client"])
def test_only_what_starts_fast_is_imported(module: str) -> None:
    program = PROGRAM.format(root=str(ROOT), module=module)
    command = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, compiled = done.stdout.split("\n")[:2]
    assert set(imported.split()) & SLOW == set()
    assert compiled == ""
