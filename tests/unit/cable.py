"""A stand-in for QEMU: a socket for each end, and a thread that copies between them."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from pathlib import Path
from typing import Self

from vchan.io.streams import listen_unix


class Cable:
    """One client at a time at each end; one that comes takes the place of the one before.

    Args:
        directory: A short path, for the sockets `host` and `guest`.
    """

    def __init__(self, directory: Path) -> None:
        self.host = directory / "host"
        self.guest = directory / "guest"
        self._servers = [listen_unix(str(path), 0o660) for path in (self.host, self.guest)]
        self._clients: list[socket.socket | None] = [None, None]
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._copy, name="cable")

    def _copy(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            for end, server in enumerate(self._servers):
                selector.register(server, selectors.EVENT_READ, end)
            while True:
                for key, _ in selector.select():
                    if key.fd == self._wake_read:
                        return
                    if key.fileobj is self._servers[key.data]:
                        self._accept(selector, key.data)
                    else:
                        self._forward(selector, key.data)

    def _accept(self, selector: selectors.BaseSelector, end: int) -> None:
        self._drop(selector, end)
        client, _ = self._servers[end].accept()
        client.settimeout(10)
        self._clients[end] = client
        selector.register(client, selectors.EVENT_READ, end)

    def _forward(self, selector: selectors.BaseSelector, end: int) -> None:
        source, target = self._clients[end], self._clients[1 - end]
        assert source is not None
        try:
            data = source.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._drop(selector, end)
        elif target is not None:
            with contextlib.suppress(OSError):  # it has just gone: so are the bytes
                target.sendall(data)

    def _drop(self, selector: selectors.BaseSelector, end: int) -> None:
        client, self._clients[end] = self._clients[end], None
        if client is not None:
            selector.unregister(client)
            client.close()

    def cut(self) -> None:
        """Drop who is connected at the host's end, and what is under way to and from it."""
        client = self._clients[0]
        if client is not None:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._wake_write, b"\0")
        self._thread.join(30)
        for each in (*self._servers, *self._clients):
            if each is not None:
                each.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
