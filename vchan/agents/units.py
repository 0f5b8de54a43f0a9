"""What unit files say. Pure.

# /etc/vchan/agents.d/web.toml: the unit "web"
command = ["/usr/bin/python3", "/opt/web/agent.py"]
user = "web"
topics = ["web"]
[limits]
memory = "256M"
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from vchan.agents.supervisor import RestartPolicy
from vchan.errors import ConfigError

UNITS_MAX: Final = 64
"""Unit files of one guest. At it: the unit is not loaded: it is in the list, with what is wrong."""
WORDS_MAX: Final = 256
"""Words of a command."""
SECONDS_MAX: Final = 86_400.0
"""The longest time a unit file may name: a day."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}")
_SIZE: Final = re.compile(r"([0-9]{1,12})([KMG]?)")
_FACTORS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class UnitLimits(NamedTuple):
    """What the kernel lets a unit's processes have; None: what the daemon itself may."""

    memory_bytes: int | None = None
    cpu_s: int | None = None
    files: int | None = None
    processes: int | None = None


class Unit(NamedTuple):
    """A unit file's content."""

    name: str
    command: tuple[str, ...] = ()
    user: str = ""
    group: str = ""
    directory: str = "/"
    environment: Mapping[str, str] = {}
    policy: RestartPolicy = RestartPolicy()
    autostart: bool = True
    survive: bool = False
    topics: tuple[str, ...] = ()
    limits: UnitLimits = UnitLimits()
    systemd: str = ""


def parse_unit(name: str, where: str, content: Mapping[str, Any]) -> Unit:
    """The unit that a file describes.

    Args:
        name: The file's, without `.toml`.
        where: The file, for errors.
        content: What TOML makes of it.

    Raises:
        ConfigError: Something in it is wrong: says which key, and what was expected.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(where, "a unit's name is letters, digits and _.@- , at most 63")
    file = Table(where, content)
    systemd = file.take("systemd", "", _unit_of_systemd)
    words = file.take("command", (), command)
    if not words and not systemd:
        raise ConfigError(f"{where}: command", 'is missing: expected ["/path/to/program", ...]')
    if not words:
        topics = file.take("topics", (), names)
        file.finish("systemd's unit says that")
        return Unit(name, systemd=systemd, topics=topics, autostart=False)
    limits = Table(f"{where}: limits", file.take("limits", {}, table))
    unit = Unit(
        name,
        words,
        file.take("user", "", _text),
        file.take("group", "", _text),
        file.take("directory", "/", _path),
        file.take("environment", {}, _environment),
        RestartPolicy(
            file.take("restart", RestartPolicy().restart, _restart),
            file.take("restart_delay_s", RestartPolicy().delay_s, seconds(0.01)),
            file.take("restart_delay_max_s", RestartPolicy().delay_max_s, seconds(0.01)),
            file.take("stop_timeout_s", RestartPolicy().stop_timeout_s, seconds(0.0)),
        ),
        file.take("autostart", True, boolean),
        file.take("survive", False, boolean),
        file.take("topics", (), names),
        UnitLimits(
            limits.take("memory", None, size),
            limits.take("cpu_s", None, _count),
            limits.take("files", None, _count),
            limits.take("processes", None, _count),
        ),
        systemd,
    )
    limits.finish("no such limit")
    file.finish("no such key")
    if unit.policy.delay_max_s < unit.policy.delay_s:
        problem = f"expected at least restart_delay_s ({unit.policy.delay_s:g})"
        raise ConfigError(f"{where}: restart_delay_max_s", problem)
    return unit


class Table:
    """A table, key by key."""

    def __init__(self, where: str, table: Mapping[str, Any]) -> None:
        self._where = where
        self._rest = dict(table)
        self._known: list[str] = []

    def take(self, key: str, default: Any, check: Callable[[Any], Any]) -> Any:
        """A key's value as `check` makes it; check raises ValueError with what was expected."""
        self._known.append(key)
        if key not in self._rest:
            return default
        value = self._rest.pop(key)
        try:
            return check(value)
        except ValueError as error:
            raise ConfigError(f"{self._where}: {key}", f"{value!r}: expected {error}") from None

    def finish(self, problem: str) -> None:
        """No keys may be left."""
        for key in self._rest:
            known = ", ".join(self._known)
            raise ConfigError(f"{self._where}: {key}", f"{problem}; expected one of {known}")


def _require(good: bool, expected: str) -> None:
    if not good:
        raise ValueError(expected)


def _text(value: Any) -> str:
    _require(isinstance(value, str) and value != "" and "\0" not in value, "a text")
    return str(value)


def _path(value: Any) -> str:
    good = isinstance(value, str) and value.startswith("/") and "\0" not in value
    _require(good, "an absolute path")
    return str(value)


def boolean(value: Any) -> bool:
    """true or false."""
    _require(isinstance(value, bool), "true or false")
    return bool(value)


def _count(value: Any) -> int:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    _require(good, "a whole number over 0")
    return int(value)


def size(value: Any) -> int:
    """A number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 62:
        return value
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    _require(found is not None, 'bytes: a whole number, or one with K, M or G: "256M"')
    assert found is not None
    size = int(found[1]) * _FACTORS[found[2]]
    _require(size > 0, "more than 0 bytes")
    return size


def seconds(least_s: float) -> Callable[[Any], float]:
    """A number of seconds, at least so many."""

    def check(value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        in_range = good and least_s <= value <= SECONDS_MAX
        _require(in_range, f"seconds, {least_s:g} to {SECONDS_MAX:g}")
        return float(value)

    return check


def table(value: Any) -> Mapping[str, Any]:
    """A table of its own."""
    _require(isinstance(value, dict), "a table")
    content: Mapping[str, Any] = value
    return content


def _environment(value: Any) -> Mapping[str, str]:
    expected = 'a table of texts: { NAME = "value" }'
    _require(isinstance(value, dict), expected)
    for name, text in value.items():
        _require(isinstance(text, str) and "\0" not in text + name and "=" not in name, expected)
    variables: Mapping[str, str] = value
    return variables


def names(value: Any) -> tuple[str, ...]:
    """A list of texts."""
    _require(
        isinstance(value, list) and all(isinstance(v, str) and v for v in value), "a list of texts"
    )
    return tuple(value)


def command(value: Any) -> tuple[str, ...]:
    """A program and its arguments."""
    expected = f'the program\'s absolute path and its arguments, at most {WORDS_MAX}: ["/bin/x"]'
    good = isinstance(value, list) and 0 < len(value) <= WORDS_MAX
    _require(good and all(isinstance(v, str) and "\0" not in v for v in value), expected)
    _require(value[0].startswith("/"), expected)
    return tuple(value)


def _restart(value: Any) -> str:
    _require(value in ("always", "on-failure", "no"), '"always", "on-failure" or "no"')
    return str(value)


def _unit_of_systemd(value: Any) -> str:
    good = isinstance(value, str) and re.fullmatch(r"[\w:.@\\-]+\.service", value) is not None
    _require(good and not value.startswith("-"), 'the name of a service: "name.service"')
    return str(value)
