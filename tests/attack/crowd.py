"""Many attackers at once beside many VMs that behave: what these notice, in one run.

    python -m tests.attack.crowd [--vms N] [--hostile N] [--seconds N] [--rounds N] [--json]

Stretches without and with the attackers take turns, so that whatever else the machine does falls on
both. The calls of all stretches are taken together. `wait` and `attackers` are the daemon's
processor time, which the rest of the machine does not change: how long a VM that behaves, or its
caller, waited for the daemon to look at it; and what the daemon spent on each attacker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.attack.run import CALL_S, PAUSE_S, POLICY, TICK_S, WAIT_S, percentile
from tests.rig import end_process, rig_directory, wait_until
from tests.rig.compute import ROOT
from tests.rig.ending import end_on_signals
from tests.rig.undriven import UndrivenHost
from vchan.client import Client
from vchan.errors import RequestError

ATTACKS = (
    "torn_frame_smuggling",
    "tiny_frames",
    "tiny_fragments",
    "unread_replies",
    "holes",
    "id_forgery",
    "subscription_bomb",
    "topic_squatting",
    "json_bombs",
    "garbage",
)
"""Those that go on: they are slowed down, not closed off."""


class Stretch(NamedTuple):
    """Some seconds.

    Attributes:
        calls_ms: Of each call to a VM that behaves, how long it took.
        failed: Of them.
        waits_us: See the top.
        cpu: Of one core, the daemon's share.
        attackers_ms_per_s: Of the daemon's time, for each attacker.
    """

    calls_ms: list[float]
    failed: int
    waits_us: list[float]
    cpu: float
    attackers_ms_per_s: list[float]


def together(stretches: Sequence[Stretch]) -> dict[str, Any]:
    """A row of the table."""
    calls_ms = [ms for each in stretches for ms in each.calls_ms]
    attackers = [ms for each in stretches for ms in each.attackers_ms_per_s]
    return {
        "calls": len(calls_ms),
        "failed": sum(each.failed for each in stretches),
        "p50_ms": percentile(calls_ms, 0.5),
        "p99_ms": percentile(calls_ms, 0.99),
        "wait_p99_us": percentile([us for each in stretches for us in each.waits_us], 0.99),
        "cpu": statistics.mean(each.cpu for each in stretches),
        "attacker_ms_per_s": statistics.mean(attackers) if attackers else 0.0,
        "attacker_ms_per_s_max": max(attackers, default=0.0),
    }


class Crowd:
    """A host, its VMs that behave, in one process, and the channels of those that do not."""

    def __init__(self, directory: Path, vms: int, hostile: int) -> None:
        self.good = [f"good.{number}" for number in range(vms - hostile)]
        self.bad = [f"bad.{number}" for number in range(hostile)]
        self.host = UndrivenHost(directory / "h", [*self.good, *self.bad], policy=POLICY)
        self.host.daemon.program = (sys.executable, "-m", "tests.attack.timed_host")
        self._times = directory / "h" / "vchan.conf.times"
        self._channels: list[socket.socket] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[Client]:
        """The caller."""
        with contextlib.ExitStack() as stack:
            for name in self.bad:
                channel = stack.enter_context(socket.socket(socket.AF_UNIX))
                channel.bind(str(self.host.vms[name].path))
                channel.listen()
                self._channels.append(channel)
            paths = [str(self.host.vms[name].path) for name in self.good]
            command = [sys.executable, "-m", "tests.attack.neighbour", *paths]
            neighbours = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
            stack.callback(end_process, neighbours, grace_s=0.0)
            stack.enter_context(self.host)
            for name in self.good:
                self.host.daemon.wait_ready(name, topics=["agent"])
            # As in `run`: a VM's processor time is not taken from the daemon's, here it would be.
            policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            own = os.sched_getscheduler(0), os.sched_getparam(0)
            stack.callback(os.sched_setscheduler, 0, *own)  # nor for longer than this
            with contextlib.suppress(PermissionError):
                for pid in (self.host.daemon.pid, neighbours.pid, 0):
                    os.sched_setscheduler(pid, policy, os.sched_param(1))
            yield stack.enter_context(Client(str(self.host.daemon.socket)))

    def measure(self, client: Client, seconds: float) -> Stretch:
        """Call those that behave, one after the other."""
        calls_ms: list[float] = []
        failed = 0
        self._read_times()
        began_s, began_cpu = time.monotonic(), self._cpu_s()
        while time.monotonic() - began_s < seconds:
            name = self.good[len(calls_ms) % len(self.good)]
            server, args = self.host.vms[name].uuid, {"number": len(calls_ms)}
            at_s = time.perf_counter()
            try:
                answer = client.call("agent", "echo", args, server=server, timeout_s=CALL_S)
                failed += answer["args"] != args
            except RequestError:
                failed += 1
            calls_ms.append((time.perf_counter() - at_s) * 1000)
            time.sleep(PAUSE_S)
        lasted_s = time.monotonic() - began_s
        cpu, times = (self._cpu_s() - began_cpu) / lasted_s, self._read_times()
        ours = [str(self.host.vms[name].path) for name in self.good]
        theirs = [times["turns"].get(str(self.host.vms[name].path), ()) for name in self.bad]
        return Stretch(
            calls_ms,
            failed,
            [
                us
                for path in (*ours, str(self.host.daemon.socket))
                for us in times["waits"].get(path, ())
            ],
            cpu,
            [sum(turns) / 1000 / lasted_s for turns in theirs],
        )

    @contextlib.contextmanager
    def attacked(self, seconds: float) -> Iterator[None]:
        """Every attacker at full speed."""
        processes = []
        try:
            for number, channel in enumerate(self._channels):
                name = ATTACKS[number % len(ATTACKS)]
                word = self.host.vms[self.good[0]].uuid if name == "topic_squatting" else ""
                fd = channel.fileno()
                command = ["nice", "-n", "19", sys.executable, "-m", "tests.attack.hostile"]
                command += [f"fd:{fd}", name, str(seconds), word]
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, pass_fds=[fd], stdout=subprocess.DEVNULL)
                )
            wait_until(
                lambda: all(self._is_there(name) for name in self.bad),
                timeout_s=WAIT_S,
                interval_s=0.1,
                failure=lambda: "an attacker never began",
            )
            yield
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def _is_there(self, name: str) -> bool:
        return bool(self.host.daemon.status(name)["state"] == "ready")

    def _read_times(self) -> dict[str, dict[str, Sequence[float]]]:
        """See `timed_host`: since this was asked last."""
        os.kill(self.host.daemon.pid, signal.SIGUSR1)
        wait_until(
            self._times.exists,
            timeout_s=WAIT_S,
            interval_s=0.005,
            failure=lambda: "the daemon does not say what its turns took",
        )
        times: dict[str, dict[str, Sequence[float]]] = json.loads(self._times.read_text())
        self._times.unlink()
        return times

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self.host.daemon.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK_S


def measure(
    directory: Path, *, vms: int = 50, hostile: int = 10, seconds: float = 4.0, rounds: int = 4
) -> dict[str, Any]:
    """Both rows, and the machine's load."""
    crowd = Crowd(directory, vms, hostile)
    alone, beside = [], []
    with crowd.running() as client:
        crowd.measure(client, 1.0)  # until it is warm
        for _ in range(rounds):
            alone.append(crowd.measure(client, seconds))
            with crowd.attacked(seconds + WAIT_S):
                beside.append(crowd.measure(client, seconds))
    return {
        "vms": vms,
        "hostile": hostile,
        "without": together(alone),
        "with": together(beside),
        "load": os.getloadavg()[0],
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{'':10}{'calls':>7}{'failed':>8}{'p50 ms':>8}{'p99 ms':>8}{'wait p99 us':>13}"
        f"{'daemon':>8}{'an attacker, ms/s':>19}{'at most':>9}"
    ]
    for name in ("without", "with"):
        row = result[name]
        lines.append(
            f"{name:10}{row['calls']:>7}{row['failed']:>8}{row['p50_ms']:>8.2f}"
            f"{row['p99_ms']:>8.2f}{row['wait_p99_us']:>13.0f}{row['cpu']:>8.0%}"
            f"{row['attacker_ms_per_s']:>19.1f}{row['attacker_ms_per_s_max']:>9.1f}"
        )
    lines.append(f"{result['hostile']} hostile of {result['vms']} VMs; load {result['load']:.1f}")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack.crowd")
    parser.add_argument("--vms", type=int, default=50, help="in all [50]")
    parser.add_argument("--hostile", type=int, default=10, help="of them [10]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each stretch [4]")
    parser.add_argument("--rounds", type=int, default=4, help="stretches of each kind [4]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with rig_directory() as directory:
        result = measure(
            directory,
            vms=options.vms,
            hostile=options.hostile,
            seconds=options.seconds,
            rounds=options.rounds,
        )
    print(json.dumps(result) if options.json else table(result))
    return 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
