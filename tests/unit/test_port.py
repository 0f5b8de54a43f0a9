"""The guest's port: its URLs, and serial lines on pseudo-terminals."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pty
import select
import shutil
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig.ports import claim_ports
from vchan.errors import ConfigError, LinkError, NotAPort, PortAbsent, PortBusy
from vchan.guest import port as port_module
from vchan.guest.port import FLAPPING_S, Port, port_opener
from vchan.guest.serial_port import (
    BRIDGE_READ_S,
    BridgeStream,
    Line,
    SerialStream,
    UrlOpener,
    open_line,
    parse_line,
)
from vchan.io.loop import Loop
from vchan.io.streams import SocketStream, Stream
from vchan.session import Config, Role, Session

serial = pytest.importorskip("serial")

WAIT_S = 30.0
EVERY_BYTE = bytes(range(256))


@pytest.fixture
def line() -> Iterator[tuple[int, str]]:
    """A pseudo-terminal as a kernel gives it, cooked and echoing: the other end, and its path."""
    other, ours = pty.openpty()
    os.set_blocking(other, False)
    yield other, os.ttyname(ours)
    with contextlib.suppress(OSError):
        os.close(ours)
    with contextlib.suppress(OSError):
        os.close(other)


def read_exactly(read: Callable[[], bytes], count: int) -> bytes:
    data = b""
    deadline_s = time.monotonic() + WAIT_S
    while len(data) < count:
        assert time.monotonic() < deadline_s, f"{len(data)} of {count} bytes"
        try:
            data += read()
        except BlockingIOError:
            time.sleep(0.001)
    return data


def pass_both_ways(stream: Stream, other_read: Callable[[], bytes], other_write: Any) -> None:
    """Every value of a byte, and more of them than any buffer holds."""
    sent = EVERY_BYTE * 512
    for write, read in ((stream.write, other_read), (other_write, stream.read)):
        received = bytearray()

        def receive(read: Callable[[], bytes] = read, into: bytearray = received) -> None:
            into += read_exactly(read, len(sent))

        reader = threading.Thread(target=receive)
        reader.start()
        rest = sent
        while rest:
            try:
                rest = rest[write(rest) :]
            except BlockingIOError:
                time.sleep(0.001)
        reader.join(WAIT_S)
        assert bytes(received) == sent


# --- URLs


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/dev/ttyS1", Line("/dev/ttyS1", 115200, "N", 1, False)),
        ("/dev/hvc1?", Line("/dev/hvc1")),
        (
            "/dev/ttyUSB0?baudrate=9600&parity=E&stopbits=2&rtscts=yes",
            Line("/dev/ttyUSB0", 9600, "E", 2, True),
        ),
        ("/dev/ttyS0?rtscts=no&", Line("/dev/ttyS0")),
    ],
)
def test_a_line_and_its_options(text: str, line: Line) -> None:
    assert parse_line(text) == line


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("tcp:1", "port 'tcp:1': expected one of virtio:NAME"),
        ("virtio:", "port 'virtio:': expected one of"),
        ("unix:relative", "port 'unix:relative': expected one of"),
        ("serial:", "port 'serial:': expected one of"),
        ("serial:ttyS1", "port 'serial:ttyS1': expected a device's path; e.g. serial:/dev/ttyS1"),
        ("serial:COM3", "expected a device's path"),
        ("serial:/dev/ttyS1?baudrate=fast", "baudrate=fast: expected bits per second"),
        ("serial:/dev/ttyS1?baudrate=0", "baudrate=0: expected bits per second"),
        ("serial:/dev/ttyS1?baudrate=-1", "baudrate=-1: expected bits per second"),
        ("serial:/dev/ttyS1?parity=odd", "parity=odd: expected N (none), E (even) or O (odd)"),
        ("serial:/dev/ttyS1?stopbits=3", "stopbits=3: expected 1 or 2"),
        ("serial:/dev/ttyS1?rtscts=1", "rtscts=1: expected yes or no"),
        ("serial:/dev/ttyS1?xonxoff=yes", "xonxoff=yes: no such option: a serial line has baud"),
        ("pyserial:dance://x", "port 'pyserial:dance://x': pyserial cannot use it"),
        ("virtio:\\\\.\\Global\\x", "port: a Windows path needs Windows"),
    ],
)
def test_a_wrong_url_says_what_was_expected(url: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        port_opener(url)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


class Machine:
    """/dev and /sys of a VM, with or without udev. Its ports are terminals."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        for name, where in (
            ("KERNEL_DIRECTORY", "sys"),
            ("DEVICES_DIRECTORY", "dev"),
            ("PORTS_DIRECTORY", "dev/virtio-ports"),
        ):
            (directory / where).mkdir(exist_ok=True)
            monkeypatch.setattr(port_module, name, str(directory / where))
        monkeypatch.setattr(port_module, "open_port", lambda path: path)

    def plug(self, device: str, name: str | None, *, node: bool = True) -> None:
        (self.directory / "sys" / device).mkdir()
        if name is not None:
            (self.directory / "sys" / device / "name").write_text(f"{name}\n")
        if node:
            (self.directory / "dev" / device).touch()

    def unplug(self, device: str) -> None:
        shutil.rmtree(self.directory / "sys" / device)
        (self.directory / "dev" / device).unlink()

    def link(self, name: str, device: str) -> None:
        path = self.directory / "dev" / "virtio-ports" / name
        path.unlink(missing_ok=True)
        path.symlink_to(f"../{device}")

    def found(self, name: str = "org.openstack.vchan.0") -> str:
        opened: Any = port_opener(f"virtio:{name}")()
        return str(Path(opened).relative_to(self.directory))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_port_is_found_without_udev_and_found_again_at_another_number(machine: Machine) -> None:
    machine.plug("vport0p1", "org.qemu.guest_agent.0")
    machine.plug("vport1p0", None)
    machine.plug("vport0p2", "org.openstack.vchan.0")
    assert machine.found() == "dev/vport0p2"
    machine.unplug("vport0p2")
    with pytest.raises(PortAbsent, match=r"this VM's ports: org\.qemu\.guest_agent\.0$"):
        machine.found()
    machine.plug("vport0p7", "org.openstack.vchan.0")
    assert machine.found() == "dev/vport0p7"


def test_udevs_link_is_taken_where_it_leads_to_the_port(machine: Machine) -> None:
    machine.plug("vport0p2", "org.openstack.vchan.0")
    machine.link("org.openstack.vchan.0", "vport0p2")
    assert machine.found() == "dev/virtio-ports/org.openstack.vchan.0"


def test_a_stale_udev_link_is_not_followed(machine: Machine) -> None:
    """Made once at the boot; since then the port was plugged in again, and another took its
    number."""
    machine.plug("vport0p2", "org.qemu.guest_agent.0")
    machine.plug("vport0p3", "org.openstack.vchan.0")
    machine.link("org.openstack.vchan.0", "vport0p2")
    assert machine.found() == "dev/vport0p3"
    machine.link("org.openstack.vchan.0", "vport0p9")  # leads nowhere
    assert machine.found() == "dev/vport0p3"


def test_a_container_that_has_the_link_alone(machine: Machine) -> None:
    machine.plug("vport0p2", "org.openstack.vchan.0", node=False)
    (machine.directory / "dev" / "virtio-ports" / "org.openstack.vchan.0").touch()
    assert machine.found() == "dev/virtio-ports/org.openstack.vchan.0"
    shutil.rmtree(machine.directory / "sys")
    assert machine.found() == "dev/virtio-ports/org.openstack.vchan.0"


def test_a_device_that_nobody_made_is_named(machine: Machine) -> None:
    machine.plug("vport0p2", "org.openstack.vchan.0", node=False)
    assert machine.found() == "dev/vport0p2"  # which says that there is no such port


def test_no_port_at_all(machine: Machine) -> None:
    with pytest.raises(PortAbsent, match=r"it may appear later; this VM's ports: none$"):
        machine.found()


@pytest.mark.parametrize("name", ["org.qemu.guest_agent.0", "com.redhat.spice.0", "ORG.QEMU.x"])
def test_ports_that_others_talk_on_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is reserved for .*; expected a name of vchan's own"):
        port_opener(f"virtio:{name}")


@pytest.mark.parametrize("url", ["serial:/dev/ttyS1", "pyserial:socket://localhost:1"])
def test_without_pyserial(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "serial", None)
    with pytest.raises(ConfigError, match="install python3-serial"):
        port_opener(url)


# --- lines


def test_a_line_is_raw_and_passes_every_byte_both_ways(line: tuple[int, str]) -> None:
    other, path = line
    stream = port_opener(f"serial:{path}")()
    assert isinstance(stream, SerialStream)
    with pytest.raises(BlockingIOError):  # not b"", which would mean that it was hung up
        stream.read()
    os.write(other, EVERY_BYTE)
    assert read_exactly(stream.read, 256) == EVERY_BYTE
    with pytest.raises(BlockingIOError):  # nothing is echoed
        os.read(other, 1)
    pass_both_ways(stream, lambda: os.read(other, 4096), lambda data: os.write(other, data))
    stream.close()
    stream.close()


def test_closing_a_line_does_not_touch_a_reused_descriptor(line: tuple[int, str]) -> None:
    """A thread closes it, at some time: the number may be another's by then."""
    stream = port_opener(f"serial:{line[1]}")()
    stream.close()
    assert stream.fileno() == -1
    for use in (stream.read, lambda: stream.write(b"x")):
        with pytest.raises(OSError, match="Bad file descriptor"):
            use()


def test_a_line_has_no_flow_control(line: tuple[int, str]) -> None:
    _, path = line
    stream = open_line(Line(path))
    iflag, oflag, cflag, lflag, _, _, characters = termios.tcgetattr(stream.fileno())
    assert not iflag & (termios.IXON | termios.IXOFF | termios.ICRNL | termios.ISTRIP)
    assert not iflag & termios.BRKINT
    assert characters[termios.VMIN] == 1
    assert not oflag & termios.OPOST
    assert not cflag & termios.CRTSCTS
    assert not lflag & (termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
    stream.close()


def test_options_reach_the_line(line: tuple[int, str]) -> None:
    _, path = line
    stream = open_line(parse_line(f"{path}?baudrate=9600&stopbits=2&rtscts=yes"))
    _, _, cflag, _, ispeed, ospeed, _ = termios.tcgetattr(stream.fileno())
    assert (ispeed, ospeed) == (termios.B9600, termios.B9600)
    assert cflag & termios.CSTOPB
    assert cflag & termios.CRTSCTS
    stream.close()


def test_a_line_that_takes_no_more_does_not_block(line: tuple[int, str]) -> None:
    _, path = line
    stream = open_line(Line(path))
    with pytest.raises(BlockingIOError):
        for _ in range(10_000):
            stream.write(bytes(4096))
    started_s = time.monotonic()
    stream.close()
    assert time.monotonic() - started_s < 15  # of the 30 s that the kernel waits


def test_a_line_that_was_hung_up_ends(line: tuple[int, str]) -> None:
    other, path = line
    stream = open_line(Line(path))
    os.close(other)
    watch = select.poll()
    watch.register(stream.fileno(), select.POLLIN)
    assert watch.poll(WAIT_S * 1000)
    try:
        assert stream.read() == b""
    except OSError as error:
        assert not isinstance(error, BlockingIOError)
    assert stream.ends_at_hangup
    stream.close()


def test_a_line_has_one_opener(line: tuple[int, str]) -> None:
    _, path = line
    other_program = os.open(path, os.O_RDWR | os.O_NOCTTY)
    fcntl.flock(other_program, fcntl.LOCK_EX)
    with pytest.raises(PortBusy, match="another program has it open"):
        open_line(Line(path))
    os.close(other_program)
    open_line(Line(path)).close()


@pytest.mark.parametrize(
    ("path", "kind", "text"),
    [
        ("/dev/nothing", PortAbsent, "no such serial port: it may appear later"),
        ("/dev/null", NotAPort, "is no serial line that works"),
        ("/etc/hostname", NotAPort, "is no character device"),
    ],
)
def test_a_device_that_is_no_serial_line_is_refused(
    path: str, kind: type[LinkError], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        open_line(Line(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# --- pyserial's URLs


def opened(opener: Callable[[], Stream]) -> Stream:
    """Ask until it is open, as the port does."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            return opener()
        except PortAbsent as error:
            if "is being opened" not in str(error):
                raise
            assert time.monotonic() < deadline_s
            time.sleep(0.005)


def test_a_socket_through_pyserial(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        opener = port_opener(f"pyserial:socket://127.0.0.1:{server.getsockname()[1]}")
        stream = opened(opener)
        assert isinstance(stream, SerialStream)  # it has a descriptor: no thread in between
        with server.accept()[0] as other:
            with pytest.raises(BlockingIOError):
                stream.read()
            pass_both_ways(stream, lambda: other.recv(65536), other.send)
        assert read_exactly(lambda: stream.read() or b"end", 3) == b"end"
        closers: list[str] = []
        close = stream._port.close

        def closed() -> None:
            closers.append(threading.current_thread().name)
            close()

        monkeypatch.setattr(stream._port, "close", closed)
        stream.close()  # pyserial sleeps 0.3 s there
        deadline_s = time.monotonic() + WAIT_S
        while not closers:
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        assert closers == ["vchan-line-close"]
        again = opened(opener)
        server.accept()[0].close()
        again.close()


class Hurried(UrlOpener):
    """Its thread comes to its end in the middle of being asked about it."""

    may_end: threading.Event

    @property
    def _opened(self) -> Any:
        opened = self.__dict__.get("opened")
        if opened is None and self._thread is not None:
            self.may_end.set()
            self._thread.join(WAIT_S)
        return opened

    @_opened.setter
    def _opened(self, opened: Any) -> None:
        self.__dict__["opened"] = opened

    def _open(self) -> None:
        assert self.may_end.wait(WAIT_S)
        super()._open()


def test_a_port_that_opens_in_a_thread_is_picked_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        opener = Hurried(f"socket://127.0.0.1:{server.getsockname()[1]}")
        opener.may_end = threading.Event()
        threading.Timer(0.2, opener.may_end.set).start()
        stream = opened(opener)
        server.accept()[0].close()
        stream.close()


def test_a_socket_that_nobody_listens_on_is_tried_again() -> None:
    (port,) = claim_ports(1)
    opener = port_opener(f"pyserial:socket://127.0.0.1:{port}")
    for _ in range(2):
        with pytest.raises(PortAbsent, match=r"cannot be opened: .*refused"):
            opened(opener)
    with pytest.raises(PortAbsent, match="refused"):  # what an operator is told does not alternate
        opener()


def test_a_device_through_pyserial(line: tuple[int, str]) -> None:
    other, path = line
    stream = opened(port_opener(f"pyserial:alt://{path}?class=Serial"))
    assert isinstance(stream, SerialStream)
    with pytest.raises(BlockingIOError):
        stream.read()
    pass_both_ways(stream, lambda: os.read(other, 4096), lambda data: os.write(other, data))
    stream.close()


# --- what has no descriptor


class Telephone:
    """A port as BridgeStream wants it, on a socket; blocks where pyserial would."""

    def __init__(self) -> None:
        self.far, self._near = socket.socketpair()
        self._near.settimeout(BRIDGE_READ_S)
        self.closed = threading.Event()
        self.in_waiting = 0
        self.fails = ""

    def read(self, size: int) -> bytes:
        try:
            return self._near.recv(max(size, 4096))
        except TimeoutError:
            return b""

    def write(self, data: bytes) -> None:
        if self.fails:
            raise OSError(self.fails)
        self._near.sendall(data)

    def close(self) -> None:
        self._near.close()
        self.closed.set()


def test_a_bridge_passes_every_byte_both_ways() -> None:
    port = Telephone()
    stream = BridgeStream(port, "telephone")
    with port.far as far:
        with pytest.raises(BlockingIOError):
            stream.read()
        pass_both_ways(stream, lambda: far.recv(65536), far.send)
        stream.close()
        stream.close()
        assert port.closed.wait(WAIT_S)


def test_a_bridge_takes_no_more_than_its_port() -> None:
    port = Telephone()
    stream = BridgeStream(port, "telephone")
    with port.far:
        taken = 0
        with pytest.raises(BlockingIOError):
            for _ in range(100):
                taken += stream.write(bytes(1 << 16))
                time.sleep(0.01)
        assert taken < 2 << 20
        stream.close()


def test_a_bridge_whose_port_breaks_says_why() -> None:
    port = Telephone()
    port.fails = "the modem\nis on fire"
    stream = BridgeStream(port, "telephone")
    with port.far:
        stream.write(b"x")
        with pytest.raises(OSError, match="the modem is on fire"):
            read_exactly(lambda: stream.read() or b"end", 3)
        assert port.closed.wait(WAIT_S)
        stream.close()


def test_a_url_without_a_descriptor_is_bridged() -> None:
    stream = opened(port_opener("pyserial:loop://"))  # it gives back what is written
    assert isinstance(stream, BridgeStream)
    stream.write(EVERY_BYTE)
    assert read_exactly(stream.read, 256) == EVERY_BYTE
    stream.close()


def test_raw_terminals_are_what_pyserial_makes() -> None:
    """The line's other tests rest on this: a new pseudo-terminal is not raw by itself."""
    other, ours = pty.openpty()
    assert termios.tcgetattr(ours)[tty.LFLAG] & termios.ECHO
    os.close(other)
    os.close(ours)


# --- staying open


class Flapping:
    """A port that opens well and is lost at once."""

    def __init__(self, loop: Loop, lives_s: float) -> None:
        self.opened_s: list[float] = []
        self._loop = loop
        self._lives_s = lives_s
        self._ends: list[socket.socket] = []

    def __call__(self) -> Stream:
        self.opened_s.append(self._loop.time())
        ours, theirs = socket.socketpair()
        self._ends.append(theirs)
        self._loop.call_later(self._lives_s, theirs.close)
        return SocketStream(ours, "flapping")

    def close(self) -> None:
        for end in self._ends:
            end.close()


def test_a_stream_that_is_lost_again_and_again_is_opened_ever_more_slowly() -> None:
    with Loop() as loop:
        opener = Flapping(loop, 0.0)
        said: list[str] = []
        session = Session(Config(Role.GUEST, bytes(16)), os.urandom)
        port = Port(loop, opener, session, lambda _: None, said.append)
        port.open()
        loop.call_later(1.5, loop.stop)
        loop.run()
        port.close()
        opener.close()
    # At 0, then after 0.02, 0.1, 0.5 and 2 s; later on a machine that is busy, never sooner.
    times = opener.opened_s
    assert 2 <= len(times) <= 4
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert all(gap >= least for gap, least in zip(gaps, FLAPPING_S, strict=False))
    assert len(said) <= 2 * len(times)


def test_a_stream_that_lived_is_opened_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "STEADY_S", 0.01)
    with Loop() as loop:
        opener = Flapping(loop, 0.02)
        session = Session(Config(Role.GUEST, bytes(16)), os.urandom)
        port = Port(loop, opener, session, lambda _: None, lambda _: None)
        port.open()
        deadline = loop.call_later(WAIT_S, loop.stop)
        while len(opener.opened_s) < 20:
            loop.run_once()
            assert loop.time() < deadline.at_s
        port.close()
        opener.close()
