"""Messages in a stream of bytes: a kind, a length, a payload. Sans I/O.

     0        1                 5
    +--------+-----------------+---------------------- - -
    | kind   | length, 4 bytes | payload: length bytes
    +--------+-----------------+---------------------- - -

The length is big-endian, as all numbers are. Nothing that a peer sends has a reader keep more than
one message, and a length that is too great is refused before its payload comes.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

PAYLOAD_BYTES_MAX: Final = 64 * 1024
"""Of one message of a service. At it: more data go in more messages; a peer's is refused
(BadFrame), and the stream with it."""

_HEADER: Final = struct.Struct(">BI")


class BadFrame(Exception):
    """The peer has sent what none of good will sends. Its stream is over."""


class ServiceFrame(NamedTuple):
    """One message: what its kind means, the service says."""

    kind: int
    payload: bytes = b""


def encode_frame(kind: int, payload: bytes = b"") -> bytes:
    """A message's bytes."""
    assert 0 <= kind < 256 and len(payload) <= PAYLOAD_BYTES_MAX
    return _HEADER.pack(kind, len(payload)) + payload


class FrameReader:
    """The peer's messages, out of bytes as they come."""

    def __init__(self) -> None:
        self._rest = bytearray()

    @property
    def has_rest(self) -> bool:
        """A message has begun and is not whole: the end of the stream here is no good one."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[ServiceFrame]:
        """Take bytes; give the messages that they complete.

        Raises:
            BadFrame: One is too long. Those before it are lost, too: the stream is to be reset.
        """
        rest = self._rest
        rest += data
        frames = []
        at = 0
        while len(rest) - at >= _HEADER.size:
            kind, length = _HEADER.unpack_from(rest, at)
            if length > PAYLOAD_BYTES_MAX:
                limit = f"{PAYLOAD_BYTES_MAX} (PAYLOAD_BYTES_MAX)"
                raise BadFrame(f"a message of kind {kind} has {length} bytes; at most {limit}")
            end = at + _HEADER.size + length
            if len(rest) < end:
                break
            frames.append(ServiceFrame(kind, bytes(rest[at + _HEADER.size : end])))
            at = end
        del rest[:at]
        return frames
