"""`vchan dev`: an agent on a laptop, without a VM, a broker or root.

    vchan-host (this process) == unix socket == vchan-guest == unix socket == the agent
         ^                  in the virtio port's place
         programs, at its own socket: in the control side's place

Both daemons are the real ones: this one with a channel that its configuration names, and with every
request shown; the guest's as a process, which runs the agent as one of its units. So an agent that
works here works in a VM: what differs is the stream, and who else is there.

Rules of this file
1. Everything that is made stands in one directory, which is this user's alone; one `vchan dev` has
   it at a time. It is gone in the end.
2. Nothing is left running, whatever ends this process: the guest's daemon ends when its channel has
   been away for ABSENT_S, and its units with it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple

from vchan.errors import BadBody, ConfigError, PortBusy, VchanError
from vchan.host import config
from vchan.host.daemon import Daemon
from vchan.programs.connection import SOCKET_VARIABLE
from vchan.rpc.bodies import (
    decode_failure,
    decode_invocation,
    decode_raw,
    encode_invocation,
    encode_json,
)
from vchan.rpc.in_flight import Answered, HandedBack, Heartbeat, Outcome, Taken
from vchan.rpc.messages import CALL, FANOUT, GUEST_TOPIC, NOTIFICATION, RAW, Request
from vchan.rpc.outcomes import ending_of
from vchan.session import printable

NAME: Final = "dev"
"""The channel's, where a VM's name stands."""
UNIT: Final = "agent"
HTTP_UNIT: Final = "http"

DIRECTORIES: Final = ("policy.d", "agents.d", "agent.sock.units")
FILES: Final = (
    *("vchan.conf", "guest.conf", "http.conf", "token", "audit.log"),
    *("host.sock", "agent.sock", "channel.sock", "host.sock.channels"),
)
"""What stands in its directory, beside those and a lock."""

WATCH_S: Final = 0.3
"""How often it is looked whether files have changed; the agent is started again when they have been
as they are for as long."""
WATCHED_MAX: Final = 5000
"""Files that are watched: to look at so many takes some 50 ms. At it: the others are not, and it is
said."""
WATCHED_SUFFIXES: Final = frozenset(
    {".py", ".sh", ".js", ".mjs", ".ts", ".go", ".rb", ".toml", ".json", ".yaml", ".yml", ".ini"}
)
PASSED_OVER: Final = frozenset({"__pycache__", "node_modules", "venv", "build", "dist"})
"""Directories that no author edits, and those with a dot before their names."""
ABSENT_S: Final = 5
"""The guest's daemon ends when this process has been gone for so long."""
END_S: Final = 10.0
"""For the guest's daemon and the agent to end. At it: they are killed."""
STOP_S: Final = 3.0
"""For the agent to end, when it is stopped or started again. At it: it is killed."""
SHOWN_CHARS_MAX: Final = 300
"""Of one request's arguments, or of its answer. At it: the rest is not shown."""
LINE_BYTES_MAX: Final = 8192
"""Of the guest's log: it cuts longer lines itself."""
ENVIRONMENT_BYTES_MAX: Final = 40 * 1024
"""Of this process's variables that the agent gets: a unit file has 64 KiB. At it: the longest are
left out, and it is said."""
TOKEN_BYTES: Final = 24
"""Of the token that programs show at the HTTP port."""

_PATH: Final = re.compile(r"/[A-Za-z0-9/._+@-]*")
_UNIT_LINE: Final = re.compile(rf"unit ({UNIT}|{HTTP_UNIT}): ")

_POLICY: Final = """\
# vchan dev: what an agent may do in a VM is for the host's own policy to say. Try it: --policy DIR.
listen,reply,cast,fanout,call,notify,report any any allow
forward any any allow
"""

Say = Callable[[str], None]


class Wanted(NamedTuple):
    """What the command line asks for.

    Attributes:
        command: The agent's: a program and its arguments.
        directory: For the sockets and files.
        policy: A directory of rules, in place of "everything"; "" if none.
        watch: Directories whose files' changes start the agent again; none: the agent's own.
        accept: Topics of the control side that take whatever is sent there, and answer null.
        http_port: For agents that speak HTTP; 0: none.
        is_verbose: Show what both daemons say, too.
    """

    command: tuple[str, ...]
    directory: str
    policy: str = ""
    watch: tuple[str, ...] = ()
    accept: frozenset[str] = frozenset()
    http_port: int = 0
    is_verbose: bool = False


def run(wanted: Wanted, say: Say) -> int:
    """Run it until SIGINT or SIGTERM.

    Args:
        say: Shows a line.

    Returns:
        The exit status: 0, or 1 when the guest's daemon has ended by itself.

    Raises:
        ConfigError: Something on the command line is wrong.
        LinkError: Another `vchan dev` runs in the directory.
    """
    command = resolve_command(wanted.command)
    watched = tuple(Path(each) for each in wanted.watch) or _own_directory(command)
    for each in watched:
        if not each.is_dir():
            raise ConfigError("--watch", f"{each} is no directory")
    place = Place(wanted.directory)
    try:
        log_to(say, logging.INFO if wanted.is_verbose else logging.WARNING)
        dev = DevDaemon(place.write(wanted, command), place, wanted, watched, say)
        return dev.run()
    finally:
        place.remove()


def resolve_command(words: tuple[str, ...]) -> tuple[str, ...]:
    """A command with its program's absolute path. A file of Python's is run by the Python that runs
    this.

    Raises:
        ConfigError: There is no such program.
    """
    path = Path(words[0])
    if path.suffix == ".py" and path.is_file():
        return (sys.executable, str(path.absolute()), *words[1:])
    found = shutil.which(words[0])
    if found is None:
        raise ConfigError(words[0], _why_not_run(path))
    return (str(Path(found).absolute()), *words[1:])


def _why_not_run(path: Path) -> str:
    if path.is_file():
        return f"no program: chmod +x {path}, or name its interpreter before it"
    if path.suffix == ".py":
        return f"no such file in {Path.cwd()}"
    return "no such command: expected a file agent.py, or a command"


def _own_directory(command: tuple[str, ...]) -> tuple[Path, ...]:
    """That of the first word that is a source file; else this one."""
    for word in command:
        if Path(word).suffix in WATCHED_SUFFIXES and Path(word).is_file():
            return (Path(word).absolute().parent,)
    return (Path.cwd(),)


def log_to(say: Say, level: int) -> None:
    """Have what the host's daemon logs shown."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"host  | {record.getMessage()}")

    logger = logging.getLogger("vchan")
    logger.handlers[:] = [Handler()]
    logger.setLevel(level)
    logger.propagate = False


class Place:
    """The directory: this user's alone, and one `vchan dev`'s at a time."""

    def __init__(self, path: str) -> None:
        if not _PATH.fullmatch(path) or len(path) > 80:  # a socket's path has 107 bytes
            problem = f"{path!r}; expected an absolute path of letters, digits and /._+@-, short"
            raise ConfigError("--dir", problem)
        self.path = path
        self._directory = Path(path)
        try:
            self._directory.mkdir(0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError("--dir", f"{path} cannot be made: {error.strerror}") from error
        found = self._directory.lstat()
        is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not is_ours or found.st_mode & 0o077:
            raise ConfigError("--dir", f"{path} is there, and is not this user's alone (mode 0700)")
        if not (self._directory / "lock").exists():
            self._require_room()
        self._lock = os.open(f"{path}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            assert error.errno in (errno.EAGAIN, errno.EACCES)
            raise PortBusy(
                path, "another vchan dev runs there: end it, or name another --dir"
            ) from None
        self._empty()

    def _require_room(self) -> None:
        """Refuse a directory in which others' things have names of ours."""
        for name in (*DIRECTORIES, *FILES):
            if os.path.lexists(self._directory / name):
                problem = (
                    f"{self.path}/{name} is there, and no vchan dev has made it; expected none"
                )
                raise ConfigError("--dir", problem)

    def _empty(self) -> None:
        """Of what an earlier one has left, and of nothing else."""
        for name in DIRECTORIES:
            shutil.rmtree(self._directory / name, ignore_errors=True)
        for name in FILES:
            (self._directory / name).unlink(missing_ok=True)

    def write(self, wanted: Wanted, command: tuple[str, ...]) -> Any:
        """The files of both daemons; returns the host's configuration.

        Raises:
            ConfigError: The policy is none.
        """
        policy = wanted.policy or f"{self.path}/policy.d"
        if not wanted.policy:
            Path(policy).mkdir(0o700)
            self._file("policy.d/50-dev.policy", _POLICY)
        elif not _PATH.fullmatch(policy) or not Path(policy).is_dir():
            raise ConfigError("--policy", f"{policy!r}; expected the absolute path of a directory")
        self._file(
            "vchan.conf",
            f"[vchan]\nhost = {NAME}\nlibvirt_uri =\nsocket = {self.path}/host.sock\n"
            f"policy_dir = {policy}\naudit_log = {self.path}/audit.log\n"
            f"channels = {NAME}=connect:{self.path}/channel.sock\n",
        )
        self._file("guest.conf", "")
        (self._directory / "agents.d").mkdir(0o700)
        variables = {"PYTHONUNBUFFERED": "1"}
        if wanted.http_port:
            token = secrets.token_hex(TOKEN_BYTES)
            base = f"127.0.0.1:{wanted.http_port}"
            variables |= {"VCHAN_HTTP": f"http://{base}", "VCHAN_HTTP_TOKEN": token}
            self._file("token", token)
            self._file("http.conf", "")
            words = (
                *(
                    sys.executable,
                    "-m",
                    "vchan.gateways.http",
                    "--config",
                    f"{self.path}/http.conf",
                ),
                *("--listen", f"tcp:{base}", "--token-file", f"{self.path}/token", "--quiet"),
                *("--agent-socket", f"{self.path}/agent.sock"),
            )
            self._unit(HTTP_UNIT, words, {}, "always")
        self._unit(UNIT, command, variables, "no")
        conf = config.load(["--config-file", f"{self.path}/vchan.conf"])
        config.policy(conf)
        return conf

    def _unit(
        self, name: str, command: Iterable[str], variables: dict[str, str], restart: str
    ) -> None:
        environment = {**passed_on(os.environ), **variables}
        lines = (
            f"command = {json.dumps(list(command))}",
            f"directory = {json.dumps(str(Path.cwd()))}",
            f'restart = "{restart}"',
            f"stop_timeout_s = {STOP_S}",
            "[environment]",
            *(f"{json.dumps(key)} = {json.dumps(text)}" for key, text in environment.items()),
        )
        self._file(f"agents.d/{name}.toml", "\n".join(lines))

    def _file(self, name: str, text: str) -> None:
        descriptor = os.open(f"{self.path}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)

    def remove(self) -> None:
        """It is over."""
        self._empty()
        try:
            (self._directory / "lock").unlink()
            self._directory.rmdir()
        except OSError:
            pass  # the user keeps other things there
        os.close(self._lock)


def passed_on(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that the agent gets: as many as a unit file can say, without what is another's."""
    kept: dict[str, str] = {}
    left = ENVIRONMENT_BYTES_MAX
    for name, text in sorted(variables.items(), key=lambda each: len(each[1])):
        left -= 3 * (len(name) + len(text))  # at most, as JSON
        is_plain = (name + text).isprintable() and "\x7f" not in text  # as TOML can say
        if left > 0 and is_plain and name != SOCKET_VARIABLE:
            kept[name] = text
    return kept


class WatchedFiles:
    """The files of some directories, and whether they have changed."""

    def __init__(self, directories: tuple[Path, ...]) -> None:
        self._directories = directories
        self.is_cut = False
        self._seen = self._look()
        self._stable = self._seen

    def changed(self) -> bool:
        """Whether they have since the last time that this said so, and do not any more."""
        before, self._seen = self._seen, self._look()
        if self._seen != before or self._seen == self._stable:
            return False
        self._stable = self._seen
        return True

    def _look(self) -> dict[Path, tuple[int, int]]:
        found: dict[Path, tuple[int, int]] = {}
        for path in self._paths():
            if len(found) >= WATCHED_MAX:
                self.is_cut = True
                break
            try:
                state = path.stat()
            except OSError:
                continue  # it is being replaced: the next look sees what by
            found[path] = (state.st_mtime_ns, state.st_size)
        return found

    def _paths(self) -> Iterator[Path]:
        for directory in self._directories:
            for where, names, files in os.walk(directory):
                names[:] = sorted(n for n in names if n[0] != "." and n not in PASSED_OVER)
                for name in sorted(files):
                    if (path := Path(where, name)).suffix in WATCHED_SUFFIXES:
                        yield path


class DevDaemon(Daemon):
    """vchan-host, with one channel, whose other end it starts; what crosses it is shown."""

    def __init__(
        self, conf: Any, place: Place, wanted: Wanted, watched: tuple[Path, ...], say: Say
    ) -> None:
        super().__init__(conf)
        self._say = say
        self._wanted = wanted
        self._place = place
        self._files = WatchedFiles(watched)
        self._watched = watched
        self._topics: frozenset[str] | None = None
        self._output = b""
        self._has_ended = False
        offer = self._local.offer

        def shown(request: Request, told: Callable[..., None], **options: Any) -> Any:
            return self._offer_up(offer, request, told, options)

        self._local.offer = shown  # type: ignore[method-assign]  # agents' requests pass here
        self._guest = self._start_guest()

    def _start_guest(self) -> subprocess.Popen[bytes]:
        path = self._place.path
        words = (
            *(sys.executable, "-m", "vchan.guest.daemon", "--config", f"{path}/guest.conf"),
            *("--port", f"listen:{path}/channel.sock", "--socket", f"{path}/agent.sock"),
            *("--units", f"{path}/agents.d", "--exit-without-port", str(ABSENT_S)),
            *("--allow", "ping,info,list,state,log,start,stop,restart"),
            *("--forward", "tcp:*,unix:/*,service:*"),
        )
        guest = subprocess.Popen(
            words,
            cwd=path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: it is ended in order
        )
        assert guest.stdout is not None
        os.set_blocking(guest.stdout.fileno(), False)
        return guest

    # ---------------------------------------------------------------- from begin to end

    def run(self) -> int:
        """See `run` above."""
        assert self._guest.stdout is not None
        self.loop.add_reader(self._guest.stdout.fileno(), self._read_output)
        self.loop.call_later(WATCH_S, self._watch)
        self._greet()
        try:
            status = super().run()
        finally:
            self._end_guest()
        self._say("vchan dev: ended")
        return 1 if self._has_ended else status

    def _reload(self) -> None:
        """The terminal is gone."""
        self.loop.stop()

    def _greet(self) -> None:
        where = "" if self._place.path == default_directory() else f" --dir {self._place.path}"
        watched = ", ".join(map(str, self._watched))
        self._say(f"vchan dev: {' '.join(self._wanted.command)}; Ctrl-C ends it. Elsewhere:")
        self._say(f"    vchan dev call{where} METHOD KEY=VALUE")
        self._say(f"    vchan --socket {self._place.path}/host.sock list")
        self._say(f"It is started again when files in {watched} change.")
        if self._files.is_cut:
            self._say(f"vchan dev: only {WATCHED_MAX} files are watched: see --watch")
        if self._wanted.http_port:
            self._say(
                f"HTTP: 127.0.0.1:{self._wanted.http_port}, token in {self._place.path}/token"
            )

    def _end_guest(self) -> None:
        guest = self._guest
        guest.terminate()
        try:
            guest.wait(END_S)
        except subprocess.TimeoutExpired:
            guest.kill()  # its units end with it
            guest.wait()
        self._show_rest()

    def _show_rest(self) -> None:
        assert self._guest.stdout is not None
        try:
            while data := os.read(self._guest.stdout.fileno(), LINE_BYTES_MAX):
                self._show_output(data)
        except BlockingIOError:
            pass
        self._guest.stdout.close()

    # ---------------------------------------------------------------- what the guest says

    def _read_output(self) -> None:
        assert self._guest.stdout is not None
        try:
            data = os.read(self._guest.stdout.fileno(), LINE_BYTES_MAX)
        except BlockingIOError:
            return
        if data:
            self._show_output(data)
            return
        self.loop.remove_reader(self._guest.stdout.fileno())
        self._has_ended = True
        self._say(f"vchan dev: vchan-guest has ended, status {self._guest.wait()}")
        self.loop.stop()

    def _show_output(self, data: bytes) -> None:
        *lines, self._output = (self._output + data).split(b"\n")
        self._output = self._output[-LINE_BYTES_MAX:]
        for line in lines:
            text = line.decode("utf-8", "replace")
            found = _UNIT_LINE.match(text)
            if found:
                self._say(f"{found[1]:5} | {text[found.end() :]}")
            elif self._wanted.is_verbose:
                self._say(f"guest | {text}")

    # ---------------------------------------------------------------- what changes

    def _watch(self) -> None:
        self.loop.call_later(WATCH_S, self._watch)
        if self._files.changed():
            self._say("vchan dev: files have changed: starting again")
            self._restart()
        hosted = self._vms.get(NAME)
        topics = frozenset(topic.name for topic in hosted.topics) if hosted else frozenset()
        topics -= {GUEST_TOPIC.name}
        if topics != self._topics and (topics or self._topics):
            self._topics = topics
            self._say(f"vchan dev: topics served: {', '.join(sorted(topics)) or 'none'}")

    def _restart(self) -> None:
        body = encode_invocation("agent_restart", {"name": UNIT})
        request = Request(os.urandom(16), CALL, 10_000, 0, *GUEST_TOPIC, "", body)

        def told(outcome: Outcome) -> None:
            if not (isinstance(outcome, Answered) and not outcome.failed):
                self._say(f"vchan dev: not started again: {describe_outcome(outcome)}")

        try:
            super().submit(NAME, request, told)
        except VchanError as error:  # the guest is not there yet, or not any more
            self._say(f"vchan dev: not started again: {error}")

    # ---------------------------------------------------------------- what is asked

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        """See Daemon: a program's request to the agent."""
        began_s = monotonic()

        def shown(outcome: Outcome) -> None:
            if not isinstance(outcome, Heartbeat):
                self._show("<-", request, outcome, monotonic() - began_s)
            told(outcome)

        return super().submit(server, request, shown)

    def _offer_up(
        self,
        offer: Callable[..., Any],
        request: Request,
        told: Callable[..., None],
        options: dict[str, Any],
    ) -> Any:
        """An agent's request to the control side, for a program here."""
        began_s = monotonic()

        def shown(outcome: Outcome, now_s: float) -> None:
            if not isinstance(outcome, Heartbeat):
                self._show("->", request, outcome, monotonic() - began_s)
            told(outcome, now_s)

        cancel = offer(request, shown, **options)
        if cancel is not None:
            return cancel
        if request.topic in self._wanted.accept:
            done = (
                Answered(request.id, False, b"" if request.flags & RAW else encode_json(None))
                if request.is_call
                else Taken(request.id)
            )
            self.loop.call_soon(lambda: shown(done, self.loop.time()))
            return lambda: None
        self._say(f"-> {describe_request(request)}: nobody serves it: see --accept")
        return None

    def _show(self, way: str, request: Request, outcome: Outcome, took_s: float) -> None:
        what = f"{way} {describe_request(request)}"
        is_raw = request.flags & RAW != 0
        told = describe_outcome(outcome, is_raw=is_raw)
        self._say(f"{what}: {told} ({took_s * 1000:.1f} ms)")


def describe_request(request: Request) -> str:
    """A request in a line."""
    kind = "call" if request.is_call else "cast"
    if request.flags & NOTIFICATION:
        kind = "notify"
    elif request.flags & FANOUT:
        kind = "fanout"
    try:
        body, data = decode_raw(request.body) if request.flags & RAW else (request.body, None)
        asked = decode_invocation(body)
    except BadBody as error:
        return f"{kind} {request.topic}: {error}"
    args = " ".join(f"{name}={_json(value)}" for name, value in asked.args.items())
    if data is not None:
        args = f"({len(data)} bytes) {args}"
    return _cut(f"{kind} {request.topic} {asked.method} {args}".rstrip())


def describe_outcome(outcome: Outcome, *, is_raw: bool = False) -> str:
    """What became of one, in a line."""
    match outcome:
        case Answered(_, False, body) if is_raw:
            return f"{len(body)} bytes"
        case Answered(_, False, body):
            return _cut(body.decode("utf-8", "replace"))
        case Answered(_, True, body):
            class_name, text = decode_failure(body)
            return _cut(f"{class_name}: {text}")
        case Taken():
            return "taken"
        case HandedBack(_, reason, text):
            return _cut(f"{ending_of(reason).error.__name__}: {text}")
        case _:
            return "no answer in time"


def _json(value: Any) -> str:
    return encode_json(value).decode("utf-8", "replace")


def _cut(text: str) -> str:
    shown = printable(text[: SHOWN_CHARS_MAX + 1])
    return shown if len(text) <= SHOWN_CHARS_MAX else f"{shown[:SHOWN_CHARS_MAX]}..."


def default_directory() -> str:
    """Where it is if nobody says: short, and this user's."""
    return f"{os.environ.get('XDG_RUNTIME_DIR') or '/tmp'}/vchan-dev-{os.geteuid()}"
