"""Rolling upgrades: an end of this release with one of the release before, or after.

The wire of version 1 is frozen in tests/vectors/v1: whatever else changes, who speaks version 1
reads and writes those bytes. The release after is `tests.rig.newer`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import rig_directory, wait_until
from tests.rig.hosting import HostEnd
from tests.rig.newer import session_type
from tests.unit.cable import Cable
from tests.unit.pair import GUEST_INSTANCE, HOST_INSTANCE, Entropy, Pair
from vchan.host.vm.channel import End
from vchan.rpc import messages
from vchan.session import (
    VERSION,
    Config,
    Opened,
    Received,
    Refused,
    Role,
    Session,
    State,
    Violation,
)
from vchan.wire.frames import NO_KEY, Decoder, Key, decode_greeting

ROOT = Path(__file__).parents[2]
FROZEN = ROOT / "tests" / "vectors" / "v1"
NOW_S = 0.0
WAIT_S = 60.0


def frozen(name: str) -> Any:
    return json.loads((FROZEN / f"{name}.json").read_text())


# ---------------------------------------------------------------- version 1 is frozen


@pytest.mark.skipif(VERSION != 1, reason="what this release writes is another version")
@pytest.mark.parametrize("name", ["frames", "greetings", "messages", "decoding"])
def test_what_was_written_as_version_1_is_written_so_still(name: str) -> None:
    """Vectors may be added; none may change or go."""
    current = json.loads((FROZEN.parent / f"{name}.json").read_text())
    for key, value in frozen(name).items():
        if isinstance(value, list):
            assert [vector for vector in value if vector not in current[key]] == []
        else:
            assert current[key] == value


def test_messages_of_version_1_are_read() -> None:
    for vector in frozen("messages")["messages"]:
        message = messages.decode(bytes.fromhex(vector["message"]))
        assert not isinstance(message, messages.BadMessage | messages.Unknown)
        assert type(message).__name__ == vector["kind"]
        assert messages.encode(message) == bytes.fromhex(vector["message"])


def test_greetings_of_version_1_are_read() -> None:
    for vector in frozen("greetings")["greetings"]:
        greeting = decode_greeting(bytes.fromhex(vector["payload"]))
        assert greeting is not None
        for name, value in vector["fields"].items():
            found = getattr(greeting, name)
            assert value == (found.hex() if isinstance(found, bytes) else found)


def test_frames_of_version_1_are_read() -> None:
    vectors = frozen("frames")["frames"]
    assert vectors
    for vector in vectors:
        decoder = Decoder()
        decoder.key = NO_KEY
        if vector["header_seed"] or vector["payload_seed"]:
            decoder.key = Key(vector["header_seed"], vector["payload_seed"])
        (frame,) = decoder.receive_data(bytes.fromhex(vector["frame"]))
        for name in ("kind", "flags", "stream", "total", "seq", "ack", "credit"):
            assert getattr(frame, name) == vector[name]
        assert frame.payload == bytes.fromhex(vector["payload"])


@pytest.mark.parametrize("versions", [(1, 1), (1, 2)])
@pytest.mark.parametrize("role", list(Role))
def test_a_recorded_peer_of_version_1_is_served(role: Role, versions: tuple[int, int]) -> None:
    """One end of the frozen conversation is played from its record; the other is this release's,
    or the next one's."""
    story = frozen("conversation")
    own = role.name.lower()
    nonces = iter(bytes.fromhex(nonce) for nonce in story[f"{own}_nonces"])
    config = Config(role, f"{own}-instance".ljust(16, "-").encode(), own)
    session = session_type(*versions)(config, lambda _: next(nonces))
    events: list[Any] = []
    session.open(NOW_S)
    message = b"question" if role is Role.HOST else b"answer"
    peers_steps = [step for step in story["steps"] if step["from"] != own]
    first = [step for step in peers_steps if "opened their stream" in step["note"]]
    session.data_to_send()
    for step in first:
        events += session.receive_data(raw(step["bytes"]), NOW_S)
        session.data_to_send()
    assert session.state is State.OPEN
    assert session.peer is not None
    assert session.peer.version == 1
    session.send(message, 1)
    session.data_to_send()
    for step in peers_steps[len(first) :]:
        events += session.receive_data(raw(step["bytes"]), NOW_S)
        session.data_to_send()
    heard = [event.message for event in events if isinstance(event, Received)]
    assert (b"answer" if role is Role.HOST else b"question") in heard
    assert not [event for event in events if isinstance(event, Violation | Refused)]


def raw(pieces: list[Any]) -> bytes:
    """Bytes as vectors have them."""
    parts = [bytes(piece) if isinstance(piece, int) else bytes.fromhex(piece) for piece in pieces]
    return b"".join(parts)


# ---------------------------------------------------------------- sessions of two releases

OLD, BOTH, NEW = (1, 1), (1, 2), (2, 2)


def make_pair(host: tuple[int, int], guest: tuple[int, int]) -> Pair:
    """Two ends that speak these versions."""
    ends = {
        Role.HOST: (host, HOST_INSTANCE, "compute-7"),
        Role.GUEST: (guest, GUEST_INSTANCE, "web-1"),
    }
    sessions = {}
    for role, (versions, instance, name) in ends.items():
        kind = Session if versions == OLD else session_type(*versions)
        sessions[role] = kind(Config(role, instance, name), Entropy(name))
    return Pair(sessions[Role.HOST], sessions[Role.GUEST])


@pytest.mark.parametrize(
    ("host", "guest", "version"),
    [(OLD, BOTH, 1), (BOTH, OLD, 1), (BOTH, BOTH, 2), (BOTH, NEW, 2), (NEW, BOTH, 2)],
)
def test_neighbours_agree_on_the_newest_that_both_speak(
    host: tuple[int, int], guest: tuple[int, int], version: int
) -> None:
    pair = make_pair(host, guest).connect()
    for end, peer in pair.ends():
        assert end.session.peer is not None
        assert end.session.peer.version == version
        end.session.send(b"x" * 100_000, 3)
        pair.settle()
        assert peer.received(3) == [b"x" * 100_000]
        assert not end.of(Violation)


@pytest.mark.parametrize(("host", "guest"), [(OLD, NEW), (NEW, OLD)])
def test_who_skips_a_release_is_refused_and_told_what_to_do(
    host: tuple[int, int], guest: tuple[int, int]
) -> None:
    pair = make_pair(host, guest)
    pair.open()
    pair.settle()
    for end, _ in pair.ends():
        (refused,) = end.of(Refused)
        assert "upgrade the older one" in refused.reason
        assert end.session.state is State.REFUSED


def test_a_session_begins_when_the_older_one_has_been_upgraded() -> None:
    pair = make_pair(OLD, NEW)
    pair.open()
    pair.settle()
    upgraded = make_pair(BOTH, NEW).host.session
    pair.host.session = upgraded
    pair.open(pair.host)
    pair.settle()
    pair.advance(60)
    assert pair.host.session.state is pair.guest.session.state is State.OPEN


@pytest.mark.parametrize("versions", [OLD, BOTH])
def test_what_a_later_release_adds_to_messages_is_passed_over(versions: tuple[int, int]) -> None:
    """Unknown flags are ignored; an unknown kind is a bad message, and nobody dies of it."""
    pair = make_pair(versions, BOTH).connect()
    request = messages.Request(b"i" * 16, 0, 0, 0, "nova", "agent", "", b"{}")
    data = bytearray(messages.encode(request))
    data[1] |= 0x80
    pair.guest.session.send(bytes(data), 1)
    pair.guest.session.send(b"\xee from the future", 1)
    pair.settle()
    known, unknown = pair.host.received(1)
    assert isinstance(messages.decode(known), messages.Request)
    assert isinstance(messages.decode(unknown), messages.Unknown)


# ---------------------------------------------------------------- daemons of two releases


class Machine:
    """A guest's daemon and an agent, as processes; each can be replaced while the other runs."""

    def __init__(self, directory: Path, port: Path) -> None:
        self._directory = directory
        self._socket = str(directory / "agent.sock")
        self._words = ["--port", f"unix:{port}", "--socket", self._socket]
        self._log = (directory / "log").open("ab")
        self._daemon: subprocess.Popen[bytes] | None = None
        agent = [sys.executable, str(ROOT / "tests/rig/counting_agent.py"), "demo", ""]
        self._agent = subprocess.Popen(
            [*agent, self._socket],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=self._log,
            stderr=self._log,
        )

    def run(self, versions: tuple[int, int]) -> None:
        """Replace the daemon, as an upgrade of its package does."""
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(WAIT_S)
        oldest, newest = map(str, versions)
        words = [] if versions == OLD else [oldest, newest]
        module = "tests.rig.newer" if words else "vchan.guest.daemon"
        command = [sys.executable, "-m", module, *words, *self._words]
        self._daemon = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log)

    def log(self) -> str:
        """What both said."""
        return (self._directory / "log").read_text()

    def close(self) -> None:
        """End both."""
        for process in (self._agent, self._daemon):
            if process is not None:
                process.kill()
                process.wait()
        self._log.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    with rig_directory() as directory:
        yield directory


@pytest.fixture
def cable(directory: Path) -> Iterator[Cable]:
    with Cable(directory) as cable:
        yield cable


@pytest.fixture
def machine(directory: Path, cable: Cable) -> Iterator[Machine]:
    machine = Machine(directory, cable.guest)
    yield machine
    machine.close()


@pytest.fixture
def host_of(cable: Cable) -> Callable[[tuple[int, int]], HostEnd]:
    """Makes the host's end of a release."""

    def make(versions: tuple[int, int]) -> HostEnd:
        kind = Session if versions == OLD else session_type(*versions)
        return HostEnd(cable.host, end=End(session=kind))

    return make


def echo(host: HostEnd, number: int) -> bool:
    answer = host.call("demo", "echo", sender="test", number=number)
    return bool(json.loads(answer) == ["test", number, ""])


def wait_topic(host: HostEnd, machine: Machine) -> None:
    host.wait_ready()
    wait_until(
        lambda: "openstack/demo" in host.topics(),
        timeout_s=WAIT_S,
        interval_s=0.05,
        failure=machine.log,
    )


def version_of(host: HostEnd) -> int:
    peer = host.run(lambda: host.channel._session.peer)
    assert peer is not None
    return peer.version


@pytest.mark.parametrize(
    "steps",
    [
        # (guest, host, the version they agree on)
        [(OLD, OLD, 1), (OLD, BOTH, 1), (BOTH, BOTH, 2), (BOTH, NEW, 2)],
        [(OLD, OLD, 1), (BOTH, OLD, 1), (BOTH, BOTH, 2), (BOTH, NEW, 2)],
    ],
    ids=["hosts first", "guests first"],
)
def test_daemons_are_upgraded_one_after_the_other(
    machine: Machine,
    host_of: Callable[[tuple[int, int]], HostEnd],
    steps: list[tuple[tuple[int, int], tuple[int, int], int]],
) -> None:
    """The agent, which nobody upgrades, is called at every step, and runs each call once."""
    calls, running = 0, None
    for guest, host_versions, version in steps:
        if guest != running:
            machine.run(guest)
            running = guest
        with host_of(host_versions) as host:
            wait_topic(host, machine)
            assert version_of(host) == version
            for _ in range(5):
                assert echo(host, calls)
                calls += 1
            ran = host.call("demo", "executed", sender="test", start=0, count=1000)
            assert json.loads(ran) == list(range(calls))


def test_a_guest_that_is_two_releases_behind_is_refused_until_upgraded(
    machine: Machine, host_of: Callable[[tuple[int, int]], HostEnd]
) -> None:
    machine.run(OLD)
    with host_of(NEW) as host:
        wait_until(
            lambda: any("upgrade the older one" in line for line in host.log),
            timeout_s=WAIT_S,
            interval_s=0.05,
            failure=machine.log,
        )
        machine.run(BOTH)
        wait_topic(host, machine)
        assert version_of(host) == 2
        assert echo(host, 1)


def test_an_agent_that_is_two_releases_behind_is_told(
    machine: Machine, host_of: Callable[[tuple[int, int]], HostEnd]
) -> None:
    """An agent keeps the library that it has loaded, until it is restarted."""
    machine.run(NEW)
    with host_of(NEW) as host:
        host.wait_ready()
        wait_until(
            lambda: "agent speaks protocol versions 1 to 1" in machine.log(),
            timeout_s=WAIT_S,
            interval_s=0.05,
            failure=machine.log,
        )


def test_opened_names_the_version() -> None:
    pair = make_pair(BOTH, OLD).connect()
    (event,) = pair.host.of(Opened)
    assert event.peer.version == 1
