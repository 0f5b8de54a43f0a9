"""`vchan forward` into a real VM: while its channel is cut, daemons die, and it moves."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.rig import end_process, tail, wait_until
from tests.rig.forwarding import Transfer, connect
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).parents[2]
PORT = 8080
PATH = "/run/echo.sock"
MIB = 1 << 20
WAIT_S = 120.0


@pytest.fixture(scope="module")
def echoing(cloud: Cloud) -> Iterator[Vm]:
    """A VM that may be connected to; both hosts allow it."""
    from tests.rig.compute import agent_service
    from tests.rig.guest_image import Service, build

    image = build({"app/echo.py": ROOT / "tests" / "rig" / "echo_server.py"})
    daemon = f"python3 -m vchan.guest.daemon --forward tcp:{PORT},unix:{PATH}"
    services = (
        Service("vchan-guest", daemon),
        agent_service("echo", "/app/echo.py", str(PORT), PATH),
    )
    for host in (cloud.a, cloud.b):
        host.heal()
        host.daemon.policy.write_text(
            f"{host.daemon.policy.read_text()}forward any tcp:{PORT} allow\n"
            f"forward any unix:{PATH} allow\n"
        )
        host.daemon.signal(signal.SIGHUP)
    vm = cloud.boot("echoing", services, wait=False, image=image.staged(cloud.directory))
    vm.here.daemon.wait_ready(vm.name)
    yield vm
    vm.discard()


class Forward:
    """The command, at the host where the VM is; it knows the other's socket."""

    def __init__(self, vm: Vm, what: str, *words: str) -> None:
        self.log = vm.cloud.directory / "forward.log"
        self._log = self.log.open("wb")
        self._process = subprocess.Popen(
            vm.here.cli_words("forward", vm.name, what, *words),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        assert line, tail(self.log)
        self.where = line.partition(" -> ")[0]

    def end(self) -> tuple[int, str]:
        """Ctrl-C: its exit status, and what it has said."""
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGINT)
        status = self._process.wait(30)
        return status, self.log.read_text()

    def close(self) -> None:
        assert self._process.stdout is not None
        end_process(self._process, grace_s=1.0)
        self._process.stdout.close()
        self._log.close()


@pytest.fixture
def forward(echoing: Vm) -> Iterator[Callable[[str], Forward]]:
    made: list[Forward] = []

    def start(what: str) -> Forward:
        made.append(Forward(echoing, what, "--also", str(echoing.there.daemon.socket)))
        return made[-1]

    yield start
    for each in made:
        each.close()


def wait_here(vm: Vm) -> None:
    vm.here.daemon.wait_ready(vm.name)


def test_it_goes_on_through_migrations(echoing: Vm, forward: Callable[[str], Forward]) -> None:
    """Both ends live: not a byte is lost or comes twice, while the VM moves three times."""
    made = forward(f"0:{PORT}")
    transfer = Transfer(made.where, 4096 * MIB)  # more than there is time for
    idle = connect(made.where)
    idle.sendall(b"before")
    assert idle.recv(100) == b"before"
    for _ in range(3):
        transfer.wait_for(transfer.received + 4 * MIB)
        echoing.migrate()
        wait_here(echoing)
    transfer.wait_for(transfer.received + 4 * MIB)
    transfer.end_early()
    idle.sendall(b"after")
    assert idle.recv(100) == b"after"
    idle.close()
    assert transfer.finish() == []
    assert made.end() == (130, "")


def test_it_goes_on_while_daemons_die(echoing: Vm, forward: Callable[[str], Forward]) -> None:
    made = forward(f"0:{PATH}")
    transfer = Transfer(made.where, 4096 * MIB)
    for _ in range(2):
        transfer.wait_for(transfer.received + 4 * MIB)
        echoing.here.daemon.restart()
        wait_here(echoing)
    transfer.wait_for(transfer.received + 4 * MIB)
    transfer.end_early()
    assert transfer.finish() == []
    assert made.end() == (130, "")


def test_what_no_daemon_has_is_reset(echoing: Vm) -> None:
    """Where the other host's socket is not known, a migration is an end with its reason."""
    made = Forward(echoing, f"0:{PORT}", "--look", "3")
    try:
        transfer = Transfer(made.where, 256 * MIB)
        transfer.wait_for(MIB)
        echoing.migrate()
        problems = transfer.finish()
        assert problems and all("reset" in each or "Broken pipe" in each for each in problems)
        wait_until(
            lambda: "was not found again" in made.log.read_text(),
            timeout_s=WAIT_S,
            interval_s=0.1,
            failure=lambda: tail(made.log),
        )
    finally:
        made.close()
