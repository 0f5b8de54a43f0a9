"""What a byte stream is connected to in a guest: how that is written, allowed, and connected.

tcp:PORT      a port of the loopback interface, 127.0.0.1
unix:/PATH    a unix socket
service:NAME  what a program in the guest serves by that name: a unix socket in one directory
"""

import errno
import os
import re
import socket
import stat
from fnmatch import fnmatchcase
from typing import Final, NamedTuple

TCP: Final = "tcp"
UNIX: Final = "unix"
SERVICE: Final = "service"
LOOPBACK: Final = "127.0.0.1"
"""Services that are reached this way need not listen on any network."""
EXPECTED: Final = "expected tcp:PORT, unix:/PATH or service:NAME"

_SERVICE: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,31}")
_SERVICES: Final = re.compile(r"[a-z0-9.*?-]{1,32}")


class Target(NamedTuple):
    """Of the kind TCP, a port; of the kind UNIX, a path; of the kind SERVICE, a name."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


def parse_target(text: str) -> Target:
    """The target that is written so.

    Raises:
        ValueError: It is none, or could be written otherwise: what is allowed is compared as text.
    """
    kind, _, name = text.partition(":")
    if kind == TCP and name.isdecimal() and str(int(name)) == name and 0 < int(name) < 65536:
        return Target(kind, name)
    if kind == UNIX and name.startswith("/") and os.path.normpath(name) == name != "/":
        if not name.isprintable():
            raise ValueError(f"{text!r}: the path has a character that is not printable")
        return Target(kind, name)
    if kind == SERVICE and _SERVICE.fullmatch(name):
        return Target(kind, name)
    raise ValueError(f"{text!r}: {EXPECTED}, in its shortest form")


class AllowedTargets:
    """What the guest's owner lets programs on the host be connected to.

    Args:
        text: Targets with commas between them, in which * and ? stand for any; "": nothing.

    Raises:
        ValueError: One is none.
    """

    def __init__(self, text: str) -> None:
        self._patterns = [word for word in map(str.strip, text.split(",")) if word]
        for word in self._patterns:
            kind, _, name = word.partition(":")
            is_port = kind == TCP and name and not set(name) - set("0123456789*?")
            is_path = kind == UNIX and name.startswith("/")
            is_service = kind == SERVICE and _SERVICES.fullmatch(name)
            if not is_port and not is_path and not is_service:
                raise ValueError(f"{word!r}: {EXPECTED}, perhaps with * or ? in it")

    def allows(self, target: Target) -> bool:
        """Whether a stream may be connected to this."""
        return any(fnmatchcase(str(target), pattern) for pattern in self._patterns)


def services_directory(agent_socket: str) -> str:
    """Where the sockets of services are: beside the one that agents connect to."""
    return os.path.join(os.path.dirname(os.path.abspath(agent_socket)), "services")


def services_problem(directory: str) -> str:
    """Why nobody can be sure who serves in there, or "": others could have made it, or a socket."""
    for path in (os.path.dirname(directory), directory):
        try:
            found = os.lstat(path)
        except OSError as error:
            return error.strerror or str(error)
        if not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
            return f"others can write to {path}: chmod go-w it"
    return ""


def begin_to_connect(target: Target, services: str) -> socket.socket:
    """A socket that is about to be connected: when it can be written, `connected` says how that
    went. Never waits.

    Args:
        services: The directory of the services' sockets.

    Raises:
        OSError: It cannot be.
    """
    where: str | tuple[str, int] = target.name
    family = socket.AF_UNIX
    if target.kind == TCP:
        family, where = socket.AF_INET, (LOOPBACK, int(target.name))
    elif target.kind == SERVICE:
        unsafe = services_problem(services)
        if unsafe:
            raise OSError(errno.EACCES, unsafe)
        where = f"{services}/{target.name}"
    elif os.path.realpath(target.name).startswith(f"{os.path.realpath(services)}/"):
        # Who allowed paths with a pattern has not said that services are among them.
        raise OSError(errno.EACCES, f"is a service: it is reached as {SERVICE}:NAME")
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    made.setblocking(False)
    problem = made.connect_ex(where)
    if problem not in (0, errno.EINPROGRESS):
        made.close()
        raise OSError(problem, os.strerror(problem))
    return made


def connect_problem(made: socket.socket) -> str:
    """Why a socket that can be written is not connected, or ""."""
    problem = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return os.strerror(problem) if problem else ""
