"""cp: files and directories into a VM, or out of it, as scp does.

Rules of this file
1. The streams outlast daemons and migrations (`vchan.cli.way`); what is whole is there under its
   name, and nothing else is.
2. Two threads: the loop carries the stream, `_CopyWorker` waits for disks, at the other end of
   a pair of sockets. All that is printed is printed by the loop's.
3. What a guest says names nothing on this host: where its files go is what the operator has said.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

from vchan.cli.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from vchan.cli.output import printable, say, show_status, stderr_columns
from vchan.cli.progress import CopyProgress
from vchan.cli.way import ENDING_SIGNALS, Carried, add_sockets, find
from vchan.copies.pipe import END_S as WORKER_END_S
from vchan.copies.pipe import CopyBroken, CopyPipe
from vchan.copies.trees import (
    Everything,
    TreePlace,
    TreeReceiver,
    TreeSender,
    below,
    open_entry,
    text_of,
)
from vchan.errors import ConfigError, Rejected, VchanError
from vchan.io.loop import Loop
from vchan.io.targets import SERVICE, Target
from vchan.services.copies import (
    INTO,
    KEEP,
    PATH_BYTES_MAX,
    RECURSIVE,
    RESUME,
    VERSION,
    CopyFault,
    CopyReady,
    CopyRefusal,
    CopyRequest,
    encode_copy,
    name_problem,
)
from vchan.streams import Ended, Fault, StreamEvent
from vchan.streams.messages import REFUSED, UNREACHABLE, UNSUPPORTED

FILES: Final = Target(SERVICE, "files")
"""What copies are the other end of."""
SHOW_S: Final = 0.2
"""Between two looks at how far it is."""
END_S: Final = 2.0
"""For the stream to end at both ends, when all is copied. At it: the guest finds out by asking."""

_EPILOG: Final = """\
One of the two is in a VM: VM:/PATH, an absolute path. What has no : before its first / is here.
A destination that is a directory gets the sources in it.

The policy of this host (kind forward) and the guest's own configuration (option forward) both have
to allow service:files, and the guest's standard agent the paths: [read] and [write] in its
standard.toml.

A file appears under its name when it is whole and on the disk, or not at all. Copies go on while
daemons are restarted, and while the VM moves to a host whose daemon answers at a socket that --also
names. Symbolic links, devices, pipes and sockets are left out, and said so; no link is followed but
those in the path of a source or destination on this host.

  vchan cp app.tar VM:/srv/              into a directory of the VM
  vchan cp -r VM:/var/log ./logs         a directory and what is in it
  vchan cp --resume disk.img VM:/data/   what came before it was broken off does not come again

exit status: 0 all is copied; 1 something is not, as said; others as of every command
"""


def add_commands(commands: Any) -> None:
    """The command of this group."""
    parser = commands.add_parser(
        "cp",
        help="copy files and directories into a VM, or out of it",
        description="Copy files and directories into a VM, or out of it.",
        epilog=_EPILOG,
    )
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="[VM:]PATH of what is copied")
    parser.add_argument("target", metavar="DESTINATION", help="[VM:]PATH of where it is to be")
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="directories, with all that is in them"
    )
    parser.add_argument(
        "-p",
        "--preserve",
        action="store_true",
        help="keep mode and date, and the owner where that is permitted",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="do not show how far it is")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="what is there already, by its checksum, does not come again",
    )
    add_sockets(parser)
    parser.set_defaults(run=_cp, is_text=True)


# ---------------------------------------------------------------- what is meant


class InVm(NamedTuple):
    """A path in a VM."""

    vm: str
    path: bytes
    is_directory: bool = False

    def __str__(self) -> str:
        return f"{self.vm}:{os.fsdecode(self.path)}"


def parse_name(text: str) -> InVm | str:
    """What a source or target is; a text: a path on this host.

    Raises:
        ConfigError: It is neither.
    """
    vm, colon, path = text.partition(":")
    if not colon or not vm or "/" in vm:
        if not text:
            raise ConfigError("''", "is no path")
        return text
    if not path.startswith("/"):
        raise ConfigError(repr(text), "in a VM there is no directory to begin at: give /PATH")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    is_directory = path.endswith(("/", "/."))
    encoded = os.fsencode("/" + "/".join(parts))
    if len(encoded) > PATH_BYTES_MAX:
        problem = f"the path is longer than {PATH_BYTES_MAX} bytes (PATH_BYTES_MAX)"
        raise ConfigError(repr(f"{text[:40]}..."), problem)
    return InVm(vm, encoded, is_directory)


class CopyStep(NamedTuple):
    """One source, and where it goes. One of the two is in a VM."""

    source: InVm | str
    target: InVm | str
    is_into: bool  # the target has to be a directory

    @property
    def vm(self) -> str:
        """Which one."""
        return self.source.vm if isinstance(self.source, InVm) else self.target.vm  # type: ignore[union-attr]


def plan(sources: list[str], target: str) -> list[CopyStep]:
    """What is to be copied where.

    Raises:
        ConfigError: That cannot be.
    """
    to = parse_name(target)
    is_into = len(sources) > 1 or (
        to.is_directory if isinstance(to, InVm) else to.endswith(("/", "/."))
    )
    steps = [CopyStep(parse_name(source), to, is_into) for source in sources]
    for text, step in zip(sources, steps, strict=True):
        if isinstance(step.source, InVm) is isinstance(to, InVm):
            problem = (
                "is in a VM as well: copy it here first"
                if isinstance(to, InVm)
                else (f"neither it nor {target!r} is in a VM: VM:/PATH is")
            )
            raise ConfigError(repr(text), problem)
    return steps


# ---------------------------------------------------------------- disks


class Settings(NamedTuple):
    """Options of all steps."""

    recursive: bool
    keeps: bool
    resumes: bool
    umask: int

    @property
    def flags(self) -> int:
        """As a request has them."""
        return RECURSIVE * self.recursive | KEEP * self.keeps | RESUME * self.resumes


class _CopyWorker:
    """Does one step after the other, in a thread of its own.

    Args:
        joined: The other end of what the loop carries.
        tell: Has the loop's thread call something.
        report: Where it is told how that goes.
        over: Called when there is nothing more to do, with what ended it early.
    """

    def __init__(
        self,
        joined: socket.socket,
        steps: list[CopyStep],
        settings: Settings,
        tell: Callable[[Callable[[], object]], object],
        report: CopyReport,
        over: Callable[[VchanError | None], object],
    ) -> None:
        self._pipe = CopyPipe(joined)
        self._steps = steps
        self._settings = settings
        self._tell = tell
        self._report = report
        self._over = over
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; the thread ends with the process."""
        self._thread = threading.Thread(target=self._run, name="copy", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End it, if it has not ended, and wait until its file is let go: what is not worth
        keeping is gone then."""
        self._pipe.end()
        if self._thread is not None:
            self._thread.join(WORKER_END_S)

    def _run(self) -> None:
        problem: VchanError | None = None
        try:
            for step in self._steps:
                self._do(step)
        except EOFError:
            problem = CopyBroken("the guest's end is gone")
        except VchanError as error:
            problem = error
        except Exception as error:  # noqa: BLE001 - who waits for this thread must hear of it
            problem = CopyBroken(f"{type(error).__name__}: {error}")
        self._pipe.close()
        self._tell(partial(self._over, problem))

    def _do(self, step: CopyStep) -> None:
        try:
            if isinstance(step.source, InVm):
                assert isinstance(step.target, str)
                self._get(step.source, step.target, is_into=step.is_into)
            else:
                assert isinstance(step.target, InVm)
                self._put(step.source, step.target, is_into=step.is_into)
        except Rejected as error:
            self._problem(str(error))

    def _problem(self, text: str) -> None:
        self._tell(partial(self._report.problem, text))

    def _ask(self, request: CopyRequest, where: InVm) -> None:
        self._pipe.write(encode_copy(request))
        answer = self._pipe.read()
        if isinstance(answer, CopyRefusal):
            is_path = answer.text.startswith("/")
            raise Rejected(f"{where.vm}:{'' if is_path else ' '}{answer.text}")
        if not isinstance(answer, CopyReady):
            raise CopyFault(f"{type(answer).__name__}: a request was to be answered")

    def _put(self, source: str, target: InVm, *, is_into: bool) -> None:
        real = os.path.realpath(os.fsencode(source))
        name = os.fsencode(Path(source).name)
        if name in (b"", b".."):
            name = _last(real)
        with _explained(source):
            _require_name(name)
            fd = open_entry(None, real)
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode) and not self._settings.recursive:
                raise Rejected(f"{source}: is a directory; -r copies it")
            flags = self._settings.flags | INTO * is_into
            self._ask(CopyRequest(True, VERSION, flags, name, target.path), target)
            watcher = _Watcher(self._tell, self._report, "", f"{target.vm}:")
            resumes = self._settings.resumes
            sender = TreeSender(self._pipe, Everything(), watcher, resumes=resumes)
            sender.send(fd, os.fsencode(source))
        finally:
            os.close(fd)

    def _get(self, source: InVm, target: str, *, is_into: bool) -> None:
        place = _place(target, source, is_into=is_into)
        try:
            self._ask(CopyRequest(False, VERSION, self._settings.flags, b"", source.path), source)
            TreeReceiver(
                self._pipe,
                place,
                Everything(),
                _Watcher(self._tell, self._report, "", ""),
                takes_directories=self._settings.recursive,
                resumes=self._settings.resumes,
                keeps=self._settings.keeps,
                umask=self._settings.umask,
            ).receive()
        finally:
            os.close(place.directory)


def _place(target: str, source: InVm, *, is_into: bool) -> TreePlace:
    """Where on this host the source is to appear: in the directory that the target is, or as the
    target.

    Raises:
        Rejected: It cannot.
    """
    real = os.path.realpath(os.fsencode(target))
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if is_into or Path(os.fsdecode(real)).is_dir():
        name = _last(source.path)
        with _explained(str(source)):
            _require_name(name)
        with _explained(target):
            return TreePlace(os.open(real, flags), name, below(os.fsencode(target), name))
    with _explained(target):
        parent, last = os.path.split(real)
        _require_name(last)
        return TreePlace(os.open(parent, flags), last, os.fsencode(target))


def _last(path: bytes) -> bytes:
    """The last part of a path."""
    return path.rstrip(b"/").rpartition(b"/")[2]


def _require_name(name: bytes) -> None:
    if not name:
        raise Rejected("has no name of its own: name what is in it")
    problem = name_problem(name)
    if problem:
        raise Rejected(f"{os.fsdecode(name)!r} {problem}")


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What is wrong with a path has the path in it."""
    try:
        yield
    except (OSError, Rejected) as error:
        raise Rejected(f"{path}: {text_of(error)}") from error


class _Watcher:
    """Tells the loop's thread.

    Args:
        here, there: Before paths at this end, and at the other.
    """

    def __init__(
        self,
        tell: Callable[[Callable[[], object]], object],
        report: CopyReport,
        here: str,
        there: str,
    ) -> None:
        self._tell = tell
        self._report = report
        self._here = here
        self._there = there

    def left_out(self, path: bytes, text: str) -> None:
        """Something is not copied, and why."""
        problem = f"{self._here}{os.fsdecode(path)}: {text}"
        self._tell(partial(self._report.problem, problem))

    def failed(self, text: str) -> None:
        """The other end could not write something."""
        self._tell(partial(self._report.problem, f"{self._there}{text}"))

    def begins(self, path: bytes, at: int, size: int) -> None:
        """A file's bytes come."""
        name = printable(os.fsdecode(_last(path)))
        self._report.progress.begins(name, at, size)

    def moved(self, count: int) -> None:
        """So many more are through."""
        self._report.progress.moved(count)


class CopyReport:
    """What the operator sees of it.

    Args:
        is_shown: On a terminal, how far it is.
    """

    def __init__(self, loop: Loop, *, is_shown: bool) -> None:
        self.problems = 0
        self.progress = CopyProgress(loop.time())
        self._loop = loop
        self._is_shown = is_shown and stderr_columns() > 0
        if self._is_shown:
            self._show()

    def _show(self) -> None:
        if self._is_shown:
            columns = stderr_columns()
            if self.progress.files and columns:
                show_status(self.progress.line(self._loop.time(), columns))
            self._loop.call_later(SHOW_S, self._show)

    def problem(self, text: str) -> None:
        """Something is not copied."""
        self.problems += 1
        if self._is_shown:
            show_status("")
        say(printable(text))

    def end(self) -> None:
        """Show the last of it."""
        if self._is_shown and self.progress.files:
            show_status("")
            say(self.progress.summary(self._loop.time()))
        self._is_shown = False


# ---------------------------------------------------------------- the stream


class Copying:
    """Steps to or from one VM, through one stream.

    Args:
        vm: As the operator calls it.
    """

    def __init__(
        self,
        loop: Loop,
        vm: str,
        steps: list[CopyStep],
        settings: Settings,
        sockets: tuple[str, list[str]],
        look_s: float,
        report: CopyReport,
    ) -> None:
        self.status = EXIT_OK
        self.problem: VchanError | None = None
        self._loop = loop
        self._vm = vm
        self._ours, theirs = socket.socketpair()
        self._has_begun = False
        self._is_ending = False
        self._reason = ""  # why the stream ended before its end
        self._is_refused = False  # it never began
        self._worker = _CopyWorker(
            theirs, steps, settings, loop.call_soon_threadsafe, report, self._worked
        )
        uuid, paths = sockets
        self._carried = Carried(
            loop, uuid, FILES, paths, look_s, self._attached, self._fail, self._on_event
        )

    def run(self) -> None:
        """Until all is copied, or there is a signal, or no way to the VM any more."""
        try:
            self._carried.run(ENDING_SIGNALS, self._on_signal)
        finally:
            self._worker.end()

    def _attached(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._carried.open(self._ours)
            self._worker.start()

    def _fail(self, problem: VchanError, _: int) -> None:
        self._is_ending = True
        self.problem = problem
        self._loop.call_soon(self._loop.stop)

    def _on_event(self, event: StreamEvent) -> None:
        match event:
            case Ended(_, reason, text):
                if reason:
                    self._reason = text or "closed"
                    self._is_refused = reason in (REFUSED, UNREACHABLE, UNSUPPORTED)
                if reason == UNREACHABLE and "standard agent" not in self._reason:
                    self._reason += "; does the standard agent run there, with read or write on?"
                if self._is_ending:
                    self._loop.stop()
            case Fault(reason):
                say(printable(f"{self._vm}: the guest broke the protocol: {reason}"))
            case _:
                pass

    def _worked(self, problem: VchanError | None) -> None:
        """The worker is done."""
        if self._is_ending:
            return
        self._is_ending = True
        if problem is None:
            self._loop.call_later(END_S, self._loop.stop)  # the stream's own end stops it before
            return
        if self._is_refused:
            problem = Rejected(f"{self._vm}: {self._reason}")
        elif isinstance(problem, CopyBroken) and self._reason:
            problem = CopyBroken(self._reason)
        self.problem = problem
        self._carried.reset_all("the copy has ended", self._loop.stop)

    def _on_signal(self, number: int) -> None:
        self.status = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_FAILED
        if self._is_ending:
            self._loop.stop()
            return
        self._is_ending = True
        self._carried.reset_all("the copy was interrupted", self._loop.stop)


def _cp(options: argparse.Namespace) -> int:
    steps = plan(options.source, options.target)
    umask = os.umask(0o077)
    os.umask(umask)
    settings = Settings(options.recursive, options.preserve, options.resume, umask)
    problems = 0
    for vm, group in groupby(steps, lambda step: step.vm):
        sockets = find(vm, [options.socket, *options.also], options.timeout)
        with Loop() as loop:
            report = CopyReport(loop, is_shown=not options.quiet)
            copying = Copying(loop, vm, list(group), settings, sockets, options.look, report)
            copying.run()
            report.end()
        problems += report.problems
        if copying.problem is not None:
            raise _with_vm(vm, copying.problem)
        if copying.status != EXIT_OK:
            return copying.status
    return EXIT_FAILED if problems else EXIT_OK


def _with_vm(vm: str, problem: VchanError) -> VchanError:
    """A broken copy, and what helps."""
    if isinstance(problem, CopyBroken):
        return CopyBroken(f"{vm}: {problem.why}; --resume goes on where it was")
    return problem
