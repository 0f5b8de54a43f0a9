"""The super-agent with real processes: in a loop here, and inside the daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.rig.hosting import HostEnd
from tests.unit.cable import Cable
from vchan.agents import processes
from vchan.agents.allowed import UNIT_METHODS, Allowed, running_directory
from vchan.agents.processes import Child, start_time
from vchan.agents.super_agent import (
    LINE_BYTES_MAX,
    LINES_BYTES_MAX,
    LINES_MAX,
    LastLines,
    SuperAgent,
    describe_status,
)
from vchan.agents.systemd import Systemd, systemd_row
from vchan.agents.units import Unit
from vchan.errors import Rejected
from vchan.io.loop import Loop
from vchan.rpc.deferred import Later
from vchan.rpc.in_flight import Answered

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0
EVERYTHING = "ping, info, list, state, log, start, stop, restart"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture(autouse=True)
def plain_umask() -> Iterator[None]:
    """Files that others can change are refused."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "units").mkdir()
        yield path


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_gone(pids: Iterable[int]) -> bool:
    return not any(map(is_alive, pids))


def wait(reached: Callable[[], object], turn: Callable[[], object] = lambda: None) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s
        turn()
        time.sleep(0.005)


def write_unit(directory: Path, name: str, script: str, more: str) -> None:
    words = json.dumps(["/bin/sh", "-c", script])
    (directory / "units" / f"{name}.toml").write_text(f"command = {words}\n{more}\n")


class Rig:
    """The super-agent in a loop that turns only when asked to."""

    def __init__(self, directory: Path, allow: str = EVERYTHING, systemd: Systemd | None = None):
        self.directory = directory
        self.loop = Loop()
        self.said: list[str] = []
        self.served: set[str] = set()
        self.agents = SuperAgent(
            self.loop,
            str(directory / "units"),
            str(directory / "agent.sock"),
            Allowed(allow),
            lambda: self.served,
            lambda _, text: self.said.append(text),
            systemd,
        )

    def unit(self, name: str, script: str, more: str = "") -> None:
        """A unit that runs a shell script."""
        write_unit(self.directory, name, script, more)

    def turn(self) -> None:
        self.loop.run_once(0.01)

    def wait(self, reached: Callable[[], object]) -> None:
        try:
            wait(reached, self.turn)
        except AssertionError as error:
            raise AssertionError(self.said) from error

    def ask(self, method: str, **args: Any) -> Any:
        result = self.agents.methods()[method](args)
        if isinstance(result, Later):
            told: list[Any] = []
            result.then(lambda value, _: told.append(value))
            self.wait(lambda: told)
            (result,) = told
        if isinstance(result, Exception):
            raise result
        return result

    def state(self, name: str) -> Any:
        return self.ask("agent_state", name=name)

    def pid(self, name: str) -> int:
        return int(self.state(name)["pid"])

    def written(self, name: str, lines: int = 1) -> list[str]:
        """What a unit has written into a file, when it is so many lines."""
        path = self.directory / name
        self.wait(lambda: path.exists() and path.read_text().count("\n") >= lines)
        return path.read_text().splitlines()

    def close(self) -> None:
        ended: list[bool] = []
        self.agents.end(lambda: ended.append(True))
        self.wait(lambda: ended)
        self.agents.close()
        self.loop.close()


@pytest.fixture
def rig(directory: Path) -> Iterator[Rig]:
    rig = Rig(directory)
    yield rig
    rig.close()


# --- running


def test_a_unit_runs_as_its_file_says(rig: Rig) -> None:
    out = rig.directory / "x"
    rig.unit(
        "one",
        f"pwd >{out}; env >>{out}; ulimit -n >>{out}; exec sleep 1000",
        'directory = "/usr"\nenvironment = { COLOUR = "blue" }\ntopics = ["a", "b"]\n'
        "limits = { files = 77 }",
    )
    os.environ["NOTIFY_SOCKET_OF_OURS"] = "x"
    rig.agents.begin()
    written = rig.written("x", 8)
    assert written[0] == "/usr"
    assert written[-1] == "77"
    assert "COLOUR=blue" in written
    assert f"VCHAN_SOCKET={rig.directory}/agent.sock" in written
    assert not any("NOTIFY_SOCKET" in line for line in written)
    pid = rig.pid("one")
    assert os.getpgid(pid) == os.getsid(pid) == pid
    rig.wait(lambda: b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes())
    fds = {int(path.name): str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert fds[0] == "/dev/null"
    ours = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    inheritable = {fd for fd in ours if fd in fds and os.get_inheritable(fd)}
    assert set(fds) - inheritable <= {0, 1, 2}
    state = rig.state("one")
    assert state["state"] == "running"
    assert state["starts"] == 1
    assert not state["serves"]
    rig.served = {"a", "b"}
    assert rig.state("one")["serves"]
    assert state["command"][:2] == ["/bin/sh", "-c"]
    assert state["by"] == "vchan-guest"


def test_signals_are_as_a_program_expects_them(rig: Rig) -> None:
    rig.unit("one", f"grep Sig /proc/self/status >{rig.directory}/x; sleep 1000")
    rig.agents.begin()
    fields = dict(line.split(":\t") for line in rig.written("x", 5))
    assert int(fields["SigBlk"], 16) == 0
    assert int(fields["SigIgn"], 16) & (1 << (signal.SIGPIPE - 1)) == 0


@needs_root
def test_a_unit_runs_as_its_user(rig: Rig) -> None:
    rig.directory.chmod(0o777)
    rig.unit(
        "one",
        f"id >{rig.directory}/x; echo $USER $HOME >>{rig.directory}/x; sleep 1000",
        'user = "nobody"\ngroup = "daemon"',
    )
    rig.agents.begin()
    who, names = rig.written("x", 2)
    assert who.startswith("uid=65534(nobody) gid=1(daemon)")
    assert "root" not in who
    assert names.startswith("nobody /")


def test_only_root_becomes_somebody_else(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    rig.unit("one", "true", 'user = "nobody"')
    rig.agents.begin()
    (row,) = rig.ask("agents")
    assert row["state"] == "broken"
    assert "one.toml: user: only a daemon that runs as root can become 'nobody'" in row["problem"]


@pytest.mark.parametrize(
    ("command", "more", "text"),
    [
        ('["/no/such/program"]', "", "cannot start: /no/such/program: No such file or directory"),
        ('["/etc/"]', "", "cannot start: /etc/: Permission denied"),
        ('["/bin/true"]', 'directory = "/no/such"', "cannot start: /no/such: No such file"),
    ],
)
def test_what_cannot_be_started_says_why(rig: Rig, command: str, more: str, text: str) -> None:
    unit = f"command = {command}\nrestart = 'no'\n{more}\n"
    (rig.directory / "units" / "one.toml").write_text(unit)
    rig.agents.begin()
    rig.wait(lambda: rig.state("one")["state"] == "failed")
    assert rig.state("one")["last_exit"] == "status 127"
    (line,) = rig.ask("agent_log", name="one")
    assert text in line


def test_there_can_be_no_process(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> int:
        raise OSError(38, "Function not implemented")

    rig.unit("one", "sleep 1000", "restart_delay_s = 0.05")
    monkeypatch.setattr(os, "pidfd_open", fail)
    rig.agents.begin()
    rig.wait(lambda: rig.state("one")["state"] == "waiting")
    assert "Function not implemented" in rig.state("one")["problem"]
    monkeypatch.undo()
    rig.wait(lambda: rig.state("one")["state"] == "running")
    assert rig.state("one")["problem"] == ""


def test_autostart(rig: Rig) -> None:
    rig.unit("one", "sleep 1000", "autostart = false")
    rig.agents.begin()
    assert rig.state("one")["state"] == "stopped"
    assert rig.ask("agent_start", name="one")["state"] == "running"
    assert rig.ask("agent_start", name="one")["starts"] == 1


# --- ending


def test_a_crash_loop_backs_off(rig: Rig) -> None:
    rig.unit("one", f"echo x >>{rig.directory}/x; exit 3", "restart_delay_s = 0.05")
    rig.agents.begin()
    rig.written("x", 5)
    rig.wait(lambda: rig.state("one")["state"] == "waiting")
    state = rig.state("one")
    assert state["crash_loop"]
    assert state["last_exit"] == "status 3"
    assert state["next_start_s"] <= 60
    assert any("started again in" in line and "quick ends in a row" in line for line in rig.said)


def test_stopping_waits_for_the_end(rig: Rig) -> None:
    rig.unit(
        "one", "trap 'echo bye; sleep 0.2; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    )
    rig.agents.begin()
    rig.wait(lambda: rig.ask("agent_log", name="one") == ["up"])
    pid = rig.pid("one")
    row = rig.ask("agent_stop", name="one")
    assert row["state"] == "stopped"
    assert row["pid"] is None
    assert not is_alive(pid)
    lines = rig.ask("agent_log", name="one")  # its shell may have something to say of sleep's end
    assert (lines[0], lines[-1]) == ("up", "bye")
    assert rig.ask("agent_stop", name="one")["state"] == "stopped"


def test_who_does_not_stop_is_killed(rig: Rig) -> None:
    rig.unit("one", "trap '' TERM; echo up; while :; do sleep 0.05; done", "stop_timeout_s = 0.1")
    rig.agents.begin()
    rig.wait(lambda: rig.ask("agent_log", name="one") == ["up"])
    assert rig.ask("agent_stop", name="one")["state"] == "stopped"
    assert rig.state("one")["last_exit"] == "by SIGKILL"
    assert any("did not end in time: killed" in line for line in rig.said)


def test_restarting(rig: Rig) -> None:
    rig.unit("one", "sleep 1000")
    rig.agents.begin()
    before = rig.pid("one")
    row = rig.ask("agent_restart", name="one")
    assert row["state"] == "running"
    assert row["starts"] == 2
    assert row["pid"] != before
    assert not is_alive(before)


@pytest.mark.parametrize("how", ["stop", "by itself"])
def test_what_it_started_ends_with_it(rig: Rig, how: str) -> None:
    script = f"(trap '' TERM HUP; sleep 1000) & echo $! >{rig.directory}/x; "
    rig.unit("one", script + ("sleep 1000" if how == "stop" else "sleep 0.2"), "restart = 'no'")
    rig.agents.begin()
    (grandchild,) = map(int, rig.written("x"))
    assert is_alive(grandchild)
    if how == "stop":
        rig.ask("agent_stop", name="one")
    rig.wait(lambda: rig.state("one")["state"] == "stopped")
    wait(lambda: not is_alive(grandchild))


# --- what it said


def test_what_it_said_last(rig: Rig) -> None:
    rig.unit("one", "echo out; echo err >&2; printf unfinished; sleep 1000")
    rig.agents.begin()
    rig.wait(lambda: rig.ask("agent_log", name="one") == ["out", "err"])
    assert rig.ask("agent_log", name="one", lines=1) == ["err"]
    assert "unit one: err" in rig.said
    rig.ask("agent_stop", name="one")
    assert rig.ask("agent_log", name="one") == ["out", "err", "unfinished"]


def test_who_talks_too_much_is_forgotten_in_part_and_holds_up_nobody(rig: Rig) -> None:
    rig.unit("one", f"seq 100000; echo done >{rig.directory}/x; sleep 1000")
    rig.agents.begin()
    rig.written("x")
    rig.wait(lambda: rig.ask("agent_log", name="one", lines=1) == ["100000"])
    lines = rig.ask("agent_log", name="one", lines=LINES_MAX)
    assert lines == [str(number) for number in range(100001 - LINES_MAX, 100001)]


def test_lines_are_bounded() -> None:
    lines = LastLines()
    assert lines.feed(b"x" * (LINE_BYTES_MAX * 3)) == ["x" * LINE_BYTES_MAX] * 2
    assert lines.feed(b"\nshort\r\n\n") == ["x" * LINE_BYTES_MAX, "short", ""]
    assert lines.feed(b"y" * (LINE_BYTES_MAX * 2 + 5) + b"\n") == [
        *["y" * LINE_BYTES_MAX] * 2,
        "yyyyy",
    ]
    assert lines.finish() == []
    for _ in range(1000):
        lines.feed(b"z" * (LINE_BYTES_MAX - 1) + b"\n")
    kept = lines.last(LINES_MAX)
    assert len(kept) <= LINES_MAX
    assert 0 < sum(map(len, kept)) <= LINES_BYTES_MAX
    assert lines.feed(b"\xff\n") == ["\ufffd"]
    assert lines.last(0) == []


# --- the directory


def test_reading_the_units_again(rig: Rig) -> None:
    rig.unit("stays", "sleep 1000")
    rig.unit("goes", "sleep 1000")
    rig.unit("changes", "sleep 1000")
    rig.agents.begin()
    stays, goes, changes = (rig.pid(name) for name in ("stays", "goes", "changes"))
    (rig.directory / "units" / "goes.toml").unlink()
    (rig.directory / "units" / "changes.toml").write_text('command = ["/bin/sleep", "2000"]')
    rig.unit("comes", "sleep 1000")
    rig.unit("waits", "sleep 1000", "autostart = false")
    rig.agents.reload()
    rig.wait(
        lambda: {row["name"] for row in rig.ask("agents")} == {"stays", "changes", "comes", "waits"}
    )
    assert not is_alive(goes)
    assert rig.pid("stays") == stays
    assert rig.pid("changes") == changes
    assert rig.state("comes")["state"] == "running"
    assert rig.state("waits")["state"] == "stopped"
    assert rig.ask("agent_restart", name="changes")["pid"] != changes
    wait(lambda: b"2000" in Path(f"/proc/{rig.pid('changes')}/cmdline").read_bytes())


def test_a_file_that_is_wrong_is_listed_and_stops_nothing(rig: Rig) -> None:
    rig.unit("good", "sleep 1000")
    rig.unit("bad", "sleep 1000", "comand = 1")
    rig.agents.begin()
    bad, good = rig.ask("agents")
    assert good["state"] == "running"
    assert (bad["name"], bad["state"]) == ("bad", "broken")
    assert "bad.toml: comand: no such key" in bad["problem"]
    assert rig.ask("agent_state", name="bad") == bad
    with pytest.raises(Rejected, match=r"bad: .*comand: no such key"):
        rig.ask("agent_start", name="bad")
    assert any("comand" in line for line in rig.said)
    pid = rig.pid("good")
    rig.unit("good", "sleep 1000", "comand = 1")  # one that runs goes on as it was
    rig.agents.reload()
    bad, good = rig.ask("agents")
    assert (good["state"], good["pid"]) == ("running", pid)
    assert "comand" in good["problem"]


# --- what the control side may do


@pytest.mark.parametrize(
    ("allow", "method", "text"),
    [
        ("", "agents", "list: the owner of this guest does not allow it"),
        ("list", "agent_state", "state one: the owner"),
        ("list, state", "agent_log", "log one: the owner"),
        ("start:two", "agent_start", "start one: the owner"),
        ("start, restart", "agent_stop", "stop one: the owner"),
        ("start, stop", "agent_restart", "restart one: the owner"),
    ],
)
def test_what_is_not_allowed(directory: Path, allow: str, method: str, text: str) -> None:
    rig = Rig(directory, allow)
    rig.unit("one", "sleep 1000")
    rig.agents.begin()
    args = {} if method == "agents" else {"name": "one"}
    with pytest.raises(Rejected, match=text):
        rig.ask(method, **args)
    rig.close()


@pytest.mark.parametrize(
    ("method", "args", "text"),
    [
        ("agents", {"name": "x"}, "no such argument: name; expected: none"),
        ("agent_state", {}, "argument name is missing"),
        ("agent_state", {"name": 5}, "argument name is missing, or no text"),
        ("agent_state", {"name": "x"}, "x: no such unit; the units: one"),
        ("agent_log", {"name": "one", "line": 5}, "no such argument: line; expected: name, lines"),
        ("agent_log", {"name": "one", "lines": 0}, "lines: 0 is no number from 1 to 200"),
        ("agent_log", {"name": "one", "lines": True}, "lines: True is no number"),
        ("agent_log", {"name": "../one"}, "no such unit"),
    ],
)
def test_wrong_questions(rig: Rig, method: str, args: dict[str, Any], text: str) -> None:
    rig.unit("one", "sleep 1000", "autostart = false")
    rig.agents.begin()
    with pytest.raises((Rejected, TypeError, ValueError), match=text):
        rig.ask(method, **args)


def test_the_methods_are_those_that_are_announced(rig: Rig) -> None:
    assert tuple(rig.agents.methods()) == UNIT_METHODS


def test_how_a_process_ended() -> None:
    said = [describe_status(status) for status in (None, 0, 3, -9, -99)]
    assert said == ["nobody knows how", "status 0", "status 3", "by SIGKILL", "by signal 99"]


# --- systemd

SYSTEMCTL = """#!/bin/sh
echo "$@" >>{directory}/asked
case $1 in
show) cat {directory}/shown ;;
stop) echo "Failed to stop: Access denied" >&2; exit 4 ;;
esac
"""
SHOWN = """\
Id=web.service
ActiveState=active
MainPID=42
NRestarts=1
LoadState=loaded

Id=x.service
ActiveState=inactive
MainPID=0
NRestarts=0
LoadState=not-found
"""


@pytest.fixture
def delegating(directory: Path) -> Iterator[Rig]:
    systemctl, journalctl = directory / "systemctl", directory / "journalctl"
    (directory / "shown").write_text(SHOWN)
    systemctl.write_text(SYSTEMCTL.format(directory=directory))
    journalctl.write_text(f'#!/bin/sh\necho "$@" >>{directory}/asked\nseq 1000\n')
    for program in (systemctl, journalctl):
        program.chmod(0o755)
    rig = Rig(directory, systemd=Systemd(str(systemctl), str(journalctl)))
    for name in ("web", "x"):
        unit = f'systemd = "{name}.service"\ntopics = ["{name}"]'
        (directory / "units" / f"{name}.toml").write_text(unit)
    rig.unit("own", "sleep 1000")
    rig.unit("both", "sleep 1000", 'systemd = "web.service"')
    rig.agents.begin()
    yield rig
    rig.close()


def test_units_of_systemd_are_asked_of_systemd(delegating: Rig) -> None:
    rows = {row["name"]: row for row in delegating.ask("agents")}
    assert rows["own"]["by"] == "vchan-guest"
    for name in ("web", "both"):
        row = rows[name]
        assert (row["state"], row["pid"], row["starts"]) == ("running", 42, 2)
        assert row["by"] == "web.service"
    assert (rows["x"]["state"], rows["x"]["problem"]) == ("broken", "systemd: not-found")
    assert delegating.state("web")["state"] == "running"
    asked = (delegating.directory / "asked").read_text().splitlines()
    assert len(asked) == 2  # once for all
    assert asked[0].endswith("-- web.service x.service")


def test_orders_to_units_of_systemd(delegating: Rig) -> None:
    assert delegating.ask("agent_start", name="web") == {"name": "web", "by": "web.service"}
    assert delegating.ask("agent_restart", name="both")["by"] == "web.service"
    with pytest.raises(Rejected, match="systemctl stop: status 4: Failed to stop: Access denied"):
        delegating.ask("agent_stop", name="web")
    lines = delegating.ask("agent_log", name="web", lines=5)
    assert lines == ["996", "997", "998", "999", "1000"]
    asked = (delegating.directory / "asked").read_text().splitlines()
    assert asked[:3] == ["start -- web.service", "restart -- web.service", "stop -- web.service"]
    assert asked[3] == "--unit=web.service --lines=5 --output=cat --no-pager --quiet"


def test_without_systemd(rig: Rig) -> None:
    (rig.directory / "units" / "web.toml").write_text('systemd = "web.service"')
    rig.unit("both", "sleep 1000", 'systemd = "web.service"')
    rig.agents.begin()
    both, web = rig.ask("agents")
    assert (both["state"], both["by"]) == ("running", "vchan-guest")
    assert (web["state"], web["problem"]) == ("broken", "systemd does not run here")
    for method in ("agent_start", "agent_log"):
        with pytest.raises(Rejected, match="systemd does not run here"):
            rig.ask(method, name="web")


def test_systemctl_itself_is_missing(directory: Path) -> None:
    rig = Rig(directory, systemd=Systemd("/no/systemctl", "/no/journalctl"))
    (rig.directory / "units" / "web.toml").write_text('systemd = "web.service"')
    rig.agents.begin()
    (row,) = rig.ask("agents")
    assert row["problem"] == "systemctl: status 127"
    with pytest.raises(Rejected, match="cannot start: /no/systemctl: No such file"):
        rig.ask("agent_start", name="web")
    rig.close()


def test_what_systemd_says_of_no_unit() -> None:
    assert systemd_row("a.service", "")["problem"] == "systemd says nothing of it"
    assert systemd_row("a.service", "Id=a.service\nLoadState=loaded\nActiveState=failed\n") == {
        "state": "failed",
        "pid": None,
        "starts": 1,
        "problem": "",
    }


# --- inside the daemon


class Guest:
    """The daemon as a process."""

    def __init__(self, directory: Path, allow: str = EVERYTHING, name: str = "agent") -> None:
        self.directory = directory
        self._options = (
            *("--port", f"unix:{directory}/guest", "--socket", str(directory / f"{name}.sock")),
            *("--units", str(directory / "units"), "--allow", allow),
        )
        self.log = directory / f"{name}.log"
        self.process: subprocess.Popen[bytes]

    def unit(self, name: str, script: str, more: str = "") -> None:
        """A unit that runs a shell script."""
        write_unit(self.directory, name, script, more)

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vchan.guest.daemon", *self._options],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.terminate()
        assert self.process.wait(WAIT_S) == 0

    def pids(self, name: str, count: int = 1) -> list[int]:
        path = self.directory / name
        wait(lambda: path.exists() and len(path.read_text().split()) >= count)
        return [int(word) for word in path.read_text().split()]

    def says(self, text: str, times: int = 1) -> None:
        wait(lambda: self.log.read_text().count(text) >= times)


@pytest.fixture
def guest(directory: Path) -> Iterator[Guest]:
    guest = Guest(directory)
    yield guest
    guest.kill()
    print(guest.log.read_text())


def forking(directory: Path, name: str = "x") -> str:
    """A script that tells its own process id and a child's, which does not end when asked to."""
    return (
        f"(trap '' TERM HUP INT; sleep 1000) & echo $$ $! >>{directory}/{name};"
        " trap 'exit 0' TERM; wait"
    )


def test_the_control_side_sees_to_units(guest: Guest, directory: Path) -> None:
    guest.unit("one", "echo hello; sleep 1000")
    guest.start()
    with Cable(directory) as cable, HostEnd(cable.host) as host:

        def ask(method: str, **args: Any) -> Any:
            return json.loads(host.call("vchan.guest", method, **args))

        (row,) = ask("agents")
        assert row["state"] == "running"
        wait(lambda: ask("agent_log", name="one") == ["hello"])
        assert ask("agent_stop", name="one")["state"] == "stopped"
        assert not is_alive(row["pid"])
        assert ask("agent_restart", name="one")["state"] == "running"
        outcome = host.submit("vchan.guest", "agent_start", name="two").result(WAIT_S)
        assert isinstance(outcome, Answered)
        assert outcome.failed
        failure = json.loads(outcome.body)
        assert (failure["class"], failure["module"]) == ("Rejected", "vchan.errors")
        assert "no such unit" in failure["message"]


def test_the_owner_forbids_even_a_ping(directory: Path) -> None:
    guest = Guest(directory, allow="info")
    guest.start()
    with Cable(directory) as cable, HostEnd(cable.host) as host:
        assert json.loads(host.call("vchan.guest", "info"))["version"]
        for method in ("ping", "agents"):
            outcome = host.submit("vchan.guest", method).result(WAIT_S)
            assert isinstance(outcome, Answered)
            assert outcome.failed
            assert "the owner of this guest does not allow it" in outcome.body.decode()
    guest.kill()


def test_children_end_with_the_daemon(guest: Guest, directory: Path) -> None:
    guest.unit("one", forking(directory))
    guest.start()
    pids = guest.pids("x", 2)
    guest.terminate()
    assert all_gone(pids)


def test_children_end_with_a_daemon_that_is_killed(guest: Guest, directory: Path) -> None:
    guest.unit("one", forking(directory))
    guest.unit("two", forking(directory))
    guest.start()
    pids = guest.pids("x", 4)
    guest.kill()
    wait(lambda: all_gone(pids))


def test_a_daemon_that_is_killed_at_any_time_leaves_nobody(guest: Guest, directory: Path) -> None:
    for number in range(8):
        guest.unit(f"u{number}", forking(directory))
    for turn in range(12):
        (directory / "x").unlink(missing_ok=True)
        guest.start()
        guest.says("agents at", turn + 1)
        time.sleep(turn * 0.004)  # while it starts them
        guest.kill()
        wait(lambda: not strays(directory))


def strays(directory: Path) -> list[int]:
    """Processes of units of this directory, whoever their parent is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"VCHAN_SOCKET={directory}/agent.sock".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass  # it has just ended
    return found


def test_a_child_that_is_over_is_sent_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was waited for: its number, and its group's, may be another's by now."""
    ended: list[int | None] = []
    with Loop() as loop:
        child = Child(loop, Unit("one", ("/bin/true",)), {}, ended.append)
        wait(lambda: ended, lambda: loop.run_once(0.01))
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda *each: sent.append(each))
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *each: sent.append(each))
    child.signal(signal.SIGKILL)
    assert sent == []


def keeper_of(guest: Guest) -> int:
    children = Path(f"/proc/{guest.process.pid}/task/{guest.process.pid}/children")
    for pid in children.read_text().split():
        if b"for group in" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    return 0


def test_a_keeper_finds_what_it_keeps_when_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had it started may be killed right after."""
    found: list[Any] = []

    class Begun:
        def __init__(self, *_: object, stdin: int) -> None:
            os.set_blocking(stdin, False)
            found.append(os.read(stdin, 4096))

    monkeypatch.setattr(processes, "Child", Begun)
    keeper = processes.Keeper(Loop(), found.append)
    keeper.add(17)
    keeper.add(4)
    keeper._ended(-signal.SIGKILL)
    assert found[0] == b"17\n"
    assert found[-1] == b"4 17\n"
    keeper.close()


def test_a_keeper_that_is_killed_is_replaced(guest: Guest, directory: Path) -> None:
    guest.unit("one", forking(directory))
    guest.start()
    pids = guest.pids("x", 2)
    wait(lambda: keeper_of(guest))
    first = keeper_of(guest)
    os.kill(first, signal.SIGKILL)
    guest.says("the keeper of sub-agents was killed: another is started")
    wait(lambda: keeper_of(guest) not in (0, first))
    assert all(map(is_alive, pids))
    guest.kill()
    wait(lambda: all_gone(pids))


def test_with_daemon_and_keeper_dead_the_next_daemon_cleans_up(
    guest: Guest, directory: Path
) -> None:
    guest.unit("one", forking(directory))
    guest.start()
    pids = guest.pids("x", 2)
    wait(lambda: keeper_of(guest))
    guest.process.send_signal(signal.SIGSTOP)
    os.kill(keeper_of(guest), signal.SIGKILL)
    guest.kill()
    assert all(map(is_alive, pids))
    guest.start()
    guest.says("was left by an earlier daemon: ended")
    wait(lambda: all_gone(pids))
    wait(lambda: len(guest.pids("x")) == 4)  # and it was started anew


def test_daemons_whose_sockets_are_in_one_directory_leave_each_other_alone(
    guest: Guest, directory: Path
) -> None:
    """A second channel has a second daemon, with a socket beside the first's."""
    guest.unit("one", forking(directory))
    guest.start()
    pids = guest.pids("x", 2)
    second = Guest(directory, name="second")
    second.start()
    try:
        guest.pids("x", 4)  # its own, of the same name
        assert all(map(is_alive, pids))
        assert "was left by an earlier daemon" not in second.log.read_text()
    finally:
        second.kill()
    wait(lambda: all_gone(guest.pids("x", 4)[2:]))
    assert all(map(is_alive, pids))


def test_who_may_survive_does_and_is_taken_over(guest: Guest, directory: Path) -> None:
    guest.unit("one", forking(directory), "survive = true")
    guest.unit("two", forking(directory, "y"))
    guest.start()
    pids, others = guest.pids("x", 2), guest.pids("y", 2)
    for end in (guest.kill, guest.terminate):
        end()
        wait(partial(all_gone, others))
        assert all(map(is_alive, pids))
        (directory / "y").unlink()
        guest.start()
        guest.says(f"unit one: runs already, pid {pids[0]}")
        others = guest.pids("y", 2)
    assert len(guest.pids("x")) == 2  # it was not started again
    with Cable(directory) as cable, HostEnd(cable.host) as host:
        row = json.loads(host.call("vchan.guest", "agent_restart", name="one"))
        assert row["pid"] == guest.pids("x", 4)[2]
        assert not is_alive(pids[0])
        os.kill(row["pid"], signal.SIGKILL)
        guest.pids("x", 6)  # and is started again like any other
    for name in ("one", "two"):
        (directory / "units" / f"{name}.toml").unlink()
    guest.process.send_signal(signal.SIGHUP)
    wait(lambda: not strays(directory))


def test_an_adopted_process_that_ends_is_noticed(guest: Guest, directory: Path) -> None:
    guest.unit("one", f"echo $$ >>{directory}/x; exec sleep 1000", "survive = true")
    guest.start()
    (pid,) = guest.pids("x")
    guest.kill()
    guest.start()
    guest.says("runs already")
    os.kill(pid, signal.SIGKILL)
    guest.says("unit one: ended, nobody knows how")
    guest.pids("x", 2)
    (directory / "units" / "one.toml").unlink()
    guest.process.send_signal(signal.SIGHUP)
    wait(lambda: not strays(directory))


def test_a_number_that_belongs_to_another_is_left_alone(guest: Guest, directory: Path) -> None:
    """What is remembered of a unit names the process's start, too."""
    stranger = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    noted = Path(running_directory(str(directory / "agent.sock")))
    noted.mkdir()
    (noted / "one").write_text(f"{stranger.pid} 12345\n")
    (noted / "two").write_text("nonsense")
    guest.unit("one", forking(directory))
    guest.start()
    guest.pids("x", 2)
    assert stranger.poll() is None
    assert start_time(stranger.pid).isdecimal()
    stranger.kill()
    stranger.wait()


def test_a_second_signal_ends_at_once(guest: Guest, directory: Path) -> None:
    guest.unit("one", f"trap '' TERM; echo $$ >{directory}/x; while :; do sleep 0.1; done")
    guest.start()
    (pid,) = guest.pids("x")
    guest.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        guest.process.wait(0.5)  # it waits for its unit
    guest.process.terminate()
    assert guest.process.wait(WAIT_S) == 0
    wait(lambda: not is_alive(pid))


def test_without_units_nothing_of_this_is_loaded(guest: Guest, directory: Path) -> None:
    guest.start()
    with Cable(directory) as cable, HostEnd(cable.host) as host:
        assert json.loads(host.call("vchan.guest", "ping")) == {}
        maps = Path(f"/proc/{guest.process.pid}/maps").read_text()
        assert "resource." not in maps
        assert json.loads(host.call("vchan.guest", "agents")) == []  # and then it is
        guest.unit("one", "sleep 1000")
        guest.process.send_signal(signal.SIGHUP)
        wait(lambda: len(json.loads(host.call("vchan.guest", "agents"))) == 1)
