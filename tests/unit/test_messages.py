"""Messages: the same answer as their definitions; any bytes at all are survived."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan import protocol
from vchan.rpc import messages as rpc_messages
from vchan.rpc.messages import (
    CALL,
    IDS_MAX,
    NAME_BYTES_MAX,
    NAMES_KNOWN_MAX,
    NO_AGENT,
    RAW,
    TEXT_BYTES_MAX,
    TOPICS_MAX,
    BadMessage,
    Cancel,
    Holding,
    Message,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    Unknown,
    decode,
    encode,
    id_chunks,
    reply_stream,
    request_stream,
)
from vchan.session import CONTROL, MESSAGE_BYTES_MIN, STREAMS
from vchan.wire.frames import PAYLOAD_BYTES_MAX

u8, u32 = st.integers(0, 255), st.integers(0, 2**32 - 1)
ids = st.binary(min_size=16, max_size=16)
names = st.text(max_size=60)
id_lists = st.lists(ids, max_size=20).map(tuple)
topics = st.builds(Topic, exchange=names, name=st.text(min_size=1, max_size=60))
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Request,
        id=ids,
        flags=u8.filter(lambda flags: flags & (RAW | CALL) != RAW),
        timeout_ms=u32,
        monitor_ms=u32,
        exchange=names,
        topic=names,
        server=names,
        body=st.binary(max_size=100),
    ),
    st.builds(Receipt, id=ids),
    st.builds(Reply, id=ids, flags=u8, body=st.binary(max_size=100)),
    st.builds(Returned, id=ids, reason=u8, text=st.text(max_size=100)),
    st.builds(Cancel, id=ids),
    st.builds(Settled, ids=id_lists),
    st.builds(Holding, ids=id_lists),
    st.builds(Subscribe, topics=st.lists(topics, max_size=10).map(tuple)),
)

KINDS = {
    Request: 1,
    Receipt: 2,
    Reply: 3,
    Returned: 4,
    Cancel: 5,
    Settled: 6,
    Subscribe: 7,
    Holding: 8,
}


def by_definition(message: Message) -> bytes:
    """What the definition makes of it."""
    return bytes(protocol.MESSAGE_BY_KIND[KINDS[type(message)]].build(definition_of(message)))


def definition_of(message: Message) -> dict[str, Any]:
    match message:
        case Request():
            raw = [name.encode() for name in (message.exchange, message.topic, message.server)]
            return {
                "head": {
                    "flags": message.flags,
                    "id": message.id,
                    "timeout_ms": message.timeout_ms,
                    "monitor_ms": message.monitor_ms,
                    "exchange_length": len(raw[0]),
                    "topic_length": len(raw[1]),
                    "server_length": len(raw[2]),
                },
                "exchange": raw[0],
                "topic": raw[1],
                "server": raw[2],
                "body": message.body,
            }
        case Reply():
            return {"head": {"flags": message.flags, "id": message.id}, "body": message.body}
        case Returned():
            head = {"reason": message.reason, "id": message.id}
            return {"head": head, "text": message.text.encode()}
        case Receipt() | Cancel():
            return {"head": {"id": message.id}}
        case Settled() | Holding():
            return {
                "head": {"kind": KINDS[type(message)], "count": len(message.ids)},
                "ids": message.ids,
            }
        case Subscribe():
            return {
                "head": {"count": len(message.topics)},
                "topics": [
                    {
                        "head": {
                            "exchange_length": len(topic.exchange.encode()),
                            "topic_length": len(topic.name.encode()),
                        },
                        "exchange": topic.exchange.encode(),
                        "topic": topic.name.encode(),
                    }
                    for topic in message.topics
                ],
            }


@given(messages)
def test_the_codec_and_the_definition_agree(message: Message) -> None:
    data = encode(message)
    assert data == by_definition(message)
    assert int(protocol.Message.parse(data).kind) == KINDS[type(message)]
    assert by_parsing(protocol.parse_message(data), type(message)) == without_unnamed(message)
    assert decode(data) == message


def by_parsing(parsed: Any, kind: type) -> Message:
    """The message in what the definition reads."""
    head = parsed.head
    if kind is Request:
        return Request(
            head.id,
            flags_of(head.flags, protocol.RequestFlags),
            head.timeout_ms,
            head.monitor_ms,
            bytes(parsed.exchange).decode(),
            bytes(parsed.topic).decode(),
            bytes(parsed.server).decode(),
            parsed.body,
        )
    if kind is Reply:
        return Reply(head.id, flags_of(head.flags, protocol.ReplyFlags), parsed.body)
    if kind is Returned:
        return Returned(head.id, int(head.reason), bytes(parsed.text).decode())
    if kind in (Settled, Holding):
        return (Settled if kind is Settled else Holding)(tuple(parsed.ids))
    if kind is Subscribe:
        return Subscribe(
            tuple(
                Topic(bytes(topic.exchange).decode(), bytes(topic.topic).decode())
                for topic in parsed.topics
            )
        )
    return (Receipt if kind is Receipt else Cancel)(head.id)


def flags_of(parsed: Any, definition: Any) -> int:
    """The flags as a number."""
    return sum(int(bit) for name, bit in definition.flags.items() if parsed[name])


def without_unnamed(message: Message) -> Message:
    """The definition drops flags it has no name for; the codec keeps them."""
    if isinstance(message, Request):
        return message.changed(flags=message.flags & sum(protocol.RequestFlags.flags.values()))
    if isinstance(message, Reply):
        flags = message.flags & sum(protocol.ReplyFlags.flags.values())
        return Reply(message.id, flags, message.body)
    return message


@given(st.one_of(st.binary(max_size=100), messages.map(encode)), st.data())
def test_any_bytes_are_a_message_or_a_malformed_one(data: bytes, draw: st.DataObject) -> None:
    hurt = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 3))):
        if hurt:
            hurt[draw.draw(st.integers(0, len(hurt) - 1))] = draw.draw(u8)
    decoded = decode(bytes(hurt[: draw.draw(st.integers(0, len(hurt)))]))
    if isinstance(decoded, BadMessage):
        assert decoded.reason
    elif isinstance(decoded, Unknown):
        assert decoded.kind not in range(1, 9)
    else:
        encode(decoded)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x01" * 20, "Request: too short"),
        (encode(Request(bytes(16), 0, 0, 0, "ex", "to", "se", b""))[:-1], "than its names"),
        (encode(Request(bytes(16), 0, 0, 0, "??", "", "", b"")).replace(b"??", b"\xff?"), "UTF-8"),
        (b"\x02" + bytes(15), "kind 2, 16 bytes"),
        (b"\x02" + bytes(17), "kind 2, 18 bytes"),
        (b"\x03" + bytes(16), "kind 3, 17 bytes"),
        (b"\x04" + bytes(16), "kind 4, 17 bytes"),
        (b"\x05" + bytes(15), "kind 5, 16 bytes"),
        (b"\x06\x00", "Settled: wrong length"),
        (b"\x06\x00\x01", "Settled: wrong length"),
        (b"\x08\x00\x01" + bytes(17), "Holding: wrong length"),
        (b"\x08" + (IDS_MAX + 1).to_bytes(2, "big") + bytes(16 * (IDS_MAX + 1)), "Holding"),
        (b"\x07\x00", "Subscribe: too short"),
        (b"\x07\xff\xff", "65535 topics, TOPICS_MAX is 64"),
        (b"\x07\x00\x01\x01", "Subscribe: shorter than its topics"),
        (b"\x07\x00\x01\x01\x01e", "Subscribe: shorter than its topics, or one without a name"),
        (b"\x07\x00\x01\x01\x00e", "one without a name"),
        (b"\x07\x00\x01\x01\x01\xfft", "UTF-8"),
        (b"\x07\x00\x00?", "Subscribe: longer than its topics"),
    ],
)
def test_malformed_messages_are_rejected(data: bytes, reason: str) -> None:
    decoded = decode(data)
    assert isinstance(decoded, BadMessage)
    assert reason in decoded.reason


@pytest.mark.parametrize("kind", [0, 9, 0x63, 255])
def test_an_unknown_kind_is_not_a_malformed_message(kind: int) -> None:
    assert decode(bytes([kind]) * 30) == Unknown(kind, 30)


def test_the_largest_lists_pass() -> None:
    many = tuple(n.to_bytes(16, "big") for n in range(IDS_MAX))
    assert decode(encode(Settled(many))) == Settled(many)
    assert len(encode(Holding(many))) <= PAYLOAD_BYTES_MAX
    name = "n" * NAME_BYTES_MAX
    everything = Subscribe((Topic(name, name),) * TOPICS_MAX)
    assert decode(encode(everything)) == everything
    assert len(encode(everything)) <= MESSAGE_BYTES_MIN
    with pytest.raises(AssertionError):
        encode(Settled((*many, bytes(16))))


def test_a_long_text_is_cut_at_a_character_on_both_sides() -> None:
    returned = decode(encode(Returned(bytes(16), NO_AGENT, "x" + "é" * TEXT_BYTES_MAX)))
    assert isinstance(returned, Returned)
    assert returned.text == "x" + "é" * (TEXT_BYTES_MAX // 2 - 1)
    long = decode(b"\x04\x01" + bytes(16) + b"y" * 5000)
    assert isinstance(long, Returned) and long.text == "y" * TEXT_BYTES_MAX
    odd = decode(b"\x04\x01" + bytes(16) + b"\xff")
    assert isinstance(odd, Returned) and odd.text == "\ufffd"


def test_a_request_knows_whether_it_is_a_call() -> None:
    request = Request(bytes(16), CALL, 0, 0, "", "topic", "", b"")
    assert request.is_call
    assert not request.changed(flags=0xFE).is_call
    assert request.changed(exchange="nova").target == Topic("nova", "topic")


def decoded(*, exchange: str = "nova", topic: str = "t", server: str = "") -> Request:
    made = Request(bytes(16), CALL, 5, 0, exchange, topic, server, b"body")
    request = decode(encode(made))
    assert isinstance(request, Request) and request == made
    return request


def test_a_request_goes_on_as_it_came_until_its_body_is_asked_for() -> None:
    data = encode(Request(bytes(16), CALL, 5, 0, "nova", "topic", "server", b"body"))
    request = decode(data)
    assert isinstance(request, Request)
    assert encode(request) is data
    assert (request.body, request.encoded) == (b"body", b""), "a large one would be kept twice"
    assert request.body == b"body"
    assert encode(request) == data


@pytest.mark.parametrize(
    "change",
    [
        {"id": bytes(15) + b"x"},
        {"flags": RAW | CALL},
        {"timeout_ms": 4},
        {"monitor_ms": 1},
        {"exchange": "cinder"},
        {"topic": "other"},
        {"server": "one"},
        {"body": b""},
    ],
)
def test_what_was_changed_goes_on_changed(change: dict[str, Any]) -> None:
    request = decode(encode(Request(bytes(16), CALL, 5, 0, "nova", "topic", "", b"body")))
    assert isinstance(request, Request)
    changed = request.changed(**change)
    again = decode(encode(changed))
    assert isinstance(again, Request)
    values = dict(zip(Request.__match_args__, again.fields(), strict=True))
    assert values == {**dict(zip(Request.__match_args__, request.fields(), strict=True)), **change}
    assert (again.target, again.stream) == (changed.target, changed.stream)
    assert changed.target == Topic(changed.exchange, changed.topic)


def test_names_of_the_same_letters_are_told_apart() -> None:
    for exchange, topic, server in (("ab", "c", "d"), ("a", "bc", "d"), ("a", "b", "cd")):
        request = decoded(exchange=exchange, topic=topic, server=server)
        assert (request.exchange, request.topic, request.server) == (exchange, topic, server)
        assert request.target == Topic(exchange, topic)


def test_names_are_known_up_to_a_bound() -> None:
    for number in range(3 * NAMES_KNOWN_MAX):
        assert decoded(topic=f"topic-{number}").target == Topic("nova", f"topic-{number}")
        assert len(rpc_messages._known_names) <= NAMES_KNOWN_MAX
    assert decoded(topic="topic-0").stream == request_stream("topic-0")


@given(names, ids)
def test_requests_and_replies_keep_off_the_control_stream(topic: str, request_id: bytes) -> None:
    for stream in (request_stream(topic), reply_stream(request_id)):
        assert CONTROL < stream < STREAMS


@given(st.integers(0, 3 * IDS_MAX))
def test_long_lists_of_ids_are_split_over_messages(count: int) -> None:
    everything = [n.to_bytes(16, "big") for n in range(count)]
    lots = id_chunks(iter(everything))
    assert [request_id for lot in lots for request_id in lot] == everything
    assert all(0 < len(lot) <= IDS_MAX for lot in lots)
