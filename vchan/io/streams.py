"""The byte streams a session runs over: what `Link` needs of them, and each kind.

A stream is a non-blocking file descriptor with `read`, `write` and `close`:

    read()        bytes; b"" means that the other end is not there (and, for `ends_at_hangup`,
                  never will be again); BlockingIOError: nothing now
    write(data)   how many bytes were taken, at least 1; BlockingIOError: none now
    OSError       the stream is broken and has to be opened anew
"""

from __future__ import annotations

import errno
import os
import stat
from _socket import SO_SNDBUF, SOL_SOCKET, socket
from collections.abc import Callable
from functools import partial
from io import BufferedReader, FileIO
from select import EPOLLET, EPOLLIN, EPOLLOUT, epoll
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from vchan.errors import LinkError, NotAPort, PortAbsent, PortBusy, PortDenied
from vchan.io.loop import Scheduler
from vchan.io.unix_socket import UnixSocket

if TYPE_CHECKING:
    import socket as standard

S_co = TypeVar("S_co", covariant=True)

ACCEPT_RETRY_S = 1.0
"""When the process has no descriptor left, connections are accepted again after this."""
READ_BYTES = 64 * 1024
"""One read."""
LOCAL_READ_BYTES = 128 * 1024
"""One read of a local socket, where a frame can be 96 KiB: read in two parts, it would be copied
once more."""
PORT_READ_BYTES = 4096
"""What one virtio-console read gives at most."""
RUNTIME_DIRECTORY = "/run/vchan"
"""The one directory that is made for a socket, because /run is empty at boot. Any other that is
missing is a mistake in a path."""
SEND_BUFFER_BYTES = 128 * 1024
"""What the kernel may hold of ours before the peer (QEMU) reads it: what a migration loses."""


class Stream(Protocol):
    """See the top of this file."""

    path: str
    ends_at_hangup: bool
    """Whether b"" is the end (a socket) or only an absence (a virtio port)."""

    def fileno(self) -> int:
        """The descriptor, for readiness."""

    def read(self) -> bytes:
        """What has arrived."""

    def write(self, data: bytes) -> int:
        """Hand over bytes."""

    def close(self) -> None:
        """Close it; harmless twice."""


class SocketStream:
    """A connected unix socket."""

    ends_at_hangup = True

    def __init__(self, connected: socket, path: str, read_bytes: int = READ_BYTES) -> None:
        connected.setblocking(False)
        self.path = path
        self._socket = connected
        # Bound once: a method of ours around each would cost as much as a dozen lines.
        self.read = partial(connected.recv, read_bytes)
        self.write = connected.send

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close it."""
        self._socket.close()


def connect_local(path: str) -> SocketStream:
    """Connect to a daemon's local socket: see `connect_unix`."""
    return connect_unix(path, LOCAL_READ_BYTES)


def connect_unix(path: str, read_bytes: int = READ_BYTES) -> SocketStream:
    """Connect to a unix socket without ever blocking.

    A QEMU channel takes one client; a second connects and is never answered, a fourth is
    refused. The session's handshake tells.

    Raises:
        PortAbsent: No such socket, or nobody listens.
        PortBusy: Others are waiting for it already.
        PortDenied: Permissions.
        NotAPort: The path is no socket.
    """
    try:
        client = UnixSocket()
    except OSError as error:  # no descriptors left
        raise explain(path, error, "socket") from error
    client.setblocking(False)
    try:
        client.setsockopt(SOL_SOCKET, SO_SNDBUF, SEND_BUFFER_BYTES)
        client.connect(path)
    except OSError as error:
        client.close()
        raise explain(path, error, "socket") from error
    return SocketStream(client, path, read_bytes)


def listen_unix(path: str, mode: int) -> standard.socket:
    """`bind_unix`, for who needs a socket of the standard library's."""
    bound = bind_unix(path, mode)
    import socket as standard  # here: it costs start-up time

    return standard.socket(fileno=bound.detach())


def bind_unix(path: str, mode: int) -> UnixSocket:
    """Listen on a unix socket, replacing a dead one that a killed daemon left.

    Args:
        mode: The socket's permissions, e.g. 0o660.

    Raises:
        PortBusy: Somebody is listening there.
        PortDenied: Permissions.
        NotAPort: Something else has that name.
        PortAbsent: The directory does not exist, and is not RUNTIME_DIRECTORY.
        LinkError: Anything else.
    """
    directory = os.path.dirname(path)
    server = UnixSocket()
    server.setblocking(False)
    try:
        try:
            connect_unix(path).close()
        except (PortAbsent, NotAPort):
            pass  # of the latter more below
        else:
            raise PortBusy(path, "another daemon listens there: stop it, or configure another path")
        _remove_dead_socket(path)
        mask = os.umask(0o777 & ~mode)
        try:
            if directory == RUNTIME_DIRECTORY:
                _make_directory(directory)
            server.bind(path)
        finally:
            os.umask(mask)
        server.listen(128)
    except OSError as error:
        server.close()
        if not os.path.isdir(directory) and isinstance(
            error, FileNotFoundError | NotADirectoryError
        ):
            problem = f"{directory} is no directory: make it, or configure another path"
            raise PortAbsent(path, problem) from error
        raise explain(path, error, "directory") from error
    except LinkError:
        server.close()
        raise
    return server


class Listener:
    """The end that the other one connects to, where no QEMU stands between two daemons: one client
    at a time, as a VM's channel takes."""

    def __init__(self, mode: int) -> None:
        self._mode = mode
        self._server: UnixSocket | None = None
        self._path = ""

    def open(self, path: str) -> SocketStream:
        """The connection, if there is one.

        Raises:
            LinkError: There is none yet, or nobody can listen there.
        """
        if self._server is None:
            self._server, self._path = bind_unix(path, self._mode), path
        try:
            connected, _ = self._server.accept()
        except BlockingIOError:
            raise PortAbsent(path, "the other end has not connected yet") from None
        connected.setsockopt(SOL_SOCKET, SO_SNDBUF, SEND_BUFFER_BYTES)
        return SocketStream(connected, path)

    def close(self) -> None:
        """Listen no more. Harmless twice."""
        if self._server is not None:
            self._server.close()
            self._server = None
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass


class Accepting(Protocol[S_co]):
    """A socket that listens, and never blocks."""

    def fileno(self) -> int:
        """Its descriptor."""

    def accept(self) -> tuple[S_co, Any]:
        """The next connection, and where it comes from."""

    def close(self) -> object:
        """Listen no more."""


class Acceptor(Generic[S_co]):
    """Accepts who connects, from `resume` on. Others wait in the kernel's queue: when there is no
    room, until `resume`; when this process has no descriptor left, until then or for
    ACCEPT_RETRY_S.

    Args:
        accepted: Given each connection, and where it comes from.
        failed: Told why one could not be accepted.
        has_room: Whether one more may be.
    """

    def __init__(
        self,
        loop: Scheduler,
        listener: Accepting[S_co],
        accepted: Callable[[S_co, Any], object],
        failed: Callable[[str], object] = lambda _: None,
        has_room: Callable[[], bool] = lambda: True,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._accepted = accepted
        self._failed = failed
        self._has_room = has_room
        self._is_accepting = False
        self._is_over = False

    def resume(self) -> None:
        """Accept. Harmless when that is done already, or it is closed."""
        if not self._is_accepting and not self._is_over:
            self._is_accepting = True
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _pause(self) -> None:
        if self._is_accepting:
            self._is_accepting = False
            self._loop.remove_reader(self._listener.fileno())

    def close(self) -> None:
        """Accept no more, and close the socket."""
        self._pause()
        self._is_over = True
        self._listener.close()

    def _accept(self) -> None:
        if not self._has_room():
            self._pause()
            return
        try:
            connected, address = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it is gone already
        except OSError as error:
            self._failed(f"cannot accept a connection: {error.strerror}")
            self._pause()
            self._loop.call_later(ACCEPT_RETRY_S, self.resume)
            return
        self._accepted(connected, address)


def _remove_dead_socket(path: str) -> None:
    """Remove what a killed daemon left, and nothing else: the path may be a mistake."""
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise NotAPort(path, "is there and is no socket: configure another path")
        os.unlink(path)


def _make_directory(path: str) -> None:
    """Make a directory that anybody may enter; not those above it."""
    try:
        os.mkdir(path)
        os.chmod(path, 0o755)
    except FileExistsError:
        pass


class FileStream:
    """A descriptor of a file, and its path: what devices and pipes share."""

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def write(self, data: bytes) -> int:
        """Hand over bytes. A device of virtio-console takes 32 KiB at a time."""
        return os.write(self._fd, data)

    def close(self) -> None:
        """Close it; harmless twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PortStream(FileStream):
    """A virtio-serial port, or another character device that needs no terminal settings."""

    ends_at_hangup = False

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        # Without a buffer of its own: nothing may lie in one that readiness does not tell of.
        self._reader = BufferedReader(FileIO(fd, closefd=False), 1)
        self._is_behind = False  # more lay there than the last read gave

    def read(self) -> bytes:
        """What has arrived; b"": no host is connected."""
        if not self._is_behind:
            data = os.read(self._fd, PORT_READ_BYTES)
            self._is_behind = len(data) == PORT_READ_BYTES
            return data
        # It asks the device again and again, which gives 4 KiB at a time, in C and into one place.
        many: bytes | None = self._reader.read(READ_BYTES)
        self._is_behind = many is not None and len(many) == READ_BYTES
        if many is None:
            raise BlockingIOError
        return many


def open_port(path: str) -> PortStream:
    """Open a virtio-serial port.

    Raises:
        PortAbsent: The VM has no such port (yet).
        PortBusy: Another process has it open.
        PortDenied: Permissions.
        NotAPort: The path is no character device, or one that cannot be waited for.
    """
    try:
        # Looked at before it is opened: opening a fifo or a disk has effects of its own.
        if not stat.S_ISCHR(os.stat(path).st_mode):
            problem = "is no character device: give the path of a virtio-serial port"
            raise NotAPort(path, problem)
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise explain(path, error, "port") from error
    if os.isatty(fd):
        os.close(fd)
        raise NotAPort(path, "is a terminal: give the path of a virtio-serial port")
    port = PortStream(fd, path)
    try:
        hangup_watch(port).close()
    except OSError as error:  # what cannot be waited for: /dev/null, /dev/zero
        port.close()
        raise NotAPort(path, "cannot be waited for: it is no virtio-serial port") from error
    return port


def hangup_watch(stream: Stream) -> epoll:
    """A descriptor that becomes readable when `stream`'s state changes.

    A port whose host is away is always readable (hung up): waiting for it in the usual way would
    spin. Edge-triggered, it wakes us once: when the host is back.
    """
    watch = epoll()
    events = EPOLLIN | EPOLLOUT | EPOLLET
    watch.register(stream.fileno(), events)
    return watch


def explain(path: str, error: OSError, what: str) -> LinkError:
    """What an operator is told of an error at opening `path`, which should be a `what`."""
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO | errno.ENOTDIR:
            return PortAbsent(path, f"no such {what}: it may appear later")
        case errno.ECONNREFUSED if _is_no_socket(path):
            return NotAPort(path, "is there and is no socket: give the path of a daemon's socket")
        case errno.ECONNREFUSED:
            return PortAbsent(path, "nobody listens there: is the daemon or the VM running?")
        case errno.EBUSY:
            return PortBusy(path, "another process has it open: find it with fuser, and stop it")
        case errno.EAGAIN:
            return PortBusy(path, "other clients are waiting for it already")
        case errno.EACCES | errno.EPERM:
            return PortDenied(path, f"uid {os.geteuid()} may not open it: {_permissions(path)}")
        case errno.ENOTSOCK | errno.EPROTOTYPE:
            return NotAPort(path, "is no stream socket")
        case _:  # a path that is too long has no errno
            return LinkError(path, f"cannot open this {what}: {error.strerror or error}")


def _is_no_socket(path: str) -> bool:
    """Who connects to a file is refused as if it were a socket at which nobody listens."""
    try:
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _permissions(path: str) -> str:
    """Who may open it, and what to do for others."""
    for name in (path, os.path.dirname(path)):
        try:
            found = os.stat(name)
        except FileNotFoundError:
            continue  # a socket that was to be made: its directory says who may
        except OSError:
            return "a directory above it may not be entered"
        owner = f"uid {found.st_uid}, gid {found.st_gid}, mode {stat.S_IMODE(found.st_mode):04o}"
        do = "run as that user or in that group, or give access with a udev rule"
        if not stat.S_ISCHR(found.st_mode):
            do = "run as that user or in that group, or change the mode"
        which = "it has" if name == path else f"{name} has"
        return f"{which} {owner}; {do}"
    return "its directory is missing"
