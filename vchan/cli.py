"""vchan: the operator's command on a compute host. The only module that prints.

vchan list | status [VM] | ping VM | call VM TOPIC METHOD [KEY=VALUE ...] | cast ...
      | attach VM | detach VM | release VM | policy check | policy lint | doctor | metrics
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vchan import __version__
from vchan.client import EXCHANGE, HOST_SOCKET, HOST_TOPIC, Client
from vchan.errors import (
    CallTimeout,
    ConfigError,
    LimitExceeded,
    LinkError,
    PortAbsent,
    RemoteError,
    RequestError,
    VchanError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vchan.host.doctor import Finding
    from vchan.host.policy import Policy

TIMEOUT_S: Final = 10.0
TIMEOUT_S_MAX: Final = 86400

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
"""The request was refused or not delivered, or the method raised."""
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
"""The daemon cannot be reached."""
EXIT_TIMEOUT: Final = 4
"""No answer in time: the method may have run."""

_EPILOG = f"""\
VM is a domain's UUID or name. A VALUE that is JSON is taken as such, anything else as text.

exit status: {EXIT_OK} done; {EXIT_FAILED} refused, not delivered, or the method raised;
{EXIT_USAGE} wrong arguments; {EXIT_UNREACHABLE} vchan-host cannot be reached;
{EXIT_TIMEOUT} no answer in time: the method may have run
doctor: {EXIT_FAILED} if there is a problem
"""


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= TIMEOUT_S_MAX:
        limit = f"over 0 and at most {TIMEOUT_S_MAX}"
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds {limit}")
    return seconds


def _version(text: str) -> str:
    major, dot, minor = text.partition(".")
    if not (major.isdecimal() and (minor.isdecimal() or not dot)):
        raise argparse.ArgumentTypeError(f"{text!r} is no MAJOR.MINOR")
    return text


def _address(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no ADDRESS:PORT")
    return address.strip("[]"), int(port)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vchan",
        description="Talk to agents inside this host's virtual machines.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser)
    parser.set_defaults(socket=HOST_SOCKET, timeout=TIMEOUT_S, json=False)
    parser.add_argument("--version", action="version", version=f"vchan {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the host's domains and their channels")
    status = commands.add_parser("status", help="the daemon, or one VM, in detail")
    status.add_argument("vm", nargs="?", metavar="VM")
    ping = commands.add_parser("ping", help="round trips to a VM's guest daemon")
    ping.add_argument("vm", metavar="VM")
    ping.add_argument("--count", type=_count, default=3, help="[%(default)s]")
    for name, text in (
        ("call", "call a method of an agent and print its result"),
        ("cast", "send a request; done when an agent has taken it"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("vm", metavar="VM")
        command.add_argument("topic", metavar="TOPIC", help="or EXCHANGE/TOPIC")
        command.add_argument("method", metavar="METHOD")
        command.add_argument("args", nargs="*", default=[], metavar="KEY=VALUE")
        command.add_argument("--exchange", help=f"[{EXCHANGE}]")
        command.add_argument("--namespace")
        command.add_argument("--rpc-version", type=_version, metavar="MAJOR.MINOR")
    for name, text in (
        ("attach", "give a VM a channel, now and for its next boots"),
        ("detach", "take a VM's channel away, now and for its next boots"),
        ("release", "end a VM's quarantine"),
    ):
        commands.add_parser(name, help=text).add_argument("vm", metavar="VM")
    doctor = commands.add_parser("doctor", help="what is wrong, and what to do about it")
    doctor.add_argument("vm", nargs="?", metavar="VM")
    doctor.add_argument("--config-file", metavar="FILE", help="in place of vchan.conf")
    metrics = commands.add_parser("metrics", help="the daemon's counters, for Prometheus")
    metrics.add_argument("--host-only", action="store_true", help="none for each VM")
    metrics.add_argument(
        "--listen",
        type=_address,
        metavar="ADDRESS:PORT",
        help="serve them over HTTP, until stopped, in place of printing them",
    )
    _add_policy(commands.add_parser("policy", help="check the policy's files, without the daemon"))
    for command in commands.choices.values():
        _add_common(command)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """What may stand before the command and after it."""
    none = argparse.SUPPRESS  # so that a default after the command undoes nothing before it
    parser.add_argument("--socket", default=none, help=f"vchan-host's socket [{HOST_SOCKET}]")
    parser.add_argument(
        "--timeout", type=_seconds, default=none, metavar="SECONDS", help=f"[{TIMEOUT_S:g}]"
    )
    parser.add_argument("--json", action="store_true", default=none, help="print JSON")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="parse it; or say which rule decides a request")
    lint = actions.add_parser("lint", help="what is suspicious about it")
    for action in (check, lint):
        action.add_argument("--dir", help="of these files alone, not as vchan.conf has it")
        action.add_argument("--config-file", metavar="FILE", help="in place of vchan.conf")
    check.add_argument(
        "--vm", default="", metavar="KEY=VALUE,...", help="uuid, name, project, user, flavor, image"
    )
    check.add_argument("kind", nargs="?", help="listen, reply, cast, fanout, call, notify or http")
    check.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help=f"TOPIC (of exchange {EXCHANGE}), EXCHANGE/TOPIC",
    )
    check.add_argument("details", nargs="*", metavar="KEY=VALUE", help="server, namespace, method")


def parse_values(words: list[str]) -> dict[str, Any]:
    """KEY=VALUE words as arguments of a method.

    Raises:
        ConfigError: A word is no KEY=VALUE, or a key comes twice.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"argument {word!r}", "expected KEY=VALUE, KEY being a name")
        if key in values:
            raise ConfigError(f"argument {word!r}", f"{key} is given twice")
        try:
            values[key] = json.loads(text)
            json.dumps(values[key], allow_nan=False)  # Python's reader takes more than JSON has
        except (ValueError, RecursionError):
            values[key] = text
    return values


def _show(value: Any, as_json: bool) -> None:
    """What a guest may have chosen: all of it, but nothing that a terminal obeys."""
    if as_json or not isinstance(value, str):
        text = json.dumps(value, indent=None if as_json else 2, ensure_ascii=False)
        if not text.replace("\n", "").isprintable():  # then it is within strings
            odd = {c for c in text if not c.isprintable() and c != "\n"}
            text = text.translate({ord(c): json.dumps(c)[1:-1] for c in odd})
    elif sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in value)
    else:
        text = value.encode("utf-8", "backslashreplace").decode()
    print(text)


def _list(client: Client, options: argparse.Namespace) -> None:
    rows = client.call(HOST_TOPIC, "list", timeout_s=options.timeout)
    libvirt = client.call(HOST_TOPIC, "status", timeout_s=options.timeout).get("libvirt")
    if libvirt not in (None, "connected", "none configured"):
        print(f"vchan: libvirt: {_printable(libvirt)}: this may be out of date", file=sys.stderr)
    if options.json:
        _show(rows, as_json=True)
        return
    line = "{:36}  {:20}  {:8}  {:10}  {}"
    print(line.format("UUID", "NAME", "DOMAIN", "CHANNEL", "TOPICS"))
    for row in rows:
        last = row["problem"] or ", ".join(row["topics"])
        fields = (row["uuid"], row["name"], row["domain"], row["channel"], _printable(last))
        print(line.format(*fields).rstrip())


def _say_if_away(client: Client, options: argparse.Namespace) -> None:
    """That it may take its time, and why, before it does."""
    try:
        status = client.call(HOST_TOPIC, "status", {"vm": options.vm}, timeout_s=options.timeout)
    except RemoteError:  # the name of no VM: of a program's server, or of nothing
        return
    state = status.get("state", "none")
    if state not in ("ready", "none"):  # who has no channel is refused at once
        why = ": ".join(filter(None, (state, status.get("problem"))))
        text = f"{options.vm} is {why}; waiting for it, {options.timeout:g} s at most"
        print(f"vchan: {_printable(text)}", file=sys.stderr)


def _ping(client: Client, options: argparse.Namespace) -> None:
    _say_if_away(client, options)
    for number in range(options.count):
        start = time.perf_counter()
        client.call("vchan.guest", "ping", server=options.vm, timeout_s=options.timeout)
        took_ms = (time.perf_counter() - start) * 1000
        if options.json:
            print(json.dumps({"vm": options.vm, "number": number + 1, "ms": round(took_ms, 3)}))
        else:
            print(f"answer from {options.vm}: {took_ms:.2f} ms")


def _request(client: Client, options: argparse.Namespace) -> None:
    arguments = parse_values(options.args)
    _say_if_away(client, options)
    exchange, topic = _target(options)
    names = {
        "server": options.vm,
        "timeout_s": options.timeout,
        "exchange": exchange,
        "namespace": options.namespace,
        "version": options.rpc_version,
    }
    if options.command == "call":
        value = client.call(topic, options.method, arguments, **names)
        _show(value, options.json)
    else:
        client.cast(topic, options.method, arguments, **names)


def _target(options: argparse.Namespace) -> tuple[str, str]:
    """(exchange, topic), as `vchan list` shows them too."""
    if options.exchange is not None:
        return options.exchange, options.topic
    exchange, slash, topic = options.topic.partition("/")
    return (exchange, topic) if slash else (EXCHANGE, options.topic)


def _status(client: Client, options: argparse.Namespace) -> None:
    args = {"vm": options.vm} if options.vm else {}
    _show(client.call(HOST_TOPIC, "status", args, timeout_s=options.timeout), options.json)


def _command(client: Client, options: argparse.Namespace) -> None:
    client.call(HOST_TOPIC, options.command, {"vm": options.vm}, timeout_s=options.timeout)


def _metrics(options: argparse.Namespace) -> int:
    try:
        from vchan.host.metrics import DaemonCollector, as_text, serve
    except ModuleNotFoundError as error:
        raise ConfigError("metrics", f"needs {error.name}: python3-prometheus-client") from error
    collector = DaemonCollector(options.socket, options.timeout, with_vms=not options.host_only)
    if options.listen is None:
        print(as_text(collector), end="")
        return EXIT_OK
    address, port = options.listen
    try:
        serve(collector, address, port)
    except OSError as error:
        raise ConfigError(f"--listen {address}:{port}", str(error)) from error
    return EXIT_OK


def _doctor(options: argparse.Namespace) -> int:
    from vchan.host.doctor import Level, summarize

    findings = [*_examine_files(options), *_examine_host(options)]
    if options.json:
        rows = [{**finding._asdict(), "level": finding.level.value} for finding in findings]
        _show(rows, as_json=True)
    else:
        for level, where, text, remedy in findings:
            print(f"{level.value:8} {_printable(where)}: {_printable(text)}")
            if remedy:
                print(f"{'':8} -> {remedy}")
        print(summarize(findings))
    return EXIT_FAILED if any(each.level is Level.PROBLEM for each in findings) else EXIT_OK


def _examine_files(options: argparse.Namespace) -> Iterator[Finding]:
    """The files as they are now: the daemon may have read others."""
    from vchan.host import config
    from vchan.host.doctor import Finding, Level
    from vchan.host.policy_lint import lint

    try:
        conf = config.load(["--config-file", options.config_file] if options.config_file else [])
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


def _examine_host(options: argparse.Namespace) -> Iterator[Finding]:
    from vchan.host.doctor import Finding, Level, examine_daemon, examine_vm

    def ask(method: str, **args: str) -> Any:
        return client.call(HOST_TOPIC, method, args, timeout_s=options.timeout)

    try:
        with Client(options.socket) as client:
            yield from examine_daemon(ask("status"), __version__)
            rows = ask("list")
            if options.vm:
                uuid = ask("status", vm=options.vm)["uuid"]
                rows = [row for row in rows if row["uuid"] == uuid]
            for row in rows:
                try:
                    yield from examine_vm(row, ask("status", vm=row["uuid"]))
                except RemoteError:  # gone since the list was made
                    continue
    except LinkError as error:
        yield Finding(Level.PROBLEM, "vchan-host", str(error), "systemctl status vchan-host")


def _policy(options: argparse.Namespace) -> int:
    # Here, because the other commands need nothing of the host's side.
    from vchan.host import policy_files

    if options.dir is not None:
        if not Path(options.dir).is_dir():
            raise ConfigError(options.dir, "is no directory")
        policy = policy_files.load(options.dir)
    else:
        from vchan.host import config

        files = ["--config-file", options.config_file] if options.config_file else []
        conf = config.load(files)
        policy = config.policy(conf)
        directory = conf[config.GROUP].policy_dir
        if not policy_files.is_there(directory):
            print(f"vchan: {directory} is not there: it has no rules", file=sys.stderr)
    if options.action == "lint":
        return _lint(policy, options)
    if options.kind is not None:
        return _explain_request(policy, options)
    if options.json:
        _show({"rules": len(policy.rules), "limits": len(policy.limit_rules)}, as_json=True)
    else:
        print(f"no errors; rules: {len(policy.rules)}, lines of limits: {len(policy.limit_rules)}")
    return EXIT_OK


def _lint(policy: Policy, options: argparse.Namespace) -> int:
    from vchan.host.policy_lint import lint

    findings = lint(policy)
    if options.json:
        _show([finding._asdict() for finding in findings], as_json=True)
        return EXIT_FAILED if findings else EXIT_OK
    for where, code, text in findings:
        print(f"{where or 'policy'}: {code}: {text}")
    if not findings:
        print("nothing suspicious")
    return EXIT_FAILED if findings else EXIT_OK


def _explain_request(policy: Policy, options: argparse.Namespace) -> int:
    from vchan.host.policy import Effect, make_ask, make_facts

    facts = make_facts(_pairs(options.vm.split(",") if options.vm else []))
    target = options.target or ""
    if target and "/" not in target:
        target = f"{EXCHANGE}/{target}"  # as agents and their callers have it
    ask = make_ask(options.kind, target, _pairs(options.details))
    verdict, steps = policy.explain(facts, ask)
    if options.json:
        rows = [
            {"rule": rule.where, "text": rule.text, "mismatch": str(why) if why else None}
            for rule, why in steps
        ]
        _show({"effect": verdict.effect, "rule": verdict.rule, "looked_at": rows}, as_json=True)
    else:
        for rule, why in steps:
            print(f"{rule.where}: {rule.text}\n    {f'no: {why}' if why else 'yes'}")
        print(f"{verdict.effect}: {verdict.rule}")
    return EXIT_FAILED if verdict.effect is Effect.DENY else EXIT_OK


def _pairs(words: list[str]) -> dict[str, str]:
    """KEY=VALUE words, all of them text."""
    return {
        key: word.partition("=")[2] for word, key in zip(words, parse_values(words), strict=True)
    }


_COMMANDS: Final = {
    "list": _list,
    "status": _status,
    "ping": _ping,
    "call": _request,
    "cast": _request,
    "attach": _command,
    "detach": _command,
    "release": _command,
}

_WITHOUT_CLIENT: Final = {"policy": _policy, "doctor": _doctor, "metrics": _metrics}
"""They connect to the daemon themselves, if at all, and have an exit status of their own."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = build_parser().parse_args(arguments)
    try:
        if options.command in _WITHOUT_CLIENT:
            return _WITHOUT_CLIENT[options.command](options)
        if options.command in ("call", "cast"):
            parse_values(options.args)  # wrong words are told before anything is connected
        with Client(options.socket) as client:
            _COMMANDS[options.command](client, options)
    except VchanError as error:
        print(f"vchan: {_explain(error)}", file=sys.stderr)
        return _status_of(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "vchan":
            raise
        text = f"{options.command} needs {error.name}: pip install 'vchan[host]'"
        print(f"vchan: {text}, or the package vchan-host", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _printable(text: str) -> str:
    """Without what a guest could steer a terminal by."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _explain(error: VchanError) -> str:
    text = _printable(" ".join(str(error).split()))
    if isinstance(error, PortAbsent):
        return f"{text} (is vchan-host running?)"
    if isinstance(error, CallTimeout):
        return f"{text}: the method may have run; --timeout waits longer"
    return text


def _status_of(error: VchanError) -> int:
    match error:
        case ConfigError() | LimitExceeded():
            return EXIT_USAGE
        case LinkError():
            return EXIT_UNREACHABLE
        case CallTimeout():
            return EXIT_TIMEOUT
        case RemoteError() | RequestError() | _:
            return EXIT_FAILED


def main() -> None:
    """The command."""
    # What a guest answers may be no text that this terminal can show.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_OK
    except UnicodeEncodeError:
        print("vchan: an argument is not UTF-8", file=sys.stderr)
        status = EXIT_USAGE
    sys.exit(status)


if __name__ == "__main__":
    main()
