"""What a guest may ask of a service under the cloud."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.errors import BadBody, LimitExceeded
from vchan.rpc import httpcall
from vchan.rpc.httpcall import (
    ANSWER_BODY_BYTES_MAX,
    ASK_BODY_BYTES_MAX,
    HttpAnswer,
    HttpAsk,
    answer_result,
    ask_args,
    check_path,
    known_headers,
    read_answer,
    read_ask,
)

ASK = HttpAsk("metadata", "GET", "/latest/meta-data/?x=%20y", (("accept", "*/*"),), b"\x00body")


def with_(**changes: Any) -> dict[str, Any]:
    return {**ask_args(ASK), **changes}


def test_there_and_back() -> None:
    assert read_ask(ask_args(ASK)) == ASK
    answer = HttpAnswer(404, (("content-type", "text/plain"),), b"\xff")
    assert read_answer(answer_result(answer)) == answer


def test_only_known_headers_pass() -> None:
    pairs = [["X-Instance-ID", "other"], ["X_Instance_ID", "other"], ["Host", "x"]]
    pairs += [["Authorization", "x"], ["Connection", "close"], ["Accept", "text/plain"]]
    assert read_ask(with_(headers=pairs)).headers == (("accept", "text/plain"),)


@pytest.mark.parametrize(
    "changes",
    [
        {"service": "no such/name"},
        {"service": "METADATA"},
        {"service": None},
        {"method": "CONNECT"},
        {"method": "get"},
        {"method": "GET /x HTTP/1.1\r\n"},
        {"path": "latest"},
        {"path": 7},
        {"headers": {"a": "b"}},
        {"headers": [["accept"]]},
        {"headers": [["accept", 7]]},
        {"headers": [["accept", "a"], ["Accept", "b"]]},
        {"headers": [["accept", "a\r\nX-Instance-ID: b"]]},
        {"headers": [["accept", "x" * 2000]]},
        {"body": "no base64!"},
        {"body": 7},
        {"url": "http://elsewhere"},
    ],
)
def test_what_is_not_well_formed_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadBody):
        read_ask(with_(**changes))


@pytest.mark.parametrize(
    "path",
    [
        "/a/../b",
        "/..",
        "/./a",
        "/a/%2e%2e/b",
        "/a/%2E./b",
        "/a/%252e%252e/b",
        "/a%2fb",
        "/a%5cb",
        "/a\\b",
        "/a;x/b",
        "/a%3bx",
        "/a%00",
        "/a%0d%0aX: y",
        "/a b",
        "/a#b",
        "/a%",
        "/a%2",
        "/a%zz",
        "/ä",
        "/a%25252525252e",
        "/" + "a" * 3000,
        "*",
        "",
    ],
)
def test_a_path_that_could_be_read_in_two_ways_is_refused(path: str) -> None:
    with pytest.raises(BadBody):
        check_path(path)


@pytest.mark.parametrize("path", ["/", "//", "/a/b.c/...", "/a%20b?q=../%2e%2e/&r=a;b", "/%c3%a4"])
def test_a_plain_path_passes(path: str) -> None:
    check_path(path)


@given(st.text(max_size=30))
def test_no_path_raises_anything_else(text: str) -> None:
    try:
        check_path("/" + text)
    except BadBody:
        pass


def test_sizes_are_bounded() -> None:
    with pytest.raises(LimitExceeded, match="ASK_BODY_BYTES_MAX"):
        read_ask(ask_args(ASK._replace(body=b"x" * (ASK_BODY_BYTES_MAX + 1))))
    large = HttpAnswer(200, (), b"x" * (ANSWER_BODY_BYTES_MAX + 1))
    with pytest.raises(LimitExceeded, match="ANSWER_BODY_BYTES_MAX"):
        read_answer(answer_result(large))


@pytest.mark.parametrize("result", [None, [], {}, {"status": "200"}, {"status": 99}])
def test_an_answer_that_is_none(result: object) -> None:
    with pytest.raises(BadBody):
        read_answer(result)


def test_of_a_service_s_headers_the_first_that_is_plain_passes() -> None:
    pairs = [("Content-Type", "a"), ("content-type", "b"), ("Set-Cookie", "c"), ("ETag", "x\r\ny")]
    assert known_headers(pairs, httpcall.ANSWER_HEADERS) == (("content-type", "a"),)
