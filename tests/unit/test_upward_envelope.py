"""oslo.messaging's wire form, upward: what a guest may send, and what comes back for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.host.oslo_wire.downward_envelope import encode_reply
from vchan.host.oslo_wire.envelope import DEPTH_MAX, EnvelopeError, encode_json
from vchan.host.oslo_wire.mail import (
    ARRIVAL_KEY,
    NOTE_IDS_MAX,
    NOTE_KEY,
    STAYS_MAX,
    Answer,
    Arrival,
    Note,
    encode_arrival,
    encode_note,
    own_queue,
    read_mail,
)
from vchan.host.oslo_wire.upward_envelope import Form, publication, read
from vchan.host.policy.rules import Kind
from vchan.rpc.arguments import PRIORITIES
from vchan.rpc.bodies import encode_invocation
from vchan.rpc.messages import CALL, FANOUT, NAME_BYTES_MAX, NOTIFICATION, Request

VM = "b1b1f4b2-0000-4000-8000-000000000001"
ID = bytes(range(16))


def request(flags: int = 0, body: bytes | None = None, **changes: Any) -> Request:
    if body is None:
        body = encode_invocation("work", {"x": 1})
    made = Request(ID, flags, 0, 0, "nova", "conductor", "", body)
    return made.changed(**changes)


def published(asked: Request, context: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    made = publication(VM, asked, read(asked), context or {})
    envelope = json.loads(made.body)
    assert envelope["oslo.version"] == "2.0"
    return made, json.loads(envelope["oslo.message"])


# -------------------------------------------------------------------- reading requests


@pytest.mark.parametrize(
    ("flags", "method", "kind", "fanout"),
    [
        (0, "work", Kind.CAST, False),
        (CALL, "work", Kind.CALL, False),
        (FANOUT, "work", Kind.CAST, True),
        (NOTIFICATION, "info", Kind.NOTIFY, False),
    ],
)
def test_what_is_asked(flags: int, method: str, kind: Kind, fanout: bool) -> None:
    body = encode_invocation(method, {"x": 1}, namespace="ns", version="1.2", context={"a": 2})
    asked = read(request(flags, body, server="one"))
    assert asked.ask[:7] == (kind, "nova", "conductor", "one", "ns", method, fanout)
    assert (asked.args, asked.version, asked.context) == ({"x": 1}, "1.2", {"a": 2})


@pytest.mark.parametrize("flags", [CALL | FANOUT, CALL | NOTIFICATION, FANOUT | NOTIFICATION])
def test_two_kinds_at_once_are_refused(flags: int) -> None:
    with pytest.raises(EnvelopeError, match="exclude each other"):
        read(request(flags, encode_invocation("info", {})))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", 'expected "method"'),
        (b'{"method": 1}', "method is 1"),
        (b'{"method": "m", "args": []}', None),  # an empty list is no arguments, as null is
        (b'{"method": "m", "args": [1]}', 'expected "method"'),
        (b'{"method": "m", "context": "c"}', 'expected "method"'),
        (b'{"method": "m", "namespace": 1}', "namespace is 1"),
        (b'{"method": "m", "version": {}}', "version is dict"),
        (b'{"method": "' + b"m" * (NAME_BYTES_MAX + 1) + b'"}', "NAME_BYTES_MAX"),
        (b'{"method": "m", "args": {"a": ' + b"[" * 200 + b"]" * 200 + b"}}", "nested"),
        (b"\xff", "not JSON"),
    ],
)
def test_bodies_that_are_refused(body: bytes, reason: str | None) -> None:
    if reason is None:
        assert read(request(0, body)).args == {}
        return
    with pytest.raises(EnvelopeError, match=reason):
        read(request(0, body))


@pytest.mark.parametrize("asked", [request(exchange=""), request(topic="")])
def test_a_target_has_an_exchange_and_a_topic(asked: Request) -> None:
    with pytest.raises(EnvelopeError, match="no exchange, or no topic"):
        read(asked)


def test_a_notification_s_method_is_a_priority() -> None:
    for priority in PRIORITIES:
        read(request(NOTIFICATION, encode_invocation(priority, {})))
    with pytest.raises(EnvelopeError, match="no priority"):
        read(request(NOTIFICATION, encode_invocation("work", {})))


def _bodies() -> st.SearchStrategy[bytes]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    values = st.recursive(
        scalars, lambda some: st.lists(some) | st.dictionaries(st.text(max_size=4), some)
    )
    names = "method args context namespace version _msg_id failure result oslo.version"
    keys = st.sampled_from(
        [*names.split(), "oslo.message", NOTE_KEY, ARRIVAL_KEY, "taken", "unclear", "metadata"]
    )
    objects = st.dictionaries(keys, values | st.just("info") | st.just("0" * 32))
    enveloped = objects.map(lambda o: {"oslo.version": "2.0", "oslo.message": json.dumps(o)})
    return st.binary() | (values | objects | enveloped).map(lambda v: json.dumps(v).encode())


@given(_bodies(), st.integers(0, 255))
def test_reading_any_request_raises_nothing_else(body: bytes, flags: int) -> None:
    asked = request(flags, body)
    try:
        publication(VM, asked, read(asked), {"user_id": None})
    except EnvelopeError:
        pass


@given(_bodies())
def test_reading_any_mail_raises_nothing_else(body: bytes) -> None:
    try:
        read_mail(body)
    except EnvelopeError:
        pass


# -------------------------------------------------------------------- publications


def test_a_cast_as_a_stock_client_makes_it() -> None:
    body = encode_invocation("work", {"x": 1}, namespace="ns", version="1.2", context={"role": "x"})
    made, message = published(request(0, body), {"request_id": "req-1"})
    assert made[:3] == (Form.TOPIC, "nova", "conductor")
    assert made.mandatory and made.expiration_ms is None
    assert message == {
        "_context_request_id": "req-1",  # the guest's own is not there
        "_unique_id": ID.hex(),
        "method": "work",
        "args": {"x": 1},
        "namespace": "ns",
        "version": "1.2",
    }


def test_a_call_names_the_vm_s_own_queue() -> None:
    made, message = published(request(CALL, timeout_ms=1500, monitor_ms=2000, server="one"))
    assert made[:3] == (Form.TOPIC, "nova", "conductor.one")
    assert made.expiration_ms == 1500
    assert message["_msg_id"] == ID.hex()
    assert message["_reply_q"] == own_queue(VM) == own_queue(VM)
    assert message["_timeout"] == 2.0
    assert published(request(CALL))[1]["_timeout"] is None


def test_a_cast_does_not_expire_in_the_broker() -> None:
    assert published(request(timeout_ms=1500))[0].expiration_ms is None


def test_a_fanout() -> None:
    made, _ = published(request(FANOUT, server="one"))
    assert made[:3] == (Form.FANOUT, "nova", "conductor")
    assert not made.mandatory  # if nobody listens, nobody hears it


def test_a_notification_says_whose_it_is() -> None:
    args = {
        "publisher_id": "me",
        "event_type": "agent.started",
        "payload": {"x": 1},
        "metadata": {"message_id": "1", "timestamp": "now"},
    }
    made, message = published(request(NOTIFICATION, encode_invocation("warn", args)))
    assert made[:3] == (Form.NOTIFY, "nova", "conductor.warn")
    assert message.pop("_unique_id") == ID.hex()
    assert message == {
        "publisher_id": f"vchan.{VM}.me",
        "event_type": "agent.started",
        "payload": {"x": 1},
        "priority": "WARN",
        "message_id": "1",
        "timestamp": "now",
    }


@pytest.mark.parametrize(
    "args", [{"metadata": [1]}, {"event_type": 1}, {"publisher_id": "x" * 255}]
)
def test_notifications_that_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(EnvelopeError):
        published(request(NOTIFICATION, encode_invocation("info", args)))


# -------------------------------------------------------------------- mail


def test_answers() -> None:
    result = encode_reply(ID.hex(), result_json=b'{"a": [1]}')
    assert read_mail(result) == Answer(ID, True, False, b'{"a":[1]}')
    beat = encode_reply(ID.hex(), ending=False)
    assert read_mail(beat) == Answer(ID, False, False, b"null")


@pytest.mark.parametrize("as_text", [True, False])
def test_a_failure_has_no_traceback_in_a_guest(as_text: bool) -> None:
    failure = {"class": "E", "module": "m", "message": "no", "tb": ["/secret/path"], "args": []}
    message = {"_msg_id": ID.hex(), "failure": json.dumps(failure) if as_text else failure}
    answer = read_mail(encode_json(message))
    assert isinstance(answer, Answer)
    assert (answer.ending, answer.failed) == (True, True)
    assert json.loads(answer.body) == {**failure, "tb": []}


EMPTY_NOTE = {NOTE_KEY: ["a"], "taken": [], "calls": [], "gone": [], "doubt": []}


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"_msg_id": 1},
        {"_msg_id": "0" * 31},
        {"_msg_id": "0" * 32 + "\n"},
        {"_msg_id": "0" * 32, "failure": "{"},
        {"_msg_id": "0" * 32, "failure": "[]"},
        {"_msg_id": "0" * 32, "failure": 1},
        {"_msg_id": "0" * 32, "failure": '{"a":' * (DEPTH_MAX + 1) + "1" + "}" * (DEPTH_MAX + 1)},
        {ARRIVAL_KEY: 1},
        {ARRIVAL_KEY: "x" * (NAME_BYTES_MAX + 1)},
        {NOTE_KEY: "a stay"},
        {NOTE_KEY: [1]},
        {NOTE_KEY: ["a"]},
        {NOTE_KEY: ["a"], "taken": [], "calls": [], "gone": [], "doubt": [], "unclear": None},
        {**EMPTY_NOTE, "unclear": ["b"], "waited_ms": 1},
        {**EMPTY_NOTE, "unclear": ["b"], "waited_ms": [1, 2]},
        {**EMPTY_NOTE, "unclear": ["b"], "waited_ms": [-1]},
        {**EMPTY_NOTE, "unclear": ["b"], "waited_ms": [True]},
        {**EMPTY_NOTE, "unclear": ["b"], "waited_ms": [1e3]},
        {NOTE_KEY: ["a"], "taken": [1], "calls": [], "gone": [], "doubt": [], "unclear": []},
        {NOTE_KEY: ["a"], "taken": ["0"], "calls": [], "gone": [], "doubt": [], "unclear": []},
        {NOTE_KEY: ["a"] * (STAYS_MAX + 1), "taken": [], "calls": [], "gone": [], "doubt": []},
        {NOTE_KEY: ["a"], "taken": ["0" * 32] * (NOTE_IDS_MAX + 1)},
    ],
)
def test_mail_that_is_nothing(message: dict[str, Any]) -> None:
    with pytest.raises(EnvelopeError):
        read_mail(encode_json(message))


def test_an_arrival_comes_back_as_it_was() -> None:
    assert read_mail(encode_arrival(Arrival("here.1"))) == Arrival("here.1")


ids = st.lists(st.binary(min_size=16, max_size=16), max_size=5).map(tuple)
stays = st.lists(st.text(max_size=20), max_size=5).map(tuple)


@given(st.builds(Note, stays, ids, ids, ids, ids, stays), st.booleans())
def test_a_note_comes_back_as_it_was(note: Note, is_last: bool) -> None:
    waited_ms = tuple(range(len(note.unclear)))
    note = note._replace(waited_ms=waited_ms, is_last=is_last)
    assert read_mail(encode_note(note)) == note


@pytest.mark.parametrize(("doubt", "is_last"), [([], True), (["0" * 32], False)])
def test_a_note_of_an_older_host(doubt: list[str], is_last: bool) -> None:
    """It does not say how long it has waited, and writes a better one if it has doubts."""
    lists: dict[str, list[str]] = {"taken": [], "calls": [], "gone": [], "doubt": doubt}
    note = read_mail(encode_json({NOTE_KEY: ["a"], **lists, "unclear": ["b", "c"]}))
    assert isinstance(note, Note)
    assert (note.waited_ms, note.is_last) == ((0, 0), is_last)


def test_a_note_names_the_last_stays_if_there_are_too_many() -> None:
    many = tuple(map(str, range(STAYS_MAX + 10)))
    note = read_mail(encode_note(Note(many, unclear=many, waited_ms=(1,) * len(many))))
    assert isinstance(note, Note)
    assert note.stays == note.unclear == many[10:]
