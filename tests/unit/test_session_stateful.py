"""Two sessions over streams that lie, in every order hypothesis can think of.

After every step: within a session messages have arrived once, in their stream's order, and nothing
was invented; no well-behaved peer is ever accused; what is held stays within its limits. At the
end everything is healed, and what was sent in the last session must have arrived.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from typing import Any, Final

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.unit.pair import End, Entropy, read_frames, reconfigure
from vchan.errors import LimitExceeded
from vchan.protocol import MAGIC
from vchan.session import (
    CONTROL,
    STREAMS,
    Config,
    Event,
    Opened,
    Received,
    Role,
    Session,
    State,
    Violation,
)
from vchan.session.sender import REWIND_S
from vchan.wire import layout
from vchan.wire.frames import (
    FRAME_BYTES_MAX,
    NO_KEY,
    OVERHEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    ZERO_ID,
    Greeting,
    decode_greeting,
    encode_frame,
)

REACH: Counter[str] = Counter()
"""What the examples of this run got to."""

WINDOW_BYTES: Final = 64 * 1024
"""Small enough that examples run into it."""
IN_FLIGHT_BYTES_MAX: Final = {"host": 40 * 1024, "guest": 100 * 1024}
"""The one runs into this, the other into its credit."""
MESSAGE_BYTES_MAX: Final = 64 * 1024
REASSEMBLY_BYTES_MAX: Final = 80 * 1024

sides = st.sampled_from(["host", "guest"])
fractions = st.integers(0, 100)
sizes = st.one_of(
    st.integers(1, 40),
    st.sampled_from([PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX + 1, 2 * PAYLOAD_BYTES_MAX]),
    st.integers(PAYLOAD_BYTES_MAX, 3 * PAYLOAD_BYTES_MAX),
)
streams = st.one_of(st.just(CONTROL), st.integers(0, STREAMS - 1))

Log = dict[int, list[bytes]]
"""Messages by stream."""


class Side(End):
    """An end, what it sent since its session began, and what arrived since."""

    def __init__(self, name: str, instance: bytes, seed: str) -> None:
        role = Role.HOST if name == "host" else Role.GUEST
        config = Config(
            role,
            instance,
            name,
            message_bytes_max=MESSAGE_BYTES_MAX,
            reassembly_bytes_max=REASSEMBLY_BYTES_MAX,
            window_bytes=WINDOW_BYTES,
            in_flight_bytes_max=IN_FLIGHT_BYTES_MAX[name],
        )
        super().__init__(Session(config, Entropy(seed)))
        self.name = name
        self.epoch = -1
        self.arrived: Log = {}
        self.old = b""  # what was delivered lately


class Sessions(RuleBasedStateMachine):
    """The rules."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.made = 0
        self.sent: dict[int, Log] = {}  # by epoch: a sender's session
        self.times_arrived: Counter[bytes] = Counter()
        self.reached: Counter[str] = Counter()
        self.host = self.make("host")
        self.guest = self.make("guest")
        self.snapshot: Side | None = None

    def make(self, name: str) -> Side:
        self.made += 1
        side = Side(name, b"instance-%07d" % self.made, f"{name} {self.made}")
        self.begin(side)
        return side

    def begin(self, side: Side) -> None:
        """A session begins at this side: what it sent before will not arrive."""
        side.epoch = len(self.sent)
        self.sent[side.epoch] = {}
        side.arrived = {}

    def side(self, name: str) -> Side:
        return self.host if name == "host" else self.guest

    def peer(self, side: Side) -> Side:
        return self.guest if side.name == "host" else self.host

    # ------------------------------------------------------------ what happens to a session

    def take(self, side: Side, events: list[Event]) -> None:
        for told in events:
            match told:
                case Opened(_, resumed):
                    self.reached["resumed" if resumed else "opened"] += 1
                    if not resumed:
                        self.begin(side)
                case Received(stream, message):
                    self.reached["received"] += 1
                    side.arrived.setdefault(stream, []).append(message)
                    if len(message) >= 16:
                        self.times_arrived[message] += 1
                case Violation(reason):
                    raise AssertionError(f"a well-behaved {side.name}'s peer was accused: {reason}")
                case _:
                    self.reached[type(told).__name__.lower()] += 1

    def write(self, side: Side) -> None:
        while data := side.session.data_to_send():
            self.peer(side).inbox += data

    def hand_over(self, side: Side, size: int) -> None:
        data = bytes(side.inbox[:size])
        del side.inbox[:size]
        side.old = (side.old + data)[-100_000:]
        self.take(side, side.session.receive_data(data, self.now_s))

    def until_quiet(self) -> None:
        for _ in range(1000):
            self.write(self.host)
            self.write(self.guest)
            if not self.host.inbox and not self.guest.inbox:
                return
            self.hand_over(self.guest, len(self.guest.inbox))
            self.hand_over(self.host, len(self.host.inbox))
        raise AssertionError("the two never stop talking")

    def run_timers(self, seconds: float, *, only: Side | None = None, deliver: bool = True) -> None:
        until_s = self.now_s + seconds
        ends = [only] if only is not None else [self.host, self.guest]
        for _ in range(100_000):
            times = [end.session.next_timeout() for end in ends]
            due_s = min((at for at in times if at is not None), default=until_s)
            if due_s >= until_s:
                break
            self.now_s = max(self.now_s, due_s)
            for end in ends:
                self.take(end, end.session.handle_timeout(self.now_s))
            if deliver:
                self.until_quiet()
        else:
            raise AssertionError("timers that never stop")
        self.now_s = until_s

    def open(self, side: Side) -> None:
        side.session.close()
        side.session.open(self.now_s)

    # ------------------------------------------------------------ rules

    @initialize(how=st.sampled_from([*["connected"] * 8, "open", "closed"]))
    def start(self, how: str) -> None:
        if how != "closed":
            self.open(self.host)
            self.open(self.guest)
        if how == "connected":
            self.until_quiet()
            assert self.host.session.state is self.guest.session.state is State.OPEN

    @rule(name=sides, stream=streams, size=sizes, times=st.integers(1, 4))
    def send(self, name: str, stream: int, size: int, times: int) -> None:
        side = self.side(name)
        for _ in range(times):
            log = self.sent[side.epoch].setdefault(stream, [])
            label = f"{side.epoch} {stream} {len(log)} {self.made}"
            digest = hashlib.sha256(label.encode()).digest()
            message = (digest * (size // len(digest) + 1))[:size]
            side.session.send(message, stream)
            log.append(message)

    @rule(name=sides, fraction=fractions)
    def deliver_some(self, name: str, fraction: int) -> None:
        side = self.side(name)
        self.write(self.peer(side))
        self.hand_over(side, len(side.inbox) * fraction // 100)

    @rule(name=sides, size=st.integers(1, 200))
    def deliver_bytes(self, name: str, size: int) -> None:
        side = self.side(name)
        self.write(self.peer(side))
        self.hand_over(side, size)

    @rule()
    def deliver_all(self) -> None:
        self.until_quiet()

    @rule(stream=streams, size=sizes, fraction=fractions)
    def talk(self, stream: int, size: int, fraction: int) -> None:
        """Both send, and some of it arrives."""
        for side in (self.host, self.guest):
            self.send(side.name, stream, size, 2)
        for side in (self.host, self.guest):
            self.deliver_some(side.name, fraction)

    @rule(stream=streams, size=sizes)
    def converse(self, stream: int, size: int) -> None:
        """The two get to know each other, and talk."""
        for side in (self.host, self.guest):
            if side.session.state is State.CLOSED:
                self.open(side)
        self.until_quiet()
        self.run_timers(1.5)
        self.talk(stream, size, 100)
        self.until_quiet()

    @rule(name=sides, stream=streams, size=sizes, keep=fractions)
    def reconnect(self, name: str, stream: int, size: int, keep: int) -> None:
        """Something is under way, is torn, and the two find each other again."""
        self.until_quiet()
        self.talk(stream, size, keep)
        self.replug(name, keep, keep)
        self.until_quiet()

    @rule(name=sides)
    def write_only(self, name: str) -> None:
        self.write(self.side(name))

    @rule(name=sides, keep=fractions, end=st.booleans())
    def lose(self, name: str, keep: int, end: bool) -> None:
        """What is under way loses its end or its beginning; nobody is told."""
        side = self.side(name)
        self.write(self.peer(side))
        size = len(side.inbox) * keep // 100
        if len(side.inbox) > size:
            self.reached["lost"] += 1
        if end:
            del side.inbox[size:]
        else:
            del side.inbox[: len(side.inbox) - size]

    @rule(name=sides, at=fractions, bit=st.integers(0, 7))
    def flip(self, name: str, at: int, bit: int) -> None:
        side = self.side(name)
        if side.inbox:
            self.reached["flipped"] += 1
            side.inbox[min(len(side.inbox) - 1, len(side.inbox) * at // 100)] ^= 1 << bit

    @rule(name=sides, size=st.integers(1, 60_000))
    def repeat(self, name: str, size: int) -> None:
        """Bytes that were delivered come again."""
        side = self.side(name)
        if side.old:
            self.reached["repeated"] += 1
            side.inbox[:0] = side.old[-size:]

    @rule(name=sides, keep_in=fractions, keep_out=fractions)
    def replug(self, name: str, keep_in: int, keep_out: int) -> None:
        """One side gets a new stream; the other notices nothing."""
        side = self.side(name)
        del side.inbox[len(side.inbox) * keep_in // 100 :]
        pipe = self.peer(side).inbox
        del pipe[len(pipe) * keep_out // 100 :]
        self.open(side)
        self.reached["replugged"] += 1

    @rule(name=sides)
    def unplug(self, name: str) -> None:
        self.side(name).session.close()

    @rule(name=sides, keep_in=fractions, keep_out=fractions)
    def restart(self, name: str, keep_in: int, keep_out: int) -> None:
        """The daemon is killed and started again. A guest's reboot looks the same."""
        old = self.side(name)
        new = self.make(name)
        new.inbox = old.inbox[: len(old.inbox) * keep_in // 100]
        pipe = self.peer(old).inbox
        del pipe[len(pipe) * keep_out // 100 :]
        self.replace(new)
        self.open(new)
        self.reached["restarted"] += 1

    def replace(self, side: Side) -> None:
        if side.name == "host":
            self.host = side
        else:
            self.guest = side

    @rule(keep_in=fractions, keep_out=fractions, twice=fractions)
    def migrate(self, keep_in: int, keep_out: int, twice: int) -> None:
        """Another host's daemon takes the stream over. QEMU drops what was under way to the guest,
        and brings what the guest wrote to both."""
        old = self.host
        new = self.make("host")
        new.inbox = bytearray(old.old[len(old.old) - len(old.old) * twice // 100 :])
        new.inbox += old.inbox[len(old.inbox) - len(old.inbox) * keep_in // 100 :]
        pipe = self.guest.inbox
        del pipe[len(pipe) * keep_out // 100 :]
        self.host = new
        self.open(new)
        self.reached["migrated"] += 1

    @rule()
    def save(self) -> None:
        self.snapshot = copy.deepcopy(self.guest)

    @precondition(lambda self: self.snapshot is not None)
    @rule(same_daemon=st.booleans())
    def restore(self, same_daemon: bool) -> None:
        """The guest starts again from a snapshot: its memory and random numbers of then. The host
        begins with a new session object, perhaps in the same daemon."""
        assert self.snapshot is not None
        guest = copy.deepcopy(self.snapshot)
        forked = copy.deepcopy(self.sent[guest.epoch])
        guest.epoch = len(self.sent)
        self.sent[guest.epoch] = forked
        guest.inbox.clear()
        self.guest = guest
        instance = self.host.session.config.instance
        host = self.make("host")
        if same_daemon:
            reconfigure(host.session, instance=instance)
        self.host = host
        self.open(host)
        self.reached["restored"] += 1

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.1, 6.0, 40.0]), deliver=st.booleans())
    def wait(self, seconds: float, deliver: bool) -> None:
        self.run_timers(seconds, deliver=deliver)

    @rule(seconds=st.sampled_from([3.0, 60.0, 1800.0]))
    def pause_the_guest(self, seconds: float) -> None:
        self.run_timers(seconds, only=self.host, deliver=False)
        self.write(self.host)

    # ------------------------------------------------------------ what always holds

    @invariant()
    def once_in_order_nothing_invented(self) -> None:
        for side in (self.host, self.guest):
            if side.arrived and not any(
                all(sent.get(stream, [])[: len(got)] == got for stream, got in side.arrived.items())
                for sent in self.sent.values()
            ):
                raise AssertionError(f"what arrived at the {side.name} was sent by nobody so")
        assert set(self.times_arrived.values()) <= {1}

    @invariant()
    def limits_are_kept(self) -> None:
        for side in (self.host, self.guest):
            check_limits(side.session)

    # ------------------------------------------------------------ and in the end

    def teardown(self) -> None:
        for name, times in self.reached.items():
            event(name)
            REACH[name] += times
            REACH[f"examples: {name}"] += 1
        REACH["examples"] += 1
        self.heal()
        for side in (self.host, self.guest):
            arrived = {stream: log for stream, log in side.arrived.items() if log}
            assert arrived == {
                stream: log for stream, log in self.sent[self.peer(side).epoch].items() if log
            }, f"not all that was sent arrived at the {side.name}"
            assert side.session.unacknowledged == side.session.backlog_bytes == 0

    def heal(self) -> None:
        """No more faults. A shell that hears nothing for long opens its stream anew."""
        for side in (self.host, self.guest):
            if side.session.state is State.CLOSED:
                self.open(side)
        self.until_quiet()
        self.run_timers(120.0)
        if not self.is_well():
            event("healed by a new stream only")
            self.open(self.host)
            self.until_quiet()
            self.run_timers(120.0)
        for name in ("host", "guest"):
            self.send(name, 3, 100, 1)
        self.until_quiet()
        self.run_timers(5.0)
        self.once_in_order_nothing_invented()

    def is_well(self) -> bool:
        return all(
            side.session.state is State.OPEN and not side.session.unacknowledged
            for side in (self.host, self.guest)
        )


def check_limits(session: Session) -> None:
    """The limits a session sets itself, and that its sums are right."""
    config = session.config
    cost = sum(len(payload) + OVERHEAD_BYTES for *_, payload in session._sender._sent)
    assert session._sender.in_flight == cost <= config.in_flight_bytes_max
    assert session._sender.tail - session._sender.base == len(session._sender._sent)
    assert session._sender.base <= session._sender.cursor <= session._sender.tail
    assert session._sender._tx_cost <= session._sender.credit
    begun = sum(partial.total for partial in session._receiver._partials.values())
    assert session._receiver.reassembly == begun <= config.reassembly_bytes_max
    assert all(partial.received < partial.total for partial in session._receiver._partials.values())
    assert session._decoder._held < FRAME_BYTES_MAX
    assert len(session._decoder._chunks) <= session._decoder._held
    unsent = sum(
        sum(map(len, outgoing.messages)) - outgoing.offset
        for outgoing in session._sender._streams.values()
    )
    assert session.backlog_bytes == unsent
    large = [session._sender._streams[stream] for stream in session._sender._large]
    assert session._sender._large_open == sum(len(outgoing.messages[0]) for outgoing in large)
    assert session._sender._large_open <= session._sender._peer_reassembly_max
    rings = [*session._sender._small, *session._sender._waiting, *session._sender._large]
    waiting = [
        stream
        for stream in range(STREAMS)
        if session._sender._streams[stream].messages
        and (
            stream != CONTROL
            or len(session._sender._streams[stream].messages[0]) > session._sender._peer_payload_max
        )
    ]
    assert sorted(rings) == waiting


@pytest.mark.long
def test_sessions() -> None:
    REACH.clear()
    tries = settings(
        settings(),
        max_examples=2 * settings().max_examples,
        stateful_step_count=50,
    )
    run_state_machine_as_test(Sessions, settings=tries)
    report: dict[str, Any] = dict(sorted(REACH.items()))
    print("\n".join(f"{times:7} {name}" for name, times in report.items()))
    assert REACH["examples: opened"] >= 0.6 * REACH["examples"]
    assert REACH["examples: received"] >= 0.2 * REACH["examples"]
    assert REACH["examples: resumed"] >= 0.1 * REACH["examples"]


# ---------------------------------------------------------------- a hostile peer


small_or_any = st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1))
near = st.one_of(st.integers(-3, 3), st.sampled_from([2**63, -(2**63)]))
fragments = st.one_of(st.binary(max_size=3), st.sampled_from([b"x" * 500, b"x" * 16_000]))


class HostilePeer(RuleBasedStateMachine):
    """Somebody who has the right key and no manners. It can make its own session slow; it cannot
    make it raise, grow, spin, or say much more than it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.victim = Side("host", b"v" * 16, "victim")
        self.now_s = self.started_s = 1000.0
        self.bytes_in = self.bytes_out = self.own_bytes = 0
        self.reached: Counter[str] = Counter()
        self.hello: Greeting | None = None
        self.welcome: Greeting | None = None
        self.drawn = 0

    @initialize(role=st.sampled_from(Role), is_open=st.booleans())
    def start(self, role: Role, is_open: bool) -> None:
        self.victim = Side(role.name.lower(), b"v" * 16, "victim")
        self.victim.session.open(self.now_s)
        self.read()
        if is_open:
            assert self.hello is not None
            mine = self.greeting(b"n" * 16, echo=self.hello.nonce)
            self.hand(encode_greeting(layout.KIND_WELCOME, mine))
            assert self.victim.session.state is State.OPEN

    def greeting(self, nonce: bytes, **fields: Any) -> Greeting:
        session = self.victim.session
        role = Role.GUEST if session.config.role is Role.HOST else Role.HOST
        honest = Greeting(
            1, 1, role, b"p" * 16, nonce, ZERO_ID, session._handshake.session_id,
            session._sender.base, session._receiver.next, session._receiver.next, 10**6,
            FRAME_BYTES_MAX, MESSAGE_BYTES_MAX, REASSEMBLY_BYTES_MAX, "peer", "",
        )  # fmt: skip
        return honest._replace(**fields)

    def hand(self, data: bytes) -> None:
        self.bytes_in += len(data)
        for told in self.victim.session.receive_data(data, self.now_s):
            self.reached[type(told).__name__.lower()] += 1

    @rule()
    def read(self) -> None:
        """The victim's output is read; its greetings are noted."""
        while data := self.victim.session.data_to_send():
            self.bytes_out += len(data)
            for frame in read_frames(data):
                made = decode_greeting(frame.payload)
                if made is not None and frame.kind == layout.KIND_HELLO:
                    self.hello = made
                elif made is not None and frame.kind == layout.KIND_WELCOME:
                    self.welcome = made

    @rule(
        kind=st.integers(4, 9),
        flags=st.one_of(st.integers(0, 3), st.integers(0, 255)),
        stream=st.one_of(st.integers(0, 3), st.integers(0, 255)),
        total=st.one_of(st.integers(0, 100_000), small_or_any),
        seq=near,
        ack=near,
        credit=near,
        payload=fragments,
        times=st.sampled_from([1, 1, 5, 100]),
    )
    def frames(
        self,
        kind: int,
        flags: int,
        stream: int,
        total: int,
        seq: int,
        ack: int,
        credit: int,
        payload: bytes,
        times: int,
    ) -> None:
        """Any frame, in any state, with numbers near those that make sense."""
        session = self.victim.session
        key = session._decoder.candidate or session._decoder.key
        for _ in range(times if key is not None else 0):
            assert key is not None
            self.hand(
                encode_frame(
                    key,
                    kind,
                    flags,
                    stream,
                    total,
                    (session._receiver.next + seq) % 2**64,
                    (session._sender.base + ack) % 2**64,
                    (session._sender.credit + credit) % 2**64,
                    payload,
                )
            )
            key = session._decoder.key or key

    @rule(total=st.integers(20_000, MESSAGE_BYTES_MAX), stream=st.integers(0, STREAMS - 1))
    def begin_a_message_and_never_finish(self, total: int, stream: int) -> None:
        self.frames(layout.KIND_DATA, layout.FLAG_FIRST, stream, total, 0, 0, 0, b"begun", 1)

    @rule(
        again=st.booleans(),
        fields=st.fixed_dictionaries(
            {},
            optional={
                "version_min": st.integers(0, 3),
                "version_max": st.integers(0, 3),
                "role": st.integers(0, 3),
                "instance": st.sampled_from([b"p" * 16, b"q" * 16, b"v" * 16]),
                "session": st.sampled_from([ZERO_ID, b"s" * 16]),
                "recv_next": st.integers(0, 2**64 - 1),
                "send_base": st.integers(0, 2**64 - 1),
                "send_next": st.integers(0, 2**64 - 1),
                "credit": st.integers(0, 2**64 - 1),
                "frame_bytes_max": st.integers(0, 5000),
                "message_bytes_max": st.integers(0, 2**32 - 1),
                "reassembly_bytes_max": st.integers(0, 2**32 - 1),
                "name": st.text(max_size=70),
            },
        ),
        kind=st.sampled_from([layout.KIND_HELLO, layout.KIND_WELCOME]),
        times=st.sampled_from([1, 1, 1, 50]),
        prove=st.booleans(),
    )
    def greet(
        self, again: bool, fields: dict[str, Any], kind: int, times: int, prove: bool
    ) -> None:
        """A HELLO or WELCOME, as wrong as can be; perhaps a storm; perhaps proved at once."""
        for _ in range(times):
            self.drawn += not again
            echo = self.hello.nonce if self.hello and kind == layout.KIND_WELCOME else ZERO_ID
            made = self.greeting(self.drawn.to_bytes(16, "big"), echo=echo)._replace(**fields)
            self.hand(encode_greeting(kind, made))
            if times > 1 and self.drawn % 7 == 0:
                self.read()
        if prove and self.victim.session._decoder.candidate is not None:
            self.reached["proved"] += 1
            self.frames(layout.KIND_ACK, 0, 0, 0, 0, 0, 0, b"", 1)

    @rule(text=st.binary(max_size=300))
    def refuse(self, text: bytes) -> None:
        nonce = self.hello.nonce if self.hello else ZERO_ID
        self.hand(encode_frame(NO_KEY, layout.KIND_REFUSE, 0, 0, 0, 0, 0, 0, nonce + text))

    @rule(times=st.integers(1, 300), ack=st.integers(0, 1))
    def rewind_storm(self, times: int, ack: int) -> None:
        for _ in range(times):
            self.frames(layout.KIND_REWIND, 0, 0, 0, 0, ack, 0, b"", 1)
            self.read()

    @rule(data=st.one_of(st.binary(max_size=100), st.just(MAGIC * 200)))
    def noise(self, data: bytes) -> None:
        self.hand(data)

    @precondition(lambda self: self.victim.session.backlog_bytes < 200_000)
    @rule(stream=streams, size=sizes)
    def victim_sends(self, stream: int, size: int) -> None:
        try:
            self.victim.session.send(b"m" * size, stream)
        except LimitExceeded:
            return
        self.own_bytes += size + (size // 1000 + 1) * OVERHEAD_BYTES

    @rule(seconds=st.sampled_from([0.02, 0.3, 2.0, 31.0]))
    def wait(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while True:
            at_s = self.victim.session.next_timeout()
            if at_s is None or at_s > until_s:
                break
            self.now_s = max(self.now_s, at_s)
            self.victim.session.handle_timeout(self.now_s)
            again_s = self.victim.session.next_timeout()
            assert again_s is None or again_s > self.now_s, "it spins"
            self.read()
        self.now_s = until_s

    @invariant()
    def nothing_grows(self) -> None:
        session = self.victim.session
        check_limits(session)
        held = sum(partial.received for partial in session._receiver._partials.values())
        assert held <= REASSEMBLY_BYTES_MAX
        assert len(session._handshake._attached) <= 255
        assert session._events == []

    @invariant()
    def it_says_little_more_than_it_is_told(self) -> None:
        elapsed_s = self.now_s - self.started_s
        rewinds = 1 + elapsed_s / REWIND_S
        allowed = (
            100_000
            + 8 * self.bytes_in
            + self.own_bytes
            + rewinds * IN_FLIGHT_BYTES_MAX[self.victim.name]
            + elapsed_s * 5000
        )
        assert self.bytes_out <= allowed

    def teardown(self) -> None:
        """A well-behaved peer comes on the same stream. All is well."""
        for name, times in self.reached.items():
            event(name)
            REACH[f"hostile: {name}"] += times
        victim = self.victim
        other = "guest" if victim.name == "host" else "host"
        peer = Side(other, b"g" * 16, "good")
        peer.session.open(self.now_s)
        ends = (victim, peer)
        for _ in range(300):
            for end, to in (ends, ends[::-1]):
                while data := end.session.data_to_send():
                    to.events += to.session.receive_data(data, self.now_s)
            if victim.session.state is State.OPEN and peer.session.state is State.OPEN:
                victim.session.send(b"good day", 1)
                peer.session.send(b"how do you do", 1)
            due = [end.session.next_timeout() for end in ends]
            self.now_s = max(self.now_s, min(at for at in due if at is not None))
            for end in ends:
                end.session.handle_timeout(self.now_s)
            if b"how do you do" in victim.received() and b"good day" in peer.received():
                return
        raise AssertionError("a hostile peer spoilt the session for good")


def encode_greeting(kind: int, made: Greeting) -> bytes:
    return encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, made.encode())


@pytest.mark.long
def test_a_hostile_peer() -> None:
    REACH.clear()
    tries = settings(settings(), max_examples=2 * settings().max_examples, stateful_step_count=40)
    run_state_machine_as_test(HostilePeer, settings=tries)
    print("\n".join(f"{times:7} {name}" for name, times in sorted(REACH.items())))
    assert REACH["hostile: violation"] and REACH["hostile: opened"] and REACH["hostile: proved"]
