"""TCP ports for servers that must be told theirs beforehand.

To ask the kernel for a free one and let it go again is a race: until the server binds it, which can
take seconds, the kernel may give it to another test's probe, or to any connection that goes out.
So these are below the range that the kernel gives out, and each is claimed machine-wide, by a lock
on a file, until this process ends.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import Final

LOWEST: Final = 12_000
"""Below it are other programs' own: RabbitMQ's usual ones, QEMU's and libvirt's for migrations."""
_DIRECTORY: Final = Path(tempfile.gettempdir()) / f"vchan-ports-{os.getuid()}"
_RANGE_FILE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_HELD: Final[list[int]] = []  # descriptors of the locks: closed with the process


def claim_ports(count: int) -> list[int]:
    """So many loopback ports that are nobody else's while this process runs."""
    _DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    highest = int(_RANGE_FILE.read_text().split()[0])
    candidates = list(range(LOWEST, highest))
    random.SystemRandom().shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if _claim(port):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports from {LOWEST} to {highest}")


def _claim(port: int) -> bool:
    fd = os.open(_DIRECTORY / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except OSError:  # somebody's
        os.close(fd)
        return False
    _HELD.append(fd)
    return True
