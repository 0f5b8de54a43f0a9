"""The rig itself works: whatever fails here is not vchan's fault."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import RigError, debian_image, rig_directory, wait_until
from tests.rig.guest import GuestShell, GuestSpec, QemuGuest, connect
from tests.rig.guest_image import (
    PORT_ECHO,
    PYTHON,
    SHELL_PORT,
    VCHAN_PORT,
    GuestImage,
    Service,
    build,
)
from tests.rig.kept import cache_directory
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import (
    missing_for_libvirt,
    missing_for_peers,
    missing_for_qemu,
    missing_for_rabbit,
)

pytestmark = pytest.mark.real

needs_rabbit = pytest.mark.skipif(bool(missing_for_rabbit()), reason=str(missing_for_rabbit()))
needs_qemu = pytest.mark.skipif(bool(missing_for_qemu()), reason=str(missing_for_qemu()))
needs_libvirt = pytest.mark.skipif(bool(missing_for_libvirt()), reason=str(missing_for_libvirt()))
needs_root = pytest.mark.skipif(
    bool(debian_image.missing_for_debian()), reason=str(debian_image.missing_for_debian())
)
needs_peers = pytest.mark.skipif(bool(missing_for_peers()), reason=str(missing_for_peers()))

GUEST_AGENT_PORT = "org.qemu.guest_agent.0"
# Stands in for the guest's daemon: opens the port whenever it is there, sends back what it reads.
ECHO = f"""
import os, time
while True:
    try:
        port = os.open("/dev/virtio-ports/{VCHAN_PORT}", os.O_RDWR)
    except OSError:
        time.sleep(0.02)
        continue
    try:
        while True:
            received = os.read(port, 4096)
            if received:
                os.write(port, received)
            else:  # no host there
                time.sleep(0.02)
    except OSError:
        os.close(port)
"""
ECHO_SERVICE = Service("echo", f"{PYTHON} /app/echo.py")


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with rig_directory() as path:
        yield path
        assert processes_of(path) == []


@pytest.fixture(scope="module")
def image() -> GuestImage:
    return build({"app/echo.py": ECHO.encode()})


def processes_of(directory: Path) -> list[str]:
    """Command lines of processes that were started for this directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes()
        except OSError:  # it just ended
            continue
        if os.fsencode(directory) in command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


def guests_of(children: Path) -> list[Path]:
    """Directories of the guests among these processes, whose QEMU has begun."""
    found = []
    for pid in children.read_text().split():
        with contextlib.suppress(OSError):  # it just ended
            found.append(Path(f"/proc/{pid}/cwd").readlink())
    return [directory for directory in found if (directory / "qmp").exists()]


def echoes(channel: socket.socket, payload: bytes) -> bool:
    """Whether the guest sends this back, which takes until it has booted."""
    channel.settimeout(60.0)
    channel.sendall(payload)
    received = b""
    while len(received) < len(payload):
        part = channel.recv(65536)
        if not part:
            break
        received += part
    return received == payload


# --- RabbitMQ


@needs_rabbit
def test_brokers_run_side_by_side_and_restart(directory: Path) -> None:
    amqp = pytest.importorskip("amqp")
    with RabbitServer(directory / "r1") as broker, RabbitServer(directory / "r2") as other:
        client = amqp.Connection(f"127.0.0.1:{broker.port}", "guest", "guest")
        client.connect()
        channel = client.channel()
        channel.queue_declare("kept", durable=True, auto_delete=False)
        channel.confirm_select()
        channel.basic_publish_confirm(amqp.Message(b"x", delivery_mode=2), routing_key="kept")
        assert other.queues() == {}

        broker.kill_connections()
        with pytest.raises((amqp.ConnectionError, OSError)):
            client.drain_events(timeout=10)

        broker.restart(crash=True)
        assert broker.queues()["kept"].ready == 1
    assert processes_of(directory) == []


@needs_rabbit
def test_a_broker_that_cannot_start_says_why(directory: Path) -> None:
    broker = RabbitServer(directory / "r3", configuration="nonsense = here")
    with pytest.raises(RigError, match="nonsense"):
        broker.__enter__()
    assert processes_of(directory) == []


# --- QEMU


@needs_qemu
def test_an_image_is_built_again_only_when_its_content_changes(image: GuestImage) -> None:
    assert build({"app/echo.py": ECHO.encode()}) == image
    other = build({"app/echo.py": ECHO.encode(), "site/other.py": b"value = 1\n"})
    assert other.initrd != image.initrd
    assert other.kernel == image.kernel


@needs_qemu
def test_a_guest_boots_is_driven_saved_and_restored(directory: Path, image: GuestImage) -> None:
    with QemuGuest(directory / "g", GuestSpec(image, services=(ECHO_SERVICE,))) as guest:
        with guest.connect() as channel:
            assert echoes(channel, b"booted")
            assert guest.shell("echo out; echo err >&2; exit 3").status == 3
            assert guest.shell(f"{PYTHON} -c 'import ssl, vchan; print(6 * 7)'").output == "42\n"

            guest.plug("org.example.hot")
            watch = "until [ -e /dev/virtio-ports/org.example.hot ]; do usleep 1000; done"
            assert guest.shell(watch).status == 0
            guest.unplug("org.example.hot")
            watch = "while [ -L /dev/virtio-ports/org.example.hot ]; do usleep 1000; done"
            assert guest.shell(watch).status == 0

            # Held, it stays dead; let go, init starts it again.
            guest.shell("touch /run/echo.hold; kill -9 $(cat /run/echo.pid)")
            assert guest.shell("usleep 200000; kill -0 $(cat /run/echo.pid)").status != 0
            guest.shell("rm /run/echo.hold")
            assert echoes(channel, b"started again")
        snapshot = guest.snapshot(directory / "snapshot")

    for number in range(2):
        with QemuGuest.restored(directory / f"g{number}", snapshot) as guest:
            with guest.connect() as channel:
                assert echoes(channel, b"restored")
            assert guest.shell("echo shell").output == "shell\n"


@needs_qemu
def test_a_guest_whose_kernel_panics_starts_again(directory: Path, image: GuestImage) -> None:
    with QemuGuest(directory / "panics", GuestSpec(image, services=(ECHO_SERVICE,))) as guest:
        assert guest.shell("touch /run/before").status == 0
        with pytest.raises(RigError):
            guest.shell("echo c >/proc/sysrq-trigger", timeout_s=1.0)
        for _ in range(30):
            with contextlib.suppress(RigError):  # what it had read when it panicked is lost
                assert guest.shell("test -e /run/before", timeout_s=2.0).status == 1
                break
        else:
            pytest.fail("it does not start again")
        with guest.connect() as channel:
            assert echoes(channel, b"started again")


@needs_peers
def test_the_peers_run_in_a_guest(directory: Path) -> None:
    services = (
        Service("echo", f"{PORT_ECHO} /dev/virtio-ports/{VCHAN_PORT}"),
        Service("agent", f"qemu-ga -m virtio-serial -p /dev/virtio-ports/{GUEST_AGENT_PORT}"),
    )
    spec = GuestSpec(build(peers=True), services, ports=(VCHAN_PORT, GUEST_AGENT_PORT))
    with QemuGuest(directory / "p", spec) as guest:
        with guest.connect() as channel:
            assert echoes(channel, bytes(20_000))
        with guest.connect(GUEST_AGENT_PORT) as agent:
            agent.sendall(b'{"execute": "guest-ping"}\n')
            assert json.loads(agent.makefile("rb").readline()) == {"return": {}}


# --- libvirt

if missing_for_libvirt() is None:
    from tests.rig.libvirtd import (
        LibvirtHost,
        channel_path,
        channel_xml,
        domain_xml,
        migrate,
        nova_metadata,
    )


@pytest.fixture(scope="module")
def hosts(directory: Path) -> "Iterator[tuple[LibvirtHost, LibvirtHost]]":
    warm_cache = cache_directory() / "libvirt"
    with (
        LibvirtHost(directory / "a", 1, warm_cache) as first,
        LibvirtHost(directory / "b", 2, warm_cache) as second,
    ):
        yield first, second


@needs_libvirt
def test_a_guest_moves_there_and_back(
    directory: Path, image: GuestImage, hosts: "tuple[LibvirtHost, LibvirtHost]"
) -> None:
    first, second = hosts
    xml = domain_xml(
        "moves",
        "11111111-1111-4111-8111-111111111111",
        image.staged(directory / "image"),
        console=first.console_path("moves"),
        services=(ECHO_SERVICE,),
        metadata=nova_metadata(name="n", project="p", user="u", flavor="f", image="i"),
    )
    here = first.open()
    there = second.open()
    domain = here.defineXML(xml)
    domain.create()
    with connect(channel_path(domain)) as channel:
        assert echoes(channel, b"booted")
    for source, destination, connection in ((first, second, there), (second, first, here)):
        migrate(domain, destination)
        domain = connection.lookupByName("moves")
        with connect(channel_path(domain)) as channel:
            assert echoes(channel, source.uri.encode())
    shell = GuestShell(channel_path(domain, SHELL_PORT))
    shell.check("kill -0 $(cat /run/echo.pid)")
    # The processor is the one that is fast without hardware virtualization.
    assert shell.run("grep -q erms /proc/cpuinfo").status != 0
    shell.close()
    domain.destroy()
    domain.undefine()
    here.close()
    there.close()


@needs_libvirt
def test_a_channel_is_plugged_in_and_outlives_the_daemon(
    directory: Path, image: GuestImage, hosts: "tuple[LibvirtHost, LibvirtHost]"
) -> None:
    host, _ = hosts
    xml = domain_xml(
        "plugged",
        "22222222-2222-4222-8222-222222222222",
        image.staged(directory / "image"),
        console=host.console_path("plugged"),
        services=(ECHO_SERVICE,),
        channel=False,
    )
    connection = host.open()
    domain = connection.createXML(xml)
    shell = GuestShell(channel_path(domain, SHELL_PORT))
    ports = "ls /dev/virtio-ports"
    assert shell.check(ports, timeout_s=60.0).split() == [SHELL_PORT]

    domain.attachDevice(channel_xml(VCHAN_PORT))
    with connect(channel_path(domain)) as channel:
        assert echoes(channel, b"plugged in")
        assert shell.check(ports).split() == [VCHAN_PORT, SHELL_PORT]
        connection.close()
        host.restart()
        assert echoes(channel, b"still there")
    shell.close()
    connection = host.open()
    assert [domain.name() for domain in connection.listAllDomains()] == ["plugged"]
    connection.lookupByName("plugged").destroy()
    connection.close()


@needs_libvirt
def test_without_a_controller_nothing_can_be_plugged_in(
    directory: Path, image: GuestImage, hosts: "tuple[LibvirtHost, LibvirtHost]"
) -> None:
    import libvirt

    _, host = hosts
    xml = domain_xml(
        "bare",
        "33333333-3333-4333-8333-333333333333",
        image.staged(directory / "image"),
        console=host.console_path("bare"),
        channel=False,
        controller=False,
        shell=False,
    )
    connection = host.open()
    domain = connection.createXML(xml)
    with pytest.raises(libvirt.libvirtError, match="no virtio-serial controllers"):
        domain.attachDevice(channel_xml(VCHAN_PORT))
    connection.close()  # the guest is left for the host to end


@needs_peers
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP], ids=lambda each: each.name)
def test_what_a_benchmark_runs_ends_with_it(ending: signal.Signals) -> None:
    words = [sys.executable, "-m", "tests.bench", "--start"]
    with subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) as bench:
        children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
        try:
            wait_until(
                lambda: bool(guests_of(children)),
                timeout_s=180.0,  # the image may have to be made first
                interval_s=0.02,
                failure=lambda: "no guest runs",
            )
            (directory,) = guests_of(children)
        finally:
            bench.send_signal(ending)
    assert bench.returncode == 128 + ending
    assert processes_of(directory) == []
    assert not directory.exists()


@needs_root
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name)
def test_what_runs_in_a_world_ends_with_the_script(directory: Path, ending: signal.Signals) -> None:
    cache = directory / ending.name
    tree = cache / "world-small"
    cache.mkdir()
    debian_image.copy_of_tree(debian_image.build(), tree)
    (tree / "src").mkdir()
    (tree / ".made").touch()
    within = cache / "within"  # a word by which what runs there is found
    script = f"bash -c 'sleep inf; : {within}' & echo there; sleep inf; : {within}"
    world = subprocess.Popen(
        [Path(__file__).parents[2] / "scripts/world", "small", "bash", "-c", script],
        env=os.environ | {"VCHAN_CACHE": str(cache)},
        stdout=subprocess.PIPE,
    )
    with world:
        assert world.stdout is not None
        assert world.stdout.readline() == b"there\n"
        assert processes_of(within)
        world.send_signal(ending)
    assert world.returncode == -ending
    wait_until(
        lambda: not processes_of(within),
        timeout_s=20.0,
        interval_s=0.05,
        failure=lambda: f"left: {processes_of(within)}",
    )
