"""What a guest is: read from the kernel and from files, without running anything."""

import os
import socket
import struct
from typing import Any, Final

_REQUEST: Final = struct.Struct("=LHHLL")  # nlmsghdr: length, type, flags, sequence, port
_ADDRESS: Final = struct.Struct("=BBBBL")  # ifaddrmsg: family, prefix, flags, scope, index
_ATTRIBUTE: Final = struct.Struct("=HH")  # rtattr: length, type
_GET_ADDRESSES: Final = 22  # RTM_GETADDR
_NEW_ADDRESS: Final = 20  # RTM_NEWADDR
_DUMP: Final = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_FAMILIES: Final[dict[int, str]] = {socket.AF_INET: "ipv4", socket.AF_INET6: "ipv6"}
REPLY_BYTES_MAX: Final = 1 << 20
"""Of what the kernel says of addresses."""
NETLINK_S: Final = 5.0
"""For the kernel's answer: it comes at once, or something is broken."""


def facts() -> dict[str, Any]:
    """Names, versions, sizes and addresses; what cannot be learnt is left out or empty."""
    system = os.uname()
    return {
        "hostname": system.nodename,
        "kernel": f"{system.sysname} {system.release}",
        "machine": system.machine,
        "os": os_release(),
        "machine_id": _first_line("/etc/machine-id"),
        "uptime_s": float((_first_line("/proc/uptime") or "0").split()[0]),
        "boot_id": _first_line("/proc/sys/kernel/random/boot_id"),
        "cpus": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "addresses": addresses(),
    }


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline(4096).strip()
    except OSError:
        return ""


def os_release() -> dict[str, str]:
    """The system's name and version, as /etc/os-release has them."""
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read(65536)
        except OSError:
            continue
        pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
        wanted = ("ID", "VERSION_ID", "PRETTY_NAME")
        return {k.lower(): v.strip("\"'") for k, v in pairs if k in wanted}
    return {}


def addresses() -> list[dict[str, Any]]:
    """Every address of every interface, by the kernel's word (netlink); none if it gives none: a
    service may be kept from asking."""
    try:
        names, told = dict(socket.if_nameindex()), _ask_kernel()
    except OSError:
        return []
    found = []
    for family, prefix, index, packed in told:
        kind = _FAMILIES.get(family)
        if kind is not None and index in names:
            name = names[index]
            found.append(
                {
                    "interface": name,
                    "mac": _first_line(f"/sys/class/net/{name}/address"),
                    "family": kind,
                    "address": socket.inet_ntop(family, packed),
                    "prefix": prefix,
                }
            )
    return found


def _ask_kernel() -> list[tuple[int, int, int, bytes]]:
    """(family, prefix, interface's index, address) of each."""
    found: list[tuple[int, int, int, bytes]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as kernel:
        kernel.settimeout(NETLINK_S)
        size = _REQUEST.size + _ADDRESS.size
        kernel.send(_REQUEST.pack(size, _GET_ADDRESSES, _DUMP, 1, 0) + _ADDRESS.pack(0, 0, 0, 0, 0))
        received = 0
        while received < REPLY_BYTES_MAX:
            data = kernel.recv(65536)
            received += len(data)
            at = 0
            while at + _REQUEST.size <= len(data):
                length, kind = _REQUEST.unpack_from(data, at)[:2]
                if kind != _NEW_ADDRESS or length < size:  # the end, or an error
                    return found
                found.append(_parse(data[at + _REQUEST.size : at + length]))
                at += (length + 3) & ~3
    return found


def _parse(message: bytes) -> tuple[int, int, int, bytes]:
    family, prefix, _, _, index = _ADDRESS.unpack_from(message)
    by_kind = {}
    at = _ADDRESS.size
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if length < _ATTRIBUTE.size:
            break
        by_kind[kind] = message[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    # Of a line between two points, ADDRESS is the other end's.
    return family, prefix, index, by_kind.get(_IFA_LOCAL) or by_kind.get(_IFA_ADDRESS, b"")
