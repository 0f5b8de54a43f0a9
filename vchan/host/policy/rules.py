"""What guests may do: what the rules of /etc/vchan/policy.d say of one request.

Rules of this file
1. No I/O, no clock, no logging. Rules come parsed (`rule_parser`), a guest's request as an `Ask`.
2. The first rule that matches decides. No rule: denied. Before them all: who owns a topic serves
   it, and nobody else does.
3. What a guest sends is data only: it is matched against the rules' globs and never parsed.
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
from vchan.host.policy.vm_limits import Limits

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


class Kind(StrEnum):
    """What a guest asks. A fanout is a cast with `Ask.fanout`."""

    LISTEN = "listen"
    REPLY = "reply"
    CAST = "cast"
    CALL = "call"
    NOTIFY = "notify"
    HTTP = "http"
    REPORT = "report"
    FORWARD = "forward"
    """Asked by a program on the host, and not by the guest: a byte stream to a target in it. The
    exchange is the target's kind (tcp, unix), the topic what is behind its colon."""


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
    labels: tuple[tuple[str, str], ...] = ()
    """(KIND:NAME, value) of LABEL_KINDS, as nova 32 and later write them."""

    def value(self, key: str) -> str:
        """By a key of a rule's."""
        if ":" not in key:
            return str(getattr(self, key))
        return next((value for label, value in self.labels if label == key), "")

    def named(self) -> dict[str, str]:
        """By WHO_KEYS: for others."""
        return {key: self.value(key) for key in WHO_KEYS}


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
ANY_KINDS: Final = ("listen", "reply", "cast", FANOUT, "call", "notify", "http", "report")
"""What the word `any` stands for: all that guests ask. Who wrote that has not said that programs on
the host may connect to what runs in guests."""
KINDS: Final = (*ANY_KINDS, "forward")
"""The words for kinds, as rules have them."""
FORWARD_KINDS: Final = ("tcp", "unix", "service")
"""Of a forward's targets: tcp:PORT, unix:/PATH, service:NAME."""
FORWARD_TARGETS: Final = "tcp:PORT, unix:/PATH or service:NAME"
WITHOUT_METHOD: Final = frozenset({"listen", "reply", "report"})
CONDUCTED: Final = frozenset({"cast", FANOUT, "call", "notify"})
"""What can be sent to the conductor in the target's place."""

WHO_KEYS: Final = ("uuid", "name", "project", "user", "flavor", "image")
EXTRA_SPEC: Final = "extra-spec"
PROPERTY: Final = "property"
LABEL_KINDS: Final = (EXTRA_SPEC, PROPERTY)
"""Of nova's metadata: extra specs are the flavor's, and so the operator's word; properties are the
image's, and any tenant may upload an image."""
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
    who: tuple[tuple[str, Glob], ...]
    values: tuple[tuple[str, int], ...]


def who_mismatch(who: tuple[tuple[str, Glob], ...], facts: Facts) -> Mismatch | None:
    """None if this is one of those VMs."""
    for key, glob in who:
        value = facts.value(key)
        # Unknown is no name: `project:*` is any project, and not none.
        if not value or not glob.matches(value):
            return Mismatch(key, value, glob.text)
    return None


OWN_UUID: Final = "{uuid}"
"""In an owned topic's name: the VM's own UUID."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnRule:
    """An `own` line: a topic that belongs to one VM alone.

    Attributes:
        topic: One name, or a name for each VM (OWN_UUID).
    """

    where: str
    text: str
    who: tuple[tuple[str, Glob], ...]
    exchange: str
    topic: str

    @property
    def is_for_many(self) -> bool:
        """Whether it gives each of several VMs a topic of its own."""
        return OWN_UUID in self.topic

    def names(self, exchange: str, topic: str) -> str | None:
        """The UUID in the topic's name ("": there is none in this line's); None: another topic."""
        if exchange != self.exchange:
            return None
        head, _, tail = self.topic.partition(OWN_UUID)
        if not self.is_for_many:
            return "" if topic == head else None
        is_alike = topic.startswith(head) and topic.endswith(tail)
        middle = topic[len(head) : len(topic) - len(tail)] if is_alike else ""
        return middle if _UUID.fullmatch(middle) else None


_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


INTO: Final = "in"
OUT_OF: Final = "out"
DIRECTIONS: Final = (INTO, OUT_OF)
"""Of a request's context: into a guest, and out of one."""


@dataclass(frozen=True, slots=True, eq=False)
class ContextRule:
    """A `context` line: keys that pass with requests for these targets, besides the options'.

    Attributes:
        keys: (key, characters that its value may have). Only what comes out of a guest has a limit.
    """

    where: str
    text: str
    direction: str
    who: tuple[tuple[str, Glob], ...]
    exchange: Glob
    topic: Glob
    keys: tuple[tuple[str, int], ...]

    def mismatch(self, facts: Facts, exchange: str, topic: str) -> Mismatch | None:
        """None if its keys pass with requests for this target."""
        if not self.exchange.matches(exchange):
            return Mismatch("exchange", exchange, self.exchange.text)
        if not self.topic.matches(topic):
            return Mismatch("topic", topic, self.topic.text)
        return who_mismatch(self.who, facts)


class Step(NamedTuple):
    """A line that was looked at, and why it did not match; None for one that did.

    An `own` line is looked at alone: it decides whether it matches or not.
    """

    rule: Rule | OwnRule | ContextRule
    mismatch: Mismatch | None


class Explanation(NamedTuple):
    """How a verdict came about, and what passes with the request.

    Attributes:
        contexts: The `context` lines of the request's direction; all that match count. None of a
            request that is denied.
        keys: What these let through, as `Policy.context_keys` has it.
    """

    verdict: Verdict
    steps: tuple[Step, ...]
    contexts: tuple[Step, ...] = ()
    keys: Mapping[str, int] = {}


class Policy:
    """Rules in their order. Immutable.

    Args:
        problem: Set if the rules could not be read: then everything is denied for this reason.
    """

    def __init__(
        self,
        rules: Sequence[Rule] = (),
        limits: Sequence[LimitRule] = (),
        problem: str = "",
        owns: Sequence[OwnRule] = (),
        contexts: Sequence[ContextRule] = (),
    ) -> None:
        self.context_rules = tuple(contexts)
        self.rules = tuple(rules)
        self.own_rules = tuple(owns)
        self._owned = {(own.exchange, own.topic): own for own in owns if not own.is_for_many}
        self._own_for_many = [own for own in owns if own.is_for_many]
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
        if kind == Kind.LISTEN and (own := self.own_rule(ask.exchange, ask.topic)) is not None:
            is_owner = _listener_mismatch(own, facts, ask) is None
            return Verdict(Effect.ALLOW if is_owner else Effect.DENY, own.where)
        for rule in self._of(facts)[0]:
            if rule.mismatch(kind, facts, ask) is None:
                return Verdict(rule.effect, rule.where)
        return Verdict(Effect.DENY, DEFAULT)

    def owns(self, facts: Facts, exchange: str, topic: str) -> bool:
        """Whether a topic is this VM's alone: also what is sent to no server of it is the VM's."""
        own = None if self.problem else self.own_rule(exchange, topic)
        return own is not None and _owner_mismatch(own, facts, exchange, topic) is None

    @property
    def asks_labels(self) -> bool:
        """Whether a line goes by what older releases of nova do not write."""
        lines = (self.rules, self.limit_rules, self.own_rules, self.context_rules)
        asked = [line.who for group in lines for line in group]
        return any(":" in key for who in asked for key, _ in who)

    def context_keys(
        self, facts: Facts, direction: str, exchange: str, topic: str
    ) -> Mapping[str, int]:
        """Keys of a context that pass with requests for this target, by word of `context` lines;
        and characters that their values may have."""
        keys: dict[str, int] = {}
        for rule in () if self.problem else self.context_rules:
            if rule.direction == direction and rule.mismatch(facts, exchange, topic) is None:
                for key, chars in rule.keys:
                    keys[key] = max(chars, keys.get(key, 0))
        return keys

    def own_rule(self, exchange: str, topic: str) -> OwnRule | None:
        """The line that gives a topic to somebody, and so decides who listens to it; one that names
        it goes first."""
        named = self._owned.get((exchange, topic))
        if named is not None:
            return named
        alike = (own for own in self._own_for_many if own.names(exchange, topic) is not None)
        return next(alike, None)

    def explain(self, facts: Facts, ask: Ask) -> Explanation:
        """The same verdict, with every line that was looked at on the way."""
        verdict = self.decide(facts, ask)
        kind, ask = _normal(facts, ask)
        steps = tuple(self._steps(kind, facts, ask))
        direction = INTO if kind == Kind.LISTEN else OUT_OF if kind in CONDUCTED else None
        if verdict.effect is Effect.DENY or direction is None:
            return Explanation(verdict, steps)
        contexts = tuple(
            Step(rule, rule.mismatch(facts, ask.exchange, ask.topic))
            for rule in self.context_rules
            if rule.direction == direction
        )
        keys = self.context_keys(facts, direction, ask.exchange, ask.topic)
        return Explanation(verdict, steps, contexts, keys)

    def _steps(self, kind: str, facts: Facts, ask: Ask) -> Iterator[Step]:
        """Up to the line that decides."""
        own = self.own_rule(ask.exchange, ask.topic) if kind == Kind.LISTEN else None
        if own is not None:
            yield Step(own, _listener_mismatch(own, facts, ask))
            return
        for rule in self.rules:
            mismatch = who_mismatch(rule.who, facts) or rule.mismatch(kind, facts, ask)
            yield Step(rule, mismatch)
            if mismatch is None:
                return

    def limits(self, facts: Facts) -> Limits:
        """This VM's limits. For each, the first line that names it decides."""
        return self._of(facts)[1]

    def may_send(self, facts: Facts) -> bool:
        """Whether this VM may send any request at all: some rule lets it send some."""
        return self._may_any(facts, CONDUCTED | {Kind.HTTP})

    def may_speak(self, facts: Facts) -> bool:
        """Whether this VM may say anything at all: send a request, answer one, report, or be
        forwarded to."""
        heard = {Kind.HTTP, Kind.REPLY, Kind.REPORT, Kind.FORWARD}
        return self._may_any(facts, CONDUCTED | heard)

    def may_report(self, facts: Facts) -> bool:
        """Whether this VM may tell the host anything of itself."""
        return self._may_any(facts, frozenset({Kind.REPORT}))

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
        owned = frozenset(
            (own.exchange, own.topic.replace(OWN_UUID, facts.uuid))
            for own in (() if self.problem else self.own_rules)
            if who_mismatch(own.who, facts) is None
        )
        return owned | frozenset(
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


def _owner_mismatch(own: OwnRule, facts: Facts, exchange: str, topic: str) -> Mismatch | None:
    """None if the topic is this VM's, which the line gives to somebody."""
    uuid = own.names(exchange, topic)
    if uuid not in ("", facts.uuid):
        return Mismatch("uuid", facts.uuid, uuid or "")
    return who_mismatch(own.who, facts)


def _listener_mismatch(own: OwnRule, facts: Facts, ask: Ask) -> Mismatch | None:
    """The same of who wants to listen: an owner does so under its own name alone."""
    if ask.server != facts.uuid:
        return Mismatch("server", ask.server, SELF)
    return _owner_mismatch(own, facts, ask.exchange, ask.topic)


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
    labels = tuple(
        (key, value) for key, value in values.items() if key.partition(":")[0] in LABEL_KINDS
    )
    values = {key: value for key, value in values.items() if (key, value) not in labels}
    for key in values:
        if key not in WHO_KEYS:
            expected = ", ".join((*WHO_KEYS, *(f"{kind}:NAME" for kind in LABEL_KINDS)))
            raise ConfigError(f"{key}=", f"is no fact; expected {expected}")
    try:
        uuid = str(uuids.UUID(values.get("uuid", str(uuids.UUID(int=0)))))
    except ValueError as error:
        raise ConfigError(f"uuid={values['uuid']}", "is no UUID") from error
    return Facts(**{**values, "uuid": uuid}, labels=labels)


def make_ask(kind: str, target: str, values: Mapping[str, str]) -> Ask:
    """A request as an operator writes it.

    Args:
        target: EXCHANGE/TOPIC.

    Raises:
        ConfigError: It is none.
    """
    if kind == Kind.FORWARD:
        return forward_ask(target, values)
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


def forward_ask(target: str, values: Mapping[str, str] | None = None) -> Ask:
    """A program's wish to be connected to something in a guest.

    Args:
        target: tcp:PORT, unix:/PATH or service:NAME.

    Raises:
        ConfigError: It is none.
    """
    kind, _, name = target.partition(":")
    if kind not in FORWARD_KINDS or not name:
        raise ConfigError(repr(target), f"is no target of forward; expected {FORWARD_TARGETS}")
    for key in values or ():
        raise ConfigError(f"{key}=", "a forward has none")
    return Ask(Kind.FORWARD, kind, name)
