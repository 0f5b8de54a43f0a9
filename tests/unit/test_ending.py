"""What ends programs of tests by a signal ends also what they have started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig import wait_until

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
ENDING = [signal.SIGTERM, signal.SIGHUP]

# A part as the rig starts them: in a session of its own, ended by whoever has started it.
PROGRAM = """
import contextlib, signal, subprocess, time
from tests.rig.ending import end_on_signals

@contextlib.contextmanager
def part():
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        yield process.pid
    finally:
        print("ending", flush=True)
        time.sleep(1.0 if {is_slow} else 0.0)
        process.kill()
        process.wait()

end_on_signals()
with part() as pid:
    print(pid, flush=True)
    time.sleep(1000)
"""

# A test that a signal ends while it has the part.
TEST = """
import subprocess, time
import pytest

@pytest.fixture(scope="session")
def part():
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()

def test_it(part, capsys):
    with capsys.disabled():
        print("part", part, flush=True)
    time.sleep(1000)

def test_another():
    raise AssertionError("it went on")
"""


def heed() -> None:
    """Whoever runs the tests may have been started by nohup."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed,
    )
    alarm = threading.Timer(2 * WAIT_S, process.kill)  # or who reads what it says would wait
    alarm.start()
    with process:
        try:
            yield process
        finally:
            alarm.cancel()
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def has_ended(pid: int) -> bool:
    """Also if whoever it has come to takes no note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_gone(pid: int) -> None:
    wait_until(
        lambda: has_ended(pid),
        timeout_s=WAIT_S,
        interval_s=0.02,
        failure=lambda: f"{pid} was left running",
    )


@contextmanager
def watched(pid: int) -> Iterator[None]:
    """A part, which does not outlive this test whatever happens."""
    try:
        yield
        wait_gone(pid)
    finally:
        if not has_ended(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", ENDING, ids=lambda each: each.name)
def test_a_program_ends_what_it_has_started(number: signal.Signals) -> None:
    with running("-c", PROGRAM.format(is_slow=False)) as process:
        with watched(int(line(process))):
            process.send_signal(number)
        out, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + number  # as a shell has it
    assert (out, errors) == ("ending\n", "")


def test_a_second_signal_does_not_break_off_the_way_out() -> None:
    with running("-c", PROGRAM.format(is_slow=True)) as process:
        with watched(int(line(process))):
            process.send_signal(signal.SIGHUP)
            assert line(process) == "ending"
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 128 + signal.SIGHUP


def test_what_nohup_has_a_program_ignore_it_ignores() -> None:
    program = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with running("-c", program + PROGRAM.format(is_slow=False)) as process:
        with watched(int(line(process))):
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM


def test_a_program_ends_also_what_it_is_just_starting() -> None:
    # As if the signal came between the start and the variable.
    program = """
import os, signal, subprocess, time
from tests.rig.ending import end_on_signals
end_on_signals()
print(subprocess.Popen(["sleep", "1000"], start_new_session={0}).pid, flush=True)
signal.raise_signal(signal.SIGTERM)
"""
    for is_leader in (False, True):
        with running("-c", program.format(is_leader)) as process, watched(int(line(process))):
            assert process.wait(WAIT_S) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", ENDING, ids=lambda each: each.name)
def test_a_run_of_tests_ends_what_its_fixtures_have(number: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(TEST)
    words = ("-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-n", "0", str(file))
    with running(*words) as process:
        found = None
        while found is None and (text := line(process) or process.poll() is None):
            found = re.search(r"part (\d+)", str(text))
        assert found is not None
        with watched(int(found[1])):
            process.send_signal(number)
        out, _ = process.communicate(timeout=WAIT_S)
    assert "KeyboardInterrupt" in out and "went on" not in out
    assert process.returncode == pytest.ExitCode.INTERRUPTED


RUNS = {
    "a recording": (
        "from tests.pictures.recording import record; record(['sleep', '1000'], '', '.')"
    ),
    "a torture with a bug": "from tests.torture.planted import run; run({tree!r}, '', keep=False)",
    "an input to fuzz": "from tests.fuzz import __main__ as it; it.ROOT = {tree!r}; it._worker('')",
}
"""Of a program that another runs in a tree, and waits for."""


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_program_that_another_waits_for_ends_with_it(run: str, tmp_path: Path) -> None:
    for name in ("torture/__main__.py", "fuzz/worker.py"):  # in place of the real ones
        (tmp_path / "tests" / name).parent.mkdir(parents=True)
        (tmp_path / "tests" / "__init__.py").touch()
        (tmp_path / "tests" / name).write_text("import time; time.sleep(1000)")
    program = "from tests.rig.ending import end_on_signals; end_on_signals(); "
    with running("-c", program + run.format(tree=str(tmp_path))) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(
            lambda: process.poll() is not None or bool(children.read_text()),
            timeout_s=WAIT_S,
            interval_s=0.02,
            failure=lambda: "it runs nothing",
        )
        assert process.poll() is None, process.communicate()
        with watched(int(children.read_text())):
            process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM


START_NOTHING = {"tests/docs.py", "tests/simulate/__main__.py"}
PROGRAMS = [
    path
    for path in sorted((ROOT / "tests").rglob("*.py"))
    if re.search(r"^ +(parser = .*)?\bprog=\"", path.read_text(), re.MULTILINE)
    and str(path.relative_to(ROOT)) not in START_NOTHING
]
"""Those that people start, which have a name in their help."""


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_program_ends_what_it_has_started(path: Path) -> None:
    begun = path.read_text().partition('\nif __name__ == "__main__":\n')[2]
    assert begun.startswith("    end_on_signals()\n")
