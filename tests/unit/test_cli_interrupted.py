"""Ctrl-C ends a command at once and quietly, whichever line it is at.

At once: it waits for nothing. A clock would also measure what else the machine has to do. So waits
between threads have no limit here, and what would wait in vain, until its limit, does not end.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.unit.local_host import LocalHost
from tests.unit.test_cli_shapes import HEALTHY
from vchan import cli

ROOT = Path(__file__).parents[2]
PLACES = 240
LAST = 60
"""Lines at the end of a run, which is not as long as another's."""
HANGS_S = 60
"""Who has not ended so long after Ctrl-C never ends; a slow machine needs a part of a second."""
GIVEN_UP_S = 1200.0
TIMEOUT_S = 600
"""Of a question: longer than any machine takes."""

# A child for each place, which is a line run by the main thread, counted from `main`'s second.
PROGRAM = f"""
import os, signal, sys, threading
from vchan.cli import command

def wait_without_limit():
    join, wait = threading.Thread.join, threading.Condition.wait
    threading.Thread.join = lambda self, timeout=None: join(self)
    threading.Condition.wait = lambda self, timeout=None: wait(self)

def child(stop_at, report, errors):
    lines = 0
    def trace(frame, event, _):
        nonlocal lines
        name = frame.f_code.co_filename
        if event == "call":
            return trace if "vchan" in name or "threading" in name else None
        if event == "line":
            lines += 1
            if lines == stop_at:
                sys.settrace(None)
                os.write(report, f"{{name}}:{{frame.f_lineno}}".encode())
                signal.alarm({HANGS_S})
                signal.raise_signal(signal.SIGINT)
        return trace
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    wait_without_limit()
    sys.settrace(trace)
    try:
        command.main()
    except SystemExit as ended:
        sys.settrace(None)
        if not stop_at:
            os.write(report, str(lines).encode())
        os._exit(ended.code)
    except BaseException:  # it escaped
        sys.excepthook(*sys.exc_info())
    finally:  # or was swallowed
        os._exit(99)

def read_all(fd):
    with open(fd, "rb") as file:
        return file.read().decode()

def one(stop_at):
    report, reported = os.pipe()
    errors, erred = os.pipe()
    pid = os.fork()
    if not pid:
        child(stop_at, reported, erred)
    os.close(reported)
    os.close(erred)
    where, said = read_all(report), read_all(errors)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), where, said

status, lines, usual = one(0)
assert status == 0, (status, usual)
tried = 0
for place in range(3, int(lines) - {LAST}, max(1, int(lines) // {PLACES})):
    status, where, said = one(place)
    if not where and status == 0:
        continue  # it was shorter than the first: it had to wait less
    tried += 1
    if status != {cli.EXIT_INTERRUPTED} or not usual.startswith(said):
        print(f"line {{place}}, {{where}}: {{status}} {{said!r}}")
    if status == -signal.SIGALRM:
        break  # one that hangs is enough
print("tried", tried)
"""


@pytest.mark.long
def test_ctrl_c_at_any_line_ends_it_at_once() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        LocalHost(Path(name) / "host.sock") as host,
    ):
        host.status |= HEALTHY
        words = ["--socket", host.server.path, "--timeout", str(TIMEOUT_S)]
        words += ["watch", "--interval", "0.01", "--count", "3"]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=GIVEN_UP_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    found = re.search(r"^tried (\d+)$", done.stdout, re.MULTILINE)
    wrong = re.findall(r"^line .*", done.stdout, re.MULTILINE)
    assert not wrong, "\n".join(wrong)
    assert found is not None and int(found[1]) > PLACES / 2
