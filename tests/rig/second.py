"""A second implementation of the protocol, of either end, written from docs/protocol.md alone: what
it had to guess is missing there. It imports nothing of vchan, and must not.

    end = End(connected, HOST)
    end.open()
    end.send(request(...), stream=1)
    end.wait_for(lambda: end.messages)

Simple where the document leaves a choice: it sends what it is told at once, acknowledges each
frame, and never asks after silence. Numbers in brackets are the document's sections.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

MAGIC = b"\xb6\x76\x63\x68"
HELLO, WELCOME, REFUSE, DATA, ACK, PING, PONG, REWIND = range(1, 9)
HOST, GUEST = 1, 2
FIRST, LAST = 1, 2
FLUSH = bytes(16 * 1024)
OVERHEAD = 48
PAYLOAD_MAX = 16_336
WINDOW = 256 * 1024
IN_FLIGHT = 192 * 1024
PATIENCE_S = 30.0

_HEADER = struct.Struct(">4sBBBBIIQQQ")
_GREETING = struct.Struct(">BBB16s16s16s16sQQQQIII")

Seeds = tuple[int, int]
NO_SEEDS: Seeds = (0, 0)


class Frame(NamedTuple):
    """[2]"""

    kind: int
    payload: bytes = b""
    flags: int = 0
    stream: int = 0
    total: int = 0
    seq: int = 0
    ack: int = 0
    credit: int = 0

    def encoded(self, seeds: Seeds) -> bytes:
        head = _HEADER.pack(
            MAGIC, 1, self.kind, self.flags, self.stream, len(self.payload), *self[4:]
        )
        header_crc = crc32(head, seeds[0])
        payload_crc = crc32(self.payload, header_crc ^ seeds[1])
        return head + header_crc.to_bytes(4) + self.payload + payload_crc.to_bytes(4)


def find_frame(data: bytes, keys: list[Seeds]) -> tuple[Frame | None, Seeds, int]:
    """[2] "Finding frames": the first one in what was read, the seeds that it fits, and how much of
    `data` is done with."""
    at = 0
    while (at := data.find(MAGIC, at)) >= 0:
        if len(data) - at < _HEADER.size + 4:
            return None, NO_SEEDS, at
        _, layout, kind, flags, stream, length, *numbers = _HEADER.unpack_from(data, at)
        header_crc = int.from_bytes(data[at + 40 : at + 44])
        limit = 1024 if kind in (HELLO, WELCOME, REFUSE) else PAYLOAD_MAX
        for seeds in [NO_SEEDS] if kind in (HELLO, WELCOME, REFUSE) else keys:
            fits = crc32(data[at : at + 40], seeds[0]) == header_crc
            if not (fits and layout == 1 and length <= limit):
                continue
            end = at + OVERHEAD + length
            if len(data) < end:
                return None, NO_SEEDS, at
            payload = data[at + 44 : at + 44 + length]
            if crc32(payload, header_crc ^ seeds[1]) == int.from_bytes(data[end - 4 : end]):
                return Frame(kind, payload, flags, stream, *numbers), seeds, end
        at += 1
    return None, NO_SEEDS, max(0, len(data) - len(MAGIC) + 1)


class Greeting(NamedTuple):
    """[4]"""

    version_min: int = 1
    version_max: int = 1
    role: int = HOST
    instance: bytes = bytes(16)
    nonce: bytes = bytes(16)
    echo: bytes = bytes(16)
    session: bytes = bytes(16)
    recv_next: int = 0
    send_base: int = 0
    send_next: int = 0
    credit: int = 0
    frame_bytes_max: int = 16 * 1024
    message_bytes_max: int = 4 << 20
    reassembly_bytes_max: int = 8 << 20
    name: bytes = b"second"
    attached: bytes = b""
    capabilities: int = 0

    def encoded(self) -> bytes:
        names = b"".join(bytes([len(name)]) + name for name in self[14:16])
        more = self.capabilities.to_bytes(4) if self.capabilities else b""
        return _GREETING.pack(*self[:14]) + names + more

    @classmethod
    def decoded(cls, data: bytes) -> Greeting:
        at, names = _GREETING.size, []
        for _ in range(2):
            names.append(data[at + 1 : at + 1 + data[at]])
            at += 1 + data[at]
        flags = int.from_bytes(data[at : at + 4]) if len(data) >= at + 4 else 0
        return cls._make((*_GREETING.unpack_from(data), *names, flags))


class End:
    """One end, which lives longer than its streams.

    Attributes:
        messages: (stream, message) received and not yet taken.
        lose: So many DATA frames are numbered and not written: as a migration loses them.
        resumed: For each handshake, whether the session went on.
        kinds: The frames received, by kind.
    """

    def __init__(self, role: int) -> None:
        self.role = role
        self.instance = os.urandom(16)
        self.messages: deque[tuple[int, bytes]] = deque()
        self.lose = 0
        self.resumed: list[bool] = []
        self.refused = ""
        self.kinds: dict[int, int] = {}
        self.peer = Greeting()
        self._socket: socket.socket | None = None
        self._session = bytes(16)
        self._begin(bytes(16))

    def _begin(self, session: bytes) -> None:
        """[4] A new session: all numbers and costs are 0."""
        self._session = session
        self._next = self._receive_next = 0
        self._sent: deque[Frame] = deque()  # not acknowledged
        self._cost_sent = self._cost_received = 0
        self._credit = 0  # told by sealed frames alone
        self._gap_told = -1
        self._parts: dict[int, list[bytes]] = {}

    # ---------------------------------------------------------------- the stream

    def open(self, connected: socket.socket) -> None:
        """[2, 4] Take a stream, however it came: flush, HELLO."""
        self._socket, self._data = connected, b""
        self._key: tuple[Seeds, Seeds] | None = None  # (send, receive), in force
        self._candidate: tuple[Greeting, Greeting] | None = None  # (ours, the peer's)
        self._hello: Greeting | None = self._greeting(os.urandom(16))
        self._write(FLUSH + Frame(HELLO, self._hello.encoded()).encoded(NO_SEEDS))

    def close(self) -> None:
        """The stream is gone; the session is not."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _write(self, data: bytes) -> None:
        assert self._socket is not None
        self._socket.settimeout(PATIENCE_S)
        self._socket.sendall(data)

    def _greeting(self, nonce: bytes) -> Greeting:
        return Greeting(
            role=self.role,
            instance=self.instance,
            nonce=nonce,
            session=self._session,
            recv_next=self._receive_next,
            send_base=self._next - len(self._sent),
            send_next=self._next,
            credit=self._cost_received + WINDOW,
        )

    def _write_sealed(self, kind: int) -> None:
        self._write_frame(Frame(kind, seq=self._next))

    def _write_frame(self, frame: Frame) -> None:
        assert self._key is not None
        credit = self._cost_received + WINDOW
        frame = frame._replace(ack=self._receive_next, credit=credit)
        self._write(frame.encoded(self._key[0]))

    # ---------------------------------------------------------------- sending

    @property
    def is_open(self) -> bool:
        """The peer has said something sealed: only then may DATA be sent."""
        return self._key is not None and self._credit > 0

    @property
    def unacknowledged(self) -> int:
        return len(self._sent)

    def send(self, message: bytes, stream: int = 0) -> None:
        """[6]"""
        whole = len(message) <= PAYLOAD_MAX
        for at in range(0, len(message), PAYLOAD_MAX):
            part = message[at : at + PAYLOAD_MAX]
            flags = (FIRST if at == 0 else 0) | (LAST if at + len(part) == len(message) else 0)
            assert whole is (flags == FIRST | LAST)
            self._cost_sent += len(part) + OVERHEAD
            self.wait_for(lambda: self._cost_sent <= self._credit and self._in_flight() < IN_FLIGHT)
            frame = Frame(DATA, part, flags, stream, len(message), self._next)
            self._next += 1
            self._sent.append(frame)
            if self.lose:
                self.lose -= 1
            else:
                self._write_frame(frame)

    def _in_flight(self) -> int:
        return sum(len(frame.payload) + OVERHEAD for frame in self._sent)

    def ping(self) -> None:
        """[5] Its number shows the peer what is missing."""
        self._write_sealed(PING)

    def _resend(self) -> None:
        for frame in self._sent:
            self._write_frame(frame)

    # ---------------------------------------------------------------- receiving

    def wait_for(self, reached: Callable[[], object]) -> None:
        """Read until it is so."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not reached():
            assert time.monotonic() < deadline_s, (self.kinds, self.messages, self.refused)
            self.read(0.05)

    def read(self, wait_s: float) -> None:
        """What comes within a while."""
        assert self._socket is not None
        self._socket.settimeout(wait_s)
        try:
            data = self._socket.recv(1 << 18)
        except TimeoutError:
            return
        if not data:
            raise ConnectionError("closed by the other end")
        self._data += data
        while True:
            keys = [self._key[1]] if self._key else []
            if self._candidate is not None:
                keys.append(self._keys(*self._candidate)[1])
            frame, seeds, done = find_frame(self._data, keys)
            self._data = self._data[done:]
            if frame is None:
                return
            self.kinds[frame.kind] = self.kinds.get(frame.kind, 0) + 1
            self._take(frame, seeds)

    def _take(self, frame: Frame, seeds: Seeds) -> None:
        match frame.kind:
            case 1:
                self._take_hello(Greeting.decoded(frame.payload))
            case 2:
                self._take_welcome(Greeting.decoded(frame.payload))
            case 3:
                if self._hello is not None and frame.payload[:16] == self._hello.nonce:
                    self.refused = frame.payload[16:].decode()
            case _:
                if self._candidate is not None and seeds == self._keys(*self._candidate)[1]:
                    self._enter(*self._candidate)
                self._take_sealed(frame)

    # ---------------------------------------------------------------- handshake

    def _keys(self, ours: Greeting, theirs: Greeting) -> tuple[Seeds, Seeds]:
        """[3] (what we send with, what we receive with)."""
        mixed = bytes(a ^ b for a, b in zip(ours.nonce, theirs.nonce, strict=True))
        words = struct.unpack(">4I", mixed)
        from_host, from_guest = (words[0], words[1]), (words[2], words[3])
        return (from_host, from_guest) if self.role == HOST else (from_guest, from_host)

    def _take_hello(self, peer: Greeting) -> None:
        """[4] 2: answered, in any state; nothing else changes."""
        if peer.role == self.role:
            return
        if self._candidate is None or self._candidate[1].nonce != peer.nonce:
            ours = self._hello or self._greeting(os.urandom(16))
            self._candidate = (ours._replace(echo=peer.nonce), peer)
        self._write(Frame(WELCOME, self._candidate[0].encoded()).encoded(NO_SEEDS))

    def _take_welcome(self, peer: Greeting) -> None:
        """[4] 3: in force, if it answers our HELLO; then a sealed frame at once."""
        if self._hello is not None and peer.echo == self._hello.nonce and peer.role != self.role:
            self._enter(self._hello, peer)
            self._write_sealed(ACK)

    def _enter(self, ours: Greeting, peer: Greeting) -> None:
        """[4] The key is in force. Go on, or begin anew."""
        key = self._keys(ours, peer)
        self._candidate = self._hello = None
        if key == self._key:
            return
        self._key = key
        goes_on = (
            peer.session == ours.session == self._session != bytes(16)
            and peer.instance == self.peer.instance
            and peer[11:14] == self.peer[11:14]
            and self._next - len(self._sent) <= peer.recv_next <= self._next
            and peer.send_base <= self._receive_next <= peer.send_next
        )
        self.peer = peer
        self.resumed.append(goes_on)
        if goes_on:
            self._acknowledge(peer.recv_next)
            self._credit = max(self._credit, peer.credit)
            self._gap_told = -1
            self._resend()
        else:
            self._begin((ours if self.role == HOST else peer).nonce)

    # ---------------------------------------------------------------- order, loss, credit

    def _acknowledge(self, ack: int) -> None:
        while self._sent and self._sent[0].seq < ack:
            self._sent.popleft()

    def _take_sealed(self, frame: Frame) -> None:
        """[5]"""
        assert frame.ack <= self._next
        self._acknowledge(frame.ack)
        self._credit = max(self._credit, frame.credit)
        if frame.seq > self._receive_next:
            if self._gap_told != self._receive_next or frame.kind == PING:
                self._gap_told = self._receive_next
                self._write_sealed(REWIND)
        elif frame.kind == DATA:
            if frame.seq == self._receive_next:
                self._receive_next += 1
                self._cost_received += len(frame.payload) + OVERHEAD
                self._assemble(frame)
            self._write_sealed(ACK)
        if frame.kind == PING:
            self._write_sealed(PONG)
        elif frame.kind == REWIND:
            self._resend()

    def _assemble(self, frame: Frame) -> None:
        """[6]"""
        assert (frame.stream not in self._parts) is bool(frame.flags & FIRST)
        parts = self._parts.setdefault(frame.stream, [])
        parts.append(frame.payload)
        if frame.flags & LAST:
            message = b"".join(self._parts.pop(frame.stream))
            assert len(message) == frame.total
            self.messages.append((frame.stream, message))


# -------------------------------------------------------------------- [8] messages

REQUEST, RECEIPT, REPLY, RETURNED, CANCEL, SETTLED, SUBSCRIBE, HOLDING = range(1, 9)
CALL, FANOUT, NOTIFICATION, REDELIVERED = 1, 2, 4, 8
FINAL, FAILURE = 1, 2
NO_AGENT = 1


class Message(NamedTuple):
    """Any of them: what it does not have is empty."""

    kind: int
    flags: int = 0
    id: bytes = b""
    rest: bytes = b""


def request(
    flags: int,
    identity: bytes,
    topic: bytes,
    body: bytes,
    *,
    exchange: bytes = b"openstack",
    server: bytes = b"",
    timeout_ms: int = 30_000,
) -> bytes:
    names = (exchange, topic, server)
    head = struct.pack(">BB16sII", REQUEST, flags, identity, timeout_ms, 0)
    return head + bytes(map(len, names)) + b"".join(names) + body


def request_stream(topic: bytes) -> int:
    """[6]"""
    return 1 + crc32(topic) % 15


def reply(flags: int, identity: bytes, body: bytes) -> bytes:
    return bytes([REPLY, flags]) + identity + body


def subscribe(*topics: tuple[bytes, bytes]) -> bytes:
    lists = b"".join(bytes(map(len, each)) + b"".join(each) for each in topics)
    return bytes([SUBSCRIBE]) + len(topics).to_bytes(2) + lists


def settled(*ids: bytes) -> bytes:
    return bytes([SETTLED]) + len(ids).to_bytes(2) + b"".join(ids)


def parse(data: bytes) -> Message:
    match data[0]:
        case 1 | 3 | 4:
            return Message(data[0], data[1], data[2:18], data[18:])
        case 2 | 5:
            return Message(data[0], 0, data[1:17])
        case kind:
            return Message(kind, 0, b"", data[1:])


def topics_of(message: Message) -> list[tuple[bytes, bytes]]:
    """What a Subscribe names."""
    found, at = [], 2
    for _ in range(int.from_bytes(message.rest[:2])):
        exchange, name = message.rest[at], message.rest[at + 1]
        at += 2
        found.append((message.rest[at : at + exchange], message.rest[at + exchange :][:name]))
        at += exchange + name
    assert at == len(message.rest)
    return found
