"""`vchan dev`: both daemons and an agent, without a VM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("amqp", reason='needs pip install "vchan[dev]"')
pytest.importorskip("oslo_log", reason='needs pip install "vchan[dev]"')

from tests.rig.forwarding import Server
from vchan import cli
from vchan.client import Agent, Client
from vchan.errors import ConfigError, PortBusy
from vchan.host import dev
from vchan.host.dev import Place, WatchedFiles, resolve_command

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0

AGENT = """
import sys
from vchan.client import Agent

class Endpoint:
    def echo(self, x):
        return x

    def note(self, text):
        print("noted", text)

    def fail(self):
        raise ValueError("as you wish")

    def tell(self):
        agent.cast("conductor", "hello", {"n": 1})
        return agent.call("conductor", "ask", {"n": 2})

    def ask_nobody(self):
        agent.cast("nobody", "hello")

    def leave(self):
        sys.exit("leaving")

agent = Agent()
agent.serve("demo", Endpoint())
agent.run()
"""


def wait(reached: Callable[[], object], failure: Callable[[], str] = lambda: "") -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s, failure()
        time.sleep(0.02)


class Dev:
    """The command, as a process.

    Args:
        agent: Its text, in Python.
        command: To be run in the agent's place.
    """

    def __init__(
        self, directory: Path, *options: str, agent: str = AGENT, command: tuple[str, ...] = ()
    ) -> None:
        self.place = directory / "place"
        self.source = directory / "src"
        self.source.mkdir(exist_ok=True)
        self.agent = self.source / "agent.py"
        self.agent.write_text(agent)
        words = command or (str(self.agent),)
        self._log = directory / "log"
        program = [sys.executable, "-m", "vchan.cli", "dev", "run", "--dir", str(self.place)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, *options, *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_said(self, text: str, times: int = 1) -> None:
        wait(lambda: self.said.count(text) >= times, lambda: self.said)

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def processes(self) -> list[str]:
        """Of all there are, those that have to do with this one."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has just ended
            if str(self.source.parent) in words:
                found.append(words)
        return found


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def started(directory: Path) -> Iterator[Callable[..., Dev]]:
    every: list[Dev] = []

    def start(*options: str, agent: str = AGENT) -> Dev:
        every.append(Dev(directory, *options, agent=agent))
        return every[-1]

    yield start
    for each in every:
        if each.process.poll() is None:
            each.end()
        print(each.said)


def vchan(place: Path, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "vchan.cli", "--timeout", str(WAIT_S), "dev", words[0]]
    done = subprocess.run(
        [*command, "--dir", str(place), *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_an_authors_five_minutes(started: Callable[..., Dev]) -> None:
    running = started("--accept", "conductor")
    running.wait_said("agent | started")
    assert vchan(running.place, "call", "echo", "x=1") == (0, "1\n")
    running.wait_said("vchan dev: topics served: demo")
    assert vchan(running.place, "cast", "note", "text=hello") == (0, "")
    running.wait_said("agent | noted hello")
    running.wait_said('<- cast demo note text="hello": taken')
    running.wait_said("<- call demo echo x=1: 1 (")

    status, said = vchan(running.place, "call", "fail")
    assert status == cli.EXIT_FAILED
    assert "ValueError: as you wish" in said
    running.wait_said('agent |     raise ValueError("as you wish")')
    running.wait_said("<- call demo fail: ValueError: as you wish")

    assert vchan(running.place, "call", "tell") == (0, "null\n")
    running.wait_said("-> cast conductor hello n=1: taken")
    running.wait_said("-> call conductor ask n=2: null")
    assert "NoSuchAgent" in vchan(running.place, "call", "ask_nobody")[1]
    running.wait_said("-> cast nobody hello: nobody serves it: see --accept")

    running.agent.write_text(AGENT.replace("return x", "return [x, 'new']"))
    running.wait_said("files have changed")
    running.wait_said("agent | started, pid", 2)
    wait(
        lambda: vchan(running.place, "call", "echo", "x=1")[1].split() == ["[", "1,", '"new"', "]"]
    )

    assert running.end() == 0
    assert running.said.endswith("vchan dev: ended\n")
    assert "Traceback" not in running.said.partition("agent | vchan agent: a call")[0]
    assert running.processes() == []
    assert not running.place.exists()


def test_an_agent_that_cannot_start_starts_when_it_is_mended(started: Callable[..., Dev]) -> None:
    running = started(agent="import nothing_of_this_name\n")
    running.wait_said("agent | ModuleNotFoundError: No module named 'nothing_of_this_name'")
    running.wait_said("agent | ended, ")
    time.sleep(2.5)  # it is not started time and again meanwhile
    assert running.said.count("agent | started") == 1
    status, said = vchan(running.place, "call", "--timeout", "0.3", "echo", "x=2")
    assert (status, said) == (
        cli.EXIT_FAILED,
        "vchan: the agent has served no topic for 0.3 s; the terminal of vchan dev run says why\n",
    )
    running.agent.write_text(AGENT)
    assert vchan(running.place, "call", "echo", "x=2") == (0, "2\n")
    status, said = vchan(running.place, "call", "leave")
    assert (status, "AgentGone" in said or "went away" in said) == (cli.EXIT_FAILED, True)
    running.wait_said("agent | leaving")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_running(started: Callable[..., Dev], number: int) -> None:
    running = started()
    running.wait_said("topics served: demo")
    assert len(running.processes()) >= 3
    status = running.end(number)
    assert status == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    wait(lambda: running.processes() == [], lambda: "\n".join(running.processes()))
    again = started()  # what was left there harms nobody
    again.wait_said("topics served: demo")


def test_streams_reach_what_runs_here(started: Callable[..., Dev]) -> None:
    running = started()
    running.wait_said("topics served: demo")
    with Server() as server:
        command = [sys.executable, "-m", "vchan.cli", "forward", "--stdio"]
        command += ["--socket", f"{running.place}/host.sock", "dev", server.target]
        done = subprocess.run(command, cwd=ROOT, input=b"hello", capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello", b"")


def test_a_program_in_the_control_sides_place(started: Callable[..., Dev]) -> None:
    running = started()
    running.wait_said("topics served: demo")

    class Conductor:
        def hello(self, n: int) -> None:
            """For a cast."""

        def ask(self, n: int) -> int:
            conductor.stop()
            return n * 21

    conductor = Agent(running.place / "host.sock", log=lambda _: None)
    conductor.serve("conductor", Conductor())
    thread = threading.Thread(target=conductor.run)
    thread.start()
    known = threading.Event()
    connection = conductor._connection
    conductor.loop.call_soon_threadsafe(lambda: connection.when_acknowledged(known.set))
    try:
        assert known.wait(WAIT_S)
        with Client(running.place / "host.sock") as client:
            asked = client.call("demo", "tell", server="dev", timeout_s=WAIT_S)
    finally:
        conductor.stop()
        thread.join(WAIT_S)
    assert asked == 42


def test_a_host_s_policy_may_be_tried(directory: Path, started: Callable[..., Dev]) -> None:
    policy = directory / "policy"
    policy.mkdir()
    (policy / "50-x.policy").write_text("listen,reply any any allow\n")
    running = started("--policy", str(policy), "--accept", "conductor")
    running.wait_said("agent | started")
    status, said = vchan(running.place, "call", "tell")
    assert status == cli.EXIT_FAILED
    assert "Rejected" in said


@pytest.mark.parametrize("action", ["call", "cast"])
def test_who_asks_before_it_runs_is_told_so(directory: Path, action: str) -> None:
    """And not to look for a vchan-host."""
    words = [sys.executable, "-m", "vchan.cli", "dev", action, "--dir", str(directory), "echo"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == cli.EXIT_UNREACHABLE
    assert done.stderr == (
        f"vchan: {directory}/host.sock: no vchan dev runs there; start one in another terminal: "
        f"vchan dev run --dir {directory} AGENT\n"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run", "--policy", "no-such-dir", "agent.py"), "--policy: no-such-dir is no directory"),
        (("run", "--watch", "no-such-dir", "agent.py"), "agent.py: no such file in "),
        (("run",), "the following arguments are required: AGENT\n"),
    ],
)
def test_what_is_wrong_with_its_arguments(directory: Path, words: list[str], told: str) -> None:
    command = [sys.executable, "-m", "vchan.cli", "dev", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == cli.EXIT_USAGE
    assert told in done.stderr


def test_one_at_a_time(directory: Path) -> None:
    place = Place(str(directory / "place"))
    with pytest.raises(PortBusy, match="another vchan dev"):
        Place(str(directory / "place"))
    place.remove()
    assert not (directory / "place").exists()
    Place(str(directory / "place")).remove()


@pytest.mark.parametrize("path", ["relative", "/tmp/a b", "/tmp/" + "x" * 100, "", "/tmp/$HOME"])
def test_a_wrong_directory(path: str) -> None:
    with pytest.raises(ConfigError, match="--dir"):
        Place(path)


def test_a_directory_of_others_is_not_used(directory: Path) -> None:
    """Who could write there could be taken for us."""
    (directory / "place").mkdir()
    (directory / "place").chmod(0o755)
    with pytest.raises(ConfigError, match="not this user's alone"):
        Place(str(directory / "place"))
    (directory / "link").symlink_to(directory)
    with pytest.raises(ConfigError, match="not this user's alone"):
        Place(str(directory / "link"))
    (directory / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        Place(str(directory / "file"))


def test_what_the_user_keeps_there_stays(directory: Path) -> None:
    place = Place(str(directory / "place"))
    (directory / "place" / "notes").write_text("mine")
    place.remove()
    assert (directory / "place" / "notes").read_text() == "mine"


def test_a_policy_of_the_users_is_not_taken_for_its_own(directory: Path) -> None:
    """It used to be deleted: what an earlier `vchan dev` has left is known by its lock."""
    (directory / "place" / "policy.d").mkdir(parents=True)
    (directory / "place").chmod(0o700)
    with pytest.raises(ConfigError, match=r"policy\.d is there, and no vchan dev has made it"):
        Place(str(directory / "place"))
    assert [path.name for path in (directory / "place").iterdir()] == ["policy.d"]
    (directory / "place" / "lock").touch()  # as one has left it that was killed
    Place(str(directory / "place")).remove()
    assert not (directory / "place").exists()


def test_commands(directory: Path) -> None:
    script = directory / "agent.sh"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(ConfigError, match=r"chmod \+x"):
        resolve_command((str(script),))
    script.chmod(0o755)
    assert resolve_command((str(script), "a")) == (str(script), "a")
    (directory / "agent.py").touch()
    python = resolve_command((str(directory / "agent.py"), "a"))
    assert python == (sys.executable, str(directory / "agent.py"), "a")
    assert resolve_command(("sh", "-c", "x"))[0].startswith("/")
    with pytest.raises(ConfigError, match="no-such-program: no such command"):
        resolve_command(("no-such-program",))
    with pytest.raises(ConfigError, match=r"agnet\.py: no such file in /"):
        resolve_command(("agnet.py",))


def test_which_files_are_watched(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.py", "b.txt", ".git/c.py", "node_modules/d.js", "e/f.toml"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("1")
    files = WatchedFiles((directory,))
    assert not files.changed()
    (directory / "b.txt").write_text("22")
    (directory / ".git/c.py").write_text("22")
    assert not files.changed() and not files.changed()
    for change in (
        lambda: (directory / "a.py").write_text("22"),
        lambda: (directory / "e/f.toml").unlink(),
        lambda: (directory / "new.py").touch(),
    ):
        change()
        assert not files.changed(), "it may not be whole yet"
        assert files.changed()
        assert not files.changed()
    monkeypatch.setattr(dev, "WATCHED_MAX", 1)
    assert WatchedFiles((directory,)).is_cut


def test_an_environment_that_no_unit_file_can_say() -> None:
    kept = dev.passed_on(
        {
            "GOOD": 'a "quoted" \\ value',
            "LONG": "x" * 100_000,
            "ODD": "a\nb",
            "DELETE": "a\x7fb",
            "BYTES": "\udcff",
            "VCHAN_SOCKET": "/elsewhere",
        }
    )
    assert kept == {"GOOD": 'a "quoted" \\ value'}
