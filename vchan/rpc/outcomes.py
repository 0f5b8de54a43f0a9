"""What becomes of a request that gets no answer: one table, for every hop and every way to say it.

Rules of this file
1. No I/O, no clock, no logging.
2. A reason says whether the request has run. "No" binds: it never runs afterwards, whatever copy of
   it comes from wherever. Where that cannot be promised, the reason is one that says "perhaps".
3. A reason that is not in the table comes from a newer peer, and means "perhaps".
"""

import enum
from typing import Final, NamedTuple

from vchan.errors import (
    AgentGone,
    BadBody,
    CallTimeout,
    LimitExceeded,
    NoSuchAgent,
    NoSuchDomain,
    Rejected,
    RequestError,
    VchanError,
)
from vchan.rpc.in_flight import Answered, HandedBack, Outcome, Overdue
from vchan.rpc.messages import AGENT_GONE, BUSY, EXPIRED, NO_AGENT, NO_DOMAIN, REFUSED, RELEASED


class Ran(enum.Enum):
    """Whether a request that got no answer has run."""

    NO = "no"
    PERHAPS = "perhaps"


class Ending(NamedTuple):
    """How a request ends without an answer."""

    reason: int
    """On the wire, in Returned."""
    name: str
    meaning: str
    ran: Ran
    error: type[RequestError]
    """What a caller sees: raised by `vchan.client`, named in a failure that goes to a service
    (not CallTimeout: its own time is over as well)."""
    http_status: int
    """Of the gateways' answers."""


ENDINGS: Final = (
    Ending(
        NO_AGENT,
        "NO_AGENT",
        "nobody serves the topic; or whoever was given it has handed it back before it began; or "
        "its time was over before anybody was given it",
        Ran.NO,
        NoSuchAgent,
        404,
    ),
    Ending(AGENT_GONE, "AGENT_GONE", "the agent went away with it", Ran.PERHAPS, AgentGone, 502),
    Ending(BUSY, "BUSY", "too many are open", Ran.NO, Rejected, 429),
    Ending(REFUSED, "REFUSED", "policy, or too large", Ran.NO, Rejected, 403),
    Ending(
        EXPIRED,
        "EXPIRED",
        "its time was over, or it was answered and the answer is no longer kept",
        Ran.PERHAPS,
        CallTimeout,
        504,
    ),
    Ending(NO_DOMAIN, "NO_DOMAIN", "no such VM here", Ran.NO, NoSuchDomain, 404),
    Ending(
        RELEASED,
        "RELEASED",
        "the VM has left this host, or an agent its daemon; a cast has not run, and comes again",
        Ran.PERHAPS,
        AgentGone,
        502,
    ),
)

_BY_REASON: Final = {ending.reason: ending for ending in ENDINGS}
_UNKNOWN: Final = _BY_REASON[AGENT_GONE]

_REASONS: Final[dict[type[VchanError], int]] = {
    NoSuchDomain: NO_DOMAIN,
    NoSuchAgent: NO_AGENT,
    Rejected: REFUSED,
    BadBody: REFUSED,
    LimitExceeded: BUSY,
}
UNSENT: Final = tuple(_REASONS)
"""Why a request could not be sent on at all: it has not run."""


def ending_of(reason: int) -> Ending:
    """What a Returned's reason means."""
    return _BY_REASON.get(reason, _UNKNOWN)


def error_of(outcome: Outcome, timeout_s: float) -> RequestError:
    """What a caller is told of an outcome that is none of success."""
    match outcome:
        case HandedBack(_, reason, text):
            return ending_of(reason).error(text)
        case Answered():
            return Rejected("a cast was answered: the other end is broken")
        case _:
            return CallTimeout(f"no answer within {timeout_s:g} s")


def http_status_of(outcome: Outcome) -> int:
    """The same, as a status."""
    reason = outcome.reason if isinstance(outcome, HandedBack) else EXPIRED
    return ending_of(reason).http_status


def reason_of(error: VchanError) -> int:
    """What a request is returned for that could not be sent on because of one of UNSENT."""
    return _REASONS[type(error)]


def may_have_run(outcome: Outcome) -> bool:
    """Whether a request that ended so may have run."""
    match outcome:
        case HandedBack(_, reason, _):
            return ending_of(reason).ran is Ran.PERHAPS
        case Overdue(_, was_sent):
            return was_sent
        case _:
            return True
