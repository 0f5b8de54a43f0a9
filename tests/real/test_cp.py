"""`vchan cp` into a real VM and out of it: while it moves, after the command was killed, onto disks
that take no more."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.rig import end_process, wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
WAIT_S = 300.0
RULES = b"""
[read]
allow = ["/tmp/**", "/small/**", "/read-only/**"]
[write]
allow = ["/tmp/**", "/small/**", "/read-only/**"]
"""
DISKS = """set -e
mkdir -p /small /read-only
mount -t tmpfs -o size=4M tmpfs /small
mount -t tmpfs tmpfs /read-only
echo old >/read-only/f
mount -o remount,ro /read-only
"""


@pytest.fixture(scope="module")
def copying(cloud: Cloud) -> Iterator[Vm]:
    """A VM whose files may be copied; both hosts allow it."""
    from tests.rig.compute import agent_service
    from tests.rig.guest_image import Service, build

    image = build({"app/standard.toml": RULES})
    services = (
        Service("vchan-guest", "python3 -m vchan.guest.daemon --forward service:files"),
        agent_service("files", "-m", "vchan.agents.standard.agent", "--config /app/standard.toml"),
    )
    for host in (cloud.a, cloud.b):
        host.heal()
        policy = host.daemon.policy
        policy.write_text(f"{policy.read_text()}forward any service:files allow\n")
        host.daemon.signal(signal.SIGHUP)
    staged = image.staged(cloud.directory)
    vm = cloud.boot("copying", services, wait=False, image=staged, memory_mib=512)
    vm.here.daemon.wait_ready(vm.name, topics=["vchan.standard"])
    with vm.shell() as shell:
        shell.check(DISKS)
    yield vm
    vm.discard()


@pytest.fixture
def here(tmp_path: Path, copying: Vm) -> Iterator[Path]:
    """A directory on this host; the guest's is emptied afterwards."""
    yield tmp_path
    with copying.shell() as shell:
        shell.check("rm -rf /tmp/*")


def fill(path: Path, size: int) -> str:
    """Its checksum."""
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def sum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Command:
    """`vchan cp`, at the host where the VM is; it knows the other's socket."""

    def __init__(self, vm: Vm, *words: str) -> None:
        also = ("--also", str(vm.there.daemon.socket))
        self.process = subprocess.Popen(
            vm.here.cli_words("cp", *also, *words),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str]:
        """Its status, and what it has said."""
        try:
            _, said = self.process.communicate(timeout=WAIT_S)
        finally:
            end_process(self.process, grace_s=1.0)
        return self.process.returncode, said.decode()


def cp(vm: Vm, *words: str) -> tuple[int, str]:
    return Command(vm, *words).end()


def in_guest(vm: Vm, script: str) -> str:
    with vm.shell() as shell:
        return shell.check(script, timeout_s=60.0).strip()


def wait_part(vm: Vm, command: Command, size: int, here: Path | None = None) -> None:
    """Until so much of the file `f` has come, to the guest's /tmp or to a directory here."""

    def has_come() -> bool:
        assert command.process.poll() is None, command.end()
        if here is None:
            found = in_guest(vm, "stat -c %s /tmp/.f.vchan-part || true")
            return found.isdecimal() and int(found) >= size
        part = here / ".f.vchan-part"
        return part.exists() and part.stat().st_size >= size

    wait_until(has_come, timeout_s=WAIT_S, interval_s=0.1, failure=lambda: f"no {size} bytes yet")


def migrate(vm: Vm) -> None:
    """And the stream goes on by the new host."""
    vm.migrate()
    vm.here.daemon.wait_ready(vm.name)
    vm.wait_status(lambda status: status["streams"]["streams"] > 0, "no stream came along")


def test_64_mib_each_way_through_live_migrations(copying: Vm, here: Path) -> None:
    expected = fill(here / "f", 64 * MIB)
    command = Command(copying, str(here / "f"), f"{copying.name}:/tmp/f")
    wait_part(copying, command, 2 * MIB)
    migrate(copying)
    assert command.end() == (0, "")
    assert in_guest(copying, "sha256sum /tmp/f").split()[0] == expected

    (here / "back").mkdir()
    command = Command(copying, f"{copying.name}:/tmp/f", str(here / "back"))
    wait_part(copying, command, 2 * MIB, here / "back")
    migrate(copying)
    assert command.end() == (0, "")
    assert sum_of(here / "back" / "f") == expected
    assert [each.name for each in (here / "back").iterdir()] == ["f"]
    assert in_guest(copying, "ls -A /tmp") == "f"


def test_after_the_command_was_killed_the_rest_comes(copying: Vm, here: Path) -> None:
    expected = fill(here / "f", 32 * MIB)
    words = (str(here / "f"), f"{copying.name}:/tmp/f")
    command = Command(copying, *words)
    wait_part(copying, command, 4 * MIB)
    command.process.kill()
    assert command.end()[0] == -signal.SIGKILL
    assert in_guest(copying, "ls -A /tmp") == ".f.vchan-part"
    part = in_guest(copying, "stat -c %i /tmp/.f.vchan-part")
    assert cp(copying, "--resume", *words) == (0, "")
    assert in_guest(copying, "stat -c %i /tmp/f") == part, "it was gone on with"
    assert in_guest(copying, "sha256sum /tmp/f").split()[0] == expected

    (here / "back").mkdir()
    words = (f"{copying.name}:/tmp/f", str(here / "back"))
    command = Command(copying, *words)
    wait_part(copying, command, 4 * MIB, here / "back")
    command.process.kill()
    assert command.end()[0] == -signal.SIGKILL
    inode = (here / "back" / ".f.vchan-part").stat().st_ino
    assert cp(copying, "--resume", *words) == (0, "")
    assert (here / "back" / "f").stat().st_ino == inode
    assert sum_of(here / "back" / "f") == expected


def test_a_full_disk_in_the_guest(copying: Vm, here: Path) -> None:
    (here / "t").mkdir()
    fill(here / "t" / "large", 8 * MIB)
    small = fill(here / "t" / "small", MIB)
    status, said = cp(copying, "-r", str(here / "t"), f"{copying.name}:/small/t")
    where = f"{copying.name}:/small/t/large"
    assert (status, said) == (1, f"vchan: {where}: No space left on device\n")
    assert in_guest(copying, "ls -A /small/t; sha256sum /small/t/small").split()[:2] == [
        "small",
        small,
    ]
    in_guest(copying, "rm -rf /small/t")


def test_a_full_disk_on_the_host(copying: Vm, here: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    in_guest(copying, "dd if=/dev/urandom of=/tmp/f bs=1M count=8 2>/dev/null")
    (here / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(here / "small")]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        status, said = cp(copying, f"{copying.name}:/tmp/f", str(here / "small"))
        assert (status, said) == (1, f"vchan: {here}/small/f: No space left on device\n")
        assert list((here / "small").iterdir()) == []
    finally:
        subprocess.run(["umount", str(here / "small")], check=True)


def test_a_disk_that_is_read_only(copying: Vm, here: Path) -> None:
    fill(here / "f", MIB)
    status, said = cp(copying, str(here / "f"), f"{copying.name}:/read-only/f")
    assert (status, said) == (1, f"vchan: {copying.name}:/read-only/f: Read-only file system\n")
    assert in_guest(copying, "cat /read-only/f") == "old"
    assert cp(copying, f"{copying.name}:/read-only/f", str(here / "back")) == (0, "")
    assert (here / "back").read_text() == "old\n"


def test_a_tree_with_all_sorts_of_things_in_it(copying: Vm, here: Path) -> None:
    in_guest(
        copying,
        "mkdir -p /tmp/t/a/b; cd /tmp/t; echo one >a/f; echo two >a/b/g; chmod 640 a/f;"
        " touch -d @1234567890 a/f; ln -s /etc/passwd link; mkfifo pipe; mknod null c 1 3",
    )
    status, said = cp(copying, "-rp", f"{copying.name}:/tmp/t", str(here))
    assert status == 1
    assert sorted(said.splitlines()) == [
        f"vchan: {here}/t/link: is a symbolic link",
        f"vchan: {here}/t/null: is a device",
        f"vchan: {here}/t/pipe: is a pipe",
    ]
    found = (here / "t" / "a" / "f").stat()
    assert (found.st_mode & 0o777, found.st_mtime) == (0o640, 1234567890)
    assert (here / "t" / "a" / "b" / "g").read_text() == "two\n"
    assert cp(copying, "-rpq", str(here / "t" / "a"), f"{copying.name}:/tmp/") == (0, "")
    listed = in_guest(copying, "cd /tmp/a; find . | sort; stat -c '%a %Y' f")
    assert listed.split() == [".", "./b", "./b/g", "./f", "640", "1234567890"]


def test_what_is_not_allowed(copying: Vm, here: Path) -> None:
    status, said = cp(copying, f"{copying.name}:/etc/vchan-init", str(here))
    rule = "is not allowed (/app/standard.toml: [read] allow)"
    assert (status, said) == (1, f"vchan: {copying.name}:/etc/vchan-init: {rule}\n")
    in_guest(copying, "ln -s /etc /tmp/out")
    status, said = cp(copying, f"{copying.name}:/tmp/out/vchan-init", str(here))
    assert status == 1 and "symbolic link" in said
    assert list(here.iterdir()) == []
