"""A control-plane service: unmodified oslo.messaging code that agents in VMs call and cast to.

    python -m tests.rig.control_service --url rabbit://... --topic TOPIC

Prints a line when it serves. Runs until its standard input ends, then prints what it ran as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.rig import RigError

ROOT = Path(__file__).resolve().parents[2]
SERVER = "controller"
END_S = 120.0
STALL_S = 30.0
"""What has not come although nothing else has for so long does not come."""
QUIET_S = 1.0
"""The same, if nobody says how much is to come."""


@dataclass(frozen=True)
class Ran:
    """One execution: the number, whether it was marked as perhaps a copy, and for whom."""

    number: int
    redelivered: bool
    instance_uuid: str
    keys: list[str]


class OddError(Exception):
    """Of this module alone."""


class Endpoint:
    """Notes everything."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ran: dict[str, list[tuple[int, bool, str, list[str]]]] = {}

    def note(self, context: dict[str, Any], sender: str, number: int, payload: str = "") -> None:
        """For casts."""
        entry = (
            number,
            bool(context.get("vchan_redelivered")),
            str(context.get("vchan_instance_uuid")),
            sorted(context),
        )
        with self.lock:
            self.ran.setdefault(sender, []).append(entry)

    def wait_for(self, expected: dict[str, int]) -> None:
        """Until so many different ones have run for each sender, or it does not get on."""
        count, since_s = -1, time.monotonic()
        while time.monotonic() - since_s < (STALL_S if expected else QUIET_S):
            with self.lock:
                ran = {sender: {entry[0] for entry in each} for sender, each in self.ran.items()}
                now = sum(map(len, self.ran.values()))
            if expected and all(len(ran.get(name, ())) >= n for name, n in expected.items()):
                return
            if now != count:
                count, since_s = now, time.monotonic()
            time.sleep(0.05)

    def echo(
        self, context: dict[str, Any], sender: str, number: int, payload: str = ""
    ) -> list[Any]:
        """For calls."""
        self.note(context, sender, number)
        return [sender, number, payload]

    def slow(self, context: dict[str, Any], sender: str, number: int, seconds: float) -> list[Any]:
        """For calls that take a while."""
        self.note(context, sender, number)
        time.sleep(seconds)
        return [sender, number]

    def large(self, context: dict[str, Any], size: int) -> str:
        """For large answers."""
        return "x" * size

    def fail(self, context: dict[str, Any], text: str) -> None:
        """For exceptions."""
        raise ValueError(text)

    def fail_oddly(self, context: dict[str, Any], text: str) -> None:
        """For exceptions that nobody else has."""
        raise OddError(text)


def main() -> None:
    """Serve until standard input ends; what it says is how much is still to run, by sender."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oslo's own deprecations
        import oslo_messaging
        from oslo_config import cfg
    conf = cfg.CONF
    conf([])
    transport = oslo_messaging.get_rpc_transport(conf, url=options.url)
    target = oslo_messaging.Target(topic=options.topic, server=SERVER)
    endpoint = Endpoint()
    server = oslo_messaging.get_rpc_server(transport, target, [endpoint], executor="threading")
    server.start()
    print(json.dumps({"serving": options.topic}), flush=True)
    # What was sent is with the broker when its sender is told so, and may not have run here yet.
    endpoint.wait_for(json.loads(sys.stdin.read() or "{}"))
    server.stop()
    server.wait()
    with endpoint.lock:
        print(json.dumps({"ran": endpoint.ran}), flush=True)


class ControlService:
    """The process."""

    def __init__(self, url: str, topic: str, log: Path) -> None:
        self._command = [sys.executable, "-m", "tests.rig.control_service"]
        self._command += ["--url", url, "--topic", topic]
        self._log = log
        self.ran: dict[str, list[Ran]] = {}

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        if "serving" not in self._process.stdout.readline():
            raise RigError(f"the service did not start: {self._log.read_text()[-2000:]}")
        return self

    def finish(self, **expected: int) -> dict[str, list[Ran]]:
        """End it, and see what it ran for each sender, in order.

        Args:
            expected: How many different ones are to be waited for, of each sender.
        """
        if self._process.poll() is None:
            out, _ = self._process.communicate(json.dumps(expected), timeout=END_S)
            told = json.loads(out.splitlines()[-1])["ran"]
            self.ran = {sender: [Ran(*entry) for entry in ran] for sender, ran in told.items()}
        return self.ran

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process:  # closes its pipes
            self._process.kill()


if __name__ == "__main__":
    main()
