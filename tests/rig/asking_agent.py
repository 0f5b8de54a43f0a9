"""An agent that asks the control side: numbered casts and calls, until told to stop.

    python3 asking_agent.py TOPIC [SOCKET]

Serves TOPIC with start, stop and report. Runs in guests: standard library and vchan only.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

from vchan.client import Agent, Client
from vchan.errors import VchanError
from vchan.programs.connection import AGENT_SOCKET

CALL_TIMEOUT_S = 90.0


class Asking:
    """Threads that ask; `report` tells what came of it."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._client: Client | None = None
        self._counts: dict[str, Any] = {}
        self._errors: list[str] = []
        self._answer: list[Any] | None = None

    def start(self, target: str, name: str, pause: float = 0.02, payload: int = 0) -> None:
        """Begin: casts of NAMEcaster and calls of NAMEcaller, to this topic."""
        self._stop.clear()
        self._counts = {"casts_sent": 0, "calls_sent": 0, "calls_answered": 0, "wrong_answers": 0}
        self._errors = []
        client = self._client = Client(self._socket)
        self._threads = []
        for sender, ask in ((f"{name}caster", self._cast), (f"{name}caller", self._call)):
            args = (ask, client, target, sender, "x" * payload, pause)
            thread = threading.Thread(target=self._repeat, args=args)
            thread.start()
            self._threads.append(thread)

    def _repeat(
        self,
        ask: Callable[[Client, str, dict[str, Any]], None],
        client: Client,
        target: str,
        sender: str,
        payload: str,
        pause: float,
    ) -> None:
        number = 0
        while not self._stop.wait(pause):
            number += 1
            try:
                ask(client, target, {"sender": sender, "number": number, "payload": payload})
            except VchanError as error:
                self._errors.append(f"{sender} {number}: {type(error).__name__}: {error}")

    def _cast(self, client: Client, target: str, args: dict[str, Any]) -> None:
        self._counts["casts_sent"] += 1
        client.cast(target, "note", args, timeout_s=CALL_TIMEOUT_S)

    def _call(self, client: Client, target: str, args: dict[str, Any]) -> None:
        self._counts["calls_sent"] += 1
        answer = client.call(target, "echo", args, timeout_s=CALL_TIMEOUT_S)
        self._counts["calls_answered"] += 1
        self._counts["wrong_answers"] += answer != [args["sender"], args["number"], args["payload"]]

    def ask(self, target: str, method: str, args: dict[str, Any], timeout_s: float = 60.0) -> None:
        """One call in the background; `answer` tells."""
        self._answer = None
        thread = threading.Thread(target=self._ask, args=(target, method, args, timeout_s))
        thread.start()

    def _ask(self, target: str, method: str, args: dict[str, Any], timeout_s: float) -> None:
        with Client(self._socket) as client:
            try:
                answer = client.call(target, method, args, timeout_s=timeout_s)
            except VchanError as error:
                self._answer = ["raised", type(error).__name__, str(error)]
            else:
                self._answer = ["returned", answer]

    def answer(self) -> list[Any] | None:
        """What became of `ask`; None: not over."""
        return self._answer

    def progress(self) -> dict[str, Any]:
        """The counts so far."""
        return {**self._counts, "errors": self._errors[:5]}

    def stop(self) -> dict[str, Any]:
        """No more; told as soon as nothing is under way: ask `progress` until `running` is 0."""
        self._stop.set()
        running = sum(thread.is_alive() for thread in self._threads)
        if not running and self._client is not None:
            self._client.close()
            self._client = None
        return {**self.progress(), "running": running}


def main() -> None:
    """Serve TOPIC."""
    topic, socket = [*sys.argv[1:], AGENT_SOCKET][:2]
    agent = Agent(socket)
    agent.serve(topic, Asking(socket))
    agent.run()


if __name__ == "__main__":
    main()
