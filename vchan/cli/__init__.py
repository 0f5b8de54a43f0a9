"""vchan: the operator's command on a compute host. The only room that prints.

    command       what `vchan` does with its words: parses, runs, explains what failed
    parser        the tree of commands, put together of what the groups add
    arguments     kinds of arguments, and those that every command has
    values        KEY=VALUE, KEY:=JSON, KEY=@FILE
    output        tables, JSON, CSV and lines: what fits the terminal, and cannot steer it
    host          the daemon at its socket; which VM a word means
    configuration the files that the daemon reads, as they are now
    terminal      the operator's own, while a program in a VM has it
    way           a command's byte streams into a VM, from daemon to daemon
    failures      what is said of an error, and with which exit status

A module for each group of commands, each with `add_commands`, which `parser` calls:

    vms           list, status, attach, detach, release
    guests        facts, freeze, thaw
    requests      call, cast, ping
    forward       forward
    programs      exec, shell
    copies        cp; `progress` is the line that a terminal shows of it
    proxy         proxy: a package, for it is a process that stays
    watching      top, watch: what changes; `changes` says what that is
    audit         log
    checks        doctor, policy
    metrics       metrics
    dev           dev
    about         help; and the scripts of `completion`
"""

from __future__ import annotations

try:
    from vchan.cli.command import main, run
    from vchan.cli.failures import (
        EXIT_FAILED,
        EXIT_INTERRUPTED,
        EXIT_OK,
        EXIT_TIMEOUT,
        EXIT_UNREACHABLE,
        EXIT_USAGE,
    )
    from vchan.cli.parser import build_parser
except KeyboardInterrupt:  # the imports are most of a short command's time
    raise SystemExit(130) from None

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_TIMEOUT",
    "EXIT_UNREACHABLE",
    "EXIT_USAGE",
    "build_parser",
    "main",
    "run",
]
