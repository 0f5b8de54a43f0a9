"""vchan-http as a process beside vchan-guest, with a host at the other end of the channel."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.rig import hosting
from tests.rig.hosting import HostEnd
from tests.rig.ports import claim_ports
from tests.unit.cable import Cable
from tests.unit.test_guest_daemon import Program, guest_daemon
from vchan.errors import ConfigError
from vchan.gateways.http import Options, parse_options
from vchan.host.local.http_services import HttpProxy, parse_services
from vchan.host.policy.rules import Facts
from vchan.io.loop import Loop
from vchan.rpc.bodies import decode_failure, decode_invocation, encode_failure, encode_json
from vchan.rpc.dispatcher import Told
from vchan.rpc.in_flight import Answered, HandedBack, Outcome, Taken
from vchan.rpc.messages import AGENT_GONE, NO_AGENT, Request

WAIT_S = 30.0
TOKEN = "0123456789abcdef-token"
FACTS = Facts("0a0a0a0a-0000-4000-8000-000000000001", "vm", "project-1")
SECRET = "metadata-secret"


class Control:
    """What the guest's requests are offered to: a service that notes them."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.requests: list[Request] = []
        self.cancelled: list[bytes] = []

    def __call__(self, request: Request, told: Told) -> Callable[[], None] | None:
        if request.topic != "control":
            return None
        self.requests.append(request)
        outcome = self._outcome(request)
        if outcome is not None:
            self._loop.call_soon(lambda: told(outcome, self._loop.time()))
        return lambda: self.cancelled.append(request.id)

    @staticmethod
    def _outcome(request: Request) -> Outcome | None:
        asked = decode_invocation(request.body)
        if not request.is_call:
            return Taken(request.id)
        match asked.method:
            case "echo":
                return Answered(request.id, False, encode_json(asked.args))
            case "fail":
                return Answered(request.id, True, encode_failure("ValueError", "as asked"))
            case "gone":
                return HandedBack(request.id, AGENT_GONE, "it went away")
            case "nobody":
                return HandedBack(request.id, NO_AGENT, "nobody serves it")
            case _:
                return None  # it takes for ever


class Service(BaseHTTPRequestHandler):
    """An HTTP service under the cloud: tells what it was asked."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path.endswith("/slow"):
            time.sleep(1.0)
        headers = {name.lower(): value for name, value in self.headers.items()}
        told = {"path": self.path, "headers": headers, "body": body.decode("latin-1")}
        content = json.dumps({"method": self.command, **told}).encode()
        if path.endswith("/large"):
            content = b"x" * (3 << 20)
        self.send_response({"/base/moved": 302, "/base/missing": 404}.get(path, 200))
        if path.endswith("/moved"):
            self.send_header("Location", "http://elsewhere/")
        self.send_header("Content-Type", "application/json")
        self.send_header("Set-Cookie", "secret=1")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_PATCH = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The URL of a service."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/base"
        server.shutdown()
        thread.join()


class Client:
    """A program of the guest's, over HTTP on a unix socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def request(
        self, method: str, target: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(self.connect()) as connection:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, target, data, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def connect(self) -> HTTPConnection:
        connection = HTTPConnection("vchan", timeout=WAIT_S)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(WAIT_S)
        connection.sock.connect(str(self.path))
        return connection

    def ask(self, verb: str, **members: Any) -> Any:
        status, _, body = self.request("POST", f"/v1/{verb}", members)
        assert status in (200, 204), body
        return json.loads(body) if body else None

    def problem(self, verb: str, **members: Any) -> tuple[int, Any]:
        status, headers, body = self.request("POST", f"/v1/{verb}", members)
        assert headers["Content-Type"] == "application/problem+json", body
        return status, json.loads(body)

    def receive(self, **members: Any) -> list[Any]:
        given: list[Any] = self.ask("receive", topics=["demo"], **members)["requests"]
        return given

    def events(self, query: str) -> tuple[HTTPConnection, HTTPResponse]:
        connection = self.connect()
        connection.request("GET", f"/v1/events?{query}")
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return connection, response


def next_event(response: HTTPResponse) -> Any:
    """Comments are nothing."""
    data = b""
    while line := response.readline():
        if line.startswith(b"data: "):
            data = line[6:]
        elif line == b"\n" and data:
            return json.loads(data)
    raise AssertionError("the stream has ended")


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


class Rig:
    """A host, a guest's daemon, and vchan-http."""

    def __init__(self, directory: Path, service: str) -> None:
        self.directory = directory
        self._service = service
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Rig:
        cable = self._stack.enter_context(Cable(self.directory))
        self.daemon = guest_daemon(self.directory, f"unix:{cable.guest}")
        self.http = Program(
            self.directory / "http.log",
            "-m",
            "vchan.gateways.http",
            *("--listen", f"unix:{self.directory}/http.sock"),
            *("--agent-socket", str(self.directory / "agent.sock")),
        )
        for program in (self.daemon, self.http):
            program.start()
            self._stack.callback(program.kill)
        self.host = self._stack.enter_context(HostEnd(cable.host, offer=self._offer))
        self.http.wait_log("connected")
        self.host.wait_ready()
        self.client = Client(self.directory / "http.sock")
        return self

    def _offer(self, loop: Loop) -> Any:
        self.control = Control(loop)
        services = parse_services(
            [f"metadata={self._service}", "away=http://127.0.0.1:1"], "the test"
        )
        self.proxy = HttpProxy(loop, services, SECRET)
        self._stack.callback(self.proxy.close)
        return self.proxy.offers(lambda: FACTS, self.control)

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@pytest.fixture
def rig(directory: Path, service: str) -> Iterator[Rig]:
    with Rig(directory, service) as rig:
        yield rig


@pytest.fixture
def client(rig: Rig) -> Client:
    return rig.client


# --- asking the control side


def test_a_call_is_answered(client: Client) -> None:
    args = {"x": 1, "text": "ä€", "list": [None, True, 1.5]}
    asked = {"topic": "control", "method": "echo", "args": args}
    assert client.ask("call", **asked) == {"result": args}


def test_casts_and_notifications_are_taken(rig: Rig, client: Client) -> None:
    client.ask("cast", topic="control", method="note", args={"n": 1}, fanout=True)
    client.ask("cast", topic="control", exchange="mine", server="s", method="note", namespace="a")
    client.ask("notify", topic="control", event_type="it.began", payload={"n": 2}, priority="warn")
    fanout, cast, notification = rig.control.requests
    assert (cast.exchange, cast.server) == ("mine", "s")
    assert decode_invocation(cast.body).namespace == "a"
    assert fanout.flags != cast.flags != notification.flags
    told = decode_invocation(notification.body)
    assert told.method == "warn"
    assert (told.args["event_type"], told.args["payload"]) == ("it.began", {"n": 2})


@pytest.mark.parametrize(
    ("method", "status", "title"),
    [
        ("fail", 500, "RemoteError"),
        ("gone", 502, "AgentGone"),
        ("nobody", 404, "NoSuchAgent"),
        ("for-ever", 504, "CallTimeout"),
    ],
)
def test_failures_are_problems(client: Client, method: str, status: int, title: str) -> None:
    asked = {"topic": "control", "method": method, "timeout_s": 0.5}
    got, problem = client.problem("call", **asked)
    assert (got, problem["status"], problem["title"]) == (status, status, title)
    assert problem["type"] == f"urn:vchan:problem:{title}"
    if method == "fail":
        assert problem["failure"]["class"] == "ValueError"
        assert problem["failure"]["message"] == "as asked"


@pytest.mark.parametrize(
    ("verb", "members", "text"),
    [
        ("call", {"method": "echo"}, "topic is missing"),
        ("call", {"topic": "control"}, "method is missing"),
        ("call", {"topic": "control", "method": "echo", "timeout_s": 0}, "timeout_s: expected"),
        ("call", {"topic": "control", "method": "echo", "timeout_s": True}, "timeout_s: expected"),
        ("call", {"topic": "control", "method": "echo", "args": []}, "args: expected an object"),
        ("call", {"topic": "control", "method": "echo", "tpoic": 1}, "unknown: tpoic"),
        ("call", {"topic": "x" * 256, "method": "echo"}, "topic is over 255 bytes"),
        ("call", {"topic": "", "method": "echo"}, "may not be empty"),
        ("notify", {"topic": "x", "event_type": "y", "priority": "loud"}, "priority: expected"),
        ("receive", {}, "topics is missing"),
        ("receive", {"topics": ["a/b/"]}, ""),
        ("receive", {"topics": [7]}, "topics: expected a list"),
        ("receive", {"topics": ["/a"]}, "topics: expected a list"),
        ("receive", {"topics": ["demo"], "max": 0}, "max: expected"),
        ("receive", {"topics": ["demo"], "wait_s": 1e9}, "wait_s: expected"),
        ("reply", {"lease": "x"}, "result is missing, or failure"),
        ("http", {"service": "metadata", "method": "GET", "path": "/../x"}, "path: has . or .."),
    ],
)
def test_a_wrong_request_says_what_is_wrong(
    client: Client, verb: str, members: dict[str, Any], text: str
) -> None:
    if text:
        status, problem = client.problem(verb, **members)
        assert status == 400
        assert text in problem["detail"]
    else:  # a topic may have slashes of its own
        assert client.ask(verb, **members, wait_s=0) == {"requests": []}


def test_what_http_itself_refuses(client: Client) -> None:
    for method, target, body, status in (
        ("GET", "/", None, 404),
        ("POST", "/v1/dance", {}, 404),
        ("GET", "/v1/call", None, 405),
        ("POST", "/v1/call", b"{", 400),
        ("POST", "/v1/call", b"[]", 400),
        ("POST", "/v1/call", b"[" * 100_000, 400),
        ("POST", "/v1/events", {}, 405),
        ("GET", "/v1/events?x=1", None, 400),
        ("GET", "/v1/events", None, 400),
        ("GET", "/v1/events?topic=demo&max=many", None, 400),
    ):
        got, _, answer = client.request(method, target, body)
        assert got == status, (method, target, answer)
        assert json.loads(answer)["status"] == status


def test_a_message_over_the_limit_is_refused(client: Client) -> None:
    status, problem = client.problem(
        "call", topic="control", method="echo", args={"x": "y" * ((4 << 20) - 80)}
    )
    assert status == 413, problem
    large = {"x": "y" * ((4 << 20) - 1000)}
    answer = client.ask("call", topic="control", method="echo", args=large)
    assert answer == {"result": large}


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(client: Client) -> None:
    status, _, body = client.request("POST", "/v1/call", b"x" * ((4 << 20) + 1))
    assert status == 413
    assert json.loads(body)["title"] == "BadRequest"


def test_nobody_waits_for_a_call_whose_client_hung_up(rig: Rig, client: Client) -> None:
    connection = client.connect()
    connection.request("POST", "/v1/call", json.dumps({"topic": "control", "method": "for-ever"}))
    wait(lambda: bool(rig.control.requests))
    connection.close()
    wait(lambda: rig.control.cancelled == [rig.control.requests[0].id])


def wait(reached: Callable[[], bool], failure: Callable[[], object] = lambda: "") -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s, failure()
        time.sleep(0.01)


# --- being asked


def test_a_call_is_received_and_answered(rig: Rig, client: Client) -> None:
    assert client.receive(wait_s=0) == []
    rig.host.wait_served("demo")
    called = rig.host.submit("demo", "add", x=1, y=2)
    (request,) = client.receive()
    assert (request["kind"], request["method"], request["topic"]) == ("call", "add", "demo")
    assert request["args"] == {"x": 1, "y": 2}
    assert 0 < request["timeout_s"] <= hosting.WAIT_S
    assert (request["deliveries"], request["redelivered"]) == (1, False)
    assert client.ask("heartbeat", lease=request["lease"]) == {"lease_s": 60}
    client.ask("reply", lease=request["lease"], result={"sum": 3})
    outcome = called.result(WAIT_S)
    assert isinstance(outcome, Answered)
    assert json.loads(outcome.body) == {"sum": 3}
    status, problem = client.problem("reply", lease=request["lease"], result=4)
    assert (status, problem["title"]) == (409, "LeaseOver")


def test_a_failure_reaches_the_caller(rig: Rig, client: Client) -> None:
    client.receive(wait_s=0)
    rig.host.wait_served("demo")
    called = rig.host.submit("demo", "add")
    (request,) = client.receive()
    client.ask("reply", lease=request["lease"], failure={"class": "KeyError", "message": "x"})
    outcome = called.result(WAIT_S)
    assert isinstance(outcome, Answered)
    assert outcome.failed
    assert decode_failure(outcome.body) == ("KeyError", "x")


def test_a_receiver_waits_for_what_comes(rig: Rig, client: Client) -> None:
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.extend(client.receive(wait_s=WAIT_S)))
    thread.start()
    rig.host.wait_served("demo")
    cast = rig.host.cast("demo", "note", n=1)
    thread.join(WAIT_S)
    (request,) = got
    assert not cast.done()  # nobody has taken it yet
    client.ask("ack", lease=request["lease"])
    assert isinstance(cast.result(WAIT_S), Taken)
    assert client.problem("reply", lease=request["lease"], result=1)[0] == 409


def test_a_cast_that_is_not_acknowledged_is_given_out_again(rig: Rig, client: Client) -> None:
    client.receive(wait_s=0)
    rig.host.wait_served("demo")
    cast = rig.host.cast("demo", "note", n=1)
    (first,) = client.receive(lease_s=1)
    (second,) = client.receive()
    assert first["id"] == second["id"]
    assert (second["deliveries"], second["redelivered"]) == (2, True)
    assert client.problem("ack", lease=first["lease"])[0] == 409  # it must not run it
    client.ask("ack", lease=second["lease"])
    assert isinstance(cast.result(WAIT_S), Taken)


def test_a_call_that_is_not_answered_fails_and_is_given_to_nobody_else(
    rig: Rig, client: Client
) -> None:
    client.receive(wait_s=0)
    rig.host.wait_served("demo")
    called = rig.host.submit("demo", "add")
    assert len(client.receive(lease_s=1)) == 1
    outcome = called.result(WAIT_S)
    assert isinstance(outcome, HandedBack)
    assert outcome.reason == AGENT_GONE
    assert client.receive(wait_s=0) == []


def test_several_at_once_and_a_cast_has_no_reply(rig: Rig, client: Client) -> None:
    client.receive(wait_s=0)
    rig.host.wait_served("demo")
    casts = [rig.host.cast("demo", "note", n=n) for n in range(5)]
    got: list[Any] = []
    while len(got) < 5:
        got += client.receive(max=3)
    assert [request["args"]["n"] for request in got] == list(range(5))
    assert client.problem("reply", lease=got[0]["lease"], result=1)[1]["title"] == "NotACall"
    client.ask("release", lease=got[0]["lease"])
    (again,) = client.receive()
    for lease in (again["lease"], *(request["lease"] for request in got[1:])):
        client.ask("ack", lease=lease)
    assert all(isinstance(cast.result(WAIT_S), Taken) for cast in casts)


def test_what_was_given_to_a_client_that_hung_up_goes_to_the_next(rig: Rig, client: Client) -> None:
    connection = client.connect()
    connection.request("POST", "/v1/receive", json.dumps({"topics": ["demo"], "wait_s": WAIT_S}))
    rig.host.wait_served("demo")
    connection.close()
    called = rig.host.submit("demo", "add")
    (request,) = client.receive()
    client.ask("reply", lease=request["lease"], result=None)
    assert isinstance(called.result(WAIT_S), Answered)


def test_events(rig: Rig, client: Client) -> None:
    connection, events = client.events("topic=demo&topic=mine/other&max=2&lease_s=30")
    rig.host.wait_served("demo")
    casts = [rig.host.cast("demo", "note", n=n) for n in range(4)]
    for number, cast in enumerate(casts):
        request = next_event(events)
        assert request["args"] == {"n": number}
        client.ask("ack", lease=request["lease"])  # makes room for the next
        assert isinstance(cast.result(WAIT_S), Taken)
    connection.close()
    events.close()


def test_a_stream_gets_no_more_than_it_has_room_for(rig: Rig, client: Client) -> None:
    connection, events = client.events("topic=demo&max=1")
    rig.host.wait_served("demo")
    first = rig.host.submit("demo", "add")
    second = rig.host.submit("demo", "add")
    request = next_event(events)
    wait(lambda: client_status(client)["waiting"] == 1, lambda: client_status(client))
    client.ask("reply", lease=request["lease"], result=1)
    client.ask("reply", lease=next_event(events)["lease"], result=2)
    assert [call.result(WAIT_S) for call in (first, second)]
    connection.close()
    events.close()


def client_status(client: Client) -> Any:
    status, _, body = client.request("GET", "/v1/status")
    assert status == 200
    return json.loads(body)


def test_the_daemon_is_killed_between_giving_and_acknowledging(rig: Rig, client: Client) -> None:
    """The cast is given out again, and who held it before is told not to run it."""
    client.receive(wait_s=0)
    rig.host.wait_served("demo")
    cast, called = rig.host.cast("demo", "note", n=1), rig.host.submit("demo", "add")
    got: list[Any] = []
    while len(got) < 2:
        got += client.receive(max=2)
    held = {request["kind"]: request for request in got}
    rig.daemon.kill()
    wait(lambda: not client_status(client)["connected"])
    assert client.problem("ack", lease=held["cast"]["lease"])[0] == 409
    assert client.problem("call", topic="control", method="echo")[0] == 503
    rig.daemon.start()
    (again,) = client.receive(wait_s=WAIT_S)
    assert again["id"] == held["cast"]["id"]
    client.ask("ack", lease=again["lease"])
    client.ask("reply", lease=held["call"]["lease"], result=3)
    assert isinstance(cast.result(WAIT_S), Taken)
    assert isinstance(called.result(WAIT_S), Answered)


def test_vchan_http_is_killed_between_giving_and_acknowledging(rig: Rig, client: Client) -> None:
    client.receive(wait_s=0)
    rig.host.wait_served("demo")
    cast = rig.host.cast("demo", "note", n=1)
    (held,) = client.receive()
    rig.http.kill()
    (rig.directory / "http.log").unlink()
    rig.http.start()
    rig.http.wait_log("connected")
    (again,) = client.receive(wait_s=WAIT_S)
    assert again["id"] == held["id"]
    client.ask("ack", lease=again["lease"])
    assert isinstance(cast.result(WAIT_S), Taken)


# --- connections


def test_many_requests_on_one_connection(client: Client) -> None:
    connection = client.connect()
    body = json.dumps({"topic": "control", "method": "echo", "args": {"x": 1}})
    for _ in range(20):
        connection.request("POST", "/v1/call", body)
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())) == (200, {"result": {"x": 1}})
    connection.close()


def test_too_many_connections_are_refused_and_harm_nobody(client: Client) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(contextlib.closing(client.connect()))
        # It is refused before it asks: what it would send might meet a closed connection.
        with contextlib.closing(client.connect()) as refused:
            said = b"".join(iter(lambda: refused.sock.recv(4096), b""))
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"CONNECTIONS_MAX" in said
    wait(lambda: client.request("GET", "/v1/status")[0] == 200)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(rig: Rig, client: Client) -> None:
    def curl(*words: str) -> str:
        unix = ["--unix-socket", str(client.path), "--max-time", str(WAIT_S)]
        done = subprocess.run(["curl", "-sS", *unix, *words], capture_output=True, check=True)
        return done.stdout.decode()

    asked = '{"topic": "control", "method": "echo", "args": {"x": 1}}'
    assert curl("http://vchan/v1/call", "-d", asked) == '{"result":{"x":1}}'
    large = rig.directory / "large"
    large.write_text('{"topic": "control", "method": "echo", "args": {"x": "%s"}}' % ("y" * 2**21))
    assert len(curl("http://vchan/v1/call", "-d", f"@{large}")) > 2**21  # Expect: 100-continue
    large.write_bytes(b"x" * (5 << 20))
    assert '"status":413' in curl("http://vchan/v1/call", "-d", f"@{large}")
    told = json.loads(curl("http://vchan/proxy/metadata/latest/x?y=z", "-H", "X-Instance-ID: me"))
    assert told["path"] == "/base/latest/x?y=z"
    assert told["headers"]["x-instance-id"] == FACTS.uuid


# --- services under the cloud


def test_a_service_is_asked_and_told_who_asks(client: Client) -> None:
    status, headers, body = client.request(
        "POST",
        "/proxy/metadata/a/b?q=1",
        b"\x00\xffbody",
        **{
            "Content-Type": "text/plain",
            "X-Vchan-Instance-ID": "another",
            "X_Instance_ID": "another",
            "X-Project-ID": "another",
            "X-Instance-ID-Signature": "another",
            "Authorization": "mine",
            "Cookie": "mine",
        },
    )
    assert status == 200
    assert "Set-Cookie" not in headers
    told = json.loads(body)
    assert (told["method"], told["path"]) == ("POST", "/base/a/b?q=1")
    assert told["body"].encode("latin-1") == b"\x00\xffbody"
    seen = told["headers"]
    assert seen["x-vchan-instance-id"] == seen["x-instance-id"] == FACTS.uuid
    assert seen["x-project-id"] == seen["x-tenant-id"] == FACTS.project
    assert len(seen["x-instance-id-signature"]) == 64
    assert seen["content-type"] == "text/plain"
    assert not {"authorization", "cookie", "x_instance_id"} & set(seen)


def test_a_service_s_own_words_are_passed_on(client: Client) -> None:
    status, headers, _ = client.request("GET", "/proxy/metadata/moved")
    assert (status, headers["Location"]) == (302, "http://elsewhere/")  # and was not followed
    assert client.request("GET", "/proxy/metadata/missing")[0] == 404
    status, _, body = client.request("HEAD", "/proxy/metadata/x")
    assert (status, body) == (200, b"")


@pytest.mark.parametrize(
    ("target", "status", "title"),
    [
        ("/proxy/nothing/x", 404, "NoSuchAgent"),
        ("/proxy/away/x", 502, "ServiceUnreachable"),
        ("/proxy/metadata/large", 413, "LimitExceeded"),
        ("/proxy/metadata/%2e%2e/admin", 400, "BadMember"),
        ("/proxy/metadata", 400, "BadMember"),
    ],
)
def test_a_service_that_cannot_be_asked(
    client: Client, target: str, status: int, title: str
) -> None:
    got, _, body = client.request("GET", target)
    problem = json.loads(body)
    assert (got, problem["title"]) == (status, title)
    assert "127.0.0.1" not in problem["detail"]


# --- who may


def start_http(directory: Path, *options: str) -> Program:
    words = ("-m", "vchan.gateways.http", "--agent-socket", str(directory / "none.sock"))
    program = Program(directory / "http.log", *words, *options)
    program.start()
    return program


def write_token(directory: Path, text: str, mode: int = 0o640) -> str:
    path = directory / "token"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_token_is_asked_for(directory: Path) -> None:
    write_token(directory, TOKEN + "\n")
    (port,) = claim_ports(1)
    listen = ("--listen", f"tcp:127.0.0.1:{port}")
    program = start_http(directory, *listen, "--token-file", str(directory / "token"))
    try:
        program.wait_log(f"tcp:127.0.0.1:{port}")
        for given, status in (
            ({}, 401),
            ({"Authorization": f"Bearer {TOKEN[:-1]}"}, 401),
            ({"Authorization": TOKEN}, 401),
            ({"Authorization": f"Bearer {TOKEN}"}, 200),
        ):
            connection = HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
            connection.request("GET", "/v1/status", headers=given)
            response = connection.getresponse()
            assert response.status == status
            assert TOKEN.encode() not in response.read()
            connection.close()
    finally:
        program.kill()


def test_only_some_users_may(directory: Path) -> None:
    """Root, and who runs it, may always: so this is asked of the kernel's word by hand."""
    options = ("--listen", f"unix:{directory}/http.sock", "--allow-uids", "12345, 12346")
    program = start_http(directory, *options)
    try:
        program.wait_log("http.sock")
        client = Client(directory / "http.sock")
        assert client.request("GET", "/v1/status")[0] == 200
        code = f"""
import os, socket, sys
os.chmod({str(directory)!r}, 0o755); os.chmod({str(client.path)!r}, 0o666)
if os.geteuid(): sys.exit(0)
os.setgid(65534); os.setuid(int(sys.argv[1]))
s = socket.socket(socket.AF_UNIX); s.connect({str(client.path)!r})
s.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
sys.exit(0 if s.recv(12).split()[1] == sys.argv[2].encode() else 1)
"""
        for uid, status in (("12346", "200"), ("12347", "403")):
            subprocess.run([sys.executable, "-I", "-c", code, uid, status], check=True)
    finally:
        program.kill()


# --- options


def test_options(directory: Path) -> None:
    assert parse_options(["--config", "/dev/null"]) == Options()
    write_token(directory, TOKEN)
    (directory / "http.conf").write_text(
        "# comment\nlisten = tcp:[::1]:8000\nquiet = yes\n"
        f"token-file = {directory}/token\nallow-uids = 1, 2 # both\n"
    )
    options = parse_options(["--config", str(directory / "http.conf"), "--socket-mode=0600"])
    assert options.listen == "tcp:[::1]:8000"
    assert (options.socket_mode, options.token, options.quiet) == (0o600, TOKEN, True)
    assert options.uids == {1, 2}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--listen", "tcp:0.0.0.0:80"], "never the network"),
        (["--listen", "tcp:127.0.0.1:0"], "expected tcp:127.0.0.1:PORT"),
        (["--listen", "tcp:127.0.0.1:80"], "needs a token-file"),
        (["--listen", "udp:x"], "expected unix:/PATH or tcp"),
        (["--listen", "unix:x"], "expected unix:/PATH or tcp"),
        (["--socket-mode", "9"], "expected an octal mode"),
        (["--token-file", "/nowhere"], "cannot be read"),
        (["--allow-uids", "root"], "expected numbers of users"),
        (["--agent-socket", "x"], "expected an absolute path"),
        (["--dance"], "is no option: see vchan-http --help"),
        (["--listen"], "needs a value"),
        (["--quiet=perhaps"], "expected yes or no"),
        (["--config", "/nowhere"], "no such file"),
    ],
)
def test_wrong_options(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("[", r"\[")):
        parse_options(words)


@pytest.mark.parametrize("text", ["", "short", "two words of many letters", "x" * 513, "\t" * 20])
def test_a_token_that_is_none(directory: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected one token of 16 to 512"):
        parse_options(["--token-file", write_token(directory, text)])


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o440])
def test_a_token_that_is_a_secret(directory: Path, mode: int) -> None:
    assert parse_options(["--token-file", write_token(directory, TOKEN, mode)]).token == TOKEN


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o642, 0o660, 0o666])
def test_a_token_that_others_can_read_or_choose_is_refused(directory: Path, mode: int) -> None:
    path = write_token(directory, TOKEN, mode)
    with pytest.raises(ConfigError, match=r"others can read or change it .*chmod 0640 it") as told:
        parse_options(["--token-file", path])
    assert f"mode {mode:04o}" in str(told.value)
    assert TOKEN not in str(told.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_token_of_somebody_else_is_refused(directory: Path) -> None:
    path = write_token(directory, TOKEN, 0o600)
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match=r"uid 65534.*chown root"):
        parse_options(["--token-file", path])


def test_a_wrong_line_of_a_file_is_named(directory: Path) -> None:
    (directory / "http.conf").write_text("\nlisten\n")
    with pytest.raises(ConfigError, match=r"http\.conf:2: expected OPTION = VALUE"):
        parse_options(["--config", str(directory / "http.conf")])
