"""What the control side may do with the guest's daemon and its units. Pure."""

from fnmatch import fnmatchcase
from typing import Final

from vchan.errors import Rejected

UNIT_METHODS: Final = (
    "agents",
    "agent_state",
    "agent_log",
    "agent_start",
    "agent_stop",
    "agent_restart",
)
"""What the super-agent answers (`agents`), known before it is loaded."""
PLAIN_VERBS: Final = ("ping", "info", "list", "freeze", "set-time")
UNIT_VERBS: Final = ("state", "log", "start", "stop", "restart")
VERBS: Final = (*PLAIN_VERBS, *UNIT_VERBS)
DEFAULT_ALLOW: Final = "ping, info, list, state"
"""Nothing that changes the guest, and no log lines: they may hold secrets."""


def running_directory(socket: str) -> str:
    """Where a daemon notes which units run: its own, as the agents' socket is. What stands there is
    an earlier daemon's, and ended."""
    return f"{socket}.units"


class Allowed:
    """What the control side may do: the guest's owner says so.

    Args:
        text: Words of VERBS with commas between them; start, stop, restart, log and state may
            name units by a pattern: `restart:web*`.

    Raises:
        ValueError: A word is none of these; says which are.
    """

    def __init__(self, text: str = DEFAULT_ALLOW) -> None:
        self._patterns: dict[str, list[str]] = {}
        for word in filter(None, (part.strip() for part in text.split(","))):
            verb, colon, pattern = word.partition(":")
            if verb not in VERBS or (colon and (not pattern or verb in PLAIN_VERBS)):
                known = (
                    f"{', '.join(PLAIN_VERBS)}, and VERB or VERB:UNIT of {', '.join(UNIT_VERBS)}"
                )
                raise ValueError(f"{word!r}: expected {known}")
            self._patterns.setdefault(verb, []).append(pattern or "*")

    def allows(self, verb: str, unit: str = "") -> bool:
        """Whether this may be done, to this unit."""
        patterns = self._patterns.get(verb, ())
        return "*" in patterns or any(fnmatchcase(unit, pattern) for pattern in patterns)

    def require(self, verb: str, unit: str = "") -> None:
        """Refuse what may not be done.

        Raises:
            Rejected: It may not.
        """
        if not self.allows(verb, unit):
            what = f"{verb} {unit}".strip()
            raise Rejected(f"{what}: the owner of this guest does not allow it (option allow)")
