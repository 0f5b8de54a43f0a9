"""What is measured, and in which turns."""

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import codec, native
from tests.bench.machine import (
    ASYNCIO_ECHO,
    C_BULK,
    C_ECHO,
    DAEMON,
    DAEMON_SAYS,
    GUEST_AGENT,
    PYTHON_BULK,
    RELAY_ECHO,
    SELECT_ECHO,
    Machine,
)
from tests.bench.peers import AGENT_TOPIC, DAEMON_TOPIC, GuestAgent, RawChannel, Vchan
from tests.rig.guest_image import PYTHON, VCHAN_PORT
from vchan.io.streams import connect_unix
from vchan.rpc.bodies import encode_json, encode_raw
from vchan.rpc.messages import CALL, RAW

SMALL_BYTES = 64
LARGE_BYTES = 64 * 1024
IN_FLIGHT = (1, 16, 64)
BULK_IN_FLIGHT = 8
FILE = "/tmp/bench.file"
FILE_BYTES = 16 << 20
FILE_CHUNK_BYTES = 1 << 20  # the fastest it has; its own default is 4 KiB

RAW_C, RAW_PYTHON, RAW_ASYNCIO = "raw C", "raw Python", "raw asyncio"
RAW_RELAY = "raw Python, 2 processes"
GA, IN_DAEMON, IN_AGENT = "qemu-ga", "vchan, in the daemon", "vchan, in an agent"

Samples = dict[str, dict[str, list[float]]]


def small_body() -> bytes:
    """A call of `ping` that is SMALL_BYTES long."""
    size = SMALL_BYTES - len(encode_json({"method": "ping", "args": {"x": ""}}))
    return encode_json({"method": "ping", "args": {"x": "x" * size}})


class Suite:
    """Takes measurements in rounds and keeps them by measure and subject.

    Args:
        calls: Round trips per subject and round.
        bulk_bytes: Bytes per bulk transfer.
    """

    def __init__(self, machine: Machine, *, calls: int, bulk_bytes: int) -> None:
        self._machine = machine
        self._calls = calls
        self._bulk_bytes = bulk_bytes
        self.samples: Samples = defaultdict(lambda: defaultdict(list))
        payload = bytes(SMALL_BYTES)
        raw = {
            RAW_C: RawChannel(machine.connect(C_ECHO)),
            RAW_PYTHON: RawChannel(machine.connect(SELECT_ECHO)),
            RAW_ASYNCIO: RawChannel(machine.connect(ASYNCIO_ECHO)),
            RAW_RELAY: RawChannel(machine.connect(RELAY_ECHO)),
        }
        for channel in raw.values():
            channel.settle(payload)
        self._bulk = {
            RAW_C: RawChannel(machine.connect(C_BULK)),
            RAW_PYTHON: RawChannel(machine.connect(PYTHON_BULK)),
        }
        self._ga = GuestAgent(machine.connect(GUEST_AGENT))
        self._ga.ping()
        self._vchan = Vchan(connect_unix(str(machine.guest.port(VCHAN_PORT))))
        self._vchan.settle(AGENT_TOPIC)
        machine.make_file(FILE, FILE_BYTES)
        body = small_body()
        self._round_trips: dict[str, Callable[[], object]] = {
            **{subject: partial(channel.echo, payload) for subject, channel in raw.items()},
            GA: self._ga.ping,
            IN_DAEMON: lambda: self._vchan.call(DAEMON_TOPIC, body),
            IN_AGENT: lambda: self._vchan.call(AGENT_TOPIC, body),
        }
        for action in self._round_trips.values():  # what is done for the first time is slower
            for _ in range(20):
                action()

    def round(self) -> None:
        """Measure everything once, in turns."""
        gc.collect()
        for subject, action in self._round_trips.items():
            self._measure_round_trips(subject, action)
        self._measure_rates()
        self._measure_bulk()

    def _keep(self, measure: str, subject: str, value: float) -> None:
        self.samples[measure][subject].append(value)

    def _measure_round_trips(self, subject: str, action: Callable[[], object]) -> None:
        times_s = []
        cpu_s, clock = self._machine.cpu_s(), time.perf_counter
        for _ in range(self._calls):
            started_s = clock()
            action()
            times_s.append(clock() - started_s)
        times_s.sort()
        self._keep("p50_us", subject, times_s[len(times_s) // 2] * 1e6)
        self._keep("p99_us", subject, times_s[len(times_s) * 99 // 100] * 1e6)
        self._keep("qemu_cpu_us", subject, (self._machine.cpu_s() - cpu_s) / self._calls * 1e6)
        self._keep("rate_1", subject, self._calls / sum(times_s))

    def _measure_rates(self) -> None:
        body = small_body()
        for in_flight in IN_FLIGHT[1:]:
            for subject, topic in ((IN_DAEMON, DAEMON_TOPIC), (IN_AGENT, AGENT_TOPIC)):
                cpu_s, started_s = self._machine.cpu_s(), time.perf_counter()
                count = 2 * self._calls
                self._vchan.flood(topic, body, count, in_flight)
                taken_s = time.perf_counter() - started_s
                self._keep(f"rate_{in_flight}", subject, count / taken_s)
                cpu_us = (self._machine.cpu_s() - cpu_s) / count * 1e6
                self._keep(f"qemu_cpu_us_{in_flight}", subject, cpu_us)

    def _measure_bulk(self) -> None:
        size, count = self._bulk_bytes, self._bulk_bytes // LARGE_BYTES
        for subject, channel in self._bulk.items():
            self._keep_speed("to_guest_mbs", subject, size, partial(channel.take, size))
            self._keep_speed("from_guest_mbs", subject, size, partial(channel.give, size))
        large = "x" * LARGE_BYTES
        body = encode_json({"method": "ping", "args": {"x": large}})
        self._flood_speed("to_guest_mbs", IN_DAEMON, DAEMON_TOPIC, body, count, flags=0)
        body = encode_json({"method": "take", "args": {"data": large}})
        self._flood_speed("to_guest_mbs", IN_AGENT, AGENT_TOPIC, body, count)
        body = encode_json({"method": "give", "args": {"size": LARGE_BYTES}})
        self._flood_speed("from_guest_mbs", IN_AGENT, AGENT_TOPIC, body, count)
        body = encode_raw(encode_json({"method": "take_raw", "args": {}}), bytes(LARGE_BYTES))
        self._flood_speed("raw_to_guest_mbs", IN_AGENT, AGENT_TOPIC, body, count, CALL | RAW)
        body = encode_raw(encode_json({"method": "give_raw", "args": {"size": LARGE_BYTES}}), b"")
        self._flood_speed("raw_from_guest_mbs", IN_AGENT, AGENT_TOPIC, body, count, CALL | RAW)
        self._keep_speed(
            "from_guest_mbs", GA, FILE_BYTES, lambda: self._ga.read_file(FILE, FILE_CHUNK_BYTES)
        )

    def _flood_speed(
        self, measure: str, subject: str, topic: str, body: bytes, count: int, flags: int = CALL
    ) -> None:
        self._keep_speed(
            measure,
            subject,
            count * LARGE_BYTES,
            lambda: self._vchan.flood(topic, body, count, BULK_IN_FLIGHT, flags),
        )

    def _keep_speed(
        self, measure: str, subject: str, size: int, action: Callable[[], object]
    ) -> None:
        started_s = time.perf_counter()
        action()
        self._keep(measure, subject, size / (time.perf_counter() - started_s) / 1e6)

    def start(self) -> None:
        """Measure each program's start once."""
        machine = self._machine
        command = f"{PYTHON} -I -S /bench/first_byte.py {{port}}"
        self._keep("start_ms", RAW_PYTHON, machine.start_ms(command, b"."))
        command = "qemu-ga -m virtio-serial -p {port} -f /run -t /run"
        ask = b'{"execute":"guest-ping"}\n'
        self._keep("start_ms", GA, machine.start_ms(command, b"return", ask))
        command = f"{DAEMON} --port virtio:{{port}} --socket /run/second.sock"
        self._keep("start_ms", IN_DAEMON, machine.start_ms(command, DAEMON_SAYS))

    def medians(self) -> dict[str, dict[str, float]]:
        """By measure and subject, over the rounds."""
        return {
            measure: {subject: statistics.median(values) for subject, values in by_subject.items()}
            for measure, by_subject in self.samples.items()
        }

    def memory_mib(self) -> dict[str, float]:
        """The resident memory of the services that have some of their own."""
        services = {GA: "qemu-ga", IN_DAEMON: "vchan-guest", IN_AGENT: "agent"}
        return {subject: self._machine.memory_mib(name) for subject, name in services.items()}

    def close(self) -> None:
        """Hang up."""
        self._vchan.close()


def run(
    machine: Machine, directory: Path, *, rounds: int, calls: int, bulk_bytes: int
) -> dict[str, Any]:
    """All of it: medians by measure and subject."""
    suite = Suite(machine, calls=calls, bulk_bytes=bulk_bytes)
    ready = suite.memory_mib()
    for number in range(rounds):
        suite.round()
        if number % 2 == 0:
            suite.start()
    result: dict[str, Any] = dict(suite.medians())
    result["rss_mib"] = ready
    result["rss_after_mib"] = suite.memory_mib()
    suite.close()
    result["frame_us"] = codec.measure()
    result["native"] = native.measure(directory, small_body())
    return result


def load() -> float:
    """The machine's load average: what else ran."""
    return float(Path("/proc/loadavg").read_text().split()[0])
