"""Debian guests with systemd and cloud-init install vchan by themselves, and keep it running.

Two guests boot at once: one has no network and its daemon comes as a file within its user-data,
the other fetches the package. Both boot unattended until a call is answered.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.rig import debian_image, rig_directory, wait_until
from tests.rig.debian_image import BOOT_TIMEOUT_S, DebianGuest, GuestAgent
from tests.rig.guest_image import VCHAN_PORT
from tests.rig.hosting import HostEnd
from tests.rig.packages import Artefacts, debian_version, package
from tests.rig.requirements import missing_for_qemu

_MISSING = missing_for_qemu() or debian_image.missing_for_debian()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)),
]

SERVER = "http://10.0.2.100"
WAIT_S = 300.0
RESULT = "/run/cloud-init/result.json"
"""There when cloud-init is done. Its own command for that takes an emulated guest many seconds."""


@dataclass
class Machine:
    """A guest, and the host's end of its channel."""

    guest: DebianGuest
    host: HostEnd
    started_s: float = field(default_factory=time.monotonic)
    ready_s: float = 0.0

    @property
    def shell(self) -> GuestAgent:
        """A shell in the guest that does not go through vchan."""
        return self.guest.agent()

    def wait_session(self) -> None:
        """Wait for the guest's daemon."""

        def failure() -> str:
            return f"{self.host.log}\n{self.guest.console.read_text(errors='replace')}"

        def ready() -> bool:
            return bool(self.host.summary()["state"] == "ready")

        def ready_or_over() -> bool:
            return ready() or "finished at" in self.guest.console.read_text(errors="replace")

        for reached, timeout_s in ((ready_or_over, BOOT_TIMEOUT_S), (ready, WAIT_S)):
            wait_until(reached, timeout_s=timeout_s, interval_s=0.05, failure=failure)

    def wait_topic(self, topic: str) -> None:
        """Wait for an agent that serves it."""
        wait_until(
            lambda: topic in self.host.topics(),
            timeout_s=WAIT_S,
            interval_s=0.2,
            failure=lambda: (
                self.shell.run("journalctl -b --no-pager | grep -v qemu-ga | tail -50").output
            ),
        )

    def property(self, name: str) -> str:
        """One of the service's properties, as systemd has it."""
        return self.shell.check(f"systemctl show --value -p {name} vchan-guest").strip()

    def wait_property(self, name: str, value: str) -> None:
        """Wait until systemd says so."""
        wait_until(
            lambda: self.property(name) == value,
            timeout_s=WAIT_S,
            interval_s=0.3,
            failure=lambda: self.shell.run("systemctl status vchan-guest").output,
            rest=1.0,
        )


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with rig_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def artefacts(directory: Path) -> Artefacts:
    return package(directory / "dist", "--url", SERVER)


@pytest.fixture(scope="module")
def server(artefacts: Artefacts) -> Iterator[int]:
    """The port of a web server that has the packages."""
    handler = partial(_QuietHandler, directory=str(artefacts.directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def machines(directory: Path, artefacts: Artefacts, server: int) -> Iterator[dict[str, Machine]]:
    """Both guests, as they booted."""
    image = debian_image.build()
    seeds = {
        "inline": {
            # What a user says besides is no reason for the vendor's part not to happen.
            "vendor-data": artefacts.one("vendor-data.sh").read_text(),
            "user-data": "#cloud-config\nruncmd: [[touch, /run/user-data-was-here]]\n",
        },
        "network": {"user-data": artefacts.one("user-data-network.yaml").read_text()},
    }
    with ExitStack() as stack:
        made = {}
        for name, seed in seeds.items():
            forward = server if name == "network" else None
            guest = DebianGuest(directory / name, image, seed, forward=forward)
            stack.enter_context(guest)
            made[name] = Machine(guest, stack.enter_context(HostEnd(guest.port())))
        with ThreadPoolExecutor() as pool:
            list(pool.map(_booted, made.values()))
        for name, machine in made.items():
            print(f"{name}: from power-on to the first answer {machine.ready_s:.1f} s")
        yield made


def _booted(machine: Machine) -> None:
    machine.wait_session()
    assert machine.host.call("vchan.guest", "ping") == b"{}"
    machine.ready_s = time.monotonic() - machine.started_s
    # In one program: to start it anew, again and again, would hold up an emulated boot.
    machine.shell.run(f"until test -e {RESULT}; do sleep 1; done", timeout_s=BOOT_TIMEOUT_S)
    assert json.loads(machine.shell.check(f"cat {RESULT}"))["v1"]["errors"] == []


@pytest.fixture
def inline(machines: dict[str, Machine]) -> Machine:
    return machines["inline"]


@pytest.fixture
def network(machines: dict[str, Machine]) -> Machine:
    return machines["network"]


# ---------------------------------------------------------------- installed by cloud-init


def test_without_a_network_the_zipapp_serves(inline: Machine) -> None:
    inline.shell.check("test -e /run/user-data-was-here")
    assert inline.shell.check("systemctl --failed --no-legend") == ""
    assert "/opt/vchan/vchan-guest.pyz" in inline.property("ExecStart")
    assert inline.shell.check("stat -L -c %U /dev/virtio-ports/org.openstack.vchan.0") == "vchan\n"


def test_without_a_network_the_zipapp_is_the_agents_library(inline: Machine) -> None:
    agent = (Path(__file__).parents[2] / "examples" / "agent.py").read_bytes()
    inline.shell.write("/run/agent.py", agent)
    run = "systemd-run --quiet -E PYTHONPATH=/opt/vchan/vchan-guest.pyz --unit=agent --slice=x"
    inline.shell.check(f"{run} --uid=nobody -p SupplementaryGroups=vchan python3 /run/agent.py")
    inline.wait_topic("openstack/agent")
    assert json.loads(inline.host.call("agent", "echo", x=1)) == {"x": 1}


def test_over_the_network_the_package_and_an_agent_serve(network: Machine) -> None:
    network.wait_topic("openstack/agent")
    assert json.loads(network.host.call("agent", "hostname")) == "guest"
    assert network.shell.check("systemctl --failed --no-legend") == ""
    assert network.shell.check("dpkg --verify vchan-guest; dpkg --audit") == ""
    user = network.shell.check("ps -o user= -p $(systemctl show --value -p MainPID example-agent)")
    assert user.strip() not in ("root", "vchan")


def test_what_it_costs(network: Machine) -> None:
    """Beside qemu-ga, in the same guest. The limit is for all machines; the figures are printed."""
    pid = network.property("MainPID")
    rss = network.shell.check(f"grep -h VmRSS /proc/{pid}/status /proc/$(pidof qemu-ga)/status")
    ours, theirs = (int(kib) for kib in re.findall(r"(\d+) kB", rss))
    print(f"RSS: vchan-guest {ours} KiB, qemu-ga {theirs} KiB")
    print(network.shell.check("systemd-analyze; systemd-analyze blame | grep -E 'vchan|qemu'"))
    assert ours < 25 * 1024


# ---------------------------------------------------------------- kept running by systemd


def test_a_killed_daemon_is_started_again(network: Machine) -> None:
    before = network.property("MainPID")
    network.shell.check(f"kill -9 {before}")
    network.wait_property("ActiveState", "active")
    network.wait_topic("openstack/agent")
    assert network.property("MainPID") != before
    assert json.loads(network.host.call("agent", "echo", x=2)) == {"x": 2}


def test_a_daemon_that_stands_still_is_started_again(network: Machine) -> None:
    """The watchdog, with a shorter time than the service's own minute."""
    with _drop_in(network, "WatchdogSec=4"):
        before = network.property("MainPID")
        network.shell.check(f"kill -STOP {before}")
        network.shell.wait(f"! test -d /proc/{before}", timeout_s=WAIT_S)
    network.wait_topic("openstack/agent")
    assert "watchdog" in network.shell.check("journalctl -b -u vchan-guest --no-pager").lower()


def test_the_port_is_unplugged_and_plugged_again(network: Machine) -> None:
    """At once: the same daemon goes on. After a while: it has ended, and udev starts another."""
    before = network.property("MainPID")
    _replug(network)
    network.wait_topic("openstack/agent")
    assert json.loads(network.host.call("agent", "echo", x=3)) == {"x": 3}
    assert network.property("MainPID") == before

    network.guest.unplug(VCHAN_PORT)
    network.wait_property("ActiveState", "inactive")
    # Started again without a port, by a systemd that does not ask its conditions then: no failure.
    assert network.property("Result") in ("success", "exec-condition")
    network.guest.plug(VCHAN_PORT)
    network.wait_topic("openstack/agent")
    assert network.property("MainPID") != before


def test_it_is_plugged_again_just_as_the_daemon_ends(network: Machine) -> None:
    """Whenever that is, the daemon is there in the end. It holds out for one second here."""
    start = "ExecStart=\\nExecStart=/usr/bin/vchan-guest --exit-without-port 1"
    with _drop_in(network, start):
        network.wait_topic("openstack/agent")
        for delay_s in (0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5):
            network.guest.unplug(VCHAN_PORT)
            time.sleep(delay_s)
            network.guest.plug(VCHAN_PORT)
            network.wait_topic("openstack/agent")


@contextmanager
def _drop_in(machine: Machine, lines: str) -> Iterator[None]:
    """Have the service run with other settings."""
    directory = "/run/systemd/system/vchan-guest.service.d"
    again = "systemctl daemon-reload; systemctl restart vchan-guest"
    write = f"printf '[Service]\\n{lines}\\n' > {directory}/test.conf"
    machine.shell.check(f"mkdir -p {directory}; {write}; {again}")
    try:
        yield
    finally:
        machine.shell.check(f"rm {directory}/test.conf; {again}")


def _replug(machine: Machine) -> None:
    machine.guest.unplug(VCHAN_PORT)
    machine.guest.plug(VCHAN_PORT)


def test_sub_agents_end_with_the_daemon_unless_told(network: Machine) -> None:
    """systemd leaves that to the daemon; also when it is killed."""
    directory = "/etc/vchan/agents.d"
    line = 'command = ["/bin/sleep", "{}"]'
    for name, seconds, more in (("mortal", "4001", ""), ("survivor", "4002", "survive = true")):
        text = f"{line.format(seconds)}\n{more}\n"
        network.shell.write(f"{directory}/{name}.toml", text.encode())
    network.shell.check("systemctl reload vchan-guest")
    pids = [_pid_of(network, seconds) for seconds in ("4001", "4002")]
    network.shell.check("kill -9 $(systemctl show --value -p MainPID vchan-guest)")
    network.shell.wait(f"! test -d /proc/{pids[0]}")
    network.wait_topic("openstack/agent")
    assert _pid_of(network, "4001") != pids[0]
    assert _pid_of(network, "4002") == pids[1]
    network.shell.check(f"rm {directory}/*.toml; systemctl reload vchan-guest")
    for seconds in ("4001", "4002"):
        network.shell.wait(f"! pgrep -f '^/bin/sleep {seconds}'")


def _pid_of(machine: Machine, seconds: str) -> str:
    machine.shell.wait(f"pgrep -f '^/bin/sleep {seconds}'")
    return machine.shell.check(f"pgrep -f '^/bin/sleep {seconds}'").strip()


# ---------------------------------------------------------------- upgrade and removal


def test_an_upgrade_under_traffic_loses_nothing(network: Machine, directory: Path) -> None:
    newer = package(directory / "newer", "--deb-version", "9.9+test").guest
    network.shell.write("/run/newer.deb", newer.read_bytes())
    before = network.property("MainPID")
    stop = threading.Event()
    answers: list[bool] = []

    def call_on() -> None:
        while not stop.is_set():
            number = len(answers)
            answer = json.loads(network.host.call("agent", "echo", x=number))
            answers.append(answer == {"x": number})

    with ThreadPoolExecutor() as pool:
        calling = pool.submit(call_on)
        try:
            said = network.shell.check("dpkg -i /run/newer.deb; echo status $?")
            after = len(answers)
            wait_until(
                lambda: len(answers) > after or calling.done(),
                timeout_s=WAIT_S,
                interval_s=0.05,
                failure=lambda: f"no call after the upgrade: {said}",
            )
        finally:
            stop.set()
        calling.result(WAIT_S)
    assert "status 0" in said
    assert network.property("MainPID") != before
    assert answers
    assert all(answers)
    print(f"{len(answers)} calls, across an upgrade to {debian_version(newer)}")


def test_a_read_only_root_and_a_full_disk_are_no_trouble(network: Machine) -> None:
    network.shell.check("dd if=/dev/zero of=/fill bs=1M; true")
    network.shell.check("systemctl restart vchan-guest")
    network.wait_topic("openstack/agent")
    network.shell.check("rm /fill; sync; mount -o remount,ro /")
    try:
        network.shell.check("systemctl restart vchan-guest")
        network.wait_topic("openstack/agent")
        assert json.loads(network.host.call("agent", "echo", x=4)) == {"x": 4}
    finally:
        network.shell.check("mount -o remount,rw /")


def test_a_confined_daemon_serves(network: Machine) -> None:
    """The drop-in among the examples, with all that it forbids."""
    example = "/usr/share/doc/vchan-guest/examples/relay-only.conf"
    network.shell.check(
        f"install -D -m 644 {example}"
        " /etc/systemd/system/vchan-guest.service.d/relay-only.conf"
        "; systemctl daemon-reload; systemctl restart vchan-guest"
    )
    pid = network.property("MainPID")
    assert network.shell.check(f"ps -o user= -p {pid}").strip() == "vchan"
    network.wait_topic("openstack/agent")
    assert json.loads(network.host.call("agent", "echo", x=5)) == {"x": 5}


def test_removal_leaves_nothing(network: Machine) -> None:
    network.shell.check("systemctl stop example-agent; rm -rf /run/newer.deb /run/vchan-guest.deb")
    network.shell.check("apt-get purge --yes vchan-guest")
    left = network.shell.check(
        "find / -xdev -iname '*vchan*' -not -path '/proc/*' -not -path '/var/lib/cloud/*'"
        " -not -path '/var/log/*'; find /run -iname '*vchan*' -not -path '/run/udev/*'"
    ).split()
    # The drop-in of the test above is an administrator's.
    dropins = "/etc/systemd/system/vchan-guest.service.d"
    assert [path for path in left if not path.startswith("/run/systemd/")] == [dropins]
    assert network.shell.check(f"ls {dropins}; rm -r {dropins}").split() == ["relay-only.conf"]
    assert network.shell.run("systemctl cat vchan-guest").status != 0


def test_user_data_without_a_network_brings_it_back(network: Machine, artefacts: Artefacts) -> None:
    """cloud-init's own modules, on a machine that has booted long ago."""
    network.shell.write("/run/data.yaml", artefacts.one("user-data-inline.yaml").read_bytes())
    data = "--file /run/data.yaml"
    takes_it = network.shell.run("cloud-init single --help | grep --quiet -e --file").status == 0
    single = f"single {data}" if takes_it else f"{data} single"  # newer releases; older ones
    single = f"cloud-init {single} --frequency always --name"
    for module in ("write_files", "runcmd", "scripts_user"):
        network.shell.check(f"{single} {module}")
    network.wait_property("ActiveState", "active")
    network.wait_session()
    assert network.host.call("vchan.guest", "ping") == b"{}"
    assert "/opt/vchan/vchan-guest.pyz" in network.property("ExecStart")
