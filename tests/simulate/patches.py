"""Puts the simulated world where the code under test touches the real one."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vchan.client
import vchan.guest.daemon
import vchan.host.vm.channel
import vchan.io.link
import vchan.io.local_socket
import vchan.programs.requests
from tests.simulate import network
from tests.simulate.reporting import Reporting
from tests.simulate.virtio import Channel
from tests.simulate.world import World


@contextmanager
def installed(
    world: World, channels: dict[str, Channel], reporting: Reporting | None = None
) -> Iterator[None]:
    """While this holds, vchan's shells live in `world`.

    Args:
        channels: The VMs' channels, by UUID: what a guest daemon's port sim:UUID opens.
        reporting: What is so in them; None: no guest daemon runs.
    """

    def own_loop() -> Any:
        assert world.starting is not None
        return world.starting

    def connect_local(path: str) -> Any:
        return network.connect(world, path)

    def hangup_watch(stream: Any) -> Any:
        assert world.starting is not None
        return network.HangupWatch(world, stream, world.starting.process)

    def port_opener(url: str) -> Any:
        return channels[url.removeprefix("sim:")].open_port

    fake_os: Any = types.SimpleNamespace(
        urandom=world.rng.randbytes,
        uname=lambda: types.SimpleNamespace(nodename="guest"),
        getpid=lambda: 1,
        unlink=lambda _path: None,
    )
    replaced: list[tuple[Any, str, Any]] = [
        (vchan.client, "os", fake_os),
        (vchan.client, "Loop", own_loop),
        (vchan.client, "connect_local", connect_local),
        (vchan.programs.requests, "os", fake_os),
        (vchan.guest.daemon, "os", fake_os),
        (vchan.guest.daemon, "Loop", own_loop),
        (vchan.guest.daemon, "port_opener", port_opener),
        (vchan.guest.daemon, "log", lambda _priority, _text: None),
        (vchan.host.vm.channel, "os", fake_os),
        (vchan.io.link, "hangup_watch", hangup_watch),
        (vchan.io.local_socket, "os", fake_os),
        (vchan.io.local_socket, "bind_unix", lambda path, _mode: network.listen(world, path)),
        (vchan.io.local_socket, "SocketStream", lambda connected, *_: connected),
        *(reporting.replaced() if reporting is not None else ()),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
