"""One HTTP request to a service: whatever the service does, it is over in time."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig.ports import claim_ports
from vchan.host.local import http_services
from vchan.host.local.http_services import Service, ServiceFailure, fetch
from vchan.rpc.httpcall import HttpAnswer, HttpAsk

LIMIT_S = 1.0
"""SERVICE_S in these tests."""
FOR_EVER_S = 60.0
"""Long beyond it: what goes on for so long was not bounded, on the slowest machine too."""
ASK = HttpAsk("s", "GET", "/", (), b"")

Serve = Callable[[socket.socket, threading.Event], None]


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_services, "SERVICE_S", LIMIT_S)
    monkeypatch.setattr(http_services, "_LOOKUPS", http_services.Lookups())


class Server:
    """A service that does with each connection what it is told to."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._is_over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *words: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=words))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            connected, _ = self._listener.accept()
            if self._is_over.is_set():
                connected.close()
                return
            self._start(self._one, connected)

    def _one(self, connected: socket.socket) -> None:
        with connected:
            try:
                self._serve(connected, self._is_over)
            except OSError:
                pass  # the client has had enough

    def close(self) -> None:
        self._is_over.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self._threads:
            thread.join(FOR_EVER_S)
            assert not thread.is_alive()
        self._listener.close()


@pytest.fixture
def serving() -> Iterator[Callable[[Serve], Service]]:
    servers: list[Server] = []

    def start(serve: Serve) -> Service:
        servers.append(Server(serve))
        return Service("s", False, "127.0.0.1", servers[-1].port, "")

    yield start
    for server in servers:
        server.close()


def must_end(service: Service, ask: HttpAsk = ASK) -> ServiceFailure | HttpAnswer:
    """What comes of it, which must not take much longer than LIMIT_S."""
    came: list[ServiceFailure | HttpAnswer] = []

    def work() -> None:
        try:
            came.append(fetch(service, ask, {}))
        except ServiceFailure as failure:
            came.append(failure)

    thread = threading.Thread(target=work, daemon=True)
    began_s = time.monotonic()
    thread.start()
    thread.join(FOR_EVER_S / 2)
    assert came, f"still at it after {time.monotonic() - began_s:.0f} s, of {LIMIT_S:g}"
    return came[0]


def timed_out(service: Service, ask: HttpAsk = ASK) -> None:
    told = must_end(service, ask)
    assert isinstance(told, ServiceFailure)
    assert (told.code, told.text) == ("ServiceTimeout", "s did not answer within 1 s")


def dribble(connected: socket.socket, is_over: threading.Event, data: bytes) -> None:
    """A byte at a time, each well before any patience for one byte ends."""
    until_s = time.monotonic() + FOR_EVER_S
    for byte in data:
        if time.monotonic() > until_s or is_over.wait(0.1):
            return
        connected.sendall(bytes([byte]))


def read_request(connected: socket.socket) -> bytes:
    """All of a request. To close while a part of it is unread resets the connection, and may cost
    the client the answer."""
    heard = b""
    while b"\r\n\r\n" not in heard:
        heard += connected.recv(65536) or pytest.fail("hung up")
    length = re.search(rb"Content-Length: (\d+)\r\n", heard)
    whole = heard.index(b"\r\n\r\n") + 4 + (int(length[1]) if length else 0)
    while len(heard) < whole:
        heard += connected.recv(65536) or pytest.fail("hung up")
    return heard


def test_an_answer_that_is_whole(serving: Callable[[Serve], Service]) -> None:
    heard: list[bytes] = []

    def serve(connected: socket.socket, _: threading.Event) -> None:
        heard.append(read_request(connected))
        connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello")

    told = must_end(serving(serve), HttpAsk("s", "POST", "/a", (("accept", "*/*"),), b"body"))
    assert told == HttpAnswer(200, (("content-type", "text/plain"),), b"hello")
    assert heard[0].startswith(b"POST /a HTTP/1.1\r\n")
    assert heard[0].endswith(b"\r\n\r\nbody")
    assert b"Content-Length: 4\r\n" in heard[0]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 10_000,
        b"HTTP/1.1 200 OK\r\n" + b"X-A: 1\r\n" * 1000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 10_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 10_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1;" + b"x" * 10_000,
        b"H" * 10_000,
    ],
    ids=["header", "headers", "continue", "body", "chunks", "chunk-extension", "status"],
)
def test_an_answer_that_dribbles(serving: Callable[[Serve], Service], answer: bytes) -> None:
    timed_out(serving(lambda connected, is_over: dribble(connected, is_over, answer)))


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
def test_an_answer_that_stops(serving: Callable[[Serve], Service], beginning: bytes) -> None:
    def serve(connected: socket.socket, is_over: threading.Event) -> None:
        connected.sendall(beginning)
        is_over.wait(FOR_EVER_S)

    timed_out(serving(serve))


def test_a_service_that_reads_slowly(serving: Callable[[Serve], Service]) -> None:
    """It takes a little of the body now and then: no single write waits long."""

    def serve(connected: socket.socket, is_over: threading.Event) -> None:
        while not is_over.wait(0.1) and connected.recv(1024):
            pass

    ask = HttpAsk("s", "POST", "/", (), b"x" * (16 << 20))
    timed_out(serving(serve), ask)


def test_a_name_that_is_looked_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over, lookups = threading.Event(), []

    def look_up(*words: object, **_: object) -> list[Any]:
        lookups.append(words)
        is_over.wait(FOR_EVER_S)
        raise socket.gaierror(socket.EAI_AGAIN, "as asked")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    try:
        before = threading.active_count()
        for _ in range(3):
            timed_out(Service("s", False, "stuck.example", 80, ""))
        assert len(lookups) == 1, "each request looks up the name anew, on a thread that is stuck"
        assert threading.active_count() <= before + 2  # the lookup's, and one that is just ending
    finally:
        is_over.set()


def test_a_name_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    told = must_end(Service("s", False, "none.example", 80, ""))
    assert isinstance(told, ServiceFailure)
    assert (told.code, told.detail) == (
        "ServiceUnreachable",
        "none.example:80: [Errno -2] Name or service not known",
    )


class Silent(socket.socket):
    """One whose other end never answers: as behind a firewall that drops."""

    waited_s = 0.0

    def connect(self, address: Any, /) -> None:
        timeout_s = self.gettimeout()
        assert timeout_s is not None, "no time limit at all"
        Silent.waited_s += timeout_s
        raise TimeoutError("timed out")


def test_many_addresses_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{number}", 80))
        for number in range(1, 9)
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "socket", Silent)
    monkeypatch.setattr(Silent, "waited_s", 0.0)
    must_end(Service("s", False, "many.example", 80, ""))
    assert 0 < Silent.waited_s <= 3 * LIMIT_S  # together; each had it whole before


def test_the_next_address_is_tried(
    serving: Callable[[Serve], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(connected: socket.socket, _: threading.Event) -> None:
        read_request(connected)
        connected.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    service = serving(serve)
    nobody = ("127.0.0.1", claim_ports(1)[0])
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
        for address in (nobody, ("127.0.0.1", service.port))
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    told = must_end(service._replace(host="two.example"))
    assert isinstance(told, HttpAnswer)
    assert told.status == 204


# -------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of this machine's own, with its key in the same file."""
    directory = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    files = ("-keyout", str(directory / "key"), "-out", str(directory / "cert"))
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    both = directory / "both"
    both.write_text((directory / "cert").read_text() + (directory / "key").read_text())
    return both


def test_over_tls(
    serving: Callable[[Serve], Service], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    def serve(connected: socket.socket, _: threading.Event) -> None:
        with context.wrap_socket(connected, server_side=True) as secure:
            read_request(secure)
            secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes")

    told = must_end(serving(serve)._replace(is_tls=True))
    assert isinstance(told, HttpAnswer), told
    assert told.body == b"yes"


def test_over_tls_an_answer_that_dribbles(
    serving: Callable[[Serve], Service], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    def serve(connected: socket.socket, is_over: threading.Event) -> None:
        with context.wrap_socket(connected, server_side=True) as secure:
            dribble(secure, is_over, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000)

    timed_out(serving(serve)._replace(is_tls=True))


def test_a_tls_handshake_that_dribbles(serving: Callable[[Serve], Service]) -> None:
    """A record that is announced, and comes a byte at a time."""
    record = b"\x16\x03\x03\x3f\xff" + b"\x02" + b"\x00" * 16_000
    service = serving(lambda connected, is_over: dribble(connected, is_over, record))
    timed_out(service._replace(is_tls=True))
