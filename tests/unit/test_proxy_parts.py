"""What `vchan proxy` is made of, part by part: the requests it takes and those it does not, who is
who, what names mean, and listeners that systemd has opened."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vchan.cli.proxy.users import TOKEN_CHARS_MIN, USERS_MAX, Meant, Names, Users, names_of
from vchan.cli.proxy.wire import (
    HEAD_BYTES_MAX,
    HEADERS_MAX,
    REASON_CHARS_MAX,
    BadConnect,
    ConnectParser,
    ConnectRequest,
    Presented,
    encode_refusal,
)
from vchan.errors import ConfigError
from vchan.io.activation import take_listener
from vchan.io.targets import Target

TOKEN = "t" * TOKEN_CHARS_MIN


def parse(sent: bytes) -> ConnectRequest | None:
    return ConnectParser().feed(sent)


def head(*headers: str, line: str = "CONNECT vm:80 HTTP/1.1") -> bytes:
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1")


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("line", "name", "port"),
    [
        ("CONNECT vm:80 HTTP/1.1", "vm", 80),
        ("CONNECT Instance-0000000A:9443 HTTP/1.0", "instance-0000000a", 9443),
        ("CONNECT 192.0.2.1:65535 HTTP/1.1", "192.0.2.1", 65535),
        ("CONNECT [2001:DB8:0:0::1]:1 HTTP/1.1", "2001:db8::1", 1),
        ("CONNECT 0a9e0000-0000-4000-8000-00000000000a:80 HTTP/1.1", None, 80),
    ],
)
def test_what_is_asked_for(line: str, name: str | None, port: int) -> None:
    asked = parse(head(line=line))
    assert asked is not None
    assert asked.name == (name or line.split()[1].rpartition(":")[0])
    assert (asked.port, asked.presented, asked.rest) == (port, None, b"")


@given(st.binary(max_size=300), st.lists(st.integers(1, 20), max_size=30))
def test_however_it_is_cut_it_is_the_same(rest: bytes, sizes: list[int]) -> None:
    """And what is behind the head is never looked at."""
    sent = head("Host: vm:80", "User-Agent: x") + rest
    parser = ConnectParser()
    at, asked = 0, None
    for size in sizes:
        if asked is None:
            asked = parser.feed(sent[at : at + size])
            at += size
    if asked is None:
        asked = parser.feed(sent[at:])
        at = len(sent)
    assert asked is not None
    assert asked._replace(rest=b"") == ConnectRequest("vm", 80, None, b"")
    assert asked.rest + sent[at:] == rest


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (head(line="GET / HTTP/1.1"), 405),
        (head(line="GET http://vm/ HTTP/1.1"), 405),
        (head(line="PRI * HTTP/2.0"), 400),
        (head(line="CONNECT vm:80 HTTP/2.0"), 400),
        (head(line="CONNECT vm:80"), 400),
        (head(line="connect vm:80 HTTP/1.1"), 400),
        (head(line="CONNECT  vm:80 HTTP/1.1"), 400),
        (head(line="CONNECT vm HTTP/1.1"), 400),
        (head(line="CONNECT vm:0 HTTP/1.1"), 400),
        (head(line="CONNECT vm:65536 HTTP/1.1"), 400),
        (head(line="CONNECT vm:080 HTTP/1.1"), 400),
        (head(line="CONNECT user@vm:80 HTTP/1.1"), 400),
        (head(line="CONNECT vm:80/path HTTP/1.1"), 400),
        (head(line="CONNECT 2001:db8::1:80 HTTP/1.1"), 400),
        (head(line=f"CONNECT {'a' * 256}:80 HTTP/1.1"), 400),
        (head("Transfer-Encoding: chunked"), 400),
        (head("Content-Length: 5"), 400),
        (head("Content-Length: +0"), 400),
        (head("Content-Length: 0", "Content-Length: 5"), 400),
        (head("Host: other:80"), 400),
        (head("Host: vm", "Host: vm"), 400),
        (head("Proxy-Authorization: Bearer a", "Proxy-Authorization: Bearer b"), 400),
        (head("Proxy-Authorization: Digest x"), 400),
        (head("Proxy-Authorization: Bearer"), 400),
        (head("Proxy-Authorization: Basic bm9jb2xvbg=="), 400),
        (head("A: b", " folded"), 400),
        (head("A : b"), 400),
        (head("no colon"), 400),
        (head("A: b\nB: c"), 400),
        (head("A: b\rB: c"), 400),
        (head("A: \0"), 400),
        (b"CONNECT vm:80 HTTP/1.1\nHost: vm\n\n" + head(), 400),
        (head(*["A: b"] * (HEADERS_MAX + 1)), 431),
        (b"C" * (HEAD_BYTES_MAX + 1), 431),
        (head(f"A: {'b' * HEAD_BYTES_MAX}"), 431),
    ],
)
def test_what_is_no_request_that_is_served(sent: bytes, status: int) -> None:
    with pytest.raises(BadConnect) as refused:
        parse(sent)
    assert refused.value.status == status


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: vm:80",),
        ("host:VM:80",),
        ("Host: vm",),
        ("Content-Length: 0",),
        ("Proxy-Connection: keep-alive", "X: a", "X: b"),
    ],
)
def test_what_clients_send_all_the_same(headers: tuple[str, ...]) -> None:
    assert parse(head(*headers)) == ConnectRequest("vm", 80, None, b"")


def test_a_host_that_is_an_address() -> None:
    line = "CONNECT [2001:db8::1]:80 HTTP/1.1"
    for host in ("[2001:db8::1]:80", "[2001:DB8::1]", "2001:db8::1"):
        asked = parse(head(f"Host: {host}", line=line))
        assert asked is not None and asked.name == "2001:db8::1"


@given(st.binary(max_size=2000))
def test_nothing_that_is_sent_raises_anything_else(sent: bytes) -> None:
    with contextlib.suppress(BadConnect):
        parse(sent + b"\r\n\r\n")


@pytest.mark.parametrize(
    ("text", "presented"),
    [
        ("Bearer abc", Presented("", "abc")),
        ("bearer  abc", Presented("", "abc")),
        ("Basic " + base64.b64encode(b"ci:a:b").decode(), Presented("ci", "a:b")),
        ("BASIC " + base64.b64encode(b":abc").decode(), Presented("", "abc")),
    ],
)
def test_what_is_shown(text: str, presented: Presented) -> None:
    asked = parse(head(f"Proxy-Authorization: {text}"))
    assert asked is not None and asked.presented == presented


def test_a_refusal_is_one_line_whatever_a_guest_says() -> None:
    detail = "bad\r\nX: y\x1b[31m" + "é" * 300
    first, _, rest = encode_refusal(502, detail).partition(b"\r\n")
    assert first.startswith(b"HTTP/1.1 502 Bad Gateway: bad??X: y?[31m")
    assert len(first) <= REASON_CHARS_MAX + 40
    headers, _, body = rest.partition(b"\r\n\r\n")
    assert b"\r\nX: y" not in headers
    assert f"Content-Length: {len(body)}".encode() in headers


# ---------------------------------------------------------------- users


def users(*lines: str) -> Users:
    return Users("\n".join(lines), "users")


def test_who_is_who() -> None:
    known = users(
        f"ci token:{TOKEN} tcp:80",
        "octavia certificate:Worker.ctl tcp:9443,unix:/run/*  # it",
        "",
        "# nobody",
        f"other token:other-{TOKEN} tcp:*",
    )
    assert known.have_tokens and known.have_certificates
    ci, other = (
        known.by_token(Presented("", TOKEN)),
        known.by_token(Presented("other", f"other-{TOKEN}")),
    )
    assert ci is not None and other is not None and (ci.name, other.name) == ("ci", "other")
    assert known.by_token(Presented("other", TOKEN)) is None
    assert known.by_token(Presented("ci", "")) is None
    octavia = known.by_certificate(["x", "worker.CTL"])
    assert octavia is not None and octavia.name == "octavia"
    assert known.by_certificate(["worker.ctl.example", ""]) is None
    assert octavia.allowed.allows(Target("unix", "/run/a"))
    assert not octavia.allowed.allows(Target("tcp", "80"))


def test_a_user_with_a_token_has_no_certificate() -> None:
    """An empty name in a certificate is nobody's."""
    assert users(f"ci token:{TOKEN} tcp:80").by_certificate([""]) is None


def test_any_that_the_ca_has_signed() -> None:
    anybody = users("all certificate:* tcp:80").by_certificate([])
    assert anybody is not None and anybody.name == "all"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("ci", "expected NAME, certificate:NAME or token:TOKEN, and TARGETS"),
        (f"ci token:{TOKEN}", "expected NAME"),
        (f"ci token:{TOKEN} tcp:80 more", "expected NAME"),
        (f"c/i token:{TOKEN} tcp:80", "is no name"),
        ("ci token: tcp:80", "expected certificate:NAME or token:TOKEN"),
        ("ci password:x tcp:80", "expected certificate:NAME or token:TOKEN"),
        ("ci token:short tcp:80", f"expected {TOKEN_CHARS_MIN} characters"),
        (f"ci token:{TOKEN} udp:80", "expected tcp:PORT"),
    ],
)
def test_wrong_lines_of_users(line: str, text: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        users("# users", line)
    assert wrong.value.where == "users:2"
    assert text in str(wrong.value)
    assert TOKEN not in str(wrong.value)


def test_no_more_users_than_that() -> None:
    lines = [f"u{number} token:{TOKEN}{number} tcp:80" for number in range(USERS_MAX)]
    users(*lines)
    with pytest.raises(ConfigError, match="USERS_MAX"):
        users(*lines, f"one token:{TOKEN} tcp:80")


def test_names_of_a_certificate() -> None:
    certificate = {
        "subject": ((("countryName", "CH"),), (("commonName", "worker"),)),
        "subjectAltName": (("DNS", "worker.ctl"), ("IP Address", "192.0.2.1"), ("URI", "x:y")),
    }
    assert names_of(certificate) == ["worker", "worker.ctl", "x:y"]
    assert names_of({}) == []


# ---------------------------------------------------------------- names


def test_what_names_mean() -> None:
    names = Names("192.0.2.7 vm1\nShop:80 vm2 unix:/run/a\nshop vm3\n[2001:DB8::1] vm4\n", "names")
    assert names.meant("192.0.2.7", 9443) == Meant("vm1", Target("tcp", "9443"))
    assert names.meant("shop", 80) == Meant("vm2", Target("unix", "/run/a"))
    assert names.meant("shop", 81) == Meant("vm3", Target("tcp", "81"))
    assert names.meant("2001:db8::1", 1) == Meant("vm4", Target("tcp", "1"))
    assert names.meant("vm9", 1) == Meant("vm9", Target("tcp", "1"))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("one", "expected NAME or NAME:PORT, a VM"),
        ("one vm tcp:80 more", "expected NAME"),
        ("one:x vm", "expected NAME"),
        ("one vm 80", "expected tcp:PORT"),
        ("first vm", "stands in the file already"),
    ],
)
def test_wrong_lines_of_names(line: str, text: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        Names(f"first vm\n{line}\n", "names")
    assert wrong.value.where == "names:2"
    assert text in str(wrong.value)


# ---------------------------------------------------------------- what systemd hands over


def test_nothing_was_handed_to_us() -> None:
    for environment in (
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"},
        {"LISTEN_FDS": "1"},
    ):
        assert take_listener(environment) is None
        assert environment == {}


_TAKE = """
import json, os, sys
from vchan.errors import ConfigError
from vchan.io.activation import take_listener
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    taken = take_listener()
except ConfigError as error:
    print(json.dumps(str(error)))
else:
    blocks, inherits = taken.getblocking(), os.get_inheritable(taken.fileno())
    print(json.dumps([taken.getsockname()[1], blocks, inherits, "LISTEN_FDS" in os.environ]))
"""


def handed(*sockets: socket.socket, count: int | None = None) -> object:
    """What a process says to which these are handed over."""
    number = len(sockets) if count is None else count
    copies = [os.dup(each.fileno()) for each in sockets]

    def arrange() -> None:
        for place, copy in enumerate(copies, 3):
            os.dup2(copy, place)

    try:
        done = subprocess.run(
            [sys.executable, "-c", _TAKE],
            env={**os.environ, "LISTEN_FDS": str(number)},
            cwd=Path(__file__).parents[2],
            pass_fds=range(3, 3 + len(sockets)),
            preexec_fn=arrange,
            capture_output=True,
            timeout=60,
        )
    finally:
        for copy in copies:
            os.close(copy)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_a_listener_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert handed(listener) == [listener.getsockname()[1], False, False, False]


def test_what_else_is_handed_over_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert "LISTEN_FDS=2: expected one socket" in str(handed(listener, listener))
    with socket.socket() as unbound:
        assert "is no listening stream socket" in str(handed(unbound))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        assert "is no listening stream socket" in str(handed(datagrams))
