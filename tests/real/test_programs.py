"""`vchan exec` and `vchan shell` in a real VM: while it moves, while daemons die, come back to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.rig import tail, wait_until
from tests.rig.programs import Operator
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).parents[2]
WAIT_S = 240.0
BLOCK_BYTES = 16 * 1024
READY = b"# "
STANDARD = b"""\
[exec]
allow = ["/bin/**", "/usr/bin/**"]
time_s_max = 3600
[shell]
command = ["/bin/sh"]
"""


@pytest.fixture(scope="module")
def vm(cloud: Cloud) -> Iterator[Vm]:
    """A VM with a standard agent that has a shell; both hosts allow it."""
    from tests.rig.guest_image import Service, build

    image = build({"app/standard.toml": STANDARD})
    services = (
        Service("vchan-guest", "python3 -m vchan.guest.daemon --forward service:*"),
        Service("agent", "python3 -m vchan.agents.standard.agent --config /app/standard.toml"),
    )
    for host in (cloud.a, cloud.b):
        host.heal()
        policy = host.daemon.policy
        policy.write_text(f"{policy.read_text()}forward any service:* allow\n")
        host.daemon.signal(signal.SIGHUP)
    made = cloud.boot("programs", services, wait=False, image=image.staged(cloud.directory))
    made.here.daemon.wait_ready(made.name)
    wait_until(
        lambda: run(made, "exec", "--list").returncode == 0,
        timeout_s=WAIT_S,
        interval_s=0.5,
        failure=lambda: str(run(made, "exec", "--list")),
    )
    yield made
    made.discard()


def words(vm: Vm, command: str, *more: str) -> list[str]:
    """The command at the host where the VM is; it knows the other's socket."""
    also = ("--also", str(vm.there.daemon.socket))
    return vm.here.cli_words(command, vm.name, *also, *more)


def run(vm: Vm, command: str, *more: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        words(vm, command, *more),
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        timeout=WAIT_S,
        check=False,
    )


def migrate(vm: Vm) -> None:
    vm.migrate()
    vm.here.daemon.wait_ready(vm.name)


class Echo:
    """`vchan exec VM -- /bin/cat`, given random bytes, and what comes back compared."""

    def __init__(self, vm: Vm) -> None:
        self.log = vm.cloud.directory / "exec.log"
        with self.log.open("wb") as log:
            pipe = subprocess.PIPE
            command = words(vm, "exec", "--", "/bin/cat")
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=log)
        self.received = 0
        self._is_enough = False
        self._sent = hashlib.sha256()
        self._got = hashlib.sha256()
        self._threads = [threading.Thread(target=work) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            while not self._is_enough:
                block = os.urandom(BLOCK_BYTES)
                self.process.stdin.write(block)
                self._sent.update(block)
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def _receive(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            self._got.update(data)
            self.received += len(data)

    def wait_for(self, received: int) -> None:
        wait_until(
            lambda: self.received >= received or self.process.poll() is not None,
            timeout_s=WAIT_S,
            interval_s=0.02,
            failure=lambda: f"stands at {self.received}: {tail(self.log)}",
        )
        assert self.process.poll() is None, tail(self.log)

    def finish(self) -> tuple[int, bool]:
        """Its status, and whether every byte came back once and in order."""
        self._is_enough = True
        status = self.process.wait(WAIT_S)
        for thread in self._threads:
            thread.join(WAIT_S)
        return status, self._got.digest() == self._sent.digest()

    def close(self) -> None:
        self._is_enough = True
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(WAIT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not written, is not
                pipe.close()


def test_a_programs_bytes_pass_through_migrations(vm: Vm) -> None:
    echo = Echo(vm)
    try:
        for _ in range(3):
            echo.wait_for(echo.received + (1 << 20))
            migrate(vm)
        echo.wait_for(echo.received + (1 << 20))
        assert echo.finish() == (0, True), tail(echo.log)
    finally:
        echo.close()


def test_a_programs_bytes_pass_while_the_hosts_daemon_dies(vm: Vm) -> None:
    echo = Echo(vm)
    try:
        for _ in range(2):
            echo.wait_for(echo.received + (1 << 20))
            vm.here.daemon.restart()
            vm.here.daemon.wait_ready(vm.name)
        assert echo.finish() == (0, True), tail(echo.log)
    finally:
        echo.close()


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_the_status_is_the_programs(vm: Vm, script: str, status: int) -> None:
    done = run(vm, "exec", "--", "/bin/sh", "-c", f"echo out; echo err >&2; {script}")
    assert (done.returncode, done.stdout, done.stderr) == (status, b"out\n", b"err\n")


def test_a_shell_moves_with_its_vm_and_is_come_back_to(vm: Vm) -> None:
    """Typed into while it moves, left, moved again, and gone on with from the other host."""
    with Operator(words(vm, "shell")) as me:
        me.wait_seen(READY)
        me.press(b"stty -echo; mine=trea''sure; tty\r")
        me.wait_seen(b"/dev/pts/")
        for number in range(2):
            moving = threading.Thread(target=migrate, args=(vm,))
            moving.start()
            me.press(b"echo moved %d $mine\r" % number)
            moving.join(WAIT_S)
            me.wait_seen(b"moved %d treasure" % number)
        me.resize(50, 132)
        me.press(b"stty size\r")
        me.wait_seen(b"50 132")
        assert me.is_raw
        me.press(b"~.")
        assert me.wait() == 0
        assert me.is_restored and b"--attach" in me.seen
    migrate(vm)
    with Operator(words(vm, "shell", "--attach")) as me:
        me.press(b"echo back with $mine; exit 6\r")
        me.wait_seen(b"back with treasure")
        assert me.wait() == 6 and me.is_restored


def test_a_shell_outlives_an_operator_who_is_killed_and_a_migration(vm: Vm) -> None:
    with Operator(words(vm, "shell")) as me:
        me.wait_seen(READY)
        me.press(b"mine=trea''sure; stty -echo; echo re''ady\r")
        me.wait_seen(b"ready")
        me.process.kill()
    migrate(vm)
    listed = run(vm, "shell", "--list")
    key = listed.stdout.split(b"\n")[1].split()[0].decode()
    with Operator(words(vm, "shell", "--attach", key)) as me:
        me.press(b"echo back with $mine; exit 5\r")
        me.wait_seen(b"back with treasure")
        assert me.wait() == 5 and me.is_restored
