"""Messages of services in a stream of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.services.framing import (
    PAYLOAD_BYTES_MAX,
    BadFrame,
    FrameReader,
    ServiceFrame,
    encode_frame,
)

FRAMES = st.lists(st.builds(ServiceFrame, st.integers(0, 255), st.binary(max_size=300)))


@given(FRAMES, st.lists(st.integers(1, 50)))
def test_what_is_written_is_read_however_it_is_cut(
    frames: list[ServiceFrame], cuts: list[int]
) -> None:
    data = b"".join(encode_frame(*frame) for frame in frames)
    reader = FrameReader()
    read = []
    for size in cuts:
        read += reader.feed(data[:size])
        data = data[size:]
    read += reader.feed(data)
    assert read == frames
    assert not reader.has_rest


@given(st.lists(st.binary(max_size=1000)))
def test_whatever_comes_is_a_message_or_refused(parts: list[bytes]) -> None:
    reader = FrameReader()
    try:
        for part in parts:
            reader.feed(part)
    except BadFrame:
        pass


def test_a_message_that_is_too_long_is_refused_at_its_length() -> None:
    reader = FrameReader()
    longest = encode_frame(1, bytes(PAYLOAD_BYTES_MAX))
    assert reader.feed(longest[:-1]) == [] and reader.has_rest
    assert reader.feed(longest[-1:]) == [ServiceFrame(1, bytes(PAYLOAD_BYTES_MAX))]
    too_long = bytes([1]) + (PAYLOAD_BYTES_MAX + 1).to_bytes(4)
    with pytest.raises(BadFrame, match="PAYLOAD_BYTES_MAX"):
        reader.feed(too_long)


def test_the_bytes() -> None:
    assert encode_frame(3, b"ab") == b"\x03\x00\x00\x00\x02ab"
