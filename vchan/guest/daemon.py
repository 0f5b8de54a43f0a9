"""vchan-guest: the daemon inside the VM. It passes requests between the channel
and local agents.

Light on purpose: the standard library only, and of that what starts fast. Logs to standard error.
"""

import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from time import CLOCK_BOOTTIME, CLOCK_REALTIME, clock_gettime, clock_settime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vchan import __version__
from vchan.agents.allowed import DEFAULT_ALLOW, UNIT_METHODS, Allowed, running_directory
from vchan.errors import ConfigError, LinkError, PortAbsent
from vchan.guest.intake import Intake
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
from vchan.guest.stderr_log import log
from vchan.io.access import Access, Credentials, make_access
from vchan.io.link import Link
from vchan.io.local_socket import LocalServer, takes_raw
from vchan.io.loop import Alarm, Loop, Timer
from vchan.io.service_manager import ServiceManager
from vchan.io.streams import Stream
from vchan.rpc.messages import Topic
from vchan.rpc.reports import is_product
from vchan.session import (
    CHANNEL_ACK_DELAY_S,
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
from vchan.wire.frames import BYTE_STREAMS, RAW_REQUESTS

if TYPE_CHECKING:  # imported where there is use for them: it costs start-up time
    from vchan.agents.super_agent import SuperAgent
    from vchan.guest.arrivals import Arrivals
    from vchan.guest.forwards import Forwards
    from vchan.guest.freezer import Freezer
    from vchan.guest.observer import Observer

DEFAULT_SOCKET: Final = "/run/vchan/agent.sock"
DEFAULT_CONFIG: Final = "/etc/vchan/guest.conf"
DEFAULT_UNITS: Final = "/etc/vchan/agents.d"
DEFAULT_HOOKS: Final = "/etc/vchan/freeze-hooks.d"
DEFAULT_REPORT: Final = "phase, facts, agents, metrics"
DEFAULTS: Final = {
    "port": DEFAULT_PORT,
    "exit-without-port": "0",
    "socket": DEFAULT_SOCKET,
    "socket-mode": "0660",
    "agent-users": "",
    "agent-groups": "",
    "units": DEFAULT_UNITS,
    "allow": DEFAULT_ALLOW,
    "report": DEFAULT_REPORT,
    "freeze-hooks": DEFAULT_HOOKS,
    "forward": "",
    "quiet": SWITCH,
    "debug": SWITCH,
}

GARBAGE_OBJECTS: Final = 20_000
"""Objects more than at the last look for garbage, until the next."""
OBSERVE_S: Final = 0.5
"""After the host has said that it takes reports, this daemon begins to observe: what is asked first
is answered first."""
HELD_LINES_MAX: Final = 200
"""Lines of the log that are kept back while file systems are frozen: the log may lie on one, and
who writes there stands still. At it: further ones are counted."""
STEP_S_MAX: Final = 10 * 366 * 86400.0
"""By how much the clock may be set at a time, seconds: of a VM that was saved for ten years."""
METRICS_S_MIN: Final = 10
"""The shortest time between two reports of metrics."""

ONE_WAY_MAX: Final = 256
"""Requests that came down a pipe and wait for an agent; what is read at a time comes on top of it,
and stays below REQUESTS_MAX. At it: the pipe is not read."""

_ERROR, _WARNING, _INFO, _DEBUG = 3, 4, 6, 7

USAGE: Final = f"""\
usage: vchan-guest [--config FILE] [--port URL] [--exit-without-port SECONDS]
                   [--socket PATH] [--socket-mode MODE]
                   [--agent-users NAMES] [--agent-groups NAMES]
                   [--units DIRECTORY] [--allow WHAT] [--report WHAT]
                   [--freeze-hooks DIRECTORY] [--forward TARGETS] [--quiet] [--debug]
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
                      freeze, set-time, and state, log, start, stop, restart, each of these
                      also for units by a pattern, as in  restart:web*  [{DEFAULT_ALLOW}]
  --report WHAT       what the host is told of this guest, with commas between: phase, facts,
                      agents, metrics (when asked), metrics:SECONDS (also that often)
                      [{DEFAULT_REPORT}]
  --freeze-hooks DIRECTORY
                      programs to call with  freeze  before file systems are frozen, and
                      with  thaw  afterwards [{DEFAULT_HOOKS}]
  --forward TARGETS   what programs on the host may be connected to in this guest, with commas
                      between: tcp:PORT of 127.0.0.1, unix:/PATH, service:NAME; * and ? stand
                      for any [nothing]
  --quiet             log warnings and errors only
  --debug             log what each arrival of this VM at a host took here, step by step
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
    report: str = DEFAULT_REPORT
    freeze_hooks: str = DEFAULT_HOOKS
    access: Access | None = None
    forward: str = ""
    debug: bool = False


def parse_options(arguments: list[str]) -> Options:
    """The options in a command line and in the configuration file it names.

    Raises:
        ConfigError: One of them is wrong; says which, where, and what was expected.
    """
    values = read_options(arguments, DEFAULTS, DEFAULT_CONFIG, "vchan-guest")
    names = ("port", "exit-without-port", "allow", "forward")
    port, absence, allow, forward = (values[name] for name in names)
    try:
        port_opener(port.value)
    except ConfigError as error:
        raise ConfigError(f"{port.where}: {error.where}", error.problem) from error
    if not absence.value.isdecimal():
        raise absence.wrong("expected a whole number of seconds")
    parsed = ((allow, Allowed), (values["report"], parse_report), (forward, _check_targets))
    for option, parse in parsed:
        try:
            parse(option.value)
        except ValueError as error:
            raise ConfigError(option.where, str(error)) from error
    return Options(
        port.value,
        values["socket"].path(),
        values["socket-mode"].mode(),
        values["quiet"].is_yes,
        int(absence.value),
        values["units"].path(),
        allow.value,
        values["report"].value,
        values["freeze-hooks"].path(),
        _access(values["agent-users"], values["agent-groups"]),
        forward.value,
        values["debug"].is_yes,
    )


def parse_report(text: str) -> dict[str, int]:
    """What is to be reported, and how often besides when it changes: seconds; 0: not.

    Raises:
        ValueError: A word is none; says which there are.
    """
    wanted: dict[str, int] = {}
    for word in filter(None, map(str.strip, text.split(","))):
        what, colon, seconds = word.partition(":")
        is_timed = what == "metrics" and seconds.isdecimal() and int(seconds) >= METRICS_S_MIN
        if what not in ("phase", "facts", "agents", "metrics") or bool(colon) != is_timed:
            known = f"phase, facts, agents, metrics, or metrics:SECONDS of {METRICS_S_MIN} or more"
            raise ValueError(f"{word!r}: expected {known}")
        wanted[what] = int(seconds) if is_timed else 0
    return wanted


def _check_targets(text: str) -> None:
    if text:
        from vchan.io.targets import AllowedTargets  # here: it costs start-up time

        AllowedTargets(text)


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
        can_do = RAW_REQUESTS | (0 if goes_one_way(options.port) else BYTE_STREAMS)
        delay_s = CHANNEL_ACK_DELAY_S
        config = Config(Role.GUEST, instance, name, features=can_do, ack_delay_s=delay_s)
        self._session = make_session(config, os.urandom)
        self._options = options
        self._allowed = Allowed(options.allow)
        self._units: SuperAgent | None = None
        self._is_ending = False
        self._observer: Observer | None = None
        self._host_serves: tuple[Topic, ...] = ()
        self._observe_timer: Timer | None = None
        self._products: dict[int, str] = {}  # what agents say that they are
        self._freezer: Freezer | None = None
        self._held_lines: list[tuple[int, str]] = []  # of the log, while something is frozen
        self._left_out = 0  # of these
        methods: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "ping": self._ping,
            "info": self._info,
            **{name: partial(self._ask_units, name) for name in UNIT_METHODS},
            **{name: partial(self._ask_observer, name) for name in ("facts", "metrics")},
            "freeze": self._freeze,
            "thaw": self._thaw,
            "clock": self._clock,
            "step_clock": self._step_clock,
        }
        self._opener = port_opener(options.port)
        self._exit_without_port_s = options.exit_without_port_s
        self._absent_since_s: float | None = None
        self._arrivals = self._make_arrivals() if options.debug else None
        arrivals = self._arrivals
        self._port = Port(
            self.loop,
            self._open_port,
            self._session,
            self._handle if arrivals is None else arrivals.handler(self._handle),
            self._note,
            self._is_full if goes_one_way(options.port) else None,
        )
        to_host = self._port.send if arrivals is None else arrivals.to_host(self._port.send)
        self._router = Router(
            to_host, methods, self.loop.time(), self._port.flush, self._on_host_serves
        )
        self._alarm = Alarm(self.loop, self._timed_out)
        self._intake = Intake(
            self.loop,
            self._router,
            self._alarm,
            self._drop_agent,
            arrivals,
            self._make_forwards,
        )
        self._port.on_message = self._intake.from_host
        self.peer_message = self._intake.from_agent  # of Peers; bound once, as in io.streams
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
        self._intake.look_soon()
        # What start-up made stays, and what a request makes frees itself: to look for garbage
        # every 700 objects would cost a twentieth of all work.
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS)
        self._manager.ready(f"agents at {self._server.path}")
        if os.path.exists(f"{self._options.socket}.frozen"):
            self._make_freezer().thaw_left_over()
        if self._has_units():
            self.loop.call_soon(self._super_agent().begin)
        try:
            self.loop.run()
        finally:
            self._manager.stopping()
            if self._units is not None:
                self._units.close()
            if self._observer is not None:
                self._observer.close()
            if self._freezer is not None:
                self._freezer.close()
            if self._intake.forwards is not None:
                self._intake.forwards.close()
            self._server.close()
            self._port.close()
            self.loop.close()

    # ---------------------------------------------------------------- the host

    def _handle(self, event: Event) -> None:
        match event:
            case Opened(peer, resumed):
                if not resumed:
                    self._end_freeze("the session with the host is over")
                    takes_streams = bool(peer.features & BYTE_STREAMS)
                    self._intake.host_takes_streams = takes_streams
                    if self._intake.forwards is not None:
                        self._intake.forwards.host_opened(takes_streams=takes_streams)
                self._router.host_opened(
                    resumed=resumed, now_s=self.loop.time(), takes_raw=peer.takes_raw
                )
                self._port.flush()  # first: nothing comes for the agents before the host knows them
                self._log(_INFO, f"host {peer.name}: {'resumed' if resumed else 'new session'}")
                self._manager.status(f"host {peer.name}")
                self._intake.look_soon()
            case Lost(first, until):
                self._log(_WARNING, f"frames {first} to {until - 1} were lost: asked for again")
            case Violation(reason):
                self._log(_WARNING, f"the host broke the protocol: {reason}")
            case Refused(reason, by_peer):
                who = "refused by the host" if by_peer else "refused the host"
                self._log(_ERROR, f"{who}: {reason}")
            case Silent(for_s):
                self._log(_INFO, f"no word from the host for {for_s:.0f} s")
                self._end_freeze("the host is silent")
            case Heard():
                self._log(_INFO, "the host is back")
            case Received():
                pass  # see `Intake.from_host`

    def _make_arrivals(self) -> "Arrivals":
        from vchan.guest.arrivals import Arrivals

        return Arrivals(self.loop, partial(self._log, _DEBUG))

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
        return stream if self._arrivals is None else self._arrivals.stream(stream)

    # ---------------------------------------------------------------- byte streams

    def _make_forwards(self) -> "Forwards":
        """A host offers byte streams: it has a program that wants some."""
        from vchan.guest.forwards import Forwards
        from vchan.io.targets import AllowedTargets, services_directory

        forwards = Forwards(
            self.loop,
            self._session,
            AllowedTargets(self._options.forward),
            services_directory(self._options.socket),
            self._port.wake,
            self._note,
        )
        self._port.refill_with(forwards.refill)
        forwards.host_opened(takes_streams=True)
        return forwards

    # ---------------------------------------------------------------- agents

    def peer_opened(self, key: int, link: Link, who: Credentials) -> None:
        """An agent attached."""
        if not self._router.has_room:
            self.loop.call_soon(lambda: self._server.drop(key, "too many agents (AGENTS_MAX)"))
        self._log(_INFO, f"agent {key}: pid {who.pid}, uid {who.uid}")
        if link.session.peer is not None and is_product(link.session.peer.name):
            self._products[key] = link.session.peer.name
            self._products_changed()
        send = link.send if self._arrivals is None else self._arrivals.to_agent(link.send)
        self._router.attach(key, send, self.loop.time(), takes_raw=takes_raw(link))

    def _drop_agent(self, key: int, problem: str) -> None:
        self._server.drop(key, problem)

    def peer_closed(self, key: int, *, is_gone: bool) -> None:
        """An agent went away."""
        self._log(_INFO, f"agent {key}: {'gone' if is_gone else 'its session has ended'}")
        if self._products.pop(key, None) is not None:
            self._products_changed()
        self._router.detach(key, self.loop.time())
        self._intake.look_soon()

    # ---------------------------------------------------------------- reports

    def _on_host_serves(self, topics: tuple[Topic, ...]) -> None:
        """What this guest reports of itself, `reports` decides; here only, when that is loaded."""
        self._host_serves = topics
        if self._observer is not None:
            self._observer.host_serves(topics)
        elif topics and self._options.report and self._observe_timer is None:
            self._observe_timer = self.loop.call_later(OBSERVE_S, self._observe)

    def _observe(self) -> "Observer":
        if self._observer is None:
            from vchan.guest.observer import Observer

            self._observer = Observer(
                self.loop,
                self._router.attach_ourselves,
                parse_report(self._options.report),
                lambda: self._units.report() if self._units is not None else {},
                self._products.values,
                partial(self._log, _WARNING),
            )
            self._observer.host_serves(self._host_serves)
        return self._observer

    def _units_changed(self) -> None:
        if self._observer is not None:
            self._observer.agents_changed()

    def _products_changed(self) -> None:
        if self._observer is not None:
            self._observer.attached_changed()

    def _ask_observer(self, what: str, _: Mapping[str, Any]) -> Any:
        return self._observe().ask(what)

    # ---------------------------------------------------------------- file systems, and the clock

    def _make_freezer(self) -> "Freezer":
        if self._freezer is None:
            from vchan.guest.freezer import Freezer

            options = self._options
            log = partial(self._log, _INFO)
            self._freezer = Freezer(
                self.loop, options.socket, options.freeze_hooks, log, self._freezer_changed
            )
        return self._freezer

    def _freeze(self, args: Mapping[str, Any]) -> Any:
        self._allowed.require("freeze")
        return self._make_freezer().freeze(args)

    def _thaw(self, _: Mapping[str, Any]) -> Any:
        self._allowed.require("freeze")
        return self._make_freezer().thaw("somebody asked for it")

    def _end_freeze(self, why: str) -> None:
        if self._freezer is not None:
            self._freezer.end(why)

    def _freezer_changed(self) -> None:
        """What was kept back while something was frozen is told now."""
        if self._freezer is not None and not self._freezer.is_active:
            lines, self._held_lines = self._held_lines, []
            left_out, self._left_out = self._left_out, 0
            for priority, text in lines:
                self._log(priority, text)
            if left_out:
                self._log(_WARNING, f"{left_out} lines left out while file systems were frozen")

    def _clock(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self._allowed.require("set-time")
        return {"unix_s": clock_gettime(CLOCK_REALTIME)}

    def _step_clock(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """By so much, and not to a time: a word that was on its way for long does no harm."""
        self._allowed.require("set-time")
        by_s = args.get("by_s")
        if not isinstance(by_s, int | float) or isinstance(by_s, bool) or set(args) != {"by_s"}:
            raise ValueError("expected by_s, a number of seconds")
        if not abs(by_s) <= STEP_S_MAX:
            raise ValueError(f"by_s: {by_s:g}; expected at most {STEP_S_MAX:g} either way")
        clock_settime(CLOCK_REALTIME, clock_gettime(CLOCK_REALTIME) + by_s)
        self._log(_WARNING, f"the clock was set by {by_s:+.3f} s: the host asked for it")
        return {"unix_s": clock_gettime(CLOCK_REALTIME)}

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

    def _super_agent(self) -> "SuperAgent":
        if self._units is None:
            from vchan.agents.super_agent import SuperAgent
            from vchan.agents.systemd import Systemd

            self._units = SuperAgent(
                self.loop,
                self._options.units,
                self._options.socket,
                self._allowed,
                self._router.served_topics,
                self._log,
                Systemd.if_there(),
                self._units_changed,
            )
            self._router.announce_own_topic()
        return self._units

    def _ask_units(self, method: str, args: Mapping[str, Any]) -> Any:
        return self._super_agent().methods()[method](args)

    def _reload(self) -> None:
        self._log(_INFO, f"reading {self._options.units} again")
        self._super_agent().reload()

    def _end(self) -> None:
        """End when the units have, and the host knows; at once if told twice."""
        if self._is_ending:
            self.loop.stop()
            return
        self._is_ending = True
        self._end_freeze("this daemon ends")
        if self._units is not None:
            self._units.end(self._tell_end)
        else:
            self._tell_end()

    def _tell_end(self) -> None:
        if self._observer is not None:
            self._observer.end(self.loop.stop)
        else:
            self.loop.stop()

    # ---------------------------------------------------------------- time and state

    def _timed_out(self) -> None:
        self._router.handle_timeout(self.loop.time())
        self._alarm.set(self._router.next_timeout())

    def _ping(self, args: Mapping[str, Any]) -> dict[str, Any]:
        self._allowed.require("ping")
        return dict(args)

    def _info(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self._allowed.require("info")
        return self.info()

    def info(self) -> dict[str, Any]:
        """What the control side sees of this daemon."""
        forwards = self._intake.forwards
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(self.loop.time() - self._started_s, 1),
            "machine_uptime_s": round(clock_gettime(CLOCK_BOOTTIME), 1),  # as /proc/uptime
            "port_reopened": self._port.reopened,
            "session": self._session.counters.as_dict(),
            **self._router.summary(),
            **({"streams": forwards.summary()} if forwards is not None else {}),
        }

    def _note(self, text: str) -> None:
        self._log(_INFO, text)

    def _log(self, priority: int, text: str) -> None:
        if priority >= _INFO and self._quiet:
            return
        if self._freezer is None or not self._freezer.is_active:
            log(priority, text)
        elif len(self._held_lines) < HELD_LINES_MAX:
            self._held_lines.append((priority, text))
        else:
            self._left_out += 1


def main() -> None:
    """The command."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["standard-agent"]:
        from vchan.agents.standard import agent

        agent.main(arguments[1:])
        return
    run_program("vchan-guest", USAGE, arguments, lambda words: Daemon(parse_options(words)).run)


if __name__ == "__main__":
    main()
