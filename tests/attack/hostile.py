"""A guest that attacks its host, at full speed. Needs vchan alone: it runs inside of VMs, too.

    python -m tests.attack.hostile CHANNEL ATTACK SECONDS [WORD]

CHANNEL is fd:NUMBER, a socket that listens (as QEMU's does), or a port's device. The time counts
from the first connection; SIGTERM ends it before. WORD is what some attacks are about: another VM's
UUID, the id of a request that is another's, or a module. Prints what it did, as JSON.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from vchan.rpc.messages import (
    CALL,
    FAILURE,
    FINAL,
    TOPICS_MAX,
    BadMessage,
    Message,
    Receipt,
    Reply,
    Request,
    Settled,
    Subscribe,
    Topic,
    Unknown,
    decode,
    encode,
)
from vchan.session import Config, Received, Role, Session, State
from vchan.streams import messages as streams
from vchan.wire import layout
from vchan.wire.frames import (
    BYTE_STREAMS,
    NO_KEY,
    OVERHEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    ZERO_ID,
    Decoder,
    Greeting,
    Key,
    encode_frame,
)

WHOLE = layout.FLAG_FIRST | layout.FLAG_LAST
READ_BYTES = 1 << 16
BLOB_BYTES = 1 << 16
"""Written at a time."""
ASKED_BEFORE = 20
"""Requests whose answers the host has to keep, and to send again."""
STAND_S = 0.05
"""How often a guest that waits looks at the clock."""


SHARED_EXCHANGES = ("agent_fanout", "control_fanout", "control_fan\nout", "amq.fanout", "amq.topic")
"""Oslo.messaging's for fanouts, and a broker's own. RabbitMQ takes ends of lines out of names."""


class TimeIsUp(Exception):
    """The attack is over."""


class Gone(Exception):
    """The host has closed the stream."""


class Wire(Protocol):
    """What an attacker's bytes go over, and the clock and the chance that it goes by."""

    def connect(self) -> bool:
        """Whether there is a new stream from the host now; waits STAND_S for it at most."""

    def wait(self, *, read: bool, write: bool) -> tuple[bool, bool]:
        """Which of those can be done, as soon as one can, or after STAND_S."""

    def read(self) -> bytes:
        """What the host has said. Raises BlockingIOError, or Gone."""

    def write(self, data: bytes | memoryview) -> int:
        """How much of it was taken. Raises BlockingIOError, or Gone."""

    def time(self) -> float:
        """Seconds."""

    def random(self, size: int) -> bytes:
        """Random bytes."""

    def close(self) -> None:
        """No more."""


class _DescriptorWire:
    """A stream that the kernel knows."""

    time = staticmethod(time.monotonic)
    random = staticmethod(os.urandom)

    def __init__(self) -> None:
        self._fd = -1

    def wait(self, *, read: bool, write: bool) -> tuple[bool, bool]:
        """See Wire."""
        fds = [self._fd]
        readable, writable, _ = select.select(
            fds if read else [], fds if write else [], [], STAND_S
        )
        return bool(readable), bool(writable)

    def _drop(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SocketWire(_DescriptorWire):
    """A socket that listens, as QEMU's does."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._server = socket.socket(fileno=fd)

    def connect(self) -> bool:
        """See Wire."""
        self._drop()
        if not select.select([self._server], [], [], STAND_S)[0]:
            return False
        connected, _ = self._server.accept()
        connected.setblocking(False)
        self._fd = connected.detach()
        return True

    def read(self) -> bytes:
        """See Wire."""
        try:
            data = os.read(self._fd, READ_BYTES)
        except ConnectionError as error:
            raise Gone from error
        if not data:
            raise Gone
        return data

    def write(self, data: bytes | memoryview) -> int:
        """See Wire."""
        try:
            return os.write(self._fd, data)
        except ConnectionError as error:
            raise Gone from error

    def close(self) -> None:
        """See Wire."""
        self._drop()
        self._server.close()


class PortWire(_DescriptorWire):
    """A guest's port: it is always there, the host is not."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._fd, 0)  # a hang-up is told all the same

    def connect(self) -> bool:
        """See Wire."""
        if self._is_away():
            time.sleep(STAND_S)
            return False
        return True

    def _is_away(self) -> bool:
        return any(events & select.POLLHUP for _, events in self._poll.poll(0))

    def wait(self, *, read: bool, write: bool) -> tuple[bool, bool]:
        """See Wire."""
        if self._is_away():
            raise Gone
        return super().wait(read=read, write=write)

    def read(self) -> bytes:
        """See Wire."""
        data = os.read(self._fd, READ_BYTES)
        if not data:
            raise Gone
        return data

    def write(self, data: bytes | memoryview) -> int:
        """See Wire."""
        try:
            return os.write(self._fd, data)
        except BrokenPipeError as error:
            raise Gone from error

    def close(self) -> None:
        """See Wire."""
        self._drop()


class Hostile:
    """The guest's end of a channel: it can shake hands like a good one, and then knows the keys.

    Args:
        seconds: For how long, from the first connection.
    """

    def __init__(self, wire: Wire, seconds: float) -> None:
        self._wire = wire
        self._seconds = seconds
        self._until_s = float("inf")
        names = ("connections", "sessions", "bytes_sent", "bytes_read", "requests_heard")
        self.counts = dict.fromkeys(names, 0)
        self.random = wire.random
        self.key: Key = NO_KEY
        self.seq = 0
        self.recv_next = 0
        self.credit = 0
        self.cost = 0
        self.heard: list[Message] = []
        self.wanted: dict[bytes, None] = {}  # byte streams that the host asks for
        self.acknowledges = True
        self._decoder = Decoder()

    def attack(self, name: str, word: str) -> dict[str, int]:
        """Do it, come back when thrown out, until the time is up. Returns what was done."""
        try:
            while True:
                try:
                    self.connect()
                    self.shake_hands()
                    {**ATTACKS, **CONTROLS}[name](self, word)
                except Gone:
                    self.check_time()
        except TimeIsUp:
            return self.counts
        finally:
            self._wire.close()

    # ---------------------------------------------------------------- the stream

    def connect(self) -> None:
        """A new stream from the host, or the port, which is always there."""
        while not self._wire.connect():
            self.check_time()
        if not self.counts["connections"]:
            self._until_s = self._wire.time() + self._seconds
        self.counts["connections"] += 1

    def check_time(self) -> None:
        """Raise TimeIsUp if it is."""
        if self._wire.time() >= self._until_s:
            raise TimeIsUp

    def write(self, data: bytes, *, deaf: bool = False) -> None:
        """All of it, reading meanwhile what the host says, unless `deaf`."""
        view = memoryview(data)
        while view:
            self.check_time()
            readable, writable = self._wire.wait(read=not deaf, write=True)
            if readable:
                self.read()
            if writable:
                view = view[self._write_some(view) :]

    def _write_some(self, data: bytes | memoryview) -> int:
        try:
            taken = self._wire.write(data)
        except BlockingIOError:
            return 0
        self.counts["bytes_sent"] += taken
        return taken

    def _read_some(self) -> bytes:
        try:
            data = self._wire.read()
        except BlockingIOError:
            return b""
        self.counts["bytes_read"] += len(data)
        return data

    def read(self) -> None:
        """What the host says: frames, its credit, its messages."""
        frames = self._decoder.receive_data(self._read_some())
        while self._decoder.stopped:
            frames += self._decoder.receive_data(b"")
        for frame in frames:
            self.credit = max(self.credit, frame.credit)
            if frame.kind == layout.KIND_DATA and frame.seq == self.recv_next:
                self.recv_next += 1
                if frame.flags == WHOLE:
                    self._hear(frame.payload)

    def _hear(self, data: bytes) -> None:
        if streams.is_of_family(data):
            self._hear_of_stream(streams.decode(data))
            return
        message = decode(data)
        if not isinstance(message, BadMessage | Unknown):
            self.heard.append(message)
            self.counts["requests_heard"] += isinstance(message, Request)

    def _hear_of_stream(self, message: streams.StreamMessage | streams.Malformed) -> None:
        match message:
            case streams.Open():
                self.wanted[message.id] = None
            case streams.Reset():
                self.wanted.pop(message.id, None)
            case _:
                pass

    def stand(self, *, deaf: bool = False) -> None:
        """Wait a moment."""
        self.check_time()
        if self._wire.wait(read=not deaf, write=False)[0]:
            self.read()

    # ---------------------------------------------------------------- a session

    def shake_hands(self) -> None:
        """Open a session, as a good guest does."""
        config = Config(Role.GUEST, self.random(16), "hostile", features=BYTE_STREAMS)
        session = Session(config, self.random)
        session.open(self._wire.time())
        while session.state is not State.OPEN:
            self.check_time()
            while data := session.data_to_send():
                self._write_all(data)
            if self._wire.wait(read=True, write=False)[0]:
                events = session.receive_data(self._read_some(), self._wire.time())
            else:
                events = session.handle_timeout(self._wire.time())
        self._take_over(session, events)
        while not self.credit:  # before that, the first DATA would be the whole of the attack
            self.stand()

    def _write_all(self, data: bytes) -> None:
        while data:
            self.check_time()
            if self._wire.wait(read=False, write=True)[1]:
                data = data[self._write_some(data) :]

    def _take_over(self, session: Session, events: Sequence[object]) -> None:
        self.counts["sessions"] += 1
        self._write_all(session.data_to_send())  # the proof that we have the key
        self.key = session._tx_key
        self.seq = self.cost = 0
        self.recv_next = session._receiver.next
        self.credit = session._sender.credit
        self._decoder = session._decoder
        self.heard = []
        self.wanted.clear()
        for event in events:
            if isinstance(event, Received):
                self._hear(event.message)

    def frame(
        self,
        kind: int,
        payload: bytes = b"",
        *,
        flags: int = 0,
        stream: int = 0,
        total: int = 0,
        ack: int | None = None,
        credit: int = 1 << 40,
    ) -> bytes:
        """A sealed frame that says what it likes."""
        seq = self.seq
        if kind == layout.KIND_DATA:
            self.seq += 1
            self.cost += len(payload) + OVERHEAD_BYTES
        if ack is None:
            ack = self.recv_next if self.acknowledges else 0
        return encode_frame(self.key, kind, flags, stream, total, seq, ack, credit, payload)

    def message(self, data: bytes, stream: int = 0) -> bytes:
        """A whole small message."""
        return self.frame(layout.KIND_DATA, data, flags=WHOLE, stream=stream, total=len(data))

    def send(self, data: bytes, stream: int = 0, *, deaf: bool = False) -> None:
        """A whole message as soon as the host grants credit for it."""
        self.flow([data], stream, deaf=deaf)

    def flow(self, messages: list[bytes], stream: int = 0, *, deaf: bool = False) -> None:
        """Whole small messages, in large writes, within the credit."""
        blob = bytearray()
        for data in messages:
            while self.cost + len(data) + OVERHEAD_BYTES > self.credit:
                if blob:
                    self.write(bytes(blob), deaf=deaf)
                    blob.clear()
                self.stand(deaf=deaf)
            blob += self.message(data, stream)
        self.write(bytes(blob), deaf=deaf)


# --- the attacks: each goes on until the time is up, or the host has closed the stream ---

Attack = Callable[[Hostile, str], None]


def torn_frame_smuggling(guest: Hostile, word: str) -> None:
    """Frames inside the payloads of frames that are torn: greetings, and frames without a key."""
    hello = _hello(guest, guest.random(16))
    forged = encode_frame(NO_KEY, layout.KIND_DATA, WHOLE, 0, 5, 0, 0, 0, b"\x01" * 5)
    carrier = encode_frame(
        Key(guest.key[0], guest.key[1] ^ 1),
        layout.KIND_DATA,
        WHOLE,
        0,
        0,
        0,
        0,
        0,
        (hello + forged) * 40,
    )
    blob = b"".join(carrier[: 60 + 97 * n] for n in range(64))
    while True:
        guest.write(blob)


def hello_storm(guest: Hostile, word: str) -> None:
    """Greetings, each with another nonce, as fast as they go."""
    while True:
        guest.write(b"".join(_hello(guest, guest.random(16)) for _ in range(256)))


def handshake_storm(guest: Hostile, word: str) -> None:
    """Whole handshakes, one behind the other."""
    while True:
        guest.shake_hands()


def _hello(guest: Hostile, nonce: bytes) -> bytes:
    made = Greeting(
        1, 1, Role.GUEST, guest.random(16), nonce, ZERO_ID, ZERO_ID, 0, 0, 0, 1 << 18,
        16384, 1 << 22, 1 << 23, "hostile", "",
    )  # fmt: skip
    return encode_frame(NO_KEY, layout.KIND_HELLO, 0, 0, 0, 0, 0, 0, made.encode())


def giant_lengths(guest: Hostile, word: str) -> None:
    """Messages of 4 GiB, by what their first fragments say."""
    while True:
        first = layout.FLAG_FIRST
        guest.write(
            guest.frame(layout.KIND_DATA, b"x" * 1000, flags=first, stream=3, total=2**32 - 1)
        )
        guest.shake_hands()


def never_finishing(guest: Hostile, word: str) -> None:
    """Two messages of 4 MiB, all but their last bytes; then nothing."""
    for stream in (1, 2):
        left = (1 << 22) - 1000
        flags = layout.FLAG_FIRST
        while left:
            payload = b"x" * min(left, PAYLOAD_BYTES_MAX)
            while guest.cost + len(payload) + OVERHEAD_BYTES > guest.credit:
                guest.stand()
            guest.write(
                guest.frame(layout.KIND_DATA, payload, flags=flags, stream=stream, total=1 << 22)
            )
            flags = 0
            left -= len(payload)
    while True:
        guest.stand()


def tiny_frames(guest: Hostile, word: str) -> None:
    """Receipts for nothing: the smallest messages that are any."""
    receipt = encode(Receipt(bytes(16)))
    while True:
        guest.flow([receipt] * 500)


def tiny_fragments(guest: Hostile, word: str) -> None:
    """A large message in fragments of one byte."""
    flags, cost = layout.FLAG_FIRST, 1 + OVERHEAD_BYTES
    while True:
        blob = bytearray()
        while len(blob) < BLOB_BYTES and guest.cost + cost <= guest.credit:
            blob += guest.frame(layout.KIND_DATA, b"x", flags=flags, stream=3, total=1 << 20)
            flags = 0
        if blob:
            guest.write(bytes(blob))
        else:
            guest.stand()


def unread_replies(guest: Hostile, word: str) -> None:
    """Requests, whose answers nobody reads."""
    while True:
        guest.flow([_request(guest) for _ in range(200)], deaf=True)
        guest.stand(deaf=True)


def unread_answers(guest: Hostile, word: str) -> None:
    """Calls whose answers are large, and that nobody reads."""
    while True:
        guest.flow([_request(guest, LARGE, "control") for _ in range(16)], deaf=True)
        guest.stand(deaf=True)


AT_A_TIME = 16
"""Calls with large answers."""
LARGE = b'{"method":"large","args":{"size":2000000}}'


def large_answers(guest: Hostile, word: str) -> None:
    """Calls whose answers are large, read and settled as fast as it goes."""
    while True:
        ids = [guest.random(16) for _ in range(AT_A_TIME)]
        calls = [Request(each, CALL, 60_000, 0, "openstack", "control", "", LARGE) for each in ids]
        guest.flow(list(map(encode, calls)))
        quiet = 0
        while quiet < 4:
            before = guest.counts["bytes_read"]
            guest.stand()
            guest.write(guest.frame(layout.KIND_ACK))
            quiet = quiet + 1 if guest.counts["bytes_read"] == before else 0
        guest.flow([encode(Settled(tuple(ids)))])


def _request(
    guest: Hostile,
    body: bytes = b'{"method":"note","args":{"sender":"hostile","number":1}}',
    topic: str = "nobody",
    flags: int = CALL,
    exchange: str = "openstack",
) -> bytes:
    return encode(Request(guest.random(16), flags, 5000, 0, exchange, topic, "", body))


def acks_of_unsent(guest: Hostile, word: str) -> None:
    """Acknowledges what was never sent."""
    while True:
        guest.write(guest.frame(layout.KIND_ACK, ack=1 << 60))
        guest.shake_hands()


def holes(guest: Hostile, word: str) -> None:
    """Frames out of their order, so that the host misses one after the other; and asks for all that
    the host has sent, again and again."""
    guest.acknowledges = False
    guest.flow([_request(guest) for _ in range(ASKED_BEFORE)])
    while True:
        blob = bytearray()
        while len(blob) < BLOB_BYTES and guest.cost + 1000 <= guest.credit:
            first, second = (guest.message(encode(Receipt(bytes(16)))) for _ in range(2))
            blob += second + first + second + guest.frame(layout.KIND_REWIND)
        if blob:
            guest.write(bytes(blob))
        else:
            guest.stand()


def credit_games(guest: Hostile, word: str) -> None:
    """Grants the host everything and nothing; acknowledges nothing, and asks for what has long
    answers; goes on when the host grants no more."""
    guest.acknowledges = False
    request = functools.partial(_request, guest, topic=f"forbidden{'x' * 240}")
    while True:
        for credit in (0, 2**64 - 1, 0):
            guest.write(guest.frame(layout.KIND_ACK, credit=credit))
        granted, patience = guest.credit, 20
        while patience:
            if guest.cost + BLOB_BYTES // 2 < guest.credit:
                guest.write(b"".join(guest.message(request()) for _ in range(50)))
            else:
                guest.stand()
                patience = patience - 1 if guest.credit == granted else 20
                granted = guest.credit
        guest.write(b"".join(guest.message(request()) for _ in range(2000)), deaf=True)
        guest.shake_hands()


def id_forgery(guest: Hostile, word: str) -> None:
    """Answers to requests that nobody made, and the same two requests again and again."""
    again = [_request(guest), _request(guest, topic="control", flags=0)]
    while True:
        forged = [encode(Reply(guest.random(16), FINAL, b"1")) for _ in range(200)]
        guest.flow([*forged, *again * 25])


def replies_for_others(guest: Hostile, word: str) -> None:
    """Answers, receipts and cancellations for another VM's call, whose id it has come to know."""
    request_id = bytes.fromhex(word)
    answers = [encode(Reply(request_id, FINAL, b'"forged"')), encode(Receipt(request_id))]
    answers += [bytes((5,)) + request_id, encode(Settled((request_id,)))]
    while True:
        guest.flow(answers * 50)


def subscription_bomb(guest: Hostile, word: str) -> None:
    """As many topics as may be, and others at once."""
    bombs = []
    for number in range(50):
        topics = [Topic("openstack", f"t{number}x{each}" + "y" * 100) for each in range(TOPICS_MAX)]
        bombs.append(encode(Subscribe(tuple(topics))))
    while True:
        guest.flow(bombs)


def topic_squatting(guest: Hostile, word: str) -> None:
    """Names another VM's UUID in every way, and wild cards; and exchanges where every message goes
    to everybody, to hear it there and to send it."""
    names = ["agent", f"agent.{word}", f"{word}", f"agent_fanout_{word}", "#", "*", "agent.#"]
    names += [f"vchan_vm_{word}", "vchan", "agent.*", f"../{word}", "\x00", "agent\n"]
    topics = [Topic("openstack", name) for name in names]
    topics += [Topic(exchange, "agent") for exchange in SHARED_EXCHANGES]
    requests = [
        _request(guest, topic="control", flags=0, exchange=exchange)
        for exchange in SHARED_EXCHANGES
    ]
    while True:
        guest.flow([encode(Subscribe(tuple(topics))), *requests])
        guest.stand()


def context_injection(guest: Hostile, word: str) -> None:
    """Privileged keys, in every spelling that comes to mind."""
    context = {
        "is_admin": True, "Is_Admin": True, "roles": ["admin"], "_roles": ["admin"],
        "auth_token": "x", "user_id": "admin", "project_id": "admin", "_context_is_admin": True,
        "_msg_id": "0" * 32, "_reply_q": "q", "vchan_instance_uuid": "another",
        "request_id": {"is_admin": True}, "global_request_id": "req-\nx", "\uff49s_admin": True,
    }  # fmt: skip
    args = {"sender": "hostile", "number": 1}
    body = json.dumps({"method": "note", "args": args, "context": context}).encode()
    while True:
        guest.flow([_request(guest, body, "control") for _ in range(100)])


def exception_injection(guest: Hostile, word: str) -> None:
    """Failures of classes that do something when they are made, or when they are looked for."""
    args = ["touch /tmp/pwned"]
    named = {"class": "system", "module": word or "os", "message": "x"}
    failure = {**named, "tb": [], "args": args, "kwargs": {}}
    _answer(guest, [json.dumps(failure).encode()], FINAL | FAILURE)


def json_bombs(guest: Hostile, word: str) -> None:
    """Bodies that parsers do not like."""
    bombs = [
        b"[" * 15_000,
        b'{"method":"m","args":' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}",
        b'{"method":"m","args":' + b'{"a":' * 500 + b"1" + b"}" * 501,
        b'{"method":"m","args":{"n":' + b"9" * 10_000 + b"}}",
        b'{"method":"m","args":{"n":1e' + b"9" * 10 + b"}}",
        b'{"method":"m","args":{' + b",".join([b'"a":1'] * 2000) + b"}}",
        b'{"method":"\xff\xfe","args":{}}',
        b'{"method":"m","args":{"s":"\\ud800"}}',
        b"\x00" * 1000,
        b'{"method":"m","args":[' + b"0," * 5000 + b"0]}",
    ]
    while True:
        guest.flow([_request(guest, bomb) for bomb in bombs])


def json_bombs_in_answers(guest: Hostile, word: str) -> None:
    """The same, to who called."""
    _answer(guest, [b"[" * 15_000, b"[" * 500 + b"]" * 500], FINAL)


def audit_injection(guest: Hostile, word: str) -> None:
    """Names that would end a line of a log, or steer a terminal."""
    evil = 'x","verdict":"allow"}\n{"vm":"other","verdict":"allow\x1b[2J\u202e\x00'
    body = json.dumps({"method": evil[:200], "args": {}, "namespace": evil[:100]}).encode()
    while True:
        guest.flow([_request(guest, body, evil[:60]) for _ in range(100)])


def stops_reading(guest: Hostile, word: str) -> None:
    """Serves a topic, and then reads nothing any more; but it goes on speaking, as who is there."""
    guest.send(encode(Subscribe((Topic("openstack", "agent"),))))
    while True:
        guest.stand(deaf=True)
        guest.write(guest.frame(layout.KIND_ACK), deaf=True)


def unasked_streams(guest: Hostile, word: str) -> None:
    """Byte streams out of a guest, which nobody asked for."""
    offer = streams.encode(streams.StreamOffer(streams.VERSION, streams.VERSION))
    while True:
        asked = [
            streams.Open(guest.random(16), streams.NO_TAG, 0, 1 << 62, "tcp:22", '{"uid":0}')
            for _ in range(50)
        ]
        guest.flow([offer, *map(streams.encode, asked)])


def stream_games(guest: Hostile, word: str) -> None:
    """Bytes, credit, questions and ends of byte streams that nobody has."""
    blob = bytes(8000)
    while True:
        said: list[streams.StreamMessage] = [streams.StreamOffer(0, 255)]
        for _ in range(40):
            stream, tag = guest.random(16), guest.random(8)
            said += [
                streams.Progress(streams.ASK | streams.REWIND, stream, tag, 1 << 62, 1 << 62),
                streams.Part(streams.END, stream, tag, 1 << 61, blob),
                streams.Reset(255, stream, "x" * streams.TEXT_BYTES_MAX),
            ]
        guest.flow(list(map(streams.encode, said)))


def taken_streams(guest: Hostile, word: str) -> None:
    """Byte streams that a program on the host has opened: some are never answered, some taken and
    never read, with credit for everything; of some all is asked for again and again, and into some
    goes what there is no credit for."""
    blob, much = bytes(8000), 1 << 40
    tag = guest.random(8)
    guest.flow([streams.encode(streams.StreamOffer(streams.VERSION, streams.VERSION))])
    while True:
        said: list[streams.StreamMessage] = []
        for stream in guest.wanted:
            match stream[0] % 4:
                case 0:
                    continue
                case 1:
                    said.append(streams.Progress(0, stream, tag, 0, much))
                case 2:
                    again = streams.ASK | streams.REWIND
                    said += [streams.Progress(again, stream, tag, 0, much)] * 20
                case _:
                    said.append(streams.Progress(0, stream, tag, 0, much))
                    said.append(streams.Part(0, stream, tag, much, blob))
        if said:  # what the host has to say is read where its credit is used up
            guest.check_time()
            guest.flow(list(map(streams.encode, said)))
        else:
            guest.stand()


def garbage(guest: Hostile, word: str) -> None:
    """Random bytes, with beginnings of frames among them."""
    blob = b"".join(guest.random(300) + layout.MAGIC + guest.random(40) for _ in range(200))
    while True:
        guest.write(blob)


def _answer(guest: Hostile, bodies: list[bytes], flags: int) -> None:
    """Serve a topic, and answer every call with the next of these."""
    guest.send(encode(Subscribe((Topic("openstack", "agent"),))))
    bodies_in_turn = itertools.cycle(bodies)
    while True:
        guest.stand()
        asked, guest.heard = guest.heard, []
        for message in asked:
            if isinstance(message, Request):
                guest.send(encode(Reply(message.id, flags, next(bodies_in_turn))))


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        torn_frame_smuggling,
        hello_storm,
        handshake_storm,
        giant_lengths,
        never_finishing,
        tiny_frames,
        tiny_fragments,
        unread_replies,
        unread_answers,
        large_answers,
        acks_of_unsent,
        holes,
        credit_games,
        id_forgery,
        replies_for_others,
        subscription_bomb,
        topic_squatting,
        context_injection,
        exception_injection,
        json_bombs,
        json_bombs_in_answers,
        audit_injection,
        stops_reading,
        unasked_streams,
        stream_games,
        taken_streams,
        garbage,
    )
}


def quiet(guest: Hostile, word: str) -> None:
    """Says nothing more."""
    while True:
        guest.stand()


def burning(guest: Hostile, word: str) -> None:
    """Says nothing more, and uses all the processor's time that there is."""
    while True:
        guest.check_time()


CONTROLS: dict[str, Attack] = {control.__name__: control for control in (quiet, burning)}
"""What no attack is: what a process costs its machine by being there, and by being busy."""


def _end(*_: object) -> None:
    raise TimeIsUp


def main() -> None:
    """Attack, and say what was done."""
    path, name, seconds = sys.argv[1:4]
    word = sys.argv[4] if len(sys.argv) > 4 else ""
    is_socket = path.startswith("fd:")
    wire = SocketWire(int(path.removeprefix("fd:"))) if is_socket else PortWire(path)
    signal.signal(signal.SIGTERM, _end)
    print(json.dumps(Hostile(wire, float(seconds)).attack(name, word)), flush=True)


if __name__ == "__main__":
    main()
