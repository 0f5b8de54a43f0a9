"""What an operator sees of a broker's trouble: vchan list, status and doctor, of a real daemon with
two VMs' channels (without QEMU), each with a guest daemon."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import amqp
import pytest

from tests.rig import end_process, rig_directory, wait_until
from tests.rig.broker_peers import raw_channel
from tests.rig.compute import HostDaemon
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_rabbit
from vchan.client import Agent
from vchan.errors import RequestError

MISSING = missing_for_rabbit()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).resolve().parents[2]
VM, OTHER = (f"aaaaaaaa-0000-4000-8000-00000000000{number}" for number in (1, 2))
WAIT_S = 60.0


class Endpoint:
    def __init__(self) -> None:
        self.notes: list[Any] = []

    def note(self, x: Any) -> None:
        self.notes.append(x)


class Site:
    """A broker, a host's daemon, two guests, and an agent in each."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.rabbit = stack.enter_context(RabbitServer(directory / "rabbit"))
        (directory / "host").mkdir()
        sockets = {vm: (directory / f"p{vm[-1]}", directory / f"a{vm[-1]}") for vm in (VM, OTHER)}
        channels = ",".join(f"{vm}=connect:{port}" for vm, (port, _) in sockets.items())
        self.host = HostDaemon(
            directory / "host", "h1", "", self.rabbit.url, options=[f"channels = {channels}"]
        )
        self.agents: dict[str, Endpoint] = {}
        for vm, (port, agent_socket) in sockets.items():
            self._start_guest(directory, stack, port, agent_socket)
            self.agents[vm] = self._start_agent(stack, agent_socket)
        stack.callback(self.host.stop)
        self.host.start()

    def _start_guest(self, directory: Path, stack: ExitStack, port: Path, agent: Path) -> None:
        command = (sys.executable, "-m", "vchan.guest.daemon", "--port", f"listen:{port}")
        with (directory / f"{port.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--socket", str(agent)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        stack.callback(end_process, process, grace_s=5.0)

    def _start_agent(self, stack: ExitStack, agent_socket: Path) -> Endpoint:
        endpoint, agent = Endpoint(), Agent(str(agent_socket))
        self.agent = agent
        agent.serve("agent", endpoint)
        thread = threading.Thread(target=agent.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(agent.stop)
        return endpoint

    def status(self, vm: str = VM) -> dict[str, Any]:
        status: dict[str, Any] = self.host.call("status", vm=vm)
        return status

    def row(self, vm: str = VM) -> dict[str, Any]:
        (row,) = [row for row in self.host.call("list") if row["uuid"] == vm]
        assert isinstance(row, dict)
        return row

    def doctor(self) -> str:
        command = (sys.executable, "-m", "vchan.cli", "--socket", str(self.host.socket), "doctor")
        config = self.host.log.parent / "vchan.conf"
        done = subprocess.run(
            [*command, "--config-file", str(config)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    def wait(self, what: Callable[[], bool]) -> None:
        wait_until(
            what,
            timeout_s=WAIT_S,
            interval_s=0.1,
            failure=lambda: f"{self.status()}\n{self.host.log.read_text()[-3000:]}",
        )

    def wait_served(self, vm: str = VM) -> None:
        self.wait(lambda: f"agent.{vm}" in self.rabbit.queues() and not self.row(vm)["problem"])
        self.wait(lambda: self.status(vm)["requests"]["topics"] == ["openstack/agent"])
        self.wait(lambda: self.rabbit.queues()[f"agent.{vm}"].consumers == 1)

    def publish(self, message: Any, vm: str = VM) -> None:
        with raw_channel(self.rabbit) as channel:
            channel.basic_publish(message, routing_key=f"agent.{vm}")

    def note(self, number: int, vm: str = VM) -> Any:
        message = {"method": "note", "args": {"x": number}}
        self.publish(amqp.Message(json.dumps(message), delivery_mode=2), vm)
        self.wait(lambda: number in self.agents[vm].notes)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with rig_directory() as directory, ExitStack() as stack:
        site = Site(directory, stack)
        for vm in (VM, OTHER):
            site.wait_served(vm)
        yield site


def test_what_cannot_be_read_is_named_counted_and_costs_nobody(site: Site) -> None:
    before = site.status()["requests"]["undecodable"]
    for body in (
        b"\xff\x00 no JSON",
        b'{"method": 7}',
        b'{"oslo.version": "9.0", "oslo.message": ""}',
    ):
        site.publish(amqp.Message(body))
    site.wait(lambda: site.status()["requests"]["undecodable"] == before + 3)
    log = site.host.log.read_text()
    assert f"dropped a message of queue agent.{VM}: the body is not JSON" in log
    assert r"it begins with b'\xff\x00 no JSON'" in log
    for vm in (VM, OTHER):
        site.note(1, vm)
    assert "lost the broker" not in log
    assert "messages could not be read" in site.doctor()
    assert site.status(OTHER)["requests"]["undecodable"] == 0


def test_mail_that_cannot_be_read_is_named_and_counted(site: Site) -> None:
    before = site.status()["requests"]["undecodable"]
    with raw_channel(site.rabbit) as channel:
        channel.basic_publish(amqp.Message(b"[1]"), routing_key=f"vchan_vm_{VM}")
    site.wait(lambda: site.status()["requests"]["undecodable"] == before + 1)
    assert f"dropped a message of queue vchan_vm_{VM}" in site.host.log.read_text()


def test_a_queue_that_the_broker_refuses_shows_for_its_vm(site: Site) -> None:
    queue = f"agent.{VM}"
    with raw_channel(site.rabbit) as channel:

        def is_taken() -> bool:
            """Before the daemon declares it anew."""
            channel.queue_delete(queue)
            try:
                channel.queue_declare(queue, exclusive=True)
            except amqp.AMQPError:
                channel.open()
                return False
            return True

        site.wait(is_taken)
        site.wait(lambda: "RESOURCE_LOCKED" in (site.row()["problem"] or ""))
        assert any("RESOURCE_LOCKED" in text for text in site.status()["broker_problems"])
        assert "broker: the broker closed the channel: 405 RESOURCE_LOCKED" in site.doctor()
        assert site.row(OTHER)["problem"] is None
        site.note(2, OTHER)
        channel.queue_delete(queue)
    site.wait_served()
    site.note(3)
    assert site.status()["broker_problems"] == []


def test_an_alarm_shows(site: Site) -> None:
    site.rabbit.ctl("set_vm_memory_high_watermark", "absolute", "1")
    try:
        with pytest.raises(RequestError):  # it makes the daemon publish
            site.agent.cast("control", "nothing", timeout_s=3.0)
        site.wait(lambda: bool(site.host.call("status")["broker_blocked"]))
        assert "memory" in site.host.call("status")["broker_blocked"]
        assert "the broker takes no messages" in site.row()["problem"]
        assert "it takes no messages" in site.doctor()
    finally:
        site.rabbit.ctl("set_vm_memory_high_watermark", "0.4")
    site.wait(lambda: not site.host.call("status")["broker_blocked"])
    assert site.row()["problem"] is None


def test_a_call_whose_time_nobody_can_count_is_a_call(site: Site) -> None:
    """1e308 seconds ended the daemon once."""
    message = {
        "method": "note",
        "args": {"x": 9},
        "_timeout": 1e308,
        "_msg_id": "m",
        "_reply_q": "q",
    }
    site.publish(amqp.Message(json.dumps(message)))
    site.wait(lambda: 9 in site.agents[VM].notes)
    site.note(10, OTHER)
