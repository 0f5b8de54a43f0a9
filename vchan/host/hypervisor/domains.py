"""Which domain's channel to connect to, and when it may be spoken on.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; what to do goes out as decisions.
2. There are two kinds of news. An *edge* (`Happened`) is a lifecycle event: it comes at once and in
   order, and says only that something happened. A *level* (`Changed`, `Resync`) is what libvirt
   says the domain is now. Edges make us quick, levels make us right: every edge is followed by a
   level, a level that an edge overtook is never delivered, and missed edges are made good by the
   next level.
3. Every reaction is a row of `_ON_EDGE` or `_ON_LEVEL`; what is ignored stands in `_IGNORED_EDGES`
   or `_IGNORED_LEVELS` with its reason. A test checks that the tables are complete.
4. The phase of a VM stands in its `Domain`, and nowhere else. Each change of it is a decision and a
   row of `_NEXT_PHASE`; the VM's channel reads it.

A domain's channel is in one of four phases:

    IDLE      there is no live channel
    ARRIVING  connected but silent: the domain is migrating in. Connecting later can wedge QEMU's
              guest-to-host direction; what is said now is lost if the migration fails
    SERVING   connected, the session runs
    LEAVING   connected but hushed: the guest has stopped here and goes on elsewhere. Still read:
              QEMU delivers what the guest wrote. If the migration fails, it is served again

    IDLE --Connect--> ARRIVING --Speak--> SERVING --Hush--> LEAVING --Release--> IDLE
                       |    |                |  ^             ^ |
                       |    +--Release-->    |  +----Speak----|-+
                       +-------------Hush----|----------------+
                                             +--Release-->

A domain in rescue is not served: nova runs another image under the server's UUID, and what is sent
to the server is not for that. A paused domain is served like a running one: what we write waits in
its socket, and an unconnected channel can wedge when the guest resumes. A reboot is invisible on
the channel and changes nothing.

    decisions = domains.receive(event, now_s=clock())
    decisions += domains.handle_timeout(now_s=clock())
    sleep_until(domains.next_timeout())
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vchan.host.hypervisor.domain_xml import DomainFacts, DomainState, Selection

__all__ = [
    "IN_RESCUE",
    "NO_CONTROLLER_CONFIGURED",
    "NO_CONTROLLER_NOVA",
    "NO_CONTROLLER_TRANSIENT",
    "NO_LABELS",
    "WILL_LOSE_CHANNEL",
    "Attach",
    "AttachDone",
    "Changed",
    "Connect",
    "Decision",
    "DetachDone",
    "Domain",
    "DomainEvent",
    "DomainFacts",
    "DomainState",
    "Domains",
    "Gone",
    "Happened",
    "Hush",
    "HypervisorLost",
    "Phase",
    "Rebooted",
    "Release",
    "Resync",
    "Selection",
    "Speak",
    "Unreadable",
    "Warn",
    "Why",
]

ATTACH_RETRY_MIN_S: Final = 5.0
"""A failed attach is tried again after so long: a domain that is busy (migrating, say) is free
within seconds."""
ATTACH_RETRY_MAX_S: Final = 300.0
"""It doubles up to this: a domain that cannot take a channel stays so for hours."""

NO_CONTROLLER_CONFIGURED = (
    "the running VM has no virtio-serial controller, so its channel cannot be plugged in: "
    "boot the VM once more (power it off and on; a reboot from inside is not enough): "
    "the channel is in its next-boot configuration"
)
NO_CONTROLLER_NOVA = (
    "the running VM has no virtio-serial controller, and nova writes its definition anew at each "
    "start: set hw_qemu_guest_agent=yes on images for new servers; for this one: stop it, "
    "nova-manage image_property set {uuid} --property hw_qemu_guest_agent=yes, start it"
)
WILL_LOSE_CHANNEL = (
    "at the next hard reboot, stop and start, or resize: nova's definition has no virtio-serial "
    "controller, and this one's is there only because vchan-host was quick"
)
NO_CONTROLLER_TRANSIENT = (
    "the running VM has no virtio-serial controller and no next-boot configuration: "
    "start it from XML that has the channel (see libvirt/README.md)"
)
IN_RESCUE = (
    "in rescue: another image runs in the server's place, and is not served; what is sent to the "
    "server waits until it is unrescued"
)


def no_controller(facts: DomainFacts, *, configured: bool) -> str:
    """Why a running VM's channel cannot be plugged in, and what helps.

    Args:
        configured: Its next-boot definition has the channel.
    """
    if facts.is_novas:
        return NO_CONTROLLER_NOVA.format(uuid=facts.uuid)
    return NO_CONTROLLER_CONFIGURED if configured else NO_CONTROLLER_TRANSIENT


NO_LABELS = (
    "nova has written no extra specs and image properties for rules to go by: it is older than "
    "release 32 (2025.2), or has not started the server since"
)


class DomainEvent(enum.Enum):
    """libvirt's lifecycle events, as far as they differ for us."""

    DEFINED = "defined"
    UNDEFINED = "undefined"
    STARTED = "started"
    STARTED_INCOMING = "started to receive a migration"
    SUSPENDED = "suspended"
    SUSPENDED_MIGRATED = "stopped to switch over to another host"
    SUSPENDED_POSTCOPY = "stopped for post-copy"
    RESUMED = "resumed"
    RESUMED_MIGRATED = "resumed after a migration"
    RESUMED_POSTCOPY = "resumed in post-copy"
    SHUTDOWN = "shutting down"
    STOPPED = "stopped"
    STOPPED_MIGRATED = "stopped: migrated"
    STOPPED_FAILED = "stopped: failed"
    STOPPED_SAVED = "stopped: saved"
    OTHER = "other"


# --- what comes in ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resync:
    """Every domain of this host: at connect, and when libvirtd has come back.

    Attributes:
        unreadable: Those that are there and could not be read.
    """

    domains: tuple[DomainFacts, ...]
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def uuids(self) -> frozenset[str]:
        """Of all that are there, read or not."""
        read = {facts.uuid for facts in self.domains}
        return frozenset(read | {unread.uuid for unread in self.unreadable})


@dataclass(frozen=True, slots=True)
class Changed:
    """What one domain is now."""

    facts: DomainFacts


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The domain is there, and what it is could not be read now: what was known of it holds. It is
    read again by and by.

    Attributes:
        channel_path: Of its channel's socket, where that is known all the same: it runs, and is the
            same start of its QEMU that was read before.
    """

    uuid: str
    name: str
    reason: str
    channel_path: str | None = None


@dataclass(frozen=True, slots=True)
class Happened:
    """A lifecycle event. A `Changed`, `Unreadable` or `Gone` for the same domain follows."""

    uuid: str
    name: str
    event: DomainEvent


@dataclass(frozen=True, slots=True)
class Gone:
    """libvirt does not know this domain any more: it said so, when it was asked for it."""

    uuid: str
    name: str


@dataclass(frozen=True, slots=True)
class Rebooted:
    """The guest was reset. Only a hint: several may come for one reboot, bytes from before it may
    still arrive, and the session learns it from the guest's new HELLO."""

    uuid: str


@dataclass(frozen=True, slots=True)
class HypervisorLost:
    """libvirtd cannot be reached. Channels go on without it; a Resync follows when it is back."""

    reason: str


@dataclass(frozen=True, slots=True)
class AttachDone:
    """An attach has ended. `live` and `config` say what this attempt added."""

    uuid: str
    live: bool
    config: bool
    problem: str | None


@dataclass(frozen=True, slots=True)
class DetachDone:
    """A detach, which an operator asked for, has ended."""

    uuid: str
    problem: str | None


HypervisorEvent = (
    Resync
    | Changed
    | Unreadable
    | Happened
    | Gone
    | Rebooted
    | HypervisorLost
    | AttachDone
    | DetachDone
)


# --- what goes out ----------------------------------------------------------------------------


class Why(enum.Enum):
    """Why a session is over."""

    MIGRATED = "migrated to another host"
    ARRIVAL_FAILED = "the migration to this host failed"
    STOPPED = "shut off"
    FAILED = "QEMU died"
    SAVED = "saved to disk"
    DETACHED = "the channel was detached"
    REPLACED = "the channel was replaced by another"
    GONE = "libvirt does not know the domain any more"


@dataclass(frozen=True, slots=True)
class Connect:
    """Connect to the channel's socket now, and stay connected until Release. Say nothing yet."""

    uuid: str
    path: str


@dataclass(frozen=True, slots=True)
class Speak:
    """Start the session; after a Hush: go on with it."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Hush:
    """Stop consuming and writing, keep reading. If the stream ends now, do not connect again."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Release:
    """The session is over: requeue what has no receipt, close. Without a Speak before it there is
    nothing to requeue."""

    uuid: str
    why: Why


@dataclass(frozen=True, slots=True)
class Attach:
    """Give the domain a channel; one AttachDone answers."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell the operator, once: this domain has no channel because of this."""

    uuid: str
    name: str
    problem: str


PhaseChange = Connect | Speak | Hush | Release
"""What changes a phase, and is carried out by the VM's connection."""
Decision = PhaseChange | Attach | Warn


# --- the machine ------------------------------------------------------------------------------


class Phase(enum.Enum):
    IDLE = "idle"
    ARRIVING = "arriving"
    SERVING = "serving"
    LEAVING = "leaving"


_NEXT_PHASE: dict[tuple[Phase, type[PhaseChange]], Phase] = {
    (Phase.IDLE, Connect): Phase.ARRIVING,
    (Phase.ARRIVING, Speak): Phase.SERVING,
    (Phase.ARRIVING, Hush): Phase.LEAVING,
    (Phase.ARRIVING, Release): Phase.IDLE,
    (Phase.SERVING, Hush): Phase.LEAVING,
    (Phase.SERVING, Release): Phase.IDLE,
    (Phase.LEAVING, Speak): Phase.SERVING,
    (Phase.LEAVING, Release): Phase.IDLE,
}

_CANNOT_BE: dict[tuple[Phase, type[PhaseChange]], str] = {
    **{
        (Phase.IDLE, change): "there is no channel to do it to" for change in (Speak, Hush, Release)
    },
    **{
        (phase, Connect): "it is connected: another path is released first"
        for phase in (Phase.ARRIVING, Phase.SERVING, Phase.LEAVING)
    },
    (Phase.SERVING, Speak): "it is spoken on",
    (Phase.LEAVING, Hush): "it is hushed",
}


class Situation(enum.Enum):
    """What facts amount to."""

    NO_CHANNEL = "no live channel"
    INCOMING = "migrating in"
    OUTGOING = "migrating out, stopped here"
    HERE = "here, running or paused"


@dataclass(slots=True)
class Domain:
    """What is known of one domain, and the phase of its channel. `Domains` alone changes it."""

    uuid: str
    facts: DomainFacts | None = None
    unread: Unreadable | None = None  # why `facts` are none, or old
    phase: Phase = Phase.IDLE
    path: str | None = None  # of the socket we are connected to; None exactly when IDLE
    # STARTED_INCOMING was seen and nothing since that ends it: the domain is not here yet, even if
    # this libvirt's job information does not say so.
    announced: bool = False
    attaching: bool = False
    attach_failures: int = 0
    attach_not_before_s: float = 0.0
    detached_by_operator: bool = False
    problem: str | None = None

    @property
    def known(self) -> DomainFacts:
        """Its facts, or as much of them as is known."""
        name = self.unread.name if self.unread is not None else self.uuid
        return self.facts or DomainFacts(self.uuid, name, DomainState.UNKNOWN)

    @property
    def trouble(self) -> str | None:
        """For operators: why it has no channel or could not be read; None if nothing is wrong."""
        return _unread_problem(self.unread) if self.unread is not None else self.problem

    @property
    def is_paused(self) -> bool:
        """Whether it stands still."""
        return self.facts is not None and self.facts.state is DomainState.PAUSED

    def change(self, change: PhaseChange) -> list[Decision]:
        """Go into the phase that the change leads to; returns the change, to be carried out."""
        self.phase = _NEXT_PHASE[self.phase, type(change)]
        if isinstance(change, Connect):
            self.path = change.path
        elif isinstance(change, Release):
            self.path = None
        assert (self.path is None) == (self.phase is Phase.IDLE), "a live channel has a path"
        return [change]


class Domains:
    """All domains of this host."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._domains: dict[str, Domain] = {}
        self._hypervisor_problem: str | None = "not connected to libvirtd yet"

    # --- reading ---

    @property
    def selection(self) -> Selection:
        """Which domains get a channel."""
        return self._selection

    @property
    def hypervisor_problem(self) -> str | None:
        """Why libvirtd cannot be reached; None while it can."""
        return self._hypervisor_problem

    def all(self) -> tuple[Domain, ...]:
        """Every domain libvirt has told of, in the order of their appearance."""
        return tuple(each for each in self._domains.values() if each.facts or each.unread)

    def domain(self, uuid: str) -> Domain:
        """One that was told of; it stays the same until libvirt forgets the domain."""
        return self._domains[uuid]

    # --- input ---

    def receive(self, event: HypervisorEvent, now_s: float) -> list[Decision]:
        """Take one event in, in the order the hypervisor posted them."""
        match event:
            case Resync():
                return self._on_resync(event, now_s)
            case Changed():
                return self._on_level(event.facts, now_s)
            case Unreadable():
                return self._on_unreadable(event)
            case Happened():
                return self._on_edge(event)
            case Gone():
                return self._on_gone(event.uuid)
            case Rebooted():
                return []  # the session hears of it from the guest
            case HypervisorLost():
                return self._on_lost(event)
            case AttachDone():
                return self._on_attach_done(event, now_s)
            case DetachDone():  # pragma: no branch - mypy knows that it is the last
                return self._on_detach_done(event)

    def next_timeout(self) -> float | None:
        """When `handle_timeout` wants to be called; None for never."""
        return min(
            (
                domain.attach_not_before_s
                for domain in self._domains.values()
                if self._needs_attach(domain)
            ),
            default=None,
        )

    def handle_timeout(self, now_s: float) -> list[Decision]:
        """Try attaches again that are due. Harmless when called early."""
        return [
            decision
            for domain in self._domains.values()
            if self._needs_attach(domain)
            for decision in self._reconcile(domain, now_s)
        ]

    # --- levels ---

    def _on_resync(self, event: Resync, now_s: float) -> list[Decision]:
        self._hypervisor_problem = None
        decisions: list[Decision] = []
        present = event.uuids
        for uuid in [uuid for uuid in self._domains if uuid not in present]:
            decisions += self._on_gone(uuid)
        for facts in event.domains:
            # What was announced before may have ended while nobody listened: only facts count.
            self._domain(facts.uuid).announced = False
            decisions += self._on_level(facts, now_s)
        for unread in event.unreadable:
            decisions += self._on_unreadable(unread)
        return decisions

    def _on_unreadable(self, event: Unreadable) -> list[Decision]:
        """No news: the phase, the path and the channel are what they were."""
        domain = self._domain(event.uuid)
        is_news = domain.unread is None or domain.unread.reason != event.reason
        domain.unread = event
        decisions: list[Decision] = []
        if is_news:
            decisions.append(Warn(event.uuid, event.name, _unread_problem(event)))
        if domain.phase is Phase.IDLE and event.channel_path is not None:
            decisions += domain.change(Connect(domain.uuid, event.channel_path))
            decisions += self._speak(domain)
        return decisions

    def _on_level(self, facts: DomainFacts, now_s: float) -> list[Decision]:
        domain = self._domain(facts.uuid)
        domain.facts, domain.unread = facts, None
        level = _level(facts, announced=domain.announced)
        decisions: list[Decision] = []
        if level is not Situation.NO_CHANNEL and domain.path not in (None, facts.served_path):
            # Another path is another QEMU: it was restarted, restored or reverted unseen.
            decisions += self._release(domain, Why.REPLACED)
        reaction = _ON_LEVEL.get((domain.phase, level))
        if reaction is not None:
            decisions += reaction(self, domain)
        decisions += self._reconcile(domain, now_s)
        return decisions

    def _connect(self, domain: Domain) -> list[Decision]:
        return domain.change(Connect(domain.uuid, _path_of(domain)))

    def _connect_hushed(self, domain: Domain) -> list[Decision]:
        # We came in the middle of its switching over. Should that fail, the guest resumes here,
        # and must not do so without anybody connected.
        return [*self._connect(domain), *self._hush(domain)]

    def _connect_and_speak(self, domain: Domain) -> list[Decision]:
        return [*self._connect(domain), *self._speak(domain)]

    def _release_unplugged(self, domain: Domain) -> list[Decision]:
        if domain.phase is Phase.LEAVING:
            return self._release(domain, Why.MIGRATED)
        if domain.phase is Phase.ARRIVING:
            return self._release(domain, Why.ARRIVAL_FAILED)
        active = domain.facts is not None and domain.facts.active
        return self._release(domain, Why.DETACHED if active else Why.STOPPED)

    # --- edges ---

    def _on_edge(self, event: Happened) -> list[Decision]:
        if event.event is DomainEvent.STARTED_INCOMING:
            domain = self._domain(event.uuid)
        elif event.uuid in self._domains:
            domain = self._domains[event.uuid]
        else:
            return []  # its facts follow
        if event.event in _ENDS_ANNOUNCEMENT:
            domain.announced = False
        reaction = _ON_EDGE.get((domain.phase, event.event))
        return reaction(self, domain) if reaction is not None else []

    def _announce(self, domain: Domain) -> list[Decision]:
        domain.announced = True
        return self._try_attach_soon(domain)

    def _try_attach_soon(self, domain: Domain) -> list[Decision]:
        # nova writes a domain's XML anew at every hard reboot, resize and migration.
        domain.attach_failures = 0
        domain.attach_not_before_s = 0.0
        return []

    def _speak(self, domain: Domain) -> list[Decision]:
        return domain.change(Speak(domain.uuid))

    def _hush(self, domain: Domain) -> list[Decision]:
        return domain.change(Hush(domain.uuid))

    # --- attaching ---

    def _needs_attach(self, domain: Domain) -> bool:
        """Whether an attach would add something and may be tried, now or later."""
        facts = domain.facts
        if facts is None or domain.attaching or domain.detached_by_operator:
            return False
        if domain.unread is not None:
            return False  # what is known of it may be old
        if facts.rescued:
            return False  # it is not served, and nova throws this definition away
        if domain.announced or facts.incoming or facts.outgoing:
            return False  # a domain takes no device while it migrates
        live = facts.active and facts.channel_path is None and facts.has_controller
        config = facts.persistent and not facts.configured
        return (live or config) and self._selection.matches(facts)

    def _reconcile(self, domain: Domain, now_s: float) -> list[Decision]:
        if self._needs_attach(domain):
            if now_s < domain.attach_not_before_s:
                return []
            domain.attaching = True
            return [Attach(domain.uuid)]
        if domain.attaching or domain.facts is None:
            return []
        return self._set_problem(domain, self._standing_problem(domain, domain.facts))

    def _standing_problem(self, domain: Domain, facts: DomainFacts) -> str | None:
        """What no attach can mend."""
        if facts.rescued:
            return IN_RESCUE if facts.active else None
        if not facts.active or facts.channel_path is not None or facts.has_controller:
            return None
        if domain.detached_by_operator or not self._selection.matches(facts):
            return None
        return no_controller(facts, configured=facts.configured)

    def _on_attach_done(self, event: AttachDone, now_s: float) -> list[Decision]:
        domain = self._domains.get(event.uuid)
        if domain is None:
            return []
        domain.attaching = False
        domain.detached_by_operator = False
        domain.attach_failures = 0 if event.live or event.config else domain.attach_failures + 1
        # Also after a success: until the facts show it, there is nothing new to try.
        domain.attach_not_before_s = now_s + _retry_delay_s(domain.attach_failures)
        return self._set_problem(domain, event.problem)

    def _on_detach_done(self, event: DetachDone) -> list[Decision]:
        domain = self._domains.get(event.uuid)
        if domain is None:
            return []
        # Until the operator attaches it again, or the domain leaves this host.
        domain.detached_by_operator = event.problem is None
        return self._set_problem(domain, event.problem)

    def _set_problem(self, domain: Domain, problem: str | None) -> list[Decision]:
        changed = problem != domain.problem
        domain.problem = problem
        if not changed or problem is None:
            return []
        name = domain.facts.name if domain.facts is not None else ""
        return [Warn(domain.uuid, name, problem)]

    # --- the rest ---

    def _domain(self, uuid: str) -> Domain:
        return self._domains.setdefault(uuid, Domain(uuid))

    def _on_gone(self, uuid: str) -> list[Decision]:
        domain = self._domains.pop(uuid, None)
        if domain is None or domain.phase is Phase.IDLE:
            return []
        why = {Phase.LEAVING: Why.MIGRATED, Phase.ARRIVING: Why.ARRIVAL_FAILED}
        return self._release(domain, why.get(domain.phase, Why.GONE))

    def _on_lost(self, event: HypervisorLost) -> list[Decision]:
        # The channels are QEMU's and go on. libvirtd cannot finish a migration while it is away.
        self._hypervisor_problem = event.reason
        return []

    def _release(self, domain: Domain, why: Why) -> list[Decision]:
        return domain.change(Release(domain.uuid, why))


def _path_of(domain: Domain) -> str:
    assert domain.facts is not None and domain.facts.served_path is not None
    return domain.facts.served_path


def _unread_problem(unread: Unreadable) -> str:
    return f"libvirt has this domain, and it could not be read: {unread.reason}"


def _level(facts: DomainFacts, *, announced: bool) -> Situation:
    if not facts.active or facts.served_path is None:
        return Situation.NO_CHANNEL
    if facts.incoming or (announced and facts.state is DomainState.PAUSED):
        return Situation.INCOMING
    return Situation.OUTGOING if facts.outgoing else Situation.HERE


def _retry_delay_s(failures: int) -> float:
    doublings = min(max(failures - 1, 0), 10)
    return min(ATTACH_RETRY_MIN_S * float(2**doublings), ATTACH_RETRY_MAX_S)


_Reaction = Callable[[Domains, Domain], list[Decision]]

_STOPPED = {
    DomainEvent.STOPPED: Why.STOPPED,
    DomainEvent.STOPPED_MIGRATED: Why.MIGRATED,
    DomainEvent.STOPPED_FAILED: Why.FAILED,
    DomainEvent.STOPPED_SAVED: Why.SAVED,
}


def _releases(why: Why) -> _Reaction:
    return lambda _, domain: domain.change(Release(domain.uuid, why))


_ON_LEVEL: dict[tuple[Phase, Situation], _Reaction] = {
    (Phase.IDLE, Situation.INCOMING): Domains._connect,
    (Phase.IDLE, Situation.OUTGOING): Domains._connect_hushed,
    (Phase.IDLE, Situation.HERE): Domains._connect_and_speak,
    (Phase.ARRIVING, Situation.NO_CHANNEL): Domains._release_unplugged,
    (Phase.ARRIVING, Situation.OUTGOING): Domains._hush,
    (Phase.ARRIVING, Situation.HERE): Domains._speak,
    (Phase.SERVING, Situation.NO_CHANNEL): Domains._release_unplugged,
    (Phase.SERVING, Situation.OUTGOING): Domains._hush,
    (Phase.LEAVING, Situation.NO_CHANNEL): Domains._release_unplugged,
    (Phase.LEAVING, Situation.HERE): Domains._speak,
}

_IGNORED_LEVELS: dict[tuple[Phase, Situation], str] = {
    (Phase.IDLE, Situation.NO_CHANNEL): "nothing to connect to",
    (Phase.ARRIVING, Situation.INCOMING): "as it should be",
    (
        Phase.SERVING,
        Situation.INCOMING,
    ): "what was said cannot be unsaid; the next level settles it",
    (Phase.SERVING, Situation.HERE): "as it should be",
    (Phase.LEAVING, Situation.INCOMING): "silent already",
    (Phase.LEAVING, Situation.OUTGOING): "as it should be",
}

# STARTED_INCOMING is over when the domain runs, is left paused on purpose, or has failed.
_ENDS_ANNOUNCEMENT = frozenset(
    {
        DomainEvent.STARTED,
        DomainEvent.SUSPENDED,
        DomainEvent.RESUMED,
        DomainEvent.RESUMED_MIGRATED,
        DomainEvent.RESUMED_POSTCOPY,
        *_STOPPED,
    }
)

_ON_EDGE: dict[tuple[Phase, DomainEvent], _Reaction] = {
    **{(phase, DomainEvent.DEFINED): Domains._try_attach_soon for phase in Phase},
    **{(phase, DomainEvent.STARTED): Domains._try_attach_soon for phase in Phase},
    (Phase.IDLE, DomainEvent.STARTED_INCOMING): Domains._announce,
    (Phase.ARRIVING, DomainEvent.STARTED_INCOMING): Domains._announce,
    (Phase.ARRIVING, DomainEvent.RESUMED): Domains._speak,
    (Phase.ARRIVING, DomainEvent.RESUMED_MIGRATED): Domains._speak,
    (Phase.ARRIVING, DomainEvent.RESUMED_POSTCOPY): Domains._speak,
    **{(Phase.ARRIVING, stopped): _releases(Why.ARRIVAL_FAILED) for stopped in _STOPPED},
    (Phase.SERVING, DomainEvent.SUSPENDED_MIGRATED): Domains._hush,
    (Phase.LEAVING, DomainEvent.RESUMED): Domains._speak,
    (Phase.LEAVING, DomainEvent.RESUMED_MIGRATED): Domains._speak,
    **{
        (phase, stopped): _releases(why)
        for phase in (Phase.SERVING, Phase.LEAVING)
        for stopped, why in _STOPPED.items()
    },
}

_FACTS_FOLLOW = "it changes nothing by itself; the facts that follow say what is so"
_NOTHING_HERE = "there is no live channel; facts with its path come first"

_IGNORED_EDGES: dict[tuple[Phase, DomainEvent], str] = {
    **{(phase, DomainEvent.OTHER): _FACTS_FOLLOW for phase in Phase},
    **{
        (phase, DomainEvent.UNDEFINED): "a running domain outlives its definition"
        for phase in Phase
    },
    **{
        (phase, DomainEvent.SHUTDOWN): "QEMU still delivers what the guest wrote until STOPPED"
        for phase in Phase
    },
    **{
        (phase, DomainEvent.SUSPENDED): "a paused domain is served; if it is a migration that "
        "ends paused, the facts that follow are no longer incoming"
        for phase in Phase
    },
    **{
        (phase, DomainEvent.SUSPENDED_POSTCOPY): "SUSPENDED_MIGRATED came before it at the source; "
        "at the destination it is a failure that facts describe"
        for phase in Phase
    },
    **{
        (Phase.IDLE, event): _NOTHING_HERE
        for event in (
            DomainEvent.RESUMED,
            DomainEvent.RESUMED_MIGRATED,
            DomainEvent.RESUMED_POSTCOPY,
            DomainEvent.SUSPENDED_MIGRATED,
            *_STOPPED,
        )
    },
    (Phase.ARRIVING, DomainEvent.SUSPENDED_MIGRATED): "it cannot leave before it has arrived",
    (Phase.SERVING, DomainEvent.STARTED_INCOMING): "late news: it is here already",
    (Phase.SERVING, DomainEvent.RESUMED): "served while it was paused, too",
    (Phase.SERVING, DomainEvent.RESUMED_MIGRATED): "late news: it is served already",
    (Phase.SERVING, DomainEvent.RESUMED_POSTCOPY): "late news: it is served already",
    (Phase.LEAVING, DomainEvent.STARTED_INCOMING): "a domain does not arrive where it still is",
    (Phase.LEAVING, DomainEvent.SUSPENDED_MIGRATED): "hushed already",
    (Phase.LEAVING, DomainEvent.RESUMED_POSTCOPY): "that is said of the other host's copy",
}
