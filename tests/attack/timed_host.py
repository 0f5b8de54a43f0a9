"""vchan-host on the test driver, with the processor time that its loop takes for each channel.

    python -m tests.attack.timed_host --config-file FILE

At SIGUSR1 it writes to FILE.times, as JSON, and begins anew:

    turns     of each channel's turn, how long it took
    waits     of each channel's turn, how long it had to wait for those of others, at most: since
              the loop last looked, if it has not slept since

in microseconds by the channel's path. Processor time, not time: what else runs on the machine does
not count.
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
from resource import RUSAGE_THREAD, getrusage
from select import epoll
from time import thread_time
from typing import Any

import tests.rig.undriven_host  # noqa: F401  # makes libvirt's test driver fit
from vchan.host.daemon import main as run
from vchan.host.vm.channel import Channel
from vchan.host.vm.mail_turns import MailTurns
from vchan.io.link import Link
from vchan.io.loop import Loop

Times = dict[str, "array[float]"]
_turns: Times = defaultdict(lambda: array("d"))
_waits: Times = defaultdict(lambda: array("d"))


class _Watch:
    """The loop's epoll. Notes since when what it has found may have been there."""

    def __init__(self, real: epoll) -> None:
        self._real = real
        self._looked_s = 0.0
        self.ready_s = 0.0

    def poll(self, *args: Any) -> list[tuple[int, int]]:
        """See epoll."""
        slept_before = getrusage(RUSAGE_THREAD).ru_nvcsw
        found = self._real.poll(*args)
        now_s = thread_time()
        has_slept = getrusage(RUSAGE_THREAD).ru_nvcsw != slept_before
        self.ready_s = now_s if has_slept else self._looked_s
        self._looked_s = now_s
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


_watches: list[_Watch] = []
"""That of the daemon's loop, of which there is one."""

_entered: set[str] = set()
"""The channel whose turn it is."""


def _time_turns(kind: type, name: str, path: Callable[[Any], str]) -> None:
    """Time each call of a method that the loop calls."""
    method = getattr(kind, name)

    @wraps(method)
    def timed(self: Any) -> None:
        where, began_s = path(self), thread_time()
        if where in _entered:  # a part of a turn
            method(self)
            return
        _entered.add(where)
        try:
            method(self)
        finally:
            _entered.remove(where)
        _turns[where].append((thread_time() - began_s) * 1e6)
        if name == "_readable":
            _waits[where].append((began_s - _watches[0].ready_s) * 1e6)

    setattr(kind, name, timed)


def main() -> None:
    """The command."""
    for name in ("_readable", "_take_turn", "_timed_out", "_writable", "uncork"):
        _time_turns(Link, name, lambda link: link.stream.path)
    _time_turns(Channel, "_timed_out", lambda channel: channel._domain.path)
    _time_turns(MailTurns, "_take_turn_in_time", lambda turns: turns._handle.args[0]._domain.path)
    make = Loop.__init__

    def make_watched(loop: Loop) -> None:
        make(loop)
        _watches.append(_Watch(loop._epoll))
        loop._epoll = _watches[-1]  # type: ignore[assignment]

    setattr(Loop, "__init__", make_watched)  # noqa: B010
    target = Path(sys.argv[2] + ".times")

    def write(*_: object) -> None:
        new = target.with_suffix(".new")
        kinds = {"turns": _turns, "waits": _waits}
        lists = {kind: {path: [*us] for path, us in kinds[kind].items()} for kind in kinds}
        new.write_text(json.dumps(lists))
        new.rename(target)
        for times in kinds.values():
            times.clear()

    signal.signal(signal.SIGUSR1, write)
    run()


if __name__ == "__main__":
    main()
