"""The frames that go out for every message: an acknowledgement, and a message to publish.

py-amqp writes all the others. These two are as it would write them, byte for byte, in a twentieth
of the time.

Rules of this file
1. Pure: no I/O, no clock, no logging.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

_END: Final = b"\xce"
_BASIC: Final = 60
_METHOD, _HEADER, _BODY = 1, 2, 3
_OVERHEAD: Final = 8
"""Bytes of a frame that are not its payload."""

_FRAME: Final = Struct(">BHI")
_ACK: Final = Struct(">BHIHHQBB")
_ACK_ID: Final = 80
_ACK_BYTES: Final = 13
_PUBLISH: Final = Struct(">HHH")
_PUBLISH_ID: Final = 40
_CONTENT: Final = Struct(">BHIHHQ")
_CONTENT_BYTES: Final = 12
_MANDATORY: Final = (b"\0", b"\1")
_FLAGS: Final = Struct(">H")
_ALWAYS: Final = 0xF800
_EXPIRATION: Final = 0x0100
_MESSAGE_ID: Final = 0x0080
_JSON: Final = b"\x10application/json\x05utf-8\0\0\0\0\x02\0"
"""What oslo.messaging says of each message: its type and encoding; no headers; persistent, and of
priority 0."""


def acknowledgement(channel: int, tag: int) -> bytes:
    """Basic.Ack of one delivery."""
    return _ACK.pack(_METHOD, channel, _ACK_BYTES, _BASIC, _ACK_ID, tag, 0, _END[0])


def _short(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return bytes((len(data),)) + data


def properties(*, expiration: str = "", message_id: str = "") -> bytes:
    """Those of a message of oslo.messaging's; "": it does not say."""
    flags, said = _ALWAYS, _JSON
    if expiration:
        flags, said = flags | _EXPIRATION, said + _short(expiration)
    if message_id:
        flags, said = flags | _MESSAGE_ID, said + _short(message_id)
    return _FLAGS.pack(flags) + said


def publication(
    channel: int,
    address: tuple[str, str],
    of_message: bytes,
    body: bytes,
    *,
    mandatory: bool,
    frame_max: int,
) -> bytes:
    """Basic.Publish, and the message.

    Args:
        address: Exchange and routing key, of at most 255 bytes each.
        of_message: Its `properties`.
        frame_max: Bytes of a frame.

    Raises:
        ValueError: A name is too long.
    """
    exchange, key = address
    method = _PUBLISH.pack(_BASIC, _PUBLISH_ID, 0) + _short(exchange) + _short(key)
    size, room = len(body), frame_max - _OVERHEAD
    parts = [
        _FRAME.pack(_METHOD, channel, len(method) + 1),
        method,
        _MANDATORY[mandatory],
        _END,
        _CONTENT.pack(_HEADER, channel, _CONTENT_BYTES + len(of_message), _BASIC, 0, size),
        of_message,
        _END,
    ]
    for at in range(0, size, room):
        chunk = body if size <= room else body[at : at + room]
        parts += (_FRAME.pack(_BODY, channel, len(chunk)), chunk, _END)
    return b"".join(parts)
