"""py-amqp, as far as it is used, and its channel and connection without their waiting. This module
alone imports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import amqp
from amqp import Message, spec
from amqp.exceptions import AMQPError, ResourceError, UnexpectedFrame
from amqp.method_framing import frame_writer

from vchan.host.broker.amqp_frames import acknowledgement, publication

if TYPE_CHECKING:
    from vchan.host.broker.amqp import AmqpLink, Owner

__all__ = [
    "AMQPError",
    "AmqpChannel",
    "Message",
    "PyAmqpConnection",
    "ResourceError",
    "UnexpectedFrame",
    "frame_writer",
    "spec",
]


class AmqpChannel(amqp.Channel):  # type: ignore[misc]  # amqp publishes no types
    """py-amqp's channel less the waiting: what the broker says is put aside for the owner."""

    def __init__(self, link: AmqpLink, owner: Owner) -> None:
        super().__init__(link.amqp, auto_decode=False)
        self.returned_messages = None  # never put in here, and an empty queue takes 4 KiB
        self.owner = owner
        self._link = link
        self.ask(spec.Channel.Open, "s", "")

    def ask(self, method: tuple[int, int], layout: str, *args: Any, content: Any = None) -> None:
        """Send a method, without waiting for what comes back."""
        self.send_method(method, layout, args, content)

    def acknowledge(self, tag: int) -> None:
        """Basic.Ack of one delivery."""
        self._link.write_frames(acknowledgement(self.channel_id, tag))

    def publish(
        self, address: tuple[str, str], properties: bytes, body: bytes, *, mandatory: bool
    ) -> None:
        """Basic.Publish: see `amqp_frames.publication`."""
        frames = publication(
            self.channel_id,
            address,
            properties,
            body,
            mandatory=mandatory,
            frame_max=self._link.amqp.frame_max,
        )
        self._link.write_frames(frames)

    def dispatch_method(self, method_sig: tuple[int, int], payload: bytes, content: Any) -> None:
        """Called by py-amqp for every method that arrives on this channel."""
        self._link.take(self, method_sig, payload, content)

    def close_softly(self) -> None:
        """Ask the broker to close it. It stays ours until CloseOk."""
        self.ask(spec.Channel.Close, "BsBB", 0, "", 0, 0)

    def closed_by_broker(self) -> None:
        """Agree to the broker's closing it, and free its number."""
        self.send_method(spec.Channel.CloseOk)
        self.collect()


class PyAmqpConnection(amqp.Connection):  # type: ignore[misc]  # amqp publishes no types
    """py-amqp's connection, which tells before it closes its socket."""

    def __init__(self, on_collect: Callable[[], None], **options: Any) -> None:
        super().__init__(**options)
        self._on_collect = on_collect

    def collect(self) -> None:
        """Called by py-amqp, and by us, when the connection is over."""
        self._on_collect()
        super().collect()
