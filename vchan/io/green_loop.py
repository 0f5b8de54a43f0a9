"""The event loop where eventlet has replaced threads: a green thread runs it.

What waits for the loop's descriptors is eventlet's hub: an epoll is a descriptor itself, readable
when one of its own is ready. So the loop waits as every green thread does, and nothing crosses from
one native thread to another. Rules and methods are `Loop`'s.
"""

from __future__ import annotations

import os

import eventlet
import greenlet
from eventlet import hubs

from vchan.io.loop import EVENTS_MAX, Loop


class GreenLoop(Loop):
    """For a green thread of the process that made it."""

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()

    def _ready(self, wait_s: float | None) -> list[tuple[int, int]]:
        """A green thread that a fork has copied ends: its descriptors are its parent's."""
        ready = self._epoll.poll(0, EVENTS_MAX)
        if ready or wait_s == 0:
            eventlet.sleep(0)  # the others' turn, however busy we are
        else:
            try:
                hubs.trampoline(self._epoll.fileno(), read=True, timeout=wait_s)
            except eventlet.Timeout:
                pass
            ready = self._epoll.poll(0, EVENTS_MAX)
        if os.getpid() != self._pid:
            raise greenlet.GreenletExit
        return ready
