"""`vchan exec` and `vchan shell`: the commands, both daemons and the standard agent as processes,
with a cable where QEMU would be; and guests that lie to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("amqp", reason="py-amqp is not installed")

from tests.rig import wait_until
from tests.rig.forwarding import ROOT, WAIT_S
from tests.rig.programs import POLICY, SH, Operator, Programs
from vchan.cli.failures import EXIT_OK, EXIT_OURS, EXIT_USAGE
from vchan.services.framing import FrameReader, encode_frame
from vchan.services.programs import (
    DATA_BYTES_MAX,
    ERROR,
    OUTPUT,
    OUTPUT_BYTES_MAX,
    OutputPart,
    ProgramEnd,
    ProgramList,
    Refusal,
    Room,
    Running,
    encode_program,
)

READY = b"# "


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def fresh(directory: Path) -> Iterator[Programs]:
    """For tests after which a daemon is another, or gone."""
    with Programs(directory) as world:
        yield world


@pytest.fixture(scope="module")
def world() -> Iterator[Programs]:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        Programs(Path(name)) as world,
    ):
        yield world


def sh(script: str, *options: str) -> list[str]:
    return ["exec", "vm", *options, "--", SH, "-c", script]


@contextlib.contextmanager
def running(world: Programs, *words: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command at pipes."""
    pipe = subprocess.PIPE
    given = {"stdin": pipe, "stdout": pipe, "stderr": pipe, **more}
    command = [sys.executable, *world.cli_words(*words)]
    with subprocess.Popen(command, cwd=ROOT, **given) as process:
        try:
            yield process
        finally:
            process.kill()


def rows_of(world: Programs, service: str) -> list[dict[str, str]]:
    done = world.cli("--json", service, "vm", "--list")
    assert done.returncode == EXIT_OK, done.stderr
    rows: list[dict[str, str]] = json.loads(done.stdout)
    return rows


def wait_rows(world: Programs, service: str, states: list[str]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []

    def look() -> bool:
        found[:] = rows_of(world, service)
        return sorted(row["state"] for row in found) == sorted(states)

    wait_until(look, timeout_s=WAIT_S, interval_s=0.05, failure=lambda: str(found))
    return found


# ---------------------------------------------------------------- exec


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -9 $$", 137), ("kill -15 $$", 143)],
)
def test_the_status_is_the_programs(world: Programs, script: str, status: int) -> None:
    done = world.cli(*sh(f"echo out; echo err >&2; {script}"))
    assert (done.returncode, done.stdout, done.stderr) == (status, b"out\n", b"err\n")


def test_any_bytes_pass_both_ways_and_the_inputs_end(world: Programs) -> None:
    given = os.urandom(5 << 20)
    done = world.cli("exec", "vm", "--", "/usr/bin/cat", stdin=given)
    assert (done.returncode, done.stderr) == (0, b"")
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(given).digest()


def test_without_input(world: Programs) -> None:
    done = world.cli("exec", "vm", "-n", "--", "/usr/bin/wc", "-c", stdin=b"never read")
    assert done.stdout == b"0\n"


def test_input_that_is_closed(world: Programs) -> None:
    command = [sys.executable, *world.cli_words("exec", "vm", "--", "/usr/bin/wc", "-c")]
    script = 'exec "$@" <&-'
    done = subprocess.run([SH, "-c", script, SH, *command], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0\n", b"")


def test_with_a_terminal_where_there_is_none(world: Programs) -> None:
    done = world.cli(*sh("tty; stty size", "-t"))
    assert re.fullmatch(rb"/dev/pts/[0-9]+\r\n[0-9]+ [0-9]+\r\n", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGINT, "INT"), (signal.SIGTERM, "TERM"), (signal.SIGUSR1, "USR1")],
)
def test_signals_go_to_the_program(world: Programs, number: signal.Signals, name: str) -> None:
    script = f"trap 'echo got {name}; exit 7' {name}; echo ready; while :; do sleep 0.05; done"
    with running(world, *sh(script)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"got {name}\n".encode()
        assert process.wait(WAIT_S) == 7


def test_the_third_ctrl_c_leaves_a_program_that_does_not_heed_it(world: Programs) -> None:
    with running(world, *sh("trap 'echo no' INT; echo ready; while :; do sleep 0.05; done")) as it:
        assert it.stdout is not None and it.stderr is not None
        assert it.stdout.readline() == b"ready\n"
        for _ in range(2):
            it.send_signal(signal.SIGINT)
            assert it.stdout.readline() == b"no\n"
        it.send_signal(signal.SIGINT)
        assert it.wait(WAIT_S) == 130
        said = it.stderr.read().decode()
    key = re.search(r"vchan exec vm --attach ([0-9a-f]{16})", said)
    assert key is not None, said
    with running(world, "exec", "vm", "--attach", key[1]) as again:
        wait_rows(world, "exec", ["attached"])
        again.send_signal(signal.SIGTERM)
        assert again.wait(WAIT_S) == 143


def test_who_reads_no_more_ends_the_program(world: Programs) -> None:
    with running(world, "exec", "vm", "--", "/usr/bin/yes") as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"y\ny\n"
        process.stdout.close()
        assert process.wait(WAIT_S) == 141
    assert rows_of(world, "exec") == []


def test_an_output_that_is_full(world: Programs) -> None:
    with (
        Path("/dev/full").open("wb") as full,
        running(world, "exec", "vm", "--", "/usr/bin/yes", stdout=full) as process,
    ):
        assert process.wait(WAIT_S) == EXIT_OURS
        assert process.stderr is not None
        assert b"standard output: No space left on device" in process.stderr.read()


def test_an_output_that_is_closed(world: Programs) -> None:
    words = [sys.executable, *world.cli_words("exec", "vm", "--", "/usr/bin/seq", "3")]
    done = subprocess.run([SH, "-c", 'exec "$@" >&-', SH, *words], cwd=ROOT, capture_output=True)
    assert done.returncode == EXIT_OURS
    assert b"standard output: Bad file descriptor" in done.stderr


def test_input_that_cannot_be_read_is_not_taken_for_a_whole_one(world: Programs) -> None:
    script = "cat; echo whole"
    with (
        Path("/proc/self/mem").open("rb") as unreadable,
        running(world, *sh(script), stdin=unreadable) as process,
    ):
        assert process.stdout is not None and process.stderr is not None
        assert process.wait(WAIT_S) == EXIT_OURS
        assert b"standard input: Input/output error" in process.stderr.read()
        assert process.stdout.read() == b""


def test_descriptors_that_do_not_wait(world: Programs) -> None:
    """As another program may have made them that shares them."""
    given = os.urandom(2 << 20)
    their_input, our_input = os.pipe()
    our_output, their_output = os.pipe()
    for fd in (their_input, their_output):
        os.set_blocking(fd, False)
    words = ("exec", "vm", "--", "/usr/bin/cat")
    with running(world, *words, stdin=their_input, stdout=their_output) as process:
        os.close(their_input)
        os.close(their_output)
        wait_rows(world, "exec", ["attached"])  # it waits for input
        with os.fdopen(our_input, "wb") as sending, os.fdopen(our_output, "rb") as receiving:

            def send() -> None:
                sending.write(given)
                sending.close()

            thread = threading.Thread(target=send)
            thread.start()
            got = receiving.read()
            thread.join(WAIT_S)
        assert process.wait(WAIT_S) == 0
    assert got == given


def test_what_the_guests_owner_does_not_allow_is_said(world: Programs) -> None:
    done = world.cli("exec", "vm", "--", "/sbin/init")
    assert done.returncode == EXIT_OURS
    assert b"vm exec: /sbin/init: is not allowed" in done.stderr
    assert b"[exec] allow" in done.stderr
    done = world.cli("exec", "vm", "--env", "LD_PRELOAD=x", "--", "/usr/bin/id")
    assert b"[exec] environment" in done.stderr
    done = world.cli("exec", "vm", "--user", "nobody", "--", "/usr/bin/id")
    assert b"[exec] users" in done.stderr
    done = world.cli("shell", "vm", "--attach", "0123")
    assert done.returncode == EXIT_OURS and b"nothing runs here as '0123'" in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("exec", "vm"), b"expected a program"),
        (("exec", "vm", "--list", "--", "/bin/ls"), b"expected no program"),
        (("exec", "vm", "--env", "x", "--", "/bin/ls"), b"expected NAME=VALUE"),
        (("exec", "vm", "--json", "--", "/bin/ls"), b"is for --list"),
        (("shell", "vm", "--list", "--attach"), b"expected no --attach"),
        (("exec", "vm", "--", "/bin/ls", "x" * 70000), b"too long"),
        (("exec", "vm", "--", "/bin/ls", *["x"] * 1025), b"at most 1024 texts (ARGUMENTS_MAX)"),
        (("exec", "vm", "--user", "x" * 5000, "--", "/bin/ls"), b"user: over 4096 characters"),
        (("shell", "vm", "--attach", "x" * 5000), b"id: over 4096 characters"),
        (("exec", "vm", "-t", "/bin/ls", "-l"), b"not understood: -l"),
    ],
)
def test_wrong_words_are_one_line(world: Programs, words: tuple[str, ...], text: bytes) -> None:
    done = world.cli(*words)
    assert done.returncode == EXIT_USAGE
    assert text in done.stderr


def test_a_vm_that_there_is_not(world: Programs) -> None:
    done = world.cli("exec", "nobody", "--", "/usr/bin/id")
    assert done.returncode == EXIT_OURS
    assert b"'nobody': this host has no such domain" in done.stderr


# ---------------------------------------------------------------- who may


def test_every_session_is_on_record_and_two_have_to_allow_it(directory: Path) -> None:
    policy = "reply any any allow\nlisten any any allow\nforward name:vm service:exec allow\n"
    with Programs(directory, policy, "service:shell") as world:
        denied = world.cli("shell", "vm")
        assert denied.returncode == EXIT_OURS
        assert b"no rule of this host's policy allows it (default)" in denied.stderr
        refused = world.cli("exec", "vm", "--", "/usr/bin/id")
        assert refused.returncode == EXIT_OURS
        assert b"service:exec: the owner of this guest does not allow it" in refused.stderr
        world.policy.write_text(POLICY)
        assert world.host.process is not None
        world.host.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: world.cli("shell", "vm", stdin=b"exit 4\n").returncode == 4,
            timeout_s=WAIT_S,
            interval_s=0.1,
            failure=lambda: world.host.log.read_text(),
        )
        rows = [(row["exchange"], row["topic"], row["verdict"]) for row in world.audited()]
        assert rows[0] == ("service", "shell", "deny")
        assert ("service", "exec", "allow") in rows
        assert rows[-2:] == [("service", "shell", "allow"), ("service", "shell", "ended")]
        last = world.audited()[-1]
        assert last["reason"] == "both ends were done" and last["bytes_out"] > 0
        assert last["by"].startswith(f"uid {os.getuid()}, pid ")
        assert world.agent is not None
        assert "shell" in world.agent.log.read_text() and f": {SH}" in world.agent.log.read_text()


def test_a_guest_without_an_agent_that_serves_it(directory: Path) -> None:
    with Programs(directory, standard="") as world:
        done = world.cli("shell", "vm")
        assert done.returncode == EXIT_OURS
        assert (
            b"service:shell in the guest: No such file or directory; the standard agent"
            in done.stderr
        )


# ---------------------------------------------------------------- it goes on


def test_it_goes_on_through_cuts_and_restarts_of_the_hosts_daemon(fresh: Programs) -> None:
    count = 400_000
    expected = hashlib.sha256(b"".join(b"%d\n" % n for n in range(1, count + 1))).hexdigest()
    got = hashlib.sha256()
    size = 0
    with running(fresh, "exec", "vm", "--", "/usr/bin/seq", "1", str(count)) as process:
        assert process.stdout is not None
        for action in (fresh.cut, fresh.host.restart, fresh.cut):
            data = process.stdout.read(400_000)
            size += len(data)
            got.update(data)
            action()
        while data := process.stdout.read(65536):
            got.update(data)
        assert process.wait(WAIT_S) == 0
    assert got.hexdigest() == expected


def test_a_program_outlives_a_command_that_is_killed(fresh: Programs) -> None:
    """What was written is not written again, and the rest is written once."""
    script = "i=0; while [ $i -lt 5 ]; do read line; echo $line $i; i=$((i+1)); done; exit 9"
    with running(fresh, *sh(script)) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"one 0\n"
        # What is written is acknowledged behind that: the next line's echo tells that it was.
        process.stdin.write(b"two\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"two 1\n"
        process.kill()
    (row,) = rows_of(fresh, "exec")
    done = fresh.cli("exec", "vm", "--attach", row["id"], stdin=b"three\nfour\nfive\n")
    assert done.returncode == 9
    said = done.stdout.removeprefix(b"two 1\n")  # if its word of that did not get through
    assert said == b"three 2\nfour 3\nfive 4\n"


def test_a_program_is_nobodys_as_soon_as_its_command_is_killed(fresh: Programs) -> None:
    """Not when its guest has asked in vain for minutes: then an --attach without a name finds it,
    and the time that it may be without anybody begins."""
    with running(fresh, *sh("echo on; read line; echo $line")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.kill()
        wait_rows(fresh, "exec", ["detached"])
    done = fresh.cli("exec", "vm", "--attach", stdin=b"more\n")
    assert done.returncode == 0 and done.stdout.endswith(b"more\n")


def test_the_output_of_a_program_that_was_left_is_whole(world: Programs) -> None:
    count = 200_000
    expected = b"".join(b"%d\n" % number for number in range(1, count + 1))
    with running(world, "exec", "vm", "-n", "--", "/usr/bin/seq", "1", str(count)) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1000)
        process.send_signal(signal.SIGHUP)
        rest = process.stdout.read()
        assert process.wait(WAIT_S) == 129
        assert b"--attach" in process.stderr.read()
    done = world.cli("exec", "vm", "--attach")
    assert done.returncode == 0
    assert first + rest + done.stdout == expected


def left(process: subprocess.Popen[bytes]) -> str:
    """Have it leave its program; returns what --attach needs."""
    process.send_signal(signal.SIGHUP)
    assert process.wait(WAIT_S) == 129
    assert process.stderr is not None
    key = re.search(rb"--attach ([0-9a-f]{16})", process.stderr.read())
    assert key is not None
    return key[1].decode()


def test_input_of_who_attaches_behind_its_end(world: Programs) -> None:
    """A pipe's end is for good: more is dropped, as by any pipe that nobody reads."""
    script = "cat; echo ended; while ! [ -e {0} ]; do sleep 0.05; done; exit 5"
    mark = world.directory / "go-on"
    with running(world, *sh(script.format(mark))) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        assert process.stdout.readline() == b"ended\n"
        key = left(process)
    with running(world, "exec", "vm", "--attach", key) as again:
        assert again.stdin is not None and again.stderr is not None
        again.stdin.write(bytes(200_000))  # more than there is room for
        again.stdin.close()
        mark.touch()
        assert again.wait(WAIT_S) == 5
        assert again.stderr.read() == b""


def test_keys_of_who_attaches_behind_an_inputs_end(world: Programs) -> None:
    """A terminal's end is a key like others."""
    script = "cat; echo ended; read line; echo got $line"
    with running(world, *sh(script, "-t")) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        assert process.stdout.readline() == b"ended\r\n"
        key = left(process)
    done = world.cli("exec", "vm", "--attach", key, stdin=b"more\n")
    assert done.stdout.endswith(b"got more\r\n"), done
    assert (done.returncode, done.stderr) == (0, b"")


def test_who_attaches_takes_it_from_who_had_it(world: Programs) -> None:
    with running(world, *sh("echo here; read line; echo $line")) as first:
        assert first.stdout is not None and first.stderr is not None
        assert first.stdout.readline() == b"here\n"
        (row,) = wait_rows(world, "exec", ["attached"])
        done = world.cli("exec", "vm", "--attach", row["id"], stdin=b"mine\n")
        assert done.returncode == 0 and done.stdout.removeprefix(b"here\n") == b"mine\n"
        assert first.wait(WAIT_S) == EXIT_OURS
        assert b"somebody else has attached to it" in first.stderr.read()


def test_an_agent_that_ends_is_an_end_with_a_reason(fresh: Programs) -> None:
    with running(fresh, *sh("echo here; read line")) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"here\n"
        assert fresh.agent is not None
        fresh.agent.kill()
        assert process.wait(WAIT_S) == EXIT_OURS
        assert b"vm exec: " in process.stderr.read()


def test_a_program_outlives_the_guests_daemon(fresh: Programs) -> None:
    """Where the agent is no unit of that: the stream's memory is gone, the program's is not."""
    with running(fresh, *sh("echo here; read line; echo $line; exit 3")) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"here\n"
        fresh.guest.restart()
        assert process.wait(WAIT_S) == EXIT_OURS
        said = process.stderr.read().decode()
    assert "it was restarted" in said
    key = re.search(r"vchan exec vm --attach ([0-9a-f]{16})", said)
    assert key is not None, said
    fresh.wait_ready()
    done = fresh.cli("exec", "vm", "--attach", key[1], stdin=b"again\n")
    assert (done.returncode, done.stdout.removeprefix(b"here\n")) == (3, b"again\n")


def test_a_daemon_that_does_not_come_back(fresh: Programs) -> None:
    with running(fresh, *sh("echo here; read line", "--look", "0.5")) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"here\n"
        fresh.host.kill()
        assert process.wait(WAIT_S) == EXIT_OURS
        said = process.stderr.read()
        assert b"it goes on for 60 s: vchan exec vm --attach " in said


# ---------------------------------------------------------------- shell


def test_a_shell_at_a_terminal(world: Programs) -> None:
    with world.operator("shell", "vm") as me:
        me.wait_seen(READY)
        assert me.is_raw
        me.press(b"echo $TERM; stty size\r")
        me.wait_seen(b"xterm-test\r\n24 80\r\n")
        me.resize(50, 132)
        # The size and the keys go their own ways to the guest.
        me.press(b"until [ \"$(stty size)\" = '50 132' ]; do sleep 0.05; done; echo re''sized\r")
        me.wait_seen(b"resized")
        # It is the one who is interrupted that says it: the shell may not have started him yet.
        me.press(b"sh -c \"echo be''gun; exec sleep 300\"\r")
        at = me.wait_seen(b"begun")
        me.press(b"\x03")
        me.wait_seen(READY, start=at)
        me.press(b"echo ended wi''th $?\r")
        me.wait_seen(b"ended with 130")
        me.press(b"exit 3\r")
        assert me.wait() == 3
        assert me.is_restored


def test_it_is_left_and_come_back_to(world: Programs) -> None:
    with world.operator("shell", "vm") as me:
        me.wait_seen(READY)
        me.press(b"mine=tre''asure; stty -echo\r")
        me.press(b"~?")
        me.wait_seen(b"--attach comes back to it")
        me.press(b"~.")
        assert me.wait() == EXIT_OK
        assert me.is_restored
        assert b"left vm" in me.seen
    (row,) = wait_rows(world, "shell", ["detached"])
    assert row["command"] == SH
    with world.operator("shell", "vm", "--attach", row["id"]) as me:
        me.press(b"echo $mine\r")
        me.wait_seen(b"treasure")
        me.press(b"exit\r")
        assert me.wait() == 0 and me.is_restored
    assert rows_of(world, "shell") == []


def test_a_shell_outlives_the_operators_own_connection(world: Programs) -> None:
    """His terminal is hung up, as when his ssh breaks."""
    with world.operator("shell", "vm") as me:
        me.wait_seen(READY)
        me.press(b"mine=tre''asure; echo do''ne\r")
        me.wait_seen(b"done")
        me.hang_up()
        me.process.wait(WAIT_S)
    wait_rows(world, "shell", ["detached"])
    with world.operator("shell", "vm", "--attach") as me:
        me.press(b"echo $mine; exit 8\r")
        me.wait_seen(b"treasure")
        assert me.wait() == 8


def test_a_shell_goes_on_through_a_restart_of_the_hosts_daemon(fresh: Programs) -> None:
    with fresh.operator("shell", "vm") as me:
        me.wait_seen(READY)
        fresh.host.restart()
        me.press(b"echo still he''re\r")
        me.wait_seen(b"still here")
        fresh.cut()
        me.press(b"echo and ag''ain; exit 2\r")
        me.wait_seen(b"and again")
        assert me.wait() == 2 and me.is_restored


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_gives_the_terminal_back(
    world: Programs, number: signal.Signals, status: int
) -> None:
    with world.operator("shell", "vm") as me:
        me.wait_seen(READY)
        assert me.is_raw
        me.process.send_signal(number)
        assert me.wait() == status
        assert me.is_restored
    assert world.cli("shell", "vm", "--attach", stdin=b"exit\n").returncode == 0


def test_a_shell_without_a_terminal_here_is_left_by_term(world: Programs) -> None:
    """In a script: a shell that waits for more heeds no TERM, so it would not end by `timeout`."""
    with running(world, "shell", "vm") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"echo re''ady\n")
        process.stdin.flush()
        while b"ready" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 143
    assert world.cli("shell", "vm", "--attach", stdin=b"exit\n").returncode == 0


def test_a_fault_of_our_own_gives_the_terminal_back(world: Programs) -> None:
    broken = (
        "from vchan.cli import main, programs\n"
        "def fail(*_): raise RuntimeError('a fault')\n"
        "programs.Remote._send_input = fail\n"
        "main()"
    )
    words = world.cli_words("shell", "vm")[2:]
    with Operator([sys.executable, "-c", broken, *words]) as me:
        assert me.wait() == 1
        assert b"a fault" in me.seen
        assert me.is_restored
    (row,) = rows_of(world, "shell")
    assert world.cli("shell", "vm", "--attach", row["id"], stdin=b"exit\n").returncode == 0


def test_what_a_program_has_switched_on_is_switched_off(world: Programs) -> None:
    with world.operator("shell", "vm") as me:
        me.wait_seen(READY)
        me.press(rb"printf '\033[?1049h\033[?25l\033[?2004h'; echo o''n" + b"\r")
        me.wait_seen(b"on\r\n")
        at = len(me.seen)
        me.press(b"~.")
        assert me.wait() == EXIT_OK
        assert b"\x1b[?1049l\x1b[?2004l\x1b[?25h\x1b[0m" in me.seen[at:]
    assert world.cli("shell", "vm", "--attach", stdin=b"exit\n").returncode == 0


# ---------------------------------------------------------------- guests that lie


class Liar:
    """Serves the service exec as no agent would. Says what it is given, to each connection."""

    def __init__(self, directory: Path, said: bytes, then: Callable[[socket.socket], object]):
        services = directory / "services"
        services.mkdir(exist_ok=True)
        self._server = socket.socket(socket.AF_UNIX)
        path = services / "exec"
        path.unlink(missing_ok=True)
        self._server.bind(str(path))
        self._server.listen()
        self._said = said
        self._then = then
        self.heard = b""  # what is wanted
        self._thread = threading.Thread(target=self._serve, name="liar")
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            connected, _ = self._server.accept()
            with connected:
                connected.settimeout(WAIT_S)
                self.heard = connected.recv(65536)
                connected.sendall(self._said)
                self._then(connected)
                connected.shutdown(socket.SHUT_WR)
                while connected.recv(65536):
                    pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def lying_world() -> Iterator[Programs]:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        Programs(Path(name), standard="") as world,
    ):
        yield world


@pytest.fixture
def lie(lying_world: Programs) -> Iterator[Callable[..., Liar]]:
    made: list[Liar] = []

    def start(*said: bytes, then: Callable[[socket.socket], object] = lambda _: None) -> Liar:
        made.append(Liar(lying_world.directory, b"".join(said), then))
        return made[-1]

    yield start
    for each in made:
        each.close()


RUNNING = encode_program(Running("ab" * 8, False, 0, (0, 0), 60.0))
RUNNING_AS_WORDS = encode_program(Running("0; rm -r ~", False, 0, (0, 0), 60.0))
LITTLE = encode_program(OutputPart(OUTPUT, b"x"))
"""Comes together with what is said before it, however busy the machine is."""
FULL = encode_program(OutputPart(OUTPUT, b"x" * DATA_BYTES_MAX))


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ([b"\xff" * 100], b"the guest broke the protocol"),
        ([encode_frame(200, b"x")], b"kind 200"),
        ([FULL], b"of a program that does not run"),
        ([RUNNING, RUNNING], b"runs already"),
        ([RUNNING, encode_program(Room(1 << 40))], b"more than there can be"),
        ([RUNNING, encode_program(ProgramEnd(0, None)), LITTLE], b"behind the last word"),
        ([RUNNING, encode_frame(68, b'{"status":-1,"signal":null,"text":""}')], b"an end with"),
        ([encode_program(Refusal("\x1b]0;owned\x07no"))], b"vm exec: "),
        ([RUNNING_AS_WORDS], b"id: expected letters and digits"),
        ([RUNNING], b"the guest's agent has ended"),
        ([RUNNING[:7]], b"the guest's agent has ended"),
        ([], b"the guest's agent has ended"),
    ],
)
@pytest.mark.parametrize("is_at_terminal", [False, True])
def test_what_a_guest_may_not_say_ends_the_command(
    lying_world: Programs,
    lie: Callable[..., Liar],
    said: list[bytes],
    text: bytes,
    is_at_terminal: bool,
) -> None:
    lie(*said)
    if is_at_terminal:
        with lying_world.operator("exec", "vm", "--", "/bin/x") as me:
            assert me.wait() == EXIT_OURS
            assert me.is_restored
            shown = bytes(me.seen)
    else:
        done = lying_world.cli("exec", "vm", "--", "/bin/x")
        assert done.returncode == EXIT_OURS
        shown = done.stderr
    assert text in shown
    assert b"\x1b]0" not in shown and b"Traceback" not in shown


@pytest.mark.parametrize("which", [OUTPUT, ERROR])
def test_a_terminal_is_given_back_that_the_program_was_not_to_have(
    lying_world: Programs, lie: Callable[..., Liar], which: int
) -> None:
    said = encode_program(OutputPart(which, b"\x1b[?1049h\x1b[?1000;1003h\x1b[?25l"))
    lie(RUNNING, said, encode_program(ProgramEnd(0, None)))
    with lying_world.operator("exec", "vm", "--", "/bin/x") as me:
        assert me.wait() == EXIT_OK
        assert me.is_restored
        for mode in (b"\x1b[?1049l", b"\x1b[?1000l", b"\x1b[?1003l", b"\x1b[?25h"):
            assert mode in me.seen


def test_a_list_from_a_guest_steers_no_terminal(
    lying_world: Programs, lie: Callable[..., Liar]
) -> None:
    rows = ({"id": "\x1b[31m", "state": 7, "command": "a\nb", "more": "\x1b[0m"},)
    lie(encode_program(ProgramList(rows)))
    done = lying_world.cli("exec", "vm", "--list")
    assert done.returncode == EXIT_OK
    assert b"\x1b" not in done.stdout and len(done.stdout.splitlines()) == 2


def test_a_guest_that_floods_who_does_not_read_is_held_up(
    lying_world: Programs, lie: Callable[..., Liar]
) -> None:
    """A guest that heeds no window: what the command holds of it is bounded, and it is over."""
    sent: list[int] = []

    def flood(connected: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for number in range(10_000):
                connected.sendall(FULL)
                sent.append(number)

    lie(RUNNING, then=flood)
    with running(lying_world, "exec", "vm", "--", "/bin/x") as process:
        assert process.wait(WAIT_S) == EXIT_OURS  # its output is a pipe that nobody reads
        assert process.stderr is not None
        assert b"more output than there is room for" in process.stderr.read()
    assert len(sent) * DATA_BYTES_MAX < 4 * OUTPUT_BYTES_MAX


def test_a_guest_that_says_nothing_is_left_at_ctrl_c(
    lying_world: Programs, lie: Callable[..., Liar]
) -> None:
    def listen(connected: socket.socket) -> None:
        while connected.recv(65536):
            pass

    liar = lie(then=listen)
    with lying_world.operator("exec", "vm", "--", "/bin/x") as me:
        wait_until(
            lambda: bool(liar.heard), timeout_s=WAIT_S, interval_s=0.01, failure=lambda: me.shown
        )
        me.process.send_signal(signal.SIGINT)
        assert me.wait() == 130
        assert me.is_restored
        assert b"vchan exec vm --list says whether it runs" in me.seen
    (frame,) = FrameReader().feed(liar.heard)
    assert frame.kind == 1
