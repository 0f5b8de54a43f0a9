"""oslo.messaging's wire envelope, which its requests and replies have in both directions.

Rules of this file
1. Pure: no I/O, no clock, no randomness.
2. Whatever the bytes, reading them raises `EnvelopeError` and nothing else, and is bounded.

    AMQP body   {"oslo.version": "2.0", "oslo.message": "<the message, as JSON again>"}

Version 1 of the envelope had no envelope: such bodies are the message itself, and are taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from vchan.errors import VchanError
from vchan.rpc.bodies import json_text
from vchan.rpc.messages import NAME_BYTES_MAX

REQUEST_BYTES_MAX: Final = 16 * 1024 * 1024
"""An AMQP body from a caller: RabbitMQ's own default limit since 4.0."""
DEPTH_MAX: Final = 100
"""Arrays and objects inside each other. Python's own parsers, the callers' among them, give up at
some 1000, less what is on the stack already: what passes here must not break a caller there."""
INT_DIGITS_MAX: Final = 309
"""Digits of an integer from a guest: as many as the largest float has. What they cost grows with
their square."""
_SHORT_CHARS: Final = NAME_BYTES_MAX // 4
"""Characters of a name that has no more than NAME_BYTES_MAX bytes, whatever they are."""
REASON_CHARS_MAX: Final = 200
"""What is wrong with a message, for the log: it may quote the message."""
_ascii = json.JSONEncoder(separators=(",", ":"))


class EnvelopeError(VchanError):
    """A message from the broker is not one of oslo.messaging's. The reason says how."""

    def __init__(self, reason: str) -> None:
        self.reason = reason[:REASON_CHARS_MAX]
        super().__init__(self.reason)


def open_envelope(body: bytes) -> dict[str, Any]:
    """The message in an AMQP body.

    Raises:
        EnvelopeError: There is none.
    """
    envelope = bounded_json(body, "the body", REQUEST_BYTES_MAX)
    if not isinstance(envelope, dict):
        raise EnvelopeError("the body is not a JSON object")
    if "oslo.message" not in envelope:
        return envelope
    version, text = envelope.get("oslo.version"), envelope["oslo.message"]
    if not isinstance(version, str) or version.partition(".")[0] != "2":
        raise EnvelopeError(f"oslo.version is {shortened(version)}: only 2.x is known")
    if not isinstance(text, str):
        raise EnvelopeError("oslo.message is not a string")
    message = _parse(text, "oslo.message")
    if not isinstance(message, dict):
        raise EnvelopeError("oslo.message is not a JSON object")
    return message


def close_envelope(message: Mapping[str, Any]) -> bytes:
    """The AMQP body that holds a message."""
    text = encode_json(message).decode()
    return encode_json({"oslo.version": "2.0", "oslo.message": text})


def name_of(message: Mapping[str, Any], key: str) -> str | None:
    """A string of at most NAME_BYTES_MAX bytes, or None if it is not there.

    Raises:
        EnvelopeError: It is something else.
    """
    value = message.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise EnvelopeError(f"{key} is {shortened(value)}, not a string")
    if len(value) > _SHORT_CHARS and len(value.encode("utf-8", "surrogatepass")) > NAME_BYTES_MAX:
        raise EnvelopeError(f"{key} is over {NAME_BYTES_MAX} bytes (NAME_BYTES_MAX)")
    return value


def bounded_json(
    data: bytes, what: str, bytes_max: int = REQUEST_BYTES_MAX, values_max: int | None = None
) -> Any:
    """JSON of a bounded size and depth.

    Args:
        values_max: What has more values is not even parsed: numbers, strings, lists, and objects'
            entries. Nor are integers over INT_DIGITS_MAX. None: any number, of any size.

    Raises:
        EnvelopeError: It is none. `what` is what the reason calls it.
    """
    if len(data) > bytes_max:
        raise EnvelopeError(f"{what} has {len(data)} bytes, {bytes_max} are allowed")
    if values_max is not None and _has_more_values(data, values_max):
        raise EnvelopeError(f"{what} has over {values_max} values (json_values)")
    try:
        # surrogatepass, because Python's own encoders write a lone surrogate that way.
        text = data.decode("utf-8", "surrogatepass")
    except ValueError as error:
        raise EnvelopeError(f"{what} is not JSON: {error}") from error
    is_plain = values_max is None or not _may_have_long_int(data)
    return _parse(text, what, _decode_json if is_plain else _decode_bounded)


def _decode_json(text: str) -> Any:
    """`json.loads` without what that looks for before, which takes as long again."""
    text = text.strip(_WHITE)
    try:
        value, end = _scan_once(text, 0)
    except StopIteration as error:
        raise json.JSONDecodeError("Expecting value", text, error.value) from None
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def _parse(text: str, what: str, decode: Callable[[str], Any] = _decode_json) -> Any:
    """JSON of a bounded depth.

    Raises:
        EnvelopeError: It is none.
    """
    try:
        value = decode(text)
    except RecursionError as error:
        raise EnvelopeError(f"{what} is nested over {DEPTH_MAX} deep") from error
    except ValueError as error:
        raise EnvelopeError(f"{what} is not JSON: {error}") from error
    # Cheap first: most messages have fewer brackets in all.
    if text.count("[") + text.count("{") > DEPTH_MAX and _deeper_than(value, DEPTH_MAX):
        raise EnvelopeError(f"{what} is nested over {DEPTH_MAX} deep")
    return value


_decoder: Final[Any] = json.JSONDecoder()
_scan_once: Final = _decoder.scan_once
_WHITE: Final = " \t\n\r"
_DIGITS: Final = re.compile(rb"[0-9]{10}")


def _may_have_long_int(data: bytes) -> bool:
    """A look at every 31st byte: of one digit more than are allowed, it sees ten. To be asked about
    each integer makes parsing slow; and an even step would take "0,0,0" for digits."""
    return _DIGITS.search(data[:: (INT_DIGITS_MAX + 1) // 10]) is not None


def _bounded_int(text: str) -> int:
    if len(text) > INT_DIGITS_MAX:
        raise ValueError(f"an integer of {len(text)} digits, {INT_DIGITS_MAX} are allowed")
    return int(text)


_decode_bounded: Final = json.JSONDecoder(parse_int=_bounded_int).decode


def _has_more_values(data: bytes, most: int) -> bool:
    """What a parser takes its time for. Told from what stands between values, in C and without
    parsing: 4 MiB of text take it a moment, of numbers and keys half a second."""
    if len(data) <= 2 * most or _separators(data) <= most:
        return False
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * most:  # two for a key, and two for its value
        return True
    outside_strings = plain.split(b'"')[::2]
    return sum(map(_separators, outside_strings)) > most


def _separators(data: bytes) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _deeper_than(value: object, depth_max: int) -> bool:
    """Level by level, and so without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth_max):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def encode_json(value: object) -> bytes:
    """Compact UTF-8 JSON, of what a parser made."""
    try:
        return json_text(value).encode()
    except UnicodeEncodeError:  # a lone surrogate: UTF-8 cannot say it, an escape can
        return _ascii.encode(value).encode()


def is_utf8(text: str) -> bool:
    """Whether it has no lone surrogate."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(value: object) -> str:
    """What a reason quotes of a value: not all of it."""
    return repr(value)[:40] if isinstance(value, str | int | float) else type(value).__name__


ID_PATTERN: Final = re.compile("[0-9a-f]{32}")
"""How oslo.messaging writes a message's id."""
