"""Frames: what crosses a channel, checked and numbered; and greetings, the frames of the handshake.

Rules of this file
1. No I/O, no clock, no randomness, no logging.
2. Bytes from a peer never raise here. What is no frame is skipped and counted.
3. Every layout comes from `vchan.wire.layout`, which is generated from `vchan.protocol`.

A frame is a header with its own CRC (so a damaged length never makes the decoder wait for
bytes that do not come), a payload, and the payload's CRC. Both CRCs are seeded with the key of
the session, so bytes that were chosen before the session began cannot become a frame in it.
Greetings alone are unseeded. On a stream that loses nothing both ends can agree to do without the
payload's CRC: it is half of what a large frame costs.
"""

from struct import Struct
from typing import Final, NamedTuple
from zlib import crc32

from vchan.wire import layout
from vchan.wire.value import Value

_HEADER: Final = Struct(layout.FRAME_HEADER)
_CRC: Final = Struct(layout.CRC)
_GREETING: Final = Struct(layout.GREETING)
_FEATURES: Final = Struct(layout.FEATURES)

HEADER_BYTES: Final = _HEADER.size + _CRC.size
"""A frame's fixed part, with its own CRC."""
OVERHEAD_BYTES: Final = HEADER_BYTES + _CRC.size
"""What a frame costs beyond its payload."""
FRAME_BYTES_MAX: Final = 16 * 1024
"""Half of a virtio-console write (32 KiB), so that writes are whole frames, and a large message
never delays a small one by more than this. At it: messages are cut into frames."""
FRAME_BYTES_MIN: Final = 2 * 1024
"""A peer must take at least this: a greeting and a fragment worth its header."""
PAYLOAD_BYTES_MAX: Final = FRAME_BYTES_MAX - OVERHEAD_BYTES
"""What one frame carries of a message."""
LOCAL_FRAME_BYTES_MAX: Final = 96 * 1024
"""On local sockets, whose other end reads at once: 64 KiB, with what stands around them, are one
frame, and two may be in flight. At it: messages are cut into frames."""

RAW_BODIES: Final = layout.FEATURE_RAW_BODIES
"""Of a greeting: its sender takes calls whose bodies are bytes."""
RAW_CASTS: Final = layout.FEATURE_RAW_CASTS
"""Of a greeting: its sender takes casts of that kind, too."""
RAW_REQUESTS: Final = RAW_BODIES | RAW_CASTS
PLAIN_PAYLOADS: Final = layout.FEATURE_PLAIN_PAYLOADS
"""Of a greeting: its sender does without payloads' CRC, for the stream loses nothing."""
BYTE_STREAMS: Final = layout.FEATURE_BYTE_STREAMS
"""Of a greeting: its sender takes byte streams (`vchan.streams`)."""

GREETING_BYTES_MAX: Final = 1024
"""The payload of a greeting. What passes for one inside a torn payload can swallow no more than
this of what follows."""

FLUSH: Final = bytes(FRAME_BYTES_MAX)
"""Sent first on every stream that is opened: it completes whatever frame the stream's former
user left torn into one whose CRC fails. It holds no MAGIC."""

ZERO_ID: Final = bytes(16)

_MAGIC: Final = layout.MAGIC
_LAYOUT: Final = layout.LAYOUT
_CRC_BYTES: Final = _CRC.size
_BODY_BYTES: Final = _HEADER.size
_NO_CRC: Final = bytes(_CRC.size)

# Final, so that compiled code does not look for them by name.
_pack_header: Final = _HEADER.pack
_unpack_header: Final = Struct(layout.FRAME_HEADER + layout.CRC.lstrip(">")).unpack_from
_crc32: Final = crc32

_Header = tuple[bytes, int, int, int, int, int, int, int, int, int, int]
"""The fields of FRAME_HEADER, and its CRC."""


class Key(NamedTuple):
    """Seeds of the two CRCs of one direction of one session."""

    header_seed: int
    payload_seed: int
    is_plain: bool = False
    """The payload's CRC is 0, and not looked at."""


NO_KEY: Final = Key(0, 0)
"""What greetings are sealed with."""


def session_keys(host_nonce: bytes, guest_nonce: bytes) -> tuple[Key, Key]:
    """The keys (host to guest, guest to host) of a session.

    Not cryptography: both daemons are trusted with it, and nobody else sees it. It keeps bytes
    that somebody placed in a payload from passing as frames, and each end contributes 128 bits, so
    that a guest cloned with its random numbers still gets keys of its own.

    Args:
        host_nonce: 16 bytes, fresh.
        guest_nonce: 16 bytes, fresh.
    """
    mixed = int.from_bytes(host_nonce, "big") ^ int.from_bytes(guest_nonce, "big")
    words = [(mixed >> shift) & 0xFFFFFFFF for shift in (96, 64, 32, 0)]
    return Key(words[0], words[1]), Key(words[2], words[3])


class Frame(Value):
    """One frame, as it came out of the decoder.

    Attributes:
        candidate: True when sealed with the decoder's candidate key.
    """

    __slots__ = (
        "ack",
        "candidate",
        "credit",
        "flags",
        "kind",
        "payload",
        "seq",
        "stream",
        "total",
    )

    def __init__(
        self,
        kind: int,
        flags: int,
        stream: int,
        total: int,
        seq: int,
        ack: int,
        credit: int,
        payload: bytes,
        candidate: bool,
    ) -> None:
        self.kind = kind
        self.flags = flags
        self.stream = stream
        self.total = total
        self.seq = seq
        self.ack = ack
        self.credit = credit
        self.payload = payload
        self.candidate = candidate

    def fields(self) -> tuple[int, int, int, int, int, int, int, bytes, bool]:
        numbers = (self.kind, self.flags, self.stream, self.total, self.seq, self.ack, self.credit)
        return (*numbers, self.payload, self.candidate)


def encode_frame(
    key: Key,
    kind: int,
    flags: int,
    stream: int,
    total: int,
    seq: int,
    ack: int,
    credit: int,
    payload: bytes,
) -> bytes:
    """One frame, sealed with `key`. The payload is as large as the peer takes it."""
    header = _pack_header(
        _MAGIC, _LAYOUT, kind, flags, stream, len(payload), total, seq, ack, credit
    )
    header_crc = _crc32(header, key[0])
    sealed = _NO_CRC if key[2] else _crc_bytes(_crc32(payload, header_crc ^ key[1]))
    return b"".join((header, _crc_bytes(header_crc), payload, sealed))


def _crc_bytes(crc: int) -> bytes:
    """As `layout.CRC` has it. (Compiled, a Struct takes three times as long.)"""
    return crc.to_bytes(_CRC_BYTES, "big")


def _is_greeting(kind: int) -> bool:
    return layout.KIND_HELLO <= kind <= layout.KIND_REFUSE


class Decoder:
    """Turns a byte stream, in any chunks and with any damage, into frames.

    Holds at most one frame's worth of bytes. Skips to the next frame that checks out and counts
    what it skipped.

    Args:
        frame_bytes_max: What is longer is no frame.
    """

    __slots__ = (
        "_chunks",
        "_held",
        "_need",
        "_payload_bytes_max",
        "bad_payloads",
        "bytes_skipped",
        "candidate",
        "key",
        "stopped",
    )

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._payload_bytes_max = frame_bytes_max - OVERHEAD_BYTES
        self.key: Key | None = None
        self.candidate: Key | None = None
        self.stopped = False  # behind a frame that may change the keys: there may be more
        self.bytes_skipped = 0
        self.bad_payloads = 0
        self._chunks: list[bytes] = []
        self._held = 0
        self._need = HEADER_BYTES

    def reset(self) -> None:
        """Forget keys and any partial frame: the stream is a new one."""
        self.key = None
        self.candidate = None
        self.stopped = False
        self._chunks.clear()
        self._held = 0
        self._need = HEADER_BYTES

    @property
    def wanted_bytes(self) -> int:
        """So many complete the header or the frame that has begun: nothing is done before."""
        return self._need - self._held

    def receive_data(self, data: bytes) -> list[Frame]:
        """Take the next bytes of the stream; return the frames they complete.

        Stops behind a frame that may change the keys (a greeting, or one sealed with the
        candidate): while `stopped`, call again with no data.
        """
        self.stopped = False
        if self._chunks or len(data) < self._need:
            if data:
                self._chunks.append(data)
                self._held += len(data)
            if self._held < self._need:
                return []
            data = b"".join(self._chunks)
            self._chunks.clear()
            self._held = 0
        return self._scan(data)

    def _scan(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        position = 0
        end = len(data)
        while True:
            if end - position < HEADER_BYTES:
                self._need = HEADER_BYTES
                break
            fields: _Header = _unpack_header(data, position)
            magic, version, kind, flags, stream, length, total, seq, ack, credit, crc = fields
            if magic != _MAGIC:
                position = self._skip(data, position)
                continue
            header = data[position : position + _BODY_BYTES]
            key = None if _is_greeting(kind) else self.key
            is_usual = key is not None and _crc32(header, key[0]) == crc
            if not is_usual:
                key = self._other_key(header, crc, kind)
            if (
                key is None
                or version != _LAYOUT
                or length > (GREETING_BYTES_MAX if key is NO_KEY else self._payload_bytes_max)
            ):
                position = self._skip(data, position)
                continue
            start = position + HEADER_BYTES
            stop = start + length
            if end < stop + _CRC_BYTES:
                self._need = stop + _CRC_BYTES - position
                break
            payload = data[start:stop]
            if not key[2] and data[stop : stop + _CRC_BYTES] != _crc_bytes(
                _crc32(payload, crc ^ key[1])
            ):
                self.bad_payloads += 1
                position = self._skip(data, position)
                continue
            is_candidate = not is_usual and key is not NO_KEY
            frames.append(
                Frame(kind, flags, stream, total, seq, ack, credit, payload, is_candidate)
            )
            position = stop + _CRC_BYTES
            if not is_usual:
                self.stopped = True
                self._need = HEADER_BYTES
                break
        if position < end:
            self._chunks.append(data[position:])
            self._held = end - position
            assert self.stopped or self._held < self._need, "only what is incomplete is held"
        return frames

    def _other_key(self, header: bytes, crc: int, kind: int) -> Key | None:
        """The key, not the one in force, that a header was sealed with: a greeting's, or the
        candidate."""
        key = NO_KEY if _is_greeting(kind) else self.candidate
        return key if key is not None and _crc32(header, key[0]) == crc else None

    def _skip(self, data: bytes, position: int) -> int:
        """The place of the next MAGIC after `position`, or of what may be its beginning."""
        found = data.find(_MAGIC, position + 1)
        if found < 0:
            found = len(data)
            for size in range(len(_MAGIC) - 1, 0, -1):
                if data.endswith(_MAGIC[:size]):
                    found -= size
                    break
        assert found > position, "the same bytes would be looked at for ever"
        self.bytes_skipped += found - position
        return found


class Greeting(NamedTuple):
    """What HELLO and WELCOME say. See `docs/protocol.md`."""

    version_min: int
    version_max: int
    role: int
    instance: bytes
    nonce: bytes
    echo: bytes
    session: bytes
    recv_next: int
    send_base: int
    send_next: int
    credit: int
    frame_bytes_max: int
    message_bytes_max: int
    reassembly_bytes_max: int
    name: str
    attached: str
    features: int = 0

    def encode(self) -> bytes:
        """The payload of a HELLO or WELCOME. Names are cut to 255 bytes of UTF-8."""
        head = _GREETING.pack(*self[:-3])
        features = _FEATURES.pack(self.features) if self.features else b""
        return head + _encode_name(self.name) + _encode_name(self.attached) + features


def decode_greeting(payload: bytes) -> Greeting | None:
    """The greeting in `payload`, or None if it is none. Bytes after it are ignored: a later
    version may add fields."""
    if len(payload) < _GREETING.size:
        return None
    fields = _GREETING.unpack_from(payload)
    name, position = _decode_name(payload, _GREETING.size)
    attached, position = _decode_name(payload, position)
    if name is None or attached is None:
        return None
    features = 0
    if len(payload) >= position + _FEATURES.size:
        (features,) = _FEATURES.unpack_from(payload, position)
    return Greeting._make((*fields, name, attached, features))


def _encode_name(name: str) -> bytes:
    raw = name.encode("utf-8", "replace")[:255]
    raw = raw.decode("utf-8", "ignore").encode()
    return bytes((len(raw),)) + raw


def _decode_name(payload: bytes, position: int) -> tuple[str | None, int]:
    if position >= len(payload):
        return None, position
    stop = position + 1 + payload[position]
    if stop > len(payload):
        return None, position
    try:
        return payload[position + 1 : stop].decode(), stop
    except UnicodeDecodeError:
        return None, position
