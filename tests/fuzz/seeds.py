"""What the corpora begin with: the test vectors, and an example or two of everything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vchan.rpc.bodies import encode_failure
from vchan.wire import layout

VECTORS = Path(__file__).parents[1] / "vectors"
POLICY = Path(__file__).parents[2] / "etc" / "policy.d"

_BODIES = (
    b'{"method":"echo","args":{"x":1},"namespace":null,"version":"1.0","context":{"user":"u"}}',
    b'{"method":"info","args":{"publisher_id":"p","event_type":"e","payload":{"a":[1]},'
    b'"metadata":{"message_id":"m","timestamp":"t"}}}',
    b'{"method":"m","args":{},"context":{"is_admin":true,"_reply_q":"q"}}',
    b'{"a":1,"a":NaN,"b":1e999,"c":-0,"d":"\\ud800","e":[[[[]]]]}',
    b"[" * 300 + b"]" * 300,
    b"9" * 5000,
    b'"\xff\xfe"',
    encode_failure("ValueError", "no such thing", traceback=["line\n"]),
    encode_failure("ExceptionGroup", "x", module="builtins", args=["m", []]),
    encode_failure("UnicodeDecodeError", "x", module="builtins", args=["utf-8"]),
    encode_failure("system", "id", module="os", args=["id"]),
)
_DOMAIN = b"""<domain type='kvm' id='1'><name>vm</name>
<uuid>b1b1f4b2-0000-4000-8000-000000000001</uuid>
<metadata><n:instance xmlns:n="http://openstack.org/xmlns/libvirt/nova/1.1"><n:name>a&amp;b</n:name>
<n:flavor name="m1"/><n:owner><n:user uuid="u">x</n:user><n:project uuid="p">y</n:project></n:owner>
<n:root type="image" uuid="i"/></n:instance></metadata>
<devices><controller type='virtio-serial' index='0'/><channel type='unix'>
<source mode='bind' path='/run/s'/><alias name='channel0'/>
<target type='virtio' name='org.openstack.vchan.0' state='connected'/></channel>
</devices></domain>"""


def _vectors(file: str, key: str, field: str) -> list[bytes]:
    entries: list[dict[str, Any]] = json.loads((VECTORS / file).read_text())[key]
    return [bytes.fromhex(entry[field]) for entry in entries if isinstance(entry[field], str)]


def _frames() -> Iterator[bytes]:
    for stream in _vectors("frames.json", "frames", "frame"):
        block = bytes((0,)) + len(stream).to_bytes(2, "big") + stream
        yield bytes((0, 7)) + block * 2
    for key in range(2, 8):
        yield bytes((3, 200, 48, 1, 2, key, 4, 3, 1, 3, 0, 0, 0, 0, *b"p" * 40, 255, 1))


def _session() -> Iterator[bytes]:
    handshake, drain, wait, reopen, good = 8, 9, 10, 12, 14
    whole = (0, layout.KIND_DATA, 3, 1, 2, 0, 0, 0, 1, *b"hello", 0)
    first = (0, layout.KIND_DATA, 1, 2, 4, 2, 0, 0, 1, *b"x" * 32, 0)
    last = (0, layout.KIND_DATA, 2, 2, 4, 2, 0, 0, 1, *b"x" * 32, 0)
    say = (11, 3, 5)
    for role in (0, 1):
        yield bytes((role, handshake, *whole, drain, good, wait, 2, *whole))
        yield bytes((role, handshake, *first, *last, drain))
        yield bytes((role, handshake, *say, *say, drain, reopen, reopen, handshake, drain))
        yield bytes((role, handshake, good, *say, drain, 0, layout.KIND_REWIND, *(0,) * 8, drain))
        yield bytes((role, handshake, 0, layout.KIND_ACK, 0, 0, 0, 0, 0, 1, 0, 0, drain, wait, 1))
        yield bytes((role, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 4, *b"name", drain, wait, 3))
        yield bytes((role, handshake, *say, drain, wait, 4, wait, 4, wait, 4, handshake))


def _downward() -> Iterator[bytes]:
    call = (0, 1, 0, 1, 0, 2, 3, 0)
    subscribe = (0, 0, 0, 1, 7, 0)
    yield bytes((*call, 12, 0, 15, 1, 0, 0, 6, 1, 1, 1))
    yield bytes((*subscribe, 16, 10, 2, 11, 0, 1, 1, 0, 0, 0, 1, 0, 1, 2, 13, 0, 10, 2, 14))
    yield bytes((*call, 17, 1, 17, 0, 1, *call, 15, 1, 3, 1, 2))
    yield bytes((18, 1, 1, 1, 0, 1, 0, 1, 2, 10, 3, 19))


def _byte_streams() -> Iterator[bytes]:
    offer, take, read, write = (0,), (6,), (8, 0, 255), (9, 0, 255, 255)
    opened = (1, 0, 0, 0, 0, 1, 7, 0)
    yield bytes((*offer, *opened, *take, 3, 0, 1, 0, 0, 0, 5, *b"hello", *read, *take))
    yield bytes((*offer, 5, *take, 2, 16, 1, 2, 0, 0, 255, 255, *write, *take, 12, 2, *take))
    yield bytes((*offer, *opened, *write, 10, 0, *take, 2, 0, 1, 4, 0, 3, 255, 255, *take, 11, 0))
    yield bytes((*offer, *opened, 3, 0, 1, 1, 0, 0, 0, *read, 4, 0, 1, 3, 13, *take))


def _programs() -> Iterator[bytes]:
    said = list(_vectors("programs.json", "messages", "message"))
    running, output, room, end = said[12:16]
    yield from (_blocks(each) for each in said)
    yield _blocks(running, output, room, output, end)


def _copies() -> Iterator[bytes]:
    said = {
        each["name"]: bytes.fromhex(each["message"])
        for each in json.loads((VECTORS / "copies.json").read_text())["messages"]
    }
    yield from (_blocks(each) for each in said.values())
    root, end = said["a root that is a directory"], said["its end"]
    file = [said[name] for name in ("a file", "bytes", "the whole")]
    resumed = [said[name] for name in ("a file that is asked about", "given up", "left out")]
    yield _blocks(root, *file, said["a directory"], *resumed, end, end, said["the end"])


def _blocks(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(2) + part for part in parts)


def _prefixed(*first: int) -> list[bytes]:
    return [bytes((byte,)) + body for byte in first for body in _BODIES]


def _envelopes() -> Iterator[bytes]:
    message = {
        "method": "m",
        "args": {},
        "_unique_id": "0" * 32,
        "_msg_id": "1" * 32,
        "_reply_q": "q",
        "_timeout": 1.5,
        "_context_user": "u",
    }
    answer = {"_msg_id": "1" * 32, "result": [1], "failure": None, "ending": True}
    notification = {"event_type": "e", "priority": "INFO", "payload": {}, "publisher_id": "p"}
    failure = {**answer, "failure": encode_failure("E", "text").decode()}
    for value in (message, answer, failure, notification):
        text = json.dumps(value)
        yield text.encode()
        yield json.dumps({"oslo.version": "2.0", "oslo.message": text}).encode()
    ids = ["0" * 32, "f" * 32]
    lists = {"taken": ids, "calls": [], "gone": ids[:1], "doubt": []}
    yield json.dumps({"vchan.note": ["s"], **lists, "unclear": []}).encode()
    yield json.dumps({"vchan.arrival": "s"}).encode()


def _handed() -> Iterator[bytes]:
    vm = {"uuid": "u", "name": "n", "project": "p", "user": "", "flavor": "", "image": ""}
    target = {"exchange": "e", "topic": "t", "server": "", "namespace": "", "version": "1.0"}
    args = {
        "vm": vm,
        "request_id": "0" * 32,
        "target": {**target, "fanout": False},
        "method": "info",
        "args": {"x": 1},
        "timeout_s": 1.5,
        "monitor_s": 0,
    }
    context = {"vchan_instance_uuid": "u", "vchan_project_id": "p", "vchan_host": "h"}
    yield json.dumps({"context": context, "args": args}).encode()
    yield json.dumps({"context": context, "args": {**args, "args": {"method": 1}}}).encode()


def _policies() -> Iterator[bytes]:
    for path in sorted(POLICY.glob("*.policy")):
        yield path.read_bytes()
    yield b"listen,reply any nova/agent allow\nmode name:a* one-way-cast\n"
    yield b"call project:p* nova/c* method:get_* namespace:@none server:@self conductor\n"
    yield b"limit uuid:b1b1f4b2-0000-4000-8000-000000000001 bytes_per_s=4M calls_up=3\n"


_SEEDS: dict[str, Callable[[], Iterator[bytes] | list[bytes]]] = {
    "frames": _frames,
    "greeting": lambda: _vectors("greetings.json", "greetings", "payload"),
    "session": _session,
    "message": lambda: _vectors("messages.json", "messages", "message"),
    "downward": _downward,
    "byte_stream": lambda: _vectors("byte_streams.json", "messages", "message"),
    "byte_streams": _byte_streams,
    "program": _programs,
    "copy": _copies,
    "request": lambda: _prefixed(0, 1, 4),
    "reply": lambda: _prefixed(0, 1),
    "mail": _envelopes,
    "body": lambda: list(_BODIES),
    "caller": _envelopes,
    "audit": lambda: [b"openstack\ntopic\nserver\n\x1b[31m\n\xe2\x80\xae\x00\nname"],
    "handed": _handed,
    "policy": _policies,
    "domain": lambda: [_DOMAIN],
}


def seeds(target: str) -> list[bytes]:
    """For one target."""
    return list(_SEEDS[target]())
