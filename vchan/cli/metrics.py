"""metrics: the daemon's counters, for Prometheus."""

from __future__ import annotations

import argparse
from typing import Any, Final

from vchan.cli.arguments import address
from vchan.cli.failures import EXIT_OK
from vchan.cli.output import is_shaped, show_rows, text
from vchan.errors import ConfigError

COLUMNS: Final = ("name", "labels", "value")


def add_commands(commands: Any) -> None:
    """The command of this group."""
    metrics = commands.add_parser(
        "metrics",
        help="the daemon's counters, for Prometheus",
        description="Print the daemon's counters in Prometheus' text format, or serve them.",
    )
    metrics.add_argument("--host-only", action="store_true", help="the host's, none for each VM")
    metrics.add_argument(
        "--listen",
        type=address,
        metavar="ADDRESS:PORT",
        help="serve them over HTTP, until stopped, in place of printing them",
    )
    metrics.set_defaults(run=_metrics)


def _metrics(options: argparse.Namespace) -> int:
    try:
        from vchan.host.ops.metrics import DaemonCollector, as_text, serve
    except ModuleNotFoundError as error:
        raise ConfigError("metrics", f"needs {error.name}: python3-prometheus-client") from error
    collector = DaemonCollector(options.socket, options.timeout, with_vms=not options.host_only)
    if options.listen is None:
        if not is_shaped(options):
            text(as_text(collector))
        else:
            _show_samples(collector, options)
        return EXIT_OK
    if options.format is not None:
        raise ConfigError("metrics --listen", "serves Prometheus' text format: it has no --format")
    where, port = options.listen
    try:
        serve(collector, where, port)
    except OSError as error:
        raise ConfigError(f"--listen {where}:{port}", str(error)) from error
    return EXIT_OK


def _show_samples(collector: Any, options: argparse.Namespace) -> None:
    rows = [
        {"name": sample.name, "labels": dict(sample.labels), "value": sample.value}
        for family in collector.collect()
        for sample in family.samples
    ]
    show_rows(options, rows, COLUMNS)
