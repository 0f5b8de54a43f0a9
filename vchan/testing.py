"""For the tests of agents: a guest in memory, with vchan's own cores and a clock moved by hand.

    from vchan.testing import FakeGuest

    def test_echo() -> None:
        with FakeGuest() as guest:
            guest.serve("agent", Endpoint())
            assert guest.call("agent", "echo", {"x": 1}) == 1

or with pytest, `pytest_plugins = ["vchan.pytest_plugin"]` in conftest.py: fixture `vchan_guest`.

    test's own thread                                      one loop, no sockets, no threads
    FakeGuest.call --> Requester -- Session == Session -- Router -- Session == Session -- Agent
                       (a host's end)  channel   (the guest daemon's core)   socket   (the real one)

What is real: the agent, the guest daemon's core, the sessions with every byte between them, and so
what becomes of a request when the channel is torn, the VM moves, an agent or the guest dies. What
is not: a host's broker and policy. The host's end here keeps a request as a broker does, and hands
it out again after a migration. An agent's methods run on the loop: there are no workers.

Rules of this file
1. Time passes only while somebody waits: then it jumps to what is due next. A test that waits for a
   minute takes as long as what happens in it.
2. What can never come is an AssertionError, not a test that hangs.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from itertools import count
from typing import Any, Final, NamedTuple, Self

from vchan.client import Agent, _Caller
from vchan.errors import ConfigError, LinkDown, PortAbsent, PortBusy
from vchan.guest.port import Port
from vchan.guest.router import AGENTS_MAX, Router
from vchan.io.link import Link
from vchan.io.loop import Alarm, Callback, Timer
from vchan.programs.requests import TIMEOUT_S, invocation_body, make_request, require_taken
from vchan.rpc.arguments import (
    TIMEOUT_S_MAX,
    check_endpoint,
    check_seconds,
    check_topic,
    public_methods,
    raw_methods,
)
from vchan.rpc.bodies import (
    decode_invocation,
    decode_raw,
    encode_failure,
    encode_json,
    exception_text,
)
from vchan.rpc.in_flight import Deliver, Heartbeat, Outcome, Requester, Responder
from vchan.rpc.messages import (
    DEFAULT_EXCHANGE,
    FANOUT,
    NO_AGENT,
    NOTIFICATION,
    OUT_OF_TURN,
    RAW,
    REDELIVERED,
    REFUSED,
    Cancel,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    decode,
    with_time_left,
)
from vchan.session import Config, Event, Opened, Received, Role, Session
from vchan.wire.frames import RAW_REQUESTS

PIPE_BYTES_MAX: Final = 128 * 1024
"""What a channel or socket here holds that nobody has read, as a real one. At it: who writes
waits."""
TURNS_MAX: Final = 1_000_000
"""Of the loop, in one wait. At it: AssertionError: something answers itself."""
UPTIME_S: Final = 2 * TIMEOUT_S_MAX
"""A guest has been up for longer than any request lives, until it is reset."""
_BEGIN_S: Final = UPTIME_S + 1000.0


class Sent(NamedTuple):
    """What an agent has sent to the control side."""

    kind: str
    """call, cast, fanout or notify."""
    exchange: str
    topic: str
    server: str
    method: str
    """Of a notification: its priority."""
    args: Mapping[str, Any]
    context: Mapping[str, Any]
    data: bytes = b""
    """Of a raw call."""


# ---------------------------------------------------------------- a loop without an outside


class _End:
    """One end of a pipe in memory: a stream, as `vchan.io.streams` has them."""

    ends_at_hangup = True

    def __init__(self, loop: VirtualLoop, path: str) -> None:
        self.path = path
        self.peer: _End
        self.inbox = bytearray()
        self.is_closed = False
        self.is_frozen = False
        self.on_write: Callable[[int], int] = lambda size: size  # how much of it arrives
        self._loop = loop
        self._fd = loop.register(self)

    def fileno(self) -> int:
        """A number of its own."""
        return self._fd

    def read(self) -> bytes:
        """See Stream."""
        if self.inbox:
            data = bytes(self.inbox)
            self.inbox.clear()
            return data
        if self.peer.is_closed:
            return b""
        raise BlockingIOError

    def write(self, data: bytes) -> int:
        """See Stream."""
        if self.peer.is_closed:
            raise BrokenPipeError(32, "the other end is gone")
        room = PIPE_BYTES_MAX - len(self.peer.inbox)
        if room <= 0:
            raise BlockingIOError
        taken = data[:room]
        self.peer.inbox += taken[: self.on_write(len(taken))]
        return len(taken)

    def close(self) -> None:
        """See Stream."""
        self.is_closed = True

    @property
    def is_readable(self) -> bool:
        """`read` has something to say."""
        has_news = bool(self.inbox) or self.peer.is_closed
        return has_news and not (self.is_closed or self.is_frozen)

    @property
    def is_writable(self) -> bool:
        """`write` has something to say."""
        return not self.is_closed and len(self.peer.inbox) < PIPE_BYTES_MAX


class VirtualLoop:
    """`vchan.io.loop.Loop` with a clock that jumps, and descriptors in memory."""

    def __init__(self) -> None:
        self.now_s = _BEGIN_S
        self._ends: dict[int, _End] = {}
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._soon: deque[Callback] = deque()

    def pipe(self, path: str) -> tuple[_End, _End]:
        """Both ends of a connection."""
        here, there = _End(self, path), _End(self, path)
        here.peer, there.peer = there, here
        return here, there

    def register(self, end: _End) -> int:
        """A number for it."""
        fd = next(self._order)
        self._ends[fd] = end
        return fd

    def time(self) -> float:
        """See Loop."""
        return self.now_s

    def spent(self) -> float:
        """See Loop. Nothing costs anything here."""
        return 0.0

    def call_soon(self, callback: Callback) -> None:
        """See Loop."""
        self._soon.append(callback)

    call_soon_threadsafe = call_soon

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """See Loop."""
        return self.call_at(self.now_s + delay_s, callback)

    def call_at(self, at_s: float, callback: Callback) -> Timer:
        """See Loop."""
        timer = Timer(at_s, callback, self)
        heappush(self._timers, (at_s, next(self._order), timer))
        return timer

    def timer_cancelled(self) -> None:
        """See Loop: it is passed over when its time comes."""

    def add_reader(self, fd: int, callback: Callback) -> None:
        """See Loop."""
        self._readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        """See Loop."""
        self._readers.pop(fd, None)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """See Loop."""
        self._writers[fd] = callback

    def remove_writer(self, fd: int) -> None:
        """See Loop."""
        self._writers.pop(fd, None)

    def stop(self) -> None:
        """See Loop: it runs only while somebody waits."""

    def close(self) -> None:
        """See Loop."""

    def run_once(self, wait_s: float | None = None) -> None:  # noqa: ARG002 - as Loop's
        """See Loop. Where nothing else is to be done, the clock jumps."""
        if not self._turn():
            at_s = self.next_timer()
            assert at_s is not None, "what is waited for can never come: nothing is under way"
            self.now_s = max(self.now_s, at_s)

    def next_timer(self) -> float | None:
        """When something is due."""
        while self._timers and self._timers[0][2]._callback is None:
            heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def _turn(self) -> bool:
        """Do what there is to do now. False: nothing."""
        did = False
        for fd, end in list(self._ends.items()):
            if end.is_readable and (reader := self._readers.get(fd)) is not None:
                did = True
                reader()
            if end.is_writable and (writer := self._writers.get(fd)) is not None:
                did = True
                writer()
            if end.is_closed:
                self._ends.pop(fd, None)
        while (at_s := self.next_timer()) is not None and at_s <= self.now_s:
            did = True
            heappop(self._timers)[2]._run()
        for _ in range(len(self._soon)):
            if self._soon:  # one of them has run a turn itself
                did = True
                self._soon.popleft()()
        return did

    def run_until(self, reached: Callable[[], object]) -> None:
        """Let things happen until it is so."""
        for _ in range(TURNS_MAX):
            if reached():
                return
            self.run_once()
        raise AssertionError(f"{TURNS_MAX} turns, and no end: something answers itself")

    def settle(self) -> None:
        """Do everything that there is to do now; time stands still."""
        for _ in range(TURNS_MAX):
            if not self._turn():
                return
        raise AssertionError(f"{TURNS_MAX} turns, and no end: something answers itself")

    def advance(self, seconds: float) -> None:
        """Let time pass, with every timer at its time."""
        until_s = self.now_s + seconds
        while True:
            self.settle()
            at_s = self.next_timer()
            if at_s is None or at_s > until_s:
                break
            self.now_s = max(self.now_s, at_s)
        self.now_s = until_s


# ---------------------------------------------------------------- the parts


class _FakeAgent(Agent):
    """The real agent, on the guest's loop."""

    def __init__(self, guest: FakeGuest, log: Callable[[str], object]) -> None:
        loop: Any = guest.loop  # as much of a Loop as an agent uses
        self._attach(loop, "agent.sock", log, open_stream=guest._connect_agent)
        self._thread = threading.get_ident()

    def run(self) -> None:
        """See Agent: not here."""
        problem = "its agents run while the test waits, in call() or advance(): do not run() them"
        raise LinkDown("FakeGuest", problem)


class _Daemon:
    """One run of the guest daemon: its core, its port, and a session for each agent.

    Args:
        age_s: It has run for so long. A young one marks what one before it may have been handed.
    """

    def __init__(self, guest: FakeGuest, age_s: float = 0.0) -> None:
        self._loop = guest.loop
        config = Config(Role.GUEST, os.urandom(16), "guest", features=RAW_REQUESTS)
        session = Session(config, os.urandom)
        self.port = Port(self._loop, guest._open_channel, session, self._handle, lambda _: None)
        self.router = Router(
            self.port.send, {"ping": dict}, self._loop.time() - age_s, self.port.flush
        )
        self._instance = os.urandom(16)
        self._links: dict[int, Link] = {}
        self._opened: set[int] = set()
        self._keys = count(1)
        self._alarm = Alarm(self._loop, self._timed_out)
        self.port.open()
        self._wake()

    def _handle(self, event: Event) -> None:
        now_s = self._loop.time()
        match event:
            case Received(_, message):
                self.router.host_receive(message, now_s)
            case Opened(peer, resumed):
                takes_raw = peer.takes_raw
                self.router.host_opened(resumed=resumed, now_s=now_s, takes_raw=takes_raw)
            case _:
                pass
        self._wake()

    def accept(self, stream: _End) -> None:
        """An agent connects."""
        key = next(self._keys)
        config = Config(Role.HOST, self._instance, "guest", features=RAW_REQUESTS)
        session = Session(config, os.urandom)
        self._links[key] = Link(
            self._loop,
            session,
            stream,
            lambda event: self._handle_agent(key, event),
            lambda _: self._forget(key),
        )

    def _handle_agent(self, key: int, event: Event) -> None:
        now_s = self._loop.time()
        match event:
            case Received(_, message):
                problem = self.router.agent_receive(key, message, now_s)
                assert not problem, problem
            case Opened(peer, resumed) if not (resumed and key in self._opened):
                if key in self._opened:
                    self.router.detach(key, now_s)
                assert self.router.has_room, f"more than {AGENTS_MAX} agents (AGENTS_MAX)"
                self._opened.add(key)
                send = self._links[key].send
                self.router.attach(key, send, now_s, takes_raw=peer.takes_raw)
            case _:
                pass
        self._wake()

    def _forget(self, key: int) -> None:
        del self._links[key]
        if key in self._opened:
            self._opened.discard(key)
            self.router.detach(key, self._loop.time())
            self._wake()

    def _wake(self) -> None:
        self._alarm.set(self.router.next_timeout())

    def _timed_out(self) -> None:
        self.router.handle_timeout(self._loop.time())
        self._wake()

    def kill(self) -> None:
        """Its memory is gone; the kernel closes what it had open."""
        self._alarm.cancel()
        self.port.close()
        for link in self._links.values():
            link.close()


class _Host:
    """A host's end of the channel, from the VM's arrival to its leaving."""

    def __init__(self, guest: FakeGuest, name: str) -> None:
        self._guest = guest
        self._loop = guest.loop
        config = Config(Role.HOST, os.urandom(16), name, features=RAW_REQUESTS)
        self.session = Session(config, os.urandom)
        self.requester = Requester(self.send)
        self.topics: frozenset[Topic] = frozenset()
        self.link: Link | None = None
        self._alarm = Alarm(self._loop, self._timed_out)

    def connect(self, stream: _End) -> None:
        """The guest has opened its port."""
        if self.link is not None:
            self.link.close()
        self.link = Link(self._loop, self.session, stream, self._handle, self._lost)

    def _lost(self, _: str) -> None:
        self.link = None

    def leave(self) -> None:
        """The VM is elsewhere."""
        self._alarm.cancel()
        if self.link is not None:
            self.link.close()
            self.link = None

    def send(self, message: bytes, stream: int) -> None:
        """Queue a message."""
        if self.link is not None:
            self.link.send(message, stream)
        else:
            self.session.send(message, stream)

    def submit(self, request: Request) -> None:
        """Send a request of the control side's."""
        self.requester.submit(request, self._loop.time())
        self.wake()

    def _handle(self, event: Event) -> None:
        match event:
            case Received(_, message):
                self._receive(message)
            case Opened(peer, resumed) if not resumed:
                self.requester.opened(self._loop.time(), takes_raw=peer.takes_raw)
            case _:
                pass
        self.wake()

    def _receive(self, data: bytes) -> None:
        message = decode(data)
        match message:
            case Reply() | Receipt() | Returned():
                for outcome in self.requester.receive(message):
                    self._guest._heard(outcome)
            case Request() | Cancel() | Settled():
                self._guest._receive_up(message)
            case Subscribe(topics):
                self.topics = frozenset(topics)
            case _:
                pass

    def wake(self) -> None:
        """Something may be due."""
        self._alarm.set(self.requester.next_timeout())
        self._alarm.set(self._guest.responder.next_timeout())

    def _timed_out(self) -> None:
        for outcome in self.requester.handle_timeout(self._loop.time()):
            self._guest._heard(outcome)
        self._guest.responder.handle_timeout(self._loop.time())
        self.wake()


# ---------------------------------------------------------------- for tests


class FakeGuest(_Caller):
    """A VM with a guest daemon, and the control side that speaks to its agents. See the top of this
    file; for its methods `call`, `cast` and `notify` see `vchan.client.Client`: a test is the
    control side, and they raise what a service would see.

    Attributes:
        loop: What everything here runs on; `loop.now_s` is the time, in seconds.
        sent: What agents have sent to the control side, in order.
        log: What agents have logged.
    """

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.sent: list[Sent] = []
        self.log: list[str] = []
        self._control: dict[Topic, object] = {}  # what services serve; None: they never answer
        self._waiting: dict[bytes, Callable[[Outcome], object]] = {}
        self._deadlines: dict[bytes, float] = {}
        self._agents: list[_FakeAgent] = []
        self._hosts = count(1)
        self._is_paused = False
        self._channel: _End | None = None  # the guest's end
        self._left: int | None = None  # bytes until the channel is torn
        self._is_moving = False
        # What hosts have made known to the control side, which outlives them.
        self.responder = Responder(lambda message, stream: self._host.send(message, stream))
        self._host = _Host(self, f"host-{next(self._hosts)}")
        self._daemon: _Daemon | None = _Daemon(self, UPTIME_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it all."""
        for agent in list(self._agents):
            self.kill(agent)
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon = None
        self._host.leave()

    # ---------------------------------------------------------------- agents

    def agent(self) -> Agent:
        """A new agent, connected: `serve` with it. Do not `run` it: what is asked of it runs while
        the test waits, in `call`, `cast` or `advance`."""
        agent = _FakeAgent(self, self.log.append)
        self._agents.append(agent)
        agent._connection.start()
        self.loop.settle()
        return agent

    def serve(self, topic: str, endpoint: object, **options: Any) -> Agent:
        """A new agent that serves a topic, as the control side knows when this returns. For the
        options see `vchan.client.Agent.serve`."""
        agent = self.agent()
        agent.serve(topic, endpoint, **options)
        self.settle()
        return agent

    def kill(self, agent: Agent) -> None:
        """An agent dies, perhaps within one of its methods: its calls' callers get AgentGone, what
        it had acknowledged is not run again, what it had not goes to the next agent."""
        assert isinstance(agent, _FakeAgent) and agent in self._agents, (
            "it is no agent of this guest"
        )
        self._agents.remove(agent)
        agent._worker.is_stopped = True
        agent._serving.inbox.clear()
        agent._connection.close()

    def _connect_agent(self, path: str) -> _End:
        if self._daemon is None:
            raise PortAbsent(path, "no such socket: it may appear later")
        here, there = self.loop.pipe(path)
        self._daemon.accept(there)
        return here

    # ---------------------------------------------------------------- the channel, and its faults

    def _open_channel(self) -> _End:
        if self._channel is not None and not self._channel.is_closed:
            raise PortBusy("channel", "another process has it open")
        guest, host = self.loop.pipe("channel")
        guest.on_write = host.on_write = self._crossing
        guest.is_frozen = host.is_frozen = self._is_paused
        self._channel = guest
        self._host.connect(host)
        return guest

    def _crossing(self, size: int) -> int:
        """How much of what is written arrives."""
        if self._left is None:
            return size
        arrives = min(size, self._left)
        self._left -= arrives
        if arrives < size and not self._is_moving:
            self._is_moving = True
            self.loop.call_soon(self._move)
        return arrives

    def migrate(self, after_bytes: int | None = None) -> None:
        """The VM moves to another host. What is in the channel is lost, and nobody is told; what is
        open the new host hands out again.

        Args:
            after_bytes: Not now, but when so many more bytes have crossed the channel, in both
                directions together: in the middle of a frame, most likely.
        """
        if after_bytes is not None:
            self._left = after_bytes
            return
        self._move()
        self.settle()

    def _move(self) -> None:
        self._left, self._is_moving = None, False
        before, self._host = self._host, _Host(self, f"host-{next(self._hosts)}")
        before.leave()
        self._tear()
        now_s = self.loop.time()
        for request in before.requester.open_requests():
            again = request.changed(timeout_ms=0, flags=request.flags | REDELIVERED)
            deadline_s = self._deadlines.get(request.id)
            self._host.submit(with_time_left(again, deadline_s, now_s))

    def tear(self) -> None:
        """The channel breaks and is opened again, at the same host: QEMU's end went away for a
        moment. The session goes on where it was."""
        self._tear()
        self.settle()

    def _tear(self) -> None:
        if self._channel is not None:
            for end in (self._channel, self._channel.peer):
                end.inbox.clear()
            self._channel.peer.close()
            self._channel = None

    def restart_daemon(self) -> None:
        """The guest daemon dies and starts again; its agents live on."""
        self._stop_daemon()
        self._daemon = _Daemon(self)
        self.settle()

    def reset(self) -> None:
        """The VM is reset: its daemon and its agents lose their memory. `serve` starts new ones."""
        for agent in list(self._agents):
            self.kill(agent)
        self.restart_daemon()

    def _stop_daemon(self) -> None:
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon = None
            self._channel = None

    def pause(self) -> None:
        """The VM stands still: nothing crosses the channel until `resume`."""
        self._freeze(True)

    def resume(self) -> None:
        """It goes on."""
        self._freeze(False)
        self.settle()

    def _freeze(self, is_paused: bool) -> None:
        self._is_paused = is_paused
        if self._channel is not None:
            self._channel.is_frozen = self._channel.peer.is_frozen = is_paused

    # ---------------------------------------------------------------- time

    def advance(self, seconds: float) -> None:
        """Let time pass, and what is due in it happen.

        Raises:
            ConfigError: It is no number of seconds over 0.
        """
        check_seconds("seconds", seconds)
        self.loop.advance(seconds)

    def settle(self) -> None:
        """Let everything happen that follows from what was done so far: a second, in which vchan
        reconnects at the latest."""
        self.loop.advance(1.0)

    # ---------------------------------------------------------------- down

    def cast_again(
        self,
        topic: str,
        method: str,
        args: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        **names: Any,
    ) -> None:
        """A cast that may have run before, in a VM that was reset since: its method runs, with
        `vchan_redelivered` in its context. For `names` see `cast`."""
        body = invocation_body(
            method, args, names.pop("namespace", None), names.pop("version", None),
            names.pop("context", None),
        )  # fmt: skip
        exchange = names.pop("exchange", DEFAULT_EXCHANGE)
        if names:
            raise ConfigError(next(iter(names)), "cast_again has no such argument")
        request = make_request(REDELIVERED | OUT_OF_TURN, exchange, topic, "", body, timeout_s)
        require_taken(self._outcome_of(request, timeout_s), timeout_s)

    def _outcome_of(self, request: Request, timeout_s: float) -> Outcome:
        if request.flags & NOTIFICATION:  # the broker's queue, and so the agent's topic
            priority = decode_invocation(request.body).method
            request = request.changed(topic=f"{request.topic}.{priority}")
        outcomes: list[Outcome] = []
        self._waiting[request.id] = outcomes.append
        self._deadlines[request.id] = self.loop.time() + timeout_s
        self._host.submit(request)
        self.loop.run_until(lambda: outcomes)
        self._deadlines.pop(request.id)
        self.loop.settle()  # a cast's method runs after it was taken
        return outcomes[0]

    def _heard(self, outcome: Outcome) -> None:
        if isinstance(outcome, Heartbeat):
            return
        self._host.requester.settle((outcome.id,))
        told = self._waiting.pop(outcome.id, None)
        if told is not None:
            told(outcome)

    @property
    def topics(self) -> set[str]:
        """What the control side knows that agents serve."""
        return {topic.name for topic in self._host.topics}

    # ---------------------------------------------------------------- up

    def control(self, topic: str, endpoint: object, *, exchange: str = DEFAULT_EXCHANGE) -> None:
        """What agents may ask of the control side: the methods of an ordinary object. Notifications
        are for topic "TOPIC.PRIORITY", as with the broker. None: nobody answers, ever."""
        check_topic(topic)
        if endpoint is not None:
            check_endpoint(endpoint)
        self._control[Topic(exchange, topic)] = endpoint

    def _receive_up(self, message: Request | Cancel | Settled) -> None:
        for delivery in self.responder.receive(message, self.loop.time()):
            if isinstance(delivery, Deliver):
                self._asked(delivery.request)

    def _asked(self, request: Request) -> None:
        is_raw = request.flags & RAW != 0
        body, data = decode_raw(request.body) if is_raw else (request.body, b"")
        asked = decode_invocation(body)
        kind = "call" if request.is_call else "cast"
        topic = request.topic
        if request.flags & NOTIFICATION:
            kind, topic = "notify", f"{request.topic}.{asked.method}"
        elif request.flags & FANOUT:
            kind = "fanout"
        self.sent.append(
            Sent(
                kind,
                request.exchange,
                request.topic,
                request.server,
                asked.method,
                asked.args,
                asked.context,
                data,
            )
        )
        responder, now_s = self.responder, self.loop.time()
        key = Topic(request.exchange, topic)
        if key not in self._control:
            text = f"nobody serves topic {topic}: see FakeGuest.control"
            responder.refuse(request.id, NO_AGENT, text)
            return
        endpoint = self._control[key]
        if endpoint is None:
            return
        if (asked.method in raw_methods(endpoint)) is not is_raw:
            text = f"{asked.method}: takes {'JSON' if is_raw else 'bytes: use call_raw'}"
            responder.refuse(request.id, REFUSED, text)
            return
        if not request.is_call:
            responder.take(request.id, now_s)
        failed, body = _run(endpoint, asked.method, asked.args, data if is_raw else None)
        if request.is_call:
            responder.answer(request.id, body, failed=failed, now_s=now_s)


def _run(
    endpoint: object, name: str, args: Mapping[str, Any], data: bytes | None
) -> tuple[bool, bytes]:
    """(failed, body) of a service's method, which takes `data` if it is raw."""
    method = getattr(endpoint, name, None) if name in dict(public_methods(endpoint)) else None
    if method is None:
        return True, encode_failure("NoSuchMethod", f"the control side has no method {name}")
    try:
        if data is not None:
            return False, bytes(method(data, **args))
        return False, encode_json(method(**args))
    except Exception as error:  # noqa: BLE001 - relayed to the agent
        kind = type(error)
        return True, encode_failure(kind.__name__, exception_text(error), module=kind.__module__)
