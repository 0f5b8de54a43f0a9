"""exec, shell: a program in a VM, with this command's input, output, signals and terminal.

Rules of this file
1. The program is the guest's: this command can end, or be killed, and another one goes on with it
   (--attach). What was written here does not come again; what was not, comes.
2. Whatever the guest says, the terminal is given back as it was.
3. Statuses are as ssh's: the program's own, 128 and the signal's number, or EXIT_OURS.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from vchan.cli.failures import EXIT_OK, EXIT_OURS, explain
from vchan.cli.output import printable, say, show_rows
from vchan.cli.terminal import (
    HELP,
    Escapes,
    Modes,
    OwnTerminal,
    read_some,
    size_of,
    wanted,
    write_all,
)
from vchan.cli.way import Carried, add_way, find
from vchan.errors import ConfigError, VchanError
from vchan.io.loop import Loop
from vchan.io.targets import SERVICE, Target
from vchan.services.framing import BadFrame
from vchan.services.programs import (
    DATA_BYTES_MAX,
    ERROR,
    OUTPUT,
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
    Room,
    Running,
    SendSignal,
    Start,
    encode_program,
    problem_of,
)
from vchan.streams import Ended, Fault, StreamEvent

LEAVE_S: Final = 2.0
"""For the guest to hear that this command leaves. At it: it finds out by asking; the program goes
on either way."""
INTERRUPTS_MAX: Final = 3
"""Ctrl-C goes to the program. At it, within INTERRUPTS_S: this command leaves."""
INTERRUPTS_S: Final = 2.0
"""So fast nobody presses Ctrl-C who is content with what it does."""
OUTPUT_END_S: Final = 5.0
"""For a program to end whose output nobody reads any more. At it: this command leaves."""
COLUMNS: Final = ("id", "state", "command")

_STATUSES: Final = """\
exit status: the program's own; 128 and the number of the signal that ended it; 255 if there was no
program, or its end is not known
"""

_EXEC_EPILOG: Final = (
    """\
The policy of this host (kind forward) and the guest's own configuration (option forward) both have
to allow service:exec, and the guest's standard agent the program: [exec] in its standard.toml,
which also says how long it may run (time_s_max: a minute, if it does not say).

The program has this command's standard input, output and error. Ctrl-C and the signals TERM, QUIT,
USR1 and USR2 go to it; the third Ctrl-C in a row leaves it, and so does TERM where it has a
terminal. It goes on through restarts and migrations as a forward does, and when this command is
left, killed or cut off: --attach has the rest of its output, and its status.

  vchan exec VM -- /usr/bin/journalctl -f
  vchan exec VM -- /usr/bin/tar -C /srv -c . > srv.tar
  vchan exec VM -t -- /usr/bin/top

"""
    + _STATUSES
)

_SHELL_EPILOG: Final = (
    """\
The policy of this host (kind forward) and the guest's own configuration (option forward) both have
to allow service:shell, and the guest's standard agent must have one: [shell] in its standard.toml.

Enter ~ . leaves the shell, which goes on; Enter ~ ? says what else there is.

  vchan shell VM
  vchan shell VM --list
  vchan shell VM --attach

"""
    + _STATUSES
)


def add_commands(commands: Any) -> None:
    """The commands of this group."""
    execute = commands.add_parser(
        "exec",
        help="run a program in a VM, with input, output, signals and status",
        description="Run a program in a VM.",
        epilog=_EXEC_EPILOG,
    )
    add_way(execute)
    words = execute.add_argument(
        "argv", nargs="+", metavar="CMD", help="the program's path in the guest, and its words"
    )
    words.required = (
        False  # none, to attach or to list; with nargs="*" options could not precede it
    )
    execute.add_argument(
        "-t", "--terminal", action="store_true", help="with a terminal, as of a shell"
    )
    execute.add_argument(
        "-n", "--no-input", action="store_true", help="with no input: what comes here is not read"
    )
    execute.add_argument(
        "-d", "--directory", default="", metavar="PATH", help="where it is run in the guest [/]"
    )
    execute.add_argument(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of its environment; may be given again",
    )
    execute.set_defaults(run=_exec)
    shell = commands.add_parser(
        "shell",
        help="a shell in a VM, which outlives what it was started over",
        description="Have a shell in a VM.",
        epilog=_SHELL_EPILOG,
    )
    add_way(shell)
    shell.set_defaults(run=_shell)
    for parser in (execute, shell):
        parser.add_argument(
            "-u", "--user", default="", metavar="USER", help="who it is run as [the guest's choice]"
        )
        parser.add_argument(
            "--attach",
            nargs="?",
            const="",
            metavar="ID",
            help="go on with one that runs; without ID, with the only one that nobody has",
        )
        parser.add_argument("--list", action="store_true", help="say which run")


# ---------------------------------------------------------------- what is meant


def _exec(options: argparse.Namespace) -> int:
    argv = options.argv or []
    if not argv and options.attach is None and not options.list:
        raise ConfigError("vchan exec", "expected a program: vchan exec VM -- /path/to/program")
    if argv and (options.attach is not None or options.list):
        raise ConfigError(repr(argv[0]), "expected no program with --attach or --list")
    start = Start(
        tuple(argv),
        wanted((0, 1, 2)) if options.terminal else None,
        options.directory,
        _environment(options.env),
        options.user,
    )
    return _run(options, "exec", start, is_deaf=options.no_input)


def _shell(options: argparse.Namespace) -> int:
    return _run(options, "shell", Start(terminal=wanted((0, 1, 2)), user=options.user))


def _environment(words: list[str]) -> Mapping[str, str]:
    variables = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ConfigError(f"--env {word!r}", "expected NAME=VALUE")
        variables[name] = value
    return variables


def _run(options: argparse.Namespace, service: str, start: Start, *, is_deaf: bool = False) -> int:
    if options.list and options.attach is not None:
        raise ConfigError("--list", "expected no --attach with it")
    if options.format is not None and not options.list:
        raise ConfigError("--format", "is for --list: a program's output has no other shape")
    first: Start | AttachTo | ListPrograms = start
    if options.list:
        first = ListPrograms()
    elif options.attach is not None:
        first = AttachTo(options.attach, size_of((0, 1, 2)))
    problem = problem_of(first)
    if problem:
        raise ConfigError(f"vchan {service}", f"the guest would not take it: {problem}")
    try:
        uuid, sockets = find(options.vm, [options.socket, *options.also], options.timeout)
        with Loop() as loop:
            remote = Remote(loop, options.vm, service, first, is_deaf=is_deaf)
            remote.run(uuid, sockets, options.look)
    except VchanError as error:
        say(explain(error))
        return EXIT_OURS
    if remote.rows is not None:
        show_rows(options, remote.rows, COLUMNS)
    return remote.status


# ---------------------------------------------------------------- one program


class Remote:
    """A program in a VM, while this command has it.

    Args:
        name: The VM's, as the operator calls it.
        service: exec or shell.
        first: What is wanted.
        is_deaf: It is given no input.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        service: str,
        first: Start | AttachTo | ListPrograms,
        *,
        is_deaf: bool = False,
    ) -> None:
        self.status = EXIT_OURS
        self.rows: list[dict[str, str]] | None = None
        self._loop = loop
        self._name = name
        self._service = service
        self._first = first
        self._is_deaf = is_deaf
        self._dialogue = ProgramDialogue()
        self._socket, self._joined = socket.socketpair()
        self._socket.setblocking(False)
        self._unsent = bytearray()
        self._waits = False
        self._terminal = OwnTerminal(0)
        self._escapes: Escapes | None = None
        self._modes = {fd: Modes() for fd in (OUTPUT, ERROR) if os.isatty(fd)}
        self._source = Source(loop, self._read, self._unreadable)
        self._pending = b""  # of the input, not sent
        self._sinks = {
            fd: Sink(loop, fd, partial(self._written, fd), partial(self._unwritable, fd))
            for fd in (OUTPUT, ERROR)
        }
        self._end: ProgramEnd | None = None
        self._has_begun = False
        self._is_leaving = False  # the last word was said, or is about to be
        self._has_left = False  # the guest has heard that
        self._is_over = False  # all was heard, too: the stream is to end
        self._is_broken = False  # it is reset, and the guest hears of it
        self._interrupts: deque[float] = deque(maxlen=INTERRUPTS_MAX)
        self._stopped: int | None = None  # it is stopped from here: the status
        self._lines: list[str] = []  # to say when the terminal is given back
        self._carried: Carried | None = None

    def run(self, uuid: str, sockets: list[str], look_s: float) -> None:
        """To its end, or ours."""
        self._carried = Carried(
            self._loop,
            uuid,
            Target(SERVICE, self._service),
            sockets,
            look_s,
            self._attached,
            self._failed,
            self._on_stream,
        )
        try:
            self._carried.run(_HEARD, self._signalled)
        finally:
            self._socket.close()
            self._joined.close()
            self._give_back()
            for line in self._lines:
                say(line)

    def _give_back(self) -> None:
        """The terminal, as it was."""
        for fd, modes in self._modes.items():
            if self._escapes is not None or modes.is_changed:
                try:
                    os.write(fd, modes.undo())
                except OSError:
                    pass  # it is gone
        self._terminal.end()

    # ---------------------------------------------------------------- the stream

    def _attached(self) -> None:
        if self._has_begun or self._carried is None:
            return
        self._has_begun = True
        self._carried.open(self._joined)
        self._loop.add_reader(self._socket.fileno(), self._readable)
        self._say(self._first)

    def _failed(self, problem: VchanError, _: int) -> None:
        self._break(explain(problem))

    def _on_stream(self, event: StreamEvent) -> None:
        match event:
            case Ended(_, _, text):
                if not self._is_over:
                    self._break(text or "closed")
                elif not self._is_broken:
                    self._loop.stop()
            case Fault(reason):
                self._break(f"the guest broke the protocol: {reason}")
            case _:
                pass

    def _break(self, problem: str) -> None:
        """There is no more to be heard of the program."""
        if self._is_over or self._carried is None:
            return
        self._is_over = self._is_broken = True
        self._lines.append(printable(f"{self._name} {self._service}: {problem}"))
        self._lines += self._how_to_go_on()
        self._carried.reset_all("the command has ended", self._loop.stop)

    def _finish(self) -> None:
        """All was said and heard: the stream ends with that, at both ends."""
        if self._is_over:
            return
        self._is_over = True
        self._loop.call_later(LEAVE_S, self._loop.stop)
        self._send()

    def _how_to_go_on(self) -> list[str]:
        running = self._dialogue.running
        if running is None or self._end is not None:
            return []
        again = f"vchan {self._service} {self._name} --attach {running.id}"
        return [printable(f"it goes on for {running.detached_s:g} s: {again}")]

    def _say(self, message: CommandWord) -> None:
        self._unsent += encode_program(message)
        self._send()

    def _send(self) -> None:
        if self._waits:
            return
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
            if self._is_over:
                self._socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self._waits = True
            self._loop.add_writer(self._socket.fileno(), self._sendable)
        except OSError:
            self._unsent.clear()  # the stream is over, and says why

    def _sendable(self) -> None:
        self._waits = False
        self._loop.remove_writer(self._socket.fileno())
        self._send()

    def _readable(self) -> None:
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._socket.fileno())
            if not self._dialogue.is_over:
                # What ended the stream, if that was no end, is told in this same turn.
                self._loop.call_soon(partial(self._break, "the guest's agent has ended"))
            return
        if self._is_over:
            return
        try:
            for message in self._dialogue.receive(data):
                self._heed(message)
        except BadFrame as error:
            self._break(f"the guest broke the protocol: {error}")

    # ---------------------------------------------------------------- what the guest says

    def _heed(self, message: GuestWord) -> None:
        match message:
            case Running():
                self._begin(message)
            case OutputPart(which, data):
                if which in self._modes:
                    self._modes[which].see(data)
                self._sinks[which].write(data)
            case Room():
                self._send_input()
            case ProgramEnd():
                self._end = message
                self._end_if_written()
            case Refusal(problem):
                self._lines.append(printable(f"{self._name} {self._service}: {problem}"))
                self._finish()
            case ProgramList(rows):
                self.rows = [{name: str(row.get(name, "")) for name in COLUMNS} for row in rows]
                self.status = EXIT_OK
                self._finish()
            case Left():
                self._has_left = True
                self._finish_if_written()

    def _begin(self, running: Running) -> None:
        if running.has_terminal and os.isatty(0) and not self._is_deaf:
            self._terminal.begin()
            self._escapes = Escapes()
            self._say(Resized(size_of((0, 1, 2))))
        if self._is_deaf:
            self._say(InputEnd())
        else:
            self._source.next()

    def _written(self, which: int, size: int) -> None:
        self._say(self._dialogue.writes(which, size))
        self._end_if_written()
        self._finish_if_written()

    def _finish_if_written(self) -> None:
        """What was written when this command has left does not come again."""
        if self._has_left and not self._dialogue.unwritten:
            self._finish()

    def _end_if_written(self) -> None:
        end = self._end
        if end is None or self._dialogue.unwritten or self._is_leaving:
            return
        self._is_leaving = True
        if self._stopped is not None:
            self.status = self._stopped
        elif end.signal is not None:
            self.status = 128 + end.signal
        elif end.status is not None:
            self.status = end.status
        if end.text:
            self._lines.append(printable(f"{self._name}: the guest has ended it: {end.text}"))
        self._say(Forget())
        self._finish()

    def _unwritable(self, which: int, problem: int) -> None:
        """Nobody reads its output: then there is no use in it. If that was the operator himself, he
        may come back."""
        if self._escapes is not None:
            self._leave(128 + signal.SIGHUP)
            return
        if problem == errno.EPIPE:
            self._stop_program(128 + signal.SIGPIPE)
        else:
            name = "standard output" if which == OUTPUT else "standard error"
            self._lines.append(f"{name}: {os.strerror(problem)}")
            self._stop_program(EXIT_OURS)

    def _unreadable(self, problem: int) -> None:
        """The program must not take a part of its input for the whole."""
        self._lines.append(f"standard input: {os.strerror(problem)}")
        self._stop_program(EXIT_OURS)

    def _stop_program(self, status: int) -> None:
        """There is no use in it any more."""
        self._stopped = status
        self._say(SendSignal(signal.SIGTERM))
        self._loop.call_later(OUTPUT_END_S, partial(self._leave, status))

    # ---------------------------------------------------------------- what goes to it

    def _read(self, data: bytes) -> None:
        """Of this command's own input; b"": it has ended."""
        if self._escapes is None:
            self._take(data)
        elif not data:  # the terminal is gone
            self._leave(128 + signal.SIGHUP)
        else:
            self._take_keys(self._escapes, data)

    def _take(self, data: bytes) -> None:
        if not data:
            self._say(InputEnd())
            return
        self._pending = data
        self._send_input()

    def _take_keys(self, escapes: Escapes, keys: bytes) -> None:
        data, act = escapes.take(keys)
        if act == b"?":
            os.write(2, ("\r\n" + "".join(f"{line}\r\n" for line in HELP)).encode())
        if act == b".":
            self._leave(EXIT_OK)
        elif data:
            self._take(data)
        else:
            self._source.next()

    def _send_input(self) -> None:
        has_some = bool(self._pending)
        while self._pending and self._dialogue.room > 0 and not self._is_leaving:
            part = self._pending[: min(self._dialogue.room, DATA_BYTES_MAX)]
            self._pending = self._pending[len(part) :]
            self._dialogue.sends(len(part))
            self._say(Input(part))
        if has_some and not self._pending:
            self._source.next()

    def _leave(self, status: int) -> None:
        """End this command, and not the program."""
        if self._is_leaving:
            return
        self._is_leaving = True
        self.status = status
        if self._dialogue.running is None:
            self._break(self._unheard())
            return
        self._lines.append(f"left {printable(self._name)}")
        self._lines += self._how_to_go_on()
        self._say(Leave())
        self._loop.call_later(LEAVE_S, self._loop.stop)

    def _unheard(self) -> str:
        """It is ended before the guest has said that the program runs."""
        if self._has_begun and isinstance(self._first, Start):
            runs = f"vchan {self._service} {self._name} --list says whether it runs"
            return f"was ended here before the guest had answered; {runs}"
        return "was ended here"

    # ---------------------------------------------------------------- signals

    def _signalled(self, number: int) -> None:
        if number == signal.SIGWINCH:
            if self._dialogue.running is not None and not self._is_leaving:
                self._say(Resized(size_of((0, 1, 2))))
        elif number == signal.SIGCONT:
            self._terminal.again()
        elif (
            number == signal.SIGHUP
            or self._dialogue.running is None
            or (self._dialogue.running.has_terminal and number == signal.SIGTERM)
            or (number == signal.SIGINT and self._is_impatient())
        ):
            self._leave(128 + number)
        else:
            self._say(SendSignal(number))

    def _is_impatient(self) -> bool:
        now_s = self._loop.time()
        self._interrupts.append(now_s)
        return (
            len(self._interrupts) == INTERRUPTS_MAX and now_s - self._interrupts[0] < INTERRUPTS_S
        )


_HEARD: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGCONT,
)


# ---------------------------------------------------------------- input and output


class Source:
    """Standard input, which may be a file or a terminal: no loop can wait for these. It is read
    when it is asked for, on a thread that ends with the process.

    Args:
        read: Told on the loop's thread what was read; b"": it has ended.
        failed: Told why no more can be read, by its number: that is no end.
    """

    def __init__(
        self, loop: Loop, read: Callable[[bytes], object], failed: Callable[[int], object]
    ) -> None:
        self._loop = loop
        self._told = read
        self._failed = failed
        self._asked = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def next(self) -> None:
        """Read once more."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="input", daemon=True)
            self._thread.start()
        self._asked.release()

    def _work(self) -> None:
        data = b"."
        while data:
            self._asked.acquire()
            try:
                data = read_some(0, DATA_BYTES_MAX)
            except OSError as error:
                data = b""  # closed (nohup gives one that is not for reading), or a terminal's end
                if error.errno != errno.EBADF and not os.isatty(0):
                    problem = error.errno or errno.EIO
                    self._loop.call_soon_threadsafe(partial(self._failed, problem))
                    return
            self._loop.call_soon_threadsafe(partial(self._told, data))


class Sink:
    """Standard output, or error: written on a thread of its own. What waits for it is bounded by
    what the guest may send before it has heard that the rest is written.

    Args:
        written: Told how many bytes were written.
        failed: Told once why no more can be, by its number. The rest is dropped, and told as
            written.
    """

    def __init__(
        self,
        loop: Loop,
        fd: int,
        written: Callable[[int], object],
        failed: Callable[[int], object],
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._written = written
        self._failed = failed
        self._waiting: deque[bytes] = deque()
        self._some = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def write(self, data: bytes) -> None:
        """Write it, soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="output", daemon=True)
            self._thread.start()
        self._waiting.append(data)
        self._some.release()

    def _work(self) -> None:
        has_failed = False
        while True:
            self._some.acquire()
            data = self._waiting.popleft()
            try:
                if not has_failed:
                    write_all(self._fd, data)
            except OSError as error:
                has_failed = True
                self._loop.call_soon_threadsafe(partial(self._failed, error.errno or errno.EIO))
            self._loop.call_soon_threadsafe(partial(self._written, len(data)))
