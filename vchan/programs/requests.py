"""A program's arguments made a request, and a request's outcome made a result, or an error."""

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from vchan.errors import RemoteError
from vchan.rpc.arguments import (
    PRIORITIES,
    check_bytes,
    check_mapping,
    check_name,
    check_optional_name,
    check_path,
    check_seconds,
    check_version,
    wrong,
)
from vchan.rpc.bodies import decode_failure, encode_invocation, encode_raw
from vchan.rpc.in_flight import Answered, Outcome, Taken
from vchan.rpc.messages import DEFAULT_EXCHANGE, Request, milliseconds
from vchan.rpc.outcomes import error_of

EXCHANGE: Final = DEFAULT_EXCHANGE
TIMEOUT_S: Final = 60.0
"""oslo.messaging's default rpc_response_timeout."""
READY_S: Final = 5.0
"""How much of a call's time is spent waiting for the daemon to be there."""


def invocation_body(
    method: str,
    args: Mapping[str, Any] | None,
    namespace: str | None,
    version: str | None,
    context: Mapping[str, Any] | None,
) -> bytes:
    """The body of a call or cast, of a program's arguments."""
    check_name("method", method)
    check_mapping("args", args)
    check_optional_name("namespace", namespace)
    if version is not None:
        check_version(version)
    check_mapping("context", context)
    return _encoded(method, args or {}, namespace=namespace, version=version, context=context)


def raw_body(invocation: bytes, data: bytes | bytearray | memoryview) -> bytes:
    """The body of a raw call, of a program's arguments."""
    check_bytes("data", data)
    return encode_raw(invocation, data)


def notification_body(
    event_type: str,
    payload: Any,
    priority: str,
    publisher_id: str,
    context: Mapping[str, Any] | None,
) -> bytes:
    """The body of a notification, of a program's arguments."""
    check_name("event_type", event_type)
    check_name("publisher_id", publisher_id, may_be_empty=True)
    check_mapping("context", context)
    if priority not in PRIORITIES:
        raise wrong("priority", priority, f"one of {', '.join(PRIORITIES)}")
    args = {
        "publisher_id": publisher_id or os.uname().nodename,
        "event_type": event_type,
        "payload": payload,
        "metadata": new_metadata(),
    }
    return _encoded(priority, args, context=context)


def _encoded(method: str, args: Mapping[str, Any], **others: Any) -> bytes:
    try:
        return encode_invocation(method, args, **others)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{method}: JSON cannot say what it is sent: {error}") from error


def make_request(
    flags: int, exchange: str, topic: str, server: str, body: bytes, timeout_s: float
) -> Request:
    """A request with an id of its own, of a program's arguments."""
    check_seconds("timeout_s", timeout_s)
    check_name("topic", topic)
    check_name("server", server, may_be_empty=True)
    check_name("exchange", exchange)
    timeout_ms = milliseconds(timeout_s)
    return Request(os.urandom(16), flags, timeout_ms, 0, exchange, topic, server, body)


def result_of(outcome: Outcome, timeout_s: float) -> Any:
    """What a call returns; or raises what it raises."""
    match outcome:
        case Answered(_, False, result):
            return _parse(result)
        case Answered(_, True, failure):
            class_name, text = decode_failure(failure)
            raise RemoteError(class_name, text, failure.decode("utf-8", "replace"))
        case _:
            raise error_of(outcome, timeout_s)


def raw_result_of(outcome: Outcome, timeout_s: float) -> bytes:
    """What a raw call returns; or raises what it raises."""
    if isinstance(outcome, Answered) and not outcome.failed:
        return outcome.body
    result_of(outcome, timeout_s)
    raise AssertionError("what is no result raises")


def require_taken(outcome: Outcome, timeout_s: float) -> None:
    """Raise what a cast or notification raises, if it was not taken."""
    if not isinstance(outcome, Taken):
        raise error_of(outcome, timeout_s)


def path_of(path: str | os.PathLike[str]) -> str:
    """A socket's path, of a program's argument."""
    if not isinstance(path, str) and hasattr(path, "__fspath__"):
        path = os.fspath(path)
    check_path(path)
    assert isinstance(path, str)
    return path


def new_metadata() -> dict[str, str]:
    """A notification's, as oslo.messaging's own notifier makes it."""
    import datetime  # here: they cost start-up time
    import uuid

    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    return {"message_id": str(uuid.uuid4()), "timestamp": str(now)}


def _parse(result: bytes) -> Any:
    try:
        return json.loads(result)
    except (ValueError, RecursionError) as error:
        raise RemoteError("BadBody", f"the result is not JSON: {error}", "") from error
