"""A byte stream that is never idle, from a process of its own.

    python -m tests.bench.stream_load ADDRESS:PORT take|give

Until SIGTERM; then it prints how many bytes have passed.
"""

import signal
import sys

from tests.rig.forwarding import connect

BLOCK_BYTES = 65536
ENDLESS = 1 << 60


class Enough(Exception):
    """SIGTERM has come."""


def _enough(*_: object) -> None:
    raise Enough


def main() -> None:
    """The command."""
    where, verb = sys.argv[1:]
    passed, is_told = 0, False
    block = bytes(BLOCK_BYTES)
    signal.signal(signal.SIGTERM, _enough)
    with connect(where) as channel:
        try:
            channel.sendall(b"%s %d\n" % (verb.encode(), ENDLESS))
            while True:
                moved = channel.send(block) if verb == "take" else len(channel.recv(BLOCK_BYTES))
                if not moved:
                    raise SystemExit(f"the stream was closed after {passed} bytes")
                passed += moved
                if not is_told:
                    is_told = True
                    print("moving", flush=True)
        except Enough:
            print(passed, flush=True)


if __name__ == "__main__":
    main()
