"""The counting agent, without vchan's library: HTTP and JSON alone, events from vchan-http.

python3 http_agent.py TOPIC JOURNAL [SOCKET]
"""

import json
import socket
import sys
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

SOCKET = "/run/vchan/http.sock"
RETRY_S = 0.1


class Counting:
    """See counting_agent.py: the same, and it outlives its process in the same way."""

    def __init__(self, journal: str) -> None:
        self._ran: dict[str, list[int]] = {}
        if Path(journal).exists():
            for line in Path(journal).read_text().splitlines():
                sender, _, number = line.rpartition(" ")
                self._ran.setdefault(sender, []).append(int(number))
        self._journal = Path(journal).open("a", buffering=1)  # noqa: SIM115 - until we end

    def note(self, sender: str, number: int) -> None:
        """For casts."""
        self._ran.setdefault(sender, []).append(number)
        self._journal.write(f"{sender} {number}\n")

    def echo(self, sender: str, number: int, payload: str = "") -> list[object]:
        """For calls."""
        self.note(sender, number)
        return [sender, number, payload]

    def executed(self, sender: str, start: int, count: int) -> list[int]:
        """A part of what ran for a sender, in the order it ran."""
        return self._ran.get(sender, [])[start : start + count]


class Api:
    """vchan-http, over a connection that is kept."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: HTTPConnection | None = None

    def connect(self) -> HTTPConnection:
        """A new connection."""
        connection = HTTPConnection("vchan", timeout=300)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self._path)
        return connection

    def ask(self, verb: str, **members: Any) -> int:
        """HTTP's status; 0: nobody knows whether it was heard."""
        try:
            self._connection = self._connection or self.connect()
            self._connection.request("POST", f"/v1/{verb}", json.dumps(members))
            response = self._connection.getresponse()
            response.read()
        except (OSError, HTTPException):
            self._connection = None
            return 0
        return response.status


def events(response: HTTPResponse) -> Any:
    """The requests of a stream, until it ends."""
    data = b""
    while line := response.readline():
        if line.startswith(b"data: "):
            data = line[6:]
        elif line == b"\n" and data:
            yield json.loads(data)
            data = b""


def main() -> None:
    """Serve TOPIC."""
    topic, journal, path = [*sys.argv[1:], SOCKET][:3]
    counting, api = Counting(journal), Api(path)
    while True:
        try:
            stream = api.connect()
            stream.request("GET", f"/v1/events?topic={topic}")
            for request in events(stream.getresponse()):
                handle(counting, api, request)
        except (OSError, HTTPException):
            time.sleep(RETRY_S)


def handle(counting: Counting, api: Api, request: Any) -> None:
    """Acknowledge, run, reply."""
    lease = request["lease"]
    if request["kind"] != "call" and api.ask("ack", lease=lease) != 204:
        return  # not ours any more: another gets it, or we again
    try:
        answer = {"result": getattr(counting, request["method"])(**request["args"])}
    except Exception as error:  # noqa: BLE001 - the caller's to see, whatever it is
        answer = {"failure": {"class": type(error).__name__, "message": str(error)}}
    if request["kind"] == "call":
        api.ask("reply", lease=lease, **answer)


if __name__ == "__main__":
    main()
