"""The least two Python programs can do: one gives what comes to the other, and back what that says.

python3 echo_relay.py PORT

PORT: a path, or fd: and the number of a descriptor that it inherits.

What an agent's call costs at least, whoever passes it on: three wake-ups instead of one.
"""

import os
import selectors
import socket
import sys


def echo(end: socket.socket) -> None:
    """The agent's part."""
    selector = selectors.DefaultSelector()
    selector.register(end, selectors.EVENT_READ)
    while True:
        selector.select()
        received = end.recv(4096)
        if not received:  # the other has ended
            return
        end.send(received)


def relay(port: int, end: socket.socket) -> None:
    """The daemon's part."""
    selector = selectors.DefaultSelector()
    selector.register(port, selectors.EVENT_READ)
    selector.register(end, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd != port:
                os.write(port, end.recv(4096))
            elif received := os.read(port, 4096):
                end.send(received)
            else:  # no host is there yet
                selector.select(0.02)


def opened(port: str) -> int:
    """The port's descriptor."""
    if port.startswith("fd:"):
        return int(port[3:])
    return os.open(port, os.O_RDWR | os.O_NONBLOCK)


def main() -> None:
    """Echo until killed."""
    port = opened(sys.argv[1])
    mine, other = socket.socketpair()
    if os.fork():
        other.close()
        relay(port, mine)
    else:
        os.close(port)
        mine.close()
        echo(other)


if __name__ == "__main__":
    main()
