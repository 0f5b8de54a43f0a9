"""help, version, completion: what the command says of itself."""

from __future__ import annotations

import argparse
from typing import Any, Final

from vchan import builds
from vchan.cli.failures import EXIT_OK
from vchan.cli.output import text, text_line

SHELLS: Final = ("bash", "zsh", "fish")


def add_commands(commands: Any) -> None:
    """The commands of this group."""
    told = commands.add_parser(
        "help",
        help="what a command does, and its arguments",
        description="Say what a command does, and its arguments; without one, which there are.",
    )
    told.add_argument(
        "words", nargs="*", metavar="COMMAND", help="the command, as policy check [vchan itself]"
    )
    told.set_defaults(run=_help, is_text=True)
    version = commands.add_parser(
        "version",
        help="which version this is, and which build runs",
        description="Say which version this is, and which build runs: compiled, or pure Python; "
        "and why, if there are compiled modules that do not load. Where the host's own modules are "
        "of the other build, it says so. With VCHAN_BUILD=pure in its environment a program of "
        "vchan's leaves compiled modules aside.",
    )
    version.set_defaults(run=_version, is_text=True)
    completion = commands.add_parser(
        "completion",
        help="a shell's completion of this command",
        description="Print what makes a shell complete this command's words.",
    )
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    completion.set_defaults(run=_completion, is_text=True)


def _help(options: argparse.Namespace) -> int:
    from vchan.cli.parser import build_parser

    build_parser().parse_args([*options.words, "--help"])
    raise AssertionError("--help ends the program")


def _version(_: argparse.Namespace) -> int:
    text_line(builds.version_line("vchan"))
    return EXIT_OK


def _completion(options: argparse.Namespace) -> int:
    from vchan.cli.completion import script
    from vchan.cli.parser import build_parser

    text(script(options.shell, build_parser()))
    return EXIT_OK
