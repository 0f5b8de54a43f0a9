"""A VM's mail: large answers are read in slices, and say the same as if they were read at once."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.host.oslo_wire import mail as mail_module
from vchan.host.oslo_wire.downward_envelope import encode_reply
from vchan.host.oslo_wire.mail import Answer, Arrival, encode_arrival, read_mail
from vchan.host.vm.mailbox import Mailbox, Read
from vchan.session import MESSAGE_BYTES_MAX

ID = bytes(range(16))


def stock_reply(result: Any, **fields: Any) -> bytes:
    """What oslo.messaging's server publishes: its order, its spaces."""
    message = {"result": result, "failure": None, "ending": True, "_msg_id": ID.hex()}
    message |= {"_unique_id": "ab" * 16} | fields
    return json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(message)}).encode()


def read(body: bytes) -> tuple[Read, int]:
    """The message, and how many steps it took."""
    box = Mailbox()
    box.put("token", body)
    for steps in range(1, 10_000):
        done = box.work()
        if done is not None:
            assert (len(box), box.bytes) == (0, 0)
            assert (done.token, done.size) == ("token", len(body))
            return done, steps
    raise AssertionError("it never ends")


def same(one: object, other: object) -> bool:
    assert isinstance(one, Answer) and isinstance(other, Answer)
    return one[:3] == other[:3] and json.loads(one.body) == json.loads(other.body)


def test_a_small_message_takes_one_step() -> None:
    done, steps = read(encode_arrival(Arrival("here.1")))
    assert (done.message, steps) == (Arrival("here.1"), 1)


def test_a_large_answer_is_read_in_slices() -> None:
    body = stock_reply(["x" * 1_000_000, {"ü": [1.5, None] * 100_000}])
    done, steps = read(body)
    assert steps > len(body) / mail_module.SLICE_BYTES
    assert same(done.message, read_mail(body))


def test_each_slice_counts_when_it_is_read() -> None:
    body = stock_reply("x" * 1_000_000)
    box = Mailbox()
    box.put("token", body)
    counts = [0]
    while box:
        box.work()
        counts.append(box.worked)
    assert max(now - before for before, now in pairwise(counts)) <= mail_module.SLICE_BYTES
    assert len(body) <= box.worked < len(body) + mail_module.SLICE_BYTES


TEXTS = st.text(st.sampled_from('\\"/u\n\x00aé\U0001f600{}[],: '), max_size=30)
RESULTS = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@given(RESULTS, st.integers(12, 64), st.booleans())
def test_whatever_the_slices(result: Any, slice_bytes: int, as_utf_8: bool) -> None:
    body = stock_reply([result, "\\" * 40, '"' * 10])
    if as_utf_8:
        body = json.dumps(json.loads(body), ensure_ascii=False).encode()
    patch = pytest.MonkeyPatch()
    patch.setattr(mail_module, "SLICE_BYTES", slice_bytes)
    try:
        done, steps = read(body)
    finally:
        patch.undo()
    assert steps > 1
    assert same(done.message, read_mail(body))


@pytest.mark.parametrize(
    "body",
    [
        encode_reply(ID.hex(), result_json=json.dumps("x" * 200_000).encode()),
        stock_reply("x" * 200_000, more=1),
        stock_reply(None, failure=json.dumps({"class": "E", "message": "x" * 200_000})),
        stock_reply("x" * 200_000, ending=False),
        stock_reply("\ud800" + "x" * 200_000),
    ],
)
def test_what_no_stock_service_sends_is_read_at_once(body: bytes) -> None:
    done, _ = read(body)
    assert done.message == read_mail(body)


def test_what_is_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    good = stock_reply("x" * 200_000)
    for body in (b"{}", b"x" * 200_000, good[:100_000] + b'"' + good[100_000:], good[:-1] + b"]"):
        done, _ = read(body)
        assert done.message is None
        assert done.problem


def test_an_answer_that_no_guest_takes_is_a_failure_and_is_not_read_to_its_end() -> None:
    body = stock_reply("x" * (3 * MESSAGE_BYTES_MAX))
    done, steps = read(body)
    assert isinstance(done.message, Answer)
    assert (done.message.id, done.message.failed) == (ID, True)
    assert json.loads(done.message.body)["class"] == "LimitExceeded"
    assert steps <= MESSAGE_BYTES_MAX / mail_module.SLICE_BYTES + 2


def test_messages_come_in_their_order_and_can_be_given_back() -> None:
    box = Mailbox()
    for number in range(3):
        box.put(number, encode_arrival(Arrival(f"{number}")))
    first = box.work()
    assert first is not None and first.token == 0
    assert len(box) == 2 and box.bytes > 0
    box.clear()
    assert (len(box), box.bytes) == (0, 0)
