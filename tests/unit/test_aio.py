"""Client and Agent on asyncio, over a real guest daemon."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from tests.unit.oslo_site import VM, Site, made_site
from vchan import aio
from vchan.aio import Agent, Client
from vchan.client import Agent as ThreadsAgent
from vchan.client import Client as ThreadsClient
from vchan.errors import (
    AgentGone,
    CallTimeout,
    ConfigError,
    LimitExceeded,
    LinkDown,
    NotAPort,
    PortAbsent,
    RemoteError,
)
from vchan.io.streams import listen_unix
from vchan.programs.connection import OPEN_CALLS_MAX
from vchan.programs.requests import EXCHANGE, make_request
from vchan.programs.serving import Serving
from vchan.rpc.messages import CALL

WAIT_S = 20.0
"""What a test waits for. Shorter than CALL_S: the end of a call's own time must not be taken for
what the test waits for."""
CALL_S = 60.0


@pytest.fixture
def site() -> Iterator[Site]:
    with made_site() as site:
        site.start_guest()
        yield site


class Endpoint:
    """An agent's methods."""

    def __init__(self) -> None:
        self.agent: Agent
        self.noted: list[Any] = []
        self.running = 0
        self.most = 0
        self.ended: list[str] = []
        self.go = asyncio.Event()

    async def echo(self, x: Any, after_s: float = 0.0) -> Any:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(after_s)
        self.running -= 1
        return x

    def plain(self, x: Any) -> Any:
        return x

    async def note(self, x: Any) -> None:
        self.noted.append(x)
        await asyncio.sleep(0)

    async def wait(self) -> str:
        self.running += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("done")
        return "done"

    async def fail(self) -> None:
        await asyncio.sleep(0)
        raise ValueError("as you wish")

    async def give_up(self) -> None:
        raise asyncio.CancelledError

    async def context(self, after_s: float) -> Any:
        await asyncio.sleep(after_s)
        return await asyncio.create_task(self._context())

    async def _context(self) -> Any:
        return self.agent.context["user"]

    async def relay(self, n: int) -> Any:
        await self.agent.cast("up", "note", {"n": n}, timeout_s=CALL_S)
        await self.agent.notify("news", "relayed", {"n": n}, timeout_s=CALL_S)
        return await self.agent.call("up", "double", {"n": n}, timeout_s=CALL_S)


async def until(reached: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not reached():
            await asyncio.sleep(0.005)


class Running:
    """An agent that runs as a task."""

    def __init__(self, site: Site, **options: Any) -> None:
        self.log: list[str] = []
        self.agent = Agent(site.directory / "agent.sock", log=self.log.append, **options)
        self.endpoint = Endpoint()
        self.endpoint.agent = self.agent
        self.agent.serve("agent", self.endpoint)
        self.task = asyncio.create_task(self.agent.run())

    async def stop(self) -> None:
        self.agent.stop()
        async with asyncio.timeout(WAIT_S):
            await self.task


@asynccontextmanager
async def running(site: Site, **options: Any) -> AsyncIterator[tuple[Running, Client]]:
    """An agent in the guest, and a client on the host."""
    agent = Running(site, **options)
    downward = site.host.channel.downward
    await until(lambda: "agent" in {topic.name for topic in downward.topics})
    async with Client(site.host.path) as client:
        yield agent, client
        if not agent.task.done():
            agent.endpoint.go.set()
            await agent.stop()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * CALL_S):
            await test()

    asyncio.run(bounded())


def call(client: Client, method: str, timeout_s: float = CALL_S, **args: Any) -> Awaitable[Any]:
    return client.call("agent", method, args, server=VM, timeout_s=timeout_s)


def test_calls_and_casts(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            assert await call(client, "echo", x={"ä": [1, None]}) == {"ä": [1, None]}
            assert await call(client, "plain", x=1) == 1
            calls = (call(client, "echo", x=n) for n in range(200))
            assert await asyncio.gather(*calls) == list(range(200))
            for n in range(50):
                await client.cast("agent", "note", {"x": n}, server=VM, timeout_s=CALL_S)
            await until(lambda: agent.endpoint.noted == list(range(50)))
            assert agent.log == ["connected"]

    run(test)


def test_what_a_method_raises(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            with pytest.raises(RemoteError, match="ValueError: as you wish"):
                await call(client, "fail")
            assert "raise ValueError" in agent.log[-1]
            with pytest.raises(RemoteError, match="NoSuchMethod"):
                await call(client, "dance")
            with pytest.raises(RemoteError, match="CancelledError"):  # nobody asked it to
                await call(client, "give_up")
            assert await call(client, "echo", x=1) == 1

    run(test)


def test_each_method_has_its_own_context(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (_, client):

            def ask(user: int) -> Awaitable[Any]:
                args = {"after_s": 0.1 if user % 2 else 0.05}
                context = {"user": user}
                return client.call(
                    "agent", "context", args, server=VM, context=context, timeout_s=CALL_S
                )

            assert await asyncio.gather(*map(ask, range(10))) == list(range(10))

    run(test)


class Conductor:
    def __init__(self) -> None:
        self.noted: list[Any] = []

    def double(self, n: int) -> int:
        return 2 * n

    def note(self, n: int) -> None:
        self.noted.append(n)

    def info(self, **values: Any) -> None:
        self.noted.append(values["event_type"])


def test_an_agents_methods_call_out(site: Site) -> None:
    conductor = Conductor()
    control = ThreadsAgent(site.host.path, log=lambda _: None)
    control.serve("up", conductor)
    control.serve("news.info", conductor)
    thread = threading.Thread(target=control.run)
    thread.start()

    async def test() -> None:
        async with running(site) as (agent, client):
            calls = (call(client, "relay", n=n) for n in range(20))
            assert await asyncio.gather(*calls) == [2 * n for n in range(20)]
            await until(lambda: len(conductor.noted) == 40)
            assert conductor.noted.count("relayed") == 20
            await agent.stop()
            with pytest.raises(LinkDown, match="the agent has ended"):
                await agent.agent.call("up", "double", {"n": 1})

    try:
        run(test)
    finally:
        control.stop()
        thread.join(WAIT_S)


# --- time


def test_no_answer_in_time(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            with pytest.raises(CallTimeout):
                await call(client, "wait", timeout_s=0.2)
            await until(lambda: agent.endpoint.ended == ["cancelled"])
            assert await call(client, "echo", x=1) == 1

    run(test)


def test_a_task_that_is_cancelled_withdraws_its_call(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            task = asyncio.ensure_future(call(client, "wait"))
            await until(lambda: agent.endpoint.running)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: agent.endpoint.ended == ["cancelled"])
            assert not client._waiting._futures
            assert not client._connection._waiting
            assert await call(client, "echo", x=1) == 1

    run(test)


def test_asyncio_s_own_timeout_withdraws_too(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await call(client, "wait")
            await until(lambda: agent.endpoint.ended == ["cancelled"])

    run(test)


def test_a_daemon_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "READY_S", 0.2)

    async def test() -> None:
        async with Client(tmp_path / "s") as client:
            with pytest.raises(LinkDown, match="does not answer"):
                await client.call("agent", "echo", timeout_s=CALL_S)

    with closing(listen_unix(str(tmp_path / "s"), 0o600)):
        run(test)


# --- connections


def test_nobody_is_there(tmp_path: Path) -> None:
    async def test() -> None:
        client = Client(tmp_path / "none.sock")
        with pytest.raises(LinkDown, match="not connected in this event loop"):
            await client.call("agent", "echo")
        with pytest.raises(PortAbsent):
            await client.connect()
        with pytest.raises(LinkDown, match="closed"):
            await client.call("agent", "echo")
        (tmp_path / "file").touch()
        with pytest.raises(NotAPort):
            await Agent(tmp_path / "file", log=lambda _: None).run()
        with pytest.raises(LinkDown, match="not running"):
            await Agent(tmp_path / "file").call("up", "double")

    run(test)


def test_both_come_back_when_their_daemons_do(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            assert await call(client, "echo", x=1) == 1
            downs: list[str] = []
            changed = client._connection._changed

            def noted(up: bool, why: str) -> None:
                downs.append(why)
                changed(up, why)

            client._connection._changed = noted
            site.host.drop_peers()
            await until(lambda: downs)  # what was sent before would be in doubt
            assert await call(client, "echo", x=2) == 2
            site.kill_guest()
            await until(lambda: agent.log[-1] != "connected")
            await asyncio.to_thread(site.start_guest)
            assert await call(client, "echo", x=3) == 3
            assert agent.log[-1] == "connected"

    run(test)


def test_a_client_is_closed_while_it_waits(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            waiting = asyncio.ensure_future(call(client, "wait"))
            await until(lambda: agent.endpoint.running)
            await client.close()
            await client.close()
            with pytest.raises(CallTimeout, match="closed; the method may have run"):
                await waiting
            with pytest.raises(LinkDown, match="closed"):
                await call(client, "echo", x=1)
            with pytest.raises(LinkDown, match="closed"):
                await client.connect()

    run(test)


def test_another_event_loop_is_refused(site: Site) -> None:
    async def test() -> None:
        async with Client(site.host.path) as client:

            def elsewhere() -> Any:
                return asyncio.run(client.call("agent", "echo"))

            with ThreadPoolExecutor(1) as pool, pytest.raises(LinkDown, match="this event loop"):
                await asyncio.get_running_loop().run_in_executor(pool, elsewhere)

    run(test)


# --- bounds


def test_more_calls_than_may_be_open_are_refused(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            calls = [asyncio.ensure_future(call(client, "wait")) for _ in range(OPEN_CALLS_MAX)]
            await until(lambda: len(client._connection._waiting) == OPEN_CALLS_MAX)
            with pytest.raises(LimitExceeded, match="OPEN_CALLS_MAX"):
                await call(client, "echo", x=1)
            assert agent.endpoint.running <= aio.TASKS
            for each in calls:
                each.cancel()
            await asyncio.wait(calls)
            assert await call(client, "echo", x=1) == 1

    run(test)


@pytest.mark.parametrize("tasks", [1, 3])
def test_so_many_methods_run_at_a_time(site: Site, tasks: int) -> None:
    async def test() -> None:
        async with running(site, tasks=tasks) as (agent, client):
            calls = (call(client, "echo", x=n, after_s=0.01) for n in range(20))
            assert await asyncio.gather(*calls) == list(range(20))
            assert agent.endpoint.most == tasks

    run(test)


@pytest.mark.parametrize(
    ("tasks", "error"), [(0, ConfigError), (1.5, ConfigError), (5000, LimitExceeded)]
)
def test_a_wrong_number_of_tasks(tasks: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="tasks"):
        Agent(tasks=tasks)


# --- the end


def test_an_agent_that_stops_lets_its_methods_end(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            waiting = asyncio.ensure_future(call(client, "wait"))
            await until(lambda: agent.endpoint.running)
            agent.agent.stop()
            await asyncio.sleep(0.1)
            assert not agent.task.done()
            agent.endpoint.go.set()
            assert await waiting == "done"
            await agent.task
            with pytest.raises(LinkDown, match="make another"):
                await agent.agent.run()

    run(test)


def test_an_agent_that_stops_does_not_wait_for_ever(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "STOP_S", 0.2)

    async def test() -> None:
        async with running(site) as (agent, client):
            waiting = asyncio.ensure_future(call(client, "wait"))
            await until(lambda: agent.endpoint.running)
            await agent.stop()
            assert agent.endpoint.ended == ["cancelled"]
            with pytest.raises(AgentGone):
                await waiting

    run(test)


def test_an_agent_whose_task_is_cancelled_ends_at_once(site: Site) -> None:
    async def test() -> None:
        async with running(site) as (agent, client):
            waiting = asyncio.ensure_future(call(client, "wait"))
            await until(lambda: agent.endpoint.running)
            agent.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await agent.task
            assert agent.endpoint.ended == ["cancelled"]
            with pytest.raises(AgentGone):
                await waiting
            assert len(asyncio.all_tasks()) == 1

    run(test)


def test_an_agent_that_is_stopped_before_and_after_it_ran(site: Site) -> None:
    agent = Agent(site.directory / "agent.sock", log=lambda _: None)

    async def test() -> None:
        agent.stop()
        await agent.run()

    run(test)
    agent.stop()


def test_a_bug_of_ours_ends_it(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio would log it and go on; callers would wait."""

    def broken(*_: object) -> None:
        raise KeyError("a bug's own")

    class BreaksAtTheEnd:
        finish = broken

        def __init__(self, serving: Serving) -> None:
            self._serving = serving

        def __getattr__(self, name: str) -> Any:
            return getattr(self._serving, name)

    async def test() -> None:
        async with running(site) as (agent, client):
            waiting = asyncio.ensure_future(call(client, "echo", x=1, after_s=0.1))
            monkeypatch.setattr(agent.agent, "_serving", BreaksAtTheEnd(agent.agent._serving))
            with pytest.raises(KeyError, match="own"):
                await agent.task
            with pytest.raises(AgentGone):
                await waiting
            asked = make_request(CALL, EXCHANGE, "nobody's", VM, b"{}", CALL_S)
            client._connection.submit(asked, broken)
            with pytest.raises(CallTimeout, match="a bug has ended it: KeyError"):
                await client.call("nobody's", "echo", server=VM, timeout_s=CALL_S)
            with pytest.raises(LinkDown, match="a bug has ended it"):
                await call(client, "echo", x=1)

    run(test)
    assert "a bug's own" in caplog.text


def test_a_client_of_threads_asks_an_agent_of_tasks(site: Site) -> None:
    async def test() -> None:
        async with running(site):

            def ask() -> Any:
                with ThreadsClient(site.host.path) as client:
                    return client.call("agent", "echo", {"x": 1}, server=VM, timeout_s=CALL_S)

            assert await asyncio.to_thread(ask) == 1

    run(test)
