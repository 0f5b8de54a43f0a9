"""`vchan proxy`: the command and both daemons as processes, with a cable where QEMU would be; and
clients of all kinds, good and bad."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("amqp", reason="py-amqp is not installed")

from tests.rig import tail, wait_until
from tests.rig.certificates import Authority, Certificate
from tests.rig.forwarding import ROOT, WAIT_S, Forwarding, Part, Server, Transfer
from vchan.cli.failures import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from vchan.cli.proxy.server import UNPROVEN_MAX
from vchan.cli.proxy.wire import HEAD_BYTES_MAX

POLICY = """
forward name:vm tcp:22 deny
forward name:vm tcp:* allow
forward name:vm unix:/tmp/* allow
"""
ALLOW = "tcp:*, unix:/tmp/*"
TOKEN = "a-token-that-nobody-guesses"
MIB = 1 << 20


class Files(NamedTuple):
    """An operator's, for all tests."""

    directory: Path
    users: Path
    tokens: Path
    proxy: Certificate
    octavia: Certificate
    stranger: Certificate
    ca: Path

    def tls(self) -> tuple[str, ...]:
        words = ("--certificate", str(self.proxy.certificate), "--key", str(self.proxy.key))
        return (*words, "--client-ca", str(self.ca))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("files")
    ours, others = Authority(directory), Authority(directory, "others")
    users = directory / "users"
    tokens = directory / "tokens"
    lines = f"ci token:{TOKEN} tcp:*,unix:/tmp/*\nnarrow token:narrow-{TOKEN} tcp:1\n"
    for path, more in ((tokens, ""), (users, "octavia certificate:octavia tcp:*  # the worker\n")):
        path.write_text(lines + more)
        path.chmod(0o600)
    names = "DNS:localhost,IP:127.0.0.1"
    proxy = ours.issue("proxy", names=names)
    certificates = (proxy, ours.issue("octavia"), others.issue("octavia"))
    return Files(directory, users, tokens, *certificates, ours.certificate)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def fresh(directory: Path) -> Iterator[Forwarding]:
    """For tests after which a daemon is another, or gone."""
    with Forwarding(directory, POLICY, ALLOW) as world:
        yield world


@pytest.fixture(scope="module")
def shared() -> Iterator[Forwarding]:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        Forwarding(Path(name), POLICY, ALLOW) as world,
    ):
        yield world


@pytest.fixture
def world(shared: Forwarding) -> Iterator[Forwarding]:
    """One that is left as it was found."""
    yield shared
    shared.end_forwards()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


# ---------------------------------------------------------------- clients


def basic(name: str = "ci", token: str = TOKEN) -> str:
    return "Proxy-Authorization: Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()


def dial(where: str) -> socket.socket:
    if where.startswith("/"):
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(WAIT_S)
        made.connect(where)
        return made
    host, _, port = where.rpartition(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def shake_hands(where: str, files: Files, shown: Certificate | None = None) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(files.ca))
    if shown is not None:
        context.load_cert_chain(shown.certificate, shown.key)
    return context.wrap_socket(dial(where), server_hostname="localhost")


def request(authority: str, *headers: str) -> bytes:
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def read_answer(connected: socket.socket) -> str:
    """Its first line, and for a refusal the body."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        data = connected.recv(1)
        assert data, f"the connection ended behind {answer!r}"
        answer += data
    status = answer.decode().splitlines()[0]
    if " 200 " not in status:
        answer += b"".join(iter(lambda: connected.recv(1000), b""))
        return answer.decode()
    return status


@contextlib.contextmanager
def tunnel(where: str, authority: str, *headers: str, then: bytes = b"") -> Iterator[socket.socket]:
    with dial(where) as connected:
        connected.sendall(request(authority, *headers) + then)
        assert read_answer(connected) == "HTTP/1.1 200 Connection established"
        yield connected


def asked(where: str, sent: bytes) -> str:
    """What a client that sends this is told."""
    with dial(where) as connected:
        connected.sendall(sent)
        return read_answer(connected)


def wait_log(part: Part, *words: str) -> str:
    """The first line of its log that has all these words."""
    found: list[str] = []

    def look() -> bool:
        lines = part.log.read_text().splitlines()
        found[:] = [line for line in lines if all(word in line for word in words)]
        return bool(found)

    failure = lambda: f"{part.name} does not say {words}: {tail(part.log)}"  # noqa: E731
    wait_until(look, timeout_s=WAIT_S, interval_s=0.02, failure=failure)
    return found[0]


def is_over(connected: socket.socket) -> bool:
    """Whether the other side has ended it, in whatever way."""
    try:
        while connected.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def is_reset(connected: socket.socket) -> bool:
    try:
        while connected.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


# ---------------------------------------------------------------- it works


def test_a_tunnel_and_what_is_on_record(fresh: Forwarding, files: Files, server: Server) -> None:
    proxy, where = fresh.proxy("--users", str(files.tokens))
    with tunnel(where, f"vm:{server.target}", basic()) as connected:
        connected.sendall(b"through")
        assert connected.recv(100) == b"through"
        connected.shutdown(socket.SHUT_WR)
        assert connected.recv(100) == b""
    wait_until(
        lambda: len(fresh.audited()) >= 2,
        timeout_s=WAIT_S,
        interval_s=0.05,
        failure=lambda: str(fresh.audited()),
    )
    opened, ended = fresh.audited()
    assert opened["verdict"] == "allow" and ended["reason"] == "both ends were done"
    assert proxy.process is not None
    by = f"uid {os.getuid()}, pid {proxy.process.pid}, for ci at 127.0.0.1"
    assert (opened["by"], ended["by"]) == (by, by)
    wait_log(fresh.guest, f"to tcp:{server.target}", '"for":"ci at 127.0.0.1"')
    assert proxy.interrupt() == EXIT_INTERRUPTED
    assert proxy.log.read_text() == ""


def test_what_comes_behind_the_request_is_the_tunnels(
    world: Forwarding, files: Files, server: Server
) -> None:
    """Even if it looks like a request."""
    _, where = world.proxy("--users", str(files.tokens))
    then = request("other:1", "Content-Length: 4") + b"more"
    with tunnel(where, f"vm:{server.target}", basic(), then=then) as connected:
        connected.sendall(b", and more")
        connected.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: connected.recv(100), b""))
        assert said == then + b", and more"


def test_it_goes_on_through_cuts_and_restarts(
    fresh: Forwarding, files: Files, server: Server
) -> None:
    _, where = fresh.proxy("--users", str(files.tokens))
    connected = dial(where)
    connected.sendall(request(f"vm:{server.target}", basic()))
    assert " 200 " in read_answer(connected)
    transfer = Transfer(connected, 1024 * MIB)
    for number in range(4):
        transfer.wait_for(transfer.received + 2 * MIB)
        fresh.host.restart() if number % 2 else fresh.cut()
    transfer.wait_for(transfer.received + 2 * MIB)
    transfer.end_early()
    assert transfer.finish() == []


@pytest.mark.parametrize("how", ["certificate", "token"])
def test_over_tls_with_all_bytes(world: Forwarding, files: Files, server: Server, how: str) -> None:
    _, where = world.proxy("--users", str(files.users), *files.tls())
    connected = shake_hands(where, files, files.octavia if how == "certificate" else None)
    shown = () if how == "certificate" else (basic(),)
    connected.sendall(request(f"vm:{server.target}", *shown))
    assert " 200 " in read_answer(connected)
    chance = random.Random(1)
    for size in (1, 16383, 16384, 16385, 40_000, *[48 * 1024] * 100):
        said = chance.randbytes(size)
        connected.sendall(said)
        heard = b""
        while len(heard) < size and (data := connected.recv(65536)):
            heard += data
        assert heard == said
    with connected.unwrap():  # both have said that nothing more comes
        pass
    who = "octavia" if how == "certificate" else "ci"
    assert any(f"for {who} at" in row["by"] for row in world.audited())


def test_a_unix_socket_asks_nobody_who_he_is(world: Forwarding, server: Server) -> None:
    path = world.directory / "proxy.sock"
    proxy, where = world.proxy(listen=f"unix:{path}")
    assert (where, path.stat().st_mode & 0o777) == (str(path), 0o660)
    with tunnel(where, f"vm:{server.target}") as connected:
        connected.sendall(b"through")
        assert connected.recv(100) == b"through"
    assert any(f"for uid {os.getuid()}" in row["by"] for row in world.audited())
    assert proxy.interrupt() == EXIT_INTERRUPTED
    assert not path.exists()


def test_names_of_the_operators(world: Forwarding, files: Files, directory: Path) -> None:
    names = directory / "names"
    with Server(directory / "service") as by_path, Server() as by_port:
        names.write_text(
            f"192.0.2.7 vm\nshop:80 vm unix:{directory}/service  # no port of it\n"
            "[2001:DB8::1] vm\n"
        )
        _, where = world.proxy("--users", str(files.tokens), "--names", str(names))
        places = ["shop:80", f"192.0.2.7:{by_port.target}", f"[2001:db8:0::1]:{by_port.target}"]
        for place in places:
            with tunnel(where, place, basic()) as connected:
                connected.sendall(place.encode())
                assert connected.recv(100) == place.encode()
        assert len(by_path.connections) == 1


def test_files_are_read_again(world: Forwarding, files: Files, server: Server) -> None:
    users = world.directory / "users"
    users.write_text(files.tokens.read_text())
    users.chmod(0o600)
    proxy, where = world.proxy("--users", str(users))
    assert proxy.process is not None
    place = f"vm:{server.target}"
    with tunnel(where, place, basic()) as connected:
        users.write_text(f"other token:other-{TOKEN} tcp:*\n")
        proxy.process.send_signal(signal.SIGHUP)
        wait_log(proxy, "the files were read again")
        connected.sendall(b"goes on")
        assert connected.recv(100) == b"goes on"
    assert " 407 " in asked(where, request(place, basic()))
    users.write_text("nonsense\n")
    proxy.process.send_signal(signal.SIGHUP)
    wait_log(proxy, f"{users}:1: expected NAME", "what was read before it holds")
    with tunnel(where, place, basic("other", f"other-{TOKEN}")):
        pass


# ---------------------------------------------------------------- clients as they stand


class Site(BaseHTTPRequestHandler):
    """A service with an API: says what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._say(b"")

    def do_PUT(self) -> None:
        self._say(self.rfile.read(int(self.headers["Content-Length"])))

    def _say(self, given: bytes) -> None:
        body = f"{self.command} {self.path} {len(given)}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(files: Files) -> Iterator[ThreadingHTTPServer]:
    """It serves over TLS, its certificate is for "amphora-1", and it wants its clients'."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as served:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority = Authority(files.directory, "services")
        own = authority.issue("amphora-1")
        context.load_cert_chain(own.certificate, own.key)
        context.load_verify_locations(authority.certificate)
        context.verify_mode = ssl.CERT_REQUIRED
        authority.issue("controller")
        served.socket = context.wrap_socket(served.socket, server_side=True)
        thread = threading.Thread(target=served.serve_forever, name="site")
        thread.start()
        yield served
        served.shutdown()
        thread.join(WAIT_S)


@pytest.mark.parametrize("over_tls", [False, True])
def test_requests_by_its_environment_and_tls_end_to_end(
    world: Forwarding,
    files: Files,
    site: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    over_tls: bool,
) -> None:
    requests = pytest.importorskip("requests")
    names = world.directory / "names"
    names.write_text("amphora-1 vm\n")
    tls = files.tls() if over_tls else ()
    _, where = world.proxy("--users", str(files.tokens), "--names", str(names), *tls)
    scheme, port = "https" if over_tls else "http", where.rpartition(":")[2]
    monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://ci:{TOKEN}@localhost:{port}")
    # One file says whom a client trusts, the proxy as well as what is behind it.
    trusted = files.directory / "trusted.pem"
    trusted.write_text(files.ca.read_text() + (files.directory / "services.pem").read_text())
    shown = tuple(str(files.directory / f"services-controller.{end}") for end in ("pem", "key"))
    place = f"https://amphora-1:{site.server_port}"
    with requests.Session() as session:
        session.cert = shown
        how = {"timeout": WAIT_S, "verify": str(trusted)}
        for _ in range(3):
            assert session.get(f"{place}/1.0/info", **how).text == "GET /1.0/info 0"
        put = session.put(f"{place}/1.0/config", data=bytes(MIB), **how)
        assert put.text == f"PUT /1.0/config {MIB}"
        session.cert = None
        session.close()
        with pytest.raises(requests.exceptions.ConnectionError):
            session.get(f"{place}/1.0/info", **how)  # the service's own word, not ours


def test_curl(world: Forwarding, files: Files) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as served:
        thread = threading.Thread(target=served.serve_forever, name="plain")
        thread.start()
        _, where = world.proxy("--users", str(files.users), *files.tls())
        port = where.rpartition(":")[2]
        trust = ("--proxy-cacert", str(files.ca))
        show = (
            "--proxy-cert",
            str(files.octavia.certificate),
            "--proxy-key",
            str(files.octavia.key),
        )
        words = ["curl", "--silent", "--show-error", "--proxytunnel", *trust, *show]
        words += ["--proxy", f"https://localhost:{port}", f"http://vm:{served.server_port}/a"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)
        served.shutdown()
        thread.join(WAIT_S)
    assert (done.stdout, done.stderr) == ("GET /a 0", "")


# ---------------------------------------------------------------- it is refused


@pytest.mark.parametrize(
    ("place", "headers", "status", "text"),
    [
        ("vm:80", (), 407, "show a certificate or a token"),
        ("vm:80", (basic("ci", "another-token-than-that"),), 407, "show a certificate or a token"),
        ("vm:80", (basic("narrow", TOKEN),), 407, "show a certificate or a token"),
        ("vm:80", ("Proxy-Authorization: Basic !",), 400, "expected Basic (NAME:TOKEN)"),
        ("vm:80", (basic("narrow", f"narrow-{TOKEN}"),), 403, "tcp:80: not among the targets of"),
        ("vm:22", (basic(),), 403, "forward tcp:22: denied by this host's policy, {policy}:2"),
        ("nobody:80", (basic(),), 404, "'nobody': this host has no such domain"),
        ("192.0.2.1:80", (basic(),), 404, "this host has no such domain"),
        ("vm:{free}", (basic(),), 502, "tcp:{free} in the guest: Connection refused"),
    ],
)
def test_who_is_refused_is_told_why(
    world: Forwarding, files: Files, place: str, headers: tuple[str, ...], status: int, text: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = str(taken.getsockname()[1])
    proxy, where = world.proxy("--users", str(files.tokens))
    answer = asked(where, request(place.replace("{free}", free), *headers))
    first, _, body = answer.partition("\r\n")
    said = text.replace("{policy}", str(world.policy)).replace("{free}", free)
    assert first.startswith(f"HTTP/1.1 {status} ") and said[:40] in first, answer
    assert said in body
    assert ("Proxy-Authenticate: Basic" in body) is (status == 407)
    wait_log(proxy, str(status), said)


def test_of_several_daemons_the_one_that_has_the_vm_is_heard(
    world: Forwarding, files: Files, server: Server
) -> None:
    here, nowhere = str(world.socket), str(world.directory / "nowhere.sock")
    for sockets in ((here, nowhere), (nowhere, here)):
        words = ("--socket", sockets[0], "--also", sockets[1])
        _, where = world.proxy("--users", str(files.tokens), *words)
        assert " 403 " in asked(where, request("vm:22", basic()))
        assert " 503 " in asked(where, request("nobody:80", basic()))  # it may be at the other
        with tunnel(where, f"vm:{server.target}", basic()):
            pass


def test_what_the_guest_does_not_allow_is_refused(directory: Path, files: Files) -> None:
    with Forwarding(directory, POLICY, "tcp:1") as world:
        _, where = world.proxy("--users", str(files.tokens))
        answer = asked(where, request("vm:80", basic()))
        assert answer.startswith("HTTP/1.1 403 ")
        assert "the owner of this guest does not allow it" in answer


def test_without_the_daemon(fresh: Forwarding, files: Files, server: Server) -> None:
    _, where = fresh.proxy("--users", str(files.tokens), "--look", "0.5")
    with tunnel(where, f"vm:{server.target}", basic()) as connected:
        fresh.host.kill()
        assert is_reset(connected)
    answer = asked(where, request(f"vm:{server.target}", basic()))
    assert answer.startswith("HTTP/1.1 503 ") and "vchan-host" in answer
    fresh.host.start()
    fresh.wait_ready()
    with tunnel(where, f"vm:{server.target}", basic()) as connected:
        connected.sendall(b"again")
        assert connected.recv(100) == b"again"


def test_a_certificate_of_somebody_elses(world: Forwarding, files: Files, server: Server) -> None:
    proxy, where = world.proxy("--users", str(files.users), *files.tls())
    with (
        pytest.raises((ssl.SSLError, ConnectionResetError)),
        shake_hands(where, files, files.stranger) as connected,
    ):
        connected.sendall(request(f"vm:{server.target}"))
        read_answer(connected)
    wait_log(proxy, "TLS")
    with shake_hands(where, files) as connected:  # none at all: a token would do
        connected.sendall(request(f"vm:{server.target}"))
        assert " 407 " in read_answer(connected)
    assert not server.connections


def test_where_nobody_has_a_token_a_certificate_is_a_must(world: Forwarding, files: Files) -> None:
    users = world.directory / "only"
    users.write_text("octavia certificate:octavia tcp:*\n")
    users.chmod(0o600)
    proxy, where = world.proxy("--users", str(users), *files.tls())
    with pytest.raises((ssl.SSLError, ConnectionResetError)), shake_hands(where, files) as made:
        made.sendall(request("vm:80"))
        read_answer(made)
    wait_log(proxy, "TLS")


def test_who_speaks_no_tls_where_it_is_spoken(world: Forwarding, files: Files) -> None:
    proxy, where = world.proxy("--users", str(files.users), *files.tls())
    with dial(where) as connected:
        connected.sendall(request("vm:80", basic()))
        assert is_over(connected)
    wait_log(proxy, "TLS")


# ---------------------------------------------------------------- it is abused


def impatient(**limits: float) -> tuple[str, ...]:
    """The command with other limits: a test is not to wait."""
    changes = "; ".join(f"clients.{name} = {value}" for name, value in limits.items())
    return (
        "-c",
        f"from vchan.cli.proxy import clients; {changes}; import vchan.cli as c; c.main()",
    )


@pytest.mark.parametrize("over_tls", [False, True])
def test_a_request_that_never_ends(
    world: Forwarding, files: Files, server: Server, over_tls: bool
) -> None:
    tls = files.tls() if over_tls else ()
    program = impatient(HEAD_S=1.0)
    users = files.users if over_tls else files.tokens
    proxy, where = world.proxy("--users", str(users), *tls, program=program)
    with dial(where) as slow:
        with contextlib.suppress(OSError):
            for byte in b"CONNECT vm:80 HTTP/1.1\r\n" + b"a: b\r\n" * 10_000:
                slow.sendall(bytes([byte]))
                if threading.Event().wait(0.05) or slow.recv(1, socket.MSG_DONTWAIT) == b"":
                    break
        assert is_over(slow)
    if not over_tls:
        wait_log(proxy, "no request in 1 s (HEAD_S)")
        with tunnel(where, f"vm:{server.target}", basic()):
            pass


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"CONNECT vm:80 HTTP/1.1\r\n" + b"a: b\r\n" * 65 + b"\r\n", 431),
        (b"CONNECT vm:80 HTTP/1.1\r\n" + b"a: b\r\n" * 100_000, 431),
        (b"CONNECT " + b"a" * (2 * HEAD_BYTES_MAX), 431),
        (b"\0" * (2 * HEAD_BYTES_MAX), 431),
        (b"GET http://vm/ HTTP/1.1\r\nHost: vm\r\n\r\n", 405),
        (b"CONNECT vm:80 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)
def test_floods_and_nonsense(world: Forwarding, files: Files, sent: bytes, status: int) -> None:
    _, where = world.proxy("--users", str(files.tokens))
    with dial(where) as connected:
        with contextlib.suppress(OSError):
            connected.sendall(sent)
        assert read_answer(connected).startswith(f"HTTP/1.1 {status} ")


def test_many_who_say_nothing_are_in_nobodys_way(
    world: Forwarding, files: Files, server: Server
) -> None:
    proxy, where = world.proxy("--users", str(files.tokens))
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(where)) for _ in range(UNPROVEN_MAX)]
        with tunnel(where, f"vm:{server.target}", basic()) as connected:
            connected.sendall(b"through")
            assert connected.recv(100) == b"through"
            assert is_over(silent[0])
            silent[-1].settimeout(0.1)
            with pytest.raises(TimeoutError):
                silent[-1].recv(1)
    wait_log(proxy, "others have shown nothing either (UNPROVEN_MAX)")


def test_who_is_refused_often_is_logged_seldom(world: Forwarding, files: Files) -> None:
    proxy, where = world.proxy("--users", str(files.tokens))
    for _ in range(300):
        asked(where, request("vm:80"))
    assert 50 <= len(proxy.log.read_text().splitlines()) < 200


def test_who_waits_for_an_answer_and_goes(world: Forwarding, files: Files, server: Server) -> None:
    """A VM that is known, in which nobody answers."""
    program = impatient(ANSWER_S=0.5)
    guest = world.guest.process
    assert guest is not None
    _, where = world.proxy("--users", str(files.tokens), program=program)
    guest.send_signal(signal.SIGSTOP)
    try:
        answer = asked(where, request(f"vm:{server.target}", basic()))
    finally:
        guest.send_signal(signal.SIGCONT)
    assert answer.startswith("HTTP/1.1 504 "), answer
    with tunnel(where, f"vm:{server.target}", basic()) as connected:
        connected.sendall(b"through")
        assert connected.recv(100) == b"through"


def test_at_the_end_the_guest_hears_of_it(fresh: Forwarding, files: Files, server: Server) -> None:
    proxy, where = fresh.proxy("--users", str(files.tokens))
    assert proxy.process is not None
    with tunnel(where, f"vm:{server.target}", basic()) as connected:
        proxy.process.send_signal(signal.SIGTERM)
        assert is_reset(connected)
        assert proxy.process.wait(WAIT_S) == EXIT_OK
    wait_log(fresh.guest, "ended before its end: the proxy was ended")


# ---------------------------------------------------------------- it does not start


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--listen", "127.0.0.1:0"), "anybody can connect to it: expected --users"),
        (
            ("--listen", "0.0.0.0:0", "--users", "{tokens}"),
            "is on a network: expected --certificate",
        ),
        (("--listen", "localhost:80"), "expected ADDRESS:PORT, or unix:/PATH"),
        (("--listen", "unix:proxy.sock"), "expected unix:/PATH"),
        (("--users", "{users}"), "has users with certificates: expected --client-ca"),
        (("--users", "/nowhere"), "cannot be read"),
        (("--key", "{users}"), "expected --certificate with it"),
        (("--certificate", "{users}", "--users", "{tokens}"), "no certificate with its key"),
        (("--users", "{open}"), "others can read or change it"),
        (("--names", "{bad}", "--listen", "unix:/tmp/x"), "{bad}:1: expected NAME"),
    ],
)
def test_wrong_words_are_one_line(
    files: Files, tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    made: dict[str, str] = {"users": str(files.users)}
    for name, mode, line in (
        ("tokens", 0o600, f"ci token:{TOKEN} tcp:*"),
        ("open", 0o644, f"ci token:{TOKEN} tcp:*"),
        ("bad", 0o644, "only-a-name"),
    ):
        path = tmp_path / name
        path.write_text(f"{line}\n")
        path.chmod(mode)
        made[name] = str(path)
    given = [word.format(**made) for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "vchan.cli", "proxy", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (done.returncode, done.stderr.count("\n")) == (EXIT_USAGE, 1)
    assert text.format(**made) in done.stderr
