"""Every kind of port in a real guest, and what befalls it there."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.rig import wait_until
from tests.rig.guest import GuestSpec, QemuGuest
from tests.rig.guest_image import VCHAN_PORT, Service, build
from tests.rig.hosting import HostEnd
from tests.rig.requirements import missing_for_qemu
from vchan.rpc.in_flight import Answered, Taken

serial = pytest.importorskip("serial")
MISSING = missing_for_qemu()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

RIG = Path(__file__).parents[1] / "rig"
LINE, CONSOLE, PLAIN, MODEM = "line", "console", "plain", "modem"
WAIT_S = 120.0
OUTSTANDING_BYTES = 16 * 1024
"""Sent and not yet echoed: a line without flow control drops what its kernel has no room for."""


class Kind(NamedTuple):
    """A kind of port: how the guest names it, where the host finds it, how much to send by it."""

    url: str
    socket: str
    raw_bytes: int
    payload: int


KINDS = {
    "virtio": Kind(f"virtio:{VCHAN_PORT}", VCHAN_PORT, 4 << 20, 1 << 20),
    "isa-serial": Kind("serial:/dev/ttyS1?baudrate=115200", LINE, 96 << 10, 40_000),
    "virtio-console": Kind("serial:/dev/hvc0", CONSOLE, 2 << 20, 1 << 20),
    "socket": Kind("pyserial:socket://127.0.0.1:4000", PLAIN, 1 << 20, 500_000),
    "rfc2217": Kind("pyserial:rfc2217://127.0.0.1:2217", MODEM, 8 << 10, 3_000),
}
LINES = ("isa-serial", "virtio-console")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_line = pytest.mark.parametrize("kind", [KINDS[name] for name in LINES], ids=LINES)


@pytest.fixture(scope="module")
def guest(short_directory: Path) -> Iterator[QemuGuest]:
    image = build(
        {
            "app/agent.py": RIG / "counting_agent.py",
            "app/echo.py": RIG / "line_echo.py",
            "app/server.py": RIG / "line_server.py",
            "site/serial": Path(serial.__file__).parent,
        }
    )
    services = (
        Service("plain", f"python3 /app/server.py socket 4000 /dev/virtio-ports/{PLAIN}"),
        Service("modem", "python3 /app/server.py rfc2217 2217 /dev/ttyS2"),
    )
    spec = GuestSpec(
        image, services, ports=(VCHAN_PORT, PLAIN), serials=(LINE, MODEM), consoles=(CONSOLE,)
    )
    with QemuGuest(short_directory / "p", spec) as guest:
        guest.shell("ip link set lo up; ip addr add 127.0.0.1/8 dev lo")
        yield guest


class Daemon:
    """A guest's daemon on a port, with an agent that keeps a journal."""

    def __init__(self, guest: QemuGuest, url: str, name: str) -> None:
        self._guest = guest
        self._url = url
        self._name = name
        guest.shell(f"rm -f /run/{name}.journal")
        self.start()
        self._run("agent", f"python3 /app/agent.py demo /run/{name}.journal /run/{name}.sock")

    def _run(self, what: str, command: str) -> None:
        pid = f"/run/{self._name}.{what}"
        self._guest.shell(f"setsid {command} </dev/null >/dev/console 2>&1 & echo $! >{pid}")

    def start(self) -> None:
        """Start it, or start it again."""
        options = f"--port '{self._url}' --socket /run/{self._name}.sock"
        self._run("daemon", f"python3 -m vchan.guest.daemon {options}")

    def kill(self) -> None:
        """As the kernel would, out of memory."""
        self._guest.shell(f"kill -9 $(cat /run/{self._name}.daemon)")

    def close(self) -> None:
        """End both."""
        self._guest.shell(f"kill -9 $(cat /run/{self._name}.daemon /run/{self._name}.agent)")


@contextlib.contextmanager
def daemon_on(guest: QemuGuest, url: str, name: str = "port") -> Iterator[Daemon]:
    daemon = Daemon(guest, url, name)
    try:
        yield daemon
    except BaseException:
        print(guest.console.read_text(errors="replace")[-4000:])
        raise
    finally:
        daemon.close()


def echo(host: HostEnd, number: int, payload: str = "") -> bool:
    answer = host.call("demo", "echo", sender="test", number=number, payload=payload)
    return bool(json.loads(answer) == ["test", number, payload])


def ran(host: HostEnd, sender: str = "test") -> list[int]:
    found: list[int] = json.loads(
        host.call("demo", "executed", sender=sender, start=0, count=1_000_000)
    )
    return found


def says(guest: QemuGuest, *words: str, since: int = 0) -> None:
    """Wait until a line of the guest's console has all these words."""
    wait_until(
        lambda: any(
            all(word in line for word in words)
            for line in guest.console.read_text(errors="replace")[since:].splitlines()
        ),
        timeout_s=60.0,
        interval_s=0.1,
        failure=lambda: f"{words}: {guest.console.read_text(errors='replace')[since:]}",
    )


def said(guest: QemuGuest) -> int:
    """How much the console holds by now."""
    return len(guest.console.read_text(errors="replace"))


# --- bytes


@every_kind
def test_every_byte_passes(guest: QemuGuest, kind: Kind) -> None:
    """Random bytes there and back, as fast as they go, compared one by one."""
    sent = os.urandom(kind.raw_bytes)
    guest.shell(f"python3 /app/echo.py '{kind.url}' >/dev/console 2>&1 & echo $! >/run/echo.pid")
    try:
        with guest.connect(kind.socket) as channel:
            _wait_for_echo(channel.fileno())
            started_s = time.monotonic()
            received = _exchange(channel.fileno(), sent)
            took_s = time.monotonic() - started_s
    finally:
        guest.shell("kill -9 $(cat /run/echo.pid)")
    print(f"{kind.url}: {len(sent) / took_s / 1000:.0f} kB/s each way")
    assert received == sent


def _wait_for_echo(channel: int) -> None:
    """Until the guest's end is open: what comes before that may be lost, or echoed by a terminal
    that is not raw yet. When the last probe has come back, nothing is under way any more."""
    os.set_blocking(channel, False)
    received = b""
    deadline_s = time.monotonic() + WAIT_S
    for number in itertools.count():
        assert time.monotonic() < deadline_s, received
        probe = b"\x00\xffprobe %d\r\n\x03" % number
        os.write(channel, probe)
        while select.select([channel], [], [], 1.0)[0]:
            received += os.read(channel, 4096)
            if received.endswith(probe):
                return


def _exchange(channel: int, sent: bytes) -> bytes:
    received = bytearray()
    out = 0
    deadline_s = time.monotonic() + WAIT_S
    while len(received) < len(sent):
        assert time.monotonic() < deadline_s, f"{len(received)} of {len(sent)} bytes came back"
        may_send = min(len(sent), len(received) + OUTSTANDING_BYTES)
        readable, writable, _ = select.select([channel], [channel] if out < may_send else [], [], 1)
        if readable:
            received += os.read(channel, 65536)
        if writable:
            out += os.write(channel, sent[out:may_send])
    return bytes(received)


@every_kind
def test_calls_at_full_speed(guest: QemuGuest, kind: Kind) -> None:
    payload = "\u00ff\u0000\u20ac" * (kind.payload // 11)
    with daemon_on(guest, kind.url), HostEnd(guest.port(kind.socket)) as host:
        host.wait_served("demo")
        started_s = time.monotonic()
        assert echo(host, 0, payload)
        took_s = time.monotonic() - started_s
        print(f"{kind.url}: {2 * kind.payload / took_s / 1000:.0f} kB/s there and back")
        calls = [
            host.submit("demo", "echo", sender="test", number=n, payload="x" * 200)
            for n in range(1, 51)
        ]
        assert all(isinstance(call.result(WAIT_S), Answered) for call in calls)
        assert ran(host) == list(range(51))
        session = host.summary()["session"]
        assert session["sessions"] == 1
        assert session["violations"] == 0


# --- a line has no open and close


@every_line
def test_hosts_come_and_go(guest: QemuGuest, kind: Kind) -> None:
    with daemon_on(guest, kind.url):
        with HostEnd(guest.port(kind.socket), name="first") as host:
            host.wait_served("demo")
            for turn in range(3):
                calls = [
                    host.submit("demo", "echo", sender="test", number=turn * 20 + n)
                    for n in range(20)
                ]
                host.cut()
                assert all(isinstance(call.result(WAIT_S), Answered) for call in calls)
            assert ran(host) == list(range(60))
            assert host.summary()["session"]["sessions"] == 1
        with guest.connect(kind.socket) as stranger:
            stranger.sendall(b"\r\nlogin: root\r\n\x03\x04\x11\x13" + os.urandom(1000))
        with HostEnd(guest.port(kind.socket), name="second") as host:
            assert echo(host, 60)
            assert ran(host) == list(range(61))


@pytest.mark.parametrize("kind", list(KINDS.values())[:4], ids=list(KINDS)[:4])
def test_the_daemon_is_killed_at_any_time(guest: QemuGuest, kind: Kind) -> None:
    with daemon_on(guest, kind.url) as daemon, HostEnd(guest.port(kind.socket)) as host:
        host.wait_served("demo")
        for turn in range(3):
            casts = [
                host.cast("demo", "note", sender="test", number=turn * 20 + n) for n in range(20)
            ]
            time.sleep(turn * 0.03)  # nothing gone out yet, some, most
            daemon.kill()
            daemon.start()
            assert all(isinstance(cast.result(WAIT_S), Taken) for cast in casts)
        host.wait_served("demo")
        assert ran(host) == list(range(60))


def test_a_console_is_unplugged_and_plugged_in_again(guest: QemuGuest) -> None:
    kind = KINDS["virtio-console"]
    with daemon_on(guest, kind.url), HostEnd(guest.port(kind.socket)) as host:
        host.wait_served("demo")
        assert echo(host, 0)
        for number in range(1, 4):
            waiting = host.submit("demo", "echo", sender="test", number=number)
            guest.unplug(kind.socket)
            guest.plug(kind.socket, driver="virtconsole")
            assert isinstance(waiting.result(WAIT_S), Answered)
        assert ran(host) == [0, 1, 2, 3]
        assert host.summary()["session"]["sessions"] == 1


# --- what befalls a machine


def test_the_guest_is_suspended_to_memory(guest: QemuGuest) -> None:
    """S3, with calls under way; the machine is woken from outside. QEMU's machine sleeps once: the
    second time it wakes up at once, so the lines are all tested together."""
    assert "mem" in guest.shell("cat /sys/power/state").output.split()
    with contextlib.ExitStack() as stack:
        hosts = []
        for name in ("virtio", *LINES):
            kind = KINDS[name]
            stack.enter_context(daemon_on(guest, kind.url, name))
            hosts.append(stack.enter_context(HostEnd(guest.port(kind.socket))))
        for host in hosts:
            host.wait_served("demo")
            assert echo(host, 0)
        guest.shell("(sleep 0.2; echo deep >/sys/power/mem_sleep; echo mem >/sys/power/state) &")
        wait_until(
            lambda: bool(guest.qmp("query-status")["status"] == "suspended"),
            timeout_s=60.0,
            interval_s=0.05,
            failure=lambda: f"not suspended: {guest.shell('dmesg').output[-2000:]}",
        )
        calls = [
            host.submit("demo", "echo", sender="test", number=n)
            for n in range(1, 21)
            for host in hosts
        ]
        time.sleep(1.0)
        assert not any(call.done() for call in calls)
        guest.qmp("system_wakeup")
        assert all(isinstance(call.result(WAIT_S), Answered) for call in calls)
        for host in hosts:
            assert ran(host) == list(range(21))
            assert host.summary()["session"]["sessions"] == 1


def test_the_machine_stands_still(guest: QemuGuest) -> None:
    """Stopped and continued, as for a snapshot: longer than a peer is thought silent."""
    kind = KINDS["isa-serial"]
    with daemon_on(guest, kind.url), HostEnd(guest.port(kind.socket)) as host:
        host.wait_served("demo")
        assert echo(host, 0)
        guest.qmp("stop")
        calls = [host.submit("demo", "echo", sender="test", number=n) for n in range(1, 21)]
        time.sleep(12.0)
        guest.qmp("cont")
        assert all(isinstance(call.result(WAIT_S), Answered) for call in calls)
        assert ran(host) == list(range(21))
        assert host.summary()["session"]["sessions"] == 1


def test_the_clock_jumps(guest: QemuGuest) -> None:
    kind = KINDS["virtio"]
    with daemon_on(guest, kind.url), HostEnd(guest.port(kind.socket)) as host:
        host.wait_served("demo")
        for number, date in enumerate(("2040-01-01 00:00", "1980-01-01 00:00", "2026-01-01 00:00")):
            calls = [
                host.submit("demo", "echo", sender="test", number=number * 10 + n)
                for n in range(10)
            ]
            guest.shell(f"date -s '{date}'")
            assert all(isinstance(call.result(WAIT_S), Answered) for call in calls)
        assert ran(host) == list(range(30))
        assert host.summary()["session"]["sessions"] == 1


def test_nothing_can_be_written_anywhere(guest: QemuGuest) -> None:
    """A read-only root, and every file system that can be written full."""
    kind = KINDS["virtio"]
    fill = "for d in /run /tmp /dev/shm; do dd if=/dev/zero of=$d/filler bs=1M; done"
    with daemon_on(guest, kind.url), HostEnd(guest.port(kind.socket)) as host:
        host.wait_served("demo")
        assert echo(host, 0)
    guest.shell("for d in /run /tmp; do mount -o remount,size=4M $d; done; mount -o remount,ro /")
    try:
        assert guest.shell("touch /etc/x").status != 0
        with daemon_on(guest, kind.url), HostEnd(guest.port(kind.socket)) as host:
            host.wait_served("demo")
            assert echo(host, 0)  # started on a read-only root
            guest.shell(fill)
            for number in range(1, 20):
                assert json.loads(host.call("vchan.guest", "ping")) == {}
                host.submit("demo", "echo", sender="test", number=number).result(WAIT_S)
    finally:
        guest.shell("rm -f /run/filler /tmp/filler /dev/shm/filler; mount -o remount,rw /")


def test_no_room_for_the_socket(guest: QemuGuest) -> None:
    guest.shell("mkdir -p /full && mount -t tmpfs -o nr_inodes=2 none /full && touch /full/x")
    done = guest.shell("python3 -m vchan.guest.daemon --socket /full/agent.sock")
    guest.shell("umount /full")
    assert done.status == 3
    expected = "/full/agent.sock: cannot open this directory: No space left on device"
    assert done.output == f"vchan-guest: {expected}\n"


# --- refusals


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (f"virtio:{VCHAN_PORT}", f"/dev/virtio-ports/{VCHAN_PORT}: uid 65534 may not open it: it"),
        ("serial:/dev/ttyS1", "/dev/ttyS1: uid 65534 may not open it: it has uid 0, gid 0, mode"),
        ("virtio:/dev/null", "/dev/null: cannot be waited for: it is no virtio-serial port"),
        ("virtio:/dev/ttyS1", "/dev/ttyS1: uid 65534 may not open it"),
        ("serial:/dev/null", "/dev/null: is no serial line that works"),
    ],
)
def test_what_may_not_or_cannot_be_opened(guest: QemuGuest, url: str, text: str) -> None:
    before = said(guest)
    guest.shell(
        'python3 -c "import os; os.setuid(65534);'
        f" from vchan.guest.daemon import main; main()\" --port '{url}' --socket /tmp/denied.sock"
        " >/dev/console 2>&1 & echo $! >/run/denied.pid"
    )
    says(guest, text, since=before)
    guest.shell("kill $(cat /run/denied.pid)")
    assert "Traceback" not in guest.console.read_text(errors="replace")[before:]


def test_a_getty_has_the_line(guest: QemuGuest) -> None:
    before = said(guest)
    lock = "import fcntl, time; f = open('/dev/ttyS1'); fcntl.flock(f, 2); print(flush=True)"
    guest.shell(
        f'python3 -c "{lock}; time.sleep(1000)" >/run/locked & echo $! >/run/getty.pid;'
        " until [ -s /run/locked ]; do usleep 10000; done"
    )
    with daemon_on(guest, KINDS["isa-serial"].url):
        says(guest, "/dev/ttyS1: another program has it open", since=before)
        with HostEnd(guest.port(LINE)) as host:
            guest.shell("kill $(cat /run/getty.pid)")
            host.wait_served("demo")
            assert echo(host, 0)
