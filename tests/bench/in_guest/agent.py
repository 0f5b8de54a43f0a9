"""The agent that the benchmark calls: serves topic "bench".

python3 agent.py [SOCKET]
"""

import sys

from vchan.client import Agent, quick, raw
from vchan.programs.connection import AGENT_SOCKET


class Endpoint:
    """What is measured."""

    def __init__(self) -> None:
        self._noted = 0

    def ping(self, **values: str) -> dict[str, str]:
        """Give back what was given: as the daemon's own ping does."""
        return values

    @quick
    def ping_quickly(self, **values: str) -> dict[str, str]:
        """The same, declared to be quick."""
        return values

    def take(self, data: str) -> int:
        """Take a large request."""
        return len(data)

    def give(self, size: int) -> str:
        """Give a large answer."""
        return "x" * size

    @raw
    def take_raw(self, data: bytes) -> bytes:
        """Take a large request of bytes."""
        return b"%d" % len(data)

    @raw
    def give_raw(self, data: bytes, size: int) -> bytes:
        """Give a large answer of bytes."""
        return bytes(size)

    def note(self, **values: str) -> None:
        """For casts."""
        self._noted += 1

    def count(self) -> int:
        """How many casts came."""
        return self._noted


def main() -> None:
    """Serve until killed."""
    agent = Agent(sys.argv[1] if len(sys.argv) > 1 else AGENT_SOCKET)
    agent.serve("bench", Endpoint())
    agent.run()


if __name__ == "__main__":
    main()
