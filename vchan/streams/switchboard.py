"""A host's daemon between the programs at its socket and its guest: what passes, and to whom.

Rules of this file
1. No I/O, no clock. Messages go out one at a time to who has room for the next; facts go out by
   `take_events`.
2. It remembers no bytes of a stream but those on their way through, and may drop these: the ends
   ask, and send again. So it loses nothing when it dies, and another host's daemon can go on.
3. An Open passes if the judge lets it, every time; whatever else passes belongs to a stream whose
   Open has passed here, and comes from who opened it.
4. Nothing that a program or the guest sends raises, or grows without a limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from vchan.errors import LimitExceeded
from vchan.streams.messages import (
    ASK,
    CLOSED,
    DONE,
    END,
    FORGOTTEN,
    NO_TAG,
    REFUSED,
    VERSION,
    Malformed,
    Open,
    Part,
    Progress,
    Reset,
    StreamOffer,
    decode,
    encode,
)
from vchan.wire import layout

PROGRAMS_MAX: Final = 32
"""Programs at a host's socket that have streams into one VM. At it: LimitExceeded."""
ROUTES_MAX: Final = 64
"""Streams of one VM that a daemon knows: twice what its guest takes. At it: one that is over is
forgotten, or else the one that was quiet the longest, until its opener asks."""
WAY_BYTES_MAX: Final = 128 * 1024
"""Messages on their way from or to one program: more than an end has in flight. At it: dropped and
counted; the ends send them again."""

Judge = Callable[[int, Open], Open | str]
"""What may pass: the Open, with the facts that are the host's word, or the reason why not."""


class Began(NamedTuple):
    """A stream of a program passes here from now on. The facts are the program's word."""

    id: bytes
    number: int
    target: str
    facts: str


class Over(NamedTuple):
    """A stream has ended, or its program has gone from here.

    Attributes:
        reason: Of the Reset; 0: both halves are done; None: the program is gone, and may go on with
            it elsewhere.
        down, up: Bytes of it that have passed here, into the guest and out of it.
        facts: As of `Began`.
    """

    id: bytes
    number: int
    target: str
    reason: int | None
    text: str
    down: int
    up: int
    facts: str


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


class _Flow:
    """One direction of a stream, as far as it has passed here. It counts what came in order, and so
    no more than what there was, whatever offsets a guest makes up."""

    __slots__ = ("bytes", "end", "is_done", "next")

    def __init__(self) -> None:
        self.next: int | None = None
        self.bytes = 0
        self.end: int | None = None
        self.is_done = False  # the other end has the END

    def part(self, part: Part) -> None:
        if self.next is None:
            self.next = part.offset  # a daemon before this one may have had what is before
        stop = part.offset + len(part.data)
        if part.offset <= self.next < stop:
            self.bytes += stop - self.next
            self.next = stop
        if part.flags & END:
            self.end = stop

    def received(self, received: int) -> None:
        self.is_done |= self.end is not None and received > self.end


class _Route:
    """A stream that passes here."""

    __slots__ = ("down", "is_done", "is_over", "number", "opened", "tag", "up")

    def __init__(self, number: int, opened: Open) -> None:
        self.number = number
        self.opened = opened
        self.tag = opened.tag
        self.down = _Flow()
        self.up = _Flow()
        self.is_over = False  # as was told; late messages of it pass all the same
        self.is_done = False  # by its program's word: then no bytes do, for they are counted


class Switchboard:
    """Byte streams of one VM, as its host's daemon passes them on.

    Args:
        judge: Is asked about each Open, with the program's number.
    """

    def __init__(self, judge: Judge) -> None:
        self.dropped = 0
        self._judge = judge
        self._programs: dict[int, _Program] = {}  # whose turn it is stands first
        self._routes: dict[bytes, _Route] = {}  # who was quiet the longest stands first
        self._guest_offer_due = False
        self._guest_offers = False
        self._events: list[Began | Over] = []
        self._news: set[int] = set()
        self._last_words = _Way()  # of programs that are gone

    # ---------------------------------------------------------------- who is there

    def guest_connected(self, *, takes_streams: bool = True) -> None:
        """A new session with the guest: what was on its way there is dropped, and it is asked for
        each stream that passes here. One that was restarted does not know it, and says so at once:
        a program that waits for nothing would find out by its own question, in a minute.

        Args:
            takes_streams: It says so in its greeting; otherwise it is never sent a message of the
                family.
        """
        self._guest_offer_due = takes_streams
        self._guest_offers = False
        self._last_words.clear()
        for program in self._programs.values():
            program.down.clear()
        for stream, route in self._routes.items():
            if takes_streams and not route.is_over and route.tag != NO_TAG:
                question = Progress(ASK, stream, route.tag, 0, 0)  # old numbers say nothing
                self._put(self._programs[route.number].down, encode(question))

    def attach(self, number: int) -> None:
        """A new session with a program.

        Raises:
            LimitExceeded: PROGRAMS_MAX are attached. Nothing has changed.
        """
        count = len(self._programs.keys() | {number})
        if count > PROGRAMS_MAX:
            raise LimitExceeded("programs with streams", count, PROGRAMS_MAX, "PROGRAMS_MAX")
        self._programs[number] = _Program()
        self._news.add(number)

    def detach(self, number: int, *, ended: str = "") -> None:
        """A program is gone, perhaps to another host. Its streams are not over by that: but those
        that it has ended in going are, and what it had received the guest is told.

        Args:
            ended: It has ended, in these words, and its streams with it: the guest is told.
        """
        program = self._programs.pop(number, None)
        while program is not None and (message := program.down.take()) is not None:
            if message[0] in (layout.BYTE_STREAM_RESET, layout.BYTE_STREAM_PROGRESS):
                self._last_words.put(message)
        for stream in [each for each, route in self._routes.items() if route.number == number]:
            route = self._routes.pop(stream)
            if ended and not route.is_over:
                self._last_words.put(encode(Reset(CLOSED, stream, ended)))
            self._over(route, CLOSED if ended else None, ended)

    def reset_all(self, reason: int, text: str) -> None:
        """Tell programs that their streams are over: the guest is no more."""
        for stream, route in list(self._routes.items()):
            self._reset(stream, route, reason, text)

    def judge_again(self) -> None:
        """The judge may think otherwise now: streams that may not go on are reset at both ends."""
        for stream, route in list(self._routes.items()):
            judged = None if route.is_over else self._judge(route.number, route.opened)
            if isinstance(judged, str):
                self._put(self._programs[route.number].down, encode(Reset(REFUSED, stream, judged)))
                self._reset(stream, route, REFUSED, judged)

    def _reset(self, stream: bytes, route: _Route, reason: int, text: str) -> None:
        """Tell the program, if it is not over yet."""
        if not route.is_over:
            self._put_up(route.number, encode(Reset(reason, stream, text)))
        self._over(route, reason, text)
        del self._routes[stream]

    def take_events(self) -> list[Began | Over]:
        """What has happened since this was called last."""
        events, self._events = self._events, []
        return events

    def take_news(self) -> set[int]:
        """The programs for which there is something new since this was called last."""
        news, self._news = self._news, set()
        return news

    @property
    def open_streams(self) -> int:
        """Streams that pass here and are not over."""
        return sum(not route.is_over for route in self._routes.values())

    def _over(self, route: _Route, reason: int | None, text: str) -> None:
        if not route.is_over:
            route.is_over = True
            counts = route.down.bytes, route.up.bytes
            opened = route.opened
            ended = (reason, text, *counts, opened.facts)
            self._events.append(Over(opened.id, route.number, opened.target, *ended))

    # ---------------------------------------------------------------- what passes

    def from_program(self, number: int, data: bytes) -> None:
        """Take a message of a program that is attached."""
        program = self._programs[number]
        message = decode(data)
        if isinstance(message, Open):
            self._open(number, program, message)
        elif not isinstance(message, StreamOffer | Malformed):
            route = self._route(message.id, number)
            if route is None or (route.is_done and isinstance(message, Part)):
                self.dropped += 1
            elif self._put(program.down, data):
                self._note(route, message, route.down, route.up)
                if isinstance(message, Progress) and message.flags & DONE:
                    route.is_done = True
                    self._over(route, 0, "")

    def _open(self, number: int, program: _Program, message: Open) -> None:
        judged = self._judge(number, message)
        if isinstance(judged, str):
            refusal = encode(Reset(REFUSED, message.id, judged))
            self._put_up(number, refusal)
            route = self._route(message.id, number)
            if route is not None:  # it was allowed before
                del self._routes[message.id]
                self._over(route, REFUSED, judged)
                self._put(program.down, refusal)
            return
        route = self._routes.get(message.id)
        if route is None:
            route = self._begin(number, message)
        elif self._route(message.id, number) is None:
            self.dropped += 1  # another program's
            return
        if message.tag != NO_TAG:
            route.tag = message.tag
        if self._put(program.down, encode(judged)):
            route.up.received(message.received)

    def _begin(self, number: int, opened: Open) -> _Route:
        route = self._routes[opened.id] = _Route(number, opened)
        self._events.append(Began(opened.id, number, opened.target, opened.facts))
        if len(self._routes) > ROUTES_MAX:
            quiet = next(iter(self._routes))
            gone = next((i for i, each in self._routes.items() if each.is_over), quiet)
            text = f"{ROUTES_MAX} streams pass here (ROUTES_MAX)"
            self._over(self._routes.pop(gone), FORGOTTEN, text)
        return route

    def from_guest(self, data: bytes) -> str | None:
        """Take a message of the guest. What it has done wrong, if it has."""
        message = decode(data)
        if isinstance(message, Malformed):
            return message.reason
        if isinstance(message, StreamOffer):
            self._guest_offers |= message.version_min <= VERSION <= message.version_max
            self._news |= self._programs.keys()
        elif isinstance(message, Open):
            return "Open: no streams are taken out of a guest"
        else:
            self._to_program(message, data)
        return None

    def _to_program(self, message: Progress | Part | Reset, data: bytes) -> None:
        route = self._routes.get(message.id)
        if route is None or (route.is_done and isinstance(message, Part)):
            self.dropped += 1  # its opener has not been heard here yet, and asks; or is done
            return
        self._route(message.id, route.number)
        if self._put_up(route.number, data):
            self._note(route, message, route.up, route.down)

    def _note(
        self, route: _Route, message: Progress | Part | Reset, flow: _Flow, other: _Flow
    ) -> None:
        """What a message that has passed says of its stream.

        Args:
            flow: In the message's direction.
        """
        match message:
            case Part():
                route.tag = message.tag
                flow.part(message)
            case Progress():
                route.tag = message.tag
                other.received(message.received)
                if flow.is_done and other.is_done:
                    self._over(route, 0, "")
            case Reset(reason, _, text):
                self._over(route, reason or CLOSED, text)

    def _route(self, stream: bytes, number: int) -> _Route | None:
        """The stream, if it is this program's; it is not quiet, then."""
        route = self._routes.get(stream)
        if route is None or route.number != number:
            return None
        self._routes[stream] = self._routes.pop(stream)
        return route

    def _put_up(self, number: int, message: bytes) -> bool:
        self._news.add(number)
        return self._put(self._programs[number].up, message)

    def _put(self, way: _Way, message: bytes) -> bool:
        has_room = way.put(message)
        self.dropped += not has_room
        return has_room

    # ---------------------------------------------------------------- what goes out

    def next_for_guest(self) -> bytes | None:
        """The next message for the guest; programs take turns. Without a program there is nothing
        to say, and a guest need not even load what answers it."""
        if self._guest_offer_due and self._programs:
            self._guest_offer_due = False
            return encode(StreamOffer(VERSION, VERSION))
        if not self._guest_offers or self._guest_offer_due:
            return None
        if (message := self._last_words.take()) is not None:
            return message
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
