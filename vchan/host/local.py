"""Programs on this host at the daemon's socket: calls into VMs, and the daemon's own methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from vchan.bodies import decode_invocation, encode_failure, encode_json
from vchan.errors import LimitExceeded, NoSuchDomain, Rejected, RequestError
from vchan.exchange import (
    Answered,
    Cancelled,
    Deliver,
    Delivery,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Responder,
    Taken,
)
from vchan.link import Link
from vchan.loop import Loop
from vchan.messages import (
    BUSY,
    EXPIRED,
    NO_DOMAIN,
    REFUSED,
    BadMessage,
    Cancel,
    Request,
    Settled,
    decode,
)
from vchan.server import Credentials

HOST_TOPIC: Final = "vchan.host"
"""The topic the daemon serves itself."""

Answer = Callable[[bool, bytes], None]
"""(failed, body): answers one of the daemon's own methods, now or later."""


class Guests(Protocol):
    """What the daemon does for local programs."""

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        """Send a request to a VM, by UUID or name; returns what cancels it.

        Raises:
            NoSuchDomain, Rejected, LimitExceeded: Nothing was sent.
        """

    def method(self, name: str, args: Mapping[str, Any], answer: Answer) -> None:
        """Run one of the daemon's own methods.

        Raises:
            RequestError: It cannot be done.
            KeyError: There is no such method.
            TypeError: Wrong arguments.
        """


class _Peer:
    __slots__ = ("cancels", "responder")

    def __init__(self, link: Link) -> None:
        self.responder = Responder(link.send)
        self.cancels: dict[bytes, Callable[[], None]] = {}


class LocalService:
    """The peers of the daemon's local socket."""

    def __init__(self, loop: Loop, guests: Guests, log: Callable[[str], None]) -> None:
        self._loop = loop
        self._guests = guests
        self._log = log
        self._peers: dict[int, _Peer] = {}

    def peer_opened(self, key: int, link: Link, who: Credentials) -> None:
        """A program connected."""
        self._peers[key] = _Peer(link)
        self._log(f"local program {key}: pid {who.pid}, uid {who.uid}")

    def peer_closed(self, key: int) -> None:
        """A program went away: nobody waits for its requests."""
        for cancel in self._peers.pop(key).cancels.values():
            cancel()

    def peer_message(self, key: int, data: bytes) -> None:
        """A message of a program's."""
        message = decode(data)
        peer = self._peers[key]
        match message:
            case Request() | Cancel() | Settled():
                for delivery in peer.responder.receive(message, self._loop.time()):
                    self._deliver(peer, delivery)
            case BadMessage(reason):
                self._log(f"a local program sent nonsense: {reason}")
            case _:
                self._log(f"a local program may not send {type(message).__name__}")

    def _deliver(self, peer: _Peer, delivery: Delivery) -> None:
        match delivery:
            case Deliver(request) if request.topic == HOST_TOPIC:
                self._run_method(peer, request)
            case Deliver(request):
                self._submit(peer, request)
            case Cancelled(request_id):
                cancel = peer.cancels.pop(request_id, None)
                if cancel is not None:
                    cancel()

    def _submit(self, peer: _Peer, request: Request) -> None:
        give_back = peer.responder.give_back
        try:
            cancel = self._guests.submit(
                request.server, request, lambda outcome: self._tell(peer, outcome)
            )
        except NoSuchDomain as error:
            give_back(request.id, NO_DOMAIN, str(error))
        except Rejected as error:
            give_back(request.id, REFUSED, str(error))
        except LimitExceeded as error:
            give_back(request.id, BUSY, str(error))
        else:
            if request.id in peer.responder:
                peer.cancels[request.id] = cancel

    def _tell(self, peer: _Peer, outcome: Outcome) -> None:
        responder, now_s = peer.responder, self._loop.time()
        if not isinstance(outcome, Heartbeat):
            peer.cancels.pop(outcome.id, None)
        match outcome:
            case Taken(request_id):
                responder.take(request_id, now_s)
            case Answered(request_id, failed, body):
                self._answer(peer, request_id, failed, body)
            case HandedBack(request_id, reason, text):
                responder.give_back(request_id, reason, text)
            case Overdue(request_id):
                responder.give_back(request_id, EXPIRED, "no answer from the guest in time")
            case Heartbeat(request_id):
                responder.heartbeat(request_id, now_s)

    def _answer(self, peer: _Peer, request_id: bytes, failed: bool, body: bytes) -> None:
        now_s = self._loop.time()
        try:
            peer.responder.answer(request_id, body, failed=failed, now_s=now_s)
        except LimitExceeded as error:
            text = encode_failure("LimitExceeded", str(error))
            peer.responder.answer(request_id, text, failed=True, now_s=now_s)

    def _run_method(self, peer: _Peer, request: Request) -> None:
        def answer(failed: bool, body: bytes) -> None:
            if request.is_call:
                self._answer(peer, request.id, failed, body)

        if not request.is_call:
            peer.responder.take(request.id, self._loop.time())
        try:
            invocation = decode_invocation(request.body)
            self._guests.method(invocation.method, invocation.args, answer)
        except RequestError as error:
            answer(True, encode_failure(type(error).__name__, str(error)))
        except KeyError as error:
            answer(True, encode_failure("NoSuchMethod", f"the daemon has no method {error}"))
        except TypeError as error:
            answer(True, encode_failure("TypeError", str(error), module="builtins"))


def result(value: Any) -> tuple[bool, bytes]:
    """What `Answer` takes for a result."""
    return False, encode_json(value)


def failure(error: Exception) -> tuple[bool, bytes]:
    """What `Answer` takes for a failure."""
    return True, encode_failure(type(error).__name__, str(error))
