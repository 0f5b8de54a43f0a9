"""A socket with the messages of a copy on it. Used by one thread, which waits.

Who sends a tree hears what is said to it whenever it writes: so the two never wait for each other
to read.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from vchan.errors import VchanError
from vchan.services.copies import CopyMessage, CopyReader

READ_BYTES: Final = 64 * 1024
"""One read: no more messages wait to be heeded than fit in it."""


class CopyBroken(VchanError):
    """The stream ended in the midst of a copy. What is whole is there; a part may be kept."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"the copy was broken off: {why}")


class CopyPipe:
    """Messages both ways.

    Args:
        connected: Ours from now on.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._reader = CopyReader()
        self._waiting: deque[CopyMessage] = deque()  # of one read, not yet taken
        self.moved_s = time.monotonic()
        """When bytes went either way, the last time."""
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)

    def read(self) -> CopyMessage:
        """The next message, when there is one.

        Raises:
            EOFError: The other end is done, between two messages.
            CopyBroken: It is gone in the midst of one.
            CopyFault: What came is no message.
        """
        while not self._waiting:
            while (data := self._received()) is None:
                self._poll.poll()
            if not data and self._reader.has_rest:
                raise CopyBroken("the other end is gone")
            if not data:
                raise EOFError
            self._waiting.extend(self._reader.feed(data))
        return self._waiting.popleft()

    def _received(self) -> bytes | None:
        """What has come; b"" for an end, None for nothing yet."""
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise CopyBroken(error.strerror or str(error)) from error
        self.moved_s = time.monotonic()
        return data

    def write(self, data: bytes, heed: Callable[[CopyMessage], object] | None = None) -> None:
        """Write bytes, all of them.

        Args:
            heed: Told what comes meanwhile; None: nothing is read.

        Raises:
            CopyBroken: The other end is gone.
        """
        left = memoryview(data)
        while True:
            if heed is not None:
                self._heed_all(heed)
            left = left[self._sent(left) :]
            if not left:
                return
            self._poll.modify(self._socket, select.POLLOUT | (select.POLLIN if heed else 0))
            self._poll.poll()
            self._poll.modify(self._socket, select.POLLIN)

    def _heed_all(self, heed: Callable[[CopyMessage], object]) -> None:
        while (received := self._received()) is not None:
            if not received:
                raise CopyBroken("the other end is gone")
            self._waiting.extend(self._reader.feed(received))
            while self._waiting:
                heed(self._waiting.popleft())

    def _sent(self, data: memoryview) -> int:
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise CopyBroken(error.strerror or str(error)) from error
        self.moved_s = time.monotonic()
        return sent

    def close(self) -> None:
        """Close it; harmless twice."""
        self._socket.close()
