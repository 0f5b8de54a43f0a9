"""Two sessions and a pipe each way, for tests: no I/O, a clock that is moved by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from vchan.session import Config, Event, Opened, Received, Role, Session, State
from vchan.wire import layout
from vchan.wire.frames import Decoder, Frame, Key, encode_frame

HOST_INSTANCE = b"host-instance-01"
GUEST_INSTANCE = b"guest-instance-1"


class Entropy:
    """Random bytes that a copy repeats, as a cloned guest's are repeated."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._drawn = 0

    def __call__(self, size: int) -> bytes:
        self._drawn += 1
        return hashlib.sha256(f"{self._seed} {self._drawn}".encode()).digest()[:size]


def make_session(role: Role, *, instance: bytes = b"", seed: str = "", **limits: Any) -> Session:
    """A session of this role with a name and instance of its own."""
    name = role.name.lower()
    own = HOST_INSTANCE if role is Role.HOST else GUEST_INSTANCE
    config = Config(role, instance or own, limits.pop("name", name), **limits)
    return Session(config, Entropy(seed or name + repr(instance)))


def reconfigure(session: Session, **changes: Any) -> None:
    """The same daemon with another configuration, as if it had always had it."""
    session.config = session.config._replace(**changes)
    for part in (session._sender, session._receiver, session._handshake, session._liveness):
        part._config = session.config


class End:
    """A session, its events, and the bytes that are on their way to it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.events: list[Event] = []
        self.inbox = bytearray()

    def received(self, stream: int | None = None) -> list[bytes]:
        """The messages that arrived since the last new session, as the layer above sees them."""
        return [
            event.message
            for event in self.events
            if isinstance(event, Received) and stream in (None, event.stream)
        ]

    def of(self, kind: type[Event]) -> list[Any]:
        """The events of one type."""
        return [event for event in self.events if isinstance(event, kind)]


class Pair:
    """A host's and a guest's session, connected."""

    def __init__(
        self, host: Session | None = None, guest: Session | None = None, *, now_s: float = 1000.0
    ) -> None:
        self.host = End(host or make_session(Role.HOST))
        self.guest = End(guest or make_session(Role.GUEST))
        self.now_s = now_s

    def ends(self) -> tuple[tuple[End, End], tuple[End, End]]:
        """Each end with its peer."""
        return (self.host, self.guest), (self.guest, self.host)

    def peer(self, end: End) -> End:
        """The other end."""
        return self.guest if end is self.host else self.host

    def open(self, *ends: End) -> None:
        """Give these ends (or both) a new stream; the pipe keeps what is in it."""
        for end in ends or (self.host, self.guest):
            end.session.open(self.now_s)

    def write(self, end: End) -> bytes:
        """Everything the end has to send, into its peer's inbox."""
        out = b""
        while data := end.session.data_to_send():
            out += data
        self.peer(end).inbox += out
        return out

    def deliver(self, end: End, size: int | None = None) -> list[Event]:
        """Hand over the next `size` bytes of the inbox, or all."""
        size = len(end.inbox) if size is None else size
        data = bytes(end.inbox[:size])
        del end.inbox[:size]
        events = end.session.receive_data(data, self.now_s)
        end.events += events
        return events

    def settle(self) -> None:
        """Deliver both ways until nobody has anything to say. Time stands still."""
        for _ in range(10_000):
            self.write(self.host)
            self.write(self.guest)
            if not self.host.inbox and not self.guest.inbox:
                return
            self.deliver(self.guest)
            self.deliver(self.host)
        raise AssertionError("the two never stop talking")

    def advance(self, seconds: float, *, settle: bool = True) -> None:
        """Let time pass, with every timer at its time."""
        until_s = self.now_s + seconds
        for _ in range(100_000):
            times = [end.session.next_timeout() for end, _ in self.ends()]
            due_s = min((at for at in times if at is not None), default=until_s)
            if due_s > until_s:
                break
            self.now_s = max(self.now_s, due_s)
            for end, _ in self.ends():
                end.events += end.session.handle_timeout(self.now_s)
            if settle:
                self.settle()
            if due_s == until_s:
                break
        else:
            raise AssertionError("timers that never stop")
        self.now_s = until_s

    def connect(self) -> Pair:
        """Open both ends and finish the handshake."""
        self.open()
        self.settle()
        assert self.host.session.state is self.guest.session.state is State.OPEN
        return self

    def forget_events(self) -> None:
        """Start a new page of events."""
        self.host.events.clear()
        self.guest.events.clear()


def connected(**options: Any) -> Pair:
    """A pair with an open session and no events yet.

    Args:
        options: Of both configs.
    """
    pair = Pair(make_session(Role.HOST, **options), make_session(Role.GUEST, **options)).connect()
    pair.forget_events()
    return pair


def read_frames(data: bytes, key: Key | None = None) -> list[Frame]:
    """What is in these bytes, for who knows the key. Greetings need none."""
    decoder = Decoder()
    decoder.key = key
    out: list[Frame] = []
    batch = decoder.receive_data(data)
    while batch:
        out += batch
        batch = decoder.receive_data(b"")
    return out


def kinds(data: bytes, session: Session) -> list[str]:
    """The names of the frames that `session` wrote."""
    names = {value: name[5:] for name, value in vars(layout).items() if name.startswith("KIND_")}
    return [names[frame.kind] for frame in read_frames(data, session._tx_key)]


def sealed(session: Session, kind: int, **fields: Any) -> bytes:
    """A frame that `session` will take as its peer's, made by hand: any field may be wrong."""
    values = {
        "flags": 0,
        "stream": 0,
        "total": 0,
        "seq": session._receiver.next,
        "ack": session._sender.base,
        "credit": session._sender.credit,
        "payload": b"",
        **fields,
    }
    key = session._decoder.key
    assert key is not None
    return encode_frame(
        key,
        kind,
        values["flags"],
        values["stream"],
        values["total"],
        values["seq"],
        values["ack"],
        values["credit"],
        values["payload"],
    )


def until(condition: Callable[[], bool], step: Callable[[], object], tries: int = 1000) -> None:
    """Repeat `step` until `condition` holds."""
    for _ in range(tries):
        if condition():
            return
        step()
    raise AssertionError("it never came")


def opened(events: Iterable[Event]) -> list[bool]:
    """Of each Opened, whether it was resumed."""
    return [event.resumed for event in events if isinstance(event, Opened)]
