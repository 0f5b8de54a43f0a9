"""A daemon between programs and its guest: who is let pass, and what is bounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vchan.errors import LimitExceeded
from vchan.streams.messages import (
    ANSWER,
    ASK,
    CHUNK_BYTES_MAX,
    CLOSED,
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
