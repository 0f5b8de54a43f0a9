"""An agent: serves topic "agent" in a guest.

python3 agent.py [SOCKET]
"""

import platform
import sys

from vchan.client import AGENT_SOCKET, Agent


class Endpoint:
    """Every public method can be called."""

    def echo(self, **values: object) -> dict[str, object]:
        """Give back what was given."""
        return values

    def note(self, text: str) -> None:
        """For casts: print it."""
        print(text, flush=True)

    def hostname(self) -> str:
        """This guest's name."""
        return platform.node()

    def fail(self, text: str = "as you wish") -> None:
        """Raise, to show how a caller sees it."""
        raise ValueError(text)


def main() -> None:
    """Serve until killed."""
    agent = Agent(sys.argv[1] if len(sys.argv) > 1 else AGENT_SOCKET, log=print)
    agent.serve("agent", Endpoint())
    try:
        agent.run()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
