"""Whatever stands in a message from the broker: it is read, or it is an EnvelopeError; and what was
read breaks nothing further in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.rig.mail import take_mail
from tests.unit.test_vm_downward import TOO_LARGE, A, B, Rig
from vchan.errors import LimitExceeded
from vchan.host.oslo_wire.downward_envelope import decode
from vchan.host.oslo_wire.envelope import EnvelopeError
from vchan.host.oslo_wire.mail import ARRIVAL_KEY, NOTE_KEY
from vchan.rpc.messages import FINAL, Reply

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=300),
    st.characters(categories=["Cs"]),
    st.sampled_from(["", "2.0", "3.0", "\0", "0" * 32, "F" * 32, "1e999", "x" * 256, "é" * 128]),
    st.recursive(
        st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=5,
    ),
)
GOOD: dict[str, Any] = {
    "method": "note",
    "args": {"x": 1},
    "namespace": None,
    "version": "1.0",
    "_unique_id": "0" * 32,
    "_msg_id": "m",
    "_reply_q": "reply_q",
    "_timeout": 60,
    "_context_request_id": "req-1",
    "event_type": "e",
    "publisher_id": "p",
    "priority": "INFO",
    "payload": {},
    "message_id": "i",
    "timestamp": "t",
}


def envelopes(message: dict[str, Any]) -> list[bytes]:
    plain = json.dumps(message)
    wrapped = json.dumps({"oslo.version": "2.0", "oslo.message": plain})
    return [plain.encode(), wrapped.encode()]


def follow(body: bytes, expiration: str | None) -> None:
    """From the broker to the guest, and the answer back."""
    rig = Rig()
    rig.serve(A, B)
    try:
        request = decode(body, expiration=expiration)
    except EnvelopeError as error:
        assert error.reason.isprintable() or error.reason
        return
    try:
        rig.deliver("t1", request)
        rig.deliver("t2", request, redelivered=True)
    except LimitExceeded:
        assert len(body) > TOO_LARGE / 2
        return
    for said in rig.said():
        rig.guest(Reply(said.id, FINAL, b"42"))
    rig.wait(1e6)
    if request.reply_q is not None:
        assert len(request.reply_q.encode()) <= 255  # or AMQP could not say it


@given(
    changes=st.dictionaries(st.sampled_from(sorted(GOOD)), ODD, max_size=4),
    without=st.sets(st.sampled_from(sorted(GOOD)), max_size=4),
    expiration=st.one_of(st.none(), st.text(max_size=20), st.sampled_from(["0", "60000"])),
)
@example(changes={"_timeout": 1e308}, without=set(), expiration=None)
@example(changes={"_timeout": float("nan")}, without=set(), expiration=None)
@example(changes={"_reply_q": "\ud800"}, without=set(), expiration=None)
@example(changes={"method": "\ud800"}, without=set(), expiration="9" * 15)
@example(changes={"args": {"\ud800": "\ud800"}}, without=set(), expiration="\udcff")
def test_whatever_stands_for_what(
    changes: dict[str, Any], without: set[str], expiration: str | None
) -> None:
    message = {key: value for key, value in (GOOD | changes).items() if key not in without}
    for body in envelopes(message):
        follow(body, expiration)


MAIL: dict[str, Any] = {
    ARRIVAL_KEY: "stay",
    NOTE_KEY: ["stay"],
    "taken": [],
    "calls": [],
    "gone": ["0" * 32],
    "doubt": [],
    "unclear": [],
    "result": 1,
    "failure": None,
    "ending": True,
    "_msg_id": "0" * 32,
}


@given(
    changes=st.dictionaries(st.sampled_from(sorted(MAIL)), ODD, max_size=4),
    without=st.sets(st.sampled_from(sorted(MAIL)), max_size=8),
)
def test_whatever_stands_in_mail(changes: dict[str, Any], without: set[str]) -> None:
    """It is taken, or said to be none and acknowledged: never left to come again and again."""
    message = {key: value for key, value in (MAIL | changes).items() if key not in without}
    for number, body in enumerate(envelopes(message)):
        rig = Rig()
        problem = take_mail(rig.downward.upward, f"t{number}", body, rig.now_s)
        assert not problem or ("ack", f"t{number}") in rig.broker.take()
        rig.wait(1e6)


@given(version=ODD, message=ODD)
def test_whatever_an_envelope_has(version: Any, message: Any) -> None:
    follow(json.dumps({"oslo.version": version, "oslo.message": message}).encode(), None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"{",
        b"1" * 5000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"method": "m", "args": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
        b'{"oslo.version": "2.0", "oslo.message": "' + b"[" * 100_000 + b'"}',
        b'{"oslo.message": {}}',
        b'{"oslo.version": "2.0", "oslo.message": "1"}',
        b'\xef\xbb\xbf{"method": "m"}',
        '{"method": "m"}'.encode("utf-16"),
        b'{"method": "m", "method": 7}',
        b'{"method": "m", "args": NaN}',
        b'{"method": "m", "_timeout": ' + b"9" * 4000 + b"}",
    ],
)
def test_bodies_that_are_none(body: bytes) -> None:
    with pytest.raises(EnvelopeError):
        decode(body, expiration=None)
    follow(body, None)
