"""The messages of a VM's own queue, read in turns as its share of the daemon's time allows, whoever
wrote them: the guest asked for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

from vchan.host.vm.throttle import Throttle
from vchan.host.vm.upward import Upward
from vchan.io.link import TURN_S
from vchan.io.loop import Scheduler, Timer

HandleMessage = Callable[[Hashable, bytes, Callable[[], str | None]], str | None]
"""(token, body, work): see `channel.HandleMail`."""


class MailTurns:
    """One VM's.

    Args:
        throttle: Says how long to wait after a turn.
        upward: Has the mailbox, and is told what is in it.
        handle: Does the work for a message.
        turned: Called after each turn that was put off.
    """

    def __init__(
        self,
        loop: Scheduler,
        throttle: Throttle,
        upward: Upward,
        handle: HandleMessage,
        turned: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._throttle = throttle
        self._upward = upward
        self._handle = handle
        self._turned = turned
        self._is_planned = False
        self._timer: Timer | None = None

    def begin(self) -> None:
        """Something came: take a turn, unless one is to come."""
        if not self._is_planned:
            self._take_turn()

    def cancel(self) -> None:
        """No turn comes on time any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _take_turn(self) -> None:
        """Some messages, or a slice of a large one."""
        self._is_planned = False
        self._timer = None
        upward = self._upward
        spent, now_s = self._loop.spent, self._loop.time()
        began_s, began_bytes = spent(), upward.mailbox.worked
        took_s = 0.0
        problem: str | None = ""
        while upward.mailbox and took_s < TURN_S and problem is not None:
            token, body = upward.mailbox.first
            problem = self._handle(token, body, partial(upward.work, now_s))
            took_s = spent() - began_s
        wait_s = self._throttle.answered(upward.mailbox.worked - began_bytes, took_s, now_s)
        if upward.mailbox or wait_s > 0:
            self._is_planned = True
            if wait_s > 0:
                self._timer = self._loop.call_later(wait_s, self._take_turn_in_time)
            else:
                self._loop.call_soon(self._take_turn_in_time)

    def _take_turn_in_time(self) -> None:
        self._take_turn()
        self._turned()
