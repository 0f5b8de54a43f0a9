"""call, cast, ping: requests to agents in VMs, and to programs on this host."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vchan.cli.arguments import VM, add_vm, count, seconds, version
from vchan.cli.failures import EXIT_OK, EXIT_TIMEOUT
from vchan.cli.host import Ambiguous, Host, as_known, connected, is_gone
from vchan.cli.output import (
    Rows,
    as_json,
    is_shaped,
    printable,
    say,
    show_record,
    show_rows,
    text_line,
)
from vchan.cli.values import parse_values
from vchan.errors import CallTimeout, NoSuchAgent, NoSuchDomain, RemoteError
from vchan.programs.requests import EXCHANGE
from vchan.rpc.messages import GUEST_TOPIC

PINGS: Final = 3
"""Questions of `vchan ping`, unless --count says otherwise."""
PING_COLUMNS: Final = ("vm", "number", "ms")

_VALUES: Final = """\
VALUE is JSON if it can be read as such, and text otherwise. KEY:=JSON takes nothing but
JSON, so that n:='"1"' is the text 1; KEY=@FILE is the text of a file, KEY:=@FILE its JSON.
"""


def add_commands(commands: Any) -> None:
    """The commands of this group."""
    for name, text, told in (
        (
            "call",
            "call a method of an agent and print its result",
            "Call a method of an agent in a VM, or of a program here, and print its result.",
        ),
        (
            "cast",
            "send a request; done when an agent has taken it",
            "Send a request to an agent in a VM, or to a program here. It is done when that "
            "has taken it.",
        ),
    ):
        command = commands.add_parser(name, help=text, description=told, epilog=_VALUES)
        add_vm(command, what=f"{VM}; or the server of a program on this host")
        command.add_argument(
            "topic", metavar="TOPIC", help="what the agent serves: TOPIC, or EXCHANGE/TOPIC"
        )
        command.add_argument("method", metavar="METHOD", help="what it is to do")
        command.add_argument(
            "args", nargs="*", default=[], metavar="KEY=VALUE", help="the method's arguments"
        )
        command.add_argument("--exchange", help=f"the topic's exchange [{EXCHANGE}]")
        command.add_argument("--namespace", help="the method's namespace [none]")
        command.add_argument(
            "--rpc-version",
            type=version,
            metavar="MAJOR.MINOR",
            help="the version of the topic's methods that is needed [1.0]",
        )
        command.set_defaults(run=_request)
    ping = commands.add_parser(
        "ping",
        help="round trips to a VM's guest daemon",
        description="Ask a VM's guest daemon whether it is there; say how long its answers took.",
    )
    add_vm(ping)
    ping.add_argument(
        "--count", type=count, default=PINGS, metavar="N", help="how many times [%(default)s]"
    )
    ping.add_argument(
        "--interval",
        type=seconds,
        default=None,
        metavar="SECONDS",
        help="between an answer and the next question [none]",
    )
    ping.set_defaults(run=_ping)


# ---------------------------------------------------------------- who is asked


def _server(host: Host, options: argparse.Namespace) -> tuple[str, Mapping[str, Any] | None]:
    """The server that a word means, and its status if it is a VM's. Says why an answer may take its
    time, before it does.

    Raises:
        LinkDown: The daemon did not say. Nothing was asked of the VM.
        Ambiguous: The word is the beginning of several VMs' UUIDs.
    """
    word: str = options.vm
    try:
        status = host.status_of(word)
    except RemoteError as error:
        if not is_gone(error):
            say(f"how {word} is: {printable(str(error))}")
        return word, None
    except Ambiguous:
        raise
    except NoSuchDomain:
        return word, None  # a program's server, or nothing: the daemon says
    state = status.get("state", "none")
    if state == "ready" and status.get("domain") == "paused":
        state = "paused"
    if state not in ("ready", "none"):  # who has no channel is refused at once
        why = ": ".join(filter(None, (state, status.get("problem"))))
        say(printable(f"{word} is {why}; waiting for it, {options.timeout:g} s at most"))
    return as_known(word, status), status


# ---------------------------------------------------------------- call, cast


def _request(options: argparse.Namespace) -> int:
    arguments = parse_values(options.args)  # wrong words are told before anything is connected
    exchange, topic = target(options.topic, options.exchange)
    with connected(options) as host:
        server, status = _server(host, options)
        ask = host.client.call if options.command == "call" else host.client.cast
        try:
            value = ask(
                topic,
                options.method,
                arguments,
                server=server,
                timeout_s=host.left_s,
                exchange=exchange,
                namespace=options.namespace,
                version=options.rpc_version,
            )
        except NoSuchAgent as error:
            if status is None or status.get("state") != "ready":
                raise
            raise NoSuchAgent(f"{error}; {_what_is_served(options.vm, status)}") from error
    if options.command == "call":
        show_result(value, options)
    elif is_shaped(options):
        row = {"vm": options.vm, "exchange": exchange, "topic": topic, "method": options.method}
        show_record(options, {**row, "done": "taken"})
    return EXIT_OK


def _what_is_served(vm: str, status: Mapping[str, Any]) -> str:
    """What might have been meant."""
    served = (status.get("requests") or {}).get("topics")
    return f"served in {vm}: {', '.join(served or ()) or 'nothing'}"


def target(topic: str, exchange: str | None = None) -> tuple[str, str]:
    """(exchange, topic), as `vchan list` shows them too."""
    if exchange is not None:
        return exchange, topic
    before, slash, after = topic.partition("/")
    return (before, after) if slash else (EXCHANGE, topic)


def show_result(value: Any, options: argparse.Namespace) -> None:
    """All of what a method returned, but nothing that a terminal obeys."""
    if options.format == "json" and not options.columns:
        text_line(as_json(value))
    elif is_shaped(options):
        _show_as_table(value, options)
    elif not isinstance(value, str):
        text_line(as_json(value, indent=2))
    else:
        show_text(value)


def _show_as_table(value: Any, options: argparse.Namespace) -> None:
    if isinstance(value, dict):
        show_record(options, value)
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        show_rows(options, value, list(dict.fromkeys(name for row in value for name in row)))
    else:
        rows = [{"value": each} for each in (value if isinstance(value, list) else [value])]
        show_rows(options, rows, ("value",))


def show_text(value: str) -> None:
    """A text that a guest chose: as it is for a program, harmless for a terminal."""
    import sys

    if sys.stdout.isatty():
        text_line(printable(value, besides="\n\t"))
    else:
        text_line(value.encode("utf-8", "backslashreplace").decode())


# ---------------------------------------------------------------- ping


def _ping(options: argparse.Namespace) -> int:
    took_ms: list[float] = []
    asked = 0
    last: CallTimeout | None = None
    with connected(options) as host:
        server, _ = _server(host, options)
        rows = Rows(options, PING_COLUMNS)
        try:
            for number in range(1, options.count + 1):
                if number > 1:
                    host.renew(options.timeout)
                    time.sleep(options.interval or 0)
                asked += 1
                start_s = time.perf_counter()
                try:
                    host.client.call(GUEST_TOPIC.name, "ping", server=server, timeout_s=host.left_s)
                except CallTimeout as error:
                    last = error
                    rows.show(
                        {"vm": options.vm, "number": number, "ms": None},
                        f"no answer from {options.vm} in {options.timeout:g} s",
                    )
                else:
                    took_ms.append(round((time.perf_counter() - start_s) * 1000, 3))
                    rows.show(
                        {"vm": options.vm, "number": number, "ms": took_ms[-1]},
                        f"answer from {options.vm}: {took_ms[-1]:.2f} ms",
                    )
        finally:
            if asked and options.format is None:
                text_line(summary(asked, took_ms))
    if last is not None and not took_ms:
        raise last
    return EXIT_OK if len(took_ms) == asked else EXIT_TIMEOUT


def summary(asked: int, took_ms: Sequence[float]) -> str:
    """What a ping came to."""
    line = f"asked {asked}, answered {len(took_ms)}"
    if not took_ms:
        return line
    mean = sum(took_ms) / len(took_ms)
    return f"{line}; shortest {min(took_ms):.2f}, mean {mean:.2f}, longest {max(took_ms):.2f} ms"
