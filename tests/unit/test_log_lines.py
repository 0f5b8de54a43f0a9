"""The daemons' log: what is said is said once."""

from __future__ import annotations

import ast
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vchan.client
from tests.unit.local_host import LocalHost
from vchan.client import Agent
from vchan.errors import RemoteError

pytest.importorskip("oslo_log", reason='oslo.log is not installed: pip install "vchan[host]"')
pytest.importorskip("amqp", reason="py-amqp is not installed")

from vchan.host.broker import broker as broker_module
from vchan.host.broker.broker import Broker
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import Disconnected
from vchan.io.streams import Stream, connect_local

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0


def wait(reached: Any) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize("part", ["host", "conductor"])
def test_nothing_is_logged_while_an_exception_is_handled(part: str) -> None:
    """oslo.log puts the exception behind such a line, which says it already."""
    found = []
    for path in sorted((ROOT / "vchan" / part).glob("*.py")):
        handlers = (
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ExceptHandler)
        )
        calls = (node for handler in handlers for node in ast.walk(handler))
        found += [
            f"{path.name}:{call.lineno}"
            for call in calls
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("LOG.warning", "LOG.error")
        ]
    assert found == []


def test_a_broker_that_is_away_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oslo_config import cfg
    from oslo_log import formatters, log

    conf = cfg.ConfigOpts()
    log.register_options(conf)
    conf([], default_config_files=[], default_config_dirs=[])
    caplog.handler.setFormatter(formatters.ContextFormatter(config=conf))
    monkeypatch.setattr(broker_module, "back_off", lambda *_: 0.01)
    posted: list[Any] = []
    config = BrokerConfig((BrokerHost("127.0.0.1", 9), BrokerHost("localhost", 9)))
    with caplog.at_level(logging.INFO):
        broker = Broker(config, posted.append)
        broker.start()
        try:
            wait(lambda: len(posted) >= 6)
        finally:
            broker.stop()
    lines = [line for line in caplog.text.splitlines() if "no connection" in line]
    assert sorted(line.partition("broker: ")[2] for line in lines) == [
        "127.0.0.1:9: [Errno 111] Connection refused; it is tried again",
        "localhost:9: [Errno 111] Connection refused; it is tried again",
    ]
    assert posted[0] == Disconnected("127.0.0.1:9: [Errno 111] Connection refused")


def test_an_agent_says_once_that_its_daemon_is_away(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = directory / "agent.sock", list[str]()
    attempts = 0

    def counting(path: str) -> Stream:
        nonlocal attempts
        attempts += 1
        return connect_local(path)

    monkeypatch.setattr(vchan.client, "connect_local", counting)
    agent = Agent(str(path), log=said.append)
    agent.serve("t", SimpleNamespace(echo=len))
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        wait(lambda: attempts >= 4)
        assert len(said) == 1
        assert said[0].startswith(f"{path}: no such socket")
        with LocalHost(path):
            wait(lambda: said[-1] == "connected")
        wait(lambda: attempts >= 7)
        wait(lambda: "no such socket" in said[-1])
        assert said.count(said[-1]) == 2
    finally:
        agent.stop()
        thread.join(WAIT_S)


@pytest.mark.parametrize(
    ("text", "said"), [("", "ValueError"), ("as asked", "ValueError: as asked")]
)
def test_no_line_ends_after_a_colon(text: str, said: str) -> None:
    """Exceptions without a text have a name."""
    assert str(RemoteError("ValueError", text, "{}")) == said
