"""A method that forks: its child must not serve beside it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.unit.oslo_site import VM, Site, made_site
from vchan.client import Client

WAIT_S = 30.0
PROGRAM: Final = """
import asyncio, os, sys
from vchan import aio, client
from vchan.errors import LinkDown

class Endpoint:
    def pid(self):
        return os.getpid()

    def come_back(self):
        return os.fork()

    def leave(self, status):
        pid = os.fork()
        if not pid:
            sys.exit(status)
        return pid

    def raises(self):
        pid = os.fork()
        if not pid:
            raise ValueError("in the child")
        return pid

    def ask(self):
        pid = os.fork()
        if pid:
            return pid
        try:
            agent.call("service", "method")
        except LinkDown as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)

    def status_of(self, pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

kind, path = sys.argv[1:]
if kind == "aio":
    agent = aio.Agent(path)
    agent.serve("agent", Endpoint())
    asyncio.run(agent.run())
else:
    agent = client.Agent(path, workers=2 if kind == "workers" else 0)
    agent.serve("agent", Endpoint())
    agent.run()
"""


@pytest.fixture
def site() -> Iterator[Site]:
    with made_site() as site:
        site.start_guest()
        yield site


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["loop", "workers", "aio"])
def test_a_method_s_child_does_not_serve(site: Site, tmp_path: Path, kind: str) -> None:
    said = tmp_path / "said"
    words = [sys.executable, "-c", PROGRAM, kind, str(site.directory / "agent.sock")]
    with said.open("w") as stderr, subprocess.Popen(words, stderr=stderr) as agent:
        try:
            site.wait_served("agent")
            with Client(str(site.host.path)) as client:

                def call(method: str, **args: object) -> object:
                    return client.call("agent", method, args, server=VM, timeout_s=WAIT_S)

                asked: list[tuple[str, dict[str, Any], int]] = [
                    ("come_back", {}, 1),
                    ("leave", {"status": 3}, 3),
                    ("leave", {"status": None}, 0),
                    ("leave", {"status": "a text"}, 1),
                    ("raises", {}, 1),
                    *([("ask", {}, 7)] if kind != "aio" else []),
                ]
                for method, args, status in asked:
                    child = call(method, **args)
                    assert child not in (0, None)
                    assert call("status_of", pid=child) == status, method
                    for _ in range(10):
                        assert call("pid") == agent.pid
        finally:
            agent.kill()
    lines = said.read_text().splitlines()
    assert lines.count("vchan agent: connected") == 1, lines
    assert "a text" in lines
    advice = "a child must end itself, by os._exit() or sys.exit()"
    forked = f"vchan agent: a method of topic agent has forked, and its child came back: {advice}"
    assert lines.count(forked) == 2
