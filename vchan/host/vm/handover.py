"""What was published for a VM before it came here: the log that its hosts keep in its own queue.

Rules of this file
1. Pure: no I/O, no clock, no randomness.
2. A stay is a host's time with the VM, until that goes or is away. A host writes its arrival before
   it publishes anything, and waits until that has come back to it: then it has read all that was
   written before, and takes that out of the queue. It reads what others write after it, and leaves
   that for the next host. Its arrival stays in the queue as long as the stay lasts; a host that
   finds it later, without a note, knows that the other host has died, or is slow.
3. When the stay ends, the host writes a note. It names what has been published, as far as the host
   knows; and the hosts whose notes are missing, with how long they were waited for. The next host
   waits for the rest of that time.

    arrival A, note A, arrival B     A's stay is over, B serves
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum
from typing import Final

from vchan.host.oslo_wire.mail import NOTE_IDS_MAX, STAYS_MAX, Arrival, Note

NOTE_WAIT_S: Final = 5.0
"""How long after a VM's arrival what hosts before have written, or still write, is waited for: by
all the hosts that it comes to together. It takes milliseconds; a host that cannot for so long is as
good as gone. At it: what the guest sends again is published, and marked."""
SETTLED_S: Final = 12.0
"""By then the guest has sent again what it had sent to the hosts before. Its agents come back to a
daemon that was restarted within a second or two. A guest that stands still is found silent after
10 s at the latest, and its time stops then: sooner than that this must not be over."""
PAST_MAX: Final = NOTE_IDS_MAX
"""Ids that are remembered; the oldest go first."""
CLOSED_MAX: Final = 4 * STAYS_MAX
"""Stays of others that have left a note and are remembered to have. At it: the oldest is forgotten;
what is forgotten wrongly is in doubt for SETTLED_S: marked, not lost."""
OPEN_MAX: Final = 4 * STAYS_MAX
"""Stays of others that may write more. At it: they are one doubt that lasts SETTLED_S; what is sent
again meanwhile is marked."""
_LOST: Final = ""
"""Stands for hosts of which nobody can say more: they have left nothing, not even an arrival, or
there were too many."""


class Past(Enum):
    """What is known of a request. See `Note`."""

    TAKEN = "taken"
    CALLED = "calls"
    GONE = "gone"
    DOUBT = "doubt"


class _Awaited:
    """A stay that may write more."""

    __slots__ = ("is_unknown", "until_s", "waited_s")

    def __init__(self, is_unknown: bool, waited_s: float, now_s: float) -> None:
        self.is_unknown = is_unknown  # it has written no note at all yet
        self.waited_s = waited_s  # before now
        self.until_s = now_s + NOTE_WAIT_S - waited_s


class Handover:
    """The log of one VM, as far as it was read here."""

    def __init__(self) -> None:
        self.stay = ""
        """Names it; "" before the first."""
        self.is_read = False
        """Our own arrival has come back."""
        self.is_settled = False
        """Whatever was published before, the guest has sent again by now."""
        self.may_lack_stays = False
        """A host may have had the VM of which neither the queue tells, for the broker took nothing
        then, nor the guest's daemon, for it is new. It has published nothing, but its programs may
        have run what the guest sends again."""
        self.settled_s = 0.0
        self._read_until_s = 0.0
        self._began_s = 0.0
        self._past: OrderedDict[bytes, Past] = OrderedDict()
        self._ours: dict[str, None] = {}
        self._before = ""
        self._is_empty = True
        self._open: dict[str, _Awaited] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()

    def begin(self, stay: str, before: str, now_s: float) -> None:
        """The VM is here, or here again.

        Args:
            before: The host that the guest had its last session with. "": its daemon is new.
        """
        self.stay = stay
        self._ours[stay] = None
        if len(self._ours) > STAYS_MAX:
            del self._ours[next(iter(self._ours))]
        self._before = before
        self._is_empty = True
        self.is_read = self.is_settled = False
        self.may_lack_stays = len(self._ours) == 1 and not before
        self._began_s, self._read_until_s = now_s, now_s + NOTE_WAIT_S
        for awaited in self._open.values():
            awaited.until_s = now_s + NOTE_WAIT_S - awaited.waited_s
        self.settled_s = now_s + SETTLED_S

    def end(self, now_s: float) -> None:
        """The VM goes, or is away."""
        for awaited in self._open.values():
            awaited.waited_s = min(NOTE_WAIT_S, awaited.waited_s + now_s - self._began_s)

    def stand_still(self) -> None:
        """The guest says nothing: paused, perhaps, and then nobody in it asks again meanwhile."""
        if not self.is_settled:
            self.settled_s = math.inf

    def go_on(self, now_s: float) -> None:
        """The guest is heard again."""
        if self.settled_s == math.inf:
            self.settled_s = now_s + SETTLED_S

    # ---------------------------------------------------------------- reading

    def read_arrival(self, arrival: Arrival) -> None:
        """Another host's, or our own that has come back."""
        if arrival.stay == self.stay:
            is_first = len(self._ours) == 1 and not self.is_read
            if is_first and self._is_empty and self._before:
                self._await(_LOST, 0.0)
            self.is_read = True
        else:
            self._is_empty = False
            self._await(arrival.stay, 0.0)

    def is_ours(self, message: Arrival | Note) -> bool:
        """It is this host's, now or before."""
        stays = (message.stay,) if isinstance(message, Arrival) else message.stays
        return any(stay in self._ours for stay in stays)

    def stays(self) -> tuple[str, ...]:
        """This host's, for its note."""
        return tuple(self._ours)

    def read_note(self, note: Note) -> None:
        """Another host's, or our own: after hours away it says more than we remember."""
        self._is_empty = False
        for past in Past:
            for request_id in getattr(note, past.value):
                self.remember(request_id, past)
        if self.is_ours(note):
            return
        for stay in note.stays:
            self._open.pop(stay, None)
            self._closed[stay] = None
            self._closed.move_to_end(stay)
            if not (note.is_last or self.is_settled) and len(self._open) < OPEN_MAX:
                self._open[stay] = _Awaited(False, 0.0, self._began_s)  # a better one may follow
        while len(self._closed) > CLOSED_MAX:
            self._closed.popitem(last=False)
        for stay, waited_ms in zip(note.unclear, note.waited_ms, strict=True):
            self._await(stay, waited_ms / 1000)

    def _await(self, stay: str, waited_s: float) -> None:
        if stay in self._closed or stay in self._ours or self.is_settled:
            return
        if stay not in self._open and len(self._open) >= OPEN_MAX:
            stay = _LOST
        known = self._open.get(stay)
        if known is not None and known.is_unknown:
            waited_s = max(waited_s, known.waited_s)
        self._open[stay] = _Awaited(True, min(waited_s, NOTE_WAIT_S), self._began_s)

    def handle_timeout(self, now_s: float) -> None:
        """Wait no longer than is of use."""
        if self.stay and now_s >= self.settled_s:
            self.is_settled = True
            self.may_lack_stays = False
            self._open.clear()

    # ---------------------------------------------------------------- what is known

    @property
    def knows_all(self) -> bool:
        """An id that is not known was not published."""
        is_unknown = any(awaited.is_unknown for awaited in self._open.values())
        return self.is_settled or (self.is_read and not is_unknown)

    def may_learn(self, now_s: float) -> bool:
        """More may come of what was published before."""
        assert not (self.is_settled and self._open), "who is waited for, after all was settled"
        return now_s < self.wait_until_s

    @property
    def wait_until_s(self) -> float:
        """When waiting for what may come is over."""
        until_s = [awaited.until_s for awaited in self._open.values()]
        return max(until_s + ([] if self.is_read else [self._read_until_s]), default=-math.inf)

    def unclear(self) -> tuple[str, ...]:
        """Hosts that have left no note: for our own."""
        return tuple(stay for stay, awaited in self._open.items() if awaited.is_unknown)

    def waited_ms(self) -> tuple[int, ...]:
        """How long a note of each of these was waited for, when the stay has ended."""
        every = self._open.values()
        return tuple(int(awaited.waited_s * 1000) for awaited in every if awaited.is_unknown)

    def past(self, request_id: bytes) -> Past | None:
        """What is known of it."""
        return self._past.get(request_id)

    def all_past(self) -> Iterable[tuple[bytes, Past]]:
        """Of every request, oldest first."""
        return self._past.items()

    def remember(self, request_id: bytes, past: Past) -> None:
        """Add to what is known."""
        self._past[request_id] = past
        if len(self._past) > PAST_MAX:
            self._past.popitem(last=False)

    def forget(self, request_id: bytes) -> None:
        """It is settled."""
        self._past.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._past)
