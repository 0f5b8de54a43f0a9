"""The tree of commands: `build_parser` puts it together of what each group's `add_commands` adds.

A command and its arguments stand in the module of its group (`GROUPS`). Completion, the manual page
and the reference are made from the tree.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from vchan import builds
from vchan.cli import (
    about,
    audit,
    checks,
    copies,
    dev,
    forward,
    guests,
    metrics,
    output,
    programs,
    proxy,
    requests,
    vms,
    watching,
)
from vchan.cli.arguments import DEFAULTS, add_common
from vchan.cli.failures import EXIT_OK, STATUSES

GROUPS = (
    vms,
    guests,
    requests,
    forward,
    programs,
    copies,
    proxy,
    watching,
    audit,
    checks,
    metrics,
    dev,
    about,
)
"""Modules of commands, in the order in which --help has them."""

_EPILOG = f"""\
VM is a domain's name, its UUID, or the beginning of its UUID.
A VALUE that is JSON is taken as such, anything else as text; KEY:=JSON takes nothing but
JSON, and @FILE stands for a file's content.

{STATUSES}"""


class CommandParser(argparse.ArgumentParser):
    """argparse's, which names what was perhaps meant, and notices that its help was not written."""

    def __init__(self, *args: Any, **named: Any) -> None:
        named.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **named)

    def print_help(self, file: Any = None) -> None:
        """As argparse's; raises as `output.text`."""
        if file is None:
            output.text(self.format_help())
            output.flush()
        else:
            super().print_help(file)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            last: CommandParser = getattr(options, "parser", self)
            last.error(_unrecognized(unknown, last))
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(each) for each in action.choices]
            raise argparse.ArgumentError(
                action,
                f"there is no {value!r}{perhaps(str(value), names)}; there are {', '.join(names)}",
            )

    def error(self, message: str) -> NoReturn:
        """As argparse's, with the words that lead to more."""
        super().error(f"{message}\nsee: {self.prog} --help")


class _Version(argparse.Action):
    """--version, which notices that it was not written."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        output.text_line(builds.version_line("vchan"))
        output.flush()
        parser.exit(EXIT_OK)


def perhaps(name: str, known: Iterable[str]) -> str:
    """What was meant by a misspelt name, if something is near enough."""
    close = get_close_matches(name, list(known), 1)
    return f": perhaps {close[0]} is meant" if close else ""


def _unrecognized(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    known = [word for action in parser._actions for word in action.option_strings]
    first = next((word for word in words if word.startswith("-")), "")
    hint = perhaps(first.partition("=")[0], known) if first else ""
    return f"not understood: {' '.join(words)}{hint}"


def build_parser() -> CommandParser:
    """The command line.

    Beside what its arguments make, a command's options have `run`, the function that is called with
    them and returns the exit status; `parser`, the command's own; `is_text`, if its output is a
    text that has no other shape.
    """
    parser = CommandParser(
        prog="vchan",
        description="Talk to agents inside this host's virtual machines.",
        epilog=_EPILOG,
    )
    add_common(parser)
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("--version", action=_Version, nargs=0, help="say which version this is")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
        title="commands",
        parser_class=CommandParser,
    )
    for group in GROUPS:
        group.add_commands(commands)
    for path, each in walk(parser):
        if path:
            add_common(each)
            each.set_defaults(parser=each, is_text=bool(each.get_default("is_text")))
    return parser


def subcommands(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[Any] | None:
    """The commands below a command, if it is a group of such."""
    found = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return next(found, None)


def walk(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command's parser, by the words that lead to it; the whole one by no word."""
    yield path, parser
    below = subcommands(parser)
    for name, each in below.choices.items() if below is not None else ():
        yield from walk(each, (*path, name))


def commands_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The names of the commands below a command, with what each does."""
    below = subcommands(parser)
    if below is None:
        return {}
    return {str(choice.dest): str(choice.help) for choice in below._get_subactions()}
