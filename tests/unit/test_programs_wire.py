"""What is said to the services exec and shell: the codec, and what a guest may say when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.services.framing import BadFrame, FrameReader, ServiceFrame, encode_frame
from vchan.services.programs import (
    ARGUMENTS_MAX,
    DATA_BYTES_MAX,
    ERROR,
    INPUT_BYTES_MAX,
    OUTPUT,
    OUTPUT_BYTES_MAX,
    SIGNALS,
    AttachTo,
    CommandWord,
    Forget,
    GuestWord,
    Input,
    InputEnd,
    Leave,
    Left,
    ListPrograms,
    OutputPart,
    ProgramDialogue,
    ProgramEnd,
    ProgramList,
    Refusal,
    Resized,
    Room,
    Running,
    SendSignal,
    Size,
    Start,
    TerminalWanted,
    Written,
    decode_asked,
    decode_told,
    encode_program,
    problem_of,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "programs.json"
RUNNING = Running("00ff", True, 5, (7, 9), 60.0)

offsets = st.integers(0, (1 << 63) - 1)
sizes = st.builds(Size, st.integers(1, 10_000), st.integers(1, 10_000))
texts = st.text(max_size=50)
keys = st.text("0123456789abcdefXYZ", min_size=1, max_size=64)
data = st.binary(min_size=1, max_size=500)
asked = st.one_of(
    st.builds(
        Start,
        st.lists(texts, max_size=5).map(tuple),
        st.none() | st.builds(TerminalWanted, texts, sizes),
        texts,
        st.dictionaries(texts, texts, max_size=3),
        texts,
    ),
    st.builds(AttachTo, texts, st.none() | sizes),
    st.just(ListPrograms()),
    st.builds(Input, data),
    st.just(InputEnd()),
    st.builds(Resized, sizes),
    st.builds(SendSignal, st.sampled_from(sorted(SIGNALS))),
    st.builds(Written, st.sampled_from((OUTPUT, ERROR)), offsets),
    st.just(Leave()),
    st.just(Forget()),
)
told = st.one_of(
    st.builds(
        Running, keys, st.booleans(), offsets, st.tuples(offsets, offsets), st.floats(0, 1e8)
    ),
    st.builds(OutputPart, st.sampled_from((OUTPUT, ERROR)), data),
    st.builds(Room, offsets),
    st.builds(ProgramEnd, st.none() | st.integers(0, 255), st.none() | st.integers(1, 64), texts),
    st.builds(Refusal, texts),
    st.builds(ProgramList, st.lists(st.dictionaries(texts, texts), max_size=3).map(tuple)),
    st.just(Left()),
)


@given(asked)
def test_a_commands_word_is_read_as_it_was_written(message: CommandWord) -> None:
    (frame,) = FrameReader().feed(encode_program(message))
    assert decode_asked(frame) == message
    assert problem_of(message) == ""
    with pytest.raises(BadFrame):
        decode_told(frame)


@given(told)
def test_a_guests_word_is_read_as_it_was_written(message: GuestWord) -> None:
    (frame,) = FrameReader().feed(encode_program(message))
    assert decode_told(frame) == message
    with pytest.raises(BadFrame):
        decode_asked(frame)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "id",
                    "input",
                    "outputs",
                    "argv",
                    "terminal",
                    "size",
                    "status",
                    "signal",
                    "text",
                    "rows",
                ]
            ),
            inner,
        )
    ),
)


@given(
    st.integers(0, 80),
    st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()),
)
def test_whatever_a_message_holds_it_is_one_or_refused(kind: int, payload: bytes) -> None:
    for decode in (decode_asked, decode_told):
        try:
            decode(ServiceFrame(kind, payload))
        except BadFrame as error:
            assert str(error)


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (Input(b"x"), b""),
        (Input(b"x"), bytes(DATA_BYTES_MAX + 1)),
        (InputEnd(), b"x"),
        (Resized(Size(1, 1)), b"\0\0\0\1"),
        (Resized(Size(1, 1)), b"\xff\xff\0\1"),
        (SendSignal(2), b"\x0b"),
        (SendSignal(2), b"\2\2"),
        (Written(1, 0), bytes(9)),
        (Written(1, 0), bytes(3)),
        (Start(), b"{"),
        (Start(), b"[" * 10_000),
        (Start(), b"[]"),
        (Start(), json.dumps(Start(("x",) * (ARGUMENTS_MAX + 1))._asdict()).encode()),
        (Start(), json.dumps(Start(user="x" * 5000)._asdict()).encode()),
        (Start(), json.dumps({**Start()._asdict(), "environment": {"a": 1}}).encode()),
        (Start(), json.dumps({**Start()._asdict(), "terminal": {"type": "x", "size": None}})),
        (AttachTo(""), json.dumps({"id": "", "size": [1]})),
        (AttachTo(""), json.dumps({"id": "", "size": [1, True]})),
    ],
)
def test_what_a_command_may_not_say(message: CommandWord, payload: bytes | str) -> None:
    kind = encode_program(message)[0]
    raw = payload if isinstance(payload, bytes) else payload.encode()
    with pytest.raises(BadFrame):
        decode_asked(ServiceFrame(kind, raw))


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (OutputPart(1, b"x"), b"\1"),
        (OutputPart(1, b"x"), b"\3x"),
        (OutputPart(1, b"x"), b"\1" + bytes(DATA_BYTES_MAX + 1)),
        (Room(0), bytes(7)),
        (Left(), b"x"),
        (RUNNING, json.dumps({**RUNNING._asdict(), "outputs": [1]})),
        (RUNNING, json.dumps({**RUNNING._asdict(), "outputs": [1, -1]})),
        (RUNNING, json.dumps({**RUNNING._asdict(), "input": 1 << 63})),
        (RUNNING, json.dumps({**RUNNING._asdict(), "has_terminal": 1})),
        (RUNNING, json.dumps({**RUNNING._asdict(), "detached_s": 1e300})),
        (RUNNING, json.dumps({**RUNNING._asdict(), "detached_s": float("nan")})),
        (ProgramEnd(0, None), json.dumps({"status": 256, "signal": None, "text": ""})),
        (ProgramEnd(0, None), json.dumps({"status": True, "signal": None, "text": ""})),
        (ProgramEnd(0, None), json.dumps({"status": None, "signal": 65, "text": ""})),
        (ProgramList(()), json.dumps({"rows": [1]})),
    ],
)
def test_what_a_guest_may_not_say(message: GuestWord, payload: bytes | str) -> None:
    kind = encode_program(message)[0]
    raw = payload if isinstance(payload, bytes) else payload.encode()
    with pytest.raises(BadFrame):
        decode_told(ServiceFrame(kind, raw))


def test_the_bytes_are_those_of_the_vectors() -> None:
    from tests.vectors.generate import programs

    kept: dict[str, Any] = json.loads(VECTORS.read_text())
    assert kept == programs()
    assert len(kept["messages"]) >= 17
    for each in kept["messages"]:
        (frame,) = FrameReader().feed(bytes.fromhex(each["message"]))
        decode = decode_asked if each["from"] == "command" else decode_told
        assert type(decode(frame)).__name__ == each["kind"]


# ---------------------------------------------------------------- what may come when


def dialogue(*messages: GuestWord) -> ProgramDialogue:
    made = ProgramDialogue()
    for message in messages:
        assert made.receive(encode_program(message)) == [message]
    return made


def refused(made: ProgramDialogue, message: GuestWord) -> str:
    with pytest.raises(BadFrame) as caught:
        made.receive(encode_program(message))
    return str(caught.value)


@pytest.mark.parametrize("message", [OutputPart(1, b"x"), Room(9), ProgramEnd(0, None), Left()])
def test_nothing_is_heard_of_a_program_that_does_not_run(message: GuestWord) -> None:
    assert "does not run" in refused(dialogue(), message)


@pytest.mark.parametrize(
    "last", [ProgramEnd(0, None), Refusal("no"), ProgramList(()), Left()], ids=str
)
@pytest.mark.parametrize("message", [RUNNING, OutputPart(1, b"x"), Refusal("no")], ids=str)
def test_nothing_is_heard_behind_the_last_word(last: GuestWord, message: GuestWord) -> None:
    made = dialogue(RUNNING, last)
    assert made.is_over
    assert "behind the last word" in refused(made, message)


def test_a_program_begins_once() -> None:
    assert "runs already" in refused(dialogue(RUNNING), RUNNING)


@pytest.mark.parametrize("which", [OUTPUT, ERROR])
def test_output_is_bounded_by_what_is_not_written(which: int) -> None:
    made = dialogue(RUNNING)
    part = OutputPart(which, bytes(DATA_BYTES_MAX))
    for _ in range(OUTPUT_BYTES_MAX // DATA_BYTES_MAX):
        made.receive(encode_program(part))
    assert made.unwritten == OUTPUT_BYTES_MAX
    start = RUNNING.outputs[which - 1]
    assert made.writes(which, 1) == Written(which, start + 1)
    made.receive(encode_program(OutputPart(which, b"x")))
    assert "more output" in refused(made, OutputPart(which, b"x"))


def test_input_is_sent_as_there_is_room() -> None:
    made = dialogue(RUNNING)
    assert made.room == 0
    made.receive(encode_program(Room(RUNNING.input + 10)))
    assert made.room == 10
    made.sends(4)
    assert made.room == 6
    assert "room" in refused(made, Room(RUNNING.input + 9))
    made.receive(encode_program(Room(RUNNING.input + 4 + INPUT_BYTES_MAX)))
    assert "room" in refused(made, Room(RUNNING.input + 5 + INPUT_BYTES_MAX))


@given(st.lists(told, max_size=8))
def test_a_guest_never_has_a_command_hold_more_than_that(messages: list[GuestWord]) -> None:
    made = ProgramDialogue()
    try:
        for message in messages:
            made.receive(encode_program(message))
    except BadFrame:
        pass
    assert 0 <= made.unwritten <= 2 * OUTPUT_BYTES_MAX + 2 * 500
    assert made.room <= INPUT_BYTES_MAX


def test_bytes_that_are_no_messages() -> None:
    with pytest.raises(BadFrame, match="kind 99"):
        dialogue().receive(encode_frame(99, b"x"))
