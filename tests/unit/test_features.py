"""What greetings say that an end can do: payloads without a CRC, larger frames, raw bodies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rig.older import older_session
from tests.unit.pair import Entropy, Pair, connected, make_session, opened, read_frames
from vchan.session import Config, Opened, Role, Session, Violation
from vchan.wire import layout
from vchan.wire.frames import (
    FRAME_BYTES_MAX,
    LOCAL_FRAME_BYTES_MAX,
    NO_KEY,
    OVERHEAD_BYTES,
    PLAIN_PAYLOADS,
    RAW_BODIES,
    Decoder,
    Frame,
    Key,
    encode_frame,
)

KEY = Key(3, 5)
PLAIN = Key(3, 5, is_plain=True)
LOCAL: dict[str, Any] = {
    "frame_bytes_max": LOCAL_FRAME_BYTES_MAX,
    "features": PLAIN_PAYLOADS | RAW_BODIES,
}


def data_frame(key: Key, payload: bytes) -> bytes:
    return encode_frame(key, layout.KIND_DATA, 3, 1, len(payload), 0, 0, 0, payload)


def decoded(key: Key, data: bytes, frame_bytes_max: int = FRAME_BYTES_MAX) -> list[Frame]:
    decoder = Decoder(frame_bytes_max)
    decoder.key = key
    return decoder.receive_data(data)


# ---------------------------------------------------------------- frames


@given(st.binary(max_size=300))
def test_a_plain_payload_has_no_crc(payload: bytes) -> None:
    frame = data_frame(PLAIN, payload)
    assert frame[-4:] == bytes(4)
    assert frame[:-4] == data_frame(KEY, payload)[:-4]
    (found,) = decoded(PLAIN, frame)
    assert found.payload == payload


def test_a_plain_frame_means_nothing_to_who_looks_at_payloads() -> None:
    assert decoded(KEY, data_frame(PLAIN, b"payload")) == []
    assert len(decoded(PLAIN, data_frame(KEY, b"payload"))) == 1  # it does not look


def test_the_header_of_a_plain_frame_is_looked_at() -> None:
    for at in range(44):
        hurt = bytearray(data_frame(PLAIN, b"payload"))
        hurt[at] ^= 1
        assert decoded(PLAIN, bytes(hurt)) == []


def test_a_greetings_payload_is_looked_at_always() -> None:
    hello = bytearray(encode_frame(NO_KEY, layout.KIND_HELLO, 0, 0, 0, 0, 0, 0, b"who"))
    assert len(decoded(PLAIN, bytes(hello))) == 1
    hello[45] ^= 1
    assert decoded(PLAIN, bytes(hello)) == []


@pytest.mark.parametrize("limit", [FRAME_BYTES_MAX, LOCAL_FRAME_BYTES_MAX])
def test_a_frame_over_the_receivers_own_limit_is_none(limit: int) -> None:
    payload = bytes(limit - OVERHEAD_BYTES)
    assert len(decoded(KEY, data_frame(KEY, payload), limit)) == 1
    assert decoded(KEY, data_frame(KEY, payload + b"x"), limit) == []


# ---------------------------------------------------------------- sessions

features = st.integers(0, 3)
sizes = st.sampled_from([FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1, LOCAL_FRAME_BYTES_MAX])


@given(features, features, sizes, sizes, st.lists(st.integers(1, 150_000), max_size=4))
def test_ends_of_any_features_understand_each_other(
    mine: int, theirs: int, my_frame: int, their_frame: int, lengths: list[int]
) -> None:
    host = make_session(Role.HOST, features=mine, frame_bytes_max=my_frame)
    guest = make_session(Role.GUEST, features=theirs, frame_bytes_max=their_frame)
    pair = Pair(host, guest).connect()
    for size in lengths:
        for end, peer in pair.ends():
            message = bytes([size % 256]) * size
            end.session.send(message, 1)
            frames = read_all(pair.write(end), end.session)
            assert all(len(f.payload) + OVERHEAD_BYTES <= my_frame for f in frames)
            assert all(len(f.payload) + OVERHEAD_BYTES <= their_frame for f in frames)
            pair.settle()
            same = peer.received(1)[-1] == message
            assert same, "altered"
    is_plain = bool(mine & theirs & PLAIN_PAYLOADS)
    for end, _ in pair.ends():
        assert end.session._tx_key.is_plain is is_plain
        assert not end.of(Violation)
    assert [event.peer.features for event in pair.host.of(Opened)] == [theirs]
    assert [event.peer.takes_raw for event in pair.guest.of(Opened)] == [bool(mine & RAW_BODIES)]


def read_all(data: bytes, session: Session) -> list[Frame]:
    decoder = Decoder(LOCAL_FRAME_BYTES_MAX)
    decoder.key = session._tx_key
    return decoder.receive_data(data)


def test_64_kib_are_one_frame_between_local_ends() -> None:
    pair = connected(**LOCAL)
    pair.host.session.send(bytes(64 * 1024 + 300), 1)
    assert len(read_all(pair.write(pair.host), pair.host.session)) == 1
    pair.settle()
    assert len(pair.guest.received(1)[0]) == 64 * 1024 + 300


@pytest.mark.parametrize("role", list(Role))
def test_an_older_peer_gets_small_frames_with_their_crc(role: Role) -> None:
    made = {each: make_session(each, **LOCAL) for each in Role}
    made[role] = older_session(Config(role, b"older-instance-1", "older", **LOCAL), Entropy("o"))
    pair = Pair(made[Role.HOST], made[Role.GUEST]).connect()
    for end, peer in pair.ends():
        end.session.send(bytes(100_000), 2)
        found = read_frames(pair.write(end), Key(*end.session._tx_key[:2]))  # looks at payloads
        assert sum(len(frame.payload) for frame in found) == 100_000
        pair.settle()
        assert len(peer.received(2)[0]) == 100_000


def test_what_is_lost_is_found_in_plain_sessions_too() -> None:
    pair = connected(**LOCAL)
    pair.host.session.send(b"one", 1)
    pair.write(pair.host)
    pair.guest.inbox.clear()
    pair.host.session.send(b"two", 1)
    pair.settle()
    pair.advance(5.0)
    assert pair.guest.received(1) == [b"one", b"two"]


def test_a_plain_session_goes_on_at_the_next_stream() -> None:
    pair = connected(**LOCAL)
    pair.host.session.send(b"lost", 1)
    pair.host.session.data_to_send()
    for end, _ in pair.ends():
        end.session.close()
        end.inbox.clear()
    pair.open()
    pair.settle()
    assert opened(pair.guest.events) == [True]
    assert pair.guest.received(1) == [b"lost"]


def test_other_features_are_another_peer() -> None:
    """It may not understand what was under way."""
    pair = connected(**LOCAL)
    guest = pair.guest.session
    for end, _ in pair.ends():
        end.session.close()
        end.inbox.clear()
    guest._handshake._config = guest.config._replace(features=0)
    pair.open()
    pair.settle()
    assert opened(pair.host.events) == [False]


@pytest.mark.parametrize(
    "limits",
    [
        {"frame_bytes_max": FRAME_BYTES_MAX - 1},
        {"frame_bytes_max": LOCAL_FRAME_BYTES_MAX, "window_bytes": FRAME_BYTES_MAX},
    ],
)
def test_a_frame_must_hold_a_flush_and_fit_the_window(limits: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        make_session(Role.HOST, **limits)
