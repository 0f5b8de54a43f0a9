"""One VM's requests that are over: while the broker's thread completes them, and for some time
after that, so that a further copy is known as one.

Pure: no I/O, no clock.

    over --begin, begin_answer--> being completed --completed--> remembered
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

FINISHED_MAX: Final = 256
"""Ids of requests that are over, of one VM: a caller that lost its connection before the broker
confirmed publishes the same request again, within seconds. At it: the oldest is forgotten."""


class _Answer(NamedTuple):
    """A call that is being completed.

    Attributes:
        size: Of its reply.
        guest: The run of the guest's daemon that said what came of it.
    """

    size: int
    guest: bytes
    has_not_run: bool


class FinishedRequests:
    """One VM's, by their ids."""

    def __init__(self) -> None:
        self.bytes = 0
        """Of the replies that are not published."""
        self._answers: dict[bytes, _Answer] = {}
        self._completing: set[bytes] = set()  # casts, and copies, among them
        self._left_over: set[bytes] = set()  # of these, what an earlier run of its daemon had
        self._remembered: dict[bytes, bytes] = {}  # as which run said; the oldest first

    @property
    def are_left_over(self) -> bool:
        """Something that an earlier run of the guest's daemon had is not completed."""
        return bool(self._left_over)

    def is_over(self, request_id: bytes, guest: bytes) -> bool:
        """Its reply is being completed; or an earlier run of the guest's daemon than this had it,
        which this one does not know of."""
        known = self._remembered.get(request_id, guest) == guest
        return request_id in self._answers or not known

    def guest_restarted(self) -> None:
        """Another run of its daemon has begun."""
        self._left_over = set(self._completing)

    def begin_answer(self, request_id: bytes, size: int, guest: bytes, has_not_run: bool) -> None:
        """The broker's thread is told to complete a call, with a reply of this size."""
        assert request_id not in self._answers, "a call is answered once"
        self._answers[request_id] = _Answer(size, guest, has_not_run)
        self._completing.add(request_id)
        self.bytes += size

    def begin(self, request_id: bytes) -> None:
        """The broker's thread is told to complete a request, without a reply."""
        self._completing.add(request_id)

    def begin_copy(self, request_id: bytes) -> None:
        """Likewise, a further copy of what is over."""
        self._left_over.add(request_id)

    def remember(self, request_id: bytes, guest: bytes) -> None:
        """It does not come again, but for copies: this run of the guest's daemon had it."""
        remembered = self._remembered
        remembered[request_id] = guest
        if len(remembered) > FINISHED_MAX:
            del remembered[next(iter(remembered))]
        assert len(remembered) <= FINISHED_MAX

    def completed(self, ids: Sequence[bytes], *, proven: bool) -> None:
        """The broker's thread has done what it could for these.

        Args:
            proven: It has proved that it has forgotten them.
        """
        for request_id in ids:
            answer = self._answers.pop(request_id, None)
            if answer is not None:
                self.bytes -= answer.size
                if proven or not answer.has_not_run:  # else it comes again, and is decided anew
                    self.remember(request_id, answer.guest)
        assert self.bytes >= 0 and (self._answers or not self.bytes)
        self._completing.difference_update(ids)
        self._left_over.difference_update(ids)

    def clear(self) -> None:
        """The VM is no longer here: nothing is completed for it any more."""
        self._answers.clear()
        self._completing.clear()
        self._left_over.clear()
        self.bytes = 0
