"""A daemon between programs and its guest: who is let pass, and what is bounded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from vchan.errors import LimitExceeded
from vchan.streams import Ended, StreamEnds, StreamWanted
from vchan.streams.ends import DOUBTS_MAX
from vchan.streams.messages import (
    ANSWER,
    ASK,
    CHUNK_BYTES_MAX,
    CLOSED,
    DONE,
    FORGOTTEN,
    NO_TAG,
    REFUSED,
    VERSION,
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
from vchan.streams.switchboard import (
    PROGRAMS_MAX,
    ROUTES_MAX,
    WAY_BYTES_MAX,
    Began,
    Over,
    Switchboard,
)

TAG = b"the tag!"
OFFER = StreamOffer(VERSION, VERSION)


def ident(number: int) -> bytes:
    return number.to_bytes(16, "big")


def opening(number: int, target: str = "tcp:80", *, tag: bytes = NO_TAG) -> Open:
    return Open(ident(number), tag, 0, 65_536, target, '{"user":"root, it says"}')


class Daemon:
    """A relay whose judge lets one target pass, and stamps who asks."""

    def __init__(self, *programs: int, offered: bool = True) -> None:
        self.allowed = {"tcp:80"}
        self.switchboard = Switchboard(self.judge)
        self.switchboard.guest_connected()
        for number in programs:
            self.switchboard.attach(number)
        if offered:
            assert self.guest_says(OFFER) is None
            assert self.to_guest() == [OFFER]
            for number in programs:
                assert self.to_program(number) == [OFFER]

    def judge(self, number: int, opened: Open) -> Open | str:
        if opened.target not in self.allowed:
            return f"no rule allows {opened.target}"
        return opened._replace(facts=f'{{"program":{number}}}')

    def guest_says(self, message: StreamMessage) -> str | None:
        return self.switchboard.from_guest(encode(message))

    def says(self, number: int, *messages: StreamMessage) -> None:
        for message in messages:
            self.switchboard.from_program(number, encode(message))

    def to_guest(self) -> list[StreamMessage | Malformed]:
        return [decode(each) for each in self._drain(None)]

    def to_program(self, number: int) -> list[StreamMessage | Malformed]:
        return [decode(each) for each in self._drain(number)]

    def _drain(self, number: int | None) -> Iterator[bytes]:
        while True:
            message = (
                self.switchboard.next_for_guest()
                if number is None
                else self.switchboard.next_for_program(number)
            )
            if message is None:
                return
            yield message


def test_what_was_opened_passes_both_ways_with_the_hosts_word() -> None:
    daemon = Daemon(1)
    part = Part(0, ident(7), TAG, 0, b"x")
    daemon.says(1, OFFER, opening(7), part)
    assert daemon.to_guest() == [opening(7)._replace(facts='{"program":1}'), part]
    state = Progress(ANSWER, ident(7), TAG, 0, 9)
    assert daemon.guest_says(state) is None
    assert daemon.to_program(1) == [state]


def test_what_is_not_allowed_is_refused_with_the_reason_and_the_guest_hears_nothing() -> None:
    daemon = Daemon(1)
    daemon.says(1, opening(7, "tcp:22"), Part(0, ident(7), TAG, 0, b"x"))
    assert daemon.to_guest() == []
    assert daemon.to_program(1) == [Reset(REFUSED, ident(7), "no rule allows tcp:22")]
    assert daemon.switchboard.dropped == 1


def test_a_stream_that_is_no_longer_allowed_ends_at_both_ends() -> None:
    daemon = Daemon(1)
    daemon.says(1, opening(7))
    daemon.to_guest()
    daemon.allowed.clear()
    daemon.says(1, opening(7, tag=TAG))
    assert (
        daemon.to_guest()
        == daemon.to_program(1)
        == [Reset(REFUSED, ident(7), "no rule allows tcp:80")]
    )
    daemon.says(1, Part(0, ident(7), TAG, 0, b"x"))
    assert daemon.to_guest() == []


def test_nobody_speaks_for_anothers_stream() -> None:
    daemon = Daemon(1, 2)
    daemon.says(1, opening(7))
    daemon.to_guest()
    daemon.says(2, opening(7), Progress(ASK, ident(7), TAG, 0, 0), Reset(CLOSED, ident(7), ""))
    assert daemon.to_guest() == []
    assert daemon.switchboard.dropped == 3
    daemon.guest_says(Part(0, ident(7), TAG, 0, b"x"))
    assert daemon.to_program(2) == []
    assert len(daemon.to_program(1)) == 1


def test_a_daemon_that_knows_nothing_goes_on_when_the_opener_asks() -> None:
    daemon = Daemon(1)
    state = Progress(ASK, ident(7), TAG, 0, 9)
    daemon.guest_says(state)
    assert daemon.to_program(1) == []
    daemon.says(1, opening(7, tag=TAG))
    assert len(daemon.to_guest()) == 1
    daemon.guest_says(state)
    assert daemon.to_program(1) == [state]


def test_a_guest_that_takes_no_byte_streams_is_not_offered_to_programs() -> None:
    for offer in (None, StreamOffer(VERSION + 1, VERSION + 1)):
        daemon = Daemon(1, offered=False)
        if offer is not None:
            daemon.guest_says(offer)
        daemon.says(1, opening(7))
        assert daemon.to_guest() == [OFFER]
        assert daemon.to_program(1) == []


def test_a_guests_faults_are_said() -> None:
    daemon = Daemon(1)
    assert daemon.guest_says(opening(7)) == "Open: no streams are taken out of a guest"
    assert daemon.switchboard.from_guest(b"\x22") is not None
    daemon.switchboard.from_program(1, b"\x22")  # a program's harm itself alone
    assert daemon.to_guest() == []


def test_a_new_session_with_the_guest_drops_what_was_on_its_way() -> None:
    daemon = Daemon(1)
    daemon.says(1, opening(7))
    daemon.switchboard.guest_connected()
    daemon.guest_says(OFFER)
    assert daemon.to_guest() == [OFFER]


def test_programs_take_turns_and_have_a_limit_each() -> None:
    daemon = Daemon(1, 2)
    part = Part(0, ident(1), TAG, 0, b"x" * CHUNK_BYTES_MAX)
    daemon.says(1, opening(1), *[part] * 100)
    daemon.says(2, opening(2), Part(0, ident(2), TAG, 0, b"small"))
    kept = WAY_BYTES_MAX // len(encode(part))
    assert daemon.switchboard.dropped == 100 - kept
    said = daemon.to_guest()
    assert [each.id for each in said[:4] if isinstance(each, Open | Part)] == [
        *(ident(1), ident(2), ident(1), ident(2)),
    ]
    assert len(said) == kept + 3


def test_limits_of_programs_and_routes() -> None:
    daemon = Daemon(*range(PROGRAMS_MAX))
    with pytest.raises(LimitExceeded, match="PROGRAMS_MAX"):
        daemon.switchboard.attach(PROGRAMS_MAX)
    daemon.switchboard.attach(0)  # anew
    for number in range(ROUTES_MAX + 1):
        daemon.says(1, opening(number))
        daemon.says(1, Progress(0, ident(0), TAG, 0, 0))  # is not quiet
    assert len(daemon.switchboard._routes) == ROUTES_MAX
    over = [each for each in daemon.switchboard.take_events() if isinstance(each, Over)]
    assert [each.text for each in over] == [f"{ROUTES_MAX} streams pass here (ROUTES_MAX)"]
    assert ident(0) in daemon.switchboard._routes and ident(1) not in daemon.switchboard._routes
    daemon.switchboard.detach(1)
    daemon.switchboard.detach(1)
    assert daemon.switchboard._routes == {}


# ---------------------------------------------------------------- what is over, and a new daemon


class Joined:
    """A program and a guest, and the daemon between them, which may be another one at any time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.program = StreamEnds(random.Random(1).randbytes, asks_max=None, offer_s=None)
        self.guest = StreamEnds(random.Random(2).randbytes)
        self.passed: list[StreamMessage | Malformed] = []  # all that any daemon was given
        self.restart_daemon()

    def restart_daemon(self) -> None:
        """It was killed, with all that it had not passed on."""
        self.board = Switchboard(lambda _, opened: opened)
        self.board.guest_connected()
        self.board.attach(1)
        self.program.connected(self.now_s)
        self.guest.connected(self.now_s)

    def talk(self, lose: Callable[[StreamMessage | Malformed], bool] = lambda _: False) -> None:
        """Until nobody has anything to say; what `lose` says of the program's words is lost."""
        for _ in range(100):
            down = list(iter(lambda: self.program.next_message(self.now_s), None))
            up = list(iter(lambda: self.guest.next_message(self.now_s), None))
            self.passed += map(decode, [*down, *up])
            for message in down:
                if not lose(decode(message)):
                    self.board.from_program(1, message)
            for message in up:
                assert self.board.from_guest(message) is None
            for message in iter(self.board.next_for_guest, None):
                self.guest.receive(message, self.now_s)
            for message in iter(lambda: self.board.next_for_program(1), None):
                self.program.receive(message, self.now_s)
            if not down and not up:
                return
        raise AssertionError("they never stop")

    def opened(self) -> bytes:
        stream = self.program.open("tcp:80", "{}", self.now_s)
        self.talk()
        assert StreamWanted(stream, "tcp:80", "{}") in self.guest.take_events()
        self.guest.accept(stream)
        self.talk()
        return stream

    def end(self, stream: bytes, lose: Callable[[StreamMessage | Malformed], bool]) -> None:
        """Both write and read all; what the program says of the guest's end may be lost."""
        self.program.write(stream, b"all of it")
        self.program.finish(stream)
        self.talk()
        assert self.guest.read(stream, 99) == (b"all of it", True)
        self.guest.write(stream, b"and back")
        self.guest.finish(stream)
        self.talk(lose)
        assert self.program.read(stream, 99) == (b"and back", True)
        self.talk(lose)
        assert self.ends(self.program) == [(stream, 0)]

    def ends(self, side: StreamEnds) -> list[tuple[bytes, int]]:
        return [(e.id, e.reason) for e in side.take_events() if isinstance(e, Ended)]


def everything(_: StreamMessage | Malformed) -> bool:
    return True


def test_the_guest_hears_from_a_new_daemon_that_a_stream_is_done() -> None:
    """The last acknowledgement died with the old one: the new one knows nothing of the stream."""
    joined = Joined()
    stream = joined.opened()
    joined.end(stream, lose=everything)
    assert joined.ends(joined.guest) == []
    joined.restart_daemon()
    joined.talk()
    assert joined.ends(joined.guest) == [(stream, 0)]
    assert joined.ends(joined.program) == []


def test_the_guest_hears_from_a_new_daemon_that_a_stream_was_reset() -> None:
    joined = Joined()
    stream = joined.opened()
    joined.program.reset(stream, CLOSED, "enough")
    joined.talk(lose=everything)
    joined.restart_daemon()
    joined.talk()
    assert joined.ends(joined.guest) == [(stream, CLOSED)]


@pytest.mark.parametrize("how", ["done", "reset"])
def test_what_the_guest_knows_to_be_over_is_not_asked_about_again(how: str) -> None:
    joined = Joined()
    stream = joined.opened()
    if how == "done":
        joined.end(stream, lose=lambda _: False)
    else:
        joined.program.reset(stream)
        joined.talk()
    joined.passed.clear()
    for _ in range(2):
        joined.restart_daemon()
        joined.talk()
    assert all(isinstance(each, StreamOffer) for each in joined.passed)


@pytest.mark.parametrize("how", ["done", "reset"])
def test_a_new_daemon_sees_the_end_of_what_was_over_before_it(how: str) -> None:
    joined = Joined()
    stream = joined.opened()
    if how == "done":
        joined.end(stream, lose=everything)
    else:
        joined.program.reset(stream)
        joined.talk(lose=everything)
    joined.restart_daemon()
    joined.talk()
    began, over = joined.board.take_events()
    assert isinstance(began, Began) and isinstance(over, Over)
    assert (began.id, over.id, over.reason) == (stream, stream, 0 if how == "done" else CLOSED)
    assert joined.board.open_streams == 0
    joined.passed.clear()
    joined.restart_daemon()
    joined.talk()
    assert all(isinstance(each, StreamOffer) for each in joined.passed), "once is enough"


def test_a_guest_that_was_restarted_as_well_ends_the_doubt() -> None:
    joined = Joined()
    stream = joined.opened()
    joined.end(stream, lose=everything)
    joined.guest = StreamEnds(random.Random(3).randbytes)
    joined.restart_daemon()
    joined.talk()
    (over,) = (each for each in joined.board.take_events() if isinstance(each, Over))
    assert over.reason == FORGOTTEN
    assert joined.program.take_events() == []


def test_a_guest_that_will_not_hear_of_a_reset_makes_nobody_chatter() -> None:
    joined = Joined()
    stream = joined.opened()
    tag = joined.program._streams[stream].tag
    joined.program.reset(stream, CLOSED, "enough")
    joined.restart_daemon()
    joined.talk(lose=everything)
    said = []
    for _ in range(5):
        joined.program.receive(encode(Progress(ANSWER, stream, tag, 0, 0)), joined.now_s)
        said += list(iter(lambda: joined.program.next_message(joined.now_s), None))
    kinds = [type(decode(each)) for each in said]
    assert kinds == [Reset, Open, Reset, Reset, Reset, Reset], "one question more in each session"


def test_doubts_have_a_limit() -> None:
    joined = Joined()
    for _ in range(DOUBTS_MAX + 1):
        joined.program.reset(joined.opened())
        joined.talk(lose=everything)
        joined.guest._streams.clear()
    assert len(joined.program._doubts) == DOUBTS_MAX


def test_a_program_that_is_done_hides_nothing_behind_that() -> None:
    """Bytes that are not counted do not pass, either way."""
    daemon = Daemon(1)
    done, part = Progress(ANSWER | DONE, ident(7), TAG, 0, 9), Part(0, ident(7), TAG, 0, b"x")
    daemon.says(1, opening(7))
    daemon.guest_says(done)
    assert [type(each) for each in daemon.switchboard.take_events()] == [Began], "no guest's word"
    daemon.says(1, part, done)
    (over,) = daemon.switchboard.take_events()
    assert isinstance(over, Over) and (over.reason, over.down) == (0, 1)
    daemon.says(1, part, opening(7, tag=TAG), part)
    daemon.guest_says(part)
    assert [type(each) for each in daemon.to_guest()] == [Open, Part, Progress, Open]
    assert [type(each) for each in daemon.to_program(1)] == [Progress]
    assert daemon.switchboard.take_events() == []


def test_the_streams_of_a_program_that_has_ended_are_reset_and_those_that_were_over_are_not() -> (
    None
):
    daemon = Daemon(1, 2)
    for number in (7, 8, 9):
        daemon.says(1, opening(number))
    daemon.says(2, opening(6))
    last = Progress(ANSWER | DONE, ident(8), TAG, 10, 65_546)
    daemon.says(1, last, Reset(CLOSED, ident(9), "by itself"))
    daemon.to_guest()
    daemon.switchboard.take_events()
    daemon.switchboard.detach(1, ended="its program has ended")
    reset = Reset(CLOSED, ident(7), "its program has ended")
    assert daemon.to_guest() == [reset]
    (over,) = daemon.switchboard.take_events()
    assert isinstance(over, Over)
    assert (over.id, over.reason, over.text) == (ident(7), CLOSED, "its program has ended")


def test_the_last_acknowledgement_of_a_program_that_is_gone_reaches_the_guest() -> None:
    daemon = Daemon(1)
    last = Progress(ANSWER, ident(7), TAG, 10, 65_546)
    daemon.says(1, opening(7), Part(0, ident(7), TAG, 0, b"x"), last, Reset(CLOSED, ident(7), ""))
    daemon.switchboard.detach(1)
    assert daemon.to_guest() == [last, Reset(CLOSED, ident(7), "")]
