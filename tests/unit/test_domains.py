"""Domains: when to connect, speak, hush and release; attaching; the tables are complete."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.host.hypervisor import domains as domains_module
from vchan.host.hypervisor.domain_xml import DomainFacts, DomainState, Selection
from vchan.host.hypervisor.domains import (
    ATTACH_RETRY_MAX_S,
    ATTACH_RETRY_MIN_S,
    IN_RESCUE,
    NO_CONTROLLER_CONFIGURED,
    NO_CONTROLLER_NOVA,
    NO_CONTROLLER_TRANSIENT,
    Attach,
    AttachDone,
    Changed,
    Connect,
    Decision,
    DetachDone,
    DomainEvent,
    Domains,
    Gone,
    Happened,
    Hush,
    HypervisorEvent,
    HypervisorLost,
    Phase,
    Rebooted,
    Release,
    Resync,
    Situation,
    Speak,
    Unreadable,
    Warn,
    Why,
)

VM = "8b6a6b6e-0f0c-4d2b-9a53-3f7e1f6f5f10"
OTHER_VM = "5e0d8d1a-6f5d-4c63-9a0e-3d7f6c1b2a41"
PATH = "/channel/domain-3-vm1/org.openstack.vchan.0"

RUNNING = DomainFacts(
    uuid=VM,
    name="vm1",
    state=DomainState.RUNNING,
    channel_path=PATH,
    has_controller=True,
    configured=True,
    persistent=True,
)
PAUSED = replace(RUNNING, state=DomainState.PAUSED)
INCOMING = replace(PAUSED, incoming=True)
OUTGOING = replace(PAUSED, outgoing=True)
OFF = replace(RUNNING, state=DomainState.SHUTOFF, channel_path=None, has_controller=False)
UNPLUGGED = replace(RUNNING, channel_path=None)
# Without a channel anywhere.
BARE = replace(UNPLUGGED, configured=False)
BARE_WITHOUT_CONTROLLER = replace(BARE, has_controller=False)

LEVELS = {
    Situation.NO_CHANNEL: OFF,
    Situation.INCOMING: INCOMING,
    Situation.OUTGOING: OUTGOING,
    Situation.HERE: RUNNING,
}


class Host:
    """A Domains with a clock."""

    def __init__(self, *rules: str) -> None:
        self.domains = Domains(Selection.parse(rules))
        self.now_s = 1000.0

    def receive(self, event: HypervisorEvent) -> list[Decision]:
        return self.domains.receive(event, self.now_s)

    def see(self, facts: DomainFacts) -> list[Decision]:
        return self.receive(Changed(facts))

    def happen(self, event: DomainEvent) -> list[Decision]:
        return self.receive(Happened(VM, "vm1", event))

    def resync(self, *facts: DomainFacts) -> list[Decision]:
        return self.receive(Resync(facts))

    def wait(self, seconds: float) -> list[Decision]:
        self.now_s += seconds
        return self.domains.handle_timeout(self.now_s)

    def phase(self) -> Phase:
        return self.domains.domain(VM).phase

    def hypervisor_problem(self) -> str | None:
        return self.domains.hypervisor_problem

    def problem(self) -> str | None:
        return self.domains.domain(VM).trouble


def host_in(phase: Phase) -> Host:
    host = Host()
    if phase is Phase.IDLE:
        host.see(OFF)
    elif phase is Phase.ARRIVING:
        host.see(INCOMING)
    else:
        host.see(RUNNING)
        if phase is Phase.LEAVING:
            host.happen(DomainEvent.SUSPENDED_MIGRATED)
    assert host.phase() is phase
    return host


# --- the tables -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reactions", "ignored", "inputs"),
    [
        (domains_module._ON_EDGE, domains_module._IGNORED_EDGES, DomainEvent),
        (domains_module._ON_LEVEL, domains_module._IGNORED_LEVELS, Situation),
    ],
    ids=["edges", "levels"],
)
def test_tables_are_complete(
    reactions: dict[object, object],
    ignored: dict[object, str],
    inputs: type[DomainEvent | Situation],
) -> None:
    assert not reactions.keys() & ignored.keys()
    assert reactions.keys() | ignored.keys() == {(p, i) for p in Phase for i in inputs}
    assert all(ignored.values())


def test_every_change_in_every_phase_leads_somewhere_or_cannot_be() -> None:
    leads, cannot = domains_module._NEXT_PHASE, domains_module._CANNOT_BE
    assert not leads.keys() & cannot.keys()
    every = {(phase, change) for phase in Phase for change in get_args(domains_module.PhaseChange)}
    assert leads.keys() | cannot.keys() == every
    assert all(cannot.values())


def test_every_row_of_the_phases_is_taken_by_some_news() -> None:
    """None is there that nothing leads to."""
    taken = set()
    for phase in Phase:
        for happened in (*DomainEvent, *LEVELS.values(), Gone(VM, "vm1")):
            host = host_in(phase)
            before = phase
            match happened:
                case DomainEvent():
                    decisions = host.happen(happened)
                case DomainFacts():
                    decisions = host.see(happened)
                case _:
                    decisions = host.receive(happened)
            for decision in decisions:
                if isinstance(decision, get_args(domains_module.PhaseChange)):
                    taken.add((before, type(decision)))
                    before = domains_module._NEXT_PHASE[before, type(decision)]
    assert taken == domains_module._NEXT_PHASE.keys()


@pytest.mark.parametrize(("phase", "change"), sorted(domains_module._CANNOT_BE, key=str))
def test_a_change_that_cannot_be_is_none(phase: Phase, change: type[Decision]) -> None:
    domain = host_in(phase).domains.domain(VM)
    of = {Connect: Connect(VM, PATH), Release: Release(VM, Why.GONE)}
    made: Any = of.get(change) or change(VM)  # type: ignore[call-arg]
    with pytest.raises(KeyError):
        domain.change(made)
    assert domain.phase is phase


CONNECT, SPEAK, HUSH = Connect(VM, PATH), Speak(VM), Hush(VM)


@pytest.mark.parametrize(
    ("phase", "level", "after", "decisions"),
    [
        (Phase.IDLE, Situation.NO_CHANNEL, Phase.IDLE, []),
        (Phase.IDLE, Situation.INCOMING, Phase.ARRIVING, [CONNECT]),
        (Phase.IDLE, Situation.OUTGOING, Phase.LEAVING, [CONNECT, HUSH]),
        (Phase.IDLE, Situation.HERE, Phase.SERVING, [CONNECT, SPEAK]),
        (Phase.ARRIVING, Situation.NO_CHANNEL, Phase.IDLE, [Release(VM, Why.ARRIVAL_FAILED)]),
        (Phase.ARRIVING, Situation.INCOMING, Phase.ARRIVING, []),
        (Phase.ARRIVING, Situation.OUTGOING, Phase.LEAVING, [HUSH]),
        (Phase.ARRIVING, Situation.HERE, Phase.SERVING, [SPEAK]),
        (Phase.SERVING, Situation.NO_CHANNEL, Phase.IDLE, [Release(VM, Why.STOPPED)]),
        (Phase.SERVING, Situation.INCOMING, Phase.SERVING, []),
        (Phase.SERVING, Situation.OUTGOING, Phase.LEAVING, [HUSH]),
        (Phase.SERVING, Situation.HERE, Phase.SERVING, []),
        (Phase.LEAVING, Situation.NO_CHANNEL, Phase.IDLE, [Release(VM, Why.MIGRATED)]),
        (Phase.LEAVING, Situation.INCOMING, Phase.LEAVING, []),
        (Phase.LEAVING, Situation.OUTGOING, Phase.LEAVING, []),
        (Phase.LEAVING, Situation.HERE, Phase.SERVING, [SPEAK]),
    ],
)
def test_levels(phase: Phase, level: Situation, after: Phase, decisions: list[Decision]) -> None:
    host = host_in(phase)
    assert host.see(LEVELS[level]) == decisions
    assert host.phase() is after


STOPPED = {
    DomainEvent.STOPPED: Why.STOPPED,
    DomainEvent.STOPPED_MIGRATED: Why.MIGRATED,
    DomainEvent.STOPPED_FAILED: Why.FAILED,
    DomainEvent.STOPPED_SAVED: Why.SAVED,
}
RESUMED = (DomainEvent.RESUMED, DomainEvent.RESUMED_MIGRATED, DomainEvent.RESUMED_POSTCOPY)


def expected_of_edge(phase: Phase, event: DomainEvent) -> tuple[Phase, list[Decision]]:
    if event in STOPPED and phase is not Phase.IDLE:
        why = Why.ARRIVAL_FAILED if phase is Phase.ARRIVING else STOPPED[event]
        return Phase.IDLE, [Release(VM, why)]
    if event in RESUMED and phase is Phase.ARRIVING:
        return Phase.SERVING, [SPEAK]
    if event in RESUMED[:2] and phase is Phase.LEAVING:
        return Phase.SERVING, [SPEAK]
    if event is DomainEvent.SUSPENDED_MIGRATED and phase is Phase.SERVING:
        return Phase.LEAVING, [HUSH]
    return phase, []


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", DomainEvent)
def test_edges(phase: Phase, event: DomainEvent) -> None:
    host = host_in(phase)
    after, decisions = expected_of_edge(phase, event)
    assert host.happen(event) == decisions
    assert host.phase() is after


@pytest.mark.parametrize("event", DomainEvent)
def test_edges_of_an_unknown_domain_do_nothing(event: DomainEvent) -> None:
    host = Host("*")
    assert host.happen(event) == []
    assert host.domains.all() == ()
    assert host.domains.next_timeout() is None


# --- stories ----------------------------------------------------------------------------------


def test_migration_seen_by_the_source() -> None:
    host = Host()
    assert host.see(RUNNING) == [CONNECT, SPEAK]
    assert host.happen(DomainEvent.SUSPENDED_MIGRATED) == [HUSH]
    assert host.see(OUTGOING) == []
    assert host.happen(DomainEvent.STOPPED_MIGRATED) == [Release(VM, Why.MIGRATED)]
    assert host.receive(Gone(VM, "vm1")) == []
    assert host.domains.all() == ()


def test_migration_that_fails_at_the_end_seen_by_the_source() -> None:
    host = Host()
    host.see(RUNNING)
    assert host.happen(DomainEvent.SUSPENDED_MIGRATED) == [HUSH]
    assert host.happen(DomainEvent.RESUMED_MIGRATED) == [SPEAK]
    assert host.see(RUNNING) == []


def test_migration_seen_by_the_destination() -> None:
    host = Host()
    assert host.happen(DomainEvent.STARTED_INCOMING) == []
    assert host.see(INCOMING) == [CONNECT]
    assert host.happen(DomainEvent.DEFINED) == []
    assert host.see(INCOMING) == []
    assert host.happen(DomainEvent.RESUMED_MIGRATED) == [SPEAK]
    assert host.see(RUNNING) == []


def test_failed_migration_seen_by_the_destination() -> None:
    host = Host()
    host.happen(DomainEvent.STARTED_INCOMING)
    assert host.see(INCOMING) == [CONNECT]
    assert host.happen(DomainEvent.STOPPED_FAILED) == [Release(VM, Why.ARRIVAL_FAILED)]
    assert host.receive(Gone(VM, "vm1")) == []


def test_destination_that_cannot_tell_from_the_job() -> None:
    host = Host()
    host.happen(DomainEvent.STARTED_INCOMING)
    assert host.see(PAUSED) == [CONNECT]  # the event alone says that it is not here yet
    assert host.happen(DomainEvent.RESUMED_MIGRATED) == [SPEAK]
    # Paused later on, it is served: the announcement is over.
    host.happen(DomainEvent.SUSPENDED)
    assert host.see(PAUSED) == []
    assert host.phase() is Phase.SERVING


def test_facts_that_are_quicker_than_the_event() -> None:
    host = Host()
    host.happen(DomainEvent.STARTED_INCOMING)
    assert host.see(RUNNING) == [CONNECT, SPEAK]
    assert host.happen(DomainEvent.RESUMED_MIGRATED) == []


@pytest.mark.parametrize("facts", [INCOMING, PAUSED])
def test_migration_that_ends_paused(facts: DomainFacts) -> None:
    host = Host()
    host.happen(DomainEvent.STARTED_INCOMING)
    assert host.see(facts) == [CONNECT]
    assert host.happen(DomainEvent.SUSPENDED) == []
    assert host.see(PAUSED) == [SPEAK]  # it waits in the socket until the guest is resumed
    assert host.happen(DomainEvent.RESUMED) == []


def test_post_copy() -> None:
    source, destination = Host(), Host()
    source.see(RUNNING)
    destination.see(INCOMING)
    assert source.happen(DomainEvent.SUSPENDED_MIGRATED) == [HUSH]
    assert source.happen(DomainEvent.SUSPENDED_POSTCOPY) == []
    assert destination.happen(DomainEvent.RESUMED_POSTCOPY) == [SPEAK]
    assert destination.happen(DomainEvent.RESUMED_MIGRATED) == []
    assert source.happen(DomainEvent.STOPPED_MIGRATED) == [Release(VM, Why.MIGRATED)]


def test_a_user_pauses_and_resumes() -> None:
    host = Host()
    host.see(RUNNING)
    for event, facts in ((DomainEvent.SUSPENDED, PAUSED), (DomainEvent.RESUMED, RUNNING)):
        assert host.happen(event) == []
        assert host.see(facts) == []


def test_daemon_starts_with_domains_of_every_kind() -> None:
    host = Host()
    names = ("running", "paused", "in", "out", "off", "unplugged")
    kinds = (RUNNING, PAUSED, INCOMING, OUTGOING, OFF, UNPLUGGED)
    facts = [replace(kind, uuid=name, name=name) for name, kind in zip(names, kinds, strict=True)]
    assert host.hypervisor_problem() is not None
    assert host.resync(*facts) == [
        Connect("running", PATH),
        Speak("running"),
        Connect("paused", PATH),
        Speak("paused"),
        Connect("in", PATH),
        Connect("out", PATH),
        Hush("out"),
    ]
    assert host.hypervisor_problem() is None
    assert [domain.known.name for domain in host.domains.all()] == list(names)


def test_save_and_restore() -> None:
    host = Host()
    host.see(RUNNING)
    host.happen(DomainEvent.SUSPENDED)
    assert host.happen(DomainEvent.STOPPED_SAVED) == [Release(VM, Why.SAVED)]
    assert host.see(OFF) == []
    host.happen(DomainEvent.STARTED)
    assert host.see(replace(PAUSED, channel_path="/4")) == [Connect(VM, "/4"), SPEAK]
    assert host.happen(DomainEvent.RESUMED) == []


def test_a_server_in_rescue_is_not_served_and_nothing_is_attached() -> None:
    host = Host("*")
    host.see(RUNNING)
    assert host.happen(DomainEvent.STOPPED) == [Release(VM, Why.STOPPED)]
    for facts in (RUNNING, UNPLUGGED, BARE, BARE_WITHOUT_CONTROLLER):
        rescued = replace(facts, rescued=True)
        assert host.see(replace(rescued, state=DomainState.SHUTOFF, channel_path=None)) == []
        assert host.problem() is None
        host.happen(DomainEvent.STARTED)
        assert host.see(rescued) == [Warn(VM, "vm1", IN_RESCUE)]
        assert (host.phase(), host.problem()) == (Phase.IDLE, IN_RESCUE)
        host.happen(DomainEvent.STOPPED)
    host.happen(DomainEvent.STARTED)
    assert host.see(RUNNING) == [CONNECT, SPEAK]
    assert host.problem() is None
    # Its stop was missed.
    assert host.see(replace(RUNNING, rescued=True, channel_path="/4"))[0] == Release(
        VM, Why.DETACHED
    )


def test_snapshot_revert() -> None:
    host = Host()
    host.see(RUNNING)
    assert host.happen(DomainEvent.STOPPED) == [Release(VM, Why.STOPPED)]
    host.happen(DomainEvent.STARTED)
    host.happen(DomainEvent.RESUMED)
    host.happen(DomainEvent.DEFINED)
    assert host.see(replace(RUNNING, channel_path="/4")) == [Connect(VM, "/4"), SPEAK]


def test_another_path_is_another_qemu() -> None:
    host = Host()
    host.see(RUNNING)
    assert host.see(replace(RUNNING, channel_path="/4")) == [
        Release(VM, Why.REPLACED),
        Connect(VM, "/4"),
        SPEAK,
    ]


def test_unplugged_while_it_runs() -> None:
    host = Host()
    host.see(RUNNING)
    assert host.see(UNPLUGGED) == [Release(VM, Why.DETACHED)]


def test_reboot_changes_nothing() -> None:
    host = Host()
    host.see(RUNNING)
    assert host.receive(Rebooted(VM)) == []
    assert host.phase() is Phase.SERVING


def test_undefining_a_running_domain_changes_nothing() -> None:
    host = Host()
    host.see(RUNNING)
    assert host.happen(DomainEvent.UNDEFINED) == []
    assert host.see(replace(RUNNING, persistent=False, configured=False)) == []


@pytest.mark.parametrize(
    ("phase", "decisions"),
    [
        (Phase.IDLE, []),
        (Phase.ARRIVING, [Release(VM, Why.ARRIVAL_FAILED)]),
        (Phase.SERVING, [Release(VM, Why.GONE)]),
        (Phase.LEAVING, [Release(VM, Why.MIGRATED)]),
    ],
)
def test_gone_and_missing_at_a_resync(phase: Phase, decisions: list[Decision]) -> None:
    for event in (Gone(VM, "vm1"), Resync(())):
        host = host_in(phase)
        assert host.receive(event) == decisions
        assert host.domains.all() == ()
    assert Host().receive(Gone(VM, "vm1")) == []


def test_libvirtd_restarts() -> None:
    host = Host()
    host.resync(RUNNING, replace(RUNNING, uuid=OTHER_VM))
    assert host.receive(HypervisorLost("it was killed")) == []
    assert host.hypervisor_problem() == "it was killed"
    assert host.resync(RUNNING) == [Release(OTHER_VM, Why.GONE)]
    assert host.phase() is Phase.SERVING


def test_what_was_announced_before_libvirtd_restarted_is_forgotten() -> None:
    host = Host()
    host.happen(DomainEvent.STARTED_INCOMING)
    assert host.see(PAUSED) == [CONNECT]
    host.receive(HypervisorLost("it was killed"))
    assert host.resync(PAUSED) == [SPEAK]


# --- what cannot be read ----------------------------------------------------------------------

UNREAD = Unreadable(VM, "vm1", "it is busy")
PROBLEM = "libvirt has this domain, and it could not be read: it is busy"


@pytest.mark.parametrize("phase", Phase)
def test_what_cannot_be_read_stays_what_it_was(phase: Phase) -> None:
    """Whether libvirt is asked for one, or for all when it comes back."""
    for event in (UNREAD, Resync((), (UNREAD,))):
        host = host_in(phase)
        if isinstance(event, Resync):
            host.receive(HypervisorLost("it was killed"))
        assert host.receive(event) == [Warn(VM, "vm1", PROBLEM)]
        assert host.phase() is phase
        assert host.problem() == PROBLEM
        assert host.receive(event) == []  # once is enough
        other = replace(UNREAD, reason="permission denied")
        assert len(host.receive(other)) == 1


def test_what_was_never_read_is_listed_with_its_reason() -> None:
    host = Host("*")
    host.resync(replace(RUNNING, uuid=OTHER_VM))
    host.receive(UNREAD)
    domain = host.domains.domain(VM)
    assert (domain.known.name, domain.known.state) == ("vm1", DomainState.UNKNOWN)
    assert domain.trouble == PROBLEM
    assert len(host.domains.all()) == 2
    assert host.wait(1000.0) == []  # nothing is attached to what is not known


def test_facts_end_it() -> None:
    host = Host()
    host.receive(UNREAD)
    assert host.see(RUNNING) == [CONNECT, SPEAK]
    assert host.problem() is None
    host.receive(UNREAD)
    assert host.see(OFF) == [Release(VM, Why.STOPPED)]


def test_an_edge_counts_also_for_what_cannot_be_read() -> None:
    host = host_in(Phase.SERVING)
    host.receive(UNREAD)
    assert host.happen(DomainEvent.STOPPED) == [Release(VM, Why.STOPPED)]
    assert host.receive(Gone(VM, "vm1")) == []
    assert host.domains.all() == ()


def test_a_known_socket_is_served_though_nothing_else_is_known() -> None:
    host = Host()
    known = replace(UNREAD, channel_path=PATH)
    assert host.receive(known) == [Warn(VM, "vm1", PROBLEM), CONNECT, SPEAK]
    assert host.receive(known) == []
    assert host.see(RUNNING) == []  # the same
    assert host.phase() is Phase.SERVING


# --- attaching --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts",
    [
        BARE,
        UNPLUGGED,
        replace(BARE, persistent=False),
        BARE_WITHOUT_CONTROLLER,
        replace(OFF, configured=False),
        replace(BARE, state=DomainState.PAUSED),
    ],
    ids=["bare", "configured", "transient", "no controller", "off", "paused"],
)
def test_a_selected_domain_that_lacks_the_channel_gets_it(facts: DomainFacts) -> None:
    host = Host("name:vm*")
    assert host.see(facts) == [Attach(VM)]
    assert host.see(facts) == []  # under way
    assert Host("name:other").see(facts) == []


@pytest.mark.parametrize(
    "facts",
    [
        replace(BARE, state=DomainState.PAUSED, incoming=True),
        replace(BARE, state=DomainState.PAUSED, outgoing=True),
        replace(OFF, persistent=False),
    ],
)
def test_no_attach_while_it_migrates_or_where_nothing_helps(facts: DomainFacts) -> None:
    host = Host("*")
    assert host.see(facts) == []
    assert host.domains.next_timeout() is None


def test_no_attach_between_announcement_and_arrival() -> None:
    host = Host("*")
    host.happen(DomainEvent.STARTED_INCOMING)
    assert host.see(replace(BARE, state=DomainState.PAUSED)) == []
    host.happen(DomainEvent.RESUMED_MIGRATED)
    assert host.see(BARE) == [Attach(VM)]


def test_a_domain_that_has_the_channel_is_served_though_not_selected() -> None:
    assert Host().see(RUNNING) == [CONNECT, SPEAK]


def test_attach_then_connect() -> None:
    host = Host("*")
    assert host.see(BARE) == [Attach(VM)]
    assert host.receive(AttachDone(VM, live=True, config=True, problem=None)) == []
    assert host.see(RUNNING) == [CONNECT, SPEAK]
    assert host.problem() is None


def test_attach_for_the_next_boot_alone() -> None:
    host = Host("*")
    assert host.see(BARE_WITHOUT_CONTROLLER) == [Attach(VM)]
    done = AttachDone(VM, live=False, config=True, problem=NO_CONTROLLER_CONFIGURED)
    assert host.receive(done) == [Warn(VM, "vm1", NO_CONTROLLER_CONFIGURED)]
    facts = replace(BARE_WITHOUT_CONTROLLER, configured=True)
    assert host.see(facts) == []  # said once
    assert host.problem() == NO_CONTROLLER_CONFIGURED
    assert host.see(OFF) == []
    assert host.problem() is None
    assert host.see(RUNNING) == [CONNECT, SPEAK]


def test_without_a_controller_nova_s_next_boot_brings_none() -> None:
    facts = replace(BARE_WITHOUT_CONTROLLER, configured=True, metadata={"name": "db-1"})
    told = NO_CONTROLLER_NOVA.format(uuid=VM)
    assert "nova-manage image_property set " + VM in told
    host = Host("*")
    assert host.see(facts) == [Warn(VM, "vm1", told)]
    assert host.problem() == told


def test_transient_domain_without_controller() -> None:
    facts = replace(BARE_WITHOUT_CONTROLLER, persistent=False)
    assert Host("*").see(facts) == [Warn(VM, "vm1", NO_CONTROLLER_TRANSIENT)]
    assert Host().see(facts) == []


def test_failing_attaches_are_tried_ever_more_slowly() -> None:
    host = Host("*")
    host.see(BARE)
    delay_s = ATTACH_RETRY_MIN_S
    warnings: list[Decision] = []
    for _ in range(20):
        warnings += host.receive(AttachDone(VM, live=False, config=False, problem="busy"))
        assert host.see(BARE) == []
        assert host.domains.next_timeout() == host.now_s + delay_s
        assert host.wait(delay_s - 0.1) == []
        assert host.wait(0.2) == [Attach(VM)]
        assert host.domains.next_timeout() is None
        delay_s = min(delay_s * 2, ATTACH_RETRY_MAX_S)
    assert delay_s == ATTACH_RETRY_MAX_S
    assert warnings == [Warn(VM, "vm1", "busy")]


@pytest.mark.parametrize("event", [DomainEvent.DEFINED, DomainEvent.STARTED])
def test_new_xml_is_reconciled_at_once(event: DomainEvent) -> None:
    host = Host("*")
    host.see(BARE)
    host.receive(AttachDone(VM, live=False, config=False, problem="busy"))
    host.happen(event)
    assert host.see(BARE) == [Attach(VM)]


def test_what_an_attach_added_and_others_removed_is_not_fought_over() -> None:
    host = Host("*")
    host.see(BARE)
    host.receive(AttachDone(VM, live=True, config=True, problem=None))
    assert host.see(BARE) == []
    assert host.wait(ATTACH_RETRY_MIN_S) == [Attach(VM)]


def test_an_operators_detach_holds_until_an_attach() -> None:
    host = Host("*")
    host.see(RUNNING)
    assert host.receive(DetachDone(VM, None)) == []
    assert host.see(BARE) == [Release(VM, Why.DETACHED)]
    assert host.see(replace(BARE_WITHOUT_CONTROLLER)) == []
    host.receive(AttachDone(VM, live=True, config=True, problem=None))
    assert host.see(RUNNING) == [CONNECT, SPEAK]


def test_a_failed_detach_is_told_and_holds_nothing() -> None:
    host = Host("*")
    host.see(RUNNING)
    assert host.receive(DetachDone(VM, "no")) == [Warn(VM, "vm1", "no")]
    assert host.see(BARE) == [Release(VM, Why.DETACHED), Attach(VM)]


def test_answers_about_a_domain_that_has_gone() -> None:
    host = Host()
    assert host.receive(AttachDone(VM, live=True, config=True, problem=None)) == []
    assert host.receive(DetachDone(VM, None)) == []


def test_problem_of_a_domain_without_facts() -> None:
    host = Host()
    host.happen(DomainEvent.STARTED_INCOMING)
    assert host.receive(DetachDone(VM, "no")) == [Warn(VM, "", "no")]


# --- any history ------------------------------------------------------------------------------


def check_effects(decisions: Sequence[Decision], uuid: str) -> None:
    """What a daemon may rely on: connected from Connect to Release, spoken from Speak to Hush."""
    connected = spoken = False
    for decision in decisions:
        match decision:
            case Connect(uuid=of) if of == uuid:
                assert not connected
                connected, spoken = True, False
            case Speak(uuid=of) if of == uuid:
                assert connected
                assert not spoken
                spoken = True
            case Hush(uuid=of) if of == uuid:
                assert connected
                spoken = False
            case Release(uuid=of) if of == uuid:
                assert connected
                connected = spoken = False


FACTS = st.sampled_from(
    [RUNNING, PAUSED, INCOMING, OUTGOING, OFF, UNPLUGGED, BARE, BARE_WITHOUT_CONTROLLER]
    + [replace(facts, channel_path="/4") for facts in (RUNNING, INCOMING, OUTGOING)]
)
EVENTS = st.one_of(
    st.builds(Changed, FACTS),
    st.builds(Happened, st.just(VM), st.just("vm1"), st.sampled_from(DomainEvent)),
    st.just(Gone(VM, "vm1")),
    st.just(HypervisorLost("gone")),
    st.builds(Unreadable, st.just(VM), st.just("vm1"), st.just("busy"), st.none() | st.just(PATH)),
    st.just(Resync((), (Unreadable(VM, "vm1", "busy"),))),
    st.just(Resync(())),
    st.builds(lambda facts: Resync((facts,)), FACTS),
    st.builds(AttachDone, st.just(VM), st.booleans(), st.booleans(), st.none() | st.just("busy")),
    st.builds(DetachDone, st.just(VM), st.none() | st.just("no")),
    st.floats(0.1, 100.0),
)


@given(st.lists(EVENTS, max_size=30))
def test_any_history(history: list[HypervisorEvent | float]) -> None:
    host = Host("*")
    decisions: list[Decision] = []
    for event in history:
        decisions += host.wait(event) if isinstance(event, float) else host.receive(event)
        check_effects(decisions, VM)
    # Whatever was missed or came late, the next whole truth puts it right.
    decisions += host.resync(RUNNING)
    check_effects(decisions, VM)
    assert host.phase() is Phase.SERVING
    decisions += host.resync(OFF)
    check_effects(decisions, VM)
    assert host.phase() is Phase.IDLE
