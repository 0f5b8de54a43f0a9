"""The session, example by example. Its properties are in test_session_stateful.py."""

from __future__ import annotations

import copy
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.pair import (
    GUEST_INSTANCE,
    HOST_INSTANCE,
    End,
    Pair,
    connected,
    kinds,
    make_session,
    opened,
    read_frames,
    reconfigure,
    sealed,
)
from vchan.errors import LimitExceeded
from vchan.session import (
    ASK_TICK_S,
    BACKLOG_BYTES_MAX,
    CONTROL,
    MESSAGE_BYTES_MAX,
    MESSAGE_BYTES_MIN,
    PING_IDLE_S,
    SILENCE_S,
    STREAMS,
    WINDOW_BYTES,
    Config,
    Heard,
    Lost,
    Opened,
    Peer,
    Received,
    Refused,
    Role,
    Session,
    Silent,
    State,
    Violation,
)
from vchan.session import session as session_module
from vchan.session.contract import ACK_DELAY_S, COUNTED
from vchan.session.liveness import PROBE_S, REGREET_PINGS
from vchan.session.receiver import PART_BYTES_MIN
from vchan.session.sender import REWIND_S
from vchan.session.session import REGREET_S, Cause
from vchan.wire import layout
from vchan.wire.frames import (
    FLUSH,
    FRAME_BYTES_MAX,
    FRAME_BYTES_MIN,
    GREETING_BYTES_MAX,
    NO_KEY,
    OVERHEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    ZERO_ID,
    Greeting,
    decode_greeting,
    encode_frame,
)

DATA, ACK, PING = layout.KIND_DATA, layout.KIND_ACK, layout.KIND_PING
PONG, REWIND = layout.KIND_PONG, layout.KIND_REWIND
WHOLE = layout.FLAG_FIRST | layout.FLAG_LAST


def hand(pair: Pair, end: End, data: bytes) -> list[Any]:
    """Give an end bytes its peer never wrote."""
    events = end.session.receive_data(data, pair.now_s)
    end.events += events
    return events


def greeting(kind: int, made: Greeting) -> bytes:
    return encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, made.encode())


def state_of(end: End) -> State:
    return end.session.state


def greetings_in(data: bytes) -> list[Greeting]:
    found = [decode_greeting(frame.payload) for frame in read_frames(data)]
    return [made for made in found if made is not None]


# ---------------------------------------------------------------- the table


def test_every_state_and_kind_is_handled_or_ignored_on_purpose() -> None:
    every_kind = [value for name, value in vars(layout).items() if name.startswith("KIND_")]
    everything = set(product(State, every_kind))
    handled, ignored = set(session_module._ON_FRAME), set(session_module._IGNORED)
    assert handled | ignored == everything
    assert not handled & ignored


def test_every_state_and_change_leads_on_or_cannot_be() -> None:
    everything = set(product(State, Cause))
    leads, cannot = set(session_module._NEXT_STATE), set(session_module._CANNOT_BE)
    assert leads | cannot == everything
    assert not leads & cannot


# ---------------------------------------------------------------- handshake


def test_two_ends_open_a_session() -> None:
    pair = Pair().connect()
    host, guest = pair.host.session, pair.guest.session
    assert pair.host.events == [Opened(Peer(GUEST_INSTANCE, "guest", "", 1), resumed=False)]
    assert pair.guest.events == [Opened(Peer(HOST_INSTANCE, "host", "", 1), resumed=False)]
    assert host._handshake.session_id == guest._handshake.session_id != ZERO_ID
    assert host.counters.sessions == guest.counters.sessions == 1


def test_a_stream_opens_with_a_hello_and_a_flush() -> None:
    host = make_session(Role.HOST)
    host.open(0.0)
    data = host.data_to_send()
    assert data.endswith(FLUSH)
    assert kinds(data.removesuffix(FLUSH), host) == ["HELLO"]
    assert host.data_to_send() == b""


@pytest.mark.parametrize("of_it", [1, 30, 60, 5_000, FRAME_BYTES_MAX - 1])
@pytest.mark.parametrize("piece", [64, 4096, 1 << 20])
def test_a_hello_behind_a_half_frame_is_heard_once_the_flush_has_come(
    of_it: int, piece: int
) -> None:
    """As of a host that the guest has left, in the middle of what it wrote."""
    pair = Pair().connect()
    pair.host.session.send(bytes(FRAME_BYTES_MAX - OVERHEAD_BYTES), 1)
    torn = pair.host.session.data_to_send()[:of_it]
    assert len(torn) == of_it
    another = make_session(Role.HOST)
    another.open(0.0)
    data = torn + another.data_to_send()
    for at in range(0, len(data), piece):
        pair.guest.session.receive_data(data[at : at + piece], pair.now_s)
    assert "WELCOME" in kinds(pair.guest.session.data_to_send(), pair.guest.session)


@pytest.mark.parametrize("first", [Role.HOST, Role.GUEST])
def test_the_end_that_starts_later_finds_the_earlier_one(first: Role) -> None:
    pair = Pair()
    early, late = (pair.host, pair.guest) if first is Role.HOST else (pair.guest, pair.host)
    pair.open(early)
    pair.write(early)
    late.inbox.clear()  # nobody had the port open
    pair.advance(60.0, settle=False)
    pair.open(late)
    pair.settle()
    assert early.session.state is late.session.state is State.OPEN


def test_messages_both_ways_on_every_stream() -> None:
    pair = connected()
    for stream in range(STREAMS):
        pair.host.session.send(b"to guest %d" % stream, stream)
        pair.guest.session.send(b"to host %d" % stream, stream)
    pair.settle()
    for stream in range(STREAMS):
        assert pair.guest.received(stream) == [b"to guest %d" % stream]
        assert pair.host.received(stream) == [b"to host %d" % stream]


def test_messages_sent_before_the_session_are_not_delivered() -> None:
    """The layer above repeats what still matters; Opened(resumed=False) tells it to."""
    pair = Pair()
    pair.host.session.send(b"too early")
    pair.connect()
    pair.host.session.send(b"now")
    pair.settle()
    assert pair.guest.received() == [b"now"]
    assert pair.host.session.backlog_bytes == 0


def test_a_session_that_is_abandoned_is_followed_by_a_new_one() -> None:
    """What waited in it takes no memory any more, and does not arrive; both ends are told."""
    pair = connected()
    pair.host.session.send(b"x" * 1_000_000, 1)
    pair.host.session.close()
    pair.guest.session.close()
    pair.host.session.abandon()
    assert pair.host.session.backlog_bytes == pair.host.session.unacknowledged == 0
    pair.connect()
    for end in (pair.host, pair.guest):
        (opened,) = [event for event in end.events if isinstance(event, Opened)]
        assert not opened.resumed
    pair.host.session.send(b"now", 1)
    pair.settle()
    assert pair.guest.received(1) == [b"now"]


def test_a_lost_hello_is_resent_at_growing_intervals() -> None:
    pair = Pair()
    pair.open(pair.host)
    times = []
    for _ in range(8):
        pair.write(pair.host)
        at_s = pair.host.session.next_timeout()
        assert at_s is not None
        times.append(round(at_s - pair.now_s, 6))
        pair.now_s = at_s
        pair.host.session.handle_timeout(at_s)
    # The sixth comes when silence is told, after 10 s.
    assert times == [0.2, 0.5, 1.0, 2.0, 5.0, 1.3, 5.0, 5.0]
    assert pair.host.session.handle_timeout(pair.now_s) == []  # early is harmless
    assert kinds(pair.write(pair.host), pair.host.session) == ["HELLO"]


def test_a_lost_welcome_is_asked_for_again() -> None:
    pair = Pair()
    pair.open(pair.host)
    pair.guest.session.open(pair.now_s)
    pair.guest.session.data_to_send()  # its own HELLO is lost
    pair.write(pair.host)
    pair.deliver(pair.guest)
    assert "WELCOME" in kinds(pair.guest.session.data_to_send(), pair.guest.session)  # and this
    pair.advance(1.0)
    assert pair.host.session.state is pair.guest.session.state is State.OPEN
    assert opened(pair.host.events) == opened(pair.guest.events) == [False]


def test_the_next_hello_replaces_a_lost_confirmation() -> None:
    """One end is OPEN and said so; the other did not hear it and greets again."""
    pair = Pair()
    pair.open()
    pair.write(pair.guest)
    pair.host.session.data_to_send()  # the host's own HELLO is lost
    pair.deliver(pair.host)
    pair.write(pair.host)  # its WELCOME
    pair.deliver(pair.guest)
    assert state_of(pair.guest) is State.OPEN
    assert kinds(pair.guest.session.data_to_send(), pair.guest.session) == ["ACK"]  # lost
    assert state_of(pair.host) is State.GREETING
    pair.advance(1.0)
    assert state_of(pair.host) is State.OPEN
    assert opened(pair.host.events) == opened(pair.guest.events) == [False]


def test_a_duplicate_hello_gets_the_same_answer() -> None:
    pair = Pair()
    pair.open()
    hello = pair.write(pair.guest).removesuffix(FLUSH)
    pair.deliver(pair.host)
    first = greetings_in(pair.write(pair.host))[-1]
    hand(pair, pair.host, hello)
    assert greetings_in(pair.host.session.data_to_send()) == [first]
    pair.settle()
    hand(pair, pair.host, hello)
    again = greetings_in(pair.host.session.data_to_send())
    assert [made.nonce for made in again] == [first.nonce]
    assert pair.host.session.state is State.OPEN


def test_a_hello_sent_again_gets_the_same_answer_in_an_open_session() -> None:
    """Else the answer that gets through may be to a pair of nonces that was replaced."""
    pair = connected()
    pair.open(pair.guest)
    hello = lose(pair, pair.guest)
    answers = []
    for _ in range(3):
        hand(pair, pair.host, hello)
        answers.append(pair.host.session.data_to_send())
    assert answers[0] == answers[1] == answers[2] != b""


def test_a_hello_alone_changes_nothing_in_an_open_session() -> None:
    """It may come out of a payload. It is answered, never trusted."""
    pair = connected()
    smuggled = Greeting(
        1, 1, Role.GUEST, b"e" * 16, b"v" * 16, ZERO_ID, ZERO_ID, 0, 0, 0, 0, 9999, 99999, 99999,
        "evil", ""
    )  # fmt: skip
    assert hand(pair, pair.host, greeting(layout.KIND_HELLO, smuggled)) == []
    assert kinds(pair.write(pair.host), pair.host.session) == ["WELCOME"]
    pair.settle()
    pair.host.session.send(b"still here")
    pair.guest.session.send(b"so am I")
    pair.settle()
    assert (pair.guest.received(), pair.host.received()) == ([b"still here"], [b"so am I"])
    assert pair.host.session.counters.sessions == 1


@pytest.mark.parametrize("kind", [layout.KIND_WELCOME, layout.KIND_REFUSE])
@pytest.mark.parametrize("state", [State.GREETING, State.OPEN])
def test_forged_answers_to_a_greeting_are_ignored(kind: int, state: State) -> None:
    pair = connected() if state is State.OPEN else Pair()
    if state is State.GREETING:
        pair.open(pair.host)
        pair.host.session.data_to_send()
    smuggled = Greeting(
        1, 1, Role.GUEST, b"e" * 16, b"v" * 16, b"o" * 16, ZERO_ID, 0, 0, 0, 0, 9999, 99999, 99999,
        "evil", ""
    )  # fmt: skip
    assert hand(pair, pair.host, greeting(kind, smuggled)) == []
    assert pair.host.session.data_to_send() == b""
    assert pair.host.session.state is state


def test_an_echoing_terminal_is_not_taken_for_a_peer() -> None:
    host = make_session(Role.HOST)
    host.open(0.0)
    own = host.data_to_send()
    assert host.receive_data(own, 0.0) == []
    assert host.data_to_send() == b""
    assert host.state is State.GREETING


@pytest.mark.parametrize("kind", [layout.KIND_HELLO, layout.KIND_WELCOME, layout.KIND_REFUSE])
def test_a_greeting_that_is_nonsense_does_nothing(kind: int) -> None:
    pair = Pair()
    pair.open(pair.host)
    pair.host.session.data_to_send()
    assert hand(pair, pair.host, encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, b"nonsense")) == []
    assert pair.host.session.data_to_send() == b""


def test_a_new_guest_on_the_same_stream_gets_a_new_session() -> None:
    """A guest reboot is invisible to the host but for the new instance's HELLO."""
    pair = connected()
    pair.guest.session.send(b"x" * 50_000, 3)
    pair.write(pair.guest)
    torn = bytes(pair.host.inbox[:20_000])
    pair.guest = End(make_session(Role.GUEST, instance=b"second-instance!"))
    pair.host.inbox[:] = torn
    pair.open(pair.guest)
    pair.settle()
    assert opened(pair.host.events) == opened(pair.guest.events) == [False]
    assert pair.host.session.peer is not None
    assert pair.host.session.peer.instance == b"second-instance!"
    assert (
        pair.host.session._receiver._partials == {} and pair.host.session._receiver.reassembly == 0
    )


def test_a_guest_tells_whom_it_was_attached_to() -> None:
    pair = connected()
    pair.host = End(make_session(Role.HOST, instance=b"another-host-99!", name="host-2"))
    pair.guest.inbox.clear()
    pair.open(pair.host)
    pair.settle()
    (told,) = pair.host.of(Opened)
    assert told.peer.attached == "host"
    pair.open(pair.guest)
    pair.settle()
    assert pair.host.of(Opened)[-1].peer.attached == "host-2"


def test_names_from_a_peer_are_fit_for_a_log() -> None:
    pair = Pair(guest=make_session(Role.GUEST, name="a\nb\x1b[31m")).connect()
    assert pair.host.session.peer is not None
    assert pair.host.session.peer.name == "a?b?[31m"


def test_a_session_without_a_stream_answers_nothing() -> None:
    pair = connected()
    pair.host.session.close()
    pair.guest.session.send(b"to nobody")
    pair.write(pair.guest)
    assert pair.deliver(pair.host) == []
    other = make_session(Role.GUEST, instance=b"z" * 16)
    other.open(0.0)
    assert hand(pair, pair.host, other.data_to_send()) == []
    assert pair.host.session.data_to_send() == b""
    assert pair.host.session.next_timeout() is None
    assert pair.host.session.handle_timeout(pair.now_s) == []


# ---------------------------------------------------------------- versions and limits


def hello_of(session: Session) -> Greeting:
    session.open(0.0)
    return greetings_in(session.data_to_send())[0]


def test_versions_without_overlap_are_refused_both_ways_in_words() -> None:
    pair = Pair(
        make_session(Role.HOST, name="compute-7", version_min=1, version_max=2),
        make_session(Role.GUEST, name="web-1", version_min=3, version_max=4),
    )
    pair.open()
    pair.settle()
    for end in (pair.host, pair.guest):
        assert end.session.state is State.REFUSED
        (refused,) = end.of(Refused)
        assert "compute-7 speaks protocol versions 1 to 2, web-1 3 to 4" in refused.reason or (
            "web-1 speaks protocol versions 3 to 4, compute-7 1 to 2" in refused.reason
        )
        assert refused.reason.endswith("upgrade the older one")
        assert refused.by_peer


def test_a_refused_end_tries_again_after_an_upgrade() -> None:
    pair = Pair(guest=make_session(Role.GUEST, version_min=3, version_max=4))
    pair.open()
    pair.settle()
    assert pair.host.session.state is State.REFUSED
    pair.guest = End(make_session(Role.GUEST, instance=b"upgraded-guest-1"))
    pair.open(pair.guest)
    pair.settle()
    assert pair.host.session.state is pair.guest.session.state is State.OPEN


def test_a_refused_end_greets_again_by_itself() -> None:
    pair = Pair(guest=make_session(Role.GUEST, version_min=3, version_max=4))
    pair.open()
    pair.settle()
    reconfigure(pair.guest.session, version_min=1)
    pair.advance(31.0)
    assert pair.host.session.state is pair.guest.session.state is State.OPEN
    assert len(pair.host.of(Refused)) == 1


def test_overlapping_versions_meet_at_the_newest_both_know() -> None:
    pair = Pair(
        make_session(Role.HOST, version_min=1, version_max=5),
        make_session(Role.GUEST, version_min=2, version_max=3),
    ).connect()
    assert pair.host.session.peer is not None and pair.host.session.peer.version == 3


@pytest.mark.parametrize(
    "limits",
    [
        {"frame_bytes_max": FRAME_BYTES_MIN - 1},
        {"message_bytes_max": MESSAGE_BYTES_MIN - 1},
        {"reassembly_bytes_max": MESSAGE_BYTES_MAX - 1},
    ],
)
def test_limits_that_are_too_small_are_refused(limits: dict[str, Any]) -> None:
    host = make_session(Role.HOST)
    host.open(0.0)
    host.data_to_send()
    peer = hello_of(make_session(Role.GUEST))._replace(**limits)
    assert host.receive_data(greeting(layout.KIND_HELLO, peer), 0.0) == []
    (refuse,) = read_frames(host.data_to_send())
    assert refuse.kind == layout.KIND_REFUSE
    assert refuse.payload[:16] == peer.nonce
    assert b"limits too small" in refuse.payload
    assert host.state is State.GREETING  # that was a HELLO: anybody's


def test_a_welcome_from_a_peer_we_cannot_talk_to() -> None:
    host = make_session(Role.HOST)
    host.open(0.0)
    mine = greetings_in(host.data_to_send())[0]
    peer = hello_of(make_session(Role.GUEST, name="evil\n"))
    peer = peer._replace(version_min=9, version_max=9, echo=mine.nonce)
    (refused,) = host.receive_data(greeting(layout.KIND_WELCOME, peer), 0.0)
    assert isinstance(refused, Refused) and not refused.by_peer
    assert "evil?" in refused.reason
    assert host.receive_data(greeting(layout.KIND_WELCOME, peer), 0.0) == []  # said once
    assert host.receive_data(greeting(layout.KIND_WELCOME, peer._replace(version_min=1)), 0.0)
    assert host.state is State.OPEN


def test_a_refusal_is_cut_and_fit_for_a_log() -> None:
    host = make_session(Role.HOST)
    host.open(0.0)
    mine = greetings_in(host.data_to_send())[0]
    payload = mine.nonce + b"no\x1b" + b"x" * 900
    refuse = encode_frame(NO_KEY, layout.KIND_REFUSE, 0, 0, 0, 0, 0, 0, payload)
    (refused,) = host.receive_data(refuse, 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason.startswith("no?xxx") and len(refused.reason) == 800
    assert host.receive_data(refuse, 0.0) == []


def test_the_longest_refusal_still_says_what_to_do() -> None:
    """Names are the peers' own; what follows them must not be cut off."""
    pair = Pair(
        make_session(Role.HOST, name="h" * 255),
        make_session(Role.GUEST, name="é" * 120, version_min=3, version_max=4),
    )
    pair.open()
    pair.settle()
    assert pair.host.of(Refused)[0].reason.endswith("upgrade the older one")
    long = make_session(Role.HOST, name="é" * 5000, version_min=3, version_max=4)
    long.open(0.0)
    long.data_to_send()
    long.receive_data(greeting(layout.KIND_HELLO, hello_of(make_session(Role.GUEST))), 0.0)
    (refuse,) = read_frames(long.data_to_send())
    assert len(refuse.payload) <= GREETING_BYTES_MAX


def test_own_limits_must_make_sense() -> None:
    wrongs: tuple[dict[str, Any], ...] = (
        {"message_bytes_max": MESSAGE_BYTES_MIN - 1},
        {"reassembly_bytes_max": MESSAGE_BYTES_MAX - 1},
        {"window_bytes": FRAME_BYTES_MAX - 1},
        {"in_flight_bytes_max": FRAME_BYTES_MAX - 1},
    )
    for wrong in wrongs:
        with pytest.raises(AssertionError):
            make_session(Role.HOST, **wrong)


def test_the_peers_limits_are_kept() -> None:
    pair = Pair(guest=make_session(Role.GUEST, message_bytes_max=MESSAGE_BYTES_MIN)).connect()
    pair.host.session.send(b"x" * MESSAGE_BYTES_MIN)
    with pytest.raises(LimitExceeded) as raised:
        pair.host.session.send(b"x" * (MESSAGE_BYTES_MIN + 1))
    assert raised.value.limit == MESSAGE_BYTES_MIN
    pair.settle()
    assert [len(message) for message in pair.guest.received()] == [MESSAGE_BYTES_MIN]


def test_a_peer_with_small_frames() -> None:
    pair = Pair()
    pair.open(pair.host)
    mine = greetings_in(pair.host.session.data_to_send())[0]
    guest = hello_of(make_session(Role.GUEST))
    guest = guest._replace(echo=mine.nonce, frame_bytes_max=FRAME_BYTES_MIN)
    hand(pair, pair.host, greeting(layout.KIND_WELCOME, guest))
    host = pair.host.session
    hand(pair, pair.host, sealed(host, ACK, credit=10**6))
    host.send(b"x" * 10_000, 1)
    frames = read_frames(host.data_to_send(), host._tx_key)
    assert max(len(frame.payload) for frame in frames) == FRAME_BYTES_MIN - OVERHEAD_BYTES
    assert b"".join(frame.payload for frame in frames) == b"x" * 10_000


# ---------------------------------------------------------------- resumption


def replug(pair: Pair, *ends: End) -> None:
    for end in ends:
        end.session.close()
        end.inbox.clear()
    pair.open(*ends)


@pytest.mark.parametrize("side", ["host", "guest", "both"])
@pytest.mark.parametrize("cut_at", [0, 1, 60, 20_000, 70_000])
def test_a_session_goes_on_from_the_exact_point(side: str, cut_at: int) -> None:
    pair = connected()
    for n in range(5):
        pair.host.session.send(b"%d" % n + b"h" * 20_000, n)
        pair.guest.session.send(b"%d" % n + b"g" * 20_000, n)
    for end in (pair.host, pair.guest):
        pair.write(end)
        del pair.peer(end).inbox[cut_at:]
        pair.deliver(pair.peer(end))
    ends = {"host": (pair.host,), "guest": (pair.guest,), "both": (pair.host, pair.guest)}[side]
    replug(pair, *ends)
    pair.settle()
    pair.advance(3.0)
    assert opened(pair.host.events) == opened(pair.guest.events) == [True]
    for end in (pair.host, pair.guest):
        assert sorted(message[:1] for message in end.received()) == [b"0", b"1", b"2", b"3", b"4"]


def test_what_was_lost_is_sent_again_at_resumption_without_being_asked() -> None:
    pair = connected()
    for n in range(3):
        pair.guest.session.send(b"%d" % n)
    lose(pair, pair.guest)
    replug(pair, pair.host)
    pair.settle()
    assert pair.host.received() == [b"0", b"1", b"2"]
    assert pair.host.session.counters.losses == 0


def test_a_hole_that_opens_again_after_a_resumption_is_seen_again() -> None:
    pair = connected()
    pair.guest.session.send(b"lost")
    lose(pair, pair.guest)
    pair.guest.session.send(b"seen")
    pair.write(pair.guest)
    pair.deliver(pair.host)
    replug(pair, pair.host)
    pair.write(pair.host)
    pair.deliver(pair.guest)
    pair.write(pair.guest)
    pair.deliver(pair.host)
    pair.write(pair.host)
    pair.deliver(pair.guest)  # the key is in force on both sides
    lose(pair, pair.guest)
    pair.guest.session.send(b"seen again")
    pair.write(pair.guest)
    pair.deliver(pair.host)
    assert "REWIND" in kinds(pair.host.session.data_to_send(), pair.host.session)


def test_a_resumed_end_takes_the_credit_it_is_greeted_with() -> None:
    pair = connected()
    pair.guest.session.send(b"x" * 10_000, 1)
    pair.write(pair.guest)
    pair.deliver(pair.host)
    replug(pair, pair.guest)
    pair.write(pair.guest)
    pair.deliver(pair.host)
    before = pair.guest.session._sender.credit
    pair.write(pair.host)
    pair.deliver(pair.guest)
    assert pair.guest.session._sender.credit == before + 10_000 + OVERHEAD_BYTES


def test_a_session_forgets_the_candidate_key_once_a_key_is_in_force() -> None:
    pair = connected()
    for end in (pair.host, pair.guest):
        assert end.session._decoder.candidate is None
        assert end.session._handshake.candidate is None
    replug(pair, pair.guest)
    pair.settle()
    assert pair.host.session._decoder.candidate is None


def test_both_ends_decide_alike_of_what_was_sent_behind_a_hello_that_waits() -> None:
    """The guest, which hears nothing, asks with a HELLO and sends on; the host hears all of that
    but the HELLO, and greets anew. One of them once went on, and the other began anew."""
    pair = connected()
    guest = pair.guest.session
    guest.send(b"0")
    while guest._handshake.hello is None:
        pair.write(pair.guest)
        pair.deliver(pair.host)
        lose(pair, pair.host)
        pair.advance(1.0, settle=False)
    lose(pair, pair.guest)
    for n in range(1, 4):
        guest.send(b"%d" % n)
        pair.write(pair.guest)
        pair.deliver(pair.host)
    lose(pair, pair.host)
    assert guest._handshake.hello is not None, "it has heard something"
    assert len(pair.host.received()) == 4
    replug(pair, pair.host)
    pair.settle()
    assert opened(pair.host.events) == opened(pair.guest.events)
    assert pair.host.session.counters.violations == pair.guest.session.counters.violations == 0
    guest.send(b"after")
    pair.settle()
    assert pair.host.received()[-1] == b"after"


def test_messages_are_taken_while_there_is_no_stream() -> None:
    pair = connected()
    pair.host.session.close()
    pair.host.session.send(b"wait for it")
    assert pair.host.session.data_to_send() == b""
    replug(pair, pair.host)
    pair.settle()
    assert pair.guest.received() == [b"wait for it"]


def test_a_restarted_host_begins_a_new_session() -> None:
    pair = connected()
    pair.guest.session.send(b"in doubt")
    pair.write(pair.guest)
    pair.host = End(make_session(Role.HOST, seed="second run"))  # even with the same instance
    pair.open(pair.host)
    pair.settle()
    assert opened(pair.guest.events) == opened(pair.host.events) == [False]
    assert pair.host.received() == []


def test_the_host_distinguishes_a_clone_from_the_original_guest() -> None:
    """Same memory, same random numbers, same instance; another host's session all the same."""
    pair = connected()
    pair.host.session.send(b"before")
    pair.settle()
    clone = End(copy.deepcopy(pair.guest.session))
    elsewhere = Pair(make_session(Role.HOST, instance=b"elsewhere-host-1", seed="elsewhere"))
    elsewhere.guest = clone
    elsewhere.open(elsewhere.host)
    elsewhere.settle()
    assert opened(clone.events) == opened(elsewhere.host.events) == [False]
    assert clone.session._tx_key != pair.guest.session._tx_key
    # The twin goes on undisturbed, and what the clone says means nothing there.
    clone.session.send(b"from the clone")
    noise = clone.session.data_to_send()
    assert hand(pair, pair.host, noise) == []
    pair.guest.session.send(b"from the twin")
    pair.settle()
    assert pair.host.received() == [b"from the twin"]


def test_a_clone_that_greets_its_twins_host_starts_anew() -> None:
    """Restored from a snapshot after its twin went on: the numbers do not fit."""
    pair = connected()
    clone = copy.deepcopy(pair.guest.session)
    pair.guest.session.send(b"the twin went on")
    pair.settle()
    pair.guest = End(clone)
    replug(pair, pair.host)
    pair.settle()
    assert opened(pair.host.events)[-1] is False
    assert opened(pair.guest.events) == [False]


def test_a_guest_that_was_rolled_back_under_a_live_stream_is_found_by_its_silence() -> None:
    """The monitor's loadvm: both think the session is open, with different keys."""
    pair = connected()
    before = copy.deepcopy(pair.guest.session)
    replug(pair, pair.host)
    pair.settle()
    pair.guest = End(before)  # the memory of before; the stream stays
    pair.host.session.send(b"lost on the way")
    pair.settle()
    assert pair.guest.received() == []
    pair.advance(60.0)
    pair.guest.session.send(b"here")
    pair.host.session.send(b"there")
    pair.settle()
    assert pair.host.received() == [b"here"]
    assert pair.guest.received()[-1] == b"there"


def test_another_instance_cannot_resume_a_session() -> None:
    pair = connected()
    reconfigure(pair.guest.session, instance=b"somebody-else-00")
    replug(pair, pair.guest)
    pair.settle()
    assert opened(pair.host.events) == [False]


def test_a_peer_whose_limits_changed_is_not_the_same_peer() -> None:
    pair = connected()
    reconfigure(pair.guest.session, message_bytes_max=MESSAGE_BYTES_MIN)
    replug(pair, pair.guest)
    pair.settle()
    assert opened(pair.host.events) == [False]


def test_frames_of_an_old_session_are_ignored_in_a_new_one() -> None:
    """QEMU can deliver the same bytes at both hosts."""
    pair = connected()
    pair.guest.session.send(b"once")
    old = pair.write(pair.guest)
    pair.settle()
    replug(pair, pair.host)
    pair.settle()
    skipped = pair.host.session.counters.bytes_skipped
    assert hand(pair, pair.host, old) == []
    assert pair.host.session.counters.bytes_skipped == skipped + len(old)
    assert pair.host.received() == [b"once"]


def test_frames_of_an_old_session_are_ignored_in_the_read_that_brings_the_new_key() -> None:
    """Even in one batch with the frame that proves the new key."""
    pair = connected()
    pair.guest.session.send(b"once")
    old = pair.write(pair.guest)
    pair.settle()
    pair.open(pair.guest)
    pair.write(pair.guest)
    pair.deliver(pair.host)
    pair.write(pair.host)
    pair.deliver(pair.guest)  # the WELCOME: the guest is open, the host is not sure
    pair.guest.session.send(b"twice")
    new = pair.write(pair.guest)
    pair.host.inbox.clear()
    hand(pair, pair.host, new + old)
    pair.settle()
    pair.advance(5.0)
    assert pair.host.received() == [b"once", b"twice"]
    assert pair.host.of(Violation) == []


def test_frames_that_come_twice_are_dropped_and_acknowledged_at_once() -> None:
    pair = connected()
    pair.guest.session.send(b"once")
    data = pair.write(pair.guest)
    pair.settle()
    hand(pair, pair.host, data)
    assert kinds(pair.host.session.data_to_send(), pair.host.session) == ["ACK"]
    assert pair.host.received() == [b"once"]
    assert pair.host.session.counters.duplicates == 1
    assert pair.host.of(Violation) == []


def test_an_old_acknowledgement_that_comes_again_is_harmless() -> None:
    pair = connected()
    old = sealed(pair.host.session, ACK)
    pair.host.session.send(b"one")
    pair.settle()
    pair.advance(1.0)
    assert pair.host.session._sender.base == 1
    assert hand(pair, pair.host, old) == []
    assert pair.host.session.state is State.OPEN


# ---------------------------------------------------------------- losses


def lose(pair: Pair, end: End) -> bytes:
    """What the end has to send never arrives."""
    data = b""
    while more := end.session.data_to_send():
        data += more
    return data


def test_a_hole_is_seen_by_the_next_frame_and_filled() -> None:
    pair = connected()
    for n in range(3):
        pair.guest.session.send(b"lost %d" % n)
    lose(pair, pair.guest)
    pair.guest.session.send(b"arrives")
    pair.settle()
    assert pair.host.received() == [b"lost 0", b"lost 1", b"lost 2", b"arrives"]
    assert pair.host.of(Lost) == [Lost(0, 3)]
    assert pair.host.session.counters.frames_lost == 3
    assert pair.guest.session.counters.frames_resent == 4


def test_a_lost_last_frame_is_found_by_a_probe() -> None:
    pair = connected()
    pair.advance(3.0)
    pair.guest.session.send(b"last words")
    lose(pair, pair.guest)
    pair.advance(2 * PROBE_S + 0.1)
    assert pair.host.received() == [b"last words"]


def test_the_next_probe_repeats_a_lost_rewind() -> None:
    pair = connected()
    pair.guest.session.send(b"lost")
    lose(pair, pair.guest)
    pair.guest.session.send(b"arrives")
    pair.write(pair.guest)
    pair.deliver(pair.host)
    assert kinds(lose(pair, pair.host), pair.host.session) == ["REWIND"]
    pair.advance(3.0)
    assert pair.host.received() == [b"lost", b"arrives"]
    assert len(pair.host.of(Lost)) == 1


def test_a_lost_credit_update_is_asked_for() -> None:
    pair = connected()
    big = b"x" * 300_000
    pair.guest.session.send(big, 1)
    for _ in range(200):
        pair.write(pair.guest)
        pair.deliver(pair.host)
        lose(pair, pair.host)
    assert pair.host.received() == []
    pair.advance(10.0)
    assert pair.host.received() == [big]


def test_an_acknowledgement_overtakes_what_was_to_be_sent_again() -> None:
    pair = connected()
    host = pair.host.session
    for _ in range(3):
        host.send(b"message")
    lose(pair, pair.host)
    hand(pair, pair.host, sealed(host, REWIND))
    hand(pair, pair.host, sealed(host, ACK, ack=2))
    frames = read_frames(host.data_to_send(), host._tx_key)
    assert [frame.seq for frame in frames] == [2]


def test_a_flipped_bit_costs_one_frame() -> None:
    pair = connected()
    for n in range(5):
        pair.guest.session.send(b"message %d" % n)
    pair.write(pair.guest)
    pair.host.inbox[100] ^= 4
    pair.settle()
    assert pair.host.received() == [b"message %d" % n for n in range(5)]
    assert pair.host.session.counters.losses == 1


def test_what_is_in_flight_is_sent_again_at_most_so_often() -> None:
    """A REWIND is 48 bytes, what it asks for is up to 192 KiB."""
    pair = connected()
    host = pair.host.session
    for _ in range(12):
        host.send(b"x" * 15_000, 1)
    first = len(lose(pair, pair.host))
    out = 0
    for _ in range(100):
        hand(pair, pair.host, sealed(host, REWIND))
        out += len(lose(pair, pair.host))
    assert out <= first + 100 * OVERHEAD_BYTES
    pair.now_s += REWIND_S
    hand(pair, pair.host, sealed(host, REWIND))
    assert len(lose(pair, pair.host)) == first


# ---------------------------------------------------------------- violations


def violation(pair: Pair) -> str:
    """Exactly one, and what it says; the two meet again."""
    (told,) = pair.host.of(Violation)
    assert isinstance(told.reason, str)
    assert pair.host.session.state is State.GREETING
    pair.settle()
    pair.host.session.send(b"welcome back", 2)
    pair.settle()
    assert pair.guest.received()[-1:] == [b"welcome back"]
    return told.reason


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([{"ack": 1}], "acknowledged frame 1; 0 were sent"),
        ([{"ack": 2**64 - 1}], "acknowledged frame"),
        ([{"flags": WHOLE, "stream": STREAMS, "payload": b"x"}], "began inside another"),
        ([{"flags": WHOLE}], "was empty"),
        ([{"flags": 0, "payload": b"x"}], "a fragment of no message"),
        ([{"flags": 2, "payload": b"x"}], "a fragment of no message"),
        ([{"flags": 1, "total": 9}], "empty"),
        ([{"flags": 1, "total": 3, "payload": b"xyz"}], "or all of its message"),
        ([{"flags": 1, "total": 0, "payload": b"xyz"}], "or all of its message"),
        ([{"flags": 1, "total": 9, "stream": 99, "payload": b"x"}], "began inside another"),
        ([{"flags": 1, "total": 2**32 - 1, "payload": b"x"}], "over MESSAGE_BYTES_MAX"),
        ([{"flags": 1, "total": 9, "payload": b"x"}] * 2, "began inside another"),
        (
            [{"flags": 1, "total": 9, "payload": b"x"}, {"flags": WHOLE, "payload": b"x"}],
            "began inside another",
        ),
        (
            [{"flags": 1, "total": 9, "payload": b"x"}, {"flags": 0}],
            "longer than their message, or empty",
        ),
        (
            [{"flags": 1, "total": 9, "payload": b"x"}, {"flags": 0, "payload": b"x" * 9}],
            "longer than their message, or empty",
        ),
        (
            [{"flags": 1, "total": 9, "payload": b"x"}, {"flags": 2, "payload": b"x" * 7}],
            "shorter than it said",
        ),
        (
            [
                {"flags": 1, "total": MESSAGE_BYTES_MAX, "payload": b"x", "stream": n}
                for n in range(3)
            ],
            "more begun messages than REASSEMBLY_BYTES_MAX",
        ),
    ],
)
def test_frames_that_a_peer_may_not_send_are_violations(
    frames: list[dict[str, Any]], reason: str
) -> None:
    pair = connected()
    for fields in frames:
        assert pair.host.session.state is State.OPEN
        hand(pair, pair.host, sealed(pair.host.session, DATA, **fields))
    assert reason in violation(pair)


@pytest.mark.parametrize("kind", [ACK, PING, PONG, REWIND])
def test_an_impossible_acknowledgement_in_any_frame(kind: int) -> None:
    pair = connected()
    hand(pair, pair.host, sealed(pair.host.session, kind, ack=5))
    assert "acknowledged" in violation(pair)


def test_more_than_the_credit_is_a_violation() -> None:
    """Credit is what bounds the work a peer can make: it is held to it."""
    pair = connected()
    host = pair.host.session
    payload = b"x" * 10_000
    for _ in range(WINDOW_BYTES // (10_000 + OVERHEAD_BYTES)):
        hand(pair, pair.host, sealed(host, DATA, flags=WHOLE, payload=payload))
    assert pair.host.of(Violation) == []
    hand(pair, pair.host, sealed(host, DATA, flags=WHOLE, payload=payload))
    assert "more than its credit" in violation(pair)


def test_credit_in_a_greeting_is_used() -> None:
    """A resumed peer goes by the greeting until it hears a frame."""
    pair = connected()
    for _ in range(15):
        pair.guest.session.send(b"x" * 10_000, 1)
    pair.write(pair.guest)
    pair.deliver(pair.host)
    pair.guest.inbox.clear()
    lose(pair, pair.host)
    replug(pair, pair.guest)
    for _ in range(24):
        pair.guest.session.send(b"y" * 10_000, 1)
    pair.settle()
    assert pair.host.of(Violation) == []
    assert len(pair.host.received()) == 39


def test_violations_do_not_delay_the_greeting_without_end() -> None:
    """A thousand violations in a second: who comes next is greeted within a second."""
    pair = connected()
    for _ in range(1000):
        hand(pair, pair.host, sealed(pair.host.session, ACK, ack=99))
        assert state_of(pair.host) is State.GREETING
        pair.now_s += 0.001
        guest = make_session(Role.GUEST, seed=f"{pair.now_s}")
        guest.open(pair.now_s)
        hand(pair, pair.host, guest.data_to_send())
        answer = pair.host.session.data_to_send()
        guest.receive_data(answer, pair.now_s)
        hand(pair, pair.host, guest.data_to_send())
        assert state_of(pair.host) is State.OPEN
    hand(pair, pair.host, sealed(pair.host.session, ACK, ack=99))
    at_s = pair.host.session.next_timeout()
    assert at_s is not None and at_s - pair.now_s <= REGREET_S


def test_a_peer_that_sends_nonsense_is_greeted_at_a_bounded_rate() -> None:
    pair = connected()
    hand(pair, pair.host, sealed(pair.host.session, ACK, ack=99))
    assert kinds(pair.write(pair.host), pair.host.session) == ["HELLO"]
    pair.settle()
    hand(pair, pair.host, sealed(pair.host.session, ACK, ack=99))
    assert pair.host.session.data_to_send() == b""
    pair.advance(REGREET_S)
    assert pair.host.session.state is State.OPEN


def test_frames_behind_a_violation_in_the_same_read_are_ignored() -> None:
    pair = connected()
    host = pair.host.session
    bad = sealed(host, PING, ack=5)
    good = sealed(host, DATA, flags=WHOLE, payload=b"too late")
    hand(pair, pair.host, bad + good)
    assert pair.host.received() == []
    assert len(pair.host.of(Violation)) == 1


# ---------------------------------------------------------------- fragments, priorities


def test_a_large_message_arrives_whole() -> None:
    pair = connected()
    message = bytes(range(256)) * 8192
    pair.host.session.send(message, 7)
    assert pair.host.session.backlog_bytes == len(message)
    pair.settle()
    assert pair.guest.received(7) == [message]
    assert pair.host.session.backlog_bytes == 0
    pair.advance(1.0)
    assert pair.host.session.unacknowledged == 0


@pytest.mark.parametrize("size", [PAYLOAD_BYTES_MAX - 1, PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX + 1])
def test_messages_around_the_size_of_a_frame(size: int) -> None:
    pair = connected()
    pair.host.session.send(b"a" * size, 1)
    pair.host.session.send(b"b" * size, CONTROL)
    pair.settle()
    assert sorted(pair.guest.received()) == [b"a" * size, b"b" * size]


@pytest.mark.parametrize("stream", [CONTROL, 2])
def test_a_large_message_delays_a_small_one_by_one_fragment(stream: int) -> None:
    pair = connected()
    host = pair.host.session
    host.send(b"L" * 1_000_000, 1)
    pair.guest.inbox += host.data_to_send(FRAME_BYTES_MAX)  # handed out already
    host.send(b"small", stream)
    frames = read_frames(host.data_to_send(), host._tx_key)
    assert b"small" in [frame.payload for frame in frames[:2]]


def test_a_large_message_goes_on_delaying_small_ones_by_no_more_than_that() -> None:
    """However many small ones went before."""
    pair = connected()
    host = pair.host.session
    host.send(b"L" * 3_000_000, 1)
    for n in range(100):
        host.send(b"small %d" % n, 2)
        frames = read_frames(host.data_to_send(2 * FRAME_BYTES_MAX), host._tx_key)
        assert b"small %d" % n in [frame.payload for frame in frames[:2]]
        pair.now_s += 1.0
        hand(pair, pair.host, sealed(host, ACK, ack=host._sender.tail, credit=10**9))


def test_small_messages_do_not_starve_large_ones() -> None:
    pair = connected()
    host = pair.host.session
    host.send(b"L" * 100_000, 1)
    for _ in range(500):
        host.send(b"s", 2)
    frames = []
    while data := host.data_to_send():
        frames += read_frames(data, host._tx_key)
    assert sum(frame.stream == 1 for frame in frames[: 7 * 17 + 1]) == 7


def test_large_messages_take_turns() -> None:
    pair = connected()
    host = pair.host.session
    for stream in (1, 2, 3):
        host.send(b"L" * 60_000, stream)
    frames = []
    while data := host.data_to_send():
        frames += read_frames(data, host._tx_key)
    assert [frame.stream for frame in frames[:6]] == [1, 2, 3, 1, 2, 3]


def test_the_peers_reassembly_memory_is_never_overrun() -> None:
    pair = connected()
    for stream in range(STREAMS):
        pair.host.session.send(bytes([stream]) * MESSAGE_BYTES_MAX, stream)
    most = 0
    while len(pair.guest.received()) < STREAMS:
        data = pair.host.session.data_to_send()
        pair.guest.inbox += data
        pair.deliver(pair.guest)
        most = max(most, pair.guest.session._receiver.reassembly)
        pair.write(pair.guest)
        pair.deliver(pair.host)
        assert data, "it stalled"
    assert most == 2 * MESSAGE_BYTES_MAX
    assert pair.guest.of(Violation) == []


def test_a_large_control_message_waits_for_reassembly_memory_too() -> None:
    pair = connected()
    host = pair.host.session
    host.send(b"a" * MESSAGE_BYTES_MAX, 1)
    host.send(b"b" * MESSAGE_BYTES_MAX, 2)
    for _ in range(4):
        pair.guest.inbox += host.data_to_send()
        pair.deliver(pair.guest)
    host.send(b"c" * 20_000, CONTROL)
    pair.settle()
    assert pair.guest.of(Violation) == []
    assert len(pair.guest.received()) == 3


def test_a_message_that_waits_for_memory_is_not_overtaken_for_ever() -> None:
    """First come, first served: smaller large messages behind it wait as well."""
    pair = connected(message_bytes_max=MESSAGE_BYTES_MIN, reassembly_bytes_max=MESSAGE_BYTES_MIN)
    host = pair.host.session
    host.send(b"1" * 20_000, 1)
    host.send(b"2" * 30_000, 2)
    for stream in (3, 4):
        host.send(b"big" + b"B" * (MESSAGE_BYTES_MIN - 3), stream)
    for _ in range(50):
        host.send(b"1" * 20_000, 1)
        host.send(b"2" * 30_000, 2)
    pair.settle()
    order = [message[:3] for message in pair.guest.received()]
    assert [at for at, head in enumerate(order) if head == b"big"] == [2, 3]


def test_messages_of_one_stream_stay_in_order_whatever_their_size() -> None:
    pair = connected()
    sizes = [1, 40_000, 3, 17_000, 90_000, 2, PAYLOAD_BYTES_MAX, 5]
    for stream in (CONTROL, 1, 2):
        for n, size in enumerate(sizes):
            pair.host.session.send(bytes([n]) * size, stream)
    pair.settle()
    for stream in (CONTROL, 1, 2):
        assert [(m[0], len(m)) for m in pair.guest.received(stream)] == list(enumerate(sizes))


def test_tiny_fragments_cost_the_sender_more_than_the_receiver() -> None:
    """A message of 4 MiB in fragments of 2 bytes holds what it holds, not fifty times that."""
    pair = connected()
    host = pair.host.session
    hand(pair, pair.host, sealed(host, DATA, flags=1, total=9999, payload=b"xx"))
    for _ in range(1000):
        hand(pair, pair.host, sealed(host, DATA, flags=0, payload=b"xx"))
    (partial,) = host._receiver._partials.values()
    held = [*partial._parts, partial._small]
    assert sum(part.__sizeof__() for part in held) < 2 * 2002 + 100


@pytest.mark.parametrize("small", [1, PART_BYTES_MIN - 1])
def test_small_fragments_between_large_ones_are_few_objects(small: int) -> None:
    """Whatever their order, each object holds as much as a large fragment, or stands beside one."""
    pair = connected()
    host = pair.host.session
    sizes = [PART_BYTES_MIN, small, small, small, PART_BYTES_MIN, 2000, small, small]
    message = b"".join(bytes([n]) * size for n, size in enumerate(sizes))
    at, flags = 0, 1
    for size in sizes:
        payload = message[at : at + size]
        total = len(message) + 1
        hand(pair, pair.host, sealed(host, DATA, flags=flags, total=total, payload=payload))
        at, flags = at + size, 0
    (partial,) = host._receiver._partials.values()
    assert partial.received == len(message)
    assert len(partial._parts) <= 2 * sum(size >= PART_BYTES_MIN for size in sizes)
    hand(pair, pair.host, sealed(host, DATA, flags=2, payload=b"."))
    assert pair.host.received() == [message + b"."]


# ---------------------------------------------------------------- credit


def test_an_unread_peer_is_written_to_up_to_its_credit_only() -> None:
    pair = connected(in_flight_bytes_max=10**9, window_bytes=100_000)
    pair.host.session.send(b"x" * 500_000, 1)
    sent = pair.write(pair.host)
    assert 100_000 - FRAME_BYTES_MAX <= len(sent) <= 100_000
    pair.deliver(pair.guest)
    pair.write(pair.guest)
    pair.deliver(pair.host)
    more = pair.write(pair.host)
    assert 100_000 - FRAME_BYTES_MAX <= len(more) <= 100_000 + FRAME_BYTES_MAX


def test_in_flight_is_bounded_whatever_the_credit() -> None:
    pair = connected(window_bytes=10**9, in_flight_bytes_max=50_000)
    pair.host.session.send(b"x" * 500_000, 1)
    assert len(pair.write(pair.host)) <= 50_000
    pair.advance(2.0)
    assert pair.guest.received() == [b"x" * 500_000]


def test_a_host_does_not_take_back_the_credit_it_greeted_with() -> None:
    """It has too much unsent to grant more: what it has granted, the guest may use."""
    pair = connected()
    host, guest = pair.host.session, pair.guest.session
    guest.send(b"x" * 100_000, 1)
    pair.write(pair.guest)
    pair.deliver(pair.host)  # the host's next word is its greeting on a new stream
    for _ in range(2):
        pair.guest.inbox.clear()
        pair.host.inbox.clear()
        pair.open()
        host.send(b"y" * 2 * BACKLOG_BYTES_MAX, 2)
        for end in (pair.host, pair.guest, pair.host):
            pair.peer(end).inbox += end.session.data_to_send()
            pair.deliver(pair.peer(end))
        assert guest.state is State.OPEN
    for _ in range(3):
        guest.send(b"z" * 80_000, 1)
    assert host._receiver.cost + len(pair.write(pair.guest)) > WINDOW_BYTES  # the first grant
    pair.deliver(pair.host)
    assert pair.host.of(Violation) == []


def test_a_host_grants_no_credit_to_a_guest_that_does_not_read() -> None:
    pair = connected()
    host = pair.host.session
    for n in range(BACKLOG_BYTES_MAX // 1_000_000 + 1):
        host.send(b"x" * 1_000_000, 1 + n)
    granted = host._receiver.grant(host.backlog_bytes)
    pair.guest.session.send(b"y" * 200_000, 1)
    while data := pair.guest.session.data_to_send():
        hand(pair, pair.host, data)
    assert host._receiver.grant(host.backlog_bytes) == granted
    host.send(b"x" * 100, 0)
    assert sealed_credit(host) == granted
    # It reads again: all is well.
    pair.guest.inbox.clear()
    pair.advance(5.0)
    assert len(pair.guest.received()) == 3
    assert pair.host.received() == [b"y" * 200_000]


def sealed_credit(session: Session) -> int:
    return read_frames(session.data_to_send(), session._tx_key)[-1].credit


def test_a_guest_always_grants_credit_so_that_two_full_ends_do_not_deadlock() -> None:
    pair = connected()
    for stream in range(1, 5):
        pair.host.session.send(b"h" * 2_000_000, stream)
        pair.guest.session.send(b"g" * 2_000_000, stream)
    pair.settle()
    pair.advance(5.0)
    assert len(pair.host.received()) == len(pair.guest.received()) == 4


def test_send_refuses_messages_over_its_limits() -> None:
    session = make_session(Role.HOST)
    session.send(b"x" * MESSAGE_BYTES_MAX)
    with pytest.raises(LimitExceeded, match="MESSAGE_BYTES_MAX"):
        session.send(b"x" * (MESSAGE_BYTES_MAX + 1))
    with pytest.raises(AssertionError):
        session.send(b"")
    assert session.backlog_bytes == MESSAGE_BYTES_MAX


@given(st.integers(2 * FRAME_BYTES_MAX, 3 * FRAME_BYTES_MAX))
def test_writes_are_whole_frames_within_the_limit(limit: int) -> None:
    pair = connected()
    host = pair.host.session
    for size in (1, 100, 16_000, 50_000, 300):
        host.send(b"x" * size, 1)
        host.send(b"y" * size, 2)
    received = 0
    for _ in range(3):
        data = host.data_to_send(limit)
        assert len(data) <= limit
        frames = read_frames(data, host._tx_key)
        assert sum(len(frame.payload) + OVERHEAD_BYTES for frame in frames) == len(data)
        received += len(data)
    hand(pair, pair.host, sealed(host, REWIND))
    resent = host.data_to_send(limit)
    assert len(resent) <= limit


# ---------------------------------------------------------------- time


def test_an_acknowledgement_waits_to_travel_with_a_frame() -> None:
    pair = connected()
    pair.guest.session.send(b"question")
    pair.write(pair.guest)
    pair.deliver(pair.host)
    assert pair.host.session.data_to_send() == b""
    assert pair.host.session.next_timeout() == pytest.approx(pair.now_s + ACK_DELAY_S)
    pair.host.session.send(b"answer")
    assert kinds(pair.write(pair.host), pair.host.session) == ["DATA"]
    pair.deliver(pair.guest)
    assert pair.guest.session.unacknowledged == 0


def test_an_acknowledgement_is_sent_alone_after_its_delay() -> None:
    pair = connected()
    pair.guest.session.send(b"telling")
    pair.write(pair.guest)
    pair.deliver(pair.host)
    pair.now_s += ACK_DELAY_S
    assert pair.host.session.handle_timeout(pair.now_s) == []
    assert kinds(pair.host.session.data_to_send(), pair.host.session) == ["ACK"]


def test_a_timer_that_has_fired_does_not_fire_again_while_the_stream_is_full() -> None:
    """Else a peer that does not read makes us spin."""
    pair = connected()
    pair.guest.session.send(b"telling")
    pair.write(pair.guest)
    pair.deliver(pair.host)
    session = pair.host.session
    for _ in range(20):
        at_s = session.next_timeout()
        assert at_s is not None
        session.handle_timeout(at_s)
        again_s = session.next_timeout()
        assert again_s is not None and again_s > at_s
    assert session.data_to_send() != b""


def test_the_timer_of_an_acknowledgement_that_went_with_data_does_nothing() -> None:
    pair = connected()
    pair.guest.session.send(b"question")
    pair.write(pair.guest)
    pair.deliver(pair.host)
    pair.host.session.send(b"answer")
    pair.write(pair.host)
    pair.host.session.handle_timeout(pair.now_s + ACK_DELAY_S)
    assert pair.host.session.data_to_send() == b""


def test_an_idle_session_sends_pings() -> None:
    pair = connected()
    pair.advance(60.0)
    for end in (pair.host, pair.guest):
        assert 5 <= end.session.counters.pings_sent <= 60 / PING_IDLE_S
        assert end.of(Silent) == []


def asking_host() -> Pair:
    """A host that asks idle guests together, connected."""
    host = make_session(Role.HOST, ask_tick_s=ASK_TICK_S, silence_s=4.0)
    pair = Pair(host, make_session(Role.GUEST), now_s=1000.1).connect()
    pair.forget_events()
    return pair


def test_a_host_asks_idle_guests_at_common_times_and_before_they_would_ask() -> None:
    pair = asking_host()
    host, asked_s = pair.host.session, list[float]()
    for _ in range(40):
        before = host.counters.pings_sent
        pair.advance(1.5)
        if host.counters.pings_sent > before:
            heard_s = host._liveness.heard_s
            assert heard_s % ASK_TICK_S == 0
            asked_s.append(heard_s)
    gaps = [later - earlier for earlier, later in pairwise(asked_s)]
    assert len(gaps) > 10 and all(PING_IDLE_S - 2 * ASK_TICK_S <= gap < PING_IDLE_S for gap in gaps)
    assert pair.guest.session.counters.pings_sent == 0


@pytest.mark.parametrize("later_s", [0.0, 0.01, 0.13, 0.249, 2.0])
def test_a_host_that_asks_at_common_times_tells_silence_no_later(later_s: float) -> None:
    pair = asking_host()
    pair.advance(later_s)
    pair.guest.session.send(b"last words")
    pair.settle()
    heard_s = pair.now_s
    while not pair.host.of(Silent):
        at_s = pair.host.session.next_timeout()
        assert at_s is not None and at_s >= pair.now_s
        pair.now_s = at_s
        pair.host.events += pair.host.session.handle_timeout(at_s)
        pair.host.session.data_to_send()
    assert 4.0 < pair.now_s - heard_s <= PING_IDLE_S + 4.0
    assert pair.host.of(Silent)[0].for_s == pytest.approx(pair.now_s - heard_s)


def test_who_waits_for_an_acknowledgement_is_asked_at_once_not_at_a_tick() -> None:
    pair = asking_host()
    pair.host.session.send(b"lost")
    pair.host.session.data_to_send()
    pair.advance(2 * PROBE_S + 0.01, settle=False)
    assert pair.host.session.counters.pings_sent == 1
    pair.settle()
    assert pair.guest.received() == [b"lost"]


def test_an_acknowledgement_may_wait_longer_on_a_channel() -> None:
    pair = connected(ack_delay_s=0.25)
    pair.guest.session.send(b"telling")
    pair.settle()
    assert pair.host.session.next_timeout() == pytest.approx(pair.now_s + 0.25)
    pair.advance(0.26)
    assert pair.guest.session.unacknowledged == 0
    assert pair.guest.session.counters.pings_sent == 0


def test_one_that_may_send_no_more_does_not_wait_for_its_acknowledgement() -> None:
    """However long they may wait: a window is shorter than what may be in flight."""
    pair = connected(ack_delay_s=1000.0)
    for _ in range(64):
        pair.guest.session.send(bytes(16 * 1024))
    pair.settle()
    assert len(pair.host.received()) == 64


def test_the_first_message_after_a_silence_is_not_probed_at_once() -> None:
    """send() is not told the time: the last time it knows is long ago."""
    pair = connected()
    pair.advance(PING_IDLE_S - 1.0)
    pair.now_s += 0.9  # nothing happened
    pair.guest.session.send(b"hello again")
    pair.write(pair.guest)
    before = pair.guest.session.counters.pings_sent
    for _ in range(5):
        at_s = pair.guest.session.next_timeout()
        assert at_s is not None
        if at_s > pair.now_s:
            break
        pair.guest.session.handle_timeout(pair.now_s)
    else:
        raise AssertionError("it spins")
    assert pair.guest.session.counters.pings_sent == before
    assert at_s <= pair.now_s + PROBE_S


def test_silence_is_reported_and_does_not_end_the_session() -> None:
    pair = connected()
    events: list[Any] = []
    pings: list[float] = []
    host = pair.host.session
    end_s = pair.now_s + 6 * 3600.0  # a paused VM
    while pair.now_s < end_s:
        at_s = host.next_timeout()
        assert at_s is not None and at_s > pair.now_s - 1e-6
        pair.now_s = at_s
        events += host.handle_timeout(at_s)
        if "PING" in kinds(pair.write(pair.host), host):
            pings.append(at_s)
    gaps = [round(later - earlier) for earlier, later in pairwise(pings)]
    assert gaps[:4] == [5, 10, 20, 30] and set(gaps[4:]) == {30}
    silent = [event for event in events if isinstance(event, Silent)]
    assert len(silent) == len(events) == pytest.approx(6 * 3600 / SILENCE_S, abs=3)
    assert silent[-1].for_s == pytest.approx(6 * 3600, abs=40)
    host.send(b"good morning")
    pair.settle()
    pair.advance(5.0)
    assert pair.guest.received() == [b"good morning"]
    assert pair.host.session.state is State.OPEN
    assert len(pair.host.of(Heard)) <= 1
    assert False not in opened(pair.host.events)


def test_a_session_with_unacknowledged_frames_probes_sooner() -> None:
    pair = connected()
    pair.advance(1.0)
    pair.host.session.send(b"anybody there?")
    lose(pair, pair.host)
    pings: list[float] = []
    start_s = pair.now_s
    while len(pings) < 6:
        pair.now_s = pair.host.session.next_timeout() or 0.0
        pair.host.session.handle_timeout(pair.now_s)
        if "PING" in kinds(lose(pair, pair.host), pair.host.session):
            pings.append(pair.now_s - start_s)
    gaps = [round(later - earlier) for earlier, later in pairwise(pings)]
    assert pings[0] <= 2 * PROBE_S
    assert gaps == [1, 2, 4, 8, 16]


def test_a_peer_that_speaks_again_is_heard() -> None:
    pair = connected()
    pair.advance(40.0, settle=False)
    assert pair.host.of(Silent)
    pair.guest.inbox.clear()
    lose(pair, pair.host)
    hand(pair, pair.host, sealed(pair.host.session, ACK))
    assert len(pair.host.of(Heard)) == 1
    assert kinds(lose(pair, pair.host), pair.host.session) == []


def test_after_some_unanswered_pings_a_hello_goes_with_them() -> None:
    pair = connected()
    host = pair.host.session
    written = []
    for _ in range(12):
        pair.now_s = host.next_timeout() or 0.0
        host.handle_timeout(pair.now_s)
        written += kinds(lose(pair, pair.host), host)
    assert written[:REGREET_PINGS] == ["PING"] * REGREET_PINGS
    assert set(zip(written[REGREET_PINGS::2], written[REGREET_PINGS + 1 :: 2], strict=True)) == {
        ("HELLO", "PING")
    }
    assert host.state is State.OPEN


@pytest.mark.parametrize("paused_s", [30.0, 3 * 3600.0])
def test_a_paused_guest_wakes_up_to_a_pile_of_hellos(paused_s: float) -> None:
    pair = connected()
    pair.guest.session.send(b"before")
    pair.settle()
    until_s = pair.now_s + paused_s
    while pair.now_s < until_s:
        pair.now_s = pair.host.session.next_timeout() or 0.0
        pair.host.events += pair.host.session.handle_timeout(pair.now_s)
        pair.write(pair.host)
    answer = len(pair.guest.inbox)
    pair.deliver(pair.guest)
    assert len(pair.write(pair.guest)) < max(answer, 1000)
    pair.host.session.send(b"after")
    pair.settle()
    pair.advance(3.0)
    assert pair.guest.received() == [b"after"]
    assert False not in opened(pair.host.events)


@pytest.mark.parametrize("start_s", [1000.0, 1000.31, 12345.678, 9e6 + 0.1])
def test_a_session_that_waits_for_hours_never_spins(start_s: float) -> None:
    """Sums of times are rounded: what is due must not stay due."""
    host = make_session(Role.HOST)
    host.open(start_s)
    now_s, fired = start_s, 0
    while now_s < start_s + 7200.0:
        at_s = host.next_timeout()
        assert at_s is not None
        now_s = max(now_s, at_s)
        host.handle_timeout(now_s)
        again_s = host.next_timeout()
        assert again_s is not None and again_s > now_s
        fired += 1
    assert fired < 7200


def test_a_host_that_waits_for_its_guest_says_so() -> None:
    pair = Pair()
    pair.open(pair.host)
    pair.advance(35.0, settle=False)
    assert [round(event.for_s) for event in pair.host.of(Silent)] == [10, 20, 30]


def test_a_session_survives_a_clock_that_stops_or_jumps() -> None:
    pair = connected()
    for leap_s in (0.0, 1e9, 1e12):
        pair.now_s += leap_s
        for end in (pair.host, pair.guest):
            end.events += end.session.handle_timeout(pair.now_s)
        pair.settle()
        pair.host.session.send(b"on we go")
        pair.settle()
    assert pair.guest.received() == [b"on we go"] * 3


# ---------------------------------------------------------------- counters


def test_the_counters_count_what_their_names_say() -> None:
    pair = connected()
    pair.host.session.send(b"one")
    pair.settle()
    counts = pair.host.session.counters.as_dict()
    assert counts["messages_sent"] == 1 and counts["sessions"] == 1
    assert pair.guest.session.counters.as_dict()["messages_received"] == 1
    assert set(counts) == set(COUNTED)


def test_a_config_is_what_the_session_says_of_itself() -> None:
    config = Config(Role.GUEST, b"i" * 16, "name")
    session = Session(config, lambda size: b"n" * size)
    told = hello_of(session)
    assert (told.role, told.instance, told.nonce, told.name) == (2, b"i" * 16, b"n" * 16, "name")
    assert told.echo == told.session == ZERO_ID
    assert isinstance(Received(0, b"x").message, bytes)
