"""Light agents and clients on the guest's socket: requests out of the guest, and on the host's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from tests.rig.stand_in import StandIn
from tests.unit.oslo_site import VM, Site, made_site, wait
from tests.unit.owned import touches_recorded
from vchan.client import Agent, Client
from vchan.errors import CallTimeout, LinkDown, NoSuchAgent, RemoteError
from vchan.rpc.bodies import encode_invocation
from vchan.rpc.in_flight import Answered
from vchan.rpc.messages import CALL, Request

PATIENT_S = 30.0


@pytest.fixture
def site() -> Iterator[Site]:
    with made_site() as site:
        yield site


class Running:
    """An agent on a thread of its own."""

    def __init__(self, path: str, make: Callable[[Agent], dict[str, object]], workers: int) -> None:
        self.log: list[str] = []
        self.agent = Agent(path, workers=workers, log=self.log.append)
        for topic, endpoint in make(self.agent).items():
            self.agent.serve(topic, endpoint)
        self._thread = threading.Thread(target=self.agent.run, name="agent")
        self._thread.start()
        known = threading.Event()
        connection = self.agent._connection
        self.agent.loop.call_soon_threadsafe(lambda: connection.when_acknowledged(known.set))
        assert known.wait(PATIENT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.agent.stop()
        self._thread.join(PATIENT_S)
        assert not self._thread.is_alive()


@pytest.fixture
def run(site: Site) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def run(
        make: Callable[[Agent], dict[str, object]], *, guest: bool = True, workers: int = 0
    ) -> Running:
        if guest:
            site.start_guest()
        path = site.directory / "agent.sock" if guest else site.host.path
        running.append(Running(str(path), make, workers))
        return running[-1]

    yield run
    for each in running:
        each.stop()


class Conductor:
    """On the host, what the guest calls."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    def double(self, n: int) -> int:
        return 2 * n

    def note(self, **values: Any) -> None:
        self.noted.append(values)

    def fail(self) -> None:
        raise ValueError("no")

    def info(self, **values: Any) -> None:
        self.noted.append(values)


class Worker:
    """In the guest, with methods that call out themselves."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.order: list[Any] = []
        self.running = 0

    def relay(self, n: int) -> int:
        self.running += 1
        assert self.running == 1 or self.agent._worker.pool is not None  # one at a time
        self.order.append(n)
        result: int = self.agent.call("up", "double", {"n": n}, timeout_s=PATIENT_S)
        self.running -= 1
        return result

    def report(self, n: int) -> None:
        self.agent.cast("up", "note", {"n": n}, timeout_s=PATIENT_S)
        self.agent.notify("news", "reported", {"n": n}, timeout_s=PATIENT_S)

    def fail(self) -> None:
        self.agent.call("up", "fail", timeout_s=PATIENT_S)

    def late(self) -> None:
        self.agent.call("up", "slow", timeout_s=0.2)


@pytest.mark.parametrize("workers", [0, 4])
def test_an_agents_methods_call_out(site: Site, run: Any, workers: int) -> None:
    conductor = Conductor()
    run(lambda _: {"up": conductor, "news.info": conductor}, guest=False)
    made: list[Worker] = []

    def make(agent: Agent) -> dict[str, object]:
        made.append(Worker(agent))
        return {"t": made[0]}

    run(make, workers=workers)
    site.wait_served("t")
    with Client(str(site.host.path)) as client, ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda n: client.call("t", "relay", {"n": n}, server=VM), range(40))
        assert list(results) == [2 * n for n in range(40)]
        client.call("t", "report", {"n": 7}, server=VM)
        with pytest.raises(RemoteError, match="RemoteError: ValueError: no"):
            client.call("t", "fail", server=VM)
    assert sorted(made[0].order) == list(range(40))
    wait(lambda: len(conductor.noted) == 2)
    note, news = conductor.noted
    assert note == {"n": 7}
    assert (news["event_type"], news["payload"]) == ("reported", {"n": 7})
    assert news["publisher_id"] and set(news["metadata"]) == {"message_id", "timestamp"}


class Observed(Worker):
    """Notes how much of what was said has not gone out: when a method begins, when one waits."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent)
        self.at_begin: list[int] = []
        self.at_wait: list[int] = []
        self.released = [threading.Event(), threading.Event()]
        self.ran: list[str] = []

    def _backlog_bytes(self) -> int:
        return self.agent._connection._session.backlog_bytes

    def relay(self, n: int) -> int:
        self.at_begin.append(self._backlog_bytes())
        loop = self.agent.loop

        def run_once() -> None:
            self.at_wait.append(self._backlog_bytes())
            loop.run_once()

        stand_in: Any = StandIn(loop, run_once=run_once)
        self.agent.loop = stand_in
        try:
            return super().relay(n)
        finally:
            self.agent.loop = loop

    def quick(self) -> None:
        self.at_begin.append(self._backlog_bytes())

    def hold(self, n: int) -> None:
        self.ran.append(f"hold {n}")
        assert self.released[n].wait(PATIENT_S)

    def withdrawn(self) -> None:
        self.ran.append("withdrawn")


@pytest.fixture
def observed(site: Site, run: Any) -> Observed:
    made: list[Observed] = []

    def make(agent: Agent) -> dict[str, object]:
        made.append(Observed(agent))
        return {"t": made[0]}

    run(lambda _: {"up": Conductor()}, guest=False)
    run(make)
    site.wait_served("t")
    return made[0]


def running(client: Client) -> int:
    """Requests that the guest's daemon has given to its agents, and that are not over."""
    info = client.call("vchan.guest", "info", server=VM)
    return int(info["running"]) - 1  # this one


def test_nothing_waits_for_a_methods_end(site: Site, observed: Observed) -> None:
    """What a method asks goes out before it waits, and its answer before the next one begins."""
    with Client(str(site.host.path)) as client, ThreadPoolExecutor(9) as pool:
        results = pool.map(lambda n: client.call("t", "relay", {"n": n}, server=VM), range(20))
        assert list(results) == [2 * n for n in range(20)]
        assert len(observed.at_wait) >= 20 and not any(observed.at_wait)
        held = pool.submit(client.call, "t", "hold", {"n": 0}, server=VM)
        wait(lambda: bool(observed.ran))
        quick = [pool.submit(client.call, "t", "quick", server=VM) for _ in range(8)]
        wait(lambda: running(client) == 9)
        observed.released[0].set()
        for each in (held, *quick):
            each.result(PATIENT_S)
    assert observed.at_begin == [0] * 28


def test_what_is_withdrawn_behind_a_long_method_does_not_run(
    site: Site, observed: Observed
) -> None:
    path = str(site.host.path)
    with (
        Client(path) as client,
        Client(path) as other,  # who goes withdraws what it has asked
        ThreadPoolExecutor(3) as pool,
    ):
        held = [pool.submit(client.call, "t", "hold", {"n": 0}, server=VM, timeout_s=PATIENT_S)]
        wait(lambda: len(observed.ran) == 1)
        held.append(pool.submit(client.call, "t", "hold", {"n": 1}, server=VM, timeout_s=PATIENT_S))
        wait(lambda: running(client) == 2)
        withdrawn = pool.submit(other.call, "t", "withdrawn", server=VM, timeout_s=PATIENT_S)
        wait(lambda: running(client) == 3)
        observed.released[0].set()  # both of the others are read at once
        wait(lambda: len(observed.ran) == 2)
        other.close()
        with pytest.raises(CallTimeout):
            withdrawn.result(PATIENT_S)
        wait(lambda: running(client) == 1)
        # It may have answered that before its agent was told, in one turn: by the next it has been.
        assert running(client) == 1
        observed.released[1].set()
        for each in held:
            each.result(PATIENT_S)
        with pytest.raises(RemoteError):
            client.call("t", "unknown", server=VM)  # it is behind all of them
    assert observed.ran == ["hold 0", "hold 1"]


def test_what_agents_are_is_seen_as_long_as_they_are_there(site: Site) -> None:
    site.start_guest()
    path = site.directory / "agent.sock"
    with Client(str(site.host.path)) as client, running_agents(path, "backup/2.1", None) as agents:
        wait(lambda: attached(client) == ["backup/2.1"])
        agents[0].stop()
        wait(lambda: attached(client) is None)


def attached(client: Client) -> list[str] | None:
    facts = client.call("vchan.guest", "facts", server=VM, timeout_s=PATIENT_S)
    found: list[str] | None = facts.get("attached")
    return found


@contextmanager
def running_agents(path: Path, *products: str | None) -> Iterator[list[Agent]]:
    agents = [Agent(path, product=product, log=lambda _: None) for product in products]
    with ThreadPoolExecutor() as pool:
        for number, agent in enumerate(agents):
            agent.serve(f"t{number}", Conductor())
            pool.submit(agent.run)
        try:
            yield agents
        finally:
            for agent in agents:
                agent.stop()


def test_an_agent_is_asked_by_its_programs_own_threads(site: Site, run: Any) -> None:
    conductor = Conductor()
    run(lambda _: {"up": conductor}, guest=False)
    running = run(lambda _: {})
    assert running.agent.call("up", "double", {"n": 3}, timeout_s=PATIENT_S) == 6
    with pytest.raises(NoSuchAgent):
        running.agent.cast("nobody", "note", timeout_s=PATIENT_S)


def test_an_agent_that_does_not_run() -> None:
    agent = Agent("/nonexistent")
    with pytest.raises(LinkDown, match="not running"):
        agent.call("up", "double", timeout_s=0.1)
    agent.loop.close()


def test_stop_ends_a_method_that_waits(site: Site, run: Any) -> None:
    def make(agent: Agent) -> dict[str, object]:
        return {"t": Worker(agent)}

    may_go = threading.Event()

    class Silent:
        def double(self, n: int) -> int:
            may_go.wait(PATIENT_S)
            return n

    run(lambda _: {"up": Silent()}, guest=False, workers=1)
    running = run(make)
    site.wait_served("t")
    with Client(str(site.host.path)) as client, ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.call, "t", "relay", {"n": 1}, server=VM)
        wait(lambda: running.agent._worker._is_working)
        running.stop()
        assert not may_go.is_set()
        may_go.set()
        assert waiting.exception(PATIENT_S) is not None


def test_a_client_in_the_guest(site: Site, run: Any) -> None:
    conductor = Conductor()
    run(lambda _: {"up": conductor, "news.error": conductor, "news.info": conductor}, guest=False)
    site.start_guest()
    with Client(str(site.directory / "agent.sock")) as client:
        assert client.call("up", "double", {"n": 4}, timeout_s=PATIENT_S) == 8
        client.cast("up", "note", {"n": 1}, timeout_s=PATIENT_S)
        client.cast("up", "note", {"n": 2}, fanout=True, timeout_s=PATIENT_S)
        client.notify("news", "e", 3, publisher_id="me", timeout_s=PATIENT_S)
        with pytest.raises(RemoteError, match="ValueError: no"):
            client.call("up", "fail", timeout_s=PATIENT_S)
        with pytest.raises(NoSuchAgent, match="serve"):
            client.call("up", "double", {"n": 1}, server="other", timeout_s=PATIENT_S)
    wait(lambda: len(conductor.noted) == 3)
    assert conductor.noted[:2] == [{"n": 1}, {"n": 2}]
    assert (conductor.noted[2]["publisher_id"], conductor.noted[2]["payload"]) == ("me", 3)


def test_what_has_expired_in_an_agents_inbox_does_not_run(site: Site, run: Any) -> None:
    """The connection has timers of its own: the daemon's Cancel may be late, or lost with it."""
    ran: list[str] = []
    is_busy, may_go = threading.Event(), threading.Event()

    class Slow:
        def stay(self) -> None:
            is_busy.set()
            may_go.wait(PATIENT_S)

        def note(self, text: str) -> None:
            ran.append(text)

    run(lambda _: {"t": Slow()})
    site.wait_served("t")
    with Client(str(site.host.path)) as client, ThreadPoolExecutor() as pool:
        busy = pool.submit(client.call, "t", "stay", server=VM)
        assert is_busy.wait(PATIENT_S)
        for send in (client.call, client.cast):
            with pytest.raises(CallTimeout):
                send("t", "note", {"text": "late"}, server=VM, timeout_s=0.2)
        time.sleep(0.5)  # the agent's clock began later than the client's, by the way there
        may_go.set()
        busy.result(PATIENT_S)
        client.call("t", "note", {"text": "in time"}, server=VM)
    assert ran == ["in time"]


def test_an_agent_on_the_host_is_known_by_its_topic(site: Site, run: Any) -> None:
    """The light agent has no server name; a fanout and a topic's turn reach it."""
    agents = [Conductor(), Conductor()]
    for agent in agents:
        run(lambda _, agent=agent: {"up": agent}, guest=False)
    with Client(str(site.host.path)) as client:
        for _ in range(6):
            client.cast("up", "note", {}, timeout_s=PATIENT_S)
        client.cast("up", "note", {}, fanout=True, timeout_s=PATIENT_S)
    wait(lambda: [len(agent.noted) for agent in agents] == [4, 4])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_agents_connection_is_touched_by_its_own_thread_alone(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    with touches_recorded(monkeypatch) as strays:
        run(lambda _: {"served": Echo()}, guest=False, workers=workers)
        caller = run(lambda _: {}, guest=False, workers=workers)
        assert caller.agent.call("served", "echo", {"x": 1}, timeout_s=PATIENT_S) == 1
        caller.agent.cast("served", "echo", {"x": 2}, timeout_s=PATIENT_S)
    assert strays == []


class Echo:
    def echo(self, x: int) -> int:
        return x


def test_what_was_given_up_before_the_agent_ran_is_not_sent_then(site: Site) -> None:
    """Who called was told that nothing was sent."""
    agent = Agent(str(site.host.path))
    sent: list[object] = []
    watched: Any = SimpleNamespace(
        submit=lambda *each: sent.append(each), path=agent._connection.path
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "_connection", watched)
        with pytest.raises(LinkDown, match="not running"):
            agent.call("up", "double", timeout_s=0.1)
    agent.loop.call_later(0.2, agent.stop)
    agent.run()
    assert sent == []


def test_an_agent_that_stops_waits_for_no_answer_to_its_workers(site: Site, run: Any) -> None:
    def make(agent: Agent) -> dict[str, object]:
        return {"t": Patient(agent)}

    class Patient:
        def __init__(self, agent: Agent) -> None:
            self.agent = agent

        def relay(self) -> Any:
            return self.agent.call("up", "never", timeout_s=3600)

    class Silent:
        def __init__(self) -> None:
            self.is_asked, self.is_over = threading.Event(), threading.Event()

        def never(self) -> None:
            self.is_asked.set()
            self.is_over.wait(PATIENT_S)

    silent = Silent()
    run(lambda _: {"up": silent}, guest=False, workers=1)
    running = run(make, guest=False, workers=1)
    with Client(str(site.host.path)) as client, ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.call, "t", "relay", timeout_s=PATIENT_S)
        assert silent.is_asked.wait(PATIENT_S)
        running.stop()
        silent.is_over.set()
        assert waiting.exception(PATIENT_S) is not None


def test_calls_that_are_over_leave_no_timers_for_their_heartbeats(site: Site, run: Any) -> None:
    running = run(lambda _: {"up": Echo()}, guest=False, workers=2)
    caller = run(lambda _: {}, guest=False).agent
    for number in range(300):
        body = encode_invocation("echo", {"x": number})
        identity = number.to_bytes(16)
        request = Request(identity, CALL, 60_000, 3_600_000, "openstack", "up", "", body)
        assert isinstance(caller._outcome_of(request, PATIENT_S), Answered)
    wait(lambda: not running.agent._serving._beats)
    assert len(running.agent.loop._timers) < 200


def test_an_agent_that_has_ended_says_so(site: Site, run: Any) -> None:
    running = run(lambda _: {}, guest=False)
    running.stop()
    with pytest.raises(LinkDown, match="ended"):
        running.agent.call("up", "double", timeout_s=3600)
