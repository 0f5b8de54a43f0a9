"""One attack, from a process of its own, beside a VM that behaves: what happens, and what it costs.

python -m tests.attack.run [--seconds N] [ATTACK...]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.attack.hostile import ATTACKS
from tests.rig import end_process, rig_directory, wait_until
from tests.rig.compute import ROOT
from tests.rig.undriven import UndrivenHost
from vchan.client import Client
from vchan.errors import RequestError, VchanError

NEIGHBOUR = "good"
WAIT_S = 60.0
CALL_S = 30.0
PAUSE_S = 0.002
"""Between the neighbour's calls: it shall not be the load itself."""
TICK_S = os.sysconf("SC_CLK_TCK")
POLICY = """
listen,reply  any  agent    allow
listen,reply  any  t*       allow
call,cast     any  nobody   allow
call,cast     any  control  allow
"""

OUTCOMES = (
    "quarantines",
    "throttled",
    "violations",
    "bad_payloads",
    "bad_messages",
    "guest_denied",
    "guest_refused",
    "guest_requests",
    "topics_over_limit",
    "backlog_bytes",
)
"""What the daemon says of a VM, of what may have become of an attack."""


class Cost(NamedTuple):
    """What a stretch of time was like.

    Attributes:
        p99_ms: Of the neighbour's calls.
        cpu: Of one core, the daemon's share.
        rss_kib: The daemon's, at the end.
    """

    p50_ms: float
    p99_ms: float
    calls: int
    failed: int
    cpu: float
    rss_kib: int


class Result(NamedTuple):
    """Of one attack."""

    name: str
    before: Cost
    during: Cost
    rss_peak_kib: int
    outcome: dict[str, int]
    attacker: dict[str, int]
    log_lines: int
    quarantine: Any
    after_failed: int


class Scene:
    """A host's daemon, a VM that behaves, and one VM for each attack.

    Args:
        options: Further lines for the daemon's [vchan].
    """

    def __init__(self, directory: Path, attacks: Sequence[str], *, options: Sequence[str] = ()):
        self._directory = directory
        self.host = UndrivenHost(
            directory / "h", [NEIGHBOUR, *attacks], policy=POLICY, options=options
        )
        self._neighbour: subprocess.Popen[bytes] | None = None
        # From the start: the daemon looks for a socket that is not there ever more rarely.
        self._channels = {name: socket.socket(socket.AF_UNIX) for name in attacks}

    def __enter__(self) -> Self:
        for name, channel in self._channels.items():
            channel.bind(str(self.host.vms[name].path))
            channel.listen()
        self.host.__enter__()
        try:
            command = [sys.executable, "-m", "tests.attack.neighbour"]
            self._neighbour = subprocess.Popen(
                [*command, str(self.host.vms[NEIGHBOUR].path)], cwd=ROOT, start_new_session=True
            )
            self.host.daemon.wait_ready(NEIGHBOUR, topics=["agent"])
            self.client = Client(str(self.host.daemon.socket))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._neighbour is not None:
            end_process(self._neighbour, grace_s=0.0)
        self.host.__exit__(kind, error, trace)
        for channel in self._channels.values():
            channel.close()

    # ---------------------------------------------------------------- measuring

    def measure(self, seconds: float) -> Cost:
        """Call the neighbour for so long."""
        took_ms: list[float] = []
        failed = 0
        began_s, began_cpu = time.monotonic(), self._cpu_s()
        number = 0
        while time.monotonic() - began_s < seconds:
            number += 1
            at_s = time.perf_counter()
            try:
                answer = self.client.call(
                    "agent",
                    "echo",
                    {"number": number},
                    server=self.host.vms[NEIGHBOUR].uuid,
                    timeout_s=CALL_S,
                )
                failed += answer["args"] != {"number": number}
            except RequestError:
                failed += 1
            took_ms.append((time.perf_counter() - at_s) * 1000)
            time.sleep(PAUSE_S)
        lasted_s = time.monotonic() - began_s
        return Cost(
            statistics.median(took_ms),
            sorted(took_ms)[max(0, int(len(took_ms) * 0.99) - 1)],
            len(took_ms),
            failed,
            (self._cpu_s() - began_cpu) / lasted_s,
            self.memory_kib("VmRSS"),
        )

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self.host.daemon.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK_S

    def memory_kib(self, name: str) -> int:
        """The daemon's, by its name in /proc."""
        for line in Path(f"/proc/{self.host.daemon.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise AssertionError(name)

    def _reset_peak(self) -> None:
        Path(f"/proc/{self.host.daemon.pid}/clear_refs").write_text("5")

    def attack(self, name: str, seconds: float, *, vm: str = "", word: str = "") -> Result:
        """Measure without, then with the attacker; then see that the neighbour is well.

        Args:
            vm: Whose channel; that named for the attack.
            word: See `hostile`.
        """
        vm = vm or name
        before = self.measure(seconds)
        lines_before = self._log_lines()
        self._reset_peak()
        rss_before = self.memory_kib("VmRSS")
        channel = self._channels[vm].fileno()
        command = [sys.executable, "-m", "tests.attack.hostile", f"fd:{channel}"]
        with subprocess.Popen(
            [*command, name, str(seconds + 1.0), word],
            cwd=ROOT,
            pass_fds=[channel],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as attacker:
            try:
                wait_until(
                    lambda: self.host.daemon.status(vm)["session"]["greetings"] > 0,
                    timeout_s=WAIT_S,
                    interval_s=0.02,
                    failure=lambda: f"{name} never began: {self.host.daemon.status(vm)}",
                )
                self._provoke(name, vm)
                during = self.measure(seconds)
                status = self.host.daemon.status(vm)
                out, _ = attacker.communicate(timeout=WAIT_S)
            finally:
                if attacker.poll() is None:
                    attacker.kill()
        after = self.measure(0.5)
        return Result(
            name,
            before,
            during,
            self.memory_kib("VmHWM") - rss_before,
            {key: value for key, value in _flat(status) if key in OUTCOMES and value},
            json.loads(out.splitlines()[-1]) if out else {},
            self._log_lines() - lines_before,
            status.get("quarantine"),
            after.failed,
        )

    def _provoke(self, name: str, vm: str) -> None:
        """Some attackers wait to be asked."""
        if name in ("stops_reading", "exception_injection", "json_bombs_in_answers"):
            self.host.daemon.wait_ready(vm, topics=["agent"])
            for _ in range(300 if name == "stops_reading" else 5):
                try:
                    self.client.cast(
                        "agent",
                        "m",
                        {"x": "y" * 10_000},
                        server=self.host.vms[vm].uuid,
                        timeout_s=0.01,
                    )
                except VchanError:
                    pass

    def _log_lines(self) -> int:
        return self.host.daemon.log.read_text(errors="replace").count("\n")


def _flat(values: dict[str, Any]) -> Iterable[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value)
        elif isinstance(value, int):
            yield key, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack.run")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack [5]")
    parser.add_argument("attacks", nargs="*", help="[all]")
    options = parser.parse_args(arguments)
    names = options.attacks or list(ATTACKS)
    print(
        f"{'attack':24}{'RSS peak':>10}{'CPU':>7}{'p50 ms':>15}{'p99 ms':>16}{'failed':>8}  outcome"
    )
    with rig_directory() as directory, Scene(directory, names) as scene:
        scene.measure(2.0)  # until it is warm
        for name in names:
            print_result(scene.attack(name, options.seconds, word=word_for(scene, name)))
    return 0


def word_for(scene: Scene, name: str) -> str:
    """What an attack is about."""
    if name == "topic_squatting":
        return scene.host.vms[NEIGHBOUR].uuid
    return os.urandom(16).hex() if name == "replies_for_others" else ""


def print_result(result: Result) -> None:
    """A line of the table."""
    before, during = result.before, result.during
    outcome = ", ".join(f"{key} {value}" for key, value in result.outcome.items())
    mib = result.attacker.get("bytes_sent", 0) / 2**20
    p50 = f"{before.p50_ms:>7.2f} ->{during.p50_ms:>5.2f}"
    p99 = f"{before.p99_ms:>8.2f} ->{during.p99_ms:>5.2f}"
    print(
        f"{result.name:24}{result.rss_peak_kib / 1024:>6.1f} MiB{during.cpu:>7.0%}{p50}{p99}"
        f"{during.failed + result.after_failed:>8}  {mib:.1f} MiB sent; {outcome or 'nothing'}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
