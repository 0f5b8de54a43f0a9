"""The standard agent: what most control planes want of a guest, as far as its owner allows it.

    vchan-guest standard-agent [--config FILE] [--socket PATH]

It serves topic `vchan.standard`. Everything but `ping` is off until /etc/vchan/standard.toml allows
it (`permissions`). It is an agent like any other, in a process of its own: the daemon runs it by
a unit.

    ping()                                              what is allowed here
    facts()                                             names, addresses, versions
    exec(argv, directory, environment, stdin, timeout_s)       an id
    exec_read(id, stdout_from, stderr_from, wait_s)     what it said, and whether it has ended
    exec_end(id)                                        end it and forget it
    file_read(path, offset, count)                      a part, with its checksum
    file_checksum(path)
    file_write_begin(path, size, sha256, mode)          an id
    file_write(id, offset, data, sha256)
    file_write_end(id)                                  now the file is there, whole
    file_write_give_up(id)

Bytes travel as base64. Programs that can `call_raw` have a shorter way:

    file_read_raw(b"", path, offset, count)             16 bytes: size, date in ns; then the part
    file_write_raw(bytes, id, offset, sha256)
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from vchan import __version__
from vchan.agents.processes import require_safe
from vchan.agents.standard.exec import Runs
from vchan.agents.standard.facts import facts
from vchan.agents.standard.files import (
    CHUNK_BYTES_MAX,
    Uploads,
    checksum,
    read_part,
    read_raw_part,
)
from vchan.agents.standard.permissions import Rules, parse_rules
from vchan.client import Agent, raw
from vchan.errors import ConfigError, LinkError, Rejected
from vchan.programs.connection import AGENT_SOCKET
from vchan.session import printable

if TYPE_CHECKING:
    from vchan.agents.standard.copies import CopyService
    from vchan.agents.standard.programs import ProgramService
    from vchan.agents.standard.services import Serve, Services

TOPIC: Final = "vchan.standard"
DEFAULT_CONFIG: Final = "/etc/vchan/standard.toml"
WORKERS: Final = 4
LISTEN_AGAIN_S: Final = 2.0
"""Where services cannot be listened for, it is tried again after this."""
LOOP_WAIT_S: Final = 10.0
"""For the loop to do something for a worker: it is never busy for long."""
EXIT_CONFIG: Final = 2
"""A wrong argument or configuration value."""

USAGE: Final = f"""\
usage: vchan-guest standard-agent [--config FILE] [--socket PATH]

  --config FILE   what is allowed [{DEFAULT_CONFIG}, if it is there]
  --socket PATH   the guest daemon's [$VCHAN_SOCKET, or {AGENT_SOCKET}]

exit status: 0 ended by a signal; {EXIT_CONFIG} wrong arguments or configuration
"""


class Standard:
    """The methods.

    Args:
        agent: Whose loop the programs belong to.
        log: Told what is done.
    """

    def __init__(self, rules: Rules, agent: Agent, log: Callable[[str], object]) -> None:
        self._rules = rules
        self._loop = agent.loop
        self._log = log
        self._runs = Runs(agent.loop, rules, self._in_loop, log)
        self._uploads = Uploads(rules)
        self._listening: Services | None = None
        self._taking: dict[str, ProgramService | CopyService] = {}

    def _in_loop(self, action: Callable[[], Any]) -> Any:
        done = threading.Event()
        outcome: list[Any] = []

        def act() -> None:
            try:
                outcome.append(action())
            except Rejected as error:
                outcome.append(error)
            done.set()

        self._loop.call_soon_threadsafe(act)
        if not done.wait(LOOP_WAIT_S):
            raise Rejected("the agent is ending")
        if isinstance(outcome[0], Rejected):
            raise outcome[0]
        return outcome[0]

    def ping(self) -> dict[str, Any]:
        """What is allowed here."""
        if not self._rules.ping:
            raise self._rules.refuse("ping", "is not allowed", "ping")
        return {"version": __version__, "allowed": self._rules.allowed()}

    def facts(self) -> dict[str, Any]:
        """What this guest is."""
        if not self._rules.facts:
            raise self._rules.refuse("facts", "are not allowed", "facts")
        return facts()

    def exec(
        self,
        argv: list[str],
        directory: str = "/",
        environment: dict[str, str] | None = None,
        stdin: str = "",
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Run a program, without a shell; `exec_read` tells what it said."""
        return self._runs.start(argv, directory, environment or {}, stdin, timeout_s)

    def exec_read(
        self, id: str, stdout_from: int = 0, stderr_from: int = 0, wait_s: float = 0
    ) -> dict[str, Any]:
        """What a program said from there on, and whether it has ended."""
        return self._runs.read(id, stdout_from, stderr_from, wait_s)

    def exec_end(self, id: str) -> dict[str, Any]:
        """End a program, and forget what it said."""
        return self._runs.end(id)

    def file_read(self, path: str, offset: int = 0, count: int = CHUNK_BYTES_MAX) -> dict[str, Any]:
        """A part of a file."""
        if offset == 0:
            self._log(f"file_read {path}")
        return read_part(self._rules, path, offset, count)

    @raw
    def file_read_raw(
        self, data: bytes, path: str, offset: int = 0, count: int = CHUNK_BYTES_MAX
    ) -> bytes:
        """The same as bytes: `files.RAW_PART`, and the part."""
        if data:
            raise ValueError("takes no bytes")
        if offset == 0:
            self._log(f"file_read_raw {path}")
        return read_raw_part(self._rules, path, offset, count)

    def file_checksum(self, path: str) -> dict[str, Any]:
        """A file's checksum."""
        return checksum(self._rules, path)

    def file_write_begin(
        self, path: str, size: int, sha256: str, mode: int = 0o644
    ) -> dict[str, Any]:
        """Begin to write a file."""
        self._log(f"file_write_begin {path}, {size} bytes")
        return self._uploads.begin(path, size, sha256, mode)

    def file_write(self, id: str, offset: int, data: str, sha256: str = "") -> dict[str, Any]:
        """Write a part of it."""
        return self._uploads.write(id, offset, data, sha256)

    @raw
    def file_write_raw(self, data: bytes, id: str, offset: int, sha256: str = "") -> bytes:
        """The same, as bytes."""
        self._uploads.write_raw(id, offset, data, sha256)
        return b""

    def file_write_end(self, id: str) -> dict[str, Any]:
        """Have it appear."""
        done = self._uploads.end(id)
        self._log(f"file_write_end {done['path']}")
        return done

    def file_write_give_up(self, id: str) -> dict[str, Any]:
        """Leave the file as it was."""
        return self._uploads.give_up(id)

    def _services(self) -> "dict[str, Serve]":
        """What byte streams may be joined to here, as far as the owner allows it."""
        allowed = self._rules.allowed()
        if allowed["exec"] or allowed["shell"]:
            from vchan.agents.standard.programs import ProgramService

            for name in ("exec", "shell"):
                if allowed[name]:
                    self._taking[name] = ProgramService(name, self._loop, self._rules, self._log)
        if allowed["read"] or allowed["write"]:
            from vchan.agents.standard.copies import CopyService

            self._taking["files"] = CopyService(self._rules, self._log)
        return {name: service.serve for name, service in self._taking.items()}

    def _listen(self, socket: str) -> None:
        serve = self._services()
        if serve:
            from vchan.agents.standard.services import Services  # here: it costs start-up time
            from vchan.io.targets import services_directory

            directory = services_directory(socket)
            self._try_to_listen(partial(Services, self._loop, directory, serve, self._log), "")

    def _try_to_listen(self, begin: "Callable[[], Services]", before: str) -> None:
        """Until it works: the daemon, which makes the directory above, may start later.

        Args:
            before: What has been logged already.
        """
        try:
            self._listening = begin()
        except LinkError as error:
            problem = f"no services yet: {error}"
            if problem != before:
                self._log(problem)
            again = partial(self._try_to_listen, begin, problem)
            self._loop.call_later(LISTEN_AGAIN_S, again)

    def _close(self) -> None:
        if self._listening is not None:
            self._listening.close()
        for service in self._taking.values():
            service.close()
        self._runs.close()
        self._uploads.close()


def read_rules(path: str, *, required: bool) -> Rules:
    """The rules of a file; without one, the defaults.

    Raises:
        ConfigError: It is wrong, or not there though it should be.
    """
    import tomllib

    try:
        with open(path, "rb") as file:
            require_safe(file.fileno(), path)
            content = tomllib.load(file)
    except FileNotFoundError:
        if required:
            raise ConfigError(path, "no such file") from None
        return Rules(path)
    except OSError as error:
        raise ConfigError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(path, f"is no TOML: {error}") from error
    return parse_rules(path, content)


def _options(arguments: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in ("--config", "--socket") or not (equals or rest):
            raise ConfigError("command line", f"{name!r}: see vchan-guest standard-agent --help")
        given[name] = value if equals else rest.pop(0)
    return given


def log(text: str) -> None:
    """To standard error; several lines where a method has failed."""
    shown = printable(text, besides="\n")
    try:
        os.write(2, f"{shown}\n".encode("utf-8", "replace"))
    except OSError:
        pass  # nobody reads the log: that is no reason to stop serving


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    words = sys.argv[1:] if arguments is None else arguments
    if "--help" in words:
        os.write(1, USAGE.encode())
        return
    try:
        options = _options(words)
        path = options.get("--config", "")
        rules = read_rules(path or DEFAULT_CONFIG, required=bool(path))
    except ConfigError as error:
        log(f"vchan-guest standard-agent: {error}")
        sys.exit(EXIT_CONFIG)
    socket = options.get("--socket") or os.environ.get("VCHAN_SOCKET") or AGENT_SOCKET
    agent = Agent(socket, workers=WORKERS, log=log)
    standard = Standard(rules, agent, log)
    standard._listen(socket)
    agent.serve(TOPIC, standard)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    allowed = ", ".join(name for name, is_allowed in rules.allowed().items() if is_allowed)
    log(f"standard agent {__version__}: allowed by {rules.where}: {allowed or 'nothing'}")
    try:
        agent.run()
    except LinkError as error:  # not a socket that is away: no socket at all
        log(f"vchan-guest standard-agent: {error}")
        sys.exit(EXIT_CONFIG)
    finally:
        standard._close()


if __name__ == "__main__":
    main()
