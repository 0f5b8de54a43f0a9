"""The guest's end of the channel: finds, opens and reopens it.

virtio:org.openstack.vchan.0              the virtio-serial port of that name
virtio:/dev/vport0p1                      ... or that device
virtio:\\\\.\\Global\\org.openstack.vchan.0  ... in Windows (untested)
unix:/path                                a unix socket (tests, namespaces)
listen:/path                              the same, and the host's daemon connects to it
pipe:/path                                a pipe, which goes one way: casts only, unacknowledged
serial:/dev/ttyS1?baudrate=115200         a serial line: `serial_port` has its options
pyserial:socket://host:4000               one of pyserial's own URLs
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from vchan.errors import ConfigError, LinkError, PortAbsent, PortBusy
from vchan.link import Link
from vchan.loop import Loop, Timer
from vchan.session import Config, Event, Session
from vchan.streams import Listener, Stream, connect_unix, open_port

DEFAULT_PORT: Final = "virtio:org.openstack.vchan.0"
LISTENER_MODE: Final = 0o660
KINDS: Final = (
    "virtio:NAME, virtio:/dev/..., unix:/path, listen:/path, pipe:/path, "
    "serial:/dev/...?baudrate=115200, pyserial:URL"
)
PORTS_DIRECTORY: Final = "/dev/virtio-ports"
REOPEN_S: Final = (0.02, 0.05, 0.1, 0.25)
"""Between attempts. A port that just lost its opener is busy for a moment; one that is unplugged
comes back any time, and its coming wakes nobody who has no udev."""
FLAPPING_S: Final = (0.02, 0.1, 0.5, 2.0)
"""Before a stream is opened again that was lost soon after it was opened, time and again: a
terminal server, say, that hangs up on everybody."""
STEADY_S: Final = 2.0
"""A stream that lived so long is no flapping one."""


def port_opener(url: str) -> Callable[[], Stream]:
    """What opens the port that `url` names.

    Raises:
        ConfigError: It names no kind of port this program knows.
    """
    kind, _, name = url.partition(":")
    if kind == "virtio" and name.startswith("\\\\"):
        from vchan.guest import windows_port

        windows_port.require_win32()
        return lambda: windows_port.open_windows_port(name)
    if kind == "virtio" and name:
        path = name if name.startswith("/") else f"{PORTS_DIRECTORY}/{name}"
        return lambda: open_port(path)
    if kind == "unix" and name.startswith("/"):
        return lambda: connect_unix(name)
    if kind == "listen" and name.startswith("/"):
        return partial(Listener(LISTENER_MODE).open, name)
    if kind == "pipe" and name.startswith("/"):
        from vchan.pipes import open_pipe_reader

        return partial(open_pipe_reader, name)
    if kind in ("serial", "pyserial") and name:
        return _serial_opener(kind, name)
    raise ConfigError(f"port {url!r}", f"expected one of {KINDS}; e.g. {DEFAULT_PORT}")


def _serial_opener(kind: str, name: str) -> Callable[[], Stream]:
    from vchan.guest import serial_port  # here: it and pyserial cost start-up time

    serial_port.require_pyserial()
    if kind == "pyserial":
        return serial_port.UrlOpener(name)
    line = serial_port.parse_line(name)
    return lambda: serial_port.open_line(line)


def goes_one_way(url: str) -> bool:
    """Whether nothing can be said on the port that `url` names."""
    return url.startswith("pipe:")


def session_maker(url: str) -> Callable[[Config, Callable[[int], bytes]], Session]:
    """What makes the session that is spoken on the port that `url` names."""
    if goes_one_way(url):
        from vchan.oneway import Reader

        return Reader
    return Session


class Port:
    """Keeps a session on the port, whatever happens to the port.

    Args:
        open_stream: Opens it; raises LinkError.
        log: Told what an operator may want to know, once for each change.
        hold: See `Link`.
    """

    def __init__(
        self,
        loop: Loop,
        open_stream: Callable[[], Stream],
        session: Session,
        on_event: Callable[[Event], object],
        log: Callable[[str], object],
        hold: Callable[[], bool] | None = None,
    ) -> None:
        self._loop = loop
        self._open_stream = open_stream
        self._session = session
        self._on_event = on_event
        self._log = log
        self._hold = hold
        self._attempts = 0
        self._flaps = 0
        self._opened_s = 0.0
        self._told = ""
        self._timer: Timer | None = None
        self.link: Link | None = None
        self.reopened = 0

    def open(self) -> None:
        """Open it now, or as soon as it can be."""
        self._timer = None
        try:
            stream = self._open_stream()
        except LinkError as error:
            self._tell(str(error))
            # Absence and a former opener pass; permissions do too, when udev gets to them.
            patience = 4 if isinstance(error, PortAbsent | PortBusy) else 8
            delay_s = REOPEN_S[min(self._attempts // patience, len(REOPEN_S) - 1)]
            self._attempts += 1
            self._timer = self._loop.call_later(delay_s, self.open)
            return
        self._attempts = 0
        self._opened_s = self._loop.time()
        self._tell(f"{stream.path}: open")
        self.link = Link(
            self._loop,
            self._session,
            stream,
            self._on_event,
            self._lost,
            hold=self._hold,
        )

    def _lost(self, reason: str) -> None:
        self.link = None
        self.reopened += 1
        self._tell(reason)
        if self._loop.time() - self._opened_s >= STEADY_S:
            self._flaps = 0
        delay_s = FLAPPING_S[min(self._flaps, len(FLAPPING_S) - 1)]
        self._flaps += 1
        self._timer = self._loop.call_later(delay_s, self.open)

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._log(text)

    def send(self, message: bytes, stream: int) -> None:
        """Queue a message; it waits where the port is away."""
        if self.link is not None:
            self.link.send(message, stream)
        else:
            self._session.send(message, stream)

    def close(self) -> None:
        """Close it for good."""
        if self._timer is not None:
            self._timer.cancel()
        if self.link is not None:
            self.link.close()
            self.link = None
