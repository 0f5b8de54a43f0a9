"""What is over of one VM's requests: answered, acknowledged, proved to be forgotten, told once.

Rules of this file
1. No I/O, no logging: the ports handed in do what is decided.
2. A message is acknowledged when the broker has confirmed the reply, or when there is none.
3. A reply that says "has not run" is published when the broker has proved that it has forgotten the
   call. If the channel ends before the proof it is not published: the call comes again.
4. Proofs are asked for in lots; `Completed` comes once for each `complete`.

    complete, no reply          -> ack -> proof -> Completed
    complete, a reply           -> publish until confirmed -> ack -> proof -> Completed
    complete, "has not run"     -> ack -> proof -> publish until confirmed -> Completed
    the channel ends            -> what is acknowledged: Completed, not proven; replies go on
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, Protocol

from vchan.host.broker.events import BrokerEvent, Completed, GivenUp, RepliesRefused, Token
from vchan.host.oslo_wire.downward_envelope import ReplyPublication
from vchan.host.oslo_wire.envelope import REQUEST_BYTES_MAX
from vchan.io.loop import Timer

SETTLE_S: Final = 1.0
"""What is acknowledged is proved in lots, this often at most while they are small."""
LOT_MAX: Final = 256
"""Requests acknowledged, whose proof is not asked for. At it: it is asked for at once."""
LOT_BYTES_MAX: Final = 1024 * 1024
"""Their replies, which count as not published until `Completed`. At it: the proof is asked for at
once."""
RETRY_S = 1.0
"""A reply that the broker did not confirm is published again after this."""
REPLY_KEPT_S = 60.0
"""A reply whose caller's queue is gone, or that the broker no longer asks for, is kept so long: a
caller that lost its broker too makes its queue anew. oslo.messaging's own servers try as long
(kombu_missing_consumer_retry_timeout). At it: the reply is given up, and counted."""


class BrokerThread(Protocol):
    """What is asked of the broker's thread."""

    post: Callable[[BrokerEvent], None]

    def time(self) -> float:
        """Seconds."""

    def later(self, vm: str, delay_s: float, work: Callable[[], None]) -> Timer:
        """Do something for one VM alone after so many seconds."""

    def publish_reply(
        self, vm: str, reply: ReplyPublication, told: Callable[[str, bool], None]
    ) -> None:
        """Publish; `told` is called once for this VM alone, perhaps at once: with why the broker
        may not have it, or ""; and whether that is because the caller's queue is gone."""


class Tokens(Protocol):
    """What is asked of the VM's channel."""

    def holds(self, token: Token) -> bool:
        """Whether the channel it came on is there, and it is not acknowledged."""

    def acknowledge(self, token: Token) -> None:
        """The broker may forget the message."""

    def prove(self, proved: Callable[[], None]) -> None:
        """`proved` is called when the broker has processed every acknowledgement given before,
        unless `Completions.channel_ended` is called first."""

    def completed(self) -> None:
        """A proof has come, or nothing is under way any more."""


class _Completion:
    __slots__ = ("id", "is_publishing", "kept_until_s", "reply", "tokens", "waits_for_proof")

    def __init__(self, request_id: bytes, reply: ReplyPublication | None, until_s: float) -> None:
        self.id = request_id
        self.reply = reply
        self.kept_until_s = until_s
        self.tokens: list[Token] = []  # not acknowledged
        self.waits_for_proof = reply is not None and reply.has_not_run
        self.is_publishing = False


class Completions:
    """One VM's."""

    def __init__(self, broker: BrokerThread, channel: Tokens, vm: str) -> None:
        self._broker = broker
        self._channel = channel
        self._vm = vm
        self._replies: dict[bytes, _Completion] = {}  # not confirmed, in the order they came
        self._lot: list[_Completion] = []  # acknowledged; the proof is not asked for
        self._lot_bytes = 0
        # A list: an empty deque takes 0.6 KiB.
        self._asked: list[list[_Completion]] = []  # lots whose proof is under way
        self._settle_timer: Timer | None = None
        self._retry_timer: Timer | None = None
        self._told = ""  # why the broker does not take replies, by RepliesRefused

    def __bool__(self) -> bool:
        """Whether something is under way."""
        return bool(self._replies or self._lot or self._asked)

    @property
    def waits_for_proof(self) -> bool:
        """Whether the channel's end would cost a caller its answer."""
        return any(each.waits_for_proof for each in self._replies.values())

    def complete(
        self, request_id: bytes, tokens: Iterable[Token], reply: ReplyPublication | None
    ) -> None:
        """A request is over, or a copy came of one whose reply is under way."""
        assert reply is None or len(reply.body) <= REQUEST_BYTES_MAX, "it would close the channel"
        known = self._replies.get(request_id)
        completion = known or _Completion(request_id, reply, self._broker.time() + REPLY_KEPT_S)
        completion.tokens += filter(self._channel.holds, tokens)
        if known is not None:
            return  # a copy: it shares the end of the first
        if reply is not None:
            self._replies[request_id] = completion
        if reply is None or completion.waits_for_proof:
            self._acknowledge(completion)
        else:
            self._publish(completion)

    def channel_ended(self) -> None:
        """No token means anything any more, and no proof comes."""
        lost = [each for lot in (*self._asked, self._take_lot()) for each in lot]
        self._asked.clear()
        for completion in self._replies.values():
            completion.tokens.clear()
        self._end(lost, proven=False)

    def disconnected(self) -> None:
        """The daemon forgets what the broker refused, and is told anew."""
        self._told = ""

    def abandon(self) -> None:
        """Nobody waits for the rest: the VM is not here any more, or has failed."""
        self._take_lot()
        self._asked.clear()
        self._replies.clear()

    # ---------------------------------------------------------------- acknowledging

    def _acknowledge(self, completion: _Completion) -> None:
        tokens, completion.tokens = completion.tokens, []
        for token in tokens:
            self._channel.acknowledge(token)
        if not tokens:  # handed back meanwhile
            self._end([completion], proven=False)
            return
        self._lot.append(completion)
        self._lot_bytes += len(completion.reply.body) if completion.reply is not None else 0
        is_full = len(self._lot) >= LOT_MAX or self._lot_bytes >= LOT_BYTES_MAX
        if is_full or completion.waits_for_proof:
            self._ask_for_proof()
        elif self._settle_timer is None:
            self._settle_timer = self._broker.later(self._vm, SETTLE_S, self._ask_for_proof)

    def _ask_for_proof(self) -> None:
        self._asked.append(self._take_lot())
        self._channel.prove(self._proved)

    def _take_lot(self) -> list[_Completion]:
        if self._settle_timer is not None:
            self._settle_timer.cancel()
            self._settle_timer = None
        lot, self._lot, self._lot_bytes = self._lot, [], 0
        return lot

    def _proved(self) -> None:
        done = []
        for completion in self._asked.pop(0):
            if not completion.waits_for_proof:
                done.append(completion)
            elif completion.tokens:
                self._acknowledge(completion)  # its caller has published it once more
            else:
                completion.waits_for_proof = False
                self._publish(completion)
        self._end(done, proven=True)

    def _end(self, completions: list[_Completion], *, proven: bool) -> None:
        """Tell. A refusal that is not proven is not published: its call comes again."""
        for completion in completions:
            if self._replies.get(completion.id) is completion:
                del self._replies[completion.id]
        if completions:
            ids = tuple(completion.id for completion in completions)
            self._broker.post(Completed(self._vm, ids, proven))
        self._channel.completed()

    # ---------------------------------------------------------------- publishing

    def _publish(self, completion: _Completion) -> None:
        assert completion.reply is not None and not completion.waits_for_proof
        assert not completion.is_publishing
        completion.is_publishing = True
        told = partial(self._on_published, completion)
        self._broker.publish_reply(self._vm, completion.reply, told)

    def _on_published(self, completion: _Completion, problem: str, is_gone: bool) -> None:
        completion.is_publishing = False
        if self._replies.get(completion.id) is not completion:
            return  # abandoned
        self._note_refusal("" if is_gone else problem)
        is_late = self._broker.time() >= completion.kept_until_s
        if not problem:
            self._answered(completion)
        elif is_late and (is_gone or not completion.tokens):
            self._broker.post(GivenUp(self._vm, completion.id, problem))
            self._answered(completion)
        elif self._retry_timer is None:
            self._retry_timer = self._broker.later(self._vm, RETRY_S, self._publish_again)

    def _answered(self, completion: _Completion) -> None:
        """Its reply is safe with the broker, or given up."""
        del self._replies[completion.id]
        assert completion.reply is not None
        if completion.reply.has_not_run and not completion.tokens:
            self._end([completion], proven=True)
        else:
            self._acknowledge(completion)

    def _publish_again(self) -> None:
        self._retry_timer = None
        for completion in list(self._replies.values()):
            if not (completion.is_publishing or completion.waits_for_proof):
                self._publish(completion)

    def _note_refusal(self, problem: str) -> None:
        if problem != self._told:
            self._told = problem
            self._broker.post(RepliesRefused(self._vm, problem))
