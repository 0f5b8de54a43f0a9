"""The other shapes in a real guest: agents in any language over HTTP, and HTTP to services under
the cloud; with a stock control plane behind a real broker."""

from __future__ import annotations

import contextlib
import json
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_qemu, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud
    from tests.rig.compute import HostDaemon
    from tests.rig.guest import QemuGuest
    from tests.rig.rabbit import RabbitServer

MISSING = missing_for_rabbit() or missing_for_libvirt() or missing_for_qemu()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

WAIT_S = 120.0
ROOT = Path(__file__).parents[2]
UUID = "5ea90000-0000-4000-8000-000000000001"
TOKEN = "a-token-of-the-guest-s-own"
BASE = "http://127.0.0.1:8779"
START_HTTP = f"""#!/bin/sh
ifconfig lo up
umask 077
echo {TOKEN} >/run/token
exec python3 -m vchan.gateways.http --listen tcp:127.0.0.1:8779 --token-file /run/token
"""
POLICY = """
listen,reply any any allow
call,cast,notify any control allow
http any vchan/metadata method:GET allow
http any vchan/metadata method:HEAD allow
"""


class Metadata(BaseHTTPRequestHandler):
    """Tells who asked for what."""

    def do_GET(self) -> None:
        names = ("X-Vchan-Instance-ID", "X-Instance-ID", "User-Agent", "Authorization")
        told = {"path": self.path, **{name: self.headers.get(name) for name in names}}
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def metadata() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/base"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def rabbit(short_directory: Path) -> Iterator[RabbitServer]:
    from tests.rig.rabbit import RabbitServer

    directory = short_directory / "shapes-r"
    directory.mkdir()
    with RabbitServer(directory) as rabbit:
        yield rabbit


@pytest.fixture(scope="module")
def guest(short_directory: Path) -> Iterator[QemuGuest]:
    from tests.rig.guest import GuestSpec, QemuGuest
    from tests.rig.guest_image import Service, build

    image = build(
        {"app/start-http": START_HTTP.encode(), "app/agent.sh": ROOT / "examples" / "agent.sh"}
    )
    services = (
        Service("vchan-guest", "python3 -m vchan.guest.daemon"),
        Service("vchan-http", "sh /app/start-http"),
        Service("agent", f"sh /app/agent.sh {BASE} {TOKEN}"),
    )
    with QemuGuest(short_directory / "shapes", GuestSpec(image, services)) as guest:
        yield guest


@pytest.fixture(scope="module")
def host(
    short_directory: Path, rabbit: RabbitServer, guest: QemuGuest, metadata: str
) -> Iterator[HostDaemon]:
    """vchan-host without libvirt: it is told where the guest's channel is."""
    from tests.rig.compute import HostDaemon

    directory = short_directory / "shapes-host"
    directory.mkdir()
    options = [
        f"channels = {UUID}=connect:{guest.port()}",
        f"http_services = metadata={metadata}, secret={metadata}",
    ]
    daemon = HostDaemon(directory, "host", "", rabbit.url, options=options)
    daemon.policy.write_text(POLICY)
    try:
        daemon.start()
        daemon.wait_ready(UUID, topics=["shell"])
        yield daemon
    finally:
        daemon.stop()


class Api:
    """vchan-http, as a program in the guest sees it: through busybox's wget."""

    def __init__(self, guest: QemuGuest) -> None:
        self._guest = guest

    def wget(self, path: str, *words: str) -> Any:
        """(whether it succeeded, what it printed)."""
        options = ("-O", "-", "--header", f"Authorization: Bearer {TOKEN}", *words)
        command = " ".join(f"'{word}'" for word in ("wget", *options, f"{BASE}{path}"))
        return self._guest.shell(command, timeout_s=WAIT_S)

    def ask(self, verb: str, **members: Any) -> Any:
        finished = self.wget(f"/v1/{verb}", "-q", "--post-data", json.dumps(members))
        assert finished.status == 0, finished.output
        return json.loads(finished.output) if finished.output.strip() else None


@pytest.fixture
def api(host: HostDaemon, guest: QemuGuest) -> Api:
    return Api(guest)


@contextlib.contextmanager
def oslo_client(rabbit: RabbitServer, topic: str) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oslo's own deprecations
        import oslo_messaging
        from oslo_config import cfg

        conf = cfg.CONF
        conf([], project="vchan-test", default_config_files=[], default_config_dirs=[])
        transport = oslo_messaging.get_rpc_transport(conf, url=rabbit.url)
        target = oslo_messaging.Target(topic=topic)
        client = oslo_messaging.get_rpc_client(transport, target)
    try:
        yield client.prepare(server=UUID, timeout=WAIT_S)
    finally:
        transport.cleanup()


def test_a_stock_client_calls_an_agent_in_shell(api: Api, rabbit: RabbitServer) -> None:
    with oslo_client(rabbit, "shell") as client:
        assert client.call({}, "shout", text="hello") == "HELLO"
        with pytest.raises(Exception, match="only shout and note"):
            client.call({}, "dance")


def test_casts_to_an_agent_in_shell_run_once_in_order(
    api: Api, rabbit: RabbitServer, guest: QemuGuest
) -> None:
    with oslo_client(rabbit, "shell") as client:
        for number in range(10):
            client.cast({}, "note", text=f"note {number}")
        assert client.call({}, "shout", text="done") == "DONE"  # runs after them
    notes = guest.shell("cat /tmp/notes").output.splitlines()
    assert notes == [f"note {number}" for number in range(10)]


def test_a_shell_asks_a_stock_service(
    api: Api, rabbit: RabbitServer, short_directory: Path
) -> None:
    from tests.rig.control_service import ControlService

    with ControlService(rabbit.url, "control", short_directory / "control.log") as service:
        args = {"sender": "shell", "number": 1}
        answer = api.ask("call", topic="control", method="echo", args=args, timeout_s=60)
        assert answer == {"result": ["shell", 1, ""]}
        args["number"] = 2
        api.ask("cast", topic="control", method="note", args=args)
        ran = service.finish()["shell"]
    assert [(entry.number, entry.instance_uuid) for entry in ran] == [(1, UUID), (2, UUID)]


def test_what_the_policy_denies_is_forbidden(api: Api) -> None:
    asked = json.dumps({"topic": "conductor", "method": "echo"})
    finished = api.wget("/v1/call", "--post-data", asked)
    assert finished.status != 0
    assert "403 Forbidden" in finished.output


def test_a_service_under_the_cloud_knows_who_asks(api: Api) -> None:
    mine = ("--header", "X-Instance-ID: another", "--user-agent", "a-guest")
    finished = api.wget("/proxy/metadata/latest/user-data?x=1", "-q", *mine)
    assert finished.status == 0, finished.output
    assert json.loads(finished.output) == {
        "path": "/base/latest/user-data?x=1",
        "X-Vchan-Instance-ID": UUID,
        "X-Instance-ID": UUID,
        "User-Agent": "a-guest",
        "Authorization": None,
    }


@pytest.mark.parametrize(
    ("path", "words", "status"),
    [
        ("/proxy/secret/x", (), "403 Forbidden"),  # there, and not for this VM
        ("/proxy/metadata/x", ("--post-data", "x"), "403 Forbidden"),
        ("/proxy/nothing/x", (), "403 Forbidden"),
        ("/proxy/metadata/%2e%2e/x", (), "400 Bad Request"),
    ],
)
def test_what_may_not_be_asked_of_services(
    api: Api, path: str, words: tuple[str, ...], status: str
) -> None:
    finished = api.wget(path, *words)
    assert finished.status != 0
    assert status in finished.output


def test_without_the_token_nobody_is_served(api: Api, guest: QemuGuest) -> None:
    finished = guest.shell(f"wget -O - {BASE}/v1/status")
    assert finished.status != 0
    assert "401" in finished.output


def test_the_programs_are_light(api: Api, guest: QemuGuest) -> None:
    told = guest.shell("grep VmRSS /proc/$(cat /run/vchan-http.pid)/status").output
    assert int(told.split()[1]) < 30 * 1024, told


def test_an_agent_over_http_through_live_migrations(cloud: Cloud) -> None:
    from tests.rig.compute import GUEST_DAEMON, agent_service
    from tests.rig.guest_image import Service

    services = (
        GUEST_DAEMON,
        Service("vchan-http", "python3 -m vchan.gateways.http"),
        agent_service("agent", "/app/http_agent.py", "demo", "/run/ran"),
    )
    vm = cloud.boot("http", services)
    try:
        # Every request takes this guest, which is emulated, two or three of HTTP.
        with vm.traffic(casts_per_s=5, fanouts_per_s=1, callers=1) as traffic:
            for _ in range(3):
                vm.migrate()
                traffic.flows()
            with vm.shell() as shell:
                shell.check("kill -9 $(cat /run/vchan-guest.pid)")
            traffic.flows()
            report = traffic.finish()
        report.check()
    finally:
        vm.discard()


def test_nothing_is_left_waiting(host: HostDaemon, api: Api) -> None:
    def idle() -> bool:
        return bool(host.status(UUID)["requests"]["open"] == 0)

    wait_until(idle, timeout_s=WAIT_S, interval_s=0.2, failure=lambda: str(host.status(UUID)))
