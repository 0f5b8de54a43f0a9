"""oslo.messaging's wire form, downward: services' requests, and the replies to them.

Rules of this file
1. Pure: no I/O, no clock, no randomness.
2. What a caller sent raises `EnvelopeError` and nothing else, whatever its bytes.
3. What a guest sent never raises: a bad reply becomes a failure that says what was wrong.

    request     {"method", "args", "namespace", "version", "_unique_id", "_context_<key>"...}
                a call also has "_msg_id", "_reply_q", "_timeout" and the AMQP property `expiration`
    reply       {"result", "failure", "ending", "_msg_id", "_unique_id"}
    failure     a JSON text: {"class", "module", "message", "tb", "args", "kwargs"}
"""

from __future__ import annotations

import builtins
import math
import re
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from vchan.errors import BadBody
from vchan.host.oslo_wire.envelope import (
    ID_PATTERN,
    EnvelopeError,
    bounded_json,
    close_envelope,
    encode_json,
    is_utf8,
    name_of,
    open_envelope,
    shortened,
)
from vchan.rpc.bodies import decode_raw, encode_failure, encode_raw
from vchan.rpc.messages import ID_BYTES, NAME_BYTES_MAX, RAW, Request
from vchan.session import MESSAGE_BYTES_MAX

_new_tuple = tuple.__new__

RESULT_BYTES_MAX: Final = MESSAGE_BYTES_MAX
"""A result from a guest: what one message of a session can carry."""
FAILURE_BYTES_MAX: Final = 256 * 1024
"""A failure from a guest: a long traceback takes a tenth of it."""
FAILURE_VALUES_MAX: Final = 20_000
"""Values in it, a line of the traceback each: what takes the daemon some 15 ms."""
UNKNOWN_MODULE: Final = "vchan.guest.raised"
"""What stands for the module of an exception that no caller may rebuild. There is no such module:
a caller that would import it gets a RemoteError all the same."""
PYTHON_MODULES: Final = frozenset({builtins.__name__, "exceptions"})
"""The second is Python 2's name for the first, and oslo.messaging's clients take it for that."""
PLAIN_ERRORS: Final = frozenset(
    {
        *("Exception", "ArithmeticError", "AssertionError", "AttributeError", "EOFError"),
        *("FloatingPointError", "IndexError", "KeyError", "LookupError", "NotImplementedError"),
        *("OverflowError", "RuntimeError", "TypeError", "ValueError", "ZeroDivisionError"),
    }
)
"""Python's exceptions that may be raised in a caller, as they are in a program whose method failed:
they take any arguments and do nothing with them, and nothing in Python goes by them (as it does by
StopIteration, GeneratorExit, MemoryError, warnings and the like)."""
OS_ERRORS: Final = frozenset(
    {
        *("OSError", "EnvironmentError", "IOError", "BlockingIOError", "BrokenPipeError"),
        *("ChildProcessError", "ConnectionAbortedError", "ConnectionError"),
        *("ConnectionRefusedError", "ConnectionResetError", "FileExistsError"),
        *("FileNotFoundError", "InterruptedError", "IsADirectoryError", "NotADirectoryError"),
        *("PermissionError", "ProcessLookupError", "TimeoutError"),
    }
)
"""Likewise, but they look at their arguments."""
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
_PREFIX_CHARS: Final = len(_CONTEXT_PREFIX)
_EXPIRATION: Final = re.compile("[0-9]{1,15}")
_FAILURE_PARTS: Final[Mapping[str, type]] = {
    "message": str,
    "tb": list,
    "args": list,
    "kwargs": dict,
}
"""What a failure may have besides class and module."""


class BrokerRequest(NamedTuple):
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


class ReplyPublication(NamedTuple):
    """A reply as it is published to its caller's queue.

    Args:
        has_not_run: It says that its call has not run, and never will: it is published when the
            broker has proved that it has forgotten the call.
    """

    reply_q: str
    body: bytes
    has_not_run: bool = False


def decode(body: bytes, *, expiration: str | None) -> BrokerRequest:
    """Read an AMQP message's body.

    Args:
        expiration: The AMQP property: the caller's timeout, as a number of milliseconds.

    Raises:
        EnvelopeError: It is no request. Sending it again will not help.
    """
    message = open_envelope(body)
    identity = _identity(message, body)
    assert len(identity) == ID_BYTES, "the guest is sent so many"
    context = {
        key[_PREFIX_CHARS:]: value
        for key, value in message.items()
        if key.startswith(_CONTEXT_PREFIX)
    }
    is_notification = "method" not in message and "event_type" in message
    method, args = _notification(message) if is_notification else _invocation(message)
    msg_id, reply_q = name_of(message, "_msg_id"), name_of(message, "_reply_q")
    if (msg_id is None) != (reply_q is None):
        raise EnvelopeError("_msg_id and _reply_q: one without the other")
    if reply_q is not None and not is_utf8(reply_q):
        # It would be published to on the channel that all VMs' replies share.
        raise EnvelopeError("_reply_q has a lone surrogate: no queue is called so")
    namespace, version = name_of(message, "namespace"), name_of(message, "version")
    monitor_timeout_s = _seconds(message.get("_timeout"))
    timeout_s = _milliseconds(expiration)
    what = identity, method, args, namespace, version, context
    how = msg_id, reply_q, monitor_timeout_s, timeout_s, is_notification
    request: BrokerRequest = _new_tuple(BrokerRequest, what + how)
    return request


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


def cut_context(request: Request, passing: Callable[[Mapping[str, Any]], frozenset[str]]) -> bytes:
    """The body of a local program's request, less what of its context must not enter a guest. What
    is no request's body is the agent's to refuse.

    Args:
        passing: Given a context, the keys that may enter; "*" lets all through.
    """
    try:
        head, data = decode_raw(request.body) if request.flags & RAW else (request.body, b"")
        asked = bounded_json(head, "the request")
    except (BadBody, EnvelopeError):
        return request.body
    context = asked.get("context") if isinstance(asked, dict) else None
    if not isinstance(context, dict):
        return request.body
    context_allow = passing(context)
    if "*" in context_allow or context_allow.issuperset(context):
        return request.body
    kept = {key: value for key, value in context.items() if key in context_allow}
    cut = encode_json({**asked, "context": kept})
    return encode_raw(cut, data) if request.flags & RAW else cut


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
    Infinity pass, because they do between a stock client and a stock server. A failure is written
    anew, too: the caller sees the agent's exception as if no daemon stood between, if it may be
    raised in the caller. One that is too large, too deep or malformed is replaced by a failure
    that says so.

    Args:
        result_json: From a guest, and so not trusted. Ignored when there is a failure.
        failure_json: Likewise.
        unique_id: 32 random hex digits, new for each message; clients may drop one they have
            seen. "" leaves it out, which clients accept.
        may_raise: Whether the caller may rebuild exceptions of this module. Of others it gets a
            RemoteError with class, message and traceback as text.
        values_max: Values in the result. None: as many as its bytes can be.
    """
    result, failure = None, None
    try:
        if failure_json is not None:
            failure = _checked_failure(failure_json, may_raise)
        else:
            most = RESULT_BYTES_MAX if values_max is None else values_max
            result = bounded_json(result_json, "the agent's reply", RESULT_BYTES_MAX, most)
    except EnvelopeError as error:
        failure = make_failure("BadReply", "vchan.errors", str(error))
    assert ending or failure is None, "who says that it works on a call has not failed at it"
    message = {"result": result, "failure": failure, "ending": ending, "_msg_id": msg_id}
    if unique_id:
        message["_unique_id"] = unique_id
    return close_envelope(message)


def make_failure(class_name: str, module: str, message: str) -> str:
    """A failure of vchan's own, e.g. ("AgentGone", "vchan.errors", "..."). Long texts are cut."""
    return encode_failure(class_name, message, module=module).decode("utf-8", "surrogatepass")


def _identity(message: Mapping[str, Any], body: bytes) -> bytes:
    """The id: oslo's own if it is 32 hex digits, else a hash of it, or of the body without one.

    Two messages without any id and with the same body count as one.
    """
    unique_id = message.get("_unique_id")
    if unique_id is None:
        return blake2b(body, digest_size=ID_BYTES).digest()
    if not isinstance(unique_id, str):
        raise EnvelopeError("_unique_id is not a string")
    if ID_PATTERN.fullmatch(unique_id):
        return bytes.fromhex(unique_id)
    return blake2b(unique_id.encode("utf-8", "surrogatepass"), digest_size=ID_BYTES).digest()


def _invocation(message: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    method = name_of(message, "method")
    if not method:
        raise EnvelopeError("there is no method")
    args = message.get("args", {})
    if not isinstance(args, dict):
        raise EnvelopeError(f"args is {shortened(args)}, not an object")
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


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    if value == 0:
        return None  # a stock client with call_monitor_timeout=0 waits for no heartbeats
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EnvelopeError(f"_timeout is {shortened(value)}, not a number of seconds")
    try:
        seconds = float(value)
    except OverflowError:  # an integer beyond what a float can say
        seconds = math.inf
    if not math.isfinite(seconds) or seconds <= 0:
        raise EnvelopeError(f"_timeout is {shortened(value)}, not a time")
    return seconds


def _milliseconds(expiration: str | None) -> float | None:
    if expiration is None:
        return None
    if not isinstance(expiration, str) or not _EXPIRATION.fullmatch(expiration):
        raise EnvelopeError(f"expiration is {shortened(expiration)}, not a number of milliseconds")
    return int(expiration) / 1000


def _checked_failure(failure_json: bytes, may_raise: Callable[[str], object]) -> str:
    """A failure that any caller can read, and that it may rebuild an exception from if its own
    list allows the module: written anew, with what callers look at and nothing else."""
    what = "the agent's failure"
    failure = bounded_json(failure_json, what, FAILURE_BYTES_MAX, FAILURE_VALUES_MAX)
    if not isinstance(failure, dict):
        raise EnvelopeError(f"{what} is not a JSON object")
    if not _is_dotted_name(failure.get("module")):
        raise EnvelopeError(f"{what}: module is not a name")
    if not _is_dotted_name(failure.get("class")) or "." in failure["class"]:
        raise EnvelopeError(f"{what}: class is not a name")
    for key, kind in _FAILURE_PARTS.items():
        if not isinstance(failure.setdefault(key, kind()), kind):
            raise EnvelopeError(f"{what}: {key} is of the wrong type")
    if not all(isinstance(line, str) for line in failure["tb"]):
        raise EnvelopeError(f"{what}: tb is not a list of strings")
    if failure["module"] in PYTHON_MODULES:
        failure["module"] = builtins.__name__
    if not may_raise(failure["module"]) or not _is_rebuildable(failure):
        failure |= {"module": UNKNOWN_MODULE, "args": [], "kwargs": {}}
    kept = {key: failure[key] for key in ("class", "module", *_FAILURE_PARTS)}
    return encode_json(kept).decode()


def _is_rebuildable(failure: Mapping[str, Any]) -> bool:
    """Whether a caller that makes the exception from its arguments gets one, and no other than
    its programs have to expect.

    Any caller makes Python's own, whatever its list says: so only those pass here that mean nothing
    to Python itself, with arguments that none of its versions refuses. oslo.messaging minds a
    TypeError and no more, and there are others (an ExceptionGroup of nothing, a number too large
    for C). What a caller's list allows beyond Python's is its own business.
    """
    if failure["module"] != builtins.__name__:
        return True
    if failure["kwargs"]:
        return False
    if failure["class"] in PLAIN_ERRORS:
        return True
    return failure["class"] in OS_ERRORS and _are_os_errors(failure["args"])


def _are_os_errors(args: list[Any]) -> bool:
    """A text; or a number and one or two texts: of these every OSError can be made."""
    if len(args) < 2:
        return all(isinstance(each, str) for each in args)
    number, *texts = args
    is_number = type(number) is int and 0 <= number < 2**31
    return is_number and len(texts) < 3 and all(isinstance(each, str) for each in texts)


def _is_dotted_name(value: object) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= NAME_BYTES_MAX
        and all(part.isidentifier() for part in value.split("."))
    )
