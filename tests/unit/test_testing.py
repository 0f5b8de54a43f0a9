"""The guest in memory that authors of agents test with: its faults are real ones."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vchan.client import Agent
from vchan.errors import (
    AgentGone,
    CallTimeout,
    ConfigError,
    LinkDown,
    NoSuchAgent,
    RemoteError,
)
from vchan.testing import FakeGuest, Sent, VirtualLoop

ROOT = Path(__file__).parents[2]


@pytest.fixture
def guest() -> Iterator[FakeGuest]:
    with FakeGuest() as guest:
        yield guest


class Endpoint:
    def __init__(self) -> None:
        self.noted: list[Any] = []
        self.agent: Agent | None = None

    def echo(self, x: Any) -> Any:
        return x

    def note(self, x: Any) -> None:
        assert self.agent is not None
        self.noted.append((x, "vchan_redelivered" in self.agent.context))

    def fail(self) -> None:
        raise ValueError("as you wish")

    def relay(self, n: int) -> Any:
        assert self.agent is not None
        self.agent.cast("up", "note", {"n": n})
        self.agent.notify("news", "relayed", {"n": n})
        return self.agent.call("up", "double", {"n": n}, timeout_s=60)


@pytest.fixture
def endpoint(guest: FakeGuest) -> Endpoint:
    return served(guest)


def served(guest: FakeGuest, endpoint: Endpoint | None = None) -> Endpoint:
    endpoint = endpoint or Endpoint()
    endpoint.agent = guest.serve("agent", endpoint)
    return endpoint


def test_calls_and_casts(guest: FakeGuest, endpoint: Endpoint) -> None:
    assert guest.topics == {"agent"}
    assert guest.call("agent", "echo", {"x": [1, "ä"]}) == [1, "ä"]
    big = "x" * 1_000_000  # more than a socket holds
    assert guest.call("agent", "echo", {"x": big}) == big
    for x in range(20):
        guest.cast("agent", "note", {"x": x})
    assert endpoint.noted == [(x, False) for x in range(20)]
    guest.cast("agent", "note", {"x": "all"}, fanout=True)
    assert endpoint.noted[-1] == ("all", False)


def test_an_agent_may_listen_for_notifications(guest: FakeGuest) -> None:
    heard: list[Any] = []

    class Listener:
        def warn(self, publisher_id: str, event_type: str, payload: Any, metadata: Any) -> None:
            heard.append((publisher_id, event_type, payload))

    guest.serve("news.warn", Listener())
    guest.notify("news", "rain", {"mm": 3}, priority="warn", publisher_id="sky")
    assert heard == [("sky", "rain", {"mm": 3})]
    with pytest.raises(NoSuchAgent):
        guest.notify("news", "rain", priority="info")


def test_what_a_service_would_see(guest: FakeGuest, endpoint: Endpoint) -> None:
    with pytest.raises(RemoteError, match="ValueError: as you wish"):
        guest.call("agent", "fail")
    assert "raise ValueError" in guest.log[-1]
    with pytest.raises(RemoteError, match="NoSuchMethod"):
        guest.call("agent", "dance")
    with pytest.raises(NoSuchAgent, match="no agent serves topic openstack/other"):
        guest.call("other", "echo")
    with pytest.raises(ConfigError, match="timeout_s"):
        guest.call("agent", "echo", timeout_s=0)


class Conductor:
    def double(self, n: int) -> int:
        if n < 0:
            raise ValueError("negative")
        return 2 * n

    def note(self, n: int) -> None:
        """For casts."""

    def info(self, **values: Any) -> None:
        """For notifications."""


def test_what_agents_send(guest: FakeGuest, endpoint: Endpoint) -> None:
    with pytest.raises(RemoteError, match=r"nobody serves topic up: see FakeGuest\.control"):
        guest.call("agent", "relay", {"n": 4})
    guest.sent.clear()
    guest.control("up", Conductor())
    guest.control("news.info", Conductor())
    assert guest.call("agent", "relay", {"n": 4}) == 8
    cast, notification, call = guest.sent
    assert cast == Sent("cast", "openstack", "up", "", "note", {"n": 4}, {})
    assert notification[:5] == ("notify", "openstack", "news", "", "info")
    assert notification.args["payload"] == {"n": 4}
    assert call.kind == "call"
    with pytest.raises(RemoteError, match="RemoteError: ValueError: negative"):
        guest.call("agent", "relay", {"n": -1})
    assert endpoint.agent is not None
    assert endpoint.agent.call("up", "double", {"n": 3}) == 6  # the test may ask, too


def test_a_minute_takes_no_time(guest: FakeGuest, endpoint: Endpoint) -> None:
    guest.control("up", None)
    began_s, virtual_s = time.monotonic(), guest.loop.now_s
    assert endpoint.agent is not None
    with pytest.raises(CallTimeout):
        endpoint.agent.call("up", "double", {"n": 1}, timeout_s=600)
    assert 600 <= guest.loop.now_s - virtual_s < 605
    guest.pause()
    with pytest.raises(CallTimeout):
        guest.call("agent", "echo", {"x": 1}, timeout_s=300)
    guest.resume()
    assert guest.call("agent", "echo", {"x": 2}) == 2
    guest.advance(3600)
    assert time.monotonic() - began_s < 20


def test_what_was_withdrawn_while_the_vm_stood_still_never_runs(
    guest: FakeGuest, endpoint: Endpoint
) -> None:
    guest.pause()
    with pytest.raises(CallTimeout):
        guest.call("agent", "note", {"x": 1}, timeout_s=5)
    guest.resume()
    guest.advance(30)
    assert endpoint.noted == []


# --- faults


@pytest.mark.parametrize("kind", ["call", "cast"])
def test_a_migration_at_every_byte(kind: str) -> None:
    """Whatever the channel loses, a request runs once, and its sender hears of it."""
    torn = 0
    for after_bytes in range(0, 400, 3):
        with FakeGuest() as guest:
            endpoint = served(guest)
            guest.migrate(after_bytes=after_bytes)
            getattr(guest, kind)("agent", "note", {"x": 1})
            guest.settle()
            assert endpoint.noted == [(1, False)], after_bytes
            torn += guest._host.session.config.name != "host-1"
            assert guest.call("agent", "echo", {"x": 2}) == 2
    assert torn > 20


def test_a_migration_while_an_agent_asks() -> None:
    for after_bytes in range(0, 600, 7):
        with FakeGuest() as guest:
            endpoint = served(guest)
            guest.control("up", Conductor())
            guest.control("news.info", Conductor())
            assert endpoint.agent is not None
            guest.migrate(after_bytes=after_bytes)
            assert endpoint.agent.call("up", "double", {"n": 1}) == 2
            endpoint.agent.cast("up", "note", {"n": 1})
            assert [sent.kind for sent in guest.sent] == ["call", "cast"], after_bytes


def test_faults_between_requests(guest: FakeGuest, endpoint: Endpoint) -> None:
    for number, fault in enumerate((guest.migrate, guest.tear, guest.restart_daemon) * 3):
        fault()
        assert guest.call("agent", "echo", {"x": number}) == number
        guest.cast("agent", "note", {"x": number})
    assert [x for x, _ in endpoint.noted] == list(range(9))


def test_an_agent_dies_in_a_method(guest: FakeGuest, endpoint: Endpoint) -> None:
    agent = endpoint.agent
    assert agent is not None

    class Dying(Endpoint):
        def echo(self, x: Any) -> Any:
            self.noted.append(x)
            guest.kill(agent_that_dies)
            return x

    guest.kill(agent)
    dying = Dying()
    agent_that_dies = guest.serve("agent", dying)
    with pytest.raises(AgentGone, match="went away"):
        guest.call("agent", "echo", {"x": 1})
    assert dying.noted == [1]
    next_one = served(guest)
    assert guest.call("agent", "echo", {"x": 2}) == 2
    assert next_one.noted == []


def test_a_cast_waits_for_the_next_agent(guest: FakeGuest, endpoint: Endpoint) -> None:
    assert endpoint.agent is not None
    guest.kill(endpoint.agent)
    next_one = Endpoint()
    guest.loop.call_later(1.0, lambda: starts(next_one))

    def starts(endpoint: Endpoint) -> None:
        endpoint.agent = agent = guest.agent()
        agent.serve("agent", endpoint)

    guest.cast("agent", "note", {"x": 1})
    assert next_one.noted == [(1, False)]


def test_what_may_have_run_before_is_marked(guest: FakeGuest, endpoint: Endpoint) -> None:
    guest.reset()
    with pytest.raises(LinkDown):
        assert endpoint.agent is not None
        endpoint.agent.run()
    served(guest, endpoint)
    guest.cast_again("agent", "note", {"x": 1})
    guest.cast("agent", "note", {"x": 2})
    assert endpoint.noted == [(1, True), (2, False)]
    with pytest.raises(ConfigError, match="cast_again has no such argument"):
        guest.cast_again("agent", "note", {"x": 1}, wrong=1)


def test_what_can_never_come_is_said() -> None:
    with pytest.raises(AssertionError, match="can never come"):
        VirtualLoop().run_until(lambda: False)


def test_a_wrong_endpoint_of_the_control_side(guest: FakeGuest) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        guest.control("up", Conductor)


# --- for authors


def test_the_example_passes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_agent.py"],
        cwd=ROOT / "examples",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


def test_no_socket_and_no_thread_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import threading

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with FakeGuest() as guest:
        served(guest)
        assert guest.call("agent", "echo", {"x": 1}) == 1


def test_a_service_s_exception_that_cannot_say_what_it_is(guest: FakeGuest) -> None:
    class Wordless(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    class Service:
        def fail(self) -> None:
            raise Wordless

    guest.control("service", Service())
    agent = guest.agent()
    with pytest.raises(RemoteError, match=r"Wordless: \(its __str__ raised ValueError\)"):
        agent.call("service", "fail")
