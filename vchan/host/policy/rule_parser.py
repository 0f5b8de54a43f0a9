"""The language of the rules in /etc/vchan/policy.d: texts in, a `Policy` out.

Pure. A text that cannot be parsed whole is a `PolicyError`, and whoever has no other policy then
denies everything (`Policy.denying`).

    KIND[,KIND]  WHO...  TARGET...      allow | deny | conductor
    forward      WHO...  any | tcp:PORT | unix:/PATH | service:NAME  allow | deny
    mode         WHO...  [TARGET...]    one-way-cast | one-way-call | cast | call
    limit        WHO...                 NAME=VALUE...
    own          WHO...  EXCHANGE/TOPIC
    context      in | out  WHO...  EXCHANGE/TOPIC  KEY[=CHARACTERS]...

See docs/policy.md.
"""

from __future__ import annotations

import re
import uuid as uuids
from collections.abc import Iterator, Sequence
from typing import Final

from vchan.errors import ConfigError
from vchan.host.policy.guest_context import KEY, VALUE_CHARS_MAX, is_privileged
from vchan.host.policy.rules import (
    ANY_KINDS,
    CONDUCTED,
    DIRECTIONS,
    FANOUT_SUFFIX,
    FORWARD_KINDS,
    FORWARD_TARGETS,
    KINDS,
    LABEL_KINDS,
    MODES,
    NONE,
    ONE_WAY,
    OUT_OF,
    OWN_UUID,
    SELF,
    TARGET_KEYS,
    WHO_KEYS,
    WITHOUT_METHOD,
    ContextRule,
    Effect,
    Glob,
    Kind,
    LimitRule,
    OwnRule,
    Policy,
    Rule,
    is_pattern,
)
from vchan.host.policy.vm_limits import LIMITS

FILES_MAX: Final = 100
"""Files of the policy's directory. At it: the policy is refused."""
FILE_CHARS_MAX: Final = 1024 * 1024
"""One file: a thousand of the longest lines. At it: the policy is refused."""
LINE_CHARS_MAX: Final = 1000
"""One line: a rule with every key is shorter. At it: the policy is refused."""
RULES_MAX: Final = 2000
"""Rules in all files: so many that speak of one VM are looked through in 3 ms at worst. At it: the
policy is refused."""

OWNS_MAX: Final = 20_000
"""Topics that belong to one VM, in all files: as many as a cloud has VMs of one service. Each is
found by its name. At it: the policy is refused."""


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
    owns: dict[tuple[str, str], OwnRule] = {}
    contexts: list[ContextRule] = []
    for path, text in files:
        for line in _lines(path, text):
            if line.words[0] == "own":
                own = _parse_own(line)
                first = owns.setdefault((own.exchange, own.topic), own)
                if first is not own:
                    raise line.error(f"{own.exchange}/{own.topic} is owned at {first.where}")
                if len(owns) > OWNS_MAX:
                    raise line.error(f"over {OWNS_MAX} topics that are owned (OWNS_MAX)")
                continue
            if line.words[0] == "context":
                contexts.append(_parse_context(line))
            elif line.words[0] == "limit":
                limits.append(_parse_limit(line))
            else:
                rules += _parse_mode(line) if line.words[0] == "mode" else [_parse_rule(line)]
            if len(rules) + len(limits) + len(contexts) > RULES_MAX:
                raise line.error(f"over {RULES_MAX} rules (RULES_MAX)")
    return Policy(rules, limits, owns=list(owns.values()), contexts=contexts)


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
    if Kind.FORWARD in kinds:
        return _parse_forward(line, kinds, who)
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


def _parse_forward(line: _Line, kinds: frozenset[str], who: tuple[tuple[str, Glob], ...]) -> Rule:
    """Its targets are no topics, and it is a program on the host that asks."""
    if kinds != {Kind.FORWARD}:
        raise line.error("forward has targets of its own; expected it on a line of its own")
    expected = f"a target: any, {FORWARD_TARGETS}"
    word = line.next(expected)
    target = {}
    if word != "any":
        kind, _, name = word.partition(":")
        if kind not in FORWARD_KINDS or not name:
            raise line.error(f"{word!r}; expected {expected}")
        target = {"exchange": Glob(kind), "topic": _glob(line, name)}
    effect = line.next("allow or deny")
    if effect not in (Effect.ALLOW, Effect.DENY):
        raise line.error(f"{effect!r}; expected allow or deny")
    line.end("nothing after the effect")
    return Rule(line.where, line.text, kinds, who, Effect(effect), **target)


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
            kinds.update(ANY_KINDS)
        elif word in KINDS:
            kinds.add(word)
        else:
            raise line.error(
                f"{word!r}; expected {', '.join(KINDS)}, any (several with commas and no "
                "spaces), mode, limit, own or context"
            )
    return frozenset(kinds)


def _parse_who(line: _Line) -> tuple[tuple[str, Glob], ...]:
    expected = "any or " + ", ".join(f"{key}:" for key in (*WHO_KEYS, *LABEL_KINDS))
    first = line.next(f"who: {expected}")
    if first == "any":
        return ()
    line.at -= 1
    who = dict(_parse_keys(line, (*WHO_KEYS, *LABEL_KINDS)))
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
            f"{_keys((*WHO_KEYS, *LABEL_KINDS), {})} each at most once"
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
        if key in LABEL_KINDS:
            name, _, text = text.partition("=")
            if not name or not text:
                raise line.error(f"{word!r}; expected {key}:NAME=GLOB")
            key = f"{key}:{name}"
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
            return [rule("reply cast fanout call notify http report forward", Effect.DENY)]
        case "one-way-call":
            return [
                rule("reply", Effect.ALLOW),
                rule("cast fanout call notify http report forward", Effect.DENY),
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
    return LimitRule(line.where, who, tuple(values.items()))


def _parse_own(line: _Line) -> OwnRule:
    """One VM and one name; or a name for each VM, with its UUID."""
    who = _parse_who(line)
    expected = "EXCHANGE/TOPIC, one name, perhaps with {uuid}"
    word = line.next(expected)
    line.end("nothing after the topic")
    exchange, slash, topic = word.partition("/")
    plain = topic.replace(OWN_UUID, "", 1)
    if not slash or not exchange or not topic or is_pattern(word) or set("/:{}") & set(plain):
        raise line.error(f"{word!r}; expected {expected}")
    if topic.startswith(_OURS) or FANOUT_SUFFIX in topic:
        raise line.error(f"{topic!r} may be the name of a queue that serves others")
    if OWN_UUID not in topic and [key for key, _ in who] != ["uuid"]:
        raise line.error(f"a topic has one owner; expected uuid:UUID, or {OWN_UUID} in {topic!r}")
    return OwnRule(line.where, line.text, who, exchange, topic)


CONTEXT_CHARS_MAX: Final = 64 * 1024
"""Characters of a value of a guest's context, at an operator's word: a whole context in cipher text
has some thousand."""


def _parse_context(line: _Line) -> ContextRule:
    """What passes is named: no patterns, and no key that says who somebody is."""
    direction = line.next(f"one of {', '.join(DIRECTIONS)}")
    if direction not in DIRECTIONS:
        raise line.error(f"{direction!r}; expected one of {', '.join(DIRECTIONS)}")
    who = _parse_who(line)
    target = line.next("EXCHANGE/TOPIC")
    exchange, slash, topic = target.partition("/")
    if not slash or not exchange or not topic or set("/:") & set(topic):
        raise line.error(f"{target!r}; expected EXCHANGE/TOPIC")
    keys: dict[str, int] = {}
    word: str | None = line.next("KEY, or KEY=CHARACTERS")
    while word is not None:
        key, equals, text = word.partition("=")
        if not KEY.fullmatch(key) or key in keys:
            raise line.error(f"{word!r}; expected keys of small letters, digits, _ and -, once")
        if direction == OUT_OF and is_privileged(key):
            raise line.error(f"{key!r} says who somebody is: no guest may set it")
        keys[key] = _context_chars(line, direction, text) if equals else VALUE_CHARS_MAX
        word = line.peek()
        line.at += 1
    globs = (_glob(line, exchange), _glob(line, topic))
    return ContextRule(line.where, line.text, direction, who, *globs, tuple(keys.items()))


def _context_chars(line: _Line, direction: str, text: str) -> int:
    match = _VALUE.fullmatch(text)
    if direction != OUT_OF:
        raise line.error("a limit is for what comes out of a guest; expected the key alone")
    if match is None or not 1 <= int(match[1]) * _FACTORS[match[2]] <= CONTEXT_CHARS_MAX:
        raise line.error(f"{text!r}; expected 1 to {CONTEXT_CHARS_MAX} characters")
    return int(match[1]) * _FACTORS[match[2]]


_OURS: Final = "vchan_"
"""How queues begin that hosts make for themselves."""

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
