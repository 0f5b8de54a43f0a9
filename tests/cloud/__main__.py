"""The command; see `tests.cloud`."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tests.cloud import agent_image
from tests.cloud.install import install, missing
from tests.cloud.run import Run
from tests.cloud.stage import Cloud
from tests.cloud.verdict import table
from tests.rig import RigError
from tests.rig.ending import end_on_signals

EXIT_BROKEN: Final = 1
EXIT_CANNOT: Final = 3
INSIDE: Final = "--inside"
SIOCSIFFLAGS: Final = 0x8914
IFF_UP_AND_RUNNING: Final = 0x1 | 0x40
ENTER: Final = (
    *("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
    # This shell stays: it is the process that orphans come to, and it takes note of their ends.
    # /run is new: nothing is left in this machine's own.
    *("bash", "-c", 'mount -t tmpfs -o mode=755 run /run && "$@"; exit $?', "cloud"),
)
EPILOG: Final = """\
Seconds: nova, until it says that the operation is done; first, from then to the answer of a call
that was sent later; silence, the longest time without any answer. A call and a cast are sent each
half second. What ran is what the guest says on its console.

exit status: 0 nothing was lost or run twice, and no server needed a hand; 1 otherwise; 2 wrong
arguments; 3 this machine lacks a part, or a part failed
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/cloud",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--short", action="store_true", help="create, hard reboot, live migration, delete alone"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORD",
        help="of the operations those with this in their name; may be given more than once",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    parser.add_argument(INSIDE, nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class Progress:
    """Says how far it is."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()

    def __call__(self, text: str) -> None:
        """A line."""
        print(f"{time.monotonic() - self._start_s:6.1f} s  {text}", file=sys.stderr, flush=True)


def outside(options: argparse.Namespace, arguments: list[str]) -> int:
    """Get what comes from the network, and go on in namespaces."""
    say = Progress()
    lacking = missing()
    if lacking:
        raise RigError(lacking)
    say("OpenStack's packages (a minute, once)")
    kept = install()
    say("the servers' image: kernel, CPython, vchan")
    agent_image.build()
    directory = Path(tempfile.mkdtemp(prefix="vc", dir="/tmp"))
    directory.chmod(0o755)
    inner = [sys.executable, "-m", "tests.cloud", *arguments, INSIDE, str(directory), str(kept)]
    try:
        with subprocess.Popen([*ENTER, *inner]) as process:
            try:
                return process.wait()
            finally:
                process.kill()
    finally:
        if options.keep:
            print(f"logs: {directory / 'log'}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)


def inside(options: argparse.Namespace) -> int:
    """Everything else, in a network and among processes of our own."""
    directory, kept = options.inside
    _loopback_up()
    say = Progress()
    with Cloud(directory, kept, say) as cloud:
        say("the cloud is up")
        rows = Run(cloud, say, short=options.short, only=options.only).run()
        say("done; ending the cloud")
    is_well = all(row.is_well for row in rows)
    print(f"\n{table(rows)}\n")
    if options.json:
        figures: dict[str, Any] = {"well": is_well, "rows": [dataclasses.asdict(r) for r in rows]}
        print(json.dumps(figures))
    return 0 if is_well else EXIT_BROKEN


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", IFF_UP_AND_RUNNING)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


def main() -> int:
    """The command."""
    arguments = sys.argv[1:]
    options = parse(arguments)
    try:
        return inside(options) if options.inside else outside(options, arguments)
    except RigError as error:
        print(f"scripts/cloud: {error}", file=sys.stderr)
        return EXIT_CANNOT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    end_on_signals()
    status = main()
    sys.stdout.flush()
    os._exit(status)  # oslo.messaging's threads would hold it up
