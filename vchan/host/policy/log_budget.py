"""How much of the daemon's log one VM gets: a guest can cause lines at will, in many places.

A line that names a VM, in whatever module and thread it is written, is that VM's: so there is one
place that counts, and no line can be forgotten. What is over the budget is left out; the VM's next
line says how many were.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from vchan.host.policy.token_bucket import TokenBucket

BYTES_PER_S: Final = 300.0
"""Of one VM's log lines: 26 MB a day at worst. At it: its lines are left out, and counted
(`log_lines_left_out`)."""
BURST_BYTES: Final = 16 * 1024.0
"""A VM that was quiet may have so much at once: a hundred lines, more than a migration has."""
LINE_BYTES_MAX: Final = 2048
"""A line that names a VM is cut there: 64 names of topics have up to 16 KiB."""
VMS_MAX: Final = 4096
"""VMs whose budget is known; who was quiet for longest begins anew."""

_NOTE_BYTES: Final = 60
"""What it takes to say that lines were left out."""
_UUID: Final = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LEAD: Final = re.compile(r"[^\s:]+")


class LogBudget(logging.Filter):
    """A filter for handlers, from any thread. A record is counted once, by the first of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.left_out = 0
        """Lines, of all VMs."""
        self._clock = clock
        self._lock = threading.Lock()
        self._named: set[str] = set()
        self._budgets: OrderedDict[str, _Budget] = OrderedDict()

    def know(self, vm: str) -> None:
        """A VM whose id is no UUID: lines that begin with it are its."""
        if not _UUID.fullmatch(vm):
            self._named.add(vm)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        admitted: bool | None = getattr(record, "admitted", None)
        if admitted is None:
            admitted = record.admitted = self._admit(record)
        return admitted

    def _admit(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        vm = self._vm_of(text)
        if vm is None:
            return True
        always = hasattr(record, "always")
        if len(text) > LINE_BYTES_MAX and not always:
            text = f"{text[:LINE_BYTES_MAX]}..."
        size = len(text.encode("utf-8", "replace"))
        with self._lock:
            budget = self._budgets.setdefault(vm, _Budget())
            self._budgets.move_to_end(vm)
            if len(self._budgets) > VMS_MAX:
                self._budgets.popitem(last=False)
            left_out = budget.admit(size, self._clock(), always=always)
            if left_out is None:
                self.left_out += 1
                return False
        if left_out:
            text += f" ({left_out} lines of this VM were left out before)"
        record.msg, record.args = text, None
        return True

    def _vm_of(self, text: str) -> str | None:
        lead = _LEAD.match(text)
        if lead is not None and lead[0] in self._named:
            return lead[0]
        uuid = _UUID.search(text)
        return uuid[0] if uuid is not None else None


class _Budget:
    """One VM's."""

    def __init__(self) -> None:
        self._bucket = TokenBucket(BYTES_PER_S, BURST_BYTES)
        self._left_out = 0

    def admit(self, size: int, now_s: float, *, always: bool) -> int | None:
        """None if the line is to be left out; otherwise how many were since the last one."""
        if always:
            self._bucket.take(size, now_s)
        elif not self._bucket.try_take(size, now_s):
            self._left_out += 1
            return None
        left_out, self._left_out = self._left_out, 0
        if left_out:
            self._bucket.take(_NOTE_BYTES, now_s)
        return left_out


def install(budget: LogBudget) -> None:
    """Have every line of this process pass it."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(budget)


def remove(budget: LogBudget) -> None:
    """Have no line pass it any more."""
    for handler in logging.getLogger().handlers:
        handler.removeFilter(budget)
