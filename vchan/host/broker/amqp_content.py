"""What the broker's frames say, read without trust: methods' arguments, and messages' headers.

Whoever may publish may put any bytes into a message's properties, headers and routing key, and the
broker hands them out as they are. Here nothing of that raises: what is needed is read from the raw
bytes, what is not needed is not decoded, and what cannot be read is a `problem` of that message.

Rules of this file
1. Pure: no I/O, no clock, no logging.
2. What a *publisher* wrote never raises. What the *broker* itself writes and is malformed (a frame
   too short for what must be in it) raises `MalformedFrame`: the connection cannot be trusted any
   more.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, NamedTuple

HEADERS_MAX: Final = 64
"""Headers of a message that are looked at: stock ones have one or two; the broker adds some."""

_KNOWN_MAX: Final = 64
"""Properties that are remembered: a stock client says the same of all its messages."""
_KNOWN_BYTES_MAX: Final = 256
"""The longest of these."""

_CONTENT_HEADER: Final = struct.Struct(">HHQ")  # class, weight, the body's size
_CONTENT_HEADER_BYTES: Final = _CONTENT_HEADER.size
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")

# By property flag, in the order in which AMQP 0-9-1 lays properties out.
_PROPERTIES: Final = (
    (0x8000, "content_type", "s"),
    (0x4000, "content_encoding", "s"),
    (0x2000, "headers", "F"),
    (0x1000, "delivery_mode", "o"),
    (0x0800, "priority", "o"),
    (0x0400, "correlation_id", "s"),
    (0x0200, "reply_to", "s"),
    (0x0100, "expiration", "s"),
    (0x0080, "message_id", "s"),
)
"""As far as we need any: those behind it are left alone."""
_WANTED: Final = frozenset({"expiration", "message_id"})
_EXPIRATION: Final = 0x0100

# A header's value: the bytes that each type takes. RabbitMQ's reading of the types, as it sends
# them: https://www.rabbitmq.com/amqp-0-9-1-errata
_FIXED: Final[Mapping[int, int]] = {
    ord("t"): 1,
    ord("b"): 1,
    ord("B"): 1,
    ord("s"): 2,
    ord("u"): 2,
    ord("U"): 2,
    ord("I"): 4,
    ord("i"): 4,
    ord("f"): 4,
    ord("l"): 8,
    ord("L"): 8,
    ord("d"): 8,
    ord("T"): 8,
    ord("D"): 5,
    ord("V"): 0,
}
_SIZED: Final = frozenset(b"SxAF")
"""Types whose value begins with its size: what is in them is not looked at."""
_SIGNED: Final = frozenset(b"bsIlL")
_UNSIGNED: Final = frozenset(b"BuiT")
_TEXT: Final = ord("S")


class MalformedFrame(Exception):
    """The broker sent a frame that is none."""


_NO_HEADERS: Final[Mapping[str, str | int]] = MappingProxyType({})


class Properties(NamedTuple):
    """What we need of a message's properties.

    Attributes:
        headers: Texts and integers among the headers, as far as they could be read.
        problem: Why `expiration` is not known, or "".
    """

    expiration: str | None = None
    message_id: str | None = None
    headers: Mapping[str, str | int] = _NO_HEADERS
    problem: str = ""

    @property
    def delivery_count(self) -> int:
        """How often a quorum queue has taken the message back, by its own word."""
        count = self.headers.get("x-delivery-count", 0)
        return count if isinstance(count, int) and count > 0 else 0


class _Short(Exception):
    """The bytes end before the value does."""


class _Reader:
    """Bytes, from front to back."""

    def __init__(self, data: bytes, at: int = 0, end: int | None = None) -> None:
        self.data = data
        self.at = at
        self.end = len(data) if end is None else end

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > self.end:
            raise _Short
        return self.data[start : self.at]

    def number(self, layout: struct.Struct) -> int:
        value: int = layout.unpack(self.take(layout.size))[0]
        return value

    def short_text(self) -> str:
        return _text(self.take(self.take(1)[0]))

    def sized(self) -> bytes:
        return self.take(self.number(_U32))


def _text(data: bytes) -> str:
    """Nothing says that a publisher's text is UTF-8. What is not, stays distinct and can be encoded
    again."""
    return data.decode("utf-8", "surrogateescape")


def body_size(header: bytes) -> int:
    """The size of the body that follows a content header.

    Raises:
        MalformedFrame: It is no content header.
    """
    if len(header) < _CONTENT_HEADER.size:
        raise MalformedFrame(f"a content header of {len(header)} bytes")
    size: int = _CONTENT_HEADER.unpack_from(header)[2]
    return size


def read_properties(header: bytes) -> Properties:
    """What we need of a content header. Never raises, whatever is in it."""
    data = header[_CONTENT_HEADER_BYTES:]
    return _known(data) if len(data) <= _KNOWN_BYTES_MAX else _read(data)


def _read(data: bytes) -> Properties:
    reader = _Reader(data)
    found: dict[str, Any] = {}
    flags = _EXPIRATION  # until it is known to be absent
    try:
        flags = word = reader.number(_U16)
        while word & 1:  # more flags follow, of properties that AMQP 0-9-1 does not have
            word = reader.number(_U16)
        for flag, name, kind in _PROPERTIES:
            if not flags & flag:
                continue
            if kind == "s":
                text = reader.short_text()
                if name in _WANTED:
                    found[name] = text
            elif kind == "o":
                reader.take(1)
            else:
                found[name] = _headers(reader.sized())
    except _Short:
        pass
    is_known = "expiration" in found or not flags & _EXPIRATION
    return Properties(**found, problem="" if is_known else "its properties end too early")


_known: Final = lru_cache(_KNOWN_MAX)(_read)


def _headers(table: bytes) -> dict[str, str | int]:
    """Up to the first one that cannot be read: what is behind it cannot be found."""
    reader, found = _Reader(table), dict[str, str | int]()
    try:
        for _ in range(HEADERS_MAX):
            if reader.at >= reader.end:
                break
            name, kind = reader.short_text(), reader.take(1)[0]
            if kind in _SIZED:
                value = reader.sized()
                if kind == _TEXT:
                    found[name] = _text(value)
                continue
            size = _FIXED.get(kind)
            if size is None:
                break
            value = reader.take(size)
            if kind in _SIGNED or kind in _UNSIGNED:
                found[name] = int.from_bytes(value, "big", signed=kind in _SIGNED)
    except _Short:
        pass
    return found


def read_arguments(layout: str, payload: bytes) -> list[Any]:
    """A method's arguments, which begin behind its class and number.

    Args:
        layout: "B" 16, "l" 32, "L" 64 bits, "s" a short text, "t" one for people, "b" one bit.

    Raises:
        MalformedFrame: The payload is too short.
    """
    values: list[Any] = []
    at, bits, left = 4, 0, 0
    try:
        for kind in layout:
            if kind == "b":
                if not left:
                    bits, left = payload[at], 8
                    at += 1
                values.append(bool(bits & 1))
                bits, left = bits >> 1, left - 1
                continue
            left = 0
            if kind in _TEXTS:
                start, at = at + 1, at + 1 + payload[at]
                values.append(payload[start:at].decode("utf-8", _TEXTS[kind]))
            else:
                number = _NUMBERS[kind]
                values.append(number.unpack_from(payload, at)[0])
                at += number.size
    except (IndexError, struct.error):
        at = len(payload) + 1
    if at > len(payload):
        method = payload[:4].hex()
        raise MalformedFrame(f"method {method} of {len(payload)} bytes, {layout!r} expected")
    return values


_NUMBERS: Final = {"B": _U16, "l": _U32, "L": _U64}
_TEXTS: Final = {"s": "surrogateescape", "t": "replace"}
"""How a text is read that is no UTF-8: what names something stays distinct, see `_text`; what is
for people to read may have been cut within a character."""
