"""What we encode ourselves is what py-amqp would have written, byte for byte."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from amqp import Message, spec
from amqp.method_framing import frame_writer
from amqp.serialization import dumps
from hypothesis import example, given
from hypothesis import strategies as st

from vchan.host.broker.amqp_frames import acknowledgement, properties, publication

FRAME_MAX = 4096
NAMES = st.text(st.characters(), max_size=63)


def as_py_amqp(method: tuple[int, int], layout: str, *args: Any, content: Any = None) -> bytes:
    written: list[bytes] = []
    connection = SimpleNamespace(frame_max=FRAME_MAX, bytes_sent=0)
    transport = SimpleNamespace(write=lambda data: written.append(bytes(data)))
    write = frame_writer(cast("Any", connection), transport)
    write(1, 7, method, dumps(layout, args), content)
    return b"".join(written)


@pytest.mark.parametrize("tag", [1, 255, 2**63])
def test_an_acknowledgement(tag: int) -> None:
    assert acknowledgement(7, tag) == as_py_amqp(spec.Basic.Ack, "Lb", tag, False)


@given(
    exchange=NAMES,
    key=NAMES,
    body=st.binary() | st.integers(FRAME_MAX - 60, 3 * FRAME_MAX).map(bytes),
    mandatory=st.booleans(),
    expiration=st.sampled_from(["", "1", "4294967295"]),
    message_id=st.sampled_from(["", "1", "123456"]),
)
@example("", "reply_\ud800", b"", True, "", "1")
@example("", "", bytes(FRAME_MAX - 8), False, "", "")
@example("", "", bytes(FRAME_MAX - 7), False, "", "")
@example("", "", bytes(2 * (FRAME_MAX - 8)), False, "", "")
def test_a_message(
    exchange: str, key: str, body: bytes, mandatory: bool, expiration: str, message_id: str
) -> None:
    further = {"expiration": expiration} if expiration else {}
    further |= {"message_id": message_id} if message_id else {}
    message = Message(
        body,
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=2,
        priority=0,
        application_headers={},
        **further,
    )
    said = properties(expiration=expiration, message_id=message_id)
    address = (exchange, key)
    made = publication(7, address, said, body, mandatory=mandatory, frame_max=FRAME_MAX)
    expected = as_py_amqp(
        spec.Basic.Publish, "Bssbb", 0, exchange, key, mandatory, False, content=message
    )
    assert made == expected


def test_a_name_that_amqp_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="range"):
        publication(7, ("", "x" * 256), properties(), b"", mandatory=True, frame_max=FRAME_MAX)
