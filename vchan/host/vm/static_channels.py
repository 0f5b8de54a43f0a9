"""Channels that the configuration names: unix sockets that no VM and no libvirt stand behind.

With one, two vchan-hosts relay between two brokers: the control plane's and a tenant network's, on
the two sides of a network namespace. One connects, the other listens; otherwise they are alike, and
each treats the other as it would a VM. A pipe goes one way, to a vchan-guest that reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from vchan.errors import ConfigError
from vchan.host.hypervisor.domain_xml import DomainFacts, DomainState
from vchan.host.vm.channel import End
from vchan.io.pipes import open_pipe_writer
from vchan.io.streams import Listener
from vchan.rpc.messages import DEFAULT_EXCHANGE, TOPICS_MAX, Topic
from vchan.session import Role
from vchan.session.oneway import Writer

RECONNECT_S: Final[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.25)
"""Between looks for the other end. It costs next to nothing: a unix socket says at once."""
LISTEN: Final = "listen"
KINDS: Final = ("connect", LISTEN, "pipe")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class StaticChannel(NamedTuple):
    """One of the configuration's. The name stands where a VM's UUID does."""

    name: str
    kind: str
    path: str

    def facts(self) -> DomainFacts:
        """As a domain that always runs."""
        return DomainFacts(self.name, self.name, DomainState.RUNNING, channel_path=self.path)


def parse_channels(words: Iterable[str], where: str) -> tuple[StaticChannel, ...]:
    """The configured channels.

    Args:
        words: NAME=KIND:/PATH, KIND one of KINDS.

    Raises:
        ConfigError: One of them is something else.
    """
    channels: list[StaticChannel] = []
    for word in words:
        name, _, rest = word.partition("=")
        kind, _, path = rest.partition(":")
        if not _NAME.fullmatch(name) or kind not in KINDS or path[:1] != "/":
            raise ConfigError(where, f"{word!r}; expected NAME={'|'.join(KINDS)}:/PATH")
        if any(name == other.name or path == other.path for other in channels):
            raise ConfigError(where, f"{word!r}: this name or path comes twice")
        channels.append(StaticChannel(name, kind, path))
    return tuple(channels)


def parse_topics(words: Iterable[str], where: str) -> tuple[Topic, ...]:
    """The topics that are served at our broker, for those at the other end.

    Args:
        words: TOPIC or EXCHANGE/TOPIC.

    Raises:
        ConfigError: One of them is neither, or there are too many.
    """
    topics = []
    for word in words:
        exchange, slash, name = word.rpartition("/")
        if not re.fullmatch(r"[^\s/*?\[]+(/[^\s/*?\[]+)?", word):
            raise ConfigError(where, f"{word!r}; expected TOPIC or EXCHANGE/TOPIC, no pattern")
        topics.append(Topic(exchange if slash else DEFAULT_EXCHANGE, name))
    if len(topics) > TOPICS_MAX:
        raise ConfigError(where, f"{len(topics)} topics; expected at most {TOPICS_MAX}")
    return tuple(topics)


class StaticChannels:
    """All of them, and the ends that they have."""

    def __init__(
        self, channels: Iterable[StaticChannel], topics: tuple[Topic, ...], mode: int
    ) -> None:
        self._channels = {channel.name: channel for channel in channels}
        self._topics = topics
        self._listeners = {
            channel.name: Listener(mode)
            for channel in self._channels.values()
            if channel.kind == LISTEN
        }

    def facts(self) -> tuple[DomainFacts, ...]:
        """What libvirt would say of them."""
        return tuple(channel.facts() for channel in self._channels.values())

    def end(self, name: str) -> End:
        """Our end of a channel: the default's, if it is a VM's."""
        channel = self._channels.get(name)
        match channel.kind if channel is not None else "":
            case "connect":
                return End(reconnect_s=RECONNECT_S, topics=self._topics)
            case "listen":
                opener = self._listeners[name].open
                return End(opener, Role.GUEST, RECONNECT_S, self._topics)
            case "pipe":
                return End(
                    open_pipe_writer, reconnect_s=RECONNECT_S, session=Writer, is_one_way=True
                )
            case _:
                return End()

    def close(self) -> None:
        """Listen no more."""
        for listener in self._listeners.values():
            listener.close()
