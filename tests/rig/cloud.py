"""What the fault tests share: a broker, two compute hosts, and a VM that moves between them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import libvirt

from tests.rig import RigError, tail, wait_until
from tests.rig.compute import GUEST_DAEMON, GUEST_TIMEOUT_S, ComputeHost, agent_service
from tests.rig.guest import GuestShell
from tests.rig.guest_image import GuestImage, Service, build
from tests.rig.kept import cache_directory
from tests.rig.rabbit import RabbitServer
from tests.rig.traffic import TrafficProcess
from vchan.client import Client
from vchan.errors import RemoteError

TOPIC = "demo"
JOURNAL = "/run/ran"
AGENT = agent_service("agent", "/app/agent.py", TOPIC, JOURNAL)
MIGRATION_TIMEOUT_S = 90.0
DURABLE = "amqp_durable_queues=true"
"""For a broker's URL: exchanges outlive the broker. oslo.messaging's own default does not."""


class Cloud:
    """A broker, two hosts, and the image of their guests.

    Args:
        directory: A short path: see `LibvirtHost`.
        second_tree: The second host's libvirt and QEMU are those of this tree: see `LibvirtHost`.
    """

    def __init__(self, directory: Path, *, second_tree: Path | None = None) -> None:
        self._second_tree = second_tree
        self.directory = directory
        self._stack = contextlib.ExitStack()
        self._runs = itertools.count(1)
        self._shared: Vm | None = None

    def __enter__(self) -> Self:
        here = Path(__file__).parent
        programs = {
            "app/agent.py": "counting_agent.py",
            "app/asker.py": "asking_agent.py",
            "app/http_agent.py": "http_agent.py",
        }
        image = build({path: here / name for path, name in programs.items()})
        self.image = image.staged(self.directory)
        (self.directory / "r").mkdir()
        tree, own = self._second_tree, cache_directory() / "libvirt"
        second = own if tree is None else tree.with_name("libvirt")
        with contextlib.ExitStack() as stack:
            self.rabbit = stack.enter_context(RabbitServer(self.directory / "r"))
            self.url = f"{self.rabbit.url}?{DURABLE}"
            self.a, self.b = (
                stack.enter_context(
                    ComputeHost(self.directory / name, number, warm_cache, self.url, tree=its_tree)
                )
                for number, name, warm_cache, its_tree in (
                    (1, "a", own, None),
                    (2, "b", second, tree),
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def using(self, url: str) -> Iterator[None]:
        """Everybody talks to another broker meanwhile."""
        before, self.url = self.url, url
        try:
            self._restart_daemons()
            yield
        finally:
            self.url = before
            self._restart_daemons()

    def _restart_daemons(self) -> None:
        for host in (self.a, self.b):
            host.daemon.stop()
            host.daemon.use_broker(self.url)
            host.daemon.start()

    def boot(
        self,
        name: str,
        services: Sequence[Service] = (GUEST_DAEMON, AGENT),
        *,
        wait: bool = True,
        image: GuestImage | None = None,
        **options: Any,
    ) -> Vm:
        """A new VM on the first host, ready. Options: `domain_xml`'s."""
        vm = Vm(self, name, self.a.start_vm(name, image or self.image, services, **options))
        if wait:
            vm.wait_ready()
        return vm

    def shared_vm(self) -> Vm:
        """A VM that is ready, with both hosts up: the last one given out, if it still is good."""
        for host in (self.a, self.b):
            host.heal()
        if self._shared is not None and not self._shared.runs():
            self.drop_shared_vm()
        if self._shared is None:
            self._shared = self.boot(f"vm{next(self._runs)}")
        self._shared.wait_ready()
        return self._shared

    def drop_shared_vm(self) -> None:
        """Let the next test have a new one."""
        if self._shared is not None:
            self._shared.discard()
            self._shared = None

    def run_name(self) -> str:
        """A prefix for the senders of one run of traffic."""
        return f"run{next(self._runs)}-"

    def logs(self) -> str:
        """Both daemons', for failures."""
        return "\n".join(f"{host.name}:\n{tail(host.daemon.log)}" for host in (self.a, self.b))


class Vm:
    """A VM, wherever it is."""

    def __init__(self, cloud: Cloud, name: str, uuid: str) -> None:
        self.cloud = cloud
        self.name = name
        self.uuid = uuid
        self.here, self.there = cloud.a, cloud.b

    @property
    def domain(self) -> Any:
        """libvirt's, on the host where it is."""
        return self.here.domain(self.name)

    def wait_ready(self) -> None:
        """Wait until its agent can be called."""
        self.here.daemon.wait_ready(self.name, topics=[TOPIC])

    def status(self, host: ComputeHost | None = None) -> Any:
        """What vchan-host says of it, here or on another host; "state": "unknown" if nothing."""
        try:
            return (host or self.here).daemon.status(self.name)
        except RemoteError as error:
            if error.class_name != "NoSuchDomain":
                raise
            return {"state": "unknown"}

    def wait_status(
        self, reached: Callable[[Any], bool], what: str, host: ComputeHost | None = None
    ) -> Any:
        """Wait until its status is so."""
        seen: list[Any] = [None]

        def look() -> bool:
            seen[0] = self.status(host)
            return reached(seen[0])

        wait_until(
            look,
            timeout_s=GUEST_TIMEOUT_S,
            interval_s=0.05,
            failure=lambda: f"{self.name}: {what}: {seen[0]}\n{self.cloud.logs()}",
        )
        return seen[0]

    def wait_libvirt(self, *words: str) -> None:
        """Wait until the daemon's word on libvirt has one of these in it."""

        def says() -> bool:
            told = self.here.daemon.call("status")["libvirt"]
            return any(word in told for word in words)

        wait_until(
            says,
            timeout_s=GUEST_TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"libvirt is not {words}: {self.cloud.logs()}",
        )

    def runs(self) -> bool:
        """Whether it can be used as it is."""
        try:
            return bool(self.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)
        except libvirt.libvirtError:
            return False

    def discard(self) -> None:
        """End it, wherever it is and whatever state it is in."""
        for host in (self.here, self.there):
            for step in ("destroy", "managedSaveRemove", "undefine"):
                # It may be gone, off, or never have been saved.
                with contextlib.suppress(libvirt.libvirtError):
                    getattr(host.domain(self.name), step)()

    @contextlib.contextmanager
    def shell(self) -> Iterator[GuestShell]:
        """A shell in it, until it migrates."""
        shell = self.here.shell(self.name)
        try:
            yield shell
        finally:
            shell.close()

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """A client of the daemon of the host it is on."""
        with Client(str(self.here.daemon.socket)) as client:
            yield client

    def ran(self, sender: str) -> list[int]:
        """What its agent says it ran for a sender, in order."""
        with self.client() as client:
            found: list[int] = client.call(
                TOPIC,
                "executed",
                {"sender": sender, "start": 0, "count": 1 << 30},
                server=self.uuid,
                timeout_s=30,
            )
        return found

    def migrate(self, *, live: bool = True) -> None:
        """To the other host."""
        self.here.migrate(self.name, self.there, live=live)
        self.moved()

    def moved(self) -> None:
        """Somebody migrated it."""
        self.here, self.there = self.there, self.here

    @contextlib.contextmanager
    def traffic(self, *, wait: bool = True, **options: Any) -> Iterator[TrafficProcess]:
        """Calls, casts and fanouts to it; see `TrafficProcess`."""
        options = {"fanouts_per_s": 5, "progress_s": 0.2, "call_timeout": 90, **options}
        log = self.cloud.directory / "traffic.log"
        name = options.pop("name", None) or self.cloud.run_name()
        with TrafficProcess(self.cloud.url, self.uuid, TOPIC, log, name=name, **options) as traffic:
            if wait:
                traffic.wait_for("calls_answered", 5)
            yield traffic


class HeldMigration:
    """A live migration in the background that stays under way until `go`.

    Its bandwidth is 1 MiB/s, so that a guest's memory takes a minute or more.
    """

    def __init__(self, vm: Vm, *, live: bool = True) -> None:
        self._vm = vm
        self._domain = vm.domain
        self._connection = vm.here.libvirt.open()  # a migration occupies its connection
        self._flags = libvirt.VIR_MIGRATE_PEER2PEER | (libvirt.VIR_MIGRATE_LIVE if live else 0)
        if self._domain.isPersistent():
            self._flags |= libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
        self.error: Any = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._connection.close()

    def _run(self) -> None:
        destination = self._vm.there.libvirt
        parameters = {
            libvirt.VIR_MIGRATE_PARAM_URI: destination.migrate_uri(),
            libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 1,  # MiB/s
        }
        try:
            domain = self._connection.lookupByUUIDString(self._vm.uuid)
            domain.migrateToURI3(destination.uri, parameters, self._flags)
        except libvirt.libvirtError as error:
            self.error = error

    def go(self) -> None:
        """Let it end, and wait for that.

        Raises:
            RigError: It failed.
        """
        self._domain.migrateSetMaxSpeed(1000, 0)
        self._join()
        if self.error is not None:
            raise RigError(f"the migration failed: {self.error}")
        self._vm.moved()

    def abort(self) -> None:
        """End it: the VM stays where it was."""
        self._end()
        self.failed()

    def _end(self) -> None:
        for _ in range(int(MIGRATION_TIMEOUT_S)):
            if not self._thread.is_alive():
                return
            with contextlib.suppress(libvirt.libvirtError):  # not begun, or just over
                self._domain.abortJob()
            self._thread.join(1.0)

    def failed(self) -> None:
        """It was made to fail: wait for that."""
        self._join()
        if self.error is None:
            raise RigError("the migration succeeded")

    def _join(self) -> None:
        self._thread.join(MIGRATION_TIMEOUT_S)
        if self._thread.is_alive():
            raise RigError("the migration does not end")
