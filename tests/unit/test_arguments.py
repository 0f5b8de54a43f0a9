"""What programs hand to Client and Agent, used wrongly: each refusal names the argument."""

from __future__ import annotations

import functools
import math
import types
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from vchan.client import WORKERS_MAX, Agent, Client
from vchan.errors import ConfigError, LimitExceeded
from vchan.rpc.arguments import (
    DAEMONS_TOPICS,
    GIVEN_CHARS_MAX,
    check_endpoint,
    check_seconds,
    check_version,
    public_methods,
)
from vchan.rpc.messages import TOPICS_MAX


class Endpoint:
    def echo(self, x: int) -> int:
        return x


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent("/nonexistent/agent.sock", log=lambda _: None)
    yield agent
    agent.stop()
    agent.run()


@pytest.fixture(params=["agent", "client"])
def caller(request: pytest.FixtureRequest) -> Any:
    """Neither is connected: what is wrong is said before anybody is asked."""
    if request.param == "agent":
        return request.getfixturevalue("agent")
    return Client.__new__(Client)


WRONG_NAMES: list[Any] = ["", None, 5, b"agent", uuid.UUID(int=1), "a\nb", "a\0b", "\ud800", []]
WRONG_TIMES: list[Any] = [0, -1, -0.0, math.nan, math.inf, -math.inf, 86401, None, "5", True, 1j]
WRONG_VERSIONS: list[Any] = [
    "",
    "1",
    "1.",
    ".1",
    "a.b",
    "1.0.0.0",
    "\u0663.\u0661",
    1.0,
    1,
    "1,0",
    " 1.0",
]


@pytest.mark.parametrize("kind", ["call", "cast"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("topic", WRONG_NAMES),
        ("method", WRONG_NAMES),
        ("exchange", WRONG_NAMES),
        ("server", [each for each in WRONG_NAMES if each != ""]),
        ("namespace", [each for each in WRONG_NAMES if each is not None]),
        ("version", WRONG_VERSIONS),
        ("timeout_s", WRONG_TIMES),
        ("args", [[1], "x", 5, {1: 2}, {None: 1}, ()]),
        ("context", [[1], "x", 5, {1: 2}]),
    ],
)
def test_a_wrong_argument_of_a_request_is_named(
    caller: Any, kind: str, name: str, values: list[Any]
) -> None:
    for value in values:
        given = {"topic": "agent", "method": "echo", name: value}
        with pytest.raises(ConfigError, match=f"^{name}: ") as raised:
            getattr(caller, kind)(**given)
        assert "is not" in str(raised.value)


@pytest.mark.parametrize("data", ["text", 5, None, [1], memoryview(b"abcd")[::2]])
def test_data_that_is_no_bytes_is_named(caller: Any, data: object) -> None:
    with pytest.raises(ConfigError, match=r"^data: .* is not bytes"):
        caller.call_raw("agent", "echo", data)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("topic", WRONG_NAMES),
        ("event_type", WRONG_NAMES),
        ("priority", ["", "INFO", "loud", None, ["info"], 5]),
        ("publisher_id", [None, 5, "a\nb"]),
        ("exchange", WRONG_NAMES),
        ("timeout_s", WRONG_TIMES),
        ("context", [[1], {1: 2}]),
    ],
)
def test_a_wrong_argument_of_a_notification_is_named(
    caller: Any, name: str, values: list[Any]
) -> None:
    for value in values:
        given = {"topic": "notifications", "event_type": "x", name: value}
        with pytest.raises(ConfigError, match=f"^{name}: "):
            caller.notify(**given)


@pytest.mark.parametrize("name", ["topic", "server", "exchange", "method", "namespace"])
def test_a_name_that_is_too_long_is_a_limits(caller: Any, name: str) -> None:
    given = {"topic": "agent", "method": "echo", name: "ä" * 128}
    with pytest.raises(LimitExceeded, match=rf"{name}: 256 .* \(NAME_BYTES_MAX\)"):
        caller.call(**given)


def test_what_json_cannot_say_is_not_sent(caller: Any) -> None:
    with pytest.raises(TypeError, match=r"^echo: JSON cannot say what it is sent: .*set"):
        caller.call("agent", "echo", {"x": {1}})
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="refers to itself"):
        caller.call("agent", "echo", {"x": loop})


WRONG_SERVINGS: list[tuple[str, list[Any]]] = [
    ("topic", [*WRONG_NAMES, *DAEMONS_TOPICS]),
    ("exchange", WRONG_NAMES),
    ("namespace", [each for each in WRONG_NAMES if each is not None]),
    ("version", [*WRONG_VERSIONS, None]),
]


@pytest.mark.parametrize(("name", "values"), WRONG_SERVINGS)
def test_a_wrong_argument_of_serve_is_named(agent: Agent, name: str, values: list[Any]) -> None:
    for value in values:
        given: dict[str, Any] = {"topic": "agent", "endpoint": Endpoint(), name: value}
        with pytest.raises(ConfigError, match=f"^{name}: "):
            agent.serve(**given)
    assert agent._serving.endpoints == {}


def test_more_topics_than_a_daemon_takes_are_refused(agent: Agent) -> None:
    for number in range(TOPICS_MAX):
        agent.serve(f"t{number}", Endpoint())
    agent.serve("t0", Endpoint(), namespace="another")
    with pytest.raises(LimitExceeded, match="TOPICS_MAX"):
        agent.serve("one-more", Endpoint())
    assert len(agent._serving.endpoints) == TOPICS_MAX


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"path": ""}, ConfigError, "^path: "),
        ({"path": 5}, ConfigError, "^path: "),
        ({"path": b"/run/x"}, ConfigError, "^path: "),
        ({"path": "/run/\0"}, ConfigError, "^path: "),
        ({"workers": -1}, ConfigError, "^workers: "),
        ({"workers": 1.5}, ConfigError, "^workers: "),
        ({"workers": True}, ConfigError, "^workers: "),
        ({"workers": None}, ConfigError, "^workers: "),
        ({"workers": WORKERS_MAX + 1}, LimitExceeded, "WORKERS_MAX"),
        ({"log": "print"}, ConfigError, "^log: "),
        ({"product": 5}, ConfigError, "^product: "),
        ({"product": "backup"}, ConfigError, "^product: 'backup' is not NAME/VERSION"),
    ],
)
def test_a_wrong_argument_of_an_agent_is_named(
    given: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Agent(**given)


@pytest.mark.parametrize("path", ["", None, 5, b"/run/x", "/run/\0"])
def test_a_wrong_path_of_a_client_is_named(path: Any) -> None:
    with pytest.raises(ConfigError, match=r"^path: "):
        Client(path)


def test_where_an_agent_attaches(monkeypatch: pytest.MonkeyPatch) -> None:
    def where(*given: Any) -> str:
        agent = Agent(*given)
        agent.loop.close()
        return agent._connection.path

    monkeypatch.delenv("VCHAN_SOCKET", raising=False)
    assert where() == "/run/vchan/agent.sock"
    monkeypatch.setenv("VCHAN_SOCKET", "/tmp/dev.sock")
    assert where() == "/tmp/dev.sock"
    assert where(Path("/run/x")) == "/run/x"


# --- endpoints


class Async:
    async def echo(self, x: int) -> int:
        return x


class AsyncStatic:
    @staticmethod
    async def echo(x: int) -> int:
        return x


class AsyncClass:
    @classmethod
    async def echo(cls, x: int) -> int:
        return x


class Inherits(Async):
    def note(self) -> None:
        """Beside what it inherits."""


class Awaits:
    async def __call__(self, x: int) -> int:
        return x


class InheritsCall(Awaits):
    pass


class Yields:
    def echo(self, x: int) -> Iterator[int]:
        yield x


class AsyncYields:
    async def echo(self, x: int) -> AsyncIterator[int]:
        yield x


def with_method(method: object) -> object:
    return types.SimpleNamespace(echo=method)


ASYNC = [
    Async(),
    AsyncStatic(),
    AsyncClass(),
    Inherits(),
    with_method(Async().echo),
    with_method(functools.partial(Async().echo, 1)),
    with_method(functools.partial(functools.partial(AsyncStatic.echo), 1)),
    with_method(Awaits()),
    with_method(InheritsCall()),
]


@pytest.mark.parametrize("endpoint", ASYNC)
def test_async_def_is_refused_with_what_to_use(agent: Agent, endpoint: object) -> None:
    with pytest.raises(ConfigError, match=r"^endpoint: echo: is async def.*vchan\.aio\.Agent"):
        agent.serve("agent", endpoint)
    check_endpoint(endpoint, is_async=True)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("endpoint", [Yields(), AsyncYields(), with_method(Yields().echo)])
def test_what_yields_is_refused(endpoint: object, is_async: bool) -> None:
    with pytest.raises(ConfigError, match=r"^endpoint: echo: yields"):
        check_endpoint(endpoint, is_async=is_async)


def echo(x: int) -> int:
    return x


class Nothing:
    text = "no method"

    def _hidden(self) -> None:
        """Not to be called."""


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (None, "an object with methods of its own"),
        ("text", "methods of its own"),
        (5, "methods of its own"),
        ({"echo": echo}, "methods of its own"),
        ([Endpoint()], "methods of its own"),
        (Endpoint, r"did you mean Endpoint\(\)\?"),
        (echo, "it has none"),
        (object(), "it has none"),
        (Nothing(), "it has none"),
    ],
)
def test_what_has_no_methods_is_refused(agent: Agent, endpoint: object, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^endpoint: .*{text}"):
        agent.serve("agent", endpoint)


class Lazy:
    """Asks a property for its value only when somebody calls it."""

    asked = 0

    @property
    def costly(self) -> int:
        type(self).asked += 1
        raise RuntimeError

    def echo(self) -> None:
        """One method."""


class Dynamic:
    """Its methods are made when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        return lambda: name


def test_what_may_be_served() -> None:
    lazy = Lazy()
    for endpoint in (lazy, Endpoint(), Dynamic(), math, with_method(echo)):
        check_endpoint(endpoint)
    assert Lazy.asked == 0
    assert [name for name, _ in public_methods(lazy)] == ["echo"]


def test_a_wrapper_that_runs_a_coroutine_is_an_ordinary_method() -> None:
    @functools.wraps(Async.echo)
    def run(x: int) -> int:
        return x

    check_endpoint(with_method(run))


def test_right_ones() -> None:
    for version in ("1.0", "12.34", "1.0.7"):
        check_version(version)
    for seconds in (0.001, 1, 86400):
        check_seconds("timeout_s", seconds)


def test_a_long_value_is_not_quoted_whole() -> None:
    with pytest.raises(ConfigError) as raised:
        check_version("x" * 10_000)
    assert len(str(raised.value)) < GIVEN_CHARS_MAX + 100
