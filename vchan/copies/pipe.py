"""A socket with the messages of a copy on it. Used by one thread, which waits; another may end it.

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

END_S: Final = 2.0
"""For a copy that is ended here to let go of its file. At it: a part stays, however small."""
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
        self._is_ended = False
        self.moved_s = time.monotonic()
        """When bytes went either way, the last time."""
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)

    def read(self) -> CopyMessage:
        """The next message, when there is one.

        Raises:
            EOFError: The other end is done, between two messages.
            CopyBroken: It is gone in the midst of one; or `end` was called.
            CopyFault: What came is no message.
        """
        self._require_not_ended()
        while not self._waiting:
            while (data := self._received()) is None:
                self._poll.poll()
            self._require_not_ended()
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
            CopyBroken: The other end is gone; or `end` was called.
        """
        left = memoryview(data)
        while True:
            self._require_not_ended()
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

    def _require_not_ended(self) -> None:
        if self._is_ended:
            raise CopyBroken("it was ended here")

    def end(self) -> None:
        """Have the thread that uses it hear `CopyBroken` at once, also if more has come already.
        From any thread; harmless twice, and after `close`."""
        self._is_ended = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is gone already

    def close(self) -> None:
        """Close it; harmless twice."""
        self._socket.close()
