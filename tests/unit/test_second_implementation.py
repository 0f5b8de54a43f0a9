"""docs/protocol.md is enough: an end written from it alone talks to vchan's own daemons, and reads
the document's own example and the test vectors."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import second
from tests.rig.second import (
    CALL,
    FAILURE,
    FINAL,
    GUEST,
    HOST,
    NO_AGENT,
    RECEIPT,
    REPLY,
    REQUEST,
    RETURNED,
    SUBSCRIBE,
    End,
    Message,
)
from tests.unit.local_host import LocalHost
from vchan.client import Agent
from vchan.guest.reports import Reporter
from vchan.rpc import bodies
from vchan.rpc.messages import Request, Settled

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "protocol.md").read_text()
VECTORS = ROOT / "tests" / "vectors"
WAIT_S = 30.0


def test_it_imports_nothing_of_vchan() -> None:
    tree = ast.parse(Path(second.__file__).read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    ]
    assert not [name for name in imported if name is None or name.startswith(("vchan", "tests"))]


# -------------------------------------------------------------------- the document's own bytes


def test_the_example_of_the_document() -> None:
    section = DOCUMENT.partition("## 10. An example")[2].partition("\n## ")[0]
    host, guest = (bytes.fromhex(nonce) for nonce in re.findall(r"`([0-9a-f]{32})`", section))
    mixed = bytes(a ^ b for a, b in zip(host, guest, strict=True))
    assert mixed.hex(" ", 4) in section
    rows = re.findall(r"^ {4}((?:[0-9a-f]{2,} ?)+) {2,}\S", section, re.MULTILINE)
    data = bytes.fromhex("".join(rows))
    seeds = struct.unpack(">2I", mixed[:8])
    frame, _, done = second.find_frame(data, [(seeds[0], seeds[1])])
    assert frame == second.Frame(second.DATA, b"hello", 3, 3, 5, 42, 7, 262144)
    assert done == len(data)
    assert frame.encoded((seeds[0], seeds[1])) == data
    shown = {vector["frame"] for vector in load("frames.json")["frames"]}
    assert data.hex() in shown


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


@pytest.mark.parametrize("vector", load("frames.json")["frames"], ids=lambda each: each["name"])
def test_frames(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["frame"])
    seeds = (vector["header_seed"], vector["payload_seed"], *[1] * vector.get("is_plain", False))
    frame, _, _ = second.find_frame(b"\xb6\x76" + data, [seeds])
    assert frame is not None
    for name in ("kind", "flags", "stream", "total", "seq", "ack", "credit"):
        assert getattr(frame, name) == vector[name]
    assert frame.payload.hex() == vector["payload"]
    assert frame.encoded(seeds) == data


@pytest.mark.parametrize("vector", load("greetings.json")["greetings"])
def test_greetings(vector: dict[str, Any]) -> None:
    payload = bytes.fromhex(vector["payload"])
    greeting = second.Greeting.decoded(payload)
    assert greeting.encoded() == payload
    for name, value in vector["fields"].items():
        got = getattr(greeting, name)
        if isinstance(got, bytes):
            got = got.decode() if name in ("name", "attached") else got.hex()
        assert got == value, name


@pytest.mark.parametrize("vector", load("messages.json")["messages"], ids=lambda each: each["name"])
def test_messages(vector: dict[str, Any]) -> None:
    data, fields = bytes.fromhex(vector["message"]), vector["fields"]
    message = second.parse(data)
    if "id" in fields:
        assert message.id.hex() == fields["id"]
    if vector["kind"] == "Request":
        names = {name: fields[name].encode() for name in ("exchange", "server")}
        body, topic = bytes.fromhex(fields["body"]), fields["topic"].encode()
        made = second.request(
            fields["flags"], message.id, topic, body, timeout_ms=fields["timeout_ms"], **names
        )
        assert made[:22] + data[22:26] + made[26:] == data  # monitor_ms: it asks for no heartbeat
    elif vector["kind"] == "Reply":
        assert second.reply(fields["flags"], message.id, bytes.fromhex(fields["body"])) == data
    elif vector["kind"] == "Subscribe":
        assert second.subscribe(*second.topics_of(message)) == data


def test_the_bodies_of_the_document_are_those_that_are_sent() -> None:
    shown = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)]
    call, notification, failure, report = shown
    invocation = bodies.decode_invocation(json.dumps(call).encode())
    made = bodies.encode_invocation(
        invocation.method,
        invocation.args,
        namespace=invocation.namespace,
        version=invocation.version,
        context=invocation.context,
    )
    assert json.loads(made) == call
    made = bodies.encode_failure(
        failure["class"], failure["message"], module=failure["module"], args=failure["args"]
    )
    assert json.loads(made) == failure
    sent: list[Request | Settled] = []
    reporter = Reporter(lambda message, _: sent.append(message), lambda: bytes(16))
    reporter.host_takes(True, 0.0)
    reporter.tell("facts", report["report"], 0.0)
    (request,) = sent
    assert isinstance(request, Request)
    assert bodies.decode_invocation(request.body).args == report
    assert set(notification) == {"publisher_id", "event_type", "payload", "metadata"}
    assert bodies.decode_failure(b"{}") == ("UnknownError", "")  # any of them may be absent


# -------------------------------------------------------------------- a HOST, to vchan-guest


class Endpoint:
    def __init__(self) -> None:
        self.noted: list[Any] = []

    def echo(self, **values: Any) -> Any:
        return values

    def note(self, **values: Any) -> None:
        self.noted.append(values)

    def fail(self) -> None:
        raise ValueError("no")


class GuestSite:
    """vchan-guest, an agent of ours behind it, and the second implementation in front of it."""

    def __init__(self, directory: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "port"))
        self._listener.listen()
        self._listener.settimeout(WAIT_S)
        command = ["-m", "vchan.guest.daemon", "--port", f"unix:{directory}/port"]
        command += ["--socket", str(directory / "agent.sock")]
        self._daemon = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        self.end = End(HOST)
        self.endpoint = Endpoint()
        self.agent = Agent(str(directory / "agent.sock"))
        self.agent.serve("agent", self.endpoint)
        self._thread = threading.Thread(target=self.agent.run)
        self._thread.start()

    def connect(self) -> None:
        """Accept the guest's connection: what a host gets of QEMU, the other way round."""
        connected, _ = self._listener.accept()
        self.end.open(connected)
        self.end.wait_for(lambda: self.end.is_open)

    def wait_for(self, kind: int, identity: bytes = b"") -> Message:
        """The first message of a kind; those before it are dropped."""
        found: list[Message] = []

        def look() -> bool:
            while self.end.messages and not found:
                message = second.parse(self.end.messages.popleft()[1])
                if message.kind == kind and message.id == (identity or message.id):
                    found.append(message)
            return bool(found)

        self.end.wait_for(look)
        return found[0]

    def wait_served(self) -> None:
        while (b"openstack", b"agent") not in second.topics_of(self.wait_for(SUBSCRIBE)):
            pass

    def ask(self, flags: int, method: str, *, server: bytes = b"", **args: Any) -> bytes:
        identity = os.urandom(16)
        body = json.dumps({"method": method, "args": args}).encode()
        message = second.request(flags, identity, b"agent", body, server=server)
        self.end.send(message, second.request_stream(b"agent"))
        return identity

    def call(self, method: str, *, server: bytes = b"", **args: Any) -> tuple[int, Any]:
        message = self.wait_for(REPLY, self.ask(CALL, method, server=server, **args))
        self.end.send(second.settled(message.id))
        return message.flags, json.loads(message.rest)

    def close(self) -> None:
        self.agent.stop()
        self._thread.join(WAIT_S)
        self._daemon.kill()
        self._daemon.wait()
        self.end.close()
        self._listener.close()


@pytest.fixture
def guest() -> Iterator[GuestSite]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        site = GuestSite(Path(name))
        try:
            site.connect()
            site.wait_served()
            yield site
        finally:
            site.close()


def test_requests_to_the_guest(guest: GuestSite) -> None:
    assert guest.call("echo", x=1) == (FINAL, {"x": 1})
    flags, failure = guest.call("fail")
    assert flags == FINAL | FAILURE
    assert (failure["class"], failure["module"], failure["message"]) == (
        "ValueError",
        "builtins",
        "no",
    )
    guest.wait_for(RECEIPT, guest.ask(0, "note", n=1))
    guest.end.wait_for(lambda: guest.endpoint.noted == [{"n": 1}])


def test_what_takes_several_frames_both_ways(guest: GuestSite) -> None:
    text = "x" * 400_000  # more than the window, which both have to open
    assert guest.call("echo", text=text) == (FINAL, {"text": text})


def test_the_server_s_name_is_the_host_s_affair(guest: GuestSite) -> None:
    for server in (b"", b"another-vm"):
        assert guest.call("echo", server=server, x=1) == (FINAL, {"x": 1})


def test_nobody_serves_the_topic(guest: GuestSite) -> None:
    identity = os.urandom(16)
    guest.end.send(second.request(CALL, identity, b"other", b'{"method": "echo"}'), 1)
    assert guest.wait_for(RETURNED, identity).flags == NO_AGENT


def test_a_frame_that_is_lost_is_sent_again(guest: GuestSite) -> None:
    guest.end.lose = 1
    lost = guest.ask(CALL, "echo", n=1)
    assert guest.call("echo", n=2) == (FINAL, {"n": 2})  # and so the first had come before
    assert guest.end.kinds[second.REWIND] >= 1
    guest.end.lose = 1
    last = guest.ask(CALL, "echo", n=3)
    guest.end.ping()  # no frame follows: its number shows the hole
    assert json.loads(guest.wait_for(REPLY, last).rest) == {"n": 3}
    assert lost != last
    guest.end.wait_for(lambda: guest.end.unacknowledged == 0)


def test_the_session_goes_on_over_a_new_stream(guest: GuestSite) -> None:
    guest.end.lose = 3  # what the old stream lost
    ids = [guest.ask(0, "note", n=number) for number in range(3)]
    guest.end.close()
    guest.connect()
    assert guest.end.resumed == [False, True]
    for identity in ids:
        guest.wait_for(RECEIPT, identity)
    guest.end.wait_for(lambda: guest.endpoint.noted == [{"n": number} for number in range(3)])


def test_a_host_that_is_new_begins_a_new_session(guest: GuestSite) -> None:
    guest.call("echo", x=1)
    guest.end.close()
    guest.end = End(HOST)
    guest.connect()
    guest.wait_served()
    assert guest.end.resumed == [False]
    assert guest.call("echo", x=2) == (FINAL, {"x": 2})


def test_what_was_asked_before_is_not_run_again(guest: GuestSite) -> None:
    identity = guest.ask(0, "note", n=1)
    guest.wait_for(RECEIPT, identity)
    body = b'{"method": "note", "args": {"n": 1}}'
    copy = second.request(second.REDELIVERED, identity, b"agent", body)
    guest.end.send(copy, second.request_stream(b"agent"))
    guest.wait_for(RECEIPT, identity)
    guest.call("echo")
    assert guest.endpoint.noted == [{"n": 1}]


# -------------------------------------------------------------------- a GUEST, to a daemon's socket


@pytest.fixture
def program() -> Iterator[End]:
    """The second implementation as a program at a host's socket."""
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        path = Path(name) / "host.sock"
        with LocalHost(path), socket.socket(socket.AF_UNIX) as connected:
            connected.connect(str(path))
            end = End(GUEST)
            end.open(connected)
            end.wait_for(lambda: end.is_open)
            yield end


def test_a_program_at_the_host_s_socket(program: End) -> None:
    """The daemon accepted the connection, and has flushed and greeted for its part."""
    assert program.kinds[second.HELLO] >= 1
    program.wait_for(lambda: program.messages)
    said = second.parse(program.messages.popleft()[1])
    assert (said.kind, second.topics_of(said)) == (SUBSCRIBE, [(b"", b"vchan.host")])
    body = json.dumps({"method": "echo", "args": {"x": 1}}).encode()
    program.send(second.request(CALL, bytes(16), b"agent", body, server=b"vm"), 3)
    program.wait_for(lambda: program.messages)
    answer = second.parse(program.messages.popleft()[1])
    assert (answer.kind, answer.flags, json.loads(answer.rest)) == (REPLY, FINAL, {"x": 1})


def test_a_program_that_serves_a_topic(program: End) -> None:
    program.wait_for(lambda: program.messages)
    program.messages.clear()
    program.send(second.subscribe((b"openstack", b"mine")))
    body = json.dumps({"method": "echo", "args": {}}).encode()
    program.send(second.request(CALL, b"a" * 16, b"mine", body), 1)  # to itself
    program.wait_for(lambda: program.messages)
    asked = second.parse(program.messages.popleft()[1])
    assert (asked.kind, asked.flags & CALL) == (REQUEST, CALL)
    program.send(second.reply(FINAL, asked.id, b"42"), 5)
    # To who served it: nobody sends that again. To who asked: the answer. On two streams.
    program.wait_for(lambda: len(program.messages) == 2)
    said = sorted(data for _, data in program.messages)
    assert said == [second.reply(FINAL, b"a" * 16, b"42"), second.settled(asked.id)]
