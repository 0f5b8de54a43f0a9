"""The policy language: what each line means, what is refused, and that the first match decides."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.errors import ConfigError
from vchan.host.hypervisor import domain_xml
from vchan.host.policy.rule_parser import (
    FILE_CHARS_MAX,
    FILES_MAX,
    LINE_CHARS_MAX,
    OWNS_MAX,
    RULES_MAX,
    PolicyError,
    parse,
)
from vchan.host.policy.rules import (
    ANY_KINDS,
    DEFAULT,
    EVERYBODYS,
    KINDS,
    LABEL_KINDS,
    MODES,
    UNPRINTABLE,
    VMS_MAX,
    WHO_KEYS,
    Ask,
    Effect,
    Facts,
    Kind,
    Policy,
    Verdict,
    forward_ask,
    make_ask,
    make_facts,
)
from vchan.host.policy.vm_limits import LIMITS, Limits

UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
VM = Facts(UUID, "instance-0001", "a" * 32, "b" * 32, "m1.small", OTHER)
UNKNOWN = Facts(UUID, "instance-0001")
"""Without nova's metadata."""


def policy(*lines: str) -> Policy:
    return parse([("50-x.policy", "\n".join(lines))])


def effect(rules: Policy, ask: Ask, facts: Facts = VM) -> Effect:
    return rules.decide(facts, ask).effect


def listen(topic: str = "trove-agent", exchange: str = "openstack", server: str = "") -> Ask:
    return Ask(Kind.LISTEN, exchange, topic, server)


def reply(topic: str = "trove-agent") -> Ask:
    return Ask(Kind.REPLY, "openstack", topic)


def call(method: str = "report", namespace: str = "", server: str = "") -> Ask:
    return Ask(Kind.CALL, "nova", "conductor", server, namespace, method)


def cast(*, fanout: bool = False) -> Ask:
    return Ask(Kind.CAST, "nova", "conductor", method="report", fanout=fanout)


NOTIFY = Ask(Kind.NOTIFY, "nova", "notifications", method="info")
HTTP = Ask(Kind.HTTP, "web", "metadata", method="GET")
REPORT = Ask(Kind.REPORT, "vchan", "facts")
FORWARD = Ask(Kind.FORWARD, "tcp", "8080")
EVERY_ASK = (listen(), reply(), call(), cast(), cast(fanout=True), NOTIFY, HTTP, REPORT)


# --- evaluation


@pytest.mark.parametrize("ask", EVERY_ASK)
def test_what_no_rule_allows_is_denied(ask: Ask) -> None:
    assert policy("# nothing").decide(VM, ask) == Verdict(Effect.DENY, DEFAULT)
    assert Policy().decide(VM, ask) == Verdict(Effect.DENY, DEFAULT)


def test_the_first_match_decides_and_is_named() -> None:
    rules = parse(
        [
            ("10-a.policy", "# comment\n\ncall any any method:drop_* deny"),
            ("20-b.policy", "call any any allow\ncall any any deny"),
        ]
    )
    assert rules.decide(VM, call("drop_all")) == Verdict(Effect.DENY, "10-a.policy:3")
    assert rules.decide(VM, call("report")) == Verdict(Effect.ALLOW, "20-b.policy:1")


@pytest.mark.parametrize("ask", EVERY_ASK)
def test_a_policy_that_cannot_be_read_denies_everything(ask: Ask) -> None:
    verdict = Policy.denying("50-x.policy:3: nonsense").decide(VM, ask)
    assert verdict == Verdict(Effect.DENY, "policy error: 50-x.policy:3: nonsense")
    assert Policy.denying("x").limits(VM) == Limits()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_that_kind_alone(kind: str) -> None:
    rules = policy(f"{kind} any any allow")
    allowed = [ask for ask in (*EVERY_ASK, FORWARD) if effect(rules, ask) is Effect.ALLOW]
    assert [("fanout" if ask.fanout else ask.kind) for ask in allowed] == [kind]


@pytest.mark.parametrize("exchange", ["scheduler_fanout", "amq.fanout", "amq.topic"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rule_allows_an_exchange_that_heeds_no_topic(kind: str, exchange: str) -> None:
    """A cast there would be a fanout to a service of another topic; a listener hears that's."""
    rules = policy("any any any allow", f"any any {exchange}/control allow")
    ask = Ask(Kind.CAST if kind == "fanout" else Kind(kind), exchange, "control")
    assert rules.decide(VM, ask) == Verdict(Effect.DENY, EVERYBODYS)
    assert rules.explain(VM, ask).verdict.effect is Effect.DENY


@pytest.mark.parametrize("name", ["x\ny", "x\r", "\x00", "\x1b[2J", "\u202e", "\u009b", "\ud800"])
@pytest.mark.parametrize("field", ["exchange", "topic", "server"])
def test_no_rule_allows_a_name_that_is_not_printable(field: str, name: str) -> None:
    """To RabbitMQ "scheduler_fan\\nout" is "scheduler_fanout"."""
    rules = policy("any any any server:* allow")
    good: dict[str, Any] = {"exchange": "openstack", "topic": "agent", "server": UUID}
    assert effect(rules, Ask(Kind.LISTEN, **good)) is Effect.ALLOW
    ask = Ask(Kind.LISTEN, **{**good, field: name})
    assert rules.decide(VM, ask) == Verdict(Effect.DENY, UNPRINTABLE)


def test_several_kinds_and_any() -> None:
    rules = policy("cast,call any any allow")
    assert effect(rules, cast()) is effect(rules, call()) is Effect.ALLOW
    assert effect(rules, cast(fanout=True)) is Effect.DENY
    assert all(effect(policy("any any any allow"), ask) is Effect.ALLOW for ask in EVERY_ASK)


@pytest.mark.parametrize(
    ("who", "matches"),
    [
        ("any", True),
        (f"uuid:{UUID}", True),
        (f"uuid:{UUID.upper()}", True),
        (f"uuid:{OTHER}", False),
        ("name:instance-*", True),
        ("name:Instance-*", False),
        ("name:instance", False),
        ("project:a*", True),
        ("project:b*", False),
        ("user:b*", True),
        ("flavor:m1.?mall", True),
        ("flavor:m1.[!s]*", False),
        (f"image:{OTHER}", True),
        ("project:a* flavor:m1.*", True),
        ("project:a* flavor:m2.*", False),
        ("project:b* flavor:m1.*", False),
    ],
)
def test_who(who: str, matches: bool) -> None:
    rules = policy(f"reply {who} any allow")
    assert effect(rules, reply()) is (Effect.ALLOW if matches else Effect.DENY)


@pytest.mark.parametrize("key", ["project", "user", "flavor", "image"])
def test_a_fact_that_is_not_known_matches_no_pattern(key: str) -> None:
    rules = policy(f"reply {key}:* any allow")
    assert effect(rules, reply()) is Effect.ALLOW
    assert effect(rules, reply(), UNKNOWN) is Effect.DENY


@pytest.mark.parametrize(
    ("target", "matches"),
    [
        ("any", True),
        ("conductor", True),
        ("cond*", True),
        ("*/conductor", True),
        ("nova/conductor", True),
        ("nova/conducto", False),
        ("Nova/conductor", False),
        ("heat/conductor", False),
        ("any server:*", True),
        ("any server:c1", True),
        ("any server:c2", False),
        ("any server:@none", False),
        ("any server:@self", False),
        ("any namespace:admin", True),
        ("any namespace:@none", False),
        ("any method:rep*", True),
        ("any method:rep", False),
        ("nova/conductor server:c? namespace:a* method:report", True),
        ("nova/conductor server:c? namespace:b* method:report", False),
    ],
)
def test_target(target: str, matches: bool) -> None:
    rules = policy(f"call any {target} allow")
    ask = call("report", "admin", "c1")
    assert effect(rules, ask) is (Effect.ALLOW if matches else Effect.DENY)


def test_none_is_a_request_that_names_none() -> None:
    rules = policy("call any any server:@none namespace:@none allow")
    assert effect(rules, call()) is Effect.ALLOW
    assert effect(rules, call(server="c1")) is Effect.DENY
    assert effect(rules, call(namespace="admin")) is Effect.DENY


@pytest.mark.parametrize("kinds", ["listen", "listen,reply", "any"])
def test_a_vm_listens_under_its_own_uuid_unless_a_rule_names_others(kinds: str) -> None:
    rules = policy(f"{kinds} any any allow")
    assert effect(rules, listen()) is Effect.ALLOW
    assert effect(rules, listen(server=UUID)) is Effect.ALLOW
    assert effect(rules, listen(server=OTHER)) is Effect.DENY
    assert effect(rules, listen(server=UUID), VM._replace(uuid=OTHER)) is Effect.DENY

    named = policy("listen any any server:db-* allow")
    assert effect(named, listen(server="db-1")) is Effect.ALLOW
    assert effect(named, listen()) is Effect.DENY
    both = policy("listen any any server:* allow")
    assert effect(both, listen()) is effect(both, listen(server="x")) is Effect.ALLOW


def test_self_is_the_vms_own_uuid() -> None:
    rules = policy("call any any server:@self allow")
    assert effect(rules, call(server=UUID)) is Effect.ALLOW
    assert effect(rules, call(server=OTHER)) is Effect.DENY
    assert effect(rules, call()) is Effect.DENY


def test_what_a_guest_sends_is_no_pattern_and_no_word() -> None:
    rules = policy("call any any server:db method:report allow")
    for text in ("*", "r*", "@none", "@self", "report\n", "any"):
        assert effect(rules, call(text, server="db")) is Effect.DENY
        assert effect(rules, call("report", server=text)) is Effect.DENY


def test_conductor() -> None:
    rules = policy("cast,fanout,call,notify any any conductor")
    for ask in (cast(), cast(fanout=True), call(), NOTIFY):
        assert rules.decide(VM, ask) == Verdict(Effect.CONDUCTOR, "50-x.policy:1")


# --- modes

MODE_ALLOWS = {
    "one-way-cast": [],
    "one-way-call": [reply()],
    "cast": [reply(), cast(), Ask(Kind.NOTIFY, "nova", "conductor")],
    "call": [reply(), cast(), Ask(Kind.NOTIFY, "nova", "conductor"), call()],
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    target = "" if mode.startswith("one-way") else "nova/conductor"
    rules = policy(f"mode project:a* {target} {mode}")
    elsewhere = Ask(Kind.CALL, "nova", "compute"), Ask(Kind.CAST, "nova", "compute")
    for ask in (*EVERY_ASK, *elsewhere, *MODE_ALLOWS["call"]):
        is_allowed = ask in MODE_ALLOWS[mode]
        assert effect(rules, ask) is (Effect.ALLOW if is_allowed else Effect.DENY), ask
        assert effect(rules, ask, UNKNOWN) is Effect.DENY


@pytest.mark.parametrize(
    ("mode", "closed"),
    [
        ("one-way-cast", {"reply", "cast", "fanout", "call", "notify", "http", "report"}),
        ("one-way-call", {"cast", "fanout", "call", "notify", "http", "report"}),
        ("nova/conductor cast", {"call"}),
        ("nova/conductor call", set()),
    ],
)
def test_what_a_mode_denies_no_later_rule_allows(mode: str, closed: set[str]) -> None:
    rules = policy(f"mode any {mode}", "any any any allow")
    denied = {
        "fanout" if ask.fanout else str(ask.kind)
        for ask in EVERY_ASK
        if effect(rules, ask) is Effect.DENY
    }
    assert denied == closed


def test_a_vm_in_a_mode_listens_where_a_rule_says_so() -> None:
    rules = policy("mode any one-way-cast", "listen any trove-* allow")
    assert effect(rules, listen()) is Effect.ALLOW
    assert effect(rules, reply()) is Effect.DENY


# --- limits


def test_limits_of_a_vm_are_the_defaults_and_what_the_first_lines_say() -> None:
    rules = policy(
        "limit project:a* requests_up=5 bytes_per_s=1M",
        "limit any        requests_up=7 topics=3",
        "limit name:x     topics=4",
        "call any any allow",
    )
    limits = rules.limits(VM)
    assert (limits.requests_up, limits.bytes_per_s, limits.topics) == (5, 1024**2, 3)
    assert limits.calls_up == Limits().calls_up
    assert rules.limits(UNKNOWN).requests_up == 7
    assert effect(rules, call()) is Effect.ALLOW


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_can_be_set_from_its_least_to_its_most(name: str) -> None:
    info = LIMITS[name]
    for value in (info.minimum, info.maximum):
        limits = policy(f"limit any {name}={value}").limits(VM)
        if name != "reassembly_bytes":
            assert getattr(limits, name) == value
        assert limits.reassembly_bytes >= limits.message_bytes
    for value in (info.minimum - 1, info.maximum + 1):
        with pytest.raises(PolicyError, match=f"{name}={value}; expected"):
            policy(f"limit any {name}={value}")


def test_units() -> None:
    limits = policy("limit any bytes_per_s=1G message_bytes=64K reassembly_bytes=1M").limits(VM)
    assert (limits.bytes_per_s, limits.message_bytes) == (1024**3, 65536)
    assert limits.reassembly_bytes == 1024**2


# --- explanations


def test_an_explanation_says_why_each_earlier_rule_did_not_match() -> None:
    rules = policy(
        "listen any any allow",
        "call name:web-* any allow",
        "call any heat/conductor allow",
        "call any any method:drop deny",
        "call any any allow",
        "call any any deny",
    )
    explanation = rules.explain(VM, call())
    assert explanation.verdict == rules.decide(VM, call())
    assert [str(step.mismatch) for step in explanation.steps] == [
        "kind 'call' is not 'listen'",
        "name 'instance-0001' is not 'web-*'",
        "exchange 'nova' is not 'heat'",
        "method 'report' is not 'drop'",
        "None",
    ]
    assert explanation.steps[-1].rule.text == "call any any allow"


def test_an_explanation_of_the_default() -> None:
    explanation = policy("call any any method:x allow").explain(VM, call())
    assert explanation.verdict.rule == DEFAULT
    assert all(step.mismatch for step in explanation.steps)


# --- what is refused


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("call", "the line ends; expected who"),
        ("call any", "the line ends; expected a target"),
        ("call any any", "the line ends; expected allow, deny or conductor"),
        ("call any any permit", "'permit'; expected allow, deny, conductor"),
        ("call any any allow now", "'now' is too much"),
        ("shout any any allow", "'shout'; expected listen, reply"),
        ("call, any any allow", "''; expected listen, reply"),
        ("CALL any any allow", "'CALL'; expected listen, reply"),
        ("call vm:x any allow", "'vm:x' is nobody"),
        ("call trove any allow", "'trove' is nobody"),
        ("call any name:x any allow", "'name:x' does not belong here"),
        ("call name:a name:b any allow", "name: comes twice"),
        ("call any any method:a method:b allow", "method: comes twice"),
        ("call uuid:x any allow", "'x' is no UUID"),
        ("call uuid:1111* any allow", "'1111*' is no UUID"),
        ("call name: any allow", "an empty pattern"),
        ("call any any method: allow", "an empty pattern"),
        ("call any a/b/c allow", "'a/b/c'; expected a target"),
        ("call any /b allow", "'/b'; expected a target"),
        ("call any b/ allow", "'b/'; expected a target"),
        ("call any allow", "the line ends; expected allow, deny or conductor"),
        ("call any [ab allow", "'[ab'; expected a ] to each ["),
        ("call any [] allow", "'[]'; expected a ] to each ["),
        ("call any [!] allow", "'[!]'; expected a ] to each ["),
        ("call any any server:@me allow", "'@me'; the only words with an @"),
        ("call any any method:@none allow", "'@none'; the only words with an @"),
        ("call name:@self any allow", "'@self'; the only words with an @"),
        ("listen any any method:x allow", "method: is for what has a method"),
        ("reply any any namespace:x allow", "namespace: is for what has a method"),
        ("reply any any server:x allow", "server: expected none with reply"),
        ("listen any any conductor", "can go to the conductor"),
        ("any any any conductor", "can go to the conductor"),
        ("http any any conductor", "can go to the conductor"),
        ("call any any allow # why", "a comment after a rule"),
        ("call any any allow\r", r"character '\r'"),
        ("call any any\u00a0allow", r"character '\xa0'"),
        ("call name:\u202ea any allow", r"character '\u202e'"),
        ("call name:\x00 any allow", r"character '\x00'"),
        ("mode any", "the line ends; expected a target"),
        ("mode any cast", "the line ends; expected one of one-way-cast"),
        ("mode any any send", "'send'; expected one of one-way-cast"),
        ("mode any any one-way-cast", "one-way-cast has no target"),
        ("mode any one-way-call now", "'now' is too much"),
        ("limit any", "the line ends; expected NAME=VALUE"),
        ("limit any speed=1", "'speed=1'; expected NAME=VALUE with one of messages_per_s"),
        ("limit any calls_up", "'calls_up'; expected NAME=VALUE"),
        ("limit any calls_up=", "calls_up=; expected a whole number"),
        ("limit any calls_up=-1", "calls_up=-1; expected a whole number"),
        ("limit any calls_up=1K", "calls_up=1K; expected a whole number"),
        ("limit any calls_up=٣", "calls_up=٣; expected a whole number"),
        ("limit any bytes_per_s=1T", "expected a whole number, perhaps with K, M or G"),
        ("limit any calls_up=1 calls_up=2", "calls_up comes twice"),
        ("limit any calls_up=1 allow", "'allow'; expected NAME=VALUE"),
        ("call any any allow" + " " * LINE_CHARS_MAX, "LINE_CHARS_MAX"),
    ],
)
def test_an_error_says_where_and_what_was_expected(line: str, text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        policy("call any any allow", "", line, "call any any allow")
    assert (caught.value.path, caught.value.line) == ("50-x.policy", 3)
    assert str(caught.value).startswith("50-x.policy:3: ")
    assert text in str(caught.value)


def test_how_much_there_may_be() -> None:
    line = "call any any allow\n"
    assert len(parse([("a", line * RULES_MAX)]).rules) == RULES_MAX
    with pytest.raises(PolicyError, match="RULES_MAX"):
        parse([("a", line * RULES_MAX), ("b", line)])
    with pytest.raises(PolicyError, match="RULES_MAX"):
        parse([("a", "limit any topics=1\n" * (RULES_MAX + 1))])
    with pytest.raises(PolicyError, match="FILES_MAX"):
        parse([("a", "")] * (FILES_MAX + 1))
    with pytest.raises(PolicyError, match="FILE_CHARS_MAX"):
        parse([("a", "#" * (FILE_CHARS_MAX + 1))])


def test_spaces_tabs_and_comments() -> None:
    rules = policy("  # one", "\tcall\tany   any\tallow  ", "#", "")
    assert [(rule.where, rule.text) for rule in rules.rules] == [
        ("50-x.policy:2", "call any any allow")
    ]


def test_rules_of_many_vms_are_not_kept() -> None:
    rules = policy("call name:x* any allow")
    for number in range(VMS_MAX * 2):
        facts = Facts(UUID, f"{'x' if number % 2 else 'y'}{number}")
        assert (effect(rules, call(), facts) is Effect.ALLOW) == (number % 2 == 1)
    assert len(rules._by_vm) <= VMS_MAX


# --- properties

NAMES = st.sampled_from(["", "a", "b", "ab", "abc", UUID, OTHER])
PATTERNS = st.sampled_from(["*", "a", "b", "a*", "*b", "?", "[ab]", "[!a]", "[]a]*", "ab"])
WORDS = st.sampled_from(
    [
        *(*KINDS, *MODES, *LIMITS, "any", "mode", "limit", "allow", "deny", "conductor"),
        *("uuid:", "name:", "project:", "server:", "method:", "namespace:", "@self", "@none"),
        *("a/b", "*", "[", "]", "!", "/", ":", "=", ",", "1K", UUID),
        *("#", "\t", "\r", "\x00", "\ud800"),
    ]
)


@given(st.one_of(st.text(), st.lists(st.tuples(WORDS, st.sampled_from(["", " ", "\n"])))))
def test_a_parser_raises_policy_errors_alone(text: str | list[tuple[str, str]]) -> None:
    joined = text if isinstance(text, str) else "".join(word + gap for word, gap in text)
    try:
        rules = parse([("x", joined)])
    except PolicyError as error:
        assert error.path == "x"
        assert 1 <= error.line <= joined.count("\n") + 1
    else:
        for ask in EVERY_ASK:
            rules.explain(VM, ask)
            rules.limits(VM)


@st.composite
def rule_lines(draw: Any) -> dict[str, Any]:
    """A rule as a table, for the reference model and for `as_line`."""
    kinds = draw(st.lists(st.sampled_from(ANY_KINDS), min_size=1, unique=True))
    rule: dict[str, Any] = {
        "kinds": kinds,
        "effect": draw(st.sampled_from(["allow", "deny"])),
        "target": draw(st.none() | st.tuples(PATTERNS, PATTERNS)),
    }
    for key in ("name", "project"):
        rule[key] = draw(st.none() | PATTERNS)
    rule["uuid"] = draw(st.none() | st.sampled_from([UUID, OTHER]))
    if "reply" not in kinds:
        rule["server"] = draw(st.none() | PATTERNS | st.sampled_from(["@self", "@none"]))
    if not {"reply", "listen", "report"} & set(kinds):
        rule["namespace"] = draw(st.none() | PATTERNS | st.just("@none"))
        rule["method"] = draw(st.none() | PATTERNS)
    return rule


def as_line(rule: dict[str, Any]) -> str:
    words = [",".join(rule["kinds"])]
    who = [f"{key}:{rule[key]}" for key in ("uuid", "name", "project") if rule[key]]
    words += who or ["any"]
    words.append("/".join(rule["target"]) if rule["target"] else "any")
    keys = ("server", "namespace", "method")
    words += [f"{key}:{rule[key]}" for key in keys if rule.get(key)]
    return " ".join([*words, rule["effect"]])


def model_matches(rule: dict[str, Any], facts: Facts, ask: Ask) -> bool:
    """As the documentation says it, without a thought for speed."""
    kind = "fanout" if ask.kind == "cast" and ask.fanout else str(ask.kind)
    server = (ask.server or facts.uuid) if kind == "listen" else ask.server
    pattern = rule.get("server") or ("@self" if kind == "listen" else "*")
    fits = {
        "@self": server == facts.uuid,
        "@none": server == "",
    }.get(pattern, fnmatch.fnmatchcase(server, pattern))
    for key in ("uuid", "name", "project"):
        value = getattr(facts, key)
        if rule[key] and not (value and fnmatch.fnmatchcase(value, rule[key])):
            return False
    exchange, topic = rule["target"] or ("*", "*")
    namespace = rule.get("namespace") or "*"
    return (
        kind in rule["kinds"]
        and fits
        and fnmatch.fnmatchcase(ask.exchange, exchange)
        and fnmatch.fnmatchcase(ask.topic, topic)
        and fnmatch.fnmatchcase(ask.method, rule.get("method") or "*")
        and (ask.namespace == "" if namespace == "@none" else True)
        and (namespace == "@none" or fnmatch.fnmatchcase(ask.namespace, namespace))
    )


ASKS = st.builds(Ask, st.sampled_from(Kind), NAMES, NAMES, NAMES, NAMES, NAMES, st.booleans())
FACTS = st.builds(
    Facts, st.sampled_from([UUID, OTHER]), NAMES, NAMES, st.just(""), st.just(""), st.just("")
)


@given(st.lists(rule_lines(), max_size=6), st.lists(st.tuples(FACTS, ASKS), min_size=1))
def test_evaluation_is_what_a_naive_model_says(
    rules: list[dict[str, Any]], questions: list[tuple[Facts, Ask]]
) -> None:
    parsed = policy(*map(as_line, rules))
    for facts, ask in questions:
        wanted = Verdict(Effect.DENY, DEFAULT)
        for number, rule in enumerate(rules, 1):
            if model_matches(rule, facts, ask):
                wanted = Verdict(Effect(rule["effect"]), f"50-x.policy:{number}")
                break
        assert parsed.decide(facts, ask) == wanted
        explanation = parsed.explain(facts, ask)
        assert explanation.verdict == wanted
        matched = [step.rule.where for step in explanation.steps if step.mismatch is None]
        assert matched == [wanted.rule] * (wanted.rule != DEFAULT)


@given(st.text(alphabet="ab*?[]!-^\\.", max_size=8), st.text(alphabet="ab-^\\.]", max_size=6))
def test_a_pattern_is_what_fnmatch_takes_it_for(pattern: str, name: str) -> None:
    try:
        rules = policy(f"call any any method:{pattern} allow")
    except PolicyError:
        return
    wanted = fnmatch.fnmatchcase(name, pattern)
    assert (effect(rules, call(name)) is Effect.ALLOW) == wanted


def test_the_words_of_the_language_are_those_of_the_types() -> None:
    assert set(KINDS) == {kind.value for kind in Kind} | {"fanout"}
    assert WHO_KEYS == ("uuid", "name", "project", "user", "flavor", "image")
    assert Facts._fields == (*WHO_KEYS, "labels")
    assert LABEL_KINDS == domain_xml.LABEL_KINDS


# --- extra specs and properties ---------------------------------------------------------------

LABELS = (("extra-spec:vchan:enabled", "true"), ("property:os_distro", "debian"))
LABELLED = VM._replace(labels=LABELS)


@pytest.mark.parametrize(
    ("who", "matches"),
    [
        ("extra-spec:vchan:enabled=true", True),
        ("extra-spec:vchan:enabled=tr?e", True),
        ("extra-spec:vchan:enabled=*", True),
        ("extra-spec:vchan:enabled=false", False),
        ("extra-spec:vchan:other=*", False),
        ("property:os_distro=debian extra-spec:vchan:enabled=true", True),
        ("property:os_distro=debian property:os_type=linux", False),
        ("property:os_distro=debian project:aaaa*", True),
        ("property:os_distro=debian project:b*", False),
    ],
)
def test_rules_by_extra_spec_and_property(who: str, matches: bool) -> None:
    rules = policy(f"call {who} any allow", f"limit {who} topics=7", f"own {who} nova/t.{{uuid}}")
    assert rules.asks_labels and not policy("call project:a any allow").asks_labels
    assert (effect(rules, call(), LABELLED) is Effect.ALLOW) is matches
    assert (rules.limits(LABELLED).topics == 7) is matches
    assert rules.owns(LABELLED, "nova", f"t.{UUID}") is matches
    for older in (VM, UNKNOWN):
        assert effect(rules, call(), older) is Effect.DENY
    step = rules.explain(VM, call()).steps[0]
    assert step.mismatch is not None and "'' is not" in str(step.mismatch)


@pytest.mark.parametrize(
    ("who", "error"),
    [
        ("extra-spec:vchan", "expected extra-spec:NAME=GLOB"),
        ("extra-spec:=true", "expected extra-spec:NAME=GLOB"),
        ("property:os_distro=", "expected property:NAME=GLOB"),
        ("extra-spec:a=1 extra-spec:a=2", "extra-spec:a: comes twice"),
        ("extra-spec:a=[x", "expected a ] to each"),
        ("extraspec:a=1", "expected who: any or uuid:, name:"),
    ],
)
def test_words_that_are_no_labels(who: str, error: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(error)):
        policy(f"call {who} any allow")


def test_facts_with_labels_as_an_operator_writes_them() -> None:
    facts = make_facts({"uuid": UUID, "extra-spec:vchan:enabled": "true", "property:a": "b=c"})
    assert facts.labels == (("extra-spec:vchan:enabled", "true"), ("property:a", "b=c"))
    assert facts.named() == {**dict.fromkeys(WHO_KEYS, ""), "uuid": UUID}
    with pytest.raises(ConfigError, match="is no fact"):
        make_facts({"extraspec:a": "b"})


# --- forwards ---------------------------------------------------------------------------------


def test_any_does_not_include_what_programs_on_the_host_ask() -> None:
    assert effect(policy("any any any allow"), FORWARD) is Effect.DENY


@pytest.mark.parametrize(
    ("line", "target", "is_allowed"),
    [
        ("forward any tcp:8080 allow", "tcp:8080", True),
        ("forward any tcp:8080 allow", "tcp:80", False),
        ("forward any tcp:8080 allow", "unix:8080", False),
        ("forward any tcp:80* allow", "tcp:8081", True),
        ("forward any unix:/run/app/* allow", "unix:/run/app/a.sock", True),
        ("forward any unix:/run/app/* allow", "unix:/run/b", False),
        ("forward name:instance-0001 any allow", "tcp:1", True),
        ("forward name:other any allow", "tcp:1", False),
        ("mode any one-way-call\nforward any any allow", "tcp:1", False),
        ("forward any any allow\nmode any one-way-cast", "tcp:1", True),
        ("mode any any call\nforward any any allow", "tcp:1", True),
    ],
)
def test_what_may_be_forwarded_to(line: str, target: str, is_allowed: bool) -> None:
    rules = policy(*line.split("\n"))
    facts = VM._replace(name="instance-0001")
    assert (rules.decide(facts, forward_ask(target)).effect is Effect.ALLOW) == is_allowed
    assert rules.decide(facts, make_ask("forward", target, {})) == rules.decide(
        facts, forward_ask(target)
    )


def test_a_vm_that_may_be_forwarded_to_is_listened_to() -> None:
    assert policy("forward any tcp:1 allow").may_speak(VM)
    assert not policy("forward any tcp:1 deny").may_speak(VM)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("forward,call any any allow", "on a line of its own"),
        (
            "forward any nova/x allow",
            "expected a target: any, tcp:PORT, unix:/PATH or service:NAME",
        ),
        ("forward any tcp: allow", "expected a target"),
        ("forward any tcp:1 conductor", "expected allow or deny"),
        ("forward any tcp:1 server:a allow", "expected allow or deny"),
        ("forward any tcp:1 allow more", "nothing after the effect"),
        ("forward any unix:/[a allow", "expected a ] to each ["),
        ("call any tcp:1 allow", "does not belong here"),
    ],
)
def test_a_forward_that_cannot_be_read(line: str, expected: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(expected)):
        policy(line)


@pytest.mark.parametrize("words", [("udp:1", {}), ("tcp:", {}), ("tcp:1", {"server": "a"})])
def test_a_target_that_is_none(words: tuple[str, dict[str, str]]) -> None:
    with pytest.raises(ConfigError):
        make_ask("forward", *words)


# --- topics that belong to one VM -------------------------------------------------------------

ELSE = Facts(OTHER, "instance-0002", "a" * 32, "b" * 32, "m1.small")


def test_an_owned_topic_is_its_owners_whatever_the_rules_say() -> None:
    rules = policy(
        "listen any trove/guestagent.* allow",
        "listen any trove/guestagent.7 deny",
        f"own uuid:{UUID} trove/guestagent.7",
    )
    for facts, is_owner in ((VM, True), (ELSE, False)):
        verdict = rules.decide(facts, listen("guestagent.7", "trove"))
        assert verdict == Verdict(Effect.ALLOW if is_owner else Effect.DENY, "50-x.policy:3")
        assert rules.owns(facts, "trove", "guestagent.7") is is_owner
    assert rules.decide(ELSE, listen("guestagent.8", "trove")).effect is Effect.ALLOW
    assert not rules.owns(VM, "trove", "guestagent.8"), "served, and nobody's alone"
    assert not rules.owns(VM, "nova", "guestagent.7"), "another exchange's"
    assert rules.decide(VM, listen("guestagent.7", "trove", OTHER)).effect is Effect.DENY


def test_each_vm_owns_the_topic_with_its_uuid() -> None:
    rules = policy("own project:aaaa* neutron/q-agent.{uuid}.x", "listen any neutron/* allow")
    topic, others = f"q-agent.{UUID}.x", f"q-agent.{OTHER}.x"
    assert rules.owns(VM, "neutron", topic)
    assert not rules.owns(VM, "neutron", others)
    assert effect(rules, listen(topic, "neutron")) is Effect.ALLOW
    assert effect(rules, listen(others, "neutron")) is Effect.DENY
    assert not rules.owns(UNKNOWN, "neutron", topic), "a VM whose project is not known"
    assert effect(rules, listen(topic, "neutron"), UNKNOWN) is Effect.DENY
    assert effect(rules, listen("q-agent.no-uuid.x", "neutron")) is Effect.ALLOW


def test_a_name_goes_before_a_name_with_the_uuid() -> None:
    rules = policy("own any x/a.{uuid}", f"own uuid:{OTHER} x/a.{UUID}")
    assert not rules.owns(VM, "x", f"a.{UUID}")
    assert rules.owns(ELSE, "x", f"a.{UUID}")


def test_a_vm_that_says_nothing_is_given_what_it_owns() -> None:
    rules = policy(f"own uuid:{UUID} trove/guestagent.7", "own any x/a.{uuid}")
    assert rules.named_topics(VM) == {("trove", "guestagent.7"), ("x", f"a.{UUID}")}
    assert rules.named_topics(ELSE) == {("x", f"a.{OTHER}")}


def test_a_policy_with_an_error_gives_nothing_to_anybody() -> None:
    assert not Policy.denying("it cannot be read").owns(VM, "trove", "guestagent.7")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("own any trove/guestagent.7", "one owner"),
        ("own name:db-1 trove/guestagent.7", "one owner"),
        (f"own uuid:{UUID} project:x trove/guestagent.7", "one owner"),
        (f"own uuid:{UUID} trove/guestagent.*", "expected EXCHANGE/TOPIC"),
        (f"own uuid:{UUID} tr?ve/guestagent.7", "expected EXCHANGE/TOPIC"),
        (f"own uuid:{UUID} guestagent.7", "expected EXCHANGE/TOPIC"),
        (f"own uuid:{UUID} any", "expected EXCHANGE/TOPIC"),
        (f"own uuid:{UUID} a/b/c", "expected EXCHANGE/TOPIC"),
        (f"own uuid:{UUID} a/b allow", "nothing after the topic"),
        ("own any x/a.{uuid}.{uuid}", "expected EXCHANGE/TOPIC"),
        ("own any x/a.{name}", "expected EXCHANGE/TOPIC"),
        (f"own uuid:{UUID} openstack/vchan_vm_{OTHER}", "serves others"),
        (f"own uuid:{UUID} openstack/agent_fanout_{OTHER}", "serves others"),
        (f"own uuid:{UUID} x/a\nown uuid:{OTHER} x/a", "is owned at 50-x.policy:1"),
        (f"own uuid:{UUID} x/a\nown uuid:{UUID} x/a", "is owned at 50-x.policy:1"),
        ("own", "who"),
    ],
)
def test_an_own_line_that_is_none(line: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words.replace(".", "[.]")):
        policy(line)


def test_owned_topics_are_counted_apart_from_rules() -> None:
    lines = [f"own uuid:{UUID} x/a{number}" for number in range(RULES_MAX + 1)]
    assert policy(*lines).owns(VM, "x", f"a{RULES_MAX}")
    lines = [f"own uuid:{UUID} x/{number}" for number in range(OWNS_MAX + 1)]
    half = len(lines) // 2
    with pytest.raises(PolicyError, match="OWNS_MAX"):
        parse([("1", "\n".join(lines[:half])), ("2", "\n".join(lines[half:]))])


# --- contexts, by target ----------------------------------------------------------------------


def test_lines_of_a_context_add_up_and_the_longest_value_counts() -> None:
    rules = policy(
        "context out any trove/* context=2K a-b",
        f"context out uuid:{UUID} trove/conductor context=100 c_d",
        "context in any */agent token",
    )
    assert rules.context_keys(VM, "out", "trove", "conductor") == {
        "context": 2048,
        "a-b": 255,
        "c_d": 255,
    }
    assert "c_d" not in rules.context_keys(ELSE, "out", "trove", "conductor")
    assert rules.context_keys(VM, "in", "trove", "conductor") == {}
    assert rules.context_keys(VM, "in", "x", "agent").keys() == {"token"}
    assert Policy.denying("x").context_keys(VM, "out", "trove", "conductor") == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("context any trove/x context", "expected one of in, out"),
        ("context out any trove/x", "KEY"),
        ("context out any x context", "expected EXCHANGE/TOPIC"),
        ("context out any any context", "expected EXCHANGE/TOPIC"),
        ("context out any trove/x is_admin", "no guest may set it"),
        ("context out any trove/x user-id", "no guest may set it"),
        ("context out any trove/x *", "expected keys"),
        ("context in any trove/x Context", "expected keys"),
        ("context out any trove/x a a", "expected keys"),
        ("context out any trove/x a=65K", "expected 1 to 65536"),
        ("context out any trove/x a=0", "expected 1 to 65536"),
        ("context out any trove/x a=", "expected 1 to 65536"),
        ("context in any trove/x a=5", "expected the key alone"),
    ],
)
def test_a_line_of_a_context_that_is_none(line: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        policy(line)
