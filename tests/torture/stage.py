"""The parts: a broker, two hosts, some VMs, the control side, and everybody's records."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import libvirt

from tests.rig import RigError, wait_until
from tests.rig.compute import GUEST_DAEMON, ComputeHost
from tests.rig.guest import GuestShell
from tests.rig.guest_image import SITE, Service, build
from tests.rig.kept import cache_directory
from tests.rig.libvirtd import channel_path, domain_xml
from tests.rig.libvirtd import migrate as migrate_domain
from tests.rig.rabbit import RabbitServer
from tests.torture import control
from tests.torture.in_guest import ASKER, GUESTS, PORTS, PROGRAMS, RUNNER
from tests.torture.oracle import Evidence, Fault
from tests.torture.records import Book, Health
from vchan.client import Client
from vchan.errors import VchanError

QUERY: Final = "amqp_durable_queues=true&rabbit_transient_quorum_queue=true"
"""Everything outlives the broker, callers' queues for replies too: what is lost, vchan has lost."""
MEMORY_MIB: Final = 208
"""The least that boots: a migration's time is its memory's."""
READY_S: Final = 120.0
SHELL_S: Final = 60.0
SHELL_PORT: Final = "org.vchan.test.0"
HERE: Final = Path(__file__).parent
IN_GUEST: Final = ("__init__.py", "payload.py", "records.py", "in_guest.py")


def services() -> list[Service]:
    """What runs in each guest."""
    programs = [Service(name, f"python3 -m tests.torture.in_guest {name}") for name in PROGRAMS]
    return [GUEST_DAEMON, *programs]


class Vm:
    """A VM, wherever it is.

    Its methods open their own connections to libvirt: several VMs are at work at a time.
    """

    def __init__(self, name: str, hosts: tuple[ComputeHost, ComputeHost]) -> None:
        self.name = name
        self.uuid = str(uuid.uuid4())
        self.here, self.there = hosts

    @contextlib.contextmanager
    def domain(self) -> Iterator[Any]:
        """libvirt's, on the host where it is: a migration that was said to have failed may have
        succeeded.

        Raises:
            RigError: It is on neither host.
        """
        for _ in range(2):
            with contextlib.closing(self.here.libvirt.open()) as connection:
                try:
                    found = connection.lookupByUUIDString(self.uuid)
                except libvirt.libvirtError:
                    self.here, self.there = self.there, self.here
                    continue
                yield found
                return
        raise RigError(f"{self.name} is on neither host")

    def migrate(self) -> None:
        """Live, to the other host.

        Raises:
            libvirt.libvirtError: It failed.
        """
        with self.domain() as domain:
            migrate_domain(domain, self.there.libvirt)
        self.here, self.there = self.there, self.here

    def run(self, script: str) -> None:
        """Run a script in it.

        Raises:
            RigError: It failed.
        """
        with self.domain() as domain:
            path = channel_path(domain, SHELL_PORT)
        shell = GuestShell(path)
        try:
            shell.check(script, timeout_s=SHELL_S)
        finally:
            shell.close()

    def status(self) -> Any:
        """What the daemon of its host says of it.

        Raises:
            VchanError: The daemon is not there, or does not know it.
        """
        return self.here.daemon.status(self.name)

    def call_asker(self, method: str, **args: Any) -> Any:
        """Call the program that asks, by its host."""
        with Client(str(self.here.daemon.socket)) as client:
            return client.call(ASKER, method, args, server=self.uuid, timeout_s=20)

    def wait_ready(self) -> None:
        """Wait until both programs of it can be called, also by the broker.

        Raises:
            RigError: It took over READY_S: the promise that everything ends is broken.
        """
        wait_until(
            self._is_ready,
            timeout_s=READY_S,
            interval_s=0.2,
            failure=lambda: f"{self.name} is not ready on {self.here.name} in {READY_S:.0f} s",
        )

    def _is_ready(self) -> bool:
        try:
            status = self.status()
            rows = [row for row in self.here.daemon.call("list") if row["name"] == self.name]
        except VchanError:
            return False
        if not rows or rows[0]["channel"] != "ready":
            return False
        late = status["requests"]["unconsumed_topics"]
        served = {name.partition("/")[2] for name in rows[0]["topics"] if name not in late}
        return served >= {*PROGRAMS, "all"}


class Stage:
    """All of it; leaving it ends all of it.

    Args:
        directory: A short path: see `LibvirtHost`.
        vms: How many.
        call_timeout_s: Of calls into guests.
    """

    def __init__(self, directory: Path, vms: int, call_timeout_s: int) -> None:
        self.directory = directory
        self._call_timeout_s = call_timeout_s
        self._vms = vms
        self._stack = contextlib.ExitStack()
        self.faults: list[Fault] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        directory = self.directory
        programs: dict[str, bytes | Path] = {f"{SITE}/tests/__init__.py": b""}
        programs |= {f"{SITE}/tests/torture/{name}": HERE / name for name in IN_GUEST}
        self.image = build(programs).staged(directory)
        (directory / "r").mkdir()
        self.rabbit = stack.enter_context(RabbitServer(directory / "r"))
        self.url = f"{self.rabbit.url}?{QUERY}"
        cache = cache_directory() / "libvirt"
        a, b = (
            stack.enter_context(self._host(name, number, cache))
            for number, name in ((1, "a"), (2, "b"))
        )
        self.hosts = (a, b)
        self._open_books()
        log = directory / "control.log"
        stack.enter_context(control.service_program(self.url, self.service.path, log))
        self._boot()
        identities = [vm.uuid for vm in self.vms]
        sender = control.sender_program(
            self.url, self.control.path, identities, log, self._call_timeout_s
        )
        self.sender = stack.enter_context(sender)

    def _host(self, name: str, number: int, cache: Path) -> ComputeHost:
        options = [f"reports_topic = {GUESTS}"]
        host = ComputeHost(self.directory / name, number, cache, self.url, options=options)
        policy = host.daemon.policy
        policy.write_text(f"{policy.read_text()}\nreport any any allow\n")
        return host

    def _open_books(self) -> None:
        records = self.directory / "records"
        records.mkdir()
        records.chmod(0o777)  # QEMU runs as another user
        self.control = Book(records / "control")
        self.service = Book(records / "service")
        self.vms = [Vm(f"vm{number}", self.hosts) for number in range(self._vms)]
        self.guests = {
            vm.uuid: {
                program: Book(records / f"{vm.name}-{program}", time.monotonic)
                for program in PROGRAMS
            }
            for vm in self.vms
        }

    def _boot(self) -> None:
        host = self.hosts[0]
        for vm in self.vms:
            files = {PORTS[program]: book.path for program, book in self.guests[vm.uuid].items()}
            xml = domain_xml(
                vm.name,
                vm.uuid,
                self.image,
                console=host.libvirt.console_path(vm.name),
                services=services(),
                memory_mib=MEMORY_MIB,
                files=files,
            )
            host.connection.defineXML(xml).create()
        for vm in self.vms:
            vm.wait_ready()

    def read(self) -> Evidence:
        """Everything that was recorded so far."""
        return Evidence(
            control=self.control.read(),
            service=self.service.read(),
            guests={
                vm: {program: book.read() for program, book in books.items()}
                for vm, books in self.guests.items()
            },
            faults=tuple(self.faults),
            runner=RUNNER,
        )

    def torn(self) -> list[str]:
        """Lines that are no records."""
        books = [self.control, self.service]
        books += [book for programs in self.guests.values() for book in programs.values()]
        return [f"{book.path.name}: {line}" for book in books for line in book.torn]

    def consoles(self) -> Sequence[Path]:
        """What the guests' kernels and inits said: one file a VM, wherever it was."""
        return [self.hosts[0].libvirt.console_path(vm.name) for vm in self.vms]

    def uuid_of(self, name: str) -> str:
        """Of the VM of this name."""
        return next(vm.uuid for vm in self.vms if vm.name == name)

    def stuck(self, for_s: float) -> list[tuple[Vm, float]]:
        """VMs whose daemon runs, and has opened nothing but its three for so long: since when.

        The memory that a process fills while its emulated machine moves is what that machine loses
        now and then; an interpreter may then look for ever for what it had put there.
        """
        found = []
        for vm in self.vms:
            records = self.guests[vm.uuid][ASKER].read()
            health = [record for record in records if isinstance(record, Health)]
            last = list(takewhile(lambda each: 0 < each.descriptors <= 3, reversed(health)))
            if last and last[0].at_s - last[-1].at_s >= for_s:
                found.append((vm, last[-1].at_s))
        return found

    def stand(self) -> list[str]:
        """No new requests; returns who waits for an answer all the same.

        Raises:
            RigError: A guest's asker cannot be reached.
        """
        waiting: list[str] = self.sender.ask("stand")
        for vm in self.vms:
            vm.wait_ready()
            wait_until(
                lambda vm=vm: self._stands(vm),  # type: ignore[misc]
                timeout_s=READY_S,
                interval_s=0.3,
                failure=lambda vm=vm: f"{vm.name}: its own requests do not end",  # type: ignore[misc]
            )
        return waiting

    @staticmethod
    def _stands(vm: Vm) -> bool:
        try:
            return bool(vm.call_asker("stand", still=True))
        except VchanError:
            return False

    def go(self) -> None:
        """Requests again.

        Raises:
            RigError: A guest's asker cannot be reached.
        """
        for vm in self.vms:
            try:
                vm.call_asker("stand", still=False)
            except VchanError as error:
                raise RigError(f"{vm.name} does not go on: {error}") from error
        self.sender.ask("go")
