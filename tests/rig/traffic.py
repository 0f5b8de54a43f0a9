"""A control-plane service: unmodified oslo.messaging code that calls and casts to a VM's agent.

    python -m tests.rig.traffic --url rabbit://... --server VM_UUID --topic TOPIC

Runs until its standard input ends, then asks the agent what it ran, and prints a `Report` as JSON.
While it runs it prints lines of progress, also as JSON. Times are CLOCK_MONOTONIC's, the
same for every process of the machine.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from tests.rig import RigError

ROOT = Path(__file__).resolve().parents[2]
LOT = 2000
DRAIN_S = 70.0
QUIET_S = 30.0
BEHIND_S = 15.0
"""When a call has waited so long, casts wait, too ..."""
CAUGHT_UP_S = 2.0
"""... until one is answered so soon: on a machine that is slow just now they come faster than a
guest runs them, and every call stands behind them."""


@dataclass
class Report:
    """What was sent, what came back, and what the agent says it ran."""

    calls_sent: int = 0
    calls_answered: int = 0
    calls_failed: list[str] = field(default_factory=list)
    casts_sent: int = 0
    casts_executed: int = 0
    fanouts_sent: int = 0
    fanouts_executed: int = 0
    lost: int = 0
    casts_lost: list[int] = field(default_factory=list)
    duplicated: int = 0
    reordered: int = 0
    wrong_answers: int = 0
    answers_s: list[float] = field(default_factory=list)
    round_trips_s: list[float] = field(default_factory=list)

    def check(self) -> None:
        """Everything that was sent ran once and in order, and every call was answered."""
        assert self.calls_failed == [], self.calls_failed[:5]
        assert (self.lost, self.duplicated, self.reordered, self.wrong_answers) == (0, 0, 0, 0), (
            self.brief()
        )
        assert self.calls_answered == self.calls_sent > 0, self.brief()
        assert self.casts_executed == self.casts_sent, self.brief()
        assert self.fanouts_executed == self.fanouts_sent, self.brief()

    def brief(self) -> str:
        """The counts, without the long lists."""
        return repr(replace(self, answers_s=[], round_trips_s=[]))


class Traffic:
    """The threads of a service."""

    def __init__(self, options: argparse.Namespace) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oslo's own deprecations
            import oslo_messaging
            from oslo_config import cfg
        conf = cfg.CONF
        conf([])
        self._oslo = oslo_messaging
        transport = oslo_messaging.get_rpc_transport(conf, url=options.url)
        target = oslo_messaging.Target(topic=options.topic)
        self._client = oslo_messaging.get_rpc_client(transport, target)
        self._options = options
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._sent: dict[str, list[int]] = {}
        self._answered: dict[str, list[int]] = {}
        self._asked_s: dict[str, float] = {}  # since when a call waits, by sender
        self._is_behind = False
        self.report = Report()

    def run(self) -> Report:
        """Everything, to the end."""
        options = self._options
        threads = [
            threading.Thread(target=self._call, args=(f"{options.name}caller{n}",))
            for n in range(options.callers)
        ]
        if options.casts_per_s:
            threads.append(
                threading.Thread(target=self._cast, args=(f"{options.name}caster", False))
            )
        if options.fanouts_per_s:
            threads.append(
                threading.Thread(target=self._cast, args=(f"{options.name}fanner", True))
            )
        for thread in threads:
            thread.start()
        progress = threading.Thread(target=self._progress, daemon=True)
        progress.start()
        sys.stdin.read()
        self._stop.set()
        for thread in threads:
            thread.join()
        self._compare()
        return self.report

    def _call(self, sender: str) -> None:
        options = self._options
        client = self._client.prepare(server=options.server, timeout=options.call_timeout)
        payload = "x" * options.payload
        report = self.report
        number = 0
        while not self._stop.is_set():
            number += 1
            self._sent.setdefault(sender, []).append(number)
            start_s = self._asked_s[sender] = time.monotonic()
            try:
                answer = client.call({}, "echo", sender=sender, number=number, payload=payload)
            except self._oslo.MessagingException as error:
                with self._lock:
                    report.calls_sent += 1
                    report.calls_failed.append(f"{sender} {number}: {error!r}"[:300])
                continue
            finally:
                self._asked_s.pop(sender)
            end_s = time.monotonic()
            self._is_behind = self._is_behind and end_s - start_s > CAUGHT_UP_S
            with self._lock:
                report.calls_sent += 1
                report.calls_answered += 1
                report.wrong_answers += answer != [sender, number, payload]
                report.answers_s.append(end_s)
                report.round_trips_s.append(end_s - start_s)
            self._stop.wait(options.call_pause)

    def _cast(self, sender: str, fanout: bool) -> None:
        options = self._options
        if fanout:
            client = self._client.prepare(fanout=True)
            pause_s = 1 / options.fanouts_per_s
        else:
            client = self._client.prepare(server=options.server)
            pause_s = 1 / options.casts_per_s
        number = 0
        next_s = time.monotonic()
        while not self._stop.is_set():
            if self._must_wait():
                self._stop.wait(0.1)
                continue
            number += 1
            client.cast({}, "note", sender=sender, number=number)
            self._sent.setdefault(sender, []).append(number)
            with self._lock:
                if fanout:
                    self.report.fanouts_sent += 1
                else:
                    self.report.casts_sent += 1
            next_s = max(next_s + pause_s, time.monotonic() - 1.0)
            self._stop.wait(max(0.0, next_s - time.monotonic()))

    def _must_wait(self) -> bool:
        oldest_s = min(list(self._asked_s.values()), default=float("inf"))
        self._is_behind = self._is_behind or time.monotonic() - oldest_s > BEHIND_S
        return self._is_behind

    def _progress(self) -> None:
        while not self._stop.wait(self._options.progress_s):
            with self._lock:
                line = {
                    "calls_sent": self.report.calls_sent,
                    "calls_answered": self.report.calls_answered,
                    "calls_failed": len(self.report.calls_failed),
                    "casts_sent": self.report.casts_sent,
                }
            print(json.dumps({"progress": line}), flush=True)

    def _compare(self) -> None:
        """Hold what the agent ran against what was sent."""
        report = self.report
        for sender, sent in self._sent.items():
            # Calls are over, one way or another; casts may be on their way.
            ran = self._wait_for(sender, 0 if "caller" in sender else len(sent))
            times = Counter(ran)
            missing = [number for number in sent if number not in times]
            report.duplicated += sum(count - 1 for count in times.values())
            order = list(dict.fromkeys(ran))
            report.reordered += sum(1 for a, b in pairwise(order) if b < a)
            if sender.endswith("caster"):
                report.casts_executed = len(times)
                report.casts_lost = missing
                report.lost += len(missing)
            elif sender.endswith("fanner"):
                report.fanouts_executed = len(times)
                report.lost += len(missing)
        report.lost += report.calls_sent - report.calls_answered

    def _wait_for(self, sender: str, count: int) -> list[int]:
        """What the agent ran for a sender, once it has run `count` or stopped getting on."""
        ran: list[int] = []
        deadline_s = time.monotonic() + DRAIN_S
        quiet_until_s = time.monotonic() + QUIET_S
        while time.monotonic() < min(deadline_s, quiet_until_s):
            more = self._executed(sender, len(ran))
            ran += more
            if more:
                quiet_until_s = time.monotonic() + QUIET_S
            elif len(set(ran)) >= count:
                break
            else:
                time.sleep(0.2)
        return ran

    def _executed(self, sender: str, start: int) -> list[int]:
        client = self._client.prepare(server=self._options.server, timeout=60)
        lot: list[int] = client.call({}, "executed", sender=sender, start=start, count=LOT)
        return lot


class TrafficProcess:
    """The program above, as a process.

    Args:
        on_progress: Told each line of progress.
    """

    def __init__(self, url: str, server: str, topic: str, log: Path, **options: Any) -> None:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self._log = log
        self.name = str(options.get("name", ""))
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.rig.traffic", "--url", url),
                    *("--server", server, "--topic", topic, *words),
                ],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.progress: dict[str, int] = {}
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            value = json.loads(line)
            if "progress" in value:
                self.progress = value["progress"]
            else:
                self._lines.append(line)

    def wait_for(self, what: str, at_least: int, timeout_s: float = 60.0) -> None:
        """Wait until a count of the progress has come so far."""
        deadline_s = time.monotonic() + timeout_s
        while self.progress.get(what, 0) < at_least:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RigError(f"{what} stays at {self.progress}: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)

    def flows(self, calls: int = 20, timeout_s: float = 90.0) -> None:
        """Wait until so many more calls were answered than have been by now."""
        self.wait_for("calls_answered", self.progress.get("calls_answered", 0) + calls, timeout_s)

    def finish(self, timeout_s: float = 240.0) -> Report:
        """End the traffic and count."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        finally:
            self.kill()
        if not self._lines:
            raise RigError(f"no report: {self._log.read_text()[-3000:]}")
        return Report(**json.loads(self._lines[-1]))

    def kill(self) -> None:
        """End the process, if it runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--name", default="", help="tells senders of one agent's apart")
    parser.add_argument("--progress-s", type=float, default=1.0)
    parser.add_argument("--callers", type=int, default=2)
    parser.add_argument("--call-pause", type=float, default=0.01)
    parser.add_argument("--call-timeout", type=int, default=60)
    parser.add_argument("--casts-per-s", type=float, default=50)
    parser.add_argument("--fanouts-per-s", type=float, default=0)
    parser.add_argument("--payload", type=int, default=64)
    traffic = Traffic(parser.parse_args())
    print(json.dumps(asdict(traffic.run())), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
