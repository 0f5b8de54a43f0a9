"""The wire form downward: what clients send and take, and what they must never see."""

import importlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.host.oslo_wire.downward_envelope import (
    CONTEXT_ALLOW,
    CONTEXT_ALLOW_ALL,
    FAILURE_BYTES_MAX,
    RESULT_BYTES_MAX,
    UNKNOWN_MODULE,
    BrokerRequest,
    decode,
    encode_reply,
    make_failure,
    request_body,
)
from vchan.host.oslo_wire.envelope import (
    DEPTH_MAX,
    INT_DIGITS_MAX,
    REASON_CHARS_MAX,
    REQUEST_BYTES_MAX,
    EnvelopeError,
)

UNIQUE_ID = "88df" * 8
CALL = {
    "method": "echo",
    "args": {"x": [1, "é"]},
    "namespace": "vm",
    "version": "1.2",
    "_msg_id": "459368",
    "_reply_q": "reply_93b2",
    "_timeout": None,
    "_unique_id": UNIQUE_ID,
    "_context_user_id": "u",
    "_context_auth_token": "secret",
}
CAST = {"method": "note", "args": {}, "_unique_id": UNIQUE_ID}
NOTIFICATION = {
    "message_id": "m-1",
    "publisher_id": "compute.host",
    "event_type": "instance.start",
    "priority": "INFO",
    "payload": {"p": 1},
    "timestamp": "2024-01-01 00:00:00.000000",
    "_unique_id": UNIQUE_ID,
}
FAILURE = {
    "class": "GuestError",
    "module": "agent.errors",
    "message": "no disk",
    "tb": ["Traceback\n", "GuestError: no disk\n"],
    "args": ["no disk", 28],
    "kwargs": {"device": "vda"},
}


def enveloped(message: Any, version: str = "2.0") -> bytes:
    return json.dumps({"oslo.version": version, "oslo.message": json.dumps(message)}).encode()


def cast_with(**changes: object) -> bytes:
    return enveloped({**CAST, **changes})


def without(message: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


def opened(body: bytes) -> dict[str, Any]:
    """A reply, as a client reads it."""
    outer = json.loads(body)
    assert outer["oslo.version"] == "2.0"
    message = json.loads(outer["oslo.message"])
    assert isinstance(message, dict)
    return message


def failure_of(body: bytes) -> dict[str, Any]:
    message = opened(body)
    assert message["result"] is None
    failure = json.loads(message["failure"])
    assert isinstance(failure, dict)
    return failure


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


class TestDecode:
    def test_white_space_around_it_is_no_fault(self) -> None:
        inner = f"\r\n {json.dumps(CAST)}\t"
        body = f" \n{json.dumps({'oslo.version': '2.0', 'oslo.message': inner})} ".encode()
        plain = decode(enveloped(CAST), expiration=None)
        assert decode(body, expiration=None) == plain

    @pytest.mark.parametrize("further", [b"x", b"{}", b"\0", b"\xc2\xa0"])
    def test_anything_else_behind_it_is_one(self, further: bytes) -> None:
        with pytest.raises(EnvelopeError, match="Extra data"):
            decode(enveloped(CAST) + further, expiration=None)

    def test_a_call(self) -> None:
        request = decode(enveloped(CALL), expiration="30000")
        assert request == BrokerRequest(
            id=bytes.fromhex(UNIQUE_ID),
            method="echo",
            args={"x": [1, "é"]},
            namespace="vm",
            version="1.2",
            context={"user_id": "u", "auth_token": "secret"},
            msg_id="459368",
            reply_q="reply_93b2",
            monitor_timeout_s=None,
            timeout_s=30.0,
        )
        assert request.is_call

    def test_a_cast(self) -> None:
        request = decode(enveloped(CAST), expiration=None)
        assert not request.is_call
        assert (request.namespace, request.version, request.context) == (None, None, {})
        assert (request.timeout_s, request.monitor_timeout_s) == (None, None)

    def test_a_cast_without_arguments(self) -> None:
        assert decode(enveloped({"method": "note"}), expiration=None).args == {}

    def test_a_notification(self) -> None:
        request = decode(enveloped(NOTIFICATION), expiration=None)
        assert request.is_notification
        assert not request.is_call
        assert request.method == "info"
        assert request.args == {
            "publisher_id": "compute.host",
            "event_type": "instance.start",
            "payload": {"p": 1},
            "metadata": {"message_id": "m-1", "timestamp": "2024-01-01 00:00:00.000000"},
        }

    def test_version_1_has_no_envelope(self) -> None:
        body = json.dumps(CALL).encode()
        assert decode(body, expiration="5") == decode(enveloped(CALL), expiration="5")

    def test_the_monitor_timeout(self) -> None:
        assert decode(cast_with(_timeout=7), expiration=None).monitor_timeout_s == 7.0
        assert decode(cast_with(_timeout=0), expiration=None).monitor_timeout_s is None

    def test_a_lone_surrogate(self) -> None:
        request = decode(cast_with(args={"x": "\ud800"}), expiration=None)
        assert json.loads(request_body(request))["args"] == {"x": "\ud800"}

    @pytest.mark.parametrize("unique_id", ["A" * 32, "f" * 31, "0" * 33, "", "\ud800"])
    def test_other_ids_are_hashed(self, unique_id: str) -> None:
        identity = decode(cast_with(_unique_id=unique_id), expiration=None).id
        assert len(identity) == 16
        assert identity == decode(cast_with(_unique_id=unique_id, x=1), expiration=None).id
        assert identity != decode(cast_with(_unique_id=unique_id + "0"), expiration=None).id

    def test_without_an_id_the_body_is_the_id(self) -> None:
        ids = {
            decode(enveloped({"method": "note", "args": {"x": x}}), expiration=None).id
            for x in (1, 2, 1)
        }
        assert len(ids) == 2

    @pytest.mark.parametrize(
        ("body", "expiration", "reason"),
        [
            (b"", None, "not JSON"),
            (b"\xff", None, "not JSON"),
            (b"\xef\xbb\xbf{}", None, "not JSON"),
            (b"[]", None, "the body is not a JSON object"),
            (b"1" * 5000, None, "not JSON"),
            (nested(100_000), None, "nested"),
            (nested(DEPTH_MAX + 1), None, "nested"),
            (b" " * (REQUEST_BYTES_MAX + 1), None, "are allowed"),
            (enveloped(CAST, "3.0"), None, "oslo.version is '3.0'"),
            (b'{"oslo.message": "{}"}', None, "oslo.version is NoneType"),
            (b'{"oslo.version": "2.0", "oslo.message": {}}', None, "oslo.message is not a string"),
            (b'{"oslo.version": "2.0", "oslo.message": "{"}', None, "oslo.message is not JSON"),
            (enveloped([]), None, "oslo.message is not a JSON object"),
            (enveloped(without(CAST, "method")), None, "no method"),
            (cast_with(method=""), None, "no method"),
            (cast_with(method=1), None, "method is 1"),
            (cast_with(method="m" * 256), None, "method is over 255 bytes"),
            (cast_with(args=[1]), None, "args is list"),
            (cast_with(args=None), None, "args is NoneType"),
            (cast_with(namespace={}), None, "namespace is dict"),
            (cast_with(version=1.0), None, "version is 1.0"),
            (cast_with(_unique_id=3), None, "_unique_id"),
            (cast_with(_msg_id="1"), None, "one without the other"),
            (cast_with(_reply_q="q"), None, "one without the other"),
            (cast_with(_timeout="5"), None, "_timeout is '5'"),
            (cast_with(_timeout=True), None, "_timeout is True"),
            (cast_with(_timeout=-1), None, "not a time"),
            (cast_with(_timeout=float("nan")), None, "not a time"),
            (cast_with(_timeout=10**400), None, "not a time"),
            (enveloped(CAST), "soon", "expiration is 'soon'"),
            (enveloped(CAST), "-1", "expiration"),
            (enveloped(CAST), "9" * 16, "expiration"),
            (enveloped(without(NOTIFICATION, "priority")), None, "without a priority"),
        ],
    )
    def test_malformed(self, body: bytes, expiration: str | None, reason: str) -> None:
        with pytest.raises(EnvelopeError) as caught:
            decode(body, expiration=expiration)
        assert reason in caught.value.reason
        assert len(str(caught.value)) <= REASON_CHARS_MAX

    def test_the_deepest_allowed(self) -> None:
        # Two levels are the message and its args.
        args = json.loads(nested(DEPTH_MAX - 2))
        assert decode(cast_with(args={"x": args}), expiration=None).args == {"x": args}
        with pytest.raises(EnvelopeError):
            decode(cast_with(args={"x": [args]}), expiration=None)

    def test_wide_is_not_deep(self) -> None:
        wide = [[index, {}] for index in range(DEPTH_MAX * 2)]
        assert decode(cast_with(args={"x": wide}), expiration=None).args == {"x": wide}

    @given(st.binary() | st.text().map(str.encode), st.none() | st.text())
    def test_any_bytes(self, body: bytes, expiration: str | None) -> None:
        with pytest.raises(EnvelopeError):
            decode(body, expiration=expiration)

    @given(
        st.dictionaries(
            st.sampled_from([*CALL, *NOTIFICATION]),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=5,
            ),
        )
    )
    def test_any_values(self, changes: dict[str, object]) -> None:
        try:
            request = decode(enveloped({**CALL, **changes}), expiration=None)
        except EnvelopeError:
            return
        assert len(request.id) == 16
        json.loads(request_body(request, CONTEXT_ALLOW_ALL))


class TestRequestBody:
    def test_it_is_compact_and_holds_no_secret(self) -> None:
        body = request_body(decode(enveloped(CALL), expiration=None))
        assert body.decode() == (
            '{"method":"echo","args":{"x":[1,"é"]},"namespace":"vm","version":"1.2",'
            '"context":{"user_id":"u"}}'
        )

    def test_the_allow_list(self) -> None:
        request = decode(enveloped(CALL), expiration=None)
        assert json.loads(request_body(request, frozenset()))["context"] == {}
        assert json.loads(request_body(request, CONTEXT_ALLOW_ALL))["context"] == {
            "user_id": "u",
            "auth_token": "secret",
        }

    @pytest.mark.parametrize("key", ["auth_token", "service_catalog", "trust_id", "roles"])
    def test_what_the_default_holds_back(self, key: str) -> None:
        assert key not in CONTEXT_ALLOW


class TestEncodeReply:
    def test_a_result(self) -> None:
        body = encode_reply("42", result_json=b'{"a": [1, "\xc3\xa9"]}', unique_id=UNIQUE_ID)
        assert opened(body) == {
            "result": {"a": [1, "é"]},
            "failure": None,
            "ending": True,
            "_msg_id": "42",
            "_unique_id": UNIQUE_ID,
        }

    def test_no_unique_id(self) -> None:
        assert "_unique_id" not in opened(encode_reply("42"))

    def test_a_heartbeat(self) -> None:
        message = opened(encode_reply("42", ending=False))
        assert (message["ending"], message["result"], message["failure"]) == (False, None, None)

    def test_nan_passes_as_between_stock_peers(self) -> None:
        result = opened(encode_reply("1", result_json=b"[NaN, 1e999]"))["result"]
        assert repr(result) == "[nan, inf]"

    @pytest.mark.parametrize("result", [b'"\\ud800"', b'"\xed\xa0\x80"'])
    def test_a_lone_surrogate(self, result: bytes) -> None:
        assert opened(encode_reply("1", result_json=result))["result"] == "\ud800"

    @pytest.mark.parametrize(
        ("result", "reason"),
        [
            (b"", "the agent's reply is not JSON"),
            (b"{]", "the agent's reply is not JSON"),
            (b"\xff", "the agent's reply is not JSON"),
            (b"9" * 10_000, "the agent's reply is not JSON"),
            (nested(100_000), "nested over 100 deep"),
            (nested(DEPTH_MAX + 1), "nested over 100 deep"),
            (b"0" + b" " * RESULT_BYTES_MAX, "bytes"),
        ],
    )
    def test_a_bad_result_becomes_a_failure(self, result: bytes, reason: str) -> None:
        failure = failure_of(encode_reply("1", result_json=result))
        assert (failure["class"], failure["module"]) == ("BadReply", "vchan.errors")
        assert reason in failure["message"]

    @pytest.mark.parametrize(
        "result", [b"[" + b"1e15," * 800_000 + b"1]", b'"' + b'\\"' * 2_000_000 + b'"']
    )
    def test_how_much_a_reply_can_grow(self, result: bytes) -> None:
        assert len(result) < RESULT_BYTES_MAX
        assert len(encode_reply("1", result_json=result)) < REQUEST_BYTES_MAX

    @pytest.mark.parametrize(
        ("result", "passes"),
        [
            (b"[" + b"0," * 98 + b"0]", True),
            (b"[" + b"0," * 200 + b"0]", False),
            (b"[" + b"[]," * 98 + b"[]]", False),  # brackets count
            (b"{" + b",".join(b'"%d":"x"' % number for number in range(99)) + b"}", True),
            (b"{" + b",".join(b'"%d":"x"' % number for number in range(200)) + b"}", False),
            (b'["' + b'","' * 200 + b'"]', False),
            (b"[" + b'"",' * 500 + b'""]', False),
            (b'"' + b"1,[{" * 1000 + b'"', True),  # a text
            (b'"' + b'\\",[' * 1000 + b'"', True),
            (b'["' + b"\\\\" * 500 + b'",[' + b"0," * 200 + b"0]]", False),
        ],
    )
    def test_values_have_a_limit_and_texts_are_one(self, result: bytes, passes: bool) -> None:
        assert opened(encode_reply("1", result_json=result))["failure"] is None
        message = opened(encode_reply("1", result_json=result, values_max=100))
        if passes:
            assert message["result"] == json.loads(result)
        else:
            assert "over 100 values (json_values)" in message["failure"]

    def test_integers_have_a_limit(self) -> None:
        longest = b"9" * INT_DIGITS_MAX
        message = opened(encode_reply("1", result_json=longest, values_max=100))
        assert message["result"] == int(longest)
        for before in range(INT_DIGITS_MAX):  # wherever it stands
            result = b" " * before + longest + b"9"
            failure = failure_of(encode_reply("1", result_json=result, values_max=100))
            assert "an integer of 310 digits, 309 are allowed" in failure["message"]
        text = b'"' + longest + b'9"'
        message = opened(encode_reply("1", result_json=text, values_max=100))
        assert message["result"] == json.loads(text)

    def test_a_failure_passes_as_it_is_less_what_no_caller_reads(self) -> None:
        text = json.dumps({**FAILURE, "more": 1}, indent=1)
        message = opened(encode_reply("1", failure_json=text.encode(), result_json=b"1"))
        assert message["result"] is None
        assert json.loads(message["failure"]) == FAILURE

    def test_a_small_failure(self) -> None:
        text = '{"class": "E", "module": "m"}'
        rest = {"message": "", "tb": [], "args": [], "kwargs": {}}
        failure = failure_of(encode_reply("1", failure_json=text.encode()))
        assert failure == {"class": "E", "module": "m", **rest}

    @pytest.mark.parametrize(
        ("failure", "reason"),
        [
            (b"", "not JSON"),
            (b"[]", "not a JSON object"),
            (b" " * (FAILURE_BYTES_MAX + 1), "bytes"),
            (nested(DEPTH_MAX + 1), "nested"),
        ],
    )
    def test_what_is_no_failure(self, failure: bytes, reason: str) -> None:
        assert reason in failure_of(encode_reply("1", failure_json=failure))["message"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"class": None},
            {"class": ""},
            {"class": "os.system"},
            {"class": "a b"},
            {"module": 1},
            {"module": "a..b"},
            {"module": "a;b"},
            {"module": "m" * 256},
            {"message": None},
            {"tb": "text"},
            {"tb": [1]},
            {"args": {}},
            {"kwargs": []},
        ],
    )
    def test_a_failure_no_caller_could_rebuild(self, changes: dict[str, object]) -> None:
        text = json.dumps({**FAILURE, **changes})
        failure = failure_of(encode_reply("1", failure_json=text.encode()))
        assert failure["class"] == "BadReply"
        assert "the agent's failure" in failure["message"]

    def test_a_failure_of_a_module_that_may_not_pass_is_text(self) -> None:
        given = {**FAILURE, "args": [1], "kwargs": {"a": 1}}
        text = json.dumps(given)
        body = encode_reply("1", failure_json=text.encode(), may_raise="other".__eq__)
        failure = failure_of(body)
        assert failure == {
            "class": FAILURE["class"],
            "module": "vchan.guest.raised",
            "message": FAILURE["message"],
            "tb": FAILURE["tb"],
            "args": [],
            "kwargs": {},
        }
        again = encode_reply("1", failure_json=text.encode(), may_raise="agent.errors".__eq__)
        assert failure_of(again) == given

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("ExceptionGroup", ["m", []]),
            ("UnicodeEncodeError", ["utf-8", "x", 10**30, 1, "reason"]),
            ("UnicodeDecodeError", ["utf-8"]),
            ("KeyboardInterrupt", []),
            ("print", ["x"]),
            ("NoSuchError", []),
        ],
    )
    def test_one_of_pythons_own_that_cannot_be_made_is_text(
        self, name: str, args: list[object]
    ) -> None:
        raised = {**FAILURE, "module": "builtins", "class": name, "args": args, "kwargs": {}}
        failure = failure_of(encode_reply("1", failure_json=json.dumps(raised).encode()))
        assert (failure["class"], failure["module"], failure["args"]) == (name, UNKNOWN_MODULE, [])
        assert failure["message"] == FAILURE["message"]

    def test_one_of_pythons_own_passes(self) -> None:
        own = {"module": "builtins", "class": "OSError", "args": [2, "x"], "kwargs": {}}
        raised = {**FAILURE, **own}
        text = json.dumps(raised)
        assert failure_of(encode_reply("1", failure_json=text.encode())) == raised

    def test_a_module_that_is_there_for_nobody(self) -> None:
        with pytest.raises(ImportError):
            importlib.import_module(UNKNOWN_MODULE)

    def test_what_a_stock_client_makes_of_it(self) -> None:
        common = pytest.importorskip(
            "oslo_messaging._drivers.common", reason="oslo.messaging is not installed"
        )
        text = json.dumps({**FAILURE, "module": "os", "class": "system", "args": ["true"]})
        failure = opened(encode_reply("1", failure_json=text.encode(), may_raise=lambda _: False))[
            "failure"
        ]
        for allowed in ([], ["os", "vchan.errors", "vchan.guest.raised"]):
            error = common.deserialize_remote_exception(failure, allowed)
            assert type(error).__name__ == "RemoteError"
            assert error.exc_type == "system"
            assert "no disk" in str(error)

    @given(st.binary() | st.text().map(str.encode))
    def test_any_bytes_from_a_guest(self, data: bytes) -> None:
        opened(encode_reply("1", result_json=data))
        failure_of(encode_reply("1", failure_json=data))


class TestMakeFailure:
    def test_its_shape(self) -> None:
        assert json.loads(make_failure("AgentGone", "vchan.errors", "it left")) == {
            "class": "AgentGone",
            "module": "vchan.errors",
            "message": "it left",
            "tb": [],
            "args": ["it left"],
            "kwargs": {},
        }

    def test_it_passes_its_own_check_however_long(self) -> None:
        text = make_failure("NoSuchAgent", "vchan.errors", "\ud800" * 100_000)
        encoded = text.encode("utf-8", "surrogatepass")
        assert failure_of(encode_reply("1", failure_json=encoded)) == json.loads(text)
