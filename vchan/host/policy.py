"""What guests may do: the rules of /etc/vchan/policy.d, and what they say of one request.

Rules of this file
1. No I/O, no clock, no logging. Files come in as texts, a guest's request as an `Ask`.
2. The first rule that matches decides. No rule: denied. A text that cannot be parsed whole is a
   `PolicyError`, and whoever has no other policy then denies everything (`Policy.denying`).
3. What a guest sends is data only: it is matched against the rules' globs and never parsed.

    KIND[,KIND]  WHO...  TARGET...      allow | deny | conductor
    mode         WHO...  [TARGET...]    one-way-cast | one-way-call | cast | call
    limit        WHO...                 NAME=VALUE...

See docs/policy.md.
"""

from __future__ import annotations

import re
import uuid as uuids
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import translate
from typing import Final, NamedTuple

from vchan.errors import ConfigError
from vchan.host.limits import LIMITS, Limits

FILES_MAX: Final = 100
FILE_CHARS_MAX: Final = 1024 * 1024
LINE_CHARS_MAX: Final = 1000
RULES_MAX: Final = 2000
"""In all files: so many that speak of one VM are looked through in 3 ms at worst."""
VMS_MAX: Final = 1024
"""VMs whose rules are kept at hand."""


FANOUT_SUFFIX: Final = "_fanout"
BROKER_PREFIX: Final = "amq."
"""Exchanges of oslo.messaging's for fanouts, and the broker's own. Most bring what is sent there to
everybody that listens there, whatever the topic: who casts to one has sent a fanout to a service
that no rule speaks of, and who listens there hears that service's."""
EVERYBODYS: Final = "an exchange that heeds no topic: no rule can allow it"
UNPRINTABLE: Final = "a name that is not printable: no rule can allow it"
"""RabbitMQ takes ends of lines out of names: what is another name for the rules is the same there.
And names are logged."""


class PolicyError(ConfigError):
    """A policy cannot be parsed.

    Args:
        path: The file's.
        line: Counted from 1.
        expected: What is wrong, and what was expected.
    """

    def __init__(self, path: str, line: int, expected: str) -> None:
        self.path = path
        self.line = line
        super().__init__(f"{path}:{line}", expected)


class Kind(StrEnum):
    """What a guest asks. A fanout is a cast with `Ask.fanout`."""

    LISTEN = "listen"
    REPLY = "reply"
    CAST = "cast"
    CALL = "call"
    NOTIFY = "notify"
    HTTP = "http"


class Facts(NamedTuple):
    """Which VM, by libvirt and by nova's metadata; "" where they do not say.

    `name` is libvirt's: nova's display name is the tenant's choice.
    """

    uuid: str
    name: str = ""
    project: str = ""
    user: str = ""
    flavor: str = ""
    image: str = ""


class Ask(NamedTuple):
    """One request of a guest's. `server`, `namespace` and `method` are "" where there is none."""

    kind: Kind
    exchange: str
    topic: str
    server: str = ""
    namespace: str = ""
    method: str = ""
    fanout: bool = False


class Effect(StrEnum):
    """What becomes of a request."""

    ALLOW = "allow"
    DENY = "deny"
    CONDUCTOR = "conductor"


class Verdict(NamedTuple):
    """`rule` is FILE:LINE, or DEFAULT, or what is wrong with the policy."""

    effect: Effect
    rule: str


DEFAULT: Final = "default"
"""The rule's name when none matched."""

FANOUT: Final = "fanout"
KINDS: Final = ("listen", "reply", "cast", FANOUT, "call", "notify", "http")
"""The words for kinds, as rules have them."""
WITHOUT_METHOD: Final = frozenset({"listen", "reply"})
CONDUCTED: Final = frozenset({"cast", FANOUT, "call", "notify"})
"""What can be sent to the conductor in the target's place."""

WHO_KEYS: Final = Facts._fields
TARGET_KEYS: Final = ("server", "namespace", "method")
ONE_WAY: Final = ("one-way-cast", "one-way-call")
MODES: Final = (*ONE_WAY, "cast", "call")

SELF: Final = "@self"
"""server:@self is the VM's own UUID."""
NONE: Final = "@none"
"""server:@none, namespace:@none: the request names none."""


class Glob:
    """A pattern of `*`, `?` and `[...]`, case-sensitive, for a whole name."""

    __slots__ = ("matches", "text")

    text: str
    matches: Callable[[str], object]

    def __init__(self, text: str) -> None:
        self.text = text
        if text == "*":
            self.matches = _always
        elif text == NONE:
            self.matches = "".__eq__
        elif not is_pattern(text):
            self.matches = text.__eq__
        else:
            self.matches = re.compile(translate(text)).match

    def __repr__(self) -> str:
        return f"Glob({self.text!r})"


def is_pattern(text: str) -> bool:
    """Whether it is more than one name."""
    return any(character in text for character in "*?[")


def _always(_: str) -> bool:
    return True


EVERYTHING: Final = Glob("*")


class Mismatch(NamedTuple):
    """Why a rule does not match: this field is not what the rule's pattern says."""

    field: str
    value: str
    pattern: str

    def __str__(self) -> str:
        return f"{self.field} {self.value!r} is not {self.pattern!r}"


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One rule. A mode's line makes several, all with the line's `where` and `text`.

    Attributes:
        where: FILE:LINE.
        who: Patterns of facts, by WHO_KEYS; all must match, and an unknown fact matches none.
        server: None: for `listen` the VM's own UUID, otherwise any.
    """

    where: str
    text: str
    kinds: frozenset[str]
    who: tuple[tuple[str, Glob], ...]
    effect: Effect
    exchange: Glob = EVERYTHING
    topic: Glob = EVERYTHING
    server: Glob | None = None
    namespace: Glob = EVERYTHING
    method: Glob = EVERYTHING

    @property
    def is_total(self) -> bool:
        """Whether it matches every target of its kinds (listening apart)."""
        patterns = (self.exchange, self.topic, self.namespace, self.method, self.server)
        return all(pattern is None or pattern.text == "*" for pattern in patterns)

    def server_for(self, kind: str) -> Glob:
        """The server's pattern for requests of this kind."""
        if self.server is not None:
            return self.server
        return _OWN_SERVER if kind == "listen" else EVERYTHING

    def mismatch(self, kind: str, facts: Facts, ask: Ask) -> Mismatch | None:
        """None if it matches.

        Args:
            kind: The ask's, as rules have it.
        """
        if kind not in self.kinds:
            return Mismatch("kind", kind, ",".join(sorted(self.kinds)))
        if not self.topic.matches(ask.topic):
            return Mismatch("topic", ask.topic, self.topic.text)
        if not self.exchange.matches(ask.exchange):
            return Mismatch("exchange", ask.exchange, self.exchange.text)
        server = self.server_for(kind)
        if not (ask.server == facts.uuid if server.text == SELF else server.matches(ask.server)):
            return Mismatch("server", ask.server, server.text)
        if not self.method.matches(ask.method):
            return Mismatch("method", ask.method, self.method.text)
        if not self.namespace.matches(ask.namespace):
            return Mismatch("namespace", ask.namespace, self.namespace.text)
        return None


_OWN_SERVER: Final = Glob(SELF)


@dataclass(frozen=True, slots=True, eq=False)
class LimitRule:
    """A `limit` line: these limits for these VMs."""

    where: str
    text: str
    who: tuple[tuple[str, Glob], ...]
    values: tuple[tuple[str, int], ...]


def who_mismatch(who: tuple[tuple[str, Glob], ...], facts: Facts) -> Mismatch | None:
    """None if this is one of those VMs."""
    for key, glob in who:
        value = getattr(facts, key)
        # Unknown is no name: `project:*` is any project, and not none.
        if not value or not glob.matches(value):
            return Mismatch(key, value, glob.text)
    return None


class Step(NamedTuple):
    """A rule that was looked at, and why it did not match; None for the one that did."""

    rule: Rule
    mismatch: Mismatch | None


class Explanation(NamedTuple):
    """How a verdict came about."""

    verdict: Verdict
    steps: tuple[Step, ...]


class Policy:
    """Rules in their order. Immutable.

    Args:
        problem: Set if the rules could not be read: then everything is denied for this reason.
    """

    def __init__(
        self, rules: Sequence[Rule] = (), limits: Sequence[LimitRule] = (), problem: str = ""
    ) -> None:
        self.rules = tuple(rules)
        self.limit_rules = tuple(limits)
        self.problem = problem
        self._by_vm: dict[Facts, tuple[tuple[Rule, ...], Limits]] = {}  # a memo, no state

    @classmethod
    def denying(cls, problem: str) -> Policy:
        """The policy of a host whose policy cannot be read."""
        return cls(problem=problem)

    def decide(self, facts: Facts, ask: Ask) -> Verdict:
        """What becomes of this request, and by which rule."""
        if self.problem:
            return Verdict(Effect.DENY, f"policy error: {self.problem}")
        if not (ask.exchange + ask.topic + ask.server).isprintable():
            return Verdict(Effect.DENY, UNPRINTABLE)
        if ask.exchange.endswith(FANOUT_SUFFIX) or ask.exchange.startswith(BROKER_PREFIX):
            return Verdict(Effect.DENY, EVERYBODYS)
        kind, ask = _normal(facts, ask)
        for rule in self._of(facts)[0]:
            if rule.mismatch(kind, facts, ask) is None:
                return Verdict(rule.effect, rule.where)
        return Verdict(Effect.DENY, DEFAULT)

    def explain(self, facts: Facts, ask: Ask) -> Explanation:
        """The same verdict, with every rule that was looked at on the way."""
        verdict = self.decide(facts, ask)
        kind, ask = _normal(facts, ask)
        steps = []
        for rule in self.rules:
            mismatch = who_mismatch(rule.who, facts) or rule.mismatch(kind, facts, ask)
            steps.append(Step(rule, mismatch))
            if mismatch is None:
                break
        return Explanation(verdict, tuple(steps))

    def limits(self, facts: Facts) -> Limits:
        """This VM's limits. For each, the first line that names it decides."""
        return self._of(facts)[1]

    def may_send(self, facts: Facts) -> bool:
        """Whether this VM may send any request at all: some rule lets it send some."""
        return self._may_any(facts, CONDUCTED | {Kind.HTTP})

    def may_speak(self, facts: Facts) -> bool:
        """Whether this VM may say anything at all: send a request, or answer one."""
        return self._may_any(facts, CONDUCTED | {Kind.HTTP, Kind.REPLY})

    def _may_any(self, facts: Facts, kinds: frozenset[str]) -> bool:
        left = set(kinds)
        for rule in () if self.problem else self._of(facts)[0]:
            if left.isdisjoint(rule.kinds):
                continue
            if rule.effect is not Effect.DENY:
                return True
            if rule.is_total:
                left -= rule.kinds
        return False

    def named_topics(self, facts: Facts) -> frozenset[tuple[str, str]]:
        """(exchange, topic) of what this VM may serve, as far as rules name it and have no pattern:
        what a VM is given that may not even say what it serves. Exchange "": any."""
        return frozenset(
            ("" if is_pattern(rule.exchange.text) else rule.exchange.text, rule.topic.text)
            for rule in (() if self.problem else self._of(facts)[0])
            if Kind.LISTEN in rule.kinds
            and rule.effect is Effect.ALLOW
            and not is_pattern(rule.topic.text)
        )

    def _of(self, facts: Facts) -> tuple[tuple[Rule, ...], Limits]:
        """What speaks of this VM: a guest asks often, and its facts stay the same."""
        known = self._by_vm.get(facts)
        if known is None:
            rules = tuple(rule for rule in self.rules if who_mismatch(rule.who, facts) is None)
            if len(self._by_vm) >= VMS_MAX:
                self._by_vm.clear()
            known = self._by_vm[facts] = (rules, self._make_limits(facts))
        return known

    def _make_limits(self, facts: Facts) -> Limits:
        values: dict[str, int] = {}
        for line in self.limit_rules:
            if who_mismatch(line.who, facts) is None:
                values = {**dict(line.values), **values}
        limits = Limits(**values)
        # What may be one message must fit what may have begun to arrive.
        return replace(limits, reassembly_bytes=max(limits.reassembly_bytes, limits.message_bytes))


def _normal(facts: Facts, ask: Ask) -> tuple[str, Ask]:
    """The word for its kind; and who listens without a server's name does so under its own."""
    if ask.kind is Kind.LISTEN and not ask.server:
        ask = ask._replace(server=facts.uuid)
    return (FANOUT if ask.fanout and ask.kind is Kind.CAST else ask.kind.value), ask


def make_facts(values: Mapping[str, str]) -> Facts:
    """Facts as an operator writes them.

    Raises:
        ConfigError: One is none.
    """
    for key in values:
        if key not in WHO_KEYS:
            raise ConfigError(f"{key}=", f"is no fact; expected {', '.join(WHO_KEYS)}")
    try:
        uuid = str(uuids.UUID(values.get("uuid", str(uuids.UUID(int=0)))))
    except ValueError as error:
        raise ConfigError(f"uuid={values['uuid']}", "is no UUID") from error
    return Facts(**{**values, "uuid": uuid})


def make_ask(kind: str, target: str, values: Mapping[str, str]) -> Ask:
    """A request as an operator writes it.

    Args:
        target: EXCHANGE/TOPIC.

    Raises:
        ConfigError: It is none.
    """
    exchange, slash, topic = target.partition("/")
    if kind not in KINDS:
        raise ConfigError(repr(kind), f"is no kind; expected {', '.join(KINDS)}")
    if not slash or not exchange or not topic:
        raise ConfigError(repr(target), "is no target; expected TOPIC or EXCHANGE/TOPIC")
    for key in values:
        if key not in TARGET_KEYS:
            raise ConfigError(f"{key}=", f"expected {', '.join(TARGET_KEYS)}")
    is_fanout = kind == FANOUT
    return Ask(Kind.CAST if is_fanout else Kind(kind), exchange, topic, **values, fanout=is_fanout)


# --- the language ---------------------------------------------------------------------------


def parse(files: Sequence[tuple[str, str]]) -> Policy:
    """Read policy files.

    Args:
        files: (path, text) in their order.

    Raises:
        PolicyError: The first error. Nothing of the policy is of use then.
    """
    if len(files) > FILES_MAX:
        raise PolicyError(files[FILES_MAX][0], 1, f"over {FILES_MAX} files (FILES_MAX)")
    rules: list[Rule] = []
    limits: list[LimitRule] = []
    for path, text in files:
        for line in _lines(path, text):
            if line.words[0] == "limit":
                limits.append(_parse_limit(line))
            else:
                rules += _parse_mode(line) if line.words[0] == "mode" else [_parse_rule(line)]
            if len(rules) + len(limits) > RULES_MAX:
                raise line.error(f"over {RULES_MAX} rules (RULES_MAX)")
    return Policy(rules, limits)


class _Line:
    """A line that is neither empty nor a comment, taken apart from the left."""

    def __init__(self, path: str, number: int, words: list[str]) -> None:
        self.path = path
        self.number = number
        self.words = words
        self.at = 1

    @property
    def where(self) -> str:
        return f"{self.path}:{self.number}"

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def error(self, expected: str) -> PolicyError:
        return PolicyError(self.path, self.number, expected)

    def peek(self) -> str | None:
        """The next word; None at the end."""
        return self.words[self.at] if self.at < len(self.words) else None

    def next(self, expected: str) -> str:
        word = self.peek()
        if word is None:
            raise self.error(f"the line ends; expected {expected}")
        self.at += 1
        return word

    def end(self, expected: str) -> None:
        word = self.peek()
        if word is not None:
            raise self.error(f"{word!r} is too much; expected {expected}")


def _lines(path: str, text: str) -> Iterator[_Line]:
    if len(text) > FILE_CHARS_MAX:
        raise PolicyError(path, 1, f"over {FILE_CHARS_MAX} characters (FILE_CHARS_MAX)")
    for number, content in enumerate(text.split("\n"), 1):
        words = content.replace("\t", " ").split(" ")
        line = _Line(path, number, [word for word in words if word])
        if len(content) > LINE_CHARS_MAX:
            raise line.error(f"over {LINE_CHARS_MAX} characters (LINE_CHARS_MAX)")
        if not line.words or line.words[0].startswith("#"):
            continue
        # What cannot be seen must not decide: a no-break space, a direction mark.
        hidden = [character for character in "".join(line.words) if not character.isprintable()]
        if hidden:
            raise line.error(f"character {hidden[0]!a}; expected printable ones")
        if any(word.startswith("#") for word in line.words):
            raise line.error("a comment after a rule; expected it on a line of its own")
        yield line


def _parse_rule(line: _Line) -> Rule:
    kinds = _parse_kinds(line)
    who = _parse_who(line)
    target = _parse_target(line)
    word = line.next("allow, deny or conductor")
    if word not in {effect.value for effect in Effect}:
        raise line.error(
            f"{word!r}; expected allow, deny, conductor or {_keys(TARGET_KEYS, target)}"
        )
    line.end("nothing after the effect")
    if "any" not in line.words[0].split(","):
        _check_keys(line, kinds, target)
    if word == Effect.CONDUCTOR and not kinds <= CONDUCTED:
        raise line.error("only cast, fanout, call and notify can go to the conductor")
    return Rule(line.where, line.text, kinds, who, Effect(word), **target)


def _check_keys(line: _Line, kinds: frozenset[str], target: dict[str, Glob]) -> None:
    """A pattern that can never match, or never not match, is a mistake."""
    for kind in sorted(kinds & WITHOUT_METHOD):
        for key in ("namespace", "method"):
            if key in target:
                raise line.error(f"{key}: is for what has a method; expected none with {kind}")
    if "reply" in kinds and "server" in target:
        raise line.error("server: expected none with reply: a reply goes to who called")


def _parse_kinds(line: _Line) -> frozenset[str]:
    kinds: set[str] = set()
    for word in line.words[0].split(","):
        if word == "any":
            kinds.update(KINDS)
        elif word in KINDS:
            kinds.add(word)
        else:
            raise line.error(
                f"{word!r}; expected {', '.join(KINDS)}, any (several with commas and no "
                "spaces), mode or limit"
            )
    return frozenset(kinds)


def _parse_who(line: _Line) -> tuple[tuple[str, Glob], ...]:
    expected = "any or " + ", ".join(f"{key}:" for key in WHO_KEYS)
    first = line.next(f"who: {expected}")
    if first == "any":
        return ()
    line.at -= 1
    who = dict(_parse_keys(line, WHO_KEYS))
    if not who:
        raise line.error(f"{first!r} is nobody; expected who: {expected}")
    return tuple(who.items())


def _parse_target(line: _Line) -> dict[str, Glob]:
    """The fields of a Rule that say what it is about."""
    expected = "a target: any, TOPIC or EXCHANGE/TOPIC"
    word = line.next(expected)
    if ":" in word:
        raise line.error(
            f"{word!r} does not belong here; expected {expected}, after who: any or "
            f"{_keys(WHO_KEYS, {})} each at most once"
        )
    target = {}
    if word != "any":
        exchange, slash, topic = word.partition("/")
        if not slash:
            exchange, topic = "*", word
        if not exchange or not topic or "/" in topic:
            raise line.error(f"{word!r}; expected {expected}")
        target = {"exchange": _glob(line, exchange), "topic": _glob(line, topic)}
    return {**target, **dict(_parse_keys(line, TARGET_KEYS))}


def _parse_keys(line: _Line, keys: Sequence[str]) -> Iterator[tuple[str, Glob]]:
    """The KEY:GLOB words that come next."""
    seen: set[str] = set()
    while (word := line.peek()) is not None:
        key, colon, text = word.partition(":")
        if not colon or key not in keys:
            return
        if key in seen:
            raise line.error(f"{key}: comes twice; expected one pattern, or two rules")
        seen.add(key)
        line.at += 1
        yield key, _keyed_glob(line, key, text)


def _keyed_glob(line: _Line, key: str, text: str) -> Glob:
    if key == "uuid":
        try:
            return Glob(str(uuids.UUID(text)))
        except ValueError:
            raise line.error(f"{text!r} is no UUID; for a pattern use another key") from None
    if (key, text) in (("server", SELF), ("server", NONE), ("namespace", NONE)):
        return Glob(text)
    return _glob(line, text)


_BRACKETS: Final = re.compile(r"\[!?+\]?+[^\]]*+\]")
"""As fnmatch has them: a ] that comes first belongs to the set."""


def _glob(line: _Line, text: str) -> Glob:
    if not text:
        raise line.error("an empty pattern; expected a name, or * for any")
    if text.startswith("@"):
        words = f"server:{SELF}, server:{NONE} and namespace:{NONE}"
        raise line.error(f"{text!r}; the only words with an @ are {words}")
    if "[" in _BRACKETS.sub("", text):
        raise line.error(f"{text!r}; expected a ] to each [")
    return Glob(text)


def _keys(keys: Sequence[str], without: dict[str, Glob]) -> str:
    return ", ".join(f"{key}:" for key in keys if key not in without)


def _parse_mode(line: _Line) -> list[Rule]:
    """A preset, as the rules it stands for."""
    who = _parse_who(line)
    target = None if line.peek() in ONE_WAY else _parse_target(line)
    mode = line.next(f"one of {', '.join(MODES)}")
    if mode not in MODES:
        raise line.error(f"{mode!r}; expected one of {', '.join(MODES)}")
    if target is not None and mode in ONE_WAY:
        raise line.error(f"{mode} has no target: nothing is sent to any")
    line.end("nothing after the mode")

    def rule(kinds: str, effect: Effect, **target: Glob) -> Rule:
        return Rule(line.where, line.text, frozenset(kinds.split()), who, effect, **target)

    match mode:
        case "one-way-cast":
            return [rule("reply cast fanout call notify http", Effect.DENY)]
        case "one-way-call":
            return [
                rule("reply", Effect.ALLOW),
                rule("cast fanout call notify http", Effect.DENY),
            ]
        case "cast":
            return [
                rule("reply", Effect.ALLOW),
                rule("cast notify", Effect.ALLOW, **target or {}),
                rule("call", Effect.DENY),
            ]
        case _:
            return [
                rule("reply", Effect.ALLOW),
                rule("cast call notify", Effect.ALLOW, **target or {}),
            ]


def _parse_limit(line: _Line) -> LimitRule:
    who = _parse_who(line)
    values: dict[str, int] = {}
    word: str | None = line.next("NAME=VALUE")
    while word is not None:
        name, equals, text = word.partition("=")
        if not equals or name not in LIMITS:
            raise line.error(f"{word!r}; expected NAME=VALUE with one of {', '.join(LIMITS)}")
        if name in values:
            raise line.error(f"{name} comes twice; expected one value")
        values[name] = _limit_value(line, name, text)
        word = line.peek()
        line.at += 1
    return LimitRule(line.where, line.text, who, tuple(values.items()))


_VALUE: Final = re.compile("([0-9]{1,15})([KMG]?)")
_FACTORS: Final = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def _limit_value(line: _Line, name: str, text: str) -> int:
    info = LIMITS[name]
    match = _VALUE.fullmatch(text)
    if match is None or (match[2] and not info.is_bytes):
        kind = "a whole number, perhaps with K, M or G" if info.is_bytes else "a whole number"
        raise line.error(f"{name}={text}; expected {kind}")
    value = int(match[1]) * _FACTORS[match[2]]
    if not info.minimum <= value <= info.maximum:
        raise line.error(f"{name}={text}; expected {info.minimum} to {info.maximum}")
    return value
