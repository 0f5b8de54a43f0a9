"""vchan-zmq as a process beside vchan-guest, with stock ZeroMQ programs as its clients."""

from __future__ import annotations

import contextlib
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig.hosting import HostEnd
from tests.unit.cable import Cable
from tests.unit.test_guest_daemon import Program, guest_daemon
from tests.unit.test_http import Control
from vchan.errors import ConfigError
from vchan.gateways.zeromq import Options, parse_options
from vchan.rpc.in_flight import Answered, HandedBack, Taken
from vchan.rpc.messages import AGENT_GONE

zmq = pytest.importorskip("zmq")
WAIT_S = 30.0


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


class Rig:
    """A host, a guest's daemon, and vchan-zmq."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "zmq.sock"
        self._stack = contextlib.ExitStack()
        cable = self._stack.enter_context(Cable(directory))
        self.daemon = guest_daemon(directory, f"unix:{cable.guest}")
        words = ("--listen", f"ipc://{self.path}", "--agent-socket", str(directory / "agent.sock"))
        self.zmq = Program(directory / "zmq.log", "-m", "vchan.gateways.zeromq", *words)
        for program in (self.daemon, self.zmq):
            program.start()
            self._stack.callback(program.kill)
        self.host = self._stack.enter_context(HostEnd(cable.host, offer=Control))
        self.zmq.wait_log("connected")
        self.host.wait_ready()
        self._context = zmq.Context()
        self._stack.callback(self._context.term)

    def socket(self, kind: int) -> Any:
        """A program's socket."""
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{self.path}")
        self._stack.callback(socket.close, 0)
        return socket

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def rig(directory: Path) -> Iterator[Rig]:
    rig = Rig(directory)
    yield rig
    rig.close()


@pytest.fixture
def program(rig: Rig) -> Any:
    return rig.socket(zmq.REQ)


def ask(program: Any, do: str, **members: Any) -> Any:
    program.send_json({"do": do, **members})
    return program.recv_json()


def serve_demo(rig: Rig, program: Any) -> None:
    assert ask(program, "receive", topics=["demo"], wait_s=0) == {"tag": None, "requests": []}
    rig.host.wait_served("demo")


def test_a_call_and_a_cast(rig: Rig, program: Any) -> None:
    asked = {"topic": "control", "method": "echo", "args": {"x": 1}}
    assert ask(program, "call", tag=7, **asked) == {"tag": 7, "result": {"x": 1}}
    assert ask(program, "cast", topic="control", method="note") == {"tag": None}


@pytest.mark.parametrize(
    ("message", "title"),
    [
        (b"{", "BadRequest"),
        (b"[]", "BadRequest"),
        (b"{}", "BadMember"),
        (b'{"do": 7}', "BadMember"),
        (b'{"do": "dance"}', "NoSuchVerb"),
        (b'{"do": "call", "topic": "control"}', "BadMember"),
        (b'{"do": "call", "topic": "control", "method": "nobody"}', "NoSuchAgent"),
        (b'{"do": "call", "topic": "control", "method": "fail"}', "RemoteError"),
    ],
)
def test_what_cannot_be_done_is_a_problem(program: Any, message: bytes, title: str) -> None:
    program.send(message)
    assert program.recv_json()["problem"]["title"] == title
    assert ask(program, "status")["connected"] is True  # and harms nothing


def test_a_call_is_received_and_answered(rig: Rig, program: Any) -> None:
    serve_demo(rig, program)
    called = rig.host.submit("demo", "add", x=1, y=2)
    (request,) = ask(program, "receive", topics=["demo"])["requests"]
    assert (request["method"], request["args"]) == ("add", {"x": 1, "y": 2})
    assert ask(program, "reply", lease=request["lease"], result=3) == {"tag": None}
    outcome = called.result(WAIT_S)
    assert isinstance(outcome, Answered)
    assert outcome.body == b"3"


def test_a_cast_that_is_not_acknowledged_is_given_out_again(rig: Rig, program: Any) -> None:
    serve_demo(rig, program)
    cast = rig.host.cast("demo", "note", n=1)
    (first,) = ask(program, "receive", topics=["demo"], lease_s=1)["requests"]
    (second,) = ask(program, "receive", topics=["demo"])["requests"]
    assert first["id"] == second["id"]
    assert ask(program, "ack", lease=first["lease"])["problem"]["title"] == "LeaseOver"
    assert ask(program, "ack", lease=second["lease"]) == {"tag": None}
    assert isinstance(cast.result(WAIT_S), Taken)


def test_a_call_that_is_not_answered_fails(rig: Rig, program: Any) -> None:
    serve_demo(rig, program)
    called = rig.host.submit("demo", "add")
    assert len(ask(program, "receive", topics=["demo"], lease_s=1)["requests"]) == 1
    outcome = called.result(WAIT_S)
    assert isinstance(outcome, HandedBack)
    assert outcome.reason == AGENT_GONE


def test_a_dealer_asks_several_things_at_a_time(rig: Rig, program: Any) -> None:
    dealer = rig.socket(zmq.DEALER)
    dealer.send_json({"do": "receive", "tag": "waits", "topics": ["demo"]})
    for number in range(20):
        asked = {"topic": "control", "method": "echo", "args": {"n": number}}
        dealer.send_json({"do": "call", "tag": number, **asked})
    answers = [dealer.recv_json() for _ in range(20)]
    assert {each["tag"]: each["result"]["n"] for each in answers} == {n: n for n in range(20)}
    rig.host.wait_served("demo")
    called = rig.host.submit("demo", "add")
    told = dealer.recv_json()
    assert told["tag"] == "waits"
    dealer.send_json({"do": "reply", "lease": told["requests"][0]["lease"], "result": None})
    assert isinstance(called.result(WAIT_S), Answered)


def test_what_was_for_a_program_that_is_gone_goes_to_the_next(rig: Rig, program: Any) -> None:
    """At once if ZeroMQ knows that it is gone; when the lease ends if it did not yet."""
    gone = rig.socket(zmq.DEALER)
    gone.send_json({"do": "receive", "topics": ["demo"], "wait_s": WAIT_S, "lease_s": 1})
    rig.host.wait_served("demo")
    gone.close(0)
    cast = rig.host.cast("demo", "note")
    (request,) = ask(program, "receive", topics=["demo"], wait_s=WAIT_S)["requests"]
    ask(program, "ack", lease=request["lease"])
    assert isinstance(cast.result(WAIT_S), Taken)


def test_the_file_s_permissions_say_who_may(rig: Rig) -> None:
    assert stat.S_IMODE(rig.path.stat().st_mode) == 0o660


# --- options


def test_options() -> None:
    assert parse_options(["--config", "/dev/null"]) == Options()
    given = parse_options(["--listen", "ipc:///x", "--socket-mode", "0600", "--quiet"])
    assert (given.path, given.socket_mode, given.quiet) == ("/x", 0o600, True)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--listen", "tcp://127.0.0.1:5555"], "expected ipc:///PATH"),
        (["--listen", "ipc://x"], "expected ipc:///PATH"),
        (["--socket-mode", "x"], "expected an octal mode"),
        (["--agent-socket", "x"], "expected an absolute path"),
        (["--dance"], "see vchan-zmq --help"),
    ],
)
def test_wrong_options(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_options(words)


def test_pyzmq_is_asked_for_only_when_it_is_needed() -> None:
    code = """
import sys
import vchan.gateways.zeromq as program
assert "zmq" not in sys.modules
sys.modules["zmq"] = None
try:
    program.import_zmq()
except program.ConfigError as error:
    assert "vchan[zmq]" in str(error)
else:
    sys.exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
