"""The vchan command as a process: signals, pipes, terminals, locales, permissions."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.guest_image import PYTHON
from tests.unit.local_host import LocalHost
from tests.unit.test_cli_shapes import HEALTHY
from vchan import cli

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
NOBODY = 65534


@pytest.fixture
def host() -> Iterator[LocalHost]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        Path(name).chmod(0o755)
        with LocalHost(Path(name) / "host.sock") as host:
            host.status |= HEALTHY
            host.add("名前-1", "aaaa1111-0000-4000-8000-000000000001")
            yield host


def words_of(host: LocalHost, *words: str) -> list[str]:
    return [sys.executable, "-m", "vchan.cli", "--socket", host.server.path, *words]


def run(
    host: LocalHost, *words: str, stdout: int = subprocess.PIPE, **names: str
) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    done = subprocess.run(
        words_of(host, *words),
        cwd=ROOT,
        env={**os.environ, **names},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return done.returncode, done.stdout or "", done.stderr


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "words", [("call", "vm", "agent", "sleep"), ("watch",), ("top",), ("ping", "vm")], ids=" ".join
)
def test_ctrl_c_is_quiet(host: LocalHost, words: tuple[str, ...]) -> None:
    host.pings = [0.0, None]
    process = subprocess.Popen(
        words_of(host, *words),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait(lambda: host.requests or host.lists, process)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == cli.EXIT_INTERRUPTED
    assert "Traceback" not in err
    assert err in ("", "vchan: 2 VMs; what changes from now on:\n")
    if words[0] == "ping":
        assert out.splitlines()[-1].startswith("asked 2, answered 1; ")


def wait(reached: object, process: subprocess.Popen[str]) -> None:
    assert callable(reached)
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s and process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_ctrl_c_while_it_starts_is_quiet() -> None:
    """The imports are most of a short command's time."""
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'vchan.cli.parser': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from vchan.cli import main\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (cli.EXIT_INTERRUPTED, b"")


# ---------------------------------------------------------------- pipes


@pytest.mark.parametrize("words", [("list",), ("status", "vm", "--json"), ("watch", "-f", "csv")])
def test_a_full_disk_is_told(host: LocalHost, words: tuple[str, ...]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        for unbuffered in ("", "1"):
            status, _, err = run(host, *words, stdout=full, PYTHONUNBUFFERED=unbuffered)
            assert (status, err) == (
                cli.EXIT_FAILED,
                "vchan: standard output cannot be written: No space left on device\n",
            )
    finally:
        os.close(full)


def test_a_reader_that_has_seen_enough_ends_it(host: LocalHost) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        for words in (("list",), ("doctor", "aaaa1"), ("help",)):
            assert run(host, *words, stdout=write_fd) == (cli.EXIT_OK, "", "")
    finally:
        os.close(write_fd)


def test_a_closed_standard_error_is_no_standard_output(host: LocalHost) -> None:
    words = words_of(host, "call", "nobody", "agent", "echo")
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *words], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (cli.EXIT_FAILED, b"")


# ---------------------------------------------------------------- locales, terminals


@pytest.mark.parametrize("language", ["C", "POSIX", "C.UTF-8"])
def test_every_locale_shows_every_name(host: LocalHost, language: str) -> None:
    for words in (("list",), ("status", "aaaa1"), ("list", "-f", "csv"), ("list", "--json")):
        status, out, err = run(
            host, *words, LC_ALL=language, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
        )
        assert (status, err) == (cli.EXIT_OK, "")
        assert "名前-1" in out or "\\u540d\\u524d-1" in out


class Terminal:
    """A command on a terminal of so many columns."""

    def __init__(self, host: LocalHost, *words: str, columns: int, **names: str) -> None:
        self.text = ""
        environment = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", **names}
        environment.pop("COLUMNS", None)
        pid, self._fd = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.execvpe(sys.executable, words_of(host, *words), environment)
        self._pid = pid
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def read_until(self, mark: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while mark not in self.text and self._read():
            assert time.monotonic() < deadline_s, self.text
        assert mark in self.text

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 1)[0]:
            return True
        try:
            self.text += os.read(self._fd, 65536).decode(errors="replace")
        except OSError:  # its other end is closed
            return False
        return True

    def end(self) -> int:
        while self._read():
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


@pytest.mark.parametrize("term", ["xterm", "dumb", ""])
def test_a_narrow_terminal(host: LocalHost, term: str) -> None:
    shown = Terminal(host, "list", columns=40, TERM=term)
    assert shown.end() == cli.EXIT_OK
    lines = shown.text.replace("\r", "").splitlines()
    assert len(lines) == 3
    assert all(cli_columns(line) <= 40 for line in lines)
    assert "…" in shown.text


def cli_columns(text: str) -> int:
    from vchan.cli.output import columns_of

    return columns_of(text)


@pytest.mark.parametrize("columns", [40, 120])
def test_top_on_a_terminal(host: LocalHost, columns: int) -> None:
    shown = Terminal(host, "top", "--interval", "0.2", columns=columns)
    shown.read_until("by name: < and > choose")
    shown.type(b">")
    shown.read_until("calls")
    shown.type(b"q")
    assert shown.end() == cli.EXIT_OK
    assert "名前-1" in shown.text
    assert "Traceback" not in shown.text


def test_top_on_a_terminal_that_can_do_nothing(host: LocalHost) -> None:
    shown = Terminal(host, "top", "--interval", "0.1", "--count", "1", columns=80, TERM="dumb")
    assert shown.end() == cli.EXIT_OK
    assert "NAME" in shown.text


def test_ctrl_c_ends_top_on_a_terminal(host: LocalHost) -> None:
    shown = Terminal(host, "top", columns=80)
    shown.read_until("q ends")
    shown.type(b"\x03")
    assert shown.end() == cli.EXIT_INTERRUPTED
    assert "Traceback" not in shown.text


# ---------------------------------------------------------------- permissions


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path(PYTHON).exists(),
    reason="needs to become another user, and a Python that is for all users",
)
def test_who_may_not_is_told_who_may(host: LocalHost) -> None:
    package = Path(host.server.path).parent  # the checkout may be nobody else's to read
    shutil.copytree(ROOT / "vchan", package / "vchan")

    def drop() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    done = subprocess.run(
        [PYTHON, *words_of(host, "list")[1:]],
        cwd="/",
        env={"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        preexec_fn=drop,
        check=False,
    )
    assert done.returncode == cli.EXIT_UNREACHABLE, done.stderr
    assert "may not open it" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "systemctl" not in done.stderr


def test_an_argument_that_is_no_text(host: LocalHost) -> None:
    command = [os.fsencode(word) for word in words_of(host, "call", "vm")]
    done = subprocess.run([*command, b"\xff", b"echo"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == cli.EXIT_USAGE
    assert b"topic" in done.stderr
    assert done.stderr.endswith(b"a printable name\n")
