"""Raw bodies beside a real broker: what goes past it, what callers are told, what is on record."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.rig import end_process, rig_directory, wait_until
from tests.rig.compute import HostDaemon
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_rabbit
from tests.unit.oslo_site import conf, om
from vchan.client import Agent, Client, raw
from vchan.errors import LinkError, NoSuchAgent, Rejected

MISSING = missing_for_rabbit()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).resolve().parents[2]
VM = "aaaaaaaa-0000-4000-8000-000000000001"
POLICY = """\
call          any  store method:wipe  deny
call          any  store              allow
"""
DATA = bytes(range(256)) * 300
WAIT_S = 60.0


class Endpoint:
    """Of the agent, and of the program on the host."""

    def __init__(self) -> None:
        self.ran = 0

    @raw
    def turn(self, data: bytes) -> bytes:
        """Its bytes, from the end."""
        self.ran += 1
        return data[::-1]

    @raw
    def wipe(self, data: bytes) -> bytes:
        """What the policy denies."""
        self.ran += 1
        return data

    def plain(self, x: int) -> int:
        """For JSON."""
        return x


class Site:
    """A broker, a host's daemon, a guest with an agent."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.rabbit = stack.enter_context(RabbitServer(directory / "rabbit"))
        (directory / "host").mkdir()
        port, self.agent_socket = directory / "p", directory / "a"
        self.host = HostDaemon(
            directory / "host",
            "h1",
            "",
            self.rabbit.url,
            options=[f"channels = {VM}=connect:{port}"],
        )
        self.host.policy.write_text(POLICY)
        self.audit = directory / "host" / "audit.log"
        command = (sys.executable, "-m", "vchan.guest.daemon", "--port", f"listen:{port}")
        with (directory / "guest.log").open("ab") as log:
            guest = subprocess.Popen(
                [*command, "--socket", str(self.agent_socket)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        stack.callback(end_process, guest, grace_s=5.0)
        self.agent = Endpoint()
        self.serve(stack, self.agent_socket, "agent", self.agent)
        stack.callback(self.host.stop)
        self.host.start()

    def serve(self, stack: ExitStack, socket: Path, topic: str, endpoint: object) -> None:
        """With an agent on a thread."""
        agent = Agent(socket, log=lambda _: None)
        agent.serve(topic, endpoint)
        thread = threading.Thread(target=agent.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(agent.stop)


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def site(stack: ExitStack) -> Site:
    return Site(stack.enter_context(rig_directory()), stack)


@pytest.fixture
def host(site: Site) -> Iterator[Client]:
    with Client(site.host.socket) as client:

        def serves() -> bool:
            try:
                return bool(client.call("agent", "plain", {"x": 1}, server=VM) == 1)
            except NoSuchAgent:
                return False

        wait_until(serves, timeout_s=WAIT_S, interval_s=0.1, failure=site.host.log.read_text)
        yield client


@pytest.fixture
def guest(site: Site, host: Client) -> Iterator[Client]:
    try:
        with Client(site.agent_socket) as client:
            yield client
    except LinkError as error:
        pytest.fail(str(error))


def test_bytes_go_past_the_broker(host: Client) -> None:
    same = host.call_raw("agent", "turn", DATA, server=VM, timeout_s=WAIT_S) == DATA[::-1]
    assert same, "altered"


def test_a_service_that_calls_a_raw_method_is_told_that_it_has_not_run(
    site: Site, host: Client
) -> None:
    transport = om.get_rpc_transport(conf(), site.rabbit.url)
    try:
        make = getattr(om, "get_rpc_client", om.RPCClient)
        caller = make(transport, om.Target(topic="agent"), timeout=WAIT_S).prepare(server=VM)
        ran = site.agent.ran
        with pytest.raises(om.RemoteError) as caught:
            caller.call({}, "turn")
        assert caught.value.exc_type == "Rejected"
        assert "turn of topic agent takes bytes: use call_raw" in str(caught.value)
        assert site.agent.ran == ran
        assert caller.call({}, "plain", x=2) == 2
    finally:
        transport.cleanup()


def test_what_a_guest_calls_raw_is_judged_and_does_not_reach_the_broker(
    site: Site, guest: Client, stack: ExitStack
) -> None:
    with pytest.raises(Rejected, match="not over the broker"):
        guest.call_raw("store", "turn", DATA)
    assert "raw bodies go to programs on the host" in site.audit.read_text()
    with pytest.raises(Rejected, match="denied to this VM by the host's policy"):
        guest.call_raw("elsewhere", "turn", DATA)
    store = Endpoint()
    site.serve(stack, site.host.socket, "store", store)

    def served() -> bool:
        try:
            return guest.call_raw("store", "turn", DATA, timeout_s=WAIT_S) == DATA[::-1]
        except Rejected:
            return False

    wait_until(served, timeout_s=WAIT_S, interval_s=0.1, failure=site.host.log.read_text)
    with pytest.raises(Rejected, match="denied to this VM by the host's policy"):
        guest.call_raw("store", "wipe", DATA)
    assert store.ran == 1
