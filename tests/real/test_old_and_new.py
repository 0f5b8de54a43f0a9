"""A VM moves between hosts of two Debian releases, as while a cloud is upgraded host by host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.rig import newer_debian, rig_directory
from tests.rig.release import TRIXIE, of_this_machine
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:  # it needs libvirt-python, which may be what is missing
    from tests.rig.cloud import Cloud
    from tests.rig.compute import ComputeHost

MISSING = missing_for_rabbit() or missing_for_libvirt() or newer_debian.missing_for_newer_debian()
if of_this_machine() is TRIXIE:
    MISSING = "this machine's own libvirt and QEMU are the newer ones"
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]


@pytest.fixture
def mixed() -> Iterator[Cloud]:
    """The first host is of this machine's Debian, the second one of a newer one."""
    from tests.rig.cloud import Cloud

    tree = newer_debian.build(newer_debian.HYPERVISOR)
    with rig_directory() as directory, Cloud(directory, second_tree=tree) as cloud:
        yield cloud


def versions(host: ComputeHost) -> tuple[int, int]:
    """Of its libvirt and its QEMU: their first parts."""
    return host.connection.getLibVersion() // 10**6, host.connection.getVersion() // 10**6


def test_from_an_old_host_to_a_new_one_and_back_under_load(mixed: Cloud) -> None:
    from tests.rig.libvirtd import COMMON_CPU

    old, new = versions(mixed.a), versions(mixed.b)
    assert old[0] < new[0] and old[1] < new[1]
    vm = mixed.boot("moves", cpu=COMMON_CPU)
    with vm.traffic(callers=4, casts_per_s=50, fanouts_per_s=10) as traffic:
        for _ in range(4):
            vm.migrate()
            vm.wait_ready()
            traffic.flows()
        report = traffic.finish()
    report.check()
    status = vm.status()
    assert status["session"]["violations"] == 0
    assert status["channel"]["cures"] == 0  # connected in time: no QEMU wedged
