"""bash's completion of vchan, held to the program's own parser."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vchan.cli import build_parser
from vchan.host.policy import KINDS

ROOT = Path(__file__).parents[2]
COMPLETION = ROOT / "packaging" / "completion"
BASH_COMPLETION = Path("/usr/share/bash-completion/bash_completion")
VCHAN = Path(sys.executable).parent / "vchan"

COMPLETE = """
. "$1"; . "$2"; . "$3"
COMP_LINE=$4; read -r -a COMP_WORDS <<<"$COMP_LINE"
[ "${COMP_LINE% }" = "$COMP_LINE" ] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_POINT=${#COMP_LINE}
function=$(complete -p "${COMP_WORDS[0]}" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function" "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""

needs_bash = pytest.mark.skipif(
    not (BASH_COMPLETION.exists() and VCHAN.exists() and shutil.which("bash")),
    reason="needs bash-completion, and vchan installed",
)


def parsers(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command's, by the words that lead to it."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from parsers(below, (*path, name))


PARSERS = dict(parsers(build_parser()))


def options(parser: argparse.ArgumentParser, *, with_value: bool = False) -> set[str]:
    return {
        word
        for action in parser._actions
        for word in action.option_strings
        if word.startswith("--") and (action.nargs != 0 or not with_value)
    }


def below(path: tuple[str, ...]) -> set[str]:
    """The words that may follow these."""
    return {each[len(path)] for each in PARSERS if each[:-1] == path and each}


def complete(line: str) -> set[str]:
    path = f"{VCHAN.parent}:{os.environ['PATH']}"
    files = (BASH_COMPLETION, COMPLETION / "vchan", COMPLETION / "daemons")
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", *map(str, files), line],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@needs_bash
@pytest.mark.parametrize("path", PARSERS, ids=" ".join)
def test_every_option_of_every_command_is_completed(path: tuple[str, ...]) -> None:
    assert complete(" ".join(("vchan", *path, "--"))) == options(PARSERS[path])


@needs_bash
@pytest.mark.parametrize("path", [path for path in PARSERS if below(path)], ids=" ".join)
def test_every_command_is_completed(path: tuple[str, ...]) -> None:
    assert complete(" ".join(("vchan", *path, ""))) == below(path)


def test_what_takes_a_value_is_skipped_with_it() -> None:
    expected = set().union(*(options(each, with_value=True) for each in PARSERS.values()))
    text = (COMPLETION / "vchan").read_text()
    at_cursor, _, in_line = text.partition("for ((i = 1")
    skipped = " ".join(re.findall(r"(.*)\) \(\(i\+\+\)\)", in_line))
    assert set(re.findall(r"--[\w-]+", skipped)) == expected
    values = at_cursor.partition("case $prev in")[2].partition("esac")[0]
    assert set(re.findall(r"--[\w-]+", values)) == expected


def test_vms_are_named_where_the_program_wants_one() -> None:
    without = {
        " ".join(path)
        for path, each in PARSERS.items()
        if path and not below(path) and "vm" not in _operands(each)
    }
    text = (COMPLETION / "vchan").read_text().rpartition("case $command in")[2]
    named = re.findall(r'^ +("[a-z ]+"|[a-z" |]+)\)', text, re.MULTILINE)
    words = {word.strip(' "') for line in named for word in line.split("|")}
    assert words - {"", "policy"} == without


def _operands(parser: argparse.ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if not action.option_strings]


@needs_bash
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vchan policy check ", set(KINDS)),
        ("vchan policy check --dir /tmp no", {"notify"}),
        ("vchan policy check --vm name=x li", {"listen"}),
        ("vchan policy check listen ", set()),
        ("vchan policy lint ", set()),
        ("vchan --timeout 3 pol", {"policy"}),
    ],
)
def test_what_the_policys_commands_take(line: str, expected: set[str]) -> None:
    assert complete(line) == expected


def test_every_daemon_is_completed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (COMPLETION / "daemons").read_text().rpartition("complete -F")[2]
    assert set(re.findall(r"vchan-\w+", text)) == set(project["scripts"]) - {"vchan"}
