"""A cloud that runs: its control side, its hosts, and the images of its servers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.cloud import settings
from tests.cloud.agent_image import build, command_line
from tests.cloud.compute import Compute
from tests.cloud.control import Control
from tests.cloud.load import Caller
from tests.cloud.openstack import TENANTS, Images, Nova, authenticate
from tests.cloud.processes import Processes
from tests.cloud.settings import Place
from tests.rig import RigError, wait_until
from tests.rig.rabbit import RabbitServer

HOSTS: Final = 2
DISK_BYTES: Final = 1 << 20
DISCOVERY_TIMEOUT_S: Final = 240.0
CHANNEL_TIMEOUT_S: Final = 60.0
Say = Callable[[str], None]


class Cloud:
    """One cloud.

    Args:
        directory: For all its files.
        kept: What `install` gave.
        say: Told how far it is.
    """

    def __init__(self, directory: Path, kept: Path, say: Say) -> None:
        self.place = Place(directory, kept / "venv")
        self._kept = kept
        self._say = say
        programs = [Path(__file__).with_name("bin"), self.place.venv / "bin"]
        self.processes = Processes(directory, self.place.logs, programs)
        self.control = Control(self.place, self.processes, kept)
        self.hosts: list[Compute] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _end(self) -> None:
        # Without a word, which for nova would be half a minute: nobody reads its data again.
        for host in self.hosts:
            host.kill_guests()
        self.processes.kill_all()

    def _start(self, stack: contextlib.ExitStack) -> None:
        place = self.place
        for directory in (place.logs, place.etc, place.instances, place.base / "lock"):
            directory.mkdir(parents=True)
        if not self.control.is_made:
            self._say("making the databases (a minute or two, once)")
            self.control.make()
        self._say("starting RabbitMQ")
        (place.base / "rabbit").mkdir()
        rabbit = stack.enter_context(RabbitServer(place.base / "rabbit"))
        self._say(f"starting {HOSTS} compute hosts, and the control services")
        for number in range(1, HOSTS + 1):
            warm = self._kept / "libvirt"
            host = Compute(place, self.processes, number, rabbit.url, warm)
            self.hosts.append(host)
            host.make()
        self.control.start(rabbit.url)
        self._say("the APIs answer; starting nova-compute and vchan-host on each host")
        policy = settings.policy([authenticate(name, name)[1] for name in TENANTS])
        for host in self.hosts:
            host.set_policy(policy)
            host.wait_libvirtd()
            for part in ("nova-compute", "vchan-host"):
                host.start(part)
        names = [host.name for host in self.hosts]
        wait_until(
            lambda: self.control.has_hosts(names),
            timeout_s=DISCOVERY_TIMEOUT_S,
            interval_s=1.0,
            failure=lambda: f"nova does not see {' and '.join(names)}; logs: {place.logs}",
        )
        for host in self.hosts:
            host.wait_vchan()
        self._say("uploading the image")
        self.nova = Nova("admin")
        self.images = self._upload()
        self.caller = Caller(rabbit.url)

    def _upload(self) -> Images:
        disk = self.place.base / "root.raw"
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        image = build()
        return self.nova.make_images(image.kernel, image.initrd, disk, command_line())

    # --- looking

    def host_of(self, uuid: str) -> Compute:
        """Where nova says that a server is."""
        return self.host_named(self.nova.host(uuid))

    def host_named(self, name: str) -> Compute:
        """The host of a name."""
        return next(host for host in self.hosts if host.name == name)

    def consoles(self, uuid: str) -> list[Path]:
        """Where a server's console may be."""
        return [path for host in self.hosts for path in host.consoles(uuid)]

    def rows(self, uuid: str) -> dict[str, dict[str, Any]]:
        """What `vchan list` says of a server, on each host that has it."""
        found = {}
        for host in self.hosts:
            with contextlib.suppress(RigError):  # its vchan-host may be ended on purpose
                row = host.row(uuid)
                if row is not None:
                    found[host.name] = row
        return found

    def wait_channel(self, uuid: str) -> None:
        """Wait until the host that nova names has the server's channel.

        Raises:
            RigError: It has not, in CHANNEL_TIMEOUT_S; with what `vchan list` says.
        """
        host = self.nova.host(uuid)
        rows: dict[str, dict[str, Any]] = {}

        def is_ready() -> bool:
            nonlocal rows
            rows = self.rows(uuid)
            return rows.get(host, {}).get("channel") == "ready"

        wait_until(
            is_ready,
            timeout_s=CHANNEL_TIMEOUT_S,
            interval_s=0.5,
            failure=lambda: f"nova has {uuid} on {host}, and vchan list says {rows}",
        )
