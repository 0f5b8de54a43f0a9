"""What the standard agent may do: its configuration. Pure.

    # /etc/vchan/standard.toml; what is not said is not allowed
    facts = true
    [exec]
    allow = ["/usr/bin/systemctl", "/opt/tools/*"]
    [shell]
    command = ["/bin/bash", "-l"]
    [read]
    allow = ["/var/log/**"]
    [write]
    allow = ["/srv/incoming/*"]

In a pattern, `*` and `?` stand for parts of a name, and `**` for any number of directories too.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

from vchan.agents.units import Table, boolean, command, names, seconds, size, table
from vchan.errors import Rejected

PATH_BYTES_MAX: Final = 4096
"""A path: Linux's own limit (PATH_MAX)."""


DETACHED_S: Final = 3600.0
"""How long a program of the services goes on while nobody is attached, unless `detached_s` says
otherwise. At it: it is hung up, and then killed; an end that nobody has heard is forgotten."""


class Exec(NamedTuple):
    """Programs."""

    allow: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    """Names of variables, as patterns, that a caller may set. Some let it run anything."""
    directories: tuple[str, ...] = ("/",)
    time_s_max: float = 60.0
    output_bytes_max: int = 1 << 20
    """Kept of each of standard output and error. Of the service: all of it goes to the caller."""
    users: tuple[str, ...] = ()
    """Whom a program of the service may be run as, beside the agent's own user."""
    detached_s: float = DETACHED_S


class Shell(NamedTuple):
    """A shell, with a terminal: whoever has it may do all that its user may."""

    command: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    """Whom it may be run as; the first one, if nobody is named. None: the agent's own user."""
    detached_s: float = DETACHED_S


class FilePermissions(NamedTuple):
    """Reading, or writing, files."""

    allow: tuple[str, ...] = ()
    bytes_max: int = 1 << 30


class Rules(NamedTuple):
    """The whole configuration."""

    where: str
    ping: bool = True
    facts: bool = False
    exec: Exec = Exec()
    shell: Shell = Shell()
    read: FilePermissions = FilePermissions()
    write: FilePermissions = FilePermissions()

    def allowed(self) -> dict[str, bool]:
        """By kind of method: whether there is anything it may do."""
        return {
            "ping": self.ping,
            "facts": self.facts,
            "exec": bool(self.exec.allow),
            "shell": bool(self.shell.command),
            "read": bool(self.read.allow),
            "write": bool(self.write.allow),
        }

    def refuse(self, what: str, problem: str, key: str) -> Rejected:
        """What to raise."""
        return Rejected(f"{what}: {problem} ({self.where}: {key})")


def parse_rules(where: str, content: Mapping[str, Any]) -> Rules:
    """A configuration file's content.

    Raises:
        ConfigError: Something in it is wrong: says which key, and what was expected.
    """
    file = Table(where, content)
    programs = Table(f"{where}: exec", file.take("exec", {}, table))
    shell = Table(f"{where}: shell", file.take("shell", {}, table))
    read = Table(f"{where}: read", file.take("read", {}, table))
    write = Table(f"{where}: write", file.take("write", {}, table))
    rules = Rules(
        where,
        file.take("ping", True, boolean),
        file.take("facts", False, boolean),
        Exec(
            programs.take("allow", (), _patterns),
            programs.take("environment", (), names),
            programs.take("directories", ("/",), _patterns),
            programs.take("time_s_max", Exec().time_s_max, seconds(0.1)),
            programs.take("output_bytes_max", Exec().output_bytes_max, size),
            programs.take("users", (), names),
            programs.take("detached_s", DETACHED_S, seconds(1.0)),
        ),
        Shell(
            shell.take("command", (), command),
            shell.take("users", (), names),
            shell.take("detached_s", DETACHED_S, seconds(1.0)),
        ),
        FilePermissions(
            read.take("allow", (), _patterns),
            read.take("bytes_max", FilePermissions().bytes_max, size),
        ),
        FilePermissions(
            write.take("allow", (), _patterns),
            write.take("bytes_max", FilePermissions().bytes_max, size),
        ),
    )
    for each in (programs, shell, read, write, file):
        each.finish("no such key")
    return rules


def _patterns(value: Any) -> tuple[str, ...]:
    patterns = names(value)
    for pattern in patterns:
        problem = path_problem(pattern)
        if problem:
            raise ValueError(f"patterns of absolute paths; {pattern!r} {problem}")
    return patterns


def path_problem(path: str) -> str:
    """Why a path may mean another than it says; empty: it does not."""
    if not path.startswith("/"):
        return "is not absolute"
    if "\0" in path or len(path.encode("utf-8", "replace")) > PATH_BYTES_MAX:
        return "has a zero byte in it, or is too long"
    if path != "/" and any(part in ("", ".", "..") for part in path[1:].split("/")):
        return "has an empty part, or . or .. in it: write it as it is"
    return ""


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns stands for this path."""
    return any(_compiled(pattern).fullmatch(path) for pattern in patterns)


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(wild.get(part) or re.escape(part) for part in parts), re.DOTALL)
