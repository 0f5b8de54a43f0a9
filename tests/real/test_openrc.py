"""The guest's daemon under OpenRC, in a tree without systemd and udev.

Debian's OpenRC and glibc: Alpine's own packages and musl are not to be had here.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import debian_image, wait_until
from tests.rig.debian_image import chroot_command, in_chroot
from tests.rig.packages import ROOT, package

MISSING = debian_image.missing_for_debian()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
]

SCRIPT = ROOT / "packaging" / "guest" / "vchan-guest.openrc"
WAIT_S = 120.0
CONFIGURATION = """
vchan_guest="/usr/bin/python3 -I /opt/vchan/vchan-guest.pyz"
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenRC, Python, and the daemon in one file."""
    directory = tmp_path_factory.mktemp("openrc")
    tree = directory / "tree"
    debian_image.bootstrap(tree, ("openrc", "python3"))
    for name in ("opt/vchan", "run/openrc", "etc/conf.d"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    zipapp = package(directory / "dist").zipapp
    (tree / "opt/vchan/vchan-guest.pyz").write_bytes(zipapp.read_bytes())
    script = tree / "etc/init.d/vchan-guest"
    script.write_bytes(SCRIPT.read_bytes())
    script.chmod(0o755)
    (tree / "etc/conf.d/vchan-guest").write_text(CONFIGURATION)
    # As after a boot: else OpenRC says that it did not boot this system, and does nothing.
    for name in ("exclusive", "daemons", "options", "starting", "started", "stopping"):
        (tree / "run/openrc" / name).mkdir()
    (tree / "run/openrc/softlevel").write_text("default\n")
    return tree


@pytest.fixture
def shell(tree: Path) -> Iterator[subprocess.Popen[str]]:
    """A shell in the tree with processes of its own, which end with it."""
    inside = chroot_command(tree)
    words = ["unshare", "--pid", "--fork", "--kill-child", *inside, "sh"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def say(shell: subprocess.Popen[str], command: str) -> tuple[int, str]:
    """(exit status, output) of a command."""
    assert shell.stdin is not None and shell.stdout is not None
    shell.stdin.write(f"{command} </dev/null; status=$?; echo; echo end $status\n")
    shell.stdin.flush()
    lines: list[str] = []
    for line in shell.stdout:
        if line.startswith("end "):
            return int(line.split()[1]), "".join(lines).rstrip("\n")
        lines.append(line)
    raise AssertionError(f"the shell ended: {''.join(lines)}")


def until(shell: subprocess.Popen[str], condition: str) -> None:
    def holds() -> bool:
        return say(shell, f"({condition}) && echo holds")[1].endswith("holds")

    log = "cat /var/log/vchan-guest.log /var/log/rc.log 2>&1; ps ax 2>&1"
    wait_until(
        holds,
        timeout_s=WAIT_S,
        interval_s=0.3,
        failure=lambda: f"{condition}: {say(shell, log)[1]}",
    )


def test_it_starts_is_started_again_reloads_and_stops(
    tree: Path, shell: subprocess.Popen[str]
) -> None:
    assert not (tree / "run/systemd").exists() and not (tree / "usr/bin/udevadm").exists()
    said = say(shell, "rc-service vchan-guest start")[1]
    until(shell, "test -S /run/vchan/agent.sock")
    assert (tree / "run/vchan").stat().st_mode & 0o7777 == 0o2755, said
    group = in_chroot(tree, "getent", "group", "vchan").output.split(":")[2]
    assert (tree / "run/vchan/agent.sock").stat().st_gid == int(group)
    until(shell, "rc-service vchan-guest status | grep -q started")
    until(shell, "grep -q org.openstack.vchan.0 /var/log/vchan-guest.log")

    say(shell, "rm /run/vchan/agent.sock; pidof -s python3 >/run/first; kill -9 $(cat /run/first)")
    until(shell, "test -S /run/vchan/agent.sock && test $(pidof -s python3) != $(cat /run/first)")

    assert "rror" not in say(shell, "rc-service vchan-guest reload")[1]
    until(shell, "rc-service vchan-guest status | grep -q started")
    say(shell, "rc-service vchan-guest stop")
    until(shell, "! pidof python3 && ! test -S /run/vchan/agent.sock")


def test_the_script_is_sh() -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=sh", "--exclude=SC2034,SC2154", SCRIPT],  # OpenRC reads and sets
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
