"""What nova does to a domain, done by libvirt's own calls: rescue; a definition without a
controller; and the definition that is away while a volume is swapped."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.rig import wait_until
from tests.rig.compute import GUEST_TIMEOUT_S
from tests.rig.guest_image import VCHAN_PORT
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:  # it needs libvirt-python, which may be what is missing
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

CASTS = 20
DELETE_AFTER = "delete_queues_after = 1"
DELETED_S = 8.0
"""Over DELETE_AFTER and the time between two looks."""
DISK_BYTES = 1024 * 1024


SHOWN = {
    "server": "spawned-shown",
    "project": "a" * 32,
    "project_name": "a" * 32,
    "user": "b" * 32,
    "flavor": "m1.tiny",
    "image": "c" * 36,
    "host": "host1",
}
"""As `nova_metadata_of` has it."""


def nova_metadata_of(name: str) -> str:
    from tests.rig.libvirtd import nova_metadata

    who = {key: SHOWN[key] for key in ("project", "user", "flavor", "image")}
    return nova_metadata(name=f"{name}-shown", **who)


def nova_vm(cloud: Cloud, name: str) -> Vm:
    return cloud.boot(name, metadata=nova_metadata_of(name))


def test_a_rescue_image_gets_nothing_that_is_meant_for_the_server(cloud: Cloud) -> None:
    """It has vchan-guest and the same agent, as it is the same image."""
    import libvirt

    vm = nova_vm(cloud, "rescue")
    try:
        definition = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        disk = vm.here.libvirt.console_path("disk.rescue").with_name("disk.rescue")
        disk.write_bytes(bytes(DISK_BYTES))
        disk.chmod(0o666)
        source = f"<disk type='file'><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>"
        rescue = definition.replace("</devices>", f"{source}</devices>")
        vm.domain.destroy()
        with vm.traffic(wait=False, callers=0) as traffic:
            vm.here.connection.defineXML(rescue).create()
            seen = vm.wait_status(lambda seen: "in rescue" in (seen["problem"] or ""), "no word")
            assert seen["state"] == "none"
            traffic.wait_for("casts_sent", CASTS)
            with vm.shell() as shell:
                shell.check(
                    "while [ ! -e /run/agent.pid ]; do sleep 1; done", timeout_s=GUEST_TIMEOUT_S
                )
                asked = vm.here.cli("call", "rescue", "demo", "pid")
                assert asked.returncode == 1 and "in rescue" in asked.stderr
                assert "vchan attach" not in asked.stderr
                vm.here.daemon.restart()  # who comes anew sees the same
                vm.wait_status(lambda seen: "in rescue" in (seen.get("problem") or ""), "no word")
                assert vm.here.cli("attach", "rescue").returncode == 1
                assert shell.run("test -s /run/ran").status != 0
            vm.domain.destroy()
            vm.here.connection.defineXML(definition).create()
            vm.wait_ready()
            assert vm.status()["problem"] is None
            report = traffic.finish()
    finally:
        vm.discard()
    assert (report.lost, report.duplicated, report.reordered) == (0, 0, 0), report.brief()
    assert report.casts_executed == report.casts_sent >= CASTS


def test_a_server_that_nova_gives_no_controller_is_said_to_lose_its_channel(cloud: Cloud) -> None:
    """Before, in the list, the doctor and the metrics; and afterwards, with what helps."""
    from tests.rig.cloud import Vm
    from tests.rig.libvirtd import domain_xml

    host, identity = cloud.a, str(uuid.uuid4())
    xml = domain_xml(
        "spawned",
        identity,
        cloud.image,
        console=host.libvirt.console_path("spawned"),
        metadata=nova_metadata_of("spawned"),
        channel=False,
        controller=False,
        shell=False,
    )
    vm = Vm(cloud, "spawned", identity)
    try:
        host.connection.defineXML(xml)
        wait_until(
            lambda: VCHAN_PORT in vm.domain.XMLDesc(),
            timeout_s=GUEST_TIMEOUT_S,
            interval_s=0.05,
            failure=cloud.logs,
        )
        vm.domain.create()  # vchan-host was quicker
        seen = vm.wait_status(lambda seen: seen["loses_channel"], "keeps its channel")
        assert seen["state"] in ("connecting", "waiting")
        row = next(row for row in host.cli_json("list") if row["uuid"] == identity)
        for name, value in SHOWN.items():
            assert row[name] == seen[name] == value
        assert "spawned-shown" in host.cli("list", "-w", "--project", SHOWN["project"]).stdout
        assert "1 VM loses its channel at the next hard reboot" in host.cli("doctor").stdout
        assert "\nvchan_servers_losing_channel 1.0" in host.cli("metrics").stdout

        vm.domain.destroy()
        vm.domain.undefine()
        host.connection.createXML(xml)  # nova was quicker
        host.connection.defineXML(xml)
        seen = vm.wait_status(lambda seen: "image_property" in (seen.get("problem") or ""), "")
        assert (seen["state"], seen["loses_channel"]) == ("none", None)
        assert "\nvchan_servers_losing_channel 0.0" in host.cli("metrics").stdout
    finally:
        vm.discard()


def test_a_flavors_extra_spec_selects_its_servers(cloud: Cloud) -> None:
    """What nova 32 and later write; and who was started by an older one is told of."""
    import libvirt

    from tests.rig.cloud import Vm
    from tests.rig.libvirtd import domain_xml

    host = cloud.a
    newer = (Path(__file__).parents[2] / "libvirt" / "nova-metadata-example.xml").read_text()
    older = nova_metadata_of("older")
    with host.daemon.having("select = extra-spec:vchan:enabled=true, property:os_distro=nothing"):
        vms = [Vm(cloud, name, str(uuid.uuid4())) for name in ("newer", "older", "other")]
        other = newer.replace('name="vchan:enabled">true', 'name="vchan:enabled">false')
        try:
            for vm, metadata in zip(vms, (newer, older, other), strict=True):
                console = host.libvirt.console_path(vm.name)
                xml = domain_xml(
                    vm.name, vm.uuid, cloud.image, console=console, channel=False, metadata=metadata
                )
                host.connection.defineXML(xml)
            for vm in reversed(vms):  # the first is the last that is waited for
                vm.wait_status(lambda seen: seen["state"] == "none", "is not known")
            wait_until(
                lambda: VCHAN_PORT in vms[0].domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE),
                timeout_s=GUEST_TIMEOUT_S,
                interval_s=0.05,
                failure=cloud.logs,
            )
            assert vms[0].status()["labels"]["extra-spec:vchan:enabled"] == "true"
            assert VCHAN_PORT not in vms[1].domain.XMLDesc()
            assert VCHAN_PORT not in vms[2].domain.XMLDesc()
            assert [bool(vm.status()["unlabelled"]) for vm in vms] == [False, True, False]
            said = host.cli("doctor").stdout
            assert "1 VM is in no rule by extra-spec or property: nova has written no" in said
        finally:
            for vm in vms:
                vm.discard()


def test_a_domain_without_a_definition_is_served_and_keeps_its_queues(cloud: Cloud) -> None:
    """nova undefines a running domain for as long as it copies a volume, which may be hours."""
    import libvirt

    with cloud.a.daemon.having(DELETE_AFTER):
        vm = nova_vm(cloud, "swap")
        try:
            definition = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
            queues = queues_of(vm)
            with vm.traffic() as traffic:
                before = vm.status()["session"]["sessions"]
                vm.domain.undefine()
                assert not vm.domain.isPersistent()
                traffic.flows()
                time.sleep(DELETED_S)  # that nothing happens is what is tested
                assert queues_of(vm) == queues
                assert vm.status()["session"]["sessions"] == before
                vm.here.daemon.restart()
                vm.wait_ready()
                traffic.flows()
                vm.here.connection.defineXML(definition)
                assert vm.domain.isPersistent()
                traffic.flows()
                report = traffic.finish()
            assert queues_of(vm) == queues
        finally:
            vm.discard()
    report.check()


def queues_of(vm: Vm) -> list[str]:
    """Its queues at the broker."""
    return sorted(name for name in vm.cloud.rabbit.queues() if vm.uuid in name)
