"""What is to be done with one sub-agent: when it is started, stopped, killed, started again.

Rules of this file
1. No I/O, no clock. Time comes in as `now_s`; what is to be done comes out as actions.
2. There is never more than one process of a unit: Start is said only when the one before is over.
3. Every state change is in `_enter`.

    actions = supervised.start(now_s)           # or stop, restart: what somebody wants
    actions = supervised.exited(status, now_s)  # the process is over
    actions = supervised.handle_timeout(now_s)  # when next_timeout() has come
"""

import enum
from typing import Final, NamedTuple

HEALTHY_S: Final = 10.0
"""Who has run so long did not crash at its start: the next delay is the first again."""
CRASHES: Final = 3
"""Quick ends in a row that are called a crash loop."""
KILL_AGAIN_S: Final = 5.0
"""A killed process that is still there (it waits for a disk, say) is killed again."""


class RestartPolicy(NamedTuple):
    """What a unit file says of starting and stopping."""

    restart: str = "always"
    """always; on-failure: unless it ended with 0; no."""
    delay_s: float = 0.5
    """Before the first start again; doubled with every quick end."""
    delay_max_s: float = 60.0
    stop_timeout_s: float = 10.0
    """From the request to end (TERM) to the end by force (KILL)."""


class UnitState(enum.Enum):
    """Of a unit."""

    STOPPED = "stopped"
    FAILED = "failed"  # it ended badly by itself, and is not to be started again
    RUNNING = "running"
    WAITING = "waiting"  # until it is started again
    STOPPING = "stopping"


class Action(enum.Enum):
    """What the shell is to do."""

    START = "start"
    TERMINATE = "terminate"
    KILL = "kill"


class Supervised:
    """One unit. See the top of this file."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        """May be replaced at any time; holds from the next decision on."""
        self.state = UnitState.STOPPED
        self.starts = 0
        self.quick_ends = 0
        self.last_status: int | None = None
        """How it ended the last time: an exit status, a negative signal; None: nobody knows."""
        self.since_s = 0.0
        self._again = False  # once it has stopped
        self._at_s: float | None = None

    @property
    def is_there(self) -> bool:
        """There is a process of it."""
        return self.state in (UnitState.RUNNING, UnitState.STOPPING)

    @property
    def is_crashing(self) -> bool:
        """It ended soon after its start several times in a row."""
        return self.quick_ends >= CRASHES

    # ---------------------------------------------------------------- what somebody wants

    def start(self, now_s: float) -> list[Action]:
        """It is to run."""
        match self.state:
            case UnitState.RUNNING:
                return []
            case UnitState.STOPPING:
                self._again = True
                return []
            case UnitState.STOPPED | UnitState.FAILED | UnitState.WAITING:
                self.quick_ends = 0  # somebody has looked at it, and wants to see it run now
                return self._begin(now_s)

    def stop(self, now_s: float) -> list[Action]:
        """It is not to run."""
        match self.state:
            case UnitState.RUNNING:
                self._enter(UnitState.STOPPING, now_s, self.policy.stop_timeout_s)
                return [Action.TERMINATE]
            case UnitState.STOPPING:
                self._again = False
            case UnitState.WAITING:
                self._enter(UnitState.STOPPED, now_s)
            case UnitState.STOPPED | UnitState.FAILED:
                pass
        return []

    def restart(self, now_s: float) -> list[Action]:
        """It is to run, anew."""
        if self.is_there:
            actions = self.stop(now_s)
            self._again = True
            return actions
        return self.start(now_s)

    # ---------------------------------------------------------------- what happens

    def adopted(self, now_s: float) -> None:
        """A process of it was found that runs already."""
        assert not self.is_there
        self._enter(UnitState.RUNNING, now_s)

    def exited(self, status: int | None, now_s: float) -> list[Action]:
        """Its process is over.

        Args:
            status: The exit status, a negative signal, or None if nobody knows.
        """
        assert self.is_there
        self.last_status = status
        if self.state is UnitState.STOPPING:
            if self._again:
                return self._begin(now_s)
            self._enter(UnitState.STOPPED, now_s)
            return []
        policy = self.policy
        if now_s - self.since_s >= HEALTHY_S:
            self.quick_ends = 0
        if policy.restart == "always" or (policy.restart == "on-failure" and status != 0):
            delay_s = min(policy.delay_s * 2 ** min(self.quick_ends, 30), policy.delay_max_s)
            self.quick_ends += 1
            self._enter(UnitState.WAITING, now_s, delay_s)
        else:
            self._enter(UnitState.STOPPED if status == 0 else UnitState.FAILED, now_s)
        return []

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`; None: not needed."""
        return self._at_s

    def handle_timeout(self, now_s: float) -> list[Action]:
        """Do what is due. Calling it early or late is harmless."""
        if self._at_s is None or now_s < self._at_s:
            return []
        if self.state is UnitState.WAITING:
            return self._begin(now_s)
        assert self.state is UnitState.STOPPING
        self._at_s = now_s + KILL_AGAIN_S
        return [Action.KILL]

    # ---------------------------------------------------------------- changes

    def _begin(self, now_s: float) -> list[Action]:
        self.starts += 1
        self._enter(UnitState.RUNNING, now_s)
        return [Action.START]

    def _enter(self, state: UnitState, now_s: float, timeout_s: float | None = None) -> None:
        self.state = state
        self.since_s = now_s
        self._again = False
        self._at_s = None if timeout_s is None else now_s + timeout_s
