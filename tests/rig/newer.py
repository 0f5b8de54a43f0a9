"""Ends of a later release, as far as that can be known now: for tests of rolling upgrades.

They offer a session version that nobody speaks yet, and their greetings have fields at the end that
nobody knows. `python -m tests.rig.newer OLDEST NEWEST [vchan-guest's options]` is such a daemon.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.rig.sources import from_source
from vchan.session import Config
from vchan.wire.frames import Greeting

if TYPE_CHECKING:
    from vchan.session import Session
    from vchan.session.handshake import Handshake
else:
    Handshake = from_source("vchan.session.handshake").Handshake
    Session = from_source("vchan.session.session").Session

UNKNOWN_FIELDS = b"\x07unknown\x00\x00\x00\x2a"


class NewerGreeting(Greeting):
    """A greeting with more in it."""

    def encode(self) -> bytes:
        """What goes over the wire."""
        return super().encode() + (b"" if self.features else bytes(4)) + UNKNOWN_FIELDS


class NewerHandshake(Handshake):
    """A handshake of a later release."""

    def _greeting(self, echo: bytes) -> Greeting:
        return NewerGreeting._make(super()._greeting(echo))


class NewerSession(Session):
    """A session of a later release."""

    versions = (1, 2)

    def __init__(self, config: Config, entropy: Callable[[int], bytes]) -> None:
        oldest, newest = self.versions
        super().__init__(config._replace(version_min=oldest, version_max=newest), entropy)
        self._handshake = NewerHandshake(self.config, entropy, self._sender, self._receiver)


def session_type(oldest: int, newest: int) -> type[Session]:
    """The sessions of a release that speaks these versions."""
    name = f"Session{oldest}To{newest}"
    return type(name, (NewerSession,), {"versions": (oldest, newest)})


def main() -> None:
    """The command."""
    oldest, newest = (int(word) for word in sys.argv[1:3])
    del sys.argv[1:3]
    kind = session_type(oldest, newest)
    from vchan.guest import daemon, port
    from vchan.io import local_socket

    for module in (local_socket, port):
        module.Session = kind  # type: ignore[attr-defined]
    daemon.main()


if __name__ == "__main__":
    main()
