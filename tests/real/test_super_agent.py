"""The super-agent and the standard agent in a real VM, driven from the control plane's broker."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import RigError, wait_until
from tests.rig.caller import Caller, CallFailed
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_libvirt() or missing_for_rabbit()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

WAIT_S = 90.0
UNITS = "/etc/vchan/agents.d"
AGENT = """\
command = ["/usr/bin/python3", "/app/agent.py", "unit", "/run/unit.ran"]
environment = { PYTHONPATH = "/site", PYTHONDONTWRITEBYTECODE = "1" }
topics = ["unit"]
"""
CRASHING = """\
command = ["/bin/sh", "-c", "echo 'there is no database'; exit 7"]
restart_delay_s = 0.1
"""
FORKING = """\
command = ["/bin/sh", "-c", "(trap '' TERM; sleep 98765) & sleep 98765"]
"""
STANDARD = """\
command = ["/usr/bin/python3", "-m", "vchan.guest.daemon", "standard-agent"]
environment = { PYTHONPATH = "/site", PYTHONDONTWRITEBYTECODE = "1" }
topics = ["vchan.standard"]
"""
RULES = """\
facts = true
[exec]
allow = ["/usr/bin/busybox"]
[read]
allow = ["/etc/**", "/tmp/*"]
[write]
allow = ["/tmp/*"]
"""
BUSYBOX = "/usr/bin/busybox"
ALLOW = "allow = ping, info, list, state, log, stop:u*, start:u*, restart:u*\n"


class Site:
    """A VM with units, and a caller at the broker."""

    def __init__(self, cloud: Cloud, vm: Vm, caller: Caller) -> None:
        self.cloud = cloud
        self.vm = vm
        self._caller = caller

    def ask(self, method: str, **args: Any) -> Any:
        """Call the guest's daemon."""
        return self._caller.call("vchan.guest", self.vm.uuid, method, **args)

    def standard(self, method: str, **args: Any) -> Any:
        """Call the standard agent."""
        return self._caller.call("vchan.standard", self.vm.uuid, method, **args)

    def call(self, topic: str, method: str, **args: Any) -> Any:
        """Call any agent."""
        return self._caller.call(topic, self.vm.uuid, method, **args)

    def in_guest(self, script: str) -> str:
        """Run a script in the guest."""
        with self.vm.shell() as shell:
            return shell.check(script)

    def write(self, path: str, text: str) -> None:
        """Write a file in the guest."""
        encoded = base64.b64encode(text.encode()).decode()
        self.in_guest(f"mkdir -p $(dirname {path}); echo {encoded} | base64 -d >{path}")

    def wait_topics(self, *topics: str) -> None:
        """Wait until these are served by way of the broker."""
        self.vm.here.daemon.wait_ready(self.vm.name, topics=topics)

    def wait_row(self, name: str, **values: Any) -> Any:
        """Wait until a unit is so."""
        seen: list[Any] = [None]

        def look() -> bool:
            try:
                seen[0] = self.ask("agent_state", name=name)
            except CallFailed as error:  # a daemon that went away with the question
                if not str(error).startswith("AgentGone"):
                    raise
                return False
            return all(seen[0].get(key) == value for key, value in values.items())

        wait_until(
            look,
            timeout_s=WAIT_S,
            interval_s=0.2,
            failure=lambda: f"{name} is not {values} but {seen[0]}",
        )
        return seen[0]


@pytest.fixture(scope="module")
def site(cloud: Cloud) -> Iterator[Site]:
    vm = cloud.boot("super")
    with Caller(cloud.url, cloud.directory / "caller.log") as caller:
        site = Site(cloud, vm, caller)
        for name, unit in (("unit", AGENT), ("ucrash", CRASHING), ("forking", FORKING)):
            site.write(f"{UNITS}/{name}.toml", unit)
        site.write(f"{UNITS}/standard.toml", STANDARD)
        site.write(f"{UNITS}/broken.toml", 'comand = ["/bin/true"]')
        site.write("/etc/vchan/guest.conf", ALLOW)
        site.write("/etc/vchan/standard.toml", RULES)
        site.in_guest("kill $(cat /run/vchan-guest.pid)")
        try:
            site.wait_topics("vchan.guest", "unit", "vchan.standard")
            yield site
        except RigError:
            print(cloud.logs())
            raise
    vm.discard()


def test_units_are_listed(site: Site) -> None:
    site.wait_row("unit", state="running", serves=True)
    rows = {row["name"]: row for row in site.ask("agents")}
    assert set(rows) == {"unit", "ucrash", "forking", "standard", "broken"}
    assert rows["unit"]["topics"] == ["unit"]
    assert rows["broken"]["state"] == "broken"
    assert "broken.toml: command: is missing" in rows["broken"]["problem"]


def test_a_unit_is_stopped_started_and_restarted(site: Site) -> None:
    before = site.wait_row("unit", state="running", serves=True)
    assert site.call("unit", "pid") == before["pid"]
    stopped = site.ask("agent_stop", name="unit")
    assert (stopped["state"], stopped["pid"]) == ("stopped", None)
    site.in_guest(f"! [ -e /proc/{before['pid']} ]")
    site.ask("agent_start", name="unit")
    started = site.wait_row("unit", state="running", serves=True)
    site.wait_topics("unit")
    assert site.call("unit", "pid") == started["pid"]
    assert site.ask("agent_restart", name="unit")["pid"] not in (None, started["pid"])
    site.wait_row("unit", state="running", serves=True)


def test_a_crash_loop_backs_off_and_says_why(site: Site) -> None:
    row = site.wait_row("ucrash", state="waiting", crash_loop=True)
    assert row["last_exit"] == "status 7"
    assert site.ask("agent_log", name="ucrash", lines=1) == ["there is no database"]
    site.ask("agent_stop", name="ucrash")
    assert site.ask("agent_state", name="ucrash")["state"] == "stopped"


def test_the_owner_says_what_may_be_done(site: Site) -> None:
    for method in ("agent_stop", "agent_start", "agent_restart"):
        with pytest.raises(CallFailed, match="the owner of this guest does not allow it") as caught:
            site.ask(method, name="forking")
        assert caught.value.kind == "Rejected"
    assert site.ask("agent_state", name="forking")["state"] == "running"


def test_units_end_with_a_daemon_that_is_killed(site: Site) -> None:
    """And are started again by the next; what they started ends, too."""
    site.wait_row("unit", state="running", serves=True)
    before = site.ask("agent_state", name="forking")["pid"]
    sleeping = "ps -o pid,args | grep -c '[s]leep 98765'"
    site.in_guest("touch /run/vchan-guest.hold; kill -9 $(cat /run/vchan-guest.pid)")
    with site.vm.shell() as shell:
        wait_until(
            lambda: shell.run(sleeping).output.strip() == "0",
            timeout_s=WAIT_S,
            interval_s=0.2,
            failure=lambda: shell.run("ps").output,
        )
        assert shell.run(f"[ -e /proc/{before} ]").status != 0
    site.in_guest("rm /run/vchan-guest.hold")
    site.wait_topics("vchan.guest", "unit", "vchan.standard")
    assert site.wait_row("forking", state="running")["pid"] != before
    assert site.in_guest(sleeping).strip() == "2"


def test_the_standard_agent(site: Site) -> None:
    site.wait_topics("vchan.standard")
    assert site.standard("ping")["allowed"] == dict.fromkeys(
        ("ping", "facts", "exec", "read", "write"), True
    ) | {"shell": False}
    facts = site.standard("facts")
    assert facts["kernel"].startswith("Linux 6.1")
    content = os.urandom(200_000)
    digest = hashlib.sha256(content).hexdigest()
    begun = site.standard("file_write_begin", path="/tmp/x", size=len(content), sha256=digest)
    for offset in range(0, len(content), 65536):
        data = base64.b64encode(content[offset : offset + 65536]).decode()
        site.standard("file_write", id=begun["id"], offset=offset, data=data)
    assert site.standard("file_write_end", id=begun["id"])["sha256"] == digest
    assert site.in_guest("sha256sum /tmp/x").split()[0] == digest
    assert site.standard("file_checksum", path="/tmp/x")["sha256"] == digest
    key = site.standard("exec", argv=[BUSYBOX, "wc", "-c", "/tmp/x"])["id"]
    out = b""
    while True:
        part = site.standard("exec_read", id=key, stdout_from=len(out), wait_s=10)
        out += base64.b64decode(part["stdout"])
        if part["ended"]:
            break
    assert out == b"200000 /tmp/x\n"
    for method, args in (
        ("exec", {"argv": ["/usr/bin/python3"]}),
        ("exec", {"argv": ["/bin/busybox"]}),  # /bin is a link
        ("file_read", {"path": "/proc/1/environ"}),
        ("file_write_begin", {"path": "/etc/x", "size": 0, "sha256": digest}),
    ):
        with pytest.raises(CallFailed, match="is not allowed"):
            site.standard(method, **args)


def test_all_of_it_moves_with_the_vm(site: Site) -> None:
    before = site.wait_row("unit", state="running", serves=True)
    site.vm.migrate()
    site.wait_topics("vchan.guest", "unit")
    after = site.ask("agent_state", name="unit")
    assert (after["pid"], after["starts"]) == (before["pid"], before["starts"])
    info = site.ask("info")
    assert "openstack/unit" in info["topics"]


def test_by_the_hosts_command(site: Site) -> None:
    """Without the broker: vchan call VM vchan.guest agents."""
    done = site.vm.here.cli("--json", "call", site.vm.name, "vchan.guest", "agents")
    assert {row["name"] for row in json.loads(done.stdout)} >= {"unit", "standard"}
