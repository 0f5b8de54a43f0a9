"""Tells the service manager how we are: systemd's notification protocol, by hand.

    manager = ServiceManager(loop)
    manager.ready("serving")     # from here on the loop feeds the watchdog
    manager.stopping()

Without a service manager, each of these does nothing. The environment is cleared of what was meant
for us, so that nobody we start speaks in our name.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Final

from vchan.io.loop import Loop, Timer
from vchan.io.unix_socket import SOCK_DGRAM, UnixSocket

FEEDS_PER_TIMEOUT: Final = 3
"""The watchdog is fed so often within its time-out: one feed may come late, or get lost."""

_PATH: Final = "NOTIFY_SOCKET"
_TIMEOUT: Final = "WATCHDOG_USEC"
_PID: Final = "WATCHDOG_PID"


class ServiceManager:
    """The service manager that started this process, or nobody.

    Args:
        loop: Feeds the watchdog: when it stands still, the manager starts us anew.
        environment: Where the manager said how it is reached.
    """

    def __init__(
        self, loop: Loop, environment: MutableMapping[str, str] = os.environ, pid: int = 0
    ) -> None:
        self._loop = loop
        self._path = environment.pop(_PATH, "")
        self._feed_s = _feed_s(environment, pid or os.getpid())
        self._timer: Timer | None = None

    def ready(self, status: str) -> None:
        """Say that start-up, or a reload, is over; `status` is shown by `systemctl status`."""
        self._send(f"READY=1\nSTATUS={status}")
        if self._feed_s and self._timer is None:
            self._feed()

    def status(self, text: str) -> None:
        """Show this line in `systemctl status`."""
        self._send(f"STATUS={text}")

    def stopping(self) -> None:
        """Say that the process is about to end. The watchdog still watches."""
        self._send("STOPPING=1")

    def _feed(self) -> None:
        self._send("WATCHDOG=1")
        self._timer = self._loop.call_later(self._feed_s, self._feed)

    def _send(self, state: str) -> None:
        if not self._path:
            return
        # "@" stands for the zero byte of a name in Linux's abstract namespace.
        address = "\0" + self._path[1:] if self._path[0] == "@" else self._path
        try:
            with UnixSocket(SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(state.encode(), address)
        except OSError:
            pass  # the manager is away or busy: that is no reason to stop serving


def _feed_s(environment: MutableMapping[str, str], pid: int) -> float:
    """Seconds between feeds; 0: nobody watches us."""
    timeout_us = environment.pop(_TIMEOUT, "")
    watched = environment.pop(_PID, "") or str(pid)
    if not timeout_us.isdecimal() or watched != str(pid):
        return 0.0
    return int(timeout_us) / 1_000_000 / FEEDS_PER_TIMEOUT
