"""Hypervisor and Domains against real libvirt daemons, with real migrations between two of them.

The guests have no system: they fill their memory with noise, so that a throttled migration stays
in flight until the test lets it go on, and then halt.
"""

import os
import signal
import socket
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.rig import rig_directory
from tests.rig.requirements import missing_for_libvirt

libvirt = pytest.importorskip("libvirt")
if (MISSING := missing_for_libvirt()) is not None:
    pytest.skip(MISSING, allow_module_level=True)

from tests.rig.guest_image import cache_directory  # noqa: E402  (what follows needs libvirt)
from tests.rig.libvirtd import LibvirtHost  # noqa: E402
from vchan.errors import ConfigError  # noqa: E402
from vchan.host import hypervisor as hypervisor_module  # noqa: E402
from vchan.host.domain_xml import ALIAS, TARGET_NAME, Selection, channel_xml  # noqa: E402
from vchan.host.domains import (  # noqa: E402
    NO_CONTROLLER_CONFIGURED,
    NO_CONTROLLER_TRANSIENT,
    Attach,
    AttachDone,
    Changed,
    Connect,
    DetachDone,
    Domains,
    Effect,
    Gone,
    Happened,
    Hush,
    HypervisorEvent,
    HypervisorLost,
    Rebooted,
    Release,
    Resync,
    Speak,
    Warn,
    Why,
)
from vchan.host.hypervisor import Hypervisor, read_facts  # noqa: E402

pytestmark = pytest.mark.real

WAIT_S = 20.0
SNIPPETS = Path(__file__).parents[2] / "libvirt"

# A boot sector. Real mode: cli; lgdt; cr0.pe = 1; ljmp 8:pm. Protected mode: ds = es = 16; from
# 1 MiB on store 6 Mi words, each the one before plus 0x9e3779b9 (no two pages are alike, none
# compresses); then halt for ever. The GDT is at 0x38: null, flat code, flat data.
NOISE_BOOT_SECTOR = (
    bytes.fromhex(
        "fa2e660f0116507c0f20c00c010f22c066ea187c0000080066b810008ed88ec0"
        "bf00001000b90000600005b979379eabe2f8f4ebfd8d76000000000000000000"
        "ffff0000009acf00ffff00000092cf001700387c0000"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)
FLOPPY_BYTES = 1440 * 1024
# SeaBIOS boots the floppy after half a second here; too early only makes a migration quicker.
NOISE_S = 1.5


class Watcher:
    """A host daemon reduced to Hypervisor and Domains: it records what it would do."""

    def __init__(self, uri: str, rules: Sequence[str] = (), *, poll_s: float = 30.0) -> None:
        self.events: list[HypervisorEvent] = []
        self.effects: list[Effect] = []
        self.times_s: list[float] = []  # of the effects
        self._domains = Domains(Selection.parse(rules))
        self._news = threading.Condition()
        self.hypervisor = Hypervisor(uri, self._on_event, poll_s=poll_s)

    def __enter__(self) -> "Watcher":
        self.hypervisor.start()
        try:
            self.wait_event(lambda event: isinstance(event, Resync))
        except BaseException:
            self.hypervisor.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.hypervisor.stop()

    def _on_event(self, event: HypervisorEvent) -> None:
        now_s = time.monotonic()
        with self._news:
            effects = self._domains.receive(event, now_s)
            self.events.append(event)
            self.effects += effects
            self.times_s += [now_s] * len(effects)
            self._news.notify_all()
        for effect in effects:
            if isinstance(effect, Attach):
                self.hypervisor.attach(effect.uuid)

    def of(self, uuid: str) -> list[Effect]:
        """What was done for one domain so far, in order."""
        with self._news:
            return [effect for effect in self.effects if effect.uuid == uuid]

    def time_of(self, wanted: Effect) -> float:
        with self._news:
            return self.times_s[self.effects.index(wanted)]

    def connect_of(self, uuid: str, number: int = 0) -> Connect:
        self.wait(lambda: len(connects(self.of(uuid))) > number)
        return connects(self.of(uuid))[number]

    def wait(self, reached: Callable[[], bool]) -> None:
        with self._news:
            if not self._news.wait_for(reached, WAIT_S):
                raise AssertionError(f"not reached in {WAIT_S} s; {self.effects} {self.events}")

    def wait_effect(self, wanted: Effect, count: int = 1) -> None:
        self.wait(lambda: self.effects.count(wanted) >= count)

    def wait_event(self, wanted: Callable[[HypervisorEvent], bool]) -> None:
        self.wait(lambda: any(wanted(event) for event in self.events))

    def settle(self, uuid: str) -> None:
        """Wait until everything that has happened to a domain so far has been reacted to."""
        with self._news:
            before = len(self.events)
        self.hypervisor.refresh(uuid)
        self.wait(
            lambda: any(
                isinstance(event, Changed) and event.facts.uuid == uuid
                for event in self.events[before:]
            )
        )


def connects(effects: Sequence[Effect]) -> list[Connect]:
    return [effect for effect in effects if isinstance(effect, Connect)]


def domain_xml(
    name: str,
    uuid: str,
    *,
    channel: bool = True,
    controller: bool = True,
    floppy: Path | None = None,
) -> str:
    disk = (
        f"""<disk type='file' device='floppy'><driver name='qemu' type='raw'/>
        <source file='{floppy}'/><target dev='fda' bus='fdc'/><readonly/></disk>"""
        if floppy is not None
        else ""
    )
    return f"""<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid>
      <memory unit='MiB'>32</memory>
      <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='fd'/></os>
      <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
        <controller type='usb' model='none'/><memballoon model='none'/>
        {"<controller type='virtio-serial' index='0'/>" if controller else ""}
        {disk}{channel_xml() if channel else ""}
      </devices></domain>"""


class Host:
    """A libvirtd and a connection of the test's own to it."""

    def __init__(self, daemon: LibvirtHost, floppy: Path) -> None:
        self.daemon = daemon
        self.uri: str = daemon.uri
        self.conn: Any = daemon.open()
        self._floppy = floppy

    def reopen(self) -> None:
        self.conn = self.daemon.open()

    @contextmanager
    def guest(
        self,
        name: str,
        *,
        define: bool = False,
        start: bool = True,
        noise: bool = False,
        **xml: bool,
    ) -> Iterator[Any]:
        """A domain; whatever the test made of it, it is gone afterwards."""
        uuid = str(uuids.uuid4())
        text = domain_xml(name, uuid, floppy=self._floppy if noise else None, **xml)
        try:
            domain = self.conn.defineXML(text) if define else None
            if start:
                domain = self.conn.lookupByUUIDString(uuid) if define else self.conn.createXML(text)
                if define:
                    domain.create()
            if noise:
                time.sleep(NOISE_S)
            yield domain
        finally:
            remove(self.conn, uuid)


def remove(conn: Any, uuid: str) -> None:
    for step in ("destroy", "managedSaveRemove", "undefine"):
        try:
            getattr(conn.lookupByUUIDString(uuid), step)()
        except libvirt.libvirtError:
            pass  # it may be gone, off, or never have been saved or defined


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    warm = cache_directory() / "libvirt"
    with (
        rig_directory() as directory,
        LibvirtHost(directory / "a", 1, warm) as first,
        LibvirtHost(directory / "b", 2, warm) as second,
    ):
        floppy = directory / "noise"
        floppy.write_bytes(NOISE_BOOT_SECTOR.ljust(FLOPPY_BYTES, b"\0"))
        floppy.chmod(0o644)
        yield Host(first, floppy), Host(second, floppy)


@pytest.fixture
def host(hosts: tuple[Host, Host]) -> Host:
    return hosts[0]


class Migration:
    """A migration in the background, throttled so that it stays in flight until `go`."""

    def __init__(self, domain: Any, source: Host, destination: Host, flags: int = 0) -> None:
        self._conn = source.daemon.open()  # a migration occupies its connection
        self._domain = self._conn.lookupByUUIDString(domain.UUIDString())
        self._control = domain
        self._destination = destination
        self._flags = flags | libvirt.VIR_MIGRATE_PEER2PEER
        self.error: Any = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        parameters = {
            libvirt.VIR_MIGRATE_PARAM_URI: self._destination.daemon.migrate_uri(),
            libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 1,  # MiB/s
        }
        try:
            self._domain.migrateToURI3(self._destination.uri, parameters, self._flags)
        except libvirt.libvirtError as error:
            self.error = error

    def go(self) -> None:
        self._control.migrateSetMaxSpeed(1000, 0)

    def abort(self) -> None:
        self._control.abortJob()

    def join(self) -> Any:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._conn.close()
        return self.error


# --- one host ---------------------------------------------------------------------------------


def test_a_domain_from_start_to_end(host: Host) -> None:
    with Watcher(host.uri) as watcher, host.guest("whole", define=True) as domain:
        uuid = domain.UUIDString()
        connect = watcher.connect_of(uuid)
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(5)
            channel.connect(connect.path)
        domain.suspend()
        domain.resume()
        domain.reset(0)
        watcher.wait_event(lambda event: event == Rebooted(uuid))
        watcher.settle(uuid)
        assert watcher.of(uuid) == [connect, Speak(uuid)]
        domain.destroy()
        watcher.wait_effect(Release(uuid, Why.STOPPED))
        domain.undefine()
        watcher.wait_event(lambda event: event == Gone(uuid, "whole"))
        assert watcher.of(uuid) == [connect, Speak(uuid), Release(uuid, Why.STOPPED)]


def test_a_paused_domain_is_served_when_the_daemon_starts(host: Host) -> None:
    with host.guest("paused") as domain:
        domain.suspend()
        with Watcher(host.uri) as watcher:
            uuid = domain.UUIDString()
            assert watcher.of(uuid) == [watcher.connect_of(uuid), Speak(uuid)]


def test_a_killed_qemu_is_a_failure(host: Host) -> None:
    with Watcher(host.uri) as watcher, host.guest("killed") as domain:
        uuid = domain.UUIDString()
        watcher.wait_effect(Speak(uuid))
        kill_qemu(host, "killed")
        watcher.wait_effect(Release(uuid, Why.FAILED))


def kill_qemu(host: Host, name: str) -> None:
    os.kill(host.daemon.qemu_pid(name), signal.SIGKILL)


def test_channel_is_attached_and_detached(host: Host) -> None:
    with (
        Watcher(host.uri, ["name:hot*"]) as watcher,
        host.guest("hot", define=True, channel=False) as domain,
        host.guest("cold", channel=False) as other,
    ):
        uuid = domain.UUIDString()
        # Attached for the next boot when it was defined, live when it was started; or both at once.
        connect = watcher.connect_of(uuid)
        watcher.settle(uuid)
        done = [event for event in watcher.events if isinstance(event, AttachDone)]
        assert {event.problem for event in done} == {None}
        assert any(event.live for event in done) or f"'{ALIAS}'" in domain.XMLDesc(0)
        for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
            assert f"name='{ALIAS}'" in domain.XMLDesc(flags)
            assert f"name='{TARGET_NAME}'" in domain.XMLDesc(flags)
        attaches = watcher.of(uuid).count(Attach(uuid))

        watcher.hypervisor.detach(uuid)
        watcher.wait_effect(Release(uuid, Why.DETACHED))
        watcher.wait_event(lambda event: event == DetachDone(uuid, None))
        watcher.settle(uuid)
        for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
            assert TARGET_NAME not in domain.XMLDesc(flags)
        # An operator's detach is not undone.
        assert watcher.of(uuid).count(Attach(uuid)) == attaches
        assert watcher.of(uuid)[-3:] == [connect, Speak(uuid), Release(uuid, Why.DETACHED)]

        watcher.hypervisor.attach(uuid)
        watcher.wait_effect(Speak(uuid), count=2)
        assert watcher.of(other.UUIDString()) == []  # not selected


def test_channel_without_our_alias_is_detached_too(host: Host) -> None:
    with (
        Watcher(host.uri) as watcher,
        host.guest("theirs", define=True, channel=False) as domain,
    ):
        uuid = domain.UUIDString()
        both = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
        domain.attachDeviceFlags(channel_xml(alias=None), both)
        watcher.wait_effect(Speak(uuid))
        watcher.hypervisor.detach(uuid)
        watcher.wait_event(lambda event: event == DetachDone(uuid, None))
        # libvirt may answer before QEMU has let go of the device.
        watcher.wait_effect(Release(uuid, Why.DETACHED))
        assert TARGET_NAME not in domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        watcher.hypervisor.detach(uuid)
        watcher.wait_event(lambda event: event == DetachDone(uuid, "it has no channel"))


def test_without_a_controller_the_channel_comes_with_the_next_boot(host: Host) -> None:
    with host.guest("plain", define=True, channel=False, controller=False) as domain:
        uuid = domain.UUIDString()
        with Watcher(host.uri, ["*"]) as watcher:
            watcher.wait_event(
                lambda event: event == AttachDone(uuid, False, True, NO_CONTROLLER_CONFIGURED)
            )
            watcher.settle(uuid)
            assert watcher.of(uuid) == [
                Attach(uuid),
                Warn(uuid, "plain", NO_CONTROLLER_CONFIGURED),
            ]
            domain.destroy()
            domain.create()
            watcher.wait_effect(Speak(uuid))


def test_a_transient_domain_without_a_controller_cannot_be_helped(host: Host) -> None:
    with (
        host.guest("bare", channel=False, controller=False) as domain,
        Watcher(host.uri, ["*"]) as watcher,
    ):
        uuid = domain.UUIDString()
        assert watcher.of(uuid) == [Warn(uuid, "bare", NO_CONTROLLER_TRANSIENT)]
        watcher.hypervisor.attach(uuid)  # an operator insists
        watcher.wait_event(
            lambda event: event == AttachDone(uuid, False, False, NO_CONTROLLER_TRANSIENT)
        )


def test_commands_for_an_unknown_domain(host: Host) -> None:
    unknown = str(uuids.uuid4())
    with Watcher(host.uri) as watcher:
        watcher.hypervisor.refresh(unknown)
        watcher.hypervisor.detach(unknown)
        watcher.hypervisor.attach(unknown)
        watcher.wait_event(lambda event: isinstance(event, AttachDone))
        problems = [
            event.problem for event in watcher.events if isinstance(event, AttachDone | DetachDone)
        ]
        assert len(problems) == 2
        assert all((problem or "").startswith("this host has no such VM") for problem in problems)


def test_save_and_restore(host: Host) -> None:
    with Watcher(host.uri) as watcher, host.guest("saved", define=True) as domain:
        uuid = domain.UUIDString()
        before = watcher.connect_of(uuid)
        domain.managedSave()
        watcher.wait_effect(Release(uuid, Why.SAVED))
        domain.create()
        after = watcher.connect_of(uuid, 1)
        watcher.wait_effect(Speak(uuid), count=2)
        assert after.path != before.path
        assert watcher.of(uuid) == [
            before,
            Speak(uuid),
            Release(uuid, Why.SAVED),
            after,
            Speak(uuid),
        ]


def test_libvirtd_is_killed_and_comes_back(host: Host) -> None:
    with Watcher(host.uri) as watcher, host.guest("stays") as stays, host.guest("dies") as dies:
        stays_uuid, dies_uuid = stays.UUIDString(), dies.UUIDString()
        watcher.wait_effect(Speak(stays_uuid))
        watcher.wait_effect(Speak(dies_uuid))
        host.daemon.stop(signal.SIGKILL)
        watcher.wait_event(lambda event: isinstance(event, HypervisorLost))
        watcher.hypervisor.attach(stays_uuid)
        watcher.wait_event(
            lambda event: (
                isinstance(event, AttachDone)
                and (event.problem or "").startswith("libvirtd cannot be reached")
            )
        )
        kill_qemu(host, "dies")
        host.daemon.start()
        host.reopen()
        watcher.wait(lambda: sum(isinstance(event, Resync) for event in watcher.events) == 2)
        watcher.wait(lambda: isinstance(watcher.of(dies_uuid)[-1], Release))
        assert [type(event) for event in watcher.events].count(HypervisorLost) == 1
        # Its session never noticed (the warning is about the attach above); events come again.
        assert [type(effect) for effect in watcher.of(stays_uuid)] == [Connect, Speak, Warn]
        host.conn.lookupByUUIDString(stays_uuid).destroy()
        watcher.wait_effect(Release(stays_uuid, Why.STOPPED))


def test_a_poll_makes_good_for_missed_events(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hypervisor, "_on_lifecycle", lambda *_: None)
    with Watcher(host.uri, poll_s=0.3) as watcher, host.guest("missed") as domain:
        uuid = domain.UUIDString()
        watcher.wait_effect(Speak(uuid))
        domain.destroy()
        watcher.wait_effect(Release(uuid, Why.GONE))
        assert not any(isinstance(event, Happened) for event in watcher.events)


def test_stop_is_clean_and_can_be_followed_by_another_start(host: Host) -> None:
    for _ in range(2):
        with Watcher(host.uri):
            pass
        assert not [thread for thread in threading.enumerate() if "libvirt" in thread.name]


def test_libvirtd_that_is_not_there(host: Host) -> None:
    events: list[HypervisorEvent] = []
    told = threading.Event()

    def post(event: HypervisorEvent) -> None:
        events.append(event)
        told.set()

    hypervisor = Hypervisor("qemu+unix:///session?socket=/nonexistent", post)
    hypervisor.start()
    assert told.wait(WAIT_S)
    hypervisor.stop()
    assert len(events) == 1
    assert isinstance(events[0], HypervisorLost)
    assert "libvirtd cannot be reached" in events[0].reason


def test_the_snippets_are_good(host: Host) -> None:
    example = (SNIPPETS / "domain-example.xml").read_text().replace("type='kvm'", "type='qemu'")
    metadata = (SNIPPETS / "nova-metadata-example.xml").read_text()
    example = example.replace("<devices>", f"<metadata>{metadata}</metadata><devices>")
    domain = host.conn.defineXML(example)
    try:
        facts = read_facts(domain)
        assert facts.configured
        assert facts.channel_alias == ALIAS
        assert all(facts.metadata.values())
        for name in ("channel.xml", "channel-with-path.xml"):
            domain.detachDeviceAlias(ALIAS, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
            assert not read_facts(domain).configured
            snippet = (SNIPPETS / name).read_text()
            domain.attachDeviceFlags(snippet, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
            assert read_facts(domain).configured
        controller = (SNIPPETS / "controller.xml").read_text().replace("index='0'", "index='1'")
        domain.attachDeviceFlags(controller, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    finally:
        remove(host.conn, domain.UUIDString())


def test_libvirt_python_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for fake in (None, object()):  # object(): the folder libvirt/, imported as an empty package
        monkeypatch.setattr(hypervisor_module, "libvirt", fake)
        with pytest.raises(ConfigError, match=r"vchan\[host\]"):
            Hypervisor("test:///default", lambda event: None)


# --- two hosts --------------------------------------------------------------------------------


def test_live_migration(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    with (
        Watcher(a.uri) as source,
        Watcher(b.uri) as destination,
        a.guest("moves", noise=True) as domain,
    ):
        uuid = domain.UUIDString()
        before = source.connect_of(uuid)
        try:
            migration = Migration(domain, a, b, libvirt.VIR_MIGRATE_LIVE)
            after = destination.connect_of(uuid)
            # A daemon that comes up in the middle must see what has been going on.
            with Watcher(a.uri) as late_source, Watcher(b.uri) as late_destination:
                assert late_source.of(uuid) == [before, Speak(uuid)]
                assert late_destination.of(uuid) == [after]
                assert destination.of(uuid) == [after]
                migration.go()
                for watcher in (destination, late_destination):
                    watcher.wait_effect(Speak(uuid))
                    assert watcher.of(uuid) == [after, Speak(uuid)]
                for watcher in (source, late_source):
                    watcher.wait_effect(Release(uuid, Why.MIGRATED))
                    assert watcher.of(uuid) == [
                        before,
                        Speak(uuid),
                        Hush(uuid),
                        Release(uuid, Why.MIGRATED),
                    ]
            assert migration.join() is None
            hush_s = source.time_of(Hush(uuid))
            connect_s, speak_s = destination.time_of(after), destination.time_of(Speak(uuid))
            release_s = source.time_of(Release(uuid, Why.MIGRATED))
            assert connect_s < hush_s < speak_s < release_s
            print(f"hush to speak {speak_s - hush_s:.3f} s, to release {release_s - hush_s:.3f} s")
        finally:
            remove(b.conn, uuid)
        destination.wait_effect(Release(uuid, Why.STOPPED))


def test_migration_that_is_aborted_after_the_guest_has_stopped(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    with (
        Watcher(a.uri) as source,
        Watcher(b.uri) as destination,
        a.guest("returns", noise=True) as domain,
    ):
        uuid = domain.UUIDString()
        before = source.connect_of(uuid)
        migration = Migration(domain, a, b)  # not live: the source stops first
        after = destination.connect_of(uuid)
        source.wait_effect(Hush(uuid))
        with Watcher(a.uri) as late_source:
            assert late_source.of(uuid) == [before]  # connected, silent
            migration.abort()
            source.wait_effect(Speak(uuid), count=2)
            late_source.wait_effect(Speak(uuid))
            destination.wait_effect(Release(uuid, Why.ARRIVAL_FAILED))
            assert migration.join().get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED
            source.settle(uuid)
            late_source.settle(uuid)
            assert late_source.of(uuid) == [before, Speak(uuid)]
        assert source.of(uuid) == [before, Speak(uuid), Hush(uuid), Speak(uuid)]
        assert destination.of(uuid) == [after, Release(uuid, Why.ARRIVAL_FAILED)]


def test_migration_that_ends_paused(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    with (
        Watcher(a.uri) as source,
        Watcher(b.uri) as destination,
        a.guest("rests", noise=True) as domain,
    ):
        uuid = domain.UUIDString()
        before = source.connect_of(uuid)
        try:
            flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PAUSED
            migration = Migration(domain, a, b, flags)
            after = destination.connect_of(uuid)
            assert destination.of(uuid) == [after]
            migration.go()
            assert migration.join() is None
            destination.wait_effect(Speak(uuid))
            b.conn.lookupByUUIDString(uuid).resume()
            destination.settle(uuid)
            assert destination.of(uuid) == [after, Speak(uuid)]
            source.wait_effect(Release(uuid, Why.MIGRATED))
            assert source.of(uuid) == [
                before,
                Speak(uuid),
                Hush(uuid),
                Release(uuid, Why.MIGRATED),
            ]
        finally:
            remove(b.conn, uuid)
