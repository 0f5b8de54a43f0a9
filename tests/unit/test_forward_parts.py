"""What `vchan forward` is made of, part by part: words, targets, the switchboard's facts, who may
open what, and guests that abuse streams."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rig.gates import OpenGate
from vchan.cli.forward import Local, listen, parse_what
from vchan.errors import ConfigError, LimitExceeded, Rejected
from vchan.host.vm.gate import StreamNote
from vchan.host.vm.streams import FOR_CHARS_MAX, Program, VmStreams
from vchan.io.loop import Loop
from vchan.io.targets import (
    AllowedTargets,
    Target,
    begin_to_connect,
    connect_problem,
    parse_target,
    services_directory,
)
from vchan.session import Config, Role, Session
from vchan.splices import Splices
from vchan.streams import Ended, StreamEnds, StreamWanted
from vchan.streams.carrier import fill
from vchan.streams.messages import (
    ANSWER,
    ASK,
    CLOSED,
    END,
    REFUSED,
    RELEASED,
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

ID = bytes(range(16))
TAG = b"the tag!"
OFFER = encode(StreamOffer(VERSION, VERSION))
OPEN = Open(ID, bytes(8), 0, 0, "tcp:80", "{}")


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "local", "target"),
    [
        ("80", None, "tcp:80"),
        ("0:80", Local(port=0), "tcp:80"),
        ("9000:80", Local(port=9000), "tcp:80"),
        ("10.0.0.1:9000:80", Local(address="10.0.0.1", port=9000), "tcp:80"),
        ("[::1]:9000:80", Local(address="::1", port=9000), "tcp:80"),
        ("./a:80", Local(path="./a"), "tcp:80"),
        ("/run/a", None, "unix:/run/a"),
        ("9000:/run/a", Local(port=9000), "unix:/run/a"),
        ("/tmp/b:/run/a", Local(path="/tmp/b"), "unix:/run/a"),
    ],
)
def test_where_to_listen_and_what_is_reached(text: str, local: Local | None, target: str) -> None:
    assert parse_what(text) == (local, parse_target(target))


@pytest.mark.parametrize(
    "text", ["", "0", "65536", "x", "80:", "x:80", "70000:80", "a:b:80", "080", "/a/../b", "/"]
)
def test_words_that_say_nothing_of_that(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_what(text)


def test_a_port_that_is_taken_is_said() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match="cannot listen there: Address already in use"),
    ):
        listen(Local(port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("allow", "target", "is_allowed"),
    [
        ("", "tcp:80", False),
        ("tcp:80", "tcp:80", True),
        ("tcp:80", "tcp:8080", False),
        ("tcp:80 , unix:/run/a*", "unix:/run/abc", True),
        ("tcp:*", "unix:/80", False),
        ("unix:/run/*", "unix:/etc/a", False),
        ("service:shell", "service:shell", True),
        ("service:*", "service:exec", True),
        ("service:e*", "service:shell", False),
        ("tcp:*, unix:/*", "service:shell", False),
    ],
)
def test_what_a_guests_owner_allows(allow: str, target: str, is_allowed: bool) -> None:
    assert AllowedTargets(allow).allows(parse_target(target)) == is_allowed


@pytest.mark.parametrize(
    "allow", ["*", "80", "tcp:", "tcp:a", "unix:run", "udp:1", "service:", "service:../a"]
)
def test_what_an_owner_cannot_have_meant(allow: str) -> None:
    with pytest.raises(ValueError, match="expected tcp:PORT, unix:/PATH or service:NAME"):
        AllowedTargets(allow)


@pytest.mark.parametrize(
    "text",
    [
        *["tcp:0", "tcp:01", "tcp:65536", "tcp:\u0661", "unix:a", "unix:/a/../b", "unix:/a\nb"],
        *["service:", "service:.", "service:a/b", "service:*", "service:A", "service:" + "a" * 33],
    ],
)
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(ValueError):
        parse_target(text)


def test_a_target_is_written_as_it_is_read() -> None:
    assert str(parse_target("unix:/run/a.sock")) == "unix:/run/a.sock"
    assert parse_target("tcp:80") == Target("tcp", "80")


def test_services_are_reached_by_name_in_a_directory_that_nobody_else_writes_to(
    tmp_path: Path,
) -> None:
    directory = Path(services_directory(str(tmp_path / "agent.sock")))
    assert directory == tmp_path / "services"
    services, target = str(directory), Target("service", "echo")
    with pytest.raises(OSError, match="No such file"):
        begin_to_connect(target, services)
    directory.mkdir(mode=0o755)
    path = directory / "echo"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with begin_to_connect(target, services) as made:
            assert connect_problem(made) == ""
        with pytest.raises(OSError, match="reached as service:NAME"):
            begin_to_connect(Target("unix", str(path)), services)
        (tmp_path / "alias").symlink_to(directory)
        with pytest.raises(OSError, match="reached as service:NAME"):
            begin_to_connect(Target("unix", f"{tmp_path}/alias/echo"), services)
        directory.chmod(0o777)
        with pytest.raises(OSError, match=r"others can write to .*/services"):
            begin_to_connect(target, services)
        directory.chmod(0o755)
        tmp_path.chmod(0o1777)
        with pytest.raises(OSError, match=f"others can write to {tmp_path}: chmod"):
            begin_to_connect(target, services)


# ---------------------------------------------------------------- the switchboard's facts


def switchboard() -> Switchboard:
    """One program, and a guest that takes streams."""
    board = Switchboard(lambda _, opened: opened)
    board.guest_connected()
    board.attach(1)
    assert board.next_for_guest() == OFFER
    board.from_guest(OFFER)
    board.take_news()
    return board


def say(board: Switchboard, *messages: StreamMessage) -> None:
    for message in messages:
        board.from_program(1, encode(message))


def hear(board: Switchboard, *messages: StreamMessage) -> None:
    for message in messages:
        assert board.from_guest(encode(message)) is None


def test_a_guest_that_does_not_take_streams_is_sent_none() -> None:
    board = Switchboard(lambda _, opened: opened)
    board.guest_connected(takes_streams=False)
    board.attach(1)
    say(board, OPEN)
    assert board.next_for_guest() is None


def test_a_guest_hears_nothing_of_streams_before_a_program_wants_some() -> None:
    board = Switchboard(lambda _, opened: opened)
    board.guest_connected()
    assert board.next_for_guest() is None
    board.from_guest(OFFER)  # its own, of a session before
    board.attach(1)
    assert board.next_for_guest() == OFFER
    assert board.take_news() == {1}


def test_bytes_are_counted_once_and_the_end_is_told_once() -> None:
    board = switchboard()
    say(board, OPEN, Part(0, ID, TAG, 0, b"abc"), Part(0, ID, TAG, 1, b"bcd"))
    say(board, Part(0, ID, TAG, 90, b"behind a hole"), Part(END, ID, TAG, 4, b"e"))
    hear(board, Part(END, ID, TAG, 0, b"xy"), Progress(0, ID, TAG, 6, 0))
    say(board, Progress(0, ID, TAG, 3, 0))
    say(board, Progress(0, ID, TAG, 3, 0))
    assert board.take_events() == [
        Began(ID, 1, "tcp:80", "{}"),
        Over(ID, 1, "tcp:80", 0, "", 5, 2, "{}"),
    ]
    assert board.open_streams == 0
    hear(board, Progress(0, ID, TAG, 6, 0))  # late, and passes
    assert board.take_news() == {1}


def test_what_was_said_before_this_daemon_is_not_counted() -> None:
    board = switchboard()
    say(board, OPEN._replace(tag=TAG), Part(0, ID, TAG, 1000, b"abc"))
    say(board, Reset(CLOSED, ID, "enough"))
    assert board.take_events()[1:] == [Over(ID, 1, "tcp:80", CLOSED, "enough", 3, 0, "{}")]


def test_a_program_that_goes_has_the_last_word() -> None:
    board = switchboard()
    say(board, OPEN, Part(0, ID, TAG, 0, b"abc"), Reset(CLOSED, ID, "ended"))
    board.detach(1)
    assert board.next_for_guest() == encode(Reset(CLOSED, ID, "ended"))
    assert board.next_for_guest() is None


def test_a_program_that_is_gone_may_go_on_elsewhere() -> None:
    board = switchboard()
    say(board, OPEN)
    board.detach(1)
    assert board.take_events()[1:] == [Over(ID, 1, "tcp:80", None, "", 0, 0, "{}")]
    assert board.next_for_guest() is None


def test_a_guest_with_a_new_session_is_asked_for_what_passes_here() -> None:
    board = switchboard()
    accepted, asked, over = OPEN, OPEN._replace(id=b"a" * 16), OPEN._replace(id=b"o" * 16)
    say(board, accepted, asked, over)
    hear(board, Progress(ANSWER, ID, TAG, 0, 9), Reset(CLOSED, over.id, ""))
    board.guest_connected()
    assert board.next_for_guest() == OFFER
    assert board.next_for_guest() is None
    board.from_guest(OFFER)
    assert board.next_for_guest() == encode(Progress(ASK, ID, TAG, 0, 0))
    assert board.next_for_guest() is None


def test_what_is_over_is_forgotten_first() -> None:
    board = switchboard()
    quiet, over = b"q" * 16, b"o" * 16
    for stream in (quiet, over):
        say(board, OPEN._replace(id=stream))
    hear(board, Reset(CLOSED, over, ""))
    for number in range(ROUTES_MAX - 1):
        say(board, OPEN._replace(id=number.to_bytes(16)))
    hear(board, Progress(0, quiet, TAG, 0, 0))
    assert board.dropped == 0
    hear(board, Progress(0, over, TAG, 0, 0))
    assert board.dropped == 1


# ---------------------------------------------------------------- who may open what


class World:
    """`VmStreams` with one program."""

    def __init__(self) -> None:
        self.gate = OpenGate()
        self.streams = VmStreams("host", self.gate, lambda: None)
        self.streams.guest_connected(takes_streams=True)
        self.woken = 0
        self.program = Program(7, 8, self._wake, lambda _: None)
        self.streams.attach(1, self.program)
        self.streams.from_guest(OFFER)
        assert self.to_guest() == [StreamOffer(VERSION, VERSION)]

    def _wake(self) -> None:
        self.woken += 1

    def say(self, message: StreamMessage) -> None:
        self.streams.from_program(1, encode(message))

    def to_guest(self) -> list[StreamMessage | Malformed]:
        return [decode(data) for data in iter(self.streams.next_for_guest, None)]

    def to_program(self) -> list[StreamMessage | Malformed]:
        return [decode(data) for data in iter(lambda: self.streams.next_for_program(1), None)][1:]

    def noted(self) -> list[tuple[str, str]]:
        return [(note.verdict, note.reason) for note in self.gate.streams]


@pytest.mark.parametrize(
    ("facts", "is_gone", "is_reset"),
    [
        ('{"pid":8}', True, True),
        ('{"pid":8}', False, False),  # this host has sent it away: it looks for its VM elsewhere
        ('{"pid":9}', True, False),  # another process brings its connection here
        ("", True, False),  # of an earlier release
        ('["pid"]', True, False),
    ],
)
def test_a_program_that_has_ended_ends_its_streams(
    facts: str, is_gone: bool, is_reset: bool
) -> None:
    world = World()
    world.say(OPEN._replace(facts=facts))
    world.to_guest()
    world.streams.detach(1, is_gone=is_gone)
    said = "the program that opened it has ended"
    assert world.to_guest() == ([Reset(CLOSED, ID, said)] if is_reset else [])
    why = f"closed: {said}" if is_reset else "its program is gone from here"
    assert world.noted()[-1] == ("ended", why)


def test_the_guest_is_told_who_asks_by_the_hosts_word() -> None:
    world = World()
    world.say(OPEN._replace(facts='{"uid":0}'))
    (opened,) = world.to_guest()
    assert isinstance(opened, Open)
    assert json.loads(opened.facts) == {"host": "host", "uid": 7, "pid": 8}
    assert [(note.verdict, note.by, note.id) for note in world.gate.streams] == [
        ("allow", "uid 7, pid 8", ID)
    ]
    world.say(OPEN._replace(tag=TAG))  # it goes on in a new session: no news
    assert len(world.gate.streams) == 1


@pytest.mark.parametrize(
    ("facts", "for_whom"),
    [
        ('{"for":"octavia at 192.0.2.1","uid":0,"host":"x"}', "octavia at 192.0.2.1"),
        ('{"for":"a\\nb\\u00e9"}', "a?b?"),
        (json.dumps({"for": '"' * 500}), '"' * FOR_CHARS_MAX),
        ('{"for":7}', ""),
        ('["for"]', ""),
        ("[" * 900, ""),
        ("nonsense", ""),
    ],
)
def test_for_whom_a_program_asks_is_its_own_word(facts: str, for_whom: str) -> None:
    """It stands beside the kernel's, in the guest and on record, from the first to the last."""
    world = World()
    world.say(OPEN._replace(facts=facts))
    (opened,) = world.to_guest()
    assert isinstance(opened, Open)
    told = {"host": "host", "uid": 7, "pid": 8} | ({"for": for_whom} if for_whom else {})
    assert json.loads(opened.facts) == told
    world.say(Reset(CLOSED, ID, "enough"))
    by = "uid 7, pid 8" + (f", for {for_whom}" if for_whom else "")
    assert [note.by for note in world.gate.streams] == [by, by]
    world.gate.deny_forward = "50-a.policy:7"
    world.say(OPEN._replace(id=bytes(16), facts=facts))
    assert world.gate.streams[-1].by == by


def test_what_is_denied_reaches_no_guest() -> None:
    world = World()
    world.gate.deny_forward = "50-a.policy:7"
    with pytest.raises(Rejected, match=r"forward tcp:80: denied by .*, 50-a.policy:7"):
        world.streams.require("tcp:80", world.program)
    world.say(OPEN)
    assert world.to_guest() == []
    (refusal,) = world.to_program()
    assert isinstance(refusal, Reset)
    assert refusal.reason == REFUSED
    assert "50-a.policy:7" in refusal.text
    assert world.noted() == [("deny", "")] * 2


@pytest.mark.parametrize("target", ["nova/x", "tcp:", "udp:1"])
def test_what_is_no_target_reaches_no_guest(target: str) -> None:
    world = World()
    world.say(OPEN._replace(target=target))
    assert world.to_guest() == []
    with pytest.raises(Rejected, match="expected tcp:PORT, unix:/PATH or service:NAME"):
        world.streams.require(target, world.program)


def test_a_vm_that_ends_ends_its_streams() -> None:
    world = World()
    world.say(OPEN)
    world.streams.end("shut off")
    (told,) = world.to_program()
    assert told == Reset(RELEASED, ID, "the VM has ended: shut off")
    assert world.noted()[1:] == [("ended", "released: the VM has ended: shut off")]


def test_programs_are_bounded() -> None:
    world = World()
    for number in range(2, PROGRAMS_MAX + 1):
        world.streams.attach(number, world.program)
    with pytest.raises(LimitExceeded, match="PROGRAMS_MAX"):
        world.streams.attach(PROGRAMS_MAX + 1, world.program)
    world.streams.from_program(PROGRAMS_MAX + 1, OFFER)  # nobody's
    assert world.streams.next_for_program(PROGRAMS_MAX + 1) is None


# ---------------------------------------------------------------- guests that abuse streams

streams_known = st.sampled_from([ID, b"another stream!!"])
abuse = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.builds(StreamOffer, st.integers(0, 255), st.integers(0, 255)).map(encode),
    st.builds(
        Open, streams_known, st.just(TAG), st.just(0), st.just(0), st.just("t"), st.just("")
    ).map(encode),
    st.builds(
        Progress,
        st.integers(0, 7),
        streams_known,
        st.just(TAG),
        st.integers(0, 2**63 - 1),
        st.integers(0, 2**63 - 1),
    ).map(encode),
    st.builds(
        Part,
        st.integers(0, 1),
        streams_known,
        st.just(TAG),
        st.integers(0, 2**62),
        st.integers(1, 16_000).map(bytes),
    ).map(encode),
    st.builds(Reset, st.integers(0, 255), streams_known, st.text(max_size=600)).map(encode),
)


@given(st.lists(abuse, max_size=40), st.booleans())
def test_whatever_a_guest_says_is_bounded_and_harms_no_other_stream(
    said: list[bytes], reads: bool
) -> None:
    world = World()
    world.say(OPEN)
    ends = StreamEnds(random.Random(1).randbytes, asks_max=None, offer_s=None)
    ends.connected(0.0)
    ends.receive(OFFER, 0.0)
    for message in said:
        problem = world.streams.from_guest(message)
        assert problem is None or problem
        if reads:
            for up in iter(lambda: world.streams.next_for_program(1), None):
                ends.receive(up, 0.0)
    board = world.streams._board
    assert board._programs[1].up._bytes <= WAY_BYTES_MAX
    assert world.streams.counters["streams"] == 1, "a guest opens none"
    assert len(board._routes) <= 1
    assert len(world.gate.streams) <= 2, "one line for its beginning, one for its end"
    assert all(note.out_of is None or note.out_of <= sum(map(len, said)) for note in notes(world))


def notes(world: World) -> list[StreamNote]:
    return world.gate.streams


def test_a_stream_out_of_a_guest_is_a_violation() -> None:
    world = World()
    assert world.streams.from_guest(encode(OPEN)) == "Open: no streams are taken out of a guest"


def test_a_guest_that_does_not_read_has_so_much_waiting_and_no_more() -> None:
    world = World()
    world.say(OPEN)
    for number in range(100):
        world.say(Part(0, ID, TAG, number * 16_000, bytes(16_000)))
    assert world.streams._board._programs[1].down._bytes <= WAY_BYTES_MAX
    assert world.streams.summary()["dropped"] > 80


# ---------------------------------------------------------------- sockets


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


class Pair:
    """Two ends without a session between them; a socket at each."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.ended: list[int] = []
        self.inner, self.outer = socket.socketpair()
        host = StreamEnds(random.Random(1).randbytes, asks_max=None, offer_s=None)
        self.host = Splices(loop, host, lambda: None, lambda _: None)
        guest = StreamEnds(random.Random(2).randbytes)
        self.guest = Splices(loop, guest, lambda: None, self._on_guest)
        for each in (self.host, self.guest):
            each.connected()
        ours, self.client = socket.socketpair()
        self.stream = self.host.open(ours, "tcp:80", "")
        self.client.settimeout(5.0)
        self.outer.settimeout(5.0)

    def _on_guest(self, event: object) -> None:
        if isinstance(event, StreamWanted):
            self.guest.ends.accept(event.id)
            self.guest.join(event.id, self.inner)
        elif isinstance(event, Ended):
            self.ended.append(event.reason)

    def run(self, turns: int = 30) -> None:
        for _ in range(turns):
            self.loop.run_once(0.001)
            for here, there in ((self.host, self.guest), (self.guest, self.host)):
                while (data := here.ends.next_message(self.loop.time())) is not None:
                    there.receive(data)

    def close(self) -> None:
        for each in (self.host, self.guest):
            each.close()
        for one in (self.client, self.outer, self.inner):
            one.close()


def test_each_side_ends_what_it_says_by_itself(loop: Loop) -> None:
    pair = Pair(loop)
    pair.client.sendall(b"question")
    pair.client.shutdown(socket.SHUT_WR)
    pair.run()
    assert pair.outer.recv(100) == b"question"
    assert pair.outer.recv(100) == b""
    pair.outer.sendall(b"answer")
    pair.run()
    assert pair.client.recv(100) == b"answer"
    assert pair.ended == []
    pair.outer.close()
    pair.run()
    assert pair.client.recv(100) == b""
    assert pair.ended == [0]
    assert (len(pair.host), len(pair.guest)) == (0, 0)
    pair.close()


def test_a_socket_that_breaks_resets_its_stream(loop: Loop) -> None:
    pair = Pair(loop)
    pair.client.sendall(b"question")
    pair.run()
    pair.outer.close()  # with something unread: it is broken for who writes on
    pair.client.sendall(b"more")
    pair.run()
    with contextlib.suppress(BrokenPipeError):  # it is closed by now
        pair.client.sendall(b"and more")
    pair.run()
    assert len(pair.host) == len(pair.guest) == 0
    assert pair.ended == [CLOSED]
    pair.close()


def test_what_a_socket_does_not_take_is_not_read_from_the_stream(loop: Loop) -> None:
    pair = Pair(loop)
    pair.client.setblocking(False)
    sent = 0
    for _ in range(200):
        try:
            sent += pair.client.send(bytes(32_768))
        except BlockingIOError:
            pass
        pair.run(1)
    held = sent
    pair.run(10)
    with pytest.raises(BlockingIOError):
        pair.client.send(bytes(32_768))
    received = 0
    pair.outer.settimeout(0.2)
    while received < held:
        received += len(pair.outer.recv(1 << 20))
        pair.run(2)
    assert received == held
    pair.close()


def test_nothing_is_queued_on_a_session_that_is_not_open() -> None:
    session = Session(Config(Role.GUEST, bytes(16)), bytes)
    assert not fill(session, lambda: OFFER)
    assert session.backlog_bytes == 0
