"""A session that goes one way, down a pipe."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.errors import LimitExceeded, LinkError, NotAPort, PortAbsent
from vchan.io.link import Link
from vchan.io.loop import Loop
from vchan.io.pipes import open_pipe_reader, open_pipe_writer
from vchan.rpc.messages import CALL, Request, Settled, Subscribe, encode
from vchan.session import Config, Event, Lost, Opened, Received, Role, State, Violation
from vchan.session.oneway import Reader, Writer
from vchan.wire.frames import FRAME_BYTES_MAX, PLAIN_PAYLOADS, RAW_BODIES

WAIT_S = 30.0


def writer(instance: bytes = b"w" * 16) -> Writer:
    made = Writer(Config(Role.HOST, instance, "host"), os.urandom)
    made.open(0.0)
    return made


def reader() -> Reader:
    made = Reader(Config(Role.GUEST, b"r" * 16, "guest"), os.urandom)
    made.open(0.0)
    return made


def drain(session: Writer) -> bytes:
    data = b""
    while part := session.data_to_send():
        data += part
    return data


def messages(events: list[Event]) -> list[bytes]:
    return [event.message for event in events if isinstance(event, Received)]


def kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


@given(
    st.lists(st.binary(min_size=1, max_size=100) | st.just(b"x" * 50_000), max_size=8),
    st.lists(st.integers(1, 20_000), max_size=20),
)
def test_messages_arrive_whole_and_in_order(sent: list[bytes], cuts: list[int]) -> None:
    source, sink = writer(), reader()
    for message in sent:
        source.send(message, 3)
    data, got, at = drain(source), [], 0
    for size in [*cuts, len(data)]:
        got += sink.receive_data(data[at : at + size], 0.0)
        at += size
    assert messages(got) == sent
    assert [event for event in got if isinstance(event, Lost | Violation)] == []
    assert kinds(got)[0] is Opened


def test_no_raw_body_goes_down_a_pipe() -> None:
    """It could hold what passes for a frame: the key is known to all."""
    config = Config(Role.HOST, b"w" * 16, "host", features=RAW_BODIES | PLAIN_PAYLOADS)
    source, sink = Writer(config, os.urandom), Reader(config, os.urandom)
    source.open(0.0)
    sink.open(0.0)
    source.send(b"message", 1)
    events = [*sink.receive_data(drain(source), 0.0), *source.handle_timeout(1.0)]
    peers = [event.peer for event in events if isinstance(event, Opened)]
    assert [peer.features for peer in peers] == [0, 0]


def test_the_writer_opens_at_once() -> None:
    source = writer()
    assert source.state is State.OPEN
    assert source.next_timeout() == 0.0
    (opened,) = source.handle_timeout(0.0)
    assert isinstance(opened, Opened)
    assert not opened.resumed
    assert source.handle_timeout(1.0) == []
    source.close()
    source.open(2.0)
    (again,) = source.handle_timeout(2.0)
    assert isinstance(again, Opened)
    assert again.resumed


def test_what_was_handed_out_counts_until_more_is_asked_for() -> None:
    source = writer()
    source.handle_timeout(0.0)
    drain(source)
    source.send(b"hello", 1)
    assert (source.backlog_bytes, source.unacknowledged) == (5, 0)
    assert source.data_to_send()
    assert (source.backlog_bytes, source.unacknowledged) == (0, 1)
    assert source.next_timeout() is not None  # so that somebody asks
    assert source.data_to_send() == b""
    assert source.unacknowledged == 0
    assert source.next_timeout() is None


@given(st.integers(0, 3 * FRAME_BYTES_MAX))
def test_a_torn_write_is_repaired_by_the_next_pipe(cut: int) -> None:
    """It is not known how much of the last write was taken: it goes again."""
    source, sink = writer(), reader()
    events = sink.receive_data(drain(source), 0.0)
    sent = [b"a" * 12_000, b"b" * 12_000]
    for message in sent:
        source.send(message, 1)
    last = source.data_to_send()
    events += sink.receive_data(last[:cut], 0.0)
    source.close()
    source.open(1.0)
    source.send(b"c", 1)
    events += sink.receive_data(drain(source), 0.0)
    assert messages(events) == [*sent, b"c"]
    assert Lost not in kinds(events)


def test_a_hole_is_noticed_and_what_it_broke_is_dropped() -> None:
    source, sink = writer(), reader()
    sink.receive_data(drain(source), 0.0)
    source.send(b"first" * 5000, 1)  # two frames
    source.send(b"second", 1)
    source.send(b"third", 1)
    frames = drain(source)
    lost_from, lost_until = 100, len(frames) - 60
    events = sink.receive_data(frames[:lost_from], 0.0)
    events += sink.receive_data(frames[lost_until:], 0.0)
    source.send(b"fourth" * 6000, 1)
    events += sink.receive_data(drain(source), 0.0)
    (lost,) = [event for event in events if isinstance(event, Lost)]
    assert lost.until - lost.first == sink.counters.frames_lost > 0
    assert messages(events) == [b"third", b"fourth" * 6000]


def test_a_message_whose_beginning_is_lost_is_dropped() -> None:
    source, sink = writer(), reader()
    sink.receive_data(drain(source), 0.0)
    source.send(b"x" * 20_000, 1)
    source.data_to_send(FRAME_BYTES_MAX)  # its first frame, which nobody reads
    rest = drain(source)
    source.send(b"next", 1)
    events = sink.receive_data(rest + drain(source), 0.0)
    assert kinds(events) == [Lost, Received]
    assert messages(events) == [b"next"]


def test_another_writer_begins_anew() -> None:
    first, second, sink = writer(), writer(b"v" * 16), reader()
    first.send(b"one", 1)
    second.send(b"two", 1)
    events = sink.receive_data(drain(first) + drain(second), 0.0)
    assert kinds(events) == [Opened, Received, Opened, Received]
    assert [event.resumed for event in events if isinstance(event, Opened)] == [False, False]
    assert messages(events) == [b"one", b"two"]
    assert sink.counters.frames_lost == 0


def test_a_reader_that_comes_late_takes_what_comes() -> None:
    source, sink = writer(), reader()
    source.send(b"one", 1)
    drain(source)
    source.send(b"two", 1)
    events = sink.receive_data(drain(source), 0.0)
    assert kinds(events) == [Opened, Received]
    assert messages(events) == [b"two"]


def test_the_reader_has_no_way_back() -> None:
    sink = reader()
    for message in (Subscribe(()), Settled((b"i" * 16,))):
        sink.send(encode(message))
    assert sink.data_to_send() == b""
    request = Request(b"i" * 16, CALL, 0, 0, "e", "t", "", b"{}")
    with pytest.raises(LimitExceeded, match="goes one way"):
        sink.send(encode(request), 1)
    assert sink.next_timeout() is None
    assert sink.handle_timeout(1.0) == []
    assert writer().receive_data(b"x", 0.0) == []


def test_a_message_over_the_limit_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="MESSAGE_BYTES_MAX"):
        writer().send(b"x" * ((4 << 20) + 1), 1)


# --- pipes


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name) / "pipe"


def test_a_pipe_is_made_by_who_writes(path: Path) -> None:
    with pytest.raises(PortAbsent, match="may appear later"):
        open_pipe_reader(str(path))
    with closing(open_pipe_writer(str(path))) as source:
        assert stat.S_ISFIFO(path.stat().st_mode)
        source.write(b"hello")
        with pytest.raises(BlockingIOError):
            source.read()
        with closing(open_pipe_reader(str(path))) as sink:
            assert sink.read() == b"hello"
            with pytest.raises(OSError, match="for reading"):
                sink.write(b"x")
        source.write(b"kept")  # while the reader is away
        with closing(open_pipe_reader(str(path))) as sink:
            assert sink.read() == b"kept"
            with pytest.raises(BlockingIOError):
                sink.read()


def test_what_is_no_pipe_is_refused(path: Path) -> None:
    path.write_text("x")
    for open_pipe in (open_pipe_reader, open_pipe_writer):
        with pytest.raises(NotAPort, match="mkfifo"):
            open_pipe(str(path))
    with pytest.raises(LinkError):
        open_pipe_writer(str(path / "below"))


def test_two_links_over_a_pipe_whose_reader_is_slow_to_come(path: Path) -> None:
    source, sink = writer(), reader()
    got: list[bytes] = []

    def take(event: Event) -> None:
        if isinstance(event, Received):
            got.append(event.message)

    with closing(Loop()) as loop:
        down: list[str] = []
        source.close()
        out = Link(loop, source, open_pipe_writer(str(path)), take, down.append)
        sent = [bytes([65 + number]) * 9000 for number in range(20)]  # more than a pipe holds
        for message in sent:
            out.send(message, 1)
        for _ in range(20):
            loop.run_once(0.01)
        assert source.backlog_bytes > 0
        link = Link(loop, sink, open_pipe_reader(str(path)), take, down.append)
        deadline_s = loop.time() + WAIT_S
        while got != sent or source.unacknowledged:
            assert loop.time() < deadline_s
            loop.run_once(0.05)
        assert down == []
        link.close()
        out.close()
