"""How a guest fares: read from the kernel, without running anything."""

import os
from typing import Any, Final

FILE_SYSTEMS_MAX: Final = 16
"""File systems that are told of, the first in the kernel's order. At it: the others are counted."""
PATH_CHARS_MAX: Final = 200
"""A longer path of a file system is left out, and counted."""
MEMORY: Final = {
    "MemTotal": "total_bytes",
    "MemAvailable": "available_bytes",
    "SwapTotal": "swap_total_bytes",
    "SwapFree": "swap_free_bytes",
}


def metrics() -> dict[str, Any]:
    """Memory, load and file systems; what cannot be learnt is left out."""
    found, left_out = file_systems()
    told: dict[str, Any] = {"memory": memory(), "load": load(), "file_systems": found}
    if left_out:
        told["file_systems_left_out"] = left_out
    return told


def memory() -> dict[str, int]:
    """Bytes, as /proc/meminfo has them."""
    told = {}
    for line in _lines("/proc/meminfo"):
        name, _, rest = line.partition(":")
        number = rest.split()[:1]
        if name in MEMORY and number and number[0].isdecimal():
            told[MEMORY[name]] = int(number[0]) * 1024
    return told


def load() -> list[float]:
    """Of 1, 5 and 15 minutes."""
    try:
        return [round(number, 2) for number in os.getloadavg()]
    except OSError:
        return []


def file_systems() -> tuple[list[dict[str, Any]], int]:
    """The root, and what is mounted from devices: those of a network or of a process may keep who
    asks of them waiting. And how many were left out."""
    paths: dict[str, str] = {}
    devices: set[str] = set()
    for line in _lines("/proc/self/mounts"):
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        device, path, kind = fields[:3]
        is_local = device.startswith("/dev/") and not kind.startswith("fuse")
        if path == "/" or (is_local and device not in devices):
            devices.add(device)  # what is mounted twice is told of once
            paths[_plain(path)] = kind
    found: list[dict[str, Any]] = []
    for path, kind in paths.items():
        if len(found) < FILE_SYSTEMS_MAX and len(path) <= PATH_CHARS_MAX:
            found += _file_system(path, kind)
    return found, len(paths) - len(found)


def _plain(path: str) -> str:
    """/proc/self/mounts writes blanks as octal escapes."""
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(escape, character)
    return path


def _file_system(path: str, kind: str) -> list[dict[str, Any]]:
    try:
        known = os.statvfs(path)
    except OSError:
        return []
    return [
        {
            "path": path,
            "type": kind,
            "bytes": known.f_blocks * known.f_frsize,
            "available_bytes": known.f_bavail * known.f_frsize,
            "files": known.f_files,
            "free_files": known.f_ffree,
        }
    ]


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20).splitlines()
    except OSError:
        return []
