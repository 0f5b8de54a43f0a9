"""The super-agent: runs the units of /etc/vchan/agents.d, and lets the control side see to them.

Methods on the daemon's own topic, each as far as the guest's owner allows it (option allow):

    agents                      list     every unit and its state
    agent_state  name           state    one unit, in detail
    agent_log    name [lines]   log      what it said last
    agent_start  name           start
    agent_stop   name           stop     answered when it has stopped
    agent_restart name          restart  answered when it has been started again

A unit that names a service of systemd's is left to systemd, where systemd runs.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

from vchan.agents.allowed import Allowed, running_directory
from vchan.agents.processes import Child, Keeper, default_environment, require_safe, start_time
from vchan.agents.supervisor import Action, Supervised, UnitState
from vchan.agents.systemd import Systemd, systemd_row
from vchan.agents.units import UNITS_MAX, Unit, parse_unit
from vchan.errors import ConfigError, Rejected
from vchan.io.loop import Loop, Timer
from vchan.rpc.deferred import Later

SUFFIX: Final = ".toml"
UNIT_BYTES_MAX: Final = 64 * 1024
"""One unit file."""

LINES_MAX: Final = 200
"""Lines that are kept of what a unit said last. At it: the oldest lines are forgotten."""
LINES_BYTES_MAX: Final = 64 * 1024
"""Bytes that are kept of what a unit said last. At it: the oldest lines are forgotten."""
LINE_BYTES_MAX: Final = 2048
"""One line of what a unit says. At it: it is kept as several lines."""

Log = Callable[[int, str], None]
_ERROR, _WARNING, _INFO = 3, 4, 6


class LastLines:
    """What a unit said last, in bounded memory."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._bytes = 0
        self._unfinished = b""

    def feed(self, data: bytes) -> list[str]:
        """Take output; returns the lines that are complete by it."""
        *whole, self._unfinished = (self._unfinished + data).split(b"\n")
        while len(self._unfinished) > LINE_BYTES_MAX:
            whole.append(self._unfinished[:LINE_BYTES_MAX])
            self._unfinished = self._unfinished[LINE_BYTES_MAX:]
        return [self._keep(part) for line in whole for part in _cut(line)]

    def finish(self) -> list[str]:
        """No more comes: what is there is a line."""
        rest, self._unfinished = self._unfinished, b""
        return [self._keep(rest)] if rest else []

    def _keep(self, line: bytes) -> str:
        text = line.decode("utf-8", "replace").rstrip("\r")
        self._lines.append(text)
        self._bytes += len(text)
        while len(self._lines) > LINES_MAX or self._bytes > LINES_BYTES_MAX:
            self._bytes -= len(self._lines.popleft())
        return text

    def last(self, count: int) -> list[str]:
        """At most so many, the newest at the end."""
        return list(self._lines)[-count:] if count else []


def _cut(line: bytes) -> Iterable[bytes]:
    if len(line) <= LINE_BYTES_MAX:
        return (line,)
    return (line[at : at + LINE_BYTES_MAX] for at in range(0, len(line), LINE_BYTES_MAX))


class _Slot:
    """A unit, and what there is of it."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.problem = ""
        self.supervised = Supervised(unit.policy)
        self.lines = LastLines()
        self.child: Child | None = None
        self.timer: Timer | None = None
        self.is_gone = False  # its file: it ends with its process
        self.waiting: list[Later] = []  # for it to stop, or to start again


class SuperAgent:
    """Every unit of a directory.

    Args:
        socket: The agents', which units are told of, and beside which is remembered who runs.
        allowed: What the control side may do.
        served: Gives the topics that agents serve now.
        systemd: systemd's programs, if units are to be left to it.
        changed: Called when `report` may be another; not of what is left to systemd.
    """

    def __init__(
        self,
        loop: Loop,
        directory: str,
        socket: str,
        allowed: Allowed,
        served: Callable[[], Iterable[str]],
        log: Log,
        systemd: Systemd | None = None,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        self._changed = changed
        self._loop = loop
        self._directory = directory
        self._socket = socket
        self._running_directory = running_directory(socket)
        self._allowed = allowed
        self._served = served
        self._log = log
        self._systemd = systemd
        self._slots: dict[str, _Slot] = {}
        self._broken: dict[str, str] = {}
        self._keeper = Keeper(loop, partial(log, _WARNING))
        self._ended: Callable[[], object] | None = None

    def methods(self) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
        """What the control side may ask for."""
        return {
            "agents": self._list,
            "agent_state": self._state,
            "agent_log": self._last_lines,
            "agent_start": self._start,
            "agent_stop": self._stop,
            "agent_restart": self._restart,
        }

    # ---------------------------------------------------------------- units

    def begin(self) -> None:
        """Read the units; end or adopt what an earlier daemon left; start what is to start."""
        self._read_units()
        adopted = self._take_over()
        for name, slot in self._slots.items():
            if slot.unit.autostart and name not in adopted and not self._is_delegated(slot.unit):
                self._apply(slot, slot.supervised.start(self._now_s()))

    def reload(self) -> None:
        """Read the units again: new ones start, those without a file stop, changed ones are what
        the file says from their next start on."""
        before = set(self._slots)
        self._read_units()
        for name, slot in self._slots.items():
            if slot.is_gone or self._is_delegated(slot.unit):
                self._apply(slot, slot.supervised.stop(self._now_s()))
            elif name not in before and slot.unit.autostart:
                self._apply(slot, slot.supervised.start(self._now_s()))
        self._forget_gone()

    def _read_units(self) -> None:
        found, self._broken = read_units(self._directory)
        for problem in self._broken.values():
            self._log(_ERROR, problem)
        for name, unit in found.items():
            slot = self._slots.get(name)
            if slot is None:
                self._slots[name] = _Slot(unit)
            else:
                slot.unit = unit
                slot.supervised.policy = unit.policy
                slot.is_gone = False
        for name, slot in self._slots.items():
            slot.is_gone = name not in found and name not in self._broken
        self._changed()

    def _forget_gone(self) -> None:
        for name in [n for n, s in self._slots.items() if s.is_gone and s.child is None]:
            del self._slots[name]

    def _is_delegated(self, unit: Unit) -> bool:
        return bool(unit.systemd and (self._systemd is not None or not unit.command))

    # ---------------------------------------------------------------- earlier daemons

    def _take_over(self) -> set[str]:
        """What runs from before: who may survive is adopted, anybody else is ended."""
        adopted: set[str] = set()
        try:
            names = os.listdir(self._running_directory)
        except OSError:
            return adopted
        for name in names:
            pid = self._remembered(name)
            slot = self._slots.get(name)
            if pid and slot is not None and slot.unit.survive and self._adopt(slot, pid):
                adopted.add(name)
                continue
            if pid:
                self._log(_WARNING, f"unit {name}: pid {pid} was left by an earlier daemon: ended")
                try:
                    os.killpg(pid, signal.SIGKILL)
                except OSError:
                    pass  # it has just ended by itself
            self._forget_running(name)
        return adopted

    def _adopt(self, slot: _Slot, pid: int) -> bool:
        try:
            slot.child = Child.adopted(self._loop, pid, partial(self._exited, slot))
        except OSError:
            return False
        slot.supervised.adopted(self._now_s())
        self._log(_INFO, f"unit {slot.unit.name}: runs already, pid {pid}")
        return True

    def _remembered(self, name: str) -> int:
        """The process of this unit that an earlier daemon started, if it still runs."""
        try:
            with open(f"{self._running_directory}/{name}", encoding="ascii") as file:
                pid, started = file.read(100).split()
            return int(pid) if started == start_time(int(pid)) else 0
        except (OSError, ValueError):
            return 0

    def _remember_running(self, name: str, pid: int) -> None:
        try:
            os.makedirs(self._running_directory, 0o700, exist_ok=True)
            with open(f"{self._running_directory}/{name}", "w", encoding="ascii") as file:
                file.write(f"{pid} {start_time(pid)}\n")
        except OSError as error:  # a full disk: the keeper still has it
            self._log(_WARNING, f"{self._running_directory}: {error.strerror}")

    def _forget_running(self, name: str) -> None:
        try:
            os.unlink(f"{self._running_directory}/{name}")
        except OSError:
            pass  # it could not be written either

    # ---------------------------------------------------------------- processes

    def _now_s(self) -> float:
        return self._loop.time()

    def _apply(self, slot: _Slot, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Action.START:
                    self._spawn(slot)
                case Action.TERMINATE:
                    self._signal(slot, signal.SIGTERM)
                case Action.KILL:
                    self._log(_WARNING, f"unit {slot.unit.name}: did not end in time: killed")
                    self._signal(slot, signal.SIGKILL)
        self._set_timer(slot)

    def _spawn(self, slot: _Slot) -> None:
        unit = slot.unit
        slot.problem = ""
        try:
            slot.child = Child(
                self._loop,
                unit,
                default_environment(unit, self._socket),
                partial(self._exited, slot),
                on_output=None if unit.survive else partial(self._said, slot),
                keeper=None if unit.survive else self._keeper,
                before=partial(self._remember_running, unit.name),
            )
        except OSError as error:  # no processes, no descriptors, or a kernel before 5.3
            slot.problem = f"there can be no process: {error.strerror}"
            self._log(_ERROR, f"unit {unit.name}: {slot.problem}")
            self._loop.call_soon(lambda: self._exited(slot, None))
            return
        self._log(_INFO, f"unit {unit.name}: started, pid {slot.child.pid}")
        self._tell_waiting(slot)

    @staticmethod
    def _signal(slot: _Slot, number: int) -> None:
        if slot.child is not None:
            slot.child.signal(number)

    def _said(self, slot: _Slot, data: bytes) -> None:
        for line in slot.lines.feed(data):
            self._log(_INFO, f"unit {slot.unit.name}: {line}")

    def _exited(self, slot: _Slot, status: int | None) -> None:
        name = slot.unit.name
        for line in slot.lines.finish():
            self._log(_INFO, f"unit {name}: {line}")
        slot.child = None
        self._forget_running(name)
        actions = slot.supervised.exited(status, self._now_s())
        outlook = _outlook(slot, self._now_s())
        self._log(_INFO, f"unit {name}: ended, {describe_status(status)}; {outlook}")
        self._apply(slot, actions)
        if slot.supervised.state is not UnitState.STOPPING:
            self._tell_waiting(slot)
        if slot.is_gone:
            self._forget_gone()
        self._end_if_all_ended()

    def _set_timer(self, slot: _Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None
        at_s = slot.supervised.next_timeout()
        if at_s is not None:
            slot.timer = self._loop.call_at(at_s, lambda: self._timed_out(slot))
        self._changed()

    def _timed_out(self, slot: _Slot) -> None:
        slot.timer = None
        self._apply(slot, slot.supervised.handle_timeout(self._now_s()))

    # ---------------------------------------------------------------- the daemon's end

    def end(self, ended: Callable[[], object]) -> None:
        """Stop every unit that may not survive; `ended` is called when they have stopped."""
        self._ended = ended
        for slot in self._slots.values():
            if slot.unit.survive:
                if slot.child is not None:
                    slot.child.release()
                    slot.child = None
                if slot.timer is not None:
                    slot.timer.cancel()
            else:
                self._apply(slot, slot.supervised.stop(self._now_s()))
        self._end_if_all_ended()

    def _end_if_all_ended(self) -> None:
        if self._ended is not None and all(slot.child is None for slot in self._slots.values()):
            ended, self._ended = self._ended, None
            ended()

    def close(self) -> None:
        """End at once what has not ended yet."""
        for slot in self._slots.values():
            if slot.child is not None and not slot.unit.survive:
                slot.child.signal(signal.SIGKILL)
                self._forget_running(slot.unit.name)
        self._keeper.close()

    # ---------------------------------------------------------------- for the host

    def report(self) -> dict[str, Any]:
        """Every unit that is not left to systemd, by name: how it is, and how it ended last."""
        units: dict[str, Any] = {}
        for name, slot in self._slots.items():
            if self._is_delegated(slot.unit):
                continue
            supervised = slot.supervised
            has_ended = supervised.starts > supervised.is_there
            units[name] = {
                "state": supervised.state.value,
                "starts": supervised.starts,
                "last_exit": describe_status(supervised.last_status) if has_ended else None,
                "problem": slot.problem or self._broken.get(name, ""),
            }
        for name, problem in self._broken.items():
            units.setdefault(name, {"state": "broken", "starts": 0, "problem": problem})
        return units

    # ---------------------------------------------------------------- for the control side

    def _list(self, args: Mapping[str, Any]) -> Any:
        _arguments(args)
        self._allowed.require("list")
        rows = {name: self._row(slot) for name, slot in self._slots.items()}
        rows |= {
            name: {"name": name, "state": "broken", "problem": problem}
            for name, problem in self._broken.items()
            if name not in rows
        }
        return self._with_systemd(rows, lambda: sorted(rows.values(), key=lambda row: row["name"]))

    def _state(self, args: Mapping[str, Any]) -> Any:
        (name,) = _arguments(args, "name")
        self._allowed.require("state", name)
        if name in self._broken and name not in self._slots:
            return {"name": name, "state": "broken", "problem": self._broken[name]}
        slot = self._slot(name)
        unit, supervised = slot.unit, slot.supervised
        row = self._row(slot) | {
            "command": list(unit.command),
            "user": unit.user,
            "restart": unit.policy.restart,
            "autostart": unit.autostart,
            "survive": unit.survive,
            "last_exit": describe_status(supervised.last_status) if supervised.starts else None,
            "state_for_s": round(self._now_s() - supervised.since_s, 1) if supervised.starts else 0,
        }
        return self._with_systemd({name: row}, lambda: row)

    def _row(self, slot: _Slot) -> dict[str, Any]:
        unit, supervised = slot.unit, slot.supervised
        served = set(self._served())
        row: dict[str, Any] = {
            "name": unit.name,
            "state": supervised.state.value,
            "pid": slot.child.pid if slot.child is not None else None,
            "starts": supervised.starts,
            "crash_loop": supervised.is_crashing,
            "topics": list(unit.topics),
            "serves": all(topic in served for topic in unit.topics),
            "by": unit.systemd if self._is_delegated(unit) else "vchan-guest",
            "problem": slot.problem or self._broken.get(unit.name, ""),
        }
        at_s = supervised.next_timeout()
        if supervised.state is UnitState.WAITING and at_s is not None:
            row["next_start_s"] = round(max(0.0, at_s - self._now_s()), 1)
        return row

    def _with_systemd(self, rows: dict[str, dict[str, Any]], result: Callable[[], Any]) -> Any:
        """The result, when systemd has said of its units how they are."""
        delegated = [
            (slot.unit.systemd, row)
            for name, row in rows.items()
            if (slot := self._slots.get(name)) and self._is_delegated(slot.unit)
        ]
        if not delegated:
            return result()
        if self._systemd is None:
            for _, row in delegated:
                row |= {"state": "broken", "problem": "systemd does not run here"}
            return result()
        later = Later()

        def told(status: int | None, output: str) -> None:
            for name, row in delegated:
                row |= systemd_row(name, output)
                if status != 0:
                    row["problem"] = f"systemctl: {describe_status(status)}"
            later.answer(result(), self._now_s())

        self._systemd.show(self._loop, sorted({name for name, _ in delegated}), told)
        return later

    def _last_lines(self, args: Mapping[str, Any]) -> Any:
        name, count = _arguments(args, "name", lines=50)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= LINES_MAX:
            raise ValueError(f"lines: {count!r} is no number from 1 to {LINES_MAX}")
        self._allowed.require("log", name)
        slot = self._slot(name)
        if not self._is_delegated(slot.unit):
            return slot.lines.last(count)
        later = Later()

        def told(status: int | None, output: str) -> None:
            lines = LastLines()
            lines.feed(output.encode())
            problem = Rejected(f"journalctl: {describe_status(status)}: {output[:500]}")
            later.answer(lines.last(count) if status == 0 else problem, self._now_s())

        self._require_systemd().log(self._loop, slot.unit.systemd, count, told)
        return later

    def _start(self, args: Mapping[str, Any]) -> Any:
        return self._order("start", args)

    def _stop(self, args: Mapping[str, Any]) -> Any:
        return self._order("stop", args)

    def _restart(self, args: Mapping[str, Any]) -> Any:
        return self._order("restart", args)

    def _order(self, verb: str, args: Mapping[str, Any]) -> Any:
        (name,) = _arguments(args, "name")
        self._allowed.require(verb, name)
        slot = self._slot(name)
        self._log(_INFO, f"unit {name}: the control side says {verb}")
        if self._is_delegated(slot.unit):
            return self._order_systemd(verb, slot)
        if self._ended is not None:
            raise Rejected("the guest's daemon is ending")
        supervised, now_s = slot.supervised, self._now_s()
        order = {"start": supervised.start, "stop": supervised.stop, "restart": supervised.restart}
        self._apply(slot, order[verb](now_s))
        if supervised.state is not UnitState.STOPPING:
            return self._row(slot)
        later = Later()
        slot.waiting.append(later)
        return later

    def _order_systemd(self, verb: str, slot: _Slot) -> Later:
        later = Later()

        def told(status: int | None, output: str) -> None:
            if status == 0:
                later.answer({"name": slot.unit.name, "by": slot.unit.systemd}, self._now_s())
            else:
                text = f"systemctl {verb}: {describe_status(status)}: {output.strip()[:500]}"
                later.answer(Rejected(text), self._now_s())

        self._require_systemd().order(self._loop, verb, slot.unit.systemd, told)
        return later

    def _require_systemd(self) -> Systemd:
        if self._systemd is None:
            raise Rejected("systemd does not run here, and the unit has no command of its own")
        return self._systemd

    def _slot(self, name: str) -> _Slot:
        slot = self._slots.get(name)
        if slot is None:
            known = ", ".join(sorted(self._slots)) or "there are none"
            problem = self._broken.get(name) or f"no such unit; the units: {known}"
            raise Rejected(f"{name}: {problem}")
        return slot

    def _tell_waiting(self, slot: _Slot) -> None:
        waiting, slot.waiting = slot.waiting, []
        for later in waiting:
            later.answer(self._row(slot), self._now_s())


# ---------------------------------------------------------------- small parts


def _arguments(args: Mapping[str, Any], *required: str, **optional: Any) -> tuple[Any, ...]:
    """A method's arguments, in order. Required ones are texts."""
    for name in required:
        if not isinstance(args.get(name), str):
            raise TypeError(f"argument {name} is missing, or no text")
    for name in args:
        if name not in required and name not in optional:
            known = ", ".join((*required, *optional)) or "none"
            raise TypeError(f"no such argument: {name}; expected: {known}")
    given = {**optional, **args}
    return tuple(given[name] for name in (*required, *optional))


def describe_status(status: int | None) -> str:
    """How a process ended, in words."""
    if status is None:
        return "nobody knows how"
    if status >= 0:
        return f"status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"


def _outlook(slot: _Slot, now_s: float) -> str:
    supervised = slot.supervised
    at_s = supervised.next_timeout()
    if supervised.state is UnitState.WAITING and at_s is not None:
        loop = f" ({supervised.quick_ends} quick ends in a row)" if supervised.is_crashing else ""
        return f"started again in {at_s - now_s:.1f} s{loop}"
    return supervised.state.value


def read_units(directory: str) -> tuple[dict[str, Unit], dict[str, str]]:
    """The units of a directory, and by name what is wrong with the others."""
    try:
        files = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))
    except FileNotFoundError:
        return {}, {}
    except OSError as error:
        return {}, {"?": f"{directory}: cannot be read: {error.strerror}"}
    units: dict[str, Unit] = {}
    broken: dict[str, str] = {}
    for file in files:
        name = file.removesuffix(SUFFIX)
        try:
            if len(units) >= UNITS_MAX:
                raise ConfigError(f"{directory}/{file}", f"over {UNITS_MAX} units (UNITS_MAX)")  # noqa: TRY301
            units[name] = _read_unit(name, f"{directory}/{file}")
        except ConfigError as error:
            broken[name] = str(error)
    return units, broken


def _read_unit(name: str, path: str) -> Unit:
    import tomllib  # here: a guest without units does not pay for it

    try:
        with open(path, "rb") as file:
            require_safe(file.fileno(), path)
            data = file.read(UNIT_BYTES_MAX + 1)
        if len(data) > UNIT_BYTES_MAX:
            raise ConfigError(path, f"is over {UNIT_BYTES_MAX} bytes (UNIT_BYTES_MAX)")
    except OSError as error:
        raise ConfigError(path, f"cannot be read: {error.strerror}") from error
    try:
        content = tomllib.loads(data.decode())
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are
        raise ConfigError(path, f"is no TOML: {error}") from error
    unit = parse_unit(name, path, content)
    _require_accounts(unit, path)
    return unit


def _require_accounts(unit: Unit, path: str) -> None:
    """That the user and group exist, and that we may become them."""
    for key, account in (("user", unit.user), ("group", unit.group)):
        if not account:
            continue
        import grp
        import pwd

        try:
            (pwd.getpwnam if key == "user" else grp.getgrnam)(account)
        except KeyError:
            raise ConfigError(f"{path}: {key}", f"this system has no {key} {account!r}") from None
        if os.geteuid() != 0:
            problem = f"only a daemon that runs as root can become {account!r}"
            raise ConfigError(f"{path}: {key}", problem)
