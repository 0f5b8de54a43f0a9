"""The agent of the counts: remembers everything it ran, in order."""

import os
import sys
import time
from pathlib import Path

from vchan.client import Agent
from vchan.programs.connection import AGENT_SOCKET


class Counting:
    """Senders number what they send; `executed` tells what ran.

    Args:
        journal: Where what ran is written, too, so that it outlives this process; empty: nowhere.
    """

    def __init__(self, journal: str = "") -> None:
        self._ran: dict[str, list[int]] = {}
        self._journal = None
        if journal:
            if Path(journal).exists():
                for line in Path(journal).read_text().splitlines():
                    sender, _, number = line.rpartition(" ")
                    self._ran.setdefault(sender, []).append(int(number))
            self._journal = Path(journal).open("a", buffering=1)  # noqa: SIM115 - until we end

    def note(self, sender: str, number: int) -> None:
        """For casts."""
        self._ran.setdefault(sender, []).append(number)
        if self._journal is not None:
            self._journal.write(f"{sender} {number}\n")

    def echo(self, sender: str, number: int, payload: str = "") -> list[object]:
        """For calls: who called, the number, and what came with it."""
        self.note(sender, number)
        return [sender, number, payload]

    def executed(self, sender: str, start: int, count: int) -> list[int]:
        """A part of what ran for a sender, in the order it ran."""
        return self._ran.get(sender, [])[start : start + count]

    def blob(self, size: int) -> str:
        """So many characters, after a moment: answers come one by one."""
        time.sleep(0.002)
        self.note("blob", size)
        return "x" * size

    def slow(self, sender: str, number: int, seconds: float) -> list[object]:
        """For calls that take a while."""
        self.note(sender, number)
        time.sleep(seconds)
        return [sender, number]

    def pid(self) -> int:
        """This process."""
        return os.getpid()


def main() -> None:
    """Serve TOPIC; with a journal if one is given.

    python3 counting_agent.py TOPIC [JOURNAL [SOCKET [WORKERS]]]
    """
    topic, journal, socket, workers = [*sys.argv[1:], *["", AGENT_SOCKET, "0"][len(sys.argv) - 2 :]]
    agent = Agent(socket, workers=int(workers))
    agent.serve(topic, Counting(journal))
    agent.run()


if __name__ == "__main__":
    main()
