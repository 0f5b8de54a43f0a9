"""Casts to one VM that no agent has taken, and none will: counted by the reason, and said.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from vchan.host.oslo_wire.downward_envelope import BrokerRequest
from vchan.host.vm.open_requests import OpenRequest
from vchan.rpc.messages import AGENT_GONE, EXPIRED, REFUSED, Topic

RETURNS_WARN: Final = 10
"""A quorum queue has taken a message back so often: half of what RabbitMQ 4 drops it at, where
neither the queue nor a policy has a delivery limit of its own."""

TOLD_CHARS_MAX: Final = 400
"""Of a line for the log: a guest's words are in it."""

_BY_REASON: Final = {
    EXPIRED: "casts_expired",
    REFUSED: "casts_refused",
    AGENT_GONE: "casts_agent_gone",
}
"""Counters of casts that ended without an agent having taken them, by what the guest said."""


class DroppedCasts:
    """One VM's.

    Args:
        counters: Those of the VM's requests.
        tell: Told, for the log, of each cast that is dropped.
    """

    def __init__(self, counters: dict[str, int], tell: Callable[[str], None]) -> None:
        assert counters.keys() >= {*_BY_REASON.values(), "dropped_by_broker", "many_returns"}
        self._counters = counters
        self._tell = tell

    def count(self, request_id: bytes, entry: OpenRequest, counter: str, why: str) -> None:
        """A cast ends without an agent having taken it: never without a word."""
        assert entry.origin is not None and not entry.is_call
        self._counters[counter] += 1
        what = "fanout" if entry.fanout else "cast"
        target = f"{entry.topic.exchange}/{entry.topic.name}"
        text = f"dropped {what} {request_id.hex()} of {entry.origin.method!r} to {target}: {why}"
        self._tell(text[:TOLD_CHARS_MAX])

    def count_returned(self, request_id: bytes, entry: OpenRequest, reason: int, text: str) -> None:
        """Likewise: the guest has said why."""
        counter = _BY_REASON.get(reason, "casts_refused")
        why = f"{counter.removeprefix('casts_').replace('_', ' ')}: {text}"
        self.count(request_id, entry, counter, why)

    def count_of_broker(
        self, topic: Topic, not_again: Collection[tuple[bytes, OpenRequest]]
    ) -> None:
        """The broker was to hand these out again, and has not. What cannot have expired, it has
        dropped. The guest has its copy, or nobody."""
        for request_id, entry in not_again:
            assert entry.origin is not None
            if entry.origin.timeout_s is None:
                self._counters["dropped_by_broker"] += 1
                what = f"{entry.origin.method!r} to {topic.exchange}/{topic.name}"
                self._tell(
                    f"the broker dropped message {request_id.hex()} of {what}, which it had "
                    "taken back: see delivery limits and dead letters; it is lost if the VM "
                    "goes before an agent has it"
                )

    def warn_of_returns(self, origin: BrokerRequest, returns: int) -> None:
        """The broker may drop this one before long."""
        self._counters["many_returns"] += 1
        self._tell(
            f"message {origin.id.hex()} has gone back to its queue {returns} times: RabbitMQ 4 "
            "drops it at the 21st, if neither the queue nor a policy has a delivery limit"
        )
