"""What the two ends of a copy say to each other: its bytes, its order, and what is none of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.services.copies import (
    ASK,
    DATA_BYTES_MAX,
    INTO,
    KEEP,
    NAME_BYTES_MAX,
    PART_SUFFIX,
    RECURSIVE,
    SIZE_MAX,
    TEXT_BYTES_MAX,
    VERSION,
    CopyFault,
    CopyMessage,
    CopyReader,
    CopyReady,
    CopyRefusal,
    CopyRequest,
    DirectoryEnd,
    DirectoryEntry,
    EntryFacts,
    EntryFailed,
    FileBegin,
    FileBroken,
    FileData,
    FileEntry,
    FileWhole,
    Have,
    LeftOut,
    TreeDone,
    TreeEnd,
    encode_copy,
    name_problem,
)
from vchan.services.copy_order import DEPTH_MAX, ReceivingEnd, SendingEnd

FACTS = EntryFacts(0o644, 1000, 1000, 1_700_000_000_000_000_000)
SHA = bytes(range(32))
VECTORS = Path(__file__).parents[1] / "vectors" / "copies.json"

names = st.binary(min_size=1, max_size=40).filter(lambda name: not name_problem(name))
texts = st.text(max_size=60).filter(lambda text: text == text.encode("utf-8", "replace").decode())
counts = st.integers(0, 2**62)
facts = st.builds(
    EntryFacts,
    st.integers(0, 0o777),
    st.integers(0, 2**32 - 2),
    st.integers(0, 2**32 - 2),
    st.integers(-(2**63), 2**63 - 1),
)
paths = st.binary(max_size=60).map(lambda path: b"/" + path.replace(b"\0", b""))
shas = st.binary(min_size=32, max_size=32)
messages: st.SearchStrategy[CopyMessage] = st.one_of(
    st.builds(CopyRequest, st.just(True), st.just(VERSION), st.integers(0, 15), names, paths),
    st.builds(
        CopyRequest, st.just(False), st.just(VERSION), st.integers(0, 3), st.just(b""), paths
    ),
    st.just(CopyReady()),
    st.builds(CopyRefusal, texts),
    st.builds(DirectoryEntry, facts, st.one_of(st.just(b""), names)),
    st.just(DirectoryEnd()),
    st.builds(FileEntry, st.integers(0, 1), facts, counts, st.one_of(st.just(b""), names)),
    st.builds(FileBegin, counts),
    st.builds(FileData, st.binary(min_size=1, max_size=200)),
    st.builds(FileWhole, shas),
    st.builds(FileBroken, texts),
    st.builds(LeftOut, names, texts),
    st.just(TreeEnd()),
    st.builds(Have, counts, counts, shas),
    st.builds(EntryFailed, counts, texts),
    st.builds(TreeDone, counts, counts),
)


def decoded(data: bytes) -> list[CopyMessage]:
    return list(CopyReader().feed(data))


# ---------------------------------------------------------------- bytes


@given(st.lists(messages, max_size=8), st.lists(st.integers(0, 300), max_size=8))
def test_what_was_said_is_heard_however_it_is_cut(said: list[CopyMessage], cuts: list[int]) -> None:
    data = b"".join(map(encode_copy, said))
    reader = CopyReader()
    heard: list[CopyMessage] = []
    at = 0
    for cut in [*cuts, len(data)]:
        heard += reader.feed(data[at : at + cut])
        at = min(len(data), at + cut)
    assert heard == said
    assert not reader.has_rest


@given(st.binary(max_size=300), st.lists(messages, max_size=3))
def test_other_bytes_are_a_fault_and_nothing_else(junk: bytes, before: list[CopyMessage]) -> None:
    reader = CopyReader()
    try:
        for message in reader.feed(b"".join(map(encode_copy, before)) + junk):
            assert encode_copy(message)
    except CopyFault as fault:
        assert "the other end broke the protocol" in str(fault)


def frame(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "data",
    [
        frame(9, b""),
        frame(0, b""),
        frame(17, b""),
        frame(3, b"x"),
        frame(6, b"x"),
        frame(13, b"x"),
        frame(1, b"\x01\x00"),
        frame(1, b"\x01\x00\x00\x00relative"),
        frame(1, b"\x01\x00\x00\x00/zero\0byte"),
        frame(1, b"\x01\x00\x00\x00/" + bytes([65]) * 4096),
        frame(1, b"\x01\x00\x00\x01n/a"),
        frame(2, b"\x01\x00\x00\x00/a"),
        frame(2, b"\x01\x00\x00\x02../a"),
        frame(8, b""),
        frame(10, SHA[:-1]),
        frame(12, b""),
        frame(12, b"\x00\x00text"),
        frame(12, b"\x00\x09name"),
        frame(14, SHA),
        frame(15, SHA[:7]),
        frame(16, SHA),
        encode_copy(DirectoryEntry(FACTS._replace(mode=0o1777), b"x")),
        encode_copy(FileEntry(0, FACTS._replace(mode=0o4755), 1, b"x")),
        encode_copy(FileEntry(0, FACTS._replace(uid=2**32 - 1), 1, b"x")),
        encode_copy(FileEntry(0, FACTS._replace(gid=2**32 - 1), 1, b"x")),
        encode_copy(FileEntry(0, FACTS, SIZE_MAX + 1, b"x")),
        frame(5, bytes(17)),
        frame(7, bytes(26)),
    ],
)
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(CopyFault):
        decoded(data)


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b".",
        b"..",
        b"/",
        b"../x",
        b"a/b",
        b"/etc/passwd",
        b"a\0b",
        b"x" * (NAME_BYTES_MAX + 1),
        b".x" + PART_SUFFIX,
    ],
)
def test_what_is_no_name(name: bytes) -> None:
    assert name_problem(name)
    if name:
        for entry in (DirectoryEntry(FACTS, name), FileEntry(0, FACTS, 0, name)):
            with pytest.raises(CopyFault):
                decoded(encode_copy(entry))


@given(st.binary(min_size=1, max_size=NAME_BYTES_MAX + 2))
def test_what_passes_for_a_name_is_one_in_its_directory(name: bytes) -> None:
    if not name_problem(name):
        assert b"/" not in name and name not in (b".", b"..") and b"\0" not in name
        assert len(name) <= NAME_BYTES_MAX


def test_a_later_version_is_heard_to_be_refused() -> None:
    data = frame(1, bytes([VERSION + 1, 0, 0, 0]) + b"anything")
    (request,) = decoded(data)
    assert isinstance(request, CopyRequest) and request.version == VERSION + 1


def test_a_long_text_is_cut_at_a_letter() -> None:
    (failed,) = decoded(encode_copy(EntryFailed(1, "é" * TEXT_BYTES_MAX)))
    assert isinstance(failed, EntryFailed)
    assert failed.text == "é" * (TEXT_BYTES_MAX // 2)


def test_the_reader_holds_one_message_at_most() -> None:
    reader = CopyReader()
    assert list(reader.feed(encode_copy(FileData(bytes(DATA_BYTES_MAX)))[:-1])) == []
    assert reader.has_rest
    assert list(reader.feed(b"\0")) == [FileData(bytes(DATA_BYTES_MAX))]
    with pytest.raises(CopyFault, match="PAYLOAD_BYTES_MAX"):
        list(reader.feed(b"\x09\xff\xff\xff\xff"))


def test_the_vectors_are_read_as_they_say() -> None:
    made: dict[str, Any] = json.loads(VECTORS.read_text())
    heard = [decoded(bytes.fromhex(each["message"]))[0] for each in made["messages"]]
    assert [encode_copy(each).hex() for each in heard] == [
        each["message"] for each in made["messages"]
    ]
    assert len(heard) >= 16


# ---------------------------------------------------------------- order

ROOT_FILE = FileEntry(0, FACTS, 3, b"")
ROOT = DirectoryEntry(FACTS, b"")


def entry(name: bytes = b"x", size: int = 3, flags: int = 0) -> FileEntry:
    return FileEntry(flags, FACTS, size, name)


WHOLE = [FileData(b"abc"), FileWhole(SHA)]


@pytest.mark.parametrize(
    "said",
    [
        [ROOT_FILE, *WHOLE, TreeEnd()],
        [ROOT_FILE, FileBroken("gone"), TreeEnd()],
        [ROOT, DirectoryEnd(), TreeEnd()],
        [ROOT, entry(), *WHOLE, entry(b"y", 0), FileWhole(SHA), DirectoryEnd(), TreeEnd()],
        [
            ROOT,
            LeftOut(b"z", "a link"),
            DirectoryEntry(FACTS, b"d"),
            DirectoryEnd(),
            DirectoryEnd(),
            TreeEnd(),
        ],
        [ROOT, entry(), FileData(b"a"), FileBroken("x"), DirectoryEnd(), TreeEnd()],
        [ROOT, entry(flags=ASK), FileBroken("x"), DirectoryEnd(), TreeEnd()],
    ],
)
def test_what_may_be_said(said: list[CopyMessage]) -> None:
    sending, receiving = SendingEnd(), ReceivingEnd(takes_directories=True, resumes=True)
    for message in said:
        assert decoded(sending.say(message)) == [message]
        receiving.heed(message)
    assert receiving.is_ended
    sending.heed(decoded(receiving.done(1, 2))[0])
    assert sending.done == TreeDone(1, 2)


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ([], TreeEnd()),
        ([], DirectoryEnd()),
        ([], FileData(b"a")),
        ([], FileWhole(SHA)),
        ([], FileBroken("")),
        ([], LeftOut(b"x", "")),
        ([], entry(b"named")),
        ([], DirectoryEntry(FACTS, b"named")),
        ([], CopyReady()),
        ([], Have(0, 0, SHA)),
        ([ROOT], entry(b"")),
        ([ROOT], ROOT),
        ([ROOT], TreeEnd()),
        ([ROOT, DirectoryEnd()], DirectoryEnd()),
        ([ROOT, DirectoryEnd()], ROOT),
        ([ROOT, DirectoryEnd()], ROOT_FILE),
        ([ROOT, DirectoryEnd(), TreeEnd()], TreeEnd()),
        ([ROOT, entry()], entry(b"y")),
        ([ROOT, entry()], DirectoryEntry(FACTS, b"y")),
        ([ROOT, entry()], DirectoryEnd()),
        ([ROOT, entry()], LeftOut(b"y", "")),
        ([ROOT, entry()], FileData(b"abcd")),
        ([ROOT, entry()], FileWhole(SHA)),
        ([ROOT, entry()], FileBegin(0)),
        ([ROOT, entry(), FileData(b"ab")], FileData(b"cd")),
        ([ROOT, entry(), FileData(b"ab")], FileWhole(SHA)),
        ([ROOT, entry(flags=ASK)], FileBegin(0)),
        ([ROOT, entry(flags=ASK)], FileData(b"a")),
        ([ROOT, entry(flags=ASK)], FileWhole(SHA)),
        (
            [DirectoryEntry(FACTS, b"" if not n else b"d") for n in range(DEPTH_MAX)],
            DirectoryEntry(FACTS, b"d"),
        ),
    ],
)
def test_what_may_not_be_said(before: list[CopyMessage], wrong: CopyMessage) -> None:
    sending, receiving = SendingEnd(), ReceivingEnd(takes_directories=True, resumes=True)
    for message in before:
        sending.say(message)
        receiving.heed(message)
    with pytest.raises(CopyFault):
        receiving.heed(wrong)
    with pytest.raises(CopyFault):
        sending.say(wrong)


def test_a_directory_where_a_file_was_asked_for() -> None:
    with pytest.raises(CopyFault, match="a file was asked for"):
        ReceivingEnd(takes_directories=False, resumes=True).heed(ROOT)


def asked(size: int = 10) -> tuple[SendingEnd, ReceivingEnd]:
    sending, receiving = SendingEnd(), ReceivingEnd(takes_directories=False, resumes=True)
    message = FileEntry(ASK, FACTS, size, b"")
    sending.say(message)
    receiving.heed(message)
    assert sending.waits
    return sending, receiving


@pytest.mark.parametrize(("offset", "rest"), [(0, b"0123456789"), (4, b"456789"), (10, b"")])
def test_it_goes_on_behind_what_is_there(offset: int, rest: bytes) -> None:
    sending, receiving = asked()
    sending.heed(decoded(receiving.have(offset, SHA))[0])
    assert not sending.waits
    said: list[CopyMessage] = [FileBegin(offset), FileWhole(SHA), TreeEnd()]
    if rest:
        said.insert(1, FileData(rest))
    for message in said:
        sending.say(message)
        receiving.heed(message)
    assert receiving.is_ended


def test_it_may_begin_anew_and_nowhere_else() -> None:
    _, receiving = asked()
    receiving.have(4, SHA)
    with pytest.raises(CopyFault, match="nobody has that"):
        receiving.heed(FileBegin(5))
    _, receiving = asked()
    receiving.have(4, SHA)
    receiving.heed(FileBegin(0))
    receiving.heed(FileData(b"0123456789"))


@pytest.mark.parametrize(
    "reply",
    [
        Have(0, 11, SHA),
        Have(1, 1, SHA),
        EntryFailed(1, ""),
        TreeDone(0, 0),
        CopyReady(),
        FileData(b"x"),
    ],
)
def test_what_no_receiver_says(reply: CopyMessage) -> None:
    sending, _ = asked()
    with pytest.raises(CopyFault):
        sending.heed(reply)


def test_each_entry_fails_once_at_most() -> None:
    sending = SendingEnd()
    sending.say(ROOT)
    sending.heed(EntryFailed(0, "full"))
    with pytest.raises(CopyFault, match="again"):
        sending.heed(EntryFailed(0, "full"))


def has_failed(sending: SendingEnd) -> bool:
    return sending.has_failed


def test_who_sends_hears_what_has_failed_of_what_it_is_in() -> None:
    sending = SendingEnd()
    sending.say(ROOT)
    sending.say(entry(flags=ASK))
    sending.heed(EntryFailed(1, "full"))
    assert has_failed(sending) and not sending.waits
    sending.say(FileBroken(""))
    assert not has_failed(sending)
    sending.say(entry(b"y", 0))
    sending.say(FileWhole(SHA))
    sending.heed(EntryFailed(2, "full"))  # it is over: nothing to stop
    assert not has_failed(sending)
    sending.heed(EntryFailed(0, "full"))
    assert has_failed(sending) and sending.depth == 1
    sending.say(DirectoryEnd())
    assert not has_failed(sending)
    assert sending.failures == 3


@given(st.lists(messages, max_size=12))
def test_no_order_raises_anything_else(said: list[CopyMessage]) -> None:
    """And no name without a directory passes."""
    receiving = ReceivingEnd(takes_directories=True, resumes=True)
    try:
        for number, message in enumerate(said):
            receiving.heed(message)
            if not number and isinstance(message, FileEntry | DirectoryEntry):
                assert message.name == b""
    except CopyFault:
        pass


def test_flags_are_bits_of_their_own() -> None:
    assert RECURSIVE | INTO | KEEP | 2 == 15
