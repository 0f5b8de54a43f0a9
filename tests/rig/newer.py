"""Ends of a later release, as far as that can be known now: for tests of rolling upgrades.

They offer a session version that nobody speaks yet, and their greetings have fields at the end that
nobody knows. `python -m tests.rig.newer OLDEST NEWEST [vchan-guest's options]` is such a daemon.
"""

import sys
from collections.abc import Callable

from vchan import session
from vchan.session.handshake import Handshake
from vchan.wire.frames import Greeting

UNKNOWN_CAPABILITY = 1 << 31
UNKNOWN_FIELDS = b"\x07unknown\x00\x00\x00\x2a"


class NewerGreeting(Greeting):
    """A greeting with more in it."""

    def encode(self) -> bytes:
        """What goes over the wire."""
        known = self._replace(capabilities=self.capabilities | UNKNOWN_CAPABILITY)
        return Greeting.encode(known) + UNKNOWN_FIELDS


class NewerHandshake(Handshake):
    """A handshake of a later release."""

    def _greeting(self, echo: bytes) -> Greeting:
        return NewerGreeting._make(super()._greeting(echo))


class NewerSession(session.Session):
    """A session of a later release."""

    versions = (1, 2)

    def __init__(self, config: session.Config, entropy: Callable[[int], bytes]) -> None:
        oldest, newest = self.versions
        super().__init__(config._replace(version_min=oldest, version_max=newest), entropy)
        self._handshake = NewerHandshake(self.config, entropy, self._sender, self._receiver)


def session_type(oldest: int, newest: int) -> type[session.Session]:
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
