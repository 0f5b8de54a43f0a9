"""Byte streams into a guest beside what else moves bytes there, and calls beside byte streams.

Two equal guests at one host's daemon: one that is measured, and its neighbour. In the first also a
raw virtio-serial port, qemu-ga, and a network card on QEMU's user network, over which the same
server is reached by plain TCP and through ssh's forwarding.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO, Any, Final

from tests.bench.machine import (
    DAEMON,
    DAEMON_SCRIPT,
    GUEST_AGENT,
    IN_GUEST,
    PORTS,
    PYTHON_BULK,
    SELECT_ECHO,
)
from tests.bench.peers import AGENT_TOPIC, READY_TIMEOUT_S, GuestAgent, RawChannel
from tests.rig import Account, RigError, end_process, ssh, tail, wait_until
from tests.rig.forwarding import ROOT, Part, connect
from tests.rig.guest import GuestSpec, QemuGuest
from tests.rig.guest_image import NETWORK_UP, PYTHON, VCHAN_PORT, Service, build
from tests.rig.ports import claim_ports
from vchan.client import Client
from vchan.errors import VchanError

VM: Final = "vm"
NEIGHBOUR: Final = "neighbour"
PORT: Final = 8080
MEMORY_MIB: Final = 384
"""More than other guests have: files that are copied lie in memory."""
ECHO_BYTES: Final = 64
FILE: Final = "/tmp/bench.file"
FILE_CHUNK_BYTES: Final = 1 << 20
NOTHING: Final = Path(os.devnull)
PAD: Final = "x" * 40
"""What a call of `ping` has with it, so that it is as large as an echo."""
POLICY: Final = f"""
listen,reply any any allow
call,cast any control allow
forward any tcp:{PORT} allow
forward any service:files allow
"""
FILE_RULES: Final = """
[read]
allow = ["/tmp/**"]
[write]
allow = ["/tmp/**"]
"""

SERVICES: Final = (
    Service("vchan-guest", f"{DAEMON} --forward tcp:{PORT},service:files"),
    Service("agent", f"{PYTHON} /bench/agent.py"),
    Service("streams", f"{PYTHON} /bench/stream_server.py {PORT}"),
    Service("files", f"{PYTHON} -m vchan.agents.standard.agent --config /bench/files.toml"),
    Service("python-bulk", f"{PYTHON} /bench/bulk.py {PORTS / PYTHON_BULK}"),
    Service("select-echo", f"{PYTHON} /bench/echo_select.py {PORTS / SELECT_ECHO}"),
    Service("qemu-ga", f"qemu-ga -m virtio-serial -p {PORTS / GUEST_AGENT}"),
    ssh.SERVER,
)
SHARED: Final = 3
"""So many of them run in the neighbour too: the others would poll their ports there."""

RAW, TCP, GA = "raw_port", "tcp_virtio_net", "qemu_ga"
SSH, SSH_CAT = "ssh_virtio_net", "ssh_cat_virtio_net"
FORWARD, CP = "vchan_forward", "vchan_cp"
TITLES: Final = {
    RAW: "raw port, Python",
    TCP: "TCP over virtio-net",
    SSH: "ssh -L over virtio-net",
    SSH_CAT: "ssh cat, the whole command",
    GA: "qemu-ga, file read and ping",
    FORWARD: "vchan forward",
    CP: "vchan cp, the whole command",
}
ALONE = "alone"
OWN_TO, OWN_FROM = "own_stream_to", "own_stream_from"
OTHERS_TO, OTHERS_FROM = "neighbours_stream_to", "neighbours_stream_from"
TCP_TO, TCP_FROM = "own_tcp_to", "own_tcp_from"
BESIDE: Final = {
    ALONE: "nothing else",
    OWN_TO: "a stream to the same VM",
    OWN_FROM: "a stream from the same VM",
    OTHERS_TO: "a stream to a neighbour",
    OTHERS_FROM: "a stream from a neighbour",
    TCP_TO: "TCP over virtio-net to the same VM",
    TCP_FROM: "TCP over virtio-net from the same VM",
}
P99_AIM: Final = 2.0

Samples = dict[str, dict[str, list[float]]]


class World:
    """Two guests, a host's daemon, and the ways to the servers in the guests.

    Attributes:
        ways: By its name in the tables, the address of the guest's server that it ends at.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "host.sock"
        self.guests: dict[str, QemuGuest] = {}
        self.ways: dict[str, str] = {}
        self._keys = ssh.SshKeys(directory)
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> World:
        with self._exit:
            for name, services in ((VM, SERVICES), (NEIGHBOUR, SERVICES[:SHARED])):
                spec = _spec(services, self._keys.files())
                guest = QemuGuest(self.directory / name, spec)
                self.guests[name] = self._exit.enter_context(guest)
            for guest in self.guests.values():
                check(guest, NETWORK_UP)
            self.ways[TCP] = f"127.0.0.1:{self._reach_by_network(PORT)}"
            self._ssh_port = self._reach_by_network(ssh.PORT)
            self.ways[SSH] = self._start_tunnel()
            self._start("host", "-m", "vchan.host.daemon", "--config-file", str(self._config()))
            self.client = self._wait_served()
            for way, name in ((FORWARD, VM), (NEIGHBOUR, NEIGHBOUR)):
                words = self.cli_words("forward", name, f"0:{PORT}")
                line = self._start(f"forward-{name}", *words).wait_out()
                self.ways[way] = line.partition(" -> ")[0]
            self._exit = self._exit.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _start(self, name: str, *words: str) -> Part:
        part = Part(self.directory, name, *words)
        self._exit.callback(part.stop)
        return part.start()

    def _reach_by_network(self, guest_port: int) -> int:
        """A port of loopback that leads to this one of the guest's network card."""
        (port,) = claim_ports(1)
        line = f"hostfwd_add net0 tcp:127.0.0.1:{port}-:{guest_port}"
        said = self.guests[VM].qmp("human-monitor-command", **{"command-line": line})
        if said:
            raise RigError(f"{line}: {said}")
        return port

    def _start_tunnel(self) -> str:
        """The address here that ssh forwards to the guest's server."""
        self._wait_until(
            lambda: self._run_ssh("true").returncode == 0,
            lambda: f"no SSH: {self._run_ssh('true').stderr.decode()}",
        )
        (port,) = claim_ports(1)
        words = self._keys.client(self._ssh_port, "-N", "-L", f"127.0.0.1:{port}:127.0.0.1:{PORT}")
        log = self.directory / "ssh.log"
        process = Account(None).spawn(words, environment={}, log=log, cwd=self.directory)
        self._exit.callback(end_process, process, grace_s=1.0)
        self._wait_until(lambda: is_listened_at(port), lambda: f"no tunnel: {tail(log)}")
        return f"127.0.0.1:{port}"

    def _wait_until(self, ready: Callable[[], bool], failure: Callable[[], str]) -> None:
        wait_until(ready, timeout_s=READY_TIMEOUT_S, interval_s=0.1, failure=failure)

    def _config(self) -> Path:
        policy = self.directory / "policy.d" / "50-bench.policy"
        policy.parent.mkdir()
        policy.write_text(POLICY)
        channels = ",".join(
            f"{name}=connect:{guest.port(VCHAN_PORT)}" for name, guest in self.guests.items()
        )
        config = self.directory / "vchan.conf"
        config.write_text(
            f"[vchan]\nhost = bench\nlibvirt_uri =\nsocket = {self.socket}\n"
            f"policy_dir = {policy.parent}\naudit_log = {self.directory / 'audit'}\n"
            f"channels = {channels}\n"
        )
        return config

    def _wait_served(self) -> Client:
        """A client, when the agents and the file agent are there."""
        self._wait_until(self.socket.exists, lambda: (self.directory / "host.log").read_text())
        client = self._exit.enter_context(Client(str(self.socket)))
        shared = {f"openstack/{AGENT_TOPIC}"}
        wanted = {VM: shared | {"openstack/vchan.standard"}, NEIGHBOUR: shared}

        def are_served() -> bool:
            try:
                rows = client.call("vchan.host", "list", timeout_s=10)
            except VchanError:
                return False
            return {row["name"]: {*row["topics"]} for row in rows} == wanted

        self._wait_until(are_served, lambda: f"{client.call('vchan.host', 'list', timeout_s=10)}")
        return client

    def _run_ssh(
        self, command: str, given: int | IO[bytes] = DEVNULL, taken: int | IO[bytes] = DEVNULL
    ) -> subprocess.CompletedProcess[bytes]:
        words = [*self._keys.client(self._ssh_port), command]
        return subprocess.run(words, stdin=given, stdout=taken, stderr=PIPE, check=False)

    def ssh(self, command: str, *, source: Path = NOTHING, target: Path = NOTHING) -> None:
        """A command in the guest, to its end; its input and output are files here."""
        with source.open("rb") as given, target.open("wb") as taken:
            done = self._run_ssh(command, given, taken)
        if done.returncode:
            raise RigError(f"ssh {command}: {done.stderr.decode()}")

    def cli_words(self, *words: str) -> list[str]:
        """Of the command, for Python."""
        return ["-m", "vchan.cli", "--socket", str(self.socket), *words]

    def cp(self, source: str, destination: str) -> None:
        """The command, to its end."""
        words = self.cli_words("cp", "-q", source, destination)
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RigError(f"vchan cp {source} {destination}: {done.stderr}")


def _spec(services: tuple[Service, ...], keys: dict[str, bytes | Path]) -> GuestSpec:
    programs = ("agent.py", "bulk.py", "echo_select.py", "stream_server.py")
    extra = {**keys, **{f"bench/{name}": IN_GUEST / name for name in programs}}
    extra["bin/vchan-guest"] = DAEMON_SCRIPT.encode()
    extra["bench/files.toml"] = FILE_RULES.encode()
    return GuestSpec(
        build(extra, peers=True, ssh=True, network=True),
        services,
        ports=(VCHAN_PORT, SELECT_ECHO, PYTHON_BULK, GUEST_AGENT),
        memory_mib=MEMORY_MIB,
        network=True,
    )


def is_listened_at(port: int) -> bool:
    """Whether somebody takes connections at this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check(guest: QemuGuest, script: str) -> None:
    """Run a script that must succeed."""
    finished = guest.shell(script)
    if finished.status:
        raise RigError(f"{script!r} gave {finished.status}:\n{finished.output}")


class Load:
    """A byte stream that is never idle, while this is entered.

    Attributes:
        mbs: What it moved, from its first bytes to its end; known when it is left.
    """

    def __init__(self, where: str, verb: str) -> None:
        self.mbs = 0.0
        self._words = [sys.executable, "-m", "tests.bench.stream_load", where, verb]

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(self._words, cwd=ROOT, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        try:
            begun = self._process.stdout.readline()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        if not begun:
            raise RigError(f"no stream: {self._words}")
        self._began_s = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._process.stdout is not None
        took_s = time.perf_counter() - self._began_s
        self._process.terminate()
        with self._process.stdout as said:
            passed = said.read().strip().decode()
        end_process(self._process, grace_s=1.0)
        if passed.isdecimal():
            self.mbs = int(passed) / took_s / 1e6
        elif kind is None:
            raise RigError(f"a stream broke: {self._words}")


class Suite:
    """Takes measurements in rounds and keeps them by measure and subject."""

    def __init__(self, world: World, *, calls: int, bulk_bytes: int) -> None:
        self._world = world
        self._calls = calls
        self._bulk_bytes = bulk_bytes
        self.samples: Samples = defaultdict(lambda: defaultdict(list))
        guest = world.guests[VM]
        self._ga = GuestAgent(guest.connect(GUEST_AGENT, timeout_s=READY_TIMEOUT_S))
        self._bulk = {RAW: RawChannel(guest.connect(PYTHON_BULK, timeout_s=READY_TIMEOUT_S))}
        echoes = {RAW: RawChannel(guest.connect(SELECT_ECHO))}
        for name in (TCP, SSH, FORWARD):
            self._bulk[name] = RawChannel(connect(world.ways[name]))
            channel = connect(world.ways[name])
            channel.sendall(b"echo\n")
            echoes[name] = RawChannel(channel)
        payload = bytes(ECHO_BYTES)
        for echo in echoes.values():
            echo.settle(payload)
        self._round_trips: dict[str, Callable[[], object]] = {
            name: lambda echo=echo: echo.echo(payload)  # type: ignore[misc]
            for name, echo in echoes.items()
        }
        self._round_trips[GA] = self._ga.ping
        check(guest, f"head -c {bulk_bytes} /dev/urandom >{FILE}")
        self._file = world.directory / "file"
        self._file.write_bytes(bytes(bulk_bytes))

    def round(self) -> None:
        """Measure everything once, in turns."""
        for name, action in self._round_trips.items():
            self.samples["echo_us"][name] += self._times_us(action)
        self._measure_bulk()
        self._measure_calls()

    def _times_us(self, action: Callable[[], object]) -> list[float]:
        clock, times_us = time.perf_counter, []
        for _ in range(self._calls):
            started_s = clock()
            action()
            times_us.append((clock() - started_s) * 1e6)
        return times_us

    def _measure_bulk(self) -> None:
        size, world = self._bulk_bytes, self._world
        back = str(world.directory / "back")
        for name, channel in self._bulk.items():
            self._keep_speed("to_guest_mbs", name, lambda c=channel: c.take(size))  # type: ignore[misc]
            self._keep_speed("from_guest_mbs", name, lambda c=channel: c.give(size))  # type: ignore[misc]
        self._keep_speed("from_guest_mbs", GA, lambda: self._ga.read_file(FILE, FILE_CHUNK_BYTES))
        cat_in = partial(world.ssh, f"cat >{FILE}.copy", source=self._file)
        cat_out = partial(world.ssh, f"cat {FILE}", target=world.directory / "back")
        self._keep_speed("to_guest_mbs", SSH_CAT, cat_in)
        self._keep_speed("from_guest_mbs", SSH_CAT, cat_out)
        self._keep_speed("to_guest_mbs", CP, lambda: world.cp(str(self._file), f"{VM}:/tmp/copy"))
        self._keep_speed("from_guest_mbs", CP, lambda: world.cp(f"{VM}:{FILE}", back))

    def _keep_speed(self, measure: str, name: str, action: Callable[[], object]) -> None:
        started_s = time.perf_counter()
        action()
        mbs = self._bulk_bytes / (time.perf_counter() - started_s) / 1e6
        self.samples[measure][name].append(mbs)

    def _measure_calls(self) -> None:
        ways = self._world.ways
        self._measure_call(ALONE, contextlib.nullcontext())
        for name, way, verb in (
            (OWN_TO, FORWARD, "take"),
            (OWN_FROM, FORWARD, "give"),
            (OTHERS_TO, NEIGHBOUR, "take"),
            (OTHERS_FROM, NEIGHBOUR, "give"),
            (TCP_TO, TCP, "take"),
            (TCP_FROM, TCP, "give"),
        ):
            load = Load(ways[way], verb)
            self._measure_call(name, load)
            self.samples["stream_mbs"][name].append(load.mbs)

    def _measure_call(self, name: str, beside: contextlib.AbstractContextManager[object]) -> None:
        call = self._world.client.call
        with beside:
            self.samples["call_us"][name] += self._times_us(
                lambda: call(AGENT_TOPIC, "ping", {"x": PAD}, server=VM, timeout_s=120)
            )


def percentile(values: list[float], percent: int) -> float:
    """So many of a hundred values are not larger."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def summary(samples: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    """By measure and subject: medians of speeds over the rounds, percentiles of all rounds' calls
    together, and what they are beside the baselines of the same run."""
    result: dict[str, dict[str, float]] = {}
    for measure in ("to_guest_mbs", "from_guest_mbs", "stream_mbs"):
        by_name = samples[measure]
        result[measure] = {name: statistics.median(values) for name, values in by_name.items()}
    for kind in ("echo", "call"):
        by_name = samples[f"{kind}_us"]
        for percent in (50, 99):
            result[f"{kind}_p{percent}_us"] = {
                name: percentile(values, percent) for name, values in by_name.items()
            }
    echo = result["echo_p50_us"]
    result["echo_added_us"] = {name: value - echo[RAW] for name, value in echo.items()}
    for measure in ("to_guest_mbs", "from_guest_mbs"):
        result[f"{measure}_of_raw"] = _beside(result[measure], RAW)
    result["from_guest_mbs_of_qemu_ga"] = _beside(result["from_guest_mbs"], GA)
    for measure in ("call_p50_us", "call_p99_us"):
        result[f"{measure}_of_alone"] = _beside(result[measure], ALONE)
    return result


def _beside(values: Mapping[str, float], base: str) -> dict[str, float]:
    return {name: value / values[base] for name, value in values.items()}


STREAMS: Final = (
    ("to_guest_mbs", "to MB/s", "{:.1f}"),
    ("to_guest_mbs_of_raw", "/ raw", "{:.2f} x"),
    ("from_guest_mbs", "from MB/s", "{:.1f}"),
    ("from_guest_mbs_of_raw", "/ raw", "{:.2f} x"),
    ("from_guest_mbs_of_qemu_ga", "/ qemu-ga", "{:.1f} x"),
    ("echo_p50_us", "p50 us", "{:.0f}"),
    ("echo_p99_us", "p99 us", "{:.0f}"),
    ("echo_added_us", "added us", "{:.0f}"),
)
CALLS: Final = (
    ("call_p50_us", "p50 us", "{:.0f}"),
    ("call_p50_us_of_alone", "/ alone", "{:.2f} x"),
    ("call_p99_us", "p99 us", "{:.0f}"),
    ("call_p99_us_of_alone", "/ alone", "{:.2f} x"),
    ("stream_mbs", "its MB/s", "{:.1f}"),
)


def _rows(
    result: Mapping[str, Any], columns: tuple[tuple[str, str, str], ...], titles: Mapping[str, str]
) -> Iterator[str]:
    width = max(map(len, titles.values())) + 1
    yield " " * width + "".join(f"{title:>11}" for _, title, _ in columns)
    for name, title in titles.items():
        values = ((result[measure].get(name), form) for measure, _, form in columns)
        cells = ("" if value is None else form.format(value) for value, form in values)
        yield (f"{title:<{width}}" + "".join(f"{cell:>11}" for cell in cells)).rstrip()


def aims(result: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What was aimed at, and whether it was met."""
    ratios = result["call_p99_us_of_alone"]
    names = (OWN_TO, OWN_FROM, OTHERS_TO, OTHERS_FROM)
    return [
        f"p99 of a call beside {BESIDE[name]}: {ratios[name]:.2f} x, aim <= {P99_AIM:g} x: "
        + ("met" if ratios[name] <= P99_AIM else "missed")
        for name in names
    ]


def table(result: Mapping[str, Any]) -> str:
    """The result, for people."""
    lines = [
        f"bytes to and from an emulated guest (TCG); round trips of {ECHO_BYTES} bytes, and what",
        "half of them take more than over the raw port",
        *_rows(result, STREAMS, TITLES),
        "",
        "calls to an agent in the VM, one at a time, beside a stream that is never idle",
        *_rows(result, CALLS, BESIDE),
        "",
        *aims(result),
    ]
    before, after = result["load"]
    return "\n".join([*lines, "", f"machine's load: {before:.1f} before, {after:.1f} after"])


def run(directory: Path, *, rounds: int, calls: int, bulk_bytes: int) -> dict[str, Any]:
    """All of it."""
    with World(directory) as world:
        suite = Suite(world, calls=calls, bulk_bytes=bulk_bytes)
        for _ in range(rounds):
            suite.round()
    return dict(summary(suite.samples))
