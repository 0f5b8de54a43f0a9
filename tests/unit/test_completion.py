"""Shells' completion of vchan, made from the program's own parser; and the daemons' own."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vchan import cli
from vchan.cli.completion import KINDS, script
from vchan.cli.parser import build_parser, commands_of, walk
from vchan.host.policy import rules

ROOT = Path(__file__).parents[2]
COMPLETION = ROOT / "packaging" / "completion"
BASH_COMPLETION = Path("/usr/share/bash-completion/bash_completion")
VCHAN = Path(sys.executable).parent / "vchan"
WAIT_S = 60.0

COMPLETE = """
. "$1"; . "$2"; . "$3"
COMP_LINE=$4; read -r -a COMP_WORDS <<<"$COMP_LINE"
[ "${COMP_LINE% }" = "$COMP_LINE" ] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_POINT=${#COMP_LINE}
function=$(complete -p "${COMP_WORDS[0]}" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function" "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
# Tells of three VMs at the daemon's usual socket, and of two others at others'.
PROGRAM = """#!/bin/sh
case "$#:$*" in
    "5:-f value -c name list") printf "web-1\\nweb-2\\ndb\\n" ;;
    "7:--socket /tmp/other -f value -c name list") printf "web-8\\nweb-9\\n" ;;
    "7:--socket /tmp/odd -f value -c name list")
        printf 'web-4\\nweb-$(touch ran)\\nweb `touch ran`\\n' ;;
    "7:--socket $HOME/other -f value -c name list") printf "web-6\\nweb-7\\n" ;;
    *) exit 1 ;;
esac
"""

needs_bash = pytest.mark.skipif(
    not (BASH_COMPLETION.exists() and VCHAN.exists() and shutil.which("bash")),
    reason="needs bash-completion, and vchan installed",
)
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
needs_fish = pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")

PARSERS = dict(walk(build_parser()))
WITH_VM = [
    path
    for path, each in PARSERS.items()
    if any(a.metavar == "VM" and not a.option_strings for a in each._actions)
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The scripts, by shell; `vms` is a directory with PROGRAM as vchan, and no more."""
    directory = tmp_path_factory.mktemp("completion")
    made = {shell: directory / f"vchan.{shell}" for shell in ("bash", "zsh", "fish")}
    for shell, file in made.items():
        file.write_text(script(shell, build_parser()))
    (directory / "bin").mkdir()
    program = directory / "bin" / "vchan"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    return {**made, "vms": program.parent}


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {word for action in parser._actions for word in action.option_strings}


def environment(scripts: dict[str, Path]) -> dict[str, str]:
    return os.environ | {"PATH": f"{scripts['vms']}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}


LINES = [
    ("vchan poli", {"policy"}),
    ("vchan policy ", {"check", "lint"}),
    ("vchan --timeout 3 pol", {"policy"}),
    ("vchan policy check ", set(KINDS)),
    ("vchan policy check --dir /tmp no", {"notify"}),
    ("vchan policy check --vm name=x li", {"listen"}),
    ("vchan completion ", {"bash", "zsh", "fish"}),
    ("vchan help poli", {"policy"}),
    ("vchan help ", set(commands_of(PARSERS[()]))),
    ("vchan list --format ", {"table", "json", "value", "csv"}),
    ("vchan log --kind no", {"notify"}),
    ("vchan log --vm we", {"web-1", "web-2"}),
    *((" ".join(("vchan", *path, "we")), {"web-1", "web-2"}) for path in WITH_VM),
    ("vchan -v call we", {"web-1", "web-2"}),
    ("vchan call -v --timeout 3 we", {"web-1", "web-2"}),
    ("vchan --timeout=3 -fjson call -v --timeout=3 we", {"web-1", "web-2"}),
    # The VMs of the daemon that the command would ask.
    ("vchan --socket /tmp/other ping we", {"web-8", "web-9"}),
    ("vchan --socket=/tmp/other -v ping we", {"web-8", "web-9"}),
    ("vchan ping --socket /tmp/other we", {"web-8", "web-9"}),
    ("vchan log --socket=/tmp/other --vm we", {"web-8", "web-9"}),
    ("vchan --socket /tmp/none ping --socket /tmp/other we", {"web-8", "web-9"}),
    ('vchan --socket "/tmp/other" ping we', {"web-8", "web-9"}),
    ("vchan --socket ~/other ping we", {"web-6", "web-7"}),
]


def hostile_lines(file: Path) -> tuple[str, ...]:
    """Lines that make a file, if anything of them is run before they are entered."""
    return (
        f"vchan --socket $(touch${{IFS}}{file}) ping we",
        f"vchan --socket (touch {file}) ping we",
        f'vchan --socket "/tmp/other;touch${{IFS}}{file}" ping we',
        f'vchan --socket="`touch${{IFS}}{file}`" ping we',
        f"vchan --socket=;touch${{IFS}}{file};: ping we",
    )


# ---------------------------------------------------------------- bash


def complete(line: str, scripts: dict[str, Path]) -> set[str]:
    files = (BASH_COMPLETION, scripts["bash"], COMPLETION / "daemons")
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", *map(str, files), line],
        env=environment(scripts),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@needs_bash
@pytest.mark.parametrize("path", PARSERS, ids=" ".join)
def test_bash_completes_every_option_of_every_command(
    path: tuple[str, ...], scripts: dict[str, Path]
) -> None:
    assert complete(" ".join(("vchan", *path, "-")), scripts) == options(PARSERS[path])


@needs_bash
@pytest.mark.parametrize(
    "path", [path for path, each in PARSERS.items() if commands_of(each)], ids=" ".join
)
def test_bash_completes_every_command(path: tuple[str, ...], scripts: dict[str, Path]) -> None:
    below = set(commands_of(PARSERS[path]))
    assert complete(" ".join(("vchan", *path, "")), scripts) == below


@needs_bash
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_bash_completes_what_arguments_take(
    line: str, expected: set[str], scripts: dict[str, Path]
) -> None:
    assert complete(line, scripts) == expected


@needs_bash
def test_bash_proposes_nothing_where_nothing_is_known(scripts: dict[str, Path]) -> None:
    for line in (
        "vchan policy check listen ",
        "vchan policy lint ",
        "vchan list ",
        "vchan call db ",
    ):
        assert complete(line, scripts) == set()


@needs_bash
def test_bash_runs_nothing_of_a_line(scripts: dict[str, Path], tmp_path: Path) -> None:
    for line in hostile_lines(tmp_path / "ran"):
        complete(line, scripts)
        assert not (tmp_path / "ran").exists(), line


@needs_bash
def test_bash_runs_nothing_of_a_name(
    scripts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Nor does it propose what would be run, or would be two words, when the line is entered.
    assert complete("vchan --socket /tmp/odd ping we", scripts) == {"web-4"}
    assert not list(tmp_path.iterdir())


@needs_bash
def test_bash_completes_files(scripts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.conf").touch()
    for option in ("--socket", "--config-file"):
        line = f"vchan doctor {option} {tmp_path}/a."
        assert complete(line, scripts) == {f"{tmp_path}/a.conf"}


# ---------------------------------------------------------------- fish


def fish(line: str, scripts: dict[str, Path]) -> set[str]:
    command = f"source {scripts['fish']}; complete -C '{line}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", command],
        env=environment(scripts),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return {found.partition("\t")[0] for found in done.stdout.splitlines()}


@needs_fish
def test_fish_completes_every_command_and_option(scripts: dict[str, Path]) -> None:
    for path, parser in PARSERS.items():
        found = fish(" ".join(("vchan", *path, "--")), scripts)
        assert found == {word for word in options(parser) if word.startswith("--")}, path
        below = set(commands_of(parser))
        if below:
            assert fish(" ".join(("vchan", *path, "")), scripts) == below


@needs_fish
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_fish_completes_what_arguments_take(
    line: str, expected: set[str], scripts: dict[str, Path]
) -> None:
    assert fish(line, scripts) == expected


@needs_fish
def test_fish_runs_nothing_of_a_line(scripts: dict[str, Path], tmp_path: Path) -> None:
    for line in hostile_lines(tmp_path / "ran"):
        fish(line, scripts)
        assert not (tmp_path / "ran").exists(), line


# ---------------------------------------------------------------- zsh


class Zsh:
    """A shell on a terminal of its own, with nothing but our completion."""

    def __init__(self, scripts: dict[str, Path]) -> None:
        self._scripts = scripts
        self._line = scripts["zsh"].parent / "line"
        pid, self._fd = pty.fork()
        if pid == 0:
            where = environment(scripts) | {"TERM": "dumb", "ZDOTDIR": "/nonexistent"}
            os.execvpe("zsh", ["zsh", "-f", "-i"], where)
        self._pid = pid

    def __enter__(self) -> Zsh:
        for line in (
            "stty -echo cols 500 rows 100; PS1=; PS2=; unsetopt zle_bracketed_paste; LISTMAX=0",
            f"autoload -U compinit; compinit -u -D; source {self._scripts['zsh']}",
            "unsetopt always_last_prompt",
            f'show() {{ BUFFER="$(<{self._line})"; CURSOR=$#BUFFER; zle list-choices; zle -R;'
            "BUFFER=; zle -I; print -r -- li''sted }; zle -N show; bindkey '^T' show",
            "print -r -- re''ady",
        ):
            os.write(self._fd, line.encode() + b"\n")
        self.read_until("ready")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        os.waitpid(self._pid, 0)

    def read_until(self, mark: str) -> str:
        text = ""
        deadline_s = time.monotonic() + WAIT_S
        while mark not in text:
            assert time.monotonic() < deadline_s, text
            if select.select([self._fd], [], [], 1)[0]:
                text += os.read(self._fd, 65536).decode(errors="replace")
        return text

    def complete(self, line: str) -> set[str]:
        """The words that are listed after a line, or that it is completed to."""
        self._line.write_text(line)
        os.write(self._fd, b"\x14")
        listed = self.read_until("listed")
        return set(re.findall(r"[\w-]+", listed))


@pytest.fixture(scope="module")
def zsh(scripts: dict[str, Path]) -> Iterator[Zsh]:
    with Zsh(scripts) as shell:
        yield shell


@needs_zsh
def test_zsh_completes_every_command_and_option(zsh: Zsh) -> None:
    for path, parser in PARSERS.items():
        words = " ".join(("vchan", *path, "-"))
        assert options(parser) - {"-h", "--help"} <= zsh.complete(words), path
        below = set(commands_of(parser))
        if below:
            assert below <= zsh.complete(" ".join(("vchan", *path, "")))


@needs_zsh
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_zsh_completes_what_arguments_take(line: str, expected: set[str], zsh: Zsh) -> None:
    if len(expected) > 1:  # one alone is not listed
        assert expected <= zsh.complete(line)


@needs_zsh
def test_zsh_runs_nothing_of_a_line(zsh: Zsh, tmp_path: Path) -> None:
    for line in hostile_lines(tmp_path / "ran"):
        zsh.complete(line)
        assert not (tmp_path / "ran").exists(), line


# ---------------------------------------------------------------- the scripts


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command_prints_them(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["completion", shell]) == cli.EXIT_OK
    assert capsys.readouterr().out == script(shell, build_parser())


def test_kinds_are_the_policys() -> None:
    assert set(KINDS) == {str(kind) for kind in rules.KINDS}


def test_every_daemon_is_completed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (COMPLETION / "daemons").read_text().rpartition("complete -F")[2]
    assert set(re.findall(r"vchan-\w+", text)) == set(project["scripts"]) - {"vchan"}
