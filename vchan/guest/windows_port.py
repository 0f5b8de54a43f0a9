r"""A virtio-serial port in a Windows guest: \\.\Global\org.openstack.vchan.0

Untested: written against the documentation of Win32 and of pyserial's bindings to it. The rest of
the guest daemon needs epoll and unix sockets, and so does not run on Windows either.

The driver knows none of a serial port's settings, so pyserial's own port class cannot open it; its
bindings can. Reads and writes overlap: without that, Windows lets a write wait until a read ends.
"""

from __future__ import annotations

from typing import Any, Final

from vchan.errors import ConfigError, LinkError, PortAbsent, PortBusy, PortDenied
from vchan.guest.serial_port import BRIDGE_READ_S, BridgeStream
from vchan.io.streams import PORT_READ_BYTES, Stream

_IO_PENDING: Final = 997
_WAIT_TIMEOUT: Final = 258


def require_win32() -> Any:
    """pyserial's bindings to Win32.

    Raises:
        ConfigError: This is no Windows, or pyserial is not installed.
    """
    try:
        from serial import win32
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("port", "a Windows path needs Windows, and pyserial") from error
    return win32


def open_windows_port(path: str) -> Stream:
    """Open a virtio-serial port of a Windows guest (untested).

    Raises:
        LinkError: It cannot be opened; the subclass and the text say why.
    """
    return BridgeStream(WindowsPort(require_win32(), path), path)


class WindowsPort:
    """What BridgeStream needs of a port, by overlapped reads and writes.

    Args:
        win32: pyserial's bindings.
    """

    in_waiting = PORT_READ_BYTES  # a read gives what there is

    def __init__(self, win32: Any, path: str) -> None:
        self._win32 = win32
        access = win32.GENERIC_READ | win32.GENERIC_WRITE
        flags = win32.FILE_ATTRIBUTE_NORMAL | win32.FILE_FLAG_OVERLAPPED
        self._handle = win32.CreateFile(path, access, 0, None, win32.OPEN_EXISTING, flags, 0)
        if self._handle == win32.INVALID_HANDLE_VALUE:
            raise _explain(path, win32.GetLastError())
        self._reading = self._overlapped()
        self._writing = self._overlapped()
        self._buffer: Any = None  # of the read that is under way

    def _overlapped(self) -> Any:
        overlapped = self._win32.OVERLAPPED()
        overlapped.hEvent = self._win32.CreateEvent(None, 1, 0, None)
        return overlapped

    def read(self, size: int) -> bytes:
        """What has arrived within BRIDGE_READ_S."""
        import ctypes

        win32, reading = self._win32, self._reading
        if self._buffer is None:
            self._buffer = ctypes.create_string_buffer(size)
            win32.ResetEvent(reading.hEvent)
            at = ctypes.byref(reading)
            if not win32.ReadFile(self._handle, self._buffer, size, None, at):
                self._require_pending("ReadFile")
        wait_ms = int(BRIDGE_READ_S * 1000)
        if win32.WaitForSingleObject(reading.hEvent, wait_ms) == _WAIT_TIMEOUT:
            return b""  # the read goes on; the next call waits for it again
        data: bytes = self._buffer.raw[: self._finish(reading)]
        self._buffer = None
        return data

    def write(self, data: bytes) -> int:
        """Hand over all bytes; waits until the driver has taken them."""
        import ctypes

        writing = self._writing
        written = 0
        while written < len(data):
            part = data[written:]
            at = ctypes.byref(writing)
            if not self._win32.WriteFile(self._handle, part, len(part), None, at):
                self._require_pending("WriteFile")
            written += self._finish(writing)
        return written

    def _require_pending(self, what: str) -> None:
        number = self._win32.GetLastError()
        if number != _IO_PENDING:
            raise OSError(f"{what}: Windows error {number}")

    def _finish(self, overlapped: Any) -> int:
        import ctypes

        count = self._win32.DWORD()
        done = self._win32.GetOverlappedResult(
            self._handle, ctypes.byref(overlapped), ctypes.byref(count), True
        )
        if not done:
            raise OSError(f"Windows error {self._win32.GetLastError()}")
        return int(count.value)

    def close(self) -> None:
        """Close it; what waits for it ends."""
        for handle in (self._handle, self._reading.hEvent, self._writing.hEvent):
            self._win32.CloseHandle(handle)


def _explain(path: str, number: int) -> LinkError:
    match number:
        case 2:  # ERROR_FILE_NOT_FOUND
            return PortAbsent(path, "no such port: it may appear later")
        case 5:  # ERROR_ACCESS_DENIED
            return PortDenied(path, "this account may not open it: run as LocalSystem")
        case 32:  # ERROR_SHARING_VIOLATION
            return PortBusy(path, "another process has it open: stop it")
        case _:
            return LinkError(path, f"cannot be opened: Windows error {number}")
