"""Hypervisor and Domains against real libvirt daemons, with real migrations between two of them.

The guests have no system: they fill their memory with noise, so that a throttled migration stays
in flight until the test lets it go on, and then halt.
"""

import ctypes
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
from xml.etree import ElementTree

import pytest

from tests.rig import rig_directory
from tests.rig.requirements import missing_for_libvirt

libvirt = pytest.importorskip("libvirt")
if (MISSING := missing_for_libvirt()) is not None:
    pytest.skip(MISSING, allow_module_level=True)

from tests.rig.kept import cache_directory  # noqa: E402  (what follows needs libvirt)
from tests.rig.libvirtd import LibvirtHost  # noqa: E402
from vchan.errors import ConfigError  # noqa: E402
from vchan.host.hypervisor import libvirt_client as hypervisor_module  # noqa: E402
from vchan.host.hypervisor.domain_xml import (  # noqa: E402
    ALIAS,
    TARGET_NAME,
    DomainXmlError,
    Selection,
    channel_xml,
)
from vchan.host.hypervisor.domains import (  # noqa: E402
    NO_CONTROLLER_CONFIGURED,
    NO_CONTROLLER_TRANSIENT,
    Attach,
    AttachDone,
    Changed,
    Connect,
    Decision,
    DetachDone,
    Domains,
    Gone,
    Happened,
    Hush,
    HypervisorEvent,
    HypervisorLost,
    Rebooted,
    Release,
    Resync,
    Speak,
    Unreadable,
    Warn,
    Why,
)
from vchan.host.hypervisor.known_sockets import KnownSockets  # noqa: E402
from vchan.host.hypervisor.libvirt_client import (  # noqa: E402
    Hypervisor,
    attach_channel,
    detach_channel,
    read_facts,
)

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


def read_again(hypervisor: Hypervisor, uuid: str) -> None:
    """As if libvirt had told of the domain: Changed or Gone follows."""
    with hypervisor._wake:
        hypervisor._mark(uuid)


class Watcher:
    """A host daemon reduced to Hypervisor and Domains: it records what it would do."""

    def __init__(
        self, uri: str, rules: Sequence[str] = (), *, poll_s: float = 30.0, **options: Any
    ) -> None:
        self.events: list[HypervisorEvent] = []
        self.decisions: list[Decision] = []
        self.times_s: list[float] = []  # of the decisions
        self._domains = Domains(Selection.parse(rules))
        self._news = threading.Condition()
        self.died: list[str] = []
        self.hypervisor = Hypervisor(
            uri, self._on_event, poll_s=poll_s, died=self._note_death, **options
        )

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
            decisions = self._domains.receive(event, now_s)
            self.events.append(event)
            self.decisions += decisions
            self.times_s += [now_s] * len(decisions)
            self._news.notify_all()
        for decision in decisions:
            if isinstance(decision, Attach):
                self.hypervisor.attach(decision.uuid)

    def _note_death(self, problem: str) -> None:
        with self._news:
            self.died.append(problem)
            self._news.notify_all()

    def of(self, uuid: str) -> list[Decision]:
        """What was done for one domain so far, in order."""
        with self._news:
            return [decision for decision in self.decisions if decision.uuid == uuid]

    def time_of(self, wanted: Decision) -> float:
        with self._news:
            return self.times_s[self.decisions.index(wanted)]

    def connect_of(self, uuid: str, number: int = 0) -> Connect:
        self.wait(lambda: len(connects(self.of(uuid))) > number)
        return connects(self.of(uuid))[number]

    def wait(self, reached: Callable[[], bool]) -> None:
        with self._news:
            if not self._news.wait_for(reached, WAIT_S):
                raise AssertionError(f"not reached in {WAIT_S} s; {self.decisions} {self.events}")

    def wait_effect(self, wanted: Decision, count: int = 1) -> None:
        self.wait(lambda: self.decisions.count(wanted) >= count)

    def wait_event(self, wanted: Callable[[HypervisorEvent], bool]) -> None:
        self.wait(lambda: any(wanted(event) for event in self.events))

    def settle(self, uuid: str) -> None:
        """Wait until everything that has happened to a domain so far has been reacted to."""
        with self._news:
            before = len(self.events)
        read_again(self.hypervisor, uuid)
        self.wait(
            lambda: any(
                isinstance(event, Changed) and event.facts.uuid == uuid
                for event in self.events[before:]
            )
        )


def connects(decisions: Sequence[Decision]) -> list[Connect]:
    return [decision for decision in decisions if isinstance(decision, Connect)]


def domain_xml(
    name: str,
    uuid: str,
    *,
    channel: bool | str = True,
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
        {disk}{channel_xml() if channel is True else channel or ""}
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
        **xml: Any,
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


QGA = "org.qemu.guest_agent.0"
QGA_CHANNEL = (
    f"<channel type='unix'><source mode='bind'/><target type='virtio' name='{QGA}'/></channel>"
)


def test_a_channel_is_never_attached_ahead_of_the_guest_agents(host: Host) -> None:
    """masakari's monitor of guest agents takes the first channel of the XML for theirs."""
    kinds = (0, libvirt.VIR_DOMAIN_XML_INACTIVE, libvirt.VIR_DOMAIN_XML_MIGRATABLE)

    def order(domain: Any) -> list[list[str]]:
        targets = [
            ElementTree.fromstring(domain.XMLDesc(kind)).iterfind("devices/channel/target")
            for kind in kinds
        ]
        return [[target.get("name", "") for target in each] for each in targets]

    with (
        Watcher(host.uri, ["*"]) as watcher,
        host.guest("qga", define=True, channel=QGA_CHANNEL) as domain,
    ):
        uuid = domain.UUIDString()
        watcher.wait_effect(Speak(uuid))
        watcher.settle(uuid)
        assert order(domain) == [[QGA, TARGET_NAME]] * len(kinds)
        watcher.hypervisor.detach(uuid)
        watcher.wait_effect(Release(uuid, Why.DETACHED))
        watcher.hypervisor.attach(uuid)
        watcher.wait_effect(Speak(uuid), count=2)
        assert order(domain) == [[QGA, TARGET_NAME]] * len(kinds)
        domain.destroy()
        domain.create()
        watcher.wait_effect(Speak(uuid), count=3)
        assert order(domain) == [[QGA, TARGET_NAME]] * len(kinds)


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
        watcher.wait_event(
            lambda event: event == DetachDone(uuid, f"it has no channel {TARGET_NAME}")
        )


LIVE, NEXT_BOOT = libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG
ALL = {LIVE, NEXT_BOOT}


def definitions_with(domain: Any, target_name: str = TARGET_NAME) -> set[int]:
    """Which of the two have the channel."""
    texts = {LIVE: domain.XMLDesc(0), NEXT_BOOT: domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)}
    return {flag for flag, text in texts.items() if f"name='{target_name}'" in text}


def wait_without(domain: Any, target_name: str = TARGET_NAME) -> None:
    """libvirt may answer before QEMU has let go of the device."""
    deadline_s = time.monotonic() + WAIT_S
    while definitions_with(domain, target_name):
        assert time.monotonic() < deadline_s, definitions_with(domain, target_name)
        time.sleep(0.05)


@pytest.mark.parametrize("with_path", [True, False])
@pytest.mark.parametrize("live", [None, "ua-x", "ua-vchan0", "gone"])
@pytest.mark.parametrize("next_boot", [None, "ua-y", "ua-vchan0", "gone"])
def test_a_channel_is_detached_from_each_definition_as_it_stands_there(
    host: Host, live: str | None, next_boot: str | None, with_path: bool
) -> None:
    with host.guest("d", define=True, channel=False) as domain:
        path = str(host.daemon.directory / "run" / "own.sock") if with_path else None
        for flag, alias in ((LIVE, live), (NEXT_BOOT, next_boot)):
            if alias != "gone":
                domain.attachDeviceFlags(channel_xml(alias=alias, path=path), flag)
        problem = detach_channel(domain)
        if live == next_boot == "gone":
            assert problem == f"it has no channel {TARGET_NAME}"
        else:
            assert problem is None
        wait_without(domain)


def test_a_detach_of_which_one_half_fails_does_neither(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with host.guest("half", define=True, channel=channel_xml(alias=None)) as domain:
        real = type(domain).detachDeviceAlias

        def refuse(this: Any, alias: str, flags: int) -> Any:
            return real(this, "no-such-alias" if flags == LIVE else alias, flags)

        monkeypatch.setattr(type(domain), "detachDeviceAlias", refuse)
        problem = detach_channel(domain)
        assert problem is not None and "no-such-alias" in problem
        assert definitions_with(domain) == ALL


def test_two_target_names_on_one_host(host: Host) -> None:
    other = "com.example.vchan.0"
    with (
        host.guest("both", define=True) as domain,
        Watcher(host.uri, ["*"], target_name=other) as second,
        Watcher(host.uri, ["*"]) as first,
    ):
        uuid = domain.UUIDString()
        second.wait_effect(Speak(uuid))
        first.wait_effect(Speak(uuid))
        second.settle(uuid)
        assert first.connect_of(uuid).path != second.connect_of(uuid).path
        assert definitions_with(domain, other) == definitions_with(domain) == ALL
        second.hypervisor.detach(uuid)
        second.wait_event(lambda event: event == DetachDone(uuid, None))
        second.wait_effect(Release(uuid, Why.DETACHED))
        assert definitions_with(domain, other) == set()
        assert definitions_with(domain) == ALL


def test_an_alias_that_is_taken_is_done_without(host: Host) -> None:
    """An older vchan gave every channel the same one, whatever its name."""
    other = channel_xml("com.example.old.0", alias=ALIAS)
    with host.guest("taken", define=True, channel=other) as domain:
        done = attach_channel(domain)
        assert (done.live, done.config, done.problem) == (True, True, None)
        assert detach_channel(domain) is None
        wait_without(domain)
        assert definitions_with(domain, "com.example.old.0") == ALL


LIBVIRT = ctypes.CDLL("libvirt.so.0")
LIBVIRT.virDomainSetMetadata.argtypes = [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_char_p] * 3]
LIBVIRT.virDomainSetMetadata.argtypes += [ctypes.c_uint]
LIBVIRT.virDomainRename.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint]
ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
LATIN = b"caf\xe9"


def pointer(domain: Any) -> Any:
    return ctypes.pythonapi.PyCapsule_GetPointer(domain._o, b"virDomainPtr")


@pytest.mark.parametrize(
    "kind", [libvirt.VIR_DOMAIN_METADATA_DESCRIPTION, libvirt.VIR_DOMAIN_METADATA_TITLE]
)
def test_text_that_is_no_utf8_costs_nobody_anything(host: Host, kind: int) -> None:
    with (
        Watcher(host.uri) as watcher,
        host.guest("latin", define=True) as latin,
        host.guest("other") as other,
    ):
        uuid = latin.UUIDString()
        watcher.wait_effect(Speak(uuid))
        watcher.wait_effect(Speak(other.UUIDString()))
        flags = LIVE | NEXT_BOOT
        assert LIBVIRT.virDomainSetMetadata(pointer(latin), kind, LATIN, None, None, flags) == 0
        watcher.settle(uuid)
        facts = [e.facts for e in watcher.events if isinstance(e, Changed) and e.facts.note]
        assert facts and "not UTF-8" in facts[-1].note
        with host.guest("new") as new:
            watcher.wait_effect(Speak(new.UUIDString()))
            other.destroy()
            watcher.wait_effect(Release(other.UUIDString(), Why.STOPPED))
            with Watcher(host.uri) as restarted:  # which reads everything anew
                for each in (latin, new):
                    restarted.wait_effect(Speak(each.UUIDString()))
        watcher.hypervisor.detach(uuid)  # libvirt cannot read its own definition then
        watcher.wait_event(lambda event: isinstance(event, DetachDone))
        (done,) = [event for event in watcher.events if isinstance(event, DetachDone)]
        assert "libvirt refuses it" in (done.problem or "") and "virsh desc" in (done.problem or "")
        assert watcher.died == []


def test_a_name_that_is_no_utf8_costs_nobody_anything(host: Host) -> None:
    with Watcher(host.uri) as watcher, host.guest("renamed", define=True, start=False) as domain:
        assert LIBVIRT.virDomainRename(pointer(domain), LATIN, 0) == 0
        try:
            name = "caf\N{REPLACEMENT CHARACTER}"
            watcher.wait_event(
                lambda event: isinstance(event, Changed) and event.facts.name == name
            )
            with host.guest("new") as new:
                watcher.wait_effect(Speak(new.UUIDString()))
            assert watcher.died == []
        finally:
            assert LIBVIRT.virDomainRename(pointer(domain), b"renamed", 0) == 0


def fail_to_read(monkeypatch: pytest.MonkeyPatch, uuids: set[str], error: Exception) -> None:
    real = read_facts

    def read(domain: Any, target_name: str) -> Any:
        if domain.UUIDString() in uuids:
            raise error
        return real(domain, target_name)

    monkeypatch.setattr(hypervisor_module, "read_facts", read)


def busy() -> Any:
    """What libvirt says of a domain that somebody else holds."""
    error = libvirt.libvirtError("")
    error.err = (libvirt.VIR_ERR_OPERATION_TIMEOUT, 10, "cannot acquire state change lock", 2)
    error.err += ("", None, None, -1, -1)
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (busy(), "the VM is busy, perhaps migrating"),
        (DomainXmlError("domain XML has no <uuid>"), "domain XML has no <uuid>"),
        (KeyError("x"), "vchan-host failed on it: KeyError"),
    ],
    ids=["libvirt", "xml", "ours"],
)
def test_what_cannot_be_read_is_served_on_and_never_gone(
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    error: Exception,
    reason: str,
) -> None:
    unread: set[str] = set()
    fail_to_read(monkeypatch, unread, error)
    monkeypatch.setattr(hypervisor_module, "UNREAD_RETRY_S", 0.2)
    known = str(tmp_path / "known")
    with host.guest("hidden", define=True) as hidden, host.guest("seen") as seen:
        uuid = hidden.UUIDString()
        with Watcher(host.uri, sockets=KnownSockets(known)) as watcher:
            for each in (hidden, seen):
                watcher.wait_effect(Speak(each.UUIDString()))
            unread.add(uuid)
            read_again(watcher.hypervisor, uuid)
            watcher.wait_event(lambda event: isinstance(event, Unreadable))
            host.daemon.restart()
            host.reopen()
            watcher.wait(lambda: sum(isinstance(event, Resync) for event in watcher.events) == 2)
            resync = [event for event in watcher.events if isinstance(event, Resync)][-1]
            assert [each.uuid for each in resync.unreadable] == [uuid]
            assert reason in resync.unreadable[0].reason
            assert [type(decision) for decision in watcher.of(uuid)] == [Connect, Speak, Warn]
            assert reason in (watcher._domains.domain(uuid).trouble or "")
            host.conn.lookupByUUIDString(seen.UUIDString()).destroy()  # others are followed
            watcher.wait_effect(Release(seen.UUIDString(), Why.STOPPED))
            path = watcher.connect_of(uuid).path
        with Watcher(host.uri, sockets=KnownSockets(known)) as restarted:
            assert restarted.connect_of(uuid).path == path
            restarted.wait_effect(Speak(uuid))
            assert restarted._domains.domain(uuid).known.name == "hidden"
            unread.clear()
            restarted.wait_event(
                lambda event: isinstance(event, Changed) and event.facts.uuid == uuid
            )
            restarted.settle(uuid)
            kinds = [type(decision) for decision in restarted.of(uuid)]
            assert kinds == [Warn, Connect, Speak]  # it never noticed
            unread.add(uuid)
            again = host.conn.lookupByUUIDString(uuid)
            again.destroy()
            restarted.wait_effect(Release(uuid, Why.STOPPED))
            again.undefine()
            restarted.wait_event(lambda event: isinstance(event, Gone) and event.uuid == uuid)
        assert caplog.text.count("Traceback") == 0
        assert caplog.text.count("unexpected, at reading it") == 2 * isinstance(error, KeyError)


def test_what_libvirt_leaves_out_is_asked_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not list what we may not see, and says so only when it is asked."""
    hidden: set[str] = set()
    real_list, real_look = libvirt.virConnect.listAllDomains, libvirt.virConnect.lookupByUUIDString

    def listed(this: Any, flags: int = 0) -> Any:
        return [each for each in real_list(this, flags) if each.UUIDString() not in hidden]

    def looked_up(this: Any, uuid: str) -> Any:
        if uuid in hidden:
            error = libvirt.libvirtError("")
            error.err = (
                libvirt.VIR_ERR_ACCESS_DENIED,
                0,
                "access denied",
                2,
                "",
                None,
                None,
                -1,
                -1,
            )
            raise error
        return real_look(this, uuid)

    with Watcher(host.uri) as watcher, host.guest("acl") as domain:
        uuid = domain.UUIDString()
        watcher.wait_effect(Speak(uuid))
        monkeypatch.setattr(libvirt.virConnect, "listAllDomains", listed)
        monkeypatch.setattr(libvirt.virConnect, "lookupByUUIDString", looked_up)
        hidden.add(uuid)
        watcher.hypervisor.resync()
        watcher.wait(lambda: sum(isinstance(event, Resync) for event in watcher.events) == 2)
        assert [type(decision) for decision in watcher.of(uuid)] == [Connect, Speak, Warn]
        hidden.clear()


def test_an_event_that_fails_is_made_good(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hypervisor_module, "_lifecycle_event", lambda *_: int("x"))
    with Watcher(host.uri) as watcher, host.guest("missed") as domain:
        watcher.wait_effect(Speak(domain.UUIDString()))
        assert watcher.died == []
    assert "an event was missed" in caplog.text


@pytest.mark.parametrize("name", ["_follow", "_next_to_read", "_say"])
def test_a_reader_that_dies_says_so(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError(name)

    with Watcher(host.uri) as watcher:
        monkeypatch.setattr(Hypervisor, name, fail)
        watcher.hypervisor.resync()
        watcher.hypervisor._on_close(None, 0, None)  # it opens another connection
        watcher.wait(lambda: bool(watcher.died))
        assert watcher.died == ["thread vchan-libvirt: KeyError"]
        assert "thread vchan-libvirt failed" in caplog.text
        monkeypatch.undo()


def test_a_worker_that_fails_on_one_domain_goes_on_and_one_that_dies_says_so(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Watcher(host.uri) as watcher, host.guest("one", channel=False) as domain:
        uuid = domain.UUIDString()
        monkeypatch.setattr(hypervisor_module, "attach_channel", lambda *_: int("x"))
        watcher.hypervisor.attach(uuid)
        watcher.wait_event(
            lambda event: isinstance(event, AttachDone) and "ValueError" in (event.problem or "")
        )
        monkeypatch.undo()
        watcher.hypervisor.attach(uuid)
        watcher.wait_effect(Speak(uuid))
        monkeypatch.setattr(hypervisor_module._Worker, "_attempt", lambda *_: int("x"))
        watcher.hypervisor.attach(uuid)
        watcher.wait(lambda: bool(watcher.died))
        assert watcher.died == ["thread vchan-libvirt-attach: ValueError"]


def test_an_event_loop_that_dies_says_so(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with Watcher(host.uri) as watcher:
        monkeypatch.setattr(libvirt, "virEventRunDefaultImpl", lambda: int("x"))
        watcher.hypervisor.resync()
        watcher.wait(lambda: bool(watcher.died))
        assert watcher.died == ["thread vchan-libvirt-events: ValueError"]
        monkeypatch.undo()


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
        read_again(watcher.hypervisor, unknown)
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
        assert [type(decision) for decision in watcher.of(stays_uuid)] == [Connect, Speak, Warn]
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
            assert late_source.of(uuid) == [before, Hush(uuid)]  # connected, silent
            migration.abort()
            source.wait_effect(Speak(uuid), count=2)
            late_source.wait_effect(Speak(uuid))
            destination.wait_effect(Release(uuid, Why.ARRIVAL_FAILED))
            assert migration.join().get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED
            source.settle(uuid)
            late_source.settle(uuid)
            assert late_source.of(uuid) == [before, Hush(uuid), Speak(uuid)]
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
