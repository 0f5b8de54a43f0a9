"""Topics that a program serves: what comes, which method it means, and how it is answered."""

import os
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from vchan.errors import (
    BadBody,
    LimitExceeded,
    LinkError,
    NoSuchMethod,
    NotAPort,
    RequestError,
)
from vchan.io.loop import Scheduler, Timer
from vchan.io.streams import Stream, connect_local
from vchan.programs.connection import Connection
from vchan.programs.endpoints import Endpoint
from vchan.rpc.bodies import (
    FAILURE_TEXT_MAX,
    Invocation,
    decode_invocation,
    decode_raw,
    encode_failure,
    encode_json,
    exception_args,
    exception_text,
)
from vchan.rpc.in_flight import Cancelled, Deliver, Delivery
from vchan.rpc.messages import (
    NOTIFICATION,
    RAW,
    REFUSED,
    RELEASED,
    TOPICS_MAX,
    Request,
    Topic,
)

METHODS_TOLD_MAX: Final = 20
"""Methods that a caller of one that is not there is told of. At it: the others are not named."""
FAILURES_LOGGED_MAX: Final = 20
"""Failures of an agent's methods that it logs in FAILURES_PERIOD_S: who calls a method that fails
decides how often it does. At it: the others are counted, and their number is logged."""
FAILURES_PERIOD_S: Final = 10.0
"""Long enough that a log with FAILURES_LOGGED_MAX in each can be read as it grows."""


MethodAsked = tuple[Callable[..., Any], Invocation, bool]
"""What a request asks for: the method, how it is called, and whether it is quick."""


class WrongKind(BadBody):
    """A method that takes bytes was called with JSON, or the other way round. It has not run."""


class Finish:
    """What became of a method: the answer to its caller, and what the log is told of it.

    Attributes:
        refusal: In place of an answer: why it has not run.
    """

    __slots__ = ("body", "failed", "refusal", "story")

    def __init__(self, failed: bool, body: bytes, story: str = "", refusal: str = "") -> None:
        self.failed = failed
        self.body = body
        self.story = story
        self.refusal = refusal


class Failures:
    """How much of what fails is logged: see FAILURES_LOGGED_MAX."""

    def __init__(self) -> None:
        self._until_s = 0.0
        self._left = 0

    def lines(self, story: str, now_s: float) -> list[str]:
        """What to log when a method has failed."""
        lines = []
        if now_s >= self._until_s:
            if self._left < 0:
                lines.append(f"{-self._left} more methods failed (FAILURES_LOGGED_MAX)")
            self._until_s, self._left = now_s + FAILURES_PERIOD_S, FAILURES_LOGGED_MAX
        self._left -= 1
        return [*lines, story] if self._left >= 0 else lines


class Serving:
    """Topics that are served: what comes, which method it means, and how it is answered. Who has it
    says when a method runs, and where.

    Args:
        path: The daemon's socket.
        log: Told what an operator may want to know.
        work: Called when the inbox is not empty any more.
        cancelled: Told that nobody waits for a request any more.
        open_stream, random_bytes: See Connection.
        product: See `vchan.client.Agent`.

    Attributes:
        inbox: What has come and has not begun.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        path: str,
        log: Callable[[str], object],
        work: Callable[[], object],
        *,
        open_stream: Callable[[str], Stream] = connect_local,
        random_bytes: Callable[[int], bytes] = os.urandom,
        cancelled: Callable[[bytes], object] = lambda _: None,
        product: str | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._log = log
        self._work = work
        self._cancelled = cancelled
        self.connection = Connection(
            scheduler,
            path,
            product or "agent",
            self._deliver,
            self._changed,
            open_stream=open_stream,
            random_bytes=random_bytes,
            takes_raw=True,
        )
        self.inbox: deque[Request] = deque()
        self.endpoints: dict[Topic, list[Endpoint]] = {}
        self._beats: dict[bytes, Timer] = {}  # by call that is being worked on elsewhere
        self._failures = Failures()
        self._told = ""

    def add(self, topic: Topic, endpoint: Endpoint) -> None:
        """Have one more endpoint. The connection is to be told of it: `subscribe`.

        Raises:
            LimitExceeded: It would be more than TOPICS_MAX topics.
        """
        if topic not in self.endpoints and len(self.endpoints) >= TOPICS_MAX:
            raise LimitExceeded("topics", TOPICS_MAX + 1, TOPICS_MAX, "TOPICS_MAX")
        self.endpoints.setdefault(topic, []).append(endpoint)

    def subscribe(self) -> None:
        self.connection.subscribe(tuple(self.endpoints))

    def connect(self) -> None:
        """Now, and whenever the connection is lost.

        Raises:
            NotAPort: The path is no socket: to wait does not help.
        """
        try:
            self.connection.connect()
        except NotAPort:
            self.connection.close()
            raise
        except LinkError:
            pass  # it may come; `_changed` was told
        if not self.endpoints:
            self._log("serves no topic: see serve()")

    # ---------------------------------------------------------------- requests come

    def _changed(self, up: bool, reason: str) -> None:
        news = "connected" if up else reason
        if news != self._told:  # not at every attempt
            self._told = news
            self._log(news)
        if not up:
            self._drop_untaken()

    def _drop_untaken(self) -> None:
        """The daemon gives the casts we have not acknowledged to another agent, or to us again."""
        for request in [request for request in self.inbox if not request.is_call]:
            self.inbox.remove(request)
            self.connection.responder.give_back(request.id, RELEASED, "")

    def _deliver(self, delivery: Delivery) -> None:
        match delivery:
            case Deliver(request):
                self.inbox.append(request)
                if len(self.inbox) == 1:
                    # Not at once: a method that calls out lets the connection receive again.
                    self._scheduler.call_soon(self._work)
            case Cancelled(request_id):
                self.end_beat(request_id)
                self._cancelled(request_id)

    def may_begin(self, request: Request) -> bool:
        """Take responsibility for it. False: it was withdrawn, or its time is over."""
        responder = self.connection.responder
        if request.is_call:
            return request.id in responder
        if not responder.take(request.id, self._scheduler.time()):
            return False
        self.connection.flush()
        return True

    # ---------------------------------------------------------------- and are answered

    def beat(self, request: Request) -> None:
        """Say now and then that it is being worked on: its caller wants to hear it so often."""
        if request.id in self.connection.responder:
            self.connection.responder.heartbeat(request.id, self._scheduler.time())
            self._beats[request.id] = self._scheduler.call_later(
                request.monitor_ms / 2000, lambda: self.beat(request)
            )

    def end_beat(self, request_id: bytes) -> None:
        """Nobody waits for it any more: a timer would hold the request until its time came."""
        timer = self._beats.pop(request_id, None)
        if timer is not None:
            timer.cancel()

    def finish(self, request: Request, ran: Finish) -> None:
        self.end_beat(request.id)
        responder, now_s = self.connection.responder, self._scheduler.time()
        story = ran.story
        if request.is_call and ran.refusal:
            responder.refuse(request.id, REFUSED, ran.refusal)
        elif request.is_call:
            try:
                responder.answer(request.id, ran.body, failed=ran.failed, now_s=now_s)
            except LimitExceeded as error:
                failure = encode_failure("LimitExceeded", str(error))
                responder.answer(request.id, failure, failed=True, now_s=now_s)
                story = f"an answer on topic {request.topic} cannot be sent: {error}"
        if story:
            for line in self._failures.lines(story, now_s):
                self._log(line)

    def method_for(self, request: Request) -> MethodAsked:
        """What a request asks for.

        Raises:
            BadBody, NoSuchMethod: The request is wrong.
        """
        if request.flags & RAW:
            return self._raw_method_for(request)
        invocation = decode_invocation(request.body)
        return self._find(_topic_of(request, invocation), invocation)

    def _raw_method_for(self, request: Request) -> MethodAsked:
        asked, data = decode_raw(request.body)
        invocation = decode_invocation(asked)
        topic = _topic_of(request, invocation)
        method, _, is_quick = self._find(topic, invocation, is_raw=True)
        return lambda **args: method(data, **args), invocation, is_quick

    def _find(self, topic: Topic, wanted: Invocation, *, is_raw: bool = False) -> MethodAsked:
        for endpoint in self.endpoints.get(topic, ()):
            if endpoint.namespace == wanted.namespace and _compatible(
                endpoint.version, wanted.version or "1.0"
            ):
                method = getattr(endpoint.methods, wanted.method, None)
                if callable(method) and not wanted.method.startswith("_"):
                    if (wanted.method in endpoint.raw) is not is_raw:
                        use = "JSON: use call, not call_raw" if is_raw else "bytes: use call_raw"
                        raise WrongKind(f"{wanted.method} of topic {topic.name} takes {use}")
                    return method, wanted, wanted.method in endpoint.quick
        namespace = f" in namespace {wanted.namespace}" if wanted.namespace else ""
        version = f", version {wanted.version or '1.0'}"
        known = ", ".join(self._methods(topic)[:METHODS_TOLD_MAX]) or "none"
        what = f"{wanted.method}{namespace}{version}"
        raise NoSuchMethod(f"{topic.name} has no method {what}; it has {known}")

    def _methods(self, topic: Topic) -> list[str]:
        """Names that may be meant, whatever their namespaces and versions."""
        names = set()
        for endpoint in self.endpoints.get(topic, ()):
            kind = type(endpoint.methods)  # asked there, so that no property is run
            names |= {name for name in dir(kind) if callable(getattr(kind, name))}
        return sorted(name for name in names if not name.startswith("_"))


def _topic_of(request: Request, invocation: Invocation) -> Topic:
    """What the agent served it as: notifications of a priority are a topic of their own."""
    if request.flags & NOTIFICATION:
        priority = f".{invocation.method}"
        if not request.topic.endswith(priority):
            return Topic(request.exchange, request.topic + priority)
    return request.target


def _compatible(offered: str, wanted: str) -> bool:
    if offered == wanted:
        return True
    try:
        have_major, have_minor = (int(part) for part in offered.split(".")[:2])
        want_major, want_minor = (int(part) for part in wanted.split(".")[:2])
    except ValueError as error:
        raise BadBody(f"version {wanted!r} is not MAJOR.MINOR") from error
    return have_major == want_major and want_minor <= have_minor


def returned(request: Request, result: Any) -> Finish:
    """What becomes of a method that has returned this. A cast's result is nobody's.

    Raises:
        TypeError, ValueError: JSON cannot say it, or a raw method returned no bytes.
    """
    if hasattr(result, "__await__"):
        if hasattr(result, "close"):
            result.close()  # or Python warns that nobody awaited it
        advice = "await it, in a method that vchan.aio.Agent serves"
        raise TypeError(f"the method returned something to await: {advice}")
    if not request.is_call:
        return Finish(False, b"")
    if request.flags & RAW:
        if not isinstance(result, bytes | bytearray | memoryview):
            raise TypeError(f"a raw method returned {type(result).__name__}: expected bytes")
        return Finish(False, bytes(result))
    try:
        return Finish(False, encode_json(result))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"the method returned what JSON cannot say: {error}") from error


def ran_into(request: Request, error: BaseException) -> Finish:
    """What becomes of a method that has raised this. A refusal on purpose, and what is wrong with
    the request itself, has no traceback in the log."""
    import traceback  # here: it costs start-up time

    kind = type(error)
    said = exception_text(error)
    refusal = said if kind is WrongKind else ""
    lines = traceback.format_exception(error)
    body = encode_failure(
        kind.__name__,
        said,
        module=kind.__module__,
        args=exception_args(error),
        traceback=_last_of(lines),
    )
    what = f"a {'call' if request.is_call else 'cast'} to topic {request.topic} failed"
    text = f"{kind.__name__}: {said}" if isinstance(error, RequestError) else "".join(lines)
    return Finish(True, body, f"{what}: {text[-FAILURE_TEXT_MAX:].rstrip()}", refusal)


def _last_of(lines: list[str]) -> list[str]:
    """As much of a traceback as FAILURE_TEXT_MAX lets through: where it failed stands last."""
    left = FAILURE_TEXT_MAX
    kept: list[str] = []
    for line in reversed(lines):
        left -= len(line)
        if left < 0:
            kept.append("...\n")
            break
        kept.append(line)
    return kept[::-1]
