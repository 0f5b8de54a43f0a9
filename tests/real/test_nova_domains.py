"""What nova does to a domain, done by libvirt's own calls: rescue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.rig.compute import GUEST_TIMEOUT_S
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:  # it needs libvirt-python, which may be what is missing
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

CASTS = 20
DISK_BYTES = 1024 * 1024


def nova_vm(cloud: Cloud, name: str) -> Vm:
    from tests.rig.libvirtd import nova_metadata

    metadata = nova_metadata(
        name=f"{name}-shown", project="a" * 32, user="b" * 32, flavor="m1.tiny", image="c" * 36
    )
    return cloud.boot(name, metadata=metadata)


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
