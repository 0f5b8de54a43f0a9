"""dev: both daemons and an agent here, without a VM or a broker."""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path
from typing import Any, Final

from vchan.cli.failures import EXIT_OK, NoDev
from vchan.cli.host import Host
from vchan.cli.output import flush, text_line
from vchan.cli.requests import show_result
from vchan.cli.values import parse_values
from vchan.client import Client
from vchan.errors import ConfigError, NoSuchAgent
from vchan.rpc.messages import GUEST_TOPIC

TOPIC_LOOK_S: Final = 0.1
"""How often the agent's topic is looked for: one that starts is there in a moment."""


def add_commands(commands: Any) -> None:
    """The commands of this group."""
    dev = commands.add_parser(
        "dev",
        help="run an agent here, without a VM or a broker",
        description="Run an agent on this machine, between both daemons, and ask it.",
    )
    actions = dev.add_subparsers(
        dest="action", required=True, metavar="ACTION", title="commands", parser_class=type(dev)
    )
    run = actions.add_parser(
        "run",
        help="both daemons and the agent; anew when its files change",
        description="Run both daemons and the agent, which starts anew when its files change.",
    )
    run.add_argument(
        "--watch",
        action="append",
        default=[],
        metavar="DIR",
        help="where its files are; may be given again [the agent's directory]",
    )
    run.add_argument("--policy", default="", metavar="DIR", help="a host's policy [everything]")
    run.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="TOPIC",
        help="of the control side: take what the agent sends there, answer null",
    )
    run.add_argument(
        "--http", type=_port, default=0, metavar="PORT", help="run vchan-http, too, on this port"
    )
    run.add_argument("agent", metavar="AGENT", help="a file of Python's, or a command")
    words = run.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="what the agent is given"
    )
    words.required = False  # argparse takes it for an argument that must be there
    run.set_defaults(run=_run)
    requests = [
        actions.add_parser(name, help=f"a {name} to that agent", description=text)
        for name, text in (
            ("call", "Call a method of the agent that dev run runs, and print its result."),
            ("cast", "Send a request to the agent that dev run runs."),
        )
    ]
    for request in requests:
        request.add_argument(
            "--topic", metavar="TOPIC", help="what it serves [the one that the agent serves]"
        )
        request.add_argument("method", metavar="METHOD", help="what it is to do")
        request.add_argument(
            "args", nargs="*", default=[], metavar="KEY=VALUE", help="the method's arguments"
        )
        request.set_defaults(run=_ask)
    for action in (run, *requests):
        action.add_argument(
            "--dir", metavar="DIR", help="for the sockets of both daemons [/tmp/vchan-dev-UID]"
        )


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: expected 1 to 65535")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    # Until the daemon handles it in order, there is nothing to be put in order.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vchan.host import dev

    wanted = dev.Wanted(
        (options.agent, *options.words),
        options.dir or dev.default_directory(),
        _directory("--policy", options.policy),
        tuple(options.watch),
        frozenset(options.accept),
        options.http,
        options.verbose,
    )
    return dev.run(wanted, _say)


def _directory(option: str, path: str) -> str:
    """Its absolute path; "" if none is given."""
    if path and not Path(path).is_dir():
        raise ConfigError(option, f"{path} is no directory")
    return str(Path(path).absolute()) if path else ""


def _say(text: str) -> None:
    text_line(text)
    flush()


def _ask(options: argparse.Namespace) -> int:
    from vchan.host import dev

    arguments = parse_values(options.args)
    socket = f"{options.dir or dev.default_directory()}/host.sock"
    if not Path(socket).exists():
        raise NoDev(socket, f" --dir {options.dir}" if options.dir else "")
    with Client(socket) as client:
        host = Host(client, socket, options.timeout)
        topic = options.topic or _topic_of(host, dev.NAME, options.timeout)
        if options.action == "call":
            result = client.call(
                topic, options.method, arguments, server=dev.NAME, timeout_s=host.left_s
            )
            show_result(result, options)
        else:
            client.cast(topic, options.method, arguments, server=dev.NAME, timeout_s=host.left_s)
    return EXIT_OK


def _topic_of(host: Host, vm: str, timeout_s: float) -> str:
    """The one that agents serve there, once they do."""
    until_s = time.monotonic() + timeout_s
    while True:
        rows = host.ask("list")
        topics = [topic for row in rows if row["name"] == vm for topic in row["topics"]]
        names = [topic.partition("/")[2] for topic in topics]
        names = [name for name in names if name != GUEST_TOPIC.name]
        if len(names) == 1:
            return str(names[0])
        if names:
            raise ConfigError("--topic", f"which one? The agent serves {', '.join(names)}")
        if time.monotonic() >= until_s:
            where = "the terminal of vchan dev run says why"
            raise NoSuchAgent(f"the agent has served no topic for {timeout_s:g} s; {where}")
        time.sleep(TOPIC_LOOK_S)
