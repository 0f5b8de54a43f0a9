"""Who at a local socket may do what: users and groups, by the kernel's word for them."""

import os
import struct
from _socket import SO_PEERCRED, SOL_SOCKET, socket
from collections.abc import Iterable
from typing import Final, NamedTuple

from vchan.errors import ConfigError

_CREDENTIALS: Final = struct.Struct("3i")
_SO_PEERGROUPS: Final = 59
"""Linux 4.13's; Python has no name for it."""
_GROUPS_BYTES_MAX: Final = 1024
"""What Python takes. Of a process in more than 256 groups the main one alone is known."""


class Credentials(NamedTuple):
    """Who is at the other end, when it connected."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    """Its further groups."""


def credentials_of(connected: socket) -> Credentials:
    """Who is at the other end of a unix socket."""
    raw = connected.getsockopt(SOL_SOCKET, SO_PEERCRED, _CREDENTIALS.size)
    groups: frozenset[int] = frozenset()
    try:
        listed = connected.getsockopt(SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES_MAX)
        groups = frozenset(struct.unpack(f"{len(listed) // 4}I", listed))
    except OSError:
        pass  # an older kernel, or too many: the main group must do
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return Credentials(pid, uid, gid, groups)


class Access(NamedTuple):
    """Root, this process's own user, and those listed."""

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()

    def allows(self, who: Credentials) -> bool:
        """Whether this is one of them."""
        return (
            who.uid in (0, os.geteuid())
            or who.uid in self.users
            or who.gid in self.groups
            or not who.groups.isdisjoint(self.groups)
        )


def make_access(
    users: Iterable[str], groups: Iterable[str], users_where: str, groups_where: str
) -> Access:
    """Those users and groups, by name or number.

    Args:
        users_where, groups_where: What the options are called, for messages.

    Raises:
        ConfigError: There is no such user or group.
    """
    return Access(
        frozenset(_user(name, users_where) for name in users),
        frozenset(_group(name, groups_where) for name in groups),
    )


def _user(name: str, where: str) -> int:
    import pwd  # not everywhere, and seldom needed

    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigError(where, f"there is no user {name!r}") from None


def _group(name: str, where: str) -> int:
    import grp

    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(where, f"there is no group {name!r}") from None
