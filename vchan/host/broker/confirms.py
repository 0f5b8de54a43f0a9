"""What was published on a channel and is not confirmed: for replies and requests alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from vchan.host.broker.amqp import AmqpChannel, spec
from vchan.host.broker.amqp_frames import properties

EXPIRATION_MS_MAX: Final = 2**32 - 1
"""RabbitMQ's."""

T = TypeVar("T")


class Confirms(Generic[T]):
    """One channel's. The broker numbers what comes on it from 1 on, and confirms in any order, in
    lots, each message after it has returned it."""

    def __init__(self, channel: AmqpChannel) -> None:
        self.channel = channel
        self.waiting: dict[int, T] = {}  # by number, ascending
        self._returned: set[int] = set()
        self._next = 1
        channel.ask(spec.Confirm.Select, "b", False)

    def publish(
        self,
        item: T,
        address: tuple[str, str],
        body: bytes,
        *,
        mandatory: bool,
        numbered: bool = False,
        expiration_ms: int | None = None,
    ) -> None:
        """Publish as oslo.messaging does.

        Args:
            item: Comes out of `settle`.
            address: Exchange and routing key.
            numbered: The message says its number: it comes back with a return.
            expiration_ms: The broker drops it, if it has not been taken by then.
        """
        number, self._next = self._next, self._next + 1
        self.waiting[number] = item
        self.channel.publish(
            address,
            properties(
                expiration=""
                if expiration_ms is None
                else str(min(expiration_ms, EXPIRATION_MS_MAX)),
                message_id=str(number) if numbered else "",
            ),
            body,
            mandatory=mandatory,
        )

    def is_returned(self, number: int) -> bool:
        """Whether that one came back, and is not confirmed yet."""
        return number in self._returned

    def on_return(self, number: int) -> None:
        """It came back: there is no queue for it."""
        if number in self.waiting:
            self._returned.add(number)

    def confirm(self, number: int, *, multiple: bool) -> Iterator[tuple[T, bool]]:
        """What the broker confirms or refuses by this, in order, and whether it came back.

        Args:
            multiple: All up to this number; 0: all.
        """
        numbers = [number]
        if multiple:
            numbers = []
            for candidate in self.waiting:
                if number and candidate > number:
                    break
                numbers.append(candidate)
        for each in numbers:
            if each in self.waiting:
                is_returned = each in self._returned
                self._returned.discard(each)
                yield self.waiting.pop(each), is_returned

    def lose(self) -> list[T]:
        """The channel is gone: nobody knows what became of these."""
        lost, self.waiting = list(self.waiting.values()), {}
        self._returned.clear()
        return lost
