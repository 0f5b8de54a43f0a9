"""How soon vchan-guest is there, from its exec to its first word and to its first answer, and where
the time goes.

In time, and in QEMU's CPU time, which other load disturbs less; where it goes in instructions of
the guest, which nothing disturbs.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.bench.counting import CountingGuest
from tests.bench.machine import DAEMON, DAEMON_SAYS, START, Machine, Taken, machine, read_until
from tests.bench.peers import DAEMON_TOPIC, Vchan
from tests.bench.suite import small_body
from tests.rig.guest_image import PYTHON
from vchan.io.streams import connect_unix

STARTS: Final = 10
AIM_MS: Final = 1000
COMMAND: Final = f"{DAEMON} --port virtio:{{port}} --socket /run/second.sock"
FIRST_BYTE: Final = "the interpreter alone: its first byte"
FIRST_WORD: Final = "vchan-guest: its first word to the host"
FIRST_ANSWER: Final = "vchan-guest: its answer to a call that waits"
MODULES_SHOWN: Final = 12

_IMPORT: Final = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| +(\S+)")


def run(directory: Path) -> dict[str, Any]:
    """All starts in turns, in one guest; and in a guest that counts, where the time goes."""
    taken: dict[str, list[Taken]] = defaultdict(list)
    timing_directory, counting_directory = directory / "timing", directory / "counting"
    timing_directory.mkdir()
    counting_directory.mkdir()
    with machine(timing_directory, running=()) as booted:
        for _ in range(STARTS):
            command = f"{PYTHON} -I -S /bench/first_byte.py {{port}}"
            taken[FIRST_BYTE].append(_until_said(booted, command, b"."))
            taken[FIRST_WORD].append(_until_said(booted, COMMAND, DAEMON_SAYS))
            taken[FIRST_ANSWER].append(_until_answered(booted))
    with machine(counting_directory, CountingGuest, running=()) as counting:
        whole = _until_answered_count(counting)
        imports = _imports_count(counting)
    return {"start": taken, "instructions_m": whole, "import_m": imports}


def _until_said(booted: Machine, command: str, first: bytes) -> Taken:
    with booted.connect(START) as channel, booted.started(command) as since:
        read_until(channel, first)
        return since()


def _until_answered(booted: Machine) -> Taken:
    vchan = Vchan(connect_unix(str(booted.guest.port(START))))
    try:
        with booted.started(COMMAND) as since:
            vchan.call(DAEMON_TOPIC, small_body())
            return since()
    finally:
        vchan.close()


def _until_answered_count(counting: Machine) -> float:
    """Millions of instructions from the exec to the answer, the interpreter's own included."""
    vchan = Vchan(connect_unix(str(counting.guest.port(START))))
    try:
        with counting.started(COMMAND):
            vchan.call(DAEMON_TOPIC, small_body())
            spent = counting.guest.shell("cat /proc/$(cat /run/start)/schedstat").output
            return int(spent.split()[0]) / 1e6
    finally:
        vchan.close()


def _imports_count(counting: Machine) -> dict[str, float]:
    """Millions of instructions that each module takes by itself; the interpreter imports some.

    A microsecond of such a guest's clock is a thousand instructions.
    """
    command = f"{PYTHON} -X importtime -c 'import vchan.guest.daemon'"
    found = _IMPORT.findall(counting.guest.shell(command).output)
    imports = {module: int(taken_us) / 1000 for taken_us, module in found}
    return dict(sorted(imports.items(), key=lambda item: -item[1]))


def _groups(imports: Mapping[str, float]) -> dict[str, float]:
    """Sums."""
    modules = list(imports)
    ours = [module for module in modules if module.startswith("vchan")]
    return {
        "imports: vchan's own modules": sum(imports[module] for module in ours),
        "imports: the standard library's": sum(
            imports[module] for module in modules if module not in ours
        ),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result, for people."""
    lines = [
        f"{f'from exec, {STARTS} starts each, in turns':<44}"
        f"{'median':>10}{'worst ms':>10}{'CPU ms':>10}{'worst':>10}"
    ]
    for what, starts in result["start"].items():
        columns = [[start[at] for start in starts] for at in (0, 1)]
        cells = [value for each in columns for value in (statistics.median(each), max(each))]
        lines.append(f"{what:<44}" + "".join(f"{cell:>10.0f}" for cell in cells))
    imports, whole = result["import_m"], result["instructions_m"]
    groups = _groups(imports)
    groups["the rest: the interpreter itself, and what the daemon does"] = whole - sum(
        imports.values()
    )
    lines += ["", f"{'million instructions in the guest, to the answer':<60}{whole:>8.1f}"]
    lines += [f"{what:<60}{value:>8.1f}" for what, value in groups.items()]
    lines += [f"  {name:<58}{imports[name]:>8.1f}" for name in list(imports)[:MODULES_SHOWN]]
    worst_ms, worst_cpu_ms = (
        max(start[at] for start in result["start"][FIRST_ANSWER]) for at in (0, 1)
    )
    lines += [
        "",
        f"the slowest answer: {worst_ms:.0f} ms, CPU {worst_cpu_ms:.0f} ms   aim < {AIM_MS}",
    ]
    before, after = result["load"]
    return "\n".join([*lines, f"machine's load: {before:.1f} before, {after:.1f} after"])
