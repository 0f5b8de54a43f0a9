"""The standard agent: its rules, files, programs, and all of it through the daemon."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rig.hosting import HostEnd
from tests.unit.cable import Cable
from vchan.agents.standard import exec as runs
from vchan.agents.standard import files
from vchan.agents.standard.agent import Standard, read_rules
from vchan.agents.standard.exec import RUNS_MAX, WAITING_MAX, Runs
from vchan.agents.standard.facts import addresses, facts
from vchan.agents.standard.files import CHUNK_BYTES_MAX, UPLOADS_MAX, Uploads, checksum, read_part
from vchan.agents.standard.permissions import (
    Exec,
    FilePermissions,
    Rules,
    Shell,
    matches,
    parse_rules,
    path_problem,
)
from vchan.errors import ConfigError, Rejected
from vchan.io.loop import Loop
from vchan.rpc.in_flight import Answered

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0


@pytest.fixture(autouse=True)
def plain_umask() -> Iterator[None]:
    """Files that others can change are refused."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name).resolve()


def wait(reached: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- rules

WHOLE = """
ping = false
facts = true
[exec]
allow = ["/usr/bin/*"]
environment = ["LANG", "MY_*"]
directories = ["/srv/**"]
time_s_max = 5
output_bytes_max = "64K"
users = ["web"]
detached_s = 60
[shell]
command = ["/bin/bash", "-l"]
users = ["root", "web"]
detached_s = 30
[read]
allow = ["/var/log/**"]
bytes_max = "1M"
[write]
allow = ["/srv/incoming/*"]
bytes_max = 1000
"""


def test_everything_the_rules_can_say() -> None:
    assert parse_rules("file", tomllib.loads(WHOLE)) == Rules(
        "file",
        False,
        True,
        Exec(("/usr/bin/*",), ("LANG", "MY_*"), ("/srv/**",), 5.0, 65536, ("web",), 60.0),
        Shell(("/bin/bash", "-l"), ("root", "web"), 30.0),
        FilePermissions(("/var/log/**",), 1 << 20),
        FilePermissions(("/srv/incoming/*",), 1000),
    )


def test_without_a_file_nothing_but_ping_is_allowed(directory: Path) -> None:
    for rules in (read_rules(str(directory / "x"), required=False), parse_rules("x", {})):
        assert rules.allowed() == {
            "ping": True,
            "facts": False,
            "exec": False,
            "shell": False,
            "read": False,
            "write": False,
        }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ping = 1", "ping: 1: expected true or false"),
        ("fact = true", "fact: no such key; expected one of exec, shell, read, write, ping"),
        ("exec = true", "exec: True: expected a table"),
        ("[shell]\ncommand = []", "shell: command: []: expected the program's absolute path"),
        ('[shell]\ncommand = ["bash"]', "expected the program's absolute path"),
        ('[exec]\nallow = "/bin/ls"', "exec: allow: '/bin/ls': expected a list of texts"),
        ('[exec]\nallow = ["ls"]', "exec: allow: ['ls']: expected patterns of absolute paths"),
        ('[read]\nallow = ["/a/../b"]', "'/a/../b' has an empty part, or . or .. in it"),
        ('[read]\nbytes_max = "lots"', "read: bytes_max: 'lots': expected bytes"),
        ("[exec]\ntime_s_max = 0", "exec: time_s_max: 0: expected seconds"),
        ("[write]\nalow = []", "write: alow: no such key; expected one of allow, bytes_max"),
    ],
)
def test_a_wrong_rule_says_which_and_what_was_expected(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rules("/etc/vchan/standard.toml", tomllib.loads(text))
    assert str(caught.value).startswith("/etc/vchan/standard.toml: ")
    assert expected in str(caught.value)


def test_rules_that_others_can_change_are_not_followed(directory: Path) -> None:
    file = directory / "standard.toml"
    file.write_text("facts = true")
    file.chmod(0o666)
    with pytest.raises(ConfigError, match="others can change it"):
        read_rules(str(file), required=False)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("/a/b", "/a/b", True),
        ("/a/b", "/a/b/c", False),
        ("/a/b", "/a", False),
        ("/a/*", "/a/b", True),
        ("/a/*", "/a/b/c", False),
        ("/a/*", "/a/", True),  # no such path passes path_problem
        ("/a/**", "/a/b/c", True),
        ("/a/**", "/ab", False),
        ("/a/*/c", "/a/b/c", True),
        ("/a/*.log", "/a/x.log", True),
        ("/a/*.log", "/a/xlog", False),
        ("/a/?", "/a/b", True),
        ("/a/?", "/a//", False),
        ("/a.b", "/axb", False),
        ("/[a]", "/a", False),
        ("/a", "/a\n", False),
        ("/a/**", "/a/\n", True),
    ],
)
def test_patterns(pattern: str, path: str, expected: bool) -> None:
    assert matches(path, (pattern,)) == expected
    assert not matches(path, ())


@given(st.text("/.a\0", max_size=12))
def test_a_path_without_a_problem_is_its_own_real_path(path: str) -> None:
    if not path_problem(path):
        assert os.path.normpath(path) == path
        assert path.startswith("/")
        assert "\0" not in path


# --- files


def rules_for(directory: Path, *, bytes_max: int = 1 << 20) -> Rules:
    allowed = FilePermissions((f"{directory}/in/**",), bytes_max)
    (directory / "in").mkdir(exist_ok=True)
    return Rules("rules", read=allowed, write=allowed)


def test_a_file_is_read_in_parts(directory: Path) -> None:
    rules = rules_for(directory)
    content = os.urandom(2500)
    path = directory / "in" / "file"
    path.write_bytes(content)
    read = b""
    while True:
        part = read_part(rules, str(path), len(read), 1000)
        data = base64.b64decode(part["data"])
        assert part["sha256"] == sha256(data)
        assert part["size"] == 2500
        read += data
        if part["end"]:
            break
    assert read == content
    assert checksum(rules, str(path))["sha256"] == sha256(content)
    assert read_part(rules, str(path), 9999, 10)["data"] == ""


@pytest.fixture
def trap(directory: Path) -> Path:
    """A directory with every way out of what is allowed."""
    rules_for(directory)
    inside, outside = directory / "in", directory / "out"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (inside / "link").symlink_to(outside / "secret")
    (inside / "relative").symlink_to("../out/secret")
    (inside / "way").symlink_to(outside)
    (inside / "loop").symlink_to("loop")
    (inside / "directory").mkdir()
    os.mkfifo(inside / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(inside / "socket"))
    return directory


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("out/secret", "is not allowed (rules: [read] allow)"),
        ("in/../out/secret", "has an empty part, or . or .. in it"),
        ("in/./file", "has an empty part, or . or .. in it"),
        ("in//file", "has an empty part, or . or .. in it"),
        ("in/", "has an empty part"),
        ("in/link", "is no plain file (or a symbolic link)"),
        ("in/relative", "is no plain file (or a symbolic link)"),
        ("in/way/secret", "way is a symbolic link, or no directory: give the real path"),
        ("in/loop", "is no plain file (or a symbolic link)"),
        ("in/directory", "is no plain file"),
        ("in/fifo", "is no plain file"),
        ("in/socket", "is no plain file"),
        ("in/nothing", "nothing: No such file"),
        ("in/no/thing", "no: No such file"),
    ],
)
def test_no_way_out_for_readers(trap: Path, path: str, text: str) -> None:
    rules = rules_for(trap)
    with pytest.raises(Rejected) as caught:
        read_part(rules, f"{trap}/{path}", 0, 10)
    assert text in str(caught.value)
    with pytest.raises(Rejected) as caught:
        checksum(rules, f"{trap}/{path}")
    assert text in str(caught.value)


@pytest.mark.parametrize("path", ["relative", "", "/a\0b", "/" + "x" * 5000])
def test_paths_that_mean_something_else(trap: Path, path: str) -> None:
    with pytest.raises(Rejected):
        read_part(rules_for(trap), path, 0, 10)


def test_a_directory_that_becomes_a_link_meanwhile(trap: Path, monkeypatch: Any) -> None:
    """Between the check and the use: the use is what is checked."""
    inside = trap / "in"
    (inside / "directory" / "secret").write_text("harmless")
    rules = rules_for(trap)
    real = files.open_directory

    def swap(path: str) -> int:
        (inside / "directory" / "secret").unlink(missing_ok=True)
        (inside / "directory").rmdir()
        (inside / "directory").symlink_to(trap / "out")
        return real(path)

    monkeypatch.setattr(files, "open_directory", swap)
    with pytest.raises(Rejected, match="is a symbolic link"):
        read_part(rules, f"{inside}/directory/secret", 0, 10)


@pytest.mark.parametrize(
    ("offset", "count", "text"),
    [
        (-1, 1, "offset: -1 is no whole number"),
        (0, CHUNK_BYTES_MAX + 1, "count: 1048577 is no whole number from 0 to 1048576"),
        (0, "5", "count: '5' is no whole number"),
        (True, 5, "offset: True is no whole number"),
    ],
)
def test_wrong_parts(directory: Path, offset: Any, count: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_part(rules_for(directory), f"{directory}/in/x", offset, count)


def test_large_files_are_refused(directory: Path) -> None:
    rules = rules_for(directory, bytes_max=10)
    path = directory / "in" / "x"
    path.write_bytes(bytes(11))
    for read in (partial(read_part, rules, str(path), 0, 1), partial(checksum, rules, str(path))):
        with pytest.raises(Rejected, match=r"has 11 bytes \(rules: \[read\] bytes_max 10\)"):
            read()
    with pytest.raises(Rejected, match=r"11 bytes \(rules: \[write\] bytes_max 10\)"):
        Uploads(rules).begin(str(path), 11, sha256(b""), 0o644)


def test_a_file_is_written_whole_or_not_at_all(directory: Path) -> None:
    uploads = Uploads(rules_for(directory))
    inside = directory / "in"
    path = inside / "file"
    path.write_text("before")
    content = os.urandom(5000)
    begun = uploads.begin(str(path), 5000, sha256(content).upper(), 0o600)
    for offset in (3000, 0, 1500, 0):  # in any order, and twice
        part = content[offset : offset + 2000]
        uploads.write(begun["id"], offset, b64(part), sha256(part))
    assert path.read_text() == "before"
    assert len(list(inside.iterdir())) == 2
    done = uploads.end(begun["id"])
    assert done == {"path": str(path), "size": 5000, "sha256": sha256(content)}
    assert path.read_bytes() == content
    assert path.stat().st_mode & 0o7777 == 0o600
    assert list(inside.iterdir()) == [path]
    with pytest.raises(Rejected, match="no file is being written as"):
        uploads.end(begun["id"])


@pytest.mark.parametrize("how", ["short", "other", "given up", "closed", "link"])
def test_what_is_not_finished_leaves_nothing(directory: Path, how: str) -> None:
    uploads = Uploads(rules_for(directory))
    path = directory / "in" / "file"
    begun = uploads.begin(str(path), 4, sha256(b"good"), 0o644)
    uploads.write(begun["id"], 0, b64(b"go" if how == "short" else b"evil"), "")
    match how:
        case "short":
            with pytest.raises(Rejected, match="2 bytes were written, 4 announced"):
                uploads.end(begun["id"])
        case "other":
            with pytest.raises(Rejected, match="what was written is not what its sha256 says"):
                uploads.end(begun["id"])
        case "given up":
            uploads.give_up(begun["id"])
            uploads.give_up(begun["id"])
        case "closed":
            uploads.close()
        case _:
            (temporary,) = (directory / "in").iterdir()
            temporary.unlink()
            (directory / "good").write_text("good")
            temporary.symlink_to(directory / "good")
            with pytest.raises(Rejected, match="cannot be written"):
                uploads.end(begun["id"])
    assert list((directory / "in").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("out/new", "is not allowed (rules: [write] allow)"),
        ("in/../out/new", "has an empty part"),
        ("in/way/new", "way is a symbolic link"),
        ("in/link", "is there and is no plain file"),
        ("in/directory", "is there and is no plain file"),
        ("in/fifo", "is there and is no plain file"),
        ("in/no/new", "no: No such file"),
    ],
)
def test_no_way_out_for_writers(trap: Path, path: str, text: str) -> None:
    with pytest.raises(Rejected) as caught:
        Uploads(rules_for(trap)).begin(f"{trap}/{path}", 4, sha256(b"evil"), 0o644)
    assert text in str(caught.value)
    assert (trap / "out" / "secret").read_text() == "secret"
    assert not (trap / "out" / "new").exists()


def test_a_name_that_becomes_a_link_meanwhile_is_not_followed(trap: Path) -> None:
    uploads = Uploads(rules_for(trap))
    path = trap / "in" / "new"
    begun = uploads.begin(str(path), 4, sha256(b"evil"), 0o644)
    uploads.write(begun["id"], 0, b64(b"evil"), "")
    path.symlink_to(trap / "out" / "secret")
    with pytest.raises(Rejected, match="is there and is no plain file"):
        uploads.end(begun["id"])
    assert (trap / "out" / "secret").read_text() == "secret"


@pytest.mark.parametrize(
    ("offset", "data", "checksum_of", "text"),
    [
        (0, "not base64!", None, "data: is no base64"),
        (0, 5, None, "data: expected base64"),
        (1, b64(b"good"), None, "data: ends after the 4 bytes that were announced"),
        (5, "", None, "offset: 5 is no whole number from 0 to 4"),
        (0, b64(b"good"), b"evil", "data: is not what its sha256 says"),
    ],
)
def test_wrong_writes(
    directory: Path, offset: int, data: Any, checksum_of: bytes | None, text: str
) -> None:
    uploads = Uploads(rules_for(directory))
    begun = uploads.begin(f"{directory}/in/x", 4, sha256(b"good"), 0o644)
    said = "" if checksum_of is None else sha256(checksum_of)
    with pytest.raises((Rejected, ValueError), match=text):
        uploads.write(begun["id"], offset, data, said)
    uploads.close()


@pytest.mark.parametrize(
    ("size", "digest", "mode", "text"),
    [
        (-1, sha256(b""), 0o644, "size: -1 is no whole number"),
        (1, "abc", 0o644, "sha256: expected the whole content's, 64 hexadecimal digits"),
        (1, sha256(b""), 0o4755, "mode: 2541 is no whole number from 0 to 511"),
    ],
)
def test_wrong_beginnings(directory: Path, size: int, digest: str, mode: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Uploads(rules_for(directory)).begin(f"{directory}/in/x", size, digest, mode)


def test_uploads_are_bounded_and_idle_ones_make_room(directory: Path, monkeypatch: Any) -> None:
    uploads = Uploads(rules_for(directory))
    for number in range(UPLOADS_MAX):
        uploads.begin(f"{directory}/in/{number}", 1, sha256(b"x"), 0o644)
    with pytest.raises(Rejected, match="UPLOADS_MAX"):
        uploads.begin(f"{directory}/in/more", 1, sha256(b"x"), 0o644)
    assert len(list((directory / "in").iterdir())) == UPLOADS_MAX
    monkeypatch.setattr(files, "UPLOAD_IDLE_S", -1.0)
    uploads.begin(f"{directory}/in/more", 1, sha256(b"x"), 0o644)
    assert len(list((directory / "in").iterdir())) == 1
    uploads.close()


# --- facts


def test_facts() -> None:
    known = facts()
    assert known["hostname"] == os.uname().nodename
    assert known["os"]["id"]
    assert known["uptime_s"] > 0
    assert known["memory_bytes"] > 1 << 20
    json.dumps(known)
    loopback = [row for row in addresses() if row["interface"] == "lo"]
    assert ("ipv4", "127.0.0.1", 8) in [
        (row["family"], row["address"], row["prefix"]) for row in loopback
    ]


def test_addresses_are_those_that_ip_shows() -> None:
    shown = subprocess.run(["ip", "-j", "addr"], capture_output=True, text=True, check=False)
    if shown.returncode:
        pytest.skip("no ip program here")
    expected = {
        (link["ifname"], entry["local"], entry["prefixlen"])
        for link in json.loads(shown.stdout)
        for entry in link["addr_info"]
    }
    assert {(r["interface"], r["address"], r["prefix"]) for r in addresses()} == expected


# --- programs


class Programs:
    """Runs, with their loop on a thread of its own."""

    def __init__(self, directory: Path, **rules: Any) -> None:
        shell = os.path.realpath("/bin/sh")
        allow = (shell, f"{directory}/tools/*", "/no/such")
        found = {"allow": allow, "environment": ("MY_*",), "directories": ("/", f"{directory}/in")}
        self.shell = shell
        self.loop = Loop()
        self.said: list[str] = []
        self.runs = Runs(
            self.loop, Rules("rules", exec=Exec(**(found | rules))), self.in_loop, self.said.append
        )
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def in_loop(self, action: Callable[[], Any]) -> Any:
        """By the agent's own way to its loop."""
        standard = Standard.__new__(Standard)
        standard._loop = self.loop
        return standard._in_loop(action)

    def start(self, script: str, **more: Any) -> str:
        return self.begin([self.shell, "-c", script], **more)

    def begin(self, argv: Any, **more: Any) -> str:
        given = {"directory": "/", "environment": {}, "stdin": "", "timeout_s": None} | more
        return str(self.runs.start(argv, **given)["id"])

    def finish(self, key: str) -> tuple[bytes, bytes, dict[str, Any]]:
        """Read to the end, as a caller does."""
        out, err = b"", b""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            assert time.monotonic() < deadline_s
            part = self.runs.read(key, len(out), len(err), 5.0)
            out += base64.b64decode(part["stdout"])
            err += base64.b64decode(part["stderr"])
            assert (part["stdout_next"], part["stderr_next"]) == (len(out), len(err))
            if part["ended"]:
                return out, err, part

    def close(self) -> None:
        self.in_loop(self.runs.close)
        self.loop.stop()
        self._thread.join(WAIT_S)
        self.loop.close()


@pytest.fixture
def programs(directory: Path) -> Iterator[Programs]:
    programs = Programs(directory)
    yield programs
    programs.close()


def test_a_program_is_run(programs: Programs, directory: Path) -> None:
    (directory / "in").mkdir()
    key = programs.start(
        "pwd; cat; echo $MY_COLOUR; echo oops >&2; exit 3",
        directory=f"{directory}/in",
        stdin=b64(b"\x00\xffgiven\n"),
        environment={"MY_COLOUR": "blue"},
    )
    out, err, last = programs.finish(key)
    assert out == f"{directory}/in\n".encode() + b"\x00\xffgiven\nblue\n"
    assert err == b"oops\n"
    assert (last["status"], last["signal"], last["timed_out"]) == (3, None, False)
    assert programs.finish(key)[0] == out  # as often as one likes
    programs.runs.end(key)
    with pytest.raises(Rejected, match="no program runs, or is remembered"):
        programs.runs.read(key, 0, 0, 0)
    assert any(key in line and "exec" in line for line in programs.said)


def test_what_it_says_comes_while_it_runs(programs: Programs, directory: Path) -> None:
    gate = directory / "gate"
    os.mkfifo(gate)
    key = programs.start(f"echo first; read x <{gate}; echo second")
    part = programs.runs.read(key, 0, 0, 20.0)
    assert base64.b64decode(part["stdout"]) == b"first\n"
    assert not part["ended"]
    gate.write_text("\n")
    assert programs.finish(key)[0] == b"first\nsecond\n"


def test_large_input_and_output(programs: Programs) -> None:
    data = os.urandom(1_000_000)
    out, _, last = programs.finish(programs.start("cat", stdin=b64(data)))
    assert out == data
    assert last["dropped"] == 0
    with pytest.raises(ValueError, match="STDIN_BYTES_MAX"):
        programs.start("cat", stdin=b64(bytes(runs.STDIN_BYTES_MAX + 1)))


def test_output_is_bounded(directory: Path) -> None:
    programs = Programs(directory, output_bytes_max=1000)
    key = programs.start("head -c 100000 /dev/zero; head -c 500 /dev/zero >&2")
    out, err, last = programs.finish(key)
    assert (len(out), len(err), last["dropped"]) == (1000, 500, 99_000)
    assert last["status"] == 0  # it was not held up by that
    programs.close()


def test_time_is_bounded(programs: Programs, monkeypatch: Any) -> None:
    monkeypatch.setattr(runs, "GRACE_S", WAIT_S)  # however slowly it heeds that
    key = programs.start("sleep 1000 & wait; sleep 1000", timeout_s=0.1)
    last = programs.finish(key)[2]
    assert (last["timed_out"], last["signal"]) == (True, signal.SIGTERM)


def test_who_does_not_heed_the_end_of_its_time_is_killed(
    programs: Programs, monkeypatch: Any
) -> None:
    monkeypatch.setattr(runs, "GRACE_S", 0.1)
    key = programs.start("trap '' TERM; echo up; sleep 1000 & wait; sleep 1000")
    programs.runs.read(key, 0, 0, runs.WAIT_S_MAX)  # from here on it does not heed it
    programs.in_loop(partial(programs.runs._time_is_over, programs.runs._find(key)))
    out, _, last = programs.finish(key)
    assert out == b"up\n"
    assert (last["timed_out"], last["signal"]) == (True, signal.SIGKILL)


def test_a_program_is_ended_with_all_that_it_started(programs: Programs) -> None:
    key = programs.start("sleep 1000 & echo $!; wait")
    part = programs.runs.read(key, 0, 0, 20.0)
    pid = int(base64.b64decode(part["stdout"]))
    programs.runs.end(key)
    wait(lambda: not Path(f"/proc/{pid}").exists())


def test_programs_are_bounded(programs: Programs) -> None:
    keys = [programs.start("sleep 1000") for _ in range(RUNS_MAX)]
    with pytest.raises(Rejected, match="RUNS_MAX"):
        programs.start("true")
    programs.runs.end(keys.pop())
    first = programs.start("true")
    programs.finish(first)
    programs.start("true")  # one that is over makes room
    with pytest.raises(Rejected, match="no program runs"):
        programs.runs.read(first, 0, 0, 0)


def test_only_some_may_wait_for_news(programs: Programs) -> None:
    key = programs.start("sleep 1000")
    waiting = [
        threading.Thread(target=lambda: programs.runs.read(key, 0, 0, 20.0))
        for _ in range(WAITING_MAX)
    ]
    for thread in waiting:
        thread.start()
    wait(lambda: programs.runs._waiting._value == 0)
    started_s = time.monotonic()
    assert not programs.runs.read(key, 0, 0, 20.0)["ended"]  # at once
    assert time.monotonic() - started_s < 10
    programs.begin([programs.shell, "-c", "true"])
    programs.in_loop(lambda: programs.runs._kill(programs.runs._runs[key]))
    for thread in waiting:
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("argv", "more", "text"),
    [
        ([], {}, "argv: expected a list of texts"),
        ("ls", {}, "argv: expected a list of texts"),
        (["/bin/cat\0"], {}, "argv: expected a list of texts"),
        ([1], {}, "argv: expected a list of texts"),
        (["{shell}"] * 2000, {}, "argv: expected a list of texts"),
        (["{shell}", "x" * 200_000], {}, "argv: expected a list of texts"),
        (["cat"], {}, "cat: is not absolute"),
        (["/usr/bin/../bin/cat"], {}, "has an empty part, or . or .. in it"),
        (["/bin/nothing"], {}, r"is not allowed \(rules: \[exec\] allow\)"),
        (
            ["{directory}/tools/link"],
            {},
            r"/etc/hostname, to which .*/tools/link is a link: is not",
        ),
        (["{directory}/tools/way/hostname"], {}, r"tools/way/hostname: is not allowed"),
        (["{shell}"], {"directory": "/etc"}, r"/etc: is not allowed \(rules: \[exec\] directories"),
        (["{shell}"], {"directory": "{directory}/in/way"}, "directories"),
        (["{shell}"], {"directory": "/tmp/.."}, "directories"),
        (["{shell}"], {"directory": 5}, "argument directory"),
        (["{shell}"], {"environment": {"LD_PRELOAD": "x"}}, r"LD_PRELOAD: is not allowed"),
        (["{shell}"], {"environment": {"MY_X": 5}}, "environment: MY_X: expected a text"),
        (["{shell}"], {"environment": []}, "argument environment"),
        (["{shell}"], {"timeout_s": 61}, r"timeout_s: 61 is not over 0 and at most 60"),
        (["{shell}"], {"timeout_s": 0}, "timeout_s: 0 is not over 0"),
        (["{shell}"], {"timeout_s": "5"}, "timeout_s: '5' is not over 0"),
        (["{shell}"], {"stdin": "!"}, "is no base64"),
    ],
)
def test_what_is_not_run(
    programs: Programs, directory: Path, argv: Any, more: dict[str, Any], text: str
) -> None:
    tools = directory / "tools"
    tools.mkdir()
    (directory / "in").mkdir()
    (tools / "link").symlink_to("/etc/hostname")
    (tools / "way").symlink_to("/etc")
    (directory / "in" / "way").symlink_to("/etc")
    names = {"shell": programs.shell, "directory": str(directory)}

    def filled(value: Any) -> Any:
        return value.format(**names) if isinstance(value, str) else value

    argv = [filled(word) for word in argv] if isinstance(argv, list) else argv
    with pytest.raises((Rejected, TypeError, ValueError), match=text):
        programs.begin(argv, **{key: filled(value) for key, value in more.items()})
    assert programs.runs._runs == {}


def test_a_program_that_is_not_there(programs: Programs) -> None:
    out, err, last = programs.finish(programs.begin(["/no/such"]))
    assert (out, last["status"]) == (b"", 127)
    assert b"cannot start: /no/such: No such file or directory" in err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((-1, 0, 0), "stdout_from: -1 is no number of bytes"),
        ((0, True, 0), "stderr_from: True is no number of bytes"),
        ((0, 0, 21), "wait_s: 21 is not from 0 to 20"),
        ((0, 0, "x"), "wait_s: 'x' is not from 0 to 20"),
    ],
)
def test_wrong_reads(programs: Programs, args: tuple[Any, Any, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        programs.runs.read("x", *args)


# --- the whole, through the daemon


class Guest:
    """The daemon, and the standard agent as a unit of it."""

    def __init__(self, directory: Path, rules: str) -> None:
        (directory / "standard.toml").write_text(rules)
        (directory / "units").mkdir()
        command = [sys.executable, "-m", "vchan.agents.standard.agent"]
        command += ["--config", str(directory / "standard.toml")]
        unit = f'command = {json.dumps(command)}\ntopics = ["vchan.standard"]\n'
        unit += f'environment = {{ PYTHONPATH = "{ROOT}" }}\n'
        (directory / "units" / "standard.toml").write_text(unit)
        self.log = directory / "daemon.log"
        options = [
            *("--port", f"unix:{directory}/guest", "--socket", str(directory / "agent.sock")),
            *("--units", str(directory / "units"), "--allow", "list, state, info, ping"),
        ]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vchan.guest.daemon", *options],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(WAIT_S)
        print(self.log.read_text())


def test_through_the_daemon(directory: Path) -> None:
    (directory / "in").mkdir()
    shell = os.path.realpath("/bin/sh")
    allow = f'allow = ["{directory}/in/*"]'
    rules = f'facts = true\n[exec]\nallow = ["{shell}"]\n[read]\n{allow}\n[write]\n{allow}\n'
    guest = Guest(directory, rules)
    with Cable(directory) as cable, HostEnd(cable.host) as host:

        def ask(method: str, **args: Any) -> Any:
            return json.loads(host.call("vchan.standard", method, **args))

        host.wait_served("vchan.standard")
        assert ask("ping")["allowed"]["exec"]
        (row,) = json.loads(host.call("vchan.guest", "agents"))
        assert (row["name"], row["serves"]) == ("standard", True)
        assert ask("facts")["kernel"].startswith("Linux")
        content = os.urandom(300_000)
        path = f"{directory}/in/file"
        begun = ask("file_write_begin", path=path, size=len(content), sha256=sha256(content))
        for offset in range(0, len(content), 100_000):
            part = content[offset : offset + 100_000]
            ask("file_write", id=begun["id"], offset=offset, data=b64(part), sha256=sha256(part))
        ask("file_write_end", id=begun["id"])
        assert Path(path).read_bytes() == content
        assert ask("file_checksum", path=path)["sha256"] == sha256(content)
        assert base64.b64decode(ask("file_read", path=path)["data"]) == content
        key = ask("exec", argv=[shell, "-c", f"wc -c <{path}"])["id"]
        wait(lambda: ask("exec_read", id=key, wait_s=5)["ended"])
        assert int(base64.b64decode(ask("exec_read", id=key)["stdout"])) == 300_000
        ask("exec_end", id=key)
        begun = ask("file_write_begin", path=path, size=1, sha256=sha256(b"x"))
        ask("file_write_give_up", id=begun["id"])
        outcome = host.submit("vchan.standard", "file_read", path="/etc/passwd").result(WAIT_S)
        assert isinstance(outcome, Answered)
        assert outcome.failed
        failure = json.loads(outcome.body)
        assert failure["class"] == "Rejected"
        assert "/etc/passwd: is not allowed" in failure["message"]
        sleeping = ask("exec", argv=[shell, "-c", "echo $$; sleep 1000"])["id"]
        wait(lambda: ask("exec_read", id=sleeping)["stdout"])
        pid = int(base64.b64decode(ask("exec_read", id=sleeping)["stdout"]))
    guest.close()
    assert f"file_read {path}" in guest.log.read_text()
    wait(lambda: not Path(f"/proc/{pid}").exists())  # what it ran ended with it


def test_by_default_only_ping_is_allowed(directory: Path) -> None:
    guest = Guest(directory, "")
    with Cable(directory) as cable, HostEnd(cable.host) as host:
        host.wait_served("vchan.standard")
        assert json.loads(host.call("vchan.standard", "ping"))["allowed"]["ping"]
        for method, args in (
            ("facts", {}),
            ("exec", {"argv": ["/bin/true"]}),
            ("file_read", {"path": "/etc/hostname"}),
            ("file_checksum", {"path": "/etc/hostname"}),
            ("file_write_begin", {"path": "/tmp/x", "size": 0, "sha256": sha256(b"")}),
        ):
            outcome = host.submit("vchan.standard", method, **args).result(WAIT_S)
            assert isinstance(outcome, Answered)
            assert outcome.failed
            message = json.loads(outcome.body)["message"]
            assert "not allowed" in message
            assert f"({directory}/standard.toml: " in message
    guest.close()


def test_even_ping_can_be_forbidden(directory: Path) -> None:
    guest = Guest(directory, "ping = false")
    with Cable(directory) as cable, HostEnd(cable.host) as host:
        host.wait_served("vchan.standard")
        outcome = host.submit("vchan.standard", "ping").result(WAIT_S)
        assert isinstance(outcome, Answered)
        assert outcome.failed
    guest.close()


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "usage: vchan-guest standard-agent"),
        (["--dance"], 2, "command line: '--dance': see vchan-guest standard-agent --help"),
        (["--config"], 2, "command line: '--config'"),
        (["--config", "/no/such"], 2, "/no/such: no such file"),
        (["--config=/proc/self"], 2, "/proc/self: cannot be read: Is a directory"),
        (["--config", "{file}"], 2, "{file}: is no TOML"),
    ],
)
def test_how_the_command_ends(
    directory: Path, arguments: list[str], status: int, text: str
) -> None:
    (directory / "file").write_text("[")
    names = {"file": str(directory / "file")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vchan.guest.daemon", "standard-agent"),
            *(word.format(**names) for word in arguments),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert text.format(**names) in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
