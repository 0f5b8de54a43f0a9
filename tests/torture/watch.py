"""What the daemons take, looked at all the while."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.torture.faults import Faults
from tests.torture.oracle import DESCRIPTORS, DIED, MEMORY
from tests.torture.records import Health
from tests.torture.stage import Stage

LOOK_S: Final = 0.5
HOST_RSS_MAX_MIB: Final = 192
"""Four VMs' worst, by docs/limits.md, is more; what was ever seen is 81 MiB."""
HOST_DESCRIPTORS_MAX: Final = 64
"""With four VMs 24 were seen: one that is not closed at each reconnection is soon over this."""
GUEST_RSS_MAX_MIB: Final = 64
GUEST_DESCRIPTORS_MAX: Final = 64
PAGE_MIB: Final = 4096 / (1 << 20)


class Watch:
    """Looks at both hosts' daemons, and reads the guests' records as they come.

    Args:
        broken: Told of a promise that was seen to be broken: kind and text.
    """

    def __init__(self, stage: Stage, faults: Faults, broken: Callable[[str, str], None]) -> None:
        self._stage = stage
        self._faults = faults
        self._broken = broken
        self._stop = threading.Event()
        self._told = Counter[str]()
        self.host_rss_mib = 0.0
        self.host_descriptors = 0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            self.look()
            self._stage.read()

    def look(self) -> None:
        """Once, at both hosts' daemons."""
        for host in self._stage.hosts:
            if host.name in self._faults.killing:
                continue
            if host.daemon.is_running:
                self._weigh(host.name, host.daemon.pid)
            elif host.name not in self._faults.killing:  # we may have killed it just now
                self._tell(DIED, f"{host.name}: its daemon ended by itself")

    def _weigh(self, host: str, pid: int) -> None:
        with contextlib.suppress(OSError, IndexError):  # it is being killed
            rss_mib = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB
            descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            self.host_rss_mib = max(self.host_rss_mib, rss_mib)
            self.host_descriptors = max(self.host_descriptors, descriptors)
            if rss_mib > HOST_RSS_MAX_MIB:
                self._tell(MEMORY, f"{host}: {rss_mib:.0f} MiB, over {HOST_RSS_MAX_MIB}")
            if descriptors > HOST_DESCRIPTORS_MAX:
                limit = HOST_DESCRIPTORS_MAX
                self._tell(DESCRIPTORS, f"{host}: {descriptors} descriptors, over {limit}")

    def guests(self) -> tuple[float, int]:
        """The most that any guest's daemon took: MiB and descriptors."""
        health = [
            record
            for programs in self._stage.guests.values()
            for book in programs.values()
            for record in book.records
            if isinstance(record, Health)
        ]
        rss_mib = max((record.rss_kib / 1024 for record in health), default=0.0)
        descriptors = max((record.descriptors for record in health), default=0)
        if rss_mib > GUEST_RSS_MAX_MIB:
            self._tell(MEMORY, f"a guest's daemon: {rss_mib:.0f} MiB, over {GUEST_RSS_MAX_MIB}")
        if descriptors > GUEST_DESCRIPTORS_MAX:
            self._tell(DESCRIPTORS, f"a guest's daemon: {descriptors} descriptors")
        return rss_mib, descriptors

    def _tell(self, kind: str, text: str) -> None:
        """Once of each kind: it would be every half second."""
        self._told[kind] += 1
        if self._told[kind] == 1:
            self._broken(kind, text)
