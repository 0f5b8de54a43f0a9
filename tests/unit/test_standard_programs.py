"""Programs of the services exec and shell, native: real processes, pipes and terminals, and one who
talks to them as the operator's command does, or as nobody should."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rig import wait_until
from vchan.agents.standard import programs
from vchan.agents.standard.permissions import Exec, Rules, Shell
from vchan.agents.standard.programs import (
    CONNECTIONS_MAX,
    PROGRAMS_MAX,
    KeptOutput,
    ProgramService,
)
from vchan.io.loop import Loop
from vchan.services.framing import BadFrame
from vchan.services.programs import (
    DATA_BYTES_MAX,
    ERROR,
    INPUT_BYTES_MAX,
    OUTPUT,
    OUTPUT_BYTES_MAX,
    AttachTo,
    CommandWord,
    Forget,
    GuestWord,
    Input,
    InputEnd,
    Leave,
    Left,
    ListPrograms,
    OutputPart,
    ProgramDialogue,
    ProgramEnd,
    ProgramList,
    Refusal,
    Resized,
    Running,
    SendSignal,
    Size,
    Start,
    TerminalWanted,
    Written,
    encode_program,
)

WAIT_S = 20.0
SH = os.path.realpath("/bin/sh")
TERMINAL = TerminalWanted("xterm", Size(24, 80))
RULES = Rules(
    "test.toml",
    exec=Exec((SH, "/usr/bin/*", "/bin/*"), ("LANG",), ("/", "/tmp"), 60.0, detached_s=30.0),
    shell=Shell((SH,), detached_s=30.0),
)


class Guest:
    """A service on a loop of its own."""

    def __init__(self, name: str = "exec", rules: Rules = RULES) -> None:
        self.loop = Loop()
        self.lines: list[str] = []
        self.service = ProgramService(name, self.loop, rules, self.lines.append)
        self._thread = threading.Thread(target=self.loop.run, name="guest")
        self._callers: list[Caller] = []
        self._thread.start()

    def do(self, action: Callable[[], Any]) -> Any:
        """On the loop's thread."""
        done = threading.Event()
        results: list[Any] = []

        def act() -> None:
            results.append(action())
            done.set()

        self.loop.call_soon_threadsafe(act)
        assert done.wait(WAIT_S), "the loop has ended, or stands still"
        return results[0]

    def caller(self, *words: CommandWord) -> Caller:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.do(lambda: self.service.serve(theirs))
        self._callers.append(Caller(ours))
        self._callers[-1].say(*words)
        return self._callers[-1]

    def close(self) -> None:
        self.do(self.service.close)
        self.loop.stop()
        self._thread.join(WAIT_S)
        self.loop.close()
        for caller in self._callers:
            caller.close()


class Caller:
    """One who writes all output as it comes, unless he is told otherwise."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(WAIT_S)
        self.dialogue = ProgramDialogue()
        self.outputs = {OUTPUT: bytearray(), ERROR: bytearray()}
        self.words: list[GuestWord] = []
        self.writes = True
        self.is_over = False

    def say(self, *words: CommandWord) -> None:
        if words:
            self.socket.sendall(b"".join(map(encode_program, words)))
        # Those who say more than they may have their words counted all the same.
        self.dialogue._sent += sum(len(word.data) for word in words if isinstance(word, Input))

    def hear(self) -> None:
        """What comes next."""
        data = self.socket.recv(65536)
        self.is_over = not data
        for word in self.dialogue.receive(data) if data else ():
            self.words.append(word)
            if isinstance(word, OutputPart):
                self.outputs[word.which] += word.data
                if self.writes:
                    self.say(self.dialogue.writes(word.which, len(word.data)))

    def hear_until(self, reached: Callable[[], object]) -> None:
        while not reached():
            assert not self.is_over, self.words[-3:]
            self.hear()

    def wait_for(self, kind: type[Any]) -> Any:
        """The first word of this kind."""
        self.hear_until(lambda: any(isinstance(word, kind) for word in self.words))
        return next(word for word in self.words if isinstance(word, kind))

    def wait_said(self, text: bytes) -> None:
        self.hear_until(lambda: text in self.outputs[OUTPUT])

    def send(self, data: bytes) -> None:
        """As input, as there is room."""
        while data:
            self.hear_until(lambda: self.dialogue.room > 0)
            part = data[: min(self.dialogue.room, DATA_BYTES_MAX)]
            data = data[len(part) :]
            self.say(Input(part))

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def guests() -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(*args: Any) -> Guest:
        made.append(Guest(*args))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def guest(guests: Callable[..., Guest]) -> Guest:
    return guests()


@pytest.fixture
def shells(guests: Callable[..., Guest]) -> Guest:
    return guests("shell")


def sh(script: str, **more: Any) -> Start:
    return Start((SH, "-c", script), **more)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pid_of(guest: Guest) -> int:
    pids = guest.do(lambda: [each.pid for each in guest.service._programs.values()])
    assert len(pids) == 1
    return int(pids[0])


def wait(reached: Callable[[], object]) -> None:
    wait_until(
        lambda: bool(reached()),
        timeout_s=WAIT_S,
        interval_s=0.01,
        failure=lambda: "it did not happen",
    )


# ---------------------------------------------------------------- one program


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("exit 0", ProgramEnd(0, None)),
        ("exit 200", ProgramEnd(200, None)),
        ("kill -9 $$", ProgramEnd(None, 9)),
        ("exec /nowhere", ProgramEnd(127, None)),
    ],
)
def test_a_program_and_its_end(guest: Guest, script: str, end: ProgramEnd) -> None:
    caller = guest.caller(sh(f"echo out; echo err >&2; {script}"))
    assert caller.wait_for(ProgramEnd) == end
    assert caller.outputs[OUTPUT] == b"out\n"
    assert caller.outputs[ERROR].startswith(b"err\n")
    assert guest.do(lambda: len(guest.service.rows())) == 1
    caller.say(Forget())
    caller.hear_until(lambda: caller.is_over)
    assert guest.do(guest.service.rows) == ()


def test_bytes_pass_as_they_are_and_input_has_an_end(guest: Guest) -> None:
    given = os.urandom(3 << 20)
    caller = guest.caller(Start(("/usr/bin/cat",)))
    caller.send(given)
    caller.say(InputEnd())
    assert caller.wait_for(ProgramEnd) == ProgramEnd(0, None)
    assert bytes(caller.outputs[OUTPUT]) == given


def test_input_that_nobody_reads_holds_up_no_signal(guest: Guest) -> None:
    caller = guest.caller(sh("trap 'exit 7' INT; echo ready; while :; do sleep 0.05; done"))
    caller.wait_said(b"ready")
    caller.hear_until(lambda: caller.dialogue.room == INPUT_BYTES_MAX)
    caller.send(bytes(INPUT_BYTES_MAX))
    caller.say(SendSignal(signal.SIGINT))
    assert caller.wait_for(ProgramEnd) == ProgramEnd(7, None)


def test_who_reads_no_input_is_given_all_of_it(guest: Guest) -> None:
    caller = guest.caller(sh("exec <&-; echo ready; sleep 0.2; exit 3"))
    caller.wait_said(b"ready")
    caller.send(bytes(5 * INPUT_BYTES_MAX))
    assert caller.wait_for(ProgramEnd) == ProgramEnd(3, None)


def test_directory_environment_and_their_permission(guest: Guest) -> None:
    start = sh("pwd; echo $LANG", directory="/tmp", environment={"LANG": "xx"})
    caller = guest.caller(start)
    caller.wait_for(ProgramEnd)
    assert caller.outputs[OUTPUT] == b"/tmp\nxx\n"
    for wrong, what in (
        (sh("", directory="/etc"), "[exec] directories"),
        (sh("", environment={"PATH": "/"}), "[exec] environment"),
        (sh("", user="nobody"), "[exec] users"),
        (Start(("/sbin/nowhere",)), "[exec] allow"),
        (Start(()), "argv: expected a list"),
        (sh("", terminal=TerminalWanted("../x", Size(1, 1))), "no type of a terminal"),
    ):
        assert what in guest.caller(wrong).wait_for(Refusal).problem


def test_the_owner_says_how_long_it_may_run(
    guests: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "END_GRACE_S", 0.1)
    guest = guests("exec", RULES._replace(exec=RULES.exec._replace(time_s_max=2.0)))
    # Long enough that the shell has set its trap by then, on a busy machine too.
    caller = guest.caller(sh("trap '' TERM; echo on; while :; do sleep 0.05; done"))
    end = caller.wait_for(ProgramEnd)
    assert (end.status, end.signal) == (None, 9)
    assert end.text == "it ran for 2 s ([exec] time_s_max)"


# ---------------------------------------------------------------- a terminal


def test_a_shell_has_a_terminal_that_changes_its_size(shells: Guest) -> None:
    caller = shells.caller(Start(terminal=TERMINAL))
    caller.send(b"stty -echo; tty; echo $TERM; stty size; echo don''e\n")
    caller.wait_said(b"done")
    said = bytes(caller.outputs[OUTPUT]).replace(b"\r", b"")
    assert b"/dev/pts/" in said and b"xterm\n24 80\n" in said
    caller.say(Resized(Size(50, 132)))
    caller.send(b"stty size; echo agai''n\n")
    caller.wait_said(b"again")
    assert b"50 132" in caller.outputs[OUTPUT]
    caller.send(b"exit 5\n")
    assert caller.wait_for(ProgramEnd) == ProgramEnd(5, None)


def test_ctrl_c_reaches_what_is_in_the_foreground(guest: Guest) -> None:
    caller = guest.caller(sh("echo ready; exec /usr/bin/sleep 60", terminal=TERMINAL))
    caller.wait_said(b"ready")
    caller.send(b"\x03")
    assert caller.wait_for(ProgramEnd) == ProgramEnd(None, signal.SIGINT)


def test_the_end_of_input_is_one_for_a_terminal(shells: Guest) -> None:
    caller = shells.caller(Start(terminal=TERMINAL))
    caller.wait_for(Running)
    caller.say(InputEnd())
    assert caller.wait_for(ProgramEnd).status == 0


def test_a_shells_end_of_input_is_not_lost_to_who_reads_it_first(shells: Guest) -> None:
    """A terminal has a key for it, and who reads that first has it: what the shell runs, or nobody,
    when it is just setting its terminal up or has a signal to heed."""
    caller = shells.caller(Start(terminal=TERMINAL))
    caller.send(b"cat; echo o''ne; cat; echo t''wo\n")
    caller.say(InputEnd())
    assert caller.wait_for(ProgramEnd).status == 0
    assert b"one\r\n" in caller.outputs[OUTPUT] and b"two\r\n" in caller.outputs[OUTPUT]


@pytest.mark.parametrize("goes_first", [True, False])
def test_the_end_of_ones_input_is_not_that_of_who_attaches_next(
    shells: Guest, goes_first: bool
) -> None:
    caller = shells.caller(Start(terminal=TERMINAL))
    key = caller.wait_for(Running).id
    program = shells.do(lambda: shells.service.find(key))

    def until(reached: Callable[[], bool]) -> None:
        wait_until(lambda: bool(shells.do(reached)), timeout_s=WAIT_S, interval_s=0.01, failure=str)

    caller.send(b"stty -icanon -echo; echo rea''dy; exec sleep 60\n")
    caller.wait_said(b"ready")
    caller.say(InputEnd())
    until(lambda: program._end_again is not None)
    if goes_first:
        caller.close()
        until(lambda: program.attached is None)
        assert shells.do(lambda: program._end_again) is None
    shells.caller(AttachTo(key)).wait_for(Running)
    assert shells.do(lambda: program._end_again) is None


def test_who_reads_no_end_of_input_is_told_of_it_a_few_times(
    shells: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "END_OF_INPUT_S", 0.01)
    caller = shells.caller(Start(terminal=TERMINAL))
    caller.send(b"stty -icanon -echo; echo rea''dy; timeout 1.5 od -An -v -c; exit 0\n")
    caller.wait_said(b"ready")
    caller.say(InputEnd())
    caller.wait_for(ProgramEnd)
    assert caller.outputs[OUTPUT].count(b"004") <= 1 + programs.END_OF_INPUT_TIMES


def test_a_shell_is_run_as_its_owner_has_it(shells: Guest) -> None:
    for wrong in (sh("id"), Start(directory="/tmp"), Start(environment={"LANG": "C"})):
        assert "as the guest's owner has it" in shells.caller(wrong).wait_for(Refusal).problem
    refusal = shells.caller(Start(terminal=TERMINAL, user="nobody")).wait_for(Refusal)
    assert "[shell] users" in refusal.problem


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_user_whom_the_owner_allows(guests: Callable[..., Guest]) -> None:
    shell = RULES.shell._replace(users=("nobody", "root"))
    guest = guests("shell", RULES._replace(shell=shell))
    for user, name in (("", b"nobody"), ("root", b"root")):
        caller = guest.caller(Start(terminal=TERMINAL, user=user))
        caller.send(b"stty -echo; echo I am $(id -un) $USER.; exit\n")
        caller.wait_for(ProgramEnd)
        assert b"I am %s %s." % (name, name) in caller.outputs[OUTPUT]


# ---------------------------------------------------------------- who is attached


def test_what_was_written_does_not_come_again_and_the_rest_comes_once(guest: Guest) -> None:
    script = "i=0; while [ $i -lt 60000 ]; do echo line $i; i=$((i+1)); done"
    expected = b"".join(b"line %d\n" % number for number in range(60000))
    first = guest.caller(sh(script))
    first.hear_until(lambda: len(first.outputs[OUTPUT]) > 100_000)
    # The last of it is said and not written: this one ends without a word.
    first.writes = False
    written = len(first.outputs[OUTPUT])
    first.hear_until(lambda: len(first.outputs[OUTPUT]) > written)
    first.close()
    second = guest.caller(AttachTo(first.wait_for(Running).id))
    running = second.wait_for(Running)
    assert running.outputs[0] == written
    assert second.wait_for(ProgramEnd) == ProgramEnd(0, None)
    assert bytes(first.outputs[OUTPUT][:written]) + bytes(second.outputs[OUTPUT]) == expected


def test_a_program_that_nobody_reads_waits_and_loses_nothing(guest: Guest) -> None:
    first = guest.caller(Start(("/usr/bin/seq", "1", "300000")))
    first.writes = False
    running = first.wait_for(Running)
    first.hear_until(lambda: len(first.outputs[OUTPUT]) >= OUTPUT_BYTES_MAX)
    first.say(Leave())
    first.wait_for(Left)
    program = guest.do(lambda: guest.service.find(running.id))
    # Another one like it comes to its end meanwhile, on the same loop.
    assert guest.caller(Start(("/usr/bin/seq", "1", "300000"))).wait_for(ProgramEnd).status == 0
    kept = program._outputs[0]
    assert OUTPUT_BYTES_MAX <= len(kept._data) <= OUTPUT_BYTES_MAX + 2 * DATA_BYTES_MAX
    assert program.end is None and is_running(program.pid)
    second = guest.caller(AttachTo(""))
    assert second.wait_for(ProgramEnd).status == 0
    expected = b"".join(b"%d\n" % number for number in range(1, 300001))
    assert bytes(second.outputs[OUTPUT]) == expected


def test_who_has_left_is_still_heard_of_what_he_has_written(guest: Guest) -> None:
    first = guest.caller(sh("echo one; read line; echo $line"))
    first.writes = False
    first.wait_said(b"one\n")
    first.say(Leave())
    first.wait_for(Left)
    first.say(Written(OUTPUT, 4))
    program = guest.do(lambda: guest.service.find(""))
    wait(lambda: guest.do(lambda: program._outputs[0].start) == 4)
    second = guest.caller(AttachTo(""))
    second.send(b"two\n")
    second.wait_for(ProgramEnd)
    assert second.outputs[OUTPUT] == b"two\n"


def test_who_has_gone_is_still_heard_of_what_he_has_written(guest: Guest) -> None:
    first = guest.caller(sh("echo one; read line; echo $line"))
    first.writes = False
    first.wait_said(b"one\n")
    key = first.wait_for(Running).id
    program = guest.do(lambda: guest.service.find(key))
    there, here = os.pipe()

    def go_as_more_is_said() -> None:
        guest.loop.remove_reader(there)
        first.say(Written(OUTPUT, 4))
        first.socket.shutdown(socket.SHUT_RD)  # a child on its way to exec may have it still
        first.close()
        program.attached.tell(OutputPart(ERROR, b"to nobody"))

    # In the turn of a descriptor, as output is read: what was said comes to light later.
    guest.do(lambda: guest.loop.add_reader(there, go_as_more_is_said))
    os.write(here, b"!")
    wait(lambda: guest.do(lambda: program.attached) is None)
    os.close(there)
    os.close(here)
    second = guest.caller(AttachTo(""))
    second.send(b"two\n")
    second.wait_for(ProgramEnd)
    assert second.outputs[OUTPUT] == b"two\n"


def test_who_attaches_last_has_it(guest: Guest) -> None:
    first = guest.caller(sh("echo here; read line"))
    first.wait_said(b"here")
    key = first.wait_for(Running).id
    second = guest.caller(AttachTo(key))
    second.wait_for(Running)
    assert "somebody else" in first.wait_for(Refusal).problem
    first.hear_until(lambda: first.is_over)
    second.send(b"\n")
    assert second.wait_for(ProgramEnd) == ProgramEnd(0, None)


def test_an_end_that_nobody_has_heard_is_kept(guest: Guest) -> None:
    first = guest.caller(sh("echo said; exit 4"))
    first.wait_for(ProgramEnd)
    first.close()
    wait(lambda: "detached" in guest.do(guest.service.rows)[0]["state"])
    second = guest.caller(AttachTo(""))
    assert second.wait_for(ProgramEnd) == ProgramEnd(4, None)
    assert second.outputs[OUTPUT] == b"", "that was written"


def test_what_runs_is_listed(guest: Guest) -> None:
    caller = guest.caller(sh("echo here; read line"))
    caller.wait_said(b"here")
    (row,) = guest.caller(ListPrograms()).wait_for(ProgramList).rows
    assert row["id"] == caller.wait_for(Running).id
    assert row["state"] == "attached" and row["command"].startswith(f"{SH} -c echo here")
    assert "none is detached" in guest.caller(AttachTo("")).wait_for(Refusal).problem
    assert "nothing runs here as 'x'" in guest.caller(AttachTo("x")).wait_for(Refusal).problem


def test_nobody_for_too_long_is_an_end(
    guests: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "END_GRACE_S", 0.1)
    guest = guests("exec", RULES._replace(exec=RULES.exec._replace(detached_s=0.2)))
    caller = guest.caller(sh("trap '' HUP; echo here; while :; do sleep 0.05; done"))
    caller.wait_said(b"here")
    pid = pid_of(guest)
    caller.close()
    wait(lambda: not is_running(pid))
    wait(lambda: guest.do(guest.service.rows) == ())
    assert any("nobody was attached for 0.2 s" in line for line in guest.lines)


def test_all_of_it_ends_with_the_agent() -> None:
    guest = Guest()
    caller = guest.caller(sh("echo here; sleep 60"))
    caller.wait_said(b"here")
    pid = pid_of(guest)
    guest.close()
    wait(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


# ---------------------------------------------------------------- who says what nobody should


@pytest.mark.parametrize(
    "words",
    [
        (Input(b"x"),),
        (Written(OUTPUT, 1),),
        (sh("read x"), sh("read x")),
        (sh("read x"), Forget()),
        (sh("read x"), Written(OUTPUT, 1)),
        (sh("read x"), InputEnd(), Input(b"x")),
    ],
    ids=lambda words: "-".join(type(word).__name__ for word in words[:4]),
)
def test_who_breaks_the_protocol_is_refused(guest: Guest, words: tuple[CommandWord, ...]) -> None:
    caller = guest.caller(*words)
    assert "broke the protocol" in caller.wait_for(Refusal).problem


def test_more_input_than_there_is_room_for_is_refused(guest: Guest) -> None:
    caller = guest.caller(sh("sleep 60"))
    caller.hear_until(lambda: caller.dialogue.room > 0)
    with contextlib.suppress(ConnectionError):
        caller.say(*[Input(bytes(DATA_BYTES_MAX))] * 20)
    assert "INPUT_BYTES_MAX" in caller.wait_for(Refusal).problem


def test_bytes_that_are_no_messages_are_refused(guest: Guest) -> None:
    caller = guest.caller()
    caller.socket.sendall(b"\xff" * 100)
    assert "broke the protocol" in caller.wait_for(Refusal).problem


def test_who_says_nothing_is_not_waited_for(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "FIRST_WORD_S", 0.05)
    caller = guest.caller()
    caller.hear_until(lambda: caller.is_over)
    assert caller.words == []


def test_who_does_not_close_is_closed(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "LAST_WORD_S", 0.05)
    guest.caller(ListPrograms()).wait_for(ProgramList)
    wait(lambda: not guest.do(lambda: guest.service._connections))


def test_connections_are_bounded(guest: Guest) -> None:
    callers = [guest.caller() for _ in range(CONNECTIONS_MAX)]
    more = guest.caller()
    more.hear_until(lambda: more.is_over)
    callers[0].close()
    wait(lambda: guest.do(lambda: len(guest.service._connections)) < CONNECTIONS_MAX)
    assert guest.caller(ListPrograms()).wait_for(ProgramList).rows == ()


def test_programs_are_bounded_and_what_has_ended_makes_room(guest: Guest) -> None:
    callers = [guest.caller(sh("echo here; read line")) for _ in range(PROGRAMS_MAX)]
    for caller in callers:
        caller.wait_said(b"here")
    refusal = guest.caller(sh("true")).wait_for(Refusal)
    assert refusal.problem == f"{PROGRAMS_MAX} programs run already (PROGRAMS_MAX)"
    callers[3].send(b"\n")
    callers[3].wait_for(ProgramEnd)
    callers[3].close()
    wait(lambda: any("detached" in row["state"] for row in guest.do(guest.service.rows)))
    assert guest.caller(sh("true")).wait_for(ProgramEnd) == ProgramEnd(0, None)


def test_who_asks_and_does_not_read_is_not_heard_on(guest: Guest) -> None:
    """What is for him is bounded, and others are served."""
    caller = guest.caller(sh("exec /usr/bin/yes"))
    caller.wait_for(Running)
    (connection,) = guest.do(lambda: list(guest.service._connections))
    wait(lambda: guest.do(lambda: len(connection._program._outputs[0]._data)) >= OUTPUT_BYTES_MAX)
    held = guest.do(lambda: len(connection._unsent))
    assert held <= programs.UNSENT_BYTES_MAX + DATA_BYTES_MAX + 64
    assert guest.caller(sh("exit 6")).wait_for(ProgramEnd) == ProgramEnd(6, None)


# ---------------------------------------------------------------- what is kept


def test_kept_output_by_offsets() -> None:
    kept = KeptOutput()
    kept.add(b"abc")
    assert kept.next_part() == b"abc" and kept.next_part() == b""
    kept.written(2)
    kept.written(1)  # late: it is known
    assert (kept.start, kept.end, kept.sent) == (2, 3, 3)
    with pytest.raises(BadFrame):
        kept.written(4)
    kept.rewind()
    assert kept.next_part() == b"c"
    kept.add(bytes(OUTPUT_BYTES_MAX + 100))
    assert kept.is_full
    parts = b"".join(iter(kept.next_part, b""))
    assert len(parts) == OUTPUT_BYTES_MAX - 1, "no more than the other end has room for"
    kept.written(3)
    assert len(kept.next_part()) == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("program writes", "guest says", "operator writes", "he is cut off")),
            st.integers(1, 40_000),
        ),
        max_size=60,
    )
)
def test_whatever_happens_the_operator_has_written_each_byte_once(
    steps: list[tuple[str, int]],
) -> None:
    kept = KeptOutput()
    dialogue = running_dialogue(0)
    made = bytearray()  # by the program
    shown = bytearray()  # where it is to be
    heard: list[bytes] = []  # by this command, and not yet written
    for what, size in steps:
        if what == "program writes" and not kept.is_full:
            data = bytes((len(made) + at) % 251 for at in range(size))
            made += data
            kept.add(data)
        elif what == "guest says" and (part := kept.next_part()):
            dialogue.receive(encode_program(OutputPart(OUTPUT, part)))
            heard.append(part)
        elif what == "operator writes" and heard:
            part = heard.pop(0)
            shown += part
            kept.written(dialogue.writes(OUTPUT, len(part)).offset)
        elif what == "he is cut off":
            kept.rewind()
            dialogue = running_dialogue(kept.start)
            heard.clear()
        assert made[: len(shown)] == shown
        assert kept.end == len(made) and kept.start == len(shown)
        assert len(kept._data) < OUTPUT_BYTES_MAX + 40_000


def running_dialogue(start: int) -> ProgramDialogue:
    dialogue = ProgramDialogue()
    dialogue.receive(encode_program(Running("00", False, 0, (start, 0), 1.0)))
    return dialogue
