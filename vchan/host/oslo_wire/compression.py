"""Bodies that services compress: oslo.messaging's option `kombu_compression`.

Rules of this file
1. Pure: no I/O, no clock, no randomness.
2. Whatever the bytes, reading them raises `EnvelopeError` and nothing else.
3. A small message that would expand to a large one costs no more than the bound.

What is named here comes with Python. kombu knows brotli and Zstandard besides, by other libraries.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from vchan.host.oslo_wire.envelope import EnvelopeError, shortened

_XZ_MEMORY_BYTES_MAX: Final = 128 * 1024 * 1024
"""For the dictionary of a body: `xz -9` takes 65 MiB."""


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES_MAX)


_EXPANDERS: Final[Mapping[str, Callable[[], Any]]] = {
    "application/x-gzip": zlib.decompressobj,  # so kombu calls zlib's own form
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": _xz,
}
"""By what kombu writes into the header `compression`."""
COMPRESSION_HEADER: Final = "compression"
"""Of a message that is compressed."""


def expand(kind: str | int, body: bytes, bytes_max: int) -> bytes:
    """The body as it was before it was compressed.

    Args:
        kind: What its header says.
        bytes_max: Of what comes out.

    Raises:
        EnvelopeError: It is compressed otherwise, is cut short or damaged, or is too long.
    """
    make = _EXPANDERS.get(str(kind))
    if make is None:
        known = ", ".join(_EXPANDERS)
        raise EnvelopeError(
            f"it is compressed by {shortened(kind)} (kombu_compression): not {known}"
        )
    expander = make()
    problem = ""
    try:
        expanded: bytes = expander.decompress(body, bytes_max + 1)
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError) as error:
        problem = str(error) or type(error).__name__
    if problem:
        raise EnvelopeError(f"it is not what compression {kind} makes: {problem}")
    if len(expanded) > bytes_max:
        raise EnvelopeError(f"it expands to more than {bytes_max} bytes, which are allowed")
    if not expander.eof:
        raise EnvelopeError(f"it is compressed ({kind}), and its end is missing")
    return expanded
