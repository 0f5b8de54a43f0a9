"""Two vchan-hosts, joined by a unix socket, relay between the brokers of two networks: counted at
both ends, in both directions, through faults. The programs at both brokers are stock."""

from __future__ import annotations

import contextlib
import itertools
import selectors
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import namespace, rig_directory, wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from vchan.io.streams import connect_unix, listen_unix

if TYPE_CHECKING:
    from tests.rig.compute import HostDaemon
    from tests.rig.rabbit import RabbitServer

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

WAIT_S = 90.0
DURABLE = "amqp_durable_queues=true"
POLICY = "listen any any allow\nreply any any allow\ncall,cast,fanout,notify any any allow\n"
_runs = itertools.count(1)


class Splice:
    """A connection between two unix sockets that can be cut: one client at a time."""

    def __init__(self, near: Path, far: Path) -> None:
        self._far = far
        self._server = listen_unix(str(near), 0o660)
        self._server.setblocking(True)
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.cuts = 0

    def __enter__(self) -> Splice:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        self._thread.join(10)

    def cut(self) -> None:
        """Both ends lose it, with all that is under way."""
        for each in self._pair or ():
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.cuts += 1

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            with near, socket.socket(socket.AF_UNIX) as far:
                try:
                    far.connect(str(self._far))
                except OSError:
                    continue
                self._pair = (near, far)
                with contextlib.suppress(OSError):
                    self._copy(near, far)
                self._pair = None

    def _copy(self, near: socket.socket, far: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if not data:
                        return
                    key.data.sendall(data)


class Side:
    """A broker's side: its vchan-host, a stock server, and the network they are in."""

    def __init__(self, name: str, peer: str, channel: str, directory: Path, network: Any) -> None:
        self.name = name
        self.peer = peer
        self._channel = channel
        self.directory = directory / name
        self._network = network
        self.rabbit: RabbitServer
        self.daemon: HostDaemon

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """In this side's network."""
        with self._network.inside() if self._network else contextlib.nullcontext():
            yield

    @property
    def url(self) -> str:
        return f"{self.rabbit.url}?{DURABLE}"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        from tests.rig.compute import HostDaemon
        from tests.rig.counting_server import CountingServer
        from tests.rig.rabbit import RabbitServer

        self.directory.mkdir(mode=0o755)
        (self.directory / "r").mkdir()
        topic = f"on-{self.name}"
        options = [f"channels = {self.peer}={self._channel}", f"channel_topics = {topic}"]
        with contextlib.ExitStack() as stack:
            with self.inside():
                self.rabbit = stack.enter_context(RabbitServer(self.directory / "r"))
                self.daemon = HostDaemon(self.directory, self.name, "", self.url, options=options)
                stack.callback(self.daemon.stop)
                self.daemon.policy.write_text(POLICY)
                self.daemon.start()
                # The name is the one that the other side's callers know it by.
                log = self.directory / "server.log"
                stack.enter_context(CountingServer(self.url, topic, self.name, log))
            yield

    def close_our_connections(self) -> int:
        """The broker closes vchan-host's alone: a stock server whose own is closed runs again what
        it had not acknowledged, whoever sent it. Returns how many there were."""
        name = f"vchan-host:{self.daemon.pid}"
        with self.inside():
            told = self.rabbit.ctl("list_connections", "pid", "client_properties")
            ours = [line.split("\t")[0] for line in told.splitlines() if f'"{name}"' in line]
            for pid in ours:
                self.rabbit.ctl("close_connection", pid, "closed by the test")
        return len(ours)

    @contextlib.contextmanager
    def traffic(self) -> Iterator[Any]:
        """Calls, casts and fanouts from this side to the server on the other."""
        from tests.rig.traffic import TrafficProcess

        name = f"{self.name}{next(_runs)}-"
        topic, log = f"on-{self.peer}", self.directory / "traffic.log"
        more = {"fanouts_per_s": 5, "progress_s": 0.2, "call_timeout": 90}
        with self.inside():
            process = TrafficProcess(self.url, self.peer, topic, log, name=name, **more)
        with process as traffic:
            traffic.wait_for("calls_answered", 5)
            yield traffic


class Relay:
    """Both sides."""

    def __init__(self, directory: Path, network: Any) -> None:
        near, far = directory / "near.sock", directory / "far.sock"
        self.splice = Splice(near, far)
        self.control = Side("control", "tenant", f"connect:{near}", directory, None)
        self.tenant = Side("tenant", "control", f"listen:{far}", directory, network)

    def wait_ready(self) -> None:
        for side in (self.control, self.tenant):
            side.daemon.wait_ready(side.peer, topics=[f"on-{side.peer}"])


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    """In two networks; where those cannot be made, at two ports of one."""
    with rig_directory() as directory, contextlib.ExitStack() as stack:
        network = None
        if namespace.missing() is None:
            network = stack.enter_context(namespace.Namespace())
        relay = Relay(directory, network)
        for part in (relay.splice, relay.tenant.running(), relay.control.running()):
            stack.enter_context(part)
        relay.wait_ready()
        yield relay


def test_each_network_has_its_own_broker(relay: Relay) -> None:
    address = ("127.0.0.1", relay.tenant.rabbit.port)
    with relay.tenant.inside():
        socket.create_connection(address, timeout=5).close()
    if relay.tenant._network is not None:
        with pytest.raises(OSError):
            socket.create_connection(address, timeout=5)


def test_calls_casts_and_fanouts_in_both_directions(relay: Relay) -> None:
    with relay.control.traffic() as down, relay.tenant.traffic() as up:
        down.flows(50)
        up.flows(50)
        reports = down.finish(), up.finish()
    for report in reports:
        report.check()


def test_the_socket_between_them_is_cut(relay: Relay) -> None:
    with relay.control.traffic() as down, relay.tenant.traffic() as up:
        for _ in range(5):
            relay.splice.cut()
            down.flows()
            up.flows()
        reports = down.finish(), up.finish()
    for report in reports:
        report.check()


@pytest.mark.parametrize("name", ["control", "tenant"])
def test_a_broker_closes_the_connection(relay: Relay, name: str) -> None:
    side: Side = getattr(relay, name)
    with relay.control.traffic() as down, relay.tenant.traffic() as up:
        for _ in range(2):
            assert side.close_our_connections() == 1
            down.flows()
            up.flows()
        reports = down.finish(), up.finish()
    for report in reports:
        report.check()


@pytest.mark.parametrize("name", ["control", "tenant"])
def test_half_of_it_is_killed(relay: Relay, name: str) -> None:
    """Nobody is left who knows what it had published: what is sent again is marked."""
    side: Side = getattr(relay, name)
    with relay.control.traffic() as down, relay.tenant.traffic() as up:
        with side.inside():
            side.daemon.restart()
        down.flows()
        up.flows()
        reports = down.finish(), up.finish()
    for report in reports:
        report.check()


def test_the_far_side_sees_who_asks_and_no_tokens(relay: Relay) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oslo's own deprecations
        import oslo_messaging
        from oslo_config import cfg

        conf = cfg.CONF  # oslo.messaging's tracing looks at no other
        conf([], project="vchan-test", default_config_files=[], default_config_dirs=[])
        transport = oslo_messaging.get_rpc_transport(conf, url=relay.control.url)
        target = oslo_messaging.Target(topic="on-tenant")
        client = oslo_messaging.get_rpc_client(transport, target)
    client = client.prepare(server="tenant", timeout=60)
    try:
        context = {"request_id": "req-1", "auth_token": "secret", "is_admin": True}
        client.call(context, "echo", sender="me", number=1)
        seen = client.call({}, "facts", sender="me")["context"]
        assert seen["request_id"] == "req-1"
        assert seen["vchan_instance_uuid"] == "control"
        assert not {"auth_token", "is_admin"} & set(seen)
        with pytest.raises(Exception, match="as asked"):
            client.call({}, "fail", text="as asked")
    finally:
        transport.cleanup()


def test_without_the_other_half_requests_wait(relay: Relay) -> None:
    with relay.control.traffic() as down:
        with relay.tenant.inside():
            relay.tenant.daemon.stop()
        sent = down.progress.get("casts_sent", 0)
        down.wait_for("casts_sent", sent + 50)
        with relay.tenant.inside():
            relay.tenant.daemon.start()
        down.flows()
        report = down.finish()
    report.check()


def test_the_listening_end_s_socket_takes_one(relay: Relay) -> None:
    status = relay.tenant.daemon.status("control")
    assert status["state"] == "ready"
    with contextlib.closing(connect_unix(status["path"])):
        wait_until(
            lambda: relay.tenant.daemon.status("control")["state"] == "ready",
            timeout_s=WAIT_S,
            interval_s=0.1,
            failure=lambda: str(relay.tenant.daemon.status("control")),
        )
    with relay.control.traffic() as down:
        down.finish().check()
