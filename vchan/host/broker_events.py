"""What the broker's thread tells the daemon. Facts, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from vchan.host.envelope import BrokerRequest
from vchan.messages import Topic


@dataclass(frozen=True, slots=True)
class Token:
    """One delivery. `generation` is the run of the VM's channel that it came on."""

    vm: str
    generation: int
    tag: int


class Form(StrEnum):
    """How a request of a guest's is published."""

    TOPIC = "topic"
    """To a topic exchange, which is made sure of."""
    FANOUT = "fanout"
    """To a fanout exchange, likewise. If nobody listens, nobody hears it."""
    NOTIFY = "notify"
    """To a queue of notifications, which is made sure of: it waits there for a listener."""
    MAIL = "mail"
    """To a queue, if there is one."""


class Publication(NamedTuple):
    """A request of a guest's, as it is published.

    Args:
        exchange: oslo.messaging's, as targets name it; "" for MAIL. FANOUT goes to the one called
            "TOPIC_fanout", whatever this says.
        routing_key: "TOPIC", "TOPIC.SERVER", "TOPIC.PRIORITY"; the topic for FANOUT, the queue for
            MAIL.
        expiration_ms: The broker drops it, if it has not been taken by then.
        mandatory: Say so when there is no queue for it. Else it goes nowhere, without a word; but
            NOTIFY never does.
    """

    form: Form
    exchange: str
    routing_key: str
    body: bytes
    expiration_ms: int | None
    mandatory: bool

    @property
    def address(self) -> tuple[str, str]:
        """The exchange and the routing key, as oslo.messaging's clients have them."""
        is_fanout = self.form is Form.FANOUT
        return (f"{self.routing_key}_fanout", "") if is_fanout else self[1:3]


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker answers. Consumers follow."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is lost, or could not be made. It is tried again by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class Consuming:
    """The broker has confirmed the consumers of all topics asked for, and of the VM's own queue if
    that was asked for."""

    vm: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """A request for a VM. It is the broker's until `ack` or `reject`."""

    vm: str
    token: Token
    request: BrokerRequest
    topic: Topic
    fanout: bool
    redelivered: bool


@dataclass(frozen=True, slots=True)
class Undecodable:
    """A message that is no request. It is the caller's to `reject`."""

    vm: str
    token: Token
    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """The VM's tokens are dead; the broker hands out again what was not acknowledged."""

    vm: str
    reason: str


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a reply. Not `ok`: the broker may have it all the same, unless the caller's
    queue is `gone`."""

    key: bytes
    ok: bool
    reason: str
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """The broker has processed every `ack` given before the `barrier`."""

    vm: str
    ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Sent:
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
    | Consuming
    | Delivered
    | Mail
    | Undecodable
    | Released
    | Published
    | Sent
    | Settled
)
