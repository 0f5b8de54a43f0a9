"""What a guest's answer does to a caller that is a stock oslo.messaging client: its own code reads
what the host publishes."""

from __future__ import annotations

import builtins
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("oslo_messaging", reason="oslo.messaging is not installed")

import oslo_messaging
from oslo_messaging._drivers import amqp, amqpdriver, common

from tests.rig.gates import OpenGate, offer_nothing
from vchan.host.oslo_wire.downward_envelope import (
    OS_ERRORS,
    PLAIN_ERRORS,
    BrokerRequest,
    ReplyPublication,
    encode_reply,
)
from vchan.host.oslo_wire.upward_envelope import Publication
from vchan.host.vm.downward import Downward
from vchan.rpc.messages import Reply, Returned, Subscribe, Topic, encode

VM = "b1b1f4b2-0000-4000-8000-000000000001"
TOPIC = Topic("openstack", "agent")
MSG_ID = "0123456789abcdef0123456789abcdef"
REQUEST_ID = bytes(range(16))
ALLOWED = ["oslo_messaging.exceptions", "oslo_messaging.rpc.client", "vchan.errors"]
"""What the caller says that it takes: modules whose exceptions check nothing."""


class _Delivered(dict[str, Any]):
    def acknowledge(self) -> None:
        pass


class _Waiters(amqpdriver.ReplyWaiters):  # type: ignore[misc]  # oslo.messaging has no types
    """Nothing comes later."""

    def get(self, msg_id: str, timeout: float) -> object:
        return super().get(msg_id, timeout=0.0)


class StockCaller:
    """Waits for the answer to one call, as oslo.messaging's driver does."""

    def __init__(self, allowed: list[str], monitor_s: float | None = None) -> None:
        self._monitor_s = monitor_s
        waiter = self._waiter = amqpdriver.ReplyWaiter.__new__(amqpdriver.ReplyWaiter)
        waiter.allowed_remote_exmods = allowed
        waiter.msg_id_cache = amqp._MsgIdCache()
        waiter.waiters = _Waiters()
        waiter.listen(MSG_ID)

    def hear(self, body: bytes) -> None:
        self._waiter(_Delivered(common.deserialize_msg(json.loads(body))))

    def outcome(self) -> object:
        """What `call` returns or, if that is an exception, raises."""
        try:
            return self._waiter.wait(MSG_ID, 60.0, self._monitor_s, "reply")
        except oslo_messaging.MessagingTimeout as error:
            return error


def is_harmless(outcome: object, allowed: list[str]) -> bool:
    """It is no exception, or one that any caller must expect, or that this one asked for."""
    if not isinstance(outcome, BaseException) or isinstance(
        outcome, oslo_messaging.RemoteError | oslo_messaging.MessagingTimeout
    ):
        return True
    if type(outcome).__module__ == "builtins":
        return type(outcome).__name__ in PLAIN_ERRORS | OS_ERRORS
    return type(outcome).__module__.removesuffix("_Remote") in allowed


def failure_of(class_name: object, module: object, *args: object, **more: object) -> bytes:
    failure = {"class": class_name, "module": module, "message": "m", "tb": [], "args": args}
    return json.dumps(failure | {"kwargs": {}} | more).encode()


def raised(failure: bytes, allowed: list[str]) -> object:
    caller = StockCaller(allowed)
    caller.hear(encode_reply(MSG_ID, failure_json=failure, values_max=20_000))
    return caller.outcome()


EVERY_BUILTIN = sorted(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 80), 1 << 80)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["ascii", "\ud800", "\x00", -1, 1 << 70, 11, 2, 104, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
CLASSES = (
    st.sampled_from([*EVERY_BUILTIN, "RPCException", "InvalidTarget", "RemoteError", "NoSuchAgent"])
    | st.sampled_from(["LimitExceeded", "ValueError_Remote", "print", "__doc__", "a.b", "", "cfg"])
    | VALUES
)
MODULES = (
    st.sampled_from(["builtins", "exceptions", "builtins", "exceptions", *ALLOWED])
    | st.sampled_from(["os", "sys", "builtins_Remote", "exceptions.x", "", "oslo_messaging"])
    | VALUES
)
FAILURES = st.fixed_dictionaries(
    {},
    optional={
        "class": CLASSES,
        "module": MODULES,
        "message": st.text(max_size=10) | VALUES,
        "tb": st.lists(st.text(max_size=5), max_size=3) | VALUES,
        "args": st.lists(VALUES, max_size=6) | VALUES,
        "kwargs": st.dictionaries(
            st.sampled_from(["name", "path", "obj", "message", "self", "x"]), VALUES, max_size=3
        )
        | VALUES,
        "failure": VALUES,
    },
)
WELL_FORMED = st.builds(
    failure_of, CLASSES, MODULES, st.lists(VALUES, max_size=5), kwargs=st.just({})
)


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


BODIES = FAILURES.map(encoded) | WELL_FORMED | VALUES.map(encoded) | st.binary(max_size=40)


@given(BODIES, st.sampled_from([[], ALLOWED]))
@example(failure_of("ExceptionGroup", "exceptions", "x", []), [])
@example(failure_of("BlockingIOError", "exceptions", 1, "x", 1 << 70), [])
@example(failure_of("OSError", "builtins", 11, "x", 1 << 70), [])
@example(failure_of("OSError", "builtins", 1 << 70, "x"), [])
@example(failure_of("UnicodeEncodeError", "exceptions", "ascii", "x", 1 << 70, 1, "r"), [])
@example(failure_of("StopIteration", "builtins"), [])
@example(failure_of("ValueError", "builtins", tb=None), [])
@example(failure_of("ValueError", "builtins", message=None), [])
def test_no_failure_breaks_a_caller(body: bytes, allowed: list[str]) -> None:
    assert is_harmless(raised(body, allowed), allowed)


@pytest.mark.parametrize("module", ["builtins", "exceptions"])
@pytest.mark.parametrize("name", EVERY_BUILTIN)
def test_of_pythons_exceptions_those_of_the_list_are_raised(name: str, module: str) -> None:
    """Whichever of its two names the module goes by."""
    outcome = raised(failure_of(name, module, "because"), [])
    if name in PLAIN_ERRORS | OS_ERRORS:
        assert type(outcome) is getattr(builtins, name)
    else:
        assert isinstance(outcome, oslo_messaging.RemoteError)
        assert (outcome.exc_type, outcome.value) == (name, "m")


@pytest.mark.parametrize(
    "name",
    [
        *("StopIteration", "StopAsyncIteration", "MemoryError", "RecursionError", "SystemError"),
        *("ExceptionGroup", "GeneratorExit", "KeyboardInterrupt", "SystemExit", "BaseException"),
        *("UnicodeDecodeError", "Warning", "SyntaxError", "ImportError", "EncodingWarning"),
    ],
)
def test_what_steers_a_program_is_not_on_the_list(name: str) -> None:
    assert name not in PLAIN_ERRORS | OS_ERRORS


def test_an_error_of_the_system_keeps_its_number() -> None:
    outcome = raised(failure_of("FileNotFoundError", "builtins", 2, "No such file", "/x"), [])
    assert isinstance(outcome, FileNotFoundError)
    assert (outcome.errno, outcome.strerror, outcome.filename) == (2, "No such file", "/x")


class _Broker:
    """Lets the caller hear what is published for it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def complete(
        self,
        vm: str,
        request_id: bytes,
        tokens: tuple[object, ...],
        reply: ReplyPublication | None = None,
    ) -> None:
        if reply is not None:
            self.bodies.append(reply.body)

    def publish_heartbeat(self, reply_q: str, body: bytes) -> None:
        self.bodies.append(body)

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        pass

    def nothing(self, *_: object, **__: object) -> None:
        pass

    consume = release = ack = listen_for_answers = nothing


def answered(said: list[bytes], monitor_s: float | None, allowed: list[str]) -> object:
    """What comes of a call whose guest says all this."""
    broker = _Broker()
    downward = Downward(
        VM, lambda *_: None, broker, OpenGate(lambda _: True), frozenset(), offer_nothing
    )
    downward.opened(resumed=False, now_s=0.0)
    downward.receive(encode(Subscribe((TOPIC,))), 0.0)
    downward.released()
    downward.handle_timeout(10.0)
    origin = BrokerRequest(
        REQUEST_ID, "m", {}, None, None, {}, MSG_ID, "reply", monitor_s, timeout_s=60.0
    )
    downward.delivered(1, origin, TOPIC, fanout=False, redelivered=False, now_s=10.0)
    for number, message in enumerate(said):
        downward.receive(message, 10.0 + 100 * number)  # as seldom as heartbeats may be
    caller = StockCaller(allowed, monitor_s)
    for body in broker.bodies:
        caller.hear(body)
    return caller.outcome()


def a_reply(flags: int, body: bytes) -> bytes:
    return encode(Reply(REQUEST_ID, flags, body))


SAID = st.lists(
    st.builds(a_reply, st.sampled_from([0, 1, 2, 3, 255]), BODIES)
    | st.builds(
        lambda reason, text: encode(Returned(REQUEST_ID, reason, text)),
        st.integers(0, 255),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    )
    | st.binary(min_size=1, max_size=30),
    max_size=5,
)


@given(SAID, st.sampled_from([None, 5.0]), st.sampled_from([[], ALLOWED]))
@example([a_reply(0, b""), a_reply(1, b"1")], None, [])
@example([a_reply(2, b""), a_reply(1, b"null")], 5.0, [])
def test_nothing_that_a_guest_says_of_a_call_breaks_its_caller(
    said: list[bytes], monitor_s: float | None, allowed: list[str]
) -> None:
    assert is_harmless(answered(said, monitor_s, allowed), allowed)


def test_a_heartbeat_nobody_asked_for_does_not_cost_the_answer() -> None:
    said = [a_reply(0, b""), a_reply(0, b""), a_reply(1, b'"done"')]
    assert answered(said, None, []) == "done"
    assert answered(said, 5.0, []) == "done"
