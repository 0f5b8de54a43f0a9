"""Bodies: what anybody may have written into them is refused as what it is, in every build.

Compiled code checks the types of what it is given, and raises TypeError where nobody expects one.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.errors import BadBody
from vchan.rpc.bodies import (
    REDELIVERED_KEY,
    decode_failure,
    decode_invocation,
    encode_failure,
    encode_raw,
    mark_redelivered,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
MEMBERS = ("method", "args", "namespace", "version", "context")


@pytest.mark.parametrize("value", [5, 1.5, True, [], {}])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_of_another_type_is_refused_by_its_name(member: str, value: Any) -> None:
    if value == {} and member in ("args", "context"):
        return
    if value == [] and member in ("args", "context"):
        value = [1]  # an empty one is taken for none
    body = json.dumps({"method": "m", member: value}).encode()
    with pytest.raises(BadBody, match=f'"{member}"'):
        decode_invocation(body)
    assert mark_redelivered(body) == body
    raw = encode_raw(body, b"data")
    assert mark_redelivered(raw, is_raw=True) == raw


@given(st.dictionaries(st.sampled_from((*MEMBERS, "other")), values))
def test_any_object_is_an_invocation_or_refused(members: dict[str, Any]) -> None:
    body = json.dumps(members).encode()
    try:
        asked = decode_invocation(body)
    except BadBody:
        assert mark_redelivered(body) == body
        return
    assert isinstance(asked.method, str)
    assert isinstance(asked.args, dict) and isinstance(asked.context, dict)
    assert isinstance(asked.namespace, str | None) and isinstance(asked.version, str | None)
    marked = decode_invocation(mark_redelivered(body))
    assert marked.context == {**asked.context, REDELIVERED_KEY: True}


@given(values)
def test_any_failure_has_a_name_and_a_text(value: Any) -> None:
    name, text = decode_failure(json.dumps(value).encode())
    assert isinstance(name, str) and isinstance(text, str)


@pytest.mark.parametrize("module", [None, 5, "builtins"])
def test_a_class_says_anything_of_its_module(module: object) -> None:
    kind = type("Odd", (Exception,), {"__module__": module})
    body = encode_failure(kind.__name__, "said", module=kind.__module__)
    assert json.loads(body)["module"] == str(module)
