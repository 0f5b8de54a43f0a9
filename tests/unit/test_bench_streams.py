"""The benchmark of byte streams: what it makes of its samples, and its parts that run natively."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import native_streams, streams
from tests.bench.peers import RawChannel
from tests.bench.streams import (
    ALONE,
    BESIDE,
    CP,
    FORWARD,
    GA,
    OTHERS_FROM,
    OTHERS_TO,
    OWN_FROM,
    OWN_TO,
    RAW,
    SSH,
    SSH_CAT,
    TCP,
    TITLES,
)
from tests.rig import RigError, rig_directory, wait_until
from tests.rig.forwarding import connect
from tests.rig.ports import claim_ports

SERVER = Path(streams.__file__).with_name("in_guest") / "stream_server.py"
MIB = 1 << 20


def samples() -> streams.Samples:
    """Of two rounds."""
    return {
        "to_guest_mbs": {RAW: [100.0, 300.0], TCP: [50.0, 50.0], FORWARD: [20.0, 20.0], CP: [5.0]}
        | {SSH: [30.0], SSH_CAT: [8.0]},
        "from_guest_mbs": {RAW: [100.0], TCP: [50.0], GA: [10.0], FORWARD: [40.0], CP: [4.0]}
        | {SSH: [25.0], SSH_CAT: [7.0]},
        "echo_us": {RAW: [400.0], TCP: [600.0], SSH: [900.0], GA: [700.0], FORWARD: [2400.0]},
        "call_us": {
            **dict.fromkeys(BESIDE, [2000.0] * 98 + [6000.0] * 2),
            ALONE: [1000.0] * 98 + [3000.0, 3000.0],
            OWN_FROM: [1000.0] * 98 + [9000.0] * 2,
        },
        "stream_mbs": {name: [8.0, 10.0] for name in BESIDE if name != ALONE},
    }


def test_numbers_are_told_beside_the_baselines_of_the_same_run() -> None:
    result = streams.summary(samples())
    assert result["to_guest_mbs"][RAW] == 200.0  # the median of the rounds
    of_raw = {RAW: 1.0, TCP: 0.25, SSH: 0.15, SSH_CAT: 0.04, FORWARD: 0.1, CP: 0.025}
    assert result["to_guest_mbs_of_raw"] == of_raw
    assert result["from_guest_mbs_of_qemu_ga"][FORWARD] == 4.0
    assert result["echo_added_us"][FORWARD] == 2000.0
    assert result["call_p50_us_of_alone"][OWN_TO] == 2.0
    assert result["call_p99_us_of_alone"][OWN_FROM] == 3.0
    assert result["stream_mbs"][OWN_TO] == 9.0


def test_keys_are_the_same_whatever_is_measured() -> None:
    result = streams.summary(samples())
    measures = {measure for measure, _, _ in (*streams.STREAMS, *streams.CALLS)}
    assert set(result) == measures
    for measure in ("call_p50_us", "call_p99_us", "call_p99_us_of_alone"):
        assert set(result[measure]) == set(BESIDE)
    assert {name for by_name in result.values() for name in by_name} == {*BESIDE, *TITLES}
    assert json.loads(json.dumps(result)) == result


def test_the_table_has_every_number_and_says_what_was_missed() -> None:
    result = streams.summary(samples())
    text = streams.table({**result, "load": (0.5, 1.5)})
    (row,) = [line for line in text.splitlines() if line.startswith(TITLES[FORWARD])]
    numbers = " ".join(row.split()[2:])
    assert numbers == "20.0 0.10 x 40.0 0.40 x 4.0 x 2400 2400 2000"
    (row,) = [line for line in text.splitlines() if line.startswith(TITLES[CP])]
    assert row.split()[-1] == "x"  # a whole command has no round trips
    verdicts = dict(
        zip((OWN_TO, OWN_FROM, OTHERS_TO, OTHERS_FROM), streams.aims(result), strict=True)
    )
    assert verdicts[OWN_FROM].endswith("3.00 x, aim <= 2 x: missed")
    assert verdicts[OWN_TO].endswith("2.00 x, aim <= 2 x: met")
    assert all(verdict in text for verdict in verdicts.values())
    assert text.endswith("machine's load: 0.5 before, 1.5 after")


@pytest.fixture
def server() -> Iterator[str]:
    """What runs in the guest, here."""
    (port,) = claim_ports(1)
    process = subprocess.Popen([sys.executable, str(SERVER), str(port)])

    def is_there() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(is_there, timeout_s=60, interval_s=0.02, failure=lambda: "no server")
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_the_guests_server_speaks_as_a_raw_port_does(server: str) -> None:
    with connect(server) as connected:
        channel = RawChannel(connected)
        channel.take(MIB + 1)
        channel.give(MIB + 1)
        connected.sendall(b"echo\n")
        channel.echo(b"x" * 64)


@pytest.mark.parametrize("verb", ["take", "give"])
def test_a_load_says_what_it_moved(server: str, verb: str) -> None:
    with streams.Load(server, verb) as busy:
        assert busy.mbs == 0.0
    assert busy.mbs > 0.0


def test_a_load_that_broke_is_no_load(server: str) -> None:
    with (
        pytest.raises(RigError, match="a stream broke"),
        streams.Load(server, "give") as busy,
    ):
        busy._process.send_signal(signal.SIGKILL)


def test_the_native_part_measures_what_it_says() -> None:
    with rig_directory() as directory:
        result = native_streams.run(directory, rounds=1, calls=3, bulk_bytes=MIB)
    result["load"] = (0.0, 0.0)
    assert {*BESIDE, *native_streams.SPEEDS, "load"} == set(result)
    assert all(result[name]["mbs"] > 0 for name in (OWN_TO, OTHERS_FROM, *native_streams.SPEEDS))
    assert result["take"]["host"] > 0
    assert json.loads(json.dumps(result))["take"] == result["take"]
    text = native_streams.table(result)
    assert all(
        title in text
        for title in (*native_streams.TITLES.values(), *native_streams.SPEEDS.values())
    )
