"""Byte streams: the codec against its definition, the two halves, and two ends by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan import protocol
from vchan.errors import LimitExceeded
from vchan.rpc import messages as rpc
from vchan.session import CONTROL, STREAMS
from vchan.streams import Accepted, Ended, Fault, Readable, StreamEnds, StreamWanted, Writable
from vchan.streams.ends import (
    ASK_S_MAX,
    ASKS_MAX,
    ENDED_MAX,
    GIVE_WAY_S,
    HELD_UP_S,
    IDLE_S,
    IN_FLIGHT_BYTES_MAX,
    OFFER_S,
    PROBE_S,
    REPLIES_MAX,
    REST_S_MAX,
    REST_TIMES,
    REWIND_S,
    STREAMS_MAX,
    UNDER_WAY_BYTES_MAX,
    UNHEARD_ASKS,
)
from vchan.streams.halves import SEND_BYTES_MAX, WINDOW_BYTES, Fit, InHalf, OutHalf
from vchan.streams.messages import (
    ANSWER,
    ASK,
    BUSY,
    CHUNK_BYTES_MAX,
    CLOSED,
    END,
    FACTS_BYTES_MAX,
    FORGOTTEN,
    NO_TAG,
    OFFSET_MAX,
    REFUSED,
    REWIND,
    SILENT,
    TARGET_BYTES_MAX,
    TEXT_BYTES_MAX,
    UNSUPPORTED,
    VERSION,
    VIOLATED,
    Malformed,
    Open,
    Part,
    Progress,
    Reset,
    StreamMessage,
    StreamOffer,
    decode,
    encode,
    is_of_family,
    session_stream,
)
from vchan.streams.switchboard import WAY_BYTES_MAX
from vchan.wire.frames import PAYLOAD_BYTES_MAX

ID = bytes(range(16))
TAG = b"the tag!"

ids = st.binary(min_size=16, max_size=16)
tags = st.binary(min_size=8, max_size=8).filter(lambda tag: tag != NO_TAG)
offsets = st.integers(0, 2**62)
messages: st.SearchStrategy[StreamMessage] = st.one_of(
    st.builds(StreamOffer, st.integers(0, 255), st.integers(0, 255)),
    st.builds(
        Open, ids, tags, offsets, offsets, st.text(min_size=1, max_size=200), st.text(max_size=200)
    ),
    st.builds(Progress, st.integers(0, 15), ids, tags, offsets, offsets),
    st.builds(Part, st.integers(0, 1), ids, tags, offsets, st.binary(min_size=1, max_size=50)),
    st.builds(Reset, st.integers(1, 9), ids, st.text(max_size=100)),
)


# ---------------------------------------------------------------- the codec


@given(messages)
def test_what_is_encoded_is_decoded_and_is_as_defined(message: StreamMessage) -> None:
    data = encode(message)
    assert is_of_family(data)
    assert decode(data) == message
    assert defined(data) == message


def defined(data: bytes) -> StreamMessage:
    """By the construct definition."""
    parsed = protocol.parse_message(data)
    head = parsed.head
    match data[0]:
        case 32:
            return StreamOffer(head.version_min, head.version_max)
        case 33:
            texts = bytes(parsed.target).decode(), bytes(parsed.facts).decode()
            return Open(head.id, head.tag, head.received, head.credit, *texts)
        case 34:
            return Progress(data[1], head.id, head.tag, head.received, head.credit)
        case 35:
            return Part(data[1], head.id, head.tag, head.offset, bytes(parsed.data))
        case _:
            return Reset(int(head.reason), head.id, bytes(parsed.text).decode())


@given(messages, st.data())
def test_damaged_messages_do_not_raise(message: StreamMessage, draw: st.DataObject) -> None:
    hurt = bytearray(encode(message))
    at = draw.draw(st.integers(0, len(hurt) - 1))
    hurt[at] = draw.draw(st.integers(0, 255))
    read = decode(bytes(hurt[: draw.draw(st.integers(0, len(hurt)))]))
    if isinstance(read, Malformed):
        assert read.reason


OPENING = Open(ID, NO_TAG, 0, 0, "t", "")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no message"),
        (b"\x01" + bytes(40), "no message"),
        (encode(Progress(0, ID, TAG, 0, 0))[:-1], "no message"),
        (encode(Progress(0, ID, NO_TAG, 0, 0)), "without a tag"),
        (encode(Progress(0, ID, TAG, OFFSET_MAX + 1, 0)), "OFFSET_MAX"),
        (encode(Part(0, ID, TAG, 0, b"")), "none and no END"),
        (encode(Part(END, ID, NO_TAG, 0, b"x")), "without a tag"),
        (encode(Part(0, ID, TAG, OFFSET_MAX, b"x")), "OFFSET_MAX"),
        (encode(Part(0, ID, TAG, 0, b"x" * CHUNK_BYTES_MAX)) + b"x", "CHUNK_BYTES_MAX"),
        (encode(OPENING._replace(credit=OFFSET_MAX + 1)), "OFFSET_MAX"),
        (encode(OPENING._replace(target="")), "without a target"),
        (encode(OPENING) + b"x", "not as long"),
        (encode(OPENING)[:-1] + b"\xff", "not UTF-8"),
    ],
)
def test_what_is_no_message_says_why(data: bytes, why: str) -> None:
    read = decode(data)
    assert isinstance(read, Malformed)
    assert why in read.reason


def test_the_largest_message_fits_one_frame() -> None:
    assert len(encode(Part(0, ID, TAG, 0, b"x" * CHUNK_BYTES_MAX))) == PAYLOAD_BYTES_MAX


def test_a_long_text_is_cut() -> None:
    read = decode(encode(Reset(BUSY, ID, "\u00e9" * TEXT_BYTES_MAX)))
    assert isinstance(read, Reset)
    assert len(read.text.encode()) == TEXT_BYTES_MAX


@given(messages)
def test_a_peer_that_knows_requests_alone_passes_them_over(message: StreamMessage) -> None:
    assert isinstance(rpc.decode(encode(message)), rpc.Unknown)


# ---------------------------------------------------------------- the halves


def test_an_outgoing_half_sends_within_its_credit_and_its_end_last() -> None:
    half = OutHalf()
    assert half.write(b"abcdef") == 6
    assert half.take(10) is None
    assert half.acknowledge(0, 4)
    assert half.take(3) == (0, b"abc", False)
    assert half.take(3) == (3, b"d", False)
    half.finish()
    half.finish()
    assert half.write(b"g") == half.room == 0
    assert half.acknowledge(2, 3)  # credit never goes down
    assert half.credit == 4
    half.rewind()
    assert half.take(9) == (2, b"cd", False)
    assert half.acknowledge(2, 6)
    assert half.take(9) == (4, b"ef", True)
    assert half.take(9) is None
    for received, is_done in ((6, False), (7, True)):
        assert half.acknowledge(received, 6)
        assert (half.is_done, half.is_idle) == (is_done, is_done)
    assert not half.acknowledge(8, 6)


def test_an_acknowledgement_of_what_was_sent_before_a_rewind_counts() -> None:
    half = OutHalf()
    half.write(b"abcd")
    half.acknowledge(0, 4)
    half.take(4)
    half.rewind()
    assert half.acknowledge(3, 4)
    assert half.take(9) == (3, b"d", False)


def test_an_outgoing_half_keeps_no_more_than_its_limit() -> None:
    half = OutHalf()
    assert half.write(b"x" * (SEND_BYTES_MAX + 1)) == SEND_BYTES_MAX


@pytest.mark.parametrize(
    ("offset", "data", "is_end", "arrival"),
    [
        (3, b"d", False, Fit.TAKEN),
        (1, b"bcd", False, Fit.TAKEN),
        (3, b"", True, Fit.TAKEN),
        (0, b"abc", False, Fit.REPEATED),
        (1, b"b", False, Fit.REPEATED),
        (4, b"e", False, Fit.AHEAD),
        (4, b"", True, Fit.AHEAD),
        (0, b"ab", True, Fit.VIOLATION),
        (WINDOW_BYTES, b"x", False, Fit.VIOLATION),
    ],
)
def test_what_bytes_are_to_an_incoming_half(
    offset: int, data: bytes, is_end: bool, arrival: Fit
) -> None:
    half = InHalf()
    half.receive(0, b"abc", False)
    assert half.receive(offset, data, is_end) is arrival
    expected = b"abcd" if arrival is Fit.TAKEN and data else b"abc"
    assert half.read(99) == expected
    assert half.received == len(expected) + (half.end is not None)


def test_nothing_comes_behind_an_end() -> None:
    half = InHalf()
    assert half.receive(0, b"abc", True) is Fit.TAKEN
    assert half.receive(0, b"abc", True) is Fit.REPEATED
    assert half.receive(0, b"ab", False) is Fit.REPEATED
    assert half.receive(0, b"abcd", False) is Fit.VIOLATION
    assert half.receive(3, b"d", True) is Fit.VIOLATION
    assert half.receive(0, b"ab", True) is Fit.VIOLATION


# ---------------------------------------------------------------- two ends


class Two:
    """Two ends, and what is said between them."""

    def __init__(self, *, asks_max: int | None = ASKS_MAX) -> None:
        self.now_s = 0.0
        self.host = StreamEnds(random.Random(1).randbytes, asks_max=asks_max)
        self.guest = StreamEnds(random.Random(2).randbytes, asks_max=asks_max)
        self.connect()

    def connect(self) -> None:
        self.host.connected(self.now_s)
        self.guest.connected(self.now_s)

    def say(self, side: StreamEnds) -> list[bytes]:
        """All that an end has to say now."""
        return list(iter(lambda: side.next_message(self.now_s), None))

    def tell(self, side: StreamEnds, *said: bytes | StreamMessage) -> None:
        for message in said:
            side.receive(message if isinstance(message, bytes) else encode(message), self.now_s)

    def talk(self, lose: Callable[[StreamMessage | Malformed], bool] = lambda _: False) -> None:
        """Until there is nothing to say; what `lose` says is lost."""
        for _ in range(100):
            said = self.say(self.host), self.say(self.guest)
            if said == ([], []):
                return
            self.tell(self.guest, *(each for each in said[0] if not lose(decode(each))))
            self.tell(self.host, *(each for each in said[1] if not lose(decode(each))))
        raise AssertionError("they never stop")

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.host.handle_timeout(self.now_s)
        self.guest.handle_timeout(self.now_s)

    def opened(self) -> bytes:
        """A stream that both ends have."""
        stream = self.host.open("tcp:80", "{}", self.now_s)
        self.talk()
        assert StreamWanted(stream, "tcp:80", "{}") in self.guest.take_events()
        self.guest.accept(stream)
        self.talk()
        assert Accepted(stream) in self.host.take_events()
        return stream


def test_a_stream_both_ways() -> None:
    two = Two()
    stream = two.opened()
    assert two.host.write(stream, b"question") == 8
    two.talk()
    assert two.guest.take_events() == [Readable(stream)]
    assert two.guest.read(stream, 3) == (b"que", False)
    two.host.finish(stream)
    two.talk()
    assert two.guest.read(stream, 99) == (b"stion", True)
    two.guest.write(stream, b"answer")
    two.guest.finish(stream)
    two.talk()
    assert two.host.read(stream, 99) == (b"answer", True)
    two.talk()
    assert two.host.take_events()[-1] == two.guest.take_events()[-1] == Ended(stream, 0, "")
    assert two.host.read(stream, 9) == (b"", False)
    assert two.host.write(stream, b"late") == 0
    two.host.finish(stream)
    two.host.accept(stream)
    two.host.reset(stream)
    assert two.say(two.host) == []
    assert two.host.counters.as_dict()["opened"] == 1


def test_bytes_written_before_it_is_accepted_wait() -> None:
    two = Two()
    stream = two.host.open("tcp:80", "", 0.0)
    two.host.write(stream, b"early")
    two.host.finish(stream)
    empty = two.host.open("tcp:81", "", 0.0)
    two.host.finish(empty)
    two.talk()
    assert two.guest.take_events() == [
        StreamWanted(stream, "tcp:80", ""),
        StreamWanted(empty, "tcp:81", ""),
    ]
    two.guest.accept(stream)
    two.guest.accept(empty)
    two.talk()
    assert two.guest.read(stream, 9) == (b"early", True)
    assert two.guest.read(empty, 9) == (b"", True)


def test_reading_before_it_is_accepted_says_nothing() -> None:
    two = Two()
    two.talk()
    stream = two.host.open("tcp:80", "", 0.0)
    assert two.host.read(stream, 9) == (b"", False)
    two.talk()
    assert two.guest.read(stream, 9) == (b"", False)
    assert two.say(two.guest) == []
    two.guest.accept(stream)
    two.talk()
    assert Accepted(stream) in two.host.take_events()


def test_a_refusal_says_why_also_to_who_asks_again() -> None:
    two = Two()
    stream = two.host.open("tcp:22", "{}", 0.0)
    two.talk()
    two.guest.reset(stream, REFUSED, "no rule allows tcp:22")
    two.talk(lambda message: isinstance(message, Reset))
    assert two.host.take_events() == []
    two.wait(PROBE_S)
    two.talk()
    assert two.host.take_events() == [Ended(stream, REFUSED, "no rule allows tcp:22")]


def test_who_does_not_read_stops_its_sender_and_nobody_else() -> None:
    two = Two()
    full, other = two.opened(), two.opened()
    data = bytes(3 * WINDOW_BYTES)
    written = 0
    while taken := two.host.write(full, data[written:]):
        written += taken
        two.talk()
    assert written == WINDOW_BYTES + SEND_BYTES_MAX
    two.host.write(other, b"passes")
    two.talk()
    assert two.guest.read(other, 9) == (b"passes", False)
    two.host.take_events()
    two.guest.read(full, WINDOW_BYTES)
    two.talk()
    assert two.host.take_events() == [Writable(full)]


def test_streams_take_turns() -> None:
    two = Two()
    busy, late = two.opened(), two.opened()
    two.host.write(busy, bytes(SEND_BYTES_MAX))
    two.host.write(late, b"small")
    said = [decode(message) for message in two.say(two.host)]
    assert [each.id for each in said[:3] if isinstance(each, Part)] == [busy, late, busy]


def test_in_flight_is_bounded_over_all_streams() -> None:
    two = Two()
    for stream in [two.opened() for _ in range(3)]:
        two.host.write(stream, bytes(SEND_BYTES_MAX))
    said = [decode(message) for message in two.say(two.host)]
    assert sum(len(each.data) for each in said if isinstance(each, Part)) == IN_FLIGHT_BYTES_MAX
    assert two.host.in_flight == IN_FLIGHT_BYTES_MAX


def test_a_peer_that_is_gone_does_not_hold_up_the_others() -> None:
    """As when programs were killed: their streams are given up after minutes."""
    two = Two()
    gone = [two.opened() for _ in range(2)]
    content = bytes(range(256)) * (SEND_BYTES_MAX // 256)
    for stream in gone:
        two.host.write(stream, content)
    two.say(two.host)
    assert two.host.in_flight == IN_FLIGHT_BYTES_MAX
    two.wait(HELD_UP_S)
    lively = two.opened()
    two.host.write(lively, b"bytes")
    for message in two.say(two.host):
        read = decode(message)
        assert isinstance(read, Part) and read.id == lively
        two.tell(two.guest, message)
    assert two.guest.read(lively, 99) == (b"bytes", False)
    two.talk()  # they were only stopped
    two.now_s += ASK_S_MAX
    two.host.handle_timeout(two.now_s)
    two.talk()
    for stream in gone:
        assert two.guest.read(stream, 10**6) == (content, False)


def test_many_that_are_gone_hold_up_the_others_until_they_were_asked() -> None:
    two = Two()
    lively, *gone = [two.opened() for _ in range(9)]
    for stream in gone:
        two.host.write(stream, bytes(SEND_BYTES_MAX))
    halves = [two.host._streams[stream].outgoing for stream in gone]
    while sum(half.in_flight for half in halves) < UNDER_WAY_BYTES_MAX:
        two.wait(HELD_UP_S)
        two.say(two.host)
    for _ in range(2):
        two.wait(HELD_UP_S)
        two.say(two.host)
        assert sum(half.in_flight for half in halves) == UNDER_WAY_BYTES_MAX < WAY_BYTES_MAX
    two.host.write(lively, b"bytes")
    while two.guest.read(lively, 99) != (b"bytes", False):
        assert two.now_s < PROBE_S * 2**UNHEARD_ASKS, "they are waited for for ever"
        two.wait(HELD_UP_S)
        for message in two.say(two.host):
            read = decode(message)
            if isinstance(read, Part | Open) and read.id == lively:
                two.tell(two.guest, message)
        two.tell(two.host, *two.say(two.guest))


def test_a_program_that_stands_still_holds_up_others_for_a_moment() -> None:
    """As one that was stopped (Ctrl-Z) beside one that was not."""
    two = Two()
    still, lively = two.opened(), two.opened()
    content = bytes(SEND_BYTES_MAX)
    two.host.write(still, content)
    under_way = two.say(two.host)
    two.host.write(lively, content)
    began_s = two.now_s
    assert two.say(two.host) == []
    arrived = b""
    while len(arrived) < len(content):
        for message in two.say(two.host):
            read = decode(message)
            assert isinstance(read, Part), "nobody asks, so early"
            assert read.id == lively, "what nobody takes is not followed by more"
            two.tell(two.guest, message)
        arrived += two.guest.read(lively, 10**6)[0]
        two.tell(two.host, *two.say(two.guest))
        if not two.host.in_flight:
            continue
        two.now_s = two.host.next_timeout() or 0.0
        two.host.handle_timeout(two.now_s)
    assert two.now_s - began_s == HELD_UP_S
    two.tell(two.guest, *under_way)  # it goes on
    two.talk()
    assert two.guest.read(still, 10**6) == (content, False)
    assert two.host.counters.rewinds == 0


def test_who_was_heard_again_is_waited_for_again() -> None:
    two = Two()
    slow, other = two.opened(), two.opened()
    two.host.write(slow, bytes(SEND_BYTES_MAX))
    first, second = two.say(two.host)
    two.wait(HELD_UP_S)
    assert two.host.in_flight == 0
    two.tell(two.guest, first)
    two.tell(two.host, *two.say(two.guest))
    two.host.write(other, bytes(SEND_BYTES_MAX))
    sent = [decode(message) for message in two.say(two.host)]
    assert sum(len(each.data) for each in sent if isinstance(each, Part)) == CHUNK_BYTES_MAX
    assert two.host.in_flight == IN_FLIGHT_BYTES_MAX
    two.tell(two.guest, second)


# ---------------------------------------------------------------- beside requests


def test_streams_rest_behind_what_they_do_while_requests_are_about() -> None:
    two = Two()
    stream = two.opened()
    two.host.write(stream, bytes(SEND_BYTES_MAX))
    two.guest.write(stream, bytes(SEND_BYTES_MAX))
    two.guest.give_way(two.now_s)
    two.tell(two.guest, *two.say(two.host))
    ends_s = two.guest.worked(0.002, two.now_s)
    assert ends_s == two.guest.next_timeout() == two.now_s + REST_TIMES * 0.002
    assert two.say(two.guest) == [], "neither bytes, nor what brings more"
    two.now_s = ends_s
    assert len(two.say(two.guest)) == 3  # an acknowledgement, and what may be under way
    two.guest.handle_timeout(two.now_s)
    assert two.guest.next_timeout() == pytest.approx(two.now_s + HELD_UP_S)


def test_what_somebody_waits_for_does_not_rest() -> None:
    two = Two()
    streams = [two.opened() for _ in range(2)]
    two.guest.give_way(two.now_s)
    two.guest.worked(1.0, two.now_s)
    two.guest.reset(streams[0], CLOSED, "enough")
    assert [type(decode(message)) for message in two.say(two.guest)] == [Reset]


def test_rests_are_bounded_and_end_with_the_requests() -> None:
    two = Two()
    stream = two.opened()
    two.guest.write(stream, b"bytes")
    assert two.guest.worked(9.0, two.now_s) is None, "nobody has asked for anything"
    two.guest.give_way(two.now_s)
    for _ in range(9):
        two.guest.worked(9.0, two.now_s)
    two.now_s += REST_S_MAX
    assert len(two.say(two.guest)) == 1
    two.now_s += GIVE_WAY_S
    assert two.guest.worked(9.0, two.now_s) is None
    two.guest.write(stream, b"bytes")
    assert len(two.say(two.guest)) == 1


class OneProcessor:
    """A guest whose one processor both its streams and its calls need: what comes is done in the
    order in which it came. The host takes no time."""

    PART_S = 0.003
    CALL_S = 0.006
    CALLS = 400

    def __init__(self, *, is_down: bool, gives_way: bool) -> None:
        self.two = Two()
        self.stream = self.two.opened()
        self.source, self.sink = self.two.host, self.two.guest
        if not is_down:
            self.source, self.sink = self.sink, self.source
        self.gives_way = gives_way
        self.port: list[bytes | None] = []  # None: a call
        self.chance = random.Random(7)
        self.call_s: float | None = 0.01  # when the next one comes
        self.came_s = 0.0
        self.waited_s: list[float] = []
        self.moved = 0

    def run(self) -> tuple[float, float]:
        """What half of the calls wait at least, and what the stream moves in a second."""
        two = self.two
        while len(self.waited_s) < self.CALLS:
            self.source.write(self.stream, bytes(SEND_BYTES_MAX))
            if self.call_s is not None and self.call_s <= two.now_s:
                self.port.append(None)
                self.came_s, self.call_s = self.call_s, None
            self.port += two.say(two.host)
            if self.port:
                self.take(self.port.pop(0))
            elif (message := two.guest.next_message(two.now_s)) is not None:
                self.work(two.host, message)
            else:
                times = [two.guest.next_timeout(), self.call_s]
                two.now_s = max(two.now_s, min(at_s for at_s in times if at_s is not None))
                two.guest.handle_timeout(two.now_s)
        self.waited_s.sort()
        return self.waited_s[self.CALLS // 2] - self.CALL_S, self.moved / two.now_s

    def take(self, message: bytes | None) -> None:
        if message is not None:
            self.work(self.two.guest, message)
            return
        if self.gives_way:
            self.two.guest.give_way(self.two.now_s)
        self.two.now_s += self.CALL_S
        self.waited_s.append(self.two.now_s - self.came_s)
        self.call_s = self.two.now_s + self.chance.uniform(0.0005, 0.002)

    def work(self, side: StreamEnds, message: bytes) -> None:
        moved = self.moved
        self.two.tell(side, message)
        self.moved += len(self.sink.read(self.stream, 10**6)[0])
        took_s = self.PART_S if self.moved != moved else self.PART_S / 20
        self.two.now_s += took_s
        self.two.guest.worked(took_s, self.two.now_s)


@pytest.mark.parametrize("is_down", [True, False], ids=["to the guest", "from it"])
def test_a_call_beside_a_stream_waits_for_little_of_it_and_the_stream_goes_on(
    is_down: bool,
) -> None:
    selfish_s, _ = OneProcessor(is_down=is_down, gives_way=False).run()
    model = OneProcessor(is_down=is_down, gives_way=True)
    waited_s, bytes_per_s = model.run()
    assert waited_s < 0.6 * selfish_s
    slowest_s = model.waited_s[-model.CALLS // 100]
    assert slowest_s <= 2 * model.CALL_S, "99 in 100 take at most twice as long as alone"
    assert bytes_per_s > CHUNK_BYTES_MAX / model.PART_S / (REST_TIMES + 2)


@pytest.mark.parametrize("lost", [StreamOffer, Open, Progress, Part, Reset])
def test_a_new_session_makes_up_for_what_was_lost(lost: type[StreamMessage]) -> None:
    two = Two()
    stream = two.host.open("tcp:80", "", 0.0)
    two.talk(lambda message: isinstance(message, lost))
    two.connect()
    two.talk()
    two.guest.accept(stream)
    two.talk(lambda message: isinstance(message, lost))
    two.host.write(stream, b"all of it")
    two.host.finish(stream)
    two.talk(lambda message: isinstance(message, lost))
    two.connect()
    two.talk()
    assert two.guest.read(stream, 99) == (b"all of it", True)
    two.guest.reset(stream, CLOSED, "done")
    two.talk(lambda message: isinstance(message, lost))
    two.connect()
    two.talk()
    assert two.host.take_events()[-1] == Ended(stream, CLOSED, "done")


def test_a_hole_in_the_middle_is_filled_at_once() -> None:
    two = Two()
    stream = two.opened()
    two.host.write(stream, bytes(range(256)) * 200)
    first, *rest = two.say(two.host)
    two.tell(two.guest, *rest)
    two.talk()
    assert two.guest.read(stream, 10**6) == (bytes(range(256)) * 200, False)
    assert two.host.counters.rewinds == 1
    two.tell(two.guest, first)  # it comes late
    assert two.guest.read(stream, 10**6) == (b"", False)


def test_a_peer_that_asks_for_everything_again_and_again_gets_it_seldom() -> None:
    two = Two()
    stream = two.opened()
    tag = two.host._streams[stream].tag
    two.host.write(stream, bytes(SEND_BYTES_MAX))
    for times in range(20):
        two.say(two.host)
        two.tell(two.host, Progress(REWIND, stream, tag, 0, WINDOW_BYTES))
        two.now_s += REWIND_S / 8
        assert two.host.counters.rewinds == 1 + times // 8


def test_credit_that_was_lost_is_asked_for() -> None:
    two = Two()
    stream = two.opened()
    two.host.write(stream, bytes(SEND_BYTES_MAX))
    two.talk()
    two.host.write(stream, b"more")
    two.guest.read(stream, WINDOW_BYTES)
    two.talk(lambda message: isinstance(message, Progress))
    two.wait(PROBE_S)
    two.talk()
    assert two.guest.read(stream, 9) == (b"more", False)


@pytest.mark.parametrize("restarted", ["host", "guest"])
def test_a_restarted_end_has_forgotten_and_the_other_is_told(restarted: str) -> None:
    two = Two()
    stream = two.opened()
    new = StreamEnds(random.Random(3).randbytes)
    other = two.guest if restarted == "host" else two.host
    setattr(two, restarted, new)
    other.write(stream, b"x")
    two.connect()
    two.talk()
    (ended,) = other.take_events()
    assert isinstance(ended, Ended) and ended.reason == FORGOTTEN and "restarted" in ended.text
    assert new.take_events() == []


def test_an_open_that_comes_late_to_a_new_run_does_not_mix_two_streams() -> None:
    """The first run had accepted it; what the second says of it is another stream's."""
    two = Two()
    two.talk()
    stream = two.host.open("tcp:80", "", 0.0)
    said = two.say(two.host)
    two.tell(two.guest, *said)
    two.guest.accept(stream)
    two.talk()
    two.host.write(stream, b"12345")
    two.talk()
    assert two.guest.read(stream, 9) == (b"12345", False)
    two.guest = StreamEnds(random.Random(3).randbytes)
    two.tell(two.guest, *said)
    two.guest.connected(two.now_s)
    two.tell(two.guest, StreamOffer(VERSION, VERSION))
    two.guest.accept(stream)
    two.guest.write(stream, b"abc")
    two.host.write(stream, b"678")
    two.talk()
    assert two.host.read(stream, 9) == two.guest.read(stream, 9) == (b"", False)
    (ended,) = (each for each in two.host.take_events() if isinstance(each, Ended))
    assert ended.reason == FORGOTTEN


def test_an_end_that_nobody_answers_gives_up_and_a_host_never_does() -> None:
    for asks_max in (ASKS_MAX, None):
        two = Two(asks_max=asks_max)
        stream = two.opened()
        waited_s = 0.0
        for _ in range(100):
            at_s = two.host.next_timeout()
            if at_s is None:
                break
            waited_s = at_s
            two.now_s = at_s
            two.host.handle_timeout(at_s)
            two.say(two.host)
        ended = [each for each in two.host.take_events() if isinstance(each, Ended)]
        if asks_max is None:
            assert ended == [] and two.host.next_timeout() == two.now_s + ASK_S_MAX
        else:
            assert [(each.id, each.reason) for each in ended] == [(stream, SILENT)]
            assert 500 < waited_s < 1000


def test_an_idle_stream_is_asked_for_seldom() -> None:
    two = Two()
    two.opened()
    assert two.host.next_timeout() == two.guest.next_timeout() == IDLE_S


def test_a_peer_without_byte_streams_refuses_by_its_silence() -> None:
    two = Two()
    stream = two.host.open("tcp:80", "", 0.0)
    assert two.host.next_timeout() == PROBE_S
    two.now_s = OFFER_S
    two.host.handle_timeout(two.now_s)
    (ended,) = two.host.take_events()
    assert isinstance(ended, Ended)
    assert (ended.id, ended.reason) == (stream, UNSUPPORTED) and "upgrade" in ended.text
    assert two.host.next_timeout() is None


def test_a_peer_that_was_accepted_once_may_be_late() -> None:
    """It is paused, perhaps."""
    two = Two()
    stream = two.opened()
    two.host.connected(two.now_s)
    two.now_s += 2 * OFFER_S
    two.host.handle_timeout(two.now_s)
    assert two.host.take_events() == []
    two.connect()
    two.host.write(stream, b"on")
    two.talk()
    assert two.guest.read(stream, 9) == (b"on", False)


def test_versions_that_do_not_overlap_are_refused_in_words() -> None:
    two = Two()
    stream = two.host.open("tcp:80", "", 0.0)
    two.tell(two.host, StreamOffer(VERSION + 1, VERSION + 2))
    (ended,) = two.host.take_events()
    assert isinstance(ended, Ended)
    assert (ended.id, ended.reason) == (stream, UNSUPPORTED) and "upgrade the older" in ended.text


def test_only_the_first_offer_of_a_session_counts() -> None:
    two = Two()
    two.tell(two.host, *[StreamOffer(VERSION, VERSION)] * 3)
    two.opened()
    two.tell(two.host, StreamOffer(VERSION, VERSION))
    assert two.say(two.host) == []


def test_limits_of_opening() -> None:
    two = Two()
    for target, facts in (
        ("", ""),
        ("x" * (TARGET_BYTES_MAX + 1), ""),
        ("x", "x" * (FACTS_BYTES_MAX + 1)),
    ):
        with pytest.raises(ValueError, match="give"):
            two.host.open(target, facts, 0.0)
    for _ in range(STREAMS_MAX):
        two.host.open("x" * TARGET_BYTES_MAX, "x" * FACTS_BYTES_MAX, 0.0)
    with pytest.raises(LimitExceeded, match="STREAMS_MAX"):
        two.host.open("x", "", 0.0)
    two.guest.open("the other way", "", 0.0)  # has its own


def test_an_open_storm_costs_bounded_memory() -> None:
    two = Two()
    two.talk()
    for number in range(1000):
        two.tell(two.guest, OPENING._replace(id=number.to_bytes(16, "big")))
    assert len(two.guest._streams) == STREAMS_MAX
    assert len(two.guest._replies) == REPLIES_MAX
    assert two.guest.counters.replies_dropped == 1000 - STREAMS_MAX - REPLIES_MAX
    said = [decode(message) for message in two.say(two.guest)]
    assert {each.reason for each in said if isinstance(each, Reset)} == {BUSY}
    two.guest.reset_all(REFUSED, "none")
    assert two.guest._streams == {}
    for number in range(1000, 1000 + ENDED_MAX):
        two.tell(two.guest, OPENING._replace(id=number.to_bytes(16, "big")))
        two.guest.reset_all(REFUSED, "none")
    assert len(two.guest._ended) == ENDED_MAX


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Progress(0, ID, TAG, 4, 0), VIOLATED),
        (Part(0, ID, TAG, WINDOW_BYTES, b"x"), VIOLATED),
        (Progress(0, ID, b"another!", 0, 0), FORGOTTEN),
    ],
)
def test_a_violation_ends_its_stream_alone(message: StreamMessage, reason: int) -> None:
    two = Two()
    stream, other = two.opened(), two.opened()
    two.host.write(stream, b"abc")
    two.say(two.host)
    tag = two.host._streams[stream].tag
    changed = {"id": stream} | ({"tag": tag} if getattr(message, "tag", None) == TAG else {})
    two.tell(two.host, message._replace(**changed))  # type: ignore[arg-type]
    events = two.host.take_events()
    assert [type(each) for each in events if not isinstance(each, Ended)] == (
        [Fault] if reason == VIOLATED else []
    )
    assert [(each.id, each.reason) for each in events if isinstance(each, Ended)] == [
        (stream, reason)
    ]
    assert list(two.host._streams) == [other]


def test_nonsense_is_a_fault_and_ends_nothing() -> None:
    two = Two()
    stream = two.opened()
    two.tell(two.host, b"\x22nonsense", OPENING._replace(id=stream))
    assert [type(each) for each in two.host.take_events()] == [Fault, Fault]
    assert list(two.host._streams) == [stream]


def test_an_open_that_has_received_something_is_a_violation() -> None:
    two = Two()
    two.tell(two.guest, OPENING._replace(received=1))
    fault, ended = two.guest.take_events()
    assert isinstance(fault, Fault) and isinstance(ended, Ended) and ended.reason == VIOLATED


def test_a_stream_that_is_over_answers_who_asks_and_not_who_tells() -> None:
    two = Two()
    stream = two.opened()
    tag = two.host._streams[stream].tag
    for side in (two.host, two.guest):
        side.finish(stream)
    two.talk()
    for side in (two.host, two.guest):
        assert side.read(stream, 9) == (b"", True)
    two.talk()
    for side in (two.host, two.guest):
        two.tell(side, Progress(ANSWER, stream, tag, 1, 0))
        assert two.say(side) == []
        two.tell(side, Progress(ASK, stream, tag, 0, 0))
        (answer,) = two.say(side)
        read = decode(answer)
        assert isinstance(read, Progress) and read.received == 1
    two.tell(two.guest, OPENING._replace(id=stream))
    assert len(two.say(two.guest)) == 1
    assert two.guest.take_events()[-1] == Ended(stream, 0, "")


def test_a_reset_of_an_unknown_stream_is_not_answered() -> None:
    two = Two()
    two.talk()
    two.tell(two.host, Reset(CLOSED, ID, ""), Progress(0, ID, TAG, 0, 0))
    (said,) = two.say(two.host)
    read = decode(said)
    assert isinstance(read, Reset) and read.reason == FORGOTTEN


def test_who_has_not_accepted_yet_asks_nothing() -> None:
    two = Two()
    stream = two.host.open("tcp:80", "", 0.0)
    two.talk()
    assert two.guest.next_timeout() is None
    two.wait(PROBE_S)
    two.talk()
    two.guest.reset_all(REFUSED, "no")
    two.talk()
    assert Ended(stream, REFUSED, "no") in two.host.take_events()


def test_what_has_not_arrived_yet_is_not_held() -> None:
    half = InHalf()
    half.receive(0, b"abc", False)
    assert (half.held, half.received, half.is_done) == (3, 3, False)
    assert half.read(2) == b"ab"
    assert (half.held, half.received, half.credit) == (1, 3, WINDOW_BYTES + 2)


@given(messages)
def test_all_of_a_stream_goes_on_one_stream_of_the_session(message: StreamMessage) -> None:
    data = encode(message)
    if isinstance(message, StreamOffer):
        assert session_stream(data) == CONTROL
    else:
        assert session_stream(data) == session_stream(encode(Reset(CLOSED, message.id, "")))
        assert CONTROL < session_stream(data) < STREAMS
