"""VMs that this host served and that libvirt has forgotten: when their queues may go.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`.
2. A domain that libvirt has forgotten need not be deleted: nova undefines one for a hard reboot,
   when it shelves it, and on the host that a resized VM has left. Nothing that a host sees tells
   the one from the other, and casts to a shelved VM whose queues were deleted are lost. So this is
   off unless an operator sets a delay, and then the broker deletes only queues that are empty and
   that no host consumes from.
3. Without it unused queues expire by themselves.
"""

from __future__ import annotations

from typing import Final

from vchan.rpc.messages import Topic

LEFTOVERS_MAX: Final = 10_000
"""VMs remembered. At it: the longest known is forgotten; its queues expire."""


class Leftovers:
    """What is left of VMs at the broker.

    Args:
        delay_s: From a domain's end to its queues'. 0: never.
    """

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._topics: dict[str, frozenset[Topic]] = {}  # of VMs that were served here
        self._moved: dict[str, None] = {}  # VMs that went on elsewhere, in order
        self._gone_s: dict[str, float] = {}  # when libvirt forgot the domain

    def here(self, vm: str) -> None:
        """It has a channel here."""
        self._moved.pop(vm, None)
        self._gone_s.pop(vm, None)

    def present(self, vm: str) -> None:
        """libvirt knows the domain, again perhaps, whether it runs or not and whether it could be
        read or not."""
        self._gone_s.pop(vm, None)

    def served(self, vm: str, topics: frozenset[Topic]) -> None:
        """This host has declared its queues for these topics."""
        self._topics[vm] = self._topics.pop(vm, frozenset()) | topics
        _bound(self._topics)

    def moved(self, vm: str) -> None:
        """It goes on at another host."""
        self._topics.pop(vm, None)
        self._gone_s.pop(vm, None)
        self._moved[vm] = None
        _bound(self._moved)

    def gone(self, vm: str, now_s: float) -> None:
        """libvirt does not know the domain any more."""
        if vm in self._moved:
            del self._moved[vm]
        elif self._delay_s:
            self._gone_s[vm] = now_s
            _bound(self._gone_s)

    def due(self, now_s: float) -> list[tuple[str, frozenset[Topic]]]:
        """Whose queues are to be deleted now, and the topics that are known; each once."""
        due = [vm for vm, gone_s in self._gone_s.items() if now_s - gone_s >= self._delay_s]
        for vm in due:
            del self._gone_s[vm]
        assert not any(vm in self._moved for vm in due), "it lives elsewhere, with these queues"
        return [(vm, self._topics.pop(vm, frozenset())) for vm in due]


def _bound(known: dict[str, frozenset[Topic]] | dict[str, None] | dict[str, float]) -> None:
    if len(known) > LEFTOVERS_MAX:
        del known[next(iter(known))]
