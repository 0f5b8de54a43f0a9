"""Byte streams beside the requests: bytes in order, each once, as long as both ends live.

messages    what the two ends say to each other
halves      what one end keeps: the bytes that go out, the bytes that came in
ends        all streams of one end: opens, accepts, asks, repeats, resets
switchboard a host's daemon between the two: who may open what; it remembers no bytes
carrier     what puts their messages on a session, no more at a time than it can send soon

A byte stream's ends are the two programs that hold its memory. Whatever lies between (sessions,
daemons, hosts) may lose what is under way: the ends notice, and say it again.
docs/protocol.md, section 14, has the protocol; `vchan.splices` joins streams with sockets.
"""

from vchan.streams.ends import (
    Accepted,
    Ended,
    Fault,
    Readable,
    StreamEnds,
    StreamEvent,
    StreamWanted,
    Writable,
)

__all__ = [
    "Accepted",
    "Ended",
    "Fault",
    "Readable",
    "StreamEnds",
    "StreamEvent",
    "StreamWanted",
    "Writable",
]
