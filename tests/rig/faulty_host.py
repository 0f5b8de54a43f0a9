"""vchan-host with a fault in it, for one of its VMs, or for none.

    python -m tests.rig.faulty_host MODULE:CLASS.METHOD VM SWITCH --config-file FILE

The method fails while the file SWITCH is there, for objects whose `vm` is VM; "*": for any object.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from vchan.host.daemon import main


class PlantedError(AssertionError):
    """What the method raises."""


def plant(where: str, vm: str, switch: Path) -> None:
    """Have the method fail."""
    module, _, path = where.partition(":")
    class_name, _, method = path.partition(".")
    owner = getattr(import_module(module), class_name)
    inner = getattr(owner, method)

    def faulty(this: Any, *args: Any, **kwargs: Any) -> Any:
        if vm in ("*", getattr(this, "vm", None)) and switch.exists():
            raise PlantedError(f"planted in {path}")
        return inner(this, *args, **kwargs)

    setattr(owner, method, faulty)


if __name__ == "__main__":
    where, vm, switch = sys.argv[1:4]
    del sys.argv[1:4]
    plant(where, vm, Path(switch))
    main()
