"""Every kind of fault once, on real parts, with the oracle's word on everything that was sent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from tests.torture.oracle import AGENT_DEATHS, CRASH, PANIC
from tests.torture.report import LEAST
from tests.torture.schedule import ALL_KINDS

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).parents[2]
RUN_S = 1800.0  # 2 to 3 minutes on two cores that do nothing else
COMMAND = [sys.executable, "-m", "tests.torture", "--once", "--vms", "3", "--seed", "1", "--json"]


def test_every_fault_once() -> None:
    done = subprocess.run(
        COMMAND, cwd=ROOT, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["violations"] == []
    assert figures["failed"] == []  # every fault was carried out
    assert set(figures["by_kind"]) == set(ALL_KINDS)
    assert min(figures["by_kind"].values()) >= 1, figures["by_kind"]
    ends = sum(
        figures["by_kind"][kind] for kind in (*(AGENT_DEATHS - {CRASH, PANIC}), "asker_kill")
    )
    assert figures["reborn"] >= ends  # a fault that does nothing looks like a promise kept
    for name, least in LEAST.items():
        assert figures[name] >= least, (name, figures)
