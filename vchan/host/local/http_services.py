"""Guests' HTTP requests to services under the cloud, as far as this host's configuration names them
and the policy lets this VM ask them.

The service sees who asks: the host says so in headers of its own, and passes none of the guest's
that could. Redirects are handed to the guest, never followed. Requests run on a small pool of
threads; a VM has a share of it that others' requests do not wait for.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import logging
import re
import socket
import ssl
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from http.client import HTTP_PORT, HTTPS_PORT, HTTPConnection, HTTPException
from queue import SimpleQueue
from time import monotonic
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from vchan.errors import BadBody, ConfigError, LimitExceeded
from vchan.host.faults import attempt, log_fault
from vchan.host.policy.rules import Facts
from vchan.host.vm.upward import Offer
from vchan.io.loop import Loop
from vchan.rpc import httpcall
from vchan.rpc.bodies import decode_invocation, encode_failure, encode_json
from vchan.rpc.dispatcher import Told
from vchan.rpc.httpcall import ANSWER_BODY_BYTES_MAX, ANSWER_HEADERS, HttpAnswer, HttpAsk
from vchan.rpc.in_flight import Answered, HandedBack, Outcome
from vchan.rpc.messages import BUSY, Request

LOG = logging.getLogger(__name__)

WORKERS: Final = 16
"""Requests under way at a time, of all VMs."""
RUNNING_MAX: Final = 2
"""Of one VM."""
WAITING_MAX: Final = 16
"""HTTP requests of one VM that wait for their turn. At it: Returned: BUSY."""
SERVICE_S: Final = 30.0
"""For a service to answer, from the lookup of its name to the last byte received. At it:
ServiceTimeout."""
CHUNK_BYTES: Final = 64 * 1024
"""Read of a service's answer at a time."""

INSTANCE_HEADERS: Final = ("X-Vchan-Instance-ID", "X-Instance-ID")
PROJECT_HEADERS: Final = ("X-Project-ID", "X-Tenant-ID")
SIGNATURE_HEADER: Final = "X-Instance-ID-Signature"
"""As nova's metadata service expects it of who asks in an instance's name."""


class Service(NamedTuple):
    """Where a named service is."""

    name: str
    is_tls: bool
    host: str
    port: int
    path: str
    """In front of the guest's; has no slash at its end."""


def parse_services(words: Iterable[str], where: str) -> dict[str, Service]:
    """The configured services, by name.

    Args:
        words: NAME=http://HOST[:PORT][/PATH], or https.

    Raises:
        ConfigError: One of them is something else.
    """
    services: dict[str, Service] = {}
    for word in words:
        name, _, url = word.partition("=")
        if not httpcall.is_service_name(name) or name in services:
            problem = (
                f"{_shown(word)}; expected NAME=URL, NAME once, of small letters, digits, . - and _"
            )
            raise ConfigError(where, problem)
        services[name] = _parse_service(name, url, where)
    return services


def _shown(url: str) -> str:
    """As it may be told: who writes a password into it means it to be one."""
    return repr(re.sub("//.*@", "//...@", url))


def _parse_service(name: str, url: str, where: str) -> Service:
    expected = f"{name}={_shown(url)}; expected http://HOST[:PORT][/PATH] or https://..."
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(where, expected) from error
    is_plain = not (parts.query or parts.fragment or parts.username or parts.password)
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise ConfigError(where, expected)
    path = parts.path.rstrip("/")
    if not re.fullmatch("[!-~]*", path):
        raise ConfigError(where, expected)
    is_tls = parts.scheme == "https"
    return Service(name, is_tls, parts.hostname, port or (443 if is_tls else 80), path)


class ServiceFailure(Exception):
    """No answer that can be passed on.

    Args:
        code: ServiceUnreachable, ServiceTimeout or LimitExceeded.
        text: For the guest: it says nothing of where we were.
        detail: For the log.
    """

    def __init__(self, code: str, text: str, detail: str = "") -> None:
        self.code = code
        self.text = text
        self.detail = detail or text
        super().__init__(text)


Fetch = Callable[[Service, HttpAsk, Mapping[str, str]], HttpAnswer]


def fetch(service: Service, ask: HttpAsk, stamps: Mapping[str, str]) -> HttpAnswer:
    """Do a request, whatever it takes, within SERVICE_S: from the name's lookup to the last byte.

    Raises:
        ServiceFailure: There is no answer.
    """
    deadline_s = monotonic() + SERVICE_S
    try:
        with closing(_connect(service, deadline_s)) as connected:
            connection = _StreamConnection(service, _Stream(connected, deadline_s))
            return _talk(connection, service, ask, stamps)
    except TimeoutError as error:
        text = f"{service.name} did not answer within {SERVICE_S:g} s"
        raise ServiceFailure("ServiceTimeout", text) from error
    except (OSError, HTTPException, ValueError) as error:
        text = f"{service.name} cannot be reached, or does not speak HTTP"
        detail = f"{service.host}:{service.port}: {str(error) or type(error).__name__}"
        raise ServiceFailure("ServiceUnreachable", text, detail) from error


def _talk(
    connection: HTTPConnection, service: Service, ask: HttpAsk, stamps: Mapping[str, str]
) -> HttpAnswer:
    connection.putrequest(ask.method, service.path + ask.path, skip_accept_encoding=True)
    for name, value in (*ask.headers, *stamps.items()):
        connection.putheader(name, value.encode("latin-1"))
    if ask.body or ask.method in ("POST", "PUT", "PATCH"):
        connection.putheader("Content-Length", str(len(ask.body)))
    connection.endheaders(ask.body or None)
    response = connection.getresponse()
    body = bytearray()
    while chunk := response.read1(CHUNK_BYTES):
        body += chunk
        if len(body) > ANSWER_BODY_BYTES_MAX:
            text = f"{service.name}'s answer is over {ANSWER_BODY_BYTES_MAX} bytes"
            raise ServiceFailure("LimitExceeded", text)
    headers = httpcall.known_headers(response.getheaders(), ANSWER_HEADERS)
    return HttpAnswer(response.status, headers, bytes(body))


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


class _Stream:
    """A connected socket whose every wait ends at the deadline, however many there are: a timeout
    of the socket's own begins anew with each byte that comes."""

    def __init__(self, connected: socket.socket, deadline_s: float) -> None:
        self._socket = connected
        self._deadline_s = deadline_s

    def sendall(self, data: bytes) -> None:
        """Send everything, a part at a time."""
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                self._socket.settimeout(_left_s(self._deadline_s))
                sent += self._socket.send(view[sent : sent + CHUNK_BYTES])

    def makefile(self, _: str) -> io.BufferedReader:
        """For http.client, to read from."""
        return io.BufferedReader(_DeadlineReader(self._socket, self._deadline_s), CHUNK_BYTES)

    def close(self) -> None:
        """Nothing: http.client closes it while it still reads an answer that ends with it."""


class _DeadlineReader(io.RawIOBase):
    def __init__(self, connected: socket.socket, deadline_s: float) -> None:
        super().__init__()
        self._socket = connected
        self._deadline_s = deadline_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left_s(self._deadline_s))
        return self._socket.recv_into(buffer)


class _StreamConnection(HTTPConnection):
    """HTTP on a stream that is there already, and on no other."""

    auto_open = 0

    def __init__(self, service: Service, stream: _Stream) -> None:
        super().__init__(service.host, service.port)
        self.default_port = HTTPS_PORT if service.is_tls else HTTP_PORT
        self.sock: Any = stream


def _connect(service: Service, deadline_s: float) -> socket.socket:
    """A connection to the first address of the service that takes one.

    Raises:
        OSError: There is none (TimeoutError: none in time).
    """
    addresses = _LOOKUPS.look_up(service.host, service.port, deadline_s)
    problem: OSError = OSError("the name has no address")
    for number, (family, address) in enumerate(addresses):
        # Each has its share of what is left, so that one that is silent leaves time for the next.
        share_s = _left_s(deadline_s) / (len(addresses) - number)
        connected = socket.socket(family, socket.SOCK_STREAM)
        try:
            connected.settimeout(share_s)
            connected.connect(address)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if service.is_tls:
                connected.settimeout(_left_s(deadline_s))  # of the whole handshake
                context = ssl.create_default_context()
                connected = context.wrap_socket(connected, server_hostname=service.host)
        except OSError as error:
            connected.close()
            problem = error
        except BaseException:
            connected.close()
            raise
        else:
            return connected
    raise problem


Address = tuple[int, Any]
"""(family, address), as `socket` has them."""


class Lookups:
    """Looks names up with a time limit, which the system's resolver does not have: on a thread of
    its own, one for each name at a time, so that a resolver that is stuck holds no more threads
    than there are services. Whoever asks meanwhile waits for the same. Safe from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], Future[list[Address]]] = {}

    def look_up(self, host: str, port: int, deadline_s: float) -> list[Address]:
        """The addresses of a name, now.

        Raises:
            OSError: It has none (TimeoutError: not known in time).
        """
        key = (host, port)
        with self._lock:
            found = self._running.get(key)
            if found is None:
                found = self._running[key] = Future()
                name = f"vchan-lookup {host}"
                threading.Thread(
                    target=self._run, args=(key, found), name=name, daemon=True
                ).start()
        return found.result(_left_s(deadline_s))

    def _run(self, key: tuple[str, int], found: Future[list[Address]]) -> None:
        try:
            known = socket.getaddrinfo(*key, type=socket.SOCK_STREAM)
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            problem: Exception | None = error
        else:
            problem = None
        with self._lock:
            del self._running[key]
        if problem is not None:
            found.set_exception(problem)
        else:
            found.set_result([(family, address) for family, _, _, _, address in known])


_LOOKUPS: Final = Lookups()


class _Job(NamedTuple):
    vm: str
    service: Service
    ask: HttpAsk
    stamps: Mapping[str, str]
    told: Callable[[Outcome], None]
    id: bytes


class HttpProxy:
    """See the top of this file. Belongs to the loop's thread; `close` it.

    Args:
        secret: Shared with nova's metadata service; "": nothing is signed.
        fetch: Does a request, on one of the pool's threads.
    """

    def __init__(
        self, loop: Loop, services: Mapping[str, Service], secret: str = "", fetch: Fetch = fetch
    ) -> None:
        self._loop = loop
        self._services = services
        self._secret = secret.encode()
        self._fetch = fetch
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()  # by VM, whose turn is first
        self._running: dict[str, int] = {}
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._problems: dict[str, str] = {}
        self.counters = {"http_requests": 0, "http_failed": 0, "http_busy": 0}

    def offers(self, facts: Callable[[], Facts], otherwise: Offer) -> Offer:
        """One VM's requests: HTTP is done here, everything else is for somebody else.

        The policy has been asked already.
        """
        return lambda request, told: self._offer(facts, otherwise, request, told)

    def _offer(
        self, facts: Callable[[], Facts], otherwise: Offer, request: Request, told: Told
    ) -> Callable[[], None] | None:
        if request.target != httpcall.TOPIC:
            return otherwise(request, told)
        try:
            ask = httpcall.read_ask(decode_invocation(request.body).args)
        except (BadBody, LimitExceeded):  # refused before, when the policy was asked
            return None
        service = self._services.get(ask.service)
        if service is None:
            return None
        return self._submit(facts(), service, ask, request.id, told)

    def _submit(
        self, facts: Facts, service: Service, ask: HttpAsk, request_id: bytes, told: Told
    ) -> Callable[[], None]:
        is_over = False

        def tell(outcome: Outcome) -> None:
            if not is_over:
                told(outcome, self._loop.time())

        def cancel() -> None:
            nonlocal is_over
            is_over = True
            queue = self._waiting.get(facts.uuid)
            if queue is not None and job in queue:
                queue.remove(job)

        job = _Job(facts.uuid, service, ask, self._stamps(facts), tell, request_id)
        queue = self._waiting.setdefault(facts.uuid, deque())
        if len(queue) >= WAITING_MAX:
            self.counters["http_busy"] += 1
            text = f"{WAITING_MAX} HTTP requests of this VM wait already (WAITING_MAX)"
            self._loop.call_soon(lambda: tell(HandedBack(request_id, BUSY, text)))
        else:
            self.counters["http_requests"] += 1
            queue.append(job)
            self._start_next()
        return cancel

    def _stamps(self, facts: Facts) -> dict[str, str]:
        """Who asks, by the host's word."""
        stamps = dict.fromkeys(INSTANCE_HEADERS, facts.uuid)
        if facts.project:
            stamps.update(dict.fromkeys(PROJECT_HEADERS, facts.project))
        if self._secret:
            digest = hmac.new(self._secret, facts.uuid.encode(), hashlib.sha256)
            stamps[SIGNATURE_HEADER] = digest.hexdigest()
        return stamps

    # ---------------------------------------------------------------- the pool

    def _start_next(self) -> None:
        """Start what may start, one VM after the other."""
        for vm in list(self._waiting):
            queue = self._waiting[vm]
            if not queue:
                del self._waiting[vm]
            elif sum(self._running.values()) >= WORKERS:
                return
            elif self._running.get(vm, 0) < RUNNING_MAX:
                self._running[vm] = self._running.get(vm, 0) + 1
                self._waiting.move_to_end(vm)
                self._start(queue.popleft())

    def _start(self, job: _Job) -> None:
        if sum(self._running.values()) > len(self._threads):
            name = f"vchan-http-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._loop.call_soon_threadsafe(partial(self._done, job, *self._run(job)))

    def _run(self, job: _Job) -> tuple[Outcome, str]:
        """On a thread of the pool: what came of it, and what the log should say. Whatever it fails
        with is this request's trouble: the thread serves others."""
        failed: tuple[Outcome, str] = Answered(job.id, True, encode_failure("HostFailure", "")), ""
        came, error = attempt(lambda: self._ask(job), failed)
        if error is not None:
            fault = log_fault(LOG, f"{job.vm}: unexpected, at an HTTP request", error)
            text = f"the host failed on the request: {fault}"
            return Answered(job.id, True, encode_failure("HostFailure", text)), ""
        return came

    def _ask(self, job: _Job) -> tuple[Outcome, str]:
        try:
            answer = self._fetch(job.service, job.ask, job.stamps)
        except ServiceFailure as error:
            body = encode_failure(error.code, error.text)
            return Answered(job.id, True, body), error.detail
        except Exception:  # noqa: BLE001 - the pool's thread must live, and the VM's turn must end
            body = encode_failure("InternalError", "the host failed: its log says where")
            return Answered(job.id, True, body), f"a bug: {traceback.format_exc()}"
        return Answered(job.id, False, encode_json(httpcall.answer_result(answer))), ""

    def _done(self, job: _Job, outcome: Outcome, problem: str) -> None:
        self._running[job.vm] -= 1
        if not self._running[job.vm]:
            del self._running[job.vm]
        self.counters["http_failed"] += bool(problem)
        self._note(job.service.name, problem)
        job.told(outcome)
        self._start_next()

    def _note(self, service: str, problem: str) -> None:
        """In the log once, however often guests ask."""
        if problem != self._problems.get(service, ""):
            self._problems[service] = problem
            LOG.warning("http service %s: %s", service, problem or "answers again")

    def close(self) -> None:
        """End the threads, when they have done what they do. Nobody is told any more."""
        self._waiting.clear()
        for _ in self._threads:
            self._jobs.put(None)
