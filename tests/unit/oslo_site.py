"""Unmodified oslo.messaging programs, and the daemons they attach to by vchan://, on sockets.

A `Site` is a host with one VM: the host's daemon without libvirt and broker, on a thread; the real
guest daemon, as a process; a `Cable` between them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from tests.rig.gates import OpenGate
from tests.rig.phases import release, serve
from tests.unit.cable import Cable
from vchan.errors import LinkError, NoSuchDomain, Rejected
from vchan.host.hypervisor.domains import Domain
from vchan.host.local.programs import LocalService, SendAnswer, Streams
from vchan.host.vm.channel import Channel, Home
from vchan.host.vm.streams import Program
from vchan.io.local_socket import LocalServer
from vchan.io.loop import Loop
from vchan.io.streams import connect_unix
from vchan.rpc.in_flight import Outcome
from vchan.rpc.messages import Request, Topic

with warnings.catch_warnings():  # their modules warn about their own future
    warnings.simplefilter("ignore")
    with suppress(ImportError, ValueError, RuntimeError):  # an old one, or without cotyledon
        from oslo_service import backend

        if backend.get_backend_type() is None:
            backend.init_backend(backend.BackendType.THREADING)
    import futurist._thread
    import oslo_messaging
    from oslo_config import cfg
    from oslo_messaging._drivers import base as base

    from vchan import oslo_driver as oslo_driver

om = oslo_messaging
futurist._thread.ThreadWorker.MAX_IDLE_FOR = 0.05  # the end of each server waits for it: 1 s
ROOT: Final = Path(__file__).parents[2]
VM: Final = "6f1e2d3c-0000-4000-8000-000000000001"
WAIT_S: Final = 30.0

T = TypeVar("T")


def wait(reached: Callable[[], bool], failure: Callable[[], object] = lambda: "") -> None:
    """Until it is so."""
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s, failure()
        time.sleep(0.005)


SERVER_THREADS = 8
"""In place of 64. Each that has nothing to do looks for work once a second, and a module's servers
stay until its end: 250 of them took the interpreter from each other until nothing else went on."""


def conf() -> Any:
    """The global one: some releases look up options there alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg.CONF([], project="vchan-test", default_config_files=[])
    return cfg.CONF


class HostSide:
    """The host's daemon, with the socket `path`, and the channel of `VM` on the socket `port`."""

    def __init__(self, path: Path, port: Path) -> None:
        self.path = path
        self.log: list[str] = []
        self.loop = Loop()
        self.local = LocalService(self.loop, self, self.log.append)
        self.server: LocalServer | None = None
        home = Home("host", os.urandom(16), frozenset({"*"}), self._note)
        self.channel = Channel(self.loop, Domain(VM), home, None, OpenGate(), self._offer)
        self._port = port
        self._thread = threading.Thread(target=self.loop.run, name="host-side")

    def _note(self, text: str) -> None:
        self.log.append(text)

    def _offer(
        self, request: Request, told: Callable[[Outcome, float], None]
    ) -> Callable[[], None] | None:
        return self.local.offer(request, told, or_broker=False)

    def run(self, function: Callable[[], T]) -> T:
        """Run something on the loop's thread."""
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)
                raise

        self.loop.call_soon_threadsafe(work)
        return done.result(WAIT_S)

    def up(self) -> None:
        """Open the local socket: as if the daemon had just started."""

        def up() -> None:
            self.local = LocalService(self.loop, self, self._note)
            self.server = LocalServer(
                self.loop, str(self.path), 0o660, os.urandom(16), "host", self.local, self._note
            )

        self.run(up)

    def _end_grace(self) -> None:
        """Nobody is about to come back: refuse what nobody serves at once."""
        self.local._servers._grace_until_s = None

    def down(self) -> None:
        """Close it, with every connection: as if the daemon had died."""

        def down() -> None:
            assert self.server is not None
            self.server.close()
            self.server = None

        self.run(down)

    def drop_peers(self) -> None:
        """Lose the connections of all programs; the daemon lives on."""

        def drop() -> None:
            assert self.server is not None
            for key in list(self.server._links):
                self.server.drop(key, "as asked")

        self.run(drop)

    # What `local.Guests` asks for.

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        if server not in (VM, "vm"):
            raise NoSuchDomain(f"{server!r}: this host has no such domain")
        self.channel.downward.submit_local(request, told, self.loop.time())
        self.channel.set_timer()
        return lambda: self.channel.downward.cancel_local(request.id)

    def serving(self, topic: Topic) -> list[str]:
        return [VM] if topic in self.channel.downward.topics else []

    def open_streams(self, vm: str, target: str, number: int, program: Program) -> Streams:
        raise Rejected(f"{vm}: its vchan-guest takes no byte streams: upgrade it")

    def method(self, name: str, args: Mapping[str, Any], answer: SendAnswer) -> None:
        raise KeyError(name)

    def __enter__(self) -> Self:
        self._thread.start()
        self.up()
        self.run(self._end_grace)
        self.run(lambda: serve(self.channel, self._port))
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            self.down()
        self.run(lambda: release(self.channel))
        self.loop.stop()
        self._thread.join(WAIT_S)
        self.loop.close()


class Site:
    """See the top of this file. The guest's daemon runs once something asks for `agent_url`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._cable = Cable(directory)
        self.host = HostSide(directory / "host.sock", self._cable.host)
        self.guest_module = "vchan.guest.daemon"
        self._guest: subprocess.Popen[bytes] | None = None
        self._transports: list[Any] = []
        self._servers: list[Any] = []

    # ---------------------------------------------------------------- daemons

    @property
    def host_url(self) -> str:
        """The host's socket."""
        return f"vchan://{self.host.path}"

    @property
    def agent_url(self) -> str:
        """The guest's socket."""
        self.start_guest()
        return f"vchan://{self.directory}/agent.sock"

    def start_guest(self) -> None:
        """Start the guest's daemon, if it does not run."""
        if self._guest is None:
            port, socket = f"unix:{self._cable.guest}", str(self.directory / "agent.sock")
            command = [sys.executable, "-m", self.guest_module, "--port", port]
            with (self.directory / "guest.log").open("ab") as log:
                self._guest = subprocess.Popen(
                    [*command, "--socket", socket],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            wait(self._guest_listens)

    def _guest_listens(self) -> bool:
        """The socket has its name a moment before anybody listens."""
        try:
            connect_unix(f"{self.directory}/agent.sock").close()
        except LinkError:
            return False
        return True

    def kill_guest(self) -> None:
        """Kill the guest's daemon; its agents live on."""
        if self._guest is not None:
            self._guest.kill()
            self._guest.wait()
            self._guest = None
            (self.directory / "agent.sock").unlink(missing_ok=True)

    def wait_served(self, topic: str) -> None:
        """Until the host knows that the guest serves a topic."""
        wait(
            lambda: topic in {t.name for t in self.host.channel.downward.topics},
            lambda: (self.directory / "guest.log").read_text(),
        )

    # ---------------------------------------------------------------- programs

    def transport(self, url: str, exmods: tuple[str, ...] = ()) -> Any:
        """For RPC."""
        transport = om.get_rpc_transport(conf(), url, allowed_remote_exmods=list(exmods))
        self._transports.append(transport)
        return transport

    def notification_transport(self, url: str) -> Any:
        """For notifications."""
        transport = om.get_notification_transport(conf(), url)
        self._transports.append(transport)
        return transport

    def driver(self, url: str, **options: Any) -> oslo_driver.VchanDriver:
        """The bare driver."""
        driver = oslo_driver.VchanDriver(conf(), om.TransportURL.parse(conf(), url), **options)
        self._transports.append(driver)
        return driver

    def serve(
        self, url: str, endpoint: object, topic: str = "t", server: str = "s", **target: Any
    ) -> Any:
        """A started RPC server."""
        return self.run_server(
            om.get_rpc_server(
                self.transport(url), om.Target(topic=topic, server=server, **target), [endpoint]
            )
        )

    def run_server(self, server: Any) -> Any:
        """Start it, and stop it in the end."""
        server.start(override_pool_size=SERVER_THREADS)
        self._servers.append(server)
        return server

    def end_server(self, server: Any) -> None:
        """Stop it now."""
        self._servers.remove(server)
        server.stop()
        server.wait()

    def client(
        self, url: str, topic: str = "t", *, exmods: tuple[str, ...] = (), **options: Any
    ) -> Any:
        """An RPC client."""
        make = getattr(om, "get_rpc_client", om.RPCClient)  # the older releases have the class only
        target = om.Target(topic=topic, server=options.pop("server", None))
        return make(self.transport(url, exmods), target, **options)

    def __enter__(self) -> Self:
        self._cable.__enter__()
        self.host.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.stop()
            server.wait()
        for transport in self._transports:
            transport.cleanup()
        self.host.__exit__()
        self.kill_guest()
        self._cable.__exit__()


@contextmanager
def made_site() -> Iterator[Site]:
    """A site in a directory with a short name."""
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name, Site(Path(name)) as site:
        yield site


def descriptors() -> int:
    """This process's open files."""
    return len(list(Path("/proc/self/fd").iterdir()))
