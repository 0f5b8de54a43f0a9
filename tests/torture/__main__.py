"""The command; see `tests.torture`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.rig import RigError
from tests.rig.ending import end_on_signals
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from tests.torture import planted, schedule
from tests.torture.control import CALL_TIMEOUT_S
from tests.torture.report import table
from tests.torture.run import Plan, Torture

EXIT_BROKEN = 1
EXIT_CANNOT = 3
VMS = 4
MINUTES = 5.0
EPILOG = """\
The schedule that was carried out is written to FILE (--save); when a promise was broken also beside
the logs and records, which are then kept. The faults of a replayed schedule begin when they began;
what the traffic is doing just then is chance.

exit status: 0 every promise was kept; 1 one was broken (or a planted bug was not caught); 2 wrong
arguments; 3 this machine lacks a part, or a part failed
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--minutes", type=float, default=0.0, help=f"of faults [{MINUTES:.0f}]")
    end.add_argument("--migrations", type=int, default=0, help="until so many are done")
    end.add_argument("--once", action="store_true", help="every kind of fault once")
    end.add_argument("--replay", type=Path, metavar="FILE", help="a schedule that was saved")
    end.add_argument("--planted", action="store_true", help="plant bugs: each must be caught")
    parser.add_argument("--seed", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--vms", type=int, default=VMS, help="[%(default)s]")
    parser.add_argument(
        "--call-timeout",
        type=int,
        default=CALL_TIMEOUT_S,
        metavar="S",
        help="of calls into guests [%(default)s]",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the schedule")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--keep", action="store_true", help="keep logs and records")
    keep.add_argument("--discard", action="store_true", help="keep nothing, whatever was broken")
    parser.add_argument("--only", default="", help="of --planted: those with this in their name")
    options = parser.parse_args(arguments)
    if options.vms < 1 or options.minutes < 0 or options.migrations < 0:
        parser.error("--vms is at least 1, --minutes and --migrations are not negative")
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    """What is to be done.

    Raises:
        ValueError: The schedule to be replayed is none.
    """
    if options.replay is not None:
        vms, steps = schedule.read(options.replay)
        return Plan(options.seed, vms, steps=tuple(steps), call_timeout_s=options.call_timeout)
    is_open = not options.migrations and not options.once
    minutes = options.minutes or (MINUTES if is_open else 0.0)
    return Plan(
        options.seed,
        options.vms,
        minutes,
        options.migrations,
        once=options.once,
        call_timeout_s=options.call_timeout,
    )


def torture(plan: Plan, *, save: Path | None, keep: bool | None) -> dict[str, Any]:
    """A run, in a directory of its own.

    Args:
        save: For the schedule.
        keep: The directory; None: if a promise was broken, or a part failed.
    """
    directory = Path(tempfile.mkdtemp(prefix="vc", dir="/tmp"))
    directory.chmod(0o755)
    start_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start_s:6.1f} s  {text}", flush=True)

    running = Torture(plan, directory, say)
    kept = keep is not False
    try:
        figures = running.run()
        kept = bool(figures["violations"]) if keep is None else keep
        return figures
    finally:
        saved = [directory / "schedule.json"] if kept else []
        for path in [*saved, *([save] if save is not None else [])]:
            schedule.write(path, plan.seed, plan.vms, running.found.steps)
        if kept:
            print(f"logs, records and schedule: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    """The command."""
    options = parse(sys.argv[1:])
    missing = missing_for_rabbit() or missing_for_libvirt()
    if missing:
        print(f"tests.torture: {missing}", file=sys.stderr)
        return EXIT_CANNOT
    if options.planted:
        return planted.main(options.only, keep=options.keep)
    try:
        plan = plan_of(options)
        keep = False if options.discard else options.keep or None
        figures = torture(plan, save=options.save, keep=keep)
    except (RigError, ValueError) as error:
        print(f"tests.torture: {error}", file=sys.stderr)
        return EXIT_CANNOT
    print(f"\n{table(figures)}\n")
    if options.json:
        print(json.dumps(figures))
    return EXIT_BROKEN if figures["violations"] else 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
