"""What operators do today, beside vchan: an agent in a VM that speaks to the broker itself, over
the VM's network card.

One guest, one broker, one caller. In the guest a stock oslo.messaging server on rabbit://, the same
program on vchan://, and vchan's light agent; each of vchan's two with a daemon and a channel of its
own. RabbitMQ, vchan-host and the caller run natively; the guest is emulated.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tests.bench.broker import (
    COMPARED,
    READY_S,
    Broker,
    Subject,
    Usage,
    beside,
    compare,
    host_daemon,
)
from tests.bench.machine import DAEMON, DAEMON_SCRIPT, IN_GUEST, PORTS, read_until, wait_for_port
from tests.rig import RigError, oslo_image, wait_until
from tests.rig.guest import GuestSpec, QemuGuest
from tests.rig.guest_image import NETWORK_GATEWAY, NETWORK_UP, PYTHON, Service, build
from tests.rig.rabbit import RabbitServer
from vchan.errors import NoSuchAgent

RABBIT: Final = "stock agent on rabbit://"
STOCK: Final = "stock agent on vchan://"
LIGHT: Final = "vchan's light agent"
MEMORY_MIB: Final = 512
STARTED: Final = "bench.started"
STARTS: Final = 5
RESTARTS: Final = 3
GONE_S: Final = 2.0
"""After an agent's end, until everybody has noticed."""
QUIET_S: Final = 15.0
"""Before the broker is restarted: everybody's back-off has started over."""
AGAIN_S: Final = 0.1
"""Until a call that nobody serves is tried again."""
ASKED_S: Final = 0.5
"""How often it is asked whether it is back, and how long for."""

CHANNELS: Final = {STOCK: "stock", LIGHT: "light"}
SERVERS: Final = {RABBIT: "rabbit", **CHANNELS}


class Guest:
    """The guest, and the three agents in it."""

    def __init__(self, guest: QemuGuest, rabbit: RabbitServer) -> None:
        self._guest = guest
        self._usage = Usage(guest.pid)
        url = f"rabbit://guest:guest@{NETWORK_GATEWAY}:{rabbit.port}//"
        self._commands = {
            RABBIT: f"{PYTHON} /bench/oslo_server.py {url} rabbit",
            STOCK: f"{PYTHON} /bench/oslo_server.py vchan:///run/stock.sock any",
            LIGHT: f"{PYTHON} /bench/agent.py /run/light.sock",
        }

    def start(self, name: str) -> float:
        """Start an agent. Returns the moment of its exec."""
        with self._guest.connect(STARTED, timeout_s=READY_S) as started:
            server, command = SERVERS[name], self._commands[name]
            self.run(
                f"(echo >{PORTS / STARTED}; exec {command}) >>/run/{server}.log 2>&1 &\n"
                f"echo $! >/run/{server}.pid"
            )
            read_until(started, b"\n")
            return time.perf_counter()

    def end(self, name: str) -> None:
        """End it, and wait until everybody knows."""
        self.run(
            f"pid=$(cat /run/{SERVERS[name]}.pid); kill $pid; "
            "while [ -e /proc/$pid ]; do sleep 0.02; done"
        )
        time.sleep(GONE_S)

    def cpu_s(self) -> float:
        """CPU time that QEMU has used."""
        return self._usage.cpu_s()

    def log(self, name: str) -> str:
        """What an agent said."""
        return self.run(f"tail -n 20 /run/{SERVERS[name]}.log")

    def memory_mib(self, name: str) -> float:
        """The resident memory of an agent; with its daemon's, if it needs one."""
        server = SERVERS[name]
        services = (server, f"{server}-daemon") if name in CHANNELS else (server,)
        pids = (f"$(cat /run/{service}.pid)" for service in services)
        lines = self.run("; ".join(f"grep VmRSS /proc/{pid}/status" for pid in pids))
        return sum(int(line.split()[1]) for line in lines.splitlines()) / 1024

    def run(self, script: str) -> str:
        """Run a script that must succeed."""
        finished = self._guest.shell(script)
        if finished.status:
            raise RigError(f"{script!r} gave {finished.status}:\n{finished.output}")
        return finished.output


@contextlib.contextmanager
def booted(broker: Broker) -> Iterator[tuple[Guest, dict[str, Subject]]]:
    """The guest with all agents served, and vchan-host."""
    extra = oslo_image.files(rabbit=True) | {"bin/vchan-guest": DAEMON_SCRIPT.encode()}
    programs = {f"bench/{name}": IN_GUEST / name for name in ("agent.py", "oslo_server.py")}
    services = tuple(
        Service(
            f"{name}-daemon",
            f"{DAEMON} --port virtio:{PORTS / f'bench.{name}'} --socket /run/{name}.sock",
        )
        for name in CHANNELS.values()
    )
    spec = GuestSpec(
        build({**extra, **programs}, network=True),
        services,
        ports=(*(f"bench.{name}" for name in CHANNELS.values()), STARTED),
        memory_mib=MEMORY_MIB,
        network=True,
    )
    with QemuGuest(broker.directory / "guest", spec) as qemu:
        guest = Guest(qemu, broker.rabbit)
        guest.run(NETWORK_UP)
        guest.run(wait_for_port(STARTED))
        channels = {name: qemu.port(f"bench.{name}") for name in CHANNELS.values()}
        with host_daemon(broker, channels) as host:
            for name, server in SERVERS.items():
                guest.start(name)
                try:
                    broker.wait_served(server)
                except RigError as error:
                    raise RigError(f"{error}: {guest.log(name)}") from error
            pids = {RABBIT: (qemu.pid,), STOCK: (qemu.pid, host.pid), LIGHT: (qemu.pid, host.pid)}
            yield guest, {name: Subject(SERVERS[name], *pids[name]) for name in SERVERS}


def starts(broker: Broker, guest: Guest) -> dict[str, dict[str, float]]:
    """From an agent's exec to the answer to a call that was waiting for it: seconds, and seconds of
    QEMU's CPU time, which other load disturbs less; medians."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in SERVERS}
    with ThreadPoolExecutor(1) as caller:
        for _ in range(STARTS):
            for name, server in SERVERS.items():
                guest.end(name)
                answered: Future[float] = caller.submit(_answered, broker, server)
                started_s, cpu_s = guest.start(name), guest.cpu_s()
                taken[name].append((answered.result() - started_s, guest.cpu_s() - cpu_s))
    return {
        measure: {name: statistics.median(row[at] for row in rows) for name, rows in taken.items()}
        for at, measure in enumerate(("start_s", "start_cpu_s"))
    }


def _answered(broker: Broker, server: str) -> float:
    """Call, and return the moment of the answer. The broker keeps a call until its time is over;
    vchan says so at once where an agent stays away for longer than seconds."""
    import oslo_messaging

    while True:
        try:
            broker.call(server)
        except oslo_messaging.RemoteError as error:
            if error.exc_type != NoSuchAgent.__name__:
                raise
            time.sleep(AGAIN_S)
        else:
            return time.perf_counter()


def backs(broker: Broker) -> dict[str, float]:
    """Seconds from when a restarted broker takes connections to each agent's next answer; medians.

    All three come back at the same time, as they would.
    """
    taken: dict[str, list[float]] = {name: [] for name in SERVERS}

    def measure(name: str) -> None:
        wait_until(
            lambda: _answers(broker, SERVERS[name]),
            timeout_s=READY_S,
            interval_s=0.01,
            failure=lambda: f"{name} did not come back",
        )
        taken[name].append(time.perf_counter() - restarted_s)

    logging.disable()  # the caller's driver has much to say meanwhile
    for _ in range(RESTARTS):
        time.sleep(QUIET_S)
        broker.rabbit.restart()
        restarted_s = time.perf_counter()
        threads = [threading.Thread(target=measure, args=(name,)) for name in SERVERS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    logging.disable(logging.NOTSET)
    return {name: statistics.median(values) for name, values in taken.items()}


def _answers(broker: Broker, server: str) -> bool:
    try:
        broker.client.prepare(server=server, timeout=ASKED_S).call({}, "ping")
    except Exception:  # noqa: BLE001 - whatever it is: not yet
        return False
    return True


COLUMNS: Final = (
    *COMPARED,
    ("rss_mib", "RSS MiB", "{:.1f}"),
    ("start_s", "start s", "{:.2f}"),
    ("start_cpu_s", "its CPU s", "{:.2f}"),
    ("back_s", "back s", "{:.1f}"),
)


def run(directory: Path, *, rounds: int, calls: int) -> dict[str, Any]:
    """All of it: medians by measure and subject."""
    (directory / "r").mkdir()
    with RabbitServer(directory / "r") as rabbit:
        broker = Broker(rabbit, directory)
        try:
            with booted(broker) as (guest, compared):
                result: dict[str, Any] = compare(broker, compared, rounds=rounds, calls=calls)
                result["rss_mib"] = {name: guest.memory_mib(name) for name in SERVERS}
                result.update(starts(broker, guest))
                result["back_s"] = backs(broker)
        finally:
            broker.transport.cleanup()
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result, for people."""
    lines = [
        "an agent in an emulated guest (TCG), called through the broker; one call at a time;",
        "16 threads; CPU of QEMU and vchan-host per call",
        *beside(result, COLUMNS, tuple(SERVERS), "rabbit://"),
        "RSS: in the guest, after the load, vchan-guest's included; start: from the agent's exec",
        "to its first answer, and QEMU's CPU for it; back: from when a restarted broker takes",
        "connections to the agent's next answer",
    ]
    before, after = result["load"]
    return "\n".join([*lines, "", f"machine's load: {before:.1f} before, {after:.1f} after"])
