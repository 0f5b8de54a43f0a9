"""The examples: agents in several languages, each called through both daemons; and a caller that is
used wrongly: it says so in a line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.rig.ports import claim_ports
from vchan.client import Client
from vchan.errors import RemoteError

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
WAIT_S = 60.0


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", [(), ("vm",), ("--help",), ("-x", "/bin/true")])
def test_run_in_guest_says_what_it_wants(words: tuple[str, ...]) -> None:
    done = run("run_in_guest.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: run_in_guest.py VM /PROGRAM [ARGUMENT ...]\n"


@pytest.mark.skipif(Path("/run/vchan/host.sock").exists(), reason="a vchan-host runs here")
def test_run_in_guest_without_a_daemon() -> None:
    done = run("run_in_guest.py", "vm", "/bin/true")
    assert done.returncode == 1
    assert done.stderr.startswith("run_in_guest.py: /run/vchan/host.sock: ")
    assert done.stderr.count("\n") == 1


# --- agents

HTTP = ("--http", "PORT")
AGENTS: list[tuple[str, str, tuple[str, ...], tuple[str, ...], str, dict[str, Any], Any]] = [
    # topic, what must be installed, options, command, a method, its arguments, what it returns
    ("agent", "python3", (), ("agent.py",), "echo", {"x": 1}, {"x": 1}),
    ("aio", "python3", (), ("aio_agent.py",), "later", {"s": 0.01}, "done"),
    ("oslo", "python3", (), ("oslo_agent.py",), "echo", {"x": [1, "ä"]}, {"x": [1, "ä"]}),
    ("shell", "wget", HTTP, ("sh", "agent.sh"), "shout", {"text": "hello"}, "HELLO"),
    ("shell", "wget", HTTP, ("bash", "agent.sh"), "shout", {"text": "hello"}, "HELLO"),
    ("node", "node", HTTP, ("node", "agent.mjs"), "later", {"ms": 5}, "done"),
    ("go", "go", HTTP, ("go", "run", "agent.go"), "shout", {"text": "hello"}, "HELLO"),
]


@pytest.mark.parametrize(
    ("topic", "needs", "options", "command", "method", "args", "result"),
    AGENTS,
    ids=[" ".join(each[3]) for each in AGENTS],
)
def test_an_agent_of_the_examples(
    topic: str,
    needs: str,
    options: tuple[str, ...],
    command: tuple[str, ...],
    method: str,
    args: dict[str, Any],
    result: Any,
) -> None:
    if shutil.which(needs) is None:
        pytest.skip(f"{needs} is not installed")
    pytest.importorskip("amqp", reason='needs pip install "vchan[dev]"')
    pytest.importorskip("oslo_messaging", reason='needs pip install "vchan[dev,oslo]"')
    from tests.unit.test_dev import Dev

    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        (port,) = claim_ports(1)
        words = tuple(
            str(EXAMPLES / word) if (EXAMPLES / word).is_file() else word for word in command
        )
        options = tuple(word.replace("PORT", str(port)) for word in options)
        dev = Dev(Path(name), *options, command=words)
        try:
            dev.wait_said(f"topics served: {topic}")
            with Client(dev.place / "host.sock") as client:
                asked: Any = {"server": "dev", "timeout_s": WAIT_S}
                assert client.call(topic, method, args, **asked) == result
                client.cast(topic, "note" if topic != "aio" else "echo", {"text": "noted"}, **asked)
                with pytest.raises(RemoteError, match=r"no_such|no method|only shout|has no"):
                    client.call(topic, "no_such", **asked)
                assert client.call(topic, method, args, **asked) == result
            if topic not in ("aio", "shell"):
                dev.wait_said("noted")
        finally:
            status = dev.end()
            print(dev.said)
        assert (status, dev.processes()) == (0, [])


def test_the_examples_are_named_where_authors_look() -> None:
    page = (ROOT / "docs" / "authors.md").read_text()
    names = {path.name for path in EXAMPLES.glob("*agent*.*") if path.is_file()}
    assert {name for name in names if f"examples/{name}" not in page} == set()


def test_the_trap_of_oslo_messagings_global_configuration() -> None:
    """oslo_agent.py says what happens with a configuration of one's own: is it still so?"""
    pytest.importorskip("oslo_messaging", reason='needs pip install "vchan[oslo]"')
    program = """
import json, warnings
warnings.simplefilter("ignore")
import oslo_messaging
from oslo_config import cfg
conf = cfg.ConfigOpts()
conf([], project="x", default_config_files=[])
transport = oslo_messaging.get_rpc_transport(conf, "vchan:///tmp/none.sock")
make = getattr(oslo_messaging, "get_rpc_client", oslo_messaging.RPCClient)
try:
    make(transport, oslo_messaging.Target(topic="x"), timeout=0.1, retry=0).call({}, "x")
except Exception as error:
    print(json.dumps(type(error).__name__))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    release = subprocess.run(
        [sys.executable, "-m", "pip", "show", "oslo.messaging"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    if "Version: 18." in release:
        assert json.loads(done.stdout) == "NoSuchOptError"
