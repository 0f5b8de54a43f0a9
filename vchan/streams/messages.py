"""Messages of byte streams: a family of its own beside the requests' (`vchan.rpc.messages`).

Rules of this file
1. No I/O, no clock. Layouts come from `vchan.wire.layout`.
2. Bytes from a peer never raise: `decode` gives a `Malformed` that says what is wrong.

    both ends  <-- Offer -->   I take byte streams
    opener    --- Open --->    connect me to this target; or, with a tag: this one goes on here
    both ends  <-- Progress -->   so much of yours has arrived, so much you may send
    both ends  <-- Part --->   what a program wrote, at this offset
    both ends  <-- Reset -->   it is over before its end, and why
"""

from struct import Struct
from typing import Final, NamedTuple

from vchan.session import CONTROL, STREAMS
from vchan.wire import layout
from vchan.wire.frames import PAYLOAD_BYTES_MAX

ID_BYTES: Final = 16
"""A stream's id: random, chosen by its opener."""
TAG_BYTES: Final = 8
"""A stream's tag: random, chosen by the end that accepts it, for this one run of it."""
NO_TAG: Final = bytes(TAG_BYTES)
"""The tag of an Open that has not been accepted."""
TARGET_BYTES_MAX: Final = 1024
"""What a stream is to be connected to: a path and some words fit. At it: ValueError at the opener;
from a peer it is a bad message."""
FACTS_BYTES_MAX: Final = 1024
"""JSON that says who asks. At it: ValueError at the opener; from a peer it is a bad message."""
TEXT_BYTES_MAX: Final = 512
"""The text of a Reset. At it: the rest is cut."""

_OFFER: Final = Struct(layout.OFFER)
_OPEN: Final = Struct(layout.OPEN)
_PROGRESS: Final = Struct(layout.PROGRESS)
_PART: Final = Struct(layout.PART)
_RESET: Final = Struct(layout.RESET)

CHUNK_BYTES_MAX: Final = PAYLOAD_BYTES_MAX - _PART.size
"""Bytes of one message: it fits one frame, so that a request waits for one frame at most. At it:
the bytes go as several messages; from a peer it is a bad message."""

VERSION: Final = 1
"""The newest and (so far) the oldest version of this family that this code speaks."""
ASK: Final = layout.PROGRESS_FLAG_ASK
ANSWER: Final = layout.PROGRESS_FLAG_ANSWER
REWIND: Final = layout.PROGRESS_FLAG_REWIND
DONE: Final = layout.PROGRESS_FLAG_DONE
END: Final = layout.PART_FLAG_END

CLOSED: Final = layout.RESET_REASON_CLOSED
"""The program at the other end closed it before its end."""
REFUSED: Final = layout.RESET_REASON_REFUSED
"""A policy, or the guest's configuration, does not allow it."""
UNREACHABLE: Final = layout.RESET_REASON_UNREACHABLE
"""The target could not be connected to."""
BUSY: Final = layout.RESET_REASON_BUSY
"""Too many streams are open."""
FORGOTTEN: Final = layout.RESET_REASON_FORGOTTEN
"""The other end has lost its memory of it: it was restarted."""
VIOLATED: Final = layout.RESET_REASON_VIOLATED
"""The other end broke the protocol."""
SILENT: Final = layout.RESET_REASON_SILENT
"""The other end was asked and did not answer for too long."""
UNSUPPORTED: Final = layout.RESET_REASON_UNSUPPORTED
"""The other end takes no byte streams."""
RELEASED: Final = layout.RESET_REASON_RELEASED
"""The VM has ended."""


class StreamOffer(NamedTuple):
    """Its sender takes byte streams of these versions of the family."""

    version_min: int
    version_max: int


class Open(NamedTuple):
    """Connect a stream to `target`, or go on with one that was."""

    id: bytes
    tag: bytes
    received: int
    credit: int
    target: str
    facts: str


class Progress(NamedTuple):
    """How far one end has come. Offsets count from the stream's start."""

    flags: int
    id: bytes
    tag: bytes
    received: int
    credit: int


class Part(NamedTuple):
    """A part of what one end's program wrote; with END, the last."""

    flags: int
    id: bytes
    tag: bytes
    offset: int
    data: bytes


class Reset(NamedTuple):
    """The stream is over, and why."""

    reason: int
    id: bytes
    text: str


class Malformed(NamedTuple):
    """Bytes that are no message of this family, and why."""

    reason: str


StreamMessage = StreamOffer | Open | Progress | Part | Reset

OFFSET_MAX: Final = 2**63 - 1
"""Bytes one way of a stream. A peer that counts further sends bad messages: sums of two offsets
stay below 64 bits."""


def is_of_family(data: bytes) -> bool:
    """Whether a message is a byte stream's, without a look into it."""
    return layout.BYTE_STREAM_OFFER <= data[0] <= layout.BYTE_STREAM_RESET


def session_stream(data: bytes) -> int:
    """The session's stream for a message: all of one byte stream on one, so that they stay in
    order; never the one for what must go first."""
    if data[0] == layout.BYTE_STREAM_OFFER:
        return CONTROL
    first = data[1] if data[0] == layout.BYTE_STREAM_OPEN else data[2]
    return 1 + first % (STREAMS - 1)


def encode(message: StreamMessage) -> bytes:
    """The bytes of a message. The texts of an Open are within their limits."""
    match message:
        case Part(flags, stream, tag, offset, data):
            assert len(data) <= CHUNK_BYTES_MAX
            return _PART.pack(layout.BYTE_STREAM_PART, flags, stream, tag, offset) + data
        case Progress():
            return _PROGRESS.pack(layout.BYTE_STREAM_PROGRESS, *message)
        case Open(stream, tag, received, credit, target, facts):
            named, about = target.encode(), facts.encode()
            assert len(named) <= TARGET_BYTES_MAX and len(about) <= FACTS_BYTES_MAX
            numbers = (received, credit, len(named), len(about))
            return _OPEN.pack(layout.BYTE_STREAM_OPEN, stream, tag, *numbers) + named + about
        case Reset(reason, stream, text):
            cut = text.encode()[:TEXT_BYTES_MAX].decode("utf-8", "ignore").encode()
            return _RESET.pack(layout.BYTE_STREAM_RESET, reason, stream) + cut
        case StreamOffer():
            return _OFFER.pack(layout.BYTE_STREAM_OFFER, *message)


def decode(data: bytes) -> StreamMessage | Malformed:
    """The message in `data`."""
    kind = data[0] if data else 0
    if kind == layout.BYTE_STREAM_PART and len(data) >= _PART.size:
        return _decode_part(data)
    if kind == layout.BYTE_STREAM_PROGRESS and len(data) == _PROGRESS.size:
        state = Progress(*_PROGRESS.unpack(data)[1:])
        if state.tag == NO_TAG or not _can_be(state):
            return Malformed("Progress: without a tag, or an offset above OFFSET_MAX")
        return state
    if kind == layout.BYTE_STREAM_OPEN and len(data) >= _OPEN.size:
        return _decode_open(data)
    if kind == layout.BYTE_STREAM_RESET and len(data) >= _RESET.size:
        _, reason, stream = _RESET.unpack_from(data)
        text = data[_RESET.size : _RESET.size + TEXT_BYTES_MAX].decode("utf-8", "replace")
        return Reset(reason, stream, text)
    if kind == layout.BYTE_STREAM_OFFER and len(data) >= _OFFER.size:
        return StreamOffer(*_OFFER.unpack_from(data)[1:])
    return Malformed(f"kind {kind}, {len(data)} bytes: no message of byte streams")


def _can_be(message: Open | Progress) -> bool:
    return max(message.received, message.credit) <= OFFSET_MAX


def _decode_part(data: bytes) -> Part | Malformed:
    _, flags, stream, tag, offset = _PART.unpack_from(data)
    body = data[_PART.size :]
    if len(body) > CHUNK_BYTES_MAX:
        return Malformed(f"Part: {len(body)}, CHUNK_BYTES_MAX is {CHUNK_BYTES_MAX}")
    if tag == NO_TAG or not (body or flags & END):
        return Malformed("Part: without a tag, or none and no END")
    if offset + len(body) > OFFSET_MAX:
        return Malformed("Part: an offset above OFFSET_MAX")
    return Part(flags, stream, tag, offset, body)


def _decode_open(data: bytes) -> Open | Malformed:
    _, stream, tag, received, credit, target_bytes, facts_bytes = _OPEN.unpack_from(data)
    if not 0 < target_bytes <= TARGET_BYTES_MAX or facts_bytes > FACTS_BYTES_MAX:
        return Malformed("Open: without a target, or a text above its limit")
    middle = _OPEN.size + target_bytes
    if len(data) != middle + facts_bytes:
        return Malformed("Open: not as long as its texts")
    try:
        target, facts = data[_OPEN.size : middle].decode(), data[middle:].decode()
    except UnicodeDecodeError:
        return Malformed("Open: a text is not UTF-8")
    opened = Open(stream, tag, received, credit, target, facts)
    return opened if _can_be(opened) else Malformed("Open: an offset above OFFSET_MAX")
