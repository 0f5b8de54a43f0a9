"""vchan-http: vchan for programs of this VM in any language, over HTTP on a local socket.

    curl --unix-socket /run/vchan/http.sock http://vchan/v1/call \
        -d '{"topic": "conductor", "method": "ping", "args": {}}'

A process of its own beside vchan-guest, and an agent like others to it: light, the standard library
only. What it does is done by `Gateway` and `Leases`; here are its connections. docs/shapes.md has
the whole interface.
"""

import os
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from vchan.errors import VchanError
from vchan.gateways.gateway import LEASE_S, Done, Gateway, Members, Problem, describe
from vchan.gateways.http_wire import (
    CONTINUE,
    HEAD_BYTES_MAX,
    HEARTBEAT_EVENT,
    JSON_TYPE,
    PROBLEM_TYPE,
    BadRequest,
    HttpParser,
    HttpRequest,
    encode_event,
    encode_response,
    problem_body,
)
from vchan.gateways.leases import Leased, Subscriber
from vchan.gateways.process import serve
from vchan.guest.options import (
    EXIT_CONFIG,
    EXIT_SOCKET,
    SWITCH,
    Given,
    read_options,
    run_program,
)
from vchan.guest.stderr_log import log
from vchan.io.loop import Loop, Timer
from vchan.io.streams import Acceptor, explain, listen_unix
from vchan.programs.connection import AGENT_SOCKET
from vchan.rpc import httpcall
from vchan.rpc.bodies import decode_json

DEFAULT_LISTEN: Final = "unix:/run/vchan/http.sock"
DEFAULT_CONFIG: Final = "/etc/vchan/http.conf"
DEFAULTS: Final = {
    "listen": DEFAULT_LISTEN,
    "socket-mode": "0660",
    "token-file": "",
    "allow-uids": "",
    "agent-socket": AGENT_SOCKET,
    "quiet": SWITCH,
}

CONNECTIONS_MAX: Final = 64
"""Open connections of programs. At it: the next one is answered 503 and closed."""
BODIES_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bodies of requests on all connections that are not answered. At it: 503."""
OUT_BYTES_MAX: Final = 256 * 1024
"""Events that one stream's client has not read. At it: the client gets no more until it has."""
REQUEST_S: Final = 30.0
"""From a request's first byte to its last; and for a client to read a response."""
IDLE_S: Final = 75.0
"""Between requests of a connection."""
EVENT_S: Final = 15.0
"""On a stream of events something is said so often at least."""
EVENTS_ROOM: Final = 16
LINGER_S: Final = 2.0
"""Who is refused in the middle of a request may say the rest, so that it reads why."""
READ_BYTES: Final = 64 * 1024
"""Read of a connection at a time."""

_ERROR, _INFO = 3, 6
_CREDENTIALS: Final = struct.Struct("3i")
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")

USAGE: Final = f"""\
usage: vchan-http [--config FILE] [--listen unix:PATH | tcp:127.0.0.1:PORT] [--socket-mode MODE]
                  [--token-file FILE] [--allow-uids UID,...] [--agent-socket PATH] [--quiet]

  --config FILE        read these options from FILE ({DEFAULT_CONFIG} if it is there)
  --listen ADDRESS     where programs connect [{DEFAULT_LISTEN}]
  --socket-mode MODE   permissions of the unix socket, octal [0660]
  --token-file FILE    who connects must send the token in FILE: "Authorization: Bearer TOKEN".
                       Must be given with tcp, where anybody on this machine can connect.
                       Others than its owner and group must not be able to read FILE
  --allow-uids UID,... users who may use the unix socket, besides root and who runs this
                       [all whom its permissions let]
  --agent-socket PATH  of vchan-guest [{AGENT_SOCKET}]
  --quiet              log errors only
  --version, --help

exit status: 0 ended by a signal; {EXIT_CONFIG} wrong arguments or configuration;
{EXIT_SOCKET} the address cannot be listened on
"""


class Options(NamedTuple):
    """What the program is told."""

    listen: str = DEFAULT_LISTEN
    socket_mode: int = 0o660
    token: str = ""
    uids: frozenset[int] = frozenset()
    agent_socket: str = AGENT_SOCKET
    quiet: bool = False


def parse_options(arguments: list[str]) -> Options:
    """The options in a command line and in the configuration file.

    Raises:
        ConfigError: One of them is wrong.
    """
    values = read_options(arguments, DEFAULTS, DEFAULT_CONFIG, "vchan-http")
    listen = values["listen"]
    kind, _, name = listen.value.partition(":")
    if kind == "tcp":
        host, port = _tcp_address(name)
        if host not in _LOOPBACK or not port:
            raise listen.wrong("expected tcp:127.0.0.1:PORT or tcp:[::1]:PORT: never the network")
        if not values["token-file"].value:
            raise listen.wrong("needs a token-file: anybody on this machine can connect to tcp")
    elif kind != "unix" or not name.startswith("/"):
        raise listen.wrong("expected unix:/PATH or tcp:127.0.0.1:PORT")
    uids = values["allow-uids"]
    if not all(word.isdecimal() for word in uids.words()):
        raise uids.wrong("expected numbers of users, with commas")
    return Options(
        listen.value,
        values["socket-mode"].mode(),
        _read_token(values["token-file"]),
        frozenset(map(int, uids.words())),
        values["agent-socket"].path(),
        values["quiet"].is_yes,
    )


def _tcp_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    is_port = port.isdecimal() and 0 < int(port) < 65536
    return host.removeprefix("[").removesuffix("]"), int(port) if is_port else 0


def _require_secret(fd: int, given: Given) -> None:
    """That its owner and group alone can read it, and its owner alone change it."""
    found = os.fstat(fd)
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o026:
        owner = f"uid {found.st_uid}, mode {found.st_mode & 0o7777:04o}"
        problem = f"others can read or change it ({owner})"
        raise given.wrong(f"{problem}: chown root and chmod 0640 it, or 0600")


def _read_token(given: Given) -> str:
    if not given.value:
        return ""
    try:
        with open(given.value, encoding="ascii") as file:
            _require_secret(file.fileno(), given)
            token = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise given.wrong(f"cannot be read: {error}") from error
    if not 16 <= len(token) <= 512 or not token.isprintable() or " " in token:
        raise given.wrong("expected one token of 16 to 512 characters in it")
    return token


class HttpServer:
    """Listens, and keeps the connections.

    Raises:
        LinkError: The address cannot be listened on.
    """

    def __init__(
        self, loop: Loop, options: Options, gateway: Gateway, log: Callable[[int, str], None]
    ) -> None:
        self.loop = loop
        self.gateway = gateway
        self.log = log
        self.token = options.token
        self.body_bytes = 0
        self._uids = options.uids
        self._connections: set[_HttpConnection] = set()
        self._kind, _, self._name = options.listen.partition(":")
        self._acceptor = Acceptor(
            loop, self._listen(options.socket_mode), self._accepted, partial(log, _ERROR)
        )
        self._acceptor.resume()

    def _listen(self, mode: int) -> socket.socket:
        if self._kind == "unix":
            return listen_unix(self._name, mode)
        host, port = _tcp_address(self._name)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise explain(self._name, error, "address") from error
        listener.setblocking(False)
        return listener

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"{self._kind}:{self._name}"

    def _accepted(self, connected: socket.socket, _: object) -> None:
        connected.setblocking(False)
        connection = _HttpConnection(self, connected, is_known=self._is_known(connected))
        self._connections.add(connection)
        if len(self._connections) > CONNECTIONS_MAX:
            text = f"{CONNECTIONS_MAX} connections are open (CONNECTIONS_MAX)"
            self.log(_ERROR, f"refused a connection: {text}")
            connection.refuse(Problem(503, "Busy", text), linger=False)

    def _is_known(self, connected: socket.socket) -> bool:
        """Whether this user may be served, by the kernel's word. Tokens are another matter."""
        if not self._uids or self._kind != "unix":
            return True
        raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        if uid in self._uids or uid in (0, os.geteuid()):
            return True
        self.log(_ERROR, f"refused pid {pid}: uid {uid} is not among allow-uids")
        return False

    def forget(self, connection: "_HttpConnection") -> None:
        """It is closed."""
        self._connections.discard(connection)

    def close(self) -> None:
        """Close everything, and remove the socket."""
        self._acceptor.close()
        for connection in list(self._connections):
            connection.close()
        if self._kind == "unix":
            try:
                os.unlink(self._name)
            except FileNotFoundError:
                pass


class _HttpConnection:
    """One client. A request at a time: the next is looked at when the answer has been read."""

    def __init__(self, server: HttpServer, connected: socket.socket, *, is_known: bool) -> None:
        self._server = server
        self._loop = server.loop
        self._socket = connected
        self._is_known = is_known
        self._parser = HttpParser()
        self._reserved = 0  # of BODIES_BYTES_MAX
        self._request: HttpRequest | None = None
        self._withdraw: Callable[[], None] | None = None
        self._events: Subscriber | None = None
        self._out = bytearray()
        self._waits_to_write = False
        self._closes = False  # when everything is written
        self._lingers = False  # before that
        self._is_closed = False
        self._timer: Timer | None = None
        self._set_timer(REQUEST_S)
        self._loop.add_reader(connected.fileno(), self._readable)

    # ---------------------------------------------------------------- reading

    def _read(self) -> bytes:
        """What has come. Nothing more to come: the connection is closed."""
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.close()
        return data

    def _readable(self) -> None:
        data = self._read()
        if not data:
            return
        self._parser.feed(data)
        if self._request is not None or self._out:
            if self._parser.buffered > HEAD_BYTES_MAX:
                self.close()  # it sends on and on, and waits for no answer
        else:
            self._next()

    def _next(self) -> None:
        """Look for a request, and do it."""
        if self._is_closed or self._closes:
            return
        try:
            self._request = self._parser.next()
        except BadRequest as error:
            self.refuse(Problem(error.status, "BadRequest", error.detail))
            return
        if self._request is not None:
            self._cancel_timer()
            self._handle(self._request)
        elif not self._reserve(self._parser.expected_body):
            self.refuse(Problem(503, "Busy", "too much is under way (BODIES_BYTES_MAX)"))
        elif self._parser.wants_continue:
            self._parser.wants_continue = False
            self._write(CONTINUE)

    def _reserve(self, size: int) -> bool:
        more = size - self._reserved
        if self._server.body_bytes + more > BODIES_BYTES_MAX:
            return False
        self._server.body_bytes += more
        self._reserved = size
        return True

    def _handle(self, request: HttpRequest) -> None:
        try:
            self._check_who(request)
            if request.path.startswith("/proxy/"):
                self._proxy(request)
            elif request.path == "/v1/events":
                self._begin_events(request)
            else:
                self._ask(request)
        except Problem as problem:
            self._told(problem)

    def _check_who(self, request: HttpRequest) -> None:
        if not self._is_known:
            raise Problem(403, "Forbidden", "this user is not among allow-uids of vchan-http")
        token = self._server.token
        if token:
            from hmac import compare_digest  # here: it costs start-up time

            given = request.headers.get("authorization", "").encode("latin-1")
            if not compare_digest(given, f"Bearer {token}".encode()):
                raise Problem(401, "Unauthorized", "send Authorization: Bearer TOKEN")

    # ---------------------------------------------------------------- what is asked

    def _ask(self, request: HttpRequest) -> None:
        version, _, verb = request.path.removeprefix("/").partition("/")
        if version != "v1" or verb not in self._server.gateway.verbs:
            raise Problem(404, "NoSuchPath", f"there is no {request.path[:80]}")
        expected = "GET" if verb == "status" else "POST"
        if request.method != expected:
            raise Problem(405, "MethodNotAllowed", f"{request.path} takes {expected}")
        self._withdraw = self._server.gateway.ask(verb, _read_json(request.body), self._told)

    def _told(self, answer: Done | Problem) -> None:
        self._withdraw = None
        if isinstance(answer, Problem):
            body = problem_body(answer.status, answer.code, answer.detail, answer.extra)
            self._respond(answer.status, body, {"Content-Type": PROBLEM_TYPE})
        elif answer.body:
            self._respond(200, answer.body, {"Content-Type": JSON_TYPE})
        else:
            self._respond(204)

    def _respond(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        if self._is_closed:
            return
        request, self._request = self._request, None
        keeps_open = request is not None and request.keeps_open and not self._closes
        is_head = request is not None and request.method == "HEAD"
        self._closes = not keeps_open
        self._reserve(0)
        self._set_timer(REQUEST_S)
        self._write(encode_response(status, body, headers, keeps_open=keeps_open, is_head=is_head))

    def refuse(self, problem: Problem, *, linger: bool = True) -> None:
        """Say why nothing more is taken from this client, and close."""
        self._closes, self._lingers = True, linger
        self._loop.add_reader(self._socket.fileno(), self._read)  # it is dropped
        self._told(problem)

    def _end(self) -> None:
        """Everything is said."""
        if not self._lingers or self._is_closed:
            self.close()
            return
        # To close with something unread would be to reset: who is refused might not read why.
        self._lingers = False
        self._set_timer(LINGER_S)
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    # ---------------------------------------------------------------- events

    def _begin_events(self, request: HttpRequest) -> None:
        if request.method != "GET":
            raise Problem(405, "MethodNotAllowed", "/v1/events takes GET")
        members = Members(_read_query(request.query))
        gateway = self._server.gateway
        subscriber, _ = gateway.read_subscriber(members, EVENTS_ROOM, self._give_event)
        members.end()
        self._events = subscriber
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        self._write(encode_response(200, headers=headers, keeps_open=False, has_length=False))
        self._event_heartbeat()
        gateway.leases.attach(subscriber, self._loop.time())

    def _give_event(self, leased: Leased) -> None:
        self._write(encode_event("request", leased.lease, describe(leased)))
        if self._events is not None and len(self._out) > OUT_BYTES_MAX:
            self._events.is_slow = True

    def _event_heartbeat(self) -> None:
        self._set_timer(EVENT_S, self._event_heartbeat)
        if self._waits_to_write:
            self.close()  # it has read nothing for so long
        else:
            self._write(HEARTBEAT_EVENT)

    # ---------------------------------------------------------------- services under the cloud

    def _proxy(self, request: HttpRequest) -> None:
        service, slash, path = request.target.removeprefix("/proxy/").partition("/")
        headers = httpcall.known_headers(request.headers.items(), httpcall.ASK_HEADERS)
        ask = httpcall.HttpAsk(service, request.method, slash + path, headers, request.body)
        args = httpcall.ask_args(ask)
        self._withdraw = self._server.gateway.ask("http", args, self._told_by_service)

    def _told_by_service(self, answer: Done | Problem) -> None:
        self._withdraw = None
        if isinstance(answer, Problem):
            self._told(answer)
            return
        try:
            said = httpcall.read_answer(decode_json(answer.body))
        except (ValueError, RecursionError, VchanError) as error:
            self._told(Problem(502, "BadReply", f"the host's answer is not well formed: {error}"))
            return
        self._respond(said.status, said.body, {name.title(): text for name, text in said.headers})

    # ---------------------------------------------------------------- writing

    def _write(self, data: bytes) -> None:
        self._out += data
        if not self._waits_to_write:
            self._flush()

    def _flush(self) -> None:
        while self._out:
            try:
                taken = self._socket.send(self._out[:READ_BYTES])
            except BlockingIOError:
                if not self._waits_to_write:
                    self._waits_to_write = True
                    self._loop.add_writer(self._socket.fileno(), self._flush)
                return
            except OSError:
                self._loop.call_soon(self.close)
                return
            del self._out[:taken]
        if self._waits_to_write:
            self._waits_to_write = False
            self._loop.remove_writer(self._socket.fileno())
        self._written()

    def _written(self) -> None:
        """Everything is: go on."""
        if self._closes:
            self._loop.call_soon(self._end)
        elif self._events is not None:
            if self._events.is_slow:
                self._events.is_slow = False
                self._server.gateway.leases.has_room(self._events, self._loop.time())
        elif self._request is None:
            self._set_timer(REQUEST_S if self._parser.buffered else IDLE_S)
            self._loop.call_soon(self._next)

    # ---------------------------------------------------------------- time and the end

    def _set_timer(self, delay_s: float, then: Callable[[], None] | None = None) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(delay_s, then or self.close)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Close it; nobody waits for what it asked. Harmless twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._cancel_timer()
        self._reserve(0)
        self._loop.remove_reader(self._socket.fileno())
        if self._waits_to_write:
            self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._server.forget(self)
        if self._withdraw is not None:
            self._withdraw()
        if self._events is not None:
            self._server.gateway.leases.detach(self._events, self._loop.time())


def _read_json(body: bytes) -> object:
    if not body:
        return {}
    try:
        return decode_json(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "BadRequest", f"the body is no JSON: {error}") from error


def _read_query(query: str) -> dict[str, object]:
    """topic=A&topic=B&max=16&lease_s=60, as `Members` has it."""
    from urllib.parse import parse_qsl  # here: it costs start-up time

    values: dict[str, object] = {"topics": [], "lease_s": LEASE_S}
    topics: list[str] = []
    for name, text in parse_qsl(query, keep_blank_values=True, max_num_fields=100):
        if name == "topic":
            topics.append(text)
        elif name in ("max", "lease_s"):
            values[name] = _number(name, text)
        else:
            raise Problem(400, "BadMember", f"unknown: {name[:80]}")
    values["topics"] = topics
    return values


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Problem(400, "BadMember", f"{name}: expected a number") from None


def start(words: list[str]) -> Callable[[], None]:
    """Wire everything together. What is returned serves until SIGTERM.

    Raises:
        ConfigError: The command line, or a file that it names, is wrong.
        LinkError: The address cannot be listened on.
    """
    options, loop = parse_options(words), Loop()

    def say(priority: int, text: str) -> None:
        if priority < _INFO or not options.quiet:
            log(priority, text)

    inform = partial(say, _INFO)
    gateway = Gateway(loop, options.agent_socket, "vchan-http", inform)
    server = HttpServer(loop, options, gateway, say)
    return partial(serve, "vchan-http", loop, gateway, server, inform)


def main() -> None:
    """The command."""
    run_program("vchan-http", USAGE, sys.argv[1:], start)


if __name__ == "__main__":
    main()
