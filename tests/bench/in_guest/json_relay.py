"""The least that a Python agent behind a daemon can do with JSON: a program passes on the lines
that come, as they are, and another answers them with what its method returns.

python3 json_relay.py fd:NUMBER

What is lost or comes twice is nobody's business here, nor who may call what, nor for how long.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys


def ping() -> dict[str, int]:
    """The method that is called."""
    return {}


METHODS = {"guest-ping": ping}


def answer(line: bytes) -> bytes:
    """The agent's part."""
    asked = json.loads(line)
    returned = METHODS[asked["execute"]](**asked.get("arguments", {}))
    return json.dumps({"return": returned}).encode() + b"\n"


def serve(end: socket.socket) -> None:
    """Answer the lines of one read together."""
    rest = b""
    poll = select.epoll()
    poll.register(end.fileno(), select.EPOLLIN)
    while True:
        poll.poll()
        received = end.recv(1 << 16)
        if not received:
            return
        *lines, rest = (rest + received).split(b"\n")
        end.sendall(b"".join([answer(line) for line in lines]))


def relay(port: socket.socket, agent: socket.socket) -> None:
    """The daemon's part: both ways."""
    ends = {port.fileno(): (port, agent), agent.fileno(): (agent, port)}
    poll = select.epoll()
    for descriptor in ends:
        poll.register(descriptor, select.EPOLLIN)
    while True:
        for descriptor, _ in poll.poll():
            end, other = ends[descriptor]
            received = end.recv(1 << 16)
            if not received:
                return
            other.sendall(received)


def main() -> None:
    """Answer until killed."""
    port = socket.socket(fileno=int(sys.argv[1].removeprefix("fd:")))
    mine, other = socket.socketpair()
    if os.fork():
        other.close()
        relay(port, mine)
    else:
        port.close()
        mine.close()
        serve(other)


if __name__ == "__main__":
    main()
