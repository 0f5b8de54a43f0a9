"""What publishers write into properties, headers and routing keys costs their message, at most."""

from __future__ import annotations

import datetime
import decimal
import struct
from typing import Any

import pytest
from amqp import Message
from amqp.serialization import dumps
from hypothesis import example, given
from hypothesis import strategies as st

from vchan.host.broker.amqp_content import (
    HEADERS_MAX,
    MalformedFrame,
    body_size,
    read_arguments,
    read_properties,
)

EXPIRATION, MESSAGE_ID, HEADERS = 0x0100, 0x0080, 0x2000


def header(flags: int, fields: bytes, size: int = 0) -> bytes:
    """A content header of class Basic."""
    return struct.pack(">HHQH", 60, 0, size, flags) + fields


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def table(*entries: bytes) -> bytes:
    return struct.pack(">I", len(b"".join(entries))) + b"".join(entries)


def entry(name: bytes, kind: bytes, value: bytes) -> bytes:
    return short(name) + kind + value


def serialized(**properties: Any) -> bytes:
    """As a stock client writes them."""
    written: bytes = Message(b"", **properties)._serialize_properties()
    return struct.pack(">HHQ", 60, 0, 0) + written


COUNT = entry(b"x-delivery-count", b"l", struct.pack(">q", 7))


# -------------------------------------------------------------------- what stock clients write


def test_what_a_stock_client_writes_is_read() -> None:
    found = read_properties(
        serialized(
            content_type="application/json",
            content_encoding="utf-8",
            application_headers={"compression": "application/x-gzip", "x-delivery-count": 3},
            delivery_mode=2,
            priority=0,
            correlation_id="c",
            reply_to="r",
            expiration="60000",
            message_id="17",
            timestamp=1767225600,
            type="t",
            user_id="guest",
            app_id="a",
            cluster_id="x",
        )
    )
    assert (found.expiration, found.message_id, found.problem) == ("60000", "17", "")
    assert found.headers == {"compression": "application/x-gzip", "x-delivery-count": 3}
    assert found.delivery_count == 3


HEADER_VALUES = st.recursive(
    st.one_of(
        st.text(),
        st.binary(),
        st.integers(-(2**63), 2**63 - 1),
        st.booleans(),
        st.none(),
        st.floats(allow_nan=False),
        st.datetimes(min_value=datetime.datetime(1970, 1, 2)),
        st.decimals(-10000, 10000, places=2),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner),
    max_leaves=10,
)


@given(headers=st.dictionaries(st.text(max_size=30), HEADER_VALUES, max_size=8))
def test_headers_of_every_type_that_py_amqp_writes_hide_nothing(headers: dict[str, Any]) -> None:
    written = {**headers, "x-delivery-count": 5}
    found = read_properties(serialized(application_headers=written, expiration="9"))
    assert (found.expiration, found.delivery_count, found.problem) == ("9", 5, "")
    for name, value in headers.items():
        if isinstance(value, str) and name != "x-delivery-count":
            assert found.headers[name] == value


# -------------------------------------------------------------------- what others write


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (b"T", struct.pack(">Q", 1772000000000)),  # milliseconds
        (b"T", b"\xff" * 8),
        (b"D", b"\xff" + struct.pack(">i", 1)),
        (b"t", b"\x07"),
        (b"b", b"\x80"),
        (b"B", b"\xff"),
        (b"s", b"\x80\x00"),
        (b"u", b"\xff\xff"),
        (b"U", b"\xff\xff"),
        (b"I", b"\x80\x00\x00\x00"),
        (b"i", b"\xff" * 4),
        (b"l", b"\xff" * 8),
        (b"L", b"\xff" * 8),
        (b"f", b"\x7f\xc0\x00\x00"),
        (b"d", b"\xff" * 8),
        (b"V", b""),
        (b"S", table(b"\xff\xfe")),
        (b"x", table(b"\x00\xff")),
        (b"A", table(b"?nothing that is an array")),
        (b"F", table(b"\xffnothing that is a table")),
        (b"F", table(entry(b"\xff\xfe", b"Z", b""))),
    ],
)
def test_a_header_that_cannot_be_decoded_hides_nothing_behind_it(kind: bytes, value: bytes) -> None:
    odd = entry(b"odd", kind, value)
    fields = table(odd, COUNT) + short(b"60000") + short(b"5")
    found = read_properties(header(HEADERS | EXPIRATION | MESSAGE_ID, fields))
    assert (found.expiration, found.message_id, found.problem) == ("60000", "5", "")
    assert found.delivery_count == 7


def test_a_header_of_an_unknown_type_hides_later_headers_but_no_properties() -> None:
    fields = table(entry(b"odd", b"Z", b"\x01\x02"), COUNT) + short(b"60000")
    found = read_properties(header(HEADERS | EXPIRATION, fields))
    assert (found.expiration, found.headers, found.problem) == ("60000", {}, "")


def test_many_headers_are_not_all_looked_at() -> None:
    many = [entry(b"h%d" % number, b"t", b"\x01") for number in range(HEADERS_MAX)]
    fields = table(*many, COUNT) + short(b"60000")
    found = read_properties(header(HEADERS | EXPIRATION, fields))
    assert (found.expiration, found.delivery_count) == ("60000", 0)


def test_tables_inside_each_other_cost_no_stack() -> None:
    inner = b""
    for _ in range(20_000):
        inner = entry(b"", b"F", table(inner))
    found = read_properties(header(HEADERS | EXPIRATION, table(inner, COUNT) + short(b"60000")))
    assert (found.expiration, found.delivery_count) == ("60000", 7)


@pytest.mark.parametrize("missing", range(1, 8))
def test_properties_that_end_before_the_expiration_are_a_problem(missing: int) -> None:
    whole = header(HEADERS | EXPIRATION, table() + short(b"60000"))
    assert read_properties(whole).expiration == "60000"
    assert "too early" in read_properties(whole[:-missing]).problem


def test_a_table_larger_than_what_is_there_is_a_problem_if_an_expiration_is_behind_it() -> None:
    fields = struct.pack(">I", 2**32 - 1) + COUNT
    assert read_properties(header(HEADERS, fields)).problem == ""
    assert read_properties(header(HEADERS | EXPIRATION, fields)).problem != ""


def test_more_flags_than_amqp_has_are_passed_over() -> None:
    flags = struct.pack(">HHH", EXPIRATION | 1, 0xFFFF, 0x0000)
    found = read_properties(struct.pack(">HHQ", 60, 0, 0) + flags + short(b"60000"))
    assert found.expiration == "60000"
    endless = struct.pack(">HHQ", 60, 0, 0) + b"\xff\xff" * 1000
    assert read_properties(endless).problem != ""


def test_a_text_that_is_no_utf8_stays_what_it_is() -> None:
    found = read_properties(header(EXPIRATION, short(b"\xff")))
    assert found.expiration is not None
    assert found.expiration.encode("utf-8", "surrogateescape") == b"\xff"


def test_a_delivery_count_that_is_no_number_is_ignored() -> None:
    for odd in (
        entry(b"x-delivery-count", b"S", table(b"many")),
        entry(b"x-delivery-count", b"l", struct.pack(">q", -1)),
    ):
        assert read_properties(header(HEADERS, table(odd))).delivery_count == 0


@given(data=st.binary(max_size=200))
@example(data=b"")
def test_nothing_in_a_content_header_raises(data: bytes) -> None:
    read_properties(struct.pack(">HHQ", 60, 0, 0) + data)
    read_properties(data)


@given(
    flags=st.integers(0, 0xFFFF),
    names=st.lists(st.tuples(st.binary(max_size=9), st.binary(min_size=1, max_size=1))),
    rest=st.binary(max_size=60),
)
def test_nothing_in_headers_raises(
    flags: int, names: list[tuple[bytes, bytes]], rest: bytes
) -> None:
    entries = b"".join(entry(name, kind, rest) for name, kind in names)
    read_properties(header(flags | HEADERS, table(entries) + rest))


# -------------------------------------------------------------------- what the broker writes


@given(
    tag=st.text(max_size=60),
    number=st.integers(0, 2**64 - 1),
    redelivered=st.booleans(),
    exchange=st.text(max_size=60),
    key=st.text(max_size=60),
)
def test_arguments_are_read_as_py_amqp_writes_them(
    tag: str, number: int, redelivered: bool, exchange: str, key: str
) -> None:
    values = [tag, number, redelivered, exchange, key]
    try:
        payload = b"\0\x3c\0\x3c" + dumps("sLbss", values)
    except UnicodeEncodeError:
        return
    assert read_arguments("sLbss", payload) == values


def test_consecutive_bits_share_an_octet() -> None:
    assert read_arguments("bbBb", b"\0\0\0\0" + b"\x02\x01\x02\x01") == [False, True, 258, True]
    assert read_arguments("Bl", b"\0\0\0\0" + b"\x01\x94\0\0\0\x05") == [404, 5]


def test_a_routing_key_that_is_no_utf8_is_read() -> None:
    payload = b"\0\x3c\0\x3c" + short(b"t") + b"\0" * 8 + b"\0" + short(b"e") + short(b"\xff\xfe")
    tag, number, redelivered, exchange, key = read_arguments("sLbss", payload)
    assert (tag, number, redelivered, exchange) == ("t", 0, False, "e")
    assert key.encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_what_the_broker_cut_short_is_its_fault() -> None:
    with pytest.raises(MalformedFrame, match="sLbss"):
        read_arguments("sLbss", b"\0\x3c\0\x3c\x05abc")
    with pytest.raises(MalformedFrame, match="11 bytes"):
        body_size(b"\0" * 11)
    assert body_size(header(0, b"", size=2**63)) == 2**63


def test_decimals_of_py_amqp_do_not_stop_the_reader() -> None:
    found = read_properties(
        serialized(application_headers={"d": decimal.Decimal("1.5"), "n": 1}, expiration="1")
    )
    assert (found.headers, found.expiration) == ({"n": 1}, "1")
