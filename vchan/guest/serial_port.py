"""Channels that are serial lines, through pyserial. Imported only where a URL asks for one.

serial:/dev/ttyS1                      an isa-serial port, 115200 baud
serial:/dev/hvc1                       a virtio console
serial:/dev/ttyUSB0?baudrate=9600&parity=E&stopbits=2&rtscts=yes
pyserial:socket://host:4000            whatever else pyserial knows by its own URLs

A line is raw: eight bits, no echo, no flow control unless asked for. It has no notion of open and
close: who begins to speak flushes and greets, as the session does anyway, and whatever was in
between is noise.

What has a file descriptor is read and written by the loop itself. What has none (rfc2217://, and
everything on Windows) is bridged by two threads.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from typing import Any, Final, NamedTuple

from vchan.errors import ConfigError, LinkError, NotAPort, PortAbsent, PortBusy
from vchan.io.streams import READ_BYTES, Stream, explain

DEFAULT_BAUDRATE: Final = 115200
BRIDGE_BYTES: Final = 16 * 1024
"""What waits between the loop and a bridge's thread: lost when the line breaks."""
BRIDGE_READ_S: Final = 0.5
"""A bridge's thread notices at least this often that its stream was closed."""
BRIDGE_WRITE_S: Final = 15.0
"""A line that takes no bytes for so long is opened anew."""
POSIX: Final = os.name == "posix"

EXAMPLE: Final = "serial:/dev/ttyS1?baudrate=115200"


class Line(NamedTuple):
    """A serial device and how to set it."""

    device: str
    baudrate: int = DEFAULT_BAUDRATE
    parity: str = "N"
    stopbits: int = 1
    rtscts: bool = False


def parse_line(text: str) -> Line:
    """The DEVICE?OPTION=VALUE&... of a serial URL.

    Raises:
        ConfigError: An option or its value is wrong; says which, and what was expected.
    """
    device, _, options = text.partition("?")
    if not device or (POSIX and not device.startswith("/")):
        raise ConfigError(f"port 'serial:{text}'", f"expected a device's path; e.g. {EXAMPLE}")
    given: dict[str, Any] = {}
    for option in filter(None, options.split("&")):
        name, _, value = option.partition("=")
        given[name] = _parse_option(name, value)
    return Line(device, **given)


def _parse_option(name: str, value: str) -> int | str | bool:
    where = f"port option {name}={value}"
    match name:
        case "baudrate":
            if not value.isascii() or not value.isdigit() or not 0 < int(value) < 1 << 31:
                raise ConfigError(where, "expected bits per second, e.g. baudrate=115200")
            return int(value)
        case "parity":
            if value not in ("N", "E", "O"):
                raise ConfigError(where, "expected N (none), E (even) or O (odd)")
            return value
        case "stopbits":
            if value not in ("1", "2"):
                raise ConfigError(where, "expected 1 or 2")
            return int(value)
        case "rtscts":
            if value not in ("yes", "no"):
                raise ConfigError(where, "expected yes or no")
            return value == "yes"
        case _:
            known = "baudrate, parity, stopbits, rtscts"
            raise ConfigError(where, f"no such option: a serial line has {known}")


def require_pyserial() -> Any:
    """pyserial's module.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import serial
    except ImportError as error:
        problem = "serial ports need pyserial: install python3-serial, or pip install pyserial"
        raise ConfigError("port", problem) from error
    return serial


def open_line(line: Line) -> Stream:
    """Open a serial device: raw, exclusive, without flow control unless it is asked for.

    Raises:
        LinkError: It cannot be opened; the subclass and the text say why.
    """
    serial = require_pyserial()
    if POSIX:
        _require_terminal(line.device)
    try:
        port = serial.Serial(
            None,
            baudrate=line.baudrate,
            parity=line.parity,
            stopbits=line.stopbits,
            rtscts=line.rtscts,
            xonxoff=False,  # it would take two values out of binary data
            exclusive=True,
            timeout=BRIDGE_READ_S,
            write_timeout=BRIDGE_WRITE_S,
        )
        port.port = line.device
        port.open()
    except (OSError, ValueError) as error:  # SerialException is an OSError
        raise _explain_serial(line.device, error) from error
    return SerialStream(port, line.device) if POSIX else BridgeStream(port, line.device)


def _require_terminal(device: str) -> None:
    try:
        if not stat.S_ISCHR(os.stat(device).st_mode):
            raise NotAPort(device, "is no character device: give the path of a serial port")
    except OSError as error:
        raise explain(device, error, "serial port") from error


def _explain_serial(device: str, error: Exception) -> LinkError:
    number = getattr(error, "errno", None)
    if number in (errno.EAGAIN, errno.EBUSY):
        problem = "another program has it open: find it with fuser, and stop it (a getty?)"
        return PortBusy(device, problem)
    if number in (errno.EIO, errno.EINVAL, errno.ENOTTY) or number is None:
        # ttyS3 of a machine that has only two: there is a device file, and nothing behind it.
        return NotAPort(device, f"is no serial line that works: {error}")
    return explain(device, OSError(number, os.strerror(number)), "serial port")


def _finish_raw_mode(fd: int) -> None:
    """What pyserial leaves: a read that finds nothing must not look like a line that was hung up
    (VMIN), and a break on the line must not throw away what came before it (BRKINT)."""
    import termios

    attributes = termios.tcgetattr(fd)
    attributes[0] &= ~termios.BRKINT
    attributes[6][termios.VMIN] = 1
    termios.tcsetattr(fd, termios.TCSANOW, attributes)


class SerialStream:
    """A serial line with a file descriptor."""

    ends_at_hangup = True  # a terminal that was hung up stays so: it has to be opened anew

    def __init__(self, port: Any, path: str) -> None:
        self.path = path
        self._port = port  # closing is pyserial's: it has more descriptors than this
        self._fd: int = port.fileno()
        if os.isatty(self._fd):
            _finish_raw_mode(self._fd)

    def fileno(self) -> int:
        """The line's descriptor."""
        return self._fd

    def read(self) -> bytes:
        """What has arrived."""
        return os.read(self._fd, READ_BYTES)

    def write(self, data: bytes) -> int:
        """Hand over bytes; a line takes few at a time."""
        return os.write(self._fd, data)

    def close(self) -> None:
        """Let go of it. A thread closes it: the kernel waits up to 30 s for what was not sent."""
        if self._fd >= 0:
            self._fd = -1  # from here on the number may become somebody else's at any moment
            threading.Thread(target=self._port.close, name="vchan-line-close", daemon=True).start()


class BridgeStream:
    """A port that cannot be waited for, made so by two threads and a pair of sockets.

    Args:
        port: pyserial's, or another with its `read`, `write`, `in_waiting` and `close`; its reads
            end after BRIDGE_READ_S at the latest.
    """

    ends_at_hangup = True

    def __init__(self, port: Any, path: str) -> None:
        self.path = path
        self._port = port
        self._problem = ""
        self._closing = False
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        for end in (self._ours, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BRIDGE_BYTES)
        self._reader = threading.Thread(target=self._pump_in, name="vchan-line-in", daemon=True)
        self._writer = threading.Thread(target=self._pump_out, name="vchan-line-out", daemon=True)
        self._reader.start()
        self._writer.start()

    def fileno(self) -> int:
        """Our socket's descriptor."""
        return self._ours.fileno()

    def read(self) -> bytes:
        """What has arrived."""
        data = self._ours.recv(READ_BYTES)
        if not data and self._problem:
            raise OSError(errno.EIO, self._problem)
        return data

    def write(self, data: bytes) -> int:
        """Hand over bytes to the thread."""
        return self._ours.send(data)

    def close(self) -> None:
        """Let go of it; its threads close the port within a moment."""
        self._closing = True
        self._ours.close()

    def _pump_in(self) -> None:
        try:
            while not self._closing:
                data = self._port.read(max(1, self._port.in_waiting))
                if data:
                    self._theirs.sendall(data)
        except Exception as error:  # noqa: BLE001 - pyserial raises TypeError, too, on broken ports
            self._end(error)

    def _pump_out(self) -> None:
        try:
            while data := self._theirs.recv(BRIDGE_BYTES):
                self._port.write(data)
        except Exception as error:  # noqa: BLE001 - as above
            self._end(error)
        self._closing = True
        self._reader.join()
        self._theirs.close()
        self._port.close()

    def _end(self, error: Exception) -> None:
        """The loop sees the end, and after it the reason."""
        self._problem = self._problem or " ".join(str(error).split()) or type(error).__name__
        self._closing = True
        try:
            self._theirs.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the loop has closed its end already


class UrlOpener:
    """Opens what one of pyserial's own URLs names, in a thread: a network may take seconds.

    Asked again and again until the thread has come to an end, as the port asks anyway.

    Raises:
        ConfigError: pyserial knows no such URL.
    """

    def __init__(self, url: str) -> None:
        self._serial = require_pyserial()
        self._url = url
        self._thread: threading.Thread | None = None
        self._opened: Stream | LinkError | None = None
        self._problem = "is being opened"
        try:
            self._make()
        except (OSError, ValueError) as error:
            where = f"port 'pyserial:{url}'"
            raise ConfigError(where, f"pyserial cannot use it: {error}") from error

    def _make(self) -> Any:
        # Not write_timeout: rfc2217:// has none.
        return self._serial.serial_for_url(self._url, do_not_open=True, timeout=BRIDGE_READ_S)

    def __call__(self) -> Stream:
        """The stream, once it is open.

        Raises:
            LinkError: Not yet (PortAbsent), or not at all, and why.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._open, name="vchan-line", daemon=True)
            self._thread.start()
        if self._thread.is_alive():  # until it has ended, what it opens is its own
            raise PortAbsent(self._url, self._problem)  # the last: it is told once
        opened, self._opened, self._thread = self._opened, None, None
        assert opened is not None
        if isinstance(opened, LinkError):
            self._problem = opened.problem
            raise opened
        return opened

    def _open(self) -> None:
        try:
            port = self._make()
            port.open()
            self._opened = self._stream_of(port)
        except Exception as error:  # noqa: BLE001 - whatever a URL's handler raises
            self._opened = PortAbsent(self._url, f"cannot be opened: {error}")

    def _stream_of(self, port: Any) -> Stream:
        try:
            port.fileno()
        except (OSError, AttributeError):  # io.UnsupportedOperation is an OSError
            return BridgeStream(port, self._url)
        return SerialStream(port, self._url)
