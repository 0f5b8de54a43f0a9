"""Runs Python commands in processes that have imported already what every check needs.

    python -B tests/planted/nursery.py        # a line of JSON in for a command, one out for its end

A check takes a quarter of a second, and as long again to import pytest and what belongs to it: here
that is done once, and each command runs in a fork. Nothing of the tree under test is imported
before the fork; so the package `tests` is not, and this file is run by its path.

In: {"tree": PATH, "module": NAME, "arguments": [...], "environment": {...}, "timeout_s": NUMBER}
Out: {"status": NUMBER, "output": TEXT, "errors": TEXT}; the status is null if it was killed then,
or because nobody is there any more who could give another command.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import tempfile
from typing import IO, Any, NoReturn

IMPORTED = (
    # pytest's plugins, which it imports when it starts
    *("pytest", "_pytest.cacheprovider", "_pytest.doctest", "_pytest.faulthandler"),
    *("_pytest.junitxml", "_pytest.legacypath", "_pytest.pastebin", "_pytest.stepwise"),
    *("_pytest.threadexception", "_pytest.unittest", "_pytest.unraisableexception"),
    *("hypothesis", "hypothesis.stateful", "hypothesis.strategies"),
    # of the standard library and others', what the tree's modules have in common
    *("amqp", "argparse", "asyncio", "construct", "logging.handlers", "oslo_config.cfg"),
    *("oslo_log.log", "socketserver", "sqlite3", "ssl", "tomllib", "uuid", "xml.etree.ElementTree"),
)
"""What is not there, is imported by the check that wants it, or is missed by it."""


CRASHED = 70
"""A command's status if it raised something: 1 is pytest's, of tests that failed."""


def main() -> None:
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the forks share it
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(command: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        pid = os.fork()
        if pid == 0:
            _become(command, output, errors)
        status = _wait(pid, command["timeout_s"])
        for stream in (output, errors):
            stream.seek(0)
        return {"status": status, "output": output.read(), "errors": errors.read()}


def _wait(pid: int, timeout_s: float) -> int | None:
    """Its status, None if it was killed; what it has left behind is killed with it."""
    descriptor = os.pidfd_open(pid)
    ends = select.poll()
    ends.register(descriptor, select.POLLIN)
    ends.register(sys.stdin, 0)  # who has given the command is gone, or wants it no more
    try:
        in_time = (descriptor, select.POLLIN) in ends.poll(timeout_s * 1000)
    finally:  # also when this process is interrupted
        os.close(descriptor)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return ended if in_time else None


def _become(command: dict[str, Any], output: IO[str], errors: IO[str]) -> NoReturn:
    """In the fork: be `python -B -m module arguments`, in the tree."""
    status = CRASHED
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in enumerate((null, output.fileno(), errors.fileno())):
            os.dup2(descriptor, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir(command["tree"])
        os.environ.update(command["environment"])
        sys.path[0] = command["tree"]
        sys.argv = [command["module"], *command["arguments"]]
        try:
            runpy.run_module(command["module"], run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  (whatever it is, this process must end here)
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()  # pytest unlocks its directories
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
