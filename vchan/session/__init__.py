"""The session: a numbered, acknowledged conversation over a stream that loses bytes.

session     the two-way session: puts the four parts together, and reacts to frames
handshake   who the ends are, which key is in force, and whether a session goes on
sender      messages cut into numbered frames, kept until the peer has them
receiver    frames put together to messages; credit; holes
liveness    when to ask whether the peer is there
oneway      the session's place taken on a pipe, where nothing comes back
contract    what all sessions share: methods, events, configuration, limits
"""

from vchan.session.contract import (
    ASK_TICK_S,
    BACKLOG_BYTES_MAX,
    CHANNEL_ACK_DELAY_S,
    CONTROL,
    IN_FLIGHT_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    MESSAGE_BYTES_MIN,
    PING_IDLE_S,
    REASSEMBLY_BYTES_MAX,
    SILENCE_S,
    STREAMS,
    VERSION,
    WINDOW_BYTES,
    WRITE_BYTES_MAX,
    WRITE_FRAMES_MAX,
    AnySession,
    Config,
    Counters,
    Event,
    Heard,
    Lost,
    Opened,
    Peer,
    Received,
    Refused,
    Role,
    Silent,
    State,
    Violation,
    printable,
)
from vchan.session.session import Session

__all__ = [
    "ASK_TICK_S",
    "BACKLOG_BYTES_MAX",
    "CHANNEL_ACK_DELAY_S",
    "CONTROL",
    "IN_FLIGHT_BYTES_MAX",
    "MESSAGE_BYTES_MAX",
    "MESSAGE_BYTES_MIN",
    "PING_IDLE_S",
    "REASSEMBLY_BYTES_MAX",
    "SILENCE_S",
    "STREAMS",
    "VERSION",
    "WINDOW_BYTES",
    "WRITE_BYTES_MAX",
    "WRITE_FRAMES_MAX",
    "AnySession",
    "Config",
    "Counters",
    "Event",
    "Heard",
    "Lost",
    "Opened",
    "Peer",
    "Received",
    "Refused",
    "Role",
    "Session",
    "Silent",
    "State",
    "Violation",
    "printable",
]
