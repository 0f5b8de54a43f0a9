"""One end's byte streams against a peer that keeps to no rule: the fuzzer's bytes are what the peer
says and what programs do."""

from __future__ import annotations

import random

from tests.fuzz.script import Script
from vchan.errors import LimitExceeded
from vchan.streams import Ended, StreamEnds, StreamWanted
from vchan.streams.ends import DOUBTS_MAX, ENDED_MAX, IN_FLIGHT_BYTES_MAX, REPLIES_MAX, STREAMS_MAX
from vchan.streams.halves import SEND_BYTES_MAX, WINDOW_BYTES
from vchan.streams.messages import (
    CHUNK_BYTES_MAX,
    NO_TAG,
    Malformed,
    Open,
    Part,
    Progress,
    Reset,
    StreamMessage,
    StreamOffer,
    decode,
    encode,
)

STEPS_MAX = 200
_HERE = 16
"""Numbers below this name streams that the peer opens; the others, streams opened here."""


def message(data: bytes) -> None:
    """A message that decodes says the same when it is encoded again."""
    read = decode(data)
    if not isinstance(read, Malformed):
        again = decode(encode(read))
        assert again == read or "\ufffd" in str(read)  # a text that was no UTF-8 is made one


def run(data: bytes) -> None:
    """Nothing raises, and nothing grows above its limit, whatever is said and done."""
    script = Script(data)
    world = _World(script)
    for _ in range(STEPS_MAX):
        if script.at_end:
            break
        world.step()
        world.check()


class _World:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.now_s = 0.0
        self.ends = StreamEnds(random.Random(0).randbytes)
        self.ends.connected(0.0)
        self.opened: list[bytes] = []
        self.ended: set[bytes] = set()

    def stream(self) -> bytes:
        number = self.script.number()
        if number >= _HERE and self.opened:
            return self.opened[number % len(self.opened)]
        return bytes([number % 48]) * 16

    def tag(self, stream: bytes) -> bytes:
        """Mostly the right one."""
        known = self.ends._streams.get(stream)
        match self.script.number() % 8:
            case 0:
                return NO_TAG
            case 7:
                return b"another!"
            case _:
                return b"the peer" if known is None or known.tag == NO_TAG else known.tag

    def offset(self) -> int:
        number = self.script.number(2)
        return 2**61 + number if number == 0xFFFE else number * 3

    def step(self) -> None:
        what = self.script.number() % 14
        if what < 5:
            self.say(what)
        else:
            self.do(what)
        for told in self.ends.take_events():
            match told:
                case StreamWanted(stream):
                    if self.script.number() % 4:
                        self.ends.accept(stream)
                case Ended(stream):
                    if stream in self.opened:
                        assert stream not in self.ended, "a stream ends once"
                        self.ended.add(stream)
                case _:
                    pass

    def say(self, what: int) -> None:
        said: StreamMessage
        if what == 0:
            said = StreamOffer(1, 1)
        elif what == 1:
            stream = self.stream()
            said = Open(stream, self.tag(stream) if self.script.number() % 4 else NO_TAG,
                        0 if self.script.number() % 4 else 9, self.offset(), "t", "")  # fmt: skip
        elif what == 2:
            stream = self.stream()
            said = Progress(self.script.number() % 8, stream, self.tag(stream), self.offset(),
                         self.offset())  # fmt: skip
        elif what == 3:
            stream = self.stream()
            tag, flags, offset = self.tag(stream), self.script.number() % 2, self.offset()
            said = Part(flags, stream, tag, offset, self.script.block()[:CHUNK_BYTES_MAX])
        else:
            said = Reset(self.script.number(), self.stream(), "text")
        self.ends.receive(encode(said), self.now_s)

    def do(self, what: int) -> None:
        match what:
            case 5:
                try:
                    self.opened.append(self.ends.open("target", "{}", self.now_s))
                except LimitExceeded:
                    assert len(self.ends._streams) >= STREAMS_MAX
            case 6:
                for _ in range(200):
                    if (said := self.ends.next_message(self.now_s)) is None:
                        break
                    assert not isinstance(decode(said), Malformed)
                else:
                    raise AssertionError("an end that never stops")
            case 7:
                self.ends.connected(self.now_s)
            case 8:
                self.ends.read(self.stream(), self.script.number() * 300)
            case 9:
                self.ends.write(self.stream(), bytes(self.script.number(2)))
            case 10:
                self.ends.finish(self.stream())
            case 11:
                self.ends.reset(self.stream())
            case 12:
                self.now_s += self.script.number()
                self.ends.handle_timeout(self.now_s)
            case _:
                self.ends.receive(self.script.block() or b"?", self.now_s)

    def check(self) -> None:
        ends = self.ends
        assert len(ends._streams) <= 2 * STREAMS_MAX
        assert len(ends._doubts) <= DOUBTS_MAX
        assert len(ends._ended) <= ENDED_MAX and len(ends._replies) <= REPLIES_MAX
        assert ends.in_flight <= IN_FLIGHT_BYTES_MAX + 2 * STREAMS_MAX  # an END counts as one
        for stream in ends._streams.values():
            out = stream.outgoing
            assert out.acknowledged <= out.sent <= out.sent_max <= out.written + 1
            assert len(out._kept) <= SEND_BYTES_MAX and stream.incoming.held <= WINDOW_BYTES
        at_s = ends.next_timeout()
        assert at_s is None or at_s == at_s
