"""The same programs on this machine, without a guest: what they cost where nothing is emulated."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.bench.peers import AGENT_TOPIC, DAEMON_TOPIC, Vchan
from vchan.bodies import encode_json
from vchan.streams import SocketStream, listen_unix

ROOT = Path(__file__).parents[2]
AGENT = Path(__file__).with_name("in_guest") / "agent.py"
START_TIMEOUT_S = 10.0
CALLS = 2000
IN_FLIGHT = 64
LARGE_BYTES = 64 * 1024
LARGE_COUNT = 256
LARGE_IN_FLIGHT = 8


def measure(directory: Path, body: bytes) -> dict[str, float]:
    """What calls cost between processes of this machine, over unix sockets."""
    channel, agents = str(directory / "channel"), str(directory / "agents")
    daemon = ("-m", "vchan.guest.daemon", "--quiet", "--port", f"unix:{channel}")
    with ExitStack() as stack:
        listener = stack.enter_context(listen_unix(channel, 0o600))
        stack.enter_context(_program(*daemon, "--socket", agents))
        listener.settimeout(START_TIMEOUT_S)
        connected, _ = listener.accept()
        stack.enter_context(_program(str(AGENT), agents))
        vchan = Vchan(SocketStream(connected, channel))
        stack.callback(vchan.close)
        vchan.settle(AGENT_TOPIC)
        result = {}
        for place, topic in (("daemon", DAEMON_TOPIC), ("agent", AGENT_TOPIC)):
            result[f"{place}_p50_us"] = _p50_us(partial(vchan.call, topic, body))
            taken_s = _taken_s(partial(vchan.flood, topic, body, CALLS, IN_FLIGHT))
            result[f"{place}_rate_{IN_FLIGHT}"] = CALLS / taken_s
        for way, method, args in (
            ("to", "take", {"data": "x" * LARGE_BYTES}),
            ("from", "give", {"size": LARGE_BYTES}),
        ):
            large = encode_json({"method": method, "args": args})
            flood = partial(vchan.flood, AGENT_TOPIC, large, LARGE_COUNT, LARGE_IN_FLIGHT)
            result[f"{way}_agent_mbs"] = LARGE_COUNT * LARGE_BYTES / _taken_s(flood) / 1e6
        return result


@contextmanager
def _program(*arguments: str) -> Iterator[None]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *arguments], env=environment)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _p50_us(action: Callable[[], object]) -> float:
    return statistics.median(_taken_s(action) for _ in range(CALLS)) * 1e6


def _taken_s(action: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s
