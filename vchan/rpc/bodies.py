"""What is inside requests and replies, for those who run methods and those who call them: JSON.

The daemons do not look inside. The shapes are oslo.messaging's own, less its envelope:

    request   {"method": "echo", "args": {"x": 1}, "namespace": null, "version": "1.0",
               "context": {...}}
    result    any JSON
    failure   {"class": "ValueError", "module": "builtins", "message": "...", "tb": [...],
               "args": [...], "kwargs": {...}}

The body of a RAW request is such JSON with any bytes behind it, and that of its result is bytes:

    request   4 bytes: the length of the JSON; the JSON; bytes

Pure: no I/O, no clock.
"""

import json
import json.encoder
from collections.abc import Callable, Iterable, Mapping
from struct import Struct
from typing import Any, Final

from vchan.errors import BadBody
from vchan.wire import layout
from vchan.wire.value import Value

REDELIVERED_KEY = "vchan_redelivered"
"""In the context of a request that may run for a second time: true."""
FAILURE_TEXT_MAX = 8192
"""Characters of a failure's message, and of its traceback."""
FAILURE_ARGS_BYTES_MAX = 32 * 1024
"""An exception's arguments, as JSON: with text and traceback less than a host passes on. At it:
the text stands in their place."""


class Invocation(Value):
    """What a request asks for."""

    __slots__ = ("args", "context", "method", "namespace", "version")

    def __init__(
        self,
        method: str,
        args: Mapping[str, Any],
        namespace: str | None,
        version: str | None,
        context: Mapping[str, Any],
    ) -> None:
        self.method = method
        self.args = args
        self.namespace = namespace
        self.version = version
        self.context = context

    def fields(self) -> tuple[object, ...]:
        return self.method, self.args, self.namespace, self.version, self.context

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a request's body."""
        names = ("method", "args", "namespace", "version", "context")
        return dict(zip(names, self.fields(), strict=True))


_RAW_HEAD: Final = Struct(layout.RAW)
_encoder: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_decoder: Final[Any] = json.JSONDecoder()
_scan_once: Final = _decoder.scan_once


def _make_chunks() -> Callable[[Any, int], Iterable[str]]:
    """What JSONEncoder makes anew for every value, which takes it twice the time of the encoding:
    that in C where there is one."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return lambda value, _: _encoder.iterencode(value)
    text = json.encoder.encode_basestring
    no_markers: Any = None
    no_indent: Any = None
    no_sorting, no_skipping, allow_nan = False, False, True
    chunks: Callable[[Any, int], Iterable[str]] = make(
        no_markers, _encoder.default, text, no_indent, ":", ",", no_sorting, no_skipping, allow_nan
    )
    return chunks


_chunks: Final = _make_chunks()


def json_text(value: Any) -> str:
    """Compact JSON: see `encode_json`."""
    try:
        return "".join(_chunks(value, 0))
    except RecursionError as error:
        raise ValueError("refers to itself, or is nested too deep") from error


def encode_json(value: Any) -> bytes:
    """Compact UTF-8 JSON.

    Raises:
        TypeError: `value` holds something JSON cannot say.
        ValueError: `value` refers to itself, or is nested too deep.
    """
    return json_text(value).encode("utf-8", "surrogatepass")


def decode_json(data: bytes) -> Any:
    """What JSON in any of its encodings says.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deep.
    """
    try:
        text = data.decode()
        value, end = _scan_once(text, 0)
        if end == len(text):
            return value
    except (ValueError, StopIteration):
        pass
    return json.loads(data)  # three times as slow; takes white space and other encodings too


def encode_invocation(
    method: str,
    args: Mapping[str, Any],
    *,
    namespace: str | None = None,
    version: str | None = None,
    context: Mapping[str, Any] | None = None,
) -> bytes:
    """The body of a request."""
    return encode_json(
        {
            "method": method,
            "args": args,
            "namespace": namespace,
            "version": version,
            "context": context or {},
        }
    )


def decode_invocation(body: bytes) -> Invocation:
    """What a request's body asks for.

    Raises:
        BadBody: It is no request's body.
    """
    try:
        value = decode_json(body)
    except (ValueError, RecursionError) as error:
        raise BadBody(f"the request's body is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        raise BadBody('the request\'s body has no "method"')
    args, context = value.get("args") or {}, value.get("context") or {}
    if not isinstance(args, dict) or not isinstance(context, dict):
        raise BadBody('the request\'s "args" and "context" must be objects')
    namespace, version = value.get("namespace"), value.get("version")
    if not isinstance(namespace, str | None) or not isinstance(version, str | None):
        raise BadBody('the request\'s "namespace" and "version" must be texts, or null')
    return Invocation(value["method"], args, namespace, version, context)


def encode_raw(invocation: bytes, data: bytes | bytearray | memoryview) -> bytes:
    """The body of a RAW request."""
    return b"".join((_RAW_HEAD.pack(len(invocation)), invocation, data))


def decode_raw(body: bytes) -> tuple[bytes, bytes]:
    """What a RAW request's body holds: (the JSON, the bytes behind it).

    Raises:
        BadBody: It is none.
    """
    start = _RAW_HEAD.size
    if len(body) < start or len(body) < (stop := start + _RAW_HEAD.unpack_from(body)[0]):
        raise BadBody("the raw request's body is shorter than it says")
    return body[start:stop], body[stop:]


def mark_redelivered(body: bytes, *, is_raw: bool = False) -> bytes:
    """A request's body, with a word to its method: it may have run before. What is no request's
    body stays as it is: no method will see it."""
    try:
        invocation, data = decode_raw(body) if is_raw else (body, b"")
        asked = decode_invocation(invocation)
    except BadBody:
        return body
    context = {**asked.context, REDELIVERED_KEY: True}
    marked = encode_json({**asked.as_dict(), "context": context})
    return encode_raw(marked, data) if is_raw else marked


def exception_text(error: BaseException) -> str:
    """What an exception says; if its own `__str__` fails, that."""
    try:
        return str(error)
    except Exception as failed:  # noqa: BLE001 - somebody else's code
        return f"(its __str__ raised {type(failed).__name__})"


def exception_args(error: BaseException) -> list[Any]:
    """An exception's arguments, if a failure can hold them; otherwise its text."""
    try:
        args = list(error.args)
        if len(encode_json(args)) <= FAILURE_ARGS_BYTES_MAX:
            return args
    except Exception:  # noqa: BLE001 - they may be anything
        pass
    return [exception_text(error)[:FAILURE_TEXT_MAX]]


def encode_failure(
    class_name: str,
    message: str,
    *,
    module: object = "vchan.errors",
    args: list[Any] | None = None,
    traceback: list[str] | None = None,
) -> bytes:
    """The body of a failed reply, as oslo.messaging serialises exceptions.

    Args:
        module: The class's `__module__`, which somebody may have set to anything.
    """
    message = message[:FAILURE_TEXT_MAX]
    return encode_json(
        {
            "class": class_name,
            "module": str(module),
            "message": message,
            "tb": traceback or [],
            "args": [message] if args is None else args,
            "kwargs": {},
        }
    )


def decode_failure(body: bytes) -> tuple[str, str]:
    """(class name, message) of a failed reply; placeholders where it says neither."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return "UnknownError", body[:200].decode("utf-8", "replace")
    if not isinstance(value, dict):
        return "UnknownError", str(value)[:200]
    return str(value.get("class") or "UnknownError"), str(value.get("message") or "")
