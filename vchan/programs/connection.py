"""A connection to a daemon's socket that comes back by itself."""

import os
from collections.abc import Callable
from functools import partial
from typing import Final

from vchan.errors import LimitExceeded, LinkError
from vchan.io.link import Link
from vchan.io.loop import Alarm, Scheduler, Timer
from vchan.io.streams import Stream, connect_local
from vchan.rpc.in_flight import Delivery, Heartbeat, Outcome, Requester, Responder
from vchan.rpc.messages import (
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
    id_chunks,
)
from vchan.session import CONTROL, Config, Event, Opened, Peer, Refused, Role, Session
from vchan.wire.frames import LOCAL_FRAME_BYTES_MAX, PLAIN_PAYLOADS, RAW_REQUESTS

AGENT_SOCKET: Final = "/run/vchan/agent.sock"
SOCKET_VARIABLE: Final = "VCHAN_SOCKET"
"""Where an agent attaches, in the environment of one that vchan-guest or `vchan dev` runs."""
HOST_SOCKET: Final = "/run/vchan/host.sock"
HOST_TOPIC: Final = "vchan.host"
"""The topic that a host's daemon serves itself."""
OPEN_STREAMS: Final = "open_streams"
"""Its method after which a connection carries byte streams into one VM."""
OPEN_CALLS_MAX: Final = 1024
"""Requests of one client that wait for an answer. At it: LimitExceeded."""
RECONNECT_S: Final[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Between attempts to connect: a daemon that restarts is back within a second."""
GRACE_S: Final = 1.0
"""When a request's time is over the daemon's word is waited for so long: it knows whether the
request was delivered, and so may have run."""
ACK_LOOK_S: Final = 0.005
"""How often `when_acknowledged` looks: an acknowledgement comes after 20 ms at the latest."""
TICK_S: Final = 0.1
"""When something has come, its time is looked at after so long: to ask at each message when would
cost more than the message."""


class Connection:
    """A connection to a daemon that comes back by itself. Belongs to its loop's thread.

    Args:
        path: The daemon's socket.
        name: Ours, for the daemon's log.
        deliver: Told each request and cancellation that arrives: none, if nothing is served.
        changed: Told when the daemon is there (True) or not (False), with the reason. It is told
            False before each new session: a daemon that lost us gives our requests to others.
        open_stream: Connects to the socket.
        random_bytes: So many.
        takes_raw: Requests may be RAW: `deliver` knows what to do with those.
        other: Told each message that is none of a request's.
        refill: See `Link`; given the session.
    """

    def __init__(
        self,
        loop: Scheduler,
        path: str,
        name: str,
        deliver: Callable[[Delivery], object],
        changed: Callable[[bool, str], object],
        *,
        open_stream: Callable[[str], Stream] = connect_local,
        random_bytes: Callable[[int], bytes] = os.urandom,
        takes_raw: bool = False,
        other: Callable[[bytes], object] = lambda _: None,
        refill: Callable[[Session], object] | None = None,
    ) -> None:
        self.loop = loop
        self.path = path
        self._other = other
        self._refill = refill
        self._open_stream = open_stream
        self._deliver = deliver
        self._changed = changed
        config = Config(
            Role.GUEST,
            random_bytes(16),
            name,
            frame_bytes_max=LOCAL_FRAME_BYTES_MAX,
            features=PLAIN_PAYLOADS | (RAW_REQUESTS if takes_raw else 0),
        )
        self._session = Session(config, random_bytes)
        self._link: Link | None = None
        self._attempts = 0
        self._closed = False
        self._retry: Timer | None = None
        self._alarm = Alarm(loop, self._timed_out)
        self._waiting: dict[bytes, Callable[[Outcome], object]] = {}
        self.is_up = False
        self.topics: tuple[Topic, ...] = ()
        self.servers: tuple[Topic, ...] = ()
        self.daemon_topics: tuple[Topic, ...] = ()
        """What the daemon says that it serves itself: a host's names "vchan.host"."""
        self._charges: tuple[bytes, ...] = ()  # for the next daemon
        self._daemon = b""  # the run of the one that knows of them
        self.requester = Requester(self._send, grace_s=GRACE_S)
        self.responder = Responder(self._send)

    # ---------------------------------------------------------------- connecting

    def connect(self) -> None:
        """Connect, now and whenever the connection is lost.

        Raises:
            LinkError: The first attempt failed. It is tried again all the same.
        """
        self._retry = None
        try:
            stream = self._open_stream(self.path)
        except LinkError as error:
            is_first = self._attempts == 0
            self._plan_retry()
            self._changed(False, str(error))
            if is_first:
                raise
            return
        self._link = Link(
            self.loop,
            self._session,
            stream,
            self._handle,
            self._lost,
            on_message=self._receive,
        )
        if self._refill is not None:
            self._link.refill = partial(self._refill, self._session)

    def _plan_retry(self) -> None:
        delay_s = RECONNECT_S[min(self._attempts, len(RECONNECT_S) - 1)]
        self._attempts += 1
        self._retry = self.loop.call_later(delay_s, self.start)

    def start(self) -> None:
        """As `connect`; that the daemon is not there yet is no error."""
        try:
            self.connect()
        except LinkError:
            pass  # planned again, and `changed` told

    def _lost(self, reason: str) -> None:
        self._link = None
        if not self._closed:
            self._down(reason)
            self._plan_retry()

    def _down(self, reason: str) -> None:
        self.is_up = False
        self.daemon_topics = ()
        self._changed(False, reason)

    def close(self) -> None:
        """Close it for good."""
        self._closed = True
        self.is_up = False
        if self._retry is not None:
            self._retry.cancel()
        self._alarm.cancel()
        if self._link is not None:
            self._link.close()
            self._link = None

    def wake(self) -> None:
        """Write soon what there is to write."""
        if self._link is not None:
            self._link.wake()

    def flush(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        if self._link is not None:
            self._link.flush()

    def cork(self) -> None:
        """What is sent from here on goes out with `uncork`. Who waits for something meanwhile
        uncorks first."""
        if self._link is not None:
            self._link.cork()

    def uncork(self) -> None:
        """Write what is queued; see `cork`."""
        if self._link is not None:
            self._link.uncork()

    def _send(self, message: bytes, stream: int) -> None:
        if self._link is not None:
            self._link.send(message, stream)
        else:
            self._session.send(message, stream)

    # ---------------------------------------------------------------- talking

    def subscribe(self, topics: tuple[Topic, ...], servers: tuple[Topic, ...] = ()) -> None:
        """Serve these topics, now and after every reconnection.

        Args:
            servers: Names of this very server ("topic.server"). Only a host's daemon is told of
                them: in a guest the one server name is the VM's, and the host knows it.
        """
        self.topics, self.servers = topics, servers
        if self.requester.connected:
            self._say_topics()

    def _say_topics(self) -> None:
        is_host = any(topic.name == HOST_TOPIC for topic in self.daemon_topics)
        topics = self.topics + self.servers if is_host else self.topics
        self._send(encode(Subscribe(topics)), CONTROL)

    def when_acknowledged(self, callback: Callable[[], object]) -> None:
        """Call back as soon as the daemon has handled all that was said to it so far."""
        session = self._session
        if self.is_up and not session.backlog_bytes and not session.unacknowledged:
            callback()
        elif not self._closed:
            self.loop.call_later(ACK_LOOK_S, lambda: self.when_acknowledged(callback))

    def submit(self, request: Request, told: Callable[[Outcome], object]) -> None:
        """Send a request; `told` hears every outcome.

        Raises:
            LimitExceeded: Too many wait, or it is too large. Nothing was queued.
            Rejected: It is RAW, and the daemon takes none. Nothing was queued.
        """
        if len(self._waiting) >= OPEN_CALLS_MAX:
            limit = OPEN_CALLS_MAX
            raise LimitExceeded("open requests", limit + 1, limit, "OPEN_CALLS_MAX")
        self.requester.submit(request, self.loop.time())
        self._waiting[request.id] = told
        self._alarm.set(self.requester.next_timeout())

    def withdraw(self, request_id: bytes) -> None:
        """Nobody waits for this request any more: `told` hears nothing further."""
        if self._waiting.pop(request_id, None) is not None:
            self.requester.cancel(request_id)

    def _handle(self, event: Event) -> None:
        match event:
            case Opened(peer, resumed):
                self._attempts = 0
                if not resumed:
                    self._begin(peer)
                self.is_up = True
                self._changed(True, "")
            case Refused(reason):
                self._down(reason)
            case _:
                pass

    def _begin(self, daemon: Peer) -> None:
        if self.is_up:
            self._down("the session began anew")
        if daemon.instance == self._daemon:
            self._charges = ()  # it has given to others what was ours while we were away
        self._daemon = daemon.instance
        for chunk in id_chunks(self.responder.remembered() + self._charges):
            self._send(encode(Holding(chunk)), CONTROL)
        if self.topics:
            self._say_topics()
        no_raw = f"{self.path}: this daemon takes no raw bodies: upgrade vchan"
        self.requester.opened(self.loop.time(), takes_raw=daemon.takes_raw, no_raw=no_raw)
        self._alarm.set(self.requester.next_timeout())

    def _receive(self, data: bytes) -> None:
        message = decode(data)
        match message:
            case Request() | Cancel() | Settled():
                now_s = self.loop.time()
                for delivery in self.responder.receive(message, now_s):
                    self._deliver(delivery)
                self._alarm.set(now_s + TICK_S)  # it may have a new timeout
            case Reply() | Receipt() | Returned():
                for outcome in self.requester.receive(message):
                    self._tell(outcome)
            case Subscribe(topics):
                self.daemon_topics = topics
                if self.servers:
                    self._say_topics()
            case Holding(ids):
                self._charges = ids
            case BadMessage() | Unknown():
                self._other(data)  # or a newer daemon's: nothing here depends on it

    def _tell(self, outcome: Outcome) -> None:
        if isinstance(outcome, Heartbeat):
            told = self._waiting.get(outcome.id)
        else:
            told = self._waiting.pop(outcome.id, None)
            self.requester.settle((outcome.id,))
        if told is not None:
            told(outcome)

    # ---------------------------------------------------------------- time

    def _timed_out(self) -> None:
        now_s = self.loop.time()
        for outcome in self.requester.handle_timeout(now_s):
            self._tell(outcome)
        for delivery in self.responder.handle_timeout(now_s):
            self._deliver(delivery)
        self._alarm.set(self.requester.next_timeout())
        self._alarm.set(self.responder.next_timeout())
