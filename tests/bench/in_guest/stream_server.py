"""What byte streams are measured against: moves bytes over TCP connections.

python3 stream_server.py PORT

A connection's first line is "take N", "give N" or "echo", and so is the next after "take" and
"give". As bulk.py, but the line may come with what is behind it, and a client may leave any time.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from io import BufferedReader

BLOCK_BYTES = 65536


def take(reader: BufferedReader[socket.SocketIO], connected: socket.socket, count: int) -> None:
    """Read `count` bytes and say so."""
    while count:
        received = len(reader.read1(min(count, BLOCK_BYTES)))
        if not received:
            return
        count -= received
    connected.sendall(b".")


def give(connected: socket.socket, count: int) -> None:
    """Write `count` bytes."""
    block = bytes(BLOCK_BYTES)
    while count:
        count -= connected.send(block[: min(count, BLOCK_BYTES)])


def echo(reader: BufferedReader[socket.SocketIO], connected: socket.socket) -> None:
    """Send back what comes."""
    while data := reader.read1(BLOCK_BYTES):
        connected.sendall(data)


def serve(connected: socket.socket) -> None:
    """One client, until it leaves."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = socket.SocketIO(connected, "r")
    with connected, BufferedReader(stream, BLOCK_BYTES) as reader, contextlib.suppress(OSError):
        while line := reader.readline().decode():
            verb, _, count = line.strip().partition(" ")
            if verb == "echo":
                echo(reader, connected)
            elif verb == "take":
                take(reader, connected, int(count))
            else:
                give(connected, int(count))


def main() -> None:
    """Serve until killed, on every address of the guest."""
    with socket.create_server(("", int(sys.argv[1]))) as server:
        while True:
            connected, _ = server.accept()
            threading.Thread(target=serve, args=(connected,), daemon=True).start()


if __name__ == "__main__":
    main()
