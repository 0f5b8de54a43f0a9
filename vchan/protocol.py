"""The wire, defined once, with construct.

Everything that crosses a channel or a local socket is laid out here and nowhere else.
`docs/protocol.md` says what the fields mean. Running daemons do not import this module:
construct costs half a second of start-up in a small guest and 0.2 ms a header to
interpret. They use `vchan/wire/layout.py`, which this module generates from the definitions
below (every fixed-size construct field knows its `struct` format), and a property test
holds the two to the same answer on every frame and message.

    python -m vchan.protocol            print the generated module
    python -m vchan.protocol --write    write it to vchan/wire/layout.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import wrap
from typing import Any

from construct import (
    Array,
    Byte,
    Bytes,
    Const,
    Construct,
    Enum,
    FlagsEnum,
    FormatField,
    GreedyBytes,
    Int16ub,
    Int32ub,
    Int64ub,
    Optional,
    PascalString,
    Struct,
    Subconstruct,
    this,
)

MAGIC = b"\xb6vch"
LAYOUT = 1
"""The version of the frame header and of the greeting. Both ends must know it."""

FrameKind = Enum(Byte, HELLO=1, WELCOME=2, REFUSE=3, DATA=4, ACK=5, PING=6, PONG=7, REWIND=8)
FrameFlags = FlagsEnum(Byte, FIRST=1, LAST=2)

FrameHeader = Struct(
    "magic" / Const(MAGIC),
    "layout" / Const(LAYOUT, Byte),
    "kind" / FrameKind,
    "flags" / FrameFlags,
    "stream" / Byte,  # 0 is control; messages of one stream arrive in order
    "length" / Int32ub,  # bytes of payload in this frame
    "total" / Int32ub,  # bytes of the whole message; 0 unless DATA
    "seq" / Int64ub,  # this DATA frame's number; else the next one's
    "ack" / Int64ub,  # every DATA frame below this number has arrived
    "credit" / Int64ub,  # cost of all DATA you may send, counted from the session's start
)
"""Followed by its CRC, the payload, and the payload's CRC (both `Crc`).

header_crc  = crc32(header, header_seed)
payload_crc = crc32(payload, header_crc XOR payload_seed): it binds the payload to its header.
Where both greetings say PLAIN_PAYLOADS, that of a sealed frame is 0 and not looked at.
"""

Crc = Int32ub

Frame = Struct(
    "header" / FrameHeader,
    "header_crc" / Crc,
    "payload" / Bytes(this.header.length),
    "payload_crc" / Crc,
)

Role = Enum(Byte, HOST=1, GUEST=2)

GreetingHead = Struct(
    "version_min" / Byte,
    "version_max" / Byte,
    "role" / Role,
    "instance" / Bytes(16),
    "nonce" / Bytes(16),
    "echo" / Bytes(16),  # WELCOME: the nonce of the HELLO it answers; HELLO: zeros
    "session" / Bytes(16),  # the session I could go on with; zeros: none
    "recv_next" / Int64ub,
    "send_base" / Int64ub,
    "send_next" / Int64ub,
    "credit" / Int64ub,
    "frame_bytes_max" / Int32ub,
    "message_bytes_max" / Int32ub,
    "reassembly_bytes_max" / Int32ub,
)
Features = FlagsEnum(Int32ub, RAW_BODIES=1, PLAIN_PAYLOADS=2, BYTE_STREAMS=4, RAW_CASTS=8)
Greeting = Struct(
    "head" / GreetingHead,
    "name" / PascalString(Byte, "utf8"),  # who I am: a host's or a guest's name
    "attached" / PascalString(Byte, "utf8"),  # whom I had my last session with
    "features" / Optional(Features),  # what I can do; not there: nothing of it
)

MessageKind = Enum(
    Byte, REQUEST=1, RECEIPT=2, REPLY=3, RETURNED=4, CANCEL=5, SETTLED=6, SUBSCRIBE=7, HOLDING=8
)
ByteStreamKind = Enum(Byte, OFFER=32, OPEN=33, PROGRESS=34, PART=35, RESET=36)
"""Kinds of messages as well, of their own family: docs/protocol.md, section 14."""
ProgressFlags = FlagsEnum(Byte, ASK=1, ANSWER=2, REWIND=4, DONE=8)
PartFlags = FlagsEnum(Byte, END=1)
ResetReason = Enum(
    Byte,
    CLOSED=1,
    REFUSED=2,
    UNREACHABLE=3,
    BUSY=4,
    FORGOTTEN=5,
    VIOLATED=6,
    SILENT=7,
    UNSUPPORTED=8,
    RELEASED=9,
)
RequestFlags = FlagsEnum(
    Byte,
    CALL=1,
    FANOUT=2,
    NOTIFICATION=4,
    REDELIVERED=8,
    OUT_OF_TURN=16,
    LOCAL=32,
    RAW=64,
    IN_PLACE=128,
)
ReplyFlags = FlagsEnum(Byte, FINAL=1, FAILURE=2, RAW=4)
ReturnReason = Enum(
    Byte, NO_AGENT=1, AGENT_GONE=2, BUSY=3, REFUSED=4, EXPIRED=5, NO_DOMAIN=6, RELEASED=7
)

RequestHead = Struct(
    "kind" / Const(1, Byte),
    "flags" / RequestFlags,
    "id" / Bytes(16),
    "timeout_ms" / Int32ub,  # time left when this was sent; 0: none
    "monitor_ms" / Int32ub,  # the caller wants a heartbeat at least this often; 0: none
    "exchange_length" / Byte,
    "topic_length" / Byte,
    "server_length" / Byte,
)
Request = Struct(
    "head" / RequestHead,
    "exchange" / Bytes(this.head.exchange_length),
    "topic" / Bytes(this.head.topic_length),
    "server" / Bytes(this.head.server_length),
    "body" / GreedyBytes,  # JSON: method, args, namespace, version, context; RAW: a RawBody
)
RawHead = Struct("invocation_length" / Int32ub)
RawBody = Struct(
    "head" / RawHead,
    "invocation" / Bytes(this.head.invocation_length),  # JSON, as the body of others
    "data" / GreedyBytes,
)
ReceiptHead = Struct("kind" / Const(2, Byte), "id" / Bytes(16))
Receipt = Struct("head" / ReceiptHead)
ReplyHead = Struct("kind" / Const(3, Byte), "flags" / ReplyFlags, "id" / Bytes(16))
Reply = Struct("head" / ReplyHead, "body" / GreedyBytes)  # JSON: the result or failure; RAW: bytes
ReturnedHead = Struct("kind" / Const(4, Byte), "reason" / ReturnReason, "id" / Bytes(16))
Returned = Struct("head" / ReturnedHead, "text" / GreedyBytes)  # UTF-8
CancelHead = Struct("kind" / Const(5, Byte), "id" / Bytes(16))
Cancel = Struct("head" / CancelHead)
IdListHead = Struct("kind" / Byte, "count" / Int16ub)
IdList = Struct("head" / IdListHead, "ids" / Array(this.head.count, Bytes(16)))
SubscriptionHead = Struct("exchange_length" / Byte, "topic_length" / Byte)
Subscription = Struct(
    "head" / SubscriptionHead,
    "exchange" / Bytes(this.head.exchange_length),
    "topic" / Bytes(this.head.topic_length),
)
SubscribeHead = Struct("kind" / Const(7, Byte), "count" / Int16ub)
Subscribe = Struct("head" / SubscribeHead, "topics" / Array(this.head.count, Subscription))

OfferHead = Struct("kind" / Const(32, Byte), "version_min" / Byte, "version_max" / Byte)
Offer = Struct("head" / OfferHead, "later" / GreedyBytes)
OpenHead = Struct(
    "kind" / Const(33, Byte),
    "id" / Bytes(16),
    "tag" / Bytes(8),  # zeros: not accepted yet
    "received" / Int64ub,  # as in Progress
    "credit" / Int64ub,
    "target_length" / Int16ub,
    "facts_length" / Int16ub,
)
Open = Struct(
    "head" / OpenHead,
    "target" / Bytes(this.head.target_length),  # UTF-8: what to connect to
    "facts" / Bytes(this.head.facts_length),  # UTF-8, JSON: who asks, for the policy
)
ProgressHead = Struct(
    "kind" / Const(34, Byte),
    "flags" / ProgressFlags,
    "id" / Bytes(16),
    "tag" / Bytes(8),  # which run of the accepting end has it
    "received" / Int64ub,  # bytes that have arrived in order, from the stream's start; END is one
    "credit" / Int64ub,  # bytes below this offset may be sent
)
Progress = Struct("head" / ProgressHead)
PartHead = Struct(
    "kind" / Const(35, Byte),
    "flags" / PartFlags,
    "id" / Bytes(16),
    "tag" / Bytes(8),
    "offset" / Int64ub,  # of the first byte, from the stream's start
)
Part = Struct("head" / PartHead, "data" / GreedyBytes)
ResetHead = Struct("kind" / Const(36, Byte), "reason" / ResetReason, "id" / Bytes(16))
Reset = Struct("head" / ResetHead, "text" / GreedyBytes)  # UTF-8

Message = Struct(
    "kind" / MessageKind,
    "rest" / GreedyBytes,
)
MESSAGE_BY_KIND: dict[int, Construct[Any, Any]] = {
    1: Request,
    2: Receipt,
    3: Reply,
    4: Returned,
    5: Cancel,
    6: IdList,
    7: Subscribe,
    8: IdList,
}
BYTE_STREAM_BY_KIND: dict[int, Construct[Any, Any]] = {
    32: Offer,
    33: Open,
    34: Progress,
    35: Part,
    36: Reset,
}


def parse_message(data: bytes) -> Any:
    """Parse one message by its definition: the slow, normative way."""
    return (MESSAGE_BY_KIND | BYTE_STREAM_BY_KIND)[data[0]].parse(data)


_FIXED = {
    "FRAME_HEADER": FrameHeader,
    "CRC": Struct("crc" / Crc),
    "GREETING": GreetingHead,
    "FEATURES": Struct("features" / Features),
    "REQUEST": RequestHead,
    "RECEIPT": ReceiptHead,
    "RAW": RawHead,
    "REPLY": ReplyHead,
    "RETURNED": ReturnedHead,
    "CANCEL": CancelHead,
    "ID_LIST": IdListHead,
    "SUBSCRIBE": SubscribeHead,
    "SUBSCRIPTION": SubscriptionHead,
    "OFFER": OfferHead,
    "OPEN": OpenHead,
    "PROGRESS": ProgressHead,
    "PART": PartHead,
    "RESET": ResetHead,
}
_ENUMS = {
    "KIND": FrameKind,
    "FLAG": FrameFlags,
    "ROLE": Role,
    "FEATURE": Features,
    "MESSAGE": MessageKind,
    "REQUEST_FLAG": RequestFlags,
    "REPLY_FLAG": ReplyFlags,
    "REASON": ReturnReason,
    "BYTE_STREAM": ByteStreamKind,
    "PROGRESS_FLAG": ProgressFlags,
    "PART_FLAG": PartFlags,
    "RESET_REASON": ResetReason,
}


def field_format(field: Any) -> str:
    """The `struct` format of one fixed-size construct field, without byte order."""
    if isinstance(field, FormatField):
        return str(field.fmtstr).lstrip(">")
    if isinstance(field, Bytes):
        return f"{field.length}s"
    if isinstance(field, Subconstruct):  # a name, a constant, an enum: the bytes are inside
        return field_format(field.subcon)
    raise TypeError(f"{field!r} has no fixed format")


def struct_format(definition: Any) -> str:
    """The `struct` format of a construct Struct of fixed-size fields."""
    return ">" + "".join(field_format(field) for field in definition.subcons)


def _literal(data: bytes) -> str:
    """A bytes literal in double quotes, as the formatter wants it."""
    return 'b"' + repr(data)[2:-1].replace('"', '\\"') + '"'


def generate() -> str:
    """The text of `vchan/wire/layout.py`."""
    lines = [
        '"""The wire\'s fixed layouts and numbers, for `struct`.',
        "",
        "Generated from the construct definitions: python -m vchan.protocol --write",
        '"""',
        "",
        "from typing import Final",
        "",
        f"MAGIC: Final = {_literal(MAGIC)}",
        f"LAYOUT: Final = {LAYOUT}",
        "",
    ]
    for name, definition in _FIXED.items():
        text = struct_format(definition)
        names = ", ".join(str(field.name) for field in definition.subcons)
        lines += [*wrap(names, 96, initial_indent="# ", subsequent_indent="# ")]
        lines += [f'{name}: Final = "{text}"']
    for prefix, enum in _ENUMS.items():
        lines.append("")
        encoding: dict[str, int] = getattr(enum, "encmapping", None) or enum.flags
        lines += [f"{prefix}_{name}: Final = {int(value)}" for name, value in encoding.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print or write the generated module."""
    if sys.argv[1:] == ["--write"]:
        Path(__file__).parent.joinpath("wire", "layout.py").write_text(generate())
    else:
        sys.stdout.write(generate())


if __name__ == "__main__":
    main()
