"""vchan-guest: the daemon inside the VM. Relays between the channel and local agents.

Light on purpose: the standard library only, and of that what starts fast. Logs to standard error.
"""

import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from time import CLOCK_BOOTTIME, clock_gettime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vchan import __version__
from vchan.access import Access, Credentials, make_access
from vchan.errors import ConfigError, LinkError, PortAbsent
from vchan.guest.allowed import DEFAULT_ALLOW, UNIT_METHODS, Allowed, running_directory
from vchan.guest.journal import log
from vchan.guest.options import (
    EXIT_CONFIG,
    EXIT_OK,
    EXIT_SOCKET,
    SWITCH,
    Given,
    read_options,
    run_program,
)
from vchan.guest.port import DEFAULT_PORT, Port, goes_one_way, port_opener, session_maker
from vchan.guest.router import Router
from vchan.link import Link
from vchan.loop import Loop, Timer
from vchan.notify import ServiceManager
from vchan.server import LocalServer
from vchan.session import (
    Config,
    Event,
    Heard,
    Lost,
    Opened,
    Received,
    Refused,
    Role,
    Silent,
    Violation,
)
from vchan.streams import Stream

if TYPE_CHECKING:  # imported where there are units: it costs start-up time
    from vchan.guest.agents import Agents

DEFAULT_SOCKET: Final = "/run/vchan/agent.sock"
DEFAULT_CONFIG: Final = "/etc/vchan/guest.conf"
DEFAULT_UNITS: Final = "/etc/vchan/agents.d"
DEFAULTS: Final = {
    "port": DEFAULT_PORT,
    "exit-without-port": "0",
    "socket": DEFAULT_SOCKET,
    "socket-mode": "0660",
    "agent-users": "",
    "agent-groups": "",
    "units": DEFAULT_UNITS,
    "allow": DEFAULT_ALLOW,
    "quiet": SWITCH,
}

GARBAGE_OBJECTS: Final = 20_000
"""Objects more than at the last look for garbage, until the next."""
TICK_S: Final = 0.1
"""How late a request's time may run out here. To ask the router for its next timeout after every
message would cost a tenth of all its work."""

ONE_WAY_MAX: Final = 256
"""Requests that came down a pipe and wait for an agent; what is read at a time comes on top of it,
and stays below REQUESTS_MAX."""

_ERROR, _WARNING, _INFO = 3, 4, 6

USAGE: Final = f"""\
usage: vchan-guest [--config FILE] [--port URL] [--exit-without-port SECONDS]
                   [--socket PATH] [--socket-mode MODE]
                   [--agent-users NAMES] [--agent-groups NAMES]
                   [--units DIRECTORY] [--allow WHAT] [--quiet]
       vchan-guest standard-agent [--config FILE] [--socket PATH]

  --config FILE       read these options from FILE ({DEFAULT_CONFIG} if it is there):
                      lines of  option = value , without the dashes; # begins a comment
  --port URL          the channel [{DEFAULT_PORT}]
  --exit-without-port SECONDS
                      end when the port has been absent so long, for who starts the daemon
                      when it appears [0: never]
  --socket PATH       where agents attach [{DEFAULT_SOCKET}]
  --socket-mode MODE  the socket's permissions, octal [0660]
  --agent-users NAMES, --agent-groups NAMES
                      who may attach, with commas between, besides root and the daemon's
                      own user [whoever may open the socket]
  --units DIRECTORY   the sub-agents to run, a file NAME.toml each; read again at SIGHUP
                      [{DEFAULT_UNITS}]
  --allow WHAT        what the control side may do, with commas between: ping, info, list,
                      and state, log, start, stop, restart, each of them also for units by
                      a pattern, as in  restart:web*  [{DEFAULT_ALLOW}]
  --quiet             log warnings and errors only
  --version, --help

exit status: {EXIT_OK} ended by a signal, or without its port; {EXIT_CONFIG} wrong arguments or
configuration; {EXIT_SOCKET} the agents' socket cannot be made
"""


class Options(NamedTuple):
    """What the daemon is told."""

    port: str = DEFAULT_PORT
    socket: str = DEFAULT_SOCKET
    socket_mode: int = 0o660
    quiet: bool = False
    exit_without_port_s: int = 0
    units: str = DEFAULT_UNITS
    allow: str = DEFAULT_ALLOW
    access: Access | None = None


def parse_options(arguments: list[str]) -> Options:
    """The options in a command line and in the configuration file it names.

    Raises:
        ConfigError: One of them is wrong; says which, where, and what was expected.
    """
    values = read_options(arguments, DEFAULTS, DEFAULT_CONFIG, "vchan-guest")
    port, absence, allow = (values[name] for name in ("port", "exit-without-port", "allow"))
    try:
        port_opener(port.value)
    except ConfigError as error:
        raise ConfigError(f"{port.where}: {error.where}", error.problem) from error
    if not absence.value.isdecimal():
        raise absence.wrong("expected a whole number of seconds")
    try:
        Allowed(allow.value)
    except ValueError as error:
        raise ConfigError(allow.where, str(error)) from error
    return Options(
        port.value,
        values["socket"].path(),
        values["socket-mode"].mode(),
        values["quiet"].is_yes,
        int(absence.value),
        values["units"].path(),
        allow.value,
        _access(values["agent-users"], values["agent-groups"]),
    )


def _access(users: Given, groups: Given) -> Access | None:
    if not users.value and not groups.value:
        return None
    return make_access(users.words(), groups.words(), users.where, groups.where)


class Daemon:
    """Wires the port, the router and the agents' socket together.

    Raises:
        LinkError: The agents' socket cannot be made.
    """

    def __init__(self, options: Options) -> None:
        self.loop = Loop()
        self._started_s = self.loop.time()
        self._quiet = options.quiet
        self._manager = ServiceManager(self.loop)
        instance = os.urandom(16)
        name = os.uname().nodename
        make_session = session_maker(options.port)
        self._session = make_session(Config(Role.GUEST, instance, name), os.urandom)
        self._options = options
        self._allowed = Allowed(options.allow)
        self._units: Agents | None = None
        self._is_ending = False
        methods: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "ping": self._ping,
            "info": self._info,
            **{name: partial(self._ask_units, name) for name in UNIT_METHODS},
        }
        self._opener = port_opener(options.port)
        self._exit_without_port_s = options.exit_without_port_s
        self._absent_since_s: float | None = None
        self._port = Port(
            self.loop,
            self._open_port,
            self._session,
            self._handle,
            self._note,
            self._is_full if goes_one_way(options.port) else None,
        )
        self._router = Router(self._port.send, methods, self.loop.time())
        self._timer: Timer | None = None
        self._server = LocalServer(
            self.loop,
            options.socket,
            options.socket_mode,
            instance,
            name,
            self,
            self._note,
            options.access,
        )

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.loop.call_soon_threadsafe(self._end))
        signal.signal(signal.SIGHUP, lambda *_: self.loop.call_soon_threadsafe(self._reload))
        self._log(_INFO, f"vchan-guest {__version__}: agents at {self._server.path}")
        self._port.open()
        self._set_timer()
        # What start-up made stays, and what a request makes frees itself: to look for garbage
        # every 700 objects would cost a twentieth of all work.
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS)
        self._manager.ready(f"agents at {self._server.path}")
        if self._has_units():
            self.loop.call_soon(self._super_agent().begin)
        try:
            self.loop.run()
        finally:
            self._manager.stopping()
            if self._units is not None:
                self._units.close()
            self._server.close()
            self._port.close()
            self.loop.close()

    # ---------------------------------------------------------------- the host

    def _handle(self, event: Event) -> None:
        match event:
            case Received():
                self._router.host_receive(event.message, self.loop.time())
                self._set_timer()
            case Opened(peer, resumed):
                self._log(_INFO, f"host {peer.name}: {'resumed' if resumed else 'new session'}")
                self._manager.status(f"host {peer.name}")
                self._router.host_opened(resumed=resumed, now_s=self.loop.time())
                self._set_timer()
            case Lost(first, until):
                self._log(_WARNING, f"frames {first} to {until - 1} were lost: asked for again")
            case Violation(reason):
                self._log(_WARNING, f"the host broke the protocol: {reason}")
            case Refused(reason, by_peer):
                self._log(_ERROR, f"refused {'by the host' if by_peer else ''}: {reason}")
            case Silent(for_s):
                self._log(_INFO, f"no word from the host for {for_s:.0f} s")
            case Heard():
                self._log(_INFO, "the host is back")

    def _is_full(self) -> bool:
        """Nobody at a pipe's other end can be told that it is too much: it is left in the pipe."""
        return self._router.running >= ONE_WAY_MAX

    def _open_port(self) -> Stream:
        """Open the port; end the daemon if it has been absent for too long."""
        try:
            stream = self._opener()
        except PortAbsent:
            now_s = self.loop.time()
            if self._absent_since_s is None:
                self._absent_since_s = now_s
            absent_s = now_s - self._absent_since_s
            if self._exit_without_port_s and absent_s >= self._exit_without_port_s:
                self._log(_INFO, f"no port for {absent_s:.0f} s: ending (exit-without-port)")
                self._end()
            raise
        except LinkError:  # it is there
            self._absent_since_s = None
            raise
        self._absent_since_s = None
        return stream

    # ---------------------------------------------------------------- agents

    def peer_opened(self, key: int, link: Link, who: Credentials) -> None:
        """An agent attached."""
        if not self._router.has_room:
            self.loop.call_soon(lambda: self._server.drop(key, "too many agents (AGENTS_MAX)"))
        self._log(_INFO, f"agent {key}: pid {who.pid}, uid {who.uid}")
        self._router.attach(key, link.send, self.loop.time())

    def peer_message(self, key: int, data: bytes) -> None:
        """A message of an agent's."""
        problem = self._router.agent_receive(key, data, self.loop.time())
        if problem:
            self._server.drop(key, problem)
        self._set_timer()

    def peer_closed(self, key: int) -> None:
        """An agent went away."""
        self._log(_INFO, f"agent {key}: gone")
        self._router.detach(key, self.loop.time())
        self._set_timer()

    # ---------------------------------------------------------------- units

    def _has_units(self) -> bool:
        """Whether the super-agent is worth its start-up time."""
        for directory in (self._options.units, running_directory(self._options.socket)):
            try:
                if os.listdir(directory):
                    return True
            except OSError:
                pass  # none: or it says so when it is asked
        return False

    def _super_agent(self) -> "Agents":
        if self._units is None:
            from vchan.guest.agents import Agents, Systemd

            self._units = Agents(
                self.loop,
                self._options.units,
                self._options.socket,
                self._allowed,
                self._router.served_topics,
                self._log,
                Systemd.if_there(),
            )
            self._router.announce_own_topic()
        return self._units

    def _ask_units(self, method: str, args: Mapping[str, Any]) -> Any:
        return self._super_agent().methods()[method](args)

    def _reload(self) -> None:
        self._log(_INFO, f"reading {self._options.units} again")
        self._super_agent().reload()

    def _end(self) -> None:
        """End when the units have; at once if told twice."""
        if self._units is None or self._is_ending:
            self.loop.stop()
            return
        self._is_ending = True
        self._units.end(self.loop.stop)

    # ---------------------------------------------------------------- time and state

    def _set_timer(self) -> None:
        """The router may have a new timeout: look at it within TICK_S."""
        at_s = self.loop.time() + TICK_S
        if self._timer is not None:
            if self._timer.at_s <= at_s:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(at_s, self._timed_out)

    def _timed_out(self) -> None:
        self._timer = None
        self._router.handle_timeout(self.loop.time())
        at_s = self._router.next_timeout()
        if at_s is not None:
            self._timer = self.loop.call_at(at_s, self._timed_out)

    def _ping(self, args: Mapping[str, Any]) -> dict[str, Any]:
        self._allowed.require("ping")
        return dict(args)

    def _info(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self._allowed.require("info")
        return self.info()

    def info(self) -> dict[str, Any]:
        """What the control side sees of this daemon."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(self.loop.time() - self._started_s, 1),
            "machine_uptime_s": round(clock_gettime(CLOCK_BOOTTIME), 1),  # as /proc/uptime
            "port_reopened": self._port.reopened,
            "session": self._session.counters.as_dict(),
            **self._router.summary(),
        }

    def _note(self, text: str) -> None:
        self._log(_INFO, text)

    def _log(self, priority: int, text: str) -> None:
        if priority < _INFO or not self._quiet:
            log(priority, text)


def main() -> None:
    """The command."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["standard-agent"]:
        from vchan.guest import standard

        standard.main(arguments[1:])
        return
    run_program("vchan-guest", USAGE, arguments, lambda words: Daemon(parse_options(words)).run)


if __name__ == "__main__":
    main()
