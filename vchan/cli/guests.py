"""facts, freeze, thaw: what a VM's own daemon tells of its guest, and does with its disks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vchan.cli.arguments import add_vm, seconds
from vchan.cli.failures import EXIT_OK
from vchan.cli.host import as_known, connected
from vchan.cli.output import (
    cell,
    flat,
    is_shaped,
    printable,
    say,
    show_record,
    text_line,
)
from vchan.rpc.messages import GUEST_TOPIC

NOTHING_REPORTED: Final = (
    "has reported nothing: the policy must allow report, option report in the guest as well, and "
    "its vchan-guest must know how"
)
LEASE_S: Final = 10.0
"""File systems stand still for so long at most, unless --lease says otherwise."""


def add_commands(commands: Any) -> None:
    """The commands of this group."""
    facts = commands.add_parser(
        "facts",
        help="what a VM's guest reports of itself",
        description="Say what a VM's guest reports of itself. It is the guest's claim.",
    )
    add_vm(facts)
    facts.set_defaults(run=_facts)
    freeze = commands.add_parser(
        "freeze",
        help="have a VM's file systems stand still, for a while",
        description="Have a VM's file systems stand still, until thawed or the lease is over.",
    )
    add_vm(freeze)
    freeze.add_argument(
        "--lease",
        type=seconds,
        default=LEASE_S,
        metavar="SECONDS",
        help=f"at most so long [{LEASE_S:g}]",
    )
    freeze.set_defaults(run=_freeze)
    thaw = commands.add_parser(
        "thaw",
        help="have them go on",
        description="Have a VM's file systems go on that were made to stand still.",
    )
    add_vm(thaw)
    thaw.set_defaults(run=_thaw)


def _facts(options: argparse.Namespace) -> int:
    with connected(options) as host:
        status = host.status_of(options.vm)
        told = host.ask("facts", vm=as_known(options.vm, status))
    if is_shaped(options):
        show_record(options, told)
    elif not told:
        say(printable(f"{options.vm} {NOTHING_REPORTED}"))
    for what, report in () if is_shaped(options) else told.items():
        for line in _facts_lines(what, report):
            text_line(line)
    return EXIT_OK


def _facts_lines(what: str, report: Mapping[str, Any]) -> Iterator[str]:
    """A report, for people: what is a list has a line for each."""
    fields = dict(report)
    yield printable(f"{what}, {fields.pop('age_s', 0):.0f} s ago")
    for name, value in flat(fields):
        title = printable(f"{name.replace('_', ' ').replace('.', ' ')}:")
        values = value if isinstance(value, list) else [value if value != {} else "none"]
        for number, each in enumerate(values or ["none"]):
            yield f"  {'' if number else title:20} {_said(each)}"


def _said(value: Any) -> str:
    """A value for people: an address as they write it, of all else that has fields each field."""
    try:
        return printable(f"{value['address']}/{value['prefix']} {value['interface']}")
    except (TypeError, KeyError):
        if not isinstance(value, dict):
            return cell(value)
    return ", ".join(
        printable(f"{name.replace('_', ' ')} {cell(each)}") for name, each in value.items()
    )


def _freeze(options: argparse.Namespace) -> int:
    told = _ask(options, "freeze", lease_s=options.lease)
    if is_shaped(options):
        show_record(options, told)
    else:
        frozen = ", ".join(told["frozen"])
        text_line(printable(f"frozen for {told['lease_s']:g} s: {frozen}"))
    return EXIT_OK


def _thaw(options: argparse.Namespace) -> int:
    told = _ask(options, "thaw")
    if is_shaped(options):
        show_record(options, told)
    else:
        text_line(printable(f"thawed: {', '.join(told['thawed']) or told['why']}"))
    return EXIT_OK


def _ask(options: argparse.Namespace, method: str, **args: Any) -> dict[str, Any]:
    """The VM's own daemon."""
    with connected(options) as host:
        server = as_known(options.vm, host.status_of(options.vm))
        told: dict[str, Any] = host.client.call(
            GUEST_TOPIC.name, method, args, server=server, timeout_s=host.left_s
        )
    return told
