"""The daemon at its socket, for one command; and which VM a word means."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Final

from vchan.cli.output import printable, say
from vchan.client import Client
from vchan.errors import CallTimeout, ConfigError, LinkDown, NoSuchDomain, RemoteError
from vchan.programs.connection import HOST_TOPIC

PREFIX_CHARS_MIN: Final = 4
"""Of a UUID's beginning: fewer are a slip of the hand, and soon another VM's too."""
ANSWER_S_MIN: Final = 0.001
"""What is left of a command's time for its next question, when it is over."""

_PREFIX: Final = re.compile(r"[0-9a-f][0-9a-f-]*")


class Ambiguous(NoSuchDomain):
    """A word is the beginning of several VMs' UUIDs."""


class Host:
    """The daemon, asked within one command's time.

    Args:
        timeout_s: For all questions together.
    """

    def __init__(self, client: Client, socket: str, timeout_s: float) -> None:
        self.client = client
        self.socket = socket
        self._until_s = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """What is left of the command's time."""
        return max(ANSWER_S_MIN, self._until_s - time.monotonic())

    def renew(self, timeout_s: float) -> None:
        """So much time from now on: for a command whose every question has its own."""
        self._until_s = time.monotonic() + timeout_s

    def ask(self, method: str, **args: str) -> Any:
        """One of the daemon's own methods.

        Raises:
            RemoteError: It refused.
            LinkDown: It did not answer in time. That is all it was asked for: of the daemon's own
                methods those that change something answer when they have.
        """
        try:
            return self.client.call(HOST_TOPIC, method, args, timeout_s=self.left_s)
        except CallTimeout as error:
            if method in ("status", "list"):
                raise LinkDown(self.socket, f"vchan-host: {error}") from error
            raise

    def status_of(self, word: str) -> dict[str, Any]:
        """A VM's status, by what a person may call it.

        Raises:
            NoSuchDomain: There is no such VM; Ambiguous: there are several.
            RemoteError: Another refusal of the daemon's.
        """
        try:
            status: dict[str, Any] = self.ask("status", vm=word)
        except RemoteError as error:
            if not is_gone(error):
                raise
            status = self.ask("status", vm=match(word, self.ask("list"), error.text))
        return status

    def uuid_of(self, word: str) -> str:
        """A VM's UUID, by what a person may call it; raises as `status_of`."""
        uuid: str = self.status_of(word)["uuid"]
        return uuid


def as_known(word: str, status: Mapping[str, Any]) -> str:
    """What the daemon is to call a VM: as the operator does, if it knows the VM by that.

    Args:
        status: The VM's.
    """
    return word if word == status.get("name") else str(status.get("uuid", word))


@contextmanager
def connected(options: argparse.Namespace) -> Iterator[Host]:
    """The daemon that the options name."""
    with Client(options.socket) as client:
        yield Host(client, options.socket, options.timeout)


def is_gone(error: RemoteError) -> bool:
    """Whether the daemon said that it has no such VM, and nothing worse."""
    return error.class_name == "NoSuchDomain"


def match(word: str, rows: Sequence[Mapping[str, Any]], problem: str) -> str:
    """The UUID of the one VM that is meant.

    Args:
        rows: What the daemon's method `list` returns.
        problem: What the daemon says of the word as it is.

    Raises:
        NoSuchDomain: None is meant; Ambiguous: several are.
    """
    for row in rows:
        if word in (row["name"], row["uuid"]) or word.lower() == row["uuid"].lower():
            return str(row["uuid"])
    beginning = word.lower()
    found = []
    if len(word) >= PREFIX_CHARS_MIN and _PREFIX.fullmatch(beginning):
        found = [row for row in rows if row["uuid"].lower().startswith(beginning)]
    if len(found) == 1:
        return str(found[0]["uuid"])
    if found:
        several = ", ".join(f"{row['name']} ({row['uuid']})" for row in found)
        raise Ambiguous(f"{word!r} is the beginning of several UUIDs: {several}")
    near = get_close_matches(word, [row["name"] for row in rows], 1)
    hint = f": perhaps {near[0]} is meant" if near else "; vchan list has those that are here"
    raise NoSuchDomain(f"{problem}{hint}")


def say_if_old(status: Mapping[str, Any]) -> None:
    """That what the daemon says of its VMs may be out of date."""
    libvirt = status.get("libvirt")
    if libvirt not in (None, "connected", "none configured"):
        say(f"libvirt: {printable(str(libvirt))}: this may be out of date")


def pattern(glob: str) -> re.Pattern[str]:
    """What a filter's glob matches, whatever the case.

    Raises:
        ConfigError: It is empty.
    """
    import fnmatch

    if not glob:
        raise ConfigError("filter ''", "is empty; expected a name, in which * and ? stand for any")
    return re.compile(fnmatch.translate(glob), re.IGNORECASE)
