"""Which domain's channel to connect to, and when it may be spoken on.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; what to do goes out as effects.
2. There are two kinds of news. An *edge* (`Happened`) is a lifecycle event: it comes at once and in
   order, and says only that something happened. A *level* (`Changed`, `Resync`) is what libvirt
   says the domain is now. Edges make us quick, levels make us right: every edge is followed by a
   level, a level that an edge overtook is never delivered, and missed edges are made good by the
   next level.
3. Every reaction is a row of `_ON_EDGE` or `_ON_LEVEL`; what is ignored stands in `_IGNORED_EDGES`
   or `_IGNORED_LEVELS` with its reason. A test checks that the tables are complete.

A domain's channel is in one of four phases:

    IDLE      there is no live channel
    ARRIVING  connected but silent: the domain is migrating in. Connecting later can wedge QEMU's
              guest-to-host direction; what is said now is lost if the migration fails
    SERVING   connected, the session runs
    LEAVING   connected but hushed: the guest has stopped here and goes on elsewhere. Still read:
              QEMU delivers what the guest wrote. If the migration fails, it is served again

    IDLE --Connect--> ARRIVING --Speak--> SERVING --Hush--> LEAVING --Release--> IDLE
      |                   |                ^  |  ^             |
      |                   +--Release-->    |  |  +---Speak-----+
      +-----------Connect, Speak-----------+  +--Release-->

A paused domain is served like a running one: what we write waits in its socket, and an unconnected
channel can wedge when the guest resumes. A reboot is invisible on the channel and changes nothing.

    effects = domains.receive(event, now_s=clock())
    effects += domains.handle_timeout(now_s=clock())
    sleep_until(domains.next_timeout())
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from vchan.host.domain_xml import DomainFacts, DomainState, Selection

__all__ = [
    "NO_CONTROLLER_CONFIGURED",
    "NO_CONTROLLER_TRANSIENT",
    "Attach",
    "AttachDone",
    "Changed",
    "Connect",
    "DetachDone",
    "DomainEvent",
    "DomainFacts",
    "DomainReport",
    "DomainState",
    "Domains",
    "Effect",
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
    "Warn",
    "Why",
]

# A failed attach is tried again after this long, doubling up to the maximum: a domain that is busy
# (migrating, say) is free within seconds, one that cannot take a channel stays so for hours.
ATTACH_RETRY_MIN_S = 5.0
ATTACH_RETRY_MAX_S = 300.0

NO_CONTROLLER_CONFIGURED = (
    "the running VM has no virtio-serial controller, so its channel cannot be plugged in: "
    "boot the VM once more (power it off and on; a reboot from inside is not enough): "
    "the channel is in its next-boot configuration"
)
NO_CONTROLLER_TRANSIENT = (
    "the running VM has no virtio-serial controller and no next-boot configuration: "
    "start it from XML that has the channel (see libvirt/README.md)"
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
    """Every domain of this host: at connect, and when libvirtd has come back."""

    domains: tuple[DomainFacts, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """What one domain is now."""

    facts: DomainFacts


@dataclass(frozen=True, slots=True)
class Happened:
    """A lifecycle event. A `Changed` or `Gone` for the same domain follows."""

    uuid: str
    name: str
    event: DomainEvent


@dataclass(frozen=True, slots=True)
class Gone:
    """libvirt does not know this domain any more."""

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
    Resync | Changed | Happened | Gone | Rebooted | HypervisorLost | AttachDone | DetachDone
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


Effect = Connect | Speak | Hush | Release | Attach | Warn


# --- the machine ------------------------------------------------------------------------------


class Phase(enum.Enum):
    IDLE = "idle"
    ARRIVING = "arriving"
    SERVING = "serving"
    LEAVING = "leaving"


class Level(enum.Enum):
    """What facts amount to."""

    NO_CHANNEL = "no live channel"
    INCOMING = "migrating in"
    OUTGOING = "migrating out, stopped here"
    HERE = "here, running or paused"


@dataclass(frozen=True, slots=True)
class DomainReport:
    """One domain, for operators. `problem` is why it has no channel, None if nothing is wrong."""

    facts: DomainFacts
    phase: Phase
    problem: str | None


@dataclass(slots=True)
class _Domain:
    uuid: str
    facts: DomainFacts | None = None
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


class Domains:
    """All domains of this host."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._domains: dict[str, _Domain] = {}
        self._hypervisor_problem: str | None = "not connected to libvirtd yet"

    # --- reading ---

    @property
    def hypervisor_problem(self) -> str | None:
        """Why libvirtd cannot be reached; None while it can."""
        return self._hypervisor_problem

    def reports(self) -> tuple[DomainReport, ...]:
        """Every domain libvirt has described, in the order of their appearance."""
        return tuple(
            DomainReport(domain.facts, domain.phase, domain.problem)
            for domain in self._domains.values()
            if domain.facts is not None
        )

    def report(self, uuid: str) -> DomainReport | None:
        domain = self._domains.get(uuid)
        if domain is None or domain.facts is None:
            return None
        return DomainReport(domain.facts, domain.phase, domain.problem)

    # --- input ---

    def receive(self, event: HypervisorEvent, now_s: float) -> list[Effect]:
        """Take one event in, in the order the hypervisor posted them."""
        match event:
            case Resync():
                return self._on_resync(event, now_s)
            case Changed():
                return self._on_level(event.facts, now_s)
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

    def select(self, selection: Selection, now_s: float) -> list[Effect]:
        """Use another selection from now on. Channels that exist stay."""
        self._selection = selection
        return [
            effect for domain in self._domains.values() for effect in self._reconcile(domain, now_s)
        ]

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

    def handle_timeout(self, now_s: float) -> list[Effect]:
        """Try attaches again that are due. Harmless when called early."""
        return [
            effect
            for domain in self._domains.values()
            if self._needs_attach(domain)
            for effect in self._reconcile(domain, now_s)
        ]

    # --- levels ---

    def _on_resync(self, event: Resync, now_s: float) -> list[Effect]:
        self._hypervisor_problem = None
        effects: list[Effect] = []
        present = {facts.uuid for facts in event.domains}
        for uuid in [uuid for uuid in self._domains if uuid not in present]:
            effects += self._on_gone(uuid)
        for facts in event.domains:
            # What was announced before may have ended while nobody listened: only facts count.
            self._domain(facts.uuid).announced = False
            effects += self._on_level(facts, now_s)
        return effects

    def _on_level(self, facts: DomainFacts, now_s: float) -> list[Effect]:
        domain = self._domain(facts.uuid)
        domain.facts = facts
        level = _level(facts, announced=domain.announced)
        effects: list[Effect] = []
        if level is not Level.NO_CHANNEL and domain.path not in (None, facts.channel_path):
            # Another path is another QEMU: it was restarted, restored or reverted unseen.
            effects += self._release(domain, Why.REPLACED)
        reaction = _ON_LEVEL.get((domain.phase, level))
        if reaction is not None:
            effects += reaction(self, domain)
        effects += self._reconcile(domain, now_s)
        return effects

    def _connect_silently(self, domain: _Domain) -> list[Effect]:
        return self._connect(domain, Phase.ARRIVING)

    def _connect_hushed(self, domain: _Domain) -> list[Effect]:
        # We came in the middle of its switching over. Should that fail, the guest resumes here,
        # and must not do so without anybody connected.
        return self._connect(domain, Phase.LEAVING)

    def _connect_and_speak(self, domain: _Domain) -> list[Effect]:
        return [*self._connect(domain, Phase.ARRIVING), *self._speak(domain)]

    def _connect(self, domain: _Domain, phase: Phase) -> list[Effect]:
        assert domain.phase is Phase.IDLE
        assert domain.facts is not None
        assert domain.facts.channel_path is not None
        domain.phase = phase
        domain.path = domain.facts.channel_path
        return [Connect(domain.uuid, domain.path)]

    def _leave_unspoken(self, domain: _Domain) -> list[Effect]:
        domain.phase = Phase.LEAVING
        return []

    def _release_unplugged(self, domain: _Domain) -> list[Effect]:
        if domain.phase is Phase.LEAVING:
            return self._release(domain, Why.MIGRATED)
        if domain.phase is Phase.ARRIVING:
            return self._release(domain, Why.ARRIVAL_FAILED)
        active = domain.facts is not None and domain.facts.active
        return self._release(domain, Why.DETACHED if active else Why.STOPPED)

    # --- edges ---

    def _on_edge(self, event: Happened) -> list[Effect]:
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

    def _announce(self, domain: _Domain) -> list[Effect]:
        domain.announced = True
        return self._try_attach_soon(domain)

    def _try_attach_soon(self, domain: _Domain) -> list[Effect]:
        # nova writes a domain's XML anew at every hard reboot, resize and migration.
        domain.attach_failures = 0
        domain.attach_not_before_s = 0.0
        return []

    def _speak(self, domain: _Domain) -> list[Effect]:
        assert domain.phase in (Phase.ARRIVING, Phase.LEAVING)
        domain.phase = Phase.SERVING
        return [Speak(domain.uuid)]

    def _hush(self, domain: _Domain) -> list[Effect]:
        assert domain.phase is Phase.SERVING
        domain.phase = Phase.LEAVING
        return [Hush(domain.uuid)]

    def _release_arrival(self, domain: _Domain) -> list[Effect]:
        return self._release(domain, Why.ARRIVAL_FAILED)

    def _release_stopped(self, domain: _Domain) -> list[Effect]:
        return self._release(domain, Why.STOPPED)

    def _release_migrated(self, domain: _Domain) -> list[Effect]:
        return self._release(domain, Why.MIGRATED)

    def _release_failed(self, domain: _Domain) -> list[Effect]:
        return self._release(domain, Why.FAILED)

    def _release_saved(self, domain: _Domain) -> list[Effect]:
        return self._release(domain, Why.SAVED)

    # --- attaching ---

    def _needs_attach(self, domain: _Domain) -> bool:
        """Whether an attach would add something and may be tried, now or later."""
        facts = domain.facts
        if facts is None or domain.attaching or domain.detached_by_operator:
            return False
        if domain.announced or facts.incoming or facts.outgoing:
            return False  # a domain takes no device while it migrates
        live = facts.active and facts.channel_path is None and facts.has_controller
        config = facts.persistent and not facts.configured
        return (live or config) and self._selection.matches(facts)

    def _reconcile(self, domain: _Domain, now_s: float) -> list[Effect]:
        if self._needs_attach(domain):
            if now_s < domain.attach_not_before_s:
                return []
            domain.attaching = True
            return [Attach(domain.uuid)]
        if domain.attaching or domain.facts is None:
            return []
        return self._set_problem(domain, self._standing_problem(domain, domain.facts))

    def _standing_problem(self, domain: _Domain, facts: DomainFacts) -> str | None:
        """What no attach can mend."""
        if not facts.active or facts.channel_path is not None or facts.has_controller:
            return None
        if domain.detached_by_operator or not self._selection.matches(facts):
            return None
        return NO_CONTROLLER_CONFIGURED if facts.configured else NO_CONTROLLER_TRANSIENT

    def _on_attach_done(self, event: AttachDone, now_s: float) -> list[Effect]:
        domain = self._domains.get(event.uuid)
        if domain is None:
            return []
        domain.attaching = False
        domain.detached_by_operator = False
        domain.attach_failures = 0 if event.live or event.config else domain.attach_failures + 1
        # Also after a success: until the facts show it, there is nothing new to try.
        domain.attach_not_before_s = now_s + _retry_delay_s(domain.attach_failures)
        return self._set_problem(domain, event.problem)

    def _on_detach_done(self, event: DetachDone) -> list[Effect]:
        domain = self._domains.get(event.uuid)
        if domain is None:
            return []
        # Until the operator attaches it again, or the domain leaves this host.
        domain.detached_by_operator = event.problem is None
        return self._set_problem(domain, event.problem)

    def _set_problem(self, domain: _Domain, problem: str | None) -> list[Effect]:
        changed = problem != domain.problem
        domain.problem = problem
        if not changed or problem is None:
            return []
        name = domain.facts.name if domain.facts is not None else ""
        return [Warn(domain.uuid, name, problem)]

    # --- the rest ---

    def _domain(self, uuid: str) -> _Domain:
        return self._domains.setdefault(uuid, _Domain(uuid))

    def _on_gone(self, uuid: str) -> list[Effect]:
        domain = self._domains.pop(uuid, None)
        if domain is None or domain.phase is Phase.IDLE:
            return []
        why = {Phase.LEAVING: Why.MIGRATED, Phase.ARRIVING: Why.ARRIVAL_FAILED}
        return self._release(domain, why.get(domain.phase, Why.GONE))

    def _on_lost(self, event: HypervisorLost) -> list[Effect]:
        # The channels are QEMU's and go on. libvirtd cannot finish a migration while it is away.
        self._hypervisor_problem = event.reason
        return []

    def _release(self, domain: _Domain, why: Why) -> list[Effect]:
        assert domain.phase is not Phase.IDLE
        domain.phase = Phase.IDLE
        domain.path = None
        return [Release(domain.uuid, why)]


def _level(facts: DomainFacts, *, announced: bool) -> Level:
    if not facts.active or facts.channel_path is None:
        return Level.NO_CHANNEL
    if facts.incoming or (announced and facts.state is DomainState.PAUSED):
        return Level.INCOMING
    return Level.OUTGOING if facts.outgoing else Level.HERE


def _retry_delay_s(failures: int) -> float:
    doublings = min(max(failures - 1, 0), 10)
    return min(ATTACH_RETRY_MIN_S * float(2**doublings), ATTACH_RETRY_MAX_S)


_Reaction = Callable[[Domains, _Domain], list[Effect]]

_ON_LEVEL: dict[tuple[Phase, Level], _Reaction] = {
    (Phase.IDLE, Level.INCOMING): Domains._connect_silently,
    (Phase.IDLE, Level.OUTGOING): Domains._connect_hushed,
    (Phase.IDLE, Level.HERE): Domains._connect_and_speak,
    (Phase.ARRIVING, Level.NO_CHANNEL): Domains._release_unplugged,
    (Phase.ARRIVING, Level.OUTGOING): Domains._leave_unspoken,
    (Phase.ARRIVING, Level.HERE): Domains._speak,
    (Phase.SERVING, Level.NO_CHANNEL): Domains._release_unplugged,
    (Phase.SERVING, Level.OUTGOING): Domains._hush,
    (Phase.LEAVING, Level.NO_CHANNEL): Domains._release_unplugged,
    (Phase.LEAVING, Level.HERE): Domains._speak,
}

_IGNORED_LEVELS: dict[tuple[Phase, Level], str] = {
    (Phase.IDLE, Level.NO_CHANNEL): "nothing to connect to",
    (Phase.ARRIVING, Level.INCOMING): "as it should be",
    (Phase.SERVING, Level.INCOMING): "what was said cannot be unsaid; the next level settles it",
    (Phase.SERVING, Level.HERE): "as it should be",
    (Phase.LEAVING, Level.INCOMING): "silent already",
    (Phase.LEAVING, Level.OUTGOING): "as it should be",
}

# STARTED_INCOMING is over when the domain runs, is left paused on purpose, or has failed.
_ENDS_ANNOUNCEMENT = frozenset(
    {
        DomainEvent.STARTED,
        DomainEvent.SUSPENDED,
        DomainEvent.RESUMED,
        DomainEvent.RESUMED_MIGRATED,
        DomainEvent.RESUMED_POSTCOPY,
        DomainEvent.STOPPED,
        DomainEvent.STOPPED_MIGRATED,
        DomainEvent.STOPPED_FAILED,
        DomainEvent.STOPPED_SAVED,
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
    (Phase.ARRIVING, DomainEvent.STOPPED): Domains._release_arrival,
    (Phase.ARRIVING, DomainEvent.STOPPED_MIGRATED): Domains._release_arrival,
    (Phase.ARRIVING, DomainEvent.STOPPED_FAILED): Domains._release_arrival,
    (Phase.ARRIVING, DomainEvent.STOPPED_SAVED): Domains._release_arrival,
    (Phase.SERVING, DomainEvent.SUSPENDED_MIGRATED): Domains._hush,
    (Phase.SERVING, DomainEvent.STOPPED): Domains._release_stopped,
    (Phase.SERVING, DomainEvent.STOPPED_MIGRATED): Domains._release_migrated,
    (Phase.SERVING, DomainEvent.STOPPED_FAILED): Domains._release_failed,
    (Phase.SERVING, DomainEvent.STOPPED_SAVED): Domains._release_saved,
    (Phase.LEAVING, DomainEvent.RESUMED): Domains._speak,
    (Phase.LEAVING, DomainEvent.RESUMED_MIGRATED): Domains._speak,
    (Phase.LEAVING, DomainEvent.STOPPED): Domains._release_stopped,
    (Phase.LEAVING, DomainEvent.STOPPED_MIGRATED): Domains._release_migrated,
    (Phase.LEAVING, DomainEvent.STOPPED_FAILED): Domains._release_failed,
    (Phase.LEAVING, DomainEvent.STOPPED_SAVED): Domains._release_saved,
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
            DomainEvent.STOPPED,
            DomainEvent.STOPPED_MIGRATED,
            DomainEvent.STOPPED_FAILED,
            DomainEvent.STOPPED_SAVED,
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
