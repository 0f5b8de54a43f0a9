"""Children of the daemon: started, watched, ended together with all that they started.

Every child leads a session and a process group of its own: to end it is to end the group. None
outlives the daemon, not even one killed with -9: a shell that waits for the daemon's end, the
keeper, has the list of all groups. A child waits for a word before it becomes its program, and is
on that list by then.

By hand, not by `subprocess`: that takes a tenth of a second and 2 MiB of a small guest, and knows
neither limits nor process groups that can be ended without a race.
"""

import gc
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from vchan.agents.units import Unit, UnitLimits
from vchan.errors import ConfigError
from vchan.io.loop import Loop

READ_BYTES: Final = 16 * 1024
"""Of a child's output at a time, so that one that talks too much holds up nobody."""
LAST_READS_MAX: Final = 16
"""Reads of what a child said before it ended."""
EXIT_NOT_STARTED: Final = 127
"""A child ends so that could not become its program; it says why in its output."""
SHELL: Final = "/bin/sh"

_KEEPER_SCRIPT: Final = """\
trap '' HUP INT TERM
groups=
while read -r line; do groups=$line; done
for group in $groups; do kill -9 -"$group"; done
"""


class Keeper:
    """Ends all children when the daemon has died, however it did.

    Args:
        on_problem: Told if there can be none: children may then outlive a killed daemon.
    """

    def __init__(self, loop: Loop, on_problem: Callable[[str], object]) -> None:
        self._loop = loop
        self._on_problem = on_problem
        self._groups: set[int] = set()
        self._fd = -1
        self._child: Child | None = None

    def add(self, group: int) -> None:
        """This group is to end with us."""
        self._groups.add(group)
        if self._fd < 0:
            self._start()
        else:
            self._tell()

    def discard(self, group: int) -> None:
        """This group is over. Said before its number can belong to anybody else."""
        if group in self._groups:
            self._groups.discard(group)
            self._tell()

    def _start(self) -> None:
        read, self._fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        self._tell()  # before it is there: we may die as it begins
        unit = Unit("keeper", (SHELL, "-c", _KEEPER_SCRIPT))
        try:
            self._child = Child(self._loop, unit, {}, self._ended, stdin=read)
        except OSError as error:
            self._on_problem(f"no keeper for sub-agents: {error.strerror}")
            os.close(self._fd)
            self._fd = -1
        finally:
            os.close(read)

    def _tell(self) -> None:
        if self._fd >= 0:
            line = " ".join(map(str, sorted(self._groups))) + "\n"
            try:
                os.write(self._fd, line.encode())
            except OSError:
                pass  # it has ended: `_ended` starts another, or is about to be called

    def _ended(self, _: int | None) -> None:
        """Somebody killed it."""
        self.close()
        if self._groups:
            self._on_problem("the keeper of sub-agents was killed: another is started")
            self._start()

    def close(self) -> None:
        """End it, and with it every group that is left."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Child:
    """A process, from its start to its end.

    Args:
        environment: All of it.
        on_exit: Told the exit status, a negative signal, or None if nobody knows.
        on_output: Told what it writes to standard output and error; None: both are the daemon's
            standard error.
        on_error: Told what it writes to standard error, if that is to be told apart.
        keeper: Ends it with the daemon; None: it outlives the daemon.
        before: Called with the process id before it becomes its program.
        stdin: A descriptor; -1: nothing.
        terminal: Both ends of one, ours first, and both ours to close: it is the child's standard
            input, output and error, and its controlling terminal.

    Raises:
        OSError: There can be no process.
    """

    def __init__(
        self,
        loop: Loop,
        unit: Unit,
        environment: Mapping[str, str],
        on_exit: Callable[[int | None], object],
        *,
        on_output: Callable[[bytes], object] | None = None,
        on_error: Callable[[bytes], object] | None = None,
        keeper: Keeper | None = None,
        before: Callable[[int], object] = lambda _: None,
        stdin: int = -1,
        terminal: tuple[int, int] | None = None,
    ) -> None:
        self._loop = loop
        self._on_exit = on_exit
        self._keeper = keeper
        self._adopted = ""
        self._pidfd = -1
        self._outputs: dict[int, Callable[[bytes], object]] = {}
        self._told: tuple[int, ...] = ()
        fds = list(os.pipe2(os.O_CLOEXEC))
        go_read, go_write = fds
        try:
            if terminal is not None and on_output is not None:
                ours, stdin = terminal
                self._outputs[ours] = on_output
                fds.append(stdin)
                output = error = stdin
            else:
                output = error = self._make_output(on_output, fds)
            if on_error is not None:
                error = self._make_output(on_error, fds)
            self._told = tuple(self._outputs)
            streams = (stdin, output, error)
            self.pid = _fork(
                unit, environment, streams, (go_read, go_write), controls=terminal is not None
            )
            self._pidfd = _watchable(self.pid)
        except OSError:
            self._close_outputs()
            raise
        else:
            if keeper is not None:
                keeper.add(self.pid)
            before(self.pid)
            os.write(go_write, b"!")
        finally:
            for fd in fds:
                os.close(fd)
        self._watch()

    @classmethod
    def adopted(cls, loop: Loop, pid: int, on_exit: Callable[[int | None], object]) -> "Child":
        """A process that an earlier daemon started.

        Raises:
            OSError: It is gone.
        """
        child = cls.__new__(cls)
        child._loop, child._on_exit, child.pid = loop, on_exit, pid
        child._keeper = None
        child._outputs = {}
        child._told = ()
        child._adopted = start_time(pid)
        child._pidfd = os.pidfd_open(pid)
        child._watch()
        return child

    def _make_output(self, told: Callable[[bytes], object] | None, fds: list[int]) -> int:
        """A pipe whose output `told` is told; returns its other end, and adds that to `fds`."""
        if told is None:
            return 2
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        self._outputs[ours] = told
        fds.append(theirs)
        return theirs

    def _watch(self) -> None:
        self._loop.add_reader(self._pidfd, self._exited)
        for fd in self._outputs:
            os.set_blocking(fd, False)
            self._loop.add_reader(fd, partial(self._read, fd))

    def _read(self, fd: int) -> bool:
        """Pass on what it has said. False if there is no more for now."""
        told = self._outputs.get(fd)
        if told is None:
            return False
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:  # a terminal that nobody has open any more
            data = b""
        if not data:
            self._close_output(fd)
            return False
        told(data)
        return True

    def listen(self, which: int, *, to: bool) -> None:
        """Go on reading an output, or read no more of it for now: what it writes waits in the
        kernel, and then it waits. What is there when it ends is read all the same.

        Args:
            which: 0: the one of `on_output`; 1: that of `on_error`.
        """
        fd = self._told[which]
        if fd not in self._outputs:
            return
        if to:
            self._loop.add_reader(fd, partial(self._read, fd))
        else:
            self._loop.remove_reader(fd)

    def _close_output(self, fd: int) -> None:
        del self._outputs[fd]
        self._loop.remove_reader(fd)
        os.close(fd)

    def _close_outputs(self) -> None:
        for fd in list(self._outputs):
            self._close_output(fd)

    def _exited(self) -> None:
        for fd in list(self._outputs):
            for _ in range(LAST_READS_MAX):
                if not self._read(fd):
                    break
        status = None
        if not self._adopted:
            # While nobody has waited for it, its number is its own, and its group's.
            self.signal(signal.SIGKILL)
            if self._keeper is not None:
                self._keeper.discard(self.pid)
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        elif start_time(self.pid) in ("", self._adopted):
            # A group that has members keeps its number; here it is nobody else's yet.
            self.signal(signal.SIGKILL)
        self.release()
        self._on_exit(status)

    def signal(self, number: int) -> None:
        """Send its whole group a signal. Nothing once it was released: its numbers may be others'
        by then."""
        if self._pidfd < 0:
            return
        try:
            os.killpg(self.pid, number)
        except OSError:  # all gone; or not a group's leader yet
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except OSError:
                pass  # it is over: `_exited` will be called

    def release(self) -> None:
        """Watch it no more."""
        self._close_outputs()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def _watchable(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:  # a kernel before 5.3, or no descriptors left
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


# ---------------------------------------------------------------- becoming another program


_Three = tuple[int, int, int]
_Two = tuple[int, int]


def _fork(
    unit: Unit, environment: Mapping[str, str], streams: _Three, go: _Two, *, controls: bool
) -> int:
    # Signals wait meanwhile: the child must not run our handlers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            gc.disable()
            _become(unit, environment, streams, go, controls=controls)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _become(
    unit: Unit, environment: Mapping[str, str], streams: _Three, go: _Two, *, controls: bool
) -> None:
    """In the child: never returns.

    Args:
        controls: Its standard input is to be its controlling terminal.
    """
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        stdin, output, error = streams
        os.dup2(stdin if stdin >= 0 else os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(error, 2)
        if controls:
            os.login_tty(0)
        os.close(go[1])
        if os.read(go[0], 1):  # nothing: the daemon has died
            _limit(unit.limits)
            _become_user(unit)
            os.chdir(unit.directory)
            os.execve(unit.command[0], unit.command, dict(environment))
    except OSError as error:
        where = error.filename or unit.command[0]
        os.write(2, f"vchan-guest: cannot start: {where}: {error.strerror}\n".encode())
    except (KeyError, ValueError) as error:
        os.write(2, f"vchan-guest: cannot start: {error}\n".encode())
    finally:
        os._exit(EXIT_NOT_STARTED)


def _limit(limits: UnitLimits) -> None:
    if limits == UnitLimits():
        return
    import resource

    for kind, value in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_NPROC, limits.processes),
    ):
        if value is not None:
            resource.setrlimit(kind, (value, value))


def _become_user(unit: Unit) -> None:
    if not unit.user and not unit.group:
        return
    import grp
    import pwd

    gid, groups = os.getgid(), [grp.getgrnam(unit.group).gr_gid] if unit.group else []
    uid = os.getuid()
    if unit.user:
        entry = pwd.getpwnam(unit.user)
        uid, gid = entry.pw_uid, entry.pw_gid
        groups += os.getgrouplist(unit.user, gid)
    if unit.group:
        gid = groups[0]
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)


# ---------------------------------------------------------------- who is who


def start_time(pid: int) -> str:
    """When a process began, as the kernel counts; empty: there is none. With it, a number means one
    process for ever."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def default_environment(unit: Unit, socket: str) -> dict[str, str]:
    """A unit's environment: little, so that nothing of ours leaks into it."""
    environment = {
        "PATH": os.environ.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"),
        "LANG": "C.UTF-8",
        "HOME": os.environ.get("HOME", "/"),
        "VCHAN_SOCKET": socket,
    }
    if unit.user:
        import pwd

        try:
            home = pwd.getpwnam(unit.user).pw_dir
        except KeyError:
            home = "/"
        environment |= {"USER": unit.user, "LOGNAME": unit.user, "HOME": home}
    return environment | dict(unit.environment)


def require_safe(fd: int, path: str) -> None:
    """That nobody but root, or who we are, can change a file that says what we run."""
    found = os.fstat(fd)
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        problem = f"others can change it (uid {found.st_uid}, mode {found.st_mode & 0o7777:04o})"
        raise ConfigError(path, f"{problem}: chown root and chmod go-w it")
