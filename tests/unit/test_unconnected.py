"""A VM whose channel is not connected: what programs on its host are told, and that it is true."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.cable import Cable
from vchan import cli
from vchan.client import Agent, Client
from vchan.errors import CallTimeout, LinkError, NoSuchAgent

pytest.importorskip("libvirt")  # vchan-host needs it, though none is followed here

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0

Run = Callable[..., tuple[int, str, str]]


def wait(reached: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class Site:
    """A vchan-host with one channel, "vm", to a socket that nobody has made yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "host.sock"
        self.agent = Agent(str(directory / "agent.sock"))
        self.ran: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._cable: Cable | None = None

    def _start(self, *words: str) -> None:
        with (self.directory / "log").open("ab") as log:
            command = [sys.executable, "-m", *words]
            self._processes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))

    def start_host(self) -> None:
        policy = self.directory / "policy"
        policy.mkdir()
        (policy / "50-all.policy").write_text("listen,reply any any allow\n")
        lines = (
            "[vchan]",
            "libvirt_uri =",
            f"socket = {self.socket}",
            f"policy_dir = {policy}",
            "audit_log = -",
            f"channels = vm=connect:{self.directory}/host",
        )
        (self.directory / "vchan.conf").write_text("\n".join(lines))
        self.start_host_again()

    def start_host_again(self) -> None:
        self._start("vchan.host.daemon", "--config-file", f"{self.directory}/vchan.conf")
        wait(self._answers)

    def _answers(self) -> bool:
        try:
            Client(str(self.socket)).close()
        except LinkError:
            return False
        return True

    def plug_in(self) -> None:
        """Now there is a socket, as QEMU makes it, and nobody at its other end."""
        self._cable = Cable(self.directory)
        self._cable.__enter__()

    def start_guest(self) -> None:
        port, socket = f"unix:{self.directory}/guest", f"{self.directory}/agent.sock"
        self._start("vchan.guest.daemon", "--port", port, "--socket", socket)
        self.agent.serve("agent", self)
        self._threads.append(threading.Thread(target=self.agent.run))
        self._threads[-1].start()

    def work(self, number: int) -> int:
        """The agent's method."""
        self.ran.append(number)
        return number

    def close(self) -> None:
        for thread in self._threads:
            self.agent.stop()
            thread.join(WAIT_S)
        for process in self._processes:
            process.kill()
            process.wait()
        if self._cable is not None:
            self._cable.__exit__()
        print((self.directory / "log").read_text())


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        site = Site(Path(name))
        try:
            site.start_host()
            yield site
        finally:
            site.close()


@pytest.fixture
def run(site: Site, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit status, standard output, standard error) of a command."""

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.run(["--socket", str(site.socket), *words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def channel(run: Run) -> tuple[str, str]:
    """Its state, and why, in `vchan list`; `vchan status` says the same."""
    (row,) = json.loads(run("--json", "list")[1])
    status = json.loads(run("--json", "status", "vm")[1])
    if row["channel"] == status["state"]:
        assert bool(row["problem"]) == bool(status["problem"])
    return row["channel"], row["problem"] or ""


def test_what_was_not_delivered_says_so_and_never_runs(site: Site, run: Run) -> None:
    state, problem = channel(run)
    assert state == "connecting"
    assert f"{site.directory}/host: no such socket" in problem

    words = ("--timeout", "1", "call", "vm", "agent", "work", "number=1")
    status, out, err = run(*words)
    assert (status, out) == (cli.EXIT_FAILED, "")
    first, last = err.splitlines()
    assert first.startswith("vchan: vm is connecting: ")
    assert first.endswith("waiting for it, 1 s at most")
    assert "not delivered: VM vm is connecting: " in last
    assert "may have run" not in err

    site.plug_in()
    wait(lambda: channel(run)[0] == "waiting")
    assert "is vchan-guest installed and running" in channel(run)[1]
    status, _, err = run("--timeout", "1", "cast", "vm", "agent", "work", "number=2")
    assert status == cli.EXIT_FAILED
    assert "not delivered: VM vm is waiting: nobody answers" in err

    with Client(str(site.socket)) as client:
        threading.Timer(0.5, site.start_guest).start()
        assert client.call("agent", "work", {"number": 3}, server="vm", timeout_s=WAIT_S) == 3
        assert channel(run) == ("ready", "")
        assert client.call("agent", "work", {"number": 4}, server="vm", timeout_s=WAIT_S) == 4
    assert site.ran == [3, 4]  # and neither of those that were not delivered


def test_a_connection_that_is_lost_is_like_none(site: Site, run: Run) -> None:
    """The session is not over, and would deliver what it is given: it is given nothing."""
    site.plug_in()
    site.start_guest()
    with Client(str(site.socket)) as client:
        assert client.call("agent", "work", {"number": 1}, server="vm", timeout_s=WAIT_S) == 1
        assert site._cable is not None
        site._cable.__exit__()
        wait(lambda: channel(run)[0] == "connecting")
        for path in (site._cable.host, site._cable.guest):
            path.unlink()
        with pytest.raises(NoSuchAgent, match="not delivered: VM vm is connecting"):
            client.call("agent", "work", {"number": 2}, server="vm", timeout_s=0.3)
        site.plug_in()
        assert client.call("agent", "work", {"number": 3}, server="vm", timeout_s=WAIT_S) == 3
    assert site.ran == [1, 3]


def test_what_was_delivered_may_have_run(site: Site, run: Run) -> None:
    site.plug_in()
    site.start_guest()
    with Client(str(site.socket)) as client:
        assert client.call("agent", "work", {"number": 1}, server="vm", timeout_s=WAIT_S) == 1
        guest = site._processes[-1]
        guest.send_signal(19)  # SIGSTOP: the bytes are on their way to it
        with pytest.raises(CallTimeout):
            client.call("agent", "work", {"number": 2}, server="vm", timeout_s=0.3)
        status, _, err = run("--timeout", "1", "call", "vm", "agent", "work", "number=3")
        assert (status, "may have run" in err) == (cli.EXIT_TIMEOUT, True)
        guest.send_signal(18)
        assert client.call("agent", "work", {"number": 4}, server="vm", timeout_s=WAIT_S) == 4


def test_what_a_daemon_before_delivered_may_have_run(site: Site) -> None:
    """The new one has not sent it: that says nothing."""
    site.plug_in()
    site.start_guest()
    host, guest = site._processes
    gone = threading.Event()

    def work_late(number: int) -> int:
        site.ran.append(number)
        gone.wait(WAIT_S)
        return number

    told: list[Exception] = []
    with Client(str(site.socket)) as client:
        assert client.call("agent", "work", {"number": 1}, server="vm", timeout_s=WAIT_S) == 1
        setattr(site, "work", work_late)  # noqa: B010

        def ask() -> None:
            with pytest.raises((CallTimeout, NoSuchAgent)) as raised:
                client.call("agent", "work", {"number": 2}, server="vm", timeout_s=10)
            told.append(raised.value)

        thread = threading.Thread(target=ask)
        thread.start()
        wait(lambda: site.ran == [1, 2])
        guest.send_signal(19)  # SIGSTOP: nothing comes through
        host.kill()
        host.wait()
        gone.set()
        site.start_host_again()
        thread.join(WAIT_S)
        guest.send_signal(18)
    assert [type(error) for error in told] == [CallTimeout]
    assert site.ran == [1, 2]


def test_the_command_and_the_daemon_agree(site: Site, run: Run) -> None:
    """What it reads of the daemon's status is there: the files, the rule that denied a topic."""
    site.plug_in()
    site.start_guest()
    wait(lambda: channel(run)[0] == "ready" and json.loads(run("list", "--json")[1])[0]["topics"])
    assert run("list", "--topic", "agent", "-f", "value", "-c", "name")[1] == "vm\n"
    assert run("doctor", "vm")[1].startswith(
        "ok       vm: running, ready, serves openstack/agent\n"
    )
    assert f"{site.directory}/vchan.conf" in run("status")[1]
    assert "serves:              openstack/agent" in run("status", "vm")[1]
    assert "asked 3, answered 3; " in run("ping", "vm")[1]
    assert (
        "no agent serves topic openstack/other; served in vm: "
        in run("call", "vm", "other", "work")[2]
    )
    status, _, err = run("log")
    assert (status, "journalctl -o cat -u vchan-host" in err) == (cli.EXIT_USAGE, True)
    rows = json.loads(run("top", "--interval", "0.1", "--count", "1", "--json")[1])
    assert [(row["name"], row["channel"]) for row in rows] == [("vm", "ready")]

    file = site.directory / "policy" / "50-all.policy"
    file.write_text("# not this one\nlisten any agent deny\nlisten,reply any any allow\n")
    assert run("policy", "check", "listen", "agent")[1].endswith(f"deny: {file}:2\n")
    site._processes[0].send_signal(1)  # SIGHUP: the policy is read again
    wait(lambda: f"openstack/agent ({file}:2)" in run("status", "vm")[1])
    assert f"its agents serve openstack/agent, and {file}:2 denies it" in run("doctor", "vm")[1]
