"""The guest's end of the channel: finds, opens and reopens it.

virtio:org.openstack.vchan.0              the virtio-serial port of that name, by udev's link or,
                                          where there is no udev, by the kernel's own word in /sys
virtio:/dev/vport0p1                      ... or that device
virtio:\\\\.\\Global\\org.openstack.vchan.0  ... in Windows (untested)
unix:/path                                a unix socket (tests, namespaces)
listen:/path                              the same, and the host's daemon connects to it
pipe:/path                                a pipe, which goes one way: casts only, unacknowledged
serial:/dev/ttyS1?baudrate=115200         a serial line: `serial_port` has its options
pyserial:socket://host:4000               one of pyserial's own URLs
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Final

from vchan.errors import ConfigError, LinkError, PortAbsent, PortBusy
from vchan.io.link import Link
from vchan.io.loop import Scheduler, Timer
from vchan.io.streams import Listener, Stream, connect_unix, open_port
from vchan.session import AnySession, Config, Event, Session
from vchan.wire.reserved_ports import reserved_for

DEFAULT_PORT: Final = "virtio:org.openstack.vchan.0"
LISTENER_MODE: Final = 0o660
KINDS: Final = (
    "virtio:NAME, virtio:/dev/..., unix:/path, listen:/path, pipe:/path, "
    "serial:/dev/...?baudrate=115200, pyserial:URL"
)
PORTS_DIRECTORY: Final = "/dev/virtio-ports"
"""Where udev makes a link for each port, by its name."""
KERNEL_DIRECTORY: Final = "/sys/class/virtio-ports"
"""Where the kernel has each port by its device, and its name in a file."""
DEVICES_DIRECTORY: Final = "/dev"
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
        if name.startswith("/"):
            return lambda: open_port(name)
        owner = reserved_for(name)
        if owner:
            problem = f"{name} is reserved for {owner}; expected a name of vchan's own"
            raise ConfigError(f"port {url!r}", f"{problem}, as in {DEFAULT_PORT}")
        return lambda: open_named_port(name)
    if kind == "unix" and name.startswith("/"):
        return lambda: connect_unix(name)
    if kind == "listen" and name.startswith("/"):
        return partial(Listener(LISTENER_MODE).open, name)
    if kind == "pipe" and name.startswith("/"):
        from vchan.io.pipes import open_pipe_reader

        return partial(open_pipe_reader, name)
    if kind in ("serial", "pyserial") and name:
        return _serial_opener(kind, name)
    raise ConfigError(f"port {url!r}", f"expected one of {KINDS}; e.g. {DEFAULT_PORT}")


def open_named_port(name: str) -> Stream:
    """Open the virtio-serial port of this name. It is looked for each time: a port that is plugged
    in again may be another device.

    Raises:
        LinkError: As `open_port`. Where no port has the name, those that there are are told.
    """
    link = f"{PORTS_DIRECTORY}/{name}"
    names = kernel_names()
    devices = [device for device, found in names.items() if found == name]
    if not devices:
        if os.path.exists(link):
            return open_port(link)
        others = ", ".join(sorted(names.values())) or "none"
        raise PortAbsent(link, f"no such port: it may appear later; this VM's ports: {others}")
    device = f"{DEVICES_DIRECTORY}/{devices[0]}"
    # A link that nobody keeps may lead to what has that number now; and in a container there may be
    # the link alone.
    is_links = os.path.exists(link) and os.path.realpath(link) == os.path.realpath(device)
    if is_links or not os.path.exists(device):
        return open_port(link if os.path.exists(link) else device)
    return open_port(device)


def kernel_names() -> dict[str, str]:
    """The names of this VM's virtio-serial ports, by device; without those that have none."""
    names = {}
    try:
        devices = os.listdir(KERNEL_DIRECTORY)
    except OSError:  # no such port at all, or no /sys
        return {}
    for device in devices:
        try:
            with open(f"{KERNEL_DIRECTORY}/{device}/name", encoding="utf-8", errors="replace") as f:
                name = f.read().strip()
        except OSError:  # no name; or it was just unplugged
            continue
        if name:
            names[device] = name
    return names


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


def session_maker(url: str) -> Callable[[Config, Callable[[int], bytes]], AnySession]:
    """What makes the session that is spoken on the port that `url` names."""
    if goes_one_way(url):
        from vchan.session.oneway import Reader

        return Reader
    return Session


class Port:
    """Keeps a session on the port, whatever happens to the port.

    Args:
        open_stream: Opens it; raises LinkError.
        log: Told what an operator may want to know, once for each change.
        hold: See `Link`.

    Attributes:
        on_message: See `Link`. To be set before it is opened.
    """

    def __init__(
        self,
        loop: Scheduler,
        open_stream: Callable[[], Stream],
        session: AnySession,
        on_event: Callable[[Event], object],
        log: Callable[[str], object],
        hold: Callable[[], bool] | None = None,
    ) -> None:
        self.on_message: Callable[[bytes], object] | None = None
        self._refill: Callable[[], object] | None = None
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
            on_message=self.on_message,
            hold=self._hold,
        )
        self.link.refill = self._refill

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

    def refill_with(self, refill: Callable[[], object]) -> None:
        """See `Link.refill`. Only where there is use for it: it costs something each write."""
        self._refill = refill
        if self.link is not None:
            self.link.refill = refill

    def wake(self) -> None:
        """Write soon what there is to write."""
        if self.link is not None:
            self.link.wake()

    def flush(self) -> None:
        """Write what is queued, as far as the port takes it."""
        if self.link is not None:
            self.link.flush()

    def close(self) -> None:
        """Close it for good."""
        if self._timer is not None:
            self._timer.cancel()
        if self.link is not None:
            self.link.close()
            self.link = None
