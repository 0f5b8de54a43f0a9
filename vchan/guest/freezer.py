"""File systems that stand still, for a snapshot: frozen under a lease, thawed by whatever ends it.

Rules of this file
1. A child of the daemon, the holder, freezes and thaws. It thaws when its lease is over by its own
   clock, when it is told to, and when the daemon is gone. Neither a daemon that is held up nor one
   that is killed keeps anything frozen.
2. The holder writes to no file system and no log. The daemon keeps its log's lines back as long as
   there is a holder, and has its own files where nothing is frozen.
3. If the holder dies, the daemon thaws. A note beside the agents' socket says that there is
   something to thaw, should both die: the next daemon does.

    daemon --renew SECONDS, thaw WHY--> holder --FIFREEZE, FITHAW--> kernel
    daemon <--frozen, failed, thawed--- holder --freeze, thaw--> hooks
"""

import fcntl
import gc
import json
import os
import select
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from vchan.errors import Rejected
from vchan.io.loop import Loop
from vchan.rpc.deferred import Later

LEASE_S: Final = 10.0
"""Of a lease, unless who freezes names another: a snapshot of a disk takes a second or two."""
LEASE_S_MAX: Final = 120.0
"""The longest: programs in the guest stand still meanwhile. It may be taken again in time."""
HOOK_S: Final = 20.0
"""What a hook may take. At it: it is killed, and nothing is frozen."""
HOOKS_MAX: Final = 64
"""Hooks in the directory. At it: nothing is frozen."""
ANSWER_BYTES_MAX: Final = 64 * 1024
"""What the holder says; paths of file systems, most of it."""

_FREEZE: Final = 0xC0045877  # FIFREEZE of linux/fs.h
_THAW: Final = 0xC0045878
_CANNOT: Final = frozenset({95, 25, 1})
"""EOPNOTSUPP, ENOTTY, EPERM: a file system that cannot stand still, or not for us."""
_BUSY: Final = 16
"""EBUSY: it stands still already, by somebody else."""
_NOT_FROZEN: Final = 22
"""EINVAL of a thaw."""
_IGNORED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)
"""By the holder: it ends when it has thawed."""
_BACKUPS: Final = ("~", ".bak", ".orig", ".sample", ".rpmnew", ".rpmorig", ".rpmsave", ".swp")


class NotFrozen(Exception):
    """It was not done, and what was frozen for it is thawed again; says why."""


class Kernel:
    """The file systems on devices of this machine."""

    def targets(self) -> list[str]:
        """Where they are mounted, each once, what was mounted last first: it may lie on another."""
        found: dict[int, str] = {}
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
        for line in lines:
            device, path, kind, options = line.split(" ")[:4]
            is_written = "rw" in options.split(",")
            if device.startswith("/dev/") and not kind.startswith("fuse") and is_written:
                path = path.encode("utf-8", "surrogateescape").decode("unicode_escape")
                try:
                    found.setdefault(os.stat(path).st_dev, path)
                except OSError:
                    continue  # covered by another mount
        return list(found.values())[::-1]

    def device_of(self, path: str) -> int:
        """Which file system a path is on."""
        return os.stat(path).st_dev

    def freeze(self, path: str) -> int:
        """Have it stand still. Returns what `thaw` needs, or -1 if it cannot, or does already."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _FREEZE, 0)
        except OSError as error:
            os.close(fd)
            if error.errno in _CANNOT or error.errno == _BUSY:
                return -1
            raise
        return fd

    def thaw(self, handle: int) -> None:
        """Have it go on."""
        try:
            fcntl.ioctl(handle, _THAW, 0)
        except OSError as error:
            if error.errno != _NOT_FROZEN:  # somebody else has thawed it
                raise
        finally:
            os.close(handle)

    def thaw_all(self) -> int:
        """Have everything go on that stands still, whoever froze it. Returns how many did."""
        thawed = 0
        for path in reversed(self.targets()):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                fcntl.ioctl(fd, _THAW, 0)
                thawed += 1
            except OSError:
                pass  # it did not stand still
            finally:
                os.close(fd)
        return thawed


class Hooks:
    """Programs that are called before file systems are frozen, and when they are thawed again.

    Args:
        directory: Its executables are called in the order of their names with `freeze`, and in the
            other with `thaw`, as qemu-ga's fsfreeze-hook.d.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def paths(self) -> list[str]:
        """Every hook.

        Raises:
            NotFrozen: They are too many, or others than root or this daemon's user can change one.
        """
        try:
            names = sorted(os.listdir(self._directory))
        except OSError:
            return []  # there are none
        found = []
        for name in names:
            path = f"{self._directory}/{name}"
            known = os.stat(path)
            is_hook = stat.S_ISREG(known.st_mode) and known.st_mode & 0o111
            if not is_hook or name.startswith(".") or name.endswith(_BACKUPS) or ".dpkg-" in name:
                continue
            if known.st_uid not in (0, os.geteuid()) or known.st_mode & 0o022:
                raise NotFrozen(f"{path}: others can change it: chown root and chmod go-w it")
            found.append(path)
        if len(found) > HOOKS_MAX:
            raise NotFrozen(f"{self._directory}: over {HOOKS_MAX} hooks (HOOKS_MAX)")
        return found

    def run(self, path: str, word: str) -> str:
        """Call one. Returns what was wrong, or ""."""
        environment = {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")}
        try:
            pid = os.posix_spawn(path, [path, word], environment, setsid=True, setsigdef=_IGNORED)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            return f"{path}: {error.strerror}"
        with os.fdopen(pidfd, "rb") as ended:
            if not select.select([ended], [], [], HOOK_S)[0]:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return f"{path} {word}: not over after {HOOK_S:.0f} s (HOOK_S)"
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return f"{path} {word}: ended with {status}" if status else ""


class Holder:
    """What the child does, from the first hook to the last.

    Args:
        commands: Lines come from it; its end is the daemon's.
        say: Tells the daemon.
    """

    def __init__(
        self, kernel: Kernel, hooks: Hooks, commands: int, say: Callable[[dict[str, Any]], None]
    ) -> None:
        self._kernel = kernel
        self._hooks = hooks
        self._commands = commands
        self._say = say
        self._unread = b""
        self._until_s = 0.0
        self._why = ""  # it is over

    def run(self, lease_s: float) -> None:
        """Freeze, hold, thaw. The lease begins with the first hook."""
        self._until_s = time.monotonic() + lease_s
        called: list[str] = []
        frozen: dict[str, int] = {}
        problem = ""
        try:
            self._call_hooks(called)
            self._freeze(frozen)
            self._say({"frozen": list(frozen)})
            while not self._is_over(wait=True):
                pass
        except NotFrozen as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename or 'a file system'}: {error.strerror}"
        trouble = [*self._thaw(frozen), *self._call_back(called)]
        if problem:
            self._say({"failed": problem, "trouble": trouble})
        else:
            self._say({"thawed": list(frozen), "why": self._why, "trouble": trouble})

    def _call_hooks(self, called: list[str]) -> None:
        for path in self._hooks.paths():
            called.append(path)
            if trouble := self._hooks.run(path, "freeze"):
                raise NotFrozen(trouble)
            self._require_lease()

    def _freeze(self, frozen: dict[str, int]) -> None:
        for path in self._kernel.targets():
            self._require_lease()
            handle = self._kernel.freeze(path)
            if handle >= 0:
                frozen[path] = handle
        self._require_lease()
        if not frozen:
            raise NotFrozen("no file system of this guest can be frozen")

    def _require_lease(self) -> None:
        if self._is_over(wait=False):
            raise NotFrozen(f"given up before it was done: {self._why}")

    def _is_over(self, *, wait: bool) -> bool:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            self._why = "the lease is over"
        elif select.select([self._commands], [], [], left_s if wait else 0)[0]:
            for line in self._lines():
                word, _, rest = line.partition(" ")
                if word == "renew":
                    self._until_s = time.monotonic() + float(rest)
                else:
                    self._why = rest
        return bool(self._why)

    def _lines(self) -> Iterator[str]:
        data = os.read(self._commands, 4096)
        if not data:
            self._why = "the daemon is gone"
        *lines, self._unread = (self._unread + data).split(b"\n")
        yield from (line.decode() for line in lines)

    def _thaw(self, frozen: Mapping[str, int]) -> Iterator[str]:
        for path, handle in reversed(list(frozen.items())):
            try:
                self._kernel.thaw(handle)
            except OSError as error:
                yield f"{path}: not thawed: {error.strerror}"

    def _call_back(self, called: list[str]) -> Iterator[str]:
        for path in reversed(called):
            if trouble := self._hooks.run(path, "thaw"):
                yield trouble


class Freezer:
    """The daemon's side.

    Args:
        socket: The agents': the note stands beside it.
        hooks: The hooks' directory.
        log: Told what an operator may want to know.
        changed: Called when there is a holder, and when there is none any more: see `is_active`.
    """

    def __init__(
        self,
        loop: Loop,
        socket: str,
        hooks: str,
        log: Callable[[str], None],
        changed: Callable[[], object],
        kernel: Kernel | None = None,
    ) -> None:
        self._loop = loop
        self._directory = os.path.dirname(socket)
        self._note = note_path(socket)
        self._hooks = Hooks(hooks)
        self._log = log
        self._changed = changed
        self._kernel = kernel or Kernel()
        self._pid = 0
        self._commands = self._answers = -1
        self._unread = b""
        self._lease_s = 0.0
        self._frozen: list[str] | None = None
        self._freezing: list[Later] = []
        self._thawing: list[Later] = []
        self._said_end = False

    @property
    def is_active(self) -> bool:
        """Something is frozen, or about to be."""
        return self._pid != 0

    def thaw_left_over(self) -> None:
        """An earlier daemon and its holder are gone, and what they froze may be frozen still."""
        thawed = self._kernel.thaw_all()
        self._log(f"thawed {thawed} file systems that an earlier daemon left frozen")
        self._remove_note()

    def freeze(self, args: Mapping[str, Any]) -> Later:
        """Have everything stand still, or go on doing so: answered when it does.

        Raises:
            Rejected: It cannot be done.
            TypeError, ValueError: The lease is none.
        """
        lease_s = _lease(args)
        if self._said_end:
            raise Rejected("it is being thawed: ask again")
        self._lease_s = lease_s
        if self._pid:
            self._command(f"renew {lease_s}")
        else:
            self._begin(lease_s)
        later = Later()
        self._freezing.append(later)
        self._answer_freezing()
        return later

    def thaw(self, why: str) -> Later:
        """Have everything go on: answered when it does."""
        later = Later()
        if not self._pid:
            later.answer({"thawed": [], "why": "nothing was frozen"}, self._loop.time())
            return later
        self._thawing.append(later)
        self.end(why)
        return later

    def end(self, why: str) -> None:
        """The same, if anything is frozen, for who waits for nothing."""
        if self._pid and not self._said_end:
            self._said_end = True
            self._command(f"thaw {why}")

    def _begin(self, lease_s: float) -> None:
        here = self._kernel.device_of(self._directory)
        for path in self._kernel.targets():
            if self._kernel.device_of(path) == here:
                text = f"{self._directory}, where this daemon writes, is on {path}"
                raise Rejected(f"{text}, which would be frozen: expected it on a tmpfs, as /run is")
        fds = (*os.pipe2(os.O_CLOEXEC), *os.pipe2(os.O_CLOEXEC))
        command_read, command_write, answer_read, answer_write = fds
        try:
            with open(self._note, "w", encoding="ascii"):
                pass  # that it is there says all
            self._pid = _fork(lambda: self._hold(command_read, answer_write, lease_s), fds)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise Rejected(f"there can be no process for it: {error.strerror}") from error
        os.close(command_read)
        os.close(answer_write)
        self._commands, self._answers = command_write, answer_read
        os.set_blocking(self._commands, False)
        os.set_blocking(self._answers, False)
        self._loop.add_reader(self._answers, self._heard)
        self._log(f"freezing file systems, for {lease_s:g} s")
        self._changed()

    def _hold(self, commands: int, answers: int, lease_s: float) -> None:
        """In the child."""

        def say(what: dict[str, Any]) -> None:
            try:
                os.write(answers, json.dumps(what).encode() + b"\n")
            except OSError:
                pass  # the daemon is gone

        Holder(self._kernel, self._hooks, commands, say).run(lease_s)

    def _command(self, line: str) -> None:
        try:
            os.write(self._commands, line.encode() + b"\n")
        except OSError:
            pass  # the holder is gone: `_heard` is about to find out

    def _heard(self) -> None:
        try:
            data = os.read(self._answers, ANSWER_BYTES_MAX)
        except BlockingIOError:
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        if not data and self._pid:
            self._holder_died()

    def _take(self, said: Mapping[str, Any]) -> None:
        if "frozen" in said:
            self._frozen = said["frozen"]
            self._answer_freezing()
            return
        self._over()
        for trouble in said["trouble"]:
            self._log(f"after a freeze: {trouble}")
        if "failed" in said:
            self._log(f"not frozen: {said['failed']}")
            self._finish(Rejected(said["failed"]), {"thawed": [], "why": said["failed"]})
            return
        self._log(f"thawed {len(said['thawed'])} file systems: {said['why']}")
        self._finish(Rejected(said["why"]), {"thawed": said["thawed"], "why": said["why"]})

    def _holder_died(self) -> None:
        thawed = self._kernel.thaw_all()
        self._over()
        self._log(f"the holder of frozen file systems was killed: thawed {thawed}")
        self._finish(Rejected("its holder was killed"), {"thawed": [], "why": "it was killed"})

    def _over(self) -> None:
        self._loop.remove_reader(self._answers)
        os.close(self._answers)
        os.close(self._commands)
        os.waitpid(self._pid, 0)
        self._pid, self._frozen, self._unread, self._said_end = 0, None, b"", False
        self._remove_note()
        self._changed()

    def _finish(self, refusal: Rejected, thawed: dict[str, Any]) -> None:
        now_s = self._loop.time()
        freezing, self._freezing = self._freezing, []
        thawing, self._thawing = self._thawing, []
        for later in freezing:
            later.answer(refusal, now_s)
        for later in thawing:
            later.answer(thawed, now_s)

    def _answer_freezing(self) -> None:
        if self._frozen is None:
            return
        freezing, self._freezing = self._freezing, []
        for later in freezing:
            told = {"frozen": self._frozen, "lease_s": self._lease_s}
            later.answer(told, self._loop.time())

    def _remove_note(self) -> None:
        try:
            os.unlink(self._note)
        except OSError:
            pass  # somebody cleans up there

    def close(self) -> None:
        """The daemon ends: the holder thaws by itself."""
        if self._pid:
            self._loop.remove_reader(self._answers)
            os.close(self._answers)
            os.close(self._commands)
            self._pid = 0


def note_path(socket: str) -> str:
    """The file that says that something may be frozen."""
    return f"{socket}.frozen"


def _lease(args: Mapping[str, Any]) -> float:
    if set(args) - {"lease_s"}:
        raise TypeError("expected no argument but lease_s")
    lease_s = args.get("lease_s", LEASE_S)
    is_number = isinstance(lease_s, int | float) and not isinstance(lease_s, bool)
    if not is_number or not 0 < lease_s <= LEASE_S_MAX:
        raise ValueError(f"lease_s: {lease_s!r} is no number over 0, and at most {LEASE_S_MAX:g}")
    return float(lease_s)


def _fork(work: Callable[[], None], keep: tuple[int, ...]) -> int:
    """A child that does this work, with nothing of ours but these descriptors."""
    pid = os.fork()
    if pid:
        return pid
    try:
        gc.disable()
        os.setsid()
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        # Ours of the pipes' ends: the read end of the commands, the write end of the answers.
        kept = sorted((keep[0], keep[3]))
        last = os.sysconf("SC_OPEN_MAX")
        for low, high in zip((3, *(fd + 1 for fd in kept)), (*kept, last), strict=True):
            os.closerange(low, high)
        work()
    finally:
        os._exit(0)
