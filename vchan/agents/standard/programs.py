"""Programs of the services exec and shell: each outlives the stream that it was started over.

Rules of this file
1. Nothing waits: all of it runs on the agent's loop, every descriptor is non-blocking.
2. What a program has written is kept until who reads it has said that it is written where it is to
   be. When OUTPUT_BYTES_MAX of that are kept no more is read: the program waits, and nothing is
   left out, whether somebody is attached or not.
3. Of one program nobody but the one who attached last hears. Nobody attached for `detached_s`: it
   is ended, and forgotten.
4. What a connection says is checked; what holds for it is bounded: a connection that says too much,
   or nothing, is refused, and its program goes on.
"""

import errno
import os
import re
import signal
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from vchan.agents.processes import Child, Keeper, default_environment
from vchan.agents.standard.exec import require_run
from vchan.agents.standard.permissions import Rules
from vchan.agents.units import Unit
from vchan.errors import Rejected
from vchan.io.loop import Loop, Timer
from vchan.services.framing import BadFrame, FrameReader
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
    ProgramEnd,
    ProgramList,
    Refusal,
    Resized,
    Room,
    Running,
    SendSignal,
    Size,
    Start,
    TerminalWanted,
    Written,
    decode_asked,
    encode_program,
)
from vchan.session import printable

PROGRAMS_MAX: Final = 16
"""Of one service: programs that run, or have ended and whose end nobody has heard. At it: one that
has ended is forgotten; if all run: refused."""
CONNECTIONS_MAX: Final = 32
"""Of one service. At it: the next one is refused."""
FIRST_WORD_S: Final = 30.0
"""For a connection to say what it wants. At it: it is closed."""
UNSENT_BYTES_MAX: Final = 64 * 1024
"""For one connection, not taken by its socket. At it: no more output goes to it, and nothing is
read from it, until it is."""
LAST_WORD_S: Final = 10.0
"""For a connection to take what it was told last. At it: it is closed."""
END_GRACE_S: Final = 5.0
"""From the hang-up of a program that is to end, to its end by force."""
SHOWN_CHARS: Final = 200
"""Of a command, in the log and in lists."""
END_OF_INPUT: Final = b"\x04"
"""What a terminal has for it (VEOF)."""
END_OF_INPUT_S: Final = 0.25
"""Until a shell is told again that its input has ended; then after twice as long each time. A key
is only for who reads it: a shell that sets its terminal up, or heeds a signal just then, loses it,
and would wait for ever."""
END_OF_INPUT_TIMES: Final = 6
"""So often it is told again, in 16 s. At it: no more; what it runs may take the key for another
thing."""

_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}")


class KeptOutput:
    """What a program has written and nobody has yet, by offsets."""

    def __init__(self) -> None:
        self.start = 0  # written where it is to be, below this
        self.sent = 0  # said on the connection that is attached
        self._data = bytearray()

    @property
    def end(self) -> int:
        """The offset behind all of it."""
        return self.start + len(self._data)

    @property
    def is_full(self) -> bool:
        """No more is to be read."""
        return len(self._data) >= OUTPUT_BYTES_MAX

    def add(self, data: bytes) -> None:
        """The program has written this."""
        self._data += data

    def rewind(self) -> None:
        """Somebody else is attached: what is not written is said again."""
        self.sent = self.start

    def next_part(self) -> bytes:
        """The next bytes to say; b"": none, or none that there is room for."""
        room = self.start + OUTPUT_BYTES_MAX - self.sent
        first = self.sent - self.start
        part = bytes(self._data[first : first + min(room, DATA_BYTES_MAX)])
        self.sent += len(part)
        return part

    def written(self, offset: int) -> None:
        """All below this is where it is to be.

        Raises:
            BadFrame: It was not even sent.
        """
        if offset > self.sent:
            raise BadFrame("what was not sent cannot be written")
        if offset > self.start:
            del self._data[: offset - self.start]
            self.start = offset


class KeptProgram:
    """One program, and the connection that is attached to it, if one is.

    Args:
        is_shell: What it runs may read the end of its input, and it must all the same.
        forgotten: Told when it is over and nobody needs it any more.
        log: Told what becomes of it.

    Raises:
        OSError: There can be no process.
    """

    def __init__(
        self,
        loop: Loop,
        key: str,
        unit: Unit,
        terminal: TerminalWanted | None,
        detached_s: float,
        keeper: Keeper,
        forgotten: Callable[[str], object],
        log: Callable[[str], object],
        *,
        is_shell: bool = False,
    ) -> None:
        self.id = key
        self.command = _shown(unit.command)
        self.has_terminal = terminal is not None
        self.end: ProgramEnd | None = None
        self.attached: ProgramConnection | None = None
        self._loop = loop
        self._detached_s = detached_s
        self._forgotten = forgotten
        self._log = log
        self._is_shell = is_shell
        self._outputs = (KeptOutput(), KeptOutput())
        self._input = bytearray()
        self._input_taken = 0  # offset of what the program has taken
        self._input_ends = False
        self._input_said = False  # and all of it, by who is attached
        self._input_waits = False
        self._room_told = 0
        self._why = ""  # it is ended by us
        self._timer: Timer | None = None
        self._limit: Timer | None = None
        self._end_again: Timer | None = None
        self._child: Child | None = None
        self._stdin = -1
        self._start(unit, terminal, keeper)

    def _start(self, unit: Unit, terminal: TerminalWanted | None, keeper: Keeper) -> None:
        environment = default_environment(unit, "")
        ends: tuple[int, int] | None = None
        given = -1
        if terminal is not None:
            ends = os.openpty()
            _resize(ends[0], terminal.size)
            self._stdin = os.dup(ends[0])
        else:
            given, self._stdin = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._stdin, False)
        try:
            self._child = Child(
                self._loop,
                unit,
                environment,
                self._ended,
                on_output=partial(self._said, OUTPUT),
                on_error=None if ends else partial(self._said, ERROR),
                keeper=keeper,
                stdin=given,
                terminal=ends,
            )
        except OSError:
            self._close_input()
            raise
        finally:
            if given >= 0:
                os.close(given)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._child.pid if self._child is not None else 0

    def row(self) -> dict[str, Any]:
        """Of a list."""
        state = "attached" if self.attached is not None else "detached"
        if self.end is not None:
            state = f"{state}, ended"
        return {"id": self.id, "state": state, "command": self.command}

    def limit(self, time_s: float) -> None:
        """End it after so long."""
        text = f"it ran for {time_s:g} s ([exec] time_s_max)"
        self._limit = self._loop.call_later(time_s, partial(self.stop, text, signal.SIGTERM))

    # ---------------------------------------------------------------- who is attached

    def attach(self, connection: "ProgramConnection", size: Size | None = None) -> None:
        """From now on this connection has it."""
        if self.attached is not None:
            self.attached.refuse("somebody else has attached to it")
        self._cancel_timer()
        self.attached = connection
        self._input_said = False
        if self.has_terminal:  # whose end of input is a key, after which others come
            self._input_ends = False
        outputs = self._outputs
        for kept in outputs:
            kept.rewind()
        connection.tell(
            Running(
                self.id,
                self.has_terminal,
                self._input_taken + len(self._input),
                (outputs[0].start, outputs[1].start),
                self._detached_s,
            )
        )
        self._room_told = 0
        self._tell_room()
        if size is not None:
            self.resize(size)
        self.tell_more()

    def detach(self) -> None:
        """Nobody has it any more; it goes on."""
        if self.attached is None:
            return
        self.attached = None
        self._stop_saying_end()  # who attaches next has keys of his own
        self._log(f"{self.id}: nobody is attached")
        self._timer = self._loop.call_later(self._detached_s, self._left_alone)

    def _left_alone(self) -> None:
        self._timer = None
        if self.end is not None:
            self._forgotten(self.id)
        else:
            self.stop(f"nobody was attached for {self._detached_s:g} s", signal.SIGHUP)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def tell_more(self) -> None:
        """Say what there is to say and room for: output first, then the end."""
        connection = self.attached
        if connection is None:
            return
        for which, kept in ((OUTPUT, self._outputs[0]), (ERROR, self._outputs[1])):
            while connection.has_room and (part := kept.next_part()):
                connection.tell(OutputPart(which, part))
        if self.end is not None and all(kept.sent == kept.end for kept in self._outputs):
            connection.tell_end(self.end)

    # ---------------------------------------------------------------- its input

    def take_input(self, data: bytes) -> None:
        """Bytes for it to read.

        Raises:
            BadFrame: There is no room for them, or there were to be none.
        """
        if self._input_said:
            raise BadFrame("input behind its end")
        if self._input_ends:  # who was attached before has ended it: it reads no more
            self._input_taken += len(data)
            self._tell_room()
            return
        if len(self._input) + len(data) > INPUT_BYTES_MAX:
            raise BadFrame("more input than there is room for (INPUT_BYTES_MAX)")
        self._input += data
        self._write_input()

    def end_input(self) -> None:
        """There are no more."""
        self._input_said = True
        if not self._input_ends:
            self._input_ends = True
            if self.has_terminal:
                self._say_end(0)
            else:
                self._write_input()

    def _say_end(self, times: int) -> None:
        """To a terminal; and again."""
        self._end_again = None
        self._input += END_OF_INPUT
        self._write_input()
        if self._is_shell and times < END_OF_INPUT_TIMES and self._stdin >= 0:
            again = partial(self._say_end, times + 1)
            self._end_again = self._loop.call_later(END_OF_INPUT_S * 2.0**times, again)

    def _stop_saying_end(self) -> None:
        if self._end_again is not None:
            self._end_again.cancel()
            self._end_again = None

    def _write_input(self) -> None:
        if self._input_waits:
            return
        try:
            while self._input and self._stdin >= 0:
                self._drop_input(os.write(self._stdin, self._input))
        except BlockingIOError:
            self._input_waits = True
            self._loop.add_writer(self._stdin, self._input_writable)
        except OSError:  # it reads no more: what comes is taken, and dropped, as by a closed pipe
            self._close_input()
        if self._stdin < 0:
            self._drop_input(len(self._input))
        if self._input_ends and not self._input and not self.has_terminal:
            self._close_input()
        self._tell_room()

    def _drop_input(self, count: int) -> None:
        del self._input[:count]
        self._input_taken += count

    def _input_writable(self) -> None:
        self._input_waits = False
        self._loop.remove_writer(self._stdin)
        self._write_input()

    def _close_input(self) -> None:
        self._stop_saying_end()
        if self._stdin >= 0:
            if self._input_waits:
                self._input_waits = False
                self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    def _tell_room(self) -> None:
        """Say how much more may be sent, when that is worth a message."""
        room = self._input_taken + INPUT_BYTES_MAX
        if self.attached is not None and room - self._room_told >= INPUT_BYTES_MAX // 4:
            self._room_told = room
            self.attached.tell(Room(room))

    # ---------------------------------------------------------------- its output, its end

    def _said(self, which: int, data: bytes) -> None:
        kept = self._outputs[which - 1]
        kept.add(data)
        if kept.is_full and self._child is not None:
            self._child.listen(which - 1, to=False)
        self.tell_more()

    def written(self, which: int, offset: int) -> None:
        """Who is attached has written its output so far; raises as `KeptOutput.written`."""
        kept = self._outputs[which - 1]
        was_full = kept.is_full
        kept.written(offset)
        if was_full and not kept.is_full and self._child is not None:
            self._child.listen(which - 1, to=True)
        self.tell_more()

    def send_signal(self, number: int) -> None:
        """To all of its group."""
        if self._child is not None:
            self._child.signal(number)

    def resize(self, size: Size) -> None:
        """Its terminal has another size."""
        if self.has_terminal and self._stdin >= 0:
            _resize(self._stdin, size)

    def stop(self, why: str, number: int) -> None:
        """Have it end: by a signal, and then by force."""
        self._why = self._why or why
        self.send_signal(number)
        if number != signal.SIGKILL:
            if self._limit is not None:
                self._limit.cancel()
            again = partial(self.stop, why, signal.SIGKILL)
            self._limit = self._loop.call_later(END_GRACE_S, again)

    def _ended(self, status: int | None) -> None:
        self._child = None
        self._close_input()
        if self._limit is not None:
            self._limit.cancel()
        is_signal = status is not None and status < 0
        self.end = ProgramEnd(
            None if status is None or is_signal else status,
            -status if status is not None and is_signal else None,
            self._why,
        )
        self._log(f"{self.id}: ended with {status}{f': {self._why}' if self._why else ''}")
        self._cancel_timer()
        if self.attached is None:
            self._timer = self._loop.call_later(self._detached_s, self._left_alone)
        self.tell_more()

    def close(self) -> None:
        """The service ends, and the program with it."""
        self._cancel_timer()
        if self._limit is not None:
            self._limit.cancel()
        self.send_signal(signal.SIGKILL)
        if self._child is not None:
            self._child.release()
        self._close_input()


class ProgramConnection:
    """One byte stream's socket, until its end."""

    def __init__(self, loop: Loop, connected: socket.socket, service: "ProgramService") -> None:
        self._loop = loop
        self._socket = connected
        self._service = service
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._reads = False
        self._waits = False
        self._is_ending = False  # the last word was said
        self._is_closed = False
        self._program: KeptProgram | None = None
        self._left: KeptProgram | None = None  # what of its output is written is still heard
        self._timer = loop.call_later(FIRST_WORD_S, self.close)
        self._look()

    @property
    def has_room(self) -> bool:
        """More output may be said."""
        return not self._is_ending and len(self._unsent) < UNSENT_BYTES_MAX

    # ---------------------------------------------------------------- what it is told

    def tell(self, message: GuestWord) -> None:
        """Say this, soon."""
        if not self._is_ending:
            self._unsent += encode_program(message)
            self._write()

    def tell_end(self, end: ProgramEnd) -> None:
        """The program's end, once; `Forget` is the answer."""
        if self._program is not None and not self._is_ending:
            self.tell(end)
            self._is_ending = True

    def refuse(self, problem: str) -> None:
        """The last word."""
        self._last(Refusal(problem))

    def _last(self, message: GuestWord) -> None:
        self._leave_program()
        self.tell(message)
        self._is_ending = True
        self._timer.cancel()
        self._timer = self._loop.call_later(LAST_WORD_S, self.close)
        if not self._unsent:
            self._half_close()

    def _write(self) -> None:
        if self._waits or self._is_closed:
            return
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            self._waits = True
            self._loop.add_writer(self._socket.fileno(), self._writable)
        except OSError:
            self._unheard()
        self._look()

    def _unheard(self) -> None:
        """Who talked here has gone. What was said before is still there to be read: that output is
        written, perhaps, which is not to come again. Its end closes this."""
        self._unsent.clear()
        self._is_ending = True
        self._timer.cancel()
        self._timer = self._loop.call_later(LAST_WORD_S, self.close)

    def _writable(self) -> None:
        self._waits = False
        self._loop.remove_writer(self._socket.fileno())
        self._write()
        if self._is_closed:
            return
        if self._is_ending and not self._unsent and self._program is None:
            self._half_close()
        elif self._program is not None:
            self._program.tell_more()

    def _half_close(self) -> None:
        """All is said; who has heard it closes."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._loop.call_soon(self.close)

    # ---------------------------------------------------------------- what it says

    def _look(self) -> None:
        """Read, unless it does not take what it is told."""
        wants = not self._is_closed and len(self._unsent) < UNSENT_BYTES_MAX
        if wants and not self._reads:
            self._loop.add_reader(self._socket.fileno(), self._readable)
        elif self._reads and not wants:
            self._loop.remove_reader(self._socket.fileno())
        self._reads = wants

    def _readable(self) -> None:
        try:
            data = self._socket.recv(DATA_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            for frame in self._reader.feed(data):
                if not self._is_closed:
                    self._heed(decode_asked(frame))
        except BadFrame as error:
            self._service.log(f"a connection broke the protocol: {error}")
            self.refuse(f"broke the protocol: {error}")
        except Rejected as error:
            self._service.log(f"refused: {error}")
            self.refuse(str(error))

    def _heed(self, message: CommandWord) -> None:
        if self._program is None:
            if not self._is_ending:
                self._begin(message)
            elif isinstance(message, Written) and self._left and self._left.attached is None:
                self._left.written(*message)
            return  # what else it says behind the last word is nobody's
        program = self._program
        match message:
            case Input(data):
                program.take_input(data)
            case InputEnd():
                program.end_input()
            case Resized(size):
                program.resize(size)
            case SendSignal(number):
                program.send_signal(number)
            case Written(which, offset):
                program.written(which, offset)
            case Leave():
                self._left = program
                self._last(Left())
            case Forget():
                if program.end is None:
                    raise BadFrame("the program has not ended")
                self._program = None
                self._service.forget(program.id)
                self.close()
            case Start() | AttachTo() | ListPrograms():
                raise BadFrame(f"{type(message).__name__} where a program runs already")

    def _begin(self, message: CommandWord) -> None:
        self._timer.cancel()
        match message:
            case Start():
                self._program = self._service.start(message)
                self._program.attach(self)
            case AttachTo(key, size):
                self._program = self._service.find(key)
                self._program.attach(self, size)
                self._service.log(f"{self._program.id}: attached")
            case ListPrograms():
                self._last(ProgramList(self._service.rows()))
            case _:
                raise BadFrame(f"{type(message).__name__} where nothing runs")

    # ---------------------------------------------------------------- its end

    def _leave_program(self) -> None:
        program, self._program = self._program, None
        if program is not None and program.attached is self:
            program.detach()

    def close(self) -> None:
        """It is gone; its program goes on."""
        if self._is_closed:
            return
        self._is_closed = True
        self._timer.cancel()
        self._look()
        if self._waits:
            self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._leave_program()
        self._service.closed(self)


class ProgramService:
    """The service exec, or shell.

    Args:
        name: Its own.
        log: Told what is done, by whom it may.
    """

    def __init__(self, name: str, loop: Loop, rules: Rules, log: Callable[[str], object]) -> None:
        self._name = name
        self._loop = loop
        self._rules = rules
        self._log_line = log
        self._keeper = Keeper(loop, log)
        self._programs: dict[str, KeptProgram] = {}
        self._connections: set[ProgramConnection] = set()

    def log(self, text: str) -> None:
        """A line that says of which service it is."""
        self._log_line(f"{self._name} {text}")

    def serve(self, connected: socket.socket) -> None:
        """Take a connection."""
        if len(self._connections) >= CONNECTIONS_MAX:
            self.log(f"refused a connection: {CONNECTIONS_MAX} are open (CONNECTIONS_MAX)")
            connected.close()
            return
        self._connections.add(ProgramConnection(self._loop, connected, self))

    def closed(self, connection: ProgramConnection) -> None:
        """It is gone."""
        self._connections.discard(connection)

    # ---------------------------------------------------------------- programs

    def start(self, wanted: Start) -> KeptProgram:
        """Start a program.

        Raises:
            Rejected: The rules do not allow it, too many run, or it cannot be started.
        """
        unit, detached_s = self._allowed(wanted)
        self._make_room()
        key = os.urandom(8).hex()
        try:
            program = KeptProgram(
                self._loop,
                key,
                unit,
                wanted.terminal,
                detached_s,
                self._keeper,
                self.forget,
                self.log,
                is_shell=self._name == "shell",
            )
        except OSError as error:
            raise Rejected(f"there can be no process: {error.strerror}") from error
        self._programs[key] = program
        if self._name == "exec":
            program.limit(self._rules.exec.time_s_max)
        self.log(
            f"{key}: pid {program.pid}{f', user {unit.user}' if unit.user else ''}: "
            f"{program.command}"
        )
        return program

    def _allowed(self, wanted: Start) -> tuple[Unit, float]:
        extra: Mapping[str, str] = {}
        if wanted.terminal is not None:
            if not _TYPE.fullmatch(wanted.terminal.type):
                raise Rejected(f"{wanted.terminal.type[:64]!r} is no type of a terminal")
            extra = {"TERM": wanted.terminal.type}
        if self._name == "exec":
            words, variables = list(wanted.argv), dict(wanted.environment)
            directory = wanted.directory or "/"
            try:
                unit = require_run(self._rules, words, directory, variables, wanted.user)
            except ValueError as error:
                raise Rejected(str(error)) from error
            rules_s = self._rules.exec.detached_s
        else:
            unit = self._shell(wanted)
            rules_s = self._rules.shell.detached_s
        return unit._replace(environment={**extra, **unit.environment}), rules_s

    def _shell(self, wanted: Start) -> Unit:
        """The shell that the owner names, and nothing of how it is run but the user."""
        rules = self._rules.shell
        if wanted.argv or wanted.directory or wanted.environment:
            raise Rejected("a shell is run as the guest's owner has it: give no words of a command")
        user = wanted.user or (rules.users[0] if rules.users else "")
        if user and user not in rules.users:
            raise self._rules.refuse(f"user {user}", "is not allowed", "[shell] users")
        variables = {"SHELL": rules.command[0]}
        return Unit(
            "shell", rules.command, user=user, directory=_home_of(user), environment=variables
        )

    def _make_room(self) -> None:
        if len(self._programs) < PROGRAMS_MAX:
            return
        over = [each for each in self._programs.values() if each.end and each.attached is None]
        if not over:
            raise Rejected(f"{PROGRAMS_MAX} programs run already (PROGRAMS_MAX)")
        self.forget(over[0].id)

    def find(self, key: str) -> KeptProgram:
        """A program that runs, or whose end nobody has heard.

        Args:
            key: "": the only one to which nobody is attached.

        Raises:
            Rejected: There is none.
        """
        if key:
            if key not in self._programs:
                raise Rejected(f"nothing runs here as {key!r}; --list has what does")
            return self._programs[key]
        free = [each for each in self._programs.values() if each.attached is None]
        if len(free) != 1:
            found = f"{len(free)} are detached" if free else "none is detached"
            raise Rejected(f"{found}: say which; --list has them")
        return free[0]

    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """What runs here."""
        return tuple(program.row() for program in self._programs.values())

    def forget(self, key: str) -> None:
        """It is over, and nobody asks for it any more."""
        program = self._programs.pop(key, None)
        if program is not None:
            program.close()

    def close(self) -> None:
        """End everything."""
        for connection in list(self._connections):
            connection.close()
        for key in list(self._programs):
            self.forget(key)
        self._keeper.close()


def _home_of(user: str) -> str:
    """The directory in which a user's shell starts."""
    import pwd

    try:
        home = pwd.getpwnam(user).pw_dir if user else os.environ.get("HOME", "/")
    except KeyError:
        return "/"  # its start says that there is no such user
    return home if os.path.isdir(home) else "/"


def _resize(terminal: int, size: Size) -> None:
    import fcntl
    import struct
    import termios

    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
    except OSError as error:
        if error.errno != errno.EIO:  # it has ended
            raise


def _shown(words: tuple[str, ...]) -> str:
    text = " ".join(words)
    text = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
    return printable(text)
