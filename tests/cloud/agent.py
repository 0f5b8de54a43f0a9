"""In the guest: says on the console what it ran, so that it outlives this boot.

A line is `RAN KIND NUMBER MARK`: the mark is `again` if the request may have run before.
"""

import os

from vchan.client import Agent

CONSOLE = os.open("/dev/console", os.O_WRONLY)


class Counting:
    """What the load asks of it."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def _say(self, kind: str, number: int) -> None:
        mark = "again" if self._agent.context.get("vchan_redelivered") else "once"
        # At once, and whole: lines of the guest's init come between.
        os.write(CONSOLE, f"\nRAN {kind} {number} {mark} .\n".encode())

    def note(self, number: int) -> None:
        """For casts."""
        self._say("cast", number)

    def echo(self, number: int) -> int:
        """For calls."""
        self._say("call", number)
        return number


agent = Agent()
agent.serve("agent", Counting(agent))
agent.run()
