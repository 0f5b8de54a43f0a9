"""vchan:// in processes that eventlet has patched, as OpenStack's agents are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

from tests.unit.oslo_site import ROOT, VM, Site, om, wait

pytest.importorskip("eventlet", reason="eventlet is not installed")

LIMIT_S = 60.0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path) as site:
        yield site


def command(*words: str) -> list[str]:
    python = os.environ.get("GREEN_PYTHON", sys.executable)
    return [python, "-W", "ignore", "-m", "tests.rig.green_agent", *words]


@contextmanager
def serving(site: Site, *words: str, url: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """An agent that has a topic `green`."""
    log = site.directory / "green.log"
    with log.open("wb") as out:
        args = command("serve", url or site.agent_url, "green", *words)
        agent = subprocess.Popen(args, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield agent
    except BaseException:
        print(log.read_text())
        raise
    finally:
        if agent.poll() is None:
            agent.terminate()
            try:
                agent.wait(20)
            except subprocess.TimeoutExpired:
                agent.send_signal(signal.SIGKILL)
                agent.wait()


def client(site: Site) -> Any:
    transport = om.get_rpc_transport(cfg.CONF, site.host_url)
    target = om.Target(topic="green", server=VM)
    return transport, om.get_rpc_client(transport, target, timeout=LIMIT_S)


@pytest.mark.parametrize("executor", ["eventlet", "threading"])
def test_a_patched_agent_serves_and_stops(site: Site, executor: str) -> None:
    with serving(site, executor, "0") as agent:
        site.wait_served("green")
        transport, stub = client(site)
        assert stub.call({}, "echo", x={"y": [1, None]})[0] == {"y": [1, None]}
        with pytest.raises(LookupError, match="green"):
            stub.call({}, "fail")
        transport.cleanup()
        agent.terminate()
        assert agent.wait(20) == 0


def test_a_patched_agent_that_oslo_service_forks(site: Site) -> None:
    with serving(site, "eventlet", "2") as agent:
        site.wait_served("green")
        transport, stub = client(site)
        pids: set[int] = set()

        def both_have_answered() -> bool:
            pids.add(stub.call({}, "echo", x=1)[1])
            return len(pids) == 2

        wait(both_have_answered, lambda: f"each worker has a connection of its own: {pids}")
        assert agent.pid not in pids
        transport.cleanup()
        agent.terminate()
        assert agent.wait(20) == 0


def test_a_patched_caller_waits_as_green_threads_do(site: Site) -> None:
    with serving(site, "eventlet", "0"):
        site.wait_served("green")
        done = subprocess.run(
            command("call", site.host_url, "green", VM),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["waited"] == [0.5] * 8
        assert said["took_s"] < 8 * 0.5, "one call waits for the other"
        assert said["ticks"] >= 10, "nothing else ran meanwhile"
        assert (said["fail"], said["echo"][0]) == ("green", 7)
        assert said["nobody"] == "NotDelivered"


def test_half_a_patch_is_refused_with_what_is_patched(site: Site) -> None:
    with serving(site, "threading", "0", "socket,select") as agent:
        assert agent.wait(LIMIT_S) != 0
        log = (site.directory / "green.log").read_text()
        assert "eventlet has replaced select, socket in this process, and not thread" in log
