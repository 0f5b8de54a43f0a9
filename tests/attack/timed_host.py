"""vchan-host on the test driver, with the processor time that each VM's turns take of its loop.

    python -m tests.attack.timed_host --config-file FILE

At SIGUSR1 it writes them to FILE.turns, as JSON, microseconds by the channel's path, and begins
anew. Processor time, not time: what else runs on the machine does not count.
"""

from __future__ import annotations

import json
import signal
import sys
from array import array
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from time import thread_time
from typing import Any

import tests.rig.undriven_host  # noqa: F401  # makes libvirt's test driver fit
from vchan.host.channels import Channel
from vchan.host.daemon import main as run
from vchan.link import Link

_turns: dict[str, array[float]] = defaultdict(lambda: array("d"))


def _time(kind: type, name: str, path: Callable[[Any], str]) -> None:
    """Measure each call of a method that the loop calls."""
    method = getattr(kind, name)

    @wraps(method)
    def timed(self: Any) -> None:
        where = path(self)
        began_s = thread_time()
        method(self)
        _turns[where].append((thread_time() - began_s) * 1e6)

    setattr(kind, name, timed)


def main() -> None:
    """The command."""
    for name in ("_readable", "_go_on", "_timed_out", "_writable", "_planned_flush", "_resume"):
        if hasattr(Link, name):
            _time(Link, name, lambda link: link.stream.path)
    _time(Channel, "_relay_timed_out", lambda channel: channel._path)
    target = Path(sys.argv[2] + ".turns")

    def write(*_: object) -> None:
        values = {path: list(turns) for path, turns in _turns.items()}
        _turns.clear()
        new = target.with_suffix(".new")
        new.write_text(json.dumps(values))
        new.rename(target)

    signal.signal(signal.SIGUSR1, write)
    run()


if __name__ == "__main__":
    main()
