"""Programs of Debian 13, for a machine whose own Debian is older: its packages in a tree of files.

The tree is made by mmdebstrap (half a minute) and cached; a server runs in it by chroot, with its
own directory mounted there. Nothing is written to the tree.

    with RabbitServer(directory / "rabbit", tree=newer_debian.build(RABBIT)) as rabbit: ...
"""

import os
import pwd
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.rig import NOBODY, Account
from tests.rig.debian_image import mirror
from tests.rig.guest_image import _digest, _run
from tests.rig.kept import drop_unused, made_once

SUITE = "trixie"
RABBIT = ("rabbitmq-server",)
HYPERVISOR = ("libvirt-daemon", "libvirt-daemon-driver-qemu", "qemu-system-x86")
LEFT_OUT = ("doc", "man", "locale")

# In a mount namespace of its own, so that nothing is left; and in place of itself, for the signals.
ENTER = """
set -e
mount -t proc proc "$0/proc"
mount --rbind /sys "$0/sys"
mount --rbind /dev "$0/dev"
mount -t tmpfs tmpfs "$0/tmp"
mkdir -p "$0$1"
mount --rbind "$1" "$0$1"
place=$2 user=$3
shift 3
exec chroot --userspec="$user" "$0" sh -c 'cd "$0" && exec "$@"' "$place" "$@"
"""


def missing_for_newer_debian() -> str | None:
    """None if `build` can work here."""
    if os.geteuid() != 0:
        return "mmdebstrap, mount and chroot: needs root"
    missing = [name for name in ("mmdebstrap", "unshare", "chroot") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}: run scripts/install-deps" if missing else None


def build(packages: Sequence[str]) -> Path:
    """A tree with these packages, made now or cached."""
    key = _digest(SUITE, *packages, *LEFT_OUT)
    with made_once(f"newer-{key}") as (made, part):
        if part is not None:
            _make(part / "tree", packages)
    drop_unused("newer-*")
    return made / "tree"


def inside(
    tree: Path, command: Sequence[str | Path], account: Account, *, shared: Path, cwd: Path
) -> list[str | Path]:
    """What root runs for a command to run in a tree, as an account, under its own process id.

    Args:
        shared: The one directory that is there under the same path; `cwd` is in it.
    """
    entry = pwd.getpwnam(account.user or NOBODY)
    user = f"{entry.pw_uid}:{entry.pw_gid}"
    return ["unshare", "--mount", "sh", "-c", ENTER, str(tree), shared, cwd, user, *command]


def _make(tree: Path, packages: Sequence[str]) -> None:
    options = ["--mode=root", "--variant=apt", "--format=directory", "--quiet"]
    options += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in LEFT_OUT]
    _run(["mmdebstrap", *options, f"--include={','.join(packages)}", SUITE, str(tree), mirror()])
