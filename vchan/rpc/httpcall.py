"""HTTP over the channel: what a guest may ask of a service under the cloud, and what it is told.

Rules of this file
1. No I/O, no clock. Used at both ends; the host trusts nothing that the guest has checked.
2. Names and values are let through by lists of what is known, never by what is forbidden.
3. What is read in two ways somewhere - a path with dots, a slash in disguise - is refused.

A call to topic "http" of exchange "vchan", method "request":

    args    {"service": "metadata", "method": "GET", "path": "/latest?x=1",
             "headers": [["accept", "*/*"]], "body": "<base64>"}
    result  {"status": 200, "headers": [["content-type", "text/plain"]], "body": "<base64>"}
"""

import re
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from vchan.errors import BadBody, LimitExceeded
from vchan.rpc.messages import Topic

TOPIC: Final = Topic("vchan", "http")
METHOD: Final = "request"
HTTP_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
ASK_BODY_BYTES_MAX: Final = 1024 * 1024
"""A request's body: base64, it fits a message of a session."""
ANSWER_BODY_BYTES_MAX: Final = 2 * 1024 * 1024
"""In base64 it fits a message of a session."""
PATH_CHARS_MAX: Final = 2048
"""A path with its query: what HTTP servers commonly take."""
VALUE_CHARS_MAX: Final = 1024
"""One header's value."""

ASK_HEADERS: Final = frozenset(
    {
        "accept",
        "accept-encoding",
        "accept-language",
        "cache-control",
        "content-encoding",
        "content-type",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-unmodified-since",
        "range",
        "user-agent",
    }
)
"""Of a guest's headers these reach the service: none says who asks."""
ANSWER_HEADERS: Final = frozenset(
    {
        "accept-ranges",
        "allow",
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-range",
        "content-type",
        "date",
        "etag",
        "expires",
        "last-modified",
        "location",
        "retry-after",
        "vary",
        "www-authenticate",
    }
)
"""Of a service's headers these reach the guest."""

_SERVICE: Final = re.compile("[a-z0-9][a-z0-9._-]{0,62}")
_PATH: Final = re.compile("/[!-~]*")
_VALUE: Final = re.compile("[\t -~\x80-\xff]*")
_PERCENT: Final = re.compile("%(?:[0-9A-Fa-f]{2})?")

Headers = tuple[tuple[str, str], ...]


class HttpAsk(NamedTuple):
    """A request to a service. `path` may have a query."""

    service: str
    method: str
    path: str
    headers: Headers
    body: bytes


class HttpAnswer(NamedTuple):
    """What the service said."""

    status: int
    headers: Headers
    body: bytes


def read_ask(args: Mapping[str, Any]) -> HttpAsk:
    """What a guest asks.

    Raises:
        BadBody: It is not well formed, or could be read in two ways; says how.
        LimitExceeded: It is too large.
    """
    unknown = set(args) - set(HttpAsk._fields)
    if unknown:
        raise BadBody(f"unknown: {', '.join(sorted(map(str, unknown)))[:200]}")
    service, method, path = (args.get(name) for name in ("service", "method", "path"))
    if not isinstance(service, str) or not is_service_name(service):
        raise BadBody("service: expected a name of small letters, digits, dots and dashes")
    if method not in HTTP_METHODS:
        raise BadBody(f"method: expected one of {', '.join(HTTP_METHODS)}")
    if not isinstance(path, str):
        raise BadBody("path: expected a text")
    check_path(path)
    headers = _read_headers(args.get("headers", []), ASK_HEADERS)
    body = _read_body(args.get("body", ""), ASK_BODY_BYTES_MAX, "ASK_BODY_BYTES_MAX")
    return HttpAsk(service, method, path, headers, body)


def is_service_name(name: str) -> bool:
    """Whether a service may be called so."""
    return _SERVICE.fullmatch(name) is not None


def check_path(path: str) -> None:
    """A path and perhaps a query, in the one form that everybody reads alike.

    Raises:
        BadBody: Says what is not.
    """
    if len(path) > PATH_CHARS_MAX:
        raise BadBody(f"path: over {PATH_CHARS_MAX} characters")
    if not _PATH.fullmatch(path) or "#" in path or "\\" in path:
        raise BadBody("path: expected / and printable characters, without spaces, # and \\")
    if any(len(match) != 3 for match in _PERCENT.findall(path)):
        raise BadBody("path: a % that is no %XX")
    for segment in path.partition("?")[0].split("/"):
        _check_segment(segment)


def _check_segment(segment: str) -> None:
    plain = segment
    for _ in range(3):  # who decodes twice must not find what who decodes once has not
        if plain in (".", ".."):
            raise BadBody("path: has . or .. in it")
        decoded = _PERCENT.sub(lambda match: chr(int(match[0][1:] or "25", 16)), plain)
        if any(character in "/\\;\x7f" or character < " " for character in decoded):
            raise BadBody("path: a ;, or a /, \\ or control character in disguise")
        if decoded == plain:
            return
        plain = decoded
    raise BadBody("path: encoded over and over")


def _read_headers(value: object, known: frozenset[str]) -> Headers:
    """Those that are known; each at most once, or two programs might take different ones."""
    if not isinstance(value, list):
        raise BadBody("headers: expected a list")
    headers: dict[str, str] = {}
    for pair in value:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        ):
            raise BadBody("headers: expected pairs of texts")
        name, text = pair[0].lower(), pair[1].strip(" \t")
        if name not in known:
            continue
        if name in headers:
            raise BadBody(f"headers: {name} comes twice")
        if len(text) > VALUE_CHARS_MAX or not _VALUE.fullmatch(text):
            raise BadBody(f"headers: {name} is over {VALUE_CHARS_MAX} characters, or has others")
        headers[name] = text
    return tuple(headers.items())


def _read_body(value: object, limit: int, name: str) -> bytes:
    if not isinstance(value, str):
        raise BadBody("body: expected base64")
    try:
        body = a2b_base64(value, strict_mode=True) if value else b""
    except (Base64Error, ValueError) as error:
        raise BadBody(f"body: no base64: {error}") from error
    if len(body) > limit:
        raise LimitExceeded("body", len(body), limit, name)
    return body


def ask_args(ask: HttpAsk) -> dict[str, Any]:
    """What `read_ask` takes."""
    return {
        "service": ask.service,
        "method": ask.method,
        "path": ask.path,
        "headers": [list(pair) for pair in ask.headers],
        "body": _base64(ask.body),
    }


def known_headers(pairs: Iterable[tuple[str, str]], known: frozenset[str]) -> Headers:
    """Of these headers, those that may pass; of one that comes twice, the first."""
    headers: dict[str, str] = {}
    for name, text in pairs:
        low = name.lower()
        if low in known and len(text) <= VALUE_CHARS_MAX and _VALUE.fullmatch(text):
            headers.setdefault(low, text)
    return tuple(headers.items())


def answer_result(answer: HttpAnswer) -> dict[str, Any]:
    """What `read_answer` takes."""
    headers = [list(pair) for pair in answer.headers]
    return {"status": answer.status, "headers": headers, "body": _base64(answer.body)}


def read_answer(result: object) -> HttpAnswer:
    """What the service said.

    Raises:
        BadBody, LimitExceeded: It is not well formed.
    """
    if not isinstance(result, dict):
        raise BadBody("the answer is no object")
    status = result.get("status")
    if not isinstance(status, int) or not 200 <= status <= 599:
        raise BadBody("the answer has no status")
    headers = _read_headers(result.get("headers", []), ANSWER_HEADERS)
    body = _read_body(result.get("body", ""), ANSWER_BODY_BYTES_MAX, "ANSWER_BODY_BYTES_MAX")
    return HttpAnswer(status, headers, body)


def _base64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode()
