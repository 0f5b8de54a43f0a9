"""The local socket: clients and a daemon on real sockets."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.unit.local_host import LocalHost
from tests.unit.owned import touches_recorded
from vchan.client import Client
from vchan.errors import (
    AgentGone,
    CallTimeout,
    ConfigError,
    LimitExceeded,
    LinkDown,
    NoSuchAgent,
    NoSuchDomain,
    PortAbsent,
    Rejected,
    RemoteError,
)
from vchan.io import local_socket as server_module
from vchan.io import streams
from vchan.io.access import Credentials
from vchan.io.link import Link
from vchan.io.local_socket import LocalServer
from vchan.io.loop import Loop
from vchan.io.streams import connect_unix
from vchan.rpc.messages import CALL, FAILURE, Reply, Request, Subscribe, Topic, decode, encode
from vchan.session import Config, Event, Opened, Received, Role, Session

WAIT_S = 30.0


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name) / "host.sock"


@pytest.fixture
def host(path: Path) -> Iterator[LocalHost]:
    with LocalHost(path) as host:
        yield host


@pytest.fixture
def client(host: LocalHost, path: Path) -> Iterator[Client]:
    with Client(str(path)) as client:
        yield client


def wait(reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_call_is_answered(client: Client) -> None:
    args = {"x": 1, "text": "ä€", "list": [None, True, 1.5]}
    assert client.call("agent", "echo", args, server="vm") == args
    client.cast("agent", "echo", args, server="vm")


@pytest.mark.parametrize(
    ("topic", "method", "server", "error", "text"),
    [
        ("agent", "fail", "vm", RemoteError, "ValueError: as asked"),
        ("agent", "gone", "vm", AgentGone, "went away"),
        ("agent", "move", "vm", AgentGone, "migrated"),
        ("agent", "nonsense", "vm", RemoteError, "not JSON"),
        ("other", "echo", "vm", NoSuchAgent, "no agent serves topic openstack/other"),
        ("agent", "echo", "nobody", NoSuchDomain, "'nobody': this host has no such domain"),
        ("agent", "echo", "off", Rejected, "vchan attach off"),
        ("vchan.host", "dance", "", RemoteError, "NoSuchMethod: .*no method 'dance'"),
        ("vchan.host", "attach", "", RemoteError, "TypeError: .*'vm'"),
    ],
)
def test_a_failure_says_what_happened(
    client: Client, topic: str, method: str, server: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        client.call(topic, method, server=server, timeout_s=30)


@pytest.mark.parametrize("vm", [[], {}, 5, True])
def test_a_wrong_argument_is_named(client: Client, vm: object) -> None:
    with pytest.raises(RemoteError, match="TypeError: argument 'vm': expected a text"):
        client.call("vchan.host", "attach", {"vm": vm}, timeout_s=WAIT_S)


@pytest.mark.parametrize("bug", [KeyError("inside"), TypeError("inside"), ValueError("inside")])
def test_a_bug_in_a_method_is_no_word_about_the_request(
    host: LocalHost, client: Client, caplog: pytest.LogCaptureFixture, bug: Exception
) -> None:
    """It is not "no such method", nor "wrong arguments"; and it is in the log, where it was."""
    host.bug = bug
    with pytest.raises(RemoteError, match=r"InternalError: .*'broken'.*log"):
        client.call("vchan.host", "broken", timeout_s=WAIT_S)
    assert "Traceback" in caplog.text
    assert "inside" in caplog.text
    assert client.call("vchan.host", "list", timeout_s=WAIT_S)


def test_a_method_that_is_answered_later(client: Client) -> None:
    with pytest.raises(RemoteError, match="Rejected: vm: no controller"):
        client.call("vchan.host", "attach", {"vm": "vm"})


def test_a_clients_connection_is_touched_by_its_own_thread_alone(
    host: LocalHost, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with touches_recorded(monkeypatch) as strays, Client(str(path)) as client:
        assert client.call("agent", "echo", {"n": 1}, server="vm", timeout_s=WAIT_S) == {"n": 1}
        client.cast("agent", "echo", server="vm", timeout_s=WAIT_S)
    assert strays == []


def test_many_calls_of_many_threads(client: Client) -> None:
    def call(number: int) -> Any:
        return client.call("agent", "echo", {"n": number}, server="vm", timeout_s=30)["n"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(call, range(1000))) == list(range(1000))


def test_a_call_that_is_not_answered_in_time_is_withdrawn(host: LocalHost, client: Client) -> None:
    with pytest.raises(CallTimeout):
        client.call("agent", "sleep", server="vm", timeout_s=0.2)
    wait(lambda: host.cancelled == [host.requests[0].id])
    assert client.call("agent", "echo", server="vm") == {}


def test_waiting_for_the_daemon_is_a_part_of_a_calls_time(host: LocalHost, client: Client) -> None:
    client.call("agent", "echo", server="vm", timeout_s=WAIT_S)
    client._ready.clear()  # as when the connection was lost
    threading.Timer(0.5, client._ready.set).start()
    client.call("agent", "echo", server="vm", timeout_s=20)
    assert host.requests[-1].timeout_ms <= 19_600  # the call may begin a little after the timer


def test_who_goes_away_waits_no_more(host: LocalHost, path: Path) -> None:
    with Client(str(path)) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.call, "agent", "sleep", server="vm", timeout_s=3600)
        wait(lambda: len(host.requests) == 1)
        client.close()
        wait(lambda: host.cancelled == [host.requests[0].id])
        assert isinstance(asked.exception(WAIT_S), CallTimeout)
        with pytest.raises(LinkDown, match="closed"):
            client.call("agent", "echo", server="vm", timeout_s=3600)
    assert len(host.requests) == 1


def test_a_client_of_the_process_before_a_fork_is_not_used(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is not there, and its descriptors are the other process's, too."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(LinkDown, match="before this process was forked"):
            client.call("agent", "echo", server="vm", timeout_s=3600)
    assert client.call("agent", "echo", server="vm", timeout_s=WAIT_S) == {}


def test_a_clients_thread_that_dies_is_not_waited_for(
    host: LocalHost, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    with Client(str(path)) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.call, "agent", "sleep", server="vm", timeout_s=3600)
        wait(lambda: len(host.requests) == 1)
        client._loop.call_soon_threadsafe(lambda: 1 / 0)
        assert isinstance(asked.exception(WAIT_S), CallTimeout)
        with pytest.raises(LinkDown, match="ended"):
            client.call("agent", "echo", server="vm", timeout_s=3600)
    assert len(seen) == 1


def test_over_the_limit_nothing_is_sent_and_nothing_else_suffers(
    host: LocalHost, client: Client
) -> None:
    with pytest.raises(LimitExceeded, match=r"over the limit of 4194304 \(MESSAGE_BYTES_MAX\)"):
        client.call("agent", "echo", {"x": "y" * (4 << 20)}, server="vm", timeout_s=30)
    assert host.requests == []
    almost = "y" * ((4 << 20) - 1000)
    assert client.call("agent", "echo", {"x": almost}, server="vm") == {"x": almost}
    with pytest.raises(LimitExceeded, match="NAME_BYTES_MAX"):
        client.call("t" * 256, "echo", server="vm")
    with pytest.raises(ConfigError, match="timeout_s"):
        client.call("agent", "echo", server="vm", timeout_s=0)


def test_an_answer_over_the_limit_is_a_failure(host: LocalHost, client: Client) -> None:
    # The request fits; the answer, with more around it, does not.
    args = {"x": "y" * ((4 << 20) - 150)}
    try:
        client.call("agent", "echo", args, server="vm", timeout_s=30)
    except (LimitExceeded, RemoteError) as error:
        assert "MESSAGE_BYTES_MAX" in str(error)
    assert client.call("agent", "echo", server="vm") == {}


def test_a_daemon_that_comes_back_is_found_again(path: Path) -> None:
    with LocalHost(path):
        client = Client(str(path))
        assert client.call("agent", "echo", server="vm") == {}
    with pytest.raises((LinkDown, CallTimeout)):
        client.call("agent", "echo", server="vm", timeout_s=0.3)
    with LocalHost(path):
        assert client.call("agent", "echo", {"x": 1}, server="vm") == {"x": 1}
    client.close()


def test_no_daemon(path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(PortAbsent):
        Client(str(path))
    assert threading.active_count() == before


def test_a_daemon_that_stands_still(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with Client(str(path)) as client, pytest.raises(LinkDown, match="does not answer"):
            client.call("agent", "echo", timeout_s=0.2)


def test_garbage_and_strangers_harm_nobody(host: LocalHost, client: Client, path: Path) -> None:
    for _ in range(5):
        stranger = connect_unix(str(path))
        stranger.write(os.urandom(50_000))
        stranger.close()
    assert client.call("agent", "echo", server="vm") == {}


def test_too_many_connections(
    host: LocalHost, client: Client, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.call("vchan.host", "list")
    monkeypatch.setattr(server_module, "PEERS_MAX", 1)
    other = connect_unix(str(path))
    wait(lambda: any("PEERS_MAX" in line for line in host.log))
    other.close()
    assert client.call("agent", "echo", server="vm") == {}


def test_no_descriptor_left(
    host: LocalHost, client: Client, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon goes on, and accepts who waits when it can."""
    acceptor = host.server._acceptor
    listener = acceptor._listener

    class Exhausted:
        def accept(self) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        def fileno(self) -> int:
            return listener.fileno()

    client.call("vchan.host", "list")
    monkeypatch.setattr(streams, "ACCEPT_RETRY_S", 0.05)
    acceptor._listener = Exhausted()  # type: ignore[assignment]
    other = connect_unix(str(path))
    wait(lambda: any("cannot accept" in line for line in host.log))
    assert client.call("agent", "echo", server="vm") == {}
    acceptor._listener = listener
    with Client(str(path)) as late:
        assert late.call("agent", "echo", server="vm") == {}
    other.close()


def test_a_program_that_takes_little_is_told_so(host: LocalHost, path: Path) -> None:
    """Its limits are its own: they must not end the daemon."""
    small = Config(Role.GUEST, os.urandom(16), "small", message_bytes_max=64 * 1024)
    # 1e5 comes back as 100000.0: more than it takes
    body = b'{"method":"echo","args":{"x":[' + b"1e5," * 9000 + b"1]}}"
    request = Request(os.urandom(16), CALL, 5000, 0, "openstack", "agent", "vm", body)
    got: list[bytes] = []
    with Loop() as loop:
        session = Session(small, os.urandom)

        def told(event: Event) -> None:
            match event:
                case Opened():
                    link.send(encode(request), 1)
                case Received():
                    got.append(event.message)
                case _:
                    pass

        link = Link(loop, session, connect_unix(str(path)), told, lambda _: None)
        while len(got) < 2:
            loop.run_once(1.0)
        link.close()
    assert decode(got[0]) == Subscribe((Topic("", "vchan.host"),))
    reply = decode(got[1])
    assert isinstance(reply, Reply) and reply.flags & FAILURE
    assert b"MESSAGE_BYTES_MAX" in reply.body
    with Client(str(path)) as other:
        assert other.call("agent", "echo", server="vm") == {}


def test_another_protocol_version_is_refused_readably(host: LocalHost, path: Path) -> None:
    events: list[Event] = []
    with Loop() as loop:
        config = Config(Role.GUEST, os.urandom(16), "newer", 2, 2)
        session = Session(config, os.urandom)
        link = Link(loop, session, connect_unix(str(path)), events.append, lambda _: None)
        while not events:
            loop.run_once(1.0)
        link.close()
    wait(lambda: any("protocol version" in line for line in host.log))
    for text in (str(events[0]), *(line for line in host.log if "protocol" in line)):
        assert "upgrade the older one" in text


class Recorder:
    """A daemon's end that notes who comes and goes."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def peer_opened(self, key: int, link: Link, who: Credentials) -> None:
        assert who.pid == os.getpid()
        self.told.append("opened")

    def peer_message(self, key: int, data: bytes) -> None:
        self.told.append(data.decode())

    def peer_closed(self, key: int, *, is_gone: bool) -> None:
        self.told.append("gone" if is_gone else "closed")


def test_a_peer_that_greets_again_is_the_same_peer(path: Path) -> None:
    """It does when the daemon has stood still for some seconds, and its session goes on."""
    peers = Recorder()
    with Loop() as loop:
        server = LocalServer(
            loop, str(path), 0o660, os.urandom(16), "daemon", peers, lambda _: None
        )
        events: list[Event] = []
        session = Session(Config(Role.GUEST, os.urandom(16), "agent"), os.urandom)
        link = Link(loop, session, connect_unix(str(path)), events.append, lambda _: None)
        while not events:
            loop.run_once(1.0)
        session.open(loop.time())  # as it does by itself after unanswered questions
        link.flush()
        while len(events) < 2:
            loop.run_once(1.0)
        link.send(b"said", 1)
        while "said" not in peers.told:
            loop.run_once(1.0)
        assert [event.resumed for event in events if isinstance(event, Opened)] == [False, True]
        assert peers.told == ["opened", "said"]
        link.close()
        while "gone" not in peers.told:
            loop.run_once(1.0)
        server.close()
    assert not path.exists()


def test_a_daemon_is_told_whether_a_peer_is_gone_or_was_sent_away(path: Path) -> None:
    peers = Recorder()
    with Loop() as loop:
        server = LocalServer(
            loop, str(path), 0o660, os.urandom(16), "daemon", peers, lambda _: None
        )
        links = []
        for count in (1, 2):
            session = Session(Config(Role.GUEST, os.urandom(16), "agent"), os.urandom)
            stream = connect_unix(str(path))
            links.append(Link(loop, session, stream, lambda _: None, lambda _: None))
            while peers.told.count("opened") < count:
                loop.run_once(1.0)
        links[0].close()
        while "gone" not in peers.told:
            loop.run_once(1.0)
        server.close()
        assert peers.told == ["opened", "opened", "gone", "closed"]
        links[1].close()
