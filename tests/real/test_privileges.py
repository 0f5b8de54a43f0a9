"""The daemons without root, as different users, on real file modes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.rig import rig_directory, wait_until
from tests.rig.requirements import missing_for_libvirt
from vchan.io.streams import listen_unix

if TYPE_CHECKING:  # it needs libvirt-python, which may be what is missing
    from tests.rig.undriven import UndrivenHost

MISSING = missing_for_libvirt()
if os.geteuid() != 0:
    MISSING = "only root can be other users: run as root"
elif shutil.which("setpriv") is None:
    MISSING = "no setpriv (util-linux)"
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 90.0

# Users and groups that nobody has: numbers are all the kernel knows.
QEMU_USER, QEMU_GROUP, KVM = 61001, 61001, 61002
DAEMON, DAEMON_GROUP = 61003, 61003
OPERATOR, OPERATORS = 61004, 61005
STRANGER = 61006


def become(user: int, group: int, *groups: int) -> list[str]:
    """What makes the command behind it run as this user."""
    further = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return ["setpriv", f"--reuid={user}", f"--regid={group}", further]


class Layout(NamedTuple):
    """The directories of libvirt's channel sockets, one in the other, with groups and modes.

    Attributes:
        group: The sockets' own.
    """

    directories: tuple[tuple[str, int, int], ...]
    group: int

    def made(self, directory: Path) -> Path:
        """The directories, here; returns where QEMU's socket is to be."""
        path = directory
        for name, group, mode in self.directories:
            path = path / name
            path.mkdir()
            os.chown(path, QEMU_USER, group)
            path.chmod(mode)
        return path / "org.openstack.vchan.0"


DEBIAN_12 = Layout(
    (
        # /var/lib/libvirt/qemu
        ("qemu", QEMU_GROUP, 0o750),
        ("channel", KVM, 0o755),
        ("target", KVM, 0o755),
        ("domain-1-vm", KVM, 0o750),
    ),
    KVM,
)
DEBIAN_13 = Layout(
    (
        # /run/libvirt/qemu
        ("qemu", QEMU_GROUP, 0o755),
        ("channel", QEMU_GROUP, 0o755),
        ("1-vm", QEMU_GROUP, 0o750),
    ),
    QEMU_GROUP,
)


@contextlib.contextmanager
def listening(path: Path, group: int = KVM) -> Iterator[None]:
    """A channel's socket, as libvirt makes it: 0775."""
    server = listen_unix(str(path), 0o775)
    os.chown(path, QEMU_USER, group)
    try:
        yield
    finally:
        server.close()


@pytest.mark.parametrize(
    ("layout", "groups", "says"),
    [
        (DEBIAN_12, (), "PortDenied"),
        (DEBIAN_12, (KVM,), "PortDenied"),
        (DEBIAN_12, (QEMU_GROUP,), "PortDenied"),
        (DEBIAN_12, (KVM, QEMU_GROUP), "connected"),
        (DEBIAN_13, (), "PortDenied"),
        (DEBIAN_13, (KVM,), "PortDenied"),
        (DEBIAN_13, (QEMU_GROUP,), "connected"),
        (DEBIAN_13, (KVM, QEMU_GROUP), "connected"),
    ],
)
def test_which_of_qemus_groups_a_channels_socket_takes(
    layout: Layout, groups: tuple[int, ...], says: str
) -> None:
    with rig_directory() as directory:
        path = layout.made(directory)
        with listening(path, layout.group):
            program = (
                "import sys; from vchan.io.streams import connect_unix\n"
                "try: connect_unix(sys.argv[1]); print('connected')\n"
                "except Exception as error: print(type(error).__name__)"
            )
            done = subprocess.run(
                [*become(DAEMON, DAEMON_GROUP, *groups), sys.executable, "-c", program, str(path)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
    assert done.stdout.strip() == says, done.stderr


# --- a daemon of its own user -------------------------------------------------------------------


@contextlib.contextmanager
def unprivileged_host(
    directory: Path, groups: Sequence[int], *options: str
) -> Iterator[UndrivenHost]:
    from tests.rig.undriven import UndrivenHost

    host = UndrivenHost(directory / "host", ["one"], options=options)
    vm = host.vms["one"]
    channel = DEBIAN_12.made(directory)
    node = directory / "host" / "node.xml"
    node.write_text(node.read_text().replace(str(vm.path), str(channel)))
    vm.path = channel
    for path in (directory / "host", *(directory / "host").rglob("*")):
        os.chown(path, DAEMON, DAEMON_GROUP)
    (directory / "host").chmod(0o755)
    host.daemon.program = (*become(DAEMON, DAEMON_GROUP, *groups), *host.daemon.program)
    with host:
        yield host


def test_a_daemon_without_root_serves_its_vms() -> None:
    with rig_directory() as directory:
        path = directory / "qemu" / "channel" / "target" / "domain-1-vm" / "org.openstack.vchan.0"
        with unprivileged_host(directory, (KVM, QEMU_GROUP)) as host, listening(path):
            status = Path(f"/proc/{host.daemon.pid}/status").read_text()
            assert f"Uid:\t{DAEMON}\t{DAEMON}\t{DAEMON}" in status
            assert "CapEff:\t0000000000000000" in status
            wait_until(
                lambda: host.daemon.call("list")[0]["channel"] == "waiting",
                timeout_s=WAIT_S,
                interval_s=0.1,
                failure=lambda: f"{host.daemon.call('list')}",
            )
            # Its own: nobody else's to write, and not to be listed by everybody.
            socket, log = host.daemon.socket.stat(), host.audit_log.stat()
            assert (socket.st_uid, socket.st_gid) == (DAEMON, DAEMON_GROUP)
            assert socket.st_mode & 0o777 == 0o660
            assert (log.st_uid, log.st_mode & 0o777) == (DAEMON, 0o640)


def test_a_daemon_in_one_group_alone_says_which_socket_it_may_not_open() -> None:
    with rig_directory() as directory:
        path = directory / "qemu" / "channel" / "target" / "domain-1-vm" / "org.openstack.vchan.0"
        with unprivileged_host(directory, (KVM,)) as host, listening(path):
            wait_until(
                lambda: (
                    f"{path}: " in host.daemon.log.read_text()
                    and "may not open it" in host.daemon.log.read_text()
                ),
                timeout_s=WAIT_S,
                interval_s=0.1,
                failure=lambda: host.daemon.log.read_text(),
            )


# --- who may do what at the host's socket -------------------------------------------------------


def cli(host: UndrivenHost, who: Sequence[str], *arguments: str) -> str:
    """What `vchan` says, run by that user."""
    done = subprocess.run(
        [*who, sys.executable, "-m", "vchan.cli", "--socket", str(host.daemon.socket), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_who_may_call_and_who_may_administer() -> None:
    operator = become(OPERATOR, OPERATOR, OPERATORS, DAEMON_GROUP)
    member = become(STRANGER, STRANGER, DAEMON_GROUP)
    stranger = become(STRANGER, STRANGER)
    with (
        rig_directory() as directory,
        unprivileged_host(directory, (), f"admin_groups = {OPERATORS}") as host,
    ):
        uuid = host.vms["one"].uuid
        # The socket's mode: its group may, others may not.
        assert uuid in cli(host, member, "list")
        assert f"uid {STRANGER} may not open it" in cli(host, stranger, "list")
        # Administration: the configured group, root, the daemon's own user.
        for command in ("attach", "detach", "release"):
            refusal = cli(host, member, command, "one")
            assert f"uid {STRANGER} may not {command}" in refusal, refusal
            assert "admin_groups" in refusal
        for who in (operator, become(DAEMON, DAEMON_GROUP), []):
            answer = cli(host, who, "release", "one")
            assert "not in quarantine" in answer or "no live channel" in answer, answer
        assert "refused attach to pid" not in cli(host, member, "list")


def test_client_groups_are_asked_before_anything_is_said() -> None:
    client = become(OPERATOR, OPERATOR, OPERATORS)
    other = become(STRANGER, STRANGER)
    options = ("socket_mode = 0666", f"client_groups = {OPERATORS}")
    with rig_directory() as directory, unprivileged_host(directory, (), *options) as host:
        assert host.vms["one"].uuid in cli(host, client, "list")
        assert host.vms["one"].uuid not in cli(host, other, "list")
        assert f"uid {STRANGER} may not connect here" in host.daemon.log.read_text()
        assert host.vms["one"].uuid in cli(host, [], "list")


def test_who_may_attach_in_a_guest() -> None:
    from tests.unit.cable import Cable

    with rig_directory() as directory, Cable(directory) as cable:
        socket = directory / "agent.sock"
        command = [sys.executable, "-m", "vchan.guest.daemon", "--port", f"unix:{cable.guest}"]
        command += ["--socket", str(socket), "--socket-mode", "0666"]
        command += ["--agent-users", str(OPERATOR), "--agent-groups", str(OPERATORS)]
        log = directory / "guest.log"
        with log.open("ab") as output:
            daemon = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            wait_until(
                socket.exists, timeout_s=WAIT_S, interval_s=0.05, failure=lambda: "no socket"
            )
            assert attaches(socket, become(OPERATOR, 0))
            assert attaches(socket, become(STRANGER, STRANGER, OPERATORS))
            assert not attaches(socket, become(STRANGER, STRANGER))
            assert f"uid {STRANGER} may not connect here" in log.read_text()
        finally:
            daemon.kill()
            daemon.wait()


def attaches(socket: Path, who: Sequence[str]) -> bool:
    """Whether the guest's daemon opens a session with a program of that user's."""
    program = (
        "import sys; from vchan.client import Client\n"
        "sys.exit(not Client(sys.argv[1])._ready.wait(5))"
    )
    done = subprocess.run(
        [*who, sys.executable, "-c", program, str(socket)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0
