"""The event loop where eventlet has replaced threads: a green thread runs it.

What waits for the loop's descriptors is eventlet's hub: an epoll is a descriptor itself, readable
when one of its own is ready. So the loop waits as every green thread does, and nothing crosses from
one native thread to another. Rules and methods are `Loop`'s.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import eventlet
import greenlet
from eventlet import hubs

from vchan.io.loop import EVENTS_MAX, Loop

if TYPE_CHECKING:
    from select import epoll  # eventlet takes it away from there


def green_loop() -> Loop:
    """For a green thread of the process that makes it."""
    pid = os.getpid()

    def wait(descriptors: epoll, for_s: float | None) -> list[tuple[int, int]]:
        """A green thread that a fork has copied ends: its descriptors are its parent's."""
        ready = descriptors.poll(0, EVENTS_MAX)
        if ready or for_s == 0:
            eventlet.sleep(0)  # the others' turn, however busy we are
        else:
            try:
                hubs.trampoline(descriptors.fileno(), read=True, timeout=for_s)
            except eventlet.Timeout:
                pass
            ready = descriptors.poll(0, EVENTS_MAX)
        if os.getpid() != pid:
            raise greenlet.GreenletExit
        return ready

    return Loop(wait)
