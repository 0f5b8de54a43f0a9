"""The test vectors, made by this implementation.

    python -m tests.vectors.generate            say which files differ
    python -m tests.vectors.generate --write    write them

tests/unit/test_protocol.py holds the files to this and to the construct definitions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vchan.rpc.bodies import encode_raw
from vchan.rpc.messages import (
    CALL,
    FAILURE,
    FINAL,
    NO_AGENT,
    RAW,
    RAW_REPLY,
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
    encode,
)
from vchan.services import copies
from vchan.services import programs as words
from vchan.session import Config, Role, Session
from vchan.streams import messages as streams
from vchan.wire import layout
from vchan.wire.frames import (
    FLUSH,
    LOCAL_FRAME_BYTES_MAX,
    NO_KEY,
    PLAIN_PAYLOADS,
    RAW_BODIES,
    RAW_CASTS,
    ZERO_ID,
    Decoder,
    Frame,
    Greeting,
    Key,
    encode_frame,
    session_keys,
)
from vchan.wire.value import Value

HERE = Path(__file__).parent
HOST_NONCE = bytes.fromhex("3a7d01c4e95f2b8860f1349abcde5712")
GUEST_NONCE = bytes.fromhex("c2005be7164d88f3097ea1206f35d94b")
ID = bytes.fromhex("00112233445566778899aabbccddeeff")
KINDS = {value: name[5:] for name, value in vars(layout).items() if name.startswith("KIND_")}

Vectors = dict[str, Any]


def sealed(name: str, key: Key, fields: dict[str, int], payload: bytes) -> Vectors:
    """One frame as a vector."""
    data = encode_frame(key, **fields, payload=payload)
    return {
        "name": name,
        "header_seed": key.header_seed,
        "payload_seed": key.payload_seed,
        **({"is_plain": True} if key.is_plain else {}),
        **fields,
        "payload": payload.hex(),
        "frame": data.hex(),
    }


def number_fields(kind: int, **fields: int) -> dict[str, int]:
    """A frame's numbers; what is not said is 0."""
    names = ("flags", "stream", "total", "seq", "ack", "credit")
    return {"kind": kind, **{name: fields.get(name, 0) for name in names}}


def frames() -> Vectors:
    """Frames of every kind, and the keys they are sealed with."""
    to_guest, to_host = session_keys(HOST_NONCE, GUEST_NONCE)
    first, last = layout.FLAG_FIRST, layout.FLAG_LAST
    most = 2**64 - 1
    return {
        "keys": {
            "host_nonce": HOST_NONCE.hex(),
            "guest_nonce": GUEST_NONCE.hex(),
            "to_guest": list(to_guest[:2]),
            "to_host": list(to_host[:2]),
        },
        "frames": [
            sealed(
                "a whole message",
                to_guest,
                number_fields(
                    layout.KIND_DATA,
                    flags=first | last,
                    stream=3,
                    total=5,
                    seq=42,
                    ack=7,
                    credit=262_144,
                ),
                b"hello",
            ),
            sealed(
                "a first fragment",
                to_host,
                number_fields(layout.KIND_DATA, flags=first, stream=15, total=40_000, seq=9),
                bytes(range(64)),
            ),
            sealed(
                "a middle fragment",
                to_host,
                number_fields(layout.KIND_DATA, stream=15, total=40_000, seq=10),
                b"\x00",
            ),
            sealed(
                "a last fragment",
                to_host,
                number_fields(layout.KIND_DATA, flags=last, stream=15, total=40_000, seq=11),
                b"\xff" * 3,
            ),
            *(
                sealed(name, to_guest, number_fields(kind, seq=1, ack=2, credit=3), b"")
                for name, kind in (
                    ("an acknowledgement", layout.KIND_ACK),
                    ("a ping", layout.KIND_PING),
                    ("a pong", layout.KIND_PONG),
                    ("a rewind", layout.KIND_REWIND),
                )
            ),
            sealed(
                "the largest numbers",
                Key(2**32 - 1, 2**32 - 1),
                number_fields(
                    layout.KIND_DATA,
                    flags=255,
                    stream=255,
                    total=2**32 - 1,
                    seq=most,
                    ack=most,
                    credit=most,
                ),
                b"x",
            ),
            sealed(
                "a whole message, its payload plain",
                to_guest._replace(is_plain=True),
                number_fields(layout.KIND_DATA, flags=first | last, stream=3, total=5, seq=42),
                b"hello",
            ),
            sealed(
                "a refusal",
                NO_KEY,
                number_fields(layout.KIND_REFUSE),
                HOST_NONCE + b"upgrade the older one",
            ),
        ],
    }


def greeting_fields(greeting: Greeting) -> Vectors:
    """A greeting with its bytes in hex."""
    return {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in greeting._asdict().items()
        if name != "features" or value
    }


def greetings() -> Vectors:
    """A HELLO and the WELCOME to it."""
    hello = Greeting(
        1, 1, layout.ROLE_HOST, b"host-instance-01", HOST_NONCE, ZERO_ID, ZERO_ID, 0, 0, 0,
        262_144, 16_384, 4_194_304, 8_388_608, "compute-1", "",
    )  # fmt: skip
    welcome = Greeting(
        1, 2, layout.ROLE_GUEST, b"guest-instance-1", GUEST_NONCE, HOST_NONCE, ID, 17, 4, 9,
        300_000, 16_384, 4_194_304, 8_388_608, "g\u00e4st", "compute-0",
    )  # fmt: skip
    return {
        "greetings": [
            {
                "name": name,
                "fields": greeting_fields(made),
                "payload": made.encode().hex(),
                "frame": encode_frame(NO_KEY, kind, 0, 0, 0, 0, 0, 0, made.encode()).hex(),
            }
            for name, kind, made in (
                ("a host's HELLO", layout.KIND_HELLO, hello),
                ("a guest's WELCOME", layout.KIND_WELCOME, welcome),
                (
                    "a HELLO on a local socket, with features",
                    layout.KIND_HELLO,
                    hello._replace(
                        frame_bytes_max=LOCAL_FRAME_BYTES_MAX,
                        features=RAW_BODIES | PLAIN_PAYLOADS,
                    ),
                ),
                (
                    "a HELLO of who takes raw casts",
                    layout.KIND_HELLO,
                    hello._replace(features=RAW_BODIES | RAW_CASTS),
                ),
            )
        ]
    }


def messages() -> Vectors:
    """A message of every kind."""
    made: dict[str, Message] = {
        "a call": Request(
            ID, CALL, 60_000, 10_000, "nova", "agent", "vm-1", b'{"method":"ping","args":{}}'
        ),
        "a raw call": Request(
            ID,
            CALL | RAW,
            60_000,
            0,
            "nova",
            "agent",
            "vm-1",
            encode_raw(b'{"method":"put","args":{}}', b"\x00\xff any bytes"),
        ),
        "a raw cast": Request(
            ID,
            RAW,
            0,
            0,
            "nova",
            "agent",
            "vm-1",
            encode_raw(b'{"method":"put","args":{}}', b"\x00\xff any bytes"),
        ),
        "a cast without a name": Request(ID, 0, 0, 0, "", "", "", b""),
        "a receipt": Receipt(ID),
        "a heartbeat": Reply(ID, 0, b""),
        "a result": Reply(ID, FINAL, b'{"pong":1}'),
        "a raw result": Reply(ID, FINAL | RAW_REPLY, b"\x00\xff"),
        "a failure of a raw call": Reply(ID, FINAL | FAILURE, b'{"class":"KeyError"}'),
        "a request handed back": Returned(ID, NO_AGENT, "no agent serves topic \u00e9"),
        "a cancellation": Cancel(ID),
        "two settled ids": Settled((ID, HOST_NONCE)),
        "no ids held": Holding(()),
        "two topics": Subscribe((Topic("", "agent"), Topic("nova", "\u00e9tat"))),
    }
    return {
        "messages": [
            {
                "name": name,
                "kind": type(message).__name__,
                "fields": message_fields(message),
                "message": encode(message).hex(),
            }
            for name, message in made.items()
        ]
    }


def byte_streams() -> Vectors:
    """A message of every kind of the byte streams' family."""
    tag = HOST_NONCE[:8]
    made: dict[str, streams.StreamMessage] = {
        "an offer": streams.StreamOffer(1, 1),
        "a new stream": streams.Open(
            ID, streams.NO_TAG, 0, 65_536, "tcp:127.0.0.1:80", '{"user":"ops"}'
        ),
        "a stream goes on": streams.Open(ID, tag, 4_096, 69_632, "unix:/run/\u00e9", ""),
        "accepted": streams.Progress(streams.ANSWER, ID, tag, 0, 65_536),
        "a question": streams.Progress(streams.ASK, ID, tag, 7, 65_536),
        "something is missing": streams.Progress(streams.REWIND, ID, tag, 7, 65_536),
        "it is done": streams.Progress(streams.ANSWER | streams.DONE, ID, tag, 14, 65_549),
        "bytes": streams.Part(0, ID, tag, 7, b"hello"),
        "the last bytes": streams.Part(streams.END, ID, tag, 12, b"."),
        "an end alone": streams.Part(streams.END, ID, tag, 13, b""),
        "a reset": streams.Reset(streams.REFUSED, ID, "no rule allows tcp:22"),
    }
    return {
        "messages": [
            {
                "name": name,
                "kind": type(message).__name__.removeprefix("Stream"),
                "fields": {
                    field: value.hex() if isinstance(value, bytes) else value
                    for field, value in message._asdict().items()
                },
                "message": streams.encode(message).hex(),
            }
            for name, message in made.items()
        ]
    }


def programs() -> Vectors:
    """A message of every kind that is said to the services exec and shell."""
    size = words.Size(24, 80)
    terminal = words.TerminalWanted("xterm", size)
    asked: dict[str, words.CommandWord] = {
        "a program": words.Start(("/bin/ls", "-l"), None, "/srv", {"LANG": "C"}, "web"),
        "a shell": words.Start(terminal=terminal),
        "go on with one": words.AttachTo("00c0ffee00c0ffee", size),
        "go on with the only one": words.AttachTo(""),
        "which are there": words.ListPrograms(),
        "input": words.Input(b"ls\n"),
        "no more input": words.InputEnd(),
        "another size": words.Resized(words.Size(50, 132)),
        "Ctrl-C": words.SendSignal(2),
        "errors were written": words.Written(words.ERROR, 4_096),
        "the command leaves": words.Leave(),
        "the end was heard": words.Forget(),
    }
    told: dict[str, words.GuestWord] = {
        "it runs": words.Running("00c0ffee00c0ffee", True, 3, (4_096, 0), 3_600.0),
        "output": words.OutputPart(words.OUTPUT, b"a\xff"),
        "room for input": words.Room(65_539),
        "an exit": words.ProgramEnd(3, None),
        "a death": words.ProgramEnd(None, 9, "it ran for 60 s ([exec] time_s_max)"),
        "a refusal": words.Refusal("/bin/sh: is not allowed"),
        "which there are": words.ProgramList(
            ({"id": "00c0ffee00c0ffee", "state": "detached", "command": "/bin/bash -l"},)
        ),
        "left": words.Left(),
    }
    return {
        "messages": [
            {
                "name": name,
                "from": side,
                "kind": type(message).__name__,
                "message": words.encode_program(message).hex(),
            }
            for side, made in (("command", asked), ("guest", told))
            for name, message in made.items()
        ]
    }


def copied() -> Vectors:
    """A message of every kind of the service `files`."""
    facts = copies.EntryFacts(0o640, 1000, 100, 1_700_000_000_123_456_789)
    sha256 = bytes(range(32))
    put = copies.RECURSIVE | copies.KEEP
    made: dict[str, copies.CopyMessage] = {
        "a request to get": copies.CopyRequest(False, 1, copies.RESUME, b"", b"/var/log/syslog"),
        "a request to put": copies.CopyRequest(True, 1, put, b"site", b"/srv"),
        "granted": copies.CopyReady(),
        "refused": copies.CopyRefusal("/etc/shadow: is not allowed"),
        "a root that is a directory": copies.DirectoryEntry(facts, b""),
        "a directory": copies.DirectoryEntry(facts, "\u00e9".encode()),
        "its end": copies.DirectoryEnd(),
        "a file": copies.FileEntry(0, facts, 5, b"a.txt"),
        "a file that is asked about": copies.FileEntry(copies.ASK, facts, 1 << 40, b"\xff"),
        "it begins there": copies.FileBegin(65_536),
        "bytes": copies.FileData(b"hello"),
        "the whole": copies.FileWhole(sha256),
        "given up": copies.FileBroken("was changed while it was read"),
        "left out": copies.LeftOut(b"link", "is a symbolic link"),
        "the end": copies.TreeEnd(),
        "what is there": copies.Have(3, 65_536, sha256),
        "not written": copies.EntryFailed(3, "/srv/site/a.txt: No space left on device"),
        "all is written": copies.TreeDone(2, 10),
    }
    return {
        "messages": [
            {
                "name": name,
                "kind": type(message).__name__,
                "fields": copy_fields(message),
                "message": copies.encode_copy(message).hex(),
            }
            for name, message in made.items()
        ]
    }


def copy_fields(message: copies.CopyMessage) -> Vectors:
    """A message's fields, bytes in hex."""
    out: Vectors = {}
    for field, value in message._asdict().items():
        if isinstance(value, copies.EntryFacts):
            out[field] = value._asdict()
        else:
            out[field] = value.hex() if isinstance(value, bytes) else value
    return out


def message_fields(message: Message) -> Vectors:
    """A message's fields, bytes in hex."""
    out: Vectors = {}
    values: tuple[Any, ...] = message.fields() if isinstance(message, Value) else message
    for name, value in zip(message.__match_args__, values, strict=True):
        if name == "ids":
            out[name] = [request_id.hex() for request_id in value]
        elif name == "topics":
            out[name] = [[topic.exchange, topic.name] for topic in value]
        else:
            out[name] = value.hex() if isinstance(value, bytes) else value
    return out


def decoding() -> Vectors:
    """Streams with damage in them, and the frames a decoder must find there."""
    key, _ = session_keys(HOST_NONCE, GUEST_NONCE)
    ping = [encode_frame(key, layout.KIND_PING, 0, 0, 0, seq, 0, 0, b"") for seq in range(4)]
    data = encode_frame(key, layout.KIND_DATA, 3, 1, 11, 1, 0, 0, b"hello" + b"world!")
    smuggled = encode_frame(NO_KEY, layout.KIND_HELLO, 0, 0, 0, 0, 0, 0, b"not to be trusted")
    carrier = encode_frame(key, layout.KIND_DATA, 3, 1, 0, 1, 0, 0, smuggled + b"more")
    flipped = bytearray(data)
    flipped[10] ^= 0x20  # in the length
    spoilt = bytearray(data)
    spoilt[46] ^= 1  # in the payload
    strange = encode_frame(Key(1, 2), layout.KIND_PING, 0, 0, 0, 0, 0, 0, b"")
    layout_2 = bytearray(ping[0])
    layout_2[4] = 2
    return {
        "header_seed": key.header_seed,
        "payload_seed": key.payload_seed,
        "streams": [
            found(key, name, stream)
            for name, stream in (
                ("two frames", ping[0] + ping[1]),
                ("noise, and half a magic, between them", ping[0] + b"noise\xb6vc" + ping[1]),
                ("a length damaged", bytes(flipped) + ping[2]),
                ("a payload damaged", bytes(spoilt) + ping[2]),
                ("torn, and completed by a flush", data[:50] + FLUSH + ping[2]),
                ("the tail of a torn frame", data[20:] + ping[2]),
                ("a greeting inside a torn payload", carrier[:-6] + FLUSH + ping[2]),
                ("a frame of another session", strange + ping[2]),
                ("an unknown layout", bytes(layout_2) + ping[2]),
            )
        ],
    }


def found(key: Key, name: str, stream: bytes) -> Vectors:
    """What a decoder makes of a stream."""
    decoder = Decoder()
    decoder.key = key
    out: list[Frame] = []
    batch = decoder.receive_data(stream)
    while batch:
        out += batch
        batch = decoder.receive_data(b"")
    return {
        "name": name,
        "stream": pieces(stream),
        "frames": [[KINDS[frame.kind], frame.seq, frame.payload.hex()] for frame in out],
        "bytes_skipped": decoder.bytes_skipped,
        "bad_payloads": decoder.bad_payloads,
    }


def pieces(stream: bytes) -> list[Any]:
    """Bytes in hex; a flush is the number of its zeros."""
    parts = stream.split(FLUSH)
    out: list[Any] = []
    for part in parts:
        out += [part.hex(), len(FLUSH)] if part else [len(FLUSH)]
    return out[:-1]


def conversation() -> Vectors:
    """A handshake, a message each way, a new stream, and how the session goes on."""
    nonces = {Role.HOST: iter((HOST_NONCE, ID)), Role.GUEST: iter((GUEST_NONCE, HOST_NONCE[::-1]))}
    ends = {
        role: Session(
            Config(
                role, f"{role.name.lower()}-instance".ljust(16, "-").encode(), role.name.lower()
            ),
            lambda _size, role=role: next(nonces[role]),  # type: ignore[misc]
        )
        for role in Role
    }
    host, guest = ends[Role.HOST], ends[Role.GUEST]
    steps: list[Vectors] = []

    def exchange(note: str) -> None:
        for _ in range(4):
            for sender, receiver in ((host, guest), (guest, host)):
                data = sender.data_to_send()
                if data:
                    receiver.receive_data(data, 0.0)
                    steps.append(
                        {
                            "note": note,
                            "from": sender.config.name,
                            "bytes": pieces(data),
                            "frames": names_in(data, sender._tx_key),
                        }
                    )

    host.open(0.0)
    guest.open(0.0)
    exchange("both opened their stream")
    host.send(b"question", 1)
    exchange("the host sends on stream 1")
    guest.send(b"answer", 2)
    exchange("the guest sends on stream 2")
    host.send(b"lost", 1)
    host.data_to_send()
    host.close()
    host.open(0.0)
    exchange("a frame was lost; the host has a new stream")
    return {
        "host_nonces": [HOST_NONCE.hex(), ID.hex()],
        "guest_nonces": [GUEST_NONCE.hex(), HOST_NONCE[::-1].hex()],
        "steps": steps,
    }


def names_in(data: bytes, key: Key) -> list[str]:
    """The kinds of the frames in what an end wrote."""
    decoder = Decoder()
    decoder.key = key
    out: list[str] = []
    batch = decoder.receive_data(data)
    while batch:
        out += [KINDS[frame.kind] for frame in batch]
        batch = decoder.receive_data(b"")
    return out


def generate() -> dict[str, str]:
    """The text of every file, by name."""
    made = {
        "frames.json": frames(),
        "greetings.json": greetings(),
        "messages.json": messages(),
        "byte_streams.json": byte_streams(),
        "programs.json": programs(),
        "copies.json": copied(),
        "decoding.json": decoding(),
        "conversation.json": conversation(),
    }
    return {
        name: json.dumps(vectors, indent=1, ensure_ascii=True) + "\n"
        for name, vectors in made.items()
    }


def main() -> int:
    """Write the files, or say which differ."""
    differ = [
        name
        for name, text in generate().items()
        if not (HERE / name).exists() or (HERE / name).read_text() != text
    ]
    if sys.argv[1:] == ["--write"]:
        for name, text in generate().items():
            (HERE / name).write_text(text)
        return 0
    print("\n".join(differ))
    return len(differ) and 1


if __name__ == "__main__":
    sys.exit(main())
