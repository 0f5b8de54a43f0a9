"""Who remembers a call dies, or nobody serves it: what its caller is told stays true.

Real RabbitMQ, host daemon, guest daemon and agents, on a channel without a VM.
"""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.rig import rig_directory, tail, wait_until
from tests.rig.broker_peers import Clients, wait_for_queue
from tests.rig.compute import ROOT, HostDaemon
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_rabbit
from vchan.rpc.dispatcher import LINGER_S, RESTART_GRACE_S
from vchan.rpc.messages import Topic

MISSING = missing_for_rabbit()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(MISSING), reason=str(MISSING)),
    # As in test_broker.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
    ),
]
WAIT_S = 30.0
TIMEOUT_S = 40
BACK_S = 3.0
"""Whatever still runs by mistake, has run by then."""


class Guest:
    """A guest's daemon and its agent, as processes beside a host's daemon.

    `topic` is served by the agent that may die, "other" by one that stays.
    """

    def __init__(
        self, directory: Path, host: HostDaemon, rabbit: RabbitServer, clients: Clients
    ) -> None:
        self.directory = directory
        self.host = host
        self.topic = Topic("openstack", f"topic-{uuid.uuid4().hex[:8]}")
        self.journal = directory / "ran"
        self.journal.touch()
        self._rabbit = rabbit
        self._clients = clients
        self._pool = ThreadPoolExecutor(100)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *names: str) -> None:
        """Start "daemon", "agent" or "other"."""
        socket = str(self.directory / "agent.sock")
        words = {
            "daemon": ["vchan.guest.daemon", "--port", f"listen:{self.port}", "--socket", socket],
            "agent": ["tests.rig.noting_agent", socket, str(self.journal), self.topic.name],
            "other": ["tests.rig.noting_agent", socket, str(self.journal), "other"],
        }
        for name in names:
            with (self.directory / f"{name}.log").open("ab") as log:
                self._processes[name] = subprocess.Popen(
                    [sys.executable, "-m", *words[name]],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    @property
    def port(self) -> Path:
        return self.directory / "port"

    def kill(self, *names: str) -> None:
        """End these at once."""
        for name in names:
            self._processes[name].kill()
        for name in names:
            self._processes.pop(name).wait()
        if "daemon" in names:
            self.port.unlink(missing_ok=True)

    def signal(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def call(self, name: str, **args: Any) -> Future[Any]:
        """Ask the agent that may die."""
        client = self._clients.client(self.topic, server="good", timeout=TIMEOUT_S)
        return self._pool.submit(client.call, {}, "note", name=name, **args)

    def cast(self, name: str) -> None:
        self._clients.client(self.topic, server="good").cast({}, "note", name=name)

    def ran(self) -> list[str]:
        """What was written down."""
        return self.journal.read_text().split("\n")[:-1]

    def wait_for(self, reached: Callable[[], bool]) -> None:
        wait_until(
            reached,
            timeout_s=WAIT_S,
            interval_s=0.05,
            failure=lambda: f"{self.ran()}\n{tail(self.host.log)}",
        )

    def is_served(self) -> None:
        self.host.wait_ready("good", topics=[self.topic.name, "other"])
        # The host has asked for the queue; a call that comes before it is there is lost.
        wait_for_queue(self._rabbit, f"{self.topic.name}.good", ready=0, unacknowledged=0)

    def close(self) -> None:
        self.kill(*self._processes)
        self._pool.shutdown()


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    with rig_directory() as directory, RabbitServer(directory / "rabbit") as server:
        yield server


@pytest.fixture(scope="module")
def clients(rabbit: RabbitServer) -> Iterator[Clients]:
    clients = Clients(rabbit.url)
    yield clients
    clients.close()
    gc.collect()


@pytest.fixture
def guest(rabbit: RabbitServer, clients: Clients) -> Iterator[Guest]:
    with rig_directory() as directory:
        (directory / "host").mkdir()
        channels = f"channels = good=connect:{directory}/port"
        host = HostDaemon(directory / "host", "host", "", rabbit.url, options=[channels])
        guest = Guest(directory, host, rabbit, clients)
        guest.start("daemon", "agent", "other")
        host.start()
        try:
            guest.is_served()
            assert guest.call("warm").result(WAIT_S) == "warm"
            yield guest
        finally:
            guest.close()
            host.stop()


def failure_of(call: Future[Any]) -> str:
    """The class of the exception that the caller gets."""
    error: Any = call.exception(WAIT_S)
    assert type(error).__name__ == "RemoteError", repr(error)
    return str(error.exc_type)


@pytest.mark.parametrize("restarted", ["nothing", "host", "guest", "both"])
def test_a_call_that_has_not_run_never_runs(guest: Guest, restarted: str) -> None:
    """Nobody serves it for too long; its caller is told so; then it is served again."""
    guest.kill("agent")
    calls = [guest.call(f"call {n}") for n in range(3)]
    assert {failure_of(call) for call in calls} == {"NoSuchAgent"}
    if restarted in ("host", "both"):
        guest.host.restart()
    if restarted in ("guest", "both"):
        guest.kill("daemon")
        guest.start("daemon")
    guest.start("agent")
    guest.is_served()
    assert guest.call("after").result(WAIT_S) == "after"
    time.sleep(BACK_S)  # that nothing happens is what is tested
    assert guest.ran() == ["warm", "after"]


def test_calls_that_come_while_the_topic_is_given_up(guest: Guest) -> None:
    """Some before, some after: whichever is refused does not run, and none is left hanging."""
    guest.kill("agent")
    calls: dict[str, Future[Any]] = {}
    until_s = time.monotonic() + LINGER_S + 1.0
    while time.monotonic() < until_s:
        calls[f"call {len(calls)}"] = guest.call(f"call {len(calls)}")
        time.sleep(0.1)
    guest.start("agent")
    guest.is_served()
    told = {name: call.exception(TIMEOUT_S + 5.0) for name, call in calls.items()}
    time.sleep(BACK_S)
    ran = set(guest.ran())
    assert all((error is None) is (name in ran) for name, error in told.items()), told
    assert any(error is not None for error in told.values())
    assert len(guest.ran()) == len(ran)


@pytest.mark.parametrize("host_too", [False, True])
def test_a_call_runs_once_when_daemon_and_agent_die_together(guest: Guest, host_too: bool) -> None:
    call = guest.call("once", takes_s=60.0)
    guest.wait_for(lambda: "once" in guest.ran())
    guest.kill("agent", "daemon")
    if host_too:
        guest.host.restart()
    guest.start("daemon", "agent")
    assert failure_of(call) == "AgentGone"
    assert guest.call("after").result(WAIT_S) == "after"
    assert guest.ran() == ["warm", "once", "after"]


def test_a_call_that_an_agent_survives_with_is_answered(guest: Guest) -> None:
    """The daemon alone dies: what the agent has it answers, what is on its way it runs."""
    calls = [guest.call("long", takes_s=1.0)]
    guest.wait_for(lambda: "long" in guest.ran())
    guest.kill("daemon")
    calls += [guest.call(f"call {n}") for n in range(5)]
    time.sleep(0.3)  # they are with the host, which has not seen that nobody reads
    guest.start("daemon")
    assert [call.result(WAIT_S) for call in calls] == ["long", *(f"call {n}" for n in range(5))]
    assert sorted(guest.ran()) == sorted(["warm", "long", *(f"call {n}" for n in range(5))])


def test_a_cast_that_may_run_a_second_time_is_told_so(guest: Guest) -> None:
    guest.signal("agent", signal.SIGSTOP)
    guest.cast("cast")
    guest.wait_for(lambda: guest.host.status("good")["requests"]["open"] == 1)
    guest.kill("agent", "daemon")
    guest.start("daemon", "agent")
    guest.wait_for(lambda: len(guest.ran()) == 2)
    time.sleep(RESTART_GRACE_S)
    guest.cast("later")
    guest.wait_for(lambda: len(guest.ran()) == 3)
    assert guest.ran() == ["warm", "cast marked", "later"]
