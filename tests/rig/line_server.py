"""In a guest: a terminal server, so that a port may be across a network.

python3 line_server.py socket PORT DEVICE     plain bytes, one client at a time
python3 line_server.py rfc2217 PORT DEVICE    ... with RFC 2217 around them
"""

import contextlib
import os
import socket
import sys
import threading
import tty

from serial import Serial, rfc2217


def serve_plain(client: socket.socket, device: str) -> None:
    """Copy bytes both ways until the client goes."""
    line = os.open(device, os.O_RDWR | os.O_NOCTTY)
    if os.isatty(line):
        tty.setraw(line)

    def from_line() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(line, 4096):
                client.sendall(data)

    threading.Thread(target=from_line, daemon=True).start()
    with contextlib.suppress(OSError):
        while data := client.recv(4096):
            while data:
                data = data[os.write(line, data) :]


class _Client:
    """What the port manager writes its answers to."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client

    def write(self, data: bytes) -> None:
        self._client.sendall(data)


def serve_rfc2217(client: socket.socket, device: str) -> None:
    """The same, as RFC 2217 has it."""
    line = Serial(device, 115200, timeout=0.1)
    manager = rfc2217.PortManager(line, _Client(client))

    def from_line() -> None:
        with contextlib.suppress(OSError):
            while True:
                data = line.read(line.in_waiting or 1)
                if data:
                    client.sendall(b"".join(manager.escape(data)))

    threading.Thread(target=from_line, daemon=True).start()
    with contextlib.suppress(OSError):
        while data := client.recv(4096):
            line.write(b"".join(manager.filter(data)))


def main() -> None:
    """Serve one client; init starts us again."""
    kind, port, device = sys.argv[1:]
    with socket.create_server(("127.0.0.1", int(port))) as server:
        client, _ = server.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    (serve_plain if kind == "socket" else serve_rfc2217)(client, device)


if __name__ == "__main__":
    main()
