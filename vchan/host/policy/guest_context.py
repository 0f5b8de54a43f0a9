"""Who a guest is for the control side: its request's context, made anew.

Rules of this file
1. Pure.
2. Nothing a guest wrote passes but what is allowed by name, and of that only short plain text. What
   services take authority from never passes, allowed or not, however it is spelled.
3. Who the guest is, comes from the host: libvirt and nova's metadata. Its own word does not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final

from vchan.errors import ConfigError
from vchan.host.policy.rules import Facts, Glob

CONTEXT_ALLOW: Final = ("global_request_id", "request_id", "resource_uuid")
"""What guests may say of their own requests: which they are, and what they are about."""
VALUE_CHARS_MAX: Final = 255
"""A value of a guest's context that is let through: ids and names are shorter."""

INSTANCE_KEY: Final = "vchan_instance_uuid"
PROJECT_KEY: Final = "vchan_project_id"
HOST_KEY: Final = "vchan_host"

KEY: Final = re.compile("[a-z][a-z0-9_-]{0,63}")
"""What a key that passes looks like."""
_SUSPECT: Final = (
    *("admin", "auth", "catalog", "credential", "domain", "password", "permission", "policy"),
    *("project", "role", "scope", "secret", "service", "tenant", "token", "trust", "user", "vchan"),
)
"""Any key with one of these in it says who somebody is or what they may do."""
_RESERVED: Final = frozenset(
    {"args", "method", "msgid", "namespace", "replyq", "timeout", "uniqueid", "version"}
    | {"readonly", "readdeleted", "showdeleted", "overwrite", "quotaclass", "remoteaddress"}
)
"""oslo.messaging's own, and what contexts switch behaviour by."""


@lru_cache(maxsize=256)
def is_privileged(key: str) -> bool:
    """Whether services take authority from a key of a context, however it is spelled."""
    plain = re.sub("[^a-z0-9]", "", key.casefold())
    return not plain or plain in _RESERVED or any(word in plain for word in _SUSPECT)


def check_allow(keys: Iterable[str], where: str) -> frozenset[str]:
    """The configured list of keys that pass.

    Raises:
        ConfigError: One of them never may.
    """
    allow = frozenset(keys)
    for key in sorted(allow):
        if not KEY.fullmatch(key):
            raise ConfigError(where, f"{key!r}; expected keys of small letters, digits, _ and -")
        if is_privileged(key):
            raise ConfigError(where, f"{key!r} says who somebody is: no guest may set it")
    return allow


def build_context(
    guest_context: Mapping[str, Any],
    facts: Facts,
    allow: frozenset[str],
    *,
    host: str = "",
    more: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The context that the control side gets with a guest's request.

    Args:
        guest_context: As the guest sent it: anything.
        allow: Keys that pass, as `check_allow` returns them.
        host: This host's name.
        more: Keys that pass for this target alone, and characters that their values may have.
    """
    context: dict[str, Any] = {}
    limits = dict.fromkeys(allow, VALUE_CHARS_MAX)
    for key, chars in (more or {}).items():
        limits[key] = max(chars, limits.get(key, 0))
    for key in sorted(limits):
        value = guest_context.get(key)
        if not is_privileged(key) and _is_plain(value, limits[key]):
            context[key] = value
    assert not any(map(is_privileged, context)), "authority comes from the host alone"
    context[INSTANCE_KEY] = facts.uuid
    context[PROJECT_KEY] = facts.project
    context[HOST_KEY] = host
    return context


def _is_plain(value: object, chars_max: int) -> bool:
    # Exactly str: and nothing in it that could end a line of a service's log.
    return type(value) is str and len(value) <= chars_max and value.isprintable()


# --- failures -------------------------------------------------------------------------------

FAILURE_MODULES: Final = ("builtins", "exceptions", "oslo_messaging.*", "vchan.errors")
"""Whose exceptions a guest's answer may have callers rebuild, if their own lists allow it:
Python's, and what vchan and oslo.messaging raise on an agent's behalf."""


def module_rule(patterns: Iterable[str], where: str) -> Callable[[str], bool]:
    """Whether exceptions of a module pass. vchan's own always do: this host raises them, too.

    Args:
        patterns: Modules' names, perhaps with `*`.

    Raises:
        ConfigError: One is neither.
    """
    globs = [Glob("vchan.errors")]
    for pattern in patterns:
        if not re.fullmatch(r"[A-Za-z0-9_*?.]+", pattern):
            raise ConfigError(where, f"{pattern!r}; expected a module's name or a pattern of *")
        globs.append(Glob(pattern))
    return lambda module: any(glob.matches(module) for glob in globs)
