"""Names of virtio-serial ports that others talk on: QEMU's port has one opener at each end.

Pure.
"""

from __future__ import annotations

from typing import Final

RESERVED: Final = {
    "org.qemu.": "QEMU's guest agent, which libvirt and nova talk to",
    "org.libvirt.": "libvirt",
    "com.redhat.spice.": "the SPICE agent",
    "com.redhat.rhevm.": "oVirt's agent",
    "org.spice-space.": "SPICE: folders and streams",
    "org.libguestfs.": "libguestfs",
    "ovirt-guest-agent.": "oVirt's agent",
    "org.ovirt.": "oVirt",
    "org.kubevirt.": "KubeVirt",
    "org.katacontainers.": "Kata Containers' agent",
    "agent.channel.": "Kata Containers' agent",
    "org.fedoraproject.": "Fedora's installer (Anaconda)",
    "com.vmware.": "VMware's tools",
    "com.citrix.": "Citrix's tools",
}
"""What such names begin with, and whose they are."""


def reserved_for(name: str) -> str:
    """Whose a port of this name is, or "": letters of either case are taken for the same."""
    for prefix, owner in RESERVED.items():
        if f"{name.lower()}.".startswith(prefix):
            return owner
    return ""
