"""What the broker is asked to consume for one VM: which topics, when that may change, and when all
of it is handed back.

Pure: no I/O, no clock. Time comes in as `now_s`; what is decided, the broker's port does.

    consumes nothing --update--> consumes --release--> hands back --released--> consumes nothing
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from vchan.host.vm.gate import Gate
from vchan.host.vm.served_topics import ServedTopics
from vchan.rpc.messages import Topic

RETRY_S: Final = 1.0
"""What was handed back to the broker, for nobody can take it now, is consumed again after this."""
WITHDRAW_S: Final = 0.1
"""What a guest serves no longer is consumed for so long still, for it returns what it had of that:
to stop consuming is to have all of it handed out again. At it: the topic is no longer consumed."""
SUBSCRIBE_S: Final = 1.0
"""A VM's consumers change this often at most: each change is work for the broker. At it: the next
change waits."""


class ConsumptionBrokerPort(Protocol):
    """What is asked of the broker here. Every method returns at once and raises nothing."""

    def consume(self, vm: str, topics: frozenset[Topic], owned: frozenset[Topic]) -> None:
        """From now on consume these topics for the VM; `owned` are its alone."""

    def release(self, vm: str, *, for_good: bool = False) -> None:
        """Stop consuming and hand everything unacknowledged back, in order. For good: what is being
        completed is given up, too."""


class Consumption:
    """One VM's.

    Args:
        vm: The domain's UUID.
        broker: None where no broker is configured: then nothing is ever consumed.
        gate: Says which topics are the VM's alone.
        served: The topics that are to be consumed.
        let_go: Called when everything was handed back: the broker's tokens are void.
    """

    def __init__(
        self,
        vm: str,
        broker: ConsumptionBrokerPort | None,
        gate: Gate,
        served: ServedTopics,
        let_go: Callable[[], None],
    ) -> None:
        self._vm = vm
        self._broker = broker
        self._gate = gate
        self._served = served
        self._let_go = let_go
        self._consumed: frozenset[Topic] = frozenset()  # what the broker was last told
        self._owned: frozenset[Topic] = frozenset()  # likewise
        self._confirmed: frozenset[Topic] = frozenset()  # what the broker says it has queues for
        self._is_new = True  # nothing was asked of the broker yet
        self._not_before_s = 0.0
        self.update_at_s: float | None = None
        """When to call `update`, or `handle_timeout`."""
        self.look_at_s: float | None = None
        """When to look whether there is room again: see `is_time_to_look`."""
        self.is_suspended = False
        """The guest is away, or going."""
        self.is_handing_back = False
        """Released, and the broker has not said so yet."""
        self.is_held_up = False
        """The broker keeps what there is, until half of what is open is over."""

    @property
    def lacking(self) -> frozenset[Topic]:
        """Of the topics served, those whose requests the broker keeps, or has no queue for."""
        if self._broker is None:
            return frozenset()
        return self._served.allowed - (self._consumed & self._confirmed)

    def takes(self, topic: Topic) -> bool:
        """Whether what is handed out of this topic now is of the consumers that we have."""
        return not self.is_handing_back and topic in self._consumed

    # ---------------------------------------------------------------- what to consume

    def opened(self) -> bool:
        """The guest can be reached. Whether it could not, and all was handed back for that."""
        self._begin()
        was_suspended, self.is_suspended = self.is_suspended, False
        return was_suspended

    def judged(self, now_s: float) -> None:
        """Other topics are served now, perhaps."""
        if self._consumed - self._served.allowed:
            self._not_before_s = max(self._not_before_s, now_s + WITHDRAW_S)
        self._begin()
        self.update(now_s)

    def _begin(self) -> None:
        """What was released before, for this VM, may still be on its way to us. That is found out
        before anything is consumed: later it would close the channel that the VM's answers come
        on."""
        if self._is_new:
            self._is_new = False
            self.release()

    def update(self, now_s: float) -> None:
        """Consume the topics served now, or as soon as the consumers may change again."""
        self.update_at_s = None
        topics, owned = self._served.allowed, self._topics_owned()
        is_known = (topics, owned) == (self._consumed, self._owned)
        if self.is_suspended or self.is_held_up or is_known:
            return
        if now_s < self._not_before_s:
            self.update_at_s = self._not_before_s
        elif self._broker is not None:
            self._not_before_s = now_s + SUBSCRIBE_S
            self._consumed, self._owned = topics, owned
            assert owned <= topics and not self._is_new, "what was before is released first"
            self._broker.consume(self._vm, topics, owned)

    def _topics_owned(self) -> frozenset[Topic]:
        """Of the topics served, those that are no other VM's."""
        return frozenset(filter(self._gate.owns, self._served.allowed))

    def confirmed(self, topics: frozenset[Topic]) -> None:
        """The broker has queues for these, and hands out what is in them."""
        self._confirmed = topics

    # ---------------------------------------------------------------- all is handed back

    def release(self, *, for_good: bool = False) -> None:
        """Hand back all that the broker has handed out, and consume nothing until `update`."""
        if self._broker is not None:
            self.is_handing_back = True
            self._consumed = self._confirmed = self._owned = frozenset()
            self._broker.release(self._vm, for_good=for_good)
            self._let_go()

    def released(self) -> None:
        """The broker has it all back."""
        self.is_handing_back = False
        self._confirmed = frozenset()

    def hand_back(self, now_s: float) -> None:
        """Something is not to be taken now: as `release`, if anything is consumed, and consume
        again after RETRY_S. It keeps its place in its queue."""
        if self._consumed:
            self.release()
            self.update_at_s = now_s + RETRY_S

    def reopen(self, now_s: float) -> None:
        """The channel to the broker is to be another one: as `hand_back`, whatever is consumed, and
        if that is to change, when it was to."""
        was_consuming = bool(self._consumed)
        self.release()
        if was_consuming and self.update_at_s is None:
            self.update_at_s = now_s + RETRY_S

    def hold_up(self, now_s: float) -> None:
        """There is no room: as `release`, until `go_on`."""
        self.is_held_up = True
        self.look_at_s = now_s + RETRY_S
        self.release()

    def go_on(self) -> None:
        """There is room again."""
        assert self.is_held_up, "it waits for room"
        self.is_held_up = False
        self.look_at_s = None
        self.update_at_s = self._not_before_s

    def suspend(self) -> None:
        """The guest is away, or going: as `release`, until `opened`."""
        assert not self.is_suspended, "it is handed back once"
        self.is_suspended = True
        self.update_at_s = None
        self.release()

    def end(self) -> None:
        """The VM is no longer here."""
        self.release(for_good=True)
        self.is_held_up = False
        self.update_at_s = self.look_at_s = None

    # ---------------------------------------------------------------- time

    def is_time_to_look(self, now_s: float) -> bool:
        """Whether to look now if there is room again. Then the next look is planned."""
        if self.look_at_s is None or now_s < self.look_at_s:
            return False
        self.look_at_s = now_s + RETRY_S
        return True

    def handle_timeout(self, now_s: float) -> None:
        """Ask for what is served now, if that is due."""
        if self.update_at_s is not None and now_s >= self.update_at_s:
            self.update(now_s)
