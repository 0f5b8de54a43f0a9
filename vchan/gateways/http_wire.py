"""HTTP/1.1 as vchan-http speaks it: requests in, responses out.

Rules of this file
1. No I/O, no clock, no logging.
2. Strict: what two programs could read in two ways is refused (`BadRequest`), never repaired. No
   chunked bodies, no folded lines, no bare line feeds, no header twice that decides anything.
3. Every size is bounded before it is read.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

HEAD_BYTES_MAX: Final = 16 * 1024
"""A request's line and headers."""
HEADERS_MAX: Final = 64
"""Headers of one request: programs send ten. At it: 431."""
BODY_BYTES_MAX: Final = 4 * 1024 * 1024
"""As much as a message of a session may carry (MESSAGE_BYTES_MAX)."""
JSON_TYPE: Final = "application/json"
PROBLEM_TYPE: Final = "application/problem+json"
"""RFC 9457."""

REASONS: Final = {
    100: "Continue",
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}

_REQUEST_LINE: Final = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])")
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_LENGTH: Final = re.compile("[0-9]{1,12}")
_ONCE: Final = frozenset({"authorization", "content-length", "content-type", "expect", "host"})


class BadRequest(Exception):
    """The bytes are no request that is served. The connection is of no use any more."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        self.detail = detail
        super().__init__(detail)


class HttpRequest(NamedTuple):
    """A request, whole. Headers' names are in lower case; one that came several times has its
    values joined by commas."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    keeps_open: bool

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """What comes after the question mark."""
        return self.target.partition("?")[2]


class _Head(NamedTuple):
    method: str
    target: str
    headers: Mapping[str, str]
    keeps_open: bool
    length: int


class HttpParser:
    """One connection's requests.

    parser.feed(data)
    request = parser.next()
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head: _Head | None = None
        self.wants_continue = False
        """The client waits for "100 Continue" before it sends the body. Who says it clears this."""

    @property
    def buffered(self) -> int:
        """Bytes that came and are not part of a request that was given out."""
        return len(self._buffer)

    @property
    def expected_body(self) -> int:
        """The size of the body of the request that is coming in; 0 if none is."""
        return self._head.length if self._head is not None else 0

    def feed(self, data: bytes) -> None:
        """Bytes of the client's."""
        self._buffer += data

    def next(self) -> HttpRequest | None:
        """A request, if one is complete.

        Raises:
            BadRequest: There will never be one.
        """
        if self._head is None:
            self._head = self._take_head()
        head = self._head
        if head is None or len(self._buffer) < head.length:
            return None
        body = bytes(self._buffer[: head.length])
        del self._buffer[: head.length]
        self._head = None
        self.wants_continue = False
        return HttpRequest(head.method, head.target, head.headers, body, head.keeps_open)

    def _take_head(self) -> _Head | None:
        end = self._buffer.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX + 4)
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise BadRequest(431, f"the headers are over {HEAD_BYTES_MAX} bytes")
            return None
        text = bytes(self._buffer[:end]).decode("latin-1")
        del self._buffer[: end + 4]
        first, *lines = text.split("\r\n")
        match = _REQUEST_LINE.fullmatch(first)
        if match is None:
            raise BadRequest(400, "expected METHOD /path HTTP/1.1")
        headers = _read_headers(lines)
        is_1_1 = match[3] == "1"
        if is_1_1 and "host" not in headers:
            raise BadRequest(400, "there is no Host header")
        words = {word.strip().lower() for word in headers.get("connection", "").split(",")}
        keeps_open = is_1_1 and "close" not in words
        length = _body_length(headers)
        expected = headers.get("expect", "").lower()
        self.wants_continue = is_1_1 and expected == "100-continue" and length > len(self._buffer)
        return _Head(match[1], match[2], headers, keeps_open, length)


def _read_headers(lines: list[str]) -> dict[str, str]:
    if len(lines) > HEADERS_MAX:
        raise BadRequest(431, f"over {HEADERS_MAX} headers")
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise BadRequest(400, "a header is not NAME: VALUE on one line")
        name, value = match[1].lower(), match[2].rstrip(" \t")
        if name in headers:
            if name in _ONCE:
                raise BadRequest(400, f"the header {name} comes twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _body_length(headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise BadRequest(501, "Transfer-Encoding is not taken: send Content-Length")
    text = headers.get("content-length", "0")
    if not _LENGTH.fullmatch(text):
        raise BadRequest(400, "Content-Length is no number")
    length = int(text)
    if length > BODY_BYTES_MAX:
        raise BadRequest(413, f"the body's {length} bytes are over {BODY_BYTES_MAX}")
    return length


CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


def encode_response(
    status: int,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    keeps_open: bool = True,
    has_length: bool = True,
    is_head: bool = False,
) -> bytes:
    """The bytes of a response.

    Args:
        headers: Checked: their values have no line ends.
        has_length: False: the body goes on until the connection is closed.
        is_head: The request was HEAD: there is no body.
    """
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Other')}"]
    for name, value in (headers or {}).items():
        assert not {"\r", "\n", "\0"} & set(name + value)
        lines.append(f"{name}: {value}")
    is_bare = is_head or status in (204, 304)
    if has_length and not is_bare:
        lines.append(f"Content-Length: {len(body)}")
    if not keeps_open:
        lines.append("Connection: close")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
    return head if is_bare else head + body


def problem_body(status: int, code: str, detail: str, extra: Mapping[str, Any]) -> bytes:
    """A problem, as RFC 9457 has it. `code` is the name of one of vchan.errors, or of what is wrong
    with the request; `extra` are members of its own."""
    problem = {
        "type": f"urn:vchan:problem:{code}",
        "title": code,
        "status": status,
        "detail": detail,
        **extra,
    }
    return json.dumps(problem, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )


def encode_event(name: str, identity: str, data: bytes) -> bytes:
    """A server-sent event. `data` is JSON on one line."""
    assert b"\n" not in data and b"\r" not in data
    return f"event: {name}\nid: {identity}\ndata: ".encode() + data + b"\n\n"


HEARTBEAT_EVENT: Final = b": still here\n\n"
"""A comment: keeps whoever is between from closing a stream on which nothing happens."""
