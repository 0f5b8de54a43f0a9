"""One VM's byte streams: programs at this host's socket, joined with what runs in the guest.

Rules of this file
1. No I/O, no clock. `Switchboard` passes messages on; here it is decided who may open what, as
   whom, and what of it goes on record.
2. A stream that is opened or has ended is on record once for each daemon that it passed; one that
   is refused each time. It is asked about again whenever it goes on in a new session.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from vchan.errors import ConfigError, Rejected
from vchan.host.policy.audit_record import ENDED
from vchan.host.policy.rules import DEFAULT, Ask, Effect, Kind, Verdict, forward_ask
from vchan.host.vm.gate import Gate, StreamNote
from vchan.streams.messages import (
    BUSY,
    CLOSED,
    FORGOTTEN,
    REFUSED,
    RELEASED,
    SILENT,
    UNREACHABLE,
    UNSUPPORTED,
    VIOLATED,
    Open,
)
from vchan.streams.switchboard import Began, Over, Switchboard

REASONS: Final = {
    CLOSED: "closed",
    REFUSED: "refused",
    UNREACHABLE: "unreachable",
    BUSY: "busy",
    FORGOTTEN: "forgotten",
    VIOLATED: "violated",
    SILENT: "silent",
    UNSUPPORTED: "unsupported",
    RELEASED: "released",
}
"""Why a stream ended, in a word."""
TEXT_CHARS_MAX: Final = 200
"""Of a guest's own word on that, on record. At it: the rest is cut."""
FOR_CHARS_MAX: Final = 100
"""Of a program's word for whom it asks. At it: the rest is cut."""
HAS_ENDED: Final = "the program that opened it has ended"
"""Said to guests, and on record."""


class Program(NamedTuple):
    """A program at this host's socket that has streams.

    Attributes:
        wake: Called when there is something for it.
        gone: Called once, with the reason, when this host has nothing more for it: the VM has left.
    """

    uid: int
    pid: int
    wake: Callable[[], object]
    gone: Callable[[str], object]


class VmStreams:
    """One VM's byte streams, while its channel lives.

    Args:
        host: This host's name, told to the guest.
        gate: What programs may open.
        wake: Has written to the guest what there is for it.
    """

    def __init__(self, host: str, gate: Gate, wake: Callable[[], object]) -> None:
        self._host = host
        self._gate = gate
        self._wake = wake
        self._board = Switchboard(self._judge)
        self._programs: dict[int, Program] = {}
        self._direct: set[int] = set()  # who connect to the socket themselves: see `detach`
        self.guest_takes = False
        """The guest says so in its greeting: it may be sent messages of the family."""
        self.is_used = False
        """A program has been attached: there may be something for the guest."""
        self.counters = {
            "streams": 0,  # opened here
            "streams_refused": 0,
            "streams_reset": 0,  # ended with a reason
            "stream_bytes_in": 0,  # of streams that are over
            "stream_bytes_out": 0,
        }

    # ---------------------------------------------------------------- programs

    def attach(self, number: int, program: Program) -> None:
        """A new session with a program.

        Raises:
            LimitExceeded: Too many are attached.
        """
        self._board.attach(number)
        self.is_used = True
        self._programs[number] = program
        self._settle()

    def require(self, target: str, program: Program) -> None:
        """Refuse a program that could open nothing: so it hears of it before anybody connects to
        it.

        Raises:
            Rejected: The policy does not allow the target.
        """
        try:
            ask = forward_ask(target)
        except ConfigError as error:
            raise Rejected(str(error)) from error
        verdict = self._gate.forward(ask)
        if verdict.effect is not Effect.ALLOW:
            self._refuse(ask, verdict, b"", _who(program))
            raise Rejected(_denial(target, verdict))

    def detach(self, number: int, *, is_gone: bool = False) -> None:
        """A program is gone, or goes on elsewhere.

        Args:
            is_gone: It has closed its connection itself. Then it has ended: it closes none while it
                has streams. That is not so of one whose connection another process brings here
                (`ssh -L`): it says another pid than the kernel does.
        """
        has_ended = is_gone and number in self._direct
        self._board.detach(number, ended=HAS_ENDED if has_ended else "")
        self._settle()
        self._programs.pop(number, None)
        self._direct.discard(number)

    def from_program(self, number: int, data: bytes) -> None:
        """Take a message of a program's."""
        if number in self._programs:
            self._board.from_program(number, data)
            self._settle()

    def next_for_program(self, number: int) -> bytes | None:
        """The next message for it."""
        return self._board.next_for_program(number) if number in self._programs else None

    # ---------------------------------------------------------------- the guest

    def guest_connected(self, *, takes_streams: bool) -> None:
        """A new session with the guest."""
        self.guest_takes = takes_streams
        self._board.guest_connected(takes_streams=takes_streams)

    def from_guest(self, data: bytes) -> str | None:
        """Take a message of the guest's. What it has done wrong, if it has."""
        problem = self._board.from_guest(data)
        self._settle()
        return problem

    def next_for_guest(self) -> bytes | None:
        """The next message for the guest."""
        return self._board.next_for_guest()

    def policy_changed(self) -> None:
        """Other streams may be allowed now."""
        self._board.judge_again()
        self._settle()

    def end(self, reason: str) -> None:
        """The VM has ended, and its streams with it: programs are told."""
        self._board.reset_all(RELEASED, f"the VM has ended: {reason}")
        self._settle()

    # ---------------------------------------------------------------- what is allowed

    def _judge(self, number: int, opened: Open) -> Open | str:
        """See `Judge`. Of the facts that a program gives, for whom it asks is passed on."""
        program = self._programs[number]
        try:
            ask = forward_ask(opened.target)
        except ConfigError as error:
            return str(error)
        if _facts(opened.facts).get("pid") == program.pid:
            self._direct.add(number)
        verdict = self._gate.forward(ask)
        if verdict.effect is not Effect.ALLOW:
            self._refuse(ask, verdict, opened.id, _who(program, opened.facts))
            return _denial(opened.target, verdict)
        facts: dict[str, str | int] = {
            "host": self._host,
            "uid": program.uid,
            "pid": program.pid,
        }
        if for_whom := _for_whom(opened.facts):
            facts["for"] = for_whom
        return opened._replace(facts=json.dumps(facts, separators=(",", ":")))

    def _refuse(self, ask: Ask, verdict: Verdict, stream: bytes, by: str) -> None:
        self.counters["streams_refused"] += 1
        self._gate.streamed(StreamNote(ask, verdict.effect.value, verdict.rule, stream, by))

    # ---------------------------------------------------------------- what has happened

    def _settle(self) -> None:
        for event in self._board.take_events():
            match event:
                case Began(stream, number, target, facts):
                    self.counters["streams"] += 1
                    ask, by = _ask(target), _who(self._programs[number], facts)
                    rule = self._gate.forward(ask).rule
                    self._gate.streamed(StreamNote(ask, Effect.ALLOW.value, rule, stream, by))
                case Over():
                    self._note_end(event)
        for number in self._board.take_news():
            if number in self._programs:
                self._programs[number].wake()
        self._wake()

    def _note_end(self, over: Over) -> None:
        self.counters["streams_reset"] += bool(over.reason)
        self.counters["stream_bytes_in"] += over.down
        self.counters["stream_bytes_out"] += over.up
        by = _who(self._programs[over.number], over.facts)
        note = StreamNote(_ask(over.target), ENDED, "", over.id, by, _ending(over))
        self._gate.streamed(note._replace(into=over.down, out_of=over.up))

    def summary(self) -> dict[str, int]:
        """What `vchan status` shows."""
        return {
            **self.counters,
            "programs": len(self._programs),
            "open": self._board.open_streams,
            "dropped": self._board.dropped,
        }


def _ask(target: str) -> Ask:
    kind, _, name = target.partition(":")
    return Ask(Kind.FORWARD, kind, name)


def _who(program: Program, facts: str = "") -> str:
    """The kernel's word for the program; and its own, for whom it asks."""
    for_whom = _for_whom(facts)
    return f"uid {program.uid}, pid {program.pid}" + (f", for {for_whom}" if for_whom else "")


def _facts(text: str) -> dict[str, Any]:
    """A program's."""
    try:
        read = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _for_whom(facts: str) -> str:
    told = _facts(facts).get("for")
    if not isinstance(told, str):
        return ""
    return "".join(c if " " <= c <= "~" else "?" for c in told[:FOR_CHARS_MAX])


def _ending(over: Over) -> str:
    if over.reason is None:
        return "its program is gone from here"
    if not over.reason:
        return "both ends were done"
    text = over.text if len(over.text) <= TEXT_CHARS_MAX else f"{over.text[:TEXT_CHARS_MAX]}..."
    return f"{REASONS.get(over.reason, over.reason)}: {text}"


def _denial(target: str, verdict: Verdict) -> str:
    """What a program is told."""
    if verdict.rule == DEFAULT:
        return f"forward {target}: no rule of this host's policy allows it (default)"
    return f"forward {target}: denied by this host's policy, {verdict.rule}"
