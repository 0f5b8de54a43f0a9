"""What was published for a VM before it came here: the log that its hosts keep in its own queue.

Rules of this file
1. Pure: no I/O, no clock, no randomness.
2. A stay is a host's time with the VM, until that goes or is away. A host writes its arrival before
   it publishes anything, and waits until that has come back to it: then it has read all that was
   written before, and takes that out of the queue. What others write after it, it reads and leaves
   for who comes next. Its arrival stays in the queue as long as the stay lasts; who finds it later,
   without a note, knows that the host has died, or is slow.
3. When the stay ends, the host writes a note: what it knows to have been published.

    arrival A, note A, arrival B     A's stay is over, B serves
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum
from typing import Final

from vchan.host.upward_envelope import NOTE_IDS_MAX, STAYS_MAX, Arrival, Note

NOTE_WAIT_S: Final = 5.0
"""How long after a VM's arrival what hosts before have written, or still write, is waited for. It
takes milliseconds; a host that cannot for so long is as good as gone."""
SETTLED_S: Final = 10.0
"""By then the guest has sent again what it had sent to the hosts before. Its agents come back to a
daemon that was restarted within a second or two."""
PAST_MAX: Final = NOTE_IDS_MAX
"""Ids that are remembered; the oldest go first."""
_LOST: Final = ""
"""Stands for a host that has left nothing, not even its arrival."""


class Past(Enum):
    """What is known of a request. See `Note`."""

    TAKEN = "taken"
    CALLED = "calls"
    GONE = "gone"
    DOUBT = "doubt"


class History:
    """The log of one VM, as far as it was read here."""

    def __init__(self) -> None:
        self.stay = ""
        """Names it; "" before the first."""
        self.is_read = False
        """Our own arrival has come back."""
        self.is_settled = False
        """Whatever was published before, the guest has sent again by now."""
        self.settled_s = 0.0
        self.wait_until_s = 0.0
        self._past: OrderedDict[bytes, Past] = OrderedDict()
        self._ours: dict[str, None] = {}
        self._before = ""
        self._is_empty = True
        self._open: dict[str, bool] = {}  # stays that may write more; True: no note at all yet
        self._closed: set[str] = set()

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
        self.wait_until_s = now_s + NOTE_WAIT_S
        self.settled_s = now_s + SETTLED_S

    # ---------------------------------------------------------------- reading

    def read_arrival(self, arrival: Arrival) -> None:
        """Another host's, or our own that has come back."""
        if arrival.stay == self.stay:
            is_first = len(self._ours) == 1 and not self.is_read
            if is_first and self._is_empty and self._before:
                self._open[_LOST] = True
            self.is_read = True
        else:
            self._is_empty = False
            self._await(arrival.stay)

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
            self._closed.add(stay)
            if note.doubt and not self.is_settled:
                self._open[stay] = False  # a better one may follow
        for stay in note.unclear:
            self._await(stay)

    def _await(self, stay: str) -> None:
        if not (stay in self._closed or stay in self._ours or self.is_settled):
            self._open[stay] = True

    def handle_timeout(self, now_s: float) -> None:
        """Wait no longer than is of use."""
        if self.stay and now_s >= self.settled_s:
            self.is_settled = True
            self._open.clear()

    # ---------------------------------------------------------------- what is known

    @property
    def knows_all(self) -> bool:
        """An id that is not known was not published."""
        return self.is_settled or (self.is_read and not any(self._open.values()))

    def may_learn(self, now_s: float) -> bool:
        """More may come of what was published before."""
        return now_s < self.wait_until_s and (not self.is_read or bool(self._open))

    def unclear(self) -> tuple[str, ...]:
        """Hosts that have left no note: for our own."""
        return tuple(stay for stay, is_unknown in self._open.items() if is_unknown)

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
