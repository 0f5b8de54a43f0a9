"""What an agent says of itself: where it is not connected, and what its methods raise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.oslo_site import VM, Site, made_site, wait
from tests.unit.test_agent_requests import Running
from vchan.client import Agent, Client, log_to_stderr
from vchan.errors import LinkDown, NotAPort, RemoteError
from vchan.programs.serving import FAILURES_LOGGED_MAX, Failures
from vchan.rpc.bodies import FAILURE_TEXT_MAX

WAIT_S = 30.0


@pytest.fixture
def site() -> Iterator[Site]:
    with made_site() as site:
        yield site


class Endpoint:
    def __init__(self) -> None:
        self.result: Any = None

    def fail(self, text: str = "as you wish") -> None:
        raise ValueError(text)

    def deep(self, depth: int) -> None:
        if depth:
            self.deep(depth - 1)
        raise ValueError("deep " * 10_000)

    def give(self) -> Any:
        return self.result

    def wordless(self) -> None:
        raise Wordless(object())

    def wordy(self) -> None:
        raise ValueError("long " * 1_000_000)

    def leave(self) -> None:
        sys.exit("leaving")

    def interrupt(self) -> None:
        raise KeyboardInterrupt


class Wordless(Exception):
    """Its text is made of what was never set, as often."""

    def __str__(self) -> str:
        return f"{self.never_set}"  # type: ignore[attr-defined]


async def later() -> int:
    return 1


@pytest.fixture(params=[0, 2], ids=["loop", "workers"])
def running(site: Site, request: pytest.FixtureRequest) -> Iterator[Running]:
    running = run_agent(site, request.param)
    yield running
    running.stop()


def run_agent(site: Site, workers: int) -> Running:
    site.start_guest()
    endpoint = Endpoint()
    running = Running(str(site.directory / "agent.sock"), lambda _: {"agent": endpoint}, workers)
    running.endpoint = endpoint  # type: ignore[attr-defined]
    site.wait_served("agent")
    return running


def test_what_a_method_raises_is_logged_with_where(site: Site, running: Running) -> None:
    with Client(str(site.host.path)) as client:
        with pytest.raises(RemoteError, match="ValueError: as you wish"):
            client.call("agent", "fail", server=VM, timeout_s=WAIT_S)
        client.cast("agent", "fail", {"text": "cast"}, server=VM, timeout_s=WAIT_S)
    wait(lambda: sum("failed" in line for line in running.log) == 2)
    call, cast = (line for line in running.log if "failed" in line)
    assert call.startswith("a call to topic agent failed: Traceback")
    assert cast.startswith("a cast to topic agent failed: Traceback")
    for story in (call, cast):
        assert "test_agent_log.py" in story
        assert "raise ValueError(text)" in story
    assert cast.endswith("ValueError: cast")


def test_what_is_wrong_with_the_request_has_no_traceback(site: Site, running: Running) -> None:
    with Client(str(site.host.path)) as client, pytest.raises(RemoteError, match="NoSuchMethod"):
        client.call("agent", "dance", server=VM, timeout_s=WAIT_S)
    wait(lambda: "dance" in running.log[-1])
    assert running.log[-1] == (
        "a call to topic agent failed: NoSuchMethod: agent has no method dance, version 1.0; "
        "it has deep, fail, give, interrupt, leave, wordless, wordy"
    )


def test_a_failure_is_bounded(site: Site, running: Running) -> None:
    with Client(str(site.host.path)) as client, pytest.raises(RemoteError) as raised:
        client.call("agent", "deep", {"depth": 300}, server=VM, timeout_s=WAIT_S)
    assert len(str(raised.value)) <= FAILURE_TEXT_MAX + 100
    assert len(running.log[-1]) <= FAILURE_TEXT_MAX + 100


def test_an_exception_that_cannot_say_what_it_is(site: Site, running: Running) -> None:
    """Its own `__str__` raises: that ended the agent, or its caller heard nothing."""
    with Client(str(site.host.path)) as client:
        said = r"Wordless: \(its __str__ raised AttributeError\)"
        with pytest.raises(RemoteError, match=said):
            client.call("agent", "wordless", server=VM, timeout_s=WAIT_S)
        client.cast("agent", "wordless", server=VM, timeout_s=WAIT_S)
        assert client.call("agent", "give", server=VM, timeout_s=WAIT_S) is None
    assert "raise Wordless" in running.log[-1]


def test_an_exception_that_says_too_much_is_cut(site: Site, running: Running) -> None:
    """Its caller heard that a message was too large, and not what was raised."""
    said = "ValueError: long long"
    with Client(str(site.host.path)) as client, pytest.raises(RemoteError, match=said) as raised:
        client.call("agent", "wordy", server=VM, timeout_s=WAIT_S)
    assert len(str(raised.value)) <= FAILURE_TEXT_MAX + 100
    failure = json.loads(raised.value.failure)
    assert [len(arg) for arg in failure["args"]] == [FAILURE_TEXT_MAX]


def test_a_result_that_json_cannot_say(site: Site, running: Any) -> None:
    running.endpoint.result = {1, 2}
    with Client(str(site.host.path)) as client:
        said = "TypeError: the method returned what JSON cannot say: .*set"
        with pytest.raises(RemoteError, match=said):
            client.call("agent", "give", server=VM, timeout_s=WAIT_S)
        assert "TypeError" in running.log[-1]
        loop: list[Any] = []
        loop.append(loop)
        running.endpoint.result = loop
        said = "ValueError: the method returned what JSON cannot say: refers to itself"
        with pytest.raises(RemoteError, match=said):
            client.call("agent", "give", server=VM, timeout_s=WAIT_S)
        lines = len(running.log)
        client.cast("agent", "give", server=VM, timeout_s=WAIT_S)  # nobody wants it
        running.endpoint.result = 1
        assert client.call("agent", "give", server=VM, timeout_s=WAIT_S) == 1
    assert len(running.log) == lines


def test_a_result_that_is_too_large(site: Site, running: Any) -> None:
    running.endpoint.result = "x" * (5 * 1024 * 1024)
    with Client(str(site.host.path)) as client, pytest.raises(RemoteError, match="LimitExceeded"):
        client.call("agent", "give", server=VM, timeout_s=WAIT_S)
    assert "an answer on topic agent cannot be sent: message: " in running.log[-1]


def test_what_is_to_be_awaited_is_refused(site: Site, running: Any) -> None:
    """A wrapper hides that it is a coroutine. Python warns of one that nobody awaits: an error."""
    running.endpoint.result = later()
    with (
        Client(str(site.host.path)) as client,
        pytest.raises(RemoteError, match=r"await it.*vchan\.aio"),
    ):
        client.call("agent", "give", server=VM, timeout_s=WAIT_S)


@pytest.mark.parametrize("method", ["leave", "interrupt"])
def test_a_worker_that_is_to_end_answers(site: Site, method: str) -> None:
    """A pool swallows it: the caller would wait for its timeout."""
    with run_agent(site, 1) as running, Client(str(site.host.path)) as client:
        with pytest.raises(RemoteError, match=r"SystemExit: leaving|KeyboardInterrupt"):
            client.call("agent", method, server=VM, timeout_s=WAIT_S)
        assert client.call("agent", "give", server=VM, timeout_s=WAIT_S) is None
        assert "failed" in running.log[-1]


def test_failures_at_will_are_counted() -> None:
    failures, lines = Failures(), list[str]()
    for number in range(FAILURES_LOGGED_MAX + 5):
        lines += failures.lines(f"story {number}", 100.0)
    assert lines == [f"story {number}" for number in range(FAILURES_LOGGED_MAX)]
    assert failures.lines("later", 111.0) == [
        "5 more methods failed (FAILURES_LOGGED_MAX)",
        "later",
    ]
    assert failures.lines("much later", 222.0) == ["much later"]


# --- without a connection


def run_for(agent: Agent, seconds: float = 0.2) -> None:
    agent.loop.call_later(seconds, agent.stop)
    agent.run()


def test_an_agent_says_on_standard_error_that_nobody_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = Agent(tmp_path / "agent.sock")
    agent.serve("agent", Endpoint())
    run_for(agent)
    _, err = capsys.readouterr()
    assert err == f"vchan agent: {tmp_path}/agent.sock: no such socket: it may appear later\n"


def test_an_agent_that_serves_nothing_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    run_for(Agent(tmp_path / "agent.sock", log=said.append))
    assert said[-1] == "serves no topic: see serve()"


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_is_no_socket_never_will_be(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "agent.sock"
    make(path)
    agent = Agent(path, log=lambda _: None)
    agent.serve("agent", Endpoint())
    agent.loop.call_later(WAIT_S, agent.stop)
    with pytest.raises(NotAPort, match="is no socket"):
        agent.run()
    with pytest.raises(NotAPort, match="is no socket"):
        Client(path)


def test_an_agent_runs_once(tmp_path: Path) -> None:
    agent = Agent(tmp_path / "agent.sock", log=lambda _: None)
    run_for(agent)
    with pytest.raises(LinkDown, match="make another"):
        agent.run()


def test_a_method_that_stops_its_agent_is_answered(site: Site) -> None:
    with run_agent(site, 0) as running, Client(str(site.host.path)) as client:
        running.endpoint.stop = running.agent.stop  # type: ignore[attr-defined]
        assert client.call("agent", "stop", server=VM, timeout_s=WAIT_S) is None


def test_a_topic_may_be_served_later(site: Site) -> None:
    with run_agent(site, 0) as running:
        running.agent.serve("late", Endpoint())
        site.wait_served("late")


def test_the_default_log_is_harmless(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_to_stderr("a\n\x1b[31mb")
    assert capsys.readouterr().err == "vchan agent: a\n?[31mb\n"
    monkeypatch.setattr(sys, "stderr", None)
    log_to_stderr("nobody")
