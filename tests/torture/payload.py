"""What messages carry: from 1 byte to 1 MiB, and each one's own.

Sender and number say the size and every byte, so nobody has to remember them.
"""

from __future__ import annotations

import zlib
from typing import Final

BYTES_MAX: Final = 1 << 20
RANGES: Final = (
    (3, 1, 1),
    (52, 2, 64),
    (30, 65, 4096),
    (12, 4097, 1 << 16),
    (2, 65537, BYTES_MAX - 1),
    (1, BYTES_MAX, BYTES_MAX),
)
"""(of a hundred messages, the least size, the largest): most are small, as in life; an emulated
guest takes half a second over the largest."""


def size_of(sender: str, number: int) -> int:
    """How many bytes a message carries: 1 to BYTES_MAX."""
    drawn = zlib.crc32(f"{sender}/{number}".encode())
    place, rest = drawn % 100, drawn // 100
    for share, low, high in RANGES:
        if place < share:
            return low + rest % (high - low + 1)
        place -= share
    raise AssertionError("the shares are not a hundred")


def payload_of(sender: str, number: int) -> str:
    """What a message carries: ASCII."""
    size = size_of(sender, number)
    pattern = f"{sender}/{number}|"
    return (pattern * (size // len(pattern) + 1))[:size]


def checksum(payload: str) -> int:
    """Of what was received."""
    return zlib.crc32(payload.encode())


def answer_to(sender: str, number: int) -> str:
    """What the answer to a call carries: of another size than the call."""
    return payload_of(f"answer to {sender}", number)


def answer_is_right(answer: object, sender: str, number: int) -> bool:
    """Whether this is the answer to that call, whole."""
    return answer == [sender, number, answer_to(sender, number)]
