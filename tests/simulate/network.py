"""Descriptors: readiness, local unix sockets, and what the code under test connects with."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.simulate.world import Process, World
from vchan.errors import LinkError, PortAbsent, PortBusy

SOCKET_BYTES = 200_000
"""What a unix socket holds."""

Watch = tuple[Process, Callable[[], object]]


class Endpoint:
    """A descriptor. Level-triggered: as long as it is ready, it is told again."""

    ends_at_hangup = True

    def __init__(self, world: World, path: str, owner: Process | None = None) -> None:
        self.world = world
        self.path = path
        self.closed = False
        self.on_readable: Watch | None = None
        self.on_writable: Watch | None = None
        self._read_planned = False
        self._write_planned = False
        self._fd = world.register(self)
        self._owner: Process | None = None
        if owner is not None:
            self.own(owner)

    def own(self, process: Process) -> None:
        """Whose descriptor this is: it is closed when the process dies."""
        self._owner = process
        process.files[self._fd] = self

    def fileno(self) -> int:
        """See Stream."""
        return self._fd

    def readable(self) -> bool:
        """Whether a read would give anything."""
        return False

    def writable(self) -> bool:
        """Whether a write would take anything."""
        return False

    def watch_read(self, process: Process, callback: Callable[[], object]) -> None:
        """Tell `process` when it is readable."""
        self.on_readable = (process, callback)
        self.kick()

    def watch_write(self, process: Process, callback: Callable[[], object]) -> None:
        """Tell `process` when it is writable."""
        self.on_writable = (process, callback)
        self.kick()

    def kick(self) -> None:
        """Something has changed: plan to tell who watches."""
        if self.on_readable is not None and not self._read_planned and self.readable():
            self._read_planned = True
            self.world.after(self.world.latency_s(), self._tell_read)
        if self.on_writable is not None and not self._write_planned and self.writable():
            self._write_planned = True
            self.world.after(self.world.latency_s(), self._tell_write)

    def _tell_read(self) -> None:
        watch = self.on_readable
        if watch is None or not self.readable():
            self._read_planned = False
            return
        watch[0].enter(self._read_now)

    def _read_now(self) -> None:
        self._read_planned = False
        if self.on_readable is not None:
            self.on_readable[1]()
            self.kick()

    def _tell_write(self) -> None:
        watch = self.on_writable
        if watch is None or not self.writable():
            self._write_planned = False
            return
        watch[0].enter(self._write_now)

    def _write_now(self) -> None:
        self._write_planned = False
        if self.on_writable is not None:
            self.on_writable[1]()
            self.kick()

    def close(self) -> None:
        """See Stream."""
        if self.closed:
            return
        self.closed = True
        self.on_readable = self.on_writable = None
        self.world.endpoints.pop(self._fd, None)
        if self._owner is not None:
            self._owner.files.pop(self._fd, None)
        self.on_close()

    def on_close(self) -> None:
        """What else closing means."""


class LocalSocket(Endpoint):
    """One end of a connected unix socket."""

    def __init__(self, world: World, path: str, owner: Process | None) -> None:
        super().__init__(world, path, owner)
        self.peer: LocalSocket | None = None
        self.received: deque[bytes] = deque()
        self.received_bytes = 0

    def readable(self) -> bool:
        """Data, or the end."""
        return bool(self.received) or self.peer is None or self.peer.closed

    def writable(self) -> bool:
        """Room at the peer, or nobody there."""
        peer = self.peer
        return peer is None or peer.closed or peer.received_bytes < SOCKET_BYTES

    def read(self) -> bytes:
        """See Stream."""
        if self.received:
            data = self.received.popleft() if len(self.received) == 1 else b"".join(self.received)
            self.received.clear()
            self.received_bytes = 0
            if self.peer is not None:
                self.peer.kick()
            return data
        if self.peer is None or self.peer.closed:
            return b""
        raise BlockingIOError

    def write(self, data: bytes) -> int:
        """See Stream."""
        peer = self.peer
        if peer is None or peer.closed:
            raise BrokenPipeError(32, "Broken pipe")
        room = SOCKET_BYTES - peer.received_bytes
        if room <= 0:
            raise BlockingIOError
        taken = data[:room]
        peer.received.append(taken)
        peer.received_bytes += len(taken)
        peer.kick()
        return len(taken)

    def on_close(self) -> None:
        """The peer reads what is left, then the end."""
        if self.peer is not None:
            self.peer.kick()

    def getsockopt(self, *_: int) -> bytes:
        """SO_PEERCRED."""
        return struct.pack("3i", 1, 0, 0)


class Listener(Endpoint):
    """A listening unix socket."""

    def __init__(self, world: World, path: str, owner: Process) -> None:
        super().__init__(world, path, owner)
        self._backlog: deque[LocalSocket] = deque()
        world.listeners[path] = self

    def connect(self, client: Process) -> LocalSocket:
        """A client's end."""
        near = LocalSocket(self.world, self.path, client)
        far = LocalSocket(self.world, self.path, self._owner)
        near.peer, far.peer = far, near
        self._backlog.append(far)
        self.kick()
        return near

    def readable(self) -> bool:
        """Somebody waits."""
        return bool(self._backlog)

    def accept(self) -> tuple[LocalSocket, str]:
        """See socket.accept."""
        if not self._backlog:
            raise BlockingIOError
        return self._backlog.popleft(), ""

    def on_close(self) -> None:
        """Nobody gets in any more."""
        if self.world.listeners.get(self.path) is self:
            del self.world.listeners[self.path]
        for waiting in self._backlog:
            waiting.close()


class HangupWatch(Endpoint):
    """`streams.hangup_watch`: wakes once when a port's state has changed."""

    def __init__(self, world: World, port: Any, owner: Process) -> None:
        super().__init__(world, "watch", owner)
        self._port = port
        self._changed = True
        port.watches.append(self)

    def changed(self) -> None:
        """The port's host came, went, or wrote."""
        self._changed = True
        self.kick()

    def readable(self) -> bool:
        """Something has changed since it was polled."""
        return self._changed

    def poll(self, _timeout: float) -> list[tuple[int, int]]:
        """See select.epoll."""
        self._changed = False
        return []

    def on_close(self) -> None:
        """No more news."""
        if self in self._port.watches:
            self._port.watches.remove(self)


def connect(world: World, path: str) -> Endpoint:
    """`streams.connect_unix`.

    Raises:
        PortAbsent, PortBusy: As there.
    """
    assert world.starting is not None
    listener = world.listeners.get(path)
    if listener is None:
        raise PortAbsent(path, "no such socket: it may appear later")
    result: Endpoint = listener.connect(world.starting.process)
    return result


def listen(world: World, path: str) -> Listener:
    """`streams.listen_unix`.

    Raises:
        PortBusy: As there.
    """
    assert world.starting is not None
    if path in world.listeners:
        raise PortBusy(path, "another daemon listens there")
    return Listener(world, path, world.starting.process)


__all__ = ["Endpoint", "HangupWatch", "LinkError", "Listener", "LocalSocket", "connect", "listen"]
