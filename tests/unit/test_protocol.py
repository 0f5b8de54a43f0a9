"""The definition of the wire, and what is generated from it."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from construct import Bytes, Int16ub, PascalString, Struct

from tests.vectors import generate
from vchan import protocol
from vchan.rpc.bodies import decode_raw
from vchan.wire import layout

BYTE_STREAM_KINDS = {
    value: name.removeprefix("BYTE_STREAM_")
    for name, value in vars(layout).items()
    if name.startswith("BYTE_STREAM_")
}


def test_the_generated_module_is_up_to_date() -> None:
    made = Path(protocol.__file__).with_name("wire") / "layout.py"
    assert made.read_text() == protocol.generate()


def test_writing_the_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(protocol, "__file__", str(tmp_path / "protocol.py"))
    (tmp_path / "wire").mkdir()
    monkeypatch.setattr(sys, "argv", ["protocol", "--write"])
    protocol.main()
    assert (tmp_path / "wire" / "layout.py").read_text() == protocol.generate()


def test_printing_the_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["protocol"])
    runpy.run_path(protocol.__file__, run_name="__main__")
    assert capsys.readouterr().out == protocol.generate()


def test_every_message_kind_has_its_definition() -> None:
    assert sorted(protocol.MESSAGE_BY_KIND) == list(range(1, 9))
    assert sorted(protocol.BYTE_STREAM_BY_KIND) == list(range(32, 37))
    assert protocol.parse_message(b"\x02" + bytes(16)).head.id == bytes(16)


def test_a_field_of_no_fixed_size_has_no_struct_format() -> None:
    assert protocol.struct_format(Struct("a" / Int16ub, "b" / Bytes(3))) == ">H3s"
    with pytest.raises(TypeError, match="no fixed format"):
        protocol.field_format(Struct("name" / PascalString(Int16ub, "utf8")))


def test_kinds_fit_their_byte_and_are_distinct() -> None:
    for prefix in ("KIND_", "MESSAGE_", "REASON_", "ROLE_", "BYTE_STREAM_", "RESET_REASON_"):
        numbers = [value for name, value in vars(layout).items() if name.startswith(prefix)]
        assert len(numbers) == len(set(numbers))
        assert all(0 < number < 256 for number in numbers)


def test_flags_are_single_bits() -> None:
    for prefix in ("FLAG_", "REQUEST_FLAG_", "REPLY_FLAG_", "PROGRESS_FLAG_", "PART_FLAG_"):
        flags = [value for name, value in vars(layout).items() if name.startswith(prefix)]
        assert sum(flags) == 2 ** len(flags) - 1


# ---------------------------------------------------------------- the vectors


def vectors(name: str) -> Any:
    return json.loads((generate.HERE / name).read_text())


def test_the_vectors_are_up_to_date() -> None:
    for name, text in generate.generate().items():
        assert (generate.HERE / name).read_text() == text


def test_the_vectors_files_can_be_checked_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate"])
    assert generate.main() == 1
    assert "frames.json" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generate", "--write"])
    assert generate.main() == 0
    monkeypatch.setattr(sys, "argv", ["generate"])
    assert generate.main() == 0


@pytest.mark.parametrize("vector", vectors("frames.json")["frames"], ids=lambda v: str(v["name"]))
def test_the_definition_reads_the_frame_vectors(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["frame"])
    parsed = protocol.Frame.parse(data)
    header = data[: protocol.FrameHeader.sizeof()]
    assert parsed.header_crc == crc32(header, vector["header_seed"])
    sealed = crc32(parsed.payload, parsed.header_crc ^ vector["payload_seed"])
    assert parsed.payload_crc == (0 if vector.get("is_plain") else sealed)
    assert parsed.payload.hex() == vector["payload"]
    assert int(parsed.header.kind) == vector["kind"]
    for name in ("stream", "total", "seq", "ack", "credit"):
        assert parsed.header[name] == vector[name]


def test_the_definition_reads_the_greeting_vectors() -> None:
    for vector in vectors("greetings.json")["greetings"]:
        parsed = protocol.Greeting.parse(bytes.fromhex(vector["payload"]))
        fields = vector["fields"]
        assert (parsed.name, parsed.attached) == (fields.pop("name"), fields.pop("attached"))
        features = fields.pop("features", 0)
        assert protocol.Features.build(parsed.features or {}) == features.to_bytes(4, "big")
        for name, value in fields.items():
            got = parsed.head[name]
            assert (got.hex() if isinstance(got, bytes) else int(got)) == value


def test_the_definition_reads_a_raw_body() -> None:
    made = {v["name"]: v for v in vectors("messages.json")["messages"]}["a raw call"]
    parsed = protocol.parse_message(bytes.fromhex(made["message"]))
    assert parsed.head.flags.RAW and parsed.head.flags.CALL
    raw = protocol.RawBody.parse(parsed.body)
    assert (raw.invocation, raw.data) == decode_raw(parsed.body)
    assert json.loads(raw.invocation)["method"] == "put"
    assert raw.data == b"\x00\xff any bytes"


def test_the_definition_reads_the_message_vectors() -> None:
    for vector in vectors("messages.json")["messages"]:
        data = bytes.fromhex(vector["message"])
        parsed = protocol.parse_message(data)
        assert str(protocol.Message.parse(data).kind) == vector["kind"].upper()
        if "id" in vector["fields"]:
            assert parsed.head.id.hex() == vector["fields"]["id"]


def test_the_definition_reads_the_byte_stream_vectors() -> None:
    for vector in vectors("byte_streams.json")["messages"]:
        data = bytes.fromhex(vector["message"])
        parsed = protocol.parse_message(data)
        assert BYTE_STREAM_KINDS[int(data[0])] == vector["kind"].upper()
        for name in ("id", "tag", "received", "credit", "offset"):
            if name in vector["fields"]:
                got = parsed.head[name]
                assert (got.hex() if isinstance(got, bytes) else got) == vector["fields"][name]


def test_every_kind_of_frame_and_message_has_a_vector() -> None:
    made = {vector["kind"].upper() for vector in vectors("byte_streams.json")["messages"]}
    assert made == set(BYTE_STREAM_KINDS.values())
    kinds = {vector["kind"] for vector in vectors("frames.json")["frames"]}
    assert kinds | {layout.KIND_HELLO, layout.KIND_WELCOME} == set(range(1, 9))
    assert len({vector["kind"] for vector in vectors("messages.json")["messages"]}) == 8
