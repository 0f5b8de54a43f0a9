"""The oracle: holds what was sent, told and run against the promises. Pure.

    verdict = judge(evidence)
    assert not verdict.violations

It knows nothing of how vchan works, only what it promises and what `docs/architecture.md` says does
not hold. Whatever is let pass for that is an exemption: it has a name, a narrow condition, and is
counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from tests.torture.payload import checksum, payload_of
from tests.torture.records import (
    ANSWERED,
    CALL,
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

# What is broken, if it is. Some are seen while it happens (`faults`, `watch`, `run`), not by us.
LOST: Final = "lost"
TWICE: Final = "twice"
REORDERED: Final = "reordered"
WRONG_ANSWER: Final = "wrong answer"
REFUSED_BUT_RAN: Final = "refused but ran"
INVENTED: Final = "invented"
WRONG_IDENTITY: Final = "wrong identity"
UNMARKED: Final = "unmarked copy"
NO_REASON: Final = "refused without a reason"
CUT_WHILE_PAUSED: Final = "cut while paused"
DIED: Final = "died"
STUCK: Final = "no end"
MEMORY: Final = "memory"
DESCRIPTORS: Final = "descriptors"
TORN: Final = "torn record"
CALL_TWICE: Final = "call ran again after memory was lost"
CAST_UNMARKED: Final = "cast ran again, unmarked, after memory was lost"

# What is let pass.
LOST_WITH_AGENT: Final = "lost with its agent"
MEMORY_LOST: Final = "cast ran again, marked, after memory was lost"
SENT_AGAIN: Final = "guest's request sent again, marked"
AWAY_TOO_LONG: Final = "guest's request sent again, unmarked, after 12 s"
MISSED: Final = "fanout missed by an agent that was away"
AGENT_DIED: Final = "call over with its agent"
IN_DOUBT: Final = "call in doubt, as the guest's daemon was young"
REFUSED: Final = "refused as nobody was there"
BROKER_DIED: Final = "call unanswered as the broker died"
TOLD_AGAIN: Final = "guest's report told again, as both daemons had forgotten"
KNOWN: Final = {
    LOST_WITH_AGENT: "Lost with its agent",
    MEMORY_LOST: "Run again, marked",
    SENT_AGAIN: "Asked again, marked",
    AWAY_TOO_LONG: "Unknown after twelve seconds",
    MISSED: "Missed while away",
    TOLD_AGAIN: "Reported again",
}
"""By which name of architecture.md, "What is known not to hold"."""
PROMISED: Final = {
    AGENT_DIED: "its exception, or a timeout",
    IN_DOUBT: "its exception, or a timeout",
    REFUSED: "its exception, or a timeout",
    BROKER_DIED: "its exception, or a timeout",
}
"""By which words of what the README promises."""
EXEMPTIONS: Final = (*KNOWN, *PROMISED)
NOT_EXCUSED: Final = (
    "Published twice",
    "Refused, and overtaken",
    "Answer no longer kept",
    "Rolled back under a live connection",
    "Dropped by the broker",
    "Away for too long",
)
"""What is known not to hold either, and is broken all the same if a run shows it: records do not
tell it from a fault. Whoever sees it looks whether it was that."""

HAS_NOT_RUN: Final = frozenset(
    {
        "NoSuchAgent",
        "NoSuchDomain",
        "NoSuchMethod",
        "BadBody",
        "Rejected",
        "LimitExceeded",
        *("LinkError", "LinkDown", "PortAbsent", "PortBusy", "PortDenied", "NotAPort"),
    }
)
"""Outcomes that say that the method has not run: they bind."""
MAY_HAVE_RUN: Final = frozenset({"AgentGone", "CallTimeout", "MessagingTimeout"})
CRASH: Final = "crash"
"""A guest's program ended by a signal of its own: any of them."""
PANIC: Final = "panic"
"""A guest's kernel panicked and started again."""
REBOOTS: Final = frozenset({"reset", PANIC})
AGENT_DEATHS: Final = REBOOTS | {"agent_kill", "agent_hang", "agent_away", CRASH}
"""Faults that end the agent with what it had taken."""
DAEMON_DEATHS: Final = frozenset({"guest_daemon_kill", "guest_daemon_hang", "disk_full", CRASH})
"""Faults that end the guest's daemon: agents that are not back in time count as gone."""
YOUNG_AFTER: Final = DAEMON_DEATHS | REBOOTS
"""Faults after which the guest's daemon is a new one."""
YOUNG_S: Final = 70.0
"""A guest's daemon is young for so long: the calls' timeout, and DOUBT_MARGIN_S."""
BROKER_DEATHS: Final = frozenset({"broker_restart", "broker_kill"})
HOST_DEATHS: Final = frozenset({"host_kill", "host_hang", "host_away", "both_kill"})
HOST_FORGETS: Final = HOST_DEATHS | {"host_stop"}
"""Faults after which no host knows what a VM has reported; and those of a VM's that have its host
forget it:"""
VM_IS_FORGOTTEN: Final = frozenset({"migrate", "save", "detach"})
LOST_A_DEATH_MAX: Final = 2
"""Casts of one sender that go with an agent: it takes one at a time. Another's record may have been
in the port when the VM was reset."""
SLACK_S: Final = 5.0
"""A fault works on for so long after it was healed: daemons and agents start."""
START_S: Final = 30.0
"""So long after it died a guest's daemon may refuse requests, or not be there at all: it starts,
and so do its agents, in an emulated machine among others. What is refused has not run."""
AWAY_S: Final = 60.0
"""A fanout that was sent so long before a guest's daemon died, or after, may have come when an
agent was not back yet: it waits with the broker while the VM or its host is away."""
SETTLED_S: Final = 12.0
"""What architecture.md calls so."""


class Fault(NamedTuple):
    """One that was carried out. `vm`: a UUID; "" for the hosts' and the broker's."""

    kind: str
    vm: str
    began_s: float
    ended_s: float


class Evidence(NamedTuple):
    """All that is known.

    Attributes:
        control: The sending service's records.
        service: The asked service's.
        guests: Of each VM (its UUID), of each of its programs, in the order they were written.
        runner: The program that takes calls and casts; fanouts are for all of a VM's programs.
    """

    control: Sequence[Record]
    service: Sequence[Record]
    guests: Mapping[str, Mapping[str, Sequence[Record]]]
    faults: Sequence[Fault]
    runner: str


class Violation(NamedTuple):
    """A promise that was broken."""

    kind: str
    text: str


class Verdict(NamedTuple):
    """What became of everything.

    Attributes:
        outcomes: How often callers were told what.
    """

    violations: list[Violation]
    exemptions: Counter[str]
    outcomes: Counter[str]


Key = tuple[str, int]
"""(sender, number): a message."""


class Gap(NamedTuple):
    """A stretch of a place's record, and how often the program died in it."""

    after: int
    before: int
    deaths: int


class Place:
    """Where methods run, with all that ran there, in order. `vm`: "" for the service's."""

    def __init__(self, name: str, records: Iterable[Record], vm: str = "") -> None:
        self.name = name
        self.vm = vm
        self.runs: dict[Key, list[tuple[int, Ran]]] = {}
        self.by_sender: dict[str, list[tuple[int, int]]] = {}
        """Of each sender (place in the record, number), of first runs alone."""
        self.births: list[tuple[int, Born]] = []
        for index, record in enumerate(records):
            if isinstance(record, Born):
                self.births.append((index, record))
            elif isinstance(record, Ran):
                self._add(index, record)

    def _add(self, index: int, ran: Ran) -> None:
        copies = self.runs.setdefault((ran.sender, ran.number), [])
        if not copies:
            self.by_sender.setdefault(ran.sender, []).append((index, ran.number))
        copies.append((index, ran))

    def gap_around(self, key: Key) -> Gap:
        """Between the message before and the one after this, of those of its sender that ran."""
        sender, number = key
        ran = self.by_sender.get(sender, [])
        after = max((index for index, other in ran if other < number), default=-1)
        before = min((index for index, other in ran if other > number), default=1 << 60)
        return Gap(after, before, self.deaths(after, before))

    def deaths(self, after: int, before: int) -> int:
        """How often the program was born anew between two places of the record."""
        return sum(after < index < before for index, _ in self.births[1:])

    def saw_another_daemon(self, after: int, before: int) -> bool:
        """Whether a program that was born in between found another daemon than the one before."""
        last: Born | None = None
        for index, born in self.births:
            if index <= after:
                last = born
            elif index < before and last is not None and _is_other(last, born):
                return True
        return False


def _is_other(last: Born, born: Born) -> bool:
    return born.boot != last.boot or born.daemon != last.daemon


class _Judge:
    """One judgement, under way."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self.verdict = Verdict([], Counter(), Counter())

    def _broken(self, kind: str, text: str) -> None:
        self.verdict.violations.append(Violation(kind, text))

    def _let_pass(self, exemption: str) -> None:
        self.verdict.exemptions[exemption] += 1

    # ---------------------------------------------------------------- towards the guests

    def downward(self) -> None:
        """What the control side sent."""
        sent, told = _messages(self._evidence.control)
        for vm, programs in self._evidence.guests.items():
            for program, records in programs.items():
                place = Place(f"{program} of {vm}", records, vm)
                is_runner = program == self._evidence.runner
                mine = {
                    key: message
                    for key, message in sent.items()
                    if message.target == EVERYBODY or (is_runner and message.target == vm)
                }
                self._check_place(place, mine, marks=False)
                self._check_casts(place, mine, told)
                if is_runner:
                    self._check_calls(place, mine, told, vm)

    def _check_place(self, place: Place, mine: Mapping[Key, Sent], *, marks: bool) -> None:
        for key, copies in place.runs.items():
            self._check_content(place, key, copies[0][1], mine.get(key))
            if not marks:
                self._check_copies(place, key, copies)
        for sender, ran in place.by_sender.items():
            for (_, before), (_, after) in pairwise(ran):
                if after >= before:
                    continue
                if not marks and any(copy.marked for _, copy in place.runs[sender, after]):
                    self._let_pass(MEMORY_LOST)
                else:
                    self._broken(REORDERED, f"{place.name}: {sender} {after} ran after {before}")

    def _check_content(self, place: Place, key: Key, ran: Ran, sent: Sent | None) -> None:
        if sent is None:
            self._broken(INVENTED, f"{place.name}: nobody sent it {key}")
        elif ran.kind != sent.kind or ran.crc != checksum(payload_of(*key)):
            self._broken(INVENTED, f"{place.name}: {key} is not what was sent: {ran}")

    def _check_copies(self, place: Place, key: Key, copies: Sequence[tuple[int, Ran]]) -> None:
        for (first, ran), (second, copy) in pairwise(copies):
            text = f"{place.name}: {ran.kind} {key} ran again"
            # A daemon that dies after the program was born anew is seen by no birth.
            daemon_died = place.saw_another_daemon(first, second) or self._any(
                DAEMON_DEATHS, place.vm, ran.at_s, copy.at_s
            )
            if not (place.deaths(first, second) and daemon_died):
                self._broken(TWICE, text)
            elif ran.kind == CALL:
                self._broken(CALL_TWICE, text)
            elif copy.marked:
                self._let_pass(MEMORY_LOST)
            else:
                self._broken(CAST_UNMARKED, text)

    def _check_casts(
        self, place: Place, mine: Mapping[Key, Sent], told: Mapping[Key, Told]
    ) -> None:
        lost = Counter[tuple[str, Gap]]()
        for key, sent in mine.items():
            outcome = told.get(key)
            if sent.kind == CALL or key in place.runs or outcome is None:
                continue
            if outcome.outcome != CONFIRMED:
                continue  # whoever was told that it failed may send it again
            gap = place.gap_around(key)
            lost[sent.sender, gap] += 1
            # An agent that is away hears no fanouts: those may be many.
            too_many = lost[sent.sender, gap] > LOST_A_DEATH_MAX * gap.deaths
            if gap.deaths and (sent.kind == FANOUT or not too_many):
                self._let_pass(LOST_WITH_AGENT)
            elif sent.kind == FANOUT and self._any(
                DAEMON_DEATHS, place.vm, sent.at_s - AWAY_S, sent.at_s + AWAY_S
            ):
                self._let_pass(MISSED)
            else:
                self._broken(LOST, f"{place.name}: {sent.kind} {key}, sent at {sent.at_s:.1f}")

    def _check_calls(
        self, place: Place, mine: Mapping[Key, Sent], told: Mapping[Key, Told], vm: str
    ) -> None:
        for key, sent in mine.items():
            outcome = told.get(key)
            if sent.kind == CALL and outcome is not None:
                self._check_outcome(place, sent, outcome, vm)

    # ---------------------------------------------------------------- from the guests

    def upward(self) -> None:
        """What the guests sent to the service."""
        place = Place("the service", self._evidence.service)
        everything: dict[Key, Sent] = {}
        for vm, programs in self._evidence.guests.items():
            for records in programs.values():
                sent, told = _messages(records)
                everything |= sent
                for key, message in sent.items():
                    self._check_asked(place, message, told.get(key), vm)
                self._check_last_report(place, records, vm)
        self._check_place(place, everything, marks=True)

    def _check_asked(self, place: Place, sent: Sent, told: Told | None, vm: str) -> None:
        key = (sent.sender, sent.number)
        copies = [ran for _, ran in place.runs.get(key, [])]
        for ran in copies:
            if ran.vm != vm:
                self._broken(WRONG_IDENTITY, f"{key} of {vm} came as from {ran.vm!r}")
        self._check_marks(key, copies)
        if told is not None:
            self._check_outcome(place, sent, told, vm)

    def _check_marks(self, key: Key, copies: Sequence[Ran]) -> None:
        unmarked = sum(not ran.marked for ran in copies)
        for _ in range(len(copies) - max(unmarked, 1)):
            self._let_pass(SENT_AGAIN)
        if unmarked <= 1:
            return
        if copies[0].kind == REPORT and self._forgot_both(copies):
            self._let_pass(TOLD_AGAIN)
            return
        took_s = copies[-1].at_s - copies[0].at_s
        if took_s >= SETTLED_S and self._any(HOST_DEATHS, "", copies[0].at_s, copies[-1].at_s):
            self._let_pass(AWAY_TOO_LONG)
        else:
            self._broken(UNMARKED, f"the service: {copies[0].kind} {key}: {unmarked} without mark")

    def _forgot_both(self, copies: Sequence[Ran]) -> bool:
        """Since a report was told first, the guest's daemon and its host have lost their memory."""
        vm, during = copies[0].vm, (copies[0].at_s - SLACK_S, copies[-1].at_s)
        host_forgot = self._any(HOST_FORGETS, "", *during) or self._any(
            VM_IS_FORGOTTEN, vm, *during
        )
        return host_forgot and self._any(YOUNG_AFTER, vm, *during)

    def _check_last_report(self, place: Place, records: Sequence[Record], vm: str) -> None:
        """Services know in the end how a guest is called: by its last change that no boot undid."""
        last: Sent | None = None
        boot = ""
        for record in records:
            if isinstance(record, Born):
                last, boot = (last if record.boot == boot else None), record.boot
            elif isinstance(record, Sent) and record.kind == REPORT:
                last = record
        if last is not None and (last.sender, last.number) not in place.runs:
            self._broken(LOST, f"{last.sender} {last.number}: services never heard of it, of {vm}")

    # ---------------------------------------------------------------- what the sender was told

    def _check_outcome(self, place: Place, sent: Sent, told: Told, vm: str) -> None:
        key = (sent.sender, sent.number)
        ran = key in place.runs
        self.verdict.outcomes[told.outcome] += 1
        if told.outcome == WRONG:
            self._broken(WRONG_ANSWER, f"{key} at {told.at_s:.1f}")
        elif told.outcome in (ANSWERED, CONFIRMED):
            if not ran:
                self._vanished(place, sent, told)
        elif told.outcome in HAS_NOT_RUN:
            if ran:
                self._broken(REFUSED_BUT_RAN, f"{place.name}: {key} was told {told.outcome}")
            else:
                self._check_refusal(sent, told, vm)
        elif told.outcome in MAY_HAVE_RUN:
            self._check_no_answer(sent, told, vm)
        else:
            self._broken(NO_REASON, f"{key}: {told.outcome}")

    def _vanished(self, place: Place, sent: Sent, told: Told) -> None:
        """Told that it is done, and there is no record that it was."""
        key = (sent.sender, sent.number)
        if sent.kind == CALL and place.gap_around(key).deaths:
            self._let_pass(LOST_WITH_AGENT)  # the record, as the VM was reset
        else:
            self._broken(LOST, f"{place.name}: {key} was told {told.outcome}, and never ran")

    def _check_no_answer(self, sent: Sent, told: Told, vm: str) -> None:
        during = (vm, sent.at_s - SLACK_S, told.at_s + SLACK_S)
        if self._any(AGENT_DEATHS | DAEMON_DEATHS, *during):
            self._let_pass(AGENT_DIED)
        elif told.outcome == "AgentGone" and self._any(
            YOUNG_AFTER, vm, sent.at_s - YOUNG_S, told.at_s
        ):
            self._let_pass(IN_DOUBT)
        elif told.outcome != "AgentGone" and self._any(BROKER_DEATHS, "", *during[1:]):
            self._let_pass(BROKER_DIED)
        else:
            self._broken(
                LOST,
                f"call {sent.sender} {sent.number} of {vm}, sent at {sent.at_s:.1f}: "
                f"{told.outcome} at {told.at_s:.1f}, and neither agent nor broker had died",
            )

    def _check_refusal(self, sent: Sent, told: Told, vm: str) -> None:
        during = (vm, sent.at_s - START_S, told.at_s + SLACK_S)
        if self._any(AGENT_DEATHS | DAEMON_DEATHS, *during):
            self._let_pass(REFUSED)
        else:
            text = f"{sent.kind} {sent.sender} {sent.number} at {told.at_s:.1f}: {told.outcome}"
            self._broken(NO_REASON, text)

    def _any(self, kinds: frozenset[str], vm: str, from_s: float, until_s: float) -> bool:
        return any(
            fault.kind in kinds
            and fault.vm == vm
            and fault.began_s <= until_s
            and fault.ended_s + SLACK_S >= from_s
            for fault in self._evidence.faults
        )


def judge(evidence: Evidence) -> Verdict:
    """Every promise, held against everything that was recorded."""
    judging = _Judge(evidence)
    judging.downward()
    judging.upward()
    return judging.verdict


def missing(evidence: Evidence) -> int:
    """How many messages would be called lost if this were the end: to wait for."""
    return sum(violation.kind == LOST for violation in judge(evidence).violations)


def longest_wait_s(records: Iterable[Record]) -> float:
    """The longest that an answered call waited: callers ask one after another, so while a VM is
    silent one of them waits."""
    return max((wait_s for wait_s in _waits_s(records)), default=0.0)


def _waits_s(records: Iterable[Record]) -> Iterator[float]:
    asked: dict[Key, float] = {}
    for record in records:
        if isinstance(record, Sent) and record.kind == CALL:
            asked[record.sender, record.number] = record.at_s
        elif isinstance(record, Told) and record.outcome == ANSWERED:
            began_s = asked.get((record.sender, record.number))
            if began_s is not None:
                yield record.at_s - began_s


def _messages(records: Iterable[Record]) -> tuple[dict[Key, Sent], dict[Key, Told]]:
    sent: dict[Key, Sent] = {}
    told: dict[Key, Told] = {}
    for record in records:
        if isinstance(record, Sent):
            sent[record.sender, record.number] = record
        elif isinstance(record, Told):
            told[record.sender, record.number] = record
    return sent, told
