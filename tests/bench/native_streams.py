"""Byte streams, and calls beside them, with both daemons on this machine and no guest between.

What is emulated in the other measurement is native here: a guest under KVM should be nearer to
this. Two VMs are two guest's daemons, each at the other end of a unix socket, with an agent and a
server beside it. CPU is what the kernel accounts to each process: other load disturbs it least.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tests.bench.machine import IN_GUEST
from tests.bench.native import cpu_us
from tests.bench.peers import AGENT_TOPIC, RawChannel
from tests.bench.streams import (
    ALONE,
    BESIDE,
    NEIGHBOUR,
    OTHERS_FROM,
    OTHERS_TO,
    OWN_FROM,
    OWN_TO,
    P99_AIM,
    PAD,
    POLICY,
    TCP_FROM,
    TCP_TO,
    VM,
    Load,
    percentile,
)
from tests.rig import tail, wait_until
from tests.rig.forwarding import Part, connect
from tests.rig.ports import claim_ports
from vchan.client import Client
from vchan.errors import VchanError

WAIT_S: Final = 60.0
UNLIMITED: Final = "limit any bytes_per_s=1G messages_per_s=1000000 frames_per_s=1000000\n"
"""So a stream from a VM is as fast as it can be; beside the calls the usual limits hold."""
SPEEDS: Final = {"take": "to the guest", "give": "from the guest"}
PARTS: Final = ("host", f"guest-{VM}", f"forward-{VM}", f"server-{VM}")
TITLES: Final = BESIDE | {
    TCP_TO: "plain TCP to the same server",
    TCP_FROM: "plain TCP from the same server",
}
AGENT: Final = f"import sys; sys.path.insert(0, {str(IN_GUEST)!r}); import agent; agent.main()"

Samples = dict[str, dict[str, list[float]]]


class World:
    """Both VMs, each with a forward to its server.

    Attributes:
        ways: By the VM's name, where its server is reached through vchan.
        ports: The same, where it listens.
    """

    def __init__(self, directory: Path, policy: str) -> None:
        self.parts: dict[str, Part] = {}
        self.ways: dict[str, str] = {}
        self.ports = dict(zip((VM, NEIGHBOUR), claim_ports(2), strict=True))
        self._directory = directory
        self._socket = directory / "host.sock"
        self._policy = policy
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> World:
        with self._exit:
            self._start("host", "-m", "vchan.host.daemon", "--config-file", str(self._config()))
            for name, port in self.ports.items():
                self._start_guest(name, port)
            self._wait_for(self._socket)
            self.client = self._exit.enter_context(Client(str(self._socket)))
            wait_until(
                self._are_served,
                timeout_s=WAIT_S,
                interval_s=0.1,
                failure=lambda: f"nobody serves: {tail(self.parts['host'].log)}",
            )
            for name, port in self.ports.items():
                words = ("-m", "vchan.cli", "--socket", str(self._socket), "forward", name)
                line = self._start(f"forward-{name}", *words, f"0:{port}").wait_out()
                self.ways[name] = line.partition(" -> ")[0]
            self._exit = self._exit.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _start(self, name: str, *words: str) -> Part:
        part = self.parts[name] = Part(self._directory, name, *words)
        self._exit.callback(part.stop)
        return part.start()

    def _start_guest(self, name: str, port: int) -> None:
        agents = self._directory / f"{name}.sock"
        words = ("--port", f"listen:{self._channel(name)}", "--socket", str(agents))
        forward = ("--forward", f"tcp:{port}", "--quiet")
        self._start(f"guest-{name}", "-m", "vchan.guest.daemon", *words, *forward)
        self._start(f"server-{name}", str(IN_GUEST / "stream_server.py"), str(port))
        self._wait_for(agents)
        self._start(f"agent-{name}", "-c", AGENT, str(agents))

    def _channel(self, name: str) -> Path:
        return self._directory / f"{name}.channel"

    def _config(self) -> Path:
        policy = self._directory / "policy.d" / "50-bench.policy"
        policy.parent.mkdir()
        policy.write_text(self._policy)
        channels = ",".join(f"{name}=connect:{self._channel(name)}" for name in self.ports)
        config = self._directory / "vchan.conf"
        config.write_text(
            f"[vchan]\nhost = bench\nlibvirt_uri =\nsocket = {self._socket}\n"
            f"policy_dir = {policy.parent}\naudit_log = {self._directory / 'audit'}\n"
            f"channels = {channels}\n"
        )
        return config

    def _wait_for(self, path: Path) -> None:
        failure = lambda: f"no {path}"  # noqa: E731
        wait_until(path.exists, timeout_s=WAIT_S, interval_s=0.05, failure=failure)

    def _are_served(self) -> bool:
        try:
            rows = self.client.call("vchan.host", "list", timeout_s=10)
        except VchanError:
            return False
        return all(f"openstack/{AGENT_TOPIC}" in row["topics"] for row in rows)

    def cpu_ms(self) -> dict[str, float]:
        """By part, since its start."""
        spent = {}
        for name in PARTS:
            process = self.parts[name].process
            assert process is not None
            spent[name] = cpu_us((process.pid,)) / 1000
        return spent


def _measure_speed(world: World, samples: Samples, size: int) -> None:
    """And what a MiB costs each process."""
    with contextlib.closing(connect(world.ways[VM])) as connected:
        channel = RawChannel(connected)
        for verb in SPEEDS:
            before, began_s = world.cpu_ms(), time.perf_counter()
            channel.take(size) if verb == "take" else channel.give(size)
            took_s, after = time.perf_counter() - began_s, world.cpu_ms()
            samples[verb]["mbs"].append(size / took_s / 1e6)
            for name in PARTS:
                samples[verb][name].append((after[name] - before[name]) / (size >> 20))


def _measure_calls(world: World, samples: Samples, calls: int) -> None:
    own = f"127.0.0.1:{world.ports[VM]}"
    for name, way, verb in (
        (ALONE, "", ""),
        (OWN_TO, world.ways[VM], "take"),
        (OWN_FROM, world.ways[VM], "give"),
        (OTHERS_TO, world.ways[NEIGHBOUR], "take"),
        (OTHERS_FROM, world.ways[NEIGHBOUR], "give"),
        (TCP_TO, own, "take"),
        (TCP_FROM, own, "give"),
    ):
        load = Load(way, verb) if way else None
        with load or contextlib.nullcontext():
            samples[name]["us"] += _times_us(world, calls)
        if load is not None:
            samples[name]["mbs"].append(load.mbs)


def _times_us(world: World, calls: int) -> Iterator[float]:
    for _ in range(calls):
        began_s = time.perf_counter()
        world.client.call(AGENT_TOPIC, "ping", {"x": PAD}, server=VM, timeout_s=WAIT_S)
        yield (time.perf_counter() - began_s) * 1e6


def run(directory: Path, *, rounds: int, calls: int, bulk_bytes: int) -> dict[str, Any]:
    """All of it: by what is measured, then by measure."""
    samples: Samples = defaultdict(lambda: defaultdict(list))
    for name, policy in (("limits", POLICY), ("none", POLICY + UNLIMITED)):
        where = directory / name
        where.mkdir()
        with World(where, policy.replace("tcp:8080", "tcp:*")) as world:
            for _ in range(rounds):
                if policy == POLICY:
                    _measure_calls(world, samples, calls)
                else:
                    _measure_speed(world, samples, bulk_bytes)
    return summary(samples)


def summary(samples: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Medians of the rounds; of the calls, percentiles of all rounds together."""
    result: dict[str, Any] = {}
    for name, by_measure in samples.items():
        row = {each: statistics.median(of) for each, of in by_measure.items() if each != "us"}
        for percent in (50, 90, 99) if "us" in by_measure else ():
            row[f"p{percent}_us"] = percentile(by_measure["us"], percent)
        result[name] = row
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result, for people."""
    width = max(map(len, TITLES.values())) + 1
    heads = "".join(f"{title:>12}" for title in ("MB/s", *PARTS))
    lines = ["natively, without a guest: bytes through a forward; CPU ms a MiB of each process"]
    lines.append(" " * width + heads)
    for verb, title in SPEEDS.items():
        row = result[verb]
        cells = "".join(f"{row[name]:>12.1f}" for name in ("mbs", *PARTS))
        lines.append(f"{title:<{width}}{cells}")
    lines += ["", "calls to an agent in the VM, one at a time, beside a stream that is never idle"]
    percents = (50, 90, 99)
    lines.append(" " * width + "".join(f"{f'p{p} us':>11}{'/ alone':>9}" for p in percents))
    alone = result[ALONE]
    for name, title in TITLES.items():
        row = result[name]
        cells = "".join(
            f"{row[f'p{p}_us']:>11.0f}{row[f'p{p}_us'] / alone[f'p{p}_us']:>7.2f} x"
            for p in percents
        )
        speed = f"{row['mbs']:>11.1f} MB/s" if "mbs" in row else ""
        lines.append(f"{title:<{width}}{cells}{speed}")
    ratios = [result[name]["p99_us"] / alone["p99_us"] for name in (OWN_TO, OWN_FROM)]
    said = "met" if max(ratios) <= P99_AIM else "missed"
    lines += ["", f"p99 beside a stream of its own VM at most {P99_AIM:g} x: {said}"]
    before, after = result["load"]
    return "\n".join([*lines, "", f"machine's load: {before:.1f} before, {after:.1f} after"])
