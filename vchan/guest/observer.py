"""What is so in this guest, looked at when it may have changed: `reports` says who is told.

Loaded when a host has said that it takes reports, so that the daemon's start does not pay for it.
Nothing is run and nothing written: what is told is read from the kernel and from files.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from vchan import __version__
from vchan.agents.standard.facts import facts
from vchan.agents.standard.metrics import metrics
from vchan.errors import Rejected
from vchan.guest.reports import Reporter
from vchan.io.loop import Loop, Timer
from vchan.rpc.bodies import encode_json
from vchan.rpc.in_flight import Send
from vchan.rpc.messages import Receipt, Request, Returned, Settled, Topic, decode
from vchan.rpc.reports import (
    AGENTS,
    BOOTING,
    ENDING,
    FACTS,
    METRICS,
    PHASE,
    READY,
    REPORT_BYTES_MAX,
    TOPIC,
)

LOOK_S: Final = 60.0
"""The kernel tells of addresses; for what it does not tell of, the hostname and the system's
version, it is looked so often."""
BOOT_LOOK_S: Final = 2.0
"""How often it is looked whether the boot has finished."""
SETTLE_S: Final = 1.0
"""From a change to its report: an interface that comes up changes several times."""
END_S: Final = 1.0
"""What a daemon that ends waits for the host's word that it has heard so."""
ADDRESSES_MAX: Final = 32
"""Addresses that are told of. At it: the others are counted."""
TEXT_CHARS_MAX: Final = 200
"""Of a text: what is longer is cut."""
ATTACHED_MAX: Final = 16
"""Products of agents, as they say, that are told of. At it: the others are counted."""
ERRORS_MAX: Final = 8
"""Errors of cloud-init's. At it: the others are counted."""
FILE_BYTES_MAX: Final = 256 * 1024
"""Of a file of cloud-init's. A longer one is said not to be readable."""
AGENTS_BYTES_MAX: Final = REPORT_BYTES_MAX - 1024
"""Of units' states. At it: the last by name are counted instead."""
NETLINK_GROUPS: Final = 0x1 | 0x10 | 0x100
"""Links, IPv4 and IPv6 addresses."""

CLOUD_INIT: Final = "/run/cloud-init"
NO_LOGIN: Final = "/run/nologin"
"""systemd keeps users out with it until the boot is so far, and when the machine shuts down."""

AttachOurselves = Callable[[Send], Callable[[Request | Settled, float], None]]


class Observer:
    """Looks, and tells the reporter.

    Args:
        attach: The way up: see `Router.attach_ourselves`.
        wanted: What is reported, and how often besides: see `parse_report`.
        agents: The units, as the super-agent reports them.
        attached: What the agents that are attached say that they are, as far as they say it.
        log: Told what an operator may want to know.
    """

    def __init__(
        self,
        loop: Loop,
        attach: AttachOurselves,
        wanted: Mapping[str, int],
        agents: Callable[[], dict[str, Any]],
        attached: Callable[[], Iterable[str]],
        log: Callable[[str], None],
        *,
        cloud_init: str = CLOUD_INIT,
        no_login: str = NO_LOGIN,
    ) -> None:
        self._loop = loop
        self._wanted = wanted
        self._agents = agents
        self._attached = attached
        self._log = log
        self._cloud_init = cloud_init
        self._no_login = no_login
        self._reporter = Reporter(attach(self._heard), lambda: os.urandom(16))
        self._refusal = ""
        self._is_ready = self._is_ending = False
        self._ended: Callable[[], object] | None = None
        self._timers: dict[str, Timer] = {}
        self._takes = False  # the host reports: else nobody looks
        self._kernel = self._listen() if FACTS in wanted else None

    def host_serves(self, topics: tuple[Topic, ...]) -> None:
        """What the host serves itself, as it says."""
        self._takes = TOPIC in topics
        if self._takes:
            self._look()
            if self._wanted.get(METRICS):
                self._measure()
        self._reporter.host_takes(self._takes, self._loop.time())
        self._after_sending()

    def agents_changed(self) -> None:
        """The super-agent's word."""
        self._changed(AGENTS)

    def attached_changed(self) -> None:
        """One that says what it is has come or gone."""
        self._changed(FACTS)

    def _changed(self, what: str) -> None:
        if what in self._wanted and not self._is_ending:
            self._later("settle", SETTLE_S, self._look)

    def ask(self, what: str) -> dict[str, Any]:
        """The answer to who asks now.

        Raises:
            Rejected: The guest's owner does not want it told.
        """
        if what not in self._wanted:
            raise Rejected(f"{what}: the owner of this guest does not allow it (option report)")
        found = metrics() if what == METRICS else told_facts(self._attached())
        self._tell(what, found)
        return found

    def end(self, ended: Callable[[], object]) -> None:
        """The daemon ends: have the host know, but do not wait long. `ended` is called once."""
        self._is_ending = True
        if AGENTS in self._wanted:
            self._tell(AGENTS, told_agents(self._agents()))
        if PHASE in self._wanted:
            self._tell(PHASE, {"phase": ENDING, "boot_id": _boot_id()})
        self._ended = ended
        self._later("end", END_S, self._end)
        self._after_sending()

    def _end(self) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()

    def close(self) -> None:
        """Look no more."""
        for timer in self._timers.values():
            timer.cancel()
        if self._kernel is not None:
            self._loop.remove_reader(self._kernel.fileno())
            self._kernel.close()
            self._kernel = None

    # ---------------------------------------------------------------- looking

    def _look(self) -> None:
        if self._is_ending or not self._takes:
            return
        if PHASE in self._wanted and not self._is_ready:
            phase = told_phase(self._cloud_init, self._no_login)
            self._is_ready = phase["phase"] == READY
            self._tell(PHASE, phase)
        if FACTS in self._wanted:
            self._tell(FACTS, told_facts(self._attached()))
        if AGENTS in self._wanted:
            self._tell(AGENTS, told_agents(self._agents()))
        is_booting = PHASE in self._wanted and not self._is_ready
        self._later("look", BOOT_LOOK_S if is_booting else LOOK_S, self._look)

    def _measure(self) -> None:
        if not self._takes:
            return
        self._tell(METRICS, metrics())
        self._later("measure", float(self._wanted[METRICS]), self._measure)

    def _listen(self) -> socket.socket | None:
        try:
            kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
            kernel.bind((0, NETLINK_GROUPS))
        except OSError as error:
            self._log(f"the kernel does not tell of addresses: looked for every {LOOK_S:.0f} s")
            self._log(f"netlink: {error.strerror}")
            return None
        kernel.setblocking(False)
        self._loop.add_reader(kernel.fileno(), self._kernel_says)
        return kernel

    def _kernel_says(self) -> None:
        assert self._kernel is not None
        try:
            while self._kernel.recv(65536):
                pass
        except OSError:
            pass  # that is all; or it told more than the socket held, and then it is looked, too
        self._later("settle", SETTLE_S, self._look)

    def _later(self, name: str, delay_s: float, work: Callable[[], None]) -> None:
        timer = self._timers.get(name)
        if timer is not None:
            timer.cancel()
        self._timers[name] = self._loop.call_later(delay_s, work)

    # ---------------------------------------------------------------- telling

    def _tell(self, what: str, report: dict[str, Any]) -> None:
        self._reporter.tell(what, report, self._loop.time())
        self._after_sending()

    def _heard(self, data: bytes, _: int) -> None:
        message = decode(data)
        if isinstance(message, Receipt | Returned):
            self._reporter.heard(message, self._loop.time())
            self._after_sending()

    def _after_sending(self) -> None:
        reporter = self._reporter
        if reporter.refusal != self._refusal:
            self._refusal = reporter.refusal
            self._log(f"the host refused a report: {self._refusal}")
        at_s = reporter.next_timeout()
        if at_s is not None:
            self._later("wait", max(0.0, at_s - self._loop.time()), self._timed_out)
        if self._ended is not None and reporter.all_told(PHASE) and reporter.all_told(AGENTS):
            self._end()

    def _timed_out(self) -> None:
        self._reporter.handle_timeout(self._loop.time())
        self._after_sending()


# ---------------------------------------------------------------- what is told


def told_facts(attached: Iterable[str] = ()) -> dict[str, Any]:
    """What the guest is, as far as it does not change by itself."""
    found = facts()
    del found["uptime_s"]
    addresses = [each for each in found["addresses"] if each["interface"] != "lo"]
    found["addresses"] = addresses[:ADDRESSES_MAX]
    if len(addresses) > ADDRESSES_MAX:
        found["addresses_left_out"] = len(addresses) - ADDRESSES_MAX
    found["os"] = {name: text[:TEXT_CHARS_MAX] for name, text in found["os"].items()}
    found["vchan"] = __version__
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    products = sorted(set(attached))
    if products:
        found["attached"] = products[:ATTACHED_MAX]
    if len(products) > ATTACHED_MAX:
        found["attached_left_out"] = len(products) - ATTACHED_MAX
    return {name: _cut(value) for name, value in found.items()}


def told_agents(units: Mapping[str, Any]) -> dict[str, Any]:
    """Units, as many as a report holds."""
    told: dict[str, Any] = {}
    size = 0
    for name in sorted(units):
        unit = {key: _cut(value) for key, value in units[name].items()}
        size += len(encode_json({name: unit}))
        if size > AGENTS_BYTES_MAX:
            return {"units": told, "units_left_out": len(units) - len(told)}
        told[name] = unit
    return {"units": told}


def told_phase(cloud_init: str, no_login: str) -> dict[str, Any]:
    """How far the boot is, and what cloud-init made of it, where there is one."""
    told: dict[str, Any] = {"phase": READY, "boot_id": _boot_id()}
    if os.path.exists(no_login):
        told["phase"] = BOOTING
    if os.path.exists(f"{cloud_init}/disabled") or not os.path.isdir(cloud_init):
        return told
    if os.path.exists(f"{cloud_init}/result.json"):
        told["cloud_init"] = _cloud_init_result(cloud_init)
    else:
        told["phase"] = BOOTING
    return told


def _cloud_init_result(directory: str) -> dict[str, Any]:
    result, problem = _read_json(f"{directory}/result.json")
    if problem:
        return {"problem": problem}
    errors = [str(error)[:TEXT_CHARS_MAX] for error in _list(result.get("errors"))]
    told = {
        "datasource": str(result.get("datasource") or "")[:TEXT_CHARS_MAX],
        "errors": errors[:ERRORS_MAX],
        "recoverable_errors": _recoverable(directory),
    }
    if len(errors) > ERRORS_MAX:
        told["errors_left_out"] = len(errors) - ERRORS_MAX
    return told


def _recoverable(directory: str) -> int:
    """How many errors cloud-init went on after: status.json has them by stage and level."""
    status, _ = _read_json(f"{directory}/status.json")
    stages = [stage for stage in status.values() if isinstance(stage, dict)]
    by_level = [stage.get("recoverable_errors") for stage in stages]
    found = [errors for each in by_level if isinstance(each, dict) for errors in each.values()]
    return sum(len(_list(errors)) for errors in found)


def _read_json(path: str) -> tuple[dict[str, Any], str]:
    """The part that cloud-init calls v1, and what is wrong with the file."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            return {}, f"{path}: over {FILE_BYTES_MAX} bytes"
        value = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path}: {error}"[:TEXT_CHARS_MAX]
    found = value.get("v1") if isinstance(value, dict) else None
    return (found, "") if isinstance(found, dict) else ({}, f"{path}: there is no v1")


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _cut(value: Any) -> Any:
    return value[:TEXT_CHARS_MAX] if isinstance(value, str) else value


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read(64).strip()
    except OSError:
        return ""
