"""What kombu compresses is read; what only says so costs itself, and no memory."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.compression import compress

from vchan.host.oslo_wire.compression import expand
from vchan.host.oslo_wire.envelope import EnvelopeError

BYTES_MAX = 1024 * 1024
KINDS = ["application/x-gzip", "application/x-bz2", "application/x-lzma"]


@given(st.binary(max_size=300), st.sampled_from(["gzip", "bzip2", "lzma"]))
def test_what_kombu_writes_is_read(body: bytes, name: str) -> None:
    packed, kind = compress(body, name)
    assert expand(kind, packed, BYTES_MAX) == body


@pytest.mark.parametrize("pack", [zlib.compress, bz2.compress, lzma.compress])
def test_a_bomb_stays_small(pack: Callable[[bytes], bytes]) -> None:
    kind = KINDS[[zlib.compress, bz2.compress, lzma.compress].index(pack)]
    assert expand(kind, pack(bytes(BYTES_MAX)), BYTES_MAX) == bytes(BYTES_MAX)
    with pytest.raises(EnvelopeError, match="expands to more than 1048576 bytes"):
        expand(kind, pack(bytes(BYTES_MAX + 1)), BYTES_MAX)


@given(st.binary(max_size=60), st.sampled_from(KINDS), st.integers(0, 40))
def test_whatever_the_bytes_an_envelope_error_is_all(junk: bytes, kind: str, cut: int) -> None:
    packed, _ = compress(b"x" * 40, {"x-gzip": "gzip", "x-bz2": "bzip2"}.get(kind[12:], "lzma"))
    for body in (junk, packed[: min(cut, len(packed) - 1)], packed[:cut] + junk):
        try:
            expand(kind, body, BYTES_MAX)
        except EnvelopeError:
            pass


@pytest.mark.parametrize("kind", ["application/zstd", "application/x-brotli", "", 3, "x" * 500])
def test_other_compressions_are_named(kind: str | int) -> None:
    with pytest.raises(EnvelopeError, match=r"kombu_compression.*: not application/x-gzip"):
        expand(kind, b"abc", BYTES_MAX)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_that_is_missing_is_said(kind: str) -> None:
    with pytest.raises(EnvelopeError):
        expand(kind, b"", BYTES_MAX)
