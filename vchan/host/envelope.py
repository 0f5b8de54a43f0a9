"""oslo.messaging's wire envelope: what its RPC clients publish, and what they take as a reply.

Rules of this file
1. Pure: no I/O, no clock, no randomness.
2. What a caller sent raises `EnvelopeError` and nothing else, whatever its bytes.
3. What a guest sent never raises: a bad reply becomes a failure that says what was wrong.

    AMQP body   {"oslo.version": "2.0", "oslo.message": "<the message, as JSON again>"}
    request     {"method", "args", "namespace", "version", "_unique_id", "_context_<key>"...}
                a call also has "_msg_id", "_reply_q", "_timeout" and the AMQP property `expiration`
    reply       {"result", "failure", "ending", "_msg_id", "_unique_id"}
    failure     a JSON text: {"class", "module", "message", "tb", "args", "kwargs"}

Version 1 of the envelope had no envelope: such bodies are the message itself, and are taken.
"""

from __future__ import annotations

import builtins
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from vchan.bodies import encode_failure
from vchan.errors import VchanError
from vchan.messages import ID_BYTES, NAME_BYTES_MAX
from vchan.session import MESSAGE_BYTES_MAX

REQUEST_BYTES_MAX: Final = 16 * 1024 * 1024
"""An AMQP body from a caller: RabbitMQ's own default limit since 4.0."""
RESULT_BYTES_MAX: Final = MESSAGE_BYTES_MAX
"""A result from a guest: what one message of a session can carry."""
FAILURE_BYTES_MAX: Final = 256 * 1024
"""A failure from a guest: a long traceback takes a tenth of it."""
DEPTH_MAX: Final = 100
"""Arrays and objects inside each other. Python's own parsers, the callers' among them, give up at
some 1000, less what is on the stack already: what passes here must not break a caller there."""
INT_DIGITS_MAX: Final = 309
"""Digits of an integer from a guest: as many as the largest float has. What they cost grows with
their square."""
REASON_CHARS_MAX: Final = 200
UNKNOWN_MODULE: Final = "vchan.guest.raised"
"""What stands for the module of an exception that no caller may rebuild. There is no such module:
a caller that would import it gets a RemoteError all the same."""

CONTEXT_ALLOW: Final = frozenset(
    {
        "request_id",  # so that the guest's log can be matched with the control plane's
        "global_request_id",  # the same, across services
        "resource_uuid",  # what the request is about
        "project_id",  # whose request it is: a name, and no authority to act in it
        "tenant",  # what project_id was called before
        "user_id",  # who asked: likewise
        "user",
    }
)
"""What of a caller's context a guest may see. Tokens, catalogs and trusts are secrets; roles and
is_admin are nothing a guest could check, so it is better off without them."""
CONTEXT_ALLOW_ALL: Final = frozenset({"*"})

_CONTEXT_PREFIX: Final = "_context_"
_UNIQUE_ID: Final = re.compile("[0-9a-f]{32}")
_EXPIRATION: Final = re.compile("[0-9]{1,15}")
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_ascii = json.JSONEncoder(separators=(",", ":"))


class EnvelopeError(VchanError):
    """A message from the broker is not one of oslo.messaging's. The reason says how."""

    def __init__(self, reason: str) -> None:
        self.reason = reason[:REASON_CHARS_MAX]
        super().__init__(self.reason)


@dataclass(frozen=True, slots=True)
class BrokerRequest:
    """A call, cast, fanout or notification, as it came from the broker.

    `id` is the same on every redelivery. `timeout_s` is the caller's whole timeout, counted from
    when it was sent; how long it was queued is not known. A notification's `method` is its priority
    in lower case ("info"), its `args` what an endpoint's method of that name takes.
    """

    id: bytes
    method: str
    args: Mapping[str, Any]
    namespace: str | None
    version: str | None
    context: Mapping[str, Any]
    msg_id: str | None
    reply_q: str | None
    monitor_timeout_s: float | None
    timeout_s: float | None
    is_notification: bool = False

    @property
    def is_call(self) -> bool:
        """Whether the caller waits for a reply."""
        return self.msg_id is not None


def decode(body: bytes, *, expiration: str | None) -> BrokerRequest:
    """Read an AMQP message's body.

    Args:
        expiration: The AMQP property: the caller's timeout, as a number of milliseconds.

    Raises:
        EnvelopeError: It is no request. Sending it again will not help.
    """
    message = open_envelope(body)
    identity = _identity(message, body)
    context = {
        key.removeprefix(_CONTEXT_PREFIX): value
        for key, value in message.items()
        if key.startswith(_CONTEXT_PREFIX)
    }
    is_notification = "method" not in message and "event_type" in message
    method, args = _notification(message) if is_notification else _invocation(message)
    msg_id, reply_q = name_of(message, "_msg_id"), name_of(message, "_reply_q")
    if (msg_id is None) != (reply_q is None):
        raise EnvelopeError("_msg_id and _reply_q: one without the other")
    return BrokerRequest(
        id=identity,
        method=method,
        args=args,
        namespace=name_of(message, "namespace"),
        version=name_of(message, "version"),
        context=context,
        msg_id=msg_id,
        reply_q=reply_q,
        monitor_timeout_s=_seconds(message.get("_timeout")),
        timeout_s=_milliseconds(expiration),
        is_notification=is_notification,
    )


def request_body(request: BrokerRequest, context_allow: frozenset[str] = CONTEXT_ALLOW) -> bytes:
    """The body of the request that goes into the guest: compact UTF-8 JSON.

    Args:
        context_allow: Keys of the context that the guest may see; "*" lets all through.
    """
    everything = "*" in context_allow
    context = {
        key: value for key, value in request.context.items() if everything or key in context_allow
    }
    return encode_json(
        {
            "method": request.method,
            "args": request.args,
            "namespace": request.namespace,
            "version": request.version,
            "context": context,
        }
    )


def cut_context(body: bytes, context_allow: frozenset[str]) -> bytes:
    """The body of a local program's request, less what of its context must not enter a guest. What
    is no request's body is the agent's to refuse."""
    if "*" in context_allow:
        return body
    try:
        request = bounded_json(body, "the request")
    except EnvelopeError:
        return body
    context = request.get("context") if isinstance(request, dict) else None
    if not isinstance(context, dict) or context_allow.issuperset(context):
        return body
    kept = {key: value for key, value in context.items() if key in context_allow}
    return encode_json({**request, "context": kept})


def encode_reply(
    msg_id: str,
    *,
    result_json: bytes = b"null",
    failure_json: bytes | None = None,
    ending: bool = True,
    unique_id: str = "",
    may_raise: Callable[[str], object] = lambda _: True,
    values_max: int | None = None,
) -> bytes:
    """The AMQP body of a reply or, with `ending` false, of a heartbeat.

    The result is written anew, so that no caller's parser meets what ours did not. NaN and
    Infinity pass, because they do between a stock client and a stock server. A failure passes as it
    is, so that the caller sees the agent's exception as if there were no relay. One that is
    too large, too deep or not what it should be is replaced by a failure that says so.

    Args:
        result_json: From a guest, and so not trusted. Ignored when there is a failure.
        failure_json: Likewise.
        unique_id: 32 random hex digits, new for each message; clients may drop one they have
            seen. "" leaves it out, which clients accept.
        may_raise: Whether the caller may rebuild exceptions of this module. Of others it gets a
            RemoteError with class, message and traceback as text.
        values_max: Values in the result. None: any number.
    """
    result, failure = None, None
    try:
        if failure_json is not None:
            failure = _checked_failure(failure_json, may_raise)
        else:
            result = bounded_json(result_json, "the agent's reply", RESULT_BYTES_MAX, values_max)
    except EnvelopeError as error:
        failure = make_failure("BadReply", "vchan.errors", str(error))
    message = {"result": result, "failure": failure, "ending": ending, "_msg_id": msg_id}
    if unique_id:
        message["_unique_id"] = unique_id
    return encode_json({"oslo.version": "2.0", "oslo.message": encode_json(message).decode()})


def make_failure(class_name: str, module: str, message: str) -> str:
    """A failure of vchan's own, e.g. ("AgentGone", "vchan.errors", "..."). Long texts are cut."""
    return encode_failure(class_name, message, module=module).decode("utf-8", "surrogatepass")


def open_envelope(body: bytes) -> dict[str, Any]:
    """The message in an AMQP body.

    Raises:
        EnvelopeError: There is none.
    """
    envelope = bounded_json(body, "the body", REQUEST_BYTES_MAX)
    if not isinstance(envelope, dict):
        raise EnvelopeError("the body is not a JSON object")
    if "oslo.message" not in envelope:
        return envelope
    version, text = envelope.get("oslo.version"), envelope["oslo.message"]
    if not isinstance(version, str) or version.partition(".")[0] != "2":
        raise EnvelopeError(f"oslo.version is {_short(version)}: only 2.x is known")
    if not isinstance(text, str):
        raise EnvelopeError("oslo.message is not a string")
    message = bounded_json(text.encode("utf-8", "surrogatepass"), "oslo.message")
    if not isinstance(message, dict):
        raise EnvelopeError("oslo.message is not a JSON object")
    return message


def _identity(message: Mapping[str, Any], body: bytes) -> bytes:
    """The id: oslo's own if it is 32 hex digits, else a hash of it, or of the body without one.

    Two messages without any id and with the same body count as one.
    """
    unique_id = message.get("_unique_id")
    if unique_id is None:
        return blake2b(body, digest_size=ID_BYTES).digest()
    if not isinstance(unique_id, str):
        raise EnvelopeError("_unique_id is not a string")
    if _UNIQUE_ID.fullmatch(unique_id):
        return bytes.fromhex(unique_id)
    return blake2b(unique_id.encode("utf-8", "surrogatepass"), digest_size=ID_BYTES).digest()


def _invocation(message: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    method = name_of(message, "method")
    if not method:
        raise EnvelopeError("there is no method")
    args = message.get("args", {})
    if not isinstance(args, dict):
        raise EnvelopeError(f"args is {_short(args)}, not an object")
    return method, args


def _notification(message: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    priority = name_of(message, "priority")
    if not priority:
        raise EnvelopeError("a notification without a priority")
    args = {
        "publisher_id": name_of(message, "publisher_id"),
        "event_type": name_of(message, "event_type"),
        "payload": message.get("payload"),
        "metadata": {
            "message_id": name_of(message, "message_id"),
            "timestamp": name_of(message, "timestamp"),
        },
    }
    return priority.lower(), args


def name_of(message: Mapping[str, Any], key: str) -> str | None:
    """A string of at most NAME_BYTES_MAX bytes, or None if it is not there.

    Raises:
        EnvelopeError: It is something else.
    """
    value = message.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise EnvelopeError(f"{key} is {_short(value)}, not a string")
    if len(value.encode("utf-8", "surrogatepass")) > NAME_BYTES_MAX:
        raise EnvelopeError(f"{key} is over {NAME_BYTES_MAX} bytes (NAME_BYTES_MAX)")
    return value


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EnvelopeError(f"_timeout is {_short(value)}, not a number of seconds")
    try:
        seconds = float(value)
    except OverflowError:  # an integer beyond what a float can say
        seconds = math.inf
    if not math.isfinite(seconds) or seconds <= 0:
        raise EnvelopeError(f"_timeout is {_short(value)}, not a time")
    return seconds


def _milliseconds(expiration: str | None) -> float | None:
    if expiration is None:
        return None
    if not isinstance(expiration, str) or not _EXPIRATION.fullmatch(expiration):
        raise EnvelopeError(f"expiration is {_short(expiration)}, not a number of milliseconds")
    return int(expiration) / 1000


def _checked_failure(failure_json: bytes, may_raise: Callable[[str], object]) -> str:
    """The same text, if a caller can rebuild an exception from it and may.

    A caller imports the module if its own list allows it: here it is made sure that class and
    module are names and nothing else, and that the module is one of ours to pass on.
    """
    what = "the agent's failure"
    failure = bounded_json(failure_json, what, FAILURE_BYTES_MAX)
    if not isinstance(failure, dict):
        raise EnvelopeError(f"{what} is not a JSON object")
    if not _is_dotted_name(failure.get("module")):
        raise EnvelopeError(f"{what}: module is not a name")
    if not _is_dotted_name(failure.get("class")) or "." in failure["class"]:
        raise EnvelopeError(f"{what}: class is not a name")
    if not isinstance(failure.get("message", ""), str):
        raise EnvelopeError(f"{what}: message is not a string")
    for key, kind in (("tb", list), ("args", list), ("kwargs", dict)):
        if not isinstance(failure.get(key, kind()), kind):
            raise EnvelopeError(f"{what}: {key} is of the wrong type")
    if not all(isinstance(line, str) for line in failure.get("tb", ())):
        raise EnvelopeError(f"{what}: tb is not a list of strings")
    if not may_raise(failure["module"]) or not _is_rebuildable(failure):
        return _as_text(failure)
    return failure_json.decode("utf-8", "surrogatepass")


def _is_rebuildable(failure: Mapping[str, Any]) -> bool:
    """Whether a caller that makes the exception from its arguments gets one.

    Any caller makes Python's own, of whatever a guest gave: oslo.messaging minds a TypeError and
    no more, and there are others (an ExceptionGroup of nothing, a number too large for C).
    """
    if failure["module"] != builtins.__name__:
        return True
    kind = getattr(builtins, failure["class"], None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return False
    try:
        str(kind(*failure.get("args", ()), **failure.get("kwargs", {})))
    except Exception:  # noqa: BLE001  # whatever it is, the caller would have met it
        return False
    return True


def _as_text(failure: Mapping[str, Any]) -> str:
    """A failure that no caller rebuilds: what it was called and said, as text."""
    plain = {key: failure[key] for key in ("class", "message", "tb") if key in failure}
    plain |= {"module": UNKNOWN_MODULE, "args": [], "kwargs": {}}
    return encode_json(plain).decode("utf-8", "surrogatepass")


def _is_dotted_name(value: object) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= NAME_BYTES_MAX
        and all(part.isidentifier() for part in value.split("."))
    )


def bounded_json(
    data: bytes, what: str, bytes_max: int = REQUEST_BYTES_MAX, values_max: int | None = None
) -> Any:
    """JSON of a bounded size and depth.

    Args:
        values_max: What has more values is not even parsed: numbers, strings, lists, and objects'
            entries. Nor are integers over INT_DIGITS_MAX. None: any number, of any size.

    Raises:
        EnvelopeError: It is none. `what` is what the reason calls it.
    """
    if len(data) > bytes_max:
        raise EnvelopeError(f"{what} has {len(data)} bytes, {bytes_max} are allowed")
    if values_max is not None and _has_more_values(data, values_max):
        raise EnvelopeError(f"{what} has over {values_max} values (json_values)")
    try:
        # surrogatepass, because Python's own encoders write a lone surrogate that way.
        text = data.decode("utf-8", "surrogatepass")
        is_plain = values_max is None or not _may_have_long_int(data)
        value = json.loads(text) if is_plain else _decode_bounded(text)
    except RecursionError as error:
        raise EnvelopeError(f"{what} is nested over {DEPTH_MAX} deep") from error
    except ValueError as error:
        raise EnvelopeError(f"{what} is not JSON: {error}") from error
    # Cheap first: most messages have fewer brackets in all.
    if data.count(b"[") + data.count(b"{") > DEPTH_MAX and _deeper_than(value, DEPTH_MAX):
        raise EnvelopeError(f"{what} is nested over {DEPTH_MAX} deep")
    return value


_DIGITS: Final = re.compile(rb"[0-9]{10}")


def _may_have_long_int(data: bytes) -> bool:
    """A look at every 31st byte: of one digit more than are allowed, it sees ten. To be asked about
    each integer makes parsing slow; and an even step would take "0,0,0" for digits."""
    return _DIGITS.search(data[:: (INT_DIGITS_MAX + 1) // 10]) is not None


def _bounded_int(text: str) -> int:
    if len(text) > INT_DIGITS_MAX:
        raise ValueError(f"an integer of {len(text)} digits, {INT_DIGITS_MAX} are allowed")
    return int(text)


_decode_bounded: Final = json.JSONDecoder(parse_int=_bounded_int).decode


def _has_more_values(data: bytes, most: int) -> bool:
    """What a parser takes its time for. Told from what stands between values, in C and without
    parsing: 4 MiB of text take it a moment, of numbers and keys half a second."""
    if len(data) <= 2 * most or _separators(data) <= most:
        return False
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * most:  # two for a key, and two for its value
        return True
    outside_strings = plain.split(b'"')[::2]
    return sum(map(_separators, outside_strings)) > most


def _separators(data: bytes) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _deeper_than(value: object, depth_max: int) -> bool:
    """Level by level, and so without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth_max):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def encode_json(value: object) -> bytes:
    """Compact UTF-8 JSON, of what a parser made."""
    try:
        return _compact.encode(value).encode()
    except UnicodeEncodeError:  # a lone surrogate: UTF-8 cannot say it, an escape can
        return _ascii.encode(value).encode()


def _short(value: object) -> str:
    return repr(value)[:40] if isinstance(value, str | int | float) else type(value).__name__
