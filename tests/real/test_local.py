"""A host without a broker: the vchan command calls into a real VM. And what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from vchan import cli

if TYPE_CHECKING:
    from tests.rig.cloud import Vm
    from tests.rig.compute import ComputeHost

MISSING = missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]
needs_rabbit = pytest.mark.skipif(bool(missing_for_rabbit()), reason=str(missing_for_rabbit()))

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "agent.py"
UUID_OFF = "0ff00000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def host(short_directory: Path) -> Iterator[ComputeHost]:
    """A host without a broker, and the VMs "vm" and "other" with the example agent; "off" is shut
    off."""
    from tests.rig.compute import GUEST_DAEMON, ComputeHost, agent_service
    from tests.rig.guest_image import build
    from tests.rig.kept import cache_directory
    from tests.rig.libvirtd import domain_xml

    image = build({"app/agent.py": EXAMPLE}).staged(short_directory / "local-image")
    with ComputeHost(short_directory / "l", 3, cache_directory() / "libvirt", None) as host:
        services = [GUEST_DAEMON, agent_service("agent", "/app/agent.py")]
        host.start_vm("vm", image, services)
        host.start_vm("other", image, services)
        off = domain_xml("off", UUID_OFF, image, console=host.libvirt.console_path("off"))
        host.connection.defineXML(off)
        host.daemon.wait_ready("vm", topics=["agent"])
        host.daemon.wait_ready("other", topics=["agent"])
        yield host


def test_the_agent_is_called(host: ComputeHost) -> None:
    assert host.cli_json("call", "vm", "agent", "echo", "x=1", "y=text") == {"x": 1, "y": "text"}
    uuid = host.domain("vm").UUIDString()
    assert host.cli_json("call", uuid, "agent", "echo") == {}
    assert host.cli("cast", "vm", "agent", "echo").returncode == 0


def test_a_fanout_reaches_every_vm(host: ComputeHost) -> None:
    from vchan.client import Client
    from vchan.errors import NoSuchAgent

    consoles = [host.libvirt.console_path(name) for name in ("vm", "other")]
    with Client(str(host.daemon.socket)) as client:
        client.cast("agent", "note", {"text": "for everybody"}, fanout=True)
        deadline_s = time.monotonic() + 60
        while not all("for everybody" in each.read_text(errors="replace") for each in consoles):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        with pytest.raises(NoSuchAgent, match="name one of them as its server"):
            client.cast("agent", "note", {"text": "for nobody"})


def test_the_host_is_looked_at(host: ComputeHost) -> None:
    rows = {row["name"]: row for row in host.cli_json("list")}
    assert (rows["vm"]["domain"], rows["vm"]["channel"]) == ("running", "ready")
    assert rows["vm"]["topics"] == ["openstack/agent"]
    assert (rows["off"]["domain"], rows["off"]["channel"]) == ("shutoff", "none")
    status = host.cli_json("status")
    assert (status["broker"], status["libvirt"]) == ("none configured", "connected")
    assert host.cli_json("status", "vm")["state"] == "ready"
    assert "asked 2, answered 2; " in host.cli("ping", "vm", "--count", "2").stdout
    files = status["files"]
    assert files["config"] and files["policy_dir"]
    assert files["config"][0] in host.cli("status").stdout


def test_a_vm_is_called_by_its_uuids_beginning(host: ComputeHost) -> None:
    uuid = host.domain("vm").UUIDString()
    for word in (uuid.upper(), uuid[:8], uuid[:13].upper()):
        assert host.cli_json("call", word, "agent", "echo", "x:=1") == {"x": 1}
        assert host.cli_json("status", word)["name"] == "vm"


def test_what_changes_is_watched(host: ComputeHost) -> None:
    watched = subprocess.Popen(
        host.cli_words("watch", "--json", "--interval", "0.1"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert watched.stderr is not None and watched.stdout is not None
        assert "what changes from now on" in watched.stderr.readline()
        domain = host.domain("other")
        domain.suspend()
        paused = _next_of(watched.stdout, "domain")
        domain.resume()
        resumed = _next_of(watched.stdout, "domain")
    finally:
        watched.send_signal(signal.SIGINT)
        _, err = watched.communicate(timeout=60)
    assert (paused["event"], paused["name"], paused["after"]) == ("domain", "other", "paused")
    assert (resumed["before"], resumed["after"]) == ("paused", "running")
    assert (watched.returncode, err) == (cli.EXIT_INTERRUPTED, "")


def _next_of(lines: IO[str], event: str) -> dict[str, Any]:
    """The next event of this kind: its channel changes with a domain."""
    while True:
        row: dict[str, Any] = json.loads(lines.readline())
        if row["event"] == event:
            return row


def test_rates_are_shown(host: ComputeHost) -> None:
    rows = host.cli_json("top", "--interval", "0.2", "--count", "1")
    assert {row["name"]: row["channel"] for row in rows} == {"vm": "ready", "other": "ready"}


def test_decisions_are_listed(host: ComputeHost) -> None:
    done = host.cli("log", "--json", "--vm", "vm", "--kind", "listen")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(row["target"], row["verdict"]) for row in rows} == {("openstack/agent", "allow")}


def test_the_host_is_watched(host: ComputeHost) -> None:
    done = host.cli("--json", "doctor")
    assert done.returncode == cli.EXIT_OK, done.stdout
    findings = {row["where"]: row for row in json.loads(done.stdout)}
    assert (findings["libvirt"]["level"], findings["libvirt"]["text"]) == ("ok", "connected")
    assert "vm" not in findings
    (own,) = host.cli_json("doctor", "vm")
    assert own["text"] == "running, ready, serves openstack/agent"
    lines = host.cli("metrics").stdout.splitlines()
    assert "vchan_up 1.0" in lines
    assert 'vchan_channels{state="ready"} 2.0' in lines
    uuid = host.domain("vm").UUIDString()
    (received,) = (
        line
        for line in lines
        if line.startswith(f'vchan_vm_frames_received_total{{name="vm",uuid="{uuid}"')
    )
    assert float(received.split()[-1]) > 0


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("call", "nobody", "agent", "echo"), cli.EXIT_FAILED, "'nobody': this host has no such"),
        (("status", "nobody"), cli.EXIT_FAILED, "'nobody': this host has no such"),
        (("attach", "nobody"), cli.EXIT_FAILED, "'nobody': this host has no such"),
        (("call", "off", "agent", "echo"), cli.EXIT_FAILED, "off: it is shutoff"),
        (
            ("call", "vm", "other", "echo"),
            cli.EXIT_FAILED,
            "no agent serves topic openstack/other; served in vm: openstack/agent",
        ),
        (("call", "vm", "agent", "dance"), cli.EXIT_FAILED, "agent has no method dance"),
        (("call", "vm", "agent", "fail", "text=ouch"), cli.EXIT_FAILED, "ValueError: ouch"),
        (("call", "vm", "agent", "hostname", "x=1"), cli.EXIT_FAILED, "TypeError"),
        (("call", "vm", "vchan.guest", "dance"), cli.EXIT_FAILED, "has no method 'dance'"),
    ],
)
def test_a_failure_is_one_line(
    host: ComputeHost, words: tuple[str, ...], status: int, text: str
) -> None:
    done = host.cli(*words)
    assert done.returncode == status, done.stderr
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_paused_vm_does_not_answer_in_time_and_then_does(host: ComputeHost) -> None:
    domain = host.domain("vm")
    domain.suspend()
    try:
        late = host.cli("--timeout", "0.5", "call", "vm", "agent", "echo")
        assert late.returncode == cli.EXIT_TIMEOUT
        assert "may have run" in late.stderr
    finally:
        domain.resume()
    assert host.cli_json("call", "vm", "agent", "echo", "x=1") == {"x": 1}


def test_a_message_over_the_limit_is_refused_and_harms_nothing(host: ComputeHost) -> None:
    from vchan.client import Client
    from vchan.errors import LimitExceeded

    with Client(str(host.daemon.socket)) as client:
        with pytest.raises(LimitExceeded, match="MESSAGE_BYTES_MAX"):
            client.call("agent", "echo", {"x": "y" * (4 << 20)}, server="vm")
        large = {"x": "y" * ((4 << 20) - 1000)}
        assert client.call("agent", "echo", large, server="vm", timeout_s=60) == large
    assert host.daemon.status("vm")["session"]["violations"] == 0


def test_without_the_daemon(host: ComputeHost) -> None:
    host.daemon.stop()
    try:
        start_s = time.monotonic()
        done = host.cli("--timeout", "120", "list")
        assert done.returncode == cli.EXIT_UNREACHABLE
        assert "is vchan-host running?" in done.stderr
        assert time.monotonic() - start_s < 60  # it does not wait for one
    finally:
        host.daemon.start()
    host.daemon.wait_ready("vm", topics=["agent"])
    assert json.loads(host.cli("--json", "call", "vm", "agent", "echo").stdout) == {}


@needs_rabbit
def test_a_message_over_the_limit_through_the_broker(vm: Vm) -> None:
    """The caller is told at once; the VM's other requests do not notice."""
    with (
        vm.traffic() as traffic,
        vm.traffic(wait=False, callers=1, casts_per_s=0, fanouts_per_s=0, payload=5 << 20) as large,
    ):
        large.wait_for("calls_sent", 2)
        refused = large.finish()
        traffic.flows()
        report = traffic.finish()
    assert refused.calls_answered == 0
    assert all("LimitExceeded" in failure for failure in refused.calls_failed)
    assert all("over the limit of" in failure for failure in refused.calls_failed)
    report.check()
