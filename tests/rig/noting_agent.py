"""An agent that writes down what it runs: python -m tests.rig.noting_agent SOCKET FILE TOPIC

A line for each run: its name, and " marked" if its method sees that it may be the second time.
"""

import sys
import time
from pathlib import Path

from vchan.client import Agent

SOCKET, FILE, TOPIC = sys.argv[1:]


class Endpoint:
    """What can be asked."""

    def note(self, name: str, takes_s: float = 0.0) -> str:
        """Write it down, and take so long."""
        mark = " marked" if agent.context.get("vchan_redelivered") else ""
        with Path(FILE).open("a") as file:
            file.write(f"{name}{mark}\n")
        time.sleep(takes_s)
        return name


agent = Agent(SOCKET)
agent.serve(TOPIC, Endpoint())
agent.run()
