"""doctor, policy: what is wrong, and what the policy says."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vchan import __version__
from vchan.cli import configuration
from vchan.cli.arguments import VM, add_config_file, add_vm
from vchan.cli.failures import EXIT_FAILED, EXIT_OK, advice_of
from vchan.cli.host import Host, connected, is_gone
from vchan.cli.output import is_shaped, printable, say, show_record, show_rows, text_line
from vchan.cli.values import pairs
from vchan.errors import ConfigError, LinkError, RemoteError
from vchan.programs.requests import EXCHANGE
from vchan.rpc.reports import WHAT as REPORTS

if TYPE_CHECKING:
    from vchan.host.ops.doctor import Finding
    from vchan.host.policy.rules import Policy, Step

FINDING_COLUMNS: Final = ("level", "where", "text", "remedy")
LINT_COLUMNS: Final = ("where", "code", "text")


def add_commands(commands: Any) -> None:
    """The commands of this group."""
    doctor = commands.add_parser(
        "doctor",
        help="what is wrong, and what to do about it",
        description="Look at the daemon's files, the daemon and its VMs; or at one VM alone.",
    )
    add_vm(doctor, nargs="?", what=f"{VM} [all of them, and the daemon]")
    add_config_file(doctor)
    doctor.set_defaults(run=_doctor)
    policy = commands.add_parser(
        "policy",
        help="check the policy's files, whether the daemon runs or not",
        description="Read the policy's files as they are now, whether the daemon runs or not.",
    )
    actions = policy.add_subparsers(
        dest="action", required=True, metavar="ACTION", title="commands", parser_class=type(policy)
    )
    check = actions.add_parser(
        "check",
        help="parse it; or say which rule decides a request",
        description="Parse the policy; or, if a request is named, say which rule decides it.",
    )
    lint = actions.add_parser(
        "lint", help="what is suspicious about it", description="Say what is suspicious about it."
    )
    for action in (check, lint):
        action.add_argument("--dir", help="of these files alone, not as vchan.conf has it")
        add_config_file(action)
    check.add_argument(
        "--vm",
        default="",
        metavar="KEY=VALUE,...",
        help="who asks: uuid, name, project, user, flavor, image, extra-spec:NAME, property:NAME",
    )
    check.add_argument(
        "kind",
        nargs="?",
        metavar="KIND",
        help="what is asked for: listen, reply, cast, fanout, call, notify, http, "
        "report or forward",
    )
    check.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help=f"of whom: TOPIC (of exchange {EXCHANGE}), or EXCHANGE/TOPIC; of http: the service; "
        f"of report: {', '.join(REPORTS)}; of forward: tcp:PORT, unix:/PATH or service:NAME",
    )
    check.add_argument(
        "details", nargs="*", metavar="KEY=VALUE", help="more of it: server, namespace, method"
    )
    check.set_defaults(run=partial(_policy, _check))
    lint.set_defaults(run=partial(_policy, _lint))


# ---------------------------------------------------------------- doctor


def _doctor(options: argparse.Namespace) -> int:
    from vchan.host.ops.doctor import Level, summarize

    findings = list(_examine_all(options) if options.vm is None else _examine_vm(options))
    if is_shaped(options):
        rows = [{**finding._asdict(), "level": finding.level.value} for finding in findings]
        show_rows(options, rows, FINDING_COLUMNS)
    else:
        for level, where, text, remedy in findings:
            text_line(f"{level.value:8} {printable(where)}: {printable(text)}")
            if remedy:
                text_line(f"{'':8} -> {printable(remedy)}")
        text_line(summarize(findings))
    return EXIT_FAILED if any(each.level is Level.PROBLEM for each in findings) else EXIT_OK


def _examine_all(options: argparse.Namespace) -> Iterator[Finding]:
    from vchan.host.ops.doctor import examine_daemon, examine_rows

    yield from _examine_files(options)
    try:
        with connected(options) as host:
            yield from examine_daemon(host.ask("status"), __version__)
            rows = host.ask("list")
            yield from examine_rows(rows)
            for row in rows:
                host.renew(options.timeout)
                yield from _examine_row(host, row, is_all=True)
    except LinkError as error:
        yield _unreachable(error)


def _examine_vm(options: argparse.Namespace) -> Iterator[Finding]:
    """One VM; and of the daemon what is wrong, which is its trouble too."""
    from vchan.host.ops.doctor import Level, examine_daemon, examine_rows

    try:
        with connected(options) as host:
            uuid = host.uuid_of(options.vm)
            findings = examine_daemon(host.ask("status"), __version__)
            yield from (each for each in findings if each.level is not Level.OK)
            for row in host.ask("list"):
                if row["uuid"] == uuid:
                    yield from examine_rows([row])
                    yield from _examine_row(host, row, is_all=False)
    except LinkError as error:
        yield _unreachable(error)


def _examine_row(host: Host, row: dict[str, Any], *, is_all: bool) -> Iterator[Finding]:
    from vchan.host.ops.doctor import Finding, Level, examine_vm, works

    try:
        detail = host.ask("status", vm=row["uuid"])
    except RemoteError as error:
        if not is_gone(error):  # else it is no more, since the list was made
            yield Finding(Level.PROBLEM, row["name"], str(error), "journalctl -u vchan-host")
        return
    findings = examine_vm(row, detail)
    yield from findings
    if not findings and not is_all:
        yield works(row, detail)


def _unreachable(error: LinkError) -> Finding:
    from vchan.host.ops.doctor import Finding, Level

    return Finding(Level.PROBLEM, "vchan-host", str(error), advice_of(error))


def _examine_files(options: argparse.Namespace) -> Iterator[Finding]:
    """The files as they are now: the daemon may have read others' content."""
    from vchan.host.ops.doctor import Finding, Level

    try:
        from vchan.host import config
        from vchan.host.policy.lint import lint
    except ModuleNotFoundError as error:
        text = f"not looked at: {error.name} is not installed"
        yield Finding(Level.WARNING, "files", text, "pip install 'vchan[host]'")
        return
    try:
        conf = configuration.load(options)
        unknown = config.unknown_options(conf)
        findings = lint(config.policy(conf))
    except ConfigError as error:
        yield Finding(Level.PROBLEM, error.where, error.problem)
        return
    directory = conf[config.GROUP].policy_dir
    for text in unknown:
        yield Finding(Level.WARNING, "vchan.conf", text)
    for where, code, text in findings:
        yield Finding(Level.WARNING, where or directory, f"{code}: {text}")
    if not unknown and not findings:
        files = ", ".join([*(conf.config_file or ()), directory])
        yield Finding(Level.OK, "files", f"{files}: nothing suspicious")


# ---------------------------------------------------------------- policy


def _policy(what: Any, options: argparse.Namespace) -> int:
    """Read it, and do something with it."""
    from vchan.host.policy import rule_files

    if options.dir is not None:
        if not Path(options.dir).is_dir():
            raise ConfigError(options.dir, "is no directory")
        policy = rule_files.load(options.dir)
    else:
        conf = configuration.load(options)
        from vchan.host import config

        policy = config.policy(conf)
        directory = conf[config.GROUP].policy_dir
        if not rule_files.is_there(directory):
            say(f"{directory} is not there: it has no rules")
    status: int = what(policy, options)
    return status


def _check(policy: Policy, options: argparse.Namespace) -> int:
    if options.kind is not None:
        return _explain_request(policy, options)
    counted = {
        "rules": len(policy.rules),
        "limits": len(policy.limit_rules),
        "owns": len(policy.own_rules),
        "contexts": len(policy.context_rules),
    }
    if is_shaped(options):
        show_record(options, counted)
    else:
        rules, limits, owns, contexts = counted.values()
        lines = f"limits: {limits}, own: {owns}, context: {contexts}"
        text_line(f"no errors; rules: {rules}; lines of {lines}")
    return EXIT_OK


def _lint(policy: Policy, options: argparse.Namespace) -> int:
    from vchan.host.policy.lint import lint

    findings = lint(policy)
    if is_shaped(options):
        show_rows(options, [finding._asdict() for finding in findings], LINT_COLUMNS)
    else:
        for where, code, text in findings:
            text_line(printable(f"{where or 'policy'}: {code}: {text}"))
        if not findings:
            text_line("nothing suspicious")
    return EXIT_FAILED if findings else EXIT_OK


def _explain_request(policy: Policy, options: argparse.Namespace) -> int:
    from vchan.host.policy.rules import Effect, make_ask, make_facts

    facts = make_facts(pairs(options.vm.split(",") if options.vm else []))
    target = _whole_target(options.kind, options.target or "")
    ask = make_ask(options.kind, target, pairs(options.details))
    whose = (facts, ask.exchange, ask.topic)
    verdict, steps, contexts, keys = policy.explain(facts, ask)
    rows = [
        {"rule": rule.where, "text": rule.text, "mismatch": str(why) if why else None}
        for rule, why in (*steps, *contexts)
    ]
    if is_shaped(options):
        told = {"effect": verdict.effect, "rule": verdict.rule, "looked_at": rows}
        show_record(options, {**told, "owner": policy.owns(*whose), "context_keys": dict(keys)})
    else:
        for step in (*steps, *contexts):
            text_line(printable(f"{step.rule.where}: {step.rule.text}"))
            text_line(printable(f"    {_said_of(step)}"))
        if keys:
            text_line(f"passes of its context, besides the options' keys: {', '.join(keys)}")
        text_line(f"{verdict.effect}: {verdict.rule}")
    return EXIT_FAILED if verdict.effect is Effect.DENY else EXIT_OK


def _whole_target(kind: str, target: str) -> str:
    """EXCHANGE/TOPIC, as the daemon asks: a topic alone is of the exchange that such requests have.

    Raises:
        ConfigError: There are no such reports.
    """
    from vchan.host.oslo_wire.upward_envelope import REPORT_EXCHANGE
    from vchan.host.policy.rules import Kind
    from vchan.rpc.httpcall import TOPIC as HTTP

    if kind == Kind.FORWARD:
        return target
    of_its_own: dict[str, str] = {Kind.HTTP: HTTP.exchange, Kind.REPORT: REPORT_EXCHANGE}
    exchange = of_its_own.get(kind, EXCHANGE)
    whole = f"{exchange}/{target}" if target and "/" not in target else target
    if kind == Kind.REPORT and whole not in {f"{exchange}/{what}" for what in REPORTS}:
        raise ConfigError(f"report {target!r}", f"expected {', '.join(REPORTS)}")
    return whole


def _said_of(step: Step) -> str:
    """Whether a line matches, and if not, why."""
    from vchan.host.policy.rules import OwnRule

    if not isinstance(step.rule, OwnRule):
        return "yes" if step.mismatch is None else f"no: {step.mismatch}"
    if step.mismatch is None:
        return "yes: the topic is this VM's alone, also what is sent to it without a server"
    return f"no: {step.mismatch}; so the topic is another's, whatever rules say"
