"""HTTP/1.1 as vchan-http speaks it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.gateways import http_wire
from vchan.gateways.http_wire import (
    BODY_BYTES_MAX,
    HEAD_BYTES_MAX,
    BadRequest,
    HttpParser,
    HttpRequest,
    encode_event,
    encode_response,
    problem_body,
)

REQUEST = (
    b"POST /v1/call?x=1 HTTP/1.1\r\nHost: vchan\r\nContent-Type:  application/json \r\n"
    b"X-Two: a\r\nx-two: b\r\nContent-Length: 5\r\n\r\n12345"
)


def parse(data: bytes) -> list[HttpRequest]:
    parser = HttpParser()
    parser.feed(data)
    requests = []
    while (request := parser.next()) is not None:
        requests.append(request)
    return requests


def test_a_request_is_read() -> None:
    (request,) = parse(REQUEST)
    assert (request.method, request.path, request.query) == ("POST", "/v1/call", "x=1")
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-two"] == "a, b"
    assert request.body == b"12345"
    assert request.keeps_open


@given(st.lists(st.integers(1, 40), max_size=20))
def test_however_it_is_cut(cuts: list[int]) -> None:
    whole = REQUEST + REQUEST
    parser = HttpParser()
    requests, at = [], 0
    for size in [*cuts, len(whole)]:
        parser.feed(whole[at : at + size])
        at += size
        while (request := parser.next()) is not None:
            requests.append(request)
    assert requests == parse(REQUEST) * 2
    assert parser.buffered == 0


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    for junk in (data, b"GET / HTTP/1.1\r\nHost: x\r\n" + data + b"\r\n\r\n"):
        try:
            parse(junk)
        except BadRequest as error:
            assert error.status in http_wire.REASONS


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\nEvil: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\n1", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 1\r\n\r\n1", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            501,
        ),
        (b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n", 400),
        (b"G" * (HEAD_BYTES_MAX + 1), 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 70 + b"\r\n", 431),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(data: bytes, status: int) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(data)
    assert refused.value.status == status


def test_a_body_over_the_limit_is_refused_before_it_comes() -> None:
    with pytest.raises(BadRequest) as refused:
        parse(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1))
    assert refused.value.status == 413


def test_who_waits_to_be_told_to_go_on() -> None:
    parser = HttpParser()
    parser.feed(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert parser.next() is None
    assert parser.wants_continue
    assert parser.expected_body == 2
    parser.feed(b"ab")
    assert parser.next() is not None
    assert (parser.wants_continue, parser.expected_body) == (False, 0)


@pytest.mark.parametrize(
    ("line", "keeps"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Close\r\n", False),
        (b"GET / HTTP/1.0\r\n", False),
    ],
)
def test_whether_the_connection_stays(line: bytes, keeps: bool) -> None:
    (request,) = parse(line + b"\r\n")
    assert request.keeps_open is keeps


def test_responses() -> None:
    assert encode_response(200, b"{}", {"Content-Type": "application/json"}) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert encode_response(204) == b"HTTP/1.1 204 No Content\r\n\r\n"
    closing = encode_response(200, keeps_open=False, has_length=False)
    assert closing == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    assert encode_response(200, b"body", is_head=True) == b"HTTP/1.1 200 OK\r\n\r\n"
    assert encode_response(304, b"body") == b"HTTP/1.1 304 Other\r\n\r\n"
    with pytest.raises(AssertionError):
        encode_response(200, headers={"X": "a\r\nY: b"})


def test_problems_are_rfc_9457_s() -> None:
    problem = json.loads(problem_body(404, "NoSuchAgent", "nobody", {"more": [1]}))
    assert problem == {
        "type": "urn:vchan:problem:NoSuchAgent",
        "title": "NoSuchAgent",
        "status": 404,
        "detail": "nobody",
        "more": [1],
    }


def test_an_event() -> None:
    assert encode_event("request", "7", b'{"x":1}') == b'event: request\nid: 7\ndata: {"x":1}\n\n'
