"""A session and a hostile peer that knows its keys: the fuzzer's bytes are what the peer does."""

from __future__ import annotations

import hashlib
import math

from tests.fuzz.script import Script
from vchan.errors import LimitExceeded
from vchan.session import (
    BACKLOG_BYTES_MAX,
    IN_FLIGHT_BYTES_MAX,
    WINDOW_BYTES,
    Config,
    Event,
    Role,
    Session,
    State,
)
from vchan.wire import layout
from vchan.wire.frames import (
    FRAME_BYTES_MAX,
    NO_KEY,
    OVERHEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    ZERO_ID,
    Greeting,
    Key,
    encode_frame,
)

MESSAGE_BYTES_MAX = 64 * 1024
REASSEMBLY_BYTES_MAX = 2 * MESSAGE_BYTES_MAX
STEPS_MAX = 200
_NONCE = b"the peer's nonce"
_SIZES = (0, 1, 5, 100, 2048, PAYLOAD_BYTES_MAX)
_MOST = (2**32 - 1, 2**64 - 1)


def sealed(script: Script, key: Key, *, seq: int, ack: int) -> bytes:
    """A frame whose CRCs are right and whose fields are the script's choice.

    Args:
        seq, ack: What is true, to choose near it.
    """
    kind, flags, stream = script.number() % 16, script.number() % 8, script.number() % 32
    size = script.pick(_SIZES)
    total = script.pick((size, size + 1, 2 * size, MESSAGE_BYTES_MAX, _MOST[0], script.number(4)))
    near = (0, 1, -1, 2, 1000)
    seq = script.pick((*(max(0, seq + by) for by in near), _MOST[1]))
    ack = script.pick((*(max(0, ack + by) for by in near), _MOST[1]))
    credit = script.pick((0, WINDOW_BYTES, 4 * WINDOW_BYTES, _MOST[1], script.number(8)))
    payload = script.take(min(size, 32)).ljust(size, b"x")
    return encode_frame(key, kind, flags, stream, total, seq, ack, credit, payload)


class _Victim:
    """A session, and what must hold of it after everything that its peer may do."""

    def __init__(self, role: Role) -> None:
        config = Config(
            role,
            b"victim".ljust(16, b"-"),
            "victim",
            message_bytes_max=MESSAGE_BYTES_MAX,
            reassembly_bytes_max=REASSEMBLY_BYTES_MAX,
        )
        self._draws = 0
        self.session = Session(config, self._entropy)
        self.now_s = 1000.0
        self.sent_bytes = 0  # by the peer
        self.wrote_bytes = 0
        self.queued_bytes = 0
        self.session.open(self.now_s)

    def _entropy(self, size: int) -> bytes:
        self._draws += 1
        return hashlib.sha256(b"%d" % self._draws).digest()[:size]

    def receive(self, data: bytes) -> None:
        self.sent_bytes += len(data)
        self.check_events(self.session.receive_data(data, self.now_s), len(data))

    def check_events(self, events: list[Event], size: int) -> None:
        """Not more of them than there could be frames in the bytes, and one that was held."""
        assert len(events) <= 2 * (size // OVERHEAD_BYTES + 2)

    def write(self) -> None:
        """All it has to say, to a stream that takes everything."""
        for _ in range(200):
            data = self.session.data_to_send()
            self.wrote_bytes += len(data)
            if not data:
                return
        raise AssertionError("it never stops writing")

    def wait(self, for_s: float) -> None:
        """Timers fire at their time; none may want to fire again at once."""
        until_s = self.now_s + for_s
        for _ in range(200):
            at_s = self.session.next_timeout()
            if at_s is None or at_s > until_s:
                break
            assert math.isfinite(at_s)
            self.now_s = max(self.now_s, at_s)
            self.check_events(self.session.handle_timeout(self.now_s), 0)
            self.write()
            next_s = self.session.next_timeout()
            assert next_s is None or next_s > self.now_s, "a timer that fires for ever"
        else:
            raise AssertionError(f"over 200 timeouts in {for_s} s")
        self.now_s = until_s

    def say(self, size: int, stream: int) -> None:
        if self.session.backlog_bytes <= BACKLOG_BYTES_MAX:  # as its users bound it
            try:
                self.session.send(bytes(size), stream)
                self.queued_bytes += size
            except LimitExceeded:
                pass

    def check(self) -> None:
        """Its books are right, and everything is within its limit."""
        session = self.session
        partials = session._receiver._partials.values()
        assert (
            session._receiver.reassembly
            == sum(each.total for each in partials)
            <= REASSEMBLY_BYTES_MAX
        )
        assert all(each.received <= each.total for each in partials)
        assert session._decoder._held <= FRAME_BYTES_MAX
        cost = sum(len(payload) + OVERHEAD_BYTES for *_, payload in session._sender._sent)
        assert session._sender.in_flight == cost <= IN_FLIGHT_BYTES_MAX
        assert session._sender.tail == session._sender.base + len(session._sender._sent)
        assert session._sender.base <= session._sender.cursor <= session._sender.tail
        waiting = sum(len(m) for s in session._sender._streams.values() for m in s.messages)
        assert session._sender.backlog == waiting - sum(
            s.offset for s in session._sender._streams.values()
        )
        assert not session._events

    def check_work(self, waits: int) -> None:
        """What it wrote is in proportion to what it read, to what it was asked to say, and to
        time."""
        resends = 1 + waits
        allowed = 40 * self.sent_bytes + 4 * self.queued_bytes
        allowed += resends * 2 * (IN_FLIGHT_BYTES_MAX + FRAME_BYTES_MAX)
        assert self.wrote_bytes <= allowed, f"{self.wrote_bytes} for {self.sent_bytes}"


def run(data: bytes) -> None:
    """A hostile peer does what it likes; the session stays within its limits."""
    script = Script(data)
    victim = _Victim(Role.HOST if script.number() % 2 else Role.GUEST)
    waits = 0
    for _ in range(STEPS_MAX):
        if script.at_end:
            break
        waits += _step(script, victim)
        victim.check()
    victim.write()
    victim.wait(60.0)
    victim.check()
    victim.check_work(waits + 60)


def _step(script: Script, victim: _Victim) -> int:
    """What the peer, time, or the victim's own users do next. Returns seconds that passed."""
    session = victim.session
    what = script.number() % 16
    if what < 6:
        key = session._decoder.key or session._decoder.candidate or NO_KEY
        frame = sealed(script, key, seq=session._receiver.next, ack=session._sender.tail)
        victim.receive(frame * (1 + script.number() % 4))
    elif what == 6:
        victim.receive(script.block())
    elif what == 7:
        victim.receive(_greeting(script, session))
    elif what == 8:
        _shake_hands(victim)
    elif what == 9:
        victim.write()
    elif what == 10:
        seconds = script.pick((0.01, 0.3, 1.0, 5.0, 31.0))
        victim.wait(seconds)
        return int(seconds) + 1
    elif what == 11:
        victim.say(script.pick((1, 100, PAYLOAD_BYTES_MAX, 40_000)), script.number() % 16)
    elif what == 12:
        if session.state is State.CLOSED:
            session.open(victim.now_s)
        else:
            session.close()
    elif what == 13:
        session.data_to_send()
    else:  # a peer of good will: everything has arrived
        ack = encode_frame(
            session._decoder.key or NO_KEY,
            layout.KIND_ACK,
            0,
            0,
            0,
            session._receiver.next,
            session._sender.tail,
            session._sender._tx_cost + WINDOW_BYTES,
            b"",
        )
        victim.receive(ack)
    return 0


def _greeting(script: Script, session: Session) -> bytes:
    kind = script.pick((layout.KIND_HELLO, layout.KIND_WELCOME, layout.KIND_REFUSE))
    if kind == layout.KIND_REFUSE:
        nonce = session._handshake.hello.nonce if session._handshake.hello else ZERO_ID
        return encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, nonce + script.block()[:900])
    made = _peer_greeting(session)._replace(
        version_min=script.pick((1, 0, 2, 255)),
        version_max=script.pick((1, 0, 2, 255)),
        nonce=script.number(1).to_bytes(16, "big"),
        session=script.pick((ZERO_ID, session._handshake.session_id)),
        recv_next=script.pick((0, session._sender.tail, session._sender.base, 2**64 - 1)),
        send_base=script.pick((0, session._receiver.next, 2**64 - 1)),
        send_next=script.pick((0, session._receiver.next, 2**64 - 1)),
        credit=script.pick((0, WINDOW_BYTES, 2**64 - 1)),
        frame_bytes_max=script.pick((FRAME_BYTES_MAX, 0, 2048, 2**32 - 1)),
        message_bytes_max=script.pick((MESSAGE_BYTES_MAX, 0, 2**32 - 1)),
        reassembly_bytes_max=script.pick((REASSEMBLY_BYTES_MAX, MESSAGE_BYTES_MAX, 0, 2**32 - 1)),
        name=script.take(script.number() % 40).decode("utf-8", "replace"),
    )
    return encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, made.encode())


def _peer_greeting(session: Session) -> Greeting:
    role = Role.GUEST if session.config.role is Role.HOST else Role.HOST
    return Greeting(
        1,
        1,
        role,
        b"peer".ljust(16, b"-"),
        _NONCE,
        session._handshake.hello.nonce if session._handshake.hello else ZERO_ID,
        ZERO_ID,
        0,
        0,
        0,
        WINDOW_BYTES,
        FRAME_BYTES_MAX,
        MESSAGE_BYTES_MAX,
        REASSEMBLY_BYTES_MAX,
        "peer",
        "",
    )


def _shake_hands(victim: _Victim) -> None:
    """Answer its HELLO, as a good peer does."""
    victim.write()
    session = victim.session
    if session._handshake.hello is not None and session.state is not State.CLOSED:
        welcome = _peer_greeting(session)
        victim.receive(
            encode_frame(NO_KEY, layout.KIND_WELCOME, 0, 0, 0, 0, 0, 0, welcome.encode())
        )
