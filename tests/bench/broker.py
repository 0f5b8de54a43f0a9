"""Through a real broker: what vchan costs beside stock oslo.messaging on the same broker, and what
many VMs cost one vchan-host.

Everything runs natively, nothing is emulated: the clients and the plain server are what they are in
a cloud, and so are vchan-host, vchan-guest and the agent, joined by a unix socket.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tests.bench import message_cost
from tests.bench.servers import COUNT_FILE, TOPIC
from tests.rig import RigError, tail, wait_until
from tests.rig.rabbit import RabbitServer
from vchan.client import Client
from vchan.errors import VchanError

ROOT = Path(__file__).parents[2]
AGENT = Path(__file__).with_name("in_guest") / "agent.py"
READY_S = 120.0
CALL_S = 60
PLAIN = "plain oslo.messaging"
LIGHT = "vchan, light agent"
STOCK = "vchan, stock agent on vchan://"
PY_AMQP = "py-amqp alone"
STOCK_MAX = 300
"""Stock servers in one process: each has a connection and two threads."""
THREADS = 16
IDLE_S = 19.0
"""Four rounds of what a host asks idle guests: another time holds one more or less."""
CLOCK_TICK_S = 0.01
Costs = dict[str, list[tuple[float, message_cost.Cost]]]
"""See `costs`."""
POLICY = "listen,reply any any allow\ncall,cast any control allow\n"


@contextlib.contextmanager
def program(
    log: Path, *words: str, wait: str = "", tree: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A program of a tree's; `wait` is what it says when it serves."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if wait else output,
            stderr=output,
        )
    try:
        if wait:
            assert process.stdout is not None
            said = process.stdout.readline().decode()
            if wait not in said:
                raise RigError(f"{words}: {tail(log)}")
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


class Usage:
    """What a process takes, by the kernel's word."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids

    def cpu_s(self) -> float:
        """CPU time used so far."""
        fields = [self._read(pid, "stat").rpartition(")")[2].split() for pid in self._pids]
        return sum(int(each[11]) + int(each[12]) for each in fields) * CLOCK_TICK_S

    def status(self, name: str) -> int:
        """A number of /proc/PID/status, summed: VmRSS (KiB), Threads."""
        total = 0
        for pid in self._pids:
            lines = self._read(pid, "status").splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
        return total

    @staticmethod
    def _read(pid: int, name: str) -> str:
        return Path(f"/proc/{pid}/{name}").read_text()


class Broker:
    """The broker, and what is asked of it."""

    def __init__(self, rabbit: RabbitServer, directory: Path) -> None:
        self.rabbit = rabbit
        self.url = rabbit.url
        self.directory = directory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oslo's own deprecations
            import oslo_messaging
            from oslo_config import cfg

            conf = cfg.CONF
            conf([], project="vchan-bench", default_config_files=[], default_config_dirs=[])
            transport = oslo_messaging.get_rpc_transport(conf, url=self.url)
            target = oslo_messaging.Target(topic=TOPIC)
            self.client = oslo_messaging.get_rpc_client(transport, target)
        self.transport = transport

    def call(self, server: str, method: str = "ping", **args: Any) -> Any:
        """Call a server of the topic."""
        return self.client.prepare(server=server, timeout=CALL_S).call({}, method, **args)

    def wait_served(self, server: str) -> None:
        """Wait until it answers."""

        def answers() -> bool:
            try:
                self.client.prepare(server=server, timeout=1).call({}, "ping")
            except Exception:  # noqa: BLE001 - whatever it is: not yet
                return False
            return True

        wait_until(answers, timeout_s=READY_S, interval_s=0.1, failure=lambda: f"no {server}")

    def consumers(self) -> int:
        """Of all queues."""
        rows = self.rabbit.ctl("list_queues", "consumers").split()
        return sum(int(word) for word in rows if word.isdecimal())

    def count(self, what: str) -> int:
        """Of connections or channels."""
        lines = self.rabbit.ctl(f"list_{what}", "pid").splitlines()
        return sum(line.startswith("<") for line in lines)

    def close_connections(self, of: str = "") -> int:
        """Close those whose properties have this in them. Returns how many."""
        rows = self.rabbit.ctl("list_connections", "pid", "client_properties").splitlines()
        pids = [row.split("\t")[0] for row in rows if row.startswith("<") and of in row]
        if len(pids) == 1:
            self.rabbit.ctl("close_connection", pids[0], "closed by the benchmark")
        else:
            self.rabbit.kill_connections()
        return len(pids)


@contextlib.contextmanager
def host_daemon(
    broker: Broker, channels: Mapping[str, Path], tree: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A tree's vchan-host with these channels, and no libvirt."""
    directory = broker.directory / f"host{time.monotonic_ns()}"
    (directory / "policy.d").mkdir(parents=True)
    (directory / "policy.d" / "50-bench.policy").write_text(POLICY)
    names = ",".join(f"{name}=connect:{path}" for name, path in channels.items())
    config = directory / "vchan.conf"
    config.write_text(
        f"[DEFAULT]\ntransport_url = {broker.url}\nlog_file = {directory / 'log'}\n"
        f"[vchan]\nhost = bench\nlibvirt_uri =\nsocket = {directory / 'host.sock'}\n"
        f"policy_dir = {directory / 'policy.d'}\naudit_log = {directory / 'audit'}\n"
        f"channels = {names}\n"
    )
    out = directory / "out"
    words = ("-m", "vchan.host.daemon", "--config-file", str(config))
    with program(out, *words, tree=tree) as process:
        _wait_channels(directory, len(channels))
        yield process


def _wait_channels(directory: Path, count: int) -> None:
    with contextlib.ExitStack() as stack:
        clients: list[Client] = []

        def ready() -> bool:
            try:
                if not clients:
                    clients.append(stack.enter_context(Client(str(directory / "host.sock"))))
                rows = clients[0].call("vchan.host", "list", timeout_s=10)
            except VchanError:
                return False
            ready = [row for row in rows if row["channel"] == "ready"]
            return len(ready) == count

        wait_until(
            ready, timeout_s=READY_S, interval_s=0.05, failure=lambda: tail(directory / "log")
        )


# ---------------------------------------------------------------- beside stock oslo.messaging


class Subject:
    """A server that is called, and the processes that it takes."""

    def __init__(self, server: str, *pids: int) -> None:
        self.server = server
        self.usage = Usage(*pids)


@contextlib.contextmanager
def subjects(broker: Broker) -> Iterator[dict[str, Subject]]:
    """All that are compared, running."""
    directory, log = broker.directory, broker.directory / "programs.log"
    servers = ("-m", "tests.bench.servers", "oslo")
    guests = {name: directory / f"{name}.channel" for name in ("light", "stock")}
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(program(log, *servers, broker.url, "plain", wait="ready"))
        daemons = {
            name: stack.enter_context(
                program(
                    log,
                    *("-m", "vchan.guest.daemon", "--quiet", "--port", f"listen:{path}"),
                    *("--socket", str(directory / f"{name}.agents")),
                )
            )
            for name, path in guests.items()
        }
        for name in guests:
            path = directory / f"{name}.agents"
            wait_until(path.exists, timeout_s=READY_S, interval_s=0.02, failure=lambda: tail(log))
        light = stack.enter_context(program(log, str(AGENT), str(directory / "light.agents")))
        url = f"vchan://{directory}/stock.agents"
        stock = stack.enter_context(program(log, *servers, url, "any", wait="ready"))
        host = stack.enter_context(host_daemon(broker, guests))
        for server in ("plain", *guests):
            broker.wait_served(server)
        yield {
            PLAIN: Subject("plain", plain.pid),
            LIGHT: Subject("light", host.pid, daemons["light"].pid, light.pid),
            STOCK: Subject("stock", host.pid, daemons["stock"].pid, stock.pid),
        }


def compare(
    broker: Broker, compared: Mapping[str, Subject], *, rounds: int, calls: int
) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by measure and subject."""
    samples: dict[str, dict[str, list[float]]] = {}

    def keep(measure: str, subject: str, value: float) -> None:
        samples.setdefault(measure, {}).setdefault(subject, []).append(value)

    for _ in range(rounds):
        for name, subject in compared.items():
            times = []
            cpu_s = subject.usage.cpu_s()
            for _ in range(calls):
                started_s = time.perf_counter()
                broker.call(subject.server, x="y" * 64)
                times.append(time.perf_counter() - started_s)
            keep("p50_ms", name, statistics.median(times) * 1000)
            keep("p99_ms", name, statistics.quantiles(times, n=100)[98] * 1000)
            keep("cpu_ms", name, (subject.usage.cpu_s() - cpu_s) / calls * 1000)
        for name, subject in compared.items():
            keep("calls_s", name, _rate(broker, subject.server, 2 * calls, cast=False))
        for name, subject in compared.items():
            keep("casts_s", name, _rate(broker, subject.server, 4 * calls, cast=True))
    return {
        measure: {name: statistics.median(values) for name, values in by_name.items()}
        for measure, by_name in samples.items()
    }


def _rate(broker: Broker, server: str, count: int, *, cast: bool) -> float:
    """Calls or casts per second from several threads, until the last has run."""
    client = broker.client.prepare(server=server, timeout=CALL_S)
    before = broker.call(server, "count")
    share = count // THREADS

    def work() -> None:
        for _ in range(share):
            if cast:
                client.cast({}, "note", x="y" * 64)
            else:
                client.call({}, "ping", x="y" * 64)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if cast:
        wait_until(
            lambda: bool(broker.call(server, "count") >= before + share * THREADS),
            timeout_s=READY_S,
            interval_s=0.01,
            failure=lambda: f"{server} lost casts",
        )
    return share * THREADS / (time.perf_counter() - started_s)


# ---------------------------------------------------------------- many VMs


def many(broker: Broker, count: int) -> tuple[dict[str, float], message_cost.Cost]:
    """One vchan-host with so many VMs; and what a message costs it."""
    directory = broker.directory / f"{count}"
    directory.mkdir()
    words = ("-m", "tests.bench.servers", "guests", str(directory), str(count))
    channels = {f"vm{number}": directory / f"{number}" for number in range(count)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(program(broker.directory / "guests.log", *words, wait="ready"))
        empty = stack.enter_context(host_daemon(broker, {}))
        empty_kib = Usage(empty.pid).status("VmRSS")
        empty.kill()
        connections, channels_before = broker.count("connections"), broker.count("channels")
        consumers = broker.consumers()
        started_s = time.perf_counter()
        host = stack.enter_context(host_daemon(broker, channels))
        _wait_consumers(broker, consumers + 2 * count)
        result = {"ready_s": time.perf_counter() - started_s}
        result["connections"] = broker.count("connections") - connections
        result["channels"] = broker.count("channels") - channels_before
        usage = Usage(host.pid)
        result.update(_rest(broker, usage, empty_kib, count))
        started_s = time.perf_counter()
        for name in channels:
            broker.call(name)
        result["calls_s"] = count / (time.perf_counter() - started_s)
        result["rss_after_kib"] = (usage.status("VmRSS") - empty_kib) / count
        file = directory / COUNT_FILE
        result.update(
            _back(
                broker,
                count,
                f"vchan-host:{host.pid}",
                usage,
                lambda: int(file.read_text().split()[0]),
            )
        )
        keys = [f"{TOPIC}.{name}" for name in channels]
        return result, message_cost.measure(broker.rabbit, host.pid, keys)


def costs(directory: Path, *, rounds: int, vms: list[int], trees: Sequence[Path]) -> Costs:
    """What a message costs vchan-host, as each tree has it, in turns: by the number of VMs and the
    tree, of each turn (the load before it, the cost)."""
    result: Costs = {}
    with contextlib.ExitStack() as stack:
        (directory / "r").mkdir()
        rabbit = stack.enter_context(RabbitServer(directory / "r"))
        broker = Broker(rabbit, directory)
        stack.callback(broker.transport.cleanup)
        for count, turn, tree in product(vms, range(rounds), trees):
            place = directory / f"{count}-{turn}-{trees.index(tree)}"
            place.mkdir()
            load = os.getloadavg()[0]
            cost = _cost(broker, place, count, tree)
            result.setdefault(f"{count} {tree.name}", []).append((load, cost))
    return result


def _cost(broker: Broker, directory: Path, count: int, tree: Path) -> message_cost.Cost:
    words = ("-m", "tests.bench.servers", "guests", str(directory), str(count))
    channels = {f"vm{number}": directory / f"{number}" for number in range(count)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(program(directory / "guests.log", *words, wait="ready"))
        consumers = broker.consumers()
        host = stack.enter_context(host_daemon(broker, channels, tree))
        _wait_consumers(broker, consumers + 2 * count)
        for name in channels:
            broker.call(name)
        keys = [f"{TOPIC}.{name}" for name in channels]
        return message_cost.measure(broker.rabbit, host.pid, keys)


def costs_table(result: Costs) -> str:
    """For people."""
    title, heads = message_cost.table({})
    lines = [title, f"{'VMs, tree':<24}{'load':>6}{heads[24:]}"]
    for name, turns in result.items():
        for load, cost in turns:
            *_, line = message_cost.table({name: cost})
            lines.append(f"{line[:24]}{load:>6.1f}{line[24:]}")
    return "\n".join(lines)


def floor(broker: Broker) -> message_cost.Cost:
    """The same messages, with py-amqp and nothing else."""
    log, queue = broker.directory / "floor.log", "floor"
    with message_cost.caller(broker.rabbit, exchange="") as caller:
        words = ("amqp", f"127.0.0.1:{broker.rabbit.port}", queue, caller.reply_q)
        with program(log, "-m", "tests.bench.servers", *words, wait="ready") as process:
            return message_cost.with_caller(caller, broker.rabbit, process.pid, [queue])


def many_stock(broker: Broker, count: int) -> dict[str, float]:
    """The same number of stock servers, in one process."""
    names = [f"stock{number}" for number in range(count)]
    servers = ("-m", "tests.bench.servers", "oslo", broker.url)
    log = broker.directory / "stock.log"
    with contextlib.ExitStack() as stack:
        empty = stack.enter_context(program(log, *servers, wait="ready"))
        empty_kib = Usage(empty.pid).status("VmRSS")
        empty.kill()
        connections, channels = broker.count("connections"), broker.count("channels")
        consumers = broker.consumers()
        started_s = time.perf_counter()
        process = stack.enter_context(program(log, *servers, *names, wait="ready"))
        _wait_consumers(broker, consumers + 3 * count)
        result = {"ready_s": time.perf_counter() - started_s}
        result["connections"] = broker.count("connections") - connections
        result["channels"] = broker.count("channels") - channels
        usage = Usage(process.pid)
        result.update(_rest(broker, usage, empty_kib, count))
        started_s = time.perf_counter()
        for name in names:
            broker.call(name)
        result["calls_s"] = count / (time.perf_counter() - started_s)
        result["threads"] = usage.status("Threads")  # each server has made its worker
        result["rss_after_kib"] = (usage.status("VmRSS") - empty_kib) / count

        def reached() -> int:
            return int(broker.call(names[0], "count"))

        result.update(_back(broker, count, "", usage, reached))
    return result


def _wait_consumers(broker: Broker, count: int) -> None:
    wait_until(
        lambda: broker.consumers() >= count,
        timeout_s=READY_S,
        interval_s=0.1,
        failure=lambda: f"{broker.consumers()} of {count} consumers",
    )


def _rest(broker: Broker, usage: Usage, empty_kib: int, count: int) -> dict[str, float]:
    """At rest: threads, memory, processor."""
    assert broker.rabbit._server is not None
    rabbit = Usage(broker.rabbit._server.pid)
    before = usage.cpu_s(), rabbit.cpu_s()
    time.sleep(IDLE_S)
    after = usage.cpu_s(), rabbit.cpu_s()
    return {
        "threads": usage.status("Threads"),
        "rss_kib": (usage.status("VmRSS") - empty_kib) / count,
        "idle_cpu_percent": (after[0] - before[0]) / IDLE_S * 100,
        "idle_broker_percent": (after[1] - before[1]) / IDLE_S * 100,
    }


def _back(
    broker: Broker, count: int, of: str, usage: Usage, reached: Callable[[], int]
) -> dict[str, float]:
    """From when the broker closes the connection until everybody has had what was sent then: the
    time, and the processor time of the daemon and of RabbitMQ."""
    assert broker.rabbit._server is not None
    rabbit = Usage(broker.rabbit._server.pid)
    broker.client.prepare(fanout=True).cast({}, "note", x="y")  # our own connection is there
    before = reached()
    wait_until(lambda: _is_still(reached), timeout_s=30, interval_s=0.2, failure=lambda: "busy")
    before = reached()
    broker.close_connections(of)  # takes rabbitmqctl a second, most of it before it does it
    started_s = time.perf_counter()
    cpu_s, broker_cpu_s = usage.cpu_s(), rabbit.cpu_s()
    while True:
        try:
            broker.client.prepare(fanout=True).cast({}, "note", x="y")
            break
        except Exception:  # noqa: BLE001 - ours was closed as well
            time.sleep(0.05)
    wait_until(
        lambda: reached() >= before + count,
        timeout_s=READY_S,
        interval_s=0.02,
        failure=lambda: f"{reached() - before} of {count} came back",
    )
    return {
        "back_s": time.perf_counter() - started_s,
        "back_cpu_s": usage.cpu_s() - cpu_s,
        "back_broker_cpu_s": rabbit.cpu_s() - broker_cpu_s,
    }


def _is_still(reached: Callable[[], int]) -> bool:
    before = reached()
    time.sleep(0.5)
    return reached() == before


# ---------------------------------------------------------------- the tables

COMPARED = (
    ("p50_ms", "p50 ms", "{:.2f}"),
    ("p99_ms", "p99 ms", "{:.2f}"),
    ("cpu_ms", "CPU ms", "{:.2f}"),
    ("calls_s", "calls/s", "{:.0f}"),
    ("casts_s", "casts/s", "{:.0f}"),
)
MANY = (
    ("connections", "conns", "{:.0f}"),
    ("channels", "channels", "{:.0f}"),
    ("threads", "threads", "{:.0f}"),
    ("rss_kib", "KiB/VM", "{:.0f}"),
    ("rss_after_kib", "after", "{:.0f}"),
    ("idle_cpu_percent", "idle %", "{:.1f}"),
    ("idle_broker_percent", "broker %", "{:.1f}"),
    ("ready_s", "ready s", "{:.1f}"),
    ("calls_s", "calls/s", "{:.0f}"),
    ("back_s", "back s", "{:.1f}"),
    ("back_cpu_s", "its CPU", "{:.1f}"),
    ("back_broker_cpu_s", "broker's", "{:.1f}"),
)


def run(directory: Path, *, rounds: int, calls: int, vms: list[int]) -> dict[str, Any]:
    """All of it."""
    with contextlib.ExitStack() as stack:
        (directory / "r").mkdir()
        rabbit = stack.enter_context(RabbitServer(directory / "r"))
        broker = Broker(rabbit, directory)
        stack.callback(broker.transport.cleanup)
        with subjects(broker) as compared:
            medians = compare(broker, compared, rounds=rounds, calls=calls)
        result: dict[str, Any] = {"compared": medians, "many": {}, "cost": {}}
        for count in vms:
            name = f"vchan-host, {count} VM{'s' if count > 1 else ''}"
            result["many"][name], result["cost"][name] = many(broker, count)
        if vms:
            result["cost"][PY_AMQP] = floor(broker)
            count = max((count for count in vms if count <= STOCK_MAX), default=STOCK_MAX)
            result["many"][f"{count} stock servers"] = many_stock(broker, count)
    return result


def beside(
    compared: Mapping[str, Mapping[str, float]],
    columns: Sequence[tuple[str, str, str]],
    names: Sequence[str],
    base: str,
) -> list[str]:
    """A table of what is compared, and the ratios to the first of it.

    Args:
        columns: Measure, title, form.
        base: What the first is called beside the others.
    """
    width = max(map(len, names)) + len(f" / {base}  ")
    lines = [" " * width + "".join(f"{title:>10}" for _, title, _ in columns)]
    for name in names:
        cells = "".join(f"{form.format(compared[key][name]):>10}" for key, _, form in columns)
        lines.append(f"{name:<{width}}{cells}")
    for name in names[1:]:
        ratios = [compared[key][name] / compared[key][names[0]] for key, _, _ in columns]
        cells = "".join(f"{ratio:>8.2f} x" for ratio in ratios)
        lines.append(f"{f'{name} / {base}':<{width}}{cells}")
    return lines


def table(result: Mapping[str, Any]) -> str:
    """The result, for people."""
    lines = ["one call at a time; 16 threads; server's processes' CPU per call"]
    lines += beside(result["compared"], COMPARED, (PLAIN, LIGHT, STOCK), "plain")
    if result["many"]:
        lines += ["", "many VMs on one host's daemon, and as many stock servers in one process"]
        lines.append(" " * 24 + "".join(f"{title:>9}" for _, title, _ in MANY))
        for name, values in result["many"].items():
            cells = "".join(f"{form.format(values[key]):>9}" for key, _, form in MANY)
            lines.append(f"{name:<24}{cells}")
        lines.append("KiB/VM: memory over that without VMs, at rest; after: a call to each of them")
        lines.append("back: from when the broker closes the connection until each had a message")
        lines += ["", *message_cost.table(result["cost"])]
    before, after = result["load"]
    return "\n".join([*lines, "", f"machine's load: {before:.1f} before, {after:.1f} after"])
