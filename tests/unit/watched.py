"""What a host's daemon says of itself, made of a channel as the daemon makes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tests.rig.gates import OpenGate, offer_nothing
from tests.rig.phases import go_through, release
from vchan import __version__
from vchan.host.hypervisor.domains import Connect, Domain
from vchan.host.ops.metrics import families
from vchan.host.vm.channel import Channel, Home
from vchan.io.loop import Loop

UUID = "0a0a0a0a-0000-4000-8000-000000000000"


@contextlib.contextmanager
def a_channel() -> Iterator[Channel]:
    """One as the daemon makes it, of a socket that is not there."""
    loop = Loop()
    home = Home("host", bytes(16))
    channel = Channel(loop, Domain(UUID), home, None, OpenGate(), offer_nothing)
    go_through(channel, Connect(UUID, "/nonexistent/socket"))
    try:
        yield channel
    finally:
        release(channel)
        loop.close()


def row(channel: str = "ready", problem: str | None = None) -> dict[str, Any]:
    """A VM, as the daemon's method `list` tells of it."""
    return {
        "uuid": UUID,
        "name": "vm",
        "domain": "running",
        "channel": channel,
        "topics": [],
        "problem": problem,
    }


def daemon(channel: Channel | None = None, **changes: Any) -> dict[str, Any]:
    """What the daemon's method `status` returns."""
    return {
        "version": __version__,
        "host": "compute-1",
        "libvirt": "connected",
        "broker": "connected",
        "domains": 1,
        "channels": 1,
        "policy": "3 rules",
        "policy_problem": None,
        "audit": {"problem": None, "written": 5, "lost": 0, "left_out": 0},
        "totals": channel.totals() if channel else {},
        **changes,
    }


def detail(channel: Channel) -> dict[str, Any]:
    """What it returns of a VM."""
    return {"uuid": UUID, "name": "vm", "domain": "running", "problem": None, **channel.summary()}


class Given(Collector):
    """Metrics of what is given."""

    def __init__(self, *what: Any) -> None:
        self._what = what

    def collect(self) -> Iterable[Metric]:
        return families(*self._what)
