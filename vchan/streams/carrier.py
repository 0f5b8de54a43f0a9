"""What carries byte streams' messages on a session: no more at a time than it can send soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vchan.session import AnySession, State
from vchan.streams.messages import session_stream

QUEUED_BYTES_MAX: Final = 32 * 1024
"""Bytes of a session's backlog beside which another message of byte streams is queued: one write.
At it: the messages wait at their stream, and requests go before them."""


def fill(session: AnySession, next_message: Callable[[], bytes | None]) -> bool:
    """Queue messages on a session, if it is open, as far as there is room; whether there were any.

    Args:
        next_message: The next one, if there is one: see `StreamEnds` and `Switchboard`.
    """
    has_queued = False
    if session.state is not State.OPEN:
        return has_queued
    while session.backlog_bytes < QUEUED_BYTES_MAX and (message := next_message()) is not None:
        session.send(message, session_stream(message))
        has_queued = True
    return has_queued
