"""The counting agent, as a stock oslo.messaging RPC server on any transport.

    python -m tests.rig.counting_server --url URL --topic TOPIC --server NAME [--journal FILE]

Prints a line when it serves; runs until its standard input ends. What is marked as perhaps a copy,
and is one, is not counted again, as a service does that looks at the mark.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.rig import RigError

ROOT = Path(__file__).resolve().parents[2]
REDELIVERED = "vchan_redelivered"


class Endpoint:
    """As `tests.rig.counting_agent.Counting`, with oslo.messaging's context in front."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ran: dict[str, list[int]] = {}
        self._contexts: dict[str, dict[str, Any]] = {}
        self._copies = 0

    def note(self, context: dict[str, Any], sender: str, number: int, payload: str = "") -> None:
        """For casts."""
        with self._lock:
            ran = self._ran.setdefault(sender, [])
            if context.get(REDELIVERED) and number in ran:
                self._copies += 1
            else:
                ran.append(number)
            self._contexts[sender] = context

    def echo(
        self, context: dict[str, Any], sender: str, number: int, payload: str = ""
    ) -> list[object]:
        """For calls."""
        self.note(context, sender, number)
        return [sender, number, payload]

    def executed(self, context: dict[str, Any], sender: str, start: int, count: int) -> list[int]:
        """A part of what ran for a sender, in the order it ran."""
        with self._lock:
            return self._ran.get(sender, [])[start : start + count]

    def fail(self, context: dict[str, Any], text: str) -> None:
        """For exceptions."""
        raise ValueError(text)

    def facts(self, context: dict[str, Any], sender: str) -> dict[str, Any]:
        """How many marked copies there were, and a sender's last context."""
        with self._lock:
            return {"copies": self._copies, "context": self._contexts.get(sender, {})}


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--server", required=True)
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oslo's own deprecations
        import oslo_messaging
        from oslo_config import cfg
    conf = cfg.CONF
    conf([])
    transport = oslo_messaging.get_rpc_transport(conf, url=options.url)
    target = oslo_messaging.Target(topic=options.topic, server=options.server)
    server = oslo_messaging.get_rpc_server(transport, target, [Endpoint()], executor="threading")
    # One at a time: with more, what runs when is the threads' business.
    conf.set_override("executor_thread_pool_size", 1)
    server.start()
    print(json.dumps({"serving": options.topic}), flush=True)
    sys.stdin.read()
    server.stop()
    server.wait()


class CountingServer:
    """The process."""

    def __init__(self, url: str, topic: str, server: str, log: Path) -> None:
        self._command = [sys.executable, "-m", "tests.rig.counting_server"]
        self._command += ["--url", url, "--topic", topic, "--server", server]
        self._log = log

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
            raise RigError(f"the server did not start: {self._log.read_text()[-2000:]}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


if __name__ == "__main__":
    main()
