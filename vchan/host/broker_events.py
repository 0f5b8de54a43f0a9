"""What the broker's thread tells the daemon. Facts, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from vchan.host.envelope import BrokerRequest
from vchan.messages import Topic


@dataclass(frozen=True, slots=True)
class Token:
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
class Consuming:
    """The broker has confirmed the consumers of all topics asked for."""

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


BrokerEvent = (
    Connected | Disconnected | Consuming | Delivered | Undecodable | Released | Published | Settled
)
