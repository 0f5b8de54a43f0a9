"""The least an event-driven Python program can do: every byte that comes goes back.

python3 echo_select.py PORT

PORT: a path, or fd: and the number of a descriptor that it inherits.
"""

import os
import selectors
import sys


def opened(port: str) -> int:
    """The port's descriptor."""
    if port.startswith("fd:"):
        return int(port[3:])
    return os.open(port, os.O_RDWR | os.O_NONBLOCK)


def main() -> None:
    """Echo until killed."""
    port = opened(sys.argv[1])
    selector = selectors.DefaultSelector()
    selector.register(port, selectors.EVENT_READ)
    while True:
        selector.select()
        received = os.read(port, 4096)
        if received:
            os.write(port, received)
        else:  # no host is there yet
            selector.select(0.02)


if __name__ == "__main__":
    main()
