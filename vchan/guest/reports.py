"""What the host is told of this guest, and when: each change once, through migrations.

Rules of this file
1. No I/O, no clock, no logging. Time comes in as `now_s`; requests leave by the `send` handed in.
2. Every report is a state: the last one counts, and what changed while one is under way is told
   when that has arrived. So there is at most one of each kind under way, however long no host
   listens.
3. A host that has just come knows nothing: it is told all again, marked as known if a host has
   taken it; but for metrics, which are what was so at a moment. What is still under way comes to it
   by itself (`rpc.in_flight`).
4. A host is told nothing before it says that it takes reports, and nothing more of what it refuses
   until it says so again.

    observer --tell(what, report)--> Reporter --Request--> `upward` --> host
                                     Reporter <--Receipt, Returned-- `upward` <-- host
"""

from collections.abc import Callable
from typing import Any, Final

from vchan.rpc.bodies import encode_invocation
from vchan.rpc.in_flight import earliest
from vchan.rpc.messages import REFUSED, Receipt, Request, Returned, Settled
from vchan.rpc.reports import METRICS, REPORT_BYTES_MAX, TOPIC, WHAT

BUSY_S: Final = 30.0
"""A host that has no room for a report now, or cannot say what came of it, is told again after
this."""

Report = dict[str, Any]


class _ReportState:
    """One kind of report.

    Attributes:
        now: What is so, as last observed.
        told: What a host has taken last.
        here: Whether it was the host that we have now.
        open: What is under way, by its id.
    """

    __slots__ = ("here", "is_refused", "now", "open", "open_id", "told", "wait_until_s")

    def __init__(self) -> None:
        self.now: Report | None = None
        self.told: Report | None = None
        self.here = False
        self.open: Report | None = None
        self.open_id = b""
        self.is_refused = False
        self.wait_until_s: float | None = None


class Reporter:
    """Decides what to send.

    Args:
        send: Takes a request on its way, or a word that one is over.
        new_id: Makes an id that nobody else has.
    """

    def __init__(
        self, send: Callable[[Request | Settled, float], None], new_id: Callable[[], bytes]
    ) -> None:
        self._send = send
        self._new_id = new_id
        self._states = {what: _ReportState() for what in WHAT}
        self._takes = False
        self.counters = {"reports_taken": 0, "reports_refused": 0, "reports_too_large": 0}
        self.refusal = ""
        """Why the host refused the last one that it refused."""

    def host_takes(self, takes: bool, now_s: float) -> None:
        """The host that we have a session with has said whether it takes reports; False also when
        a session begins: it has not said so yet."""
        self._takes = takes
        for state in self._states.values():
            state.here = state.is_refused = False
            state.wait_until_s = None
        self._send_news(now_s)

    def tell(self, what: str, report: Report, now_s: float) -> None:
        """This is so now."""
        self._states[what].now = report
        self._send_news(now_s)

    def _send_news(self, now_s: float) -> None:
        for what, state in self._states.items():
            if self._takes and self._is_news(state):
                self._send_report(what, state, now_s)

    @staticmethod
    def _is_news(state: _ReportState) -> bool:
        if state.now is None or state.open is not None:
            return False
        if state.is_refused or state.wait_until_s is not None:
            return False
        return not state.here or state.now != state.told

    def _send_report(self, what: str, state: _ReportState, now_s: float) -> None:
        assert state.now is not None
        args = {"report": state.now, "known": state.now == state.told}
        body = encode_invocation(what, args)
        if len(body) > REPORT_BYTES_MAX:  # whoever observes keeps below it
            self.counters["reports_too_large"] += 1
            state.is_refused = True
            self.refusal = f"{what}: {len(body)} bytes (REPORT_BYTES_MAX)"
            return
        state.open, state.open_id = state.now, self._new_id()
        self._send(Request(state.open_id, 0, 0, 0, *TOPIC, "", body), now_s)

    def heard(self, message: Receipt | Returned, now_s: float) -> None:
        """What became of one."""
        for what, state in self._states.items():
            if state.open is not None and state.open_id == message.id:
                self._conclude(what, state, message, now_s)
                self._send(Settled((message.id,)), now_s)
        self._send_news(now_s)

    def _conclude(
        self, what: str, state: _ReportState, message: Receipt | Returned, now_s: float
    ) -> None:
        report, state.open = state.open, None
        if isinstance(message, Receipt):
            self.counters["reports_taken"] += 1
            state.told = report
            # Said in an earlier session it would have ended the request there.
            state.here = True
            if what == METRICS and state.now is report:
                state.now = None  # a host that comes later has no use for what was so then
            return
        self.counters["reports_refused"] += 1
        self.refusal = f"{what}: {message.text}"
        if message.reason == REFUSED:
            state.is_refused = True
        else:
            state.wait_until_s = now_s + BUSY_S

    def all_told(self, what: str) -> bool:
        """Nothing of it is under way, or is still to be told to this host."""
        state = self._states[what]
        return state.open is None and not (self._takes and self._is_news(state))

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`."""
        return earliest(*(state.wait_until_s for state in self._states.values()))

    def handle_timeout(self, now_s: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        for state in self._states.values():
            if state.wait_until_s is not None and now_s >= state.wait_until_s:
                state.wait_until_s = None
        self._send_news(now_s)
