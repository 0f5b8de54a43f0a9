"""Who may do what at a local socket."""

from __future__ import annotations

import os
import socket

import pytest

from vchan.errors import ConfigError
from vchan.guest.daemon import parse_options
from vchan.io.access import Access, Credentials, credentials_of, make_access


def test_root_and_our_own_user_always_may() -> None:
    nobody_else = Access()
    assert nobody_else.allows(Credentials(1, 0, 0))
    assert nobody_else.allows(Credentials(1, os.geteuid(), 12345))
    assert not nobody_else.allows(Credentials(1, 54321, 12345, frozenset({12345})))


def test_those_listed_may() -> None:
    access = Access(frozenset({1001}), frozenset({2001}))
    assert access.allows(Credentials(1, 1001, 9))
    assert access.allows(Credentials(1, 1002, 2001))
    assert access.allows(Credentials(1, 1002, 9, frozenset({7, 2001})))
    assert not access.allows(Credentials(1, 1002, 9, frozenset({7, 8})))
    assert not access.allows(Credentials(1, 2001, 1001, frozenset({1001})))  # a user is no group


def test_names_and_numbers() -> None:
    assert make_access(["root", "1234"], ["root", "77"], "u", "g") == Access(
        frozenset({0, 1234}), frozenset({0, 77})
    )
    with pytest.raises(ConfigError, match="users: there is no user 'no-such-user'"):
        make_access(["no-such-user"], [], "users", "groups")
    with pytest.raises(ConfigError, match="groups: there is no group 'no-such-group'"):
        make_access([], ["no-such-group"], "users", "groups")


def test_the_kernels_word() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        who = credentials_of(ours)
    assert (who.pid, who.uid, who.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert who.groups == frozenset(os.getgroups())


def test_the_guests_options() -> None:
    assert parse_options([]).access is None
    options = parse_options(["--agent-users", "root, 1001", "--agent-groups", "2001"])
    assert options.access == Access(frozenset({0, 1001}), frozenset({2001}))
    with pytest.raises(ConfigError, match="--agent-users: there is no user 'nobdy'"):
        parse_options(["--agent-users=nobdy"])
