"""Ctrl-C ends a command at once and quietly, whichever line it is at."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.unit.local_host import LocalHost
from tests.unit.test_cli_shapes import HEALTHY
from vchan import cli

ROOT = Path(__file__).parents[2]
PLACES = 240
LAST = 60
"""Lines at the end of a run, which is not as long as another's."""
ENDS_S = 4.0
"""Less than the 5 s that a client waits for its thread."""

# A child for each place, which is a line run by the main thread, counted from `main`'s second.
PROGRAM = f"""
import os, signal, sys, time
from vchan.cli import command

def child(stop_at, word, report):
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
                signal.raise_signal(signal.SIGINT)
        return trace
    sys.settrace(trace)
    try:
        command.main()
    except SystemExit as ended:
        sys.settrace(None)
        if not stop_at:
            os.write(report, str(lines).encode())
        os._exit(ended.code)
    finally:  # it escaped, or was swallowed
        os._exit(99)

def one(stop_at, word):
    read, write = os.pipe()
    began_s = time.monotonic()
    pid = os.fork()
    if not pid:
        child(stop_at, word, write)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = os.read(read, 1000).decode()
    os.close(read)
    return status, said, time.monotonic() - began_s

status, said, _ = one(0, sys.argv[1])
assert status == 0, status
lines = int(said)
step = max(1, lines // {PLACES})
for place in range(3, lines - {LAST}, step):
    status, said, took_s = one(place, sys.argv[1])
    if status != {cli.EXIT_INTERRUPTED} or took_s > {ENDS_S}:
        sys.stderr.write(f"line {{place}}, {{said}}: {{status}} after {{took_s:.1f}} s\\n")
sys.stderr.write("tried all\\n")
"""


def test_ctrl_c_at_any_line_ends_it_at_once() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        LocalHost(Path(name) / "host.sock") as host,
    ):
        host.status |= HEALTHY
        words = ["--socket", host.server.path, "watch", "--interval", "0.01", "--count", "3"]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    wrong = [line for line in done.stderr.splitlines() if line.startswith(("line ", "Trace"))]
    assert done.returncode == 0 and "tried" in done.stderr, done.stderr[-2000:]
    assert not wrong, "\n".join(wrong)
