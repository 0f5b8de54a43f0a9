"""The guest daemon and its port in a real guest: QEMU alone, without libvirt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import wait_until
from tests.rig.guest import GuestSpec, QemuGuest
from tests.rig.guest_image import VCHAN_PORT, Service, build
from tests.rig.hosting import WAIT_S, HostEnd
from tests.rig.requirements import missing_for_qemu
from vchan.host.vm.downward import LOCAL_REQUESTS_MAX

MISSING = missing_for_qemu()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

DEVICE = f"/dev/virtio-ports/{VCHAN_PORT}"
AGENT = Path(__file__).parents[1] / "rig" / "counting_agent.py"
# What lies between a guest and QEMU counts writes, whatever their size: 128 of them in Debian 12's
# QEMU, 1024 in Debian 13's. So the port is filled with small ones; and the guest's daemon gives up
# sooner than it would on a stream that takes no bytes.
STALLING = """
import vchan.io.link as link, vchan.io.streams as streams
link.STALL_S = 2.0
whole = streams.PortStream.write
streams.PortStream.write = lambda port, data: whole(port, data[:16])
from vchan.guest.daemon import main; main()
"""


@pytest.fixture(scope="module")
def guest(short_directory: Path) -> Iterator[QemuGuest]:
    """A guest without the port, until the first test plugs it in."""
    image = build({"app/agent.py": AGENT})
    services = (
        Service("vchan-guest", "python3 -m vchan.guest.daemon"),
        Service("agent", "python3 /app/agent.py demo"),
        Service("slow", "python3 /app/agent.py slow /run/slow /run/vchan/agent.sock 1"),
    )
    with QemuGuest(short_directory / "q", GuestSpec(image, services, ports=())) as guest:
        yield guest


@pytest.fixture
def plugged(guest: QemuGuest) -> QemuGuest:
    """The guest with its port, whatever the test before made of it."""
    if not guest.port().exists():
        guest.plug(VCHAN_PORT)
    return guest


def says(guest: QemuGuest, *words: str) -> None:
    """Wait until the guest's daemon has logged all these in one line."""
    wait_until(
        lambda: any(
            all(word in line for word in words)
            for line in guest.console.read_text(errors="replace").splitlines()
        ),
        timeout_s=WAIT_S,
        interval_s=0.1,
        failure=lambda: f"{words}: {guest.console.read_text(errors='replace')}",
    )


def cpu_ticks(guest: QemuGuest) -> int:
    """CPU time of the guest's daemon, in hundredths of a second."""
    fields = guest.shell(
        "cut -d ' ' -f 14,15 /proc/$(cat /run/vchan-guest.pid)/stat"
    ).output.split()
    return sum(map(int, fields))


def echo_works(host: HostEnd, number: int = 1, payload: str = "") -> bool:
    answer = host.call("demo", "echo", sender="test", number=number, payload=payload)
    return bool(json.loads(answer) == ["test", number, payload])


def test_there_is_no_port_and_then_there_is(guest: QemuGuest) -> None:
    says(guest, DEVICE, "no such port")
    before = cpu_ticks(guest)
    guest.shell("sleep 3")
    assert cpu_ticks(guest) - before < 30  # it looks for the port, and does nothing else
    guest.plug(VCHAN_PORT)
    with HostEnd(guest.port()) as host:
        assert echo_works(host)


def test_without_a_host_the_daemon_sleeps(plugged: QemuGuest) -> None:
    """A port without a host is readable for ever: whoever polls it spins."""
    with HostEnd(plugged.port()) as host:
        host.wait_ready()
    before = cpu_ticks(plugged)
    plugged.shell("sleep 3")
    assert cpu_ticks(plugged) - before < 30
    with HostEnd(plugged.port(), name="late") as host:  # it comes late, and is noticed
        assert echo_works(host)
    says(plugged, "host late: new session")


def test_the_host_disconnects_and_comes_back(plugged: QemuGuest) -> None:
    with HostEnd(plugged.port()) as host:
        host.wait_ready()
        before = json.loads(host.call("vchan.guest", "info"))
        for number in range(5):
            calls = [
                host.submit("demo", "echo", sender="cut", number=number * 100 + n, payload="x" * n)
                for n in range(50)
            ]
            host.cut()
            for call in calls:
                call.result(WAIT_S)
        after = json.loads(host.call("vchan.guest", "info"))
        summary = host.summary()
    assert summary["channel"]["reconnects"] >= 1
    assert summary["session"]["sessions"] == 1
    assert after["session"]["sessions"] == before["session"]["sessions"]
    assert after["session"]["resumptions"] >= 1
    assert after["port_reopened"] == before["port_reopened"]
    with HostEnd(plugged.port()) as host:
        ran = json.loads(host.call("demo", "executed", sender="cut", start=0, count=1000))
    assert sorted(ran) == sorted({number * 100 + n for number in range(5) for n in range(50)})


def test_large_payloads_both_ways(plugged: QemuGuest) -> None:
    """Virtio takes 32 KiB at a time, and a socket takes parts."""
    payload = "\u00ff\u0000\u20ac" * 150_000  # over 1 MiB as JSON
    with HostEnd(plugged.port()) as host:
        for number in range(3):
            assert echo_works(host, number, payload)
        assert host.summary()["session"]["violations"] == 0


def test_unplugged_and_plugged_in_again(plugged: QemuGuest) -> None:
    for number in range(10):
        with HostEnd(plugged.port()) as host:
            assert echo_works(host, number)
        plugged.unplug(VCHAN_PORT)
        plugged.plug(VCHAN_PORT)
    with HostEnd(plugged.port()) as host:
        info = json.loads(host.call("vchan.guest", "info"))
        assert info["port_reopened"] >= 10
        # And with the host connected and in the middle of a call.
        plugged.unplug(VCHAN_PORT)
        waiting = host.submit("demo", "echo", sender="test", number=0, payload="")
        plugged.plug(VCHAN_PORT)
        waiting.result(WAIT_S)
        assert host.summary()["session"]["sessions"] == 1


def test_another_program_has_the_port(plugged: QemuGuest) -> None:
    plugged.shell("touch /run/vchan-guest.hold; kill $(cat /run/vchan-guest.pid)")
    plugged.shell(f"sleep 1000 <>{DEVICE} & echo $! >/run/other.pid; usleep 100000")
    plugged.shell("rm /run/vchan-guest.hold")
    says(plugged, DEVICE, "another process has it open")
    with HostEnd(plugged.port()) as host:
        plugged.shell("kill $(cat /run/other.pid)")
        assert echo_works(host)


def test_an_unprivileged_daemon_is_denied(plugged: QemuGuest) -> None:
    plugged.shell(
        'python3 -c "import os; os.setuid(65534);'
        ' from vchan.guest.daemon import main; main()" --socket /tmp/denied.sock'
        " 2>/dev/console & echo $! >/run/denied.pid"
    )
    says(plugged, f"{DEVICE}: uid 65534 may not open it")
    plugged.shell("kill $(cat /run/denied.pid)")


def test_a_stream_that_takes_no_bytes_is_opened_anew(plugged: QemuGuest) -> None:
    plugged.shell("touch /run/vchan-guest.hold; kill $(cat /run/vchan-guest.pid)")
    plugged.shell(f"python3 -c '{STALLING}' 2>/dev/console & echo $! >/run/stalling.pid")
    try:
        with HostEnd(plugged.port()) as host:
            host.wait_served("slow")  # attached to this daemon
            calls, go_on = host.submit_and_stand(LOCAL_REQUESTS_MAX, "slow", "blob", size=150)
            try:
                says(plugged, DEVICE, "takes no bytes for 2 s")
            finally:
                go_on()
            for call in calls:
                call.result(WAIT_S)
            info = json.loads(host.call("vchan.guest", "info"))
            assert info["port_reopened"] >= 1
            assert info["session"]["sessions"] == 1
            assert host.summary()["session"]["violations"] == 0
    finally:
        plugged.shell("kill $(cat /run/stalling.pid); rm /run/vchan-guest.hold")
