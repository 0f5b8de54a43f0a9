"""What is suspicious about a policy that parses: rules that never decide, and rules that say more
than was meant.

Rules of this file
1. Pure.
2. `shadowed` is never said of a rule that can decide. It is not said of every rule that cannot: of
   one that several earlier rules cover only together, for a kind, it is not.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import translate
from typing import Final, NamedTuple

from vchan.host.policy.rules import (
    CONDUCTED,
    INTO,
    NONE,
    PROPERTY,
    SELF,
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

STATES_MAX: Final = 20_000
"""Of comparing two patterns. Beyond, the one is taken not to cover the other."""

Who = tuple[tuple[str, Glob], ...]
_AnyRule = Rule | LimitRule | OwnRule | ContextRule


class Suspicion(NamedTuple):
    """`where` is FILE:LINE, or "" for the policy as a whole."""

    where: str
    code: str
    text: str


def lint(policy: Policy) -> list[Suspicion]:
    """Everything that is suspicious, in the policy's order."""
    lines: tuple[_AnyRule, ...] = (
        *policy.rules,
        *policy.limit_rules,
        *policy.own_rules,
        *policy.context_rules,
    )
    places = {line.where: at for at, line in enumerate(lines)}
    findings = [
        *_shadowed(policy.rules),
        *_shadowed_limits(policy.limit_rules),
        *_owned_already(policy),
        *_said_already(policy.context_rules),
        *_everything(policy.rules),
        *_services(policy.rules),
        *_everybody((*policy.limit_rules, *policy.own_rules, *policy.context_rules)),
        *_wide_contexts(policy.context_rules),
        *_unused_contexts(policy),
        *_odd_ids(lines),
        *_tenants_word(lines),
    ]
    findings.sort(key=lambda finding: places[finding.where])
    return [*findings, *_missing(policy)]


# --- shadowed rules -------------------------------------------------------------------------


def _shadowed(rules: Sequence[Rule]) -> Iterator[Suspicion]:
    """A mode's line is shadowed if all its rules are."""
    lines: dict[str, list[int]] = {}
    for at, rule in enumerate(rules):
        lines.setdefault(rule.where, []).append(at)
    for where, places in lines.items():
        before = rules[: places[0]]
        by: set[str] = set()
        if all(_is_covered(rules[at], before, by) for at in places):
            text = f"never decides: {', '.join(sorted(by))} came first for all it matches"
            yield Suspicion(where, "shadowed", text)


def _is_covered(rule: Rule, before: Sequence[Rule], by: set[str]) -> bool:
    for kind in rule.kinds:
        first = next((earlier for earlier in before if covers(earlier, rule, kind)), None)
        if first is None:
            return False
        by.add(first.where)
    return True


def covers(one: Rule, other: Rule, kind: str) -> bool:
    """Whether `one` matches every request of this kind that `other` matches."""
    return (
        kind in one.kinds
        and _who_covers(one.who, other.who)
        and includes(one.exchange.text, other.exchange.text)
        and includes(one.topic.text, other.topic.text)
        and includes(one.server_for(kind).text, other.server_for(kind).text)
        and includes(one.namespace.text, other.namespace.text)
        and includes(one.method.text, other.method.text)
    )


def _who_covers(one: Who, other: Who) -> bool:
    patterns = dict(other)
    return all(key in patterns and includes(glob.text, patterns[key].text) for key, glob in one)


def _shadowed_limits(lines: Sequence[LimitRule]) -> Iterator[Suspicion]:
    for at, line in enumerate(lines):
        before = [earlier for earlier in lines[:at] if _who_covers(earlier.who, line.who)]
        set_before = {name for earlier in before for name, _ in earlier.values}
        if set_before >= {name for name, _ in line.values}:
            by = ", ".join(earlier.where for earlier in before)
            yield Suspicion(line.where, "shadowed", f"never decides: {by} came first")


def _owned_already(policy: Policy) -> Iterator[Suspicion]:
    """Rules that say who may listen to a topic that belongs to somebody."""
    for rule in policy.rules:
        names = (rule.exchange.text, rule.topic.text)
        if rule.kinds == {"listen"} and not any(map(is_pattern, names)):
            own = policy.own_rule(*names)
            if own is not None:
                text = f"never decides: {own.where} says whose topic {'/'.join(names)} is"
                yield Suspicion(rule.where, "shadowed", text)


def _said_already(lines: Sequence[ContextRule]) -> Iterator[Suspicion]:
    """Lines of contexts that let nothing through that earlier ones do not."""
    for at, line in enumerate(lines):
        before = [earlier for earlier in lines[:at] if _context_covers(earlier, line)]
        passed: dict[str, int] = {}
        for earlier in before:
            for key, chars in earlier.keys:
                passed[key] = max(chars, passed.get(key, 0))
        if all(chars <= passed.get(key, 0) for key, chars in line.keys):
            by = ", ".join(earlier.where for earlier in before)
            yield Suspicion(line.where, "shadowed", f"lets nothing through that {by} does not")


def _context_covers(one: ContextRule, other: ContextRule) -> bool:
    return (
        one.direction == other.direction
        and _who_covers(one.who, other.who)
        and includes(one.exchange.text, other.exchange.text)
        and includes(one.topic.text, other.topic.text)
    )


# --- patterns -------------------------------------------------------------------------------


def includes(one: str, other: str) -> bool:
    """Whether the pattern `one` matches every name that `other` matches.

    Exact, but for pairs over STATES_MAX, and for server:@self, which only itself and patterns that
    match everything include.
    """
    if one in ("*", other):
        return True
    if SELF in (one, other):
        return one != SELF and includes(one, "*")
    return _Inclusion(
        _parse("" if one == NONE else one), _parse("" if other == NONE else other)
    ).holds()


_Test = Callable[[str], object]

_PIECE: Final = re.compile(r"\[!?+\]?+[^\]]*+\]|.", re.DOTALL)


def _parse(pattern: str) -> list[str]:
    """As pieces: `*`, or what matches one character."""
    return _PIECE.findall(pattern)


class _Inclusion:
    """Walks through `other` with every character that makes a difference to either pattern, and
    through `one` beside it, at all places at once."""

    def __init__(self, one: list[str], other: list[str]) -> None:
        self._one = one
        self._other = other
        self._alphabet = _alphabet([*one, *other])
        pieces = {*one, *other} - {"*"}
        self._tests = {piece: re.compile(translate(piece)).match for piece in pieces}

    def holds(self) -> bool:
        todo = deque((place, self._closure({0})) for place in _skip_stars(self._other, 0))
        seen = set(todo)
        while todo:
            place, ours = todo.popleft()
            if place == len(self._other) and len(self._one) not in ours:
                return False
            for pair in self._steps(place, ours):
                if pair not in seen:
                    if len(seen) >= STATES_MAX:
                        return False
                    seen.add(pair)
                    todo.append(pair)
        return True

    def _steps(self, place: int, ours: frozenset[int]) -> Iterator[tuple[int, frozenset[int]]]:
        if place == len(self._other):
            return
        for character in self._alphabet:
            after = self._step(self._other, place, character)
            if after is not None:
                moved = {self._step(self._one, at, character) for at in ours}
                ours_after = self._closure(at for at in moved if at is not None)
                for reached in _skip_stars(self._other, after):
                    yield reached, ours_after

    def _step(self, pieces: list[str], at: int, character: str) -> int | None:
        """Where this character leads from there; None if nowhere."""
        if at == len(pieces):
            return None
        if pieces[at] == "*":
            return at
        return at + 1 if self._tests[pieces[at]](character) else None

    def _closure(self, places: Iterable[int]) -> frozenset[int]:
        return frozenset(reached for at in places for reached in _skip_stars(self._one, at))


def _skip_stars(pieces: list[str], at: int) -> Iterator[int]:
    """This place, and those after the stars that follow it."""
    yield at
    while at < len(pieces) and pieces[at] == "*":
        at += 1
        yield at


def _alphabet(pieces: list[str]) -> list[str]:
    """One character of each set that the pieces tell apart: sets are made of ranges, whose ends
    stand in the pattern."""
    ends = {character for piece in pieces for character in piece}
    after = {chr(min(ord(character) + 1, 0x10FFFF)) for character in ends}
    return sorted(ends | after | {"\0"})


# --- the rest -------------------------------------------------------------------------------


def _everything(rules: Sequence[Rule]) -> Iterator[Suspicion]:
    for rule in rules:
        for word in rule.text.split():
            key, colon, pattern = word.partition(":")
            if colon and includes(pattern, "*"):
                yield Suspicion(rule.where, "everything", _matches_everything(key, rule.kinds))
        # To answer is no more than to be asked, and a report goes no further than this host.
        opened = sorted(rule.kinds - {"reply", "report"})
        is_open = includes(rule.topic.text, "*") and includes(rule.exchange.text, "*")
        if opened and is_open and rule.effect is not Effect.DENY:
            verb = "allows" if rule.effect is Effect.ALLOW else "conducts"
            which = "to every target" if opened == [Kind.FORWARD] else "on every topic"
            who = "" if rule.who else " for every VM"
            text = f"{verb} {', '.join(opened)} {which}{who}"
            yield Suspicion(rule.where, "everything", text)


_SERVICES: Final = {"exec": "programs", "files": "files", "shell": "a shell"}
"""The standard agent's, and what they are to the guest's owner."""


def _services(rules: Sequence[Rule]) -> Iterator[Suspicion]:
    """The standard agent's services that a forward's pattern lets in. Who names one means it, and
    what an earlier line decides for all VMs of this one's is not this one's."""
    forwards = [rule for rule in rules if Kind.FORWARD in rule.kinds]
    for at, rule in enumerate(forwards):
        is_named = not is_pattern(rule.topic.text)
        if rule.effect is not Effect.ALLOW or is_named or not rule.exchange.matches("service"):
            continue
        let_in = [
            name
            for name in sorted(_SERVICES)
            if rule.topic.matches(name)
            and not any(_decides_before(earlier, rule, name) for earlier in forwards[:at])
        ]
        if let_in:
            named = ", ".join(f"service:{name}" for name in let_in)
            what = ", ".join(_SERVICES[name] for name in let_in)
            text = f"includes {named}: {what} in the guest; if they are meant, name them"
            yield Suspicion(rule.where, "service", text)


def _decides_before(earlier: Rule, rule: Rule, service: str) -> bool:
    is_meant = earlier.exchange.matches("service") and earlier.topic.matches(service)
    return bool(is_meant) and _who_covers(earlier.who, rule.who)


def _everybody(lines: Iterable[LimitRule | OwnRule | ContextRule]) -> Iterator[Suspicion]:
    for line in lines:
        for key, glob in line.who:
            if includes(glob.text, "*") and ":" not in key:
                text = _matches_everything(key, frozenset())
                yield Suspicion(line.where, "everything", text)


_SECRETS: Final = ("token", "password", "secret")


def _wide_contexts(lines: Iterable[ContextRule]) -> Iterator[Suspicion]:
    """Keys that pass with everything, and keys that nobody's tenant should read."""
    for line in lines:
        keys = [key for key, _ in line.keys]
        if includes(line.exchange.text, "*") and includes(line.topic.text, "*"):
            way = "into guests" if line.direction == INTO else "out of guests"
            text = f"lets {', '.join(keys)} {way} with requests for every topic"
            yield Suspicion(line.where, "everything", text)
        secrets = [key for key in keys if any(word in key for word in _SECRETS)]
        if line.direction == INTO and secrets:
            text = f"{', '.join(secrets)}: what enters a guest its tenant can read"
            yield Suspicion(line.where, "secret", text)


def _unused_contexts(policy: Policy) -> Iterator[Suspicion]:
    """Of targets that no rule lets a guest serve, or send to."""
    for line in policy.context_rules:
        names = (line.exchange.text, line.topic.text)
        if any(map(is_pattern, names)):
            continue
        is_in = line.direction == INTO
        kinds = frozenset({"listen"}) if is_in else CONDUCTED
        is_used = (is_in and policy.own_rule(*names) is not None) or any(
            rule.effect is not Effect.DENY
            and not kinds.isdisjoint(rule.kinds)
            and rule.exchange.matches(names[0])
            and rule.topic.matches(names[1])
            for rule in policy.rules
        )
        if not is_used:
            what = "serve" if is_in else "send to"
            text = f"of no use: no rule lets a guest {what} {'/'.join(names)}"
            yield Suspicion(line.where, "missing", text)


def _matches_everything(key: str, kinds: frozenset[str]) -> str:
    if key == "server" and "listen" in kinds:
        return "server:* lets a VM listen under any name, other VMs' UUIDs among them"
    if key in ("server", "namespace", "method"):
        return f"{key}:* matches any, and none: leave it out"
    return f"{key}:* matches every VM whose {key} is known: if all are meant, write any"


_ID: Final = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ID_PATTERN: Final = re.compile(r"[-0-9a-f*?!\[\]]*")


_NARROW: Final = frozenset({"uuid", "name", "project", "user", "image"})
"""What a tenant who is not meant cannot have, whatever his image says."""


def _tenants_word(lines: Iterable[_AnyRule]) -> Iterator[Suspicion]:
    """Who is given something because of a property of the image's."""
    seen: set[tuple[str, str]] = set()
    for line in lines:
        keys = {key for key, _ in line.who}
        is_denied = isinstance(line, Rule) and line.effect is Effect.DENY
        if is_denied or not _NARROW.isdisjoint(keys):
            continue
        for key in sorted(key for key in keys if key.startswith(f"{PROPERTY}:")):
            if (line.where, key) not in seen:
                seen.add((line.where, key))
                text = f"{key} is what the image says, and any tenant may upload one that says it"
                yield Suspicion(line.where, "tenant", text)


def _odd_ids(rules: Iterable[_AnyRule]) -> Iterator[Suspicion]:
    """Ids that nova does not write: such a rule matches no VM."""
    seen: set[tuple[str, str]] = set()
    for rule in rules:
        for key, glob in rule.who:
            if key not in ("project", "user", "image") or (rule.where, key) in seen:
                continue
            seen.add((rule.where, key))
            is_odd = not (_ID.fullmatch(glob.text) or _is_id_pattern(glob.text))
            if is_odd:
                text = f"{key}:{glob.text} is no id as nova writes it: hexadecimal, lower case"
                yield Suspicion(rule.where, "id", text)
            elif key == "project" and "-" in glob.text and "[" not in glob.text:
                text = f"{key}:{glob.text}: keystone's project ids have no dashes"
                yield Suspicion(rule.where, "id", text)


def _is_id_pattern(text: str) -> bool:
    return any(c in text for c in "*?[") and _ID_PATTERN.fullmatch(text) is not None


def _missing(policy: Policy) -> Iterator[Suspicion]:
    allowed = {kind for rule in policy.rules if rule.effect is Effect.ALLOW for kind in rule.kinds}
    if policy.own_rules:
        allowed.add("listen")
    if "listen" not in allowed:
        yield Suspicion("", "missing", "no rule allows listen: no agent can serve a topic")
    elif "reply" not in allowed:
        text = "listen is allowed and reply is not: every call to an agent fails; casts arrive"
        yield Suspicion("", "missing", text)
