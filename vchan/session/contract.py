"""What a session is to those who use it: its methods, events, configuration, counters, limits.

`Session` (two ways, over a channel or a socket) and `oneway`'s `Writer` and `Reader` (one way, over
a pipe) all implement `AnySession`. A link drives any of them, in this way:

    session.open(now_s)                        # bound to a new stream
    events = session.receive_data(data, now_s)
    stream.write(session.data_to_send())       # whenever the stream takes bytes
    events = session.handle_timeout(now_s)     # when next_timeout() has come
    session.close()                            # the stream is gone; the session is not
"""

import enum
from typing import Final, NamedTuple, Protocol

from vchan.wire import layout
from vchan.wire.frames import FRAME_BYTES_MAX, OVERHEAD_BYTES, RAW_REQUESTS
from vchan.wire.value import Value

VERSION: Final = 1
"""The session protocol's newest version this code speaks, and (so far) its oldest."""

STREAMS: Final = 16
"""Messages of one stream arrive in order; streams interleave. Stream 0 goes first."""
CONTROL: Final = 0

MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
"""One message. oslo.messaging sets no limit; RabbitMQ operators rarely allow more. At it:
LimitExceeded to the sender: a caller is told of a failure, a cast is dropped and logged."""
MESSAGE_BYTES_MIN: Final = 64 * 1024
"""A peer must take at least this, so that what a daemon says of itself always passes."""
REASSEMBLY_BYTES_MAX: Final = 2 * MESSAGE_BYTES_MAX
"""All messages of a peer that have begun to arrive and are not complete. At it: a sender waits; one
that does not has broken the protocol."""
WINDOW_BYTES: Final = 256 * 1024
"""Credit granted ahead of what has arrived. At it: the sender waits."""
IN_FLIGHT_BYTES_MAX: Final = 192 * 1024
"""Sent and not acknowledged: what a migration can cost us a resend of. Stays under the 512 KiB that
a virtio-serial ring can hold and near the 208 KiB of a unix socket's buffer. At it: the sender
waits."""
BACKLOG_BYTES_MAX: Final = 1024 * 1024
"""Bytes that a guest has not read. At it: the host grants no more credit; a guest that does not
read may not write."""
WRITE_BYTES_MAX: Final = 32 * 1024
"""What one virtio-console write takes: two frames. Where frames are larger, it is two of these."""
WRITE_FRAMES_MAX: Final = WRITE_BYTES_MAX // OVERHEAD_BYTES
"""More do not fit."""
ACK_DELAY_S: Final = 0.02
"""A frame is acknowledged by the next frame that goes its sender's way, or after this."""
CHANNEL_ACK_DELAY_S = 0.5
"""The same on a VM's channel, where a frame of its own costs a host with many VMs a timer and a
write for each message. Nobody there waits for an acknowledgement but who may send no more, and that
one comes at once; a sender asks after a second."""
ASK_TICK_S: Final = 0.25
"""A host asks all idle guests whose time falls within this at once, before it is over: one wake-up
for many. At it: a guest is asked up to two of these early, and so never asks itself."""
PING_IDLE_S: Final = 5.0
"""Wake-ups on virtio-serial get lost: say something at least this often."""
SILENCE_S: Final = 10.0
"""Tell the shell when a peer that was asked stays silent so long. The shell knows about pauses."""


class Role(enum.IntEnum):
    """Which end this is. On a local socket the daemon is the HOST."""

    HOST = layout.ROLE_HOST
    GUEST = layout.ROLE_GUEST


class State(enum.Enum):
    """Of the conversation on the current stream."""

    CLOSED = "closed"  # no stream
    GREETING = "greeting"  # HELLO sent, no peer has proved to be there
    OPEN = "open"
    REFUSED = "refused"  # the ends cannot talk; tried again now and then

    __hash__ = object.__hash__  # Enum's own is Python: it would cost something with every frame


class Peer(NamedTuple):
    """Who is at the other end."""

    instance: bytes
    name: str
    attached: str
    """The name of the peer it had its last session with; empty if none."""
    version: int
    features: int = 0
    """What it can do: RAW_BODIES, PLAIN_PAYLOADS."""

    @property
    def takes_raw(self) -> int:
        """Which requests it takes whose bodies are bytes: RAW_BODIES (calls), RAW_CASTS."""
        return self.features & RAW_REQUESTS


class Opened(NamedTuple):
    """The peer is there. When not `resumed`, nothing sent before will arrive any more."""

    peer: Peer
    resumed: bool


class Received(Value):
    """A whole message, exactly once and in its stream's order."""

    __slots__ = ("message", "stream")
    __match_args__: Final = ("stream", "message")

    def __init__(self, stream: int, message: bytes) -> None:
        self.stream = stream
        self.message = message

    def fields(self) -> tuple[int, bytes]:
        return self.stream, self.message


class Lost(NamedTuple):
    """Frames from `first` up to `until` did not arrive. They have been asked for again."""

    first: int
    until: int


class Violation(NamedTuple):
    """The peer broke the protocol. It is greeted anew."""

    reason: str


class Refused(NamedTuple):
    """The ends cannot talk to each other, and why."""

    reason: str
    by_peer: bool


class Silent(NamedTuple):
    """A peer that was asked has said nothing for `for_s` seconds. It may be paused."""

    for_s: float


class Heard(NamedTuple):
    """A peer that was Silent has spoken."""


Event = Opened | Received | Lost | Violation | Refused | Silent | Heard


class Config(NamedTuple):
    """What a session is told about itself. Sizes in bytes."""

    role: Role
    instance: bytes
    name: str = ""
    version_min: int = VERSION
    version_max: int = VERSION
    message_bytes_max: int = MESSAGE_BYTES_MAX
    reassembly_bytes_max: int = REASSEMBLY_BYTES_MAX
    window_bytes: int = WINDOW_BYTES
    in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX
    ping_idle_s: float = PING_IDLE_S
    silence_s: float = SILENCE_S
    frame_bytes_max: int = FRAME_BYTES_MAX
    features: int = 0
    """RAW_BODIES, PLAIN_PAYLOADS."""
    ack_delay_s: float = ACK_DELAY_S
    ask_tick_s: float = 0.0
    """An idle peer is asked at a whole multiple of this, ahead of its time; 0: at its time."""


COUNTED: Final = (
    "bad_payloads",
    "bytes_skipped",
    "duplicates",
    "frames_lost",
    "frames_received",
    "frames_resent",
    "frames_sent",
    "greetings",
    "losses",
    "messages_received",
    "messages_sent",
    "pings_sent",
    "resumptions",
    "sessions",
    "violations",
)
"""The names of a session's counters."""


class Counters:
    """What happened, since the session object was made."""

    __slots__ = COUNTED

    def __init__(self) -> None:
        self.sessions = 0  # begun at zero
        self.resumptions = 0  # went on from the exact point
        self.greetings = 0  # handshakes the peer began
        self.frames_sent = 0
        self.frames_received = 0
        self.frames_resent = 0
        self.duplicates = 0  # frames that came twice and were dropped
        self.losses = 0  # holes found
        self.frames_lost = 0  # frames in them
        self.violations = 0
        self.messages_sent = 0
        self.messages_received = 0
        self.pings_sent = 0
        self.bytes_skipped = 0  # that belonged to no valid frame
        self.bad_payloads = 0  # frames whose header was whole and whose payload was not

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return {name: getattr(self, name) for name in COUNTED}


class AnySession(Protocol):
    """One end of a conversation, as its link and its owner use it."""

    config: Config
    counters: Counters
    state: State
    peer: Peer | None

    def open(self, now_s: float) -> None:
        """Bind to a stream that was just opened."""

    def close(self) -> None:
        """The stream is gone. Messages go on being accepted, for the next one."""

    def abandon(self) -> None:
        """Closed: forget what waits for the next stream, and whatever else went before. Both ends
        are told so by a new session; a pipe has none, and forgets nothing."""

    def send(self, message: bytes, stream: int = CONTROL) -> None:
        """Queue a message.

        Raises:
            LimitExceeded: It is too large, or does not go this way. Nothing was queued.
        """

    def data_to_send(self, limit: int | None = None, frames_max: int = WRITE_FRAMES_MAX) -> bytes:
        """The next bytes for the stream: whole frames, at most `limit` bytes."""

    def receive_data(self, data: bytes, now_s: float) -> list[Event]:
        """Take bytes from the stream, in any chunks; return what they amount to."""

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`, on `now_s`'s clock; None: not needed."""

    def handle_timeout(self, now_s: float) -> list[Event]:
        """Do what is due. Calling it early or late is harmless."""

    @property
    def backlog_bytes(self) -> int:
        """Bytes of messages that have not gone out for the first time."""

    @property
    def unacknowledged(self) -> int:
        """Frames that went out and may not have arrived."""

    @property
    def wanted_bytes(self) -> int:
        """So many complete what has begun to arrive: one frame at most."""


def printable(text: str, besides: str = "") -> str:
    """A peer's text, fit for a log line or a terminal: without what could end the one, or steer the
    other.

    Args:
        besides: What may stand in it all the same.
    """
    return "".join(c if c.isprintable() or c in besides else "?" for c in text)
