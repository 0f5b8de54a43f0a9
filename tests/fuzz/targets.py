"""One function for each parser of guests' bytes (and some of others' that come as cheap).

Each takes any bytes at all. What it raises is a finding: a parser let something out that it does
not promise, or what it made of the bytes is not what it should be.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

from tests.fuzz import byte_streams, downward, session
from tests.fuzz.script import Script
from vchan.conductor import admission
from vchan.errors import BadBody, ConfigError, LimitExceeded
from vchan.host.broker.config import import_oslo_messaging
from vchan.host.hypervisor.domain_xml import DomainState, DomainXmlError, domain_facts
from vchan.host.oslo_wire import downward_envelope, envelope, upward_envelope
from vchan.host.oslo_wire.mail import read_mail
from vchan.host.policy.audit_record import LINE_BYTES_MAX, Record, format_record
from vchan.host.policy.lint import lint
from vchan.host.policy.rule_parser import PolicyError, parse
from vchan.host.policy.rules import Ask, Facts, Kind, Policy
from vchan.rpc import bodies
from vchan.rpc.messages import BadMessage, Request, Unknown, decode, encode
from vchan.services import copies, copy_order, programs
from vchan.services.framing import BadFrame
from vchan.wire.frames import (
    FLUSH,
    FRAME_BYTES_MAX,
    GREETING_BYTES_MAX,
    NO_KEY,
    PAYLOAD_BYTES_MAX,
    Decoder,
    Frame,
    Key,
    decode_greeting,
)
from vchan.wire.layout import KIND_HELLO, KIND_REFUSE, KIND_WELCOME

with warnings.catch_warnings():  # of each other, and of what they import
    warnings.simplefilter("ignore")
    import_oslo_messaging()
    oslo: Any = import_module("oslo_messaging._drivers.common")

VM = "b1b1f4b2-0000-4000-8000-000000000001"
ID = bytes(range(16))
_GREETINGS = (KIND_HELLO, KIND_WELCOME, KIND_REFUSE)
STREAM_BYTES_MAX = 40_000
_CHUNKS = (3, 44, 100, 1000, 4096, 20_000)
KEY, CANDIDATE = Key(0x5A5A5A5A, 0x12345678), Key(7, 9)


# --- the wire -----------------------------------------------------------------------------------


def frames(data: bytes) -> None:
    """A decoder finds the same frames however the stream is cut, and holds one frame at most."""
    script = Script(data)
    sizes = [script.pick(_CHUNKS) for _ in range(1 + script.number() % 4)]
    stream = b"".join(iter(lambda: _piece(script), b""))[:STREAM_BYTES_MAX]
    whole, pieces = _decoder(), _decoder()
    found = _decode(whole, stream)
    in_pieces: list[Frame] = []
    at = turn = 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        in_pieces += _decode(pieces, stream[at : at + size])
        assert sum(map(len, pieces._chunks)) == pieces._held <= FRAME_BYTES_MAX
        at += size
        turn += 1
    assert in_pieces == found
    # The last few bytes are looked at when a header's worth has come.
    assert pieces.bytes_skipped + pieces._held == whole.bytes_skipped + whole._held
    for frame in found:
        assert len(frame.payload) <= PAYLOAD_BYTES_MAX
        assert frame.kind not in _GREETINGS or len(frame.payload) <= GREETING_BYTES_MAX


def _decoder() -> Decoder:
    decoder = Decoder()
    decoder.key, decoder.candidate = KEY, CANDIDATE
    return decoder


def _decode(decoder: Decoder, data: bytes) -> list[Frame]:
    out = decoder.receive_data(data)
    while decoder.stopped:
        out += decoder.receive_data(b"")
    return out


def _piece(script: Script) -> bytes:
    if script.at_end:
        return b""
    match script.number() % 8:
        case 0:
            return script.block() or b"?"
        case 1:
            return FLUSH
        case what:
            key = (KEY, KEY, KEY, CANDIDATE, NO_KEY, Key(1, 2))[what - 2]
            sealed = bytearray(session.sealed(script, key, seq=5, ack=2))
            if script.number() < 64:  # damaged
                sealed[script.number(2) % len(sealed)] ^= 1 + script.number() % 255
            return bytes(sealed)


def greeting(data: bytes) -> None:
    """What is read as a greeting can be said again."""
    read = decode_greeting(data)
    if read is not None:
        assert decode_greeting(read.encode()) == read


def message(data: bytes) -> None:
    """A message that decodes says the same when it is encoded again."""
    read = decode(data)
    if not isinstance(read, BadMessage | Unknown):
        again = decode(encode(read))
        assert again == read or "�" in str(read)  # a text that was no UTF-8 is made one


# --- JSON ---------------------------------------------------------------------------------------


def body(data: bytes) -> None:
    """An agent or a client reads what came through the daemons."""
    try:
        bodies.decode_invocation(data)
    except BadBody:
        pass
    name, text = bodies.decode_failure(data)
    assert isinstance(name, str) and isinstance(text, str)


def request(data: bytes) -> None:
    """A guest's request becomes what oslo.messaging's servers can read, or is refused."""
    flags, timeout_ms = (data[0], data[0] * 100) if data else (0, 0)
    asks = Request(ID, flags, timeout_ms, 0, "openstack", "topic", "", data[1:])
    try:
        read = upward_envelope.read(asks)
        made = upward_envelope.publication(VM, asks, read, {"request_id": "r"})
    except envelope.EnvelopeError:
        return
    message = _oslo_message(made.body)
    assert message["_unique_id"] == ID.hex()
    assert [key for key in message if key.startswith("_")] == [
        "_context_request_id",
        "_unique_id",
        *(("_msg_id", "_reply_q", "_timeout") if read.ask.kind is Kind.CALL else ()),
    ]
    assert downward_envelope.decode(made.body, expiration=None).id == ID


def reply(data: bytes) -> None:
    """Whatever a guest answers, a stock client gets a result or an exception of it."""
    is_failure = bool(data and data[0] & 1)
    failure = data[1:] if is_failure else None
    message = _oslo_message(
        downward_envelope.encode_reply("id", result_json=data[1:], failure_json=failure)
    )
    assert message["_msg_id"] == "id" and message["ending"] is True
    if message["failure"] is not None:
        rebuilt = oslo.deserialize_remote_exception(message["failure"], [])
        assert isinstance(rebuilt, Exception)
        str(rebuilt)


def _oslo_message(body: bytes) -> dict[str, Any]:
    """As oslo.messaging's own clients and servers read it."""
    read: dict[str, Any] = oslo.deserialize_msg(json.loads(body))
    return read


def mail(data: bytes) -> None:
    """What stands in a VM's own queue: services write there."""
    try:
        read_mail(data)
    except envelope.EnvelopeError:
        pass


def caller(data: bytes) -> None:
    """What a service publishes for a guest."""
    try:
        read = downward_envelope.decode(data, expiration=None)
    except envelope.EnvelopeError:
        return
    bodies.decode_invocation(downward_envelope.request_body(read))


def audit(data: bytes) -> None:
    """Whatever a guest calls things, the record is one line of plain ASCII, and JSON."""
    text = data.decode("utf-8", "replace")
    exchange, topic, server, namespace, method, name = (text.split("\n") + [""] * 6)[:6]
    ask = Ask(Kind.CALL, exchange, topic, server, namespace, method)
    record = Record(Facts(VM, name), ask, "deny", "default", ID, text)
    line = format_record(record, time="now", host="here")
    assert len(line) <= LINE_BYTES_MAX
    assert line.endswith(b"\n") and all(0x20 <= byte < 0x7F for byte in line[:-1])
    assert json.loads(line)["vm"] == VM


def handed(data: bytes) -> None:
    """What a host hands the conductor, of which a guest has chosen parts."""
    try:
        value = envelope.bounded_json(data, "it")
        context, args = value["context"], value["args"]
        assert isinstance(context, dict) and isinstance(args, dict)
    except (envelope.EnvelopeError, TypeError, KeyError, AssertionError):
        return
    for kind in (Kind.CALL, Kind.CAST, Kind.NOTIFY):
        try:
            read = admission.read(kind, context, args)
        except envelope.EnvelopeError:
            continue
        assert read.facts.uuid == context["vchan_instance_uuid"]
        assert read.ask.kind is kind and read.ask.topic and read.ask.method


# --- what the host reads of its own -------------------------------------------------------------


def policy(data: bytes) -> None:
    """A policy parses, or is a PolicyError; and then it decides about everything."""
    text = data.decode("utf-8", "replace")
    try:
        read = parse([("fuzz", text)])
    except PolicyError:
        return
    facts = Facts(VM, "name", "project")
    for kind in Kind:
        ask = Ask(kind, "openstack", "topic", "", "", "method")
        assert read.explain(facts, ask).verdict == read.decide(facts, ask)
    _check_limits(read, facts)
    lint(read)


def _check_limits(read: Policy, facts: Facts) -> None:
    assert all(value > 0 for value in vars_of(read.limits(facts)))


def vars_of(limits: Any) -> list[float]:
    """The values of a dataclass with slots."""
    return [getattr(limits, name) for name in limits.__dataclass_fields__]


def domain(data: bytes) -> None:
    """A domain's XML: libvirt's, but the tenant chose some of the words in it."""
    text = data.decode("utf-8", "replace")
    try:
        facts = domain_facts(text, text, state=DomainState.RUNNING)
    except (DomainXmlError, LimitExceeded, ConfigError):
        return
    assert facts.uuid and facts.name


def program(data: bytes) -> None:
    """What a guest says to `vchan exec`: refused, or bounded by what that has not written."""
    dialogue = programs.ProgramDialogue()
    script = Script(data)
    while not script.at_end:
        try:
            dialogue.receive(script.block())
        except BadFrame as error:
            assert str(error)
            return
        assert 0 <= dialogue.unwritten <= 2 * programs.OUTPUT_BYTES_MAX
        assert 0 <= dialogue.room <= programs.INPUT_BYTES_MAX
        if dialogue.room:
            dialogue.sends(1 + script.number() % dialogue.room)


def copy(data: bytes) -> None:
    """What a guest sends to `vchan cp`: a fault, or names below one root, and no byte too many."""
    reader = copies.CopyReader()
    receiving = copy_order.ReceivingEnd(takes_directories=True, resumes=True)
    script = Script(data)
    depth, size, at = 0, 0, 0
    while not script.at_end:
        try:
            for message in reader.feed(script.block()):
                receiving.heed(message)
                match message:
                    case copies.DirectoryEntry(_, name):
                        assert bool(name) == bool(depth) and b"/" not in name and name != b".."
                        depth += 1
                    case copies.DirectoryEnd():
                        depth -= 1
                    case copies.FileEntry(flags, facts, announced, name):
                        assert bool(name) == bool(depth) and b"/" not in name and name != b".."
                        assert facts.mode <= 0o777
                        size, at = announced, 0
                        if flags & copies.ASK:
                            receiving.have(min(size, 5), bytes(32))
                    case copies.FileBegin(offset):
                        at = offset
                    case copies.FileData(content):
                        at += len(content)
                    case copies.FileWhole():
                        assert at == size
                    case _:
                        pass
                assert 0 <= depth <= copy_order.DEPTH_MAX and at <= size
        except copies.CopyFault as error:
            assert str(error)
            return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "program": program,
    "copy": copy,
    "frames": frames,
    "greeting": greeting,
    "session": session.run,
    "message": message,
    "downward": downward.run,
    "byte_stream": byte_streams.message,
    "byte_streams": byte_streams.run,
    "request": request,
    "reply": reply,
    "mail": mail,
    "body": body,
    "caller": caller,
    "handed": handed,
    "audit": audit,
    "policy": policy,
    "domain": domain,
}
