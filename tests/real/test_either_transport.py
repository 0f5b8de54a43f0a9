"""The same agent, not a letter changed, on rabbit:// (a provider network) and on vchan://.

It is a stock oslo.messaging RPC server; its transport_url is all that differs. So is what calls it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.rig import Account, end_process, tail, wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.rabbit import RabbitServer

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

WAIT_S = 60.0
ROOT = Path(__file__).parents[2]
TOPIC = "demo"
SERVERS = {
    "rabbit": "0a9e0000-0000-4000-8000-000000000001",
    "vchan": "0a9e0000-0000-4000-8000-000000000002",
}
_runs = itertools.count(1)


@pytest.fixture(scope="module")
def rabbit(short_directory: Path) -> Iterator[RabbitServer]:
    from tests.rig.rabbit import RabbitServer

    directory = short_directory / "either-r"
    directory.mkdir()
    with RabbitServer(directory) as rabbit:
        yield rabbit


@contextlib.contextmanager
def through_vchan(directory: Path, rabbit: RabbitServer, server: str) -> Iterator[str]:
    """A host's and a guest's daemon; the transport_url of agents there."""
    from tests.rig.compute import HostDaemon

    channel, agents, log = directory / "channel", directory / "agents", directory / "guest.log"
    words = ("--port", f"listen:{channel}", "--socket", str(agents))
    guest = Account(None).spawn(
        [sys.executable, "-m", "vchan.guest.daemon", *words],
        environment={"PYTHONPATH": str(ROOT)},
        log=log,
        cwd=ROOT,
    )
    channels = f"channels = {server}=connect:{channel}"
    host = HostDaemon(directory, "host", "", rabbit.url, options=[channels])
    try:
        wait_until(agents.exists, timeout_s=WAIT_S, interval_s=0.05, failure=lambda: tail(log))
        host.start()
        host.wait_ready(server)
        yield f"vchan://{agents}"
    finally:
        host.stop()
        end_process(guest, grace_s=0.0)


def wait_served(rabbit: RabbitServer, server: str) -> None:
    """What is sent before there are queues goes nowhere, with any server."""

    def both() -> bool:
        found = [facts for name, facts in rabbit.queues().items() if TOPIC in name]
        direct = any(each.name == f"{TOPIC}.{server}" and each.consumers for each in found)
        fanout = any(each.name.startswith(f"{TOPIC}_fanout_") and each.consumers for each in found)
        return direct and fanout

    wait_until(both, timeout_s=WAIT_S, interval_s=0.1, failure=lambda: str(rabbit.queues()))


@pytest.mark.parametrize("transport", ["rabbit", "vchan"])
def test_the_same_agent_is_served_alike(
    transport: str, rabbit: RabbitServer, short_directory: Path
) -> None:
    from tests.rig.counting_server import CountingServer
    from tests.rig.traffic import TrafficProcess

    directory = short_directory / f"either{next(_runs)}"
    directory.mkdir()
    log = directory / "programs.log"
    server = SERVERS[transport]
    with contextlib.ExitStack() as stack:
        url = rabbit.url
        if transport == "vchan":
            url = stack.enter_context(through_vchan(directory, rabbit, server))
        stack.enter_context(CountingServer(url, TOPIC, server, log))
        wait_served(rabbit, server)
        options = {"fanouts_per_s": 5, "progress_s": 0.2, "name": f"{transport}-"}
        traffic = stack.enter_context(TrafficProcess(rabbit.url, server, TOPIC, log, **options))
        traffic.wait_for("calls_answered", 50)
        report = traffic.finish()
    report.check()
