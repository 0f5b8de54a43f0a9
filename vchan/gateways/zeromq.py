"""vchan-zmq: vchan for programs of this VM that speak ZeroMQ.

    socket = zmq.Context().socket(zmq.REQ)
    socket.connect("ipc:///run/vchan/zmq.sock")
    socket.send_json({"do": "call", "topic": "conductor", "method": "ping"})
    socket.recv_json()                                     {"tag": null, "result": "pong"}

The verbs and their members are vchan-http's: `gateway` does them, here is the socket. A ROUTER: a
program connects a REQ, or a DEALER, which may ask several things at a time and tells the answers
apart by "tag". pyzmq is imported when it is needed.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from vchan.errors import ConfigError, LinkError
from vchan.gateways.gateway import Done, Gateway, Problem
from vchan.gateways.http_wire import BODY_BYTES_MAX, problem_body
from vchan.gateways.process import serve
from vchan.guest.options import (
    EXIT_CONFIG,
    EXIT_SOCKET,
    SWITCH,
    read_options,
    run_program,
)
from vchan.guest.stderr_log import log
from vchan.io.loop import Loop
from vchan.programs.connection import AGENT_SOCKET
from vchan.rpc.bodies import decode_json, encode_json

DEFAULT_LISTEN: Final = "ipc:///run/vchan/zmq.sock"
DEFAULT_CONFIG: Final = "/etc/vchan/zmq.conf"
DEFAULTS: Final = {
    "listen": DEFAULT_LISTEN,
    "socket-mode": "0660",
    "agent-socket": AGENT_SOCKET,
    "quiet": SWITCH,
}
OPEN_MAX: Final = 256
"""Requests of all programs that are not answered."""
HWM: Final = 64
"""Messages that ZeroMQ keeps for one program, in each direction."""

_ERROR, _INFO = 3, 6

USAGE: Final = f"""\
usage: vchan-zmq [--config FILE] [--listen ipc:///PATH] [--socket-mode MODE]
                 [--agent-socket PATH] [--quiet]

  --config FILE        read these options from FILE ({DEFAULT_CONFIG} if it is there)
  --listen ADDRESS     where programs connect [{DEFAULT_LISTEN}]
  --socket-mode MODE   the socket's permissions, octal [0660]
  --agent-socket PATH  of vchan-guest [{AGENT_SOCKET}]
  --quiet              log errors only
  --version, --help

exit status: 0 ended by a signal; {EXIT_CONFIG} wrong arguments or configuration, or no pyzmq;
{EXIT_SOCKET} the address cannot be listened on
"""


class Options(NamedTuple):
    """What the program is told."""

    path: str = DEFAULT_LISTEN.removeprefix("ipc://")
    socket_mode: int = 0o660
    agent_socket: str = AGENT_SOCKET
    quiet: bool = False


def parse_options(arguments: list[str]) -> Options:
    """The options in a command line and in the configuration file.

    Raises:
        ConfigError: One of them is wrong.
    """
    values = read_options(arguments, DEFAULTS, DEFAULT_CONFIG, "vchan-zmq")
    listen = values["listen"]
    path = listen.value.removeprefix("ipc://")
    if path == listen.value or not path.startswith("/"):
        raise listen.wrong("expected ipc:///PATH: who may connect is the file's permissions' word")
    return Options(
        path,
        values["socket-mode"].mode(),
        values["agent-socket"].path(),
        values["quiet"].is_yes,
    )


def import_zmq() -> Any:
    """pyzmq.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import zmq
    except ImportError as error:
        raise ConfigError("vchan-zmq", "needs pyzmq: pip install 'vchan[zmq]'") from error
    return zmq


class ZmqServer:
    """The ROUTER, and what is asked through it. Belongs to the loop's thread.

    Raises:
        ConfigError: pyzmq is not installed.
        LinkError: The address cannot be listened on.
    """

    def __init__(self, loop: Loop, options: Options, gateway: Gateway) -> None:
        zmq = self._zmq = import_zmq()
        self._loop = loop
        self._gateway = gateway
        self._open = 0
        self.address = options.path
        """Where it listens."""
        self.counters = {"asked": 0, "refused": 0, "untold": 0}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.RCVHWM, HWM),
            (zmq.SNDHWM, HWM),
            (zmq.MAXMSGSIZE, BODY_BYTES_MAX),
            (zmq.LINGER, 0),
            # Without it what is for somebody who is gone would vanish unseen.
            (zmq.ROUTER_MANDATORY, 1),
        ):
            self._socket.setsockopt(option, value)
        mask = os.umask(0o777 & ~options.socket_mode)
        try:
            self._socket.bind(f"ipc://{options.path}")
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            raise LinkError(options.path, f"cannot listen there: {error}") from error
        finally:
            os.umask(mask)
        loop.add_reader(self._socket.getsockopt(zmq.FD), self._look)
        loop.call_soon(self._look)

    def _look(self) -> None:
        """ZeroMQ's descriptor tells of changes alone: so everything there is, is read."""
        zmq = self._zmq
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._ask(self._socket.recv_multipart(zmq.NOBLOCK))

    def _ask(self, parts: list[bytes]) -> None:
        *envelope, body = parts
        tag: Any = None
        try:
            values = _read(body)
            tag = values.pop("tag", None)
            verb = values.pop("do", None)
            self._check(verb)
        except Problem as problem:
            self.counters["refused"] += 1
            self._tell(envelope, tag, problem)
            return
        self.counters["asked"] += 1
        self._open += 1

        def told(answer: Done | Problem) -> None:
            self._open -= 1
            self._tell(envelope, tag, answer)

        self._gateway.ask(verb, values, told)

    def _check(self, verb: object) -> None:
        if not isinstance(verb, str):
            known = ", ".join(self._gateway.verbs)
            raise Problem(400, "BadMember", f"do is missing: expected one of {known}")
        if self._open >= OPEN_MAX:
            raise Problem(429, "Busy", f"{OPEN_MAX} requests are open (OPEN_MAX)")

    def _tell(self, envelope: list[bytes], tag: Any, answer: Done | Problem) -> None:
        head = b'{"tag":' + encode_json(tag)
        if isinstance(answer, Problem):
            problem = problem_body(answer.status, answer.code, answer.detail, answer.extra)
            body = head + b',"problem":' + problem + b"}"
        elif answer.body:
            body = head + b"," + answer.body.removeprefix(b"{")
        else:
            body = head + b"}"
        try:
            self._socket.send_multipart([*envelope, body], self._zmq.NOBLOCK)
        except self._zmq.ZMQError:  # it is gone, or has read nothing for long
            self.counters["untold"] += 1
            if isinstance(answer, Done) and answer.undo is not None:
                answer.undo()
        # To send may have used up the descriptor's word of what has come.
        self._loop.call_soon(self._look)

    def close(self) -> None:
        """Close it, and remove its file."""
        self._loop.remove_reader(self._socket.getsockopt(self._zmq.FD))
        self._socket.close()
        self._context.term()
        try:
            os.unlink(self.address)
        except FileNotFoundError:
            pass


def _read(body: bytes) -> dict[str, Any]:
    try:
        values = decode_json(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "BadRequest", f"no JSON: {error}") from error
    if not isinstance(values, dict):
        raise Problem(400, "BadRequest", "expected a JSON object")
    return values


def start(words: list[str]) -> Callable[[], None]:
    """Wire everything together. What is returned serves until SIGTERM.

    Raises:
        ConfigError: The command line, or a file that it names, is wrong; or as `ZmqServer`.
        LinkError: As `ZmqServer`.
    """
    options, loop = parse_options(words), Loop()

    def inform(text: str) -> None:
        if not options.quiet:
            log(_INFO, text)

    gateway = Gateway(loop, options.agent_socket, "vchan-zmq", inform)
    server = ZmqServer(loop, options, gateway)
    return partial(serve, "vchan-zmq", loop, gateway, server, inform)


def main() -> None:
    """The command."""
    run_program("vchan-zmq", USAGE, sys.argv[1:], start)


if __name__ == "__main__":
    main()
