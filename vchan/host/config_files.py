"""What the daemons' configurations have in common: how files are read, and what is wrong in them
told."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from oslo_config import cfg
from oslo_log import log

from vchan import __version__
from vchan.errors import ConfigError
from vchan.host.audit import STDERR

PROJECT: Final = "vchan"
"""Names the files that are read when none is named: /etc/vchan/vchan.conf and others."""


def read(
    conf: Any, options: Sequence[Any], group: str, arguments: list[str] | None, program: str
) -> None:
    """Parse the command line and configuration files, and look at every option of ours now, not
    when it is first needed.

    Args:
        conf: oslo.config's.
        program: The command, by which it finds a file of its own, too: /etc/vchan/PROGRAM.conf.

    Raises:
        ConfigError: A value is wrong, or a file cannot be read.
    """
    conf.register_opts(options, group)
    log.register_options(conf)
    words = sys.argv[1:] if arguments is None else arguments
    names_file = any(word.partition("=")[0] == "--config-file" for word in words)
    try:
        conf(
            words,
            project=PROJECT,
            prog=program,
            version=f"{program} {__version__}",
            # Who names a file means that one: oslo.config would read /etc/vchan/vchan.conf.d, too.
            default_config_dirs=[] if names_file else None,
        )
    except cfg.ConfigFilesNotFoundError as error:
        raise ConfigError(", ".join(error.config_files), "no such file, or not readable") from error
    except (cfg.Error, ValueError) as error:
        raise ConfigError("configuration", _readable(error)) from error
    for option in options:
        try:
            conf[group][option.name]
        except (cfg.Error, ValueError) as error:
            raise ConfigError(f"[{group}] {option.name}", _readable(error)) from error


def _readable(error: Exception) -> str:
    """oslo.config's text, with the file where it has an object's inner life."""
    text = re.sub(r"LocationInfo\(.*?detail='([^']*)'\)", r"\1", str(error))
    return " ".join(text.split())


def check_paths(conf: Any, group: str, names: Iterable[str]) -> None:
    """They must be absolute: the daemon's working directory is nobody's choice. An audit_log may
    be STDERR.

    Raises:
        ConfigError: Says which is not.
    """
    for name in names:
        value = conf[group][name]
        if not value.startswith("/") and (name, value) != ("audit_log", STDERR):
            raise ConfigError(f"[{group}] {name}", f"{value!r} is no absolute path")
