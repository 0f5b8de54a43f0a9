"""One VM's trouble in a real vchan-host, with a real broker and stock callers: the others do not
notice, and nothing is lost.

The VMs are guest daemons on sockets: what is tried here is the host's side.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.rig import end_process, rig_directory, wait_until
from tests.rig.requirements import missing_for_rabbit
from vchan import builds

MISSING = missing_for_rabbit()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
VICTIM, NEIGHBOUR = "victim", "neighbour"


class Endpoint:
    """An agent's methods."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def echo(self, x: int) -> int:
        return x

    def note(self, text: str) -> None:
        self.notes.append(text)


@contextmanager
def guest(directory: Path, name: str) -> Iterator[Endpoint]:
    """A VM: its daemon, and an agent."""
    from vchan.client import Agent

    endpoint = Endpoint()
    port, sock = directory / f"{name}.port", directory / f"{name}.sock"
    with (directory / f"{name}.log").open("ab") as log:
        daemon = subprocess.Popen(
            [
                *(sys.executable, "-m", "vchan.guest.daemon"),
                *("--port", f"listen:{port}", "--socket", str(sock)),
            ],
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    agent = Agent(str(sock))
    agent.serve("agent", endpoint)
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield endpoint
    finally:
        agent.stop()
        thread.join(WAIT_S)
        end_process(daemon, grace_s=10.0)


class Site:
    """A host with a fault that can be switched on, its VMs, and a caller at the broker."""

    def __init__(self, directory: Path, url: str, where: str, vm: str) -> None:
        from tests.rig.caller import Caller
        from tests.rig.compute import HostDaemon

        self.switch = directory / "switch"
        (directory / "h").mkdir()
        channels = ",".join(f"{n}=connect:{directory / n}.port" for n in (VICTIM, NEIGHBOUR))
        options = [f"channels = {channels}"]
        self.host = HostDaemon(directory / "h", "h1", "", url, options=options)
        program: tuple[str, ...] = (sys.executable, "-m", "tests.rig.faulty_host", where, vm)
        module = import_module(where.partition(":")[0])
        if not str(module.__file__).endswith(".py"):  # compiled callers would not see the fault
            program = ("env", f"{builds.VARIABLE}=pure", *program)
        self.host.program = (*program, str(self.switch))
        self.caller = Caller(url, directory / "caller.log")

    def row(self, name: str) -> Any:
        return next(row for row in self.host.call("list") if row["name"] == name)

    def wait(self, reached: Callable[[], bool]) -> None:
        wait_until(
            reached, timeout_s=WAIT_S, interval_s=0.1, failure=lambda: self.host.log.read_text()
        )

    def echo(self, name: str, x: int) -> Any:
        return self.caller.call("agent", name, "echo", x=x)


@pytest.fixture(scope="module")
def rabbit() -> Iterator[Any]:
    from tests.rig.rabbit import RabbitServer

    with rig_directory() as directory, RabbitServer(directory / "rabbit") as server:
        yield server


@contextmanager
def site(url: str, where: str, vm: str) -> Iterator[tuple[Site, Endpoint]]:
    with (
        rig_directory() as directory,
        guest(directory, VICTIM) as victim,
        guest(directory, NEIGHBOUR),
    ):
        site = Site(directory, url, where, vm)
        try:
            site.host.start()
            for name in (VICTIM, NEIGHBOUR):
                site.host.wait_ready(name, topics=("agent",))
            yield site, victim
        finally:
            site.caller.close()
            site.host.stop()


FAULTS = [
    "vchan.host.vm.downward:Downward.delivered",
    "vchan.host.broker.vm_queues:VmQueues._on_deliver",
    "vchan.host.broker.vm_queues:VmQueues.acknowledge",
]


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_on_one_vm_is_its_own_and_loses_nothing(rabbit: Any, where: str) -> None:
    from vchan.client import Client

    with site(rabbit.url, where, VICTIM) as (here, victim):
        assert here.echo(VICTIM, 1) == here.echo(NEIGHBOUR, 1) == 1
        pid = here.host.pid
        here.switch.touch()
        with Client(str(here.host.socket)) as client:  # by the broker, for it goes to a queue
            client.cast("agent", "note", {"text": "before"}, server=VICTIM)
        _cast_by_broker(rabbit.url, "during")
        here.wait(lambda: here.row(VICTIM)["channel"] == "quarantined")
        assert "vchan-host failed on it: PlantedError" in here.row(VICTIM)["problem"]
        for x in range(20):
            assert here.echo(NEIGHBOUR, x) == x
        assert here.row(NEIGHBOUR)["channel"] == "ready"
        assert here.host.pid == pid and here.host.is_running
        log = here.host.log.read_text()
        assert log.count("unexpected") == 1
        assert log.count("faulty_host.py") >= 1
        assert here.host.status(VICTIM)["channel"]["faults"] == 1
        here.switch.unlink()
        here.host.call("release", vm=VICTIM)
        here.wait(lambda: "during" in victim.notes)
        assert here.echo(VICTIM, 2) == 2
        assert victim.notes.count("during") == 1


def _cast_by_broker(url: str, text: str) -> None:
    program = f"""
import oslo_messaging as om
from oslo_config import cfg
cfg.CONF([])
client = om.get_rpc_client(om.get_rpc_transport(cfg.CONF, url={url!r}), om.Target(topic="agent"))
client.prepare(server={VICTIM!r}).cast({{}}, "note", text={text!r})
"""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], check=True, timeout=WAIT_S, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("vchan.host.broker.broker:Broker._watch", "the broker's thread"),
        ("vchan.host.broker.queue_cleanup:Leftovers.due", "vchan-host ends: unexpected"),
    ],
)
def test_a_fault_outside_of_a_vm_ends_the_daemon(rabbit: Any, where: str, said: str) -> None:
    with site(rabbit.url, where, "*") as (here, _):
        process = here.host._process
        assert process is not None
        here.switch.touch()
        _ask_without_waiting(here)
        assert process.wait(WAIT_S) == 70
        log = here.host.log.read_text()
        assert "CRITICAL" in log and "Traceback" in log
        assert said in log
        assert "PlantedError" in log
        here.switch.unlink()
        here.host.start()  # as systemd does
        here.host.wait_ready(VICTIM, topics=("agent",))
        assert here.echo(VICTIM, 3) == 3


def _ask_without_waiting(here: Site) -> None:
    """A call by the broker: its reply is published, if it comes to that."""
    threading.Thread(target=_call, args=(here,), daemon=True).start()


def _call(here: Site) -> None:
    from tests.rig.caller import CallFailed

    try:
        here.echo(NEIGHBOUR, 9)
    except (CallFailed, AssertionError, OSError, ValueError):
        pass  # the daemon is meant to end
