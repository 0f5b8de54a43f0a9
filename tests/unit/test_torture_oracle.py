"""The torture's oracle on records made up here: each kind of broken promise is seen, each exemption
has its condition, and what is well is well."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.simulate import exempt
from tests.torture import oracle
from tests.torture.in_guest import ASKER, CONTROL, RUNNER
from tests.torture.oracle import Evidence, Fault, Verdict, judge, longest_wait_s
from tests.torture.payload import checksum, payload_of
from tests.torture.records import (
    ANSWERED,
    CALL,
    CAST,
    CONFIRMED,
    EVERYBODY,
    FANOUT,
    REPORT,
    WRONG,
    Born,
    Ran,
    Record,
    Sent,
    Told,
)

VM = "vm-1"
OTHER_VM = "vm-2"
CALLER = "caller"
CASTER = "caster"
TORTURE = Path(oracle.__file__).parent
DOCS = TORTURE.parents[1] / "docs"


def sent(kind: str, number: int, *, target: str = VM, at_s: float = 0.0, sender: str = "") -> Sent:
    return Sent(at_s or float(number), kind, target, sender or f"{kind}er", number)


def told(of: Sent, outcome: str, after_s: float = 0.5) -> Told:
    return Told(of.at_s + after_s, of.sender, of.number, outcome)


def ran(of: Sent, *, marked: bool = False, vm: str = "", at_s: float = 0.0) -> Ran:
    crc = checksum(payload_of(of.sender, of.number))
    return Ran(at_s or of.at_s, of.kind, of.sender, of.number, crc, marked, vm)


def born(daemon: int = 1, boot: str = "first") -> Born:
    return Born(0.0, RUNNER, boot, daemon)


def downward(
    control: Sequence[Record],
    runner: Sequence[Record],
    asker: Sequence[Record] = (),
    faults: tuple[Fault, ...] = (),
) -> Verdict:
    """The verdict on one VM that sends nothing."""
    guests = {VM: {RUNNER: runner, ASKER: asker}}
    return judge(Evidence(control, [], guests, faults, RUNNER))


def upward(
    asker: Sequence[Record], service: Sequence[Record], faults: tuple[Fault, ...] = ()
) -> Verdict:
    """The verdict on one VM that is sent nothing."""
    guests = {VM: {RUNNER: [], ASKER: asker}}
    return judge(Evidence([], service, guests, faults, RUNNER))


def broken(verdict: Verdict) -> list[str]:
    return [violation.kind for violation in verdict.violations]


def casts(count: int) -> tuple[list[Sent], list[Record]]:
    """So many casts, confirmed: the messages, and the sender's records of them."""
    messages = [sent(CAST, number) for number in range(1, count + 1)]
    return messages, [
        record for message in messages for record in (message, told(message, CONFIRMED))
    ]


# --- what is well


def test_everything_once_and_in_order_breaks_nothing() -> None:
    messages, control = casts(3)
    call = sent(CALL, 1)
    fanout = sent(FANOUT, 1, target=EVERYBODY)
    control += [call, told(call, ANSWERED), fanout, told(fanout, CONFIRMED)]
    runner: list[Record] = [born(), *map(ran, messages), ran(call), ran(fanout)]
    verdict = downward(control, runner, [ran(fanout)])
    assert verdict == Verdict([], Counter(), Counter({ANSWERED: 1}))


def test_what_is_under_way_breaks_nothing() -> None:
    """A message that its sender was told nothing of may have run or not."""
    assert broken(downward([sent(CAST, 1), sent(CALL, 1)], [born(), ran(sent(CAST, 1))])) == []


def test_a_cast_that_failed_may_have_run_or_not() -> None:
    one, other = sent(CAST, 1), sent(CAST, 2)
    control: list[Record] = [
        one,
        told(one, "MessageDeliveryFailure"),
        other,
        told(other, "MessagingTimeout"),
    ]
    assert broken(downward(control, [born(), ran(one)])) == []


# --- lost


def test_a_cast_that_never_ran_is_lost() -> None:
    messages, control = casts(3)
    runner: list[Record] = [born(), ran(messages[0]), ran(messages[2])]
    assert broken(downward(control, runner)) == [oracle.LOST]


def test_a_cast_may_be_lost_with_its_agent() -> None:
    messages, control = casts(3)
    runner: list[Record] = [born(), ran(messages[0]), born(), ran(messages[2])]
    verdict = downward(control, runner)
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.LOST_WITH_AGENT: 1}


def test_a_death_elsewhere_excuses_no_loss() -> None:
    """Not the first birth, not a death before the cast, and not one after its successor ran."""
    messages, control = casts(4)
    runner: list[Record] = [
        born(),
        ran(messages[0]),
        born(),
        ran(messages[1]),
        ran(messages[3]),
        born(),
    ]
    assert broken(downward(control, runner)) == [oracle.LOST]


def test_an_agent_takes_few_casts_with_it() -> None:
    messages, control = casts(9)
    runner: list[Record] = [born(), ran(messages[0]), born(), ran(messages[8])]
    verdict = downward(control, runner)
    assert broken(verdict) == [oracle.LOST] * (7 - oracle.LOST_A_DEATH_MAX)


def test_a_fanout_must_reach_each_program() -> None:
    fanout = sent(FANOUT, 1, target=EVERYBODY)
    control: list[Record] = [fanout, told(fanout, CONFIRMED)]
    assert broken(downward(control, [born(), ran(fanout)], [born()])) == [oracle.LOST]
    assert broken(downward(control, [born()], [born(), ran(fanout)])) == [oracle.LOST]


def test_an_agent_that_is_away_hears_no_fanouts() -> None:
    fanouts = [sent(FANOUT, number, target=EVERYBODY) for number in range(1, 6)]
    control = [record for one in fanouts for record in (one, told(one, CONFIRMED))]
    runner: list[Record] = [born(), ran(fanouts[0]), born(), ran(fanouts[4])]
    verdict = downward(control, runner, [ran(one) for one in fanouts])
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.LOST_WITH_AGENT: 3}


def test_a_call_that_was_answered_and_never_ran() -> None:
    call = sent(CALL, 1)
    assert broken(downward([call, told(call, ANSWERED)], [born()])) == [oracle.LOST]


@pytest.mark.parametrize("outcome", ["MessagingTimeout", "AgentGone", "CallTimeout"])
def test_a_call_without_an_answer_is_lost(outcome: str) -> None:
    call = sent(CALL, 1)
    assert broken(downward([call, told(call, outcome)], [born(), ran(call)])) == [oracle.LOST]


@pytest.mark.parametrize("kind", sorted(oracle.AGENT_DEATHS | oracle.DAEMON_DEATHS))
def test_a_call_may_end_with_its_agent(kind: str) -> None:
    call = sent(CALL, 1, at_s=100)
    control: list[Record] = [call, told(call, "AgentGone")]
    verdict = downward(control, [born()], faults=(Fault(kind, VM, 99, 101),))
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.AGENT_DIED: 1}
    for fault in (Fault(kind, OTHER_VM, 99, 101), Fault(kind, VM, 10, 20)):
        assert broken(downward(control, [born()], faults=(fault,))) == [oracle.LOST]


def test_a_call_may_time_out_when_the_broker_dies() -> None:
    call = sent(CALL, 1, at_s=100)
    fault = Fault("broker_kill", "", 120, 130)
    timed_out: list[Record] = [call, told(call, "MessagingTimeout", 60)]
    verdict = downward(timed_out, [born()], faults=(fault,))
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.BROKER_DIED: 1}
    gone: list[Record] = [call, told(call, "AgentGone", 60)]
    assert broken(downward(gone, [born()], faults=(fault,))) == [oracle.LOST]


# --- twice


@pytest.mark.parametrize("kind", [CALL, CAST])
def test_what_runs_again_runs_twice(kind: str) -> None:
    message = sent(kind, 1)
    assert broken(downward([message], [born(), ran(message), ran(message)])) == [oracle.TWICE]


@pytest.mark.parametrize("kind", [CALL, CAST])
def test_it_runs_twice_also_when_one_of_the_two_lived(kind: str) -> None:
    """The agent died, the guest's daemon lived: it knew."""
    message = sent(kind, 1)
    runner: list[Record] = [born(), ran(message), born(), ran(message)]
    assert broken(downward([message], runner)) == [oracle.TWICE]


@pytest.mark.parametrize("again", [born(daemon=2), born(boot="second")])
def test_a_cast_may_run_again_when_memory_was_lost_and_says_so(again: Born) -> None:
    cast, call = sent(CAST, 1), sent(CALL, 1)
    verdict = downward([cast], [born(), ran(cast), again, ran(cast, marked=True)])
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.MEMORY_LOST: 1}
    verdict = downward([cast], [born(), ran(cast), again, ran(cast)])
    assert broken(verdict) == [oracle.CAST_UNMARKED]
    verdict = downward([call], [born(), ran(call), again, ran(call, marked=True)])
    assert broken(verdict) == [oracle.CALL_TWICE]


@pytest.mark.parametrize("kind", sorted(oracle.DAEMON_DEATHS))
def test_a_daemon_may_die_after_the_agent_was_born_anew(kind: str) -> None:
    """The agent is not born again then: only the fault says that the daemon's memory is gone."""
    cast = sent(CAST, 1)
    first, copy = ran(cast, at_s=100), ran(cast, marked=True, at_s=130)
    reborn: list[Record] = [born(), first, born(), copy]
    verdict = downward([cast], reborn, faults=(Fault(kind, VM, 110, 115),))
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.MEMORY_LOST: 1}
    unmarked: list[Record] = [born(), first, born(), copy._replace(marked=False)]
    verdict = downward([cast], unmarked, faults=(Fault(kind, VM, 110, 115),))
    assert broken(verdict) == [oracle.CAST_UNMARKED]
    lived: list[Record] = [born(), first, copy]
    assert broken(downward([cast], lived, faults=(Fault(kind, VM, 110, 115),))) == [oracle.TWICE]
    for other in (
        Fault(kind, OTHER_VM, 110, 115),
        Fault(kind, VM, 80, 90),
        Fault(kind, VM, 140, 145),
        Fault("guest_daemon_stop", VM, 110, 115),
    ):
        assert broken(downward([cast], reborn, faults=(other,))) == [oracle.TWICE]


def test_memory_that_was_lost_before_or_after_excuses_nothing() -> None:
    cast = sent(CAST, 1)
    second, third = born(daemon=2), born(daemon=3)
    runner: list[Record] = [born(), second, ran(cast), ran(cast, marked=True), third]
    assert broken(downward([cast], runner)) == [oracle.TWICE]


# --- order, content, answers


def test_order_of_one_sender() -> None:
    messages, control = casts(3)
    runner: list[Record] = [born(), ran(messages[0]), ran(messages[2]), ran(messages[1])]
    assert broken(downward(control, runner)) == [oracle.REORDERED]


def test_copies_have_no_order() -> None:
    messages, control = casts(2)
    first, second = messages
    runner: list[Record] = [
        born(),
        ran(first),
        ran(second),
        born(daemon=2),
        ran(first, marked=True),
    ]
    assert broken(downward(control, runner)) == []


def test_what_nobody_sent() -> None:
    assert broken(downward([], [born(), ran(sent(CAST, 1))])) == [oracle.INVENTED]


def test_what_was_sent_to_another_vm() -> None:
    cast = sent(CAST, 1, target=OTHER_VM)
    assert broken(downward([cast], [born(), ran(cast)])) == [oracle.INVENTED]


def test_what_arrives_as_something_else() -> None:
    cast = sent(CAST, 1)
    for changed in (ran(cast)._replace(crc=0), ran(cast)._replace(kind=CALL)):
        assert broken(downward([cast], [born(), changed])) == [oracle.INVENTED]


def test_a_wrong_answer() -> None:
    call = sent(CALL, 1)
    assert broken(downward([call, told(call, WRONG)], [born(), ran(call)])) == [oracle.WRONG_ANSWER]


# --- refused


DEATH = Fault("agent_away", VM, 0, 5)


@pytest.mark.parametrize("outcome", sorted(oracle.HAS_NOT_RUN))
def test_what_was_refused_never_runs(outcome: str) -> None:
    call = sent(CALL, 1)
    control: list[Record] = [call, told(call, outcome)]
    verdict = downward(control, [born()], faults=(DEATH,))
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.REFUSED: 1}
    verdict = downward(control, [born(), ran(call)], faults=(DEATH,))
    assert broken(verdict) == [oracle.REFUSED_BUT_RAN]


def test_nothing_is_refused_while_everybody_is_there() -> None:
    call = sent(CALL, 1)
    assert broken(downward([call, told(call, "NoSuchAgent")], [born()])) == [oracle.NO_REASON]


def test_an_outcome_that_nobody_knows() -> None:
    call = sent(CALL, 1)
    control: list[Record] = [call, told(call, "KeyError")]
    assert broken(downward(control, [born()], faults=(DEATH,))) == [oracle.NO_REASON]


# --- of guests


def asked(kind: str, number: int = 1) -> Sent:
    return sent(kind, number, target=CONTROL)


def test_requests_of_guests_that_are_well() -> None:
    cast, call = asked(CAST), asked(CALL)
    asker: list[Record] = [cast, told(cast, CONFIRMED), call, told(call, ANSWERED)]
    verdict = upward(asker, [ran(cast, vm=VM), ran(call, vm=VM)])
    assert broken(verdict) == []
    assert verdict.exemptions == {}


@pytest.mark.parametrize(("kind", "outcome"), [(CAST, CONFIRMED), (CALL, ANSWERED)])
def test_a_guests_request_that_is_done_has_run(kind: str, outcome: str) -> None:
    message = asked(kind)
    assert broken(upward([message, told(message, outcome)], [])) == [oracle.LOST]


def test_a_guests_request_that_is_sent_again_is_marked() -> None:
    cast = asked(CAST)
    first, marked = ran(cast, vm=VM, at_s=1), ran(cast, vm=VM, at_s=2, marked=True)
    verdict = upward([cast, told(cast, CONFIRMED)], [first, marked])
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.SENT_AGAIN: 1}
    assert broken(upward([cast], [first, first])) == [oracle.UNMARKED]
    assert broken(upward([cast], [first, marked, first])) == [oracle.UNMARKED]


def test_two_marked_copies_are_one_too_many_at_most() -> None:
    cast = asked(CAST)
    marked = ran(cast, vm=VM, marked=True)
    verdict = upward([cast, told(cast, CONFIRMED)], [marked, marked])
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.SENT_AGAIN: 1}


def test_unmarked_after_long_and_a_dead_host() -> None:
    cast = asked(CAST)
    service: list[Record] = [ran(cast, vm=VM, at_s=10), ran(cast, vm=VM, at_s=25)]
    asker: list[Record] = [cast, told(cast, CONFIRMED)]
    verdict = upward(asker, service, (Fault("host_kill", "", 11, 12),))
    assert broken(verdict) == []
    assert verdict.exemptions == {oracle.AWAY_TOO_LONG: 1}
    assert broken(upward(asker, service)) == [oracle.UNMARKED]
    soon: list[Record] = [ran(cast, vm=VM, at_s=10), ran(cast, vm=VM, at_s=15)]
    assert broken(upward(asker, soon, (Fault("host_kill", "", 11, 12),))) == [oracle.UNMARKED]


def test_a_guests_order() -> None:
    messages = [asked(CAST, number) for number in (1, 2)]
    service = [ran(message, vm=VM) for message in reversed(messages)]
    assert broken(upward([*messages], [*service])) == [oracle.REORDERED]


def test_who_a_guest_is() -> None:
    cast = asked(CAST)
    assert broken(upward([cast], [ran(cast, vm=OTHER_VM)])) == [oracle.WRONG_IDENTITY]


def test_what_no_guest_sent() -> None:
    assert broken(upward([], [ran(asked(CAST), vm=VM)])) == [oracle.INVENTED]


def test_a_guests_request_that_was_refused_never_runs() -> None:
    cast = asked(CAST)
    asker: list[Record] = [cast, told(cast, "LinkDown")]
    fault = Fault("guest_daemon_kill", VM, 0, 5)
    assert broken(upward(asker, [], (fault,))) == []
    assert broken(upward(asker, [ran(cast, vm=VM)], (fault,))) == [oracle.REFUSED_BUT_RAN]


def test_a_guests_cast_may_end_unknown_when_the_broker_dies() -> None:
    cast = asked(CAST)
    asker: list[Record] = [cast, told(cast, "CallTimeout")]
    assert broken(upward(asker, [])) == [oracle.LOST]
    assert broken(upward(asker, [], (Fault("broker_restart", "", 0, 5),))) == []


# --- what guests report


def changed(number: int, sender: str = "asker") -> Sent:
    return sent(REPORT, number, target="guests", sender=sender)


def asker_born(boot: str = "first") -> Born:
    return Born(0.0, ASKER, boot, 1)


def test_what_changed_again_in_between_need_not_be_heard() -> None:
    changes = [changed(number) for number in (1, 2, 3)]
    heard: list[Record] = [ran(changes[0], vm=VM), ran(changes[2], vm=VM)]
    assert broken(upward([asker_born(), *changes], heard)) == []


def test_the_last_change_is_heard() -> None:
    changes = [changed(number) for number in (1, 2)]
    heard: list[Record] = [ran(changes[0], vm=VM)]
    asker: list[Record] = [asker_born(), *changes]
    assert broken(upward(asker, heard)) == [oracle.LOST]
    assert broken(upward([*asker, asker_born()], heard)) == [oracle.LOST]
    assert broken(upward([*asker, asker_born("second")], heard)) == []
    later: list[Record] = [*asker, asker_born("second"), changed(1, "other")]
    assert broken(upward(later, heard)) == [oracle.LOST]


def test_a_change_is_heard_once() -> None:
    change = changed(1)
    asker: list[Record] = [asker_born(), change]
    twice: list[Record] = [ran(change, vm=VM, at_s=10), ran(change, vm=VM, at_s=30)]
    marked: list[Record] = [ran(change, vm=VM, at_s=10), ran(change, marked=True, vm=VM, at_s=12)]
    assert broken(upward(asker, twice)) == [oracle.UNMARKED]
    assert upward(asker, marked).exemptions == {oracle.SENT_AGAIN: 1}
    daemon, moved = Fault("guest_daemon_kill", VM, 20, 21), Fault("migrate", VM, 15, 16)
    host, other = Fault("host_stop", "", 15, 16), Fault("migrate", OTHER_VM, 15, 16)
    assert broken(upward(asker, twice, (daemon,))) == [oracle.UNMARKED]
    assert broken(upward(asker, twice, (moved,))) == [oracle.UNMARKED]
    assert broken(upward(asker, twice, (daemon, other))) == [oracle.UNMARKED]
    for forgets in (moved, host):
        verdict = upward(asker, twice, (daemon, forgets))
        assert broken(verdict) == []
        assert verdict.exemptions == {oracle.TOLD_AGAIN: 1}


def test_changes_are_heard_in_order_and_as_they_were() -> None:
    one, other = changed(1), changed(2)
    asker: list[Record] = [asker_born(), one, other]
    heard: list[Record] = [ran(other, vm=VM), ran(one, vm=VM)]
    assert broken(upward(asker, heard)) == [oracle.REORDERED]
    invented: list[Record] = [ran(one, vm=VM), ran(other, vm=VM), ran(changed(3), vm=VM)]
    assert broken(upward(asker, invented)) == [oracle.INVENTED]
    elsewhere: list[Record] = [ran(one, vm=OTHER_VM), ran(other, vm=VM)]
    assert broken(upward(asker, elsewhere)) == [oracle.WRONG_IDENTITY]


# --- the rest


def test_the_longest_wait() -> None:
    one, other, late = sent(CALL, 1), sent(CALL, 2), sent(CALL, 3)
    records: list[Record] = [one, told(one, ANSWERED, 0.5), other, told(other, ANSWERED, 7.5)]
    records += [late, told(late, "AgentGone", 20)]
    assert longest_wait_s(records) == 7.5
    assert longest_wait_s([]) == 0.0


def test_what_is_known_not_to_hold_is_excused_or_is_not() -> None:
    """Nothing else is let pass, and the document names nothing that we know nothing of."""
    text = (DOCS / "architecture.md").read_text()
    section = text.partition("\n## What is known not to hold\n")[2].partition("\n## ")[0]
    names = re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE)
    assert sorted(names) == sorted([*oracle.KNOWN.values(), *oracle.NOT_EXCUSED])
    assert sorted(names) == sorted(exempt.EXEMPTIONS)


@pytest.mark.parametrize("words", sorted(set(oracle.PROMISED.values())))
def test_what_is_promised_is_let_pass(words: str) -> None:
    assert words in (DOCS.parent / "README.md").read_text()


def test_the_document_has_each_exemption_with_what_allows_it() -> None:
    text = (DOCS / "reliability.md").read_text()
    rows = re.findall(r"^\| (.+?) \| .+ \| (.+?) \|$", text, re.MULTILINE)
    table = {name: allowed for name, allowed in rows if name in oracle.EXEMPTIONS}
    known = {name: f"architecture.md: {title}" for name, title in oracle.KNOWN.items()}
    assert table == known | dict.fromkeys(oracle.PROMISED, "README, call")


def test_it_shares_nothing_with_the_simulator() -> None:
    """The two check each other."""
    for path in TORTURE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [
                    node.module or "",
                    *(f"{node.module}.{alias.name}" for alias in node.names),
                ]
            assert not any(name.startswith("tests.simulate") for name in names), path
