"""What the daemons' configurations have in common: how files are read, and how errors in them are
reported.

Rules of this file
1. Every refusal names the file, the option and what to do. Its text is made here: the errors of
   oslo.config, oslo.log and their helpers may hold the value, and a value may be a secret.
2. A value is shown if its option is known and is no secret. A line that cannot be read is not
   shown: nobody knows what it holds.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, NamedTuple

from oslo_config import cfg, types
from oslo_log import handlers, log

from vchan import builds
from vchan.errors import ConfigError
from vchan.host.help_text import tell
from vchan.host.policy.audit_log import STDERR

PROJECT: Final = "vchan"
"""Names the files that are read when none is named: /etc/vchan/vchan.conf and others."""
DEFAULT: Final = "DEFAULT"
UNKNOWN_MAX: Final = 20
"""Misspelt names that are told one by one: a file may be another program's altogether. At
it: the others are counted."""
VALUE_CHARS_MAX: Final = 100
"""Of a value or a name that a message quotes."""
DOLLAR: Final = (
    "a $ in a value stands for another option's value, and there is none of that name, or it "
    "stands for itself in the end: write $$ for the character $"
)
STANDS_FOR_OTHER: Final = (
    "what stands there stands for another option's value, and that is none that this option takes: "
    "write the value itself"
)
"""What a $ stands for is not shown: it may be a secret."""

_REFERENCE: Final = re.compile(r"\$(?:\{[_a-z]|[_a-z])", re.IGNORECASE)
_WORD: Final = re.compile(rf"\S{{{2 * VALUE_CHARS_MAX},}}")

_OSLOS_OWN: Final = {"config_file", "config_dir", "config_source"}
"""Options that oslo.config has itself."""


class Setting(NamedTuple):
    """An option as it stands in a file."""

    path: Path
    section: str
    name: str
    value: str


class ConfigFiles:
    """The configuration files as they stand, in the order in which they count.

    Raises:
        ConfigError: One cannot be read: which, and at which line.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.settings: list[Setting] = []
        self.sections: list[tuple[Path, str]] = []
        for path in paths:
            for section, names in _parse(path).items():
                self.sections.append((path, section))
                for name, values in names.items():
                    dest = name.replace("-", "_")
                    if any("\0" in value for value in values):
                        where = f"{path}: [{section}] {dest}"
                        raise ConfigError(where, "holds a NUL character: remove it")
                    self.settings.append(Setting(path, section, dest, "\n".join(values[-1:])))

    def find(self, section: str, names: Iterable[str]) -> Setting | None:
        """The one that counts: the last."""
        wanted = {name.replace("-", "_") for name in names}
        for setting in reversed(self.settings):
            if setting.section.lower() == section.lower() and setting.name in wanted:
                return setting
        return None


def _parse(path: Path) -> dict[str, dict[str, list[str]]]:
    sections: dict[str, dict[str, list[str]]] = {}
    try:
        cfg.ConfigParser(str(path), sections).parse()
    except OSError as error:
        problem = f"{error.strerror}: expected a file that this user may read"
        raise ConfigError(str(path), problem) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}", "is not UTF-8: save the file as that") from None
    except cfg.ParseError as error:  # it has the line, and that may hold a password
        raise ConfigError(
            f"{path}:{error.lineno}",
            f"{_PARSE_ERRORS.get(error.msg, 'not readable')}; expected [SECTION] or OPTION = VALUE",
        ) from None
    except ValueError:
        raise ConfigError(str(path), "cannot be read as a configuration file") from None
    return sections


_PARSE_ERRORS: Final = {
    "Unexpected continuation line": "the line begins with a space, and continues nothing",
    "Invalid section (must end with ])": "a section's name must end with ]",
    "Empty section name": "a section without a name",
    "No ':' or '=' found in assignment": "neither = nor : stands in it",
    "Key cannot be empty": "a value without an option",
    "Section must be started before assignment": "an option before the first [SECTION]",
}


def read(
    conf: Any, options: Sequence[Any], group: str, arguments: list[str] | None, program: str
) -> None:
    """Parse the command line and configuration files, and look at every option of ours and of
    oslo.log's now, not when it is first needed.

    Args:
        conf: oslo.config's.
        program: The command, by which it finds a file of its own, too: /etc/vchan/PROGRAM.conf.

    Raises:
        ConfigError: A value is wrong, or a file cannot be read.
        SystemExit: As argparse ends a program: 0 after --help, 2 after a wrong argument.
    """
    conf.register_opts(options, group)
    log.register_options(conf)
    words = sys.argv[1:] if arguments is None else arguments
    names_file = any(word.partition("=")[0] == "--config-file" for word in words)
    files = ConfigFiles(_named_files(words, program, names_file=names_file))
    known = [(group, option) for option in options]
    known += [(section or DEFAULT, option) for section, group in log_options() for option in group]
    check_types(files, known)
    said, told = io.StringIO(), io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(told):
            conf(
                words,
                project=PROJECT,
                prog=program,
                version=builds.version_line(program),
                # Who names a file means that one: oslo.config would read vchan.conf.d, too.
                default_config_dirs=[] if names_file else None,
            )
    except SystemExit as ended:
        if ended.code not in (0, None, 2):
            raise ConfigError("the command line or a file", "a value of another kind") from ended
        sys.stderr.write(said.getvalue())
        if ended.code in (0, None):
            tell(program, told.getvalue())
        raise
    except (cfg.Error, ValueError, OSError, RecursionError) as error:
        raise _refusal(error, files) from None
    for section, option in known:
        if section != DEFAULT or option.dest in conf:  # oslo.log registers not all that it lists
            value(conf, section, option, files)


def _named_files(words: Sequence[str], program: str, *, names_file: bool) -> list[Path]:
    """The files that oslo.config is about to read, in its order."""
    paths: list[Path] = []
    directories: list[Path] = []
    for word, following in zip(words, (*words[1:], ""), strict=bool(words)):
        name, equals, given = word.partition("=")
        if name in ("--config-file", "--config-dir") and (given if equals else following):
            path = Path(given if equals else following).expanduser()
            (paths if name == "--config-file" else directories).append(path)
    if not names_file:
        paths = [Path(path) for path in cfg.find_config_files(PROJECT, program)]
        directories = directories or [Path(p) for p in cfg.find_config_dirs(PROJECT, program)]
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(str(directory), "no such directory: see --config-dir")
    for path in paths:
        if not path.exists():
            raise ConfigError(str(path), "no such file, or not readable: see --config-file")
    return [*paths, *(path for each in directories for path in sorted(each.glob("*.conf")))]


def files_of(conf: Any) -> ConfigFiles:
    """The files that a configuration was read from."""
    directories = [Path(each) for each in conf.config_dir or ()]
    snippets = [path for each in directories for path in sorted(each.glob("*.conf"))]
    return ConfigFiles([*(Path(each) for each in conf.config_file or ()), *snippets])


# ---------------------------------------------------------------- values


def value(conf: Any, section: str, option: Any, files: ConfigFiles | None = None) -> Any:
    """An option's value.

    Raises:
        ConfigError: It is none that the option takes.
    """
    try:
        return conf[option.dest] if section == DEFAULT else conf[section][option.dest]
    except (cfg.Error, ValueError, RecursionError) as error:
        setting = files.find(section, _names(option)) if files is not None else None
        stands_for = "$" in setting.value.replace("$$", "") if setting is not None else False
        if stands_for or isinstance(error, _DOLLAR_ERRORS):
            problem = DOLLAR
        else:
            problem = f"is not {expected(option)}"
        file = f"{setting.path}: " if setting is not None else ""
        raise ConfigError(f"{file}[{section}] {option.dest}", problem) from None


def check_types(files: ConfigFiles, known: Iterable[tuple[str, Any]]) -> None:
    """Look whether options can be what stands in the files, as far as that does not stand for
    others.

    Raises:
        ConfigError: One cannot.
    """
    for section, option in known:
        setting = files.find(section, _names(option))
        if setting is None or _stands_for_other(setting):
            continue
        check_type(option, setting.value, f"{setting.path}: [{section}] {option.dest}")


def check_type(option: Any, text: str, where: str) -> Any:
    """An option's value that is written so.

    Raises:
        ConfigError: The option takes no such value.
    """
    try:
        return option.type(text)
    except (ValueError, TypeError):
        shown = "the value" if option.secret else repr(text[:VALUE_CHARS_MAX])
        raise ConfigError(where, f"{shown} is not {expected(option)}") from None


def expected(option: Any) -> str:
    """What an option takes, for people."""
    kind = option.type
    if isinstance(kind, types.Integer | types.Float):
        name = "a whole number" if isinstance(kind, types.Integer) else "a number"
        low, high = kind.min, kind.max
        if low is not None and high is not None:
            return f"{name} from {low} to {high}"
        if low is not None:
            return f"{name} from {low} on"
        return f"{name} up to {high}" if high is not None else name
    if isinstance(kind, types.Boolean):
        return "true or false"
    choices = getattr(kind, "choices", None)
    if choices:
        return f"one of {', '.join(str(choice) for choice in choices if choice)}"
    return f"what this option takes ({type(kind).__name__})"


_DOLLAR_ERRORS: Final = (cfg.TemplateSubstitutionError, cfg.NoSuchOptError, RecursionError)
"""The last is oslo.config's when an option stands for itself, or for one that stands for it."""


def _stands_for_other(setting: Setting) -> bool:
    return _REFERENCE.search(setting.value.replace("$$", "")) is not None


def _names(option: Any) -> list[str]:
    """All that an option may be called in a file."""
    old = [each.name for each in option.deprecated_opts if each.name]
    return [option.dest, option.name, *old]


def _refusal(error: Exception, files: ConfigFiles) -> ConfigError:
    """What oslo.config refuses, and `ConfigFiles` and `check_types` did not."""
    if isinstance(error, _DOLLAR_ERRORS):
        for setting in files.settings:
            if "$" in setting.value.replace("$$", ""):
                return ConfigError(f"{setting.path}: [{setting.section}] {setting.name}", DOLLAR)
        return ConfigError("the command line", DOLLAR)
    if isinstance(error, cfg.ConfigFilesNotFoundError | cfg.ConfigFilesPermissionDeniedError):
        return ConfigError(", ".join(error.config_files), "no such file, or not readable")
    if isinstance(error, OSError):
        return ConfigError(str(error.filename), f"{error.strerror}: expected a file")
    where = ", ".join(sorted({str(path) for path, _ in files.sections})) or "the command line"
    return ConfigError(where, f"oslo.config cannot use it ({type(error).__name__})")


def located(error: ConfigError, conf: Any) -> ConfigError:
    """The same, with the file that has the option, if one has; on one line that a terminal can
    show."""
    found = _located(error, conf)
    return ConfigError(_tidy(found.where), _tidy(found.problem))


def _tidy(text: str) -> str:
    """Without control characters and very long words, which a value may have."""
    plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return _WORD.sub(lambda word: f"{word[0][:VALUE_CHARS_MAX]}...", plain)


def _located(error: ConfigError, conf: Any) -> ConfigError:
    match = re.match(r"(?:\[(\w+)\] )?([a-z]\w*)", error.where)
    if match is None or conf is None:
        return error
    try:
        setting = files_of(conf).find(match[1] or DEFAULT, [match[2]])
    except ConfigError:
        return error
    if setting is None:
        return error
    where = error.where if match[1] else f"[{DEFAULT}] {error.where}"
    hides = _stands_for_other(setting) and error.problem != DOLLAR
    problem = STANDS_FOR_OTHER if hides else error.problem
    return ConfigError(f"{setting.path}: {where}", problem)


# ---------------------------------------------------------------- names


def unknown_names(
    files: ConfigFiles, known: Mapping[str, Iterable[Any]], others: Iterable[str] = ()
) -> Iterator[str]:
    """Sections and options that are none of anybody's: misspelt ones, perhaps. oslo.config takes no
    notice of such.

    Args:
        known: The options of each section.
        others: Sections of other programs, which may stand in the same file.
    """
    names = {
        section.lower(): {name.replace("-", "_") for option in options for name in _names(option)}
        for section, options in known.items()
    }
    foreign = {section.lower() for section in others}
    names.setdefault(DEFAULT.lower(), set()).update(_OSLOS_OWN)
    for path, section in files.sections:
        if section.lower() not in names and section.lower() not in foreign:
            hint = _hint(section, [*known, *others], "[{}]")
            yield f"{path}: [{section}] is no section{hint}"
    for path, section, name, _ in files.settings:
        options = names.get(section.lower())
        if options is not None and name not in options:
            hint = _hint(name, options, "{}") or _elsewhere(name, names)
            yield f"{path}: [{section}] {name[:VALUE_CHARS_MAX]} is no option{hint}"


def _hint(name: str, known: Iterable[str], form: str) -> str:
    close = get_close_matches(name, list(known), 1)
    return f": perhaps {form.format(close[0])} is meant" if close else ""


def _elsewhere(name: str, names: Mapping[str, set[str]]) -> str:
    sections = [section for section, options in names.items() if name in options]
    shown = [DEFAULT if section == DEFAULT.lower() else section for section in sections]
    return f": it belongs in [{shown[0]}]" if shown else ""


def bounded(lines: Iterable[str]) -> list[str]:
    """The first UNKNOWN_MAX, and how many more."""
    every = list(lines)
    if len(every) <= UNKNOWN_MAX:
        return every
    return [*every[:UNKNOWN_MAX], f"and {len(every) - UNKNOWN_MAX} more such names"]


# ---------------------------------------------------------------- the rest


def log_options() -> list[tuple[str | None, list[Any]]]:
    """oslo.log's, by section."""
    (found,) = entry_points(group="oslo.config.opts", name="oslo.log")
    return list(found.load()())


def set_up_log(conf: Any, program: str) -> None:
    """Begin to log as the options say.

    Raises:
        ConfigError: That cannot be.
    """
    try:
        log.setup(conf, program)
    except log.LogConfigError:
        problem = "expected a file with a configuration for Python's logging"
        where = f"[{DEFAULT}] log_config_append"
        raise ConfigError(where, f"{conf.log_config_append}: {problem}") from None
    except OSError as error:
        where = f"[{DEFAULT}] {'log_file' if conf.log_file else 'log_dir'}"
        problem = f"{error.filename}: {error.strerror}: expected a place that this user may write"
        raise ConfigError(where, problem) from None
    except (cfg.Error, ValueError, TypeError, LookupError) as error:
        where = f"the options of oslo.log in [{DEFAULT}]"
        raise ConfigError(where, f"cannot be used together ({type(error).__name__})") from None
    _remove_colours(conf)


def _remove_colours(conf: Any) -> None:
    """Before oslo.log had an option for colours it ended each line with the escape code that ends a
    colour, in the journal, too. Who has written a colour into a format keeps it."""
    formats = (conf.logging_context_format_string, conf.logging_default_format_string)
    if "log_color" in conf or any("%(color)s" in each for each in formats):
        return
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, handlers.ColorHandler):
            plain = logging.StreamHandler(handler.stream)
            plain.setFormatter(handler.formatter)
            plain.setLevel(handler.level)
            for each in handler.filters:
                plain.addFilter(each)
            root.removeHandler(handler)
            root.addHandler(plain)


def check_paths(conf: Any, group: str, names: Iterable[str]) -> None:
    """They must be absolute: the daemon's working directory is nobody's choice. An audit_log may
    be STDERR.

    Raises:
        ConfigError: Says which is not.
    """
    for name in names:
        value = conf[group][name]
        if "\0" in value:
            raise ConfigError(f"[{group}] {name}", "holds a NUL character: no path does")
        if not value.startswith("/") and (name, value) != ("audit_log", STDERR):
            raise ConfigError(f"[{group}] {name}", f"{value!r} is no absolute path")
