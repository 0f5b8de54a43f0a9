"""In a guest: an echo on a port of the loopback interface, and one on a unix socket.

python3 echo_server.py PORT PATH
"""

import contextlib
import socket
import subprocess
import sys
import threading


def echo(connected: socket.socket) -> None:
    """Until the other side ends what it says."""
    with connected, contextlib.suppress(OSError):
        while data := connected.recv(65536):
            connected.sendall(data)
        connected.shutdown(socket.SHUT_WR)


def serve(server: socket.socket) -> None:
    """For ever."""
    while True:
        connected, _ = server.accept()
        threading.Thread(target=echo, args=(connected,), daemon=True).start()


def main() -> None:
    """The command."""
    port, path = int(sys.argv[1]), sys.argv[2]
    subprocess.run(["/bin/ip", "link", "set", "lo", "up"], check=True)
    by_path = socket.socket(socket.AF_UNIX)
    by_path.bind(path)
    by_path.listen()
    threading.Thread(target=serve, args=(by_path,), daemon=True).start()
    with socket.create_server(("127.0.0.1", port)) as server:
        serve(server)


if __name__ == "__main__":
    main()
