"""`vchan cp`: the command, both daemons and the standard agent as processes, with a cable where
QEMU would be."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("amqp", reason="py-amqp is not installed")

from tests.rig import wait_until
from tests.rig.copying import Copying
from tests.rig.forwarding import ROOT, WAIT_S
from tests.unit.test_copies import fill, tree
from vchan.cli.copies import CopyStep, InVm, parse_name, plan
from vchan.cli.failures import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
)
from vchan.errors import ConfigError

MIB = 1 << 20
LARGE = 3 * MIB
DONE = (EXIT_OK, "")


@pytest.fixture(autouse=True, scope="module")
def plain_umask() -> Iterator[None]:
    """Files that others can change are refused."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def shared() -> Iterator[Copying]:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        Copying(Path(name)) as world,
    ):
        yield world


@pytest.fixture
def world(shared: Copying, request: pytest.FixtureRequest) -> Copying:
    """One that is left as it was found, but for files in directories of this test's own."""
    name = re.sub(r"\W", "_", request.node.name)
    shared.guest_files = shared.directory / "in-vm" / name
    shared.here = shared.directory / "on-host" / name
    shared.guest_files.mkdir()
    shared.here.mkdir()
    return shared


@pytest.fixture
def fresh() -> Iterator[Copying]:
    """For tests after which a daemon is another, or gone."""
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name, Copying(Path(name)) as made:
        yield made


# ---------------------------------------------------------------- both ways


def test_a_file_into_a_vm_and_back(world: Copying) -> None:
    content = fill(world.here / "f", LARGE)
    assert world.cp(str(world.here / "f"), world.inside("f")) == DONE
    assert tree(world.guest_files) == {"f": content}
    assert world.cp(world.inside("f"), str(world.here / "back")) == DONE
    assert (world.here / "back").read_bytes() == content


def test_a_tree_into_a_vm_and_back(world: Copying) -> None:
    (world.here / "t" / "a" / "b").mkdir(parents=True)
    for number in range(30):
        fill(world.here / "t" / "a" / f"{number}", number * 999, number)
    fill(world.here / "t" / "a" / "b" / "large", MIB)
    (world.here / "t" / "a" / "0").chmod(0o750)
    os.utime(world.here / "t" / "a" / "b", (1, 1_234_567_890))
    assert world.cp("-rp", str(world.here / "t"), world.inside("new")) == DONE
    assert tree(world.guest_files / "new") == tree(world.here / "t")
    assert (world.guest_files / "new" / "a" / "0").stat().st_mode & 0o777 == 0o750
    assert (world.guest_files / "new" / "a" / "b").stat().st_mtime == 1_234_567_890
    (world.here / "into").mkdir()
    assert world.cp("-r", "-q", world.inside("new"), str(world.here / "into")) == DONE
    assert tree(world.here / "into" / "new") == tree(world.here / "t")


def test_several_go_into_a_directory(world: Copying) -> None:
    content = [fill(world.here / name, 1000, seed) for seed, name in enumerate("ab")]
    sources = [str(world.here / name) for name in "ab"]
    status, said = world.cp(*sources, world.inside("missing"))
    assert status == EXIT_FAILED and "No such file or directory" in said
    (world.guest_files / "d").mkdir()
    assert world.cp(*sources, world.inside("d")) == DONE
    assert tree(world.guest_files / "d") == {"a": content[0], "b": content[1]}
    (world.here / "d").mkdir()
    back = [world.inside("d/a"), world.inside("d/b"), str(world.here / "d")]
    assert world.cp(*back) == DONE
    assert tree(world.here / "d") == {"a": content[0], "b": content[1]}
    status, said = world.cp(*back[:2], str(world.here / "d" / "a"))
    assert (status == EXIT_FAILED and "Not a directory" in said) or "no directory" in said


# ---------------------------------------------------------------- it goes on


@pytest.mark.parametrize("is_into", [True, False])
def test_it_goes_on_through_cuts_and_restarts_of_the_hosts_daemon(
    fresh: Copying, is_into: bool
) -> None:
    source, target = fresh.here / "f", fresh.guest_files / "f"
    words = [str(source), f"vm:{target}"]
    if not is_into:
        source, target = target, source
        words.reverse()
    content = fill(source, 4 * LARGE)
    with fresh.begin_cp(*words) as command:
        for number in range(3):
            command.wait_part(target, (number * 2 + 1) * MIB)
            fresh.host.restart() if number == 1 else fresh.cut()
        assert command.end() == DONE
    assert target.read_bytes() == content


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_into", [True, False])
def test_after_the_command_was_killed_the_rest_comes(
    world: Copying, how: signal.Signals, is_into: bool
) -> None:
    source, target = world.here / "f", world.guest_files / "f"
    words = [str(source), f"vm:{target}"]
    if not is_into:
        source, target = target, source
        words.reverse()
    content = fill(source, 4 * LARGE)
    with world.begin_cp(*words) as command:
        command.wait_part(target, LARGE)
        command.process.send_signal(how)
        status, said = command.end()
    expected = {signal.SIGKILL: -9, signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_FAILED}
    assert (status, said) == (expected[how], "")
    part = target.with_name(".f.vchan-part")
    assert not target.exists() and part.stat().st_size >= LARGE
    kept = part.stat()
    assert world.cp("--resume", *words) == DONE
    assert target.read_bytes() == content
    assert target.stat().st_ino == kept.st_ino, "it was gone on with"
    assert not part.exists()


def test_a_guests_agent_that_dies_ends_the_copy_and_it_can_be_gone_on_with(fresh: Copying) -> None:
    content = fill(fresh.here / "f", 4 * LARGE)
    words = (str(fresh.here / "f"), fresh.inside("f"))
    with fresh.begin_cp(*words) as command:
        command.wait_part(fresh.guest_files / "f", LARGE)
        fresh.agent.kill()
        status, said = command.end()
    assert status == EXIT_FAILED
    assert "the copy was broken off" in said and "--resume" in said
    assert not (fresh.guest_files / "f").exists()
    fresh.start_agent()
    assert fresh.cp("--resume", *words) == DONE
    assert (fresh.guest_files / "f").read_bytes() == content


def fill_small(directory: Path) -> None:
    """Many files: whoever is ended is in the midst of one."""
    directory.mkdir()
    for number in range(3000):
        (directory / f"{number}").write_bytes(b"x" * 100)


def wait_some(directory: Path) -> None:
    """Until files are there, and more are to come."""
    wait_until(
        lambda: directory.is_dir() and len(list(directory.iterdir())) > 10,
        timeout_s=WAIT_S,
        interval_s=0.01,
        failure=lambda: f"nothing comes to {directory}",
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_is_interrupted_keeps_no_part_that_is_small(
    world: Copying, how: signal.Signals
) -> None:
    fill_small(world.guest_files / "t")
    target = world.here / "t"
    with world.begin_cp("-r", world.inside("t"), str(target)) as command:
        wait_some(target)
        command.process.send_signal(how)
        status, said = command.end()
    expected = EXIT_INTERRUPTED if how == signal.SIGINT else EXIT_FAILED
    assert (status, said) == (expected, "")
    come = [each.name for each in target.iterdir()]
    assert len(come) < 3000, "it was interrupted"
    assert [name for name in come if not name.isdigit()] == []


def test_an_agent_that_is_stopped_in_the_midst_ends_well(fresh: Copying) -> None:
    fill_small(fresh.here / "t")
    target = fresh.guest_files / "t"
    with fresh.begin_cp("-r", str(fresh.here / "t"), fresh.inside("t")) as command:
        wait_some(target)
        assert fresh.agent.process is not None
        fresh.agent.process.terminate()
        assert fresh.agent.process.wait(WAIT_S) == 0, fresh.agent.log.read_text()
        come = [each.name for each in target.iterdir()]
        status, said = command.end()
    assert status == EXIT_FAILED and "--resume" in said
    assert "Traceback" not in fresh.agent.log.read_text()
    assert len(come) < 3000, "it was stopped in the midst"
    assert [name for name in come if not name.isdigit()] == []


def test_a_daemon_that_does_not_come_back(fresh: Copying) -> None:
    fill(fresh.here / "f", 8 * LARGE)
    with fresh.begin_cp("--look", "0.5", str(fresh.here / "f"), fresh.inside("f")) as command:
        command.wait_part(fresh.guest_files / "f", LARGE)
        fresh.host.kill()
        status, said = command.end()
    assert status == EXIT_UNREACHABLE
    assert "nobody listens there" in said


# ---------------------------------------------------------------- it is refused


def test_what_the_guests_owner_does_not_allow(world: Copying, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    denied = f"{tmp_path}/secret: is not allowed ({world.directory}/standard.toml: [read] allow)"
    assert world.cp(f"vm:{tmp_path}/secret", str(world.here)) == (
        EXIT_FAILED,
        f"vchan: vm:{denied}\n",
    )
    fill(world.here / "f", 10)
    status, said = world.cp(str(world.here / "f"), f"vm:{tmp_path}/f")
    assert status == EXIT_FAILED and "[write] allow" in said
    (world.guest_files / "out").symlink_to(tmp_path)
    status, said = world.cp(str(world.here / "f"), world.inside("out/f"))
    assert status == EXIT_FAILED and "symbolic link" in said
    status, said = world.cp(world.inside("out/secret"), str(world.here))
    assert status == EXIT_FAILED and "symbolic link" in said
    status, said = world.cp(f"vm:{world.guest_files}/../x", str(world.here))
    assert status == EXIT_FAILED and ".." in said
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]


def test_what_the_hosts_policy_does_not_allow() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        Copying(Path(name), policy="reply any any allow\nforward any tcp:* allow\n") as world,
    ):
        status, said = world.cp(world.inside("f"), str(world.here))
        assert status == EXIT_FAILED
        assert "no rule of this host's policy allows it (default)" in said
        rows = [(row["topic"], row["verdict"]) for row in world.audited()]
        assert rows == [("files", "deny")]


class NoService(Copying):
    """Nobody waits for it."""

    def start_agent(self) -> None:
        self.agent.start()


def test_a_guest_without_the_service() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        NoService(Path(name), rules="facts = true\n") as world,
    ):
        status, said = world.cp(world.inside("f"), str(world.here))
    assert status == EXIT_FAILED
    assert said.count("the standard agent") == 1 and "--resume" not in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_where_one_may_not_write(world: Copying) -> None:
    fill(world.here / "f", 10)
    world.guest_files.chmod(0o500)
    status, said = world.cp(str(world.here / "f"), world.inside("f"))
    assert (status, said) == (
        EXIT_FAILED,
        f"vchan: {world.inside('f')}: Permission denied\n",
    )


def test_directories_and_what_is_missing(world: Copying) -> None:
    (world.here / "d").mkdir()
    (world.guest_files / "d").mkdir()
    for words in (
        (str(world.here / "d"), world.inside("new")),
        (world.inside("d"), str(world.here / "new")),
    ):
        status, said = world.cp(*words)
        assert status == EXIT_FAILED and "is a directory; -r copies it" in said
    for words in (
        (str(world.here / "none"), world.inside("new")),
        (world.inside("none"), str(world.here / "new")),
        (world.inside("none"), str(world.here / "none" / "new")),
    ):
        status, said = world.cp(*words)
        assert status == EXIT_FAILED and "No such file or directory" in said
    assert not (world.here / "new").exists() and not (world.guest_files / "new").exists()


@pytest.mark.parametrize(
    ("source", "text"),
    [("vm:/", "has no name of its own: name what is in it"), ("vm:/a/..", "'..' is no name")],
)
def test_a_source_without_a_name_is_said_to_be_it(world: Copying, source: str, text: str) -> None:
    assert world.cp("-r", source, str(world.here)) == (EXIT_FAILED, f"vchan: {source}: {text}\n")


def test_what_is_left_out_is_said_and_the_rest_comes(world: Copying) -> None:
    (world.here / "t").mkdir()
    fill(world.here / "t" / "f", 10)
    (world.here / "t" / "link\n").symlink_to("/etc/passwd")
    status, said = world.cp("-r", str(world.here / "t"), world.inside("t"))
    assert (status, said) == (
        EXIT_FAILED,
        f"vchan: {world.here}/t/link?: is a symbolic link\n",
    )
    assert list(tree(world.guest_files / "t")) == ["f"]
    (world.guest_files / "t" / "x\x1b[31m").symlink_to("/etc/passwd")
    status, said = world.cp("-r", world.inside("t"), str(world.here / "back"))
    assert status == EXIT_FAILED
    assert said == f"vchan: {world.here}/back/x?[31m: is a symbolic link\n"
    assert list(tree(world.here / "back")) == ["f"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("vm:/a", "vm:/b"), "'vm:/a': is in a VM as well: copy it here first"),
        (("./a", "b"), "'./a': neither it nor 'b' is in a VM"),
        (("a", "vm:relative"), "give /PATH"),
        (("", "vm:/a"), "is no path"),
        (("a", "vm:" + "/a" * 3000), "the path is longer than 4096 bytes"),
        (("vm:" + "/a" * 40000, "a"), "the path is longer than 4096 bytes"),
        (("a",), "required: DESTINATION"),
        (("--json", "a", "vm:/b"), "prints text"),
    ],
)
def test_wrong_words(world: Copying, words: tuple[str, ...], text: str) -> None:
    status, said = world.cp(*words)
    assert status == EXIT_USAGE and text in said


def test_names_of_places() -> None:
    assert parse_name("vm:/a//b/./c/") == InVm("vm", b"/a/b/c", True)
    assert parse_name("vm:/") == InVm("vm", b"/", True)
    assert parse_name("./vm:/a") == "./vm:/a"
    assert parse_name(":/a") == ":/a"
    assert parse_name("vm:/../a") == InVm("vm", b"/../a"), "the guest refuses it"
    assert plan(["a"], "vm:/b/") == [CopyStep("a", InVm("vm", b"/b", True), True)]
    assert [step.is_into for step in plan(["a", "b"], "vm:/b")] == [True, True]
    assert plan(["vm:/a"], "b")[0].vm == "vm"
    with pytest.raises(ConfigError):
        plan(["vm:/a", "b"], "c")


# ---------------------------------------------------------------- what the operator sees


def on_a_terminal(world: Copying, *words: str) -> tuple[int, str]:
    """The command, with a terminal for its standard error."""
    ours, theirs = pty.openpty()
    command = [sys.executable, *world.cli_words("cp", *words)]
    with subprocess.Popen(command, cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while select.select([ours], [], [], WAIT_S)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:
                break
        os.close(ours)
        return process.wait(WAIT_S), seen.decode()


def test_on_a_terminal_it_says_how_far_it_is(world: Copying) -> None:
    fill(world.here / "f", 4 * LARGE)
    status, seen = on_a_terminal(world, str(world.here / "f"), world.inside("f"))
    assert status == EXIT_OK
    assert re.search(r"f +\d+% +[\d.]+ MiB +[\d.]+ [KM]iB/s +\d\d:\d\d ETA", seen), seen
    assert re.search(r"vchan: 1 file, 12.0 MiB in \d\d:\d\d, [\d.]+ [KM]iB/s\r\n$", seen), seen
    status, seen = on_a_terminal(world, "-q", str(world.here / "f"), world.inside("g"))
    assert (status, seen) == DONE


# ---------------------------------------------------------------- a guest that lies

HOSTILE = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    connected, _ = listener.accept()
    connected.recv(65536)
    with open(sys.argv[2], "rb") as file:
        connected.sendall(file.read())
    connected.settimeout(10)
    try:
        while connected.recv(65536):
            pass
    except OSError:
        pass
    connected.close()
"""


class HostileGuest(Copying):
    """Its files are served by who says what is in a file."""

    def start_agent(self) -> None:
        self.said = self.directory / "said"
        services = self.directory / "services"
        services.mkdir(exist_ok=True)
        services.chmod(0o755)
        self.agent = self._part("hostile", "-c", HOSTILE, str(services / "files"), str(self.said))
        Copying.start_agent(self)


def frame(kind: int, payload: bytes) -> bytes:
    return bytes([kind]) + len(payload).to_bytes(4, "big") + payload


FACTS = (0o777).to_bytes(2, "big") + bytes(8) + bytes(8)
READY = frame(3, b"")


def directory(name: bytes) -> bytes:
    return frame(5, FACTS + name)


def file(name: bytes, content: bytes = b"evil") -> bytes:
    head = b"\0" + FACTS + len(content).to_bytes(8, "big")
    whole = frame(10, hashlib.sha256(content).digest())
    return frame(7, head + name) + frame(9, content) + whole


LEAVE, END = frame(6, b""), frame(13, b"")


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileGuest]:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        HostileGuest(Path(name)) as world,
    ):
        yield world


@pytest.mark.parametrize(
    "said",
    [
        READY + file(b"../evil") + END,
        READY + file(b"/tmp/vchan-evil") + END,
        READY + directory(b"") + file(b"../evil") + LEAVE + END,
        READY + directory(b"") + file(b"../../evil") + LEAVE + END,
        READY + directory(b"") + directory(b"..") + file(b"evil") + LEAVE + LEAVE + END,
        READY + directory(b"") + LEAVE + LEAVE + file(b"evil") + END,
        READY + directory(b"../evil") + file(b"evil") + LEAVE + END,
        READY + directory(b"") + LEAVE + directory(b"") + LEAVE + END,
        READY + file(b"other") + END,
        READY + frame(7, b"\0" + (0o4755).to_bytes(2, "big") + bytes(16) + bytes(8)) + END,
        file(b"") + END,
        READY + frame(7, b"\1" + FACTS + (4).to_bytes(8, "big")) + frame(8, bytes(8)),
        READY + frame(7, b"\0" + FACTS + (4).to_bytes(8, "big")) + frame(11, b"") + END,
        READY + frame(99, b""),
        READY + b"\xff" * 100,
        frame(16, bytes(16)),
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
    ids=lambda said: hashlib.sha256(said).hexdigest()[:8],
)
def test_a_guest_that_names_other_places(hostile: HostileGuest, said: bytes) -> None:
    hostile.said.write_bytes(said)
    with tempfile.TemporaryDirectory(prefix="here", dir=hostile.here) as name:
        here = Path(name)
        (here / "into").mkdir()
        status, text = hostile.cp("-r", hostile.inside("f"), str(here / "into"))
        assert status == EXIT_FAILED
        assert "broke the protocol" in text, text
        assert [each.name for each in here.iterdir()] == ["into"]
        assert set(tree(here)) <= {"into", "into/f"}
        assert not any(tree(here).values()), "not a byte of it"
    assert list(hostile.here.iterdir()) == []
    assert not Path("/tmp/vchan-evil").exists()
