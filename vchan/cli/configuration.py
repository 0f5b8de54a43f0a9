"""The daemon's files, as they are now: those that it says it has read, and otherwise those that it
would read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

from vchan.cli.host import Host
from vchan.client import Client
from vchan.errors import VchanError

FILES_S_MAX: Final = 2.0
"""How long a daemon is asked which files it has read: one that does not answer has read those that
it would read, as far as anybody knows."""


def files_of_daemon(options: argparse.Namespace) -> Mapping[str, Any]:
    """What the daemon has read, as its status says: `config`, `config_dirs`, `policy_dir` and
    `audit_log`. Nothing if it does not answer, or does not say."""
    try:
        with Client(options.socket) as client:
            status = Host(client, options.socket, min(options.timeout, FILES_S_MAX)).ask("status")
    except VchanError:
        return {}
    files = status.get("files") if isinstance(status, dict) else None
    return files if isinstance(files, dict) else {}


def load(options: argparse.Namespace) -> Any:
    """The configuration: of --config-file, or of the files that the daemon has read, or would read.

    Raises:
        ConfigError: They cannot be read, or a value is wrong.
    """
    # Here, because most commands need nothing of the host's side.
    from vchan.host import config

    return config.load(_words(options))


def _words(options: argparse.Namespace) -> list[str]:
    if options.config_file:
        return ["--config-file", options.config_file]
    files = files_of_daemon(options)
    words = [f"--config-file={path}" for path in files.get("config", ())]
    return words + [f"--config-dir={path}" for path in files.get("config_dirs", ())]


def audit_log_path(options: argparse.Namespace) -> str:
    """Where the daemon's audit log is; "-" for standard error.

    Raises:
        ConfigError: As `load`.
    """
    if not options.config_file:
        path = files_of_daemon(options).get("audit_log")
        if path:
            return str(path)
    from vchan.host import config

    return str(load(options)[config.GROUP].audit_log)
