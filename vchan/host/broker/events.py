"""What the broker's thread tells the daemon. Facts, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from vchan.host.oslo_wire.downward_envelope import BrokerRequest
from vchan.rpc.messages import Topic

BEGINNING_BYTES: Final = 48
"""Of a message that is dropped: for the log."""


class Token(NamedTuple):
    """One delivery. `generation` is the run of the VM's channel that it came on."""

    vm: str
    generation: int
    tag: int


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker answers. Consumers follow."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is lost, or could not be made. It is tried again by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class Blocked:
    """The broker takes no messages for now: it lacks memory or disk. "": it takes them again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    """The broker's thread has ended by a fault of ours: nothing of it works any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Our code failed on one VM, and has forgotten it: the log has a traceback. `Released` came
    before it."""

    vm: str
    fault: str


@dataclass(frozen=True, slots=True)
class Consuming:
    """The broker has confirmed the consumers of all topics asked for, and of the VM's own queue if
    that was asked for.

    Args:
        topics: Those that have queues: all whose names AMQP can say.
    """

    vm: str
    topics: frozenset[Topic] = frozenset()


@dataclass(frozen=True, slots=True)
class Troubled:
    """What the broker refuses a VM, or has otherwise than it was asked for, in its own words. All
    of it, each time it changes; nothing: all is well again."""

    vm: str
    problems: tuple[str, ...]


class Delivered(NamedTuple):
    """A request for a VM. It is the broker's until `complete` or `park_message`.

    Args:
        returns: How often a quorum queue has taken it back by now; others do not say.
        queue, body: Where it was, and as it came: to `park` it.
    """

    vm: str
    token: Token
    request: BrokerRequest
    topic: Topic
    fanout: bool
    redelivered: bool
    returns: int = 0
    queue: str = ""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Undecodable:
    """A message that is no request. It is the caller's to `reject`.

    Args:
        queue: Where it was.
        beginning: Of its body.
    """

    vm: str
    token: Token
    reason: str
    queue: str
    beginning: bytes


@dataclass(frozen=True, slots=True)
class Parked:
    """A message that broke this daemon was put aside.

    Args:
        problem: Why it could not be: it is lost then. "": it is in queue `vchan_parked`.
    """

    vm: str
    queue: str
    problem: str


@dataclass(frozen=True, slots=True)
class Released:
    """The VM's tokens are dead; the broker hands out again what was not acknowledged."""

    vm: str
    reason: str


class Completed(NamedTuple):
    """Nothing more is done for these requests.

    Args:
        proven: The broker has confirmed their replies, and has proved that it has forgotten them.
            Else it hands them out again, if it has them still: the replies are confirmed, but for
            those that say "has not run", which are not published.
    """

    vm: str
    ids: tuple[bytes, ...]
    proven: bool


@dataclass(frozen=True, slots=True)
class RepliesRefused:
    """Why the broker does not take a VM's replies, each time that changes; they are published
    again. "": it takes them."""

    vm: str
    reason: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A reply was published again for as long as it is kept, and nobody has it. `Completed`
    follows."""

    vm: str
    request_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class PublishResult:
    """What became of a `publish_request`.

    Args:
        ok: The broker has it.
        unroutable: There is no queue for it, or the broker would never take it: trying again is no
            use.
        in_doubt: Not `ok`, and the broker may have it all the same.
    """

    vm: str
    request_id: bytes
    ok: bool
    unroutable: bool
    reason: str
    in_doubt: bool = False


@dataclass(frozen=True, slots=True)
class Mail:
    """A message in the VM's own queue: an answer, or a note. It is the broker's until `ack`."""

    vm: str
    token: Token
    body: bytes


BrokerEvent = (
    Connected
    | Disconnected
    | Blocked
    | Died
    | Failed
    | Troubled
    | Parked
    | Consuming
    | Delivered
    | Mail
    | Undecodable
    | Released
    | PublishResult
    | Completed
    | RepliesRefused
    | GivenUp
)
