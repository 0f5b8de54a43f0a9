"""A guest that lies: frames that no honest session sends, sealed with the right key.

They go out behind what the guest's own session writes. The host must count a violation, forget the
session and greet anew; for everything else the promises hold. One that it believed instead shows
in `pairs`: the host then has what was never sent, or has let go what never arrived.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from tests.rig.stand_in import StandIn
from vchan.guest.port import Port
from vchan.session import MESSAGE_BYTES_MAX, STREAMS, Session, State
from vchan.wire import layout
from vchan.wire.frames import encode_frame

_WHOLE: Final = layout.FLAG_FIRST | layout.FLAG_LAST


class _Lies:
    """What can be said by the session as it is now. One frame each: of several, the channel may
    lose the last, and what the first was good for only its guest would suffer from."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def _data(self, flags: int, stream: int, total: int, payload: bytes) -> bytes:
        session = self._session
        return encode_frame(
            session._tx_key,
            layout.KIND_DATA,
            flags,
            stream,
            total,
            session._sender.tail,
            session._receiver.next,
            session._receiver.credit_told,
            payload,
        )

    def acknowledge_what_never_was(self, rng: random.Random) -> bytes:
        """More than the host can have sent by now."""
        session = self._session
        ack = session._receiver.next + rng.choice((1_000, 1_000_000))
        kind = rng.choice((layout.KIND_ACK, layout.KIND_PONG, layout.KIND_REWIND))
        key, told = session._tx_key, session._receiver.credit_told
        return encode_frame(key, kind, 0, 0, 0, session._sender.tail, ack, told, b"")

    def begin_too_large(self, _: random.Random) -> bytes:
        """A message over its limit."""
        return self._data(layout.FLAG_FIRST, 1, MESSAGE_BYTES_MAX + 1, b"x")

    def go_on_with_nothing(self, _: random.Random) -> bytes:
        """A fragment of no message."""
        return self._data(0, 2, 100, b"x")

    def use_a_stream_that_is_not(self, rng: random.Random) -> bytes:
        """There are STREAMS of them."""
        return self._data(rng.choice((_WHOLE, layout.FLAG_FIRST)), STREAMS, 100, b"x")

    def say_nothing(self, _: random.Random) -> bytes:
        """An empty message."""
        return self._data(_WHOLE, 1, 0, b"")


def lie(port: Port, rng: random.Random, said: Callable[[], object]) -> None:
    """Have a port's session end one of its next writes with a lie, unless `be_honest` comes first.

    Args:
        said: Called when it is handed to the stream.
    """
    session = be_honest(port)

    def lying(*args: Any, **kwargs: Any) -> bytes:
        data = session.data_to_send(*args, **kwargs)
        sender = session._sender
        is_open = session.state is State.OPEN and sender.cursor == sender.tail
        if not is_open or any(each.offset for each in sender._streams.values()):
            return data
        be_honest(port)
        said()
        lies = _Lies(session)
        choices = [each for name, each in sorted(vars(_Lies).items()) if not name.startswith("_")]
        told: bytes = rng.choice(choices)(lies, rng)
        return data + told

    _give(port, StandIn(session, data_to_send=lying))


def be_honest(port: Port) -> Session:
    """Forget a lie that has not been told."""
    session: Any = port._session
    if isinstance(session, StandIn):
        session = session.real
        _give(port, session)
    assert isinstance(session, Session)
    return session


def _give(port: Port, session: Any) -> None:
    port._session = session
    if port.link is not None:
        port.link.session = session
