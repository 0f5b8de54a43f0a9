"""Moves bytes as fast as plain Python can.

python3 bulk.py PORT

The host sends a line, "take N" or "give N". After "take" it sends N bytes and gets one back when
the last has arrived; after "give" it gets N bytes.

It waits in poll(), and not in read(): the kernel takes back what the host has taken of a port's
writes at the next write or poll, and until then wakes who reads that port with every interrupt of
any port, three times for 64 KiB that another program sends.
"""

import os
import select
import sys
import time

WRITE_BYTES = 65536
READ_BYTES = 65536


def read_line(port: int) -> str:
    """The next line, which comes in one piece and alone."""
    waiting = select.poll()
    waiting.register(port, select.POLLIN)
    while True:
        waiting.poll()
        received = os.read(port, READ_BYTES)
        if received:
            return received.decode()
        time.sleep(0.02)  # no host is there yet


def take(port: int, count: int) -> None:
    """Read `count` bytes and say so."""
    while count:
        count -= len(os.read(port, READ_BYTES))
    os.write(port, b".")


def give(port: int, count: int) -> None:
    """Write `count` bytes, a multiple of WRITE_BYTES."""
    block = bytes(WRITE_BYTES)
    while count:
        count -= os.write(port, block[: min(count, WRITE_BYTES)])


def main() -> None:
    """Serve until killed."""
    port = os.open(sys.argv[1], os.O_RDWR)
    while True:
        verb, count = read_line(port).split()
        (take if verb == "take" else give)(port, int(count))


if __name__ == "__main__":
    main()
