"""vchan-page: a page with the state of this host, for a browser. It shows, and changes nothing.

A process of its own, so that nothing that a browser does can hold up the daemon: it asks what
`vchan list` and `vchan status VM` ask, and only while somebody looks. Whoever may connect to it
sees the names of VMs and what their agents serve: it listens on loopback or on a unix socket, and
authenticates nobody.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import BaseServer, TCPServer, ThreadingMixIn
from typing import Any, Final

from vchan import builds
from vchan.errors import ConfigError, VchanError
from vchan.host.faults import log_fault
from vchan.host.help_text import Parser
from vchan.host.ops.asking import ask
from vchan.host.ops.status_page import POLICY, Look, page
from vchan.io.streams import listen_unix
from vchan.programs.connection import HOST_SOCKET

LOG = logging.getLogger(__name__)

DEFAULT_LISTEN: Final = "127.0.0.1:9178"
SOCKET_MODE: Final = 0o660
LOOK_S: Final = 5.0
"""From one look at a daemon to the next, however many browsers look at the page: each costs the
daemon a fraction of a millisecond a VM."""
ANSWER_S: Final = 5.0
"""For a daemon's answer to each question."""
CONNECTIONS_MAX: Final = 16
"""Browsers at a time, each with a thread. At it: the connection is closed."""
IDLE_S: Final = 10.0
"""For each piece of a request, and of its answer, to pass. At it: the connection is closed."""
EXIT_OK: Final = 0
"""Ended by a signal."""
EXIT_CONFIG: Final = 2
"""Wrong arguments, or it cannot listen there. systemd does not start it again."""

HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer."""

LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""What a browser may call a server on loopback. Another name that leads here is some web page's,
which would read this one as its own."""


class Looks:
    """The last two looks at each daemon; safe from several threads."""

    def __init__(self, sockets: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._before: dict[str, Look | None] = dict.fromkeys(sockets)
        self._now: dict[str, Look] = {}

    def page(self) -> bytes:
        """The page; asks the daemons if the last look is old."""
        with self._lock:
            for path in self._before:
                last = self._now.get(path)
                if last is None or time.monotonic() - last.at_s >= LOOK_S:
                    self._before[path] = last
                    self._now[path] = _look(path)
            return page([(self._before[path], self._now[path]) for path in self._before])


def _look(path: str) -> Look:
    try:
        told = ask(path, ANSWER_S, with_vms=True)
    except VchanError as error:
        return Look(path, time.monotonic(), None, str(error))
    return Look(path, time.monotonic(), told)


class _Handler(BaseHTTPRequestHandler):
    """One request, one answer, and the connection is closed."""

    server: PageServer
    timeout = IDLE_S
    server_version = "vchan"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if not self.server.knows(self.headers.get_all("Host", [])):
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this server is not called so")
            return
        if self.path.partition("?")[0] != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "there is one page here: /")
            return
        try:
            body = self.server.looks.page()
        except Exception as error:  # noqa: BLE001  # a bug of ours: this answer is all that it costs
            log_fault(LOG, "the page could not be made", error)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "a fault of vchan-page: see its log")
            return
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", body, with_body=with_body)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        body = f"{text}\n".encode()
        with_body = self.command != "HEAD"
        self._send(status, "text/plain; charset=utf-8", body, with_body=with_body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, *, with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def send_error(self, code: int, *_: object) -> None:
        """What the library refuses: methods but GET and HEAD, requests that are none."""
        status = HTTPStatus(code)
        if status is HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self.close_connection = True
        self._refuse(status, status.phrase)

    def address_string(self) -> str:
        return "client"  # a unix socket's peer has no address

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request: a page asks for itself every few seconds."""


class PageServer(ThreadingMixIn, TCPServer):
    """Serves the page on a socket that listens already.

    Args:
        names: What clients may call it; None: anything.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listening: socket.socket, looks: Looks, names: frozenset[str] | None
    ) -> None:
        BaseServer.__init__(self, listening.getsockname(), _Handler)
        self.socket = listening
        self.looks = looks
        self._names = names
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)

    def knows(self, hosts: Sequence[str]) -> bool:
        """Whether these Host headers name this server."""
        if self._names is None:
            return True
        name = hosts[0].strip().lower() if len(hosts) == 1 else ""
        host, colon, port = name.rpartition(":")
        return (host if colon and port.isdecimal() else name) in self._names

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, if there is one to be had."""
        if not self._free.acquire(blocking=False):
            LOG.warning("%d connections at a time: one more was closed", CONNECTIONS_MAX)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, *_: object) -> None:
        """A connection that broke off costs nothing but itself; anything else is a bug of ours."""
        error = sys.exception()
        assert error is not None
        if not isinstance(error, OSError):
            log_fault(LOG, "a connection failed", error)


def listen(where: str) -> tuple[socket.socket, frozenset[str] | None]:
    """Listen, and what clients may call the server.

    Args:
        where: unix:PATH, or ADDRESS:PORT of loopback.

    Raises:
        ConfigError: It is neither, or cannot be listened on.
    """
    kind, _, path = where.partition(":")
    if kind == "unix":
        if not path.startswith("/"):
            raise ConfigError(f"--listen {where}", "expected unix:/PATH")
        try:
            listening = listen_unix(path, SOCKET_MODE)
        except VchanError as error:
            raise ConfigError(f"--listen {where}", str(error)) from error
        listening.setblocking(True)
        return listening, None
    address, _, port = where.rpartition(":")
    try:
        number = ipaddress.ip_address(address.strip("[]"))
        at = int(port) if port.isdecimal() else -1
    except ValueError:
        at = -1
    if not 0 < at < 65536:
        raise ConfigError(f"--listen {where}", "expected ADDRESS:PORT, or unix:/PATH")
    if not number.is_loopback:
        raise ConfigError(
            f"--listen {where}",
            "is not loopback, and the page asks nobody who he is: use 127.0.0.1 or unix:PATH, and "
            "before it a proxy that does",
        )
    family = socket.AF_INET if number.version == 4 else socket.AF_INET6
    listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((str(number), at))
        listening.listen(CONNECTIONS_MAX)
    except OSError as error:
        listening.close()
        raise ConfigError(f"--listen {where}", str(error)) from error
    return listening, LOCAL_NAMES


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="vchan-page",
        description=(__doc__ or "").partition(": ")[2],
        epilog="exit status: 0 ended by a signal; 2 wrong arguments, or it cannot listen there",
    )
    parser.add_argument("--version", action="version", version=builds.version_line(parser.prog))
    parser.add_argument(
        "--listen",
        metavar="ADDRESS:PORT|unix:PATH",
        default=DEFAULT_LISTEN,
        help="ADDRESS is of loopback; a unix socket is for its owner and group [%(default)s]",
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        action="append",
        help=f"of a daemon; may be given for each daemon of this host [{HOST_SOCKET}]",
    )
    return parser


def main() -> None:
    """The command."""
    options = build_parser().parse_args()
    logging.basicConfig(format="%(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_OK))
    try:
        listening, names = listen(options.listen)
    except ConfigError as error:
        sys.stderr.write(f"vchan-page: {error}\n")
        sys.exit(EXIT_CONFIG)
    with PageServer(listening, Looks(options.socket or [HOST_SOCKET]), names) as server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            sys.exit(EXIT_OK)


if __name__ == "__main__":
    main()
