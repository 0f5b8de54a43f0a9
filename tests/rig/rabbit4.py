"""RabbitMQ 4, for a machine whose own Debian has RabbitMQ 3: trixie's package in a tree of files.

The tree is made by mmdebstrap (half a minute) and cached; a server runs in it by chroot, with its
own directory mounted there. Nothing is written to the tree.

    with RabbitServer(directory / "rabbit", tree=rabbit4.build()) as rabbit: ...
"""

import os
import shutil
import time
from pathlib import Path

from tests.rig.debian_image import mirror
from tests.rig.guest_image import (
    UNUSED_KEPT_S,
    _digest,
    _locked,
    _made_once,
    _run,
    cache_directory,
)

SUITE = "trixie"
PACKAGES = ("rabbitmq-server",)
LEFT_OUT = ("doc", "man", "locale")


def missing_for_rabbit4() -> str | None:
    """None if `build` can work here."""
    if os.geteuid() != 0:
        return "mmdebstrap, mount and chroot: needs root"
    missing = [name for name in ("mmdebstrap", "unshare", "chroot") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}: run scripts/install-deps" if missing else None


def build() -> Path:
    """The tree, made now or cached."""
    key = _digest(SUITE, *PACKAGES, *LEFT_OUT)
    with _locked(cache_directory()) as cache:
        made = cache / f"rabbit4-{key}"
        with _made_once(made) as part:
            if part is not None:
                _make(part / "tree")
        os.utime(made)
        for tree in cache.glob("rabbit4-*"):
            if time.time() - tree.stat().st_mtime > UNUSED_KEPT_S:
                shutil.rmtree(tree)
    return made / "tree"


def _make(tree: Path) -> None:
    options = ["--mode=root", "--variant=apt", "--format=directory", "--quiet"]
    options += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in LEFT_OUT]
    _run(["mmdebstrap", *options, f"--include={','.join(PACKAGES)}", SUITE, str(tree), mirror()])
