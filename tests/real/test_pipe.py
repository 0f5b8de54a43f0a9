"""Casts from a stock client, through a broker and down a unix pipe, to an agent: one way."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import Account, end_process, tail, wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.rabbit import RabbitServer

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

WAIT_S = 90.0
ROOT = Path(__file__).parents[2]
NAME = "behind-the-pipe"
POLICY = f"mode name:{NAME} one-way-cast\nlisten name:{NAME} demo allow\n"
_runs = itertools.count(1)


class Rig:
    """Everything but the broker: the host's daemon, the reader, and its agent."""

    def __init__(self, directory: Path, rabbit: RabbitServer) -> None:
        from tests.rig.compute import HostDaemon

        self.directory = directory
        self.pipe = directory / "pipe"
        self.host = HostDaemon(
            directory, "host", "", rabbit.url, options=[f"channels = {NAME}=pipe:{self.pipe}"]
        )
        self.host.policy.write_text(POLICY)
        self._journal = directory / "ran"
        self._agents = str(directory / "agent.sock")
        self._log = directory / "programs.log"
        self._programs: dict[str, Any] = {}

    def start(self, name: str) -> None:
        """The daemon that reads the pipe, or the agent."""
        port = ("--port", f"pipe:{self.pipe}", "--socket", self._agents)
        agent = (str(ROOT / "tests" / "rig" / "counting_agent.py"), "demo", str(self._journal))
        words = {
            "daemon": ("-m", "vchan.guest.daemon", *port),
            "agent": (*agent, self._agents),
        }[name]
        environment = {"PYTHONPATH": str(ROOT)}
        self._programs[name] = Account(None).spawn(
            [sys.executable, *words], environment=environment, log=self._log, cwd=ROOT
        )

    def start_both(self) -> None:
        """The reader drops what no agent serves soon after its start, and nobody behind a pipe can
        be told: so the agent is there before it, looking for it."""
        before = self._agent_lines()
        self.start("agent")
        wait_until(
            lambda: self._agent_lines() > before,
            timeout_s=WAIT_S,
            interval_s=0.05,
            failure=lambda: f"the agent says nothing: {tail(self._log)}",
        )
        self.start("daemon")

    def _agent_lines(self) -> int:
        return self._log.read_text().count("vchan agent: ") if self._log.exists() else 0

    def kill(self, name: str) -> None:
        """End it without a word."""
        end_process(self._programs.pop(name), grace_s=0.0)

    def end(self) -> None:
        for name in list(self._programs):
            self.kill(name)
        self.host.stop()

    def ran(self, sender: str) -> list[int]:
        """What the agent ran for a sender, in order."""
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        return [int(line.split()[1]) for line in lines if line.split()[0] == sender]

    def wait_ran(self, sender: str, number: int) -> list[int]:
        """Wait until it has run this one."""
        wait_until(
            lambda: number in self.ran(sender),
            timeout_s=WAIT_S,
            interval_s=0.05,
            failure=lambda: f"{self.ran(sender)[-5:]}\n{tail(self._log)}\n{tail(self.host.log)}",
        )
        return self.ran(sender)


@pytest.fixture(scope="module")
def rabbit(short_directory: Path) -> Iterator[RabbitServer]:
    from tests.rig.rabbit import RabbitServer

    directory = short_directory / "pipe-r"
    directory.mkdir()
    with RabbitServer(directory) as rabbit:
        yield rabbit


@pytest.fixture
def rig(short_directory: Path, rabbit: RabbitServer) -> Iterator[Rig]:
    directory = short_directory / f"pipe{next(_runs)}"
    directory.mkdir()
    rig = Rig(directory, rabbit)
    try:
        rig.host.start()
        rig.start_both()
        yield rig
    finally:
        rig.end()


@pytest.fixture(scope="module")
def client(rabbit: RabbitServer) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oslo's own deprecations
        import oslo_messaging
        from oslo_config import cfg

        conf = cfg.CONF
        conf([], project="vchan-test", default_config_files=[], default_config_dirs=[])
        transport = oslo_messaging.get_rpc_transport(conf, url=rabbit.url)
        client = oslo_messaging.get_rpc_client(transport, oslo_messaging.Target(topic="demo"))
    yield client
    transport.cleanup()


def consuming(rig: Rig) -> None:
    """The policy says what is served: nobody behind a pipe can."""
    rig.host.wait_ready(NAME, topics=["demo"])


def cast(client: Any, sender: str, numbers: range) -> None:
    to = client.prepare(server=NAME)
    for number in numbers:
        to.cast({}, "note", sender=sender, number=number)


def test_casts_run_once_in_order(rig: Rig, client: Any) -> None:
    consuming(rig)
    cast(client, "a", range(300))
    assert rig.wait_ran("a", 299) == list(range(300))


def test_large_casts_pass(rig: Rig, client: Any) -> None:
    consuming(rig)
    to = client.prepare(server=NAME)
    for number in range(5):
        args = {"sender": "large", "number": number, "payload": "x" * 200_000}
        # `echo` takes a payload; its answer goes nowhere.
        to.cast({}, "echo", **args)
    assert rig.wait_ran("large", 4) == list(range(5))


def test_a_call_is_refused_at_once(rig: Rig, client: Any) -> None:
    consuming(rig)
    with pytest.raises(Exception, match="is not listened to"):
        client.prepare(server=NAME, timeout=WAIT_S).call({}, "echo", sender="b", number=1)
    assert rig.ran("b") == []


def test_casts_wait_for_a_reader_that_is_away(rig: Rig, client: Any) -> None:
    """In the pipe, then in the host's daemon, then in the broker: nothing is lost by it."""
    consuming(rig)
    cast(client, "c", range(50))
    rig.wait_ran("c", 49)
    rig.kill("agent")
    rig.kill("daemon")
    cast(client, "c", range(50, 2000))
    rig.start_both()
    assert rig.wait_ran("c", 1999) == list(range(2000))


def test_a_reader_that_dies_loses_what_it_had_read_and_says_so(rig: Rig, client: Any) -> None:
    consuming(rig)
    numbers = itertools.count()
    for _ in range(3):
        first = next(numbers)
        cast(client, "d", range(first, first + 200))
        rig.kill("daemon")
        rig.start("daemon")
        numbers = itertools.count(first + 200)
    last = next(numbers)

    def arrives() -> bool:
        cast(client, "d", range(last, last + 1))
        return last in rig.ran("d")

    wait_until(arrives, timeout_s=WAIT_S, interval_s=0.5, failure=lambda: str(rig.ran("d")[-5:]))
    ran = [number for number in rig.ran("d") if number != last]
    assert ran == sorted(set(ran)), "twice, or out of order"


def test_the_host_s_daemon_is_killed(rig: Rig, client: Any) -> None:
    """What it had not written, the broker hands out again; what it had in part, too: to a reader
    that knows the id."""
    consuming(rig)
    for first in range(0, 600, 200):
        cast(client, "e", range(first, first + 200))
        rig.host.restart()
        consuming(rig)
    ran = rig.wait_ran("e", 599)
    assert list(dict.fromkeys(ran)) == list(range(600)), "lost or reordered"
    assert ran == sorted(set(ran)), "twice"
