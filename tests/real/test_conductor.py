"""vchan-conductor between real hosts' daemons and stock services, on a broker that gives the hosts'
account no right to the services."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.rig import end_process, rig_directory, tail, wait_until
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from vchan.client import Client
from vchan.errors import CallTimeout, RemoteError, RequestError

if TYPE_CHECKING:  # it needs libvirt-python, which may be what is missing
    from tests.rig.control_service import ControlService
    from tests.rig.undriven import UndrivenGuest, UndrivenHost

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
SERVICES = "services"
"""The virtual host that the services are on, and the hosts' daemons are not."""

HOST_POLICY = """
listen,reply  any  any  allow
cast,call     any  direct  allow
cast,fanout,call,notify  any  any  conductor
"""


class ConductorProcess:
    """vchan-conductor."""

    def __init__(self, directory: Path, url: str, services_url: str, *options: str) -> None:
        directory.mkdir()
        self.log = directory / "conductor.log"
        self.audit_log = directory / "audit.log"
        self.policy = directory / "policy.d" / "50-rig.policy"
        self.policy.parent.mkdir()
        self._config = directory / "conductor.conf"
        lines = ["[DEFAULT]", f"transport_url = {url}", "[vchan_conductor]", "host = conductor-1"]
        lines += [f"services_url = {services_url}", f"policy_dir = {self.policy.parent}"]
        lines += [f"audit_log = {self.audit_log}", *options]
        self._config.write_text("\n".join([*lines, ""]))
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vchan.conductor.daemon", f"--config-file={self._config}"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_log("serving openstack/vchan")
        return self

    def wait_log(self, words: str, times: int = 1) -> None:
        wait_until(
            lambda: self.log.read_text().count(words) >= times,
            timeout_s=WAIT_S,
            interval_s=0.05,
            failure=lambda: f"never said {words!r}: {tail(self.log)}",
        )

    def set_policy(self, text: str) -> None:
        """Write it, and have it read."""
        before = self.log.read_text().count("policy: ")
        self.policy.write_text(text)
        self.process.send_signal(signal.SIGHUP)
        self.wait_log("policy: ", before + 1)

    def audited(self, count: int) -> list[dict[str, Any]]:
        """The last records; waits for so many."""
        lines: list[str] = []

        def there() -> bool:
            lines[:] = self.audit_log.read_text().splitlines() if self.audit_log.exists() else []
            return len(lines) >= count

        wait_until(there, timeout_s=WAIT_S, interval_s=0.05, failure=lambda: f"{lines}")
        return [json.loads(line) for line in lines[-count:]]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end_process(self.process, grace_s=20.0)


# --- the rig ------------------------------------------------------------------------------------

HOST_CONFIGURE = "^vchan_vm_.*$"
HOST_WRITE = r"^(openstack|amq\.default)$"
HOST_READ = "^vchan_vm_.*$"
HOST_KEYS = "^vchan$"
"""All that the hosts' account may do: docs/conductor.md says what each is for."""


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with rig_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def rabbit(directory: Path) -> Iterator[RabbitServer]:
    with RabbitServer(directory / "rabbit") as rabbit:
        rabbit.ctl("add_vhost", SERVICES)
        rabbit.ctl("set_permissions", "-p", SERVICES, "guest", ".*", ".*", ".*")
        rabbit.ctl("add_user", "host", "secret")
        rabbit.ctl("set_permissions", "-p", "/", "host", HOST_CONFIGURE, HOST_WRITE, HOST_READ)
        rabbit.ctl("set_topic_permissions", "-p", "/", "host", "openstack", HOST_KEYS, "^$")
        yield rabbit


def services_url(rabbit: RabbitServer) -> str:
    return rabbit.url.removesuffix("/") + SERVICES


@pytest.fixture(scope="module")
def conductor(directory: Path, rabbit: RabbitServer) -> Iterator[ConductorProcess]:
    with ConductorProcess(
        directory / "conductor",
        rabbit.url,
        services_url(rabbit),
        "threads = 8",
        "project_calls = 3",
        "project_requests_per_s = 1000",
    ) as conductor:
        yield conductor


@pytest.fixture(scope="module")
def host(
    directory: Path, rabbit: RabbitServer, conductor: ConductorProcess
) -> Iterator[UndrivenHost]:
    from tests.rig.undriven import UndrivenHost

    url = rabbit.url.replace("guest:guest@", "host:secret@")
    with UndrivenHost(
        directory / "host", ["one:project-1"], transport_url=url, policy=HOST_POLICY
    ) as host:
        yield host


@pytest.fixture(scope="module")
def guest(directory: Path, host: UndrivenHost) -> Iterator[UndrivenGuest]:
    from tests.rig.undriven import UndrivenGuest

    with UndrivenGuest(directory / "guest", host.vms["one"]) as guest:
        host.daemon.wait_ready("one")
        yield guest


@pytest.fixture
def client(guest: UndrivenGuest, conductor: ConductorProcess) -> Iterator[Client]:
    conductor.set_policy("cast,call any * allow\nnotify any * allow\n")
    with guest.client() as client:
        yield client


@contextlib.contextmanager
def serving(rabbit: RabbitServer, directory: Path, topic: str) -> Iterator[ControlService]:
    from tests.rig.control_service import ControlService

    with ControlService(services_url(rabbit), topic, directory / "service.log") as service:
        yield service


# --- tests --------------------------------------------------------------------------------------


def test_calls_and_casts_reach_services_the_host_has_no_right_to(
    client: Client,
    rabbit: RabbitServer,
    directory: Path,
    host: UndrivenHost,
    conductor: ConductorProcess,
) -> None:
    with serving(rabbit, directory, "reached") as service:
        args = {"sender": "s", "number": 1, "payload": "x"}
        assert client.call("reached", "echo", args) == ["s", 1, "x"]
        client.cast("reached", "note", {"sender": "s", "number": 2}, context={"is_admin": True})
        # On the same queue: behind the cast.
        last = {"sender": "s", "number": 3}
        assert client.call("reached", "echo", last, server="controller")[1] == 3
        ran = service.finish()["s"]
    assert sorted(entry.number for entry in ran) == [1, 2, 3]
    assert {entry.instance_uuid for entry in ran} == {host.vms["one"].uuid}
    known = {"vchan_host", "vchan_instance_uuid", "vchan_project_id"}
    own = {"client_timeout"}  # oslo.messaging's
    assert all(set(entry.keys) - own == known for entry in ran)
    for record in conductor.audited(3):
        assert (record["verdict"], record["via"]) == ("allow", "undriven")
        assert record["vm"] == host.vms["one"].uuid
        assert record["project"] == "project-1"
        assert record["rule"].endswith("50-rig.policy:1")


def test_an_exception_is_as_without_a_conductor(
    client: Client, rabbit: RabbitServer, directory: Path
) -> None:
    with serving(rabbit, directory, "failing"):
        with pytest.raises(RemoteError) as caught:
            client.call("failing", "fail", {"text": "no such port"})
        assert (caught.value.class_name, caught.value.text) == ("ValueError", "no such port")
        failure = json.loads(caught.value.failure)
        assert (failure["module"], failure["tb"]) == ("builtins", [])
        with pytest.raises(RemoteError) as caught:
            client.call("failing", "fail_oddly", {"text": "odd"})
        failure = json.loads(caught.value.failure)
        assert (failure["class"], failure["message"]) == ("OddError", "odd")
        assert failure["module"] == "__main__"  # the service's


def test_nobody_serves_the_target(client: Client) -> None:
    with pytest.raises(RemoteError) as caught:
        client.call("nobody", "echo", timeout_s=30)
    assert caught.value.class_name == "NoSuchAgent"
    assert "nobody serves openstack/nobody" in caught.value.text


def test_the_conductors_own_policy_decides(
    client: Client, conductor: ConductorProcess, rabbit: RabbitServer, directory: Path
) -> None:
    conductor.set_policy("call any judged method:fail deny\ncall project:project-1 judged allow\n")
    with serving(rabbit, directory, "judged"):
        assert client.call("judged", "echo", {"sender": "s", "number": 1})[1] == 1
        with pytest.raises(RemoteError, match="the conductor's policy denies it") as caught:
            client.call("judged", "fail", {"text": "x"})
        assert caught.value.class_name == "Rejected"
    assert [record["verdict"] for record in conductor.audited(2)] == ["allow", "deny"]


def test_a_policy_that_cannot_be_read_leaves_the_one_before(
    client: Client, conductor: ConductorProcess
) -> None:
    conductor.set_policy("nonsense\n")
    with pytest.raises(RemoteError) as caught:
        client.call("nobody", "echo", timeout_s=30)
    assert caught.value.class_name == "NoSuchAgent"


def test_a_projects_calls_are_bounded(
    client: Client, rabbit: RabbitServer, directory: Path
) -> None:
    args = {"sender": "s", "number": 1, "seconds": 3.0}
    with serving(rabbit, directory, "slow"), ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(client.call, "slow", "slow", args) for _ in range(8)]
        told = [call.exception() for call in calls]
        refused = [str(error) for error in told if error is not None]
        assert len(refused) == 5
        assert all("3 calls of project project-1 wait" in text for text in refused)
        # And when they are over, there is room again.
        assert client.call("slow", "echo", {"sender": "s", "number": 2})[1] == 2


def test_a_calls_time_goes_on_with_it(
    client: Client, rabbit: RabbitServer, directory: Path, conductor: ConductorProcess
) -> None:
    """The conductor gives up when the guest does: its thread, and the project's place, are free."""
    args = {"sender": "s", "number": 1, "seconds": 30.0}
    with serving(rabbit, directory, "late"):
        for _ in range(4):  # one more than a project may have waiting
            with pytest.raises((CallTimeout, RemoteError)) as caught:
                client.call("late", "slow", args, timeout_s=1.0)
            assert "wait for their answers" not in str(caught.value)


def test_a_notification(
    client: Client, rabbit: RabbitServer, conductor: ConductorProcess, host: UndrivenHost
) -> None:
    client.notify("notifications", "thing.done", {"a": 1}, publisher_id="agent")
    conductor.audited(1)
    found: list[dict[str, Any]] = []

    def arrived() -> bool:
        found.extend(messages_in(services_url(rabbit), "notifications.info"))
        return bool(found)

    wait_until(arrived, timeout_s=WAIT_S, interval_s=0.1, failure=lambda: "no notification")
    message = found[0]
    assert (message["event_type"], message["payload"]) == ("thing.done", {"a": 1})
    assert message["publisher_id"] == f"vchan.{host.vms['one'].uuid}.agent"
    assert message["_context_vchan_instance_uuid"] == host.vms["one"].uuid


def messages_in(url: str, queue: str) -> list[dict[str, Any]]:
    """Take what is in a queue."""
    from kombu import Connection

    with Connection(url.replace("rabbit://", "amqp://")) as connection:
        channel = connection.default_channel
        try:
            message = channel.basic_get(queue, no_ack=True)
        except connection.channel_errors:
            return []
        return [] if message is None else [json.loads(json.loads(message.body)["oslo.message"])]


# --- what the hosts' account may not do ---------------------------------------------------------


def test_a_host_reaches_no_other_topic(client: Client, host: UndrivenHost) -> None:
    """Even where its own policy, or somebody in its place, sends a request there."""
    with pytest.raises(RequestError):
        client.call("direct", "echo", timeout_s=5)
    assert "ACCESS_REFUSED" in host.daemon.log.read_text()
    # It goes on: nothing of this is in the way of what may pass.
    with pytest.raises(RemoteError, match="nobody serves"):
        client.call("nobody", "echo", timeout_s=30)


@pytest.mark.parametrize(
    ("virtual_host", "exchange", "key"),
    [("/", "openstack", "direct"), ("/", "openstack", "vchan.x"), ("/", "other", "vchan")],
)
def test_the_broker_refuses_the_hosts_account(
    rabbit: RabbitServer, conductor: ConductorProcess, virtual_host: str, exchange: str, key: str
) -> None:
    assert publishing(rabbit, virtual_host, "openstack", "vchan") == ""
    rabbit.ctl(
        "eval",
        'rabbit_exchange:declare({resource, <<"/">>, exchange, <<"other">>}, '
        'topic, true, false, false, [], <<"test">>).',
    )
    assert "ACCESS_REFUSED" in publishing(rabbit, virtual_host, exchange, key)


def test_the_hosts_account_has_no_way_into_the_services_virtual_host(rabbit: RabbitServer) -> None:
    assert publishing(rabbit, SERVICES, "", "vchan") != ""


def publishing(rabbit: RabbitServer, virtual_host: str, exchange: str, key: str) -> str:
    """What the broker says to the hosts' account when it publishes there; "" if it takes it."""
    import amqp

    try:
        with amqp.Connection(
            f"127.0.0.1:{rabbit.port}",
            "host",
            "secret",
            virtual_host=virtual_host,
            confirm_publish=True,
        ) as connection:
            body = json.dumps({"oslo.version": "2.0", "oslo.message": "{}"})
            connection.channel().basic_publish_confirm(amqp.Message(body), exchange, key)
    except amqp.AMQPError as error:
        return str(error)
    return ""
