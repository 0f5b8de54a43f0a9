"""Whoever a guest says it is, the control side hears who it really is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.errors import ConfigError
from vchan.host.policy import guest_context
from vchan.host.policy.guest_context import build_context, check_allow, is_privileged, module_rule
from vchan.host.policy.rules import Facts

FACTS = Facts("11111111-2222-3333-4444-555555555555", "vm1", "project-1", "user-1")
ALLOW = frozenset(guest_context.CONTEXT_ALLOW)
STAMP = {
    "vchan_instance_uuid": FACTS.uuid,
    "vchan_project_id": "project-1",
    "vchan_host": "compute-1",
}
PRIVILEGED = [
    *("is_admin", "roles", "auth_token", "user_id", "user", "user_name", "project_id", "project"),
    *("tenant", "tenant_id", "domain_id", "user_domain", "project_domain_id", "system_scope"),
    *("service_catalog", "service_token", "service_roles", "trust_id", "is_admin_project"),
    *("read_deleted", "show_deleted", "overwrite", "read_only", "quota_class"),
    *("_reply_q", "_msg_id", "_unique_id", "_timeout", "method", "args", "namespace", "version"),
    *("vchan_instance_uuid", "vchan_project_id", "vchan_host", "vchan_redelivered"),
]


def spellings(key: str) -> list[str]:
    camel = re.sub("_(.)", lambda match: match[1].upper(), key)
    return [key, key.upper(), key.title(), camel, key.replace("_", "-"), f"_{key}", f" {key}\n"]


def built(given_context: Any, allow: frozenset[str] = ALLOW) -> dict[str, Any]:
    return build_context(given_context, FACTS, allow, host="compute-1")


def test_it_says_who_the_guest_is() -> None:
    assert built({}) == STAMP
    assert built(dict.fromkeys(STAMP, "evil")) == STAMP
    unknown = build_context({}, Facts(FACTS.uuid), ALLOW, host="h")
    assert unknown["vchan_project_id"] == ""


def test_what_is_allowed_passes() -> None:
    given_context = {"request_id": "req-1", "resource_uuid": "r", "other": "x"}
    assert built(given_context) == {**STAMP, "request_id": "req-1", "resource_uuid": "r"}


@pytest.mark.parametrize("key", PRIVILEGED)
def test_what_gives_authority_never_passes(key: str) -> None:
    for spelling in spellings(key):
        assert is_privileged(spelling)
        for value in ("evil", True, ["admin"], {key: "evil"}):
            assert built({spelling: value}) == STAMP
            # Not even where the list allows it.
            assert built({spelling: value}, ALLOW | {spelling}) == STAMP
        for outer in ("request_id", "context", "_context_request_id"):
            assert built({outer: {spelling: "evil"}}) == STAMP
            assert built({outer: [{spelling: "evil"}]}) == STAMP


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 1, 1.5, [], {}, b"x", ["a"], "x" * 256),
        *("a\nb", "a\rb", "a\x00", "\x1b[31m", "a\u2028b", "\u202e", "\ud800", "a\tb"),
    ],
)
def test_only_short_plain_text_passes(value: object) -> None:
    assert built({"request_id": value}) == STAMP


def test_the_longest_and_plainest() -> None:
    for text in ("x" * 255, "", "é ß 中"):
        assert built({"request_id": text})["request_id"] == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
KEYS = st.sampled_from([*PRIVILEGED, *ALLOW, "x"]) | st.text()


@given(st.dictionaries(KEYS, JSON))
def test_any_context(given_context: dict[str, Any]) -> None:
    context = built(given_context)
    assert STAMP.items() <= context.items()
    for key in context.keys() - STAMP.keys():
        assert key in ALLOW
        assert context[key] == given_context[key]
        assert isinstance(context[key], str) and len(context[key]) <= 255


@pytest.mark.parametrize("key", ["is_admin", "roles", "user_id", "vchan_host", "method"])
def test_a_list_that_allows_authority_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"where: '{key}' says who"):
        check_allow(["request_id", key], "where")


@pytest.mark.parametrize("key", ["*", "Request_id", "-id", "", "é", "_x", "x" * 65])
def test_a_list_of_no_keys_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="expected keys of small letters"):
        check_allow([key], "where")


def test_a_list() -> None:
    assert check_allow(["request_id", "correlation"], "where") == {"request_id", "correlation"}
    assert check_allow([], "where") == frozenset()
    assert built({"request_id": "x"}, frozenset()) == STAMP


def test_module_rules() -> None:
    rule = module_rule(["trove.*", "builtins"], "where")
    assert rule("trove.common.exception") and rule("builtins") and rule("vchan.errors")
    assert not rule("trove") and not rule("os") and not rule("xtrove.a") and not rule("builtins.x")
    for pattern in ("", "a b", "a;b", "[ab]", "a/b"):
        with pytest.raises(ConfigError, match="expected a module's name"):
            module_rule([pattern], "where")
