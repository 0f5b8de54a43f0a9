"""Requests and answers whose bodies are bytes: end to end, over sockets, and what refuses them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rig.gates import OpenGate
from tests.rig.older import older_session
from tests.unit.oslo_site import VM, Site, made_site, om
from vchan import aio
from vchan.client import Agent, Client, raw
from vchan.errors import (
    BadBody,
    ConfigError,
    LimitExceeded,
    LinkError,
    NoSuchAgent,
    Rejected,
    RemoteError,
)
from vchan.host.oslo_wire.downward_envelope import cut_context
from vchan.host.oslo_wire.envelope import REQUEST_BYTES_MAX, EnvelopeError
from vchan.host.oslo_wire.upward_envelope import read
from vchan.host.vm.upward import NO_RAW_TO_BROKER, Upward
from vchan.io import local_socket
from vchan.rpc import httpcall
from vchan.rpc.arguments import raw_methods
from vchan.rpc.bodies import decode_raw, encode_invocation, encode_raw, mark_redelivered
from vchan.rpc.in_flight import (
    NO_RAW,
    Answered,
    Deliver,
    HandedBack,
    Outcome,
    Requester,
    Responder,
)
from vchan.rpc.messages import (
    AGENT_GONE,
    CALL,
    FAILURE,
    FANOUT,
    FINAL,
    NOTIFICATION,
    RAW,
    RAW_REPLY,
    REDELIVERED,
    REFUSED,
    BadMessage,
    Reply,
    Request,
    Returned,
    decode,
    encode,
)
from vchan.session import MESSAGE_BYTES_MAX, Config, Session
from vchan.testing import FakeGuest
from vchan.wire.frames import PLAIN_PAYLOADS, RAW_BODIES, RAW_REQUESTS

EVERY_BYTE = bytes(range(256))
ID = b"i" * 16
CALL_S = 60.0


class Endpoint:
    """An agent's methods, or a program's."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.kept: list[bytes] = []

    @raw
    def keep(self, data: bytes, name: str = "") -> str:
        """For casts: what it returns is nobody's."""
        self.ran.append(f"keep {name}")
        self.kept.append(data)
        return name

    @raw
    def turn(self, data: bytes, times: int = 1) -> bytes:
        """Its bytes, from the end."""
        self.ran.append("turn")
        return data[::-1] if times % 2 else data

    @raw
    def give(self, data: bytes, size: int) -> Any:
        """So many of them, in another form of bytes."""
        return memoryview(EVERY_BYTE * (size // 256))

    @raw
    def wrong(self, data: bytes) -> Any:
        """No bytes."""
        return "text"

    @raw
    def fail(self, data: bytes) -> bytes:
        """Raise."""
        raise KeyError(len(data))

    def plain(self, x: Any = None) -> Any:
        """An ordinary one."""
        self.ran.append("plain")
        return x


class Stock:
    """An oslo.messaging server's methods."""

    def plain(self, context: Any, x: Any = None) -> Any:
        """As above."""
        return x


class AsyncEndpoint:
    """For asyncio."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    @raw
    async def keep(self, data: bytes) -> None:
        """For casts."""
        self.kept.append(data)

    @raw
    async def turn(self, data: bytes, times: int = 1) -> bytes:
        """As above."""
        await asyncio.sleep(0)
        return data[::-1] if times % 2 else data

    async def plain(self, x: Any = None) -> Any:
        """As above."""
        return x


@contextmanager
def running(
    path: str, topic: str, endpoint: object, workers: int = 0, *, older: int | None = None
) -> Iterator[Agent]:
    """An agent on a thread of its own; `older`: of a release that has these features."""
    agent = Agent(path, workers=workers, log=lambda _: None)
    if older is not None:
        agent._connection._session = of_a_release(agent._connection._session.config, older)
    agent.serve(topic, endpoint)
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join(CALL_S)


@pytest.fixture
def site() -> Iterator[Site]:
    with made_site() as site:
        site.start_guest()
        yield site


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


@pytest.fixture
def served(site: Site, endpoint: Endpoint) -> Iterator[Client]:
    """An agent in the guest, and a client on the host."""
    with running(f"{site.directory}/agent.sock", "files", endpoint):
        site.wait_served("files")
        with Client(site.host.path) as client:
            yield client


# ---------------------------------------------------------------- end to end


@pytest.mark.parametrize("size", [0, 1, 65_536, 98_304, 1_000_000])
def test_bytes_go_into_a_guest_and_come_back(served: Client, size: int) -> None:
    data = (EVERY_BYTE * (size // 256 + 1))[:size]
    answer = served.call_raw("files", "turn", data, server=VM, timeout_s=CALL_S)
    assert isinstance(answer, bytes)
    assert answer[::-1] == data or pytest.fail("altered")
    same = served.call_raw("files", "turn", data, {"times": 2}, server=VM, timeout_s=CALL_S)
    assert same == data or pytest.fail("altered")


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_bytes_of_any_form(served: Client, form: Callable[[bytes], Any]) -> None:
    assert served.call_raw("files", "turn", form(b"\x00\xff"), server=VM) == b"\xff\x00"
    assert served.call_raw("files", "give", args={"size": 512}, server=VM) == EVERY_BYTE * 2


def test_an_agent_with_threads(site: Site) -> None:
    with running(f"{site.directory}/agent.sock", "files", Endpoint(), workers=2):
        site.wait_served("files")
        with Client(site.host.path) as client:
            assert client.call_raw("files", "turn", b"ab", server=VM) == b"ba"


def test_asyncio_at_both_ends(site: Site) -> None:
    async def talk() -> None:
        agent = aio.Agent(f"{site.directory}/agent.sock", log=lambda _: None)
        endpoint = AsyncEndpoint()
        agent.serve("files", endpoint)
        task = asyncio.create_task(agent.run())
        await asyncio.to_thread(site.wait_served, "files")
        async with aio.Client(site.host.path) as client:
            await client.cast_raw("files", "keep", EVERY_BYTE, server=VM)
            assert await client.call_raw("files", "turn", EVERY_BYTE, server=VM) == EVERY_BYTE[::-1]
            assert endpoint.kept == [EVERY_BYTE]
            with pytest.raises(Rejected, match="turn of topic files takes bytes: use call_raw"):
                await client.call("files", "turn", server=VM)
            with pytest.raises(Rejected, match="plain of topic files takes JSON: use call"):
                await client.call_raw("files", "plain", server=VM)
        agent.stop()
        await task

    asyncio.run(talk())


def test_out_of_a_guest_to_a_program_of_the_host(site: Site, endpoint: Endpoint) -> None:
    with (
        running(str(site.host.path), "store", endpoint),
        Client(f"{site.directory}/agent.sock") as client,
        Client(site.host.path) as neighbour,
    ):
        wait_for(lambda: neighbour.call("store", "plain", {"x": 1}) == 1)
        for size in (0, 100, 200_000):
            data = (EVERY_BYTE * 1000)[:size]
            answer = client.call_raw("store", "turn", data, {"times": 3}, timeout_s=CALL_S)
            assert answer[::-1] == data or pytest.fail("altered")
        assert neighbour.call_raw("store", "turn", b"ab") == b"ba"  # from program to program
        with pytest.raises(Rejected, match="takes JSON"):
            client.call_raw("store", "plain")
        client.cast_raw("store", "keep", b"\x00\xff", {"name": "a"})
        assert client.call_raw("store", "turn", b"ab") == b"ba"  # behind it
        assert endpoint.kept == [b"\x00\xff"]


@pytest.mark.parametrize("size", [0, 1, 200_000])
def test_bytes_are_cast_into_a_guest(served: Client, endpoint: Endpoint, size: int) -> None:
    data = (EVERY_BYTE * (size // 256 + 1))[:size]
    served.cast_raw("files", "keep", data, {"name": "a"}, server=VM)
    assert served.call_raw("files", "turn", b"ab", server=VM) == b"ba"  # behind it
    assert endpoint.kept == [data] or pytest.fail("altered")
    assert endpoint.ran == ["keep a", "turn"]


def test_a_raw_cast_to_a_method_that_takes_json_does_not_run(
    served: Client, endpoint: Endpoint
) -> None:
    served.cast_raw("files", "plain", b"x", server=VM)  # nobody hears of that: the log does
    assert served.call("files", "plain", {"x": 2}, server=VM) == 2
    assert endpoint.ran == ["plain"]


def test_who_takes_raw_calls_alone_is_sent_no_raw_cast(site: Site, endpoint: Endpoint) -> None:
    older = PLAIN_PAYLOADS | RAW_BODIES
    with ExitStack() as stack:
        path = f"{site.directory}/agent.sock"
        stack.enter_context(running(path, "files", endpoint, older=older))
        site.wait_served("files")
        caller = stack.enter_context(Client(site.host.path))
        assert caller.call_raw("files", "turn", b"ab", server=VM) == b"ba"
        with pytest.raises(Rejected, match="takes raw calls, but no raw casts: upgrade its vchan"):
            caller.cast_raw("files", "keep", b"x", server=VM)
        assert caller.call_raw("files", "turn", b"ab", server=VM) == b"ba"
        channel = site.host.channel
        site.host.run(lambda: make_older(channel, older))
        stack.enter_context(running(str(site.host.path), "store", endpoint))
        inside = stack.enter_context(Client(f"{site.directory}/agent.sock"))
        wait_for(lambda: inside.call("store", "plain", {"x": 1}) == 1)
        with pytest.raises(Rejected, match="takes raw calls, but no raw casts: upgrade its vchan"):
            inside.cast_raw("store", "keep", b"x")
    assert endpoint.kept == []


def test_what_nobody_serves(site: Site) -> None:
    with Client(f"{site.directory}/agent.sock") as client, pytest.raises(NoSuchAgent):
        client.call_raw("store", "turn", b"x")
    with Client(site.host.path) as client, pytest.raises(NoSuchAgent):
        client.call_raw("store", "turn", b"x", server=VM)


def wait_for(reached: Callable[[], bool]) -> None:
    """Until a program is there."""
    while True:
        try:
            if reached():
                return
        except NoSuchAgent:
            pass


# ---------------------------------------------------------------- what fails


def test_a_raw_methods_failure_is_a_failure(served: Client) -> None:
    with pytest.raises(RemoteError, match="KeyError: 3"):
        served.call_raw("files", "fail", b"abc", server=VM)
    with pytest.raises(RemoteError, match="TypeError: a raw method returned str: expected bytes"):
        served.call_raw("files", "wrong", b"abc", server=VM)
    with pytest.raises(RemoteError, match=r"TypeError: .*unexpected keyword argument"):
        served.call_raw("files", "turn", b"", {"what": 1}, server=VM)
    with pytest.raises(RemoteError, match="NoSuchMethod"):
        served.call_raw("files", "none", b"", server=VM)


def test_the_wrong_kind_is_refused_and_has_not_run(served: Client, endpoint: Endpoint) -> None:
    with pytest.raises(Rejected, match="plain of topic files takes JSON: use call, not call_raw"):
        served.call_raw("files", "plain", b"abc", server=VM)
    with pytest.raises(Rejected, match="turn of topic files takes bytes: use call_raw"):
        served.call("files", "turn", {"times": 2}, server=VM)
    served.cast("files", "turn", {"times": 2}, server=VM)  # nobody hears of that: the log does
    assert served.call("files", "plain", {"x": 2}, server=VM) == 2
    assert endpoint.ran == ["plain"]


def test_the_daemons_own_methods_take_json(served: Client, site: Site) -> None:
    with pytest.raises(Rejected, match=r"vchan\.guest take JSON"):
        served.call_raw("vchan.guest", "ping", server=VM)
    with pytest.raises(Rejected, match=r"vchan\.host take JSON"):
        served.call_raw("vchan.host", "list", exchange="x")
    with pytest.raises(Rejected, match=r"vchan\.guest take JSON"):
        served.cast_raw("vchan.guest", "ping", server=VM)
    with pytest.raises(Rejected, match=r"vchan\.host take JSON"):
        served.cast_raw("vchan.host", "list", exchange="x")


def test_an_oslo_caller_of_a_raw_method_is_refused(site: Site, served: Client) -> None:
    caller = site.client(site.host_url, "files", server=VM)
    with pytest.raises(om.MessageDeliveryFailure, match="takes bytes: use call_raw"):
        caller.call({}, "turn", times=1)


def test_an_oslo_server_takes_no_raw_body(site: Site) -> None:
    site.serve(site.agent_url, Stock(), topic="stock")
    site.wait_served("stock")
    with Client(site.host.path) as client:
        assert client.call("stock", "plain", {"x": 1}, server=VM) == 1
        with pytest.raises(Rejected, match="takes no raw bodies: upgrade its vchan"):
            client.call_raw("stock", "plain", b"x", server=VM)


def test_more_than_a_message_holds(served: Client) -> None:
    with pytest.raises(LimitExceeded, match="MESSAGE_BYTES_MAX"):
        served.call_raw("files", "turn", bytes(MESSAGE_BYTES_MAX), server=VM)
    with pytest.raises(RemoteError, match="LimitExceeded"):
        served.call_raw("files", "give", args={"size": MESSAGE_BYTES_MAX}, server=VM)
    assert served.call_raw("files", "turn", b"ab", server=VM) == b"ba"


@pytest.mark.parametrize("data", ["text", None, 5, [1]])
def test_what_is_no_bytes_is_not_sent(served: Client, data: Any) -> None:
    with pytest.raises(ConfigError, match=r"data: .* is not bytes"):
        served.call_raw("files", "turn", data, server=VM)


# ---------------------------------------------------------------- peers of an older release


def test_an_older_guest_is_named(endpoint: Endpoint) -> None:
    with made_site() as site:
        site.guest_module = "tests.rig.older"
        site.start_guest()
        with (
            running(f"{site.directory}/agent.sock", "files", endpoint),
            Client(f"{site.directory}/agent.sock") as inside,
            Client(site.host.path) as outside,
        ):
            site.wait_served("files")
            with pytest.raises(Rejected, match=r"vchan-guest takes no raw bodies: upgrade it"):
                outside.call_raw("files", "turn", b"x", server=VM)
            with pytest.raises(Rejected, match=r"agent\.sock: .*no raw bodies: upgrade vchan"):
                inside.call_raw("store", "turn", b"x")
            assert outside.call("files", "plain", {"x": "y" * 100_000}, server=VM)[1:3] == "yy"
    assert endpoint.ran == ["plain"]


def test_an_older_host_is_named(site: Site) -> None:
    channel = site.host.channel
    site.host.run(lambda: make_older(channel))
    with running(str(site.host.path), "store", Endpoint()), ExitStack() as stack:
        client = stack.enter_context(Client(f"{site.directory}/agent.sock"))
        neighbour = stack.enter_context(Client(site.host.path))
        wait_for(lambda: neighbour.call("store", "plain", {"x": 1}) == 1)
        wait_for(lambda: client.call("store", "plain", {"x": 1}) == 1)
        with pytest.raises(Rejected, match="the host takes no raw bodies: upgrade vchan-host"):
            client.call_raw("store", "turn", b"x")


def of_a_release(config: Config, features: int) -> Session:
    """A session of one that had these; without any, its frames are small, too."""

    def entropy(size: int) -> bytes:
        return b"n" * size

    if not features:
        return older_session(config, entropy)
    return Session(config._replace(features=features), entropy)


def make_older(channel: Any, features: int = 0) -> None:
    """The next session of a channel is of an older release."""
    channel._session = of_a_release(channel._session.config, features)
    channel._link._fail("the daemon was replaced by an older one")


def test_an_older_daemon_says_so_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site.host.down()
    monkeypatch.setattr(local_socket, "Session", older_session)
    site.host.up()
    with Client(site.host.path) as client:
        with pytest.raises(Rejected, match=r"host\.sock: .* takes no raw bodies: upgrade vchan"):
            client.call_raw("files", "turn", b"x", server=VM)
        with pytest.raises(LinkError):
            Client(tmp_path / "none")


def test_an_older_agent_is_named(site: Site) -> None:
    with ExitStack() as stack:
        path = f"{site.directory}/agent.sock"
        stack.enter_context(running(path, "files", Endpoint(), older=0))
        site.wait_served("files")
        caller = stack.enter_context(Client(site.host.path))
        with pytest.raises(Rejected, match="the agent that serves this topic takes no raw bodies"):
            caller.call_raw("files", "turn", b"x", server=VM)


# ---------------------------------------------------------------- bodies


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_raw_body_is_read_as_it_was_written(invocation: bytes, data: bytes) -> None:
    body = encode_raw(invocation, data)
    assert decode_raw(body) == (invocation, data)
    for cut in range(min(len(body), 4 + len(invocation))):
        with pytest.raises(BadBody, match="shorter than it says"):
            decode_raw(body[:cut])


def test_which_methods_are_raw() -> None:
    assert raw_methods(Endpoint()) == {"keep", "turn", "give", "wrong", "fail"}
    assert raw_methods(AsyncEndpoint()) == {"keep", "turn"}
    assert raw_methods(object()) == frozenset()

    class Static:
        @raw
        @staticmethod
        def above(data: bytes) -> bytes:
            return data

        @classmethod
        @raw
        def below(cls, data: bytes) -> bytes:
            return data

    assert raw_methods(Static()) == {"above", "below"}


def test_only_a_call_or_a_cast_to_one_may_be_raw() -> None:
    request = Request(ID, RAW | CALL, 0, 0, "e", "t", "", encode_raw(b"{}", b""))
    for flags in (RAW | CALL, RAW, RAW | REDELIVERED):
        asked = request.changed(flags=flags)
        assert decode(encode(asked)) == asked
    for flags in (RAW | FANOUT, RAW | NOTIFICATION | REDELIVERED):
        assert isinstance(decode(encode(request.changed(flags=flags))), BadMessage)


# ---------------------------------------------------------------- in flight


class Line:
    """A requester and a responder."""

    def __init__(self, no_raw: str = "") -> None:
        self.to_responder: list[Any] = []
        self.to_requester: list[Any] = []
        self.requester = Requester(lambda data, _: self.to_responder.append(decode(data)))
        self.responder = Responder(lambda data, _: self.to_requester.append(decode(data)))
        takes_raw = 0 if no_raw else RAW_REQUESTS
        self.requester.opened(0.0, takes_raw=takes_raw, no_raw=no_raw)

    def submit(self, flags: int) -> None:
        self.requester.submit(Request(ID, flags, 0, 0, "e", "t", "", b"body"), 0.0)
        for message in self.to_responder:
            for delivery in self.responder.receive(message, 0.0):
                assert isinstance(delivery, Deliver)
                assert delivery.request.flags == flags

    def back(self) -> list[Outcome]:
        return [o for message in self.to_requester for o in self.requester.receive(message)]


@given(st.binary(max_size=100), st.booleans())
def test_the_result_of_a_raw_call_is_marked(body: bytes, failed: bool) -> None:
    line = Line()
    line.submit(RAW | CALL)
    line.responder.answer(ID, body, failed=failed, now_s=0.0)
    flags = FINAL | (FAILURE if failed else RAW_REPLY)
    assert line.to_requester == [Reply(ID, flags, body)]
    assert line.back() == [Answered(ID, failed, body)]
    assert line.responder.receive(line.to_responder[0], 1.0) == []  # a copy gets the same
    assert line.to_requester == [Reply(ID, flags, body)] * 2


@pytest.mark.parametrize(("asked", "answered"), [(CALL, RAW_REPLY), (CALL | RAW, 0)])
def test_an_answer_of_the_wrong_kind_is_a_failure(asked: int, answered: int) -> None:
    line = Line()
    line.submit(asked)
    (outcome,) = line.requester.receive(Reply(ID, FINAL | answered, b"garbage"))
    assert isinstance(outcome, Answered)
    assert outcome.failed
    assert json.loads(outcome.body)["class"] == "BadReply"


def test_a_raw_cast_that_may_have_run_says_so_in_its_json() -> None:
    body = encode_raw(encode_invocation("keep", {"name": "a"}, context={"user": "u"}), EVERY_BYTE)
    invocation, data = decode_raw(mark_redelivered(body, is_raw=True))
    assert json.loads(invocation)["context"] == {"user": "u", "vchan_redelivered": True}
    assert data == EVERY_BYTE
    assert mark_redelivered(b"\0\0", is_raw=True) == b"\0\0"


def test_a_peer_that_takes_none_is_sent_none() -> None:
    line = Line(no_raw="upgrade it")
    with pytest.raises(Rejected, match="upgrade it"):
        line.submit(RAW | CALL)
    assert (line.to_responder, len(line.requester)) == ([], 0)
    with pytest.raises(Rejected, match="upgrade it"):
        line.submit(RAW)
    line.submit(CALL)
    assert len(line.to_responder) == 1


def test_a_peer_that_takes_raw_calls_alone_is_sent_no_raw_cast() -> None:
    line = Line()
    line.requester.opened(0.0, takes_raw=RAW_BODIES)
    with pytest.raises(Rejected, match="no raw casts"):
        line.submit(RAW)
    line.submit(RAW | CALL)
    assert len(line.to_responder) == 1


@pytest.mark.parametrize(("was_sent", "reason"), [(False, REFUSED), (True, AGENT_GONE)])
def test_a_later_peer_that_takes_none(was_sent: bool, reason: int) -> None:
    """What was sent to one that took it may have run."""
    line = Line()
    line.requester.connected = was_sent
    line.submit(RAW | CALL)
    line.requester.opened(1.0)
    (outcome,) = line.requester.handle_timeout(line.requester.next_timeout() or 0.0)
    assert isinstance(outcome, HandedBack)
    assert outcome.reason == reason
    assert NO_RAW in outcome.text


# ---------------------------------------------------------------- the host's envelopes


def raw_request(invocation: bytes, data: bytes = EVERY_BYTE, **fields: Any) -> Request:
    made = Request(ID, RAW | CALL, 0, 0, "openstack", "store", "", encode_raw(invocation, data))
    return made.changed(**fields)


def test_the_host_judges_a_raw_request_by_its_json() -> None:
    invocation = encode_invocation("turn", {"times": 2}, namespace="n", context={"user": "u"})
    asked = read(raw_request(invocation), 100)
    assert (asked.ask.method, asked.ask.namespace, asked.args) == ("turn", "n", {"times": 2})
    assert asked.context == {"user": "u"}


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (raw_request(b"{"), "is not JSON"),
        (raw_request(b"").changed(body=b"\x00\x00"), "shorter than it says"),
        (raw_request(b"{}"), 'expected "method"'),
        (raw_request(b'{"method":"m"}', bytes(REQUEST_BYTES_MAX)), "are allowed"),
        (
            raw_request(
                b'{"method":"request"}', exchange=httpcall.TOPIC.exchange, topic=httpcall.TOPIC.name
            ),
            "takes JSON, and no raw body",
        ),
    ],
)
def test_what_a_guest_sends_is_read_within_bounds(request_: Request, problem: str) -> None:
    with pytest.raises(EnvelopeError, match=problem):
        read(request_, 100)


def test_the_context_of_a_raw_request_is_cut_and_its_bytes_are_not() -> None:
    invocation = encode_invocation("turn", {}, context={"user": "u", "token": "secret"})
    body = cut_context(raw_request(invocation), lambda _: frozenset({"user"}))
    kept, data = decode_raw(body)
    assert json.loads(kept)["context"] == {"user": "u"}
    assert data == EVERY_BYTE
    for request in (raw_request(b"nonsense"), raw_request(b"").changed(body=b"\x00")):
        assert cut_context(request, lambda _: frozenset()) == request.body


class Recorded(OpenGate):
    """Everything is allowed, and what is refused is on record."""

    def __init__(self) -> None:
        super().__init__()
        self.record: list[str] = []

    def refused(self, ask: Any, request_id: bytes, reason: str) -> None:
        self.record.append(f"{ask.kind} {ask.topic} {ask.method}: {reason}")


class NoBroker:
    """Whatever is published is a mistake, but for the host's own words."""

    def __init__(self) -> None:
        self.published: list[bytes] = []

    def publish_request(self, vm: str, request_id: bytes, publication: Any) -> None:
        self.published.append(request_id)

    def listen_for_answers(self, vm: str) -> None:
        pass

    def ack(self, token: Any) -> None:
        pass


def test_a_raw_request_does_not_go_over_the_broker() -> None:
    said: list[Any] = []
    gate, broker = Recorded(), NoBroker()
    upward = Upward(
        VM, lambda data, _: said.append(decode(data)), broker, gate, lambda *_: None, "here"
    )
    upward.opened(resumed=False, now_s=0.0)
    upward.receive(raw_request(encode_invocation("turn", {})), 100.0)
    upward.handle_timeout(200.0)
    assert said == [Returned(ID, REFUSED, NO_RAW_TO_BROKER)]
    assert gate.record == [f"call store turn: {NO_RAW_TO_BROKER}"]
    assert ID not in broker.published
    assert upward.open_requests == 0


def test_a_raw_cast_does_not_go_over_the_broker_either() -> None:
    said: list[Any] = []
    upward = Upward(
        VM,
        lambda data, _: said.append(decode(data)),
        NoBroker(),
        Recorded(),
        lambda *_: None,
        "here",
    )
    upward.opened(resumed=False, now_s=0.0)
    upward.receive(raw_request(encode_invocation("keep", {}), flags=RAW), 100.0)
    upward.handle_timeout(200.0)
    assert said == [Returned(ID, REFUSED, NO_RAW_TO_BROKER)]


# ---------------------------------------------------------------- tests of agents


def test_a_fake_guest_carries_raw_bodies(endpoint: Endpoint) -> None:
    with FakeGuest() as guest:
        agent = guest.serve("files", endpoint)
        guest.control("store", Endpoint())
        assert guest.call_raw("files", "turn", EVERY_BYTE) == EVERY_BYTE[::-1]
        with pytest.raises(Rejected, match="takes bytes"):
            guest.call("files", "turn")
        assert agent.call_raw("store", "turn", b"ab", {"times": 2}) == b"ab"
        assert guest.sent[-1].data == b"ab"
        guest.cast_raw("files", "keep", b"cd")
        assert endpoint.kept == [b"cd"]
        agent.cast_raw("store", "keep", b"ef")
        assert (guest.sent[-1].kind, guest.sent[-1].data) == ("cast", b"ef")
        with pytest.raises(Rejected, match="takes JSON"):
            agent.call_raw("store", "plain", b"ab")
        with pytest.raises(Rejected, match="takes bytes"):
            agent.call("store", "turn")
        with pytest.raises(RemoteError, match="KeyError"):
            agent.call_raw("store", "fail", b"ab")


def test_vchan_dev_shows_how_many_bytes_there_are() -> None:
    dev = pytest.importorskip("vchan.host.dev")
    shown = dev.describe_request(raw_request(encode_invocation("turn", {"times": 2})))
    assert shown == "call store turn (256 bytes) times=2"
    assert "shorter than it says" in dev.describe_request(raw_request(b"").changed(body=b""))
    assert dev.describe_outcome(Answered(ID, False, EVERY_BYTE), is_raw=True) == "256 bytes"
    failed = Answered(ID, True, b'{"class":"KeyError","message":"m"}')
    assert dev.describe_outcome(failed, is_raw=True) == "KeyError: m"
