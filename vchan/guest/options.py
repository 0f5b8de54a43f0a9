"""Command lines and configuration files of the guest's programs, and how these start.

Both have the same options: `--name value` or `--name=value` there, lines of `name = value` here.
Not argparse and configparser: they cost a tenth of a second of a small guest's start-up each.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from vchan import builds
from vchan.errors import ConfigError, LinkError
from vchan.guest.stderr_log import log

EXIT_OK: Final = 0
"""Ended by a signal; vchan-guest also without its port, if it was told to."""
EXIT_OUTPUT: Final = 1
"""What --help or --version says was not written."""
EXIT_CONFIG: Final = 2
"""A wrong argument or configuration value: starting again does not help."""
EXIT_SOCKET: Final = 3
"""The program's own socket cannot be made."""

_ERROR: Final = 3
"""systemd's priority."""

SWITCH: Final = "no"
"""The default of an option that is yes or no, and needs no value on a command line."""


class Given(NamedTuple):
    """An option's value, and where it was given, for who must be told that it is wrong."""

    where: str
    value: str

    def wrong(self, problem: str) -> ConfigError:
        """What to raise."""
        return ConfigError(self.where, f"{self.value!r}: {problem}")

    @property
    def is_yes(self) -> bool:
        """A SWITCH's value."""
        return self.value == "yes"

    def path(self) -> str:
        """The value, an absolute path.

        Raises:
            ConfigError: It is none.
        """
        if not self.value.startswith("/"):
            raise self.wrong("expected an absolute path")
        return self.value

    def mode(self) -> int:
        """The value, permissions.

        Raises:
            ConfigError: It is none.
        """
        try:
            mode = int(self.value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            raise self.wrong("expected an octal mode, as in 0660")
        return mode

    def words(self) -> list[str]:
        """The value, with commas between."""
        return [word for word in map(str.strip, self.value.split(",")) if word]


def read_options(
    arguments: Sequence[str], defaults: Mapping[str, str], default_file: str, program: str
) -> dict[str, Given]:
    """Every option: of the command line, else of the file, else the default.

    Args:
        defaults: All options there are. `--config FILE` comes on top of them.
        default_file: Read if it is there, and no other is named.

    Raises:
        ConfigError: Says which option, where, and what was expected.
    """
    given = _read_arguments(arguments, defaults, program)
    path = given.pop("config", None)
    values = {name: Given(name, value) for name, value in defaults.items()}
    values.update(_read_file(path or default_file, defaults, required=path is not None))
    values.update({name: Given(f"--{name}", value) for name, value in given.items()})
    for name, default in defaults.items():
        if default == SWITCH and values[name].value not in ("yes", "no"):
            raise values[name].wrong("expected yes or no")
    return values


def run_program(
    name: str,
    usage: str,
    arguments: list[str],
    start: Callable[[list[str]], Callable[[], object]],
) -> None:
    """A program from its command line to its end.

    Args:
        start: Given the arguments, makes what runs it. What is wrong with them, or with the socket,
            is logged, and the program ends.
    """
    about = usage if "--help" in arguments else f"{builds.version_line(name)}\n"
    if "--help" in arguments or "--version" in arguments:
        _tell(name, about.encode())
        return
    try:
        run = start(arguments)
    except (ConfigError, LinkError) as error:
        log(_ERROR, f"{name}: {error}")
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_SOCKET)
    run()


def _tell(name: str, text: bytes) -> None:
    """On standard output. A reader that has seen enough is no failure."""
    try:
        while text:
            text = text[os.write(1, text) :]
    except BrokenPipeError:
        pass
    except OSError as error:
        log(_ERROR, f"{name}: standard output cannot be written: {error.strerror}")
        sys.exit(EXIT_OUTPUT)


def _read_arguments(
    arguments: Sequence[str], defaults: Mapping[str, str], program: str
) -> dict[str, str]:
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in (*defaults, "config"):
            raise ConfigError("command line", f"{word!r} is no option: see {program} --help")
        if not equals and defaults.get(name) == SWITCH:
            value = "yes"
        elif not equals:
            if not rest:
                raise ConfigError("command line", f"{word} needs a value")
            value = rest.pop(0)
        given[name] = value
    return given


def _read_file(path: str, known: Mapping[str, str], *, required: bool) -> dict[str, Given]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        if required:
            raise ConfigError(path, "no such file") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, f"cannot be read: {error}") from error
    values = {}
    for number, line in enumerate(lines, 1):
        text = _without_comment(line).strip()
        if not text:
            continue
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in known:
            unknown = "" if name in known else f"{name!r} is no option; "
            expected = f"{unknown}expected OPTION = VALUE, one of {', '.join(known)}"
            raise ConfigError(f"{path}:{number}", expected)
        values[name] = Given(f"{path}:{number}: {name}", value)
    return values


def _without_comment(line: str) -> str:
    """A comment begins the line, or has a space before it: a value may hold a #."""
    at = line.find("#")
    while at > 0 and not line[at - 1].isspace():
        at = line.find("#", at + 1)
    return line if at < 0 else line[:at]
