"""The codec: the same answer as the definition, whatever the chunks, whatever the damage."""

from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from vchan import protocol
from vchan.wire import layout
from vchan.wire.frames import (
    FLUSH,
    FRAME_BYTES_MAX,
    GREETING_BYTES_MAX,
    HEADER_BYTES,
    NO_KEY,
    OVERHEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    ZERO_ID,
    Decoder,
    Frame,
    Greeting,
    Key,
    decode_greeting,
    encode_frame,
    session_keys,
)

KEY = Key(0x01020304, 0x05060708)
OTHER = Key(0xCAFEBABE, 0x8BADF00D)

u8, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))
ids = st.binary(min_size=16, max_size=16)
sealed_kinds = st.sampled_from(
    [
        layout.KIND_DATA,
        layout.KIND_ACK,
        layout.KIND_PING,
        layout.KIND_PONG,
        layout.KIND_REWIND,
    ]
)
greeting_kinds = st.sampled_from([layout.KIND_HELLO, layout.KIND_WELCOME, layout.KIND_REFUSE])
payloads = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=40).map(lambda data: data + protocol.MAGIC + data),
    st.integers(0, PAYLOAD_BYTES_MAX).map(bytes),
)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    """A frame that the decoder takes."""
    if draw(st.booleans()):
        kind, payload = draw(greeting_kinds), draw(st.binary(max_size=300))
    else:
        kind, payload = draw(sealed_kinds), draw(payloads)
    return Frame(
        kind, draw(u8), draw(u8), draw(u32), draw(u64), draw(u64), draw(u64), payload, False
    )


def seal(frame: Frame, key: Key = KEY) -> bytes:
    if frame.kind <= layout.KIND_REFUSE:
        key = NO_KEY
    return encode_frame(key, *frame.fields()[:-1])


def ping(seq: int = 0, key: Key = KEY, payload: bytes = b"") -> bytes:
    return encode_frame(key, layout.KIND_PING, 0, 0, 0, seq, 0, 0, payload)


def data(payload: bytes, seq: int = 0, key: Key = KEY) -> bytes:
    return encode_frame(key, layout.KIND_DATA, 3, 0, len(payload), seq, 0, 0, payload)


def greeting_frame(payload: bytes = b"who", kind: int = layout.KIND_HELLO) -> bytes:
    return encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, payload)


def decoder(key: Key | None = KEY, candidate: Key | None = None) -> Decoder:
    made = Decoder()
    made.key, made.candidate = key, candidate
    return made


def feed(decoder: Decoder, chunks: Iterable[bytes]) -> list[Frame]:
    """Everything that comes out. At no time is more held than one frame can have."""
    out: list[Frame] = []
    for chunk in chunks:
        batch = decoder.receive_data(chunk)
        while batch:
            out += batch
            batch = decoder.receive_data(b"")
        assert held(decoder) < FRAME_BYTES_MAX
    return out


def held(decoder: Decoder) -> int:
    chunks = decoder._chunks
    assert len(chunks) <= max(1, decoder._held)
    if len(chunks) < 100 or len(chunks) % 100 == 0:  # else frames in single bytes take minutes
        assert sum(map(len, chunks)) == decoder._held
    return decoder._held


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """`data` in chunks of these sizes, again and again."""
    chunks, at, turn = [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        chunks.append(data[at : at + size])
        at += size
        turn += 1
    return chunks


chunk_sizes = st.lists(st.one_of(st.integers(1, 60), st.integers(1, 40_000)), min_size=1)


# ---------------------------------------------------------------- against the definition


def by_definition(frame: Frame, key: Key) -> bytes:
    header = protocol.FrameHeader.build(
        {
            "kind": frame.kind,
            "flags": frame.flags,
            "stream": frame.stream,
            "length": len(frame.payload),
            "total": frame.total,
            "seq": frame.seq,
            "ack": frame.ack,
            "credit": frame.credit,
        }
    )
    header_crc = crc32(header, key.header_seed)
    payload_crc = crc32(frame.payload, header_crc ^ key.payload_seed)
    crc: Any = protocol.Crc
    return b"".join((header, crc.build(header_crc), frame.payload, crc.build(payload_crc)))


@given(frames())
def test_the_codec_writes_what_the_definition_says(frame: Frame) -> None:
    key = NO_KEY if frame.kind <= layout.KIND_REFUSE else KEY
    assert seal(frame) == by_definition(frame, key)


@given(frames())
def test_the_definition_reads_what_the_codec_writes(frame: Frame) -> None:
    parsed = protocol.Frame.parse(seal(frame))
    assert int(parsed.header.kind) == frame.kind
    flags = sum(
        getattr(layout, f"FLAG_{name}") for name in ("FIRST", "LAST") if parsed.header.flags[name]
    )
    assert flags == frame.flags & 3
    for name in ("stream", "total", "seq", "ack", "credit"):
        assert parsed.header[name] == getattr(frame, name)
    assert parsed.payload == frame.payload


@given(frames())
def test_what_is_written_is_read(frame: Frame) -> None:
    assert feed(decoder(), [seal(frame)]) == [frame]


greetings = st.builds(
    Greeting,
    version_min=u8,
    version_max=u8,
    role=u8,
    instance=ids,
    nonce=ids,
    echo=ids,
    session=ids,
    recv_next=u64,
    send_base=u64,
    send_next=u64,
    credit=u64,
    frame_bytes_max=u32,
    message_bytes_max=u32,
    reassembly_bytes_max=u32,
    name=st.text(max_size=60),
    attached=st.text(max_size=60),
    features=st.just(0) | u32,
)


@given(greetings)
def test_greetings_agree_with_their_definition(greeting: Greeting) -> None:
    fields = greeting._asdict()
    names = {"name": fields.pop("name"), "attached": fields.pop("attached")}
    features = fields.pop("features")
    written = protocol.Greeting.build({"head": fields, **names, "features": features or None})
    assert greeting.encode() == written
    assert decode_greeting(written) == greeting
    parsed = protocol.Greeting.parse(greeting.encode())
    assert (parsed.name, parsed.attached) == (greeting.name, greeting.attached)
    assert (
        parsed.features is None
        if not features
        else bool(parsed.features.RAW_BODIES) == (features & layout.FEATURE_RAW_BODIES != 0)
    )
    for name, value in fields.items():
        got = parsed.head[name]
        assert (int(got) if name == "role" else got) == value  # a named role reads as its name


@given(greetings, st.binary(max_size=20))
def test_a_later_version_may_add_to_a_greeting(greeting: Greeting, more: bytes) -> None:
    features = b"" if greeting.features else bytes(4)
    assert decode_greeting(greeting.encode() + features + more) == greeting


@given(greetings, st.data())
def test_a_truncated_greeting_is_rejected(greeting: Greeting, draw: st.DataObject) -> None:
    whole = greeting._replace(features=0).encode()
    assert decode_greeting(whole[: draw.draw(st.integers(0, len(whole) - 1))]) is None


@given(greetings, st.binary(max_size=3))
def test_a_greeting_without_all_of_its_features_has_none(greeting: Greeting, part: bytes) -> None:
    plain = greeting._replace(features=0)
    assert decode_greeting(plain.encode() + part) == plain


@given(st.binary(max_size=400))
def test_parsing_any_bytes_as_a_greeting_never_raises(payload: bytes) -> None:
    decode_greeting(payload)


def plain_greeting(name: str = "", attached: str = "") -> Greeting:
    return Greeting(
        1, 1, 1, ZERO_ID, ZERO_ID, ZERO_ID, ZERO_ID, 0, 0, 0, 0, 0, 0, 0, name, attached
    )


def test_a_greeting_whose_name_is_not_utf8_is_rejected() -> None:
    whole = plain_greeting("xy").encode()
    assert decode_greeting(whole.replace(b"xy", b"\xff\xff")) is None


@pytest.mark.parametrize("cut_by", [1, 3, 4])
def test_a_greeting_that_ends_inside_its_names_is_rejected(cut_by: int) -> None:
    assert decode_greeting(plain_greeting("ab", "cd").encode()[:-cut_by]) is None


def test_long_names_are_cut_at_a_character() -> None:
    greeting = decode_greeting(plain_greeting("é" * 200, "\ud800").encode())
    assert greeting is not None
    assert greeting.name == "é" * 127
    assert greeting.attached == "?"
    assert len(plain_greeting("é" * 200, "x" * 300).encode()) <= GREETING_BYTES_MAX


# ---------------------------------------------------------------- keys


@given(ids, ids, ids)
def test_the_keys_depend_on_both_sides_nonces(host: bytes, guest: bytes, other: bytes) -> None:
    keys = session_keys(host, guest)
    assert (session_keys(other, guest) == keys) == (other == host)
    assert (session_keys(host, other) == keys) == (other == guest)


def test_the_seeds_are_made_from_the_nonces() -> None:
    host = bytes(range(16))
    assert session_keys(host, ZERO_ID) == (
        Key(0x00010203, 0x04050607),
        Key(0x08090A0B, 0x0C0D0E0F),
    )


# ---------------------------------------------------------------- any chunks


@given(st.lists(frames(), max_size=6), chunk_sizes)
def test_any_chunking_gives_the_same_frames(sent: list[Frame], sizes: list[int]) -> None:
    stream = b"".join(map(seal, sent))
    assert feed(decoder(), cut(stream, sizes)) == sent


@given(st.lists(st.tuples(frames(), payloads), max_size=6), chunk_sizes)
def test_noise_between_frames_is_skipped(sent: list[tuple[Frame, bytes]], sizes: list[int]) -> None:
    stream = b"".join(noise + seal(frame) for frame, noise in sent)
    made = decoder()
    assert feed(made, cut(stream, sizes)) == [frame for frame, _ in sent]
    assert made.bytes_skipped == sum(len(noise) for _, noise in sent)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_decoder_keeps_half_a_magic_at_the_end_of_a_read(size: int) -> None:
    noise = b"x" * 60
    stream = noise + ping(7)
    made = decoder()
    border = len(noise) + size
    assert feed(made, [stream[:border], stream[border:]]) == feed(decoder(), [ping(7)])
    assert made.bytes_skipped == len(noise)


def test_the_decoder_skips_what_only_begins_like_a_magic_at_the_end_of_a_read() -> None:
    made = decoder()
    noise = b"x" * 60 + protocol.MAGIC[:3] + b"y" + protocol.MAGIC[:1]
    assert [frame.seq for frame in feed(made, [noise[:63], noise[63:], ping(9)])] == [9]
    assert made.bytes_skipped == len(noise)


def test_an_empty_read_yields_no_frame() -> None:
    made = decoder()
    for _ in range(100):
        assert made.receive_data(b"") == []
    assert made._chunks == []
    made.receive_data(b"\xb6")
    for _ in range(100):
        assert made.receive_data(b"") == []
    assert made._chunks == [b"\xb6"]


# ---------------------------------------------------------------- damage


@st.composite
def damage(draw: st.DrawFn, stream: bytes) -> bytes:
    """The stream with bits flipped, bytes put in, taken out, cut off, or put elsewhere."""
    hurt = bytearray(stream)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(hurt)))
        span = draw(st.integers(1, 300))
        match draw(st.sampled_from(["flip", "insert", "delete", "truncate", "splice", "repeat"])):
            case "flip" if at < len(hurt):
                hurt[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                hurt[at:at] = draw(st.binary(max_size=60))
            case "delete":
                del hurt[at : at + span]
            case "truncate":
                del hurt[at:]
            case "splice":
                source = draw(st.integers(0, len(stream)))
                hurt[at:] = stream[source:]
            case "repeat":
                hurt[at:at] = hurt[at : at + span]
            case _:
                pass
    return bytes(hurt)


@given(st.lists(frames(), min_size=1, max_size=4), st.data(), chunk_sizes)
def test_the_decoder_finds_the_next_good_frame_after_damage_and_a_flush(
    sent: list[Frame], draw: st.DataObject, sizes: list[int]
) -> None:
    hurt = draw.draw(damage(b"".join(map(seal, sent))))
    good = [ping(1), data(b"good", 2), greeting_frame(), data(b"better", 3)]
    expected = feed(decoder(), good)
    edge = 300  # where it begins and ends; between them all of it is alike, and cut more coarsely
    chunks = cut(hurt + FLUSH[:edge], sizes)
    chunks += cut(FLUSH[edge:-edge], [50 * size for size in sizes])
    chunks += cut(FLUSH[-edge:] + b"".join(good), sizes)
    assert b"".join(chunks) == hurt + FLUSH + b"".join(good)
    out = feed(decoder(), chunks)
    assert out[-len(good) :] == expected
    event(f"of {len(sent)} damaged frames came through: {len(out) - len(good)}")
    for frame in out[: -len(good)]:
        assert frame in sent  # damaged ones never come out as something else


@given(frames(), st.data())
def test_a_flush_turns_a_torn_frame_into_a_damaged_one(frame: Frame, draw: st.DataObject) -> None:
    whole = seal(frame)
    torn = whole[: draw.draw(st.integers(0, len(whole) - 1))]
    out = feed(decoder(), [torn, FLUSH, ping(5)])
    assert out[-1].seq == 5 and out[-1].kind == layout.KIND_PING
    assert out[:-1] in ([], [frame])  # the whole frame only if what was missing were zeros


@given(frames(), st.data())
def test_the_other_half_of_a_torn_frame_is_skipped(frame: Frame, draw: st.DataObject) -> None:
    whole = seal(frame)
    rest = whole[draw.draw(st.integers(1, len(whole))) :]
    out = feed(decoder(), [rest, ping(5)])
    assert [got.seq for got in out] == [5]


def test_the_decoder_does_not_wait_for_the_bytes_of_a_damaged_length() -> None:
    hurt = bytearray(data(b"x"))
    hurt[10] ^= 0x20  # 8 KiB more
    assert [frame.seq for frame in feed(decoder(), [bytes(hurt), ping(3)])] == [3]


@pytest.mark.parametrize("length", [PAYLOAD_BYTES_MAX + 1, 2**32 - 1])
def test_a_length_over_the_limit_is_rejected(length: int) -> None:
    header = protocol.FrameHeader.build(
        {
            "kind": layout.KIND_DATA,
            "flags": 3,
            "stream": 0,
            "length": length,
            "total": 0,
            "seq": 0,
            "ack": 0,
            "credit": 0,
        }
    )
    crc: Any = protocol.Crc
    stream = header + crc.build(crc32(header, KEY.header_seed))
    made = decoder()
    assert [frame.seq for frame in feed(made, [stream, ping(3)])] == [3]
    assert made.bytes_skipped == HEADER_BYTES


def test_an_unknown_layout_is_rejected() -> None:
    header = bytearray(ping(1)[: HEADER_BYTES - 4])
    header[4] = 2
    crc: Any = protocol.Crc
    header_crc = crc32(header, KEY.header_seed)
    stream = header + crc.build(header_crc) + crc.build(crc32(b"", header_crc ^ KEY.payload_seed))
    assert [frame.seq for frame in feed(decoder(), [bytes(stream), ping(3)])] == [3]


def test_a_bad_payload_is_counted_and_searched_for_frames() -> None:
    inner = ping(4)
    hurt = bytearray(data(b"12345" + inner))
    hurt[-1] ^= 1
    made = decoder()
    assert [frame.seq for frame in feed(made, [bytes(hurt), ping(5)])] == [4, 5]
    assert made.bad_payloads == 1
    assert made.bytes_skipped == HEADER_BYTES + 5 + 4


def test_a_payload_crc_is_bound_to_its_header() -> None:
    """The payload of one frame behind the header of another, both whole: no frame."""
    one, two = data(b"one", 1), data(b"two", 2)
    assert feed(decoder(), [one[:HEADER_BYTES] + two[HEADER_BYTES:], FLUSH]) == []


def test_a_hole_and_a_repeat_of_one_length_are_found() -> None:
    """Header and end are in their places, and what is between is not what was sent: what was read
    from a ring is lost with its socket, and the ring's next buffer comes twice."""
    pieces = [bytes([letter]) * 1000 for letter in b"abcd"]
    whole = data(b"".join(pieces))
    spliced = whole.replace(pieces[1], pieces[2])
    assert len(spliced) == len(whole)
    assert spliced[:HEADER_BYTES] + spliced[-4:] == whole[:HEADER_BYTES] + whole[-4:]
    made = decoder()
    assert [frame.seq for frame in feed(made, [spliced, ping(3)])] == [3]
    assert made.bad_payloads == 1


# ---------------------------------------------------------------- smuggling


@given(st.lists(frames(), min_size=1, max_size=3), st.data())
def test_frames_inside_a_torn_payload_never_decode(
    smuggled: list[Frame], draw: st.DataObject
) -> None:
    """Whoever fills a payload does not know the key. Greetings alone are unsealed."""
    inside = b"".join(seal(frame, OTHER) for frame in smuggled)[: PAYLOAD_BYTES_MAX - 100]
    whole = data(b"......" + inside + b"......")
    torn = whole[: draw.draw(st.integers(0, len(whole) - 1))]
    out = feed(decoder(), [torn, FLUSH, ping(5)])
    assert all(frame.kind <= layout.KIND_REFUSE for frame in out[:-1])
    assert out[-1].seq == 5


def test_unsealed_frames_never_decode_without_or_with_a_key() -> None:
    stream = b"".join(encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, b"") for kind in range(4, 10))
    assert feed(decoder(None), [stream]) == []
    assert feed(decoder(), [stream]) == []


def test_bytes_that_resemble_a_greeting_hide_few_of_the_frames_behind_them() -> None:
    """The tail of a torn frame may hold a greeting's header that claims much."""
    claim = greeting_frame(bytes(GREETING_BYTES_MAX))[:HEADER_BYTES]
    out = feed(decoder(), [claim, *(ping(n) for n in range(40))])
    assert [frame.seq for frame in out][-15:] == list(range(25, 40))
    too_much = greeting_frame(bytes(GREETING_BYTES_MAX + 1))[:HEADER_BYTES]
    assert [frame.seq for frame in feed(decoder(), [too_much, ping(0)])] == [0]


# ---------------------------------------------------------------- keys that change


def test_a_greeting_ends_a_batch() -> None:
    made = decoder(None)
    stream = greeting_frame() + ping(1, OTHER)
    assert [frame.kind for frame in made.receive_data(stream)] == [layout.KIND_HELLO]
    made.key = OTHER
    assert [frame.seq for frame in made.receive_data(b"")] == [1]


def test_the_candidates_first_frame_ends_a_batch() -> None:
    """Bytes of the old session behind it (a duplicate, say) must not pass as the new one's."""
    made = decoder(KEY, OTHER)
    stream = ping(1) + ping(2, OTHER) + ping(3) + ping(4, OTHER)
    first = made.receive_data(stream)
    assert [(frame.seq, frame.candidate) for frame in first] == [(1, False), (2, True)]
    made.key, made.candidate = OTHER, None
    assert [frame.seq for frame in made.receive_data(b"")] == [4]


def test_a_frame_sealed_with_neither_key_is_skipped() -> None:
    made = decoder(KEY, OTHER)
    assert feed(made, [ping(1, Key(1, 2))]) == []
    assert made.bytes_skipped == OVERHEAD_BYTES


def test_reset_forgets_the_keys_and_the_unfinished_frame() -> None:
    made = decoder(KEY, OTHER)
    made.receive_data(ping(1)[:-1])
    assert held(made) == OVERHEAD_BYTES - 1
    made.reset()
    assert (made.key, made.candidate, held(made)) == (None, None, 0)
    assert feed(made, [greeting_frame()]) != []
