"""A guest's daemon of a release before raw bodies, as far as its peers can see: its greetings say
nothing of what it can do, and its frames are small.

    python -m tests.rig.older [vchan-guest's options]
"""

from collections.abc import Callable

from vchan import session
from vchan.wire.frames import FRAME_BYTES_MAX


def older_session(config: session.Config, entropy: Callable[[int], bytes]) -> session.Session:
    """A session of such a release."""
    older = config._replace(features=0, frame_bytes_max=FRAME_BYTES_MAX)
    return session.Session(older, entropy)


def main() -> None:
    """The command."""
    from vchan.guest import daemon, port
    from vchan.io import local_socket

    for module in (local_socket, port):
        module.Session = older_session  # type: ignore[attr-defined]
    daemon.main()


if __name__ == "__main__":
    main()
