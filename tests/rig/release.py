"""What differs between the Debian releases that the tests run on, in the guests that they boot."""

from __future__ import annotations

import platform
from typing import Final, NamedTuple


class Release(NamedTuple):
    """A Debian release.

    Attributes:
        codename: As apt knows it.
        python: The version of its Python.
        libraries: The packages of a guest whose names the release decides.
        peer_libraries: Likewise, of qemu-guest-agent.
    """

    codename: str
    python: str
    libraries: tuple[str, ...]
    peer_libraries: tuple[str, ...]


BOOKWORM: Final = Release("bookworm", "3.11", ("libssl3",), ("libglib2.0-0",))
TRIXIE: Final = Release(
    "trixie", "3.13", ("libssl3t64", "libzstd1"), ("libatomic1", "libcap2", "libglib2.0-0t64")
)
RELEASES: Final = {release.codename: release for release in (BOOKWORM, TRIXIE)}


def of_this_machine() -> Release:
    """Its own release; where that is none of them, the oldest: what needs its packages says so."""
    try:
        name = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        name = ""
    return RELEASES.get(name, BOOKWORM)
