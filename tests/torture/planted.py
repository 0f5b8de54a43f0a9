"""Bugs planted in a copy of vchan, each to be caught by a short run on real parts.

    python -m tests.torture --planted [--only TEXT]

Each has a schedule that leads to it, and the promise that is then broken. One that survives, is
called something else, or whose text is no longer there, is a failure: of the oracle, the traffic or
the records, for the bug is there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from tests.planted.__main__ import copy_tree
from tests.planted.bugs import Patch
from tests.torture import oracle, schedule
from tests.torture.schedule import BROKER, HOSTS, Step

ROOT: Final = Path(__file__).resolve().parents[2]
RUN_S: Final = 300.0
"""On a busy machine; guests' own calls end after 60 s."""
CALL_TIMEOUT_S: Final = 20
"""So that calls that a bug leaves unanswered end within the run."""
CAUGHT_CHARS_MAX: Final = 400
"""So much is said of how a bug was caught."""
VM: Final = "vm0"


class Planted(NamedTuple):
    """A bug.

    Attributes:
        steps: What leads to it.
        broken: Kinds of violation, of which one is told.
    """

    name: str
    patch: Patch
    steps: tuple[Step, ...]
    broken: tuple[str, ...]


def at(at_s: float, lane: str, kind: str, seconds: float = 0.0) -> Step:
    """A step at its time."""
    return Step(lane, kind, 0.0, seconds, at_s=at_s)


MEMORY_LOST: Final = (
    at(1.0, VM, "agent_stop", 3.0),
    at(3.5, HOSTS, "host_hang", 4.0),
    at(5.5, VM, "guest_daemon_kill"),
    at(5.6, VM, "agent_kill"),
)
"""What waited for the agent runs while the host's daemon hears nothing; then nobody knows of it."""

BUGS: Final = (
    Planted(
        "what has run is not remembered",
        Patch(
            "vchan/rpc/in_flight.py",
            "        record = self._over.get(request_id) or self._settled.get(request_id)\n",
            "        record = None\n",
        ),
        tuple(at(2.0 + 5 * n, HOSTS, "host_hang", 1.5) for n in range(6)),
        (oracle.TWICE,),
    ),
    Planted(
        "acknowledged before it is receipted",
        Patch(
            "vchan/host/vm/downward.py",
            "        entry.tokens = (token,)\n        self._open.add(origin.id, entry)\n",
            "        entry.tokens = (token,)\n        self._open.add(origin.id, entry)\n"
            "        if not origin.is_call:\n"
            "            self._broker.ack(token)\n            entry.tokens = ()\n",
        ),
        (at(1.0, VM, "reset"), at(3.5, HOSTS, "host_kill")),
        (oracle.LOST,),
    ),
    Planted(
        "each call is given the answer to the one before",
        Patch(
            "vchan/host/vm/downward.py",
            "        origin, gate = entry.origin, self._gate\n",
            "        body, Downward.before = getattr(Downward, 'before', body), body\n"
            "        origin, gate = entry.origin, self._gate\n",
        ),
        (at(3.0, VM, "migrate"),),
        (oracle.WRONG_ANSWER,),
    ),
    Planted(
        "a new session repeats nothing",
        Patch(
            "vchan/rpc/in_flight.py",
            "        self._holds = False\n        for item in self._open.values():\n",
            "        self._holds = False\n        for item in ():\n",
        ),
        tuple(at(1.0 + 6 * n, VM, "guest_daemon_hang", 3.0) for n in range(3)),
        (oracle.LOST,),
    ),
    Planted(
        "each message goes on a stream of its own",
        Patch(
            "vchan/rpc/in_flight.py",
            "self.stream = request.stream",
            "self.stream = reply_stream(request.id)",
        ),
        (at(1.0, VM, "suspend", 4.0), at(8.0, VM, "suspend", 4.0), at(14.0, VM, "suspend", 4.0)),
        (oracle.REORDERED,),
    ),
    Planted(
        "put back in reverse",
        Patch(
            "vchan/rpc/dispatcher.py",
            "extendleft(reversed(requests))",
            "extendleft(requests)",
        ),
        tuple(at(1.0 + 6 * n, VM, "agent_hang", 3.0) for n in range(3)),
        (oracle.REORDERED,),
    ),
    Planted(
        "a guest's cast is receipted before the broker has it",
        Patch(
            "vchan/host/vm/upward.py",
            "        self._broker.publish_request(self.vm, request.id, made)\n",
            "        self._broker.publish_request(self.vm, request.id, made)\n"
            "        if not request.is_call:\n"
            "            self._forget(request.id)\n"
            "            self._responder.take(request.id, now_s)\n",
        ),
        (at(1.0, BROKER, "broker_kill"), at(3.0, HOSTS, "host_kill")),
        (oracle.LOST,),
    ),
    Planted(
        "a cast that may have run does not say so",
        Patch(
            "vchan/guest/router.py",
            "return request.changed(body=mark_redelivered(request.body, is_raw=is_raw))",
            "return request",
        ),
        MEMORY_LOST,
        (oracle.CAST_UNMARKED,),
    ),
    Planted(
        "a call that may have run is run again",
        Patch(
            "vchan/guest/router.py",
            "        if request.is_call:\n            return None\n",
            "",
        ),
        MEMORY_LOST,
        (oracle.CALL_TWICE,),
    ),
    Planted(
        "services are told again by each host what another has told",
        Patch("vchan/host/vm/reports.py", 'args.get("known") is True or what', "what"),
        tuple(at(4.0 + 5 * n, VM, "migrate") for n in range(6)),
        (oracle.UNMARKED,),
    ),
    Planted(
        "a paused VM's connection is cut",
        Patch(
            "vchan/host/vm/channel.py",
            " is Phase.SERVING and not self._domain.is_paused\n",
            " is Phase.SERVING\n",
        ),
        # More than one: a cure that the boot needed puts the next one off.
        tuple(at(at_s, VM, "suspend", 12.0) for at_s in (2.0, 20.0, 45.0)),
        (oracle.CUT_WHILE_PAUSED,),
    ),
)


def check(bug: Planted, tree: Path, *, keep: bool) -> tuple[bool, str]:
    """Plant it in `tree`, run its schedule, take it out; whether it was caught, and how."""
    file = tree / bug.patch.file
    before = file.read_text()
    if before.count(bug.patch.old) != 1:
        return False, f"its text is not in {bug.patch.file}: update the patch"
    path = tree / "schedule.json"
    schedule.write(path, 1, 1, bug.steps)
    file.write_text(before.replace(bug.patch.old, bug.patch.new))
    try:
        done = run(tree, path, keep=keep)
    finally:
        file.write_text(before)
    found = [line for line in done.splitlines() if " BROKEN: " in line]
    for line in found:
        if any(f"BROKEN: {kind}: " in line for kind in bug.broken):
            return True, line.partition("BROKEN: ")[2][:CAUGHT_CHARS_MAX]
    return False, f"saw {found[:3]}:\n{done}"


def run(tree: Path, path: Path, *, keep: bool) -> str:
    """The torture in `tree`, by its schedule; what it printed. One that does not end is ended."""
    command = [sys.executable, "-B", "-m", "tests.torture", "--replay", str(path)]
    command += ["--keep" if keep else "--discard", "--call-timeout", str(CALL_TIMEOUT_S)]
    running = subprocess.Popen(
        command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        return running.communicate(timeout=RUN_S)[0]
    except subprocess.TimeoutExpired:
        running.terminate()  # it stops its parts
        return running.communicate()[0] + f"\ndid not end in {RUN_S:.0f} s\n"
    except BaseException:  # a signal: this run is not the only one to be ended by it
        running.terminate()
        running.communicate()
        raise


def main(only: str, *, keep: bool) -> int:
    """Print a table; 1 if a bug survives.

    Args:
        only: Those that have this in their name.
        keep: The runs' logs and records.
    """
    survived = 0
    with tempfile.TemporaryDirectory(prefix="vchan-planted-") as name:
        tree = Path(name)
        copy_tree(tree)
        for bug in BUGS:
            if only not in bug.name:
                continue
            began_s = time.monotonic()
            caught, how = check(bug, tree, keep=keep)
            survived += not caught
            verdict = "caught  " if caught else "SURVIVED"
            took_s = time.monotonic() - began_s
            print(f"{verdict} {took_s:5.1f} s  {bug.name}: {how}", flush=True)
    print(f"{survived} survived" if survived else "none survived")
    return 1 if survived else 0
