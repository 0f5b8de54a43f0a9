"""Lint: what it says of a rule is true on every small universe."""

from __future__ import annotations

import fnmatch
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.host.policy import lint as policy_lint
from vchan.host.policy.lint import includes, lint
from vchan.host.policy.rule_parser import parse
from vchan.host.policy.rules import Ask, Facts, Kind, Policy

UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
PROJECT = "0123456789abcdef0123456789abcdef"
ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "etc" / "policy.d" / "90-default.policy"


def policy(*lines: str) -> Policy:
    return parse([("p", "\n".join(lines))])


def codes(*lines: str) -> list[tuple[str, str]]:
    return [(finding.where, finding.code) for finding in lint(policy(*lines))]


# --- patterns


def brute(one: str, other: str, names: list[str]) -> bool:
    return all(fnmatch.fnmatchcase(n, one) for n in names if fnmatch.fnmatchcase(n, other))


def test_inclusion_is_exact_on_all_small_patterns() -> None:
    pieces = ["a", "b", "*", "?", "[ab]", "[!a]"]
    patterns = ["".join(p) for size in (1, 2, 3) for p in product(pieces, repeat=size)]
    names = ["".join(n) for size in range(6) for n in product("abc", repeat=size)]
    matched = {
        pattern: frozenset(name for name in names if fnmatch.fnmatchcase(name, pattern))
        for pattern in patterns
    }
    short = [pattern for pattern in patterns if len(policy_lint._parse(pattern)) <= 2]
    for one, other in product(short, patterns):
        assert includes(one, other) == (matched[other] <= matched[one]), (one, other)


@given(st.text("ab*?", max_size=7), st.text("ab*?", max_size=5))
def test_inclusion_is_exact_on_longer_ones(one: str, other: str) -> None:
    names = ["".join(n) for size in range(8) for n in product("abc", repeat=size)]
    assert includes(one, other) == brute(one, other, names)


SETS = st.text("ab-]!", min_size=1, max_size=3).filter("!".__ne__)


@given(SETS, SETS)
def test_inclusion_of_sets(one: str, other: str) -> None:
    names = ["".join(n) for size in range(4) for n in product("abc-]!", repeat=size)]
    names += [chr(number) for number in range(256)]
    assert includes(f"[{one}]", f"[{other}]") == brute(f"[{one}]", f"[{other}]", names)


def test_inclusion_of_words() -> None:
    assert includes("*", "@self") and includes("**", "@self") and includes("@self", "@self")
    assert not includes("@self", "*") and not includes("a*", "@self")
    assert includes("*", "@none") and includes("@none", "@none")
    assert not includes("?*", "@none") and not includes("@none", "a")


def test_a_comparison_that_would_take_too_long_is_given_up() -> None:
    one = "*a" + "?" * 20
    assert not includes(one, "*a" + "?" * 19 + "[ab]")
    assert includes("*a???", "*a??[ab]")


# --- shadows


@pytest.mark.parametrize(
    "lines",
    [
        ("call any any allow", "call name:x nova/* deny"),
        ("call any any allow", "cast any any deny", "call,cast any a deny"),
        ("listen any any allow", "listen any any server:@self deny"),
        ("any any any deny", "forward any any deny", "mode any one-way-cast"),
        ("call any any server:* allow", "call any any server:@self deny"),
        ("call name:a* any allow", "call name:ab* project:x any allow"),
        (f"call uuid:{UUID} any allow", f"call uuid:{UUID.upper()} any deny"),
    ],
)
def test_a_rule_that_never_decides(lines: tuple[str, ...]) -> None:
    assert (f"p:{len(lines)}", "shadowed") in codes(*lines)


@pytest.mark.parametrize(
    "lines",
    [
        ("call name:* any allow", "call any any deny"),
        ("call project:* any allow", "call name:x any deny"),
        ("call any any allow", "call,cast any any deny"),
        ("listen any any allow", "listen any any server:* deny"),
        ("listen any any allow", "listen any any server:x deny"),
        ("call any any namespace:@none allow", "call any any deny"),
        ("call any any method:?* allow", "call any any deny"),
        ("mode any one-way-call", "any any any allow"),
        ("cast any any deny", "mode any any cast"),
    ],
)
def test_a_rule_that_may_decide(lines: tuple[str, ...]) -> None:
    assert (f"p:{len(lines)}", "shadowed") not in codes(*lines)


def test_it_names_who_came_first() -> None:
    findings = lint(policy("cast any any deny", "call any any deny", "call,cast any a allow"))
    text = next(finding.text for finding in findings if finding.code == "shadowed")
    assert text == "never decides: p:1, p:2 came first for all it matches"


PATTERNS = ["*", "a", "b", "a*", "*b", "?", "[ab]"]
WHO = st.one_of(
    st.just("any"),
    st.sampled_from(PATTERNS).map("name:{}".format),
    st.tuples(st.sampled_from(PATTERNS), st.sampled_from(PATTERNS)).map(
        lambda two: f"name:{two[0]} project:{two[1]}"
    ),
)
TARGET = st.sampled_from(["any", "a", "*/a*", "*/?", "a/*", "[ab]/[!b]*"])
SERVER = st.sampled_from(["", *(f" server:{p}" for p in ["*", "a", "a*", "@self", "@none"])])
RULE = st.builds(
    "{} {} {}{} {}".format,
    st.sampled_from(["listen", "cast", "call", "cast,call", "listen,call", "fanout", "any"]),
    WHO,
    TARGET,
    SERVER,
    st.sampled_from(["allow", "deny"]),
)
MODE = st.builds("mode {} {}".format, WHO, st.sampled_from(["one-way-cast", "one-way-call"]))

NAMES = ["", "a", "b", "ab", "c"]
FACTS = [Facts(UUID, name, project) for name in NAMES for project in NAMES]
ASKS = [
    Ask(kind, exchange, topic, server, fanout=fanout)
    for kind, exchange, topic, server, fanout in product(
        (Kind.LISTEN, Kind.REPLY, Kind.CAST, Kind.CALL),
        ("a", "c"),
        ("a", "b", "ab"),
        ("", "a", "ab", UUID, OTHER),
        (False, True),
    )
]


@given(st.lists(RULE | MODE, min_size=1, max_size=5))
def test_what_is_called_shadowed_decides_nothing_on_a_small_universe(lines: list[str]) -> None:
    rules = policy(*lines)
    shadowed = {finding.where for finding in lint(rules) if finding.code == "shadowed"}
    if shadowed:
        decisive = {rules.decide(facts, ask).rule for facts in FACTS for ask in ASKS}
        assert not shadowed & decisive, (lines, shadowed & decisive)


@given(RULE, RULE)
def test_a_rule_that_one_other_covers_is_found(first: str, second: str) -> None:
    """And nothing is missed of two rules, where the small universe has room for the difference."""
    rules = policy(first, second)
    one, other = rules.rules
    decides = any(rules.decide(facts, ask).rule == other.where for facts in FACTS for ask in ASKS)
    is_shadowed = ("p:2", "shadowed") in {(f.where, f.code) for f in lint(rules)}
    assert not (decides and is_shadowed)
    same = first.rsplit(" ", 1)[0] == second.rsplit(" ", 1)[0]
    if same or (first.startswith("any any any ") and "server:" not in first):
        covers_all = all(policy_lint.covers(one, other, kind) for kind in other.kinds)
        assert is_shadowed == covers_all


def test_shadowed_limits() -> None:
    first = "limit name:a* topics=1 calls_up=2"
    assert codes(first, "limit name:ab topics=3")[0] == ("p:2", "shadowed")
    assert ("p:2", "shadowed") not in codes(first, "limit name:ab topics=3 requests_up=1")
    assert ("p:2", "shadowed") not in codes(first, "limit any topics=3")
    both = ("limit any topics=1", "limit any calls_up=2", "limit name:x topics=2 calls_up=1")
    assert ("p:3", "shadowed") in codes(*both)


# --- the rest


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("call name:** any allow", "name:* matches every VM whose name is known"),
        ("call project:* a/b allow", "project:* matches every VM whose project is known"),
        ("call any a/b method:* allow", "method:* matches any, and none: leave it out"),
        ("listen any a/b server:* allow", "server:* lets a VM listen under any name"),
        ("call any any allow", "allows call on every topic for every VM"),
        ("call,cast name:x */** conductor", "conducts call, cast on every topic"),
        ("listen name:x any allow", "allows listen on every topic"),
        ("mode any any cast", "allows cast, notify on every topic for every VM"),
        ("forward any any allow", "allows forward to every target for every VM"),
        ("forward name:x any allow", "allows forward to every target"),
    ],
)
def test_what_matches_everything(line: str, text: str) -> None:
    findings = [finding for finding in lint(policy(line)) if finding.code == "everything"]
    assert any(finding.text.startswith(text) for finding in findings), findings


@pytest.mark.parametrize(
    ("lines", "services"),
    [
        (["forward any any allow"], "exec, files, shell"),
        (["forward name:x service:* allow"], "exec, files, shell"),
        (["forward any service:[!f]* allow"], "exec, shell"),
        (["forward any service:shell deny", "forward any any allow"], "exec, files"),
        (["forward name:x* service:* deny", "forward name:xy any allow"], ""),
        (["forward name:xy service:* deny", "forward name:x* any allow"], "exec, files, shell"),
        (["forward any service:shell allow", "forward any any allow"], "exec, files"),
        (["forward any service:shell allow"], ""),
        (["forward any service:my-* allow"], ""),
        (["forward any tcp:* allow"], ""),
        (["forward any any deny"], ""),
    ],
)
def test_services_that_a_pattern_lets_in(lines: list[str], services: str) -> None:
    """Programs, files and a shell are to be meant by name."""
    said = [finding for finding in lint(policy(*lines)) if finding.code == "service"]
    assert [finding.where for finding in said] == ([f"p:{len(lines)}"] if services else [])
    for finding in said:
        named = ", ".join(f"service:{name}" for name in services.split(", "))
        assert finding.text.startswith(f"includes {named}:")


@pytest.mark.parametrize(
    "line",
    [
        "reply any any allow",
        "any any any deny",
        "call any nova/* allow",
        "mode any one-way-call",
        "listen any a/b allow",
    ],
)
def test_what_does_not(line: str) -> None:
    assert "everything" not in {code for _, code in codes(line)}


@pytest.mark.parametrize(
    ("who", "is_odd"),
    [
        (f"project:{PROJECT}", False),
        (f"project:{PROJECT.upper()}", True),
        (f"project:{UUID}", True),
        ("project:shop", True),
        ("project:0123*", False),
        ("project:shop*", True),
        (f"user:{PROJECT}", False),
        (f"user:{PROJECT * 2}", False),
        ("user:alice", True),
        (f"image:{UUID}", False),
        ("image:ubuntu", True),
        ("flavor:m1.small", False),
        ("name:shop", False),
    ],
)
def test_ids_that_nova_does_not_write(who: str, is_odd: bool) -> None:
    assert (("p:1", "id") in codes(f"call {who} a/b allow")) == is_odd
    assert (("p:1", "id") in codes(f"limit {who} topics=1")) == is_odd


@pytest.mark.parametrize(
    ("line", "is_odd"),
    [
        ("call property:os_distro=x a/b allow", True),
        ("call property:os_distro=x flavor:m1 a/b conductor", True),
        ("call property:os_distro=x a/b deny", False),
        ("call property:os_distro=x project:0123* a/b allow", False),
        ("call extra-spec:vchan:enabled=true a/b allow", False),
        ("mode property:os_distro=x a/b call", True),
        ("limit property:os_distro=x topics=1", True),
        ("own property:os_distro=x a/b.{uuid}", True),
        ("context in property:os_distro=x a/b key", True),
    ],
)
def test_what_a_tenants_image_says_gives_him_something(line: str, is_odd: bool) -> None:
    assert codes(line).count(("p:1", "tenant")) == int(is_odd)


def test_what_is_missing() -> None:
    assert codes("call any a/b allow") == [("", "missing")]
    assert codes("listen any a/b allow") == [("", "missing")]
    assert codes("listen,reply any a/b allow") == []
    assert codes("listen any a/b allow", "mode any one-way-cast") == [("", "missing")]


BOTH = ("listen,reply any a/* allow", "cast any c/* allow")
"""So that nothing is missing."""


@pytest.mark.parametrize(
    ("rule", "is_shadowed"),
    [
        ("listen any a/7 deny", True),
        ("listen uuid:{uuid} a/7 server:x allow", True),
        (f"listen any a/t.{OTHER} allow", True),
        ("listen any a/8 deny", False),
        ("listen any a/t.7 deny", False),
        ("listen any a/t.* deny", False),
        ("listen any */7 deny", False),
        ("listen,reply any a/7 deny", False),
        ("reply any a/7 deny", False),
    ],
)
def test_rules_of_a_topic_that_belongs_to_somebody(rule: str, is_shadowed: bool) -> None:
    rule = rule.replace("{uuid}", UUID)
    lines = (rule, f"own uuid:{UUID} a/7", "own any a/t.{uuid}", *BOTH)
    assert (("p:1", "shadowed") in codes(*lines)) is is_shadowed
    if is_shadowed:  # and it is true
        without = policy(*lines[1:])
        for vm, topic in product((UUID, OTHER), ("7", f"t.{OTHER}")):
            ask = Ask(Kind.LISTEN, "a", topic)
            decided = policy(*lines).decide(Facts(vm, "x"), ask)
            assert decided.effect == without.decide(Facts(vm, "x"), ask).effect


def test_a_topic_that_belongs_to_somebody_may_be_listened_to() -> None:
    text = {finding.text for finding in lint(policy("own any a/t.{uuid}"))}
    assert text == {
        "listen is allowed and reply is not: every call to an agent fails; casts arrive"
    }


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("own project:* a/t.{uuid}", {"everything"}),
        ("own name:* a/t.{uuid}", {"everything"}),
        ("limit flavor:* topics=1", {"everything"}),
        ("context in project:* a/b key", {"everything"}),
        ("own extra-spec:x=* a/t.{uuid}", set()),
        ("own project:shop a/t.{uuid}", {"id"}),
        ("context in image:ubuntu a/b key", {"id"}),
        ("context in any */* key", {"everything"}),
        ("context out any */* key", {"everything"}),
        ("context out any c/* key", set()),
        ("context in any a/b auth_token", {"secret"}),
        ("context in any a/b db-password key", {"secret"}),
        ("context in any x/y key", {"missing"}),
        ("context out any x/y key", {"missing"}),
        ("context out any a/b key", {"missing"}),
        ("context in any x/* key", set()),
        ("context in any a/b key", set()),
        ("context out any c/b key", set()),
    ],
)
def test_what_is_odd_about_own_and_context(line: str, says: set[str]) -> None:
    assert {code for where, code in codes(line, *BOTH) if where == "p:1"} == says


def test_an_owned_topic_is_served() -> None:
    assert codes("context in any x/t.7 key", f"own uuid:{UUID} x/t.7", *BOTH) == []


@pytest.mark.parametrize(
    ("before", "line", "is_shadowed"),
    [
        (["context out any c/* a=1K b"], "context out any c/d a", True),
        (["context out any c/* a b"], "context out any c/d a=1K", False),
        (["context out any c/* a", "context out any c/d b"], "context out any c/d a b", True),
        (["context out any c/* a", "context out any c/e b"], "context out any c/d a b", False),
        (["context in any c/* a"], "context out any c/d a", False),
        (["context out name:db c/* a"], "context out any c/d a", False),
        (["context out any c/d a"], "context out any c/* a", False),
        (["context out any c/d a"], "context out name:db c/d a", True),
    ],
)
def test_a_context_line_that_adds_nothing(before: list[str], line: str, is_shadowed: bool) -> None:
    at = len(before) + 1
    assert ((f"p:{at}", "shadowed") in codes(*before, line, *BOTH)) is is_shadowed


def test_the_shipped_policy() -> None:
    rules = parse([(str(SHIPPED), SHIPPED.read_text())])
    facts = Facts(UUID, "vm")
    allowed = {ask.kind for ask in ASKS if rules.decide(facts, ask).effect.value == "allow"}
    assert allowed == {Kind.REPLY}
    assert [(finding.code, finding.where) for finding in lint(rules)] == [("missing", "")]
    with_topics = parse(
        [(str(SHIPPED), SHIPPED.read_text()), ("listen_topics", "listen,reply any trove-* allow")]
    )
    assert lint(with_topics) == []


def test_the_role_for_kolla_has_the_policy_that_is_shipped() -> None:
    """A copy: operators take the role away by itself."""
    copy = ROOT / "packaging" / "kolla" / "vchan" / "files" / SHIPPED.name
    assert copy.read_bytes() == SHIPPED.read_bytes()
