"""What an exception from a guest must not have a caller import: it leaves a trace."""

import os
from pathlib import Path

Path(os.environ["TRAP_SPRUNG"]).touch()


class system(Exception):  # noqa: N801 - the name that the attacker gives
    """The exception that is asked for."""
