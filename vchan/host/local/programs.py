"""Programs on this host at the daemon's socket: their calls into VMs and to each other; and the
daemon's own methods.

A request goes to the VM that its `server` names, by UUID or name. If there is none, to the programs
at this socket that serve its topic (`rpc.dispatcher`). A fanout that names no server goes to these,
and to every VM of this host whose agents serve the topic.

Programs serve oslo.messaging's own queue names, each a Topic that they subscribe to:

    "topic"             whoever serves it, in turn; with FANOUT all of them
    "topic.server"      the requests that name this server
    "topic.priority"    notifications of this priority
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Protocol

from vchan.errors import (
    BadBody,
    LimitExceeded,
    NoSuchAgent,
    NoSuchDomain,
    Rejected,
    RequestError,
    VchanError,
)
from vchan.host.vm.streams import Program
from vchan.io.access import Access, Credentials
from vchan.io.link import Link
from vchan.io.local_socket import PEERS_MAX, takes_raw
from vchan.io.loop import Alarm, Loop
from vchan.programs.connection import HOST_TOPIC, OPEN_STREAMS
from vchan.rpc.bodies import decode_invocation, encode_failure, encode_json
from vchan.rpc.dispatcher import Dispatcher, Manner
from vchan.rpc.in_flight import (
    Cancelled,
    Deliver,
    Delivery,
    HandedBack,
    Heartbeat,
    Outcome,
    Overdue,
    Responder,
    Taken,
    earliest,
)
from vchan.rpc.messages import (
    BUSY,
    FANOUT,
    NO_AGENT,
    NO_DOMAIN,
    NOTIFICATION,
    RAW,
    REDELIVERED,
    REFUSED,
    TOPICS_MAX,
    BadMessage,
    Cancel,
    Holding,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    Unknown,
    decode,
    encode,
)
from vchan.rpc.outcomes import UNSENT, may_have_run, reason_of
from vchan.session import CONTROL
from vchan.streams.carrier import fill
from vchan.streams.messages import is_of_family

LOG = logging.getLogger(__name__)

PATIENCE_MS: Final = 60_000
"""The time of a program's request that has none: there is no store here to keep it in. So a cast to
a VM without an agent is refused at once."""
ADMIN_METHODS: Final = frozenset({"attach", "detach", "release"})
"""The daemon's own methods that change something for others."""
GRACE_S: Final = 0.5
"""When a request's time is over, who has it says what became of it; if that takes longer, nobody
is told. Programs wait for it a little longer (`client.GRACE_S`)."""
TICK_S: Final = 0.1
"""How late a request's time may run out here."""

_PROGRAMS: Final = Manner(
    server="program",
    place=" on this host",
    topics_max=PEERS_MAX * TOPICS_MAX,
    asker_remembers=False,
    waits_for_all=False,
    lingers_unsubscribed=False,
)

_Submit = Callable[[Request, Callable[[Outcome], None]], Callable[[], None]]
"""Sends a request; returns what cancels it."""
SendAnswer = Callable[[bool, bytes], None]
"""(failed, body): answers one of the daemon's own methods, now or later."""


class Streams(Protocol):
    """A program's way to its byte streams into one VM: `vm.StreamsHandle`."""

    @property
    def receive(self) -> Callable[[bytes], None]:
        """Takes a message of the program's."""

    @property
    def next_message(self) -> Callable[[], bytes | None]:
        """The next one for it, if there is one."""

    @property
    def close(self) -> Callable[[bool], None]:
        """The program is gone; whether it has closed its connection itself."""


class Guests(Protocol):
    """What the daemon does for local programs."""

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        """Send a request to a VM, by UUID or name; returns what cancels it.

        Raises:
            NoSuchDomain, Rejected, LimitExceeded: Nothing was sent.
        """

    def serving(self, topic: Topic) -> list[str]:
        """The VMs whose agents serve a topic now, by UUID."""

    def open_streams(self, vm: str, target: str, number: int, program: Program) -> Streams:
        """Byte streams into a VM, by UUID or name, for a program that is to open this target.

        Raises:
            NoSuchDomain, Rejected, LimitExceeded: It has none.
        """

    def method(self, name: str, args: Mapping[str, Any], answer: SendAnswer) -> None:
        """Run one of the daemon's own methods.

        Raises:
            RequestError: It cannot be done; NoSuchMethod if there is none of that name.
            WrongArguments: It takes others; see `call_with`.
        """


def address_of(request: Request) -> Topic:
    """What a program must have subscribed to for this request.

    Raises:
        BadBody: It is a notification that does not say its priority.
    """
    if request.flags & NOTIFICATION:
        priority = decode_invocation(request.body).method
        return Topic(request.exchange, f"{request.topic}.{priority}")
    if request.server and not request.flags & FANOUT:
        return Topic(request.exchange, f"{request.topic}.{request.server}")
    return request.target


def _unserved(request: Request) -> str:
    return f"no program on this host serves topic {request.exchange}/{request.topic}"


def _refusal(request: Request, error: VchanError) -> HandedBack:
    return HandedBack(request.id, reason_of(error), str(error))


def _doubted(request: Request, outcome: Outcome) -> Outcome:
    """What a program sends again, a daemon before this one may have passed on: here nobody can say
    that it has not run."""
    if not request.flags & REDELIVERED or may_have_run(outcome):
        return outcome
    if isinstance(outcome, Overdue):
        outcome = outcome.returned
    assert isinstance(outcome, HandedBack), "what else may have run"
    return outcome.doubted()


class _Fanout:
    """A cast to many: it is taken as soon as one of them has taken it, so that a VM that is slow or
    stuck holds up nobody's cast. The others are given it all the same, within its time.

    Args:
        told: Told what became of it, once.
        over: Called when nobody has it any more.
    """

    def __init__(self, told: Callable[[Outcome], None], over: Callable[[], object]) -> None:
        self.told = told
        self.cancels: list[Callable[[], None]] = []
        self.is_taken = False
        self._over = over
        self._open = 1  # our own, until all have been given it: see `begun`
        self._last: Outcome | None = None

    def add(self) -> None:
        """One more is given it, and `heard` will be told of that."""
        self._open += 1

    def heard(self, outcome: Outcome) -> None:
        """What one of them did with it."""
        if self._last is None or not may_have_run(self._last):
            self._last = outcome
        if isinstance(outcome, Taken) and not self.is_taken:
            self.is_taken = True
            self.told(outcome)
        self._end_one()

    def begun(self) -> None:
        """All have been given it."""
        self._end_one()

    def _end_one(self) -> None:
        self._open -= 1
        if not self._open:
            self._over()
            if not self.is_taken and self._last is not None:
                self.told(self._last)

    def cancel(self) -> None:
        """Take it back from who has not taken it."""
        for cancel in self.cancels:
            cancel()
        self._over()


class _Peer:
    __slots__ = ("cancels", "link", "responder", "sent", "streams", "who")

    def __init__(self, link: Link, who: Credentials) -> None:
        self.link = link
        self.who = who
        self.responder = Responder(link.send, grace_s=GRACE_S)
        self.cancels: dict[bytes, Callable[[], None]] = {}
        self.sent: set[bytes] = set()  # of these, what goes on without who sent it
        self.streams: Streams | None = None


class LocalService:
    """The peers of the daemon's local socket.

    Args:
        admins: Who may use ADMIN_METHODS.
        warn: Told what an operator must know of; by default `log`.
    """

    def __init__(
        self,
        loop: Loop,
        guests: Guests,
        log: Callable[[str], None],
        admins: Access | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._loop = loop
        self._guests = guests
        self._log = log
        self._warn = warn or log
        self._admins = admins or Access()
        self.drop: Callable[[int, str], None] = lambda *_: None
        """Closes a program's connection, with the reason: whose socket it is sets it."""
        self._peers: dict[int, _Peer] = {}
        self._servers = Dispatcher(_PROGRAMS, loop.time())
        self._fanouts: dict[bytes, _Fanout] = {}
        self._askers: dict[bytes, _Peer] = {}  # whose requests these are that can be cancelled
        self._alarm = Alarm(loop, self._timed_out)
        self._wake()

    def peer_opened(self, key: int, link: Link, who: Credentials) -> None:
        """A program connected."""
        self._peers[key] = _Peer(link, who)
        self._log(f"local program {key}: pid {who.pid}, uid {who.uid}")
        # So it knows that it is on a host: servers are told apart by name here.
        link.send(encode(Subscribe((Topic("", HOST_TOPIC),))), CONTROL)

    def peer_closed(self, key: int, *, is_gone: bool = False) -> None:
        """A program went away: nobody waits for its calls, and others serve what it served. Its
        casts to others go on: it may be back in a moment, and ask again what became of them."""
        peer = self._peers.pop(key)
        if peer.streams is not None:
            peer.streams.close(is_gone)
        for request_id, cancel in list(peer.cancels.items()):
            if request_id not in peer.sent:
                cancel()
            self._let_go(peer, request_id)
        if key in self._servers:
            self._servers.detach(key, self._loop.time())
            self._servers.hand_out(self._loop.time())
            self._wake()

    def peer_message(self, key: int, data: bytes) -> None:
        """A message of a program's."""
        peer = self._peers[key]
        if peer.streams is not None and is_of_family(data):
            peer.streams.receive(data)
            return
        message = decode(data)
        match message:
            case Request() | Cancel() | Settled():
                for delivery in peer.responder.receive(message, self._loop.time()):
                    self._deliver(key, peer, delivery)
            case Reply() | Receipt() | Returned():
                if key in self._servers:
                    self._servers.receive(key, message, self._loop.time())
            case Subscribe() | Holding():
                self._serve(key, peer, message)
            case BadMessage(reason):
                self._log(f"local program {key} sent nonsense: {reason}")
            case Unknown(kind):
                self._log(f"local program {key} sent a message of kind {kind}: not known here")
        self._wake()

    def _serve(self, key: int, peer: _Peer, message: Subscribe | Holding) -> None:
        now_s = self._loop.time()
        if key not in self._servers:
            self._servers.attach(key, peer.link.send, now_s, takes_raw=takes_raw(peer.link))
        if isinstance(message, Holding):
            problem = self._servers.hold(key, message.ids)
            if problem:
                self._log(f"local program {key} {problem}: the others may run again")
        else:
            topics = ", ".join(f"{topic.exchange}/{topic.name}" for topic in message.topics)
            self._log(f"local program {key} serves {topics or 'nothing'}")
            self._servers.subscribe(key, message.topics, now_s)
        self._servers.hand_out(now_s)

    def _deliver(self, key: int, peer: _Peer, delivery: Delivery) -> None:
        match delivery:
            case Deliver(request) if request.topic == HOST_TOPIC:
                self._run_method(key, peer, request)
            case Deliver(request):
                self._submit(peer, request)
            case Cancelled(request_id):
                cancel = self._let_go(peer, request_id)
                if cancel is not None:
                    cancel()

    def _let_go(self, peer: _Peer, request_id: bytes) -> Callable[[], None] | None:
        """A request is not this peer's any more. Returns what cancels it, if it was."""
        if self._askers.get(request_id) is peer:
            del self._askers[request_id]
        peer.sent.discard(request_id)
        return peer.cancels.pop(request_id, None)

    def _submit(self, peer: _Peer, request: Request) -> None:
        before = self._askers.get(request.id)
        if before is not None:
            # It reconnected, and repeats itself: its old connection, closed later, cancels nothing.
            self._let_go(before, request.id)
        if not request.timeout_ms:
            request = request.changed(timeout_ms=PATIENCE_MS)

        def told(outcome: Outcome) -> None:
            self._tell(peer, _doubted(request, outcome))

        try:
            cancel, goes_on = self._route(request, told)
        except UNSENT as error:
            told(_refusal(request, error))
        else:
            if request.id in peer.responder:
                peer.cancels[request.id] = cancel
                self._askers[request.id] = peer
                if goes_on and not request.is_call:
                    peer.sent.add(request.id)

    def _route(
        self, request: Request, told: Callable[[Outcome], None]
    ) -> tuple[Callable[[], None], bool]:
        """To the VM that it names, or else to a program that serves it, or to all who do. What
        cancels it, and whether it goes on when who sent it is gone."""
        if request.flags & FANOUT and not request.server:
            return self._fan_out(request, told), True
        problem = ""
        if request.server:
            try:
                return self._guests.submit(request.server, request, told), False
            except NoSuchDomain as error:
                topic = f"{request.exchange}/{request.topic}"
                problem = f"{error}, and no program here serves {topic} by that name"

        def explained(outcome: Outcome, _: float) -> None:
            if problem and isinstance(outcome, HandedBack) and outcome.reason == NO_AGENT:
                outcome = HandedBack(outcome.id, NO_DOMAIN, problem)
            told(outcome)

        if self._servers.offer(request, address_of(request), explained, self._loop.time()):
            return lambda: self._servers.cancel(request.id), True
        if problem:
            raise NoSuchDomain(problem)
        if self._guests.serving(request.target):
            vms = "VMs do: name one of them as its server, or fan out to all"
            raise NoSuchAgent(f"{_unserved(request)}; {vms}")
        raise NoSuchAgent(_unserved(request))

    def _fan_out(self, request: Request, told: Callable[[Outcome], None]) -> Callable[[], None]:
        fanout = self._fanouts.get(request.id)
        if fanout is not None:  # who asks repeats itself, perhaps on a new connection
            fanout.told = told
            if fanout.is_taken:
                told(Taken(request.id))
            return fanout.cancel
        fanout = _Fanout(told, lambda: self._fanouts.pop(request.id, None))
        self._fanouts[request.id] = fanout
        vms = self._guests.serving(request.target)
        self._give(fanout, "", request, partial(self._offer_fanout, vms))
        for vm in vms:  # after the programs: of those who refuse it, the last is heard
            self._give(fanout, vm, request, partial(self._guests.submit, vm))
        fanout.begun()
        return fanout.cancel

    def _give(self, fanout: _Fanout, vm: str, request: Request, submit: _Submit) -> None:
        def heard(outcome: Outcome) -> None:
            if vm and not isinstance(outcome, Taken):
                why = outcome.text if isinstance(outcome, HandedBack) else "not taken in time"
                self._warn(f"{vm} missed a fanout to topic {request.topic}: {why}")
            fanout.heard(outcome)

        fanout.add()
        try:
            fanout.cancels.append(submit(request, heard))
        except UNSENT as error:
            heard(_refusal(request, error))

    def _offer_fanout(
        self, vms: list[str], request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        """To the programs that serve it."""
        now_s = self._loop.time()
        if not self._servers.offer(request, address_of(request), lambda what, _: told(what), now_s):
            also = "no VM took it" if vms else "no VM does"
            raise NoSuchAgent(f"{_unserved(request)}, and {also}")
        return lambda: self._servers.cancel(request.id)

    def offer(
        self, request: Request, told: Callable[[Outcome, float], None], *, or_broker: bool
    ) -> Callable[[], None] | None:
        """Give a guest's request to a program on this host that serves it.

        Args:
            told: Told each outcome, with the time, perhaps before this returns.
            or_broker: There is a broker, too: after a start, do not wait for programs that may have
                had it before.

        Returns:
            What cancels the request. None: nobody here serves it; `told` hears nothing.
        """
        servers, now_s = self._servers, self._loop.time()
        if or_broker:
            request = request.changed(flags=request.flags & ~REDELIVERED)
        try:
            is_served = servers.offer(request, address_of(request), told, now_s, patient=False)
        except BadBody:
            return None
        except LimitExceeded as error:
            told(HandedBack(request.id, BUSY, str(error)), now_s)
            is_served = True
        self._wake()
        return (lambda: servers.cancel(request.id)) if is_served else None

    def _tell(self, peer: _Peer, outcome: Outcome) -> None:
        if not isinstance(outcome, Heartbeat):
            self._let_go(peer, outcome.id)
        peer.responder.tell(outcome, self._loop.time())

    # ---------------------------------------------------------------- byte streams

    def _open_streams(self, key: int, peer: _Peer, vm: str, target: str) -> None:
        """From now on the program's messages of the family go to this VM."""
        program = Program(
            peer.who.uid, peer.who.pid, peer.link.wake, lambda why: self._send_away(key, peer, why)
        )
        if peer.streams is not None:
            raise Rejected("this connection has its streams already: open another")
        peer.streams = self._guests.open_streams(vm, target, key, program)
        peer.link.refill = lambda: self._refill(peer)

    def _refill(self, peer: _Peer) -> bool:
        session, streams = peer.link.session, peer.streams
        return streams is not None and fill(session, streams.next_message)

    def _send_away(self, key: int, peer: _Peer, why: str) -> None:
        """There is nothing more for the program here: it is told what there still is, and its
        connection is closed. It may look for its VM elsewhere."""
        peer.link.flush()
        peer.streams = None
        self._loop.call_soon(lambda: self._drop_if_there(key, why))

    def _drop_if_there(self, key: int, why: str) -> None:
        if key in self._peers:
            self.drop(key, f"its byte streams' VM is not here any more: {why}")

    # ---------------------------------------------------------------- the daemon's own methods

    def _run_method(self, key: int, peer: _Peer, request: Request) -> None:
        def answer(failed: bool, body: bytes) -> None:
            if request.is_call:
                now_s = self._loop.time()
                peer.responder.answer(request.id, body, failed=failed, now_s=now_s, or_failure=True)

        if request.flags & RAW:
            text = f"the methods of {HOST_TOPIC} take JSON: use call, not call_raw"
            peer.responder.refuse(request.id, REFUSED, text)
            return
        if not request.is_call:
            peer.responder.take(request.id, self._loop.time())
        try:
            invocation = decode_invocation(request.body)
            self._check(peer.who, invocation.method)
        except RequestError as error:
            answer(True, encode_failure(type(error).__name__, str(error)))
            return
        try:
            if invocation.method == OPEN_STREAMS:
                call_with(partial(self._open_streams, key, peer), invocation.args)
                answer(*result(None))
            else:
                self._guests.method(invocation.method, invocation.args, answer)
        except RequestError as error:
            answer(True, encode_failure(type(error).__name__, str(error)))
        except WrongArguments as error:
            answer(True, encode_failure("TypeError", str(error), module="builtins"))
        except Exception:  # the caller's question stays the caller's: VMs are served all the same
            LOG.exception("a bug: the daemon's method %r failed", invocation.method)
            text = f"the daemon failed at {invocation.method!r}: its log says where"
            answer(True, encode_failure("InternalError", text))

    def _check(self, who: Credentials, method: str) -> None:
        if method in ADMIN_METHODS and not self._admins.allows(who):
            self._log(f"refused {method} to pid {who.pid}, uid {who.uid}")
            raise Rejected(
                f"uid {who.uid} may not {method}: only root, this daemon's own user, and the "
                "groups in admin_groups may"
            )

    # ---------------------------------------------------------------- time

    def _wake(self) -> None:
        """Something may be due soon: look within TICK_S."""
        self._alarm.set(self._loop.time() + TICK_S)

    def _timed_out(self) -> None:
        now_s = self._loop.time()
        self._servers.handle_timeout(now_s)
        times = [self._servers.next_timeout()]
        for key, peer in list(self._peers.items()):
            for delivery in peer.responder.handle_timeout(now_s):
                self._deliver(key, peer, delivery)
            times.append(peer.responder.next_timeout())
        at_s = earliest(*times)
        if at_s is not None:
            self._alarm.set(max(at_s, now_s + TICK_S))


class WrongArguments(Exception):
    """A method of the daemon's takes others. Its text is Python's own."""


def call_with(method: Callable[..., Any], args: Mapping[str, Any]) -> Any:
    """Call a method with what a program sent as its arguments, which are texts, or None.

    Raises:
        WrongArguments: It takes others; it has not run.
    """
    try:
        inspect.signature(method).bind(**args)
    except TypeError as error:
        raise WrongArguments(str(error)) from error
    for name, value in args.items():
        if not isinstance(value, str | None):
            raise WrongArguments(f"argument {name!r}: expected a text")
    return method(**args)


def result(value: Any) -> tuple[bool, bytes]:
    """What `SendAnswer` takes for a result."""
    return False, encode_json(value)


def failure(error: Exception) -> tuple[bool, bytes]:
    """What `SendAnswer` takes for a failure."""
    return True, encode_failure(type(error).__name__, str(error))
