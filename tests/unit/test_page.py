"""The status page: what it shows of what daemons say, that no word of others becomes an element,
and what the server answers to whom. tests/real/test_page.py looks at it with a browser."""

from __future__ import annotations

import contextlib
import copy
import html.parser
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rig.ports import claim_ports
from tests.unit.local_host import LocalHost
from tests.unit.watched import UUID, a_channel, daemon, detail, row
from vchan.errors import ConfigError
from vchan.host.ops import asking
from vchan.host.ops import page as served
from vchan.host.ops.asking import HostAnswers
from vchan.host.ops.page import CONNECTIONS_MAX, HEADERS, LOCAL_NAMES, Looks, PageServer, listen
from vchan.host.ops.status_page import (
    ADDRESSES_MAX,
    REFRESH_S,
    TEXT_CHARS_MAX,
    TOPICS_MAX,
    VM_ROWS_MAX,
    Look,
    page,
)

_NAMES = (
    "html head meta title style body h1 h2 p span bdi ul li b table thead tbody tr th td br code"
)
ELEMENTS = frozenset(re.findall(r"\w+", _NAMES))
ATTRIBUTES = {"class", "lang", "charset", "name", "content", "http-equiv"}
WAIT_S = 30.0


class Read(html.parser.HTMLParser):
    """A page as a browser has it: its elements, and its texts apart from the style."""

    def __init__(self, text: bytes) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self._style = False
        self.feed(text.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(self.texts)


with a_channel() as made:
    DAEMON, VM = daemon(made), detail(made)


def look(at_s: float = 0.0, rows: Any = None, vms: Any = None, **status: Any) -> Look:
    told = HostAnswers(
        {**DAEMON, **status}, [row()] if rows is None else rows, vms or {UUID: VM}, {}
    )
    return Look("/run/x.sock", at_s, told)


def read(*looks: tuple[Look | None, Look]) -> Read:
    return Read(page(looks))


# --- what is shown


def test_a_host_that_is_well() -> None:
    said = read((None, look()))
    for word in ("compute-1", "/run/x.sock", "libvirt", "broker", "policy", "3 rules", "Problems"):
        assert word in said.text
    assert "what to do" not in said.text
    assert f'content="{REFRESH_S}"' in page([(None, look())]).decode()


def test_a_daemon_that_does_not_answer_is_said_beside_one_that_does() -> None:
    gone = Look("/run/gone.sock", 1.0, None, "nobody listens there")
    said = read((None, gone), (None, look()))
    assert "/run/gone.sock" in said.text and "nobody listens there" in said.text
    assert "compute-1" in said.text


def test_problems_come_with_what_to_do() -> None:
    rows = [row("quarantined", "too many bytes")]
    said = read((None, look(rows=rows, broker="cannot be reached")))
    assert "too many bytes" in said.text and "vchan release VM" in said.text
    assert "cannot be reached" in said.text and "transport_url" in said.text
    assert said.text.index("transport_url") < said.text.index("too many bytes")


def test_servers_that_lose_their_channel_are_a_problem() -> None:
    said = read((None, look(rows=[{**row(), "loses_channel": "at the next hard reboot"}])))
    assert "1 VM loses its channel at the next hard reboot: vm" in said.text


def test_a_vm_that_cannot_be_told_of_is_a_problem() -> None:
    told = HostAnswers(daemon(), [row()], {}, {UUID: "InternalError: a bug"})
    assert "InternalError: a bug" in read((None, Look("s", 0.0, told))).text


def counted(**counters: int) -> dict[str, Any]:
    return {"totals": {**DAEMON["totals"], **counters}}


def test_rates_are_of_the_time_between_two_looks() -> None:
    before, now = look(10.0, **counted(requests=100)), look(20.0, **counted(requests=150))
    assert "5.0 /s" in read((before, now)).text
    assert "/s" not in read((None, now)).text
    began_anew = look(20.0, **counted(requests=7))
    shown = read((before, began_anew)).text
    assert "- Requests into guests" in shown and "0.0 /s Requests out of" in shown


def test_losses_are_told() -> None:
    said = read((None, look(**counted(losses=3, frames_lost=12345, frames_resent=9)))).text
    assert "3 Losses detected and repaired" in said
    assert "12,345 Frames lost in them" in said and "9 Frames sent again" in said


def test_a_vms_own_rates() -> None:
    def at(at_s: float, requests: int, asked: int) -> Look:
        vm = copy.deepcopy(VM)
        vm["requests"]["requests"] = requests
        vm["requests"]["from_guest"]["guest_requests"] = asked
        vm["requests"]["open"], vm["backlog_bytes"], vm["session"]["losses"] = 4, 5000, 6
        return look(at_s, vms={UUID: vm})

    said = read((at(0.0, 10, 0), at(2.0, 31, 5)))
    assert "10.5 /s 2.5 /s 4 5,000 B 6" in said.text
    moved = read((look(0.0, vms={"other": VM}), at(2.0, 31, 5)))
    assert "- - 4 5,000 B 6" in moved.text


def test_a_vm_without_a_channel_has_no_numbers() -> None:
    said = read((None, look(rows=[row("none")], vms={UUID: {"state": "none"}})))
    assert "none" in said.text and "0 B" not in said.text


def test_many_vms_are_cut_and_said_and_those_with_problems_are_shown() -> None:
    rows = [{**row(), "uuid": f"u{number}", "name": f"a{number}"} for number in range(1200)]
    rows.append({**row("refused"), "uuid": "bad", "name": "zzz"})
    said = read((None, look(rows=rows, vms={"other": VM})))
    assert f"{1201 - VM_ROWS_MAX} more VMs are not shown here" in said.text
    assert said.texts.count("zzz") == 2  # among the problems, and first among the VMs
    assert said.elements.count("tr") < VM_ROWS_MAX + 10


def test_many_topics_are_cut_and_said() -> None:
    rows = [{**row(), "topics": [f"openstack/t{number}" for number in range(TOPICS_MAX + 3)]}]
    said = read((None, look(rows=rows)))
    assert f"openstack/t{TOPICS_MAX - 1}" in said.text and "and 3 more" in said.text
    assert f"openstack/t{TOPICS_MAX}" not in said.text


def test_what_guests_report() -> None:
    addresses = [f"2001:db8::{number}" for number in range(1, ADDRESSES_MAX + 3)]
    ready = {"phase": "ready", "os": "Debian GNU/Linux 12", "addresses": addresses}
    silent: dict[str, Any] = {
        "phase": None,
        "hostname": None,
        "os": None,
        "addresses": [],
        "agents_failed": [],
    }
    rows = [{**row(), "guest": guest} for guest in (ready, silent, None)]
    said = read((None, look(rows=rows)))
    assert "guest, as it says" in said.text
    assert set(addresses[:ADDRESSES_MAX]) <= set(said.texts)
    assert " and 2 more" in said.texts and addresses[-1] not in said.texts
    assert said.texts.count("Debian GNU/Linux 12") == 1 and "None" not in said.text


# --- no word of others becomes an element

ODD = [
    "<script>document.title='owned'</script>",
    "</style><script>1</script>",
    "</title></head><body onload=alert(1)>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg/onload=alert(1)>",
    "<!--", "-->", "<![CDATA[", "]]>", "<?x ?>", "&lt;b&gt;&#60;b&#62;&amp", "\x00<b>\x00",
    "a\u202eb\u2066c", "\ud800<b>", "{{7*7}}${7*7}", "javascript:alert(1)", "\r\nSet-Cookie: a=b",
]  # fmt: skip
WORDS = st.one_of(st.sampled_from(ODD), st.text(max_size=40), st.from_regex(r"[<>&\"'/ a-z]{1,30}"))


def plain(word: str) -> str:
    """A word as it is to be read on the page."""
    return "".join(c if c.isprintable() else "?" for c in word)


PLACES = (
    *("name", "problem", "domain", "channel", "uuid", "topics"),
    *("guest phase", "guest os", "guest addresses"),
)


@given(word=WORDS, place=st.sampled_from(PLACES))
def test_a_vms_words_stay_words(word: str, place: str) -> None:
    group, _, name = place.rpartition(" ")
    at = {name: [word] if name in ("topics", "addresses") else word}
    told = {**row("quarantined"), **({group: at} if group else at)}
    said = read((None, look(rows=[told], vms={"other": VM})))
    assert_words(said, word)


@given(
    word=WORDS, place=st.sampled_from(["host", "version", "libvirt", "policy_problem", "policy"])
)
def test_a_daemons_words_stay_words(word: str, place: str) -> None:
    assert_words(read((None, look(0.0, **{place: word}))), word)


@given(word=WORDS)
def test_other_words_stay_words(word: str) -> None:
    assert_words(read((None, Look(word, 0.0, None, word))), word)
    vm = {**copy.deepcopy(VM), "broker_problems": [word], "fault": word}
    vm["requests"]["denied_topics"] = [word]
    assert_words(read((None, look(vms={UUID: vm}))), word)
    untold = HostAnswers(daemon(), [row()], {}, {UUID: word})
    assert_words(read((None, Look("s", 0.0, untold))), word)


def assert_words(said: Read, word: str) -> None:
    assert set(said.elements) <= ELEMENTS
    assert said.attributes <= ATTRIBUTES
    assert said.elements.count("style") == said.elements.count("title") == 1
    assert plain(word) in "".join(said.texts)


def test_a_long_word_is_cut() -> None:
    said = read((None, look(rows=[row("waiting", "x" * 5000)], vms={"other": VM})))
    assert max(map(len, said.texts)) <= TEXT_CHARS_MAX
    assert "x…" in said.text


# --- the server


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("p")


@pytest.fixture
def host(directory: Path) -> Iterator[LocalHost]:
    with a_channel() as channel, LocalHost(directory / "host.sock") as host:
        host.status.update(daemon(channel))
        host.status.update(detail(channel))
        yield host


@contextlib.contextmanager
def serving(where: str, *sockets: Path) -> Iterator[PageServer]:
    listening, names = listen(where)
    with PageServer(listening, Looks([str(path) for path in sockets]), names) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(WAIT_S)


@pytest.fixture
def port(host: LocalHost, directory: Path) -> Iterator[int]:
    (number,) = claim_ports(1)
    with serving(f"127.0.0.1:{number}", directory / "host.sock"):
        yield number


def ask(port: int, method: str = "GET", path: str = "/", **headers: str) -> tuple[int, str, Any]:
    """(status, body, headers) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def test_the_page_is_served(port: int) -> None:
    status, text, headers = ask(port)
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "compute-1" in Read(text.encode()).text
    assert ask(port, path="/?x=1")[0] == 200
    status, text, _ = ask(port, "HEAD")
    assert (status, text) == (200, "")


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/", "", 200),
        ("GET", "/favicon.ico", "", 404),
        ("GET", "/../etc/passwd", "", 404),
        ("POST", "/", "", 405),
        ("OPTIONS", "/", "", 405),
        ("DELETE", "/", "", 405),
        ("<B>", "/<b>", "", 405),
        ("GET", "/", "evil.example", 421),
        ("GET", "/", "evil.example:9178", 421),
        ("GET", "/", "127.0.0.1.evil.example", 421),
        ("GET", "/", "localhost:9999", 200),
        ("GET", "/", "LOCALHOST", 200),
        ("GET", "/", "[::1]:9178", 200),
    ],
)
def test_every_answer_has_the_headers_and_repeats_nothing(
    port: int, method: str, path: str, host: str, status: int
) -> None:
    found, text, headers = ask(port, method, path, **({"Host": host} if host else {}))
    assert found == status
    for name, value in HEADERS.items():
        assert headers[name] == value
    if status != 200:
        assert headers["Content-Type"] == "text/plain; charset=utf-8"
        assert "<" not in text and "evil" not in text and "Python" not in str(headers)


def test_what_the_policy_of_the_page_allows() -> None:
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy and "script-src" not in policy


@pytest.mark.parametrize("sent", [b"\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b""])
def test_requests_that_are_none(port: int, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as peer:
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
        said = peer.makefile("rb").read()
    assert b" 200 " not in said
    assert ask(port)[0] == 200


def test_a_unix_socket_is_for_its_owner_and_group(host: LocalHost, directory: Path) -> None:
    path = directory / "page.sock"
    with serving(f"unix:{path}", directory / "host.sock"):
        assert path.stat().st_mode & 0o777 == 0o660
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(WAIT_S)
            peer.connect(str(path))
            peer.sendall(b"GET / HTTP/1.1\r\nHost: status.example.org\r\n\r\n")
            assert peer.makefile("rb").readline() == b"HTTP/1.0 200 OK\r\n"


def test_daemons_are_asked_once_for_many_looks(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    really = asking.ask

    def counting(*args: Any, **names: Any) -> HostAnswers:
        asked.append(args)
        return really(*args, **names)

    monkeypatch.setattr(served, "ask", counting)
    for _ in range(5):
        assert ask(port)[0] == 200
    assert len(asked) == 1
    monkeypatch.setattr(served, "LOOK_S", 0.0)
    assert "0.0 /s" in ask(port)[1]
    assert len(asked) == 2


def test_a_daemon_that_is_gone_is_said_and_comes_back(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "LOOK_S", 0.0)
    (number,) = claim_ports(1)
    with serving(f"127.0.0.1:{number}", directory / "host.sock"):
        status, text, _ = ask(number)
        assert status == 200 and "no answer" in text
        with a_channel() as channel, LocalHost(directory / "host.sock") as host:
            host.status.update(daemon(channel))
            host.status.update(detail(channel))
            assert "compute-1" in ask(number)[1]
        assert "no answer" in ask(number)[1]


def test_a_bug_costs_one_answer(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(served, "page", lambda _: 1 / 0)
        status, text, headers = ask(port)
    assert (status, headers["X-Frame-Options"]) == (500, "DENY")
    assert "ZeroDivisionError" in caplog.text and "ZeroDivisionError" not in text
    assert ask(port)[0] == 200


def test_connections_are_bounded(port: int, caplog: pytest.LogCaptureFixture) -> None:
    held = [socket.create_connection(("127.0.0.1", port), WAIT_S) for _ in range(CONNECTIONS_MAX)]
    try:
        with socket.create_connection(("127.0.0.1", port), WAIT_S) as one_more:
            assert one_more.recv(1) == b""
        assert "one more was closed" in caplog.text
    finally:
        for peer in held:
            peer.close()
    for _ in range(int(WAIT_S / 0.05)):
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert ask(port)[0] == 200
            break
        threading.Event().wait(0.05)
    else:
        pytest.fail("connections that are closed are still counted")


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("0.0.0.0:9178", "not loopback"),
        ("[::]:9178", "not loopback"),
        ("192.0.2.1:9178", "not loopback"),
        ("localhost:9178", "expected ADDRESS:PORT"),
        ("127.0.0.1", "expected ADDRESS:PORT"),
        ("127.0.0.1:0", "expected ADDRESS:PORT"),
        ("127.0.0.1:70000", "expected ADDRESS:PORT"),
        ("127.0.0.1:x", "expected ADDRESS:PORT"),
        (":9178", "expected ADDRESS:PORT"),
        ("", "expected ADDRESS:PORT"),
        ("unix:", "expected unix:/PATH"),
        ("unix:page.sock", "expected unix:/PATH"),
        ("unix:/nonexistent/page.sock", "no directory"),
    ],
)
def test_where_it_does_not_listen(where: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        listen(where)


def test_an_address_that_is_taken(port: int) -> None:
    with pytest.raises(ConfigError, match="Address already in use"):
        listen(f"127.0.0.1:{port}")


def test_loopback_of_ipv6() -> None:
    (number,) = claim_ports(1)
    try:
        listening, names = listen(f"[::1]:{number}")
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
    listening.close()
    assert names == LOCAL_NAMES


def test_the_program(host: LocalHost, directory: Path) -> None:
    (number,) = claim_ports(1)
    command = [sys.executable, "-m", "vchan.host.ops.page"]
    options = ["--listen", f"127.0.0.1:{number}", "--socket", str(directory / "host.sock")]
    process = subprocess.Popen([*command, *options], env={**os.environ})
    try:
        for _ in range(int(WAIT_S / 0.05)):
            with contextlib.suppress(OSError):
                assert "compute-1" in ask(number)[1]
                break
            threading.Event().wait(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
    refused = subprocess.run(
        [*command, "--listen", "0.0.0.0:1"], capture_output=True, text=True, timeout=WAIT_S
    )
    assert refused.returncode == served.EXIT_CONFIG
    assert refused.stderr.startswith("vchan-page: --listen 0.0.0.0:1: is not loopback")
