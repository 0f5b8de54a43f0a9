"""Which guests are dead, by what a host's daemon says of them each time it is asked. Pure.

Rules of this file
1. No I/O, no clock. Time comes in as `now_s`, a list of VMs as the daemon's method `list` has it.
2. Silence alone is no death. A VM is judged only while its guest has reported that it is ready, and
   not that it ends: a guest's daemon says so before it is stopped. One that is paused, arrives,
   leaves, or is in quarantine is not dead, nor one that libvirt does not say to be running.
3. No death is reported while libvirt is away, nor of VMs that fell silent together: then the host
   stands still, and not the guests.
4. A death is reported once. A guest that is heard again, or that was started again, may die again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

TOGETHER_S: Final = 5.0
"""VMs that fell silent within so long of each other did so together."""
TOGETHER_MAX: Final = 3
"""So many that did are taken for the host's trouble, if they are most of those that were heard."""
GAP_S: Final = 30.0
"""A longer time without a look: we stood still ourselves, and do not know what was meanwhile."""


class Death(NamedTuple):
    """A guest is dead, as far as can be known from here."""

    uuid: str
    name: str
    silent_s: float


class _Silence(NamedTuple):
    began_s: float
    seen_s: float
    """When it was seen first by who looks here: `began_s` may be long before."""


class Deaths:
    """Looks at lists, one after another.

    Args:
        dead_s: A guest that has been silent for so long is dead.
    """

    def __init__(self, dead_s: float) -> None:
        self._dead_s = dead_s
        self._silent: dict[str, _Silence] = {}
        self._told: set[str] = set()
        self._looked_s: float | None = None

    def look(
        self, rows: Iterable[Mapping[str, Any]], now_s: float, *, sees_libvirt: bool
    ) -> list[Death]:
        """Who has died since the last look."""
        rows = list(rows)
        if self._looked_s is None or now_s - self._looked_s > GAP_S or not sees_libvirt:
            self._silent.clear()
        self._looked_s = now_s
        heard = sum(row["channel"] in ("ready", "silent") for row in rows)
        silent = {row["uuid"]: row for row in rows if _is_silent(row)}
        self._told &= silent.keys()
        for uuid in self._silent.keys() - silent.keys():
            del self._silent[uuid]
        for uuid, row in silent.items():
            self._silent.setdefault(uuid, _Silence(now_s - row["heard_s"], now_s))
        if not sees_libvirt:
            return []
        deaths = []
        for uuid, row in silent.items():
            silence = self._silent[uuid]
            # We must have seen all of it: a VM may have been paused before, or have come since.
            if uuid in self._told or now_s - silence.seen_s < self._dead_s:
                continue
            if not self._fell_together(silence, heard):
                self._told.add(uuid)
                deaths.append(Death(uuid, row["name"], now_s - silence.began_s))
        return deaths

    def _fell_together(self, one: _Silence, heard: int) -> bool:
        others = sum(
            abs(other.began_s - one.began_s) <= TOGETHER_S for other in self._silent.values()
        )
        return others >= TOGETHER_MAX and 2 * others > heard


def _is_silent(row: Mapping[str, Any]) -> bool:
    """Its guest should speak, and does not."""
    guest = row.get("guest") or {}
    return (
        row["domain"] == "running"
        and row["channel"] == "silent"
        and row.get("heard_s") is not None
        and guest.get("phase") == "ready"
    )
