"""A VM's own queue, without the time that reading from it takes."""

from __future__ import annotations

from collections.abc import Hashable

from vchan.host.vm.upward import Upward


def take_mail(upward: Upward, token: Hashable, body: bytes, now_s: float) -> str:
    """Have a message of the queue read whole. Returns what is wrong with it, or ""."""
    assert not upward.mailbox
    upward.mailbox.put(token, body)
    problem = None
    while problem is None:
        problem = upward.work(now_s)
    return problem
