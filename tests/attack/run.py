"""One attack, from a process of its own, beside a VM that behaves: what happens, and what it costs.

    python -m tests.attack.run [--seconds N] [--rounds N] [ATTACK...]

The neighbour's calls are timed before and during each attack, in each of the rounds; the table has
the percentiles of all rounds' calls together. Daemon, neighbour, caller and attacker share this
machine's processors with whatever else it does. So the first three go before everybody else, where
this program may arrange that, and the attacker behind: a VM's processor time is not taken from the
daemon's, here it would be. `none` is no attack: what the machine's noise makes of it; `quiet` is a
process in the attacker's place that says nothing, and `burning` one that says nothing and is busy
all the while: what they cost the neighbour is the machine's. Three columns do not depend on that;
they are the daemon's processor time: `wait` is how long the neighbour and its caller waited for the
daemon to look at them, 99 of 100 times at most, and `turn` how long its turns took that served the
attacker.
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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.attack.hostile import ATTACKS, CONTROLS
from tests.attack.stream_user import TARGET, using_streams
from tests.rig import end_process, rig_directory, wait_until
from tests.rig.compute import ROOT
from tests.rig.ending import end_on_signals
from tests.rig.undriven import UndrivenHost
from vchan.client import Client
from vchan.errors import RequestError, VchanError

NEIGHBOUR = "good"
WAIT_S = 60.0
CALL_S = 30.0
PAUSE_S = 0.002
"""Between the neighbour's calls: it shall not be the load itself."""
TICK_S = os.sysconf("SC_CLK_TCK")
POLICY = f"""
listen,reply  any  agent    allow
listen,reply  any  t*       allow
call,cast     any  nobody   allow
call,cast     any  control  allow
forward       any  {TARGET}   allow
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
    "streams_reset",
    "dropped",
    "topics_over_limit",
    "backlog_bytes",
)
"""What the daemon says of a VM, of what may have become of an attack."""


def percentile(values: Sequence[float], part: float) -> float:
    """So large a part of the values is not larger; 0.0 if there are none."""
    ordered = sorted(values)
    return ordered[max(0, int(len(ordered) * part) - 1)] if ordered else 0.0


class Cost(NamedTuple):
    """What some stretches of time were like.

    Attributes:
        calls_ms: The neighbour's, of each how long it took.
        failed: Of them.
        cpu: Of one core, the daemon's share.
        rss_kib: The daemon's, at the end.
        waits_us: How long the daemon was busy otherwise when the neighbour or its caller wanted it.
        turns_us: How long each of its turns took that served the attacker. Both are its processor's
            time.
    """

    calls_ms: Sequence[float]
    failed: int
    cpu: float
    rss_kib: int
    waits_us: Sequence[float] = ()
    turns_us: Sequence[float] = ()

    @property
    def p50_ms(self) -> float:
        """Of the neighbour's calls."""
        return percentile(self.calls_ms, 0.5)

    @property
    def p99_ms(self) -> float:
        """Of the neighbour's calls."""
        return percentile(self.calls_ms, 0.99)


def together(costs: Sequence[Cost]) -> Cost:
    """All rounds as one."""
    return Cost(
        [ms for cost in costs for ms in cost.calls_ms],
        sum(cost.failed for cost in costs),
        statistics.mean(cost.cpu for cost in costs),
        max(cost.rss_kib for cost in costs),
        [us for cost in costs for us in cost.waits_us],
        [us for cost in costs for us in cost.turns_us],
    )


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
        attacks: The names of these VMs.
        options: Further lines for the daemon's [vchan].
    """

    def __init__(self, directory: Path, attacks: Sequence[str], *, options: Sequence[str] = ()):
        self._directory = directory
        self.host = UndrivenHost(
            directory / "h", [NEIGHBOUR, *attacks], policy=POLICY, options=options
        )
        self.host.daemon.program = (sys.executable, "-m", "tests.attack.timed_host")
        self._times = directory / "h" / "vchan.conf.times"
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

    def go_first(self) -> None:
        """Daemon, neighbour and caller run before everything else on this machine."""
        assert self._neighbour is not None
        policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK  # no attacker inherits it
        with contextlib.suppress(PermissionError):
            for pid in (self.host.daemon.pid, self._neighbour.pid, os.getpid()):
                for thread in Path(f"/proc/{pid}/task").iterdir():  # a client works on its own
                    os.sched_setscheduler(int(thread.name), policy, os.sched_param(1))

    def measure(self, seconds: float, attacker: str = "") -> Cost:
        """Call the neighbour for so long.

        Args:
            attacker: The VM that attacks meanwhile.
        """
        took_ms: list[float] = []
        failed = 0
        if not attacker:  # its first moments count
            self._read_times()
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
        cpu = (self._cpu_s() - began_cpu) / lasted_s
        times = self._read_times()
        ours = (str(self.host.vms[NEIGHBOUR].path), str(self.host.daemon.socket))
        theirs = str(self.host.vms[attacker].path) if attacker else ""
        return Cost(
            took_ms,
            failed,
            cpu,
            self.memory_kib("VmRSS"),
            [us for path in ours for us in times["waits"].get(path, ())],
            times["turns"].get(theirs, ()),
        )

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
        self._read_times()
        self._reset_peak()
        rss_before = self.memory_kib("VmRSS")
        channel = self._channels[vm].fileno()
        command = ["nice", "-n", "19", sys.executable, "-m", "tests.attack.hostile"]
        with subprocess.Popen(
            [*command, f"fd:{channel}", name, str(seconds + WAIT_S), word],
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
                with self._provoking(name, vm):
                    during = self.measure(seconds, vm)
                status = self.host.daemon.status(vm)
                attacker.terminate()
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

    @contextlib.contextmanager
    def _provoking(self, name: str, vm: str) -> Iterator[None]:
        """Some attackers wait to be asked, once or all the while."""
        if name == "taken_streams":
            self.host.daemon.wait_ready(vm)
            with using_streams(str(self.host.daemon.socket), vm):
                yield
        else:
            self._provoke(name, vm)
            yield

    def _provoke(self, name: str, vm: str) -> None:
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
    parser.add_argument("--seconds", type=float, default=3.0, help="of each attack [3]")
    parser.add_argument("--rounds", type=int, default=3, help="of each attack [3]")
    parser.add_argument("attacks", nargs="*", help="[all]")
    options = parser.parse_args(arguments)
    print(HEAD)
    with rig_directory() as directory:
        for row in measure(
            directory, seconds=options.seconds, rounds=options.rounds, names=options.attacks
        ):
            print(line(row), flush=True)
    return 0


def measure(
    directory: Path, *, seconds: float, rounds: int, names: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Attack. Yields a row of the table for each attack, and one for none.

    Args:
        seconds: Of each attack in each round, and before it.
        names: By default all.
    """
    names = [*CONTROLS, *(names or ATTACKS)]
    vms = {name: [f"{name}.{number}" for number in range(rounds)] for name in names}
    everyone = [vm for vm_names in vms.values() for vm in vm_names]
    with Scene(directory, everyone) as scene:
        scene.go_first()
        scene.measure(2.0)  # until it is warm
        measured = [(scene.measure(seconds), scene.measure(seconds)) for _ in range(rounds)]
        before, during = zip(*measured, strict=True)
        yield _row("none", together(before), together(during))
        for name in names:
            word = word_for(scene, name)
            results = [scene.attack(name, seconds, vm=vm, word=word) for vm in vms[name]]
            yield _row_of(results)


def word_for(scene: Scene, name: str) -> str:
    """What an attack is about."""
    if name == "topic_squatting":
        return scene.host.vms[NEIGHBOUR].uuid
    return os.urandom(16).hex() if name == "replies_for_others" else ""


def _row(name: str, before: Cost, during: Cost) -> dict[str, Any]:
    return {
        "attack": name,
        "p50_ms": [before.p50_ms, during.p50_ms],
        "p99_ms": [before.p99_ms, during.p99_ms],
        "wait_p99_us": [percentile(cost.waits_us, 0.99) for cost in (before, during)],
        "cpu": during.cpu,
        "turn_p99_us": percentile(during.turns_us, 0.99),
        "turn_max_us": max(during.turns_us, default=0.0),
        "rss_mib": 0.0,
        "failed": before.failed + during.failed,
        "sent_mib": 0.0,
        "outcome": {},
    }


def _row_of(results: Sequence[Result]) -> dict[str, Any]:
    """All rounds of one attack."""
    row = _row(
        results[0].name,
        together([result.before for result in results]),
        together([result.during for result in results]),
    )
    outcome = Counter[str]()
    for result in results:
        outcome.update(result.outcome)
    sent = sum(result.attacker.get("bytes_sent", 0) for result in results)
    return row | {
        "rss_mib": max(result.rss_peak_kib for result in results) / 1024,
        "failed": row["failed"] + sum(result.after_failed for result in results),
        "sent_mib": sent / 2**20,
        "outcome": dict(outcome),
    }


HEAD = (
    f"{'attack':22}{'p50 ms':>14}{'p99 ms':>17}{'':>6}{'wait p99 us':>14}{'CPU':>6}"
    f"{'turn p99':>10}{'max us':>8}{'RSS MiB':>9}{'failed':>7}  outcome"
)


def line(row: Mapping[str, Any]) -> str:
    """A line of the table."""
    p50, p99, wait = row["p50_ms"], row["p99_ms"], row["wait_p99_us"]
    outcome = ", ".join(f"{key} {value}" for key, value in row["outcome"].items())
    return (
        f"{row['attack']:22}{p50[0]:>6.2f} ->{p50[1]:>5.2f}{p99[0]:>8.2f} ->{p99[1]:>6.2f}"
        f"{p99[1] / p99[0] - 1:>+6.0%}{wait[0]:>7.0f} ->{wait[1]:>4.0f}{row['cpu']:>6.0%}"
        f"{row['turn_p99_us']:>10.0f}{row['turn_max_us']:>8.0f}{row['rss_mib']:>9.1f}"
        f"{row['failed']:>7}  {row['sent_mib']:.1f} MiB sent; {outcome or 'nothing'}"
    )


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
