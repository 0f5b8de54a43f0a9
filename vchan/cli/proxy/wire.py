"""HTTP as `vchan proxy` speaks it: the head of one CONNECT in, one answer out.

Rules of this file
1. No I/O, no clock, no logging.
2. Strict: what two programs could read in two ways is refused (`BadConnect`), never repaired. What
   comes behind the head is the tunnel's, whatever it looks like.
3. Every size is bounded before it is read.
"""

import base64
import binascii
import ipaddress
import re
from typing import Final, NamedTuple

HEAD_BYTES_MAX: Final = 8 * 1024
"""A request's line and headers: clients send a few hundred bytes. At it: 431."""
HEADERS_MAX: Final = 64
"""Headers of one request. At it: 431."""
REASON_CHARS_MAX: Final = 200
"""Of why a request was refused, in the answer's first line: most clients show no more of an answer
than that. At it: the rest stands in the body alone."""

REASONS: Final = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    407: "Proxy Authentication Required",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}

_CONNECT: Final = re.compile(r"CONNECT ([!-~]{1,300}) HTTP/1\.[01]")
_OTHER: Final = re.compile(r"[A-Z]{1,16} [!-~]+ HTTP/1\.[01]")
_AUTHORITY: Final = re.compile(
    r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._~-]{1,255}):([1-9][0-9]{0,4})"
)
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")


class BadConnect(Exception):
    """The bytes are no request that is served. The connection is of no use any more."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        self.detail = detail
        super().__init__(detail)


class Presented(NamedTuple):
    """What a client has sent to say who it is. `name` is "" where it named nobody."""

    name: str
    token: str


class ConnectRequest(NamedTuple):
    """One CONNECT.

    Attributes:
        name: In lower case; of an address its shortest form.
        rest: What came behind the head: the tunnel's first bytes.
    """

    name: str
    port: int
    presented: Presented | None
    rest: bytes


class ConnectParser:
    """One connection's request: `feed` until it gives it."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> ConnectRequest | None:
        """Bytes of the client's; the request, when it is complete.

        Raises:
            BadConnect: There will never be one.
        """
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX + 4)
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise BadConnect(431, f"the head is over {HEAD_BYTES_MAX} bytes (HEAD_BYTES_MAX)")
            return None
        head, rest = bytes(self._buffer[:end]), bytes(self._buffer[end + 4 :])
        return _read_head(head.decode("latin-1"), rest)


def _read_head(text: str, rest: bytes) -> ConnectRequest:
    first, *lines = text.split("\r\n")
    found = _CONNECT.fullmatch(first)
    if found is None:
        if _OTHER.fullmatch(first) and not first.startswith("CONNECT "):
            raise BadConnect(
                405, "only CONNECT is served; curl takes --proxytunnel for http:// URLs"
            )
        raise BadConnect(400, "expected CONNECT NAME:PORT HTTP/1.1")
    headers = _read_headers(lines)
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        raise BadConnect(400, "a CONNECT has no body")
    name, port = _read_authority(found[1])
    if "host" in headers and _host_of(headers["host"]) != name:
        raise BadConnect(400, "the header Host names another host than the CONNECT")
    return ConnectRequest(name, port, _read_presented(headers.get("proxy-authorization")), rest)


def _read_headers(lines: list[str]) -> dict[str, str]:
    if len(lines) > HEADERS_MAX:
        raise BadConnect(431, f"over {HEADERS_MAX} headers (HEADERS_MAX)")
    headers: dict[str, str] = {}
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise BadConnect(400, "a header is not NAME: VALUE on one line")
        name = found[1].lower()
        if name in headers and name in ("host", "proxy-authorization", "content-length"):
            raise BadConnect(400, f"the header {name} comes twice")
        headers[name] = found[2].rstrip(" \t")
    return headers


def _read_authority(text: str) -> tuple[str, int]:
    found = _AUTHORITY.fullmatch(text)
    if found is None or int(found[2]) > 65535:
        raise BadConnect(
            400, "expected CONNECT NAME:PORT: a VM's name, UUID or address, and a port"
        )
    return plain_name(found[1]), int(found[2])


def _host_of(text: str) -> str:
    """A Host header's, with or without a port."""
    without = re.sub(r":[0-9]+$", "", text) if text.count(":") == 1 or "]" in text else text
    return plain_name(without)


def plain_name(text: str) -> str:
    """A name as it is compared: in lower case, an address in its shortest form, no brackets."""
    bare = text.removeprefix("[").removesuffix("]").lower()
    try:
        return ipaddress.ip_address(bare).compressed
    except ValueError:
        return bare


def _read_presented(text: str | None) -> Presented | None:
    if text is None:
        return None
    scheme, _, value = text.partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value:
        return Presented("", value)
    if scheme.lower() == "basic":
        try:
            name, colon, token = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            colon = ""
        if colon:
            return Presented(name, token)
    raise BadConnect(400, "Proxy-Authorization: expected Basic (NAME:TOKEN) or Bearer TOKEN")


ESTABLISHED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"
"""From here on the connection is the tunnel's."""


def encode_refusal(status: int, detail: str) -> bytes:
    """The answer that says why there is no tunnel, behind which the connection is closed.

    Args:
        detail: Some of it may be a guest's word: what is not printable is left out.
    """
    said = "".join(c if " " <= c <= "~" else "?" for c in detail)
    lines = [f"HTTP/1.1 {status} {REASONS[status]}: {said[:REASON_CHARS_MAX]}"]
    body = f"vchan proxy: {said}\n".encode()
    if status == 407:
        lines.append('Proxy-Authenticate: Basic realm="vchan-proxy"')
    lines += ["Content-Type: text/plain", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode() + body
