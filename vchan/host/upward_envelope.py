"""oslo.messaging's wire envelope, upward: guests' requests, and what comes back for them.

Rules of this file
1. Pure: no I/O, no clock, no randomness.
2. What a guest sent raises `EnvelopeError` and nothing else, whatever its bytes.
3. Nothing of a guest's context passes here: it comes in rebuilt (`vchan.host.identity`).

A call's `_msg_id` is its id, and its `_reply_q` the VM's own queue, so that the answer follows the
VM to whichever host serves it. That queue also carries notes: what a host that served the VM before
has published, told to the one that serves it now.

    arrival   {"vchan.arrival": stay}
    note      {"vchan.note": [stays], "taken": [ids], "calls": [ids], "gone": [ids], "doubt": [ids],
               "unclear": [stays]}

A stay is a host's time with the VM: a name that no other has. `history` explains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vchan import httpcall
from vchan.errors import BadBody, LimitExceeded
from vchan.host.broker_events import Form, Publication
from vchan.host.envelope import (
    REQUEST_BYTES_MAX,
    EnvelopeError,
    bounded_json,
    encode_json,
    name_of,
    open_envelope,
)
from vchan.host.policy import Ask, Kind
from vchan.messages import CALL, FANOUT, NAME_BYTES_MAX, NOTIFICATION, Request

VM_QUEUE_PREFIX: Final = "vchan_vm_"
ARRIVAL_KEY: Final = "vchan.arrival"
NOTE_KEY: Final = "vchan.note"
NOTE_IDS_MAX: Final = 20_000
"""Ids in a note: more than a host remembers of a VM."""
STAYS_MAX: Final = 64
"""Stays in a note."""
ID_PATTERN: Final = re.compile("[0-9a-f]{32}")
PRIORITIES: Final = frozenset({"audit", "debug", "info", "warn", "error", "critical", "sample"})
"""What oslo.messaging's Notifier knows."""
_KINDS: Final = CALL | FANOUT | NOTIFICATION


def vm_queue(vm: str) -> str:
    """The name of a VM's own queue."""
    return VM_QUEUE_PREFIX + vm


class Invocation(NamedTuple):
    """What a guest asks for, and of whom."""

    ask: Ask
    args: Mapping[str, Any]
    version: str | None
    context: Mapping[str, Any]


def read(request: Request, values_max: int | None = None) -> Invocation:
    """What a guest's request asks for.

    Args:
        values_max: See `envelope.bounded_json`.

    Raises:
        EnvelopeError: It is not well formed; says how.
    """
    body = bounded_json(request.body, "the request", REQUEST_BYTES_MAX, values_max)
    if not isinstance(body, dict):
        raise EnvelopeError("the request is not a JSON object")
    method = name_of(body, "method")
    args, context = body.get("args") or {}, body.get("context") or {}
    if not method or not isinstance(args, dict) or not isinstance(context, dict):
        raise EnvelopeError('expected "method", and "args" and "context" that are objects')
    if request.flags & _KINDS not in (0, CALL, FANOUT, NOTIFICATION):
        raise EnvelopeError("a call, a fanout and a notification exclude each other")
    if not request.exchange or not request.topic:
        raise EnvelopeError("there is no exchange, or no topic")
    if request.target == httpcall.TOPIC:
        return Invocation(_read_http(request, method, args), args, None, {})
    kind = _kind(request)
    if kind is Kind.NOTIFY and method not in PRIORITIES:
        raise EnvelopeError(f"{method!r} is no priority of a notification")
    ask = Ask(
        kind,
        request.exchange,
        request.topic,
        request.server,
        name_of(body, "namespace") or "",
        method,
        fanout=request.flags & FANOUT != 0,
    )
    return Invocation(ask, args, name_of(body, "version"), context)


def _read_http(request: Request, method: str, args: Mapping[str, Any]) -> Ask:
    """A request to a service under the cloud: the policy judges the service and HTTP's method."""
    if method != httpcall.METHOD or not request.is_call or request.flags & FANOUT:
        raise EnvelopeError(f"topic {httpcall.TOPIC.name} takes calls of {httpcall.METHOD} alone")
    try:
        ask = httpcall.read_ask(args)
    except (BadBody, LimitExceeded) as error:
        raise EnvelopeError(str(error)) from error
    return Ask(Kind.HTTP, httpcall.TOPIC.exchange, ask.service, method=ask.method)


def _kind(request: Request) -> Kind:
    if request.flags & NOTIFICATION:
        return Kind.NOTIFY
    return Kind.CALL if request.is_call else Kind.CAST


def publication(
    vm: str, request: Request, asked: Invocation, context: Mapping[str, Any]
) -> Publication:
    """What the broker gets for a guest's request.

    Args:
        context: The whole context, as the control side may see it.
    """
    ask = asked.ask
    message: dict[str, Any] = {f"_context_{key}": value for key, value in context.items()}
    message["_unique_id"] = request.id.hex()
    if ask.kind is Kind.NOTIFY:
        message.update(notification(vm, ask.method, asked.args))
        form, key = Form.NOTIFY, f"{ask.topic}.{ask.method}"
    else:
        message.update(_invocation(asked))
        form = Form.FANOUT if ask.fanout else Form.TOPIC
        key = f"{ask.topic}.{ask.server}" if ask.server and not ask.fanout else ask.topic
    if ask.kind is Kind.CALL:
        message["_msg_id"] = request.id.hex()
        message["_reply_q"] = vm_queue(vm)
        message["_timeout"] = request.monitor_ms / 1000 if request.monitor_ms else None
    return Publication(
        form,
        ask.exchange,
        key,
        encode_json({"oslo.version": "2.0", "oslo.message": encode_json(message).decode()}),
        expiration_ms=request.timeout_ms or None if ask.kind is Kind.CALL else None,
        mandatory=form is Form.TOPIC,
    )


def rebuilt_body(asked: Invocation, context: Mapping[str, Any]) -> bytes:
    """The body for a program of this host: the guest's, with this context in place of its own."""
    ask = asked.ask
    return encode_json(
        {
            "method": ask.method,
            "args": asked.args,
            "namespace": ask.namespace or None,
            "version": asked.version,
            "context": context,
        }
    )


def _invocation(asked: Invocation) -> dict[str, Any]:
    message: dict[str, Any] = {"method": asked.ask.method, "args": asked.args}
    if asked.ask.namespace:
        message["namespace"] = asked.ask.namespace
    if asked.version:
        message["version"] = asked.version
    return message


def notification(vm: str, priority: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """What oslo.messaging's Notifier would send.

    Raises:
        EnvelopeError: The arguments are not a notification's.
    """
    metadata = args.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise EnvelopeError("a notification's metadata is not an object")
    # Nobody may take it for one of a service's own.
    publisher = {"publisher_id": f"vchan.{vm}.{name_of(args, 'publisher_id') or ''}"}
    return {
        "publisher_id": name_of(publisher, "publisher_id"),  # no longer than others may be
        "event_type": name_of(args, "event_type"),
        "payload": args.get("payload"),
        "priority": priority.upper(),
        "message_id": name_of(metadata, "message_id"),
        "timestamp": name_of(metadata, "timestamp"),
    }


class Answer(NamedTuple):
    """What a service says to a call. Not `ending`: it still works on it."""

    id: bytes
    ending: bool
    failed: bool
    body: bytes


class Arrival(NamedTuple):
    """A host serves the VM from now on."""

    stay: str


class Note(NamedTuple):
    """What a host knows to have been published when the VM leaves it.

    stays: those that it speaks for, all of one host. taken: casts. calls: calls, whose answers
    come, or are here. gone: calls that have no answer any more. doubt: requests that may have been
    published. unclear: stays before it of which it knows nothing.
    """

    stays: tuple[str, ...]
    taken: tuple[bytes, ...] = ()
    calls: tuple[bytes, ...] = ()
    gone: tuple[bytes, ...] = ()
    doubt: tuple[bytes, ...] = ()
    unclear: tuple[str, ...] = ()


def encode_arrival(arrival: Arrival) -> bytes:
    """For the VM's own queue."""
    return encode_json({ARRIVAL_KEY: arrival.stay})


def encode_note(note: Note) -> bytes:
    """For the VM's own queue."""
    lists = {name: [each.hex() for each in getattr(note, name)] for name in _LISTS}
    stays, unclear = note.stays[-STAYS_MAX:], note.unclear[-STAYS_MAX:]
    return encode_json({NOTE_KEY: stays, **lists, "unclear": unclear})


_LISTS: Final = ("taken", "calls", "gone", "doubt")


def read_mail(body: bytes) -> Answer | Arrival | Note:
    """A message of a VM's own queue. Its sender is trusted as far as the broker's accounts are.

    Raises:
        EnvelopeError: It is none of them.
    """
    value = open_envelope(body)
    if ARRIVAL_KEY in value:
        return Arrival(_stay(value[ARRIVAL_KEY]))
    if NOTE_KEY in value:
        taken, calls, gone, doubt = (_ids(value.get(name)) for name in _LISTS)
        stays, unclear = _stays(value[NOTE_KEY]), _stays(value.get("unclear"))
        return Note(stays, taken, calls, gone, doubt, unclear)
    return _answer(value)


def _stays(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > STAYS_MAX:
        raise EnvelopeError("a note's stays are not a list, or too many")
    return tuple(map(_stay, value))


def _stay(value: object) -> str:
    if not isinstance(value, str) or len(value) > NAME_BYTES_MAX:
        raise EnvelopeError("a stay is not a name")
    return value


def _ids(value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > NOTE_IDS_MAX:
        raise EnvelopeError("a note's ids are not a list, or too many")
    if not all(isinstance(each, str) and ID_PATTERN.fullmatch(each) for each in value):
        raise EnvelopeError("a note's ids are not all 32 hex digits")
    return tuple(bytes.fromhex(each) for each in value)


def _answer(value: Mapping[str, Any]) -> Answer:
    msg_id = value.get("_msg_id")
    if not isinstance(msg_id, str) or not ID_PATTERN.fullmatch(msg_id):
        raise EnvelopeError("an answer to none of a guest's requests: _msg_id is not 32 hex digits")
    request_id = bytes.fromhex(msg_id)
    failure = value.get("failure")
    if failure is not None:
        return Answer(request_id, True, True, _failure_for_guest(failure))
    ending = bool(value.get("ending", True))
    return Answer(request_id, ending, False, encode_json(value.get("result")))


def _failure_for_guest(failure: object) -> bytes:
    """A service's exception, less its traceback: that tells of the control plane's insides."""
    if isinstance(failure, str):
        failure = bounded_json(failure.encode("utf-8", "surrogatepass"), "an answer's failure")
    if not isinstance(failure, dict):
        raise EnvelopeError("an answer's failure is not an object")
    return encode_json({**failure, "tb": []})
