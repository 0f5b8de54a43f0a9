"""A host's daemon between the programs at its socket and its guest: what passes, and to whom.

Rules of this file
1. No I/O, no clock. Messages go out one at a time to who has room for the next.
2. It remembers no bytes of a stream but those on their way through, and may drop these: the ends
   ask, and send again. So it loses nothing when it dies, and another host's daemon can go on.
3. An Open passes if the judge lets it, every time; whatever else passes belongs to a stream whose
   Open has passed here, and comes from who opened it.
4. Nothing that a program or the guest sends raises, or grows without a limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from vchan.errors import LimitExceeded
from vchan.streams.messages import (
    REFUSED,
    VERSION,
    Malformed,
    Open,
    Reset,
    StreamMessage,
    StreamOffer,
    decode,
    encode,
)

PROGRAMS_MAX: Final = 32
"""Programs at a host's socket that have streams into one VM. At it: LimitExceeded."""
ROUTES_MAX: Final = 64
"""Streams of one VM that a daemon knows: twice what its guest takes. At it: the one that was quiet
the longest is forgotten until its opener asks."""
WAY_BYTES_MAX: Final = 128 * 1024
"""Messages on their way from or to one program: more than an end has in flight. At it: dropped and
counted; the ends send them again."""

Judge = Callable[[int, Open], Open | str]
"""What may pass: the Open, with the facts that are the host's word, or the reason why not."""


class _Way:
    """Messages on their way."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._bytes = 0

    def put(self, message: bytes) -> bool:
        """Whether there was room."""
        if self._bytes + len(message) > WAY_BYTES_MAX:
            return False
        self._messages.append(message)
        self._bytes += len(message)
        return True

    def take(self) -> bytes | None:
        if not self._messages:
            return None
        message = self._messages.popleft()
        self._bytes -= len(message)
        return message

    def clear(self) -> None:
        self._messages.clear()
        self._bytes = 0


class _Program:
    def __init__(self) -> None:
        self.down = _Way()
        self.up = _Way()
        self.is_offered = False  # the daemon's word that its guest takes byte streams


class Switchboard:
    """Byte streams of one VM, as its host's daemon passes them on.

    Args:
        judge: Is asked about each Open, with the program's number.
    """

    def __init__(self, judge: Judge) -> None:
        self.dropped = 0
        self._judge = judge
        self._programs: dict[int, _Program] = {}  # whose turn it is stands first
        self._routes: dict[bytes, int] = {}  # who was quiet the longest stands first
        self._guest_offer_due = False
        self._guest_offers = False

    # ---------------------------------------------------------------- who is there

    def guest_connected(self) -> None:
        """A new session with the guest: what was on its way there is dropped."""
        self._guest_offer_due = True
        self._guest_offers = False
        for program in self._programs.values():
            program.down.clear()

    def attach(self, number: int) -> None:
        """A new session with a program.

        Raises:
            LimitExceeded: PROGRAMS_MAX are attached. Nothing has changed.
        """
        count = len(self._programs.keys() | {number})
        if count > PROGRAMS_MAX:
            raise LimitExceeded("programs with streams", count, PROGRAMS_MAX, "PROGRAMS_MAX")
        self._programs[number] = _Program()

    def detach(self, number: int) -> None:
        """A program is gone, perhaps to another host. Its streams are not over by that."""
        self._programs.pop(number, None)
        for stream in [each for each, owner in self._routes.items() if owner == number]:
            del self._routes[stream]

    # ---------------------------------------------------------------- what passes

    def from_program(self, number: int, data: bytes) -> None:
        """Take a message of a program that is attached."""
        program = self._programs[number]
        message = decode(data)
        if isinstance(message, Open):
            self._open(number, program, message)
        elif not isinstance(message, StreamOffer | Malformed):
            if self._is_routed(message.id, number):
                self._put(program.down, data)
            else:
                self.dropped += 1

    def _open(self, number: int, program: _Program, message: Open) -> None:
        judged = self._judge(number, message)
        if isinstance(judged, str):
            refusal = encode(Reset(REFUSED, message.id, judged))
            self._put(program.up, refusal)
            if self._is_routed(message.id, number):  # it was allowed before
                del self._routes[message.id]
                self._put(program.down, refusal)
            return
        if self._routes.setdefault(message.id, number) != number:
            self.dropped += 1  # another program's
            return
        assert self._is_routed(message.id, number)
        if len(self._routes) > ROUTES_MAX:
            del self._routes[next(iter(self._routes))]
        self._put(program.down, encode(judged))

    def from_guest(self, data: bytes) -> str | None:
        """Take a message of the guest. What it has done wrong, if it has."""
        message = decode(data)
        if isinstance(message, Malformed):
            return message.reason
        if isinstance(message, StreamOffer):
            self._guest_offers |= message.version_min <= VERSION <= message.version_max
        elif isinstance(message, Open):
            return "Open: no streams are taken out of a guest"
        else:
            self._to_program(message, data)
        return None

    def _to_program(self, message: StreamMessage, data: bytes) -> None:
        assert not isinstance(message, StreamOffer)
        number = self._routes.get(message.id)
        if number is None:
            self.dropped += 1  # its opener has not been heard here yet: it asks
            return
        self._is_routed(message.id, number)
        self._put(self._programs[number].up, data)

    def _is_routed(self, stream: bytes, number: int) -> bool:
        """Whether the stream is this program's; it is not quiet, then."""
        if self._routes.get(stream) != number:
            return False
        self._routes[stream] = self._routes.pop(stream)
        return True

    def _put(self, way: _Way, message: bytes) -> None:
        if not way.put(message):
            self.dropped += 1

    # ---------------------------------------------------------------- what goes out

    def next_for_guest(self) -> bytes | None:
        """The next message for the guest; programs take turns."""
        if self._guest_offer_due:
            self._guest_offer_due = False
            return encode(StreamOffer(VERSION, VERSION))
        if not self._guest_offers:
            return None
        for number, program in self._programs.items():
            if (message := program.down.take()) is not None:
                self._programs[number] = self._programs.pop(number)
                return message
        return None

    def next_for_program(self, number: int) -> bytes | None:
        """The next message for a program: the Offer first, when the guest has said its own."""
        program = self._programs[number]
        if not program.is_offered:
            if not self._guest_offers:
                return None
            program.is_offered = True
            return encode(StreamOffer(VERSION, VERSION))
        return program.up.take()
