"""Policy files on disk: which are read, in what order, and which are refused."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vchan.errors import ConfigError
from vchan.host.policy.rule_parser import FILE_CHARS_MAX, FILES_MAX, PolicyError, parse
from vchan.host.policy.rules import Policy
from vchan.rpc.arguments import PRIORITIES

POLICY_DIR: Final = "/etc/vchan/policy.d"
SUFFIX: Final = ".policy"
LISTEN_TOPICS: Final = "[vchan] listen_topics"
LISTEN_NOTIFICATIONS: Final = "[vchan] listen_topics, for notifications"
"""What stands for a file's name where a rule comes from that option."""

_NAME: Final = re.compile(r"[0-9]{2}-[A-Za-z0-9][A-Za-z0-9._-]*\.policy")
_ENTRIES_MAX: Final = 10 * FILES_MAX
"""Entries of the policy's directory, most of which are policy files. At it: the policy is
refused."""


def load(directory: str, listen_topics: Sequence[str] = ()) -> Policy:
    """The policy of this directory, and after it what `listen_topics` allows.

    A directory that is not there has no rules.

    Raises:
        ConfigError: (PolicyError among them) Says which file and line, and what was expected.
    """
    notifications = (LISTEN_NOTIFICATIONS, notification_rules(listen_topics))
    return parse([*read(directory), (LISTEN_TOPICS, topic_rules(listen_topics)), notifications])


def is_there(directory: str) -> bool:
    """Whether there is such a directory: a misspelt one has no rules, which is worth a word."""
    return Path(directory).is_dir()


def topic_rules(listen_topics: Sequence[str]) -> str:
    """The option as rules: an agent that may serve a topic may answer there.

    Raises:
        PolicyError: One is no pattern of TOPIC or EXCHANGE/TOPIC.
    """
    for number, topic in enumerate(listen_topics, 1):
        if not re.fullmatch(r"[^\s#:]+", topic):
            hint = " (a comment needs a line of its own)" if "#" in topic else ""
            expected = f"{topic!r}; expected a pattern of TOPIC or EXCHANGE/TOPIC{hint}"
            raise PolicyError(LISTEN_TOPICS, number, expected)
    text = "\n".join(f"listen,reply any {topic} allow" for topic in listen_topics)
    parse([(LISTEN_TOPICS, text)])
    return text


def notification_rules(listen_topics: Sequence[str]) -> str:
    """A listener of notifications names TOPIC, and asks for TOPIC.PRIORITY. It answers nothing."""
    return "\n".join(
        f"listen any {topic}.{priority} allow"
        for topic in listen_topics
        if not topic.endswith("*")
        for priority in PRIORITIES  # what topics of notifications end with, TOPIC.PRIORITY
    )


def read(directory: str) -> list[tuple[str, str]]:
    """The files' paths and texts, by name.

    Raises:
        ConfigError: As `load`.
    """
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries]
        _check_owner(directory, Path(directory).stat())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(directory, f"cannot be read: {error.strerror}") from error
    if len(names) > _ENTRIES_MAX:
        raise ConfigError(directory, f"{len(names)} entries; expected at most {_ENTRIES_MAX}")
    files = []
    for name in sorted(names):
        path = os.path.join(directory, name)  # noqa: PTH118 - as the operator wrote it
        if name.startswith(".") or not name.endswith(SUFFIX):
            continue  # an editor's, a package manager's, a README
        if not _NAME.fullmatch(name):
            raise ConfigError(path, f"expected a name like 50-name{SUFFIX}: its place in the order")
        files.append((path, _read_file(path)))
    return files


def _read_file(path: str) -> str:
    try:
        # Never waits: a pipe of that name is refused below.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(path, "is no regular file")
            _check_owner(path, status)
            data = file.read(FILE_CHARS_MAX + 1)
    except OSError as error:
        raise ConfigError(path, f"cannot be read: {error.strerror}") from error
    if len(data) > FILE_CHARS_MAX:
        raise PolicyError(path, 1, f"over {FILE_CHARS_MAX} bytes (FILE_CHARS_MAX)")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyError(path, line, f"byte {data[error.start]:#04x}; expected UTF-8") from error


def _check_owner(path: str, status: os.stat_result) -> None:
    """Who can write a policy is above it."""
    if status.st_mode & stat.S_IWOTH:
        raise ConfigError(path, "anybody may write to it: chmod o-w")
    if status.st_uid not in (0, os.geteuid()):
        owners = "root" if os.geteuid() == 0 else f"root or this user ({os.geteuid()})"
        raise ConfigError(path, f"belongs to user {status.st_uid}; expected {owners}: chown root")
