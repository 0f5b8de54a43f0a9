"""`vchan forward`: the command and both daemons as processes, with a cable where QEMU would be."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("amqp", reason="py-amqp is not installed")

from tests.rig import tail, wait_until
from tests.rig.forwarding import ROOT, WAIT_S, Forwarding, Part, Server, Transfer, connect
from vchan.cli.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from vchan.host.policy.audit_record import NO_END
from vchan.splices import UNTAKEN_BYTES_MAX
from vchan.streams.ends import IDLE_S, PROBE_S, STREAMS_MAX
from vchan.streams.halves import SEND_BYTES_MAX, WINDOW_BYTES

POLICY = """
reply any any allow
forward name:vm tcp:22 deny
forward name:vm tcp:* allow
forward name:vm unix:/tmp/* allow
"""
ALLOW = "tcp:*, unix:/tmp/*"
MIB = 1 << 20


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def fresh(directory: Path) -> Iterator[Forwarding]:
    """For tests after which a daemon is another, or gone."""
    with Forwarding(directory, POLICY, ALLOW) as world:
        yield world


@pytest.fixture(scope="module")
def shared() -> Iterator[Forwarding]:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        Forwarding(Path(name), POLICY, ALLOW) as world,
    ):
        yield world


@pytest.fixture
def world(shared: Forwarding) -> Iterator[Forwarding]:
    """One that is left as it was found."""
    yield shared
    shared.end_forwards()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def wait_log(part: Part, *words: str) -> str:
    """The first line of its log that has all these words."""
    found: list[str] = []

    def look() -> bool:
        lines = part.log.read_text().splitlines()
        found[:] = [line for line in lines if all(word in line for word in words)]
        return bool(found)

    failure = lambda: f"{part.name} does not say {words}: {tail(part.log)}"  # noqa: E731
    wait_until(look, timeout_s=WAIT_S, interval_s=0.02, failure=failure)
    return found[0]


def wait_ended(world: Forwarding, count: int) -> list[dict[str, Any]]:
    """The ends on record, when there are so many."""

    def ended() -> list[dict[str, Any]]:
        return [row for row in world.audited() if row["verdict"] == "ended"]

    wait_until(
        lambda: len(ended()) >= count,
        timeout_s=WAIT_S,
        interval_s=0.05,
        failure=lambda: str(world.audited()),
    )
    return ended()


def is_reset(connected: socket.socket) -> bool:
    """Whether the connection ends with a reset, and not as if everything had been said."""
    try:
        while connected.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


# ---------------------------------------------------------------- it works


def test_bytes_both_ways_and_what_is_on_record(fresh: Forwarding, server: Server) -> None:
    forward, where = fresh.forward(f"0:{server.target}")
    transfers = [Transfer(where, 2 * MIB, seed) for seed in range(3)]
    assert [each.finish() for each in transfers] == [[], [], []]
    ended = wait_ended(fresh, 3)
    opened = [row for row in fresh.audited() if row["verdict"] == "allow"]
    assert {row["request"] for row in opened} == {row["request"] for row in ended}
    assert len(opened) == 3
    assert {row["rule"] for row in opened} == {f"{fresh.policy}:4"}
    assert {(row["bytes_in"], row["bytes_out"]) for row in ended} == {(2 * MIB, 2 * MIB)}
    assert {row["reason"] for row in ended} == {"both ends were done"}
    assert opened[0]["by"].startswith(f"uid {os.getuid()}, pid ")
    assert forward.interrupt() == EXIT_INTERRUPTED
    assert forward.log.read_text() == ""


def test_a_unix_socket_for_a_unix_socket(world: Forwarding, directory: Path) -> None:
    with Server(directory / "service") as server:
        forward, where = world.forward(f"{directory}/local:{server.target}")
        assert where == f"{directory}/local"
        assert Transfer(where, MIB).finish() == []
        assert forward.interrupt() == EXIT_INTERRUPTED
        assert not Path(where).exists()


def test_who_has_said_all_still_hears_the_answer(world: Forwarding) -> None:
    class Late(Server):
        def serve(self, connected: socket.socket) -> None:
            asked = b""
            while data := connected.recv(100):
                asked += data
            connected.sendall(b"you said " + asked)
            connected.shutdown(socket.SHUT_WR)

    with Late() as server:
        _, where = world.forward(f"0:{server.target}")
        with connect(where) as client:
            client.sendall(b"a question")
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(100), b""))
        assert answer == b"you said a question"


def test_standard_input_and_output(world: Forwarding, server: Server) -> None:
    said = bytes(range(256)) * 4096
    done = world.cli("forward", "--stdio", "vm", server.target, stdin=said)
    assert (done.returncode, done.stderr) == (EXIT_OK, b"")
    assert len(done.stdout) == len(said)
    assert (done.stdout == said) is True


class Deaf(Server):
    """Says something, and ends its half; then hears to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def serve(self, connected: socket.socket) -> None:
        connected.sendall(b"said first")
        connected.shutdown(socket.SHUT_WR)
        sum_of_all = hashlib.sha256()
        try:
            while data := connected.recv(65536):
                sum_of_all.update(data)
            self.heard.append(sum_of_all.hexdigest())
        except OSError as error:
            self.heard.append(str(error))


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    with Deaf() as server:
        yield server


def test_what_is_said_behind_the_others_last_word_arrives(world: Forwarding, deaf: Deaf) -> None:
    said = bytes(range(256)) * 16384
    done = world.cli("forward", "--stdio", "vm", deaf.target, stdin=said)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_OK, b"said first", b"")
    assert deaf.heard == [hashlib.sha256(said).hexdigest()]


@contextlib.contextmanager
def stdio(world: Forwarding, target: str, out: Any) -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, *world.cli_words("forward", "--stdio", "vm", target)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=out, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_heard(deaf: Deaf) -> None:
    failure = lambda: f"the guest's server has heard {deaf.heard}"  # noqa: E731
    wait_until(lambda: bool(deaf.heard), timeout_s=WAIT_S, interval_s=0.02, failure=failure)


def test_the_end_of_the_output_is_seen_while_there_is_input(world: Forwarding, deaf: Deaf) -> None:
    with stdio(world, deaf.target, subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.read() == b"said first"
        assert process.poll() is None and deaf.heard == []
        process.stdin.write(b"and more")
        process.stdin.close()
        assert process.wait(WAIT_S) == EXIT_OK
    assert deaf.heard == [hashlib.sha256(b"and more").hexdigest()]


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_OK), (signal.SIGHUP, EXIT_OK)],
)
def test_a_signal_is_heard_of_in_the_guest(
    world: Forwarding, deaf: Deaf, number: signal.Signals, status: int
) -> None:
    with stdio(world, deaf.target, subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"said first"
        process.send_signal(number)
        assert process.wait(WAIT_S) == status
    wait_heard(deaf)
    assert "reset" in deaf.heard[0]


def test_an_output_that_is_full(world: Forwarding, deaf: Deaf) -> None:
    with Path("/dev/full").open("wb") as full, stdio(world, deaf.target, full) as process:
        assert process.wait(WAIT_S) == EXIT_FAILED
        assert process.stderr is not None
        assert b"standard output: No space left on device" in process.stderr.read()
    wait_heard(deaf)
    assert "reset" in deaf.heard[0]


# ---------------------------------------------------------------- it goes on


def test_it_goes_on_through_cuts_and_restarts_of_the_hosts_daemon(
    fresh: Forwarding, server: Server
) -> None:
    _, where = fresh.forward(f"0:{server.target}")
    transfer = Transfer(where, 1024 * MIB)
    for number in range(6):
        transfer.wait_for(transfer.received + 3 * MIB)
        if number % 3 == 2:
            fresh.host.restart()
        else:
            fresh.cut()
    transfer.wait_for(transfer.received + 3 * MIB)
    transfer.end_early()  # behind all of that: its end is on record with the last daemon
    assert transfer.finish() == []
    *killed, end = wait_ended(fresh, 3)
    assert [(row["reason"], row.get("bytes_in")) for row in killed] == [(NO_END, None)] * 2
    begun = [row["request"] for row in fresh.audited() if row["verdict"] == "allow"]
    assert begun == [row["request"] for row in (*killed, end)], "each beginning has its end"
    assert end["reason"] == "both ends were done"
    assert 0 < end["bytes_in"] < transfer.size, "of what a killed daemon passed there is no record"


def test_an_idle_connection_outlives_the_hosts_daemon(fresh: Forwarding, server: Server) -> None:
    forward, where = fresh.forward(f"0:{server.target}")
    with connect(where) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        fresh.host.restart()
        client.sendall(b"after")
        assert client.recv(100) == b"after"
    assert forward.log.read_text() == ""


class Giver(Server):
    """Gives bytes for as long as somebody takes them."""

    def serve(self, connected: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected.sendall(bytes(65536))


class Taker(threading.Thread):
    """Takes what comes, and notes how long it stood."""

    def __init__(self, where: str) -> None:
        super().__init__(name="taker")
        self.received = 0
        self.longest_s = 0.0
        self._where = where
        self._is_enough = False
        self.start()

    def run(self) -> None:
        with connect(self._where) as connected:
            while not self._is_enough:
                began_s = time.monotonic()
                self.received += len(connected.recv(65536))
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)

    def wait_for(self, count: int) -> None:
        """So many bytes more."""
        goal = self.received + count
        failure = lambda: f"stands at {self.received}, {goal} wanted"  # noqa: E731
        wait_until(
            lambda: self.received >= goal, timeout_s=WAIT_S, interval_s=0.01, failure=failure
        )

    def end(self) -> None:
        self._is_enough = True
        self.join(WAIT_S)


def test_one_that_was_stopped_holds_up_no_other_stream(fresh: Forwarding) -> None:
    """It has under way all that may be: the others would wait until it was asked in vain."""
    with Giver() as giver:
        stopped, where = fresh.forward(f"0:{giver.target}")
        _, other = fresh.forward(f"0:{giver.target}")
        process = stopped.process
        assert process is not None
        takers = [Taker(where), Taker(other)]
        try:
            for taker in takers:
                taker.wait_for(MIB)
            for _ in range(3):  # not each time is something under way
                process.send_signal(signal.SIGSTOP)
                takers[1].longest_s = 0.0
                takers[1].wait_for(4 * MIB)
                assert takers[1].longest_s < PROBE_S
                process.send_signal(signal.SIGCONT)
                takers[0].wait_for(MIB)
        finally:
            process.send_signal(signal.SIGCONT)
            for taker in takers:
                taker.end()


def test_streams_give_way_to_requests_in_the_guest(world: Forwarding) -> None:
    def rests() -> int:
        done = world.cli("--json", "call", "vm", "vchan.guest", "info")
        count = json.loads(done.stdout)["streams"]["rests"]
        assert isinstance(count, int)
        return count

    with Giver() as giver:
        _, where = world.forward(f"0:{giver.target}")
        taker = Taker(where)
        try:
            taker.wait_for(MIB)
            before = rests()
            taker.wait_for(MIB)
            assert rests() > before
            taker.wait_for(MIB)  # they rest no longer than there are requests
        finally:
            taker.end()


def test_a_stream_that_has_all_of_a_rate_makes_no_answer_wait(fresh: Forwarding) -> None:
    """A VM that is over a rate is not read from: its answers would wait with the bytes."""
    fresh.policy.write_text(POLICY + "limit any bytes_per_s=2M\n")
    assert fresh.host.process is not None
    fresh.host.process.send_signal(signal.SIGHUP)
    with Giver() as giver:
        _, where = fresh.forward(f"0:{giver.target}")
        taker = Taker(where)
        try:
            taker.wait_for(5 * MIB)
            began_s = time.monotonic()
            taker.wait_for(2 * MIB)
            assert time.monotonic() - began_s > 0.5, "there is a rate"
            status = json.loads(fresh.cli("--json", "status", "vm").stdout)
        finally:
            taker.end()
    assert status["channel"]["throttled"] == 0


def test_a_guest_daemon_that_is_restarted_resets_with_its_reason(
    fresh: Forwarding, server: Server
) -> None:
    forward, where = fresh.forward(f"0:{server.target}")
    with connect(where) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        began_s = time.monotonic()
        fresh.guest.restart()
        assert is_reset(client)
        assert time.monotonic() - began_s < IDLE_S / 2, "it found out by asking itself"
    wait_log(forward, "a connection is reset", "it was restarted")
    assert Transfer(where, MIB).finish() == []  # the next one is connected as ever


def test_a_daemon_that_does_not_come_back_is_a_reset(fresh: Forwarding, server: Server) -> None:
    forward, where = fresh.forward(f"0:{server.target}", "--look", "0.5")
    with connect(where) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        fresh.host.kill()
        assert is_reset(client)
    assert forward.process is not None
    assert forward.process.wait(WAIT_S) == 3
    wait_log(forward, "1 connections are reset: the VM was not found again")


def test_the_forward_is_ended_and_the_guest_hears_of_it(world: Forwarding, server: Server) -> None:
    forward, where = world.forward(f"0:{server.target}")
    with connect(where) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        assert forward.interrupt() == EXIT_INTERRUPTED
        assert is_reset(client)
    wait_log(world.guest, "ended before its end: the forward was ended")
    assert forward.log.read_text() == ""


# ---------------------------------------------------------------- it is refused


def test_what_the_policy_denies_is_said_with_its_line(fresh: Forwarding) -> None:
    done = fresh.cli("forward", "vm", "22")
    assert done.returncode == EXIT_FAILED
    rule = f"{fresh.policy}:3"
    said = f"vchan: Rejected: forward tcp:22: denied by this host's policy, {rule}\n"
    assert done.stderr.decode() == said
    done = fresh.cli("forward", "vm", "/run/other")
    assert b"no rule of this host's policy allows it (default)" in done.stderr
    denied = [(row["exchange"], row["topic"], row["rule"]) for row in fresh.audited()]
    assert denied == [("tcp", "22", rule), ("unix", "/run/other", "default")]
    shown = fresh.cli("log", "--kind", "forward", "--file", str(fresh.audit)).stdout.decode()
    assert "forward tcp:22" in shown


def test_what_the_guest_does_not_allow_is_refused(directory: Path, server: Server) -> None:
    with Forwarding(directory, POLICY, "tcp:1") as world:
        forward, where = world.forward(f"0:{server.target}")
        with connect(where) as client:
            assert is_reset(client)
        wait_log(forward, "the owner of this guest does not allow it (option forward)")
        wait_log(world.guest, f"refused a stream to tcp:{server.target}", '"host":"here"')


def test_a_guest_of_an_earlier_release_hears_nothing_of_it(directory: Path) -> None:
    """Its greeting does not say that it takes byte streams."""
    earlier = "from vchan.guest import daemon; daemon.BYTE_STREAMS = 0; daemon.main()"
    with Forwarding(directory, POLICY, ALLOW, ("-c", earlier)) as world:
        done = world.cli("forward", "vm", "80")
        assert done.returncode == EXIT_FAILED
        assert b"vm: its vchan-guest takes no byte streams: upgrade it" in done.stderr
        assert world.cli("ping", "vm").returncode == EXIT_OK
        info = json.loads(world.cli("--json", "call", "vm", "vchan.guest", "info").stdout)
        assert info["session"]["violations"] == 0
        assert "streams" not in info


def test_where_nobody_listens(world: Forwarding) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    forward, where = world.forward(f"0:{port}")
    with connect(where) as client:
        assert is_reset(client)
    wait_log(forward, f"tcp:{port} in the guest: Connection refused")


def test_a_rule_that_is_withdrawn_ends_what_it_allowed(fresh: Forwarding, server: Server) -> None:
    forward, where = fresh.forward(f"0:{server.target}")
    with connect(where) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        fresh.policy.write_text("reply any any allow\nforward any any deny\n")
        assert fresh.host.process is not None
        fresh.host.process.send_signal(signal.SIGHUP)
        assert is_reset(client)
    wait_log(forward, "denied by this host's policy", f"{fresh.policy}:2")
    wait_log(fresh.guest, "ended before its end", "denied")


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("vm", "0"), EXIT_USAGE, "expected [LOCAL:]PORT"),
        (("vm", "x:80"), EXIT_USAGE, "'x' is no LOCAL"),
        (("vm", "1.2.3.4:0:80"), EXIT_USAGE, "cannot listen there"),
        (("vm", "--stdio", "1:80"), EXIT_USAGE, "expected no LOCAL"),
        (("nobody", "80"), EXIT_FAILED, "'nobody': this host has no such domain"),
        (("vm", "--json", "80"), EXIT_USAGE, "prints text"),
    ],
)
def test_wrong_words_are_one_line(
    world: Forwarding, words: tuple[str, ...], status: int, text: str
) -> None:
    done = world.cli("forward", *words)
    assert text in done.stderr.decode()
    assert done.returncode == status
    assert done.stderr.count(b"\n") == 1


# ---------------------------------------------------------------- it is bounded


def test_who_does_not_read_stops_its_writer_alone(world: Forwarding, server: Server) -> None:
    class Deaf(Server):
        def serve(self, connected: socket.socket) -> None:
            pass

    with Deaf() as deaf:
        _, stuck = world.forward(f"0:{deaf.target}")
        with connect(stuck) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            client.settimeout(2.0)
            sent = 0
            with pytest.raises(TimeoutError):
                while True:
                    sent += client.send(bytes(65536))
            # What our two processes hold; the rest is in the kernel's buffers.
            held = 2 * UNTAKEN_BYTES_MAX + SEND_BYTES_MAX + WINDOW_BYTES
            assert held / 4 < sent < held + 24 * MIB
            _, where = world.forward(f"0:{server.target}")
            assert Transfer(where, MIB).finish() == []


def test_at_the_most_streams_who_comes_next_waits(world: Forwarding, server: Server) -> None:
    _, where = world.forward(f"0:{server.target}")
    clients = [connect(where) for _ in range(STREAMS_MAX + 1)]
    for number, client in enumerate(clients[:STREAMS_MAX]):
        client.sendall(b"%d" % number)
        assert client.recv(100) == b"%d" % number
    clients[-1].sendall(b"the last")
    clients[-1].settimeout(0.3)
    with pytest.raises(TimeoutError):
        clients[-1].recv(100)
    clients[0].close()
    clients[-1].settimeout(WAIT_S)
    assert clients[-1].recv(100) == b"the last"
    for client in clients:
        client.close()
    wait_until(
        lambda: json.loads(world.cli("--json", "status", "vm").stdout)["streams"]["open"] == 0,
        timeout_s=WAIT_S,
        interval_s=0.1,
        failure=lambda: "streams stay open",
    )


def test_a_call_beside_a_saturated_stream_is_answered(world: Forwarding, server: Server) -> None:
    _, where = world.forward(f"0:{server.target}")
    transfer = Transfer(where, 64 * MIB)
    transfer.wait_for(MIB)
    began_s = time.monotonic()
    done = world.cli("ping", "vm", "--count", "20")
    assert done.returncode == EXIT_OK, done.stderr
    assert time.monotonic() - began_s < WAIT_S
    assert transfer.finish() == []


@pytest.mark.parametrize("is_proxy", [False, True])
@pytest.mark.parametrize("is_taken", [False, True])
def test_a_listeners_path_that_others_have_removed(
    world: Forwarding, directory: Path, is_proxy: bool, is_taken: bool
) -> None:
    """What stands there since is another's."""
    path = directory / "here.sock"
    if is_proxy:
        part, _ = world.proxy(listen=f"unix:{path}")
    else:
        part, _ = world.forward(f"{path}:8080")
    path.unlink()
    if is_taken:
        path.write_text("another's")
    assert part.interrupt() == EXIT_INTERRUPTED
    assert part.log.read_text() == ""
    assert path.exists() is is_taken
