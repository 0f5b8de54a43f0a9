"""The least an event-driven Python program can do: every byte that comes goes back.

python3 echo_select.py PORT
"""

import os
import selectors
import sys


def main() -> None:
    """Echo until killed."""
    port = os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK)
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
