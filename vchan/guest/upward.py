"""Requests of this guest's agents to the control side.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; messages leave by the `Send`s handed in.
2. A request is held until its agent says that it has heard the outcome (Settled): only then may the
   host forget the id. So an agent that reconnects and asks again is told what it missed.
3. An agent that is gone for ORPHAN_S no longer waits: its calls are cancelled. A cast of its that
   is under way still goes: it was sent.

    agent --Request, Cancel, Settled--> GuestUpward --Request, Cancel, Settled--> host
    agent <--Receipt, Reply, Returned-- GuestUpward <--Receipt, Reply, Returned-- host
"""

from typing import Any, Final

from vchan.errors import LimitExceeded, Rejected
from vchan.rpc.in_flight import (
    NO_RAW,
    Answered,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Requester,
    Send,
    Taken,
    earliest,
)
from vchan.rpc.messages import (
    BUSY,
    EXPIRED,
    FAILURE,
    FINAL,
    RAW,
    RAW_REPLY,
    REDELIVERED,
    REFUSED,
    Cancel,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    encode,
    encode_receipt,
    encode_reply,
    reply_stream,
)
from vchan.session import CONTROL

UPWARD_MAX: Final = 512
"""Requests of all agents of a guest that are not settled. The host may allow fewer. At it:
Returned: BUSY."""
UPWARD_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bodies of requests of all agents, and of the answers kept for agents that have not settled them.
At it: Returned: BUSY."""
ORPHAN_S: Final = 30.0
"""An agent that lost its connection is back within a second or two."""


class _Asked:
    __slots__ = ("bytes", "is_call", "key", "orphan_until_s", "outcome", "result_flags")

    def __init__(self, key: int, request: Request) -> None:
        self.key: int | None = key  # None: its agent is away
        self.is_call = request.is_call
        self.result_flags = FINAL | RAW_REPLY if request.flags & RAW else FINAL
        self.outcome: Outcome | None = None
        self.bytes = len(request.body)
        self.orphan_until_s = 0.0


class GuestUpward:
    """The way up for every agent of a guest.

    Args:
        to_host: Queues a message on the host's session.
    """

    def __init__(self, to_host: Send) -> None:
        self._host = Requester(to_host)
        self._agents: dict[int, Send] = {}
        self._items: dict[bytes, _Asked] = {}
        self._bytes = 0
        self._look_s: float | None = None  # when to look for orphans
        self.counters = {"sent_up": 0, "refused_up": 0}

    # ---------------------------------------------------------------- agents

    def attach(self, key: int, send: Send) -> None:
        """An agent is there; `send` queues messages to it."""
        self._agents[key] = send

    def detach(self, key: int, now_s: float) -> None:
        """It is gone, or away for a moment."""
        del self._agents[key]
        for item in self._items.values():
            if item.key == key:
                item.key, item.orphan_until_s = None, now_s + ORPHAN_S
                self._look_s = self._look_s or item.orphan_until_s

    def receive(self, key: int, message: Request | Cancel | Settled, now_s: float) -> None:
        """Take a message of an agent's."""
        match message:
            case Request():
                self._request(key, message, now_s)
            case Cancel(request_id):
                if self._drop(request_id):
                    self._host.cancel(request_id)
            case Settled(ids):
                self._settled([request_id for request_id in ids if self._is_over(request_id)])

    def _is_over(self, request_id: bytes) -> bool:
        item = self._items.get(request_id)
        return item is not None and item.outcome is not None

    def _settled(self, ids: list[bytes]) -> None:
        """No agent asks for these again. What ended here, the host may not even have got yet:
        told to forget it now, it would take it for new."""
        outcomes = {request_id: self._items[request_id].outcome for request_id in ids}
        for request_id in ids:
            self._drop(request_id)
        self._host.settle([each for each in ids if not isinstance(outcomes[each], Overdue)])

    def _request(self, key: int, request: Request, now_s: float) -> None:
        item = self._items.get(request.id)
        if item is not None:  # it reconnected, and asks again
            item.key = key
            if item.outcome is not None:
                self._tell(item.outcome, item)
            return
        self._make_room(len(request.body))
        if len(self._items) >= UPWARD_MAX or self._bytes + len(request.body) > UPWARD_BYTES_MAX:
            text = (
                f"{len(self._items)} requests with {self._bytes} bytes of this guest are open "
                "(UPWARD_MAX, UPWARD_BYTES_MAX)"
            )
            self._refuse(key, request, BUSY, text)
            return
        try:
            self._host.submit(request, now_s)
        except (LimitExceeded, Rejected) as error:
            self._refuse(key, request, REFUSED, str(error))
            return
        self.counters["sent_up"] += 1
        item = self._items[request.id] = _Asked(key, request)
        self._bytes += item.bytes

    def _refuse(self, key: int, request: Request, reason: int, text: str) -> None:
        self.counters["refused_up"] += 1
        refused = HandedBack(request.id, reason, text)
        if request.flags & REDELIVERED:  # a daemon before this one may have passed it on
            refused = refused.doubted()
        self._agents[key](encode(Returned(*refused)), CONTROL)

    def _drop(self, request_id: bytes) -> bool:
        item = self._items.pop(request_id, None)
        if item is None:
            return False
        self._bytes -= item.bytes
        assert self._bytes >= 0 and (self._items or not self._bytes)
        return True

    # ---------------------------------------------------------------- the host

    def opened(self, now_s: float, takes_raw: int = 0, no_raw: str = NO_RAW) -> None:
        """A new session with the host began. See `Requester.opened`."""
        self._host.opened(now_s, takes_raw=takes_raw, no_raw=no_raw)

    def host_receive(self, message: Receipt | Reply | Returned) -> None:
        """Take an answer of the host's."""
        for outcome in self._host.receive(message):
            self._note_outcome(outcome)

    def _note_outcome(self, outcome: Outcome) -> None:
        item = self._items[outcome.id]
        assert item.outcome is None, "what is over with the host is not asked of it again"
        if not isinstance(outcome, Heartbeat):
            self._bytes -= item.bytes
            item.bytes = len(outcome.body) if isinstance(outcome, Answered) else 0
            self._bytes += item.bytes
            item.outcome = outcome
        if item.key is not None:
            self._tell(outcome, item)
        self._make_room(0)

    def _make_room(self, size: int) -> None:
        """Drop answers: agents have been told them, unless they are away. The oldest go first."""
        if self._bytes + size <= UPWARD_BYTES_MAX:
            return
        for request_id, item in self._items.items():
            if isinstance(item.outcome, Answered):
                self._bytes -= item.bytes
                item.bytes = 0
                text = "answered; the answer is not kept any more (UPWARD_BYTES_MAX)"
                item.outcome = HandedBack(request_id, EXPIRED, text)
                if self._bytes + size <= UPWARD_BYTES_MAX:
                    return

    def _tell(self, outcome: Outcome, item: _Asked) -> None:
        assert item.key is not None
        send = self._agents[item.key]
        match outcome:
            case Taken(request_id):
                send(encode_receipt(request_id), CONTROL)
            case Answered(request_id, failed, body):
                flags = FINAL | FAILURE if failed else item.result_flags
                try:
                    send(encode_reply(request_id, flags, body), reply_stream(request_id))
                except LimitExceeded as error:  # the agent's own limit is lower than the host's
                    send(encode(Returned(request_id, EXPIRED, str(error))), CONTROL)
            case Heartbeat(request_id):
                send(encode_reply(request_id, 0, b""), reply_stream(request_id))
            case HandedBack(request_id, reason, text):
                send(encode(Returned(request_id, reason, text)), CONTROL)
            case Overdue(request_id):
                send(encode(Returned(request_id, EXPIRED, "no answer in time")), CONTROL)

    # ---------------------------------------------------------------- time and state

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        return earliest(self._host.next_timeout(), self._look_s)

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        for outcome in self._host.handle_timeout(now_s):
            self._note_outcome(outcome)
        if self._look_s is not None and now_s >= self._look_s:
            self._look_for_orphans(now_s)

    def _look_for_orphans(self, now_s: float) -> None:
        self._look_s = None
        orphans = [(key, item) for key, item in self._items.items() if item.key is None]
        for request_id, item in orphans:
            if now_s < item.orphan_until_s or not (item.is_call or item.outcome):
                later_s = max(item.orphan_until_s, now_s + 1.0)
                self._look_s = min(self._look_s or later_s, later_s)
                continue
            if item.outcome is not None:
                self._settled([request_id])
            elif self._drop(request_id):
                self._host.cancel(request_id)

    def summary(self) -> dict[str, Any]:
        """What `info` shows."""
        return {**self.counters, "open_up": len(self._items)}
