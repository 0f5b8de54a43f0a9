"""One VM's requests that are not over, whoever asks: the broker, or a program on this host.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from vchan.host.oslo_wire.downward_envelope import BrokerRequest
from vchan.rpc.in_flight import Outcome
from vchan.rpc.messages import Topic


class OpenRequest:
    """A request that is not over.

    Args:
        origin: As the broker handed it out; None if a program of this host's asks.
        local: Tells that program each outcome.
        size: Of its body.
    """

    __slots__ = ("beat_s", "bytes", "fanout", "guest", "local", "origin", "tokens", "topic")

    def __init__(
        self,
        topic: Topic,
        origin: BrokerRequest | None,
        local: Callable[[Outcome], None] | None,
        size: int,
    ) -> None:
        self.topic = topic
        self.bytes = size
        self.origin = origin
        self.local = local
        self.guest = b""  # the run of the guest's daemon that said what came of it
        self.tokens: tuple[Hashable, ...] = ()  # the broker's: none are left if it has it back
        self.fanout = False
        self.beat_s = float("-inf")  # when the next heartbeat may be published

    @property
    def is_call(self) -> bool:
        """A service waits for its reply."""
        return self.origin is not None and self.origin.is_call


class OpenRequests:
    """One VM's, by their ids."""

    def __init__(self) -> None:
        self.by_id: dict[bytes, OpenRequest] = {}
        self.bytes = 0
        """Of their bodies."""
        self.local = 0
        """How many of them are of programs on this host."""
        self.awaited: set[bytes] = set()
        """Those that were given back to the broker, to be handed out again."""

    def __len__(self) -> int:
        return len(self.by_id)

    def add(self, request_id: bytes, entry: OpenRequest) -> None:
        """One more."""
        assert request_id not in self.by_id, "a copy ends with the first one"
        self.by_id[request_id] = entry
        self.bytes += entry.bytes
        if entry.local is not None:
            self.local += 1

    def drop(self, request_id: bytes) -> OpenRequest:
        """It is over, or handed back."""
        entry = self.by_id.pop(request_id)
        self.awaited.discard(request_id)
        self.bytes -= entry.bytes
        if entry.local is not None:
            self.local -= 1
        assert self.local >= 0 and self.bytes >= 0
        assert self.by_id or not (self.local or self.bytes or self.awaited)
        return entry

    def add_copy(self, request_id: bytes, token: Hashable) -> bool:
        """The broker hands a request out, perhaps again: whether it is open, and ends with this."""
        entry = self.by_id.get(request_id)
        if entry is None:
            return False
        entry.tokens += (token,)
        self.awaited.discard(request_id)
        return True

    def forget_tokens(self) -> None:
        """The broker has back what it has handed out: it comes again."""
        for request_id, entry in self.by_id.items():
            if entry.tokens:
                self.awaited.add(request_id)
            entry.tokens = ()

    def come_no_more(self, topic: Topic, *, fanout: bool) -> list[tuple[bytes, OpenRequest]]:
        """The broker hands out what is new of a topic: what it has not handed out again before that
        is awaited no longer.

        A queue hands out what came back to it before what is new.
        """
        found: list[tuple[bytes, OpenRequest]] = []
        for request_id in list(self.awaited):
            entry = self.by_id[request_id]
            if entry.fanout == fanout and entry.topic.name == topic.name:
                self.awaited.discard(request_id)
                found.append((request_id, entry))
        return found

    def clear(self) -> dict[bytes, OpenRequest]:
        """The VM is no longer here. What was open."""
        entries, self.by_id = self.by_id, {}
        self.awaited.clear()
        self.bytes = self.local = 0
        return entries
