"""Trove's own conductor's manager, which notes what reaches it: see trove_parts."""

from typing import Any

from trove.conductor import manager
from trove_parts import note


class Manager(manager.Manager):  # type: ignore[misc]
    """By trove.conf's `conductor_manager`."""

    def heartbeat(self, context: Any, **args: Any) -> None:
        note("heartbeat", args["sent"])
        super().heartbeat(context, **args)

    def update_backup(self, context: Any, **args: Any) -> None:
        note("update_backup", int(args["size"]), args["state"])
        super().update_backup(context, **args)
