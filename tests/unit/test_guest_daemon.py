"""The guest daemon as a process, with an agent, on sockets instead of a virtio port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig.gates import OpenGate
from tests.rig.hosting import HostEnd
from tests.rig.phases import hush, speak
from tests.unit.cable import Cable
from tests.unit.pair import reconfigure
from vchan import __version__
from vchan.client import Agent
from vchan.errors import ConfigError
from vchan.guest.daemon import DEFAULT_SOCKET, Options, parse_options, parse_report
from vchan.guest.port import DEFAULT_PORT
from vchan.rpc.in_flight import Answered, HandedBack
from vchan.rpc.messages import AGENT_GONE, NO_AGENT
from vchan.session import Session

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "tests" / "rig" / "counting_agent.py"
WAIT_S = 30.0


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


class Program:
    """A program of ours, its standard error in a file."""

    def __init__(self, log: Path, *command: str) -> None:
        self.log = log
        self._command = [sys.executable, *command]
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait_log(self, *words: str) -> str:
        found: list[str] = []

        def look() -> bool:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            found[:] = [line for line in lines if all(word in line for word in words)]
            return bool(found)

        wait(look, lambda: self.log.read_text())
        return found[0]


def wait(reached: Callable[[], bool], failure: Callable[[], str] = lambda: "") -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s, failure()
        time.sleep(0.01)


@pytest.fixture
def cable(directory: Path) -> Iterator[Cable]:
    with Cable(directory) as cable:
        yield cable


@pytest.fixture
def daemon(directory: Path, cable: Cable) -> Iterator[Program]:
    daemon = guest_daemon(directory, f"unix:{cable.guest}")
    daemon.start()
    yield daemon
    daemon.kill()


def guest_daemon(directory: Path, port: str, *others: str) -> Program:
    options = ["--port", port, "--socket", str(directory / "agent.sock"), *others]
    return Program(directory / "daemon.log", "-m", "vchan.guest.daemon", *options)


@pytest.fixture
def agent(directory: Path) -> Iterator[Program]:
    words = [str(AGENT), "demo", str(directory / "ran"), str(directory / "agent.sock")]
    agent = Program(directory / "agent.log", "-c", RUN, *words)
    agent.start()
    yield agent
    agent.kill()


# The agent's file lies outside of the package: it is run as in a guest, with vchan on its path.
RUN = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def host(cable: Cable, daemon: Program) -> Iterator[HostEnd]:
    with HostEnd(cable.host) as host:
        yield host


def echo(host: HostEnd, number: int) -> bool:
    answer = host.call("demo", "echo", sender="test", number=number)
    return bool(json.loads(answer) == ["test", number, ""])


def ran(host: HostEnd) -> list[int]:
    found: list[int] = json.loads(
        host.call("demo", "executed", sender="test", start=0, count=1_000_000)
    )
    return found


# --- serving


def steps_of(line: str) -> list[str]:
    return [step.rpartition(" ")[0] for step in line.partition("in ms: ")[2].split(", ")]


def test_both_ends_tell_an_arrival_step_by_step_and_the_host_a_departure(
    directory: Path, cable: Cable, daemon: Program, agent: Program
) -> None:
    daemon.kill()
    telling = guest_daemon(directory, f"unix:{cable.guest}", "--debug")
    telling.start()
    try:
        with HostEnd(cable.host) as host:
            assert echo(host, 0)
            line = telling.wait_log("arrival at", "answered")
            host.run(lambda: hush(host.channel))
            host.run(lambda: speak(host.channel))
            host.run(lambda: hush(host.channel))
    finally:
        telling.kill()
    in_guest = steps_of(line)
    assert in_guest[-1] == "answered"
    assert {"session open", "topics said", "first request", "with an agent"} <= set(in_guest)
    arrival, stayed, again, departure = host.debug
    at_host = steps_of(arrival)
    assert (at_host[0], at_host[-1]) == ("told to speak", "answered")
    assert {"session open", "topics heard", "sent to the guest"} <= set(at_host)
    assert "departure at" in stayed and "broken off" in stayed
    assert "arrival at" in again and "broken off" in again
    assert "departure at" in departure and steps_of(departure) == ["hushed", "released"]


def test_calls_reach_the_agent(host: HostEnd, agent: Program) -> None:
    assert all(echo(host, number) for number in range(20))
    assert ran(host) == list(range(20))
    info = json.loads(host.call("vchan.guest", "info"))
    assert info["topics"] == ["openstack/demo"]
    assert json.loads(host.call("vchan.guest", "ping")) == {}


def test_how_long_the_daemon_and_its_machine_have_been_up(cable: Cable, directory: Path) -> None:
    before_s = time.monotonic()
    daemon = guest_daemon(directory, f"unix:{cable.guest}")
    daemon.start()
    try:
        with HostEnd(cable.host) as host:
            info = json.loads(host.call("vchan.guest", "info"))
    finally:
        daemon.kill()
    assert 0 <= info["uptime_s"] <= time.monotonic() - before_s + 0.1
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    assert up_s - WAIT_S <= info["machine_uptime_s"] <= up_s + 0.1


def test_no_agent(host: HostEnd) -> None:
    outcome = host.submit("demo", "echo").result(WAIT_S)
    assert isinstance(outcome, HandedBack)
    assert outcome.reason == NO_AGENT


def test_the_stream_is_cut_again_and_again(host: HostEnd, agent: Program) -> None:
    assert echo(host, 0)
    for turn in range(4):
        calls = [
            host.submit("demo", "echo", sender="test", number=1 + turn * 20 + n, payload="x" * 999)
            for n in range(20)
        ]
        host.cut()
        for call in calls:
            call.result(WAIT_S)
    assert ran(host) == list(range(81))
    assert host.summary()["session"]["sessions"] == 1


def test_the_daemon_is_killed_and_the_agent_lives(
    host: HostEnd, daemon: Program, agent: Program
) -> None:
    assert echo(host, 0)
    for turn in range(2):
        calls = [
            host.submit("demo", "echo", sender="test", number=1 + turn * 20 + n) for n in range(20)
        ]
        if turn:  # it has some that it has not answered, for sure
            agent.process.send_signal(signal.SIGSTOP)
            calls += [host.submit("demo", "echo", sender="test", number=41 + n) for n in range(3)]
            wait(lambda: json.loads(host.call("vchan.guest", "info"))["running"] > 3)
        daemon.kill()
        daemon.start()
        agent.process.send_signal(signal.SIGCONT)
        for call in calls:
            assert isinstance(call.result(WAIT_S), Answered)
        # All may have been answered before it was killed; what is sent to it now, before the host
        # has heard of the next one, may have run: the next one says so of its own methods.
        wait(lambda turn=turn: host.summary()["session"]["sessions"] == turn + 2)  # type: ignore[misc]
    assert ran(host) == list(range(44))


def test_the_agent_is_killed(host: HostEnd, agent: Program) -> None:
    assert echo(host, 0)
    agent.process.send_signal(signal.SIGSTOP)
    calls = [host.submit("demo", "echo", sender="test", number=n) for n in (1, 2)]
    wait(lambda: json.loads(host.call("vchan.guest", "info"))["running"] == 3)
    agent.kill()
    for call in calls:
        outcome = call.result(WAIT_S)
        assert isinstance(outcome, HandedBack)
        assert outcome.reason == AGENT_GONE
        assert "went away" in outcome.text
    agent.start()
    assert echo(host, 3)
    assert ran(host) == [0, 3]


def test_a_daemon_that_stood_still_still_has_its_agents(
    host: HostEnd, daemon: Program, agent: Program
) -> None:
    assert echo(host, 0)
    daemon.process.send_signal(signal.SIGSTOP)
    call = host.submit("demo", "echo", sender="test", number=1)
    wait(lambda: host.summary()["channel"]["cures"] > 0)  # after some seconds
    daemon.process.send_signal(signal.SIGCONT)
    call.result(WAIT_S)
    assert echo(host, 2)
    assert ran(host) == [0, 1, 2]


def test_it_ends_in_order_when_told(daemon: Program, directory: Path) -> None:
    daemon.wait_log("agents at", "agent.sock")
    daemon.process.terminate()
    assert daemon.process.wait(WAIT_S) == 0
    assert not (directory / "agent.sock").exists()


def test_no_port_yet(directory: Path) -> None:
    daemon = guest_daemon(directory, f"unix:{directory}/later/guest")
    daemon.start()
    try:
        daemon.wait_log(f"{directory}/later/guest: no such socket: it may appear later")
        (directory / "later").mkdir()
        with Cable(directory / "later") as cable, HostEnd(cable.host) as host:
            host.wait_ready()
        assert daemon.log.read_text().count("may appear later") == 1
    finally:
        daemon.kill()


def test_a_device_that_is_no_port(directory: Path) -> None:
    """It may be a mistake, or become one: said once, and tried again."""
    daemon = guest_daemon(directory, "virtio:/dev/null")
    daemon.start()
    try:
        daemon.wait_log("/dev/null: cannot be waited for: it is no virtio-serial port")
        time.sleep(0.3)
        assert daemon.process.poll() is None
        daemon.process.terminate()
        assert daemon.process.wait(WAIT_S) == 0
        assert daemon.log.read_text().count("/dev/null") == 1
        assert "Traceback" not in daemon.log.read_text()
    finally:
        daemon.kill()


def test_another_protocol_version_is_refused_readably(cable: Cable, daemon: Program) -> None:
    with HostEnd(cable.host) as host:
        session = host.channel._session
        host.run(lambda: _be_newer(host))
        wait(lambda: any("upgrade the older one" in line for line in host.log))
        line = daemon.wait_log("refused", "upgrade the older one")
        assert session.peer is None
    assert line.startswith("refused")
    assert sum("refused" in line for line in host.log) == 1


def _be_newer(host: HostEnd) -> None:
    channel = host.channel
    assert isinstance(channel._session, Session)
    reconfigure(channel._session, version_min=2, version_max=2)
    assert channel._link is not None
    channel._session.open(time.monotonic())
    channel._link.flush()


# --- options


def test_the_defaults() -> None:
    assert parse_options([]) == Options(DEFAULT_PORT, DEFAULT_SOCKET, 0o660, False)


def test_the_command_line_goes_before_the_file(directory: Path) -> None:
    file = directory / "guest.conf"
    file.write_text("# a comment\n\nport = unix:/a\nsocket=/b # another\nsocket-mode = 0600\n")
    options = parse_options(["--config", str(file), "--socket=/c", "--quiet"])
    assert options == Options("unix:/a", "/c", 0o600, True)
    file.write_text("port = unix:/a#1\t# a comment\nsocket = /b#\n#quiet = yes\n  # another\n")
    assert parse_options(["--config", str(file)]) == Options("unix:/a#1", "/b#", 0o660, False)
    file.write_text("quiet = yes\n")
    assert parse_options(["--config", str(file)]).quiet
    file.write_text("quiet = no\n")
    assert not parse_options(["--config", str(file)]).quiet


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--dance"], "command line: '--dance' is no option"),
        (["dance"], "command line: 'dance' is no option"),
        (["--port"], "command line: --port needs a value"),
        (["--port", "tcp:1"], "--port: port 'tcp:1': expected one of virtio:NAME"),
        (["--port", "unix:relative"], "port 'unix:relative': expected"),
        (["--socket", "relative"], "--socket: 'relative': expected an absolute path"),
        (["--socket-mode", "9"], "--socket-mode: '9': expected an octal mode"),
        (["--exit-without-port", "-1"], "'-1': expected a whole number of seconds"),
        (["--units", "relative"], "--units: 'relative': expected an absolute path"),
        (["--allow", "ping, all"], "--allow: 'all': expected ping, info, list, "),
        (["--port", "serial:ttyS1"], "--port: port 'serial:ttyS1': expected a device's path"),
        (["--config", "/no/such/file"], "/no/such/file: no such file"),
        (["--config", "/proc/self"], "/proc/self: cannot be read"),
        (
            ["--config", "{file}"],
            "{file}:2: 'dance' is no option; expected OPTION = VALUE, one of port",
        ),
        (["--config", "{mode}"], "{mode}:1: socket-mode: '1234567': expected an octal mode"),
        (["--config", "{quiet}"], "{quiet}:1: quiet: 'perhaps': expected yes or no"),
        (["--config", "{binary}"], "{binary}: cannot be read"),
    ],
)
def test_a_wrong_option_says_which_and_what_was_expected(
    directory: Path, arguments: list[str], text: str
) -> None:
    files = {
        "file": b"port = virtio:x\ndance = yes\n",
        "mode": b"socket-mode = 1234567\n",
        "quiet": b"quiet = perhaps\n",
        "binary": bytes(range(256)),
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    names = {name: str(directory / name) for name in files}
    with pytest.raises(ConfigError) as caught:
        parse_options([word.format(**names) for word in arguments])
    assert text.format(**names) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--dance"], 2, "is no option"),
        (["--socket", "/proc/nowhere/agent.sock"], 3, "/proc/nowhere/agent.sock: "),
        (["--socket", "/etc/hostname"], 3, "/etc/hostname: is there and is no socket"),
        (["--help"], 0, "exit status"),
        (["--version"], 0, "vchan-guest "),
    ],
)
def test_how_the_command_ends(arguments: list[str], status: int, text: str) -> None:
    done = run_daemon(*arguments)
    assert done.returncode == status, done.stderr
    assert text in done.stdout + done.stderr
    if status:
        assert done.stderr.startswith("vchan-guest: ")
        assert done.stderr.count("\n") == 1


def test_a_second_daemon_is_told_of_the_first(daemon: Program, directory: Path) -> None:
    daemon.wait_log("agents at")
    done = run_daemon("--socket", str(directory / "agent.sock"))
    assert done.returncode == 3
    assert "another daemon listens there" in done.stderr
    assert done.stderr.count("\n") == 1


def run_daemon(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vchan.guest.daemon", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def test_an_agent_without_a_daemon_waits_for_it(directory: Path) -> None:
    said: list[str] = []
    agent = Agent(str(directory / "agent.sock"), log=said.append)
    agent.loop.call_later(0.2, agent.stop)
    agent.run()
    assert "no such socket" in said[0]


# --- reports


class Reported:
    """A host that takes reports, and what came."""

    def __init__(self, cable: Cable, *, may_report: bool = True) -> None:
        self.end = HostEnd(cable.host, gate=OpenGate(may_report=may_report))

    def __enter__(self) -> Reported:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()

    def shown(self) -> dict[str, Any]:
        return self.end.run(lambda: self.end.channel.downward.upward.reports.shown(0.0))

    def wait_for(self, *kinds: str) -> dict[str, Any]:
        wait(lambda: set(kinds) <= set(self.shown()), lambda: f"{self.shown()} {self.end.log}")
        return self.shown()


def test_a_host_that_takes_reports_knows_the_guest(cable: Cable, daemon: Program) -> None:
    for _ in range(2):  # the second knows nothing of the first
        with Reported(cable) as host:
            shown = host.wait_for("phase", "facts", "agents")
            assert shown["phase"]["phase"] == "ready"
            assert shown["facts"]["hostname"] == os.uname().nodename
            assert shown["facts"]["vchan"] == __version__
            assert shown["agents"]["units"] == {}
            assert "metrics" not in shown
            told = json.loads(host.end.call("vchan.guest", "metrics"))
            assert told["memory"]["total_bytes"] > 0
            assert host.wait_for("metrics")["metrics"]["memory"] == told["memory"]


def test_a_host_that_takes_none_gets_none(cable: Cable, daemon: Program) -> None:
    with Reported(cable, may_report=False) as host:
        host.end.wait_ready()
        assert json.loads(host.end.call("vchan.guest", "facts"))["hostname"]
        time.sleep(1.5)
        assert host.shown() == {}
        assert host.end.channel.downward.upward.counters["guest_requests"] == 0


def test_a_guest_that_ends_says_so_first(cable: Cable, daemon: Program) -> None:
    with Reported(cable) as host:
        host.wait_for("phase")
        daemon.process.terminate()
        assert daemon.process.wait(WAIT_S) == 0
        wait(lambda: host.shown()["phase"]["phase"] == "ending", lambda: str(host.shown()))


def test_what_the_owner_does_not_want_told_is_not(directory: Path, cable: Cable) -> None:
    daemon = guest_daemon(directory, f"unix:{cable.guest}")
    daemon._command += ["--report", "phase"]
    daemon.start()
    try:
        with Reported(cable) as host:
            host.wait_for("phase")
            outcome = host.end.submit("vchan.guest", "facts").result(WAIT_S)
            assert isinstance(outcome, Answered) and outcome.failed
            assert b"option report" in outcome.body
            assert set(host.shown()) == {"phase"}
    finally:
        daemon.kill()


def test_units_are_reported_as_they_crash(directory: Path, cable: Cable) -> None:
    units = directory / "units"
    units.mkdir(mode=0o700)
    unit = 'command = ["/bin/sh", "-c", "sleep 0.3; exit 3"]\nrestart = "no"\n'
    (units / "broken.toml").write_text(unit)
    daemon = guest_daemon(directory, f"unix:{cable.guest}")
    daemon._command += ["--units", str(units)]
    daemon.start()
    try:
        with Reported(cable) as host:

            def has_failed() -> bool:
                told = host.shown().get("agents", {}).get("units", {}).get("broken", {})
                return bool(told.get("state") == "failed")

            wait(has_failed, lambda: f"{host.shown()} {daemon.log.read_text()}")
            told = host.shown()["agents"]["units"]["broken"]
            assert told == {"state": "failed", "starts": 1, "last_exit": "status 3", "problem": ""}
    finally:
        daemon.kill()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("phase,facts", {"phase": 0, "facts": 0}),
        ("metrics", {"metrics": 0}),
        ("metrics:60, agents", {"metrics": 60, "agents": 0}),
    ],
)
def test_what_is_to_be_reported(text: str, wanted: dict[str, int]) -> None:
    assert parse_report(text) == wanted


@pytest.mark.parametrize("text", ["fact", "facts:60", "metrics:", "metrics:9", "metrics:-1", "*"])
def test_what_cannot_be_reported(text: str) -> None:
    with pytest.raises(ConfigError, match="metrics:SECONDS of 10 or more"):
        parse_options(["--config", "/dev/null", "--report", text])
