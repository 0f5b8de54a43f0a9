"""oslo.messaging's wire form, upward: guests' requests, as the control side's services read them.

Rules of this file
1. Pure: no I/O, no clock, no randomness.
2. What a guest sent raises `EnvelopeError` and nothing else, whatever its bytes.
3. Nothing of a guest's context passes here: it comes in rebuilt (`policy.guest_context`).

A call's `_msg_id` is its id, and its `_reply_q` the VM's own queue (`mail`), so that the answer
follows the VM to whichever host serves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

from vchan.errors import BadBody, LimitExceeded
from vchan.host.oslo_wire.envelope import (
    REQUEST_BYTES_MAX,
    EnvelopeError,
    bounded_json,
    close_envelope,
    encode_json,
    name_of,
)
from vchan.host.oslo_wire.mail import own_queue
from vchan.host.policy.rules import Ask, Kind
from vchan.rpc import httpcall, reports
from vchan.rpc.arguments import PRIORITIES
from vchan.rpc.bodies import decode_raw, encode_raw
from vchan.rpc.messages import CALL, FANOUT, NOTIFICATION, RAW, Request

REPORT_EXCHANGE: Final = "vchan"
"""Of a report, for the policy: the topic is what is reported."""
_KINDS: Final = CALL | FANOUT | NOTIFICATION


class Form(StrEnum):
    """How a request of a guest's is published."""

    TOPIC = "topic"
    """To a topic exchange. Where there is none, nobody listens: none is made."""
    FANOUT = "fanout"
    """To a fanout exchange, likewise. If nobody listens, nobody hears it."""
    NOTIFY = "notify"
    """To a queue of notifications, likewise: a listener has made it, and it waits there for one."""
    MAIL = "mail"
    """To a queue, if there is one."""


class Publication(NamedTuple):
    """A request of a guest's, as it is published.

    Args:
        exchange: oslo.messaging's, as targets name it; "" for MAIL. FANOUT goes to the one called
            "TOPIC_fanout", whatever this says.
        routing_key: "TOPIC", "TOPIC.SERVER", "TOPIC.PRIORITY"; the topic for FANOUT, the queue for
            MAIL.
        expiration_ms: The broker drops it, if it has not been taken by then.
        mandatory: Say so when there is no queue for it. Else it goes nowhere, without a word; but
            NOTIFY never does.
    """

    form: Form
    exchange: str
    routing_key: str
    body: bytes
    expiration_ms: int | None
    mandatory: bool

    @property
    def address(self) -> tuple[str, str]:
        """The exchange and the routing key, as oslo.messaging's clients have them."""
        is_fanout = self.form is Form.FANOUT
        return (f"{self.routing_key}_fanout", "") if is_fanout else self[1:3]


class Asked(NamedTuple):
    """What a guest asks for, and of whom."""

    ask: Ask
    args: Mapping[str, Any]
    version: str | None
    context: Mapping[str, Any]


def read(request: Request, values_max: int | None = None) -> Asked:
    """What a guest's request asks for.

    Args:
        values_max: See `envelope.bounded_json`.

    Raises:
        EnvelopeError: It is not well formed; says how.
    """
    is_report = request.target == reports.TOPIC
    most = reports.REPORT_BYTES_MAX if is_report else REQUEST_BYTES_MAX
    body = bounded_json(_json_of(request), "the request", most, values_max)
    if not isinstance(body, dict):
        raise EnvelopeError("the request is not a JSON object")
    method = name_of(body, "method")
    args, context = body.get("args") or {}, body.get("context") or {}
    if not method or not isinstance(args, dict) or not isinstance(context, dict):
        raise EnvelopeError('expected "method", and "args" and "context" that are objects')
    if request.flags & _KINDS not in (0, CALL, FANOUT, NOTIFICATION):
        raise EnvelopeError("a call, a fanout and a notification exclude each other")
    if is_report:
        return Asked(_read_report(request, method), args, None, {})
    if not request.exchange or not request.topic:
        raise EnvelopeError("there is no exchange, or no topic")
    if request.target == httpcall.TOPIC:
        if request.flags & RAW:
            raise EnvelopeError(f"topic {httpcall.TOPIC.name} takes JSON, and no raw body")
        return Asked(_read_http(request, method, args), args, None, {})
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
    return Asked(ask, args, name_of(body, "version"), context)


def _json_of(request: Request) -> bytes:
    if not request.flags & RAW:
        return request.body
    if len(request.body) > REQUEST_BYTES_MAX:
        size = len(request.body)
        raise EnvelopeError(f"the request has {size} bytes, {REQUEST_BYTES_MAX} are allowed")
    try:
        return decode_raw(request.body)[0]
    except BadBody as error:
        raise EnvelopeError(str(error)) from error


def head(request: Request) -> Ask:
    """What can be said of a request without a look into its body."""
    is_fanout = request.flags & FANOUT != 0
    return Ask(_kind(request), request.exchange, request.topic, request.server, fanout=is_fanout)


def _read_http(request: Request, method: str, args: Mapping[str, Any]) -> Ask:
    """A request to a service under the cloud: the policy judges the service and HTTP's method."""
    if method != httpcall.METHOD or not request.is_call or request.flags & FANOUT:
        raise EnvelopeError(f"topic {httpcall.TOPIC.name} takes calls of {httpcall.METHOD} alone")
    try:
        ask = httpcall.read_ask(args)
    except (BadBody, LimitExceeded) as error:
        raise EnvelopeError(str(error)) from error
    return Ask(Kind.HTTP, httpcall.TOPIC.exchange, ask.service, method=ask.method)


def _read_report(request: Request, method: str) -> Ask:
    """A word to this host itself: the policy judges what is reported."""
    if method not in reports.WHAT or request.flags & _KINDS:
        known = ", ".join(reports.WHAT)
        raise EnvelopeError(f"topic {reports.TOPIC.name} takes casts of {known} alone")
    return Ask(Kind.REPORT, REPORT_EXCHANGE, method)


def _kind(request: Request) -> Kind:
    if request.target == reports.TOPIC:
        return Kind.REPORT
    if request.flags & NOTIFICATION:
        return Kind.NOTIFY
    return Kind.CALL if request.is_call else Kind.CAST


def publication(vm: str, request: Request, asked: Asked, context: Mapping[str, Any]) -> Publication:
    """What the broker gets for a guest's request.

    Args:
        context: The whole context, as the control side may see it.
    """
    ask = asked.ask
    assert ask.kind in (Kind.CALL, Kind.CAST, Kind.NOTIFY), "the host itself serves the others"
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
        message["_reply_q"] = own_queue(vm)
        message["_timeout"] = request.monitor_ms / 1000 if request.monitor_ms else None
    return Publication(
        form,
        ask.exchange,
        key,
        close_envelope(message),
        expiration_ms=request.timeout_ms or None if ask.kind is Kind.CALL else None,
        mandatory=form is Form.TOPIC,
    )


def rebuilt_body(request: Request, asked: Asked, context: Mapping[str, Any]) -> bytes:
    """The body for a program of this host: the guest's, with this context in place of its own."""
    ask = asked.ask
    body = encode_json(
        {
            "method": ask.method,
            "args": asked.args,
            "namespace": ask.namespace or None,
            "version": asked.version,
            "context": context,
        }
    )
    return encode_raw(body, decode_raw(request.body)[1]) if request.flags & RAW else body


def _invocation(asked: Asked) -> dict[str, Any]:
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
