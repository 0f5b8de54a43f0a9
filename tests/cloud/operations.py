"""What is done to servers. Each function returns when nova says that it is done; what it returns is
a note for the table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.cloud.compute import PARTS, Compute
from tests.cloud.openstack import STATUS_TIMEOUT_S, Nova
from tests.cloud.stage import Cloud
from tests.rig import RigError, wait_until

STANDSTILL_S: Final = 5.0
"""How long a server is left paused, off, or shelved."""
RESCUE_S: Final = 15.0
"""Long enough for what is booted in its place."""
SLOW_MIB_PER_S: Final = 1
"""So that a migration takes a minute or more, and can be aborted."""
FAST_MIB_PER_S: Final = 10_000
QGA: Final = ("hw_qemu_guest_agent", "yes")
Act = Callable[[Cloud, str], str]


@dataclass(frozen=True, slots=True)
class Operation:
    """One of a server's.

    Args:
        kills: The guest ends, and boots again.
        powers_off: Its host stays off until the server has answered from another.
    """

    name: str
    act: Act
    kills: bool = False
    powers_off: bool = False


# --- the guest boots again


def hard_reboot(cloud: Cloud, uuid: str) -> str:
    """nova destroys the domain and writes its definition anew."""
    cloud.nova.do(uuid, "reboot", "ACTIVE", {"type": "HARD"})
    return ""


def soft_reboot(cloud: Cloud, uuid: str) -> str:
    """Our guest does not listen to ACPI: nova makes it a hard one when its patience ends."""
    cloud.nova.do(uuid, "reboot", "ACTIVE", {"type": "SOFT"})
    return "the guest ignores it: hard in the end"


def stop_and_start(cloud: Cloud, uuid: str) -> str:
    """Off for a while."""
    cloud.nova.do(uuid, "os-stop", "SHUTOFF")
    time.sleep(STANDSTILL_S)
    cloud.nova.do(uuid, "os-start", "ACTIVE")
    return f"off for {STANDSTILL_S:.0f} s"


def rescue(cloud: Cloud, uuid: str) -> str:
    """Another guest boots from an image in its place, under the same UUID."""
    cloud.nova.do(uuid, "rescue", "RESCUE", {})
    time.sleep(RESCUE_S)
    cloud.nova.do(uuid, "unrescue", "ACTIVE")
    return f"{RESCUE_S:.0f} s in rescue"


def rebuild(cloud: Cloud, uuid: str) -> str:
    """From the same image."""
    image = cloud.nova.server(uuid)["image"]["id"]
    cloud.nova.do(uuid, "rebuild", "ACTIVE", {"imageRef": image})
    return ""


def resize_and_confirm(cloud: Cloud, uuid: str) -> str:
    """To another host."""
    before = cloud.nova.host(uuid)
    cloud.nova.do(uuid, "resize", "VERIFY_RESIZE", {"flavorRef": _other_flavor(cloud, uuid)})
    cloud.nova.do(uuid, "confirmResize", "ACTIVE")
    return f"{before} to {cloud.nova.host(uuid)}"


def resize_and_revert(cloud: Cloud, uuid: str) -> str:
    """There and back; it runs at both ends."""
    cloud.nova.do(uuid, "resize", "VERIFY_RESIZE", {"flavorRef": _other_flavor(cloud, uuid)})
    cloud.caller.wait_answered(uuid)
    cloud.nova.do(uuid, "revertResize", "ACTIVE")
    return ""


def _other_flavor(cloud: Cloud, uuid: str) -> str:
    now = cloud.nova.server(uuid)["flavor"]["original_name"]
    return cloud.images.large if now == "small" else cloud.images.small


def cold_migration(cloud: Cloud, uuid: str) -> str:
    """Off, and on at the other host."""
    before = cloud.nova.host(uuid)
    cloud.nova.do(uuid, "migrate", "VERIFY_RESIZE")
    cloud.nova.do(uuid, "confirmResize", "ACTIVE")
    return _moved(before, cloud.nova.host(uuid))


def shelve_and_unshelve(cloud: Cloud, uuid: str) -> str:
    """nova undefines the domain as if it were deleted, and makes it anew."""
    before = cloud.nova.host(uuid)
    cloud.nova.do(uuid, "shelve", "SHELVED_OFFLOADED")
    time.sleep(STANDSTILL_S)
    cloud.nova.do(uuid, "unshelve", "ACTIVE")
    return f"{before} to {cloud.nova.host(uuid)}"


def evacuate(cloud: Cloud, uuid: str) -> str:
    """Its host is gone: nova-compute, vchan-host, libvirtd and the guests, all at once."""
    host = cloud.host_of(uuid)
    _power_off(host)
    _wait_down(cloud.nova, host)
    # Since version 2.95 of nova's API an evacuated server stays off.
    cloud.nova.do(uuid, "evacuate", "SHUTOFF", {})
    cloud.nova.do(uuid, "os-start", "ACTIVE")
    return _moved(host.name, cloud.nova.host(uuid))


def host_reboot(cloud: Cloud, uuid: str) -> str:
    """Everything on its host ends at once, what is in /run is gone, and the host comes up again.

    nova starts its servers (resume_guests_state_on_host_boot).
    """
    host = cloud.host_of(uuid)
    _power_off(host)
    host.forget_run()
    _power_on(cloud, host)
    return "as far as processes and /run go"


def _power_off(host: Compute) -> None:
    for part in ("nova-compute", "vchan-host", "libvirtd"):
        host.kill(part)
    host.kill_guests()


def power_on_all(cloud: Cloud) -> None:
    """Start the hosts that are off."""
    for host in cloud.hosts:
        if host.is_off():
            _power_on(cloud, host)


def _power_on(cloud: Cloud, host: Compute) -> None:
    for part in PARTS:
        host.start(part)
    host.wait_libvirtd()
    host.wait_vchan()
    _wait_up(cloud.nova, host)


def _wait_up(nova: Nova, host: Compute) -> None:
    wait_until(
        lambda: nova.service_is_up(host.name),
        timeout_s=STATUS_TIMEOUT_S,
        interval_s=0.5,
        failure=lambda: f"nova does not see that {host.name} is up",
    )


def _wait_down(nova: Nova, host: Compute) -> None:
    wait_until(
        lambda: not nova.service_is_up(host.name),
        timeout_s=STATUS_TIMEOUT_S,
        interval_s=0.5,
        failure=lambda: f"nova does not see that {host.name} is down",
    )


# --- the guest goes on


def pause(cloud: Cloud, uuid: str) -> str:
    """It stands still."""
    cloud.nova.do(uuid, "pause", "PAUSED")
    time.sleep(STANDSTILL_S)
    cloud.nova.do(uuid, "unpause", "ACTIVE")
    return f"paused for {STANDSTILL_S:.0f} s"


def suspend(cloud: Cloud, uuid: str) -> str:
    """Its memory goes to disk and back."""
    cloud.nova.do(uuid, "suspend", "SUSPENDED")
    time.sleep(STANDSTILL_S)
    cloud.nova.do(uuid, "resume", "ACTIVE")
    return f"suspended for {STANDSTILL_S:.0f} s"


def snapshot(cloud: Cloud, uuid: str) -> str:
    """nova undefines the running domain for a moment."""
    cloud.nova.do(uuid, "createImage", "ACTIVE", {"name": f"of {uuid}"})
    return ""


def live_migration(cloud: Cloud, uuid: str) -> str:
    """With its disk, for the hosts share none."""
    before = cloud.nova.host(uuid)
    _begin_live_migration(cloud, uuid)
    cloud.nova.wait(uuid, "ACTIVE")
    return _moved(before, cloud.nova.host(uuid))


def aborted_live_migration(cloud: Cloud, uuid: str) -> str:
    """It is made slow, begins, and is ended by nova's API."""
    host = cloud.host_of(uuid)
    host.limit_migrations(uuid, SLOW_MIB_PER_S)
    try:
        _begin_live_migration(cloud, uuid)
        cloud.nova.abort_live_migration(uuid)
        # nova rolls back; then its driver raises what libvirt said of the abort, and what called it
        # takes that for a failure that came too late.
        cloud.nova.wait(uuid, "ERROR")
    finally:
        host.limit_migrations(uuid, FAST_MIB_PER_S)
    if cloud.nova.host(uuid) != host.name:
        raise RigError("it was to be aborted, and it moved")
    cloud.nova.do(uuid, "os-resetState", "ACTIVE", {"state": "active"})
    return f"stays on {host.name}; nova has it in ERROR until os-resetState"


def _begin_live_migration(cloud: Cloud, uuid: str) -> None:
    cloud.nova.act(uuid, "os-migrateLive", {"host": None, "block_migration": "auto"})


def _moved(before: str, after: str) -> str:
    if before == after:
        raise RigError(f"nova left it on {before}, and says nothing of it: see its logs")
    return f"{before} to {after}"


def restart_nova_compute(cloud: Cloud, uuid: str) -> str:
    """Killed, and started again."""
    host = cloud.host_of(uuid)
    host.kill("nova-compute")
    _wait_down(cloud.nova, host)
    host.start("nova-compute")
    _wait_up(cloud.nova, host)
    return "killed, away until nova saw it"


def restart_libvirtd(cloud: Cloud, uuid: str) -> str:
    """Stopped in order, and started again; guests run on."""
    host = cloud.host_of(uuid)
    host.stop("libvirtd")
    host.start("libvirtd")
    host.wait_libvirtd()
    return ""


def restart_vchan_host(cloud: Cloud, uuid: str) -> str:
    """Killed, and started again."""
    host = cloud.host_of(uuid)
    host.kill("vchan-host")
    host.start("vchan-host")
    host.wait_vchan()
    return "killed"


# --- a server without a controller of its own


def lose_channel_and_remedy(cloud: Cloud, uuid: str) -> str:
    """A hard reboot takes its channel away; then what `vchan list` says is done."""
    cloud.nova.do(uuid, "reboot", "ACTIVE", {"type": "HARD"})
    said = ""

    def is_said() -> bool:
        nonlocal said
        row = cloud.rows(uuid).get(cloud.nova.host(uuid), {})
        said = row.get("problem") or ""
        return bool(said)

    name, value = QGA
    remedy = f"nova-manage image_property set {uuid} --property {name}={value}"
    wait_until(
        is_said,
        timeout_s=STATUS_TIMEOUT_S,
        interval_s=0.5,
        failure=lambda: f"{uuid} has lost its channel, and vchan list does not say so",
    )
    if remedy not in said:
        raise RigError(f"vchan list does not say what helps ({remedy}): {said}")
    cloud.nova.do(uuid, "os-stop", "SHUTOFF")
    cloud.control.set_image_property(uuid, name, value)
    cloud.nova.do(uuid, "os-start", "ACTIVE")
    return "lost as documented; by the remedy that vchan list names"


HARD_REBOOT: Final = Operation("hard reboot", hard_reboot, kills=True)
LIVE_MIGRATION: Final = Operation("live migration", live_migration)
SHORT: Final = (HARD_REBOOT, LIVE_MIGRATION)
ALL: Final = (
    Operation("soft reboot", soft_reboot, kills=True),
    HARD_REBOOT,
    Operation("stop, start", stop_and_start, kills=True),
    Operation("pause, unpause", pause),
    Operation("suspend, resume", suspend),
    Operation("snapshot", snapshot),
    Operation("rescue, unrescue", rescue, kills=True),
    Operation("rebuild", rebuild, kills=True),
    LIVE_MIGRATION,
    Operation("live migration back", live_migration),
    Operation("live migration, aborted", aborted_live_migration),
    Operation("cold migration", cold_migration, kills=True),
    Operation("resize, confirm", resize_and_confirm, kills=True),
    Operation("resize, revert", resize_and_revert, kills=True),
    Operation("shelve, unshelve", shelve_and_unshelve, kills=True),
    Operation("restart of nova-compute", restart_nova_compute),
    Operation("restart of libvirtd", restart_libvirtd),
    Operation("restart of vchan-host", restart_vchan_host),
    Operation("evacuate", evacuate, kills=True, powers_off=True),
    Operation("reboot of the host", host_reboot, kills=True),
)
WITHOUT: Final = (
    Operation("without: live migration", live_migration),
    Operation("without: hard reboot, remedy", lose_channel_and_remedy, kills=True),
)
"""For a server without hw_qemu_guest_agent."""
