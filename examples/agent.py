"""An agent: serves topic "agent" in a guest.

python3 agent.py [SOCKET]

On a laptop, without a VM: `vchan dev run agent.py`. test_agent.py tests it.
"""

import platform
import sys

from vchan.client import Agent


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
    agent = Agent(*sys.argv[1:2])
    agent.serve("agent", Endpoint())
    try:
        agent.run()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
