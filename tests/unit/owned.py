"""Who touches what: the state of a connection is its loop's thread's alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vchan.programs.connection import Connection

FIXED = frozenset({"loop", "path", "_deliver", "_changed", "__class__", "__dict__"})
"""What never changes once it is made, and so may be read from anywhere."""


@contextmanager
def touches_recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Meanwhile each look at a connection from a thread that does not run its loop is noted:
    what was looked at, and the thread."""
    strays: list[str] = []
    plain = Connection.__getattribute__

    def look(connection: Connection, name: str) -> object:
        if name not in FIXED:
            owner = _RUNNING.get(id(plain(connection, "loop")))
            here = threading.current_thread().name
            if owner not in (None, here):
                strays.append(f"{name} from {here}")
        return plain(connection, name)

    with monkeypatch.context() as patch:
        _record_runners(patch)
        patch.setattr(Connection, "__getattribute__", look)
        yield strays


_RUNNING: dict[int, str] = {}  # threads that run loops, by loop


def _record_runners(patch: pytest.MonkeyPatch) -> None:
    from vchan.io.loop import Loop

    _RUNNING.clear()
    run = Loop.run

    def recorded(loop: Loop) -> None:
        _RUNNING[id(loop)] = threading.current_thread().name
        try:
            run(loop)
        finally:
            del _RUNNING[id(loop)]

    patch.setattr(Loop, "run", recorded)
