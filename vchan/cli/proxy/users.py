"""Who may use `vchan proxy`, for what; and what names mean: two files of the operator's.

Rules of this file
1. No I/O, no clock, no logging: texts come in, with the name of their file for messages.
2. Nobody is let in who is not named, and nothing is allowed that is not written.

    # users: NAME  PROOF                    TARGETS
    octavia        certificate:worker.ctl   tcp:9443
    ci             token:0f3a...            tcp:8080,unix:/run/app.sock

    # names: NAME[:PORT]  VM                TARGET
    172.24.0.17           amphora-17
    shop:80               vm3               unix:/run/shop.sock
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from hmac import compare_digest
from typing import Any, Final, NamedTuple

from vchan.cli.proxy.wire import Presented, plain_name
from vchan.errors import ConfigError
from vchan.io.targets import TCP, AllowedTargets, Target, parse_target

USERS_MAX: Final = 1000
"""Lines of a file of users: each is compared with what a client shows. At it: the file is
refused."""
TOKEN_CHARS_MIN: Final = 20
"""Of a token: who guesses is slowed down by nothing else. At it: the file is refused."""

_NAME: Final = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_NAME_AND_PORT: Final = re.compile(
    r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+|[0-9A-Fa-f:]+:[0-9A-Fa-f:]*)(?::([0-9]{1,5}))?"
)


class ProxyUser(NamedTuple):
    """Somebody who may use the proxy.

    Attributes:
        certificate: A name that its certificate has, or ""; "*" is any that the CA has signed.
        token: Its digest, or b"".
    """

    name: str
    certificate: str
    token: bytes
    allowed: AllowedTargets


class Users:
    """All of them.

    Args:
        text: The file's.
        where: Its name.

    Raises:
        ConfigError: A line is wrong; it says which.
    """

    def __init__(self, text: str, where: str) -> None:
        self._users: list[ProxyUser] = []
        for place, words in _lines(text, where):
            if len(self._users) >= USERS_MAX:
                raise ConfigError(place, f"is one line too many: expected {USERS_MAX} (USERS_MAX)")
            self._users.append(_read_user(place, words))

    @property
    def have_certificates(self) -> bool:
        """Whether anybody shows one."""
        return any(user.certificate for user in self._users)

    @property
    def have_tokens(self) -> bool:
        """Whether anybody has one."""
        return any(user.token for user in self._users)

    def by_token(self, presented: Presented) -> ProxyUser | None:
        """Whose token this is; all are compared, in the same time."""
        digest = _digest(presented.token)
        found = None
        for user in self._users:
            if user.token and compare_digest(user.token, digest):
                found = user
        if found is not None and presented.name not in ("", found.name):
            return None
        return found

    def by_certificate(self, names: Iterable[str]) -> ProxyUser | None:
        """Whose certificate has one of these names: the first line's that fits."""
        known = {name.lower() for name in names}
        for user in self._users:
            if user.certificate and (user.certificate == "*" or user.certificate.lower() in known):
                return user
        return None


def _read_user(place: str, words: list[str]) -> ProxyUser:
    if len(words) != 3:
        raise ConfigError(place, "expected NAME, certificate:NAME or token:TOKEN, and TARGETS")
    name, proof, targets = words
    kind, _, value = proof.partition(":")
    if not _NAME.fullmatch(name):
        raise ConfigError(place, f"{name!r} is no name: expected letters, digits, . _ @ and -")
    if kind not in ("certificate", "token") or not value:
        raise ConfigError(place, f"{kind!r}: expected certificate:NAME or token:TOKEN")
    if kind == "token" and len(value) < TOKEN_CHARS_MIN:
        raise ConfigError(place, f"the token is short: expected {TOKEN_CHARS_MIN} characters")
    try:
        allowed = AllowedTargets(targets)
    except ValueError as error:
        raise ConfigError(place, str(error)) from error
    is_token = kind == "token"
    return ProxyUser(name, "" if is_token else value, _digest(value) if is_token else b"", allowed)


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


class Meant(NamedTuple):
    """What a client has asked for: a VM as vchan-host may be told of it, and what in it."""

    vm: str
    target: Target


class Names:
    """What the operator has names and addresses mean; others are VMs' own.

    Args:
        text: The file's.
        where: Its name.

    Raises:
        ConfigError: A line is wrong; it says which.
    """

    def __init__(self, text: str, where: str) -> None:
        self._names: dict[tuple[str, int | None], tuple[str, Target | None]] = {}
        for place, words in _lines(text, where):
            found = _NAME_AND_PORT.fullmatch(words[0])
            if found is None or not 2 <= len(words) <= 3:
                raise ConfigError(place, "expected NAME or NAME:PORT, a VM, and perhaps a TARGET")
            key = plain_name(found[1]), int(found[2]) if found[2] else None
            if key in self._names:
                raise ConfigError(place, f"{words[0]} stands in the file already")
            self._names[key] = words[1], _read_target(place, words[2:])

    def meant(self, name: str, port: int) -> Meant:
        """What NAME:PORT means."""
        vm, target = self._names.get((name, port)) or self._names.get((name, None)) or (name, None)
        return Meant(vm, target or Target(TCP, str(port)))


def _read_target(place: str, words: list[str]) -> Target | None:
    try:
        return parse_target(words[0]) if words else None
    except ValueError as error:
        raise ConfigError(place, str(error)) from error


def _lines(text: str, where: str) -> Iterator[tuple[str, list[str]]]:
    """(place, words) of each line that says something."""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            yield f"{where}:{number}", words


def names_of(certificate: Mapping[str, object]) -> list[str]:
    """The names that a certificate has: its subject's common name, DNS names, URIs.

    Args:
        certificate: As `SSLSocket.getpeercert` gives it.
    """
    subject: Any = certificate.get("subject", ())
    others: Any = certificate.get("subjectAltName", ())
    names = [value for relative in subject for key, value in relative if key == "commonName"]
    return names + [value for kind, value in others if kind in ("DNS", "URI")]
