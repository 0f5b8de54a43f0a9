"""python -m tests.pictures: see the package."""

import argparse
import subprocess
import sys

from tests.pictures import __doc__ as about
from tests.pictures.make import CAST, ROOT, differing, write
from tests.pictures.recording import record
from tests.rig.ending import end_on_signals


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.pictures",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="make what differs")
    parser.add_argument("--record", action="store_true", help="run scripts/demo and record it")
    options = parser.parse_args()
    if options.record:
        try:
            CAST.write_text(record(["scripts/demo"], "scripts/demo", ROOT))
        except subprocess.CalledProcessError as error:
            print(error.output, error, sep="\n", file=sys.stderr)
            return 1
    names = differing()
    for name in names:
        print(name)
    if options.write or options.record:
        write()
        return 0
    return 1 if names else 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
