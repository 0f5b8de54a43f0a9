"""What `vchan` does with its words: parses them, runs the command, explains what failed."""

from __future__ import annotations

import signal
import sys

from vchan.cli import output
from vchan.cli.failures import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    explain,
    remote_traceback,
    status_of,
)
from vchan.cli.parser import build_parser
from vchan.errors import ConfigError, RemoteError, VchanError


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status.

    Raises:
        SystemExit: As argparse ends a program: after --help, or wrong arguments.
        BrokenPipeError: Who reads standard output has seen enough.
    """
    verbose = False
    try:
        options = build_parser().parse_args(arguments)
        verbose = options.verbose
        if options.format is not None and options.is_text:
            raise ConfigError(
                f"vchan {options.command}", "prints text: it has no --format or --json"
            )
        status: int = options.run(options)
        output.flush()
    except VchanError as error:
        output.say(explain(error))
        if verbose and isinstance(error, RemoteError):
            for line in remote_traceback(error):
                output.say(f"    {line}")
        return status_of(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "vchan":
            raise
        extra = "dev" if options.command == "dev" else "host"
        text = f"{options.command} needs {error.name}: pip install 'vchan[{extra}]'"
        output.say(f"{text}, or the package vchan-host")
        return EXIT_FAILED
    return status


def main() -> None:
    """The command."""
    try:
        status = _status()
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
        output.abandon()
    except RuntimeError as error:
        # A KeyboardInterrupt between two lines of `threading.Condition` has it release what it
        # does not hold.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        status = EXIT_INTERRUPTED
        output.abandon()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left to do takes no time
    sys.exit(status)


def _status() -> int:
    output.prepare()
    try:
        status = run(sys.argv[1:])
    except BrokenPipeError:  # the reader has seen enough
        status = EXIT_OK
        output.abandon()
    except UnicodeEncodeError:
        output.say("an argument is not UTF-8")
        status = EXIT_USAGE
    except SystemExit as ended:
        status = int(ended.code or 0)
    try:
        output.flush()
    except (output.OutputFailed, BrokenPipeError):  # it was said
        output.abandon()
    return status
