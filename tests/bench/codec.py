"""What one frame costs on this machine: construct, interpreted and compiled, and our codec."""

import time
from collections.abc import Callable
from zlib import crc32

from vchan import protocol
from vchan.wire.frames import Decoder, Key, encode_frame
from vchan.wire.layout import KIND_DATA

PAYLOAD = bytes(range(64))
KEY = Key(0x01234567, 0x89ABCDEF)
NUMBERS = {"seq": 7, "ack": 5, "credit": 262144}


def encode_with(build: Callable[..., bytes]) -> bytes:
    """A frame, encoded by the definition."""
    header = build(
        {
            "layout": protocol.LAYOUT,
            "kind": "DATA",
            "flags": {"FIRST": True, "LAST": True},
            "stream": 3,
            "length": len(PAYLOAD),
            "total": len(PAYLOAD),
            **NUMBERS,
        }
    )
    header_crc = crc32(header, KEY.header_seed)
    payload_crc = crc32(PAYLOAD, header_crc ^ KEY.payload_seed)
    crcs = (crc.to_bytes(4, "big") for crc in (header_crc, payload_crc))
    return b"".join((header, next(crcs), PAYLOAD, next(crcs)))


def decode_with(parse: Callable[[bytes], object], frame: bytes) -> object:
    """A frame, decoded and checked by the definition."""
    size = protocol.FrameHeader.sizeof()
    header = parse(frame)
    header_crc = crc32(frame[:size], KEY.header_seed)
    payload = frame[size + 4 : -4]
    assert header_crc.to_bytes(4, "big") == frame[size : size + 4]
    assert crc32(payload, header_crc ^ KEY.payload_seed).to_bytes(4, "big") == frame[-4:]
    return header


def encode_fast() -> bytes:
    """A frame, encoded by the codec in use."""
    return encode_frame(KEY, KIND_DATA, 3, 3, len(PAYLOAD), 7, 5, 262144, PAYLOAD)


def measure() -> dict[str, dict[str, float]]:
    """Microseconds per frame of 64 bytes of payload, encoded and decoded, by codec."""
    definition, compiled = protocol.FrameHeader, protocol.FrameHeader.compile()
    frame = encode_fast()
    assert encode_with(definition.build) == encode_with(compiled.build) == frame
    decoder = Decoder()
    decoder.key = KEY
    assert decoder.receive_data(frame)[0].payload == PAYLOAD
    return {
        "construct, interpreted": {
            "encode_us": _cost_us(lambda: encode_with(definition.build)),
            "decode_us": _cost_us(lambda: decode_with(definition.parse, frame)),
        },
        "construct, compiled": {
            "encode_us": _cost_us(lambda: encode_with(compiled.build)),
            "decode_us": _cost_us(lambda: decode_with(compiled.parse, frame)),
        },
        "vchan.wire.frames": {
            "encode_us": _cost_us(encode_fast),
            "decode_us": _cost_us(lambda: decoder.receive_data(frame)),
        },
    }


def _cost_us(action: Callable[[], object], repeats: int = 7, count: int = 2000) -> float:
    """The best of several: what disturbs can only make it slower."""
    best_s = float("inf")
    for _ in range(repeats):
        started_s = time.perf_counter()
        for _ in range(count):
            action()
        best_s = min(best_s, time.perf_counter() - started_s)
    return best_s / count * 1e6
